"""The Triton kernels against the reference, bit for bit; `test_triton.py` runs this file in its own process."""

import itertools

import pytest
import torch

from common.kernels.interpreter import interpreting
from mulfree_training import reference
from mulfree_training.bits import FLOAT32, offset, pattern
from mulfree_training.kernels import triton_elementwise, triton_face
from mulfree_training.kernels.triton_matmul import GUARDED, INTERPRETED, MASKED, PLAIN
from mulfree_training.operators import ops
from mulfree_training.primitives import pam_log, pam_mul
from mulfree_training.products import pam_matmul

DEVICE = "cpu" if interpreting() else "cuda"
SHIFTS = [0, offset(1.0552), offset(0.8)]
OPERANDS = triton_elementwise.OPERATIONS
SHIFTED = ("mul", "div", "slope", "mul_grad", "div_grad")
BLOCK = triton_elementwise.INTERPRETED
MIN, INF = FLOAT32.smallest, FLOAT32.infinity
PATTERNS = [
    *(0, 1, 0x400000, MIN - 1, MIN, MIN + 1, 2 * MIN - 1, 2 * MIN, pattern(1e-20), pattern(0.5), pattern(1.0) - 1),
    *(pattern(1.0), pattern(1.0) + 1, pattern(1.5), pattern(126.5), pattern(127.99), pattern(128.0), pattern(149.0)),
    *(pattern(3e9), pattern(1e30), INF - 1, INF, FLOAT32.nan, FLOAT32.magnitude),
]
SPECIAL = torch.tensor([*PATTERNS, *(x + FLOAT32.sign for x in PATTERNS)], dtype=torch.int32).view(torch.float32)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, so that what a kernel does not write is seen; the seed is fixed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def equal(found, truth):
    """Equal bit for bit, any NaN for any NaN; the result is contiguous."""
    assert found.shape == truth.shape and found.dtype == torch.float32 and found.is_contiguous()
    found, truth = found.cpu(), truth.cpu().contiguous()
    same = (found.view(torch.int32) == truth.view(torch.int32)) | (found.isnan() & truth.isnan())
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ, first: {found[~same][0]} for {truth[~same][0]}"


