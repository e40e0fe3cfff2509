"""What token rounding costs: ``python -m benchmarks.rounding``.

From the logits (T, E) and a top-K choice to the rounded (token, expert) pairs and their scores, forward only. The plain
way, as the research code has it, builds a (T, E) table of preferences (a pair that was not chosen loses 1) and sorts
every column of it. It is measured in two layouts, since which one is faster depends on the machine: columns sorted in
place, and the transposed table sorted by rows. All contenders round to the same counts by the same rule (nearest), and
are checked to choose the same pairs before they are timed.

Time is taken side by side, memory is the highest moment of torch's allocator above what was there before. ``rounding``
with other rules is timed as well; they have no plain rival.

Targets: at most half the time and half the memory of the better plain way.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sonic
from benchmarks import measure
from benchmarks.report import Section, new_report, target, write_files

__all__ = ["SHAPES", "argsort_columns", "argsort_rows", "main", "measure_cell", "rounding"]

SHAPES = ((16384, 128, 8, 128), (32768, 512, 10, 128), (16384, 64, 8, 128))
QUICK_SHAPES = ((256, 8, 2, 16),)
TARGET = 0.5
_MIB = 2**20

Pairs = tuple[Tensor, Tensor, Tensor]
"""Tokens, experts and scores of the pairs, (P,) each."""


def argsort_columns(logits_TE: Tensor, expert_TK: Tensor, tile_rows: int) -> Pairs:
    """Sort every column of the table of preferences."""
    score_TE, preference_TE, target_E = _preferences(logits_TE, expert_TK, tile_rows)
    return _take(score_TE, preference_TE.argsort(dim=0, descending=True).t(), target_E)


def argsort_rows(logits_TE: Tensor, expert_TK: Tensor, tile_rows: int) -> Pairs:
    """Transpose the table of preferences, then sort every row."""
    score_TE, preference_TE, target_E = _preferences(logits_TE, expert_TK, tile_rows)
    return _take(score_TE, preference_TE.t().contiguous().argsort(dim=1, descending=True), target_E)


def rounding(logits_TE: Tensor, expert_TK: Tensor, tile_rows: int, rule: str = "nearest") -> Pairs:
    """``sonic.routing``: the plan of the choice, its rounding, and the scores of all pairs."""
    plan = sonic.RoutingPlan.from_topk(expert_TK, logits_TE.shape[1])
    rounded = sonic.routing.round_to_tiles(plan, logits_TE, tile_rows, rule=rule)
    experts_E = torch.arange(plan.num_experts)
    expert_R = experts_E.repeat_interleave(plan.tokens_per_expert(), output_size=plan.num_rows)
    token_P = torch.cat((plan.token_of_row_R[rounded.kept_row].long(), rounded.padded_token))
    expert_P = torch.cat((expert_R[rounded.kept_row], rounded.padded_expert))
    return token_P, expert_P, sonic.routing.pair_scores(logits_TE, token_P, expert_P)


def measure_cell(shape: tuple[int, int, int, int], seconds: float) -> dict[str, Any]:
    """Check, time and weigh all contenders on one shape (T, E, K, M)."""
    num_tokens, num_experts, top_k, tile_rows = shape
    rng = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(num_tokens, num_experts, generator=rng)
    expert_TK = logits_TE.topk(top_k, dim=-1).indices
    contenders: dict[str, Callable[[], Pairs]] = {
        "sonic": lambda: rounding(logits_TE, expert_TK, tile_rows),
        "argsort_columns": lambda: argsort_columns(logits_TE, expert_TK, tile_rows),
        "argsort_rows": lambda: argsort_rows(logits_TE, expert_TK, tile_rows),
        "sonic nearest_score": lambda: rounding(logits_TE, expert_TK, tile_rows, "nearest_score"),
        "sonic up": lambda: rounding(logits_TE, expert_TK, tile_rows, "up"),
    }
    pairs = {name: _set_of(contenders[name](), num_experts) for name in list(contenders)[:3]}
    for name, theirs in pairs.items():
        if not torch.equal(theirs, pairs["sonic"]):
            raise RuntimeError(f"benchmarks.rounding: {name} chose other pairs than sonic at {shape}")
    timed = measure.interleaved({name: _lap(fn) for name, fn in contenders.items()}, seconds=seconds)
    entries: dict[str, Any] = {}
    for name, fn in contenders.items():
        laps = timed.laps[name]["seconds"]
        took, over = measure.spread(laps), measure.ratio(timed.laps["sonic"]["seconds"], laps)
        entries[name] = {
            "median_ms": took.median * 1e3,
            "p20_ms": took.p20 * 1e3,
            "p80_ms": took.p80 * 1e3,
            "peak_bytes": measure.allocations(fn).peak,
            "sonic_over_it": over.median,
        }
    rivals = ("argsort_columns", "argsort_rows")
    time_share = max(entries[name]["sonic_over_it"] for name in rivals)
    memory_share = entries["sonic"]["peak_bytes"] / min(entries[name]["peak_bytes"] for name in rivals)
    return {
        "shape": dict(zip("TEKM", shape, strict=True)),
        "rounds": timed.rounds,
        "contenders": entries,
        "targets": {
            "time": target(time_share, TARGET, time_share <= TARGET),
            "memory": target(memory_share, TARGET, memory_share <= TARGET),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a target is missed."""
    arguments = _parser().parse_args(argv)
    report = new_report("rounding", sys.argv[1:] if argv is None else argv, {})
    sections = []
    for shape in QUICK_SHAPES if arguments.quick else SHAPES:
        cell = measure_cell(shape, 0.1 if arguments.quick else arguments.seconds)
        report["cells"].append(cell)
        sections.append(_section(cell))
        print("\n" + sections[-1].text(), flush=True)
    preface = "From logits and top-K to the rounded pairs and their scores, nearest rule unless named otherwise."
    write_files(report, "Cost of token rounding", preface, sections, json_path=arguments.json, save=arguments.save)
    missed = [cell["shape"] for cell in report["cells"] if not all(goal["passed"] for goal in cell["targets"].values())]
    if missed and not arguments.quick:
        print(f"missed: {missed}")
        return 1
    return 0


