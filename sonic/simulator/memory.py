"""Global memory (host memory seen through registered regions) and the shared memory of a block.

Every access is checked against what was registered. Shared memory starts as 0xFF; a word that still holds 0xFFFFFFFF
without having been written so is uninitialised.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernel_launch import Region

ALL = bytes([1]) * 32
WIDE = np.dtype(np.complex128)  # a carrier of 16 bytes; never computed with
UNITS: dict[int, Any] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)} | {16: WIDE}
ALL_ONES = b"\xff\xff\xff\xff"


class Fault(Exception):
    """What is wrong with an access; the caller knows where it happened."""


class Scattered(Fault):
    """Lanes of one access lie in different regions, or some in none."""


class Stretch:
    """A region as arrays: ``base`` is aligned down so that every unit has a view."""

    __slots__ = ("low", "size", "name", "base", "views", "raw")

    def __init__(self, region: Region) -> None:
        self.low = region.address
        self.size = region.num_bytes
        self.name = region.name
        self.base = region.address & ~15
        # Rounded up to whole units; what lies outside the region is never read, since bounds are checked first.
        span = (region.address + region.num_bytes + 15 & ~15) - self.base
        self.raw = np.ctypeslib.as_array((ctypes.c_uint8 * max(span, 16)).from_address(self.base))
        self.views = {size: self.raw.view(dtype) for size, dtype in UNITS.items()}


class GlobalMemory:
    """All registered regions."""

    def __init__(self, regions: Sequence[Region]) -> None:
        kept = sorted((region for region in regions if region.num_bytes > 0), key=lambda region: region.address)
        self.stretches = [Stretch(region) for region in kept]
        self.starts = [stretch.low for stretch in self.stretches]
        self.furthest: list[int] = []
        end = 0
        for stretch in self.stretches:
            end = max(end, stretch.low + stretch.size)
            self.furthest.append(end)

    def add(self, region: Region) -> None:
        """Register one more region."""
        position = bisect.bisect(self.starts, region.address)
        self.starts.insert(position, region.address)
        self.stretches.insert(position, Stretch(region))
        end = 0
        self.furthest = []
        for stretch in self.stretches:
            end = max(end, stretch.low + stretch.size)
            self.furthest.append(end)

    def find(self, address: int, num_bytes: int = 1) -> Stretch:
        """The region that holds a stretch of bytes."""
        position = bisect.bisect(self.starts, address) - 1
        # Regions may overlap (views of one tensor), so those that begin earlier are tried too.
        while position >= 0 and self.furthest[position] > address:
            stretch = self.stretches[position]
            if address + num_bytes <= stretch.low + stretch.size:
                return stretch
            position -= 1
        raise Fault(f"{num_bytes} bytes at 0x{address:x} lie in no registered tensor{self.near(address)}")

    def near(self, address: int) -> str:
        """The closest region, for messages."""
        if not self.stretches:
            return ""
        closest = min(
            self.stretches, key=lambda s: s.low - address if address < s.low else max(address - s.low - s.size, 0)
        )
        if address < closest.low:
            return f"; {closest.name} begins {closest.low - address} bytes behind it"
        distance = address - closest.low - closest.size
        return f"; it lies {distance} bytes behind the end of {closest.name} ({closest.size} bytes)"

    def locate(self, addresses: np.ndarray, size: int, stretch: Stretch | None) -> tuple[Stretch, np.ndarray]:
        """Region of all lanes' accesses and the index of each in units of ``size``.

        Raises ``Fault`` if a lane is outside or misaligned; lanes in different regions are the caller's to split.
        """
        first = addresses.item(0)
        if stretch is None or not (stretch.low <= first and first + size <= stretch.low + stretch.size):
            stretch = self.find(first, size)
        offset = addresses - np.uint64(stretch.base)
        limit = stretch.low - stretch.base + stretch.size - size
        inside = offset <= np.uint64(limit)
        if stretch.low != stretch.base:
            inside &= offset >= np.uint64(stretch.low - stretch.base)
        raw = inside.tobytes()
        if raw != ALL[: len(raw)]:
            raise Scattered("lanes in several regions")
        if size > 1:
            rest = (offset & np.uint64(size - 1)).tobytes()
            if rest != bytes(len(rest)):
                bad = int(addresses[(offset & np.uint64(size - 1)) != 0][0])
                raise Fault(f"address 0x{bad:x} is not a multiple of the access's {size} bytes")
            offset = offset >> np.uint64(size.bit_length() - 1)
        return stretch, offset.view(np.int64)

    def pieces(self, addresses: np.ndarray, size: int) -> list[tuple[np.ndarray, Stretch, np.ndarray]]:
        """The general case: (lanes, region, indices) for each region that some lane touches."""
        found: dict[int, tuple[Stretch, list[int]]] = {}
        for lane, address in enumerate(addresses.tolist()):
            stretch = self.find(address, size)
            found.setdefault(id(stretch), (stretch, []))[1].append(lane)
        pieces = []
        for stretch, members in found.values():
            lanes = np.array(members, np.int64)
            pieces.append((lanes, *self.locate(addresses[lanes], size, stretch)))
        return pieces


class Pattern:
    """What one set of shared addresses means: indices, rank, bank conflicts. Kept, since loops repeat them."""

    __slots__ = ("rank", "index", "cycles", "ideal", "granules", "words", "end")

    def __init__(self, addresses: np.ndarray, size: int, num_ranks: int) -> None:
        ranks = addresses >> np.uint32(24)
        self.rank = int(ranks[0])
        if self.rank >= num_ranks or (ranks != ranks[0]).any():
            shown = ", ".join(f"0x{address:x}" for address in sorted(set(addresses.tolist()))[:4])
            raise Fault(f"the lanes' shared addresses {shown} lie in different blocks of the cluster, or in none")
        offsets = (addresses & np.uint32(0xFFFFFF)).astype(np.int64)
        if (offsets & (size - 1)).any():
            bad = int(addresses[(offsets & (size - 1)) != 0][0])
            raise Fault(f"shared address 0x{bad:x} is not a multiple of the access's {size} bytes")
        self.index = offsets // size
        self.end = int(offsets.max()) + size
        words = np.unique(offsets[:, None] // 4 + np.arange(max(size // 4, 1)))
        self.words = words
        self.granules = np.unique(offsets // 16)
        lanes_at_once = 32 if size <= 4 else 128 // size
        self.cycles, self.ideal = 0, 0
        for start in range(0, len(offsets), lanes_at_once):
            part = offsets[start : start + lanes_at_once]
            touched = np.unique(part[:, None] // 4 + np.arange(max(size // 4, 1)))
            self.cycles += int(np.bincount(touched % 32).max())
            self.ideal += 1


class SharedMemory:
    """The shared memory of one block."""

    def __init__(self, num_bytes: int, rank: int, num_ranks: int) -> None:
        self.size = num_bytes
        self.rank = rank
        self.num_ranks = num_ranks
        span = num_bytes + 1023 & ~1023
        store = np.empty(span // 16 + 1, WIDE)
        self.raw = store.view(np.uint8)
        self.raw[:] = 0xFF
        self.views: dict[int, np.ndarray] = {size: self.raw.view(dtype) for size, dtype in UNITS.items()}
        # Words that hold 0xFFFFFFFF because somebody wrote that.
        self.ones_written = np.zeros(len(self.raw) // 4, np.bool_)

    def check_range(self, offset: int, num_bytes: int) -> None:
        """Raise ``Fault`` for a stretch outside of the block's shared memory."""
        if offset < 0 or offset + num_bytes > self.size:
            end = offset + num_bytes
            raise Fault(f"access to shared offsets {offset} to {end}, outside of the {self.size} bytes of the block")

    def note_written(self, words: Any, data: bytes) -> None:
        """Remember words that are written with all bits set; ``words`` is an index or slice of words."""
        if ALL_ONES in data:
            self.ones_written[words] = True

    def check_read(self, words: np.ndarray) -> None:
        """Raise ``Fault`` if one of these words was never written."""
        suspicious = (self.views[4][words] == 0xFFFFFFFF) & ~self.ones_written[words]
        if suspicious.any():
            word = int(np.asarray(words)[suspicious][0])
            raise Fault(f"shared memory at offset {word * 4} is read and was never written")
