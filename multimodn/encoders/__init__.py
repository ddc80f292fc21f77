"""Encoders: modules `forward(state, x) -> state`, one a modality; rows of a batch never mix."""

from multimodn.encoders.attention import TransformerEncoder
from multimodn.encoders.hugging_face import HuggingFaceEncoder
from multimodn.encoders.image import ConvEncoder
from multimodn.encoders.mlp import MLPEncoder, RawEncoder
from multimodn.encoders.recurrent import GRUEncoder

__all__ = ["ConvEncoder", "GRUEncoder", "HuggingFaceEncoder", "MLPEncoder", "RawEncoder", "TransformerEncoder"]
