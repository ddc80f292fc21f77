"""Models of transformers side by side, in other processes, and with attention that "pam" is not, or cannot be."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from mulfree_training.convert import convert_to_mulfree  # noqa: E402
from mulfree_training.huggingface import why_unsupported  # noqa: E402

TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gpt2_config():
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 4, "initializer_range": 0.2}
    return transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TINY, **HEADS)).eval()


def gpt_oss():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TINY, **HEADS, **experts)).eval()


def deepseek():
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    index = {"index_topk": 2, "index_n_heads": 2, "index_head_dim": 8, "first_k_dense_replace": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**TINY, **heads, **ranks, **index)).eval()


def ids() -> Tensor:
    return torch.randint(1, 20, (2, 9), generator=torch.Generator().manual_seed(1))


def pam(report) -> list[str]:
    return [path for path, text in report.converted.items() if "-> pam (" in text]


def test_other_models_of_one_configuration_stay_as_they_are():
    config = gpt2_config()
    a, b = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    expected = b(ids()).logits
    convert_to_mulfree(a)
    assert same_bits(b(ids()).logits, expected)
    assert a.config is a.transformer.config is a.transformer.h[0].attn.config and a.config is not config
    report = convert_to_mulfree(b, ("matmul",), derivative="exact")
    attention = b.transformer.h[0].attn
    assert pam(report) == ["transformer.h.0.attn"] and b.config is not a.config
    wanted = {"products": "pam", "normaliser": "standard", "derivative": "exact", "alpha": None, "backend": ""}
    assert attention.pam_options == wanted
    assert "transformer.h.0.attn" in report.left


def test_without_options_attention_counts_as_not_converted():
    model = transformers.GPT2LMHeadModel(gpt2_config()).eval()
    model.set_attn_implementation("pam")
    report = convert_to_mulfree(model, ("matmul",), derivative="exact")
    options = model.transformer.h[0].attn.pam_options
    assert pam(report) and (options["normaliser"], options["derivative"]) == ("standard", "exact")
    again = convert_to_mulfree(model, ("matmul",), derivative="exact")
    assert not again.converted


def test_models_converted_together_go_on_sharing_a_configuration():
    config = gpt2_config()
    both = nn.ModuleList(transformers.GPT2LMHeadModel(config) for _ in range(2))
    convert_to_mulfree(both)
    assert both[0].config is both[1].config and both[0].config is not config
    assert config._attn_implementation != "pam"


@pytest.mark.parametrize(("make", "argument"), [(gemma2, "softcap"), (gpt_oss, "s_aux"), (deepseek, "indices")])
def test_attention_that_takes_more_is_left_and_runs(make, argument):
    model = make()
    before = model.config._attn_implementation
    report = convert_to_mulfree(model)
    place = "model.layers.0.self_attn"
    assert not pam(report) and f"its attention takes {argument}," in report.left[place]
    assert f"{place}.o_proj" in report.converted and model.config._attn_implementation == before
    model(ids())


def test_gemma2_without_soft_caps_is_converted():
    config = transformers.Gemma2Config(**TINY, **HEADS, attn_logit_softcapping=None)
    model = transformers.Gemma2ForCausalLM(config).eval()
    assert len(pam(convert_to_mulfree(model))) == 2
    model(ids())


@pytest.mark.parametrize("make", [gemma2, lambda: transformers.GPT2LMHeadModel(gpt2_config()).eval()])
def test_skipping_all_attention_keeps_its_implementation(make):
    model = make()
    before, config = model.config._attn_implementation, model.config
    report = convert_to_mulfree(model, ("softmax",), skip=("*attn",))
    assert not pam(report) and model.config is config and config._attn_implementation == before
    model(ids())


def test_each_part_of_a_model_has_its_own_attention():
    text = {"model_type": "gemma2", **TINY, **HEADS}
    vision = {"model_type": "siglip_vision_model", **VISION, "projection_dim": 16}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=19, projection_dim=16)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    report = convert_to_mulfree(model)
    assert pam(report) and all("vision" in path for path in pam(report))
    assert "takes softcap" in report.left["model.language_model.layers.0.self_attn"]
    assert model.config.vision_config._attn_implementation == "pam" != model.config.text_config._attn_implementation
    inputs = torch.cat([torch.full((2, 4), 19), ids() % 19], 1)
    model(input_ids=inputs, pixel_values=torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "indices", "block_indices", "sinks", "cache", "cu_seq_lens_q"])
def test_what_pam_attention_would_drop_is_refused(name):
    attention = transformers.GPT2LMHeadModel(gpt2_config()).transformer.h[0].attn
    q, k, v = (torch.randn(2, 4, 5, 4) for _ in range(3))
    run = transformers.AttentionInterface()["pam"]
    harmless = {"sliding_window": 4, "position_ids": torch.arange(5), "output_attentions": True}
    run(attention, q, k, v, None, **harmless, **{name: None})
    with pytest.raises(NotImplementedError, match=f"{name}: must be None"):
        run(attention, q, k, v, None, **{name: torch.zeros(4)})


def test_attention_outside_the_interface_is_left():
    longt5 = transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(**T5))
    report = convert_to_mulfree(longt5)
    local = "encoder.block.0.layer.0.LocalSelfAttention"
    assert report.left[local] == "LongT5LocalAttention, its forward calls dropout, einsum, softmax"
    places = ["decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"]
    assert pam(report) == places
    sizes = {**TINY, "num_hidden_layers": 1, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}
    git = transformers.GitForCausalLM(transformers.GitConfig(**sizes, vision_config=VISION))
    report = convert_to_mulfree(git)
    assert pam(report) == ["git.image_encoder.vision_model.encoder.layers.0.self_attn"]
    assert "matmul, softmax" in report.left["git.encoder.layer.0.attention.self"]
    # what only holds an attention is not one
    assert "git.encoder.layer.0.attention" not in {**report.left, **report.converted}


def test_attention_with_a_replaced_forward_is_left():
    model = transformers.GPT2LMHeadModel(gpt2_config()).eval()
    attention = model.transformer.h[0].attn
    old = attention.forward
    attention.forward = lambda *args, **kwargs: old(*args, **kwargs)
    assert "forward replaced" in why_unsupported(attention)
    report = convert_to_mulfree(model)
    assert not pam(report) and "forward replaced" in report.left["transformer.h.0.attn"]


def test_attention_without_its_model_is_left():
    model = transformers.GPT2LMHeadModel(gpt2_config()).eval()
    report = convert_to_mulfree(model.transformer.h)
    assert "convert the whole model" in report.left["0.attn"]
    convert_to_mulfree(model)
    assert not convert_to_mulfree(model.transformer.h).left


def test_learned_positions_multiply_nothing():
    sizes = {"vocab_size": 20, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=16, word_embed_proj_dim=16)
    left = convert_to_mulfree(transformers.OPTForCausalLM(config)).left
    assert left == {"model.decoder.layers.0": "OPTDecoderLayer, its forward calls dropout"}


def test_a_pickled_model_runs_in_a_new_process(tmp_path):
    model = transformers.GPT2LMHeadModel(gpt2_config()).eval()
    convert_to_mulfree(model, derivative="exact")
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(ids()).logits.detach(), tmp_path / "out.pt")
    torch.save(ids(), tmp_path / "ids.pt")
    code = """
import sys, torch
model, ids, out = (torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False) for name in ("model", "ids", "out"))
assert torch.equal(model(ids).logits, out)
assert model.transformer.h[0].attn.pam_options["derivative"] == "exact"
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
