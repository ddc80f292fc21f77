"""The transformer block that all networks share, of standard modules only, so that a converter finds every product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Scale(nn.Module):
    """x times a constant; `product` is what multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.product: Callable[[Tensor, float], Tensor] = torch.mul

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return self.product(x, self.factor)


class DropPath(nn.Module):
    """Skips a branch for a sample with probability p (stochastic depth), and scales it by 1 / (1 - p) otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return (x / (1 - self.p)).where(kept, 0.0)


class Block(nn.Module):
    """Self-attention, attention to a memory if there is one, and a hidden layer, each with a residual and a norm.

    Args:
        d_model: d, a multiple of n_head.
        n_head: attention heads.
        d_hidden: width of the hidden layer.
        activation: `relu` or `gelu`.
        pre_norm: the norm stands before each branch; otherwise after the residual (post-LN).
        cross: attends to a memory too.
        dropout: on every branch.
        drop_path: probability that a sample skips a branch.
        eps: of the layer norms.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_hidden: int,
        activation: str = "relu",
        *,
        pre_norm: bool = True,
        cross: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = nn.MultiheadAttention(d_model, n_head, batch_first=True)
        self.attention_norm = nn.LayerNorm(d_model, eps)
        self.cross = nn.MultiheadAttention(d_model, n_head, batch_first=True) if cross else None
        self.cross_norm = nn.LayerNorm(d_model, eps) if cross else None
        self.hidden = nn.Linear(d_model, d_hidden)
        self.activation = ACTIVATIONS[activation]()
        self.out = nn.Linear(d_hidden, d_model)
        self.out_norm = nn.LayerNorm(d_model, eps)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        causal: Tensor | None = None,
        padding: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, T, d).
            causal: bool (T, T), True where a position must not be seen; None sees all.
            padding: bool (B, T), True at positions that do not exist.
            memory: (B, S, d), what the second attention looks at.
            memory_padding: bool (B, S), True at its positions that do not exist.

        Returns: (B, T, d).
        """

        def attend(x: Tensor) -> Tensor:
            options = {"attn_mask": causal, "is_causal": causal is not None}
            return self.attention(x, x, x, key_padding_mask=padding, need_weights=False, **options)[0]

        x = self._branch(x, self.attention_norm, attend)
        if self.cross is not None and self.cross_norm is not None:
            other = self.cross

            def look(x: Tensor) -> Tensor:
                return other(x, memory, memory, key_padding_mask=memory_padding, need_weights=False)[0]

            x = self._branch(x, self.cross_norm, look)
        return self._branch(x, self.out_norm, lambda x: self.out(self.activation(self.hidden(x))))

    def _branch(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        y = branch(norm(x) if self.pre_norm else x)
        x = x + self.drop_path(self.dropout(y))
        return x if self.pre_norm else norm(x)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """bool (T, T), True above the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def initialise(module: nn.Module, std: float) -> None:
    """Weights of linear layers and embeddings from normal(0, std) cut at two std (ViT, GPT), biases zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(part, nn.MultiheadAttention):
            nn.init.trunc_normal_(part.in_proj_weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(part.in_proj_bias)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
