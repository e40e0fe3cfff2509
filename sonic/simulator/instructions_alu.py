"""Integer, logic, comparison, selection and moves.

Integers wrap as in hardware. A result that is the same in all lanes is computed on Python integers, others on arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .instructions_common import (
    MASKS,
    Emitter,
    all_uniform,
    bits_of,
    emits,
    plain,
    refuse,
    runtime,
    take,
)
from .ptx import Imm, Instruction, Operand, Pair, Reg, Vec

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")


def integer_only(made: Instruction, uniform: Any) -> bool:
    """Uniform if sources are, and if the type is an integer: floats are always computed on arrays."""
    return made.parts[-1] in (*INTEGERS, *BITS, "pred") and all_uniform(made, uniform)


@runtime
def spread(value: int, dtype: Any) -> np.ndarray:
    """One value in 32 lanes."""
    return np.full(32, value, dtype)


def wants_scalar(e: Emitter, made: Instruction) -> bool:
    """Whether the first result is one integer for all lanes."""
    return e.is_scalar_result(made.operands[0])


def float_arithmetic(e: Emitter, made: Instruction) -> None:
    """add, sub, mul, min, max, neg, abs of floats; lives with the floats."""
    from .instructions_float import arithmetic

    arithmetic(e, made)


def _is_float(made: Instruction) -> bool:
    return made.parts[-1] in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


@emits("add", "sub", "min", "max", scalar=integer_only)
def emit_add(e: Emitter, made: Instruction) -> None:
    """Sum, difference, least, greatest."""
    if _is_float(made):
        float_arithmetic(e, made)
        return
    root, kind = made.parts[0], made.parts[-1]
    clamps = root in ("min", "max") and kind == "s32" and made.parts[1] == "relu"
    take(made, (*INTEGERS, "relu") if clamps else INTEGERS)
    if len(made.parts) != 2 + clamps:
        raise refuse(made)
    width = bits_of(kind)
    d, a, b = made.operands
    if root in ("min", "max"):
        if wants_scalar(e, made):
            text = f"{root}({e.typed(a, kind)}, {e.typed(b, kind)})"
            text = f"max({text}, 0)" if clamps else text
            e.write(d, f"{text} & {MASKS[width]}", f"u{width}")
        else:
            x, y = e.vectors([a, b], kind)
            text = f"np.{root}imum({x}, {y})"
            e.write(d, f"np.maximum({text}, {e.constant(0, kind, False)})" if clamps else text, kind)
        return
    sign = "+" if root == "add" else "-"
    if wants_scalar(e, made):
        e.write(d, f"({e.scalar(a, width)} {sign} {e.scalar(b, width)}) & {MASKS[width]}", f"u{width}")
    else:
        x, y = e.vectors([a, b], f"u{width}")
        e.write(d, f"{x} {sign} {y}", f"u{width}")


@runtime
def high_product(a: np.ndarray, b: np.ndarray, signed: bool) -> np.ndarray:
    """Upper 64 bits of the product of 64-bit integers."""
    kind = np.int64 if signed else np.uint64
    pairs = zip(a.view(kind).tolist(), b.view(kind).tolist(), strict=True)
    return np.array([(x * y >> 64) & MASKS[64] for x, y in pairs], np.uint64)


@emits("mul", "mad", scalar=integer_only)
def emit_mul(e: Emitter, made: Instruction) -> None:
    """Product: low half, high half, or of twice the width; with a sum for ``mad``."""
    if _is_float(made):
        float_arithmetic(e, made)
        return
    take(made, ("lo", "hi", "wide", *INTEGERS))
    if len(made.parts) != 3 or made.parts[1] not in ("lo", "hi", "wide") or made.parts[2] not in INTEGERS:
        raise refuse(made)
    root, half, kind = made.parts
    width = bits_of(kind)
    wide = width * 2 if half == "wide" else width
    d, a, b = made.operands[:3]
    c = made.operands[3] if root == "mad" else None
    if wants_scalar(e, made):
        text = f"{e.typed(a, kind)} * {e.typed(b, kind)}"
        if half == "hi":
            text = f"({text} >> {width})"
        if c is not None:
            text = f"{text} + {e.scalar(c, wide)}"
        e.write(d, f"({text}) & {MASKS[wide]}", f"u{wide}")
        return
    if half == "lo":
        x, y = e.vectors([a, b], f"u{width}")
        text = f"{x} * {y}"
    elif width == 64:
        x, y = e.vector(a, "u64", full=True), e.vector(b, "u64", full=True)
        if half == "wide":
            raise refuse(made)
        text = f"high_product({x}, {y}, {kind == 's64'})"
    else:
        x, y = e.vectors([a, b], kind)
        big = f"{kind[0]}{width * 2}"
        text = f"np.multiply({x}, {y}, dtype=T_{big})"
        if half == "hi":
            text = f"({text} >> {width}).astype(T_{kind[0]}{width}).view(T_u{width})"
        else:
            text = f"{text}.view(T_u{wide})" if kind[0] == "s" else text
    if c is not None:
        text = f"{text} + {e.vector(c, f'u{wide}')}"
    e.write(d, text, f"u{wide}")


@emits("neg", "abs", scalar=integer_only)
def emit_neg(e: Emitter, made: Instruction) -> None:
    """Sign change and magnitude."""
    if _is_float(made):
        float_arithmetic(e, made)
        return
    take(made, ("s16", "s32", "s64"))
    root, kind = made.parts
    width = bits_of(kind)
    d, a = made.operands
    if wants_scalar(e, made):
        call = "-" if root == "neg" else "abs"
        e.write(d, f"{call}({e.signed(a, width)}) & {MASKS[width]}", f"u{width}")
    else:
        call = "np.negative" if root == "neg" else "np.abs"
        e.write(d, f"{call}({e.vector(a, kind, full=True)})", kind)


_LOGIC = {"and": "&", "or": "|", "xor": "^"}


@emits("and", "or", "xor", scalar=integer_only)
def emit_logic(e: Emitter, made: Instruction) -> None:
    """Bitwise operators, and those of predicates."""
    take(made, (*BITS, "pred"))
    sign = _LOGIC[made.parts[0]]
    d, a, b = made.operands
    kind = plain(made.parts[1])
    if wants_scalar(e, made):
        e.write(d, f"{e.scalar(a, bits_of(made.parts[1]))} {sign} {e.scalar(b, bits_of(made.parts[1]))}", kind)
    else:
        x, y = e.vectors([a, b], kind)
        e.write(d, f"{x} {sign} {y}", kind)


@emits("not", scalar=integer_only)
def emit_not(e: Emitter, made: Instruction) -> None:
    """Complement."""
    take(made, (*BITS, "pred"))
    d, a = made.operands
    width = bits_of(made.parts[1])
    kind = plain(made.parts[1])
    if wants_scalar(e, made):
        e.write(d, f"not {e.scalar(a, 1)}" if width == 1 else f"{e.scalar(a, width)} ^ {MASKS[width]}", kind)
    else:
        e.write(d, f"~{e.vector(a, kind, full=True)}", kind)


@emits("cnot", scalar=integer_only)
def emit_cnot(e: Emitter, made: Instruction) -> None:
    """One where the source is zero."""
    take(made, BITS)
    d, a = made.operands
    kind = plain(made.parts[1])
    if wants_scalar(e, made):
        e.write(d, f"int({e.scalar(a, bits_of(kind))} == 0)", kind)
    else:
        e.write(d, f"({e.vector(a, kind, full=True)} == 0).astype(T_{kind})", kind)


@runtime
def shift_left(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Left shift; by the width or more gives zero."""
    width = a.dtype.itemsize * 8
    a, amount = np.broadcast_arrays(a, amount)
    return np.where(amount < width, a << np.minimum(amount, width - 1).astype(a.dtype), a.dtype.type(0))


