"""Batches are pure functions of seed and step, every sample comes once an epoch, and shards partition a batch."""

import pytest
import torch

from rotational_optimizers.tasks.batches import (
    SampleBatches,
    Shard,
    TokenBatches,
    eval_samples,
    eval_tokens,
    generator,
)
from rotational_optimizers.tasks.sources import crop_and_flip

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
