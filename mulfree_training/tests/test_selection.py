"""The best weights by validation: which they are, that they are scored, and that a killed run ends in the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

from common.data import hub
from mulfree_training.tasks import training, translation
from mulfree_training.tasks.selection import Best
from mulfree_training.tests.trials import TRANSLATION, config, curve, pairs, run, sentences, sound, write

BEST = ["task.select=best", "task.evaluate_every=2", "task.evaluate=test", "task.steps=7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": sentences(60), "validation": sentences(9, 1), "test": sentences(12, 2)}
    return write(tmp_path_factory.mktemp("pairs"), **{name: pairs(rows) for name, rows in splits.items()})


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Makes the config of a small trial in bytes; no network, no shared caches."""
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    torch.set_num_threads(1)
    return lambda *overrides: config(*TRANSLATION, f"data.path={folder}", "data.tokenizer=''", *overrides)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, dict[str, Tensor]]]]:
    """Replaces BLEU by given scores of the validations (9 sentences; 1 for the others) and notes what is scored."""

    def replace(*scores: float) -> list[tuple[int, dict[str, Tensor]]]:
        seen: list[tuple[int, dict[str, Tensor]]] = []
        left = list(scores)

        def translate(model: nn.Module, held_out: Any, *_: Any) -> list[list[int]]:
            seen.append((len(held_out), {name: x.clone() for name, x in model.state_dict().items()}))
            return [[] for _ in held_out]

        monkeypatch.setattr(translation, "translate", translate)
        monkeypatch.setattr(translation, "corpus_bleu", lambda _, texts: left.pop(0) if len(texts) == 9 else 1.0)
        return seen

    return replace


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, two[name]) for name, x in one.items())


def test_the_weights_of_each_models_highest_score_come_back_and_of_equal_ones_the_later() -> None:
    models = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    table = {1: (5.0, 1.0, math.nan), 2: (7.0, 1.0, math.nan), 3: (6.0, 0.5, math.nan)}
    now = 0
    best = Best(models, 1, lambda model: table[now][models.index(model)])
    for now in table:
        for model in models:
            nn.init.constant_(model.weight, now)
        assert best.look(now)["selection/score"] == pytest.approx(list(table[now]), nan_ok=True)
    assert best.steps == [2, 2, 0] and best.scores == [7.0, 1.0, -math.inf]
    copy = Best(models, 1, best.score)
    copy.load_state_dict(best.state_dict())
    copy.restore()
    assert [float(model.weight.detach()) for model in models] == [2, 2, 3]


def test_the_best_weights_are_scored_on_the_other_split(small: Any, scored: Any, tmp_path: Path) -> None:
    seen = scored(3.0, 9.0, 4.0, 8.0)
    (row,), made = run(tmp_path / "trial", small(*BEST))
    assert row["best_step"] == 4 and row["test_bleu"] == 1.0
    assert [count for count, _ in seen] == [9, 9, 9, 9, 12]  # after steps 2, 4, 6, 7, and the end
    assert equal(seen[4][1], seen[1][1]) and not equal(seen[4][1], seen[3][1])
    assert curve(made, "selection/score") == [[3.0], [9.0], [4.0], [8.0]]


def test_validations_change_nothing_but_the_choice(small: Any, tmp_path: Path) -> None:
    chosen = ["model.dropout=0.1", "task.evaluate=test", "task.steps=7"]
    (last,), a = run(tmp_path / "last", small(*chosen))
    (best,), b = run(tmp_path / "best", small(*chosen, *BEST))
    assert curve(a) == curve(b) and len(curve(b, "selection/score")) == 4
    assert set(best) - set(last) == {"best_step"} and best["train_loss"] == last["train_loss"]
    # the bytes of an untrained network have no common 4-gram: of scores of 0 the last one counts
    assert best["best_step"] == 7 and best["test_nll"] == last["test_nll"]


def test_a_killed_run_ends_in_the_same_best_weights(
    small: Any, scored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = training.save_checkpoint

    def and_die(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if options["step"] == 5:
            raise KeyboardInterrupt

    chosen = small(*BEST, "arithmetic=full", "n_seeds=2")
    scores = (3.0, 9.0, 9.5, 8.0, 4.0, 8.5, 4.5, 8.25)  # two models after steps 2, 4, 6, 7
    whole_seen = scored(*scores)
    whole, a = run(tmp_path / "whole", chosen)
    scored(*scores[:4])
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(training, "save_checkpoint", and_die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", chosen)
    rest_seen = scored(*scores[4:])
    rest, b = run(tmp_path / "killed", chosen)
    assert sound(rest) == sound(whole) and [row["best_step"] for row in rest] == [4, 2]
    for one, two in zip(whole_seen[-2:], rest_seen[-2:], strict=True):
        assert one[0] == two[0] == 12 and equal(one[1], two[1])
    assert curve(a) == curve(b) and curve(a, "selection/score") == curve(b, "selection/score")


def test_a_run_that_diverges_later_says_so_and_has_the_weights_before(
    small: Any, scored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = training.lr_factor
    monkeypatch.setattr(training, "lr_factor", lambda step, *rest: math.nan if step == 2 else factor(step, *rest))
    seen = scored(3.0, 0.0)
    (row,), _ = run(tmp_path / "trial", small(*BEST))
    assert row["diverged"] and row["best_step"] == 2 and math.isfinite(row["test_nll"])
    assert [count for count, _ in seen] == [9, 9, 12] and equal(seen[0][1], seen[2][1])


def test_without_a_validation_split_nothing_can_be_chosen(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = translation.load
    monkeypatch.setattr(translation, "load", lambda c: {k: v for k, v in load(c).items() if k != "validation"})
    with pytest.raises(ValueError, match="task.select=best: data.validation=0 leaves no validation split"):
        run(tmp_path / "trial", small(*BEST))
