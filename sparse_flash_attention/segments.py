"""Who sees whom, as ranges: the plan that every implementation of the attention works from (section 3 of the paper).

The rows of one (batch, head) are put in order of (bucket, position), dropped rows last. In that order a query sees one
contiguous range of keys: it starts where the query's bucket starts and ends, under causality, with the last key of the
bucket that is not later than the query. So bucket ids, keep masks, positions and causality all become two integers a
row, and both never fall from one query to the next: the keys of a tile of queries are one range too, from the first
row's start to the last row's end, and work falls with sparsity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Sorted rows and visible ranges; N = B * H. All int32 and contiguous, of fixed shapes (nothing here syncs)."""

    q_order: Tensor
    """(N, Tq): position of the i-th query in (bucket, position) order; dropped queries last."""
    k_order: Tensor
    """(N, Tk): the same for keys."""
    k_begin: Tensor
    """(N, Tq): the i-th query in that order sees the keys k_order[k_begin[i] : k_end[i]]. Never falls along i."""
    k_end: Tensor
    """(N, Tq): equal to k_begin where a query sees nothing. Never falls along i."""


def plan(
    shape: tuple[int, int, int, int],
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    q_hash: Tensor | None = None,
    k_hash: Tensor | None = None,
    *,
    causal: bool = True,
    include_self: bool = True,
    device: torch.device | str = "cpu",
) -> Plan:
    """Order the rows and find the visible ranges; without hashes all rows share one bucket.

    Args:
        shape: (B, H, Tq, Tk).
        q_keep: bool, broadcastable to (B, H, Tq); False drops a query. None keeps all.
        k_keep: bool, broadcastable to (B, H, Tk).
        q_hash: integers, broadcastable to (B, H, Tq); any values.
        k_hash: integers, broadcastable to (B, H, Tk); both hashes or none.
        causal: a query at t sees keys at u <= t.
        include_self: False excludes u = t.
        device: where to build the plan.
    """
    batch, heads, q_len, k_len = shape
    given = [x for x in (q_keep, k_keep, q_hash, k_hash) if x is not None]
    # masks that all heads (or samples) share are sorted once
    lead = torch.broadcast_shapes(*(torch.Size((1,) * (3 - x.ndim)) + x.shape[:-1] for x in given), (1, 1))
    rows = lead.numel()

    def spread(x: Tensor | None, length: int) -> Tensor | None:
        return None if x is None else x.expand(*lead, length).reshape(rows, length)

    q_kept, k_kept = spread(q_keep, q_len), spread(k_keep, k_len)
    if q_hash is None or k_hash is None:
        found = _kept(rows, q_len, k_len, q_kept, k_kept, causal, include_self, device)
    else:
        q_ids = spread(q_hash, q_len)
        k_ids = q_ids if k_hash is q_hash else spread(k_hash, k_len)
        k_kept = q_kept if k_keep is q_keep else k_kept
        assert q_ids is not None and k_ids is not None
        found = _buckets(q_ids, k_ids, q_kept, k_kept, causal, include_self)

    def widen(x: Tensor) -> Tensor:
        wide = x.to(torch.int32).view(*lead, x.shape[-1]).expand(batch, heads, -1)
        return wide.reshape(batch * heads, x.shape[-1]).contiguous()  # reshape alone may keep a stride of 0

    return Plan(*(widen(x) for x in found))


def _kept(
    rows: int, q_len: int, k_len: int, q_keep: Tensor | None, k_keep: Tensor | None,
    causal: bool, include_self: bool, device: torch.device | str,
) -> Plan:  # fmt: skip
    """One bucket: cumulative counts do it, without a sort."""
    q_order, q_live = _partition(rows, q_len, q_keep, device)
    k_order, k_live = _partition(rows, k_len, k_keep, device)
    if causal:
        counts = torch.ones(rows, k_len, dtype=torch.int64, device=device) if k_keep is None else k_keep.long()
        seen = torch.cat([counts.new_zeros(rows, 1), counts.cumsum(1)], 1)  # (rows, Tk + 1): kept keys before u
        k_end = seen.gather(1, (q_order + include_self).clamp(max=k_len))
    else:
        k_end = k_live.expand(rows, q_len)
    dropped = torch.arange(q_len, device=device) >= q_live
    return Plan(q_order, k_order, k_live * dropped, torch.where(dropped, k_live, k_end))


def _buckets(
    q_hash: Tensor, k_hash: Tensor, q_keep: Tensor | None, k_keep: Tensor | None, causal: bool, include_self: bool
) -> Plan:
    """Buckets: one stable sort a side; ids are compared, never used as numbers, so any integers will do."""
    shared = k_hash is q_hash and k_keep is q_keep
    dtype = torch.promote_types(q_hash.dtype, k_hash.dtype)
    q_ids, q_order, q_live = _sorted(q_hash.to(dtype), q_keep)
    if shared and causal:
        return _own_bucket(q_ids, q_order, q_live, include_self)
    k_ids, k_order, k_live = (q_ids, q_order, q_live) if shared else _sorted(k_hash.to(dtype), k_keep)
    # dropped keys carry the largest id, so a bucket never starts behind them; it may end among them
    begin = torch.searchsorted(k_ids, q_ids)
    end = torch.searchsorted(k_ids, q_ids, right=True).minimum(k_live)
    if causal:
        # (bucket, position) as one number, with the place where a bucket starts as its name: the next one starts at
        # least one place later, so all positions of keys fit in between
        step = k_hash.shape[1]
        ids = torch.searchsorted(k_ids, k_ids) * step + k_order
        ids = torch.where(torch.arange(step, device=ids.device) < k_live, ids, torch.iinfo(ids.dtype).max)
        end = end.minimum(torch.searchsorted(ids, begin * step + q_order, right=include_self))
    dropped = torch.arange(q_ids.shape[1], device=q_ids.device) >= q_live
    return Plan(q_order, k_order, torch.where(dropped, k_live, begin), torch.where(dropped, k_live, end))


def _own_bucket(ids: Tensor, order: Tensor, live: Tensor, include_self: bool) -> Plan:
    """Queries and keys in one order: a row sees from the start of its bucket up to (or short of) itself."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    fresh = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    begin = torch.where(fresh, place, 0).cummax(1).values
    dropped = place >= live
    end = place + int(include_self)
    return Plan(order, order, torch.where(dropped, live, begin), torch.where(dropped, live, end))


def _partition(rows: int, length: int, keep: Tensor | None, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Stable order with the kept entries first (rows, length), and how many are kept (rows, 1)."""
    order = torch.arange(length, device=device).expand(rows, length)
    if keep is None:
        return order, torch.full((rows, 1), length, dtype=torch.int64, device=device)
    before = keep.cumsum(1)
    live = keep.sum(1, keepdim=True)
    place = torch.where(keep, before - 1, live + order - before)
    return torch.empty_like(place).scatter_(1, place, order), live


def _sorted(ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in order, positions in that order (dropped rows last, with the largest id), and how many are kept."""
    if ids.dtype is torch.bool:
        ids = ids.to(torch.uint8)
    values, order = torch.sort(ids, dim=1, stable=True)
    rows, length = ids.shape
    if keep is None:
        return values, order, torch.full((rows, 1), length, dtype=torch.int64, device=ids.device)
    place, live = _partition(rows, length, keep.gather(1, order), ids.device)
    values, order = values.gather(1, place), order.gather(1, place)
    dropped = torch.arange(length, device=ids.device) >= live
    return values.masked_fill(dropped, torch.iinfo(values.dtype).max), order, live
