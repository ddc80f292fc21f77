"""Inputs that the tests share, the truth in float64, and the tolerance that a face is held to.

The truth never goes through the code under test: the mask is written out from the definition, and attention over it is
PyTorch's own `scaled_dot_product_attention` with an explicit mask (which gives 0 where a row sees nothing).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import native
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention

NEEDS_COMPILER = pytest.mark.skipif(native.compiler("c++") is None, reason="no C++ compiler")
FACES = ["reference", "torch", pytest.param("cpp", marks=NEEDS_COMPILER)]
"""Triton and flex have their own tests: one needs the interpreter or a GPU, the other torch.compile."""
FAST = FACES[1:]
HALF = (torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 300)
"""Around the sides of every tile."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call; with `q_hash` it is hash-sparse attention, without it QK-sparse."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_keep: Tensor | None = None
    k_keep: Tensor | None = None
    q_hash: Tensor | None = None
    k_hash: Tensor | None = None
    causal: bool = True
    include_self: bool = True
    scale: float | None = None

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def to(self, dtype: torch.dtype) -> Case:
        return self.replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        """The public function on these tensors, everything else as in the case."""
        shared: dict[str, Any] = {"scale": self.scale, "causal": self.causal, "backend": backend}
        if self.q_hash is None:
            return qk_sparse_attention(q, k, v, self.q_keep, self.k_keep, **shared)
        keeps = {"q_keep": self.q_keep, "k_keep": self.k_keep, "include_self": self.include_self}
        return hash_sparse_attention(q, k, v, self.q_hash, self.k_hash, **keeps, **shared)

    def mask(self) -> Tensor:
        """Who sees whom, (B, H, Tq, Tk), from the definition."""
        batch, heads, q_len = self.q.shape[:3]
        k_len = self.k.shape[2]

        def rows(x: Tensor | None, length: int) -> Tensor:
            if x is None:
                return torch.ones(batch, heads, length, dtype=torch.bool)
            if x.ndim > 1 and 1 < x.shape[-2] < heads:  # a mask of the key heads
                x = x.repeat_interleave(heads // x.shape[-2], -2)
            return x.expand(batch, heads, length)

        mask = rows(self.q_keep, q_len)[..., :, None] & rows(self.k_keep, k_len)[..., None, :]
        if self.q_hash is not None:
            k_hash = self.q_hash if self.k_hash is None else self.k_hash
            mask = mask & (rows(self.q_hash, q_len)[..., :, None] == rows(k_hash, k_len)[..., None, :])
        if self.causal:
            mask = mask & torch.ones(q_len, k_len, dtype=torch.bool).tril(0 if self.include_self else -1)
        return mask


def qkv(
    batch: int = 2, heads: int = 2, q_len: int = 33, dim: int = 16, *,
    kv_heads: int | None = None, k_len: int | None = None, v_dim: int | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """Standard normal q, k, v in float32; nothing dropped."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, k_len, v_dim = kv_heads or heads, q_len if k_len is None else k_len, v_dim or dim
    shapes = (batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, v_dim)
    return Case(*(torch.randn(shape, generator=generator) for shape in shapes))


def coins(shape: tuple[int, ...], p: float = 0.5, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def ids(shape: tuple[int, ...], n: int = 4, seed: int = 2, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) for one fixed random upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream(q.shape[:3], v.shape[3]).to(out.dtype)))


def upstream(rows: tuple[int, ...], width: int) -> Tensor:
    """A gradient of the output, rounded to bfloat16: every precision gets the same one."""
    return torch.randn(*rows, width, generator=torch.Generator().manual_seed(9)).bfloat16()


def dense(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of PyTorch's attention with an explicit mask."""
    mask = case.mask()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.scale, enable_gqa=True)

    return with_gradients(attend, *(x.to(dtype) for x in (case.q, case.k, case.v)))


def sizes(case: Case) -> tuple[float, ...]:
    """Largest sum of the absolute terms that (out, dq, dk, dv) are sums of; times eps, an error nobody can avoid.

    Where they cancel (one visible key: dq = 0) the result says nothing about the rounding, and plain PyTorch may be
    lucky.
    """
    mask, groups = case.mask(), case.q.shape[1] // case.k.shape[1]
    q, k, v = case.q.double(), *(x.double().repeat_interleave(groups, 1) for x in (case.k, case.v))
    scale = 1 / math.sqrt(q.shape[3]) if case.scale is None else case.scale
    scores = (scale * q @ k.mT).masked_fill(~mask, -torch.inf)
    p = (scores - scores.logsumexp(-1, keepdim=True)).exp().where(mask, 0)
    grad = upstream(case.q.shape[:3], case.v.shape[3]).double().abs()
    ds = abs(scale) * p * (grad @ v.mT.abs() + (grad * (p @ v).abs()).sum(-1, keepdim=True))
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (ds.mT @ q.abs(), p.mT @ grad))
    return tuple(x.amax().item() for x in (p @ v.abs(), ds @ k.abs(), dk, dv))


def run(case: Case, backend: str | None) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of the public function."""
    return with_gradients(lambda q, k, v: case.attend(q, k, v, backend), case.q, case.k, case.v)


def check(case: Case, backend: str, dtype: torch.dtype = torch.float32, roundings: int = 1) -> None:
    """The face's error against float64 is at most twice (gradients three times) that of plain PyTorch.

    So many `roundings` more are allowed: where few numbers are compared, plain PyTorch may be right by luck.
    Rows that see nothing, and keys that nobody sees, must come out as exact zeros.
    """
    case = case.to(dtype)
    mask = case.mask()
    exact, plain, ours = dense(case, torch.float64), dense(case, dtype), run(case, backend)
    # float64 is its own yardstick: nothing is more exact
    slack = torch.finfo(dtype).eps * (roundings if dtype is not torch.float64 else 10)
    rules = (("out", 2), ("dq", 3), ("dk", 3), ("dv", 3))
    for (name, factor), size, truth, other, mine in zip(rules, sizes(case), exact, plain, ours, strict=True):
        assert mine.dtype is dtype and mine.shape == truth.shape, name
        error, allowed = ((x.double() - truth).abs().max().item() for x in (mine, other))
        allowed = factor * allowed + slack * size
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    blind = ~mask.any(-1)
    assert (ours[0][blind] == 0).all() and (ours[1][blind] == 0).all()
    unseen = ~mask.any(-2).unflatten(1, (case.k.shape[1], -1)).any(2)  # by no query head of the group
    assert (ours[2][unseen] == 0).all() and (ours[3][unseen] == 0).all()
