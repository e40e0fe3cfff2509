"""Branches, exits, barriers of blocks and clusters, fences: what decides which lanes run next."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import BarrierFault
from .instructions_common import Emitter, emits, refuse, runtime, take
from .ptx import Instruction

FULL = 0xFFFFFFFF
LEFT = -1  # a run returns this when its lanes cannot simply go on at the next place


class Group:
    """Lanes of a warp that are at the same place, with their registers.

    Values of lanes outside ``bits`` mean nothing.
    """

    __slots__ = ("pc", "R", "bits", "mask", "raw", "blocked", "waits_on")

    def __init__(self, pc: int, registers: list[Any], bits: int) -> None:
        self.pc = pc
        self.R = registers
        self.blocked: str | None = None
        self.waits_on: Any = None
        self.set_bits(bits)

    def set_bits(self, bits: int) -> None:
        """Say which lanes belong to the group."""
        self.bits = bits
        self.mask = lanes_of(bits)
        self.raw = self.mask.tobytes()


_LANES: dict[int, np.ndarray] = {}


def lanes_of(bits: int) -> np.ndarray:
    """A bit mask as 32 truth values (shared: not to be written)."""
    found = _LANES.get(bits)
    if found is None:
        if len(_LANES) > 20000:
            _LANES.clear()
        packed = np.frombuffer(bits.to_bytes(4, "little"), np.uint8)
        found = _LANES[bits] = np.unpackbits(packed, bitorder="little").astype(np.bool_)
    return found


def bits_from(mask: np.ndarray) -> int:
    """32 truth values as a bit mask."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


NONE = bytes(32)


@runtime
def narrow(g: Group, guard: np.ndarray) -> Group | None:
    """The lanes of a group for which a guard holds, or None."""
    mask = guard & g.mask
    raw = mask.tobytes()
    if raw == NONE:
        return None
    if raw == g.raw:
        return g
    return Group(g.pc, g.R, bits_from(mask))


@runtime
def branch(w: Any, g: Group, condition: np.ndarray, taken: int, following: int) -> int:
    """Go on at one of two places, or split the group."""
    mask = condition & g.mask
    raw = mask.tobytes()
    if raw == g.raw:
        return taken
    if raw == NONE:
        return following
    bits = bits_from(mask)
    other = Group(taken, g.R.copy(), bits)
    g.pc = following
    g.set_bits(g.bits & ~bits)
    w.groups.append(other)
    return LEFT


@runtime
def meet(w: Any, g: Group, pc: int) -> int:
    """Wait until the other lanes that an instruction needs have come to it."""
    g.pc = pc
    g.blocked = "meet"
    return LEFT


@runtime
def leave(w: Any, g: Group) -> int:
    """End the threads of a group."""
    w.exit(g)
    return LEFT


@runtime
def special(w: Any, name: str) -> Any:
    """A read-only register: an integer, or an array of lanes."""
    return w.specials[name]


def emit_meeting(e: Emitter, made: Instruction, mask: str = str(FULL)) -> None:
    """In runs of part of a warp: lanes have to meet here first. The instruction is the first of its run."""
    if e.fine:
        e.line(f"if {mask} & w.live & ~g.bits: return meet(w, g, {made.pc})")


def block(g: Group, pc: int, why: str, on: Any) -> int:
    """Stop a group; it goes on at ``pc`` when it is woken."""
    g.pc = pc
    g.blocked = why
    g.waits_on = on
    return LEFT


# ---------------------------------------------------------------- branches and ends


@emits("bra")
def emit_bra(e: Emitter, made: Instruction) -> None:
    """Branch."""
    if made.parts[0] == "bra":
        take(made, ("uni",))
    following = made.pc + 1
    guard = made.guard
    if guard is None:
        e.write_back(e.live)
        e.line(f"return {made.target}")
    else:
        condition = e.scalar(guard, 1) if e.is_uniform(guard) else e.vector(guard, "b1")
        e.write_back(e.live)
        if e.is_uniform(guard):
            e.line(f"return {made.target} if {condition} else {following}")
        else:
            e.line(f"return branch(w, g, {condition}, {made.target}, {following})")
    e.ended = True


@emits("ret", "exit")
def emit_exit(e: Emitter, made: Instruction) -> None:
    """End of the thread."""
    e.line("return leave(w, g)")
    e.ended = True


@runtime
def trapped(w: Any, pc: int) -> int:
    """The kernel stopped itself."""
    raise w.fault(BarrierFault, pc, "the kernel executed trap")


