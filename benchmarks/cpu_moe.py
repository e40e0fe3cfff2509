"""Speed of the routed experts on a CPU: ``python -m benchmarks.cpu_moe``.

For each shape (T tokens, width D, expert width N, E experts, K per token) and dtype, ``sonic.moe_mlp`` and all rivals
of :mod:`benchmarks.rivals` are first checked, output and every gradient, against a float64 loop, and then timed side by
side in one run: forward, and forward + backward with gradients to tokens, both weights and scores. Everyone sorts the
tokens inside the timed region; routing is the top-K of random logits (mildly unbalanced), the same for all, from a
fixed seed. Speed-ups are ratios taken within each round, then the median. FLOPs are 6 T K N D forward and 18 T K N D
forward + backward.

Two yardsticks are no rivals. ``dense_mlp`` does the same FLOPs without routing. ``products_alone`` does only the six
matrix products of every expert, on rows that are already gathered, into memory that is already there but for the weight
gradients, which no layer can keep: what multiplying expert by expert takes on this machine, whoever does it. In bf16 it
is no bound where the chip multiplies float32 faster.

On a machine that others use as well, ``--clock cpu`` counts processor time on one thread: other processes do not change
that, whereas they make wall time on several threads meaningless. Steps that other processes disturbed are repeated, and
those that stayed disturbed are counted in the report.

The speed of the machine in the same dtype is given beside each table: one large square matmul ("roof").

Targets, for forward + backward: 1.25x the best rival in bf16, 1.05x in fp32, 0.8 of the dense MLP's GFLOP/s.

``--json`` and ``--save`` write::

    {"benchmark": "cpu_moe", "command": str, "machine": {...}, "missing": {rival: why}, "seed": int,
     "cells": [{"shape": {"T", "D", "N", "E", "K"}, "dtype": str, "missing": {rival: why}, "clock": "wall" | "cpu",
                "rounds": int, "steps": int, "disturbed_steps": int, "roof_gflops": float,
                "tokens_per_expert": {"min", "mean", "max"},
                "contenders": {name: {
                    "error": {tensor: {"relative", "worst_row"}}, "checked": bool,
                    "forward": {"median_ms", "p20_ms", "p80_ms", "count", "gflops"}, "forward_backward": {...},
                    "sonic_speedup": {"forward": {"median", "p20", "p80"}, "forward_backward": {...}}}},
                "best_rival": {"forward": name, "forward_backward": name},
                "targets": {"speedup_over_best_rival": {"value", "target", "passed"}, "fraction_of_dense": {...}}}]}

``targets`` is empty with ``--quick`` and without sonic.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, rivals
from benchmarks.report import Section, new_report, target, write_files

__all__ = ["DTYPES", "QUICK_SHAPES", "SHAPES", "Problem", "Shape", "main", "make_problem", "run_cell", "sonic_moe"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGET_OVER_BEST_RIVAL = {"fp32": 1.05, "bf16": 1.25}
TARGET_OF_DENSE = 0.8
# Largest errors that a right answer may show: (whole tensor, worst single row).
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 1e-1)}
SEED = 0
Clock = Callable[[], float]
# On the CPU, backward runs on the thread that calls it: on one thread, its processor time is all there is.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
_SECONDS_PER_CELL = 40.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one layer: T tokens, width D, expert width N, E experts, K experts per token."""

    T: int
    D: int
    N: int
    E: int
    K: int

    @property
    def flops(self) -> dict[str, int]:
        """Floating point operations of the three projections, by lap."""
        per_pass = 6 * self.T * self.K * self.N * self.D
        return {"forward": per_pass, "forward_backward": 3 * per_pass}

    def __str__(self) -> str:
        return ",".join(str(size) for size in dataclasses.astuple(self))

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"T,D,N,E,K"``.

        Raises:
            ValueError: not five positive integers, or K > E.
        """
        try:
            sizes = [int(part) for part in text.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
            raise ValueError(
                f"benchmarks.cpu_moe: shape is {text!r}, expected T,D,N,E,K: five positive integers with K <= E"
            )
        return cls(*sizes)


SHAPES = (Shape(2048, 512, 256, 32, 4), Shape(8192, 768, 256, 64, 8), Shape(8192, 1024, 512, 8, 2))
QUICK_SHAPES = (Shape(48, 32, 16, 4, 2), Shape(33, 16, 24, 5, 3))


@dataclasses.dataclass
class Problem:
    """Inputs of one layer, all asking for gradients but ``expert_TK``, and the gradient ``dout_TD`` of its output."""

    x_TD: Tensor
    w1_EUD: Tensor
    w2_EDN: Tensor
    scores_TK: Tensor
    expert_TK: Tensor
    dout_TD: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that receive gradients, by name."""
        return {"x": self.x_TD, "w1": self.w1_EUD, "w2": self.w2_EDN, "scores": self.scores_TK}

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values, detached, all floats in ``dtype``."""
        floats = (self.x_TD, self.w1_EUD, self.w2_EDN, self.scores_TK)
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in floats]
        x_TD, w1_EUD, w2_EDN, scores_TK = leaves
        return Problem(x_TD, w1_EUD, w2_EDN, scores_TK, self.expert_TK, self.dout_TD.to(dtype))


def make_problem(shape: Shape, dtype: torch.dtype, seed: int = SEED) -> Problem:
    """Random inputs; weights keep the scale of what they multiply; scores: fp32 softmax of the K largest logits."""
    rng = torch.Generator().manual_seed(seed)
    T, D, N, E, K = dataclasses.astuple(shape)
    x_TD = torch.randn(T, D, generator=rng).to(dtype)
    w1_EUD = (torch.randn(E, 2 * N, D, generator=rng) / D**0.5).to(dtype)
    w2_EDN = (torch.randn(E, D, N, generator=rng) / N**0.5).to(dtype)
    top_TK, expert_TK = torch.randn(T, E, generator=rng).topk(K, dim=-1)
    scores_TK = top_TK.softmax(dim=-1)
    dout_TD = torch.randn(T, D, generator=rng).to(dtype)
    for leaf in (x_TD, w1_EUD, w2_EDN, scores_TK):
        leaf.requires_grad_()
    return Problem(x_TD, w1_EUD, w2_EDN, scores_TK, expert_TK, dout_TD)


def sonic_moe(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """``sonic.moe_mlp`` with the signature of a rival; the plan is built inside, as the rivals sort inside."""
    import sonic

    plan = sonic.RoutingPlan.from_topk(expert_TK, w1_EUD.shape[0])
    return sonic.moe_mlp(x_TD, w1_EUD, w2_EDN, scores_TK, plan)


def run_cell(
    shape: Shape,
    dtype_name: str,
    contenders: Mapping[str, rivals.Rival],
    *,
    rounds: int | None = None,
    seconds: float = _SECONDS_PER_CELL,
    seed: int = SEED,
    judge: bool = True,
    clock: str = "wall",
) -> dict[str, Any]:
    """Check, then time the contenders on one shape and dtype, and return a cell as in the JSON.

    Args:
        shape: sizes of the layer.
        dtype_name: a key of ``DTYPES``.
        contenders: by name; ``"sonic"`` is set against all others.
        rounds: timed rounds; None chooses as many as fit in ``seconds``.
        seconds: time to fill.
        seed: of the inputs and the routing.
        judge: hold the speed against the targets.
        clock: a key of ``CLOCKS``.
    """
    dtype = DTYPES[dtype_name]
    refused = {name: why for name in contenders if (why := rivals.refusal(name, shape.D, shape.N, dtype)) is not None}
    contenders = {name: fn for name, fn in contenders.items() if name not in refused}
    problem = make_problem(shape, dtype, seed)
    errors = _check(problem, contenders, TOLERANCE[dtype_name])
    steps = {name: _step(fn, problem, CLOCKS[clock]) for name, fn in contenders.items()}
    steps["dense_mlp"] = _dense_step(shape, dtype, seed, CLOCKS[clock])
    steps["products_alone"] = _products_step(shape, problem, CLOCKS[clock])
    timed = measure.interleaved(steps, rounds=rounds, seconds=seconds, retries=3 if clock == "wall" else 0)
    laps = timed.laps
    roof = _roof_gflops(dtype, 256 if shape.T < 1024 else 2048, CLOCKS[clock])

    report: dict[str, Any] = {}
    for name in steps:
        entry: dict[str, Any] = dict(errors.get(name, {}))
        for lap, flops in shape.flops.items():
            entry[lap] = _timing(laps[name][lap], flops)
        if "sonic" in laps and name != "sonic":
            ratios = {lap: measure.ratio(laps[name][lap], laps["sonic"][lap]) for lap in shape.flops}
            entry["sonic_speedup"] = {
                lap: {"median": r.median, "p20": r.p20, "p80": r.p80} for lap, r in ratios.items()
            }
        report[name] = entry
    peers = [name for name in contenders if name != "sonic"]
    best = {lap: min(peers, key=lambda name: report[name][lap]["median_ms"]) for lap in shape.flops} if peers else {}
    targets = {}
    if judge and "sonic" in contenders and best:
        over_best = report[best["forward_backward"]]["sonic_speedup"]["forward_backward"]["median"]
        over_dense = report["dense_mlp"]["sonic_speedup"]["forward_backward"]["median"]
        targets["speedup_over_best_rival"] = target(
            over_best, TARGET_OVER_BEST_RIVAL[dtype_name], over_best >= TARGET_OVER_BEST_RIVAL[dtype_name]
        )
        targets["fraction_of_dense"] = target(over_dense, TARGET_OF_DENSE, over_dense >= TARGET_OF_DENSE)
    count_E = torch.bincount(problem.expert_TK.reshape(-1), minlength=shape.E)
    return {
        "shape": dataclasses.asdict(shape),
        "dtype": dtype_name,
        "missing": refused,
        "clock": clock,
        "rounds": timed.rounds,
        "steps": timed.steps,
        "disturbed_steps": timed.disturbed,
        "roof_gflops": roof,
        "tokens_per_expert": {
            "min": int(count_E.min()),
            "mean": shape.T * shape.K / shape.E,
            "max": int(count_E.max()),
        },
        "contenders": report,
        "best_rival": best,
        "targets": targets,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line.

    Returns:
        0, or 1 if a contender computes something wrong or, with ``--strict``, if a target is missed.
    """
    arguments = _parser().parse_args(argv)
    shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    rounds = arguments.repeats or (2 if arguments.quick else None)
    threads = 1 if arguments.clock == "cpu" else arguments.threads
    if threads:
        torch.set_num_threads(threads)
    contenders: dict[str, rivals.Rival] = {} if arguments.rivals_only else {"sonic": sonic_moe}
    contenders |= {name: fn for name, fn in rivals.RIVALS.items() if not arguments.rivals or name in arguments.rivals}
    missing = {}
    why = rivals.hf_grouped_mm_missing()
    if "hf_grouped_mm" in contenders and why is not None:
        missing["hf_grouped_mm"] = why
        del contenders["hf_grouped_mm"]

    report = new_report("cpu_moe", sys.argv[1:] if argv is None else argv, missing)
    report["seed"] = SEED
    sections = []
    for shape in shapes:
        for dtype_name in arguments.dtypes or DTYPES:
            cell = run_cell(
                shape,
                dtype_name,
                contenders,
                rounds=rounds,
                seconds=arguments.seconds,
                judge=not arguments.quick,
                clock=arguments.clock,
            )
            report["cells"].append(cell)
            sections.append(_section(cell))
            print("\n" + sections[-1].text(), flush=True)
    preface = "Medians; p20..p80 of forward + backward; speed-ups are medians of the ratio within each round."
    write_files(report, "Routed experts on a CPU", preface, sections, json_path=arguments.json, save=arguments.save)
    return _exit_code(report, arguments.strict)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_moe", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.parse, metavar="T,D,N,E,K", help=f"default: {' '.join(map(str, SHAPES))}"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: all")
    parser.add_argument("--rivals", nargs="+", choices=list(rivals.RIVALS), help="default: all that are installed")
    parser.add_argument("--rivals-only", action="store_true", help="leave sonic out")
    parser.add_argument("--repeats", type=_positive, help="timed rounds; default: as many as fit in --seconds, 5 to 25")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS_PER_CELL, help="time to fill per cell (default: %(default)s)"
    )
    parser.add_argument("--threads", type=_positive, help="threads of torch; default: as torch chooses")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time on one thread, for a busy machine"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: only to see that it runs")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, expected at least 1")
    return value


