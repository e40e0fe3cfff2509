"""Issue of warpgroup products, their groups and waits, and where accumulators live.

The accumulator of a warpgroup is one matrix as long as only products use it; its registers get their values when some
other instruction looks at them. Touching them while a product may be running is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np

from . import wgmma
from .checks import Mark
from .errors import MemoryFault, RaceFault, SimulatorError, Unsupported
from .instructions_common import Emitter, emits, refuse, runtime
from .instructions_control import Group, block, emit_meeting
from .memory import Fault
from .ptx import Imm, Instruction, Reg, Vec


@dataclass(frozen=True)
class Product:
    """What is fixed about a product.

    Attributes:
        n: columns of the accumulator, which has 64 rows.
        elements: types of A and B.
        registers: of the accumulator, in order.
        scales: signs of A and B.
        k_major: whether rows of A and B are along k.
        fragments: registers of A, if it is not in shared memory.
    """

    n: int
    elements: tuple[str, str]
    registers: tuple[int, ...]
    scales: tuple[int, int]
    k_major: tuple[bool, bool]
    fragments: tuple[int, ...] = ()


class Issued:
    """A product on its way: complete when all four warps have issued it."""

    __slots__ = ("product", "a", "b", "keeps", "initial", "fragments", "count", "marks", "pc", "sequence", "done")

    def __init__(self, product: Product, b: int, keeps: bool, pc: int, sequence: int) -> None:
        self.product = product
        self.a: int | None = None
        self.b = b
        self.keeps = keeps
        self.initial: list[list[np.ndarray] | None] = [None] * 4
        self.fragments: list[list[np.ndarray] | None] = [None] * 4
        self.count = 0
        self.marks: list[Mark] = []
        self.pc = pc
        self.sequence = sequence
        self.done = False


class Warpgroup:
    """Four warps that multiply together."""

    def __init__(self, cta: Any, index: int) -> None:
        self.cta = cta
        self.index = index
        self.started: dict[int, Issued] = {}
        self.queue: list[Issued] = []
        self.marked: list[Issued] = []
        self.complete = 0  # products that all four warps have issued
        self.matrices: dict[tuple[int, ...], np.ndarray] = {}
        self.waiting: list[tuple[Any, Group]] = []

    def component(self) -> int:
        """What clocks count the products of this warpgroup with."""
        name = f"products of warpgroup {self.index} of block {self.cta.index}"
        return self.cta.cluster.clocks.component(("team", self.cta.rank, self.index), name)

    def describe(self) -> str:
        """State, for reports."""
        return (
            f"warpgroup {self.index}: {self.complete} products issued by all four warps, "
            f"{len(self.started)} by some only"
        )

    def run_until(self, sequence: int, w: Any) -> None:
        """Do the products before a number, in order."""
        while self.queue and self.queue[0].sequence < sequence:
            self.perform(self.queue.pop(0), w)

    def perform(self, item: Issued, w: Any) -> None:
        """Multiply and accumulate."""
        product, shared = item.product, self.cta.shared
        n = product.n
        numbers = []
        for side, rows in ((0, 64), (1, n)):
            element, k_major = product.elements[side], product.k_major[side]
            descriptor = item.a if side == 0 else item.b
            if descriptor is None:
                parts = [wgmma.operand_from_registers(part, element) for part in item.fragments if part is not None]
                numbers.append(np.concatenate(parts))
                continue
            start, layout = wgmma.parse_descriptor(descriptor, rows, wgmma.ELEMENT_BYTES[element], k_major)
            granules, words = wgmma.find_operand(shared, start, layout)
            data = shared.views[16][granules]
            if self.cta.checker is not None and b"\xff\xff\xff\xff" in data.tobytes():
                try:
                    shared.check_read(words)
                except Fault as fault:
                    w.read_uninitialised(item.pc, f"an operand of wgmma: {fault}")
            matrix = wgmma.to_numbers(data, element)
            numbers.append(matrix if k_major else matrix.T)
        a, b = numbers
        result = a @ b.T
        if product.scales[0] != product.scales[1]:
            result = -result
        key = product.registers
        if key not in self.matrices:
            self.matrices[key] = np.zeros((64, n), np.float32)
        matrix = self.matrices[key]
        for warp, initial in enumerate(item.initial):
            if initial is not None:
                matrix[16 * warp : 16 * warp + 16] = wgmma.from_fragment(initial)
        if item.keeps:
            matrix += result
        else:
            matrix[...] = result
        item.done = True


@runtime
def issue_product(w: Any, g: Group, pc: int, index: int, a: Any, b: int, keeps: bool) -> None:
    """One warp's part of a product; ``a`` is a descriptor or four registers."""
    engine = w.engine
    product: Product = engine.program.static[index]
    team: Warpgroup = w.team
    sequence = w.products_issued
    w.products_issued += 1
    w.at = pc
    item = team.started.get(sequence)
    if item is None:
        item = team.started[sequence] = Issued(product, b, keeps, pc, sequence)
        if not isinstance(a, list):
            item.a = a
    quarter = w.index & 3
    same = item.pc == pc and item.b == b and item.keeps == keeps
    if w.cta.checker is not None:
        _check_fence(w, pc, product, keeps)
    if isinstance(a, list):
        item.fragments[quarter] = a
    else:
        same = same and item.a == a
    if not same:
        raise w.fault(SimulatorError, pc, "the warps of a warpgroup issue different products")
    _claim(w, g, pc, product.registers, item, quarter)
    item.count += 1
    engine.trace.flops += 2 * 16 * product.n * (wgmma.K_BYTES // wgmma.ELEMENT_BYTES[product.elements[1]])
    if item.count == 4:
        del team.started[sequence]
        team.complete += 1
        _check_operands(w, pc, team, item)
        team.queue.append(item)
        if engine.is_eager or engine.coin():
            team.run_until(sequence + 1, w)
        waiting, team.waiting = team.waiting, []
        for warp, group in waiting:
            warp.wake(group)


def _claim(w: Any, g: Group, pc: int, registers: tuple[int, ...], item: Issued, quarter: int) -> None:
    """Note that registers now belong to the matrix, and what they held if the product adds to it."""
    if registers not in w.dirty:
        flush_accumulators(w, pc, [other for other in w.dirty if not set(other).isdisjoint(registers)])
        if item.keeps:
            held = [g.R[register] for register in registers]
            known = w.fragments.get(registers)
            if known is None or not all(map(is_, held, known)):
                item.initial[quarter] = held
    w.dirty[registers] = item.sequence


def _check_fence(w: Any, pc: int, product: Product, keeps: bool) -> None:
    """What a product reads must not have been written since the last fence.

    That it overwrites what was used since is told as a warning: the manual asks for a fence there too, but kernels
    of the manufacturer go without it.
    """
    if not w.products_fenced:
        raise w.fault(RaceFault, pc, "no wgmma.fence orders the product behind earlier uses of its registers")
    if not w.rewritten and not w.reused:
        return
    if (keeps and product.registers in w.rewritten) or product.fragments in w.rewritten:
        what = "its accumulator" if product.fragments not in w.rewritten else "its operand A"
        raise w.fault(
            RaceFault, pc, f"no wgmma.fence orders the product, which reads {what}, behind writes of these registers"
        )
    if product.registers in w.rewritten or product.registers in w.reused:
        w.engine.trace.warn(
            "a product overwrites registers used since the last wgmma.fence "
            f"({w.engine.program.kernel.instructions[pc].where()})"
        )
        w.rewritten.discard(product.registers)
        w.reused.discard(product.registers)


def _check_operands(w: Any, pc: int, team: Warpgroup, item: Issued) -> None:
    checker = team.cta.checker
    product = item.product
    for side, descriptor in ((0, item.a), (1, item.b)):
        if descriptor is None:
            continue
        rows = 64 if side == 0 else product.n
        try:
            size = wgmma.ELEMENT_BYTES[product.elements[side]]
            start, layout = wgmma.parse_descriptor(descriptor, rows, size, product.k_major[side])
            granules, words = wgmma.find_operand(team.cta.shared, start, layout)
        except Fault as fault:
            kind = Unsupported if "descriptor" in str(fault) else MemoryFault
            raise w.fault(kind, pc, str(fault)) from None
        if checker is not None:
            checker.async_read(w, pc, granules, "wgmma", words)
            item.marks.append(checker.open_read(granules, "wgmma"))
            if checker.clocks.is_on:
                checker.note_read(team.component(), item.sequence + 1, words)
    if item.marks:
        team.marked.append(item)


@runtime
def commit_products(w: Any) -> None:
    """Close the group of products."""
    w.product_groups.append(w.products_issued)


@runtime
def wait_products(w: Any, g: Group, pc: int, keep: int) -> int:
    """Wait until at most ``keep`` groups are in flight."""
    groups = w.product_groups
    if len(groups) <= keep:
        return pc + 1
    target = groups[-keep - 1] if keep else groups[-1]
    team: Warpgroup = w.team
    if team.complete < target:
        team.waiting.append((w, g))
        w.engine.note_wait(w, g, pc, team)
        return block(g, pc, "wgmma.wait_group", team)
    team.run_until(target, w)
    del groups[: len(groups) - keep]
    w.products_waited = max(w.products_waited, target)
    if w.clock is not None:
        component = team.component()
        w.clock[component] = max(w.clock[component], target)
    while team.marked and team.marked[0].sequence < target:
        for mark in team.marked.pop(0).marks:
            mark.close()
    w.engine.trace.add_event("wgmma wait")
    return pc + 1


@runtime
def fence_products(w: Any) -> None:
    """Registers written so far may be read by products."""
    w.products_fenced = True
    w.reused.clear()
    w.rewritten.clear()


@runtime
def flush_accumulators(w: Any, pc: int, sets: Sequence[tuple[int, ...]]) -> None:
    """Give accumulators' registers their values."""
    for registers in sets:
        sequence = w.dirty.get(registers)
        if sequence is None:
            continue
        if sequence >= w.products_waited:
            raise w.fault(RaceFault, pc, "touches registers of an accumulator while wgmma may be writing them")
        quarter = w.index & 3
        rows = wgmma.to_fragment(w.team.matrices[registers][16 * quarter : 16 * quarter + 16])
        w.fragments[registers] = rows
        for group in w.groups:
            for register, row in zip(registers, rows, strict=True):
                group.R[register] = row
        w.reused.add(registers)
        del w.dirty[registers]


_SHAPE_K = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32}


