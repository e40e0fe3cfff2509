"""Who waits for whom: each wait that stopped a warp, what it was for, and who ended it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .mbarrier import MBarrier

MBARRIER_BYTES = 8


@dataclass(frozen=True)
class Ender:
    """Who ended a wait: a warp by an instruction of its own, or asynchronous work that a warp had issued.

    Attributes:
        block: of the warp.
        warp: that executed ``what``.
        what: the instruction and its place: the last arrival, or the issue of the work.
        work: ``TMA load``, ``bulk load``, ``st.async``, ``cp.async arrival``...; ``None`` for the warp itself.
        issued: when the work was issued, as `Wait` counts; ``None`` for the warp itself.
    """

    block: int
    warp: int
    what: str
    work: str | None = None
    issued: int | None = None


@dataclass
class Wait:
    """One wait that stopped a warp, in warp instructions executed so far by the whole launch.

    Attributes:
        block: number in the grid.
        warp: number in the block.
        what: the instruction and its place.
        start: when it began.
        end: when somebody ended it.
        barrier: offset in shared memory of an mbarrier, number of a named barrier, ``None`` for other waits.
        barrier_block: the block that the barrier belongs to.
        phase: which phase of the barrier was waited for, from 0; its parity is ``phase % 2``.
        ring: offset of the first barrier of the ring that an mbarrier belongs to, ``None`` if it stands alone.
        stage: its place in that ring, from 0.
        num_stages: of that ring, as far as the launch waited for them.
        ended_by: who ended it.
    """

    block: int
    warp: int
    what: str
    start: int
    end: int
    barrier: int | None = None
    barrier_block: int | None = None
    phase: int | None = None
    ring: int | None = None
    stage: int | None = None
    num_stages: int | None = None
    ended_by: Ender | None = None


class WaitRecorder:
    """Keeps the waits of a launch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.begun: dict[Any, Wait] = {}  # by group of lanes
        self.waited: dict[int, set[int]] = {}  # instruction -> offsets of mbarriers that it waited for or asked about
        self.users: dict[int, set[int]] = {}  # offset of an mbarrier -> warps that did

    def now(self) -> int:
        """Warp instructions so far; the straight run that a warp is in counts as done."""
        running = self.engine.running
        return self.engine.trace.instructions + (running.steps if running is not None else 0)

    def saw(self, w: Any, pc: int, barrier: MBarrier) -> None:
        """A warp waits for an mbarrier, or asks about it, even if it need not stop."""
        self.waited.setdefault(pc, set()).add(barrier.offset)
        self.users.setdefault(barrier.offset, set()).add(w.index)

    def where(self, pc: int) -> str:
        """An instruction and its place."""
        return self.engine.program.kernel.instructions[pc].where()

    def begin(self, w: Any, g: Any, pc: int, on: Any) -> None:
        """A group of lanes of a warp stops."""
        if g in self.begun:  # woken, asked again, and the next phase had begun
            return
        wait = self.begun[g] = Wait(w.cta.index, w.index, self.where(pc), self.now(), -1)
        if isinstance(on, MBarrier):
            wait.barrier, wait.barrier_block = on.offset, w.cta.cluster.ctas[on.rank].index
        elif hasattr(on, "number") and hasattr(on, "cta"):
            wait.barrier, wait.barrier_block = on.number, on.cta.index
        wait.phase = getattr(on, "phase", None)

    def end(self, g: Any) -> None:
        """A group of lanes may go on, because of what is being done now."""
        wait = self.begun.pop(g, None)
        if wait is None:
            return
        work, warp = self.engine.work, self.engine.running
        if work is not None:
            wait.ended_by = Ender(
                work.warp.cta.index, work.warp.index, self.where(work.pc), work.what, issued=work.issued
            )
        elif warp is not None:
            wait.ended_by = Ender(warp.cta.index, warp.index, self.where(warp.at))
        wait.end = self.now()
        self.engine.trace.timeline.append(wait)

    def number_stages(self) -> None:
        """Tell each wait for an mbarrier its place in a ring, once the launch is over."""
        places = rings(self.waited, self.users)
        for wait in self.engine.trace.timeline:
            if wait.what.startswith("`mbarrier.") and wait.barrier in places:
                wait.ring, wait.stage, wait.num_stages = places[wait.barrier]


def rings(waited: Mapping[int, set[int]], users: Mapping[int, set[int]]) -> dict[int, tuple[int, int, int]]:
    """Rings of barriers: offset of each barrier -> offset of the first of its ring, its place, length of the ring.

    Barriers that the same instruction waits for belong together, and so do those of instructions that share a barrier.
    Where a loop is unrolled each instruction may have a barrier of its own: neighbours for which exactly the same
    warps wait belong together too. They are a ring if they lie at multiples of a distance; barriers that stand alone
    are left out.

    Args:
        waited: for each instruction the offsets of the barriers that it waited for or asked about.
        users: for each offset the numbers of the warps that did.
    """
    found: list[set[int]] = []
    for offsets in waited.values():
        together = set(offsets)
        for other in [other for other in found if not other.isdisjoint(together)]:
            together |= other
            found.remove(other)
        found.append(together)
    found.sort(key=min)
    joined: list[list[int]] = []
    for row in map(sorted, found):
        last = joined[-1] if joined else []
        if last and row[0] <= last[-1] + MBARRIER_BYTES and len({frozenset(users[at]) for at in last + row}) == 1:
            last[:] = sorted(last + row)
        else:
            joined.append(row)
    places: dict[int, tuple[int, int, int]] = {}
    for row in joined:
        if len(row) < 2:
            continue
        first, distance = row[0], min(b - a for a, b in zip(row, row[1:], strict=False))
        if all((offset - first) % distance == 0 for offset in row):
            length = (row[-1] - first) // distance + 1
            places.update({offset: (first, (offset - first) // distance, length) for offset in row})
    return places
