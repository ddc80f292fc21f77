"""Every attention layer against a dense formula written out in float64, and what its options mean."""

import copy

import pytest
import torch
from torch import nn

from sparse_flash_attention.hashing import lsh_hash, lsh_projections, random_buckets, random_keep
from sparse_flash_attention.modules import (
    ATTENTIONS,
    DenseSelfAttention,
    HashSparseSelfAttention,
    QKSparseSelfAttention,
    ReformerSelfAttention,
    WindowSelfAttention,
    self_attention,
    unit_rows,
)
from sparse_flash_attention.pairs import reformer_chunk_mask

torch.set_num_threads(1)
F64 = torch.float64
ROUNDING = 1e-11
B, T, D, H = 2, 37, 24, 3
BACKENDS = ["reference", None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(seed=0, length=T, dtype=F64):
    return torch.randn(B, length, D, generator=generator(seed), dtype=F64).to(dtype)


def filled(layer, seed=0):
    """Weights of order one, biases included, so that no term can hide; randomness from a generator."""
    g = generator(seed)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64).to(p.dtype) / 3
    layer.generator = generator(7)
    return layer


def projected(layer, x):
    """q, k, v (B, H, T, D/H), row by row as the paper writes them."""
    shared = layer.shared_qk
    pieces = [x @ w.T for w in layer.in_proj.weight.chunk(2 if shared else 3)]
    if layer.in_proj.bias is not None:
        pieces = [y + b for y, b in zip(pieces, layer.in_proj.bias.chunk(len(pieces)), strict=True)]
    q, k, v = pieces[0], pieces[0] if shared else pieces[1], pieces[-1]
    if layer.key_norm == "all":
        k = k / k.square().sum(-1, keepdim=True).sqrt()
    q, k, v = (y.reshape(B, -1, H, D // H).permute(0, 2, 1, 3) for y in (q, k, v))
    if layer.key_norm == "head":
        k = k / k.square().sum(-1, keepdim=True).sqrt()
    return q, k, v


def dense(layer, x, mask, scale=(D // H) ** -0.5):
    """Output for a mask (…, T, T); rows that see nothing are 0 before the output projection."""
    q, k, v = projected(layer, x)
    weights = torch.exp(torch.einsum("bhtd,bhud->bhtu", q, k) * scale) * mask
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhtu,bhud->bhtd", weights / total.where(total > 0, 1), v)
    out = out.permute(0, 2, 1, 3).reshape(B, -1, D) @ layer.out_proj.weight.T
    return out if layer.out_proj.bias is None else out + layer.out_proj.bias


def causal(length=T, strict=False):
    return torch.ones(length, length, dtype=F64).tril(-1 if strict else 0)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("shared_qk", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("key_norm", [None, "head", "all", "none"])
def test_dense_layer_is_its_formula(shared_qk, bias, key_norm):
    layer = filled(DenseSelfAttention(D, H, shared_qk=shared_qk, bias=bias, key_norm=key_norm, dtype=F64))
    assert layer.key_norm == (key_norm or ("head" if shared_qk else "none"))
    same(layer(rows()), dense(layer, rows(), causal()))


def test_scale_is_an_option():
    layer = filled(DenseSelfAttention(D, H, scale=0.9, dtype=F64))
    same(layer(rows()), dense(layer, rows(), causal(), 0.9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("shared_qk", [True, False])
@pytest.mark.parametrize("hashing", ["lsh", "random"])
def test_hash_layer_is_its_formula(shared_qk, include_self, hashing, backend):
    options = {"n_buckets": 4, "shared_qk": shared_qk, "include_self": include_self, "hashing": hashing}
    layer = filled(HashSparseSelfAttention(D, H, **options, bias=True, backend=backend, dtype=F64))
    found, g = layer(rows()), generator(7)
    q, k, _ = projected(layer, rows())
    if hashing == "random":
        q_hash = k_hash = random_buckets((B, H, T), 4, g)
    else:
        directions = lsh_projections(H, D // H, 4, generator=g)
        q_hash, k_hash = (lsh_hash(y, 4, projections=directions) for y in (q, k))
    mask = (q_hash[..., :, None] == k_hash[..., None, :]) * causal(strict=not include_self)
    assert 0.1 < (mask.sum() / causal().sum() / B / H) < 0.9
    same(found, dense(layer, rows(), mask))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared_qk", [True, False])
def test_drop_layer_is_its_formula(shared_qk, backend):
    layer = filled(QKSparseSelfAttention(D, H, drop_prob=0.3, shared_qk=shared_qk, backend=backend, dtype=F64))
    found, g = layer(rows()), generator(7)
    q_keep = random_keep((B, H, T), 0.7, g)
    k_keep = random_keep((B, H, T), 0.7, g)  # drawn apart from the queries'
    assert not torch.equal(q_keep, k_keep)
    same(found, dense(layer, rows(), q_keep[..., :, None] * k_keep[..., None, :] * causal()))
    layer.eval()
    same(layer(rows()), dense(layer, rows(), causal()))
    layer.drop_at_eval, layer.generator = True, generator(7)
    same(layer(rows()), found)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("include_self", [True, False])
def test_reformer_layer_is_its_formula(rounds, include_self):
    options = {"n_buckets": 4, "chunk": 5, "rounds": rounds, "include_self": include_self}
    layer = filled(ReformerSelfAttention(D, H, **options, dtype=F64))
    hashes = lsh_hash(projected(layer, rows())[0], 4, rounds=rounds, generator=generator(7))
    same(layer(rows()), dense(layer, rows(), reformer_chunk_mask(hashes, 5, include_self=include_self)))


@pytest.mark.parametrize("window", [1, 4, 100])
def test_window_layer_is_its_formula(window):
    layer = filled(WindowSelfAttention(D, H, window=window, dtype=F64))
    same(layer(rows()), dense(layer, rows(), causal().triu(1 - window)))


def test_window_one_mixes_no_rows():
    layer = filled(WindowSelfAttention(D, H, dtype=F64))
    moved = layer(rows().roll(5, dims=1))
    same(moved, layer(rows()).roll(5, dims=1))


ARMS = {
    "dense": {},
    "hash": {"n_buckets": 4, "backend": "reference"},
    "drop": {"backend": "reference"},
    "reformer": {"n_buckets": 4, "chunk": 8},
    "random": {"n_buckets": 4, "backend": "reference"},
    "window": {"window": 3},
}


def test_arms_are_all_kinds():
    assert set(ARMS) == {*ATTENTIONS, "random"}
    assert self_attention("random", D, H).hashing == "random"


@pytest.mark.parametrize("arm", ARMS)
def test_gradients_are_finite_everywhere_and_right(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm], bias=True, dtype=F64))
    x = rows(length=6).requires_grad_()

    def run(x, *parameters):
        layer.generator = generator(3)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    names, values = zip(*layer.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("arm", ["hash", "random", "drop", "reformer"])
def test_randomness_is_drawn_anew_in_every_forward_and_from_the_generator(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm], dtype=F64))
    first, second = layer(rows()), layer(rows())
    assert not torch.equal(first, second)
    layer.generator = generator(7)
    assert torch.equal(layer(rows()), first) and torch.equal(layer(rows()), second)
    layer.generator = None
    torch.manual_seed(0)
    free = layer(rows())
    torch.manual_seed(0)
    assert torch.equal(layer(rows()), free)
    if arm != "drop":  # in evaluation too, as the official code does
        layer.eval()
        assert not torch.equal(layer(rows()), layer(rows()))


@pytest.mark.parametrize("arm", ["hash", "reformer"])
def test_kept_projections_belong_to_the_state(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm], redraw=False, dtype=F64))
    assert torch.equal(layer(rows()), layer(rows())) and "projections" in layer.state_dict()
    other = self_attention(arm, D, H, **ARMS[arm], redraw=False, dtype=F64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(rows()), other(rows()))
    before = layer.projections.clone()
    layer.reset_projections(generator(5))
    assert torch.equal(layer.projections, lsh_projections(H, D // H, 4, generator=generator(5)))
    assert not torch.equal(before, layer.projections)
    assert "projections" not in self_attention(arm, D, H, **ARMS[arm]).state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shared_rows_share_a_bucket_in_low_precision(dtype):
    """Hashed twice, a few rows of q and q/‖q‖ part in bfloat16, and then row t would not see itself."""
    layer = filled(HashSparseSelfAttention(D, H, n_buckets=12, backend="reference")).to(dtype)
    x = torch.zeros(B, 400, D, dtype=dtype)
    seen = []
    layer.attend = lambda q, k, v: seen.append(layer._buckets(q, k)) or v
    layer(x + rows(length=400, dtype=dtype))
    assert seen[0][1] is None


def test_zero_rows_have_zero_keys_and_finite_gradients():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]], requires_grad=True)
    unit = unit_rows(x)
    assert torch.equal(unit, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]]))
    (grad,) = torch.autograd.grad(unit.sum(), x)
    assert grad.isfinite().all() and torch.equal(grad[1:], torch.zeros(2, 2))
    for dtype in (torch.float16, torch.bfloat16):
        long = torch.full((1, 64), 200.0, dtype=dtype)  # the square of the norm is past float16
        torch.testing.assert_close(unit_rows(long), torch.full((1, 64), 0.125, dtype=dtype))
    layer = filled(HashSparseSelfAttention(D, H, backend="reference"))
    layer(torch.zeros(1, 5, D)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_density_is_recorded_only_when_asked(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm], dtype=F64))
    layer(rows())
    assert layer.density is None
    layer.record_density, layer.generator = True, generator(7)
    layer(rows())
    layer.generator, pairs = generator(7), []

    def count(q, k, v):
        g = generator(7)
        if arm == "drop":
            mask = random_keep((B, H, T), 0.7, g)[..., None] * random_keep((B, H, T), 0.7, g)[..., None, :]
        elif arm in ("hash", "reformer", "random"):
            ids = random_buckets((B, H, T), 4, g) if arm == "random" else lsh_hash(q, 4, generator=g)
            mask = ids[..., None] == ids[..., None, :]
            mask = reformer_chunk_mask(ids, 8) if arm == "reformer" else mask
        else:
            mask = torch.ones(T, T).triu(-2 if arm == "window" else -T)
        pairs.append((mask * causal()).expand(B, H, T, T).sum() / (B * H) / (T * (T + 1) / 2))
        return v

    layer.attend = count
    layer(rows())
    assert layer.density.dtype == F64
    same(layer.density, pairs[0])


