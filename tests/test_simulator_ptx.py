"""The PTX parser and translator, and every family of arithmetic instructions against independent formulas."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from sonic.simulator import engine, ptx
from sonic.simulator.errors import MemoryFault, ParseError, SimulatorError, Unsupported
from sonic.simulator.kernel_launch import LaunchConfig, Region
from sonic.simulator.options import Options
from sonic.simulator.translate import Program

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def module(body: str, num_params: int) -> str:
    """A kernel whose pointer parameters are in %rd0, %rd1...; %r0 is the thread's number."""
    params = ",\n".join(f"    .param .u64 p{n}" for n in range(num_params))
    loads = "\n".join(f"    ld.param.b64 %rd{n}, [p{n}];" for n in range(num_params))
    return f"""
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(
{params}
)
{{
    .reg .pred %p<64>;
    .reg .b16 %h<64>;
    .reg .b32 %r<512>;
    .reg .b64 %rd<128>;
{loads}
    mov.u32 %r0, %tid.x;
{body}
    ret;
}}
"""


def launch(
    body: str,
    arrays: list[np.ndarray],
    *,
    block: int = 32,
    grid: int = 1,
    shared: int = 0,
    options: Options | None = None,
) -> engine.Trace:
    """Run a kernel on arrays."""
    pointers = [ctypes.c_uint64(array.ctypes.data) for array in arrays]
    regions = [Region(array.ctypes.data, array.nbytes, f"array{n}") for n, array in enumerate(arrays)]
    config = LaunchConfig((grid, 1, 1), (block, 1, 1), (1, 1, 1), shared)
    addresses = [ctypes.addressof(pointer) for pointer in pointers]
    return engine.run(module(body, len(arrays)), "k", config, addresses, regions, options or Options())


# ---------------------------------------------------------------- parser


def test_names_belong_to_their_braces() -> None:
    text = module(
        """
    {
    .reg .pred P;
    .reg .v4 .b32 quad;
    setp.eq.s32 P, %r0, 0;
    LOOP:
    @P bra DONE;
    bra LOOP;
    DONE:
    mov.b32 quad.x, 7;
    }
    {
    .reg .pred P;
    setp.ne.s32 P, %r0, 0;
    LOOP: @!P bra LOOP;
    }
    """,
        1,
    )
    kernel = ptx.parse(text, "k")
    branches = [made for made in kernel.instructions if made.parts[0] == "bra"]
    first, second, third = branches
    assert first.guard is not None and third.guard is not None and first.guard.index != third.guard.index
    assert not first.guard.negated and third.guard.negated
    assert second.target == first.pc and third.target == third.pc
    assert kernel.instructions[first.target].text == "mov.b32 quad.x, 7"
    assert {"quad.x", "quad.y", "quad.z", "quad.w"} <= {register.name for register in kernel.registers}


def test_operands_are_read() -> None:
    text = module(
        """
    mov.b32 %r1, 0f3F800000;
    mov.b32 %r2, -0x10;
    mov.b64 {%r3, %r4}, %rd0;
    ld.global.v2.b32 {%r5, %r6}, [%rd0+-8];
    elect.sync %r7|%p1, -1;
    mbarrier.arrive.shared.b64 _, [smem+8];
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, {%r2, %r3}], [%r4];
    """,
        1,
    )
    code = ptx.parse(text, "k").instructions[2:]
    assert code[0].operands[1] == ptx.Imm(0x3F800000, 32)
    assert code[1].operands[1] == ptx.Imm(-16)
    assert isinstance(code[2].operands[0], ptx.Vec) and len(code[2].operands[0].items) == 2
    address = code[3].operands[1]
    assert isinstance(address, ptx.Addr) and address.offset == -8
    assert isinstance(code[4].operands[0], ptx.Pair)
    assert isinstance(code[5].operands[0], ptx.Sink)
    assert code[5].operands[1] == ptx.Addr(ptx.Sym("smem"), 8)
    tensor = code[6].operands[1]
    assert isinstance(tensor, ptx.Addr) and isinstance(tensor.parts[0], ptx.Vec)


def test_parameters_have_sizes_and_alignment() -> None:
    text = """
.version 8.8
.visible .entry k(
    .param .align 64 .b8 k_param_0[128],
    .param .u32 k_param_1,
    .param .u64 .ptr .global .align 4 k_param_2
)
.reqntid 64, 1, 1
{ ret; }
"""
    kernel = ptx.parse(text, "k")
    assert [(param.num_bytes, param.align) for param in kernel.params] == [(128, 64), (4, 4), (8, 8)]
    assert kernel.required_block == (64, 1, 1)
    assert Program(kernel).param_offsets == {"k_param_0": 0, "k_param_1": 128, "k_param_2": 136}


def test_line_info_is_kept() -> None:
    text = '.file 1 "/home/kernel.py"\n' + module("    .loc 1 42 3\n    add.s32 %r1, %r0, 1;", 0)
    made = next(made for made in ptx.parse(text, "k").instructions if made.parts[0] == "add")
    assert made.source == ("/home/kernel.py", 42)
    assert "/home/kernel.py:42" in made.where()


