"""Asynchronous copies at run time: what is issued, when it happens, who is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import tma
from .checks import Mark, learn
from .errors import BarrierFault, MemoryFault, Unsupported
from .instructions_common import DTYPES
from .instructions_control import FULL, Group, block
from .instructions_memory import access_global, join_columns, pattern_of
from .mbarrier import MBarrier, MBarrierError
from .memory import ALL_ONES, UNITS, Fault, Stretch

# What a box that lies wholly outside of its tensor is counted for.
OUTSIDE = "(outside)"


class Action:
    """A piece of asynchronous work that a warp issued."""

    __slots__ = ("perform", "done", "waiting", "what", "marks", "number", "warp", "pc", "issued")

    def __init__(self, w: Any, pc: int, perform: Callable[[], None], what: str) -> None:
        self.warp = w
        self.pc = pc
        waits = w.engine.waits
        self.issued = waits.now() if waits is not None else None
        self.perform = perform
        self.what = what
        self.done = False
        self.waiting: list[tuple[Any, Group]] = []
        self.marks: list[Mark] = []
        self.number = 0

    def run(self) -> None:
        """Do it and wake who waits for it."""
        engine = self.warp.engine
        around, engine.work = engine.work, self
        self.perform()
        self.done = True
        for warp, group in self.waiting:
            warp.wake(group)
        self.waiting.clear()
        engine.work = around

    def describe(self) -> str:
        """State, for reports."""
        return f"{self.what}, {'done' if self.done else 'not done'}"


@dataclass(frozen=True)
class BulkCopy:
    """What is fixed about a bulk instruction.

    Attributes:
        rank: of the tensor map, 0 without one.
        direction: ``load`` (to shared), ``store`` (to global), ``between`` (blocks of a cluster).
        operation: of a reduction.
        element: type of a reduction without tensor map.
        multicast: to several blocks.
    """

    rank: int
    direction: str
    operation: str | None
    element: str | None
    multicast: bool


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def launch_bulk(w: Any, g: Group, pc: int, index: int, operands: list[Any]) -> None:
    """Issue a bulk copy; a store once per warp where all lanes mean the same one, as the uniform datapath does."""
    copy: BulkCopy = w.engine.program.static[index]
    columns = [value[g.mask].tolist() if isinstance(value, np.ndarray) else value for value in operands]
    lanes = [column for column in columns if isinstance(column, list)]
    if lanes:
        count = len(lanes[0])
        rows = dict.fromkeys(
            tuple(column[n] if isinstance(column, list) else column for column in columns) for n in range(count)
        )
    else:
        rows = {tuple(columns): None}
    if copy.direction != "store" and len(rows) < g.bits.bit_count():
        text = f"{g.bits.bit_count()} lanes issue the same bulk copy, which signals its barrier as often: elect one"
        raise w.fault(BarrierFault, pc, text)
    for row in rows:
        issue_bulk(w, g, pc, copy, list(row))


def issue_bulk(w: Any, g: Group, pc: int, copy: BulkCopy, values: list[int]) -> None:
    """Issue one bulk copy."""
    try:
        if copy.direction == "load":
            _issue_load(w, pc, copy, values)
        elif copy.direction == "store":
            _issue_store(w, g, pc, copy, values)
        else:
            _issue_between(w, pc, values)
    except Fault as fault:
        kind = Unsupported if "tensor map with" in str(fault) else MemoryFault
        raise w.fault(kind, pc, str(fault)) from None


def _tensor(w: Any, address: int) -> tma.TensorMap:
    stretch = w.engine.memory.find(address, 128)
    if address % 64:
        raise Fault(f"tensor map at 0x{address:x}, expected a multiple of 64")
    start = address - stretch.base
    return tma.decode(stretch.raw[start : start + 60].tobytes())


@dataclass(frozen=True)
class GlobalSide:
    """What a bulk copy reads or writes in global memory: a box of a tensor, or bytes in a row.

    Attributes:
        num_bytes: of the copy in shared memory.
        inside: of these, how many are not outside of the tensor.
        swizzle: of the box in shared memory.
        name: of the tensor.
        stretch: the region, ``None`` for a box that is all outside.
        start: of the bytes in the region, without a tensor map.
        tensor: the tensor map.
        part: the box in it.
    """

    num_bytes: int
    inside: int
    swizzle: int
    name: str
    stretch: Stretch | None
    start: int = 0
    tensor: tma.TensorMap | None = None
    part: tma.Window | None = None

    @property
    def row(self) -> np.ndarray:
        """The bytes in a row."""
        assert self.stretch is not None, "bytes in a row lie in a region"
        return self.stretch.raw[self.start : self.start + self.num_bytes]

    def read(self) -> np.ndarray:
        """The granules, zero outside of the tensor."""
        if self.tensor is not None and self.part is not None:
            return tma.read_box(self.tensor, self.part)
        return self.row.view(UNITS[16])

    def write(self, granules: np.ndarray, operation: str | None, element: str | None) -> None:
        """Store granules, or combine them with what is there; ``element`` is their type without a tensor map."""
        if self.tensor is not None and self.part is not None:
            tma.write_box(self.tensor, self.part, granules, operation)
            return
        place, fresh = self.row, np.ascontiguousarray(granules).view(np.uint8)
        if operation is not None:
            assert element is not None, "a reduction has a type"
            raw = np.dtype(f"u{ {'f16': 2, 'bf16': 2}.get(element) or DTYPES[element]().itemsize }")
            fresh = tma.reduced(element, operation, place.view(raw), fresh.view(raw)).view(np.uint8)
        place[:] = fresh


def _global_side(w: Any, copy: BulkCopy, values: list[int]) -> GlobalSide:
    """Global memory of a load or store: ``values`` are the shared address, the global one, coordinates or bytes."""
    address = values[1]
    if copy.rank:
        tensor = _tensor(w, address)
        if len(tensor.dims) != copy.rank:
            raise Fault(f"the tensor map has {len(tensor.dims)} dimensions, the instruction {copy.rank} coordinates")
        part = tma.window(w.engine.memory, tensor, tuple(_signed(value) for value in values[2 : 2 + copy.rank]))
        name = part.stretch.name if part.stretch is not None else OUTSIDE
        return GlobalSide(
            tensor.box_bytes, part.num_bytes, tensor.swizzle, name, part.stretch, tensor=tensor, part=part
        )
    num_bytes = values[2]
    if num_bytes % 16 or address % 16:
        way = "from" if copy.direction == "load" else "to"
        raise Fault(f"a bulk copy of {num_bytes} bytes {way} 0x{address:x}, expected multiples of 16")
    stretch = w.engine.memory.find(address, num_bytes)
    return GlobalSide(num_bytes, num_bytes, 0, stretch.name, stretch, address - stretch.base)


def _signalled(w: Any, address: int, pc: int) -> MBarrier:
    """The barrier that a bulk copy signals, which a fence has to have made known to the asynchronous proxy."""
    barrier = w.barrier(address, pc)
    if not barrier.is_fenced and w.cta.checker is not None:
        w.engine.trace.warn(
            "a bulk copy signals an mbarrier of which no fence.mbarrier_init, nor fence.proxy.async, has told the "
            f"asynchronous proxy ({w.engine.program.kernel.instructions[pc].where()})"
        )
    return barrier


def _destinations(w: Any, pc: int, address: int, barrier: int, mask: int | None) -> list[tuple[Any, int, MBarrier]]:
    """(block, offset, barrier) of each copy that a load makes."""
    if mask is None:
        cta, offset = w.place(address, pc, 16, 16)
        return [(cta, offset, _signalled(w, barrier, pc))]
    found = []
    for rank in range(16):
        if mask >> rank & 1:
            cta, offset = w.place(address & 0xFFFFFF | rank << 24, pc, 16, 16)
            found.append((cta, offset, _signalled(w, barrier & 0xFFFFFF | rank << 24, pc)))
    if not found:
        raise Fault("a multicast with mask 0, which names no block")
    return found


def _issue_load(w: Any, pc: int, copy: BulkCopy, values: list[int]) -> None:
    engine = w.engine
    mask = values[-1] if copy.multicast else None
    barrier = values[-2] if copy.multicast else values[-1]
    side = _global_side(w, copy, values)
    num_bytes = side.num_bytes
    targets = _destinations(w, pc, values[0], barrier, mask)
    marks = []
    for cta, offset, _ in targets:
        _check_place(cta, offset, num_bytes, 128 if copy.rank else 16)
        if cta.checker is not None:
            whole = slice(offset >> 4, offset + num_bytes >> 4)
            cta.checker.async_write(w, pc, whole, "a bulk load")
            marks.append(cta.checker.open_write(whole, "bulk load"))
        else:
            marks.append(None)
    path = "TMA load" if copy.rank else "bulk load"
    engine.trace.add(path, side.name, 1, side.inside, 0)
    if len(targets) > 1:
        engine.trace.add("multicast", side.name, len(targets) - 1, side.inside * (len(targets) - 1), 0)

    def perform() -> None:
        data = side.read()
        raw = data.tobytes() if any(cta.checker is not None for cta, _, _ in targets) else b""
        for (cta, offset, signal), mark in zip(targets, marks, strict=True):
            if cta.finished:
                raise w.fault(MemoryFault, pc, f"a bulk load into block {cta.index}, which has ended")
            granules = tma.granules_of(offset, num_bytes, side.swizzle)
            cta.shared.views[16][granules] = data
            if ALL_ONES in raw:
                cta.shared.note_written(slice(offset >> 2, offset + num_bytes >> 2), ALL_ONES)
            _complete(w, signal, num_bytes, mark, slice(offset >> 2, offset + num_bytes >> 2))

    engine.defer(Action(w, pc, perform, path))


def _complete(w: Any, barrier: MBarrier, num_bytes: int, mark: Mark | None, words: slice) -> None:
    """Tell a barrier that bytes have come; the access is over for the program when its phase completes."""
    if w.clock is not None and barrier.rank != w.cta.rank:
        w.cta.cluster.ctas[barrier.rank].remote[barrier.component] = barrier.phase + 1
    if mark is not None:
        barrier.landing.append(mark)
        if mark.checker.clocks.is_on:
            mark.checker.note_write(barrier.component, barrier.phase + 1, words)
    barrier.complete(num_bytes)


def _check_place(cta: Any, offset: int, num_bytes: int, align: int) -> None:
    cta.shared.check_range(offset, num_bytes)
    if offset % align:
        raise Fault(f"a bulk copy at shared offset {offset}, expected a multiple of {align}")


def _issue_store(w: Any, g: Group, pc: int, copy: BulkCopy, values: list[int]) -> None:
    engine = w.engine
    cta, offset = w.place(values[0], pc, 16, 16)
    side = _global_side(w, copy, values)
    num_bytes = side.num_bytes
    _check_place(cta, offset, num_bytes, 128 if copy.rank else 16)
    granules = tma.granules_of(offset, num_bytes, side.swizzle)
    path = ("TMA" if copy.rank else "bulk") + (f" reduce {copy.operation}" if copy.operation else " store")
    engine.trace.add(path, side.name, 1, side.inside, 0)

    def perform() -> None:
        data = cta.shared.views[16][granules]
        if cta.checker is not None and ALL_ONES in data.tobytes():
            words = (np.arange(num_bytes // 4).reshape(-1, 4) % 4) + _numbers(granules)[:, None] * 4
            try:
                cta.shared.check_read(words)
            except Fault as fault:
                w.read_uninitialised(pc, str(fault))
        side.write(data, copy.operation, copy.element)

    action = Action(w, pc, perform, path)
    if cta.checker is not None:
        whole = slice(offset >> 4, offset + num_bytes >> 4)
        cta.checker.async_read(w, pc, whole, f"a {path}")
        action.marks.append(cta.checker.open_read(whole, path))
        if cta.checker.clocks.is_on:
            queue = w.bulk_of(g)
            component = w.counter("bulk stores", queue.lane)
            cta.checker.note_read(component, queue.committed + 1, slice(offset >> 2, offset + num_bytes >> 2))
    w.bulk_of(g).open.append(action)
    engine.defer(action)


def _numbers(granules: Any) -> np.ndarray:
    return np.arange(granules.start, granules.stop) if isinstance(granules, slice) else granules


def _issue_between(w: Any, pc: int, values: list[int]) -> None:
    engine = w.engine
    cta, offset = w.place(values[0], pc, 16, 16)
    origin, start = w.place(values[1], pc, 16, 16)
    num_bytes = values[2]
    signal = _signalled(w, values[3], pc)
    _check_place(cta, offset, num_bytes, 16)
    _check_place(origin, start, num_bytes, 16)
    mark = None
    if cta.checker is not None:
        origin.checker.async_read(w, pc, slice(start >> 4, start + num_bytes >> 4), "a copy between blocks")
        granules = slice(offset >> 4, offset + num_bytes >> 4)
        cta.checker.async_write(w, pc, granules, "a copy between blocks")
        mark = cta.checker.open_write(granules, "copy between blocks")
    engine.trace.add_event("bytes between blocks", num_bytes)

    def perform() -> None:
        data = origin.shared.raw[start : start + num_bytes].copy()
        cta.shared.raw[offset : offset + num_bytes] = data
        cta.shared.note_written(slice(offset >> 2, offset + num_bytes >> 2), data.tobytes())
        _complete(w, signal, num_bytes, mark, slice(offset >> 2, offset + num_bytes >> 2))

    engine.defer(Action(w, pc, perform, "copy between blocks"))


# ---------------------------------------------------------------- groups of bulk stores


class BulkGroups:
    """Bulk stores of one thread."""

    def __init__(self, lane: int) -> None:
        self.lane = lane
        self.open: list[Action] = []
        self.groups: deque[list[Action]] = deque()
        self.committed = 0


def bulk_commit(w: Any, g: Group) -> None:
    """Close the group of bulk stores."""
    queue = w.bulk_of(g)
    queue.groups.append(queue.open)
    queue.committed += 1
    queue.open = []


def bulk_wait(w: Any, g: Group, pc: int, keep: int) -> int:
    """Wait until at most ``keep`` groups are in flight."""
    for lane, queue in w.bulk.items():
        if not g.bits >> lane & 1:
            continue
        while len(queue.groups) > keep:
            for action in queue.groups[0]:
                if not action.done:
                    action.waiting.append((w, g))
                    w.engine.note_wait(w, g, pc, action)
                    return block(g, pc, "cp.async.bulk.wait_group", action)
            for action in queue.groups.popleft():
                for mark in action.marks:
                    mark.close()
        if w.clock is not None:
            component = w.counter("bulk stores", lane)
            w.clock[component] = max(w.clock[component], queue.committed - len(queue.groups))
    w.engine.trace.add_event("bulk group wait")
    return pc + 1


# ---------------------------------------------------------------- cp.async


class ThreadCopies:
    """cp.async of one warp, in order."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.open_marks: list[Mark] = []
        self.bundles = 0
        self.groups: deque[Action] = deque()
        self.order: deque[Action] = deque()

    def bundle(self, w: Any, pc: int, last: Callable[[], None] | None, what: str) -> Action:
        """All copies issued so far, and what follows them, as one action behind the earlier ones of this warp."""
        work, self.open = self.open, []
        marks, self.open_marks = self.open_marks, []
        self.bundles += 1

        def perform() -> None:
            while self.order and self.order[0] is not action:
                earlier = self.order[0]
                if not earlier.done:
                    earlier.run()
                if self.order and self.order[0] is earlier:
                    self.order.popleft()
            for copy in work:
                copy()
            if last is not None:
                last()
            if self.order and self.order[0] is action:
                self.order.popleft()

        action = Action(w, pc, perform, what)
        action.marks = marks
        action.number = self.bundles
        self.order.append(action)
        return action

    def commit(self, w: Any, pc: int) -> None:
        """Close the group of copies."""
        action = self.bundle(w, pc, None, "cp.async group")
        self.groups.append(action)
        w.engine.defer(action)


