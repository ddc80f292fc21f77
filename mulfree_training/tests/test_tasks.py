"""Trainings: repeatable, resumable, the same on two processes, and records that mean what they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F

from common import ranks
from common.data import load
from common.trials import TrialStore
from mulfree_training.networks.build import build
from mulfree_training.tasks import images, language, stream, training
from mulfree_training.tasks.images import images_of
from mulfree_training.tasks.text import UNKNOWN, Characters, Text, read
from mulfree_training.tasks.training import epoch_order, lr_factor
from mulfree_training.tests.trials import IMAGES, LANGUAGE, QUIET, config, curve, pictures, run, sound, write

ROOT = Path(__file__).parents[2]
ARMS = {
    "standard": [],
    "full": ["arithmetic=full"],
    "full_exact": ["arithmetic=full", "arithmetic.derivative=exact", "arithmetic.host_scalars=pam"],
    "perturbed": ["arithmetic=perturbed"],
    "power_of_two": ["arithmetic=power_of_two"],
    "adder": ["arithmetic=adder"],
}
TASKS = {"images": IMAGES, "language": LANGUAGE}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_it_learns(task: str, arm: str, tmp_path: Path) -> None:
    rows, made = run(tmp_path, config(*TASKS[task], *ARMS[arm]))
    losses = [x for (x,) in curve(made)]
    assert len(losses) == (74 if task == "images" else 12)
    assert sum(losses[-4:]) < sum(losses[:4]) - 4 * 0.2 and losses[-1] == rows[0]["train_loss"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_two_runs_are_bit_equal_and_another_seed_is_not(task: str, arm: str, tmp_path: Path) -> None:
    chosen = [*TASKS[task], *ARMS[arm], "max_steps=4"]
    first, a = run(tmp_path / "a", config(*chosen, "seed=3"))
    again, b = run(tmp_path / "b", config(*chosen, "seed=3"))
    assert sound(first) == sound(again) and curve(a) == curve(b) and len(curve(a)) == 4
    other, _ = run(tmp_path / "c", config(*chosen, "seed=4"))
    assert other[0]["validation_nll"] != first[0]["validation_nll"]


@pytest.mark.parametrize("task", TASKS)
def test_arithmetics_differ_but_start_alike(task: str, tmp_path: Path) -> None:
    found, losses = {}, {}
    for arm in ("standard", "perturbed", "full"):
        rows, made = run(tmp_path / arm, config(*TASKS[task], *ARMS[arm], "max_steps=3"))
        found[arm], losses[arm] = rows[0]["validation_nll"], [x for (x,) in curve(made)]
    assert losses["perturbed"] == pytest.approx(losses["standard"], rel=1e-4)
    assert losses["full"] == pytest.approx(losses["standard"], rel=0.2)
    assert losses["full"] != pytest.approx(losses["standard"], rel=1e-4)
    assert len(set(found.values())) == 3  # in float64, so that one unit in the last place of the weights is seen


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ["standard", "full"])
def test_a_seed_does_not_depend_on_its_neighbours(task: str, arm: str, tmp_path: Path) -> None:
    chosen = [*TASKS[task], *ARMS[arm], "max_steps=5"]
    both, _ = run(tmp_path / "a", config(*chosen, "seed=3", "n_seeds=2"))
    alone, _ = run(tmp_path / "b", config(*chosen, "seed=4"))
    assert sound(both)[1] == sound(alone)[0] and [row["seed"] for row in both] == [3, 4]


class Killed(Exception):
    """Stands for a kill."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Checkpoints at every logged step; the process dies after the one at `step`."""
    save = training.save_checkpoint

    def and_die(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if options["step"] == step:
            raise Killed

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "save_checkpoint", and_die)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ["standard", "full", "adder"])
@pytest.mark.parametrize("step", [1, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(
    task: str, arm: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(*TASKS[task], *ARMS[arm], "n_seeds=2", "task.accumulate=2", "max_steps=9")
    whole, a = run(tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        killed_at(patch, step)
        with pytest.raises(Killed):
            run(tmp_path / "killed", chosen)
    rest, b = run(tmp_path / "killed", chosen)
    assert sound(rest) == sound(whole) and curve(a) == curve(b)
    assert len(curve(b)) == 9 and rest[0]["train_s"] > 0
    assert b._history[9]["train/loss"] == [row["train_loss"] for row in rest]


def test_a_checkpoint_is_written_by_all_processes_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ranks, "agree", lambda answer, question: asked.append((answer, question)))
    monkeypatch.setattr(training, "save_checkpoint", lambda *a, **o: pytest.fail("rank 0 said no"))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    run(tmp_path, config(*IMAGES, "max_steps=3"))
    assert asked == [(True, "checkpoint")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_give_the_losses_of_one(task: str, tmp_path: Path) -> None:
    own = [*TASKS[task], *ARMS["full"], "n_seeds=2", "max_steps=6"]
    # one process with as many parts in all: sums of piecewise affine products do not distribute over other ones
    _, one = run(tmp_path / "one", config(*own, "task.accumulate=4"))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mulfree_training.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", *launcher, *own, "task.accumulate=2", f"results_dir={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = (tmp_path / "mulfree_training" / "trials").iterdir()
    two = TrialStore(tmp_path / "mulfree_training").load(record.name)
    assert two is not None and two.provenance["processes"] == 2
    # AdamW divides by the gradient's size, so that a rounding moves a weight by at most lr * eps a term, 6 times
    bound = 4 * 64 * 6 * torch.finfo(torch.float32).eps
    losses = [loss for step in curve(one) for loss in step]
    assert len(losses) == 12 == len(set(losses))
    assert two.history["train/loss"].dropna().tolist() == pytest.approx(losses, rel=bound)


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing_but_rounding(task: str, tmp_path: Path) -> None:
    whole, a = run(tmp_path / "a", config(*TASKS[task], "max_steps=5"))
    parts, b = run(tmp_path / "b", config(*TASKS[task], "max_steps=5", "task.accumulate=4"))
    assert [x for (x,) in curve(b)] == pytest.approx([x for (x,) in curve(a)], rel=1e-4)
    assert parts[0]["validation_nll"] == pytest.approx(whole[0]["validation_nll"], rel=1e-4)


def test_the_loop_is_plain_adamw_on_plain_cross_entropy(tmp_path: Path) -> None:
    """Losses and accuracy of float32 beside a loop written out by hand."""
    chosen = config(*IMAGES, "max_steps=6", "task.evaluate=test")
    rows, made = run(tmp_path, chosen)
    splits, model, c = load(chosen.data), build(chosen.model, 0), chosen.optimizer
    x, y = images_of(splits["train"], chosen)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    losses, steps = [], 6
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.002 * lr_factor(step, steps, c)
        batch = epoch_order(0, 0, len(x))[32 * step :][:32]
        loss = F.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [x for (x,) in curve(made)] == pytest.approx(losses, rel=1e-5)
    x, y = images_of(splits["test"], chosen)
    with torch.no_grad():
        logits = model.eval()(x)
    assert rows[0]["test_accuracy"] == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()), abs=0.3)
    assert rows[0]["test_nll"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)


def test_what_a_record_holds(tmp_path: Path) -> None:
    common = {"seed", "diverged", "temperature", "train_loss", "train_s"}
    for task, metrics in (("images", ("accuracy", "nll", "nll_tempered")), ("language", ("nll", "nll_tempered"))):
        for split in ("validation", "test"):
            chosen = config(*TASKS[task], f"task.evaluate={split}", "max_steps=2", "n_seeds=2")
            rows, made = run(tmp_path / task / split, chosen)
            assert set(rows[0]) == common | {f"{split}_{m}" for m in metrics}
            assert json.loads(json.dumps(rows)) == rows and not rows[0]["diverged"]
            assert curve(made, f"{split}/nll") == [[row[f"{split}_nll"] for row in rows]]
        chosen = config(*TASKS[task], "task.evaluate=test", "data.validation=0", "max_steps=2")
        rows, _ = run(tmp_path / task / "none", chosen)
        assert rows[0]["temperature"] == 1 and rows[0]["test_nll"] == rows[0]["test_nll_tempered"]


@pytest.mark.parametrize("task", TASKS)
def test_divergence_is_a_recorded_result(task: str, tmp_path: Path) -> None:
    rows, made = run(tmp_path, config(*TASKS[task], "optimizer.lr=1e30", "optimizer.warmup=0"))
    assert rows[0]["diverged"] is True and not math.isfinite(rows[0]["validation_nll"])
    assert len(curve(made)) < 12  # and it stops there


def test_digits_are_images_between_0_and_1_and_rows_are_none() -> None:
    chosen = config(*IMAGES)
    x, y = images_of(load(chosen.data)["train"], chosen)
    assert x.shape[1:] == (1, 8, 8) and x.min() == 0 and x.max() == 1 and y.unique().tolist() == list(range(10))
    wine = config(*IMAGES, "data=wine")
    with pytest.raises(ValueError, match="data.name=wine: must hold images, these rows have 13 values"):
        images_of(load(wine.data)["train"], wine)


def test_crops_are_drawn_by_seed_and_step_and_images_are_resized(tmp_path: Path) -> None:
    chosen = config(*IMAGES, "task.augment=crop", "task.upsample=12", "model.image_size=12")
    memory = images.Memory(chosen, load(chosen.data))
    first, again, next_step, other = memory(0, 3), memory(0, 3), memory(0, 4), memory(1, 3)
    assert torch.equal(first.inputs[0], again.inputs[0]) and torch.equal(first.target, again.target)
    assert first.inputs[0].shape == (32, 1, 12, 12)
    assert not torch.equal(first.inputs[0], next_step.inputs[0]) and not torch.equal(first.target, other.target)
    plain = images.Memory(config(*IMAGES), load(chosen.data))(0, 3)
    assert torch.equal(plain.target, first.target) and plain.inputs[0].shape == (32, 1, 8, 8)
    count = memory.steps_per_epoch
    assert count == len(memory.x) // 32 and not torch.equal(memory(0, count).target, memory(0, 0).target)
    rows, _ = run(tmp_path, config(*IMAGES, "task.augment=crop", "task.upsample=12", "model.image_size=12"))
    assert math.isfinite(rows[0]["validation_nll"])


def test_characters_are_the_most_frequent_and_the_rest_is_unknown() -> None:
    known = Characters(["aaab", "bbcc"], 3)
    assert known.encode(["abcz", "b"]).tolist() == [1, 2, UNKNOWN, UNKNOWN, 2]
    assert known.encode(["c"]).dtype is torch.int32 and Characters(["ba"], 9).encode(["ab"]).tolist() == [1, 2]


def test_windows_are_a_pure_function_of_seed_and_step() -> None:
    source = Text({"train": torch.arange(1000, dtype=torch.int32), "test": torch.arange(100)}, 16)
    first = source.batch(3, 7, 8)
    torch.manual_seed(99)
    assert torch.equal(source.batch(3, 7, 8), first) and first.dtype is torch.int64 and first.shape == (8, 17)
    assert torch.equal(first - first[:, :1], torch.arange(17).expand(8, 17))
    for other in (source.batch(4, 7, 8), source.batch(3, 8, 8)):
        assert not torch.equal(other, first)
    starts = torch.cat([source.batch(0, step, 64)[:, 0] for step in range(200)])
    assert starts.min() == 0 and starts.max() == 1000 - 17  # every window, and none beyond the end
    windows = source.evaluation("test", 64)
    assert windows.shape == (4, 17) and windows[:, 0].tolist() == [0, 16, 32, 48]
    assert source.evaluation("test", 10**9).shape == (6, 17) and source.evaluation("test", 1).shape == (1, 17)


def test_max_steps_also_cuts_the_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    plain = Text.evaluation
    monkeypatch.setattr(Text, "evaluation", lambda self, name, n: asked.append(n) or plain(self, name, n))
    monkeypatch.setattr(language, "SMALL", 100)
    for extra in (["max_steps=2"], ["task.steps=2"]):
        _, made = run(tmp_path / extra[0], config(*LANGUAGE, *extra))
        assert len(curve(made)) == 2
    assert asked == [100, 512]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*IMAGES, "data.test=0", "task.evaluate=test"], "task.evaluate=test: data.test=0 leaves no test split"),
        ([*IMAGES, "task.batch_size=5000"], "task.batch_size=5000: must be <= [0-9]+, the images to train on"),
        ([*IMAGES, "task.accumulate=3"], "task.batch_size=32: must be a multiple of task.accumulate=3 times 1 process"),
        ([*IMAGES, "data=wine", "task.batch_size=8"], "data.name=wine: must hold images"),
        (
            [*IMAGES, "task.augment=deit", "task.upsample=8"],
            "task.augment=deit: must be none or crop for data.name=digits",
        ),
        (
            [*IMAGES, "task.augment=deit", "task.upsample=8", "arithmetic=loss"],
            "task.augment=deit: must be none or crop for loss in arithmetic.scope",
        ),
        ([*LANGUAGE, "data.test=0", "task.evaluate=test"], "task.evaluate=test: data.test=0 leaves no test split"),
        ([*LANGUAGE, "model.context=10000000"], "model.context=10000000: must be < [0-9]+, the tokens of the shortest"),
        (
            [*LANGUAGE, "task.accumulate=3"],
            "task.batch_size=8: must be a multiple of task.accumulate=3 times 1 process",
        ),
        ([*LANGUAGE, "task.vocabulary=tokenizer"], "model.vocab=96: must be > [0-9]+, the largest token of the text"),
        ([*LANGUAGE, "task.vocabulary=tokenizer", "data.tokenizer=nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, config(*overrides))


def test_bytes_are_read_where_no_tokenizer_is_named() -> None:
    chosen = config(*LANGUAGE, "task.vocabulary=tokenizer", "model.vocab=256")
    text = bytes(read(chosen).streams["train"].tolist()).decode()
    first = load(chosen.data)["train"][0]["text"]
    assert text.startswith(first) and len(first) > 10


def test_images_of_one_size_stay_in_memory_and_others_are_read_one_by_one() -> None:
    chosen = config(*QUIET, "data=cifar10", "data.path=x", "model.in_channels=3")
    assert not stream.is_streamed(chosen, pictures(20)) and stream.is_streamed(chosen, pictures(20, sizes=True))
    deit = config(*QUIET, "data=cifar10", "data.path=x", "task.augment=deit", "task.upsample=16")
    assert stream.is_streamed(deit, pictures(20))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.in_channels=3"], "task.upsample=null: must be given, the images of cifar10 differ in size"),
        (["task.upsample=16"], r"model.in_channels=1: must be 3, with as many of data.mean="),
    ],
)
def test_what_does_not_fit_images_of_any_size_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", train=pictures(40, sizes=True), test=pictures(10, sizes=True))
    own = [*QUIET, "data=cifar10", f"data.path={folder}", "task.batch_size=8"]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "trial", config(*own, *overrides))