def test_lines_of_inline_assembly_are_not_lines_of_the_source() -> None:
    """The compiler counts the lines of the inserted text on; the last line before it holds."""
    body = """
    .loc 1 111 16
    // begin inline asm
    {
    .reg .pred P1;
    .loc 1 113 16
    LAB_WAIT:
    .loc 1 114 16
    mbarrier.try_wait.parity.shared.b64 P1, [%r0], 0, 10000000;
    @P1 bra.uni DONE;
    .loc 1 116 16
    bra.uni LAB_WAIT;
    DONE:
    }
    // end inline asm
    add.s32 %r1, %r0, 1;
    .loc 1 120 5
    sub.s32 %r1, %r0, 1;
    // begin inline asm
    .loc 1 121 5
    xor.b32 %r1, %r0, 1;
    // end inline asm
    .loc 1 130 5
    or.b32 %r1, %r0, 1;
    """
    code = ptx.parse(module(body, 0) + '.file 1 "kernel.py"\n', "k").instructions
    lines = {made.parts[0]: made.source[1] for made in code if made.source is not None}
    assert lines == {"mbarrier": 111, "bra": 111, "add": 111, "sub": 120, "xor": 120, "or": 130, "ret": 130}


def test_parameters_are_read_through_addresses_in_registers() -> None:
    """Two neighbours at once, at one address and at one that differs between lanes."""
    out, other = np.zeros((32, 3), np.uint64), np.zeros(1, np.uint64)
    body = """
    mov.b64 %rd10, p0;
    ld.param.v2.b64 {%rd11, %rd12}, [%rd10];
    and.b32 %r1, %r0, 1;
    mul.wide.u32 %rd13, %r1, 8;
    add.s64 %rd14, %rd10, %rd13;
    ld.param.b64 %rd15, [%rd14+0];
    mul.wide.u32 %rd16, %r0, 24;
    add.s64 %rd17, %rd0, %rd16;
    st.global.b64 [%rd17], %rd11;
    st.global.b64 [%rd17+8], %rd12;
    st.global.b64 [%rd17+16], %rd15;
    """
    trace = launch(body, [out, other])
    assert out[:, 0].tolist() == [out.ctypes.data] * 32 and out[:, 1].tolist() == [other.ctypes.data] * 32
    assert out[:, 2].tolist() == [out.ctypes.data, other.ctypes.data] * 16
    assert "parameters" not in trace.bytes_by_tensor()
    with pytest.raises(MemoryFault, match="lie outside of the parameters"):
        launch("    mov.b64 %rd10, p0;\n    ld.param.v2.b64 {%rd11, %rd12}, [%rd10+16];", [out, other])
    with pytest.raises(MemoryFault, match="not a multiple of the access's 16 bytes"):
        launch("    mov.b64 %rd10, p0;\n    ld.param.v2.b64 {%rd11, %rd12}, [%rd10+8];", [out, other, other])


@pytest.mark.parametrize(
    "line",
    [
        "vabsdiff.s32 %r1, %r0, %r0;",
        "add.cc.u32 %r1, %r0, %r0;",
        "add.sat.s32 %r1, %r0, %r0;",
        "min.relu.u32 %r1, %r0, %r0;",
        "add.relu.s32 %r1, %r0, %r0;",
        "cvt.rn.satfinite.bf16x2.f32 %r1, %r0, %r0;",
        "cvt.rn.relu.f32.f64 %r1, %rd0;",
        "fma.rn.f32x2 %rd1, %rd0, %rd0, %rd0;",
        "fma.rn.relu.f32 %r1, %r0, %r0, %r0;",
        "tanh.approx.ftz.bf16 %h1, %h1;",
        "red.global.add.noftz.f32 [%rd0], %r1;",
        "red.global.min.v2.f32 [%rd0], {%r1, %r1};",
        "red.shared.add.v2.f32 [%r1], {%r1, %r1};",
        "atom.global.add.v2.f32 {%r1, %r2}, [%rd0], {%r1, %r1, %r1};",
        "createpolicy.cvt.L2.b64 %rd1, %rd0;",
        "match.most.sync.b32 %r1, %r0, -1;",
        "ld.local.b32 %r1, [%rd0];",
        "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %rd1, %rd2, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1;",
        "cp.async.bulk.tensor.2d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], [%rd0, {8, 8}], [8];",
        "red.async.relaxed.cluster.global.add.u32 [%rd0], %r1;",
        "shfl.sync.idx.b64 %rd1, %rd0, 0, 31, -1;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.and.f32x2 [%rd0], [%r1], 128;",
        "add.s32 %r1, {%r0, %r0}, 1;",
        "add.s32 {%r1, %r2}, %r0, 1;",
    ],
)
def test_what_is_not_understood_is_refused_at_load(line: str) -> None:
    with pytest.raises(Unsupported, match=line.split()[0].split(".")[0]):
        launch(f"    {line}", [np.zeros(1, np.uint32)])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ld.local.b32 %r1, [%rd0];", "a load from local memory is not simulated"),
        ("st.local.b32 [%rd0], %r1;", "a store to local memory is not simulated"),
        ("cvta.local.u64 %rd1, %rd0;", "an address of local memory is not simulated"),
        ("ld.global.b128 %rd1, [%rd0];", "a load or store of type .b128 is not understood"),
        ("ld.global.sometimes.b32 %r1, [%rd0];", "modifier .sometimes is not understood"),
        ("cvt.rn.scaled.f32.s32 %r1, %r0;", "modifier .scaled is not understood"),
        ("add.relu.s32 %r1, %r0, %r0;", "modifier .relu is not understood"),
        ("vabsdiff.s32 %r1, %r0, %r0;", "this instruction or one of its modifiers is not understood"),
        ("add.s32 %r1, {%r0, %r0}, 1;", "an operand of this instruction is of a kind that its rule does not know"),
        ("add.s32 {%r1, %r2}, %r0, 1;", "a result of this instruction is of a kind that its rule does not know"),
        ("fma.rn.f64 %rd1, %rd0, %rd0, %rd0;", "a fused product of float64 is not simulated"),
        (
            "setp.lt.u32 %p1, %r0, 5;\n    @%p1 bar.sync 0;",
            "a barrier whose guard differs between lanes is not simulated",
        ),
        ("bar.sync %r0, 32;", "a barrier whose number or count differs between lanes is not simulated"),
        (
            "setp.lt.u32 %p1, %r0, 5;\n    vote.sync.any.pred %p2, %p1, %r0;",
            "a vote whose mask differs between lanes is not simulated",
        ),
    ],
)
def test_a_refusal_names_what_is_not_understood(line: str, told: str) -> None:
    with pytest.raises(Unsupported) as caught:
        launch(f"    {line}", [np.zeros(1, np.uint32)])
    assert told in str(caught.value) and line.split("\n")[-1].strip().rstrip(";") in str(caught.value)


