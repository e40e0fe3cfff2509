"""Draws the pictures of the pages from the results that are committed: ``python -m benchmarks.figures``.

====================  ================================================================================================
picture               from
====================  ================================================================================================
``throughput``        :mod:`benchmarks.cpu_moe`; :mod:`benchmarks.layers` where there are results of a GPU
``memory``            :mod:`benchmarks.memory`
``roofline``          :mod:`sonic.roofline`; measured points from :mod:`benchmarks.kernels` on a GPU, if there are any
``padding_waste``     :mod:`benchmarks.padding`
``routing_ablation``  the routing ablation of the examples
``overlap``           :mod:`benchmarks.overlap`
====================  ================================================================================================

Nothing is measured and nothing is made up: what is drawn is what the newest JSON of each benchmark in
``benchmarks/results/`` holds, and the foot of each picture tells chip, date and command. ``docs/images/figures.json``
holds, for each picture, the files it was drawn from and a hash of all that it shows. ``--check`` compares these with
what is there now and draws nothing.

``--suite SUITE.json --out PICTURE.png`` draws the results of ``python -m sonic bench`` instead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import drawing
from benchmarks.report import RESULTS, replace_file
from sonic import roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["IMAGES", "PICTURES", "Picture", "check", "main"]

IMAGES = Path(__file__).parent.parent / "docs" / "images"
MANIFEST = "figures.json"
MAX_BYTES = 150 * 1024
_OURS, _OTHERS, _YARDSTICK = drawing.COLOURS[0], "0.62", "0.85"
_MIB = 2**20
_YARDSTICKS = ("dense_mlp", "products_alone", "dense", "dense batched")


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its file, without suffix.
        data: from the results found in a folder: the files that were read, and all that is shown, as plain data;
            None where there are no such results.
        draw: that data onto a new figure.
    """

    name: str
    data: Callable[[Path], tuple[list[str], dict[str, Any]] | None]
    draw: Callable[[Mapping[str, Any]], Figure]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, or check, from the command line; returns 1 if ``--check`` finds a picture that is not of these results."""
    arguments = _parser().parse_args(argv)
    if arguments.check:
        faults = check(arguments.results, arguments.images)
        print("\n".join(faults) or "every picture shows the results that are there")
        return 1 if faults else 0
    if importlib.util.find_spec("matplotlib") is None:
        print("benchmarks.figures: pictures are drawn with matplotlib, which is not installed", file=sys.stderr)
        return 2
    if arguments.suite is not None:
        out = arguments.out or arguments.suite.with_suffix(".png")
        _save(_draw_suite(json.loads(arguments.suite.read_text())), out)
        return 0
    manifest = {}
    for picture in PICTURES:
        found = picture.data(arguments.results)
        if found is None:
            print(f"{picture.name}: no results")
            continue
        files, data = found
        _save(picture.draw(data), arguments.images / f"{picture.name}.png")
        manifest[f"{picture.name}.png"] = {"inputs": files, "sha256": _hash(data)}
    replace_file(arguments.images / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return 0


def check(results: Path, images: Path) -> list[str]:
    """What is wrong with the pictures in ``images``: one that is missing, or that shows other results.

    Args:
        results: folder of the JSON files.
        images: folder of the pictures and their manifest.
    """
    path = images / MANIFEST
    if not path.exists():
        return [f"{path} does not exist; python -m benchmarks.figures writes it"]
    manifest = json.loads(path.read_text())
    faults = []
    for picture in PICTURES:
        name, found = f"{picture.name}.png", picture.data(results)
        if found is None:
            faults += [f"{name}: the results that it was drawn from are gone"] if name in manifest else []
            continue
        files, data = found
        if name not in manifest or not (images / name).exists():
            faults.append(f"{name}: not drawn yet, though there are results: {', '.join(files)}")
        elif manifest[name] != {"inputs": files, "sha256": _hash(data)}:
            was = ", ".join(manifest[name]["inputs"])
            faults.append(f"{name}: was drawn from other results ({was}); python -m benchmarks.figures draws it anew")
    known = {f"{picture.name}.png" for picture in PICTURES}
    return faults + [f"{name}: nothing draws it" for name in manifest if name not in known]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only tell whether the pictures show the results there are"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images")
    parser.add_argument("--suite", type=Path, metavar="JSON", help="draw the results of a suite instead")
    parser.add_argument("--out", type=Path, metavar="PNG", help="with --suite: the picture (default: beside the JSON)")
    return parser


# ---------------------------------------------------------------------------------------------------------------- data


def _newest(results: Path, benchmark: str, wanted: Callable[[Mapping[str, Any]], bool] = lambda found: True) -> Any:
    """Name and content of the newest results of a benchmark; None if there are none. Earlier runs end in ``_first``."""
    found = []
    for path in sorted(results.glob(f"{benchmark}_*.json")):
        content = json.loads(path.read_text())
        if content.get("benchmark") == benchmark and not path.stem.endswith("_first") and wanted(content):
            found.append((content["machine"]["date"], path.name, content))
    if not found:
        return None
    _, name, content = max(found, key=lambda entry: entry[:2])
    return name, content


def _is_of_gpu(found: Mapping[str, Any]) -> bool:
    return any(cell.get("clock") == "events" for cell in found["cells"])


def _foot(found: Mapping[str, Any]) -> str:
    """Chip, date and command."""
    machine, device = found["machine"], found.get("device", {})
    chip = device.get("name") if isinstance(device, dict) else device
    cores = "" if chip and chip != machine["cpu"] else f", {machine['threads']} of {machine['cores']} cores"
    return f"{chip or machine['cpu']}{cores}, torch {machine['torch']}, {machine['date']}: {found['command']}"


def _sizes(shape: Mapping[str, int]) -> str:
    return " ".join(f"{letter}={size}" for letter, size in shape.items())


def _throughput_data(results: Path) -> tuple[list[str], dict[str, Any]] | None:
    files, panels, feet = [], [], []
    cpu = _newest(results, "cpu_moe")
    if cpu is not None:
        files.append(cpu[0])
        feet.append(_foot(cpu[1]))
        for cell in sorted(cpu[1]["cells"], key=lambda cell: cell["dtype"]):
            bars = {name: entry["forward_backward"]["gflops"] for name, entry in cell["contenders"].items()}
            panels.append({"title": f"{cell['dtype']}, {_sizes(cell['shape'])}", "unit": "GFLOP/s", "bars": bars})
    gpu = _newest(results, "layers", _is_of_gpu) or _newest(results, "moe", _is_of_gpu)
    if gpu is not None:
        files.append(gpu[0])
        feet.append(_foot(gpu[1]))
        panels += _layer_panels(gpu[1]["cells"])
    else:
        feet.append("No results of a GPU yet.")
    return (files, {"panels": panels, "foot": feet}) if panels else None


def _layer_panels(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """TFLOP/s of the timed contenders, forward and backward."""
    panels = []
    for cell in cells:
        bars = {name: entry["tflops"] for name, entry in cell["contenders"].items() if entry.get("tflops")}
        if cell["op"] == "experts_fwd_bwd" and bars:
            scale, unit = (1e3, "GFLOP/s") if max(bars.values()) < 1 else (1.0, "TFLOP/s")
            bars = {name: value * scale for name, value in bars.items()}
            panels.append({"title": f"{cell['dtype']}, {_sizes(cell['shape'])}", "unit": unit, "bars": bars})
    return panels


def _memory_data(results: Path) -> tuple[list[str], dict[str, Any]] | None:
    found = _newest(results, "memory")
    if found is None:
        return None
    return [found[0]], {"panels": _memory_panels(found[1]["cells"]), "foot": [_foot(found[1])]}


def _memory_panels(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    panels = []
    for cell in cells:
        bars = {name: entry["saved_bytes"] / _MIB for name, entry in cell["contenders"].items()}
        panels.append({"title": f"{cell['dtype']}, {_sizes(cell['shape'])}", "unit": "MiB", "bars": bars})
    return panels


# Published layers: T, D, N, E, K.
_LAYERS = {
    "7B, N=256": (24576, 1536, 256, 128, 8),
    "30B, N=256": (32768, 4096, 256, 256, 16),
    "Qwen3-Next": (32768, 2048, 512, 512, 10),
    "DeepSeek-V3.2": (32768, 7168, 2048, 256, 8),
}
_OPS = (
    *("up_proj", "down_proj", "combine", "down_proj_bwd_input"),
    *("down_proj_bwd_weight", "up_proj_bwd_input", "up_proj_bwd_weight"),
)
_CHIPS = ("H100", "H200", "B200")


def _roofline_data(results: Path) -> tuple[list[str], dict[str, Any]]:
    points = {}
    for name, sizes in _LAYERS.items():
        layer = roofline.Layer(*sizes)
        points[name] = [round(cost.intensity, 2) for op in _OPS if (cost := roofline.op_cost(op, layer)).flops]
    chips = {
        name: {
            "flops": roofline.CHIPS[name].flops_per_second["bfloat16"],
            "bandwidth": roofline.CHIPS[name].memory_bytes_per_second,
        }
        for name in _CHIPS
    }
    files, feet = (
        ["sonic/roofline.py"],
        ["Roofs: data sheets of the chips. Ticks: intensity of each product, computed."],
    )
    found = _newest(results, "kernels", _is_of_gpu)
    measured = []
    if found is None:
        feet.append("No measured points: there are no results of a GPU yet.")
    else:
        files.append(found[0])
        feet.append(_foot(found[1]))
        measured = _measured_points(found[1]["cells"])
    return files, {"chips": chips, "points": points, "measured": measured, "foot": feet}


def _measured_points(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of sonic's backends on each op that has a matrix product."""
    points = []
    for cell in cells:
        ours = [entry for entry in cell["contenders"].values() if entry["kind"] == "backend" and entry.get("tflops")]
        if ours:
            best = max(entry["tflops"] for entry in ours)
            points.append({"op": cell["op"], "intensity": cell["flops"] / cell["bytes"], "tflops": best})
    return points