def copies_wait(w: Any, g: Group, pc: int, keep: int) -> int:
    """Wait until at most ``keep`` groups of cp.async are in flight."""
    groups = w.copies.groups
    while len(groups) > keep:
        if not groups[0].done:
            groups[0].waiting.append((w, g))
            w.engine.note_wait(w, g, pc, groups[0])
            return block(g, pc, "cp.async.wait_group", groups[0])
        action = groups.popleft()
        for mark in action.marks:
            mark.close()
        if w.clock is not None:
            component = w.counter("cp.async")
            w.clock[component] = max(w.clock[component], action.number)
    w.engine.trace.add_event("cp.async wait")
    return pc + 1


def async_copy(w: Any, g: Group, pc: int, targets: np.ndarray, sources: np.ndarray, size: int, amount: Any) -> None:
    """Issue one copy per lane; what is beyond ``amount`` bytes becomes zero."""
    to = targets if g.bits == FULL else targets[g.mask]
    origin = sources if g.bits == FULL else sources[g.mask]
    if isinstance(amount, np.ndarray):
        counts = amount[g.mask]
        if (counts == counts[0]).all():
            amount = counts.item(0)
    shared, checker, pattern = pattern_of(w, pc, to, size)
    mark = None
    if checker is not None:
        checker.async_write(w, pc, pattern.granules, "cp.async", pattern.words if size < 16 else None)
        mark = checker.open_write(pattern.granules, "cp.async")
        w.copies.open_marks.append(mark)
        if checker.clocks.is_on:
            checker.note_write(w.counter("cp.async"), w.copies.bundles + 1, pattern.words)
    w.engine.trace.add_shared("cp.async", len(to) * size, pattern.cycles, pattern.ideal)
    values = np.zeros(len(to), UNITS[size])
    parts: list[tuple[Any, Any, np.ndarray]] = []
    chosen: Any = slice(None)
    if isinstance(amount, np.ndarray):
        full = counts >= size
        odd = (counts > 0) & ~full
        if odd.any():
            partial = [
                (lane, access_global(w, pc, "cp.async", origin[lane : lane + 1], 1)[0], int(counts[lane]))
                for lane in np.flatnonzero(odd).tolist()
            ]
        else:
            partial = []
        chosen = np.flatnonzero(full)
        if len(chosen):
            parts = access_global(w, pc, "cp.async", origin[chosen], size)
    else:
        partial = []
        if amount == size:
            parts = access_global(w, pc, "cp.async", origin, size)
        elif amount:
            partial = [
                (lane, access_global(w, pc, "cp.async", origin[lane : lane + 1], 1)[0], amount)
                for lane in range(len(origin))
            ]

    def perform() -> None:
        for lanes, stretch, index in parts:
            if isinstance(chosen, slice):
                values[lanes] = stretch.views[size][index]
            else:
                values[chosen[lanes]] = stretch.views[size][index]
        for lane, (_, stretch, index), count in partial:
            first = int(index[0])
            values[lane : lane + 1].view(np.uint8)[:count] = stretch.raw[first : first + count]
        shared.views[size][pattern.index] = values
        if checker is not None:
            checker.copied_by_threads(pattern.granules)
            if ALL_ONES in values.tobytes():
                shared.note_written(pattern.words, ALL_ONES)

    if w.engine.is_eager:
        perform()
    else:
        w.copies.open.append(perform)


