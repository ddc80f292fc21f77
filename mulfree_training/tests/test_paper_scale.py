"""`scale=paper` states the paper's set-up: it composes, networks have the known sizes, and its data paths train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.data import hub
from common.data.vocabulary import learn
from common.tests.planners import Ends
from common.training import setup
from mulfree_training.config import ModelConfig
from mulfree_training.networks.build import build
from mulfree_training.tasks.images import Memory, open_images
from mulfree_training.tasks.stream import Stream
from mulfree_training.tasks.training import own_rows
from mulfree_training.tests.trials import QUIET, config, curve, pairs, pictures, run, sentences, sound, write
from mulfree_training.train import main

Config = dict[str, Any]
ROWS = {"cifar10": 50_000, "imagenet": 1_281_167}
"""Rows of the training splits, from the sets' cards."""
FREE = ("standard", "matmul", "softmax", "norm", "loss", "full")
"""Arms of the translation: their number of parameters hangs on the vocabularies."""
TRAININGS = ("vision", "convolution", "imagenet", "translation")
VIT = [
    "model.image_size=32", "model.patch_size=8", "model.d_model=8", "model.n_layer=1", "model.n_head=2",
    "model.d_hidden=8", "model.expected_parameters=null", "task.upsample=32",
]  # fmt: skip
PAIRS = ["model.d_model=8", "model.n_layer=1", "model.n_head=2", "model.d_hidden=8", "task.batch_tokens=60"]
SMALL = [*QUIET, "max_steps=3", "task.accumulate=2", "optimizer.warmup=1"]
IMAGES = ["task.epochs=2", "task.batch_size=8", "task.eval_batch_size=7"]


@pytest.fixture(scope="module")
def plans() -> dict[str, list[Config]]:
    planner = Ends(main, None, "paper")
    return {e: [job.config for job in planner.plan(e)] for e in planner.composer.experiments()}


def by_arm(plans: dict[str, list[Config]], experiment: str) -> dict[str, Config]:
    return {config["arm"]: config for config in plans[experiment]}


def count(values: Config) -> int:
    with torch.device("meta"):
        model = build(ModelConfig(**values), 0)
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


def deit(classes: int) -> int:
    d, tokens, patch = 192, 197, 3 * 16 * 16
    block = 3 * d * d + 3 * d + d * d + d + 2 * 768 * d + 768 + d + 4 * d
    return patch * d + d + d + tokens * d + 12 * block + 2 * d + classes * (d + 1)


def iwslt(source: int, target: int) -> int:
    d, hidden = 512, 1024
    attention, feed, norm = 4 * d * d + 4 * d, 2 * d * hidden + hidden + d, 2 * d
    return (source + target) * d + 6 * (attention + feed + 2 * norm) + 6 * (2 * attention + feed + 3 * norm)


def test_every_network_has_its_number_of_parameters(plans: dict[str, list[Config]]) -> None:
    found = {}
    for experiment in TRAININGS:
        for arm, c in by_arm(plans, experiment).items():
            found[experiment, arm] = count(c["model"])
            known = c["model"]["expected_parameters"]
            assert known == found[experiment, arm] or (known is None and arm.startswith(("resnext", *FREE)))
    assert found["imagenet", "standard"] == deit(1000) == 5_717_416  # the known count of the architecture
    assert found["vision", "matmul"] == deit(10) == 5_526_346
    assert found["translation", "full"] == iwslt(8848, 6632) == 39_469_056
    assert found["convolution", "resnet20"] == 272_282 and found["convolution", "convmixer"] == 594_186
    assert len(found) == 2 + 10 + 2 + 6


def test_another_number_of_parameters_is_refused() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="model.expected_parameters=5717416: the network has 5716451 parameters"),
    ):
        build(config("model=deit_tiny", "model.classes=995").model, 0)


