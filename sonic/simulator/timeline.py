"""A picture of who waited for what, and when: one line for each warp, one colour for each kind of wait.

    with sonic.simulator.hopper("lazy", timeline=True) as sim:
        compiled(*tensors)
    draw_timeline(sim.traces[0], "timeline.png")

The axis counts warp instructions that the whole launch had executed. That is the order in which the simulator ran the
warps, no time of any hardware: a long bar says that others ran meanwhile, not that a GPU would be idle. The count moves
on when a warp's turn ends, so a bar may begin, or end, up to one turn early.

What a `Wait` does not hold is not drawn: which arrival ended it, and the address and parity of an mbarrier where the
instruction takes them from registers. Barriers are told apart by the instruction's line of source (else of PTX).
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SimulatorError
from .trace import Trace, Wait

__all__ = ["OUTSIDE", "RUNS", "Bar", "draw_timeline", "label_of", "timeline_bars", "timeline_figure"]

RUNS = "does not wait: runs, or could"
OUTSIDE = "before the first and after the last wait: begin and end of a warp are not known"
AXIS = "warp instructions executed so far by the whole launch, in the simulator's order (no hardware time)"

MOST_LINES = 256
# Apart from each other for colour-blind readers too (Okabe and Ito); hatched where there are more labels than colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
HATCHES = ("", "////", "....", "xxxx")
GREYS = {RUNS: "#d4d4d4", OUTSIDE: "#f2f2f2"}

# What an instruction waits for, by how it begins; the first that fits holds.
_KINDS = (
    ("mbarrier.", "mbarrier"),
    ("barrier.cluster.", "cluster barrier"),
    ("wgmma.wait_group", "wgmma group"),
    ("cp.async.bulk.wait_group", "bulk group"),
    ("cp.async.wait_", "cp.async group"),
    ("bar.", "named barrier"),
    ("barrier.", "named barrier"),
)
_WHAT = re.compile(r"`(?P<text>.*)` \(PTX line (?P<ptx>\d+)(?:, (?P<file>.*):(?P<line>\d+))?\)", re.DOTALL)


@dataclass(frozen=True)
class Bar:
    """A stretch of one warp's line: ``label`` is what it waits for, `RUNS` or `OUTSIDE`."""

    block: int
    warp: int
    label: str
    start: int
    end: int


def label_of(what: str) -> str:
    """What a wait was for, in few words: its kind, what the instruction itself says of it, and the place.

    Args:
        what: of a `Wait`: the instruction in back quotes, then in brackets its line of PTX and perhaps of source.
    """
    found = _WHAT.fullmatch(what)
    if found is None:
        return what if len(what) <= 60 else what[:57] + "..."
    text = re.sub(r"^@!?%\w+\s+", "", found["text"].strip())  # a guard says nothing about the wait
    kind = next((kind for start, kind in _KINDS if text.startswith(start)), text.split()[0] if text else "?")
    if kind == "mbarrier":
        operands = re.search(r"\[([^\]]*)\]\s*,\s*([^\s,]+)", text)
        if operands is not None:
            address, parity = operands.groups()
            kind += f" at {address.strip()}" * ("%" not in address)
            kind += f" parity {parity}" * (".parity" in text and parity.isdigit())
    elif kind == "named barrier":
        operand = re.match(r"\S+\s+(\d+)", text)
        kind += f" {operand[1]}" if operand is not None else ""
    place = f"{Path(found['file']).name}:{found['line']}" if found["file"] else f"PTX line {found['ptx']}"
    return f"{kind}, {place}"


def timeline_bars(trace: Trace, *, block: int | Sequence[int] = 0) -> list[Bar]:
    """The picture as data: bars of all warps, by block, warp and begin, without gaps from 0 to the launch's end.

    A warp that never waited has a single bar; one that never waited and comes after all that did is not known of.

    Args:
        trace: of a launch under ``hopper(..., timeline=True)``.
        block: number of a block of the grid, or several.
    """
    blocks = [block] if isinstance(block, int) else list(dict.fromkeys(block))
    if not trace.timeline:
        raise ValueError(
            "sonic.simulator.timeline: trace.timeline is empty, expected the waits of a launch with "
            "Options(timeline=True), as in hopper(..., timeline=True)"
        )
    waits: dict[int, dict[int, list[Wait]]] = {number: {} for number in blocks}
    for wait in trace.timeline:
        if wait.block in waits:
            waits[wait.block].setdefault(wait.warp, []).append(wait)
    missing = [number for number in blocks if not waits[number]]
    if missing or not blocks:
        known = sorted({wait.block for wait in trace.timeline})
        few = ", ".join(map(str, known[:20])) + ", ..." * (len(known) > 20)
        raise ValueError(f"sonic.simulator.timeline: block is {block!r}, expected one or some that waited: {few}")
    bars = []
    for number in blocks:
        for warp in range(max(waits[number]) + 1):
            position, outside = 0, OUTSIDE
            for wait in sorted(waits[number].get(warp, []), key=lambda item: (item.start, item.end)):
                if wait.start > position:
                    bars.append(Bar(number, warp, outside, position, wait.start))
                bars.append(Bar(number, warp, label_of(wait.what), max(wait.start, position), max(wait.end, position)))
                position, outside = bars[-1].end, RUNS
            if trace.instructions > position:
                bars.append(Bar(number, warp, OUTSIDE, position, trace.instructions))
    return bars


