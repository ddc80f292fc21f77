"""Layers that train `n_models` independent networks side by side.

Small networks are bound by call overhead, so one process trains several seeds as one stack. Parameters carry the
models along their first axis: a weight of n_models networks with K neurons each has n_models*K rows, model i owning
rows i*K … (i+1)*K - 1; gains and biases are 1-D with n_models*K entries. Every row stays one neuron, so row-wise and
elementwise optimizers need not know about the stack, and nothing is summed across models, so a diverged model leaves
its neighbours untouched.

Each model is initialised from its own generator (`init_stacked`): model i of a stack holds, bit for bit, the
parameters of the plain torch.nn network built after `torch.manual_seed(seeds[i])` in the same order. With n_models=1
every layer is its torch.nn namesake.

Shapes: M = n_models, B = batch, C = input features of one model, K = output features of one model.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WS_EPS = 1e-5


def chunk(tensor: Tensor, n_models: int, index: int) -> Tensor:
    """Return model `index`'s rows of a stacked parameter, (n_models*K, …) -> (K, …), as a view."""
    rows = tensor.shape[0] // n_models
    return tensor[index * rows : (index + 1) * rows]


def standardize(weight: Tensor, scale: Tensor | float) -> Tensor:
    """Weight Standardization of each row: centred, divided by its unbiased std + 1e-5, times `scale`.

    Args:
        weight: (R, …) floating point, fan-in n = numel / R of at least 2.
        scale: the std that the result's rows get, a number or (R, 1).

    Source: Qiao et al. 2019 (arXiv 1903.10520), in the variant with the unbiased std.
    """
    rows = weight.flatten(1)
    std, mean = torch.std_mean(rows, dim=1, keepdim=True)
    return ((rows - mean) * (scale / (std + WS_EPS))).view_as(weight)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None


class Stacked(nn.Module):
    """What the stacked layers share: the number of models and the initialisation of one of them."""

    n_models: int

    def _allocate(self, n_models: int) -> None:
        # torch.nn's constructors initialise at once, all models together; ours build on the meta device, where
        # nothing is drawn, and get their memory here
        if n_models < 1:
            raise ValueError(f"n_models={n_models}: must be >= 1")
        self.n_models = n_models
        self.to_empty(device=torch.get_default_device())

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Initialise model `index`'s rows from `generator` (None: the global one), in torch.nn's order of draws."""
        raise TypeError(f"{type(self).__name__} does not say how one model is initialised")

    def finish_reset(self) -> None:
        """Record what depends on the initial weights of all models; called once they are final."""

    def reset_parameters(self) -> None:
        """Initialise every model from the global generator, one after the other."""
        if not next(self.parameters()).is_meta:
            with torch.no_grad():
                for index in range(self.n_models):
                    self.reset_model(index, None)
            self.finish_reset()


class Weighted(Stacked):
    """A layer with a weight of one row a neuron, which may be standardised, multiplied by a gain, or both."""

    weight: Tensor
    bias: Any  # a parameter or None; torch.nn's own annotations differ from layer to layer
    gain: Tensor | None
    initial_std: Tensor | None

    def _add_options(self, gain: bool, weight_standardization: bool, keep_init_std: bool) -> None:
        rows, fan_in = self.weight.shape[0], self.weight[0].numel()
        if weight_standardization and fan_in < 2:
            raise ValueError(f"weight_standardization with fan-in {fan_in}: a row needs >= 2 inputs to have a std")
        self.weight_standardization, self.gradient_scale = weight_standardization, 1.0
        self.fan_in_std = 1 / math.sqrt(fan_in)
        self.register_parameter("gain", nn.Parameter(torch.ones(rows)) if gain else None)
        keep = weight_standardization and keep_init_std
        self.register_buffer("initial_std", torch.ones(rows, 1) if keep else None)
        self.reset_parameters()

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Draw one model's weight and bias as nn.Linear and nn.Conv do."""
        weight = chunk(self.weight, self.n_models, index)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(chunk(self.bias, self.n_models, index), -bound, bound, generator=generator)

    def finish_reset(self) -> None:
        """Set gains to 1 and record each row's std, which a standardised weight keeps."""
        with torch.no_grad():
            if self.gain is not None:
                self.gain.fill_(1)
            if self.initial_std is not None:
                self.initial_std.copy_(self.weight.flatten(1).std(dim=1, keepdim=True) + WS_EPS)

    def effective_weight(self) -> Tensor:
        """Return the weight that the layer applies, of the shape of `weight`."""
        weight = self.weight
        if self.gradient_scale != 1:
            weight = _ScaleGradient.apply(weight, self.gradient_scale)
        if self.weight_standardization:
            weight = standardize(weight, self.fan_in_std if self.initial_std is None else self.initial_std)
        return weight if self.gain is None else weight * self.gain.view(-1, *[1] * (weight.dim() - 1))


