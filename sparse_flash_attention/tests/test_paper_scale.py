"""`scale=paper` states the paper's set-up: it composes, networks have the known sizes, and its data path trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from common.data import hub, tokens
from sparse_flash_attention.tasks.language import build, lr_factor
from sparse_flash_attention.tasks.text import read
from sparse_flash_attention.tests import worlds
from sparse_flash_attention.tests.trials import config, documents, run, text_folder

PARAMETERS = {8192: 122_800_896, 16384: 129_092_352}
SIZES = [
    "model.vocab=60", "model.d_model=16", "model.n_layer=1", "model.n_head=2", "model.context=32",
    "model.expected_parameters=null",
]  # fmt: skip
SMALL = [*SIZES, "task.batch_size=4", "task.accumulate=2", "max_steps=3", "task.log_every=1", "device=cpu", "threads=1"]


@pytest.fixture(scope="module")
def plans() -> dict[str, list[dict[str, Any]]]:
    return {e: [job.config for job in jobs] for e, jobs in worlds.plans("paper").items()}


def test_every_experiment_has_a_paper_grid(plans: dict[str, list[dict[str, Any]]]) -> None:
    assert {e for e, jobs in plans.items() if not jobs} == {"language_tune"}  # the paper has one learning rate
    assert all(c["scale"] == "paper" and c["arm"] and c["max_steps"] is None for jobs in plans.values() for c in jobs)


@pytest.mark.parametrize("attention", ["dense_official", "hash_official", "drop_official", "hash", "reformer"])
@pytest.mark.parametrize(("model", "context"), [("gpt2_8k", 8192), ("gpt2_16k", 16384)])
def test_networks_have_the_papers_number_of_parameters(attention: str, model: str, context: int) -> None:
    chosen = config("scale=paper", "experiment=language", f"model={model}", f"attention={attention}")
    with torch.device("meta"):
        network = build(chosen, 0)
    assert all(p.is_meta for p in network.parameters())
    assert chosen.model.context == context
    count = sum(p.numel() for p in network.parameters())
    d = 768
    by_hand = 50304 * d + context * d + 12 * (2 * d + 3 * d * d + 8 * d * d) + d
    assert count == PARAMETERS[context] == chosen.model.expected_parameters == by_hand


def test_another_number_of_parameters_is_refused() -> None:
    chosen = config("scale=paper", "model=gpt2_8k", "model.context=8191")
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="expected_parameters=122800896: the network has 1228001"),
    ):
        build(chosen, 0)


def test_language_models_are_the_papers(plans: dict[str, list[dict[str, Any]]]) -> None:
    arms = {c["arm"]: c for c in plans["language"]}
    for arm, c in arms.items():
        task, model, optimizer, attention = c["task"], c["model"], c["optimizer"], c["attention"]
        long = arm.endswith("_16k")
        assert (model["d_model"], model["n_layer"], model["n_head"]) == (768, 12, 12)
        assert model["context"] == (16384 if long else 8192)
        assert (task["steps"], task["batch_size"], task["evaluate"]) == (15_000, 30 if long else 64, "test")
        assert task["batch_size"] * model["context"] == (491_520 if long else 524_288)
        assert task["vocabulary"] == "tokenizer" and c["data"]["tokenizer"] == "tokenizers/gpt2"
        assert (c["data"]["test"], c["data"]["split_seed"]) == (0.0005, 2357)
        assert (c["precision"], c["device"]) == ("bf16", "cuda")
        assert (optimizer["lr"], optimizer["weight_decay"], optimizer["clip_norm"]) == (1e-3, 0.1, None)
        assert (optimizer["beta1"], optimizer["beta2"]) == (0.9, 0.95)
        kind = arm.split("_")[0]
        assert attention["kind"] == kind
        if kind == "dense":
            assert attention["key_norm"] == "all"
        elif kind == "hash":
            assert not attention["include_self"]
        else:
            assert attention["drop_at_eval"] and f"drop_{attention['drop_prob'] * 100:g}" == arm
    buckets = {arm: c["attention"]["n_buckets"] for arm, c in arms.items() if c["attention"]["kind"] == "hash"}
    assert buckets == {"hash": 16, "hash_8": 8, "hash_32": 32, "hash_16k": 16}
    per_arm = [(c["arm"], c["seed"]) for c in plans["language"]]
    assert len(set(per_arm)) == len(per_arm) and ("dense", 0) in per_arm  # the paper's seed is 0


def test_the_papers_learning_rate() -> None:
    c = config("scale=paper", "optimizer=adamw_paper").optimizer
    rates = [c.lr * lr_factor(step, 15_000, c) for step in range(15_000)]
    assert rates[0] == pytest.approx(1e-5) and rates[300] == pytest.approx(1e-3) and rates[-1] == pytest.approx(2e-4)
    assert max(rates) == rates[300] and math.isclose(sum(r > 1e-3 * 0.9999999 for r in rates), 1, abs_tol=5)


def test_timings_have_the_papers_sizes(plans: dict[str, list[dict[str, Any]]]) -> None:
    tasks = [c["task"] for c in plans["runtime"]]
    assert {(t["dtype"], t["batch"], t["heads"], t["head_dim"]) for t in tasks} == {("bf16", 4, 48, 64)}
    assert {t["length"] for t in tasks} >= {2**i for i in range(9, 16)}
    assert {*tasks[0]["buckets"]} >= {2, 4, 8, 16, 32, 64} and {*tasks[0]["keeps"]} >= {
        0.8,
        0.7,
        0.6,
        0.5,
        0.4,
        0.3,
        0.2,
    }
    steps = {c["task"]["length"]: c for c in plans["step"]}
    assert set(steps) == {8192, 16384}
    for length, c in steps.items():
        assert c["model"]["expected_parameters"] == PARAMETERS[length] and 16 in c["task"]["buckets"]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of the set's schema and a saved tokenizer; no network, no shared caches."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "tokens")
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|endoftext|>", "<unk>"]
    learnt.train_from_iterator(
        documents(), trainers.BpeTrainer(vocab_size=60, special_tokens=specials, show_progress=False)
    )
    saved = PreTrainedTokenizerFast(tokenizer_object=learnt, eos_token=specials[0], unk_token=specials[1])
    saved.save_pretrained(str(tmp_path / "tokenizer"))
    folder = text_folder(tmp_path / "text", 400)
    own = ["data=openwebtext2", f"data.path={folder}", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    return [*own, "data.validation=0.02", "data.test=0.02"]


@pytest.mark.parametrize("attention", ["dense_official", "hash_official", "drop_official"])
def test_the_papers_data_path_trains(attention: str, sources: list[str], tmp_path: Path) -> None:
    base = ["scale=paper", "experiment=language", "task=language_paper_8k", "task.evaluate=test", "model=gpt2_8k"]
    chosen = config(*base, "optimizer=adamw_paper", f"attention={attention}", *sources, *SMALL, "n_seeds=2")
    rows, made = run(tmp_path / "trial", chosen)
    assert [row["seed"] for row in rows] == [0, 1] and not any(row["diverged"] for row in rows)
    assert all(3 < row["test_loss"] < 5 for row in rows)  # log 60 is 4.1
    assert [step for step, row in made._history.items() if "train/loss" in row] == [1, 2, 3]
    assert ("dropping_loss" in rows[0]) == (attention == "drop_official")


def test_documents_are_ended_by_the_end_of_text(sources: list[str]) -> None:
    base = ["scale=paper", "task=language_paper_16k", "model=gpt2_16k"]
    source = read(config(*base, *sources, *SMALL))
    documents_in = [int((stream == 0).sum()) for stream in (source.train, source.held_out)]
    assert documents_in == [384, 8] and source.train[-1] == source.held_out[-1] == 0
    assert int(source.train.max()) < 60


def test_missing_files_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(config("data=openwebtext2", "data.path=nowhere"))
