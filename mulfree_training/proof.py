"""Proof that some code multiplies no floating-point numbers: every operator it calls is on a list of allowed ones.

Two context managers watch each operator that PyTorch runs, those of the backward pass and of the optimizer too:
`forbid_multiplications` stops at the first that is not allowed, `count_multiplications` counts them. An operator that
touches a floating-point tensor must be in `ALLOWED`, which gives the reason; an unknown one is a finding. Integers may
be multiplied, for they are positions in memory. Complex numbers are findings altogether.

Operators that another package registers and those of quantised tensors are findings, whatever they do and whatever type
their tensors claim. So are higher-order operators such as `flex_attention`, but for those that only call functions that
they are given (`torch.cond`, `while_loop`, `map`, `scan`): what these functions call is seen (where derivatives are
taken, PyTorch wants them to return tuples). What a tensor subclass calls in its `__torch_dispatch__` is seen, too;
where it calls nothing, the operator that it was asked for counts. A function under `torch.compile` runs uncompiled in
the block (in every thread), and is seen.

Proven elsewhere is what happens inside an operator of this package: `disassembly` and `kernels.ptx` scan the compiled
code, and `integers=True` runs the reference operation by operation. Out of sight, and proven nowhere, are

- arithmetic on Python numbers, such as a learning rate;
- NumPy and whatever else takes a tensor's memory (`Tensor.numpy`, DLPack, `data_ptr`), also inside an
  `autograd.Function`, a tensor subclass or the body of a registered operator that PyTorch resolves by itself
  (CompositeImplicitAutograd);
- the backward pass of a graph that `torch.compile` compiled and ran forward before the block; packages of AOTInductor;
  replays of CUDA graphs; Triton and other kernels that are launched directly, without an operator around them;
- what runs while dispatch is switched off, and what a dispatch mode that was entered before the block calls.

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
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from mulfree_training.operators import NAMESPACE

_GROUPS = {
    "sees the same numbers through another shape or type": """
        alias as_strided _coalesced detach detach_copy diagonal expand _indices lift lift_fresh
        _nested_get_jagged_dummy _nested_get_lengths _nested_get_max_seqlen _nested_get_min_seqlen
        _nested_get_offsets _nested_get_ragged_idx _nested_get_values _nested_view_from_jagged permute
        _reshape_alias select slice _sparse_coo_tensor_with_dims_and_tensors split split_with_sizes squeeze t
        transpose unbind unfold _unsafe_view unsqueeze _values view
    """,
    "copies, joins or rearranges numbers": """
        as_strided_scatter cat channel_shuffle clone constant_pad_nd copy _copy_from diag_embed diagonal_scatter
        embedding expand_copy flip _foreach_copy gather im2col index index_copy index_select lift_fresh_copy
        masked_scatter masked_select max_unpool2d max_unpool3d _pin_memory pixel_shuffle pixel_unshuffle
        reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
        replication_pad2d replication_pad3d _reshape_copy roll rot90 select_copy select_scatter set slice_scatter stack
        take _to_copy _to_sparse tril triu _unsafe_masked_index upsample_nearest1d upsample_nearest2d upsample_nearest3d
        view_copy
    """,
    "fills memory with a constant": """
        _efficientzerotensor empty empty_like empty_permuted empty_strided eye fill _foreach_zero full full_like
        index_fill new_empty new_empty_strided new_full new_ones new_zeros ones ones_like resize resize_as
        scalar_tensor zero zeros zeros_like
    """,
    "adds, possibly with a changed sign": """
        abs cumsum _foreach_abs _foreach_neg _foreach_sign frac nansum neg _neg_view sgn sign sum trace
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
        _assert_async _assert_tensor_metadata _has_same_storage_numel is_coalesced is_pinned is_same_size
        is_strides_like_format
        _local_scalar_dense record_stream sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride
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
    "linalg_vector_norm": "adds or compares absolute values; order is 1, inf or -inf",
    "_foreach_norm": "adds or compares absolute values; order is 1, inf or -inf",
    "round": "rounds to an integer; not to decimals, which multiplies",
    "uniform": "draws random bits for a mask; only between 0 and 1, another range multiplies",
    # a shift of a float multiplies it
    **dict.fromkeys(_BITS.split(), ONLY_INTEGERS),
}
ALLOWED: dict[str, str] = {f"aten.{name}": reason for reason, names in _GROUPS.items() for name in names.split()}
"""Operator, without the underscore of its in-place form -> why it multiplies nothing. Some have conditions."""
ALLOWED |= {f"aten.{name}": reason for name, reason in _CONDITIONAL.items()}
ALLOWED[f"{NAMESPACE}.*"] = "ours: adds bit patterns, proven on the compiled code"
ALLOWED["prim.*"] = "asks for the device, the layout or the like"
ALLOWED["profiler.*"] = "marks a place in time"
ALLOWED |= {
    f"higher_order.{name}": "calls functions that it is given, which are seen, and copies what they return"
    for name in ("cond", "map_impl", "scan", "while_loop", "while_loop_stack_output")
}
_PYTORCH = ("aten", "prims")
"""Namespaces whose operators multiply no floating-point numbers if none of their tensors has any."""
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

    gate = _Gate(found, _names(allow), integers)
    with _uncompiled(), gate:
        yield


