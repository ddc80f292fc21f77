"""The fused C++ rows and the C++ AdamW equal the formulas over the reference bit for bit."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from common.kernels.native import compiler
from mulfree_training import formulas, reference
from mulfree_training.formulas import AdamWNumbers
from mulfree_training.kernels import cpp, cpp_rows
from mulfree_training.tests.contents import CONTENTS, SHIFTS, content, same

pytestmark = pytest.mark.skipif(compiler("c++") is None, reason="needs a C++ compiler")
ORDER = ("avx512", "avx2", "generic")
LEVELS = ORDER[ORDER.index(cpp.instruction_set()) :]
LENGTHS = (1, 2, 10, 15, 16, 17, 33, 64, 100, 257)
KINDS = (*CONTENTS, "masked", "constant", "large", "low")
FORBIDDEN = re.compile(
    r"\sv?(?:mul|div|sqrt|rsqrt|rcp|dp|fn?m(?:add|sub)|fmaddsub|fmsubadd)[0-9]*[ps][sdh]\s|\sv?pmul|\sv?pmadd"
)
INF = float("inf")


def _content(kind: str, rows: int, n: int, seed: int) -> Tensor:
    if kind == "masked":  # and some rows of nothing but -inf
        x = content("plain", rows, n, seed=seed)
        x = torch.where(content("plain", rows, n, seed=seed + 50) > 0, -INF, x)
        x[::3] = -INF
        return x
    if kind == "constant":
        return torch.full((rows, n), 1.7)
    if kind == "large":  # near the bounds of what needs no guard
        return content("plain", rows, n, seed=seed) * 2.0 ** (torch.arange(rows) * 6.0 + 8)[:, None]
    if kind == "low":  # finite, but -inf times log2 e
        return torch.full((rows, n), -3.3e38)
    return content(kind, rows, n, seed=seed)


def _calls(g: Tensor, x: Tensor, w: Tensor, b: Tensor, eps: float, shift: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Every function with every choice that it has."""
    calls: list[tuple[str, tuple[Any, ...]]] = [("softmax", (x, shift)), ("log_softmax", (x, shift))]
    for exact in (False, True):
        calls.append(("softmax_grad", (g, x, shift, exact)))
        calls += [("log_softmax_grad", (g, x, shift, exact, exact_log2)) for exact_log2 in (False, True)]
        calls += [("layer_norm_grad", (g, x, weight, eps, shift, exact)) for weight in (w, None)]
    return calls + [("layer_norm", (x, *pair, eps, shift)) for pair in ((w, b), (w, None), (None, b), (None, None))]


def _check(g: Tensor, x: Tensor, w: Tensor, b: Tensor, eps: float, shift: int, levels: tuple[str, ...]) -> None:
    for name, arguments in _calls(g, x, w, b, eps, shift):
        truth = getattr(formulas, name)(reference, *arguments)
        for level in levels:
            ours = getattr(cpp_rows, name)(*arguments, level=level)
            assert _same(ours, truth), (name, level, arguments[-3:])


def _same(ours: Any, truth: Any) -> bool:
    if isinstance(truth, tuple):
        return all(_same(x, y) for x, y in zip(ours, truth, strict=True))
    return ours is None if truth is None else ours.is_contiguous() and same(ours, truth)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", LENGTHS)
def test_rows_of_every_kind(n: int, shift: int) -> None:
    """A gradient and a weight of another kind each time."""
    for number, kind in enumerate(KINDS):
        others = KINDS[(number + n) % len(KINDS)], KINDS[(5 * number + n // 3) % len(CONTENTS)]
        g, x = _content(others[0], 9, n, 1), _content(kind, 9, n, 2)
        w, b = content(others[1], n, seed=3), content("plain", n, seed=4)
        _check(g, x, w, b, 1e-5, shift, LEVELS)


@pytest.mark.parametrize("kind", ["plain", "masked", "zeros", "tiny", "constant", "special"])
@pytest.mark.parametrize("n", [10, 17, 40])
def test_ordinary_gradients(n: int, kind: str) -> None:
    """More rows than a group has, and layer norms without eps."""
    g, x = content("zeros" if kind == "zeros" else "plain", 35, n, seed=1), _content(kind, 35, n, 2)
    _check(g, x, content("plain", n, seed=3), content("plain", n, seed=4), 0.0, 0, LEVELS)


def test_shares_that_vanish_step_by_step() -> None:
    """e over the sum is a number, but over it again it is 0: only a gradient there shows what became of it."""
    g, x = torch.zeros(2, 40, 33)
    g[:, 3], x[:, 3] = 1e9, torch.linspace(-80, -90, 40)
    _check(g, x, torch.ones(33), torch.ones(33), 1e-5, 0, LEVELS)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-38, 1e10, INF, float("nan"), -1.0])
