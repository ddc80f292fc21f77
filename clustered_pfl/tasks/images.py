"""Federated image classification: MNIST, CIFAR and the digits, dealt among clients with their own views (C3 to C6)."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from clustered_pfl import diagnostics
from clustered_pfl.baselines import IFCA, KNNPer
from clustered_pfl.clustering import Round
from clustered_pfl.federation import Federation, Params, module_loss, stack
from clustered_pfl.models import build as build_network
from clustered_pfl.models import count_parameters, neg_prob
from clustered_pfl.tasks.clients import Clients, read
from clustered_pfl.tasks.methods import CLUSTERED, build
from common.checkpoint import load_checkpoint, load_extra, save_checkpoint
from common.streams import key
from common.training import setup

if TYPE_CHECKING:
    from clustered_pfl.config import TrialConfig
    from common.trials import Trial

WEIGHTS, DROPOUT = 10, 11  # random streams
CHECKPOINT_SECONDS = 120.0
EVAL_SAMPLES = 20_000  # forward passes at once in evaluation
HELD_OUT = 0.2  # of each client's rows, for kNN-Per to choose its mixture


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: of the evaluated split, `<split>_accuracy` and `<split>_loss` (nats; mean over clients,
        weighted by their test rows) and `<split>_worst` (accuracy of the worst client); of the last clustering,
        `clustering_precision`, `_recall` and `_tau` (means over clients); of IFCA and HypCluster, `clustering_occupied`
        (models with clients) and `_exact` (1 when the clusters are the true ones); `label_counts` of the first seed's
        partition, (N, classes).
        In the history: accuracy and loss on the validation split.
    """
    run_ = setup(config.threads, config.device, config.precision, seed=config.seed)
    task, seeds = config.task, trial.seeds
    clients = Clients(config, read(config, run_.device), seeds)
    network = network_of(config, clients.views.shape[2:])
    loss = module_loss(network, F.cross_entropy if task.loss == "cross_entropy" else neg_prob)
    federation = build(config, loss, starts(config, clients, seeds), clients.clusters, seeds)
    kept = 1 - HELD_OUT if isinstance(federation, KNNPer) else 1.0
    evaluate = Evaluation(config, clients, network)
    plain = nn.Module()  # the checkpoint's model; a federation keeps its own state
    first = load_checkpoint(trial.folder, plain) or 0
    if first:
        federation.load_state_dict(load_extra(trial.folder))
    report, saved = None, time.monotonic()
    for step in range(first, task.steps):
        torch.manual_seed(key(config.seed, DROPOUT, 0 if task.repeat_noise else step))
        report = federation.step(clients.batch(step, kept))
        done = step + 1
        if done % task.log_every and done < task.steps:
            continue
        found = {f"clustering/{k}": v for k, v in watch(federation, report, clients.clusters).items()}
        if "validation" in clients.splits:
            found |= {f"validation/{k}": v for k, v in evaluate(federation, "validation").items() if k != "worst"}
        trial.log(found, step=done)
        trial.progress(done, task.steps)
        if done < task.steps and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(trial.folder, plain, step=done, extra=federation.state_dict())
            saved = time.monotonic()
    metrics = {f"{task.evaluate}_{k}": v for k, v in evaluate(federation, task.evaluate).items()}
    metrics |= {f"clustering_{k}": v for k, v in watch(federation, report, clients.clusters).items()}
    rows = [{"seed": seed} | {k: v[i].item() for k, v in metrics.items()} for i, seed in enumerate(seeds)]
    counts = clients.label_counts
    return [row | {"diverged": not math.isfinite(row[f"{task.evaluate}_loss"]), "label_counts": counts} for row in rows]


def network_of(config: TrialConfig, shape: torch.Size, seed: int = 0) -> nn.Module:
    """The clients' network for images of `shape` (C, H, W).

    Raises:
        ValueError: it has not `model.expected_parameters` parameters.
    """
    c = config.model
    network = build_network(c.name, shape, config.data.classes, hidden=c.hidden, dropout=c.dropout, seed=seed)
    count = count_parameters(network)
    if c.expected_parameters not in (None, count):
        raise ValueError(f"model.expected_parameters={c.expected_parameters}: this network has {count} parameters")
    return network


def starts(config: TrialConfig, clients: Clients, seeds: list[int]) -> Params:
    """First models: one for all clients of a seed (R, N, ...), or K different ones (R, K, ...) for IFCA and HypCluster.

    Raises:
        ValueError: a start that images do not have.
    """
    c, shape = config.method, clients.views.shape[2:]
    count, unlike = len(clients.clusters), 1
    if c.name in CLUSTERED:
        if c.start not in ("random", "equal", "shared"):
            raise ValueError(f"method.start={c.start}: must be random, equal or shared for images")
        count = 1 if c.start == "shared" else c.models or config.partition.n_clusters
        unlike = count if c.start == "random" else 1
    first = []
    for seed in seeds:
        networks = [network_of(config, shape, key(seed, WEIGHTS, k)) for k in range(unlike)]
        first.append(stack(networks) if unlike > 1 else stack(networks[0], count))
    return {name: torch.stack([params[name] for params in first]).to(clients.device) for name in first[0]}