@runtime
def shift_right(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Right shift; by the width or more gives zero, or the sign for signed types."""
    width = a.dtype.itemsize * 8
    a, amount = np.broadcast_arrays(a, amount)
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount < width, shifted, a.dtype.type(0))


@emits("shl", "shr", scalar=integer_only)
def emit_shift(e: Emitter, made: Instruction) -> None:
    """Shifts; the amount is 32 bits wide and clamped to the width."""
    take(made, (*BITS, *INTEGERS))
    root, kind = made.parts
    width = bits_of(kind)
    kind = plain(kind) if root == "shr" else f"u{width}"
    d, a, amount = made.operands
    if wants_scalar(e, made):
        count = (
            str(min(amount.value & MASKS[32], width))
            if isinstance(amount, Imm)
            else f"min({e.scalar(amount, 32)}, {width})"
        )
        text = f"({e.scalar(a, width)} << {count})" if root == "shl" else f"({e.typed(a, kind)} >> {count})"
        e.write(d, f"{text} & {MASKS[width]}", f"u{width}")
        return
    call = "shift_left" if root == "shl" else "shift_right"
    x = e.vector(a, kind, full=True)
    if isinstance(amount, Imm):
        count_value = amount.value & MASKS[32]
        if count_value < width:
            sign = "<<" if root == "shl" else ">>"
            e.write(d, f"{x} {sign} {e.constant(count_value, kind)}", kind)
        else:
            e.write(d, f"{call}({x}, T_u32({count_value}))", kind)
    else:
        e.write(d, f"{call}({x}, {e.vector(amount, 'u32')})", kind)


@runtime
def divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """Quotient towards zero, or remainder with the sign of the dividend; division by zero gives all bits set."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        result = a % safe if remainder else a // safe
    else:
        least = np.iinfo(a.dtype).min
        overflow = (a == least) & (safe == -1)
        safe = np.where(overflow, b.dtype.type(1), safe)
        rest = np.fmod(a, safe)
        result = np.where(overflow, b.dtype.type(0), rest) if remainder else (a - rest) // safe
    return np.where(zero, a if remainder else ~a.dtype.type(0), result)


@runtime
def divide_integers(a: int, b: int, remainder: bool, width: int) -> int:
    """The same on Python integers; the result is unsigned bits."""
    if b == 0:
        result = a if remainder else -1
    else:
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        result = a - quotient * b if remainder else quotient
    return result & MASKS[width]


@emits("div", "rem", scalar=integer_only)
def emit_divide(e: Emitter, made: Instruction) -> None:
    """Integer quotient and remainder."""
    if _is_float(made):
        float_arithmetic(e, made)
        return
    take(made, INTEGERS)
    root, kind = made.parts
    d, a, b = made.operands
    if wants_scalar(e, made):
        x, y = e.typed(a, kind), e.typed(b, kind)
        e.write(d, f"divide_integers({x}, {y}, {root == 'rem'}, {bits_of(kind)})", f"u{bits_of(kind)}")
    else:
        x, y = e.vectors([a, b], kind)
        e.write(d, f"divide({x}, {y}, {root == 'rem'})", kind)


# ---------------------------------------------------------------- comparison and selection

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}