def test_layer_norm_of_any_eps(eps: float) -> None:
    for kind in ("plain", "constant", "tiny"):
        _check(
            content("plain", 3, 20),
            _content(kind, 3, 20, 2),
            content("zeros", 20),
            content("plain", 20),
            eps,
            0,
            LEVELS,
        )


@pytest.mark.parametrize("n", [1100, 4100])
def test_long_rows(n: int) -> None:
    for kind in ("plain", "special"):
        g, x = content("plain", 3, n, seed=1), content(kind, 3, n, seed=2)
        _check(g, x, content("plain", n, seed=3), content("plain", n, seed=4), 1e-5, SHIFTS[1], LEVELS)


@pytest.mark.parametrize("place", [(0, 0), (5, 16), (17, 36), (19, 3)])
def test_a_special_value_is_seen_wherever_it_stands(place: tuple[int, int]) -> None:
    for value in (INF, -INF, float("nan"), -float("nan"), 1e30, -1e30, 1e-39):
        for i in range(2):
            g, x = content("plain", 20, 37, seed=1), content("plain", 20, 37, seed=2)
            (g, x)[i][place] = value
            _check(g, x, content("plain", 37, seed=3), content("plain", 37, seed=4), 1e-5, 0, LEVELS)
    w = content("plain", 37, seed=3)
    w[place[1]] = INF
    _check(content("plain", 2, 37), content("plain", 2, 37), w, w, 1e-5, 0, LEVELS)


def test_any_strides() -> None:
    n = 21
    layouts = [
        content("zeros", 4, 3, n),
        content("zeros", 4, n, 3).mT,
        content("zeros", 4, 3, 2 * n)[..., :n],
        content("zeros", 4, 3, 2 * n)[..., ::2],
        content("zeros", 3, 4, n).transpose(0, 1),
        content("zeros", 1, 1, n).expand(4, 3, n),
        content("zeros", 4, 3, 1).expand(4, 3, n),
        content("zeros", 4, 5, n)[:, ::2],
    ]
    for g, x in zip(layouts, reversed(layouts), strict=True):
        w, b = content("plain", 2 * n, seed=3)[::2], torch.ones(1).expand(n)
        _check(g, x, w, b, 1e-5, 0, LEVELS)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (7,), (1, 1)])
def test_few_entries_or_none(shape: tuple[int, ...]) -> None:
    g, x, w = content("plain", *shape, seed=1), content("plain", *shape, seed=2), content("plain", shape[-1], seed=3)
    if shape[-1]:
        _check(g, x, w, w, 1e-5, 0, LEVELS)
    else:  # a row without entries has no maximum in PyTorch
        for name, arguments in _calls(g, x, w, w, 1e-5, 0):
            ours = getattr(cpp_rows, name)(*arguments)
            assert (ours[0] if isinstance(ours, tuple) else ours).shape == shape


@pytest.mark.parametrize("n", [17, 300, 5000])
def test_threads_do_not_change_the_result(n: int) -> None:
    rows = 36000 // n + 1
    g, x, w = (content("plain", *shape, seed=n) for shape in ((rows, n), (rows, n), (n,)))
    x[5] = content("special", n)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            calls = _calls(g, x, w, w, 1e-5, 0)
            found[threads] = [getattr(cpp_rows, name)(*arguments) for name, arguments in calls]
    finally:
        torch.set_num_threads(before)
    truth = [getattr(formulas, name)(reference, *arguments) for name, arguments in _calls(g, x, w, w, 1e-5, 0)]
    for threads, results in found.items():
        assert all(_same(ours, true) for ours, true in zip(results, truth, strict=True)), threads


def test_row_errors() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"grad\.shape=\(3,\): must be \(2, 3\)"):
        cpp_rows.softmax_grad(x[0], x)
    with pytest.raises(ValueError, match=r"weight\.shape=\(2,\): must be \(3,\)"):
        cpp_rows.layer_norm(x, x[:, 0])
    with pytest.raises(ValueError, match=r"x\.shape=\(\): must have a last dimension"):
        cpp_rows.softmax(x[0, 0])
    with pytest.raises(TypeError, match=r"dtype=torch\.float64: must be float32"):
        cpp_rows.log_softmax_grad(x, x.double())


SIZES = ((3,), (17,), (5, 7), (100,), (), (0,), (64, 3))
STEP = AdamWNumbers(0.9, 0.1, 0.999, 0.001, 1e-8, 1e-3, 1e-2)


def _adamw_case(kinds: tuple[str, ...], *, signed: bool = False) -> list[list[Tensor]]:
    columns = [[content(kind, *size, seed=i) for size in SIZES] for i, kind in enumerate(kinds)]
    return columns if signed else [*columns[:3], [v.abs() for v in columns[3]]]


