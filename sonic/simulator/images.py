"""Device images in memory, and the PTX that they were made from.

Names of kernels do not tell variants apart, so the PTX of an image is found by the bytes of the cubin inside.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct

from sonic.simulator.errors import SimulatorError, Unsupported

_ptx_of_cubin: dict[bytes, str] = {}  # by digest


def _digest(cubin: bytes) -> bytes:
    # an image may pad a cubin
    return hashlib.sha256(cubin.rstrip(b"\0")).digest()


def register_ptx(cubin: bytes, ptx: str) -> None:
    """Remember which PTX a cubin was made from."""
    _ptx_of_cubin[_digest(cubin)] = ptx


def ptx_of_image(address: int, entry: str) -> str:
    """The PTX of a loaded device image, found by the bytes of the cubin inside.

    Args:
        address: of a fatbin.
        entry: the kernel to be launched, for the message.
    """
    for cubin in cubins_of_fatbin(address):
        ptx = _ptx_of_cubin.get(_digest(cubin))
        if ptx is not None:
            return ptx
    raise SimulatorError(
        f"sonic.simulator: the PTX of kernel {entry} is not known: its function was loaded from a file or a cache; "
        "compile it inside `with sonic.simulator.hopper():`"
    )


_FATBIN_MAGIC = 0xBA55ED50
_FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY_HEADER = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes of the payload
_CUBIN = 2
_ELF = b"\x7fELF"


def cubins_of_fatbin(address: int) -> list[bytes]:
    """Read the cubins of a fatbin in memory; entries of another kind and compressed ones are left out."""
    magic, _, header_bytes, num_bytes = _FATBIN_HEADER.unpack(ctypes.string_at(address, _FATBIN_HEADER.size))
    if magic != _FATBIN_MAGIC:
        raise Unsupported(f"sonic.simulator: a device image starts with {magic:#x}, expected a fatbin")
    entries = ctypes.string_at(address + header_bytes, num_bytes)
    cubins, at = [], 0
    while at + _ENTRY_HEADER.size <= len(entries):
        kind, _, entry_header_bytes, payload_bytes = _ENTRY_HEADER.unpack_from(entries, at)
        payload = entries[at + entry_header_bytes : at + entry_header_bytes + payload_bytes]
        if kind == _CUBIN and payload.startswith(_ELF):
            cubins.append(payload)
        at += entry_header_bytes + payload_bytes
    return cubins
