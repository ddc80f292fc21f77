"""Matrix products, linear layers and convolutions whose products are PAM and whose sums are float additions.

Sums run in the order of the inner dimension, from 0, one addition after the other, on every face: the same bits
everywhere. Only the number of threads or tiles changes how fast that is.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mulfree_training.arguments import Rules, are_exact, check_pair, in_single
from mulfree_training.autograd import OfTwo, once_differentiable
from mulfree_training.bits import offset
from mulfree_training.operators import ops


class _MatMul(OfTwo):
    """(N, M, K) x (N, K, P) -> (N, M, P)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, shift: int, exact: tuple[bool, bool], backend: str) -> Tensor:
        return ops.matmul(a, b, shift, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (shift, exact, backend) = saved, ctx.rest
        ga = gb = None
        if ctx.needs_input_grad[0]:
            if exact[0]:
                ga = ops.matmul_grad(grad, a, b, shift, backend)
            else:
                ga = ops.matmul(grad, b.mT, shift, backend)
        if ctx.needs_input_grad[1]:
            if exact[1]:
                gb = ops.matmul_grad(grad.mT, b.mT, a.mT, shift, backend).mT
            else:
                gb = ops.matmul(a.mT, grad, shift, backend)
        return ga, gb, None, None, None


def pam_matmul(
    A: Tensor, B: Tensor, *, derivative: Rules = "approx", alpha: float | None = None, backend: str = ""
) -> Tensor:
    """Sum over k of PAM(A[…, i, k], B[…, k, j]), the shapes of `torch.matmul`.

    Args:
        A: (K,), (M, K) or (…, M, K), float32, bfloat16 (products in bfloat16, sums in float32) or float64; any strides.
        B: (K,), (K, P) or (…, K, P), of A's dtype; leading dimensions broadcast.
        derivative: `approx` (two more products) or `exact`, or a pair, one an operand.
        alpha: compensation constant on every product; see `primitives`.
        backend: forces a face: `cpp`, `triton`, `torch` or `reference`; "" picks by device.

    Returns:
        The product in A's dtype; zeros for K = 0.

    Raises:
        TypeError: other dtypes, or two different ones.
        ValueError: shapes that do not fit, an unknown rule, or a face that cannot serve the call.
    """
    check_pair(("A", "B"), A, B)
    if A.dim() == 0 or B.dim() == 0:
        raise ValueError(f"A of shape {tuple(A.shape)}, B of shape {tuple(B.shape)}: must have dimensions")
    left, right = (A[None] if A.dim() == 1 else A), (B[:, None] if B.dim() == 1 else B)
    if left.shape[-1] != right.shape[-2]:
        raise ValueError(f"B of shape {tuple(B.shape)}: must have {left.shape[-1]} rows for A of {tuple(A.shape)}")
    rest = offset(alpha), are_exact(derivative), backend
    out = in_single(lambda a, b: _batched(a, b, rest), left, right)
    out = out.squeeze(-2) if A.dim() == 1 else out
    return out.squeeze(-1) if B.dim() == 1 else out


def _batched(a: Tensor, b: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """Bring leading dimensions together: one batch dimension, or the rows of A where B has none."""
    if b.dim() == 2:
        # one matrix for all: the leading dimensions are rows, whose gradient for B is one product too
        rows = a.reshape(1, math.prod(a.shape[:-1]), a.shape[-1])
        return _MatMul.apply(rows, b[None], *rest)[0].reshape(*a.shape[:-1], b.shape[-1])
    try:
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError as error:
        raise ValueError(f"B of shape {tuple(b.shape)}: must broadcast with A of shape {tuple(a.shape)}") from error
    a, b = (x.expand(*lead, *x.shape[-2:]).reshape(math.prod(lead), *x.shape[-2:]) for x in (a, b))
    return _MatMul.apply(a, b, *rest).reshape(*lead, a.shape[1], b.shape[2])


def pam_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    derivative: Rules = "approx",
    alpha: float | None = None,
    backend: str = "",
) -> Tensor:
    """`F.linear` with PAM: input (…, K), weight (P, K), bias (P,) -> (…, P). The rest as in `pam_matmul`."""
    check_pair(("input", "weight"), input, weight)
    if weight.dim() != 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: must be (P, K)")
    _check_bias(bias, weight)
    out = pam_matmul(input, weight.mT, derivative=derivative, alpha=alpha, backend=backend)
    return out if bias is None else out + bias


def pam_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | Literal["same", "valid"] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    derivative: Rules = "approx",
    alpha: float | None = None,
    backend: str = "",
) -> Tensor:
    """`F.conv2d` with PAM: unfold, then a product a group.

    Args:
        input: (B, C, H, W).
        weight: (C', C / groups, h, w).
        bias: (C',).
        stride, padding, dilation, groups: as in `F.conv2d`, padding "same" (for strides of 1) and "valid" included.
        derivative, alpha, backend: as in `pam_matmul`.

    Returns: (B, C', H', W').

    Raises:
        ValueError: shapes that do not fit; the rest as `pam_matmul`.
    """
    check_pair(("input", "weight"), input, weight)
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"input of shape {tuple(input.shape)}, weight of {tuple(weight.shape)}: must have 4 dimensions"
        )
    if isinstance(padding, str):
        input, padding = _padded(input, padding, _pair(stride), _pair(dilation), weight.shape[2:]), 0
    (sh, sw), (ph, pw), (dh, dw) = (_pair(x) for x in (stride, padding, dilation))
    for name, value, least in (("stride", (sh, sw), 1), ("padding", (ph, pw), 0), ("dilation", (dh, dw), 1)):
        if min(value) < least:
            raise ValueError(f"{name}={value}: must be >= {least}")
    if groups < 1:
        raise ValueError(f"groups={groups}: must be >= 1")
    if input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        fits = f"(a multiple of groups={groups}, {input.shape[1]} / groups, h, w)"
        raise ValueError(f"weight of shape {tuple(weight.shape)}: must be {fits}")
    _check_bias(bias, weight)
    kernel = weight.shape[2:]
    height = (input.shape[2] + 2 * ph - dh * (kernel[0] - 1) - 1) // sh + 1
    width = (input.shape[3] + 2 * pw - dw * (kernel[1] - 1) - 1) // sw + 1
    if height < 1 or width < 1:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: must fit into input of shape {tuple(input.shape)}")
    columns = F.unfold(input, kernel, (dh, dw), (ph, pw), (sh, sw))  # (B, C h w, H' W')
    options: dict[str, Any] = {"derivative": derivative, "alpha": alpha, "backend": backend}
    out = _groups(columns, weight, groups, options) if groups > 1 else _one_group(columns, weight, options)
    out = out if bias is None else out + bias  # (B, H' W', C')
    return out.transpose(1, 2).unflatten(2, (height, width))


