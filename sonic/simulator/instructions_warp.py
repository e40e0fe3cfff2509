"""Instructions by which the lanes of a warp exchange values: shuffles, votes, elections."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .instructions_common import RUNTIME, Emitter, emits, refuse, runtime
from .instructions_control import FULL, Group, bits_from, emit_meeting, lanes_of
from .ptx import Imm, Instruction, Operand, Pair, Reg

LANE = np.arange(32, dtype=np.int64)
ONE_HOT = [lanes_of(1 << lane) for lane in range(32)]


# ---------------------------------------------------------------- shuffles


def shuffle_lanes(mode: str, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """Source lane of each lane, and whether it lies in the allowed range."""
    distance = np.asarray(b, np.int64) & 31
    clamp, segment = np.asarray(c, np.int64) & 31, np.asarray(c, np.int64) >> 8 & 31
    highest = (LANE & segment) | (clamp & ~segment)
    if mode == "up":
        source = LANE - distance
        inside = source >= highest
    elif mode == "down":
        source = LANE + distance
        inside = source <= highest
    elif mode == "bfly":
        source = LANE ^ distance
        inside = source <= highest
    else:
        source = (LANE & segment) | (distance & ~segment)
        inside = source <= highest
    return np.where(inside, source, LANE), inside


@functools.cache
def _constant_lanes(mode: str, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    return shuffle_lanes(mode, b, c)


@runtime
def shuffle(value: np.ndarray, mode: str, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values of other lanes, and where they lay in range."""
    if isinstance(b, int) and isinstance(c, int):
        source, inside = _constant_lanes(mode, b & 31, c)
    else:
        source, inside = shuffle_lanes(mode, b, c)
    return value[source], inside


def _is_broadcast(made: Instruction, uniform: Any) -> bool:
    _, a, b, c, _ = made.operands
    if made.parts[2] == "idx" and c == Imm(31) and uniform(b):
        return True
    return uniform(a)


@emits("shfl", scalar=lambda made, uniform: len(made.operands) == 5 and _is_broadcast(made, uniform))
def emit_shfl(e: Emitter, made: Instruction) -> None:
    """Read another lane's register."""
    if len(made.parts) != 4 or made.parts[1] != "sync" or made.parts[3] != "b32":
        raise refuse(made)
    mode = made.parts[2]
    if mode not in ("up", "down", "bfly", "idx") or len(made.operands) != 5:
        raise refuse(made)
    d, a, b, c, member = made.operands
    emit_meeting(e, made, e.scalar(member) if e.is_uniform(member) else str(FULL))
    inside: Operand | None = None
    if isinstance(d, Pair):
        inside = d.second
        d = d.first
    if e.is_scalar_result(d) and inside is None:
        if e.is_uniform(a):
            e.write(d, e.scalar(a), "u32")
        else:
            e.write(d, f"{e.vector(a, 'u32')}.item({e.scalar(b)} & 31)", "u32")
        return
    kind = "u32"
    if isinstance(a, Reg) and not e.is_uniform(a):
        kind = e.program.canonical[a.index]
    x = e.vector(a, kind, full=True)
    amount = e.scalar(b) if e.is_uniform(b) else e.vector(b, "u32")
    clamp = e.scalar(c) if e.is_uniform(c) else e.vector(c, "u32")
    name = e.temp(f"shuffle({x}, {mode!r}, {amount}, {clamp})")
    if e.is_scalar_result(d):
        e.write(d, f"{name}[0].item(0)", "u32")
    else:
        e.write(d, f"{name}[0]", kind)
    if isinstance(inside, Reg):
        e.write(inside, f"{name}[1]", "b1")


# ---------------------------------------------------------------- votes


@runtime
def vote(g: Group, kind: str, mask: int, p: Any) -> Any:
    """Bits of the lanes that say yes, or what they agree on."""
    voters = mask & g.bits
    yes = bits_from(p) & voters if isinstance(p, np.ndarray) else (voters if p else 0)
    if kind == "ballot":
        return yes
    if kind == "all":
        return yes == voters
    if kind == "any":
        return yes != 0
    return yes in (0, voters)


@emits(
    "vote", scalar=lambda made, uniform: made.parts[2] in ("ballot", "all", "any", "uni") and uniform(made.operands[2])
)
def emit_vote(e: Emitter, made: Instruction) -> None:
    """Votes of the lanes."""
    if made.parts[1:] not in (["sync", "ballot", "b32"], *(["sync", kind, "pred"] for kind in ("all", "any", "uni"))):
        raise refuse(made)
    d, a, member = made.operands
    if not e.is_uniform(member):
        raise refuse(made, "a vote whose mask differs between lanes is not simulated")
    emit_meeting(e, made, e.scalar(member))
    p = e.scalar(a, 1) if e.is_uniform(a) else e.vector(a, "b1")
    kind = "u32" if made.parts[2] == "ballot" else "b1"
    e.write_scalar_or_spread(d, f"vote(g, {made.parts[2]!r}, {e.scalar(member)}, {p})", kind)


