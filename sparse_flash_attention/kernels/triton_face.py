"""Launches the Triton kernels: CUDA tensors, or CPU tensors where `TRITON_INTERPRET=1` was set at the start.

On a device each kernel picks its tiles from `tiles.candidates` by timing them on its first call with a head size, dtype
and length class (`triton.autotune`); after that a call gives the same bits every time. Grouped queries get dk and dv a
query head in float32 first, H / Hk times the size of the keys, since every query head has an order of its own.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from common.kernels.interpreter import SWITCH, interpreting
from sparse_flash_attention.kernels.tiles import INTERPRETED, Tile, candidates, padded
from sparse_flash_attention.segments import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
STEP = 16
"""Keys between two entries of the table of query ranges; divides every tile of keys."""
LOG2E = 1.4426950408889634


def refuses(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if not _installed():
        return "needs the package triton"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreting()):
        return f"tensors on {q.device}: must be on cuda (or on the CPU with {SWITCH}=1, for tests)"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: must be one of float32, bfloat16, float16"
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > LARGEST_HEAD:
            return f"head_dim {x.shape[-1]} of {name}: must be <= {LARGEST_HEAD}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, Tq, Dv) and natural log-sum-exp (B, H, Tq) in float32; as `operator.planned_attention` says."""
    from sparse_flash_attention.kernels.triton_forward import forward_kernel

    batch, heads, q_len, _ = q.shape
    out = torch.empty(batch, heads, q_len, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    arguments = (
        *(q, k, v, out, lse, *_contiguous(plan)),
        *(*q.stride(), *k.stride(), *v.stride()),
        *(heads, heads // k.shape[1], q_len, k.shape[2], scale * LOG2E),
    )
    _launch("forward", forward_kernel, arguments, _sizes(q, v), q_len, batch * heads)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes and dtypes, from the gradient of the output and what `forward` gave."""
    from sparse_flash_attention.kernels import triton_backward as kernels

    batch, heads, q_len, _ = q.shape
    k_heads, k_len = k.shape[1:3]
    group = heads // k_heads
    plan = _contiguous(plan)
    lse = lse.contiguous()
    sizes = _sizes(q, v)
    # (B, H, Tq): sum of out * grad a row
    delta = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    own = {"DV": v.shape[3], "BLOCK_DV": padded(v.shape[3])}
    arguments = (out, grad, delta, *out.stride(), *grad.stride(), heads, q_len)
    _launch("delta", kernels.delta_kernel, arguments, own, q_len, batch * heads)

    # a query head's share of its key head's gradients, summed over the group below
    held = q.dtype if group == 1 else torch.float32
    dk = torch.empty(batch, heads, k_len, k.shape[3], dtype=held, device=q.device)
    dv = torch.empty(batch, heads, k_len, v.shape[3], dtype=held, device=q.device)
    first, stop = query_ranges(plan, k_len)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    arguments = (
        *(q, k, v, grad, lse, delta, dk, dv, *plan, first, stop, *strides),
        *(heads, group, q_len, k_len, first.shape[1], scale),
    )
    _launch("key", kernels.key_kernel, arguments, {"STEP": STEP} | sizes, k_len, batch * heads)

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments = (q, k, v, grad, lse, delta, dq, *plan, *strides, heads, group, q_len, k_len, scale)
    _launch("query", kernels.query_kernel, arguments, sizes, q_len, batch * heads)
    if group > 1:
        dk, dv = (x.unflatten(1, (k_heads, group)).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv


def query_ranges(plan: Plan, k_len: int) -> tuple[Tensor, Tensor]:
    """Which sorted queries see the sorted keys [j0, j1): those from first[:, j0 / STEP] to before stop[:, j1 / STEP].

    Both (N, ceil(Tk / STEP) + 1), int32. Exact because k_begin and k_end never fall: the queries with k_end > j0 are a
    suffix, those with k_begin < j1 a prefix.
    """
    n, q_len = plan.k_begin.shape
    j = torch.arange(-(-k_len // STEP) + 1, dtype=torch.int32, device=plan.k_begin.device) * STEP
    j = j.expand(n, -1).contiguous()
    first = torch.searchsorted(plan.k_end, j, right=True, out_int32=True)
    stop = torch.searchsorted(plan.k_begin, j, out_int32=True)
    # dropped queries at the end begin before the last j too, but see nothing
    place = torch.arange(1, q_len + 1, dtype=torch.int32, device=j.device)
    last = torch.where(plan.k_begin < plan.k_end, place, 0).amax(1, keepdim=True)
    return first, torch.minimum(stop, last)


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _contiguous(plan: Plan) -> Plan:
    return Plan(*(x.contiguous() for x in plan))


def _sizes(q: Tensor, v: Tensor) -> dict[str, int | bool]:
    """Compile-time sizes that all kernels but the row sums share."""
    d, d_v = q.shape[3], v.shape[3]
    upcast = q.device.type == "cpu"  # interpreted
    return {"D": d, "DV": d_v, "BLOCK_D": padded(d), "BLOCK_DV": padded(d_v), "UPCAST": upcast}


def _launch(
    name: str, kernel: Any, arguments: tuple[Any, ...], sizes: dict[str, int | bool], length: int, heads: int
) -> None:
    """Run a kernel over (tiles of `length` rows) x `heads` programs."""

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (-(-length // chosen["BLOCK_K" if name == "key" else "BLOCK_Q"]) * heads,)

    if arguments[0].device.type == "cpu":
        kernel[grid](*arguments, **sizes, **INTERPRETED[name].meta(name))
        return
    head = max(sizes.get("BLOCK_D", 0), sizes["BLOCK_DV"])
    with torch.cuda.device(arguments[0].device):
        major, minor = torch.cuda.get_device_capability()
        tuned = _tuned(name, kernel, head, arguments[0].dtype.itemsize, 10 * major + minor, length.bit_length())
        tuned[grid](*arguments, **sizes)


@functools.cache
def _tuned(name: str, kernel: Any, head: int, itemsize: int, capability: int, length_class: int) -> Any:
    """The kernel with its candidates; one autotuner a head size, device and length class (Triton adds the dtypes)."""
    import triton

    def config(tile: Tile) -> Any:
        return triton.Config(tile.meta(name), num_warps=tile.warps, num_stages=tile.stages)

    tiles = candidates(name, head, itemsize, capability)
    return triton.autotune(configs=[config(tile) for tile in tiles], key=["DV"])(kernel)
