"""P-Fusion, the baseline: modalities encoded side by side, missing ones padded, embeddings concatenated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.config import check
from multimodn.batch import Inputs, Masks
from multimodn.network import Grid, Network, total_width


class PFusion(Network):
    """Parallel fusion of a fixed set of modalities; one decoder a task on the concatenated embeddings.

    Both published forms: with `MLPEncoder(…, joins="none")` a modality has its own encoder (the paper's figure); with
    `RawEncoder` the standardised columns themselves are concatenated (the released code). Missing modalities are
    zeros, which is mean imputation after standardisation.

    Args:
        encoders: modality -> module `forward(state, x) -> embedding`, called with a zero state of its `state_size`.
        decoders: task -> `multimodn.decoders.Decoder` on `embedding_size` (+ one a modality with `indicator`) inputs.
        missing: `sample` pads the samples that lack a modality; `batch` pads it for the whole batch.
        indicator: append one bit a modality, 1 where it is missing.

    The grid of `forward` has one row, after all modalities: outputs (..., 1, B, C), present (..., 0, B).

    Raises:
        ValueError: no encoder or decoder, or sizes that do not fit.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        decoders: Mapping[str, nn.Module],
        *,
        missing: str = "sample",
        indicator: bool = False,
    ) -> None:
        super().__init__(missing)
        check("encoders", "{}", len(encoders) > 0, "at least one encoder")
        check("decoders", "{}", len(decoders) > 0, "at least one decoder")
        self.indicator = indicator
        self.encoders.update(encoders)
        self.decoders.update(decoders)
        for name, decoder in decoders.items():
            own = getattr(decoder, "state_size", self.embedding_size)
            check(f"decoders.{name}.state_size", own, own == self.embedding_size, f"{self.embedding_size}, all inputs")

    @property
    def embedding_size(self) -> int:
        """Inputs of a decoder."""
        return total_width(self.encoders.values()) + (len(self.encoders) if self.indicator else 0)

    def forward(self, inputs: Inputs, masks: Masks | None = None, *, missing: str | None = None) -> Grid:
        """Encode, pad, concatenate and decode; arguments and errors as in `MultiModN.forward`."""
        batch = self.read(inputs, masks, missing)
        left_out = [name for name in self.encoders if name not in batch.inputs]
        check("inputs", f"without {', '.join(left_out)}", not left_out, "all modalities of P-Fusion; hide by masks")
        parts, absent = [], []
        for name, encoder in self.encoders.items():
            x, mask = batch.inputs[name], batch.masks[name]
            zero = x.new_zeros(()).expand(*batch.shape, int(encoder.state_size))  # type: ignore[arg-type]
            parts.append(encoder(zero, x))
            if self.indicator:
                bits = torch.zeros_like(parts[0][..., :1]) if mask is None else (~mask).to(x.dtype).unsqueeze(-1)
                absent.append(bits)
        embedding = torch.cat([*parts, *absent], -1).unsqueeze(-3)  # (..., 1, B, E)
        outputs = {name: decoder(embedding) for name, decoder in self.decoders.items()}
        present = torch.zeros(*batch.shape[:-1], 0, batch.shape[-1], dtype=torch.bool, device=embedding.device)
        return Grid(embedding, outputs, present)
