"""Every data set of the paper trains and evaluates a tiny network, from local files with the hub set's schema."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.compose import Composer
from common.data import hub, tokens
from common.data.vocabulary import learn
from rotational_optimizers.config import TrialConfig
from rotational_optimizers.optimizers import build_optimizer
from rotational_optimizers.tasks import network, vocabulary
from rotational_optimizers.tasks.sources import Source, open_source

ROWS = 40
RESNET = ["model.channels=2", "model.stages=[1,1,1,1]", "model.expected_parameters=null"]
GPT = ["model.d_model=8", "model.n_layer=1", "model.n_head=2", "model.context=6", "model.expected_parameters=null"]
# data set -> the options that the paper's experiments use with it, made small
CASES: dict[str, list[str]] = {
    "cifar10": ["model=resnet20", "model.channels=2", "model.expected_parameters=null", "task=cifar"],
    "cifar100": ["model=preact_resnet18_ln_ws", *RESNET, "task=cifar", "optimizer=rv_sgdm"],
    "imagenet": ["model=resnet50", *RESNET, "task=imagenet", "task.image_size=32", "data.validation=0.1"],
    "wikitext": ["model=gpt_wikitext_gains", *GPT, "task=wikitext", "optimizer.exclude=[token,position]"],
    "openwebtext": ["model=gpt2_124m", *GPT, "task=gpt2", "data.validation=0.1", "data.test=0.1"],
    "iwslt14": [
        "model=transformer_iwslt_gains", "model.d_model=8", "model.d_hidden=8", "model.n_layer=1", "model.n_head=2",
        "model.expected_parameters=null", "task=translation", "task.batch_tokens=60", "optimizer=rv_adamw",
    ],
}  # fmt: skip
SMALL = ["task.batch_size=4", "task.accumulate=2", "task.eval_batch_size=7", "device=cpu", "task.evaluate=test"]


def picture(index: int) -> Image.Image:
    """One grey value a picture, of a size of its own; every third picture has a single channel."""
    size, value = (30 + index % 7, 34 - index % 5), 5 * index % 256
    return Image.new("L", size, value) if index % 3 == 0 else Image.new("RGB", size, (value,) * 3)


def rows_of(name: str, first: int) -> datasets.Dataset:
    """Rows of the hub set's schema."""
    span = range(first, first + ROWS)
    if name == "iwslt14":
        pairs = [{"de": "Satz " + "sehr " * (i % 5) + f"lang {i}", "en": f"sentence {i}"} for i in span]
        features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
        return datasets.Dataset.from_dict({"translation": pairs}, features=features)
    if name in ("wikitext", "openwebtext"):
        return datasets.Dataset.from_dict({"text": [f"line {i} of a longer text" for i in span]})
    column, label = "image" if name == "imagenet" else "img", "fine_label" if name == "cifar100" else "label"
    same = [Image.new("RGB", (32, 32), (5 * i % 256,) * 3) for i in span]
    images = [picture(i) for i in span] if name == "imagenet" else same
    columns: dict[str, Any] = {column: images, label: [i % 10 for i in span]}
    features = {column: datasets.Image(), label: datasets.Value("int64")}
    if name == "cifar100":
        columns["coarse_label"], features["coarse_label"] = [i % 20 for i in span], datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a set's parquet files, written once."""
    root = tmp_path_factory.mktemp("hub")

    def of(name: str) -> Path:
        splits = {"iwslt14": 3, "wikitext": 3, "openwebtext": 1}.get(name, 2)
        names = ("train", "validation" if name == "imagenet" else "test", "validation")[:splits]
        if not (root / name).exists():
            (root / name).mkdir()
            for i, split in enumerate(names):
                rows_of(name, 100 * i).to_parquet(root / name / f"{split}-00000-of-00001.parquet")
        return root / name

    return of


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved tokenizers: `text` for the language models, `pairs/de` and `pairs/en` for the translation."""
    root = tmp_path_factory.mktemp("tokenizers")
    learn([f"line {i} of a longer text" for i in range(300)], 60, root / "text")
    rows = rows_of("iwslt14", 0)["translation"]
    for language in ("de", "en"):
        learn([row[language] for row in rows], 60, root / "pairs" / language)
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no shared caches."""
    torch.set_num_threads(1)
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "tokens")


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer("rotational_optimizers", TrialConfig)


@pytest.fixture
def config_of(composer: Composer, folder: Callable[[str], Path], tokenizers: Path) -> Callable[..., TrialConfig]:
    def of(name: str, *overrides: str) -> TrialConfig:
        text = {"wikitext": "text", "openwebtext": "text", "iwslt14": "pairs"}
        own = [f"data={name}", f"data.path={folder(name)}", *CASES[name], *SMALL]
        if name in text:
            own += [f"data.tokenizer={tokenizers / text[name]}"]
        if name in ("wikitext", "openwebtext"):
            own += ["model.vocab=60"]
        if name == "iwslt14":
            own += ["model.source_vocab=60", "model.vocab=60"]
        return composer.config([*own, *overrides])

    return of


