"""How arms are called in figures and tables."""

ARM_NAMES = {
    "fc": "FC",
    "fc_5": "FC, 5 attackers",
    "fc_2": "FC, 2 attackers",
    "mc": "MC",
    "ground_truth": "ground truth",
    "local": "Local",
    "global": "Global",
    "ifca": "IFCA",
    "ifca_gradient": "IFCA, gradient",
    "ifca_official": "IFCA, official indexing",
    "ifca_shared": "IFCA, one object",
    "ifca_equal": "IFCA, equal starts",
    "hypcluster": "HypCluster",
    "ditto": "Ditto",
    "knn_per": "kNN-Per",
    "fc_neg_prob": "FC, −p loss",
    "local_neg_prob": "Local, −p loss",
    "ground_truth_neg_prob": "truth, −p loss",
    "local_redraw": "Local, redrawn",
    "multi_krum": "Multi-Krum",
    "median": "median",
    "trimmed_mean": "trimmed mean",
    "geometric_median": "geometric median",
}
ATTACK_NAMES = {
    "none": "none",
    "large_gradient": "large gradient",
    "bit_flip": "bit flip",
    "label_flip": "label flip",
    "inside_radius": "inside radius",
    "non_finite": "NaN, inf, 1e38",
}


def name(arm: str) -> str:
    """The arm as readers know it."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))
