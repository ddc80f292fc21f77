"""The rows of a data set dealt among the clients of a federation: alike, in clusters, or skewed by label."""

import dataclasses
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.config import check

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from numpy.typing import ArrayLike

    Labels = ArrayLike | torch.Tensor
    """(rows,) integers: an array, a list, a tensor on the CPU, or the column `split["y"]` of a Dataset."""

ALPHA_MAX = 1e6  # shares are equal to 0.1 % there; far beyond, the sampler overflows
TRIES = 1000


@dataclass(frozen=True, eq=False)
class Partition:
    """Which rows each of N clients holds, and how it sees them. Arrays are copied; lists do as well.

    Raises:
        ValueError: a field has the wrong length or range, or a row is dealt twice; the message names the field.
    """

    indices: "tuple[np.ndarray, ...]"
    """Row numbers of each client, N sorted int64 arrays without a common row."""
    clusters: "np.ndarray"
    """(N,) int64, the true cluster of each client."""
    quarter_turns: "np.ndarray"
    """(N,) int64 in [0, 3]: how many quarter turns the client's images are turned (see `turn`)."""
    label_shift: "np.ndarray"
    """(N,) int64 in [0, classes): the client sees label (y + shift) mod classes (see `shift_labels`)."""
    classes: int
    """Number of classes."""

    def __post_init__(self) -> None:
        import numpy as np

        n = len(self.indices)
        check("indices", self.indices, n >= 1, "rows of at least one client")
        _check_whole("classes", self.classes, 1)
        rows = tuple(_copied(f"indices[{i}]", part) for i, part in enumerate(self.indices))
        for i, part in enumerate(rows):
            wrong = part[np.diff(part, prepend=-1) <= 0]
            check(f"indices[{i}]", wrong[:5], wrong.size == 0, "distinct row numbers >= 0 in increasing order")
        dealt, times = np.unique(np.concatenate(rows), return_counts=True)
        shared = dealt[times > 1]
        check("indices", shared[:5], shared.size == 0, "disjoint; these rows have several clients")
        object.__setattr__(self, "indices", rows)
        # a cluster without a client has no meaning, so that N clients have at most N clusters
        for name, largest in (("clusters", n - 1), ("quarter_turns", 3), ("label_shift", self.classes - 1)):
            values = _copied(name, getattr(self, name))
            check(f"{name}.shape", values.shape, values.shape == (n,), f"({n},), one value a client")
            wrong = values[(values < 0) | (values > largest)]
            check(name, wrong[:5], wrong.size == 0, f"in [0, {largest}]")
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sizes(self) -> "np.ndarray":
        """Rows of each client, (N,) int64."""
        import numpy as np

        return np.array([len(rows) for rows in self.indices], dtype=np.int64)

    def label_counts(self, labels: "Labels") -> "np.ndarray":
        """Rows of each client by the label that it sees (shifted), (N, classes) int64; labels: (rows,) as dealt."""
        import numpy as np

        values, _ = _integers(labels, self.classes)
        self._check_rows("labels", len(values))
        seen = [
            (values[rows] + shift) % self.classes for rows, shift in zip(self.indices, self.label_shift, strict=True)
        ]
        return np.stack([np.bincount(y, minlength=self.classes) for y in seen]).astype(np.int64)

    def select(self, split: "Dataset", client: int) -> "Dataset":
        """Rows of one client as they stand in `split`: neither turned nor with shifted labels."""
        _check_whole("client", client, 0, len(self) - 1)
        self._check_rows("split", len(split))
        return split.select(self.indices[client])

    def _check_rows(self, name: str, rows: int) -> None:
        last = max((int(part[-1]) for part in self.indices if part.size), default=-1)
        check(f"len({name})", rows, rows > last, f"> {last}, the largest row number of a client")


def iid(
    labels: "Labels", n_clients: int, *, samples: int | None = None, classes: int | None = None, seed: int = 0
) -> Partition:
    """Rows drawn at random without replacement, equally many a client, all clients in one cluster.

    Args:
        labels: (rows,) integers in [0, classes): an array, a list, a tensor, or the column `split["y"]` of a Dataset.
        n_clients: N, at most `rows`.
        samples: rows a client; by default rows // N, which leaves fewer than N rows to nobody.
        classes: number of classes; by default the largest label + 1.
        seed: of the only source of randomness; the same seed gives the same rows everywhere.

    Raises:
        ValueError: an argument is out of range; the message gives name, value and range.
    """
    values, classes = _integers(labels, classes)
    _check_whole("n_clients", n_clients, 1, len(values))
    return _partition(_deal(_generator(seed).permutation(len(values)), n_clients, samples), classes)


