"""Models of transformers: converted, near what they computed, masked as before, and trained."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from mulfree_training.attention import attend  # noqa: E402
from mulfree_training.convert import convert_to_mulfree  # noqa: E402
from mulfree_training.functional import pam_cross_entropy  # noqa: E402
from mulfree_training.huggingface import PAMConv1D, register_transformers  # noqa: E402
from mulfree_training.modules import PAMGELU, PAMLinear  # noqa: E402
from mulfree_training.optim import PAMAdamW  # noqa: E402
from mulfree_training.products import pam_matmul  # noqa: E402
from mulfree_training.proof import forbid_multiplications  # noqa: E402


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).std() / expected.std()).item()


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    rest = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rest, **options))


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5, "initializer_range": 0.2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def ids() -> Tensor:
    return torch.randint(1, 20, (3, 9), generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("make", "inputs"), [(gpt2, ids), (vit, images)])
@pytest.mark.parametrize("scope", ["matmul", "softmax", ("matmul", "softmax", "norm", "activation")])
def test_converted_models_stay_near_what_they_computed(make, inputs, scope):
    model = make().eval()
    expected = model(inputs()).logits
    report = convert_to_mulfree(model, scope)
    attentions = [text for text in report.converted.values() if "-> pam (" in text]
    parts = ("pam" if "matmul" in scope else "standard", "pam" if "softmax" in scope else "standard")
    assert attentions and all("products {}, normaliser {}".format(*parts) in text for text in attentions)
    assert bool(report.left) == (len(scope) != 4)
    assert sum("loss computed inside" in text for text in report.warnings) == 1
    out = model(inputs()).logits
    assert 0 < error(out, expected) < 0.15
    assert not convert_to_mulfree(model, scope).converted
    assert same_bits(model(inputs()).logits, out)


def test_types_of_gpt2_and_ties():
    model = gpt2()
    convert_to_mulfree(model, strict=True)
    block = model.transformer.h[0]
    assert type(block.attn.c_attn) is PAMConv1D and type(block.mlp.act) is PAMGELU
    assert type(model.lm_head) is PAMLinear and model.lm_head.weight is model.transformer.wte.weight
    gpt2().load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16)
    layer = block.attn.c_attn
    with torch.no_grad():
        layer.bias.normal_()
    assert same_bits(layer(x), pam_matmul(x, layer.weight) + layer.bias)


def test_masks_are_those_of_the_model():
    model = gpt2().eval()
    convert_to_mulfree(model)
    out = model(ids()).logits
    changed = ids()
    changed[:, 5:] = 7
    assert same_bits(model(changed).logits[:, :5], out[:, :5])  # causal
    padded = torch.ones_like(ids())
    padded[1, :3] = 0  # padding on the left
    changed = ids()
    changed[1, :3] = 11
    a = model(ids(), attention_mask=padded, output_attentions=True)
    b = model(changed, attention_mask=padded)
    assert same_bits(a.logits[1, 3:], b.logits[1, 3:])
    assert not a.attentions[0][1, :, 3:, :3].any() and not a.attentions[0].triu(1).any()
    # and step by step with a cache
    cache = model(ids()[:, :6], use_cache=True).past_key_values
    assert same_bits(model(ids()[:, 6:8], past_key_values=cache).logits, out[:, 6:8])
    assert same_bits(model(ids()[:, 8:], past_key_values=cache).logits, out[:, 8:])


def test_grouped_heads_and_what_has_no_version():
    model = llama().eval()
    expected = model(ids()).logits
    report = convert_to_mulfree(model)
    assert {text.split(",")[0] for text in report.left.values()} >= {"LlamaRMSNorm"}
    assert 0 < error(model(ids()).logits, expected) < 0.15
    with pytest.raises(ValueError, match="strict=True: .*LlamaRMSNorm"):
        convert_to_mulfree(model, strict=True)


def test_skipped_attention_stays_ordinary():
    model, ordinary = gpt2().eval(), gpt2().eval()
    report = convert_to_mulfree(model, ("matmul", "softmax"), skip=("*.h.*", "lm_head"))
    assert (
        set(report.left) >= {"transformer.h.0", "transformer.h.1", "lm_head"} and "transformer.drop" in report.converted
    )
    torch.testing.assert_close(model(ids()).logits, ordinary(ids()).logits)


def test_a_model_inside_a_users_module():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = gpt2()

        def forward(self, x):
            return self.model(x).logits

    net, alone = Wrapper().eval(), gpt2().eval()
    report = convert_to_mulfree(net)
    convert_to_mulfree(alone)
    assert "model.transformer.h.1.attn" in report.converted
    assert same_bits(net(ids()), alone(ids()).logits)


def test_chosen_by_name_it_is_the_full_attention():
    register_transformers()
    by_name, converted = gpt2().eval(), gpt2().eval()
    by_name.set_attn_implementation("pam")
    convert_to_mulfree(converted, "softmax")
    q, k, v = (torch.randn(2, 4, 5, 4) for _ in range(3))
    run = transformers.AttentionInterface()["pam"]
    options = {"derivative": "approx", "alpha": None, "backend": ""}
    for model, products in ((by_name, "pam"), (converted, "standard")):
        out, weights = run(model.transformer.h[0].attn, q, k, v, None, scaling=0.3)
        expected = attend(q, k, v, None, 0.0, True, 0.3, False, products=products, normaliser="pam", options=options)
        assert same_bits(out.transpose(1, 2), expected[0]) and same_bits(weights, expected[1])
    bias = torch.randn(1, 4, 5, 5)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    out = run(by_name.transformer.h[0].attn, q, k, v, seen, scaling=0.3, position_bias=bias)[0]
    same = run(by_name.transformer.h[0].attn, q, k, v, None, scaling=0.3, position_bias=bias, is_causal=True)[0]
    mask = bias.masked_fill(~seen, -float("inf"))
    assert same_bits(out, run(by_name.transformer.h[0].attn, q, k, v, mask, scaling=0.3)[0])
    assert same_bits(out, same)
    with pytest.raises(NotImplementedError, match="softcap: must be None"):
        run(by_name.transformer.h[0].attn, q, k, v, None, softcap=30.0)


@pytest.mark.parametrize(("make", "inputs"), [(gpt2, ids), (vit, images)])
def test_converted_models_train_without_a_multiplication(make, inputs):
    model = make().train()
    convert_to_mulfree(model, strict=True)
    optimizer = PAMAdamW(model.parameters(), 0.01, scalars="pam")
    x = inputs()
    target = x.roll(-1, 1) if x.dim() == 2 else torch.arange(len(x)) % 5
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        if step:
            loss = pam_cross_entropy(model(x).logits.flatten(0, -2), target.flatten())
            loss.backward()
            optimizer.step()
        else:
            with forbid_multiplications():
                loss = pam_cross_entropy(model(x).logits.flatten(0, -2), target.flatten())
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
