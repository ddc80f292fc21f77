"""The part of every trial's schema that all papers share, and the way from a composed config to checked dataclasses.

A paper subclasses `CommonConfig`, adds its own groups as nested dataclasses with a docstring under every field (the
`--help` text) and ranges in `__post_init__` (by `check`), and registers the result under a name for its `config.yaml`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")

MODES = ("auto", "online", "offline", "disabled")
PRECISIONS = ("fp32", "bf16", "fp16")
TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def check(key: str, value: object, ok: bool, allowed: str) -> None:
    """Refuse a value out of range.

    Args:
        key: dotted name of the config key, as typed on the command line.
        value: what was given.
        ok: whether `value` is in range.
        allowed: the range in words, e.g. `> 0` or `one of a, b`.

    Raises:
        ValueError: `<key>=<value>: must be <allowed>` when `ok` is false.
    """
    if not ok:
        raise ValueError(f"{key}={value}: must be {allowed}")


@dataclass
class TrackingConfig:
    """Where a trial is shown while it runs; never changes a number."""

    mode: str = "auto"
    """W&B mode: `auto` (online when logged in, else offline), `online`, `offline` or `disabled`."""
    entity: str = ""
    """W&B team or user; empty means the default of the login."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    progress: bool = True
    """Show progress bars on a terminal."""

    def __post_init__(self) -> None:
        check("tracking.mode", self.mode, self.mode in MODES, f"one of {', '.join(MODES)}")


@dataclass
class CommonConfig:
    """The keys that every paper's trial has."""

    experiment: str = ""
    """Label: the table or figure this trial belongs to."""
    arm: str = ""
    """Label: the arm of the comparison."""
    scale: str = "laptop"
    """Label: size of the set-up; `scale=<name>` loads conf/scale/<name>.yaml."""
    seed: int = 0
    """First seed."""
    n_seeds: int = 1
    """Seeds `seed` ... `seed + n_seeds - 1` are trained side by side in one trial."""
    threads: int = 1
    """CPU threads of one trial."""
    device: str = "auto"
    """`auto` (cuda when there is one, else cpu), `cpu`, `cuda` or `cuda:<index>`."""
    precision: str = "fp32"
    """Arithmetic of training: `fp32`, or autocast to `bf16` or `fp16`."""
    results_dir: str = "results"
    """Folder of records and reports."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Weights & Biases and progress bars."""

    def __post_init__(self) -> None:
        check("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2**32)")
        check("n_seeds", self.n_seeds, self.n_seeds >= 1, ">= 1")
        check("threads", self.threads, self.threads >= 1, ">= 1")
        known = self.device in ("auto", "cpu", "cuda") or self.device.removeprefix("cuda:").isdigit()
        check("device", self.device, known, "auto, cpu, cuda or cuda:<index>")
        check("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        check("results_dir", repr(self.results_dir), bool(self.results_dir), "a folder")


def register(name: str, schema: type, group: str | None = None) -> None:
    """Make a dataclass known to Hydra under `name` (in `group`), for a `defaults:` list.

    Frozen dataclasses are welcome: their nodes stay open for overrides, the objects made by `to_config` are frozen.
    A field typed `Any` with a dataclass as default is a union: the group of the field's name fills it with one of
    several registered dataclasses, the default only documents it.
    """
    node = OmegaConf.structured(schema)
    _thaw(node)
    ConfigStore.instance().store(name=name, node=node, group=group, provider=schema.__module__)


def _thaw(node: DictConfig) -> None:
    """Clear the read-only flag that OmegaConf puts on nodes of frozen dataclasses, and empty unions."""
    OmegaConf.set_readonly(node, None)
    for key in list(node):
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            if child._metadata.ref_type is Any:
                node[key] = MISSING
            else:
                _thaw(child)


def to_config(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """Turn a composed config into dataclasses, so that types, unknown keys and ranges are checked.

    Args:
        cfg: the composed config, its root registered by `register(..., schema)`; a `hydra` node is ignored.
        schema: the dataclass to build.

    Raises:
        ValueError: one line with the dotted key, the value and what is allowed.
    """
    node = _without_hydra(cfg)
    if not issubclass(OmegaConf.get_type(node) or dict, schema):
        raise ValueError(
            f"the config is not checked by {schema.__name__}: name its schema first in the defaults of config.yaml"
        )
    _refuse_unknown(node, "")
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ValueError(f"{missing[0]}: has no value; give one with {missing[0]}=<value>")
    try:
        return typing.cast(Schema, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split("\n")[0].split())) from error


def _without_hydra(cfg: DictConfig) -> DictConfig:
    """The config without Hydra's own node; the input stays as it is."""
    if "hydra" not in cfg:
        return cfg
    node = copy.copy(cfg)
    with open_dict(node):
        del node["hydra"]
    return node


def _refuse_unknown(node: DictConfig, prefix: str) -> None:
    """Raise for a key that was added (`+key=value`) but that the dataclass does not have."""
    kind = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    for key in map(str, node):
        name = f"{prefix}{key}"
        if known is not None and key not in known:
            raise ValueError(f"{name}: unknown key{did_you_mean(key, known)}")
        child = node._get_node(key)
        if (
            isinstance(child, DictConfig)
            and not child._is_none()
            and not child._is_missing()
            and not child._is_interpolation()
        ):
            _refuse_unknown(child, f"{name}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean '<nearest>'?`, or nothing when no known name is near."""
    names = list(known)
    leaves = {n.rsplit(".", 1)[-1]: n for n in names}
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:
        near = [
            leaves[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.6)
        ]
    return f"; did you mean '{near[0]}'?" if near else ""


@dataclass(frozen=True)
class KeyInfo:
    """One key of a schema: its type hint and its default (a nested dataclass is a group of keys, default None)."""

    hint: Any
    default: Any
    owner: type
    """The dataclass that declares the key."""


def schema_keys(schema: type, prefix: str = "") -> dict[str, KeyInfo]:
    """List every dotted key of a dataclass schema in order, nested groups included."""
    keys: dict[str, KeyInfo] = {}
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        nested = type(default) if dataclasses.is_dataclass(default) else hints[f.name]
        if dataclasses.is_dataclass(nested) and isinstance(nested, type):
            keys[prefix + f.name] = KeyInfo(nested, None, _owner(schema, f.name))
            keys.update(schema_keys(nested, f"{prefix}{f.name}."))
        else:
            keys[prefix + f.name] = KeyInfo(hints[f.name], default, _owner(schema, f.name))
    return keys


def _owner(schema: type, name: str) -> type:
    """Return the class of the inheritance line that declares the field."""
    return next(kind for kind in schema.__mro__ if name in inspect.get_annotations(kind))


def type_words(hint: Any) -> str:
    """Say in words what values a type hint allows, e.g. `a number or null`."""
    if dataclasses.is_dataclass(hint):
        return "a group of keys: " + ", ".join(f.name for f in dataclasses.fields(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [type_words(a) for a in arguments if a is not type(None)]
        return " or ".join(words) + (" or null" if type(None) in arguments else "")
    if origin in (list, tuple):
        return "a list like [a,b]" + (f" of {type_words(arguments[0]).split(' ', 1)[-1]}s" if arguments else "")
    if origin is dict:
        return "a mapping like {a:1}"
    return TYPE_WORDS.get(hint, getattr(hint, "__name__", str(hint)))
