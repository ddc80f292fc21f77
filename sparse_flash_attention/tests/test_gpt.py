"""The language model: the paper's sizes, its formula, causality, and arms that differ in nothing but attention."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from sparse_flash_attention import gpt
from sparse_flash_attention.gpt import GPTConfig, SparseGPT

torch.set_num_threads(1)
F64 = torch.float64
VOCAB, LENGTH = 17, 24
ARMS = {
    "dense": {},
    "hash": {"n_buckets": 4, "backend": "reference"},
    "drop": {"backend": "reference"},
    "reformer": {"n_buckets": 2, "chunk": 4},
    "random": {"n_buckets": 4, "backend": "reference"},
    "window": {"window": 3},
}


def small(attention="dense", seed=0, **options):
    return SparseGPT(VOCAB, 24, 2, 3, 32, attention, seed=seed, **(ARMS[attention] | options))


def tokens(seed=0, length=LENGTH, batch=2):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def millions(model):
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


@pytest.mark.parametrize("attention", ARMS)
@pytest.mark.parametrize(("changes", "expected"), [
    ({"context": 8192}, 122.80), ({"context": 16384}, 129.09), ({"positions": False}, 116.51),
])  # fmt: skip
def test_parameter_counts_are_the_papers(attention, changes, expected):
    with torch.device("meta"):
        model = SparseGPT(GPTConfig(), attention=attention, **changes)
    assert millions(model) == expected
    assert model.token.weight.shape == (50304, 768)


def test_config_and_keywords_are_one():
    config = GPTConfig(VOCAB, 24, 2, 3, 32, "hash", options={"n_buckets": 4})
    model = SparseGPT(config, n_layer=3, include_self=False)
    assert model.config == GPTConfig(VOCAB, 24, 3, 3, 32, "hash", options={"n_buckets": 4, "include_self": False})
    assert [layer.n_buckets for layer in model.attentions] == [4] * 3
    assert not any(layer.include_self for layer in model.attentions)
    assert SparseGPT(VOCAB, d_model=24, n_head=3, n_layer=1, context=8).config.attention == "dense"
    assert config.n_layer == 2


def formula(model, ids):
    """GPT-2 with shared QK, written out (dense, float64)."""
    d, heads = model.config.d_model, model.config.n_head

    def norm(x, weight):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = model.token.weight[ids] + model.position.weight[: ids.shape[1]]
    for block in model.blocks:
        q, v = (norm(x, block.attention_norm.weight) @ block.attention.in_proj.weight.T).chunk(2, -1)
        q, v = (y.reshape(*ids.shape, heads, d // heads).transpose(1, 2) for y in (q, v))
        k = q / q.norm(dim=-1, keepdim=True)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*ids.shape, d)
        x = x + mixed @ block.attention.out_proj.weight.T
        y = norm(x, block.mlp_norm.weight) @ block.up.weight.T
        x = x + (y * (1 + torch.erf(y / math.sqrt(2))) / 2) @ block.down.weight.T
    return norm(x, model.norm.weight) @ model.token.weight.T


def moved(model):
    """Weights of order one, norms away from 1."""
    g = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype) / (3 if p.ndim > 1 else 1)
    return model


def test_dense_model_is_its_formula():
    model = moved(small().double())
    torch.testing.assert_close(model(tokens()), formula(model, tokens()), rtol=1e-10, atol=1e-10)


def test_loss_is_the_mean_cross_entropy():
    model = moved(small().double())
    ids, targets = tokens(), tokens(1)
    logits = formula(model, ids)
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(model.loss(ids, targets), -picked.mean(), rtol=1e-10, atol=1e-10)


def test_loss_in_pieces_is_the_loss(monkeypatch):
    model = moved(small().double())
    ids, targets = tokens(), tokens(1)
    targets[0, :5] = -100
    whole = model.loss(ids, targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(whole, list(model.parameters()))
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", 7 * VOCAB)  # does not divide the rows
    pieces = model.loss(ids, targets)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    for grad, want in zip(torch.autograd.grad(pieces, list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_loss_is_float32_under_autocast(monkeypatch):
    model = moved(small())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.loss(tokens(), tokens(1)).dtype == torch.float32
        monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", 7 * VOCAB)
        assert model.loss(tokens(), tokens(1)).dtype == torch.float32


def test_weights_depend_on_the_seed_and_not_on_the_arm():
    expected = small("dense").state_dict()
    for attention in ARMS:
        torch.manual_seed(len(attention))
        for options in [{}, {"redraw": False}] if attention in ("hash", "reformer") else [{}]:
            model = small(attention, **options)
            for name, p in model.named_parameters():
                assert torch.equal(p, expected[name]), name
    other = small("dense", seed=1).state_dict()
    assert not torch.equal(other["token.weight"], expected["token.weight"])
    torch.manual_seed(3)
    first = small(seed=None)
    torch.manual_seed(3)
    assert torch.equal(small(seed=None).token.weight, first.token.weight)
    assert not torch.equal(small(seed=None).token.weight, first.token.weight)


def test_kept_projections_differ_between_layers_and_follow_the_seed():
    first, second = (small("hash", redraw=False) for _ in range(2))
    a, b = (layer.projections for layer in first.attentions)
    assert not torch.equal(a, b) and torch.equal(a, second.attentions[0].projections)
    assert not torch.equal(a, small("hash", seed=1, redraw=False).attentions[0].projections)


def test_initial_spread_is_gpt2s():
    model = SparseGPT(500, 192, 3, 3, 300, seed=0, bias=True)
    block = model.blocks[1]
    for weight in (model.token.weight, model.position.weight, block.attention.in_proj.weight, block.up.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 5e-4
    for weight in (block.attention.out_proj.weight, block.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)
    assert not block.attention.in_proj.bias.any() and not block.attention.out_proj.bias.any()
    assert torch.equal(model.norm.weight, torch.ones(192)) and model.norm.bias is None
    assert not torch.equal(model.blocks[0].up.weight, block.up.weight)


@pytest.mark.parametrize("attention", [arm for arm in ARMS if arm != "reformer"])
def test_later_tokens_change_nothing(attention):
    model = moved(small(attention).double())
    ids = tokens()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % VOCAB
    with model.seeded(0):
        before = model(ids)
    with model.seeded(0):
        after = model(changed)
    torch.testing.assert_close(after[:, :10], before[:, :10], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 10:], before[:, 10:])


@pytest.mark.parametrize("attention", ["hash", "random", "drop", "reformer"])
def test_seeded_makes_evaluation_repeatable(attention):
    model = moved(small(attention))

    def seeded(seed):
        with model.seeded(seed):
            return model(tokens())

    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    assert all(layer.generator is None for layer in model.attentions)
    assert not torch.equal(model(tokens()), model(tokens()))
    with model.seeded(1):
        first = model(tokens())
        assert not torch.equal(model(tokens()), first)  # draws go on, and differ between the layers


@pytest.mark.parametrize("attention", ARMS)
def test_densities_are_a_number_a_layer_and_only_on_demand(attention):
    model = moved(small(attention))
    model(tokens())
    assert all(layer.density is None for layer in model.attentions)
    with model.seeded(0):
        found = model.densities(tokens())
    assert found.shape == (2,) and found.dtype == F64 and not found.requires_grad
    assert not any(layer.record_density for layer in model.attentions)
    assert (found == 1).all() if attention == "dense" else ((found > 0) & (found < 1)).all()
    if attention == "random":  # a pair of two rows meets with probability 1/4, a row always meets itself
        assert found.mean().item() == pytest.approx(2 / 25 + 23 / 25 / 4, abs=0.05)


@pytest.mark.parametrize("attention", ARMS)
def test_every_arm_learns(attention):
    """A token decides the next: all arms must bring the loss far below ln 17."""
    model = small(attention)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(120):
        ids = torch.randint(VOCAB, (8, LENGTH), generator=g)
        loss = model.loss(ids, (3 * ids + 1) % VOCAB)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_parameter_groups_decay_the_matrices_of_the_blocks_only():
    model = small()
    decayed, rest = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"in_proj", "out_proj", "up", "down"}
    assert len(decayed["params"]) + len(rest["params"]) == len(names) and len(decayed["params"]) == 8


def test_head_is_the_token_embedding():
    model = small()
    with torch.no_grad():
        model.token.weight[3] = 0
    assert torch.equal(model(tokens())[..., 3], torch.zeros(2, LENGTH))
    assert sum(p.shape == (VOCAB, 24) for p in model.parameters()) == 1


@pytest.mark.parametrize("attention", ["dense", "hash"])
def test_compiles_without_a_break(attention):
    model = small(attention, **({"redraw": False} if attention == "hash" else {}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))
    twin = copy.deepcopy(model)
    torch.compile(model.loss, fullgraph=True, backend="aot_eager")(tokens(), tokens(1)).backward()
    twin.loss(tokens(), tokens(1)).backward()
    for p, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, want.grad)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: GPTConfig(d_model=10, n_head=3), "n_head=3: must divide d_model=10"),
    (lambda: GPTConfig(context=0), "context=0: must be >= 1"),
    (lambda: SparseGPT(0), "vocab=0: must be >= 1"),
    (lambda: SparseGPT(VOCAB, 24, 2, 3, 32, "flash"), "attention='flash': must be one of dense"),
    (lambda: SparseGPT(VOCAB, 24, 2, 3, 32, n_buckets=4), "n_buckets=4: attention='dense' takes only"),
    (lambda: small()(tokens(length=33)), "ids of length 33: must be <= context=32"),
    (lambda: small()(tokens()[0]), r"ids of shape \(24,\): must be"),
    (lambda: small().loss(tokens(), tokens()[:1]), r"targets of shape \(1, 24\): must be that of ids"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
