"""Launches the Triton kernels: CUDA tensors, or CPU tensors where `TRITON_INTERPRET=1` was set at the start.

The functions are those of `reference`, for float32 and bit for bit. On a device a matrix kernel picks its tile from
`triton_matmul.CANDIDATES` by timing them on its first call with a mode, device and size class (`triton.autotune`); the
bits do not depend on the tile. The mode follows from the ranges of the operands, which costs one read of each and one
transfer of a few numbers from the device (so a matrix product cannot be captured into a CUDA graph).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.kernels.interpreter import SWITCH, interpreting
from mulfree_training.bits import FLOAT32

BIAS, MIN, INF, ABS = FLOAT32.one, FLOAT32.smallest, FLOAT32.infinity, FLOAT32.magnitude
LARGEST_GRID = 65535
"""Programs along the second and the third axis of a grid."""


def refuses(x: Tensor) -> str | None:
    """Why the kernels cannot serve tensors like x, or None."""
    if not _installed():
        return "needs the package triton"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreting()):
        return f"tensors on {x.device}: must be on cuda (or on the CPU with {SWITCH}=1, for tests)"
    if x.dtype is not torch.float32:
        return f"dtype {x.dtype}: must be float32"
    return None


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def mul(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """`reference.mul` of float32 tensors of one shape, any strides (the same for the functions below)."""
    return _elementwise("mul", (a, b), shift)


def div(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """`reference.div`."""
    return _elementwise("div", (a, b), shift)


def slope(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """`reference.slope`."""
    return _elementwise("slope", (a, b), shift)


def mul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """`reference.mul_grad`."""
    return _elementwise("mul_grad", (grad, a, b), shift)


def div_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """`reference.div_grad`."""
    return _elementwise("div_grad", (grad, a, b), shift)


def exp2(x: Tensor) -> Tensor:
    """`reference.exp2`."""
    return _elementwise("exp2", (x,))


def exp2_grad(grad: Tensor, x: Tensor) -> Tensor:
    """`reference.exp2_grad`."""
    return _elementwise("exp2_grad", (grad, x))


def log2(x: Tensor) -> Tensor:
    """`reference.log2`."""
    return _elementwise("log2", (x,))


def log2_grad(grad: Tensor, x: Tensor) -> Tensor:
    """`reference.log2_grad`."""
    return _elementwise("log2_grad", (grad, x))


def sqrt(x: Tensor) -> Tensor:
    """`reference.sqrt`."""
    return _elementwise("sqrt", (x,))


def sqrt_grad(grad: Tensor, x: Tensor) -> Tensor:
    """`reference.sqrt_grad`."""
    return _elementwise("sqrt_grad", (grad, x))


def _elementwise(operation: str, operands: tuple[Tensor, ...], shift: int = 0) -> Tensor:
    """Run one operation; the result is contiguous.

    Raises:
        ValueError: the shapes differ.
        TypeError: an operand is not float32.
    """
    from mulfree_training.kernels import triton_elementwise as kernels

    _check_dtypes(*operands)
    first = operands[0]
    for x in operands[1:]:
        if x.shape != first.shape:
            raise ValueError(f"shape={tuple(x.shape)}: must be {tuple(first.shape)} as of the first operand")
    out = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    size = out.numel()
    if not size:
        return out
    arrays, steps = zip(*(_flat(x) for x in operands), strict=True)
    arity = len(operands)
    arguments = (*arrays, out.view(torch.int32), size, *(() if arity == 1 else (shift,)))
    constants = dict(zip(kernels.STEPS[arity], steps, strict=True))
    block = kernels.INTERPRETED if first.device.type == "cpu" else kernels.BLOCK
    grid = (-(-size // block),)
    with _device_of(first):
        kernels.KERNELS[arity][grid](*arguments, OPERATION=operation, **constants, BLOCK=block, num_warps=kernels.WARPS)
    return out


def _flat(x: Tensor) -> tuple[Tensor, int]:
    """Patterns one after the other and the step between them: 0 for a single number expanded to the whole shape."""
    if x.numel() > 1 and all(stride == 0 for length, stride in zip(x.shape, x.stride(), strict=True) if length > 1):
        return x.view(torch.int32), 0
    return x.contiguous().view(torch.int32), 1


def matmul(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """Batched product (N, M, K) x (N, K, P) -> (N, M, P), bit for bit `reference.matmul`.

    Args:
        a: float32, any strides.
        b: as a.
        shift: see `bits.offset`.

    Raises:
        ValueError: shapes that do not fit, or too many columns for a grid.
        TypeError: another dtype.
    """
    from mulfree_training.kernels import triton_matmul as kernels

    _check_dtypes(a, b)
    n, m, k = a.shape
    if b.shape[0] != n or b.shape[1] != k:
        raise ValueError(f"b.shape={tuple(b.shape)}: must be ({n}, {k}, P) for a of shape {tuple(a.shape)}")
    if not a.numel() or not b.numel():
        return a.new_zeros(n, m, b.shape[2])
    out = torch.empty(n, m, b.shape[2], dtype=torch.float32, device=a.device)
    left, right = a.view(torch.int32), b.view(torch.int32)
    mode = product_mode(a, b, shift)
    if mode == kernels.PLAIN:
        # once an element of the smaller operand instead of once a step
        left, right = (left - (BIAS - shift), right) if a.numel() < b.numel() else (left, right - (BIAS - shift))
    _launch("matmul", mode, (left, right), out, k, shift)
    return out


def matmul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """The exact derivative of `matmul` with respect to a, (N, M, K), bit for bit `reference.matmul_grad`.

    Args:
        grad: (N, M, P) float32, any strides.
        a: (N, M, K).
        b: (N, K, P).
        shift: see `bits.offset`.

    Raises:
        ValueError: shapes that do not fit, or too many columns for a grid.
        TypeError: another dtype.
    """
    from mulfree_training.kernels import triton_matmul as kernels

    _check_dtypes(grad, a, b)
    n, m, k = a.shape
    p = b.shape[2]
    if b.shape[0] != n or b.shape[1] != k:
        raise ValueError(f"b.shape={tuple(b.shape)}: must be ({n}, {k}, P) for a of shape {tuple(a.shape)}")
    if grad.shape != (n, m, p):
        raise ValueError(f"grad.shape={tuple(grad.shape)}: must be ({n}, {m}, {p})")
    if not a.numel() or not b.numel():
        return a.new_zeros(n, m, k)
    out = torch.empty(n, m, k, dtype=torch.float32, device=a.device)
    given, own, other = (x.view(torch.int32) for x in (grad, a, b))
    mode = slope_mode(grad, a, b, shift)
    if mode == kernels.PLAIN:
        given, other = given - BIAS, other + shift if shift else other
    _launch("matmul_grad", mode, (given, own, other), out, p, shift)
    return out


class _Range(NamedTuple):
    """Magnitudes of a tensor: the smallest normal one, the largest, and is any below the normal ones."""

    low: int
    high: int
    zero: bool


def _ranges(*tensors: Tensor) -> list[_Range]:
    """Of tensors that are not empty; one transfer from the device for all."""
    found = []
    for x in tensors:
        size = x.view(torch.int32) & ABS
        found += [torch.where(size < MIN, ABS, size).amin(), size.amax(), size.amin()]
    numbers = torch.stack(found).tolist()
    return [_Range(low, high, least < MIN) for low, high, least in zip(*[iter(numbers)] * 3, strict=True)]


def product_mode(a: Tensor, b: Tensor, shift: int) -> int:
    """Mode of `triton_matmul` for the products of any element of a with any of b; neither may be empty."""
    from mulfree_training.kernels.triton_matmul import GUARDED, MASKED, PLAIN

    left, right = _ranges(a, b)
    bias = BIAS - shift
    if max(left.high, right.high, left.high + right.high - bias) >= INF:
        return GUARDED
    return MASKED if left.zero or right.zero or left.low + right.low - bias < MIN else PLAIN


def slope_mode(grad: Tensor, a: Tensor, b: Tensor, shift: int) -> int:
    """As `product_mode`, for any of grad with the slope of any of a and b."""
    from mulfree_training.kernels.triton_matmul import GUARDED, MASKED, PLAIN

    given, own, other = _ranges(grad, a, b)
    # the carry from a adds at most one to the exponent of b; a shift below 1 takes at most one away
    most, least = other.high + MIN + max(shift, 0), other.low - (MIN if shift < 0 else 0)
    if own.high > INF or max(given.high, most, given.high - BIAS + most) >= INF:
        return GUARDED
    # of a only the mantissa counts, which is 0 for zeros and infinities
    if given.zero or other.zero or least < 2 * MIN:
        return MASKED
    # the slope has no mantissa, so it may lie up to one exponent below `least`
    return MASKED if given.low - BIAS + least - MIN < MIN else PLAIN


def _launch(name: str, mode: int, inputs: tuple[Tensor, ...], out: Tensor, inner: int, shift: int) -> None:
    """Run a matrix kernel over the tiles of `out` (N, rows, columns), at most `LARGEST_GRID` batches at a time."""
    from mulfree_training.kernels import triton_matmul as kernels

    kernel = kernels.matmul_kernel if name == "matmul" else kernels.matmul_grad_kernel
    batches, rows, columns = out.shape
    least = min(tile.columns for tile in kernels.CANDIDATES[name][mode])
    if columns > LARGEST_GRID * least:
        raise ValueError(f"columns={columns}: must be <= {LARGEST_GRID * least}")
    strides = [stride for x in inputs for stride in x.stride()]
    for start in range(0, batches, LARGEST_GRID):
        part = slice(start, start + LARGEST_GRID)
        own = out[part]

        def grid(chosen: dict[str, Any], count: int = len(own)) -> tuple[int, int, int]:
            return -(-rows // chosen["BLOCK_M"]), -(-columns // chosen["BLOCK_N"]), count

        arguments = (*(x[part] for x in inputs), own, *strides, rows, inner, columns, shift)
        if out.device.type == "cpu":
            kernel[grid](*arguments, MODE=mode, **kernels.INTERPRETED.meta())
            continue
        with _device_of(out):
            major, minor = torch.cuda.get_device_capability()
            lengths = rows.bit_length(), columns.bit_length(), (batches * inner).bit_length()
            _tuned(name, mode, 10 * major + minor, lengths)[grid](*arguments, MODE=mode)


@functools.cache
def _tuned(name: str, mode: int, capability: int, lengths: tuple[int, ...]) -> Any:
    """The kernel with its candidates; one autotuner a mode, device and size class."""
    import triton

    from mulfree_training.kernels import triton_matmul as kernels

    kernel = kernels.matmul_kernel if name == "matmul" else kernels.matmul_grad_kernel
    tiles = kernels.CANDIDATES[name][mode]
    configs = [triton.Config(tile.meta(), num_warps=tile.warps, num_stages=1) for tile in tiles]
    return triton.autotune(configs=configs, key=["MODE"])(kernel)


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _check_dtypes(*tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype is not torch.float32:
            raise TypeError(f"dtype={x.dtype}: must be float32")
