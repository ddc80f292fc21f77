# mypy: disallow-untyped-defs=False
"""Forward kernel in Triton: one program a tile of sorted queries, online softmax over the tile's range of keys.

Query i of the sorted order sees the sorted keys [k_begin_i, k_end_i) (see `segments`), both never falling along i, so a
tile of queries needs the keys from its first begin to its last end and no others. Rows are gathered through the orders
as they are loaded: nothing is compacted, padded or copied beforehand.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, live, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `rows` (int64) of one head as (rows, BLOCK_D); 0 where not `live` and behind D.

    UPCAST widens to float32: the interpreter computes on the bit patterns of bfloat16, not on its values.
    """
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None]
    if BLOCK_D != D:
        inside = inside & (d < D)[None, :]
    x = tl.load(base + rows[:, None] * stride_t + d[None, :] * stride_d, mask=inside, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def head_of(n, heads, group):
    """Batch, query head and key head of row n of the plan, as int64 (they are multiplied by strides)."""
    n = n.to(tl.int64)
    return n // heads, n % heads, (n % heads) // group


@triton.jit
def query_tile(q_order, k_begin, k_end, q_len, BLOCK_Q: tl.constexpr):
    """The queries of this program, for a grid of (tiles of queries * B * H,).

    The tiles of one head stand next to each other (its keys stay in the cache), the last one first (under causality it
    has the most keys). Returns the row of the plan, and of the queries their places in the input, whether they exist,
    and the begin and end of what they see.
    """
    tiles = tl.cdiv(q_len, BLOCK_Q)
    tile = tiles - 1 - tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = at < q_len
    rows = tl.load(q_order + n * q_len + at, mask=exists, other=0).to(tl.int64)
    begin = tl.load(k_begin + n * q_len + at, mask=exists, other=0)
    end = tl.load(k_end + n * q_len + at, mask=exists, other=0)
    return n, rows, exists, begin, end


@triton.jit
def key_range(begin, end, k_len, BLOCK_K: tl.constexpr):
    """Keys [start, stop) that some query of a tile sees; up to `middle` they are whole tiles that all of them see."""
    alive = begin < end
    start = tl.min(tl.where(alive, begin, k_len))
    stop = tl.max(tl.where(alive, end, 0))
    # a leading part is common to all only if all begin at the same key
    common = tl.min(tl.where(alive, end, k_len))
    common = tl.where(tl.max(tl.where(alive, begin, 0)) == start, common, start)
    middle = start + tl.maximum(common - start, 0) // BLOCK_K * BLOCK_K
    return start, middle, stop


@triton.jit
def _absorb(
    q, acc, top, total, begin, end, start, stop, k_base, v_base, k_order, k_t, k_d, v_t, v_d, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the keys [start, stop) to the running softmax (top: maximum of the scores times log2 e, total: sum)."""
    for first in range(start, stop, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        live = at < stop
        rows = tl.load(k_order + at, mask=live, other=0).to(tl.int64)
        k = load_rows(k_base, rows, live, k_t, k_d, D, BLOCK_D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # (BLOCK_Q, BLOCK_K)
        if MASKED:
            seen = (at[None, :] >= begin[:, None]) & (at[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen no key yet has -inf on both sides of the difference
        shift = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        v = load_rows(v_base, rows, live, v_t, v_d, DV, BLOCK_DV, UPCAST)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = highest
    return acc, top, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_order, k_order, k_begin, k_end,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    heads, group, q_len, k_len, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (B, H, Tq, Dv), contiguous, and lse (B, H, Tq) in the order of the input. Grid as in `query_tile`."""
    n, rows, exists, begin, end = query_tile(q_order, k_begin, k_end, q_len, BLOCK_Q)
    b, h, kv_h = head_of(n, heads, group)
    alive = begin < end
    q = load_rows(q_ptr + b * q_b + h * q_h, rows, alive, q_t, q_d, D, BLOCK_D, UPCAST)
    start, middle, stop = key_range(begin, end, k_len, BLOCK_K)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    k_base, v_base = k_ptr + b * k_b + kv_h * k_h, v_ptr + b * v_b + kv_h * v_h
    k_order += n * k_len
    acc, top, total = _absorb(
        q, acc, top, total, begin, end, start, middle, k_base, v_base, k_order, k_t, k_d, v_t, v_d, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_K, False, UPCAST,
    )  # fmt: skip
    acc, top, total = _absorb(
        q, acc, top, total, begin, end, middle, stop, k_base, v_base, k_order, k_t, k_d, v_t, v_d, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_K, True, UPCAST,
    )  # fmt: skip

    total = tl.where(alive, total, 1.0)
    acc = tl.where(alive[:, None], acc / total[:, None], 0.0)
    # natural logarithm; +inf makes exp(score - lse) 0 in the backward pass
    lse = tl.where(alive, (top + tl.log2(total)) * 0.6931471805599453, float("inf"))
    place = n * q_len + rows
    d = tl.arange(0, BLOCK_DV)
    inside = exists[:, None] & (d < DV)[None, :]
    tl.store(out_ptr + place[:, None] * DV + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + place, lse, mask=exists)