@emits("wgmma")
def emit_wgmma(e: Emitter, made: Instruction) -> None:
    """Warpgroup products and what orders them."""
    action, mods = made.parts[1], made.parts[2:]
    if mods[:2] != ["sync", "aligned"] or made.guard is not None:
        raise refuse(made)
    emit_meeting(e, made)
    if action == "fence" and len(mods) == 2:
        e.line("fence_products(w)")
        e.rewritten.clear()
        return
    if action == "commit_group" and len(mods) == 2:
        e.line("commit_products(w)")
    elif action == "wait_group" and len(mods) == 2:
        e.write_back(e.live)
        e.line(f"return wait_products(w, g, {made.pc}, {e.scalar(made.operands[0])})")
        e.ended = True
    elif action == "mma_async" and len(mods) == 6:
        _emit_product(e, made, mods[2:])
    else:
        raise refuse(made)


def _emit_product(e: Emitter, made: Instruction, mods: list[str]) -> None:
    shape, kind_d, kind_a, kind_b = mods
    operands = made.operands
    d, a = operands[:2]
    if kind_a not in _SHAPE_K or kind_b not in _SHAPE_K or kind_d != "f32" or not shape.startswith("m64n"):
        raise refuse(made)
    n, k = (int(number) for number in shape[4:].split("k"))
    if k != _SHAPE_K[kind_a] or k != _SHAPE_K[kind_b] or n % 8 or not 8 <= n <= 256 or not isinstance(d, Vec):
        raise refuse(made)
    if kind_a != kind_b and k != 32:
        raise refuse(made)
    registers = tuple(item.index for item in d.items if isinstance(item, Reg))
    in_registers = isinstance(a, Vec)
    immediates = [operand.value if isinstance(operand, Imm) else None for operand in operands[4:]]
    expected = 2 if k != 16 else (3 if in_registers else 4)
    if len(registers) * 2 != n or len(immediates) != expected or None in immediates:
        raise refuse(made)
    if any(value not in (1, -1) for value in immediates[:2]) or any(value not in (0, 1) for value in immediates[2:]):
        raise refuse(made)
    transposed = [bool(value) for value in immediates[2:]]
    k_major = (True, True)
    if k == 16:
        k_major = (True, not transposed[0]) if in_registers else (not transposed[0], not transposed[1])
    scales = (immediates[0] or 1, immediates[1] or 1)
    fragments = tuple(reg.index for reg in a.items if isinstance(reg, Reg)) if isinstance(a, Vec) else ()
    product = Product(n, (kind_a, kind_b), registers, scales, k_major, fragments)
    index = len(e.program.static)
    e.program.static.append(product)
    if isinstance(a, Vec):
        if len(a.items) != 4:
            raise refuse(made)
        source = "[" + ", ".join(e.vector(item, "u32", full=True) for item in a.items) + "]"
    elif e.is_uniform(a):
        source = e.scalar(a, 64)
    else:
        source = f"same_in_all(w, {made.pc}, {e.vector(a, 'u64')})"
    b, scale_d = operands[2:4]
    second = e.scalar(b, 64) if e.is_uniform(b) else f"same_in_all(w, {made.pc}, {e.vector(b, 'u64')})"
    if e.is_uniform(scale_d):
        keeps = e.scalar(scale_d, 1)
    else:
        keeps = f"same_in_all(w, {made.pc}, {e.vector(scale_d, 'b1')})"
    # The product sees registers where they are kept between runs, and afterwards they belong to the matrix.
    for register in registers:
        if register in e.dirty:
            e.line(f"R[{register}] = {e.register(e.program.kernel.registers[register])}")
            e.dirty.discard(register)
        e.names.pop(register, None)
    e.flushed.clear()
    e.line(f"issue_product(w, g, {made.pc}, {index}, {source}, {second}, {keeps})")


@runtime
def same_in_all(w: Any, pc: int, value: np.ndarray) -> Any:
    """A value that all lanes have to agree on."""
    if (value != value[0]).any():
        raise w.fault(SimulatorError, pc, "an operand differs between lanes where all have to agree")
    return value.item(0)
