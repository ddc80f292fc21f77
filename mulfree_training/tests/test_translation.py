"""Translation: BLEU, beam search, and trainings on a local set of the hub's schema whose translations are copies."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import hub
from common.data.pairs import END, FIRST_BYTE, IGNORED, PADDING
from common.data.vocabulary import learn
from common.training import setup
from mulfree_training.networks.build import build
from mulfree_training.networks.translation import Translation
from mulfree_training.tasks import training, translation, vocabulary
from mulfree_training.tasks.beam import beam_search
from mulfree_training.tasks.bleu import corpus_bleu, words
from mulfree_training.tasks.translation import Sentences, held_out_nll, translate
from mulfree_training.tests.trials import TRANSLATION, config, curve, pairs, run, sentences, sound, write

SIZE = 14
"""Tokens of the copies: four special ones, and five letters inside or at the end of a word."""
LEARNS = ["model.d_model=32", "model.d_hidden=64", "optimizer.warmup=50", "task.batch_tokens=300", "task.log_every=50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and tokenizers."""
    root = tmp_path_factory.mktemp("pairs")
    splits = {"train": sentences(400), "validation": sentences(60, 1), "test": sentences(50, 2)}
    write(root / "data", **{name: pairs(rows) for name, rows in splits.items()})
    for language in ("de", "en"):
        assert learn([row[language] for row in splits["train"]], SIZE, root / "tokens" / language) == SIZE
    return root


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Makes the config of a small trial; no network, no shared caches."""
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    torch.set_num_threads(1)
    own = [f"data.path={folder / 'data'}", f"data.tokenizer={folder / 'tokens'}"]
    sizes = [f"model.vocab={SIZE}", f"model.source_vocab={SIZE}"]
    return lambda *overrides: config(*TRANSLATION, *own, *sizes, *overrides)


# --- BLEU


def test_bleu_of_the_same_text_is_100_whatever_the_spaces() -> None:
    references = ["The cat, it seems, sat on the mat.", "She said: “don't go there today!”"]
    assert corpus_bleu(references, references) == pytest.approx(100)
    spaced = ["The cat , it seems , sat on the mat .", "She said : “ don ' t go there today ! ”"]
    assert corpus_bleu(spaced, references) == pytest.approx(100)
    assert words("don't  stop.\n") == ["don", "'", "t", "stop", "."]


def test_bleu_by_hand() -> None:
    """n-gram by n-gram; the second "the the" is clipped, and counts are added before they are divided."""
    hypotheses, references = ["the the cat sat on a mat", "a b c d"], ["the cat sat on the mat today", "a b c d"]
    # clipped matches over n-grams: the*2 cat sat on mat + 4; the-cat cat-sat sat-on + 3; 2 + 2; 1 + 1
    precisions = [(6 + 4) / (7 + 4), (3 + 3) / (6 + 3), (2 + 2) / (5 + 2), (1 + 1) / (4 + 1)]
    assert corpus_bleu(hypotheses, references) == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_bleu_punishes_what_is_too_short_and_not_what_is_too_long() -> None:
    assert corpus_bleu(["a b c d e"], ["a b c d e f g"]) == pytest.approx(100 * math.exp(1 - 7 / 5))
    longer = corpus_bleu(["a b c d e f g"], ["a b c d e"])
    assert longer == pytest.approx(100 * (5 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)


def test_bleu_is_0_without_a_common_4_gram_and_for_nothing() -> None:
    assert (
        corpus_bleu(["a b c"], ["a b c"])
        == corpus_bleu([""], ["a b c d"])
        == corpus_bleu(["A B C D"], ["a b c d"])
        == 0
    )
    for hypotheses, references in ((["a"], []), ([], [])):
        with pytest.raises(
            ValueError, match=f"{len(hypotheses)} hypotheses: must be as many as the 0 references, >= 1"
        ):
            corpus_bleu(hypotheses, references)


# --- beam search


def table(seed: int, count: int, size: int, end: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A stand-in for a network: logits that hang on the sentence, the last two tokens and the length."""
    weights = torch.randn(count, 4, size, size, size, generator=torch.Generator().manual_seed(seed))
    weights[..., END] += end

    def decode(prefixes: Tensor) -> Tensor:
        beams = len(prefixes) // count
        sentence = torch.arange(count).repeat_interleave(beams)
        length, before = prefixes.shape[1], prefixes[:, max(prefixes.shape[1] - 2, 0)]
        return 2 * weights[sentence, length % 4, before, prefixes[:, -1]]

    return decode


