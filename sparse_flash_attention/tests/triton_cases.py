"""The Triton kernels against the masked reference in float64; `test_triton.py` runs this file in its own process.

Error rule: at most 2 times (gradients 3 times) the error of plain PyTorch in the same dtype, plus a floor, since plain
PyTorch can be exact by chance (one visible key): 4 roundings of the largest value, and for gradients 4 in float32 of
what the backward computes with. It recomputes p = exp(s - lse), as every flash attention does, so p carries the
roundings of s and of lse, and dq and dk are sums of differences p (grad v - delta).
"""

import pytest
import torch

from common.kernels.interpreter import interpreting
from sparse_flash_attention import operator
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.kernels import triton_face
from sparse_flash_attention.kernels.tiles import INTERPRETED, Tile
from sparse_flash_attention.reference import masked_attention, visible
from sparse_flash_attention.segments import plan

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.3
ODD = [(torch.float32, length) for length in (1, 2, 63, 130)] + [(dtype, 17) for dtype in DTYPES[1:]]


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, so that what a kernel does not write is seen; the seed is fixed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(dtype, q_len, k_len=None, *, heads=2, k_heads=None, d=32, d_v=None, batch=1):
    k_len, k_heads, d_v = k_len or q_len, k_heads or heads, d_v or d
    shapes = (batch, heads, q_len, d), (batch, k_heads, k_len, d), (batch, k_heads, k_len, d_v)
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def keep(share, length, heads=2, batch=1):
    return torch.rand(batch, heads, length, device=DEVICE) < share


def buckets(n, length, heads=2, batch=1):
    return torch.randint(-2, n - 2, (batch, heads, length), device=DEVICE)


