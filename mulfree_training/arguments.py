"""Checks that the public functions share, and the way from what users pass to what the operators take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

RULES = ("approx", "exact")
Rule = Literal["approx", "exact"]
"""How an operation is derived: `exact`, the true slope of the piecewise affine function, a power of two; `approx`, the
calculus rule of the function that it stands for, its products in turn piecewise affine (section 2.3 of the paper)."""
Rules = Rule | tuple[Rule, Rule]
"""One rule for both operands of a product, or a pair."""

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Result = TypeVar("Result")


def is_exact(derivative: str, key: str = "derivative") -> bool:
    """Is the rule `exact`?

    Raises:
        ValueError: it is neither `exact` nor `approx`.
    """
    if derivative not in RULES:
        raise ValueError(f"{key}={derivative!r}: must be one of {', '.join(RULES)}")
    return derivative == "exact"


def are_exact(derivative: Rules) -> tuple[bool, bool]:
    """The rule of each operand of a product, as `is_exact`."""
    if isinstance(derivative, str):
        return (is_exact(derivative),) * 2
    if not isinstance(derivative, tuple) or len(derivative) != 2:
        raise ValueError(f"derivative={derivative!r}: must be one of {', '.join(RULES)}, or a pair of them")
    return is_exact(derivative[0]), is_exact(derivative[1])


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse what has no piecewise affine arithmetic here.

    Raises:
        TypeError: x is no tensor, or not float32, bfloat16 or float64.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}={x!r}: must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} of dtype {x.dtype}: must be float32, bfloat16 or float64")


def check_pair(names: tuple[str, str], a: Tensor, b: Tensor) -> None:
    """Two operands of one dtype on one device.

    Raises:
        TypeError: as `check_dtype`, or the dtypes differ.
        ValueError: the devices differ.
    """
    for name, x in zip(names, (a, b), strict=True):
        check_dtype(name, x)
    if a.dtype != b.dtype:
        raise TypeError(f"{names[1]} of dtype {b.dtype}: must be {a.dtype}, as {names[0]}")
    if a.device != b.device:
        raise ValueError(f"{names[1]} on {b.device}: must be on {a.device}, as {names[0]}")


def in_single(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function to float32 and float64 as they are, and to bfloat16 in float32, its result rounded once.

    A bfloat16 is a float32 whose lower half is 0, and stays one through PAM and PAD: for these nothing is rounded.
    """
    if tensors[0].dtype is not torch.bfloat16:
        return function(*tensors)
    return function(*(x.float() for x in tensors)).to(torch.bfloat16)
