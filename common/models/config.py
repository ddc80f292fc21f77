"""The schema of the `model` group: one flat dataclass for every network of the registry in `build`."""

from dataclasses import dataclass, field

from common.config import check

COUNTS = (
    "in_channels", "classes", "channels", "depth", "vocab", "source_vocab", "d_model", "d_hidden", "n_layer", "n_head",
    "context", "image_size", "patch_size",
)  # fmt: skip
NETWORKS = ("convnet1d", "mlp", "gpt", "resnet", "vgg", "vit", "translation")


@dataclass
class ModelConfig:
    """A network and its shape. A network that does not read a key refuses any value but the default."""

    name: str = "convnet1d"
    """The network: `convnet1d`, `mlp`, `gpt`, `resnet`, `vgg`, `vit` or `translation`."""
    in_channels: int = 1
    """Channels of the input (features, for mlp)."""
    classes: int = 10
    """Outputs of a classifier."""
    channels: int = 32
    """Output channels of a convolution (convnet1d), of the first stage's 3x3 convolutions (resnet, vgg), or width of
    the hidden layers (mlp)."""
    width: float = 1.0
    """Factor on `channels`, rounded down (convnet1d, resnet, vgg, mlp)."""
    depth: int = 4
    """Convolutions (convnet1d: 4, or an even number above it) or hidden layers (mlp)."""
    norm: str = "bn"
    """`bn` (BatchNorm), `ln` (GroupNorm with one group; LayerNorm in mlp) or `none`."""
    weight_standardization: bool = False
    """Standardise every row of the weights of convolutions (and of all linear layers, gpt and vgg)."""
    keep_init_std: bool = True
    """Standardised rows keep the std they were initialised with; false: 1/sqrt(fan-in)."""
    standardize_head: bool = False
    """With weight_standardization, standardise the rows of the classifier's head too (convnet1d, resnet)."""
    gains: bool = False
    """A learnable factor on every row of the linear layers (gpt, vit, translation), or of all weights (vgg)."""
    init_scale: float = 1.0
    """Factor on the initial weights of convolutions (convnet1d)."""
    block_scales: list[float] | None = None
    """One constant a residual block, factor on its branch (convnet1d)."""
    gradient_scales: list[float] | None = None
    """One constant a convolution, factor on the gradient of its weight (convnet1d)."""
    stages: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Blocks a stage (resnet), or convolutions a stage (vgg); every stage but the last halves the resolution."""
    block: str = "basic"
    """Residual block: `basic` or `bottleneck` (resnet)."""
    stem: str = "cifar"
    """First layer: `cifar` (3x3) or `imagenet` (7x7 and max pooling, both of stride 2) (resnet)."""
    pre_activation: bool = False
    """Norm and ReLU come before each convolution (resnet)."""
    vocab: int = 256
    """Tokens (gpt), or tokens of the target language (translation)."""
    source_vocab: int = 256
    """Tokens of the source language (translation)."""
    d_model: int = 64
    """Width of a transformer, a multiple of n_head."""
    d_hidden: int = 256
    """Hidden width of the feed-forward layers (translation; elsewhere it is 4 d_model)."""
    n_layer: int = 2
    """Transformer blocks (of encoder and of decoder each, translation)."""
    n_head: int = 4
    """Attention heads."""
    context: int = 48
    """Longest input in tokens (gpt)."""
    image_size: int = 224
    """Height and width of the image in pixels (vit)."""
    patch_size: int = 16
    """Height and width of a patch in pixels (vit)."""
    bias: bool = True
    """Biases in the linear layers and layer norms (gpt)."""
    tied: bool = True
    """Output layer and token embedding share their weight (gpt, translation)."""
    dropout: float = 0.0
    """Dropout probability (gpt, vit, translation)."""
    drop_path: float = 0.0
    """Probability to skip a branch in the last block, rising linearly from 0 in the first (vit)."""
    expected_parameters: int | None = None
    """Known number of parameters of this architecture, checked whenever the network is built; null: not established."""

    def __post_init__(self) -> None:
        check("model.name", self.name, self.name in NETWORKS, f"one of {', '.join(NETWORKS)}")
        for key in COUNTS:
            check(f"model.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        for key in ("width", "init_scale"):
            check(f"model.{key}", getattr(self, key), getattr(self, key) > 0, "> 0")
        for key in ("dropout", "drop_path"):
            check(f"model.{key}", getattr(self, key), 0 <= getattr(self, key) < 1, "in [0, 1)")
        choices = {"norm": ("bn", "ln", "none"), "block": ("basic", "bottleneck"), "stem": ("cifar", "imagenet")}
        for key, allowed in choices.items():
            check(f"model.{key}", getattr(self, key), getattr(self, key) in allowed, f"one of {', '.join(allowed)}")
        check("model.stages", self.stages, bool(self.stages) and min(self.stages) >= 1, "a list of integers >= 1")
        multiple = self.d_model % self.n_head == 0
        check("model.d_model", self.d_model, multiple, f"a multiple of model.n_head={self.n_head}")
        known = self.expected_parameters is None or self.expected_parameters > 0
        check("model.expected_parameters", self.expected_parameters, known, "> 0, or null")
