"""Every face against float64, over sizes, types, head layouts and patterns of sparsity: output and three gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash_attention.tests.cases import FACES, FAST, HALF, LENGTHS, Case, check, coins, ids, qkv, run, upstream

torch.set_num_threads(1)
faces = pytest.mark.parametrize("face", FACES)
fast = pytest.mark.parametrize("face", FAST)


def sparse(case: Case, kind: str, keep: float = 0.6, buckets: int = 3) -> Case:
    """The case with one of the kinds of sparsity, drawn a head."""
    rows, columns = case.q.shape[:3], (*case.q.shape[:2], case.k.shape[2])
    keeps = {"q_keep": coins(rows, keep), "k_keep": coins(columns, keep, seed=3)}
    hashes = {"q_hash": ids(rows, buckets) - 1, "k_hash": ids(columns, buckets, seed=4) - 1}
    return case.replace(**{"dense": {}, "keep": keeps, "hash": hashes, "both": keeps | hashes}[kind])


KINDS = pytest.mark.parametrize("kind", ["dense", "keep", "hash", "both"])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("length", LENGTHS)
@KINDS
@faces
def test_lengths_around_the_sides_of_tiles(face: str, kind: str, length: int, causal: bool) -> None:
    check(sparse(qkv(1, 2, length, 32), kind).replace(causal=causal), face)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("kind", ["keep", "hash"])
@faces
def test_head_dims_and_types(face: str, kind: str, dim: int, dtype: torch.dtype) -> None:
    check(sparse(qkv(1, 2, 130, dim), kind), face, dtype)


@pytest.mark.parametrize("dims", [(1, 1), (3, 5), (16, 64), (64, 16), (80, 33), (7, 256)], ids=str)
@faces
def test_values_may_have_a_size_of_their_own(face: str, dims: tuple[int, int]) -> None:
    check(sparse(qkv(1, 2, 70, dims[0], v_dim=dims[1]), "both"), face)


@pytest.mark.parametrize("lengths", [(1, 200), (200, 1), (64, 129), (129, 64), (37, 300), (300, 37)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@KINDS
@faces
def test_lengths_of_queries_and_keys_may_differ(face: str, kind: str, lengths: tuple[int, int], causal: bool) -> None:
    case = qkv(1, 2, lengths[0], 16, k_len=lengths[1])
    check(sparse(case, kind).replace(causal=causal), face)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KINDS
@faces
def test_query_heads_may_share_keys(face: str, kind: str, dtype: torch.dtype, kv_heads: int) -> None:
    check(sparse(qkv(2, 6, 67, 16, kv_heads=kv_heads), kind), face, dtype)


@faces
def test_masks_and_hashes_of_key_heads_are_those_of_their_query_heads(face: str) -> None:
    case = qkv(2, 6, 67, 16, kv_heads=3)
    keep, hashes = coins((2, 3, 67)), ids((2, 3, 67), 2)
    wide = {"k_keep": keep.repeat_interleave(2, 1), "k_hash": hashes.repeat_interleave(2, 1)}
    for own in ({"k_keep": keep}, {"k_keep": keep[:1]}, {"k_keep": keep[1]}):
        check(case.replace(**own), face)
    hashed = case.replace(q_hash=ids((2, 6, 67), 2), k_hash=hashes, k_keep=keep)
    check(hashed, face)
    assert all(torch.equal(x, y) for x, y in zip(run(hashed, face), run(hashed.replace(**wide), face), strict=True))


@pytest.mark.parametrize("shape", [(40,), (1,), (1, 40), (3, 40), (2, 1, 40), (1, 3, 40), (2, 3, 40)], ids=str)
@faces
def test_masks_and_hashes_broadcast(face: str, shape: tuple[int, ...]) -> None:
    case = qkv(2, 3, 40 if shape[-1] == 40 else 1, 16)
    check(case.replace(q_keep=coins(shape), k_keep=coins(shape, seed=3)), face)
    check(case.replace(q_hash=ids(shape), k_hash=ids(shape, seed=3), causal=False), face)


@faces
def test_a_single_number_is_for_every_row(face: str) -> None:
    case = qkv(2, 2, 20, 16)
    check(case.replace(q_keep=torch.tensor(True), k_keep=torch.tensor(False)), face)
    check(case.replace(q_hash=torch.tensor(7), k_hash=torch.tensor(7)), face)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@faces
def test_empty_heads_stand_next_to_full_ones(face: str, dtype: torch.dtype) -> None:
    case = qkv(2, 4, 130, 16)
    q_keep, k_keep = coins((2, 4, 130)), coins((2, 4, 130), seed=3)
    q_keep[0, 0], k_keep[0, 1], q_keep[1, 2], k_keep[1, 2] = False, False, True, True
    q_keep[1, 3] = k_keep[1, 3] = False
    check(case.replace(q_keep=q_keep, k_keep=k_keep), face, dtype)
    check(
        case.replace(q_keep=q_keep, k_keep=k_keep, q_hash=ids((2, 4, 130)), k_hash=ids((2, 4, 130), seed=5)),
        face,
        dtype,
    )


@pytest.mark.parametrize("kept", [True, False], ids=["all kept", "all dropped"])
@faces
def test_all_or_nothing(face: str, kept: bool) -> None:
    case = qkv(2, 2, 65, 16)
    mask = torch.full((65,), kept)
    for name in ("q_keep", "k_keep"):
        given = case.replace(**{name: mask})
        check(given, face)
        if not kept:
            assert all((x == 0).all() for x in run(given, face))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@faces
def test_one_bucket_is_dense_causal_attention(face: str, dtype: torch.dtype) -> None:
    case = qkv(2, 2, 130, 32).to(dtype)
    check(case.replace(q_hash=torch.full((130,), -3)), face, dtype)
    bucket = case.replace(q_hash=torch.full((130,), -3)).attend(case.q, case.k, case.v, face)
    plain = F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True)
    eps = torch.finfo(dtype).eps
    # two roundings of one number
    torch.testing.assert_close(bucket, plain, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@faces
def test_rows_that_are_alone_give_their_own_value(face: str, dtype: torch.dtype) -> None:
    case = qkv(2, 2, 130, 32).to(dtype).replace(q_hash=torch.randperm(130, generator=torch.Generator().manual_seed(0)))
    check(case, face, dtype)
    assert torch.equal(case.attend(case.q, case.k, case.v, face), case.v)
    strict = case.replace(include_self=False)
    assert all((x == 0).all() for x in run(strict, face))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@faces
def test_one_giant_bucket_and_many_singletons(face: str, dtype: torch.dtype, include_self: bool) -> None:
    hashes = torch.where(coins((2, 2, 300), 0.8), 5, torch.arange(300) + 10)
    check(qkv(2, 2, 300, 16).replace(q_hash=hashes, include_self=include_self), face, dtype)
    other = torch.where(coins((2, 2, 300), 0.8, seed=8), 5, torch.arange(300) + 10)
    if include_self:
        check(qkv(2, 2, 300, 16).replace(q_hash=hashes, k_hash=other), face, dtype)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("length", [1, 2, 65, 300])
@faces
def test_without_self_the_first_row_of_every_bucket_is_zero(face: str, length: int, include_self: bool) -> None:
    case = qkv(1, 2, length, 16).replace(q_hash=ids((1, 2, length), 5), include_self=include_self)
    check(case, face)
    out = case.attend(case.q, case.k, case.v, face)
    for head in range(2):
        found = case.q_hash[0, head]
        first = [(found == b).nonzero()[0].item() for b in found.unique()]
        assert ((out[0, head, first] == 0).all()).item() is not include_self


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@faces
def test_a_tile_of_keys_may_span_buckets_whose_queries_are_late_then_early(face: str, tile: int) -> None:
    """One tile holds the keys of buckets 0, 1, 2, from the middle of the sequence. The queries of bucket 0 are all late
    and see its keys; those of bucket 2, behind them in sorted order, all precede the tile.

    A backward that starts a key tile behind the last query tile that precedes it (as the official one does, taking
    positions for ascending) skips all of bucket 0.
    """
    length = 4 * tile
    early, late = 3 * tile // 2, 5 * tile // 2
    q_hash, k_hash = torch.full((length,), 7), torch.full((length,), -1)
    q_hash[:early], q_hash[late:] = 2, 0
    k_hash[early:late] = torch.arange(tile) % 3
    case = qkv(1, 2, length, 32).replace(q_hash=q_hash, k_hash=k_hash)
    mask = case.mask()
    assert mask[0, 0, late:, early:late].sum() == (length - late) * -(-tile // 3) == mask[0, 0].sum()
    check(case, face)
    q_hash[late::2] = 1
    check(case, face)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@faces
def test_ids_may_be_any_integers(face: str, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    values = torch.tensor([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype=dtype)
    case = qkv(2, 2, 65, 16).replace(q_hash=values[ids((2, 2, 65), 6)], k_hash=values[ids((2, 2, 65), 6, seed=5)])
    check(case, face)
    check(case.replace(q_keep=coins((2, 2, 65)), k_keep=coins((2, 2, 65), seed=6)), face)
    check(case.replace(k_hash=None, q_keep=coins((2, 2, 65)), include_self=False), face)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
@faces
def test_wide_unsigned_ids_do_too(face: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, torch.iinfo(dtype).max], dtype=dtype)
    case = qkv(1, 2, 40, 16).replace(q_keep=coins((40,), 0.8), k_keep=coins((40,), 0.8, seed=3), k_hash=ids((40,), 2))
    wide, narrow = case.replace(q_hash=values[ids((40,), 3)]), case.replace(q_hash=ids((40,), 3))
    for x, y in ((wide, narrow), (wide.replace(k_hash=None), narrow.replace(k_hash=None))):
        outs = [one.attend(case.q, case.k, case.v, face) for one in (x, y)]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3, 1e-3])
@faces
def test_any_scale(face: str, scale: float) -> None:
    check(sparse(qkv(1, 2, 65, 16), "both").replace(scale=scale), face)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@faces
def test_large_scores(face: str, dtype: torch.dtype) -> None:
    """Scores of several hundred: exp overflows unless the largest is taken off first, tile by tile."""
    if face == "reference" and dtype in HALF:
        pytest.skip("it keeps its scores in half precision, where they are off by a whole")
    case = sparse(qkv(1, 2, 300, 32), "both", keep=0.9)
    ramp = torch.linspace(0.5, 20, 300)[:, None]  # the largest comes last, so every tile corrects those before it
    for k in (case.k * ramp, case.k * ramp.flip(0)):
        check(case.replace(q=4 * case.q, k=k), face, dtype)


@fast
def test_scores_far_below_zero_do_not_underflow_to_nothing(face: str) -> None:
    q, k = torch.full((1, 1, 40, 16), 30.0), torch.full((1, 1, 40, 16), -30.0)
    case = qkv(1, 1, 40, 16).replace(q=q, k=k, q_keep=coins((40,)))  # every score is -3600
    check(case, face)


def test_float64_runs_where_it_is_promised() -> None:
    for kind in ("dense", "keep", "hash", "both"):
        for face in ("torch", "reference"):
            check(sparse(qkv(1, 2, 130, 32), kind), face, torch.float64)


@fast
def test_layouts_in_memory_do_not_matter(face: str) -> None:
    case = sparse(qkv(2, 3, 65, 16), "both")
    wanted = run(case, face)

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def spaced(x: torch.Tensor) -> torch.Tensor:
        return torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2].copy_(x)

    def columns(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous().mT

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.full((x.numel() + 3,), torch.nan)[3:].view(x.shape).copy_(x)

    for change in (laid_out, spaced, columns, shifted):
        leaves = [change(x).requires_grad_() for x in (case.q, case.k, case.v)]
        assert all(torch.equal(x, y) for x, y in zip(leaves, (case.q, case.k, case.v), strict=True))
        out = case.attend(*leaves, face)
        grads = torch.autograd.grad(out, leaves, change(upstream(out.shape[:3], 16).float()))
        for mine, other in zip((out, *grads), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


@fast
def test_expanded_tensors_are_read_as_their_values(face: str) -> None:
    case = sparse(qkv(1, 1, 65, 16), "dense").replace(q_keep=coins((2, 3, 65)), k_keep=coins((1, 3, 65)))
    wide = [x.expand(2, 3, -1, -1) for x in (case.q, case.k, case.v)]
    wanted = case.replace(q=wide[0].clone(), k=wide[1].clone(), v=wide[2].clone())
    out = case.attend(*wide, face)
    torch.testing.assert_close(out, wanted.attend(wanted.q, wanted.k, wanted.v, face), rtol=0, atol=1e-6)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    grads = torch.autograd.grad(case.attend(*(x.expand(2, 3, -1, -1) for x in leaves), face).sum(), leaves)
    copies = [x.detach().clone().requires_grad_() for x in wide]
    for mine, other in zip(grads, torch.autograd.grad(case.attend(*copies, face).sum(), copies), strict=True):
        torch.testing.assert_close(mine, other.sum((0, 1), keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (2, 2, 0, 0)], ids=str)
@faces
def test_empty_inputs_give_empty_or_zero_outputs(face: str, shape: tuple[int, int, int, int]) -> None:
    batch, heads, q_len, k_len = shape
    case = qkv(batch, heads, q_len, 16, k_len=k_len, v_dim=8)
    keeps = {"q_keep": coins((batch, heads, q_len)), "k_keep": coins((heads, k_len))}
    hashes = {"q_hash": ids((batch, heads, q_len)), "k_hash": ids((batch, heads, k_len))}
    for changes in ({}, keeps, hashes, keeps | hashes | {"causal": False}):
        out, *grads = run(case.replace(**changes), face)
        assert out.shape == (batch, heads, q_len, 8) and (out == 0).all()
        for grad, x in zip(grads, (case.q, case.k, case.v), strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    lengths = st.one_of(st.integers(1, 40), st.sampled_from(LENGTHS[:-1]))
    q_len, heads = draw(lengths), draw(st.sampled_from([1, 2, 3, 4]))
    k_len = draw(st.one_of(st.just(q_len), lengths))
    causal = draw(st.booleans())
    return {
        "shape": (draw(st.integers(1, 2)), heads, q_len, draw(st.integers(1, 40))),
        "kv_heads": draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0])),
        "k_len": k_len,
        "v_dim": draw(st.integers(1, 40)),
        "kind": draw(st.sampled_from(["dense", "keep", "hash", "both"])),
        "keep": draw(st.sampled_from([0.05, 0.3, 0.5, 0.9])),
        "buckets": draw(st.integers(1, 40)),
        "causal": causal,
        "include_self": not causal or q_len != k_len or draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, *HALF])),
        "seed": draw(st.integers(0, 999)),
    }


@fast
@settings(max_examples=60, deadline=None)
@given(call=calls())
def test_any_call_is_within_the_tolerance(face: str, call: dict[str, Any]) -> None:
    case = qkv(*call["shape"], kv_heads=call["kv_heads"], k_len=call["k_len"], v_dim=call["v_dim"], seed=call["seed"])
    case = sparse(case, call["kind"], call["keep"], call["buckets"])
    strict = call["include_self"] or call["kind"] in ("dense", "keep")  # only hashes come with the choice
    # those of a score, its exponential, the sum of them, the quotient, the product with v and the sum of products
    check(case.replace(causal=call["causal"], include_self=strict), face, call["dtype"], roundings=6)
