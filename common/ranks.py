"""The processes of one trial under torchrun: who writes, and that all do the same."""

from __future__ import annotations

import os
from typing import Any

_store: Any = None
_questions = 0


def is_first() -> bool:
    """Whether this process is rank 0, the one that writes; true outside torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """Number of processes of the trial."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agree(answer: bool, question: str) -> bool:
    """Return rank 0's answer on every rank.

    Only rank 0 can know whether a trial is already recorded: another process may finish it between two looks, and a
    rank that trains while another skips would wait for it for ever.

    Raises:
        torch.distributed.DistStoreError: when rank 0 does not answer.
    """
    global _store, _questions
    if count() == 1:
        return answer
    import torch.distributed as dist

    if _store is None:
        _store = next(iter(dist.rendezvous("env://")))[0]
    _questions += 1
    key = f"common/ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_questions}/{question}"
    if is_first():
        _store.set(key, "yes" if answer else "no")
        return answer
    return _store.get(key) == b"yes"
