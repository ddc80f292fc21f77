"""MultiModN with the batch rule and the official loss against a plain loop: grid, loss, gradients, Adam's steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn import ClassDecoder, MLPEncoder, MultiModN, RegressionDecoder, stack
from multimodn.reference import Confusion, ReferenceMultiModN, has_nan

torch.set_num_threads(1)
F64 = torch.float64
WIDTHS = {"history": 3, "image": 5, "notes": 2}
TASKS = ("ill", "stays")
B, S = 6, 4


def build(joins: str = "input", dropout: float = 0.0, seed: int = 0, classes: int = 2) -> MultiModN:
    torch.manual_seed(seed)
    encoders = {name: MLPEncoder(width, S, (7,), dropout, joins) for name, width in WIDTHS.items()}
    decoders = {task: ClassDecoder(S, classes, (5,), link="sigmoid") for task in TASKS}
    return MultiModN(encoders, decoders, S, missing="batch").double()


def draw(seed: int, b: int = B, classes: int = 2) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(b, width, generator=g, dtype=F64) for name, width in WIDTHS.items()}
    return inputs, torch.randint(classes, (b, len(TASKS)), generator=g)


def named(targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {task: targets[:, d] for d, task in enumerate(TASKS)}


def spoil(inputs: dict[str, torch.Tensor], pattern: str) -> None:
    if pattern == "one modality lost":
        inputs["image"][:] = math.nan
    elif pattern == "one number lost":
        inputs["image"][2, 3] = math.nan
    elif pattern == "first and last":
        inputs["history"][0] = math.nan
        inputs["notes"][-1, 1] = math.nan
    elif pattern == "nothing left":
        for x in inputs.values():
            x[1] = math.nan


PATTERNS = ("complete", "one modality lost", "one number lost", "first and last", "nothing left")
WEIGHTS = ({}, {"error_weight": 0.7, "state_change_weight": 30.0}, {"error_weight": 0.0, "state_change_weight": 1.0})


def pairs(model: MultiModN, reference: ReferenceMultiModN) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    mine = [model.initial_state, *model.encoders.parameters(), *model.decoders.parameters()]
    theirs = [reference.initial_state, *reference.encoders.parameters(), *reference.decoders.parameters()]
    return list(zip(mine, theirs, strict=True))


def model_loss(model: MultiModN, inputs: dict, targets: torch.Tensor, weights: dict) -> torch.Tensor:
    return model.loss(model(inputs), named(targets), **weights)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("joins", ["input", "output"])
@pytest.mark.parametrize("classes", [2, 3])
def test_same_grid(pattern: str, joins: str, classes: int) -> None:
    model = build(joins, classes=classes)
    inputs, _ = draw(1)
    spoil(inputs, pattern)
    expected = ReferenceMultiModN.from_model(model).predict_grid(list(inputs.values()))
    with torch.no_grad():
        mine = model.probabilities(model(inputs))
    for d, task in enumerate(TASKS):
        assert expected[d].shape == (4, B, classes)
        torch.testing.assert_close(mine[task], expected[d], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("joins", ["input", "output"])
def test_same_loss_gradients_and_step_of_adam(pattern: str, weights: dict, joins: str) -> None:
    model = build(joins)
    reference = ReferenceMultiModN.from_model(model, **weights)
    inputs, targets = draw(2)
    spoil(inputs, pattern)
    ours = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch.optim.Adam(reference.parameters(), lr=1e-2)
    loss = model_loss(model, inputs, targets, weights)
    loss.backward()
    assert reference.train_step(list(inputs.values()), targets, theirs) == pytest.approx(loss.item(), rel=1e-12)
    for mine, other in pairs(model, reference):
        other_grad = torch.zeros_like(other) if other.grad is None else other.grad
        mine_grad = torch.zeros_like(mine) if mine.grad is None else mine.grad
        torch.testing.assert_close(mine_grad, other_grad, rtol=1e-10, atol=1e-13)
    ours.step()
    for mine, other in pairs(model, reference):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_twenty_steps_on_complete_batches_end_at_the_same_parameters() -> None:
    model, weights = build(dropout=0.3), {"state_change_weight": 5.0}
    reference = ReferenceMultiModN.from_model(model, **weights)
    start = copy.deepcopy(reference)
    ours = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for step in range(20):
        inputs, targets = draw(step)
        torch.manual_seed(step)  # both draw the same dropout
        ours.zero_grad()
        loss = model_loss(model, inputs, targets, weights)
        loss.backward()
        ours.step()
        torch.manual_seed(step)
        assert reference.train_step(list(inputs.values()), targets, theirs) == pytest.approx(loss.item(), rel=1e-7)
    for (mine, other), old in zip(pairs(model, reference), start.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
        assert not torch.equal(other, old)


def test_adam_leaves_a_skipped_encoder_of_the_reference_where_it_is() -> None:
    reference = ReferenceMultiModN.from_model(build())
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2)
    inputs, targets = draw(0)
    reference.train_step(list(inputs.values()), targets, adam)
    before = copy.deepcopy(reference)
    spoil(inputs, "one modality lost")
    reference.train_step(list(inputs.values()), targets, adam)
    for k, (encoder, old) in enumerate(zip(reference.encoders, before.encoders, strict=True)):
        moved = [not torch.equal(p, q) for p, q in zip(encoder.parameters(), old.parameters(), strict=True)]
        assert any(moved) == (k != 1)


def test_twenty_steps_with_skipped_batches_agree() -> None:
    """An encoder that a batch skips has no gradient, so that Adam's momentum does not move it."""
    model = build()
    reference = ReferenceMultiModN.from_model(model)
    ours = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for step in range(20):
        inputs, targets = draw(step)
        spoil(inputs, PATTERNS[step % len(PATTERNS)])
        ours.zero_grad()
        model_loss(model, inputs, targets, {}).backward()
        ours.step()
        theirs.zero_grad()
        reference.batch_loss(list(inputs.values()), targets).backward()
        theirs.step()
    for mine, other in pairs(model, reference):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 2), st.integers(0, B - 1), st.integers(0, 1))))
