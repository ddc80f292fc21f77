"""Proof that some code multiplies no floating-point numbers: every operator it calls is on a list of allowed ones.

Two context managers watch each operator that PyTorch runs, those of the backward pass and of the optimizer too:
`forbid_multiplications` stops at the first that is not allowed, `count_multiplications` counts them. An operator that
touches a floating-point tensor must be in `ALLOWED`, which gives the reason; an unknown one is a finding. Integers may
be multiplied, for they are positions in memory. Complex numbers are findings altogether.

Three things are out of sight here, and proven or listed elsewhere: what happens inside an operator of this package
(`disassembly` and `kernels.ptx` scan the compiled code; `integers=True` runs the reference operation by operation),
inside operators that another package registers (they are findings, whatever they do), and arithmetic on Python numbers
such as a learning rate. A function under `torch.compile` runs uncompiled in the block, and is seen.

The managers nest. They see the thread that entered them, and the backward passes that it starts (PyTorch hands them on
to the threads in which it runs those of a GPU); other threads they do not see.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mulfree_training.operators import NAMESPACE

_GROUPS = {
    "sees the same numbers through another shape or type": """
        alias as_strided detach detach_copy diagonal expand lift lift_fresh permute _reshape_alias select slice
        split split_with_sizes squeeze t transpose unbind unfold _unsafe_view unsqueeze view
    """,
    "copies, joins or rearranges numbers": """
        as_strided_scatter cat channel_shuffle clone constant_pad_nd copy _copy_from diag_embed diagonal_scatter
        embedding expand_copy flip _foreach_copy gather im2col index index_copy index_select lift_fresh_copy
        masked_scatter masked_select max_unpool2d max_unpool3d _pin_memory pixel_shuffle pixel_unshuffle
        reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
        replication_pad2d replication_pad3d _reshape_copy roll rot90 select_scatter set slice_scatter stack take
        _to_copy tril triu _unsafe_masked_index upsample_nearest1d upsample_nearest2d upsample_nearest3d
        view_copy
    """,
    "fills memory with a constant": """
        _efficientzerotensor empty empty_like empty_permuted empty_strided eye fill _foreach_zero full full_like
        index_fill new_empty new_empty_strided new_full new_ones new_zeros ones ones_like resize resize_as
        scalar_tensor zero zeros zeros_like
    """,
    "adds, possibly with a changed sign": """
        abs cumsum _foreach_abs _foreach_neg _foreach_sign frac nansum neg sgn sign sum trace
    """,
    "adds up or copies what came from one place, the derivative of a view or a copy": """
        adaptive_max_pool2d_backward adaptive_max_pool3d_backward col2im diagonal_backward index_put
        _index_put_impl max_pool2d_with_indices_backward max_pool3d_with_indices_backward
        reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward
        replication_pad2d_backward replication_pad3d_backward scatter_add select_backward slice_backward
        unfold_backward _unsafe_index_put _unsafe_masked_index_put_accumulate upsample_nearest1d_backward
        upsample_nearest2d_backward upsample_nearest3d_backward
    """,
    "compares and selects": """
        adaptive_max_pool2d adaptive_max_pool3d all amax amin aminmax any argmax argmin bucketize clamp
        clamp_max clamp_min copysign cummax _cummax_helper cummin _cummin_helper eq equal fmax fmin
        _foreach_clamp_max _foreach_clamp_min _foreach_maximum _foreach_minimum ge gt hardshrink
        hardshrink_backward hardtanh hardtanh_backward heaviside isin isinf isnan isneginf isposinf kthvalue le
        logical_and logical_not logical_or logical_xor lt masked_fill max max_pool2d_with_indices
        max_pool3d_with_indices maximum median min minimum mode nan_to_num nanmedian ne nonzero relu
        searchsorted signbit softshrink softshrink_backward sort threshold threshold_backward topk _unique2
        unique_dim where
    """,
    "rounds to an integer, a mask on the pattern": """
        ceil floor _foreach_ceil _foreach_floor _foreach_trunc trunc
    """,
    "draws random bits for a mask; their fixed scale is a power of two": "bernoulli rand rand_like",
    "passes a value to Python, or checks something": """
        _assert_async _assert_tensor_metadata is_pinned is_same_size _local_scalar_dense record_stream
    """,
}
_BITS = """
    __and__ bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor __iand__ __ilshift__
    __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__
