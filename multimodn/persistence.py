"""Save a model as a folder and load it without the code that built it.

The folder holds `config.json`, what the model is made of, and `model.safetensors`, its parameters. Loading runs no code
from the folder: a config can only name classes that are known here, or that were made known by `register`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from common.config import check
from multimodn.decoders import ClassDecoder, MultiLabelDecoder, RegressionDecoder
from multimodn.encoders import ConvEncoder, GRUEncoder, HuggingFaceEncoder, MLPEncoder, RawEncoder, TransformerEncoder
from multimodn.fusion import PFusion
from multimodn.model import MultiModN
from multimodn.network import Network

Part = TypeVar("Part", bound=type[nn.Module])

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NETWORKS = {"MultiModN": MultiModN, "PFusion": PFusion}
BUILT_IN: tuple[type[nn.Module], ...] = (
    ClassDecoder,
    ConvEncoder,
    GRUEncoder,
    HuggingFaceEncoder,
    MLPEncoder,
    MultiLabelDecoder,
    RawEncoder,
    RegressionDecoder,
    TransformerEncoder,
)
_known: dict[str, type[nn.Module]] = {part.__name__: part for part in BUILT_IN}


def register(cls: Part) -> Part:
    """Make an encoder or decoder class known under its name, so that models with it can be saved and loaded.

    Args:
        cls: has a property `config`, a dict fit for JSON, and is built again by `cls(**config)`, or by
            `cls.from_config(config)` where it has that.

    Returns:
        The class, so that `@register` decorates it.

    Raises:
        ValueError: it has no `config`, or another class has the name.
    """
    name = cls.__name__
    check("cls", name, issubclass(cls, nn.Module) and hasattr(cls, "config"), "a module class with a property config")
    other = _known.get(name, cls)
    # a class that was defined again, in a notebook say, takes the place of its older self
    same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
    check("cls", f"{cls.__module__}.{cls.__qualname__}", same, f"of a new name; {name} is taken by {other.__module__}")
    _known[name] = cls
    return cls


def save(model: MultiModN | PFusion, folder: Path | str) -> Path:
    """Write a model to a folder; a model that was there before is replaced when the new one is whole.

    Args:
        model: one model, not a stack; encoders and decoders are of this package or registered. Training or evaluation
            mode is not kept, nor which parameters are frozen, but for `HuggingFaceEncoder(freeze=True)`.
        folder: new or empty, or one that `save` wrote and that holds nothing else.

    Returns:
        The folder.

    Raises:
        ValueError: a stack, a part of an unknown class or without a usable config, or a folder with other files.
    """
    from safetensors.torch import save_model

    model = getattr(model, "_orig_mod", model)  # inside torch.compile
    config = _describe(model)
    target = Path(folder).resolve()
    aside = _aside(target)
    if not target.exists() and aside.is_dir():
        os.replace(aside, target)
    others = sorted({path.name for path in target.iterdir()} - {CONFIG, WEIGHTS}) if target.is_dir() else []
    free = not others and (target.is_dir() or not target.exists())
    allowed = "a new folder, or one with nothing but a saved model" + (f"; it has {', '.join(others)}" * bool(others))
    check("folder", target, free, allowed)
    scratch = target.with_name(f".{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_model(model, str(scratch / WEIGHTS))
        for path in scratch.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        _swap(scratch, target, aside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def load(folder: Path | str) -> MultiModN | PFusion:
    """The model that `save` wrote, on the CPU, in its dtype and in evaluation mode; random states stay as they are.

    Raises:
        FileNotFoundError: no folder, or one without the two files.
        ValueError: files that are not of a saved model, or a class that is not known; with the place named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, load_model

    target = Path(folder).resolve()
    if not target.exists() and _aside(target).is_dir():
        target = _aside(target)
    for name in (CONFIG, WEIGHTS):
        if not (target / name).is_file():
            raise FileNotFoundError(f"{target / name}: a saved model is a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{target / CONFIG}: not JSON ({error})") from error
    with torch.random.fork_rng(devices=[]):
        model = _build(config, target / CONFIG)
    try:
        stored = load_file(target / WEIGHTS)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored:
                tensor.data = tensor.data.to(stored[name].dtype)
        load_model(model, target / WEIGHTS)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{target / WEIGHTS}: not the parameters of {target / CONFIG} ({_line(error)})") from error
    return model.eval()


