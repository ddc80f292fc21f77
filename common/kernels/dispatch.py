"""Which implementation ("face") of an operator runs: chosen from what the call needs, or forced by name.

A face says why it cannot serve a call (`refuses`); without a wish, the first in the operator's order that can, runs. A
wish comes from the caller (`backend="triton"`), or for a whole block from `forced("torch")`; it is never overruled
silently: what the wished face refuses is an error with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Refusal = Callable[..., str | None]
"""Called with the operator's arguments; returns why the face cannot serve them, or None if it can."""

# a plain global: torch.compile reads it, and traces again when it has changed; a ContextVar it cannot read
_forced: str | None = None


def choose(faces: Mapping[str, Refusal], *call: Any, backend: str | None = None) -> str:
    """Name of the face that serves a call.

    Args:
        faces: name -> refusal, the preferred first.
        call: what the refusals look at.
        backend: the face wished for; None leaves it to `forced`, then to the order.

    Raises:
        ValueError: no such face, or it refuses the call, or all do; the message says why.
    """
    wished = wish(backend)
    if wished is None:
        reasons = {}
        for name, refuses in faces.items():
            reason = refuses(*call)
            if reason is None:
                return name
            reasons[name] = reason
        raise ValueError("no backend serves this call: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
    if wished not in faces:
        raise ValueError(f"backend={wished!r}: must be None or one of {', '.join(faces)}")
    reason = faces[wished](*call)
    if reason is not None:
        raise ValueError(f"backend={wished!r}: {reason}")
    return wished


def wish(backend: str | None) -> str | None:
    """The face that the caller, or else a `forced` block around it, wishes for."""
    return backend if backend is not None else _forced


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Inside the block every operator whose caller has no wish of its own runs on this face, in all threads."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
