"""The face of compiled C++: one name for the elementwise, the row and the matrix kernels."""

from __future__ import annotations

from torch import Tensor

from mulfree_training.kernels import cpp_elementwise, cpp_matmul, cpp_rows
from mulfree_training.kernels.cpp_elementwise import (
    div,
    div_grad,
    exp2,
    exp2_grad,
    log2,
    log2_grad,
    mul,
    mul_grad,
    slope,
    sqrt,
    sqrt_grad,
)
from mulfree_training.kernels.cpp_matmul import matmul, matmul_grad
from mulfree_training.kernels.cpp_rows import (
    adamw_,
    layer_norm,
    layer_norm_grad,
    log_softmax,
    log_softmax_grad,
    softmax,
    softmax_grad,
)

__all__ = [
    "adamw_", "div", "div_grad", "exp2", "exp2_grad", "layer_norm", "layer_norm_grad", "log2", "log2_grad",
    "log_softmax", "log_softmax_grad", "matmul", "matmul_grad", "mul", "mul_grad", "refuses", "slope", "softmax",
    "softmax_grad", "sqrt", "sqrt_grad",
]  # fmt: skip


def refuses(x: Tensor) -> str | None:
    """Why this face cannot serve tensors like x, or None."""
    if not x.is_cpu:
        return f"needs tensors on the CPU, got {x.device}"
    built = cpp_matmul.available() and cpp_elementwise.available() and cpp_rows.available()
    return None if built else "needs a C++ compiler (or COMMON_NATIVE is 0)"
