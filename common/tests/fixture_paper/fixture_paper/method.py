"""The fixture's method."""

from __future__ import annotations

from typing import Any


def update(x: Any, gradient: Any, velocity: Any, lr: float, momentum: float) -> tuple[Any, Any]:
    """Heavy ball."""
    velocity = momentum * velocity + gradient
    return x - lr * velocity, velocity