@pytest.mark.parametrize("line", ["bra NOWHERE;", "add.s32 %r1, %unknown, 1;", ".mystery 3;"])
def test_broken_text_is_refused(line: str) -> None:
    with pytest.raises(ParseError):
        launch(f"    {line}", [np.zeros(1, np.uint32)])


# ---------------------------------------------------------------- integers


def signed(value: int, width: int = 32) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bit_field(a: int, start: int, length: int, is_signed: bool) -> int:
    start, length = start & 255, length & 255
    sign = a >> min(start + length - 1, 31) & 1 if is_signed and length else 0
    bits = [a >> start + n & 1 if n < length and start + n <= 31 else sign for n in range(32)]
    return sum(bit << n for n, bit in enumerate(bits))


def prmt(a: int, b: int, control: int) -> int:
    table = [(a | b << 32) >> 8 * n & 255 for n in range(8)]
    result = 0
    for n in range(4):
        selector = control >> 4 * n & 15
        byte = table[selector & 7]
        result |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * n
    return result


def highest_bit(a: int, is_signed: bool) -> int:
    if is_signed and a >> 31:
        a ^= M32
    return M32 if a == 0 else max(n for n in range(32) if a >> n & 1)


INTEGER_OPS: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 D, A, B": lambda a, b, c: a + b,
    "sub.u32 D, A, B": lambda a, b, c: a - b,
    "add.s32 D, A, -7": lambda a, b, c: a - 7,
    "mul.lo.s32 D, A, B": lambda a, b, c: a * b,
    "mul.hi.s32 D, A, B": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 D, A, B": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 D, A, B, C": lambda a, b, c: a * b + c,
    "mad.hi.u32 D, A, B, C": lambda a, b, c: (a * b >> 32) + c,
    "and.b32 D, A, B": lambda a, b, c: a & b,
    "or.b32 D, A, B": lambda a, b, c: a | b,
    "xor.b32 D, A, -2": lambda a, b, c: a ^ 0xFFFFFFFE,
    "not.b32 D, A": lambda a, b, c: ~a,
    "cnot.b32 D, A": lambda a, b, c: int(a == 0),
    "neg.s32 D, A": lambda a, b, c: -a,
    "abs.s32 D, A": lambda a, b, c: abs(signed(a)),
    "min.s32 D, A, B": lambda a, b, c: min(signed(a), signed(b)),
    "max.s32 D, A, B": lambda a, b, c: max(signed(a), signed(b)),
    "min.relu.s32 D, A, B": lambda a, b, c: max(min(signed(a), signed(b)), 0),
    "max.relu.s32 D, A, B": lambda a, b, c: max(signed(a), signed(b), 0),
    "max.relu.s32 D, A, -3": lambda a, b, c: max(signed(a), 0),
    "min.u32 D, A, B": lambda a, b, c: min(a, b),
    "max.u32 D, A, 5": lambda a, b, c: max(a, 5),
    "shl.b32 D, A, C": lambda a, b, c: a << min(c, 32),
    "shr.u32 D, A, C": lambda a, b, c: a >> min(c, 32),
    "shr.s32 D, A, C": lambda a, b, c: signed(a) >> min(c, 32),
    "shl.b32 D, A, 3": lambda a, b, c: a << 3,
    "shr.s32 D, A, 31": lambda a, b, c: signed(a) >> 31,
    "shr.u32 D, A, 40": lambda a, b, c: 0,
    "div.u32 D, A, B": lambda a, b, c: a // b if b else M32,
    "div.s32 D, A, B": lambda a, b, c: toward_zero(signed(a), signed(b)) if b else M32,
    "rem.u32 D, A, B": lambda a, b, c: a % b if b else a,
    "rem.s32 D, A, B": lambda a, b, c: signed(a) - toward_zero(signed(a), signed(b)) * signed(b) if b else a,
    "popc.b32 D, A": lambda a, b, c: bin(a).count("1"),
    "clz.b32 D, A": lambda a, b, c: 32 - len(f"{a:b}") if a else 32,
    "brev.b32 D, A": lambda a, b, c: sum((a >> n & 1) << 31 - n for n in range(32)),
    "bfind.u32 D, A": lambda a, b, c: highest_bit(a, False),
    "bfind.s32 D, A": lambda a, b, c: highest_bit(a, True),
    "bfe.u32 D, A, C, 9": lambda a, b, c: bit_field(a, c, 9, False),
    "bfe.s32 D, A, C, 9": lambda a, b, c: bit_field(a, c, 9, True),
    "bfe.s32 D, A, 3, C": lambda a, b, c: bit_field(a, 3, c, True),
    "bfi.b32 D, A, B, 4, 8": lambda a, b, c: b & ~(255 << 4) | (a & 255) << 4,
    "prmt.b32 D, A, B, C": prmt,
    "prmt.b32 D, A, B, 0x4BA1": lambda a, b, c: prmt(a, b, 0x4BA1),
    "lop3.b32 D, A, B, C, 0x96": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 D, A, B, C, 0xCA": lambda a, b, c: a & b | ~a & c,
    "shf.l.wrap.b32 D, A, B, C": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 D, A, B, C": lambda a, b, c: (b << 32 | a) >> min(c, 32),
}
WIDE_OPS: dict[str, Callable[[int, int, int], int]] = {
    "mul.wide.s32 W, A, B": lambda a, b, c: signed(a) * signed(b),
    "mul.wide.u32 W, A, B": lambda a, b, c: a * b,
    "cvt.s64.s32 W, A": lambda a, b, c: signed(a),
    "cvt.u64.u32 W, A": lambda a, b, c: a,
    "mov.b64 W, {A, B}": lambda a, b, c: a | b << 32,
    "mul.wide.s32 X, A, B;\n    add.s64 W, X, X": lambda a, b, c: 2 * signed(a) * signed(b),
    "mul.wide.u32 X, A, B;\n    mul.lo.s64 W, X, X": lambda a, b, c: (a * b) ** 2,
    "mul.wide.s32 X, A, B;\n    mul.hi.s64 W, X, X": lambda a, b, c: (signed(a) * signed(b)) ** 2 >> 64,
    "mul.wide.s32 X, A, B;\n    shr.s64 W, X, 7": lambda a, b, c: signed(a) * signed(b) >> 7,
    "mov.b64 X, {A, B};\n    shr.u64 W, X, C": lambda a, b, c: (a | b << 32) >> min(c, 64),
    "mov.b64 X, {A, B};\n    shl.b64 W, X, C": lambda a, b, c: (a | b << 32) << min(c, 64),
    "mad.wide.s32 W, A, B, 5": lambda a, b, c: signed(a) * signed(b) + 5,
    "cvt.s64.s32 X, A;\n    div.s64 W, X, -3": lambda a, b, c: toward_zero(signed(a), -3),
    "cvt.s64.s32 X, A;\n    min.s64 W, X, 4": lambda a, b, c: min(signed(a), 4),
}