def _padding_data(results: Path) -> tuple[list[str], dict[str, Any]] | None:
    found = _newest(results, "padding")
    if found is None:
        return None
    name, content = found
    lines: dict[str, dict[str, Any]] = {}
    for cell in content["cells"]:
        key = f"K={cell['K']}, E={cell['E']}"
        line = lines.setdefault(key, {"models": [], "T": [], "0.0": [], "0.5": []})
        if cell["model"] not in line["models"]:
            line["models"].append(cell["model"])
        if cell["model"] == line["models"][0]:
            if cell["skew"] == 0:
                line["T"].append(cell["T"])
            line[str(cell["skew"])].append(cell["tiles"]["128"]["waste"]["mean"])
    return [name], {"lines": lines, "foot": [_foot(content)]}


def _ablation_data(results: Path) -> tuple[list[str], dict[str, Any]] | None:
    found = _newest(results, "routing_ablation")
    if found is None:
        return None
    name, content = found
    runs = {
        run["label"]: {
            "seeds": list(run["heldout"]["by_seed"].values()),
            "padding": run["padding_waste"][str(run["tile_rows"])],
            "difference": run["difference"],
        }
        for run in content["routings"].values()
    }
    return [name], {"runs": runs, "foot": [_foot(content)]}


def _overlap_data(results: Path) -> tuple[list[str], dict[str, Any]] | None:
    found = _newest(results, "overlap")
    if found is None:
        return None
    name, content = found
    lines: dict[str, dict[str, list[float]]] = {}
    for cell in content["cells"]:
        line = lines.setdefault(cell["variant"], {"link": [], "best": [], "median": [], "worst": []})
        line["link"].append(cell["link"])
        for part in ("best", "median", "worst"):
            line[part].append(cell["total"][part])
    return [name], {"lines": lines, "foot": [_foot(content)]}


