"""Partitions deal a row to one client at most, are the same everywhere, and have the clusters and skew asked for."""

import hashlib
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import figures
from common.data import DataConfig, load, partition, tensors
from common.data.partition import Partition

DEALERS = {
    "iid": partition.iid,
    "rotation": partition.rotation,
    "private_label": partition.private_label,
    "label_groups": lambda y, n, **k: partition.label_groups(y, n, n_clusters=5, **k),
    "dirichlet": lambda y, n, **k: partition.dirichlet(y, n, alpha=0.3, **k),
    "label_skew": partition.label_skew,
}
LABELS = np.random.Generator(np.random.PCG64(7)).integers(0, 10, 500)
BALANCED = np.repeat(np.arange(10), 40)


RELAXED = settings(deadline=None)  # a thousand draws take a while on a busy machine


def label_lists(classes=6):
    """Unbalanced labels; a class may be absent."""
    return st.lists(st.integers(0, classes - 1), min_size=1, max_size=80).map(np.array)


def same(a, b):
    fields = ("clusters", "quarter_turns", "label_shift")
    rows = len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))
    return rows and a.classes == b.classes and all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def check_rows(p, rows):
    """Sorted, disjoint, of the data set; how many are dealt."""
    dealt = np.concatenate(p.indices)
    assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in p.indices)
    assert len(np.unique(dealt)) == len(dealt) and set(dealt) <= set(range(rows))
    assert p.sizes.tolist() == [len(part) for part in p.indices] and len(p) == len(p.indices)
    return len(dealt)


