"""Counting and finding bits, bit fields, byte permutation, funnel shifts, three-operand logic.

The rarer ones are functions on Python integers, called lane by lane where lanes differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .instructions_alu import INTEGERS, wants_scalar
from .instructions_common import MASKS, Emitter, all_uniform, bits_of, emits, refuse, runtime, take
from .ptx import Instruction, Operand


def _lanes(function: Any) -> Any:
    """A function on Python integers, lane by lane: for instructions that are rare."""

    def apply(*arguments: Any) -> np.ndarray:
        columns = [
            [argument] * 32 if not isinstance(argument, np.ndarray) or argument.ndim == 0 else argument.tolist()
            for argument in arguments[:-1]
        ]
        return np.array([function(*(int(value) for value in row)) for row in zip(*columns, strict=True)], arguments[-1])

    return apply


@runtime
def find_leading(a: int, width: int) -> int:
    """Leading zeros."""
    return width - a.bit_length()


@runtime
def reverse_bits(a: int, width: int) -> int:
    """Bits in reverse order."""
    return int(f"{a:0{width}b}"[::-1], 2)


@runtime
def find_highest(a: int, width: int, signed: int, shift_amount: int) -> int:
    """Position of the highest set bit (of the highest bit unlike the sign), all bits set when there is none."""
    if signed and a >> (width - 1):
        a ^= MASKS[width]
    if a == 0:
        return MASKS[32]
    position = a.bit_length() - 1
    return width - 1 - position if shift_amount else position


@runtime
def extract_field(a: int, start: int, length: int, width: int, signed: int) -> int:
    """Bit field; beyond the upper end it is filled with zeros, or with the sign bit."""
    start, length = start & 0xFF, length & 0xFF
    if length == 0:
        return 0
    sign = a >> min(start + length - 1, width - 1) & 1 if signed else 0
    known = max(min(length, width - start), 0)
    field = (a >> start) & ((1 << known) - 1)
    if sign:
        field |= MASKS[64] << known
    return field & MASKS[width]


@runtime
def insert_field(a: int, b: int, start: int, length: int, width: int) -> int:
    """The low bits of ``a`` in place of a field of ``b``."""
    start, length = start & 0xFF, length & 0xFF
    mask = (((1 << length) - 1) << start) & MASKS[width]
    return (b & ~mask | (a << start) & mask) & MASKS[width]


@runtime
def permute_bytes(a: int, b: int, control: int) -> int:
    """Four bytes out of the eight of two words; bit 3 of a selector repeats the byte's sign."""
    both = a | b << 32
    result = 0
    for position in range(4):
        selector = control >> 4 * position & 0xF
        byte = both >> 8 * (selector & 7) & 0xFF
        if selector & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * position
    return result


@runtime
def funnel_shift(a: int, b: int, amount: int, left: int, clamp: int) -> int:
    """Shift of the 64 bits ``b:a``, upper or lower half."""
    amount = min(amount, 32) if clamp else amount & 31
    both = b << 32 | a
    return (both << amount >> 32 if left else both >> amount) & MASKS[32]


@runtime
def combine_bits(a: int, b: int, c: int, table: int) -> int:
    """Any function of three bits, bit by bit, by its table of truth."""
    result = 0
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result & MASKS[32]


for _function in (
    find_leading,
    reverse_bits,
    find_highest,
    extract_field,
    insert_field,
    permute_bytes,
    funnel_shift,
    combine_bits,
):
    _wrapped = _lanes(_function)
    _wrapped.__name__ = f"{_function.__name__}_lanes"
    runtime(_wrapped)


def _call(e: Emitter, made: Instruction, name: str, sources: list[tuple[Operand, int]], tail: str, width: int) -> None:
    """Call one of the functions above on integers, or lane by lane."""
    d = made.operands[0]
    if wants_scalar(e, made):
        arguments = ", ".join([*(e.scalar(operand, bits) for operand, bits in sources), *([tail] if tail else [])])
        e.write(d, f"{name}({arguments})", f"u{width}")
        return
    texts = []
    for operand, bits in sources:
        uniform = e.is_uniform(operand)
        texts.append(e.scalar(operand, bits) if uniform else e.vector(operand, f"u{bits}"))
    arguments = ", ".join([*texts, *([tail] if tail else []), f"T_u{width}"])
    e.write(d, f"{name}_lanes({arguments})", f"u{width}")


def _any_type(made: Instruction, uniform: Any) -> bool:
    return all_uniform(made, uniform)


@emits("popc", scalar=_any_type)
def emit_popc(e: Emitter, made: Instruction) -> None:
    """Number of set bits."""
    take(made, ("b32", "b64"))
    d, a = made.operands
    width = bits_of(made.parts[1])
    if wants_scalar(e, made):
        e.write(d, f"({e.scalar(a, width)}).bit_count()", "u32")
    else:
        e.write(d, f"np.bitwise_count({e.vector(a, f'u{width}', full=True)}).astype(T_u32)", "u32")


@emits("clz", "brev", "bfind", "bfe", "bfi", "prmt", "shf", "lop3", scalar=_any_type)
def emit_bits(e: Emitter, made: Instruction) -> None:
    """Bit fields, byte permutation, funnel shifts, three-operand logic."""
    root, parts = made.parts[0], made.parts[1:]
    kind = parts[-1]
    operands = made.operands[1:]
    width = bits_of(kind)
    if root == "clz" and parts in (["b32"], ["b64"]):
        _call(e, made, "find_leading", [(operands[0], width)], str(width), 32)
    elif root == "brev" and parts in (["b32"], ["b64"]):
        _call(e, made, "reverse_bits", [(operands[0], width)], str(width), width)
    elif root == "bfind" and kind in INTEGERS and parts[:-1] in ([], ["shiftamt"]):
        tail = f"{width}, {int(kind[0] == 's')}, {len(parts) - 1}"
        _call(e, made, "find_highest", [(operands[0], width)], tail, 32)
    elif root == "bfe" and len(parts) == 1 and kind in ("u32", "s32", "u64", "s64"):
        sources = [(operands[0], width), (operands[1], 32), (operands[2], 32)]
        _call(e, made, "extract_field", sources, f"{width}, {int(kind[0] == 's')}", width)
    elif root == "bfi" and parts in (["b32"], ["b64"]):
        sources = [(operands[0], width), (operands[1], width), (operands[2], 32), (operands[3], 32)]
        _call(e, made, "insert_field", sources, str(width), width)
    elif root == "prmt" and parts == ["b32"]:
        _call(e, made, "permute_bytes", [(operand, 32) for operand in operands], "", 32)
    elif root == "shf" and len(parts) == 3 and parts[0] in "lr" and parts[1] in ("clamp", "wrap") and kind == "b32":
        sources = [(operand, 32) for operand in operands]
        _call(e, made, "funnel_shift", sources, f"{int(parts[0] == 'l')}, {int(parts[1] == 'clamp')}", 32)
    elif root == "lop3" and parts == ["b32"]:
        _call(e, made, "combine_bits", [(operand, 32) for operand in operands], "", 32)
    else:
        raise refuse(made)
