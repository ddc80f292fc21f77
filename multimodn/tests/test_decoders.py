"""Each kind of decoder by its formula: outputs, loss, probabilities, labels that are missing or wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn.decoders import MISSING, ClassDecoder, Decoder, MultiLabelDecoder, RegressionDecoder
from multimodn.tests.networks import S

numbers = st.lists(st.floats(-30, 30), min_size=3, max_size=3)
NAN = math.nan


def kinds() -> list[tuple[Decoder, torch.Tensor, torch.Tensor]]:
    """Decoder, targets of four samples, which of them have a label."""
    return [
        (ClassDecoder(S, 3), torch.tensor([0, MISSING, 2, 1]), torch.tensor([True, False, True, True])),
        (ClassDecoder(S, 3, link="sigmoid"), torch.tensor([MISSING, 1, 2, 0]), torch.tensor([False, True, True, True])),
        (
            MultiLabelDecoder(S, 2),
            torch.tensor([[0, 1], [NAN, NAN], [1, NAN], [1, 1]]),
            torch.tensor([True, False, True, True]),
        ),
        (RegressionDecoder(S), torch.tensor([0.5, -2.0, NAN, 0.0]), torch.tensor([True, True, False, True])),
    ]


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_outputs_are_those_of_a_perceptron(hidden: tuple[int, ...]) -> None:
    decoder, state = ClassDecoder(S, 3, hidden).double(), torch.randn(2, 4, S, dtype=torch.float64)
    h = state
    for layer in decoder.layers:
        h = torch.clamp(h @ layer.weight.T + layer.bias, min=0)
    torch.testing.assert_close(decoder(state), h @ decoder.last.weight.T + decoder.last.bias)
    assert [layer.out_features for layer in decoder.layers] == list(hidden)


@given(numbers, st.integers(0, 2), st.sampled_from(["softmax", "sigmoid"]))
@settings(max_examples=60, deadline=None)
def test_classes(outputs: list[float], label: int, link: str) -> None:
    decoder, o = ClassDecoder(S, 3, link=link), torch.tensor([outputs], dtype=torch.float64)
    z = [1 / (1 + math.exp(-v)) for v in outputs] if link == "sigmoid" else outputs
    top = max(z)
    expected = top + math.log(sum(math.exp(v - top) for v in z)) - z[label]
    assert decoder.loss(o, torch.tensor([label])).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    weights = z if link == "sigmoid" else [math.exp(v - top) for v in z]
    expected_p = [w / sum(weights) for w in weights]
    assert decoder.probabilities(o)[0].tolist() == pytest.approx(expected_p, rel=1e-9)
    if link == "sigmoid":  # outputs in (0, 1) taken as logits of three classes
        assert math.log(1 + 2 / math.e) - 1e-12 <= expected <= math.log(1 + 2 * math.e) + 1e-12


@given(numbers)
@settings(max_examples=40, deadline=None)
def test_the_official_probability_agrees_with_the_larger_output(outputs: list[float]) -> None:
    o = torch.tensor(outputs[:2], dtype=torch.float64)
    p = ClassDecoder(S, link="sigmoid").probabilities(o)
    if p[1] != 0.5:
        assert (p[1] > 0.5) == (o[1] > o[0])
    assert p.sum().item() == pytest.approx(1.0)


@given(numbers, st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_several_labels(outputs: list[float], labels: list[float]) -> None:
    """Mean over the labels that are known of -log p(label)."""
    decoder, o = MultiLabelDecoder(S, 3), torch.tensor([outputs], dtype=torch.float64)
    known = [(v, y) for v, y in zip(outputs, labels, strict=True) if not math.isnan(y)]
    each = [math.log1p(math.exp(-v if y else v)) for v, y in known]
    found = decoder.loss(o, torch.tensor([labels]))
    assert found.item() == pytest.approx(sum(each) / max(1, len(each)), rel=1e-6, abs=1e-12)
    assert decoder.labelled(torch.tensor([labels])).item() == bool(known)


def test_real_values() -> None:
    decoder, o = RegressionDecoder(S), torch.tensor([[1.5], [-1.0], [3.0]])
    assert decoder.loss(o, torch.tensor([0.5, 1.0, NAN])).tolist() == [1.0, 4.0, 0.0]
    assert decoder.loss(o, torch.tensor([1, 1, 1])).tolist() == [0.25, 4.0, 4.0]  # integers will do
    assert torch.equal(decoder.probabilities(o), o)


@pytest.mark.parametrize("kind", range(4))
def test_a_missing_label_costs_and_teaches_nothing(kind: int) -> None:
    decoder, target, known = kinds()[kind]
    decoder.check_target(target)
    assert torch.equal(decoder.labelled(target), known)
    state = torch.randn(4, S, requires_grad=True)
    loss = decoder.loss(decoder(state), target)
    assert loss.shape == (4,) and (loss[known] > 0).all() and (loss[~known] == 0).all()
    loss.sum().backward()
    assert state.grad is not None and state.grad.isfinite().all()
    assert not state.grad[~known].any() and state.grad[known].any(-1).all()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("kind", range(4))
def test_leading_axes(kind: int) -> None:
    """Rows of the grid and stacked models in front change nothing."""
    decoder, target, _ = kinds()[kind]
    states = torch.randn(2, 3, 4, S)
    wide = decoder.loss(decoder(states), target.expand(2, 3, *target.shape))
    for i in range(2):
        for k in range(3):
            torch.testing.assert_close(wide[i, k], decoder.loss(decoder(states[i, k]), target))


@pytest.mark.parametrize("kind", range(4))
def test_the_config_builds_the_decoder_again(kind: int) -> None:
    decoder, _, _ = kinds()[kind]
    twin = type(decoder)(**decoder.config)
    twin.load_state_dict(decoder.state_dict())  # strict: of other sizes it would not fit
    state = torch.randn(5, S)
    assert twin.config == decoder.config
    assert type(decoder)(**(decoder.config | {"hidden": [3]})).hidden == (3,)
    assert torch.equal(twin.probabilities(twin(state)), decoder.probabilities(decoder(state)))


@pytest.mark.parametrize("label", [-1, -99, -101, 3])
def test_classes_that_do_not_exist(label: int) -> None:
    decoder = ClassDecoder(S, 3)
    decoder.check_target(torch.tensor([0, 2, MISSING]))
    with pytest.raises(ValueError, match=rf"target={label}: must be in \[0, 2\], or -100 for missing"):
        decoder.check_target(torch.tensor([0, label]))


@pytest.mark.parametrize("label", [0.5, -1.0, 2.0, math.inf])
def test_labels_that_are_neither_yes_nor_no(label: float) -> None:
    with pytest.raises(ValueError, match=rf"target={label}: must be 0, 1, or NaN"):
        MultiLabelDecoder(S, 2).check_target(torch.tensor([[0.0, 1.0], [NAN, label]]))


def test_widths_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden=\[4, 0\]: must be a list of integers >= 1"):
        ClassDecoder(S, hidden=(4, 0))
    with pytest.raises(ValueError, match="state_size=0: must be >= 1"):
        MultiLabelDecoder(0, 2)
