"""The face of plain PyTorch equals the reference bit for bit; its temporaries do not grow with the inner dimension."""

from __future__ import annotations

import itertools

import pytest
import torch

from mulfree_training import reference
from mulfree_training.kernels import torch_face
from mulfree_training.tests.contents import CONTENTS, EDGES, SHAPES, SHIFTS, content, near, same, views


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_reference(shape: tuple[int, int, int, int], shift: int) -> None:
    n, m, k, p = shape
    for left, right in itertools.product(CONTENTS, repeat=2):
        a, b = content(left, n, m, k, seed=1), content(right, n, k, p, seed=2)
        assert same(torch_face.matmul(a, b, shift), reference.matmul(a, b, shift)), (left, right)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_equal_the_reference(shape: tuple[int, int, int, int], shift: int) -> None:
    n, m, k, p = shape
    for number, (given, right) in enumerate(itertools.product(CONTENTS, repeat=2)):
        left = CONTENTS[number % 7]
        g, a, b = content(given, n, m, p, seed=1), content(left, n, m, k, seed=2), content(right, n, k, p, seed=3)
        truth = reference.matmul_grad(g, a, b, shift)
        assert same(torch_face.matmul_grad(g, a, b, shift), truth), (given, left, right)


@pytest.mark.parametrize("shift", SHIFTS)
def test_products_on_both_sides_of_the_range(shift: int) -> None:
    for i, j in EDGES:
        a, b, g = near(i, 1, 9, 3, seed=1), near(j, 1, 3, 10, seed=2), near(i, 1, 9, 10, seed=3)
        assert same(torch_face.matmul(a, b, shift), reference.matmul(a, b, shift)), (i, j)
        assert same(torch_face.matmul_grad(g, a, b, shift), reference.matmul_grad(g, a, b, shift)), (i, j)


@pytest.mark.parametrize("kind", ["plain", "zeros", "wide", "special"])
def test_any_strides(kind: str) -> None:
    lefts, rights, grads = views(kind, 2, 5, 9, 1), views("plain", 2, 9, 6, 2), views(kind, 2, 5, 6, 3)
    for (i, a), (j, b), (h, g) in zip(lefts.items(), reversed(rights.items()), grads.items(), strict=True):
        assert same(torch_face.matmul(a, b), reference.matmul(a, b)), (i, j)
        assert same(torch_face.matmul_grad(g, a, b), reference.matmul_grad(g, a, b)), (i, j, h)


def test_ordinary_operands_do_not_need_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the slow path ran")

    g, a, b = content("zeros", 2, 5, 6, seed=1), content("subnormal", 2, 5, 9, seed=2), content("tiny", 2, 9, 6, seed=3)
    product, derivative = reference.matmul(a, b), reference.matmul_grad(g, a, b)
    monkeypatch.setattr(reference, "matmul", refuse)
    monkeypatch.setattr(reference, "matmul_grad", refuse)
    assert same(torch_face.matmul(a, b), product)
    assert same(torch_face.matmul_grad(g, a, b), derivative)


@pytest.mark.parametrize("kind", ["plain", "zeros"])
def test_temporaries_are_as_large_as_the_result(kind: str) -> None:
    m, k, p = 64, 512, 64
    a, b = content(kind, 1, m, k), content(kind, 1, k, p)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch_face.matmul(a, b)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * m * k  # bytes: an operand's copy, where M * K * P would be 64 times as many


def test_the_face_is_complete() -> None:
    for name in (
        "mul", "div", "slope", "mul_grad", "div_grad", "exp2", "exp2_grad", "log2", "log2_grad", "sqrt", "sqrt_grad"
    ):  # fmt: skip
        assert getattr(torch_face, name) is getattr(reference, name)