EDGES = [
    0,
    1,
    2,
    7,
    31,
    32,
    33,
    100,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFE,
    0xFFFFFFFF,
    0xDEADBEEF,
    0x0F0F1234,
]


def samples(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.array(EDGES + rng.integers(0, 1 << 32, 17).tolist(), np.uint32)
    return rng.permutation(values)


def shift_samples() -> np.ndarray:
    return np.array(list(range(30)) + [31, 32], np.uint32) * np.uint32(2)


def substituted(line: str, a: str, b: str, c: str, d: str, wide: str) -> str:
    """Letters of an operation to registers."""
    names = {"A": a, "B": b, "C": c, "D": d, "W": wide, "X": "%rd99"}
    opcode_lines = []
    for part in line.split(";\n"):
        opcode, _, rest = part.strip().partition(" ")
        opcode_lines.append(f"{opcode} " + "".join(names.get(char, char) for char in rest))
    return ";\n    ".join(opcode_lines) + ";"


def hex_safe(line: str) -> str:
    """Letters in hexadecimal constants are no registers."""
    words = []
    for word in line.replace(",", " ,").split(" "):
        words.append(str(int(word, 16)) if word.startswith("0x") else word)
    return " ".join(words).replace(" ,", ",")


def run_operations(operations: dict, wide: bool) -> None:
    """All operations on 32 lanes, then on values that are the same in all lanes; both against the formula."""
    a, b, c = samples(1), samples(2), shift_samples()
    size = 8 if wide else 4
    out = np.zeros(len(operations) * 32, np.uint64 if wide else np.uint32)
    same = np.zeros_like(out)
    lines = ["mul.wide.u32 %rd50, %r0, 4;", f"mul.wide.u32 %rd51, %r0, {size};", "add.s64 %rd53, %rd3, %rd51;"]
    for n in range(3):
        lines += [f"add.s64 %rd52, %rd{n}, %rd50;", f"ld.global.b32 %r{n + 1}, [%rd52];"]
    kind = "b64" if wide else "b32"
    result = "%rd98" if wide else "%r9"
    for n, operation in enumerate(operations):
        lines.append(substituted(hex_safe(operation), "%r1", "%r2", "%r3", "%r9", "%rd98"))
        lines.append(f"st.global.{kind} [%rd53+{n * 32 * size}], {result};")
    for lane in range(0, 32, 3):
        lines += [f"ld.global.b32 %r{n + 11}, [%rd{n}+{lane * 4}];" for n in range(3)]
        for n, operation in enumerate(operations):
            lines.append(substituted(hex_safe(operation), "%r11", "%r12", "%r13", "%r19", "%rd97").replace("99", "96"))
            source = "%rd97" if wide else "%r19"
            lines.append(f"st.global.{kind} [%rd4+{(n * 32 + lane) * size}], {source};")
    launch("\n".join("    " + line for line in lines), [a, b, c, out, same])
    mask = M64 if wide else M32
    for n, (operation, formula) in enumerate(operations.items()):
        for lane in range(32):
            x, y, z = int(a[lane]), int(b[lane]), int(c[lane])
            want = formula(x, y, z) & mask
            assert int(out[n * 32 + lane]) == want, f"{operation} of {x:#x}, {y:#x}, {z:#x} in 32 lanes"
            if lane % 3 == 0:
                assert int(same[n * 32 + lane]) == want, f"{operation} of {x:#x}, {y:#x}, {z:#x}, same in all lanes"


def test_integers() -> None:
    run_operations(INTEGER_OPS, wide=False)


def test_wide_integers() -> None:
    run_operations(WIDE_OPS, wide=True)


COMPARISONS = {
    "eq.s32": lambda a, b: a == b,
    "ne.b32": lambda a, b: a != b,
    "lt.s32": lambda a, b: signed(a) < signed(b),
    "le.u32": lambda a, b: a <= b,
    "gt.s32": lambda a, b: signed(a) > signed(b),
    "ge.u32": lambda a, b: a >= b,
    "lo.u32": lambda a, b: a < b,
    "hs.u32": lambda a, b: a >= b,
}


def test_predicates_and_selection() -> None:
    operations: dict[str, Callable[[int, int, int], int]] = {}
    for name, formula in COMPARISONS.items():
        operations[f"setp.{name} %p1, A, B;\n    selp.b32 D, A, 3, %p1"] = lambda a, b, c, formula=formula: (
            a if formula(a, b) else 3
        )
    operations["setp.lt.s32 %p2, A, 0;\n    setp.gt.and.u32 %p1, B, 9, %p2;\n    selp.b32 D, 1, 0, %p1"] = (
        lambda a, b, c: int(signed(a) < 0 and b > 9)
    )
    operations["setp.lt.s32 %p2, A, 0;\n    setp.gt.or.u32 %p1, B, 9, !%p2;\n    selp.b32 D, 1, 0, %p1"] = (
        lambda a, b, c: int(signed(a) >= 0 or b > 9)
    )
    operations[
        "setp.lt.s32 %p1, A, B;\n    not.pred %p2, %p1;\n    xor.pred %p3, %p2, %p1;\n    selp.b32 D, A, B, %p3"
    ] = lambda a, b, c: a
    operations["setp.lt.s32 %p1, A, B;\n    mov.b32 D, 5;\n    @%p1 add.s32 D, A, 1"] = lambda a, b, c: (
        a + 1 if signed(a) < signed(b) else 5
    )
    operations["setp.lt.s32 %p1, A, B;\n    mov.b32 D, 5;\n    @!%p1 mov.b32 D, C"] = lambda a, b, c: (
        5 if signed(a) < signed(b) else c
    )
    run_operations(operations, wide=False)


def test_sixteen_bits_and_packing() -> None:
    operations: dict[str, Callable[[int, int, int], int]] = {
        "mov.b32 {%h1, %h2}, A;\n    mov.b32 D, {%h2, %h1}": lambda a, b, c: a >> 16 | a << 16,
        "mov.b32 {%h1, %h2}, A;\n    add.s16 %h3, %h1, %h2;\n    cvt.u32.u16 D, %h3": lambda a, b, c: (
            (a >> 16) + (a & 0xFFFF) & 0xFFFF
        ),
        "mov.b32 {%h1, %h2}, A;\n    shr.s16 %h3, %h2, 3;\n    cvt.s32.s16 D, %h3": lambda a, b, c: (
            signed(a >> 16, 16) >> 3
        ),
        "mov.b32 {%h1, %h2}, A;\n    mul.wide.s16 D, %h1, %h2": lambda a, b, c: signed(a, 16) * signed(a >> 16, 16),
        "cvt.u16.u32 %h1, A;\n    cvt.u32.u16 D, %h1": lambda a, b, c: a & 0xFFFF,
        "cvt.s8.s32 %r30, A;\n    mov.b32 D, %r30": lambda a, b, c: signed(a, 8),
        "cvt.u8.u32 %r30, A;\n    mov.b32 D, %r30": lambda a, b, c: a & 255,
        "cvt.sat.u8.s32 %r30, A;\n    mov.b32 D, %r30": lambda a, b, c: max(0, min(255, signed(a))),
        "mov.b64 %rd60, {A, B};\n    cvt.u32.u64 D, %rd60": lambda a, b, c: a,
        "mov.b64 %rd60, {A, B};\n    mov.b64 {%r30, %r31}, %rd60;\n    mov.b32 D, %r31": lambda a, b, c: b,
    }
    run_operations(operations, wide=False)


# ---------------------------------------------------------------- floating point


def f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def float_samples(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, 1.0, -1.5, 1e-40, -3e38, 65504.0, 448.0, 0.3333], np.float32)
    other = (rng.standard_normal(32 - len(special)) * 10.0 ** rng.integers(-6, 6, 32 - len(special))).astype(np.float32)
    return rng.permutation(np.concatenate([special, other]))


