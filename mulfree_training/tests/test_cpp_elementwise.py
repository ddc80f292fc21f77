"""The C++ primitives equal the reference bit for bit on every instruction set of this processor."""

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
from mulfree_training.kernels import cpp, cpp_elementwise
from mulfree_training.tests.contents import CONTENTS, SHIFTS, content, same

pytestmark = pytest.mark.skipif(compiler("c++") is None, reason="needs a C++ compiler")
ORDER = ("avx512", "avx2", "generic")
LEVELS = ORDER[ORDER.index(cpp.instruction_set()) :]
BINARY = ("mul", "div", "slope")
TERNARY = ("mul_grad", "div_grad")
UNARY = ("exp2", "log2", "sqrt")
LENGTHS = (0, 1, 7, 16, 17, 63, 65, 200)
FORBIDDEN = re.compile(
    r"\sv?(?:mul|div|sqrt|rsqrt|rcp|dp|fn?m(?:add|sub)|fmaddsub|fmsubadd)[0-9]*[ps][sdh]\s|\sv?pmul|\sv?pmadd"
)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def _check(name: str, operands: tuple[Tensor, ...], level: str, shift: int | None = 0) -> None:
    rest = () if shift is None else (shift,)
    ours = getattr(cpp_elementwise, name)(*operands, *rest, level=level)
    assert ours.is_contiguous()
    assert same(ours, getattr(reference, name)(*operands, *rest)), (name, level, shift)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", LENGTHS)
def test_products_quotients_and_slopes(n: int, shift: int, level: str) -> None:
    for number, (left, right) in enumerate(itertools.product(CONTENTS, repeat=2)):
        a, b = content(left, n, seed=1), content(right, n, seed=2)
        g = content(CONTENTS[number % 7], n, seed=3)
        for name in BINARY:
            _check(name, (a, b), level, shift)
        for name in TERNARY:
            _check(name, (g, a, b), level, shift)


@pytest.mark.parametrize("n", LENGTHS)
def test_functions_of_one_number(n: int, level: str) -> None:
    for given, own in itertools.product(CONTENTS, repeat=2):
        g, x = content(given, n, seed=1), content(own, n, seed=2)
        for name in UNARY:
            _check(name, (x,), level, None)
            _check(f"{name}_grad", (g, x), level, None)


@pytest.mark.parametrize("name", [*BINARY, *TERNARY, *UNARY])
def test_all_sorts_of_patterns(name: str, level: str) -> None:
    """All exponents with mantissas near their ends, among them the results of rounding, and random ones."""
    exponents = torch.arange(256, dtype=torch.int32) << 23
    mantissas = torch.tensor([0, 1, 2**22, 2**23 - 1], dtype=torch.int32)
    edges = (exponents[:, None] | mantissas).flatten()
    edges = torch.cat([edges, edges | -(2**31)]).view(torch.float32)
    x = torch.cat([edges, torch.linspace(-200, 200, 4001), torch.arange(-160.0, 160.0), content("patterns", 5000)])
    if name in UNARY:
        _check(name, (x,), level, None)
        _check(f"{name}_grad", (x.roll(77), x), level, None)
    else:
        operands = (x, x.roll(1234), x.flip(0))
        _check(name, operands[: 3 if name in TERNARY else 2], level, SHIFTS[1])


@pytest.mark.parametrize("place", [0, 31, 64, 128, 150])
@pytest.mark.parametrize("name", [*BINARY, *TERNARY])
def test_a_special_value_is_seen_wherever_it_stands(name: str, place: int, level: str) -> None:
    """Ranges decide a few vectors at a time: one value must not be lost among ordinary ones, nor harm them."""
    count = 3 if name in TERNARY else 2
    for value in (0.0, -0.0, 1e-39, 1e-30, 1e30, 3e38, float("inf"), -float("inf"), float("nan")):
        for i in range(count):
            operands = tuple(content("plain", 151, seed=seed) * (1e9 if seed != i else 1) for seed in range(count))
            operands[i][place] = value
            _check(name, operands, level)


@pytest.mark.parametrize("place", [0, 31, 64, 128, 150])
def test_exp2_near_its_limits(place: int, level: str) -> None:
    for value in (
        63.9,
        64.0,
        127.99,
        128.0,
        1e30,
        -126.5,
        -127.0,
        -1e-9,
        -1e30,
        float("inf"),
        -float("inf"),
        torch.nan,
    ):
        x = content("plain", 151)
        x[place] = value
        _check("exp2", (x,), level, None)
        for size in (1e-30, 1.0, 1e20, 1e38):
            _check("exp2_grad", (content("plain", 151, seed=1) * size, x), level, None)


