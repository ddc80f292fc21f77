"""Does a module that is not converted multiply? What is known of PyTorch's layers, and what others' source shows."""

from __future__ import annotations

import ast
import inspect
import textwrap

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
FREE = frozenset(_FREE.split())
"""PyTorch's layers that only compare, add, copy and select."""
FUNCTIONS = frozenset(_FUNCTIONS.split())
"""Names of functions and methods that multiply, divide or take roots."""
OPERATORS = {ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.MatMult: "@"}


def from_pytorch(module: nn.Module) -> bool:
    """Is its class one of PyTorch's own?"""
    return type(module).__module__.startswith("torch.nn")


def why_it_multiplies(module: nn.Module) -> str | None:
    """Why a module without submodules counts as one that multiplies; None if it does not, or nothing shows."""
    name = type(module).__name__
    if from_pytorch(module):
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            return f"{name} with max_norm or scale_grad_by_freq"
        if isinstance(module, nn.EmbeddingBag) and (module.mode != "sum" or module.max_norm is not None):
            return f"{name} with mode={module.mode!r} or max_norm"
        if isinstance(module, nn.CrossEntropyLoss):
            return f"{name}: a loss is not converted, use PAMCrossEntropy"
        return None if name in FREE else f"{name}, no piecewise affine version here"
    if any(True for _ in module.parameters(recurse=False)):
        return f"{name}, an unknown module with parameters"
    calls = _calls(type(module))
    return f"{name}, its forward calls {', '.join(calls)}" if calls else None


def multiplications(kind: type[nn.Module]) -> str:
    """What the source of its `forward` shows that may multiply floats, such as "softmax, *"; "" if nothing."""
    return ", ".join([*_calls(kind), *_operators(kind)])


def _calls(kind: type[nn.Module]) -> list[str]:
    found = set()
    for node in _nodes(kind):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            # self.softmax(…) is a submodule or a method, which is looked at by itself
            own = isinstance(called, ast.Attribute) and getattr(called.value, "id", "") == "self"
            if name in FUNCTIONS and not own:
                found.add(name)
    return sorted(found)


def _operators(kind: type[nn.Module]) -> list[str]:
    nodes = [node.op for node in _nodes(kind) if isinstance(node, (ast.BinOp, ast.AugAssign))]
    return sorted({OPERATORS[type(op)] for op in nodes if type(op) in OPERATORS})


def _nodes(kind: type[nn.Module]) -> tuple[ast.AST, ...]:
    try:
        return tuple(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))))
    except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
        return ()