@RELAXED
@given(y=label_lists(), data=st.data(), seed=st.integers(0, 2**64))
def test_iid_rows_are_disjoint_and_as_many_as_asked(y, data, seed):
    n = data.draw(st.integers(1, len(y)))
    samples = data.draw(st.none() | st.integers(1, len(y) // n))
    p = partition.iid(y, n, samples=samples, seed=seed)
    assert check_rows(p, len(y)) == n * (samples or len(y) // n)
    assert set(p.sizes) == {samples or len(y) // n}
    assert not p.clusters.any() and not p.quarter_turns.any() and not p.label_shift.any()
    assert same(p, partition.iid(y, n, samples=samples, seed=seed))


@RELAXED
@given(y=label_lists(), data=st.data(), alpha=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32))
def test_dirichlet_deals_every_row_and_respects_the_minimum(y, data, alpha, seed):
    n = data.draw(st.integers(1, len(y)))
    minimum = data.draw(st.integers(0, len(y) // n))
    try:
        p = partition.dirichlet(y, n, alpha=alpha, min_samples=minimum, seed=seed)
    except ValueError as error:
        assert minimum and f"min_samples={minimum} smaller" in str(error)
        return
    assert check_rows(p, len(y)) == len(y) and p.sizes.min() >= minimum
    assert p.label_counts(y).sum(0).tolist() == np.bincount(y, minlength=p.classes).tolist()
    assert same(p, partition.dirichlet(y, n, alpha=alpha, min_samples=minimum, seed=seed))


@RELAXED
@given(y=label_lists(), data=st.data(), seed=st.integers(0, 2**32))
def test_label_skew_bounds_the_classes_of_the_clients(y, data, seed):
    shards = data.draw(st.integers(1, min(len(y), 5)))
    n = data.draw(st.integers(1, len(y) // shards))
    p = partition.label_skew(y, n, classes_per_client=shards, seed=seed)
    assert check_rows(p, len(y)) == len(y)
    assert np.ptp(p.sizes) <= shards
    held = (p.label_counts(y) > 0).sum(1)
    present = np.unique(y, return_counts=True)[1]
    # every border between two classes adds one class to one client at most
    assert held.sum() <= n * shards + len(present) - 1
    if present.min() >= -(-len(y) // (n * shards)):  # no class is smaller than a shard: one border a shard at most
        assert held.max() <= 2 * shards
    assert same(p, partition.label_skew(y, n, classes_per_client=shards, seed=seed))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_label_skew_has_exactly_the_classes_asked_for_when_shards_come_out_even(shards):
    held = (partition.label_skew(BALANCED, 20, classes_per_client=shards).label_counts(BALANCED) > 0).sum(1)
    assert held.max() == shards
    # dealt at random, not in order: in order, neighbours of the sorted shards would stay together
    assert shards == 1 or held.mean() > shards / 2


@RELAXED
@given(
    y=label_lists(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    samples=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_clusters_are_contiguous_have_their_sizes_and_share_the_rows_of_iid(y, sizes, samples, seed):
    n = sum(sizes)
    if n * samples > len(y):
        with pytest.raises(ValueError, match=r"(samples|n_clients)=\d+: must be an integer in \[1, \d+\]"):
            partition.rotation(y, n, n_clusters=len(sizes), cluster_sizes=sizes, samples=samples, seed=seed)
        return
    plain = partition.iid(y, n, samples=samples, seed=seed)
    expected = np.repeat(np.arange(len(sizes)), sizes)
    for make in (partition.rotation, partition.private_label):
        p = make(y, n, n_clusters=len(sizes), cluster_sizes=sizes, samples=samples, seed=seed)
        assert p.clusters.tolist() == expected.tolist()
        assert all(np.array_equal(a, b) for a, b in zip(p.indices, plain.indices, strict=True))
        turned = make is partition.rotation
        assert p.quarter_turns.tolist() == (expected % 4 if turned else 0 * expected).tolist()
        assert p.label_shift.tolist() == (0 * expected if turned else expected % p.classes).tolist()


def test_equal_clusters_are_the_default_and_need_not_divide():
    assert partition.rotation(LABELS, 8).clusters.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    uneven = np.bincount(partition.private_label(LABELS, 11, n_clusters=4).clusters)
    assert sorted(uneven) == [2, 3, 3, 3]
    paper = partition.rotation(np.zeros(60000, dtype=int), 300)  # MNIST: 300 clients of 200 rows, 75 a cluster
    assert np.bincount(paper.clusters).tolist() == [75] * 4 and set(paper.sizes) == {200}


@RELAXED
@given(y=label_lists(), groups=st.sampled_from([1, 2, 3, 6]), data=st.data())
def test_a_label_group_sees_its_own_classes_only(y, groups, data):
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=groups, max_size=groups))
    wide = 6 // groups
    rows = np.bincount(y // wide, minlength=groups)
    call = {"n_clusters": groups, "cluster_sizes": sizes, "classes": 6}
    if (rows < sizes).any():
        with pytest.raises(ValueError, match="n_clients="):
            partition.label_groups(y, sum(sizes), **call)
        return
    p = partition.label_groups(y, sum(sizes), **call)
    check_rows(p, len(y))
    for client, counts in enumerate(p.label_counts(y)):
        k = p.clusters[client]
        assert counts.sum() == counts[k * wide : (k + 1) * wide].sum() == rows[k] // sizes[k]


def test_label_groups_take_the_rows_of_a_cluster_at_random():
    first = partition.label_groups(BALANCED, 10, n_clusters=2, samples=15)
    assert set(first.sizes) == {15} and (first.label_counts(BALANCED) > 0).sum(1).max() > 2
    with pytest.raises(ValueError, match=r"samples=41: must be an integer in \[1, 40\] \(cluster 0 has 200 rows for 5"):
        partition.label_groups(BALANCED, 10, n_clusters=2, samples=41)


def test_smaller_alpha_is_more_skewed():
    """The largest share of a class that one client holds has a known limit on both sides."""
    y = np.repeat(np.arange(50), 100)
    parts = [partition.dirichlet(y, 5, alpha=alpha, min_samples=0) for alpha in (1e-3, 0.1, 1.0, 10.0, 1e6)]
    largest = [p.label_counts(y).max(0).mean() / 100 for p in parts]
    assert largest == sorted(largest, reverse=True) and len(set(largest)) == 5
    assert largest[0] > 0.98 and largest[-1] == 0.2


def test_shares_have_the_moments_of_the_dirichlet_distribution():
    y = np.repeat(np.arange(2000), 100)
    shares = partition.dirichlet(y, 4, alpha=0.5).label_counts(y) / 100  # (4, 2000)
    variance = 0.25 * 0.75 / (4 * 0.5 + 1)  # of Dirichlet(0.5, 0.5, 0.5, 0.5)
    error = 4 * np.sqrt(variance / 2000)  # four standard errors
    assert abs(shares.mean(1) - 0.25).max() < error
    assert abs(shares.var(1) - variance).max() < error
    covariance = np.cov(shares)[0, 1]
    assert covariance == pytest.approx(-(0.25**2) / (4 * 0.5 + 1), abs=error)


def test_dirichlet_draws_again_until_every_client_has_enough_or_says_why_not():
    first = partition.dirichlet(LABELS, 10, alpha=0.3, min_samples=0)
    assert first.sizes.min() < 30 <= partition.dirichlet(LABELS, 10, alpha=0.3, min_samples=30).sizes.min()
    with pytest.raises(ValueError, match=r"alpha=0.001: must be larger, or min_samples=40 smaller: in each of 1000"):
        partition.dirichlet(LABELS, 10, alpha=0.001, min_samples=40)


GOLDEN = {
    "iid": "e697a4001634b103",
    "rotation": "9f36937df2825d38",
    "private_label": "170ca161593ea646",
    "label_groups": "f863ed983eeb5676",
    "dirichlet": "182de71d745049d7",
    "label_skew": "0aba2a3725bb57ba",
}


@pytest.mark.parametrize("name", DEALERS)
def test_the_same_seed_gives_the_same_partition_on_every_machine(name):
    p = DEALERS[name](LABELS, 10, seed=3)
    text = ";".join(" ".join(map(str, values)) for values in (*p.indices, p.clusters, p.quarter_turns, p.label_shift))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[name]
    assert not same(p, DEALERS[name](LABELS, 10, seed=4))


@pytest.mark.parametrize("name", DEALERS)
def test_labels_may_be_an_array_a_list_a_tensor_or_a_column(name):
    expected = DEALERS[name](LABELS, 10)
    column = datasets.Dataset.from_dict({"y": LABELS})["y"]
    for labels in (LABELS.tolist(), torch.from_numpy(LABELS), LABELS.astype(np.uint8), column):
        assert same(DEALERS[name](labels, 10), expected)
        assert np.array_equal(expected.label_counts(labels), expected.label_counts(LABELS))


def test_label_counts_are_of_the_labels_that_the_client_sees():
    y = np.array([0, 0, 1, 2, 2, 2])
    p = Partition(([0, 1, 2], [3, 4]), [0, 1], [0, 0], [0, 2], classes=3)
    assert p.label_counts(y).tolist() == [[2, 1, 0], [0, 2, 0]]
    private = partition.private_label(LABELS, 10)
    for client, rows in enumerate(private.indices):
        seen = partition.shift_labels(torch.from_numpy(LABELS[rows]), int(private.label_shift[client]), 10)
        assert private.label_counts(LABELS)[client].tolist() == torch.bincount(seen, minlength=10).tolist()


def test_select_gives_the_rows_of_a_client():
    split = load(DataConfig(name="digits", classes=10))["train"]
    whole = tensors(split)
    p = partition.dirichlet(split["y"], 6, alpha=0.5)
    for client, rows in enumerate(p.indices):
        part = tensors(p.select(split, client))
        assert torch.equal(part["x"], whole["x"][rows]) and torch.equal(part["y"], whole["y"][rows])
    for client in (-1, 6):
        with pytest.raises(ValueError, match=rf"client={client}: must be an integer in \[0, 5\]"):
            p.select(split, client)
    with pytest.raises(ValueError, match=r"len\(split\)=3: must be > \d+, the largest row number"):
        p.select(split.select(range(3)), 0)
    with pytest.raises(ValueError, match=rf"len\(split\)={len(split) - 1}: must be > {len(split) - 1}, the largest"):
        p.select(split.select(range(len(split) - 1)), 0)
    with pytest.raises(ValueError, match=r"len\(labels\)=3: must be > \d+"):
        p.label_counts([1, 2, 3])


def test_turn_is_counter_clockwise_and_four_turns_are_none():
    image = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert partition.turn(image, 1).tolist() == [[3, 6], [2, 5], [1, 4]]
    assert partition.turn(image, 2).tolist() == [[6, 5, 4], [3, 2, 1]]
    batch = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for turns in range(5):
        turned = partition.turn(batch, turns)
        assert turned.is_contiguous() and turned.data_ptr() != batch.data_ptr()
        assert np.array_equal(turned.numpy(), np.rot90(batch.numpy(), turns, axes=(2, 3)))
        assert torch.equal(partition.turn(turned, 4 - turns), batch)
    with pytest.raises(ValueError, match=r"images.shape=\(3,\): must be \(..., H, W\)"):
        partition.turn(torch.zeros(3), 1)


def test_shift_labels_wraps_and_broadcasts():
    y = torch.tensor([[0, 8, 9], [0, 8, 9]])
    assert partition.shift_labels(y, 3, 10).tolist() == [[3, 1, 2]] * 2
    assert partition.shift_labels(y, torch.tensor([[0], [1]]), 10).tolist() == [[0, 8, 9], [1, 9, 0]]
    with pytest.raises(ValueError, match="classes=0: must be an integer >= 1"):
        partition.shift_labels(y, 1, 0)


def test_a_partition_is_apart_from_its_sources():
    rows, clusters = np.arange(3), np.zeros(1, dtype=np.int64)
    p = Partition((rows,), clusters, [0], [0], classes=2)
    rows[0] = clusters[0] = 7
    assert p.indices[0].tolist() == [0, 1, 2] and p.clusters.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": ()}, "indices=(): must be rows of at least one client"),
        ({"indices": ([0, 2], [2, 3])}, "indices=[2]: must be disjoint"),
        ({"indices": ([1, 0], [2])}, "indices[0]=[0]: must be distinct row numbers >= 0 in increasing order"),
        ({"indices": ([0, 0], [2])}, "indices[0]=[0]: must be distinct row numbers"),
        ({"indices": ([0], [-1])}, "indices[1]=[-1]: must be distinct row numbers >= 0"),
        ({"indices": ([0], [1.5])}, "indices[1]=float64 (1,): must be one-dimensional integers"),
        ({"clusters": [0]}, "clusters.shape=(1,): must be (2,), one value a client"),
        ({"clusters": [0, 2]}, "clusters=[2]: must be in [0, 1]"),
        ({"clusters": [-1, 0]}, "clusters=[-1]: must be in [0, 1]"),
        ({"quarter_turns": [0, 4]}, "quarter_turns=[4]: must be in [0, 3]"),
        ({"quarter_turns": [0, 0, 0]}, "quarter_turns.shape=(3,): must be (2,)"),
        ({"label_shift": [0, 3]}, "label_shift=[3]: must be in [0, 2]"),
        ({"label_shift": [[0, 0]]}, "label_shift=int64 (1, 2): must be one-dimensional integers"),
        ({"classes": 0}, "classes=0: must be an integer >= 1"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    right = {"indices": ([0, 1], [2]), "clusters": [0, 1], "quarter_turns": [0, 3], "label_shift": [2, 0], "classes": 3}
    Partition(**right)
    with pytest.raises(ValueError, match=re.escape(message)):
        Partition(**(right | change))


@pytest.mark.parametrize("name", DEALERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n_clients=0: must be an integer in [1, "),
        ({"n": 501}, "n_clients=501: must be an integer in [1, "),
        ({"n": 2.0}, "n_clients=2.0: must be an integer in [1, "),
        ({"n": True}, "n_clients=True: must be an integer in [1, "),
        ({"seed": -1}, "seed=-1: must be an integer >= 0"),
        ({"classes": 9}, "labels=9: must be < classes=9"),
        ({"classes": 0}, "classes=0: must be an integer >= 1"),
        ({"y": []}, "labels=float64 (0,): must be integers of shape (rows,), rows >= 1"),
        ({"y": [0.5, 1.0]}, "labels=float64 (2,): must be integers of shape (rows,)"),
        ({"y": [[0, 1]]}, "labels=int64 (1, 2): must be integers of shape (rows,)"),
        ({"y": [0, -1]}, "labels=-1: must be >= 0"),
    ],
)
def test_a_bad_argument_of_any_partition_is_named(name, change, message):
    arguments = {"y": LABELS, "n": 10} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        DEALERS[name](arguments.pop("y"), arguments.pop("n"), **arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("iid", {"samples": 0}, "samples=0: must be an integer in [1, 50] (500 rows for 10 clients)"),
        ("rotation", {"samples": 51}, "samples=51: must be an integer in [1, 50] (500 rows for 10 clients)"),
        ("rotation", {"n_clusters": 0}, "n_clusters=0: must be an integer in [1, 10]"),
        ("private_label", {"n_clusters": 11}, "n_clusters=11: must be an integer in [1, 10]"),
        ("rotation", {"cluster_sizes": [5, 5]}, "cluster_sizes=[5, 5]: must be 4 numbers, one a cluster"),
        ("rotation", {"cluster_sizes": [2, 2, 2, 3]}, "cluster_sizes=[2, 2, 2, 3]: must be numbers that sum to"),
        ("private_label", {"cluster_sizes": [0, 2, 4, 4]}, "cluster_sizes=0: must be an integer >= 1"),
        ("label_groups", {"cluster_sizes": [2, 2, 6]}, "cluster_sizes=[2, 2, 6]: must be 5 numbers"),
        ("label_groups", {"classes": 12}, "classes=12: must be a multiple of n_clusters=5"),
        ("dirichlet", {"min_samples": -1}, "min_samples=-1: must be an integer in [0, 50]"),
        ("dirichlet", {"min_samples": 51}, "min_samples=51: must be an integer in [0, 50]"),
        ("label_skew", {"classes_per_client": 0}, "classes_per_client=0: must be an integer in [1, 500]"),
        ("label_skew", {"classes_per_client": 51}, "n_clients=10: must be an integer in [1, 9]"),
    ],
)
def test_a_bad_argument_of_one_partition_is_named(name, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DEALERS[name](LABELS, 10, **change)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), 1e7, True, "1"])
def test_a_bad_alpha_is_named(alpha):
    with pytest.raises(ValueError, match=re.escape(f"alpha={alpha}: must be in (0, 1e+06]")):
        partition.dirichlet(LABELS, 10, alpha=alpha)


def test_the_map_of_a_partition_has_dots_in_proportion_and_lines_between_clusters():
    p = partition.private_label(LABELS, 10, cluster_sizes=[1, 2, 3, 4])
    counts = p.label_counts(LABELS)
    counts[0, 3] = 0
    _, ax = figures.new()
    figures.partition_map(ax, counts, p.clusters)
    dots = ax.collections[0]
    client, label = dots.get_offsets().T.astype(int)
    area = dots.get_sizes() / counts[client, label]
    assert len(client) == (counts > 0).sum() and np.allclose(area, area[0])
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "class 0 on top"
    lines = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata())]
    assert lines == [0.5, 2.5, 5.5]
    (top,) = ax.child_axes
    names = {text.get_text(): x for x, text in zip(top.get_xticks(), top.get_xticklabels(), strict=True)}
    assert names == {"0": 0, "1": 1.5, "2": 4, "3": 7.5}, "each name in the middle of its cluster"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("client", "class")
    for handle, text in zip(ax.get_legend().legend_handles, ax.get_legend().get_texts(), strict=True):
        assert handle.get_markersize() ** 2 == pytest.approx(area[0] * float(text.get_text()))
    with pytest.raises(ValueError, match="shape"):
        figures.partition_map(ax, counts, p.clusters[1:])