def judge(q, k, v, **sparsity):
    """Output, log-sum-exp and gradients of the Triton face against the rule; returns them."""
    shape = (*q.shape[:3], k.shape[2])
    mask = visible(shape, **sparsity, device=DEVICE)
    ranges = plan(shape, **sparsity, device=DEVICE)
    grad = torch.randn(*q.shape[:3], v.shape[3], device=DEVICE).to(q.dtype)

    def run(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = run(lambda *x: masked_attention(*x, mask, SCALE), torch.float64)
    plain = run(lambda *x: masked_attention(*x, mask, SCALE), q.dtype)
    logs = []

    def planned(*x):
        out, lse = operator.planned_attention(*x, ranges, SCALE, "triton")
        logs.append(lse)
        return out

    # strides as given: no copies before the kernel sees them
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = planned(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.detach().double().repeat_interleave(group, 1) for x in (k, v))
    scores = SCALE * q.detach().double() @ wide_k.mT
    spread = 4 + scores.abs().max()
    slope = spread * SCALE * (grad.double() @ wide_v.mT).abs().max()
    noise = {"dq": slope * k.abs().max(), "dk": slope * q.abs().max(), "dv": spread * grad.abs().max()}
    for name, one, other, truth in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        assert one.dtype == q.dtype and one.shape == truth.shape, name
        close(name, one, other, truth, 2 if name == "out" else 3, noise.get(name, torch.zeros(())).item())
    blind = ~mask.any(-1)
    assert (found[0][blind] == 0).all() and (found[1][blind] == 0).all()
    unused = ~mask.any(-2).unflatten(1, (k.shape[1], -1)).any(2)
    assert (found[2][unused] == 0).all() and (found[3][unused] == 0).all()
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    assert (logs[0][blind] == torch.inf).all() and logs[0].dtype == torch.float32
    # inputs are exact in float64: only float32 sums and exponentials differ
    torch.testing.assert_close(logs[0][~blind].double(), lse[~blind], rtol=1e-5, atol=1e-5)
    return found


def close(name, found, plain, exact, factor, noise):
    assert found.isfinite().all(), name
    error, rival = ((x.double() - exact).abs().max() for x in (found, plain))
    floor = 4 * torch.finfo(found.dtype).eps * exact.abs().max() + 4 * torch.finfo(torch.float32).eps * noise
    assert error <= factor * rival + floor, f"{name}: error {error:.2e}, plain PyTorch {rival:.2e}, floor {floor:.1e}"


@pytest.mark.parametrize(("dtype", "length"), [*ODD, *((dtype, 65) for dtype in DTYPES)])
def test_keep_masks(dtype, length):
    judge(*tensors(dtype, length), q_keep=keep(0.6, length), k_keep=keep(0.6, length))


@pytest.mark.parametrize(("dtype", "length"), [*ODD, *((dtype, 65) for dtype in DTYPES)])
def test_buckets_of_queries_and_keys(dtype, length):
    judge(*tensors(dtype, length), q_hash=buckets(5, length), k_hash=buckets(5, length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "d_v"), [(16, 16), (64, 64), (80, 80), (128, 16), (16, 80), (24, 33)])
def test_head_sizes(dtype, d, d_v):
    ids = buckets(3, 40)
    judge(*tensors(dtype, 40, d=d, d_v=d_v), q_hash=ids, k_hash=ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_queries(dtype):
    q, k, v = tensors(dtype, 33, heads=4, k_heads=2, batch=2)
    judge(q, k, v, q_keep=keep(0.7, 33, 4, 2), k_keep=keep(0.7, 33, 4, 2), q_hash=buckets(3, 33, 4, 2),
          k_hash=buckets(3, 33, 4, 2))  # fmt: skip


@pytest.mark.parametrize(("q_len", "k_len"), [(33, 70), (70, 33), (1, 65), (65, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_that_differ(q_len, k_len, causal):
    judge(*tensors(torch.float32, q_len, k_len), q_keep=keep(0.7, q_len), k_keep=keep(0.7, k_len), causal=causal)
    judge(*tensors(torch.float32, q_len, k_len), q_hash=buckets(3, q_len), k_hash=buckets(3, k_len), causal=causal)


@pytest.mark.parametrize("include_self", [True, False])
def test_nothing_dropped_is_dense_attention(include_self):
    q, k, v = tensors(torch.float32, 70)
    found = judge(q, k, v, include_self=include_self)
    if include_self:
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
        torch.testing.assert_close(found[0], dense.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["q_keep", "k_keep"])
def test_all_dropped_gives_zeros(side):
    found = judge(*tensors(torch.float32, 40), **{side: keep(0.0, 40)})
    assert all((x == 0).all() for x in found)


def test_a_head_without_rows_beside_a_full_one():
    mask = torch.tensor([[[True], [False]]], device=DEVICE).expand(1, 2, 70)
    judge(*tensors(torch.float32, 70), q_keep=mask, k_keep=mask)


def test_one_giant_bucket_and_singletons():
    ids = torch.arange(130, device=DEVICE) * (torch.arange(130, device=DEVICE) % 10 == 0)
    ids = ids.expand(1, 2, 130)
    judge(*tensors(torch.float32, 130), q_hash=ids, k_hash=ids)


@pytest.mark.parametrize("include_self", [True, False])
def test_singletons_see_themselves_or_nothing(include_self):
    ids = torch.randperm(70, device=DEVICE).expand(1, 2, 70)
    q, k, v = tensors(torch.float32, 70)
    out = judge(q, k, v, q_hash=ids, k_hash=ids, include_self=include_self)[0]
    assert torch.equal(out, v.detach() if include_self else torch.zeros_like(v))


def test_a_tile_of_keys_across_buckets_with_late_queries_first():
    """Positions are not monotone across buckets: a bound from the last early tile of queries skips live ones."""
    place = torch.arange(130, device=DEVICE)
    q_hash = (15 - place * 16 // 130).expand(1, 2, 130)
    k_hash = torch.randint(0, 16, (1, 2, 130), device=DEVICE)
    judge(*tensors(torch.float32, 130), q_hash=q_hash, k_hash=k_hash)


@pytest.mark.skipif(not interpreting(), reason="on a device the tiles are the autotuner's")
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16), (128, 128)])
def test_tiles_of_any_shape(monkeypatch, queries, keys):
    for name in INTERPRETED:
        monkeypatch.setitem(INTERPRETED, name, Tile(queries, keys, 4, 1))
    judge(*tensors(torch.float32, 70), q_keep=keep(0.8, 70), q_hash=buckets(4, 70), k_hash=buckets(4, 70))
    judge(*tensors(torch.float32, 70), q_keep=keep(0.5, 70), k_keep=keep(0.9, 70))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """(B, T, H, D) transposed, a slice of a wider tensor, an expanded batch, a transposed gradient."""
    wide = torch.randn(2, 65, 2, 3 * 32, device=DEVICE).to(dtype).transpose(1, 2)
    q, k = wide[..., :32], wide[..., 32:64]
    v = torch.randn(1, 2, 32, 65, device=DEVICE).to(dtype).mT.expand(2, 2, 65, 32)
    assert not any(x.is_contiguous() for x in (q, k, v))
    judge(q.detach(), k.detach(), v.detach(), q_keep=keep(0.7, 65, batch=2), k_keep=keep(0.7, 65, batch=2))


def test_gradient_of_any_strides():
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32, 40))
    weight = torch.randn(40, 2, 32, device=DEVICE)
    outs = [qk_sparse_attention(q, k, v, keep(1.1, 40), backend=name) for name in ("triton", "reference")]
    found, wanted = (torch.autograd.grad((out[0].transpose(0, 1) * weight).sum(), (q, k, v)) for out in outs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # the gradient of a sum is an expanded 1: strides of 0
    outs = [qk_sparse_attention(q, k, v, backend=name) for name in ("triton", "reference")]
    found, wanted = (torch.autograd.grad(out.sum(), (q, k, v)) for out in outs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hashed", [False, True])
def test_dropped_rows_may_hold_nan(hashed):
    q, k, v = tensors(torch.float32, 70)
    sparsity = {"q_keep": keep(0.6, 70), "k_keep": keep(0.6, 70)}
    call = qk_sparse_attention
    if hashed:
        sparsity |= {"q_hash": buckets(4, 70), "k_hash": buckets(4, 70)}
        call = hash_sparse_attention

    def run(value):
        leaves = [
            x.masked_fill(~sparsity[mask].unsqueeze(-1), value).requires_grad_()
            for x, mask in ((q, "q_keep"), (k, "k_keep"), (v, "k_keep"))
        ]
        out = call(*leaves, **sparsity, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.masked_fill(out == 0, value))]

    grad = torch.randn_like(v)
    for one, other in zip(run(torch.nan), run(0.0), strict=True):
        assert torch.equal(one, other)


def test_rows_that_see_nothing_stay_zero_beside_nan():
    q, k, v = tensors(torch.float32, 20)
    k[:, :, 3] = torch.nan
    sparsity = {"q_keep": keep(0.5, 20)}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = qk_sparse_attention(*leaves, **sparsity, backend="triton")
    blind = ~sparsity["q_keep"]
    assert out.isnan().any() and (out[blind] == 0).all()
    assert (torch.autograd.grad(out, q, torch.ones_like(out))[0][blind] == 0).all()


def test_large_scores_do_not_overflow():
    q, k, v = tensors(torch.float32, 65)
    judge(4 * q, 4 * k, v, q_keep=keep(0.7, 65))


def test_two_runs_give_the_same_bits():
    q, k, v = tensors(torch.bfloat16, 65)
    ids = buckets(3, 65)
    ranges = plan((1, 2, 65, 65), q_hash=ids, k_hash=ids, device=DEVICE)
    runs = []
    for _ in range(2):
        out, lse = triton_face.forward(q, k, v, ranges, SCALE)
        runs.append((out, lse, *triton_face.backward(out, q, k, v, out, lse, ranges, SCALE)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_registered_operator():
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32, 17, heads=2, k_heads=1, d_v=16))
    ranges = plan((1, 2, 17, 17), q_keep=keep(0.7, 17), device=DEVICE)
    torch.library.opcheck(torch.ops.sparse_flash_attention.forward.default, (q, k, v, *ranges, SCALE, "triton"))


def test_compiled_without_graph_breaks():
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32, 33))
    ids = buckets(3, 33)

    def call(q, k, v, ids):
        return 2 * hash_sparse_attention(q, k, v, ids, backend="triton")

    eager, traced = call(q, k, v, ids), torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, ids)
    assert torch.equal(eager, traced)
    assert torch.equal(*(torch.autograd.grad(x.sum(), q)[0] for x in (eager, traced)))
