"""The compiled kernels hold no multiplication, and the scans see one that is planted."""

import re

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from common.kernels.aot import Kernel
from common.kernels.interpreter import SWITCH
from mulfree_training.kernels import ptx
from mulfree_training.kernels.aot import KERNELS, of_matrices, of_operation
from mulfree_training.kernels.triton_elementwise import OPERATIONS
from mulfree_training.kernels.triton_matmul import CANDIDATES, MASKED, MODES, PLAIN


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)


@triton.jit
def planted(x_ptr, y_ptr, out_ptr, n, KIND: tl.constexpr):
    at = tl.arange(0, 128)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    if KIND == "mul":
        z = x * y
    elif KIND == "div":
        z = x / y
    elif KIND == "exp2":
        z = tl.exp2(x)
    elif KIND == "log2":
        z = tl.log2(x)
    elif KIND == "sqrt":
        z = tl.sqrt(x)
    elif KIND == "rsqrt":
        z = tl.rsqrt(x)
    elif KIND == "fma":
        z = tl.fma(x, y, x)
    elif KIND == "integer":
        z = (x.to(tl.int32) // n).to(x.dtype)
    elif KIND == "loop":
        i = x.to(tl.int32)
        for k in range(n):
            i = i * tl.load(y_ptr + k).to(tl.int32) + k
        z = i.to(x.dtype)
    else:
        z = x + y
    tl.store(out_ptr + at, z)


def plant(kind, dtype="fp32", target=90):
    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "n": "i32"}
    return Kernel(kind, dtype, planted, signature, {"KIND": kind}, targets=(target,))


def found_in(kernel, target=90):
    built = ptx.compiled(kernel, target)
    code = ptx.machine_code(built.asm["cubin"])
    return ptx.scan_ptx(built.asm["ptx"]), None if code is None else ptx.scan_machine_code(code)


@pytest.mark.parametrize("kind", ["mul", "div", "exp2", "log2", "sqrt", "rsqrt", "fma"])
def test_planted_operations_on_floats_are_found(kind):
    text, code = found_in(plant(kind))
    assert text and all(x.reason == "not an allowed operation on floats" for x in text)
    assert code is None or code


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp64"])
@pytest.mark.parametrize("target", [80, 100])
def test_planted_products_of_other_types_are_found(dtype, target):
    text, code = found_in(plant("mul", dtype), target)
    assert text and (code is None or code)


def test_an_integer_division_is_found_for_its_reciprocal():
    text, code = found_in(plant("integer"))
    assert any("reciprocal" in x.reason for x in text)
    assert code is None or any("MUFU" in x.instruction for x in code)


def test_an_addition_is_not_found():
    for dtype in ("fp32", "fp64"):
        assert ptx.scan_kernel(plant("add", dtype), 90).findings == []


def test_an_integer_product_is_found_in_a_loop_only():
    text = ptx.compiled(plant("loop"), 90).asm["ptx"]
    assert ptx.scan_ptx(text) == []
    found = ptx.scan_loops(text)
    assert found and all(re.match(r"(mul|mad)\.lo\.s32", x.instruction) for x in found)
    lines = text.splitlines()
    assert all(x.instruction in lines[x.line - 1] for x in found)
    assert ptx.scan_kernel(plant("loop"), 90, machine=False).findings == found


@pytest.mark.parametrize(
    "instruction",
    [
        "mul.rn.f32x2 %rd1, %rd2, %rd3;", "@%p1 fma.rn.bf16x2 %r1, %r2, %r3, %r4;", "@!%p2 tanh.approx.f32 %f1, %f2;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};", "mad.f64 %d1, %d2, %d3, %d4;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;", "rcp.approx.ftz.f32 %f1, %f2;",
        "{ mul.f16x2 %r1, %r2, %r3; }", "$L__BB0_1: ex2.approx.ftz.bf16x2 %r1, %r2;", "sin.approx.f32 %f1, %f2;",
        "call.uni (retval0), __nv_powf, (param0);", "dp4a.s32.s32 %r1, %r2, %r3, %r4;", "rem.u32 %r1, %r2, %r3;",
        "atom.global.add.f32 %f0, [%rd1], %f2; mul.f32 %f1, %f2, %f3;",
    ],
)  # fmt: skip
def test_written_out_instructions_are_found(instruction):
    assert len(ptx.scan_ptx(f"// mul.f32\n.reg .f32 %f<4>;\n\t{instruction} // comment\n")) == 1


def test_what_is_allowed():
    text = """
    // mul.f32 in a comment
    .file 1 "/mul.f32/x.py"
    add.rn.f32x2 %rd1, %rd2, %rd3;
    @%p1 cvt.rzi.s32.f32 %r1, %f1;
    mul.wide.s32 %rd1, %r1, 4;
    mad.lo.s32 %r1, %r2, %r3, %r4;
    setp.lt.f32 %p1, %f1, %f2;
    st.shared.v4.f32 [%r1], {%f1, %f2, %f3, %f4};
    """
    assert ptx.scan_ptx(text) == []


