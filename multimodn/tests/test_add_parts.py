"""A trained model grows: new modalities and tasks learn, frozen parts stay bitwise as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multimodn import ClassDecoder, MLPEncoder, MultiModN, RegressionDecoder, Rows, fit, stack, unstack
from multimodn.tests.networks import S, batch, multimodn, targets

ROWS = 40


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def grown() -> tuple[MultiModN, Rows]:
    """A frozen model with a new modality and a new task, and rows for it."""
    model = multimodn()
    model.requires_grad_(False)
    model.add_modality("d", MLPEncoder(4, S))
    model.add_task("value", RegressionDecoder(S))
    rng = torch.Generator().manual_seed(0)
    x = batch(ROWS) | {"d": torch.randn(ROWS, 4, generator=rng)}
    return model, Rows.of(x, targets(ROWS) | {"value": x["d"].sum(1)})


def test_fit_leaves_frozen_parts_and_their_rows_bitwise() -> None:
    model, rows = grown()
    before, grid = snapshot(model), model.eval()(rows.inputs)
    fit(model, rows, epochs=2, batch_size=16)
    for name, value in model.state_dict().items():
        new = name.startswith(("encoders.d.", "decoders.value."))
        assert torch.equal(value, before[name]) != new, name
    after = model.eval()(rows.inputs)
    assert torch.equal(after.states[:4], grid.states[:4]) and not torch.equal(after.states[4], grid.states[4])
    for task in ("yes", "which"):
        assert torch.equal(after.outputs[task][:4], grid.outputs[task][:4])


def test_stacked_models_stay_frozen() -> None:
    models = [grown()[0] for _ in range(2)]
    _, rows = grown()
    two = Rows(*({k: torch.stack([v, v]) for k, v in p.items()} for p in (rows.inputs, rows.masks, rows.targets)))
    stacked = stack(models)
    assert {n for n, p in stacked.named_parameters() if p.requires_grad} == {
        n for n, p in models[0].named_parameters() if p.requires_grad
    }
    before = snapshot(stacked)
    fit(stacked, two, epochs=1, batch_size=16, seeds=[0, 1])
    for name, value in stacked.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(("encoders.d.", "decoders.value.")), name
    for one in unstack(stacked):
        assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in models[0].parameters()]
    models[1].requires_grad_(True)
    with pytest.raises(ValueError, match="must be of one architecture"):
        stack(models)


def test_a_new_task_learns_from_states_that_stay() -> None:
    model, rows = multimodn(), Rows.of(batch(ROWS), targets(ROWS) | {"late": (batch(ROWS)["a"][:, 0] > 0).long()})
    model.requires_grad_(False)
    model.add_task("late", ClassDecoder(S))
    before, losses = model.eval()(rows.inputs), []
    fit(model, rows, epochs=40, lr=1e-2, on_epoch=lambda _, loss: losses.append(loss.item()))
    after = model.eval()(rows.inputs)
    assert torch.equal(after.states, before.states) and losses[-1] < losses[0]
    assert torch.equal(after.outputs["yes"], before.outputs["yes"])
    assert not torch.equal(after.outputs["late"], before.outputs["late"])


def test_a_new_modality_may_stand_anywhere_in_an_order() -> None:
    model, rows = grown()
    x = rows.inputs
    early, plain = model(x, order=["d", "a", "b", "c"]), model(x)
    torch.testing.assert_close(early.states[1], model.encoders["d"](plain.states[0], x["d"]))
    assert torch.equal(model(x, order=["a", "b", "c"]).states, plain.states[:4])


def test_a_model_grown_part_by_part_is_one_built_at_once() -> None:
    whole = multimodn()
    parts = MultiModN({}, {"yes": whole.decoders["yes"]}, S)
    for name in whole.modalities:
        parts.add_modality(name, whole.encoders[name])
    parts.add_task("which", whole.decoders["which"])
    parts.initial_state = whole.initial_state
    assert (parts.modalities, parts.tasks) == (whole.modalities, whole.tasks)
    assert list(parts.state_dict()) == list(whole.state_dict())
    assert torch.equal(parts(batch()).states, whole(batch()).states)


def test_parts_that_are_refused_leave_the_model_alone() -> None:
    model = multimodn()
    for add, message in (
        (lambda: model.add_modality("b", MLPEncoder(5, S)), "encoders=b: must be a new name; there are a, b, c"),
        (lambda: model.add_modality("", MLPEncoder(5, S)), "encoders='': must be a name without dots"),
        (lambda: model.add_modality("d", MLPEncoder(5, S + 1)), "encoders.d.state_size=7: must be the model's"),
        (lambda: model.add_task("yes", ClassDecoder(S)), "decoders=yes: must be a new name; there are yes, which"),
        (lambda: model.add_task("x.y", ClassDecoder(S)), r"decoders='x\.y': must be a name without dots"),
        (lambda: model.add_task("late", ClassDecoder(S - 1)), "decoders.late.state_size=5: must be the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            add()
    assert model.modalities == ("a", "b", "c") and model.tasks == ("yes", "which")
