"""The C++ face on processors with narrower vectors than this one's, which share its source."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest
import torch

from common.kernels.native import compiler, load
from sparse_flash_attention.kernels import cpp_face
from sparse_flash_attention.tests.cases import check, coins, ids, qkv

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
