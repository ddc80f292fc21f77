"""Train a translation model in a given arithmetic and score its translations (C4.paper)."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import load
from common.data.pairs import FIRST_BYTE, Pairs, collate, encode, languages, token_batches
from common.kernels.dispatch import forced
from common.streams import generator
from common.training import Run, setup
from mulfree_training.networks.build import build
from mulfree_training.tasks.arithmetic import IGNORED, convert, loss_function
from mulfree_training.tasks.beam import beam_search
from mulfree_training.tasks.bleu import corpus_bleu
from mulfree_training.tasks.selection import Best
from mulfree_training.tasks.training import Batch, Losses, epoch_order, fit

if TYPE_CHECKING:
    from datasets import Dataset

    from common.trials import Trial
    from mulfree_training.config import TrialConfig

TIES = 56  # random stream
SMALL = 64
"""Sentences to evaluate on where `max_steps` cuts everything short."""


class HeldOut(NamedTuple):
    """A split to translate, sorted by the length of the sources."""

    pairs: Pairs
    references: list[str]


class Sentences:
    """Sentence pairs: batches by (seed, step), the split to evaluate on, and the one that `task.select=best` needs.

    Raises:
        ValueError: no split to evaluate on, or what `encode` and `token_batches` refuse.
        FileNotFoundError: a tokenizer is missing.
    """

    def __init__(self, config: TrialConfig, seeds: list[int], parts: int) -> None:
        task, c = config.task, config.data
        splits = load(c)
        best = task.select == "best"
        for key, name in (("evaluate", task.evaluate), *([("select", "validation")] if best else [])):
            if name not in splits:
                raise ValueError(f"task.{key}={getattr(task, key)}: data.{name}=0 leaves no {name} split")
        self.train = encode(splits["train"], c.inputs, c.tokenizer, (config.model.source_vocab, config.model.vocab))
        self.pairs, self.references = _held_out(config, splits[task.evaluate])
        self.validation = _held_out(config, splits["validation"]) if best else None
        language = languages(splits["train"], c.inputs)[1]
        self.folder = os.path.join(c.tokenizer, language) if c.tokenizer else ""
        self.parts = parts
        self.batches = {seed: self._cut(seed, task.batch_tokens) for seed in seeds}

    def _cut(self, seed: int, max_tokens: int) -> list[list[int]]:
        ties = torch.randperm(len(self.train), generator=generator(seed, TIES)).tolist()
        return token_batches(self.train, ties, max_tokens)

    def __call__(self, seed: int, step: int) -> Batch:
        """The batch of one model; the last rows may be filled up, so that all processes and micro-batches get some."""
        batches = self.batches[seed]
        epoch, place = divmod(step, len(batches))
        chosen = batches[int(epoch_order(seed, epoch, len(batches))[place])]
        return _batch([self.train[i] for i in chosen], self.parts)

    def text(self, ids: list[int]) -> str:
        """From tokens of the target language to text."""
        if not self.folder:
            return bytes(i - FIRST_BYTE for i in ids if FIRST_BYTE <= i < FIRST_BYTE + 256).decode(errors="replace")
        from transformers import AutoTokenizer

        if not hasattr(self, "_tokenizer"):
            place = os.path.expanduser(self.folder)
            self._tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _held_out(config: TrialConfig, split: Dataset) -> HeldOut:
    c = config.data
    if config.max_steps is not None:
        split = split.select(range(min(SMALL, len(split))))
    pairs = encode(split, c.inputs, c.tokenizer, (config.model.source_vocab, config.model.vocab))
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), i))
    language, texts = languages(split, c.inputs)[1], split[:][c.inputs]
    return HeldOut([pairs[i] for i in order], [texts[i][language] for i in order])


def _batch(pairs: Pairs, multiple: int = 1) -> Batch:
    found = collate([pairs], multiple)
    assert found.real is not None
    return Batch(tuple(x[0] for x in found.inputs), found.targets[0], found.real[0])


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<split>_nll` in nats a token and `<split>_bleu` of the last or best weights, smoothed
        `train_loss` of the last step, `train_s`, and the `best_step` if `task.select=best`.
    """
    with forced(config.arithmetic.backend or None):
        return _run(config, trial)


