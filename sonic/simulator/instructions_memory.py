"""Loads, stores, atomics, and the matrix moves between registers and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import MemoryFault
from .instructions_common import DTYPES, MASKS, Emitter, bits_of, emits, plain, refuse, runtime
from .instructions_control import FULL, Group, emit_meeting
from .memory import ALL_ONES, UNITS, Fault, Pattern, Scattered, SharedMemory, Stretch
from .ptx import Addr, Instruction, Operand, Reg, Sym, Vec
from .tma import reduced

SPACES = ("param", "global", "shared", "shared::cta", "shared::cluster", "const", "local")
HINTS = frozenset(
    "weak volatile relaxed acquire release acq_rel nc ca cg cs lu cv wb wt cta cluster gpu sys L1::evict_first "
    "L1::evict_last L1::no_allocate L1::evict_normal L1::evict_unchanged L2::evict_first L2::evict_last "
    "L2::cache_hint L2::64B L2::128B L2::256B".split()
)


# ---------------------------------------------------------------- global memory


_SECTORS: dict[tuple[bytes, int, int], int] = {}


def sectors_of(addresses: np.ndarray, size: int) -> int:
    """How many 32-byte sectors a request touches."""
    first = addresses[0]
    key = ((addresses - first).tobytes(), int(first) & 31, size)
    found = _SECTORS.get(key)
    if found is None:
        if len(_SECTORS) > 50000:
            _SECTORS.clear()
        low = addresses >> np.uint64(5)
        high = (addresses + np.uint64(size - 1)) >> np.uint64(5)
        found = _SECTORS[key] = len(np.union1d(low, high))
    return found


def access_global(
    w: Any, pc: int, path: str, addresses: np.ndarray, size: int
) -> list[tuple[Any, Stretch, np.ndarray]]:
    """Check an access and count it; returns (lanes, region, index) for each region."""
    memory, trace = w.engine.memory, w.engine.trace
    try:
        try:
            stretch, index = memory.locate(addresses, size, w.last_stretch)
        except Scattered:
            pieces = memory.pieces(addresses, size)
            for lanes, part, _ in pieces:
                trace.add(path, part.name, 1, len(lanes) * size, sectors_of(addresses[lanes], size))
            return pieces
    except Fault as fault:
        raise w.fault(MemoryFault, pc, str(fault)) from None
    w.last_stretch = stretch
    trace.add(path, stretch.name, 1, len(addresses) * size, sectors_of(addresses, size))
    return [(slice(None), stretch, index)]


@runtime
def load_global(w: Any, g: Group, pc: int, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Load ``count`` neighbours of ``size`` bytes per lane."""
    total = size * count
    active = addresses if g.bits == FULL else addresses[g.mask]
    pieces = access_global(w, pc, "ld.global", active, total)
    if len(pieces) == 1:
        values = pieces[0][1].views[total][pieces[0][2]]
    else:
        values = np.empty(len(active), UNITS[total])
        for lanes, stretch, index in pieces:
            values[lanes] = stretch.views[total][index]
    return split_columns(g, values, size, count)


