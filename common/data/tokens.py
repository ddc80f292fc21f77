"""Text to one long stream of token ids: bytes, or a saved tokenizer (GPT-2's byte pairs at paper scale)."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.embedded import cache_folder
from common.data.tensors import text_bytes

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

BATCH = 1000


def tokenise(split: "Dataset", column: str = "text", tokenizer: str = "", cache: Path | None = None) -> "torch.Tensor":
    """All rows of a text column as one stream.

    With a tokenizer the ids are written to the cache batch by batch and mapped into memory, so that a stream may be
    larger than the memory; the end-of-text token stands after each row.

    Args:
        split: rows with a string column.
        column: its name.
        tokenizer: folder of a saved tokenizer (`save_pretrained`); empty for bytes.
        cache: folder of the token files; the user's cache by default.

    Returns:
        (tokens,) uint8 for bytes (zero between rows), int32 for a tokenizer.

    Raises:
        FileNotFoundError: `tokenizer` is not a folder.
        ValueError: the column is not text, or the tokenizer has no end-of-text token.
    """
    kind = getattr(split.features.get(column), "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(f"column={column!r}: must be a column of text, the set has {split.features}")
    if not tokenizer:
        return text_bytes(list(split[column]))
    import torch

    path = _written(split, column, Path(tokenizer).expanduser(), cache or cache_folder() / "tokens")
    size = path.stat().st_size // 4
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)


def _written(split: "Dataset", column: str, tokenizer: Path, cache: Path) -> Path:
    """The file of ids, written first if it is not there; its name carries the rows and the tokenizer."""
    if not tokenizer.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(tokenizer))
    path = cache / f"{_key(split, column, tokenizer)}.int32"
    if path.is_file():
        return path
    import numpy as np
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True, trust_remote_code=False)
    if encoder.eos_token_id is None:
        raise ValueError(f"data.tokenizer={tokenizer}: must have an end-of-text token")
    encoder.model_max_length = 1 << 30  # whole documents; the windows are cut later
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as handle:
        for start in range(0, len(split), BATCH):
            rows = split[start : start + BATCH][column]
            ids = encoder(rows, add_special_tokens=False)["input_ids"]
            flat = [token for row in ids for token in (*row, encoder.eos_token_id)]
            handle.write(np.asarray(flat, dtype="<i4").tobytes())
    os.replace(handle.name, path)
    return path


def _key(split: "Dataset", column: str, tokenizer: Path) -> str:
    digest = hashlib.sha256(f"{split._fingerprint}/{column}/{len(split)}".encode())
    for path in sorted(tokenizer.glob("*.json")) + sorted(tokenizer.glob("*.txt")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]
