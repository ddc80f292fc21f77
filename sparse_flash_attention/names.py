"""How arms and quantities are called in figures and tables."""

ARM_NAMES = {
    "dense": "dense (F-LM)",
    "hash": "hash (H-LM)",
    "random": "random buckets",
    "none": "no attention",
    "window": "window of 32 tokens",
    "drop_30": "30 % dropped (D-LM)",
    "drop_70": "70 % dropped",
    "reformer": "Reformer's chunks",
    "dense_short": "dense, a quarter of the steps",
    "hash_official": "hash, without itself",
}


def name(arm: str) -> str:
    """The arm as readers know it."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))
