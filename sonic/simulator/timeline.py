"""A picture of who waited for whom: a line for each warp, a colour for each stage of a pipeline, links to who ended it.

    with sonic.simulator.hopper("lazy", timeline=True) as sim:
        compiled(*tensors)
    draw_timeline(sim.traces[0], "timeline.png")

The axis counts warp instructions that the whole launch had executed. That is the order in which the simulator ran the
warps, no time of any hardware: a long bar says that others ran meanwhile, not that a GPU would be idle. A straight run
of instructions counts as a whole, so a bar may begin, or end, up to one such run late.

Below the warps of a block are lines for the asynchronous work that ended waits, such as ``TMA load``: from its issue to
where it was performed. A link leads from the line of who ended a wait, with a dot, to the waiting warp. Only waits that
stopped a warp are known: what was there already when it asked is not.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import SimulatorError
from .trace import Trace, Wait

__all__ = [
    "OUTSIDE",
    "RUNS",
    "Bar",
    "Link",
    "draw_timeline",
    "label_of",
    "timeline_bars",
    "timeline_figure",
    "timeline_links",
]

RUNS = "does not wait: runs, or could"
OUTSIDE = "before its first or after its last wait"
ENDED = "dot: who ended the wait that the line leads to"
ENDED_OUTSIDE = "ended from a block that is not shown"
AXIS = "warp instructions executed so far by the whole launch, in the simulator's order (no hardware time)"

MOST_LINES = 256
# Apart from each other for colour-blind readers too (Okabe and Ito); hatched where there are more labels than colours.
COLOURS = ("#d55e00", "#000000", "#cc79a7", "#8c564b", "#0072b2", "#e69f00", "#56b4e9")
HATCHES = ("", "////", "....", "xxxx")
# Stages of a pipeline have an order, so their colours have one too, from dark to light.
STAGES = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
FLIGHT = "#606060"  # work between issue and end
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
_LOADS = ("TMA load", "bulk load", "cp.async arrival", "cp.async group")
Line = tuple[int, "int | str"]  # block, and number of a warp or name of asynchronous work
_WHAT = re.compile(r"`(?P<text>.*)` \(PTX line (?P<ptx>\d+)(?:, (?P<file>.*):(?P<line>\d+))?\)", re.DOTALL)


@dataclass(frozen=True)
class Bar:
    """A stretch of one warp's line: ``label`` is what it waits for, `RUNS` or `OUTSIDE`; ``wait`` tells the rest."""

    block: int
    warp: int
    label: str
    start: int
    end: int
    wait: Wait | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Link:
    """Who ended a wait of a warp: another line of the picture, at a moment.

    Attributes:
        block: of the waiting warp.
        warp: that waited.
        at: when the wait was ended.
        ender_block: of the warp that ended it, or that had issued the work that did.
        ender: number of that warp, or the name of the work, such as ``TMA load``.
        issuer: number of the warp that issued the work, or that ended the wait itself.
        issued: when the work was issued, ``None`` for a warp.
        label: of the wait.
    """

    block: int
    warp: int
    at: int
    ender_block: int
    ender: int | str
    issuer: int
    issued: int | None
    label: str


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


def labels_of(waits: Sequence[Wait]) -> dict[int, str]:
    """A name for each wait, by ``id``; a barrier has one, wherever it is waited for, and a ring of barriers one place.

    Args:
        waits: all that may be told apart, as in ``trace.timeline``.
    """
    names: dict[int, str] = {}
    places: dict[tuple[str, int], list[str]] = {}
    of_barriers: list[tuple[Wait, tuple[str, int]]] = []
    for wait in waits:
        name = names[id(wait)] = label_of(wait.what)
        found, _, place = name.rpartition(", ")
        for kind in ("mbarrier", "named barrier"):
            if found.startswith(kind) and wait.barrier is not None:
                key = (kind, wait.barrier if wait.ring is None else wait.ring)
                of_barriers.append((wait, key))
                if place not in places.setdefault(key, []):
                    places[key].append(place)
    for wait, key in of_barriers:
        stage = f" stage {wait.stage} of {wait.num_stages}" if wait.stage is not None else ""
        others = " and others" if len(places[key]) > 1 else ""
        names[id(wait)] = f"{key[0]} {wait.barrier}{stage}, {places[key][0]}{others}"
    return names