def rotation(
    labels: "Labels",
    n_clients: int,
    *,
    n_clusters: int = 4,
    samples: int | None = None,
    cluster_sizes: Sequence[int] | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Partition:
    """The rows of `iid`; the images of cluster k are turned by k mod 4 quarter turns (Ghosh et al. 2020).

    Args:
        labels: as in `iid`.
        n_clients: N, at most `rows`.
        n_clusters: K in [1, N]; clients of a cluster have consecutive numbers. Past four, turns repeat.
        samples: as in `iid`.
        cluster_sizes: clients of each cluster, K numbers >= 1 that sum to N; by default equal to within one.
        classes: as in `iid`.
        seed: as in `iid`.

    Raises:
        ValueError: an argument is out of range; the message gives name, value and range.
    """
    dealt = iid(labels, n_clients, samples=samples, classes=classes, seed=seed)
    clusters = _clusters(n_clients, n_clusters, cluster_sizes)
    return dataclasses.replace(dealt, clusters=clusters, quarter_turns=clusters % 4)


def private_label(
    labels: "Labels",
    n_clients: int,
    *,
    n_clusters: int = 4,
    samples: int | None = None,
    cluster_sizes: Sequence[int] | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Partition:
    """The rows of `iid`; cluster k sees label (y + k) mod classes. Arguments and errors as in `rotation`."""
    dealt = iid(labels, n_clients, samples=samples, classes=classes, seed=seed)
    clusters = _clusters(n_clients, n_clusters, cluster_sizes)
    return dataclasses.replace(dealt, clusters=clusters, label_shift=clusters % dealt.classes)


def label_groups(
    labels: "Labels",
    n_clients: int,
    *,
    n_clusters: int,
    samples: int | None = None,
    cluster_sizes: Sequence[int] | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Partition:
    """Cluster k owns the classes from k * classes / K to before (k + 1) * classes / K and deals their rows at random.

    Arguments and errors as in `rotation`, but: `classes` must be a multiple of `n_clusters`, and the default of
    `samples` is an equal division of the cluster's rows, so that it differs between clusters.
    """
    import numpy as np

    values, classes = _integers(labels, classes)
    _check_whole("n_clients", n_clients, 1, len(values))
    clusters = _clusters(n_clients, n_clusters, cluster_sizes)
    check("classes", classes, classes % n_clusters == 0, f"a multiple of n_clusters={n_clusters}")
    order = _generator(seed).permutation(len(values))
    owner = values[order] // (classes // n_clusters)
    indices: list[np.ndarray] = []
    for k, members in enumerate(np.bincount(clusters)):
        rows = order[owner == k]
        where = f"cluster {k} has {len(rows)} rows for {members} clients"
        check("n_clients", n_clients, members <= len(rows), f"smaller: {where}")
        indices += _deal(rows, int(members), samples, where)
    return _partition(indices, classes, clusters)


def dirichlet(
    labels: "Labels",
    n_clients: int,
    *,
    alpha: float,
    min_samples: int = 1,
    classes: int | None = None,
    seed: int = 0,
) -> Partition:
    """Each class is divided among the clients in shares drawn from Dirichlet(alpha), independently of the others.

    All rows are dealt; sizes differ. This is the division of Yurochkin et al. (2019); Hsu et al. (2019) draw the
    classes of a client instead. alpha -> 0: each class with one client; alpha -> inf: as `iid`.

    Args:
        labels: as in `iid`.
        n_clients: N, at most `rows`.
        alpha: concentration in (0, 1e6].
        min_samples: all shares are drawn again until every client has so many rows; in [0, rows // N].
        classes: as in `iid`.
        seed: as in `iid`.

    Raises:
        ValueError: an argument is out of range, or no draw of 1000 gave every client `min_samples` rows.
    """
    import numpy as np

    values, classes = _integers(labels, classes)
    _check_whole("n_clients", n_clients, 1, len(values))
    number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    check("alpha", alpha, number and 0 < alpha <= ALPHA_MAX, f"in (0, {ALPHA_MAX:g}]")
    _check_whole("min_samples", min_samples, 0, len(values) // n_clients)
    generator = _generator(seed)
    order, counts = _by_class(values, classes, generator)
    for _ in range(TRIES):
        shares = generator.dirichlet(np.full(n_clients, alpha), size=classes)  # (classes, N)
        # rounded, not cut: a sum that is 1 but for its last bit, which differs between machines, is the whole class
        ends = np.rint(shares.cumsum(1) * counts[:, None]).astype(np.int64)
        if np.diff(ends, axis=1, prepend=0).sum(0).min() >= min_samples:
            break
    else:
        raise ValueError(
            f"alpha={alpha}: must be larger, or min_samples={min_samples} smaller: in each of {TRIES} draws one of "
            f"{n_clients} clients had fewer rows"
        )
    parts = [np.split(rows, cuts[:-1]) for rows, cuts in zip(np.split(order, counts.cumsum()[:-1]), ends, strict=True)]
    return _partition([np.concatenate(client) for client in zip(*parts, strict=True)], classes)


def label_skew(
    labels: "Labels", n_clients: int, *, classes_per_client: int = 2, classes: int | None = None, seed: int = 0
) -> Partition:
    """Rows sorted by label, cut in N * classes_per_client equal shards, dealt at random (McMahan et al. 2017).

    All rows are dealt; shards are equal to within one row. A shard holds one class more for every border between
    classes inside it, so a client has at most `classes_per_client` classes when the shards of a class come out even,
    and at most twice as many when no class is smaller than a shard.

    Args:
        labels: as in `iid`.
        n_clients: N, at most rows // classes_per_client.
        classes_per_client: shards a client, in [1, rows].
        classes: as in `iid`.
        seed: as in `iid`.

    Raises:
        ValueError: an argument is out of range; the message gives name, value and range.
    """
    import numpy as np

    values, classes = _integers(labels, classes)
    _check_whole("classes_per_client", classes_per_client, 1, len(values))
    _check_whole("n_clients", n_clients, 1, len(values) // classes_per_client)
    generator = _generator(seed)
    order, _ = _by_class(values, classes, generator)
    shards = np.array_split(order, n_clients * classes_per_client)
    hands = generator.permutation(len(shards)).reshape(n_clients, classes_per_client)
    return _partition([np.concatenate([shards[i] for i in hand]) for hand in hands], classes)


def turn(images: "torch.Tensor", quarter_turns: int) -> "torch.Tensor":
    """Turn images (..., H, W) counter-clockwise by 90 degrees `quarter_turns` times: a new contiguous tensor."""
    import torch

    check("images.shape", tuple(images.shape), images.ndim >= 2, "(..., H, W)")
    return torch.rot90(images, int(quarter_turns), dims=(-2, -1)).contiguous()


def shift_labels(labels: "torch.Tensor", shift: "int | torch.Tensor", classes: int) -> "torch.Tensor":
    """(labels + shift) mod classes, in the dtype and shape of `labels`; a tensor `shift` must broadcast to it."""
    _check_whole("classes", classes, 1)
    return (labels + shift) % classes


def _partition(indices: "Sequence[np.ndarray]", classes: int, clusters: "np.ndarray | None" = None) -> Partition:
    import numpy as np

    none = np.zeros(len(indices), dtype=np.int64)
    clusters = none if clusters is None else clusters
    return Partition(tuple(np.sort(rows) for rows in indices), clusters, none, none, classes)


def _generator(seed: int) -> "np.random.Generator":
    import numpy as np

    _check_whole("seed", seed, 0)
    return np.random.Generator(np.random.PCG64(seed))


def _deal(rows: "np.ndarray", n_clients: int, samples: int | None, where: str = "") -> "list[np.ndarray]":
    """The next `samples` of the shuffled rows to each client in turn."""
    most = len(rows) // n_clients
    samples = most if samples is None else samples
    _check_whole("samples", samples, 1, most, where or f"{len(rows)} rows for {n_clients} clients")
    return [rows[i * samples : (i + 1) * samples] for i in range(n_clients)]


def _by_class(labels: "np.ndarray", classes: int, generator: "np.random.Generator") -> "tuple[np.ndarray, np.ndarray]":
    """Row numbers sorted by label and shuffled inside each class, (rows,), and rows of each class, (classes,)."""
    import numpy as np

    order = generator.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")], np.bincount(labels, minlength=classes)


def _clusters(n_clients: int, n_clusters: int, cluster_sizes: Sequence[int] | None) -> "np.ndarray":
    """Cluster of each client, (N,) int64, in increasing order."""
    import numpy as np

    _check_whole("n_clusters", n_clusters, 1, n_clients)
    if cluster_sizes is None:
        return np.arange(n_clients) * n_clusters // n_clients
    sizes = list(cluster_sizes)
    check("cluster_sizes", sizes, len(sizes) == n_clusters, f"{n_clusters} numbers, one a cluster")
    for size in sizes:
        _check_whole("cluster_sizes", size, 1)
    check("cluster_sizes", sizes, sum(sizes) == n_clients, f"numbers that sum to n_clients={n_clients}")
    return np.repeat(np.arange(n_clusters), sizes)


def _integers(labels: Any, classes: int | None) -> "tuple[np.ndarray, int]":
    """Labels as (rows,) int64, and the number of classes."""
    import numpy as np

    values = np.asarray(labels)
    fits = values.ndim == 1 and values.size > 0 and values.dtype.kind in "iu"
    check("labels", f"{values.dtype} {values.shape}", fits, "integers of shape (rows,), rows >= 1")
    values = values.astype(np.int64)
    lowest, highest = int(values.min()), int(values.max())
    check("labels", lowest, lowest >= 0, ">= 0")
    if classes is None:
        return values, highest + 1
    _check_whole("classes", classes, 1)
    check("labels", highest, highest < classes, f"< classes={classes}")
    return values, int(classes)


def _copied(name: str, values: Any) -> "np.ndarray":
    """An int64 copy."""
    import numpy as np

    array = np.asarray(values)
    integers = array.ndim == 1 and (array.dtype.kind in "iu" or array.size == 0)
    check(name, f"{array.dtype} {array.shape}", integers, "one-dimensional integers")
    return array.astype(np.int64)


def _check_whole(name: str, value: object, low: int, high: int | None = None, why: str = "") -> None:
    """Refuse what is not an integer in [low, high]."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    within = whole and low <= int(value) and (high is None or int(value) <= high)  # type: ignore[call-overload]
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    check(name, value, within, allowed + (f" ({why})" if why else ""))
