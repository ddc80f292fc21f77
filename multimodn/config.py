"""The schema of one trial: every key that `python -m multimodn.train` accepts, its type and its range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.config import CommonConfig, check, register
from multimodn.cohorts.config import CohortConfig
from multimodn.missing import Rule

KINDS = ("multimodn", "pfusion")
ENCODERS = ("mlp", "raw", "gru", "transformer", "conv")
JOINS = ("input", "output")
LINKS = ("softmax", "sigmoid")
MECHANISMS = ("none", "mcar", "mar", "mnar", "mnar_values")
SPLITS = ("validation", "test")


@dataclass
class NetworkConfig:
    """Which network, and its sizes; the paper's symbols in brackets."""

    kind: str = "multimodn"
    """`multimodn` (sequential) or `pfusion` (parallel)."""
    encoder: str = "mlp"
    """What reads a modality: `mlp`, `raw` (P-Fusion of the columns themselves), or for sequences `gru` and
    `transformer`, for images `conv`; modalities without a time or image axis get the perceptron."""
    state_size: int = 50
    """Numbers of the state, and of an embedding of P-Fusion (S)."""
    hidden: list[int] = field(default_factory=lambda: [32, 32])
    """Hidden layers of the perceptrons that encode; the width of the other encoders is the last of them."""
    dropout: float = 0.2
    """Dropout probability at the encoders' input."""
    joins: str = "input"
    """Where the state enters a perceptron: `input` (the official MIMIC encoder) or `output` (its generic one)."""
    decoder_hidden: list[int] = field(default_factory=lambda: [32, 32])
    """Hidden layers of the decoders."""
    link: str = "softmax"
    """`softmax`: cross-entropy of logits; `sigmoid`: the official cross-entropy of sigmoid outputs."""
    indicator: bool = False
    """P-Fusion sees one bit a modality, 1 where it is missing."""
    only: int | None = None
    """Number of the one modality that the network sees, from 0; null: all of them."""

    def __post_init__(self) -> None:
        check("network.kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        check("network.encoder", self.encoder, self.encoder in ENCODERS, f"one of {', '.join(ENCODERS)}")
        raw = self.encoder != "raw" or self.kind == "pfusion"
        check("network.encoder", self.encoder, raw, "another than raw for network.kind=multimodn")
        check("network.state_size", self.state_size, self.state_size >= 1, ">= 1")
        for key in ("hidden", "decoder_hidden"):
            widths = getattr(self, key)
            check(f"network.{key}", widths, all(width >= 1 for width in widths), "a list of integers >= 1")
        check("network.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        check("network.joins", self.joins, self.joins in JOINS, f"one of {', '.join(JOINS)}")
        check("network.link", self.link, self.link in LINKS, f"one of {', '.join(LINKS)}")
        fits = not self.indicator or self.kind == "pfusion"
        check("network.indicator", self.indicator, fits, "false for network.kind=multimodn")
        check("network.only", self.only, self.only is None or self.only >= 0, ">= 0, or null")


@dataclass
class CorruptionConfig:
    """What is hidden from complete data, on top of what is really missing."""

    mechanism: str = "none"
    """`none`; `mcar`: every modality at random; `mnar`: one modality by the label of the first task, as in the paper;
    `mar`: one modality by the values of the first other one; `mnar_values`: one modality by its own values."""
    share: float = 0.8
    """Share that is hidden (p): of the rows (mcar, mar, mnar_values) or of the class `hide` (mnar)."""
    modality: int = 1
    """Number of the hidden modality in the chain, from 0 (mnar, mar, mnar_values)."""
    hide: int = 1
    """Class whose rows lose the modality in training (mnar); the flipped test pattern hides it from the others."""

    def __post_init__(self) -> None:
        known = self.mechanism in MECHANISMS
        check("corruption.mechanism", self.mechanism, known, f"one of {', '.join(MECHANISMS)}")
        check("corruption.share", self.share, 0 <= self.share <= 1, "in [0, 1]")
        check("corruption.modality", self.modality, self.modality >= 0, ">= 0")
        check("corruption.hide", self.hide, self.hide in (0, 1), "0 or 1")


@dataclass
class FusionConfig:
    """Train a network on a cohort and judge it under complete and incomplete test data."""

    name: str = "fusion"
    epochs: int = 15
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows of a batch (B)."""
    lr: float = 1e-3
    """Adam's learning rate."""
    shuffle: bool = True
    """Draw the rows' order anew in every epoch; the official code does not."""
    error_weight: float = 1.0
    """Weight of the prediction errors (official err_penalty)."""
    state_change_weight: float = 0.0
    """Weight of the state's changes (official state_change_penalty; 0.01 times this is the coefficient)."""
    normalise: str = "constant"
    """Errors divide by the batch (`constant`, official) or by the samples that took the step (`present`)."""
    evaluate: str = "test"
    """The split of the record's metrics: `validation` for tuning, `test` for judging."""
    contributions: bool = False
    """Also record contributions of modalities and predictions from every subset of them."""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.lr", self.lr, self.lr > 0, "> 0")
        check("task.error_weight", self.error_weight, self.error_weight >= 0, ">= 0")
        check("task.state_change_weight", self.state_change_weight, self.state_change_weight >= 0, ">= 0")
        kinds = ("constant", "present")
        check("task.normalise", self.normalise, self.normalise in kinds, f"one of {', '.join(kinds)}")
        check("task.evaluate", self.evaluate, self.evaluate in SPLITS, f"one of {', '.join(SPLITS)}")


@dataclass
class TabularConfig:
    """A classifier of scikit-learn on the concatenated columns, one a task."""

    name: str = "tabular"
    classifier: str = "logistic"
    """`logistic` (standardised columns, missing values are means) or `hist_gradient_boosting` (NaN as they are)."""
    strength: float = 1.0
    """Inverse regularisation C of the logistic regression, or the learning rate of boosting."""
    evaluate: str = "test"
    """The split of the record's metrics: `validation` for tuning, `test` for judging."""

    def __post_init__(self) -> None:
        kinds = ("logistic", "hist_gradient_boosting")
        check("task.classifier", self.classifier, self.classifier in kinds, f"one of {', '.join(kinds)}")
        check("task.strength", self.strength, self.strength > 0, "> 0")
        check("task.evaluate", self.evaluate, self.evaluate in SPLITS, f"one of {', '.join(SPLITS)}")


@dataclass
class TrialConfig(CommonConfig):
    """One trial: a task, a network, a cohort, what is hidden from it, how training treats that, and its seeds."""

    max_steps: int | None = None
    """Cut training to this many steps, to try it out; null: as long as the task says."""
    task: Any = field(default_factory=FusionConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    missing: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        super().__post_init__()
        check("max_steps", self.max_steps, self.max_steps is None or self.max_steps >= 1, ">= 1, or null")
        check("precision", self.precision, self.precision == "fp32", "fp32")  # the networks are tiny


register("multimodn_schema", TrialConfig)
register("fusion_schema", FusionConfig, group="task")
register("tabular_schema", TabularConfig, group="task")
register("network_schema", NetworkConfig, group="network")
register("cohort_schema", CohortConfig, group="cohort")
register("corruption_schema", CorruptionConfig, group="corruption")
register("missing_schema", Rule, group="missing")
