"""Compiled ahead of time: the figures are ptxas's, and what is over its budget is caught."""

import dataclasses
import json
import sys

import pytest

from common.kernels import aot
from common.kernels.interpreter import SWITCH, interpreted, interpreting

pytest.importorskip("triton")

PACKAGE = '''
import triton
import triton.language as tl
from common.kernels.aot import Budget, Kernel


@triton.jit
def product(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x y for square blocks, n of them."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(n):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + at)
        y = tl.load(y_ptr + i * BLOCK * BLOCK + at)
        acc = tl.dot(x, y, acc)
    tl.store(out_ptr + at, acc)


def kernel(block, warps=4, **more):
    signature = {"x_ptr": "*fp16", "y_ptr": "*fp16", "out_ptr": "*fp32", "n": "i32"}
    aligned = frozenset(("x_ptr", "y_ptr", "out_ptr"))
    return Kernel("product", f"block {block}", product, signature, {"BLOCK": block}, aligned, warps, **more)


KERNELS = [kernel(32), kernel(64, budget=Budget(registers=1)), kernel(64, budget=None, targets=(90,))]
'''


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A package with kernels/aot.py; its first kernel holds its budget, the second cannot."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "fixture_kernels" / "kernels").mkdir(parents=True)
    for folder in ("fixture_kernels", "fixture_kernels/kernels"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "fixture_kernels" / "kernels" / "aot.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "fixture_kernels"
    for name in [name for name in sys.modules if name.startswith("fixture_kernels")]:
        del sys.modules[name]


@pytest.fixture
def module(paper):
    import importlib

    return importlib.import_module(f"{paper}.kernels.aot")


def test_small_kernel_holds_its_budget_on_every_target(module):
    rows = aot.compile_all(module.KERNELS[:1])
    assert [row.target for row in rows] == ["sm_80", "sm_90", "sm_100"]
    assert all(0 < row.registers <= 255 and row.shared > 0 and not row.over for row in rows)
    aot.check(rows)


def test_oversize_tile_spills_and_fails(module):
    rows = aot.compile_all([module.kernel(128, warps=1, targets=(80,))])
    assert rows[0].spill_stores > 0 and rows[0].spill_loads > 0 and rows[0].registers == 255
    with pytest.raises(AssertionError, match="product block 128 on sm_80: .*spilled bytes > 0"):
        aot.check(rows)


def test_unbudgeted_rows_are_reported_only(module):
    rows = aot.compile_all([module.kernel(128, warps=1, targets=(80,), budget=None)])
    assert rows[0].spill_stores > 0 and not rows[0].over and not rows[0].budgeted


@pytest.mark.parametrize(
    ("used", "words"),
    [((255, 0, 99 * 1024), ""), ((256, 0, 0), "256 registers > 255"), ((1, 4, 0), "4 spilled bytes > 0"),
     ((1, 0, 101377), "101377 bytes of shared memory > 101376")],
)  # fmt: skip
def test_budget(used, words):
    assert aot.excess(aot.Budget(), *used) == words


def test_signature_that_does_not_fit_is_refused(module):
    kernel = module.KERNELS[0]
    types = {name: kind for name, kind in kernel.signature.items() if name != "n"}
    with pytest.raises(ValueError, match="product: n: must be"):
        aot.compile_all([dataclasses.replace(kernel, signature=types)])
    with pytest.raises(ValueError, match="product: m: must be"):
        aot.compile_all([dataclasses.replace(kernel, constants={"BLOCK": 32, "m": 1})])


def test_bad_code_names_the_assembler():
    with pytest.raises(RuntimeError, match="ptxas for sm_80"):
        aot.assembled(".version 8.0\n.target sm_80\n.address_size 64\nnonsense\n")
    with pytest.raises(RuntimeError, match=r"\.target"):
        aot.assembled("nothing")


def test_command_line_writes_the_table_and_fails_over_budget(paper, tmp_path, capsys):
    assert aot.main([paper, f"results={tmp_path / 'out'}"]) == 1
    found = json.loads((tmp_path / "out" / paper / "aot.json").read_text())
    assert {"commit", "dirty", "versions", "started", "wall_s"} <= set(found["provenance"])
    assert "triton" in found["provenance"]["versions"]
    # three targets twice, one once
    assert len(found["rows"]) == 7
    assert set(found["rows"][0]) == {field.name for field in dataclasses.fields(aot.Usage)}
    assert [bool(row["over"]) for row in found["rows"]] == [False] * 3 + [True] * 3 + [False]
    shown = capsys.readouterr()
    assert "OVER" in shown.out and "3 of 7 rows over budget" in shown.err


def test_command_line_succeeds_within_budget(paper, module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KERNELS", module.KERNELS[:1])
    assert aot.main([paper, f"results={tmp_path}"]) == 0


@pytest.mark.parametrize("arguments", [[], ["no_such_paper"], ["common"], ["a/b"], ["size=3"], ["one", "two"]])
def test_usage_is_one_line(arguments, capsys):
    assert aot.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_interpreter_and_compilation_exclude_each_other(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(RuntimeError, match=f"{SWITCH}=1: must be off"):
        aot.compile_all([])


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_interpreter_switch(monkeypatch, value, on):
    monkeypatch.setenv(SWITCH, value)
    assert interpreting() is on


@pytest.mark.parametrize("on", [True, False])
def test_a_process_of_its_own(on):
    done = interpreted(["-c", "from common.kernels.interpreter import interpreting; print(interpreting())"], on=on)
    assert done.returncode == 0 and done.stdout.strip() == str(on)
