"""What must not matter, does not: names of buckets, order of heads, the future, dropped keys, threads, repetition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_flash_attention.tests.cases import FACES, FAST, Case, coins, ids, qkv, run

torch.set_num_threads(1)
faces = pytest.mark.parametrize("face", FACES)
fast = pytest.mark.parametrize("face", FAST)
INT64 = torch.iinfo(torch.int64)


def both(batch: int = 2, heads: int = 2, length: int = 130, dim: int = 16) -> Case:
    """Hashes that differ between queries and keys, and keep masks on top."""
    rows = (batch, heads, length)
    return qkv(batch, heads, length, dim).replace(
        q_hash=ids(rows, 3), k_hash=ids(rows, 3, seed=4), q_keep=coins(rows, 0.7), k_keep=coins(rows, 0.7, seed=5)
    )


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], atol: float = 2e-6) -> None:
    """Within the rounding of sums in another order (unit-variance inputs)."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("names", [(10, 20, 30), (-5, 0, 5), (INT64.min, -1, INT64.max)], ids=str)
@faces
def test_buckets_renamed_in_order_are_the_same_bit_for_bit(face: str, names: tuple[int, ...]) -> None:
    case, table = both(), torch.tensor(names)
    equal(run(case.replace(q_hash=table[case.q_hash], k_hash=table[case.k_hash]), face), run(case, face))


@pytest.mark.parametrize("names", [(2, 1, 0), (7, -3, INT64.max), (INT64.max, INT64.min, 0)], ids=str)
@faces
def test_buckets_renamed_in_any_order_are_the_same(face: str, names: tuple[int, ...]) -> None:
    case, table = both(), torch.tensor(names)
    close(run(case.replace(q_hash=table[case.q_hash], k_hash=table[case.k_hash]), face), run(case, face))


@faces
def test_heads_and_samples_do_not_see_each_other(face: str) -> None:
    case = both(3, 4, 65)
    b, h = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    names = ("q", "k", "v", "q_hash", "k_hash", "q_keep", "k_keep")
    moved = case.replace(**{name: getattr(case, name)[b][:, h] for name in names})
    out = case.attend(case.q, case.k, case.v, face)
    assert torch.equal(moved.attend(moved.q, moved.k, moved.v, face), out[b][:, h])
    alone = case.replace(**{name: getattr(case, name)[1:2, 2:3] for name in names})
    torch.testing.assert_close(alone.attend(alone.q, alone.k, alone.v, face), out[1:2, 2:3], rtol=1e-5, atol=1e-6)


@faces
def test_a_vector_added_to_all_values_is_added_to_every_row_that_sees_something(face: str) -> None:
    case = both()
    shift = torch.randn(16, generator=torch.Generator().manual_seed(0))
    sees = case.mask().any(-1, keepdim=True)
    wanted = case.attend(case.q, case.k, case.v, face) + shift * sees
    torch.testing.assert_close(case.attend(case.q, case.k, case.v + shift, face), wanted, rtol=1e-5, atol=4e-6)


@faces
def test_one_number_added_to_all_scores_of_a_row_changes_nothing(face: str) -> None:
    case = both()
    extra = torch.ones(*case.k.shape[:3], 1)  # a channel in which all keys are 1 adds a number to each row's scores
    k = torch.cat([case.k, extra], -1)
    q = [torch.cat([case.q, c * torch.randn(*case.q.shape[:3], 1)], -1) for c in (0, 1)]
    outs = [case.replace(scale=0.25).attend(x, k, case.v, face) for x in q]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("t", [0, 1, 40, 64, 100, 128])
@faces
def test_the_future_does_not_reach_back(face: str, t: int) -> None:
    case = both()
    wanted = case.attend(case.q, case.k, case.v, face)
    later = torch.arange(130) > t
    noise = qkv(2, 2, 130, 16, seed=5)
    q, k, v = (
        torch.where(later[:, None], x, y)
        for x, y in zip((noise.q, noise.k, noise.v), (case.q, case.k, case.v), strict=True)
    )
    found = case.attend(q, k, v, face)
    assert torch.equal(found[:, :, : t + 1], wanted[:, :, : t + 1])
    assert not torch.equal(found[:, :, t + 1 :], wanted[:, :, t + 1 :])


