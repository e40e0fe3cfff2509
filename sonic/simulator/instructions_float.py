"""Floating point: arithmetic with a single rounding, conversions, approximations.

Approximate instructions (``ex2.approx`` and the like) are numpy's float32 functions: near, not bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .instructions_common import DTYPES, MASKS, Emitter, all_uniform, bits_of, emits, plain, refuse, runtime, take
from .ptx import Instruction, Operand

FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
NONE_SET = bytes(32)
_TINY = np.float32(np.finfo(np.float32).tiny)
ROUNDINGS = ("rn", "rz", "rm", "rp")


# ---------------------------------------------------------------- rounding


@runtime
def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers to zero of the same sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


@runtime
def saturate(x: np.ndarray) -> np.ndarray:
    """Clamp to 0..1; no-numbers become 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def odd_sum(p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``p + c`` in float64, rounded to odd: rounding it once more to float32 or less is as if done once."""
    s = p + c
    back = s - p
    error = (p - (s - back)) + (c - back)
    inexact = (error != 0) & np.isfinite(s)
    bits = s.view(np.int64)
    even = (bits & 1) == 0
    step = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(inexact & even, bits + step, bits).view(np.float64)


def narrow_float(v: np.ndarray, rounding: str) -> np.ndarray:
    """float64 to float32 in a direction."""
    r = v.astype(np.float32)
    if rounding == "rn":
        return r
    back = r.astype(np.float64)
    low, high = np.float32(-np.inf), np.float32(np.inf)
    if rounding == "rm":
        moved = np.where(back > v, np.nextafter(r, low), r)
    elif rounding == "rp":
        moved = np.where(back < v, np.nextafter(r, high), r)
    else:
        moved = np.where(np.abs(back) > np.abs(v), np.nextafter(r, np.float32(0)), r)
    return np.where(np.isnan(v), r, moved)


@runtime
def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32 with one rounding, to nearest even."""
    p = np.multiply(a, b, dtype=np.float64)
    s = p + c
    # Rounding twice can only be wrong where the first result lies half way between two float32 numbers.
    if ((s.view(np.uint64) & np.uint64(0x0FFFFFFF)) == 0).tobytes() == NONE_SET[: s.size]:
        return s.astype(np.float32)
    return odd_sum(p, np.asarray(c, np.float64)).astype(np.float32)


@runtime
def directed(a: np.ndarray, b: np.ndarray, c: np.ndarray, rounding: str) -> np.ndarray:
    """``a * b + c`` of float32 with one rounding in any direction."""
    a, b, c = np.broadcast_arrays(a, b, c)
    return narrow_float(odd_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64)), rounding)


@runtime
def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits (in the upper half of uint32), to nearest even; no-numbers become 0x7FFF."""
    bits = x.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    nan = x != x
    if nan.tobytes() != bytes(nan.size):
        rounded = np.where(nan, np.uint32(0x7FFF0000), rounded)
    return rounded


@runtime
def pack_bf16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two float32 to one register of two bf16."""
    return to_bf16(high) | (to_bf16(low) >> np.uint32(16))


@runtime
def pack_bf16_many(registers: list[np.ndarray]) -> list[np.ndarray]:
    """The same for a row of instructions: high, low, high, low..."""
    rounded = to_bf16(np.array(registers))
    return list(rounded[0::2] | (rounded[1::2] >> np.uint32(16)))


@runtime
def pack_f16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two float32 to one register of two fp16, to nearest even."""
    pair = np.empty((32, 2), np.float16)
    pair[:, 0] = low
    pair[:, 1] = high
    return pair.view(np.uint32)[:, 0]


def towards_zero(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 to the bits of fp16 or bf16, cutting off; no-numbers become 0x7FFF."""
    if kind == "bf16":
        bits = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        near = x.astype(np.float16)
        beyond = np.abs(near.astype(np.float32)) > np.abs(x)
        bits = np.where(beyond, np.nextafter(near, np.float16(0)), near).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


