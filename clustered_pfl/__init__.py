"""Provably Personalized and Robust Federated Learning (Werner, He, Jordan, Jaggi, Karimireddy; TMLR 2023).

`threshold_clustering` estimates the mean of one cluster of vectors, robust to other clusters and to Byzantine points;
`FederatedClustering` and `MomentumClustering` train one model a client with it. `baselines`, `attacks`, `diagnostics`
and `partition` complete a simulation; `clustered_pfl.flower` puts it into a Flower app.
"""

from clustered_pfl import attacks, baselines, diagnostics
from clustered_pfl.clustering import FederatedClustering, MomentumClustering, Round
from clustered_pfl.federation import module_loss, stack
from clustered_pfl.radius import Fixed, Quantile, TwoMeans
from clustered_pfl.threshold import Clustering, threshold_clustering
from common.data import partition

__all__ = [
    "Clustering",
    "FederatedClustering",
    "Fixed",
    "MomentumClustering",
    "Quantile",
    "Round",
    "TwoMeans",
    "attacks",
    "baselines",
    "diagnostics",
    "module_loss",
    "partition",
    "stack",
    "threshold_clustering",
]
