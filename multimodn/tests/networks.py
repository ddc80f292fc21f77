"""Small networks and batches that several test files use."""

from __future__ import annotations

import torch
from torch import Tensor

from multimodn.decoders import ClassDecoder, MultiLabelDecoder, RegressionDecoder
from multimodn.encoders import MLPEncoder
from multimodn.fusion import PFusion
from multimodn.model import MultiModN

FEATURES = {"a": 3, "b": 5, "c": 2}
S = 6


def multimodn(seed: int = 0, *, dropout: float = 0.0, joins: str = "input", link: str = "softmax") -> MultiModN:
    """Three modalities, a binary and a three-class task."""
    torch.manual_seed(seed)
    encoders = {name: MLPEncoder(f, S, (7,), dropout, joins) for name, f in FEATURES.items()}
    decoders = {"yes": ClassDecoder(S, 2, (4,), link), "which": ClassDecoder(S, 3, (4,), link)}
    return MultiModN(encoders, decoders, S)


def pfusion(seed: int = 0, *, dropout: float = 0.0, indicator: bool = False) -> PFusion:
    """The same modalities and tasks side by side."""
    torch.manual_seed(seed)
    encoders = {name: MLPEncoder(f, S, (7,), dropout, "none") for name, f in FEATURES.items()}
    width = S * len(FEATURES) + indicator * len(FEATURES)
    return PFusion(encoders, {"yes": ClassDecoder(width, 2, (4,)), "which": ClassDecoder(width, 3, (4,))},
                   indicator=indicator)  # fmt: skip


def every_task(seed: int = 0) -> MultiModN:
    """One decoder of every kind."""
    torch.manual_seed(seed)
    encoders = {name: MLPEncoder(f, S, (7,)) for name, f in FEATURES.items()}
    return MultiModN(
        encoders,
        {"which": ClassDecoder(S, 3), "labels": MultiLabelDecoder(S, 2), "value": RegressionDecoder(S)},
        S,
    )


def batch(size: int = 8, seed: int = 1, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*lead, size, f, generator=rng) for name, f in FEATURES.items()}


def targets(size: int = 8, seed: int = 2, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "yes": torch.randint(2, (*lead, size), generator=rng),
        "which": torch.randint(3, (*lead, size), generator=rng),
    }


def some_missing(size: int = 8, seed: int = 3, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.rand(*lead, size, generator=rng) < 0.6 for name in FEATURES}
