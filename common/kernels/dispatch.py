"""Which implementation ("face") of an operator runs: chosen from what the call needs, or forced by name.

A face says why it cannot serve a call (`refuses`); without a wish, the first in the operator's order that can, runs. A
wish comes from the caller (`backend="triton"`), or for a whole block from `forced("torch")`; it is never overruled
silently: what the wished face refuses is an error with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

Refusal = Callable[..., str | None]
"""Called with the operator's arguments; returns why the face cannot serve them, or None if it can."""

_forced: ContextVar[str | None] = ContextVar("forced_backend", default=None)


def choose(faces: Mapping[str, Refusal], *call: Any, backend: str | None = None) -> str:
    """Name of the face that serves a call.

    Args:
        faces: name -> refusal, the preferred first.
        call: what the refusals look at.
        backend: the face wished for; None leaves it to `forced`, then to the order.

    Raises:
        ValueError: no such face, or it refuses the call, or all do; the message says why.
    """
    wish = backend if backend is not None else _forced.get()
    if wish is None:
        reasons = {}
        for name, refuses in faces.items():
            reason = refuses(*call)
            if reason is None:
                return name
            reasons[name] = reason
        raise ValueError("no backend serves this call: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
    if wish not in faces:
        raise ValueError(f"backend={wish!r}: must be None or one of {', '.join(faces)}")
    reason = faces[wish](*call)
    if reason is not None:
        raise ValueError(f"backend={wish!r}: {reason}")
    return wish


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Inside the block every operator whose caller has no wish of its own runs on this face."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
