"""Piecewise affine parts for models of Hugging Face transformers; importing this imports transformers.

A model calls whatever attention function is registered under the `_attn_implementation` of its configuration.
Importing this puts "pam" there; `model.set_attn_implementation("pam")` then uses it, with `pam_attention`'s defaults
unless an attention module has `pam_options`, which `convert_to_mulfree` sets. These are of a class of this file, so
that loading a pickled converted model imports it, and finds "pam".
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.pytorch_utils import Conv1D

from mulfree_training.attention import INF, attend
from mulfree_training.inspection import keywords, names
from mulfree_training.modules import Arithmetic
from mulfree_training.products import pam_matmul

NAME = "pam"
GELUS = (FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, QuickGELUActivation)
"""All approximate one function, and so does `PAMGELU`."""
DEFAULTS = {"products": "pam", "normaliser": "pam", "derivative": "approx", "alpha": None, "backend": ""}
"""`pam_options` of an attention module that has none."""
UNDERSTOOD = {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias"}
_HARMLESS = """
    cache_position deterministic logits_to_keep num_items_in_batch output_attentions output_hidden_states
    output_router_logits position_embeddings position_ids return_dict seq_idx sliding_window token_type_ids use_cache
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Arguments that ask for nothing, or for what the mask says already."""
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""Models hand these to flash attention alone."""


class Options(dict[str, Any]):
    """`pam_options` of an attention module: the keys of `DEFAULTS`."""


class PAMConv1D(Arithmetic, Conv1D):
    """`transformers.pytorch_utils.Conv1D` with PAM, a linear layer whose weight is (in, out)."""

    takes_pair = True

    def forward(self, x: Tensor) -> Tensor:
        """(…, nx) -> (…, nf)."""
        return pam_matmul(x, self.weight, **self.arithmetic) + self.bias


def register_transformers() -> None:
    """Make "pam" known to transformers, as importing this has done; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # bool, True takes part, or None where causality says it all


def reads_interface(kind: type[nn.Module]) -> bool:
    """Does the `forward` of a class look up the attention function of its configuration?"""
    return bool(names(kind.forward) & {"ALL_ATTENTION_FUNCTIONS", "attention_interface"})


def attention_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Paths and modules that call an attention function."""
    found = [(path, module) for path, module in model.named_modules() if reads_interface(type(module))]
    return [(path, module) for path, module in found if isinstance(getattr(module, "config", None), PretrainedConfig)]


def why_unsupported(module: nn.Module) -> str | None:
    """Why "pam" cannot be the attention function of a module; None if it can, as far as its source shows."""
    if "forward" in vars(module):
        return "forward replaced on the instance; convert before"
    for keyword in keywords(type(module).forward, "attention_interface"):
        value = keyword.value
        if keyword.arg in UNDERSTOOD | HARMLESS | PACKED:
            continue
        if isinstance(value, ast.Constant) and value.value is None:
            continue
        of_module = isinstance(value, ast.Attribute) and getattr(value.value, "id", "") == "self"
        # a local variable may be None for some attention functions only, so it counts as something
        if not of_module or getattr(module, value.attr, None) is not None:  # type: ignore[attr-defined]
            return f"its attention takes {keyword.arg}, which has no piecewise affine version here"
    return None


def switch(model: PreTrainedModel, modules: Iterable[nn.Module], memo: dict[int, Any]) -> None:
    """Make "pam" the attention function of some attention modules, and of no other model.

    Args:
        model: all its modules get copies of their configurations, since other models may hold the same object.
        modules: attention modules in it, all those of their configurations.
        memo: of `copy.deepcopy`, one for all models that are converted together: what shared one goes on sharing one.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                private = copy.deepcopy(value, memo)
                memo[id(private)] = private
                setattr(module, name, private)
    for module in modules:
        module.config._attn_implementation_internal = NAME  # type: ignore[union-attr]
    # a model around them makes the masks by its own configuration
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            inner = [module.config._attn_implementation for _, module in attention_modules(part)]  # type: ignore[union-attr]
            if inner and set(inner) == {NAME}:
                part.config._attn_implementation_internal = NAME


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """As transformers calls it: (B, H, L, E) in; (B, L, H, D) and weights (B, H, L, S) out.

    Raises:
        NotImplementedError: an argument that would change what attention computes, or may.
    """
    for name, given in kwargs.items():
        if name not in HARMLESS and given is not None:
            raise NotImplementedError(f"{name}: must be None for attn_implementation={NAME!r}, which cannot heed it")
    options = dict(getattr(module, "pam_options", DEFAULTS))
    products, normaliser = options.pop("products"), options.pop("normaliser")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1  # one query behind a cache sees all
    if position_bias is not None:
        if attention_mask is None:
            attention_mask = position_bias
        elif attention_mask.dtype is torch.bool:
            attention_mask = torch.where(attention_mask, position_bias, -INF)
        else:
            attention_mask = attention_mask + position_bias
    out, weights = attend(
        query, key, value, attention_mask, dropout, causal, scaling, key.shape[1] != query.shape[1],
        products=products, normaliser=normaliser, options=options,
    )  # fmt: skip
    return out.transpose(1, 2), weights


register_transformers()  # a pickled model finds its attention function once its options are loaded