def _hash(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- drawing


def _finish(figure: Figure, title: str, foot: Sequence[str]) -> Figure:
    figure.suptitle(title, fontsize=12)
    # room for the foot, one line each; long commands are broken
    lines = [line for text in foot for line in _wrapped(text, int(figure.get_figwidth() * 15.5))]
    height = 0.16 * len(lines) + 0.06
    figure.get_layout_engine().set(rect=(0, height / figure.get_figheight(), 1, 1 - height / figure.get_figheight()))
    figure.text(0.01, 0.06 / figure.get_figheight(), "\n".join(lines), fontsize=7, color="0.35", va="bottom")
    return figure


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("   " + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _bars(axes: Axes, panel: Mapping[str, Any], *, is_less_better: bool) -> None:
    """Horizontal bars, the best on top; sonic in colour, yardsticks hatched."""
    entries = sorted(panel["bars"].items(), key=lambda entry: entry[1], reverse=is_less_better)
    largest = max(value for _, value in entries)
    for place, (name, value) in enumerate(entries):
        is_ours, is_yardstick = name.startswith("sonic"), name in _YARDSTICKS
        colour = _OURS if is_ours else _YARDSTICK if is_yardstick else _OTHERS
        axes.barh(
            place, value, 0.72, color=colour, edgecolor="0.5", linewidth=0.4, hatch="///" if is_yardstick else None
        )
        axes.text(value + 0.015 * largest, place, _short(value), va="center", fontsize=7)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=8)
    axes.set_xlim(0, 1.16 * largest)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(panel["unit"], fontsize=8)
    axes.set_title(panel["title"], fontsize=8.5)
    drawing.polish(axes)
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _panels(panels: Sequence[Mapping[str, Any]], *, is_less_better: bool) -> Figure:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, places = drawing.new_figure(rows, columns, 3.5 * columns + 0.4, 2.35 * rows + 0.7)
    for axes, panel in zip(places, panels, strict=False):
        _bars(axes, panel, is_less_better=is_less_better)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return figure


def _draw_throughput(data: Mapping[str, Any]) -> Figure:
    figure = _panels(data["panels"], is_less_better=False)
    hatched = "Hatched: yardsticks that route nothing."
    return _finish(figure, "Experts, forward + backward: more is better", [hatched, *data["foot"]])


def _draw_memory(data: Mapping[str, Any]) -> Figure:
    figure = _panels(data["panels"], is_less_better=True)
    return _finish(figure, "Kept for backward by one layer's experts: less is better", data["foot"])


def _draw_roofline(data: Mapping[str, Any]) -> Figure:
    figure, (axes,) = drawing.new_figure(1, 1, 8.4, 5.0)
    _roofs(axes, data["chips"])
    for row, (name, intensities) in enumerate(data["points"].items()):
        height = 34 * 1.25**row
        axes.plot(intensities, [height] * len(intensities), "|", color=drawing.COLOURS[3 + row], markersize=9, mew=1.6)
        axes.text(1450, height, name, fontsize=8, va="center", color=drawing.COLOURS[3 + row])
    if data["measured"]:
        axes.plot(
            [point["intensity"] for point in data["measured"]],
            [point["tflops"] for point in data["measured"]],
            *("o",),
            **{"color": drawing.COLOURS[1], "markersize": 4.5, "label": "measured, fastest of sonic's backends"},
        )
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    title = "Products of published layers under the roofs of three chips, bfloat16"
    return _finish(figure, title, data["foot"])


def _roofs(axes: Axes, chips: Mapping[str, Mapping[str, float]]) -> None:
    low, high = 20.0, 3000.0
    for colour, (name, chip) in zip(drawing.COLOURS, chips.items(), strict=False):
        ridge = chip["flops"] / chip["bandwidth"]
        roof = [chip["bandwidth"] * low / 1e12, chip["flops"] / 1e12, chip["flops"] / 1e12]
        label = f"{name}: {chip['flops'] / 1e12:.0f} TFLOP/s, {chip['bandwidth'] / 1e12:.3g} TB/s"
        style = "--" if name == "H100" else "-"  # H100 and H200 have one ceiling
        axes.plot([low, ridge, high], roof, style, color=colour, linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(26, 4500)
    axes.set_xticks([20, 50, 100, 200, 500, 1000, 2000], ["20", "50", "100", "200", "500", "1000", "2000"])
    axes.set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1000", "2000"])
    axes.minorticks_off()
    axes.set_xlabel("FLOP per byte of device memory", fontsize=9)
    axes.set_ylabel("TFLOP/s", fontsize=9)
    drawing.polish(axes)


def _draw_padding(data: Mapping[str, Any]) -> Figure:
    figure, places = drawing.new_figure(1, 2, 11.4, 4.4)
    titles = {"0.0": "experts equally popular", "0.5": "log-normal popularity, sigma 0.5"}
    markers = "osv^Dp*X"
    for axes, (skew, title) in zip(places, titles.items(), strict=True):
        before: list[list[float]] = []  # lines of models that route as coarsely lie on each other: the first is wider
        for number, (key, line) in enumerate(data["lines"].items()):
            shares = [100 * share for share in line[skew]]
            covers = any(abs(shares[-1] / other[-1] - 1) < 0.05 for other in before)
            before.append(shares)
            style: dict[str, Any] = {"color": [*drawing.COLOURS, "0.55"][number], "marker": markers[number]}
            style |= {"linewidth": 0.9, "markersize": 2.5} if covers else {"linewidth": 1.9, "markersize": 5}
            axes.plot(line["T"], shares, label=f"{key}: {', '.join(line['models'])}", **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = next(iter(data["lines"].values()))["T"]
        axes.set_xticks(sizes, [f"{size // 1024}k" for size in sizes])
        axes.set_yticks([1, 3, 10, 30, 100, 300], ["1%", "3%", "10%", "30%", "100%", "300%"])
        axes.set_ylim(0.3, 1100)
        axes.minorticks_off()
        axes.set_xlabel("tokens per device", fontsize=9)
        axes.set_title(title, fontsize=9.5)
        drawing.polish(axes)
    places[0].set_ylabel("padding rows over useful rows", fontsize=9)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7.5, frameon=False)
    title = "Rows that a grouped GEMM with tiles of 128 rows computes for nothing"
    return _finish(figure, title, ["Simulated routing, counted; no time is measured.", *data["foot"]])


def _draw_ablation(data: Mapping[str, Any]) -> Figure:
    figure, (left, right) = drawing.new_figure(1, 2, 10.4, 4.4)
    names = list(data["runs"])[::-1]
    base = sum(data["runs"][names[-1]]["seeds"]) / len(data["runs"][names[-1]]["seeds"])
    left.axvline(base, color="0.5", linewidth=0.8, linestyle="--")
    for place, name in enumerate(names):
        run = data["runs"][name]
        mean = sum(run["seeds"]) / len(run["seeds"])
        left.plot(run["seeds"], [place] * len(run["seeds"]), "o", color=_OTHERS, markersize=4)
        left.plot([mean], [place], "|", color=_OURS, markersize=13, mew=2.2)
        padding = 100 * run["padding"]
        right.barh(place, padding, 0.7, color=_OURS if padding < 1 else _OTHERS)
        right.text(padding + 0.4, place, f"{padding:.1f}%", va="center", fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8.5)
    left.set_xlabel("held-out bits per byte: dots are seeds, bars their mean; less is better", fontsize=8.5)
    right.set_yticks(range(len(names)), [])
    right.set_xlim(0, 27)
    right.set_xlabel("padding over all computed rows at the routing's tile, %", fontsize=8.5)
    for axes in (left, right):
        axes.set_ylim(-0.6, len(names) - 0.4)
        drawing.polish(axes)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
    note = "A small byte-level model; three seeds resolve no hundredth. Served with plain top-K."
    return _finish(figure, "Quality and padding by routing in training", [note, *data["foot"]])


def _draw_overlap(data: Mapping[str, Any]) -> Figure:
    figure, (left, right) = drawing.new_figure(1, 2, 10.4, 4.2)
    markers = "osv^Dp"
    base = data["lines"]["standard"]["median"]
    for number, (name, line) in enumerate(data["lines"].items()):
        links = [1e3 * link for link in line["link"]]
        style: dict[str, Any] = {"color": drawing.COLOURS[number], "marker": markers[number], "markersize": 4.5}
        left.plot(links, [1e3 * seconds for seconds in line["median"]], label=name, linewidth=1.4, **style)
        left.fill_between(
            *(links, [1e3 * seconds for seconds in line["best"]], [1e3 * seconds for seconds in line["worst"]]),
            **{"color": drawing.COLOURS[number], "alpha": 0.15, "linewidth": 0},
        )
        speedup = [standard / seconds for standard, seconds in zip(base, line["median"], strict=True)]
        right.plot(links, speedup, linewidth=1.4, **style)
    left.set_ylabel("ms per step; shaded: best to worst run", fontsize=9)
    left.set_ylim(bottom=0)
    right.set_ylabel("times as fast as standard", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("ms that the link adds to each all-reduce", fontsize=9)
        drawing.polish(axes)
    left.legend(frameon=False, fontsize=8)
    note = "Two processes, eight sub-blocks; computation sleeps 20 ms, so the schedule alone is measured."
    return _finish(figure, "A step over a slow link, by wiring", [note, *data["foot"]])


def _draw_suite(found: Mapping[str, Any]) -> Figure:
    """Layers and memory of a suite, and the roofline where it was measured on a chip that has one."""
    parts = {record["part"]: record["data"] for record in found["parts"] if record["data"]}
    panels = [(panel, False) for panel in _layer_panels(parts.get("layers", {}).get("cells", []))]
    panels += [(panel, True) for panel in _memory_panels(parts.get("memory", {}).get("cells", []))[:1]]
    kernels = parts.get("kernels", {})
    chip = kernels.get("device", {}).get("chip")
    measured = _measured_points(kernels.get("cells", [])) if chip else []
    count = max(1, len(panels) + bool(measured))
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, places = drawing.new_figure(rows, columns, 3.9 * columns + 0.4, 3.0 * rows + 0.8)
    for axes, (panel, is_less_better) in zip(places, panels, strict=False):
        what = "kept for backward" if is_less_better else "forward + backward"
        _bars(axes, {**panel, "title": f"{what}\n{panel['title']}"}, is_less_better=is_less_better)
    if measured:
        known = roofline.CHIPS[chip]
        roof = {"flops": known.flops_per_second["bfloat16"], "bandwidth": known.memory_bytes_per_second}
        axes = places[len(panels)]
        _roofs(axes, {chip: roof})
        axes.plot(
            [point["intensity"] for point in measured],
            [point["tflops"] for point in measured],
            *("o",),
            **{"color": drawing.COLOURS[1], "markersize": 4, "label": "measured"},
        )
        axes.legend(frameon=False, fontsize=7)
    for axes in places[len(panels) + bool(measured) :]:
        axes.set_visible(False)
    if not panels and not measured:
        figure.text(0.5, 0.5, "no figures", ha="center")
    stamp = found["stamp"]
    commit = f", commit {stamp['commit'][:10]}" if stamp["commit"] else ""
    foot = f"{stamp['chip']}, torch {stamp['versions']['torch']}{commit}, {stamp['date']}"
    foot += f": python -m sonic bench --suite {found['suite']}"
    return _finish(figure, f"Benchmark suite: {found['suite']}", [foot])


def _save(figure: Figure, path: Path) -> None:
    """Write a picture with 128 colours, which halves the file and which nobody sees."""
    from PIL import Image  # matplotlib brings it

    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save_figure(figure, path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128)
    small.save(path, optimize=True)
    if (size := path.stat().st_size) > MAX_BYTES:
        print(f"{path} has {size // 1024} KiB, expected at most {MAX_BYTES // 1024}", file=sys.stderr)


PICTURES = (
    Picture("throughput", _throughput_data, _draw_throughput),
    Picture("memory", _memory_data, _draw_memory),
    Picture("roofline", _roofline_data, _draw_roofline),
    Picture("padding_waste", _padding_data, _draw_padding),
    Picture("routing_ablation", _ablation_data, _draw_ablation),
    Picture("overlap", _overlap_data, _draw_overlap),
)
"""All pictures that are drawn from committed results."""


if __name__ == "__main__":
    raise SystemExit(main())
