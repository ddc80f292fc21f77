"""The flex face: the block tables follow the ranges, rows are gathered and put back, refusals say why."""

import pytest
import torch

from common.kernels import native
from sparse_flash_attention import operator
from sparse_flash_attention.kernels import flex_face
from sparse_flash_attention.reference import masked_attention, visible
from sparse_flash_attention.segments import plan

SCALE = 0.3
SHAPES = [(1, 2, 2, 300, 300), (2, 4, 2, 40, 260), (1, 2, 1, 260, 40), (1, 1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def case(batch, heads, k_heads, q_len, k_len, hashed, dtype=torch.float64, d=8, d_v=12):
    q = torch.randn(batch, heads, q_len, d, dtype=dtype)
    k = torch.randn(batch, k_heads, k_len, d, dtype=dtype)
    v = torch.randn(batch, k_heads, k_len, d_v, dtype=dtype)
    sparsity = {"q_keep": torch.rand(batch, heads, q_len) < 0.6, "k_keep": torch.rand(batch, heads, k_len) < 0.6}
    if hashed:
        sparsity["q_hash"] = torch.randint(0, 3, (batch, heads, q_len))
        sparsity["k_hash"] = torch.randint(0, 3, (batch, heads, k_len))
    return (q, k, v), sparsity, (batch, heads, q_len, k_len)


def dense(q, k, v, mask, scale):
    """What flex_attention computes, from the BlockMask alone: its blocks and its function."""
    batch, heads, q_len, _ = q.shape
    blocks = mask.to_dense().bool().repeat_interleave(flex_face.BLOCK, 2).repeat_interleave(flex_face.BLOCK, 3)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, q_len, k.shape[2])), indexing="ij")
    seen = mask.mask_mod(b, h, i, j) & blocks[:, :, :q_len, : k.shape[2]]
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).nan_to_num(0) @ v if not q.requires_grad else masked_attention(q, k, v, seen, scale), lse


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_gathered_and_put_back(monkeypatch, shape, hashed):
    monkeypatch.setattr(flex_face, "attend", dense)
    (q, k, v), sparsity, sizes = case(*shape, hashed)
    ranges, mask = plan(sizes, **sparsity), visible(sizes, **sparsity)
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype)
    out, lse = flex_face.forward(q, k, v, ranges, SCALE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    wanted = masked_attention(*leaves, mask, SCALE)
    torch.testing.assert_close(out, wanted.detach())
    blind = ~mask.any(-1)
    assert (out[blind] == 0).all() and (lse[blind] == torch.inf).all()
    scores = SCALE * q.detach() @ k.detach().repeat_interleave(shape[1] // shape[2], 1).mT
    torch.testing.assert_close(lse[~blind], scores.masked_fill(~mask, -torch.inf).logsumexp(-1)[~blind])
    found = flex_face.backward(grad, q, k, v, out, lse, ranges, SCALE)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, leaves, grad))


@pytest.mark.parametrize("hashed", [False, True])
def test_dropped_rows_may_hold_nan(monkeypatch, hashed):
    monkeypatch.setattr(flex_face, "attend", dense)
    (q, k, v), sparsity, sizes = case(1, 2, 2, 150, 150, hashed)
    ranges = plan(sizes, **sparsity)
    clean = flex_face.forward(q, k, v, ranges, SCALE)
    dirty = [q.masked_fill(~sparsity["q_keep"].unsqueeze(-1), torch.nan)]
    dirty += [x.masked_fill(~sparsity["k_keep"].unsqueeze(-1), torch.nan) for x in (k, v)]
    assert all(torch.equal(x, y) for x, y in zip(flex_face.forward(*dirty, ranges, SCALE), clean, strict=True))


@pytest.mark.parametrize("buckets", [1, 2, 40])
def test_block_table_has_what_is_needed_and_no_more(buckets):
    ids = torch.randint(0, buckets, (1, 2, 700))
    ranges = plan((1, 2, 700, 700), q_hash=ids, k_hash=ids)
    mask = flex_face.block_mask(ranges, (1, 2, 700, 700))
    j = torch.arange(700)
    seen = (ranges.k_begin.unsqueeze(-1) <= j) & (j < ranges.k_end.unsqueeze(-1))  # sorted rows, (2, Tq, Tk)
    # rows past the end constrain nothing
    some, every = (
        torch.nn.functional.pad(seen, (0, 68, 0, 68), value=fill).unflatten(2, (6, 128)).unflatten(1, (6, 128))
        for fill in (False, True)
    )
    some, every = some.any(4).any(2), every.all(4).all(2)
    assert torch.equal(mask.to_dense()[0].bool(), some)
    full = torch.zeros_like(some)
    for h in range(2):
        for tile in range(6):
            count = mask.full_kv_num_blocks[0, h, tile]
            full[h, tile, mask.full_kv_indices[0, h, tile, :count].long()] = True
    assert torch.equal(full, every)


@pytest.mark.slow
@pytest.mark.skipif(native.compiler("c++") is None, reason="no C++ compiler here")
def test_compiled_on_the_cpu():
    (q, k, v), sparsity, sizes = case(1, 4, 2, 200, 200, True, torch.float32, d=32, d_v=16)
    mask = visible(sizes, **sparsity)
    out, lse = operator.planned_attention(q, k, v, plan(sizes, **sparsity), SCALE, "flex")
    exact = masked_attention(q.double(), k.double(), v.double(), mask, SCALE)
    plain = masked_attention(q, k, v, mask, SCALE)
    floor = 4 * torch.finfo(q.dtype).eps * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor
    assert out.dtype == q.dtype and (out[~mask.any(-1)] == 0).all()
    assert torch.equal(lse == torch.inf, ~mask.any(-1))


def test_refusals():
    q = torch.empty(1, 1, 4, 8)
    assert flex_face.refuses(q, q) is None or native.compiler("c++") is None
    assert "float64" in flex_face.refuses(q.double(), q.double())
    assert "must be on cpu or cuda" in flex_face.refuses(q.to("meta"), q.to("meta"))
    leaf = q.clone().requires_grad_()
    for pair in ((leaf, q), (q, leaf)):
        assert "gradients on the CPU" in flex_face.refuses(*pair)
        with torch.no_grad():
            assert flex_face.refuses(*pair) == flex_face.refuses(q, q)


def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda language="c": None)
    assert "C++ compiler" in flex_face.refuses(torch.empty(1, 1, 4, 8), torch.empty(1, 1, 4, 8))


def test_backward_on_the_cpu_says_what_it_lacks():
    (q, k, v), sparsity, sizes = case(1, 1, 1, 4, 4, False)
    with pytest.raises(NotImplementedError, match="no backward on the CPU"):
        flex_face.backward(q, q, k, v, q, q[..., 0], plan(sizes, **sparsity), SCALE)
