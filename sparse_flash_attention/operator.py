"""The registered operator: attention over planned ranges, with a fake kernel and a gradient.

`sparse_flash_attention::forward` and `::backward` take the tensors of a `Plan` and nothing whose shape depends on data,
so `torch.compile(fullgraph=True)` traces through them; which face runs is one more argument. The second derivative is
not defined (autograd says so); `backend="reference"` of the public functions has it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_flash_attention.segments import Plan

FACES = ("cpp", "torch", "triton", "flex")
"""Faces: modules `kernels/<name>_face.py` with `refuses(q, v) -> str | None`, `forward(q, k, v, plan, scale) -> (out,
lse)` and `backward(grad, q, k, v, out, lse, plan, scale) -> (dq, dk, dv)`; shapes as in `planned_attention`."""


def face(name: str) -> ModuleType:
    """The module of a face, imported on first use (Triton takes a second)."""
    if name == "cpp":
        from sparse_flash_attention.kernels import cpp_face

        return cpp_face
    if name == "torch":
        from sparse_flash_attention.kernels import torch_face

        return torch_face
    if name == "triton":
        from sparse_flash_attention.kernels import triton_face

        return triton_face
    from sparse_flash_attention.kernels import flex_face

    return flex_face


@torch.library.custom_op("sparse_flash_attention::forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, k_begin: Tensor, k_end: Tensor,
    scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return face(backend).forward(q, k, v, Plan(q_order, k_order, k_begin, k_end), scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=precise)


@torch.library.custom_op("sparse_flash_attention::backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_order: Tensor, k_order: Tensor, k_begin: Tensor, k_end: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = face(backend).backward(grad, q, k, v, out, lse, Plan(q_order, k_order, k_begin, k_end), scale)
    return tuple(x.contiguous() for x in grads)  # as the fake kernel says; a face may cut them out of padded rows


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)
    ctx.scale, ctx.backend = scale, backend


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, q_order, k_order, k_begin, k_end, out, lse = ctx.saved_tensors
    grads = _backward(grad, q, k, v, out, lse, q_order, k_order, k_begin, k_end, ctx.scale, ctx.backend)
    return (*grads, None, None, None, None, None, None)


_forward.register_autograd(_gradient, setup_context=_save)


def planned_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Attention of every query over its range of keys.

    Args:
        q: (B, H, Tq, D), any strides.
        k: (B, Hk, Tk, D); query head h reads key head h // (H / Hk).
        v: (B, Hk, Tk, Dv).
        plan: see `segments.Plan`; N = B * H.
        scale: factor on the scores.
        backend: one of `FACES`.

    Returns:
        The output (B, H, Tq, Dv) in q's dtype, 0 where a query sees nothing, and the natural logarithm of the sum of
        exponentials (B, H, Tq) in float32 (float64 for float64), +inf where a query sees nothing (so that exp(s - lse)
        is 0 there); it has no gradient.
    """
    return _forward(q, k, v, *plan, scale, backend)
