"""The paper's attentions inside networks that exist already: our own layers, and Hugging Face transformers.

Transformers lets a model call any registered attention function (`AttentionInterface`). `register_transformers` puts
"qk_sparse" and "hash_sparse" there; a model then uses them through `model.set_attn_implementation("hash_sparse")`, and
`convert_attention` does both and sets the options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.hashing import lsh_hash, lsh_projections, random_buckets, random_keep
from sparse_flash_attention.modules import HASHINGS, DenseSelfAttention, SelfAttention, self_attention

IMPLEMENTATIONS = {"drop": "qk_sparse", "hash": "hash_sparse"}
"""Kind of `convert_attention` -> name in transformers' registry."""


@dataclass
class SparseOptions:
    """How a layer of a transformers model attends; kept on the layer as `sparse_options`.

    Raises:
        ValueError: an option outside its range.
    """

    drop_prob: float = 0.3
    """"drop": probability that a row is dropped as a query, and independently as a key."""
    drop_at_eval: bool = False
    """"drop": also in eval mode."""
    n_buckets: int = 16
    """"hash": buckets, even."""
    hashing: str = "lsh"
    """"hash": "lsh", or "random" for the control."""
    include_self: bool = True
    """"hash": False hides a row from itself."""
    backend: str | None = None
    """Of the attention functions."""
    generator: torch.Generator | None = None
    """Source of randomness; None is torch's global one."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_prob <= 1:
            raise ValueError(f"drop_prob={self.drop_prob}: must be in [0, 1]")
        if self.n_buckets < 2 or self.n_buckets % 2:
            raise ValueError(f"n_buckets={self.n_buckets}: must be even and >= 2")
        if self.hashing not in HASHINGS:
            raise ValueError(f"hashing={self.hashing!r}: must be one of {', '.join(HASHINGS)}")


def convert_attention(model: nn.Module, attention: str = "hash", **options: Any) -> nn.Module:
    """Make a network attend sparsely, in place; its weights stay the very parameters they were.

    Args:
        model: one that holds `DenseSelfAttention` layers (a `SparseGPT`, or your own), or a transformers model whose
            attention goes through `AttentionInterface` (GPT-2, Llama, … with grouped queries too).
        attention: for our layers any kind of `modules.self_attention`; for transformers "hash" or "drop". "drop" with
            drop_prob=0 computes what the dense model computed.
        options: n_buckets, drop_prob, … of the layer, or fields of `SparseOptions` for transformers.

    Returns:
        `model`; itself a `DenseSelfAttention`, the new layer.

    Raises:
        TypeError: nothing in the model can be converted (`nn.MultiheadAttention` cannot: its inputs may differ and its
            masks are arbitrary).
        ValueError: unknown kind, or an option that it does not take or a value outside its range.
    """
    transformers = sys.modules.get("transformers")  # a model of it cannot exist before its import
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return _convert_transformers(model, attention, options)
    if isinstance(model, DenseSelfAttention):
        return _sparse_layer(model, attention, options)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, DenseSelfAttention)
    ]
    if not places:
        found = " (torch.nn.MultiheadAttention is not supported)" if _holds(model, nn.MultiheadAttention) else ""
        kind = type(model).__name__
        raise TypeError(f"model of type {kind}{found}: must hold DenseSelfAttention layers or be a transformers model")
    layers: dict[int, SelfAttention] = {}  # a layer used in several places stays one layer
    for parent, name, child in places:
        if id(child) not in layers:
            layers[id(child)] = _sparse_layer(child, attention, options)
        setattr(parent, name, layers[id(child)])
    return model


def register_transformers() -> None:
    """Make "qk_sparse" and "hash_sparse" known to transformers; calling it again changes nothing.

    Then `model.set_attn_implementation("qk_sparse")` or `attn_implementation="qk_sparse"` at construction works, with
    the defaults of `SparseOptions` unless a layer has `sparse_options`.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, function in (("qk_sparse", _qk_sparse), ("hash_sparse", _hash_sparse)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _padding)


def _sparse_layer(dense: DenseSelfAttention, attention: str, options: dict[str, Any]) -> SelfAttention:
    """Another kind of layer around the projections of a dense one."""
    kept = {"shared_qk": dense.shared_qk, "key_norm": dense.key_norm, "scale": dense.scale}
    weight = dense.in_proj.weight
    with torch.device("meta"):  # its own projections are thrown away
        layer = self_attention(attention, dense.embed_dim, dense.num_heads, **(kept | options))
    if layer.in_proj.weight.shape != weight.shape:
        raise ValueError(f"shared_qk={layer.shared_qk}: must be {dense.shared_qk}, as the converted layer has it")
    layer.in_proj, layer.out_proj = dense.in_proj, dense.out_proj
    if callable(reset := getattr(layer, "reset_projections", None)):
        reset()  # now where the weights are
    return layer.train(dense.training)


