"""Checkpoints that survive a kill and resume bit-exactly: the model as safetensors, the rest as tensors and numbers.

A checkpoint is a folder `checkpoint-<step>.<n>` written beside its place and renamed when it is whole. Nothing in
it can run code when it is loaded: safetensors, and `torch.load(weights_only=True)`.
"""

import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def save_checkpoint(
    folder: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    scheduler: Any = None,
    extra: dict[str, Any] | None = None,
) -> Path | None:
    """Write a checkpoint under `folder` atomically and remove older ones; every process must call it, rank 0 writes.

    Args:
        folder: the trial's scratch folder.
        model: the model, plain or wrapped.
        optimizer: its state is kept; functions in its parameter groups are not (they come from the code).
        step: steps done.
        scheduler: anything with `state_dict`.
        extra: tensors, numbers, strings, lists and dicts of them.

    Returns:
        The checkpoint's path on rank 0, None elsewhere.
    """
    from safetensors.torch import save_model

    states = _gather(_random_states())
    if not _is_main():
        _barrier()
        return None
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for torn in root.glob(".checkpoint-*"):
        shutil.rmtree(torn, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=root))
    save_model(_plain(model), str(scratch / "model.safetensors"))
    rest = {"step": step, "random": states, "extra": extra or {}}
    if optimizer is not None:
        rest["optimizer"] = _without_functions(optimizer.state_dict())
    if scheduler is not None:
        rest["scheduler"] = scheduler.state_dict()
    torch.save(rest, scratch / "state.pt")
    for path in scratch.iterdir():
        _fsync(path)
    older = _checkpoints(root)
    again = max((serial for done, serial, _ in older if done == step), default=-1) + 1
    target = root / f"checkpoint-{step}.{again}"
    os.rename(scratch, target)
    for _, _, path in older:
        shutil.rmtree(path, ignore_errors=True)
    _barrier()
    return target


def load_checkpoint(
    folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, scheduler: Any = None
) -> int | None:
    """Load the newest checkpoint in place, with every random state, and return its step; None if there is none.

    Raises:
        ValueError: the checkpoint belongs to another model or optimizer.
    """
    found = _newest(folder)
    if found is None:
        return None
    step, path = found
    from safetensors.torch import load_model

    plain = _plain(model)
    device = next((tensor.device for tensor in plain.parameters()), torch.device("cpu"))
    rest = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    try:
        load_model(plain, str(path / "model.safetensors"), strict=True, device=str(device))
        if optimizer is not None:
            optimizer.load_state_dict(_with_functions(rest["optimizer"], optimizer))
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not a checkpoint of this model and optimizer ({reason})") from error
    if scheduler is not None:
        scheduler.load_state_dict(rest["scheduler"])
    _restore_random(rest["random"][_rank() % len(rest["random"])])
    return step


def load_extra(folder: Path | str) -> dict[str, Any]:
    """What was passed as `extra` to the newest checkpoint; empty without one."""
    found = _newest(folder)
    if found is None:
        return {}
    return torch.load(found[1] / "state.pt", map_location="cpu", weights_only=True)["extra"]


def _checkpoints(root: Path) -> list[tuple[int, int, Path]]:
    """(step, how often this step was written before, path), oldest first."""
    if not root.is_dir():
        return []
    named = [(re.fullmatch(r"checkpoint-(\d+)\.(\d+)", path.name), path) for path in root.iterdir()]
    return sorted((int(match[1]), int(match[2]), path) for match, path in named if match)


def _newest(folder: Path | str) -> tuple[int, Path] | None:
    found = _checkpoints(Path(folder))
    return (found[-1][0], found[-1][2]) if found else None


def _plain(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner


def _without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """Functions cannot be stored without pickling code; the optimizer that loads the state brings its own."""
    groups = [{key: value for key, value in group.items() if not callable(value)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _with_functions(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    current = optimizer.state_dict()["param_groups"]
    if len(current) != len(state["param_groups"]):
        raise ValueError(f"{len(state['param_groups'])} parameter groups stored, {len(current)} here")
    groups = [{**here, **stored} for here, stored in zip(current, state["param_groups"], strict=True)]
    return {**state, "param_groups": groups}


def _random_states() -> dict[str, Any]:
    """States of the global generators of this process, as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: dict[str, Any]) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.asarray(words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _is_main() -> bool:
    return _rank() == 0


def _gather(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _barrier() -> None:
    if _distributed():
        torch.distributed.barrier()


def _fsync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
