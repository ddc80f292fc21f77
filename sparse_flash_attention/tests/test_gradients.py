"""Gradients of every face: derivatives in float64, what needs none, what must not leak, and what is not defined."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_flash_attention.tests.cases import FACES, FAST, Case, coins, ids, qkv, run

torch.set_num_threads(1)
faces = pytest.mark.parametrize("face", FACES)
fast = pytest.mark.parametrize("face", FAST)
EXACT = pytest.mark.parametrize("face", ["reference", "torch"])

PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "not causal": {"causal": False},
    "keep": {"q_keep": coins((1, 4, 7)), "k_keep": coins((1, 4, 7), seed=3)},
    "hash": {"q_hash": ids((1, 4, 7), 2), "k_hash": ids((1, 4, 7), 2, seed=4)},
    "shared hash without self": {"q_hash": ids((1, 4, 7), 2), "include_self": False},
    "both": {"q_hash": ids((1, 4, 7), 2), "q_keep": coins((7,), 0.8), "k_keep": coins((1, 2, 7)), "scale": 0.9},
}


def leaves(case: Case) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v))


@pytest.mark.parametrize("name", PATTERNS)
@EXACT
def test_gradients_are_the_derivatives(face: str, name: str) -> None:
    case = qkv(1, 4, 7, 3, kv_heads=2, v_dim=2).replace(**PATTERNS[name]).to(torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: case.attend(q, k, v, face), leaves(case))


@EXACT
def test_gradients_are_the_derivatives_for_other_lengths(face: str) -> None:
    for q_len, k_len in ((3, 6), (6, 3)):
        case = qkv(2, 2, q_len, 3, k_len=k_len).replace(q_keep=coins((q_len,), 0.7), k_keep=coins((2, 2, k_len), 0.7))
        assert torch.autograd.gradcheck(lambda q, k, v, c=case: c.attend(q, k, v, face), leaves(case.to(torch.float64)))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_reference_has_second_derivatives(name: str) -> None:
    case = qkv(1, 4, 7, 2, kv_heads=2).replace(**PATTERNS[name]).to(torch.float64)
    assert torch.autograd.gradgradcheck(lambda q, k, v: case.attend(q, k, v, "reference"), leaves(case))


@fast
def test_second_derivatives_of_the_operator_are_refused(face: str) -> None:
    case = qkv(1, 1, 8, 4)
    inputs = leaves(case)
    (dq,) = torch.autograd.grad(case.attend(*inputs, face).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_flash_attention.backward.default but no autograd formula"):
        dq.sum().backward()


@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=3) if any(w)], ids=str)
@faces
def test_gradients_of_some_inputs_are_those_of_all(face: str, wanted: tuple[bool, ...]) -> None:
    case = qkv(2, 2, 40, 16).replace(q_hash=ids((2, 2, 40)), k_keep=coins((40,)))
    inputs = [x.clone().requires_grad_(w) for x, w in zip((case.q, case.k, case.v), wanted, strict=True)]
    everything = leaves(case)
    case.attend(*inputs, face).square().sum().backward()
    case.attend(*everything, face).square().sum().backward()
    for x, y, w in zip(inputs, everything, wanted, strict=True):
        assert (x.grad is not None) is w
        if w:
            torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-6)


@faces
def test_no_gradient_is_recorded_where_none_is_wanted(face: str) -> None:
    case = qkv(1, 1, 8, 4)
    assert not case.attend(case.q, case.k, case.v, face).requires_grad
    with torch.no_grad():
        assert not case.attend(*leaves(case), face).requires_grad
    assert case.attend(*leaves(case), face).requires_grad


@fast
def test_one_tensor_as_query_key_and_value_gets_the_sum(face: str) -> None:
    x = torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    case = Case(x, x, x, k_keep=coins((40,)))
    (grad,) = torch.autograd.grad(case.attend(x, x, x, face).sin().sum(), x)
    apart = leaves(case)
    parts = torch.autograd.grad(case.attend(*apart, face).sin().sum(), apart)
    torch.testing.assert_close(grad, sum(parts), rtol=1e-5, atol=1e-6)


@fast
def test_an_upstream_gradient_of_one_number_expanded(face: str) -> None:
    """`out.sum().backward()` hands over a tensor with strides of 0."""
    case = qkv(2, 2, 40, 16).replace(q_keep=coins((2, 2, 40)))
    inputs = leaves(case)
    out = case.attend(*inputs, face)
    expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    full = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(expanded, full, strict=True))


@fast
def test_a_graph_may_be_walked_twice(face: str) -> None:
    case = qkv(2, 2, 40, 16)
    inputs = leaves(case)
    out = case.attend(*inputs, face)
    first, second = (torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("kind", ["keep", "both", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@faces
def test_what_dropped_rows_hold_never_leaks(face: str, kind: str, value: float, dtype: torch.dtype) -> None:
    q_keep, k_keep, hashes = coins((2, 4, 65)), coins((2, 4, 65), 0.4, seed=3), ids((2, 4, 65), 5)
    changes = {"keep": {}, "both": {"q_hash": hashes, "k_hash": ids((65,), 5)}, "shared": {"q_hash": hashes}}[kind]
    for kv_heads in (4, 2):
        case = qkv(2, 4, 65, 16, kv_heads=kv_heads).replace(q_keep=q_keep, k_keep=k_keep, **changes).to(dtype)
        q_out = ~q_keep.unsqueeze(-1)
        k_out = ~k_keep.unflatten(1, (kv_heads, -1)).any(2).unsqueeze(-1)  # by every query head of the group
        spoiled = case.replace(
            q=case.q.masked_fill(q_out, value), k=case.k.masked_fill(k_out, value), v=case.v.masked_fill(k_out, value)
        )
        for name, x, y in zip(("out", "dq", "dk", "dv"), run(case, face), run(spoiled, face), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("kind", ["hash", "both", "no self"])
@faces
def test_what_a_query_that_sees_nothing_holds_does_not_leak_either(face: str, kind: str, value: float) -> None:
    hashes = {"q_hash": ids((2, 4, 65), 9), "k_hash": ids((2, 4, 65), 9, seed=4)}
    strict = {"q_hash": ids((2, 4, 65), 9), "include_self": False}
    changes = {"hash": hashes, "both": hashes | {"k_keep": coins((2, 4, 65), 0.3)}, "no self": strict}[kind]
    case = qkv(2, 4, 65, 16).replace(**changes)
    blind = ~case.mask().any(-1, keepdim=True)
    assert blind.any()
    spoiled = case.replace(q=case.q.masked_fill(blind, value))
    for name, x, y in zip(("out", "dq", "dk", "dv"), run(case, face), run(spoiled, face), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan], ids=str)
@faces
def test_a_gradient_that_arrives_at_a_row_of_zeros_has_no_effect(face: str, value: float) -> None:
    case = qkv(1, 2, 65, 16).replace(q_keep=coins((1, 2, 65)), q_hash=ids((1, 2, 65), 9), k_hash=ids((65,), 9))
    sees = case.mask().any(-1, keepdim=True)
    assert (case.q_keep & ~sees.squeeze(-1)).any()  # kept, yet blind
    upstream = torch.randn(1, 2, 65, 16)
    inputs = leaves(case)
    out = case.attend(*inputs, face)
    wild = upstream.where(sees, value)
    clean = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(out, inputs, wild), clean, strict=True))


@faces
def test_a_visible_nan_shows_in_the_rows_that_see_it_and_never_in_dropped_ones(face: str) -> None:
    case = qkv(1, 1, 65, 16).replace(q_keep=coins((65,), 0.8))
    v = case.v.clone()
    v[0, 0, 3] = torch.nan
    out, dq, _, _ = run(case.replace(v=v), face)
    rows = case.q_keep & (torch.arange(65) >= 3)
    for x in (out[0, 0], dq[0, 0]):
        assert x[rows].isnan().all() and (x[~case.q_keep] == 0).all()
