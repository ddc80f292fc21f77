"""The kernels compile for A100, H100 and B200 without spills and within the budget of registers and shared memory."""

import pytest

from common.kernels.interpreter import SWITCH

pytest.importorskip("triton")

from common.kernels import aot
from sparse_flash_attention.kernels.aot import KERNELS, kernels, specialised
from sparse_flash_attention.kernels.tiles import Tile


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head"), [("bf16", 64), ("fp16", 64), ("bf16", 128)])
def test_preferred_tiles_hold_the_budget(dtype, head):
    rows = aot.compile_all(kernels([(dtype, head)], aot.Budget(), every=False))
    aot.check(rows)
    names, targets = ("forward", "delta", "key", "query"), ("sm_80", "sm_90", "sm_100")
    assert sorted((row.kernel, row.target) for row in rows) == sorted((n, t) for n in names for t in targets)


def test_heads_that_are_no_power_of_two_compile():
    rows = aot.compile_all([specialised("forward", "bf16", 80, Tile(64, 32, 4, 3), (80,), aot.Budget())])
    aot.check(rows)
    assert [row.target for row in rows] == ["sm_80"]


def test_a_tile_that_is_too_large_fails():
    rows = aot.compile_all([specialised("key", "bf16", 64, Tile(64, 128, 4, 2), (80,), aot.Budget())])
    with pytest.raises(AssertionError, match="key bf16 D=64 64x128 on sm_80: .*spilled"):
        aot.check(rows)


def test_every_half_precision_candidate_of_the_usual_heads_is_budgeted():
    sizes = {(k.name, k.size) for k in KERNELS if k.budget is not None}
    for dtype in ("bf16", "fp16"):
        for head in (64, 128):
            assert {(k.name, k.size) for k in kernels([(dtype, head)], aot.Budget())} <= sizes
    reported = {k.size.rsplit(" ", 1)[0] for k in KERNELS if k.budget is None}
    assert {"bf16 D=32", "bf16 D=80", "bf16 D=256", "fp32 D=64"} <= reported
