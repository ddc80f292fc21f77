"""Operands that the tests of the matrix products share, and what equal means for them: bit for bit, any NaN a NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from mulfree_training import bits

SPECIAL = (float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, -1e-42, 3e38, -3e38, 1.2e-38)
CONTENTS = ("plain", "zeros", "nothing", "subnormal", "tiny", "wide", "huge", "special", "patterns")
SHIFTS = (0, bits.offset(1.0552), bits.offset(0.6))
SHAPES = [
    (1, 1, 1, 1), (2, 3, 5, 7), (3, 17, 16, 17), (2, 9, 33, 50), (1, 29, 70, 1), (1, 1, 40, 70), (1, 16, 32, 64),
    (2, 4, 0, 5), (0, 3, 4, 5), (1, 0, 3, 4), (1, 3, 4, 0),
]  # fmt: skip
"""Batch, M, K, P: one, odd, whole tiles and not, nothing at all."""


def content(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """A float32 tensor of one of `CONTENTS`."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=source)
    coins = torch.rand(shape, generator=source)
    if kind == "zeros":
        return torch.where(coins < 0.3, torch.where(coins < 0.15, 0.0, -0.0), x)
    if kind == "nothing":
        return x.sign() * 0.0
    if kind == "subnormal":
        return torch.where(coins < 0.3, x * 1e-39, x)
    if kind == "tiny":
        return x * 1e-19
    if kind == "wide":
        return x * torch.exp(25 * torch.randn(shape, generator=source))
    if kind == "huge":
        return x * 1e25
    if kind == "special":
        values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=source)]
        return torch.where(coins < 0.1, values, x)
    if kind == "patterns":
        whole = torch.randint(-(2**31), 2**31, shape, generator=source)
        return whole.to(torch.int32).view(torch.float32)
    return x


def views(kind: str, batch: int, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Tensors (batch, rows, columns) of one kind of content under all sorts of strides."""
    return {
        "contiguous": content(kind, batch, rows, columns, seed=seed),
        "transposed": content(kind, batch, columns, rows, seed=seed).mT,
        "expanded": content(kind, 1, rows, columns, seed=seed).expand(batch, -1, -1),
        "one row": content(kind, batch, 1, columns, seed=seed).expand(-1, rows, -1),
        "one column": content(kind, batch, rows, 1, seed=seed).expand(-1, -1, columns),
        "every other": content(kind, batch, rows, 2 * columns + 1, seed=seed)[..., 1::2],
        "batch inside": content(kind, rows, columns, batch, seed=seed).permute(2, 0, 1),
    }


def same(x: Tensor, y: Tensor) -> bool:
    """Equal shapes and patterns; -0 differs from 0, and no NaN from another."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return bool(
        ((x.contiguous().view(torch.int32) == y.contiguous().view(torch.int32)) | (x.isnan() & y.isnan())).all()
    )


EDGES = [(i, j) for low in (-64, 63) for i in (low, low + 1) for j in (low, low + 1, low + 2)]
EDGES += [(100, -126), (-126, 100), (-100, 127), (127, -100)]
"""Exponents of two operands whose products lie on both sides of the smallest normal number, or of infinity; and where
only a slope does, the product being ordinary."""


def near(exponent: int, *shape: int, seed: int = 0) -> Tensor:
    """Numbers of one exponent of either sign, with mantissas that are 0, the next above, the last, or anything."""
    source = torch.Generator().manual_seed(seed)
    mantissas = torch.tensor([0, 1, 2**23 - 1, 0]).to(torch.int32)
    mantissas[3] = int(torch.randint(2**23, (), generator=source))
    x = mantissas[torch.randint(4, shape, generator=source)] + ((exponent + 127) << 23)
    return torch.where(torch.rand(shape, generator=source) < 0.5, x, x | -(2**31)).view(torch.float32)
