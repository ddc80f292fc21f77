"""What all federations share: layout, gradients, momentum, replicas, checkpoints, and what they refuse."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clustered_pfl.attacks import Exchange
from clustered_pfl.baselines import IFCA, Ditto, Global, GroundTruth, HypCluster, KNNPer, Local
from clustered_pfl.clustering import FederatedClustering, MomentumClustering
from clustered_pfl.federation import Federation, Layout, Params, mean_by, module_loss, stack, take
from clustered_pfl.radius import Quantile

torch.set_num_threads(1)
F64 = torch.float64
N, K, D = 6, 2, 3
CLOSE = {"rtol": 1e-12, "atol": 1e-13}  # some thousands of float64 roundings of numbers of size 1


def linear(params: Params, batch: Any) -> Tensor:
    """Half the mean squared error of x w + b; w (2,), b a number."""
    x, y = batch
    return ((x @ params["w"] + params["b"] - y) ** 2).mean() / 2


def slope(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of `linear` at one flat model, by hand; parameters in the order b, w."""
    error = x @ flat[1:] + flat[0] - y
    return torch.cat([error.mean()[None], x.T @ error / len(x)])


def models(n: int = N, seed: int = 0) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {"b": torch.randn(n, generator=rng, dtype=F64), "w": torch.randn(n, 2, generator=rng, dtype=F64)}


