"""Speed of the method beside its alternatives: `python -m clustered_pfl.bench [device=cpu] [seconds=8]`.

- FC round: all pairs of models and clients at once, against loops in the manner of the official code (a backward pass
  a pair, norms point by point), on the paper's synthetic problems and on a small network; streamed against all at once.
- Threshold-Clustering: the Gram path against the direct one and against plain loops, from one start and from every
  point. Floor: the points read twice.
- Aggregation of 100 vectors: against the robust rules of byzfl, at their defaults, and scikit-learn's clusterings.

Writes `results/clustered_pfl/bench-<device>.json`. About 4 minutes on two CPU cores.
"""

import operator
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional
from torch.utils import _pytree as pytree

from clustered_pfl.clustering import FederatedClustering
from clustered_pfl.federation import Layout, Loss, Params
from clustered_pfl.radius import Quantile
from clustered_pfl.rivals import RULES
from clustered_pfl.threshold import threshold_clustering
from common.kernels import bench

M, RADIUS = 10, Quantile(0.2)
"""Of Threshold-Clustering, wherever a problem has none of its own."""
CLOSE = 1e-3
"""Relative to the largest number: float32 sums of a million terms in different orders."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the tests take less of it."""

    synthetic: tuple[tuple[int, int], ...] = ((4, 4), (4, 16), (16, 4))
    """(K, n_i) of the paper's three panels."""
    network: tuple[tuple[int, ...], int, int] = ((64, 32, 10), 40, 16)
    """Layers, clients, batch."""
    large_network: tuple[tuple[int, ...], int, int] = ((784, 200, 10), 40, 8)
    one_start: tuple[tuple[int, int], ...] = tuple((n, d) for d in (10**5, 10**6) for n in (20, 40, 100))
    """(N, D)."""
    threaded: tuple[int, int] = (40, 10**6)
    """The one of them that is timed on all cores too."""
    all_starts: tuple[tuple[int, int], ...] = ((20, 10**5), (40, 10**5), (100, 10**5), (20, 10**6))
    aggregated: tuple[int, int] = (100, 10**6)
    clustered: tuple[tuple[int, int], ...] = ((100, 10**3), (100, 10**4))


SIZES = Sizes()


@dataclass(frozen=True)
class Problem:
    """Clients, their models and data, and how they are trained."""

    name: str
    loss: Loss
    params: Params
    batches: Any
    radius: Quantile
    rounds: int
    momentum_style: str
    operations: float
    """Of all gradients of a round."""
    momentum: float = 0.9
    lr: float = 1e-6
    """So small that the problem stays what it is, however often a round is timed."""

    def ours(self, **more: Any) -> FederatedClustering:
        """The method on this problem."""
        keys = {name: getattr(self, name) for name in ("lr", "momentum", "momentum_style", "radius", "rounds")}
        return FederatedClustering(self.loss, self.params, **keys, **more)