def _one_group(columns: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, C h w, L), (C', C, h, w) -> (B, L, C'): all positions of all images are rows of one product."""
    rows = columns.transpose(1, 2).flatten(0, 1)  # (B L, C h w)
    out = pam_matmul(rows, weight.flatten(1).mT, **options)
    return out.unflatten(0, (columns.shape[0], columns.shape[2]))


def _groups(columns: Tensor, weight: Tensor, groups: int, options: dict[str, Any]) -> Tensor:
    """(B, C h w, L), (C', C / groups, h, w) -> (B, L, C'), a product a group.

    Positions are the columns of the product: a group has few filters, often one, and PAM commutes. The order of sums is
    that of `_one_group`.
    """
    if isinstance(rule := options["derivative"], tuple) and len(rule) == 2:
        options = {**options, "derivative": rule[::-1]}
    patches = columns.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)  # (groups, C h w / groups, B L)
    filters = weight.flatten(1).unflatten(0, (groups, -1))  # (groups, C' / groups, C h w / groups)
    out = pam_matmul(filters, patches, **options)  # (groups, C' / groups, B L)
    out = out.movedim(2, 0).reshape(columns.shape[0], columns.shape[2], weight.shape[0])
    # several filters of a group lie side by side, as those of one group do: the gradient of a bias, a sum of PyTorch's,
    # follows the memory in its order
    return out if filters.shape[1] == 1 else out.contiguous()


def _padded(
    input: Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, ...]
) -> Tensor:
    """The input with the zeros that a word for the padding means; an odd one goes to the right or bottom."""
    if padding not in ("same", "valid"):
        raise ValueError(f"padding={padding!r}: must be same, valid, a number or a pair of them")
    if padding == "valid":
        return input
    if stride != (1, 1):
        raise ValueError(f"padding='same': must go with a stride of 1, got {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return F.pad(input, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """One number an output, of the weight's dtype: else a sum would widen the result, or its shape."""
    if bias is None:
        return
    check_pair(("weight", "bias"), weight, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape {tuple(bias.shape)}: must be {tuple(weight.shape[:1])}")


def _pair(x: int | tuple[int, int]) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else x
