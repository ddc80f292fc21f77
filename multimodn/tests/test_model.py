"""The chain: prefixes, skipping, orders, what stays untouched, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn import ClassDecoder, MLPEncoder, MultiModN, stack
from multimodn.tests.networks import FEATURES, S, batch, every_task, multimodn, pfusion, some_missing, targets

NAMES = list(FEATURES)
masks_of_5 = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=3, max_size=3)


def test_the_chain_is_its_formula() -> None:
    """s_k = ReLU(W2 ReLU(W1 [x, s] + b1) + b2), decoders on every state; float64, by hand."""
    model, x = multimodn().double(), {k: v.double() for k, v in batch().items()}
    grid = model(x)
    state = model.initial_state.expand(8, S)
    states = [state]
    for name in NAMES:
        e = model.encoders[name]
        h = torch.relu(torch.cat([x[name], state], 1) @ e.layers[0].weight.T + e.layers[0].bias)
        state = torch.relu(h @ e.last.weight.T + e.last.bias)
        states.append(state)
    torch.testing.assert_close(grid.states, torch.stack(states), rtol=1e-12, atol=1e-12)
    d = model.decoders["yes"]
    logits = torch.relu(torch.stack(states) @ d.layers[0].weight.T + d.layers[0].bias) @ d.last.weight.T + d.last.bias
    torch.testing.assert_close(grid.outputs["yes"], logits, rtol=1e-12, atol=1e-12)
    assert grid.present.all() and grid.present.shape == (3, 8)
    p = model.probabilities(grid)["yes"]
    torch.testing.assert_close(p, logits.softmax(-1))


def test_late_entry_of_the_state_is_its_formula() -> None:
    """The generic encoder: hidden layers on x alone, the last layer linear on [h, s] without activation."""
    model, x = multimodn(joins="output").double(), batch()["a"].double()
    e, s = model.encoders["a"], torch.randn(8, S, dtype=torch.float64)
    h = torch.relu(x @ e.layers[0].weight.T + e.layers[0].bias)
    expected = torch.cat([h, s], 1) @ e.last.weight.T + e.last.bias
    torch.testing.assert_close(e(s, x), expected)
    assert (expected < 0).any()


@pytest.mark.parametrize("joins", ["input", "output", "none"])
def test_dropout_acts_once_on_what_enters(joins: str) -> None:
    """On [x, s] where the state enters with the features, on x alone otherwise."""
    e = MLPEncoder(3, S, (), 0.5, joins)
    width = e.last.in_features
    with torch.no_grad():
        e.last.weight.copy_(torch.eye(S, width))  # the first S of what the layer reads
        e.last.bias.zero_()
    out = e(torch.full((400, S), 3.0), torch.ones(400, 3))
    assert sorted(out[:, :3].unique().tolist()) == [0.0, 2.0]  # scaled by 1 / (1 - p)
    entered = out[:, 3:].unique().tolist()
    assert entered == {"input": [0.0, 6.0], "output": [3.0], "none": [0.0]}[joins]
    assert MLPEncoder(**e.config).dropout.p == 0.5
    assert torch.equal(e.eval()(torch.zeros(1, S), torch.ones(1, 3))[0, :3], torch.ones(3))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_prefix_is_a_shorter_model_bitwise(k: int) -> None:
    model, x = multimodn().eval(), batch()
    short = MultiModN({n: model.encoders[n] for n in NAMES[:k]}, dict(model.decoders), S)
    short.initial_state = model.initial_state
    whole, cut = model(x), short({n: x[n] for n in NAMES[:k]})
    assert torch.equal(whole.states[: k + 1], cut.states)
    for task in model.tasks:
        torch.testing.assert_close(whole.outputs[task][: k + 1], cut.outputs[task], rtol=0, atol=1e-6)


def test_a_model_without_encoders_is_the_prior() -> None:
    model = MultiModN({}, {"yes": ClassDecoder(S)}, S)
    with pytest.raises(ValueError, match="at least one modality"):
        model({})
    model.add_modality("a", MLPEncoder(3, S))
    grid = model({"a": torch.full((4, 3), torch.nan)})
    assert torch.equal(grid.states[0], grid.states[1]) and not grid.present.any()


def test_a_modality_that_nobody_has_is_skipped() -> None:
    model, x, y = multimodn(), batch(), targets()
    x["b"][:] = torch.nan
    grid = model(x)
    assert torch.equal(grid.states[2], grid.states[1]) and not torch.equal(grid.states[3], grid.states[2])
    model.loss(grid, y).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.encoders["b"].parameters())
    assert all(p.grad.any() for p in model.encoders["c"].parameters())
    left_out = model({name: v for name, v in x.items() if name != "b"})
    assert torch.equal(left_out.states, grid.states) and torch.equal(left_out.present, grid.present)


@given(masks_of_5)
@settings(max_examples=40, deadline=None)
def test_sample_by_sample_is_one_sample_at_a_time(rows: list[list[bool]]) -> None:
    """And neither values, loss nor gradients see what is missing, be it NaN, infinite or anything else."""
    model, x, y = multimodn(), batch(5), targets(5)
    masks = {name: torch.tensor(row) for name, row in zip(NAMES, rows, strict=True)}
    hidden = {n: torch.where(masks[n][:, None], v, torch.nan) for n, v in x.items()}
    grid = model(hidden)
    for i in range(5):
        one = model({n: v[i : i + 1] for n, v in hidden.items()})
        torch.testing.assert_close(one.states[:, 0], grid.states[:, i], rtol=0, atol=1e-6)
    noise = {n: torch.where(masks[n][:, None], v, torch.inf) for n, v in x.items()}
    told = model(noise, masks)
    assert torch.equal(told.states, grid.states)
    loss = model.loss(grid, y)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    batched = model(hidden, missing="batch")
    for k, name in enumerate(NAMES):
        assert batched.present[k].all() == masks[name].all() and batched.present[k].any() == masks[name].all()


def test_equal_states_give_equal_outputs_bitwise() -> None:
    """Else ties between samples, such as those without any modality, would break by rounding."""
    model, x, masks = multimodn().eval(), batch(37), some_missing(37)
    for mask in masks.values():
        mask[:20] = False
    grid = model(x, masks)
    for outputs in grid.outputs.values():
        assert (outputs[0] == outputs[0, 0]).all()
        assert (outputs[:, :20] == outputs[0, 0]).all()
        for k, mask in enumerate(masks.values(), 1):
            assert torch.equal(outputs[k][~mask], outputs[k - 1][~mask])
    trained = model.train()(x, masks)
    torch.testing.assert_close(trained.outputs["yes"], grid.outputs["yes"])


def test_the_batch_rule_skips_for_everybody() -> None:
    model, x = multimodn(), batch()
    x["b"][3, 1] = torch.nan
    sample, whole = model(x), model(x, missing="batch")
    assert sample.present[1].tolist() == [i != 3 for i in range(8)]
    assert not whole.present[1].any() and torch.equal(whole.states[2], whole.states[1])
    assert MultiModN(dict(model.encoders), dict(model.decoders), S, missing="batch")(x).present[1].sum() == 0


def test_rows_do_not_see_each_other() -> None:
    model, x, masks = multimodn().eval(), batch(), some_missing()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    whole = model(x, masks)
    turned = model({n: v[order] for n, v in x.items()}, {n: m[order] for n, m in masks.items()})
    torch.testing.assert_close(turned.states, whole.states[:, order], rtol=0, atol=1e-6)
    first = model({n: v[:3] for n, v in x.items()}, {n: m[:3] for n, m in masks.items()})
    torch.testing.assert_close(first.states, whole.states[:, :3], rtol=0, atol=1e-6)


def test_orders() -> None:
    model, x = multimodn(), batch()
    assert torch.equal(model(x, order=NAMES).states, model(x).states)
    back = model(x, order=["c", "a", "b"])
    e = model.encoders
    s = e["a"](e["c"](model.initial_state.expand(8, S), x["c"]), x["a"])
    torch.testing.assert_close(back.states[2], s)
    assert torch.equal(model(x, order=["c"]).states[1], back.states[1])
    each = torch.tensor([[2, 0, 1]] * 4 + [[0, 1, 2]] * 4)
    mixed = model(x, order=each)
    torch.testing.assert_close(mixed.states[:, :4], back.states[:, :4])
    torch.testing.assert_close(mixed.states[:, 4:], model(x).states[:, 4:])
    masks = some_missing()
    torch.testing.assert_close(
        model(x, masks, order=each).states[:, :4], model(x, masks, order=["c", "a", "b"]).states[:, :4]
    )


def test_commuting_encoders_end_in_the_same_state_in_any_order() -> None:
    class Adds(torch.nn.Module):
        state_size = S

        def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return state + x.sum(-1, keepdim=True)

    model, x, masks = MultiModN({n: Adds() for n in NAMES}, {"yes": ClassDecoder(S)}, S), batch(), some_missing()
    ends = [model(x, masks, order=order).states[-1] for order in itertools.permutations(NAMES)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])
    moved = model(x, masks).states[-1] - model.initial_state
    expected = sum(torch.where(masks[n], x[n].sum(-1), 0.0) for n in NAMES)
    torch.testing.assert_close(moved[:, 0], expected)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (["a", "z"], KeyError, "'z' is not one of a, b, c"),
        (["a", "a"], ValueError, "without repetition"),
        (torch.tensor([[0, 1, 1]] * 8), ValueError, "a permutation of 0..2"),
        (torch.tensor([[0, 1, 3]] * 8), ValueError, "a permutation of 0..2"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"\(8, 3\)"),
    ],
)
def test_orders_that_are_refused(order: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        multimodn()(batch(), order=order)


def test_adding_parts_leaves_what_was_there_bitwise() -> None:
    model, x = multimodn().eval(), batch()
    before = model(x)
    model.add_modality("d", MLPEncoder(4, S))
    model.add_task("late", ClassDecoder(S, 5))
    after = model(x | {"d": torch.randn(8, 4)})
    assert torch.equal(after.states[:4], before.states)
    for task in ("yes", "which"):
        torch.testing.assert_close(after.outputs[task][:4], before.outputs[task], rtol=0, atol=1e-6)
    assert after.outputs["late"].shape == (5, 8, 5) and model.modalities[-1] == "d"
    without = model(x)
    assert torch.equal(without.states[4], before.states[3])


def test_only_what_is_new_learns_when_the_rest_is_frozen() -> None:
    model, x, y = multimodn(), batch(), targets()
    model.requires_grad_(False)
    model.add_modality("d", MLPEncoder(4, S))
    old = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(model(x | {"d": torch.randn(8, 4)}), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, old[name]) != name.startswith("encoders.d"), name


@pytest.mark.parametrize("make", [multimodn, pfusion])
def test_input_of_other_kinds(make) -> None:
    model = make().eval()
    whole = {n: np.arange(8 * f).reshape(8, f) % 3 for n, f in FEATURES.items()}  # integers, as numpy arrays
    grid = model(whole)
    floats = model({n: torch.tensor(v, dtype=torch.float32) for n, v in whole.items()})
    assert torch.equal(grid.states, floats.states)
    double = make().double().eval()({n: torch.tensor(v) for n, v in whole.items()})
    torch.testing.assert_close(double.states.float(), grid.states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [multimodn, pfusion])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x | {"z": x["a"]}, KeyError, "'z' is not one of a, b, c"),
        (lambda x: x | {"b": x["b"][:3]}, ValueError, r"inputs.b.shape=\(3, 5\): must be \(8,\)"),
        (lambda x: {n: v[:0] for n, v in x.items()}, ValueError, "at least one sample"),
        (lambda x: x | {"b": x["b"][:, :2]}, ValueError, r"must be \(..., B, 5\)"),
        (lambda x: x | {"b": x["b"][:, 0]}, ValueError, "at least 2 dimensions"),
    ],
)
def test_inputs_that_are_refused(make, change, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()(change(batch()))


@pytest.mark.parametrize(
    ("mask", "message"), [(torch.ones(8), "masks.b=torch.float32"), (torch.ones(7, dtype=torch.bool), r"\(7,\)")]
)
def test_masks_that_are_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multimodn()(batch(), {"b": mask})
    with pytest.raises(KeyError, match="masks: 'z'"):
        multimodn()(batch(), {"z": mask})


def test_models_that_are_refused() -> None:
    decoder = {"yes": ClassDecoder(S)}
    with pytest.raises(ValueError, match=r"encoders.a.state_size=4: must be the model's state_size=6"):
        MultiModN({"a": MLPEncoder(3, 4)}, decoder, S)
    with pytest.raises(ValueError, match=r"decoders.yes.state_size=5"):
        MultiModN({}, {"yes": ClassDecoder(5)}, S)
    with pytest.raises(ValueError, match="state_size=0: must be >= 1"):
        MultiModN({}, decoder, 0)
    with pytest.raises(ValueError, match="decoders={}"):
        MultiModN({}, {}, S)
    with pytest.raises(ValueError, match="missing=never: must be one of sample, batch"):
        MultiModN({}, decoder, S, missing="never")
    with pytest.raises(ValueError, match="encoders=a: must be a new name"):
        multimodn().add_modality("a", MLPEncoder(3, S))
    with pytest.raises(ValueError, match="names? without dots"):
        multimodn().add_modality("a.b", MLPEncoder(3, S))
    with pytest.raises(ValueError, match="initial_state.shape"):
        MultiModN({}, decoder, S, initial_state=torch.zeros(3))


def test_a_given_initial_state_is_not_trained() -> None:
    model = MultiModN({"a": MLPEncoder(3, S)}, {"yes": ClassDecoder(S)}, S, initial_state=torch.arange(6.0))
    assert "initial_state" not in dict(model.named_parameters())
    assert torch.equal(model({"a": torch.randn(2, 3)}).states[0], torch.arange(6.0).expand(2, S))


def test_predict_reads_the_last_row_in_evaluation_mode() -> None:
    model, x, masks = multimodn(dropout=0.5).train(), batch(), some_missing()
    found = model.predict(x, masks)
    assert model.training
    grid = model.eval()(x, masks)
    assert torch.equal(found["yes"], model.probabilities(grid)["yes"][-1])
    assert found["which"].shape == (8, 3) and found["which"].sum(-1).allclose(torch.ones(8))


def test_every_kind_of_task_in_one_grid() -> None:
    model, x = every_task(), batch()
    grid = model(x)
    assert {t: o.shape for t, o in grid.outputs.items()} == {
        "which": (4, 8, 3), "labels": (4, 8, 2), "value": (4, 8, 1)
    }  # fmt: skip
    p = model.probabilities(grid)
    torch.testing.assert_close(p["labels"], grid.outputs["labels"].sigmoid())
    assert torch.equal(p["value"], grid.outputs["value"])


@pytest.mark.parametrize("make", [multimodn, pfusion])
@pytest.mark.parametrize("told", [True, False])
def test_the_whole_step_compiles_without_a_break(make, told: bool) -> None:
    model, x, y = make().eval(), batch(), targets()
    masks = some_missing() if told else None

    def step(inputs, given):
        grid = model(inputs, given)
        return model.loss(grid, y), grid.states

    loss, states = torch.compile(step, fullgraph=True, backend="eager")(x, masks)
    expected, plain = step(x, masks)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(states, plain)


def test_the_trained_initial_state_is_drawn_from_a_normal_distribution() -> None:
    torch.manual_seed(0)
    start = MultiModN({}, {"yes": ClassDecoder(4000)}, 4000).initial_state
    assert start.requires_grad and abs(start.mean().item()) < 0.08 and abs(start.std().item() - 1) < 0.06  # 5 sd


def test_a_given_initial_state_is_a_copy() -> None:
    start = torch.zeros(S)
    model = MultiModN({}, {"yes": ClassDecoder(S)}, S, initial_state=start)
    start += 1
    assert not model.initial_state.any()


@pytest.mark.parametrize("training", [True, False])
def test_predict_leaves_the_mode_even_after_an_error(training: bool) -> None:
    model = multimodn().train(training)
    assert not model.predict(batch())["yes"].requires_grad
    assert model.training == training
    with pytest.raises(ValueError, match="inputs.a.shape"):
        model.predict({"a": torch.randn(3)})
    assert model.training == training


def test_a_mask_that_is_none_is_trusted() -> None:
    model, x = multimodn(), batch()
    x["b"][3] = torch.nan
    grid = model(x, {"b": None})
    assert grid.present.all() and grid.states[2, 3].isnan().all()
    assert torch.equal(model(batch(), dict.fromkeys(NAMES), missing="batch").states, model(batch()).states)
    each = torch.tensor([[2, 0, 1]] * 4 + [[0, 1, 2]] * 4)
    assert torch.equal(model(batch(), dict.fromkeys(NAMES), order=each).states, model(batch(), order=each).states)


def test_steps_that_were_taken_in_an_order_of_each_sample() -> None:
    masks, each = some_missing(), torch.stack([torch.randperm(3) for _ in range(8)])
    grid = multimodn()(batch(), masks, order=each)
    for i in range(8):
        assert grid.present[:, i].tolist() == [masks[NAMES[k]][i].item() for k in each[i].tolist()]


def test_stacked_inputs_must_agree_in_models_and_samples() -> None:
    stacked, x = stack([multimodn(s) for s in range(2)]), batch(lead=(2,))
    with pytest.raises(ValueError, match=r"inputs.b.shape=\(2, 3, 5\): must be \(2, 8\) and features"):
        stacked(x | {"b": x["b"][:, :3]})
    with pytest.raises(ValueError, match=r"inputs.a.shape=\(8, 3\): must be of at least 3 dimensions"):
        stacked(batch())
