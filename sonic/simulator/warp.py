"""A warp: its groups of lanes, how they run, part and meet, and what generated code asks it for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import learn
from .errors import BarrierFault, MemoryFault, SimulatorError
from .instructions_control import FULL, Group
from .instructions_copies import BulkGroups, ThreadCopies
from .instructions_wgmma import Warpgroup
from .mbarrier import MBarrier
from .memory import Fault

SHARED_START = 1024  # what lies below belongs to the system
QUANTUM = 3000  # runs of a warp before another one gets its turn
LANES = np.arange(32, dtype=np.uint32)


class Warp:
    """32 threads of a block."""

    def __init__(self, cta: Any, index: int, num_threads: int) -> None:
        engine = cta.engine
        self.engine = engine
        self.cta = cta
        self.index = index
        self.live = (1 << num_threads) - 1
        self.groups = [Group(0, engine.program.template.copy(), self.live)]
        self.queued = False
        self.urgency = engine.random.random()
        self.last_stretch: Any = None
        self.cluster_phase: int | None = None
        self.bulk: dict[int, BulkGroups] = {}
        self.copies = ThreadCopies()
        self.team: Warpgroup = cta.team(index // 4)
        self.products_issued = 0
        self.products_waited = 0
        self.product_groups: list[int] = []
        # Whether there was a wgmma.fence, and sets of product registers that were used, or written, since the last.
        self.products_fenced = False
        self.reused: set[tuple[int, ...]] = set()
        self.rewritten: set[tuple[int, ...]] = set()
        self.dirty: dict[tuple[int, ...], int] = {}
        self.fragments: dict[tuple[int, ...], list[np.ndarray]] = {}
        self.turn = 0
        self.made: list[MBarrier] = []
        clocks = cta.cluster.clocks
        self.clock: Any = None
        self.component = -1
        # Of ordinary accesses: those of several lanes count as the warp's, those of one lane as that lane's. For each
        # of these components: the lanes behind it, and up to which value all lanes of the warp know of each other.
        self.accesses = self.accessor = -1
        self.lanes: dict[int, int] = {}
        self.synced: dict[int, int] = {}
        self.single: dict[int, int] = {}
        if clocks.is_on:
            self.component = clocks.component(("warp", cta.rank, index), f"warp {index} of block {cta.index}")
            self.clock = clocks.new()
            self.clock[self.component] = 1
            self.accesses = self.accessor = self.access_component(FULL)
        # For the timeline: instructions of this turn that the trace does not count yet, and the last that others saw.
        self.steps = 0
        self.at = 0
        linear = LANES + np.uint32(32 * index)
        x, y, _ = engine.config.block
        self.specials: dict[str, Any] = {
            **cta.specials,
            "tid.x": linear % np.uint32(x),
            "tid.y": linear // np.uint32(x) % np.uint32(y),
            "tid.z": linear // np.uint32(x * y),
            "laneid": LANES,
            "warpid": index,
            "lanemask_eq": np.uint32(1) << LANES,
            "lanemask_lt": (np.uint32(1) << LANES) - np.uint32(1),
            "lanemask_le": (np.uint32(2) << LANES) - np.uint32(1),
            "lanemask_ge": ~((np.uint32(1) << LANES) - np.uint32(1)),
            "lanemask_gt": ~((np.uint32(2) << LANES) - np.uint32(1)),
        }

    # -------------------------------------------------------------- used by generated code

    def fault(self, kind: type[SimulatorError], pc: int, text: str) -> SimulatorError:
        """An error with the place where it happened."""
        where = self.engine.program.kernel.instructions[pc].where()
        return kind(f"sonic.simulator: block {self.cta.index}, warp {self.index}: {text}, at {where}")

    def read_uninitialised(self, pc: int, text: str) -> None:
        """Shared memory is read that was never written: an error, or a warning."""
        if self.engine.options.uninitialised == "error":
            raise self.fault(MemoryFault, pc, text)
        where = self.engine.program.kernel.instructions[pc].where()
        self.engine.trace.warn(f"shared memory is read that was never written, at {where}")

    def place(self, address: int, pc: int, num_bytes: int, align: int) -> tuple[Any, int]:
        """Block and offset of a shared address."""
        rank, offset = address >> 24, address & 0xFFFFFF
        cluster = self.cta.cluster
        if rank >= cluster.num_ctas:
            raise self.fault(MemoryFault, pc, f"shared address 0x{address:x} is in no block of the cluster")
        cta = cluster.ctas[rank]
        if offset % align:
            raise self.fault(MemoryFault, pc, f"shared offset {offset} is not a multiple of {align}")
        if offset < SHARED_START:
            raise self.fault(
                MemoryFault, pc, f"shared offset {offset} is below {SHARED_START}, which belongs to the system"
            )
        try:
            cta.shared.check_range(offset, num_bytes)
        except Fault as fault:
            raise self.fault(MemoryFault, pc, str(fault)) from None
        if cta.finished:
            raise self.fault(MemoryFault, pc, f"access to shared memory of block {cta.index}, which has ended")
        return cta, offset

    def barrier(self, address: int, pc: int) -> MBarrier:
        """The initialised mbarrier at a shared address."""
        cta, offset = self.place(address, pc, 8, 8)
        found = cta.mbarriers.get(offset)
        if found is None:
            raise self.fault(BarrierFault, pc, f"no mbarrier was initialised at shared offset {offset}")
        if cta is not self.cta and not found.is_public:
            text = "uses an mbarrier of another block before that has executed fence.mbarrier_init"
            raise self.fault(BarrierFault, pc, text)
        return found

    def tell(self, clock: Any, bits: int = FULL) -> None:
        """Hand what some lanes know, and did so far, to a barrier: of other lanes' accesses those before they met."""
        if clock is None:
            return
        known = self.clock
        if self.live & ~bits:
            known = known.copy()
            for component, lanes in self.lanes.items():
                if lanes & self.live & ~bits:
                    known[component] = self.synced[component]
        learn(clock, known)
        self.clock[self.component] += 1
        for component in self.lanes:
            self.clock[component] += 1

    def access_component(self, bits: int) -> int:
        """Component of the ordinary accesses of one lane alone, or of several together (``FULL``)."""
        if bits in self.single:
            return self.single[bits]
        name = f"{'' if bits & (bits - 1) else 'a lane of '}warp {self.index} of block {self.cta.index}"
        component = self.cta.cluster.clocks.component(("accesses", self.cta.rank, self.index, bits), name)
        self.lanes[component], self.synced[component], self.clock[component] = bits, 0, 1
        self.single[bits] = component
        return component

    def sync_lanes(self) -> None:
        """``bar.warp.sync``: each lane knows from now on what the others did."""
        for component in self.lanes:
            self.synced[component] = self.clock.item(component)
            self.clock[component] += 1

    def note_remote(self, barrier: MBarrier) -> None:
        """This warp arrives at a barrier, maybe of another block, which must not end before it knows of that."""
        if self.clock is not None and barrier.rank != self.cta.rank:
            self.cta.cluster.ctas[barrier.rank].remote[self.component] = self.clock.item(self.component)

    def hear(self, clock: Any) -> None:
        """Take what a barrier's arrivals brought."""
        if clock is not None:
            learn(self.clock, clock)
            for component in self.lanes:
                self.synced[component] = max(self.synced[component], clock.item(component))

    def counter(self, what: str, detail: int = 0) -> int:
        """Component of something that this warp counts, such as its groups of bulk stores."""
        name = f"{what} of warp {self.index} of block {self.cta.index}"
        return self.cta.cluster.clocks.component((what, self.cta.rank, self.index, detail), name)

    def bulk_of(self, g: Group) -> BulkGroups:
        """Bulk stores of the thread that speaks for a group."""
        lane = (g.bits & -g.bits).bit_length() - 1
        found = self.bulk.get(lane)
        if found is None:
            found = self.bulk[lane] = BulkGroups(lane)
        return found

    def exit(self, g: Group) -> None:
        """End the threads of a group."""
        self.live &= ~g.bits
        self.at = len(self.engine.program.kernel.instructions) - 1
        self.groups.remove(g)
        for group in self.groups:
            if group.blocked == "meet":
                group.blocked = None
        if not self.groups:
            self.cta.warp_ended(self)

    def wake(self, g: Group) -> None:
        """A group may go on."""
        g.blocked = None
        g.waits_on = None
        if self.engine.waits is not None:
            self.engine.waits.end(g)
        if not self.queued:
            self.queued = True
            self.engine.ready.append(self)

    # -------------------------------------------------------------- running

    def run(self) -> None:
        """Run until all groups wait or have ended, or the turn is over."""
        engine = self.engine
        quantum = QUANTUM // 10 if engine.is_random else QUANTUM
        trace = engine.trace
        while self.groups:
            program = engine.program
            if len(self.groups) > 1:
                quantum -= 1
                if quantum <= 0:
                    engine.turn_is_over(self)
                    return
                if not self.step_group():
                    return
                continue
            g = self.groups[0]
            if g.blocked is not None:
                if g.blocked != "meet":
                    return
                g.blocked = None
            code, length, pc = program.coarse, program.coarse_length, g.pc
            steps = 0
            while True:
                function = code[pc]
                if function is None:  # lanes joined where only runs of part of a warp begin
                    function = program.fine_function(pc)
                    steps += program.fine_length[pc]
                else:
                    steps += length[pc]
                self.steps = steps
                pc = function(self, g)
                if pc < 0:
                    break
                quantum -= 1
                if quantum <= 0:
                    g.pc = pc
                    trace.instructions += steps
                    self.steps = 0
                    engine.turn_is_over(self)
                    return
            trace.instructions += steps
            self.steps = 0

    def step_group(self) -> bool:
        """Let one of several groups do one run; false if none can."""
        self.merge()
        runnable = [group for group in self.groups if group.blocked is None]
        if len(self.groups) == 1:
            return True
        if not runnable:
            return False
        self.turn += 1
        # Now and then another than the last in order, so that one that spins cannot keep the others from running.
        g = runnable[self.turn // 64 % len(runnable)] if self.turn % 64 == 0 else min(runnable, key=_place)
        program = self.engine.program
        function = program.fine_function(g.pc)
        self.engine.trace.instructions += program.fine_length[g.pc]
        pc = function(self, g)
        if pc >= 0:
            g.pc = pc
        return True

    def merge(self) -> None:
        """Join groups that are at the same place."""
        by_place: dict[int, Group] = {}
        for group in list(self.groups):
            other = by_place.get(group.pc)
            if other is None:
                by_place[group.pc] = group
                continue
            self.join(other, group)
            self.groups.remove(group)

    def join(self, a: Group, b: Group) -> None:
        """Add the lanes of ``b`` to ``a``."""
        engine = self.engine
        while True:
            program = engine.program
            uniform, mine, theirs = program.uniform, a.R, b.R
            differing = []
            joined = []
            for index in program.live_list(a.pc):
                x, y = mine[index], theirs[index]
                if x is y:
                    continue
                if not uniform[index]:
                    joined.append((index, np.where(b.mask, y, x)))
                elif x != y:
                    differing.append(index)
            if not differing:
                break
            engine.demote(differing, b)
        for index, value in joined:
            mine[index] = value
        a.set_bits(a.bits | b.bits)
        a.blocked = None
        a.waits_on = None


def _place(group: Group) -> int:
    return group.pc
