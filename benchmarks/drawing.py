"""What the simulated benchmarks show with optional packages: tables by rich, pictures by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "new_figure", "polish", "save_figure", "show"]

# Apart from each other for colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def show(section: Section) -> None:
    """Print a section as a table with rules; as plain columns where rich is not installed."""
    if importlib.util.find_spec("rich") is None:
        print("\n" + section.text(), flush=True)
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(section.title), title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for number, head in enumerate(section.head):
        table.add_column(escape(head), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in section.rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console = Console(highlight=False, width=160)
    console.print(table)
    for note in section.notes:
        console.print(f"  {note}", markup=False)


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own, drawn by Agg: no window, no global state; sizes in inches, axes row by row."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def polish(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture, and say where."""
    figure.savefig(path)
    print(f"wrote {path}")
