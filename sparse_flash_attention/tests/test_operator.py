"""The registered operator under PyTorch's own machinery: opcheck, compile, vmap, autocast, meta tensors, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.kernels.dispatch import forced
from sparse_flash_attention import operator
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.segments import plan
from sparse_flash_attention.tests.cases import FACES, FAST, Case, coins, ids, qkv, with_gradients

torch.set_num_threads(1)
faces = pytest.mark.parametrize("face", FACES)
fast = pytest.mark.parametrize("face", FAST)
NAMES = ("out", "dq", "dk", "dv")


def arguments(case: Case, backend: str, grad: bool) -> tuple[Any, ...]:
    """The operator's arguments."""
    shape = (*case.q.shape[:3], case.k.shape[2])
    ranges = plan(shape, case.q_keep, case.k_keep, case.q_hash, case.k_hash)
    return (*(x.clone().requires_grad_(grad) for x in (case.q, case.k, case.v)), *ranges, 0.3, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@fast
def test_opcheck(face: str, dtype: torch.dtype) -> None:
    if face == "cpp" and dtype is torch.float64:
        pytest.skip("float64 is not served")
    case = qkv(1, 4, 20, 8, kv_heads=2, k_len=17, v_dim=16).replace(q_keep=coins((1, 4, 20)), k_keep=coins((1, 4, 17)))
    for grad in (False, True):
        torch.library.opcheck(torch.ops.sparse_flash_attention.forward.default, arguments(case.to(dtype), face, grad))
    *tensors, scale, backend = arguments(case.to(dtype), face, False)
    out, lse = torch.ops.sparse_flash_attention.forward(*tensors, scale, backend)
    call = (torch.randn_like(out), *tensors[:3], out, lse, *tensors[3:], scale, backend)
    torch.library.opcheck(torch.ops.sparse_flash_attention.backward.default, call)


@fast
def test_outputs_are_contiguous_and_of_the_promised_types(face: str) -> None:
    for dtype, precise in ((torch.float32, torch.float32), (torch.float16, torch.float32)):
        case = qkv(2, 4, 20, 8, kv_heads=2, v_dim=24).to(dtype)
        case = case.replace(q=case.q.mT.contiguous().mT, k=case.k.transpose(1, 2).contiguous().transpose(1, 2))
        q, k, v, *rest = arguments(case, face, False)
        q, k = case.q, case.k
        assert not q.is_contiguous() and not k.is_contiguous()
        out, lse = torch.ops.sparse_flash_attention.forward(q, k, v, *rest)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 4, 20, 24), dtype, (2, 4, 20), precise)
        *ranges, scale, backend = rest
        grads = torch.ops.sparse_flash_attention.backward(out, q, k, v, out, lse, *ranges, scale, backend)
        assert all(x.is_contiguous() for x in (out, lse, *grads))
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]


@pytest.mark.parametrize("causal", [True, False])
@fast
def test_the_logarithm_of_the_sum_is_that_of_the_visible_scores(face: str, causal: bool) -> None:
    case = qkv(2, 2, 70, 16).replace(q_hash=ids((2, 2, 70), 30), k_hash=ids((2, 2, 70), 30, seed=4), causal=causal)
    ranges = plan((2, 2, 70, 70), q_hash=case.q_hash, k_hash=case.k_hash, causal=causal)
    _, lse = operator.planned_attention(case.q, case.k, case.v, ranges, 0.25, face)
    mask = case.mask()
    wanted = (0.25 * case.q.double() @ case.k.double().mT).masked_fill(~mask, -torch.inf).logsumexp(-1)
    blind = ~mask.any(-1)
    assert blind.any() and (lse[blind] == torch.inf).all()
    torch.testing.assert_close(lse[~blind].double(), wanted[~blind], rtol=1e-6, atol=2e-6)


@fast
def test_the_logarithm_of_the_sum_has_no_gradient(face: str) -> None:
    out, lse = torch.ops.sparse_flash_attention.forward(*arguments(qkv(1, 1, 8, 4), face, True))
    assert out.requires_grad and not lse.requires_grad


def both(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, hashes: Tensor, **more: Any) -> Tensor:
    """The two public functions, one after the other."""
    middle = qk_sparse_attention(q, k, v, keep, keep.flip(-1), **more)
    return hash_sparse_attention(middle + q, k, v, hashes, k_keep=keep, include_self=False, **more)


