"""The rotational update in few in-place passes of PyTorch, tensor by tensor, so that a tensor stays in cache.

Same result to rounding as `rotational_update_`, for weights that are a (K, n) matrix in memory. No copy of the size of
a tensor is allocated: directions and products live in two scratch buffers that all tensors of a step share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotational_optimizers.update import NOISE


def scratch_for(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two flat buffers that hold the largest of `weights` (of one dtype and device)."""
    largest = max(weights, key=Tensor.numel)
    first = torch.empty(largest.numel(), dtype=largest.dtype, device=largest.device)
    return first, torch.empty_like(first)


def is_regular(grad: Tensor, norm: Tensor) -> bool:
    """Is every gradient finite and does every row rotate? The fast passes leave other tensors to the plain form."""
    return bool((grad.sum() * 0 == 0) & (norm.min() > 0))


def turn_rows_(
    x: Tensor, d: Tensor, norm: Tensor, update_norm_sq: Tensor, *, factor: float, rotation: float | Tensor,
    decay: float, correction: float, zero_mean: bool, speed: Tensor | None, spare: Tensor,
) -> None:  # fmt: skip
    """Turn the rows of x (K, n) away from d (K, n), which is used up.

    Args:
        norm, update_norm_sq: (K,), the latter updated in place.
        factor: what d still lacks to be the base optimizer's direction.
        rotation: radians.
        decay: f of the running mean.
        correction: 1 − f^t, its bias correction.
        zero_mean: rows are centred.
        speed: (K,) or None.
        spare: buffer shaped like x.
    """
    raw = torch.linalg.vector_norm(d, dim=1)
    xx = torch.mul(x, x, out=spare).sum(1)
    if zero_mean:
        d.sub_(d.mean(1, keepdim=True))
        x_mean = x.mean(1)
        xx -= x.shape[1] * x_mean.square()
    along = torch.mul(d, x, out=spare).sum(1) / xx
    d.addcmul_(x, along.neg()[:, None])
    size = torch.linalg.vector_norm(d, dim=1)
    size = torch.where(size > NOISE * torch.finfo(d.dtype).eps * raw, size, 0) * abs(factor)
    finite = torch.isfinite(raw)
    mean_sq = decay * update_norm_sq + (1 - decay) * size.square()
    update_norm_sq.copy_(torch.where(finite, mean_sq, update_norm_sq))
    a = (update_norm_sq / correction).sqrt_()
    turn = torch.where(a > 0, rotation * norm / a, 0)
    if speed is not None:
        turn = turn * speed
    stays = ~finite | (turn == 0)
    stayed = x[stays] if bool(stays.any()) else None
    if zero_mean:
        # the second term: d has lost `along` times an x that was not centred yet
        x.sub_((x_mean * (1 + turn * factor * along))[:, None])
    keep = norm / (xx + (turn * size).square()).sqrt_()
    x.mul_(keep[:, None]).addcmul_(d, (turn * keep * -factor)[:, None])
    if stayed is not None:
        x[stays] = stayed
