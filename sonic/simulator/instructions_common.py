"""What all instruction emitters share: operands to Python expressions, results to variables, the table of handlers.

A straight-line run becomes one Python function. Inside it a register is a local variable: a Python integer (its bits,
unsigned) where the translator knows it to be the same in all lanes, else an array of 32 lanes that is never written in
place, so that copies are free. Views of other types are kept beside the canonical one while the run lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .errors import Unsupported
from .ptx import Addr, Imm, Instruction, Operand, Reg, Special, Sym

DTYPES: dict[str, Any] = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "b1": np.bool_,
}
CANONICAL = {1: "b1", 8: "u8", 16: "u16", 32: "u32", 64: "u64"}
MASKS = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
# Per-lane values; everything else is the same in all lanes of a warp.
LANE_SPECIALS = frozenset(
    "tid.x tid.y tid.z laneid lanemask_eq lanemask_le lanemask_lt lanemask_ge lanemask_gt".split()
)

Handler = Callable[["Emitter", Instruction], None]
# (instruction, is a register index the same in all lanes) -> are the results the same in all lanes
ScalarRule = Callable[[Instruction, Callable[[Operand], bool]], bool]
HANDLERS: dict[str, Handler] = {}
SCALAR_RULES: dict[str, ScalarRule] = {}
RUNTIME: dict[str, Any] = {"np": np}


def emits(*roots: str, scalar: ScalarRule | None = None) -> Callable[[Handler], Handler]:
    """Register a handler for opcodes; ``scalar`` tells when its results are the same in all lanes."""

    def register(handler: Handler) -> Handler:
        for root in roots:
            assert root not in HANDLERS, f"two handlers for {root}"
            HANDLERS[root] = handler
            if scalar is not None:
                SCALAR_RULES[root] = scalar
        return handler

    return register


def runtime(function: Any) -> Any:
    """Make a function callable from generated code, under its own name."""
    RUNTIME[function.__name__] = function
    return function


def all_uniform(made: Instruction, uniform: Callable[[Operand], bool]) -> bool:
    """The usual rule: sources are the same in all lanes."""
    return all(uniform(operand) for operand in made.operands[1:])


def refuse(made: Instruction, why: str = "") -> Unsupported:
    """The error for anything that is not understood."""
    if not why:
        return refuse(made, "this instruction or one of its modifiers is not understood")
    return Unsupported(f"sonic.simulator: {why}: {made.where()}")


def take(made: Instruction, known: Sequence[str]) -> list[str]:
    """Modifiers behind the opcode; one that is not in ``known`` is refused."""
    for part in made.parts[1:]:
        if part not in known:
            raise refuse(made, f"modifier .{part} is not understood")
    return made.parts[1:]


def bits_of(kind: str) -> int:
    """Width in bits of a type such as ``s32`` or ``bf16x2``."""
    return {"f16x2": 32, "bf16x2": 32, "bf16": 16, "pred": 1, "tf32": 32}.get(kind) or int(kind[1:])


def plain(kind: str) -> str:
    """The array type that holds a PTX type: untyped bits are unsigned."""
    return {"bf16": "u16", "f16x2": "u32", "bf16x2": "u32", "pred": "b1", "tf32": "u32"}.get(
        kind, kind.replace("b", "u")
    )


class Emitter:
    """Builds the body of one straight-line run."""

    def __init__(self, program: Any, fine: bool) -> None:
        self.program = program
        self.fine = fine
        self.lines: list[str] = []
        self.outer: list[str] = self.lines
        self.names: dict[int, dict[str, str]] = {}
        self.dirty: set[int] = set()
        self.constants: dict[str, str] = {}
        self.group = "g"
        self.inside_guard = False
        # Names of sets of product registers that were given their values, and that were written to, in this run.
        self.flushed: set[str] = set()
        self.rewritten: set[str] = set()
        self.counter = 0
        self.ended = False
        self.pc = -1

    # -------------------------------------------------------------- text

    def line(self, text: str) -> None:
        """Add a line to the run."""
        self.lines.append(text)

    def fresh(self, stem: str = "t") -> str:
        """A new variable name."""
        self.counter += 1
        return f"{stem}_{self.counter}"

    def temp(self, expression: str) -> str:
        """Assign an expression to a new variable."""
        name = self.fresh()
        self.line(f"{name} = {expression}")
        return name

    # -------------------------------------------------------------- operands

    def is_uniform(self, operand: Operand) -> bool:
        """Whether an operand is a Python integer in generated code."""
        return self.program.is_uniform(operand)

    def touch(self, index: int) -> None:
        """Accumulators of wgmma live in a matrix until something else looks at them."""
        name = self.program.accumulator_sets.get(index)
        if name is not None and name not in self.flushed:
            self.outer.append(f"if w.dirty: flush_accumulators(w, {self.pc}, {name})")
            self.flushed.add(name)

    def note_change(self, index: int) -> None:
        """A register that products use is written by an ordinary instruction: a fence has to follow.

        Plain copies are let pass: the compiler makes them, and puts them behind fences that the source has after them.
        """
        name = self.program.product_sets.get(index)
        is_copy = self.program.kernel.instructions[self.pc].parts[0] == "mov"
        if name is not None and not is_copy and name not in self.rewritten:
            self.line(f"w.rewritten.update({name})")
            if not self.inside_guard:
                self.rewritten.add(name)

    def register(self, reg: Reg) -> str:
        """Variable that holds a register in its canonical type."""
        index = reg.index
        canonical = self.program.canonical[index]
        known = self.names.setdefault(index, {})
        if not known:
            self.touch(index)
            known[canonical] = f"r{index}"
            self.outer.append(f"r{index} = R[{index}]")
        elif canonical not in known:
            other = next(iter(known.values()))
            known[canonical] = f"r{index}"
            self.outer.append(f"r{index} = {other}.view(T_{canonical})")
        return known[canonical]

    def scalar(self, operand: Operand, width: int = 32) -> str:
        """Expression of a uniform operand: its bits as an unsigned integer (``True``/``False`` for predicates)."""
        if isinstance(operand, Imm):
            return str(operand.value & MASKS[width]) if width > 1 else str(bool(operand.value))
        if isinstance(operand, Reg):
            assert self.program.uniform[operand.index], f"{operand.name} is not the same in all lanes"
            name = self.register(operand)
            return f"(not {name})" if operand.negated else name
        if isinstance(operand, Sym):
            return f"(w.cta.symbols[{operand.name!r}] + {operand.offset})"
        if isinstance(operand, Special):
            return self.special(operand)
        raise self.refuse_operand("an operand")

    def special(self, operand: Special) -> str:
        """A machine register."""
        return f"special(w, {operand.name!r})"

    def signed(self, operand: Operand, width: int) -> str:
        """The same as a signed integer."""
        if isinstance(operand, Imm):
            value = operand.value & MASKS[width]
            return str(value - (1 << width) if value >> (width - 1) else value)
        half = 1 << (width - 1)
        return f"(({self.scalar(operand, width)} ^ {half}) - {half})"

    def typed(self, operand: Operand, kind: str) -> str:
        """Uniform operand as the number that ``kind`` (``u32``, ``s64``...) says."""
        return self.signed(operand, int(kind[1:])) if kind[0] == "s" else self.scalar(operand, bits_of(kind))

    def refuse_operand(self, what: str) -> Unsupported:
        """The error for a vector, a pair or an address where the rule of an instruction wants something else."""
        made = self.program.kernel.instructions[self.pc]
        return refuse(made, f"{what} of this instruction is of a kind that its rule does not know")

    def constant(self, value: int, kind: str, lanes: bool = True) -> str:
        """A constant array (32 lanes), made once per program."""
        return self.program.constant(value, kind, lanes)

    def vector(self, operand: Operand, kind: str, full: bool = False) -> str:
        """Expression of an operand as array of type ``kind``; ``full`` insists on 32 lanes."""
        width = bits_of(kind)
        if isinstance(operand, Imm):
            value = operand.value
            if kind == "b1":
                return self.constant(int(bool(value)), "b1")
            if operand.width == 64 and kind == "f32":
                value = int(np.array(value, np.uint64).view(np.float64).astype(np.float32).view(np.uint32))
            return self.constant(value & MASKS[width], kind)
        if isinstance(operand, Reg) and not self.program.uniform[operand.index]:
            if operand.width != width:
                return self.resized(operand, kind)
            canonical = self.program.canonical[operand.index]
            known = self.names.setdefault(operand.index, {})
            if kind not in known:
                if not known:
                    self.register(operand)
                if kind not in known:
                    source = known.get(canonical) or next(iter(known.values()))
                    name = f"r{operand.index}_{kind}"
                    self.outer.append(f"{name} = {source}.view(T_{kind})")
                    known[kind] = name
            return f"~{known[kind]}" if operand.negated else known[kind]
        if isinstance(operand, Special) and operand.name in LANE_SPECIALS:
            return f"special(w, {operand.name!r}).astype(T_{kind})"
        scalar = self.scalar(operand, width)
        if kind == "b1":
            return f"(ALL_TRUE if {scalar} else ALL_FALSE)"
        if isinstance(operand, Reg) and operand.width != width:
            scalar = f"({scalar} & {MASKS[width]})"
        if full:
            return f"spread({scalar}, T_{CANONICAL[width]}).view(T_{kind})"
        if kind == CANONICAL[width]:
            return f"T_{kind}({scalar})"
        return f"T_{CANONICAL[width]}({scalar}).view(T_{kind})"

    def resized(self, operand: Reg, kind: str) -> str:
        """A register read at another width than its own: its low bits, or extended by the sign of ``kind``."""
        source = "s" if kind[0] == "s" else "u"
        return f"{self.vector(operand, f'{source}{operand.width}')}.astype(T_{kind})"

    def vectors(self, operands: Sequence[Operand], kind: str) -> list[str]:
        """Several operands, at least one of which has 32 lanes."""
        all_scalar = all(self.is_uniform(operand) and not isinstance(operand, Imm) for operand in operands)
        return [self.vector(operand, kind, full=all_scalar and not n) for n, operand in enumerate(operands)]

    def address(self, operand: Addr, width: int) -> tuple[str, bool]:
        """Base plus offset: expression, and whether it is uniform."""
        base = operand.base
        if self.is_uniform(base):
            text = self.scalar(base, width)
            if isinstance(base, Reg) and base.width < width:
                width = base.width
            return (f"(({text} + {operand.offset}) & {MASKS[width]})" if operand.offset else text), True
        assert isinstance(base, Reg), "an address is a register or a symbol"
        text = self.vector(base, f"u{base.width}")
        if operand.offset:
            text = f"({text} + {self.constant(operand.offset & MASKS[base.width], f'u{base.width}')})"
        return text, False

    # -------------------------------------------------------------- results

    def write(self, operand: Operand, expression: str, kind: str) -> None:
        """Assign a result of type ``kind``; for a uniform register ``expression`` is the unsigned integer."""
        if not isinstance(operand, Reg):
            if type(operand).__name__ != "Sink":
                raise self.refuse_operand("a result")
            self.line(expression)
            return
        index = operand.index
        width = bits_of(kind)
        self.touch(index)
        self.note_change(index)
        self.dirty.add(index)
        if self.program.uniform[index]:
            self.line(f"r{index} = {expression}")
            self.names[index] = {self.program.canonical[index]: f"r{index}"}
            return
        if width != operand.width:
            expression = f"({expression}).astype(T_{kind[0]}{operand.width})"
            kind = f"{kind[0]}{operand.width}"
        canonical = self.program.canonical[index]
        name = f"r{index}" if kind == canonical else f"r{index}_{kind}"
        if self.inside_guard:
            if kind != canonical:
                expression = f"({expression}).view(T_{canonical})"
            old = f"r{index}"
            self.line(
                f"r{index} = np.where(guard, {expression}, {old})" if self.group == "q" else f"{old} = {expression}"
            )
            self.names[index] = {canonical: f"r{index}"}
            return
        self.line(f"{name} = {expression}")
        self.names[index] = {kind: name}

    def write_scalar_or_spread(self, operand: Operand, expression: str, kind: str) -> None:
        """A result that is one integer for the whole warp, to whatever the register is."""
        if isinstance(operand, Reg) and not self.program.uniform[operand.index]:
            if kind == "b1":
                self.write(operand, f"(ALL_TRUE if {expression} else ALL_FALSE)", "b1")
            else:
                self.write(operand, f"spread({expression}, T_{plain(kind)})", plain(kind))
            return
        self.write(operand, expression, kind)

    def is_scalar_result(self, operand: Operand) -> bool:
        """Whether a result register is uniform."""
        return isinstance(operand, Reg) and self.program.uniform[operand.index]

    # -------------------------------------------------------------- ends

    def write_back(self, live: int) -> None:
        """Store the registers that somebody reads later (``live`` is a bit set)."""
        for index in sorted(self.dirty):
            if live >> index & 1:
                register = self.program.kernel.registers[index]
                self.line(f"R[{index}] = {self.register(register)}")

    def emit(self, made: Instruction, live: int) -> None:
        """One instruction with its guard; ``live`` is needed by those that end the run."""
        self.live = live
        self.pc = made.pc
        handler = HANDLERS.get(made.parts[0])
        if handler is None:
            raise refuse(made)
        if made.guard is None or made.parts[0] == "bra":
            handler(self, made)
            return
        guard = made.guard
        for reg in self.program.flow.defs[made.pc]:
            self.register(self.program.kernel.registers[reg])
        outer, self.lines = self.lines, []
        self.outer = outer
        self.inside_guard = True
        if self.program.uniform[guard.index]:
            head = f"if {self.scalar(guard)}:"
        else:
            outer.append(f"guard = {self.vector(guard, 'b1')}")
            outer.append("q = narrow(g, guard)")
            head = "if q is not None:"
            self.group = "q"
        handler(self, made)
        inner, self.lines = self.lines, outer
        self.outer, self.group, self.inside_guard = outer, "g", False
        outer.append(head)
        outer.extend("    " + text for text in (inner or ["pass"]))
        if self.ended:  # the guarded path left the run; this one goes on at the next instruction
            self.ended = False
