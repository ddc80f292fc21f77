"""Every face that this machine has equals the reference, bit for bit, on every operator."""

import pytest
import torch

from common.kernels.native import compiler
from mulfree_training import operators, reference
from mulfree_training.bits import FLOAT32, offset
from mulfree_training.operators import ops, pick
from mulfree_training.tests.bitwise import INF, SPECIAL, assert_same, ordinary, pairs, random_patterns

CHUNK, CHUNKS = 1 << 20, 10
SHIFTS = (0, offset(1.0552), offset(0.6))
UNARY, BINARY = ("exp2", "log2", "sqrt"), ("mul", "div", "slope")
UNARY_GRADS, BINARY_GRADS = ("exp2_grad", "log2_grad", "sqrt_grad"), ("mul_grad", "div_grad")
SHIFTED = (*BINARY, *BINARY_GRADS)
EDGES = SPECIAL[::3]
"""Few enough for all triples."""

needs_compiler = pytest.mark.skipif(compiler("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(params=[pytest.param("cpp", marks=needs_compiler), "torch"])
def face(request):
    return request.param


def results(x):
    return x if isinstance(x, tuple) else (x,)


def equal(name, face, *operands, rest=()):
    operator = getattr(ops, name)
    found, truth = operator(*operands, *rest, face), operator(*operands, *rest, "reference")
    for own, expected in zip(results(found), results(truth), strict=True):
        if expected is None:
            assert own is None
        else:
            assert_same(own, expected, *(x for x in operands if x is not None and x.shape == expected.shape))


def rests(name):
    return [(shift,) for shift in SHIFTS] if name in SHIFTED else [()]


@pytest.mark.parametrize("name", ["mul", "div"])
def test_ten_million_random_patterns(name, face):
    for chunk in range(CHUNKS):
        a, b = random_patterns(CHUNK, 2 * chunk), random_patterns(CHUNK, 2 * chunk + 1)
        equal(name, face, a, b, rest=(SHIFTS[chunk % 3],))


@pytest.mark.parametrize("name", ["slope", *UNARY, *UNARY_GRADS, *BINARY_GRADS])
def test_a_million_random_patterns(name, face):
    count = 1 + name.endswith("_grad") + (name in SHIFTED)
    count = 2 if name == "slope" else count
    for seed, rest in enumerate(rests(name)):
        equal(name, face, *(random_patterns(CHUNK, 100 * seed + i) for i in range(count)), rest=rest)


@pytest.mark.parametrize("octaves", [1, 8, 40, 70, 120])
@pytest.mark.parametrize("name", [*BINARY, *UNARY, *UNARY_GRADS, *BINARY_GRADS])
def test_ordinary_numbers_of_narrow_and_wide_ranges(name, octaves, face):
    count = 1 + name.endswith("_grad") + (name in SHIFTED)
    count = 2 if name == "slope" else count
    for rest in rests(name):
        for n in (1, 7, 16, 1000):
            equal(name, face, *(ordinary(n, seed=i, octaves=octaves) for i in range(count)), rest=rest)


@pytest.mark.parametrize("name", [*BINARY, *UNARY, *UNARY_GRADS])
def test_all_pairs_of_special_values(name, face):
    operands = (SPECIAL,) if name in UNARY else pairs(SPECIAL)
    for rest in rests(name):
        equal(name, face, *operands, rest=rest)


@pytest.mark.parametrize("name", BINARY_GRADS)
def test_all_triples_of_special_values(name, face):
    for rest in rests(name):
        equal(name, face, *pairs(EDGES, 3), rest=rest)


def views():
    """Pairs of equal shapes and all sorts of strides."""
    x = ordinary(6, 8, seed=1)
    return [
        (x, ordinary(8, 6, seed=2).T), (x[:, :1].expand(6, 8), x), (x, x[:1].expand(6, 8)),
        (x[::2, 1::3], x[1::2, ::3]), (x[0, 0].expand(6, 8), x), (x[0, 0].expand(6, 8), x[1, 1].expand(6, 8)),
        (ordinary(2, 3, 4, 5, seed=3).permute(3, 0, 2, 1), ordinary(5, 2, 4, 3, seed=4)),
        (ordinary(3, 1, 2, 1, 2, seed=5).expand(3, 2, 2, 3, 2), ordinary(1, 2, 1, 3, 1, seed=6).expand(3, 2, 2, 3, 2)),
        (x[:0], x[:0]), (x[0, 0], x[1, 1]), (x[:, 3], x[:, 5]), (x.flip(0), x.flip(1)),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(12))
def test_any_strides(number, face):
    a, b = views()[number]
    for name in BINARY:
        equal(name, face, a, b, rest=(0,))
        equal(name, face, b, a, rest=(SHIFTS[1],))
    for name in BINARY_GRADS:
        equal(name, face, a, b, a, rest=(0,))
        equal(name, face, b, b, a, rest=(SHIFTS[1],))
    for name in UNARY:
        equal(name, face, a)
        equal(f"{name}_grad", face, a, b)


def content(kind, *shape, seed):
    x = ordinary(*shape, seed=seed)
    if kind == "patterns":
        return random_patterns(x.numel(), seed).view(shape)
    if kind == "zeros":
        return torch.where(ordinary(*shape, seed=seed + 50) > 0, x, 0.0 * x)
    if kind == "masked":
        return torch.where(ordinary(*shape, seed=seed + 50) > 0, x, -INF)
    if kind == "far":
        return ordinary(*shape, seed=seed, octaves=70)
    return x


@pytest.mark.parametrize("kind", ["ordinary", "zeros", "far", "patterns"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 5), (1, 33, 9, 40), (2, 4, 0, 3), (0, 2, 3, 4)])
def test_matrix_products(shape, kind, face):
    n, m, k, p = shape
    g, a, b = (content(kind, *x, seed=i) for i, x in enumerate(((n, m, p), (n, m, k), (n, k, p))))
    for shift in SHIFTS:
        equal("matmul", face, a, b, rest=(shift,))
        equal("matmul_grad", face, g, a, b, rest=(shift,))
        equal("matmul_grad", face, g.mT, b.mT, a.mT, rest=(shift,))


@pytest.mark.parametrize("kind", ["ordinary", "zeros", "masked", "far", "patterns"])
@pytest.mark.parametrize("n", [1, 5, 16, 17, 40, 64, 100])
def test_rows(n, kind, face):
    g, x = content("ordinary", 9, n, seed=1), content(kind, 9, n, seed=2)
    x[3] = -INF if kind == "masked" else 0.0
    w, b = ordinary(n, seed=3), ordinary(n, seed=4)
    for shift in SHIFTS:
        equal("softmax", face, x, rest=(shift,))
        equal("log_softmax", face, x, rest=(shift,))
        for exact in (False, True):
            equal("softmax_grad", face, g, x, rest=(shift, exact))
            equal("layer_norm_grad", face, g, x, w, rest=(1e-5, shift, exact))
            equal("layer_norm_grad", face, g, x, None, rest=(0.0, shift, exact))
            for exact_log2 in (False, True):
                equal("log_softmax_grad", face, g, x, rest=(shift, exact, exact_log2))
        for weights in ((w, b), (w, None), (None, b), (None, None)):
            equal("layer_norm", face, x, *weights, rest=(1e-5, shift))
    equal("softmax", face, x.T.contiguous().T[::2], rest=(0,))
    equal("softmax_grad", face, g[0].expand(9, n), x.T.contiguous().T, rest=(0, False))


@pytest.mark.parametrize("kind", ["ordinary", "zeros", "far", "patterns"])
def test_adamw(kind, face):
    shapes = [(3, 5), (17,), (), (64, 3), (0,)]
    numbers = (0.9, 0.1, 0.98, 0.02, 1e-8, 0.01, 3e-3)
    start = [[content(kind, *s, seed=10 * i + j) for j, s in enumerate(shapes)] for i in range(4)]
    start[3] = [x.abs() for x in start[3]]
    ends = []
    for name in (face, "reference"):
        own = [[x.clone() for x in xs] for xs in start]
        for decay in (0.0, 0.01):
            ops.adamw_(*own, *numbers[:5], decay, numbers[6], name)
        ends.append(own)
    for found, truth in zip(*ends, strict=True):
        for x, y in zip(found, truth, strict=True):
            assert_same(x, y)


@needs_compiler
def test_threads_do_not_change_the_result():
    """Work enough that the kernels share it out: more than 32 thousand entries."""
    a, b = (random_patterns(1 << 17, seed).view(256, 512) for seed in (1, 2))
    x, g = ordinary(256, 512, seed=3), ordinary(256, 512, seed=4)
    calls = {"mul": (a, b, 0), "exp2": (a,), "softmax": (x, 0), "softmax_grad": (g, x, 0, True),
             "layer_norm_grad": (g, x, b[0], 1e-5, 0, True)}  # fmt: skip
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([getattr(ops, name)(*operands, "cpp") for name, operands in calls.items()])
    finally:
        torch.set_num_threads(before)
    for several in found[1:]:
        for own, one in zip(several, found[0], strict=True):
            for y, truth in zip(results(own), results(one), strict=True):
                assert_same(y, truth)


def test_results_are_contiguous_and_operands_unchanged(face):
    a, b = ordinary(5, 7, seed=1).T, ordinary(7, 5, seed=2)
    copies = a.clone(), b.clone()
    for name in BINARY:
        assert getattr(ops, name)(a, b, 0, face).is_contiguous()
    assert ops.softmax(a, 0, face).shape == (7, 5) and ops.exp2(a, face).shape == (7, 5)
    assert_same(a, copies[0])
    assert_same(b, copies[1])


def test_the_fastest_face_is_picked():
    expected = "torch" if compiler("c++") is None else "cpp"
    assert pick(torch.ones(1)) == expected
    assert pick(torch.ones(1, dtype=torch.float64)) == pick(torch.ones(1).to("meta").double()) == "reference"
    assert pick(torch.ones(1, device="meta")) == "torch"
    for name in operators.FACES[2:]:
        assert pick(torch.ones(1), name) == name
    assert operators.face("reference") is reference


def test_every_operator_reaches_the_face_that_is_named(monkeypatch):
    """Else all the comparisons above would compare the reference with itself."""
    chosen = operators.face("torch")
    for name in ("mul", "exp2", "matmul"):
        monkeypatch.setattr(chosen, name, lambda x, *_: torch.full_like(x, 7.0))
    x = ordinary(1, 3, 3, seed=1)
    assert (ops.mul(x, x, 0, "torch") == 7).all() and (ops.exp2(x, "torch") == 7).all()
    assert (ops.matmul(x, x, 0, "torch") == 7).all()
    assert not (ops.mul(x, x, 0, "reference") == 7).any()
    # and the formulas run on it
    assert (ops.softmax(x, 0, "torch") != ops.softmax(x, 0, "reference")).any()


def test_random_patterns_hold_every_kind():
    x = random_patterns(CHUNK, 1)
    size = x.view(torch.int32) & FLOAT32.magnitude
    kinds = [x.isnan(), size < FLOAT32.smallest, x.isfinite(), x < 0, (size > 0) & (size < FLOAT32.smallest)]
    assert all(kind.any() for kind in kinds)
    assert {0.0, INF, -INF} <= set(SPECIAL.tolist())