def _compare_scalar_rule(made: Instruction, uniform: Any) -> bool:
    return made.parts[-1] in (*INTEGERS, *BITS) and all_uniform(made, uniform)


@emits("setp", scalar=_compare_scalar_rule)
def emit_setp(e: Emitter, made: Instruction) -> None:
    """Comparison, optionally combined with a predicate."""
    parts = [part for part in made.parts[1:] if part != "ftz"]
    compare, kind = parts[0], parts[-1]
    combine = parts[1] if len(parts) == 3 else None
    if len(parts) not in (2, 3) or combine not in (None, "and", "or", "xor"):
        raise refuse(made)
    is_float = kind in ("f16", "bf16", "f32", "f64")
    d, a, b = made.operands[:3]
    second: Operand | None = None
    if isinstance(d, Pair):
        second = d.second
        d = d.first
    known = {**COMPARE, **UNORDERED} if is_float else {**COMPARE, **UNSIGNED}
    is_nan_test = is_float and compare in ("num", "nan")
    if kind not in (*INTEGERS, *BITS, "f16", "bf16", "f32", "f64") or (compare not in known and not is_nan_test):
        raise refuse(made)
    if not is_float and compare in UNSIGNED:
        kind = f"u{bits_of(kind)}"
    kind = plain(kind)
    if e.is_scalar_result(d):
        if compare in ("eq", "ne"):
            text = f"{e.scalar(a, bits_of(kind))} {known[compare]} {e.scalar(b, bits_of(kind))}"
        else:
            text = f"{e.typed(a, kind)} {known[compare]} {e.typed(b, kind)}"
    else:
        x, y = e.vectors([a, b], kind)
        if made.parts[-1] == "bf16":
            x, y = f"from_bf16({x})", f"from_bf16({y})"
        if "ftz" in made.parts:
            x, y = f"flush({x})", f"flush({y})"
        if is_nan_test:
            text = f"(np.isnan({x}) | np.isnan({y}))"
            text = text if compare == "nan" else f"~{text}"
        elif is_float and compare == "ne":  # ordered: false where one is no number
            text = f"(({x} < {y}) | ({x} > {y}))"
        elif is_float and compare in UNORDERED and compare != "neu":
            text = f"(({x} {known[compare]} {y}) | np.isnan({x}) | np.isnan({y}))"
        else:
            text = f"{x} {known[compare]} {y}"
    if second is not None:
        if combine is not None or e.is_scalar_result(d) or not isinstance(second, Reg):
            raise refuse(made)
        text = e.temp(text)
        e.write(second, f"~{text}", "b1")
    if combine is not None:
        c = made.operands[3]
        other = e.scalar(c, 1) if e.is_scalar_result(d) else e.vector(c, "b1")
        text = f"({text}) {_LOGIC[combine]} {other}"
    e.write(d, text, "b1")


