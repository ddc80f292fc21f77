"""Every diagnostic against brute force over the clients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clustered_pfl.diagnostics import (
    inter_distance,
    intra_distance,
    intra_ratio,
    membership,
    pair_accuracy,
    precision_recall,
)

torch.set_num_threads(1)
F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-13}  # some hundreds of float64 roundings of numbers of size 1 to 10


def federation(seed: int, n: int, hostile: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Members (2, n, n + hostile), clusters (n,) with all of 0 ... K - 1, gradients (2, n, 3)."""
    rng = torch.Generator().manual_seed(seed)
    k = int(torch.randint(1, n + 1, (), generator=rng))
    clusters = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=rng)])
    clusters = clusters[torch.randperm(n, generator=rng)]
    members = torch.rand(2, n, n + hostile, generator=rng) < 0.4
    return members, clusters, torch.randn(2, n, 3, generator=rng, dtype=F64)


cases = given(st.integers(0, 2**31), st.integers(2, 7), st.integers(0, 2))


@cases
@settings(max_examples=30, deadline=None)
def test_membership_is_the_share_of_pairs(seed: int, n: int, _: int) -> None:
    members, clusters, _ = federation(seed, n)
    found = membership(members, clusters)
    k = int(clusters.max()) + 1
    assert found.shape == (2, k, k)
    for r in range(2):
        for a in range(k):
            for b in range(k):
                pairs = [
                    bool(members[r, i, j]) for i in range(n) for j in range(n) if clusters[i] == a and clusters[j] == b
                ]
                assert found[r, a, b].item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


@cases
@settings(max_examples=30, deadline=None)
def test_precision_recall_and_pair_accuracy_count_clients(seed: int, n: int, hostile: int) -> None:
    members, clusters, _ = federation(seed, n, hostile)
    precision, recall = precision_recall(members, clusters)
    accuracy = pair_accuracy(members, clusters)
    for r in range(2):
        right = 0
        for i in range(n):
            found = {j for j in range(n + hostile) if members[r, i, j]}
            own = {j for j in range(n) if clusters[j] == clusters[i]}
            assert precision[r, i] == (len(found & own) / len(found) if found else 1)
            assert recall[r, i] == len(found & own) / len(own)
            right += sum((j in found) == (j in own) for j in range(n) if j != i)
        assert accuracy[r] == right / (n * (n - 1))


def test_a_perfect_clustering_has_perfect_scores() -> None:
    clusters = torch.tensor([0, 1, 0, 2, 1])
    members = clusters[:, None] == clusters
    assert torch.equal(membership(members, clusters), torch.eye(3, dtype=F64))
    assert all((score == 1).all() for score in precision_recall(members, clusters))
    assert pair_accuracy(members, clusters) == 1
    assert pair_accuracy(~members, clusters) == 0


@cases
@settings(max_examples=30, deadline=None)
def test_distances_within_and_between_clusters(seed: int, n: int, _: int) -> None:
    _, clusters, gradients = federation(seed, n)
    ratio, within = intra_ratio(gradients, clusters), intra_distance(gradients, clusters)
    between = inter_distance(gradients, clusters)
    for r, g in enumerate(gradients):
        for i in range(n):
            mean = torch.stack([g[j] for j in range(n) if clusters[j] == clusters[i]]).mean(0)
            square = ((g[i] - mean) ** 2).sum()
            torch.testing.assert_close(within[r, i], square, **CLOSE)
            torch.testing.assert_close(ratio[r, i], square / (mean**2).sum(), rtol=1e-9, atol=1e-9)
            others = [((g[i] - g[j]) ** 2).sum() for j in range(n) if clusters[j] != clusters[i]]
            assert between[r, i].item() == pytest.approx(min(others).item() if others else math.inf, rel=1e-12)


def test_distances_between_clusters_survive_a_common_offset_in_float32() -> None:
    # 30 gradients 1e4 from zero and 1 apart: |a|^2 + |b|^2 - 2ab is off by 1e8 * 6e-8 = 6
    gradients = torch.full((30, 2), 1e4)
    gradients[:, 0] += torch.arange(30)
    assert torch.equal(inter_distance(gradients, torch.arange(30)), torch.ones(30))
