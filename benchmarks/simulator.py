"""How fast the simulator of Hopper kernels is: ``python -m benchmarks.simulator``.

The unit is the warp instruction: one instruction of PTX executed by 32 lanes, whatever it does. A TMA load of a tile
counts as one, and so does a wgmma of 64 x 256 x 16; their work is in the seconds. Time is that of the processor, so
that other processes on the machine count little; set ``OMP_NUM_THREADS=1`` for the figure of one core.

Kernels: the GEMM of ``examples/simulate_kernel.py``, a transposition through shared memory (no asynchronous
instruction at all), and, where quack-kernels is installed, its dense GEMM (persistent, clusters of two) and its GEMM
with gathered rows. Each runs under every schedule, and eagerly without checks; results are compared with torch first.

The first launch of a kernel compiles it and translates its PTX to Python; that is told apart. Below the target the
functions that take the most time are listed.

``--json`` writes::

    {"benchmark": "simulator", "command": str, "machine": {...}, "missing": {}, "versions": {package: str},
     "cells": [{"kernel": str, "instructions": int, "flops": int, "preparation_seconds": float,
                "ways": {name: {"median_ms", "p20_ms", "p80_ms", "instructions_per_second": float}},
                "targets": {"speed": {...}}, "profile": [{"function": str, "calls": int, "share": float}]}]}
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import pstats
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.report import Section, new_report, target, write_files

__all__ = ["TARGET", "WAYS", "Case", "gather", "main", "measure_cell", "quack_dense", "transposition", "tutorial"]

TARGET = 150_000.0
"""Warp instructions per second of one core, in eager order with all checks."""

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"schedule": "eager"},
    "lazy": {"schedule": "lazy"},
    "random": {"schedule": "random"},
    "eager, no checks": {"schedule": "eager", "checks": False},
}
_TOP = 12


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        name: for the report.
        launch: compiles at its first call; launches once.
        found: what it writes.
        expected: what torch says.
    """

    name: str
    launch: Callable[[], object]
    found: Tensor
    expected: Tensor


def tutorial(m: int, n: int, k: int) -> Case:
    """The GEMM of the tutorial: one warp loads by TMA, four multiply."""
    from examples import simulate_kernel

    a, b, c, product = simulate_kernel.integers(m, n, k)
    arguments = simulate_kernel.device_tensors(a, b, c)
    compiled = functools.cache(simulate_kernel.compile_gemm)
    return Case(f"tutorial GEMM {m}x{n}x{k}", lambda: compiled()(*arguments), c, product)