@emits("trap")
def emit_trap(e: Emitter, made: Instruction) -> None:
    """Stop with an error."""
    e.line(f"return trapped(w, {made.pc})")
    e.ended = True


# ---------------------------------------------------------------- barriers of a block


class NamedBarrier:
    """One of the sixteen barriers of a block; ``count`` is -1 where all threads of the block take part."""

    __slots__ = ("number", "count", "arrived", "waiting", "phase", "cta", "gathered")

    def __init__(self, cta: Any, number: int) -> None:
        self.cta = cta
        self.number = number
        self.count = -1
        self.arrived = 0
        self.waiting: list[tuple[Any, Group]] = []
        self.phase = 0
        self.gathered = cta.cluster.clocks.new() if cta.cluster.clocks.is_on else None

    @property
    def expected(self) -> int:
        """Threads that have to arrive; ended ones need not."""
        return self.count if self.count >= 0 else self.cta.live_warps * 32

    def describe(self) -> str:
        """State, for reports."""
        return f"barrier {self.number}: {self.arrived} of {self.expected} threads arrived, phase {self.phase}"


def bar_arrive(w: Any, number: int, count: int, pc: int) -> NamedBarrier:
    """Count a warp's arrival; returns the barrier."""
    cta = w.cta
    barrier = cta.barriers.get(number)
    if barrier is None:
        if number > 15:
            raise w.fault(BarrierFault, pc, f"barrier {number} does not exist, there are 16")
        barrier = cta.barriers[number] = NamedBarrier(cta, number)
    if barrier.arrived == 0:
        barrier.count = count
    elif barrier.count != count:
        raise w.fault(BarrierFault, pc, f"barrier {number} is used with {count} threads: {barrier.describe()}")
    if count >= 0 and (count % 32 or count == 0):
        raise w.fault(BarrierFault, pc, f"barrier {number} with {count} threads, expected a multiple of 32")
    barrier.arrived += 32
    if barrier.arrived > barrier.expected:
        raise w.fault(BarrierFault, pc, f"too many arrivals: {barrier.describe()}")
    w.tell(barrier.gathered)
    w.at = pc
    w.engine.trace.add_event("bar arrive")
    return barrier


def release(barrier: NamedBarrier) -> None:
    """Begin the next phase and wake who waits."""
    barrier.arrived = 0
    barrier.phase += 1
    waiting, barrier.waiting = barrier.waiting, []
    for warp, group in waiting:
        warp.hear(barrier.gathered)
        warp.wake(group)


@runtime
def bar_sync(w: Any, g: Group, number: int, count: int, pc: int) -> int:
    """Arrive and wait."""
    barrier = bar_arrive(w, number, count, pc)
    if barrier.arrived == barrier.expected:
        release(barrier)
        w.hear(barrier.gathered)
        return pc + 1
    barrier.waiting.append((w, g))
    w.engine.note_wait(w, g, pc, barrier)
    return block(g, pc + 1, f"bar.sync {number}", barrier)


@runtime
def bar_arrive_only(w: Any, number: int, count: int, pc: int) -> None:
    """Arrive without waiting."""
    barrier = bar_arrive(w, number, count, pc)
    if barrier.arrived == barrier.expected:
        release(barrier)


@emits("bar", "barrier")
def emit_bar(e: Emitter, made: Instruction) -> None:
    """Barriers of warps, blocks and clusters."""
    parts = made.parts[1:]
    e.ended = True
    if made.parts[0] == "bar" and parts == ["warp", "sync"]:
        mask = made.operands[0]
        emit_meeting(e, made, e.scalar(mask) if e.is_uniform(mask) else str(FULL))
        e.line("w.sync_lanes()")
        e.ended = False
        return
    if made.guard is not None and not e.program.uniform[made.guard.index]:
        raise refuse(made, "a barrier whose guard differs between lanes is not simulated")
    if made.parts[0] == "barrier" and parts[:1] == ["cluster"]:
        _emit_cluster(e, made, parts[1:])
        return
    kinds = [part for part in parts if part not in ("cta", "aligned")]
    if kinds not in (["sync"], ["arrive"]) or (made.parts[0] == "barrier" and "aligned" not in parts):
        raise refuse(made)
    operands = made.operands
    if not all(e.is_uniform(operand) for operand in operands):
        raise refuse(made, "a barrier whose number or count differs between lanes is not simulated")
    number = e.scalar(operands[0])
    count = e.scalar(operands[1]) if len(operands) > 1 else "-1"
    emit_meeting(e, made)
    if kinds == ["sync"]:
        e.write_back(e.live)
        e.line(f"return bar_sync(w, g, {number}, {count}, {made.pc})")
    else:
        e.line(f"bar_arrive_only(w, {number}, {count}, {made.pc})")
        e.ended = False


