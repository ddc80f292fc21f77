"""What each modality says: exact reads of the chain, no gradients and no sampling.

    cumulative   P(y | s_k) along the chain, one row a step
    stepwise     P(y | s_k) - P(y | s_{k-1}), the change at each step of the chain
    individual   P(y | e_k(s_0, x_k)) - P(y | s_0), each modality alone
    jumps        the AUROC after every step of the chain
    subsets      the AUROC of every subset of the modalities

All take one model, not a stack, evaluate it without dropout and leave the mode of all its parts as it was. Each sample
skips what it lacks, whatever the model's own rule, so that no number depends on who else is in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.config import check
from multimodn import metrics
from multimodn.batch import read_batch
from multimodn.decoders import MISSING, ClassDecoder
from multimodn.model import MultiModN
from multimodn.network import Network, evaluating

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
        of a regression), `std` over the samples, `n`, the samples, and `taken`, those of them that have the modality.
        A sample that lacks it keeps its prediction there, and counts in the mean.

    Raises:
        ValueError: the model is a stack.
    """
    p, present = _read(model, inputs, masks)
    taken = torch.cat([torch.ones_like(present[:1]), present])  # everybody has the initial state
    return _frame(model, p, taken, targets, (START, *model.modalities), 0, "probability")


def cumulative_samples(
    model: MultiModN, inputs: Inputs, masks: Masks | None = None, *, task: str, label: int | None = None
) -> pd.DataFrame:
    """Prediction of every sample after every step of the chain: `cumulative` before the mean.

    Args:
        model, inputs, masks: as in `cumulative`.
        task: which.
        label: the class (or label of several) whose probability it is; None: 1, or the value of a regression.

    Returns: (B, K+1), a row a sample, columns `start` and the modalities in the order of the chain.

    Raises:
        KeyError: unknown task.
        ValueError: the model is a stack, or the task has no such label.
    """
    import pandas as pd

    if task not in model.tasks:
        raise KeyError(f"task={task!r}: must be one of {', '.join(model.tasks)}")
    p = _read(model, inputs, masks)[0][task]  # (K+1, B, C)
    last = p.shape[-1] - 1
    chosen = min(1, last) if label is None else label
    check("label", chosen, 0 <= chosen <= last, f"in [0, {last}]")
    return pd.DataFrame(p[..., chosen].T.cpu().numpy(), columns=[START, *model.modalities])