@contextlib.contextmanager
def count_multiplications(
    allow: Iterable[str] = (), *, integers: bool = False, mode: str = "aten"
) -> Iterator[Counter[str]]:
    """Count the operators in the block that `forbid_multiplications` would stop at.

    Args:
        allow: as there.
        integers: as there.
        mode: the level at which to count; "aten", that of PyTorch's operators, is the only one.

    Yields:
        Name of the operator, such as `aten.mul` -> how often it was called; filled while the block runs.

    Raises:
        ValueError: `allow` has what is no name of an operator, or no such mode.
    """
    if mode != "aten":
        raise ValueError(f"mode={mode!r}: must be 'aten'")
    counter: Counter[str] = Counter()
    gate = _Gate(lambda name, function, leaves: counter.update([name]), _names(allow), integers)
    with _uncompiled(), gate:
        yield counter


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Run what `torch.compile` compiled as plain Python: what runs below dispatch, no mode would see."""
    stance = _eager()
    try:
        yield
    finally:
        _restored(stance)


# not compiled themselves, for a compiled function may hold a block, and there the stance must not be changed
@torch._disable_dynamo
def _eager() -> Any:
    return torch.compiler.set_stance("force_eager")


@torch._disable_dynamo
def _restored(stance: Any) -> None:
    stance.__exit__(None, None, None)


class _Gate(TorchDispatchMode):
    """Report every operator that is not allowed.

    Args:
        found: gets name, operator and the flat arguments of each.
        allow: names that pass.
        integers: look at all tensors, not at those of floating-point numbers alone.
    """

    supports_higher_order_operators = True

    def __init__(self, found: Callable[[str, Any, list[Any]], None], allow: frozenset[str], integers: bool) -> None:
        super().__init__()
        self.found, self.allow, self.integers = found, allow, integers
        self.seen = 0
        self.asked: Any = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if isinstance(function, HigherOrderOperator):
            return self._higher_order(function, leaves, args, kwargs)
        if any(_dispatches(type(x)) for x in _tensors(leaves)):
            return self._of_subclass(function, leaves, args, kwargs)
        self.seen += 1
        name = str(function.overloadpacket)
        if name in self.allow or is_allowed(function, *args, **kwargs):
            return function(*args, **kwargs)
        if function.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            # under torch.inference_mode what is composed of other operators arrives whole
            with self:
                return function.decompose(*args, **kwargs)
        if function.namespace not in _PYTORCH or self._watched(leaves):
            self.found(name, function, leaves)
            return function(*args, **kwargs)
        out = function(*args, **kwargs)
        if self._watched(out):
            self.found(name, function, leaves)
        return out

    def _of_subclass(self, function: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the subclass run an operator while this mode stays entered; if it shows nothing, judge the operator."""
        if self.asked is function:
            self.asked = None
            return NotImplemented  # now PyTorch asks the subclass
        before, self.asked = self.seen, function
        try:
            with self:
                out = function(*args, **kwargs)
        finally:
            self.asked = None
        name = str(function.overloadpacket)
        if self.seen == before and not is_allowed(function, *args, **kwargs):
            self.seen += 1
            # the subclass was asked past the modes below this one: they are told here
            for gate in (*_get_current_dispatch_mode_stack(), self):
                if isinstance(gate, _Gate) and name not in gate.allow and gate._watched([leaves, out]):
                    gate.found(name, function, leaves)
        return out

    def _higher_order(self, function: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = f"{function.namespace}.{function.name()}"
        if name in self.allow:
            return function(*args, **kwargs)
        if name not in ALLOWED:
            self.found(name, function, leaves)
            return function(*args, **kwargs)

        def seen(x: Any) -> Any:
            if isinstance(x, Tensor) or not callable(x):
                return x

            def run(*inputs: Any, **options: Any) -> Any:
                with self:
                    return x(*inputs, **options)

            return run

        args, kwargs = tree_map(seen, (args, kwargs))
        return function(*args, **kwargs)

    def _watched(self, values: Any) -> bool:
        return any(
            self.integers or x.is_floating_point() or x.is_complex() or x.is_quantized
            for x in _tensors(tree_leaves(values))
        )


def is_allowed(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Is a call of an operator (such as `torch.ops.aten.add.Tensor`) on the list, and its condition kept?"""
    if f"{function.namespace}.*" in ALLOWED:
        return True
    given = _tensors(tree_leaves((args, kwargs)))
    if any(x.is_complex() or x.is_quantized for x in given):
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
    if name in ("linalg_vector_norm", "_foreach_norm"):
        return given["ord"] in (1, float("inf"), -float("inf"))
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


def _dispatches(kind: type[Tensor]) -> bool:
    """Does a class of tensors run operators itself? Those that belong to a mode of PyTorch leave it to that mode."""
    own = kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    return own and not hasattr(kind, "_mode_key")


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
