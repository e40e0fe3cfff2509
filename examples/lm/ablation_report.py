"""The report of the routing ablation: tables, three pictures, and every figure in one JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import sonic
from examples.lm.ablation import BASELINE, RunResult, summarise
from examples.lm.checkpoint import write_whole
from examples.lm.report import new_figure, polish, running_mean

Summary = dict[str, dict[str, Any]]
Log = list[dict[str, Any]]

# One colour per routing in every picture; the tile ratios of nearest rounding share its colour, in another line.
COLOURS = {
    BASELINE: "#222222",
    **{"nearest": "#332288", "nearest_ratio_1": "#332288", "nearest_ratio_half": "#332288", "stochastic": "#33a7d8"},
    **{"nearest_score": "#44aa99", "balanced": "#117733", "up": "#cc6677", "down": "#882255"},
    **{"expert_choice": "#ee7733", "capacity": "#8c8c8c", "bias": "#aa4499"},
}
LINES = {"nearest_ratio_1": "--", "nearest_ratio_half": ":"}
MARKERS = {"nearest_ratio_1": "s", "nearest_ratio_half": "D", "up": "^", "down": "v"}

NOTES = """
How to read the columns:

- **held-out**: bits per byte on files that no run trained on, lower is better; mean over the seeds, and min to max.
  Measured in eval mode, where every routing is plain, causal top-K of its own scores.
- **minus top-K**: difference to the top-K run of the same seed (same first weights, same text in the same order), mean
  over the seeds ± standard error. Below 0 is better than top-K. One seed has no standard error, and says little.
- **padding**: share of a grouped GEMM's rows that are padding, in training, if every expert fills whole tiles with it.
- **computed**: rows that such a GEMM computes, padding included, over T * K.
- **load**: rows of the fullest expert over the mean, less 1, in training; mean over steps and layers.
- **moved**: (token, expert) pairs that differ from top-K's of the same logits, over T * K: **added**, which top-K has
  not, and **dropped**, which top-K has.
