"""Federated-Clustering against the official code's loop, its limits, and every way a step can be run."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clustered_pfl.baselines import Global, GroundTruth, Local
from clustered_pfl.clustering import FederatedClustering
from clustered_pfl.federation import Params, module_loss, stack
from clustered_pfl.radius import Fixed, Quantile, TwoMeans
from clustered_pfl.tests.plain import batch, federated_clustering, network, networks

torch.set_num_threads(1)
F64 = torch.float64
LOSS = module_loss(network(), nn.functional.cross_entropy)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # some steps of some thousands of float64 roundings
CONVENTIONS = [Quantile(0.4), Quantile(0.5, factor=0.99), Quantile(0.5, strict=True), Fixed(0.6), TwoMeans()]


def fc(same: bool = False, **options: Any) -> FederatedClustering:
    return FederatedClustering(LOSS, stack(networks(same=same)), **{"lr": 0.5, "rounds": 4} | options)


def run(federation: Any, steps: int = 5, n: int = 8) -> Tensor:
    """The clients' models (N, D) after some steps."""
    for t in range(steps):
        federation.step(batch(t, n))
    return federation.client_models()[0].clone()


def dealt(seed: int, steps: int, n: int, groups: int, hostile: int = 0) -> list[list[list[int]]]:
    """Groups of each step from the generator that the federation uses: honest clients, then hostile ones."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        honest = torch.randperm(n, generator=rng).view(groups, -1)
        rest = torch.randperm(hostile, generator=rng).view(groups, -1) + n
        found.append(torch.cat([honest, rest], 1).tolist())
    return found


# -- the official loop


@pytest.mark.parametrize("style", ["heavy_ball", "ema"])
@pytest.mark.parametrize("rule", CONVENTIONS, ids=str)
def test_iterates_are_those_of_the_official_loop(rule, style: str) -> None:
    expected = federated_clustering(networks(), [batch(t) for t in range(5)], rule, 4, style=style)
    torch.testing.assert_close(run(fc(radius=rule, momentum_style=style)), expected, **CLOSE)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_cluster_among_themselves(groups: int) -> None:
    rule = Quantile(0.5)
    loops = dealt(7, 5, 8, groups)
    expected = federated_clustering(networks(), [batch(t) for t in range(5)], rule, 4, dealt=loops)
    federation = fc(radius=rule, groups=groups, seed=7)
    torch.testing.assert_close(run(federation), expected, **CLOSE)
    round = federation.step(batch(5))
    group = torch.zeros(8, dtype=torch.long)
    for g, clients in enumerate(dealt(7, 6, 8, groups)[-1]):
        group[clients] = g
    assert not round.members[group[:, None] != group].any()
    size = 8 // groups
    assert (round.members.sum(1) == size // 2 + 1).all()  # the rank of the quantile, and those before it


def test_attackers_who_poison_their_data_are_dealt_to_the_groups_too() -> None:
    rule, loops = Quantile(0.5), dealt(7, 5, 8, 2, hostile=4)
    expected = federated_clustering(networks(), [batch(t, 12) for t in range(5)], rule, 4, dealt=loops)
    found = run(fc(radius=rule, groups=2, seed=7, n_byzantine=4), n=12)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_one_group_is_no_groups() -> None:
    assert torch.equal(run(fc(groups=1, seed=1)), run(fc()))


@pytest.mark.parametrize("local_steps", [2, 3])
def test_every_so_many_steps_cluster_and_the_others_are_local(local_steps: int) -> None:
    rule = Quantile(0.4)
    expected = federated_clustering(networks(), [batch(t) for t in range(7)], rule, 4, local_steps=local_steps)
    federation = fc(radius=rule, local_steps=local_steps)
    clustered = []
    for t in range(7):
        found = federation.step(batch(t))
        clustered.append(found.members is not None)
        assert (found.radii is None) == (found.members is None)
    assert clustered == [(t + 1) % local_steps == 0 for t in range(7)]
    torch.testing.assert_close(federation.models[0], expected, **CLOSE)


def test_a_round_reports_who_was_inside_and_how_far_that_was() -> None:
    federation = fc(radius=Quantile(0.4), rounds=3)
    models = federation.models.clone()
    found = federation.step(batch(0))
    answers = federation._pairs(models, federation.lift(batch(0)))[0]  # (N, N, D)
    for i in range(8):
        v = answers[i, i]
        for round in range(3):
            d = (answers[i] - v).norm(dim=1)
            tau = d.sort().values[3]  # floor(0.4 * 8)
            inside = d <= tau * (1 + 1e-14)
            torch.testing.assert_close(found.radii[round, i], tau, **CLOSE)
            v = (answers[i][inside].sum(0) + (8 - inside.sum()) * v) / 8
        assert found.members[i].tolist() == inside.tolist()


# -- limits


@pytest.mark.parametrize(
    "options",
    [{"radius": Quantile(0.0)}, {"radius": Quantile(0.0, strict=True)}, {"radius": Fixed(0.0)}, {"rounds": 0}],
    ids=str,
)
def test_nobody_inside_but_oneself_is_local_training(options: dict) -> None:
    local = Local(LOSS, stack(networks()), lr=0.5)
    torch.testing.assert_close(run(fc(**options), 20), run(local, 20), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"radius": Quantile(7 / 8)}, {"radius": Fixed(math.inf), "rounds": 1}], ids=str)
def test_everybody_inside_and_equal_starts_is_one_global_model(options: dict) -> None:
    shared = Global(LOSS, stack(networks(same=True)), lr=0.5)
    torch.testing.assert_close(run(fc(same=True, **options), 20), run(shared, 20), rtol=0, atol=1e-12)


def test_separated_clusters_with_the_strict_quantile_approach_the_true_clusters() -> None:
    clusters = torch.arange(12) % 3
    rng = torch.Generator().manual_seed(0)
    target = 100 * torch.eye(3, 4, dtype=F64)[clusters] + torch.randn(12, 4, generator=rng, dtype=F64)
    starts = {"x": torch.randn(3, 4, generator=rng, dtype=F64)[clusters]}

    def bowl(params: Params, data: Tensor) -> Tensor:
        return (params["x"] - data).square().sum() / 2

    truth = GroundTruth(bowl, starts, lr=0.2, clusters=clusters)
    for _ in range(10):
        truth.step(target)
    gaps = []
    for rounds in (1, 5, 20, 150):
        federation = FederatedClustering(bowl, starts, lr=0.2, radius=Quantile(1 / 3, strict=True), rounds=rounds)
        for _ in range(10):
            found = federation.step(target)
        gaps.append((federation.params["x"] - truth.params["x"]).norm().item())
        assert torch.equal(found.members, clusters[:, None] == clusters)
    # (1 - 1/3)^rounds of the way is left: 0.67, 0.13, 3e-4, 4e-27
    assert gaps == sorted(gaps, reverse=True)
    for gap, rounds in zip(gaps[1:3], (5, 20), strict=True):
        assert gap == pytest.approx(gaps[0] * (2 / 3) ** (rounds - 1), rel=1e-6)
    assert gaps[3] < 1e-11  # 100 * some hundred roundings


# -- streaming and replicas


@pytest.mark.parametrize("memory_mb", [1e-6, 21 * 8 * 10 * 3.5e-6], ids=["one model at a time", "three at a time"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("poisoned", [0, 2])
def test_streaming_models_changes_nothing(poisoned: int, groups: int, memory_mb: float) -> None:
    options = {"radius": Quantile(0.5), "groups": groups, "n_byzantine": poisoned}
    whole, streamed = fc(**options), fc(**options, memory_mb=memory_mb)
    for t in range(4):
        a, b = whole.step(batch(t, 8 + poisoned)), streamed.step(batch(t, 8 + poisoned))
        torch.testing.assert_close(streamed.models, whole.models, **CLOSE)
        torch.testing.assert_close(b.radii, a.radii, **CLOSE)
        assert torch.equal(a.members, b.members)


@pytest.mark.parametrize("memory_mb", [1e-6, 16.0])
def test_replicas_in_groups_are_separate_runs(memory_mb: float) -> None:
    options = {"radius": Quantile(0.5), "rounds": 4, "groups": 2, "n_byzantine": 2, "lr": 0.5, "memory_mb": memory_mb}
    params = {name: torch.stack([p, p.flip(0)]) for name, p in stack(networks()).items()}
    whole = FederatedClustering(LOSS, params, replicas=True, seed=[3, 4], **options)
    alone = [
        FederatedClustering(LOSS, {name: p[r] for name, p in params.items()}, seed=3 + r, **options) for r in range(2)
    ]
    for t in range(4):
        both = [batch(10 * t + r, 10) for r in range(2)]
        found = whole.step(tuple(torch.stack(x) for x in zip(*both, strict=True)))
        for r in range(2):
            single = alone[r].step(both[r])
            torch.testing.assert_close(whole.models[r], alone[r].models[0], **CLOSE)
            torch.testing.assert_close(found.radii[:, r], single.radii, **CLOSE)
            assert torch.equal(found.members[r], single.members)
    assert not torch.allclose(whole.models[0], whole.models[1])


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds=-1: must be an integer >= 0"),
        ({"rounds": 2.5}, r"rounds=2\.5: must be an integer >= 0"),
        ({"local_steps": 0}, "local_steps=0: must be an integer >= 1"),
        ({"n_byzantine": -1}, "n_byzantine=-1: must be an integer >= 0"),
        ({"groups": 0}, "groups=0: must be >= 1, a divisor of 8 clients and of n_byzantine=0"),
        ({"groups": 3}, "groups=3: must be >= 1, a divisor of 8 clients"),
        ({"groups": 2, "n_byzantine": 3}, "groups=2: must be .* of n_byzantine=3"),
        ({"memory_mb": 0}, "memory_mb=0: must be > 0"),
        ({"momentum": 1.0}, r"momentum=1\.0: must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fc(**options)


@pytest.mark.parametrize(("rows", "poisoned"), [(7, 0), (9, 0), (8, 2), (12, 2)])
@pytest.mark.parametrize("local_steps", [1, 2])
def test_a_batch_has_one_row_a_client(local_steps: int, rows: int, poisoned: int) -> None:
    federation = fc(n_byzantine=poisoned, local_steps=local_steps)
    with pytest.raises(
        ValueError, match=rf"batches=\[{rows}, 5, 2\]: must be \({8 + poisoned}, \.\.\.\), one row a client"
    ):
        federation.step(batch(0, rows))
    assert federation.steps == 0
