"""What the differentiable functions over the operators share: what they keep for the backward pass, and vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OfOne(torch.autograd.Function):
    """A function of one tensor and of options: keeps the tensor, and the options as `ctx.rest`."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """See `torch.autograd.Function`."""
        x, *ctx.rest = inputs
        ctx.save_for_backward(x)


class OfTwo(torch.autograd.Function):
    """A function of two tensors and of options: keeps the tensors, and the options as `ctx.rest`."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """See `torch.autograd.Function`."""
        a, b, *ctx.rest = inputs
        ctx.save_for_backward(a, b)