def stepwise(
    model: MultiModN, inputs: Inputs, masks: Masks | None = None, *, targets: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Mean change of the prediction at every step of the chain, given all steps before it.

    Arguments and columns as in `individual`. The contributions of all steps add up to the last prediction less that of
    the initial state.
    """
    p, present = _read(model, inputs, masks)
    changes = {task: values[1:] - values[:-1] for task, values in p.items()}
    return _frame(model, changes, present, targets, model.modalities, 1, "contribution")


def individual(
    model: MultiModN, inputs: Inputs, masks: Masks | None = None, *, targets: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Mean change of the prediction by each modality alone: after its encoder on the initial state, less that state's.

    Arguments and columns as in `cumulative`, with `contribution` for `probability` and steps from 1; a sample that
    lacks the modality contributes 0.
    """
    alone = [_read(model, inputs, masks, order=(name,)) for name in model.modalities]
    changes = {task: torch.stack([p[task][1] - p[task][0] for p, _ in alone]) for task in model.tasks}
    present = torch.cat([taken for _, taken in alone])
    return _frame(model, changes, present, targets, model.modalities, 1, "contribution")


def subsets(
    model: Network, inputs: Inputs, targets: Mapping[str, Tensor], masks: Masks | None = None, *, limit: int = 8
) -> pd.DataFrame:
    """AUROC of every subset of the modalities, the others hidden: skipped by MultiModN, padded by P-Fusion.

    Args:
        model: one model.
        inputs, masks: as in `forward`; a sample must have a modality for it to be shown.
        targets: task -> (B,) classes; a task without targets has no score.
        limit: largest number of modalities, since 2^K subsets are computed.

    Returns: one row a subset with `modalities` (a tuple of names), `bits` (bit k: modality k is in it), `size`, and one
        column a task of classes. A score is NaN, with a warning, where a class is absent.

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
        p, _ = _read(model, batch.inputs, shown)
        scores = {task: _auroc(p[task][-1], targets[task]) for task in _scored(model, targets)}
        rows.append({"modalities": chosen, "bits": bits, "size": len(chosen)} | scores)
    return pd.DataFrame(rows)


def jumps(model: MultiModN, inputs: Inputs, targets: Mapping[str, Tensor], masks: Masks | None = None) -> pd.DataFrame:
    """AUROC after every step of the chain, and its increase.

    Args:
        model, inputs, masks: as in `cumulative`.
        targets: task -> (B,) classes; a task without targets has no score.

    Returns: columns `step` (0 … K), `modality`, `task`, `auroc` (0.5 for step 0, where all samples are equal; of more
        than two classes the mean of each against the others) and `increase` (NaN for step 0).

    Raises:
        ValueError: the model is a stack.
    """
    import pandas as pd

    p, _ = _read(model, inputs, masks)
    rows = []
    for task in _scored(model, targets):
        before = float("nan")
        for step, name in enumerate((START, *model.modalities)):
            score = _auroc(p[task][step], targets[task])
            row = {"step": step, "modality": name, "task": task, "auroc": score, "increase": score - before}
            rows.append(row)
            before = score
    return pd.DataFrame(rows)


def pivot(frame: pd.DataFrame, value: str, *, of: Any = EVERYBODY, label: int = 1) -> pd.DataFrame:
    """Table for a heat map: a row a task, a column a modality, both in the order of the frame.

    Args:
        frame: what `cumulative`, `stepwise`, `individual` or `jumps` give.
        value: its column to show.
        of: true class of the samples, or `all`; of no effect on `jumps`.
        label: the class whose probability is shown, 0 for a regression; of no effect on `jumps`.

    Returns: (tasks, modalities); tasks without such a class are left out, and so is `start` where it has no value.

    Raises:
        ValueError: the frame has no such column, group of samples or class.
    """
    check("value", value, value in frame.columns, f"one of {', '.join(map(str, frame.columns))}")
    for column, wanted in (("of", of), ("label", label)):
        if column in frame.columns:
            known = frame[column].unique().tolist()
            check(column, wanted, wanted in known, f"one of {', '.join(map(str, known))}")
            frame = frame[frame[column] == wanted]
    table = frame.pivot(index="task", columns="modality", values=value)
    table = table.loc[list(dict.fromkeys(frame["task"])), list(dict.fromkeys(frame["modality"]))]
    empty = START in table.columns and bool(table[START].isna().all())  # nothing increases before the first step
    return table.drop(columns=START) if empty else table


def heat_map(
    ax: Axes, frame: pd.DataFrame, value: str, *, of: Any = EVERYBODY, label: int = 1, fmt: str = "+.2f"
) -> None:
    """Draw tasks by modalities; arguments and errors as in `pivot`.

    ax: where; fmt: of the numbers in the cells.
    """
    from common.figures import heat_map as draw

    table = pivot(frame, value, of=of, label=label)
    unit = f"{value} of class {label}" if "label" in frame.columns else value
    draw(ax, table.to_numpy(), list(table.index), list(table.columns), unit, fmt=fmt)


def _check_single(model: Network) -> None:
    check("model", "a stack", model.n_models is None, "one model; take it out by `unstack`")


def _read(model: Network, inputs: Inputs, masks: Masks | None, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Predictions, task -> (K+1, B, C), and who took which step, (K, B) bool."""
    _check_single(model)
    with evaluating(model):
        grid = model(inputs, masks, missing="sample", **options)
        return model.probabilities(grid), grid.present


def _classes(model: Network, task: str) -> bool:
    return isinstance(model.decoders[task], ClassDecoder)


def _scored(model: Network, targets: Mapping[str, Tensor]) -> list[str]:
    return [task for task in model.tasks if task in targets and _classes(model, task)]


def _auroc(p: Tensor, target: Tensor) -> float:
    labels = target.to(p.device)
    return (metrics.auroc(p[..., 1], labels) if p.shape[-1] == 2 else metrics.auroc_ovr(p, labels)).item()


def _frame(
    model: Network,
    predictions: Mapping[str, Tensor],
    taken: Tensor,
    targets: Mapping[str, Tensor] | None,
    names: tuple[str, ...],
    first: int,
    value: str,
) -> pd.DataFrame:
    """Means over samples of predictions (steps, B, C), taken (steps, B): a row a step, task, class and group."""
    import pandas as pd

    rows = []
    taken = taken.cpu()
    for task, p in predictions.items():
        values = p.double().cpu()
        groups: list[tuple[Any, Tensor]] = [(EVERYBODY, torch.ones(p.shape[1], dtype=torch.bool))]
        if targets is not None and task in targets and _classes(model, task):
            known = targets[task].cpu()
            groups += [(int(c), known == c) for c in known.unique().tolist() if c != MISSING]
        for (of, members), (i, name), label in itertools.product(groups, enumerate(names), range(p.shape[-1])):
            own = values[i, members, label]
            rows.append(
                {
                    "step": first + i,
                    "modality": name,
                    "task": task,
                    "label": label,
                    "of": of,
                    value: own.mean().item(),
                    "std": own.std(correction=0).item(),
                    "n": len(own),
                    "taken": int(taken[i, members].sum()),
                }
            )
    return pd.DataFrame(rows)
