"""The Triton face: what it refuses, its table of ranges, and its kernels (in a process of their own)."""

import re

import pytest
import torch

from common.kernels.interpreter import SWITCH, interpreted, interpreting
from sparse_flash_attention.kernels import triton_face
from sparse_flash_attention.kernels.tiles import CANDIDATES, candidates, padded
from sparse_flash_attention.segments import plan

CASES = "sparse_flash_attention/tests/triton_cases.py"
LIMIT = 1200


def run_cases(on):
    # compiling for a device takes seconds a case and size
    done = interpreted(["-m", "pytest", CASES, "-p", "no:cacheprovider", "-n", "0"], on=on, seconds=LIMIT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 60, done.stdout[-500:]


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 30)
def test_kernels_in_the_interpreter():
    run_cases(on=True)


@pytest.mark.timeout(LIMIT + 30)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_kernels_on_the_device():
    run_cases(on=False)


def q_of(dtype=torch.float32, d=32, device="cpu"):
    return torch.empty(1, 1, 4, d, dtype=dtype, device=device)


def test_tensors_on_the_cpu_are_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert "must be on cuda" in triton_face.refuses(q_of(), q_of())
    monkeypatch.setenv(SWITCH, "1")
    assert interpreting() and triton_face.refuses(q_of(), q_of()) is None


def test_dtypes_and_heads_it_cannot_serve(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    assert "float64" in triton_face.refuses(q_of(torch.float64), q_of(torch.float64))
    assert triton_face.refuses(q_of(d=256), q_of(d=256)) is None
    assert "head_dim 257 of q" in triton_face.refuses(q_of(d=257), q_of())
    assert "head_dim 300 of v" in triton_face.refuses(q_of(), q_of(d=300))
    assert "must be on cuda" in triton_face.refuses(q_of(device="meta"), q_of(device="meta"))


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton_face, "_installed", lambda: False)
    assert "triton" in triton_face.refuses(q_of(), q_of())


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (40, 100), (100, 40), (130, 130)])
def test_query_ranges_are_the_tightest(hashed, q_len, k_len):
    torch.manual_seed(0)
    sparsity = {"q_keep": torch.rand(2, 3, q_len) < 0.6, "k_keep": torch.rand(2, 3, k_len) < 0.6}
    if hashed:
        sparsity |= {"q_hash": torch.randint(0, 9, (2, 3, q_len)), "k_hash": torch.randint(0, 9, (2, 3, k_len))}
    ranges = plan((2, 3, q_len, k_len), **sparsity)
    first, stop = triton_face.query_ranges(ranges, k_len)
    step = triton_face.STEP
    assert first.dtype == stop.dtype == torch.int32 and first.shape == (6, -(-k_len // step) + 1)
    for n in range(6):
        for low in range(0, k_len, step):
            j = torch.arange(low, min(low + step, k_len))
            begin, end = ranges.k_begin[n, :, None], ranges.k_end[n, :, None]
            seen = ((begin <= j) & (j < end)).any(1).nonzero().flatten().tolist()
            a, b = first[n, low // step].item(), stop[n, low // step + 1].item()
            assert all(a <= i < b for i in seen)
            # tight, but for rows that see nothing at all in between
            assert [i for i in range(a, b) if begin[i] < end[i]] == seen


def test_dropped_queries_are_not_walked():
    q_keep = torch.arange(1000) < 100
    ranges = plan((1, 1, 1000, 1000), q_keep=q_keep.view(1, 1, -1), k_keep=q_keep.view(1, 1, -1))
    _, stop = triton_face.query_ranges(ranges, 1000)
    assert stop.max() == 100


@pytest.mark.parametrize(("head", "columns"), [(1, 16), (16, 16), (17, 32), (80, 128), (256, 256)])
def test_padded_heads(head, columns):
    assert padded(head) == columns


def test_every_device_has_tiles():
    for kernel in CANDIDATES["half"]:
        for itemsize in (2, 4):
            for head in (16, 64, 128, 256):
                old, new = (candidates(kernel, head, itemsize, capability) for capability in (80, 100))
                assert old and set(old) <= set(new)
                assert all(tile.keys % triton_face.STEP == 0 for tile in new)
