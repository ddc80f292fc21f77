"""The C++ kernels, built for the vector units of this processor: AVX-512 or AVX2 on x86, whatever there is elsewhere.

`COMMON_NATIVE_ISA=avx2` (or `avx512`) asks for one of them, for tests and benchmarks.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.kernels.native import load

FOLDER = Path(__file__).parent
# no fused multiply-add may appear where a source has none, nor may a sum change its order
EXACT = ("-ffp-contract=off", "-fno-strict-aliasing")
# the common build asks for -march=native: on x86 each level says otherwise
LEVELS = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3", "generic": "-march=x86-64"}
X86 = platform.machine().lower() in ("x86_64", "amd64")
SWITCH = "COMMON_NATIVE_ISA"


@functools.cache
def levels() -> tuple[str, ...]:
    """Instruction sets of this processor that the kernels can be built for, the best first."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if platform.machine().lower() not in ("x86_64", "amd64") or not here.startswith("avx"):
        return ("generic",)
    return ("avx512", "avx2", "generic") if here.startswith("avx512") else ("avx2", "generic")


@functools.cache
def instruction_set() -> str:
    """The one that runs: the best, or what the environment asks for.

    Raises:
        ValueError: the environment asks for what the processor lacks.
    """
    wished = os.environ.get(SWITCH, levels()[0])
    if wished not in levels():
        raise ValueError(f"{SWITCH}={wished}: must be one of {', '.join(levels())} on this processor")
    return wished


def library(source: str, functions: Mapping[str, Sequence[Any]], level: str) -> ctypes.CDLL | None:
    """A source of this folder, compiled for one instruction set; None without a compiler (after one warning)."""
    march = (LEVELS[level],) if X86 else ()
    return load(FOLDER / source, functions, (*EXACT, *march))
