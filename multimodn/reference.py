"""MultiModN's training step in the plain style of the released code: slow on purpose, a yardstick and not for use.

One encoder after the other, every task decoded for itself, loss and metrics kept cell by cell, missing values looked
for one number at a time. It says, independently of `multimodn.model` and `multimodn.loss`, what the official rules mean
(tests compare the two), and is the reference arm of the bench. The rules:

    skip      an encoder is left out for the whole batch when its modality has a NaN anywhere in the batch.
    loss      err · sum of E / (D (M+1)) + 0.01 · state_change · sum of V / M, with zeros in the cells of what was
              skipped: the denominators do not shrink.
    E[k, d]   cross-entropy (nats) of sigmoid(outputs) *as if they were logits*, mean over the batch.
    V[k]      mean over batch and state of (s_k - s_(k-1))², through both of which gradients flow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import check
from multimodn.decoders import ClassDecoder
from multimodn.model import MultiModN

STATE_CHANGE_FACTOR = 0.01


class Confusion:
    """Counts of one cell of the grid since the last `reset`: row = true class, column = predicted class."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count a batch, (B,) and (B,) int64."""
        classes = len(self.counts)
        pairs = torch.bincount(labels * classes + predicted, minlength=classes * classes)
        self.counts += pairs.view(classes, classes).cpu()

    def accuracy(self) -> float:
        """Share of right predictions, NaN before the first batch (the released code divides by one sample more)."""
        total = int(self.counts.sum())
        return int(self.counts.trace()) / total if total else float("nan")

    def reset(self) -> None:
        """Forget all batches."""
        self.counts.zero_()


class ReferenceMultiModN(nn.Module):
    """The chain of M encoders and D class decoders, trained as the released code does.

    Args:
        encoders: `forward(state (B, S), x (B, F)) -> state (B, S)`, in the chain's order.
        decoders: class decoders with the `sigmoid` link, one a task.
        initial_state: (S,), trained when it is a parameter.
        error_weight: err, the weight of the errors.
        state_change_weight: weight of the state's change, before the factor 0.01.

    Raises:
        ValueError: no decoder, or one that has not the official loss.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        decoders: Sequence[nn.Module],
        initial_state: Tensor,
        *,
        error_weight: float = 1.0,
        state_change_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check("decoders", "[]", len(decoders) > 0, "at least one decoder")
        for decoder in decoders:
            official = isinstance(decoder, ClassDecoder) and decoder.link == "sigmoid"
            check("decoders", type(decoder).__name__, official, 'a ClassDecoder with link="sigmoid"')
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)
        if isinstance(initial_state, nn.Parameter):
            self.initial_state = initial_state
        else:
            self.register_buffer("initial_state", initial_state)
        self.error_weight = error_weight
        self.state_change_weight = STATE_CHANGE_FACTOR * state_change_weight
        self.confusion = [[Confusion(cast(int, d.classes)) for d in decoders] for _ in range(len(encoders) + 1)]

    @classmethod
    def from_model(
        cls, model: MultiModN, *, error_weight: float = 1.0, state_change_weight: float = 0.0
    ) -> ReferenceMultiModN:
        """The reference with copies of a model's encoders, decoders and initial state, in the same mode.

        Raises:
            ValueError: a stack of models, or a decoder that has not the official loss.
        """
        check("model.n_models", model.n_models, model.n_models is None, "None: one model, not a stack")
        twin = copy.deepcopy(model)
        reference = cls(
            list(twin.encoders.values()),
            list(twin.decoders.values()),
            twin.initial_state,
            error_weight=error_weight,
            state_change_weight=state_change_weight,
        )
        return reference.train(model.training)

    def batch_loss(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Loss of a batch, a scalar; every cell that is computed is counted in `confusion`.

        Args:
            inputs: M tensors (B, F_m), NaN where missing.
            targets: (B, D) int64 classes, all known.

        Raises:
            ValueError: another number of inputs or tasks, or a label out of range.
        """
        self._check(inputs)
        check("targets.shape", tuple(targets.shape), targets.shape[1:] == (len(self.decoders),), "(B, D)")
        rows, tasks = len(self.encoders) + 1, len(self.decoders)
        errors = torch.zeros(rows, tasks, dtype=self.initial_state.dtype, device=self.initial_state.device)
        changes = torch.zeros(rows - 1, dtype=errors.dtype, device=errors.device)
        state = self.initial_state.repeat(len(targets), 1)
        for d in range(tasks):
            errors[0, d] = self._cell(0, d, state, targets[:, d])
        for k, (encoder, x) in enumerate(zip(self.encoders, inputs, strict=True), start=1):
            if has_nan(x):
                continue
            before, state = state, encoder(state, x)
            changes[k - 1] = ((state - before) ** 2).mean()
            for d in range(tasks):
                errors[k, d] = self._cell(k, d, state, targets[:, d])
        loss = self.error_weight * errors.sum() / (tasks * rows)
        if rows > 1:
            loss = loss + self.state_change_weight * changes.sum() / (rows - 1)
        return loss

    def train_step(self, inputs: Sequence[Tensor], targets: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """One step of training; arguments and errors as in `batch_loss`. Give the loss before the step.

        The gradients of a skipped encoder stay None, so that Adam leaves it where it is.
        """
        self.train()
        optimizer.zero_grad()
        loss = self.batch_loss(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict_grid(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of every task, (M+1, B, C): sigmoid outputs divided by their sum, a skipped row as the one before.

        In evaluation mode; the mode stays as it was. (The released code gives classes only, and NaN for missing data.)

        Raises:
            ValueError: another number of inputs, or none, which leaves the size of the batch open.
        """
        self._check(inputs)
        check("inputs", "[]", len(inputs) > 0, "at least one tensor")
        training = self.training
        self.eval()
        try:
            state = self.initial_state.repeat(len(inputs[0]), 1)
            states = [state]
            for encoder, x in zip(self.encoders, inputs, strict=True):
                state = state if has_nan(x) else encoder(state, x)
                states.append(state)
            grid = []
            for decoder in self.decoders:
                outputs = [decoder(s).sigmoid() for s in states]
                grid.append(torch.stack([o / o.sum(1, keepdim=True) for o in outputs]))
            return grid
        finally:
            self.train(training)

    def reset_metrics(self) -> None:
        """Empty `confusion`, at the start of an epoch."""
        for row in self.confusion:
            for cell in row:
                cell.reset()

    def _cell(self, k: int, d: int, state: Tensor, labels: Tensor) -> Tensor:
        """E[k, d], counted."""
        outputs = self.decoders[d](state).sigmoid()
        wrong = labels[(labels < 0) | (labels >= outputs.shape[1])]
        if len(wrong):
            raise ValueError(f"targets={wrong[0].item()}: must be in [0, {outputs.shape[1] - 1}]")
        self.confusion[k][d].update(outputs.argmax(1), labels)
        return F.cross_entropy(outputs, labels)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        check("len(inputs)", len(inputs), len(inputs) == len(self.encoders), f"{len(self.encoders)}, one an encoder")


def has_nan(x: Tensor) -> bool:
    """Whether a tensor holds a NaN, asked of one number after the other, as the released code does."""
    return any(x.isnan().flatten())
