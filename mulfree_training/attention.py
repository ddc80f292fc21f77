"""Attention with piecewise affine products, scaling, softmax and dropout: a function and a module.

Two switches make the rows of the paper's table of replacements: `products` for the matrix products (and the module's
projections), `normaliser` for scaling, softmax and dropout. With an ordinary normaliser the scores are scaled after
the product, as PyTorch does; with a piecewise affine one the queries are scaled before it, as the paper's code does.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training.arguments import Rule
from mulfree_training.functional import pam_dropout, pam_softmax
from mulfree_training.modules import Arithmetic, PAMLinear, cast
from mulfree_training.primitives import pam_div, pam_mul
from mulfree_training.products import pam_linear, pam_matmul

Kind = Literal["pam", "standard"]
INF = float("inf")


def pam_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    products: Kind = "pam",
    normaliser: Kind = "pam",
    derivative: Rule = "approx",
    alpha: float | None = None,
    backend: str = "",
) -> Tensor:
    """Softmax(q k^T scale) v, the arguments of `F.scaled_dot_product_attention`.

    Args:
        query: (…, L, E), float32, bfloat16 or float64.
        key: (…, S, E).
        value: (…, S, D).
        attn_mask: broadcasts to (…, L, S); bool (True takes part) or float, added to the scores. A row that sees
            nothing gives zeros.
        dropout_p: of the weights, in [0, 1); applied whenever it is not 0, as in PyTorch.
        is_causal: hides keys behind the query, query i and key i at the same place; may go with a mask.
        scale: of the scores; None is 1 / sqrt E.
        enable_gqa: key and value have fewer heads (third dimension from the end), each for a group of query heads.
        products: `pam`, or `standard` for ordinary matrix products.
        normaliser: `pam` for scaling, softmax and dropout, or `standard`.
        derivative, alpha, backend: see `primitives`.

    Returns: (…, L, D).

    Raises:
        TypeError: other dtypes, or different ones.
        ValueError: shapes that do not fit, or an option outside its range.
    """
    options = {"derivative": derivative, "alpha": alpha, "backend": backend}
    how: dict[str, Any] = {"products": products, "normaliser": normaliser, "options": options}
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **how)[0]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    products: Kind,
    normaliser: Kind,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """As `pam_attention`; output and weights (…, L, S), the latter after dropout."""
    check_kind("products", products)
    check_kind("normaliser", normaliser)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: must have >= 2 dimensions")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}: must be in [0, 1)")
    if enable_gqa:
        key, value = (_for_all_heads(name, x, query) for name, x in (("key", key), ("value", value)))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return pam_matmul(a, b, **options) if products == "pam" else a @ b

    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if normaliser == "pam":
        scores = product(pam_mul(query, scale, **options), key.mT)  # (…, L, S)
    else:
        scores = product(query, key.mT) * scale
    scores = _masked(scores, attn_mask, is_causal)
    if normaliser == "pam":
        weights = pam_softmax(scores, **options)
        weights = pam_dropout(weights, dropout_p, **options)
    else:
        weights = _softmax(scores, attn_mask is not None)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
    return product(weights, value), weights


def check_kind(name: str, kind: str) -> None:
    """Refuse a switch that is neither `pam` nor `standard` with a ValueError."""
    if kind not in ("pam", "standard"):
        raise ValueError(f"{name}={kind!r}: must be pam or standard")


def _for_all_heads(name: str, x: Tensor, query: Tensor) -> Tensor:
    """Repeat the heads of keys or values, (…, H / n, S, D) -> (…, H, S, D)."""
    if x.dim() < 3 or query.dim() < 3 or query.shape[-3] % x.shape[-3]:
        raise ValueError(f"{name} of shape {tuple(x.shape)}: heads must divide those of query {tuple(query.shape)}")
    n = query.shape[-3] // x.shape[-3]
    return x.unsqueeze(-3).expand(*x.shape[:-2], n, *x.shape[-2:]).flatten(-4, -3)


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        scores = scores.masked_fill(_later(scores.shape[-2], scores.shape[-1], scores.device), -INF)
    if mask is None:
        return scores
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -INF)
    if not mask.dtype.is_floating_point:
        raise TypeError(f"attn_mask of dtype {mask.dtype}: must be bool or floating point")
    return scores + mask.to(scores.dtype)


def _later(length: int, keys: int, device: torch.device) -> Tensor:
    """bool (L, S), True where the key comes after the query."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).triu(1)


def _softmax(scores: Tensor, masked: bool) -> Tensor:
    """Ordinary softmax; zeros, and no NaN in its derivative either, in rows that see nothing."""
    if not masked:
        return scores.softmax(-1)
    empty = (scores == -INF).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


