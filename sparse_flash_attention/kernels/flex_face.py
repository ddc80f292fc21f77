"""The same attention through `torch.nn.attention.flex_attention`: the strongest general alternative, one compile away.

Rows are gathered into sorted order and a `BlockMask` is built from the ranges: blocks of 128 x 128 that no query needs
are skipped, those that all their queries see whole are not masked. Costs beside our own kernels: gathered copies of q,
k and v (k and v a query head), tables of (T / 128)^2 entries a head, and a compilation for every new shape (seconds on
a GPU, about 10 s for the first on a CPU). The registered backward has no access to the graph of the forward, so it runs
the forward once more under autograd. On the CPU PyTorch has the forward only, without log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.kernels import native
from sparse_flash_attention.segments import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_HEAD = 16  # on a GPU: what tensor cores multiply
LARGEST_HEAD = 256
BLOCK = 128


def refuses(q: Tensor, v: Tensor) -> str | None:
    """Why flex_attention cannot serve this call, or None."""
    if q.device.type not in ("cpu", "cuda"):
        return f"tensors on {q.device}: must be on cpu or cuda"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: must be one of float32, bfloat16, float16"
    if q.device.type == "cuda":
        for name, x in (("q", q), ("v", v)):
            if not SMALLEST_HEAD <= x.shape[-1] <= LARGEST_HEAD:
                return f"head_dim {x.shape[-1]} of {name}: must be from {SMALLEST_HEAD} to {LARGEST_HEAD} on cuda"
    elif torch.is_grad_enabled() and (q.requires_grad or v.requires_grad):
        return "gradients on the CPU: flex_attention has no backward there; use torch.no_grad() or another backend"
    elif not _compiler():
        return "needs a C++ compiler on the CPU"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, Tq, Dv) and natural log-sum-exp (B, H, Tq), float32; arguments as in `operator.planned_attention`.

    On the CPU the log-sum-exp of rows that see something is NaN: flex_attention does not give it there.
    """
    with torch.no_grad():
        return _whole(q.detach(), k.detach(), v.detach(), plan, scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes and dtypes; computes the forward again.

    Raises:
        NotImplementedError: on the CPU.
    """
    if q.device.type == "cpu" and attend is _compiled:
        raise NotImplementedError("backend='flex': flex_attention has no backward on the CPU; use another backend")
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again, _ = _whole(q, k, v, plan, scale)
    dq, dk, dv = torch.autograd.grad(again, (q, k, v), grad)
    return dq, dk, dv


def block_mask(plan: Plan, shape: tuple[int, int, int, int]) -> Any:
    """The plan's ranges as a `BlockMask` over sorted rows; `shape` is (B, H, Tq, Tk)."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, heads, q_len, k_len = shape
    k_begin, k_end = plan.k_begin.view(batch, heads, q_len), plan.k_end.view(batch, heads, q_len)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= k_begin[b, h, i]) & (j < k_end[b, h, i])

    # ranges of tiles of queries, (B, H, tiles); a row that sees nothing widens none and leaves no block whole
    alive = k_begin < k_end
    begin, end = k_begin.where(alive, k_len), k_end.where(alive, 0)
    start, last_begin = _tiles(begin, k_len).amin(-1), _tiles(begin, 0).amax(-1)
    stop, first_end = _tiles(end, 0).amax(-1), _tiles(end, k_len).amin(-1)
    low = torch.arange(-(-k_len // BLOCK), device=k_begin.device) * BLOCK
    start, stop, last_begin, first_end = (x.unsqueeze(-1) for x in (start, stop, last_begin, first_end))
    needed = (low < stop) & (low + BLOCK > start)  # (B, H, tiles of queries, tiles of keys)
    # flex treats rows and columns past the end of the last block by itself
    whole = needed & (last_begin <= low) & ((low + BLOCK).clamp(max=k_len) <= first_end)
    return BlockMask.from_kv_blocks(
        *_listed(needed & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(q_len, k_len),
        # the transposed lists serve the backward only
        compute_q_blocks=k_begin.device.type != "cpu",
    )


def _whole(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Gather, attend, scatter; differentiable in q, k and v if `attend` is."""
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    group = heads // k.shape[1]
    q_order = plan.q_order.view(batch, heads, q_len).long()
    k_order = plan.k_order.view(batch, heads, k_len).long()
    alive = (plan.k_begin < plan.k_end).view(batch, heads, q_len)
    # what a dropped row holds must not reach a product, not even with weight 0
    kept = torch.arange(k_len, device=q.device) < plan.k_end.view(batch, heads, q_len).amax(-1, keepdim=True)

    def gather(x: Tensor, order: Tensor, used: Tensor) -> Tensor:
        rows = x.repeat_interleave(heads // x.shape[1], dim=1) if group > 1 else x
        rows = rows.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
        return rows.where(used.unsqueeze(-1), 0)

    rows = gather(q, q_order, alive), gather(k, k_order, kept), gather(v, k_order, kept)
    out, lse = attend(*rows, block_mask(plan, (batch, heads, q_len, k_len)), scale)
    out = out.where(alive.unsqueeze(-1), 0)
    # place[t] = where in the sorted order row t is
    place = torch.empty_like(q_order).scatter_(2, q_order, torch.arange(q_len, device=q.device).expand_as(q_order))
    if lse is None:
        lse = torch.full(alive.shape, torch.nan, device=q.device)
    lse = lse.detach().where(alive, torch.inf).gather(2, place)
    return out.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, v.shape[3])), lse


def _compiled(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
    """flex_attention on sorted rows: output, and log-sum-exp where the device gives it."""
    # a shape past dynamo's limit of recompilations would run unfused, with the whole T x T in memory
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        if q.device.type == "cpu":
            return _flex()(q, k, v, block_mask=mask, scale=scale), None
        from torch.nn.attention.flex_attention import AuxRequest

        out, extra = _flex()(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, extra.lse


attend: Callable[..., tuple[Tensor, Tensor | None]] = _compiled


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # symbolic lengths do not compile on every CPU shape
    return torch.compile(flex_attention, dynamic=False)


@torch.compiler.assume_constant_result
def _compiler() -> bool:
    return native.compiler("c++") is not None


def _tiles(x: Tensor, fill: int) -> Tensor:
    """Rows cut into tiles of queries: (B, H, Tq) -> (B, H, tiles, BLOCK), the last one filled up."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK), value=fill).unflatten(-1, (-1, BLOCK))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks a tile of queries has, and which, those first: int32, as BlockMask wants them."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
