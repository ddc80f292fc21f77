"""The best weights of a training: those that score highest on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


class Best:
    """A watch of `fit` that keeps the weights of every model at its highest score.

    Of equal scores the later one counts, as in fairseq.

    Args:
        models: placed; their weights are copied to the CPU.
        every: steps between two looks.
        score: of a model, higher is better; must leave the model and the random states as they are.
    """

    def __init__(self, models: Iterable[nn.Module], every: int, score: Callable[[nn.Module], float]) -> None:
        self.models, self.every, self.score = list(models), every, score
        self.scores = [-math.inf] * len(self.models)
        self.steps = [0] * len(self.models)
        self.weights: list[dict[str, Tensor]] = [{} for _ in self.models]

    def look(self, step: int) -> dict[str, list[float]]:
        """Score every model; returns what is to be logged."""
        found = [self.score(model) for model in self.models]
        for i, (model, score) in enumerate(zip(self.models, found, strict=True)):
            if score >= self.scores[i]:
                self.scores[i], self.steps[i] = score, step
                self.weights[i] = {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
        return {"selection/score": found}

    def restore(self) -> None:
        """Give every model its best weights; one that was never looked at keeps its own."""
        for model, weights in zip(self.models, self.weights, strict=True):
            if weights:
                model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"scores": self.scores, "steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.scores, self.steps, self.weights = (list(state[key]) for key in ("scores", "steps", "weights"))
