"""An encoder around a transformer of Hugging Face's library, for text (batch, tokens) or images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.config import check
from multimodn.encoders.recurrent import check_state

KINDS = ("tokens", "pixels")
POOLS = ("first", "mean")
ATTENTIONS = ("eager", "sdpa")
"""Ways to compute attention that every machine has; others are left to the library's choice when a config is built."""
LOADING = ("_name_or_path", "auto_map", "_implementation", "quantization_config")
"""In keys of a backbone's config that say where it, its code or its kernels come from, not what it is."""


class HuggingFaceEncoder(nn.Module):
    """State and a text or an image -> next state: the backbone's last hidden layer, pooled, joins the state.

    The last layer is linear on [pooled hidden, s], without activation. Padding belongs at the end of a text: ids equal
    to `padding`, or NaN (then give the mask of the modality explicitly). Rows of a batch stay apart as long as the
    backbone keeps them apart: one with BatchNorm does not in training, unless frozen.

    Args:
        backbone: a model of `transformers` that gives `last_hidden_state`, as `AutoModel` builds or loads it; of an
            encoder-decoder pair the encoder alone. It is used as it is, not copied.
        state_size: S.
        kind: `tokens` or `pixels`, what x holds.
        pool: `first`: the hidden vector of the first token (the class token of BERT and ViT). `mean`: over the tokens
            that are not padding, or over all places of an image.
        freeze: keep the backbone in evaluation mode and its parameters without gradients; only the last layer learns.
        padding: id of the padding token.

    Shapes: state (B, S), x (B, T) ids, integers or whole floats, or (B, C, H, W) -> (B, S).

    Raises:
        ValueError: an argument out of range, state or x of another shape, or ids in a dtype that cannot tell all
            tokens apart.
    """

    def __init__(
        self,
        backbone: nn.Module,
        state_size: int,
        *,
        kind: str = "tokens",
        pool: str = "first",
        freeze: bool = False,
        padding: int = 0,
    ) -> None:
        super().__init__()
        check("state_size", state_size, state_size >= 1, ">= 1")
        check("kind", kind, kind in KINDS, f"one of {', '.join(KINDS)}")
        check("pool", pool, pool in POOLS, f"one of {', '.join(POOLS)}")
        settings = cast(Any, getattr(backbone, "config", None))
        name = type(backbone).__name__
        check("backbone", name, hasattr(settings, "model_type"), "a model of transformers")
        check("backbone", name, not getattr(settings, "is_encoder_decoder", False), "an encoder alone, without decoder")
        widths = getattr(settings, "hidden_sizes", None) or [None]
        width = getattr(settings, "hidden_size", None) or widths[-1]
        check("backbone", name, isinstance(width, int), "a model whose config has hidden_size")
        self.state_size, self.kind, self.pool, self.freeze, self.padding = state_size, kind, pool, freeze, padding
        self.backbone = backbone
        self.last = nn.Linear(width + state_size, state_size)
        if freeze:
            backbone.requires_grad_(False).eval()

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` takes; fit for JSON.

        Raises:
            ValueError: the backbone is not of the class that `transformers.AutoModel` builds from its config.
        """
        from transformers import MODEL_MAPPING

        settings = cast(Any, self.backbone.config)
        built = MODEL_MAPPING.get(type(settings), None)
        names = [kind.__name__ for kind in (built if isinstance(built, tuple) else (built,)) if kind is not None]
        name = type(self.backbone).__name__
        check("backbone", name, name in names, f"{' or '.join(names) or 'a class of AutoModel'}, to be built again")
        attention = getattr(settings, "_attn_implementation", None)
        return {
            "backbone": _without_loading(json.loads(json.dumps(settings.to_dict()))),
            "attention": attention if attention in ATTENTIONS else None,
            "pooler": getattr(self.backbone, "pooler", None) is not None,
            "state_size": self.state_size,
            "kind": self.kind,
            "pool": self.pool,
            "freeze": self.freeze,
            "padding": self.padding,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HuggingFaceEncoder:
        """An encoder of the same architecture with new random parameters; runs no code but that of `transformers`.

        Raises:
            ValueError: an unknown `model_type`, or a value out of range.
        """
        from transformers import AutoConfig, AutoModel

        rest = dict(config)
        check("backbone", rest.get("backbone"), isinstance(rest.get("backbone"), dict), "the config of a backbone")
        settings = _without_loading(rest.pop("backbone"))
        attention, pooler = rest.pop("attention", None), rest.pop("pooler", True)
        allowed = f"one of {', '.join(ATTENTIONS)}, or null"
        check("attention", attention, attention is None or attention in ATTENTIONS, allowed)
        built = AutoConfig.for_model(settings.pop("model_type", None), **settings)
        chosen = {} if attention is None else {"attn_implementation": attention}
        backbone = AutoModel.from_config(built, trust_remote_code=False, **chosen)
        if not pooler and getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        return cls(backbone, **rest)

    def train(self, mode: bool = True) -> HuggingFaceEncoder:
        """Set the mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Next state."""
        check_state(state, x, self.state_size)
        pooled = self._read_tokens(x) if self.kind == "tokens" else self._read_pixels(x)
        return self.last(torch.cat([pooled.to(state.dtype), state], -1))

    def _read_tokens(self, x: Tensor) -> Tensor:
        """(B, T) ids -> (B, H)."""
        check("x.shape", tuple(x.shape), x.ndim == 2 and x.shape[1] >= 1, "(B, T) with T >= 1")
        if x.is_floating_point():
            tokens = cast(Any, self.backbone).get_input_embeddings().num_embeddings
            exact = round(2 / torch.finfo(x.dtype).eps)  # integers up to here have a float of their own
            check("x.dtype", x.dtype, tokens <= exact, f"an integer or a wider float, to tell {tokens} tokens apart")
            x = x.nan_to_num(float(self.padding))
        ids = x.long()
        real = ids != self.padding  # (B, T)
        # attention over nothing is not a number, and its gradient would spoil the other rows
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        real = real | (~real.any(1, keepdim=True) & first)
        hidden = self.backbone(input_ids=ids, attention_mask=real.long()).last_hidden_state  # (B, T, H)
        if self.pool == "first":
            return hidden[:, 0]
        weights = real.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weights).sum(1) / weights.sum(1)

    def _read_pixels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        check("x.shape", tuple(x.shape), x.ndim == 4, "(B, C, H, W)")
        dtype = next(self.backbone.parameters()).dtype
        hidden = self.backbone(pixel_values=x.to(dtype)).last_hidden_state
        if hidden.ndim == 4:  # a convolutional backbone: (B, width, h, w)
            check("pool", self.pool, self.pool == "mean", "mean, for a backbone without tokens")
            hidden = hidden.flatten(2).transpose(1, 2)
        return hidden[:, 0] if self.pool == "first" else hidden.mean(1)


def _without_loading(value: Any) -> Any:
    """A config, those nested in it included, without the keys that name a place to load from."""
    if isinstance(value, dict):
        kept = [key for key in value if not any(word in key for word in LOADING)]
        return {key: _without_loading(value[key]) for key in kept}
    return [_without_loading(item) for item in value] if isinstance(value, list) else value