def test_loss_agrees_wherever_numbers_are_missing(seed: int, holes: list[tuple[int, int, int]]) -> None:
    model = build(seed=seed)
    inputs, targets = draw(seed)
    for modality, row, column in holes:
        list(inputs.values())[modality][row, column] = math.nan
    weights = {"error_weight": 1.3, "state_change_weight": 40.0}
    reference = ReferenceMultiModN.from_model(model, **weights)
    expected = reference.batch_loss(list(inputs.values()), targets)
    torch.testing.assert_close(model_loss(model, inputs, targets, weights), expected, rtol=1e-12, atol=1e-14)


def test_loss_is_the_sum_written_out() -> None:
    """Two encoders that add a constant, one linear decoder: every number by hand."""

    class Add(torch.nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return state + self.by

    decoder = ClassDecoder(1, 2, (), link="sigmoid").double()
    with torch.no_grad():
        decoder.last.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        decoder.last.bias.copy_(torch.tensor([0.5, 0.25]))
    start = torch.nn.Parameter(torch.tensor([0.3], dtype=F64))
    targets = torch.tensor([[1], [0], [1]])

    def error(state: float) -> float:
        o = [1 / (1 + math.exp(-(state + 0.5))), 1 / (1 + math.exp(2 * state - 0.25))]
        total = math.log(math.exp(o[0]) + math.exp(o[1]))
        return sum(total - o[y] for y in (1, 0, 1)) / 3

    reference = ReferenceMultiModN([Add(2.0), Add(-3.0)], [decoder], start, error_weight=0.6, state_change_weight=10.0)
    x = torch.zeros(3, 1, dtype=F64)
    hole = torch.tensor([[0.0], [math.nan], [0.0]], dtype=F64)
    whole = 0.6 * (error(0.3) + error(2.3) + error(-0.7)) / 3 + 0.01 * 10 * (4 + 9) / 2
    assert reference.batch_loss([x, x], targets).item() == pytest.approx(whole, rel=1e-12)
    skipped = 0.6 * (error(0.3) + error(-2.7)) / 3 + 0.01 * 10 * 9 / 2
    assert reference.batch_loss([hole, x], targets).item() == pytest.approx(skipped, rel=1e-12)
    low, high = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert all(low <= error(s) <= high for s in (-50, 0.3, 2.3, 50))


def test_chain_without_encoders_is_the_error_of_the_initial_state() -> None:
    decoder = ClassDecoder(S, 2, (), link="sigmoid").double()
    reference = ReferenceMultiModN([], [decoder], torch.ones(S, dtype=F64), state_change_weight=1.0)
    assert not [name for name, _ in reference.named_parameters() if "initial" in name]
    targets = torch.tensor([[0], [1]])
    expected = F.cross_entropy(decoder(torch.ones(2, S, dtype=F64)).sigmoid(), targets[:, 0])
    torch.testing.assert_close(reference.batch_loss([], targets), expected)


def test_confusion_counts_the_cells_that_were_computed() -> None:
    model = build()
    reference = ReferenceMultiModN.from_model(model).eval()
    total = torch.zeros(4, len(TASKS), 2, 2, dtype=torch.int64)
    for seed, pattern in enumerate(("complete", "one modality lost", "complete")):
        inputs, targets = draw(seed)
        spoil(inputs, pattern)
        reference.batch_loss(list(inputs.values()), targets)
        for d, p in enumerate(reference.predict_grid(list(inputs.values()))):
            for k in range(4):
                if not (k == 2 and pattern != "complete"):
                    for truth, said in zip(targets[:, d].tolist(), p[k].argmax(-1).tolist(), strict=True):
                        total[k, d, truth, said] += 1
    counts = torch.stack([torch.stack([cell.counts for cell in row]) for row in reference.confusion])
    assert torch.equal(counts, total) and counts.sum((-2, -1)).tolist() == [[18, 18], [18, 18], [12, 12], [18, 18]]
    reference.reset_metrics()
    assert all(cell.counts.sum() == 0 for row in reference.confusion for cell in row)


def test_confusion_has_the_truth_in_rows_and_the_true_denominator() -> None:
    cell = Confusion(3)
    assert math.isnan(cell.accuracy())
    cell.update(torch.tensor([2, 0, 2]), torch.tensor([1, 0, 2]))
    cell.update(torch.tensor([2]), torch.tensor([1]))
    assert cell.counts.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 1]]
    assert cell.accuracy() == 0.5


