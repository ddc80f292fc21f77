"""Ahead-of-time proof of Triton kernels: compiled for real GPUs on a machine without one, and held to a budget.

`python -m common.kernels.aot <paper> [results=results]` compiles every kernel that `<paper>.kernels.aot.KERNELS` lists
for every target, prints registers, spilled bytes and shared memory as ptxas counts them, writes
`results/<paper>/aot.json` and ends with exit code 1 if one is over its budget. Not possible while Triton's interpreter
is on (`TRITON_INTERPRET=1` patches the language).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.kernels.device import usable_cores
from common.kernels.interpreter import SWITCH, interpreting
from common.provenance import git_state, versions

TARGETS = (80, 90, 100)
"""Compute capabilities times ten: A100, H100 and B200."""


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may use: spilled bytes (stores and loads), registers a thread, bytes of shared memory."""

    spills: int = 0
    registers: int = 255
    shared: int = 99 * 1024  # what sm_86 and sm_89 have; sm_80 has 163 KiB, sm_90 and sm_100 227


@dataclass(frozen=True)
class Kernel:
    """One compilation of one kernel: the function with all that Triton specialises it on.

    `signature` gives the type of every argument that is not in `constants` ("*bf16", "i32", "fp32"); `aligned` names
    those that a launch would find divisible by 16 (pointers, strides), without which loads are scalar. `budget` None
    means that the row is only reported.
    """

    name: str
    size: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str] = frozenset()
    warps: int = 4
    stages: int = 2
    targets: tuple[int, ...] = TARGETS
    budget: Budget | None = field(default_factory=Budget)


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one target. Bytes, except `registers` (a thread); `over` is empty within the budget."""

    kernel: str
    size: str
    target: str
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    budgeted: bool
    over: str


def compile_all(kernels: Iterable[Kernel], *, workers: int | None = None) -> list[Usage]:
    """Compile every kernel for each of its targets, in the order given, targets innermost.

    Raises:
        RuntimeError: the interpreter is on, or ptxas fails.
        ValueError: a kernel whose arguments are neither in its signature nor in its constants, or in both.
    """
    if interpreting():
        raise RuntimeError(f"{SWITCH}={os.environ.get(SWITCH)}: must be off to compile ahead of time")
    jobs = [(kernel, target) for kernel in kernels for target in kernel.targets]
    # Triton lets go of the interpreter lock while it compiles
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        return list(pool.map(lambda job: usage(*job), jobs))


def usage(kernel: Kernel, target: int) -> Usage:
    """Compile one kernel for one target and count what it needs; errors as in `compile_all`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.function.arg_names
    wrong = sorted(set(names) ^ (set(kernel.signature) | set(kernel.constants)))
    wrong += sorted(set(kernel.signature) & set(kernel.constants))
    if wrong:
        raise ValueError(f"{kernel.name}: {', '.join(wrong)}: must be an argument, in signature or in constants")
    source = ASTSource(
        kernel.function,
        signature={name: kernel.signature.get(name, "constexpr") for name in names},
        constexprs=dict(kernel.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(kernel.aligned)},
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stores, loads = assembled(compiled.asm["ptx"])
    shared = int(compiled.metadata.shared)
    over = "" if kernel.budget is None else excess(kernel.budget, registers, stores + loads, shared)
    return Usage(
        kernel=kernel.name,
        size=kernel.size,
        target=f"sm_{target}",
        warps=kernel.warps,
        stages=kernel.stages,
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        shared=shared,
        budgeted=kernel.budget is not None,
        over=over,
    )


def assembled(ptx: str) -> tuple[int, int, int]:
    """Registers a thread and bytes of spill stores and loads, from ptxas itself.

    Raises:
        RuntimeError: ptxas refuses the code, or says nothing of its registers.
    """
    from triton import knobs

    architecture = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if architecture is None:
        raise RuntimeError("PTX without a .target line")
    blackwell = int(re.sub(r"\D", "", architecture[1])) >= 100
    ptxas = (knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # the flags that Triton itself passes
        command = [ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={architecture[1]}", str(source)]
        command += ["-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    found = [
        re.search(pattern, done.stderr)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    ]
    if done.returncode or None in found:
        raise RuntimeError(f"ptxas for {architecture[1]}: exit code {done.returncode}: {done.stderr.strip()[:500]}")
    registers, stores, loads = (int(match[1]) for match in found if match)
    return registers, stores, loads


def excess(budget: Budget, registers: int, spills: int, shared: int) -> str:
    """What goes over the budget, in words; empty if nothing does."""
    parts = [
        ("spilled bytes", spills, budget.spills),
        ("registers", registers, budget.registers),
        ("bytes of shared memory", shared, budget.shared),
    ]
    return ", ".join(f"{used} {what} > {allowed}" for what, used, allowed in parts if used > allowed)


def check(rows: Iterable[Usage]) -> None:
    """Raise AssertionError that lists every row over its budget."""
    over = [f"{row.kernel} {row.size} on {row.target}: {row.over}" for row in rows if row.over]
    if over:
        raise AssertionError("over budget:\n  " + "\n  ".join(over))


def write(paper: str, rows: Sequence[Usage], results: Path | str = "results", started: float | None = None) -> Path:
    """Write `<results>/<paper>/aot.json` (atomically): `{provenance, rows}`; returns its path."""
    import triton

    started = time.time() if started is None else started
    provenance = {
        **git_state(),
        "versions": {**versions(), "triton": triton.__version__},
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.time() - started, 1),
    }
    folder = Path(results) / paper
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "aot.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as handle:
        json.dump({"provenance": provenance, "rows": [asdict(row) for row in rows]}, handle, indent=1)
        handle.write("\n")
    Path(handle.name).chmod(0o644)
    os.replace(handle.name, target)
    return target


def show(rows: Sequence[Usage], title: str = "") -> None:
    """Print the rows as a table (rich)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, caption="spills: bytes stored / loaded; budget '-': reported only")
    for name in ("kernel", "size", "target", "warps", "stages", "registers", "spills", "shared KiB", "budget"):
        left = name in ("kernel", "size", "target", "budget")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        verdict = (f"OVER: {row.over}" if row.over else "holds") if row.budgeted else "-"
        numbers = (str(row.warps), str(row.stages), str(row.registers), f"{row.spill_stores}/{row.spill_loads}")
        table.add_row(row.kernel, row.size, row.target, *numbers, f"{row.shared / 1024:.1f}", verdict)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all within budget, 1 not, 2 usage."""
    paper, results = "", "results"
    for argument in sys.argv[1:] if arguments is None else arguments:
        key, _, value = argument.partition("=")
        if key == "results" and value:
            results = value
        elif "=" in argument or paper or not argument.isidentifier():
            print(f"{argument}: must be one paper's package name, or results=<folder>", file=sys.stderr)
            return 2
        else:
            paper = argument
    try:
        kernels = getattr(importlib.import_module(f"{paper}.kernels.aot"), "KERNELS", None) if paper else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{paper}.kernels.aot".startswith(error.name):
            raise
        kernels = None
    if kernels is None:
        print(f"paper={paper}: must be a package with KERNELS in its kernels/aot.py", file=sys.stderr)
        return 2
    started = time.time()
    try:
        rows = compile_all(kernels)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    show(rows, f"{paper}: compiled ahead of time")
    print(f"written to {write(paper, rows, results, started)}")
    over = sum(bool(row.over) for row in rows)
    if over:
        print(f"{over} of {len(rows)} rows over budget", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
