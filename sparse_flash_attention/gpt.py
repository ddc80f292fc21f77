"""The paper's language model: GPT-2's layout with one exchangeable attention (section 4; sizes of the official code).

Pre-LN blocks, GELU, learned positions, no biases, head tied to the token embedding, dropout 0. Weights depend on the
seed and the sizes only: two arms of a comparison start from the same numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.models.attention import INIT_STD
from sparse_flash_attention.modules import SelfAttention, self_attention

LOGITS_AT_ONCE = 2**24
"""Entries of the logits that `SparseGPT.loss` holds at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and attention of a `SparseGPT`; the defaults are the paper's at T = 8192.

    Raises:
        ValueError: a size below 1, or n_head does not divide d_model.
    """

    vocab: int = 50304
    """V, tokens."""
    d_model: int = 768
    """d, width of the residual stream, a multiple of n_head."""
    n_layer: int = 12
    """Blocks."""
    n_head: int = 12
    """H, attention heads."""
    context: int = 8192
    """Longest input."""
    attention: str = "dense"
    """"dense" (F-LM), "hash" (H-LM), "drop" (D-LM), "reformer", "random" (random buckets) or "window"."""
    positions: bool = True
    """Whether to learn an embedding a position."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword options of the attention layer: n_buckets, drop_prob, window, shared_qk, … (see `modules`)."""

    def __post_init__(self) -> None:
        for name in ("vocab", "d_model", "n_layer", "n_head", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 1")
        if self.d_model % self.n_head:
            raise ValueError(f"n_head={self.n_head}: must divide d_model={self.d_model}")


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): (B, T, d) -> (B, T, d)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm = nn.LayerNorm(d, bias=False)
        self.attention = self_attention(config.attention, d, config.n_head, **config.options)
        self.mlp_norm = nn.LayerNorm(d, bias=False)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class SparseGPT(nn.Module):
    """Decoder-only language model with dense or sparse attention.

    Args:
        config: a `GPTConfig`, or `vocab` as a number.
        d_model: this and the next replace the config's fields of the same names; None leaves them.
        n_layer: see `GPTConfig`.
        n_head: see `GPTConfig`.
        context: see `GPTConfig`.
        attention: see `GPTConfig`.
        positions: see `GPTConfig`.
        seed: of the initial weights; None draws one from torch's global generator.
        options: of the attention layer, beside those of the config
            (`SparseGPT(256, d_model=64, attention="hash", n_buckets=8)`).

    Input ids int64 (B, T), T <= context; output logits (B, T, V). Builds under `torch.device("meta")`.

    Raises:
        ValueError: a size out of range, an unknown attention, or an option that it does not take.
    """

    def __init__(
        self,
        config: GPTConfig | int | None = None,
        d_model: int | None = None,
        n_layer: int | None = None,
        n_head: int | None = None,
        context: int | None = None,
        attention: str | None = None,
        *,
        positions: bool | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(config, int):
            config = GPTConfig(vocab=config)
        config = GPTConfig() if config is None else config
        given = {
            "d_model": d_model, "n_layer": n_layer, "n_head": n_head, "context": context, "attention": attention,
            "positions": positions,
        }  # fmt: skip
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        config = replace(config, **changes, options={**config.options, **options})
        self.config = config
        self.token = nn.Embedding(config.vocab, config.d_model)
        self.position = nn.Embedding(config.context, config.d_model) if config.positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self.reset_parameters(seed)

    @property
    def attentions(self) -> list[SelfAttention]:
        """Attention layers, the first block's first (whatever `convert_attention` has put there)."""
        return [block.attention for block in self.blocks]  # type: ignore[misc, union-attr]

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Initialise as GPT-2: N(0, 0.02), projections into the residual stream / √(2 n_layer), biases 0, norms 1.

        Weights come first and one by one from a generator of their own, so that they are the same for every arm.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator("cpu").manual_seed(seed)
        into_stream = {id(layer) for block in self.blocks for layer in (block.attention.out_proj, block.down)}  # type: ignore[union-attr]
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Embedding):
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if id(module) in into_stream else INIT_STD
                if not module.weight.is_meta:
                    drawn = torch.empty(module.weight.shape, device="cpu").normal_(0, std, generator=generator)
                    module.weight.copy_(drawn)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.attentions:
            if callable(reset := getattr(layer, "reset_projections", None)):
                reset(generator)

    def forward(self, ids: Tensor) -> Tensor:
        """Next-token logits (B, T, V) of ids (B, T)."""
        return F.linear(self.features(ids), self.token.weight)

    def features(self, ids: Tensor) -> Tensor:
        """What the head reads: (B, T, d) of ids (B, T), after the last norm.

        Raises:
            ValueError: ids of another shape, or longer than the context.
        """
        if ids.ndim != 2:
            raise ValueError(f"ids of shape {tuple(ids.shape)}: must be (batch, length)")
        if ids.shape[1] > self.config.context:
            raise ValueError(f"ids of length {ids.shape[1]}: must be <= context={self.config.context}")
        x = self.token(ids)  # (B, T, d)
        if self.position is not None:
            x = x + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token; targets of −100 do not count.

        Logits of long inputs (T·V entries) are made and forgotten in pieces, and made again for the gradient.

        Args:
            ids: int64 (B, T).
            targets: int64 (B, T), the token that follows each id.

        Raises:
            ValueError: shapes that differ, or ids longer than the context.
        """
        if ids.shape != targets.shape:
            raise ValueError(f"targets of shape {tuple(targets.shape)}: must be that of ids, {tuple(ids.shape)}")
        features, wanted = self.features(ids).flatten(0, 1), targets.flatten()  # (B T, d), (B T,)
        rows = max(LOGITS_AT_ONCE // self.config.vocab, 1)
        if len(wanted) <= rows:
            total = _cross_entropy(features, self.token.weight, wanted)
        else:
            pieces = zip(features.split(rows), wanted.split(rows), strict=True)
            total = torch.stack(
                [checkpoint(_cross_entropy, x, self.token.weight, y, use_reentrant=False) for x, y in pieces]
            ).sum()
        return total / (wanted != -100).sum()

    @torch.no_grad()
    def densities(self, ids: Tensor) -> Tensor:
        """Share of causal pairs that each layer computes for ids (B, T), mean over batch and heads: float64 (n_layer,).

        Runs a forward of its own, in the mode and with the randomness that the model is in.
        """
        layers = self.attentions
        before = [layer.record_density for layer in layers]
        try:
            for layer in layers:
                layer.record_density = True
            self.features(ids)
            return torch.stack([layer.density for layer in layers])  # type: ignore[misc]
        finally:
            for layer, record in zip(layers, before, strict=True):
                layer.record_density = record

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Inside the block all hashing and dropping is drawn from one generator of this seed: repeatable evaluation."""
        layers = self.attentions
        before = [layer.generator for layer in layers]
        generator = torch.Generator(self.token.weight.device).manual_seed(seed)
        try:
            for layer in layers:
                layer.generator = generator
            yield
        finally:
            for layer, old in zip(layers, before, strict=True):
                layer.generator = old

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: decay on the blocks' matrices, none on embeddings and norms (official code)."""
        embeddings = {id(m.weight) for m in (self.token, self.position) if m is not None}
        decayed = [p for p in self.parameters() if p.ndim > 1 and id(p) not in embeddings]
        chosen = {id(p) for p in decayed}
        rest = [p for p in self.parameters() if id(p) not in chosen]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _cross_entropy(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of rows, in float32 or better."""
    logits = F.linear(features, weight)
    return F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), targets, reduction="sum")
