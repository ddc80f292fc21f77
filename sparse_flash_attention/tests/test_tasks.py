"""Language trials: repeatable, resumable, the same on two processes, and records that mean what they say."""

from __future__ import annotations

import copy
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
from common.training import setup
from common.trials import TrialStore
from sparse_flash_attention.config import OptimizerConfig, TrialConfig
from sparse_flash_attention.tasks import language, text
from sparse_flash_attention.tasks.language import Losses, build, densities, evaluate, lr_factor
from sparse_flash_attention.tasks.text import Text, read
from sparse_flash_attention.tests.trials import SMALL, config, curve, run, text_folder, trial

ROOT = Path(__file__).parents[2]
ARMS = {
    "dense": [],
    "hash": ["attention=hash"],
    "random": ["attention=random"],
    "drop": ["attention=drop"],
    "reformer": ["attention=reformer", "attention.chunk=8"],
    "window": ["attention=window", "attention.window=8"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def small(folder: Path) -> Any:
    """Makes the config of a small trial."""
    data = ["data=openwebtext2", f"data.path={folder}", "data.validation=0.1", "data.test=0.1"]
    return lambda *overrides: config(*SMALL, *data, *overrides)


def sound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their times."""
    return [{k: v for k, v in row.items() if k != "train_s"} for row in rows]


@pytest.mark.parametrize("arm", ARMS)
def test_two_runs_are_bit_equal_and_another_seed_is_not(arm: str, small: Any, tmp_path: Path) -> None:
    first, a = run(tmp_path / "a", small(*ARMS[arm], "seed=3"))
    again, b = run(tmp_path / "b", small(*ARMS[arm], "seed=3"))
    assert sound(first) == sound(again) and curve(a) == curve(b) and len(curve(a)) == 20
    assert curve(a)[-1][0] < curve(a)[0][0] - 0.3  # it learns
    other, _ = run(tmp_path / "c", small(*ARMS[arm], "seed=4"))
    assert other[0]["validation_loss"] != first[0]["validation_loss"]


@pytest.mark.parametrize("arm", ["dense", "hash", "drop"])
def test_a_seed_does_not_depend_on_its_neighbours(arm: str, small: Any, tmp_path: Path) -> None:
    both, _ = run(tmp_path / "a", small(*ARMS[arm], "seed=3", "n_seeds=2"))
    alone, _ = run(tmp_path / "b", small(*ARMS[arm], "seed=4"))
    assert sound(both)[1] == sound(alone)[0] and [row["seed"] for row in both] == [3, 4]


class Killed(Exception):
    """Stands for a kill."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Checkpoints at every logged step; the process dies after the one at `step`."""
    save = language.save_checkpoint

    def and_die(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if options["step"] == step:
            raise Killed

    monkeypatch.setattr(language, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(language, "save_checkpoint", and_die)


@pytest.mark.parametrize("arm", ["dense", "hash", "random", "drop", "reformer"])
@pytest.mark.parametrize("step", [3, 7, 19])
def test_a_resumed_run_equals_the_uninterrupted_one(
    arm: str, step: int, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws of windows, buckets and dropped rows hang on the step, and what was read before the kill is kept."""
    chosen = small(*ARMS[arm], "n_seeds=2", "task.accumulate=2")
    whole, a = run(tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        killed_at(patch, step)
        with pytest.raises(Killed):
            run(tmp_path / "killed", chosen)
    rest, b = run(tmp_path / "killed", chosen)
    assert sound(rest) == sound(whole) and curve(a) == curve(b)
    assert all(0 < row["density_early"] <= 1 for row in rest)
    assert rest[0]["train_s"] > 0
    assert b._history[20]["train/loss"] == [row["train_loss"] for row in rest]


def test_a_checkpoint_is_written_by_all_processes_or_none(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(ranks, "agree", lambda answer, question: asked.append((answer, question)))
    monkeypatch.setattr(language, "save_checkpoint", lambda *a, **o: pytest.fail("rank 0 said no"))
    monkeypatch.setattr(language, "CHECKPOINT_SECONDS", -1.0)
    run(tmp_path, small("task.steps=3"))
    assert asked == [(True, "checkpoint")] * 2


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(folder: Path, small: Any, tmp_path: Path) -> None:
    data = ["data=openwebtext2", f"data.path={folder}", "data.validation=0.1", "data.test=0.1"]
    own = ["n_seeds=2", "task.accumulate=2"]
    _, one = run(tmp_path / "one", small(*own))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sparse_flash_attention.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-m", *launcher, *SMALL, *data, *own, f"results_dir={tmp_path}"]
    done = subprocess.run(
        words, cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = (tmp_path / "sparse_flash_attention" / "trials").iterdir()
    two = TrialStore(tmp_path / "sparse_flash_attention").load(record.name)
    assert two is not None and two.provenance["processes"] == 2
    # AdamW divides by the gradient's size, so that a rounding moves a weight by at most lr * eps a term, 20 times
    bound = 4 * 32 * 20 * torch.finfo(torch.float32).eps
    for metric, count in (("train/loss", 20), ("validation/loss", 1)):
        losses = [loss for step in curve(one, metric) for loss in step]
        assert len(losses) == 2 * count and len(set(losses)) == 2 * count
        assert two.history[metric].dropna().tolist() == pytest.approx(losses, rel=bound)


def test_accumulation_changes_nothing_but_rounding(small: Any, tmp_path: Path) -> None:
    whole, a = run(tmp_path / "a", small("task.steps=6"))
    parts, b = run(tmp_path / "b", small("task.steps=6", "task.accumulate=4"))
    flat = [x for (x,) in curve(a)]
    assert [x for (x,) in curve(b)] == pytest.approx(flat, rel=1e-4)
    assert parts[0]["validation_loss"] == pytest.approx(whole[0]["validation_loss"], rel=1e-4)


def test_the_loop_is_plain_adamw_on_plain_cross_entropy(small: Any, tmp_path: Path) -> None:
    """Losses of a dense model beside a loop written out by hand."""
    chosen = small("task.steps=6", "optimizer.clip_norm=0.5")
    _, made = run(tmp_path, chosen)
    model, data, c = build(chosen, 0), read(chosen), chosen.optimizer
    decayed = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "token" not in name and "position" not in name
    ]
    rest = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * lr_factor(step, 6, c)
        window = data.batch(0, step, 4)
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert [x for (x,) in curve(made)] == pytest.approx(losses, rel=1e-5)
    assert [x for (x,) in curve(made, "lr")] == [0.01 * lr_factor(step, 6, c) for step in range(6)]
    windows = data.evaluation(chosen.task.eval_tokens)
    with torch.no_grad():
        own = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()
    rows, _ = run(tmp_path / "again", copy.deepcopy(chosen))
    assert rows[0]["validation_loss"] == pytest.approx(own, rel=1e-4)


def test_lr_factor_is_one_cosine_cycle() -> None:
    c = OptimizerConfig(warmup=0.1, start=0.04, final=0.01)
    factors = [lr_factor(step, 101, c) for step in range(101)]
    for step, factor in enumerate(factors):
        if step < 10:
            wanted = 0.04 + 0.96 * (1 - math.cos(math.pi * step / 10)) / 2
        else:
            wanted = 0.01 + 0.99 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert factor == pytest.approx(wanted)
    assert factors[0] == 0.04 and factors[10] == 1.0 == max(factors) and factors[100] == pytest.approx(0.01)
    assert factors[5] == pytest.approx(0.52) and factors[55] == pytest.approx(0.505)
    assert lr_factor(0, 1, OptimizerConfig(warmup=0.0)) == OptimizerConfig().start
    assert all(0 < lr_factor(step, steps, c) <= 1 for steps in (1, 2, 3) for step in range(steps))


def test_windows_are_a_pure_function_of_seed_and_step() -> None:
    stream = torch.arange(1000, dtype=torch.int32)
    source = Text(stream, stream[:100], 16)
    first = source.batch(3, 7, 8)
    torch.manual_seed(99)
    source.batch(1, 1, 5)
    assert torch.equal(source.batch(3, 7, 8), first) and first.dtype is torch.int64 and first.shape == (8, 17)
    assert torch.equal(first - first[:, :1], torch.arange(17).expand(8, 17))  # consecutive tokens
    for other in (source.batch(4, 7, 8), source.batch(3, 8, 8)):
        assert not torch.equal(other, first)
    starts = torch.cat([source.batch(0, step, 64)[:, 0] for step in range(200)])
    assert starts.min() == 0 and starts.max() == 1000 - 17  # every window, and none beyond the end


def test_evaluation_windows_are_consecutive_and_share_a_border() -> None:
    stream = torch.arange(100, dtype=torch.int32)
    windows = Text(stream, stream, 16).evaluation(64)
    assert windows.shape == (4, 17) and windows[:, 0].tolist() == [0, 16, 32, 48]
    assert Text(stream, stream, 16).evaluation(10**9).shape == (6, 17)  # 99 targets
    assert Text(stream, stream[:17], 16).evaluation(1).shape == (1, 17)
    assert Text(stream, stream[:33], 16).evaluation(32).shape == (2, 17)


def test_read_gives_the_split_that_is_asked_for(small: Any) -> None:
    validation, test = read(small()), read(small("task.evaluate=test"))
    assert torch.equal(validation.train, test.train) and not torch.equal(validation.held_out, test.held_out)
    assert int(validation.train.max()) < 40 and validation.context == 32
    raw = read(small("task.vocabulary=bytes", "model.vocab=256"))
    assert bytes(raw.train[:6].tolist()) == b"def f("


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.test=0", "task.evaluate=test"], "task.evaluate=test: data.test=0 leaves no test split"),
        (["model.context=100000"], "model.context=100000: must be < "),
        (["model.expected_parameters=7"], "model.expected_parameters=7: the network has "),
        (["task.vocabulary=tokenizer", "data.tokenizer=nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(overrides: list[str], message: str, small: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, small(*overrides))


def test_a_batch_that_processes_cannot_share_is_refused(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        world = 2

    monkeypatch.setattr(language, "setup", lambda *a, **o: Two())
    with pytest.raises(
        ValueError, match=r"task.batch_size=4: must be a multiple of task.accumulate=4 times 2 processes"
    ):
        run(tmp_path, small("task.accumulate=4"))


def losses_of(chosen: TrialConfig) -> Losses:
    return Losses([build(chosen, seed) for seed in (0, 1)])


@pytest.mark.parametrize("arm", ["hash", "random", "drop"])
def test_evaluation_is_repeatable_and_leaves_training_alone(arm: str, small: Any) -> None:
    chosen = small(*ARMS[arm], "attention.drop_at_eval=true")
    losses, here = losses_of(chosen), setup(device="cpu")
    windows = read(chosen).evaluation(512)
    own = torch.Generator().manual_seed(5)
    for layer in losses.models[0].attentions:
        layer.generator = own
    before = own.get_state()
    first = evaluate(losses, windows, chosen.task, here)
    assert evaluate(losses, windows, chosen.task, here) == first and len(set(first)) == 2
    shares = densities(losses, windows, here)
    assert densities(losses, windows, here) == shares and all(0 < share < 1 for share in shares)
    assert losses.training and all(model.training for model in losses.models)
    assert torch.equal(own.get_state(), before) and losses.models[0].attentions[0].generator is own


def test_evaluation_in_parts_is_the_mean_over_all_windows(small: Any) -> None:
    chosen = small()
    losses, here = losses_of(chosen), setup(device="cpu")
    windows = read(chosen).evaluation(352)  # 11 windows, 5 a part
    with torch.no_grad():
        wanted = [float(model.loss(windows[:, :-1], windows[:, 1:])) for model in losses.models]
    assert len(windows) == 11 and evaluate(losses, windows, chosen.task, here) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("arm", ["dense", "hash"])
def test_divergence_is_a_recorded_result(arm: str, small: Any, tmp_path: Path) -> None:
    rows, made = run(tmp_path, small(*ARMS[arm], "optimizer.lr=1e30", "optimizer.clip_norm=null"))
    assert rows[0]["diverged"] is True and not math.isfinite(rows[0]["validation_loss"])
    assert len(curve(made)) < 20  # and it stops there


def test_only_the_seed_that_diverges_is_marked(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_bad_one(chosen: TrialConfig, seed: int) -> Any:
        model = build(chosen, seed)
        if seed == 1:
            with torch.no_grad():
                model.blocks[0].up.weight[0, 0] = torch.nan
        return model

    monkeypatch.setattr(language, "build", with_a_bad_one)
    rows, made = run(tmp_path / "a", small("n_seeds=2"))
    assert [row["diverged"] for row in rows] == [False, True] and len(curve(made)) == 20
    monkeypatch.undo()
    alone, _ = run(tmp_path / "b", small())
    assert sound(alone)[0] == sound(rows)[0]


def test_dropping_in_evaluation_costs_and_is_recorded(small: Any, tmp_path: Path) -> None:
    rows, _ = run(tmp_path / "drop", small("attention=drop", "attention.drop_prob=0.6", "task.steps=60"))
    assert rows[0]["dropping_loss"] > rows[0]["validation_loss"] > 0
    rows, _ = run(tmp_path / "official", small("attention=drop_official", "attention.drop_prob=0.6"))
    assert rows[0]["dropping_loss"] == rows[0]["validation_loss"]
    rows, _ = run(tmp_path / "dense", small())
    assert "dropping_loss" not in rows[0]


@pytest.mark.parametrize(("arm", "low", "high"), [("dense", 1, 1), ("random", 0.2, 0.35), ("hash", 0.2, 0.95)])
def test_densities_are_shares_of_live_pairs(arm: str, low: float, high: float, small: Any, tmp_path: Path) -> None:
    rows, made = run(tmp_path, small(*ARMS[arm]))
    logged = curve(made, "density")
    assert logged == [[rows[0]["density_early"]], [rows[0]["density_late"]]]
    assert all(low <= x <= high for (x,) in logged)


def test_what_is_logged_and_when(small: Any, tmp_path: Path) -> None:
    _, made = run(tmp_path, small("task.log_every=6", "task.eval_every=10", "max_steps=16", "n_seeds=2"))
    steps = {
        name: [s for s, row in sorted(made._history.items()) if name in row]
        for name in ("train/loss", "density", "validation/loss")
    }
    assert steps == {"train/loss": [6, 12, 16], "density": [5, 16], "validation/loss": [10, 16]}
    assert all(len(row["train/loss"]) == 2 for row in made._history.values() if "train/loss" in row)


def test_the_text_is_read_once_a_process(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read(small())
    monkeypatch.setattr(text, "load", lambda data: pytest.fail("read again"))
    assert read(small("model.context=16")).context == 16


def test_a_record_holds_what_json_can_hold(small: Any, tmp_path: Path) -> None:
    rows, _ = run(tmp_path, small("attention=hash"))
    assert json.loads(json.dumps(rows)) == rows
    assert set(rows[0]) == {
        "seed", "diverged", "validation_loss", "train_loss", "density_early", "density_late", "train_s",
    }  # fmt: skip
    assert trial(tmp_path / "x", small("seed=2", "n_seeds=3")).seeds == [2, 3, 4]
