"""Contributions are exact reads: every number follows from predictions of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from multimodn import explain, stack
from multimodn.tests.networks import FEATURES, batch, every_task, multimodn, pfusion, some_missing, targets

NAMES = list(FEATURES)


def test_cumulative_is_the_mean_of_every_row_of_the_grid() -> None:
    model, x, masks, y = multimodn(), batch(30), some_missing(30), targets(30)
    frame = explain.cumulative(model, x, masks, targets=y)
    p = model.probabilities(model.eval()(x, masks))
    for task, classes in (("yes", 2), ("which", 3)):
        for step, name in enumerate(["start", *NAMES]):
            for label in range(classes):
                row = frame[(frame.task == task) & (frame.step == step) & (frame.label == label)]
                whole = row[row["of"] == "all"].iloc[0]
                own = p[task][step, :, label].double()
                assert whole.modality == name and whole.n == 30
                assert whole.probability == pytest.approx(own.mean().item(), abs=1e-7)
                assert whole["std"] == pytest.approx(own.std(correction=0).item(), abs=1e-7)
                for c in range(classes):
                    of = row[row["of"] == c].iloc[0]
                    assert of.n == int((y[task] == c).sum())
                    assert of.probability == pytest.approx(own[y[task] == c].mean().item(), abs=1e-7)


def test_individual_is_one_encoder_on_the_initial_state() -> None:
    model, x, masks = multimodn().eval(), batch(20), some_missing(20)
    frame = explain.individual(model, x, masks)
    start = model.decoders["yes"](model.initial_state).softmax(-1)[1]
    for k, name in enumerate(NAMES, 1):
        state = model.encoders[name](model.initial_state.expand(20, -1), x[name])
        change = model.decoders["yes"](state).softmax(-1)[:, 1] - start
        expected = torch.where(masks[name], change, 0.0).double().mean().item()
        row = frame[(frame.task == "yes") & (frame.modality == name) & (frame.label == 1)].iloc[0]
        assert row.step == k and row.contribution == pytest.approx(expected, abs=1e-6)
    absent = explain.individual(model, {n: v for n, v in x.items() if n != "b"}, {n: masks[n] for n in "ac"})
    assert (absent[absent.modality == "b"].contribution == 0).all()
    assert (absent[absent.modality == "a"].contribution != 0).all()


@pytest.mark.parametrize("make", [multimodn, pfusion])
def test_subsets_hide_the_others(make) -> None:
    model, x, y, masks = make().eval(), batch(40), targets(40), some_missing(40)
    frame = explain.subsets(model, x, y, masks)
    assert len(frame) == 8 and frame["size"].tolist() == [0, 1, 1, 2, 1, 2, 2, 3]
    for row in frame.to_dict("records"):
        shown = {n: m & (n in row["modalities"]) for n, m in masks.items()}
        p = model.predict(x, shown)["yes"][:, 1]
        assert row["yes"] == pytest.approx(roc_auc_score(y["yes"], p.numpy()), abs=1e-6)
        assert row["bits"] == sum(1 << NAMES.index(n) for n in row["modalities"])
    if make is multimodn:
        assert frame["yes"][0] == 0.5  # the initial state is the same for everybody


def test_jumps_add_up_to_the_last_score() -> None:
    model, x, y = multimodn(), batch(40), targets(40)
    frame = explain.jumps(model, x, y)
    for task in ("yes", "which"):
        own = frame[frame.task == task]
        assert own.modality.tolist() == ["start", *NAMES] and own.auroc.iloc[0] == 0.5
        assert np.isnan(own.increase.iloc[0])
        assert 0.5 + own.increase.iloc[1:].sum() == pytest.approx(own.auroc.iloc[-1])
    p = model.predict(x)["which"]
    expected = roc_auc_score(
        y["which"], p.double().numpy() / p.double().sum(1, keepdim=True).numpy(), multi_class="ovr"
    )
    assert frame[frame.task == "which"].auroc.iloc[-1] == pytest.approx(expected, abs=1e-6)


def test_regressions_have_no_score_but_a_value() -> None:
    model, x = every_task(), batch(10)
    frame = explain.cumulative(model, x)
    value = frame[(frame.task == "value") & (frame.step == 3)].iloc[0]
    assert value.probability == pytest.approx(model.predict(x)["value"].mean().item(), abs=1e-6)
    y = {"which": torch.arange(10) % 3, "labels": torch.zeros(10, 2), "value": torch.zeros(10)}
    assert set(explain.subsets(model, x, y).columns) == {"modalities", "bits", "size", "which"}


def test_the_mode_of_the_model_stays() -> None:
    model, x = multimodn(dropout=0.5).train(), batch()
    first, second = (explain.cumulative(model, x) for _ in range(2))
    assert model.training and first.equals(second)  # evaluated without dropout


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="take it out by `unstack`"):
        explain.cumulative(stack([multimodn()]), batch(lead=(1,)))
    with pytest.raises(ValueError, match="modalities=3: must be at most limit=2"):
        explain.subsets(multimodn(), batch(), targets(), limit=2)


def test_heat_map_has_a_cell_a_task_and_modality() -> None:
    model, x, y = multimodn(), batch(30), targets(30)
    figure = Figure()
    ax = figure.subplots()
    frame = explain.individual(model, x, targets=y)
    explain.heat_map(ax, frame, "contribution", of=1)
    chosen = frame[(frame["of"] == 1) & (frame.label == 1)]
    assert [t.get_text() for t in ax.get_xticklabels()] == NAMES
    assert [t.get_text() for t in ax.get_yticklabels()] == ["yes", "which"]
    assert [t.get_text() for t in ax.texts] == [format(v, "+.2f") for v in chosen.contribution]