@runtime
def to_half(x: np.ndarray, kind: str, rounding: str, relu: bool) -> np.ndarray:
    """float32 to the bits of fp16 or bf16, ``rn`` or ``rz``; with ``relu`` what is below zero becomes zero."""
    if relu:
        x = np.where((x > 0) | np.isnan(x), x, np.float32(0))
    if rounding == "rz":
        return towards_zero(x, kind)
    if kind == "bf16":
        return (to_bf16(x) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


@runtime
def pack_halves(high: np.ndarray, low: np.ndarray, kind: str, rounding: str, relu: bool) -> np.ndarray:
    """Two float32 to one register of two fp16 or bf16."""
    pair = [to_half(x, kind, rounding, relu).astype(np.uint32) for x in (high, low)]
    return pair[0] << np.uint32(16) | pair[1]


@runtime
def half_function(function: Any, x: np.ndarray, kind: str, ftz: bool) -> np.ndarray:
    """A function of float32 on fp16, bf16 or pairs of them."""
    results = []
    for part in halves(x, kind):
        number = flush(part.astype(np.float32)) if ftz else part.astype(np.float32)
        value = function(number)
        results.append(to_half(flush(value) if ftz else value, kind.removesuffix("x2"), "rn", False))
    if len(results) == 1:
        return results[0]
    return results[0].astype(np.uint32) | results[1].astype(np.uint32) << np.uint32(16)


@runtime
def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits in uint16 to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _odd_float32(v: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd."""
    r = narrow_float(v, "rz")
    inexact = (r.astype(np.float64) != v) & np.isfinite(v)
    return np.where(inexact, (r.view(np.uint32) | np.uint32(1)), r.view(np.uint32)).view(np.float32)


def _decode_fp8(exponent_bits: int, bias: int) -> np.ndarray:
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if exponent_bits == 4:
        value = np.where((codes & 0x7F) == 0x7F, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), value)
    return np.where(codes & 0x80, -value, value).astype(np.float32)


FP8 = {"e4m3": _decode_fp8(4, 7), "e5m2": _decode_fp8(5, 15)}
_FP8_POSITIVE = {name: table[: 0x7F if name == "e4m3" else 0x7C].astype(np.float64) for name, table in FP8.items()}


@runtime
def to_fp8(x: np.ndarray, name: str) -> np.ndarray:
    """float32 to fp8 codes, to nearest even; finite numbers beyond the largest and infinities become the largest."""
    table = _FP8_POSITIVE[name]
    size = np.abs(x.astype(np.float64))
    above = np.minimum(np.searchsorted(table, size), len(table) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = table[above] - size, size - table[below]
    choose_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = np.where(choose_above, above, below)
    code = np.where(size >= table[-1], len(table) - 1, code)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | np.where(np.signbit(x) & ~np.isnan(x), 0x80, 0)).astype(np.uint16)


@runtime
def from_fp8_pair(bits: np.ndarray, name: str) -> np.ndarray:
    """Two fp8 codes in a uint16 to two fp16 in a uint32."""
    table = FP8[name].astype(np.float16).view(np.uint16).astype(np.uint32)
    return table[bits & 0xFF] | table[bits >> 8] << np.uint32(16)


@runtime
def halves(x: np.ndarray, kind: str) -> list[np.ndarray]:
    """The numbers packed in registers, low first, as float64."""
    if kind in ("f16x2", "bf16x2"):
        parts = [(x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)]
    else:
        parts = [x]
    if kind.startswith("bf"):
        return [from_bf16(part).astype(np.float64) for part in parts]
    return [part.view(np.float16).astype(np.float64) for part in parts]


@runtime
def small_arithmetic(operation: str, kind: str, *sources: np.ndarray, mod: str = "") -> np.ndarray:
    """Arithmetic of fp16, bf16 and pairs of them, with one rounding; ``mod`` is ``relu``, ``NaN`` or nothing."""
    columns = [halves(np.broadcast_to(source, (32,)), kind) for source in sources]
    results = []
    for n in range(len(columns[0])):
        x = [column[n] for column in columns]
        if operation == "fma":
            value = odd_sum(x[0] * x[1], x[2])
        elif operation in ("add", "sub"):
            value = odd_sum(x[0], x[1] if operation == "add" else -x[1])
        elif operation == "mul":
            value = x[0] * x[1]
        elif operation in ("min", "max"):
            names = {"min": np.minimum, "max": np.maximum} if mod == "NaN" else {"min": np.fmin, "max": np.fmax}
            value = names[operation](x[0], x[1])
        else:
            value = -x[0] if operation == "neg" else np.abs(x[0])
        if mod == "relu":
            value = np.where((value > 0) | np.isnan(value), value, 0.0)
        if kind.startswith("bf"):
            results.append((to_bf16(_odd_float32(value)) >> np.uint32(16)).astype(np.uint16))
        else:
            results.append(value.astype(np.float16).view(np.uint16))
    if len(results) == 1:
        return results[0]
    return results[0].astype(np.uint32) | results[1].astype(np.uint32) << np.uint32(16)


# ---------------------------------------------------------------- arithmetic


def arithmetic(e: Emitter, made: Instruction) -> None:
    """add, sub, mul, fma, div, min, max, neg, abs."""
    root, kind = made.parts[0], made.parts[-1]
    extra = ("NaN",) if root in ("min", "max") else ("relu",) if root == "fma" and kind not in ("f32", "f64") else ()
    mods = take(made, (*ROUNDINGS, "ftz", "sat", "approx", "full", *extra, kind))[:-1]
    if kind not in FLOATS:
        raise refuse(made)
    d, sources = made.operands[0], made.operands[1:]
    rounding = next((mod for mod in mods if mod in ROUNDINGS), "rn")
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        if rounding != "rn" or root == "div" or {"sat", "ftz"} & set(mods):
            raise refuse(made)
        mod = next((f", mod={mod!r}" for mod in mods if mod in ("relu", "NaN")), "")
        texts = ", ".join(e.vectors(sources, plain(kind)))
        if kind == "f16":
            texts = ", ".join(e.vectors(sources, "u16"))
        e.write(d, f"small_arithmetic({root!r}, {kind!r}, {texts}{mod})", f"u{bits_of(kind)}")
        return
    x = e.vectors(sources, kind)
    ftz = "ftz" in mods
    if ftz:
        x = [f"flush({text})" for text in x]
    if kind == "f64" and rounding != "rn":
        raise refuse(made)
    if root == "fma":
        if kind == "f64":
            raise refuse(made, "a fused product of float64 is not simulated")
        text = f"fused({x[0]}, {x[1]}, {x[2]})"
        if rounding != "rn":
            text = f"directed({x[0]}, {x[1]}, {x[2]}, {rounding!r})"
    elif root in ("add", "sub"):
        sign = "+" if root == "add" else "-"
        text = f"{x[0]} {sign} {x[1]}"
        if rounding != "rn":
            text = f"directed({x[0]}, T_f32(1), {sign}{x[1]}, {rounding!r})"
    elif root == "mul":
        text = f"{x[0]} * {x[1]}"
        if rounding != "rn":
            text = f"directed({x[0]}, {x[1]}, T_f32(0), {rounding!r})"
    elif root == "div":
        if rounding != "rn":
            raise refuse(made)
        text = f"{x[0]} / {x[1]}"
    elif root in ("min", "max"):
        text = f"np.{root}imum({x[0]}, {x[1]})" if "NaN" in mods else f"np.f{root}({x[0]}, {x[1]})"
    elif root == "neg":
        text = f"-{x[0]}"
    else:
        text = f"np.abs({x[0]})"
    if "sat" in mods:
        text = f"saturate({text})"
    if ftz:
        text = f"flush({text})"
    e.write(d, text, kind)


@emits("fma")
def emit_fma(e: Emitter, made: Instruction) -> None:
    """Product and sum with one rounding."""
    arithmetic(e, made)


@emits("copysign")
def emit_copysign(e: Emitter, made: Instruction) -> None:
    """The second number with the sign of the first."""
    kind = take(made, ("f32", "f64"))[0]
    d, a, b = made.operands
    x, y = e.vectors([a, b], kind)
    e.write(d, f"np.copysign({y}, {x})", kind)


_UNARY = {
    "rcp": "(T_f32(1) / {})",
    "sqrt": "np.sqrt({})",
    "rsqrt": "(T_f32(1) / np.sqrt({}))",
    "ex2": "np.exp2({})",
    "lg2": "np.log2({})",
    "sin": "np.sin({})",
    "cos": "np.cos({})",
    "tanh": "np.tanh({})",
}


@emits(*_UNARY)
def emit_unary(e: Emitter, made: Instruction) -> None:
    """Reciprocal, roots, powers and trigonometry of float32; powers of two and tanh also of fp16 and bf16."""
    kind = made.parts[-1]
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        ftz = made.parts[0] == "ex2" and kind.startswith("bf")  # which the manual has in no other form
        if made.parts[0] not in ("ex2", "tanh") or made.parts[1:-1] != (["approx", "ftz"] if ftz else ["approx"]):
            raise refuse(made)
        d, a = made.operands
        x = e.vector(a, "f16" if kind == "f16" else plain(kind), full=True)
        name = {"ex2": "np.exp2", "tanh": "np.tanh"}[made.parts[0]]
        e.write(d, f"half_function({name}, {x}, {kind!r}, {ftz})", f"u{bits_of(kind)}")
        return
    mods = take(made, ("approx", "rn", "ftz", "f32"))
    if mods[-1] != "f32":
        raise refuse(made)
    d, a = made.operands
    x = e.vector(a, "f32", full=True)
    if "ftz" in mods:
        x = f"flush({x})"
    text = _UNARY[made.parts[0]].format(x)
    e.write(d, f"flush({text})" if "ftz" in mods else text, "f32")


@emits("testp")
def emit_testp(e: Emitter, made: Instruction) -> None:
    """Class of a number."""
    tests = {"finite": "np.isfinite({})", "infinite": "np.isinf({})", "number": "~np.isnan({})"}
    tests["notanumber"] = "np.isnan({})"
    if len(made.parts) != 3 or made.parts[1] not in tests or made.parts[2] not in ("f32", "f64"):
        raise refuse(made)
    d, a = made.operands
    e.write(d, tests[made.parts[1]].format(e.vector(a, made.parts[2], full=True)), "b1")


# ---------------------------------------------------------------- conversions

_INTEGER_KINDS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_TO_INTEGER = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _convert_rule(made: Instruction, uniform: Any) -> bool:
    kinds = made.parts[-2:]
    return all(kind in _INTEGER_KINDS for kind in kinds) and all_uniform(made, uniform)


@runtime
def saturate_integer(x: np.ndarray, kind: str) -> np.ndarray:
    """Clamp integers to the range of a type."""
    bounds = np.iinfo(DTYPES[kind])
    low = max(int(bounds.min), int(np.iinfo(x.dtype).min))
    high = min(int(bounds.max), int(np.iinfo(x.dtype).max))
    return np.clip(x, low, high).astype(DTYPES[kind])


@runtime
def float_to_integer(x: np.ndarray, kind: str) -> np.ndarray:
    """Rounded numbers to integers, clamped to the range; no-numbers become 0."""
    bounds = np.iinfo(DTYPES[kind])
    wide = np.where(np.isnan(x), 0.0, x.astype(np.float64))
    low, high = wide <= float(bounds.min), wide >= float(bounds.max)
    safe = np.where(low | high, 0.0, wide).astype(DTYPES[kind])
    result = np.where(low, DTYPES[kind](bounds.min), safe)
    return np.where(high, DTYPES[kind](bounds.max), result)


@runtime
def round_tf32(x: np.ndarray, ties_away: bool) -> np.ndarray:
    """float32 to tf32: ten bits of fraction, the rest zero."""
    bits = x.view(np.uint32)
    half = np.uint32(0x1000) if ties_away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(x), (bits + half) & np.uint32(0xFFFFE000), bits)


PACK_BF16 = "cvt.rn.bf16x2.f32"


def emit_packs(e: Emitter, row: list[Instruction]) -> None:
    """Several conversions to pairs of bf16 at once: they come in rows, and one call for all is much faster."""
    sources = [e.vector(operand, "f32", full=True) for made in row for operand in made.operands[1:]]
    packed = e.temp(f"pack_bf16_many([{', '.join(sources)}])")
    for n, made in enumerate(row):
        e.write(made.operands[0], f"{packed}[{n}]", "u32")


@emits("cvt", scalar=_convert_rule)
def emit_cvt(e: Emitter, made: Instruction) -> None:
    """All conversions."""
    target, source = made.parts[-2:]
    mods = made.parts[1:-2]
    d, sources = made.operands[0], made.operands[1:]
    known = (*ROUNDINGS, *_TO_INTEGER, "ftz", "sat", "satfinite", "rna", "relu", "pack")
    for mod in mods:
        if mod not in known or mod == "pack" or (mod == "relu" and (source != "f32" or "f16" not in target)):
            raise refuse(made, f"modifier .{mod} is not understood")
    if target in _INTEGER_KINDS and source in _INTEGER_KINDS:
        _integer_to_integer(e, made, d, sources[0], target, source, mods)
    elif target in ("bf16", "f16") and source == "f32" and "relu" in mods:
        if mods not in (["rn", "relu"], ["rz", "relu"]):
            raise refuse(made)
        e.write(d, f"to_half({e.vector(sources[0], 'f32', full=True)}, {target!r}, {mods[0]!r}, True)", "u16")
    elif target in ("bf16x2", "f16x2") and source == "f32" and mods in (["rn", "relu"], ["rz"], ["rz", "relu"]):
        high, low = e.vector(sources[0], "f32", full=True), e.vector(sources[1], "f32", full=True)
        e.write(d, f"pack_halves({high}, {low}, {target[:-2]!r}, {mods[0]!r}, {'relu' in mods})", "u32")
    elif target in ("bf16x2", "f16x2") and source == "f32":
        if mods != ["rn"]:
            raise refuse(made)
        high, low = e.vector(sources[0], "f32", full=True), e.vector(sources[1], "f32", full=True)
        e.write(d, f"pack_{target[:-2]}({high}, {low})", "u32")
    elif target in ("e4m3x2", "e5m2x2") and source == "f32":
        if mods != ["rn", "satfinite"]:
            raise refuse(made)
        high, low = e.vector(sources[0], "f32", full=True), e.vector(sources[1], "f32", full=True)
        name = repr(target[:-2])
        e.write(d, f"to_fp8({low}, {name}) | (to_fp8({high}, {name}) << T_u16(8))", "u16")
    elif target == "f16x2" and source in ("e4m3x2", "e5m2x2"):
        if mods != ["rn"]:
            raise refuse(made)
        e.write(d, f"from_fp8_pair({e.vector(sources[0], 'u16', full=True)}, {source[:-2]!r})", "u32")
    elif target == "tf32" and source == "f32":
        if mods not in (["rna"], ["rn"]):
            raise refuse(made)
        e.write(d, f"round_tf32({e.vector(sources[0], 'f32', full=True)}, {mods == ['rna']})", "u32")
    else:
        _with_float(e, made, d, sources[0], target, source, mods)


def _integer_to_integer(
    e: Emitter, made: Instruction, d: Operand, a: Operand, target: str, source: str, mods: list[str]
) -> None:
    if mods not in ([], ["sat"]):
        raise refuse(made)
    width = bits_of(target)
    if e.is_scalar_result(d):
        x = f"{e.typed(a, source)}"
        if width != bits_of(source) or mods:
            x = f"({x})"
        if bits_of(source) < 32:  # the register may be wider than the type
            x = f"(({e.scalar(a, 64)} & {MASKS[bits_of(source)]})" + (
                f" ^ {1 << bits_of(source) - 1}) - {1 << bits_of(source) - 1}" if source[0] == "s" else ")"
            )
        if mods:
            bounds = np.iinfo(DTYPES[target])
            x = f"max({bounds.min}, min({bounds.max}, {x}))"
        register = getattr(d, "width", width)
        if target[0] == "s" and register > width:
            x = f"((({x}) & {MASKS[width]} ^ {1 << width - 1}) - {1 << width - 1})"
        e.write(d, f"({x}) & {MASKS[max(width, register) if target[0] == 's' else width]}", f"u{register}")
        return
    x = e.vector(a, source, full=True)
    if mods:
        e.write(d, f"saturate_integer({x}, {target!r})", target)
    elif width == bits_of(source):
        e.write(d, x, source)
    else:
        e.write(d, f"{x}.astype(T_{target})", target)


def _with_float(
    e: Emitter, made: Instruction, d: Operand, a: Operand, target: str, source: str, mods: list[str]
) -> None:
    floats = ("f16", "bf16", "f32", "f64")
    if source not in (*floats, *_INTEGER_KINDS) or target not in (*floats, *_INTEGER_KINDS):
        raise refuse(made)
    if source == "bf16":
        x, have = f"from_bf16({e.vector(a, 'u16', full=True)})", "f32"
    else:
        x, have = e.vector(a, source, full=True), source
    if "ftz" in mods and have == "f32":
        x = f"flush({x})"
    rounding = next((mod for mod in mods if mod in ROUNDINGS), None)
    to_integer = next((mod for mod in mods if mod in _TO_INTEGER), None)
    if set(mods) & {"satfinite", "rna"} or (rounding not in (None, "rn") and (target, have) != ("f32", "f64")):
        if not (rounding == "rz" and target == "bf16"):
            raise refuse(made)
    if target in _INTEGER_KINDS:
        if to_integer is None:
            raise refuse(made)
        if have == "f16":
            x = f"{x}.astype(T_f32)"
        e.write(d, f"float_to_integer({_TO_INTEGER[to_integer]}({x}), {target!r})", target)
        return
    if to_integer is not None:
        if target != source or have == "f16":
            raise refuse(made)
        x = f"{_TO_INTEGER[to_integer]}({x})"
    if target == "bf16":
        if have != "f32":
            raise refuse(made)
        text = f"{x}.view(T_u32) >> T_u32(16)" if rounding == "rz" else f"to_bf16({x}) >> T_u32(16)"
        e.write(d, f"({text}).astype(T_u16)", "u16")
        return
    if target == "f32" and have == "f64" and rounding not in (None, "rn"):
        raise refuse(made)
    text = x if have == target else f"{x}.astype(T_{target})"
    if "sat" in mods:
        text = f"saturate({text})"
    e.write(d, text, target)
