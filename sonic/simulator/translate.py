"""A parsed kernel to Python functions: control flow, liveness, what is the same in all lanes, code.

Two sets of functions are made. ``coarse`` runs serve warps whose lanes are all at the same place, and are cut only at
labels, branches and instructions that may wait. ``fine`` runs serve part of a warp, and are cut also where lanes have
to meet, so that groups of lanes can join there.

Which registers are uniform (the same in all lanes that run together) is first guessed from the instructions that write
them. Where two groups of lanes meet with different values the guess was wrong: the register is demoted to 32 lanes and
the kernel is translated again; that is remembered with the kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import (  # noqa: F401  the handlers register themselves
    instructions_alu,
    instructions_async,
    instructions_bits,
    instructions_control,
    instructions_float,
    instructions_memory,
    instructions_warp,
)
from .instructions_common import (
    CANONICAL,
    DTYPES,
    HANDLERS,
    LANE_SPECIALS,
    RUNTIME,
    SCALAR_RULES,
    Emitter,
    bits_of,
    refuse,
)
from .ptx import Addr, Imm, Instruction, Kernel, Operand, Pair, Reg, Sink, Special, Sym, Vec, parse

# Opcodes whose first operand is no result although it is no address.
NO_RESULT = frozenset(
    "bar barrier fence membar ret exit trap bra setmaxnreg griddepcontrol nanosleep prefetch prefetchu cp discard "
    "applypriority stmatrix st red brkpt tensormap pmevent".split()
)
# Instructions that may have to wait, or that end the thread: a run ends behind them.
MAY_WAIT = ("bar", "barrier", "ret", "exit", "trap", "bra", "nanosleep")
# Instructions at which the lanes of a warp have to meet.
MEETS = ("shfl", "vote", "elect", "match", "redux", "bar", "barrier", "wgmma", "ldmatrix", "stmatrix", "setmaxnreg")


def registers_of(operand: Operand) -> Iterable[Reg]:
    """All registers in an operand."""
    if isinstance(operand, Reg):
        yield operand
    elif isinstance(operand, Addr):
        yield from registers_of(operand.base)
        for part in operand.parts:
            yield from registers_of(part)
    elif isinstance(operand, Vec):
        for item in operand.items:
            yield from registers_of(item)
    elif isinstance(operand, Pair):
        yield from registers_of(operand.first)
        yield from registers_of(operand.second)


def may_wait(made: Instruction) -> bool:
    """Whether a run ends behind this instruction."""
    root, parts = made.parts[0], made.parts
    if root == "wgmma":
        return parts[1] == "wait_group"
    if root == "cp":
        return "wait_group" in parts or "wait_all" in parts
    return root in MAY_WAIT


class Flow:
    """Results and sources of each instruction, where runs begin, which registers are needed later."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        code = kernel.instructions
        self.defs: list[list[int]] = []
        self.uses: list[list[int]] = []
        self.waits: dict[int, int] = {}
        for made in code:
            root = made.parts[0]
            operands = made.operands
            has_result = bool(operands) and not isinstance(operands[0], Addr) and root not in NO_RESULT
            results = list(registers_of(operands[0])) if has_result else []
            sources = [reg for operand in operands[has_result:] for reg in registers_of(operand)]
            if root == "wgmma":
                sources += results
            self.defs.append([reg.index for reg in results])
            self.uses.append([reg.index for reg in sources])
            if made.guard is not None:
                self.uses[-1].append(made.guard.index)
                if root != "bra":
                    self.uses[-1].extend(self.defs[-1])
        self.find_waits()
        self.leaders = {0}
        self.fine_leaders = {0}
        for pc, made in enumerate(code):
            root = made.parts[0]
            if root == "bra":
                self.leaders.add(made.target)
            if may_wait(made) or pc in self.waits:
                self.leaders.add(pc + 1)
            if pc in self.waits:
                self.leaders.update((pc, self.waits[pc]))
            if root in MEETS:
                self.fine_leaders.update((pc, pc + 1))
        self.leaders.discard(len(code))
        self.fine_leaders |= self.leaders
        self.fine_leaders.discard(len(code))
        self.live_in = self.liveness()

    def find_waits(self) -> None:
        """``try_wait`` loops that do nothing else: pc of the wait -> pc behind the loop."""
        code = self.kernel.instructions
        for pc, made in enumerate(code[:-1]):
            if made.parts[0] != "mbarrier" or made.parts[1] not in ("try_wait", "test_wait") or made.guard is not None:
                continue
            predicate = made.operands[0]
            after = code[pc + 1]
            if not isinstance(predicate, Reg) or after.parts[0] != "bra" or after.guard is None:
                continue
            if after.guard.index != predicate.index:
                continue
            if after.guard.negated and after.target == pc:
                self.waits[pc] = pc + 2
            elif not after.guard.negated and pc + 2 < len(code):
                back = code[pc + 2]
                if back.parts[0] == "bra" and back.guard is None and back.target == pc:
                    self.waits[pc] = after.target

    def successors(self, pc: int) -> list[int]:
        """Where control may go behind an instruction."""
        made = self.kernel.instructions[pc]
        root = made.parts[0]
        following = [pc + 1] if pc + 1 < len(self.kernel.instructions) else []
        if pc in self.waits:
            return [self.waits[pc], *following]
        if root == "bra":
            return [made.target] if made.guard is None else [made.target, *following]
        if root in ("ret", "exit", "trap") and made.guard is None:
            return []
        return following

    def liveness(self) -> list[int]:
        """Bit sets of the registers whose value is needed at each instruction."""
        count = len(self.kernel.instructions)
        live = [0] * (count + 1)
        kill, gen = [0] * count, [0] * count
        for pc in range(count):
            for index in self.uses[pc]:
                gen[pc] |= 1 << index
            for index in self.defs[pc]:
                kill[pc] |= 1 << index
        following = [self.successors(pc) for pc in range(count)]
        changed = True
        while changed:
            changed = False
            for pc in range(count - 1, -1, -1):
                out = 0
                for successor in following[pc]:
                    out |= live[successor]
                needed = gen[pc] | (out & ~kill[pc])
                if needed != live[pc]:
                    live[pc] = needed
                    changed = True
        return live

    def live_out(self, pc: int) -> int:
        """Registers needed behind an instruction."""
        out = 0
        for successor in self.successors(pc):
            out |= self.live_in[successor]
        return out