- **idle**: share of the tokens that no expert takes, in a layer.
- **tokens/s**: training, from the median step, on this machine; padding costs nothing here, since a CPU has no tiles.
"""


def write_report(
    folder: Path, results: list[RunResult], logs: dict[tuple[str, int], Log], config: dict[str, Any], note: str
) -> list[Path]:
    """Write the page of tables, table.md, and ``summary.json`` and the pictures.

    Args:
        folder: exists.
        results: of every finished run.
        logs: metrics logs by variant and seed.
        config: plain values that say what was run.
        note: a sentence on what the runs are; may be empty.

    Returns:
        The files written.
    """
    summary = summarise(results)
    facts = {
        "config": config,
        "note": note,
        "versions": {"sonic": sonic.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "routings": summary,
    }
    write_whole(folder / "summary.json", json.dumps(facts, indent=2) + "\n")
    write_whole(folder / "table.md", markdown(summary, facts))
    pictures = (
        plot_heldout(folder / "heldout.png", summary),
        plot_curves(folder / "loss_curves.png", summary, logs),
        plot_padding(folder / "padding_quality.png", summary),
    )
    return [folder / "table.md", folder / "summary.json", *pictures]


def columns_of(figures: dict[str, Any]) -> dict[str, str]:
    """The row of one routing in the main table, by column."""
    heldout, difference = figures["heldout"], figures["difference"]
    several = len(heldout["by_seed"]) > 1
    return {
        "routing": figures["label"],
        "tile": str(figures["tile_rows"]),
        "seeds": str(len(heldout["by_seed"])),
        "held-out": f"{heldout['mean']:.4f}",
        "min to max": f"{heldout['min']:.4f} to {heldout['max']:.4f}" if several else "",
        "minus top-K": _difference(difference) if difference else "",
        "padding": f"{figures['padding_waste'][str(figures['tile_rows'])]:.1%}",
        "computed": f"{figures['computed']:.3f}",
        "load": f"{figures['load_violation']:.3f}",
        "moved": f"{figures['moved']:.1%}",
        "added": f"{figures['added']:.1%}",
        "dropped": f"{figures['dropped']:.1%}",
        "idle": f"{figures['idle']:.1%}",
        "tokens/s": f"{figures['tokens_per_second']:,.0f}",
    }


def _difference(difference: dict[str, Any]) -> str:
    error = difference["standard_error"]
    return f"{difference['mean']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


def markdown(summary: Summary, facts: dict[str, Any]) -> str:
    """The report as a page of tables."""
    c, machine, versions = facts["config"], facts["machine"], facts["versions"]
    tokens = c["batch_size"] * c["seq_len"]
    lines = ["# Routing ablation", ""]
    lines += [facts["note"], ""] if facts["note"] else []
    lines += [
        f"A byte-level language model of {c['layers']} layers of width {c['hidden_size']}, {c['experts']} experts of "
        f"width {c['expert_size']}, {c['top_k']} per token; {c['steps']} steps of {tokens:,} tokens "
        f"({tokens * c['top_k'] / c['experts']:g} rows per expert on average), learning rate {c['lr']:g}, on text "
        f"`{c['text']}`. torch {versions['torch']}, sonic {versions['sonic']}, {machine['platform']}, "
        f"{machine['torch_threads']} threads.",
        "",
        *_table([columns_of(figures) for figures in summary.values()]),
        *NOTES.splitlines(),
    ]
    for figures in summary.values():
        if figures["heldout_leaky"] is not None:
            lines.append(
                f"- With its own routing in evaluation too, {figures['label']} comes to {figures['heldout_leaky']:.4f} "
                f"held-out bits per byte. That is no language model's figure: an expert that picks its tokens among a "
                f"whole batch sees the bytes that are still to come."
            )
    lines += ["", "## Padding waste at other tiles", ""]
    tiles = sorted({tile for figures in summary.values() for tile in figures["padding_waste"]}, key=int)
    rows = []
    for figures in summary.values():
        waste = figures["padding_waste"]
        shares = {f"{tile} rows": f"{waste[tile]:.1%}" if tile in waste else "" for tile in tiles}
        rows.append({"routing": figures["label"], **shares})
    lines += [*_table(rows), "", "## Held-out bits per byte of every run", ""]
    seeds = sorted({seed for figures in summary.values() for seed in figures["heldout"]["by_seed"]}, key=int)
    rows = []
    for figures in summary.values():
        by_seed = figures["heldout"]["by_seed"]
        bits = {f"seed {seed}": f"{by_seed[seed]:.4f}" if seed in by_seed else "" for seed in seeds}
        rows.append({"routing": figures["label"], **bits})
    return "\n".join([*lines, *_table(rows), ""])


def _table(rows: list[dict[str, str]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right, padded to be read as plain text too."""
    names = list(rows[0])
    widths = [max(3, len(name), *(len(row[name]) for row in rows)) for name in names]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(names), line(rule), *(line(list(row.values())) for row in rows)]


def print_table(console: Console, results: list[RunResult]) -> None:
    """Show the main columns in the terminal."""
    table = Table(title="Routing ablation", title_style="bold", caption="held-out bits per byte: lower is better")
    table.box = SIMPLE
    names = ("routing", "held-out", "minus top-K", "padding", "moved")
    for name in names:
        table.add_column(name, justify="left" if name == "routing" else "right", no_wrap=True)
    for name, figures in summarise(results).items():
        columns = columns_of(figures)
        table.add_row(*(columns[column] for column in names), style="bold" if name == BASELINE else "")
    console.print(table, soft_wrap=False)


