"""From an `ArithmeticConfig` to a network, a loss and an optimizer that compute in it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training.convert import convert_to_mulfree
from mulfree_training.functional import pam_cross_entropy
from mulfree_training.networks.blocks import Scale
from mulfree_training.optim import PAMSGD, PAMAdamW
from mulfree_training.primitives import pam_div, pam_mul
from mulfree_training.relatives import perturb, use_adders, use_powers_of_two

if TYPE_CHECKING:
    from mulfree_training.config import ArithmeticConfig, OptimizerConfig

IGNORED = -100
"""Target that does not count."""
UNDECAYED = ("class_token", "position")
"""Parameters of the ViT that do not decay with the vectors, as in timm."""


class Loss(Protocol):
    """A mean loss over targets."""

    def __call__(self, logits: Tensor, target: Tensor, count: Tensor | None = None) -> Tensor:
        """(…, V) logits, and (…) int64 targets or (…, V) probabilities -> () mean over the targets that count, or over
        a given number () of them."""


def convert(model: nn.Module, c: ArithmeticConfig) -> nn.Module:
    """Let a network compute as configured, in place."""
    if c.kind == "perturbed":
        perturb(model)
    elif c.kind == "power_of_two":
        use_powers_of_two(model)
    elif c.kind == "adder":
        use_adders(model)
    scope = tuple(word for word in ("matmul", "softmax", "norm") if word in c.scope)
    options: dict[str, Any] = {"derivative": c.derivative, "alpha": c.alpha}
    if scope:
        convert_to_mulfree(model, scope=scope, **options)
    if "softmax" in c.scope:
        for part in model.modules():
            if isinstance(part, Scale):
                part.product = functools.partial(pam_mul, **options)
    return model


def loss_function(c: ArithmeticConfig, label_smoothing: float, smoothing: str) -> Loss:
    """Cross-entropy in float32 or piecewise affine; `smoothing` is `torch` or `fairseq` (see `pam_cross_entropy`)."""
    if "loss" not in c.scope:
        return functools.partial(standard_loss, label_smoothing=label_smoothing, smoothing=smoothing)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "smoothing": smoothing, "ignore_index": IGNORED}
    options |= {"derivative": c.loss_derivative or c.derivative, "alpha": c.alpha, "lse_log2": c.lse_log2}

    def loss(logits: Tensor, target: Tensor, count: Tensor | None = None) -> Tensor:
        if target.is_floating_point():
            raise TypeError(f"target of dtype {target.dtype}: must be int64 for a piecewise affine loss")
        logits, target = logits.flatten(0, -2), target.flatten()
        if count is None:
            return pam_cross_entropy(logits, target, **options)
        total = pam_cross_entropy(logits, target, reduction="sum", **options)
        return pam_div(total, count, derivative=options["derivative"], alpha=c.alpha)

    return loss


def standard_loss(
    logits: Tensor, target: Tensor, count: Tensor | None = None, *, label_smoothing: float, smoothing: str
) -> Tensor:
    """The same losses in float32; probabilities have torch's smoothing only."""
    logits, target = logits.flatten(0, -2), target.flatten(0, -2) if target.is_floating_point() else target.flatten()
    if smoothing == "torch" or not label_smoothing:
        reduction = "mean" if count is None else "sum"
        options = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
        loss = F.cross_entropy(logits, target, reduction=reduction, **options)  # type: ignore[arg-type]
        return loss if count is None else loss / count
    # fairseq: the others share epsilon, the target keeps the rest
    share = label_smoothing / (logits.shape[-1] - 1)
    lp, counts = logits.log_softmax(-1), target != IGNORED
    own = -lp.gather(-1, target.where(counts, 0)[:, None])[:, 0]
    total = (1 - label_smoothing - share) * own - share * lp.sum(-1)
    return total.where(counts, 0.0).sum() / (counts.sum() if count is None else count)


def make_optimizer(model: nn.Module, c: OptimizerConfig, a: ArithmeticConfig) -> torch.optim.Optimizer:
    """AdamW or SGD, piecewise affine where the scope says so."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            kept = p.dim() <= 1 or name.rpartition(".")[2] in UNDECAYED
            (others if kept and not c.decay_all else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    own = "optimizer" in a.scope
    if c.name == "sgd":
        if own:
            return PAMSGD(groups, lr=c.lr, momentum=c.beta1)
        return torch.optim.SGD(groups, lr=c.lr, momentum=c.beta1)
    betas = (c.beta1, c.beta2)
    if own:
        return PAMAdamW(groups, lr=c.lr, betas=betas, eps=c.eps, scalars=a.host_scalars)  # type: ignore[arg-type]
    return torch.optim.AdamW(groups, lr=c.lr, betas=betas, eps=c.eps, fused=True)
