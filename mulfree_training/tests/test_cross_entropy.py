"""Cross-entropy: both smoothings, targets that do not count, reductions, shapes, and its distance from torch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.kernels.dispatch import forced
from mulfree_training.functional import pam_cross_entropy, pam_log_softmax
from mulfree_training.modules import PAMCrossEntropy
from mulfree_training.primitives import pam_div, pam_mul
from mulfree_training.tests.bitwise import ALPHAS, assert_same, same_bits

RULES = ("approx", "exact")
B, V = 12, 9


@pytest.fixture(autouse=True)
def on_the_reference():
    with forced("reference"):
        yield


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape, seed=1, ignored=()):
    y = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))
    for place in ignored:
        y[place] = -100
    return y


def composed(x, y, smoothing, epsilon, reduction, **o):
    """Row by row, with weights of the target and of all classes by their definition."""
    lp = pam_log_softmax(x, **o)
    losses, alls, count = [], [], 0
    for row, target in zip(lp, y.tolist(), strict=True):
        counts = target >= 0
        losses.append(-row[target] if counts else torch.zeros(()))
        alls.append(-row.sum() if counts else torch.zeros(()))
        count += counts
    own, others = torch.stack(losses), torch.stack(alls)
    if reduction != "none":
        own, others = own.sum(), others.sum()
    o.pop("lse_log2", None)
    if epsilon:
        share = epsilon / (V - 1) if smoothing == "fairseq" else epsilon / V
        rest = 1 - epsilon - share if smoothing == "fairseq" else 1 - epsilon
        own = pam_mul(own, rest, **o) + pam_mul(others, share, **o)
    return pam_div(own, float(count), **o) if reduction == "mean" else own


@pytest.mark.parametrize("alpha", ALPHAS[:2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing, epsilon", [("fairseq", 0.0), ("fairseq", 0.1), ("torch", 0.1)])
def test_it_is_its_composition(smoothing, epsilon, reduction, rule, alpha):
    x, y, o = logits(B, V), classes(B, ignored=(2, 5)), {"derivative": rule, "alpha": alpha}
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = pam_cross_entropy(own, y, label_smoothing=epsilon, smoothing=smoothing, reduction=reduction, **o)
    truth = composed(other, y, smoothing, epsilon, reduction, **o)
    assert_same(found, truth)
    grad = torch.ones_like(found)
    found.backward(grad)
    truth.backward(grad)
    assert_same(own.grad, other.grad)
    assert not own.grad[2].any() and not own.grad[5].any() and own.grad[0].any()


@pytest.mark.parametrize("rule", RULES)
def test_the_weights_of_a_smoothed_target_are_those_of_its_definition(rule):
    """In float64 by torch, of the piecewise affine log-probabilities; powers of two make the weights exact."""
    x, y = logits(B, 5), classes(B) % 5
    for smoothing, epsilon, classes_ in (("fairseq", 0.5, 5), ("torch", 0.5, 4)):
        xs, own = x[:, :classes_], y % classes_
        lp = pam_log_softmax(xs).double()
        share = epsilon / (classes_ - 1) if smoothing == "fairseq" else epsilon / classes_
        target = torch.full_like(lp, share)
        target[torch.arange(B), own] = 1 - epsilon if smoothing == "fairseq" else 1 - epsilon + share
        assert target.sum(-1).allclose(torch.ones(B, dtype=torch.float64))
        truth = -(target * lp).sum(-1)
        found = pam_cross_entropy(
            xs, own, label_smoothing=epsilon, smoothing=smoothing, reduction="none", derivative=rule
        )
        # 1 - epsilon - share of fairseq, 0.375, is no power of two: PAM may be a ninth low
        assert (found <= truth * (1 + 1e-6)).all() and (found >= truth * 8 / 9).all()
        if smoothing == "torch":
            assert torch.allclose(found.double(), truth, rtol=1e-6)


def test_the_mean_is_over_targets_that_count():
    x, y = logits(B, V), classes(B)
    y[::2] = -100
    assert_same(pam_cross_entropy(x, y), pam_cross_entropy(x[1::2], y[1::2]))
    z = y.masked_fill(y == -100, 3)
    z[1::2] = (z[1::2] + 1) % V
    assert_same(pam_cross_entropy(x, z, ignore_index=3), pam_cross_entropy(x, z.masked_fill(z == 3, -100)))
    one = pam_cross_entropy(x, y, reduction="none")
    assert one.shape == (B,) and not one[::2].any() and (one[1::2] > 0).all()
    assert pam_cross_entropy(x, torch.full((B,), -100)).isnan()
    assert pam_cross_entropy(x, torch.full((B,), -100), reduction="sum").item() == 0
    assert pam_cross_entropy(x[:0], y[:0], reduction="sum").item() == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inputs_of_more_dimensions(reduction, epsilon):
    x, y = logits(4, V, 3, 2), classes(4, 3, 2)
    y[1, 2, 0] = -100
    options = {"reduction": reduction, "label_smoothing": epsilon}
    flat = pam_cross_entropy(x.movedim(1, -1).reshape(-1, V), y.flatten(), **options)
    found = pam_cross_entropy(x, y, **options)
    assert found.shape == F.cross_entropy(x, y, reduction=reduction).shape
    if reduction == "none" and not epsilon:
        assert_same(found.flatten(), flat)
    else:  # torch's sums over another layout round another way
        assert torch.allclose(found.flatten(), flat, rtol=1e-6, atol=0)


def test_the_exact_logarithm_for_the_official_gradient():
    found = []
    for rule in (None, "approx", "exact"):
        x = logits(B, V).requires_grad_()
        pam_cross_entropy(x, classes(B), lse_log2=rule).backward()
        found.append(x.grad)
    assert_same(found[0], found[1])
    assert not same_bits(found[1], found[2])


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_near_cross_entropy_within_the_error_of_its_operations(scale):
    """x enters unchanged. The other term, lse / ln 2, errs by log2's .0861, by the exponentials' 6.15 % and by 1/9 of
    every |x| in them; PAD adds 1/8 of it, both here and in the mean."""
    x, y = logits(200, V, scale=scale), classes(200)
    lp, truth = pam_log_softmax(x).double(), torch.log_softmax(x.double(), -1)
    lse = x.double().logsumexp(-1, keepdim=True).abs()
    off = math.log(2) * 0.0861 + math.log(1.0615) + x.abs().amax(-1, keepdim=True) / 9
    bound = off + (lse + off) / 8
    assert ((lp - truth).abs() <= bound).all()
    mean = (-truth[torch.arange(200), y]).mean().item()
    room = bound.max().item()
    assert mean - room <= pam_cross_entropy(x, y).item() <= (mean + room) * 9 / 8


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_bfloat16_and_float64(epsilon):
    x, y = logits(B, V), classes(B)
    assert pam_cross_entropy(x.bfloat16(), y, label_smoothing=epsilon).dtype is torch.bfloat16
    wide = pam_cross_entropy(x.double(), y, label_smoothing=epsilon)
    assert wide.dtype is torch.float64
    assert pam_cross_entropy(x, y, label_smoothing=epsilon).item() == pytest.approx(wide.item(), rel=1e-5)


def test_certain_predictions_cost_nothing():
    x = torch.full((2, V), -1e4)
    x[0, 3] = x[1, 5] = 0.0
    assert pam_cross_entropy(x, torch.tensor([3, 5])).item() == 0


@pytest.mark.parametrize("make", [PAMCrossEntropy, lambda *o: pam_cross_entropy(logits(2, V), classes(2), *o)])
def test_class_weights_are_not_taken_for_an_option(make):
    with pytest.raises(TypeError, match="positional argument"):
        make(torch.ones(V))
