"""Speed of the method beside its alternatives: `python -m multimodn.bench [device=cpu] [seconds=8]`.

- Training step: MultiModN against the official style (a scan for NaN number by number, one decoder call and one
  confusion matrix a cell), with and without that scan, and against P-Fusion of the same widths. Floor: the weights and
  Adam's moments, read and written once.
- Seeds side by side: one stacked step against a loop over models and against `torch.func.vmap`.
- Training on a table (STAR's sizes): ten epochs, against scikit-learn's perceptron and boosted trees.
- Scores: the AUROC of many models and rows of the grid at once, against a loop over scikit-learn's.

Writes `results/multimodn/bench-<device>.json`. About 3 minutes on two CPU cores.
"""

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from common.kernels import bench
from multimodn import metrics
from multimodn.decoders import ClassDecoder
from multimodn.encoders import MLPEncoder
from multimodn.fusion import PFusion
from multimodn.model import MultiModN
from multimodn.network import Network
from multimodn.reference import ReferenceMultiModN
from multimodn.stacking import stack
from multimodn.training import Rows, fit


@dataclass(frozen=True)
class Sizes:
    """What is measured; the tests take less of it."""

    mimic: tuple[int, ...] = (15, 1024, 768, 99)
    """Columns of the official MIMIC modalities."""
    table: tuple[int, ...] = (7, 4, 4, 4)
    """Columns of STAR."""
    state: int = 50
    tasks: int = 2
    batches: tuple[int, ...] = (16, 256)
    models: tuple[int, ...] = (1, 5, 10, 20)
    rows: int = 1831
    """Training rows of STAR."""
    epochs: int = 10
    scored: tuple[int, int, int] = (10, 5, 500)
    """Models, rows of the grid, samples."""


SIZES = Sizes()
HIDDEN, DROPOUT, LR = (32, 32), 0.2, 1e-3
CLOSE = 1e-4
"""Relative: float32 sums in another order."""


def multimodn(features: tuple[int, ...], seed: int = 0, dropout: float = DROPOUT) -> MultiModN:
    """The official MIMIC network."""
    torch.manual_seed(seed)
    encoders = {f"m{i}": MLPEncoder(f, SIZES.state, HIDDEN, dropout) for i, f in enumerate(features)}
    decoders = {f"t{i}": ClassDecoder(SIZES.state, 2, HIDDEN, "sigmoid") for i in range(SIZES.tasks)}
    return MultiModN(encoders, decoders, SIZES.state)


def pfusion(features: tuple[int, ...], seed: int = 0) -> PFusion:
    """P-Fusion of the same widths."""
    torch.manual_seed(seed)
    encoders = {f"m{i}": MLPEncoder(f, SIZES.state, HIDDEN, DROPOUT, "none") for i, f in enumerate(features)}
    width = SIZES.state * len(features)
    return PFusion(encoders, {f"t{i}": ClassDecoder(width, 2, HIDDEN, "sigmoid") for i in range(SIZES.tasks)})