@emits("selp", scalar=lambda made, uniform: all_uniform(made, uniform))
def emit_selp(e: Emitter, made: Instruction) -> None:
    """One of two sources by a predicate."""
    take(made, (*INTEGERS, *BITS, "f32", "f64", "f16"))
    d, a, b, p = made.operands
    kind = plain(made.parts[1])
    if wants_scalar(e, made):
        kind = f"u{bits_of(kind)}"
        e.write(d, f"{e.scalar(a, bits_of(kind))} if {e.scalar(p, 1)} else {e.scalar(b, bits_of(kind))}", kind)
    elif e.is_uniform(p):
        x, y = e.vector(a, kind, full=True), e.vector(b, kind, full=True)
        e.write(d, f"{x} if {e.scalar(p, 1)} else {y}", kind)
    else:
        x, y = e.vector(a, kind), e.vector(b, kind)
        e.write(d, f"np.where({e.vector(p, 'b1')}, {x}, {y})", kind)


# ---------------------------------------------------------------- moves


@emits("mov", scalar=lambda made, uniform: all_uniform(made, uniform))
def emit_mov(e: Emitter, made: Instruction) -> None:
    """Copy, pack and unpack."""
    take(made, (*INTEGERS, *BITS, "f16", "f32", "f64", "pred"))
    d, a = made.operands
    kind = plain(made.parts[1])
    width = bits_of(kind)
    if isinstance(d, Vec):
        _unpack(e, made, d, a, width)
    elif isinstance(a, Vec):
        _pack(e, made, d, a, width)
    elif wants_scalar(e, made):
        e.write(d, e.scalar(a, width), f"u{width}" if width > 1 else "b1")
    elif isinstance(a, Reg) and not e.is_uniform(a) and a.width == width:
        kind = e.program.canonical[a.index]
        e.write(d, e.vector(a, kind), kind)
    else:
        e.write(d, e.vector(a, kind, full=True), kind)


def _unpack(e: Emitter, made: Instruction, d: Vec, a: Operand, width: int) -> None:
    piece = width // len(d.items)
    if e.is_uniform(a):
        source = e.temp(e.scalar(a, width))
        for position, item in enumerate(d.items):
            text = f"({source} >> {position * piece}) & {MASKS[piece]}"
            e.write_scalar_or_spread(item, text, f"u{piece}")
        return
    source = e.temp(e.vector(a, f"u{width}"))
    for position, item in enumerate(d.items):
        if isinstance(item, Reg):
            shifted = f"({source} >> {e.constant(position * piece, f'u{width}')})" if position else source
            e.write(item, f"{shifted}.astype(T_u{piece})", f"u{piece}")


def _pack(e: Emitter, made: Instruction, d: Operand, a: Vec, width: int) -> None:
    piece = width // len(a.items)
    if wants_scalar(e, made):
        text = " | ".join(f"({e.scalar(item, piece)} << {n * piece})" for n, item in enumerate(a.items))
        e.write(d, text, f"u{width}")
        return
    texts = []
    for position, item in enumerate(a.items):
        text = f"{e.vector(item, f'u{piece}', full=True)}.astype(T_u{width})"
        texts.append(f"({text} << {e.constant(position * piece, f'u{width}')})" if position else text)
    e.write(d, " | ".join(texts), f"u{width}")


@emits("cvta", scalar=lambda made, uniform: all_uniform(made, uniform))
def emit_cvta(e: Emitter, made: Instruction) -> None:
    """Address spaces share one numbering here: shared memory lies below 4 GiB, the rest are host addresses."""
    take(made, ("to", "param", "shared", "shared::cta", "shared::cluster", "global", "const", "local", "u64", "u32"))
    d, a = made.operands
    if "local" in made.parts:
        raise refuse(made, "an address of local memory is not simulated")
    kind = made.parts[-1]
    if wants_scalar(e, made):
        e.write(d, e.scalar(a, bits_of(kind)), kind)
    else:
        e.write(d, e.vector(a, kind, full=True), kind)


@emits("isspacep", scalar=lambda made, uniform: all_uniform(made, uniform))
def emit_isspacep(e: Emitter, made: Instruction) -> None:
    """Whether a generic address lies in shared or global memory."""
    take(made, ("shared", "shared::cta", "shared::cluster", "global"))
    d, a = made.operands
    sign = ">=" if "global" in made.parts else "<"
    if wants_scalar(e, made):
        e.write(d, f"{e.scalar(a, 64)} {sign} {1 << 32}", "b1")
    else:
        e.write(d, f"{e.vector(a, 'u64', full=True)} {sign} {e.constant(1 << 32, 'u64')}", "b1")
