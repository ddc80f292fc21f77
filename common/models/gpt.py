"""Decoder-only transformer language model (GPT-2's layout), several seeds in one stack.

Token plus learned position embeddings, pre-LN blocks, a final LN, and a head tied to the token embedding. Initialised
as GPT-2: normal(0, 0.02), projections into the residual stream divided by sqrt(2 n_layer), biases zero.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from common.models import stacked
from common.models.attention import INIT_STD, NormalLinear, PreNormBlock
from common.models.stacked import Embedding, LayerNorm


class GPT(nn.Module):
    """Stack of len(seeds) language models.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        vocab: V, tokens (256 for bytes).
        d_model: d, width of the residual stream, a multiple of n_head.
        n_layer: transformer blocks.
        n_head: attention heads.
        context: T_max, longest input.
        bias: biases in linear layers and layer norms.
        gains: every linear layer, the head included, has a learnable gain a row (it gives back the norm that a
            rotational optimizer holds fixed).
        weight_standardization: standardise the rows of every linear layer, the head included (embedding look-ups
            use the plain rows).
        tied: the head's weight is the token embedding.
        dropout: probability on attention weights, embeddings and residual branches.

    Input ids int64 (n_models, B, T), T <= context; output logits (n_models, B, T, V).

    Raises:
        ValueError: n_head does not divide d_model, or the input is longer than `context`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        vocab: int = 256,
        d_model: int = 64,
        n_layer: int = 2,
        n_head: int = 4,
        context: int = 48,
        bias: bool = True,
        gains: bool = False,
        weight_standardization: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_models = len(seeds)
        self.context, self.dropout = context, dropout
        self.token = Embedding(n_models, vocab, d_model, INIT_STD)
        self.position = Embedding(n_models, context, d_model, INIT_STD)
        self.blocks = nn.Sequential(
            *(
                PreNormBlock(
                    n_models, d_model, n_head, n_layer, bias=bias, gains=gains,
                    weight_standardization=weight_standardization, dropout=dropout,
                )
                for _ in range(n_layer)
            )
        )  # fmt: skip
        self.norm = LayerNorm(n_models, d_model, bias)
        self.head = NormalLinear(
            n_models, d_model, vocab, bias=False, gain=gains, weight_standardization=weight_standardization
        )
        if tied:
            self.head.weight = self.token.weight
        stacked.init_stacked(self, seeds)

    def forward(self, ids: Tensor) -> Tensor:
        """Return next-token logits (n_models, B, T, V) of ids (n_models, B, T)."""
        n_models, _, length = ids.shape
        if length > self.context:
            raise ValueError(f"ids of length {length}: must be <= context={self.context}")
        position = self.position.weight.view(n_models, 1, self.context, -1)[:, :, :length]  # (M, 1, T, d)
        x = self.token(ids) + position  # (M, B, T, d)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.head(self.norm(self.blocks(x)))  # (M, B, T, V)
