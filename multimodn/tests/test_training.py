"""Training in memory: reproducible, resumable, the same alone and in a stack."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from multimodn import Rows, Rule, fit, stack, training, unstack
from multimodn.missing import leak
from multimodn.tests.networks import batch, every_task, multimodn, pfusion, some_missing, targets

N, ROWS = 3, 40


def rows(lead: tuple[int, ...] = (), missing: bool = True) -> Rows:
    masks = some_missing(ROWS, lead=lead) if missing else None
    return Rows.of(batch(ROWS, lead=lead), targets(ROWS, lead=lead), masks)


def numbers(model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", [multimodn, pfusion])
@pytest.mark.parametrize("how", ["sample", "batch", "robust", Rule(dropout=0.5)])
def test_a_stack_learns_what_each_model_does_alone(make, how) -> None:
    data, stacked = rows((N,)), stack([make(s) for s in range(N)])
    fit(stacked, data, missing=how, epochs=2, batch_size=16, lr=1e-2, seeds=[4, 5, 6])
    for i, model in enumerate(unstack(stacked)):
        alone = make(i)
        own = Rows(*({k: v[i] for k, v in part.items()} for part in (data.inputs, data.masks, data.targets)))
        fit(alone, own, missing=how, epochs=2, batch_size=16, lr=1e-2, seeds=4 + i)
        # batched products round otherwise, and Adam's first steps amplify that where gradients vanish
        close = (numbers(model) - numbers(alone)).abs() < 1e-4
        assert close.float().mean() > 0.99


@pytest.mark.parametrize("make", [multimodn, pfusion])
def test_neighbours_do_not_matter_with_dropout(make) -> None:
    data = rows((N,))
    many = stack([make(s, dropout=0.3) for s in range(N)])
    fit(many, data, epochs=2, batch_size=16, seeds=[4, 5, 6])
    two = stack([make(s, dropout=0.3) for s in (0, 1)])
    part = Rows(*({k: v[:2] for k, v in p.items()} for p in (data.inputs, data.masks, data.targets)))
    fit(two, part, epochs=2, batch_size=16, seeds=[4, 5])
    first, second = unstack(many)[1], unstack(two)[1]
    torch.testing.assert_close(numbers(first), numbers(second), rtol=1e-4, atol=1e-5)


def test_training_is_a_function_of_its_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model = multimodn(dropout=0.3)
        torch.rand(seed + 3)  # the global generator's state does not matter
        fit(model, rows(), epochs=2, batch_size=16, seeds=seed)
        found.append(numbers(model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_learns() -> None:
    data, losses = rows(missing=False), []
    fit(multimodn(), data, epochs=60, batch_size=8, lr=1e-2, on_epoch=lambda e, loss: losses.append(loss.item()))
    assert len(losses) == 60 and losses[-1] < 0.7 * losses[0]


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    plain = stack([multimodn(s, dropout=0.3) for s in range(2)])
    fit(plain, rows((2,)), epochs=4, batch_size=16, missing="robust", seeds=[1, 2])

    def stop(epoch: int, loss: Tensor) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    first = stack([multimodn(s, dropout=0.3) for s in range(2)])
    options = {"epochs": 4, "batch_size": 16, "missing": "robust", "seeds": [1, 2], "checkpoints": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(first, rows((2,)), on_epoch=stop, **options)
    epochs: list[int] = []
    second = stack([multimodn(s + 7, dropout=0.3) for s in range(2)])  # other weights: the checkpoint's count
    fit(second, rows((2,)), on_epoch=lambda e, _: epochs.append(e), **options)
    assert epochs == [3, 4] and torch.equal(numbers(second), numbers(plain))


def test_steps_before_an_interruption_count_as_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    plain, model = multimodn(), multimodn()
    fit(plain, rows(), epochs=9, batch_size=16, max_steps=8)
    fit(model, rows(), epochs=2, batch_size=16, checkpoints=tmp_path)  # 6 steps
    fit(model, rows(), epochs=9, batch_size=16, max_steps=8, checkpoints=tmp_path)
    assert torch.equal(numbers(model), numbers(plain))


def test_checkpoints_are_rare(tmp_path: Path) -> None:
    start = time.monotonic()
    fit(multimodn(), rows(), epochs=3, checkpoints=tmp_path)
    assert time.monotonic() - start > training.CHECKPOINT_SECONDS or not list(tmp_path.glob("checkpoint-*"))


def test_the_rows_of_an_epoch() -> None:
    """File order without shuffling, another order every epoch with it, all rows once."""
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        state_size = 6

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, state: Tensor, x: Tensor) -> Tensor:
            seen.append(x[:, 0].clone())
            return state * self.scale

    from multimodn import ClassDecoder, MultiModN

    data = Rows.of({"a": torch.arange(10.0)[:, None]}, {"yes": torch.zeros(10, dtype=torch.long)})
    model = MultiModN({"a": Spy()}, {"yes": ClassDecoder(6)}, 6)
    fit(model, data, epochs=1, batch_size=4, shuffle=False)
    assert [len(part) for part in seen] == [4, 4, 2] and torch.cat(seen).tolist() == list(range(10))
    seen.clear()
    fit(model, data, epochs=2, batch_size=4)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != list(range(10)) and first.tolist() != second.tolist()
    seen.clear()
    fit(model, data, epochs=5, batch_size=4, max_steps=2)
    assert len(seen) == 2


def test_shuffled_orders_are_all_used_and_repeatable() -> None:
    model = multimodn()
    found = [tuple(training._order(model, step)) for step in range(600)]
    counts = {order: found.count(order) for order in set(found)}
    assert len(counts) == 6 and min(counts.values()) > 60  # 100 expected, standard deviation 9
    assert found[:5] == [tuple(training._order(model, step)) for step in range(5)]
    trained = [multimodn() for _ in range(2)]
    for one in trained:
        fit(one, rows(), missing=Rule(shuffle=True), epochs=1)
    assert torch.equal(numbers(trained[0]), numbers(trained[1]))
    x = batch()
    assert torch.equal(trained[0].eval()(x).states, trained[0](x, order=["a", "b", "c"]).states)


def test_a_leak_penalty_changes_training() -> None:
    found = []
    for weight in (0.0, 10.0):
        model = multimodn()
        fit(model, rows(), missing=Rule(leak_weight=weight), epochs=1)
        found.append(numbers(model))
    assert not torch.equal(*found)


def test_rows_clean_what_is_missing() -> None:
    x = batch(4)
    x["a"][1, 2] = torch.nan
    data = Rows.of(x, targets(4))
    assert data.masks["a"].tolist() == [True, False, True, True] and not data.inputs["a"][1].any()
    assert data.masks["b"].all() and len(data) == 4
    part = data.take(torch.tensor([3, 1]))
    assert torch.equal(part.inputs["b"], x["b"][[3, 1]]) and part.masks["a"].tolist() == [True, False]
    many = rows((N,)).take(torch.tensor([[0, 1], [2, 3], [4, 5]]))
    assert torch.equal(many.targets["yes"][1], targets(ROWS, lead=(N,))["yes"][1, 2:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"seeds": [1, 2]}, "one seed a model"),
        ({"missing": "never"}, "missing=never"),
    ],
)
def test_what_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(multimodn(), rows(), **options)
    wrong = rows()
    wrong.targets["yes"][0] = 2
    with pytest.raises(ValueError, match="target=2"):
        fit(multimodn(), wrong)
    with pytest.raises(KeyError, match="no labels of task 'which'"):
        fit(multimodn(), Rows.of(batch(), {"yes": targets()["yes"]}))


@pytest.mark.parametrize("how", ["sample", "batch"])
@pytest.mark.parametrize("normalise", ["constant", "present"])
def test_fit_is_adam_on_the_loss_of_batches_in_order(how: str, normalise: str) -> None:
    """Against the loop written out; float64, options other than the defaults."""
    data, options = rows(), {"error_weight": 0.7, "state_change_weight": 30.0, "normalise": normalise}
    plain, fitted = multimodn().double(), multimodn().double()
    optimizer = torch.optim.Adam(plain.parameters(), lr=3e-3)
    means = []
    for _ in range(3):
        losses = []
        for begin in range(0, ROWS, 12):
            index = torch.arange(begin, min(begin + 12, ROWS))
            part = data.take(index)
            optimizer.zero_grad()
            loss = plain.loss(plain(part.inputs, part.masks, missing=how), part.targets, **options)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    found: list[tuple[int, float]] = []
    report = lambda epoch, loss: found.append((epoch, loss.item()))  # noqa: E731
    fit(fitted, data, missing=how, epochs=3, batch_size=12, lr=3e-3, shuffle=False, on_epoch=report, **options)
    torch.testing.assert_close(numbers(fitted), numbers(plain), rtol=1e-9, atol=1e-9)
    assert [epoch for epoch, _ in found] == [1, 2, 3]
    assert [loss for _, loss in found] == pytest.approx(means, rel=1e-9)


@pytest.mark.parametrize("make", [multimodn, pfusion])
def test_twenty_steps_of_a_stack_are_twenty_steps_of_each_model(make) -> None:
    data, stacked = rows((N,)), stack([make(s).double() for s in range(N)])
    fit(stacked, data, epochs=99, max_steps=20, batch_size=16, seeds=[4, 5, 6])
    for i, model in enumerate(unstack(stacked)):
        alone = make(i).double()
        own = Rows(*({k: v[i] for k, v in part.items()} for part in (data.inputs, data.masks, data.targets)))
        fit(alone, own, epochs=99, max_steps=20, batch_size=16, seeds=4 + i)
        torch.testing.assert_close(numbers(model), numbers(alone), rtol=1e-5, atol=1e-5)


def test_evaluation_mode_does_not_switch_dropout_off() -> None:
    found = []
    for model in (multimodn(dropout=0.5).eval(), multimodn(dropout=0.5).train()):
        fit(model, rows(), epochs=1)
        assert model.training
        found.append(numbers(model))
    assert torch.equal(*found)


def test_what_is_hidden_is_drawn_anew_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    model, data = multimodn(), rows()
    forward = model.forward

    def spy(inputs, masks, **options):
        seen.append(masks["a"].clone())
        return forward(inputs, masks, **options)

    monkeypatch.setattr(model, "forward", spy)
    fit(model, data, missing=Rule(dropout=0.5), epochs=40, batch_size=ROWS, shuffle=False)
    drawn = torch.stack(seen)
    assert len(drawn.unique(dim=0)) > 30
    assert not drawn[:, ~data.masks["a"]].any()  # what is missing stays missing
    assert drawn[:, data.masks["a"]].float().mean() == pytest.approx(0.5, abs=0.06)  # ~1000 draws, sd 0.016


def test_a_leak_penalty_takes_the_leak_away() -> None:
    y = torch.arange(200) % 2
    data = Rows.of({"a": torch.randn(200, 3), "b": torch.randn(200, 5), "c": torch.randn(200, 2)},
                   {"yes": y, "which": y}, {"a": y == 0})  # fmt: skip
    left, reported = [], []
    for weight in (0.0, 100.0):
        still = multimodn()  # hardly moves: what is reported is the loss of the grid, without the penalty
        fit(still, data, missing=Rule(leak_weight=weight), epochs=1, lr=1e-12,
            on_epoch=lambda _, loss: reported.append(loss.item()))  # fmt: skip
        model = multimodn()
        fit(model, data, missing=Rule(leak_weight=weight), epochs=10, lr=1e-2)
        with torch.no_grad():
            grid = model.eval()(data.inputs, data.masks)
        left.append(leak(grid.states, grid.present).item())
    assert left[1] < 0.05 * left[0]
    assert reported[0] == pytest.approx(reported[1], rel=1e-5)


def test_a_shuffle_of_encoders_is_for_chains_only() -> None:
    found = []
    for how in (Rule(shuffle=True), Rule()):
        model = pfusion()
        fit(model, rows(), missing=how, epochs=1)
        found.append(numbers(model))
    assert torch.equal(*found)


def test_rows_of_labels_with_more_dimensions() -> None:
    """Several labels a sample in front, sequences, stacks of either, and masks that are left to the NaN."""
    labels, steps = torch.ones(6, 2), torch.randn(6, 4, 3)
    steps[2, 1, 0] = torch.nan
    x = {"t": steps, "a": torch.randn(6, 3)}
    for y in ({"labels": labels}, {"labels": labels, "yes": torch.zeros(6)}, {"yes": torch.zeros(6)}, {}):
        data = Rows.of(x, y, {"a": None})
        assert data.masks["t"].tolist() == [True, True, False, True, True, True] and data.masks["a"].all()
        assert not data.inputs["t"][2].any() and len(data) == 6
    many = Rows.of({n: torch.stack([v, v.flip(0)]) for n, v in x.items()}, {"labels": torch.ones(2, 6, 2)})
    assert many.masks["t"].shape == (2, 6) and (~many.masks["t"]).nonzero().tolist() == [[0, 2], [1, 3]]
    told = Rows.of({"t": torch.randn(6, 2, 3)}, {"labels": labels}, {"t": torch.arange(6) > 2})  # (6, 2) both
    assert not told.inputs["t"][:3].any() and told.inputs["t"][3:].all()


def test_every_kind_of_task_is_learnt() -> None:
    x = batch(64)
    y = {"labels": (x["a"][:, :2] > 0).float(), "which": (x["b"][:, 0] > 0).long(), "value": x["c"].sum(1)}
    y["labels"][0, 1], y["value"][1], y["which"][2] = torch.nan, torch.nan, -100
    for how in ("sample", "robust"):
        losses: list[float] = []
        fit(every_task(), Rows.of(x, y), missing=how, epochs=40, lr=1e-2,
            on_epoch=lambda _, loss, losses=losses: losses.append(loss.item()))  # fmt: skip
        assert losses[-1] < 0.7 * losses[0]
