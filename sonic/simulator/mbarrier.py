"""Barriers in shared memory: phases, pending arrivals, pending bytes."""

from __future__ import annotations

from typing import Any

from .checks import learn

MOST_ARRIVALS = (1 << 20) - 1


class MBarrierError(Exception):
    """What is wrong with an operation; the caller knows where it happened."""


class MBarrier:
    """One barrier object.

    A phase is complete when no arrival and no byte is pending; the next begins with ``count`` pending arrivals.
    Bytes may complete before they are expected, so ``pending_bytes`` may be negative for a while.
    """

    __slots__ = (
        "offset",
        "count",
        "pending",
        "pending_bytes",
        "phase",
        "waiting",
        "rank",
        "landing",
        "clock",
        "gathered",
        "component",
        "is_public",
        "is_fenced",
    )

    def __init__(self, rank: int, offset: int, count: int) -> None:
        if not 1 <= count <= MOST_ARRIVALS:
            raise MBarrierError(f"a barrier of {count} arrivals, expected 1 to {MOST_ARRIVALS}")
        self.rank = rank
        self.offset = offset
        self.count = count
        self.pending = count
        self.pending_bytes = 0
        self.phase = 0
        self.waiting: list[tuple[Any, Any]] = []
        # Marks of copies that signal this barrier; the program knows that they are over when the phase completes.
        self.landing: list[Any] = []
        # What a warp knows that has seen the last phase complete, and what arrivals of this phase bring.
        self.clock: Any = None
        self.gathered: Any = None
        self.component = -1
        # Whether a fence has told other blocks of it, and the asynchronous proxy.
        self.is_public = False
        self.is_fenced = False

    def describe(self) -> str:
        """State, for reports."""
        return (
            f"mbarrier at shared offset {self.offset} of block {self.rank} of the cluster: phase {self.phase}, "
            f"{self.pending} of {self.count} arrivals and {self.pending_bytes} bytes pending"
        )

    def is_complete(self, parity: int) -> bool:
        """Whether the phase of this parity is complete: a fresh barrier has completed "phase -1", of parity 1."""
        return (self.phase & 1) != (parity & 1)

    def expect(self, num_bytes: int) -> None:
        """More bytes are to come in this phase."""
        self.pending_bytes += num_bytes

    def arrive(self, count: int) -> None:
        """Count arrivals."""
        if count > self.pending:
            raise MBarrierError(f"{count} arrivals where {self.pending} are pending: {self.describe()}")
        self.pending -= count
        self.settle()

    def complete(self, num_bytes: int) -> None:
        """Bytes have come."""
        self.pending_bytes -= num_bytes
        self.settle()

    def settle(self) -> None:
        """Go on to the next phase if this one is complete, and wake who waits."""
        if self.pending == 0 and self.pending_bytes == 0:
            self.phase += 1
            self.pending = self.count
            for mark in self.landing:
                mark.close()
            self.landing.clear()
            if self.clock is not None:
                learn(self.clock, self.gathered)
                self.clock[self.component] = self.phase
            waiting, self.waiting = self.waiting, []
            for warp, group in waiting:
                warp.wake(group)
