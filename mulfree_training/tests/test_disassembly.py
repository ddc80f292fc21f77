"""No compiled C++ kernel multiplies, and the scan sees every family of instructions that does."""

from __future__ import annotations

import shutil

import pytest

from common.kernels import native
from mulfree_training import disassembly
from mulfree_training.disassembly import (
    ALLOWED_INSTRUCTIONS,
    scan_assembly,
    scan_control,
    scan_kernels,
    scan_library,
)
from mulfree_training.kernels import cpp

needs_compiler = pytest.mark.skipif(native.compiler("c++") is None, reason="needs a C++ compiler")
needs_x86 = pytest.mark.skipif(not cpp.X86, reason="counts instructions of x86")
HEADER = "x.so:     file format elf64-x86-64\n\n0000000000001000 <f>:\n"
VOID = 'extern "C" void control(const float *a, const float *b, float *out, long n) { %s }'
LOOP = "for (long x = 0; x < n; x++) out[x] = %s;"
X86 = """
    vmulps %zmm0,%zmm1,%zmm2|mulss %xmm0,%xmm1|mulsd (%rax),%xmm1|vmulph %zmm0,%zmm1,%zmm2|vdivpd %ymm0,%ymm1,%ymm2
    divss %xmm1,%xmm0|vsqrtps (%rax),%zmm1|sqrtsd %xmm0,%xmm0|rcpss %xmm0,%xmm0|vrcp14ps %zmm0,%zmm0
    vrsqrt14ss %xmm0,%xmm1,%xmm2|rsqrtps %xmm0,%xmm0|vfmadd231ps %zmm0,%zmm1,%zmm2|vfnmsub132sd (%rax),%xmm0,%xmm1
    vfmaddsub213ps %ymm0,%ymm1,%ymm2|vdpbf16ps %zmm0,%zmm1,%zmm2|dpps $0x1,%xmm0,%xmm1|vpmulld %zmm0,%zmm1,%zmm2
    pmuludq %xmm0,%xmm1|vpmaddwd %ymm0,%ymm1,%ymm2|vpmadd52luq %zmm0,%zmm1,%zmm2|vpdpbusd %zmm0,%zmm1,%zmm2
    tdpbf16ps %tmm0,%tmm1,%tmm2|tdpbssd %tmm0,%tmm1,%tmm2|vscalefps %zmm0,%zmm1,%zmm2|vexp2ps %zmm0,%zmm1
    vfcmaddcph %zmm0,%zmm1,%zmm2|vmulss 0x4(%rax,%rbx,4),%xmm2,%xmm2|fmuls 0x10(%rsp)|fdivrp %st,%st(1)|fsqrt
    fimull (%rax)|fyl2x|pfmul %mm0,%mm1|pmullw %mm0,%mm1|bnd vmulps %ymm0,%ymm1,%ymm2|{evex} vmulps %ymm0,%ymm1,%ymm2
    (bad)|.byte 0x62
"""
ARM = """
    fmul s0, s1, s2|fmul v0.4s, v1.4s, v2.s[0]|fmla v0.4s, v1.4s, v2.4s|fmadd d0, d1, d2, d3|fnmsub s0, s1, s2, s3
    fdiv d0, d1, d2|fsqrt v0.4s, v1.4s|frecpe v0.4s, v1.4s|frsqrts v0.4s, v1.4s, v2.4s|mul v0.4s, v1.4s, v2.4s
    mla v0.8h, v1.8h, v2.8h|smull v0.4s, v1.4h, v2.4h|sdot v0.4s, v1.16b, v2.16b|bfmmla v0.4s, v1.8h, v2.8h
    fmul z0.s, p0/m, z0.s, z1.s|sdiv z0.s, p0/m, z0.s, z1.s|fmopa za0.s, p0/m, p1/m, z0.s, z1.s|.inst 0x12345678
    sqrdmulh v0.4s, v1.4s, v2.4s|bfdot v0.4s, v1.8h, v2.8h|fcmla v0.4s, v1.4s, v2.4s, #90|pmull v0.8h, v1.8b, v2.8b
"""
HARMLESS_X86 = """
    vaddps %zmm0,%zmm1,%zmm2|vpaddd %zmm0,%zmm1,%zmm2|vandps %ymm0,%ymm1,%ymm2|vmovddup %xmm0,%xmm1|pand %xmm0,%xmm1
    imul %rax,%rbx|mul %rcx|mulq (%rax)|mulx %rax,%rbx,%rcx|idivq 0x8(%rsp)|div %rcx|lea (%rax,%rax,4),%rdx
    shl $0x2,%rax|vsubss %xmm0,%xmm1,%xmm2|vaddsubps %ymm0,%ymm1,%ymm2|vmaxps %ymm0,%ymm1,%ymm2|vcvtdq2ps %ymm0,%ymm1
    vpmultishiftqb %zmm0,%zmm1,%zmm2|vroundps $0x9,%ymm0,%ymm1|rep stos %al,%es:(%rdi)|vpsrad $0x1,%ymm0,%ymm1|fld1
    vpternlogd $0xca,%zmm0,%zmm1,%zmm2|kmovw %k0,%eax|vpmaxsd %ymm0,%ymm1,%ymm2|vpmovsxdq %ymm0,%zmm1|cs nopw 0x0(%rax)
"""
HARMLESS_ARM = """
    fadd v0.4s, v1.4s, v2.4s|add v0.4s, v1.4s, v2.4s|mul x0, x1, x2|madd w0, w1, w2, wzr|udiv x0, x1, x2|fmov s0, w0
    smaddl x0, w1, w2, x3|umulh x0, x1, x2|fmax s0, s1, s2|faddp v0.4s, v1.4s, v2.4s|fsub s0, s1, s2|msub x0, x1, x2, x3
    frintm v0.4s, v1.4s|cmge v0.4s, v1.4s, v2.4s|lsl x0, x1, #2|scvtf s0, w0|bic v0.16b, v1.16b, v2.16b
"""


