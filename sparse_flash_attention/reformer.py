"""Attention over fixed-size chunks: Reformer's LSH attention (Kitaev et al. 2020), and a sliding window.

Reformer sorts rows by (bucket, position) like the paper, but then cuts the sorted rows into chunks of one size and lets
a chunk see itself and the chunk before. Where a bucket is longer than a chunk, pairs of the bucket are lost; where it
is shorter, work goes to pairs that the mask then hides. It is the baseline of the paper's quality comparison.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_flash_attention import arguments


def reformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_hash: Tensor,
    *,
    chunk: int,
    include_self: bool = True,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Chunked LSH attention: softmax over the same bucket's keys in the query's own and the previous chunk.

    With several rounds a pair that meets in several of them counts once: the rounds are joined by their log-sum-exp,
    each pair's weight divided by the number of rounds in which it meets (Reformer, appendix A). The result is the
    softmax over the union of the rounds' pairs.

    Not strictly causal, as Reformer is not: values of later rows never enter, but where a chunk ends depends on how
    many rows of other buckets there are, later ones included, and so does which earlier keys a query keeps.

    Args:
        q: queries (B, H, T, D), of a dtype that `qk_sparse_attention` takes.
        k: keys (B, H, T, D); Reformer's are q / ‖q‖.
        v: values (B, H, T, Dv).
        q_hash: integers, broadcastable to (B, H, T), or (rounds, B, H, T): buckets of queries and keys alike.
        chunk: c >= 1, rows a chunk; T need not be a multiple.
        include_self: False hides a row from itself; needs causal.
        scale: factor on the scores; None is 1 / sqrt(D).
        causal: keys at u <= t only. Without it a chunk still looks back and not ahead.

    Returns:
        (B, H, T, Dv) in the dtype of q; 0 without gradient where a query sees nothing. Time and memory are of order
        rounds * T * c (and rounds^2 * T * c for the counts of pairs).

    Raises:
        TypeError: dtypes that differ or are not supported, or hashes that are not integers.
        ValueError: shapes that do not fit, chunk below 1, or include_self=False without causal.
    """
    batch, heads, length, k_len = arguments.shapes(q, k, v)
    if length != k_len or heads != k.shape[1]:
        raise ValueError(f"q of shape {tuple(q.shape)}, k of shape {tuple(k.shape)}: must have equal heads and length")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be >= 1")
    if not include_self and not causal:
        raise ValueError(f"include_self=False with causal={causal}: needs causal=True")
    scale = arguments.scaling(scale, q.shape[3])
    rounds = [q_hash] if not isinstance(q_hash, Tensor) or q_hash.ndim < 4 else list(q_hash.unbind())
    # (R, B, H, T)
    ids = torch.stack([arguments.ids("q_hash", x, (batch, heads, length), q.device).expand(batch, heads, -1).long()
                       for x in rounds])  # fmt: skip
    order = torch.sort(ids, dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=q.device).expand_as(order))

    def rows(x: Tensor) -> Tensor:  # (B, H, T, E) -> (R, B, H, n, c, E)
        return _chunks(
            x.expand(len(rounds), *x.shape).gather(3, order[..., None].expand(*order.shape, x.shape[3])), chunk
        )

    q_rows, k_rows, v_rows = rows(q), _with_previous(rows(k)), _with_previous(rows(v))  # keys: (R, B, H, n, 2c, E)
    # what decides visibility, of every row in the order of every round; −1 marks padding
    facts = torch.cat([torch.arange(length, device=q.device).expand(1, batch, heads, -1), ids, rank // chunk])
    facts = facts.movedim(0, -1)  # (B, H, T, 1 + 2R)
    q_facts = _chunks(_gather_facts(facts, order), chunk, fill=-1)
    k_facts = _with_previous(q_facts, fill=-1)
    t, u = q_facts[..., :1], k_facts[..., 0].unsqueeze(-2)  # (R, B, H, n, c, 1), (R, B, H, n, 1, 2c)
    allowed = (t >= 0) & (u >= 0)
    if causal:
        allowed = allowed & (u <= t)
    if not include_self:
        allowed = allowed & (u != t)
    meets = [_meet(q_facts, k_facts, r, len(rounds)) for r in range(len(rounds))]
    met = torch.stack([meet[r] for r, meet in enumerate(meets)])
    mask = allowed & met  # (R, B, H, n, c, 2c)
    alive = mask.any(-1, keepdim=True)
    scores = scale * q_rows @ k_rows.transpose(-1, -2)
    if len(rounds) > 1:
        scores = scores - sum(meet.to(scores.dtype) for meet in meets).clamp(min=1).log()  # type: ignore[union-attr]
    scores = scores.masked_fill(~mask, -torch.inf).where(alive, 0)
    out = torch.softmax(scores, dim=-1).where(alive, 0) @ v_rows  # (R, B, H, n, c, Dv)
    out = _unsort(out, rank)  # (R, B, H, T, Dv)
    if len(rounds) == 1:
        return out[0]
    lse = _unsort(torch.logsumexp(scores, dim=-1, keepdim=True), rank)  # (R, B, H, T, 1)
    live = _unsort(alive, rank)
    some = live.any(0)
    share = torch.softmax(lse.masked_fill(~live, -torch.inf).where(some, 0), dim=0)
    return (share * out).sum(0).where(some, 0).to(q.dtype)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float | None = None) -> Tensor:
    """Causal sliding window: a query sees the last `window` keys, itself included; with window 1 the output is v.

    Args:
        q: queries (B, H, T, D), of a dtype that `qk_sparse_attention` takes.
        k: keys (B, H, T, D).
        v: values (B, H, T, Dv).
        window: w >= 1, keys a query; at T or above it is full causal attention.
        scale: factor on the scores; None is 1 / sqrt(D).

    Returns:
        (B, H, T, Dv) in the dtype of q. Time and memory are of order T * max(w, 64).

    Raises:
        TypeError: dtypes that differ or are not supported.
        ValueError: shapes that do not fit, or window below 1.
    """
    _, heads, length, k_len = arguments.shapes(q, k, v)
    if length != k_len or heads != k.shape[1]:
        raise ValueError(f"q of shape {tuple(q.shape)}, k of shape {tuple(k.shape)}: must have equal heads and length")
    if window < 1:
        raise ValueError(f"window={window}: must be >= 1")
    scale = arguments.scaling(scale, q.shape[3])
    if window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    chunk = max(window, min(64, length))  # tiny chunks would spend their time on batching, not on products
    q_rows = _chunks(q, chunk)
    k_rows, v_rows = _with_previous(_chunks(k, chunk)), _with_previous(_chunks(v, chunk))
    t = torch.arange(q_rows.shape[2] * chunk, device=q.device).view(-1, chunk, 1)  # (n, c, 1)
    u = torch.arange(-chunk, chunk, device=q.device) + t[:, :1]  # (n, 1, 2c)
    mask = (u >= 0) & (u <= t) & (t - u < window)
    scores = (scale * q_rows @ k_rows.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    out = torch.softmax(scores, dim=-1) @ v_rows  # every row sees itself, padding too
    return out.flatten(2, 3)[:, :, :length]


def _chunks(x: Tensor, chunk: int, fill: float = 0) -> Tensor:
    """(…, T, E) -> (…, n, c, E), padded at the end."""
    padded = F.pad(x.contiguous(), (0, 0, 0, -x.shape[-2] % chunk), value=fill)  # heads may be strided; products copy
    return padded.unflatten(-2, (padded.shape[-2] // chunk, chunk))


def _with_previous(x: Tensor, fill: float = 0) -> Tensor:
    """Every chunk behind the one before it: (…, n, c, E) -> (…, n, 2c, E); the first has padding there."""
    before = F.pad(x, (0, 0, 0, 0, 1, 0), value=fill)[..., : x.shape[-3], :, :]
    return torch.cat([before, x], dim=-2)


def _gather_facts(facts: Tensor, order: Tensor) -> Tensor:
    """(B, H, T, E) in the order of every round: (R, B, H, T, E)."""
    index = order[..., None].expand(*order.shape, facts.shape[-1])
    return facts.expand(len(order), *facts.shape).gather(3, index)


def _meet(q_facts: Tensor, k_facts: Tensor, r: int, rounds: int) -> Tensor:
    """Do the pairs laid out for each round (R, B, H, n, c, 2c) meet in round r: one bucket, and chunks 0 or 1 apart?"""
    bucket, at = 1 + r, 1 + rounds + r
    same = q_facts[..., bucket].unsqueeze(-1) == k_facts[..., bucket].unsqueeze(-2)
    apart = q_facts[..., at].unsqueeze(-1) - k_facts[..., at].unsqueeze(-2)
    return same & (apart >= 0) & (apart <= 1)


def _unsort(x: Tensor, rank: Tensor) -> Tensor:
    """Chunked rows (R, B, H, n, c, E) back to their positions: (R, B, H, T, E)."""
    return x.flatten(3, 4).gather(3, rank[..., None].expand(*rank.shape, x.shape[-1]))