def compiled(backend: str, dynamic: bool | None = None) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(both, fullgraph=True, backend=backend, dynamic=dynamic)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Up to roundings (a compiler may fuse a product and a sum)."""
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@faces
def test_both_functions_compile_into_one_graph_with_gradients(face: str) -> None:
    case, keep, hashes = qkv(2, 2, 40, 16), coins((2, 2, 40), 0.7), ids((2, 2, 40), 3)
    run = compiled("aot_eager")
    found = with_gradients(lambda q, k, v: run(q, k, v, keep, hashes, backend=face), case.q, case.k, case.v)
    same(found, with_gradients(lambda q, k, v: both(q, k, v, keep, hashes, backend=face), case.q, case.k, case.v))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"scale": 0.1}], ids=str)
def test_options_reach_the_compiled_graph(options: dict[str, Any]) -> None:
    case, keep, hashes = qkv(2, 2, 40, 16), coins((2, 2, 40), 0.7), ids((2, 2, 40), 3)
    torch._dynamo.reset()
    run = torch.compile(qk_sparse_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        run(case.q, case.k, case.v, keep, **options), qk_sparse_attention(case.q, case.k, case.v, keep, **options)
    )
    run = torch.compile(hash_sparse_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        run(case.q, case.k, case.v, hashes, **options), hash_sparse_attention(case.q, case.k, case.v, hashes, **options)
    )


def test_lengths_may_change_without_a_new_graph() -> None:
    run = compiled("aot_eager", dynamic=True)
    counter = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    for length in (17, 40, 66):
        case, keep, hashes = qkv(2, 2, length, 16), coins((2, 2, length), 0.7), ids((2, 2, length), 3)
        wanted = both(case.q, case.k, case.v, keep, hashes)
        torch.testing.assert_close(run(case.q, case.k, case.v, keep, hashes), wanted, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(counted(case.q, case.k, case.v, keep, hashes), wanted, rtol=1e-5, atol=2e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_it_with_gradients() -> None:
    case, keep, hashes = qkv(1, 2, 40, 16), coins((1, 2, 40), 0.7), ids((1, 2, 40), 3)
    run = compiled("inductor")
    found = with_gradients(lambda q, k, v: run(q, k, v, keep, hashes), case.q, case.k, case.v)
    same(found, with_gradients(lambda q, k, v: both(q, k, v, keep, hashes), case.q, case.k, case.v))


def test_a_face_forced_later_is_not_forgotten_by_a_compiled_graph() -> None:
    case = qkv(1, 1, 8, 4)
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(str(a) for node in graph.graph.nodes for a in node.args if a in operator.FACES)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(qk_sparse_attention, fullgraph=True, backend=spy)
    with forced("torch"):
        run(case.q, case.k, case.v)
    assert seen[-1] == "torch"
    wanted = "cpp" if operator.face("cpp").refuses(case.q, case.v) is None else "torch"
    run(case.q, case.k, case.v)
    assert seen[-1] == wanted


def test_no_size_of_the_traced_graph_depends_on_data() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 20, 8, requires_grad=True)
        keep, hashes = torch.ones(2, 4, 20, dtype=torch.bool), torch.ones(2, 4, 20, dtype=torch.int64)
        out = both(q, q, q, keep, hashes)
        assert out.shape == (2, 4, 20, 8)
        out.sum().backward()
        assert q.grad is not None and q.grad.shape == q.shape


@faces
def test_under_autocast_it_runs_in_the_autocast_type_as_sdpa_does(face: str) -> None:
    case = qkv(2, 2, 40, 16).replace(q_keep=coins((2, 2, 40)))
    wanted = case.to(torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(case.q, case.k, case.v).dtype is torch.bfloat16
        out = case.attend(*leaves, face)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, wanted.attend(wanted.q, wanted.k, wanted.v, face))
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype is torch.float32 for x in leaves)
    with torch.autocast("cpu", torch.bfloat16):  # a float32 layer (a norm of the keys, say) beside half-precision ones
        mixed = case.attend(wanted.q, case.k, wanted.v, face)
    assert torch.equal(mixed, out)
    with torch.autocast("cpu", torch.float16):
        assert case.attend(case.q, case.k, case.v, face).dtype is torch.float16
    with torch.autocast("cpu", enabled=False):
        assert case.attend(case.q, case.k, case.v, face).dtype is torch.float32


def test_autocast_leaves_float64_alone() -> None:
    case = qkv(1, 1, 8, 4).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for face in ("torch", "reference"):
            out = case.attend(case.q, case.k, case.v, face)
            assert torch.equal(out, case.attend(case.q, case.k, case.v, face)) and out.dtype is torch.float64


def test_autocast_compiles() -> None:
    case, keep, hashes = qkv(1, 2, 40, 16), coins((1, 2, 40), 0.7), ids((1, 2, 40), 3)
    run = compiled("aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (f(case.q, case.k, case.v, keep, hashes) for f in (run, both))
    torch.testing.assert_close(found, wanted)


@faces
def test_vmap_maps_it(face: str) -> None:
    """Over a leading dimension of q, k, v with masks and hashes in common."""
    case = qkv(6, 2, 20, 8).replace(q_keep=coins((2, 20)), k_keep=coins((20,)))
    parts = [x.unflatten(0, (3, 2)) for x in (case.q, case.k, case.v)]
    out = torch.vmap(lambda q, k, v: case.attend(q, k, v, face))(*parts)
    wanted = case.attend(case.q, case.k, case.v, face)
    torch.testing.assert_close(out.flatten(0, 1), wanted, rtol=1e-5, atol=1e-6)


@fast
def test_checkpointed_layers_give_the_same_gradients(face: str) -> None:
    case = qkv(1, 2, 40, 16).replace(q_hash=ids((1, 2, 40)))

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda *x: case.attend(*x, face), q, k, v, use_reentrant=False)

    found = with_gradients(again, case.q, case.k, case.v)
    plain = with_gradients(lambda *x: case.attend(*x, face), case.q, case.k, case.v)
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


@fast
def test_inference_mode_and_subclasses_of_tensors(face: str) -> None:
    case = qkv(1, 2, 40, 16).replace(q_keep=coins((40,)))
    wanted = case.attend(case.q, case.k, case.v, face)
    with torch.inference_mode():
        assert torch.equal(case.attend(case.q, case.k, case.v, face), wanted)
    parameters = [torch.nn.Parameter(x) for x in (case.q, case.k, case.v)]
    assert torch.equal(case.attend(*parameters, face), wanted)
