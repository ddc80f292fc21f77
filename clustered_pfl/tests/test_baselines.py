"""Every baseline against a plain loop in float64, and what happens to empty clusters and losses that are not finite."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clustered_pfl.attacks import bit_flip, large_gradient
from clustered_pfl.baselines import IFCA, Ditto, Global, GroundTruth, HypCluster, KNNPer, Local
from clustered_pfl.federation import Params

torch.set_num_threads(1)
F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # some hundreds of float64 roundings of numbers of size 10
N, CLUSTERS = 6, [0, 1, 0, 2, 1, 0]


def bowl(params: Params, data: Tensor) -> Tensor:
    """Half a squared distance with unequal axes, and ripples, so that the mean gradient is not that of the mean."""
    gap = params["x"] - data
    return (SCALE * gap.square() / 2 + gap.cos()).sum()


SCALE = torch.tensor([1.0, 0.5, 2.0], dtype=F64)


def slope(x: Tensor, data: Tensor) -> Tensor:
    return SCALE * (x - data) - (x - data).sin()


def targets(step: int, n: int = N) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(step), dtype=F64)


def starts(n: int = N, seed: int = 50) -> Params:
    return {"x": torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)}


class HeavyBall:
    """m <- 0.9 m + g, the first m = g."""

    def __init__(self) -> None:
        self.m: Tensor | None = None

    def __call__(self, g: Tensor) -> Tensor:
        self.m = g.clone() if self.m is None else 0.9 * self.m + g
        return self.m


def losses(models: Tensor, data: Tensor) -> Tensor:
    """(K, N)."""
    return torch.stack([torch.stack([bowl({"x": m}, d) for d in data]) for m in models])


# -- local, global, ground truth


def test_local_trains_every_client_alone() -> None:
    federation, x = Local(bowl, starts(), lr=0.1), starts()["x"]
    momenta = [HeavyBall() for _ in range(N)]
    for t in range(5):
        federation.step(targets(t))
        x = torch.stack([x[i] - 0.1 * momenta[i](slope(x[i], targets(t)[i])) for i in range(N)])
    torch.testing.assert_close(federation.params["x"], x, **CLOSE)


def test_ground_truth_trains_one_model_a_cluster_from_its_clients_mean() -> None:
    federation, clusters = GroundTruth(bowl, starts(), lr=0.1, clusters=CLUSTERS), torch.tensor(CLUSTERS)
    models, momenta = [starts()["x"][clusters == k].mean(0) for k in range(3)], [HeavyBall() for _ in range(3)]
    torch.testing.assert_close(federation.params["x"], torch.stack([models[k] for k in CLUSTERS]), **CLOSE)
    for t in range(5):
        federation.step(targets(t))
        for k in range(3):
            gradients = [slope(models[k], targets(t)[i]) for i in range(N) if CLUSTERS[i] == k]
            models[k] = models[k] - 0.1 * momenta[k](sum(gradients) / len(gradients))
    torch.testing.assert_close(federation.params["x"], torch.stack([models[k] for k in CLUSTERS]), **CLOSE)


def test_global_is_the_mean_gradient_and_ground_truth_of_one_cluster() -> None:
    federation, x, momentum = Global(bowl, starts(), lr=0.1), starts()["x"].mean(0), HeavyBall()
    one = GroundTruth(bowl, starts(), lr=0.1, clusters=[0] * N)
    alone = GroundTruth(bowl, starts(), lr=0.1, clusters=range(N))
    local = Local(bowl, starts(), lr=0.1)
    for t in range(5):
        for each in (federation, one, alone, local):
            each.step(targets(t))
        x = x - 0.1 * momentum(sum(slope(x, d) for d in targets(t)) / N)
    torch.testing.assert_close(federation.params["x"], x.expand(N, 3), **CLOSE)
    torch.testing.assert_close(one.params["x"], x.expand(N, 3), **CLOSE)
    torch.testing.assert_close(alone.params["x"], local.params["x"], **CLOSE)


@pytest.mark.parametrize("attack", [None, bit_flip])
@pytest.mark.parametrize("aggregate", [None, lambda messages: messages.median(0).values])
def test_global_aggregates_the_messages_of_honest_clients_and_attackers(aggregate, attack) -> None:
    federation = Global(bowl, starts(), lr=0.1, aggregate=aggregate, n_byzantine=2, attack=attack)
    x, momentum = starts()["x"].mean(0), HeavyBall()
    for t in range(5):
        data = targets(t, N if attack else N + 2)  # without attack the two poison their data
        federation.step(data)
        messages = torch.stack([slope(x, d) for d in data] + [-slope(x, data[0])] * (2 if attack else 0))
        x = x - 0.1 * momentum(messages.median(0).values if aggregate else messages.mean(0))
    torch.testing.assert_close(federation.params["x"], x.expand(N, 3), **CLOSE)


def test_a_robust_aggregate_withstands_what_the_mean_does_not() -> None:
    found = []
    for aggregate in (None, lambda messages: messages.median(0).values):
        federation = Global(bowl, starts(), lr=0.1, aggregate=aggregate, n_byzantine=2, attack=large_gradient)
        federation.step(targets(0))
        found.append(federation.params["x"].abs().max())
    assert found[0] > 1e4 and found[1] < 10


# -- IFCA, HypCluster


@pytest.mark.parametrize("selected", [False, True], ids=["on the batch", "on other data"])
def test_ifca_steps_along_the_sum_of_its_clients_momenta_over_all_clients(selected: bool) -> None:
    federation, models = IFCA(bowl, starts(3), lr=0.1), starts(3)["x"]
    momenta = [HeavyBall() for _ in range(N)]
    visited = set()
    for t in range(8):
        data, other = targets(t), targets(100 + t)
        found = federation.step(data, other) if selected else federation.step(data)
        chosen = losses(models, other if selected else data).argmin(0)
        assert torch.equal(found, chosen)
        m = torch.stack([momenta[i](slope(models[chosen[i]], data[i])) for i in range(N)])
        models = torch.stack([models[k] - 0.1 * m[chosen == k].sum(0) / N for k in range(3)])
        torch.testing.assert_close(federation.models[0], models, **CLOSE)
        torch.testing.assert_close(federation.params["x"], models[chosen], **CLOSE)
        visited.add(tuple(chosen.tolist()))
    assert len(visited) > 1  # clients did change their model, and kept their momentum


@pytest.mark.parametrize(("cls", "local_steps"), [(IFCA, 1), (IFCA, 3), (HypCluster, 3)])
def test_ifca_of_models_averages_its_clients_models_over_them(cls: type[IFCA], local_steps: int) -> None:
    options: dict[str, Any] = {} if cls is HypCluster else {"variant": "model"}
    federation, models = cls(bowl, starts(3), lr=0.1, local_steps=local_steps, **options), starts(3)["x"]
    momenta, x = [HeavyBall() for _ in range(N)], torch.zeros(N, 3)
    for t in range(9):
        data = targets(t)
        if t % local_steps == 0:
            chosen = losses(models, data).argmin(0)
            x = models[chosen]
        assert torch.equal(federation.step(data), chosen)
        x = torch.stack([x[i] - 0.1 * momenta[i](slope(x[i], data[i])) for i in range(N)])
        if (t + 1) % local_steps == 0:
            models = torch.stack([x[chosen == k].mean(0) if (chosen == k).any() else models[k] for k in range(3)])
        torch.testing.assert_close(federation.models[0], models, **CLOSE)


def test_hypcluster_takes_ten_local_steps_by_default() -> None:
    federation = HypCluster(bowl, starts(2), lr=0.1)
    first = federation.models.clone()
    for t in range(10):
        assert torch.equal(federation.models, first)
        federation.step(targets(t))
    assert not torch.equal(federation.models, first)


@pytest.mark.parametrize("variant", ["gradient", "model"])
def test_a_model_that_nobody_chooses_stays(variant: str) -> None:
    params = starts(3)
    params["x"][1] += 1000
    federation = IFCA(bowl, params, lr=0.1, variant=variant)
    for t in range(4):
        assert 1 not in federation.step(targets(t)).tolist()
        assert torch.equal(federation.models[0, 1], params["x"][1])
    assert not torch.equal(federation.models[0, 0], params["x"][0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_the_worst(bad: float) -> None:
    federation = IFCA(lambda params, data: params["x"][0] * data[0], {"x": torch.tensor([[bad], [3.0], [2.0]])}, lr=0.1)
    assert federation.step(torch.ones(4, 1)).tolist() == [2] * 4


def test_ifca_has_no_models_of_clients_before_they_choose() -> None:
    with pytest.raises(ValueError, match="params: no client has chosen a model yet; make a step first"):
        IFCA(bowl, starts(3), lr=0.1).params  # noqa: B018


# -- Ditto


@pytest.mark.parametrize("pull", [0.0, 0.3, None])
def test_ditto_pulls_every_client_to_a_global_model(pull: float | None) -> None:
    federation = Ditto(bowl, starts(), lr=0.1, **({} if pull is None else {"pull": pull}))
    strength = 1.0 if pull is None else pull
    x, w = starts()["x"], starts()["x"].mean(0)
    momenta, shared = [HeavyBall() for _ in range(N)], HeavyBall()
    whole, local = Global(bowl, starts(), lr=0.1), Local(bowl, starts(), lr=0.1)
    for t in range(5):
        for each in (federation, whole, local):
            each.step(targets(t))
        x = torch.stack(
            [x[i] - 0.1 * (momenta[i](slope(x[i], targets(t)[i])) + strength * (x[i] - w)) for i in range(N)]
        )
        w = w - 0.1 * shared(sum(slope(w, d) for d in targets(t)) / N)
        torch.testing.assert_close(federation.params["x"], x, **CLOSE)
        torch.testing.assert_close(federation.shared[0, 0], w, **CLOSE)
    torch.testing.assert_close(federation.shared, whole.models, **CLOSE)
    assert torch.allclose(federation.models, local.models, rtol=1e-12) == (strength == 0)


# -- kNN-Per


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("neighbours", [1, 3, 7])
def test_knn_per_mixes_the_neighbours_labels_with_the_softmax(neighbours: int, mix: float) -> None:
    rng = torch.Generator().manual_seed(0)
    features, memory = (torch.randn(2, n, 3, generator=rng, dtype=F64) for n in (4, 7))
    labels, logits = torch.randint(5, (2, 7), generator=rng), torch.randn(2, 4, 5, generator=rng, dtype=F64)
    weights = torch.tensor([mix, 0.5], dtype=F64)
    found = KNNPer.predict(features, memory, labels, logits, weights, neighbours=neighbours)
    for c, q in itertools.product(range(2), range(4)):
        d = [((features[c, q] - m) ** 2).sum().item() for m in memory[c]]
        nearest = sorted(range(7), key=d.__getitem__)[:neighbours]
        total = sum(math.exp(-d[s]) for s in nearest)
        for y in range(5):
            near = sum(math.exp(-d[s]) for s in nearest if labels[c, s] == y) / total
            far = math.exp(logits[c, q, y]) / sum(math.exp(v) for v in logits[c, q])
            expected = weights[c].item() * near + (1 - weights[c].item()) * far
            assert found[c, q, y].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_knn_per_takes_ten_neighbours_and_tells_them_apart_far_from_zero() -> None:
    # 30 stored samples 0.01, 0.02, ... away from a query at 1e3, in float32; label = number, mod 3
    memory = torch.full((30, 2), 1e3)
    memory[:, 1] = torch.arange(1, 31) / 64
    labels = torch.arange(30) % 3
    found = KNNPer.predict(torch.tensor([[1e3, 0.0]] * 30), memory, labels, torch.zeros(30, 3), torch.tensor(1.0))
    weight = torch.exp(-((torch.arange(1, 11) / 64) ** 2))
    expected = torch.stack([weight[k::3].sum() for k in range(3)]) / weight.sum()
    torch.testing.assert_close(found, expected.expand(30, 3))


def test_knn_per_trains_the_global_model() -> None:
    found = []
    for cls in (KNNPer, Global):
        federation = cls(bowl, starts(), lr=0.1)
        for t in range(3):
            federation.step(targets(t))
        found.append(federation.params["x"])
    assert torch.equal(*found)


# -- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GroundTruth(bowl, starts(), lr=0.1, clusters=[0, 1]), r"clusters=\[2\]: must be \(6,\) integers"),
        (lambda: GroundTruth(bowl, starts(), lr=0.1, clusters=[]), r"clusters=\[0\]: must be \(6,\) integers"),
        (lambda: GroundTruth(bowl, starts(), lr=0.1, clusters=[0, 0, 2, 2, 2, 2]), "0 to K - 1, each of them used"),
        (lambda: GroundTruth(bowl, starts(), lr=0.1, clusters=[1] * 6), "0 to K - 1, each of them used"),
        (lambda: GroundTruth(bowl, starts(), lr=0.1, clusters=[-1, 0, 1, 0, 1, 0]), "0 to K - 1, each of them used"),
        (lambda: Global(bowl, starts(), lr=0.1, n_byzantine=-1), "n_byzantine=-1: must be an integer >= 0"),
        (lambda: IFCA(bowl, starts(3), lr=0.1, variant="sum"), "variant='sum': must be 'gradient' or 'model'"),
        (lambda: IFCA(bowl, starts(3), lr=0.1, local_steps=2), "local_steps=2: must be .* 1 for variant='gradient'"),
        (lambda: IFCA(bowl, starts(3), lr=0.1, variant="model", local_steps=0), "local_steps=0: must be an integer"),
        (lambda: Ditto(bowl, starts(), lr=0.1, pull=-1.0), r"pull=-1\.0: must be >= 0"),
        (lambda: Ditto(bowl, starts(), lr=0.1, pull=math.nan), "pull=nan: must be >= 0"),
        (lambda: KNNPer.predict(*[torch.zeros(2, 2)] * 2, torch.zeros(2), torch.zeros(2, 2), torch.tensor(0.5)),
         r"neighbours=10: must be in \[1, 2\]"),
        (lambda: Local(bowl, starts(), lr=0.1).step(targets(0, 7)), "same size in the mapped dimension"),
    ],
)  # fmt: skip
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