def split_columns(g: Group, values: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Loaded units to one array of 32 lanes per register."""
    if g.bits != FULL:
        spread = np.zeros(32, values.dtype)
        spread[g.mask] = values
        values = spread
    if count == 1:
        return [values]
    return list(np.ascontiguousarray(values.view(UNITS[size]).reshape(32, count).T))


def join_columns(g: Group, values: list[np.ndarray], size: int) -> np.ndarray:
    """The registers of active lanes to units of all their bytes."""
    if len(values) == 1:
        joined = values[0]
    else:
        table = np.empty((32, len(values)), UNITS[size])
        for column, value in enumerate(values):
            table[:, column] = value
        joined = table.view(UNITS[size * len(values)])[:, 0]
    return joined if g.bits == FULL else joined[g.mask]


@runtime
def store_global(w: Any, g: Group, pc: int, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
    """Store; of lanes with the same address the highest wins."""
    total = size * len(values)
    active = addresses if g.bits == FULL else addresses[g.mask]
    joined = join_columns(g, values, size)
    for lanes, stretch, index in access_global(w, pc, "st.global", active, total):
        stretch.views[total][index] = joined[lanes]


@runtime
def load_global_one(w: Any, g: Group, pc: int, address: int, size: int, count: int) -> list[int]:
    """The same for lanes that all load from one address."""
    total = size * count
    try:
        stretch = w.engine.memory.find(address, total)
        if address % total:
            raise Fault(f"address 0x{address:x} is not a multiple of the access's {total} bytes")
    except Fault as fault:
        raise w.fault(MemoryFault, pc, str(fault)) from None
    w.engine.trace.add("ld.global", stretch.name, 1, total, 1)
    start = address - stretch.base
    data = stretch.raw[start : start + total].tobytes()
    return [int.from_bytes(data[n * size : n * size + size], "little") for n in range(count)]


@runtime
def load_param(w: Any, offset: int, size: int) -> int:
    """Bytes of the parameters."""
    return int.from_bytes(w.engine.bank[offset : offset + size], "little")


@runtime
def load_param_at(w: Any, g: Group, pc: int, addresses: Any, size: int, count: int) -> list[Any]:
    """The same through an address that the kernel computed, in one integer or in 32 lanes."""
    bank, start, total = w.engine.bank, w.engine.bank_address, size * count
    is_one = not isinstance(addresses, np.ndarray)
    rows = np.zeros((1 if is_one else 32, count), UNITS[size])
    for lane in [0] if is_one else np.flatnonzero(g.mask).tolist():
        address = int(addresses) if is_one else addresses.item(lane)
        offset = address - start
        if not 0 <= offset <= len(bank) - total:
            raise w.fault(MemoryFault, pc, f"{total} bytes at 0x{address:x} lie outside of the parameters")
        if address % total:
            raise w.fault(MemoryFault, pc, f"address 0x{address:x} is not a multiple of the access's {total} bytes")
        rows[lane] = np.frombuffer(bank, UNITS[size], count, offset)
    return rows[0].tolist() if is_one else list(np.ascontiguousarray(rows.T))


# ---------------------------------------------------------------- shared memory


def pattern_of(w: Any, pc: int, addresses: np.ndarray, size: int) -> tuple[SharedMemory, Any, Pattern]:
    """What a set of shared addresses means, checked; with the memory and checker of the block it lies in."""
    engine = w.engine
    key = (addresses.tobytes(), size)
    found = engine.patterns.get(key)
    try:
        if found is None:
            if len(engine.patterns) > 50000:
                engine.patterns.clear()
            found = engine.patterns[key] = Pattern(addresses, size, w.cta.cluster.num_ctas)
            first = int(found.index.min()) * size
            if first < engine.shared_start:
                raise Fault(f"shared offset {first} is below {engine.shared_start}, which belongs to the system")
        cta = w.cta if found.rank == w.cta.rank else w.cta.cluster.ctas[found.rank]
        if found.end > cta.shared.size:
            cta.shared.check_range(found.end - size, size)
    except Fault as fault:
        raise w.fault(MemoryFault, pc, str(fault)) from None
    if cta.finished:
        raise w.fault(MemoryFault, pc, f"access to shared memory of block {cta.index}, which has ended")
    return cta.shared, cta.checker, found


def read_shared(w: Any, pc: int, path: str, active: np.ndarray, total: int) -> np.ndarray:
    """Checked and counted read of one unit per lane."""
    shared, checker, pattern = pattern_of(w, pc, active, total)
    values = shared.views[total][pattern.index]
    w.engine.trace.add_shared(path, len(active) * total, pattern.cycles, pattern.ideal)
    if checker is not None:
        checker.generic_read(w, pc, pattern.granules, pattern.words)
        if (ALL_ONES if total >= 4 else b"\xff") in values.tobytes():
            try:
                shared.check_read(pattern.words)
            except Fault as fault:
                w.read_uninitialised(pc, str(fault))
    return values


def write_shared(w: Any, pc: int, path: str, active: np.ndarray, total: int, joined: np.ndarray) -> None:
    """Checked and counted write of one unit per lane."""
    shared, checker, pattern = pattern_of(w, pc, active, total)
    shared.views[total][pattern.index] = joined
    w.engine.trace.add_shared(path, len(active) * total, pattern.cycles, pattern.ideal)
    if checker is not None:
        data = joined.tobytes()
        if b"\xff" in data and (total < 4 or ALL_ONES in data):
            shared.note_written(pattern.words, ALL_ONES)
        checker.generic_write(w, pc, pattern.granules, pattern.words if total >= 4 else None)


def with_lanes(w: Any, g: Group) -> None:
    """An access by some lanes begins: that of one lane alone is its own. It ends with ``accessor = accesses``."""
    if not g.bits & (g.bits - 1) and w.clock is not None:
        w.accessor = w.access_component(g.bits)


@runtime
def load_shared(w: Any, g: Group, pc: int, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Load from shared memory of any block of the cluster."""
    if g.bits == FULL:
        return split_columns(g, read_shared(w, pc, "ld.shared", addresses, size * count), size, count)
    with_lanes(w, g)
    values = read_shared(w, pc, "ld.shared", addresses[g.mask], size * count)
    w.accessor = w.accesses
    return split_columns(g, values, size, count)


@runtime
def load_shared_one(w: Any, g: Group, pc: int, address: int, size: int, count: int) -> list[int]:
    """The same for lanes that all load from one address."""
    with_lanes(w, g)
    values = read_shared(w, pc, "ld.shared", np.array([address], np.uint32), size * count)
    w.accessor = w.accesses
    return values.view(UNITS[size]).tolist()


@runtime
def store_shared(w: Any, g: Group, pc: int, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
    """Store to shared memory of any block of the cluster."""
    if g.bits == FULL:
        write_shared(w, pc, "st.shared", addresses, size * len(values), join_columns(g, values, size))
        return
    with_lanes(w, g)
    write_shared(w, pc, "st.shared", addresses[g.mask], size * len(values), join_columns(g, values, size))
    w.accessor = w.accesses


@runtime
def load_generic(w: Any, g: Group, pc: int, addresses: Any, size: int, count: int) -> Any:
    """Load from wherever the address points."""
    if isinstance(addresses, int):
        one = load_shared_one if addresses < 1 << 32 else load_global_one
        return one(w, g, pc, addresses, size, count)
    if is_shared(w, g, pc, addresses):
        return load_shared(w, g, pc, addresses.astype(np.uint32), size, count)
    return load_global(w, g, pc, addresses, size, count)


@runtime
def store_generic(w: Any, g: Group, pc: int, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
    """Store to wherever the address points."""
    if is_shared(w, g, pc, addresses):
        store_shared(w, g, pc, addresses.astype(np.uint32), size, values)
    else:
        store_global(w, g, pc, addresses, size, values)


def is_shared(w: Any, g: Group, pc: int, addresses: np.ndarray) -> bool:
    """Whether generic addresses lie in the window of shared memory; they may not be mixed."""
    below = (addresses < np.uint64(1 << 32))[g.mask]
    if below.any() != below.all():
        raise w.fault(MemoryFault, pc, "one access with addresses in shared memory and in global memory")
    return bool(below[0])


# ---------------------------------------------------------------- ld and st


def _split(made: Instruction) -> tuple[str, int, str]:
    """Space, vector length and type of a load or store."""
    space, count = "generic", 1
    for part in made.parts[1:-1]:
        if part in SPACES:
            space = part
        elif part in ("v2", "v4"):
            count = int(part[1])
        elif part not in HINTS:
            raise refuse(made, f"modifier .{part} is not understood")
    kind = made.parts[-1]
    if kind not in ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"):
        raise refuse(made, f"a load or store of type .{kind} is not understood")
    if bits_of(kind) // 8 * count > 16:
        raise refuse(made)
    return space.replace("shared::cta", "shared").replace("shared::cluster", "shared"), count, kind


def _load_rule(made: Instruction, uniform: Callable[[Operand], bool]) -> bool:
    address = made.operands[1]
    return isinstance(address, Addr) and uniform(address)


@emits("ld", scalar=_load_rule)
def emit_ld(e: Emitter, made: Instruction) -> None:
    """Load."""
    space, count, kind = _split(made)
    d, source = made.operands[0], made.operands[1]
    targets = list(d.items) if isinstance(d, Vec) else [d]
    assert isinstance(source, Addr), f"address of {made.where()}"
    size = bits_of(kind) // 8
    if space in ("const", "local"):
        raise refuse(made, f"a load from {space} memory is not simulated")
    if isinstance(source.base, Sym) and source.base.name in e.program.param_offsets:
        offset = e.program.param_offsets[source.base.name] + source.base.offset + source.offset
        texts = [f"load_param(w, {offset + n * size}, {size})" for n in range(count)]
        is_one = True
    else:
        address, is_one = e.address(source, 32 if space == "shared" else 64)
        if space == "param" and not isinstance(source.base, Reg):
            raise refuse(made)
        if space == "shared" and isinstance(source.base, Reg) and source.base.width == 64 and not is_one:
            address = f"{address}.astype(T_u32)"
        function = {"param": "load_param_at", "generic": "load_generic"}.get(space)
        call = function or f"load_{space}" + ("_one" if is_one else "")
        loaded = e.temp(f"{call}(w, {e.group}, {made.pc}, {address}, {size}, {count})")
        texts = [f"{loaded}[{n}]" for n in range(count)]
    for target, text in zip(targets, texts, strict=True):
        if not isinstance(target, Reg):
            continue
        if not is_one:
            e.write(target, f"{text}.view(T_{kind})" if kind[0] == "s" else text, plain(kind).replace("f", "u"))
            continue
        width = bits_of(kind)
        if kind[0] == "s" and target.width > width:
            half = 1 << (width - 1)
            text = f"((({text}) ^ {half}) - {half}) & {MASKS[target.width]}"
        e.write_scalar_or_spread(target, text, f"u{target.width}")


@emits("st")
def emit_st(e: Emitter, made: Instruction) -> None:
    """Store."""
    if made.parts[1] == "async":
        from .instructions_async import emit_store_async

        emit_store_async(e, made)
        return
    space, count, kind = _split(made)
    target, source = made.operands[:2]
    if space in ("const", "local", "param"):
        raise refuse(made, f"a store to {space} memory is not simulated")
    if not isinstance(target, Addr):
        raise refuse(made)
    size = bits_of(kind) // 8
    sources = source.items if isinstance(source, Vec) else (source,)
    if len(sources) != count:
        raise refuse(made)
    values = ", ".join(e.vector(item, f"u{8 * size}", full=True) for item in sources)
    address = vector_address(e, target, 32 if space == "shared" else 64)
    e.line(f"store_{space}(w, {e.group}, {made.pc}, {address}, {size}, [{values}])")


def vector_address(e: Emitter, target: Addr, width: int) -> str:
    """An address in 32 lanes, whatever it is."""
    address, is_one = e.address(target, width)
    if is_one:
        return f"spread({address}, T_u{width})"
    if isinstance(target.base, Reg) and target.base.width != width:
        return f"{address}.astype(T_u{width})"
    return address


# ---------------------------------------------------------------- atomics


def combine(operation: str, old: Any, value: Any, swap: Any) -> Any:
    """New value of an atomic."""
    if operation == "add":
        return old + value
    if operation == "exch":
        return value
    if operation in ("min", "max"):
        return min(old, value) if operation == "min" else max(old, value)
    if operation == "cas":
        return swap if old == value else old
    if operation == "inc":
        return type(old)(0) if old >= value else old + type(old)(1)
    if operation == "dec":
        return value if old == 0 or old > value else old - type(old)(1)
    return {"and": old & value, "or": old | value, "xor": old ^ value}[operation]


@runtime
def atomic(
    w: Any, g: Group, pc: int, operation: str, kind: str, space: str, addresses: np.ndarray, *values: np.ndarray
) -> np.ndarray:
    """Lane after lane; returns what was there."""
    dtype = np.dtype(DTYPES[kind])
    size = dtype.itemsize
    active = addresses[g.mask]
    if space == "generic":
        space = "shared" if is_shared(w, g, pc, addresses) else "global"
    old = np.zeros(32, dtype)
    lanes = np.flatnonzero(g.mask)
    if space == "shared":
        active = active.astype(np.uint32)
        shared, checker, pattern = pattern_of(w, pc, active, size)
        w.engine.trace.add_shared("atom.shared", len(active) * size, pattern.cycles, pattern.ideal)
        pieces: list[tuple[Any, Any, np.ndarray]] = [(slice(None), shared, pattern.index)]
        if checker is not None:
            shared.note_written(pattern.words, ALL_ONES)
            checker.generic_write(w, pc, pattern.granules, None)
    else:
        pieces = access_global(w, pc, "atom.global", active.astype(np.uint64), size)
    with np.errstate(all="ignore"):
        for members, where, index in pieces:
            view = where.views[size].view(dtype)
            for lane, position in zip(lanes[members].tolist(), index.tolist(), strict=True):
                before = view[position]
                old[lane] = before
                view[position] = combine(
                    operation, before, *(value[lane] for value in values), *[None][len(values) - 1 :]
                )
    return old


_SMALL_SUMS = {"f16": ("f16", 2), "bf16": ("bf16", 2), "f16x2": ("f16", 4), "bf16x2": ("bf16", 4), "f32": ("f32", 4)}


@runtime
def add_atomically(
    w: Any, g: Group, pc: int, element: str, addresses: np.ndarray, size: int, values: list[np.ndarray]
) -> list[np.ndarray]:
    """Add vectors, or pairs of small numbers, in global memory, lane after lane; returns what was there."""
    total = size * len(values)
    active = addresses[g.mask]
    bits = np.uint32 if element == "f32" else np.uint16
    rows = join_columns(g, values, size).view(bits).reshape(len(active), -1)
    old = np.zeros_like(rows)
    for lanes, stretch, index in access_global(w, pc, "atom.global", active, total):
        cells = stretch.views[rows.itemsize]
        for lane, place in zip(np.arange(len(active))[lanes].tolist(), index.tolist(), strict=True):
            part = slice(place * rows.shape[1], (place + 1) * rows.shape[1])
            old[lane] = cells[part]
            cells[part] = reduced(element, "add", cells[part], rows[lane])
    return split_columns(g, old.reshape(-1).view(UNITS[total]), size, len(values))


def _emit_small_sums(e: Emitter, made: Instruction, target: Operand, source: Operand, results: list[Operand]) -> bool:
    """Sums of vectors of float32, of fp16 and bf16; false if the instruction is something else."""
    kind = next((part for part in made.parts[1:] if part in _SMALL_SUMS), None)
    vector = next((part for part in made.parts[1:] if part in ("v2", "v4", "v8")), None)
    if kind is None or (kind == "f32" and vector is None):
        return False
    element, size = _SMALL_SUMS[kind]
    sources = source.items if isinstance(source, Vec) else (source,)
    rest = [part for part in made.parts[1:] if part not in (kind, vector) and part not in HINTS]
    operations = ["global", "add"] if kind == "f32" else ["add", "global", "noftz"]
    count = int(vector[1]) if vector else 1
    fits = sorted(rest) == sorted(operations) and len(sources) == count and size * count <= 16
    if not fits or not isinstance(target, Addr) or len(results) not in (0, count):
        raise refuse(made)
    values = ", ".join(e.vector(item, f"u{8 * size}", full=True) for item in sources)
    address = vector_address(e, target, 64)
    old = e.temp(f"add_atomically(w, {e.group}, {made.pc}, {element!r}, {address}, {size}, [{values}])")
    for n, result in enumerate(results):
        e.write(result, f"{old}[{n}]", f"u{8 * size}")
    return True


def _atomic_parts(made: Instruction) -> tuple[str, str, str, int]:
    space, operation, count = "generic", "", 1
    for part in made.parts[1:-1]:
        if part in SPACES:
            space = part
        elif part in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec") and not operation:
            operation = part
        elif part in ("v2", "v4"):
            count = int(part[1])
        elif part not in HINTS:
            raise refuse(made, f"modifier .{part} is not understood")
    kind = plain(made.parts[-1])
    if made.parts[-1] not in ("u32", "s32", "u64", "s64", "b32", "b64", "f32", "f64") or not operation:
        raise refuse(made)
    return operation, kind, space.replace("shared::cta", "shared").replace("shared::cluster", "shared"), count


@emits("atom")
def emit_atom(e: Emitter, made: Instruction) -> None:
    """Read, change and write, without interruption."""
    d, target = made.operands[:2]
    if _emit_small_sums(e, made, target, made.operands[2], list(d.items) if isinstance(d, Vec) else [d]):
        return
    operation, kind, space, count = _atomic_parts(made)
    if count != 1 or not isinstance(target, Addr):
        raise refuse(made)
    number = 2 if operation == "cas" else 1
    values = ", ".join(e.vector(value, kind, full=True) for value in made.operands[2 : 2 + number])
    address = vector_address(e, target, 32 if space == "shared" else 64)
    call = f"atomic(w, {e.group}, {made.pc}, {operation!r}, {kind!r}, {space!r}, {address}, {values})"
    e.write(d, call, kind)


@emits("red")
def emit_red(e: Emitter, made: Instruction) -> None:
    """The same without a result."""
    if "async" in made.parts:
        raise refuse(made)
    target, source = made.operands[:2]
    if _emit_small_sums(e, made, target, source, []):
        return
    operation, kind, space, count = _atomic_parts(made)
    if not isinstance(target, Addr) or count != 1:
        raise refuse(made)
    address = vector_address(e, target, 32 if space == "shared" else 64)
    text = e.vector(source, kind, full=True)
    e.line(f"atomic(w, {e.group}, {made.pc}, {operation!r}, {kind!r}, {space!r}, {address}, {text})")


# ---------------------------------------------------------------- matrices


@runtime
def load_matrix(w: Any, pc: int, addresses: np.ndarray, count: int, transposed: bool) -> np.ndarray:
    """8 x 8 matrices of 16-bit numbers; lane t gets two neighbours of row t // 4 (of column t // 4)."""
    rows = read_shared(w, pc, "ldmatrix", addresses[: 8 * count], 16)
    if not transposed:
        return rows.view(np.uint32).reshape(count, 32)
    numbers = rows.view(np.uint16).reshape(count, 8, 8).transpose(0, 2, 1)
    return np.ascontiguousarray(numbers).reshape(count, 64).view(np.uint32)


@runtime
def store_matrix(w: Any, pc: int, addresses: np.ndarray, transposed: bool, values: list[np.ndarray]) -> None:
    """The reverse."""
    count = len(values)
    table = np.array(values, np.uint32)
    if transposed:
        numbers = table.view(np.uint16).reshape(count, 8, 8).transpose(0, 2, 1)
        table = np.ascontiguousarray(numbers).reshape(count, 64).view(np.uint32)
    rows = table.reshape(-1).view(np.complex128)
    write_shared(w, pc, "stmatrix", addresses[: 8 * count], 16, rows)


@emits("ldmatrix", "stmatrix")
def emit_matrix(e: Emitter, made: Instruction) -> None:
    """Matrices between registers and shared memory."""
    parts = [part for part in made.parts[1:] if part != "trans"]
    fits = len(parts) == 6 and parts[:3] == ["sync", "aligned", "m8n8"] and parts[3] in ("x1", "x2", "x4")
    if not fits or parts[4] not in ("shared", "shared::cta") or parts[5] != "b16" or made.guard is not None:
        raise refuse(made)
    count = int(parts[3][1])
    transposed = "trans" in made.parts
    emit_meeting(e, made)
    is_load = made.parts[0] == "ldmatrix"
    registers, target = made.operands if is_load else made.operands[::-1]
    items = registers.items if isinstance(registers, Vec) else (registers,)
    if not isinstance(target, Addr) or len(items) != count:
        raise refuse(made)
    address = vector_address(e, target, 32)
    if is_load:
        loaded = e.temp(f"load_matrix(w, {made.pc}, {address}, {count}, {transposed})")
        for n, item in enumerate(items):
            e.write(item, f"{loaded}[{n}]", "u32")
    else:
        values = ", ".join(e.vector(item, "u32", full=True) for item in items)
        e.line(f"store_matrix(w, {made.pc}, {address}, {transposed}, [{values}])")
