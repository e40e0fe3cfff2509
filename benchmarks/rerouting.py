"""Distinct experts of a decode batch, with and without rerouting: ``python -m benchmarks.rerouting``.

The time of a small decode batch in a MoE layer is that of reading the weights of the experts it chose, so the number of
*distinct* experts is what rerouting lowers. What it costs is measured as *score*: softmax probabilities of the chosen
experts, summed over the batch, against those of plain top-K. This is a simulation of the routing alone: it measures no
time and no model's quality.

Router logits are drawn as ``logits[t, e] = sqrt(share) * scale * z[e] + sqrt(1 - share) * scale * z[t, e]`` with
standard normal z. The first term is how popular an expert is with the whole batch (tokens of one text or topic, and
experts that are popular everywhere), the second is the token's own. ``share`` is the part of the variance that the
tokens have in common: 0 is i.i.d. logits, where nothing but chance lets tokens meet. ``scale`` is how sharp the router
is: with 1.4 the best of 128 experts has an eighth of the probability on average, with 2.8 three eighths. No router was
measured for these; the results depend on both, and are shown over both. Three ways to choose what is loaded are
compared, each over its knob:

- ``quality``: the fewest experts that keep this share of the batch's score (the default of
  ``sonic.routing.opportunistic.OpportunisticRouting``, at 0.97);
- ``min_experts``: each token's best few (the simple variant of Opportunistic Expert Activation, arXiv:2511.02237);
- ``top_p``: each token's best, until they hold this share of its top-K.

``--json`` writes::

    {"benchmark": "rerouting", "command": str, "machine": {...}, "missing": {}, "seed": int, "draws": int,
     "cells": [{"skew": str, "share": float, "scale": float, "T", "E", "K": int, "knob": str, "value": float,
                "experts_before", "experts_after", "fewer", "score_lost": {"mean", "std"},
                "worst_token_kept": float, "draws_within_target": float}],
     "targets": {"fewer": {"value", "target", "passed"}, "score_lost": {...}}}

``fewer`` and ``score_lost`` are shares; ``worst_token_kept`` is the least share of its own score that a token keeps,
the mean of it over draws. The targets are for the default knob at ``share`` 1/2: at least 30% fewer experts for at most
3% of the score.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import drawing
from benchmarks.report import Section, new_report, target, write_files
from sonic.routing.opportunistic import DEFAULT_QUALITY, reroute

__all__ = ["KNOBS", "SKEWS", "draw_logits", "main", "measure"]

# name -> share of the logits' variance that the batch has in common, and the logits' standard deviation
SKEWS = {
    "iid": (0.0, 1.4),
    "weak": (0.25, 1.4),
    "half": (0.5, 1.4),
    "strong": (0.75, 1.4),
    "half, sharp router": (0.5, 2.8),
    "iid, sharp router": (0.0, 2.8),
}
JUDGED = "half"
KNOBS: dict[str, tuple[float, ...]] = {
    "quality": (0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0),
    "min_experts": (1, 2, 3, 4, 5, 6, 7, 8),
    "top_p": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
TARGET_FEWER, TARGET_LOST = 0.30, 0.03


def draw_logits(num_tokens: int, num_experts: int, share: float, scale: float, seed: int) -> Tensor:
    """Router logits (T, E) of a batch whose tokens have ``share`` of the variance in common.

    Args:
        num_tokens: T.
        num_experts: E.
        share: 0 (i.i.d.) to 1 (all tokens alike).
        scale: standard deviation of the logits.
        seed: of the generator.

    Raises:
        ValueError: ``share`` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"benchmarks.rerouting.draw_logits: share is {share}, expected 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    popularity_1E = torch.randn(1, num_experts, generator=generator)
    own_TE = torch.randn(num_tokens, num_experts, generator=generator)
    return scale * (share**0.5 * popularity_1E + (1 - share) ** 0.5 * own_TE)


