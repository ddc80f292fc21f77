"""Tile sizes of the Triton kernels: what the autotuner may choose, each compiled ahead of time and held to a budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows of queries and of keys a program holds at once, its warps and its software-pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int
    since: int = 80
    """Least compute capability, times ten: older tensor cores keep operands in registers and would spill."""

    def meta(self, kernel: str) -> dict[str, int]:
        """The tile as compile-time arguments of a kernel."""
        return {"BLOCK_Q": self.queries} | ({} if kernel == "delta" else {"BLOCK_K": self.keys})


INTERPRETED = {
    "forward": Tile(32, 32, 4, 1),
    "delta": Tile(64, 0, 4, 1),
    "key": Tile(32, 32, 4, 1),
    "query": Tile(32, 32, 4, 1),
}
"""Kernel -> tile under the interpreter: small, so that short inputs still have several."""


def padded(head: int) -> int:
    """Columns that hold a head of this size: a power of two, at least what tensor cores multiply."""
    return max(16, 1 << (head - 1).bit_length())


def candidates(kernel: str, head: int, itemsize: int, capability: int) -> list[Tile]:
    """Tiles for a kernel, the preferred first.

    Args:
        kernel: a key of `INTERPRETED`.
        head: the larger padded head size of keys and values.
        itemsize: bytes an element.
        capability: the device's compute capability times ten, e.g. 90.
    """
    if kernel == "delta":
        return [DELTA]
    tiles = CANDIDATES["full" if itemsize == 4 else "half"][kernel][min(max(head, 64), 256)]
    return [tile for tile in tiles if tile.since <= capability]


DELTA = Tile(16, 0, 4, 1)
CANDIDATES: dict[str, dict[str, dict[int, list[Tile]]]] = {
    "half": {
        "forward": {
            64: [Tile(128, 64, 8, 3), Tile(128, 64, 4, 3, since=90), Tile(128, 32, 4, 3), Tile(64, 64, 4, 2)],
            128: [Tile(128, 64, 8, 2, since=90), Tile(64, 64, 8, 2), Tile(64, 32, 4, 3)],
            256: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)],
        },
        "key": {
            64: [Tile(64, 64, 4, 2, since=90), Tile(32, 128, 8, 2), Tile(32, 64, 4, 2)],
            128: [Tile(32, 64, 8, 2), Tile(32, 32, 4, 2)],
            256: [Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)],
        },
        "query": {
            64: [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)],
            128: [Tile(64, 32, 4, 2)],
            256: [Tile(32, 32, 8, 2), Tile(32, 16, 4, 2)],
        },
    },
    # exact float32 products run on the ordinary units, from registers: small tiles
    "full": {
        "forward": {64: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)], 128: [Tile(32, 32, 8, 1)], 256: [Tile(32, 16, 8, 1)]},
        "key": {64: [Tile(32, 32, 8, 1), Tile(32, 32, 4, 1)], 128: [Tile(32, 16, 8, 1)], 256: [Tile(16, 16, 8, 1)]},
        "query": {64: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)], 128: [Tile(32, 16, 8, 1)], 256: [Tile(16, 16, 8, 1)]},
    },
}
"""Bytes an element -> kernel -> padded head size -> tiles. None spills or needs more than 99 KiB of shared memory on
the devices it is for (`kernels/aot.py`)."""
