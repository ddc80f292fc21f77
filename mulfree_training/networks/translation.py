"""Encoder-decoder transformer for translation (Vaswani et al. 2017), in the layout of fairseq's for IWSLT14."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.data.pairs import PADDING
from mulfree_training.networks.blocks import Block, Scale, causal_mask


class Translation(nn.Module):
    """Post-LN layers, sinusoidal positions, embeddings scaled by sqrt(d), output layer tied to the target embedding.

    Args:
        source_vocab: tokens of the source language, `PADDING` among them.
        vocab: V, tokens of the target language.
        d_model: width, even and a multiple of n_head.
        n_layer: layers of encoder and decoder each.
        n_head: attention heads.
        d_hidden: width of the hidden layers.
        activation: `relu` or `gelu`.
        dropout: on the embeddings and every branch.

    Input source ids int64 (B, S) and target ids int64 (B, T), output logits of the next token (B, T, V).
    """

    def __init__(
        self,
        source_vocab: int = 256,
        vocab: int = 256,
        d_model: int = 64,
        n_layer: int = 2,
        n_head: int = 4,
        d_hidden: int = 128,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"model.d_model={d_model}: must be even, for sine and cosine positions")
        self.source = nn.Embedding(source_vocab, d_model, PADDING)
        self.target = nn.Embedding(vocab, d_model, PADDING)
        self.scale, self.dropout = Scale(math.sqrt(d_model)), nn.Dropout(dropout)
        shape = (d_model, n_head, d_hidden, activation)
        self.encoder = nn.ModuleList(Block(*shape, pre_norm=False, dropout=dropout) for _ in range(n_layer))
        self.decoder = nn.ModuleList(Block(*shape, pre_norm=False, cross=True, dropout=dropout) for _ in range(n_layer))
        self.head = nn.Linear(d_model, vocab, bias=False)
        self._initialise()
        self.head.weight = self.target.weight

    def _initialise(self) -> None:
        """Xavier's uniform rule for projections (1 / sqrt 2 of it where query, key and value are one), fairseq's."""
        for part in self.modules():
            if isinstance(part, nn.MultiheadAttention):
                for weight in part.in_proj_weight.chunk(3):
                    nn.init.xavier_uniform_(weight, gain=1 / math.sqrt(2))
                nn.init.zeros_(part.in_proj_bias)
                nn.init.xavier_uniform_(part.out_proj.weight)
                nn.init.zeros_(part.out_proj.bias)
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=part.embedding_dim**-0.5)
                with torch.no_grad():
                    part.weight[PADDING] = 0

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each target token."""
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded source (B, S, d) and its padding, bool (B, S)."""
        padding = source == PADDING
        x = self._embed(self.source, source)
        for block in self.encoder:
            x = block(x, padding=padding)
        return x, padding

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Logits (B, T, V) given the encoded source; padding of the target stands at its end, hidden by causality."""
        x, mask = self._embed(self.target, target), causal_mask(target.shape[1], target.device)
        for block in self.decoder:
            x = block(x, mask, memory=memory, memory_padding=padding)
        return self.head(x)

    def _embed(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        return self.dropout(self.scale(table(ids)) + sinusoids(ids.shape[1], table.embedding_dim, ids.device))


def sinusoids(length: int, dim: int, device: torch.device) -> Tensor:
    """Sine and cosine positions (T, d) float32, a table: sines in the first half, cosines in the second."""
    frequencies = [math.exp(-math.log(10_000) * i / max(1, dim // 2 - 1)) for i in range(dim // 2)]
    angles = [[t * f for f in frequencies] for t in range(length)]
    rows = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
    return torch.tensor(rows, device=device)
