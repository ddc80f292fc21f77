"""The registered operators `torch.ops.mulfree_training.*` and the faces that run them.

Each has the signature of its function in `reference` (primitives) or `formulas` (fused rows), and one argument more,
the face: "" takes the first that serves the call. They have fake kernels and batching rules, so that `torch.compile`
and `torch.func.vmap` go through them; derivatives are in `primitives`, `products` and `functional`. To a dispatch mode
an operator is one opaque call: that no multiplication hides inside is proven on the compiled code (see `proof`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from common.kernels.dispatch import choose, wish
from mulfree_training import formulas, reference

NAMESPACE = "mulfree_training"
FACES = ("cpp", "triton", "torch", "reference")
_library = torch.library.Library(NAMESPACE, "DEF")
ops = torch.ops.mulfree_training


def face(name: str) -> ModuleType:
    """The module of a face, imported on first use (Triton takes a second)."""
    if name == "cpp":
        from mulfree_training.kernels import cpp_face

        return cpp_face
    if name == "triton":
        from mulfree_training.kernels import triton_face

        return triton_face
    if name == "torch":
        from mulfree_training.kernels import torch_face

        return torch_face
    return reference


def _refusal(name: str) -> Callable[[Tensor], str | None]:
    def refuses(x: Tensor) -> str | None:
        if name == "reference":
            return None
        if x.dtype is not torch.float32:
            return f"needs float32, got {x.dtype}"
        return None if name == "torch" else face(name).refuses(x)

    return refuses


_REFUSALS = {name: _refusal(name) for name in FACES}


def pick(x: Tensor, backend: str = "") -> str:
    """Name of the face that serves tensors like x: C++ or Triton, else plain PyTorch; float64 has the reference only.

    Raises:
        ValueError: no such face, or it cannot serve x.
    """
    if not backend and wish(None) is None:
        return _default(x.device.type, x.dtype)
    return choose(_REFUSALS, x, backend=backend or None)


@functools.cache
def _default(device: str, dtype: torch.dtype) -> str:
    return choose(_REFUSALS, torch.empty(0, dtype=dtype, device=device))


def _define(
    name: str, tensors: int, schema: str, fake: Callable[..., Any], run: Callable[..., Any], batching: str
) -> None:
    """Register one operator.

    Args:
        name: of the operator.
        tensors: how many of its arguments, from the first on, are tensors.
        schema: arguments and results.
        fake: shapes of the results.
        run: called with all arguments, the face last.
        batching: what happens to the new dimension of vmap. It is put "in front", where operators on elements and rows
            do not look; "joined" with the first one, the batch of a product; or the operator runs "one by one".
    """
    _library.define(f"{name}{schema}")

    def kernel(*arguments: Any) -> Any:
        # PyTorch leaves out trailing arguments that are at their default
        return run(*arguments) if isinstance(arguments[-1], str) else run(*arguments, "")

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator = getattr(ops, name).default

    def batched(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        own = [
            x if x is None else x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(arguments[:tensors], dims, strict=False)
        ]
        rest = arguments[tensors:]
        if batching == "joined":
            out = operator(*(x.flatten(0, 1) for x in own if x is not None), *rest)
            return out.unflatten(0, (info.batch_size, -1)), 0
        if batching == "in front":
            return operator(*own, *rest), 0
        outs = [operator(*(x if x is None else x[i] for x in own), *rest) for i in range(info.batch_size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        columns = list(zip(*outs, strict=True))
        return tuple(None if c[0] is None else torch.stack(c) for c in columns), tuple(0 for _ in columns)

    torch.library.register_vmap(f"{NAMESPACE}::{name}", batched, lib=_library)


def _primitive(name: str, tensors: str, rest: str = "") -> None:
    """An operator that every face has; its result has the shape of the first tensor."""

    def run(x: Tensor, *others: Any) -> Tensor:
        return getattr(face(pick(x, others[-1])), name)(x, *others[:-1])

    names = [f"Tensor {x}" for x in tensors.split()]
    schema = f"({', '.join([*names, *filter(None, [rest])])}, str backend='') -> Tensor"
    shape = (lambda a, b, *_: a.new_empty(a.shape[0], a.shape[1], b.shape[2])) if name == "matmul" else _first
    if name == "matmul_grad":
        shape = lambda grad, a, *_: a.new_empty(a.shape)  # noqa: E731
    _define(name, len(names), schema, shape, run, "joined" if name.startswith("matmul") else "in front")


def _first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fused(name: str, tensors: int, schema: str, fake: Callable[..., Any] = _first, batching: str = "in front") -> None:
    """An operator on rows: fused in C++, elsewhere the formula over the primitives of the face."""
    formula = getattr(formulas, name)

    def run(x: Tensor, *others: Any) -> Any:
        chosen = pick(x, others[-1])
        if chosen == "cpp":
            return getattr(face(chosen), name)(x, *others[:-1])
        return formula(face(chosen), x, *others[:-1])

    _define(name, tensors, schema, fake, run, batching)


for _name in ("mul", "div", "slope", "matmul"):
    _primitive(_name, "a b", "int shift")
for _name in ("mul_grad", "div_grad", "matmul_grad"):
    _primitive(_name, "grad a b", "int shift")
for _name in ("exp2", "log2", "sqrt"):
    _primitive(_name, "x")
    _primitive(f"{_name}_grad", "grad x")
_fused("softmax", 1, "(Tensor x, int shift, str backend='') -> Tensor")
_fused("softmax_grad", 2, "(Tensor grad, Tensor x, int shift, bool exact, str backend='') -> Tensor")
_fused("log_softmax", 1, "(Tensor x, int shift, str backend='') -> Tensor")
_fused(
    "log_softmax_grad", 2, "(Tensor grad, Tensor x, int shift, bool exact, bool exact_log2, str backend='') -> Tensor"
)
# a batch of weights has no place among rows
_fused(
    "layer_norm",
    3,
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, int shift, str backend='') -> Tensor",
    batching="one by one",
)
_fused(
    "layer_norm_grad",
    3,
    "(Tensor grad, Tensor x, Tensor? weight, float eps, int shift, bool exact, str backend='') -> (Tensor, Tensor?)",
    lambda grad, x, weight, *_: (x.new_empty(x.shape), None if weight is None else x.new_empty(x.shape)),
    "one by one",
)


def _adamw(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], *rest: Any) -> None:
    """One AdamW step in place on tensors of one dtype on one device; numbers as in `formulas.AdamWNumbers`."""
    numbers, backend = formulas.AdamWNumbers(*rest[:7]), rest[7] if len(rest) > 7 else ""
    if not params:
        return
    chosen = face(pick(params[0], backend))
    if hasattr(chosen, "adamw_"):
        # the kernel reads plain memory; what is laid out otherwise (channels last) is copied there and back
        plain = [[x.contiguous() for x in xs] for xs in (params, grads, ms, vs)]
        chosen.adamw_(*plain, numbers)
        news = list(zip(plain[0], plain[2], plain[3], strict=True))
    else:
        news = [formulas.adamw(chosen, *own, numbers) for own in zip(params, grads, ms, vs, strict=True)]
    for own, new in zip(zip(params, ms, vs, strict=True), news, strict=True):
        for x, y in zip(own, new, strict=True):
            if x is not y:
                x.copy_(y)


_numbers = ", ".join(f"float {_name}" for _name in formulas.AdamWNumbers._fields)
_library.define(
    f"adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] ms, Tensor(c!)[] vs, {_numbers}, str backend='') -> ()"
)
_library.impl("adamw_", _adamw, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::adamw_", lambda *_: None, lib=_library)