def batch(step: int, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(n, 4, 2, generator=rng, dtype=F64), torch.randn(n, 4, generator=rng, dtype=F64)


def nearby(exchange: Exchange) -> Tensor:
    """Random messages close enough to the honest ones to be believed."""
    shape = (*exchange.honest.shape[:-2], exchange.count, exchange.honest.shape[-1])
    return exchange.honest[..., :1, :] + 0.1 * torch.randn(shape, generator=exchange.generator, dtype=F64)


BUILD: dict[str, tuple[int, Callable[..., Federation]]] = {
    "local": (N, Local),
    "global": (N, Global),
    "global attacked": (N, lambda *a, **k: Global(*a, n_byzantine=2, attack=nearby, **k)),
    "ground truth": (N, lambda *a, **k: GroundTruth(*a, clusters=[0, 1, 2, 0, 1, 2], **k)),
    "ifca": (K, IFCA),
    "ifca of models": (K, lambda *a, **k: IFCA(*a, variant="model", local_steps=2, **k)),
    "hypcluster": (K, lambda *a, **k: HypCluster(*a, local_steps=2, **k)),
    "ditto": (N, Ditto),
    "knn-per": (N, KNNPer),
    "fc": (N, lambda *a, **k: FederatedClustering(*a, radius=Quantile(0.4), rounds=3, **k)),
    "fc in groups, attacked": (
        N,
        lambda *a, **k: FederatedClustering(
            *a, radius=Quantile(0.6), rounds=3, groups=2, local_steps=2, n_byzantine=2, attack=nearby, **k
        ),
    ),
    "mc": (N, lambda *a, **k: MomentumClustering(*a, radius=Quantile(0.4), rounds=3, **k)),
    "mc of clusters, attacked": (
        N,
        lambda *a, **k: MomentumClustering(
            *a, radius=Quantile(0.4), rounds=3, clusters=2, n_byzantine=2, attack=nearby, **k
        ),
    ),
}
every = pytest.mark.parametrize("kind", BUILD)


def build(kind: str, seed: int = 0, **options: Any) -> Federation:
    count, cls = BUILD[kind]
    return cls(linear, models(count, seed), lr=0.1, seed=seed, **options)


def run(federation: Federation, steps: range, seed: int = 0) -> Federation:
    for t in steps:
        federation.step(batch(t, seed=seed))
    return federation


# -- parameters


@given(st.dictionaries(st.text("ab", min_size=1), st.lists(st.integers(1, 3), max_size=3), min_size=1), st.data())
def test_layout_flattens_and_back_whatever_the_shapes(shapes: dict[str, list[int]], data) -> None:
    layout = Layout({name: torch.Size(shape) for name, shape in shapes.items()})
    lead = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    params = {name: torch.randn((*lead, *shape)) for name, shape in reversed(list(shapes.items()))}
    flat = layout.flatten(params)
    assert flat.shape == (*lead, sum(math.prod(shape) for shape in shapes.values()))
    back = layout.unflatten(flat)
    assert list(back) == list(shapes)
    assert all(torch.equal(back[name], params[name]) for name in shapes)
    flat.zero_()
    assert not any(p.any() for p in back.values()) and all(p.any() for p in params.values())


def test_stack_puts_modules_side_by_side() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    params = stack([first, second])
    assert torch.equal(params["weight"][1], second.weight) and torch.equal(params["bias"][0], first.bias)
    copies = stack(first, 4)
    assert copies["weight"].shape == (4, 2, 3) and torch.equal(copies["weight"][3], first.weight)
    copies["weight"][0] += 1
    assert not torch.equal(copies["weight"][0], first.weight) and torch.equal(copies["weight"][3], first.weight)
    assert not copies["bias"].requires_grad and not params["bias"].requires_grad


def test_take_and_mean_by_are_plain_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    values, chosen = torch.randn(2, 5, 3, generator=rng, dtype=F64), torch.tensor([[0, 2, 2, 0, 2], [1, 1, 1, 1, 3]])
    found = take(values[:, :4], chosen)
    means, sums = mean_by(values, chosen, 4), mean_by(values, chosen, 4, "all")
    for r in range(2):
        for i in range(5):
            assert torch.equal(found[r, i], values[r, chosen[r, i]])
        for k in range(4):
            members = values[r, chosen[r] == k]
            expected = members.mean(0) if len(members) else torch.zeros(3, dtype=F64)
            torch.testing.assert_close(means[r, k], expected, **CLOSE)
            torch.testing.assert_close(sums[r, k], members.sum(0) / 5, **CLOSE)


def test_module_loss_is_the_criterion_of_the_modules_output() -> None:
    torch.manual_seed(0)
    module = nn.Bilinear(2, 3, 4)
    batch = torch.randn(5, 2), torch.randn(5, 3), torch.randint(4, (5,))
    loss = module_loss(module, nn.functional.cross_entropy)
    expected = nn.functional.cross_entropy(module(*batch[:2]), batch[2])
    assert torch.equal(loss(dict(module.named_parameters()), batch), expected)
    other = {name: 2 * p for name, p in module.named_parameters()}
    assert not torch.equal(loss(other, batch), expected)


@pytest.mark.parametrize(
    ("layer", "shared"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.InstanceNorm1d(4, track_running_stats=True), True),
        (nn.BatchNorm1d(4, track_running_stats=False), False),
        (nn.GroupNorm(2, 4), False),
    ],
)
def test_running_statistics_are_refused(layer: nn.Module, shared: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.Sequential(layer))
    if shared:
        with pytest.raises(ValueError, match=r"module=Sequential: has running statistics .* GroupNorm has none"):
            module_loss(module, nn.functional.cross_entropy)
    else:
        module_loss(module, nn.functional.cross_entropy)


# -- gradients


@pytest.mark.parametrize("criterion", [nn.functional.mse_loss, nn.functional.cross_entropy])
def test_gradients_and_losses_of_all_pairs_are_those_of_a_loop(criterion) -> None:
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double() for _ in range(2 * N)]
    flat = stack(modules)
    params = {name: p.view(2, N, *p.shape[1:]) for name, p in flat.items()}
    data = torch.randn(2, N, 5, 2, dtype=F64), torch.randn(2, N, 5, 4, dtype=F64).softmax(-1)
    federation = Local(module_loss(modules[0], criterion), params, lr=0.1, replicas=True)
    own = federation.gradients(federation.models, data)
    pairs, losses = federation._pairs(federation.models, data), federation.losses(data)
    assert losses.shape == (2, N, N) and pairs.shape == (2, N, N, own.shape[-1])
    for r in range(2):
        for i, module in enumerate(modules[r * N : (r + 1) * N]):
            for j in range(N):
                loss = criterion(module(data[0][r, j]), data[1][r, j])
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(module.parameters()))])
                torch.testing.assert_close(losses[r, i, j], loss.detach(), **CLOSE)
                torch.testing.assert_close(pairs[r, i, j], gradient, **CLOSE)
                if i == j:
                    torch.testing.assert_close(own[r, i], gradient, **CLOSE)


