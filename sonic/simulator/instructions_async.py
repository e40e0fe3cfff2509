"""Barriers in shared memory, bulk copies by tensor map and without, cp.async, st.async, tensor map updates."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import instructions_wgmma  # noqa: F401  registers its handlers
from .errors import BarrierFault
from .instructions_common import Emitter, all_uniform, bits_of, emits, refuse, runtime
from .instructions_control import Group, block, emit_meeting, lanes_of
from .instructions_copies import (
    BulkCopy,
    arrive_when_copied,
    async_copy,
    bulk_commit,
    bulk_wait,
    copies_wait,
    launch_bulk,
    replace_field,
    store_async,
)
from .instructions_memory import vector_address
from .mbarrier import MBarrier, MBarrierError
from .ptx import Addr, Imm, Instruction, Operand, Reg, Sink, Vec
from .tma import REDUCTIONS

for _function in (
    launch_bulk,
    async_copy,
    arrive_when_copied,
    bulk_commit,
    bulk_wait,
    copies_wait,
    store_async,
    replace_field,
):
    runtime(_function)


# ---------------------------------------------------------------- mbarrier

# What the memory of a barrier holds, so that a barrier is known to be gone when something else was stored there.
OBJECT = np.uint64(0x5A6D_6261_7272_6965)


def distinct(g: Group, value: Any) -> list[tuple[int, int]]:
    """(value, bits of the lanes that have it) for the lanes of a group."""
    if not isinstance(value, np.ndarray):
        return [(int(value), g.bits)]
    active = value[g.mask]
    first = active.item(0)
    if (active == active[0]).all():
        return [(first, g.bits)]
    return [(number, bits_of_lanes(g, value == number)) for number in dict.fromkeys(active.tolist())]


def bits_of_lanes(g: Group, mask: np.ndarray) -> int:
    """Lanes of a group for which a mask holds."""
    return int.from_bytes(np.packbits(mask & g.mask, bitorder="little").tobytes(), "little")


def lane_value(g: Group, value: Any, bits: int) -> int:
    """Value in the lowest of some lanes."""
    if not isinstance(value, np.ndarray):
        return int(value)
    return int(value.item((bits & -bits).bit_length() - 1))


@runtime
def mbarrier_init(w: Any, g: Group, pc: int, addresses: Any, count: Any) -> None:
    """Make barriers."""
    for address, bits in distinct(g, addresses):
        cta, offset = w.place(address, pc, 8, 8)
        try:
            made = MBarrier(cta.rank, offset, lane_value(g, count, bits))
        except MBarrierError as error:
            raise w.fault(BarrierFault, pc, str(error)) from None
        if bits.bit_count() > 1:
            raise w.fault(BarrierFault, pc, f"{bits.bit_count()} lanes initialise the same barrier: elect one")
        memory = cta.shared.views[8]
        old = cta.mbarriers.get(offset)
        if old is not None and (old.waiting or memory[offset >> 3] == OBJECT):
            raise w.fault(BarrierFault, pc, f"initialises a barrier that is in use: {old.describe()}")
        cta.mbarriers[offset] = made
        w.made.append(made)
        clocks = cta.cluster.clocks
        if clocks.is_on:
            made.clock, made.gathered = clocks.new(), clocks.new()
            made.component = clocks.component((cta.rank, offset), f"copies that signal the mbarrier at offset {offset}")
        memory[offset >> 3] = OBJECT


@runtime
def mbarrier_inval(w: Any, g: Group, pc: int, addresses: Any) -> None:
    """Forget barriers."""
    for address, _ in distinct(g, addresses):
        cta, offset = w.place(address, pc, 8, 8)
        cta.mbarriers.pop(offset, None)


@runtime
def mbarrier_arrive(w: Any, g: Group, pc: int, addresses: Any, count: Any, num_bytes: Any, drops: bool) -> Any:
    """Arrive once per lane (``count`` times each), after expecting bytes if there are any; returns the old phase."""
    phase = 0
    for address, bits in distinct(g, addresses):
        barrier = w.barrier(address, pc)
        lanes = bits.bit_count()
        phase = barrier.phase
        try:
            if num_bytes is not None:
                barrier.expect(lane_value(g, num_bytes, bits) * lanes)
            arrivals = lane_value(g, count, bits) * lanes
            if drops:
                barrier.count -= arrivals
            w.note_remote(barrier)
            w.tell(barrier.gathered, bits)
            w.at = pc
            barrier.arrive(arrivals)
        except MBarrierError as error:
            raise w.fault(BarrierFault, pc, str(error)) from None
        w.engine.trace.add_event("mbarrier arrive", lanes)
    return phase


@runtime
def mbarrier_bytes(w: Any, g: Group, pc: int, addresses: Any, num_bytes: Any, completes: bool) -> None:
    """Expect or complete bytes without an arrival."""
    for address, bits in distinct(g, addresses):
        barrier = w.barrier(address, pc)
        amount = lane_value(g, num_bytes, bits) * bits.bit_count()
        w.at = pc
        if completes:
            barrier.complete(amount)
        else:
            barrier.expect(amount)


@runtime
def mbarrier_test(w: Any, g: Group, pc: int, addresses: Any, parity: Any, by_phase: bool) -> Any:
    """Whether a phase is complete; may say no although it is, as hardware may."""
    if w.engine.says_not_yet():
        return False if not isinstance(addresses, np.ndarray) else np.zeros(32, np.bool_)
    result = None
    for address, bits in distinct(g, addresses):
        barrier = w.barrier(address, pc)
        if w.engine.waits is not None:
            w.engine.waits.saw(w, pc, barrier)
        number = lane_value(g, parity, bits)
        is_done = barrier.phase != number if by_phase else barrier.is_complete(number)
        if is_done:
            w.hear(barrier.clock)
        if not isinstance(addresses, np.ndarray) and not isinstance(parity, np.ndarray):
            return is_done
        if result is None:
            result = np.zeros(32, np.bool_)
        result |= lanes_of(bits) if is_done else False
    return result


@runtime
def mbarrier_wait(w: Any, g: Group, pc: int, following: int, addresses: Any, parity: Any) -> int:
    """A loop around try_wait: go on behind it when the phase is complete."""
    for address, bits in distinct(g, addresses):
        barrier = w.barrier(address, pc)
        if w.engine.waits is not None:
            w.engine.waits.saw(w, pc, barrier)
        number = lane_value(g, parity, bits)
        if not barrier.is_complete(number):
            barrier.waiting.append((w, g))
            w.engine.note_wait(w, g, pc, barrier)
            return block(g, pc, f"mbarrier wait, parity {number & 1}", barrier)
        w.hear(barrier.clock)
    w.engine.trace.add_event("mbarrier wait")
    return following


def _value(e: Emitter, operand: Operand, width: int) -> str:
    return e.scalar(operand, width) if e.is_uniform(operand) else e.vector(operand, f"u{width}")


def any_address(e: Emitter, operand: Operand, made: Instruction, width: int = 32) -> str:
    """An address, uniform or by lane."""
    if not isinstance(operand, Addr):
        raise refuse(made)
    text, is_one = e.address(operand, width)
    if not is_one and isinstance(operand.base, Reg) and operand.base.width != width:
        return f"{text}.astype(T_u{width})"
    return text


_SCOPES = ("shared", "shared::cta", "shared::cluster", "cta", "cluster", "b64", "release", "acquire", "relaxed")


def _mbarrier_rule(made: Instruction, uniform: Any) -> bool:
    if made.parts[1] in ("try_wait", "test_wait"):
        address = made.operands[1]
        return isinstance(address, Addr) and all(uniform(operand) for operand in made.operands[1:])
    return made.parts[1] in ("arrive", "arrive_drop") and uniform(made.operands[1])


@emits("mbarrier", scalar=_mbarrier_rule)
def emit_mbarrier(e: Emitter, made: Instruction) -> None:
    """Barriers in shared memory."""
    action = made.parts[1]
    mods = [part for part in made.parts[2:] if part not in _SCOPES]
    operands = made.operands
    if action == "init" and not mods:
        address = any_address(e, operands[0], made)
        e.line(f"mbarrier_init(w, {e.group}, {made.pc}, {address}, {_value(e, operands[1], 32)})")
    elif action == "inval" and not mods:
        e.line(f"mbarrier_inval(w, {e.group}, {made.pc}, {any_address(e, operands[0], made)})")
    elif action in ("arrive", "arrive_drop") and mods in ([], ["expect_tx"], ["noComplete"]):
        target: Operand = Sink()
        if not isinstance(operands[0], Addr):
            target, operands = operands[0], operands[1:]
        extra = _value(e, operands[1], 32) if len(operands) > 1 else "1"
        count, num_bytes = ("1", extra) if mods == ["expect_tx"] else (extra, "None")
        address = any_address(e, operands[0], made)
        drops = action == "arrive_drop"
        call = f"mbarrier_arrive(w, {e.group}, {made.pc}, {address}, {count}, {num_bytes}, {drops})"
        if isinstance(target, Reg):
            e.write_scalar_or_spread(target, call, "u64")
        else:
            e.line(call)
    elif action in ("expect_tx", "complete_tx") and not mods:
        address = any_address(e, operands[0], made)
        amount = _value(e, operands[1], 32)
        e.line(f"mbarrier_bytes(w, {e.group}, {made.pc}, {address}, {amount}, {action == 'complete_tx'})")
    elif action in ("try_wait", "test_wait") and mods in ([], ["parity"]):
        _emit_wait(e, made, bool(mods))
    else:
        raise refuse(made)


def _emit_wait(e: Emitter, made: Instruction, by_parity: bool) -> None:
    d, address, parity = made.operands[:3]
    place = any_address(e, address, made)
    number = _value(e, parity, 32 if by_parity else 64)
    if made.pc in e.program.flow.waits and by_parity:
        following = e.program.flow.waits[made.pc]
        if isinstance(d, Reg):
            e.write_scalar_or_spread(d, "True", "b1")
        e.write_back(e.live)
        e.line(f"return mbarrier_wait(w, g, {made.pc}, {following}, {place}, {number})")
        e.ended = True
        return
    call = f"mbarrier_test(w, {e.group}, {made.pc}, {place}, {number}, {not by_parity})"
    if e.is_scalar_result(d):
        e.write(d, call, "b1")
        return
    if e.is_uniform(address) and e.is_uniform(parity):
        e.write_scalar_or_spread(d, call, "b1")
        return
    e.write(d, call, "b1")


# ---------------------------------------------------------------- addresses in a cluster


@emits("mapa", scalar=all_uniform)
def emit_mapa(e: Emitter, made: Instruction) -> None:
    """The same address in another block of the cluster."""
    if made.parts[1:] not in (["shared::cluster", "u32"], ["u32"], ["u64"], ["shared::cluster", "u64"]):
        raise refuse(made)
    d, a, rank = made.operands
    kind = made.parts[-1]
    width = bits_of(kind)
    if e.is_scalar_result(d):
        e.write(d, f"({e.scalar(a, width)} & 0xFFFFFF) | ({e.scalar(rank, 32)} << 24)", kind)
        return
    x = f"({e.vector(a, kind, full=True)} & {e.constant(0xFFFFFF, kind)})"
    y = e.vector(rank, "u32", full=True)
    e.write(d, f"{x} | ({y}.astype(T_{kind}) << {e.constant(24, kind)})", kind)


@emits("getctarank", scalar=all_uniform)
def emit_getctarank(e: Emitter, made: Instruction) -> None:
    """Block in which a shared address lies."""
    if made.parts[1:] not in (["shared::cluster", "u32"], ["u64"]):
        raise refuse(made)
    d, a = made.operands
    width = bits_of(made.parts[-1])
    if e.is_scalar_result(d):
        e.write(d, f"({e.scalar(a, width)} >> 24) & 0xFF", "u32")
    else:
        e.write(d, f"(({e.vector(a, f'u{width}', full=True)} >> {e.constant(24, f'u{width}')})).astype(T_u32)", "u32")


# ---------------------------------------------------------------- copies


@emits("cp")
def emit_cp(e: Emitter, made: Instruction) -> None:
    """All asynchronous copies."""
    parts = made.parts[1:]
    if parts[:2] == ["async", "bulk"] or parts[:3] == ["reduce", "async", "bulk"]:
        _emit_bulk(e, made, parts[parts.index("bulk") + 1 :], parts[0] == "reduce")
    elif parts[0] == "async":
        _emit_async(e, made, parts[1:])
    else:
        raise refuse(made)


def _emit_bulk(e: Emitter, made: Instruction, parts: list[str], reduces: bool) -> None:
    if parts == ["commit_group"]:
        e.line(f"bulk_commit(w, {e.group})")
        return
    if parts[:1] == ["wait_group"] and parts[1:] in ([], ["read"]):
        e.write_back(e.live)
        e.line(f"return bulk_wait(w, g, {made.pc}, {e.scalar(made.operands[0])})")
        e.ended = True
        return
    if parts[:1] == ["prefetch"]:
        return
    hints = ("L2::cache_hint", "tile", "mbarrier::complete_tx::bytes", "bulk_group")
    rest = [part for part in parts if part not in hints]
    rank = 0
    if rest[:1] == ["tensor"]:
        if rest[1] not in ("1d", "2d", "3d", "4d", "5d"):
            raise refuse(made)
        rank = int(rest[1][0])
        rest = rest[2:]
    multicast = "multicast::cluster" in rest
    rest = [part for part in rest if part != "multicast::cluster"]
    operation, element = None, None
    if reduces:
        operation = next((part for part in rest if part in (*REDUCTIONS, "inc", "dec")), None)
        if operation is None:
            raise refuse(made)
        if operation not in REDUCTIONS:
            raise refuse(made, f"a bulk reduction by {operation} is not simulated")
        rest.remove(operation)
        if not rank and rest[-1:] and rest[-1] in ("f16", "bf16", "f32", "f64", "u32", "s32", "u64", "s64"):
            element = rest.pop()
            if element in ("f16", "bf16") and "noftz" in rest:
                rest.remove("noftz")
        elif not rank:
            raise refuse(made)
    to_shared = rest in (["shared::cluster", "global"], ["shared::cta", "global"])
    to_global = rest in (["global", "shared::cta"],)
    to_cluster = rest in (["shared::cluster", "shared::cta"],) and not rank
    if not (to_shared or to_global or to_cluster) or (reduces and not to_global):
        raise refuse(made)
    copy = BulkCopy(rank, "load" if to_shared else "store" if to_global else "between", operation, element, multicast)
    index = len(e.program.static)
    e.program.static.append(copy)
    operands = list(made.operands)
    texts = []
    if rank:
        target, source = (operands[1], operands[0]) if to_global else (operands[0], operands[1])
        tensor = operands.pop(0 if to_global else 1)
        if not isinstance(tensor, Addr) or len(tensor.parts) != 1 or not isinstance(tensor.parts[0], Vec):
            raise refuse(made)
        shared = target if not to_global else made.operands[1]
        texts.append(any_address(e, shared, made))
        texts.append(any_address(e, Addr(tensor.base, tensor.offset), made, 64))
        if len(tensor.parts[0].items) != rank:
            raise refuse(made)
        texts.extend(_value(e, coordinate, 32) for coordinate in tensor.parts[0].items)
        operands = operands[1:]
        del source
    else:
        place, source = operands[:2]
        shared, outside = (source, place) if to_global else (place, source)
        texts.append(any_address(e, shared, made))
        texts.append(any_address(e, outside, made, 32 if to_cluster else 64))
        texts.append(_value(e, operands[2], 32))
        operands = operands[3:]
    if not to_global:
        texts.append(any_address(e, operands.pop(0), made))
        if multicast:
            texts.append(_value(e, operands.pop(0), 16))
    hint = "L2::cache_hint" in parts
    if len(operands) != int(hint):
        raise refuse(made)
    e.line(f"launch_bulk(w, {e.group}, {made.pc}, {index}, [{', '.join(texts)}])")


def _emit_async(e: Emitter, made: Instruction, parts: list[str]) -> None:
    if parts == ["commit_group"]:
        e.line(f"w.copies.commit(w, {made.pc})")
    elif parts in (["wait_all"], ["wait_group"]):
        keep = "0" if parts == ["wait_all"] else e.scalar(made.operands[0])
        if parts == ["wait_all"]:
            e.line(f"w.copies.commit(w, {made.pc})")
        e.write_back(e.live)
        e.line(f"return copies_wait(w, g, {made.pc}, {keep})")
        e.ended = True
    elif parts[:2] == ["mbarrier", "arrive"]:
        rest = [part for part in parts[2:] if part not in ("shared", "shared::cta", "b64")]
        if rest not in ([], ["noinc"]):
            raise refuse(made)
        address = any_address(e, made.operands[0], made)
        e.line(f"arrive_when_copied(w, {e.group}, {made.pc}, {address}, {rest == ['noinc']})")
    elif parts[0] in ("ca", "cg"):
        rest = [part for part in parts[1:] if not part.startswith("L2::")]
        if rest not in (["shared", "global"], ["shared::cta", "global"]):
            raise refuse(made)
        target, source, size = made.operands[:3]
        others = made.operands[3:]
        if "L2::cache_hint" in parts:
            others = others[:-1]
        if not isinstance(size, Imm) or len(others) > 1 or not isinstance(target, Addr) or not isinstance(source, Addr):
            raise refuse(made)
        amount = str(size.value)
        if others and isinstance(others[0], Reg) and others[0].width == 1:  # whether to ignore the source
            if e.is_uniform(others[0]):
                amount = f"(0 if {e.scalar(others[0], 1)} else {size.value})"
            else:
                amount = f"np.where({e.vector(others[0], 'b1')}, T_u32(0), T_u32({size.value}))"
        elif others:
            amount = _value(e, others[0], 32)
        to, origin = vector_address(e, target, 32), vector_address(e, source, 64)
        e.line(f"async_copy(w, {e.group}, {made.pc}, {to}, {origin}, {size.value}, {amount})")
    else:
        raise refuse(made)


def emit_store_async(e: Emitter, made: Instruction) -> None:
    """A store to another block that signals its barrier with bytes."""
    parts = [part for part in made.parts[2:] if part != "weak"]
    count = 1
    if "v2" in parts or "v4" in parts:
        count = 4 if "v4" in parts else 2
        parts = [part for part in parts if part not in ("v2", "v4")]
    if parts[:2] != ["shared::cluster", "mbarrier::complete_tx::bytes"] or len(parts) != 3:
        raise refuse(made)
    kind = parts[2]
    if kind not in ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        raise refuse(made)
    target, source, barrier = made.operands
    if not isinstance(target, Addr):
        raise refuse(made)
    size = bits_of(kind) // 8
    sources = source.items if isinstance(source, Vec) else (source,)
    if len(sources) != count:
        raise refuse(made)
    values = ", ".join(e.vector(item, f"u{8 * size}", full=True) for item in sources)
    to = vector_address(e, target, 32)
    e.line(f"store_async(w, {e.group}, {made.pc}, {to}, {size}, [{values}], {any_address(e, barrier, made)})")


# ---------------------------------------------------------------- tensor maps


@emits("tensormap")
def emit_tensormap(e: Emitter, made: Instruction) -> None:
    """Change a field of a tensor map, or publish a changed one."""
    parts = made.parts[1:]
    if parts[:2] == ["replace", "tile"] and len(parts) == 6 and parts[4] == "b1024":
        field, space = parts[2], parts[3]
        if space not in ("global", "shared::cta", "shared") or field not in (
            "global_address",
            "global_dim",
            "global_stride",
            "box_dim",
        ):
            raise refuse(made)
        values = made.operands[1:]
        ordinal = e.scalar(values[0]) if len(values) == 2 else "0"
        value = _value(e, values[-1], bits_of(parts[5]))
        shared = space != "global"
        address = any_address(e, made.operands[0], made, 32 if shared else 64)
        e.line(f"replace_field(w, {e.group}, {made.pc}, {shared}, {address}, {field!r}, {ordinal}, {value})")
    elif parts[0] == "cp_fenceproxy" and "sync" in parts:
        target, source = made.operands[:2]
        emit_meeting(e, made)
        address, origin = any_address(e, target, made, 64), any_address(e, source, made)
        e.line(f"replace_field(w, {e.group}, {made.pc}, True, {origin}, 'copy', 0, {address})")
    else:
        raise refuse(made)