def timeline_figure(trace: Trace, *, block: int | Sequence[int] = 0) -> Any:
    """The picture as a figure of matplotlib; see `draw_timeline`.

    Its axes hold one collection of rectangles for each label of `timeline_bars`, named as the legend names it.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
        collections = importlib.import_module("matplotlib.collections")
        patches = importlib.import_module("matplotlib.patches")
    except ImportError as error:
        raise SimulatorError(
            "sonic.simulator: a timeline is drawn with matplotlib, which cannot be imported; "
            "try `pip install 'matplotlib>=3.8'`"
        ) from error
    bars = timeline_bars(trace, block=block)
    lines = list(dict.fromkeys((bar.block, bar.warp) for bar in bars))
    if len(lines) > MOST_LINES:
        raise ValueError(
            f"sonic.simulator.timeline: block names blocks of {len(lines)} warps, expected {MOST_LINES} at most"
        )
    names = {line: _name(line, bars, len({block for block, _ in lines}) > 1) for line in lines}
    heights: dict[tuple[int, int], float] = {}
    position, last = 0.0, lines[0]
    for line in lines:  # from top to bottom, with a gap between blocks and between roles
        apart = 0.9 if line[0] != last[0] else 0.45 * (names[line].partition(": ")[2] != names[last].partition(": ")[2])
        position += apart
        heights[line] = position
        position, last = position + 1, line

    labels = sorted({bar.label for bar in bars} - set(GREYS), key=_rank)
    most = max(sum(bar.label in labels for bar in bars if (bar.block, bar.warp) == line) for line in lines)
    width = min(max(11.0, 4 + 0.3 * most), 40.0)
    columns = max(1, int(width // 4))
    rows = -(-(len(labels) + 1) // columns) + 1
    figure = figures.Figure(figsize=(width, 1.3 + 0.3 * position + 0.22 * rows), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles = {label: (colour, "") for label, colour in GREYS.items()}
    for number, label in enumerate(labels):
        styles[label] = (COLOURS[number % len(COLOURS)], HATCHES[number // len(COLOURS) % len(HATCHES)])
    entries = []
    for label in [*labels, RUNS, OUTSIDE]:
        corners = []
        for bar in bars:
            if bar.label == label:
                y, half = heights[bar.block, bar.warp], 0.2 if label in GREYS else 0.38
                low, high = y - half, y + half
                corners.append([(bar.start, low), (bar.end, low), (bar.end, high), (bar.start, high)])
        if not corners:
            continue
        colour, hatch = styles[label]
        # a thin edge, so that what is short can be seen at all; hatches have the colour of the edge
        edge = "white" if hatch else colour
        look = {"facecolor": colour, "edgecolor": edge, "linewidth": 0.3, "hatch": hatch or None}
        axes.add_collection(collections.PolyCollection(corners, label=label, **look))
        entries.append(patches.Patch(label=label, **look))

    waiting = [bar for bar in bars if bar.label not in GREYS]
    first, last_end = min(bar.start for bar in waiting), max(bar.end for bar in waiting)
    margin = max(1, (last_end - first) // 25)
    axes.set_xlim(max(0, first - margin), last_end + margin)
    axes.set_ylim(position - 0.35, -0.65)
    axes.set_yticks([heights[line] for line in lines], [names[line] for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(AXIS)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    told = ", ".join(f"block {number}" for number in dict.fromkeys(bar.block for bar in bars))
    name = trace.name if len(trace.name) <= 60 else trace.name[:57] + "..."
    title = f"Who waits for what: {f'{name}, ' if name else ''}{told if len(told) <= 60 else told[:57] + '...'}"
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(handles=entries, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
    return figure


def draw_timeline(trace: Trace, path: str | os.PathLike[str], *, block: int | Sequence[int] = 0) -> None:
    """Write a PNG with a line for each warp: what it waited for, and when, in executed warp instructions.

    Needs matplotlib. The picture is written beside its place and renamed, so that readers see all of it or nothing.

    Args:
        trace: of a launch under ``hopper(..., timeline=True)``.
        path: of the picture, ``*.png``; its folder is made.
        block: number of a block of the grid, or several, which are drawn one under the other.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"sonic.simulator.timeline: path is {str(target)!r}, expected a file name that ends with .png")
    figure = timeline_figure(trace, block=block)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".timeline") as folder:
        part = Path(folder) / target.name
        figure.savefig(part, format="png")
        os.replace(part, target)


def _name(line: tuple[int, int], bars: Sequence[Bar], with_block: bool) -> str:
    """Name of a warp's line, with its role as far as its waits tell: a warpgroup multiplies as a whole."""
    block, warp = line
    roles = []
    if any(bar.block == block and bar.warp // 4 == warp // 4 and bar.label.startswith("wgmma") for bar in bars):
        roles.append("multiplies")
    if any((bar.block, bar.warp) == line and bar.label.startswith("bulk group") for bar in bars):
        roles.append("stores")
    prefix = f"block {block}, " if with_block else ""
    return f"{prefix}warp {warp}" + (": " + ", ".join(roles) if roles else "")


def _rank(label: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Order of labels: by kind, then by text with its numbers as numbers."""
    kinds = list(dict.fromkeys(kind for _, kind in _KINDS))
    number = next((place for place, kind in enumerate(kinds) if label.startswith(kind)), len(kinds))
    parts = [part for part in re.split(r"(\d+)", label) if part]
    return number, [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
