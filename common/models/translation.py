"""Encoder-decoder transformer for translation (Vaswani et al. 2017), several seeds in one stack.

The layout of fairseq's transformer_iwslt_de_en: sinusoidal positions, post-LN layers with ReLU, embeddings scaled by
sqrt(d), decoder input and output embedding tied. Initialised with Xavier's uniform rule for projections and
normal(0, 1/sqrt(d)) for embeddings.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.pairs import PADDING
from common.models import stacked
from common.models.attention import NormalLinear, merge_heads, split_heads
from common.models.stacked import Embedding, LayerNorm, Linear, chunk

QKV_GAIN = 1 / math.sqrt(2)


class XavierLinear(Linear):
    """`stacked.Linear` with Xavier's uniform initialisation times a constant, and zero bias."""

    def __init__(self, n_models: int, c_in: int, c_out: int, gain: bool, xavier_gain: float = 1.0) -> None:
        self.xavier_gain = xavier_gain
        super().__init__(n_models, c_in, c_out, gain=gain)

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Draw one model's weight; zero its bias."""
        nn.init.xavier_uniform_(chunk(self.weight, self.n_models, index), self.xavier_gain, generator)
        if self.bias is not None:
            nn.init.zeros_(chunk(self.bias, self.n_models, index))


class Attention(nn.Module):
    """Multi-head attention from x to memory, both (M, B, ·, d), with separate projections."""

    def __init__(self, n_models: int, d_model: int, n_head: int, gains: bool, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.query = XavierLinear(n_models, d_model, d_model, gains, QKV_GAIN)
        self.key = XavierLinear(n_models, d_model, d_model, gains, QKV_GAIN)
        self.value = XavierLinear(n_models, d_model, d_model, gains, QKV_GAIN)
        self.out = XavierLinear(n_models, d_model, d_model, gains)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return (M, B, T, d).

        Args:
            x: (M, B, T, d), asks.
            memory: (M, B, S, d), is asked.
            mask: bool, broadcastable to (M*B, 1, T, S), True where a position may be seen; None sees all.
            causal: position t sees memory up to t only.
        """
        query = split_heads(self.query(x), self.n_head)
        key, value = split_heads(self.key(memory), self.n_head), split_heads(self.value(memory), self.n_head)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
        return self.out(merge_heads(out, x.shape[0]))


class Layer(nn.Module):
    """One post-LN layer: self-attention, attention to the source (decoder only), feed-forward."""

    def __init__(
        self, n_models: int, d_model: int, d_hidden: int, n_head: int, gains: bool, dropout: float, decoder: bool
    ) -> None:
        super().__init__()
        self.dropout, self.decoder = dropout, decoder
        self.self_attention = Attention(n_models, d_model, n_head, gains, 0.0)
        self.self_norm = LayerNorm(n_models, d_model)
        if decoder:
            self.cross_attention = Attention(n_models, d_model, n_head, gains, 0.0)
            self.cross_norm = LayerNorm(n_models, d_model)
        self.hidden = Linear(n_models, d_model, d_hidden, gain=gains)
        self.out = Linear(n_models, d_hidden, d_model, gain=gains)
        self.out_norm = LayerNorm(n_models, d_model)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(M, B, T, d) -> (M, B, T, d); `mask` (M*B, 1, 1, S) marks the source's real tokens."""
        own = self.self_attention(x, x, None if self.decoder else mask, causal=self.decoder)
        x = self.self_norm(x + self._drop(own))
        if self.decoder and memory is not None:
            x = self.cross_norm(x + self._drop(self.cross_attention(x, memory, mask)))
        return self.out_norm(x + self._drop(self.out(F.relu(self.hidden(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TranslationTransformer(nn.Module):
    """Stack of len(seeds) translation models.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        source_vocab: tokens of the source language, `PADDING` among them.
        vocab: V, tokens of the target language.
        d_model: d, even and a multiple of n_head.
        d_hidden: hidden width of the feed-forward layers.
        n_layer: layers of the encoder and of the decoder each.
        n_head: attention heads.
        gains: a learnable gain on every row of every linear layer, the output layer included.
        tied: output layer and target embedding share their weight.
        dropout: probability on embeddings and branches.

    Input source ids int64 (n_models, B, S) and target ids int64 (n_models, B, T), output next-token logits
    (n_models, B, T, V). Padding in the target follows the text, so that causality hides it.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        source_vocab: int = 256,
        vocab: int = 256,
        d_model: int = 64,
        d_hidden: int = 256,
        n_layer: int = 2,
        n_head: int = 4,
        gains: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model={d_model}: must be even, for sine and cosine positions")
        n_models, std = len(seeds), d_model**-0.5
        self.dropout = dropout
        self.source = Embedding(n_models, source_vocab, d_model, std)
        self.target = Embedding(n_models, vocab, d_model, std)
        shape = (n_models, d_model, d_hidden, n_head, gains, dropout)
        self.encoder = nn.ModuleList(Layer(*shape, decoder=False) for _ in range(n_layer))
        self.decoder = nn.ModuleList(Layer(*shape, decoder=True) for _ in range(n_layer))
        self.head = NormalLinear(n_models, d_model, vocab, std, bias=False, gain=gains)
        if tied:
            self.head.weight = self.target.weight
        stacked.init_stacked(self, seeds)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (n_models, B, T, V) of the token after each target token."""
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoded source (M, B, S, d) and its mask (M*B, 1, 1, S), True at real tokens."""
        mask = (source != PADDING).flatten(0, 1)[:, None, None]
        x = self._embed(self.source, source)
        for layer in self.encoder:
            x = layer(x, mask=mask)
        return x, mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return logits (M, B, T, V) given the encoded source and its mask."""
        x = self._embed(self.target, target)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return self.head(x)

    def _embed(self, table: Embedding, ids: Tensor) -> Tensor:
        x = table(ids) * math.sqrt(table.embedding_dim)  # (M, B, T, d)
        x = x + sinusoids(ids.shape[-1], table.embedding_dim).to(x)
        return F.dropout(x, self.dropout, self.training)


def sinusoids(length: int, dim: int) -> Tensor:
    """Return sine and cosine positions, (length, dim) float32: sines in the first half, cosines in the second."""
    frequency = torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / max(1, dim // 2 - 1)))
    angle = torch.arange(length)[:, None] * frequency  # (length, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
