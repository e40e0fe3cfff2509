"""Runs a translated kernel: warps, blocks and clusters, who runs next, asynchronous work, reports.

Scheduling is cooperative. A warp runs until it has to wait; groups of lanes of a warp that are at different places
take turns, the one furthest behind first, and join where they meet. Asynchronous work happens at issue, when nothing
else can run, or at any time, as the options say.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from .checks import Checker, Clocks
from .errors import Deadlock, RaceFault, SimulatorError
from .instructions_control import FULL, Group, release
from .instructions_copies import Action
from .instructions_wgmma import Warpgroup
from .kernel_launch import LaunchConfig, Region
from .mbarrier import MBarrier
from .memory import GlobalMemory, SharedMemory
from .options import Options
from .trace import Trace
from .translate import Program, load
from .waits import WaitRecorder
from .warp import SHARED_START, Warp

__all__ = ["Options", "Trace", "run"]


def _urgency(warp: Warp) -> float:
    return warp.urgency


def _numbers(what: str, numbers: list[int]) -> str:
    """``warp 3``, ``warps 0-3, 5``."""
    rows: list[list[int]] = []
    for number in sorted(set(numbers)):
        if rows and rows[-1][1] == number - 1:
            rows[-1][1] = number
        else:
            rows.append([number, number])
    text = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in rows)
    return f"{what}{'s' if len(set(numbers)) > 1 else ''} {text}"


class Block:
    """A thread block (CTA)."""

    def __init__(self, engine: Engine, cluster: Cluster, rank: int, position: tuple[int, int, int]) -> None:
        config = engine.config
        self.engine = engine
        self.cluster = cluster
        self.rank = rank
        gx, gy, gz = config.grid
        x, y, z = position
        self.index = x + gx * (y + gy * z)
        self.finished = False
        self.shared = SharedMemory(engine.shared_bytes, rank, cluster.num_ctas)
        self.checker = Checker(engine.shared_bytes, cluster.clocks) if engine.options.checks else None
        self.mbarriers: dict[int, MBarrier] = {}
        # Component and value of clocks of what other blocks did to this one's shared memory last.
        self.remote: dict[int, int] = {}
        self.barriers: dict[int, Any] = {}
        self.teams: dict[int, Warpgroup] = {}
        self.symbols = {name: offset | rank << 24 for name, offset in engine.shared_symbols.items()}
        self.symbols.update(engine.global_symbols)
        cx, cy, cz = config.cluster
        self.specials: dict[str, Any] = {
            **{f"ntid.{axis}": size for axis, size in zip("xyz", config.block, strict=True)},
            **{f"nctaid.{axis}": size for axis, size in zip("xyz", config.grid, strict=True)},
            **{f"ctaid.{axis}": value for axis, value in zip("xyz", position, strict=True)},
            **{f"cluster_nctaid.{axis}": size for axis, size in zip("xyz", config.cluster, strict=True)},
            **{f"cluster_ctaid.{a}": v % c for a, v, c in zip("xyz", position, config.cluster, strict=True)},
            **{f"clusterid.{a}": v // c for a, v, c in zip("xyz", position, config.cluster, strict=True)},
            **{f"nclusterid.{a}": g // c for a, g, c in zip("xyz", config.grid, config.cluster, strict=True)},
            "cluster_ctarank": rank,
            "cluster_nctarank": cx * cy * cz,
            "is_explicit_cluster": config.cluster != (1, 1, 1),
            "nwarpid": -(-config.num_threads // 32),
            "smid": self.index % 132,
            "nsmid": 132,
            "gridid": 1,
            "dynamic_smem_size": config.dynamic_shared_bytes,
            "total_smem_size": engine.shared_bytes,
            **{name: 0 for name in ("clock", "clock64", "clock_hi", "globaltimer", "globaltimer_lo")},
        }
        threads = config.num_threads
        self.warps = [Warp(self, n, min(32, threads - 32 * n)) for n in range(-(-threads // 32))]
        self.live_warps = len(self.warps)

    def team(self, index: int) -> Warpgroup:
        """The warpgroup of a number."""
        found = self.teams.get(index)
        if found is None:
            found = self.teams[index] = Warpgroup(self, index)
        return found

    def warp_ended(self, warp: Warp) -> None:
        """A warp has no threads left."""
        self.live_warps -= 1
        for barrier in self.barriers.values():
            if barrier.count < 0 and barrier.arrived and barrier.arrived == barrier.expected:
                release(barrier)
        self.cluster.settle()
        if self.live_warps == 0:
            self.end()

    def end(self) -> None:
        """The last thread has ended."""
        self.finished = True
        trace = self.engine.trace
        if self.remote:
            known = np.maximum.reduce([warp.clock for warp in self.warps])
            for component, value in self.remote.items():
                if known[component] < value:
                    who = self.cluster.clocks.names[component]
                    raise RaceFault(
                        f"sonic.simulator: block {self.index} ends without having waited for what {who} did to its "
                        "shared memory: in another order that comes too late"
                    )
        if self.engine.options.checks:
            for barrier in self.mbarriers.values():
                if barrier.pending != barrier.count or barrier.pending_bytes:
                    trace.add_event("mbarriers left in the middle of a phase")
                    trace.warn(f"block {self.index} ends with a phase begun: {barrier.describe()}")
            for warp in self.warps:
                left = [action for queue in warp.bulk.values() for action in (*chain(*queue.groups), *queue.open)]
                if left:
                    where = self.engine.program.kernel.instructions[left[-1].pc].where()
                    trace.warn(
                        f"block {self.index} ends and warp {warp.index} has not waited for its bulk stores, "
                        f"which may still read shared memory: {where}"
                    )
        self.engine.block_ended(self)


class Cluster:
    """Blocks that share their memory; a block alone is a cluster of one."""

    def __init__(self, engine: Engine, position: tuple[int, int, int]) -> None:
        cx, cy, cz = engine.config.cluster
        self.num_ctas = cx * cy * cz
        self.phase = 0
        self.arrived = 0
        self.waiting: list[tuple[Any, Group]] = []
        self.clocks = Clocks(engine.options.checks and engine.options.order_checks)
        self.gathered = self.clocks.new() if self.clocks.is_on else None
        self.ctas: list[Block] = []
        for rank in range(self.num_ctas):
            x, y, z = rank % cx, rank // cx % cy, rank // (cx * cy)
            place = (position[0] * cx + x, position[1] * cy + y, position[2] * cz + z)
            self.ctas.append(Block(engine, self, rank, place))

    def describe(self) -> str:
        """State, for reports."""
        return f"barrier of the cluster: {self.arrived} of {self.expected()} warps arrived"

    def expected(self) -> int:
        """Warps that have to arrive."""
        return sum(cta.live_warps for cta in self.ctas)

    def arrive(self, warp: Warp) -> None:
        """Count a warp's arrival."""
        self.arrived += 1
        self.settle()

    def settle(self) -> None:
        """Begin the next phase if all have arrived."""
        if self.arrived and self.arrived >= self.expected():
            self.arrived = 0
            self.phase += 1
            waiting, self.waiting = self.waiting, []
            for warp, group in waiting:
                warp.wake(group)


