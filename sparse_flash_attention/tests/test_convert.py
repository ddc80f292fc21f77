"""Sparse attention put into existing networks: our layers, and transformers models through their registry."""

import pytest
import torch
from torch import nn

from sparse_flash_attention.convert import SparseOptions, convert_attention, register_transformers
from sparse_flash_attention.gpt import SparseGPT
from sparse_flash_attention.hashing import lsh_hash, lsh_projections, random_keep
from sparse_flash_attention.modules import DenseSelfAttention, HashSparseSelfAttention, QKSparseSelfAttention
from sparse_flash_attention.reference import masked_attention

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
VOCAB = 31


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(length=20, seed=0):
    return torch.randint(VOCAB, (2, length), generator=generator(seed))


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 0}
    nothing = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "eos_token_id": 0}
    config = transformers.GPT2Config(**(sizes | nothing | {"initializer_range": 0.3} | changes))
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {
    "gpt2": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),  # the scale is the model's, not 1/√D
    "llama": llama,
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32, two layers, logits of order ten


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", MODELS)
def test_keeping_all_equals_eager_attention(name, backend):
    model = MODELS[name]()
    eager = model(tokens()).logits
    assert convert_attention(model, "drop", backend=backend) is model
    torch.testing.assert_close(model(tokens()).logits, eager, **TOLERANCE)  # eval mode keeps all rows
    model.train()
    assert not torch.allclose(model(tokens()).logits, eager, **TOLERANCE)
    convert_attention(model, "drop", drop_prob=0.0, backend=backend)
    torch.testing.assert_close(model(tokens()).logits, eager, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_registered_name_works_without_conversion(name):
    register_transformers()
    model = MODELS[name]()
    eager = model(tokens()).logits
    model.config._attn_implementation = "qk_sparse"
    torch.testing.assert_close(model(tokens()).logits, eager, **TOLERANCE)
    model.set_attn_implementation("hash_sparse")
    sparse = model(tokens()).logits
    assert sparse.isfinite().all() and not torch.allclose(sparse, eager, **TOLERANCE)


@pytest.mark.parametrize("attention", ["drop", "hash"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_model_computes_the_masked_formula(name, attention, monkeypatch):
    """The same numbers drawn outside, and the definition's dense attention in their place."""
    from sparse_flash_attention import convert

    model = convert_attention(MODELS[name](), attention, n_buckets=4, drop_at_eval=True, generator=generator(3))
    found = model(tokens()).logits
    drawn = generator(3)

    def definition(module, query, key, value, attention_mask, scaling=None, **kwargs):
        batch, heads, length, _ = query.shape
        groups = heads // key.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, heads, -1, -1)
        if attention == "drop":
            q_keep = random_keep((batch, heads, length), 0.7, drawn)
            k_keep = random_keep(key.shape[:3], 0.7, drawn).repeat_interleave(groups, dim=1)
            mask = mask & q_keep[..., :, None] & k_keep[..., None, :]
        else:
            directions = lsh_projections(key.shape[1], key.shape[3], 4, generator=drawn).repeat_interleave(
                groups, dim=0
            )
            k_hash = lsh_hash(key.repeat_interleave(groups, dim=1), 4, projections=directions)
            mask = mask & (lsh_hash(query, 4, projections=directions)[..., :, None] == k_hash[..., None, :])
        return masked_attention(query, key, value, mask, scaling).transpose(1, 2), None

    for function in ("_qk_sparse", "_hash_sparse"):
        monkeypatch.setattr(convert, function, definition)
    register_transformers()
    try:
        torch.testing.assert_close(found, model(tokens()).logits, **TOLERANCE)
    finally:
        monkeypatch.undo()
        register_transformers()


@pytest.mark.parametrize("attention", ["drop", "hash"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_model_trains(name, attention):
    model = convert_attention(MODELS[name](), attention, n_buckets=2, generator=generator()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        ids = torch.randint(VOCAB, (4, 1), generator=generator(step)) + torch.arange(20)
        loss = model(ids % VOCAB, labels=ids % VOCAB).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 1


@pytest.mark.parametrize("name", MODELS)
def test_weights_stay_the_same_parameters(name):
    model = MODELS[name]()
    before = dict(model.named_parameters())
    after = dict(convert_attention(model, "hash").named_parameters())
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_is_hidden(name, padding):
    model = MODELS[name]()
    ids, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    mask[0, slice(0, 6) if padding == "left" else slice(14, 20)] = 0
    eager = model(ids, attention_mask=mask).logits[mask.bool()]
    found = convert_attention(model, "drop")(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, eager, **TOLERANCE)
    other = ids.masked_fill(~mask.bool(), 5)
    for attention, options in (("hash", {"hashing": "random"}), ("drop", {"drop_at_eval": True})):
        first, second = (
            convert_attention(model, attention, **options, generator=generator(1))(x, attention_mask=mask).logits
            for x in (ids, other)
        )
        torch.testing.assert_close(second[mask.bool()], first[mask.bool()])


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_continues_the_sequence(name):
    model = MODELS[name]()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(tokens(), **options)
    convert_attention(model, "drop")
    assert torch.equal(model.generate(tokens(), **options), eager)
    # several new rows behind a cache
    past = model(tokens()[:, :12], use_cache=True).past_key_values
    continued = model(tokens()[:, 12:], past_key_values=past).logits
    torch.testing.assert_close(continued, model(tokens()).logits[:, 12:], **TOLERANCE)
    convert_attention(model, "hash", n_buckets=2)
    assert model.generate(tokens(), **options).shape == eager.shape


def test_bidirectional_model_sees_the_future_too():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    eager = model(tokens(), attention_mask=mask).last_hidden_state
    found = convert_attention(model, "drop")(tokens(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], eager[mask.bool()], **TOLERANCE)


def test_unsupported_masks_and_dropout_are_refused():
    model = convert_attention(gpt2(), "drop")
    with pytest.raises(ValueError, match=r"attention_mask of shape .*: must be \(batch, length\), padding only"):
        model(tokens(), attention_mask=torch.zeros(2, 1, 20, 20))
    with pytest.raises(ValueError, match="must be a dynamic cache"):
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(tokens(), past_key_values=cache, attention_mask=torch.ones(2, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="attention mask: must be plain causal"):
        model(tokens(), position_ids=torch.arange(10).repeat(2, 2), use_cache=False)
    careless = convert_attention(gpt2(attn_pdrop=0.1), "drop")
    careless(tokens())
    with pytest.raises(ValueError, match=r"dropout=0.1: must be 0 on attention weights.*attn_pdrop=0"):
        careless.train()(tokens())


def test_own_layers_keep_weights_and_settings():
    model = nn.Sequential(DenseSelfAttention(12, 3, bias=True, key_norm="all", scale=0.4), nn.Sequential(nn.ReLU()))
    shared = DenseSelfAttention(12, 3)
    model.add_module("a", shared)
    model[1].add_module("b", shared)
    x, before = torch.randn(2, 9, 12, generator=generator()), dict(model.named_parameters())
    expected = model(x)
    model.eval()
    assert convert_attention(model, "drop", drop_prob=0.4, backend="reference") is model
    layer = model[0]
    assert type(layer) is QKSparseSelfAttention and not layer.training
    assert (layer.key_norm, layer.scale, layer.drop_prob) == ("all", 0.4, 0.4)
    assert all(dict(model.named_parameters())[key] is p for key, p in before.items())
    assert model.a is model[1].b
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("attention", ["hash", "drop", "reformer", "window", "random"])
def test_sparse_gpt_converts_to_the_arm_of_the_same_seed(attention):
    options = {"backend": "reference"} if attention in ("hash", "drop", "random") else {}
    sizes = {"d_model": 24, "n_layer": 2, "n_head": 3, "context": 32, "seed": 0}
    converted = convert_attention(SparseGPT(VOCAB, **sizes), attention, **options)
    built = SparseGPT(VOCAB, **sizes, attention=attention, **options)
    ids = tokens()
    with converted.seeded(1):
        found = converted(ids)
    with built.seeded(1):
        torch.testing.assert_close(found, built(ids))


def test_a_single_layer_and_kept_projections():
    layer = convert_attention(DenseSelfAttention(12, 3), "hash", redraw=False, backend="reference")
    assert type(layer) is HashSparseSelfAttention and not layer.projections.is_meta
    assert layer(torch.randn(1, 5, 12)).isfinite().all()


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: convert_attention(nn.TransformerEncoderLayer(8, 2)), TypeError, "MultiheadAttention is not supported"),
    (lambda: convert_attention(nn.Linear(2, 2)), TypeError, "model of type Linear: must hold DenseSelfAttention"),
    (lambda: convert_attention(DenseSelfAttention(8, 2), "flash"), ValueError, "attention='flash': must be one of"),
    (lambda: convert_attention(DenseSelfAttention(8, 2), n_bucket=4), ValueError, "n_bucket=4"),
    (lambda: convert_attention(DenseSelfAttention(8, 2), shared_qk=False), ValueError, "shared_qk=False: must be True"),
    (lambda: convert_attention(gpt2(), "window"), ValueError, "attention='window': must be one of drop, hash"),
    (lambda: convert_attention(gpt2(), "hash", chunk=4), ValueError, "chunk=4: must be one of drop_prob"),
    (lambda: SparseOptions(n_buckets=3), ValueError, "n_buckets=3: must be even and >= 2"),
    (lambda: SparseOptions(drop_prob=-1), ValueError, r"drop_prob=-1: must be in \[0, 1\]"),
    (lambda: SparseOptions(hashing="md5"), ValueError, "hashing='md5'"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