def one_rounding(exact: Fraction, rounding: str = "rn") -> np.float32:
    """Nearest float32 (ties to even), or the next one down or towards zero, by comparing exact fractions."""
    near = np.float32(float(exact))
    with np.errstate(all="ignore"):
        around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    if rounding == "rm":
        return max(value for value in around if Fraction(float(value)) <= exact)
    if rounding == "rz":
        return min((value for value in around if abs(Fraction(float(value))) <= abs(exact)), key=lambda v: -abs(v))
    return min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(np.asarray(v).view(np.uint32)) & 1))


def run_floats(lines: list[str], inputs: list[np.ndarray], words: int) -> np.ndarray:
    """Loads inputs to %r1, %r2, %r3, runs lines, stores %r10, %r11... per lane."""
    out = np.zeros((32, words), np.uint32)
    text = ["mul.wide.u32 %rd50, %r0, 4;", f"mul.wide.u32 %rd51, %r0, {4 * words};"]
    for n in range(len(inputs)):
        text += [f"add.s64 %rd52, %rd{n}, %rd50;", f"ld.global.b32 %r{n + 1}, [%rd52];"]
    text += lines + [f"add.s64 %rd53, %rd{len(inputs)}, %rd51;"]
    text += [f"st.global.b32 [%rd53+{4 * n}], %r{10 + n};" for n in range(words)]
    launch("\n".join("    " + line for line in text), [*inputs, out])
    return out


