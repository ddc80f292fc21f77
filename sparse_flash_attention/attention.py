"""The two attentions of the paper as functions in the argument order of `scaled_dot_product_attention`."""

from __future__ import annotations

import contextlib
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import dispatch
from sparse_flash_attention import arguments, operator
from sparse_flash_attention.reference import masked_attention, visible
from sparse_flash_attention.segments import plan


def _refusal(face: str) -> dispatch.Refusal:
    return lambda q, v: operator.face(face).refuses(q, v)


REFUSALS: dict[str, dispatch.Refusal] = {face: _refusal(face) for face in operator.FACES}
REFUSALS["reference"] = lambda q, v: None
"""Face -> why it cannot serve (q, v); the preferred first. A CPU gets Triton's interpreter only if asked for it."""


def qk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Exact attention among kept queries and kept keys; its cost falls with the square of the kept share (section 3.1).

    Args:
        q: queries (B, H, Tq, D), float32, bfloat16, float16 or float64, any strides.
        k: keys (B, Hk, Tk, D), Hk a divisor of H (grouped-query attention).
        v: values (B, Hk, Tk, Dv).
        q_keep: bool, broadcastable to (B, H, Tq); False drops the query. None keeps all.
        k_keep: bool, broadcastable to (B, H, Tk); with Hk < H also (B, Hk, Tk). None keeps all.
        scale: factor on the scores; None is 1 / sqrt(D).
        causal: the query at t sees keys at u <= t (both count from 0, also where Tq differs from Tk).
        backend: None picks by device; "cpp", "triton", "torch", "flex" or "reference" forces one.

    Returns:
        (B, H, Tq, Dv) in the dtype of q. Dropped queries and queries that see no key give 0 and pass no gradient;
        dropped keys get none. What a dropped row holds, NaN included, has no effect. Under `torch.autocast` q, k and v
        are cast to its dtype first, as `scaled_dot_product_attention` does.

    Raises:
        TypeError: dtypes that differ or are not supported; a keep mask that is not bool.
        ValueError: shapes or devices that do not fit, or a backend that cannot serve the call.
    """
    return _attention(q, k, v, q_keep, k_keep, None, None, True, scale, causal, backend)


def hash_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_hash: Tensor,
    k_hash: Tensor | None = None,
    *,
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    include_self: bool = True,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Exact attention inside buckets: a query sees the keys with its own bucket id (section 3.2).

    Args:
        q: queries (B, H, Tq, D), float32, bfloat16, float16 or float64, any strides.
        k: keys (B, Hk, Tk, D), Hk a divisor of H (grouped-query attention).
        v: values (B, Hk, Tk, Dv).
        q_hash: integers of any value, broadcastable to (B, H, Tq).
        k_hash: integers, broadcastable to (B, H, Tk); None shares q_hash (Tq = Tk) and saves a sort.
        q_keep: bool, broadcastable to (B, H, Tq); on top of the hashes, as in `qk_sparse_attention`.
        k_keep: bool, broadcastable to (B, H, Tk).
        include_self: False hides a row from itself (u < t), as the paper's language model does.
        scale: factor on the scores; None is 1 / sqrt(D).
        causal: the query at t sees keys at u <= t.
        backend: None picks by device; "cpp", "triton", "torch", "flex" or "reference" forces one.

    Returns:
        (B, H, Tq, Dv) in the dtype of q (of autocast, where that is on); 0 without gradient where a query sees nothing.

    Raises:
        TypeError: dtypes that differ or are not supported; hashes that are not integers; masks that are not bool.
        ValueError: shapes or devices that do not fit; include_self=False without causal or with Tq != Tk; a backend
            that cannot serve the call.
    """
    arguments.integers("q_hash", q_hash)  # None would be attention without buckets
    return _attention(
        q, k, v, q_keep, k_keep, q_hash, q_hash if k_hash is None else k_hash, include_self, scale, causal, backend
    )


def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_keep: Tensor | None, k_keep: Tensor | None,
    q_hash: Tensor | None, k_hash: Tensor | None, include_self: bool,
    scale: float | None, causal: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    q, k, v = (arguments.autocast(x) for x in (q, k, v))
    shape = batch, heads, q_len, k_len = arguments.shapes(q, k, v)
    one = q_keep is k_keep and q_len == k_len  # then they are sorted once
    q_keep = arguments.keep("q_keep", q_keep, (batch, heads, q_len), q.device)
    kept = _per_query_head(k_keep, k, heads)
    k_keep = q_keep if one else arguments.keep("k_keep", kept, (batch, heads, k_len), q.device)
    if q_hash is not None and k_hash is not None:
        one = k_hash is q_hash and q_len == k_len
        q_hash = arguments.ids("q_hash", q_hash, (batch, heads, q_len), q.device)
        own = _per_query_head(k_hash, k, heads)
        k_hash = q_hash if one else arguments.ids("k_hash", own, (batch, heads, k_len), q.device)
    if not include_self and (not causal or q_len != k_len):
        raise ValueError(
            f"include_self=False with causal={causal}, Tq={q_len}, Tk={k_len}: needs causal=True and Tq = Tk"
        )
    scale = arguments.scaling(scale, q.shape[3])
    sparsity = (q_keep, k_keep, q_hash, k_hash)
    if q.is_cuda and dispatch.wish(backend) is None and all(x is None for x in sparsity):
        # nothing to skip: the vendor's dense kernel
        grouped = k.shape[1] < heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    backend = _choose(q, v, backend)
    with _without_autocast(q.device.type):
        if backend == "reference" or 0 in (batch, heads, q_len, k_len):
            mask = visible(shape, *sparsity, causal=causal, include_self=include_self, device=q.device)
            return masked_attention(q, k, v, mask, scale)
        ranges = plan(shape, *sparsity, causal=causal, include_self=include_self, device=q.device)
        return operator.planned_attention(q, k, v, ranges, scale, backend)[0]


def _choose(q: Tensor, v: Tensor, backend: str | None) -> str:
    if torch.compiler.is_compiling():
        return _choose_for(q.device, q.dtype, index(q.shape[3]), index(v.shape[3]), dispatch.wish(backend))
    return dispatch.choose(REFUSALS, q, v, backend=backend)


@torch.compiler.assume_constant_result
def _choose_for(device: torch.device, dtype: torch.dtype, dim: int, v_dim: int, wish: str | None) -> str:
    """Called while a graph is traced: refusals look at files, packages and compilers, which no graph can hold."""
    q, v = (torch.empty(0, 1, 1, width, dtype=dtype, device=device) for width in (dim, v_dim))
    return dispatch.choose(REFUSALS, q, v, backend=wish)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Inside, a face's own products are not cast once more."""
    return torch.autocast(device, enabled=False) if arguments.autocasting(device) else contextlib.nullcontext()


def _per_query_head(x: Any, k: Tensor, heads: int) -> Any:
    """Grouped queries: what is given a key head is meant for all query heads that read it."""
    if isinstance(x, Tensor) and x.ndim >= 2 and 1 < x.shape[-2] == k.shape[1] < heads:
        return x.repeat_interleave(heads // k.shape[1], dim=-2)
    return x