def timeline_bars(trace: Trace, *, block: int | Sequence[int] = 0) -> list[Bar]:
    """The picture as data: bars of all warps, by block, warp and begin, without gaps from 0 to the launch's end.

    A warp that never waited has a single bar; one that comes after all that waited, or ended a wait, is not known of.

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
    names = labels_of(trace.timeline)
    bars = []
    for number in blocks:
        enders = [wait.ended_by for wait in trace.timeline if wait.ended_by is not None]
        for warp in range(max([*waits[number], *(ender.warp for ender in enders if ender.block == number)]) + 1):
            position, outside = 0, OUTSIDE
            for wait in sorted(waits[number].get(warp, []), key=lambda item: (item.start, item.end)):
                if wait.start > position:
                    bars.append(Bar(number, warp, outside, position, wait.start))
                begin, end = max(wait.start, position), max(wait.end, position)
                bars.append(Bar(number, warp, names[id(wait)], begin, end, wait))
                position, outside = bars[-1].end, RUNS
            if trace.instructions > position:
                bars.append(Bar(number, warp, OUTSIDE, position, trace.instructions))
    return bars


def timeline_links(trace: Trace, *, block: int | Sequence[int] = 0) -> list[Link]:
    """Who ended the waits of some blocks, in the order in which they ended; enders may be in other blocks.

    Args:
        trace: of a launch under ``hopper(..., timeline=True)``.
        block: number of a block of the grid, or several: those that waited.
    """
    blocks = {block} if isinstance(block, int) else set(block)
    names = labels_of(trace.timeline)
    return [
        Link(
            block=wait.block,
            warp=wait.warp,
            at=wait.end,
            ender_block=wait.ended_by.block,
            ender=wait.ended_by.work or wait.ended_by.warp,
            issuer=wait.ended_by.warp,
            issued=wait.ended_by.issued,
            label=names[id(wait)],
        )
        for wait in trace.timeline
        if wait.block in blocks and wait.ended_by is not None
    ]


def timeline_figure(trace: Trace, *, block: int | Sequence[int] = 0) -> Any:
    """The picture as a figure of matplotlib; see `draw_timeline`.

    Its axes hold one collection of rectangles for each label of `timeline_bars`, named as the legend names it.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise SimulatorError(
            "sonic.simulator: a timeline is drawn with matplotlib, which cannot be imported; "
            "try `pip install 'matplotlib>=3.8'`"
        ) from error
    bars, links = timeline_bars(trace, block=block), timeline_links(trace, block=block)
    heights, names = _lines(bars, links)
    labels = sorted({bar.label for bar in bars} - set(GREYS), key=_rank)
    styles = _styles(labels, bars)
    position = max(heights.values()) + 1
    lines = list(dict.fromkeys((bar.block, bar.warp) for bar in bars))
    most = max(sum(bar.label in labels for bar in bars if (bar.block, bar.warp) == line) for line in lines)
    width = min(max(11.0, 4 + 0.3 * most), 40.0)
    columns = max(1, int(width // 4))
    rows = -(-(len(labels) + 4) // columns) + 1
    figure = figures.Figure(figsize=(width, 1.3 + 0.3 * position + 0.22 * rows), dpi=150, layout="constrained")
    axes = figure.subplots()

    waiting = [bar for bar in bars if bar.label not in GREYS]
    first, last_end = min(bar.start for bar in waiting), max(bar.end for bar in waiting)
    margin = max(1, (last_end - first) // 25)
    axes.set_xlim(max(0, first - margin), last_end + margin)
    axes.set_ylim(position - 0.35, -0.65)
    entries = _draw_bars(axes, bars, [*labels, RUNS, OUTSIDE], heights, styles)
    entries += _draw_links(axes, links, heights, styles)
    _write_stages(axes, bars, heights, styles, (last_end - first + 2 * margin) / (width - 2.5))
    axes.set_yticks(list(heights.values()), [names[line] for line in heights])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(AXIS)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    told = ", ".join(f"block {number}" for number in dict.fromkeys(bar.block for bar in bars))
    name = trace.name if len(trace.name) <= 60 else trace.name[:57] + "..."
    title = f"Who waits for whom: {f'{name}, ' if name else ''}{told if len(told) <= 60 else told[:57] + '...'}"
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(handles=entries, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
    return figure


def _lines(bars: Sequence[Bar], links: Sequence[Link]) -> tuple[dict[Line, float], dict[Line, str]]:
    """Height and name of each line, from top to bottom: for each block its warps, then the work that ended waits."""
    warps = list(dict.fromkeys((bar.block, bar.warp) for bar in bars))
    blocks = list(dict.fromkeys(block for block, _ in warps))
    if len(warps) > MOST_LINES:
        raise ValueError(
            f"sonic.simulator.timeline: block is {blocks}, blocks of {len(warps)} warps together, "
            f"expected {MOST_LINES} at most"
        )
    lines: list[Line] = []
    for number in blocks:
        lines += [line for line in warps if line[0] == number]
        works = {link.ender for link in links if link.ender_block == number and isinstance(link.ender, str)}
        lines += [(number, work) for work in sorted(works)]
    names: dict[Line, str] = {}
    for block, who in lines:
        prefix = f"block {block}, " if len(blocks) > 1 else ""
        names[block, who] = prefix + (who if isinstance(who, str) else f"warp {who}{_role((block, who), bars, links)}")
    heights: dict[Line, float] = {}
    position, last = 0.0, lines[0]
    for line in lines:  # with a gap between blocks and between roles
        differs = names[line].partition(": ")[2] != names[last].partition(": ")[2] or type(line[1]) is not type(last[1])
        position += 0.9 if line[0] != last[0] else 0.45 * differs
        heights[line] = position
        position, last = position + 1, line
    return heights, names


def _styles(labels: Sequence[str], bars: Sequence[Bar]) -> dict[str, tuple[str, str]]:
    """Colour and hatch of each label: stages by their number, with a hatch for each ring; else one by one."""
    staged = {
        bar.label: (bar.wait.ring, bar.wait.stage, bar.wait.num_stages or 1)
        for bar in bars
        if bar.wait is not None and bar.wait.ring is not None and bar.wait.stage is not None
    }
    rings = sorted({ring for ring, _, _ in staged.values()})
    styles = {label: (colour, "") for label, colour in GREYS.items()}
    plain = [label for label in labels if label not in staged]
    for number, label in enumerate(plain):
        styles[label] = (COLOURS[number % len(COLOURS)], HATCHES[number // len(COLOURS) % len(HATCHES)])
    for label, (ring, stage, num_stages) in staged.items():
        styles[label] = (_stage_colour(stage, num_stages), HATCHES[rings.index(ring) % len(HATCHES)])
    return styles


def _stage_colour(stage: int, num_stages: int) -> str:
    """A colour between those of `STAGES`, the first for stage 0, the last for the last stage."""
    position = stage / max(1, num_stages - 1) * (len(STAGES) - 1)
    left = min(int(position), len(STAGES) - 2)
    pair = [[int(STAGES[left + n][place : place + 2], 16) for place in (1, 3, 5)] for n in (0, 1)]
    mixed = [round(a + (b - a) * (position - left)) for a, b in zip(*pair, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _draw_bars(
    axes: Any,
    bars: Sequence[Bar],
    labels: Sequence[str],
    heights: Mapping[Line, float],
    styles: Mapping[str, tuple[str, str]],
) -> list[Any]:
    """Rectangles, one collection for each label; returns the legend's entries."""
    collections = importlib.import_module("matplotlib.collections")
    patches = importlib.import_module("matplotlib.patches")
    entries = []
    for label in labels:
        corners = []
        for bar in bars:
            if bar.label == label:
                y, half = heights[bar.block, bar.warp], 0.2 if label in GREYS else 0.38
                corners.append(_rectangle(bar.start, bar.end, y, half))
        if not corners:
            continue
        colour, hatch = styles[label]
        # a thin edge, so that what is short can be seen at all; hatches have the colour of the edge
        edge = "white" if hatch else colour
        look = {"facecolor": colour, "edgecolor": edge, "linewidth": 0.3, "hatch": hatch or None}
        axes.add_collection(collections.PolyCollection(corners, label=label, **look))
        entries.append(patches.Patch(label=label, **look))
    return entries


def _rectangle(start: float, end: float, y: float, half: float) -> list[tuple[float, float]]:
    return [(start, y - half), (end, y - half), (end, y + half), (start, y + half)]


def _draw_links(
    axes: Any, links: Sequence[Link], heights: Mapping[Line, float], styles: Mapping[str, tuple[str, str]]
) -> list[Any]:
    """Work in flight, and who ended what; returns the legend's entries."""
    collections = importlib.import_module("matplotlib.collections")
    lines = importlib.import_module("matplotlib.lines")
    segments, colours, dots, ends, outside = [], [], [], [], []
    flights: dict[tuple[int, int, float], None] = {}  # in their order, each once
    for link in links:
        colour = styles[link.label][0]
        y, source = heights[link.block, link.warp], heights.get((link.ender_block, link.ender))
        if source is None:
            outside.append((link.at, y))
            continue
        if link.issued is not None:
            flights[link.issued, link.at, source] = None
        towards = 0.38 if source > y else -0.38
        segments.append([(link.at, source), (link.at, y + (towards if source != y else 0))])
        ends.append((link.at, y + towards, "^" if source > y else "v"))
        colours.append(colour)
        dots.append((link.at, source))
    if flights:
        corners = [_rectangle(issued, at, source, 0.12) for issued, at, source in flights]
        # several may be in flight at a time: all of them are to be seen
        axes.add_collection(collections.PolyCollection(corners, facecolor=FLIGHT, alpha=0.3, linewidth=0, zorder=1.5))
    entries = []
    if segments:
        axes.add_collection(collections.LineCollection(segments, colors=colours, linewidths=0.8, zorder=3))
        look = {"edgecolors": "white", "linewidths": 0.4}
        axes.scatter(*zip(*dots, strict=True), s=16, color=colours, zorder=4, **look)
        for shape in "^v":
            chosen = [n for n, end in enumerate(ends) if end[2] == shape]
            places = [ends[n][:2] for n in chosen]
            if places:
                kept = [colours[n] for n in chosen]
                axes.scatter(*zip(*places, strict=True), s=9, marker=shape, color=kept, zorder=4, linewidths=0)
        entries.append(lines.Line2D([], [], color="black", marker="o", markevery=[0], linewidth=0.8, label=ENDED))
    if outside:
        look = {"marker": "x", "color": "black", "zorder": 4}
        axes.scatter(*zip(*outside, strict=True), s=14, linewidths=0.8, **look)
        entries.append(lines.Line2D([], [], linestyle="", markersize=4, label=ENDED_OUTSIDE, **look))
    return entries


def _write_stages(
    axes: Any,
    bars: Sequence[Bar],
    heights: Mapping[Line, float],
    styles: Mapping[str, tuple[str, str]],
    per_inch: float,
) -> None:
    """The number of the stage in each bar that is wide enough for it."""
    for bar in bars:
        if bar.wait is None or bar.wait.stage is None or bar.end - bar.start < 0.13 * per_inch:
            continue
        colour = styles[bar.label][0]
        light = sum(int(colour[place : place + 2], 16) * weight for place, weight in ((1, 3), (3, 6), (5, 1))) > 1500
        place = ((bar.start + bar.end) / 2, heights[bar.block, bar.warp])
        box = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"}
        text = axes.text(*place, str(bar.wait.stage), ha="center", va="center", fontsize=7, zorder=5, clip_on=True)
        text.set(color="black" if light else "white", bbox=box)


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


def _role(line: Line, bars: Sequence[Bar], links: Sequence[Link]) -> str:
    """The role of a warp as far as waits tell: who issued loads that ended some, a warpgroup that multiplies."""
    block, warp = line
    roles = []
    if any((link.ender_block, link.issuer) == line and link.ender in _LOADS for link in links):
        roles.append("loads")
    team = int(warp) // 4
    if any(bar.block == block and bar.warp // 4 == team and bar.label.startswith("wgmma") for bar in bars):
        roles.append("multiplies")
    if any((bar.block, bar.warp) == line and bar.label.startswith("bulk group") for bar in bars):
        roles.append("stores")
    return ": " + ", ".join(roles) if roles else ""


def _rank(label: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Order of labels: by kind, then by text with its numbers as numbers."""
    kinds = list(dict.fromkeys(kind for _, kind in _KINDS))
    number = next((place for place, kind in enumerate(kinds) if label.startswith(kind)), len(kinds))
    parts = [part for part in re.split(r"(\d+)", label) if part]
    return number, [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
