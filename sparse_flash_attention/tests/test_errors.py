"""What users pass wrongly is refused with the argument's name, its value and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.tests.cases import coins, ids, qkv

X = torch.zeros(2, 4, 6, 8)
KEEP, HASH = torch.ones(2, 4, 6, dtype=torch.bool), torch.zeros(2, 4, 6, dtype=torch.int64)
BOTH = [qk_sparse_attention, lambda q, k, v, **more: hash_sparse_attention(q, k, v, HASH, **more)]


def zeros(*shape: int, **more: Any) -> torch.Tensor:
    return torch.zeros(shape, **more)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: must be a tensor, got list"),
        ({"k": None}, TypeError, "k: must be a tensor, got NoneType"),
        ({"v": zeros(4, 6, 8)}, ValueError, "v of shape (4, 6, 8): must be (batch, heads, length, head_dim)"),
        ({"q": X.long()}, TypeError, "q of dtype torch.int64: must be one of float32, bfloat16, float16, float64"),
        ({"k": X.to(torch.complex64)}, TypeError, "k of dtype torch.complex64: must be one of float32"),
        ({"q": X.half()}, TypeError, "q, k, v of dtypes torch.float16, torch.float32, torch.float32: must be the same"),
        ({"v": X.bfloat16()}, TypeError, "torch.float32, torch.float32, torch.bfloat16: must be the same"),
        ({"k": X.to("meta")}, ValueError, "q, k, v on devices cpu, meta, cpu: must be the same"),
        (
            {"q": zeros(3, 4, 6, 8)},
            ValueError,
            "q, k, v of shapes (3, 4, 6, 8), (2, 4, 6, 8), (2, 4, 6, 8): must have the same batch (dimension 0)",
        ),
        ({"v": zeros(1, 4, 6, 8)}, ValueError, "must have the same batch (dimension 0)"),
        (
            {"k": zeros(2, 2, 6, 8)},
            ValueError,
            "k and v must have the same heads (dimension 1), dividing the heads of q",
        ),
        ({"k": zeros(2, 3, 6, 8), "v": zeros(2, 3, 6, 8)}, ValueError, "dividing the heads of q"),
        ({"k": zeros(2, 8, 6, 8), "v": zeros(2, 8, 6, 8)}, ValueError, "dividing the heads of q"),
        ({"k": zeros(2, 0, 6, 8), "v": zeros(2, 0, 6, 8)}, ValueError, "dividing the heads of q"),
        ({"v": zeros(2, 4, 5, 8)}, ValueError, "k and v must have the same length (dimension 2)"),
        ({"q": zeros(2, 4, 6, 9)}, ValueError, "q and k must have the same head_dim (dimension 3), not 0"),
        ({"q": zeros(2, 4, 6, 0), "k": zeros(2, 4, 6, 0)}, ValueError, "(dimension 3), not 0"),
        ({"v": zeros(2, 4, 6, 0)}, ValueError, "(dimension 3), not 0"),
        ({"q_keep": KEEP.float()}, TypeError, "q_keep of type torch.float32: must be a tensor of torch.bool"),
        ({"k_keep": KEEP.long()}, TypeError, "k_keep of type torch.int64: must be a tensor of torch.bool"),
        ({"k_keep": True}, TypeError, "k_keep of type bool: must be a tensor of torch.bool (True keeps the row)"),
        (
            {"q_keep": KEEP[..., :5]},
            ValueError,
            "q_keep of shape (2, 4, 5): must be broadcastable to (batch, heads, length) = (2, 4, 6)",
        ),
        ({"q_keep": KEEP[..., :1]}, ValueError, "with the length in full"),
        ({"k_keep": KEEP[:, :3]}, ValueError, "k_keep of shape (2, 3, 6): must be broadcastable to"),
        ({"k_keep": KEEP[:, :2]}, ValueError, "k_keep of shape (2, 2, 6): must be broadcastable to"),
        ({"q_keep": KEEP[None]}, ValueError, "q_keep of shape (1, 2, 4, 6): must be broadcastable to"),
        ({"q_keep": torch.ones(3, 4, 6, dtype=torch.bool)}, ValueError, "q_keep of shape (3, 4, 6)"),
        ({"q_keep": KEEP.to("meta")}, ValueError, "q_keep on device meta: must be on cpu, as q is"),
        ({"k_keep": KEEP.to("meta")}, ValueError, "k_keep on device meta: must be on cpu, as q is"),
        ({"scale": float("nan")}, ValueError, "scale=nan: must be a finite number"),
        ({"scale": float("inf")}, ValueError, "scale=inf: must be a finite number"),
        ({"scale": "0.5"}, TypeError, "scale='0.5': must be a finite number or None"),
        ({"scale": torch.tensor([0.5, 1])}, TypeError, "must be a finite number or None"),
        ({"backend": "cuda"}, ValueError, "backend='cuda': must be None or one of cpp, torch, triton, flex, reference"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("attention", BOTH, ids=["qk", "hash"])
def test_of_both_functions(attention: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        attention(**{"q": X, "k": X, "v": X} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_hash": None}, TypeError, "q_hash of type NoneType: must be a tensor of integers (bucket ids, any values)"),
        ({"q_hash": HASH.float()}, TypeError, "q_hash of type torch.float32: must be a tensor of integers"),
        ({"q_hash": KEEP}, TypeError, "q_hash of type torch.bool: must be a tensor of integers"),
        (
            {"q_hash": HASH.to(torch.complex64)},
            TypeError,
            "q_hash of type torch.complex64: must be a tensor of",
        ),
        ({"q_hash": [0] * 6}, TypeError, "q_hash of type list: must be a tensor of integers"),
        ({"k_hash": HASH.double()}, TypeError, "k_hash of type torch.float64: must be a tensor of integers"),
        ({"k_hash": 3}, TypeError, "k_hash of type int: must be a tensor of integers"),
        ({"q_hash": HASH[..., :5]}, ValueError, "q_hash of shape (2, 4, 5): must be broadcastable to"),
        ({"k_hash": HASH[:, :3]}, ValueError, "k_hash of shape (2, 3, 6): must be broadcastable to"),
        ({"q_hash": HASH.to("meta")}, ValueError, "q_hash on device meta: must be on cpu, as q is"),
        ({"k_hash": HASH.to("meta")}, ValueError, "k_hash on device meta: must be on cpu, as q is"),
        (
            {"k": zeros(2, 4, 5, 8), "v": zeros(2, 4, 5, 8)},
            ValueError,
            "k_hash of shape (2, 4, 6): must be broadcastable to (batch, heads, length) = (2, 4, 5)",
        ),
        (
            {"include_self": False, "causal": False},
            ValueError,
            "include_self=False with causal=False, Tq=6, Tk=6: needs causal=True and Tq = Tk",
        ),
        (
            {"include_self": False, "k": zeros(2, 4, 5, 8), "v": zeros(2, 4, 5, 8), "k_hash": HASH[..., :5]},
            ValueError,
            "include_self=False with causal=True, Tq=6, Tk=5: needs causal=True and Tq = Tk",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_of_hashes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        hash_sparse_attention(**{"q": X, "k": X, "v": X, "q_hash": HASH} | changes)


def test_a_backend_that_cannot_serve_says_why() -> None:
    x = X.double()
    with pytest.raises(ValueError, match="backend='cpp': needs float32, bfloat16 or float16, got torch.float64"):
        qk_sparse_attention(x, x, x, backend="cpp")
    with pytest.raises(ValueError, match="backend='triton': "):
        qk_sparse_attention(x, x, x, backend="triton")


def test_masks_of_key_heads_are_not_taken_for_masks_of_queries() -> None:
    case = qkv(2, 4, 6, 8, kv_heads=2)
    with pytest.raises(ValueError, match=re.escape("q_keep of shape (2, 2, 6)")):
        qk_sparse_attention(case.q, case.k, case.v, q_keep=coins((2, 2, 6)))
    with pytest.raises(ValueError, match=re.escape("q_hash of shape (2, 2, 6)")):
        hash_sparse_attention(case.q, case.k, case.v, ids((2, 2, 6)))


def test_checks_hold_for_empty_inputs_too() -> None:
    x = zeros(2, 4, 0, 8)
    with pytest.raises(ValueError, match="backend='cuda'"):
        qk_sparse_attention(x, x, x, backend="cuda")
    with pytest.raises(ValueError, match="q_keep of shape"):
        qk_sparse_attention(x, x, x, q_keep=KEEP)
