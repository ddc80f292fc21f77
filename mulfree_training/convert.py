"""Turns an existing network into one of piecewise affine arithmetic, in place, and says what it could not turn.

A module is converted by changing its class: it stays the same object with the same parameters, buffers, hooks, device
and mode, so that optimizers, tied weights and references to it go on working.
"""

from __future__ import annotations

import fnmatch
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mulfree_training.arguments import Rule
from mulfree_training.attention import Kind, PAMAttention
from mulfree_training.inspection import (
    adds_nothing,
    operators,
    unread_hooks,
    why_hidden,
    why_it_multiplies,
    why_its_forward_does,
)
from mulfree_training.modules import (
    PAMGELU,
    Arithmetic,
    PAMConv1d,
    PAMConv2d,
    PAMDropout,
    PAMLayerNorm,
    PAMLinear,
    PAMLogSoftmax,
    PAMSoftmax,
)

SCOPE = ("matmul", "softmax", "norm", "activation")
OUTSIDE = "outside the scope"
KINDS: dict[type[nn.Module], tuple[str, type[Arithmetic]]] = {
    nn.Linear: ("matmul", PAMLinear),
    NonDynamicallyQuantizableLinear: ("matmul", PAMLinear),  # the last layer of nn.MultiheadAttention
    nn.Conv1d: ("matmul", PAMConv1d),
    nn.Conv2d: ("matmul", PAMConv2d),
    nn.LayerNorm: ("norm", PAMLayerNorm),
    nn.Softmax: ("softmax", PAMSoftmax),
    nn.LogSoftmax: ("softmax", PAMLogSoftmax),
    nn.Dropout: ("softmax", PAMDropout),
    nn.GELU: ("activation", PAMGELU),
}
"""Type of module -> word of the scope, and what it becomes."""


@dataclass
class Report:
    """What a conversion did; `print` it for a table."""

    converted: dict[str, str] = field(default_factory=dict)
    """Path -> "Linear -> PAMLinear"."""
    left: dict[str, str] = field(default_factory=dict)
    """Path of a module that multiplies, in full or in its own forward or hooks -> why it was not converted."""
    warnings: list[str] = field(default_factory=list)
    """Operators in the code of modules, which multiply if they get floats: it was not run, only read."""

    def __str__(self) -> str:
        rows = [("converted", path, what) for path, what in self.converted.items()]
        rows += [("left", path, why) for path, why in self.left.items()]
        rows = [(state, path or "(the model)", text) for state, path, text in rows]
        width = max((len(path) for _, path, _ in rows), default=0)
        lines = [f"{state:9}  {path:{width}}  {text}" for state, path, text in rows]
        lines += [f"warning    {text}" for text in self.warnings]
        return "\n".join([*lines, f"{len(self.converted)} converted, {len(self.left)} left"])