def data(features: tuple[int, ...], shape: tuple[int, ...], device: str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """Inputs and labels, (..., F) and (...)."""
    rng = torch.Generator().manual_seed(1)
    inputs = {f"m{i}": torch.randn(*shape, f, generator=rng).to(device) for i, f in enumerate(features)}
    labels = {f"t{i}": torch.randint(2, shape, generator=rng).to(device) for i in range(SIZES.tasks)}
    return inputs, labels


class Step:
    """One training step of a network on a batch, as `fit` does it."""

    def __init__(self, network: Network, inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
        self.network, self.inputs, self.labels = network, inputs, labels
        self.masks = dict.fromkeys(inputs)
        self.optimizer = torch.optim.Adam(network.parameters(), LR, fused=True)

    def __call__(self) -> Tensor:
        """Take the step; give the loss before it."""
        self.optimizer.zero_grad()
        grid = self.network(self.inputs, self.masks)
        loss = self.network.loss(grid, self.labels, validate=False)
        loss.sum().backward()
        self.optimizer.step()
        return loss.detach()


def reference_step(model: MultiModN, inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Callable[[], Any]:
    """One step in the official style."""
    reference = ReferenceMultiModN.from_model(model)
    optimizer = torch.optim.Adam(reference.parameters(), LR)
    given, targets = list(inputs.values()), torch.stack(list(labels.values()), 1)
    return lambda: reference.train_step(given, targets, optimizer)


def without_scan(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same with a vectorised look for NaN."""
    from multimodn import reference

    def run() -> Any:
        kept, reference.has_nan = reference.has_nan, lambda x: bool(x.isnan().any())
        try:
            return call()
        finally:
            reference.has_nan = kept

    return run


def step_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """One model at the official shapes."""
    for size in SIZES.batches:
        inputs, labels = data(SIZES.mimic, (size,), device)
        model = multimodn(SIZES.mimic).to(device)
        ours, parallel = Step(model, inputs, labels), Step(pfusion(SIZES.mimic).to(device), inputs, labels)
        official = reference_step(model, inputs, labels)

        def gate(inputs: dict = inputs, labels: dict = labels) -> None:
            plain = multimodn(SIZES.mimic, dropout=0.0).to(device)
            expected = reference_step(plain, inputs, labels)()
            close(torch.as_tensor(expected), Step(plain, inputs, labels)().cpu())

        weights = sum(p.numel() for p in model.parameters())
        baselines: dict[str, Callable[[], Any]] = {
            "official style": official,
            "official style, vectorised scan": without_scan(official),
            "P-Fusion": parallel,
        }
        say(f"training step, B = {size}")
        yield from bench.compare(
            "training step", f"MIMIC shapes, B = {size}", ("MultiModN", ours), baselines, check=gate, device=device,
            bytes_moved=28.0 * weights, operations=6.0 * weights * size, budget_s=seconds,
        )  # fmt: skip


def seed_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """Several seeds of a small table at once."""
    for count in SIZES.models:
        models = [multimodn(SIZES.table, seed, dropout=0.0).to(device) for seed in range(count)]
        inputs, labels = data(SIZES.table, (count, 32), device)
        ours = Step(stack(models), inputs, labels)
        each = [
            Step(copy.deepcopy(m), {k: x[i] for k, x in inputs.items()}, {k: y[i] for k, y in labels.items()})
            for i, m in enumerate(models)
        ]
        mapped = VmapStep(models, inputs, labels)

        def gate(models: list = models, inputs: dict = inputs, labels: dict = labels) -> None:
            found = Step(stack(models), inputs, labels)()
            parts = [
                Step(copy.deepcopy(m), {k: x[i] for k, x in inputs.items()}, {k: y[i] for k, y in labels.items()})()
                for i, m in enumerate(models)
            ]
            close(found.cpu(), torch.stack(parts).cpu())
            close(VmapStep(models, inputs, labels)().cpu(), torch.stack(parts).cpu())

        weights = count * sum(p.numel() for p in models[0].parameters())
        say(f"{count} seeds")
        yield from bench.compare(
            "training step of several seeds", f"STAR shapes, B = 32, {count} seeds", ("stack", ours),
            {"loop over models": functools.partial(run_all, each), "torch.func.vmap": mapped}, check=gate,
            device=device, bytes_moved=28.0 * weights, operations=6.0 * weights * 32, budget_s=seconds,
        )  # fmt: skip


def run_all(calls: list[Step]) -> None:
    """One after the other."""
    for call in calls:
        call()


class VmapStep:
    """One step of several models by `torch.func.vmap` over stacked parameters."""

    def __init__(self, models: list[MultiModN], inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
        self.base = copy.deepcopy(models[0])
        found, _ = stack_module_state(models)
        self.params = {name: nn.Parameter(p.detach().clone()) for name, p in found.items()}
        self.inputs, self.labels, self.masks = inputs, labels, dict.fromkeys(inputs)
        self.optimizer = torch.optim.Adam(self.params.values(), LR, fused=True)

    def __call__(self) -> Tensor:
        """Take the step; give the losses before it, (models,)."""

        def loss(params: dict, inputs: dict, labels: dict) -> Tensor:
            grid = functional_call(self.base, params, (inputs, self.masks))
            return self.base.loss(grid, labels, validate=False)

        self.optimizer.zero_grad()
        losses = vmap(loss)(self.params, self.inputs, self.labels)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()


def training_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """A whole training on a table, ten epochs of batches of 32, one task."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.neural_network import MLPClassifier

    inputs, labels = data(SIZES.table, (SIZES.rows,), device)
    x, y = torch.cat(list(inputs.values()), 1).cpu().numpy(), labels["t0"].cpu().numpy()
    one = {"t0": labels["t0"]}

    def ours() -> Network:
        torch.manual_seed(0)
        encoders = {n: MLPEncoder(v.shape[1], SIZES.state, HIDDEN, DROPOUT) for n, v in inputs.items()}
        model = MultiModN(encoders, {"t0": ClassDecoder(SIZES.state)}, SIZES.state).to(device)
        fit(model, Rows.of(inputs, one), epochs=SIZES.epochs)
        return model

    def gate() -> None:
        p = ours().predict(inputs)["t0"][:, 1]
        score = metrics.auroc(p, one["t0"]).item()
        if not score > 0.5:  # labels are random: only memorising helps, and it does a little
            raise AssertionError(f"AUROC {score:.3f} on the training rows")

    perceptron = MLPClassifier(HIDDEN, batch_size=32, max_iter=SIZES.epochs, early_stopping=False, tol=0.0)
    say("training")
    yield from bench.compare(
        f"training, {SIZES.epochs} epochs", f"{SIZES.rows} rows, B = 32", ("MultiModN", ours),
        {
            "sklearn MLPClassifier": quietly(lambda: perceptron.fit(x, y)),
            "sklearn HistGradientBoosting": lambda: HistGradientBoostingClassifier().fit(x, y),
        },
        check=gate, device=device, operations=1.0, budget_s=seconds, rounds=7,
    )  # fmt: skip


def quietly(call: Callable[[], Any]) -> Callable[[], Any]:
    """Without scikit-learn's warning that so few epochs did not converge."""

    def run() -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return run


def score_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """AUROC of many models and rows of the grid."""
    from sklearn.metrics import roc_auc_score

    rng = torch.Generator().manual_seed(0)
    models, rows, samples = SIZES.scored
    scores = torch.rand(models, rows, samples, generator=rng)
    labels = torch.randint(2, (models, 1, samples), generator=rng)

    def loop() -> Tensor:
        found = [[roc_auc_score(labels[i, 0], scores[i, k]) for k in range(rows)] for i in range(models)]
        return torch.tensor(found, dtype=torch.float64)

    say("scores")
    yield from bench.compare(
        "AUROC", f"{models} models x {rows} rows x {samples}", ("all at once", lambda: metrics.auroc(scores, labels)),
        {"loop over sklearn": loop}, check=lambda: close(metrics.auroc(scores, labels), loop()),
        operations=1.0, budget_s=seconds,
    )  # fmt: skip


def close(found: Tensor, expected: Tensor) -> None:
    """Refuse numbers that differ by more than `CLOSE` of the largest (AssertionError)."""
    gap = (found.double() - expected.double()).abs().max().item()
    size = expected.double().abs().max().item()
    if not gap <= CLOSE * size:
        raise AssertionError(f"differs by {gap:.3g}, largest {size:.3g}")


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run every comparison, print the table, write the file."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device, seconds, results = bench.options(arguments)
    groups = (step_rows, seed_rows, training_rows, score_rows)
    rows = [row for group in groups for row in group(device, seconds)]
    bench.show(rows, f"MultiModN on {device}")
    print(bench.write("multimodn", rows, device, results))


if __name__ == "__main__":
    main()