@runtime
def elect(g: Group, mask: int) -> int:
    """The lane that is elected: the lowest."""
    voters = mask & g.bits
    return (voters & -voters).bit_length() - 1


@emits("elect", scalar=lambda made, uniform: uniform(made.operands[1]))
def emit_elect(e: Emitter, made: Instruction) -> None:
    """Choose one lane."""
    if made.parts[1:] != ["sync"]:
        raise refuse(made)
    d, member = made.operands
    if not isinstance(d, Pair) or not e.is_uniform(member):
        raise refuse(made)
    emit_meeting(e, made, e.scalar(member))
    lane = e.temp(f"elect(g, {e.scalar(member)})")
    if isinstance(d.first, Reg):
        e.write_scalar_or_spread(d.first, lane, "u32")
    e.write(d.second, f"ONE_HOT[{lane}]", "b1")


@emits("activemask", scalar=lambda made, uniform: True)
def emit_activemask(e: Emitter, made: Instruction) -> None:
    """Lanes that run together."""
    if made.parts[1:] != ["b32"]:
        raise refuse(made)
    e.write_scalar_or_spread(made.operands[0], "g.bits", "u32")


@runtime
def match_any(g: Group, value: np.ndarray, mask: int) -> np.ndarray:
    """For each lane the lanes that hold the same value."""
    voters = lanes_of(mask & g.bits)
    same = (value[:, None] == value[None, :]) & voters[None, :]
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return (same * weights).sum(axis=1, dtype=np.uint32)


@runtime
def match_all(g: Group, value: np.ndarray, mask: int) -> int:
    """The lanes that vote if all of them hold the same value, else none."""
    voters = mask & g.bits
    chosen = value[lanes_of(voters)]
    return voters if (chosen == chosen[0]).all() else 0


@emits("match")
def emit_match(e: Emitter, made: Instruction) -> None:
    """Lanes with equal values."""
    if made.parts[1] not in ("any", "all") or made.parts[2:] not in (["sync", "b32"], ["sync", "b64"]):
        raise refuse(made)
    d, a, member = made.operands
    if not e.is_uniform(member):
        raise refuse(made)
    emit_meeting(e, made, e.scalar(member))
    width = made.parts[3][1:]
    if made.parts[1] == "all":
        found = e.temp(f"match_all(g, {e.vector(a, f'u{width}', full=True)}, {e.scalar(member)})")
        e.write_scalar_or_spread(d.first if isinstance(d, Pair) else d, found, "u32")
        if isinstance(d, Pair):
            e.write_scalar_or_spread(d.second, f"{found} != 0", "b1")
        return
    e.write(d, f"match_any(g, {e.vector(a, f'u{width}', full=True)}, {e.scalar(member)})", "u32")


@runtime
def reduce_lanes(g: Group, value: np.ndarray, operation: str, mask: int) -> int:
    """Reduction over lanes; the result is unsigned bits."""
    chosen = value[lanes_of(mask & g.bits)].tolist()
    result = chosen[0]
    for other in chosen[1:]:
        if operation == "add":
            result += other
        elif operation in ("min", "max"):
            result = min(result, other) if operation == "min" else max(result, other)
        elif operation == "and":
            result &= other
        elif operation == "or":
            result |= other
        else:
            result ^= other
    return result & 0xFFFFFFFF


@emits("redux", scalar=lambda made, uniform: uniform(made.operands[2]))
def emit_redux(e: Emitter, made: Instruction) -> None:
    """Reduction over lanes."""
    operation, kind = made.parts[2], made.parts[-1]
    if made.parts[1] != "sync" or len(made.parts) != 4 or kind not in ("u32", "s32", "b32"):
        raise refuse(made)
    if operation not in ("add", "min", "max", "and", "or", "xor"):
        raise refuse(made)
    d, a, member = made.operands
    emit_meeting(e, made, e.scalar(member))
    kind = "s32" if kind == "s32" else "u32"
    text = f"reduce_lanes(g, {e.vector(a, kind, full=True)}, {operation!r}, {e.scalar(member)})"
    e.write_scalar_or_spread(d, text, "u32")


RUNTIME["ONE_HOT"] = ONE_HOT