@pytest.mark.parametrize("u", [0, 17, 64, 129])
@faces
def test_dropping_a_key_changes_only_rows_that_saw_it(face: str, u: int) -> None:
    case = both()
    k_keep = case.k_keep.clone()
    k_keep[0, 0, u] = True
    case = case.replace(k_keep=k_keep.clone())
    k_keep[0, 0, u] = False
    fewer = case.replace(k_keep=k_keep)
    saw = case.mask()[..., u] & torch.tensor([[True, False], [False, False]])[..., None]
    with_key, without = (x.attend(x.q, x.k, x.v, face) for x in (case, fewer))
    torch.testing.assert_close(with_key[~saw], without[~saw], rtol=1e-5, atol=1e-6)
    assert not saw.any() or (with_key[saw] != without[saw]).any(-1).all()
    assert torch.equal(with_key[1], without[1]) and torch.equal(with_key[0, 1], without[0, 1])


@faces
def test_dropping_is_a_score_of_minus_infinity(face: str) -> None:
    """A key that all queries find at a score of -1e4 weighs exactly 0 in float32, as if it were dropped."""
    case = both()
    far = torch.zeros(*case.k.shape[:3], 1).masked_fill(~case.k_keep.unsqueeze(-1), -1e4)
    q, k = torch.cat([case.q, torch.ones(*case.q.shape[:3], 1)], -1), torch.cat([case.k, far], -1)
    masked = case.replace(k_keep=None, scale=1.0).attend(q, k, case.v, face)
    dropped = case.replace(scale=1.0).attend(q, k, case.v, face)
    sees = case.mask().any(-1)  # where only far keys are left, far weighs 1
    torch.testing.assert_close(masked[sees], dropped[sees], rtol=1e-5, atol=2e-6)


@faces
def test_one_bucket_with_keep_masks_is_qk_sparse(face: str) -> None:
    case = both().replace(q_hash=None, k_hash=None)
    for name in (-1, 0, INT64.max):
        for causal in (True, False):
            qk = case.replace(causal=causal)
            close(run(qk.replace(q_hash=torch.tensor(name)), face), run(qk, face))


@faces
def test_dropped_rows_may_as_well_be_cut_out(face: str) -> None:
    case = qkv(1, 1, 130, 16).replace(q_keep=coins((130,)), k_keep=coins((130,)))
    kept = case.q_keep
    short = Case(case.q[:, :, kept], case.k[:, :, kept], case.v[:, :, kept])
    out = case.attend(case.q, case.k, case.v, face)
    torch.testing.assert_close(out[:, :, kept], short.attend(short.q, short.k, short.v, face), rtol=1e-5, atol=1e-6)


@faces
def test_all_kept_masks_and_no_masks_are_one(face: str) -> None:
    case, full = qkv(2, 2, 65, 16), torch.ones(2, 2, 65, dtype=torch.bool)
    close(run(case.replace(q_keep=full, k_keep=full), face), run(case, face))


@faces
def test_a_hash_given_once_or_twice_is_the_same(face: str) -> None:
    case = both()
    equal(run(case.replace(k_hash=None), face), run(case.replace(k_hash=case.q_hash.clone()), face))
    equal(run(case.replace(k_keep=case.q_keep), face), run(case.replace(k_keep=case.q_keep.clone()), face))


@faces
def test_runs_repeat_bit_for_bit(face: str) -> None:
    case = both()
    wanted = run(case, face)
    for _ in range(3):
        equal(run(case, face), wanted)


@fast
def test_threads_change_nothing_but_time(face: str) -> None:
    for case in (both(length=300), qkv(1, 1, 300, 16).replace(q_keep=coins((300,)), k_keep=coins((300,), seed=3))):
        one = run(case, face)
        try:
            torch.set_num_threads(2)
            two = run(case, face)
            equal(run(case, face), two)
        finally:
            torch.set_num_threads(1)
        close(two, one)


@faces
def test_inputs_are_left_alone(face: str) -> None:
    case = both()
    before = [x.clone() for x in (case.q, case.k, case.v, case.q_hash, case.k_hash, case.q_keep, case.k_keep)]
    run(case, face)
    after = (case.q, case.k, case.v, case.q_hash, case.k_hash, case.q_keep, case.k_keep)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@fast
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), length=st.integers(1, 90), buckets=st.integers(1, 20), keep=st.floats(0, 1))
def test_order_of_batches_and_heads_is_free(face: str, seed: int, length: int, buckets: int, keep: float) -> None:
    rows = (2, 2, length)
    case = qkv(*rows, 8, seed=seed).replace(
        q_hash=ids(rows, buckets, seed=seed), k_keep=coins(rows, keep, seed=seed + 1)
    )
    names = ("q", "k", "v", "q_hash", "k_keep")
    swapped = case.replace(**{name: getattr(case, name).transpose(0, 1) for name in names})
    found = swapped.attend(swapped.q, swapped.k, swapped.v, face).transpose(0, 1)
    torch.testing.assert_close(found, case.attend(case.q, case.k, case.v, face), rtol=1e-5, atol=1e-6)