def _check(
    problem: Problem, contenders: Mapping[str, rivals.Rival], tolerance: tuple[float, float]
) -> dict[str, dict[str, Any]]:
    """Errors of every contender against a float64 loop, output and gradients."""
    wanted = _results(rivals.eager_unbind, problem.to(torch.float64))
    checked: dict[str, dict[str, Any]] = {}
    for name, fn in contenders.items():
        errors = {}
        for tensor, value in _results(fn, problem).items():
            errors[tensor] = {
                "relative": measure.relative_error(value, wanted[tensor]),
                "worst_row": measure.worst_row_error(value, wanted[tensor]),
            }
        # Written so that NaN counts as wrong.
        right = all(
            error["relative"] <= tolerance[0] and error["worst_row"] <= tolerance[1] for error in errors.values()
        )
        checked[name] = {"error": errors, "checked": right}
    return checked


def _results(fn: rivals.Rival, problem: Problem) -> dict[str, Tensor]:
    leaves = problem.leaves()
    for leaf in leaves.values():
        leaf.grad = None
    out_TD = fn(problem.x_TD, problem.w1_EUD, problem.w2_EDN, problem.scores_TK, problem.expert_TK)
    out_TD.backward(problem.dout_TD)
    results = {"out": out_TD.detach()}
    for name, leaf in leaves.items():
        if leaf.grad is None:
            raise RuntimeError(f"benchmarks.cpu_moe: no gradient reached {name}")
        results[f"d{name}"] = leaf.grad
        leaf.grad = None
    return results


