"""The picture of a sweep."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sonic.planner.search import SweepPoint

__all__ = ["draw_sweep", "sweep_figure"]

# Apart from each other for colour-blind readers too (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_MARKERS = ("o", "s", "^", "D", "v")


def sweep_figure(points: Sequence[SweepPoint]) -> Any:
    """Tokens/s per GPU of each wiring over the number of GPUs, beside the gain over the first wiring.

    Raises:
        ImportError: matplotlib cannot be imported.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "sonic.planner: a sweep is drawn with matplotlib, which cannot be imported; "
            "try `pip install 'matplotlib>=3.8'`"
        ) from error
    figure = figures.Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    wirings = list(dict.fromkeys(point.wiring for point in points))
    found = {(point.gpus, point.wiring): point.plan for point in points if point.plan is not None}
    for number, wiring in enumerate(wirings):
        style = {
            "color": _COLOURS[number % 5],
            "marker": _MARKERS[number % 5],
            "markersize": 6 - number,
            "label": wiring,
        }
        style |= {"linestyle": ("-", "--", ":", "-.", "-")[number % 5]}  # lines that lie on each other stay apart
        counts = [gpus for gpus, name in found if name == wiring]
        rates = {gpus: found[gpus, wiring].tokens_per_second for gpus in counts}
        left.plot(counts, [rates[gpus] / gpus for gpus in counts], **style)
        both = [gpus for gpus in counts if (gpus, wirings[0]) in found]
        if number:
            right.plot(both, [rates[gpus] / found[gpus, wirings[0]].tokens_per_second for gpus in both], **style)
    setup = next((plan.setup for plan in found.values()), None)
    if setup is not None:
        figure.suptitle(
            f"Planned, not measured: {setup.model.name} on {setup.machine.name}, ep {setup.ep}, tp {setup.tp}, "
            f"{setup.micro_batch} x {setup.sequence} tokens on each rank that has its own"
        )
    left.set_ylabel("tokens/s per GPU")
    right.set_ylabel(f"speed-up over {wirings[0]}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs")
        ticks = sorted({point.gpus for point in points})
        axes.set_xticks(ticks, [f"{gpus:,}" for gpus in ticks], rotation=45, ha="right")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(0, 1.08 * left.get_ylim()[1])
    right.set_ylim(bottom=min(1.0, right.get_ylim()[0]))
    left.legend(frameon=False)
    return figure


def draw_sweep(points: Sequence[SweepPoint], path: Path) -> None:
    """Write the picture beside its place and rename it, so that readers see all of it or nothing.

    Raises:
        ImportError: matplotlib cannot be imported.
    """
    figure = sweep_figure(points)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(part)
    os.replace(part, path)
