"""Batches are pure functions of seed and step, every sample comes once an epoch, and shards partition a batch."""

import itertools

import pytest
import torch

from common.data.augment import crop_and_flip
from common.data.pairs import END, collate
from common.models.translation import TranslationTransformer
from common.streams import generator
from rotational_optimizers.config import NetworkTaskConfig
from rotational_optimizers.tasks.batches import (
    SampleBatches,
    Shard,
    TokenBatches,
    check_parts,
    eval_samples,
    eval_tokens,
)
from rotational_optimizers.tasks.network import losses
from rotational_optimizers.tasks.stream import _Order

X = torch.arange(40.0).view(40, 1, 1)
Y = torch.arange(40)


def test_a_seeds_batches_do_not_depend_on_its_companions() -> None:
    together = SampleBatches(X, Y, [3, 7], 5, 20)
    alone = SampleBatches(X, Y, [7], 5, 20)
    for step in (0, 3, 4, 9):
        assert torch.equal(together(step)[1][1], alone(step)[1][0])
        assert torch.equal(together(step)[0][:, 1:], alone(step)[0])


def test_batches_resume_at_any_step() -> None:
    running, fresh = SampleBatches(X, Y, [1], 5, 20), SampleBatches(X, Y, [1], 5, 20)
    for step in range(7):
        last = running(step)
    assert torch.equal(fresh(6)[1], last[1])


def test_every_sample_of_the_subset_comes_once_an_epoch_in_a_new_order() -> None:
    batches = SampleBatches(X, Y, [1], 5, 20)
    epochs = [torch.cat([batches(4 * e + i)[1][0] for i in range(4)]) for e in range(2)]
    assert len(epochs[0].unique()) == 20
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(epochs[0], epochs[1])


def test_inputs_belong_to_their_labels() -> None:
    x, y = SampleBatches(X, Y, [0, 1], 8)(2)
    assert torch.equal(x.squeeze(-1).T.long(), y)  # X holds its own index


def test_seeds_draw_different_subsets() -> None:
    batches = SampleBatches(X, Y, [0, 1], 5, 20)
    assert set(batches.subset[0].tolist()) != set(batches.subset[1].tolist())


def test_shards_partition_the_batch() -> None:
    whole = SampleBatches(X, Y, [1], 6)(0)[1]
    parts = [SampleBatches(X, Y, [1], 6, shard=Shard(rank, 2))(0)[1] for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1).sort().values, whole.sort().values)


@pytest.mark.parametrize(("batch_size", "subset", "word"), [(21, 20, "batch_size"), (5, 41, "train_samples")])
def test_too_large_requests_name_key_value_and_range(batch_size: int, subset: int, word: str) -> None:
    with pytest.raises(ValueError, match=f"task.{word}=.*must be"):
        SampleBatches(X, Y, [0], batch_size, subset)


def test_targets_are_the_next_tokens() -> None:
    x, y = TokenBatches(torch.arange(100), [0, 1], 4, 10)(3)
    assert x.shape == y.shape == (2, 4, 10)
    assert torch.equal(x + 1, y)


def test_a_context_longer_than_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="model.context=10"):
        TokenBatches(torch.arange(10), [0], 1, 10)


def test_evaluation_reads_every_sample_once_in_order() -> None:
    labels = torch.cat([y for _, y in eval_samples(X, Y, 2, 7)], 1)
    assert torch.equal(labels, Y.expand(2, -1))
    inputs = torch.cat([x for x, _ in eval_tokens(torch.arange(41), 1, 8, 2)], 1)
    assert torch.equal(inputs.flatten(), torch.arange(40))


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    image = torch.arange(1.0, 65).view(1, 1, 8, 8)
    seen = set()
    for seed in range(60):
        (out,) = crop_and_flip(image, torch.Generator().manual_seed(seed))
        inner = out[0][out[0] > 0]
        assert set(inner.tolist()) <= set(range(1, 65)) and len(inner.unique()) == len(inner)
        row = next(r[r > 0] for r in out[0] if (r > 0).any())
        seen.add(bool((row.diff() > 0).all()))
    assert seen == {True, False}  # both orientations occur


def test_streams_of_a_seed_are_unrelated() -> None:
    draws = {
        tuple(torch.randperm(20, generator=generator(s, t, i)).tolist()) for s in (0, 1) for t in (0, 1) for i in (0, 1)
    }
    assert len(draws) == 8


@pytest.mark.parametrize(("size", "parts", "world"), [(6, 4, 1), (6, 1, 4), (8, 4, 4)])
def test_batches_that_do_not_split_evenly_are_refused(size: int, parts: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"task.batch_size={size}: must be a multiple of {parts * world}"):
        check_parts(size, parts, world)
    check_parts(parts * world, parts, world)


def order(seeds: list[int], shard: Shard | None = None, parts: int = 1, size: int = 20) -> _Order:
    return _Order(23, size, seeds, NetworkTaskConfig(batch_size=4, accumulate=parts, steps=12), shard or Shard())


def test_streamed_images_come_once_an_epoch_from_the_seeds_own_subset() -> None:
    plan = order([3])
    rows = [[row for items in plan.step(step) for row, _ in items] for step in range(10)]
    first, second = (sorted(itertools.chain(*rows[i : i + 5])) for i in (0, 5))
    assert first == second == sorted(plan.subsets[0].tolist()) and len(set(first)) == 20
    assert rows[:5] != rows[5:]


def test_streamed_images_do_not_depend_on_companions_resumption_processes_or_parts() -> None:
    whole = [next(iter(order([3]).step(step))) for step in range(12)]
    assert [items[4:] for items in order([7, 3]).after(0)] == whole
    assert list(order([3]).after(5)) == whole[5:]
    shards = [[item for items in order([3], Shard(rank, 2), 2).step(6) for item in items] for rank in (0, 1)]
    assert sorted(shards[0] + shards[1]) == sorted(whole[6])
    crops = [seed for items in whole for _, seed in items]
    assert len(set(crops)) == len(crops)


PAIRS = [([10 + i] * (1 + i % 4) + [END], [20 + i] * (1 + i % 3) + [END]) for i in range(5)]


def test_padding_company_and_micro_batches_do_not_change_the_loss_of_a_sentence() -> None:
    torch.manual_seed(0)
    model = TranslationTransformer([5], 40, 40, 8, 8, 1, 2, dropout=0.0).eval()
    alone = []
    for pair in PAIRS:
        batch = collate([[pair]])
        alone.append(losses(model(*batch.inputs), batch.targets, batch.real) * batch.real)
    real = sum(len(target) for _, target in PAIRS)
    together = collate([PAIRS], multiple=4)
    assert together.targets.shape[1] == 8 and together.real is not None and together.real.item() == real
    expected, eps = torch.stack(alone).sum() / real, torch.finfo(torch.float32).eps
    loss = losses(model(*together.inputs), together.targets, together.real)
    assert torch.isclose(loss, expected, rtol=100 * eps)
    parts = [part.chunk(4, 1) for part in (*together.inputs, together.targets)]
    split = [
        losses(model(source, before), target, together.real / 4) for source, before, target in zip(*parts, strict=True)
    ]
    assert torch.isclose(torch.stack(split).mean(), expected, rtol=100 * eps)