def test_networks_are_the_papers(plans: dict[str, list[Config]]) -> None:
    for experiment, classes in (("vision", 10), ("imagenet", 1000)):
        for c in plans[experiment]:
            m = c["model"]
            assert (m["classes"], m["d_model"], m["n_layer"], m["n_head"], m["d_hidden"]) == (classes, 192, 12, 3, 768)
            assert (m["image_size"], m["patch_size"], m["drop_path"], m["activation"]) == (224, 16, 0.1, "gelu")
    for c in plans["translation"]:
        m = c["model"]
        assert (m["d_model"], m["n_layer"], m["n_head"], m["d_hidden"], m["dropout"]) == (512, 6, 4, 1024, 0.3)
        assert m["activation"] == "relu"


def test_trainings_are_the_papers(plans: dict[str, list[Config]]) -> None:
    for experiment, rows, epochs, batch, lr in (
        ("vision", ROWS["cifar10"], 600, 256, 5e-4),
        ("imagenet", ROWS["imagenet"], 300, 1152, 5e-4 * 1152 / 512),
    ):
        for c in plans[experiment]:
            task, o = c["task"], c["optimizer"]
            assert (task["epochs"], task["batch_size"], task["augment"], task["upsample"]) == (
                epochs,
                batch,
                "deit",
                224,
            )
            assert (o["lr"], o["weight_decay"], o["decay_all"], o["eps"]) == (pytest.approx(lr), 0.05, False, 1e-8)
            assert o["warmup"] == 5 * (rows // batch) and task["label_smoothing"] == 0.1
            ends = (o["lr"] * o["final"], o["lr"] * o["start"])
            assert ends == (pytest.approx(1e-5), pytest.approx(1e-6))  # timm does not scale them with the batch
            assert c["data"]["validation"] == 0 and task["evaluate"] == "test"
            assert task["deit"] == {
                "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "erasing": 0.25, "erasing_mode": "pixel",
                "mixup": 0.8, "cutmix": 1.0,
            }  # fmt: skip
    for c in plans["translation"]:
        task, o = c["task"], c["optimizer"]
        assert (task["steps"], task["batch_tokens"], task["label_smoothing"], task["beams"]) == (22_021, 4096, 0.1, 5)
        assert (task["length_factor"], task["length_extra"], task["accumulate"]) == (1.2, 10, 1)
        assert (task["select"], task["evaluate_every"]) == ("best", task["steps"] // 20)
        assert (o["lr"], o["weight_decay"], o["beta1"], o["beta2"], o["eps"]) == (5e-4, 1e-4, 0.9, 0.98, 1e-8)
        assert (o["warmup"], o["final"]) == (4000, 0)
    wanted = {
        "vgg13": (128, "sgd", 0.05, 5e-4, 200),
        "resnet20": (256, "sgd", 0.2, 2e-4, 200),
        "resnet110": (256, "sgd", 0.2, 2e-4, 200),
        "resnext20": (128, "sgd", 0.1, 5e-4, 200),
        "convmixer": (128, "adamw", 0.01, 0.05, 100),
    }
    arms = by_arm(plans, "convolution")
    for arm, (batch, name, lr, decay, epochs) in wanted.items():
        for c in (arms[arm], arms[f"{arm}_matmul"]):
            task, o = c["task"], c["optimizer"]
            assert (task["batch_size"], o["name"], o["lr"], o["weight_decay"]) == (batch, name, lr, decay)
            assert (task["epochs"], task["augment"], task["label_smoothing"], o["beta1"]) == (epochs, "crop", 0, 0.9)
            assert o["warmup"] == 5 * (ROWS["cifar10"] // batch)
    assert arms["convmixer"]["optimizer"]["eps"] == 1e-3


def test_arms_differ_in_arithmetic_alone_and_have_the_papers(plans: dict[str, list[Config]]) -> None:
    for experiment in ("vision", "imagenet", "translation"):
        arms = by_arm(plans, experiment)
        assert (
            len({repr({k: c[k] for k in ("task", "data", "model", "optimizer", "seed")}) for c in arms.values()}) == 1
        )
        for arm, c in arms.items():
            a = c["arithmetic"]
            assert (a["kind"] == "pam") == (arm != "standard") and a["derivative"] == "approx" and a["alpha"] is None
    rows = [c["arithmetic"] for c in by_arm(plans, "translation").values()]
    assert [len(a["scope"]) for a in rows] == [0, 1, 2, 3, 4, 5]
    assert [a["lse_log2"] for a in rows] == [None] * 4 + ["exact"] * 2
    arms = by_arm(plans, "convolution")
    for arm in [arm for arm in arms if not arm.endswith("_matmul")]:
        plain, pam = (
            {k: c[k] for k in ("task", "data", "model", "optimizer")} for c in (arms[arm], arms[f"{arm}_matmul"])
        )
        assert plain == pam and arms[f"{arm}_matmul"]["arithmetic"]["scope"] == ["matmul"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the schemas of the three hub sets, and tokenizers."""
    root = tmp_path_factory.mktemp("hub")
    write(root / "cifar10", train=pictures(40), test=pictures(20, 100))
    sized = {"column": "image", "sizes": True}
    write(root / "imagenet", train=pictures(40, **sized), validation=pictures(20, 100, **sized))
    splits = {"train": sentences(60), "validation": sentences(10, 1), "test": sentences(12, 2)}
    write(root / "iwslt14", **{name: pairs(rows) for name, rows in splits.items()})
    for language in ("de", "en"):
        learn([row[language] for row in splits["train"]], 14, root / "tokens" / language)
    return root


@pytest.fixture
def paper(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Makes a small config of a data set's paper experiment; no network, no shared caches, a stand-in for timm."""
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("common.data.crops._timm", lambda: FakeTimm)
    own = {
        "cifar10": ["task=images", "task.augment=deit", "model=deit_tiny_cifar10", *VIT, *IMAGES, "data.validation=0"],
        "imagenet": ["task=images", "task.augment=deit", "model=deit_tiny", *VIT, *IMAGES, "data.validation=0"],
        "iwslt14": [
            "task=translation", "model=transformer_iwslt", "optimizer=adamw_iwslt", *PAIRS, "model.vocab=14",
            "model.source_vocab=14", f"data.tokenizer={folder / 'tokens'}",
        ],
    }  # fmt: skip
    return lambda name, *overrides: config(
        "scale=paper",
        f"data={name}",
        f"data.path={folder / name}",
        *own[name],
        *SMALL,
        "task.evaluate=test",
        *overrides,
    )


class FakeTimm:
    """timm's two entry points: they draw from the global generators, as timm's do."""

    @staticmethod
    def create_transform(size: int, **options: Any) -> Callable[[Image.Image], torch.Tensor]:
        assert options["is_training"] and options["auto_augment"].startswith("rand-m9") and options["re_prob"] == 0.25
        assert options["auto_augment"] == "rand-m9-mstd0.5-inc1"
        assert (options["color_jitter"], options["re_mode"]) == (0.3, "pixel")
        assert options["interpolation"] == "bicubic" and len(options["mean"]) == len(options["std"]) == 3

        def transform(image: Image.Image) -> torch.Tensor:
            value = float(np.asarray(image)[0, 0, 0])
            return torch.full((3, size, size), value + float(np.random.rand() + torch.rand(())) / 10)

        return transform

    @staticmethod
    def Mixup(**options: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        assert (options["mixup_alpha"], options["cutmix_alpha"]) == (0.8, 1.0) and not options["label_smoothing"]

        def mix(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            share, one_hot = np.random.rand(), torch.nn.functional.one_hot(y, options["num_classes"]).float()
            return share * x + (1 - share) * x.flip(0), share * one_hot + (1 - share) * one_hot.flip(0)

        return mix


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "iwslt14"])
@pytest.mark.parametrize("arm", ["standard", "matmul"])
def test_the_papers_data_paths_train(name: str, arm: str, paper: Any, tmp_path: Path) -> None:
    chosen = paper(name, f"arithmetic={arm}", "n_seeds=2")
    rows, made = run(tmp_path / "trial", chosen)
    assert [row["seed"] for row in rows] == [0, 1] and not any(row["diverged"] for row in rows)
    assert len(curve(made)) == 3 and all(math.isfinite(x) for step in curve(made) for x in step)
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    again, _ = run(tmp_path / "again", chosen)
    assert sound(again) == sound(rows)  # dropout, crops and order are functions of the config


@pytest.mark.parametrize("model", ["vgg13", "preact_resnet20", "resnext20", "convmixer"])
def test_convolutional_networks_train_on_cropped_images(model: str, paper: Any, tmp_path: Path) -> None:
    base = ["scale=paper", "data=cifar10", f"model={model}", "model.expected_parameters=null", "optimizer=sgd"]
    size = {"vgg13": ["model.layout=[4,0,8]"], "preact_resnet20": ["model.depth=8", "model.channels=4"]}
    size |= {"resnext20": ["model.depth=11", "model.channels=8"], "convmixer": ["model.depth=1", "model.channels=8"]}
    path = paper("cifar10").data.path
    own = [*base, *size[model], f"data.path={path}", "data.validation=0.1", *IMAGES, *SMALL, "task.augment=crop"]
    rows, made = run(tmp_path, config(*own, "arithmetic=matmul", "task.evaluate=test", "optimizer.lr=0.01"))
    assert not rows[0]["diverged"] and len(curve(made)) == 3 and 0 < rows[0]["temperature"] != 1


def opened(chosen: Any, rank: int = 0, world: int = 1) -> Memory | Stream:
    seeds = list(range(chosen.seed, chosen.seed + chosen.n_seeds))
    if world == 1:
        return open_images(chosen, seeds, setup(1, "cpu", accumulate=chosen.task.accumulate))
    processes: Any = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    return open_images(chosen, seeds, processes)


def parts_of(source: Any, steps: int, seeds: int = 1) -> list[Any]:
    """Everything that a run asks for, in its order."""
    parts = source.config.task.accumulate
    return [
        source(seed, step).rows(own_rows(source.run, part, parts))
        for step in range(steps)
        for part in range(parts)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_images_reach_the_network_normalised_and_with_their_labels(augment: str, paper: Any) -> None:
    """The middle of a picture of one grey value v is v after crop and mirror; its label is v / 5 mod 10."""
    chosen = paper("imagenet", f"task.augment={augment}")
    source = opened(chosen)
    assert isinstance(source, Stream) and source.steps_per_epoch == 5
    mean, std = torch.tensor(chosen.data.mean), torch.tensor(chosen.data.std)
    seen = []
    for batch in parts_of(source, 3):
        assert batch.inputs[0].shape == (4, 3, 32, 32)
        values = (batch.inputs[0][:, :, 16, 16] * std + mean) * 255  # (B, 3)
        grey = values.mean(1).round()
        assert torch.allclose(values, grey[:, None].expand(-1, 3), atol=1e-3)
        assert torch.equal((grey / 5).long() % 10, batch.target)
        seen += grey.tolist()
    assert len(set(seen)) == 24  # no image twice in an epoch


def test_evaluation_sees_every_image_once_in_order(paper: Any) -> None:
    for name in ("imagenet", "cifar10"):
        chosen = paper(name)
        parts = list(opened(chosen).held_out("test"))
        assert torch.equal(torch.cat([y for _, y in parts]), torch.tensor([i % 10 for i in range(100, 120)]))
        assert [len(x) for x, _ in parts] == [7, 7, 6] and all(x.shape[1:] == (3, 32, 32) for x, _ in parts)


def test_deit_mixes_pairs_and_leaves_the_global_generators_alone(paper: Any) -> None:
    source = opened(paper("imagenet", "n_seeds=2"))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = parts_of(source, 2, 2)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    for one, two in zip(first, parts_of(source, 2, 2), strict=True):
        assert torch.equal(one.inputs[0], two.inputs[0]) and torch.equal(one.target, two.target)
        assert one.inputs[0].shape == (4, 3, 32, 32) and one.target.shape == (4, 1000)
        assert torch.allclose(one.target.sum(-1), torch.ones(4)) and (one.target.max(-1).values < 1).any()
    assert not torch.equal(first[0].inputs[0], first[1].inputs[0])  # each network has its own


def test_the_augmentation_is_the_configs(paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    fake = SimpleNamespace(
        create_transform=lambda size, **options: seen.append(options), Mixup=lambda **options: seen.append(options)
    )
    monkeypatch.setattr("common.data.crops._timm", lambda: fake)
    opened(paper("imagenet", "task.deit.erasing=0.5", "task.deit.auto_augment=null", "task.deit.mixup=0.2"))
    assert (seen[0]["re_prob"], seen[0]["auto_augment"], seen[0]["color_jitter"]) == (0.5, None, 0.3)
    assert (seen[1]["mixup_alpha"], seen[1]["cutmix_alpha"], seen[1]["num_classes"]) == (0.2, 1.0, 1000)
    source = opened(paper("imagenet", "task.deit.mixup=0", "task.deit.cutmix=0"))
    assert isinstance(source, Stream) and source.mix is None and len(seen) == 3


def test_every_image_comes_once_an_epoch_in_a_new_order_and_no_crop_comes_twice(paper: Any) -> None:
    source = opened(paper("imagenet", "max_steps=10", "task.accumulate=1"))
    assert isinstance(source, Stream)
    items = [item for part in source._plan(0) for item in part]
    rows = [row for row, _ in items]
    assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40)) and rows[:40] != rows[40:]
    assert len({seed for _, seed in items}) == 80


def test_no_two_parts_are_mixed_alike(paper: Any) -> None:
    """The share of a mix is drawn anew for every step, micro-batch and process."""
    chosen = paper("imagenet")
    parts = [part for rank in range(2) for part in parts_of(opened(chosen, rank, 2), 3)]
    assert len({round(float(part.target.max()), 6) for part in parts}) == len(parts) == 12


@pytest.mark.parametrize("augment", ["crop", "deit"])
def test_a_stream_is_the_same_with_workers_and_resumes_at_any_step(augment: str, paper: Any) -> None:
    whole = parts_of(opened(paper("imagenet", f"task.augment={augment}")), 3)
    read = parts_of(opened(paper("imagenet", f"task.augment={augment}", "threads=3")), 3)
    late = opened(paper("imagenet", f"task.augment={augment}"))
    rest = [late(0, 2).rows(own_rows(late.run, part, 2)) for part in range(2)]  # type: ignore[union-attr]
    for one, two in zip([*whole, *whole[4:]], [*read, *rest], strict=True):
        assert torch.equal(one.inputs[0], two.inputs[0]) and torch.equal(one.target, two.target)


def test_processes_and_parts_partition_the_batch(paper: Any) -> None:
    def images(source: Any) -> list[tuple[float, int]]:
        batches = parts_of(source, 1)
        sums = torch.cat([b.inputs[0].sum((1, 2, 3)) for b in batches]).tolist()
        return list(zip(sums, torch.cat([b.target for b in batches]).tolist(), strict=True))

    chosen = paper("imagenet", "task.augment=crop")
    whole = images(opened(chosen))
    shards = [image for rank in range(2) for image in images(opened(chosen, rank, 2))]
    assert sorted(shards) == sorted(whole) and len(set(whole)) == 8


def test_only_the_rows_of_a_micro_batch_can_be_read(paper: Any) -> None:
    source = opened(paper("imagenet"))
    with pytest.raises(ValueError, match="must be the rows of a micro-batch of this process"):
        source(0, 0).rows(slice(0, None, 1))
    odd = paper("imagenet", "task.batch_size=6")
    with pytest.raises(
        ValueError, match=r"task.batch_size=6: must be a multiple of 2 \* task.accumulate=2 \* 1 process"
    ):
        opened(odd)