# ---------------------------------------------------------------- barriers of a cluster


@runtime
def cluster_arrive(w: Any, pc: int, relaxed: bool) -> None:
    """Arrive at the cluster's barrier."""
    if w.cluster_phase is not None:
        raise w.fault(BarrierFault, pc, "barrier.cluster.arrive twice without a wait")
    w.cluster_phase = w.cta.cluster.phase
    w.at = pc
    w.tell(w.cta.cluster.gathered)
    if not relaxed:
        publish(w)
    w.cta.cluster.arrive(w)


@runtime
def cluster_wait(w: Any, g: Group, pc: int) -> int:
    """Wait for the cluster's barrier."""
    cluster = w.cta.cluster
    if w.cluster_phase is None:
        raise w.fault(BarrierFault, pc, "barrier.cluster.wait without an arrive")
    if cluster.phase > w.cluster_phase:
        w.cluster_phase = None
        w.hear(cluster.gathered)
        return pc + 1
    cluster.waiting.append((w, g))
    w.engine.note_wait(w, g, pc, cluster)
    return block(g, pc, "barrier.cluster.wait", cluster)


def _emit_cluster(e: Emitter, made: Instruction, parts: list[str]) -> None:
    kinds = [part for part in parts if part not in ("relaxed", "release", "acquire", "aligned")]
    emit_meeting(e, made)
    if kinds == ["arrive"]:
        e.line(f"cluster_arrive(w, {made.pc}, {'relaxed' in parts})")
        e.ended = False
    elif kinds == ["wait"]:
        e.write_back(e.live)
        e.line(f"return cluster_wait(w, g, {made.pc})")
    else:
        raise refuse(made)


# ---------------------------------------------------------------- fences and hints


@runtime
def publish(w: Any) -> None:
    """Barriers that this warp initialised may be used by other blocks."""
    for barrier in w.made:
        barrier.is_public = barrier.is_fenced = True
    w.made.clear()


@runtime
def fence_async(w: Any) -> None:
    """Writes of this warp become visible to the asynchronous proxy, its barriers among them."""
    for barrier in w.made:
        barrier.is_fenced = True
    if w.cta.checker is not None:
        w.cta.checker.fence(w)


_FENCES = {"acq_rel", "sc", "acquire", "release", "cta", "cluster", "gpu", "sys", "mbarrier_init", "proxy", "async"}
_FENCES |= {"async::generic", "alias", "tensormap::generic", "global", "shared::cta", "shared::cluster"}
_FENCES |= {"sync_restrict::shared::cta", "sync_restrict::shared::cluster"}


@emits("fence", "membar")
def emit_fence(e: Emitter, made: Instruction) -> None:
    """Fences order nothing here but accesses of the two proxies."""
    take(made, sorted(_FENCES | {"gl"}))
    if "proxy" in made.parts and "async" in made.parts:
        e.line("fence_async(w)")
    elif "mbarrier_init" in made.parts:
        e.line("publish(w)")


@emits("createpolicy", scalar=lambda made, uniform: True)
def emit_createpolicy(e: Emitter, made: Instruction) -> None:
    """A cache policy, of which hints make use that have no effect: any number does."""
    known = ["L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"]
    if made.parts[1] not in ("fractional", "range") or made.parts[-1] != "b64" or set(made.parts[2:-1]) - set(known):
        raise refuse(made)
    e.write_scalar_or_spread(made.operands[0], "0", "u64")


@emits("setmaxnreg", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "discard", "applypriority", "pmevent")
def emit_hint(e: Emitter, made: Instruction) -> None:
    """Hints without an effect on results."""
    known = ("inc", "dec", "sync", "aligned", "u32", "wait", "launch_dependents", "tensormap", "global", "L1", "L2")
    take(made, (*known, "const", "param", "L2::evict_last", "L2::evict_normal"))
    if made.parts[0] == "nanosleep":
        e.write_back(e.live)
        e.line(f"return {made.pc + 1}")
        e.ended = True
