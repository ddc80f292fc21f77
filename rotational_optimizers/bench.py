"""Speed of a rotational step beside torch's AdamW: `python -m rotational_optimizers.bench [device=cpu] [seconds=8]`.

RotationalAdamW by its native, foreach and compiled form against `torch.optim.AdamW` fused and foreach, over the sizes
and row lengths that cost differently, with the floor of 28 bytes a parameter (weight, gradient and two moments read,
weight and moments written, in float32); and `RotationTracker(every=10)` against the same training without it. Writes
`results/rotational_optimizers/bench-<device>.json`. About 3 minutes on two CPU cores.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.kernels import bench
from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.groups import rotational_param_groups
from rotational_optimizers.tracker import RotationTracker

Shapes = list[tuple[int, ...]]
BYTES = 28
# far below what turns a row towards its fixed bench gradient within a run
KEYS: dict[str, Any] = {"lr": 1e-7, "weight_decay": 0.1}


def gpt(width: int = 384, blocks: int = 6) -> Shapes:
    """Matrices, biases and norms of GPT blocks."""
    w = width
    return [(3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,), (w,), (w,), (w,), (w,)] * blocks


def resnet(depth: int = 56) -> Shapes:
    """Convolutions and batch norms of the CIFAR ResNet: hundreds of small tensors."""
    shapes: Shapes = [(16, 3, 3, 3), (16,), (16,)]
    width = 16
    for stage in (16, 32, 64):
        for _ in range((depth - 2) // 3):
            shapes += [(stage, width, 3, 3), (stage,), (stage,)]
            width = stage
    return [*shapes, (10, 64), (10,)]


def sizes() -> dict[str, tuple[Shapes, dict[str, Any]]]:
    """Name -> shapes and further keys of the rotational optimizer."""
    return {
        "GPT 10.7M, rows 384-1536": (gpt(), {}),
        "ResNet-56 0.85M, 169 tensors": (resnet(), {}),
        "4M, rows of 9": ([(111_000, 9)] * 4, {}),
        "4M, rows of 27": ([(37_000, 27)] * 4, {}),
        "4M, rows of 64": ([(15_600, 64)] * 4, {}),
        "4M, rows of 16384": ([(61, 16384)] * 4, {}),
        "GPT 10.7M, tensors as rows": (gpt(), {"per_neuron": False}),
    }


def stepper(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shapes: Shapes, device: str
) -> Callable[[], None]:
    """A step on fixed gradients, its state made."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device)
    optimizer = make(params)
    optimizer.step()
    return optimizer.step


def check(shapes: Shapes, device: str, keys: dict[str, Any], form: dict[str, Any]) -> Callable[[], None]:
    """Gate: after three steps the distance to float64 is at most twice that of plain PyTorch, over the whole tensor.

    A few short rows get gradients of one sign, of which AdamW's first step leaves only rounding; hence no maximum.
    """

    def run(dtype: torch.dtype = torch.float32, **flags: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
        optimizer = RotationalAdamW(params, lr=1e-3, weight_decay=1.0, **keys, **flags)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
            optimizer.step()
        return [param.detach() for param in params]

    def gate() -> None:
        for fast, plain, exact in zip(run(**form), run(foreach=False), run(torch.float64, foreach=False), strict=True):
            error, allowed = ((x - exact).norm().item() for x in (fast, plain))
            floor = torch.finfo(torch.float32).eps * exact.norm().item()
            assert error <= 2 * allowed + floor, f"error {error:.1e}, plain PyTorch's {allowed:.1e}"

    return gate


def optimizer_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """The native form (on CPU) and the foreach form against torch's, over sizes and threads."""
    cores = os.cpu_count() or 1
    baselines: dict[str, dict[str, Any]] = {"AdamW fused": {"fused": True}, "AdamW foreach": {"foreach": True}}
    forms: dict[str, dict[str, Any]] = {"RV-AdamW foreach": {"foreach": True}}
    if torch.device(device).type == "cpu":
        forms = {"RV-AdamW native": {"fused": True}, **forms}
    for size, (shapes, keys) in sizes().items():
        theirs = {
            name: stepper(partial(torch.optim.AdamW, **KEYS, **flags), shapes, device)
            for name, flags in baselines.items()
        }
        for name, flags in forms.items():
            ours = stepper(partial(RotationalAdamW, **KEYS, **keys, **flags), shapes, device)
            for threads in {1, cores} if "native" in name else {1}:
                print(f"{name}, {size}, {threads} threads", file=sys.stderr, flush=True)
                yield from bench.compare(
                    "optimizer step", size, (name, ours), theirs, check=check(shapes, device, keys, flags),
                    threads=threads, device=device, bytes_moved=BYTES * count(shapes), budget_s=seconds,
                )  # fmt: skip


def compiled_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """`torch.compile` of the plain form, on one block's matrices (compiling takes most of the time here)."""
    shapes = [shape for shape in gpt(blocks=1) if len(shape) > 1]
    theirs = {
        "AdamW fused": stepper(partial(torch.optim.AdamW, **KEYS, fused=True), shapes, device),
        "AdamW foreach": stepper(partial(torch.optim.AdamW, **KEYS, foreach=True), shapes, device),
    }
    ours = torch.compile(stepper(partial(RotationalAdamW, **KEYS), shapes, device))
    with bench.threads_of(1):
        for _ in range(3):
            ours()
    yield from bench.compare(
        "optimizer step", "GPT block 1.8M", ("RV-AdamW compiled", ours), theirs, device=device, budget_s=seconds,
        check=check(shapes, device, {}, {"foreach": False}), bytes_moved=BYTES * count(shapes),
    )  # fmt: skip


def tracker_rows(device: str, seconds: float) -> list[bench.Row]:
    """Ten training steps of a small GPT-like stack, with `RotationTracker(every=10)` and without."""

    def training() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
        torch.manual_seed(0)
        block = (nn.LayerNorm(384), nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))
        model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(4) for layer in block)).to(device)
        optimizer = RotationalAdamW(rotational_param_groups(model, 0.1), lr=1e-4)
        x = torch.randn(256, 384, device=device)

        def ten_steps() -> None:
            for _ in range(10):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()

        return model, optimizer, ten_steps

    model, optimizer, tracked = training()
    tracker = RotationTracker(model, optimizer, every=10)

    def gate() -> None:
        tracked()
        angles = torch.cat(list(tracker.rows().values()))
        assert bool(((angles > 0) & (angles < 1)).all()), "the tracker saw rows that do not turn"

    return bench.compare(
        "10 training steps", "MLP 4.7M, batch 256", ("RV-AdamW with tracker, every=10", tracked),
        {"RV-AdamW": training()[2]}, check=gate, device=device, budget_s=2 * seconds,
    )  # fmt: skip


def count(shapes: Shapes) -> int:
    """Parameters in all."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def main(arguments: list[str] | None = None) -> None:
    """Run every comparison, print the table, write the file."""
    device, seconds, results = bench.options(arguments)
    rows = [*optimizer_rows(device, seconds), *compiled_rows(device, seconds), *tracker_rows(device, seconds)]
    bench.show(rows, f"RotationalAdamW on {device}")
    print(bench.write("rotational_optimizers", rows, device, results))


if __name__ == "__main__":
    main()
