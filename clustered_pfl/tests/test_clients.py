"""Who holds which rows, how they are seen, batched and tested, compared with the partition itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clustered_pfl.config import AttackConfig, ImagesConfig, PartitionConfig
from clustered_pfl.tasks.clients import AUGMENT, DEAL, Clients, Split, deal, read
from clustered_pfl.tests.trials import DIGITS, config
from common.data import DataConfig, load, partition
from common.data.augment import crop_and_flip
from common.streams import generator, key

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return read(config(ImagesConfig()), CPU)


def clients(
    splits: dict[str, Split], seeds=(0,), *, attack: AttackConfig | None = None, dealt: dict | None = None, **task
) -> Clients:  # type: ignore[no-untyped-def]
    values = config(
        ImagesConfig(**task),
        attack=attack or AttackConfig(),
        partition=PartitionConfig(**{"n_clients": 8, "samples": 20, **(dealt or {})}),
    )
    return Clients(values, splits, list(seeds))


def test_digits_are_square_images_scaled_by_one_mean_and_deviation(splits: dict[str, Split]) -> None:
    raw = load(DataConfig(**DIGITS))
    train = np.array(raw["train"]["x"], dtype=np.float32)
    assert set(splits) == {"train", "validation", "test"}
    for name, split in splits.items():
        expected = (np.array(raw[name]["x"], dtype=np.float32) - train.mean()) / train.std(ddof=1)
        assert split.x.shape == (len(raw[name]), 1, 8, 8) and split.x.dtype == torch.float32
        np.testing.assert_allclose(split.x.flatten(1).numpy(), expected, rtol=1e-4, atol=1e-5)
        assert split.y.tolist() == raw[name]["y"]


def test_rows_that_are_no_square_image_are_refused() -> None:
    wine = DataConfig(name="wine", classes=3)
    with pytest.raises(ValueError, match=r"data=wine: 13 values a row, must be a square image"):
        read(config(ImagesConfig(), data=wine), CPU)


@pytest.mark.parametrize("kind", ["rotation", "private_label", "label_groups"])
def test_a_client_sees_its_rows_as_the_partition_says(splits: dict[str, Split], kind: str) -> None:
    shape = {"kind": kind, "n_clusters": 5 if kind == "label_groups" else 4, "n_clients": 10}
    found = clients(splits, seeds=(3, 4), dealt=shape, batch_size=1000)
    train = splits["train"]
    x, y = found.batch(0)  # full batches: every row once
    assert x.shape == (2, 10, 20, 1, 8, 8) and y.shape == (2, 10, 20)
    for r, seed in enumerate((3, 4)):
        how = {"n_clusters": shape["n_clusters"], "samples": 20, "classes": 10, "seed": key(seed, DEAL, 0)}
        dealt = getattr(partition, kind)(train.y, 10, **how)
        assert found.clusters.tolist() == dealt.clusters.tolist()
        for i, rows in enumerate(dealt.indices):
            images = partition.turn(train.x[rows], int(dealt.quarter_turns[i])).flatten(1)
            labels = partition.shift_labels(train.y[rows], int(dealt.label_shift[i]), 10)
            mine = sorted(zip(images.tolist(), labels.tolist(), strict=True))
            seen = sorted(zip(x[r, i].flatten(1).tolist(), y[r, i].tolist(), strict=True))
            assert seen == mine
        assert found.label_counts == dealt.label_counts(train.y).tolist() or r == 1
    shifted = {"rotation": 0, "private_label": 3, "label_groups": 0}[kind]
    assert int(found.shift.max()) == shifted and int(found.turns.max()) == (3 if kind == "rotation" else 0)


def test_unequal_clusters(splits: dict[str, Split]) -> None:
    found = clients(splits, dealt={"cluster_sizes": [1, 2, 2, 3]})
    assert found.clusters.tolist() == [0, 1, 1, 2, 2, 3, 3, 3]


def test_where_clients_hold_unlike_many_rows_all_use_as_many_as_the_least(splits: dict[str, Split]) -> None:
    shape = {"kind": "label_groups", "n_clusters": 5, "n_clients": 10, "samples": None}
    found = clients(splits, dealt=shape, batch_size=1000)
    dealt = deal(found.config, splits["train"].y, key(0, DEAL, 0))
    assert found.samples == min(dealt.sizes) < max(dealt.sizes)
    for mine, all_ in zip(found.rows[0], dealt.indices, strict=True):
        assert mine.tolist() == all_[: found.samples].tolist()


def numbers(found: Clients, step: int, kept: float = 1.0) -> torch.Tensor:
    """Row numbers (R, N, B) of a batch, read from images that hold their own number."""
    x, _ = found.batch(step, kept)
    return x[..., 0, 0, 0].long()


@pytest.fixture(scope="module")
def numbered(splits: dict[str, Split]) -> dict[str, Split]:
    x = torch.arange(len(splits["train"].x)).float()[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    return {**splits, "train": Split(x, splits["train"].y)}


def test_an_epoch_draws_without_replacement_and_anew(numbered: dict[str, Split]) -> None:
    found = clients(numbered, batch_size=6)  # of 20 rows: three batches
    epochs = [torch.cat([numbers(found, 3 * e + s) for s in range(3)], -1)[0] for e in range(2)]
    for epoch in epochs:
        for i, rows in enumerate(epoch):
            assert len(set(rows.tolist())) == 18 and set(rows.tolist()) <= set(found.rows[0, i].tolist())
    assert not torch.equal(epochs[0], epochs[1])
    assert found.steps_per_epoch == 3 and found.batch_size == 6


def test_a_batch_is_a_function_of_the_seed_and_the_step(numbered: dict[str, Split]) -> None:
    together = clients(numbered, seeds=(5, 6, 7), batch_size=6, redraw=True)
    alone = clients(numbered, seeds=(6,), batch_size=6, redraw=True)
    forward = [numbers(together, step)[1] for step in range(7)]
    for step in (6, 2, 0, 5):  # in any order, as after a checkpoint
        assert torch.equal(numbers(alone, step)[0], forward[step])
    assert not torch.equal(forward[0], numbers(clients(numbered, seeds=(5,), batch_size=6), 0)[0])


def test_redrawing_deals_all_rows_anew_every_epoch(numbered: dict[str, Split]) -> None:
    found = clients(numbered, batch_size=20, redraw=True)
    for epoch in range(3):
        dealt = deal(found.config, numbered["train"].y, key(0, DEAL, epoch))
        assert [sorted(rows.tolist()) for rows in numbers(found, epoch)[0]] == [i.tolist() for i in dealt.indices]
    fixed = clients(numbered, batch_size=20)
    first, later = (numbers(fixed, step)[0].sort(-1).values for step in (0, 2))
    assert torch.equal(first, later)


@pytest.mark.parametrize(("batch_size", "sizes"), [(6, [6, 6, 6]), (1000, [16])])
def test_rows_that_are_kept_back_are_in_no_batch(numbered: dict[str, Split], batch_size: int, sizes: list[int]) -> None:
    """Of 20 rows 16 train: the third batch of six is filled up from the epoch's beginning."""
    found = clients(numbered, batch_size=batch_size)
    drawn = [numbers(found, step, kept=0.8)[0] for step in range(len(sizes))]
    assert [part.shape[-1] for part in drawn] == sizes
    for i, rows in enumerate(torch.cat(drawn, -1)):
        assert set(rows.tolist()) == set(found.rows[0, i, :16].tolist())


