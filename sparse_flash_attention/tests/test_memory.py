"""Memory beyond q, k and v: of order T, never T^2, and bounded by three times their size."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from common.kernels.bench import peak_bytes
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.tests.cases import FAST, coins, ids

HEADS, DIM = 2, 64


def peak(length: int, hashed: bool, backend: str) -> int:
    """Peak bytes of a forward and backward pass, results and gradients included."""
    shape = (1, HEADS, length)
    if hashed:
        attend = partial(hash_sparse_attention, q_hash=ids(shape, 8))
    else:
        attend = partial(qk_sparse_attention, q_keep=coins(shape, 0.7), k_keep=coins(shape, 0.7, seed=3))
    leaves = [torch.randn(*shape, DIM, requires_grad=True) for _ in range(3)]
    grad = torch.ones(*shape, DIM)
    call = partial(attend, backend=backend)
    call(*leaves)  # what is built and cached on the first call is no memory of the attention
    return peak_bytes(lambda: torch.autograd.grad(call(*leaves), leaves, grad))


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_memory_grows_with_the_length_and_not_its_square(hashed: bool, backend: str) -> None:
    assert peak(4096, hashed, backend) < 2.5 * peak(2048, hashed, backend)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("backend", [face for face in FAST if face != "torch"])
def test_extra_memory_is_at_most_three_times_q_k_and_v(hashed: bool, backend: str) -> None:
    length = 4096
    inputs = 3 * HEADS * length * DIM * 4
    results = HEADS * length * (4 * DIM + 1) * 4  # out, lse, dq, dk, dv
    tables = 16 * HEADS * length * 8
    assert peak(length, hashed, backend) < results + 3 * inputs + tables