def opened(config: TrialConfig) -> tuple[Source, Any]:
    run = network.setup(1, "cpu", "fp32", config.task.accumulate, seed=0)
    return open_source(config, list(range(config.seed, config.seed + config.n_seeds)), run), run


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_seeds", [1, 2])
def test_a_step_of_training_lowers_the_loss_on_its_batch(
    config_of: Callable[..., TrialConfig], name: str, n_seeds: int
) -> None:
    config = config_of(name, f"n_seeds={n_seeds}", "optimizer.lr=0.003")
    source, run = opened(config)
    seeds = list(range(n_seeds))
    model = run.place(network.build(config.model, seeds)).eval()  # no dropout: both losses are of the same network
    optimizer = build_optimizer(config.optimizer, model, n_seeds)
    before = network._step(model, optimizer, source, run, 0, config.task)
    after = network._step(model, optimizer, source, run, 0, config.task)
    assert before.shape == after.shape == (n_seeds,)
    assert (after < before).all()
    metrics = network.evaluate(model, source, "test")
    assert len(metrics["loss"]) == n_seeds and all(map(math.isfinite, metrics["loss"]))
    assert all(0 <= accuracy <= 1 for accuracy in metrics["accuracy"])


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_images_reach_the_network_normalised_and_with_their_labels(
    config_of: Callable[..., TrialConfig], name: str
) -> None:
    """The middle of a picture of one grey value v is v after crop, shift and mirror; its label is v/5 mod 10."""
    config = config_of(name)
    source, _ = opened(config)
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    for batch in source.train_batches(0, 2):
        values = (batch.inputs[0][:, :, 16, 16] * std + mean) * 255  # (B, 3)
        grey = values.mean(1).round()
        assert torch.allclose(values, grey[:, None].expand(-1, 3), atol=1e-3)
        assert torch.equal((grey / 5).long() % 10, batch.targets[0])


def test_evaluation_sees_every_image_once_in_order(config_of: Callable[..., TrialConfig]) -> None:
    source, _ = opened(config_of("imagenet", "n_seeds=2"))
    labels = torch.cat([batch.targets for batch in source.eval_batches("test")], 1)
    assert torch.equal(labels, torch.tensor([i % 10 for i in range(100, 100 + ROWS)]).expand(2, -1))


def test_a_text_batch_holds_the_tokens_of_the_text(config_of: Callable[..., TrialConfig], tokenizers: Path) -> None:
    from transformers import AutoTokenizer

    source, _ = opened(config_of("wikitext"))
    batch = next(source.train_batches(0, 2))
    assert batch.inputs[0].shape == batch.targets.shape == (1, 2, 6)
    encoder = AutoTokenizer.from_pretrained(str(tokenizers / "text"), local_files_only=True)
    words = encoder.decode(batch.inputs[0][0, 0], skip_special_tokens=True).split()[1:-1]
    assert words and all(word in {"line", "of", "a", "longer", "text"} or word.isdigit() for word in words)


def test_a_stream_is_the_same_with_reading_workers(config_of: Callable[..., TrialConfig]) -> None:
    batches = []
    for threads in (1, 3):
        source, _ = opened(config_of("imagenet", f"threads={threads}"))
        batches.append([b for step in (0, 1) for b in source.train_batches(step, 2)])
    for alone, read in zip(*batches, strict=True):
        assert torch.equal(alone.inputs[0], read.inputs[0]) and torch.equal(alone.targets, read.targets)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("cifar10", ["task.evaluate=validation", "data.validation=0"], "data.validation=0 leaves no validation split"),
        ("cifar10", ["task.batch_size=5"], "task.batch_size=5: must be a multiple of 2 "),
        ("cifar10", ["task.batch_size=100"], "task.batch_size=100: must be <="),
        ("imagenet", ["task.batch_size=100"], r"task.train_samples=None: must be in \[100, 36\]"),
        ("imagenet", ["task.image_size=null"], "images differ in size"),
        ("imagenet", ["task.augment=deit", "task.batch_size=2"], "task.augment=deit: mixes pairs"),
        ("wikitext", ["data.tokenizer=''"], "model.vocab=60: the text has 256 tokens .bytes: set data.tokenizer"),
        ("wikitext", ["model.vocab=20"], "model.vocab=20: the text has .* tokens .data.tokenizer="),
        ("iwslt14", ["model.vocab=20"], "model.vocab=20: must be >= "),
        ("iwslt14", ["data.tokenizer=''"], "model.source_vocab=60: must be >= 260 for bytes, or set data.tokenizer"),
        ("iwslt14", ["task.batch_tokens=null"], "task.batch_tokens=null: must be > 0"),
        ("iwslt14", ["task.batch_tokens=3"], "task.batch_tokens=3: must be >= .*, the longest sentence"),
        ("iwslt14", ["task.train_samples=41"], r"task.train_samples=41: must be in \[1, 40\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    config_of: Callable[..., TrialConfig], name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        opened(config_of(name, *overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wikitext", "iwslt14"])
