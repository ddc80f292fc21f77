"""Speed of sparse attention: `python -m sparse_flash_attention.bench [device=cpu] [seconds=8] [results=results]`.

Attention forward and backward, sorting and gathering included, beside PyTorch's own attention, our plain PyTorch face
and (where it can) flex_attention with a block mask on sorted rows; and whole training steps of a small GPT. Floors:
14 D operations a live pair (4 D forward, 10 D backward) at the faster of two measured matrix products, torch's and the
kernel's own. Writes `results/sparse_flash_attention/bench-<device>.json`. About 8 minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import bench
from common.kernels.device import usable_cores
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.gpt import SparseGPT
from sparse_flash_attention.hashing import random_buckets, random_keep
from sparse_flash_attention.kernels import cpp_face
from sparse_flash_attention.segments import plan

DIM = 64
JUDGED = 8192
KEEPS = (1.0, 0.7, 0.5, 0.3, 0.1)
BUCKETS = (2, 8, 16, 32)
LENGTHS = (1024, 2048, 4096, 16384)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One sparsity at one length."""

    name: str
    length: int
    keeps: tuple[Tensor, Tensor] | None = None
    hashes: Tensor | None = None

    def attention(self, backend: str | None) -> Attention:
        """The sparse attention on one backend."""
        if self.hashes is not None:
            return partial(hash_sparse_attention, q_hash=self.hashes, backend=backend)
        assert self.keeps is not None
        return partial(qk_sparse_attention, q_keep=self.keeps[0], k_keep=self.keeps[1], backend=backend)

    def pairs(self, shape: tuple[int, int]) -> float:
        """Live pairs, all heads."""
        q_keep, k_keep = self.keeps or (None, None)
        given = self.hashes if q_keep is None else q_keep
        assert given is not None
        sparsity = (q_keep, k_keep, self.hashes, self.hashes)
        ranges = plan((*shape, self.length, self.length), *sparsity, device=given.device)
        return float((ranges.k_end - ranges.k_begin).sum(dtype=torch.int64))


@dataclass(frozen=True)
class Setup:
    """Where and on what the bench runs."""

    device: str
    seconds: float
    batch: int
    heads: int
    dtype: torch.dtype

    def inputs(self, length: int, dtype: torch.dtype | None = None, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, T, D)."""
        rng = torch.Generator().manual_seed(length)
        made = (torch.randn(self.batch, self.heads, length, DIM, generator=rng) for _ in range(3))
        q, k, v = (x.to(self.device, dtype or self.dtype).requires_grad_(grad) for x in made)
        return q, k, v

    def dropped(self, length: int, keep: float) -> Case:
        """Queries and keys kept with a probability."""
        rng = torch.Generator().manual_seed(round(1000 * keep))
        shape = (self.batch, self.heads, length)
        q_keep, k_keep = (random_keep(shape, keep, rng).to(self.device) for _ in range(2))
        return Case(f"keep {keep:g}", length, keeps=(q_keep, k_keep))

    def hashed(self, length: int, buckets: int) -> Case:
        """Uniform random buckets."""
        rng = torch.Generator().manual_seed(buckets)
        hashes = random_buckets((self.batch, self.heads, length), buckets, rng).to(self.device)
        return Case(f"{buckets} buckets", length, hashes=hashes)

    def skewed(self, length: int) -> Case:
        """Nine rows of ten in one of 16 buckets."""
        rng = torch.Generator().manual_seed(16)
        hashes = random_buckets((self.batch, self.heads, length), 16, rng)
        crowded = torch.rand(hashes.shape, generator=rng) < 0.9
        return Case(
            "90 % of the rows in 1 of 16 buckets", length, hashes=hashes.masked_fill(crowded, 0).to(self.device)
        )


def both_passes(attention: Attention, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Forward, and backward to q, k and v."""
    grad = torch.ones_like(inputs[2])
    return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)


def right(case: Case, backend: str | None, inputs: tuple[Tensor, ...], grad: bool) -> Callable[[], None]:
    """A check of the first rows beside masked dense attention in float64, forward (and backward, on a short input)."""

    def check() -> None:
        length = min(case.length, 512)
        part = [x[:, :, :length].detach() for x in inputs]
        cut = Case(
            case.name,
            length,
            None if case.keeps is None else (case.keeps[0][..., :length], case.keeps[1][..., :length]),
            None if case.hashes is None else case.hashes[..., :length],
        )
        with torch.no_grad():  # causal: the first rows see nothing else
            whole = case.attention(backend)(*(x.detach() for x in inputs))[:, :, :length]
        exact = cut.attention("reference")(*(x.double() for x in part))
        _close(whole, exact)
        if grad:
            weight = torch.cos(torch.arange(length, device=part[0].device, dtype=torch.float64))[:, None]
            leaves = [x.clone().requires_grad_() for x in part]
            found = torch.autograd.grad((cut.attention(backend)(*leaves).double() * weight).sum(), leaves)
            leaves = [x.double().requires_grad_() for x in part]
            wanted = torch.autograd.grad((cut.attention("reference")(*leaves) * weight).sum(), leaves)
            for a, b in zip(found, wanted, strict=True):
                _close(a, b)

    return check


def _close(found: Tensor, exact: Tensor) -> None:
    bound = TOLERANCE[found.dtype] * max(1.0, float(exact.abs().max()))
    error = float((found.double() - exact).abs().max())
    assert error < bound, f"error {error:.2g}, allowed {bound:.2g}"