def measure(
    skew: str, num_tokens: int, num_experts: int, top_k: int, knob: str, value: float, *, draws: int, seed: int
) -> dict[str, Any]:
    """Reroute ``draws`` batches; return a cell as in the JSON."""
    share, scale = SKEWS[skew]
    rows = []
    for draw in range(draws):
        logits_TE = draw_logits(num_tokens, num_experts, share, scale, seed + draw)
        mass_TE = torch.softmax(logits_TE, dim=-1)
        before_TK = logits_TE.topk(top_k, dim=1).indices
        knobs: dict[str, Any] = {knob: int(value) if knob == "min_experts" else value}
        after_TK, is_chosen_TK = reroute(logits_TE, top_k, **knobs)
        whole_T = mass_TE.gather(1, before_TK).sum(1)
        kept_T = (mass_TE.gather(1, after_TK.clamp(min=0).long()) * is_chosen_TK).sum(1)
        num_before = before_TK.unique().numel()
        num_after = after_TK[is_chosen_TK].unique().numel()
        lost = 1 - float(kept_T.sum() / whole_T.sum())
        rows.append((num_before, num_after, 1 - num_after / num_before, lost, float((kept_T / whole_T).min())))
    value_X5 = torch.tensor(rows, dtype=torch.float64)
    mean_5 = value_X5.mean(0).tolist()
    std_5 = value_X5.std(0, correction=0).tolist()
    names = ("experts_before", "experts_after", "fewer", "score_lost")
    is_within_X = (value_X5[:, 2] >= TARGET_FEWER) & (value_X5[:, 3] <= TARGET_LOST)
    return {
        **{"skew": skew, "share": share, "scale": scale, "T": num_tokens, "E": num_experts, "K": top_k},
        **{"knob": knob, "value": value},
        **{name: {"mean": mean_5[i], "std": std_5[i]} for i, name in enumerate(names)},
        "worst_token_kept": mean_5[4],
        "draws_within_target": float(is_within_X.double().mean()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a target is missed."""
    arguments = _parser().parse_args(argv)
    report = new_report("rerouting", sys.argv[1:] if argv is None else argv, {})
    draws = arguments.draws or (2 if arguments.quick else 50)
    report |= {"seed": arguments.seed, "draws": draws}
    num_tokens, num_experts, top_k = arguments.shape
    options = {"draws": draws, "seed": arguments.seed}
    cells: list[dict[str, Any]] = report["cells"]
    sections = []
    for skew in (JUDGED, "iid") if arguments.quick else SKEWS:
        for knob, values in KNOBS.items():
            for value in values[-3:] if arguments.quick else values:
                if knob != "min_experts" or value <= top_k:
                    cells.append(measure(skew, num_tokens, num_experts, top_k, knob, value, **options))
        sections.append(_section(skew, [cell for cell in cells if cell["skew"] == skew]))
        drawing.show(sections[-1])
    by_batch = []
    for batch in BATCHES[:2] if arguments.quick else BATCHES:
        for skew in (JUDGED, "iid"):
            by_batch.append(measure(skew, batch, num_experts, top_k, "quality", DEFAULT_QUALITY, **options))
    cells += by_batch
    judged = measure(JUDGED, num_tokens, num_experts, top_k, "quality", DEFAULT_QUALITY, **options)
    fewer, lost = judged["fewer"]["mean"], judged["score_lost"]["mean"]
    report["targets"] = {
        "fewer": target(fewer, TARGET_FEWER, fewer >= TARGET_FEWER),
        "score_lost": target(lost, TARGET_LOST, lost <= TARGET_LOST),
    }
    verdict = "pass" if all(goal["passed"] for goal in report["targets"].values()) else "MISSED"
    note = (
        f"default, quality {DEFAULT_QUALITY:g}, with skew {JUDGED!r} and T={num_tokens}: {fewer:.1%} fewer distinct "
        f"experts (target at least {TARGET_FEWER:.0%}), {lost:.1%} of the score lost (target at most "
        f"{TARGET_LOST:.0%}): {verdict}"
    )
    sections.append(_batch_section(by_batch, note))
    drawing.show(sections[-1])
    if arguments.plot is not None:
        plot(cells, (num_tokens, num_experts, top_k), arguments.plot)
    preface = (
        f"Means of {draws} drawn batches, ± standard deviation; no time and no model's quality is measured. Skew: "
        "share is the part of the logits' variance that the batch has in common, scale their standard deviation. Worst "
        "token: the least share of its own score that a token keeps. Within target: share of draws with at least "
        f"{TARGET_FEWER:.0%} fewer experts for at most {TARGET_LOST:.0%} of the score."
    )
    write_files(report, "Rerouting in decode", preface, sections, json_path=arguments.json, save=arguments.save)
    return 0 if verdict == "pass" or arguments.quick else 1


def plot(cells: Sequence[Mapping[str, Any]], shape: tuple[int, int, int], path: Path) -> None:
    """Draw experts and score over ``quality``, and what the three knobs trade, as a PNG."""
    here = [cell for cell in cells if (cell["T"], cell["E"], cell["K"]) == shape]
    figure, (experts, score, trade) = drawing.new_figure(1, 3, 14, 4.4)
    skews = list(dict.fromkeys(cell["skew"] for cell in here))
    for skew, colour in zip(skews, drawing.COLOURS, strict=False):
        curve = sorted(_of(here, skew, "quality"), key=lambda cell: cell["value"])
        knob = [cell["value"] for cell in curve]
        for axes, values in (
            (experts, [100 * (1 - cell["fewer"]["mean"]) for cell in curve]),
            (score, [100 * (1 - cell["score_lost"]["mean"]) for cell in curve]),
        ):
            axes.plot(knob, values, color=colour, marker="o", markersize=3.5, label=skew)
    score.axline((1, 100), slope=100, color="0.5", linestyle=":", linewidth=1)
    score.annotate("promised", (0.93, 93), color="0.4", xytext=(8, -14), textcoords="offset points", fontsize=9)
    experts.set(xlabel="quality", ylabel="distinct experts, % of top-K's", title="What the batch loads", ylim=(0, 105))
    score.set(xlabel="quality", ylabel="score, % of top-K's", title="What its tokens keep")
    experts.legend(frameon=False, fontsize=8, title="logits in common", title_fontsize=8)
    for skew, style in ((JUDGED, "-"), ("iid", "--")):
        for name, colour in zip(KNOBS, drawing.COLOURS, strict=False):
            curve = sorted(_of(here, skew, name), key=lambda cell: cell["value"])
            lost = [100 * cell["score_lost"]["mean"] for cell in curve]
            fewer = [100 * cell["fewer"]["mean"] for cell in curve]
            trade.plot(lost, fewer, style, color=colour, marker="o", markersize=3, label=f"{name}, {skew}")
    trade.axvline(100 * TARGET_LOST, color="0.5", linestyle=":", linewidth=1)
    trade.axhline(100 * TARGET_FEWER, color="0.5", linestyle=":", linewidth=1)
    trade.set(xlabel="score lost, %", ylabel="fewer distinct experts, %", xlim=(-0.2, 12), ylim=(0, 75))
    trade.set_title("What it costs, by knob (up and left is better)")
    trade.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    for axes in (experts, score):
        axes.set_xticks([0.8, 0.85, 0.9, 0.95, 1.0])
    for axes in (experts, score, trade):
        drawing.polish(axes)
    num_tokens, num_experts, top_k = shape
    figure.suptitle(
        f"Rerouting a decode batch of {num_tokens} tokens, {top_k} of {num_experts} experts (simulated logits)"
    )
    drawing.save_figure(figure, path)


def _of(cells: Sequence[Mapping[str, Any]], skew: str, knob: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell["skew"] == skew and cell["knob"] == knob]


def _shape(text: str) -> tuple[int, int, int]:
    try:
        num_tokens, num_experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected T,E,K") from None
    if not (num_tokens >= 1 and 1 <= top_k <= num_experts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected T,E,K with T >= 1 and 1 <= K <= E")
    return num_tokens, num_experts, top_k


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rerouting", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--shape", type=_shape, default=(16, 128, 8), metavar="T,E,K", help="default: 16,128,8")
    parser.add_argument("--draws", type=int, help="batches per cell; default: 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="two draws, few cells: only to see that it runs")
    return parser


_HEAD = ["experts before", "after", "fewer", "score lost", "worst token", "within target"]


def _figures(cell: Mapping[str, Any]) -> list[str]:
    return [
        f"{cell['experts_before']['mean']:.1f}",
        f"{cell['experts_after']['mean']:.1f}",
        f"{cell['fewer']['mean']:.1%} ± {cell['fewer']['std']:.1%}",
        f"{cell['score_lost']['mean']:.1%} ± {cell['score_lost']['std']:.1%}",
        f"{cell['worst_token_kept']:.0%}",
        f"{cell['draws_within_target']:.0%}",
    ]


def _section(skew: str, cells: Sequence[Mapping[str, Any]]) -> Section:
    share, scale = SKEWS[skew]
    first = cells[0]
    title = f"{skew}: share {share:g}, scale {scale:g}, T={first['T']} E={first['E']} K={first['K']}"
    rows = [[f"{cell['knob']} = {cell['value']:g}", *_figures(cell)] for cell in cells]
    return Section(title, ["knob", *_HEAD], rows, [])


def _batch_section(cells: Sequence[Mapping[str, Any]], note: str) -> Section:
    title = f"By batch, quality {DEFAULT_QUALITY:g}, E={cells[0]['E']} K={cells[0]['K']}"
    rows = [[f"T = {cell['T']}, {cell['skew']}", *_figures(cell)] for cell in cells]
    return Section(title, ["batch", *_HEAD], rows, [note])


if __name__ == "__main__":
    raise SystemExit(main())