def transposition(rows: int, columns: int) -> Case:
    """A transposition in tiles of 32 x 32 through shared memory."""
    import cutlass.memory
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack

    from sonic.simulator import tensor

    @cute.kernel
    def kernel(source, transposed):
        thread, _, _ = cute.arch.thread_idx()
        tile_column, tile_row, _ = cute.arch.block_idx()
        shared = cutlass.memory.SmemAllocator()
        tile = shared.allocate_tensor(cutlass.Float32, cute.make_layout((32, 32), stride=(33, 1)), 16)
        row, column = thread // 32, thread % 32
        for step in cutlass.range_constexpr(4):
            tile[row + 8 * step, column] = source[tile_row * 32 + row + 8 * step, tile_column * 32 + column]
        cute.arch.sync_threads()
        for step in cutlass.range_constexpr(4):
            transposed[tile_column * 32 + row + 8 * step, tile_row * 32 + column] = tile[column, row + 8 * step]

    @cute.jit
    def host(source, transposed):
        kernel(source, transposed).launch(grid=(columns // 32, rows // 32, 1), block=(256, 1, 1))

    x, found = torch.randn(rows, columns), torch.empty(columns, rows)
    arguments = [from_dlpack(tensor(data, name)) for data, name in ((x, "X"), (found, "Y"))]
    compiled = functools.cache(lambda: cute.compile(host, *arguments))
    return Case(f"transposition {rows}x{columns}", lambda: compiled()(*arguments), found, x.t().contiguous())


def quack_dense(m: int, n: int, k: int) -> Case:
    """quack's dense GEMM: persistent, cooperative, clusters of two blocks that share their loads of B."""
    a, b = (torch.randint(-2, 3, (1, rows, k)).bfloat16() for rows in (m, n))
    expected = (a.float() @ b.float().mT).bfloat16()
    return _quack(f"quack dense GEMM {m}x{n}x{k}", a, b, expected)


def gather(rows: Sequence[int], n: int, k: int) -> Case:
    """quack's grouped GEMM, whose rows of A are gathered by cp.async."""
    starts_E = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    a, b = torch.randint(-2, 3, (sum(rows), k)).bfloat16(), torch.randint(-2, 3, (len(rows), n, k)).bfloat16()
    index = torch.randint(0, len(a), (sum(rows),), dtype=torch.int32)
    pieces = zip(a[index.long()].float().split(list(rows)), b.float(), strict=True)
    expected = torch.cat([piece @ weight.T for piece, weight in pieces]).bfloat16()
    name = f"quack gather GEMM {sum(rows)}x{n}x{k}, {len(rows)} experts"
    return _quack(name, a, b, expected, cu_seqlens_m=starts_E, A_idx=index)


def _quack(name: str, a: Tensor, b: Tensor, expected: Tensor, **options: Tensor) -> Case:
    from sonic.simulator import tensor

    os.environ.setdefault("QUACK_ARCH", "90")
    os.environ.setdefault("QUACK_CACHE_ENABLED", "0")
    import quack.gemm

    found = torch.empty_like(expected)
    for label, data in {"A": a, "B": b, "D": found, **options}.items():
        tensor(data, label)

    def launch() -> None:
        quack.gemm.gemm(a, b, found, None, None, 128, 256, 2, 1, pingpong=False, persistent=True, **options)

    return Case(name, launch, found, expected)


def measure_cell(case: Case, seconds: float) -> dict[str, Any]:
    """Check and time one kernel in all ways."""
    from sonic.simulator import hopper

    def lap(way: Mapping[str, Any]) -> tuple[float, Any]:
        with hopper(line_info=False, **way) as simulation:
            start = time.process_time()
            case.launch()
            took = time.process_time() - start
        (trace,) = simulation.traces
        return took, trace

    first, trace = lap(WAYS["eager"])
    took, traces = {}, {}
    for name, way in WAYS.items():
        case.found.zero_()
        took[name], traces[name] = lap(way)
        if not torch.equal(case.found, case.expected):
            raise RuntimeError(f"benchmarks.simulator: {case.name} is wrong, {name}")
    timed = measure.interleaved(
        {name: (lambda way=way: {"seconds": lap(way)[0]}) for name, way in WAYS.items()}, seconds=seconds
    )
    ways = {}
    for name in WAYS:
        spread = measure.spread(timed.laps[name]["seconds"])
        ways[name] = {
            "median_ms": spread.median * 1e3,
            "p20_ms": spread.p20 * 1e3,
            "p80_ms": spread.p80 * 1e3,
            "instructions_per_second": traces[name].instructions / spread.median,
        }
    speed = ways["eager"]["instructions_per_second"]
    cell = {
        "kernel": case.name,
        "instructions": trace.instructions,
        "flops": trace.flops,
        "preparation_seconds": max(0.0, first - took["eager"]),
        "rounds": timed.rounds,
        "ways": ways,
        "targets": {"speed": target(speed, TARGET, speed >= TARGET)},
        "profile": [],
    }
    if speed < TARGET:
        cell["profile"] = _profile(lambda: lap(WAYS["eager"]))
    return cell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if the target is missed."""
    arguments = _parser().parse_args(argv)
    if importlib.util.find_spec("cutlass") is None:
        print("benchmarks.simulator needs nvidia-cutlass-dsl")
        return 1
    torch.manual_seed(0)
    cases = [(tutorial, (128, 128, 128) if arguments.quick else (512, 512, 512))]
    cases.append((transposition, (64, 64) if arguments.quick else (512, 512)))
    missing = {}
    if importlib.util.find_spec("quack") is None:
        missing["quack"] = "quack-kernels is not installed"
    elif not arguments.quick:
        cases += [(quack_dense, (512, 1024, 512)), (gather, ((130, 0, 190, 80), 512, 512))]
    report = new_report("simulator", sys.argv[1:] if argv is None else argv, missing)
    report["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("nvidia-cutlass-dsl", "quack-kernels", "numpy")
        if name != "quack-kernels" or "quack" not in missing
    }
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    sections = []
    for make, sizes in cases:
        cell = measure_cell(make(*sizes), 0.5 if arguments.quick else arguments.seconds)
        report["cells"].append(cell)
        sections.append(_section(cell))
        print("\n" + sections[-1].text(), flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    preface = f"Warp instructions of PTX per second of processor time. With {versions}."
    write_files(report, "Speed of the simulator", preface, sections, json_path=arguments.json, save=arguments.save)
    missed = [cell["kernel"] for cell in report["cells"] if not cell["targets"]["speed"]["passed"]]
    if missed and not arguments.quick:
        print(f"missed: {missed}")
        return 1
    return 0


def _profile(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The functions that take most of the time themselves."""
    profiler = cProfile.Profile()
    profiler.runcall(call)
    stats = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])  # type: ignore[attr-defined]
    total = sum(row[1][2] for row in rows)
    return [
        {"function": _function_name(*place), "calls": counts[1], "share": counts[2] / total}
        for place, counts in rows[:_TOP]
    ]


def _function_name(file: str, line: int, name: str) -> str:
    return f"{Path(file).name}:{line} {name}" if line else name


def _section(cell: Mapping[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{way['median_ms']:.0f}",
            f"{way['p20_ms']:.0f}..{way['p80_ms']:.0f}",
            f"{way['instructions_per_second']:,.0f}",
        ]
        for name, way in cell["ways"].items()
    ]
    goal = cell["targets"]["speed"]
    notes = [
        f"{cell['instructions']:,} warp instructions, {cell['flops'] / 1e9:.2f} GFLOP, {cell['rounds']} rounds",
        f"first launch: {cell['preparation_seconds']:.1f} s more, to compile and to translate",
        f"eager: {goal['value']:,.0f} per second (target {goal['target']:,.0f}: "
        f"{'pass' if goal['passed'] else 'MISSED'})",
    ]
    notes += [f"{row['share']:.1%} in {row['function']}, {row['calls']:,} calls" for row in cell["profile"]]
    return Section(cell["kernel"], ["", "ms", "p20..p80", "warp instructions / s"], rows, notes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time to fill per kernel")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