def synthetic(clusters: int, clients: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """The paper's linear regression: d = 10, 9 samples a client, mean k in every coordinate of cluster k's inputs."""
    rng = torch.Generator().manual_seed(0)
    n, samples, d = clusters * clients, 9, 10
    cluster = torch.arange(n) // clients
    optima = 100 * torch.randint(0, 2, (clusters, d), generator=rng, dtype=torch.float64)[cluster]
    x = torch.randn(n, samples, d, generator=rng, dtype=torch.float64) + cluster[:, None, None]
    y = (x @ optima[..., None])[..., 0]
    start = optima + 0.1 * torch.randn(clusters, d, generator=rng, dtype=torch.float64)[cluster]

    def loss(params: Params, batch: Any) -> Tensor:
        inputs, target = batch
        return (inputs @ params["w"] - target).square().sum() / (2 * samples)

    params, batches = pytree.tree_map(lambda t: t.to(device, dtype), ({"w": start}, (x, y)))
    radius = Quantile(1 / clusters, strict=True)
    name, operations = f"synthetic, {clusters} x {clients} clients", 4.0 * n * n * samples * d
    return Problem(name, loss, params, batches, radius, M, "ema", operations)


def network(
    layers: tuple[int, ...], n: int, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Problem:
    """A ReLU network of every client, random images, 4 clusters that permute the labels."""
    rng = torch.Generator().manual_seed(0)
    shapes = list(zip(layers[1:], layers[:-1], strict=True))
    one = {f"w{i}": torch.randn(shape, generator=rng) / shape[1] ** 0.5 for i, shape in enumerate(shapes)}
    one |= {f"b{i}": torch.zeros(shape[0]) for i, shape in enumerate(shapes)}
    x = torch.randn(n, batch, layers[0], generator=rng)
    labels = (torch.randint(0, layers[-1], (n, batch), generator=rng) + (torch.arange(n) % 4)[:, None]) % layers[-1]

    def loss(params: Params, data: Any) -> Tensor:
        hidden, target = data
        for i in range(len(shapes)):
            hidden = functional.linear(hidden.relu() if i else hidden, params[f"w{i}"], params[f"b{i}"])
        return functional.cross_entropy(hidden, target)

    params = {key: p.to(device, dtype).expand(n, *p.shape).clone() for key, p in one.items()}
    weights = [a * b for a, b in shapes]
    # forward, gradient of weights, and of inputs but the first
    operations = 2.0 * n * n * batch * (3 * sum(weights) - weights[0])
    name = f"MLP {'-'.join(map(str, layers))}, {n} clients, batch {batch}"
    batches = (x.to(device, dtype), labels.to(device))
    return Problem(name, loss, params, batches, Quantile(0.2), 5, "heavy_ball", operations)


Estimate = Callable[[Problem, Params, int], Tensor]
"""The cluster gradient (D,) of one client, given its model and its number."""


def by_loops(problem: Problem, model: Params, own: int) -> Tensor:
    """Loops over clients in the manner of the official code."""
    answers = []
    for j in range(len(next(iter(problem.params.values())))):
        leaves = {name: p.detach().requires_grad_() for name, p in model.items()}
        problem.loss(leaves, pytree.tree_map(lambda x, j=j: x[j], problem.batches)).backward()
        answers.append(torch.cat([leaf.grad.flatten() for leaf in leaves.values() if leaf.grad is not None]))
    return points_by_loops(answers, answers[own], problem.radius, problem.rounds)


def points_by_loops(points: list[Tensor], v: Tensor, radius: Quantile, rounds: int) -> Tensor:
    """Threshold-Clustering as a loop over points; as there, norms for the radius and again for who is inside."""
    for _ in range(rounds):
        tau = radius.factor * sorted((z - v).norm() for z in points)[radius.rank(len(points))]
        near = operator.lt if radius.strict else operator.le
        v = torch.stack([z if near((z - v).norm(), tau) else v for z in points]).mean(0)
    return v


def one_model_at_a_time(problem: Problem, model: Params, own: int) -> Tensor:
    """All clients at once, by vmap, but one model after the other."""
    gradients = vmap(grad(problem.loss), (None, 0))(model, problem.batches)
    answers = torch.cat([gradients[name].flatten(1) for name in model], 1)
    return threshold_clustering(answers, answers[own], radius=problem.radius, rounds=problem.rounds).centers[0]


@dataclass
class Plain:
    """Federated-Clustering, one client after the other."""

    problem: Problem
    estimate: Estimate
    velocity: Tensor | None = None
    models: Tensor = field(init=False)
    """(N, D)."""

    def __post_init__(self) -> None:
        self.layout = Layout({name: p.shape[1:] for name, p in self.problem.params.items()})
        self.models = self.layout.flatten(self.problem.params)

    def step(self) -> None:
        """One round."""
        problem, each = self.problem, [self.layout.unflatten(model) for model in self.models]
        v = torch.stack([self.estimate(problem, model, i) for i, model in enumerate(each)])
        if self.velocity is not None:
            weight = 1 if problem.momentum_style == "heavy_ball" else 1 - problem.momentum
            v = problem.momentum * self.velocity + weight * v
        self.velocity = v
        self.models = self.models - problem.lr * v


def cdist_loop(points: Tensor, starts: Tensor, radius: Quantile, rounds: int) -> Tensor:
    """Threshold-Clustering as one would write it, all starts at once."""
    v, n = starts, len(points)
    for _ in range(rounds):
        distances = torch.cdist(v, points, compute_mode="donot_use_mm_for_euclid_dist")
        share = (distances <= distances.kthvalue(radius.rank(n) + 1).values[:, None]).to(points) / n
        v = v + share @ points - share.sum(1, keepdim=True) * v
    return v


def clouds(n: int, d: int, device: str = "cpu", apart: float = 1.0) -> Tensor:
    """(N, D) points of 4 clusters, which lie so many times as far apart as they are wide."""
    rng = torch.Generator().manual_seed(0)
    centers, points = apart * torch.randn(4, d, generator=rng), torch.randn(n, d, generator=rng)
    for i, point in enumerate(points):
        point += centers[i % 4]
    return points.to(device)


def close(found: Tensor, expected: Tensor) -> None:
    """Refuse what differs by more than rounding."""
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    assert error <= CLOSE * size, f"differs by {error:.1e}, numbers are up to {size:.1e}"


def same_rounds(problem: Problem, estimates: list[Estimate]) -> None:
    """Gate: momenta after two rounds."""
    ours = problem.ours()
    for _ in range(2):
        ours.step(problem.batches)
    for estimate in estimates:
        plain = Plain(problem, estimate)
        for _ in range(2):
            plain.step()
        assert ours.velocity is not None and plain.velocity is not None
        close(ours.velocity[0], plain.velocity)


def same_centers(points: Tensor, starts: Tensor, method: str) -> None:
    """Gate: the first three centres, by the method and by the loop, are those of the direct path."""
    few = starts[:3]
    expected = cluster(points, few, "direct")
    close(cluster(points, starts, method)[:3], expected)
    close(cdist_loop(points, few, RADIUS, M), expected)


def repeat(times: int, call: Callable[[], Any]) -> None:
    """Call so often."""
    for _ in range(times):
        call()


def round_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """FC rounds against loops."""
    problems = [synthetic(*size, device) for size in SIZES.synthetic] + [network(*SIZES.network, device)]
    for problem in problems:
        others: dict[str, Estimate] = {"loop over clients": by_loops}
        if problem is problems[-1]:
            others["vmap, one model at a time"] = one_model_at_a_time
        # where a round takes a millisecond, a run of them, as in training: one alone is timed with cold caches
        times = 10 if problem is problems[0] else 1
        for threads in cores(device) if problem is problems[-1] else [1]:
            say(f"FC round, {problem.name}, {threads} threads")
            ours = partial(repeat, times, partial(problem.ours().step, problem.batches))
            yield from bench.compare(
                "FC round" if times == 1 else f"{times} FC rounds", problem.name, ("all pairs at once", ours),
                {name: partial(repeat, times, Plain(problem, other).step) for name, other in others.items()},
                check=partial(same_rounds, problem, list(others.values())), threads=threads, device=device,
                operations=times * problem.operations, budget_s=seconds / 2,
            )  # fmt: skip


def seed_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """Eight seeds side by side, as experiments run them, against a loop over seeds and clients."""
    problem, seeds = synthetic(*SIZES.synthetic[0], device), 8
    params, batches = pytree.tree_map(lambda t: torch.stack([t] * seeds), (problem.params, problem.batches))
    side_by_side = replace(problem, params=params, batches=batches)
    loop = Plain(problem, by_loops)  # the same seed again and again costs the same

    def gate() -> None:
        ours, alone = side_by_side.ours(replicas=True), problem.ours()
        ours.step(batches)
        alone.step(problem.batches)
        close(ours.models, alone.models.expand_as(ours.models))

    say(f"FC round of {seeds} seeds, {problem.name}")
    yield from bench.compare(
        f"FC round of {seeds} seeds", problem.name,
        ("all pairs and seeds at once", partial(side_by_side.ours(replicas=True).step, batches)),
        {"loop over seeds and clients": partial(repeat, seeds, loop.step)},
        check=gate, device=device, operations=seeds * problem.operations, budget_s=seconds / 2,
    )  # fmt: skip


def streaming_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """What a bounded memory costs."""
    problem = network(*SIZES.large_network, device)
    streamed, whole = (partial(problem.ours(memory_mb=mb).step, problem.batches) for mb in (16.0, 1e9))

    def gate() -> None:
        pair = problem.ours(memory_mb=16.0), problem.ours(memory_mb=1e9)
        for federation in pair:
            federation.step(problem.batches)
        close(*(federation.models for federation in pair))

    say(f"FC round, {problem.name}, streamed")
    held = bench.peak_bytes(whole, device) / 1e6
    yield from bench.compare(
        "FC round", problem.name, ("streamed, memory_mb=16", streamed), {f"all at once, {held:.0f} MB": whole},
        check=gate, device=device, operations=problem.operations, budget_s=seconds, rounds=3,
    )  # fmt: skip


def clustering_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """The Gram path against the direct path and loops, from one start and from all points."""
    for sizes, starts in ((SIZES.one_start, 1), (SIZES.all_starts, None)):
        for n, d in sizes:
            points = clouds(n, d, device)
            first = points[:starts]
            others: dict[str, Callable[[], Any]] = {"torch.cdist loop": partial(cdist_loop, points, first, RADIUS, M)}
            if starts or (n, d) == sizes[0]:
                others["direct"] = partial(cluster, points, first, "direct")
            if starts and (n, d) == sizes[0]:
                others["loop over points"] = partial(points_by_loops, list(points), points[0], RADIUS, M)
            size = f"N = {n}, D = {short(d)}, {'one start' if starts else 'N starts'}"
            for threads in cores(device) if starts and (n, d) == SIZES.threaded else [1]:
                say(f"Threshold-Clustering, {size}, {threads} threads")
                yield from bench.compare(
                    "Threshold-Clustering", size, ("Gram", partial(cluster, points, first, "gram")), others,
                    check=partial(same_centers, points, first, "gram"), threads=threads, device=device,
                    bytes_moved=8.0 * n * d, budget_s=seconds / 2, rounds=31 if starts else 3,
                )  # fmt: skip


def aggregation_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """Against other robust aggregates, of which each client gets the same."""
    n, d = SIZES.aggregated
    points = clouds(n, d, device)
    rules = {f"byzfl {name}": partial(rule(n // 5), points) for name, rule in RULES.items()}
    one, every = partial(cluster, points, points[0]), partial(cluster, points, points)
    size = f"n = {n}, d = {short(d)}"
    for name, ours, others in (
        ("Threshold-Clustering, one start", one, rules),
        ("Threshold-Clustering, n starts", every, {"byzfl krum": rules["byzfl krum"]}),
    ):
        say(f"aggregation, {size}, {name}")
        yield from bench.compare(
            "aggregation", size, (name, ours), others, check=partial(same_centers, points, points, "auto"),
            device=device, bytes_moved=8.0 * n * d, budget_s=seconds, rounds=3,
        )  # fmt: skip


def clustered_rows(device: str, seconds: float) -> Iterator[bench.Row]:
    """Against clusterings that find all centres; MeanShift is told the radius."""
    from sklearn.cluster import KMeans, MeanShift

    for n, d in SIZES.clustered:
        points, labels = clouds(n, d, device, apart=3.0), torch.arange(n) % 4
        array, same = points.cpu().numpy(), labels[:, None] == labels
        ours = partial(threshold_clustering, points, points, radius=RADIUS, rounds=M)
        others = {"sklearn KMeans": partial(KMeans(4, random_state=0).fit, array)}
        if (n, d) == SIZES.clustered[0]:
            others["sklearn MeanShift"] = partial(MeanShift(bandwidth=2 * d**0.5).fit, array)

        def gate(ours: Any = ours, others: Any = others, same: Tensor = same) -> None:
            assert not (ours().members.cpu() & ~same).any(), "clusters are mixed"
            for name, fit in others.items():
                theirs = torch.as_tensor(fit().labels_)
                assert torch.equal(theirs[:, None] == theirs, same), f"{name}: other clusters than there are"

        size = f"n = {n}, d = {short(d)}, 4 clusters"
        say(f"aggregation, {size}")
        yield from bench.compare(
            "aggregation", size, ("Threshold-Clustering, n starts", ours), others, check=gate, device=device,
            bytes_moved=8.0 * n * d, budget_s=seconds / 2,
        )  # fmt: skip


def cluster(points: Tensor, starts: Tensor, method: Any = "auto") -> Tensor:
    """Centres."""
    return threshold_clustering(points, starts, radius=RADIUS, rounds=M, method=method).centers


def short(number: int) -> str:
    """1e5."""
    return f"{number:.0e}".replace("e+0", "e")


def cores(device: str) -> list[int]:
    """One thread, and all."""
    return sorted({1, os.cpu_count() or 1}) if torch.device(device).type == "cpu" else [1]


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run every comparison, print the table, write the file."""
    device, seconds, results = bench.options(arguments)
    groups = (round_rows, seed_rows, streaming_rows, clustering_rows, aggregation_rows, clustered_rows)
    rows = [row for group in groups for row in group(device, seconds)]
    bench.show(rows, f"Threshold- and Federated-Clustering on {device}")
    print(bench.write("clustered_pfl", rows, device, results))


if __name__ == "__main__":
    main()
