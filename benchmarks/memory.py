"""Bytes that the routed experts keep for backward, and their peak: ``python -m benchmarks.memory``.

"saved" is what autograd keeps between forward and backward, counted with saved-tensor hooks: every storage once, the
tokens included, the expert weights not (they are parameters). For ``sonic.moe_mlp`` with SwiGLU it is the documented
sum, with s bytes per value::

    X: s T D   +   H: s T K 2N   +   scores: 4 T K   +   integers of the plan: 4 T K + 4 (E + 1)

Each layer is measured again with experts half and a quarter as wide and twice and four times as many of them chosen (K
N unchanged): X and H stay as they are to the byte, scores and integers grow with K.

"held" is the memory that torch's allocator gave out during forward and that is still there after it, without the
output: it confirms "saved" by another way (it has no X and no scores, which were there before; what a rival keeps out
of autograd's sight it has). "peak" is the highest moment of forward + backward above what was there before, without the
gradients of the weights, which all contenders return alike.

``--device cuda`` measures the same on a GPU, "held" and "peak" by the statistics of torch's allocator there; the report
then has the ``"device"`` too.

``--json`` writes::

    {"benchmark": "memory", "command": str, "machine": {...}, "missing": {rival: why},
     "cells": [{"shape": {"T", "D", "N", "E", "K"}, "dtype": str, "missing": {rival: why},
                "formula_bytes": int, "x_and_h_bytes": int,
                "contenders": {name: {"saved_bytes": int, "tensors": [{"shape", "dtype", "bytes"}],
                                      "held_bytes": int | null, "peak_bytes": int | null}},
                "best_rival": name, "ratio_to_best_rival": float, "change_from_first": float,
                "targets": {"equals_formula": {"value", "target", "passed"},
                            "ratio_to_best_rival": {...}, "same_for_finer_experts": {...}}}]}
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, rivals
from benchmarks.cpu_moe import DTYPES, Problem, Shape, make_problem, sonic_moe
from benchmarks.report import FAILED, Section, failure, new_report, target, write_files

__all__ = ["SHAPES", "formula_bytes", "main", "measure_cell"]

SHAPES = (Shape(4096, 1536, 256, 128, 8),)
QUICK_SHAPES = (Shape(64, 32, 32, 8, 2),)
TARGET_OF_BEST_RIVAL = 0.40
TARGET_CHANGE = 0.01
_MIB = 2**20
# Their backward writes a gradient of the size of all experts for each expert: minutes on a large layer, to learn what
# is known.
_NO_PEAK = ("hf_eager",)


def formula_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that ``sonic.moe_mlp`` promises to keep: gated activation, ``save="preactivation"``, fp32 scores."""
    T, _, _, E, K = dataclasses.astuple(shape)
    return x_and_h_bytes(shape, dtype) + 4 * T * K + 4 * T * K + 4 * (E + 1)


def x_and_h_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """The bulk of :func:`formula_bytes`: tokens, and rows before the activation; 2 T D + 4 T K N in 16 bits."""
    return dtype.itemsize * (shape.T * shape.D + shape.T * shape.K * 2 * shape.N)


