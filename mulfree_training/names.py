"""How arms and operations are called in figures and tables."""

ARM_NAMES = {
    "standard": "float32",
    "perturbed": "float32, one rounding unit away",
    "matmul": "1 matrix products",
    "softmax": "2 + softmax, scalings",
    "norm": "3 + layer norm",
    "loss": "4 + loss",
    "full": "5 + optimizer: no multiplication",
    "matmul_own": "1, at its own rate",
    "full_own": "5, at its own rate",
    "matmul_exact": "1, exact rule",
    "full_exact": "5, exact rule",
    "full_exact_but_loss": "5, exact rule but in the loss",
    "matmul_alpha": "1, alpha = 1.0552",
    "full_alpha": "5, alpha = 1.0552",
    "bf16": "bfloat16 products",
    "power_of_two": "weights powers of two",
    "adder": "AdderNet's layers",
    "language_standard": "language, float32",
    "language_full": "language, no multiplication",
    "language_full_exact": "language, no multiplication, exact rule",
}

ROWS = ("matmul", "softmax", "norm", "loss", "full")
"""Arms of the ablation, each with one part more than the one before."""


def name(arm: str) -> str:
    """The arm as readers know it."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))