class Program:
    """A kernel ready to run: its functions and what they need."""

    def __init__(self, kernel: Kernel) -> None:
        code = kernel.instructions
        # Somewhere to go for guarded returns.
        last = Instruction("ret", ["ret"], [], None, code[-1].line if code else 0, None, "ret")
        last.pc = len(code)
        code.append(last)
        for made in code:
            if made.parts[0] not in HANDLERS:
                raise refuse(made)
            if made.parts[0] in ("ret", "exit") and made.guard is not None:
                made.parts = ["bra"]
                made.target = last.pc
        self.kernel = kernel
        self.flow = Flow(kernel)
        self.demoted: set[int] = set()
        self.param_offsets: dict[str, int] = {}
        self.bank_bytes = 0
        for param in kernel.params:
            start = -(-self.bank_bytes // param.align) * param.align
            self.param_offsets[param.name] = start
            self.bank_bytes = start + param.num_bytes
        # What instructions know about themselves beyond operands: bulk copies, products.
        self.static: list[Any] = []
        self.accumulators = {
            index
            for made in code
            if made.parts[0] == "wgmma" and made.parts[1] == "mma_async"
            for index in self.flow.defs[made.pc]
        }
        self.accumulator_sets: dict[int, str] = {}
        self.product_sets: dict[int, str] = {}
        self.globals: dict[str, Any] = dict(RUNTIME)
        self.name_sets()
        self.globals.update({f"T_{name}": dtype for name, dtype in DTYPES.items()})
        self.globals["ALL_TRUE"] = np.ones(32, np.bool_)
        self.globals["ALL_FALSE"] = np.zeros(32, np.bool_)
        self.constants: dict[tuple[int, str, bool], str] = {}
        self.canonical = self.choose_types()
        self.live_lists: dict[int, list[int]] = {}
        self.translate()

    def name_sets(self) -> None:
        """For each register of products: a constant with the sets (accumulators, fragments of A) that it is in."""
        accumulators: dict[int, dict[tuple[int, ...], None]] = {}
        operands: dict[int, dict[tuple[int, ...], None]] = {}
        for made in self.kernel.instructions:
            if made.parts[:2] != ["wgmma", "mma_async"]:
                continue
            for place, operand in enumerate(made.operands[:2]):
                if not isinstance(operand, Vec):
                    continue
                members = tuple(reg.index for reg in registers_of(operand))
                for index in members:
                    operands.setdefault(index, {})[members] = None
                    if place == 0:
                        accumulators.setdefault(index, {})[members] = None
        names: dict[tuple[tuple[int, ...], ...], str] = {}
        for found, result in ((accumulators, self.accumulator_sets), (operands, self.product_sets)):
            for index, sets in found.items():
                name = result[index] = names.setdefault(tuple(sets), f"SETS_{len(names)}")
                self.globals[name] = tuple(sets)

    # -------------------------------------------------------------- what registers are

    def choose_types(self) -> list[str]:
        """Type in which each register is kept between runs: unsigned bits, or float where results are floats."""
        kinds = [CANONICAL[register.width] for register in self.kernel.registers]
        votes: dict[int, int] = {}
        for made in self.kernel.instructions:
            if made.parts[0] in ("fma", "add", "sub", "mul", "wgmma", "neg", "ex2", "rcp") and "f32" in made.parts:
                for index in self.flow.defs[made.pc]:
                    votes[index] = votes.get(index, 0) + 1
        for index in votes:
            if kinds[index] == "u32":
                kinds[index] = "f32"
        return kinds

    def is_uniform(self, operand: Operand) -> bool:
        """Whether an operand is one integer for all lanes that run together."""
        if isinstance(operand, Reg):
            return self.uniform[operand.index]
        if isinstance(operand, Special):
            return operand.name not in LANE_SPECIALS
        if isinstance(operand, (Imm, Sym, Sink)):
            return True
        return all(self.uniform[reg.index] for reg in registers_of(operand))

    def find_uniform(self) -> None:
        """The largest set of registers all of whose writers have uniform sources and no demoted result."""
        self.uniform = [True] * len(self.kernel.registers)
        for index in self.demoted | self.accumulators:
            self.uniform[index] = False
        writers: dict[int, list[Instruction]] = {}
        readers: dict[int, list[Instruction]] = {}
        for made in self.kernel.instructions:
            for index in self.flow.defs[made.pc]:
                writers.setdefault(index, []).append(made)
            for index in self.flow.uses[made.pc]:
                readers.setdefault(index, []).append(made)
        work = [made for made in self.kernel.instructions if self.flow.defs[made.pc]]
        for index, vector in enumerate(self.uniform):
            if not vector:
                work.extend(readers.get(index, []))
        while work:
            made = work.pop()
            first = made.operands[0] if made.operands else None
            for index in self.flow.defs[made.pc]:
                if not self.uniform[index]:
                    continue
                rule = SCALAR_RULES.get(made.parts[0])
                fits = rule is not None and rule(made, self.is_uniform)
                if made.guard is not None and not self.uniform[made.guard.index]:
                    fits = False
                if isinstance(first, Pair) and isinstance(first.second, Reg) and index == first.second.index:
                    fits = False
                if not fits:
                    self.uniform[index] = False
                    work.extend(readers.get(index, []))

    def constant(self, value: int, kind: str, lanes: bool) -> str:
        """Name of a constant array in generated code."""
        key = (value, kind, lanes)
        name = self.constants.get(key)
        if name is None:
            name = self.constants[key] = f"K{len(self.constants)}"
            width = bits_of(kind)
            raw = np.array(value, DTYPES[CANONICAL[width]])
            array = raw if width == 1 else raw.view(DTYPES[kind])
            self.globals[name] = np.broadcast_to(array, (32,)).copy() if lanes else array
        return name

    # -------------------------------------------------------------- code

    def translate(self) -> None:
        """Make all coarse functions, which also finds what is not understood; fine ones follow on demand."""
        count = len(self.kernel.instructions)
        self.find_uniform()
        self.static.clear()
        self.coarse: list[Callable[..., int] | None] = [None] * count
        self.fine: list[Callable[..., int] | None] = [None] * count
        self.coarse_length = [0] * count
        self.fine_length = [0] * count
        self.template: list[Any] = []
        zeros: dict[str, Any] = {}
        for index, kind in enumerate(self.canonical):
            if self.uniform[index]:
                self.template.append(False if kind == "b1" else 0)
            else:
                self.template.append(zeros.setdefault(kind, np.zeros(32, DTYPES[kind])))
        texts = [self.function(pc, False) for pc in sorted(self.flow.leaders)]
        self.compile("\n".join(texts))
        for pc in self.flow.leaders:
            self.coarse[pc] = self.globals[f"run_{pc}_coarse"]

    def compile(self, text: str) -> None:
        """Add functions to the program."""
        exec(compile(text, f"<{self.kernel.name[:60]}>", "exec"), self.globals)

    def fine_function(self, pc: int) -> Callable[..., int]:
        """The run of part of a warp that begins here."""
        found = self.fine[pc]
        if found is None:
            self.compile(self.function(pc, True))
            found = self.fine[pc] = self.globals[f"run_{pc}_fine"]
        return found

    def function(self, start: int, fine: bool) -> str:
        """Text of one run."""
        leaders = self.flow.fine_leaders if fine else self.flow.leaders
        emitter = Emitter(self, fine)
        pc = start
        code = self.kernel.instructions
        while True:
            made = code[pc]
            row = self.row_of_packs(pc, leaders)
            if len(row) > 1:
                emitter.pc = pc
                instructions_float.emit_packs(emitter, row)
                pc += len(row) - 1
            else:
                emitter.emit(made, self.flow.live_out(pc))
            if emitter.ended:
                break
            pc += 1
            if pc in leaders or pc == len(code):
                emitter.write_back(self.flow.live_in[pc])
                emitter.line(f"return {pc}")
                break
        length = pc - start + (1 if emitter.ended else 0)
        if fine:
            self.fine_length[start] = length
        else:
            self.coarse_length[start] = length
        name = f"run_{start}_{'fine' if fine else 'coarse'}"
        return f"def {name}(w, g):\n    R = g.R\n" + "".join(f"    {line}\n" for line in emitter.lines)

    def row_of_packs(self, start: int, leaders: set[int]) -> list[Instruction]:
        """Conversions to pairs of bf16 that follow each other and do not need each other."""
        row: list[Instruction] = []
        written: set[int] = set()
        for pc in range(start, len(self.kernel.instructions)):
            made = self.kernel.instructions[pc]
            if made.opcode != instructions_float.PACK_BF16 or made.guard is not None or (row and pc in leaders):
                break
            if not written.isdisjoint(self.flow.uses[pc]):
                break
            row.append(made)
            written.update(self.flow.defs[pc])
        return row

    def live_list(self, pc: int) -> list[int]:
        """Indices of the registers needed at an instruction."""
        found = self.live_lists.get(pc)
        if found is None:
            bits = self.flow.live_in[pc]
            found = self.live_lists[pc] = [index for index in range(bits.bit_length()) if bits >> index & 1]
        return found

    def demote(self, indices: Iterable[int]) -> list[int]:
        """Give registers 32 lanes; returns all that changed, whose values must be spread by the caller."""
        before = list(self.uniform)
        self.demoted.update(indices)
        self.translate()
        return [index for index, was in enumerate(before) if was and not self.uniform[index]]


_PROGRAMS: dict[tuple[str, str], Program] = {}


def load(ptx: str, entry: str) -> Program:
    """The program of an entry; translated once per PTX text."""
    key = (hashlib.sha256(ptx.encode()).hexdigest(), entry)
    found = _PROGRAMS.get(key)
    if found is None:
        found = _PROGRAMS[key] = Program(parse(ptx, entry))
    return found
