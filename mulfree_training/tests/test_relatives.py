"""Baselines: powers of two, AdderNet's layers and a change of one rounding unit do what their papers and names say."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mulfree_training.networks.convolutional import PlainConvNet
from mulfree_training.networks.gpt import GPT
from mulfree_training.networks.vit import ViT
from mulfree_training.relatives import BLOCK, AdderLinear, PowerOfTwo, perturb, use_adders, use_powers_of_two


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def powers(x: torch.Tensor) -> bool:
    """All numbers are signed powers of two."""
    return bool((x.abs().frexp().mantissa == 0.5).all())


@pytest.mark.parametrize(
    ("weight", "rounded"),
    [(1.0, 1.0), (1.41, 1.0), (1.42, 2.0), (-3.0, -4.0), (-2.8, -2.0), (0.7, 0.5), (0.71, 1.0), (0.0, 0.0)],
)
def test_weights_go_to_the_nearest_power_of_two_by_logarithm(weight: float, rounded: float) -> None:
    assert PowerOfTwo()(torch.tensor([weight])).tolist() == [rounded]


def test_gradients_of_rounded_weights_go_straight_through() -> None:
    weight = draw(64, 32).requires_grad_()
    rounded = PowerOfTwo()(weight)
    assert powers(rounded) and not powers(weight)
    assert ((rounded / weight).abs().log2().abs() <= 0.5 + 1e-6).all() and (rounded.sign() == weight.sign()).all()
    grad = draw(64, 32, seed=1)
    rounded.backward(grad)
    assert torch.equal(weight.grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [ViT, lambda: GPT(vocab=20, context=8), lambda: PlainConvNet(layout=[8, 0, 8])])
def test_all_products_of_a_network_see_rounded_weights(make: object) -> None:
    model = make()  # type: ignore[operator]
    stored = sum(p.numel() for p in model.parameters())
    use_powers_of_two(model)
    assert sum(p.numel() for p in model.parameters()) == stored
    found = [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.MultiheadAttention)]
    weights = [p.in_proj_weight if isinstance(p, nn.MultiheadAttention) else p.weight for p in found]
    assert len(weights) >= 3 and all(powers(weight) for weight in weights)
    first = weights[0].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.arange(16).view(2, 8) if isinstance(model, GPT) else draw(2, 1, 8, 8)
    model(x).square().sum().backward()
    optimizer.step()
    again = found[0].in_proj_weight if isinstance(found[0], nn.MultiheadAttention) else found[0].weight
    assert powers(again) and not torch.equal(again, first)  # the stored weights move, what is seen stays rounded


def distances(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """-sum |x - w|, one output at a time."""
    return torch.stack([-(x - row).abs().sum(-1) for row in weight], -1)


def test_adders_are_batch_normed_distances() -> None:
    layer = nn.Linear(5, 7)
    given = layer.weight.detach().clone()
    adder = AdderLinear(layer)
    assert adder.weight.std().item() == pytest.approx(1) and torch.allclose(adder.weight, given / given.std())
    x = draw(3, 4, 5)
    y = distances(x, adder.weight).flatten(0, 1)
    expected = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
    found = adder(x)
    assert found.shape == (3, 4, 7) and torch.allclose(found.flatten(0, 1), expected, atol=1e-5)
    assert [name for name, _ in adder.named_parameters()] == ["weight", "norm.weight", "norm.bias"]
    adder.eval()
    alone = adder(x[:1, :1])  # one row, with the running statistics
    assert torch.equal(alone, adder(x)[:1, :1])


@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_gradients_of_adders_are_addernets(rows: int) -> None:
    """Full-precision difference for the weight, clipped difference for the input (Chen et al. 2020, equations 5 and
    6), a loop over all triples."""
    adder = AdderLinear(nn.Linear(3, 4))
    adder.norm = nn.Identity()  # type: ignore[assignment]
    x, grad = (2 * draw(rows, 3)).requires_grad_(), draw(rows, 4, seed=1)
    adder(x).backward(grad)
    w = adder.weight.detach()
    own, theirs = torch.zeros(rows, 3), torch.zeros(4, 3)
    for r in range(rows):
        for p in range(4):
            gap = x[r].detach() - w[p]
            theirs[p] += grad[r, p] * gap
            own[r] += grad[r, p] * (-gap).clamp(-1, 1)
    assert torch.allclose(x.grad, own, atol=1e-5) and torch.allclose(w_grad(adder), theirs, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    assert (x.detach() - w[:1]).abs().max() > 1  # something was clipped


def w_grad(adder: AdderLinear) -> torch.Tensor:
    assert adder.weight.grad is not None
    return adder.weight.grad


def test_hidden_layers_and_only_they_become_adders() -> None:
    model = ViT(n_layer=3)
    before = copy.deepcopy(model)
    use_adders(model)
    adders = {name for name, part in model.named_modules() if isinstance(part, AdderLinear)}
    assert adders == {f"blocks.{i}.{layer}" for i in range(3) for layer in ("hidden", "out")}
    kept = {n: p for n, p in before.named_parameters() if not n.rpartition(".")[0].endswith((".hidden", ".out"))}
    assert kept and all(torch.equal(dict(model.named_parameters())[name], p) for name, p in kept.items())
    state = torch.get_rng_state()
    use_adders(copy.deepcopy(before))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    with pytest.raises(ValueError, match="arithmetic.kind=adder: must have a network with hidden layers"):
        use_adders(PlainConvNet(layout=[8, 0, 8]))


def test_networks_of_adders_learn() -> None:
    torch.manual_seed(0)
    model = ViT(d_model=16, n_layer=1, n_head=2, d_hidden=32, std=0.1)
    use_adders(model)
    x, y = draw(64, 1, 8, 8), torch.arange(64) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 2 < losses[0]


def test_perturbed_weights_are_one_unit_larger_and_nothing_else_changes() -> None:
    model = ViT(n_layer=1)
    before = copy.deepcopy(model.state_dict())
    perturb(model)
    zeros = 0
    for name, after in model.state_dict().items():
        gap = after.view(torch.int32) - before[name].view(torch.int32)
        zeros += int((before[name] == 0).sum())
        assert (gap == torch.where(before[name] < 0, -1, 1)).all(), name  # patterns of negative floats run backwards
        assert (after > before[name]).all()
    assert zeros > 0  # biases too
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