def finer(shape: Shape, factor: int) -> Shape:
    """The layer with experts ``factor`` times narrower and as many times more chosen; E grows only if K would pass it.

    Raises:
        ValueError: ``factor`` does not divide N.
    """
    if shape.N % factor:
        raise ValueError(f"benchmarks.memory.finer: factor is {factor}, expected a divisor of N = {shape.N}")
    return dataclasses.replace(shape, N=shape.N // factor, K=shape.K * factor, E=max(shape.E, shape.K * factor))


def measure_cell(
    shape: Shape,
    dtype_name: str,
    contenders: Mapping[str, rivals.Rival],
    *,
    thorough: bool = True,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Count the bytes of all contenders on one shape; return a cell as in the JSON, without its targets.

    Args:
        shape: sizes of the layer.
        dtype_name: a key of ``DTYPES``.
        contenders: by name; ``"sonic"`` is set against all others.
        thorough: also run forward and backward under the profiler, for ``held_bytes`` and ``peak_bytes``.
        device: where; None: the CPU.

    A rival that raises is in ``missing`` with its error, and the others are measured.
    """
    device = device or torch.device("cpu")
    dtype = DTYPES[dtype_name]
    refused = {name: why for name in contenders if (why := rivals.refusal(name, shape.D, shape.N, dtype)) is not None}
    contenders = {name: fn for name, fn in contenders.items() if name not in refused}
    problem = _on_device(make_problem(shape, dtype), device)
    report: dict[str, Any] = {}
    out_bytes = shape.T * shape.D * dtype.itemsize
    for name, fn in contenders.items():
        try:
            report[name] = _bytes_of(name, fn, problem, out_bytes, thorough, device)
        except Exception as error:  # whatever foreign code raises; sonic's own faults stop the run
            if name == "sonic":
                raise
            refused[name] = failure(error)
    peers = [name for name in report if name != "sonic"]
    best = min(peers, key=lambda name: report[name]["saved_bytes"]) if peers else None
    return {
        "shape": dataclasses.asdict(shape),
        "dtype": dtype_name,
        "missing": refused,
        "formula_bytes": formula_bytes(shape, dtype),
        "x_and_h_bytes": _x_and_h_saved(report["sonic"]["tensors"], shape, dtype_name) if "sonic" in report else None,
        "contenders": report,
        "best_rival": best,
        "ratio_to_best_rival": report["sonic"]["saved_bytes"] / report[best]["saved_bytes"]
        if best and "sonic" in report
        else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a promise about bytes is broken."""
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    contenders: dict[str, rivals.Rival] = {"sonic": sonic_moe, **rivals.RIVALS}
    missing = {}
    why = rivals.hf_grouped_mm_missing()
    if why is not None:
        missing["hf_grouped_mm"] = why
        del contenders["hf_grouped_mm"]
    shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    if arguments.dry_run:
        print(f"would measure {', '.join(contenders)} at {' '.join(map(str, shapes))} on {device}")
        return 0
    report = new_report("memory", sys.argv[1:] if argv is None else argv, missing)
    if device.type == "cuda":
        report["device"] = measure.gpu_line(device)
    sections = []
    for shape in shapes:
        first: int | None = None
        for factor in (1, 2, 4):
            # The rivals' bytes at finer experts only grow: what takes long is shown once.
            thorough = factor == 1 and not arguments.no_peak
            cell = measure_cell(finer(shape, factor), arguments.dtype, contenders, thorough=thorough, device=device)
            ours = cell["x_and_h_bytes"]
            first = ours if first is None else first
            cell["change_from_first"] = ours / first - 1
            cell["targets"] = _targets(cell)
            report["cells"].append(cell)
            sections.append(_section(cell))
            print("\n" + sections[-1].text(), flush=True)
    preface = "saved: kept by autograd, with the tokens, without the weights; held: the same as the allocator sees it."
    write_files(report, "Bytes kept for backward", preface, sections, json_path=arguments.json, save=arguments.save)
    broken = [
        f"{name} at {_title(cell)}: {why}"
        for cell in report["cells"]
        for name, why in cell["missing"].items()
        if why.startswith(FAILED)
    ]
    for what in broken:
        print(what)
    missed = [
        f"{name} at {_title(cell)}"
        for cell in report["cells"]
        for name, goal in cell["targets"].items()
        if not goal["passed"]
    ]
    if missed and not arguments.quick:  # a tiny layer is to a good part integers
        print("missed: " + "; ".join(missed))
        return 1
    return 1 if broken else 0


def _on_device(problem: Problem, device: torch.device) -> Problem:
    """The same values there, as leaves."""
    if device.type == "cpu":
        return problem
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in problem.leaves().values()]
    x_TD, w1_EUD, w2_EDN, scores_TK = leaves
    return Problem(x_TD, w1_EUD, w2_EDN, scores_TK, problem.expert_TK.to(device), problem.dout_TD.to(device))


def _bytes_of(
    name: str, fn: rivals.Rival, problem: Problem, out_bytes: int, thorough: bool, device: torch.device
) -> dict[str, Any]:
    """The entry of one contender."""

    def allocations(call: Callable[[], Any]) -> measure.Allocations:
        return measure.allocations(call) if device.type == "cpu" else measure.allocations_on_gpu(call, device)

    forward = _forward(fn, problem)
    saved = measure.saved_bytes(forward, exclude=(problem.w1_EUD, problem.w2_EDN))
    has_peak = thorough and name not in _NO_PEAK
    if has_peak and device.type != "cpu":
        _peak(forward, problem, allocations)  # what libraries keep from their first call on counts for nobody
    return {
        "saved_bytes": saved.total,
        "tensors": [dataclasses.asdict(tensor) for tensor in saved.tensors],
        "held_bytes": allocations(forward).held - out_bytes if thorough else None,
        "peak_bytes": _peak(forward, problem, allocations) if has_peak else None,
    }


def _forward(fn: rivals.Rival, problem: Problem) -> Callable[[], Tensor]:
    return lambda: fn(problem.x_TD, problem.w1_EUD, problem.w2_EDN, problem.scores_TK, problem.expert_TK)


def _peak(
    forward: Callable[[], Tensor], problem: Problem, allocations: Callable[[Callable[[], Any]], measure.Allocations]
) -> int:
    """Peak bytes of a step above its start, without the weight gradients; warmed up by the forward passes before."""
    for leaf in problem.leaves().values():
        leaf.grad = None
    peak = allocations(lambda: forward().backward(problem.dout_TD)).peak
    for leaf in problem.leaves().values():
        leaf.grad = None
    return peak - sum(weight.numel() * weight.element_size() for weight in (problem.w1_EUD, problem.w2_EDN))


def _x_and_h_saved(tensors: Sequence[Mapping[str, Any]], shape: Shape, dtype_name: str) -> int:
    """Bytes of the saved matrices: all that is not integers and not the (T, K) scores."""
    name = str(DTYPES[dtype_name]).removeprefix("torch.")
    return sum(t["bytes"] for t in tensors if t["dtype"] == name and tuple(t["shape"]) != (shape.T, shape.K))


def _targets(cell: Mapping[str, Any]) -> dict[str, Any]:
    ours, formula = cell["contenders"]["sonic"]["saved_bytes"], cell["formula_bytes"]
    share, change = cell["ratio_to_best_rival"], cell["change_from_first"]
    targets = {"equals_formula": target(ours, formula, ours == formula)}
    if share is not None:
        targets["ratio_to_best_rival"] = target(share, TARGET_OF_BEST_RIVAL, share <= TARGET_OF_BEST_RIVAL)
    targets["same_for_finer_experts"] = target(change, TARGET_CHANGE, abs(change) <= TARGET_CHANGE)
    return targets


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.parse, metavar="T,D,N,E,K", help=f"default: {' '.join(map(str, SHAPES))}"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--threads", type=int, help="threads of torch; default: as torch chooses")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--no-peak", action="store_true", help="only what is saved: neither held nor peak bytes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny layer: only to see that it runs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and measure nothing")
    return parser


