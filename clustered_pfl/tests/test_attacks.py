"""What the attackers send, and how little of it reaches the models of Federated-Clustering."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clustered_pfl.attacks import ATTACKS, Exchange, bit_flip, inside_radius, label_flip, large_gradient, non_finite
from clustered_pfl.baselines import Global
from clustered_pfl.clustering import FederatedClustering, MomentumClustering
from clustered_pfl.federation import module_loss, stack
from clustered_pfl.radius import Fixed, Quantile
from clustered_pfl.tests.plain import batch, federated_clustering, flat, gradient, network, networks
from clustered_pfl.threshold import threshold_clustering

torch.set_num_threads(1)
F64 = torch.float64
LOSS = module_loss(network(), nn.functional.cross_entropy)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # some steps of some thousands of float64 roundings


def exchange(
    count: int = 4, lead: tuple[int, ...] = (2, 3), d: int = 5, dtype: torch.dtype = F64, **more: Any
) -> Exchange:
    rng = torch.Generator().manual_seed(0)
    honest = torch.randn(*lead, 6, d, generator=rng, dtype=F64).to(dtype)
    options = {"radius": Quantile(0.3), "generator": torch.Generator().manual_seed(1)} | more
    return Exchange(honest, honest[..., 2, :], count, **options)


def send(value: float):
    """An attack: this value in every coordinate."""
    return lambda e: torch.full_like(e.honest[..., :1, :], value).expand(*e.honest.shape[:-2], e.count, -1)


def fc(attack=None, b: int = 2, **options: Any) -> FederatedClustering:
    options = {"lr": 0.5, "rounds": 4, "radius": Quantile(0.4)} | options
    return FederatedClustering(LOSS, stack(networks()), n_byzantine=b, attack=attack, **options)


def run(federation: Any, steps: int = 5, n: int = 8) -> Tensor:
    for t in range(steps):
        federation.step(batch(t, n))
    return federation.client_models()[0].clone()


# -- messages


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("lead", "count"), [((), 1), ((3,), 4), ((2, 3), 5)])
def test_every_attack_sends_one_message_an_attacker(lead: tuple, count: int, dtype: torch.dtype, name: str) -> None:
    sent = ATTACKS[name](exchange(count, lead, dtype=dtype))
    assert sent.shape == (*lead, count, 5) and sent.dtype == dtype


def test_large_gradients_are_normal_around_a_million() -> None:
    z = (large_gradient(exchange(50, (4,), 500)) - 1e6) / 200
    n = z.numel()
    # four standard errors of mean and deviation; messages are float32, rounded to 1/16
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    assert len(z.flatten(0, 1).unique(dim=0)) == 200
    other = large_gradient(exchange(50, (4,), 500), mean=-3.0, std=0.5)
    torch.testing.assert_close(other, z * 0.5 - 3, rtol=0, atol=2e-3)  # the same draws, half of 1/16 of 1/200 off


def test_large_gradients_come_from_the_generator_of_the_replica() -> None:
    torch.manual_seed(0)
    first, again = large_gradient(exchange()), large_gradient(exchange())
    assert torch.equal(first, again)
    same = exchange()
    assert not torch.equal(large_gradient(same), large_gradient(same))


def test_bit_flip_is_minus_the_first_honest_gradient_from_everybody() -> None:
    seen = exchange()
    sent = bit_flip(seen)
    for j in range(4):
        assert torch.equal(sent[..., j, :], -seen.honest[..., 0, :])


@pytest.mark.parametrize("fraction", [0.7, 1.0])
def test_inside_radius_pulls_towards_zero_from_within(fraction: float) -> None:
    seen = exchange(2, radius=Quantile(0.6))
    sent = inside_radius(seen, fraction) if fraction != 0.7 else inside_radius(seen)
    start, everyone = seen.starts[..., None, :], torch.cat([seen.honest, sent], -2)
    # rank floor(0.6 * 8) = 4 of all; two of the points before it are the attackers
    tau = (seen.honest - start).norm(dim=-1).sort(-1).values[..., 2]
    offset = sent - start
    torch.testing.assert_close(offset.norm(dim=-1), fraction * tau[..., None].expand(2, 3, 2), **CLOSE)
    cosine = nn.functional.cosine_similarity(offset, start.expand_as(offset), dim=-1)
    torch.testing.assert_close(cosine, -torch.ones_like(cosine), **CLOSE)
    found = threshold_clustering(everyone, seen.starts, radius=seen.radius, rounds=1)
    assert found.members[..., 6:].all()
    torch.testing.assert_close(found.radii[0, ..., 0], tau, **CLOSE)


def test_inside_radius_of_a_zero_gradient_is_zero() -> None:
    seen = exchange()
    sent = inside_radius(Exchange(seen.honest, torch.zeros_like(seen.starts), 3, Fixed(1.0), seen.generator))
    assert not sent.any()


def test_non_finite_sends_each_kind_in_turn() -> None:
    sent = non_finite(exchange(6, (), 3, dtype=torch.float32))
    for j, value in enumerate([math.nan, math.inf, -math.inf, 1e38, math.nan, math.inf]):
        np.testing.assert_array_equal(sent[j], np.full(3, value, np.float32))


def test_label_flip_mirrors_the_labels() -> None:
    assert label_flip(torch.tensor([[0, 1], [4, 2]]), 5).tolist() == [[4, 3], [0, 2]]
    assert label_flip(torch.zeros(0, dtype=torch.long), 5).shape == (0,)
    for labels, span in (([0, 5], r"\[0, 5\]"), ([-1, 2], r"\[-1, 2\]")):
        with pytest.raises(ValueError, match=rf"labels span {span}: must lie in \[0, 5\)"):
            label_flip(torch.tensor(labels), 5)


# -- Federated-Clustering under attack


@pytest.mark.parametrize("rule", [Quantile(0.4), Quantile(0.5, strict=True), Quantile(0.5, factor=0.99), Fixed(0.6)])
def test_a_large_attack_only_counts_in_the_divisor_and_the_quantile(rule) -> None:
    # rank floor(q (N + b)) of N + b points is that of q (N + b) / N of the N honest ones
    alike = Quantile(rule.q * 10 / 8, rule.strict, rule.factor) if isinstance(rule, Quantile) else rule
    expected = federated_clustering(networks(), [batch(t) for t in range(5)], alike, 4, absent=2)
    torch.testing.assert_close(run(fc(large_gradient, radius=rule)), expected, **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, -1e38, 1e300, 1e9])
def test_what_far_attackers_send_changes_no_bit(value: float, groups: int) -> None:
    reference = run(fc(send(1e6), groups=groups))
    assert reference.isfinite().all()
    assert torch.equal(run(fc(send(value), groups=groups)), reference)
    assert torch.equal(run(fc(non_finite, groups=groups)), reference)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_float32_models_survive_too(value: float) -> None:
    params = {name: p.float() for name, p in stack(networks()).items()}
    for cls in (FederatedClustering, MomentumClustering):
        found = []
        for attack in (large_gradient, send(value)):
            federation = cls(LOSS, params, lr=0.5, radius=Quantile(0.4), n_byzantine=3, attack=attack)
            for t in range(5):
                x, y = batch(t)
                federation.step((x.float(), y))
            found.append(federation.client_models())
        assert found[0].isfinite().all() and torch.equal(*found)


def test_bit_flippers_flip_the_first_of_the_group() -> None:
    expected = federated_clustering(
        networks(), [batch(t) for t in range(5)], Quantile(0.6), 4, hostile=lambda answers: [-answers[0]] * 2
    )
    torch.testing.assert_close(run(fc(bit_flip, radius=Quantile(0.6))), expected, **CLOSE)
    assert not torch.allclose(run(fc(bit_flip, b=3, radius=Quantile(0.6))), expected, rtol=1e-3)


@pytest.mark.parametrize("cls", [Global, MomentumClustering])
def test_attackers_of_one_exchange_see_all_messages_and_the_first_as_the_start(cls) -> None:
    seen: list[Exchange] = []
    federation = cls(LOSS, stack(networks()), lr=0.5, n_byzantine=3, attack=lambda e: seen.append(e) or bit_flip(e))
    if cls is MomentumClustering:
        federation.radius = Quantile(0.3)
    expected = federation.gradients(federation.client_models(), federation.lift(batch(0)))[0]
    federation.step(batch(0))
    assert len(seen) == 1 and torch.equal(seen[0].honest, expected) and torch.equal(seen[0].starts, expected[0])
    # Global believes nobody more than others: there is no radius to hide in
    assert seen[0].count == 3 and seen[0].radius == (Fixed(0.0) if cls is Global else Quantile(0.3))


@pytest.mark.parametrize("groups", [1, 2])
def test_attackers_of_a_group_see_that_group(groups: int) -> None:
    seen: list[Exchange] = []
    federation = fc(lambda e: seen.append(e) or bit_flip(e), b=4, groups=groups, radius=Quantile(0.6))
    models = federation.models[0].clone()
    found = federation.step(batch(0))
    assert sum(e.honest[..., 0, 0].numel() for e in seen) == 8  # one exchange a client
    size = 8 // groups
    for e in seen:
        assert e.honest.shape[-2] == size and e.count == 4 // groups and e.radius == Quantile(0.6)
        own = torch.arange(size)
        assert torch.equal(e.starts[0], e.honest[0, own, own])
    modules, (x, y) = networks(), batch(0)
    own = torch.stack([torch.from_numpy(gradient(m, a, b)) for m, a, b in zip(modules, x, y, strict=True)])
    assert torch.equal(models, torch.stack([flat(m) for m in modules]))
    gap = torch.cdist(torch.cat([e.starts.flatten(0, 1) for e in seen]), own).sort(1).values
    assert gap[:, 0].max() < 1e-12
    assert found.members.shape == (8, 12)
    assert (found.members[:, 8:].sum(1) <= 4 // groups).all()


def test_attackers_who_only_poison_their_data_are_clients_without_a_model() -> None:
    poisoned = fc(None, b=2, radius=Quantile(0.5))
    more = FederatedClustering(LOSS, stack(networks(10)), lr=0.5, rounds=4, radius=Quantile(0.5))
    for t in range(5):
        x, y = batch(t, 10)
        y[8:] = label_flip(y[8:], 3)
        found, whole = poisoned.step((x, y)), more.step((x, y))
        assert torch.equal(found.members, whole.members[:8])
    # networks(10) starts with the same eight
    torch.testing.assert_close(poisoned.models[0], more.models[0, :8], **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
def test_data_of_nan_reach_no_honest_model(groups: int) -> None:
    federation = fc(None, b=2, groups=groups)
    for t in range(5):
        x, y = batch(t, 10)
        x[8:] = math.nan
        found = federation.step((x, y))
        assert not found.members[:, 8:].any()
    assert torch.equal(federation.client_models()[0], run(fc(send(1e6), groups=groups)))


def test_one_honest_client_that_diverges_keeps_it_to_itself() -> None:
    federation = fc(b=0)
    for t in range(5):
        x, y = batch(t)
        x[3, 0, 0] = math.nan
        federation.step((x, y))
    assert federation.models[0].isfinite().all(1).tolist() == [i != 3 for i in range(8)]


def test_the_global_mean_follows_the_attackers() -> None:
    federation = Global(LOSS, stack(networks()), lr=0.5, n_byzantine=2, attack=bit_flip)
    before = federation.client_models()[0, :1].clone()
    federation.step(batch(0))
    module = network()
    with torch.no_grad():
        nn.utils.vector_to_parameters(before[0], module.parameters())
    answers = [gradient(module, x, y) for x, y in zip(*batch(0), strict=True)]
    expected = before[0].numpy() - 0.5 * (sum(answers) - 2 * answers[0]) / 10
    torch.testing.assert_close(federation.client_models()[0, 5], torch.from_numpy(expected), **CLOSE)