def test_autograd_agrees_with_the_gradient_by_hand() -> None:
    federation, (x, y) = build("local"), batch(0)
    found = federation.gradients(federation.models, (x[None], y[None]))[0]
    expected = torch.stack([slope(m, a, b) for m, a, b in zip(federation.models[0], x, y, strict=True)])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_dropout_differs_between_clients() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1)).double()
    loss = module_loss(module, nn.functional.mse_loss)
    data = torch.ones(4, 1, 50, dtype=F64), torch.ones(4, 1, 1, dtype=F64)
    for federation in (Local(loss, stack(module, 4), lr=0.1), FederatedClustering(loss, stack(module, 4), lr=0.1)):
        assert len(federation.losses(federation.lift(data)).unique()) == 16
        federation.step(data)
        assert len(federation.params["1.weight"].unique(dim=0)) == 4


# -- momentum


@pytest.mark.parametrize("style", ["heavy_ball", "ema"])
def test_momentum_starts_as_the_first_gradient_in_both_styles(style: str) -> None:
    federation = Local(linear, models(), lr=0.1, momentum=0.8, momentum_style=style)
    x, m = federation.models[0].clone(), None
    for t in range(5):
        federation.lr = lr = 0.1 / (1 + t)
        federation.step(batch(t))
        g = torch.stack([slope(row, a, b) for row, a, b in zip(x, *batch(t), strict=True)])
        m = g if m is None else 0.8 * m + (g if style == "heavy_ball" else 0.2 * g)
        x = x - lr * m
        torch.testing.assert_close(federation.models[0], x, **CLOSE)
    assert federation.steps == 5


def test_default_momentum_is_a_heavy_ball_of_nine_tenths() -> None:
    same = run(Local(linear, models(), lr=0.1, momentum=0.9, momentum_style="heavy_ball"), range(3))
    assert torch.equal(run(build("local"), range(3)).models, same.models)


# -- all classes


@every
def test_parameters_of_every_client_under_their_own_names(kind: str) -> None:
    federation = run(build(kind), range(2))
    assert {name: tuple(p.shape) for name, p in federation.params.items()} == {"b": (N,), "w": (N, 2)}
    flat = federation.client_models()[0]
    assert torch.equal(federation.params["b"], flat[:, 0]) and torch.equal(federation.params["w"], flat[:, 1:])


@every
def test_the_users_parameters_are_left_alone(kind: str) -> None:
    count, cls = BUILD[kind]
    params = models(count)
    run(cls(linear, params, lr=0.1), range(2))
    assert all(torch.equal(p, q) for p, q in zip(params.values(), models(count).values(), strict=True))


@every
def test_replicas_are_separate_runs(kind: str) -> None:
    count, cls = BUILD[kind]
    starts = [models(count, seed) for seed in range(3)]
    params = {name: torch.stack([p[name] for p in starts]) for name in starts[0]}
    whole = cls(linear, params, lr=0.1, replicas=True, seed=range(3))
    alone = [build(kind, seed) for seed in range(3)]
    for t in range(4):
        both = whole.step(tuple(torch.stack(x) for x in zip(*(batch(t, seed=s) for s in range(3)), strict=True)))
        single = [federation.step(batch(t, seed=s)) for s, federation in enumerate(alone)]
        for r, federation in enumerate(alone):
            for name, p in federation.params.items():
                torch.testing.assert_close(whole.params[name][r], p, **CLOSE)
            if isinstance(both, Tensor):  # the models chosen
                assert torch.equal(both[r], single[r])
            elif both is not None and both.members is not None:
                assert torch.equal(both.members[r], single[r].members)
                torch.testing.assert_close(both.radii[:, r], single[r].radii, **CLOSE)


