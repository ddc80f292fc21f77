"""The attention in plain PyTorch, where there is no compiler: rows are gathered, and the CPU's flash attention does the
arithmetic on what is left.

Buckets of like length travel as one padded batch; a bucket of many rows goes alone, in tiles of queries that meet only
the keys up to their last row. Where a bucket is a plain triangle, no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_flash_attention.segments import Plan

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

TILE = 128  # queries of a long bucket that are handled at a time
LONG = 512  # rows from which a bucket is not padded into a batch


class Job(NamedTuple):
    """One call of the dense attention on S buckets of at most L queries and M keys."""

    queries: Tensor
    """(S, L) int64: rows of the flattened (B * H * Tq, D); what pads is B * H * Tq."""
    keys: Tensor
    """(S, M) int64: rows of the flattened (B * Hk * Tk, D); what pads repeats the bucket's first key."""
    mask: Tensor | None
    """(S, 1, L, M), 0 or -inf, or None for the lower triangle."""


def refuses(q: Tensor, v: Tensor) -> str | None:
    """Why this face cannot serve queries and values like these, or None."""
    return None if q.is_cpu else f"needs tensors on the CPU, got {q.device}"


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """See `operator.planned_attention`."""
    width, q_rows, k_rows, v_rows = _flatten(q, k, v)
    # one row more than there are: what pads is written there
    out = q_rows.new_zeros(len(q_rows), width)
    lse = torch.full((len(q_rows),), torch.inf, dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)
    for job in _jobs(plan, q, k):
        q_part, k_part, v_part = q_rows[job.queries], k_rows[job.keys], v_rows[job.keys]
        made, level = flash(
            q_part[:, None], k_part[:, None], v_part[:, None], 0.0, job.mask is None, attn_mask=job.mask, scale=scale
        )
        out[job.queries] = made[:, 0]
        lse[job.queries] = level[:, 0].to(lse.dtype)
    lse = lse[:-1].view(q.shape[:3])
    return out[:-1, : v.shape[3]].view(*q.shape[:3], -1).contiguous(), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operator.planned_attention`."""
    width, q_rows, k_rows, v_rows = _flatten(q, k, v)
    g_rows, o_rows = _padded(grad, width, 1), _padded(out, width, 1)
    levels = F.pad(lse.reshape(-1), (0, 1))
    # keys that several jobs meet are summed in float
    precise = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q_rows)
    dk, dv = torch.zeros_like(k_rows, dtype=precise), torch.zeros_like(v_rows, dtype=precise)
    for job in _jobs(plan, q, k):
        parts = [x[job.queries][:, None] for x in (g_rows, q_rows, o_rows)]
        g_part, q_part, o_part = parts
        k_part, v_part = k_rows[job.keys][:, None], v_rows[job.keys][:, None]
        q_grad, k_grad, v_grad = flash_backward(
            g_part, q_part, k_part, v_part, o_part, levels[job.queries][:, None], 0.0, job.mask is None,
            attn_mask=job.mask, scale=scale,
        )  # fmt: skip
        dq[job.queries] = q_grad[:, 0]
        dk.index_add_(0, job.keys.view(-1), k_grad.to(precise).reshape(-1, width))
        dv.index_add_(0, job.keys.view(-1), v_grad.to(precise).reshape(-1, width))
    return (
        dq[:-1, : q.shape[3]].view(q.shape),
        dk[:, : k.shape[3]].to(k.dtype).view(k.shape),
        dv[:, : v.shape[3]].to(v.dtype).view(v.shape),
    )


def _flatten(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Common width of all rows, and q (with one row of zeros for what pads), k and v as matrices of rows."""
    width = max(q.shape[3], v.shape[3])
    return width, _padded(q, width, 1), _padded(k, width), _padded(v, width)


def _padded(x: Tensor, width: int, rows: int = 0) -> Tensor:
    flat = x.reshape(-1, x.shape[3])
    more = width - x.shape[3]
    return F.pad(flat, (0, more, 0, rows)) if more or rows else flat


def _jobs(plan: Plan, q: Tensor, k: Tensor) -> Iterator[Job]:
    """The dense calls that cover all that is visible."""
    heads, kv_heads, q_len, k_len = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    n = torch.arange(len(plan.q_order))
    q_rows = (plan.q_order + n[:, None] * q_len).view(-1)
    k_rows = (plan.k_order + (n // heads * kv_heads + n % heads // (heads // kv_heads))[:, None] * k_len).view(-1)
    begin, end = plan.k_begin.view(-1).long(), plan.k_end.view(-1).long()
    q_rows = q_rows.where(begin < end, len(begin))  # what sees nothing stays out, whatever it holds

    # a bucket: neighbours that start with the same key; what sees nothing at the end of a head starts behind all keys
    place = torch.arange(len(begin))
    fresh = (begin != begin.roll(1)) | (place % q_len == 0)
    first = torch.nonzero(fresh).view(-1)
    n_queries = torch.diff(first, append=first.new_tensor([len(begin)]))
    k_first = begin[first]
    n_keys = end[first + n_queries - 1] - k_first
    first_key = first // q_len * k_len + k_first
    live = torch.nonzero(n_keys > 0).view(-1)
    # a triangle: each row sees one key more than the row before it
    bucket = fresh.cumsum(0) - 1
    uneven = end - k_first[bucket] != place - first[bucket] + 1
    is_triangle = torch.zeros_like(first).index_add_(0, bucket, uneven.long()) == 0

    long = live[torch.maximum(n_queries, n_keys)[live] >= LONG]
    for i in long.tolist():
        start, rows, key, count = (int(x[i]) for x in (first, n_queries, first_key, n_keys))
        if is_triangle[i]:
            yield Job(q_rows[None, start : start + rows], k_rows[None, key : key + count], None)
            continue
        for tile in range(start, start + rows, TILE):
            until = min(tile + TILE, start + rows)
            seen = end[tile:until] - k_first[i]  # (L,)
            if seen[-1] > 0:
                part = k_rows[key : key + int(seen[-1])]
                yield Job(q_rows[None, tile:until], part[None], _staircase(seen[None], len(part), q.dtype))
    short = live[torch.maximum(n_queries, n_keys)[live] < LONG]
    size = torch.maximum(n_queries, n_keys)[short]
    # padding of at most a quarter: lengths rounded up to a multiple of an eighth of their power of two
    grain = torch.exp2(torch.floor(torch.log2(size.double())) - 2).clamp(min=1)
    rounded = (torch.ceil(size / grain) * grain).long() * 2 + is_triangle[short]
    for kind in rounded.unique().tolist():
        of_kind = short[rounded == kind]
        length, triangle = int(kind) // 2, int(kind) % 2
        steps = torch.arange(length)
        valid_q, valid_k = steps < n_queries[of_kind, None], steps < n_keys[of_kind, None]  # (S, length)
        at = (first[of_kind, None] + steps).clamp(max=len(begin) - 1)
        queries = q_rows[at].where(valid_q, len(begin))
        keys = k_rows[torch.where(valid_k, first_key[of_kind, None] + steps, first_key[of_kind, None])]
        visible = (end[at] - k_first[of_kind, None]).where(valid_q, 0)
        yield Job(queries, keys, None if triangle else _staircase(visible, length, q.dtype))


def _staircase(seen: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """(S, 1, L, keys): row i sees its first seen[i] keys."""
    hidden = torch.arange(keys) >= seen[..., None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None]
