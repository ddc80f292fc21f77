"""Data sets behind one function: `load(config)` gives a DatasetDict, `tensors(split, columns)` gives tensors."""

from common.data import partition
from common.data.config import DataConfig
from common.data.load import DataUnavailableError, content_hash, load
from common.data.tensors import normalise, standardise, tensors, text_bytes
from common.data.tokens import tokenise

__all__ = [
    "DataConfig",
    "DataUnavailableError",
    "content_hash",
    "load",
    "normalise",
    "partition",
    "standardise",
    "tensors",
    "text_bytes",
    "tokenise",
]