def test_loops_and_what_is_inside():
    text = "\n".join(
        ["mul.lo.s32 %r0, %r1, 3;", "$L__BB0_1:", "add.s32 %r1, %r1, 1;", "$L__BB0_2:", "mul.lo.s32 %r1, %r1, %r2;",
         "@%p1 bra $L__BB0_2;", "mad.wide.u32 %rd1, %r1, 4, %rd2;", "@%p2 bra $L__BB0_4;", "bra.uni $L__BB0_1;",
         "$L__BB0_4:", "mul.lo.s32 %r5, %r5, %r5;", "ret;"]
    )  # fmt: skip
    inner, outer = ptx.loop_bodies(text)
    assert inner.splitlines()[0] == "$L__BB0_2:" and len(inner.splitlines()) == 3
    assert outer.splitlines()[0] == "$L__BB0_1:" and outer.splitlines()[-1] == "bra.uni $L__BB0_1;"
    assert [x.line for x in ptx.scan_loops(text)] == [5, 7]


def test_machine_code_with_and_without_products():
    lines = {
        "FMUL R1, R2, R3": 1, "FFMA.FTZ R1, R2, R3, R4": 1, "@!P0 MUFU.RCP R1, R2": 1, "DMUL R2, R4, R6": 1,
        "HMMA.16816.F32 R4, R8, R2, R4": 1, "HFMA2.BF16_V2 R1, R2, R3, R4": 1, "HFMA2.MMA R62, -RZ, RZ, 0, 0": 0,
        "HFMA2 R45, -RZ, RZ, 1.875, 0": 0, "HFMA2.MMA R62, -RZ, RZ, R3, 0": 1, "FFMA2 R8, R4.F32x2.HI_LO, R8, R2": 1,
        "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]": 0, "FADD2 R8, R4.F32x2.HI_LO, -R8.F32x2.HI_LO": 0,
        "@!P0 CALL.REL.NOINC 0x26e0": 0, "CALL.ABS.NOINC R2": 1, "UTCHMMA gdesc[UR4], gdesc[UR6]": 1,
        "FADD R1, R2, R3": 0, "FCHK P0, R1, R2": 1,
    }  # fmt: skip
    for line, count in lines.items():
        assert len(ptx.scan_machine_code(f"        /*25d0*/   {line} ;  /* 0x0000000b2e0b7221 */")) == count, line


@pytest.mark.parametrize("target", [80, 90, 100])
def test_no_elementwise_kernel_multiplies(target):
    for operation in OPERATIONS:
        assert ptx.scan_kernel(of_operation(operation), target, machine=target == 90).findings == [], operation


@pytest.mark.slow
@pytest.mark.parametrize("name", CANDIDATES)
def test_no_matrix_kernel_multiplies(name):
    kernels = [of_matrices(name, mode, CANDIDATES[name][mode][0]) for mode in MODES]
    scans = ptx.scan_kernels(kernels)
    assert [scan.target for scan in scans] == ["sm_80", "sm_90", "sm_100"] * 3
    assert all(scan.kernel == name and scan.findings == [] for scan in scans)
    for kernel in kernels:
        bodies = ptx.loop_bodies(ptx.compiled(kernel, 90).asm["ptx"])
        assert bodies and all("add.f32" in body and "ld.global" in body for body in bodies)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
def test_plain_products_cost_one_addition_of_each_kind(target, layout):
    tile = CANDIDATES["matmul"][PLAIN][0]
    (body,) = ptx.loop_bodies(ptx.compiled(of_matrices("matmul", PLAIN, tile, layout), target).asm["ptx"])
    products = tile.rows * tile.columns // (32 * tile.warps)
    assert len(re.findall(r"\badd\.f32\b", body)) == products
    # one more counts the steps
    assert len(re.findall(r"\badd\.s32\b", body)) == products + 1
    assert not re.search(r"\b(sub|and|selp|shl|bar)\.", body)


def test_small_numbers_are_nowhere_read_as_zero_by_the_device():
    kernels = [of_operation(operation) for operation in OPERATIONS]
    kernels += [of_matrices(name, MASKED, CANDIDATES[name][MASKED][0]) for name in CANDIDATES]
    for kernel in kernels:
        text = ptx.compiled(kernel, 90).asm["ptx"]
        assert not [x for _, x in ptx._instructions(text) if ".ftz" in x.split()[0]], kernel.name


def test_all_kernels_are_scanned_by_default(monkeypatch):
    monkeypatch.setattr(ptx, "scan_kernel", lambda kernel, target, machine: (kernel.name, kernel.size, target, machine))
    assert ptx.scan_kernels(machine=False, workers=1) == [
        (k.name, k.size, t, False) for k in KERNELS for t in k.targets
    ]


def test_the_interpreter_must_be_off(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(RuntimeError, match=f"{SWITCH}=1: must be off"):
        ptx.scan_kernels([plant("mul")])


def test_without_a_disassembler_only_ptx_is_scanned(monkeypatch):
    monkeypatch.setattr(ptx, "machine_code", lambda cubin: None)
    assert ptx.scan_kernel(of_operation("sqrt"), 80).findings == []
    assert all("." in x.instruction.split()[0] for x in ptx.scan_kernel(plant("mul"), 80).findings)
