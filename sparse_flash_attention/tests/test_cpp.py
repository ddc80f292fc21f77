"""The C++ face beyond its numbers: processors with narrower vectors than this one's, and threads that share a head."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.kernels.bench import threads_of
from common.kernels.native import compiler, load
from sparse_flash_attention.attention import qk_sparse_attention
from sparse_flash_attention.kernels import cpp_face
from sparse_flash_attention.tests.cases import check, coins, ids, qkv

NEEDS_COMPILER = pytest.mark.skipif(compiler("c++") is None, reason="needs a C++ compiler")
ON_X86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or compiler("c++") is None, reason="needs a C++ compiler for x86"
)
BUILDS = {"AVX2": ("-mno-avx512f", 8), "SSE, no half precision": ("-mno-avx", 4)}


@ON_X86
@pytest.mark.parametrize("build", BUILDS)
def test_narrower_vectors_give_the_same_attention(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flag, lanes = BUILDS[build]
    narrow = load(cpp_face.SOURCE, cpp_face.FUNCTIONS, flags=(flag,))
    monkeypatch.setattr(cpp_face, "library", lambda: narrow)
    cpp_face.lanes.cache_clear()
    try:
        assert cpp_face.lanes() == lanes
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for dim in (20, 64):
                case, shape = qkv(q_len=130, dim=dim), (2, 2, 130)
                dropped = replace(case, q_keep=coins(shape, 0.6), k_keep=coins(shape, 0.6, seed=5))
                check(dropped, "cpp", dtype)
                check(replace(case, q_hash=ids(shape, 7), k_hash=ids(shape, 7, seed=6)), "cpp", dtype)
    finally:
        cpp_face.lanes.cache_clear()


@NEEDS_COMPILER
def test_threads_that_share_a_head_do_not_lose_each_others_sums() -> None:
    """One head on two threads: both add to the same gradients of keys, over and over."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, 2048, 16) for _ in range(3)]

    def gradients(threads: int) -> tuple[Tensor, ...]:
        with threads_of(threads):
            leaves = [x.clone().requires_grad_() for x in inputs]
            return torch.autograd.grad(qk_sparse_attention(*leaves, backend="cpp").sum(), leaves)

    alone = gradients(1)
    for _ in range(10):
        for one, both in zip(alone, gradients(2), strict=True):
            torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