def best_by_trying(decode: Callable[[Tensor], Tensor], count: int, longest: list[int], size: int) -> list[list[int]]:
    found = []
    for i in range(count):
        scores = {}
        for length in range(longest[i] + 1):
            for tokens in itertools.product([t for t in range(size) if t not in (END, PADDING)], repeat=length):
                total, row = 0.0, [END]
                for token in (*tokens, END):
                    lp = decode(torch.tensor([row] * count)).log_softmax(-1)[i]
                    total, row = total + float(lp[token]), [*row, token]
                # at the greatest length the end is all that is left, at the price that it has
                scores[tokens] = total / (length + 1)
        found.append(list(max(scores, key=lambda tokens: scores[tokens])))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_best_of_all_translations(seed: int) -> None:
    decode, longest = table(seed, 3, 5), [2, 3, 0]
    assert beam_search(decode, torch.tensor(longest), 64) == best_by_trying(decode, 3, longest, 5)


@pytest.mark.parametrize("seed", range(8))
def test_one_beam_is_greedy_search(seed: int) -> None:
    decode = table(seed, 4, 6)
    greedy = []
    for i in range(4):
        row = [END]
        while len(row) <= 7:
            logits = decode(torch.tensor([row] * 4))[i]
            logits[PADDING] = -math.inf
            row.append(int(logits.argmax()))
            if row[-1] == END:
                break
        greedy.append([token for token in row[1:] if token != END])
    assert beam_search(decode, torch.full((4,), 7), 1) == greedy


