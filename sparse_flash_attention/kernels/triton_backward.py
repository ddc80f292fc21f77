# mypy: disallow-untyped-defs=False
"""Backward kernels in Triton: row sums, then dk and dv a tile of keys, then dq a tile of queries.

With p = exp(s - lse), o = p v and the incoming gradient g: dv = p^T g, ds = p (g v^T - delta) with delta = sum(o g) a
row, dk = scale ds^T q, dq = scale ds k. Every element of a result is written by one program, in a fixed order: no
atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from sparse_flash_attention.kernels.triton_forward import head_of, key_range, load_rows, query_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr, o_b, o_h, o_t, o_d, g_b, g_h, g_t, g_d, heads, q_len,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Tq) = sum of out * grad over the last axis, in float32. Grid: (tiles of rows * B * H,)."""
    tiles = tl.cdiv(q_len, BLOCK_Q)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    b, h, _ = head_of(n, heads, 1)
    rows = (tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    exists = rows < q_len
    out = load_rows(out_ptr + b * o_b + h * o_h, rows, exists, o_t, o_d, DV, BLOCK_DV, True)
    grad = load_rows(grad_ptr + b * g_b + h * g_h, rows, exists, g_t, g_d, DV, BLOCK_DV, True)
    tl.store(delta_ptr + n * q_len + rows, tl.sum(out * grad, 1), mask=exists)


@triton.jit
def key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_order, k_order, k_begin, k_end, q_first, q_stop,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d,
    heads, group, q_len, k_len, steps, scale, STEP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk (B, H, Tk, D) and dv (B, H, Tk, Dv) a query head, contiguous. Grid: (tiles of keys * B * H,).

    q_first, q_stop (B * H, steps): sorted queries from q_first[j // STEP] on see keys >= j, those before
    q_stop[j // STEP] see keys < j.
    """
    tiles = tl.cdiv(k_len, BLOCK_K)
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    b, h, kv_h = head_of(n, heads, group)
    at = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = at < k_len
    rows = tl.load(k_order + n * k_len + at, mask=exists, other=0).to(tl.int64)
    k = load_rows(k_ptr + b * k_b + kv_h * k_h, rows, exists, k_t, k_d, D, BLOCK_D, UPCAST)
    v = load_rows(v_ptr + b * v_b + kv_h * v_h, rows, exists, v_t, v_d, DV, BLOCK_DV, UPCAST)
    start = tl.load(q_first + n * steps + tile * (BLOCK_K // STEP))
    stop = tl.load(q_stop + n * steps + tl.minimum((tile + 1) * (BLOCK_K // STEP), steps - 1))
    q_base, g_base = q_ptr + b * q_b + h * q_h, grad_ptr + b * g_b + h * g_h
    q_order, k_begin, k_end = q_order + n * q_len, k_begin + n * q_len, k_end + n * q_len
    lse_ptr, delta_ptr = lse_ptr + n * q_len, delta_ptr + n * q_len
    scale_log2 = scale * LOG2E

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for first in range(start, stop, BLOCK_Q):
        i = first + tl.arange(0, BLOCK_Q)
        inside = i < stop
        q_rows = tl.load(q_order + i, mask=inside, other=0).to(tl.int64)
        begin = tl.load(k_begin + i, mask=inside, other=0)
        end = tl.load(k_end + i, mask=inside, other=0)
        alive = begin < end
        q = load_rows(q_base, q_rows, alive, q_t, q_d, D, BLOCK_D, UPCAST)
        lse = tl.load(lse_ptr + q_rows, mask=alive, other=0.0) * LOG2E
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # (BLOCK_K, BLOCK_Q)
        seen = (at[:, None] >= begin[None, :]) & (at[:, None] < end[None, :])
        weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
        grad = load_rows(g_base, q_rows, alive, g_t, g_d, DV, BLOCK_DV, UPCAST)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + q_rows, mask=alive, other=0.0)
        slope = tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :]
        # selected, not multiplied by 0: a dropped key may hold NaN
        slope = tl.where(seen, weights * slope, 0.0)
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision="ieee")

    place = n * k_len + rows
    d = tl.arange(0, BLOCK_D)
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + place[:, None] * D + d[None, :], dk, mask=exists[:, None] & (d < D)[None, :])
    d = tl.arange(0, BLOCK_DV)
    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + place[:, None] * DV + d[None, :], dv, mask=exists[:, None] & (d < DV)[None, :])


@triton.jit
def _descend(
    q, grad, lse, delta, dq, begin, end, start, stop, k_base, v_base, k_order, k_t, k_d, v_t, v_d, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the share of the keys [start, stop) to dq / scale."""
    for first in range(start, stop, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        live = at < stop
        rows = tl.load(k_order + at, mask=live, other=0).to(tl.int64)
        k = load_rows(k_base, rows, live, k_t, k_d, D, BLOCK_D, UPCAST)
        v = load_rows(v_base, rows, live, v_t, v_d, DV, BLOCK_DV, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # (BLOCK_Q, BLOCK_K)
        weights = tl.exp2(scores - lse[:, None])
        slope = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        if MASKED:
            seen = (at[None, :] >= begin[:, None]) & (at[None, :] < end[:, None])
            slope = tl.where(seen, slope, 0.0)
        dq = tl.dot(slope.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, q_order, k_order, k_begin, k_end,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d,
    heads, group, q_len, k_len, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq (B, H, Tq, D), contiguous. Grid as in `query_tile`."""
    n, rows, exists, begin, end = query_tile(q_order, k_begin, k_end, q_len, BLOCK_Q)
    b, h, kv_h = head_of(n, heads, group)
    alive = begin < end
    q = load_rows(q_ptr + b * q_b + h * q_h, rows, alive, q_t, q_d, D, BLOCK_D, UPCAST)
    grad = load_rows(grad_ptr + b * g_b + h * g_h, rows, alive, g_t, g_d, DV, BLOCK_DV, UPCAST)
    lse = tl.load(lse_ptr + n * q_len + rows, mask=alive, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + n * q_len + rows, mask=alive, other=0.0)
    start, middle, stop = key_range(begin, end, k_len, BLOCK_K)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    k_base, v_base = k_ptr + b * k_b + kv_h * k_h, v_ptr + b * v_b + kv_h * v_h
    k_order += n * k_len
    dq = _descend(
        q, grad, lse, delta, dq, begin, end, start, middle, k_base, v_base, k_order, k_t, k_d, v_t, v_d,
        scale * LOG2E, D, DV, BLOCK_D, BLOCK_DV, BLOCK_K, False, UPCAST,
    )  # fmt: skip
    dq = _descend(
        q, grad, lse, delta, dq, begin, end, middle, stop, k_base, v_base, k_order, k_t, k_d, v_t, v_d,
        scale * LOG2E, D, DV, BLOCK_D, BLOCK_DV, BLOCK_K, True, UPCAST,
    )  # fmt: skip

    # a row that sees nothing stays 0 beside rows whose keys hold NaN
    dq = tl.where(alive[:, None], dq * scale, 0.0).to(dq_ptr.dtype.element_ty)
    d = tl.arange(0, BLOCK_D)
    place = n * q_len + rows
    tl.store(dq_ptr + place[:, None] * D + d[None, :], dq, mask=exists[:, None] & (d < D)[None, :])
