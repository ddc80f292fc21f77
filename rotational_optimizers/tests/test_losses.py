"""Loss, clipping, schedule floor and excluded parameters, against plain formulas and network by network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.data.pairs import IGNORED
from common.models import ModelConfig, build
from rotational_optimizers.config import OptimizerConfig
from rotational_optimizers.optimizers import build_optimizer
from rotational_optimizers.schedule import lr_factor
from rotational_optimizers.tasks.network import clip_gradients, losses

LOGITS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]])
EPS = torch.finfo(torch.float64).eps


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    log_p = LOGITS.log_softmax(-1)
    own = -log_p.gather(-1, TARGET[..., None])[..., 0]
    expected = (0.9 * own - 0.1 * log_p.mean(-1)).mean(1)
    assert torch.allclose(losses(LOGITS, TARGET, smoothing=0.1), expected, rtol=16 * EPS)
    one_hot = nn.functional.one_hot(TARGET, 4).double()
    assert torch.allclose(losses(LOGITS, one_hot, smoothing=0.1), expected, rtol=16 * EPS)


def test_ignored_targets_count_neither_in_the_sum_nor_in_the_mean() -> None:
    target = TARGET.clone()
    target[:, 3:] = IGNORED
    real = torch.full((2,), 3.0, dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        expected = losses(LOGITS[:, :3], TARGET[:, :3], smoothing=smoothing)
        assert torch.allclose(losses(LOGITS, target, real, smoothing), expected, rtol=16 * EPS)


def gradients(seeds: list[int], clip: float | None) -> list[torch.Tensor]:
    """Gradients of every network by seed, each network on the same batch."""
    model = build(ModelConfig(channels=4), seeds)
    x = torch.randn(6, 1, 40, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1.0, 10.0])[: len(seeds)]  # networks with gradients of unlike size
    loss = losses(model(x.repeat(1, len(seeds), 1)), torch.arange(6).expand(len(seeds), -1))
    (loss * scale).sum().backward()
    if clip is not None:
        clip_gradients(model, len(seeds), clip)
    parts = [p.grad.unflatten(0, (len(seeds), -1)) for p in model.parameters() if p.grad is not None]
    return [torch.cat([part[i].flatten() for part in parts]) for i in range(len(seeds))]


def test_clipping_is_torchs_for_every_network_of_a_stack() -> None:
    plain = gradients([0, 1], None)
    limit = float(plain[0].norm()) * 1.5  # above the first network's norm, below the second's
    assert plain[1].norm() > limit
    first, second = gradients([0, 1], limit)
    assert torch.equal(first, plain[0])
    parameter = nn.Parameter(torch.zeros_like(plain[1]))
    parameter.grad = plain[1].clone()
    nn.utils.clip_grad_norm_([parameter], limit)
    assert torch.allclose(second, parameter.grad, rtol=16 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("name", ["adamw", "rv_adamw"])
@pytest.mark.parametrize("exclude_head", [False, True])
def test_excluded_parameters_neither_decay_nor_rotate(name: str, exclude_head: bool) -> None:
    model = build(ModelConfig(name="gpt", d_model=8, n_head=2, n_layer=1, tied=False), [0])
    config = OptimizerConfig(name=name, weight_decay=0.5, exclude=["token", "position"], exclude_head=exclude_head)
    groups = build_optimizer(config, model).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named) == sum(len(group["params"]) for group in groups)
    for key in ("token.weight", "position.weight", "norm.weight"):
        assert of[id(named[key])]["weight_decay"] == 0 and not of[id(named[key])].get("rotational")
    for key in ("blocks.0.qkv.weight", "head.weight"):
        assert of[id(named[key])]["weight_decay"] == 0.5
    if name == "rv_adamw":
        assert of[id(named["blocks.0.qkv.weight"])]["rotational"]
        assert of[id(named["head.weight"])]["rotational"] is not exclude_head


def test_an_excluded_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude='tokens': matches no parameter"):
        build_optimizer(OptimizerConfig(exclude=["tokens"]), build(ModelConfig(), [0]))


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_schedule_ends_at_its_floor(name: str) -> None:
    plain, raised = ([lr_factor(s, 1000, name, 0.1, 2.0, floor) for s in range(1000)] for floor in (0.0, 0.25))
    assert raised[:100] == plain[:100]  # the warm-up
    assert raised[100] == 1 and raised[-1] == pytest.approx(0.25, abs=1e-5)
    assert raised[400] == pytest.approx(0.25 + 0.75 * plain[400])
