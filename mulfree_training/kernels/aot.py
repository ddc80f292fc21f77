"""The kernels to compile ahead of time: every operation and every tile that the autotuner may choose.

All are held to the budget: no spills on any target. Matrices are contiguous ("nn"); the preferred tiles also with the
layouts of the backward pass, b transposed ("nt") and a transposed ("tn").
"""

from __future__ import annotations

from typing import Any

from common.kernels.aot import Budget, Kernel
from mulfree_training.kernels import triton_elementwise as elementwise
from mulfree_training.kernels import triton_matmul as matrices
from mulfree_training.kernels.triton_matmul import CANDIDATES, MODES, Tile

BUDGET = Budget()
FUNCTIONS = {"matmul": matrices.matmul_kernel, "matmul_grad": matrices.matmul_grad_kernel}
# layout -> the strides that are 1; the gradient has the result's rows and the inner index
UNIT: dict[str, dict[str, tuple[str, ...]]] = {
    "matmul": {"nn": ("a_k", "b_p"), "nt": ("a_k", "b_k"), "tn": ("a_m", "b_p")},
    "matmul_grad": {"nn": ("g_p", "a_k", "b_p"), "nt": ("g_p", "a_k", "b_k"), "tn": ("g_m", "a_m", "b_p")},
}
COUNTS = ("size", "shift")


def of_operation(operation: str, scalar: tuple[str, ...] = ()) -> Kernel:
    """An elementwise operation; the operands whose STEP is in `scalar` are a single number."""
    arity = elementwise.OPERATIONS[operation]
    function = elementwise.KERNELS[arity]
    constants: dict[str, Any] = {step: int(step not in scalar) for step in elementwise.STEPS[arity]}
    constants |= {"OPERATION": operation, "BLOCK": elementwise.BLOCK}
    size = " ".join([f"BLOCK={elementwise.BLOCK}", *(f"{step}=0" for step in scalar)])
    return _specialised(operation, size, function, constants, elementwise.WARPS)


def of_matrices(name: str, mode: int, tile: Tile, layout: str = "nn") -> Kernel:
    """A matrix kernel in one mode, with one tile."""
    constants = {"MODE": mode, **tile.meta()} | dict.fromkeys(UNIT[name][layout], 1)
    size = f"{MODES[mode]} {tile.rows}x{tile.columns} unroll {tile.unroll} {layout}"
    return _specialised(name, size, FUNCTIONS[name], constants, tile.warps)


def _specialised(name: str, size: str, function: Any, constants: dict[str, Any], warps: int) -> Kernel:
    """As a launch would specialise it: pointers and strides divisible by 16."""
    names = [x for x in function.arg_names if x not in constants]
    signature = {}
    for argument in names:
        floats = argument == "out_ptr" and name in FUNCTIONS
        signature[argument] = "*fp32" if floats else "*i32" if argument.endswith("_ptr") else "i32"
    aligned = frozenset(x for x in names if x not in COUNTS)
    return Kernel(name, size, function, signature, constants, aligned, warps, 1, budget=BUDGET)


KERNELS = [
    *(of_operation(operation) for operation in elementwise.OPERATIONS),
    *(
        of_operation(operation, (step,))
        for operation, step in (("mul", "B_STEP"), ("div", "B_STEP"), ("div", "A_STEP"))
    ),
    *(
        of_matrices(name, mode, tile, layout)
        for name in CANDIDATES
        for mode in MODES
        for tile in CANDIDATES[name][mode]
        for layout in UNIT[name]
    ),
]