def _section(cell: Mapping[str, Any]) -> Section:
    head = ["", "saved MiB", "sonic / it", "held MiB", "peak MiB", "largest saved"]
    rows = []
    ours = cell["contenders"]["sonic"]["saved_bytes"]
    for name, entry in sorted(cell["contenders"].items(), key=lambda pair: pair[1]["saved_bytes"]):
        row = [name + (" (best rival)" if name == cell["best_rival"] else "")]
        row += [f"{entry['saved_bytes'] / _MIB:.1f}", f"{ours / entry['saved_bytes']:.2f}"]
        row += ["" if size is None else f"{size / _MIB:.1f}" for size in (entry["held_bytes"], entry["peak_bytes"])]
        row.append(", ".join("x".join(map(str, tensor["shape"])) for tensor in entry["tensors"][:4]))
        rows.append(row)
    words = {
        "equals_formula": "sonic keeps {value} bytes, promised {target}",
        "ratio_to_best_rival": "share of the best rival: {value:.3f}, target at most {target:.2f}",
        "same_for_finer_experts": "X and H against the coarsest experts: {value:+.2%}, target within {target:.0%}",
    }
    notes = [f"not measured: {name}: {why}" for name, why in cell["missing"].items()]
    for name, goal in cell["targets"].items():
        notes.append(words[name].format(**goal) + (": pass" if goal["passed"] else ": MISSED"))
    return Section(_title(cell), head, rows, notes)


def _title(cell: Mapping[str, Any]) -> str:
    return f"{cell['dtype']} " + " ".join(f"{letter}={size}" for letter, size in cell["shape"].items())


if __name__ == "__main__":
    raise SystemExit(main())