def _step(fn: rivals.Rival, problem: Problem, now: Clock) -> Callable[[], dict[str, float]]:
    inputs = (problem.x_TD, problem.w1_EUD, problem.w2_EDN, problem.scores_TK, problem.expert_TK)
    return _timed(lambda: fn(*inputs), list(problem.leaves().values()), problem.dout_TD, now)


def _dense_step(shape: Shape, dtype: torch.dtype, seed: int, now: Clock) -> Callable[[], dict[str, float]]:
    """One step of a dense gated MLP of width K N: as many FLOPs as the routed experts."""
    rng = torch.Generator().manual_seed(seed)
    T, D, width = shape.T, shape.D, shape.K * shape.N
    x_TD, dout_TD = (torch.randn(T, D, generator=rng).to(dtype) for _ in range(2))
    w1_UD = (torch.randn(2 * width, D, generator=rng) / D**0.5).to(dtype)
    w2_DN = (torch.randn(D, width, generator=rng) / width**0.5).to(dtype)
    leaves = [t.requires_grad_() for t in (x_TD, w1_UD, w2_DN)]
    return _timed(lambda: rivals.dense_mlp(x_TD, w1_UD, w2_DN), leaves, dout_TD, now)


def _products_step(shape: Shape, problem: Problem, now: Clock) -> Callable[[], dict[str, float]]:
    """One step of nothing but the matrix products of the routed experts."""
    D, N = shape.D, shape.N
    counts = torch.bincount(problem.expert_TK.reshape(-1), minlength=shape.E).tolist()
    x_RD, h_RU, a_RN, y_RD = (problem.x_TD.new_ones(shape.T * shape.K, width) for width in (D, 2 * N, N, D))
    x, h, a, y = (rows.split(counts) for rows in (x_RD, h_RU, a_RN, y_RD))
    w1, w2 = problem.w1_EUD.detach().unbind(0), problem.w2_EDN.detach().unbind(0)
    experts = range(shape.E)

    def step() -> dict[str, float]:
        start = now()
        for e in experts:
            torch.mm(x[e], w1[e].t(), out=h[e])
            torch.mm(a[e], w2[e].t(), out=y[e])
        middle = now()
        dw1, dw2 = torch.empty_like(problem.w1_EUD), torch.empty_like(problem.w2_EDN)
        for e, dw1_UD, dw2_DN in zip(experts, dw1.detach().unbind(0), dw2.detach().unbind(0), strict=True):
            torch.mm(x[e], w2[e], out=a[e])
            torch.mm(x[e].t(), a[e], out=dw2_DN)
            torch.mm(h[e].t(), x[e], out=dw1_UD)
            torch.mm(h[e], w1[e], out=y[e])
        return {"forward": middle - start, "forward_backward": now() - start}

    return step