def lines(text: str) -> list[str]:
    return [part.strip() for row in text.strip().splitlines() for part in row.split("|")]


def findings(code: list[str], header: str = HEADER) -> list[disassembly.Finding]:
    text = header + "".join(f"    {4096 + i:x}:\t{line}\n" for i, line in enumerate(code))
    return disassembly._scan("x.so", "objdump", header, list(disassembly._disassembled(text)), set()).findings


@needs_compiler
def test_no_kernel_multiplies_on_any_instruction_set():
    scans = scan_kernels()
    sources = {path.name for path in cpp.FOLDER.glob("*.cpp")}
    assert len(sources) >= 3 and set(scans) == {f"{source} {level}" for source in sources for level in cpp.levels()}
    for name, scan in scans.items():
        assert scan.findings == [], name
        # all code was read, and what is allowed was seen
        assert scan.instructions > 1000 and scan.functions > 5 and scan.allowed.get("lea", scan.allowed.get("madd")), (
            name
        )


@needs_compiler
@pytest.mark.parametrize("level", cpp.levels())
def test_the_control_is_found(level):
    scan = scan_control(level)
    assert len(scan.findings) >= 4 and {x.function for x in scan.findings} == {"control"}
    assert scan.findings[0].reason == "multiplies, divides or takes roots"


@needs_compiler
@needs_x86
@pytest.mark.parametrize("level", [cpp.levels()[0], cpp.levels()[-1]])
@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("a[x] * b[x]", "mul"), ("a[x] / 3", "div"), ("__builtin_sqrtf(a[x])", "sqrt"), ("a[x] * a[0]", "mul"),
        ("(double) a[x] * b[x]", "mul"), ("__builtin_fmaf(a[x], b[x], 1)", "fma"), ("a[x] * 4", "mul"),
        ("__builtin_bit_cast(float, __builtin_bit_cast(int, a[x]) * __builtin_bit_cast(int, b[x]))", "pmul"),
        ("(long double) a[x] * b[x] * a[x]", "fmul"), ("__builtin_exp2f(a[x])", "exp2f"),
        ("__builtin_powf(a[x], b[x])", "powf"),
    ],
)  # fmt: skip
def test_one_planted_operation_is_found(expression, names, level):
    scan = scan_control(level, VOID % (LOOP % expression))
    # without the instruction there is a function of the C library instead
    assert any(names in x.instruction for x in scan.findings), scan.findings
    assert scan.allowed