def test_a_missing_tokenizer_is_named(config_of: Callable[..., TrialConfig], name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: 'nowhere"):
        opened(config_of(name, "data.tokenizer=nowhere"))


def test_text_is_no_column_of_sentence_pairs(
    config_of: Callable[..., TrialConfig], folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match="data.inputs=text: must be a column of sentence pairs"):
        opened(config_of("iwslt14", "data=wikitext", f"data.path={folder('wikitext')}"))


def test_a_tokenizer_that_pads_with_another_id_is_refused(
    config_of: Callable[..., TrialConfig], tokenizers: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    for language in ("de", "en"):
        other = AutoTokenizer.from_pretrained(str(tokenizers / "pairs" / language), local_files_only=True)
        other.pad_token = "<unk>"
        other.save_pretrained(str(tmp_path / language))
    with pytest.raises(ValueError, match="padding and end must have ids 1 and 2, not 3 and 2"):
        opened(config_of("iwslt14", f"data.tokenizer={tmp_path}"))


def test_vocabularies_are_learnt_from_the_command_line(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    assert vocabulary.main([str(tmp_path / "t"), f"data.path={folder('iwslt14')}", "model.vocab=40"]) == 0
    assert "40 tokens" in capsys.readouterr().out
    encoder = AutoTokenizer.from_pretrained(str(tmp_path / "t" / "en"), local_files_only=True)
    assert (encoder.bos_token_id, encoder.pad_token_id, encoder.eos_token_id, encoder.unk_token_id) == (0, 1, 2, 3)
    assert encoder.decode(encoder("sentence 7", add_special_tokens=False)["input_ids"]) == "sentence 7"
    assert vocabulary.main([str(tmp_path / "t"), f"data.path={tmp_path / 'nowhere'}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert vocabulary.main([]) == 2


class FakeTimm:
    """timm's two entry points: they draw from the global generators, as timm's do."""

    @staticmethod
    def create_transform(size: int, **options: Any) -> Callable[[Image.Image], torch.Tensor]:
        assert options["is_training"] and options["auto_augment"].startswith("rand-m9") and options["re_prob"] == 0.25
        return lambda image: torch.full((3, size, size), float(np.random.rand() + torch.rand(())))

    @staticmethod
    def Mixup(**options: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        assert (options["mixup_alpha"], options["cutmix_alpha"]) == (0.8, 1.0)

        def mix(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            share, one_hot = np.random.rand(), torch.nn.functional.one_hot(y, options["num_classes"]).float()
            return share * x + (1 - share) * x.flip(0), share * one_hot + (1 - share) * one_hot.flip(0)

        return mix


def test_deit_mixes_pairs_and_leaves_the_global_generators_alone(
    config_of: Callable[..., TrialConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.data.crops._timm", lambda: FakeTimm)
    source, _ = opened(config_of("imagenet", "task.augment=deit", "n_seeds=2"))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = list(source.train_batches(3, 2))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    again = list(source.train_batches(3, 2))
    for one, two in zip(first, again, strict=True):
        assert one.inputs[0].shape == (2, 6, 32, 32) and one.targets.shape == (2, 2, 1000)
        assert torch.equal(one.inputs[0], two.inputs[0]) and torch.equal(one.targets, two.targets)
        assert torch.allclose(one.targets.sum(-1), torch.ones(2, 2))
        assert (one.targets.max(-1).values < 1).any()  # something was mixed
    assert not torch.equal(first[0].inputs[0][:, :3], first[0].inputs[0][:, 3:])  # each network mixes for itself


def test_deit_without_timm_names_the_package(
    config_of: Callable[..., TrialConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"task.augment=deit: needs the package timm .pip install timm."):
        opened(config_of("imagenet", "task.augment=deit"))


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "iwslt14"])
def test_a_trial_gives_the_same_numbers_twice(config_of: Callable[..., TrialConfig], name: str, tmp_path: Path) -> None:
    """Dropout, crops and order are functions of the config."""
    config = config_of(name, "task.epochs=null", "task.steps=3", "task.clip_norm=0.5", "task.label_smoothing=0.1")
    trial = SimpleNamespace(folder=tmp_path, log=lambda *_, **__: None, progress=lambda *_: None)
    rows = [network.run(config, trial) for _ in range(2)]  # type: ignore[arg-type]
    assert rows[0] == rows[1] and not rows[0][0]["diverged"]
