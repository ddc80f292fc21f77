"""Stacked models compute and learn what each of them does alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from multimodn import ClassDecoder, ConvEncoder, GRUEncoder, MLPEncoder, MultiModN, PFusion, stack, unstack
from multimodn.stacking import OneByOne, StackedDropout
from multimodn.tests.networks import FEATURES, S, batch, every_task, multimodn, pfusion, some_missing, targets

N = 3


def cut(parts: dict, i: int) -> dict:
    return {name: value[i] for name, value in parts.items()}


@pytest.mark.parametrize("make", [multimodn, pfusion, every_task, lambda s: multimodn(s, joins="output")])
@pytest.mark.parametrize("rule", ["sample", "batch"])
def test_a_stack_computes_what_each_model_does(make, rule: str) -> None:
    models = [make(seed) for seed in range(N)]
    stacked, x, masks = stack(models), batch(lead=(N,)), some_missing(lead=(N,))
    masks["c"][:] = True
    whole = stacked(x, masks, missing=rule)
    assert whole.states.shape[0] == N
    for i, model in enumerate(models):
        one = model(cut(x, i), cut(masks, i), missing=rule)
        torch.testing.assert_close(whole.states[i], one.states, rtol=1e-5, atol=1e-6)
        assert torch.equal(whole.present[i], one.present)
        for task in model.tasks:
            torch.testing.assert_close(whole.outputs[task][i], one.outputs[task], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [multimodn, pfusion])
@pytest.mark.parametrize("normalise", ["constant", "present"])
def test_losses_and_gradients_stay_apart(make, normalise: str) -> None:
    models = [make(seed).double() for seed in range(N)]
    stacked, x, y, masks = stack(models), batch(lead=(N,)), targets(lead=(N,)), some_missing(lead=(N,))
    losses = stacked.loss(stacked(x, masks), y, normalise=normalise)
    losses.sum().backward()
    for i, model in enumerate(models):
        loss = model.loss(model(cut(x, i), cut(masks, i)), cut(y, i), normalise=normalise)
        torch.testing.assert_close(losses[i], loss)
        loss.backward()
        rows = model.encoders["a"].last.weight.grad
        own = stacked.encoders["a"].last.weight.grad.view(N, *rows.shape)[i]
        torch.testing.assert_close(own, rows)


def test_a_stack_of_one_and_orders() -> None:
    model, x = multimodn(), batch(lead=(1,))
    torch.testing.assert_close(stack([model])(x).states[0], model(cut(x, 0)).states)
    stacked, x = stack([multimodn(s) for s in range(N)]), batch(lead=(N,))
    order = torch.stack([torch.randperm(3) for _ in range(N * 8)]).view(N, 8, 3)
    whole = stacked(x, order=order)
    for i, model in enumerate(unstack(stacked)):
        torch.testing.assert_close(whole.states[i], model(cut(x, i), order=order[i]).states)


def test_unstacked_models_are_the_first_ones_bitwise() -> None:
    models = [multimodn(seed, dropout=0.3) for seed in range(N)]
    for before, after in zip(models, unstack(stack(models)), strict=True):
        assert after.n_models is None and isinstance(after.encoders["a"].dropout, nn.Dropout)
        assert after.encoders["a"].dropout.p == 0.3
        first, second = before.state_dict(), after.state_dict()
        assert list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
    stacked = stack(models)
    with torch.no_grad():
        models[0].initial_state += 1  # copies: the stack does not follow
    assert not torch.equal(stacked.initial_state[0], models[0].initial_state)


def test_dropout_draws_do_not_depend_on_neighbours() -> None:
    x = torch.ones(3, 50, 4)
    layer = StackedDropout(0.25)
    layer.generators = [torch.Generator().manual_seed(s) for s in (7, 8, 9)]
    whole = layer(x)
    alone = StackedDropout(0.25)
    alone.generators = [torch.Generator().manual_seed(8)]
    assert torch.equal(alone(x[1:2])[0], whole[1])
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert 0.6 < (whole > 0).float().mean() < 0.9
    assert torch.equal(layer.eval()(x), x)


def test_encoders_of_other_kinds_run_one_after_the_other() -> None:
    def make(seed: int) -> MultiModN:
        torch.manual_seed(seed)
        encoders = {"t": GRUEncoder(2, S, 4), "i": ConvEncoder(1, S, (4,)), "a": MLPEncoder(3, S)}
        return MultiModN(encoders, {"yes": ClassDecoder(S)}, S)

    models = [make(s) for s in range(N)]
    stacked = stack(models)
    assert isinstance(stacked.encoders["t"], OneByOne) and isinstance(stacked.encoders["a"], MLPEncoder)
    x = {"t": torch.randn(N, 5, 6, 2), "i": torch.randn(N, 5, 1, 4, 4), "a": torch.randn(N, 5, 3)}
    whole = stacked(x)
    for i, model in enumerate(unstack(stacked)):
        torch.testing.assert_close(whole.states[i], models[i](cut(x, i)).states)
        assert torch.equal(model(cut(x, i)).states, models[i](cut(x, i)).states)


def test_p_fusion_of_other_encoders_can_be_stacked() -> None:
    def make(seed: int) -> PFusion:
        torch.manual_seed(seed)
        return PFusion({"t": GRUEncoder(2, S, 4), "a": MLPEncoder(3, S)}, {"yes": ClassDecoder(2 * S)})

    models, x = [make(s) for s in range(N)], {"t": torch.randn(N, 5, 6, 2), "a": torch.randn(N, 5, 3)}
    whole = stack(models)(x)
    for i, model in enumerate(models):
        torch.testing.assert_close(whole.outputs["yes"][i], model(cut(x, i)).outputs["yes"])


def test_a_stack_can_be_copied() -> None:
    stacked, x = stack([multimodn(s) for s in range(N)]), batch(lead=(N,))
    for twin in (copy.deepcopy(stacked), pickle.loads(pickle.dumps(stacked))):
        assert torch.equal(twin(x).states, stacked(x).states)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        stack([])
    small = MultiModN({n: MLPEncoder(f, 4) for n, f in FEATURES.items()}, {"yes": ClassDecoder(4)}, 4)
    with pytest.raises(ValueError, match="must be of one architecture"):
        stack([multimodn(), small])
    with pytest.raises(ValueError, match=r"MultiModN.encoders.a"):
        stack([multimodn(), multimodn(joins="output")])
    with pytest.raises(ValueError, match="is not a stack"):
        unstack(multimodn())
    with pytest.raises(ValueError, match="models=2: must be 3 models"):
        stack([multimodn(s) for s in range(N)])(batch(lead=(2,)))


def test_the_mode_is_that_of_the_models() -> None:
    models, x = [multimodn(s, dropout=0.5).eval() for s in range(N)], batch(lead=(N,))
    stacked = stack(models)
    assert not any(module.training for module in stacked.modules())
    torch.testing.assert_close(stacked(x).states[1], models[1](cut(x, 1)).states)
    assert not any(module.training for one in unstack(stacked) for module in one.modules())
    assert all(module.training for module in unstack(stacked.train())[0].modules())


def test_a_model_draws_its_dropout_from_its_seed_alone() -> None:
    models, x = [multimodn(s, dropout=0.5) for s in range(N)], batch(lead=(N,))
    whole = stack(models, seeds=[7, 8, 9])(x).states
    torch.testing.assert_close(stack(models[1:2], seeds=[8])({n: v[1:2] for n, v in x.items()}).states[0], whole[1])
    assert not torch.allclose(stack(models[1:2], seeds=[9])({n: v[1:2] for n, v in x.items()}).states[0], whole[1])
    with pytest.raises(ValueError, match="zip"):
        stack(models, seeds=[7, 8])


def test_given_initial_states_and_dtypes_are_kept() -> None:
    starts = [torch.randn(S, dtype=torch.float64) for _ in range(N)]
    models = [
        MultiModN({"a": MLPEncoder(3, S)}, {"yes": ClassDecoder(S)}, S, initial_state=start).double()
        for start in starts
    ]
    stacked = stack(models)
    assert "initial_state" not in dict(stacked.named_parameters())
    assert torch.equal(stacked({"a": torch.randn(N, 4, 3)}).states[:, 0, 0], torch.stack(starts))
    for one, start in zip(unstack(stacked), starts, strict=True):
        assert torch.equal(one.initial_state, start) and "initial_state" not in dict(one.named_parameters())
        assert {p.dtype for p in one.parameters()} == {torch.float64}


def test_models_stacks_and_what_is_unstacked_share_no_memory() -> None:
    def make(seed: int) -> MultiModN:
        torch.manual_seed(seed)
        return MultiModN({"t": GRUEncoder(2, S, 4), "a": MLPEncoder(3, S)}, {"yes": ClassDecoder(S)}, S)

    models = [make(s) for s in range(2)]
    stacked = stack(models)
    parts = [*models, stacked, *unstack(stacked)]
    storages = [{p.untyped_storage().data_ptr() for p in part.parameters()} for part in parts]
    assert sum(len(own) for own in storages) == len(set().union(*storages))


def test_parameters_of_a_part_that_nobody_stacks_are_refused() -> None:
    class Scaled(ClassDecoder):
        def __init__(self) -> None:
            super().__init__(S)
            self.gain = nn.Parameter(torch.randn(()))

    models = [MultiModN({"a": MLPEncoder(3, S)}, {"yes": Scaled()}, S) for _ in range(2)]
    with pytest.raises(ValueError, match=r"MultiModN.decoders.yes: Scaled.stackable_parameters must name gain"):
        stack(models)