def _timed(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], dout_TD: Tensor, now: Clock
) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        for leaf in leaves:
            leaf.grad = None
        start = now()
        out_TD = forward()
        middle = now()
        out_TD.backward(dout_TD)
        end = now()
        for leaf in leaves:  # so that no contender pays for freeing the gradients of another
            leaf.grad = None
        return {"forward": middle - start, "forward_backward": end - start}

    return step


def _roof_gflops(dtype: torch.dtype, size: int, now: Clock) -> float:
    a, b, out = (torch.ones(size, size, dtype=dtype) for _ in range(3))

    def multiply() -> dict[str, float]:
        start = now()
        torch.mm(a, b, out=out)
        return {"seconds": now() - start}

    timed = measure.interleaved({"mm": multiply}, rounds=7)
    return 2 * size**3 / measure.spread(timed.laps["mm"]["seconds"]).median / 1e9


def _timing(samples: Sequence[float | None], flops: int) -> dict[str, float]:
    s = measure.spread(samples)
    return {
        "median_ms": s.median * 1e3,
        "p20_ms": s.p20 * 1e3,
        "p80_ms": s.p80 * 1e3,
        "count": s.count,
        "gflops": flops / s.median / 1e9,
    }


def _section(cell: Mapping[str, Any]) -> Section:
    head = ["", "fwd ms", "fwd+bwd ms", "p20..p80", "GFLOP/s", "sonic is x faster: fwd", "fwd+bwd", "worst error"]
    rows = []
    for name, entry in sorted(cell["contenders"].items(), key=lambda pair: pair[1]["forward_backward"]["median_ms"]):
        both = entry["forward_backward"]
        role = {
            "dense_mlp": " (yardstick)",
            "products_alone": " (yardstick)",
            cell["best_rival"].get("forward_backward"): " (best rival)",
        }.get(name, "")
        row = [name + role, f"{entry['forward']['median_ms']:.2f}", f"{both['median_ms']:.2f}"]
        row += [f"{both['p20_ms']:.2f}..{both['p80_ms']:.2f}", f"{both['gflops']:.0f}"]
        for lap in ("forward", "forward_backward"):
            row.append(f"{entry['sonic_speedup'][lap]['median']:.2f}" if "sonic_speedup" in entry else "")
        worst = max((error["relative"] for error in entry.get("error", {}).values()), default=None)
        row.append("" if worst is None else f"{worst:.1e}" + ("" if entry["checked"] else " WRONG"))
        rows.append(row)
    load = cell["tokens_per_expert"]
    notes = [
        f"{cell['rounds']} rounds; "
        + (
            "processor time"
            if cell["clock"] == "cpu"
            else f"{cell['disturbed_steps']} of {cell['steps']} steps disturbed by other processes"
        )
        + "; "
        f"roof {cell['roof_gflops']:.0f} GFLOP/s; "
        f"tokens per expert {load['min']} to {load['max']}, mean {load['mean']:.0f}"
    ]
    notes += [f"not measured: {name}: {why}" for name, why in cell["missing"].items()]
    words = {
        "speedup_over_best_rival": "sonic over the best rival",
        "fraction_of_dense": "sonic GFLOP/s over dense GFLOP/s",
    }
    for name, goal in cell["targets"].items():
        verdict = "pass" if goal["passed"] else "MISSED"
        notes.append(f"{words[name]}, fwd+bwd: {goal['value']:.2f} (target {goal['target']:.2f}: {verdict})")
    return Section(_title(cell), head, rows, notes)


def _title(cell: Mapping[str, Any]) -> str:
    return f"{cell['dtype']} " + " ".join(f"{letter}={size}" for letter, size in cell["shape"].items())


def _exit_code(report: Mapping[str, Any], strict: bool) -> int:
    wrong = [
        f"{name} at {_title(cell)}"
        for cell in report["cells"]
        for name, entry in cell["contenders"].items()
        if not entry.get("checked", True)
    ]
    missed = [
        f"{name} at {_title(cell)}"
        for cell in report["cells"]
        for name, goal in cell["targets"].items()
        if not goal["passed"]
    ]
    for what in wrong:
        print(f"WRONG RESULT: {what}")
    for what in missed:
        print(f"missed: {what}")
    return 1 if wrong or (strict and missed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