"""
ONLY_INTEGERS = "works on bit patterns; only of integers"
_CONDITIONAL = {
    "add": "adds; alpha, a factor, is 1 or -1",
    "sub": "subtracts; alpha, a factor, is 1 or -1",
    "rsub": "subtracts; alpha, a factor, is 1 or -1",
    "_foreach_add": "adds; alpha, a factor, is 1 or -1",
    "_foreach_sub": "subtracts; alpha, a factor, is 1 or -1",
    "index_add": "adds; alpha, a factor, is 1 or -1",
    "embedding_dense_backward": "adds up rows; not with scale_grad_by_freq, which divides by frequencies",
    "_embedding_bag": "adds rows; only mode sum without weights",
    "_embedding_bag_forward_only": "adds rows; only mode sum without weights",
    "_embedding_bag_backward": "copies rows; only mode sum without weights",
    "_embedding_bag_dense_backward": "copies rows; only mode sum without weights",
    "scatter": "copies or adds; reduce is none or add",
    "scatter_reduce": "adds or compares; reduce is sum, amax or amin",
    "index_reduce": "compares; reduce is amax or amin",
    "round": "rounds to an integer; not to decimals, which multiplies",
    "uniform": "draws random bits for a mask; only between 0 and 1, another range multiplies",
    # a shift of a float multiplies it
    **dict.fromkeys(_BITS.split(), ONLY_INTEGERS),
}
ALLOWED: dict[str, str] = {f"aten.{name}": reason for reason, names in _GROUPS.items() for name in names.split()}
"""Operator, without the underscore of its in-place form -> why it multiplies nothing. Some have conditions."""
ALLOWED |= {f"aten.{name}": reason for name, reason in _CONDITIONAL.items()}
ALLOWED[f"{NAMESPACE}.*"] = "ours: adds bit patterns, proven on the compiled code"
SHOWN = 4
"""Operands that an error shows at most."""


class MultiplicationError(RuntimeError):
    """An operator that is not allowed ran; the message says which, on what, and called from where.

    Attributes:
        operator: its name, such as `aten.mul`.
    """

    def __init__(self, operator: str, message: str) -> None:
        super().__init__(message)
        self.operator = operator


@contextlib.contextmanager
def forbid_multiplications(allow: Iterable[str] = (), *, integers: bool = False) -> Iterator[None]:
    """Raise at the first operator in the block that may multiply floating-point numbers, before it runs if that shows.

    Args:
        allow: names of operators to let pass all the same, such as `aten.mean`.
        integers: hold integer and boolean tensors to the list too.

    Raises:
        MultiplicationError: an operator is not in `ALLOWED`, or breaks the condition there.
        ValueError: `allow` has what is no name of an operator.
    """

    def found(name: str, function: Any, leaves: list[Any]) -> None:
        tensors = _tensors(leaves)
        shown = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in tensors[:SHOWN])
        shown += f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
        raise MultiplicationError(name, f"{function} on {shown or 'numbers'} may multiply{_place()}")

    with _Gate(found, _names(allow), integers):
        yield


@contextlib.contextmanager
def count_multiplications(allow: Iterable[str] = (), *, integers: bool = False) -> Iterator[Counter[str]]:
    """Count the operators in the block that `forbid_multiplications` would stop at; arguments and errors as there.

    Yields:
        Name of the operator, such as `aten.mul` -> how often it was called; filled while the block runs.
    """
    counter: Counter[str] = Counter()
    with _Gate(lambda name, function, leaves: counter.update([name]), _names(allow), integers):
        yield counter


class _Gate(TorchDispatchMode):
    """Report every operator that is not allowed.

    Args:
        found: gets name, operator and the flat arguments of each.
        allow: names that pass.
        integers: look at all tensors, not at those of floating-point numbers alone.
    """

    def __init__(self, found: Callable[[str, Any, list[Any]], None], allow: frozenset[str], integers: bool) -> None:
        super().__init__()
        self.found, self.allow, self.integers = found, allow, integers

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function.overloadpacket)
        if name in self.allow or is_allowed(function, *args, **kwargs):
            return function(*args, **kwargs)
        if function.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            # under torch.inference_mode what is composed of other operators arrives whole
            with self:
                return function.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if self._watched(leaves):
            self.found(name, function, leaves)
            return function(*args, **kwargs)
        out = function(*args, **kwargs)
        if self._watched(tree_leaves(out)):
            self.found(name, function, leaves)
        return out

    def _watched(self, leaves: list[Any]) -> bool:
        return any(self.integers or x.is_floating_point() or x.is_complex() for x in _tensors(leaves))


def is_allowed(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Is a call of an operator (such as `torch.ops.aten.add.Tensor`) on the list, and its condition kept?"""
    if function.namespace == NAMESPACE:
        return True
    given = _tensors(tree_leaves((args, kwargs)))
    if any(x.is_complex() for x in given):
        return False
    name = str(function.overloadpacket)
    if name not in ALLOWED:
        name = name.removesuffix("_")
    if name not in ALLOWED:
        return False
    short = name.removeprefix("aten.")
    if ALLOWED[name] is ONLY_INTEGERS:
        return not any(x.is_floating_point() for x in given)
    return short not in _CONDITIONAL or _condition(short, function, args, kwargs)


def _condition(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {x.name: x.default_value for x in function._schema.arguments if x.has_default_value()}
    given |= dict(zip((x.name for x in function._schema.arguments), args, strict=False)) | kwargs
    if name == "round":
        return "decimals" not in given
    if name == "uniform":
        return given["from"] == 0 and given["to"] == 1
    if name == "scatter":
        return given.get("reduce", "add") == "add"
    if name == "scatter_reduce":
        return given["reduce"] in ("sum", "amax", "amin")
    if name == "index_reduce":
        return given["reduce"] in ("amax", "amin")
    if name.startswith("_embedding_bag"):
        return given["mode"] == 0 and given.get("per_sample_weights") is None and not given["scale_grad_by_freq"]
    if name == "embedding_dense_backward":
        return not given["scale_grad_by_freq"]
    return given.get("alpha", 1) in (1, -1)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def _names(allow: Iterable[str]) -> frozenset[str]:
    names = [allow] if isinstance(allow, str) else list(allow)
    for name in names:
        if not isinstance(name, str) or name.count(".") != 1:
            raise ValueError(f"allow={name!r}: must be names of operators, such as 'aten.mean'")
    return frozenset(names)


def _place() -> str:
    """File and line of the innermost caller outside of PyTorch and this file; "" if there is none."""
    inside = (str(Path(torch.__file__).parent), __file__, contextlib.__file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(inside):
            return f", called at {frame.filename}:{frame.lineno}" + (f": {frame.line}" if frame.line else "")
    return ""
