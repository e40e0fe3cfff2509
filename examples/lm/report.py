"""The report: a table in the terminal, two pictures, and every figure in one JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import sonic
from examples.lm.display import duration

# One colour per model in every picture; blue and orange stay apart for colour-blind readers.
COLOURS = {"moe": "#1f6fb4", "dense": "#e07b16"}
NAMES = {"moe": "MoE", "dense": "dense"}


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        name: ``"moe"`` or ``"dense"``.
        heldout_bits_per_byte: of the finished model.
        parameters: ``total`` and ``active``.
        flops_per_token: of a forward pass, by part.
        training_seconds: spent in training steps; evaluation and checkpoints not counted.
        tokens_per_second: of training, all processes together.
        sample: text that the model wrote.
        rows: the metrics log.
    """

    name: str
    heldout_bits_per_byte: float
    parameters: dict[str, int]
    flops_per_token: dict[str, int]
    training_seconds: float
    tokens_per_second: float
    sample: str
    rows: list[dict[str, Any]]


def write_report(folder: Path, results: list[Result], config: dict[str, Any]) -> list[Path]:
    """Write ``summary.json``, ``loss_curve.png`` and, with an MoE among the runs, ``expert_load.png``.

    Args:
        folder: exists.
        results: one per run.
        config: plain values that say what was run.

    Returns:
        The files written.
    """
    summary = {
        "config": config,
        "versions": {"sonic": sonic.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "kernel_calls": {f"{op} ({backend})": calls for (op, backend), calls in sorted(sonic.kernels.counts().items())},
        "runs": {result.name: _figures(result) for result in results},
    }
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    tokens_per_step = config["batch_size"] * config["seq_len"]
    written = [path]
    drawn = [result for result in results if result.rows]  # a log may have been lost; its checkpoints do without
    if drawn:
        written.append(plot_loss(folder / "loss_curve.png", drawn, tokens_per_step=tokens_per_step))
    written += [plot_load(folder / "expert_load.png", result.rows) for result in drawn if result.name == "moe"]
    return written


def _figures(result: Result) -> dict[str, Any]:
    """What goes into the summary: all but the log, which has a file of its own."""
    return {name: value for name, value in asdict(result).items() if name not in ("name", "rows")}


def print_report(console: Console, results: list[Result]) -> None:
    """Show the table of results and what the models wrote."""
    table = Table(title="Results", title_style="bold", caption="bits per byte: lower is better")
    table.add_column("")
    for result in results:
        table.add_column(NAMES[result.name], justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("held-out bits per byte", [f"{result.heldout_bits_per_byte:.4f}" for result in results]),
        ("parameters, total", [f"{result.parameters['total']:,}" for result in results]),
        ("parameters that a token meets", [f"{result.parameters['active']:,}" for result in results]),
        ("forward MFLOP per token", [f"{sum(result.flops_per_token.values()) / 1e6:.3f}" for result in results]),
        ("  of which MLP", [f"{result.flops_per_token['mlp'] / 1e6:.3f}" for result in results]),
        ("  of which router", [f"{result.flops_per_token['router'] / 1e6:.3f}" for result in results]),
        ("training time", [duration(result.training_seconds) for result in results]),
        ("training tokens/s", [f"{result.tokens_per_second:,.0f}" for result in results]),
    ]
    for index, (name, figures) in enumerate(rows):
        table.add_row(name, *figures, style="bold" if index == 0 else "", end_section=index == 0)
    console.print(table, soft_wrap=False)
    for result in results:
        title = f"what the {NAMES[result.name]} model writes"
        console.print(Panel(Text(result.sample), title=title, border_style="dim"), soft_wrap=False)


def plot_loss(path: Path, results: list[Result], *, tokens_per_step: int) -> Path:
    """Bits per byte of every run, on the training text and on the held-out files, over bytes seen and over time."""
    figure = new_figure(11, 4.6)
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    low, high = 8.0, 0.0
    for result in results:
        colour, name = COLOURS[result.name], NAMES[result.name]
        bits = [row["bits_per_byte"] for row in result.rows]
        smooth = running_mean(bits, max(1, len(bits) // 30))
        tested = [row for row in result.rows if "heldout_bits_per_byte" in row]
        heldout = [row["heldout_bits_per_byte"] for row in tested]
        for axes, field, unit in ((by_bytes, "step", 1e6 / tokens_per_step), (by_time, "seconds", 1.0)):
            x = [row[field] / unit for row in result.rows]
            axes.plot(x, bits, color=colour, alpha=0.15, linewidth=0.8)
            axes.plot(x, smooth, color=colour, linewidth=1.5, label=f"{name}, training text")
            x = [row[field] / unit for row in tested]
            label = f"{name}, held-out files"
            axes.plot(x, heldout, color=colour, linestyle="--", marker="o", markersize=4.5, label=label)
            # The last value beside its point, which stands at the right end, where there is room for it.
            axes.annotate(f" {heldout[-1]:.3f}", (x[-1], heldout[-1]), color=colour, va="center", fontweight="bold")
            axes.margins(x=0.06)
        low, high = min(low, *smooth, *heldout), max(high, smooth[len(smooth) // 12])
    by_bytes.set_ylim(low - 0.1, high + 0.1)  # the first steps, at 8 bits per byte, would flatten the rest
    by_bytes.set_ylabel("bits per byte")
    by_bytes.set_xlabel("training bytes seen (millions)")
    by_time.set_xlabel("training time (seconds)")
    by_bytes.legend(frameon=False)
    for axes in (by_bytes, by_time):
        polish(axes)
    figure.suptitle("Language model over bytes: " + ", ".join(map(_describe, results)))
    figure.savefig(path)
    return path


def plot_load(path: Path, rows: list[dict[str, Any]], *, columns: int = 200) -> Path:
    """Load of every expert of every layer over the steps: 1 is an equal share."""
    layers, experts = len(rows[0]["load"]), len(rows[0]["load"][0])
    load = torch.tensor([row["load"] for row in rows], dtype=torch.float64).flatten(1)  # (steps, layers * experts)
    groups = torch.tensor_split(load, min(columns, len(rows)))
    share = torch.stack([group.mean(0) for group in groups], dim=1)  # (layers * experts, columns)
    share = share / share.view(layers, experts, -1).mean(1).repeat_interleave(experts, dim=0).clamp(min=1e-9)
    figure = new_figure(11, 1.6 + min(max(3.0, layers * experts * 0.06), 12.0))
    axes = figure.subplots()
    # Colours run over doublings, 1/4 to 4 times an equal share: half the share is as far from white as twice the share.
    image = axes.imshow(
        share.clamp(min=0.25).log2().numpy(),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-2,
        vmax=2,
        interpolation="nearest",
        extent=(rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, layers * experts - 0.5, -0.5),
    )
    for layer in range(1, layers):
        axes.axhline(layer * experts - 0.5, color="black", linewidth=0.8)
    axes.set_yticks([layer * experts + (experts - 1) / 2 for layer in range(layers)])
    axes.set_yticklabels([f"layer {layer}\n{experts} experts" for layer in range(layers)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("training step")
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.set_label("tokens of the expert / equal share")
    figure.suptitle("Expert load: each row is an expert, white is a fair share")
    figure.savefig(path)
    return path


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, drawn by Agg: no window, no global state, sizes in inches."""
    matplotlib.use("Agg")
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def polish(axes: Axes) -> None:
    """A faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _describe(result: Result) -> str:
    """Name and size of a model, for a title."""
    total, active = (f"{result.parameters[kind] / 1e6:.2f}" for kind in ("total", "active"))
    return f"{NAMES[result.name]} ({total} M parameters" + (f", {active} M active)" if active != total else ")")


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last ``window`` values, at every place."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[max(0, end - window)]) / min(window, end) for end in range(1, len(values) + 1)]
