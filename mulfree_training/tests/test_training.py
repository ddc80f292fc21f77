"""The shared loop: schedule, shares of a batch, losses, optimizers, and what is asked of the network."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.data.pairs import IGNORED as PAIRS_IGNORED
from mulfree_training.config import ArithmeticConfig, OptimizerConfig
from mulfree_training.functional import pam_cross_entropy
from mulfree_training.networks.gpt import GPT
from mulfree_training.networks.translation import Translation
from mulfree_training.networks.vit import ViT
from mulfree_training.optim import PAMSGD, PAMAdamW
from mulfree_training.tasks.arithmetic import IGNORED, convert, loss_function, make_optimizer
from mulfree_training.tasks.evaluation import accuracy, nll, temperature
from mulfree_training.tasks.training import Batch, Losses, check_batch, epoch_order, lr_factor, own_rows

EPS = torch.finfo(torch.float32).eps
STANDARD, LOSS = ArithmeticConfig(), ArithmeticConfig(kind="pam", scope=["loss"])
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 4, 2, 2, 3])


def test_the_learning_rate_rises_linearly_and_falls_by_one_cosine() -> None:
    c = OptimizerConfig(warmup=10, start=0.1, final=0.02)
    factors = [lr_factor(step, 110, c) for step in range(110)]
    assert factors[0] == pytest.approx(0.19) and factors[9] == 1 == max(factors)
    assert factors[4] == pytest.approx(0.1 + 0.9 * 5 / 10)
    assert factors[59] == pytest.approx(0.51) and factors[109] == pytest.approx(0.02)  # half of the way, the end
    for step in range(10, 110):
        wanted = 0.02 + 0.98 * (1 + math.cos(math.pi * (step - 9) / 100)) / 2
        assert factors[step] == pytest.approx(wanted)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0, 1, 3, 50])
def test_short_runs_have_a_schedule_too(steps: int, warmup: int) -> None:
    factors = [lr_factor(step, steps, OptimizerConfig(warmup=warmup)) for step in range(steps)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[-1] == pytest.approx(0 if warmup < steps else 1)
    if 0 < warmup < steps:
        assert factors[warmup - 1] == 1


def test_parts_and_processes_partition_a_batch() -> None:
    batch = Batch((torch.arange(12), torch.arange(24).view(12, 2)), torch.arange(12), torch.tensor(9.0))
    seen = []
    for rank in range(2):
        for part in range(3):
            own = batch.rows(own_rows(SimpleNamespace(rank=rank, world=2), part, 3))  # type: ignore[arg-type]
            assert len(own.target) == 2 and torch.equal(own.inputs[0], own.target)
            assert torch.equal(own.inputs[1][:, 0], 2 * own.target) and own.real == 1.5
            seen += own.target.tolist()
    assert sorted(seen) == list(range(12))
    whole = batch.rows(own_rows(SimpleNamespace(rank=0, world=1), 0, 1))  # type: ignore[arg-type]
    assert torch.equal(whole.target, batch.target) and whole.real is batch.real
    assert Batch((torch.zeros(2),), torch.zeros(2)).rows(slice(0, None, 2)).real is None


@pytest.mark.parametrize(("size", "parts", "world"), [(6, 4, 1), (6, 1, 4), (8, 4, 4)])
def test_batches_that_do_not_split_evenly_are_refused(size: int, parts: int, world: int) -> None:
    run: Any = SimpleNamespace(world=world)
    message = f"task.batch_size={size}: must be a multiple of task.accumulate={parts} times {world} processes"
    with pytest.raises(ValueError, match=message):
        check_batch(size, "task.batch_size", parts, run)
    check_batch(parts * world, "task.batch_size", parts, run)


def test_orders_are_permutations_and_functions_of_seed_and_epoch() -> None:
    first = epoch_order(0, 0, 50)
    epoch_order.cache_clear()
    assert torch.equal(epoch_order(0, 0, 50), first) and first.sort().values.tolist() == list(range(50))
    assert not torch.equal(epoch_order(1, 0, 50), first) and not torch.equal(epoch_order(0, 1, 50), first)


def test_smoothing_is_torchs_or_fairseqs() -> None:
    lp = LOGITS.log_softmax(-1)
    own = -lp.gather(1, TARGET[:, None])[:, 0]
    torchs = loss_function(STANDARD, 0.1, "torch")(LOGITS, TARGET)
    assert torch.allclose(torchs, (0.9 * own - 0.1 * lp.mean(1)).mean(), rtol=8 * EPS)
    fairseqs = loss_function(STANDARD, 0.1, "fairseq")(LOGITS, TARGET)
    others = -lp.sum(1) - own
    assert torch.allclose(fairseqs, (0.9 * own + 0.1 / 4 * others).mean(), rtol=8 * EPS)
    assert not torch.allclose(torchs, fairseqs, rtol=1e-3)
    plain = loss_function(STANDARD, 0.0, "fairseq")(LOGITS, TARGET)
    assert torch.equal(plain, F.cross_entropy(LOGITS, TARGET))


@pytest.mark.parametrize("c", [STANDARD, LOSS], ids=["standard", "pam"])
@pytest.mark.parametrize("smoothing", ["torch", "fairseq"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_ignored_targets_count_neither_in_the_sum_nor_in_the_mean(
    c: ArithmeticConfig, smoothing: str, epsilon: float
) -> None:
    loss = loss_function(c, epsilon, smoothing)
    kept = loss(LOGITS[:4], TARGET[:4])
    target = TARGET.clone()
    target[4:] = IGNORED
    assert torch.allclose(loss(LOGITS, target), kept, rtol=16 * EPS)
    assert torch.equal(loss(LOGITS, target, torch.tensor(4.0)), loss(LOGITS, target))  # the number that counts
    shaped = loss(LOGITS.view(2, 3, 5), target.view(2, 3), torch.tensor(4.0))
    assert torch.equal(shaped, loss(LOGITS, target))
    # two parts of unlike length, each over half of the number of the whole
    half = torch.tensor(2.0)
    parts = (loss(LOGITS[:1], target[:1], half) + loss(LOGITS[1:], target[1:], half)) / 2
    # piecewise affine products are not distributive: up to a ninth of each of the parts
    assert torch.allclose(parts, kept, rtol=16 * EPS if c is STANDARD else 0.12)
    assert IGNORED == PAIRS_IGNORED


def test_the_piecewise_affine_loss_is_the_functions() -> None:
    c = ArithmeticConfig(kind="pam", scope=["loss"], derivative="exact", loss_derivative="approx", alpha=1.05)
    found, expected = (LOGITS.clone().requires_grad_() for _ in range(2))
    loss = loss_function(c, 0.1, "fairseq")(found, TARGET)
    wanted = pam_cross_entropy(expected, TARGET, label_smoothing=0.1, derivative="approx", alpha=1.05)
    loss.backward()
    wanted.backward()
    assert torch.equal(loss, wanted) and torch.equal(found.grad, expected.grad)
    exact = pam_cross_entropy(LOGITS.clone().requires_grad_(), TARGET, label_smoothing=0.1, derivative="exact")
    assert not torch.equal(exact, loss)


def test_probabilities_are_targets_of_the_standard_loss_alone() -> None:
    one_hot = F.one_hot(TARGET, 5).float()
    for epsilon in (0.0, 0.1):
        loss = loss_function(STANDARD, epsilon, "torch")
        assert torch.allclose(loss(LOGITS, one_hot), loss(LOGITS, TARGET), rtol=8 * EPS)
    mixed = 0.5 * one_hot + 0.5 * one_hot.flip(0)
    loss = loss_function(STANDARD, 0.0, "torch")
    assert torch.allclose(loss(LOGITS, mixed), (loss(LOGITS, TARGET) + loss(LOGITS, TARGET.flip(0))) / 2, rtol=8 * EPS)
    with pytest.raises(TypeError, match=r"target of dtype torch.float32: must be int64"):
        loss_function(LOSS, 0.0, "torch")(LOGITS, mixed)


def test_models_side_by_side_have_losses_of_their_own() -> None:
    models: list[nn.Module] = [nn.Linear(4, 5), nn.Linear(4, 5)]
    x = torch.randn(2, 6, 4)
    batches = [Batch((x[i],), TARGET, torch.tensor(float(6 - i))) for i in range(2)]
    losses = Losses(models, loss_function(STANDARD, 0.0, "torch"))(batches)
    expected = [F.cross_entropy(models[i](x[i]), TARGET, reduction="sum") / (6 - i) for i in range(2)]
    assert torch.equal(losses, torch.stack(expected))


@pytest.mark.parametrize(("decay_all", "decayed"), [(True, 4), (False, 2)])
def test_vectors_decay_where_wanted(decay_all: bool, decayed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[1].bias.requires_grad_(False)
    decayed -= decay_all
    optimizer = make_optimizer(model, OptimizerConfig(decay_all=decay_all, weight_decay=0.3), STANDARD)
    found = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert found == ({0.3: 3} if decay_all else {0.3: 2, 0.0: 1}) and found[0.3] == decayed


def test_class_token_and_positions_of_the_vit_decay_with_the_vectors() -> None:
    for network in (ViT(d_model=8, n_layer=1, n_head=2, d_hidden=8), GPT(d_model=8, n_layer=1, n_head=2, d_hidden=8)):
        names = {p: name for name, p in network.named_parameters()}
        for decay_all in (True, False):
            optimizer = make_optimizer(network, OptimizerConfig(decay_all=decay_all, weight_decay=0.3), STANDARD)
            free = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
            vectors = {name for p, name in names.items() if p.dim() <= 1}
            own = {"class_token", "position"} if isinstance(network, ViT) else set()
            assert own <= set(names.values()) and free == (set() if decay_all else vectors | own)
            assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_the_optimizer_is_piecewise_affine_within_its_scope() -> None:
    model = nn.Linear(3, 2)
    own = ArithmeticConfig(kind="pam", scope=["optimizer"], host_scalars="pam")
    sgd, adamw = OptimizerConfig(name="sgd", beta1=0.8), OptimizerConfig(beta1=0.8, beta2=0.7, eps=0.1)
    kinds = {type(make_optimizer(model, c, a)) for c in (sgd, adamw) for a in (STANDARD, LOSS)}
    assert kinds == {torch.optim.SGD, torch.optim.AdamW}
    first, second = make_optimizer(model, sgd, own), make_optimizer(model, adamw, own)
    assert type(first) is PAMSGD and first.param_groups[0]["momentum"] == 0.8
    assert type(second) is PAMAdamW and second.param_groups[0]["betas"] == (0.8, 0.7)
    assert second.param_groups[0]["eps"] == 0.1


@pytest.mark.parametrize("scope", [["matmul"], ["matmul", "softmax"]])
def test_the_scale_of_embeddings_is_of_the_softmax_row(scope: list[str]) -> None:
    from mulfree_training.primitives import pam_mul

    model = convert(Translation(d_model=12, n_head=2), ArithmeticConfig(kind="pam", scope=scope, alpha=1.05))
    x = torch.randn(5)
    factor = math.sqrt(12)
    wanted = pam_mul(x, factor, alpha=1.05) if "softmax" in scope else x * factor
    assert torch.equal(model.scale(x), wanted)
    assert not torch.equal(pam_mul(x, factor), x * factor)


def test_a_temperature_is_refitted() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(4000, 4, generator=generator)
    labels = truth.softmax(-1).multinomial(1, generator=generator)[:, 0]
    heat = temperature(truth * 3, labels)  # thrice too sure
    assert heat == pytest.approx(3, rel=0.1) and nll(truth * 3, labels, heat) < nll(truth * 3, labels)
    assert nll(truth * 3, labels, 3.0) == pytest.approx(nll(truth, labels))
    assert temperature(torch.full((4, 2), math.nan), torch.zeros(4).long()) == 1.0
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 75