class Linear(Weighted, nn.Linear):
    """`nn.Linear` for n_models networks: y = (gain ⊙ W) x + b.

    Args:
        n_models: networks in the stack, >= 1.
        in_features: C, inputs of one model.
        out_features: K, outputs of one model.
        bias: add a bias, (n_models*K,).
        gain: learnable factor on each row, (n_models*K,), ones at first.
        weight_standardization: use the row-standardised weight.
        keep_init_std: standardised rows keep the std they were initialised with; otherwise 1/sqrt(C).

    Input (n_models, B, …, C), output (n_models, B, …, K); weight (n_models*K, C).
    """

    def __init__(
        self,
        n_models: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gain: bool = False,
        weight_standardization: bool = False,
        keep_init_std: bool = True,
    ) -> None:
        nn.Linear.__init__(self, in_features, n_models * out_features, bias, device="meta")
        self._allocate(n_models)
        self._add_options(gain, weight_standardization, keep_init_std)

    def forward(self, x: Tensor) -> Tensor:
        """(n_models, B, …, C) -> (n_models, B, …, K)."""
        weight = self.effective_weight()
        if self.n_models == 1:
            return F.linear(x, weight, self.bias)
        flat = x.reshape(self.n_models, -1, x.shape[-1])  # (M, B*…, C)
        per_model = weight.view(self.n_models, -1, weight.shape[-1]).transpose(1, 2)  # (M, C, K)
        if self.bias is None:
            y = torch.bmm(flat, per_model)
        else:
            y = torch.baddbmm(self.bias.view(self.n_models, 1, -1), flat, per_model)
        return y.view(*x.shape[:-1], -1)  # (M, B, …, K)


class Embedding(Stacked, nn.Embedding):
    """`nn.Embedding` for n_models networks: ids (n_models, …) -> (n_models, …, d); weight (n_models*V, d).

    Args:
        n_models: networks in the stack, >= 1.
        num_embeddings: V, tokens of one model.
        embedding_dim: d.
        std: standard deviation of the normal initialisation.
    """

    offset: Tensor

    def __init__(self, n_models: int, num_embeddings: int, embedding_dim: int, std: float = 1.0) -> None:
        nn.Embedding.__init__(self, n_models * num_embeddings, embedding_dim, device="meta")
        self._allocate(n_models)
        self.std = std
        self.register_buffer("offset", torch.arange(n_models) * num_embeddings, persistent=False)
        self.reset_parameters()

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Draw one model's rows from a normal distribution."""
        nn.init.normal_(chunk(self.weight, self.n_models, index), std=self.std, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids, int64 (n_models, …), each in [0, V)."""
        if self.n_models > 1:
            ids = ids + self.offset.view(-1, *[1] * (ids.dim() - 1))
        return F.embedding(ids, self.weight)


class LayerNorm(Stacked):
    """`nn.LayerNorm(d)` for n_models networks, on (n_models, …, d); weight and bias (n_models*d,)."""

    def __init__(self, n_models: int, dim: int, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.n_models, self.dim, self.eps = n_models, dim, eps
        self.weight = nn.Parameter(torch.empty(n_models * dim))
        self.bias = nn.Parameter(torch.empty(n_models * dim)) if bias else None
        self.reset_parameters()

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Set one model's gains to 1 and biases to 0; draws nothing."""
        nn.init.ones_(chunk(self.weight, self.n_models, index))
        if self.bias is not None:
            nn.init.zeros_(chunk(self.bias, self.n_models, index))

    def forward(self, x: Tensor) -> Tensor:
        """(n_models, …, d) -> (n_models, …, d)."""
        if self.n_models == 1:
            return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        shape = (self.n_models, *[1] * (x.dim() - 2), self.dim)
        y = F.layer_norm(x, (self.dim,), eps=self.eps)
        weight = self.weight.view(shape)
        return y * weight if self.bias is None else torch.addcmul(self.bias.view(shape), y, weight)


def init_stacked(module: nn.Module, seeds: Sequence[int]) -> nn.Module:
    """Initialise every stacked layer of `module` on the CPU, model i from a generator seeded with seeds[i].

    Args:
        module: a network of stacked layers, all with n_models = len(seeds).
        seeds: one seed a model, each >= 0.

    Returns: `module`. Parameters on the meta device stay as they are.

    Raises:
        ValueError: there is no seed, one is negative, or a layer stacks another number of models.
    """
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)}: must be a non-empty list of integers >= 0")
    layers = list(_stacked_layers(module))
    for name, layer in layers:
        if layer.n_models != len(seeds):
            raise ValueError(f"seeds={list(seeds)}: layer {name} stacks {layer.n_models} models")
    if any(parameter.is_meta for parameter in module.parameters()):
        return module
    with torch.no_grad():
        for index, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for _, layer in layers:
                layer.reset_model(index, generator)
    finish_reset(module)
    return module


def finish_reset(module: nn.Module) -> None:
    """Let every stacked layer record what it keeps of its initial weights; call it after rescaling them."""
    for _, layer in _stacked_layers(module):
        layer.finish_reset()


def _stacked_layers(module: nn.Module) -> Iterator[tuple[str, Stacked]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Stacked))
