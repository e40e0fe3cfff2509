"""Warpgroup products: operands found in shared memory by their descriptors, fragments of registers, the product."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .instructions_float import FP8
from .memory import Fault, SharedMemory

# code in a matrix descriptor -> width of the swizzle in bytes; it is not the coding of tensor maps
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}
K_BYTES = 32  # one instruction takes 32 bytes of each row


@dataclass(frozen=True)
class Layout:
    """A matrix descriptor without its address."""

    rows: int
    size: int
    is_k_major: bool
    leading: int
    stride: int
    swizzle: int


@functools.lru_cache(maxsize=65536)
def parse_descriptor(descriptor: int, rows: int, size: int, is_k_major: bool) -> tuple[int, Layout]:
    """Start address and layout; raises ``Fault`` for bits that are not known."""
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    swizzle = SWIZZLES[descriptor >> 62 & 3]
    unknown = descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62)
    if unknown:
        raise Fault(f"matrix descriptor 0x{descriptor:016x}, of which bits 0x{unknown:x} are not understood")
    if not is_k_major and size != 2:
        raise Fault("an operand of 8 or 32 bits whose rows are not along k: wgmma takes those along k only")
    return start, Layout(rows, size, is_k_major, leading, stride, swizzle)


def operand_granules(layout: Layout, phase: int) -> np.ndarray:
    """Granules of an operand that starts at byte ``phase`` of an aligned KiB: (rows, 2) or (16, rows / 8)."""
    width = layout.swizzle
    if layout.is_k_major:
        row, chunk = np.arange(layout.rows)[:, None], np.arange(2)[None, :]
        if width:
            offset = row // 8 * layout.stride + row % 8 * width + chunk * 16
        else:
            offset = row // 8 * layout.stride + chunk * layout.leading + row % 8 * 16
    else:
        k, chunk = np.arange(16)[:, None], np.arange(layout.rows // 8)[None, :]
        if width:
            along = chunk * 16
            offset = along // width * layout.leading + along % width + k % 8 * width + k // 8 * layout.stride
        else:
            offset = chunk * layout.stride + k % 8 * 16 + k // 8 * layout.leading
    address = offset + phase
    if width:
        address = address ^ (address >> 7 & (width // 16 - 1)) << 4
    return address >> 4


@functools.lru_cache(maxsize=16384)
def place_operand(start: int, layout: Layout) -> tuple[np.ndarray, np.ndarray, int]:
    """Granules and words of an operand in shared memory, and where it ends."""
    granules = operand_granules(layout, start & 1023) + (start >> 10 << 6)
    words = (granules.reshape(-1, 1) * 4 + np.arange(4)).reshape(-1)
    return granules, words, int(granules.max()) * 16 + 16


def find_operand(shared: SharedMemory, start: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Granules and words of an operand in a block's shared memory, checked to lie inside."""
    granules, words, end = place_operand(start, layout)
    if end > shared.size:
        raise Fault(f"an operand of wgmma ends at shared offset {end} of a block that has {shared.size} bytes")
    return granules, words


def to_numbers(raw: np.ndarray, element: str) -> np.ndarray:
    """Rows of bytes (any integer or 16-byte type, contiguous) as float32."""
    if element == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if element == "f16":
        return raw.view(np.float16).astype(np.float32)
    if element == "tf32":  # the lowest 13 bits are not looked at
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return FP8[element][raw.view(np.uint8)]


def load_operand(shared: SharedMemory, granules: np.ndarray, layout: Layout, element: str) -> np.ndarray:
    """The operand as float32: (rows, k) if rows are along k, else (k, rows)."""
    return to_numbers(shared.views[16][granules], element)


def operand_from_registers(registers: list[np.ndarray], element: str) -> np.ndarray:
    """A (16, k) of one warp from its four registers."""
    words = np.array(registers, np.uint32).reshape(2, 2, 8, 4).transpose(1, 2, 0, 3)
    return to_numbers(np.ascontiguousarray(words).reshape(16, 8), element)


def to_fragment(rows: np.ndarray) -> list[np.ndarray]:
    """Sixteen rows of an accumulator as the registers of a warp."""
    n = rows.shape[1]
    parts = rows.reshape(2, 8, n // 8, 4, 2).transpose(2, 0, 4, 1, 3)
    return list(np.ascontiguousarray(parts).reshape(n // 2, 32))


def from_fragment(registers: list[np.ndarray]) -> np.ndarray:
    """The reverse."""
    n = len(registers) * 2
    parts = np.array(registers).view(np.float32).reshape(n // 8, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2)
    return parts.reshape(16, n)
