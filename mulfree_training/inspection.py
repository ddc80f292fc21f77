"""Does a module that is not converted multiply? What is known of PyTorch's layers, and what others' source shows."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

_FREE = """
    Identity ReLU ReLU6 Hardtanh Threshold Softshrink Hardshrink Flatten Unflatten Embedding EmbeddingBag
    MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d MaxUnpool1d MaxUnpool2d
    MaxUnpool3d ConstantPad1d ConstantPad2d ConstantPad3d ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d
    ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
    PixelShuffle PixelUnshuffle ChannelShuffle Fold Unfold UpsamplingNearest2d ParameterList ParameterDict Sequential
    ModuleList ModuleDict
"""
_FUNCTIONS = """
    linear bilinear conv1d conv2d conv3d matmul mm bmm einsum addmm baddbmm tensordot dot scaled_dot_product_attention
    softmax log_softmax layer_norm rms_norm batch_norm group_norm instance_norm normalize dropout gelu silu mish sigmoid
    tanh softplus elu selu leaky_relu glu mul multiply div divide true_divide pow square sqrt rsqrt exp log mean var std
    norm cross_entropy mse_loss avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d interpolate
"""
_ADDITIONS = """
    __module__ __qualname__ __doc__ __init__ __annotations__ __annotate_func__ __parameters__ __orig_bases__
    __constants__ __static_attributes__ __firstlineno__ reset_parameters extra_repr
