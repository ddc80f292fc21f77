"""The Triton face: what it refuses, which mode it picks, and its kernels (in a process of their own)."""

import re

import pytest
import torch

pytest.importorskip("triton")

from common.kernels.interpreter import SWITCH, interpreted, interpreting
from mulfree_training import reference
from mulfree_training.bits import FLOAT32, offset
from mulfree_training.kernels import triton_face
from mulfree_training.kernels.triton_matmul import CANDIDATES, GUARDED, MASKED, MODES, PLAIN

CASES = "mulfree_training/tests/triton_cases.py"
LIMIT = 600
MIN, INF, ABS, BIAS = FLOAT32.smallest, FLOAT32.infinity, FLOAT32.magnitude, FLOAT32.one


def run_cases(on):
    done = interpreted(["-m", "pytest", CASES, "-p", "no:cacheprovider", "-n", "0"], on=on, seconds=LIMIT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 150, done.stdout[-500:]


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 30)
def test_kernels_in_the_interpreter():
    run_cases(on=True)


@pytest.mark.timeout(LIMIT + 30)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_kernels_on_the_device():
    run_cases(on=False)


def test_tensors_on_the_cpu_are_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert "must be on cuda" in triton_face.refuses(torch.ones(2))
    monkeypatch.setenv(SWITCH, "1")
    assert interpreting() and triton_face.refuses(torch.ones(2)) is None


def test_dtypes_and_devices_it_cannot_serve(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    assert "float64" in triton_face.refuses(torch.ones(2, dtype=torch.float64))
    assert "bfloat16" in triton_face.refuses(torch.ones(2, dtype=torch.bfloat16))
    assert "must be on cuda" in triton_face.refuses(torch.ones(2, device="meta"))


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton_face, "_installed", lambda: False)
    assert "triton" in triton_face.refuses(torch.ones(2))


def samples(*shape):
    """Of a random range of magnitudes; sometimes with zeros, subnormal numbers or an infinity."""
    low, high = torch.randint(1, 255, (2,)).sort().values.tolist()
    x = torch.randint(low << 23, (high + 1) << 23, shape).clamp(max=INF - 1).to(torch.int32)
    x = x | (torch.randint(0, 2, shape).to(torch.int32) << 31)
    kind = torch.randint(0, 8, ()).item()
    if kind < 3:
        x[..., 0] = (0, 77, INF)[kind]
    return x.view(torch.float32)


def middle(*shape):
    """Of a few octaves around 1, where products stay normal."""
    x = samples(*shape)
    return torch.ldexp(1 + torch.rand(shape), torch.randint(-40, 40, shape)) if torch.rand(()) < 0.7 else x


def normal(x):
    size = x.view(torch.int32).long() & ABS
    return bool(((size >= MIN) & (size < INF)).all())


@pytest.mark.parametrize("alpha", [None, 1.0552, 0.7, 1.9])
def test_a_mode_promises_what_holds_for_every_pair(alpha):
    torch.manual_seed(1)
    shift, seen = offset(alpha), set()
    for _ in range(300):
        a, b = middle(1, 4, 3), middle(1, 3, 5)
        mode = triton_face.product_mode(a, b, shift)
        pairs = torch.broadcast_tensors(a[:, :, :, None], b[:, None])
        sums = sum((x.view(torch.int32).long() & ABS) for x in (y.contiguous() for y in pairs)) - BIAS + shift
        if mode == PLAIN:
            assert normal(a) and normal(b) and ((sums >= MIN) & (sums < INF)).all()
        if mode != GUARDED:
            assert all(x.isfinite().all() for x in (a, b, reference.mul(*(x.contiguous() for x in pairs), shift)))
        seen.add(mode)
    assert seen == set(MODES)


@pytest.mark.parametrize("alpha", [None, 1.0552, 0.7, 1.9])
def test_a_mode_of_slopes_promises_what_holds_for_every_triple(alpha):
    torch.manual_seed(2)
    shift, seen = offset(alpha), set()
    for _ in range(400):
        grad, a, b = middle(1, 4, 5), middle(1, 4, 3), middle(1, 3, 5)
        mode = triton_face.slope_mode(grad, a, b, shift)
        wide = (grad[:, :, None], a[:, :, :, None], b[:, None])
        g, i, j = (x.contiguous() for x in torch.broadcast_tensors(*wide))
        slopes = reference.slope(i, j, shift)
        product = reference.mul(g, slopes)
        if mode == PLAIN:
            assert all(normal(x) for x in (grad, b, slopes, product))
        if mode != GUARDED:
            assert all(x.isfinite().all() for x in (grad, b, slopes, product)) and not a.isnan().any()
        seen.add(mode)
    assert seen == set(MODES)


def test_every_kernel_and_mode_has_tiles():
    for modes in CANDIDATES.values():
        assert set(modes) == {PLAIN, MASKED, GUARDED}
        assert all(
            tiles and all(tile.rows % 16 == tile.columns % 16 == 0 for tile in tiles) for tiles in modes.values()
        )
