"""The frozen public surface: names, config keys, and 20-step trainings at full precision."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import datasets
import pytest
import torch

import sparse_flash_attention
from common.config import schema_keys
from common.kernels.device import cpu_name
from sparse_flash_attention import config as schema
from sparse_flash_attention.kernels import cpp_face
from sparse_flash_attention.tests.trials import SMALL, config, curve, run, text_folder

GOLDEN = Path(__file__).parent / "golden"
TASKS = (
    schema.LanguageConfig,
    schema.RuntimeConfig,
    schema.StepConfig,
    schema.CoverageConfig,
    schema.ExactnessConfig,
    schema.AheadOfTimeConfig,
)
ARMS = ("dense", "hash", "drop")


def machine() -> str:
    """What the last bits hang on: the processor, its vectors, the library and which face runs."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {capability}, torch {torch.__version__}, {'cpp' if cpp_face.library() else 'torch'}"


def losses(arm: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Training losses of 20 steps and the loss on held-out text, exact floats."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    data = ["data=openwebtext2", f"data.path={text_folder(folder / 'text')}", "data.validation=0.1", "data.test=0.1"]
    rows, made = run(folder / "trial", config(*SMALL, *data, f"attention={arm}", "seed=3"))
    return [*(loss for (loss,) in curve(made)), rows[0]["validation_loss"]]


@pytest.mark.parametrize("arm", ARMS)
def test_golden_curve(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit on the machine it was recorded on; within float32 rounding, amplified by 20 steps, elsewhere."""
    golden = json.loads((GOLDEN / "curves.json").read_text())
    measured = losses(arm, tmp_path, monkeypatch)
    if golden["machine"] == machine():
        assert measured == golden[arm]
    amplified = 1e-3 if arm == "hash" else 1e-4  # a rounding may move a row to another bucket
    assert len(measured) == 21 and measured == pytest.approx(golden[arm], rel=amplified)
    assert measured[-1] < 0.7 * measured[0]


def test_golden_curves_differ() -> None:
    golden = json.loads((GOLDEN / "curves.json").read_text())
    assert len({tuple(golden[arm]) for arm in ARMS}) == len(ARMS)


def test_public_names_are_frozen_and_documented() -> None:
    frozen = (GOLDEN / "names.txt").read_text().split()
    assert sorted(sparse_flash_attention.__all__) == frozen
    for name in frozen:
        value = getattr(sparse_flash_attention, name)
        words = inspect.getdoc(value) or ""
        assert words.strip(), name
        takes = [p for p in inspect.signature(value).parameters if p != "self"]
        assert not takes or "Args:" in words or name == "GPTConfig", name


def keys() -> list[str]:
    """Every key of a trial; those of the tasks under the task's name."""
    found = [key for key in schema_keys(schema.TrialConfig) if not key.startswith("task.")]
    for task in TASKS:
        found += [f"task[{task().name}].{key}" for key in schema_keys(task)]
    return sorted(found)


def test_config_keys_are_frozen() -> None:
    assert keys() == (GOLDEN / "keys.txt").read_text().split()
