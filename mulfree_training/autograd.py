"""What the differentiable functions over the operators share: what they keep for the backward pass, and vmap.

Gradients are first derivatives only. The second one of a piecewise affine function is zero where it exists (`exact`),
or would be that of a rule which is no derivative of it (`approx`): differentiating twice raises. So does forward mode,
which PyTorch refuses. One case goes unseen and gives zeros: `torch.func.jacrev` of `torch.func.grad`, or the like, both
inside one function that `torch.compile` traces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


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


class _Once(torch.autograd.Function):
    """A gradient as it is, made to depend on what it was computed from, and an error to whoever derives it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *origins: Tensor | None) -> Tensor:
        return grad.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            "second derivatives of piecewise affine functions are not available: "
            "what is derived twice must not go through pam_* functions or PAM modules"
        )


def once_differentiable(backward: Callable[[Any, tuple[Any, ...], Tensor], Gradients]) -> Callable[..., Gradients]:
    """Make a backward pass of `(ctx, saved tensors, gradient)`, and let nobody differentiate through it.

    PyTorch's decorator of this name complains only if the incoming gradient is to be differentiated. A gradient depends
    on the saved tensors as well, and with a loss that ends in a sum on nothing else.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, grad: Tensor) -> Gradients:
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them a single time
        with torch.no_grad():
            found = backward(ctx, saved, grad)
        # a compiled graph has no second derivative at all, and says so itself
        if not torch.is_grad_enabled():
            return found
        return tuple(x if x is None else _Once.apply(x, grad, *saved) for x in found)

    return guarded
