"""The schema of one trial: every key that `python -m sparse_flash_attention.train` accepts, its type and its range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.config import CommonConfig, check, register
from common.data.config import DataConfig

KINDS = ("dense", "hash", "random", "drop", "reformer", "window")
KEY_NORMS = ("head", "all")
BACKENDS = ("cpp", "triton", "torch", "flex", "reference")
SPLITS = ("validation", "test")
VOCABULARIES = ("words", "bytes", "tokenizer")
HASHINGS = ("uniform", "angular")
DTYPES = ("fp32", "bf16", "fp16")


@dataclass
class AttentionConfig:
    """Who sees whom in the language model; the paper's symbols in brackets."""

    kind: str = "dense"
    """`dense` (F-LM), `hash` (H-LM), `random` (buckets that know nothing of the content), `drop` (D-LM), `reformer`
    (chunked LSH) or `window`."""
    key_norm: str = "head"
    """Keys are unit vectors per `head`; `all`: over all channels at once, as in the official dense baseline."""
    n_buckets: int = 16
    """Buckets (nb), even (hash, random, reformer)."""
    include_self: bool = True
    """A row sees itself; false is the official H-LM, where the first row of a bucket gives 0 (hash, random)."""
    drop_prob: float = 0.3
    """Probability that a row is dropped, for queries and for keys (s) (drop)."""
    drop_at_eval: bool = False
    """Also drop in evaluation, as the official code does (drop)."""
    chunk: int = 64
    """Rows a chunk (reformer)."""
    window: int = 1
    """Keys a row, itself included; 1 is the control without attention (window)."""
    backend: str | None = None
    """Forces `cpp`, `triton`, `torch`, `flex` or `reference`; null picks by device."""

    def __post_init__(self) -> None:
        check("attention.kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        check("attention.key_norm", self.key_norm, self.key_norm in KEY_NORMS, f"one of {', '.join(KEY_NORMS)}")
        even = self.n_buckets >= 2 and self.n_buckets % 2 == 0
        check("attention.n_buckets", self.n_buckets, even, "even and >= 2")
        check("attention.drop_prob", self.drop_prob, 0 <= self.drop_prob < 1, "in [0, 1)")
        for key in ("chunk", "window"):
            check(f"attention.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        known = self.backend is None or self.backend in BACKENDS
        check("attention.backend", self.backend, known, f"null or one of {', '.join(BACKENDS)}")

    def options(self) -> dict[str, Any]:
        """The keyword arguments that the layer of this kind takes."""
        names = {
            "dense": ("backend",),
            "hash": ("n_buckets", "include_self", "backend"),
            "random": ("n_buckets", "include_self", "backend"),
            "drop": ("drop_prob", "drop_at_eval", "backend"),
            "reformer": ("n_buckets", "include_self", "chunk"),
            "window": ("window",),
        }[self.kind]
        return {"key_norm": self.key_norm} | {name: getattr(self, name) for name in names}


@dataclass
class NetworkConfig:
    """Sizes of the language model."""

    vocab: int = 512
    """Tokens (V); `words` keeps the most frequent, `bytes` has 256."""
    d_model: int = 64
    """Width (d), a multiple of n_head."""
    n_layer: int = 2
    """Blocks."""
    n_head: int = 8
    """Heads (H)."""
    context: int = 256
    """Tokens a sequence (T)."""
    expected_parameters: int | None = None
    """Known number of parameters, checked when the model is built; null: not established."""

    def __post_init__(self) -> None:
        for key in ("vocab", "d_model", "n_layer", "n_head", "context"):
            check(f"model.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        fits = self.d_model % self.n_head == 0
        check("model.d_model", self.d_model, fits, f"a multiple of model.n_head={self.n_head}")
        known = self.expected_parameters is None or self.expected_parameters > 0
        check("model.expected_parameters", self.expected_parameters, known, "> 0, or null")


@dataclass
class OptimizerConfig:
    """AdamW with a one-cycle cosine schedule."""

    lr: float = 0.006
    """Peak learning rate."""
    weight_decay: float = 0.1
    """On matrices, not on embeddings and norms."""
    beta1: float = 0.9
    """First-moment decay."""
    beta2: float = 0.95
    """Second-moment decay."""
    clip_norm: float | None = 1.0
    """Clip the gradient to this norm; null does not."""
    warmup: float = 0.05
    """Share of the steps until the peak."""
    start: float = 0.04
    """First learning rate as a share of the peak."""
    final: float = 0.01
    """Last learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        check("optimizer.lr", self.lr, self.lr > 0, "> 0")
        check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        for key in ("beta1", "beta2", "warmup"):
            check(f"optimizer.{key}", getattr(self, key), 0 <= getattr(self, key) < 1, "in [0, 1)")
        for key in ("start", "final"):
            check(f"optimizer.{key}", getattr(self, key), 0 < getattr(self, key) <= 1, "in (0, 1]")
        clip = self.clip_norm
        check("optimizer.clip_norm", clip, clip is None or clip > 0, "> 0, or null")


@dataclass
class LanguageConfig:
    """Train a language model and measure its loss on held-out text."""

    name: str = "language"
    vocabulary: str = "words"
    """`words` (regular expression, the `model.vocab` most frequent), `bytes`, or `tokenizer` (`data.tokenizer`)."""
    steps: int = 800
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences a step."""
    accumulate: int = 1
    """Micro-batches a step."""
    evaluate: str = "validation"
    """Whose loss enters the record: `validation` for tuning, `test` for judging."""
    eval_tokens: int = 65536
    """First tokens of the split to evaluate on."""
    eval_batch_size: int = 32
    """Sequences a forward pass in evaluation."""
    early_step: int = 50
    """Step of the early reading of the pair density."""
    log_every: int = 50
    """Steps between history rows."""
    eval_every: int = 0
    """Steps between evaluations during training; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        check("task.vocabulary", self.vocabulary, self.vocabulary in VOCABULARIES, f"one of {', '.join(VOCABULARIES)}")
        check("task.evaluate", self.evaluate, self.evaluate in SPLITS, f"one of {', '.join(SPLITS)}")
        for key in ("steps", "batch_size", "accumulate", "eval_tokens", "eval_batch_size", "early_step", "log_every"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        divides = self.batch_size % self.accumulate == 0
        check("task.accumulate", self.accumulate, divides, f"a divisor of task.batch_size={self.batch_size}")
        check("task.eval_every", self.eval_every, self.eval_every >= 0, ">= 0")


@dataclass
class RuntimeConfig:
    """Time attention, forward and backward, dense and at many sparsities; a seed is a repetition with new data."""

    name: str = "runtime"
    length: int = 8192
    """Rows (T)."""
    batch: int = 1
    """Samples (B)."""
    heads: int = 2
    """Heads (H)."""
    head_dim: int = 64
    """Channels a head (D)."""
    dtype: str = "fp32"
    """`fp32`, `bf16` or `fp16`."""
    keeps: list[float] = field(default_factory=lambda: [1.0, 0.7, 0.5, 0.3, 0.1])
    """Shares of queries and of keys that are kept."""
    buckets: list[int] = field(default_factory=lambda: [2, 8, 16, 32])
    """Numbers of uniform random buckets."""
    naive: bool = False
    """Also time the naive way: compact, pad, and dense attention with an explicit mask."""
    rounds: int = 1
    """Rounds a repetition, interleaved; the fastest counts."""

    def __post_init__(self) -> None:
        for key in ("length", "batch", "heads", "head_dim", "rounds"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        check("task.keeps", self.keeps, all(0 < x <= 1 for x in self.keeps), "shares in (0, 1]")
        check("task.buckets", self.buckets, all(x >= 1 for x in self.buckets), "integers >= 1")


@dataclass
class StepConfig:
    """Time whole training steps of language models that differ in their attention; a seed is a repetition."""

    name: str = "step"
    length: int = 8192
    """Tokens of the one sequence (T)."""
    batch_size: int = 1
    """Sequences."""
    buckets: list[int] = field(default_factory=lambda: [16])
    """Numbers of LSH buckets (H-LM)."""
    drops: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])
    """Shares of dropped rows (D-LM)."""

    def __post_init__(self) -> None:
        for key in ("length", "batch_size"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.buckets", self.buckets, all(x >= 2 and x % 2 == 0 for x in self.buckets), "even integers >= 2")
        check("task.drops", self.drops, all(0 <= x < 1 for x in self.drops), "shares in [0, 1)")


@dataclass
class CoverageConfig:
    """Which share of the pairs in one bucket is really attended: ranges (ours) and Reformer's chunks."""

    name: str = "coverage"
    length: int = 8192
    """Rows (T)."""
    heads: int = 8
    """Heads (H)."""
    n_buckets: int = 16
    """Buckets (nb), even."""
    chunk: int = 64
    """Rows of one of Reformer's chunks."""
    hashing: str = "uniform"
    """`uniform` random buckets, or `angular` LSH of Gaussian rows."""
    head_dim: int = 32
    """Channels of the Gaussian rows (angular)."""

    def __post_init__(self) -> None:
        for key in ("length", "heads", "chunk", "head_dim"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        even = self.n_buckets >= 2 and self.n_buckets % 2 == 0
        check("task.n_buckets", self.n_buckets, even, "even and >= 2")
        check("task.hashing", self.hashing, self.hashing in HASHINGS, f"one of {', '.join(HASHINGS)}")


@dataclass
class ExactnessConfig:
    """Compare outputs and gradients with masked dense attention in double precision, over random patterns."""

    name: str = "exactness"
    patterns: int = 40
    """Random patterns a seed."""
    longest: int = 300
    """Lengths are drawn from 1 up to this."""
    dtype: str = "fp32"
    """`fp32`, `bf16` or `fp16`."""
    backend: str | None = None
    """The implementation on trial; null takes the one that runs by default here."""

    def __post_init__(self) -> None:
        for key in ("patterns", "longest"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        known = self.backend is None or self.backend in BACKENDS
        check("task.backend", self.backend, known, f"null or one of {', '.join(BACKENDS)}")


@dataclass
class AheadOfTimeConfig:
    """Compile the Triton kernels ahead of time and count registers, spills and shared memory."""

    name: str = "aot"
    head_dims: list[int] = field(default_factory=lambda: [64, 128])
    """Channels a head (D)."""
    dtype: str = "bf16"
    """`fp32`, `bf16` or `fp16`."""

    def __post_init__(self) -> None:
        dims = self.head_dims
        check("task.head_dims", dims, bool(dims) and all(16 <= x <= 256 for x in dims), "integers in [16, 256]")
        check("task.dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")


@dataclass
class TrialConfig(CommonConfig):
    """One trial: a task, and for language models the data, the network, its attention and the optimizer."""

    max_steps: int | None = None
    """Cuts trainings to this many steps and measurements to short lengths; null leaves them (tests)."""
    task: Any = field(default_factory=LanguageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.max_steps
        check("max_steps", steps, steps is None or steps >= 1, ">= 1, or null")
        # the loops keep no loss scale
        check("precision", self.precision, self.precision != "fp16", "fp32 or bf16")
        if isinstance(self.task, LanguageConfig):
            tokens = self.task.vocabulary != "bytes" or self.model.vocab == 256
            check("model.vocab", self.model.vocab, tokens, "256 for task.vocabulary=bytes")
            saved = self.task.vocabulary != "tokenizer" or bool(self.data.tokenizer)
            check("data.tokenizer", repr(self.data.tokenizer), saved, "a folder for task.vocabulary=tokenizer")


register("sparse_flash_attention_schema", TrialConfig)
register("language_schema", LanguageConfig, group="task")
register("runtime_schema", RuntimeConfig, group="task")
register("step_schema", StepConfig, group="task")
register("coverage_schema", CoverageConfig, group="task")
register("exactness_schema", ExactnessConfig, group="task")
register("aot_schema", AheadOfTimeConfig, group="task")
