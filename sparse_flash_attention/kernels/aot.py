"""The kernels to compile ahead of time: every tile that the autotuner may choose, as a launch would specialise it.

Half-precision heads of 64 and 128, the paper's and the usual sizes, are held to the budget; the others are reported.
"""

from __future__ import annotations

from common.kernels.aot import TARGETS, Budget, Kernel
from sparse_flash_attention.kernels import triton_backward, triton_forward
from sparse_flash_attention.kernels.tiles import Tile, candidates, padded
from sparse_flash_attention.kernels.triton_face import STEP

FUNCTIONS = {
    "forward": triton_forward.forward_kernel,
    "delta": triton_backward.delta_kernel,
    "key": triton_backward.key_kernel,
    "query": triton_backward.query_kernel,
}
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
SINGLE = ("lse_ptr", "delta_ptr")  # float32 whatever the dtype
BUDGETED = [(dtype, head) for head in (64, 128) for dtype in ("bf16", "fp16")]
REPORTED = [("bf16", 32), ("bf16", 80), ("bf16", 256), ("fp32", 64), ("fp32", 128), ("fp32", 256)]


def specialised(
    name: str, dtype: str, head: int, tile: Tile, targets: tuple[int, ...], budget: Budget | None
) -> Kernel:
    """One kernel for contiguous inputs with H = Hk and D = Dv = `head`: strides divisible by 16, the last one 1."""
    function = FUNCTIONS[name]
    constants = {"D": head, "DV": head, "BLOCK_D": padded(head), "BLOCK_DV": padded(head), "UPCAST": False}
    constants |= tile.meta(name) | {"STEP": STEP, "group": 1} | {f"{x}_d": 1 for x in "qkvog"}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {}
    for argument in function.arg_names:
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in SINGLE else f"*{dtype}"
        elif argument in ("q_order", "k_order", "k_begin", "k_end", "q_first", "q_stop"):
            signature[argument] = "*i32"
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
    signature = {key: value for key, value in signature.items() if key not in constants}
    counts = ("heads", "steps", "scale", "scale_log2")
    aligned = frozenset(key for key in signature if key not in counts)
    size = f"{dtype} D={head} {tile.queries}x{tile.keys}" if tile.keys else f"{dtype} D={head} {tile.queries}"
    return Kernel(name, size, function, signature, constants, aligned, tile.warps, tile.stages, targets, budget)


def kernels(cases: list[tuple[str, int]], budget: Budget | None, *, every: bool = True) -> list[Kernel]:
    """Specs of all four kernels for (dtype, head) cases: every candidate tile, or only a target's preferred one."""
    found = []
    for dtype, head in cases:
        for name in FUNCTIONS:
            tiles = {target: candidates(name, padded(head), WIDTH[dtype], target) for target in TARGETS}
            for tile in tiles[max(TARGETS)]:
                targets = tuple(x for x in TARGETS if tile in (tiles[x] if every else tiles[x][:1]))
                if targets:
                    found.append(specialised(name, dtype, head, tile, targets, budget))
    return found


KERNELS = kernels(BUDGETED, Budget()) + kernels(REPORTED, None)
