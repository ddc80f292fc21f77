"""The schema of one trial: every key that `python -m clustered_pfl.train` accepts, its type and its range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.config import CommonConfig, check, register
from common.data.config import DataConfig

METHODS = (
    "federated_clustering",
    "momentum_clustering",
    "local",
    "global",
    "ground_truth",
    "ifca",
    "hypcluster",
    "ditto",
    "knn_per",
)
ATTACKS = ("none", "large_gradient", "bit_flip", "inside_radius", "non_finite", "label_flip")
RULES = ("mean", "krum", "multi_krum", "median", "trimmed_mean", "geometric_median")
STARTS = ("random", "oracle", "official", "equal", "shared", "crowded")
DTYPES = ("float32", "float64")


@dataclass
class RadiusConfig:
    """How Threshold-Clustering chooses its radius (tau)."""

    rule: str = "quantile"
    """`quantile` of the distances, `fixed`, or `two_means` (the official code's "cd" rule)."""
    quantile: float = 0.2
    """q; the radius is the distance of rank floor(q N)."""
    strict: bool = False
    """A point at the radius itself is outside (the official code's synthetic experiments)."""
    factor: float = 1.0
    """Factor on the quantile's distance (the official code's MNIST experiments: 0.99)."""
    tau: float = 1.0
    """The radius of rule `fixed`."""

    def __post_init__(self) -> None:
        rules = ("quantile", "fixed", "two_means")
        check("method.radius.rule", self.rule, self.rule in rules, f"one of {', '.join(rules)}")
        check("method.radius.quantile", self.quantile, 0 <= self.quantile < 1, "in [0, 1)")
        check("method.radius.factor", self.factor, self.factor > 0, "> 0")
        check("method.radius.tau", self.tau, self.tau >= 0, ">= 0")


@dataclass
class MethodConfig:
    """Which federated algorithm and its hyper-parameters, the paper's symbols in brackets."""

    name: str = "federated_clustering"
    """One of `METHODS`."""
    lr: float = 0.1
    """Learning rate (eta)."""
    momentum: float = 0.9
    """Momentum (beta); momentum_clustering has `alpha` instead."""
    momentum_style: str = "heavy_ball"
    """`heavy_ball`: m <- beta m + v; `ema`: m <- beta m + (1 - beta) v."""
    radius: RadiusConfig = field(default_factory=RadiusConfig)
    """Rule for the radius of Threshold-Clustering."""
    rounds: int = 5
    """Threshold-Clustering rounds a step (M)."""
    groups: int = 1
    """Random groups that cluster separately (G)."""
    local_steps: int = 1
    """Steps of which the last one clusters (federated_clustering) or averages (ifca model, hypcluster) (s)."""
    memory_mb: float = 8.0
    """Answers that federated_clustering holds at once, in 10^6 bytes; a small cache's worth on a CPU."""
    alpha: float = 0.1
    """Weight of the new gradient in the clients' momentum (momentum_clustering)."""
    centers: int | None = None
    """Centres that momentum_clustering keeps (K); null: one start a client."""
    models: int | None = None
    """Models of ifca and hypcluster; null: the true number of clusters."""
    variant: str = "gradient"
    """IFCA by `gradient` or `model` averaging."""
    start: str = "random"
    """First models of ifca and hypcluster: `random`; `oracle`: the true clusters' own starts; `official`: as the
    official synthetic code indexes them; `equal`: K copies of one; `shared`: one object under K names, as its
    CIFAR code has them; `crowded`: one amid the clusters, the others far away."""
    pull: float = 1.0
    """Strength of the pull towards the global model (Ditto's lambda)."""
    neighbours: int = 10
    """Nearest neighbours (kNN-Per's k)."""
    mixtures: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    """Weights of the neighbours that each client chooses from on held-out data (kNN-Per's lambda)."""
    aggregate: str = "mean"
    """How `global` combines messages: `mean`, or a robust rule of byzfl: `krum`, `multi_krum`, `median`,
    `trimmed_mean`, `geometric_median`."""

    def __post_init__(self) -> None:
        check("method.name", self.name, self.name in METHODS, f"one of {', '.join(METHODS)}")
        check("method.lr", self.lr, self.lr > 0, "> 0")
        check("method.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        styles = ("heavy_ball", "ema")
        check(
            "method.momentum_style", self.momentum_style, self.momentum_style in styles, f"one of {', '.join(styles)}"
        )
        for key in ("groups", "local_steps", "neighbours"):
            check(f"method.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("method.rounds", self.rounds, self.rounds >= 0, ">= 0")
        check("method.memory_mb", self.memory_mb, self.memory_mb > 0, "> 0")
        check("method.alpha", self.alpha, 0 < self.alpha <= 1, "in (0, 1]")
        for key in ("centers", "models"):
            value = getattr(self, key)
            check(f"method.{key}", value, value is None or value >= 1, ">= 1, or null")
        check("method.variant", self.variant, self.variant in ("gradient", "model"), "gradient or model")
        check("method.start", self.start, self.start in STARTS, f"one of {', '.join(STARTS)}")
        check("method.pull", self.pull, self.pull >= 0, ">= 0")
        inside = bool(self.mixtures) and all(0 <= value <= 1 for value in self.mixtures)
        check("method.mixtures", self.mixtures, inside, "a list of numbers in [0, 1]")
        check("method.aggregate", self.aggregate, self.aggregate in RULES, f"one of {', '.join(RULES)}")


@dataclass
class AttackConfig:
    """Byzantine clients beside the honest ones."""

    name: str = "none"
    """`none`, or what they send: `large_gradient`, `bit_flip`, `inside_radius`, `non_finite`; or how they poison their
    data: `label_flip`."""
    clients: int = 0
    """Number of Byzantine clients (b)."""

    def __post_init__(self) -> None:
        check("attack.name", self.name, self.name in ATTACKS, f"one of {', '.join(ATTACKS)}")
        check("attack.clients", self.clients, self.clients >= 0, ">= 0")
        acts = (self.name == "none") == (self.clients == 0)
        check("attack.clients", self.clients, acts, "0 exactly when attack.name=none")


@dataclass
class PartitionConfig:
    """How the training rows are dealt among the clients."""

    kind: str = "private_label"
    """`rotation`: clusters see turned images; `private_label`: shifted labels; `label_groups`: different classes."""
    n_clients: int = 40
    """Honest clients (N)."""
    n_clusters: int = 4
    """True clusters (K)."""
    samples: int | None = None
    """Training rows of a client; null deals all of them equally."""
    cluster_sizes: list[int] | None = None
    """Clients of each cluster where they differ; null: equal."""

    def __post_init__(self) -> None:
        kinds = ("rotation", "private_label", "label_groups")
        check("partition.kind", self.kind, self.kind in kinds, f"one of {', '.join(kinds)}")
        check("partition.n_clients", self.n_clients, self.n_clients >= 1, ">= 1")
        fits = 1 <= self.n_clusters <= self.n_clients
        check("partition.n_clusters", self.n_clusters, fits, f"in [1, partition.n_clients={self.n_clients}]")
        check("partition.samples", self.samples, self.samples is None or self.samples >= 1, ">= 1, or null")
        sizes = self.cluster_sizes
        right = sizes is None or (len(sizes) == self.n_clusters and min(sizes) >= 1 and sum(sizes) == self.n_clients)
        allowed = f"partition.n_clusters numbers >= 1 that sum to partition.n_clients={self.n_clients}, or null"
        check("partition.cluster_sizes", sizes, right, allowed)


@dataclass
class ModelConfig:
    """A client's network."""

    name: str = "mlp"
    """`mlp`, `vgg16` or `vgg8`."""
    hidden: list[int] = field(default_factory=lambda: [32])
    """Widths of the hidden layers (mlp)."""
    dropout: float = 0.0
    """Dropout probability before the hidden layers of the head (vgg)."""
    expected_parameters: int | None = None
    """Known number of parameters, checked when the network is built; null: not established."""

    def __post_init__(self) -> None:
        names = ("mlp", "vgg16", "vgg8")
        check("model.name", self.name, self.name in names, f"one of {', '.join(names)}")
        check("model.hidden", self.hidden, all(width >= 1 for width in self.hidden), "a list of integers >= 1")
        check("model.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        known = self.expected_parameters is None or self.expected_parameters > 0
        check("model.expected_parameters", self.expected_parameters, known, "> 0, or null")


@dataclass
class ImagesConfig:
    """Train clients on images that are dealt among them, and test each under its own view of the data."""

    name: str = "images"
    steps: int = 150
    """Gradient steps of every client."""
    batch_size: int = 16
    """Rows of a client's batch; at least a client's rows means full batches."""
    loss: str = "cross_entropy"
    """`cross_entropy`, or `neg_prob`: minus the probability of the label, what the official MNIST code minimises."""
    redraw: bool = False
    """Deal the rows anew every epoch, as the official code does, so that a client sees the whole training set."""
    augment: bool = False
    """Random mirror and shift by up to 4 pixels of training images."""
    repeat_noise: bool = False
    """The same augmentation and dropout draws in every step, as in the official code."""
    own_test_share: bool = False
    """Client i is tested on the rows i, i + N, ... only; false: on the whole split under its view."""
    evaluate: str = "test"
    """The split of the record's metrics: `validation` for tuning, `test` for judging."""
    log_every: int = 10
    """Steps between history rows (loss and accuracy on the validation split)."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "log_every"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        losses = ("cross_entropy", "neg_prob")
        check("task.loss", self.loss, self.loss in losses, f"one of {', '.join(losses)}")
        splits = ("validation", "test")
        check("task.evaluate", self.evaluate, self.evaluate in splits, f"one of {', '.join(splits)}")


@dataclass
class RegressionConfig:
    """The paper's synthetic problem: over-parameterised linear regression in clusters."""

    name: str = "regression"
    clusters: int = 4
    """K."""
    clients: int = 4
    """Clients of a cluster (n_i)."""
    samples: int = 9
    """Samples of a client (n)."""
    dim: int = 10
    """Coordinates (d)."""
    scale: float = 100.0
    """Optima are drawn from {0, scale}^d (R)."""
    start_std: float = 0.1
    """Clients start at their cluster's optimum plus this much Gaussian noise a coordinate."""
    steps: int = 800
    """Full-gradient steps of every client."""
    dtype: str = "float64"
    """Arithmetic: `float64`, or `float32` as in the paper's figure."""
    assumptions: bool = False
    """Measure the intra- and inter-cluster gradient distances at client 0's model in every epoch."""
    log_every: int = 10
    """Steps between history rows."""

    def __post_init__(self) -> None:
        for key in ("clusters", "clients", "samples", "dim", "steps", "log_every"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.scale", self.scale, self.scale > 0, "> 0")
        check("task.start_std", self.start_std, self.start_std >= 0, ">= 0")
        check("task.dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")


@dataclass
class QuadraticsConfig:
    """Clients with losses |x - theta_k|^2 / 2 and noisy gradients, where optima and rates are known in closed form."""

    name: str = "quadratics"
    clusters: int = 4
    """K."""
    clients: int = 4
    """Clients of a cluster (n_i)."""
    dim: int = 10
    """Coordinates."""
    separation: float = 10.0
    """Distance between any two optima (Delta)."""
    noise: float = 1.0
    """Root mean squared norm of the gradient noise (sigma)."""
    start_std: float = 10.0
    """Standard deviation a coordinate of random starts around the optima's centre."""
    steps: int = 400
    """Stochastic gradient steps of every client."""
    burn_in: float = 0.5
    """Fraction of the steps before errors are averaged."""

    def __post_init__(self) -> None:
        for key in ("clusters", "clients", "dim", "steps"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.dim", self.dim, self.dim >= self.clusters, f">= task.clusters={self.clusters}")
        check("task.separation", self.separation, self.separation > 0, "> 0")
        check("task.noise", self.noise, self.noise >= 0, ">= 0")
        check("task.start_std", self.start_std, self.start_std >= 0, ">= 0")
        check("task.burn_in", self.burn_in, 0 <= self.burn_in < 1, "in [0, 1)")


@dataclass
class BlobsConfig:
    """Threshold-Clustering on Gaussian blobs, round by round (the paper's last figure)."""

    name: str = "blobs"
    points: int = 90
    """Points in all."""
    centers: int = 10
    """Blobs."""
    dim: int = 10
    """Coordinates."""
    std: float = 1.0
    """Standard deviation of a blob a coordinate (sigma)."""
    starts: int = 10
    """Random starts a blob, points of it."""

    def __post_init__(self) -> None:
        for key in ("points", "centers", "dim", "starts"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.points", self.points, self.points >= self.centers, f">= task.centers={self.centers}")
        check("task.std", self.std, self.std > 0, "> 0")


@dataclass
class EstimationConfig:
    """Monte Carlo of the estimator's error: two clusters, the radius of the theory, perhaps attackers."""

    name: str = "estimation"
    members: list[int] = field(default_factory=lambda: [16])
    """Points of each of the two clusters (n_i), one set-up each."""
    separation: list[float] = field(default_factory=lambda: [100.0])
    """Distance of the cluster means (Delta), one set-up each."""
    byzantine: list[float] = field(default_factory=lambda: [0.0])
    """Share of Byzantine points among all points (beta), one set-up each."""
    distance: list[float] = field(default_factory=lambda: [0.7])
    """How far attackers lie from the mean, in radii, one set-up each."""
    dim: int = 10
    """Coordinates."""
    noise: float = 1.0
    """Root mean squared distance of a point from its cluster's mean (sigma)."""
    rounds: int = 60
    """Threshold-Clustering rounds (M)."""
    draws: int = 400
    """Independent data sets a seed."""

    def __post_init__(self) -> None:
        for key in ("dim", "draws"):
            check(f"task.{key}", getattr(self, key), getattr(self, key) >= 1, ">= 1")
        check("task.rounds", self.rounds, self.rounds >= 0, ">= 0")
        check("task.noise", self.noise, self.noise > 0, "> 0")
        check("task.members", self.members, bool(self.members) and min(self.members) >= 1, "a list of integers >= 1")
        for key in ("separation", "distance"):
            values = getattr(self, key)
            check(f"task.{key}", values, bool(values) and min(values) > 0, "a list of numbers > 0")
        inside = bool(self.byzantine) and all(0 <= share < 0.5 for share in self.byzantine)
        check("task.byzantine", self.byzantine, inside, "a list of numbers in [0, 0.5)")


@dataclass
class TrialConfig(CommonConfig):
    """One trial: a task, a method, attackers, data with its partition and a network, and its seeds."""

    max_steps: int | None = None
    """Cut the trial to this many training steps or Monte Carlo draws, to try it out; null: as long as the task says."""
    task: Any = field(default_factory=ImagesConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.max_steps
        check("max_steps", limit, limit is None or limit >= 1, ">= 1, or null")
        for key in ("steps", "draws"):
            if limit is not None and hasattr(self.task, key):
                setattr(self.task, key, min(limit, getattr(self.task, key)))
        # gradients of all clients come from torch.func, without autocast
        check("precision", self.precision, self.precision == "fp32", "fp32")


register("clustered_pfl_schema", TrialConfig)
for _name, _schema in (
    ("images", ImagesConfig),
    ("regression", RegressionConfig),
    ("quadratics", QuadraticsConfig),
    ("blobs", BlobsConfig),
    ("estimation", EstimationConfig),
):
    register(f"{_name}_schema", _schema, group="task")
register("method_schema", MethodConfig, group="method")
register("attack_schema", AttackConfig, group="attack")
register("partition_schema", PartitionConfig, group="partition")
register("model_schema", ModelConfig, group="model")