def _preferences(logits_TE: Tensor, expert_TK: Tensor, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    score_TE = logits_TE.softmax(dim=-1)
    is_chosen_TE = torch.zeros(score_TE.shape, dtype=torch.bool).scatter_(1, expert_TK, True)
    count_E = is_chosen_TE.sum(0)
    down_E = count_E // tile_rows * tile_rows
    target_E = torch.where(2 * (count_E - down_E) > tile_rows, down_E + tile_rows, down_E)
    return score_TE, torch.where(is_chosen_TE, score_TE, score_TE - 1), target_E


def _take(score_TE: Tensor, order_ET: Tensor, target_E: Tensor) -> Pairs:
    token_P = order_ET[torch.arange(order_ET.shape[1]) < target_E[:, None]]
    expert_P = torch.arange(order_ET.shape[0]).repeat_interleave(target_E)
    return token_P, expert_P, score_TE[token_P, expert_P]


def _set_of(pairs: Pairs, num_experts: int) -> Tensor:
    token_P, expert_P, _ = pairs
    return (token_P * num_experts + expert_P).sort().values


def _lap(fn: Callable[[], Pairs]) -> Callable[[], Mapping[str, float]]:
    def step() -> Mapping[str, float]:
        start = time.perf_counter()
        fn()
        return {"seconds": time.perf_counter() - start}

    return step


def _section(cell: Mapping[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{entry['median_ms']:.1f}",
            f"{entry['p20_ms']:.1f}..{entry['p80_ms']:.1f}",
            f"{entry['peak_bytes'] / _MIB:.1f}",
            f"{entry['sonic_over_it']:.2f}",
        ]
        for name, entry in cell["contenders"].items()
    ]
    notes = [f"{cell['rounds']} rounds"]
    for name, goal in cell["targets"].items():
        verdict = "pass" if goal["passed"] else "MISSED"
        notes.append(f"{name} over the better plain way: {goal['value']:.2f} (target {goal['target']:.2f}: {verdict})")
    title = " ".join(f"{letter}={size}" for letter, size in cell["shape"].items())
    return Section(title, ["", "ms", "p20..p80", "peak MiB", "sonic's time over it"], rows, notes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="time to fill per shape")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny shape: only to see that it runs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