def test_augmentation_shifts_and_mirrors_each_seed_by_its_own_draws(splits: dict[str, Split]) -> None:
    plain = clients(splits, seeds=(1, 2), batch_size=5)
    moved = clients(splits, seeds=(1, 2), batch_size=5, augment=True)
    for step in (0, 1):
        (x, y), (z, labels) = plain.batch(step), moved.batch(step)
        assert torch.equal(y, labels) and z.shape == x.shape
        for r, seed in enumerate((1, 2)):
            expected = crop_and_flip(x[r].flatten(0, 1), generator(seed, AUGMENT, step))
            assert torch.equal(z[r].flatten(0, 1), expected)
    repeated = clients(splits, seeds=(1, 2), batch_size=5, augment=True, repeat_noise=True)
    expected = crop_and_flip(plain.batch(1)[0][0].flatten(0, 1), generator(1, AUGMENT, 0))
    assert torch.equal(repeated.batch(1)[0][0].flatten(0, 1), expected)


def test_label_flippers_hold_honest_clients_rows_with_labels_turned_round(splits: dict[str, Split]) -> None:
    attack = AttackConfig("label_flip", 4)
    plain, hit = clients(splits, batch_size=7), clients(splits, batch_size=7, attack=attack)
    (x, y), (z, labels) = plain.batch(2), hit.batch(2)
    assert z.shape[1] == labels.shape[1] == 12
    assert torch.equal(z[:, :8], x) and torch.equal(labels[:, :8], y)
    copied = [0, 2, 4, 6]  # one in each cluster
    assert hit.clusters[copied].tolist() == [0, 1, 2, 3]
    assert torch.equal(z[:, 8:], x[:, copied]) and torch.equal(labels[:, 8:], 9 - y[:, copied])
    # attackers that send messages have no data
    assert clients(splits, batch_size=7, attack=AttackConfig("bit_flip", 4)).batch(2)[0].shape[1] == 8