@pytest.mark.parametrize("arm", ARMS)
def test_autocast_and_low_precision(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm]))
    x = rows(dtype=torch.float32)
    exact = layer(x)
    if arm in ("hash", "reformer"):
        return  # a row between two buckets may cross over with its bits; the formula is checked above
    layer.generator = generator(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, marks=pytest.mark.slow) if arm in ("reformer", "window") else arm for arm in ARMS]
)
def test_compiles_without_a_break(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm]))
    layer.generator = None
    if arm in ("hash", "reformer"):
        layer = self_attention(arm, D, H, **ARMS[arm], redraw=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (T, T + 4):
        x = rows(length=length, dtype=torch.float32)
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), expected)
    compiled(rows(dtype=torch.float32)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_copies_and_builds_on_the_meta_device(arm):
    layer = filled(self_attention(arm, D, H, **ARMS[arm], dtype=F64))
    twin = copy.deepcopy(layer)
    twin.generator, layer.generator = generator(1), generator(1)
    assert torch.equal(layer(rows()), twin(rows()))
    with torch.device("meta"):
        empty = self_attention(arm, D, H, **ARMS[arm], **({"redraw": False} if arm in ("hash", "reformer") else {}))
    assert all(p.is_meta for p in empty.parameters())
    assert [p.shape for p in empty.parameters()] == [p.shape for p in layer.parameters()]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: DenseSelfAttention(10, 3), "num_heads=3: must be >= 1 and divide embed_dim=10"),
    (lambda: DenseSelfAttention(10, 0), "num_heads=0"),
    (lambda: DenseSelfAttention(8, 2, key_norm="row"), "key_norm='row': must be None or one of head, all, none"),
    (lambda: QKSparseSelfAttention(8, 2, drop_prob=1.5), r"drop_prob=1.5: must be in \[0, 1\]"),
    (lambda: HashSparseSelfAttention(8, 2, n_buckets=5), "n_buckets=5: must be even and >= 2"),
    (lambda: HashSparseSelfAttention(8, 2, hashing="md5"), "hashing='md5': must be one of lsh, random"),
    (lambda: HashSparseSelfAttention(8, 2, hashing="random", redraw=False), "redraw=False"),
    (lambda: ReformerSelfAttention(8, 2, shared_qk=False), "shared_qk=False: must be True"),
    (lambda: ReformerSelfAttention(8, 2, chunk=0), "chunk=0: must be >= 1"),
    (lambda: ReformerSelfAttention(8, 2, rounds=0), "rounds=0: must be >= 1"),
    (lambda: WindowSelfAttention(8, 2, window=0), "window=0: must be >= 1"),
    (lambda: self_attention("flash", 8, 2), "attention='flash': must be one of dense, hash, drop"),
    (lambda: self_attention("hash", 8, 2, chunk=4), "chunk=4: attention='hash' takes only .*n_buckets"),
    (lambda: DenseSelfAttention(8, 2)(torch.ones(3, 8)), r"x of shape \(3, 8\): must be \(batch, length, 8\)"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layers_print_their_options():
    assert "n_buckets=16" in repr(HashSparseSelfAttention(8, 2)) and "drop_prob=0.3" in repr(
        QKSparseSelfAttention(8, 2)
    )
    assert isinstance(HashSparseSelfAttention(8, 2).in_proj, nn.Linear)