def test_from_model_shares_nothing_and_keeps_the_mode() -> None:
    model = build(dropout=0.5).eval()
    before = copy.deepcopy(model.state_dict())
    reference = ReferenceMultiModN.from_model(model)
    assert not reference.training
    inputs, targets = draw(3)
    grid = reference.predict_grid(list(inputs.values()))
    assert not reference.training
    reference.train_step(list(inputs.values()), targets, torch.optim.Adam(reference.parameters(), lr=0.1))
    assert reference.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.manual_seed(0)
    after = reference.predict_grid(list(inputs.values()))
    assert reference.training and not torch.equal(grid[0], after[0])
    assert torch.equal(after[0], reference.predict_grid(list(inputs.values()))[0])  # no dropout


def test_nan_is_found_wherever_it_is() -> None:
    x = torch.zeros(2, 3)
    assert not has_nan(x) and not has_nan(torch.tensor([math.inf]))
    for i in range(6):
        spoiled = x.clone()
        spoiled.view(-1)[i] = math.nan
        assert has_nan(spoiled)


def test_errors() -> None:
    model = build()
    with pytest.raises(ValueError, match="n_models=2: must be None"):
        ReferenceMultiModN.from_model(stack([model, model]))
    for decoder in (ClassDecoder(S), RegressionDecoder(S)):
        with pytest.raises(ValueError, match=rf"decoders={type(decoder).__name__}: must be a ClassDecoder with link"):
            ReferenceMultiModN.from_model(MultiModN({}, {"t": decoder}, S))
    with pytest.raises(ValueError, match=r"decoders=\[\]"):
        ReferenceMultiModN([], [], torch.zeros(S))
    reference = ReferenceMultiModN.from_model(model)
    inputs, targets = draw(0)
    with pytest.raises(ValueError, match=r"len\(inputs\)=2: must be 3, one an encoder"):
        reference.batch_loss(list(inputs.values())[:2], targets)
    with pytest.raises(ValueError, match=r"len\(inputs\)=0"):
        reference.predict_grid([])
    with pytest.raises(ValueError, match=r"targets.shape=\(6, 1\): must be \(B, D\)"):
        reference.batch_loss(list(inputs.values()), targets[:, :1])
    for wrong in (-100, 2):
        bad = targets.clone()
        bad[1, 1] = wrong
        with pytest.raises(ValueError, match=rf"targets={wrong}: must be in \[0, 1\]"):
            reference.batch_loss(list(inputs.values()), bad)
    empty = ReferenceMultiModN([], [ClassDecoder(S, link="sigmoid")], torch.zeros(S))
    with pytest.raises(ValueError, match=r"inputs=\[\]: must be at least one tensor"):
        empty.predict_grid([])
