"""The schema of one trial: every key that `python -m rotational_optimizers.train` accepts, its type and its range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.config import CommonConfig, check, register
from common.data.config import DataConfig
from common.models.config import ModelConfig

OPTIMIZERS = (
    "sgdm",
    "adamw",
    "adam_l2",
    "lion",
    "rv_sgdm",
    "rv_adamw",
    "rv_lion",
    "forced_adam_l2",
    "hyperball",
    "update_floor",
    "adamp",
    "lamb",
    "nero",
)


@dataclass
class ImbalanceConfig:
    """Rows turned at unequal speeds on purpose (appendix J.6)."""

    kind: str = "none"
    """`none`; `double`: the first q of the rows turn s times slower; `triple`: q/2 slower, q/2 faster."""
    fraction: float = 0.5
    """q, the share of rows whose speed is changed."""
    factor: float = 1.0
    """s, by how much."""

    def __post_init__(self) -> None:
        kinds = ("none", "double", "triple")
        check("optimizer.imbalance.kind", self.kind, self.kind in kinds, f"one of {', '.join(kinds)}")
        check("optimizer.imbalance.fraction", self.fraction, 0 <= self.fraction <= 1, "in [0, 1]")
        check("optimizer.imbalance.factor", self.factor, self.factor > 0, "> 0")


@dataclass
class OptimizerConfig:
    """Which optimizer and its hyper-parameters, in the paper's symbols in brackets."""

    name: str = "adamw"
    """One of `OPTIMIZERS`; `rv_*` are the rotational variants."""
    lr: float = 0.01
    """Peak learning rate (eta)."""
    weight_decay: float = 0.1
    """Weight decay (lambda); an L2 term for sgdm and adam_l2; only sets the rotation for rv_*."""
    momentum: float = 0.9
    """SGDM's alpha."""
    nesterov: bool = False
    """Nesterov momentum (sgdm, rv_sgdm)."""
    decoupled: bool = False
    """Decoupled weight decay for SGD (SGDW)."""
    beta1: float = 0.9
    """First-moment decay (AdamW family, Lion)."""
    beta2: float = 0.999
    """Second-moment decay (AdamW family), or Lion's buffer decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    update_norm_decay: float = 0.9
    """f, the decay of the running mean of squared update norms (rv_*)."""
    per_neuron: bool = True
    """Control the rotation of every row (true) or of whole tensors (rv_*)."""
    zero_mean: bool = True
    """Keep every row centred (rv_*)."""
    rotation_weight_decay: float | None = None
    """The lambda inside eta_r when it must differ from the one in the moments (forced_adam_l2)."""
    exclude_head: bool = False
    """Leave the classifier head to the base optimizer (rv_*)."""
    exclude: list[str] = field(default_factory=list)
    """Parameters that neither decay nor rotate: names, dotted prefixes or patterns (`token`, `*.bias`)."""
    imbalance: ImbalanceConfig = field(default_factory=ImbalanceConfig)
    """Unequal rotation on purpose (rv_adamw)."""

    def __post_init__(self) -> None:
        check("optimizer.name", self.name, self.name in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        check("optimizer.lr", self.lr, self.lr > 0, "> 0")
        check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        for key in ("momentum", "beta1", "beta2", "update_norm_decay"):
            value = getattr(self, key)
            check(f"optimizer.{key}", value, 0 <= value < 1, "in [0, 1)")
        check("optimizer.eps", self.eps, self.eps > 0, "> 0")
        decay = self.rotation_weight_decay
        check("optimizer.rotation_weight_decay", decay, decay is None or decay > 0, "> 0, or null")
        check("optimizer.exclude", self.exclude, all(self.exclude), "a list of names, none of them empty")
        if self.name.startswith("rv_"):
            check("optimizer.weight_decay", self.weight_decay, self.weight_decay > 0, "> 0 for rotational variants")


@dataclass
class ScheduleConfig:
    """The learning rate over the run, as a factor of `optimizer.lr`."""

    name: str = "cosine"
    """`cosine` to zero, `linear` to zero, or `constant`."""
    warmup: float = 0.0
    """Linear warm-up as a fraction of all steps."""
    power: float = 1.0
    """The factor is raised to this power; 2 undoes the square root by which a rotational variant feels the schedule."""
    floor: float = 0.0
    """Where the decay ends, as a fraction of `optimizer.lr`."""

    def __post_init__(self) -> None:
        names = ("cosine", "linear", "constant")
        check("schedule.name", self.name, self.name in names, f"one of {', '.join(names)}")
        check("schedule.warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1)")
        check("schedule.power", self.power, self.power > 0, "> 0")
        check("schedule.floor", self.floor, 0 <= self.floor < 1, "in [0, 1)")


@dataclass
class NetworkTaskConfig:
    """Train networks, all seeds of the trial side by side, and measure how their neurons turn."""

    name: str = "network"
    steps: int = 600
    """Optimizer steps."""
    epochs: float | None = None
    """Length in passes over the training set; overrides `steps` (used at paper scale)."""
    batch_size: int = 50
    """Samples a step (sequences for text)."""
    train_samples: int | None = None
    """Size of the random training subset, drawn anew for every seed; null uses the whole split."""
    evaluate: str = "validation"
    """Whose metrics enter the record: `validation` for tuning, `test` for judging, `both` where a curve needs both."""
    freeze_non_rotational: bool = False
    """Leave biases, gains and norm parameters at their initial values."""
    track: bool = False
    """Measure norms and rotation of every neuron."""
    track_every: int = 1
    """Measure every k-th step."""
    track_tail: float = 0.4
    """The equilibrium window: this last fraction of the run."""
    track_start: int = 20
    """The transient window: this many first steps."""
    log_every: int = 50
    """Steps between history rows."""
    eval_batch_size: int = 2000
    """Samples a forward pass in evaluation."""
    eval_tokens: int | None = None
    """Evaluate on this many first tokens of a text split; null takes all."""
    augment: str = "crop_flip"
    """Of training images: `none`; `crop_flip`: random mirror and shift by up to 4 pixels (with `image_size`: random
    mirror and resized crop); `deit`: timm's RandAugment, random erasing, mixup and cutmix (needs `image_size`)."""
    image_size: int | None = None
    """Stream images of any size from disk, cropped to this many pixels a side; null holds images of one size in
    memory."""
    accumulate: int = 1
    """Micro-batches an optimizer step is split into."""
    batch_tokens: int | None = None
    """Translation: sentences of similar length share a batch of at most this many tokens a language, padding included;
    replaces `batch_size`."""
    clip_norm: float | None = None
    """Clip every network's gradient to this norm; null does not."""
    label_smoothing: float = 0.0
    """Share of every training target that is spread over all classes."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "track_every", "track_start", "log_every", "eval_batch_size", "accumulate"):
            value = getattr(self, key)
            check(f"task.{key}", value, value >= 1, ">= 1")
        splits = ("validation", "test", "both")
        check("task.evaluate", self.evaluate, self.evaluate in splits, f"one of {', '.join(splits)}")
        check("task.track_tail", self.track_tail, 0 < self.track_tail <= 1, "in (0, 1]")
        for key in ("train_samples", "epochs", "eval_tokens", "image_size", "batch_tokens", "clip_norm"):
            value = getattr(self, key)
            check(f"task.{key}", value, value is None or value > 0, "> 0, or null")
        kinds = ("none", "crop_flip", "deit")
        check("task.augment", self.augment, self.augment in kinds, f"one of {', '.join(kinds)}")
        streams = self.augment != "deit" or self.image_size is not None
        check("task.augment", self.augment, streams, "none or crop_flip, or set task.image_size")
        check("task.label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")


@dataclass
class RandomWalkConfig:
    """Walk rows of a weight matrix on scale-invariant noise and compare norm and angle with the formulas."""

    name: str = "random_walk"
    dim: int = 128
    """Coordinates of a row (C)."""
    neurons: int = 24
    """Rows for every seed and gradient scale."""
    steps: int = 8000
    """Optimizer steps."""
    burn_in: float = 0.125
    """Fraction of the steps before norm and angle are averaged."""
    gradient_scales: list[float] = field(default_factory=lambda: [1.0])
    """Sizes of the gradient, one block of rows each (s)."""
    start_norm: float | None = None
    """Initial norm as a multiple of the equilibrium norm, to watch the transient; null starts in equilibrium."""

    def __post_init__(self) -> None:
        check("task.dim", self.dim, self.dim >= 3, ">= 3")
        check("task.neurons", self.neurons, self.neurons >= 1, ">= 1")
        check("task.steps", self.steps, self.steps >= 1, ">= 1")
        check("task.burn_in", self.burn_in, 0 <= self.burn_in < 1, "in [0, 1)")
        scales = self.gradient_scales
        check("task.gradient_scales", scales, len(scales) > 0 and min(scales, default=0) > 0, "a list of numbers > 0")
        start = self.start_norm
        check("task.start_norm", start, start is None or start > 0, "> 0, or null")


@dataclass
class TrialConfig(CommonConfig):
    """One trial: a task, a data set, a model, an optimizer, a schedule and its seeds."""

    task: Any = field(default_factory=NetworkTaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        # the loops keep no loss scale
        check("precision", self.precision, self.precision != "fp16", "fp32 or bf16")


register("rotational_optimizers_schema", TrialConfig)
register("network_schema", NetworkTaskConfig, group="task")
register("random_walk_schema", RandomWalkConfig, group="task")
