"""The loss of a grid beyond its formula: the prior, bounds, permuted tasks, stacks and options that must agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn import ClassDecoder, MLPEncoder, MultiModN, Rows, fit, metrics, stack
from multimodn.loss import grid_loss
from multimodn.tests.networks import FEATURES, S, batch, every_task, multimodn, pfusion, some_missing, targets


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_official_loss_stays_in_its_bounds(seed: int) -> None:
    """A mean of binary cells, each in [ln(1 + 1/e), ln(1 + e)]; the outputs are large on purpose."""
    model = MultiModN({n: MLPEncoder(f, S) for n, f in FEATURES.items()}, {"yes": ClassDecoder(S, link="sigmoid")}, S)
    with torch.no_grad():
        model.decoders["yes"].last.weight.mul_(100)
    loss = model.loss(model(batch(seed=seed)), {"yes": targets(seed=seed)["yes"]}).item()
    assert math.log(1 + math.exp(-1)) - 1e-6 <= loss <= math.log(1 + math.e) + 1e-6


def test_the_initial_state_says_nothing_about_a_sample() -> None:
    grid = multimodn().eval()(batch(31))
    for outputs in grid.outputs.values():
        assert (outputs[0] == outputs[0, 0]).all()
    assert metrics.auroc(grid.outputs["yes"][0, :, 1], targets(31)["yes"]).item() == 0.5


def test_without_any_modality_training_ends_at_the_share_of_each_class() -> None:
    y = torch.tensor([0] * 12 + [1] * 28)
    model = MultiModN({"a": MLPEncoder(3, S)}, {"yes": ClassDecoder(S)}, S)
    rows = Rows.of({"a": torch.full((40, 3), torch.nan)}, {"yes": y})
    fit(model, rows, epochs=200, batch_size=40, lr=1e-2)
    assert model.predict(rows.inputs, rows.masks)["yes"][:, 1].tolist() == pytest.approx([0.7] * 40, abs=0.005)


def test_the_order_of_tasks_does_not_matter() -> None:
    model, x, y, masks = multimodn().double(), batch(), targets(), some_missing()
    turned = MultiModN(dict(model.encoders), {t: model.decoders[t] for t in ("which", "yes")}, S)
    turned.initial_state = model.initial_state
    torch.testing.assert_close(turned.loss(turned(x, masks), y), model.loss(model(x, masks), y))
    more = y | {"other": y["yes"]}  # labels of a task that the model does not have
    assert model.loss(model(x, masks), more) == model.loss(model(x, masks), y)


def test_on_complete_data_both_denominators_are_the_batch() -> None:
    model, x, y = multimodn().double(), batch(), targets()
    one, other = (model.loss(model(x), y, state_change_weight=9.0, normalise=n) for n in ("constant", "present"))
    torch.testing.assert_close(one, other)


def test_one_sample_that_took_a_step_decides_its_state_change() -> None:
    """`present` divides by the samples that moved, here one, `constant` by all eight."""
    model, x, y = multimodn().double(), batch(), targets()
    masks = {n: torch.arange(8) == 5 for n in FEATURES}
    grid = model(x, masks)
    moved = [(grid.states[k, 5] - grid.states[k - 1, 5]).square().mean() for k in (1, 2, 3)]
    options = {"error_weight": 0.0, "state_change_weight": 100.0}
    torch.testing.assert_close(model.loss(grid, y, normalise="present", **options), sum(moved) / 3)
    torch.testing.assert_close(model.loss(grid, y, normalise="constant", **options), sum(moved) / 24)


@pytest.mark.parametrize("normalise", ["constant", "present"])
def test_stacked_models_of_every_task_have_their_own_loss(normalise: str) -> None:
    models, x, masks = [every_task(s).double() for s in range(2)], batch(lead=(2,)), some_missing(lead=(2,))
    labels = (torch.rand(2, 8, 2, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    labels[0, 3], labels[1, 2, 1] = torch.nan, torch.nan
    value = torch.linspace(-1, 1, 16).view(2, 8)
    value[1, 0] = torch.nan
    y = {"which": targets(lead=(2,))["which"], "labels": labels, "value": value}
    stacked = stack(models)
    options = {"state_change_weight": 5.0, "normalise": normalise}
    found = stacked.loss(stacked(x, masks), y, **options)
    for i, model in enumerate(models):
        grid = model({n: v[i] for n, v in x.items()}, {n: m[i] for n, m in masks.items()})
        torch.testing.assert_close(found[i], model.loss(grid, {t: v[i] for t, v in y.items()}, **options))


@pytest.mark.parametrize("make", [multimodn, pfusion])
def test_labels_are_looked_at_unless_told_otherwise(make) -> None:
    model, y = make(), targets()
    grid = model(batch())
    plain = model.loss(grid, y)
    assert model.loss(grid, y, validate=False) == plain
    y["yes"][1] = 7
    with pytest.raises(ValueError, match="target=7"):
        model.loss(grid, y)
    with pytest.raises(IndexError):  # torch's own, from inside the loss
        model.loss(grid, y, validate=False)


def test_a_state_change_needs_states() -> None:
    model, y = multimodn(), targets()
    grid = model(batch())
    parts = (model.decoders, grid.outputs, y, grid.present)
    assert grid_loss(*parts) == model.loss(grid, y)
    with pytest.raises(ValueError, match="states=None: state_change_weight needs the states"):
        grid_loss(*parts, state_change_weight=1.0)
