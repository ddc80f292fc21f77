# mypy: disallow-untyped-defs=False
"""Elementwise kernels in Triton: one a number of operands, compiled once an operation.

All data are float32 patterns (int32) and contiguous. An operand whose STEP is 0 is a single number for all elements.
"""

import triton
import triton.language as tl

from mulfree_training.kernels import triton_primitives as p

BLOCK = 1024
"""Elements a program on a device."""
WARPS = 4
INTERPRETED = 1 << 14
"""Elements a program under the interpreter, which is slow a program and fast an element."""
OPERATIONS = {
    "exp2": 1, "log2": 1, "sqrt": 1, "mul": 2, "div": 2, "slope": 2, "exp2_grad": 2, "log2_grad": 2, "sqrt_grad": 2,
    "mul_grad": 3, "div_grad": 3,
}  # fmt: skip
"""Operation -> number of operands."""


@triton.jit
def _elements(size, BLOCK: tl.constexpr):
    """Offsets (int64) of this program's elements, and whether they exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def unary_kernel(x_ptr, out_ptr, size, OPERATION: tl.constexpr, X_STEP: tl.constexpr, BLOCK: tl.constexpr):
    """`exp2`, `log2` or `sqrt` of x. Grid: (ceil(size / BLOCK),)."""
    at, exists = _elements(size, BLOCK)
    x = tl.load(x_ptr + at * X_STEP, mask=exists, other=0)
    if OPERATION == "exp2":
        y = p.exp2(x)
    elif OPERATION == "log2":
        y = p.log2(x)
    else:
        tl.static_assert(OPERATION == "sqrt")
        y = p.sqrt(x)
    tl.store(out_ptr + at, y, mask=exists)


@triton.jit(do_not_specialize=["shift"])
def binary_kernel(
    a_ptr, b_ptr, out_ptr, size, shift,
    OPERATION: tl.constexpr, A_STEP: tl.constexpr, B_STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`mul`, `div` or `slope` of a and b, or the derivative of a unary operation: gradient a at b (no shift)."""
    at, exists = _elements(size, BLOCK)
    a = tl.load(a_ptr + at * A_STEP, mask=exists, other=0)
    b = tl.load(b_ptr + at * B_STEP, mask=exists, other=0)
    if OPERATION == "mul":
        y = p.product(a, b, shift)
    elif OPERATION == "div":
        y = p.quotient(a, b, shift)
    elif OPERATION == "slope":
        y = p.slope(a, b, shift)
    elif OPERATION == "exp2_grad":
        y = p.exp2_grad(a, b)
    elif OPERATION == "log2_grad":
        y = p.log2_grad(a, b)
    else:
        tl.static_assert(OPERATION == "sqrt_grad")
        y = p.sqrt_grad(a, b)
    tl.store(out_ptr + at, y, mask=exists)


@triton.jit(do_not_specialize=["shift"])
def ternary_kernel(
    g_ptr, a_ptr, b_ptr, out_ptr, size, shift,
    OPERATION: tl.constexpr, G_STEP: tl.constexpr, A_STEP: tl.constexpr, B_STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`mul_grad` or `div_grad` of the gradient g at a and b."""
    at, exists = _elements(size, BLOCK)
    g = tl.load(g_ptr + at * G_STEP, mask=exists, other=0)
    a = tl.load(a_ptr + at * A_STEP, mask=exists, other=0)
    b = tl.load(b_ptr + at * B_STEP, mask=exists, other=0)
    if OPERATION == "mul_grad":
        y = p.product_grad(g, a, b, shift)
    else:
        tl.static_assert(OPERATION == "div_grad")
        y = p.quotient_grad(g, a, b, shift)
    tl.store(out_ptr + at, y, mask=exists)


KERNELS = {1: unary_kernel, 2: binary_kernel, 3: ternary_kernel}
"""Number of operands -> kernel."""
STEPS = {1: ("X_STEP",), 2: ("A_STEP", "B_STEP"), 3: ("G_STEP", "A_STEP", "B_STEP")}
