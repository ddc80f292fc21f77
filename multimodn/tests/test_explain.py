"""Contributions are exact reads: every number follows from predictions of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from multimodn import explain, stack
from multimodn.decoders import ClassDecoder
from multimodn.model import MultiModN
from multimodn.tests.networks import FEATURES, batch, every_task, multimodn, pfusion, some_missing, targets

NAMES = list(FEATURES)


class Adds(nn.Module):
    """Adds its feature, times a number, to the state; the second one doubles what came before."""

    state_size = 1

    def __init__(self, times: float, keep: float = 1.0) -> None:
        super().__init__()
        self.times, self.keep = times, keep

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return self.keep * state + self.times * x


def by_hand() -> MultiModN:
    """The log odds of class 1 are the state: 0.5, then + 2 u, then (doubled) - v."""
    decoder = ClassDecoder(1, 2, ())
    with torch.no_grad():
        decoder.last.weight.copy_(torch.tensor([[0.0], [1.0]]))
        decoder.last.bias.zero_()
    return MultiModN({"u": Adds(2.0), "v": Adds(-1.0, 2.0)}, {"yes": decoder}, 1, initial_state=torch.tensor([0.5]))


def odds(x: float) -> float:
    return 1 / (1 + float(np.exp(-x)))


def cell(frame, modality: str, column: str, of: object = "all") -> float:
    chosen = frame[(frame.modality == modality) & (frame.label == 1) & (frame["of"] == of)]
    assert len(chosen) == 1
    return chosen[column].iloc[0]


def test_contributions_of_a_model_by_hand() -> None:
    model = by_hand()
    x = {"u": torch.tensor([[1.0], [torch.nan], [-1.0]]), "v": torch.tensor([[3.0], [1.0], [torch.nan]])}
    y = {"yes": torch.tensor([1, 0, -100])}
    chain = np.array([[0.5, 2.5, 2.0], [0.5, 0.5, 0.0], [0.5, -1.5, -1.5]])  # log odds; a skipped step changes nothing
    p = 1 / (1 + np.exp(-chain))
    samples = explain.cumulative_samples(model, x, task="yes")
    assert list(samples.columns) == ["start", "u", "v"] and samples.to_numpy() == pytest.approx(p, abs=1e-6)
    other = explain.cumulative_samples(model, x, task="yes", label=0)
    assert other.to_numpy() == pytest.approx(1 - p, abs=1e-6)

    frame = explain.cumulative(model, x, targets=y)
    for k, name in enumerate(["start", "u", "v"]):
        assert cell(frame, name, "probability") == pytest.approx(p[:, k].mean(), abs=1e-6)
        assert cell(frame, name, "probability", of=1) == pytest.approx(p[0, k], abs=1e-6)
        assert cell(frame, name, "n") == 3 and cell(frame, name, "n", of=0) == 1
    assert set(frame["of"]) == {"all", 0, 1}  # a sample without label is nobody's
    assert [cell(frame, name, "taken") for name in ("start", "u", "v")] == [3, 2, 2]
    assert [cell(frame, name, "taken", of=0) for name in ("start", "u", "v")] == [1, 0, 1]

    steps = explain.stepwise(model, x, targets=y)
    assert steps.step.unique().tolist() == [1, 2]
    assert cell(steps, "u", "contribution") == pytest.approx((p[:, 1] - p[:, 0]).mean(), abs=1e-6)
    assert cell(steps, "v", "contribution", of=1) == pytest.approx(p[0, 2] - p[0, 1], abs=1e-6)
    assert cell(steps, "v", "std") == pytest.approx((p[:, 2] - p[:, 1]).std(), abs=1e-6)
    assert cell(steps, "u", "contribution", of=0) == 0 and cell(steps, "u", "taken") == 2

    alone = explain.individual(model, x, targets=y)
    assert cell(alone, "u", "contribution", of=1) == pytest.approx(odds(2.5) - odds(0.5), abs=1e-6)
    # v sees the initial state, not what u left: 2 * 0.5 - v
    assert cell(alone, "v", "contribution", of=1) == pytest.approx(odds(-2.0) - odds(0.5), abs=1e-6)
    assert cell(alone, "v", "contribution", of=0) == pytest.approx(odds(0.0) - odds(0.5), abs=1e-6)
    assert cell(alone, "v", "taken") == 2 and cell(alone, "u", "taken", of=0) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sets(st.sampled_from(NAMES), min_size=1))
def test_steps_add_up_to_the_last_prediction(seed: int, size: int, given_: set[str]) -> None:
    model, masks = multimodn(seed), {n: m for n, m in some_missing(size, seed).items() if n in given_}
    x = {n: v for n, v in batch(size, seed).items() if n in given_}
    for task, label in (("yes", 1), ("which", 2)):
        samples = explain.cumulative_samples(model, x, masks, task=task, label=label)
        last = model.predict(x, masks)[task][:, label]
        assert samples.iloc[:, -1].to_numpy() == pytest.approx(last.numpy(), abs=1e-6)
        steps = explain.stepwise(model, x, masks)
        own = steps[(steps.task == task) & (steps.label == label)]
        total = samples.iloc[:, -1].mean() - samples["start"].mean()
        assert own.contribution.sum() == pytest.approx(total, abs=1e-6)
        assert own.taken.tolist() == [int(masks[n].sum()) if n in masks else 0 for n in NAMES]
        assert (own.contribution[own.taken == 0] == 0).all()
        alone = explain.individual(model, x, masks)
        first = alone[(alone.task == task) & (alone.label == label)].iloc[0]
        assert first.contribution == pytest.approx(own.contribution.iloc[0], abs=1e-6)  # the first step is alone
        assert first.taken == own.taken.iloc[0]


@pytest.mark.parametrize("k", [1, 2])
def test_a_row_is_what_the_first_encoders_alone_say(k: int) -> None:
    model, x, masks = multimodn(), batch(9), some_missing(9)
    frame = explain.cumulative(model, x, masks)
    short = MultiModN(
        {n: model.encoders[n] for n in NAMES[:k]},
        dict(model.decoders.items()),
        model.state_size,
        initial_state=model.initial_state,
    )
    cut = explain.cumulative(short, {n: x[n] for n in NAMES[:k]}, {n: masks[n] for n in NAMES[:k]})
    same = frame[frame.step <= k].reset_index(drop=True).sort_values(["task", "step", "label"], ignore_index=True)
    cut = cut.sort_values(["task", "step", "label"], ignore_index=True)
    assert same.drop(columns=["probability", "std"]).equals(cut.drop(columns=["probability", "std"]))
    assert same.probability.to_numpy() == pytest.approx(cut.probability.to_numpy(), abs=1e-7)


def test_a_sample_does_not_depend_on_its_batch_even_in_a_model_of_the_batch_rule() -> None:
    model, x, masks = multimodn(), batch(6), some_missing(6)
    model.missing = "batch"
    whole = explain.cumulative_samples(model, x, masks, task="yes").to_numpy()
    assert not all(m.all() for m in masks.values())
    for i in range(6):
        one = explain.cumulative_samples(
            model, {n: v[i : i + 1] for n, v in x.items()}, {n: m[i : i + 1] for n, m in masks.items()}, task="yes"
        )
        assert one.to_numpy()[0] == pytest.approx(whole[i], abs=1e-6)


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


def test_a_planted_modality_makes_the_largest_jump() -> None:
    model, rng = by_hand(), torch.Generator().manual_seed(0)
    y = {"yes": torch.randint(2, (300,), generator=rng)}
    noise = torch.randn(300, 2, generator=rng)
    for carrier, other in (("u", "v"), ("v", "u")):
        signal = (2 * y["yes"] - 1).unsqueeze(-1) * (3.0 if carrier == "u" else -9.0)
        x = {carrier: signal + noise[:, :1], other: noise[:, 1:]}
        increase = explain.jumps(model, x, y).set_index("modality").increase
        assert increase[["u", "v"]].idxmax() == carrier


def test_a_task_without_targets_has_no_score() -> None:
    model, x, y = multimodn(), batch(20), {"yes": targets(20)["yes"]}
    assert set(explain.jumps(model, x, y).task) == {"yes"}
    assert "which" not in explain.subsets(model, x, y).columns
    frame = explain.cumulative(model, x, targets=y)
    assert set(frame[frame.task == "which"]["of"]) == {"all"} and set(frame[frame.task == "yes"]["of"]) == {"all", 0, 1}


def test_regressions_have_no_score_but_a_value() -> None:
    model, x = every_task(), batch(10)
    frame = explain.cumulative(model, x)
    value = frame[(frame.task == "value") & (frame.step == 3)].iloc[0]
    assert value.probability == pytest.approx(model.predict(x)["value"].mean().item(), abs=1e-6)
    samples = explain.cumulative_samples(model, x, task="value")
    assert samples["c"].to_numpy() == pytest.approx(model.predict(x)["value"][:, 0].numpy(), abs=1e-6)
    y = {"which": torch.arange(10) % 3, "labels": torch.zeros(10, 2), "value": torch.zeros(10)}
    assert set(explain.subsets(model, x, y).columns) == {"modalities", "bits", "size", "which"}


@pytest.mark.parametrize("name", ["cumulative", "stepwise", "individual", "jumps", "subsets", "cumulative_samples"])
def test_the_mode_of_every_part_stays(name: str) -> None:
    model, x = multimodn(dropout=0.5).train(), batch(20)
    model.encoders["b"].eval()  # frozen
    modes = [part.training for part in model.modules()]
    options = {"targets": targets(20)} if name in ("jumps", "subsets") else {}
    options |= {"task": "yes"} if name == "cumulative_samples" else {}
    first, second = (getattr(explain, name)(model, x, **options) for _ in range(2))
    assert first.equals(second)  # evaluated without dropout
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(KeyError, match="'d' is not one of"):
        getattr(explain, name)(model, x | {"d": x["a"]}, **options)
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused() -> None:
    stacked, x, y = stack([multimodn()]), batch(lead=(1,)), targets(lead=(1,))
    for call in (
        lambda: explain.cumulative(stacked, x),
        lambda: explain.cumulative_samples(stacked, x, task="yes"),
        lambda: explain.stepwise(stacked, x),
        lambda: explain.individual(stacked, x),
        lambda: explain.jumps(stacked, x, y),
        lambda: explain.subsets(stacked, x, y),
    ):
        with pytest.raises(ValueError, match="take it out by `unstack`"):
            call()
    with pytest.raises(ValueError, match="modalities=3: must be at most limit=2"):
        explain.subsets(multimodn(), batch(), targets(), limit=2)
    assert len(explain.subsets(multimodn(), batch(30), targets(30), limit=3)) == 8
    with pytest.raises(KeyError, match="task='no': must be one of yes, which"):
        explain.cumulative_samples(multimodn(), batch(), task="no")
    for label in (-1, 2):
        with pytest.raises(ValueError, match=rf"label={label}: must be in \[0, 1\]"):
            explain.cumulative_samples(multimodn(), batch(), task="yes", label=label)


def test_pivot_has_tasks_by_modalities_in_the_order_of_the_model() -> None:
    model, x, y = multimodn(), batch(30), targets(30)  # tasks: yes, which, not in the order of the alphabet
    table = explain.pivot(explain.cumulative(model, x, targets=y), "probability", of=1, label=0)
    assert list(table.columns) == ["start", *NAMES] and list(table.index) == ["yes", "which"]
    p = model.probabilities(model.eval()(x))
    for task in table.index:
        expected = p[task][:, y[task] == 1, 0].mean(1).detach().numpy()
        assert table.loc[task].to_numpy() == pytest.approx(expected, abs=1e-6)
    third = explain.pivot(explain.individual(model, x), "contribution", label=2)
    assert list(third.index) == ["which"] and list(third.columns) == NAMES
    jumps = explain.jumps(model, x, y)
    assert list(explain.pivot(jumps, "auroc").columns) == ["start", *NAMES]
    increase = explain.pivot(jumps, "increase")
    assert list(increase.columns) == NAMES
    assert increase.loc["which"].tolist() == jumps[jumps.task == "which"].increase.iloc[1:].tolist()


def test_pivot_refuses_what_the_frame_lacks() -> None:
    frame = explain.cumulative(multimodn(), batch(), targets={"yes": torch.ones(8).long()})
    with pytest.raises(ValueError, match="of=0: must be one of all, 1"):
        explain.pivot(frame, "probability", of=0)
    with pytest.raises(ValueError, match="label=3: must be one of 0, 1"):
        explain.pivot(frame, "probability", label=3)
    with pytest.raises(ValueError, match="value=contribution: must be one of step, modality"):
        explain.pivot(frame, "contribution")


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
    labels = [a.get_ylabel() for a in figure.axes]
    assert "contribution of class 1" in labels
    other = Figure()
    explain.heat_map(other.subplots(), explain.jumps(model, x, y), "increase")
    assert "increase" in [a.get_ylabel() for a in other.axes]
    third = Figure().subplots()
    explain.heat_map(third, frame, "contribution", label=2)
    assert [t.get_text() for t in third.get_yticklabels()] == ["which"]