def test_fused_products_round_once() -> None:
    rng = np.random.default_rng(0)
    # Products next to half-way cases: 1 + 2^-12 squared plus something tiny of either sign.
    a = np.float32(1) + np.float32(2.0**-12) * rng.integers(-4, 5, 32).astype(np.float32)
    b = np.float32(1) + np.float32(2.0**-12) * rng.integers(-4, 5, 32).astype(np.float32)
    c = (2.0 ** rng.integers(-90, 2, 32) * rng.choice([-1, 1], 32)).astype(np.float32)
    lines = [
        "fma.rn.f32 %r10, %r1, %r2, %r3;",
        "fma.rm.f32 %r11, %r1, %r2, %r3;",
        "fma.rz.f32 %r12, %r1, %r2, %r3;",
        "add.rz.f32 %r13, %r1, %r3;",
    ]
    out = run_floats(lines, [a, b, c], 4)
    for lane in range(32):
        x, y, z = (Fraction(float(value[lane])) for value in (a, b, c))
        for column, (exact, rounding) in enumerate(
            [(x * y + z, "rn"), (x * y + z, "rm"), (x * y + z, "rz"), (x + z, "rz")]
        ):
            assert f32(out)[lane, column] == one_rounding(exact, rounding), (lane, column)


def test_float_arithmetic() -> None:
    a, b = float_samples(1), float_samples(2)
    a[3] = np.nan
    lines = [
        "add.f32 %r10, %r1, %r2;",
        "sub.rn.f32 %r11, %r1, %r2;",
        "mul.f32 %r12, %r1, %r2;",
        "div.rn.f32 %r13, %r1, %r2;",
        "min.f32 %r14, %r1, %r2;",
        "max.f32 %r15, %r1, %r2;",
        "neg.f32 %r16, %r1;",
        "abs.f32 %r17, %r1;",
        "copysign.f32 %r18, %r1, %r2;",
        "add.ftz.f32 %r19, %r1, 0f00000000;",
        "add.sat.f32 %r20, %r1, %r2;",
        "sqrt.rn.f32 %r21, %r1;",
        "setp.lt.f32 %p1, %r1, %r2;",
        "selp.f32 %r22, 0f3F800000, 0f00000000, %p1;",
        "setp.neu.f32 %p2, %r1, %r2;",
        "selp.f32 %r23, 0f3F800000, 0f00000000, %p2;",
        "setp.nan.f32 %p3, %r1, %r2;",
        "selp.f32 %r24, 0f3F800000, 0f00000000, %p3;",
        "ex2.approx.ftz.f32 %r25, %r2;",
        "rcp.approx.ftz.f32 %r26, %r2;",
        "max.NaN.f32 %r27, %r1, %r2;",
    ]
    out = f32(run_floats(lines, [a, b], 18))
    with np.errstate(all="ignore"):
        total = a + b
        flushed = np.where(np.abs(a) < np.finfo(np.float32).tiny, 0, a)
        flushed_b = np.where(np.abs(b) < np.finfo(np.float32).tiny, np.copysign(0, b), b).astype(np.float32)
        want = [
            total,
            a - b,
            a * b,
            a / b,
            np.where(np.isnan(a), b, np.minimum(a, b)),
            np.where(np.isnan(a), b, np.maximum(a, b)),
            -a,
            np.abs(a),
            np.copysign(b, a),
            flushed,
            np.where(np.isnan(total), 0, np.clip(total, 0, 1)),
            np.sqrt(a),
            (a < b).astype(np.float32),
            (~(a == b)).astype(np.float32),
            np.isnan(a).astype(np.float32),
            np.exp2(flushed_b),
            np.where(np.abs(1 / flushed_b) < np.finfo(np.float32).tiny, np.copysign(0, b), 1 / flushed_b),
            np.maximum(a, b),
        ]
    for column, values in enumerate(want):
        np.testing.assert_array_equal(out[:, column], values, err_msg=lines[column])


