"""The plan's ranges are the mask of the definition, for every mixture of masks, buckets, order and lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_flash_attention.segments import Plan, plan
from sparse_flash_attention.tests.cases import Case, coins, ids

INT64 = torch.iinfo(torch.int64)
SOME_IDS = {
    torch.int8: (-128, -1, 0, 5, 127),
    torch.uint8: (0, 1, 127, 128, 255),
    torch.int16: (-32768, 3, 32767),
    torch.int32: (-(2**31), -7, 2**31 - 1),
    torch.int64: (INT64.min, INT64.min + 1, -1, 0, INT64.max - 1, INT64.max),
}


def case(shape: tuple[int, int, int, int], **sparsity: Any) -> Case:
    batch, heads, q_len, k_len = shape
    return Case(
        torch.zeros(batch, heads, q_len, 1), torch.zeros(batch, heads, k_len, 1), torch.zeros(0), **sparsity
    )  # fmt: skip


def seen(ranges: Plan) -> Tensor:
    """The mask (N, Tq, Tk) that a plan stands for."""
    rows, q_len = ranges.q_order.shape
    k_len = ranges.k_order.shape[1]
    j = torch.arange(k_len)
    inside = (ranges.k_begin[:, :, None] <= j) & (j < ranges.k_end[:, :, None])
    columns = torch.zeros_like(inside).scatter_(2, ranges.k_order[:, None].expand(rows, q_len, k_len).long(), inside)
    return torch.zeros_like(columns).scatter_(1, ranges.q_order[:, :, None].expand_as(columns).long(), columns)


def check(shape: tuple[int, int, int, int], **sparsity: Any) -> Plan:
    """Everything that `Plan` promises."""
    batch, heads, q_len, k_len = shape
    wanted = case(shape, **sparsity).mask().flatten(0, 1)
    ranges = plan(shape, *(sparsity.pop(name, None) for name in ("q_keep", "k_keep", "q_hash", "k_hash")), **sparsity)
    for name, x in ranges._asdict().items():
        assert x.dtype is torch.int32 and x.is_contiguous(), name
        assert x.shape == (batch * heads, k_len if name == "k_order" else q_len), name
    assert torch.equal(ranges.q_order.sort(1).values, torch.arange(q_len).expand(batch * heads, q_len).int())
    assert torch.equal(ranges.k_order.sort(1).values, torch.arange(k_len).expand(batch * heads, k_len).int())
    assert torch.equal(seen(ranges), wanted)
    assert (ranges.k_begin >= 0).all() and (ranges.k_end <= k_len).all() and (ranges.k_begin <= ranges.k_end).all()
    assert (ranges.k_begin.diff(dim=1) >= 0).all() and (ranges.k_end.diff(dim=1) >= 0).all()
    return ranges


@st.composite
def patterns(draw: st.DrawFn) -> dict[str, Any]:
    """A shape and any sparsity on it; ids come from the ends of their type."""
    lengths = st.integers(1, 12)
    batch, heads, q_len = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(lengths)
    k_len = draw(st.one_of(st.just(q_len), lengths))
    causal = draw(st.booleans())
    found: dict[str, Any] = {"shape": (batch, heads, q_len, k_len), "causal": causal}
    found["include_self"] = not causal or draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def leading() -> tuple[int, int]:
        return draw(st.sampled_from([batch, 1])), draw(st.sampled_from([heads, 1]))

    for name, length in (("q_keep", q_len), ("k_keep", k_len)):
        if draw(st.booleans()):
            p = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
            found[name] = torch.rand(*leading(), length, generator=generator) < p
    if draw(st.booleans()):
        types = sorted(SOME_IDS, key=str)
        q_type = draw(st.sampled_from(types))
        for name, length, dtype in (("q_hash", q_len, q_type), ("k_hash", k_len, draw(st.sampled_from(types)))):
            values = torch.tensor(SOME_IDS[dtype][: draw(st.integers(1, 6))], dtype=dtype)
            found[name] = values[torch.randint(len(values), (*leading(), length), generator=generator)]
        if q_len == k_len and draw(st.booleans()):
            found["k_hash"] = found["q_hash"]
            if draw(st.booleans()) and "q_keep" in found:
                found["k_keep"] = found["q_keep"]
    return found


@settings(max_examples=400, deadline=None)
@given(pattern=patterns())
def test_ranges_are_the_mask_of_the_definition(pattern: dict[str, Any]) -> None:
    check(**pattern)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dtype", SOME_IDS, ids=str)
def test_a_bucket_with_the_largest_id_does_not_mix_with_dropped_rows(dtype: torch.dtype, include_self: bool) -> None:
    shape = (2, 3, 40, 40)
    hashes = torch.tensor(SOME_IDS[dtype], dtype=dtype)[ids((2, 3, 40), len(SOME_IDS[dtype]))]
    keeps = {"q_keep": coins((2, 3, 40), 0.6), "k_keep": coins((2, 3, 40), 0.5, seed=5)}
    check(shape, q_hash=hashes, k_hash=hashes, include_self=include_self, **keeps)
    check(shape, q_hash=hashes, k_hash=hashes.flip(2), include_self=include_self, **keeps)


@pytest.mark.parametrize("lengths", [(7, 20), (20, 7), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_may_differ(lengths: tuple[int, int], causal: bool) -> None:
    q_len, k_len = lengths
    shape = (2, 2, q_len, k_len)
    keeps = {"q_keep": coins((2, 2, q_len)), "k_keep": coins((2, 2, k_len), seed=3), "causal": causal}
    check(shape, **keeps)
    check(shape, q_hash=ids((2, 2, q_len)), k_hash=ids((2, 2, k_len), seed=7), **keeps)


@pytest.mark.parametrize("q_len", [1, 2, 3, 80])
def test_late_keys_lie_in_front_of_early_ones(q_len: int) -> None:
    """(bucket, position) as one number must not mix buckets, however many keys there are to a query."""
    for late in range(1, 20):
        k_hash = torch.full((1, 1, 40), 2)
        k_hash[..., -late:], k_hash[..., 0] = 0, 1
        ranges = check((1, 1, q_len, 40), q_hash=torch.ones(1, 1, q_len, dtype=torch.int64), k_hash=k_hash)
        assert ranges.k_begin[0].tolist() == [late] * q_len and ranges.k_end[0].tolist() == [late + 1] * q_len


def test_rows_lie_in_order_of_bucket_and_position_with_the_dropped_last() -> None:
    hashes, keep = ids((1, 1, 50), 5) - 2, coins((1, 1, 50), 0.7)
    ranges = check((1, 1, 50, 50), q_keep=keep, k_keep=keep, q_hash=hashes, k_hash=hashes)
    kept = [(hashes[0, 0, t].item(), t) for t in range(50) if keep[0, 0, t]]
    n = len(kept)
    for order in (ranges.q_order[0].tolist(), ranges.k_order[0].tolist()):
        assert order[:n] == [t for _, t in sorted(kept)]
        assert sorted(order[n:]) == [t for t in range(50) if not keep[0, 0, t]]
    alone = check((1, 1, 50, 50), q_keep=keep)
    assert alone.q_order[0, :n].tolist() == sorted(t for _, t in kept)


def test_ids_of_different_types_are_compared_as_numbers() -> None:
    unsigned = torch.tensor([[[200, 56, 255]]], dtype=torch.uint8)
    signed = torch.tensor([[[-56, 56, -1]]], dtype=torch.int8)  # the same bits
    ranges = check((1, 1, 3, 3), q_hash=unsigned, k_hash=signed, causal=False)
    assert seen(ranges).nonzero().tolist() == [[0, 1, 1]]


def test_a_shared_hash_with_unshared_masks_is_not_taken_for_shared() -> None:
    hashes = ids((2, 2, 30))
    check((2, 2, 30, 30), q_hash=hashes, k_hash=hashes, q_keep=coins((2, 2, 30)))
    check((2, 2, 30, 30), q_hash=hashes, k_hash=hashes, k_keep=coins((2, 2, 30)))


def test_masks_that_all_heads_share_give_every_head_the_same_plan() -> None:
    one = check((3, 4, 20, 20), q_keep=coins((1, 1, 20)), q_hash=ids((1, 1, 20)), k_hash=ids((1, 1, 20), seed=8))
    assert all((x == x[:1]).all() for x in one)
    check((3, 4, 20, 20), q_keep=coins((3, 1, 20)), k_keep=coins((1, 4, 20)))
    check((3, 4, 20, 20), q_keep=coins((20,)), k_keep=coins((4, 20)))


@pytest.mark.parametrize("shape", [(1, 1, 0, 3), (1, 1, 3, 0), (2, 2, 0, 0), (0, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_empty_sides(shape: tuple[int, int, int, int], causal: bool) -> None:
    batch, heads, q_len, k_len = shape
    check(shape, causal=causal)
    check(shape, causal=causal, q_keep=coins((batch, heads, q_len)), k_keep=coins((batch, heads, k_len)))
    check(shape, causal=causal, q_hash=ids((batch, heads, q_len)), k_hash=ids((batch, heads, k_len)))


def test_rows_that_are_not_contiguous_are_read_where_they_are(recwarn: pytest.WarningsRecorder) -> None:
    hashes, keep = ids((2, 30, 3)).transpose(1, 2), coins((2, 30, 3)).transpose(1, 2)
    check((2, 3, 30, 30), q_hash=hashes, k_hash=hashes, q_keep=keep)
    check((2, 3, 30, 30), q_hash=hashes, k_hash=hashes.flip(2), k_keep=keep)
    check((2, 3, 15, 15), q_hash=ids((2, 3, 30))[..., ::2], k_hash=ids((1,)).expand(2, 3, 15))
    assert not recwarn.list


def test_shapes_do_not_depend_on_values() -> None:
    """Nothing is read back, so nothing waits for a GPU and torch.compile can trace it."""
    with FakeTensorMode():
        keep, hashes = torch.ones(2, 3, 20, dtype=torch.bool), torch.ones(2, 3, 20, dtype=torch.int32)
        for sparsity in ((keep, keep, None, None), (None, keep, hashes, hashes), (keep, None, hashes, hashes + 1)):
            assert [tuple(x.shape) for x in plan((2, 3, 20, 20), *sparsity)] == [(6, 20)] * 4
