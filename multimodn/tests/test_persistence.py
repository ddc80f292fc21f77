"""Saved models: bitwise the same after loading, nothing unknown is built, a killed write leaves the older model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from multimodn import (
    ClassDecoder,
    ConvEncoder,
    GRUEncoder,
    HuggingFaceEncoder,
    MLPEncoder,
    MultiLabelDecoder,
    MultiModN,
    PFusion,
    RawEncoder,
    RegressionDecoder,
    TransformerEncoder,
    load,
    persistence,
    register,
    save,
    stack,
    unstack,
)
from multimodn.tests import networks

S, B = 6, 5


class Scale(nn.Module):
    """A user's encoder, built by keywords."""

    def __init__(self, state_size: int, factor: float = 1.0) -> None:
        super().__init__()
        self.state_size, self.factor = state_size, factor
        self.gain = nn.Parameter(torch.randn(state_size))

    @property
    def config(self) -> dict[str, Any]:
        return {"state_size": self.state_size, "factor": self.factor}

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return state + self.factor * self.gain * x.mean(-1, keepdim=True)


class Built(Scale):
    """Another, built by `from_config`."""

    @property
    def config(self) -> dict[str, Any]:
        return {"sizes": [self.state_size]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Built:
        return cls(config["sizes"][0], 2.0)


class Plain(nn.Module):
    """Without a config."""

    state_size = S

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return state


class Odd(Scale):
    """With a config that is not fit for JSON."""

    @property
    def config(self) -> dict[str, Any]:
        return {"state_size": torch.tensor(self.state_size)}


class Typed(Scale):
    """With a config whose key is taken."""

    @property
    def config(self) -> dict[str, Any]:
        return {"type": "x"}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(persistence, "_known", dict(persistence._known))


def hugging_face(kind: str) -> HuggingFaceEncoder:
    from transformers import AutoModel, BertConfig, ViTConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = kind == "tokens"
    settings = BertConfig(vocab_size=9, **sizes) if text else ViTConfig(image_size=8, patch_size=4, **sizes)
    return HuggingFaceEncoder(AutoModel.from_config(settings), S, kind=kind, pool="mean", freeze=text)


def every_encoder() -> dict[str, nn.Module]:
    return {
        "mlp": MLPEncoder(3, S, (7,), 0.1, "output"),
        "gru": GRUEncoder(2, S, 4, layers=2, dropout=0.2, cell="lstm"),
        "transformer": TransformerEncoder(2, S, 8, 2, max_length=9),
        "conv": ConvEncoder(3, S, (4, 8)),
        "bert": hugging_face("tokens"),
        "vit": hugging_face("pixels"),
        "raw": RawEncoder(S),
    }


def every_input() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    steps, images = torch.randn(B, 4, 2, generator=rng), torch.randn(B, 3, 8, 8, generator=rng)
    x = {
        "mlp": torch.randn(B, 3, generator=rng),
        "gru": steps,
        "transformer": steps,
        "conv": images,
        "bert": torch.randint(9, (B, 4), generator=rng).float(),
        "vit": images,
        "raw": torch.randn(B, S, generator=rng),
    }
    x["mlp"][1] = torch.nan
    return x


def decoders(width: int) -> dict[str, nn.Module]:
    return {
        "which": ClassDecoder(width, 3, (4,), "sigmoid"),
        "labels": MultiLabelDecoder(width, 2, ()),
        "value": RegressionDecoder(width, (5, 4)),
    }


def every_kind(name: str, **options: Any) -> MultiModN | PFusion:
    torch.manual_seed(0)
    if name == "PFusion":
        encoders = every_encoder()
        return PFusion(encoders, decoders(S * len(encoders) + len(encoders)), indicator=True, **options)
    return MultiModN(every_encoder(), decoders(S), S, **options)


def same(found: Any, model: Any, x: Any) -> bool:
    a, b = found.eval()(x), model.eval()(x)
    outputs = a.outputs.keys() == b.outputs.keys() and all(torch.equal(a.outputs[t], b.outputs[t]) for t in a.outputs)
    return outputs and torch.equal(a.states, b.states) and torch.equal(a.present, b.present)


@pytest.mark.parametrize("name", ["MultiModN", "PFusion"])
def test_grids_are_bitwise_the_same(name: str, tmp_path: Path) -> None:
    model = every_kind(name, missing="batch")
    assert save(model, tmp_path / "a" / "model") == tmp_path / "a" / "model"
    before = torch.get_rng_state()
    twin = load(tmp_path / "a" / "model")
    assert torch.equal(torch.get_rng_state(), before), "loading draws nothing"
    assert type(twin) is type(model) and twin.missing == "batch" and not twin.training
    assert twin.modalities == model.modalities and twin.tasks == model.tasks
    for one, other in zip([*twin.encoders.values(), *twin.decoders.values()],
                          [*model.encoders.values(), *model.decoders.values()], strict=True):  # fmt: skip
        assert type(one) is type(other) and one.config == other.config
    assert same(twin, model, every_input())
    assert not any(p.requires_grad for p in twin.encoders["bert"].backbone.parameters())
    assert sorted(p.name for p in (tmp_path / "a" / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model"]


def test_the_config_says_what_the_model_is_made_of(tmp_path: Path) -> None:
    model = networks.multimodn()
    config = json.loads((save(model, tmp_path / "m") / "config.json").read_text())
    assert list(config) == [
        "type", "state_size", "missing", "initial_state_trained", "encoders", "decoders", "indicator",
    ]  # fmt: skip
    assert config["type"] == "MultiModN" and config["state_size"] == networks.S and config["initial_state_trained"]
    assert config["encoders"]["a"] == {"type": "MLPEncoder", **model.encoders["a"].config}
    assert list(config["encoders"]) == list(model.modalities) and config["indicator"] is None
    config = json.loads((save(networks.pfusion(indicator=True), tmp_path / "p") / "config.json").read_text())
    assert config["indicator"] is True and config["state_size"] is None and config["initial_state_trained"] is None


def test_a_fixed_initial_state_stays_fixed(tmp_path: Path) -> None:
    start = torch.arange(S, dtype=torch.float32)
    model = MultiModN({}, {"yes": ClassDecoder(S)}, S, initial_state=start)
    twin = load(save(model, tmp_path / "m"))
    assert torch.equal(twin.initial_state, start) and "initial_state" not in dict(twin.named_parameters())
    trained = load(save(networks.multimodn(), tmp_path / "t"))
    assert isinstance(trained.initial_state, nn.Parameter) and trained.initial_state.requires_grad


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    model = networks.multimodn().double()
    twin = load(save(model, tmp_path / "m"))
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert same(twin, model, networks.batch())


def test_a_loaded_model_learns_as_the_saved_one(tmp_path: Path) -> None:
    model = networks.multimodn()
    twin = load(save(model, tmp_path / "m"))
    losses = []
    for net in (model, twin):
        net.train()
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(3):
            loss = net.loss(net(networks.batch()), networks.targets())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", [Scale, Built])
def test_a_registered_encoder(kind: type[Scale], tmp_path: Path) -> None:
    model = MultiModN({"own": kind(S, 2.0)}, {"yes": ClassDecoder(S)}, S)
    with pytest.raises(ValueError, match=f"encoders.own={kind.__name__}: must be one of ClassDecoder, .*register"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert register(kind) is kind and register(kind) is kind
    save(model, tmp_path / "m")
    assert same(load(tmp_path / "m"), model, {"own": torch.randn(B, 3)})
    del persistence._known[kind.__name__]
    with pytest.raises(ValueError, match=f"encoders.own.type={kind.__name__}: must be one of ClassDecoder, .*register"):
        load(tmp_path / "m")


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="cls=Plain: must be a module class with a property config"):
        register(Plain)
    impostor = type("MLPEncoder", (Scale,), {})
    with pytest.raises(ValueError, match="MLPEncoder is taken by multimodn.encoders.mlp"):
        register(impostor)
    again = type("Scale", (Scale,), {"__qualname__": "Scale"})
    register(Scale)
    assert register(again) is again and persistence._known["Scale"] is again


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    stacked = stack([networks.multimodn(0), networks.multimodn(1)])
    with pytest.raises(ValueError, match="model=a stack of 2: must be one model; save each that `unstack` gives"):
        save(stacked, tmp_path / "m")
    assert same(load(save(unstack(stacked)[1], tmp_path / "one")), networks.multimodn(1), networks.batch())
    with pytest.raises(ValueError, match="model=Linear: must be one of MultiModN, PFusion"):
        save(nn.Linear(2, 2), tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model=Own: must be one of"):
        save(type("Own", (MultiModN,), {})({}, {"yes": ClassDecoder(S)}, S), tmp_path / "m")
    for kind, message in ((Odd, "fit for JSON"), (Typed, "without the key type")):
        register(kind)
        with pytest.raises(ValueError, match=f"encoders.x.config.*{message}"):
            save(MultiModN({"x": kind(S)}, {"yes": ClassDecoder(S)}, S), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_folders_with_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new folder, .*; it has notes.txt"):
        save(networks.multimodn(), tmp_path)
    with pytest.raises(ValueError, match="must be a new folder"):
        save(networks.multimodn(), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    save(networks.multimodn(), tmp_path / "empty")


def test_folders_that_are_not_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a saved model is a folder with config.json and model.safetensors"):
        load(tmp_path / "none")
    folder = save(networks.multimodn(), tmp_path / "m")
    text = (folder / "config.json").read_text()

    def edited(change: Any) -> None:
        config = json.loads(text)
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    for change, message in (
        (lambda c: c.update(type="Chain"), "type=Chain: must be one of MultiModN, PFusion"),
        (lambda c: c.pop("missing"), "has no missing; a MultiModN has missing, encoders"),
        (lambda c: c.update(missing="never"), "missing=never: must be one of sample, batch"),
        (lambda c: c.update(encoders=[]), "encoders=.*: must be a mapping"),
        (lambda c: c.update(state_size="6"), "state_size=6: must be an integer"),
        (lambda c: c.update(state_size=5), "state_size"),
        (lambda c: c["encoders"]["a"].update(type="os.system"), "encoders.a.type=os.system: must be one of Class"),
        (lambda c: c["encoders"]["a"].pop("type"), "encoders.a.type=None: must be one of"),
        (lambda c: c["encoders"]["a"].update(colour=1), "encoders.a: .*colour"),
        (lambda c: c["decoders"]["yes"].update(classes=1), "decoders.yes: classes=1: must be >= 2"),
        (lambda c: c["encoders"]["a"].update(features=4), "model.safetensors: not the parameters of"),
        (lambda c: c["encoders"].pop("a"), "model.safetensors: not the parameters of"),
        (lambda c: c["encoders"].update(d=c["encoders"]["a"]), "model.safetensors: not the parameters of"),
    ):
        edited(change)
        with pytest.raises(ValueError, match=message):
            load(folder)
    for text_of, message in (("[]", "type=: must be one of MultiModN"), ("{", "config.json: not JSON")):
        (folder / "config.json").write_text(text_of)
        with pytest.raises(ValueError, match=message):
            load(folder)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not the parameters"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: a saved model"):
        load(folder)


def test_a_newer_model_takes_the_place_of_the_older(tmp_path: Path) -> None:
    save(networks.multimodn(0), tmp_path / "m")
    save(networks.pfusion(1), tmp_path / "m")
    assert same(load(tmp_path / "m"), networks.pfusion(1), networks.batch())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_write_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(networks.multimodn(0), tmp_path / "m")
    rename = os.replace

    def full(*_: object) -> None:
        raise OSError("disk full")

    def second_fails(source: Path, target: Path) -> None:
        full() if source.name == ".m.new" else rename(source, target)

    for module, name, broken in ((safetensors.torch, "save_model", full), (os, "replace", second_fails)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(OSError, match="disk full"):
                save(networks.multimodn(1), tmp_path / "m")
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        assert same(load(tmp_path / "m"), networks.multimodn(0), networks.batch())


def test_a_model_that_a_kill_left_aside_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = save(networks.multimodn(0), tmp_path / "m"), os.replace
    for last in (0, 1, 2):  # renames that come to pass: the older one back, aside again, the new one
        rename(folder if folder.exists() else tmp_path / ".m.old", tmp_path / ".m.old")
        left = iter(range(last))
        monkeypatch.setattr(
            os, "replace", lambda a, b, left=left: rename(a, b) if next(left, None) is not None else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            save(networks.multimodn(1), folder)
        assert same(load(folder), networks.multimodn(0), networks.batch())


KILLED = """
import os, signal, sys, shutil
import safetensors.torch
from pathlib import Path
from multimodn import persistence
from multimodn.tests import networks

rename, write, count = os.replace, safetensors.torch.save_model, 0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def torn(model, path):
    write(model, path)
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    kill()

def step(source, target):
    global count
    count += 1
    if sys.argv[2] == f"before rename {count}":
        kill()
    rename(source, target)
    if sys.argv[2] == f"after rename {count}":
        kill()

os.replace = step
if sys.argv[2] == "weights":
    safetensors.torch.save_model = torn
persistence.save(networks.multimodn(1), sys.argv[1])
"""


@pytest.mark.parametrize(
    ("moment", "left"), [("weights", 0), ("before rename 1", 0), ("after rename 1", 0), ("after rename 2", 1)]
)
def test_a_killed_write_leaves_a_whole_model(moment: str, left: int, tmp_path: Path) -> None:
    save(networks.multimodn(0), tmp_path / "m")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "m"), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert same(load(tmp_path / "m"), networks.multimodn(left), networks.batch())
    save(networks.multimodn(2), tmp_path / "m")
    assert same(load(tmp_path / "m"), networks.multimodn(2), networks.batch())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
