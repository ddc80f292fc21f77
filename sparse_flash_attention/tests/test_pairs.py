"""Density and coverage: counts against brute force, Reformer's closed form, and the numbers that it implies."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash_attention.attention import hash_sparse_attention
from sparse_flash_attention.hashing import lsh_hash, random_buckets, random_keep
from sparse_flash_attention.pairs import (
    attention_density,
    coverage,
    reformer_chunk_mask,
    reformer_coverage,
    reformer_density,
)
from sparse_flash_attention.reference import visible
from sparse_flash_attention.reformer import reformer_attention
from sparse_flash_attention.segments import plan

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def attention_weights(attention, q, k):
    """Weights (B, H, Tq, Tk) that an attention really gives, read off its output for one-hot values."""
    return attention(q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1).to(k))


def causal_pairs(q_len, k_len):
    return torch.ones(q_len, k_len).tril().sum().item()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_density_is_the_visible_share(seed, q_len, k_len, hashed, dropped, causal, include_self):
    if not causal or q_len != k_len:
        include_self = True
    g = generator(seed)
    shape = (2, 3, q_len, k_len)
    sparsity = (
        random_keep((2, 3, q_len), 0.6, g) if dropped else None,
        random_keep((2, 3, k_len), 0.6, g) if dropped else None,
        random_buckets((2, 3, q_len), 3, g) if hashed else None,
        random_buckets((2, 3, k_len), 3, g) if hashed else None,
    )
    found = attention_density(plan(shape, *sparsity, causal=causal, include_self=include_self), causal=causal)
    mask = visible(shape, *sparsity, causal=causal, include_self=include_self)
    expected = mask.sum((-2, -1)).double() / (causal_pairs(q_len, k_len) if causal else q_len * k_len)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-12, atol=0)


def test_density_of_full_attention_is_one_and_of_nothing_zero():
    assert attention_density(plan((1, 2, 7, 7))).tolist() == [1, 1]
    assert attention_density(plan((1, 1, 0, 0))).tolist() == [0]
    # the counts pass 2^31
    assert attention_density(plan((1, 1, 70_000, 70_000))).item() == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 50), st.booleans(), st.booleans(), st.booleans())
def test_own_coverage_is_one_by_count(seed, length, shared, include_self, causal):
    include_self = include_self or not causal
    q_hash = random_buckets((2, 2, length), 4, generator(seed)) - 2
    k_hash = q_hash if shared else random_buckets((2, 2, length), 4, generator(seed + 1)) - 2
    ranges = plan((2, 2, length, length), None, None, q_hash, k_hash, causal=causal, include_self=include_self)
    found = coverage(ranges, q_hash, None if shared else k_hash, causal=causal, include_self=include_self)
    assert found.shape == (2, 2) and torch.equal(found, torch.ones(2, 2, dtype=torch.float64))


def test_own_coverage_is_one_in_the_weights_of_the_attention():
    q, k = (torch.randn(1, 2, 200, 16, generator=generator(i)) for i in range(2))
    q_hash = lsh_hash(q, 8, generator=generator())
    weights = attention_weights(lambda *x: hash_sparse_attention(*x, q_hash, backend="reference"), q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 200))
    assert torch.equal(coverage(weights, q_hash), torch.ones(1, 2, dtype=torch.float64))
    chunked = attention_weights(lambda *x: reformer_attention(*x, q_hash, chunk=8), q, k)
    assert torch.equal(coverage(chunked, q_hash), reformer_coverage(q_hash, 8))
    assert coverage(chunked, q_hash).max() < 0.9


def test_coverage_of_a_plan_counts_what_the_ranges_hold():
    """A plan that misses pairs, and one made for other hashes, must not pass as complete."""
    q_hash = random_buckets((1, 2, 60), 3, generator())
    other = random_buckets((1, 2, 60), 3, generator(1))
    shape = (1, 2, 60, 60)
    short = plan(shape, None, None, q_hash, q_hash)
    short = short._replace(k_end=torch.maximum(short.k_end - 2, short.k_begin))
    for ranges in (
        short,
        plan(shape, None, None, other, other),
        plan(shape, random_keep((1, 2, 60), 0.5, generator())),
    ):
        mask = torch.zeros(2, 60, 60, dtype=torch.bool)
        for n in range(2):
            for i in range(60):
                mask[n, ranges.q_order[n, i], ranges.k_order[n, ranges.k_begin[n, i] : ranges.k_end[n, i]].long()] = (
                    True
                )
        expected = coverage(mask.view(shape), q_hash)
        assert torch.equal(coverage(ranges, q_hash), expected) and expected.max() < 1


def brute_reformer(hashes, chunk, include_self=True):
    """The definition in plain Python: sort, cut, look back one chunk."""
    order = sorted(range(len(hashes)), key=lambda t: (hashes[t], t))
    place = {t: rank // chunk for rank, t in enumerate(order)}
    pairs = [(t, u) for t in range(len(hashes)) for u in range(t + include_self) if hashes[t] == hashes[u]]
    return {(t, u) for t, u in pairs if place[t] - place[u] in (0, 1)}, pairs


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-2, 3), min_size=1, max_size=40), st.integers(1, 12), st.booleans())
def test_reformer_mask_and_closed_form_are_the_definition(hashes, chunk, include_self):
    covered, pairs = brute_reformer(hashes, chunk, include_self)
    ids = torch.tensor(hashes).view(1, 1, -1)
    mask = reformer_chunk_mask(ids, chunk, include_self=include_self)[0, 0]
    assert {(t, u) for t, u in mask.nonzero().tolist()} == covered
    expected = len(covered) / len(pairs) if pairs else 1
    assert reformer_coverage(ids, chunk, include_self=include_self).item() == pytest.approx(expected, rel=1e-12)
    density = len(covered) / (len(hashes) * (len(hashes) + 1) / 2)
    assert reformer_density(ids, chunk, include_self=include_self).item() == pytest.approx(density, rel=1e-12)


def test_reformer_mask_without_order_and_of_several_rounds():
    ids = random_buckets((2, 1, 1, 30), 3, generator())
    free = reformer_chunk_mask(ids[0], 4, causal=False)[0, 0]
    assert torch.equal(free.tril(), reformer_chunk_mask(ids[0], 4)[0, 0]) and free.triu(1).any()
    both = reformer_chunk_mask(ids, 4)
    assert torch.equal(both, reformer_chunk_mask(ids[0], 4) | reformer_chunk_mask(ids[1], 4))


@pytest.mark.parametrize("chunk", [64, 128])
def test_closed_form_equals_brute_force_at_2048(chunk):
    ids = random_buckets((1, 2, 2048), 16, generator())
    mask = reformer_chunk_mask(ids, chunk)
    due = visible((1, 2, 2048, 2048), None, None, ids, ids)
    expected = mask.sum((-2, -1)).double() / due.sum((-2, -1))
    torch.testing.assert_close(reformer_coverage(ids, chunk), expected, rtol=1e-12, atol=0)


UNIFORM = {1024: 0.999, 2048: 0.922, 4096: 0.605, 8192: 0.339, 16384: 0.179, 32768: 0.092}


@pytest.mark.parametrize("length", UNIFORM)
def test_reformer_coverage_of_uniform_buckets_falls_as_expected(length):
    ids = random_buckets((1, 8, length), 16, generator())
    assert reformer_coverage(ids, 64).mean().item() == pytest.approx(UNIFORM[length], abs=0.003)
    # with as many buckets as chunks it does not fall
    fair = random_buckets((1, 8, length), length // 64, generator())
    assert reformer_coverage(fair, 64).mean().item() > 0.998


def test_closed_form_is_fast_at_full_length():
    ids = random_buckets((1, 8, 32768), 16, generator())
    start = time.perf_counter()
    reformer_coverage(ids, 64)
    assert time.perf_counter() - start < 8 * 1.0  # a second a head, on a busy machine
    own = coverage(plan((1, 8, 32768, 32768), None, None, ids, ids), ids)
    assert torch.equal(own, torch.ones(1, 8, dtype=torch.float64))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: reformer_coverage(torch.zeros(4, dtype=torch.int32), 0), "chunk=0: must be >= 1"),
    (lambda: reformer_chunk_mask(torch.zeros(1, 1, 4, dtype=torch.int32), -1), "chunk=-1: must be >= 1"),
    (lambda: coverage(torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 4, dtype=torch.int32)), r"must be \(1, 1, 4, 4\)"),
    (lambda: coverage(torch.ones(3, 3), torch.zeros(4, dtype=torch.int32)), "must be .batch, heads, length."),
    (lambda: coverage(plan((1, 1, 3, 3)), torch.zeros(1, 1, 4, dtype=torch.int32)), r"must be \(1, 4\)"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
