"""How many pairs an attention computes, and how many of those it should: density, coverage, and Reformer's loss.

*Density* is cost: the share of all causal pairs that are live. *Coverage* is quality: the share of same-bucket causal
pairs that are really attended. The paper's attention has coverage 1 by definition, and it is measured here all the
same, from what the ranges (or the outputs) contain and not from how they were made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_flash_attention.reference import visible
from sparse_flash_attention.segments import Plan


def attention_density(plan: Plan, *, causal: bool = True) -> Tensor:
    """Live pairs over all (causal) pairs, exact, in time of order T.

    Args:
        plan: from `segments.plan`; N = B * H.
        causal: against the pairs u <= t; False against all Tq * Tk.

    Returns:
        float64 (N,); 0 where there is no pair at all.
    """
    q_len, k_len = plan.q_order.shape[1], plan.k_order.shape[1]
    diagonal = min(q_len, k_len)
    pairs = diagonal * (diagonal + 1) // 2 + (q_len - diagonal) * k_len if causal else q_len * k_len
    return (plan.k_end - plan.k_begin).sum(1, dtype=torch.int64).double() / max(pairs, 1)


def coverage(
    attended: Plan | Tensor,
    q_hash: Tensor,
    k_hash: Tensor | None = None,
    *,
    causal: bool = True,
    include_self: bool = True,
) -> Tensor:
    """Share of the pairs of one bucket (causal ones, unless told) that are attended.

    Args:
        attended: a Plan of N = B * H rows: its ranges are searched for keys of the query's bucket that are not later,
            in time of order T * buckets; or a mask or weights (B, H, Tq, Tk), where what is not 0 is attended.
        q_hash: integers (B, H, Tq), in full.
        k_hash: integers (B, H, Tk); None shares q_hash.
        causal: count the pairs u <= t.
        include_self: False leaves u = t out of the count.

    Returns:
        float64 (B, H); 1 where a head has no pair to cover.

    Raises:
        ValueError: shapes that do not fit.
    """
    k_hash = q_hash if k_hash is None else k_hash
    if q_hash.ndim != 3 or q_hash.shape[:2] != k_hash.shape[:2]:
        raise ValueError(
            f"hashes of shapes {tuple(q_hash.shape)}, {tuple(k_hash.shape)}: must be (batch, heads, length) in full"
        )
    shape = (*q_hash.shape, k_hash.shape[2])
    if isinstance(attended, Tensor):
        if tuple(attended.shape) != shape:
            raise ValueError(f"attended of shape {tuple(attended.shape)}: must be {shape}")
        due = visible(shape, None, None, q_hash, k_hash, causal=causal, include_self=include_self, device=q_hash.device)
        return _share(((attended != 0) & due).sum((-2, -1)), due.sum((-2, -1)))
    rows = shape[0] * shape[1]
    if attended.q_order.shape != (rows, shape[2]) or attended.k_order.shape != (rows, shape[3]):
        raise ValueError(f"plan of {tuple(attended.q_order.shape)} queries: must be {(rows, shape[2])}, as the hashes")
    q_ids, k_ids = q_hash.reshape(rows, -1).long(), k_hash.reshape(rows, -1).long()
    due, found = (torch.zeros(rows, dtype=torch.int64, device=q_ids.device) for _ in range(2))
    order, k_order = attended.q_order.long(), attended.k_order.long()
    t = torch.arange(shape[2], device=q_ids.device)
    until = (t + int(include_self)).clamp(max=shape[3]) if causal else torch.full_like(t, shape[3])
    for bucket in q_ids.unique():
        in_bucket = q_ids == bucket
        keys = _before(k_ids == bucket)  # (N, Tk + 1), by position
        due += torch.where(in_bucket, keys[:, until], 0).sum(1)
        live = _before((k_ids == bucket).gather(1, k_order))  # the same, in the order of the plan
        inside = live.gather(1, attended.k_end.long()) - live.gather(1, attended.k_begin.long())
        found += torch.where(in_bucket.gather(1, order), inside, 0).sum(1)
    return _share(found, due).view(shape[:2])


def reformer_chunk_mask(hashes: Tensor, chunk: int, *, causal: bool = True, include_self: bool = True) -> Tensor:
    """Pairs that Reformer's chunked attention computes, as a dense mask; of order T^2, for small T.

    Args:
        hashes: integers (B, H, T), or (rounds, B, H, T) for the union of the rounds.
        chunk: rows a chunk.
        causal: only u <= t.
        include_self: with u = t.

    Returns:
        bool (B, H, T, T).

    Raises:
        ValueError: chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be >= 1")
    if hashes.ndim == 4:
        masks = [reformer_chunk_mask(x, chunk, causal=causal, include_self=include_self) for x in hashes]
        return torch.stack(masks).any(0)
    place = hashes.argsort(dim=-1, stable=True).argsort(dim=-1) // chunk  # chunk of every row
    apart = place.unsqueeze(-1) - place.unsqueeze(-2)
    shape = (*hashes.shape, hashes.shape[-1])
    one_bucket = visible(
        shape, None, None, hashes, hashes, causal=causal, include_self=include_self, device=hashes.device
    )
    return one_bucket & ((apart == 0) | (apart == 1))


def reformer_coverage(hashes: Tensor, chunk: int, *, include_self: bool = True) -> Tensor:
    """Share of same-bucket causal pairs that Reformer's chunks contain, in closed form (time of order T log T).

    A bucket fills the sorted ranks s <= r < e, positions ascending, so its causal pairs are r' <= r. The pair is
    covered iff chunk(r) - chunk(r') is 0 or 1, that is r' >= c (floor(r / c) - 1): rank r reaches back to
    max(s, c (floor(r / c) - 1)).

    Args:
        hashes: integers (..., T).
        chunk: c, rows a chunk.
        include_self: count the pairs r' = r.

    Returns:
        float64 (...); 1 where there is no pair.

    Raises:
        ValueError: chunk below 1.
    """
    covered, pairs = _reformer_pairs(hashes, chunk, include_self)
    return _share(covered, pairs)


def reformer_density(hashes: Tensor, chunk: int, *, include_self: bool = True) -> Tensor:
    """Live pairs of Reformer's chunks over all causal pairs (cf. `attention_density`): float64 (...) of (..., T)."""
    length = hashes.shape[-1]
    covered, _ = _reformer_pairs(hashes, chunk, include_self)
    return covered.double() / max(length * (length + 1) // 2, 1)


def _reformer_pairs(hashes: Tensor, chunk: int, include_self: bool) -> tuple[Tensor, Tensor]:
    """(covered pairs, all pairs of one bucket), int64 (...)."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be >= 1")
    ids = hashes.sort(dim=-1).values.contiguous()
    start = torch.searchsorted(ids, ids)  # s of every rank
    rank = torch.arange(ids.shape[-1], device=ids.device)
    reach = torch.maximum(start, (rank // chunk - 1) * chunk)
    return (rank - reach + int(include_self)).sum(-1), (rank - start + int(include_self)).sum(-1)


def _before(live: Tensor) -> Tensor:
    """How many are True before each place and in all: (N, T) -> (N, T + 1)."""
    return torch.cat([live.new_zeros(live.shape[0], 1, dtype=torch.int64), live.cumsum(1)], 1)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 1.0)