@needs_compiler
@pytest.mark.parametrize("level", [cpp.levels()[0], cpp.levels()[-1]])
@pytest.mark.parametrize(
    "expression",
    ["a[x] + b[x]", "a[x] > b[x] ? a[x] : b[x]", "a[x * n + 3]", "(float) (int) a[x]", "-a[x]", "a[n / (x + 1)]"],
)
def test_sums_selections_and_addresses_are_not_found(expression, level):
    scan = scan_control(level, VOID % (LOOP % expression))
    assert scan.findings == [] and scan.instructions > 20


@pytest.mark.parametrize("line", lines(X86))
def test_every_family_of_x86(line):
    (found,) = findings([line])
    assert found.function == "f" and found.instruction in line


@pytest.mark.parametrize("line", lines(ARM))
def test_every_family_of_arm(line):
    assert len(findings([line], HEADER.replace("x86-64", "littleaarch64"))) == 1
    if not line.startswith("."):
        assert len(scan_assembly(f"f:\n\t{line}\n", "aarch64").findings) == 1


def test_what_is_allowed():
    assert findings(lines(HARMLESS_X86)) == []
    assert findings(lines(HARMLESS_ARM), HEADER.replace("x86-64", "littleaarch64")) == []
    scan = scan_assembly("".join(f"\t{x}\n" for x in lines(HARMLESS_X86)), "x86_64")
    assert scan.allowed == {"imul": 1, "mul": 2, "mulx": 1, "idiv": 1, "div": 1, "lea": 1, "shl": 1}
    assert all(reason for table in ALLOWED_INSTRUCTIONS.values() for reason in table.values())


def test_functions_from_elsewhere_in_assembly():
    text = """
\t.globl\tf
f:
\tcall\tpowf@PLT
\tcall\tmemcpy@PLT
\tcall\t_ZL5localv
\tcall\tGOMP_parallel@PLT
\tmovq\texp2f@GOTPCREL(%rip), %rax
\tcall\t*%rax
\tjmp\t.L3
.L3:
\tjmp\tlog2f
_ZL5localv:
\taddss\t%xmm0, %xmm1\t# mulss %xmm0, %xmm1
"""
    scan = scan_assembly(text, "AMD64")
    assert [x.instruction for x in scan.findings] == ["exp2f", "log2f", "powf"]
    assert scan.functions == 2 and scan.instructions == 9
    found = scan_assembly("f:\n\tbl\tpowf\n\tbl\tg\n\tb\t.L2\ng:\n\tret\n", "arm64").findings
    assert [x.instruction for x in found] == ["powf"]


@needs_compiler
@pytest.mark.parametrize("level", cpp.levels())
def test_without_objdump_the_compilers_assembly_is_read(level, monkeypatch):
    usual = shutil.which
    monkeypatch.setattr(disassembly.shutil, "which", lambda name: None if "objdump" in name else usual(name))
    scan = scan_control(level)
    assert scan.tool == "compiler" and len(scan.findings) >= 4 and scan.path.endswith(".so")
    assert {x.function for x in scan.findings} == {"control"}
    clean = scan_control(level, VOID % (LOOP % "a[x] + b[x]"))
    assert clean.findings == [] and clean.instructions > 10
    with pytest.raises(FileNotFoundError, match="needs objdump"):
        scan_library(scan.path)


@needs_compiler
def test_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        scan_library(tmp_path / "x.so")
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(RuntimeError, match="failed"):
        scan_library(tmp_path / "x.so")
    with pytest.raises(RuntimeError, match="must be x86-64 or AArch64"):
        scan_assembly("", "riscv64")
    with pytest.raises(RuntimeError, match="failed"):
        disassembly._compiled(tmp_path / "missing.cpp", ())
    monkeypatch.setenv("COMMON_NATIVE", "0")
    with pytest.raises(RuntimeError, match="must be built"):
        scan_kernels()