def _layouts(kind: str, seed: int) -> list[Tensor]:
    """Tensors of shape (6, 33, 5) under all sorts of strides."""
    return [
        content(kind, 6, 33, 5, seed=seed),
        content(kind, seed=seed).expand(6, 33, 5),
        content(kind, 5, seed=seed).expand(6, 33, 5),
        content(kind, 6, 33, 1, seed=seed).expand(6, 33, 5),
        content(kind, 33, 1, seed=seed).expand(6, 33, 5),
        content(kind, 6, 1, 5, seed=seed).expand(6, 33, 5),
        content(kind, 5, 33, 6, seed=seed).permute(2, 1, 0),
        content(kind, 33, 6, 5, seed=seed).transpose(0, 1),
        content(kind, 6, 67, 5, seed=seed)[:, 1::2],
        content(kind, 6, 33, 11, seed=seed)[:, :, 1::2],
    ]


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_any_strides(kind: str, level: str) -> None:
    for a, b in itertools.product(_layouts(kind, 1), _layouts("zeros", 2)):
        _check("mul", (a, b), level)
        _check("div_grad", (b, a, b), level)
    for x in _layouts(kind, 1):
        _check("exp2", (x,), level, None)


@pytest.mark.parametrize(
    "shape", [(3, 700), (700, 3), (2, 300, 4), (2, 3, 257), (40, 17), (2, 1, 3, 1, 2, 1, 1, 2, 1, 4)]
)
def test_broadcast_rows_columns_and_scalars(shape: tuple[int, ...], level: str) -> None:
    """Long rows are cut into pieces, short ones put together."""
    full = content("wide", *shape, seed=1)
    column, row = full.sum(-1, keepdim=True).expand(shape), full.sum(0, keepdim=True).expand(shape)
    inner = content("wide", shape[-1], seed=2).expand(shape)
    scalar, strided = torch.tensor(1.7).expand(shape), content("wide", *shape, 2, seed=3)[..., 1]
    views = (full, column, row, inner, scalar, strided, full[..., :1].expand(shape))
    for a, b in itertools.product(views, repeat=2):
        _check("mul", (a, b), level)
        _check("mul_grad", (a, b, full), level)


def test_threads_do_not_change_the_result(level: str) -> None:
    """Whole tensors, short rows, long rows, and planes that threads share."""
    pairs = []
    for shape in ((50000,), (3001, 17), (11, 4001)):
        a, b = content("wide", *shape, seed=1), content("special", shape[-1], seed=2).expand(shape)
        pairs += [(a, b), (a, b.contiguous())]
    pairs.append((content("wide", 61, 1, 40).expand(61, 23, 40), torch.tensor(1.7).expand(61, 23, 40)))
    before = torch.get_num_threads()
    try:
        for (a, b), threads in itertools.product(pairs, (1, 2, 3)):
            torch.set_num_threads(threads)
            assert same(cpp_elementwise.mul(a, b, level=level), reference.mul(a, b)), (a.shape, threads)
    finally:
        torch.set_num_threads(before)


def test_no_broadcast_operand_is_written_out() -> None:
    x, scalar = torch.ones(300, 200), torch.tensor(1.5)
    for other in (scalar.expand_as(x), x[:, :1].expand_as(x), x[:1].expand_as(x)):
        with torch.profiler.profile(profile_memory=True) as profile:
            cpp_elementwise.mul(x, other)
        used = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
        assert used == x.numel() * 4


def test_operands_stay_as_they_are(level: str) -> None:
    a, b, c = (content("special", 1000, seed=seed) for seed in range(3))
    before = a.clone(), b.clone(), c.clone()
    cpp_elementwise.div_grad(a, b, c, level=level)
    assert all(same(x, y) for x, y in zip((a, b, c), before, strict=True))


def test_errors() -> None:
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"shape=\(3,\): must be \(2, 3\)"):
        cpp_elementwise.mul(a, a[0])
    with pytest.raises(ValueError, match=r"shape=\(3, 2\): must be \(2, 3\)"):
        cpp_elementwise.mul_grad(a, a, a.T)
    with pytest.raises(TypeError, match=r"dtype=torch\.float64: must be float32"):
        cpp_elementwise.mul(a, a.double())


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_compiled_code_multiplies_nothing(level: str, tmp_path: Path) -> None:
    native = cpp_elementwise.library(level)
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
