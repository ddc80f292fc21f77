"""What MultiModN and P-Fusion share: named encoders and decoders, the grid of predictions, loss and probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from common.config import check
from multimodn.batch import Batch, Inputs, Masks, read_batch, skip_batches
from multimodn.decoders import Decoder
from multimodn.loss import Targets, grid_loss

MISSING_RULES = ("sample", "batch")


class Grid(NamedTuple):
    """Everything a chain of K encoders says about a batch: row 0 is the initial state, row k follows encoder k.

    Leading dimensions `...` are those of stacked models, none for one model.
    """

    states: Tensor
    """(..., K+1, B, S)."""
    outputs: dict[str, Tensor]
    """Task -> the decoder's raw outputs (..., K+1, B, C)."""
    present: Tensor
    """(..., K, B) bool: whether step k was taken, not skipped."""


@contextmanager
def evaluating(model: Network) -> Iterator[None]:
    """Evaluation mode, without gradients, for a while."""
    # part by part: an encoder that is frozen in evaluation mode inside a model in training stays so
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class Network(nn.Module):
    """Encoders by modality, decoders by task; `forward(inputs, masks)` gives a `Grid`.

    Args:
        missing: `sample` or `batch`, which samples are treated as lacking a modality.
    """

    stackable = True

    def __init__(self, missing: str) -> None:
        super().__init__()
        check("missing", missing, missing in MISSING_RULES, f"one of {', '.join(MISSING_RULES)}")
        self.missing = missing
        self.n_models: int | None = None
        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(self.encoders)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.decoders)

    def decoder(self, task: str) -> Decoder:
        """The decoder of a task."""
        return cast(Decoder, self.decoders[task])

    def read(self, inputs: Inputs, masks: Masks | None, missing: str | None) -> Batch:
        """Check a batch and apply the rule for missing modalities (None: the model's own)."""
        rule = self.missing if missing is None else missing
        check("missing", rule, rule in MISSING_RULES, f"one of {', '.join(MISSING_RULES)}")
        batch = read_batch(self, inputs, masks)
        return skip_batches(batch) if rule == "batch" else batch

    def loss(
        self,
        grid: Grid,
        targets: Targets,
        *,
        error_weight: float = 1.0,
        state_change_weight: float = 0.0,
        normalise: str = "constant",
        validate: bool = True,
    ) -> Tensor:
        """The training loss of a grid; see `multimodn.loss.grid_loss`."""
        return grid_loss(
            self.decoders,
            grid.outputs,
            targets,
            grid.present,
            grid.states,
            error_weight=error_weight,
            state_change_weight=state_change_weight,
            normalise=normalise,
            validate=validate,
        )

    def probabilities(self, grid: Grid) -> dict[str, Tensor]:
        """Task -> (..., K+1, B, C): class probabilities of every row of the grid, or predicted values."""
        return {name: self.decoder(name).probabilities(outputs) for name, outputs in grid.outputs.items()}

    def predict(self, inputs: Inputs, masks: Masks | None = None, **options: Any) -> dict[str, Tensor]:
        """Task -> (..., B, C): class probabilities (or values) after the last modality that each sample has.

        Runs in evaluation mode and leaves the model's mode as it was; arguments as in `forward`.
        """
        with evaluating(self):
            grid = self(inputs, masks, **options)
        return {name: p[..., -1, :, :] for name, p in self.probabilities(grid).items()}


def total_width(encoders: Iterable[nn.Module]) -> int:
    """Numbers of all embeddings together."""
    return sum(cast(int, encoder.state_size) for encoder in encoders)
