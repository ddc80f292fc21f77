"""P-Fusion: both published forms, padding, the bits of what is missing."""

from __future__ import annotations

import pytest
import torch

from multimodn import ClassDecoder, MLPEncoder, PFusion, RawEncoder
from multimodn.tests.networks import FEATURES, S, batch, pfusion, some_missing, targets


def test_with_encoders_it_is_its_formula() -> None:
    model, x = pfusion().double(), {k: v.double() for k, v in batch().items()}
    parts = []
    for name in FEATURES:
        e = model.encoders[name]
        h = torch.relu(x[name] @ e.layers[0].weight.T + e.layers[0].bias)
        parts.append(torch.relu(h @ e.last.weight.T + e.last.bias))
    d = model.decoders["yes"]
    h = torch.relu(torch.cat(parts, 1) @ d.layers[0].weight.T + d.layers[0].bias)
    grid = model(x)
    torch.testing.assert_close(grid.outputs["yes"][0], h @ d.last.weight.T + d.last.bias)
    assert grid.outputs["yes"].shape == (1, 8, 2) and grid.present.shape == (0, 8)


def test_of_raw_columns_it_is_one_perceptron() -> None:
    decoder = ClassDecoder(10, 2, (4,))
    model, x = PFusion({n: RawEncoder(f) for n, f in FEATURES.items()}, {"yes": decoder}), batch()
    torch.testing.assert_close(model(x).outputs["yes"][0], decoder(torch.cat(list(x.values()), 1)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize("indicator", [False, True])
def test_missing_is_zeros_and_perhaps_a_bit(indicator: bool) -> None:
    model, x, masks = pfusion(indicator=indicator), batch(), some_missing()
    hidden = {n: torch.where(masks[n][:, None], v, torch.nan) for n, v in x.items()}
    zeros = {n: torch.where(masks[n][:, None], v, 0.0) for n, v in x.items()}
    found, padded = model(hidden), model(zeros)
    assert found.states.isfinite().all()
    if indicator:
        bits = found.states[0, :, -3:]
        assert torch.equal(bits, torch.stack([(~m).float() for m in masks.values()], 1))
        assert torch.equal(found.states[..., :-3], padded.states[..., :-3])
        assert not padded.states[..., -3:].any()
    else:
        assert torch.equal(found.states, padded.states)
    assert torch.equal(model(x, masks).states, found.states)


def test_the_batch_rule_pads_for_everybody() -> None:
    model, x = pfusion(), batch()
    x["b"][3] = torch.nan
    zeros = x | {"b": torch.zeros(8, 5)}
    assert torch.equal(model(x, missing="batch").states, model(zeros).states)
    assert not torch.equal(model(x).states, model(zeros).states)
    own = PFusion(dict(model.encoders), dict(model.decoders), missing="batch")
    assert torch.equal(own(x).states, model(zeros).states)


def test_no_bit_is_set_where_all_are_known_to_be_present() -> None:
    model, x = pfusion(indicator=True), batch()
    grid = model(x, dict.fromkeys(FEATURES))
    assert not grid.states[..., -3:].any() and torch.equal(grid.states, model(x).states)


def test_the_loss_is_the_mean_over_tasks() -> None:
    model, x, y = pfusion(), batch(), targets()
    grid = model(x)
    expected = sum(torch.nn.functional.cross_entropy(grid.outputs[t][0], y[t]) for t in y) / 2
    torch.testing.assert_close(model.loss(grid, y), expected)


def test_gradients_have_no_nan() -> None:
    model, x, y = pfusion(), batch(), targets()
    x["a"][0] = torch.nan
    model.loss(model(x), y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="without b: must be all modalities"):
        pfusion()({n: v for n, v in batch().items() if n != "b"})
    with pytest.raises(ValueError, match=r"decoders.yes.state_size=6: must be 18"):
        PFusion({n: MLPEncoder(f, S, joins="none") for n, f in FEATURES.items()}, {"yes": ClassDecoder(S)})
    with pytest.raises(ValueError, match="at least one encoder"):
        PFusion({}, {"yes": ClassDecoder(S)})
    with pytest.raises(ValueError, match="at least one decoder"):
        PFusion({"a": RawEncoder(2)}, {})
