"""Chunked and windowed attention against masked dense attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash_attention.hashing import lsh_hash, random_buckets
from sparse_flash_attention.pairs import reformer_chunk_mask
from sparse_flash_attention.reference import masked_attention
from sparse_flash_attention.reformer import reformer_attention, window_attention

torch.set_num_threads(1)
F64 = torch.float64
ROUNDING = 1e-12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(length, dim=5, v_dim=4, dtype=F64, seed=0):
    g = generator(seed)
    shapes = [(2, 3, length, dim), (2, 3, length, dim), (2, 3, length, v_dim)]
    return [torch.randn(s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in shapes]


def assert_same(function, reference, tensors, tolerance=ROUNDING):
    """Outputs and all gradients."""
    out, expected = function(*tensors), reference(*tensors)
    weight = torch.randn(out.shape, generator=generator(9), dtype=F64).to(out.dtype)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    if out.numel() == 0:
        return
    grads = torch.autograd.grad((out * weight).sum(), tensors)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=10 * tolerance)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
def test_chunked_attention_is_masked_attention(seed, length, chunk, n_buckets, include_self, causal, rounds):
    hashes = random_buckets((rounds, 2, 3, length), n_buckets, generator(seed)) - 1
    hashes = hashes if rounds > 1 else hashes[0]
    include_self = include_self or not causal
    mask = reformer_chunk_mask(hashes, chunk, causal=causal, include_self=include_self)
    assert_same(
        lambda q, k, v: reformer_attention(
            q, k, v, hashes, chunk=chunk, include_self=include_self, causal=causal, scale=0.7
        ),
        lambda q, k, v: masked_attention(q, k, v, mask, 0.7),
        inputs(length, seed=seed),
    )


def test_default_scale_and_one_chunk_is_exact_attention():
    tensors = inputs(20)
    hashes = torch.zeros(2, 3, 20, dtype=torch.int16)
    expected = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    assert_same(lambda *x: reformer_attention(*x, hashes, chunk=20), expected, tensors)
    assert_same(lambda *x: reformer_attention(*x, hashes[0, 0], chunk=50), expected, tensors)  # broadcast
    assert not torch.allclose(reformer_attention(*tensors, hashes, chunk=4), expected(*tensors))


def test_rows_that_see_nothing_are_zero_without_gradient():
    q, k, v = inputs(12)
    hashes = torch.arange(12).expand(2, 3, -1)
    torch.testing.assert_close(reformer_attention(q, k, v, hashes, chunk=4), v)
    for ids in (hashes, torch.stack([hashes, hashes + 5])):
        out = reformer_attention(q, k, v, ids, chunk=4, include_self=False)
        assert torch.equal(out, torch.zeros_like(v))
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_rounds_add_pairs_and_equal_rounds_add_nothing():
    tensors = inputs(60)
    hashes = lsh_hash(tensors[0], 4, rounds=2, generator=generator())
    one = reformer_attention(*tensors, hashes[0], chunk=8)
    torch.testing.assert_close(reformer_attention(*tensors, hashes[:1].expand(3, -1, -1, -1), chunk=8), one)
    assert not torch.allclose(reformer_attention(*tensors, hashes, chunk=8), one)


def test_gradcheck():
    hashes = random_buckets((2, 2, 3, 7), 2, generator())
    tensors = inputs(7, dim=2, v_dim=2)
    assert torch.autograd.gradcheck(lambda *x: reformer_attention(*x, hashes, chunk=2, include_self=False), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_follows_the_dtype(dtype):
    tensors = inputs(100, dtype=dtype)
    exact = [x.detach().double() for x in tensors]
    hashes = random_buckets((2, 2, 3, 100), 4, generator())
    eps = torch.finfo(dtype).eps
    for ids in (hashes, hashes[0]):
        out = reformer_attention(*tensors, ids, chunk=16)
        assert out.dtype == dtype
        # scores, weights and sums are each rounded, on values of order one
        assert (out.double() - reformer_attention(*exact, ids, chunk=16)).abs().max() < 16 * eps
    assert (window_attention(*tensors, 9).double() - window_attention(*exact, 9)).abs().max() < 16 * eps


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("window", [1, 2, 5, 64, 100, 200])
def test_window_attention_is_masked_attention(length, window):
    t = torch.arange(length)
    apart = t[:, None] - t
    mask = ((apart >= 0) & (apart < window)).expand(2, 3, -1, -1)
    assert_same(
        lambda q, k, v: window_attention(q, k, v, window, scale=0.7),
        lambda q, k, v: masked_attention(q, k, v, mask, 0.7),
        inputs(length),
    )


def test_window_of_one_returns_the_values():
    q, k, v = inputs(70)
    torch.testing.assert_close(window_attention(q, k, v, 1), v, rtol=ROUNDING, atol=ROUNDING)


def test_empty_length():
    q, k, v = inputs(0)
    assert reformer_attention(q, k, v, torch.zeros(2, 3, 0, dtype=torch.int32), chunk=4).shape == v.shape


def test_later_rows_change_nothing():
    tensors = inputs(50)
    hashes = lsh_hash(tensors[0], 4, generator=generator())
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[:, :, 30:] += 1
    # the chunks of a bucketed sort do depend on later rows, through the ranks; with one bucket they cannot
    ids = torch.zeros_like(hashes)
    a, b = (reformer_attention(*x, ids, chunk=8)[:, :, :30] for x in (tensors, changed))
    assert torch.equal(a, b)
    a, b = (window_attention(*x, 8)[:, :, :30] for x in (tensors, changed))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda q, k, v, h: reformer_attention(q, k, v, h, chunk=0), ValueError, "chunk=0: must be >= 1"),
    (lambda q, k, v, h: reformer_attention(q, k[:, :, :3], v[:, :, :3], h, chunk=2), ValueError, "heads and length"),
    (lambda q, k, v, h: reformer_attention(q, k[:, :1], v[:, :1], h, chunk=2), ValueError, "heads and length"),
    (lambda q, k, v, h: reformer_attention(q, k, v, h.float(), chunk=2), TypeError, "q_hash of type torch.float32"),
    (lambda q, k, v, h: reformer_attention(q, k, v, h[..., :3], chunk=2), ValueError, "q_hash of shape"),
    (lambda q, k, v, h: reformer_attention(q, k, v, h, chunk=2, scale=float("nan")), ValueError, "scale=nan"),
    (
        lambda q, k, v, h: reformer_attention(q, k, v, h, chunk=2, include_self=False, causal=False),
        ValueError, "include_self=False with causal=False: needs causal=True",
    ),
    (lambda q, k, v, h: window_attention(q, k, v, 0), ValueError, "window=0: must be >= 1"),
    (lambda q, k, v, h: window_attention(q, k[:, :1], v[:, :1], 2), ValueError, "heads and length"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(*inputs(6), random_buckets((2, 3, 6), 2))
