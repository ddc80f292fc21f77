"""What each modality says: exact reads of the chain, no gradients and no sampling.

    cumulative   P(y | s_k) along the chain, one row a step
    individual   P(y | e_k(s_0, x_k)) - P(y | s_0), each modality alone
    subsets      the AUROC of every subset of the modalities

All take one model, not a stack, and leave its mode as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.config import check
from multimodn import metrics
from multimodn.batch import read_batch
from multimodn.decoders import MISSING, ClassDecoder
from multimodn.model import MultiModN
from multimodn.network import Network

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from multimodn.batch import Inputs, Masks

START = "start"
"""Name of row 0, the initial state."""
EVERYBODY = "all"


def cumulative(
    model: MultiModN, inputs: Inputs, masks: Masks | None = None, *, targets: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Mean prediction after every step of the chain.

    Args:
        model: one model.
        inputs, masks: as in `MultiModN.forward`.
        targets: task -> (B,) classes; then means are also taken over the samples of each true class.

    Returns: columns `step` (0 … K), `modality` (`start` for step 0), `task`, `label` (the class whose probability it
        is, 0 for a regression), `of` (true class of the samples, or `all`), `probability` (mean; the predicted value
        of a regression), `std` over the samples and `n`, the samples. A sample that lacks a modality keeps its
        prediction there.

    Raises:
        ValueError: the model is a stack.
    """
    p = _predictions(model, inputs, masks)
    names = (START, *model.modalities)
    return _frame(model, p, targets, names, range(len(names)), "probability")


def individual(
    model: MultiModN, inputs: Inputs, masks: Masks | None = None, *, targets: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Mean change of the prediction by each modality alone: after its encoder on the initial state, less that state's.

    Arguments and columns as in `cumulative`, with `contribution` for `probability` and steps from 1; a sample that
    lacks the modality contributes 0.
    """
    changes = []
    for name in model.modalities:
        own = {name: inputs[name]} if name in inputs else {}
        shown = None if masks is None else {key: mask for key, mask in masks.items() if key in own}
        if not own:
            first = _predictions(model, inputs, masks)
            changes.append({task: torch.zeros_like(p[0]) for task, p in first.items()})
            continue
        p = _predictions(model, own, shown)
        changes.append({task: values[-1] - values[0] for task, values in p.items()})
    stacked = {task: torch.stack([change[task] for change in changes]) for task in model.tasks}
    return _frame(model, stacked, targets, model.modalities, range(1, len(changes) + 1), "contribution")


def subsets(
    model: Network, inputs: Inputs, targets: Mapping[str, Tensor], masks: Masks | None = None, *, limit: int = 8
) -> pd.DataFrame:
    """AUROC of every subset of the modalities, the others hidden: skipped by MultiModN, padded by P-Fusion.

    Args:
        model: one model.
        inputs, masks: as in `forward`; a sample must have a modality for it to be shown.
        targets: task -> (B,) classes.
        limit: largest number of modalities, since 2^K subsets are computed.

    Returns: one row a subset with `modalities` (a tuple of names), `bits` (bit k: modality k is in it), `size`, and one
        column a task of classes.

    Raises:
        ValueError: the model is a stack, or has more than `limit` modalities.
    """
    import pandas as pd

    names = model.modalities
    check("modalities", len(names), len(names) <= limit, f"at most limit={limit}")
    _check_single(model)
    batch = read_batch(model, inputs, masks)
    everything = torch.ones(batch.shape, dtype=torch.bool, device=next(model.parameters()).device)
    present = {name: everything if mask is None else mask for name, mask in batch.masks.items()}
    rows = []
    for bits in range(2 ** len(names)):
        chosen = tuple(name for i, name in enumerate(names) if bits >> i & 1)
        shown = {name: mask & (name in chosen) for name, mask in present.items()}
        p = model.predict(batch.inputs, shown, missing="sample")
        scores = {task: _auroc(model, task, p[task], targets[task]) for task in model.tasks if _classes(model, task)}
        rows.append({"modalities": chosen, "bits": bits, "size": len(chosen)} | scores)
    return pd.DataFrame(rows)


def jumps(model: MultiModN, inputs: Inputs, targets: Mapping[str, Tensor], masks: Masks | None = None) -> pd.DataFrame:
    """AUROC after every step of the chain and its increase: columns `step`, `modality`, `task`, `auroc`, `increase`."""
    import pandas as pd

    p = _predictions(model, inputs, masks)
    rows = []
    for task in (task for task in model.tasks if _classes(model, task)):
        before = float("nan")
        for step, name in enumerate((START, *model.modalities)):
            score = _auroc(model, task, p[task][step], targets[task])
            row = {"step": step, "modality": name, "task": task, "auroc": score, "increase": score - before}
            rows.append(row)
            before = score
    return pd.DataFrame(rows)


def heat_map(
    ax: Axes, frame: pd.DataFrame, value: str, *, of: Any = EVERYBODY, label: int = 1, fmt: str = "+.2f"
) -> None:
    """Draw `cumulative` (value="probability") or `individual` (value="contribution"): tasks by modalities.

    Args:
        ax: where.
        frame: what those functions give.
        value: the column.
        of: true class of the samples, or `all`.
        label: the class whose probability is shown.
        fmt: of the numbers in the cells.
    """
    from common.figures import heat_map as draw

    chosen = frame[(frame["of"] == of) & (frame["label"] == label)]
    modalities = list(dict.fromkeys(chosen["modality"]))
    table = chosen.pivot(index="task", columns="modality", values=value)
    table = table.loc[list(dict.fromkeys(chosen["task"])), modalities]
    draw(ax, table.to_numpy(), list(table.index), modalities, f"{value} of class {label}", fmt=fmt)


def _check_single(model: Network) -> None:
    check("model", "a stack", model.n_models is None, "one model; take it out by `unstack`")


@contextmanager
def _evaluating(model: Network) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _predictions(model: MultiModN, inputs: Inputs, masks: Masks | None) -> dict[str, Tensor]:
    """Task -> (K+1, B, C)."""
    _check_single(model)
    with _evaluating(model):
        return model.probabilities(model(inputs, masks, missing="sample"))


def _classes(model: Network, task: str) -> bool:
    return isinstance(model.decoders[task], ClassDecoder)


def _auroc(model: Network, task: str, p: Tensor, target: Tensor) -> float:
    two = p.shape[-1] == 2
    return (metrics.auroc(p[..., 1], target) if two else metrics.auroc_ovr(p, target)).item()


def _frame(
    model: Network,
    predictions: Mapping[str, Tensor],
    targets: Mapping[str, Tensor] | None,
    names: tuple[str, ...],
    steps: range,
    value: str,
) -> pd.DataFrame:
    """Means over samples of predictions (steps, B, C), a row a step, task, class and group of samples."""
    import pandas as pd

    rows = []
    for task, p in predictions.items():
        groups: list[tuple[Any, Tensor]] = [(EVERYBODY, torch.ones(p.shape[1], dtype=torch.bool))]
        if targets is not None and _classes(model, task):
            known = targets[task].cpu()
            groups += [(int(c), known == c) for c in known.unique().tolist() if c != MISSING]
        for (of, members), (i, step), label in itertools.product(groups, enumerate(steps), range(p.shape[-1])):
            own = p[i, members.to(p.device), label].double()
            rows.append(
                {
                    "step": step,
                    "modality": names[i],
                    "task": task,
                    "label": label,
                    "of": of,
                    value: own.mean().item(),
                    "std": own.std(correction=0).item(),
                    "n": len(own),
                }
            )
    return pd.DataFrame(rows)
