"""Hub sets: pinned, checked, quick to say that there is no network, and runnable on a folder of the same schema."""

import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from common import network
from common.data import DataConfig, DataUnavailableError, hub, load, normalise, tensors

CONF = Path(__file__).parents[1] / "conf" / "data"
HUB = [path.stem for path in sorted(CONF.glob("*.yaml")) if "source: hub" in path.read_text()]


def config(name, **changes):
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{name}.yaml"), changes)
    return OmegaConf.to_object(merged)


SHAPES = {"mnist": (28, 28)}  # one channel: PIL's mode L


def picture(index, shape):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8))


def rows_of(name, count, first=0):
    """Rows with the hub set's schema."""
    c, span = config(name), range(first, first + count)
    if name == "iwslt14":
        return {"translation": [{"de": f"Satz {i}", "en": f"sentence {i}"} for i in span]}
    if not c.label:
        return {"text": [f"line {i} of a text" for i in span]}
    columns = {
        c.inputs: [picture(i, SHAPES.get(name, (32, 32, 3))) for i in span],
        c.label: [i % c.classes for i in span],
    }
    return columns | ({"coarse_label": [i % 20 for i in span]} if name == "cifar100" else {})


def features_of(name):
    c = config(name)
    if not c.label:
        return None
    extra = {"coarse_label": datasets.Value("int64")} if name == "cifar100" else {}
    return datasets.Features({c.inputs: datasets.Image(), c.label: datasets.Value("int64")} | extra)


@pytest.fixture
def fixture_folder(tmp_path):
    def make(name, fmt="parquet"):
        c = config(name)
        for i, split in enumerate(c.sizes):
            theirs = c.split_names.get(split, split)
            data = datasets.Dataset.from_dict(rows_of(name, 40, first=100 * i), features=features_of(name))
            if fmt == "parquet":
                data.to_parquet(tmp_path / f"{theirs}-00000-of-00001.parquet")
            elif fmt == "json":
                data.to_json(tmp_path / f"{theirs}.jsonl")
        return str(tmp_path)

    return make


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))


@pytest.mark.parametrize("name", HUB)
def test_hub_set_runs_on_a_folder_of_its_schema(name, fixture_folder, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    held = {"validation": 0.1} if config(name).validation < 0.01 else {}
    splits = load(config(name, path=fixture_folder(name), **held))
    c = config(name)
    assert set(splits) == {"train", "validation", "test"}
    if not c.label:
        return
    values = tensors(splits["train"], [c.inputs, c.label])
    images = normalise(values[c.inputs], c.mean, c.std)
    channels, side = (1, 28) if name == "mnist" else (3, 32)
    assert images.shape == (len(splits["train"]), channels, side, side) and images.dtype == torch.float32
    # uniform noise has mean 1/2 and standard deviation 1/sqrt(12) in every channel
    wanted = (0.5 - torch.tensor(c.mean)) / torch.tensor(c.std)
    assert torch.allclose(images.mean((0, 2, 3)), wanted, atol=0.05)
    assert values[c.label].min() >= 0 and values[c.label].max() < c.classes


def test_hub_folder_may_hold_json(fixture_folder, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    splits = load(config("wikitext", path=fixture_folder("wikitext", "json")))
    assert splits["test"]["text"][0] == "line 200 of a text"


def test_imagenet_is_tested_on_its_validation_split(fixture_folder, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    splits = load(config("imagenet", path=fixture_folder("imagenet"), validation=0.1))
    assert sorted(splits["test"]["label"]) == list(range(100, 140))
    assert {key: len(split) for key, split in splits.items()} == {"train": 36, "validation": 4, "test": 40}


def test_bad_labels_in_a_hub_folder_are_named(fixture_folder, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"data.classes=5: labels of cifar10/train span"):
        load(config("cifar10", path=fixture_folder("cifar10"), classes=5))


def test_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(config("cifar10", path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"must hold train\*\.parquet"):
        load(config("cifar10", path=str(tmp_path)))


def test_no_network_is_one_quick_line_that_names_the_embedded_set(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    network.answers.cache_clear()
    start = time.monotonic()
    with pytest.raises(DataUnavailableError) as caught:
        load(config("cifar10"))
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert "\n" not in message
    assert "uoft-cs/cifar10" in message and "no network" in message and "data=mnist1d" in message
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_pinned_revision_is_what_is_asked_for(monkeypatch):
    asked = {}

    def load_dataset(repository, **arguments):
        asked.update(arguments, repository=repository)
        raise PermissionError("gated repo")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataUnavailableError, match="accept its terms"):
        load(config("imagenet"))
    assert asked == {"repository": "ILSVRC/imagenet-1k", "revision": config("imagenet").revision}


def test_hub_sets_must_be_pinned():
    with pytest.raises(ValueError, match=r"data.revision='': must be a pinned commit"):
        config("cifar10", revision="")


def test_wrong_size_of_a_hub_set_is_named(monkeypatch):
    small = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a", "b"]}))
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: small)
    with pytest.raises(ValueError, match=r"data.sizes.train=8013769: openwebtext has 2 rows"):
        load(config("openwebtext"))
