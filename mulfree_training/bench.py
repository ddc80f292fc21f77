"""Speed of piecewise affine arithmetic: `python -m mulfree_training.bench [device=cpu] [seconds=3] [results=results]`.

Matrix products beside `torch.matmul`, for each instruction set, with and without zeros (which need masks); the exact
derivative of a product; single operations, fused rows, convolutions and the optimizer beside PyTorch's; and whole
training steps beside float32. A ratio below 1 is the price of the emulation: no processor has an instruction for it.
Floors: two operations a product at the rate of torch's matrix product. Writes
`results/mulfree_training/bench-<device>.json`. Some minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import bench
from common.kernels.device import usable_cores
from common.kernels.dispatch import forced
from mulfree_training import reference
from mulfree_training.config import ArithmeticConfig, ModelConfig, OptimizerConfig
from mulfree_training.kernels import cpp, torch_face
from mulfree_training.names import name
from mulfree_training.networks.build import build
from mulfree_training.operators import face, ops
from mulfree_training.optim import PAMAdamW
from mulfree_training.products import pam_conv2d
from mulfree_training.tasks.arithmetic import convert, loss_function, make_optimizer

PRODUCTS = (
    (1, 64, 64, 64),
    (1, 256, 256, 256),
    (1, 512, 512, 512),
    (1, 1024, 1024, 1024),
    (1, 1088, 64, 192),
    (1, 64, 1088, 128),
    (128, 65, 32, 65),
    (96, 128, 128, 32),
    (256, 17, 16, 17),
)
"""(batch, M, K, P): squares, a linear layer and its weight gradient, attention scores and products with values."""
BACKWARD = ((1, 256, 256, 256), (1, 512, 512, 512), (1, 1088, 64, 192), (128, 65, 32, 65), (256, 17, 16, 17))
EMULATED = 2**25
"""Multiply-accumulates up to which the plain PyTorch face is timed too."""
ROWS = ((4352, 17), (1088, 64), (4096, 64), (1024, 256))
CONVOLUTIONS = {"all channels": 1, "depthwise": 64}
"""Groups of a 3 x 3 convolution of 64 channels."""
CHECKED = 8
"""Rows of a product that are compared with the reference before it is timed."""
STEPS = ("matmul", "softmax", "norm", "loss", "full")


def operands(shape: tuple[int, int, int, int], zeros: float, device: str) -> tuple[Tensor, Tensor]:
    """A (N, M, K) and B (N, K, P), normal, a share of the entries 0."""
    n, m, k, p = shape
    rng = torch.Generator().manual_seed(m * k + p)
    found = []
    for size in ((n, m, k), (n, k, p)):
        x = torch.randn(size, generator=rng)
        found.append(x.masked_fill(torch.rand(size, generator=rng) < zeros, 0.0).to(device))
    return found[0], found[1]


def same_bits(found: Tensor, expected: Tensor) -> None:
    """Assert equality, -0 and +0 apart."""
    assert torch.equal(found.cpu().view(torch.int32), expected.cpu().view(torch.int32)), "bits differ"


def product_rows(
    shape: tuple[int, int, int, int], zeros: float, level: str, threads: int, device: str, seconds: float
) -> list[bench.Row]:
    """One matrix product on one instruction set ("" on a GPU)."""
    a, b = operands(shape, zeros, device)
    own = face("cpp" if device == "cpu" else "triton")
    options = {"level": level} if level else {}

    def call() -> Tensor:
        return own.matmul(a, b, 0, **options)

    baselines: dict[str, Callable[[], Any]] = {"torch.matmul": lambda: torch.matmul(a, b)}
    n, m, k, p = shape
    if n * m * k * p <= EMULATED and threads == 1 and level == cpp.instruction_set():
        baselines["plain PyTorch (ours)"] = lambda: torch_face.matmul(a, b, 0)
    return bench.compare(
        f"matrix product, {'30 % zeros' if zeros else 'no zeros'}",
        " x ".join(map(str, shape)),
        (f"C++ {level}" if level else "Triton", call),
        baselines,
        check=lambda: same_bits(call()[:, :CHECKED], reference.matmul(a[:, :CHECKED], b)),
        threads=threads,
        device=device,
        bytes_moved=4 * (a.numel() + b.numel() + n * m * p),
        operations=2 * n * m * k * p,
        budget_s=seconds,
    )


def backward_rows(shape: tuple[int, int, int, int], device: str, seconds: float) -> list[bench.Row]:
    """The exact derivative of a product with respect to its first factor."""
    a, b = operands(shape, 0.0, device)
    n, m, k, p = shape
    grad = torch.randn(n, m, p, generator=torch.Generator().manual_seed(k)).to(device)
    own = face("cpp" if device == "cpu" else "triton")
    first = slice(0, CHECKED)

    def check() -> None:
        same_bits(own.matmul_grad(grad, a, b, 0)[:, first], reference.matmul_grad(grad[:, first], a[:, first], b))

    return bench.compare(
        "exact derivative of a matrix product",
        " x ".join(map(str, shape)),
        ("C++" if device == "cpu" else "Triton", lambda: own.matmul_grad(grad, a, b, 0)),
        {"torch.matmul": lambda: torch.matmul(grad, b.mT)},
        check=check,
        device=device,
        bytes_moved=4 * (2 * a.numel() + b.numel() + grad.numel()),
        operations=2 * n * m * k * p,
        budget_s=seconds,
    )


def element_rows(count: int, device: str, seconds: float) -> list[bench.Row]:
    """Single operations on many numbers."""
    rng = torch.Generator().manual_seed(count)
    x, y = (torch.randn(count, generator=rng).to(device) for _ in range(2))
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]] = {
        "product": (lambda: ops.mul(x, y, 0), lambda: torch.mul(x, y), lambda: reference.mul(x, y)),
        "quotient": (lambda: ops.div(x, y, 0), lambda: torch.div(x, y), lambda: reference.div(x, y)),
        "2 to the power": (lambda: ops.exp2(x), lambda: torch.exp2(x), lambda: reference.exp2(x)),
        "square root": (lambda: ops.sqrt(x), lambda: torch.sqrt(x), lambda: reference.sqrt(x)),
    }
    rows = []
    for what, (ours, theirs, exact) in cases.items():

        def check(ours: Callable[[], Tensor] = ours, exact: Callable[[], Tensor] = exact) -> None:
            assert torch.equal(ours().nan_to_num(), exact().nan_to_num()), "numbers differ"

        rows += bench.compare(
            what, f"{count:,} numbers", ("piecewise affine", ours), {"torch": theirs}, check=check, device=device,
            bytes_moved=4 * count * (3 if what in ("product", "quotient") else 2), budget_s=seconds,
        )  # fmt: skip
    return rows


def fused_rows(shape: tuple[int, int], device: str, seconds: float) -> list[bench.Row]:
    """Softmax and layer norm, forward and backward, approximate rule."""
    rng = torch.Generator().manual_seed(shape[1])
    x, grad = (torch.randn(shape, generator=rng).to(device) for _ in range(2))
    leaf = x.clone().requires_grad_()
    weight, bias = (torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device))
    size = " x ".join(map(str, shape))

    def softmax() -> tuple[Tensor, Tensor]:
        return ops.softmax(x, 0), ops.softmax_grad(grad, x, 0, False)

    def norm() -> tuple[Tensor, Tensor]:
        gx, gw = ops.layer_norm_grad(grad, x, weight, 1e-5, 0, False)
        return ops.layer_norm(x, weight, bias, 1e-5, 0), gx + gw.sum(0)

    def torch_softmax() -> Any:
        return torch.autograd.grad(leaf.softmax(-1), leaf, grad)

    w = weight.clone().requires_grad_()

    def torch_norm() -> Any:
        return torch.autograd.grad(F.layer_norm(leaf, shape[1:], w, bias), (leaf, w), grad)

    def close(found: Callable[[], tuple[Tensor, Tensor]], backend: str) -> Callable[[], None]:
        def check() -> None:
            with forced(backend):
                expected = found()
            for a, b in zip(found(), expected, strict=True):
                assert torch.equal(a, b), "numbers differ"

        return check

    rows = []
    for what, ours, theirs in (("softmax", softmax, torch_softmax), ("layer norm", norm, torch_norm)):
        rows += bench.compare(
            f"{what}, forward and backward", size, ("piecewise affine", ours), {"torch": theirs},
            check=close(ours, "reference"), device=device, bytes_moved=4 * 5 * x.numel(), budget_s=seconds,
        )  # fmt: skip
    return rows


def convolution_rows(kind: str, device: str, seconds: float) -> list[bench.Row]:
    """A 3 x 3 convolution of 8 images of 64 channels, 32 x 32 each, forward and backward."""
    groups, rng = CONVOLUTIONS[kind], torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 32, 32, generator=rng).to(device).requires_grad_()
    w = torch.randn(64, 64 // groups, 3, 3, generator=rng).to(device).requires_grad_()
    grad = torch.randn(8, 64, 32, 32, generator=rng).to(device)

    def call(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = function(x, w, padding=1, groups=groups)
        return out, *torch.autograd.grad(out, (x, w), grad)

    def check() -> None:
        for own, other in zip(call(pam_conv2d), call(F.conv2d), strict=True):
            apart = float((own - other).detach().norm() / other.detach().norm())
            assert apart < 0.1, f"{apart:.2g} away from float32"

    return bench.compare(
        "convolution, forward and backward", f"8 x 64 x 32 x 32, {kind}",
        ("piecewise affine", lambda: call(pam_conv2d)), {"torch": lambda: call(F.conv2d)}, check=check, device=device,
        bytes_moved=4 * (4 * x.numel() + 2 * w.numel()), operations=6 * x.numel() * w[0].numel(), budget_s=seconds,
    )  # fmt: skip


def optimizer_rows(device: str, seconds: float) -> list[bench.Row]:
    """One AdamW step over thirty tensors."""

    def stepper(kind: type, **options: Any) -> tuple[Callable[[], Any], list[Tensor]]:
        rng = torch.Generator().manual_seed(0)
        parameters = [torch.randn(100, 100, generator=rng).to(device).requires_grad_() for _ in range(30)]
        for parameter in parameters:
            parameter.grad = torch.randn(100, 100, generator=rng).to(device)
        return kind(parameters, lr=1e-4, **options).step, parameters

    ours, own = stepper(PAMAdamW)
    theirs, _ = stepper(torch.optim.AdamW, fused=True)

    def check() -> None:
        moved, expected = stepper(PAMAdamW)
        exact, other = stepper(torch.optim.AdamW)
        moved()
        exact()
        shift = max(float((a - b).detach().abs().max()) for a, b in zip(expected, other, strict=True))
        assert shift < 1e-4, f"the first step is {shift:.2g} away from AdamW's"

    size = f"{sum(p.numel() for p in own):,} parameters"
    return bench.compare(
        "AdamW step", size, ("PAMAdamW", ours), {"torch, fused": theirs}, check=check, device=device,
        bytes_moved=4 * 7 * sum(p.numel() for p in own), budget_s=seconds,
    )  # fmt: skip


def step_rows(workload: str, threads: int, device: str, seconds: float) -> list[bench.Row]:
    """Whole training steps, row by row of the ablation, beside float32."""
    rng = torch.Generator().manual_seed(0)
    vision = workload == "digits ViT, 64 images"
    if vision:
        model, smoothing = ModelConfig(), 0.1
        inputs, target = torch.rand(64, 1, 8, 8, generator=rng), torch.randint(10, (64,), generator=rng)
    else:
        model, smoothing = ModelConfig(name="gpt", vocab=96), 0.0
        inputs, target = (torch.randint(96, (16, 64), generator=rng) for _ in range(2))
    inputs, target = inputs.to(device), target.to(device)

    def stepper(arithmetic: ArithmeticConfig) -> Callable[[], float]:
        network = convert(build(model, 0), arithmetic).to(device)
        loss_of = loss_function(arithmetic, smoothing, "torch" if vision else "fairseq")
        optimizer = make_optimizer(network, OptimizerConfig(lr=1e-6), arithmetic)

        def call() -> float:
            loss = loss_of(network(inputs), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss)

        return call

    standard = stepper(ArithmeticConfig())
    scope: list[str] = ["matmul", "softmax", "norm", "loss", "optimizer"]
    cases = [(name(arm), scope[: i + 1], "approx") for i, arm in enumerate(STEPS)]
    cases += [(name("matmul_exact"), scope[:1], "exact"), (name("full_exact"), scope, "exact")]
    rows = []
    for label, words, rule in cases:
        scalars = "pam" if "optimizer" in words else "exact"
        ours = stepper(ArithmeticConfig(kind="pam", scope=words, derivative=rule, host_scalars=scalars))

        def check(ours: Callable[[], float] = ours) -> None:
            a, b = ours(), standard()
            assert abs(a - b) < 0.15 * b, f"loss {a:.3f}, float32 {b:.3f}"

        rows += bench.compare(
            f"training step, {workload}", label, (label, ours), {"float32": standard}, check=check, threads=threads,
            device=device, budget_s=seconds,
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run all comparisons, print them and write them down."""
    device, seconds, results = bench.options(arguments)
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and face("cpp").refuses(torch.empty(0)):
        print("no C++ compiler: nothing to bench but plain PyTorch", file=sys.stderr)
        return 1
    levels = [level for level in cpp.levels() if level != "generic"] or ["generic"] if on_cpu else [""]
    rows: list[bench.Row] = []
    for shape in PRODUCTS:
        for zeros in (0.0, 0.3):
            for level in levels:
                rows += product_rows(shape, zeros, level, 1, device, seconds)
    for shape in BACKWARD:
        rows += backward_rows(shape, device, seconds)
    for count in (2**16, 2**20):
        rows += element_rows(count, device, seconds)
    for shape_of_rows in ROWS:
        rows += fused_rows(shape_of_rows, device, seconds)
    for kind in CONVOLUTIONS:
        rows += convolution_rows(kind, device, seconds)
    rows += optimizer_rows(device, seconds)
    for workload in ("digits ViT, 64 images", "character GPT, 16 x 64"):
        rows += step_rows(workload, 1, device, seconds)
    if on_cpu and usable_cores() > 1:
        for shape in ((1, 512, 512, 512), (1, 1024, 1024, 1024), (128, 65, 32, 65)):
            rows += product_rows(shape, 0.0, levels[0], 2, device, seconds)
        rows += step_rows("digits ViT, 64 images", 2, device, seconds)
    bench.show(rows, f"Piecewise affine arithmetic on {device}")
    print(f"written to {bench.write('mulfree_training', rows, device, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