def test_one_seed_serves_all_replicas() -> None:
    params = {name: p.expand(2, *p.shape) for name, p in models().items()}
    _, cls = BUILD["fc in groups, attacked"]
    federation = cls(linear, params, lr=0.1, replicas=True, seed=3)
    for t in range(2):
        federation.step(tuple(x.expand(2, *x.shape) for x in batch(t)))
    assert torch.equal(federation.models[0], federation.models[1])


@every
def test_a_checkpoint_resumes_bit_for_bit(kind: str) -> None:
    for before in (0, 1, 3):
        whole = run(build(kind), range(before))
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        run(whole, range(before, 6))
        file.seek(0)
        state = torch.load(file, weights_only=True)
        # into a fresh federation of another seed, and into one that has moved on
        for other in (build(kind, seed=1), whole):
            first = whole.client_models().clone()
            other.load_state_dict(state)
            assert other.steps == before
            run(other, range(before, 6))
            assert torch.equal(other.client_models(), first) and other.steps == 6


@pytest.mark.parametrize("kind", ["local", "ditto", "fc", "mc", "mc of clusters, attacked"])
def test_clients_with_the_same_data_and_start_stay_the_same(kind: str) -> None:
    count, cls = BUILD[kind]
    params = models(count)
    for p in params.values():
        p[4] = p[1]
    federation = cls(linear, params, lr=0.1)
    for t in range(6):
        data = batch(t)
        for x in data:
            x[4] = x[1]
        federation.step(data)
        own = federation.client_models()[0]
        torch.testing.assert_close(own[4], own[1], **CLOSE)
        assert not torch.allclose(own[4], own[0])


# -- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, r"lr=0\.0: must be > 0"),
        ({"lr": math.inf}, ValueError, "lr=inf: must be > 0"),
        ({"lr": math.nan}, ValueError, "lr=nan: must be > 0"),
        ({"momentum": 1.0}, ValueError, r"momentum=1\.0: must be in \[0, 1\)"),
        ({"momentum": -0.1}, ValueError, r"momentum=-0\.1: must be in \[0, 1\)"),
        ({"momentum_style": "nesterov"}, ValueError, "momentum_style='nesterov': must be 'heavy_ball' or 'ema'"),
        ({"seed": [1, 2]}, ValueError, r"seed=\[1, 2\]: must be one number, or one a replica \(1\)"),
        ({"params": {}}, ValueError, "params={}: must hold at least one parameter"),
        ({"params": {"w": torch.zeros(3, dtype=torch.long)}}, TypeError, r"params\['w'\]: must be a floating-point"),
        ({"params": {"w": [1.0]}}, TypeError, r"params\['w'\]: must be a floating-point tensor"),
        (
            {"params": {"w": torch.zeros(())}},
            ValueError,
            r"params: leading axes \[\(\)\], must be the same \(N, \.\.\.\)",
        ),
        ({"params": {"w": torch.zeros(0, 2)}}, ValueError, r"params: leading axes \[\(0,\)\], .* none empty"),
        ({"params": {"w": torch.zeros(3), "b": torch.zeros(2)}}, ValueError, r"leading axes \[\(2,\), \(3,\)\]"),
        ({"replicas": True, "params": {"w": torch.zeros(3)}}, ValueError, r"must be the same \(R, N, \.\.\.\) in all"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"params": models(), "lr": 0.1} | change
    with pytest.raises(error, match=message):
        Local(linear, **arguments)


def test_stack_refuses_nothing_to_stack() -> None:
    with pytest.raises(ValueError, match=r"modules=\[\]: must hold at least one module"):
        stack([])
    for n in (None, 0):
        with pytest.raises(ValueError, match=f"n={n}: must be >= 1"):
            stack(nn.Linear(1, 1), n)
