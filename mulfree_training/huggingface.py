"""Piecewise affine parts for models of Hugging Face transformers; importing this imports transformers.

A model calls whatever attention function is registered under its `_attn_implementation`. `register_transformers` puts
"pam" there; `model.set_attn_implementation("pam")` then uses it, with `pam_attention`'s defaults unless an attention
module has `pam_options`, which `convert_to_mulfree` sets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
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
from mulfree_training.modules import Arithmetic
from mulfree_training.products import pam_matmul

NAME = "pam"
GELUS = (FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, QuickGELUActivation)
"""All approximate one function, and so does `PAMGELU`."""
DEFAULTS = {"products": "pam", "normaliser": "pam", "derivative": "approx", "alpha": None, "backend": ""}
"""`pam_options` of an attention module that has none."""


class PAMConv1D(Arithmetic, Conv1D):
    """`transformers.pytorch_utils.Conv1D` with PAM, a linear layer whose weight is (in, out)."""

    takes_pair = True

    def forward(self, x: Tensor) -> Tensor:
        """(…, nx) -> (…, nf)."""
        return pam_matmul(x, self.weight, **self.arithmetic) + self.bias


def register_transformers() -> None:
    """Make "pam" known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # bool, True takes part, or None where causality says it all


def attention_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Paths and modules that may call an attention function."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "is_causal") or "Attention" in type(module).__name__
    ]


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
    """As transformers calls it: (B, H, L, E) in; (B, L, H, D) and weights (B, H, L, S) out."""
    for name in ("softcap", "s_aux", "cache"):  # change what attention computes
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}={kwargs[name]!r}: must be None for attn_implementation={NAME!r}")
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
