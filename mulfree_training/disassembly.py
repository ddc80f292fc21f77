"""Proof on the compiled C++ kernels: no instruction in them multiplies or divides floats, or vectors of integers.

`scan_library` reads a shared library through `objdump -d`; without objdump, the assembly that the compiler writes for
its source. x86-64 and AArch64. A function that the library takes from elsewhere is a finding too, for its code is not
seen, unless it is known to do no arithmetic (memory, threads): the runtime of OpenMP and the C library are not scanned.

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
    r"GOMP_\w+|omp_\w+|__kmpc_\w+|abort|__stack_chk_fail|__tls_get_addr"
    r"|(?:__)?mem(?:cpy|set|move|cmp)(?:_chk)?|malloc|calloc|realloc|free|posix_memalign|aligned_alloc"
    r"|_Zn[wa]\w+|_Zd[la]\w+|__cxa_\w+|_Unwind_Resume|__gxx_personality_v\d|_ZSt\d+__throw_\w+|__gmon_start__|_ITM_\w+"
)
"""Functions from elsewhere that do no floating-point arithmetic: threads, memory, errors, start and end."""

# looked up where an operand is a vector register; scalar integers have instructions of the same names
_X86 = re.compile(r"mul(?!tishift)|div|sqrt|rcp|madd|msub|scalef|exp2|^v?dp[pb]|^vp4?dp|^t(?:dp|cmm|mmul)")
_X86_VECTOR = re.compile(r"%[xyzt]?mm\d")
_X87 = re.compile(r"f(?:i?mul|i?div|sqrt|2xm1|yl2x|scale|prem|ptan|patan|sin|cos)")
_ARM = re.compile(r"mul|mla|mls|mad|msb|msub|mneg|div|sqrt|recp|dot|mop|scale|expa")
_ARM_GENERAL = re.compile(r"[wx](?:\d+|zr)\b")
_UNKNOWN = re.compile(r"\(bad\)|\.byte|\.word|\.inst|udf|undefined|<unknown>")
_PREFIX = re.compile(r"^(?:(?:lock|repn?[ez]?|bnd|notrack|data16|addr32|[cdefgs]s|\{\w+\}|rex\S*)\s+)+")
_HEADER, _LABEL = re.compile(r"[0-9a-f]+ <(.+)>:$"), re.compile(r"^([A-Za-z_$][\w.$]*):", re.MULTILINE)
# what is called, or has its address taken through a table of the linker
_WANTED = re.compile(r"([A-Za-z_$][\w.$]*)@(?:PLT|GOTPCREL)|^(?:bl?|call\w*|jmp)\s+([A-Za-z_$][\w.$]*)$|:got:([\w$.]+)")


class Finding(NamedTuple):
    """One instruction that must not be there, or one function from elsewhere."""

    function: str
    """Where the instruction is; "" for a function from elsewhere."""
    instruction: str
    """Or the name of the function."""
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
        text = _output([objdump, "-d", "--no-show-raw-insn", str(path)])
        symbols = _output([objdump, "-T", str(path)]).splitlines()
        wanted = {line.split()[-1] for line in symbols if "*UND*" in line}
        return _scan(str(path), "objdump", text[:300], list(_disassembled(text)), wanted)
    if source is None or native.compiler("c++") is None:
        raise FileNotFoundError(f"path={path}: needs objdump (binutils), or the source and a C++ compiler")
    return scan_assembly(_compiled(source, flags), platform.machine())._replace(path=str(path))


def scan_assembly(text: str, machine: str) -> Scan:
    """As `scan_library`, of what a compiler writes; `machine` is such as `x86_64` or `aarch64`."""
    code = list(_assembled(text))
    wanted = {name for _, instruction in code for names in _WANTED.findall(instruction) for name in names if name}
    return _scan("", "compiler", machine, code, wanted - set(_LABEL.findall(text)))


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
        RuntimeError: as `scan_kernels`.
        FileNotFoundError: as `scan_kernels`.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "control.cpp"
        source.write_text(text)
        return _scan_built(source, level or cpp.instruction_set())


def _scan_built(source: Path, level: str) -> Scan:
    library = cpp.library(str(source), {}, level)  # an absolute path stays what it is there
    if library is None:
        raise RuntimeError(f"{source.name} for {level}: must be built, but there is no C++ compiler, or it failed")
    march = (cpp.LEVELS[level],) if cpp.X86 else ()
    return scan_library(library._name, source, (*cpp.EXACT, *march))


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()[:200]}")
    return result.stdout


def _compiled(source: Path, flags: Sequence[str]) -> str:
    """The assembly of a source, compiled with the first flags that work, as `native.load` does."""
    command = native.compiler("c++") or []
    for optional in native.OPTIONAL_FLAGS:
        line = [*command, *native.BASE_FLAGS, *optional, *flags, "-S", str(source), "-o", "-"]
        try:
            return _output(line)
        except RuntimeError as error:
            complaint = error
    raise complaint


def _disassembled(text: str) -> Iterator[tuple[str, str]]:
    """Function and instruction, line by line, from objdump."""
    function = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            function = header[1]
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


def _scan(path: str, tool: str, machine: str, code: list[tuple[str, str]], wanted: set[str]) -> Scan:
    kind = _architecture(machine)
    strange = "a function from elsewhere, whose code is not seen"
    findings = [Finding("", name, strange) for name in sorted(wanted) if not ALLOWED_CALLS.fullmatch(name)]
    allowed: Counter[str] = Counter()
    for function, written in code:
        instruction = _PREFIX.sub("", written)
        name, _, operands = instruction.partition(" ")
        reason = _why(kind, name, operands.strip())
        known = name if name in ALLOWED_INSTRUCTIONS[kind] else re.sub("[bwlq]$", "", name)
        if reason:
            findings.append(Finding(function, instruction, reason))
        elif known in ALLOWED_INSTRUCTIONS[kind]:
            allowed[known] += 1
    return Scan(path, tool, len({function for function, _ in code}), len(code), findings, dict(allowed))


def _architecture(machine: str) -> str:
    if re.search(r"x86.64|amd64", machine, re.IGNORECASE):
        return "x86"
    if re.search(r"aarch64|arm64", machine, re.IGNORECASE):
        return "arm"
    raise RuntimeError(f"machine={machine.strip()!r}: must be x86-64 or AArch64")


def _why(kind: str, name: str, operands: str) -> str | None:
    """Why an instruction is forbidden, or None."""
    if _UNKNOWN.match(name):
        return "not recognised"
    if kind == "x86":
        vector = _X86.search(name) and _X86_VECTOR.search(operands)
        found = bool(vector or _X87.match(name))
    else:
        found = bool(_ARM.search(name) and not _ARM_GENERAL.match(operands))
    return "multiplies, divides or takes roots" if found else None
