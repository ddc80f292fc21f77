"""The schema of one trial: every key that `python -m mulfree_training.train` accepts, its type and its range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.config import CommonConfig, check, register
from common.data.config import DataConfig
from common.data.crops import DeiTConfig

SCOPE = ("matmul", "softmax", "norm", "loss", "optimizer")
"""What can be piecewise affine, in the order of the ablation's rows."""
KINDS = ("standard", "pam", "perturbed", "power_of_two", "adder")
RULES = ("approx", "exact")
NETWORKS = ("vit", "gpt", "translation", "plain_conv", "preact_resnet", "conv_mixer")
ACTIVATIONS = ("relu", "gelu")
OPTIMIZERS = ("adamw", "sgd")
SPLITS = ("validation", "test")
AUGMENTATIONS = ("none", "crop", "deit")
SELECTIONS = ("last", "best")
BACKENDS = ("", "cpp", "triton", "torch", "reference")


@dataclass
class ArithmeticConfig:
    """Which part of a training step multiplies, and how."""

    kind: str = "standard"
    """`standard` (float32), `pam` (piecewise affine, within `scope`), or a baseline: `perturbed` (float32, the weights
    start one unit in the last place away), `power_of_two` (weights rounded to powers of two) or `adder` (AdderNet's
    distances in the hidden layers)."""
    scope: list[str] = field(default_factory=list)
    """What is piecewise affine (pam): any of `matmul`, `softmax` (with scalings), `norm`, `loss`, `optimizer`."""
    derivative: str = "approx"
    """Rule of the backward pass: `approx` or `exact` (pam)."""
    loss_derivative: str | None = None
    """Another rule for the loss; null: as `derivative` (pam)."""
    lse_log2: str | None = None
    """`exact` derives the logarithm in the loss exactly even if the loss is approximate, as the official code (pam)."""
    alpha: float | None = None
    """Compensation constant on every product, in (0.5, 2); null is none (pam)."""
    host_scalars: str = "exact"
    """`exact` or `pam`: how the optimizer's scalars (bias correction, decay times learning rate) are computed (pam)."""
    backend: str = ""
    """Forces `cpp`, `triton`, `torch` or `reference`; empty picks by device (pam)."""

    def __post_init__(self) -> None:
        check("arithmetic.kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        known = set(self.scope) <= set(SCOPE) and len(set(self.scope)) == len(self.scope)
        check("arithmetic.scope", self.scope, known, f"different words among {', '.join(SCOPE)}")
        fits = bool(self.scope) == (self.kind == "pam")
        check("arithmetic.scope", self.scope, fits, "empty unless arithmetic.kind=pam, and not empty then")
        check("arithmetic.derivative", self.derivative, self.derivative in RULES, f"one of {', '.join(RULES)}")
        for key in ("loss_derivative", "lse_log2"):
            value = getattr(self, key)
            check(f"arithmetic.{key}", value, value is None or value in RULES, f"null or one of {', '.join(RULES)}")
        alpha = self.alpha
        check("arithmetic.alpha", alpha, alpha is None or 0.5 < alpha < 2, "in (0.5, 2), or null")
        check("arithmetic.host_scalars", self.host_scalars, self.host_scalars in ("exact", "pam"), "exact or pam")
        words = ", ".join(BACKENDS[1:])
        check("arithmetic.backend", repr(self.backend), self.backend in BACKENDS, f"empty or one of {words}")


@dataclass
class ModelConfig:
    """A network and its shape. A network that does not read a key refuses any value but the default."""

    name: str = "vit"
    """`vit`, `gpt`, `translation`, `plain_conv` (VGG without norm), `preact_resnet` or `conv_mixer`."""
    in_channels: int = 1
    """Channels of the images (vit, convolutional)."""
    classes: int = 10
    """Classes (vit, convolutional)."""
    image_size: int = 8
    """Height and width of the images in pixels (vit)."""
    patch_size: int = 2
    """Height and width of a patch (vit, conv_mixer)."""
    vocab: int = 128
    """Tokens (gpt), or tokens of the target language (translation)."""
    source_vocab: int = 128
    """Tokens of the source language (translation)."""
    context: int = 64
    """Longest input in tokens (gpt)."""
    d_model: int = 64
    """Width of a transformer, a multiple of n_head."""
    n_layer: int = 2
    """Blocks (of encoder and of decoder each, translation)."""
    n_head: int = 4
    """Attention heads."""
    d_hidden: int = 128
    """Width of the hidden layers of a transformer."""
    activation: str = "relu"
    """`relu`, which multiplies nothing, or `gelu` (transformers)."""
    dropout: float = 0.0
    """On the embeddings and every branch (transformers)."""
    drop_path: float = 0.0
    """Probability to skip a branch in the last block, rising linearly from 0 (vit)."""
    eps: float = 1e-6
    """Of the layer norms (vit)."""
    std: float = 0.02
    """Of the initial weights (vit, gpt)."""
    layout: list[int] = field(default_factory=lambda: [16, 0, 32, 0, 64])
    """Output channels of the convolutions; 0 is a pooling (plain_conv)."""
    depth: int = 20
    """Layers (preact_resnet) or blocks (conv_mixer)."""
    channels: int = 16
    """Channels of the first stage (preact_resnet), or width (conv_mixer)."""
    groups: int = 1
    """Groups of the 3x3 convolutions (preact_resnet)."""
    kernel_size: int = 5
    """Of the depthwise convolutions, odd (conv_mixer)."""
    expected_parameters: int | None = None
    """Known number of parameters, checked when the network is built; null: not established."""

    def __post_init__(self) -> None:
        check("model.name", self.name, self.name in NETWORKS, f"one of {', '.join(NETWORKS)}")
        counts = ("in_channels", "classes", "image_size", "patch_size", "vocab", "source_vocab", "context", "d_model")
        for key in (*counts, "n_layer", "n_head", "d_hidden", "depth", "channels", "groups", "kernel_size"):
            check(f"model.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        multiple = self.d_model % self.n_head == 0
        check("model.d_model", self.d_model, multiple, f"a multiple of model.n_head={self.n_head}")
        known = self.activation in ACTIVATIONS
        check("model.activation", self.activation, known, f"one of {', '.join(ACTIVATIONS)}")
        for key in ("dropout", "drop_path"):
            check(f"model.{key}", getattr(self, key), 0 <= getattr(self, key) < 1, "in [0, 1)")
        check("model.eps", self.eps, self.eps >= 0, ">= 0")
        check("model.std", self.std, self.std > 0, "> 0")
        layout = self.layout
        check("model.layout", layout, bool(layout) and min(layout) >= 0 and layout[0] > 0, "channels, 0 for a pooling")
        check("model.kernel_size", self.kernel_size, self.kernel_size % 2 == 1, "odd")
        whole = self.image_size % self.patch_size == 0
        check("model.patch_size", self.patch_size, self.name != "vit" or whole, f"a divisor of {self.image_size}")
        count = self.expected_parameters
        check("model.expected_parameters", count, count is None or count > 0, "> 0, or null")


@dataclass
class OptimizerConfig:
    """AdamW or SGD with a linear warm-up and one cosine to the last step."""

    name: str = "adamw"
    """`adamw` or `sgd`."""
    lr: float = 0.002
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled (adamw), or added to the gradient (sgd)."""
    decay_all: bool = True
    """Decay biases, norms and embeddings too, as torch does; false leaves out vectors, and class token and positions of
    the vit, as timm."""
    beta1: float = 0.9
    """First-moment decay, or momentum (sgd)."""
    beta2: float = 0.999
    """Second-moment decay (adamw)."""
    eps: float = 1e-8
    """Added to the root of the second moment (adamw)."""
    warmup: int = 50
    """Steps until the peak."""
    start: float = 0.0
    """Learning rate before the first step as a share of the peak."""
    final: float = 0.0
    """Learning rate at the end as a share of the peak."""

    def __post_init__(self) -> None:
        check("optimizer.name", self.name, self.name in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        check("optimizer.lr", self.lr, self.lr > 0, "> 0")
        for key in ("weight_decay", "eps", "warmup"):
            check(f"optimizer.{key}", getattr(self, key), getattr(self, key) >= 0, ">= 0")
        for key in ("beta1", "beta2"):
            check(f"optimizer.{key}", getattr(self, key), 0 <= getattr(self, key) < 1, "in [0, 1)")
        for key in ("start", "final"):
            check(f"optimizer.{key}", getattr(self, key), 0 <= getattr(self, key) <= 1, "in [0, 1]")


def _check_training(task: ImagesConfig | LanguageConfig | TranslationConfig, *counts: str) -> None:
    check("task.evaluate", task.evaluate, task.evaluate in SPLITS, f"one of {', '.join(SPLITS)}")
    for key in (*counts, "accumulate", "eval_batch_size", "log_every"):
        check(f"task.{key}", getattr(task, key), getattr(task, key) >= 1, ">= 1")
    check("task.label_smoothing", task.label_smoothing, 0 <= task.label_smoothing < 1, "in [0, 1)")


@dataclass
class ImagesConfig:
    """Train an image classifier."""

    name: str = "images"
    epochs: int = 15
    """Passes over the training split."""
    batch_size: int = 64
    """Images a step."""
    accumulate: int = 1
    """Micro-batches a step."""
    label_smoothing: float = 0.1
    """Epsilon, spread over all classes."""
    augment: str = "none"
    """`none`, `crop` (pad 4, random crop and mirror) or `deit` (timm's as in `deit`; needs `upsample`)."""
    deit: DeiTConfig = field(default_factory=DeiTConfig)
    """What timm does (`augment=deit`)."""
    upsample: int | None = None
    """Images are resized to this height and width (bicubic); null leaves them."""
    evaluate: str = "validation"
    """Whose accuracy enters the record: `validation` for tuning, `test` for judging."""
    eval_batch_size: int = 512
    """Images a forward pass in evaluation."""
    log_every: int = 25
    """Steps between history rows."""

    def __post_init__(self) -> None:
        _check_training(self, "epochs", "batch_size")
        check("task.augment", self.augment, self.augment in AUGMENTATIONS, f"one of {', '.join(AUGMENTATIONS)}")
        check("task.upsample", self.upsample, self.upsample is None or self.upsample >= 1, ">= 1, or null")
        sized = self.augment != "deit" or self.upsample is not None
        check("task.upsample", self.upsample, sized, "given for task.augment=deit")


@dataclass
class LanguageConfig:
    """Train a language model on characters, bytes or tokens."""

    name: str = "language"
    vocabulary: str = "characters"
    """`characters` (the `model.vocab` most frequent) or `tokenizer` (`data.tokenizer`)."""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 12
    """Sequences a step."""
    accumulate: int = 1
    """Micro-batches a step."""
    label_smoothing: float = 0.0
    """Epsilon, spread over the other tokens (fairseq)."""
    evaluate: str = "validation"
    """Whose loss enters the record: `validation` for tuning, `test` for judging."""
    eval_tokens: int = 16384
    """First tokens of the split to evaluate on."""
    eval_batch_size: int = 64
    """Sequences a forward pass in evaluation."""
    log_every: int = 25
    """Steps between history rows."""

    def __post_init__(self) -> None:
        _check_training(self, "steps", "batch_size", "eval_tokens")
        known = self.vocabulary in ("characters", "tokenizer")
        check("task.vocabulary", self.vocabulary, known, "characters or tokenizer")


@dataclass
class TranslationConfig:
    """Train a translation model on sentence pairs and score its translations."""

    name: str = "translation"
    steps: int = 22021
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Most tokens of one language in a batch, padding included."""
    accumulate: int = 1
    """Micro-batches a step."""
    label_smoothing: float = 0.1
    """Epsilon, spread over the other tokens (fairseq)."""
    evaluate: str = "validation"
    """Whose loss and BLEU enter the record: `validation` for tuning, `test` for judging."""
    eval_batch_size: int = 64
    """Sentences a forward pass in evaluation."""
    beams: int = 5
    """Width of the beam search."""
    length_factor: float = 1.2
    """Longest translation over the source's length (with its end), beside `length_extra`."""
    length_extra: int = 10
    """Tokens that a translation may have beyond `length_factor` times its source's."""
    select: str = "last"
    """Weights to evaluate: `last`, or `best` by BLEU on the validation split."""
    evaluate_every: int = 1000
    """Steps between validations (`select=best`); the last step has one too."""
    log_every: int = 100
    """Steps between history rows."""

    def __post_init__(self) -> None:
        _check_training(self, "steps", "batch_tokens", "beams", "evaluate_every")
        check("task.length_factor", self.length_factor, self.length_factor > 0, "> 0")
        check("task.length_extra", self.length_extra, self.length_extra >= 0, ">= 0")
        check("task.select", self.select, self.select in SELECTIONS, f"one of {', '.join(SELECTIONS)}")


@dataclass
class PrimitivesConfig:
    """Measure the error law of the piecewise affine operations; a seed draws other random numbers."""

    name: str = "primitives"
    mantissa_bits: int = 11
    """The grid has all mantissas of this many bits."""
    pairs: int = 1000000
    """Random pairs a seed."""

    def __post_init__(self) -> None:
        check("task.mantissa_bits", self.mantissa_bits, 2 <= self.mantissa_bits <= 12, "in [2, 12]")
        check("task.pairs", self.pairs, self.pairs >= 1, ">= 1")


@dataclass
class AffineConfig:
    """Is a network piecewise affine along a line through its inputs and all its weights at once (float64)?"""

    name: str = "affine"
    points: int = 200
    """Points on the line."""
    d_model: int = 16
    """Width of the network: linear, layer norm, attention, sum."""
    tokens: int = 5
    """Rows of the input."""
    steps: list[float] = field(default_factory=lambda: [1e-5, 1e-6, 1e-7])
    """Distances h of the differences."""

    def __post_init__(self) -> None:
        for key in ("points", "d_model", "tokens"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.steps", self.steps, bool(self.steps) and min(self.steps) > 0, "distances > 0")


@dataclass
class ProofConfig:
    """Count what multiplies in one training step and in the compiled kernels, and what the step would cost."""

    name: str = "proof"
    workload: str = "images"
    """`images` (`vit` or a convolutional network) or `language` (`gpt`): which step."""
    batch_size: int = 16
    """Images or sequences of the step."""
    kernels: bool = False
    """Also scan the compiled kernels: C++ by disassembly, Triton's PTX, and its machine code for sm_90."""

    def __post_init__(self) -> None:
        known = self.workload in ("images", "language")
        check("task.workload", self.workload, known, "images or language")
        check("task.batch_size", self.batch_size, self.batch_size >= 1, ">= 1")


@dataclass
class TrialConfig(CommonConfig):
    """One trial: a task, and for trainings the data, the network, its arithmetic and the optimizer."""

    max_steps: int | None = None
    """Cuts trainings to this many steps and measurements to few samples; null leaves them (tests)."""
    task: Any = field(default_factory=ImagesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.max_steps
        check("max_steps", steps, steps is None or steps >= 1, ">= 1, or null")
        # the loops keep no loss scale
        check("precision", self.precision, self.precision != "fp16", "fp32 or bf16")
        single = self.precision == "fp32" or self.arithmetic.kind == "standard"
        check("precision", self.precision, single, f"fp32 for arithmetic.kind={self.arithmetic.kind}")


register("mulfree_training_schema", TrialConfig)
register("mulfree_images_schema", ImagesConfig, group="task")
register("mulfree_language_schema", LanguageConfig, group="task")
register("mulfree_translation_schema", TranslationConfig, group="task")
register("mulfree_primitives_schema", PrimitivesConfig, group="task")
register("mulfree_affine_schema", AffineConfig, group="task")
register("mulfree_proof_schema", ProofConfig, group="task")
