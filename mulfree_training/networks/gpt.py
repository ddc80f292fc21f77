"""Decoder-only language model (GPT-2's layout), its head tied to the token embedding."""

from __future__ import annotations

from torch import Tensor, nn

from mulfree_training.networks.blocks import Block, causal_mask, initialise


class GPT(nn.Module):
    """Token and position embeddings, pre-LN blocks, a final LN, and the embedding as output layer.

    Args:
        vocab: V, tokens.
        context: T, longest input.
        d_model: width, a multiple of n_head.
        n_layer: blocks.
        n_head: attention heads.
        d_hidden: width of the hidden layers.
        activation: `relu` or `gelu`.
        dropout: on the embeddings and every branch.
        std: of the initial weights.

    Input ids int64 (B, T), output logits of the next token (B, T, V).
    """

    def __init__(
        self,
        vocab: int = 128,
        context: int = 64,
        d_model: int = 64,
        n_layer: int = 2,
        n_head: int = 4,
        d_hidden: int = 128,
        activation: str = "relu",
        dropout: float = 0.0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(vocab, d_model), nn.Embedding(context, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, d_hidden, activation, dropout=dropout) for _ in range(n_layer)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)
        initialise(self, std)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        length = ids.shape[1]
        if length > self.context:
            raise ValueError(f"ids of length {length}: must be <= context={self.context}")
        x = self.dropout(self.token(ids) + self.position.weight[:length])  # (B, T, d)
        mask = causal_mask(length, ids.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))
