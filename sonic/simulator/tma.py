"""Tensor maps and the boxes that they describe.

The 128-byte descriptor is decoded as CuTe-DSL writes it; a flag bit that is not known is refused.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import WIDE, Fault, GlobalMemory, Stretch

# code -> (name, bytes)
ELEMENTS = {
    0: ("u8", 1),
    1: ("u16", 2),
    2: ("s32", 4),
    3: ("u32", 4),
    4: ("s64", 8),
    5: ("u64", 8),
    6: ("f16", 2),
    7: ("f32", 4),
    9: ("f64", 8),
    10: ("bf16", 2),
}
# Only these were seen in descriptors; the others are refused.
SEEN = (0, 2, 4, 6, 7, 9, 10)
# Set where the tensor takes 128 KiB or more; it changes nothing about what is copied.
LARGE = 1 << 21
# What `reduced` can do.
REDUCTIONS = ("add", "min", "max", "and", "or", "xor")
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}
_RAW: dict[int, Any] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that one copy moves.

    Attributes:
        address: of the first element.
        element: name of the type.
        size: bytes of an element.
        dims: extents, fastest first.
        strides: in bytes, fastest first; the first is the element's size.
        box: extents of the box, fastest first.
        swizzle: width in bytes of the pattern in shared memory, 0 for none.
    """

    address: int
    element: str
    size: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def box_bytes(self) -> int:
        """Bytes of a whole box in shared memory."""
        total = self.size
        for extent in self.box:
            total *= extent
        return total


@functools.lru_cache(maxsize=4096)
def decode(raw: bytes) -> TensorMap:
    """A descriptor from its first 60 bytes; raises ``Fault`` for flags that are not known."""
    words = struct.unpack("<15I", raw)
    address = words[0] | words[1] << 32
    flags = words[2]
    rank = (flags >> 4 & 7) + 1
    kind = flags >> 7 & 15
    swizzle = flags >> 13 & 3
    known = 2 | (min(rank, 5) - 1) << 4 | kind << 7 | swizzle << 13 | 0x04 << 16 | flags & LARGE
    if flags != known:
        raise Fault(f"tensor map with flags 0x{flags:08x}, of which 0x{known:08x} is understood")
    if kind not in SEEN:
        name, _ = ELEMENTS.get(kind, (str(kind), 0))
        raise Fault(f"tensor map with elements of type {name}, which are not simulated")
    if words[7]:
        raise Fault(
            f"tensor map with upper stride bits 0x{words[7]:08x} (a stride of 64 GiB or more, or no tensor map)"
        )
    if words[13] & 0xFFFFFF:
        raise Fault(f"tensor map with element strides 0x{words[13] & 0xFFFFFF:06x}, which are not simulated")
    element, size = ELEMENTS[kind]
    dims = tuple(word + 1 for word in words[8 : 8 + rank])
    strides = (size, *(word << 4 for word in words[3 : 2 + rank]))
    boxes = (words[13] >> 24, words[14] & 255, words[14] >> 8 & 255, words[14] >> 16 & 255, words[14] >> 24)
    box = tuple(extent + 1 for extent in boxes[:rank])
    made = TensorMap(address, element, size, dims, strides, box, SWIZZLES[swizzle])
    inner = box[0] * size
    if inner % 16:
        raise Fault(f"tensor map whose box is {inner} bytes wide, expected a multiple of 16")
    is_odd = inner > made.swizzle or (inner < made.swizzle and any(extent > 1 for extent in box[1:]))
    if made.swizzle and is_odd:
        raise Fault(
            f"tensor map with a box of {inner} bytes and a swizzle of {made.swizzle} bytes, expected a box as wide as "
            "the swizzle"
        )
    if address % 16:
        raise Fault(f"tensor map of address 0x{address:x}, expected a multiple of 16")
    return made


def encode(tensor: TensorMap) -> bytes:
    """The descriptor of a tensor: the reverse of `decode`."""
    rank = len(tensor.dims)
    kind = next(code for code, (name, _) in ELEMENTS.items() if name == tensor.element)
    swizzle = next(code for code, width in SWIZZLES.items() if width == tensor.swizzle)
    words = [0] * 32
    words[0], words[1] = tensor.address & 0xFFFFFFFF, tensor.address >> 32
    words[2] = 2 | (rank - 1) << 4 | kind << 7 | swizzle << 13 | 0x04 << 16
    for dim in range(1, rank):
        words[2 + dim] = tensor.strides[dim] >> 4
    for dim in range(rank):
        words[8 + dim] = tensor.dims[dim] - 1
    words[13] = tensor.box[0] - 1 << 24
    for dim in range(1, rank):
        words[14] |= tensor.box[dim] - 1 << 8 * (dim - 1)
    return struct.pack("<32I", *words)


