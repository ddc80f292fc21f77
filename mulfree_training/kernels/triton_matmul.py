# mypy: disallow-untyped-defs=False
"""Matrix kernels in Triton: a program a tile of the result, the inner index in order, one outer sum of patterns a step.

A step loads a column and a row, adds their patterns by broadcasting and adds the result, read as floats, to the tile.
Sums are those of the reference bit for bit, so there is no blocking of the inner index, no `tl.dot` and no tree. The
loops hold no multiplication of any type: pointers advance by their strides. Nor is there an integer division anywhere,
which a GPU does with a float reciprocal.

What a step needs beside the sums depends on the operands. In mode PLAIN all numbers are normal and so are all products:
one integer addition (three integer operations for a derivative) and one float addition. MASKED allows zeros and
products below the smallest normal number, which are masked out: a sum that starts at +0 does not see a zero of either
sign. GUARDED allows everything. Which one holds, the launcher decides (`triton_face`).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from mulfree_training.kernels.triton_primitives import ABS, BIAS, MANT, MIN, POWER, magnitude, product, slope

PLAIN, MASKED, GUARDED = 0, 1, 2
MODES = {PLAIN: "plain", MASKED: "masked", GUARDED: "guarded"}
_PLAIN, _MASKED = tl.constexpr(PLAIN), tl.constexpr(MASKED)


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result that a program holds, its warps, and steps of the loop written out."""

    rows: int
    columns: int
    warps: int
    unroll: int = 1

    def meta(self) -> dict[str, int]:
        """The tile as compile-time arguments of a kernel."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "UNROLL": self.unroll}


INTERPRETED = Tile(16, 16, 4)
"""Small, so that short inputs still have several."""
CANDIDATES = {
    "matmul": {
        PLAIN: (Tile(64, 64, 4), Tile(64, 64, 4, 2), Tile(128, 64, 8), Tile(64, 32, 4, 4), Tile(32, 32, 4, 4)),
        MASKED: (Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 32, 4), Tile(32, 32, 4, 2)),
        GUARDED: (Tile(64, 64, 8), Tile(64, 32, 8), Tile(32, 32, 4)),
    },
    "matmul_grad": {
        PLAIN: (Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 32, 4, 2), Tile(32, 32, 4, 4)),
        MASKED: (Tile(64, 64, 8), Tile(64, 32, 8), Tile(32, 32, 4, 2)),
        GUARDED: (Tile(64, 32, 8), Tile(32, 32, 8)),
    },
}
"""Kernel -> mode -> what the autotuner may choose on a device. None spills (`kernels/aot.py`)."""


@triton.jit
def _limit(i, bias):
    """Largest magnitude of the other factor whose product with i is zero; above all magnitudes for a zero."""
    size = i & ABS
    return tl.where(size < MIN, ABS, tl.maximum(-size + (bias + MIN), MIN) - 1)


@triton.jit(do_not_specialize=["shift"])
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, a_n, a_m, a_k, b_n, b_k, b_p, rows, inner, columns, shift,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Patterns (N, M, K) x (N, K, P) -> floats (N, M, P), contiguous. Grid: (ceil(M / BLOCK_M), ceil(P / BLOCK_N), N).

    In mode PLAIN one of the operands is given with the bias (less the shift) already subtracted from its patterns.
    """
    n = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists, p_exists = m < rows, p < columns
    a_at = a_ptr + n * a_n + m * a_m
    b_at = b_ptr + n * b_n + p * b_p
    bias = -shift + BIAS
    exists = m_exists[:, None] & p_exists[None, :]
    out_at = out_ptr + (n * rows + m[:, None]) * columns + p[None, :]
    # zeros: nothing is read, but a load gives the tile the layout of the store, four columns a thread
    total = tl.load(out_at, mask=exists & (inner < 0), other=0.0)
    for _ in tl.range(0, inner, loop_unroll_factor=UNROLL):
        left = tl.load(a_at, mask=m_exists, other=0)[:, None]
        right = tl.load(b_at, mask=p_exists, other=0)[None, :]
        if MODE == _PLAIN:
            bits = left + right
        elif MODE == _MASKED:
            bits = tl.where((left & ABS) > _limit(right, bias), left + (right - bias), 0)
        else:
            bits = product(left, right, shift)
        total += bits.to(tl.float32, bitcast=True)
        a_at += a_k
        b_at += b_k
    tl.store(out_at, total, mask=exists)


@triton.jit(do_not_specialize=["shift"])
def matmul_grad_kernel(
    g_ptr, a_ptr, b_ptr, out_ptr, g_n, g_m, g_p, a_n, a_m, a_k, b_n, b_k, b_p, rows, inner, columns, shift,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Patterns g (N, M, P), a (N, M, K), b (N, K, P) -> floats (N, M, K), contiguous; `inner` is P and `columns` K.

    In mode PLAIN g is given less the bias and b with the shift added. Grid: (ceil(M / BLOCK_M), ceil(K / BLOCK_N), N).
    """
    n = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists, k_exists = m < rows, k < columns
    exists = m_exists[:, None] & k_exists[None, :]
    g_at = g_ptr + n * g_n + m * g_m
    b_at = b_ptr + n * b_n + k * b_k
    a = tl.load(a_ptr + n * a_n + m[:, None] * a_m + k[None, :] * a_k, mask=exists, other=0)
    mantissa = magnitude(a) & MANT
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(0, inner, loop_unroll_factor=UNROLL):
        grad = tl.load(g_at, mask=m_exists, other=0)[:, None]
        right = tl.load(b_at, mask=k_exists, other=0)[None, :]
        if MODE == _PLAIN:
            bits = ((mantissa + right) & POWER) + grad
        elif MODE == _MASKED:
            # a zero has no shift, so that its slope stays below every limit
            own = tl.where((right & ABS) < MIN, 0, right + shift)
            power = (mantissa + own) & POWER
            bits = tl.where((power & ABS) > _limit(grad, BIAS), power + (grad - BIAS), 0)
        else:
            bits = product(grad, slope(a, right, shift), 0)
        total += bits.to(tl.float32, bitcast=True)
        g_at += g_p
        b_at += b_p
    place = (n * rows + m[:, None]) * columns + k[None, :]
    tl.store(out_ptr + place, total, mask=exists)
