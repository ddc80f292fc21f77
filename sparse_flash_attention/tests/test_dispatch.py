"""Which face runs: by device and precision, or as wished; and each gives what the others give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.kernels.dispatch import forced
from sparse_flash_attention import operator
from sparse_flash_attention.attention import REFUSALS
from sparse_flash_attention.tests.cases import NEEDS_COMPILER, coins, qkv, run

torch.set_num_threads(1)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the faces that the operator was asked to run."""
    names: list[str] = []
    real = operator.planned_attention

    def spy(*call: Any) -> Any:
        names.append(call[-1])
        return real(*call)

    monkeypatch.setattr(operator, "planned_attention", spy)
    return names


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_cpu_the_compiled_face_comes_first(ran: list[str], dtype: torch.dtype) -> None:
    case = qkv(1, 1, 8, 8).to(dtype)
    case.attend(case.q, case.k, case.v)
    assert ran == ["cpp"]


def test_float64_goes_to_torch(ran: list[str]) -> None:
    case = qkv(1, 1, 8, 8).to(torch.float64)
    case.attend(case.q, case.k, case.v)
    assert ran == ["torch"]


def test_a_wish_and_a_forced_block_are_obeyed(ran: list[str]) -> None:
    case = qkv(1, 1, 8, 8)
    with forced("torch"):
        case.attend(case.q, case.k, case.v)
    case.attend(case.q, case.k, case.v, "torch")
    with forced("reference"):
        case.attend(case.q, case.k, case.v)
    case.attend(case.q, case.k, case.v, "reference")
    assert ran == ["torch", "torch"]


def test_every_face_is_known_to_both_lists() -> None:
    assert set(REFUSALS) == {*operator.FACES, "reference"} and list(REFUSALS)[-1] == "reference"
    for name in operator.FACES:
        module = operator.face(name)
        assert all(callable(getattr(module, part)) for part in ("refuses", "forward", "backward")), name


def test_what_no_fast_face_serves_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in operator.FACES:
        monkeypatch.setitem(REFUSALS, name, lambda q, v: "no")
    case = qkv(1, 1, 8, 8)
    assert torch.equal(case.attend(case.q, case.k, case.v), case.attend(case.q, case.k, case.v, "reference"))


def test_without_native_code_torch_runs_and_forcing_cpp_says_why() -> None:
    code = (
        "import torch, pytest\n"
        "from sparse_flash_attention.attention import qk_sparse_attention as attend\n"
        "x = torch.randn(1, 1, 8, 8)\n"
        "assert torch.equal(attend(x, x, x), attend(x, x, x, backend='torch'))\n"
        "with pytest.raises(ValueError, match=\"backend='cpp': .*compiler\"):\n"
        "    attend(x, x, x, backend='cpp')\n"
    )
    env = {"COMMON_NATIVE": "0", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True, timeout=120)


@NEEDS_COMPILER
def test_poisoned_memory_does_not_show_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are written in full: what `empty` hands out is filled with NaN first."""
    # a training in the same process switches this off
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    case = qkv(2, 2, 65, 16).replace(q_keep=coins((2, 2, 65)), k_keep=coins((2, 2, 65), seed=3))
    for face in ("cpp", "torch"):
        wanted = run(case, face)
        torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
        try:
            assert torch.empty(3).isnan().all()
            found = run(case, face)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
