"""A multi-layer perceptron, several seeds in one stack."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from common.models import stacked
from common.models.stacked import LayerNorm, Linear


class MLP(nn.Module):
    """Stack of len(seeds) perceptrons: `depth` hidden layers [Linear → norm → ReLU] and a linear head.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        in_channels: input features of one model.
        classes: outputs of one model.
        channels: width of the hidden layers, before `width`.
        width: factor on `channels`, rounded down.
        depth: hidden layers.
        norm: "bn" (BatchNorm), "ln" (LayerNorm) or "none"; with a norm the hidden layers have no bias.
        weight_standardization: standardise the rows of the hidden layers' weights.
        keep_init_std: standardised rows keep their initial std; otherwise 1/sqrt(fan-in).

    Input (B, n_models*in_channels), output logits (n_models, B, classes).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        in_channels: int = 1,
        classes: int = 10,
        channels: int = 32,
        width: float = 1.0,
        depth: int = 4,
        norm: str = "bn",
        weight_standardization: bool = False,
        keep_init_std: bool = True,
    ) -> None:
        super().__init__()
        self.n_models = len(seeds)
        hidden = max(1, int(channels * width))
        inputs = [in_channels] + [hidden] * (depth - 1)
        options = {"weight_standardization": weight_standardization, "keep_init_std": keep_init_std}
        self.layers = nn.ModuleList(
            Linear(self.n_models, c_in, hidden, bias=norm == "none", **options) for c_in in inputs
        )
        self.norms = nn.ModuleList(_norm(norm, self.n_models, hidden) for _ in inputs)
        self.head = Linear(self.n_models, hidden, classes)
        stacked.init_stacked(self, seeds)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n_models, B, classes) of x (B, n_models*in_channels)."""
        x = x.unflatten(1, (self.n_models, -1)).transpose(0, 1)  # (M, B, C)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.head(x)


class _BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d of a stack on (M, B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each model's features over the batch."""
        n_models = x.shape[0]
        flat = x.transpose(0, 1).flatten(1)  # (B, M*C)
        return super().forward(flat).unflatten(1, (n_models, -1)).transpose(0, 1)


def _norm(norm: str, n_models: int, features: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if norm not in ("bn", "ln"):
        raise ValueError(f"norm={norm!r}: must be one of bn, ln, none")
    return _BatchNorm(n_models * features) if norm == "bn" else LayerNorm(n_models, features)
