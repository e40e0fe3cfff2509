"""The picture of an :class:`sonic.parallel.overlap_report.OverlapReport`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sonic.parallel.overlap_report import Collective

__all__ = ["draw_timeline"]

_HIDDEN, _EXPOSED, _COMPUTE = "#009e73", "#d55e00", "#d7dce3"  # apart for colour-blind readers too


def draw_timeline(collectives: Sequence[Collective], elapsed: float, path: str) -> None:
    """Two lanes over time: the program, which computes or stands still, and the link, whose work is hidden or exposed.

    Args:
        collectives: at least one.
        elapsed: seconds of the whole.
        path: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = min(one.issued for one in collectives)
    scale, unit = (1e3, "ms") if elapsed - first > 2e-3 else (1e6, "µs")
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots()
    end = max(elapsed, max(one.wait_ended for one in collectives))
    axes.broken_barh([(0, end * scale)], (0.62, 0.76), facecolors=_COMPUTE)
    waits = [(one.wait_began * scale, one.exposed * scale) for one in collectives if one.exposed > 0]
    axes.broken_barh(waits, (0.62, 0.76), facecolors=_EXPOSED)
    for one in collectives:
        hidden_until = min(max(one.wait_began, one.started), one.done) if one.exposed > 0 else one.done
        axes.broken_barh(
            [(one.started * scale, (hidden_until - one.started) * scale)], (-0.38, 0.76), facecolors=_HIDDEN
        )
        axes.broken_barh(
            [(hidden_until * scale, (one.done - hidden_until) * scale)], (-0.38, 0.76), facecolors=_EXPOSED
        )
        axes.plot([one.started * scale] * 2, (-0.38, 0.38), color="white", linewidth=0.8)
    backward = [one.issued for one in collectives if one.phase == "backward"]
    if backward:
        axes.axvline(min(backward) * scale, color="#555555", linewidth=0.8, linestyle=":")
        axes.text(min(backward) * scale, 1.5, " backward", fontsize=8, color="#555555")
    _name_bars(axes, collectives, scale, end * scale)
    axes.set_yticks((1, 0), ("computation", "link"))
    axes.set_ylim(-0.75, 1.8)
    axes.set_xlim(0, end * scale)
    axes.set_xlabel(f"time, {unit}")
    hidden, duration = sum(one.hidden for one in collectives), sum(one.duration for one in collectives)
    axes.set_title(
        f"{len(collectives)} collectives, {duration * scale:.3g} {unit} on the link, "
        f"{hidden / duration if duration else 0:.0%} hidden",
        fontsize=10,
        loc="left",
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(
        handles=[
            Patch(color=_COMPUTE, label="computing"),
            Patch(color=_HIDDEN, label="hidden"),
            Patch(color=_EXPOSED, label="waiting, exposed"),
        ],
        loc="upper right",
        bbox_to_anchor=(1, 1.18),
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def _name_bars(axes: Axes, collectives: Sequence[Collective], scale: float, width: float) -> None:
    """The kind, in bars that are wide enough for it."""
    for one in collectives:
        if one.duration * scale > width * (0.0045 * len(one.kind) + 0.004):
            middle = (one.started + one.done) / 2 * scale
            axes.text(middle, 0, one.kind, ha="center", va="center", fontsize=6.5, color="white")
