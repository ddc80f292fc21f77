"""Proof on the compiled Triton kernels: PTX, and machine code where there is a disassembler, without multiplications.

Floating-point instructions are held to a list of allowed ones: additions, comparisons, selections, moves, conversions.
Integers may be multiplied for addresses, but not inside a loop. An integer division is a finding anywhere, for the
device does it with a float reciprocal; so is a call, whose code is not seen.

ptxas uses a few multiplying instructions as plain moves and additions: `IMAD.MOV`, `IMAD.IADD` and the like, and
`HFMA2 R, -RZ, RZ, a, b`, which is -0 x 0 + (a, b), a constant. Hence integers are judged in PTX, and that constant is
allowed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from common.kernels.aot import Kernel
from common.kernels.device import usable_cores
from common.kernels.interpreter import SWITCH, interpreting

FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "tf32", "f32", "f32x2", "f64", "e4m3", "e4m3x2", "e5m2", "e5m2x2"}
ALLOWED_ON_FLOATS = {
    "abs", "add", "atom", "copysign", "cvt", "ld", "max", "min", "mov", "neg", "red", "selp", "set", "setp", "slct",
    "st", "sub", "testp",
}  # fmt: skip
NEVER = {
    "call": "calls code that is not seen",
    "div": "integer division, done with a float reciprocal",
    "rem": "integer remainder, done with a float reciprocal",
    **dict.fromkeys(("mma", "wmma", "wgmma", "tcgen05", "dp2a", "dp4a"), "matrix or dot product"),
}
MULTIPLYING = {"mul", "mul24", "mad", "mad24", "madc", "fma", *NEVER}
"""Not allowed inside a loop, whatever the type."""
# CALL.REL is a branch: where it goes is in the same listing
_FORBIDDEN_MACHINE = re.compile(r"(?:[FHD](?:MUL|FMA)\w*|MUFU|FCHK|\w*MMA|CALL\.ABS)(?:\.|$)")
_CONSTANT = re.compile(r"HFMA2(?:\.MMA)?(?:\.\w+)* U?R\d+, -RZ, RZ, [^RU\[]+$")
_MACHINE_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?PT?\d*\s+)?([A-Z][^;]*);")


class Finding(NamedTuple):
    """One instruction that must not be there."""

    line: int
    """From 1, in the text that was scanned."""
    instruction: str
    reason: str


class Scan(NamedTuple):
    """What was found in one kernel compiled for one target."""

    kernel: str
    size: str
    target: str
    findings: list[Finding]


def scan_ptx(text: str) -> list[Finding]:
    """Instructions that multiply, divide or approximate floating-point numbers, or may hide that (see the module)."""
    found = []
    for line, instruction in _instructions(text):
        base, *suffixes = instruction.split()[0].split(".")
        if FLOATS.intersection(suffixes) and base not in ALLOWED_ON_FLOATS:
            found.append(Finding(line, instruction, "not an allowed operation on floats"))
        elif base in NEVER:
            found.append(Finding(line, instruction, NEVER[base]))
    return found


def scan_loops(text: str) -> list[Finding]:
    """Multiplications and divisions of any type inside the loops of a PTX text."""
    inside = {line for start, stop in _loops(text) for line in range(start, stop + 1)}
    return [
        Finding(line, instruction, "multiplication inside a loop")
        for line, instruction in _instructions(text)
        if line in inside and instruction.split()[0].split(".")[0] in MULTIPLYING
    ]


def loop_bodies(text: str) -> list[str]:
    """The loops of a PTX text, each from its label to the branch back to it; an outer loop contains the inner ones."""
    lines = text.splitlines()
    return ["\n".join(lines[start - 1 : stop]) for start, stop in _loops(text)]


def scan_machine_code(text: str) -> list[Finding]:
    """As `scan_ptx`, for what `machine_code` returns."""
    found = []
    for line, content in enumerate(text.splitlines(), 1):
        match = _MACHINE_LINE.search(content)
        if match is None:
            continue
        instruction = match[1].strip()
        if _FORBIDDEN_MACHINE.match(instruction.split()[0]) and not _CONSTANT.match(instruction):
            found.append(Finding(line, instruction, "not an allowed machine instruction"))
    return found


def compiled(kernel: Kernel, target: int) -> Any:
    """One kernel compiled for one target: `asm["ptx"]` is text, `asm["cubin"]` bytes.

    Raises:
        RuntimeError: the interpreter is on.
    """
    if interpreting():
        raise RuntimeError(f"{SWITCH}=1: must be off to compile ahead of time")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.function.arg_names
    source = ASTSource(
        kernel.function,
        signature={name: kernel.signature.get(name, "constexpr") for name in names},
        constexprs=dict(kernel.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(kernel.aligned)},
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def machine_code(cubin: bytes) -> str | None:
    """Disassembly of a compiled kernel by the `cuobjdump` that Triton brings; None where it brings none.

    Raises:
        RuntimeError: it fails, or shows no instruction.
    """
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not _MACHINE_LINE.search(done.stdout):
        raise RuntimeError(f"cuobjdump: exit code {done.returncode}: {done.stderr.strip()[:300]}")
    return done.stdout


def scan_kernel(kernel: Kernel, target: int, *, machine: bool = True) -> Scan:
    """Compile a kernel and scan its PTX, its loops and (`machine`, if there is a disassembler) its machine code."""
    built = compiled(kernel, target)
    text = built.asm["ptx"]
    found = scan_ptx(text)
    found += [x for x in scan_loops(text) if x.line not in {y.line for y in found}]
    code = machine_code(built.asm["cubin"]) if machine else None
    if code is not None:
        found += scan_machine_code(code)
    return Scan(kernel.name, kernel.size, f"sm_{target}", found)


def scan_kernels(
    kernels: Iterable[Kernel] | None = None, *, machine: bool = True, workers: int | None = None
) -> list[Scan]:
    """Scan every kernel for each of its targets.

    Args:
        kernels: by default all of `kernels.aot`.
        machine: look at the machine code too (a third of a second each).
        workers: threads; by default one a core.

    Raises:
        RuntimeError: the interpreter is on, or a tool fails.
    """
    if kernels is None:
        from mulfree_training.kernels.aot import KERNELS

        kernels = KERNELS
    jobs = [(kernel, target) for kernel in kernels for target in kernel.targets]
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        return list(pool.map(lambda job: scan_kernel(*job, machine=machine), jobs))


def _instructions(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of every instruction, without predicate; several on a line (inline assembly) one by one."""
    for line, content in enumerate(text.splitlines(), 1):
        for part in re.split(r"[;{}]", content.split("//")[0]):
            statement = re.sub(r"^\s*(?:[$%\w]+:\s*)?(?:@!?%\w+\s+)?", "", part).strip()
            if re.match(r"[a-z][\w.:]*(\s|$)", statement):
                yield line, statement


def _loops(text: str) -> list[tuple[int, int]]:
    """First and last line of every loop, found by its branch back."""
    labels: dict[str, int] = {}
    found = []
    for line, content in enumerate(text.splitlines(), 1):
        label = re.match(r"\s*(\$\w+):", content)
        if label:
            labels[label[1]] = line
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)\s*;", content)
        if branch and branch[1] in labels:
            found.append((labels[branch[1]], line))
    return found