def convert_to_mulfree(
    model: nn.Module,
    scope: Iterable[str] = SCOPE,
    derivative: Rule = "approx",
    alpha: float | None = None,
    skip: Iterable[str] = (),
    strict: bool = False,
    *,
    backend: str = "",
) -> Report:
    """Convert a network in place.

    By type, and by subclasses that add nothing but a constructor: nn.Linear, Conv1d, Conv2d and the products of
    nn.MultiheadAttention ("matmul"); nn.Softmax, LogSoftmax, Dropout and the scaling, softmax and dropout of
    nn.MultiheadAttention ("softmax"); nn.LayerNorm ("norm"); nn.GELU ("activation"). Of transformers also Conv1D, the
    variants of GELU, and all attention that goes through its `AttentionInterface`, unless it wants what "pam" has not
    (soft caps, sinks, sparse selection). A model of transformers gets its own copy of its configuration. PyTorch's
    fused inference paths, which would go round converted modules, are switched off in the nn.TransformerEncoder around
    them. Converting again changes nothing, but a wider scope converts what it adds.

    Args:
        model: any module; it may itself be of a type that is converted.
        scope: words out of `SCOPE`.
        derivative, alpha, backend: of all converted modules; see `primitives`.
        skip: patterns (of `fnmatch`) of dotted paths; a module that fits stays as it is, with all below it. A shared
            module has several paths, and one that fits is enough.
        strict: refuse to leave anything that multiplies, skipped and outside the scope included; nothing is converted
            then.

    Returns:
        The report. Only modules are converted: what a `forward` or a hook multiplies itself is left if its source names
        a function that multiplies, and in the warnings if it has an operator that may. Proof is
        `proof.forbid_multiplications`.

    Raises:
        TypeError: `model` is no module.
        ValueError: an empty scope or an unknown word, a pattern that fits nothing, a bad option, or `strict` and
            something is left.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model of type {type(model).__name__}: must be a torch.nn.Module")
    words = (scope,) if isinstance(scope, str) else tuple(scope)
    if not words or not set(words) <= set(SCOPE):
        raise ValueError(f"scope={words}: must be some of {', '.join(SCOPE)}")
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    paths = dict(model.named_modules(remove_duplicate=False))
    skipped: set[int] = set()
    for pattern in patterns:
        fitting = [module for path, module in paths.items() if fnmatch.fnmatchcase(path, pattern)]
        if not fitting:
            raise ValueError(f"skip={pattern!r}: must fit the path of a module, such as {list(paths)[-1]!r}")
        skipped |= {id(below) for module in fitting for below in module.modules()}
    options: dict[str, Any] = {"derivative": derivative, "alpha": alpha, "backend": backend}
    Arithmetic().set_arithmetic(**options)  # refuses bad ones before anything is done
    plan = _Plan(frozenset(words), options, skipped)
    plan.visit("", model)
    if strict and plan.report.left:
        listed = "; ".join(f"{path or '(the model)'}: {why}" for path, why in plan.report.left.items())
        raise ValueError(f"strict=True: modules that multiply would be left: {listed}")
    for change in plan.changes:
        change()
    return plan.report


class _Plan:
    """What will be changed: all is looked at before anything is touched."""

    def __init__(self, scope: frozenset[str], options: dict[str, Any], skipped: set[int]) -> None:
        self.scope, self.options, self.skipped = scope, options, skipped
        self.report = Report()
        self.changes: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        self._warned: set[type] = set()
        self._copies: dict[int, Any] = {}  # of configurations, for `huggingface.switch`
        self._kinds = dict(KINDS)
        self._hub: Any = None
        if "transformers" in sys.modules:  # a model of it cannot exist before its import
            from mulfree_training import huggingface

            self._hub = huggingface
            self._kinds[huggingface.Conv1D] = ("matmul", huggingface.PAMConv1D)
            self._kinds |= {kind: ("activation", PAMGELU) for kind in huggingface.GELUS}

    def visit(self, path: str, module: nn.Module, in_hub_model: bool = False) -> None:
        """Plan for a module and all below it."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if id(module) in self.skipped:
            self.report.left[path] = "skipped"
            return
        before = len(self.changes)
        attention, arithmetic = isinstance(module, nn.MultiheadAttention), isinstance(module, Arithmetic)
        if unread_hooks(module):
            self.report.warnings.append(f"{path or '(the model)'}: hooks of {type(module).__name__} cannot be read")
        if type(module).__module__.startswith("torch.ao.nn."):
            self.report.left[path] = f"{type(module).__name__} of torch.ao, quantised arithmetic"
            return
        if not (arithmetic and "forward" in vars(module)) and (why := why_hidden(module)):
            self.report.left[path] = why
            if attention or arithmetic:
                return
        elif isinstance(module, nn.MultiheadAttention):
            if not self._attention(path, module):
                return  # an ordinary one does not call its children
        elif arithmetic:
            return
        elif kind := self._kind(module):
            self._layer(path, module, kind)
            return
        elif base := next((kind for kind in self._kinds if isinstance(module, kind)), None):
            self.report.left[path] = f"{type(module).__name__}, a {base.__name__} with code of its own"
        elif any(module.children()):
            self._read(path, module)
        elif why := why_it_multiplies(module):
            self.report.left[path] = why
        else:
            self._read(path, module)
        if self._hub and not in_hub_model:
            if isinstance(module, self._hub.PreTrainedModel):
                self._hub_attention(path, module)
                in_hub_model = True
            elif self._hub.reads_interface(type(module)) and not hasattr(module, "pam_options"):
                self.report.left[path] = f"{type(module).__name__}, attention of a model; convert the whole model"
        for name, child in module.named_children():
            self.visit(_join(path, name), child, in_hub_model)
        self._fused(path, module, len(self.changes) > before)

    def _kind(self, module: nn.Module) -> type[nn.Module] | None:
        """Which key of the table a module is."""
        bases = (kind for kind in self._kinds if isinstance(module, kind))
        return next((base for base in bases if adds_nothing(type(module), base)), None)

    def _layer(self, path: str, module: nn.Module, base: type[nn.Module]) -> None:
        word, kind = self._kinds[base]
        if word not in self.scope:
            self.report.left[path] = f"{type(module).__name__}, {OUTSIDE}"
        elif isinstance(module, (nn.Softmax, nn.LogSoftmax)) and module.dim is None:
            self.report.left[path] = f"{type(module).__name__} without dim"
        else:
            self._change(path, module, kind)

    def _change(self, path: str, module: nn.Module, kind: type[Arithmetic], note: str = "", **values: Any) -> None:
        def change() -> None:
            module.__class__ = kind
            assert isinstance(module, Arithmetic)
            module.set_arithmetic(**self.options)
            for name, value in values.items():
                setattr(module, name, value)

        self.report.converted[path] = f"{type(module).__name__} -> {kind.__name__}{note}"
        self.changes.append(change)

    def _wanted(self, had: tuple[Kind, Kind]) -> tuple[Kind, Kind]:
        """Products and normaliser: those of the scope join those that are converted already."""
        return ("pam" if "matmul" in self.scope else had[0]), ("pam" if "softmax" in self.scope else had[1])

    def _attention(self, path: str, module: nn.MultiheadAttention) -> bool:
        """Plan for an attention layer; will it be one of ours?"""
        if type(module) is not PAMAttention and not adds_nothing(type(module), nn.MultiheadAttention):
            self.report.left[path] = f"{type(module).__name__}, a MultiheadAttention with code of its own"
            return False
        had: tuple[Kind, Kind] = ("standard", "standard")
        if isinstance(module, PAMAttention):
            had = module.products, module.normaliser
        wanted = self._wanted(had)
        self._note_ordinary(path, wanted)
        if wanted == had:
            return isinstance(module, PAMAttention)
        note = f" (products {wanted[0]}, normaliser {wanted[1]})"
        # without the last, PyTorch's fused encoder layer would take the weights and go round this module
        values = {"products": wanted[0], "normaliser": wanted[1], "_qkv_same_embed_dim": False}
        self._change(path, module, PAMAttention, note, **values)
        return True

    def _note_ordinary(self, path: str, kinds: tuple[Kind, Kind]) -> None:
        parts = [part for part, kind in zip(("products", "normaliser"), kinds, strict=True) if kind == "standard"]
        if parts:
            self.report.left[path] = f"attention, {' and '.join(parts)} {OUTSIDE}"

    def _fused(self, path: str, module: nn.Module, changed: bool) -> None:
        """What PyTorch's transformer layers do past their submodules: a function as activation, fused inference."""
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            function = module.activation
            if function is F.gelu and "activation" in self.scope:
                gelu = PAMGELU(**self.options).train(module.training)
                self.report.converted[_join(path, "activation")] = "gelu -> PAMGELU"
                self.changes.append(lambda: setattr(module, "activation", gelu))
                changed = True
            elif not isinstance(function, nn.Module) and function not in (F.relu, torch.relu):
                name = getattr(function, "__name__", repr(function))
                self.report.left[_join(path, "activation")] = f"function {name}" + (
                    f", {OUTSIDE}" if function is F.gelu else ""
                )
        if changed and isinstance(module, nn.TransformerEncoderLayer):
            self.changes.append(lambda: setattr(module, "activation_relu_or_gelu", 0))
        if changed and isinstance(module, nn.TransformerEncoder):
            self.changes.append(lambda: setattr(module, "use_nested_tensor", False))
            self.changes.append(lambda: setattr(module, "enable_nested_tensor", False))

    def _hub_attention(self, path: str, model: Any) -> None:
        """Plan for all attention of a transformers model, whose modules call a function that its config names."""
        found = [(_join(path, name), module) for name, module in self._hub.attention_modules(model)]
        if not found:
            return
        self.report.warnings.append(f"{path or '(the model)'}: a loss computed inside (labels=…) is an ordinary one")
        groups: dict[int, list[tuple[str, Any]]] = defaultdict(list)
        for place, module in found:  # all modules of one configuration have one attention function
            groups[id(module.config)].append((place, module))
        switched: list[nn.Module] = []
        for members in groups.values():
            now = members[0][1].config._attn_implementation
            if not self.scope & {"matmul", "softmax"}:
                if now != self._hub.NAME:
                    self.report.left[path] = f"attention of {type(model).__name__}, {OUTSIDE}"
            elif self._hub_group(members, now) and now != self._hub.NAME:
                switched += [module for _, module in members]
        if switched:
            self.changes.append(lambda: self._hub.switch(model, switched, self._copies))

    def _hub_group(self, members: list[tuple[str, Any]], now: str) -> bool:
        """Plan for attention modules of one configuration; shall "pam" be their function?"""
        taken = [(place, module) for place, module in members if id(module) not in self.skipped]
        reasons = {place: why for place, module in taken if (why := self._hub.why_unsupported(module))}
        if reasons:
            for place, module in taken:
                why = reasons.get(place, f"one configuration with {next(iter(reasons))}, which must be left")
                self.report.left[place] = f"{type(module).__name__}, {why}"
        if reasons or not taken:
            return False
        for place, module in members:
            options = getattr(module, "pam_options", None) if now == self._hub.NAME else None
            had: tuple[Kind, Kind] = ("standard", "standard")
            if options:
                had = options["products"], options["normaliser"]
            settings = {**self._hub.DEFAULTS, "products": had[0], "normaliser": had[1]}
            if id(module) in self.skipped:
                if now == self._hub.NAME:
                    continue
            else:
                wanted = self._wanted(had)
                self._note_ordinary(place, wanted)
                if wanted == had:
                    continue
                settings = {"products": wanted[0], "normaliser": wanted[1], **self.options}
                note = f"(products {wanted[0]}, normaliser {wanted[1]})"
                self.report.converted[place] = f"{type(module).__name__}: {now} -> {self._hub.NAME} {note}"
            chosen = self._hub.Options(settings)
            self.changes.append(lambda m=module, s=chosen: setattr(m, "pam_options", s))  # type: ignore[misc]
        return True

    def _read(self, path: str, module: nn.Module) -> None:
        """List a module whose own code multiplies; warn, once a class, of one that may."""
        if why := why_its_forward_does(module):
            self.report.left[path] = why
        if type(module) not in self._warned and (seen := operators(module)):
            self._warned.add(type(module))
            self.report.warnings.append(f"{path or '(the model)'}: forward of {type(module).__name__} has {seen}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