class PAMAttention(Arithmetic, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with piecewise affine arithmetic: same constructor, state dict and call.

    In an nn.TransformerEncoderLayer it may take the place of `self_attn`, or be made there by
    `convert_to_mulfree(layer.self_attn)`: PyTorch's fused inference path, which would go round it, is then off. That
    path does not ask what `linear1` and `linear2` are: for these call `convert_to_mulfree` on the whole layer.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `nn.MultiheadAttention`.
        products: `pam` for projections and attention products, or `standard`.
        normaliser: `pam` for scaling, softmax, dropout and the mean of weights over heads, or `standard`.
        derivative, alpha, backend: see `modules`.

    Raises:
        ValueError: an option outside its range.
    """

    products: Kind = "standard"
    normaliser: Kind = "standard"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        products: Kind = "pam",
        normaliser: Kind = "pam",
        derivative: Rule = "approx",
        alpha: float | None = None,
        backend: str = "",
    ) -> None:
        check_kind("products", products)
        check_kind("normaliser", normaliser)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim}: must be a positive multiple of num_heads={num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be in [0, 1)")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)
        self.products, self.normaliser = products, normaliser
        self._qkv_same_embed_dim = False  # PyTorch's fused encoder layer takes the weights of attention that says True
        if products == "pam":
            out = PAMLinear(embed_dim, embed_dim, bias, "meta", **self.arithmetic)
            out.weight, out.bias = self.out_proj.weight, self.out_proj.bias  # as PyTorch has initialised them
            self.out_proj = out  # type: ignore[assignment]

    def _reset_parameters(self) -> None:
        """As PyTorch's, which asks `_qkv_same_embed_dim` which projections there are."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries to keys.

        Args:
            query: (B, L, embed_dim) if batch_first, (L, B, embed_dim) if not, or (L, embed_dim).
            key: as query, length S and width kdim.
            value: as key, width vdim.
            key_padding_mask: (B, S) or (S,), bool (True hides) or float (added to the scores).
            need_weights: return the weights too.
            attn_mask: (L, S) or (B * num_heads, L, S), bool (True hides) or float.
            average_attn_weights: their mean over heads.
            is_causal: without attn_mask, hides later keys (PyTorch demands the mask); with it, the mask alone counts.

        Returns:
            Output in query's shape, and the weights (B, L, S), or (B, num_heads, L, S) without averaging, or None.

        Raises:
            ValueError: shapes that do not fit, or a nested tensor.
        """
        if query.is_nested:
            raise ValueError(
                "query is a nested tensor: must be an ordinary one; for an nn.TransformerEncoder around this module set"
                " its use_nested_tensor=False, or call convert_to_mulfree on all of it"
            )
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise ValueError(f"query, key, value of shapes {shapes}: must all have 2 or all have 3 dimensions")
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        q, k, v = self._projected(query, key, value)  # (B, L, embed_dim), (B, S, embed_dim) twice
        if is_causal and attn_mask is None:
            attn_mask = _later(q.shape[1], k.shape[1], q.device)
        masks = self._masks(q, k, key_padding_mask, attn_mask)
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, own.expand(x.shape[0], 1, -1)], 1)
                for x, own in zip((k, v), cast(k, self.bias_k, self.bias_v), strict=True)
            )
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        out, weights = attend(
            q, k, v, self._merged([F.pad(m, (0, added)) for m in masks]), self.dropout if self.training else 0.0,
            False, None, False, products=self.products, normaliser=self.normaliser, options=self.arithmetic,
        )  # fmt: skip
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, embed_dim)
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        if average_attn_weights:
            weights = self._mean_of_heads(weights)
        return out, weights if batched else weights[0]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batch first, then the three projections: one product where the inputs are the same tensor."""
        same = query is key and key is value and self.in_proj_weight is not None

        def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return pam_linear(x, *cast(x, w, b), **self.arithmetic) if self.products == "pam" else F.linear(x, w, b)

        def first(x: Tensor) -> Tensor:
            if x.dim() == 2:
                return x[None]
            return x if self.batch_first else x.transpose(0, 1)

        if same:
            q, k, v = linear(first(query), self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: tuple[Tensor | None, ...] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (linear(first(x), w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if k.shape != v.shape or q.shape[0] != k.shape[0]:
            shapes = f"{tuple(key.shape)}, {tuple(value.shape)}"
            raise ValueError(
                f"key, value of shapes {shapes}: must have one length, and the batch of {tuple(query.shape)}"
            )
        return q, k, v

    def _masks(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """Both masks where there are, broadcasting to (B, num_heads, L, S)."""
        (batch, length), keys, masks = q.shape[:2], k.shape[1], []
        if mask is not None:
            allowed = ((length, keys), (batch * self.num_heads, length, keys))
            if tuple(mask.shape) not in allowed:
                raise ValueError(f"attn_mask of shape {tuple(mask.shape)}: must be {allowed[0]} or {allowed[1]}")
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads)))
        if padding is not None:
            if tuple(padding.shape) != (batch, keys):
                raise ValueError(f"key_padding_mask of shape {tuple(padding.shape)}: must be {(batch, keys)}")
            masks.append(padding[:, None, None])
        return masks

    @staticmethod
    def _merged(masks: list[Tensor]) -> Tensor | None:
        """One mask in the sense of `attend`: bool of what is seen, or float."""
        if not masks:
            return None
        if all(m.dtype is torch.bool for m in masks):
            return ~functools.reduce(torch.logical_or, masks)
        floats = [torch.where(m, -INF, 0.0) if m.dtype is torch.bool else m for m in masks]
        return functools.reduce(torch.add, floats)

    def _mean_of_heads(self, weights: Tensor) -> Tensor:
        """(B, num_heads, L, S) -> (B, L, S)."""
        if self.normaliser == "standard":
            return weights.mean(1)
        return pam_div(weights.sum(1), float(self.num_heads), **self.arithmetic)

    def extra_repr(self) -> str:
        """Sizes, the two switches and the arithmetic."""
        own = f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"
        return f"{own}, products={self.products!r}, normaliser={self.normaliser!r}, {super().extra_repr()}"
