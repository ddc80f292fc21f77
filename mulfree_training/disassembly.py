"""Proof on the compiled C++ kernels: no instruction in them multiplies or divides floats, or vectors of integers.

`scan_library` reads a shared library through `objdump -d`; without objdump, the assembly that the compiler writes for
its source. x86-64 and AArch64. A call of a function elsewhere is a finding too, for its code is not seen, unless it is
known to do no arithmetic (memory, threads). The runtime of OpenMP and the C library themselves are not scanned.

Scalar integers may be multiplied and divided: they are sizes and addresses. `ALLOWED_INSTRUCTIONS` gives the reasons,
and every scan says how many there are.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.kernels import native
from mulfree_training.kernels import cpp

ADDRESS, SHIFT, PART = "sizes and addresses", "shifts an integer", "how work is cut into parts"
ALLOWED_INSTRUCTIONS: dict[str, dict[str, str]] = {
    "x86": {
        **dict.fromkeys(("imul", "mul", "mulx"), ADDRESS),
        "lea": "an index times 1, 2, 4 or 8, for an address",
        **dict.fromkeys(("shl", "sal", "shlx"), SHIFT),
        **dict.fromkeys(("div", "idiv"), PART),
    },
    "arm": {
        **dict.fromkeys(("mul", "madd", "msub", "mneg", "smull", "umull", "smaddl", "umaddl"), ADDRESS),
        **dict.fromkeys(("smulh", "umulh"), "upper half of a product, to divide by a constant"),
        "lsl": SHIFT,
        **dict.fromkeys(("sdiv", "udiv"), PART),
    },
}
"""Architecture -> instruction on general registers -> what it is for."""

ALLOWED_CALLS = re.compile(
    r"GOMP_\w+|omp_\w+|__kmpc_\w+"  # threads
    r"|(?:__)?mem(?:cpy|set|move|cmp)(?:_chk)?|malloc|calloc|realloc|free|posix_memalign|aligned_alloc|_Zn[wa]\w+|_Zd[la]\w+"
    r"|abort|__stack_chk_fail|__tls_get_addr|__cxa_\w+|_Unwind_Resume|_ZSt\d+__throw_\w+|__gmon_start__|_ITM_\w+"
)
"""Functions outside that do no floating-point arithmetic."""

# looked up where an operand is a vector register; scalar integers have instructions of the same names
_X86 = re.compile(r"mul(?!tishift)|div|sqrt|rcp|madd|msub|scalef|exp2|^v?dp[pb]|^vp4?dp|^t(?:dp|cmm|mmul)")
_X86_VECTOR = re.compile(r"%[xyzt]?mm\d")
_X87 = re.compile(r"f(?:i?mul|i?div|sqrt|2xm1|yl2x|scale|prem|ptan|patan|sin|cos)")
_ARM = re.compile(r"mul|mla|mls|mad|msb|msub|mneg|div|sqrt|recp|dot|mop|scale|expa")
_ARM_GENERAL = re.compile(r"[wx](?:\d+|zr)\b")
_UNKNOWN = re.compile(r"\(bad\)|\.byte|\.word|\.inst|udf|undefined|<unknown>")
_PREFIX = re.compile(
    r"(?:(?:lock|repn?[ez]?|bnd|notrack|data16|addr32|[cdefgs]s|xacquire|xrelease|\{\w+\}|rex\S*)\s+)+"
)
_CALLS, _JUMPS = re.compile(r"call\w*|blr?"), re.compile(r"jmp\w*|br?")
_HEADER, _LABEL = re.compile(r"[0-9a-f]+ <(.+)>:$"), re.compile(r"([A-Za-z_$][\w.$]*):")
_START = ("_init", "_fini")
"""Brought by the compiler, to start and end a library."""


class Finding(NamedTuple):
    """One instruction that must not be there."""

    function: str
    instruction: str
    reason: str


class Scan(NamedTuple):
    """What was found in one library."""

    path: str
    tool: str
    """`objdump`, or `compiler` where its assembly was read."""
    functions: int
    instructions: int
    findings: list[Finding]
    allowed: dict[str, int]
    """Those of `ALLOWED_INSTRUCTIONS` -> how many there are."""


CONTROL = """
extern "C" void control(const float *a, const float *b, float *out, const int *i, const int *j, int *k, long n) {
    for (long x = 0; x < n; x++) out[x] = a[x] * b[x] + a[x] / 3 + __builtin_sqrtf(b[x]);
    for (long x = 0; x < n; x++) k[x] = i[x] * j[x];
}
"""
"""C++ that multiplies, divides and takes roots of floats, and multiplies vectors of integers: all must be found."""


def scan_library(path: Path | str, source: Path | None = None, flags: Sequence[str] = ()) -> Scan:
    """Scan all code of a shared library.

    Args:
        path: the library.
        source: what it was built from, read where there is no objdump.
        flags: as given to `native.load` then.

    Raises:
        FileNotFoundError: no such file; or there is neither objdump, nor source and compiler.
        RuntimeError: the tool failed, or the architecture is another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={path}: no such file")
    objdump = shutil.which("objdump") or shutil.which("llvm-objdump")
    if objdump is not None:
        result = subprocess.run([objdump, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{objdump} failed on {path}: {result.stderr.strip()[:200]}")
        return _scan(str(path), "objdump", result.stdout[:300], list(_disassembled(result.stdout)))
    if source is None or native.compiler("c++") is None:
        raise FileNotFoundError(f"path={path}: needs objdump (binutils), or the source and a C++ compiler")
    return _scan(str(path), "compiler", platform.machine(), list(_assembled(_compiled(source, flags))))


def scan_assembly(text: str, machine: str) -> Scan:
    """As `scan_library`, of what a compiler writes; `machine` is such as `x86_64` or `aarch64`."""
    return _scan("", "compiler", machine, list(_assembled(text)))


def scan_kernels() -> dict[str, Scan]:
    """Scan every C++ kernel, built for every instruction set of this processor: `matmul.cpp avx2` -> scan.

    Raises:
        RuntimeError: a kernel could not be built.
        FileNotFoundError: see `scan_library`.
    """
    sources = sorted(cpp.FOLDER.glob("*.cpp"))
    return {f"{source.name} {level}": _scan_built(source, level) for source in sources for level in cpp.levels()}


def scan_control(level: str | None = None, text: str = CONTROL) -> Scan:
    """Scan a source that does multiply, built as the kernels are: a scan that finds nothing in it is worth nothing.

    Args:
        level: `avx512`, `avx2` or `generic`; by default the best of this processor.
        text: the source.

    Raises:
        RuntimeError, FileNotFoundError: as `scan_kernels`.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "control.cpp"
        source.write_text(text)
        return _scan_built(source, level or cpp.instruction_set())


def _scan_built(source: Path, level: str) -> Scan:
    # a path that is absolute stays as it is in cpp.library
    library = cpp.library(str(source), (), level)
    if library is None:
        raise RuntimeError(f"{source.name} for {level}: must be built, but there is no C++ compiler")
    march = (cpp.LEVELS[level],) if cpp.X86 else ()
    return scan_library(library._name, source, (*cpp.EXACT, *march))


def _compiled(source: Path, flags: Sequence[str]) -> str:
    """The assembly of a source, compiled with the first flags that work, as `native.load` does."""
    command, complaint = native.compiler("c++") or [], ""
    for optional in native.OPTIONAL_FLAGS:
        line = [*command, *native.BASE_FLAGS, *optional, *flags, "-S", str(source), "-o", "-"]
        result = subprocess.run(line, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout
        complaint = result.stderr
    raise RuntimeError(f"{source.name}: must compile: {complaint.strip()[:200]}")


def _disassembled(text: str) -> Iterator[tuple[str, str]]:
    """Function and instruction, line by line, from objdump."""
    function = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            function = header[1]
            continue
        address, tab, instruction = line.partition("\t")
        if tab and address.strip().endswith(":"):
            yield function, instruction.replace("\t", " ").strip()


def _assembled(text: str) -> Iterator[tuple[str, str]]:
    """Function and instruction, line by line, from a compiler."""
    function = ""
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            function = label[1]
        instruction = re.split(r"\s#|^#|//", line)[0].strip()
        if line[:1].isspace() and instruction and not instruction.startswith(".") and not instruction.endswith(":"):
            yield function, instruction.replace("\t", " ")


def _scan(path: str, tool: str, machine: str, code: list[tuple[str, str]]) -> Scan:
    kind = _architecture(machine)
    functions = {function for function, _ in code}
    # stubs of the linker, which jump to functions elsewhere: their calls are what counts
    code = [(function, instruction) for function, instruction in code if not re.search(r"@plt|^\.plt", function)]
    findings, allowed = [], Counter[str]()
    for function, written in code:
        instruction = _PREFIX.sub("", written)
        name, _, operands = instruction.partition(" ")
        reason = _why(kind, name, operands) or _unseen(function, name, operands.strip(), functions)
        if reason:
            findings.append(Finding(function, instruction, reason))
        known = name if name in ALLOWED_INSTRUCTIONS[kind] else re.sub("[bwlq]$", "", name)
        if not reason and known in ALLOWED_INSTRUCTIONS[kind]:
            allowed[known] += 1
    return Scan(path, tool, len(functions), len(code), findings, dict(allowed))


def _architecture(machine: str) -> str:
    if re.search(r"x86.64|amd64", machine, re.IGNORECASE):
        return "x86"
    if re.search(r"aarch64|arm64", machine, re.IGNORECASE):
        return "arm"
    raise RuntimeError(f"machine={machine.strip()!r}: must be x86-64 or AArch64")


def _why(kind: str, name: str, operands: str) -> str | None:
    """Why an instruction is forbidden for what it computes, or None."""
    if _UNKNOWN.match(name):
        return "not recognised"
    if kind == "x86":
        vector = _X86_VECTOR.search(operands) and _X86.search(name)
        return "multiplies, divides or takes roots" if vector or _X87.match(name) else None
    general = _ARM_GENERAL.match(operands)
    return "multiplies, divides or takes roots" if _ARM.search(name) and not general else None


def _unseen(function: str, name: str, operands: str, functions: set[str]) -> str | None:
    """Why a call is forbidden, or None."""
    call = _CALLS.fullmatch(name)
    if not call and not _JUMPS.fullmatch(name):
        return None
    named = re.search(r"<([^>]+)>", operands)
    if named:
        # objdump: what is elsewhere has an @
        target, at, _ = named[1].partition("@")
        inside = not at and not target.startswith(".plt")
    elif operands.startswith("*") and "@" not in operands or name in ("blr", "br"):
        # a jump like this goes to a case of a switch
        return "calls code that is not seen" if call and function not in _START else None
    else:
        target = operands.lstrip("*").split("@")[0].split("(")[0]
        inside = target.startswith(".") or not re.match(r"[A-Za-z_$]", target)
    if inside or target in functions or ALLOWED_CALLS.fullmatch(target):
        return None
    return "calls code that is not seen"
