"""Hub sets at pinned revisions, without remote code; quick and clear when there is no network."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.config import DataConfig
from common.data.errors import DataUnavailableError
from common.network import answers

if TYPE_CHECKING:
    from datasets import DatasetDict

CONNECT_SECONDS = 5.0
FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


def load(config: DataConfig) -> "DatasetDict":
    """The set's splits under our names, from `config.path` or from the hub.

    Raises:
        DataUnavailableError: no network and nothing in the hub's cache, or no access.
        FileNotFoundError: `config.path` is not a folder.
        ValueError: the folder has no `train*` files.
    """
    import datasets

    splits = _local(config) if config.path else _remote(config)
    names = {theirs: ours for ours, theirs in config.split_names.items()} or {name: name for name in splits}
    chosen = {names[name]: _images(split, config) for name, split in splits.items() if name in names}
    if "train" not in chosen:
        raise ValueError(f"data.split_names={config.split_names}: {config.name} has splits {', '.join(splits)}")
    return datasets.DatasetDict({name: chosen[name] for name in ("train", "validation", "test") if name in chosen})


def _local(config: DataConfig) -> "DatasetDict":
    """Read `<path>/<split>*.<format>` or `<path>/<split>/*.<format>`, or what `save_to_disk` wrote."""
    import datasets

    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    files: dict[str, list[str]] = {}
    for path in sorted([*folder.glob("*.*"), *folder.glob("*/*.*")]):
        split = re.match(r"train|validation|test", path.relative_to(folder).as_posix())
        if split and path.suffix in FORMATS:
            files.setdefault(split[0], []).append(str(path))
    formats = {FORMATS[Path(path).suffix] for paths in files.values() for path in paths}
    if len(formats) != 1 or "train" not in files:
        raise ValueError(f"data.path={folder}: must hold train*.parquet, train*.arrow or train*.json, of one format")
    with _quiet():
        return datasets.load_dataset(formats.pop(), data_files=files)


def _remote(config: DataConfig) -> "DatasetDict":
    import datasets

    arguments: dict[str, Any] = {"revision": config.revision}
    if config.subset:
        arguments["name"] = config.subset
    if config.files:
        arguments["data_files"] = dict(config.files)
    offline = not reachable()
    try:
        with _quiet(), _offline() if offline else contextlib.nullcontext():
            return datasets.load_dataset(config.repository, **arguments)
    except Exception as error:
        # anything from a missing name server to a gated set: one line, with the set that needs no network
        reason = "no network, and the set is not in the cache" if offline else _reason(error)
        raise DataUnavailableError(
            f"data={config.name}: cannot get {config.repository} ({reason}); without a network use "
            f"data={config.alternative}, or data.path=<folder with the set's files>"
        ) from error


def reachable() -> bool:
    """Does the hub answer within `CONNECT_SECONDS`? Asked once a process; False if HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    return answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", CONNECT_SECONDS)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Look into the hub's cache only: the libraries read their environment once, at import, hence the attributes."""
    import datasets
    import huggingface_hub

    places: tuple[Any, Any] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches them, no chatter of the libraries anywhere."""
    import datasets
    import huggingface_hub

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    hub_level = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()
    shown = datasets.utils.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        huggingface_hub.logging.set_verbosity(hub_level)
        if shown:
            datasets.enable_progress_bars()


def _images(split: Any, config: DataConfig) -> Any:
    """Files written by other tools lack the mark that says a column of bytes is an image."""
    import datasets

    feature = split.features.get(config.inputs)
    if isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
        return split.cast_column(config.inputs, datasets.Image())
    return split


def _reason(error: BaseException) -> str:
    name = type(error).__name__
    if "Gated" in name or "gated" in str(error):
        return "the set is gated: accept its terms on the hub, then `hf auth login`"
    return f"{name}: {(str(error).strip().splitlines() or [''])[0][:120]}"