def plot_heldout(path: Path, summary: Summary) -> Path:
    """Held-out bits per byte: a row per routing, a point per seed, a bar at the mean, and the band of top-K."""
    figure = new_figure(9, 1.6 + 0.42 * len(summary))
    axes = figure.subplots()
    if BASELINE in summary:
        bits = summary[BASELINE]["heldout"]
        axes.axvspan(bits["min"], bits["max"], color="#222222", alpha=0.08, linewidth=0)
        axes.axvline(bits["mean"], color="#222222", linewidth=0.9, linestyle="--")
    for row, (name, figures) in enumerate(summary.items()):
        bits, colour = figures["heldout"], COLOURS[name]
        axes.plot(
            list(bits["by_seed"].values()),
            [row] * len(bits["by_seed"]),
            "o",
            color=colour,
            alpha=0.55,
            markersize=7,
            markeredgewidth=0,
        )
        axes.plot([bits["mean"]] * 2, [row - 0.28, row + 0.28], color=colour, linewidth=2.5)
        if figures["difference"]:
            text = _difference(figures["difference"])
            axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=9)
    axes.annotate(
        "minus top-K", (1.01, -0.75), xycoords=("axes fraction", "data"), va="center", color="#555555", fontsize=9
    )
    axes.set_yticks(range(len(summary)), labels=[figures["label"] for figures in summary.values()])
    axes.set_ylim(len(summary) - 0.4, -0.6)
    axes.set_xlabel("held-out bits per byte, lower is better (points: seeds; bars: means; band: top-K's seeds)")
    polish(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle("Quality of a model that is served with top-K, by the routing that it was trained with")
    return _save(figure, path)


def plot_curves(path: Path, summary: Summary, logs: dict[tuple[str, int], Log]) -> Path:
    """Training loss over the steps, and the held-out difference to top-K of the same seed; means over the seeds.

    Of the training loss only seeds that all routings have: two seeds, with their own text, cannot be compared.
    """
    figure = new_figure(12, 5)
    training, against = figure.subplots(1, 2)
    low, high = math.inf, 0.0
    common = set.intersection(*({seed for name, seed in logs if name == one} for one in summary))
    for name in summary:
        runs = {seed: log for (variant, seed), log in logs.items() if variant == name and log}
        if not runs:
            continue
        style: dict[str, Any] = {"color": COLOURS[name], "linestyle": LINES.get(name, "-")}
        style["linewidth"] = 2.2 if name == BASELINE else 1.3
        shown = [log for seed, log in runs.items() if seed in common or not common]
        bits = _mean([[row["bits_per_byte"] for row in log] for log in shown])
        smooth = running_mean(bits, max(1, len(bits) // 30))
        training.plot(range(1, len(smooth) + 1), smooth, label=summary[name]["label"], **style)
        low, high = min(low, *smooth), max(high, smooth[len(smooth) // 8])
        pairs = [(log, logs[BASELINE, seed]) for seed, log in runs.items() if logs.get((BASELINE, seed))]
        if not pairs:
            continue
        gaps = [
            [b - a for a, b in zip(_heldout(base).values(), _heldout(log).values(), strict=False)]
            for log, base in pairs
        ]
        against.plot(list(_heldout(pairs[0][0])), _mean(gaps), marker="o", markersize=3, **style)
    training.set_ylim(low - 0.05, high + 0.05)  # the first steps would flatten the rest
    training.set_ylabel("bits per byte")
    training.set_title("training text, routed as in training", fontsize=10)
    against.set_ylabel("bits per byte minus top-K's")
    against.set_title("held-out files, routed by plain top-K: difference to top-K of the same seed", fontsize=10)
    for axes in (training, against):
        axes.set_xlabel("training step")
        polish(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _save(figure, path)


def plot_padding(path: Path, summary: Summary) -> Path:
    """Held-out bits per byte over padding waste, and over the rows that are computed with padding.

    With top-K among the routings, as the difference to top-K of the same seed, which varies far less than the figure.
    """
    figure = new_figure(12, 5)
    panels = figure.subplots(1, 2, sharey=True)
    paired = BASELINE in summary
    for name, figures in summary.items():
        difference = figures["difference"] or {"mean": 0.0, "standard_error": None}
        y, error = (difference["mean"], difference["standard_error"]) if paired else (figures["heldout"]["mean"], None)
        waste = 100 * figures["padding_waste"][str(figures["tile_rows"])]
        for axes, x in zip(panels, (waste, figures["computed"]), strict=True):
            axes.errorbar(
                [x],
                [y],
                yerr=[error or 0.0],
                fmt=MARKERS.get(name, "o"),
                color=COLOURS[name],
                markersize=8,
                elinewidth=1.2,
                alpha=0.85,
                label=figures["label"] if axes is panels[0] else None,
            )
    for axes in panels:
        if paired:
            axes.axhline(0.0, color=COLOURS[BASELINE], linewidth=0.9, linestyle="--", zorder=0)
        polish(axes)
    difference_label = "bits per byte minus top-K's (± standard error)"
    panels[0].set_ylabel(difference_label if paired else "held-out bits per byte")
    panels[0].set_xlabel("padding: % of the rows of a tile-wise GEMM, in training")
    panels[1].set_xlabel("rows of a tile-wise GEMM, padding included, over T * K")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("What tiles cost against what the model is worth: below and to the left is better")
    return _save(figure, path)


def _heldout(log: Log) -> dict[int, float]:
    """Held-out bits per byte by step."""
    return {row["step"]: row["heldout_bits_per_byte"] for row in log if "heldout_bits_per_byte" in row}


def _mean(curves: list[list[float]]) -> list[float]:
    """The mean of several curves at every place that all of them have."""
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path