def _check_adamw(columns: list[list[Tensor]], numbers: AdamWNumbers, levels: tuple[str, ...]) -> None:
    truth = [formulas.adamw(reference, p, g, m, v, numbers) for p, g, m, v in zip(*columns, strict=True)]
    for level in levels:
        ours = [[x.clone() for x in column] for column in columns]
        cpp_rows.adamw_(ours[0], ours[1], ours[2], ours[3], numbers, level=level)
        assert all(same(x, y) for x, y in zip(ours[1], columns[1], strict=True))
        for param, m, v, true in zip(ours[0], ours[2], ours[3], truth, strict=True):
            assert all(same(x, y) for x, y in zip((param, m, v), true, strict=True)), (level, numbers)


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_adamw_of_every_kind(kind: str, decay: float) -> None:
    numbers = STEP._replace(decay=decay)
    for i in range(4):
        kinds = ["plain"] * 4
        kinds[i] = kind
        _check_adamw(_adamw_case(tuple(kinds)), numbers, LEVELS)
    _check_adamw(_adamw_case((kind, *CONTENTS[2:5])), numbers, LEVELS)
    _check_adamw(_adamw_case(("plain", "plain", "plain", kind), signed=True), numbers, LEVELS)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta1": 0.0, "rest1": 1.0},
        {"beta2": 0.0, "rest2": 1.0},
        {"beta2": 1.0, "rest2": 0.0, "eps": 2**-24 + 2**-50},
        {"eps": 0.0},
        {"eps": 1e-30},
        {"eps": 1e-40},
        {"eps": INF},
        {"step_size": 3e8},
        {"step_size": -1.0, "decay": -0.5},
        {"step_size": float("nan")},
        {"decay": 1e-60},
    ],
)
def test_adamw_of_any_numbers(changes: dict[str, float]) -> None:
    for kinds in (("plain",) * 4, ("wide", "zeros", "wide", "zeros"), ("plain", "tiny", "huge", "nothing")):
        columns = _adamw_case(kinds)
        columns[3][3][:50] = 1.0
        _check_adamw(columns, STEP._replace(**changes), LEVELS)


def test_adamw_near_the_bounds_of_what_needs_no_guard() -> None:
    sizes = torch.tensor([2.0**k for k in range(-126, 128)])
    for value, other in itertools.product(("tiny", "plain", "huge"), repeat=2):
        x = sizes.roll(99)
        columns = [[x * content(value, 254, seed=k).sign()] for k in range(3)] + [[sizes]]
        columns[1][0] = content(other, 254, seed=9)
        _check_adamw(columns, STEP._replace(eps=0.0), LEVELS)
        _check_adamw([columns[0], [sizes], columns[2], [sizes.flip(0)]], STEP, LEVELS)
    # small roots below moments that are just small enough
    columns = [[content("tiny", 254)], [content("tiny", 254, seed=1)], [sizes.roll(-152)], [sizes]]
    for step_size in (1.0, 3e8):
        _check_adamw(columns, STEP._replace(eps=0.0, step_size=step_size), LEVELS)


def test_threads_do_not_change_adamw() -> None:
    sizes = ((30000,), (1,), (10, 7), (20001,), (0,), (100,))
    columns = [[content("plain", *size, seed=i) for size in sizes] for i in range(4)]
    columns[3] = [v.abs() for v in columns[3]]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            _check_adamw(columns, STEP, LEVELS[:1])
    finally:
        torch.set_num_threads(before)


def test_adamw_errors() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"len\(ms\)=2: must be 1"):
        cpp_rows.adamw_([x], [x], [x, x], [x], STEP)
    with pytest.raises(ValueError, match=r"vs: shape=\(2,\): must be \(3, 2\)"):
        cpp_rows.adamw_([x], [x], [x], [x[0]], STEP)
    with pytest.raises(ValueError, match=r"grads: strides=\(1, 3\): must be those of a contiguous tensor"):
        cpp_rows.adamw_([x], [torch.zeros(2, 3).T], [x], [x], STEP)
    with pytest.raises(TypeError, match=r"dtype=torch\.float64: must be float32"):
        cpp_rows.adamw_([x.double()], [x], [x], [x], STEP)
    cpp_rows.adamw_([], [], [], [], STEP)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("source", ["softmax.cpp", "norm.cpp", "adamw.cpp"])
def test_the_compiled_code_multiplies_nothing(source: str, level: str) -> None:
    """The pattern is proven on a control by the test of the primitives."""
    native = cpp_rows.library(source, level)
    assert native is not None
    command = ["objdump", "-d", "--no-show-raw-insn", native._name]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(listing) > 10000
    assert not FORBIDDEN.findall(listing)
