"""Train a translation model in a given arithmetic and score its translations (C4.paper)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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
from mulfree_training.tasks.training import Batch, Losses, epoch_order, fit

if TYPE_CHECKING:
    from common.trials import Trial
    from mulfree_training.config import TrialConfig

TIES = 56  # random stream
EXTRA = 10
"""A translation may have so many tokens more than `task.length_factor` times those of its source, end included."""
SMALL = 64
"""Sentences to evaluate on where `max_steps` cuts everything short."""


class Sentences:
    """Sentence pairs: batches by (seed, step), and the split to evaluate on, sorted by length.

    Raises:
        ValueError: no split to evaluate on, or what `encode` and `token_batches` refuse.
        FileNotFoundError: a tokenizer is missing.
    """

    def __init__(self, config: TrialConfig, seeds: list[int], parts: int) -> None:
        task, c = config.task, config.data
        splits = load(c)
        if task.evaluate not in splits:
            raise ValueError(f"task.evaluate={task.evaluate}: data.{task.evaluate}=0 leaves no {task.evaluate} split")
        held_out = splits[task.evaluate]
        if config.max_steps is not None:
            held_out = held_out.select(range(min(SMALL, len(held_out))))
        sizes = config.model.source_vocab, config.model.vocab
        self.train = encode(splits["train"], c.inputs, c.tokenizer, sizes)
        pairs = encode(held_out, c.inputs, c.tokenizer, sizes)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), i))
        language = languages(held_out, c.inputs)[1]
        texts = held_out[:][c.inputs]
        self.pairs: Pairs = [pairs[i] for i in order]
        self.references: list[str] = [texts[i][language] for i in order]
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


def _batch(pairs: Pairs, multiple: int = 1) -> Batch:
    found = collate([pairs], multiple)
    assert found.real is not None
    return Batch(tuple(x[0] for x in found.inputs), found.targets[0], found.real[0])


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<split>_nll` in nats a token, `<split>_bleu` of the last weights, smoothed `train_loss` of the
        last step, `train_s`.
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
    train_loss, seconds = fit(config, trial, run, losses, sentences, steps)
    rows = []
    for i, (seed, model) in enumerate(zip(trial.seeds, losses.models, strict=True)):
        loss = held_out_nll(model, sentences.pairs, task.eval_batch_size, run)
        found = translate(model, sentences.pairs, task, run)
        bleu = corpus_bleu([sentences.text(ids) for ids in found], sentences.references)
        rows.append(
            {"seed": seed, "diverged": not math.isfinite(loss), f"{task.evaluate}_nll": loss}
            | {f"{task.evaluate}_bleu": bleu, "train_loss": train_loss[i], "train_s": seconds}
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
        task: `beams`, `length_factor` and `eval_batch_size`.
        run: where to compute.
    """
    model.eval()
    found: list[list[int]] = []
    with run.autocast():
        for part in _parts(pairs, task.eval_batch_size):
            source = _batch(part).inputs[0].to(run.device)
            longest = torch.tensor([int(task.length_factor * len(s)) + EXTRA for s, _ in part], device=run.device)
            found += beam_search(_decoder(model, source, task.beams), longest, task.beams)
    model.train()
    return found


def _decoder(model: nn.Module, source: Tensor, beams: int) -> Any:
    memory, padding = (x.repeat_interleave(beams, 0) for x in model.encode(source))  # type: ignore[operator]
    return lambda prefixes: model.decode(prefixes, memory, padding)[:, -1]  # type: ignore[operator]


def _parts(pairs: Pairs, size: int) -> Iterator[Pairs]:
    return (pairs[i : i + size] for i in range(0, len(pairs), size))
