"""The reference is the definition: loops over rows in Python, one softmax at a time, say the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_flash_attention.reference import masked_attention, visible
from sparse_flash_attention.tests.cases import Case, coins, ids, qkv

PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "not causal": {"causal": False},
    "keep": {"q_keep": coins((2, 4, 6)), "k_keep": coins((2, 4, 7), seed=3)},
    "keep of key heads": {"k_keep": coins((2, 2, 7), seed=3), "causal": False},
    "shared by heads": {"q_keep": coins((6,)), "k_keep": coins((2, 1, 7))},
    "hash": {"q_hash": ids((2, 4, 6), 3), "k_hash": ids((2, 4, 7), 3, seed=5)},
    "all": {
        "q_keep": coins((2, 4, 6)), "k_keep": coins((4, 7)), "q_hash": ids((2, 1, 6), 2), "k_hash": ids((7,), 2),
        "causal": False, "scale": -0.7,
    },
}  # fmt: skip


def at(x: Tensor | None, b: int, h: int, t: int, heads: int) -> int:
    """Entry (b, h, t) of a mask or hash of up to three broadcast dimensions; masks of key heads by group."""
    if x is None:
        return 1
    x = x[(None,) * (3 - x.ndim)]
    b = b if x.shape[0] > 1 else 0
    h = h * x.shape[1] // heads
    return int(x[b, h, t])


def by_hand(case: Case) -> Tensor:
    """The definition of section 3, row by row."""
    q, k, v = (x.double().tolist() for x in (case.q, case.k, case.v))
    batch, heads, q_len, dim = case.q.shape
    kv_heads, k_len = case.k.shape[1:3]
    scale = 1 / math.sqrt(dim) if case.scale is None else case.scale
    k_hash = case.q_hash if case.k_hash is None else case.k_hash
    out = torch.zeros(batch, heads, q_len, case.v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * kv_heads // heads
            for t in range(q_len):
                keys = [
                    u
                    for u in range(k_len)
                    if at(case.q_keep, b, h, t, heads)
                    and at(case.k_keep, b, h, u, heads)
                    and at(case.q_hash, b, h, t, heads) == at(k_hash, b, h, u, heads)
                    and (not case.causal or u < t or (u == t and case.include_self))
                ]
                weights = [
                    math.exp(scale * sum(x * y for x, y in zip(q[b][h][t], k[b][g][u], strict=True))) for u in keys
                ]
                for weight, u in zip(weights, keys, strict=True):
                    out[b, h, t] += weight / sum(weights) * torch.tensor(v[b][g][u], dtype=torch.float64)
    return out


@pytest.mark.parametrize("name", PATTERNS)
def test_it_is_the_definition(name: str) -> None:
    case = qkv(2, 4, 6, 5, kv_heads=2, k_len=7, v_dim=3).replace(**PATTERNS[name]).to(torch.float64)
    out = case.attend(case.q, case.k, case.v, "reference")
    torch.testing.assert_close(out, by_hand(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("include_self", [True, False])
def test_self_is_seen_or_not(include_self: bool) -> None:
    case = qkv(1, 2, 6, 5).replace(q_hash=ids((1, 2, 6), 2), include_self=include_self).to(torch.float64)
    torch.testing.assert_close(case.attend(case.q, case.k, case.v, "reference"), by_hand(case), rtol=1e-12, atol=1e-12)
    first = visible((1, 1, 3, 3), include_self=include_self)[0, 0]
    assert first.diagonal().tolist() == [include_self] * 3 and not first.triu(1).any() and first[2, :2].all()


def test_the_truth_of_the_other_tests_is_the_definition() -> None:
    """`cases.Case.mask` is held to the loops too."""
    for pattern in PATTERNS.values():
        case = qkv(2, 4, 6, 5, kv_heads=2, k_len=7, v_dim=3).replace(**pattern).to(torch.float64)
        k, v = (x.repeat_interleave(2, 1) for x in (case.k, case.v))
        scores = (case.q @ k.mT) * (case.scale or 1 / math.sqrt(5))
        weights = scores.exp() * case.mask()
        out = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v
        torch.testing.assert_close(out, by_hand(case), rtol=1e-12, atol=1e-12)


def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    q, k, v = (torch.full((1, 1, 4, 2), x) for x in (200.0, 200.0, 1.0))
    k[0, 0, 1] = 300
    v[0, 0, 1] = 7
    out = masked_attention(q, k, v, visible((1, 1, 4, 4)), 1.0)
    assert out[0, 0].tolist() == [[1, 1], [7, 7], [7, 7], [7, 7]]


def test_a_mask_row_of_nothing_is_zero_without_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)[None, None]
    out = masked_attention(q, k, v, mask, 0.5)
    assert (out[0, 0, 1] == 0).all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert (dq[0, 0, 1] == 0).all() and (dk[0, 0, 1] == 0).all() and (dv[0, 0, 1] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