def attention_rows(setup: Setup, case: Case, threads: int, dtype: torch.dtype | None = None) -> list[bench.Row]:
    """One sparsity, forward and backward, beside PyTorch's attention and the other faces."""
    inputs = setup.inputs(case.length, dtype)
    ours = "Triton" if setup.device != "cpu" else "C++"
    baselines = {"SDPA": both_passes(partial(F.scaled_dot_product_attention, is_causal=True), inputs)}
    if dtype not in (None, torch.float32) and setup.device == "cpu":
        wide = setup.inputs(case.length, torch.float32)
        baselines["SDPA, float32"] = both_passes(partial(F.scaled_dot_product_attention, is_causal=True), wide)
    if setup.device == "cpu":
        baselines["plain PyTorch (ours)"] = both_passes(case.attention("torch"), inputs)
    else:
        baselines["flex_attention"] = both_passes(case.attention("flex"), inputs)
    kind = f", {str(dtype).removeprefix('torch.')}" if dtype else ""
    return bench.compare(
        f"attention, forward and backward{kind}",
        f"{case.length:,} rows, {case.name}",
        (ours, both_passes(case.attention(None), inputs)),
        baselines,
        check=right(case, None, inputs, True),
        threads=threads,
        device=setup.device,
        bytes_moved=11 * inputs[0].numel() * inputs[0].element_size(),
        operations=14 * DIM * case.pairs((setup.batch, setup.heads)),
        rate=rate(setup.device),
        budget_s=setup.seconds,
    )


def forward_rows(setup: Setup, case: Case, threads: int) -> list[bench.Row]:
    """One sparsity, forward only: flex_attention has no backward on a CPU."""
    inputs = setup.inputs(case.length, grad=False)
    flex = case.attention("flex")
    flex(*inputs)  # compiles
    dense = partial(F.scaled_dot_product_attention, *inputs, is_causal=True)
    return bench.compare(
        "attention, forward",
        f"{case.length:,} rows, {case.name}",
        ("C++", lambda: case.attention(None)(*inputs)),
        {
            "SDPA": dense,
            "flex_attention": lambda: flex(*inputs),
        },
        check=right(case, None, inputs, False),
        threads=threads,
        bytes_moved=4 * inputs[0].numel() * inputs[0].element_size(),
        operations=4 * DIM * case.pairs((setup.batch, setup.heads)),
        rate=rate(setup.device),
        budget_s=setup.seconds,
    )


def step_rows(setup: Setup, length: int, threads: int) -> list[bench.Row]:
    """Training steps of a GPT of two layers, width 128 and two heads, on one sequence."""
    ids = torch.randint(512, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(setup.device)

    def step(kind: str, **options: Any) -> Callable[[], None]:
        model = SparseGPT(512, 128, 2, 2, length, kind, seed=0, **options).to(setup.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)

        def call() -> None:
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    def check() -> None:
        sizes = (512, 128, 2, 2, 512)
        models = [SparseGPT(*sizes, "dense", seed=0), SparseGPT(*sizes, "drop", seed=0, drop_prob=0.0)]
        a, b = (float(model.to(setup.device).loss(ids[:, :512], ids[:, 1:513])) for model in models)
        assert abs(a - b) < 1e-4 * a, f"nothing dropped: loss {b}, dense {a}"

    dense = {"dense (SDPA)": step("dense")}
    rows = []
    for name, call in (("16 buckets", step("hash", n_buckets=16)), ("30 % dropped", step("drop", drop_prob=0.3))):
        rows += bench.compare(
            "training step", f"{length:,} tokens", (name, call), dense, check=check, threads=threads,
            device=setup.device, budget_s=setup.seconds,
        )  # fmt: skip
    return rows


def rate(device: str) -> float:
    """Operations per second of one thread by the kernel's own matrix product; 0 where there is none."""
    return cpp_face.product_rate() if device == "cpu" and cpp_face.library() else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run all comparisons, print them and write them down."""
    device, seconds, results = bench.options(arguments)
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and not cpp_face.library():
        print("no C++ compiler: nothing to bench but plain PyTorch", file=sys.stderr)
        return 1
    setup = Setup(device, seconds, *((1, 2, torch.float32) if on_cpu else (4, 48, torch.bfloat16)))
    rows: list[bench.Row] = []
    for keep in KEEPS:
        rows += attention_rows(setup, setup.dropped(JUDGED, keep), 1)
    for n in BUCKETS:
        rows += attention_rows(setup, setup.hashed(JUDGED, n), 1)
    rows += attention_rows(setup, setup.skewed(JUDGED), 1)
    for length in LENGTHS:
        rows += attention_rows(setup, setup.dropped(length, 0.5), 1)
        rows += attention_rows(setup, setup.hashed(length, 16), 1)
    if on_cpu and usable_cores() > 1:
        for length in (min(LENGTHS), JUDGED, max(LENGTHS)):
            rows += attention_rows(setup, setup.dropped(length, 0.5), 2)
            rows += attention_rows(setup, setup.hashed(length, 16), 2)
    if on_cpu:
        for dtype in (torch.bfloat16, torch.float16):
            rows += attention_rows(setup, setup.dropped(JUDGED, 0.5), 1, dtype)
        for case in (setup.dropped(JUDGED, 1.0), setup.dropped(JUDGED, 0.5), setup.hashed(JUDGED, 16)):
            rows += forward_rows(setup, case, 1)
    for length in (8192, 16384):
        rows += step_rows(setup, length, 1)
    bench.show(rows, f"Sparse attention on {device}")
    print(f"written to {bench.write('sparse_flash_attention', rows, device, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
