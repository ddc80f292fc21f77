"""`torch.compile(fullgraph=True)` of a whole step: one graph, the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from multimodn import stack
from multimodn.tests.networks import batch, every_task, multimodn, pfusion, some_missing, targets


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("make", [multimodn, pfusion])
@pytest.mark.parametrize("rule", ["sample", "batch"])
@pytest.mark.parametrize("n", [None, 2])
def test_a_training_step(make, rule: str, n: int | None) -> None:
    lead = () if n is None else (n,)
    model = make() if n is None else stack([make(s) for s in range(n)])
    x, y, masks = batch(lead=lead), targets(lead=lead), some_missing(lead=lead)
    masks["a"][:] = True

    def step(inputs: dict, given: dict) -> Tensor:
        grid = model(inputs, given, missing=rule)
        return model.loss(grid, y, state_change_weight=20.0, normalise="present", validate=False).sum()

    plain = step(x, masks)
    plain.backward()
    expected = gradients(model)
    fast = torch.compile(step, fullgraph=True, backend="eager")(x, masks)
    fast.backward()
    torch.testing.assert_close(fast, plain)
    found = gradients(model)
    assert found.keys() >= expected.keys()
    for name, grad in found.items():
        if name in expected:
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        else:  # of an encoder that nobody used: not called outside of a graph, without effect inside
            assert name.startswith("encoders.") and not grad.any(), name


@pytest.mark.parametrize("make", [multimodn, pfusion])
def test_other_masks_need_no_other_graph(make) -> None:
    model, x, y, counter = make().train(), batch(), targets(), CompileCounter()

    def step(inputs: dict, given: dict) -> Tensor:
        return model.loss(model(inputs, given), y, validate=False)

    fast = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(4):
        masks = some_missing(seed=seed)
        torch.testing.assert_close(fast(x, masks), step(x, masks))
    assert counter.frame_count == 1


def test_every_kind_of_task_and_masks_from_nan() -> None:
    model, x = every_task().eval(), batch()
    x["b"][2] = torch.nan
    y = {
        "which": torch.tensor([0, 1, 2, -100, 0, 1, 2, 0]),
        "labels": torch.tensor([[0.0, torch.nan]] * 8),
        "value": torch.tensor([0.5, torch.nan, *[1.0] * 6]),
    }

    def step(inputs: dict) -> Tensor:
        return model.loss(model(inputs), y)  # validation looks at values, and steps aside while compiling

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x), step(x))
