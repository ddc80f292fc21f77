"""What a piece of code computes, counted by operator, and what that would cost in hardware (section 1 of the paper).

The counts come from the shapes of the operators that run; the costs are published figures of single operations. Both
are arithmetic, not measurements: memory traffic, control and the wires between units are left out, and on a processor
or a GPU of today piecewise affine arithmetic takes more instructions, not fewer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from mulfree_training import formulas
from mulfree_training.operators import NAMESPACE
from mulfree_training.proof import is_allowed


class Cost(NamedTuple):
    """Of one operation at 45 nm and 0.9 V."""

    energy: float
    """pJ."""
    area: float
    """Square micrometres."""


CITATION = (
    "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014; as widely quoted, for 45 nm, "
    "not checked against the original"
)
COSTS = {
    "int8 add": Cost(0.03, 36),
    "int32 add": Cost(0.1, 137),
    "int32 multiply": Cost(3.1, 3495),
    "float16 add": Cost(0.4, 1360),
    "float16 multiply": Cost(1.1, 1640),
    "float32 add": Cost(0.9, 4184),
    "float32 multiply": Cost(3.7, 7700),
}
"""Operation -> energy and area (`CITATION`)."""


@dataclass
class Work:
    """Numbers of operations in one arithmetic."""

    products: int = 0
    """Multiply-accumulates of matrix products and convolutions."""
    multiplications: int = 0
    """Elementwise."""
    divisions: int = 0
    functions: int = 0
    """Exponentials, logarithms and their relatives."""
    roots: int = 0
    slopes: int = 0
    """Additions of integers that make the factor of an exact derivative, in matrix products too."""

    def add(self, **counts: int) -> None:
        """Count more."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Counts:
    """What a piece of code computes in floating point."""

    standard: Work = field(default_factory=Work)
    """In ordinary arithmetic."""
    pam: Work = field(default_factory=Work)
    """In piecewise affine arithmetic."""
    additions: int = 0
    """In either, but those of matrix products."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Operators that may multiply, but are not in the table here: they count as nothing."""


_TABLE: list[tuple[str, dict[str, int]]] = [
    ("add sub rsub cumsum mean", {"additions": 1}),
    ("mul", {"multiplications": 1}),
    ("div reciprocal", {"divisions": 1}),
    ("addcmul", {"multiplications": 2, "additions": 1}),
    ("addcdiv", {"multiplications": 1, "divisions": 1, "additions": 1}),
    ("lerp", {"multiplications": 1, "additions": 2}),
    ("sqrt", {"roots": 1}),
    ("rsqrt", {"roots": 1, "divisions": 1}),
    ("exp exp2 expm1 log log2 log10 log1p erf sin cos sigmoid tanh pow", {"functions": 1}),
    ("sigmoid_backward tanh_backward", {"multiplications": 2, "additions": 1}),
    ("_softmax", {"functions": 1, "divisions": 1, "additions": 2}),
    ("_safe_softmax", {"functions": 1, "divisions": 1, "additions": 2}),
    ("_softmax_backward_data", {"multiplications": 2, "additions": 2}),
    ("_log_softmax", {"functions": 1, "additions": 3}),
    ("_log_softmax_backward_data", {"functions": 1, "multiplications": 1, "additions": 2}),
    ("native_layer_norm native_batch_norm", {"multiplications": 3, "additions": 4}),
    ("native_layer_norm_backward native_batch_norm_backward", {"multiplications": 6, "additions": 7}),
    ("gelu", {"functions": 1, "multiplications": 3, "additions": 1}),
    ("gelu_backward", {"functions": 2, "multiplications": 5, "additions": 2}),
    ("silu", {"functions": 1, "multiplications": 1, "additions": 1}),
    ("silu_backward", {"functions": 1, "multiplications": 3, "additions": 2}),
    ("native_dropout native_dropout_backward", {"multiplications": 2}),
    ("_fused_adamw", {"multiplications": 6, "divisions": 2, "roots": 1, "additions": 5}),
    ("_fused_sgd", {"multiplications": 2, "additions": 2}),
    # of one score of an attention
    ("attention", {"functions": 1, "divisions": 1, "multiplications": 1, "additions": 2}),
    ("attention_backward", {"functions": 1, "multiplications": 3, "additions": 2}),
]
_PER_ELEMENT = {name: each for names, each in _TABLE for name in names.split()}
"""Operator -> operations for each element of its largest argument; those once a row are left out."""
_SUMMING = ("sum", "nansum", "embedding_dense_backward", "scatter_add", "index_add", "index_put", "col2im")
_NOTHING = ("nll_loss_forward", "nll_loss_backward", "randn", "normal")
_OURS: dict[str, dict[str, int]] = {
    "mul": {"multiplications": 1},
    "div": {"divisions": 1},
    "slope": {"slopes": 1},
    "mul_grad": {"multiplications": 1, "slopes": 1},
    "div_grad": {"multiplications": 1, "divisions": 2},
    "exp2": {"functions": 1},
    "exp2_grad": {"multiplications": 1, "slopes": 1},
    "log2": {"functions": 1},
    "log2_grad": {"divisions": 1},
    "sqrt": {"roots": 1},
    "sqrt_grad": {"multiplications": 2, "divisions": 1, "roots": 1},
}


