"""Learning-rate factors.

A rotational variant turns by sqrt(2 eta lambda ...), so it feels the square root of every factor here; `power=2`
undoes that (the paper's cosine^2, section 4 of the set-up).
"""

from __future__ import annotations

import math


def lr_factor(
    step: int, steps: int, name: str = "cosine", warmup: float = 0.0, power: float = 1.0, floor: float = 0.0
) -> float:
    """Factor of the peak learning rate at `step` (0-based) of `steps`.

    Args:
        step: index of the optimizer step, in [0, steps).
        steps: length of the run.
        name: `cosine` or `linear` (to `floor` after the last step), or `constant`.
        warmup: fraction of the run in which the factor climbs linearly from 1/w to 1, w the warm-up's steps.
        power: exponent on the decay (not on the warm-up).
        floor: where the decay would end after the last step.

    Returns:
        A factor in (0, 1].
    """
    warm_steps = round(warmup * steps)
    if step < warm_steps:
        return (step + 1) / warm_steps
    done = (step - warm_steps) / max(1, steps - warm_steps)
    if name == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    elif name == "linear":
        factor = 1 - done
    else:
        factor = 1.0
    return floor + (1 - floor) * factor**power