def _aside(target: Path) -> Path:
    """Where the older model lies between two renames, for a kill just there."""
    return target.with_name(f".{target.name}.old")


def _swap(scratch: Path, target: Path, aside: Path) -> None:
    """Put a whole folder in the place of another: a kill leaves the older one, at its place or aside."""
    shutil.rmtree(aside, ignore_errors=True)
    if target.is_dir():
        os.replace(target, aside)
    try:
        os.replace(scratch, target)
    except OSError:
        if aside.is_dir():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _describe(model: Network) -> dict[str, Any]:
    kind = type(model).__name__
    check("model", kind, NETWORKS.get(kind) is type(model), f"one of {', '.join(NETWORKS)}")
    check("model", f"a stack of {model.n_models}", model.n_models is None, "one model; save each that `unstack` gives")
    start = model._parameters.get("initial_state")
    return {
        "type": kind,
        "state_size": getattr(model, "state_size", None),
        "missing": model.missing,
        "initial_state_trained": start is not None if isinstance(model, MultiModN) else None,
        "encoders": {name: _describe_part(f"encoders.{name}", part) for name, part in model.encoders.items()},
        "decoders": {name: _describe_part(f"decoders.{name}", part) for name, part in model.decoders.items()},
        "indicator": getattr(model, "indicator", None),
    }


def _describe_part(where: str, part: nn.Module) -> dict[str, Any]:
    kind = type(part)
    allowed = f"one of {', '.join(sorted(_known))}; `register` makes a class known"
    check(where, kind.__name__, _known.get(kind.__name__) is kind, allowed)
    config = cast(Any, part).config
    check(f"{where}.config", config, isinstance(config, dict) and "type" not in config, "a dict without the key type")
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}.config: must be fit for JSON ({_line(error)})") from error
    return {"type": kind.__name__, **config}


def _build(config: Any, path: Path) -> MultiModN | PFusion:
    kind = str(config.get("type")) if isinstance(config, dict) else ""
    check(f"{path}: type", kind, kind in NETWORKS, f"one of {', '.join(NETWORKS)}")
    own = ("indicator",) if kind == "PFusion" else ("state_size", "initial_state_trained")
    keys = ("missing", "encoders", "decoders", *own)
    for key in keys:
        if key not in config:
            raise ValueError(f"{path}: has no {key}; a {kind} has {', '.join(keys)}")
    parts: dict[str, dict[str, nn.Module]] = {}
    for group in ("encoders", "decoders"):
        check(f"{path}: {group}", config[group], isinstance(config[group], dict), "a mapping from names to parts")
        parts[group] = {name: _build_part(f"{path}: {group}.{name}", part) for name, part in config[group].items()}
    try:
        if kind == "PFusion":
            return PFusion(**parts, missing=config["missing"], indicator=config["indicator"])
        size = config["state_size"]
        check("state_size", size, isinstance(size, int), "an integer")
        start = None if config["initial_state_trained"] else torch.zeros(size)
        return MultiModN(**parts, state_size=size, missing=config["missing"], initial_state=start)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_line(error)}") from error


def _build_part(where: str, config: Any) -> nn.Module:
    kind = str(config.get("type")) if isinstance(config, dict) else ""
    allowed = f"one of {', '.join(sorted(_known))}; `register` makes a class known"
    check(f"{where}.type", kind, kind in _known, allowed)
    cls = cast(Any, _known[kind])
    rest = {key: value for key, value in config.items() if key != "type"}
    try:
        return cls.from_config(rest) if hasattr(cls, "from_config") else cls(**rest)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