def _convert_transformers(model: Any, attention: str, options: dict[str, Any]) -> nn.Module:
    if attention not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention={attention!r}: must be one of {', '.join(IMPLEMENTATIONS)} for transformers models"
        )
    allowed = [f.name for f in fields(SparseOptions)]
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)} for transformers models")
    settings = SparseOptions(**options)
    register_transformers()
    model.set_attn_implementation(IMPLEMENTATIONS[attention])
    if model.config._attn_implementation != IMPLEMENTATIONS[attention]:
        raise TypeError(f"model of type {type(model).__name__}: its attention does not go through AttentionInterface")
    for module in model.modules():
        if hasattr(module, "is_causal"):  # what transformers' attention functions are called with
            module.sparse_options = settings
    return model


def _padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """Transformers' mask for our functions: which keys are not padding, bool (B, Tk), or None for all of them."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "attention mask: must be plain causal or bidirectional with padding; packed sequences, sliding windows and "
            "further mask functions are not supported by sparse attention"
        )
    if isinstance(q_offset, Tensor) or (mask_function is causal_mask_function and q_offset + q_length != kv_length):
        raise ValueError("past_key_values: must be a dynamic cache; static caches hold keys that are not there yet")
    return attention_mask


def _qk_sparse(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`qk_sparse_attention` as transformers calls it: (B, H, T, D) in, (B, T, H, D) out."""
    options = _options(module)

    def attend(q: Tensor, q_keep: Tensor | None, k_keep: Tensor | None, causal: bool) -> Tensor:
        if options.drop_prob and (module.training or options.drop_at_eval):
            keep_prob = 1 - options.drop_prob
            q_keep, k_keep = (
                _both(given, random_keep(x.shape[:3], keep_prob, options.generator, x.device))
                for given, x in ((q_keep, q), (k_keep, key))
            )
        return qk_sparse_attention(
            q, key, value, q_keep, k_keep, scale=kwargs.get("scaling"), causal=causal, backend=options.backend
        )

    return _attend(attend, module, query, key, attention_mask, kwargs)


def _hash_sparse(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`hash_sparse_attention` as transformers calls it; query heads that share a key head share its directions."""
    options = _options(module)

    def attend(q: Tensor, q_keep: Tensor | None, k_keep: Tensor | None, causal: bool) -> Tensor:
        nb, groups = options.n_buckets, q.shape[1] // key.shape[1]
        if options.hashing == "random":
            hashes = random_buckets((*key.shape[:2], max(q.shape[2], key.shape[2])), nb, options.generator, key.device)
            q_hash, k_hash = hashes[..., : q.shape[2]].repeat_interleave(groups, dim=1), hashes[..., : key.shape[2]]
        else:
            drawn = lsh_projections(key.shape[1], key.shape[3], nb, generator=options.generator, device=key.device)
            q_hash = lsh_hash(q, nb, projections=drawn.repeat_interleave(groups, dim=0))
            k_hash = lsh_hash(key, nb, projections=drawn)
        return hash_sparse_attention(
            q, key, value, q_hash, k_hash.repeat_interleave(groups, dim=1), q_keep=q_keep, k_keep=k_keep,
            include_self=options.include_self, scale=kwargs.get("scaling"), causal=causal, backend=options.backend,
        )  # fmt: skip

    return _attend(attend, module, query, key, attention_mask, kwargs)


def _attend(
    attend: Callable[[Tensor, Tensor | None, Tensor | None, bool], Tensor],
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    if kwargs.get("dropout"):
        raise ValueError(
            f"dropout={kwargs['dropout']}: must be 0 on attention weights, which are never formed "
            "(attn_pdrop=0 or attention_dropout=0 in the model's config)"
        )
    k_keep = q_keep = None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: must be (batch, length), padding only"
            )
        k_keep = attention_mask.bool().unsqueeze(1)  # (B, 1, Tk)
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    added = key.shape[2] - query.shape[2] if causal else 0
    if added:  # queries behind a cache are the last rows of a sequence whose earlier queries are dropped
        q_keep = torch.arange(key.shape[2], device=query.device) >= added
        query = F.pad(query, (0, 0, added, 0))
    out = attend(query, q_keep, k_keep, causal)
    return out[:, :, added:].transpose(1, 2), None


def _both(given: Tensor | None, drawn: Tensor) -> Tensor:
    return drawn if given is None else given & drawn


def _options(module: nn.Module) -> SparseOptions:
    found = getattr(module, "sparse_options", None)
    return SparseOptions() if found is None else found


def _holds(model: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(m, kind) for m in model.modules())