class Engine:
    """One launch."""

    def __init__(
        self, program: Program, config: LaunchConfig, params: Sequence[int], regions: Sequence[Region], options: Options
    ) -> None:
        self.program = program
        self.config = config
        self.options = options
        self.trace = Trace(program.kernel.name)
        self.random = random.Random(options.seed)
        self.is_eager = options.schedule == "eager"
        self.is_random = options.schedule == "random"
        self.ready: deque[Warp] = deque()
        self.pending: deque[Action] = deque()
        self.patterns: dict[tuple[bytes, int], Any] = {}
        self.shared_start = SHARED_START
        self.blocks: list[Block] = []
        self.turns_without_wait = 0
        # Who is at work: a warp in its turn, and a piece of asynchronous work that is being performed.
        self.running: Warp | None = None
        self.work: Action | None = None
        self.waits = WaitRecorder(self) if options.timeline else None
        self.memory = GlobalMemory(regions)
        self.keep: list[Any] = []
        self.read_params(params)
        self.lay_out()

    def hold(self, num_bytes: int, align: int, name: str) -> tuple[int, Any]:
        """Host memory for the launch itself: address and bytes."""
        buffer = (ctypes.c_uint8 * (num_bytes + align))()
        address = -(-ctypes.addressof(buffer) // align) * align
        self.keep.append(buffer)
        self.memory.add(Region(address, num_bytes, name))
        return address, memoryview(buffer)[address - ctypes.addressof(buffer) :].cast("B")

    def read_params(self, params: Sequence[int]) -> None:
        """Copy the parameters to one place, aligned as tensor maps have to be."""
        declared = self.program.kernel.params
        if len(params) != len(declared):
            raise SimulatorError(f"sonic.simulator: {len(params)} parameters, the kernel has {len(declared)}")
        address, view = self.hold(max(self.program.bank_bytes, 1), 128, "parameters")
        for param, source in zip(declared, params, strict=True):
            start = self.program.param_offsets[param.name]
            view[start : start + param.num_bytes] = ctypes.string_at(source, param.num_bytes)
        self.bank, self.bank_address = bytes(view[: self.program.bank_bytes]), address
        self.global_symbols = {name: address + start for name, start in self.program.param_offsets.items()}

    def lay_out(self) -> None:
        """Places of variables: static shared memory, then dynamic, and module variables."""
        offset = SHARED_START
        self.shared_symbols: dict[str, int] = {}
        variables = list(self.program.kernel.variables.values())
        for variable in sorted(variables, key=lambda item: item.num_bytes == 0):
            if variable.space == "shared":
                offset = -(-offset // variable.align) * variable.align
                self.shared_symbols[variable.name] = offset
                offset += variable.num_bytes
            elif variable.space in ("global", "const"):
                address, view = self.hold(max(variable.num_bytes, 1), max(variable.align, 16), variable.name)
                view[: len(variable.data)] = variable.data
                self.global_symbols[variable.name] = address
        self.shared_bytes = offset + self.config.dynamic_shared_bytes
        if self.shared_bytes > SHARED_START + 227 * 1024:
            raise SimulatorError(
                f"sonic.simulator: {self.shared_bytes - SHARED_START} bytes of shared memory, "
                "a block has 232448 at most"
            )

    # -------------------------------------------------------------- used by warps

    def defer(self, action: Action) -> None:
        """Asynchronous work: now, or later as the schedule says."""
        if self.is_eager:
            action.run()
        else:
            self.pending.append(action)

    def coin(self) -> bool:
        """Whether the random schedule does something early."""
        return self.is_random and self.random.random() < 0.5

    def says_not_yet(self) -> bool:
        """Whether a test of a barrier fails although the phase may be complete."""
        return self.is_random and self.random.random() < 0.1

    def note_wait(self, w: Warp, g: Group, pc: int, on: Any) -> None:
        """Begin of a wait, for the timeline; ``on`` is what it is for."""
        if self.waits is not None:
            self.waits.begin(w, g, pc, on)

    def turn_is_over(self, w: Warp) -> None:
        """A warp ran for long: it may be waiting for what others, or asynchronous work, have yet to do."""
        w.queued = True
        w.urgency *= self.random.random()  # one that spins must not starve those who would end that
        self.ready.append(w)
        if self.pending:
            self.perform_one()
        if self.trace.instructions > self.options.step_budget:
            raise Deadlock(
                f"sonic.simulator: {self.trace.instructions} warp instructions and no end: a spin that nothing ends? "
                f"raise step_budget if the launch is that long\n{self.report()}"
            )

    def demote(self, indices: list[int], extra: Group) -> None:
        """Registers that were thought uniform get 32 lanes, everywhere."""
        changed = self.program.demote(indices)
        canonical = self.program.canonical
        groups = [group for block in self.blocks for warp in block.warps for group in warp.groups]
        seen = {id(group) for group in groups}
        if id(extra) not in seen:
            groups.append(extra)
        kinds = {kind: np.dtype(kind) for kind in ("u1", "u2", "u4", "u8")}
        for group in groups:
            for index in changed:
                kind = canonical[index]
                value = group.R[index]
                if kind == "b1":
                    group.R[index] = np.full(32, bool(value))
                else:
                    raw = np.full(32, value, kinds[f"u{int(kind[1:]) // 8}"])
                    group.R[index] = raw.view(np.float32) if kind == "f32" else raw

    # -------------------------------------------------------------- the launch

    def block_ended(self, block: Block) -> None:
        """Make room for the next cluster."""
        self.alive -= 1

    def start_cluster(self) -> None:
        """Bring the next cluster to life."""
        sizes = [g // c for g, c in zip(self.config.grid, self.config.cluster, strict=True)]
        n = self.next_cluster
        self.next_cluster += 1
        cluster = Cluster(self, (n % sizes[0], n // sizes[0] % sizes[1], n // (sizes[0] * sizes[1])))
        for block in cluster.ctas:
            self.blocks.append(block)
            self.alive += 1
            for warp in block.warps:
                warp.queued = True
                self.ready.append(warp)

    def choose(self) -> Warp:
        """The next warp of the random schedule: the most urgent, where urgency is drawn anew now and then.

        Some warps fall far behind others that way, which drawing evenly each time hardly ever does.
        """
        warp = max(self.ready, key=_urgency)
        self.ready.remove(warp)
        if self.random.random() < 0.05:
            warp.urgency = self.random.random()
        return warp

    def perform_one(self) -> None:
        """Do one piece of asynchronous work."""
        if self.is_random:
            self.pending.rotate(-self.random.randrange(len(self.pending)))
        action = self.pending.popleft()
        if not action.done:
            action.run()

    def run(self) -> Trace:
        """Run all blocks to their end."""
        grid, cluster = self.config.grid, self.config.cluster
        if any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise SimulatorError(f"sonic.simulator: a grid of {grid} is no multiple of the cluster {cluster}")
        required = self.program.kernel.required_block
        if required is not None and required != self.config.block:
            raise SimulatorError(f"sonic.simulator: blocks of {self.config.block}, the kernel requires {required}")
        num_clusters = self.config.num_blocks // (cluster[0] * cluster[1] * cluster[2])
        limit = self.config.num_blocks if self.config.is_cooperative else self.options.resident_ctas
        self.next_cluster = 0
        self.alive = 0
        start = time.perf_counter()
        with np.errstate(all="ignore"):
            while True:
                while self.next_cluster < num_clusters and (self.alive == 0 or self.alive < limit):
                    if self.alive == 0:
                        self.blocks.clear()
                    self.start_cluster()
                if self.is_random and self.pending and self.random.random() < 0.3:
                    self.perform_one()
                if self.ready:
                    warp = self.choose() if self.is_random else self.ready.popleft()
                    warp.queued = False
                    self.running = warp
                    warp.run()
                    self.running = None
                elif self.pending:
                    self.perform_one()
                elif self.alive == 0 and self.next_cluster == num_clusters:
                    break
                elif self.alive:
                    raise Deadlock("sonic.simulator: no warp can run and nothing is in flight\n" + self.report())
        self.trace.seconds = time.perf_counter() - start
        if self.waits is not None:
            self.waits.number_stages()
        return self.trace

    def report(self) -> str:
        """Each warp: where it is and what it waits for; what is the same for several is told once."""
        code = self.program.kernel.instructions
        same: dict[tuple[Any, ...], list[int]] = {}
        for block in self.blocks:
            states: dict[str, list[int]] = {}
            for warp in block.warps:
                if not warp.groups:
                    states.setdefault(": has ended", []).append(warp.index)
                for group in warp.groups:
                    what = group.blocked or "can run"
                    if group.blocked == "meet":
                        what = f"waits for lanes 0x{warp.live & ~group.bits:08x} to come to the same instruction"
                    elif group.waits_on is not None and hasattr(group.waits_on, "describe"):
                        what = f"{what}: {group.waits_on.describe()}"
                    lanes = "" if group.bits == FULL else f" lanes 0x{group.bits:08x}"
                    states.setdefault(f"{lanes}: {what}, at {code[group.pc].where()}", []).append(warp.index)
            told = tuple((_numbers("warp", warps), state) for state, warps in states.items())
            same.setdefault((block.rank, told), []).append(block.index)
        return "\n".join(
            f"  {_numbers('block', blocks)} (rank {rank}) {warps}{state}"
            for (rank, told), blocks in same.items()
            for warps, state in told
        )


def run(
    ptx: str,
    entry: str,
    config: LaunchConfig,
    params: list[int],
    regions: Sequence[Region],
    options: Options | None = None,
) -> Trace:
    """Run a kernel on host memory.

    Args:
        ptx: text of the module.
        entry: name of the kernel.
        config: shape of the launch.
        params: host address of each parameter's bytes; sizes come from the PTX.
        regions: stretches of host memory that the kernel may touch.
        options: order of events, checks, budget.
    """
    return Engine(load(ptx, entry), config, params, regions, options or Options()).run()