def watch(federation: Federation, report: Any, clusters: Tensor) -> dict[str, Tensor]:
    """What the last step's clustering looks like, (R,) each; empty for methods that do not cluster."""
    if isinstance(report, Round) and report.members is not None and report.radii is not None:
        precision, recall = diagnostics.precision_recall(report.members, clusters)
        return {"precision": precision.mean(-1), "recall": recall.mean(-1), "tau": report.radii[-1].mean(-1)}
    if isinstance(federation, IFCA):
        chosen = federation.assignment()
        same = chosen[:, :, None] == chosen[:, None, :]
        exact = (same == (clusters[:, None] == clusters)).all(-1).all(-1)
        used = F.one_hot(chosen, federation.models.shape[1]).any(1).sum(-1)
        return {"occupied": used.double(), "exact": exact.double()}
    return {}


class Evaluation:
    """Accuracy and loss of every client's model under the client's own view."""

    def __init__(self, config: TrialConfig, clients: Clients, network: nn.Module) -> None:
        self.config, self.clients = config, clients
        self.network = network.eval() if config.model.dropout == 0 else network
        self.forward = vmap(lambda params, x: functional_call(self.network, params, (x,)))
        self.rows = {split: clients.test_rows(split) for split in clients.splits if split != "train"}

    @torch.no_grad()
    def __call__(self, federation: Federation, split: str) -> dict[str, Tensor]:
        """Mean `accuracy` and `loss` over clients, weighted by their rows, and accuracy of the `worst`; (R,) each."""
        training = self.network.training
        self.network.eval()
        flat = federation.client_models()  # (R, N, D)
        replicas, n = flat.shape[:2]
        hits, losses, counts = flat.new_zeros(3, replicas, n, dtype=torch.float64)
        rows = self.rows[split]
        size = max(1, EVAL_SAMPLES // (replicas * rows.shape[1]))
        for begin in range(0, n, size):
            part = slice(begin, min(begin + size, n))
            x, y = self.clients.tested(split, rows[part], part)  # (c, t, C, H, W), (c, t)
            log_p = self._log_probabilities(federation, flat[:, part], x, part)  # (R, c, t, classes)
            real = y >= 0
            own = log_p.gather(-1, y.clamp_min(0).expand(replicas, -1, -1)[..., None])[..., 0]
            losses[:, part] = -(own.double() * real).sum(-1)
            hits[:, part] = ((log_p.argmax(-1) == y) & real).double().sum(-1)
            counts[:, part] = real.double().sum(-1)
        self.network.train(training)
        total = counts.sum(-1)
        worst = torch.where(counts > 0, hits / counts, 1.0).amin(-1)  # a client may have no test rows
        return {"accuracy": hits.sum(-1) / total, "loss": losses.sum(-1) / total, "worst": worst}

    def _log_probabilities(self, federation: Federation, flat: Tensor, x: Tensor, part: slice) -> Tensor:
        """(R, c, t, classes)."""
        logits = self._logits(federation, flat, x.expand(len(flat), *x.shape))
        if not isinstance(federation, KNNPer):
            return logits.log_softmax(-1)
        c, rows = self.config.method, self.clients.rows[:, part]  # (R, c, n)
        kept = round((1 - HELD_OUT) * rows.shape[-1])
        memory, labels = self.clients.seen(rows, part)
        features = self._logits(federation, flat, memory)  # (R, c, n, classes): the network's output, as in the code
        stored, held = features[..., :kept, :], features[..., kept:, :]
        k = min(c.neighbours, kept)
        scores = []
        for mix in c.mixtures:
            weight = torch.full(rows.shape[:2], mix, device=flat.device)
            p = federation.predict(held, stored, labels[..., :kept], held, weight, neighbours=k)
            scores.append((p.argmax(-1) == labels[..., kept:]).double().mean(-1))
        best = torch.tensor(c.mixtures, device=flat.device)[torch.stack(scores).argmax(0)]  # (R, c)
        mixed = federation.predict(logits, stored, labels[..., :kept], logits, best, neighbours=k)
        return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()

    def _logits(self, federation: Federation, flat: Tensor, x: Tensor) -> Tensor:
        """Outputs of models (R, c, D) on inputs (R, c, t, ...): (R, c, t, classes)."""
        params = federation.layout.unflatten(flat.flatten(0, 1))
        return self.forward(params, x.flatten(0, 1)).unflatten(0, flat.shape[:2])
