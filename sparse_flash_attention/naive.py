"""What sparsity costs without a kernel for it: compact, pad, and dense attention with an explicit mask (C4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_qk_sparse_attention(q: Tensor, k: Tensor, v: Tensor, q_keep: Tensor, k_keep: Tensor) -> Tensor:
    """Causal attention among kept rows by way of a mask of order T^2: the paper's naive baseline.

    Args:
        q: (B, H, T, D).
        k: (B, H, T, D).
        v: (B, H, T, Dv).
        q_keep: bool (B, H, T).
        k_keep: bool (B, H, T).

    Returns:
        (B, H, T, Dv), as `qk_sparse_attention` gives.
    """
    q_rows, k_rows = _compact(q_keep), _compact(k_keep)  # (B, H, Lq), (B, H, Lk)
    q_part, k_part, v_part = _take(q, q_rows), _take(k, k_rows), _take(v, k_rows)
    visible = q_rows.unsqueeze(-1) >= k_rows.unsqueeze(-2)
    visible &= q_keep.gather(2, q_rows).unsqueeze(-1) & k_keep.gather(2, k_rows).unsqueeze(-2)
    stranded = ~visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=visible | stranded)
    out = out.masked_fill(stranded, 0)
    index = q_rows.unsqueeze(-1).expand(*q_rows.shape, v.shape[3])
    return torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device).scatter(2, index, out)


def _compact(keep: Tensor) -> Tensor:
    """Positions of the kept rows first, cut after the fullest head's: (B, H, L)."""
    order = keep.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    return order[..., : max(int(keep.sum(2).max()), 1)]


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(2, rows.unsqueeze(-1).expand(*rows.shape, x.shape[3]))
