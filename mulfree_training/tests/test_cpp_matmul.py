"""The C++ matrix product and its derivative equal the reference bit for bit, for every instruction set that is here."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.kernels.native import compiler
from mulfree_training import reference
from mulfree_training.kernels import cpp, cpp_matmul
from mulfree_training.tests.contents import CONTENTS, EDGES, SHAPES, SHIFTS, content, near, same, views

pytestmark = pytest.mark.skipif(compiler("c++") is None, reason="needs a C++ compiler")
ORDER = ("avx512", "avx2", "generic")
LEVELS = ORDER[ORDER.index(cpp.instruction_set()) :]
FORBIDDEN = re.compile(
    r"\sv?(?:mul|div|sqrt|rsqrt|rcp|dp|fn?m(?:add|sub)|fmaddsub|fmsubadd)[0-9]*[ps][sdh]\s|\sv?pmul|\sv?pmadd"
)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten, and what it reads before it wrote it, becomes a NaN."""

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(sizes, torch.nan).view(dtype)

    monkeypatch.setattr(cpp_matmul, "_empty", empty)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_reference(
    shape: tuple[int, int, int, int], shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poisoned(monkeypatch)
    n, m, k, p = shape
    for left, right in itertools.product(CONTENTS, repeat=2):
        a, b = content(left, n, m, k, seed=1), content(right, n, k, p, seed=2)
        truth = reference.matmul(a, b, shift)
        for level in LEVELS:
            assert same(cpp_matmul.matmul(a, b, shift, level=level), truth), (level, left, right)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_equal_the_reference(
    shape: tuple[int, int, int, int], shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poisoned(monkeypatch)
    n, m, k, p = shape
    for number, (given, right) in enumerate(itertools.product(CONTENTS, repeat=2)):
        left = CONTENTS[number % 7]
        g, a, b = content(given, n, m, p, seed=1), content(left, n, m, k, seed=2), content(right, n, k, p, seed=3)
        truth = reference.matmul_grad(g, a, b, shift)
        for level in LEVELS:
            assert same(cpp_matmul.matmul_grad(g, a, b, shift, level=level), truth), (level, given, left, right)


@pytest.mark.parametrize("shift", SHIFTS)
def test_products_on_both_sides_of_the_range(shift: int) -> None:
    for i, j in EDGES:
        a, b, g = near(i, 1, 100, 3, seed=1), near(j, 1, 3, 90, seed=2), near(i, 1, 100, 90, seed=3)
        g[content("zeros", 1, 100, 90) == 0] = 0
        product, derivative = reference.matmul(a, b, shift), reference.matmul_grad(g, a, b, shift)
        for level in LEVELS:
            assert same(cpp_matmul.matmul(a, b, shift, level=level), product), (level, i, j)
            assert same(cpp_matmul.matmul_grad(g, a, b, shift, level=level), derivative), (level, i, j)


@pytest.mark.parametrize("kind", ["plain", "zeros", "wide", "special"])
def test_any_strides(kind: str) -> None:
    lefts, rights, grads = views(kind, 2, 21, 19, 1), views("plain", 2, 19, 37, 2), views(kind, 2, 21, 37, 3)
    for (i, a), (j, b) in itertools.product(lefts.items(), rights.items()):
        truth = reference.matmul(a, b)
        for level in LEVELS:
            assert same(cpp_matmul.matmul(a, b, level=level), truth), (level, i, j)
    for (i, a), (j, b), (h, g) in zip(lefts.items(), reversed(rights.items()), grads.items(), strict=True):
        truth = reference.matmul_grad(g, a, b)
        for level in LEVELS:
            assert same(cpp_matmul.matmul_grad(g, a, b, level=level), truth), (level, i, j, h)


@pytest.mark.parametrize("place", [0, 31, 63])
def test_a_special_value_is_seen_wherever_it_stands(place: int) -> None:
    """Ranges are found block by block: one value in an ordinary operand must reach the blocks that it concerns."""
    for value in (0.0, 1e-39, 1e-36, 1e36, float("inf"), float("nan")):
        for i in range(3):
            g, a, b = (content("plain", 1, 64, 64, seed=seed) for seed in range(3))
            (g, a, b)[i][0, place, 63 - place] = value
            a[0, 5], b[0, :, 7] = a[0, 5] * 1e-3, b[0, :, 7] * 1e3
            product, derivative = reference.matmul(a, b), reference.matmul_grad(g, a, b)
            for level in LEVELS:
                assert same(cpp_matmul.matmul(a, b, level=level), product), (level, value, i)
                assert same(cpp_matmul.matmul_grad(g, a, b, level=level), derivative), (level, value, i)


@pytest.mark.parametrize("sizes", [(1, 130, 95, 90), (3, 80, 70, 65), (12, 47, 50, 41)])
def test_threads_do_not_change_the_result(sizes: tuple[int, int, int, int], level: str) -> None:
    n, m, k, p = sizes
    before, found = torch.get_num_threads(), {}
    g, a, b = content("wide", n, m, p, seed=1), content("zeros", n, k, m, seed=2).mT, content("zeros", n, k, p, seed=3)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = cpp_matmul.matmul(a, b, level=level), cpp_matmul.matmul_grad(g, a, b, level=level)
    finally:
        torch.set_num_threads(before)
    truth = reference.matmul(a, b), reference.matmul_grad(g, a, b)
    for threads, results in found.items():
        assert all(same(x, y) for x, y in zip(results, truth, strict=True)), threads


def test_memory_stays_near_that_of_the_operands() -> None:
    a, b = content("zeros", 1, 256, 256), content("zeros", 1, 256, 256).mT
    for run, operands in ((lambda: cpp_matmul.matmul(a.mT, b), 2), (lambda: cpp_matmul.matmul_grad(a.mT, a, b), 3)):
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        used = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
        assert 0 < used <= 4 * operands * a.numel() * 4


def test_errors() -> None:
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"b\.shape=\(2, 5, 4\): must be \(2, 4, P\)"):
        cpp_matmul.matmul(a, b.mT)
    with pytest.raises(ValueError, match=r"grad\.shape=\(2, 5, 3\): must be \(2, 3, 5\)"):
        cpp_matmul.matmul_grad(torch.zeros(2, 5, 3), a, b)
    with pytest.raises(TypeError, match=r"dtype=torch\.float64.*: must be float32"):
        cpp_matmul.matmul(a.double(), b.double())


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_compiled_code_multiplies_nothing(level: str, tmp_path: Path) -> None:
    native = cpp_matmul.library(level)
    assert native is not None
    assert not FORBIDDEN.findall(_disassembly(native._name))
    control = tmp_path / "control.cpp"
    control.write_text('extern "C" void f(float *x) { for (int i = 0; i < 64; i++) x[i] = x[i] * x[i + 64]; }')
    command = compiler("c++")
    assert command is not None
    subprocess.run([*command, "-O3", "-c", str(control), "-o", str(tmp_path / "control.o")], check=True)
    if cpp.X86:
        assert FORBIDDEN.findall(_disassembly(str(tmp_path / "control.o")))


def _disassembly(path: str) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