def operation_count(model: Callable[..., Any], *batch: Any, training: bool = True) -> Counts:
    """Run a network once and count what it computes.

    Args:
        model: a module, or a function, such as a whole training step.
        batch: its arguments.
        training: of a module, also derive the sum of its floating-point results; a function derives for itself. The
            gradients are thrown away.

    Returns:
        Exact numbers for matrix products, convolutions and elementwise operators; those of fused operators by element.
    """
    counter = _Counter()
    with counter:
        out = model(*batch)
        if training and isinstance(model, nn.Module):
            outs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
            inputs = [
                x for x in (*model.parameters(), *tree_leaves(batch)) if isinstance(x, Tensor) and x.requires_grad
            ]
            if outs and inputs:
                torch.autograd.grad(outs, inputs, [torch.ones_like(x) for x in outs], allow_unused=True)
    return counter.counts


class _Counter(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == NAMESPACE:
            self._own(function, args)
            return function(*args, **kwargs)
        if function.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            with self:
                return function.decompose(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # before it runs, for an operator in place changes them
        allowed, floats = is_allowed(function, *args, **kwargs), _any_float(given)
        out = function(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if floats or _any_float(outs):
            self._one(function, args, kwargs, given, out, outs, allowed)
        return out

    def _one(
        self, function: Any, args: Any, kwargs: Any, given: list[Tensor], out: Any, outs: list[Tensor], allowed: bool
    ) -> None:
        packet = function.overloadpacket
        name = str(packet).removeprefix("aten.")
        name = name if name in _PER_ELEMENT else name.removesuffix("_").removeprefix("_foreach_")
        if name.startswith("_scaled_dot_product"):
            self._attention(name.endswith("backward"), args)
        elif name in ("convolution", "convolution_backward"):
            self._convolution(name.endswith("backward"), args, outs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.counts.standard.add(products=flops // 2)
            if name in ("addmm", "baddbmm"):
                self.counts.additions += out.numel()
        elif name in ("mv", "dot", "addmv"):
            self.counts.standard.add(products=max(x.numel() for x in given))
        elif name in _SUMMING:
            self.counts.additions += max(0, max(x.numel() for x in given) - (outs[0].numel() if name == "sum" else 0))
        elif name in _PER_ELEMENT:
            self._elements(name, args, kwargs, given, outs, allowed)
        elif not allowed and name not in _NOTHING:
            self.counts.unknown[str(packet)] += 1

    def _attention(self, backward: bool, args: Any) -> None:
        query, key, value = args[1:4] if backward else args[:3]
        scores = math.prod(query.shape[:-1]) * key.shape[-2]  # hidden ones too
        inner, outer = query.shape[-1], value.shape[-1]
        # the backward pass makes the scores again, and derives both products with respect to both factors
        self.counts.standard.add(products=scores * (3 * inner + 2 * outer if backward else inner + outer))
        self._count(self.counts.standard, scores, _PER_ELEMENT["attention_backward" if backward else "attention"])

    def _convolution(self, backward: bool, args: Any, outs: list[Tensor]) -> None:
        result, image, weight = args[:3] if backward else (outs[0], *args[:2])
        # every entry on the side that the filters are laid over meets a whole filter
        side = image if args[7 if backward else 6] else result
        products = side.numel() * math.prod(weight.shape[1:])
        wanted = args[10] if backward else (True, False, args[2] is not None)
        self.counts.standard.add(products=products * sum(wanted[:2]))
        if wanted[2]:
            self.counts.additions += result.numel() - (outs[-1].numel() if backward else 0)

    def _elements(
        self, name: str, args: Any, kwargs: Any, given: list[Tensor], outs: list[Tensor], allowed: bool
    ) -> None:
        # an element of a list of tensors is one of its first list
        first = args[0] if isinstance(args[0], (list, tuple)) else [max((*given, *outs), key=Tensor.numel)]
        count = sum(x.numel() for x in first)
        each = dict(_PER_ELEMENT[name])
        if name == "pow" and (args[1] if len(args) > 1 else None) == 2:
            each = {"multiplications": 1}
        if name == "mean":
            self.counts.standard.add(divisions=outs[0].numel())
        if name in ("add", "sub", "rsub") and not allowed:
            each["multiplications"] = 1  # alpha
        self._count(self.counts.standard, count, each)

    def _own(self, function: Any, args: tuple[Any, ...]) -> None:
        name = str(function.overloadpacket).split(".")[-1]
        args = args[:-1] if isinstance(args[-1], str) else args
        if name.startswith("matmul"):
            a, b = args[-3:-1]
            count = a.numel() * b.shape[2]
            self.counts.pam.add(products=count, slopes=count if name == "matmul_grad" else 0)
            return
        if name in _OURS:
            self._count(self.counts.pam, args[0].numel(), _OURS[name])
            return
        # a fused operator: its formula on tensors without memory, whose operations count themselves
        shapes = tree_map_only(Tensor, lambda x: x.to("meta"), args)
        face = _Face(self)
        with self:
            if name == "adamw_":
                numbers = formulas.AdamWNumbers(*shapes[4:])
                for param, grad, m, v in zip(*shapes[:4], strict=True):
                    formulas.adamw(face, param, grad, m, v, numbers)
            else:
                getattr(formulas, name)(face, *shapes)

    def _count(self, work: Work, count: int, each: dict[str, int]) -> None:
        self.counts.additions += count * each.get("additions", 0)
        work.add(**{name: count * n for name, n in each.items() if name != "additions"})


class _Face:
    """Stands in for the primitives of a face: counts, and returns tensors without memory."""

    def __init__(self, counter: _Counter) -> None:
        self._counter = counter

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def primitive(x: Tensor, *others: Any) -> Tensor:
            self._counter._count(self._counter.counts.pam, x.numel(), _OURS[name])
            return torch.empty_like(x)

        return primitive


def _any_float(tensors: list[Tensor]) -> bool:
    return any(x.is_floating_point() for x in tensors)


FLOAT32 = {
    "products": COSTS["float32 multiply"].energy + COSTS["float32 add"].energy,
    # a lower bound where nothing is quoted: a division, a root or a function takes at least a multiplication
    **dict.fromkeys(("multiplications", "divisions", "functions", "roots"), COSTS["float32 multiply"].energy),
    "slopes": 0.0,
}
"""Energy (pJ) of one operation of `Work` in ordinary arithmetic."""
PAM = {
    "products": COSTS["int32 add"].energy + COSTS["float32 add"].energy,
    **dict.fromkeys(("multiplications", "divisions", "roots", "slopes"), COSTS["int32 add"].energy),
    # x - floor(x) and 1 + that, or E + M and M = m - 1; then the exponent
    "functions": 2 * COSTS["float32 add"].energy + COSTS["int32 add"].energy,
}
"""Energy (pJ) of one operation of `Work` in piecewise affine arithmetic."""


def cost(counts: Counts, arithmetic: str | None = None) -> dict[str, float]:
    """Energy of the arithmetic, in microjoules; computed, not measured.

    Args:
        counts: of `operation_count`.
        arithmetic: `float32` or `pam`, as if everything were computed in that; None takes each as it is.

    Returns:
        `energy_uj_matrix_products` (their sums included), `energy_uj_elementwise` and `energy_uj_additions` (all
        others).

    Raises:
        ValueError: another arithmetic.
    """
    if arithmetic not in (None, "float32", "pam"):
        raise ValueError(f"arithmetic={arithmetic!r}: must be None, float32 or pam")
    products = elementwise = 0.0
    names = [f.name for f in fields(Work) if f.name != "products"]
    for work, own in ((counts.standard, FLOAT32), (counts.pam, PAM)):
        prices = own if arithmetic is None else FLOAT32 if arithmetic == "float32" else PAM
        products += work.products * prices["products"]
        elementwise += sum(getattr(work, name) * prices[name] for name in names)
    sums = counts.additions * COSTS["float32 add"].energy
    kinds = {"matrix_products": products, "elementwise": elementwise, "additions": sums}
    return {f"energy_uj_{kind}": energy * 1e-6 for kind, energy in kinds.items()}


def savings() -> dict[str, Cost]:
    """How many times cheaper the piecewise affine `multiplication` and `accumulate` (a product and its sum) are."""
    add, integer, multiply = (COSTS[name] for name in ("float32 add", "int32 add", "float32 multiply"))
    return {
        "multiplication": Cost(multiply.energy / integer.energy, multiply.area / integer.area),
        "accumulate": Cost(
            (multiply.energy + add.energy) / (integer.energy + add.energy),
            (multiply.area + add.area) / (integer.area + add.area),
        ),
    }


def ratios(counts: Counts) -> dict[str, float]:
    """Cost in float32 over cost in piecewise affine arithmetic; computed, not measured.

    Returns:
        `cost_ratio_multiplication` and `cost_ratio_accumulate`, energies of one operation (see `savings`), both also
        with `_area`; and `cost_ratio_step`, the energies of everything that was counted, NaN for nothing.
    """
    found: dict[str, float] = {}
    for name, own in savings().items():
        found |= {f"cost_ratio_{name}": own.energy, f"cost_ratio_{name}_area": own.area}
    standard, affine = (sum(cost(counts, arithmetic).values()) for arithmetic in ("float32", "pam"))
    return found | {"cost_ratio_step": standard / affine if affine else math.nan}
