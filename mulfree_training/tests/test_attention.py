"""Attention: the written-out composition, PyTorch's attention where both must agree, masks, switches, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training.attention import PAMAttention, pam_attention
from mulfree_training.convert import convert_to_mulfree
from mulfree_training.functional import pam_softmax
from mulfree_training.primitives import pam_div, pam_mul
from mulfree_training.products import pam_linear, pam_matmul

INF = float("inf")
ALPHA = 1.0552
BOTH = list(itertools.product(("pam", "standard"), repeat=2))
B, H, L, S, E = 2, 4, 5, 7, 12


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, H, L, 6), normal(B, H, S, 6, seed=1), normal(B, H, S, 3, seed=2)


def masks() -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(L, S, generator=generator) > 0.4
    seen[:, 0] = True
    batched = torch.rand(B, 1, L, S, generator=generator) > 0.4
    batched[..., 1] = True
    return {"none": None, "bool": seen, "batched": batched, "float": normal(L, S, seed=4)}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("is_causal", [False, True])
def test_standard_parts_give_torchs_attention(name, is_causal):
    mask = masks()[name]
    torch_mask = mask
    if mask is not None and is_causal:
        causal = torch.ones(L, S, dtype=torch.bool).tril()
        torch_mask = mask & causal if mask.dtype is torch.bool else mask.masked_fill(~causal, -INF)
        if name == "batched":  # a row that sees nothing has its own test
            mask = torch_mask = torch_mask | torch.eye(L, S, dtype=torch.bool)
    results = []
    for run in (
        lambda q, k, v: pam_attention(q, k, v, mask, 0.0, is_causal, 0.3, products="standard", normaliser="standard"),
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, torch_mask, is_causal=is_causal and torch_mask is None, scale=0.3
        ),
    ):
        inputs = [x.requires_grad_() for x in qkv()]
        out = run(*inputs)
        out.backward(normal(B, H, L, 3, seed=5))
        results.append([out, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("derivative", ["approx", "exact"])
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_rows_of_the_table_are_the_written_compositions(derivative, alpha):
    options = {"derivative": derivative, "alpha": alpha}
    seen = masks()["bool"]
    scale = 1 / math.sqrt(6)

    def matmuls(q, k, v):  # row 1: only the products
        scores = pam_matmul(q, k.mT, **options) * scale
        return pam_matmul(scores.masked_fill(~seen, -INF).softmax(-1), v, **options)

    def all_of_it(q, k, v):  # row 2: the queries are scaled, before the product
        scores = pam_matmul(pam_mul(q, scale, **options), k.mT, **options)
        return pam_matmul(pam_softmax(scores.masked_fill(~seen, -INF), **options), v, **options)

    def only_softmax(q, k, v):
        scores = pam_mul(q, scale, **options) @ k.mT
        return pam_softmax(scores.masked_fill(~seen, -INF), **options) @ v

    for expected, products, normaliser in (
        (matmuls, "pam", "standard"),
        (all_of_it, "pam", "pam"),
        (only_softmax, "standard", "pam"),
    ):
        results = []
        for run in (
            expected,
            lambda q, k, v: pam_attention(q, k, v, seen, products=products, normaliser=normaliser, **options),  # noqa: B023
        ):
            inputs = [x.requires_grad_() for x in qkv()]
            out = run(*inputs)
            out.backward(normal(B, H, L, 3, seed=5))
            results.append([out.detach(), *(x.grad for x in inputs)])
        assert all(map(same_bits, *results)), (products, normaliser)


def test_products_alone_obey_the_error_law():
    generator = torch.Generator().manual_seed(0)
    # powers of two as queries: exact scores, so exact weights; then only the product with positive values errs
    q = 2.0 ** torch.randint(-1, 2, (B, H, L, 6), generator=generator)
    k, v = normal(B, H, S, 6), normal(B, H, S, 3, seed=2).abs()
    ratio = pam_attention(q, k, v, normaliser="standard") / F.scaled_dot_product_attention(q, k, v)
    assert ratio.max() <= 1 + 1e-5 and ratio.min() >= 8 / 9 - 1e-5
    assert ratio.mean() < 0.99


@pytest.mark.parametrize(("products", "normaliser"), BOTH)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("derivative", ["approx", "exact"])
def test_a_row_that_sees_nothing_is_zero_without_nan(products, normaliser, kind, derivative):
    seen = torch.ones(L, S, dtype=torch.bool)
    seen[2] = False
    mask = seen if kind == "bool" else torch.where(seen, 0.0, -INF)
    inputs = [x.requires_grad_() for x in qkv()]
    out = pam_attention(*inputs, mask, products=products, normaliser=normaliser, derivative=derivative)
    out.sum().backward()
    assert not out[:, :, 2].any() and out[:, :, 1].all()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert not inputs[0].grad[:, :, 2].any()


@pytest.mark.parametrize("normaliser", ["pam", "standard"])
def test_hidden_keys_change_nothing(normaliser):
    q, k, v = qkv()
    seen = torch.arange(S) < S - 2
    cut = pam_attention(q, k[:, :, :-2], v[:, :, :-2], normaliser=normaliser)
    k, v = k.clone(), v.clone()
    k[:, :, -2:], v[:, :, -2:] = 1e4, -1e4
    out = pam_attention(q, k, v, seen, normaliser=normaliser)
    if normaliser == "pam":
        assert same_bits(out, cut)
    else:  # PyTorch's sums over keys depend on how many there are
        torch.testing.assert_close(out, cut)


def test_causal_outputs_do_not_see_later_keys():
    q, k, v = (normal(B, H, L, 6, seed=i) for i in range(3))
    out = pam_attention(q, k, v, is_causal=True)
    k, v = k.clone(), v.clone()
    k[:, :, 3:], v[:, :, 3:] = 7.0, 9.0
    changed = pam_attention(q, k, v, is_causal=True)
    assert same_bits(out[:, :, :3], changed[:, :, :3])
    assert not torch.equal(out[:, :, 3:], changed[:, :, 3:])


def test_grouped_heads_share_keys_and_values():
    q, k, v = normal(B, 4, L, 6), normal(B, 2, S, 6, seed=1), normal(B, 2, S, 3, seed=2)
    out = pam_attention(q, k, v, enable_gqa=True)
    assert same_bits(out, pam_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


@pytest.mark.parametrize("normaliser", ["pam", "standard"])
def test_dropout_scales_what_it_keeps(normaliser):
    q, k = normal(B, H, 50, 6), normal(B, H, 64, 6, seed=1)
    eye = torch.eye(64).expand(B, H, 64, 64)  # as values: the output is the weights, exactly
    weights = pam_attention(q, k, eye, normaliser=normaliser)
    torch.manual_seed(0)
    dropped = pam_attention(q, k, eye, dropout_p=0.5, normaliser=normaliser)
    kept = dropped != 0
    assert torch.equal(dropped[kept], 2 * weights[kept])
    assert 0.48 < kept.float().mean() < 0.52


MODULES = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 9, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]


def modules(options, **ours) -> tuple[nn.MultiheadAttention, PAMAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(theirs.named_parameters()):
            if "bias" in name:
                parameter.copy_(normal(*parameter.shape, seed=seed))
    module = PAMAttention(E, H, **options, **ours)
    module.load_state_dict(theirs.state_dict())
    assert list(module.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(module.state_dict())
    return theirs, module


def inputs_of(options) -> list[Tensor]:
    shapes = [(B, L, E), (B, S, options.get("kdim", E)), (B, S, options.get("vdim", E))]
    xs = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    return xs if options.get("batch_first") else [x.transpose(0, 1) for x in xs]


def hidden(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(L, S, generator=generator) > 0.6
    mask[:, 0] = False
    each = torch.rand(B * H, L, S, generator=generator) > 0.6
    each[..., 0] = False
    padding = torch.arange(S)[None] >= torch.tensor([S, S - 3])[:, None]
    as_float = {"attn_mask": normal(L, S), "key_padding_mask": padding.float() * -3}
    return {
        "none": {},
        "mask": {"attn_mask": mask},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": mask, "key_padding_mask": padding},
        "each": {"attn_mask": each, "key_padding_mask": padding},
        "float": as_float,
    }[kind]


@pytest.mark.parametrize("options", MODULES)
@pytest.mark.parametrize("kind", ["none", "mask", "padding", "both", "each", "float"])
@pytest.mark.parametrize("average", [True, False])
def test_standard_module_is_torchs(options, kind, average):
    theirs, ours = modules(options, products="standard", normaliser="standard")
    call = {**hidden(kind), "average_attn_weights": average}
    out, weights = ours(*inputs_of(options), **call)
    expected, expected_weights = theirs(*inputs_of(options), **call)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-5)
    again, none = ours(*inputs_of(options), **call, need_weights=False)
    assert none is None and torch.equal(again, out)


@pytest.mark.parametrize("options", MODULES[:4])
def test_pam_module_is_the_written_composition(options):
    _, module = modules(options)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    if "kdim" in options:
        own = [weights[f"{x}_proj_weight"] for x in "qkv"]
    else:
        own = list(weights["in_proj_weight"].split(E))
    biases = list(weights["in_proj_bias"].split(E)) if options.get("bias", True) else [None] * 3
    xs = inputs_of(options)
    first = [x if options.get("batch_first") else x.transpose(0, 1) for x in xs]
    q, k, v = (pam_linear(x, w, b) for x, w, b in zip(first, own, biases, strict=True))
    d = E // H
    heads, seen = [], []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        scores = pam_matmul(pam_mul(q[..., part], d**-0.5), k[..., part].mT)
        seen.append(pam_softmax(scores))
        heads.append(pam_matmul(seen[-1], v[..., part]))
    expected = pam_linear(torch.cat(heads, -1), weights["out_proj.weight"], weights.get("out_proj.bias"))
    out, average = module(*xs)
    assert same_bits(out if options.get("batch_first") else out.transpose(0, 1), expected)
    assert same_bits(average, pam_div(torch.stack(seen, 1).sum(1), float(H)))


def test_weights_are_averaged_by_a_piecewise_affine_quotient():
    module = PAMAttention(E, 3)  # not a power of two
    x = normal(L, B, E)
    each, mean = module(x, x, x, average_attn_weights=False)[1], module(x, x, x)[1]
    assert same_bits(mean, pam_div(each.sum(1), 3.0)) and not torch.equal(mean, each.mean(1))


def test_self_attention_in_one_product_has_the_bits_of_three():
    _, module = modules({})
    x = normal(L, B, E)
    assert same_bits(module(x, x, x)[0], module(x, x.clone(), x.clone())[0])


def test_unbatched_inputs_are_a_batch_of_one():
    _, module = modules({"batch_first": True})
    q, k, v = (x[:1] for x in inputs_of({"batch_first": True}))
    padding = torch.arange(S) > 3
    out, weights = module(q[0], k[0], v[0], key_padding_mask=padding)
    batched = module(q, k, v, key_padding_mask=padding[None])
    assert same_bits(out, batched[0][0]) and same_bits(weights, batched[1][0])


def test_causal_hint_without_a_mask_hides_later_keys_and_a_mask_overrules_it():
    _, module = modules({})
    x = normal(L, B, E)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    assert same_bits(module(x, x, x, is_causal=True)[0], module(x, x, x, attn_mask=causal)[0])
    other = torch.zeros(L, L, dtype=torch.bool)
    assert same_bits(module(x, x, x, attn_mask=other, is_causal=True)[0], module(x, x, x)[0])


def test_dropout_acts_in_training_only():
    _, module = modules({"dropout": 0.5})
    x = normal(L, B, E)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize(("products", "normaliser"), BOTH)
def test_options_reach_every_part(products, normaliser):
    results = []
    for options in ({}, {"alpha": ALPHA}, {"derivative": "exact"}):
        _, module = modules({}, products=products, normaliser=normaliser, **options)
        x = normal(L, B, E)
        out, weights = module(x, x, x)
        out.backward(normal(L, B, E, seed=1))
        results.append((out.detach(), weights.detach(), module.in_proj_weight.grad, module.out_proj.weight.grad))
    plain, alpha, exact = results
    any_pam = "pam" in (products, normaliser)
    assert same_bits(plain[0], alpha[0]) != any_pam
    assert same_bits(plain[1], alpha[1]) != any_pam
    assert same_bits(plain[0], exact[0])
    assert same_bits(plain[2], exact[2]) != any_pam
    assert same_bits(plain[3], exact[3]) != (products == "pam")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"products": "int"}, ValueError, "products='int': must be pam or standard"),
        ({"normaliser": "max"}, ValueError, "normaliser='max': must be pam or standard"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p=1.0: must be in \[0, 1\)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, TypeError, "attn_mask of dtype torch.int64"),
        ({"enable_gqa": True, "key": torch.zeros(B, 3, S, 6)}, ValueError, "heads must divide those of query"),
        ({"query": torch.zeros(6)}, ValueError, r"query of shape \(6,\): must have >= 2 dimensions"),
        ({"key": torch.zeros(B, H, S, 5)}, ValueError, "must have 6 rows"),
        ({"key": torch.zeros(B, H, S, 6, dtype=torch.float64)}, TypeError, "must be torch.float32"),
    ],
)
def test_the_function_refuses(change, error, message):
    call = dict(zip(("query", "key", "value"), qkv(), strict=True))
    with pytest.raises(error, match=message):
        pam_attention(**{**call, **change})


def test_the_module_refuses():
    with pytest.raises(ValueError, match="embed_dim=10: must be a positive multiple of num_heads=4"):
        PAMAttention(10, 4)
    with pytest.raises(ValueError, match=r"dropout=1.5: must be in \[0, 1\)"):
        PAMAttention(8, 4, dropout=1.5)
    _, module = modules({"batch_first": True})
    q, k, v = inputs_of({"batch_first": True})
    with pytest.raises(ValueError, match=r"attn_mask of shape \(7, 5\): must be \(5, 7\) or \(8, 5, 7\)"):
        module(q, k, v, attn_mask=torch.zeros(S, L, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \(2, 5\): must be \(2, 7\)"):
        module(q, k, v, key_padding_mask=torch.zeros(B, L, dtype=torch.bool))
    with pytest.raises(ValueError, match="must all have 2 or all have 3 dimensions"):
        module(q, k[0], v)
    with pytest.raises(ValueError, match="must have one length, and the batch of"):
        module(q, k, v[:, 1:])


@pytest.mark.parametrize("place", ["by hand", "converted"])
def test_pytorchs_fused_encoder_does_not_go_round_it(place):
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True).eval()
    if place == "converted":
        convert_to_mulfree(layer.self_attn)
    else:
        layer.self_attn = PAMAttention(E, 2, batch_first=True).eval()
    x, padding = normal(B, L, E), torch.arange(L)[None] >= torch.tensor([[L], [L - 2]])
    net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    for call in (lambda: layer(x), lambda: net(x, src_key_padding_mask=padding)):
        expected = call().detach()  # with gradients PyTorch never takes the fused path
        with torch.no_grad():
            assert same_bits(call(), expected)
    with torch.no_grad(), pytest.raises(ValueError, match="nested tensor: .* set its use_nested_tensor=False"):
        layer.self_attn(*(torch.nested.nested_tensor([x[0], x[1, :2]]),) * 3)


def test_parameters_are_reset_as_pytorch_does():
    for options in MODULES:
        theirs, ours = modules(options)
        for module in (theirs, ours):
            torch.manual_seed(3)
            module._reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": E, "vdim": E, "bias": False}])
def test_parameters_follow_the_input_under_autocast(options):
    first, ours = nn.Linear(E, E), PAMAttention(E, H, batch_first=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        x = first(normal(B, L, E))
        out, _ = ours(x, x, x, need_weights=False)
    assert out.dtype is x.dtype is torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in ours.parameters())
    assert torch.equal(out, ours.bfloat16()(x, x, x, need_weights=False)[0])
