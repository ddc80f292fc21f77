"""The kernels compile for A100, H100 and B200 without spills and within the budget of registers and shared memory."""

import pytest

pytest.importorskip("triton")

from common.kernels import aot
from common.kernels.interpreter import SWITCH
from mulfree_training.kernels import triton_elementwise
from mulfree_training.kernels.aot import KERNELS, UNIT, of_matrices, of_operation
from mulfree_training.kernels.triton_matmul import CANDIDATES, MASKED, MODES, PLAIN, Tile

TARGETS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CANDIDATES)
def test_preferred_tiles_hold_the_budget(name):
    rows = aot.compile_all([of_matrices(name, mode, CANDIDATES[name][mode][0]) for mode in MODES])
    aot.check(rows)
    assert [row.target for row in rows] == TARGETS * 3 and all(row.budgeted for row in rows)


def test_elementwise_operations_hold_the_budget():
    kernels = [of_operation(x) for x in ("exp2", "mul", "sqrt_grad", "div_grad")] + [of_operation("mul", ("B_STEP",))]
    rows = aot.compile_all(kernels)
    aot.check(rows)
    assert [row.target for row in rows] == TARGETS * 5
    assert all(row.registers <= 64 and row.shared == 0 for row in rows)


def test_a_tile_that_is_too_large_fails():
    tile = Tile(128, 128, 4)
    kernel = of_matrices("matmul", MASKED, tile)
    (row,) = aot.compile_all([aot.Kernel(**{**vars(kernel), "targets": (80,)})])
    with pytest.raises(AssertionError, match="matmul masked 128x128 unroll 1 nn on sm_80: .*spilled"):
        aot.check([row])


def test_every_operation_and_every_candidate_is_budgeted():
    listed = {(kernel.name, kernel.size, kernel.warps) for kernel in KERNELS}
    assert len(listed) == len(KERNELS)
    assert all(kernel.budget == aot.Budget() and kernel.targets == aot.TARGETS for kernel in KERNELS)
    assert {of_operation(x).name for x in triton_elementwise.OPERATIONS} <= {name for name, _, _ in listed}
    for name, modes in CANDIDATES.items():
        for mode, tiles in modes.items():
            wanted = [of_matrices(name, mode, tile, layout) for tile in tiles for layout in UNIT[name]]
            assert {(kernel.name, kernel.size, kernel.warps) for kernel in wanted} <= listed


def test_a_layout_fixes_one_stride_an_operand():
    for layout, units in UNIT["matmul_grad"].items():
        kernel = of_matrices("matmul_grad", PLAIN, Tile(32, 32, 4), layout)
        assert sorted(unit[0] for unit in units) == ["a", "b", "g"] and kernel.size.endswith(layout)
        assert {name for name, value in kernel.constants.items() if value == 1 and name[1] == "_"} == set(units)
        assert not set(units) & set(kernel.signature)