def search_one(decode: Callable[[Tensor], Tensor], longest: int, beams: int) -> list[int]:
    """fairseq's search for one sentence with lists: at most `beams` end in all, only among the best of a step."""
    live: list[tuple[float, list[int]]] = [(0.0, [END])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(longest + 1):
        found = []
        for score, row in live:
            lp = decode(torch.tensor([row])).log_softmax(-1)[0]
            for token in range(len(lp)):
                if token != PADDING and (token == END or length < longest):
                    found.append((score + float(lp[token]), [*row, token]))
        found.sort(key=lambda pair: -pair[0])
        ended += [(s / (length + 1), row) for s, row in found[:beams] if row[-1] == END][: beams - len(ended)]
        live = [(s, row) for s, row in found[: 2 * beams] if row[-1] != END][:beams]
        if len(ended) == beams or not live:
            break
    return max(ended)[1][1:-1]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("end", [0.0, 0.7, 1.5])
def test_the_search_is_fairseqs(seed: int, beams: int, end: float) -> None:
    decode, seen = table(seed, 1, 7, end), ([], [])

    def noting(which: int) -> Callable[[Tensor], Tensor]:
        return lambda prefixes: seen[which].extend(map(tuple, prefixes.tolist())) or decode(prefixes)

    assert beam_search(noting(0), torch.tensor([6]), beams) == [search_one(noting(1), 6, beams)]
    assert set(seen[0]) == set(seen[1])  # and with the same prefixes on the way


def test_sentences_of_a_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = Translation(9, 9, 16, 2, 2, 16).double().eval()
    sources = [[4, 5, 6, 7, END], [8, 4, END], [5, END], [6, 6, 7, 4, END]]
    bounds = [7, 3, 5, 6]

    def decoder(rows: list[list[int]]) -> Callable[[Tensor], Tensor]:
        width = max(map(len, rows))
        return translation._decoder(model, torch.tensor([row + [PADDING] * (width - len(row)) for row in rows]), 3)

    together = beam_search(decoder(sources), torch.tensor(bounds), 3)
    alone = [beam_search(decoder([s]), torch.tensor([b]), 3)[0] for s, b in zip(sources, bounds, strict=True)]
    assert together == alone and all(len(t) <= b for t, b in zip(together, bounds, strict=True))
    assert len({tuple(t) for t in together}) > 1


def test_the_padding_is_never_chosen_and_nan_translates_to_nothing() -> None:
    def decode(prefixes: Tensor) -> Tensor:
        logits = torch.zeros(len(prefixes), 6)
        logits[:, PADDING], logits[:, 4] = 9, 5
        return logits

    assert beam_search(decode, torch.tensor([3]), 2) == [[4, 4, 4]]
    assert beam_search(lambda p: torch.full((len(p), 6), math.nan), torch.tensor([3, 2]), 2) == [[], []]
    with pytest.raises(ValueError, match="beams=0: must be >= 1"):
        beam_search(decode, torch.tensor([3]), 0)


# --- sentences and trials


def test_batches_are_functions_of_seed_and_step_and_an_epoch_holds_every_sentence(small: Any) -> None:
    source = Sentences(small("task.batch_tokens=60"), [0, 1], 1)
    first = source(0, 5)
    torch.manual_seed(9)
    assert torch.equal(source(0, 5).target, first.target)
    assert any(not torch.equal(source(0, s).target, source(1, s).target) for s in range(5))
    count = len(source.batches[0])
    for epoch in range(2):
        batches = [source(0, epoch * count + i) for i in range(count)]
        assert sum(len(b.target) for b in batches) == 400
        assert all(max(b.inputs[0].numel(), b.target.numel()) <= 60 for b in batches)
        for b in batches:
            assert b.real == (b.target != IGNORED).sum() and (b.inputs[1][:, 0] == END).all()
    parts = Sentences(small("task.batch_tokens=60"), [0], 4)(0, 5)
    assert len(parts.target) % 4 == 0 and parts.real == first.real


def test_texts_come_back_from_their_tokens(small: Any) -> None:
    source = Sentences(small(), [0], 1)
    lengths = [len(own) for own, _ in source.pairs]
    assert lengths == sorted(lengths) and len(source.references) == 60
    assert [source.text(target[:-1]) for _, target in source.pairs] == source.references
    in_bytes = Sentences(small("data.tokenizer=''", "model.vocab=260", "model.source_vocab=260"), [0], 1)
    assert [in_bytes.text(target) for _, target in in_bytes.pairs] == in_bytes.references
    assert in_bytes.text([FIRST_BYTE + 255, 0]) == "�"


def test_max_steps_also_cuts_the_evaluation(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "SMALL", 7)
    assert len(Sentences(small("max_steps=1"), [0], 1).pairs) == 7 and len(Sentences(small(), [0], 1).pairs) == 60


def test_the_held_out_loss_is_the_mean_over_all_tokens_in_any_batches(small: Any) -> None:
    chosen = small("model.dropout=0.5")
    model, source, here = build(chosen.model, 0), Sentences(chosen, [0], 1), setup(device="cpu")
    found = {size: held_out_nll(model, source.pairs, size, here) for size in (1, 7, 60)}
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for own, target in source.pairs:
            logits = model(torch.tensor([own]), torch.tensor([[END, *target[:-1]]]))[0]
            total += float(F.cross_entropy(logits.double(), torch.tensor(target), reduction="sum"))
            count += len(target)
    assert all(loss == pytest.approx(total / count, rel=1e-5) for loss in found.values())


@pytest.mark.parametrize("arm", ["standard", "matmul", "full"])
def test_a_small_network_learns_to_copy_and_its_bleu_rises(arm: str, small: Any, tmp_path: Path) -> None:
    chosen = [f"arithmetic={arm}", *LEARNS, "task.evaluate=test"]
    (first,), _ = run(tmp_path / "first", small(*chosen, "task.steps=1"))
    (last,), made = run(tmp_path / "last", small(*chosen, "task.steps=220"))
    assert first["test_bleu"] < 5 and last["test_bleu"] > 80
    assert last["test_nll"] < 0.4 < 2 < first["test_nll"] and not last["diverged"]
    assert curve(made, "test/bleu") == [[last["test_bleu"]]] and len(curve(made)) == 5
    assert set(last) == {"seed", "diverged", "test_nll", "test_bleu", "train_loss", "train_s"}
    assert json.loads(json.dumps(last)) == last


def test_translations_have_at_most_the_length_that_is_allowed(small: Any) -> None:
    chosen = small("task.length_factor=0.5", "task.length_extra=3", "task.beams=2", "task.eval_batch_size=7")
    model, source, here = build(chosen.model, 0), Sentences(chosen, [0], 1), setup(device="cpu")
    with torch.no_grad():
        model.target.weight[END] = -10.0  # never ends by itself
    found = translate(model, source.pairs, chosen.task, here)
    assert [len(t) for t in found] == [len(own) // 2 + 3 for own, _ in source.pairs]
    assert model.training


def test_two_runs_are_bit_equal_and_seeds_do_not_see_each_other(small: Any, tmp_path: Path) -> None:
    chosen = ["arithmetic=full", "model.dropout=0.1", "max_steps=4"]
    alone, a = run(tmp_path / "a", small(*chosen, "seed=4"))
    again, b = run(tmp_path / "b", small(*chosen, "seed=4"))
    assert sound(alone) == sound(again) and curve(a) == curve(b) and len(curve(a)) == 4
    chosen[1] = "model.dropout=0"  # draws in the order of the models
    both, _ = run(tmp_path / "c", small(*chosen, "seed=3", "n_seeds=2"))
    alone, _ = run(tmp_path / "d", small(*chosen, "seed=4"))
    assert sound(both)[1] == sound(alone)[0]


def test_a_resumed_run_equals_the_uninterrupted_one(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = training.save_checkpoint

    def and_die(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if options["step"] == 4:
            raise KeyboardInterrupt

    chosen = small("arithmetic=full", "n_seeds=2", "task.steps=6", "task.accumulate=2")
    whole, a = run(tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(training, "save_checkpoint", and_die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", chosen)
    rest, b = run(tmp_path / "killed", chosen)
    assert sound(rest) == sound(whole) and curve(a) == curve(b)


def test_micro_batches_of_unlike_sentences_have_the_loss_of_the_batch(small: Any, tmp_path: Path) -> None:
    losses = []
    for parts in (1, 3):
        _, made = run(tmp_path / str(parts), small(f"task.accumulate={parts}", "task.steps=4"))
        losses.append([x for (x,) in curve(made)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(set(losses[0])) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=prose"], "data.inputs=text: must be a column of sentence pairs"),
        (["model.vocab=13"], "model.vocab=13: must be >= 14, the tokens of "),
        (["data.tokenizer=''"], "model.source_vocab=14: must be >= 260 for bytes, or set data.tokenizer"),
        (["data.tokenizer=nowhere"], "nowhere/de"),
        (["task.batch_tokens=3"], "task.batch_tokens=3: must be >= [5-7], the longest sentence"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(overrides: list[str], message: str, small: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "trial", small(*overrides))


def test_vocabularies_are_learnt_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"data.path={folder / 'data'}", "model.vocab=14", "model.source_vocab=14"]
    assert vocabulary.main([str(tmp_path), *keys]) == 0
    assert len(re.findall("14 tokens", capsys.readouterr().out)) == 2 and (tmp_path / "de").is_dir()
    assert vocabulary.main([]) == 2 and "mulfree_training.tasks.vocabulary" in capsys.readouterr().out
