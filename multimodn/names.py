"""How arms, cohorts and tasks are called in figures and tables."""

ARM_NAMES = {
    "mm": "MultiModN",
    "pf": "P-Fusion",
    "pf_raw": "P-Fusion, raw",
    "raw_sample": "P-Fusion raw, sample",
    "logistic": "logistic",
    "boosting": "boosted trees",
    "mm_dropout": "MultiModN, dropout",
    "pf_dropout": "P-Fusion, dropout",
    "mm_sample": "MultiModN, sample",
    "mm_batch": "MultiModN, batch",
    "mm_batch_then_sample": "MultiModN, batch → sample",
    "mm_shuffle": "MultiModN, shuffled order",
    "mm_leak_penalty": "MultiModN, leak penalty",
    "mm_robust": "MultiModN, robust",
    "mm_robust_dropout": "MultiModN, robust + dropout",
    "pf_sample": "P-Fusion, sample",
    "pf_batch": "P-Fusion, batch",
    "pf_robust": "P-Fusion, robust",
    "pf_indicator": "P-Fusion + bits",
    "mm_sigmoid": "official loss",
    "mm_output": "state at the output",
    "mm_reversed": "reversed chain",
}
COHORT_NAMES = {
    "star": "STAR",
    "weather": "weather",
    "nhefs": "NHEFS",
    "pbc": "PBC",
    "digits": "digits",
    "haim": "MIMIC",
    "weather2k": "Weather2K",
    "edu": "EDU",
}


def name(arm: str) -> str:
    """The arm as readers know it."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def cohort(key: str) -> str:
    """The cohort as readers know it."""
    return COHORT_NAMES.get(key, key.replace("_", " "))
