"""The networks of a trial: one a seed, equal but for their initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from common.config import check
from common.streams import key
from multimodn.decoders import ClassDecoder, Decoder, RegressionDecoder
from multimodn.encoders import ConvEncoder, GRUEncoder, MLPEncoder, RawEncoder, TransformerEncoder
from multimodn.fusion import PFusion
from multimodn.model import MultiModN
from multimodn.network import Network, total_width

if TYPE_CHECKING:
    from multimodn.cohorts.base import Cohort
    from multimodn.config import NetworkConfig, TrialConfig

WEIGHTS = 10  # random stream


def build(config: TrialConfig, cohort: Cohort, seed: int) -> Network:
    """The untrained network of one seed for the cohort's modalities and tasks.

    Raises:
        ValueError: an encoder that does not fit a modality.
    """
    c = config.network
    torch.manual_seed(key(seed, WEIGHTS))
    encoders = {name: encoder(c, name, x.shape[1:]) for name, x in cohort.modalities.items()}
    parallel = c.kind == "pfusion"
    width = c.state_size
    if parallel:
        width = total_width(encoders.values()) + c.indicator * len(encoders)
    decoders: dict[str, Decoder] = {
        name: ClassDecoder(width, task.classes, c.decoder_hidden, c.link)
        if task.kind == "classes"
        else RegressionDecoder(width, c.decoder_hidden)
        for name, task in cohort.tasks.items()
    }
    if parallel:
        return PFusion(encoders, decoders, indicator=c.indicator)
    return MultiModN(encoders, decoders, c.state_size)


def encoder(c: NetworkConfig, name: str, shape: torch.Size) -> nn.Module:
    """What reads a modality of features (F,), sequences (T, F) or images (C, H, W)."""
    joins = "none" if c.kind == "pfusion" else c.joins
    if len(shape) == 1:
        if c.encoder == "raw":
            return RawEncoder(shape[0])
        return MLPEncoder(shape[0], c.state_size, c.hidden, c.dropout, joins)
    fits = c.encoder == "conv" if len(shape) == 3 else c.encoder in ("gru", "transformer")
    allowed = "conv" if len(shape) == 3 else "gru or transformer"
    check("network.encoder", c.encoder, fits, f"{allowed} for modality {name} of shape {tuple(shape)}")
    if c.encoder == "conv":
        return ConvEncoder(channels=shape[0], state_size=c.state_size)
    if c.encoder == "gru":
        return GRUEncoder(features=shape[1], state_size=c.state_size, hidden=c.hidden[-1], dropout=c.dropout)
    return TransformerEncoder(features=shape[1], state_size=c.state_size, width=c.hidden[-1], dropout=c.dropout)