@pytest.mark.parametrize("kind", ["rotation", "private_label", "label_groups"])
@pytest.mark.parametrize("own", [False, True])
def test_every_client_is_tested_on_its_rows_under_its_view(splits: dict[str, Split], kind: str, own: bool) -> None:
    k = 5 if kind == "label_groups" else 4
    found = clients(splits, dealt={"kind": kind, "n_clusters": k, "n_clients": 10}, own_test_share=own)
    test = splits["test"]
    rows = found.test_rows("test")
    for i in range(10):
        chosen = list(range(i, len(test.y), 10)) if own else list(range(len(test.y)))
        if kind == "label_groups":
            chosen = [j for j in chosen if int(test.y[j]) // 2 == i // 2]
        mine = rows[i].tolist()
        assert mine[: len(chosen)] == chosen and set(mine[len(chosen) :]) <= {-1}
        x, y = found.tested("test", rows[i : i + 1], slice(i, i + 1))
        turns, shift = int(found.turns[i]), int(found.shift[i])
        assert torch.equal(x[0, : len(chosen)], partition.turn(test.x[chosen], turns))
        assert y[0].tolist() == [(int(test.y[j]) + shift) % 10 for j in chosen] + [-1] * (len(mine) - len(chosen))
    assert rows.max() == len(test.y) - 1
    if own:
        dealt = rows[rows >= 0].tolist()
        assert len(set(dealt)) == len(dealt)
        assert kind == "label_groups" or len(dealt) == len(test.y)
    # several clients at once, as the evaluation asks for them
    x, y = found.tested("test", rows[2:7], slice(2, 7))
    for place, i in enumerate(range(2, 7)):
        one, label = found.tested("test", rows[i : i + 1], slice(i, i + 1))
        assert torch.equal(x[place], one[0]) and torch.equal(y[place], label[0])


def test_looking_at_test_rows_changes_no_image(splits: dict[str, Split]) -> None:
    before = splits["test"].x.clone()
    found = clients(splits, dealt={"kind": "rotation"})
    found.tested("test", found.test_rows("test"), slice(0, 8))
    assert torch.equal(splits["test"].x, before)


def test_too_many_rows_are_refused(splits: dict[str, Split]) -> None:
    with pytest.raises(ValueError, match="samples=1000"):
        clients(splits, dealt={"samples": 1000})
