"""Transformer parts for n_models networks side by side: linear layer with a transformer's initialisation, attention,
and the pre-LN block that the language model and the vision transformer share. Activations are (M, B, T, d).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.stacked import LayerNorm, Linear, chunk

INIT_STD = 0.02


class NormalLinear(Linear):
    """`stacked.Linear` whose weights are drawn from normal(0, std) and whose biases are 0."""

    def __init__(
        self,
        n_models: int,
        in_features: int,
        out_features: int,
        std: float = INIT_STD,
        bias: bool = True,
        gain: bool = False,
        weight_standardization: bool = False,
        keep_init_std: bool = True,
    ) -> None:
        self.std = std
        super().__init__(n_models, in_features, out_features, bias, gain, weight_standardization, keep_init_std)

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Draw one model's weight; zero its bias."""
        nn.init.normal_(chunk(self.weight, self.n_models, index), std=self.std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(chunk(self.bias, self.n_models, index))


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(M, B, T, d) -> (M*B, n_head, T, d / n_head), the layout of scaled_dot_product_attention."""
    return x.flatten(0, 1).unflatten(2, (n_head, -1)).transpose(1, 2)


def merge_heads(x: Tensor, n_models: int) -> Tensor:
    """(M*B, n_head, T, d / n_head) -> (M, B, T, d)."""
    return x.transpose(1, 2).flatten(2).unflatten(0, (n_models, -1))


class PreNormBlock(nn.Module):
    """x + attention(LN x), then x + mlp(LN x), with GELU and a hidden layer of 4 d.

    Args:
        n_models: networks in the stack.
        d_model: d, a multiple of n_head.
        n_head: attention heads.
        n_layer: blocks in the whole network: the projections into the residual stream start sqrt(2 n_layer) times
            smaller (GPT-2); None leaves them at the std of the others.
        causal: a position sees itself and the ones before it.
        bias: biases in linear layers and layer norms.
        gains: a learnable gain on every row of every linear layer.
        weight_standardization: standardise the rows of every linear layer.
        dropout: probability on attention weights and on both branches.
        drop_path: probability that a sample skips a branch (stochastic depth).
        eps: of the layer norms.
    """

    def __init__(
        self,
        n_models: int,
        d_model: int,
        n_head: int,
        n_layer: int | None = None,
        causal: bool = True,
        bias: bool = True,
        gains: bool = False,
        weight_standardization: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"d_model={d_model}: must be a multiple of n_head={n_head}")
        std_out = INIT_STD / math.sqrt(2 * n_layer) if n_layer else INIT_STD
        options = {"bias": bias, "gain": gains, "weight_standardization": weight_standardization}
        self.n_head, self.causal, self.dropout, self.drop_path = n_head, causal, dropout, drop_path
        self.attention_norm = LayerNorm(n_models, d_model, bias, eps)
        self.qkv = NormalLinear(n_models, d_model, 3 * d_model, **options)
        self.attention_out = NormalLinear(n_models, d_model, d_model, std_out, **options)
        self.mlp_norm = LayerNorm(n_models, d_model, bias, eps)
        self.mlp_in = NormalLinear(n_models, d_model, 4 * d_model, **options)
        self.mlp_out = NormalLinear(n_models, 4 * d_model, d_model, std_out, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(M, B, T, d) -> (M, B, T, d)."""
        x = x + self._drop(self.attention_out(self._attention(self.attention_norm(x))))
        return x + self._drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.n_head) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=self.causal)
        return merge_heads(out, x.shape[0])

    def _drop(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            x = x * (torch.empty(*x.shape[:2], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep) / keep)
        return x
