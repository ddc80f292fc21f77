"""From a trial's config to the federation that trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from clustered_pfl.attacks import ATTACKS
from clustered_pfl.baselines import IFCA, Ditto, Global, GroundTruth, HypCluster, KNNPer, Local
from clustered_pfl.clustering import FederatedClustering, MomentumClustering
from clustered_pfl.federation import Federation, Loss, Params
from clustered_pfl.radius import Fixed, Quantile, Radius, TwoMeans

if TYPE_CHECKING:
    from clustered_pfl.config import MethodConfig, RadiusConfig, TrialConfig

CLUSTERED = ("ifca", "hypcluster")
"""Methods that start from K models instead of one model a client."""


def radius(config: RadiusConfig) -> Radius:
    """The rule that the config names."""
    if config.rule == "quantile":
        return Quantile(config.quantile, config.strict, config.factor)
    return Fixed(config.tau, config.strict) if config.rule == "fixed" else TwoMeans(config.strict)


def build(config: TrialConfig, loss: Loss, starts: Params, clusters: Tensor, seeds: list[int]) -> Federation:
    """The federation of `config.method` under `config.attack`, one replica a seed.

    Args:
        config: the trial's.
        loss: of one model on one batch.
        starts: (R, N, ...) first models of the clients, or (R, K, ...) of `CLUSTERED` methods.
        clusters: (N,) true clusters, read by ground_truth alone.
        seeds: R of them, for groups and attacks.
    """
    c: MethodConfig = config.method
    shared = {"lr": c.lr, "replicas": True, "seed": seeds}
    momentum = {"momentum": c.momentum, "momentum_style": c.momentum_style}
    attack = {"n_byzantine": config.attack.clients, "attack": ATTACKS.get(config.attack.name)}
    clustering = {"radius": radius(c.radius), "rounds": c.rounds}
    if config.attack.clients and c.name not in ("federated_clustering", "momentum_clustering", "global"):
        raise ValueError(f"attack.name={config.attack.name}: must be none for method.name={c.name}")
    match c.name:
        case "federated_clustering":
            how = {"groups": c.groups, "local_steps": c.local_steps, "memory_mb": c.memory_mb}
            return FederatedClustering(loss, starts, **shared, **momentum, **clustering, **attack, **how)  # type: ignore[arg-type]
        case "momentum_clustering":
            how = {"alpha": c.alpha, "clusters": c.centers}  # type: ignore[dict-item]
            return MomentumClustering(loss, starts, **shared, **clustering, **attack, **how)  # type: ignore[arg-type]
        case "local":
            return Local(loss, starts, **shared, **momentum)  # type: ignore[arg-type]
        case "global":
            rule = None
            if c.aggregate != "mean":
                from clustered_pfl.rivals import RULES

                rule = RULES[c.aggregate](config.attack.clients)
            return Global(loss, starts, aggregate=rule, **shared, **momentum, **attack)  # type: ignore[arg-type]
        case "ground_truth":
            return GroundTruth(loss, starts, clusters=clusters, **shared, **momentum)  # type: ignore[arg-type]
        case "ifca":
            return IFCA(loss, starts, variant=c.variant, local_steps=c.local_steps, **shared, **momentum)  # type: ignore[arg-type]
        case "hypcluster":
            return HypCluster(loss, starts, local_steps=c.local_steps, **shared, **momentum)  # type: ignore[arg-type]
        case "ditto":
            return Ditto(loss, starts, pull=c.pull, **shared, **momentum)  # type: ignore[arg-type]
        case _:
            return KNNPer(loss, starts, **shared, **momentum)  # type: ignore[arg-type]
