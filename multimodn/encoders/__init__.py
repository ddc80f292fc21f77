"""Encoders: modules `forward(state, x) -> state`, one a modality; rows of a batch never mix."""

from multimodn.encoders.attention import TransformerEncoder
from multimodn.encoders.image import ConvEncoder
from multimodn.encoders.mlp import MLPEncoder, RawEncoder
from multimodn.encoders.recurrent import GRUEncoder

__all__ = ["ConvEncoder", "GRUEncoder", "MLPEncoder", "RawEncoder", "TransformerEncoder"]