def arrive_when_copied(w: Any, g: Group, pc: int, addresses: Any, noinc: bool) -> None:
    """Arrive at a barrier, once per lane, when all copies so far are done."""
    from .instructions_async import distinct

    pairs = [(w.barrier(address, pc), bits.bit_count()) for address, bits in distinct(g, addresses)]
    marks = list(w.copies.open_marks)
    if w.clock is not None:
        known = w.clock.copy()
        known[w.counter("cp.async")] = w.copies.bundles + 1
        w.clock[w.component] += 1
    for barrier, count in pairs:
        if not noinc:
            barrier.pending += count

    def last() -> None:
        for barrier, count in pairs:
            barrier.landing.extend(marks)
            if barrier.gathered is not None:
                learn(barrier.gathered, known)
            try:
                barrier.arrive(count)
            except MBarrierError as error:
                raise w.fault(BarrierFault, pc, str(error)) from None

    w.engine.trace.add_event("mbarrier arrive", g.bits.bit_count())
    action = w.copies.bundle(w, pc, last, "cp.async arrival")
    w.engine.defer(action)


# ---------------------------------------------------------------- st.async and tensor maps


def store_async(
    w: Any, g: Group, pc: int, targets: np.ndarray, size: int, values: list[np.ndarray], barriers: Any
) -> None:
    """Issue a store per lane; each signals its barrier with the bytes."""
    total = size * len(values)
    joined = join_columns(g, values, size)
    to = targets[g.mask]
    signals = barriers[g.mask].tolist() if isinstance(barriers, np.ndarray) else [int(barriers)] * len(to)
    plans = []
    for lane, address in enumerate(to.tolist()):
        cta, offset = w.place(address, pc, total, total)
        mark = None
        if cta.checker is not None:
            granules = slice(offset >> 4, (offset + total + 15) >> 4)
            words = slice(offset >> 2, offset + total >> 2)
            cta.checker.async_write(w, pc, granules, "st.async", words if total < 16 else None)
            mark = cta.checker.open_write(granules, "st.async")
        plans.append((cta, offset, joined[lane : lane + 1].view(np.uint8), w.barrier(signals[lane], pc), mark))
    w.engine.trace.add_event("st.async bytes", total * len(plans))

    def perform() -> None:
        for cta, offset, data, barrier, mark in plans:
            if cta.finished:
                raise w.fault(MemoryFault, pc, f"st.async to block {cta.index}, which has ended")
            cta.shared.raw[offset : offset + total] = data
            cta.shared.note_written(slice(offset >> 2, offset + total >> 2), data.tobytes())
            _complete(w, barrier, total, mark, slice(offset >> 2, offset + total >> 2))

    w.engine.defer(Action(w, pc, perform, "st.async"))


def replace_field(w: Any, g: Group, pc: int, shared: bool, address: Any, field: str, ordinal: int, value: Any) -> None:
    """Change a field of the tensor map at an address, or copy it (``copy``) to the address ``value``."""
    place = int(address[g.mask][0]) if isinstance(address, np.ndarray) else address
    number = int(value[g.mask][0]) if isinstance(value, np.ndarray) else value
    try:
        if shared:
            cta, offset = w.place(place, pc, 128, 128)
            raw = cta.shared.raw[offset : offset + 128]
        else:
            stretch = w.engine.memory.find(place, 128)
            raw = stretch.raw[place - stretch.base : place - stretch.base + 128]
        if field == "copy":
            stretch = w.engine.memory.find(number, 128)
            stretch.raw[number - stretch.base : number - stretch.base + 128] = raw
        else:
            raw[:] = np.frombuffer(tma.replace(raw.tobytes(), field, ordinal, number), np.uint8)
    except Fault as fault:
        raise w.fault(Unsupported if "replace" in str(fault) else MemoryFault, pc, str(fault)) from None
