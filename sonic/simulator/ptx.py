"""PTX text to instructions: names are resolved per brace block, operands are parsed, nothing is executed.

Registers become indices into one list per kernel, labels become instruction indices. Directives and declarations that
are not understood are refused with their text.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import ParseError

# Width class of a register type: what an operand of this type needs.
WIDTHS = {
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
    "pred": 1,
}


@dataclass(frozen=True)
class Reg:
    """A register: its index in the kernel's list, its width in bits (1 for predicates), its name."""

    index: int
    width: int
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """A constant; floating point constants are kept as their bits, with ``width`` 32 or 64, integers with width 0."""

    value: int
    width: int = 0


@dataclass(frozen=True)
class Sym:
    """The address of a parameter or variable."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine, such as ``tid.x``."""

    name: str


@dataclass(frozen=True)
class Addr:
    """``[base + offset]``; ``parts`` holds what follows in the same brackets (a tensor map's coordinates)."""

    base: Operand
    offset: int
    parts: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


@dataclass(frozen=True)
class Label:
    """A branch target as written; the instruction's ``target`` holds its index."""

    name: str


Operand = Reg | Imm | Sym | Special | Addr | Vec | Pair | Sink | Label


@dataclass
class Instruction:
    """One PTX instruction.

    Attributes:
        opcode: all of it, with modifiers; ``parts`` is the same, split at dots.
        operands: in written order; a branch's label is in ``target``.
        guard: the predicate register in ``@p``, if any.
        target: instruction index that a branch goes to.
        line: line in the PTX text.
        source: file and line of the kernel's source, if there is line info.
        text: as written, on one line.
    """

    opcode: str
    parts: list[str]
    operands: list[Operand]
    guard: Reg | None
    line: int
    source: tuple[str, int] | None
    text: str
    target: int = -1
    pc: int = -1

    def where(self) -> str:
        """Instruction and place, for messages."""
        text = self.text if len(self.text) <= 160 else self.text[:157] + "..."
        place = f"PTX line {self.line}"
        if self.source is not None:
            place += f", {self.source[0]}:{self.source[1]}"
        return f"`{text}` ({place})"


@dataclass(frozen=True)
class Param:
    """One kernel parameter."""

    name: str
    num_bytes: int
    align: int


@dataclass
class Variable:
    """A variable of the module or kernel. ``num_bytes`` is 0 for dynamic shared memory."""

    name: str
    space: str
    num_bytes: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    """One entry of a PTX text."""

    name: str
    params: list[Param]
    variables: dict[str, Variable]
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[Reg] = field(default_factory=list)
    required_block: tuple[int, int, int] | None = None


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_INLINE = re.compile(r"^[ \t]*//[ \t]*begin inline asm\b.*?^[ \t]*//[ \t]*end inline asm\b", re.S | re.M)
_LABEL = re.compile(r"([A-Za-z_$][\w$]*)\s*:(?!:)")
_DECLARE = re.compile(
    r"\.(?P<space>shared|global|local|const)\s*(?:\.align\s+(?P<align>\d+)\s*)?(?:\.v(?P<vec>[24])\s*)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$%]+)\s*(?P<dims>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<init>.*))?$",
    re.S,
)
_PARAM = re.compile(
    r"\.param\s*(?:\.align\s+(?P<align>\d+)\s*)?\.(?P<type>\w+)\s*"
    r"(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s*)?)?(?P<name>[\w$]+)\s*(?:\[\s*(?P<count>\d+)\s*\])?$"
)
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_FLOAT = re.compile(r"(-?)0([fFdD])([0-9a-fA-F]{8}|[0-9a-fA-F]{16})$")
_SPECIALS = re.compile(
    r"%(tid|ntid|ctaid|nctaid|cluster_ctaid|cluster_nctaid|clusterid|nclusterid)\.[xyz]$"
    r"|%(laneid|warpid|nwarpid|cluster_ctarank|cluster_nctarank|is_explicit_cluster|smid|nsmid|gridid|clock|clock64"
    r"|clock_hi|globaltimer|globaltimer_lo|dynamic_smem_size|total_smem_size|lanemask_(eq|le|lt|ge|gt))$"
)


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are inside no bracket; parts are stripped."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail or parts else []