def bits(*shape):
    """Random patterns: every exponent, both signs, infinities and NaN."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).view(torch.float32)


def judge(operation, *operands, shift=0):
    rest = (shift,) if operation in SHIFTED else ()
    truth = getattr(reference, operation)(*operands, *rest)
    equal(getattr(triton_face, operation)(*(x.to(DEVICE) for x in operands), *rest), truth)


def shifts(operation):
    return SHIFTS if operation in SHIFTED else [0]


@pytest.mark.parametrize("operation", OPERANDS)
def test_random_patterns(operation):
    for shift in shifts(operation):
        judge(operation, *(bits(150_001) for _ in range(OPERANDS[operation])), shift=shift)


@pytest.mark.parametrize("operation", OPERANDS)
def test_all_combinations_of_special_values(operation):
    for shift in shifts(operation):
        judge(operation, *torch.cartesian_prod(*[SPECIAL] * OPERANDS[operation]).reshape(-1, OPERANDS[operation]).T,
              shift=shift)  # fmt: skip


@pytest.mark.parametrize("operation", OPERANDS)
def test_values_of_a_training_step(operation):
    for scale in (1e-3, 1.0, 40.0):
        for shift in shifts(operation):
            judge(operation, *(scale * torch.randn(20_000) for _ in range(OPERANDS[operation])), shift=shift)


@pytest.mark.parametrize("operation", ["exp2", "exp2_grad"])
def test_powers_at_integers_and_at_the_ends(operation):
    x = torch.cat([torch.arange(-160.0, 140.0, 0.25), *(torch.linspace(m - 1, m + 1, 999) for m in (-149, -126, 128))])
    grad = [torch.randn(x.shape)] if operation == "exp2_grad" else []
    judge(operation, *grad, x)


@pytest.mark.parametrize("operation", ["log2", "exp2", "mul", "mul_grad"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (17,), (33,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (0,), (3, 0), (5, 7, 3)]
)
def test_shapes(operation, shape):
    judge(operation, *(bits(*shape) for _ in range(OPERANDS[operation])))


@pytest.mark.parametrize("operation", ["sqrt", "div", "slope", "div_grad", "sqrt_grad"])
def test_strides(operation):
    n = OPERANDS[operation]
    layouts = [
        bits(9, 5).T, bits(5, 18)[:, ::2], bits(5, 9), bits(1, 9).expand(5, 9), bits(5, 1).expand(5, 9),
        bits(1).expand(5, 9), bits().expand(5, 9), bits(7, 11)[1:6, 1:10],
    ]  # fmt: skip
    for operands in itertools.islice(itertools.product(layouts, repeat=n), 0, None, 1 if n < 3 else 5):
        judge(operation, *operands)


def plain(*shape):
    return torch.randn(shape)


def zeros(*shape):
    return torch.where(torch.rand(shape) < 0.4, torch.where(torch.rand(shape) < 0.5, 0.0, -0.0), torch.randn(shape))


def tiny(*shape):
    """Products on both sides of the smallest normal number; some operands below it."""
    x = torch.randn(shape).exp2() * 2.0**-63
    return torch.where(torch.rand(shape) < 0.1, 1e-40, torch.where(torch.rand(shape) < 0.5, x, -x))


def huge(*shape):
    """Products on both sides of the largest number."""
    return torch.randn(shape) * 2.0**64


def special(*shape):
    return torch.where(torch.rand(shape) < 0.1, SPECIAL[torch.randint(len(SPECIAL), shape)], torch.randn(shape))


CONTENTS = {plain: PLAIN, zeros: MASKED, tiny: MASKED, huge: GUARDED, special: GUARDED, bits: GUARDED}
SHAPES = [(1, 1, 1, 1), (2, 17, 5, 33), (1, 33, 17, 1), (2, 1, 6, 17)]


def judge_matmul(a, b, shift=0):
    equal(triton_face.matmul(a.to(DEVICE), b.to(DEVICE), shift), reference.matmul(a, b, shift))


def judge_grad(grad, a, b, shift=0):
    found = triton_face.matmul_grad(grad.to(DEVICE), a.to(DEVICE), b.to(DEVICE), shift)
    equal(found, reference.matmul_grad(grad, a, b, shift))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("content", CONTENTS)
def test_matmul(content, shift):
    for n, m, k, p in SHAPES:
        a, b = content(n, m, k), content(n, k, p)
        judge_matmul(a, b, shift)
    assert triton_face.product_mode(content(2, 20, 30), content(2, 30, 20), shift) == CONTENTS[content]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("content", CONTENTS)
def test_matmul_grad(content, shift):
    for n, m, k, p in SHAPES:
        judge_grad(content(n, m, p), content(n, m, k), content(n, k, p), shift)
    found = triton_face.slope_mode(content(2, 20, 20), content(2, 20, 30), content(2, 30, 20), shift)
    assert found == CONTENTS[content]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("edge", [MIN - 1, MIN, MIN + 1, INF - 1, INF, INF + 1])
def test_around_the_smallest_and_the_largest_number(edge, shift):
    def single(size):
        return torch.tensor([[[size]]], dtype=torch.int32).view(torch.float32)

    for value in (1.0, 1.75, 1e-10, 1e10):
        one = pattern(value)
        other = min(edge - one + FLOAT32.one - shift, INF - 1)
        judge_matmul(single(one), single(other), shift)  # the product is at the edge
        judge_matmul(single(other), single(one), shift)
        judge_matmul(single(edge), single(one), shift)  # an operand is
        judge_matmul(single(one), single(edge), shift)
        power = one & ~FLOAT32.mantissa
        judge_grad(single(min(edge - power + FLOAT32.one, INF - 1)), single(pattern(1.0)), single(power))
        for own in (1.0, 1.99, 0.0):
            judge_grad(single(edge), single(pattern(own)), single(one), shift)
            judge_grad(single(one), single(pattern(own)), single(edge), shift)
            judge_grad(single(pattern(own)), single(edge), single(one), shift)


def test_zeros_among_the_weights_of_a_derivative_need_no_mask():
    assert triton_face.slope_mode(plain(1, 9, 9), zeros(1, 9, 9), plain(1, 9, 9), 0) == PLAIN
    judge_grad(plain(1, 9, 9), zeros(1, 9, 9), plain(1, 9, 9))
    judge_grad(plain(1, 9, 9), torch.where(zeros(1, 9, 9) == 0, torch.inf, 1.5), plain(1, 9, 9))


@pytest.mark.parametrize("one", CONTENTS)
@pytest.mark.parametrize("other", CONTENTS)
def test_operands_of_different_kinds(one, other):
    judge_matmul(one(1, 16, 5), other(1, 5, 16))
    judge_grad(one(1, 16, 4), other(1, 16, 16), one(1, 16, 4), SHIFTS[1])
    judge_grad(one(1, 16, 4), one(1, 16, 16), other(1, 16, 4))
    judge_grad(other(1, 16, 4), one(1, 16, 16), one(1, 16, 4), SHIFTS[2])


@pytest.mark.parametrize("mode", [MASKED, GUARDED])
def test_a_mode_for_more_gives_the_same_bits(mode, monkeypatch):
    monkeypatch.setattr(triton_face, "product_mode", lambda *_: mode)
    monkeypatch.setattr(triton_face, "slope_mode", lambda *_: mode)
    for content, shift in ((plain, 0), (plain, SHIFTS[2]), (zeros, SHIFTS[1]), (tiny, 0), (tiny, SHIFTS[2])):
        judge_matmul(content(1, 17, 9), content(1, 9, 16), shift)
        judge_grad(content(1, 17, 9), content(1, 17, 16), content(1, 16, 9), shift)


@pytest.mark.parametrize("content", [plain, zeros, special])
def test_strides_of_matrices(content):
    def layouts(n, m, k):
        yield content(n, k, m).mT
        yield content(m, n, k).transpose(0, 1)
        yield content(n, m, 2 * k)[:, :, ::2]
        yield content(1, m, k).expand(n, m, k)
        yield content(n, m, 1).expand(n, m, k)

    pairs = itertools.product(layouts(2, 9, 3), layouts(2, 3, 18))
    for a, b in itertools.islice(pairs, 0, None, 2):
        judge_matmul(a, b)
    for grad, a, b in zip(layouts(2, 5, 3), layouts(2, 5, 18), layouts(2, 18, 3), strict=True):
        judge_grad(grad, a, b)
        judge_grad(grad.mT, b.mT, a.mT, SHIFTS[1])


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 3, 2, 4), (2, 0, 3, 4), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_empty_dimensions(shape):
    n, m, k, p = shape
    judge_matmul(plain(n, m, k), plain(n, k, p))
    judge_grad(plain(n, m, p), plain(n, m, k), plain(n, k, p))


def test_sums_in_the_order_of_the_inner_index():
    values = torch.tensor([1.0, 2.0**25, 1.0, -(2.0**25), 1.0, 3.0])
    for order in itertools.islice(itertools.permutations(range(6)), 0, None, 37):
        a = values[list(order)].expand(1, 1, 6)
        found = triton_face.matmul(a.to(DEVICE), torch.ones(1, 6, 1, device=DEVICE))
        total = 0.0
        for x in a[0, 0]:
            total = total + x  # float32, one after the other
        assert found.item() == total.item()


def test_more_batches_than_a_grid_holds(monkeypatch):
    monkeypatch.setattr(triton_face, "LARGEST_GRID", 3)
    judge_matmul(plain(8, 5, 6), plain(8, 6, 7))
    judge_grad(zeros(8, 5, 7), zeros(8, 5, 6), zeros(8, 6, 7))


def test_more_columns_than_a_grid_holds_are_refused(monkeypatch):
    monkeypatch.setattr(triton_face, "LARGEST_GRID", 1)
    with pytest.raises(ValueError, match="columns=33: must be <= 32"):
        triton_face.matmul(plain(1, 2, 3).to(DEVICE), plain(1, 3, 33).to(DEVICE))


def test_errors():
    a, b = plain(2, 3, 4), plain(2, 4, 5)
    with pytest.raises(ValueError, match=r"b.shape=\(2, 5, 4\): must be \(2, 4, P\)"):
        triton_face.matmul(a, b.mT)
    with pytest.raises(ValueError, match=r"grad.shape=\(2, 3, 4\): must be \(2, 3, 5\)"):
        triton_face.matmul_grad(a, a, b)
    with pytest.raises(ValueError, match=r"b.shape=\(2, 3, 4\): must be \(2, 4, P\)"):
        triton_face.matmul_grad(plain(2, 3, 5), a, a)
    with pytest.raises(ValueError, match=r"shape=\(2, 4, 5\): must be \(2, 3, 4\)"):
        triton_face.mul(a, b)
    for call in (triton_face.matmul, triton_face.mul):
        with pytest.raises(TypeError, match="dtype=torch.float64: must be float32"):
            call(a, b.double())


def test_the_tiles_of_the_interpreter_are_several():
    assert INTERPRETED.rows < 17 and INTERPRETED.columns < 33


@pytest.mark.parametrize("derivative", ["approx", "exact"])
def test_gradients_through_the_operators(derivative):
    def run(backend, device):
        leaves = [x.detach().to(device).requires_grad_() for x in (a, b, c)]
        y = pam_matmul(leaves[0], leaves[1], derivative=derivative, backend=backend)
        y = pam_mul(y, leaves[2], derivative=derivative, alpha=1.0552, backend=backend)
        y = pam_log(y.abs() + 1, derivative=derivative, backend=backend)
        return [y.detach().contiguous(), *(g.contiguous() for g in torch.autograd.grad(y, leaves, grad.to(device)))]

    a, b, c, grad = plain(2, 5, 7), zeros(7, 6), plain(6), plain(2, 5, 6)
    for found, truth in zip(run("triton", DEVICE), run("reference", "cpu"), strict=True):
        equal(found, truth)


def test_rows_are_composed_of_the_kernels():
    x, grad = 3 * plain(4, 19), plain(4, 19)
    x[1, 3:9] = -torch.inf
    equal(ops.softmax(x.to(DEVICE), 0, "triton"), reference_of("softmax", x, 0))
    equal(ops.softmax_grad(grad.to(DEVICE), x.to(DEVICE), 0, True, "triton"),
          reference_of("softmax_grad", grad, x, 0, True))  # fmt: skip


def reference_of(name, *arguments):
    return getattr(ops, name)(*arguments, "reference")