def _run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    task = config.task
    run = setup(config.threads, config.device, config.precision, task.accumulate, seed=config.seed)
    steps = task.steps if config.max_steps is None else min(task.steps, config.max_steps)
    sentences = Sentences(config, trial.seeds, task.accumulate * run.world)
    models = [convert(build(config.model, seed), config.arithmetic) for seed in trial.seeds]
    losses = run.place(Losses(models, loss_function(config.arithmetic, task.label_smoothing, "fairseq")))

    def bleu(model: nn.Module, held_out: HeldOut) -> float:
        found = translate(model, held_out.pairs, task, run)
        return corpus_bleu([sentences.text(ids) for ids in found], held_out.references)

    watch = None
    if sentences.validation is not None:
        watch = Best(losses.models, task.evaluate_every, functools.partial(bleu, held_out=sentences.validation))
    train_loss, seconds = fit(config, trial, run, losses, sentences, steps, watch)
    if watch is not None:
        watch.restore()
    rows = []
    for i, (seed, model) in enumerate(zip(trial.seeds, losses.models, strict=True)):
        loss = held_out_nll(model, sentences.pairs, task.eval_batch_size, run)
        score = bleu(model, HeldOut(sentences.pairs, sentences.references))
        # the best weights may be older than the divergence
        diverged = not (math.isfinite(loss) and math.isfinite(train_loss[i]))
        rows.append(
            {"seed": seed, "diverged": diverged, f"{task.evaluate}_nll": loss, f"{task.evaluate}_bleu": score}
            | {"train_loss": train_loss[i], "train_s": seconds}
            | ({} if watch is None else {"best_step": watch.steps[i]})
        )
    names = (f"{task.evaluate}_nll", f"{task.evaluate}_bleu")
    trial.log({name.replace("_", "/"): [row[name] for row in rows] for name in names}, step=steps)
    return rows


@torch.no_grad()
def held_out_nll(model: nn.Module, pairs: Pairs, size: int, run: Run) -> float:
    """Mean negative log-likelihood in nats a target token, with the standard softmax and no smoothing."""
    model.eval()
    total, count = 0.0, 0
    for batch in (_batch(part).to(run.device) for part in _parts(pairs, size)):
        with run.autocast():
            logits = model(*batch.inputs)
        flat = logits.flatten(0, -2).double(), batch.target.flatten()
        total += float(F.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum"))
        count += int((batch.target != IGNORED).sum())
    model.train()
    return total / count


@torch.no_grad()
def translate(model: nn.Module, pairs: Pairs, task: Any, run: Run) -> list[list[int]]:
    """Translations of the sources, tokens without the end.

    Args:
        model: has `encode` and `decode` of `networks.translation.Translation`.
        pairs: whose sources count, best sorted by length.
        task: `beams`, `length_factor`, `length_extra` and `eval_batch_size`.
        run: where to compute.
    """
    model.eval()
    found: list[list[int]] = []
    with run.autocast():
        for part in _parts(pairs, task.eval_batch_size):
            source = _batch(part).inputs[0].to(run.device)
            longest = [int(task.length_factor * len(s)) + task.length_extra for s, _ in part]
            bounds = torch.tensor(longest, device=run.device)
            found += beam_search(_decoder(model, source, task.beams), bounds, task.beams)
    model.train()
    return found


def _decoder(model: nn.Module, source: Tensor, beams: int) -> Any:
    memory, padding = (x.repeat_interleave(beams, 0) for x in model.encode(source))  # type: ignore[operator]
    return lambda prefixes: model.decode(prefixes, memory, padding)[:, -1]  # type: ignore[operator]


def _parts(pairs: Pairs, size: int) -> Iterator[Pairs]:
    return (pairs[i : i + size] for i in range(0, len(pairs), size))
