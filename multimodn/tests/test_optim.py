"""Adam over a stack is Adam of every model alone, also where a model skips an encoder."""

from __future__ import annotations

import copy

import pytest
import torch

from multimodn import ClassDecoder, GRUEncoder, MLPEncoder, MultiModN, stack, unstack
from multimodn.optim import StackedAdam
from multimodn.tests.networks import S, batch, multimodn, some_missing, targets

N = 3


def other(seed: int) -> MultiModN:
    torch.manual_seed(seed)
    return MultiModN({"a": GRUEncoder(1, S, 3), "b": MLPEncoder(5, S)}, {"yes": ClassDecoder(S)}, S)


@pytest.mark.parametrize("kind", ["tables", "sequences"])
def test_a_skipped_encoder_stays_where_it_is_and_the_others_step_as_alone(kind: str) -> None:
    models = [(multimodn if kind == "tables" else other)(s).double() for s in range(N)]
    stacked = stack(models)
    alone = [torch.optim.Adam(m.parameters(), 0.05) for m in models]
    joint = StackedAdam(stacked, 0.05)
    for step in range(12):
        x, y = batch(4, step, (N,)), targets(4, step, (N,))
        masks = some_missing(4, step, (N,))
        if kind == "sequences":
            x = {"a": x["a"].unsqueeze(-1), "b": x["b"]}
            y, masks = {"yes": y["yes"]}, {n: masks[n] for n in "ab"}
        masks["b"][:] = True
        joint.zero_grad()
        grid = stacked(x, masks, missing="batch")
        stacked.loss(grid, y).sum().backward()
        joint.skip(grid.present, stacked.modalities)
        joint.step()
        for i, (model, optimizer) in enumerate(zip(models, alone, strict=True)):
            before = [p.clone() for p in model.encoders["a"].parameters()]
            optimizer.zero_grad()
            own = {n: v[i] for n, v in x.items()}
            single = model(own, {n: m[i] for n, m in masks.items()}, missing="batch")
            model.loss(single, {t: v[i] for t, v in y.items()}).backward()
            optimizer.step()
            stayed = all(torch.equal(p, q) for p, q in zip(model.encoders["a"].parameters(), before, strict=True))
            assert stayed == (not masks["a"][i].all())
    for model, twin in zip(models, unstack(stacked), strict=True):
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-7, atol=1e-8, msg=name)


def test_its_state_can_be_stored() -> None:
    stacked = stack([multimodn(s) for s in range(N)])
    first = StackedAdam(stacked, 0.05)

    def step(optimizer: StackedAdam, seed: int) -> None:
        optimizer.zero_grad()
        grid = stacked(batch(4, seed, (N,)), some_missing(4, seed, (N,)), missing="batch")
        stacked.loss(grid, targets(4, seed, (N,))).sum().backward()
        optimizer.skip(grid.present, stacked.modalities)
        optimizer.step()

    step(first, 0)
    weights = {k: v.clone() for k, v in stacked.state_dict().items()}
    kept = copy.deepcopy(first.state_dict())
    second = StackedAdam(stacked, 0.05)
    second.load_state_dict(kept)
    step(second, 1)
    after = {k: v.clone() for k, v in stacked.state_dict().items()}
    stacked.load_state_dict(weights)
    step(first, 1)
    for k, v in stacked.state_dict().items():
        torch.testing.assert_close(v, after[k], rtol=0, atol=0, msg=k)
