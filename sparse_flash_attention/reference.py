"""Masked dense attention, written as the definition reads: slow, of order T^2 in memory, right in any precision."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    shape: tuple[int, int, int, int],
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    q_hash: Tensor | None = None,
    k_hash: Tensor | None = None,
    *,
    causal: bool = True,
    include_self: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which query sees which key: bool (B, H, Tq, Tk). Arguments as in `segments.plan`."""
    batch, heads, q_len, k_len = shape
    mask = torch.ones(batch, heads, q_len, k_len, dtype=torch.bool, device=device)
    if q_keep is not None:
        mask = mask & q_keep.unsqueeze(-1)
    if k_keep is not None:
        mask = mask & k_keep.unsqueeze(-2)
    if q_hash is not None and k_hash is not None:
        mask = mask & (q_hash.unsqueeze(-1) == k_hash.unsqueeze(-2))
    if causal:
        t, u = torch.arange(q_len, device=device)[:, None], torch.arange(k_len, device=device)
        mask = mask & ((u <= t) if include_self else (u < t))
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax over the visible keys; rows that see nothing are 0 and pass no gradient.

    Args:
        q: (B, H, Tq, D).
        k: (B, Hk, Tk, D); query head h reads key head h // (H / Hk).
        v: (B, Hk, Tk, Dv).
        mask: bool (B, H, Tq, Tk).
        scale: factor on the scores.

    Returns:
        (B, H, Tq, Dv).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    # a row that nobody sees must not reach the sums, not even as 0 * NaN
    q = q.where(mask.any(-1, keepdim=True), 0)
    used = mask.any(-2).unsqueeze(-1)
    k, v = k.where(used, 0), v.where(used, 0)
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    alive = mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.where(alive, 0), dim=-1)
    return (weights @ v).where(alive, 0)  # after the sum: a NaN that others see must not reach a row of 0