def test_rounding_to_narrow_types_is_torchs() -> None:
    rng = np.random.default_rng(3)
    # Random bits, half-way cases of bf16 and fp16, overflow, infinities, no-numbers.
    bits = rng.integers(0, 1 << 32, 32).astype(np.uint32)
    bits[:8] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x477FF000, 0x33000000]
    a, b = f32(bits).copy(), float_samples(5)
    lines = [
        "cvt.rn.bf16x2.f32 %r10, %r1, %r2;",
        "cvt.rn.f16x2.f32 %r11, %r1, %r2;",
        "cvt.rn.bf16.f32 %h1, %r1;",
        "cvt.f32.bf16 %r12, %h1;",
        "cvt.rn.f16.f32 %h2, %r1;",
        "cvt.f32.f16 %r13, %h2;",
        "cvt.rna.tf32.f32 %r14, %r1;",
    ]
    out = run_floats(lines, [a, b], 5)
    for column, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        for shift, source in ((16, a), (0, b)):
            got = torch.from_numpy((out[:, column] >> shift & 0xFFFF).astype(np.uint16)).view(dtype).float()
            want = torch.from_numpy(source).to(dtype).float()
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for column, dtype in ((2, torch.bfloat16), (3, torch.float16)):
        want = torch.from_numpy(a).to(dtype).float().numpy()
        np.testing.assert_array_equal(f32(out)[:, column], want)
    assert not (out[np.isfinite(a), 4] & 0x1FFF).any()
    finite = np.isfinite(a) & (np.abs(a) < 1e38)
    assert (np.abs(f32(out)[finite, 4] - a[finite]) <= np.abs(a[finite]) * 2.0**-11 + 1e-41).all()


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_torchs(name: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    a = np.clip(float_samples(6), -limit, limit)
    b = (np.random.default_rng(4).standard_normal(32) * 0.02).astype(np.float32)
    a[0], a[1], a[2] = limit * 3, -np.inf, np.nan
    lines = [
        f"cvt.rn.satfinite.{name}x2.f32 %h1, %r1, %r2;",
        "cvt.u32.u16 %r10, %h1;",
        f"cvt.rn.f16x2.{name}x2 %r11, %h1;",
    ]
    out = run_floats(lines, [a, b], 2)
    want_a = torch.from_numpy(np.clip(a, -limit, limit)).to(dtype).float().numpy()
    for shift, want in ((8, want_a), (0, torch.from_numpy(b).to(dtype).float().numpy())):
        codes = torch.from_numpy((out[:, 0] >> shift & 255).astype(np.uint8)).view(dtype).float().numpy()
        np.testing.assert_array_equal(codes, want)
        halves = (out[:, 1] >> 2 * shift & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(halves, codes)


def test_floats_to_integers_and_back() -> None:
    a = float_samples(7)
    a[:6] = [2.5, 3.5, -2.5, 3e9, -1e20, np.nan]
    b = samples(8).view(np.float32)
    modes = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    lines = [f"cvt.{mode}.s32.f32 %r{10 + n}, %r1;" for n, mode in enumerate(modes)]
    lines += ["cvt.rzi.u32.f32 %r14, %r1;", "cvt.rn.f32.s32 %r15, %r2;", "cvt.rn.f32.u32 %r16, %r2;"]
    lines += ["cvt.rmi.f32.f32 %r17, %r1;", "cvt.sat.f32.f32 %r18, %r1;"]
    out = run_floats(lines, [a, b], 9)
    for lane in range(32):
        value = float(a[lane])
        for column, call in enumerate(modes.values()):
            want = 0 if np.isnan(value) else int(max(-(2**31), min(2**31 - 1, call(value))))
            assert signed(int(out[lane, column])) == want, (value, column)
        assert int(out[lane, 4]) == (0 if np.isnan(value) else int(max(0, min(M32, np.trunc(value)))))
    integers = b.view(np.uint32)
    np.testing.assert_array_equal(f32(out)[:, 5], integers.view(np.int32).astype(np.float32))
    np.testing.assert_array_equal(f32(out)[:, 6], integers.astype(np.float32))
    np.testing.assert_array_equal(f32(out)[:, 7], np.floor(a))
    np.testing.assert_array_equal(f32(out)[:, 8], np.where(np.isnan(a), 0, np.clip(a, 0, 1)))


def test_packed_halves() -> None:
    rng = np.random.default_rng(9)
    pairs = [torch.from_numpy(rng.standard_normal((32, 2)).astype(np.float32)) for _ in range(3)]
    for dtype, name in ((torch.float16, "f16x2"), (torch.bfloat16, "bf16x2")):
        narrow = [pair.to(dtype) for pair in pairs]
        inputs = [pair.view(torch.int16).numpy().copy().view(np.float32)[:, 0] for pair in narrow]
        lines = [f"fma.rn.{name} %r10, %r1, %r2, %r3;", f"add.{name} %r11, %r1, %r2;", f"max.{name} %r12, %r1, %r2;"]
        out = run_floats(lines, inputs, 3)
        x, y, z = (pair.double() for pair in narrow)
        for column, exact in enumerate([x * y + z, x + y, torch.maximum(x, y)]):
            words = np.ascontiguousarray(out[:, column]).view(np.uint16).reshape(32, 2)
            got = torch.from_numpy(words).view(dtype)
            # float64 holds these sums exactly, so one rounding is torch's
            assert torch.equal(got, exact.to(dtype)), (name, column)


# ---------------------------------------------------------------- lanes


def shuffle_formula(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    clamp, segment = c & 31, c >> 8 & 31
    most, least = lane & segment | clamp & ~segment, lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
    inside = source >= most if mode == "up" else source <= most
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    amounts = [0, 1, 5, 16, 31]
    clamps = [0 if mode == "up" else 31, 7 | 24 << 8, 24 << 8]
    cases = list(itertools.product(amounts, clamps))
    a, amount = samples(1), np.arange(32, dtype=np.uint32)[::-1] % 9
    lines = []
    for n, (b, c) in enumerate(cases):
        lines += [
            f"shfl.sync.{mode}.b32 %r{10 + 2 * n}|%p1, %r1, {b}, {c}, -1;",
            f"selp.b32 %r{11 + 2 * n}, 1, 0, %p1;",
        ]
    lines.append(f"shfl.sync.{mode}.b32 %r{10 + 2 * len(cases)}, %r1, %r2, {clamps[0]}, -1;")
    out = run_floats(lines, [a, np.ascontiguousarray(amount)], 2 * len(cases) + 1)
    for lane in range(32):
        for n, (b, c) in enumerate(cases):
            source, inside = shuffle_formula(mode, lane, b, c)
            assert out[lane, 2 * n] == a[source] and out[lane, 2 * n + 1] == inside, (lane, b, c)
        source, _ = shuffle_formula(mode, lane, int(amount[lane]), clamps[0])
        assert out[lane, -1] == a[source]


def test_votes_elections_and_reductions() -> None:
    a = samples(1)
    lines = [
        "setp.lt.s32 %p1, %r1, 0;",
        "vote.sync.ballot.b32 %r10, %p1, -1;",
        "vote.sync.any.pred %p2, %p1, -1;",
        "selp.b32 %r11, 1, 0, %p2;",
        "vote.sync.all.pred %p3, %p1, -1;",
        "selp.b32 %r12, 1, 0, %p3;",
        "elect.sync %r13|%p4, -1;",
        "selp.b32 %r14, 1, 0, %p4;",
        "activemask.b32 %r15;",
        "redux.sync.add.s32 %r16, %r1, -1;",
        "redux.sync.max.u32 %r17, %r1, -1;",
        "and.b32 %r30, %r1, 1;",
        "match.any.sync.b32 %r18, %r30, -1;",
    ]
    out = run_floats(lines, [a], 9)
    ballot = sum(1 << lane for lane in range(32) if signed(int(a[lane])) < 0)
    total = int(a.astype(np.uint64).sum()) & M32
    odd = sum(1 << lane for lane in range(32) if a[lane] & 1)
    for lane in range(32):
        match = odd if a[lane] & 1 else M32 ^ odd
        want = [ballot, 1, 0, 0, int(lane == 0), M32, total, int(a.max()), match]
        assert out[lane].tolist() == want


def test_lanes_go_apart_and_meet() -> None:
    """A loop with as many turns as the lane says; then a shuffle of all lanes."""
    out = np.zeros(32, np.uint32)
    body = """
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 bra BEHIND;
AGAIN:
    add.s32 %r2, %r2, %r1;
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p2, %r1, %r0;
    @%p2 bra AGAIN;
BEHIND:
    and.b32 %r3, %r0, 1;
    setp.eq.s32 %p3, %r3, 0;
    mov.b32 %r5, 100;
    @%p3 bra EVEN;
    mov.b32 %r5, 200;
EVEN:
    shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
    add.s32 %r4, %r4, %r5;
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd2, %rd0, %rd1;
    st.global.b32 [%rd2], %r4;
    """
    launch(body, [out])
    sums = [sum(range(lane)) for lane in range(32)]
    assert out.tolist() == [sums[lane ^ 1] + (200 if lane & 1 else 100) for lane in range(32)]


def test_values_that_seemed_equal_are_told_apart() -> None:
    """The two sides of a branch leave different constants: the register is not uniform, whatever its writers say."""
    out = np.zeros(64, np.uint32)
    body = """
    mov.b32 %r1, 10;
    setp.gt.u32 %p1, %r0, 40;
    @%p1 bra SKIP;
    mov.b32 %r1, 20;
SKIP:
    add.s32 %r2, %r1, 1;
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd2, %rd0, %rd1;
    st.global.b32 [%rd2], %r2;
    """
    for _ in range(2):  # the second time with what was learned
        out[:] = 0
        launch(body, [out], block=64)
        assert out.tolist() == [21 if thread <= 40 else 11 for thread in range(64)]


def test_blocks_of_an_odd_size_and_grids() -> None:
    out = np.zeros(3 * 50, np.uint32)
    body = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    mul.wide.u32 %rd1, %r3, 4;
    add.s64 %rd2, %rd0, %rd1;
    st.global.b32 [%rd2], %r3;
    """
    trace = launch(body, [out], block=50, grid=3)
    assert out.tolist() == list(range(150))
    assert trace.traffic["st.global", "array0"].num_bytes == 600


def test_a_wrong_block_is_refused() -> None:
    text = module("", 0).replace(")\n{", ")\n.reqntid 64, 1, 1\n{")
    with pytest.raises(SimulatorError, match="requires"):
        engine.run(text, "k", LaunchConfig((1, 1, 1), (32, 1, 1), (1, 1, 1)), [], [], Options())