def replace(raw: bytes, field: str, ordinal: int, value: int) -> bytes:
    """A descriptor (128 bytes) with one field changed; raises ``Fault`` for fields that are not known."""
    words = list(struct.unpack("<32I", raw))
    if field == "global_address":
        words[0], words[1] = value & 0xFFFFFFFF, value >> 32
    elif field == "global_dim":
        words[8 + ordinal] = value - 1 & 0xFFFFFFFF
    elif field == "global_stride":
        if value % 16 or value >> 36:
            raise Fault(f"tensormap.replace of a stride by {value}, expected a multiple of 16 below 64 GiB")
        words[3 + ordinal] = value >> 4
    elif field == "box_dim" and ordinal == 0:
        words[13] = words[13] & 0xFFFFFF | (value - 1 & 255) << 24
    elif field == "box_dim":
        shift = 8 * (ordinal - 1)
        words[14] = words[14] & ~(255 << shift) | (value - 1 & 255) << shift
    else:
        raise Fault(f"tensormap.replace of {field}")
    return struct.pack("<32I", *words)


@functools.lru_cache(maxsize=65536)
def granule_order(start: int, count: int, swizzle: int) -> np.ndarray:
    """Where each 16-byte granule of a box lies, as granules of shared memory; ``start`` is the first, modulo 64."""
    numbers = np.arange(start, start + count)
    return numbers ^ (numbers >> 3 & (swizzle // 16 - 1)) if swizzle else numbers


def granules_of(offset: int, num_bytes: int, swizzle: int) -> np.ndarray | slice:
    """Granules of shared memory that a box takes, in the box's order."""
    first = offset >> 4
    count = num_bytes // 16
    if not swizzle:
        return slice(first, first + count)
    return granule_order(first & 63, count, swizzle) + (first & ~63)


@dataclass
class Window:
    """The part of a box that lies inside of the tensor."""

    source: np.ndarray | None  # elements in global memory, slowest dimension first
    place: tuple[slice, ...]  # where they are in the box
    stretch: Stretch | None
    num_bytes: int


def window(memory: GlobalMemory, tensor: TensorMap, coordinates: tuple[int, ...]) -> Window:
    """Find the in-bounds part of a box; raises ``Fault`` if it leaves the registered memory."""
    place, shape, strides = [], [], []
    first = tensor.address
    span = tensor.size
    for start, extent, dim, stride in zip(coordinates, tensor.box, tensor.dims, tensor.strides, strict=True):
        low, high = max(0, -start), min(extent, dim - start)
        if high <= low:
            return Window(None, (), None, 0)
        place.append(slice(low, high))
        shape.append(high - low)
        strides.append(stride)
        first += (start + low) * stride
        span += (high - low - 1) * stride
    first %= 1 << 64  # addresses wrap: a stride may stand for a step back, as ragged tensors have it
    stretch = memory.find(first, span)
    source = np.ndarray(tuple(shape[::-1]), _RAW[tensor.size], stretch.raw, first - stretch.base, tuple(strides[::-1]))
    return Window(source, tuple(place[::-1]), stretch, source.nbytes)


def read_box(tensor: TensorMap, part: Window) -> np.ndarray:
    """The box as granules, zero outside of the tensor."""
    shape = tensor.box[::-1]
    if part.source is not None and part.source.shape == shape:
        box = np.ascontiguousarray(part.source)
    else:
        box = np.zeros(shape, _RAW[tensor.size])
        if part.source is not None:
            box[part.place] = part.source
    return box.reshape(-1).view(WIDE)


def write_box(tensor: TensorMap, part: Window, granules: np.ndarray, operation: str | None) -> None:
    """Store the in-bounds part of a box, or combine it with what is there."""
    if part.source is None:
        return
    box = np.ascontiguousarray(granules).view(_RAW[tensor.size]).reshape(tensor.box[::-1])[part.place]
    if operation is None:
        part.source[...] = box
    else:
        part.source[...] = reduced(tensor.element, operation, part.source, box)


def reduced(element: str, operation: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """``old`` combined with ``new``, both as raw bits of a type, by one of ``REDUCTIONS``."""
    assert operation in REDUCTIONS, f"{operation} is refused when an instruction is translated"
    raw = old.dtype
    if operation in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operation](old, new)
    call = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation]
    if element == "bf16":
        from .instructions_float import from_bf16, to_bf16

        total = call(from_bf16(np.ascontiguousarray(old)), from_bf16(np.ascontiguousarray(new)))
        return (to_bf16(np.ascontiguousarray(total)) >> np.uint32(16)).astype(np.uint16)
    names = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "s32": np.int32, "s64": np.int64}
    names |= {"u32": np.uint32, "u64": np.uint64, "u8": np.uint8, "u16": np.uint16}
    kind = np.dtype(names[element])
    return call(np.ascontiguousarray(old).view(kind), np.ascontiguousarray(new).view(kind)).view(raw)