def _integer(text: str) -> int:
    return int(text.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+U?", text) else int(text.rstrip("U"), 8)


class _Scope:
    """Names declared between two braces."""

    def __init__(self, parent: _Scope | None) -> None:
        self.parent = parent
        self.names: dict[str, Reg | Vec] = {}
        self.ranges: list[tuple[str, int, int]] = []
        self.labels: dict[str, int] = {}

    def chain(self) -> Iterator[_Scope]:
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


class _Parser:
    def __init__(self, text: str) -> None:
        # Comments become blanks of the same shape, so that positions still tell lines.
        self.text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
        # Inside of inline assembly the compiler counts lines of that text: those tell nothing about the source.
        self.foreign = [found.span() for found in _INLINE.finditer(text)]
        self.line_starts = [0, *(found.end() for found in re.finditer("\n", self.text))]
        self.files: dict[int, str] = {
            int(found[1]): found[2] for found in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', self.text)
        }
        self.fixups: list[tuple[Instruction, str, _Scope]] = []

    def line_of(self, position: int) -> int:
        low, high = 0, len(self.line_starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.line_starts[middle] <= position else (low, middle)
        return low + 1

    def is_foreign(self, position: int) -> bool:
        """Whether a position lies inside of inline assembly."""
        number = bisect.bisect(self.foreign, (position, len(self.text))) - 1
        return number >= 0 and position < self.foreign[number][1]

    def module_variables(self, end: int) -> dict[str, Variable]:
        found = {}
        for match in re.finditer(
            r"^\s*(?:\.visible\s+|\.extern\s+|\.weak\s+)*(\.(?:shared|global|const)\b[^;]*);", self.text[:end], re.M
        ):
            variable = self.variable(match[1], match.start())
            found[variable.name] = variable
        return found

    def variable(self, text: str, position: int) -> Variable:
        match = _DECLARE.match(text.strip())
        if match is None or match["type"] not in WIDTHS:
            raise ParseError(
                f"sonic.simulator: line {self.line_of(position)}: cannot read declaration `{text.strip()}`"
            )
        size = WIDTHS[match["type"]] // 8
        count = int(match["vec"] or 1)
        for dim in re.findall(r"\[\s*(\d*)\s*\]", match["dims"] or ""):
            count *= int(dim or 0)
        data = b""
        if match["init"]:
            values = split_top(match["init"].strip().strip("{}"))
            if not all(_INTEGER.match(value) for value in values):
                name, line = match["name"], self.line_of(position)
                raise ParseError(
                    f"sonic.simulator: line {line}: cannot read the initial value of `{name}`: integers only"
                )
            data = b"".join((_integer(value) % (1 << 8 * size)).to_bytes(size, "little") for value in values)
            count = max(count, len(values))
        return Variable(match["name"], match["space"], size * count, int(match["align"] or size), data)

    def kernel(self, name: str) -> Kernel:
        match = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", self.text)
        if match is None:
            entries = re.findall(r"\.entry\s+([\w$]+)", self.text)
            raise ParseError(f"sonic.simulator: entry {name} is not in the PTX, which has {entries}")
        variables = self.module_variables(match.start())
        close = self.text.index(")", match.end())
        params = []
        for declared in split_top(self.text[match.end() : close]):
            found = _PARAM.match(declared)
            if found is None or found["type"] not in WIDTHS:
                raise ParseError(f"sonic.simulator: cannot read parameter `{declared}`")
            size = WIDTHS[found["type"]] // 8
            params.append(Param(found["name"], size * int(found["count"] or 1), int(found["align"] or size)))
        body = self.text.index("{", close)
        kernel = Kernel(name, params, variables)
        required = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", self.text[close:body])
        if required:
            kernel.required_block = tuple(int(size or 1) for size in required.groups())  # type: ignore[assignment]
        self.body(kernel, body)
        return kernel

    def body(self, kernel: Kernel, start: int) -> None:
        scope = _Scope(None)
        position, depth = start + 1, 1
        source: tuple[str, int] | None = None
        text = self.text
        blank = re.compile(r"\s*")
        while True:
            position = blank.match(text, position).end()  # type: ignore[union-attr]
            if position >= len(text):
                raise ParseError(f"sonic.simulator: entry {kernel.name} is not closed")
            char = text[position]
            if char == "{":
                scope, depth, position = _Scope(scope), depth + 1, position + 1
            elif char == "}":
                depth, position = depth - 1, position + 1
                if depth == 0:
                    break
                assert scope.parent is not None, "depth counts the open scopes"
                scope = scope.parent
            elif text.startswith((".loc", ".file", ".section"), position):
                end = text.index("\n", position)
                found = re.match(r"\.loc\s+(\d+)\s+(\d+)", text[position:end])
                if found and not self.is_foreign(position):
                    line = int(found[2])
                    source = (self.files.get(int(found[1]), f"file {found[1]}"), line) if line else None
                position = end
            elif char == ".":
                end = text.index(";", position)
                self.declaration(kernel, scope, text[position:end], position)
                position = end + 1
            elif label := _LABEL.match(text, position):
                scope.labels[label[1]] = len(kernel.instructions)
                position = label.end()
            else:
                end = text.index(";", position)
                self.instruction(kernel, scope, text[position:end], position, source)
                position = end + 1
        if not kernel.instructions or kernel.instructions[-1].parts[0] not in ("ret", "exit", "bra", "trap"):
            self.instruction(kernel, scope, "ret", position, source)
        for instruction, name, where in self.fixups:
            for outer in where.chain():
                if name in outer.labels:
                    instruction.target = outer.labels[name]
                    break
            else:
                raise ParseError(f"sonic.simulator: no label {name} for {instruction.where()}")
            if instruction.target == len(kernel.instructions):  # a label right before the closing brace
                self.instruction(kernel, scope, "ret", position, source)

    def declaration(self, kernel: Kernel, scope: _Scope, text: str, position: int) -> None:
        words = text.split()
        if words[0] == ".pragma":
            return
        if words[0] == ".reg":
            rest = text.split(None, 1)[1].strip()
            match = re.match(r"(?:\.v([24])\s*)?\.(\w+)\s+(.*)$", rest, re.S)
            if match is None or match[2] not in WIDTHS:
                raise ParseError(f"sonic.simulator: line {self.line_of(position)}: cannot read `{text}`")
            width = WIDTHS[match[2]]
            for name in split_top(match[3]):
                many = re.match(r"([\w$%]+)<(\d+)>$", name)
                if many:
                    scope.ranges.append((many[1], int(many[2]), width))
                elif match[1]:
                    parts = tuple(self.new(kernel, f"{name}.{part}", width) for part in "xyzw"[: int(match[1])])
                    scope.names.update({part.name: part for part in parts})
                    scope.names[name] = Vec(parts)
                else:
                    scope.names[name] = self.new(kernel, name, width)
            return
        if words[0].split(".")[1] in ("shared", "global", "local", "const"):
            variable = self.variable(text, position)
            kernel.variables[variable.name] = variable
            return
        raise ParseError(f"sonic.simulator: line {self.line_of(position)}: unknown directive `{text}`")

    @staticmethod
    def new(kernel: Kernel, name: str, width: int) -> Reg:
        register = Reg(len(kernel.registers), width, name)
        kernel.registers.append(register)
        return register

    def register(self, kernel: Kernel, scope: _Scope, name: str) -> Reg | Vec | None:
        for outer in scope.chain():
            if name in outer.names:
                return outer.names[name]
            for prefix, count, width in outer.ranges:
                if name.startswith(prefix) and name[len(prefix) :].isdigit() and int(name[len(prefix) :]) < count:
                    register = outer.names[name] = self.new(kernel, name, width)
                    return register
        return None

    def instruction(
        self, kernel: Kernel, scope: _Scope, text: str, position: int, source: tuple[str, int] | None
    ) -> None:
        flat = " ".join(text.split())
        rest, guard = flat, None
        if rest.startswith("@"):
            word, rest = rest.split(None, 1)
            name = word[1:].lstrip("!")
            found = self.register(kernel, scope, name)
            if not isinstance(found, Reg) or found.width != 1:
                raise ParseError(f"sonic.simulator: line {self.line_of(position)}: guard of `{flat}` is no predicate")
            guard = Reg(found.index, 1, found.name, word[1] == "!")
        opcode, _, arguments = rest.partition(" ")
        # A brace may follow the opcode without a blank.
        if "{" in opcode or "[" in opcode:
            cut = min(opcode.index(char) for char in "{[" if char in opcode)
            opcode, arguments = rest[:cut], rest[cut:]
        made = Instruction(opcode, opcode.split("."), [], guard, self.line_of(position), source, flat)
        made.pc = len(kernel.instructions)
        for operand in split_top(arguments):
            made.operands.append(self.operand(kernel, scope, operand, made))
        if made.parts[0] == "bra":
            label = made.operands.pop()
            assert isinstance(label, Label), f"the target of {made.where()} is a label"
            self.fixups.append((made, label.name, scope))
        elif any(isinstance(operand, Label) for operand in made.operands):
            raise ParseError(f"sonic.simulator: unknown name in {made.where()}")
        kernel.instructions.append(made)

    def operand(self, kernel: Kernel, scope: _Scope, text: str, made: Instruction) -> Operand:
        if text.startswith("{"):
            return Vec(tuple(self.operand(kernel, scope, part, made) for part in split_top(text[1:-1])))
        if text.startswith("["):
            inside = split_top(text[1:-1])
            if not inside:
                raise ParseError(f"sonic.simulator: empty address in {made.where()}")
            parts = tuple(self.operand(kernel, scope, part, made) for part in inside[1:])
            match = re.match(r"(.+?)\s*([+-])\s*(-?\s*(?:0x)?[0-9a-fA-F]+U?)$", inside[0])
            if match and not match[1].endswith(("+", "-")):
                offset = _integer(match[3].replace(" ", ""))
                base = self.operand(kernel, scope, match[1], made)
                return Addr(base, -offset if match[2] == "-" else offset, parts)
            return Addr(self.operand(kernel, scope, inside[0], made), 0, parts)
        if text == "_":
            return Sink()
        if text.startswith("!"):
            found = self.operand(kernel, scope, text[1:].strip(), made)
            if not isinstance(found, Reg):
                raise ParseError(f"sonic.simulator: cannot negate `{text[1:].strip()}` in {made.where()}")
            return Reg(found.index, found.width, found.name, True)
        if "|" in text:
            first, second = text.split("|")
            return Pair(
                self.operand(kernel, scope, first.strip(), made), self.operand(kernel, scope, second.strip(), made)
            )
        if _INTEGER.match(text):
            return Imm(_integer(text))
        if match := _FLOAT.match(text):
            width = 32 if match[2] in "fF" else 64
            return Imm(int(match[3], 16) ^ (1 << (width - 1) if match[1] else 0), width)
        if re.match(r"-?\d+\.\d*(e[+-]?\d+)?$", text):
            return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        if text == "WARP_SZ":
            return Imm(32)
        register = self.register(kernel, scope, text)
        if register is not None:
            return register
        if _SPECIALS.match(text):
            return Special(text[1:])
        match = re.match(r"([\w$]+)\s*(?:\+\s*(\d+))?$", text)
        if match and (match[1] in kernel.variables or any(param.name == match[1] for param in kernel.params)):
            return Sym(match[1], int(match[2] or 0))
        if re.match(r"[A-Za-z_$][\w$]*$", text):
            return Label(text)
        raise ParseError(f"sonic.simulator: cannot read operand `{text}` of {made.where()}")


def parse(text: str, entry: str) -> Kernel:
    """Parse one entry of a PTX text."""
    return _Parser(text).kernel(entry)
