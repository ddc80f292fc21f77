"""Text that every Python brings along: its language reference (English prose) and its standard library (code).

Both are cut into blocks at blank lines and every block is kept once, because the reference quotes whole chapters twice
and library files share their licences: without that, the test text would stand in the training text. Documents are put
in the order of their names' hashes and the splits are cut by position, in whole documents.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.config import DataConfig

if TYPE_CHECKING:
    from datasets import DatasetDict

# tests, vendored wheels and generated tables are not what a reader would call program text
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "ensurepip", "__pycache__"}
SKIPPED |= {"pydoc_data", "turtledemo", "config", "encodings"}


def load(config: DataConfig) -> "DatasetDict":
    """Column "text", one row a document; splits train, validation and test by position (fractions of the bytes)."""
    import datasets

    documents = _unique_blocks(CORPORA[config.name]())
    sizes = [len(document.encode()) for document in documents]
    total, seen = sum(sizes), 0
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for document, size in zip(documents, sizes, strict=True):
        parts[_part(seen / total, config.test, config.validation)].append(document)
        seen += size
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items() if rows}
    )


def _part(position: float, test: float, validation: float) -> str:
    if position >= 1 - test:
        return "test"
    return "validation" if position >= 1 - test - validation else "train"


def _prose() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(topics)


def _code() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if SKIPPED.isdisjoint(place.parts):
            found[place.as_posix()] = path.read_text(encoding="utf-8", errors="ignore")
    return found


def _unique_blocks(documents: dict[str, str]) -> list[str]:
    """Documents in the order of their names' hashes, without the blocks that an earlier one had."""
    seen: set[bytes] = set()
    kept = []
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        fresh = list(_fresh(documents[name].split("\n\n"), seen))
        if fresh:
            kept.append("\n\n".join(fresh) + "\n")
    return kept


def _fresh(blocks: Iterable[str], seen: set[bytes]) -> Iterable[str]:
    for block in blocks:
        key = hashlib.sha256(" ".join(block.split()).encode()).digest()
        if key not in seen:
            seen.add(key)
            yield block


CORPORA: dict[str, Callable[[], dict[str, str]]] = {"prose": _prose, "code": _code}