"""
FREE = frozenset(_FREE.split())
"""PyTorch's layers that only compare, add, copy and select."""
FUNCTIONS = frozenset(_FUNCTIONS.split())
"""Names of functions and methods that multiply, divide or take roots."""
ADDITIONS = frozenset(_ADDITIONS.split())
"""What a subclass may define and still compute what its base computes."""
OPERATORS = {ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
"""Of numbers of any kind, sizes and indices too, so that they prove nothing; `@` is always one of tensors."""


def from_pytorch(kind: type) -> bool:
    """Is a class one of PyTorch's own layers?"""
    return kind.__module__.split(".")[:2] == ["torch", "nn"]


def adds_nothing(kind: type, base: type) -> bool:
    """Does a class, `base` or a subclass, compute what `base` does, and lose nothing as an instance of it?"""
    own = kind.__mro__[: kind.__mro__.index(base)]
    return all(vars(c).keys() <= ADDITIONS for c in own)


def why_hidden(module: nn.Module) -> str | None:
    """Why a module computes something else than the `forward` of its class; None if it does not, or nothing shows."""
    name = type(module).__name__
    # what torch.compile returns has a forward of its own, and calls the module inside, which is looked at
    if "forward" in vars(module) and type(module).__module__ != "torch._dynamo.eval_frame":
        return f"{name}, forward replaced on the instance; convert before"
    for hook in _hooks(module):
        # weight_norm, spectral_norm and pruning make the weight anew in each forward
        if type(hook).__module__.startswith("torch.nn.utils."):
            return f"{name} with a hook {type(hook).__name__}, which computes its {getattr(hook, 'name', 'weight')}"
        if seen := multiplications(_function(hook)):
            return f"{name} with a hook that has {seen}"
    return None


def unread_hooks(module: nn.Module) -> bool:
    """Has it hooks whose source cannot be read?"""
    return any(not _nodes(_function(hook)) for hook in _hooks(module))


def why_it_multiplies(module: nn.Module) -> str | None:
    """Why a module without submodules counts as one that multiplies; None if it does not, or nothing shows."""
    kind = type(module)
    name = kind.__name__
    known = next((c for c in kind.__mro__ if from_pytorch(c)), nn.Module)
    if known is not nn.Module and (adds_nothing(kind, known) or _only_looks_up(module)):
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            return f"{name} with max_norm or scale_grad_by_freq"
        if isinstance(module, nn.EmbeddingBag) and (module.mode != "sum" or module.max_norm is not None):
            return f"{name} with mode={module.mode!r} or max_norm"
        if isinstance(module, nn.CrossEntropyLoss):
            return f"{name}: a loss is not converted, use PAMCrossEntropy"
        return None if known.__name__ in FREE else f"{name}, no piecewise affine version here"
    if isinstance(module, nn.Embedding):
        return f"{name}, an Embedding with code of its own"
    if any(True for _ in module.parameters(recurse=False)):
        return f"{name}, an unknown module with parameters"
    return why_its_forward_does(module)


def why_its_forward_does(module: nn.Module) -> str | None:
    """Which multiplying functions a `forward` that is not PyTorch's calls; None if none shows."""
    seen = [] if _has_pytorchs_forward(module) else _calls(type(module).forward)
    return f"{type(module).__name__}, its forward calls {', '.join(seen)}" if seen else None


def operators(module: nn.Module) -> str:
    """Operators in a `forward` that is not PyTorch's which multiply if their operands are floats, such as "*, /"."""
    return "" if _has_pytorchs_forward(module) else ", ".join(_operators(type(module).forward))


def multiplications(function: Callable[..., Any]) -> str:
    """What the source of a function shows that may multiply floats, such as "softmax, *"; "" if nothing."""
    return ", ".join([*_calls(function), *_operators(function)])


def names(function: Callable[..., Any]) -> set[str]:
    """All plain names in the source of a function."""
    return {node.id for node in _nodes(function) if isinstance(node, ast.Name)}


def keywords(function: Callable[..., Any], called: str) -> list[ast.keyword]:
    """Named arguments of all calls of `called` in the source of a function."""
    calls = [node for node in _nodes(function) if isinstance(node, ast.Call)]
    return [k for call in calls if getattr(call.func, "id", "") == called for k in call.keywords if k.arg]


def _has_pytorchs_forward(module: nn.Module) -> bool:
    return from_pytorch(next(c for c in type(module).__mro__ if "forward" in vars(c)))


def _only_looks_up(module: nn.Module) -> bool:
    """Is it an nn.Embedding whose own `forward` works on indices alone, as learned positions do?"""
    if not isinstance(module, nn.Embedding) or [n for n, _ in module.named_parameters()] != ["weight"]:
        return False
    kind = type(module)
    own = kind.__mro__[: kind.__mro__.index(nn.Embedding)]
    if any(vars(c).keys() & {"__call__", "__getattr__", "weight"} for c in own):
        return False
    for forward in (vars(c)["forward"] for c in own if "forward" in vars(c)):
        returned = [node.value for node in _nodes(forward) if isinstance(node, ast.Return)]
        # what goes into an embedding are integers; what comes out must not be touched
        if not returned or any(not _calls_base(value) for value in returned) or _calls(forward):
            return False
    return True


def _calls_base(value: ast.AST | None) -> bool:
    called = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    return called.startswith("super(") and called.endswith(").forward")


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _function(hook: Any) -> Any:
    hook = getattr(hook, "func", hook)  # of functools.partial
    return hook if inspect.isroutine(hook) else type(hook).__call__


def _calls(function: Callable[..., Any]) -> list[str]:
    found = set()
    for node in _nodes(function):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            # self.softmax(…) is a submodule or a method, which is looked at by itself
            own = isinstance(called, ast.Attribute) and getattr(called.value, "id", "") == "self"
            if name in FUNCTIONS and not own:
                found.add(name)
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult):
            found.add("@")
    return sorted(found)


def _operators(function: Callable[..., Any]) -> list[str]:
    nodes = [node.op for node in _nodes(function) if isinstance(node, (ast.BinOp, ast.AugAssign))]
    return sorted({OPERATORS[type(op)] for op in nodes if type(op) in OPERATORS})


@functools.lru_cache(maxsize=512)
def _nodes(function: Callable[..., Any]) -> tuple[ast.AST, ...]:
    try:
        return tuple(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
        return ()
