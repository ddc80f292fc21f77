"""The loss against explicit loops, its limits, missing labels, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from multimodn import ClassDecoder, MLPEncoder, MultiLabelDecoder, MultiModN, RegressionDecoder
from multimodn.tests.networks import S, batch, every_task, multimodn, some_missing, targets


def by_hand(model, grid, y, masks, normalise: str, error: float = 1.0, change: float = 0.0) -> float:
    """Explicit loops over rows, tasks and samples, in Python floats."""
    rows, size = grid.states.shape[0], grid.states.shape[1]
    total = 0.0
    for k in range(rows):
        for task in model.tasks:
            items = []
            for i in range(size):
                if k and not masks[list(masks)[k - 1]][i]:
                    continue
                if y[task][i] == -100:
                    continue
                z = grid.outputs[task][k, i].double()
                z = z.sigmoid() if model.decoders[task].link == "sigmoid" else z
                items.append((z.exp().sum().log() - z[y[task][i]]).item())
            total += sum(items) / (size if normalise == "constant" else max(1, len(items)))
    loss = error * total / (len(model.tasks) * rows)
    moved = 0.0
    for k in range(1, rows):
        steps = [(grid.states[k, i] - grid.states[k - 1, i]).double().square().mean().item() for i in range(size)]
        taken = int(masks[list(masks)[k - 1]].sum())
        moved += sum(steps) / (size if normalise == "constant" else max(1, taken))
    return loss + 0.01 * change * moved / (rows - 1)


@pytest.mark.parametrize("normalise", ["constant", "present"])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("error", "change"), [(1.0, 0.0), (0.7, 30.0)])
def test_the_loss_is_its_formula(normalise: str, link: str, error: float, change: float) -> None:
    model, x, y, masks = multimodn(link=link).double(), batch(), targets(), some_missing()
    y["yes"][2] = -100
    grid = model(x, masks)
    found = model.loss(grid, y, error_weight=error, state_change_weight=change, normalise=normalise)
    assert found.item() == pytest.approx(by_hand(model, grid, y, masks, normalise, error, change), rel=1e-10)


def test_one_encoder_and_one_task() -> None:
    """Half the cross-entropy of the initial state and half that of the first state."""
    model = MultiModN({"a": MLPEncoder(3, S)}, {"yes": ClassDecoder(S)}, S)
    x, y = {"a": torch.randn(5, 3)}, torch.tensor([0, 1, 1, 0, 1])
    grid = model(x)
    expected = sum(F.cross_entropy(grid.outputs["yes"][k], y) for k in (0, 1)) / 2
    torch.testing.assert_close(model.loss(grid, {"yes": y}), expected)
    assert model.loss(grid, {"yes": y}, error_weight=0.0).item() == 0.0


def test_the_official_loss_lies_in_its_bounds() -> None:
    model = multimodn(link="sigmoid")
    decoder = model.decoders["yes"]
    outputs = torch.tensor([[50.0, -50.0], [-50.0, 50.0], [0.0, 0.0]])
    loss = decoder.loss(outputs, torch.tensor([0, 0, 1]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.e), math.log(2)], rel=1e-6)
    p = decoder.probabilities(outputs)
    assert torch.equal(p.argmax(-1)[:2], outputs.argmax(-1)[:2]) and p.sum(-1).allclose(torch.ones(3))
    rising = decoder.probabilities(torch.stack([torch.zeros(9), torch.linspace(-3, 3, 9)], 1))[:, 1]
    assert (rising.diff() > 0).all() and rising[4] == 0.5


def test_a_step_that_is_skipped_costs_nothing_and_weighs_less() -> None:
    model, x, y = multimodn(), batch(), targets()
    x["b"][:] = torch.nan
    grid = model(x)
    rows = [0, 1, 3]
    cells = [F.cross_entropy(grid.outputs[t][k], y[t]) for k in rows for t in ("yes", "which")]
    torch.testing.assert_close(model.loss(grid, y), sum(cells) / 8)  # the denominator D (K + 1) = 8 stays


def test_state_change() -> None:
    class Shift(torch.nn.Module):
        state_size = S

        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return state + self.by

    y = {"yes": torch.tensor([0, 1])}
    for by in (0.0, 3.0):
        model = MultiModN({"a": Shift(by), "b": Shift(by)}, {"yes": ClassDecoder(S)}, S)
        grid = model({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)})
        moved = model.loss(grid, y, error_weight=0.0, state_change_weight=100.0)
        assert moved.item() == pytest.approx(by**2)  # 0.01 · 100 · (c² + c²) / 2
    model, x, y = multimodn(), batch(), targets()
    model.loss(model(x), y, error_weight=0.0, state_change_weight=1.0).backward()
    assert model.initial_state.grad.any() and model.encoders["a"].last.weight.grad.any()


def test_other_targets() -> None:
    model, x = every_task().double(), batch()
    y = {
        "which": torch.tensor([0, 1, 2, -100, 0, 1, 2, 0]),
        "labels": torch.tensor([[0.0, 1.0], [1.0, torch.nan], [torch.nan, torch.nan]] + [[1.0, 1.0]] * 5),
        "value": torch.tensor([0.5, torch.nan, *[1.0] * 6]),
    }
    grid = model(x)
    for normalise in ("constant", "present"):
        expected = 0.0
        for k in range(4):
            o = {t: v[k] for t, v in grid.outputs.items()}
            known = y["which"] != -100
            ce = F.cross_entropy(o["which"][known], y["which"][known], reduction="sum")
            bce = sum(
                torch.stack([
                    F.binary_cross_entropy_with_logits(z, t) for z, t in zip(row, label, strict=True) if not t.isnan()
                ]).mean()
                for row, label in zip(o["labels"], y["labels"].double(), strict=True) if not label.isnan().all()
            )  # fmt: skip
            mse = ((o["value"][:, 0] - y["value"]).square()[[0, *range(2, 8)]]).sum()
            counts = (8, 8, 8) if normalise == "constant" else (7, 7, 7)
            expected += ce / counts[0] + bce / counts[1] + mse / counts[2]
        torch.testing.assert_close(model.loss(grid, y, normalise=normalise), expected / 12)


def test_copies_of_a_task_give_the_loss_of_one() -> None:
    model, x, y = multimodn(), batch(), targets()
    decoder = model.decoders["yes"]
    one = MultiModN(dict(model.encoders), {"yes": decoder}, S)
    three = MultiModN(dict(model.encoders), {t: decoder for t in "uvw"}, S)
    for twin in (one, three):
        twin.initial_state = model.initial_state
    first = one.loss(one(x), {"yes": y["yes"]})
    torch.testing.assert_close(three.loss(three(x), dict.fromkeys("uvw", y["yes"])), first)


def test_gradient() -> None:
    model, x, y, masks = multimodn(joins="output").double(), batch(3), targets(3), some_missing(3)
    x = {n: v.double().requires_grad_() for n, v in x.items()}

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        grid = model(dict(zip(x, inputs, strict=True)), masks)
        return model.loss(grid, y, state_change_weight=50.0, normalise="present")

    assert torch.autograd.gradcheck(loss, tuple(x.values()))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ({"yes": torch.tensor([0, 2])}, ValueError, r"target=2: must be in \[0, 1\], or -100"),
        ({"yes": torch.tensor([0, -1])}, ValueError, "target=-1"),
        ({}, KeyError, "no labels of task 'yes'"),
    ],
)
def test_labels_that_are_refused(y: dict, error: type, message: str) -> None:
    model = MultiModN({"a": MLPEncoder(3, S)}, {"yes": ClassDecoder(S)}, S)
    with pytest.raises(error, match=message):
        model.loss(model({"a": torch.randn(2, 3)}), y)


def test_other_labels_that_are_refused() -> None:
    with pytest.raises(ValueError, match="target=2.0: must be 0, 1, or NaN"):
        MultiLabelDecoder(S, 2).check_target(torch.tensor([[0.0, 2.0]]))
    with pytest.raises(ValueError, match=r"target.shape=\(1, 3\)"):
        MultiLabelDecoder(S, 2).check_target(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="target=inf"):
        RegressionDecoder(S).check_target(torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match="normalise=sum: must be one of constant, present"):
        model = multimodn()
        model.loss(model(batch()), targets(), normalise="sum")
    for make, message in (
        (lambda: ClassDecoder(S, 1), "classes=1"),
        (lambda: ClassDecoder(S, link="relu"), "link=relu: must be one of softmax, sigmoid"),
        (lambda: MultiLabelDecoder(S, 0), "labels=0"),
        (lambda: RegressionDecoder(0), "state_size=0"),
        (lambda: MLPEncoder(0, S), "features=0"),
        (lambda: MLPEncoder(1, S, (0,)), "hidden=\\[0\\]"),
        (lambda: MLPEncoder(1, S, joins="middle"), "joins=middle: must be one of input, output, none"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
