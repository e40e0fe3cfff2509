"""What a launch did: bytes and requests by path and tensor, barriers waited for, products, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .waits import Ender, Wait

__all__ = ["Ender", "SharedTraffic", "Trace", "Traffic", "Wait"]


@dataclass
class Traffic:
    """Requests of one path to one tensor. A sector is 32 bytes; bulk copies have none counted."""

    requests: int = 0
    num_bytes: int = 0
    sectors: int = 0


@dataclass
class SharedTraffic:
    """Requests of one kind to shared memory. ``ideal`` cycles are those without bank conflicts."""

    requests: int = 0
    num_bytes: int = 0
    cycles: int = 0
    ideal: int = 0


@dataclass
class Trace:
    """Counts of one launch.

    Attributes:
        name: entry of the kernel.
        traffic: (path, tensor) -> requests and bytes. TMA counts bytes inside of the tensor; ``multicast`` counts what
            the copies beyond the first would have cost.
        shared: kind of instruction -> bytes and bank conflicts.
        events: how often barriers were waited for or arrived at, and the like.
        instructions: executed warp instructions.
        flops: of wgmma.
        seconds: wall time in the engine.
        warnings: suspicious things that are no errors, each once.
        timeline: waits, in the order in which they ended, and who ended each, if asked for.
    """

    name: str = ""
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    shared: dict[str, SharedTraffic] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    flops: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    timeline: list[Wait] = field(default_factory=list)

    def add(self, path: str, tensor: str, requests: int, num_bytes: int, sectors: int) -> None:
        """Count global traffic."""
        found = self.traffic.get((path, tensor))
        if found is None:
            found = self.traffic[path, tensor] = Traffic()
        found.requests += requests
        found.num_bytes += num_bytes
        found.sectors += sectors

    def add_shared(self, kind: str, num_bytes: int, cycles: int, ideal: int) -> None:
        """Count one request to shared memory."""
        found = self.shared.get(kind)
        if found is None:
            found = self.shared[kind] = SharedTraffic()
        found.requests += 1
        found.num_bytes += num_bytes
        found.cycles += cycles
        found.ideal += ideal

    def add_event(self, name: str, count: int = 1) -> None:
        """Count an event."""
        self.events[name] = self.events.get(name, 0) + count

    def warn(self, text: str) -> None:
        """Keep a warning once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def bytes_of(self, tensor: str | None = None, paths: tuple[str, ...] | None = None) -> int:
        """Bytes moved between global memory and the chip, of one tensor or all, by some paths or all."""
        return sum(
            traffic.num_bytes
            for (path, name), traffic in self.traffic.items()
            if (tensor is None or name == tensor) and (path in paths if paths else path != "multicast")
        )

    def bytes_by_tensor(self) -> Mapping[str, int]:
        """Bytes moved for each tensor."""
        return {name: self.bytes_of(name) for name in sorted({name for _, name in self.traffic})}

    def table(self) -> str:
        """All counts as text."""
        rows: list[tuple[str, ...]] = [("path", "tensor", "requests", "bytes", "32-byte sectors")]
        for (path, tensor), item in sorted(self.traffic.items()):
            rows.append((path, tensor, f"{item.requests:,}", f"{item.num_bytes:,}", f"{item.sectors:,}"))
        parts = [_columns(rows)]
        if self.shared:
            rows = [("shared memory", "requests", "bytes", "cycles", "without conflicts")]
            for kind, shared in sorted(self.shared.items()):
                counts = (shared.requests, shared.num_bytes, shared.cycles, shared.ideal)
                rows.append((kind, *(f"{count:,}" for count in counts)))
            parts.append(_columns(rows))
        pairs: list[tuple[str, ...]] = [("event", "count")]
        pairs += [(name, f"{count:,}") for name, count in sorted(self.events.items())]
        pairs += [("warp instructions", f"{self.instructions:,}"), ("wgmma FLOP", f"{self.flops:,}")]
        parts.append(_columns(pairs))
        parts.extend(f"warning: {text}" for text in self.warnings)
        return "\n\n".join(parts)


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of text with aligned columns: the first left, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < len(row) - 3 or column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
