"""Padding waste of a grouped GEMM, and what token rounding can win at most: ``python -m benchmarks.padding``.

A grouped GEMM computes each expert's rows in tiles of M. With f_e rows of expert e it computes ceil(f_e / M) M, so

    waste = sum over e of (ceil(f_e / M) M - f_e),        w = waste / (T K),

and if everything else is free, a layer whose experts all have whole tiles is ``1 + w`` times as fast: the bound on what
token rounding (``TokenRounding`` with rule "nearest") wins. This is arithmetic on simulated routing, not a measurement
of time.

Where the residues of f_e modulo M are near uniform, ``w = (M - 1) / (2 T_e)`` with ``T_e = T K / E`` rows per expert:
the closed form. That holds where f_e spreads over a good part of a tile. With standard deviation s, the first Fourier
term of the saw tooth says that the closed form is off by at most ``(2 / pi) exp(-2 pi^2 (s / M)^2)``: 5% at s = 0.36 M,
1% at s = 0.46 M. Balanced routing has s = sqrt(T_e), so for M = 128 that takes T_e = 2,100 rows, more than most layers
have; with fewer rows the waste depends on where T_e falls between two multiples of M, and the tile is to be chosen with
that in mind. Skewed routing spreads wider and follows the closed form much earlier: with log-normal probabilities of
sigma 0.5 within 9% from T_e = M on, and 3% from 2 M on. Below one tile per expert (T_e < M) nothing is uniform: each
expert that has a row pays for at least one tile, and with balanced routing ``w`` comes to M / T_e - 1.

Routing is drawn either as a multinomial of T K choices (the default: fast, and right where K is small against E) or as
the top-K of log-probabilities plus Gumbel noise, K distinct experts for each token (``--law topk``). Probabilities are
uniform, or log-normal with sigma = 0.5, drawn anew for each draw.

``--json`` writes::

    {"benchmark": "padding", "command": str, "machine": {...}, "missing": {}, "seed": int, "draws": int, "law": str,
     "cells": [{"model": str, "T", "E", "K": int, "rows_per_expert": float, "skew": float, "spread": float,
                "tiles": {M: {"waste": {"mean", "std"}, "closed_form": float, "relative_error": float,
                              "speedup_bound": float, "nearest_rows": float}}}],
     "agreement": [{"skew": float, "spread_over_tile": [low, high], "cells": int,
                    "median_error": float, "worst_error": float}],
     "laws": [{"model": str, "T": int, "skew": float, "M": int, "multinomial", "topk": {"mean", "std"}}]}

``waste`` and ``closed_form`` are shares of the useful rows; ``spread`` is the standard deviation of f_e over experts
and draws; ``relative_error`` is waste over closed form, minus 1; ``nearest_rows`` are the rows after rounding each f_e
to the nearest multiple of M, over T K (none at all where every f_e is below M / 2).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import drawing
from benchmarks.report import Section, new_report, write_files

__all__ = ["MODELS", "TILES", "closed_form", "draw_counts", "main", "measure", "nearest_rows", "wasted_rows"]

# model -> (K, E)
MODELS = {
    "Mixtral-8x22B": (2, 8),
    "OLMoE": (8, 64),
    "gpt-oss-20b": (4, 32),
    "Qwen3-235B": (8, 128),
    "GLM-4.5-Air": (8, 128),
    "gpt-oss-120b": (4, 128),
    "Kimi-Linear": (8, 256),
    "DeepSeek-V3.2": (8, 256),
    "Kimi-K2": (8, 384),
    "Qwen3-Next": (10, 512),
}
TILES = (64, 128, 192, 256)
TOKENS = tuple(1024 * 2**power for power in range(7))
SKEWS = (0.0, 0.5)
LAWS = ("multinomial", "topk")
SPREADS = (0.0, 0.1, 0.2, 0.36, 0.46, 1.0, math.inf)


def wasted_rows(count: np.ndarray, tile_rows: int) -> np.ndarray:
    """Padding rows when each of the (..., E) counts is filled up to whole tiles: (...)."""
    return (-count % tile_rows).sum(-1)


def nearest_rows(count: np.ndarray, tile_rows: int) -> np.ndarray:
    """Rows when each of the (..., E) counts goes to the nearest multiple of the tile, up in the middle: (...)."""
    return ((count + tile_rows // 2) // tile_rows * tile_rows).sum(-1)


def closed_form(rows_per_expert: float, tile_rows: int) -> float:
    """Waste over useful rows where residues are uniform: (M - 1) / (2 T_e)."""
    return (tile_rows - 1) / (2 * rows_per_expert)


def draw_counts(
    num_tokens: int, num_experts: int, top_k: int, *, skew: float, draws: int, seed: int, law: str = "multinomial"
) -> np.ndarray:
    """Rows of each expert: (draws, E) int64 with sum T K.

    Args:
        num_tokens: T.
        num_experts: E.
        top_k: K.
        skew: sigma of the log-normal probabilities of the experts, drawn anew for each draw; 0 is uniform.
        draws: how many.
        seed: of the generator.
        law: ``"multinomial"`` or ``"topk"``.

    Raises:
        ValueError: the law does not exist.
    """
    if law not in LAWS:
        raise ValueError(f"benchmarks.padding.draw_counts: law is {law!r}, expected one of {', '.join(LAWS)}")
    rng = np.random.default_rng(seed)
    weight = np.exp(skew * rng.standard_normal((draws, num_experts)))
    share = weight / weight.sum(-1, keepdims=True)
    if law == "multinomial":
        return rng.multinomial(num_tokens * top_k, share)
    generator = torch.Generator().manual_seed(seed)
    count = np.zeros((draws, num_experts), dtype=np.int64)
    for draw in range(draws):
        rate_E = torch.from_numpy(share[draw]).float()
        for start in range(0, num_tokens, 8192):
            size = (min(8192, num_tokens - start), num_experts)
            # The K largest of log p + Gumbel are the K that come first in an exponential race of rates p.
            time_TE = torch.empty(size).exponential_(generator=generator).div_(rate_E)
            first_TK = time_TE.topk(top_k, dim=1, largest=False, sorted=False).indices
            count[draw] += torch.bincount(first_TK.flatten(), minlength=num_experts).numpy()
    return count


def measure(
    model: str, num_tokens: int, skew: float, *, draws: int, seed: int, law: str = "multinomial"
) -> dict[str, Any]:
    """Draw the routing of a model; return a cell as in the JSON, without its tiles' names turned into text."""
    top_k, num_experts = MODELS[model]
    useful = num_tokens * top_k
    rows_per_expert = useful / num_experts
    count = draw_counts(num_tokens, num_experts, top_k, skew=skew, draws=draws, seed=seed, law=law)
    tiles = {}
    for tile in TILES:
        waste = wasted_rows(count, tile) / useful
        wanted = closed_form(rows_per_expert, tile)
        tiles[tile] = {
            "waste": {"mean": float(waste.mean()), "std": float(waste.std())},
            "closed_form": wanted,
            "relative_error": float(waste.mean()) / wanted - 1,
            "speedup_bound": 1 + float(waste.mean()),
            "nearest_rows": float(nearest_rows(count, tile).mean()) / useful,
        }
    return {
        **{"model": model, "T": num_tokens, "E": num_experts, "K": top_k, "rows_per_expert": rows_per_expert},
        **{"skew": skew, "spread": float(count.std()), "tiles": tiles},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    arguments = _parser().parse_args(argv)
    report = new_report("padding", sys.argv[1:] if argv is None else argv, {})
    draws = arguments.draws or (5 if arguments.quick else 200)
    options = {"draws": draws, "seed": arguments.seed}
    report |= {**options, "law": arguments.law}
    models = arguments.models or (["OLMoE", "Qwen3-Next"] if arguments.quick else list(MODELS))
    tokens = TOKENS[::6] if arguments.quick else TOKENS
    cells = [
        measure(model, size, skew, law=arguments.law, **options)
        for model in models
        for size in tokens
        for skew in SKEWS
    ]
    report["cells"] = cells
    report["agreement"] = _agreement(cells)
    report["laws"] = list(_laws(models, 1024 if arguments.quick else 8192, min(draws, 20), arguments.seed))
    sections = [_model_section([cell for cell in cells if cell["model"] == model]) for model in models]
    sections += [_agreement_section(report["agreement"]), _bound_section(cells), _law_section(report["laws"])]
    for section in sections:
        drawing.show(section)
    if arguments.plot is not None:
        plot(models, arguments.plot, law=arguments.law, draws=min(draws, 30), seed=arguments.seed)
    preface = (
        f"Padding rows over useful rows, in %: mean ± standard deviation of {draws} draws ({arguments.law}); in "
        "brackets the closed form (M - 1) / (2 T_e). Skewed: log-normal expert probabilities, sigma 0.5; the closed "
        "form is the same. Simulated routing; no time is measured."
    )
    write_files(report, "Padding waste", preface, sections, json_path=arguments.json, save=arguments.save)
    return 0


def plot(models: Sequence[str], path: Path, *, law: str, draws: int, seed: int) -> None:
    """Draw the waste over tokens per device as a PNG: a panel for each E / K, a colour for each tile."""
    groups: dict[float, list[str]] = {}
    for model in models:
        top_k, num_experts = MODELS[model]
        groups.setdefault(num_experts / top_k, []).append(model)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, panels = drawing.new_figure(rows, columns, 4.6 * columns, 3.7 * rows + 0.6)
    sizes = [round(1024 * 2 ** (step / 8)) for step in range(49)]
    for axes, ratio in zip(panels, sorted(groups), strict=False):
        for skew, style in zip(SKEWS, ("-", ":"), strict=True):
            curve = [measure(groups[ratio][0], size, skew, draws=draws, seed=seed, law=law) for size in sizes]
            for tile, colour in zip(TILES, drawing.COLOURS, strict=False):
                waste = [100 * cell["tiles"][tile]["waste"]["mean"] for cell in curve]
                axes.plot(sizes, waste, style, color=colour, linewidth=1.8 if skew == 0 else 1.4)
        for tile, colour in zip(TILES, drawing.COLOURS, strict=False):
            line = [100 * closed_form(size / ratio, tile) for size in sizes]
            axes.plot(sizes, line, "--", color=colour, linewidth=0.9, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(TOKENS, [f"{size // 1024}k" for size in TOKENS])
        axes.set_ylim(0.15, 1500)
        axes.set_yticks([1, 10, 100, 1000], ["1%", "10%", "100%", "1000%"])
        axes.minorticks_off()
        names = ", ".join(f"{model} {MODELS[model][0]}/{MODELS[model][1]}" for model in groups[ratio])
        axes.set_title(names, fontsize=9)
        drawing.polish(axes)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    first = panels[0]
    handles = [first.plot([], [], color=c, label=f"M = {m}")[0] for m, c in zip(TILES, drawing.COLOURS, strict=False)]
    for style, label in (("-", "uniform"), (":", "log-normal 0.5"), ("--", "closed form")):
        handles += first.plot([], [], style, color="0.3", label=label)
    first.legend(handles=handles, frameon=False, fontsize=8, ncols=2)
    figure.suptitle("Rows computed for padding, over useful rows")
    figure.supxlabel("tokens per device", fontsize=10)
    drawing.save_figure(figure, path)


def _agreement(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Error of the closed form by how far the rows of an expert spread, in tiles; only where T_e >= M."""
    bounds = list(zip(SPREADS, SPREADS[1:], strict=False))
    errors: dict[tuple[float, float, float], list[float]] = {(skew, *bound): [] for skew in SKEWS for bound in bounds}
    for cell in cells:
        for tile, entry in cell["tiles"].items():
            if cell["rows_per_expert"] >= tile:
                low, high = next(bound for bound in bounds if bound[0] <= cell["spread"] / tile < bound[1])
                errors[cell["skew"], low, high].append(abs(entry["relative_error"]))
    return [
        {
            "skew": skew,
            "spread_over_tile": [low, None if high == math.inf else high],
            "cells": len(found),
            "median_error": float(np.median(found)),
            "worst_error": max(found),
        }
        for (skew, low, high), found in errors.items()
        if found
    ]


def _laws(models: Sequence[str], num_tokens: int, draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """The two ways to draw, side by side; models with the same K and E once."""
    for model in {MODELS[model]: model for model in reversed(models)}.values():
        for skew in SKEWS:
            cell = {law: measure(model, num_tokens, skew, draws=draws, seed=seed, law=law) for law in LAWS}
            for tile in (64, 128):
                wastes = {law: cell[law]["tiles"][tile]["waste"] for law in LAWS}
                yield {"model": model, "T": num_tokens, "skew": skew, "M": tile, **wastes}


def _percent(value: Mapping[str, float]) -> str:
    digits = 0 if value["mean"] >= 1 else 1
    return f"{100 * value['mean']:.{digits}f} ± {100 * value['std']:.{digits}f}"


def _model_section(cells: Sequence[Mapping[str, Any]]) -> Section:
    first = cells[0]
    head = ["tokens", "T_e", *(f"M={tile}" for tile in TILES), *(f"skewed M={tile}" for tile in TILES)]
    rows = []
    for size in dict.fromkeys(cell["T"] for cell in cells):
        uniform, skewed = (next(cell for cell in cells if cell["T"] == size and cell["skew"] == s) for s in SKEWS)
        row = [str(size), f"{uniform['rows_per_expert']:.0f}"]
        for tile in TILES:
            wanted = 100 * uniform["tiles"][tile]["closed_form"]
            row.append(f"{_percent(uniform['tiles'][tile]['waste'])} ({wanted:.{0 if wanted >= 100 else 1}f})")
        row += [_percent(skewed["tiles"][tile]["waste"]) for tile in TILES]
        rows.append(row)
    return Section(f"{first['model']}: K={first['K']}, E={first['E']}; waste in %", head, rows, [])


def _agreement_section(agreement: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for entry in agreement:
        low, high = entry["spread_over_tile"]
        rows.append(
            [
                f"{'skewed' if entry['skew'] else 'uniform'}, "
                + (f"{low:g} M and more" if high is None else f"{low:g} M to {high:g} M"),
                str(entry["cells"]),
                f"{entry['median_error']:.1%}",
                f"{entry['worst_error']:.1%}",
            ]
        )
    notes = ["only cells with T_e >= M; below, each expert with a row pays for one tile and the form does not apply"]
    head = ["spread of an expert's rows", "cells", "median error", "worst error"]
    return Section("How far the closed form is off", head, rows, notes)


def _bound_section(cells: Sequence[Mapping[str, Any]]) -> Section:
    size = max(cell["T"] for cell in cells if cell["T"] <= 32768)
    head = ["model", "T_e", *(f"M={tile}" for tile in TILES), *(f"nearest M={tile}" for tile in TILES)]
    rows = []
    for cell in cells:
        if cell["T"] == size and cell["skew"] == 0:
            row = [cell["model"], f"{cell['rows_per_expert']:.0f}"]
            row += [f"{cell['tiles'][tile]['speedup_bound']:.3f}" for tile in TILES]
            row += [f"{cell['tiles'][tile]['nearest_rows']:.3f}" for tile in TILES]
            rows.append(row)
    notes = [
        "after rounding up, down or to the nearest multiple no padding is left: waste 0",
        '"nearest" columns: rows after rounding to the nearest multiple, over T K',
        "rounding up computes what padding computes, with tokens in it; the bound is for rounding that keeps T K rows",
    ]
    return Section(f"At most this much faster: 1 + w, T={size}, uniform", head, rows, notes)


def _law_section(laws: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        [f"{entry['model']}, skew {entry['skew']:g}", str(entry["M"]), *(_percent(entry[law]) for law in LAWS)]
        for entry in laws
    ]
    title = f"Multinomial and top-K draws, T={laws[0]['T']}; waste in %"
    return Section(title, ["model", "M", *LAWS], rows, [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all")
    parser.add_argument("--law", choices=LAWS, default="multinomial", help="how routing is drawn")
    parser.add_argument("--draws", type=int, help="per cell; default: 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the waste over tokens per device")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="five draws of two models: only to see that it runs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
