"""Speed of every single op: ``python -m benchmarks.kernels``.

For each shape (T tokens, width D, expert width N, E experts, K per token; those of published models) and each op, and
for the whole experts forward and forward + backward, sonic's backends are measured beside the rivals and yardsticks of
:mod:`benchmarks.kernel_rivals`, in one run, on the same inputs and the same routing.

Before anything is timed, each result is checked against the definition in float64 (float32 above 10 TFLOP), expert by
expert, on random inputs of unit scale: norm of the error over that of the result, and the worst row. What is wrong is
x
On a GPU the time is that between two CUDA events, with L2 flushed before each call; on a CPU wall time. Contenders take
turns; given are the median, the quartiles and, as the median of the ratio within each round, how many times faster
than each other contender a backend is. FLOP and bytes are those of :mod:`sonic.roofline`, with gathered rows counted
once per row: a kernel that finds tokens in its L2 can pass both the bytes/s of the chip and the bound. The bound of an
op is the larger of FLOP over FLOP/s and bytes over bytes/s; that of the experts the sum over their ops.

Results are written after each op, so a run that was stopped keeps what it measured, and the same command goes on where
it stopped: what the file holds already is not measured again without ``--overwrite``. Where a contender took the
process with it, or left the GPU unusable (exit code 3), the same command goes on, tries a killed one once more, and
lists it as failed if that is how it ends again.
With ``--seconds`` no further op is begun after so long; what is left out is in the file as ``"left_out"``.

The JSON file holds::

    {"benchmark": "kernels", "command": str, "machine": {...}, "missing": {rival: why}, "seed": int,
     "device": {"name", "chip", "l2_bytes", "versions": {package: version}, "grouped_mm": str},
     "cells": [{"name": str, "shape": {"T", "D", "N", "E", "K"}, "op": str, "dtype": str, "skew": float,
                "command": str, "flops": int, "bytes": int, "bound_us": float | None,
                "bounded_by": "compute" | "memory" | None, "reference": dtype,
                "tokens_per_expert": {"min", "mean", "max"}, "clock": "events" | "wall",
                "rounds": int, "steps": int, "disturbed_steps": int, "missing": {contender: why},
                "contenders": {name: {
                    "kind": "backend" | "rival" | "yardstick",
                    "error": {tensor: {"relative", "worst_row"}}, "wrong": str | None,
                    # what is wrong has none of these:
                    "median_us", "p25_us", "p75_us", "count", "tflops": float | None, "gbytes_per_second",
                    "fraction_of_bound": float | None,
                    "times_as_long_as": {backend: {"median", "p25", "p75"}}}}}]}
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sonic
from benchmarks import kernel_rivals, measure, report
from benchmarks.cpu_moe import Shape
from benchmarks.kernel_rivals import Contender, Inputs, Routing, Unavailable
from benchmarks.report import Section
from sonic import roofline

__all__ = [
    "DTYPES",
    "OPS",
    "QUICK_SHAPES",
    "SHAPES",
    "Unusable",
    "bound_of",
    "chip_of",
    "cost_of",
    "main",
    "measure_cell",
]

OPS = tuple(kernel_rivals.OPERANDS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {
    "7b-n256": Shape(24576, 1536, 256, 128, 8),
    "30b-n256": Shape(32768, 4096, 256, 256, 16),
    "qwen3-next": Shape(32768, 2048, 512, 512, 10),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
    "gpt-oss-20b": Shape(32768, 2880, 2880, 32, 4),
    "deepseek-v3.2": Shape(32768, 7168, 2048, 256, 8),
}
QUICK_SHAPES = {"tiny": Shape(64, 32, 16, 4, 2)}
# Largest errors that a right answer may show: (whole tensor, worst single row).
TOLERANCE = {"bf16": (2e-2, 1e-1), "fp16": (5e-3, 3e-2), "fp32": (1e-5, 1e-4)}
# Always in float32; some libraries sort keys whose last bits hold the index.
TOPK_TOLERANCE = (1e-4, 1e-3)
LOW = 0.6
TIMING = "timing"
SEED = 0
_FLOAT64_FLOPS = 1e13
_TOKENS_PER_BLOCK = 4096
_PARTS = ("PCIE", "NVL", "40GB")


class Unusable(Exception):
    """A contender failed, and since then nothing runs on the GPU; a new process can."""


def cost_of(op: str, layer: roofline.Layer) -> roofline.Cost:
    """FLOP and bytes of one op that is measured here, by :mod:`sonic.roofline`."""
    if op == "experts_fwd_bwd":
        return roofline.op_cost("experts", layer) + roofline.op_cost("experts_bwd", layer)
    return roofline.op_cost(op, layer)


def bound_of(op: str, layer: roofline.Layer, chip: str) -> tuple[float, str]:
    """Least seconds of ``op`` on ``chip``, and what takes most of them: ``"compute"`` or ``"memory"``."""
    if not op.startswith("experts"):
        cost = cost_of(op, layer)
        return roofline.bound_time(cost, chip, layer.dtype), roofline.bounded_by(cost, chip, layer.dtype)
    bound = roofline.layer_bound(layer, chip, "forward" if op == "experts" else "both")
    compute = math.fsum(part.seconds for part in bound.ops if part.bounded_by == "compute")
    return bound.seconds, "compute" if 2 * compute >= bound.seconds else "memory"


def chip_of(device_name: str) -> str | None:
    """Name in ``sonic.roofline.CHIPS`` of a GPU, or None; boards with other figures than the chip's do not count."""
    words = re.findall(r"[A-Z0-9]+", device_name.upper())
    if any(part in words for part in _PARTS):
        return None
    return next((chip for chip in roofline.CHIPS if chip.upper() in words), None)


def measure_cell(
    name: str,
    shape: Shape,
    op: str,
    dtype_name: str,
    routing: Routing,
    contenders: Mapping[str, Callable[[str, Inputs], Contender]],
    *,
    device: torch.device,
    chip: str | None = None,
    skew: float = 0.0,
    rounds: int | None = None,
    begins: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Check, then time all contenders on one op and shape, and return a cell as in the JSON (without its command).

    Args:
        name: of the shape.
        shape: sizes.
        op: one of :data:`OPS`.
        dtype_name: a key of :data:`DTYPES`.
        routing: from :func:`benchmarks.kernel_rivals.make_routing`.
        contenders: builders by name, called with the op and its inputs.
        device: where to run.
        chip: a name in ``sonic.roofline.CHIPS`` to hold the times against; None: no bound.
        skew: as given to the routing; only noted.
        rounds: timed rounds; None: 25 on a GPU, as many as fit in ten seconds on a CPU.
        begins: called with the name of each contender before it runs for the first time, and with ``TIMING`` before
            they are timed.

    Raises:
        Unusable: a contender left the GPU in a state in which nothing can run.
    """
    dtype = DTYPES[dtype_name]
    layer = roofline.Layer(shape.T, shape.D, shape.N, shape.E, shape.K, dtype=dtype, tokens_per_expert=routing.counts)
    cost = cost_of(op, layer)
    bound, bounded_by = (None, None) if chip is None else bound_of(op, layer, chip)
    judge = torch.float64 if cost.flops <= _FLOAT64_FLOPS else torch.float32
    cell: dict[str, Any] = {
        "name": name,
        "shape": dataclasses.asdict(shape),
        "op": op,
        "dtype": dtype_name,
        "skew": skew,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "bound_us": None if bound is None else bound * 1e6,
        "bounded_by": bounded_by,
        "reference": str(judge).removeprefix("torch."),
        "tokens_per_expert": {
            "min": min(routing.counts),
            "mean": shape.T * shape.K / shape.E,
            "max": max(routing.counts),
        },
        "clock": "events" if device.type == "cuda" else "wall",
        "rounds": 0,
        "steps": 0,
        "disturbed_steps": 0,
        "missing": {},
        "contenders": {},
    }
    needed, free = kernel_rivals.size_in_bytes(op, shape, dtype), _free_bytes(device)
    if free is not None and needed > free:
        too_large = f"operands and results take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        cell["missing"] = dict.fromkeys(contenders, too_large)
        return cell
    inputs = kernel_rivals.make_inputs(op, shape, dtype, device, routing, SEED)
    calls: dict[str, Callable[[], Any]] = {}
    for contender_name, build in contenders.items():
        begins(contender_name)
        contender: Contender | None = None
        result: Any = None
        why: str | None = None
        try:
            contender = build(op, inputs)
            entry: dict[str, Any] = {"kind": contender.kind, "error": {}, "wrong": None}
            result = contender.call()  # compiles, tunes and warms up
            if contender.named is not None:
                tolerance = TOPK_TOLERANCE if op == "topk_softmax" else TOLERANCE[dtype_name]
                entry["error"], entry["wrong"] = _check(contender.named(result), inputs, judge, tolerance)
        except (Unavailable, ImportError, sonic.kernels.UnsupportedError) as error:
            why = str(error)  # an ImportError: kernels that are imported when they are first called
        except torch.OutOfMemoryError:
            why = "out of memory"
        except Exception as error:  # whatever foreign code raises: the others are measured all the same
            why = report.failure(error)
            traceback.print_exc()
            _demand_sound(device, contender_name)
        if contender is None or why is not None:
            contender = result = None
            _release(device)
            cell["missing"][contender_name] = why
            continue
        # The allocator hands the same memory to the next contender: it must not find a right result there.
        for tensor in _tensors(result):
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)
        del result
        cell["contenders"][contender_name] = entry
        if entry["wrong"] is None:
            calls[contender_name] = contender.call
    if calls:
        begins(TIMING)
        _time(cell, calls, device, rounds)
    return cell


def main(
    argv: Sequence[str] | None = None,
    name: str = "kernels",
    *,
    rivals: Mapping[str, Callable[..., Contender]] | None = None,
    backend: Callable[[str, Inputs, str, bool], Contender] = kernel_rivals.sonic_backend,
    why_not: Callable[[str], str | None] = kernel_rivals.why_not_importable,
) -> int:
    """Run the benchmark from the command line.

    Args:
        argv: of the command line; None: those of the process.
        name: of the benchmark, in its report and in the names of its files.
        rivals: builders by name; None: those of :mod:`benchmarks.kernel_rivals`.
        backend: builds the contender of one of sonic's backends.
        why_not: says of a rival's name why it cannot be imported here, or None.

    Returns:
        0; 1 if a contender computes something wrong or fails; 3 if one left the GPU unusable: run it again.
    """
    rivals = kernel_rivals.RIVALS if rivals is None else rivals
    parser = _parser(name, rivals)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.chip is not None and device.type == "cpu":
        parser.error("argument --chip: this run is on a CPU, which has no figures in sonic.roofline")
    shapes = dict(arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES))
    rounds = arguments.repeats or (3 if arguments.quick else None)
    backends = arguments.backends or (("reference",) if device.type == "cpu" else ("triton", "cute"))
    contenders = _contenders(arguments, backends, rivals, backend)
    missing = {name: why for name in arguments.rivals if (why := why_not(name)) is not None}
    ops = arguments.ops or OPS
    if arguments.dry_run:
        print(f"would measure {', '.join(ops)} at {', '.join(shapes)} in {arguments.dtype}; importable here:")
        print(", ".join(contender for contender in contenders if contender not in missing))
        for rival, why in missing.items():
            print(f"not importable: {rival}: {why}")
        return 0

    found = report.new_report(name, sys.argv[1:] if argv is None else argv, missing)
    found |= {"seed": SEED, "device": _device_report(device, arguments.chip)}
    print(_device_line(found["device"]))
    out = arguments.out
    if out is None and not arguments.quick:
        chip_slug = measure.slug(found["device"]["chip"] or found["device"]["name"])
        out = report.RESULTS / f"{name}_{chip_slug}_{found['machine']['date']}.json"
    if out is not None and out.exists() and not arguments.overwrite:
        found["cells"] = _earlier_cells(parser, out, found)
    cells = found["cells"]
    began = time.monotonic()
    left_out: list[str] = []
    with _Running(out) as running:
        for shape_name, shape in shapes.items():
            routing: Routing | None = None
            for op in ops:
                place = _place(cells, shape, op, arguments)
                if place is not None and contenders.keys() <= {*cells[place]["contenders"], *cells[place]["missing"]}:
                    print(f"{op}, {shape_name}: already in {out}; --overwrite measures it again")
                    continue
                if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
                    left_out.append(f"{op}, {shape_name}")
                    continue
                if routing is None:
                    routing = kernel_rivals.make_routing(shape, device, arguments.skew, SEED)
                options = {"device": device, "chip": found["device"]["chip"], "skew": arguments.skew, "rounds": rounds}
                key = [op, str(shape), arguments.dtype, str(arguments.skew)]
                able, options["begins"] = running.able(key, contenders), functools.partial(running.begins, key)
                try:
                    cell = measure_cell(shape_name, shape, op, arguments.dtype, routing, able, **options)
                except Unusable as error:
                    running.leave()
                    print(f"{error}; run the same command again to go on without it", file=sys.stderr)
                    return 3
                running.ends()
                cell["command"] = found["command"]
                if place is None:
                    cells.append(cell)
                else:
                    cells[place] = cell
                _release(device)
                print("\n" + _section(cell, missing).text(), flush=True)
                if out is not None:
                    _write(found, out)
    if left_out:
        print(f"left out after {arguments.seconds:g} s: {'; '.join(left_out)}")
        found["left_out"] = left_out
        if out is not None:
            _write(found, out)
    if out is not None and out.exists():
        print(f"wrote {out} and {out.with_suffix('.md')}")
    wrong = [
        f"{name} in {_title(cell)}: {entry['wrong']}"
        for cell in cells
        for name, entry in cell["contenders"].items()
        if entry["wrong"] is not None
    ]
    for what in wrong:
        print(f"WRONG RESULT: {what}")
    failed = [
        f"{name} in {_title(cell)}: {why}"
        for cell in cells
        for name, why in cell["missing"].items()
        if why.startswith(report.FAILED)
    ]
    for what in failed:
        print(what)
    return 1 if wrong or failed else 0


_DEATHS = 2


class _Running:
    """Knows of every cell which contenders took an earlier process with them: a file beside the results says who runs.

    The file stays only where the process was killed, or left on purpose, while a contender ran. Whoever runs when a
    process is killed may be innocent, so a contender is tried again once. Who is to blame is left out of all further
    cells, until a run comes to its end.
    """

    def __init__(self, out: Path | None) -> None:
        self.path = None if out is None else out.with_name(f".{out.name}.running")
        self.dead: dict[str, dict[str, int]] = {}  # cell -> contender -> how often
        self.now: tuple[str, str] | None = None
        self.stays = False

    def __enter__(self) -> _Running:
        if self.path is not None and self.path.exists():
            held = json.loads(self.path.read_text())
            self.dead = held["dead"]
            if held["now"] is not None:
                cell, name = held["now"]
                deaths = self.dead.setdefault(cell, {})
                deaths[name] = deaths.get(name, 0) + (_DEATHS if held["is_sure"] else 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *why: object) -> None:
        self.now = self.now if self.stays else None
        if kind is None and not self.stays:
            self.dead = {}
        self._write()

    def able(self, key: Sequence[str], contenders: Mapping[str, Any]) -> dict[str, Any]:
        """The contenders; in place of each that is to blame, or of all if it was timing here, one that says so."""
        blamed = {name for cell in self.dead.values() for name, deaths in cell.items() if deaths >= _DEATHS} - {TIMING}
        if self.dead.get(" ".join(key), {}).get(TIMING, 0) >= _DEATHS:
            blamed |= contenders.keys()
        return {name: _died if name in blamed else build for name, build in contenders.items()}

    def begins(self, key: Sequence[str], name: str) -> None:
        """A contender is about to run."""
        self.now = (" ".join(key), name)
        self._write()

    def ends(self) -> None:
        """A cell is done."""
        self.now = None
        self._write()

    def leave(self) -> None:
        """Keep the name of who runs."""
        self.stays = True

    def _write(self) -> None:
        if self.path is None:
            return
        if self.now is None and not self.dead:
            self.path.unlink(missing_ok=True)
        else:
            report.replace_file(self.path, json.dumps({"now": self.now, "is_sure": self.stays, "dead": self.dead}))


def _died(op: str, inputs: Inputs) -> Contender:
    raise ChildProcessError("an earlier process died, or was killed, while it ran")


def _demand_sound(device: torch.device, name: str) -> None:
    """Raise where a failure has left the GPU unusable for this process."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise Unusable(f"{name} left the GPU unusable: {error}") from error


# -------------------------------------------------------------------------------------------------------- command line


def _parser(name: str, rivals: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    rivals = kernel_rivals.RIVALS if rivals is None else rivals
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="SHAPE",
        help=f"names ({', '.join((*SHAPES, *QUICK_SHAPES))}) or T,D,N,E,K; default: all published",
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the matrices (default: %(default)s)")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=sonic.kernels.backends(),
        metavar="BACKEND",
        help=f"of {', '.join(sonic.kernels.backends())}; default: triton and cute on a GPU, reference on a CPU",
    )
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=list(rivals),
        default=list(rivals),
        metavar="RIVAL",
        help=f"of {', '.join(rivals)}; default: all",
    )
    parser.add_argument("--tune", action="store_true", help="let QuACK search its configurations; minutes per shape")
    parser.add_argument("--skew", type=_sigma, default=0.0, help="sigma of the experts' log-normal popularity")
    parser.add_argument("--repeats", type=_positive, help="timed rounds; default: 25 on a GPU, 5 to 25 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--chip", choices=list(roofline.CHIPS), help="whose roofline holds; default: by the name of the device"
    )
    parser.add_argument(
        "--out",
        type=_json_path,
        metavar="FILE.json",
        help="the page goes beside it; default: benchmarks/results/kernels_<chip>_<date>.json, with --quick none",
    )
    parser.add_argument("--overwrite", action="store_true", help="do not go on with the file of an earlier run")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, three rounds: only to see that it runs")
    parser.add_argument("--seconds", type=_sigma, metavar="S", help="begin no further op after so long; default: all")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and measure nothing")
    return parser


def _shape(text: str) -> tuple[str, Shape]:
    named = {**SHAPES, **QUICK_SHAPES}
    if text in named:
        return text, named[text]
    try:
        return text, Shape.parse(text)
    except ValueError:
        wanted = f"expected one of {', '.join(named)}, or T,D,N,E,K: five positive integers with K <= E"
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, {wanted}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a positive integer")
    return int(text)


def _sigma(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a finite number from 0")
    return value


def _json_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a name that ends in .json")
    return path


def _contenders(
    arguments: argparse.Namespace,
    backends: Sequence[str],
    rivals: Mapping[str, Callable[..., Contender]],
    sonic_backend: Callable[[str, Inputs, str, bool], Contender],
) -> dict[str, Callable[[str, Inputs], Contender]]:
    """Builders of all contenders that were asked for, present or not, by name."""

    def backend(name: str) -> Callable[[str, Inputs], Contender]:
        insist = arguments.backends is not None
        return lambda op, inputs: sonic_backend(op, inputs, name, insist)

    # Backends that were not asked for, and cannot serve here, are listed with their reasons.
    all_names = sonic.kernels.backends() if arguments.backends is None else backends
    contenders: dict[str, Callable[[str, Inputs], Contender]] = {}
    for name in all_names:
        contenders[f"sonic/{name}"] = backend(name) if name in backends else _not_by_default(name)
    for name in arguments.rivals:
        if name == "quack" and arguments.tune:
            contenders["quack tuned"] = functools.partial(kernel_rivals.quack, tuned=True)
        else:
            contenders[name] = rivals[name]
    return contenders | kernel_rivals.YARDSTICKS


def _not_by_default(name: str) -> Callable[[str, Inputs], Contender]:
    def build(op: str, inputs: Inputs) -> Contender:
        kernel_rivals.sonic_backend(op, inputs, name, False)  # its own reasons come first
        raise Unavailable(f"not measured on a {inputs.device.type} unless --backends names it")

    return build


def _earlier_cells(parser: argparse.ArgumentParser, out: Path, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cells of the file of an earlier run, which must be of the same machine and versions."""
    try:
        earlier = json.loads(out.read_text())
        same = earlier["device"] == found["device"] and earlier["machine"]["torch"] == found["machine"]["torch"]
        cells: list[dict[str, Any]] = earlier["cells"]
    except (ValueError, KeyError, TypeError):
        parser.error(f"argument --out: {out} is no file of this benchmark; name another, or give --overwrite")
    if not same:
        was = f"{_device_line(earlier['device'])}, torch {earlier['machine']['torch']}"
        parser.error(f"argument --out: {out} holds figures of {was}; name another, or give --overwrite")
    return cells


def _place(cells: Sequence[Mapping[str, Any]], shape: Shape, op: str, arguments: argparse.Namespace) -> int | None:
    """Where the cells hold this shape, op, dtype and skew."""
    key = (dataclasses.asdict(shape), op, arguments.dtype, arguments.skew)
    keys = [tuple(cell[part] for part in ("shape", "op", "dtype", "skew")) for cell in cells]
    return keys.index(key) if key in keys else None


# --------------------------------------------------------------------------------------------------------------- right


class _Errors:
    """Errors of one tensor, taken part by part: norm of the error over that of what is right, and the worst row."""

    def __init__(self) -> None:
        self.rows = 0
        self.wanted_2, self.error_2, self.worst_2 = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def add(self, value: Tensor, wanted: Tensor) -> None:
        """Take in a part, of the same shape and at least one value; vectors count as rows of one."""
        width = wanted.shape[-1] if wanted.ndim > 1 else 1
        wanted = wanted.reshape(-1, width)
        error_2 = (value.reshape(-1, width).to(wanted.dtype) - wanted).square().sum(dim=1).double()
        self.rows += wanted.shape[0]
        # Sums stay on the device: a synchronisation for each expert would take longer than all else.
        self.wanted_2 = self.wanted_2.to(wanted.device) + wanted.square().sum(dtype=torch.float64)
        self.error_2 = self.error_2.to(wanted.device) + error_2.sum()
        self.worst_2 = torch.maximum(self.worst_2.to(wanted.device), error_2.amax())

    @property
    def relative(self) -> float:
        """Norm of the error over the norm of what is right."""
        return _root_of_ratio(self.error_2.item(), self.wanted_2.item())

    @property
    def worst_row(self) -> float:
        """Largest norm of a row of the error over the root mean square of the rows' norms."""
        return _root_of_ratio(self.worst_2.item(), self.wanted_2.item() / max(self.rows, 1))


def _check(
    result: Mapping[str, Tensor], inputs: Inputs, judge: torch.dtype, tolerance: tuple[float, float]
) -> tuple[dict[str, dict[str, float | None]], str | None]:
    """Errors of every tensor of a result, and what is wrong with it, if anything."""
    result = {name: tensor.detach() for name, tensor in result.items()}
    for name in kernel_rivals.RESULTS[inputs.op]:
        tensor, size = result[name], kernel_rivals.size_of(name, inputs.shape)
        if tensor.shape != size:
            return {}, f"{name} is {tuple(tensor.shape)}, expected {size}"
        if name in _INTEGERS and tensor.is_floating_point():
            return {}, f"{name} is {tensor.dtype}, expected integers"
    if inputs.op == "topk_softmax":
        # Two experts with nearly the same logit may change places: their logits are compared, not their numbers.
        experts_TK = result["experts"].long()
        if ((experts_TK < 0) | (experts_TK >= inputs.shape.E)).any():
            return {}, f"experts has numbers outside 0 to {inputs.shape.E - 1}"
        result["experts"] = inputs.tensors["logits"].gather(1, experts_TK)
    elif inputs.op == "build_plan":
        # In which order the rows of one token come is the backend's choice.
        by_token = result["row_by_token"]
        result["row_by_token"] = by_token.view(-1, inputs.shape.K).sort(dim=1).values.view(-1)
    found = {name: _Errors() for name in kernel_rivals.RESULTS[inputs.op]}
    with torch.no_grad(), _full_precision():
        for name, where, wanted in _reference(inputs, judge):
            if wanted.numel():
                found[name].add(result[name][where], wanted)
    errors: dict[str, dict[str, float | None]] = {}
    wrong = None
    for name, error in found.items():
        relative, worst_row = error.relative, error.worst_row
        errors[name] = {"relative": _finite(relative), "worst_row": _finite(worst_row)}
        limits = tolerance if result[name].is_floating_point() else (0.0, 0.0)
        # Written so that NaN counts as wrong.
        if not (relative <= limits[0] and worst_row <= limits[1]) and wrong is None:
            wrong = (
                f"{name} has a relative error of {relative:.1e}, in its worst row {worst_row:.1e}; "
                f"expected at most {limits[0]:.0e} and {limits[1]:.0e}"
            )
    return errors, wrong


_INTEGERS = ("experts", *kernel_rivals.RESULTS["build_plan"])


def _reference(inputs: Inputs, judge: torch.dtype) -> Iterator[tuple[str, Any, Tensor]]:
    """What is right, by definition and in ``judge``, part by part: a result's name, where in it, and the values."""
    op, shape, routing = inputs.op, inputs.shape, inputs.routing
    if op == "topk_softmax":
        top_TK = inputs.tensors["logits"].to(judge).topk(shape.K, dim=-1).values
        yield "scores", ..., top_TK.softmax(dim=-1)
        yield "experts", ..., top_TK
    elif op == "build_plan":
        num_slots = shape.T * shape.K
        expert_P = routing.expert_TK.view(-1).long()
        slots_P = torch.arange(num_slots, device=expert_P.device)
        slot_R = (expert_P * num_slots + slots_P).sort().values % num_slots
        count_E = torch.bincount(expert_P, minlength=shape.E)
        parts = {
            "expert_offset": F.pad(count_E.cumsum(0), (1, 0)),
            "token_of_row": slot_R // shape.K,
            "slot_of_row": slot_R,
            "row_by_token": (slot_R // shape.K).argsort(stable=True),
            "token_offset": torch.arange(shape.T + 1, device=expert_P.device) * shape.K,
        }
        yield from ((name, ..., value.to(judge)) for name, value in parts.items())
    elif op == "combine":
        y_RD = inputs.tensors["y"]
        for start in range(0, shape.T, _TOKENS_PER_BLOCK):
            block = slice(start, start + _TOKENS_PER_BLOCK)
            score_TK1 = inputs.scores_TK[block, :, None].to(judge)
            yield "out", block, (y_RD[routing.row_TK[block]].to(judge) * score_TK1).sum(dim=1)
    else:
        yield from _reference_by_expert(inputs, judge)


def _reference_by_expert(inputs: Inputs, judge: torch.dtype) -> Iterator[tuple[str, Any, Tensor]]:
    """The same for the ops that have matrix products: one expert after the other, ``r`` being its rows."""
    op, routing = inputs.op, inputs.routing
    t = {name: tensor.detach() for name, tensor in inputs.tensors.items()}
    out_TD = dx_TD = dscores_P = torch.empty(0)
    if op.startswith("experts"):
        out_TD, dx_TD = (torch.zeros(t["x"].shape, dtype=judge, device=inputs.device) for _ in range(2))
        dscores_P = torch.zeros(routing.slot_R.shape, dtype=judge, device=inputs.device)
    end = 0
    for e, count in enumerate(routing.counts):
        r = slice(end, end := end + count)
        token_r, score_r1 = routing.token_R[r], routing.row_scores_R[r, None].to(judge)

        def rows_of(name: str, r: slice = r, token_r: Tensor = token_r) -> Tensor:
            return (t[name][token_r] if name in ("x", "dout") else t[name][r]).to(judge)

        def weight_of(name: str, e: int = e) -> Tensor:
            return t[name][e].to(judge)

        if op == "up_proj":
            h_rU = rows_of("x") @ weight_of("w1").t()
            yield "h", r, h_rU
            yield "a", r, _activation(h_rU)[0]
        elif op == "down_proj":
            yield "y", r, rows_of("a") @ weight_of("w2").t()
        elif op == "down_proj_bwd_input":
            da_rN = rows_of("dout") @ weight_of("w2")
            a_rN, slope_rU = _activation(rows_of("h"))
            yield "dh", r, slope_rU * (score_r1 * da_rN).repeat(1, 2)
            yield "scaled_a", r, score_r1 * a_rN
            yield "row_dscores", r, (da_rN * a_rN).sum(dim=1)
        elif op == "down_proj_bwd_weight":
            yield "dw2", e, rows_of("dout").t() @ rows_of("scaled_a")
        elif op == "up_proj_bwd_input":
            yield "dx_rows", r, rows_of("dh") @ weight_of("w1")
        elif op == "up_proj_bwd_weight":
            yield "dw1", e, rows_of("dh").t() @ rows_of("x")
        else:
            x_rD, w1_UD, w2_DN = rows_of("x"), weight_of("w1"), weight_of("w2")
            a_rN, slope_rU = _activation(x_rD @ w1_UD.t())
            out_TD.index_add_(0, token_r, score_r1 * (a_rN @ w2_DN.t()))
            if op == "experts":
                continue
            dout_rD = rows_of("dout")
            da_rN = dout_rD @ w2_DN
            dscores_P[routing.slot_R[r]] = (da_rN * a_rN).sum(dim=1)
            dh_rU = slope_rU * (score_r1 * da_rN).repeat(1, 2)
            dx_TD.index_add_(0, token_r, dh_rU @ w1_UD)
            yield "dw1", e, dh_rU.t() @ x_rD
            yield "dw2", e, dout_rD.t() @ (score_r1 * a_rN)
    if op.startswith("experts"):
        yield "out", ..., out_TD
    if op == "experts_fwd_bwd":
        yield "dx", ..., dx_TD
        yield "dscores", ..., dscores_P.view(inputs.scores_TK.shape)


def _activation(h_rU: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU of rows (r, U), and its derivatives to gate and up, (r, U)."""
    gate_rN, up_rN = h_rU.chunk(2, dim=-1)
    sigmoid_rN = gate_rN.sigmoid()
    silu_rN = gate_rN * sigmoid_rN
    return silu_rN * up_rN, torch.cat((up_rN * sigmoid_rN * (1 + gate_rN - silu_rN), silu_rN), dim=-1)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 in float32, whatever was chosen for this process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _root_of_ratio(above: float, below: float) -> float:
    return math.sqrt(above / below) if below else (0.0 if above == 0 else math.inf)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other numbers


# ---------------------------------------------------------------------------------------------------------------- fast


def _time(
    cell: dict[str, Any], calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int | None
) -> None:
    """Time the calls and write what comes of it into the cell."""
    calls = dict(calls)
    for name in list(calls):  # now that everything that contenders keep is there
        fits = True
        try:
            calls[name]()
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # what the failed call had is free only now
            del calls[name], cell["contenders"][name]
            cell["missing"][name] = "out of memory beside the other contenders"
            _release(device)
    if not calls:
        return
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        timed = measure.interleaved_on_gpu(
            calls, rounds=rounds or 25, device=device, flush_bytes=max(2 * l2_bytes, _LEAST_FLUSH)
        )
    else:
        steps = {name: _on_the_wall(call) for name, call in calls.items()}
        timed = measure.interleaved(steps, rounds=rounds, seconds=10, slow_factor=math.inf)
    cell |= {"rounds": timed.rounds, "steps": timed.steps, "disturbed_steps": timed.disturbed}
    laps = {name: of["seconds"] for name, of in timed.laps.items()}
    backends = [name for name in calls if cell["contenders"][name]["kind"] == "backend"]
    for name, samples in laps.items():
        low, median, high, count = _quartiles(samples)
        entry = cell["contenders"][name]
        entry |= {
            "median_us": median * 1e6,
            "p25_us": low * 1e6,
            "p75_us": high * 1e6,
            "count": count,
            "tflops": cell["flops"] / median / 1e12 if cell["flops"] else None,
            "gbytes_per_second": cell["bytes"] / median / 1e9,
            "fraction_of_bound": None if cell["bound_us"] is None else cell["bound_us"] / (median * 1e6),
            "times_as_long_as": {},
        }
        for backend in backends:
            if backend == name:
                continue
            pairs = zip(samples, laps[backend], strict=True)
            ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
            low, median, high, _ = _quartiles(ratios)
            entry["times_as_long_as"][backend] = {"median": median, "p25": low, "p75": high}


_LEAST_FLUSH = 256 * 2**20


def _on_the_wall(call: Callable[[], Any]) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}

    return step


def _quartiles(samples: Sequence[float | None]) -> tuple[float, float, float, int]:
    """First quartile, median, third quartile and number of the samples that are not None."""
    values = [sample for sample in samples if sample is not None]
    if len(values) == 1:
        return values[0], values[0], values[0], 1
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high, len(values)


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a device has to give; on a CPU all that it has, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _release(device: torch.device) -> None:
    """Give back what the last contenders had, cycles of references included; a CPU has it back already."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


# ---------------------------------------------------------------------------------------------------------------- told


def _device_report(device: torch.device, chip: str | None) -> dict[str, Any]:
    name, l2_bytes = measure.cpu_name(), None
    if device.type == "cuda":
        name, l2_bytes = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).L2_cache_size
        chip = chip or chip_of(name)
    versions = {"sonic": sonic.__version__, "torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}
    for package in ("triton", "nvidia-cutlass-dsl", "scattermoe", "quack-kernels"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    try:
        grouped_mm = kernel_rivals.grouped_mm_function()[1]
    except Unavailable as error:
        grouped_mm = str(error)
    return {"name": name, "chip": chip, "l2_bytes": l2_bytes, "versions": versions, "grouped_mm": grouped_mm}


def _device_line(device: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items() if version is not None)
    chip = f"held against the {device['chip']} of sonic.roofline" if device["chip"] else "without a roofline"
    return f"{device['name']}, {chip}; {versions}; the contender torch calls {device['grouped_mm']}"


def _title(cell: Mapping[str, Any]) -> str:
    sizes = " ".join(f"{letter}={size}" for letter, size in cell["shape"].items())
    skew = f", skew {cell['skew']:g}" if cell["skew"] else ""
    return f"{cell['op']}, {cell['name']} ({sizes}), {cell['dtype']}{skew}"


def _timed(cell: Mapping[str, Any], kind: str | None = None) -> dict[str, Mapping[str, Any]]:
    """Contenders that have times, fastest first."""
    entries = [
        (name, entry)
        for name, entry in cell["contenders"].items()
        if "median_us" in entry and kind in (None, entry["kind"])
    ]
    return dict(sorted(entries, key=lambda pair: pair[1]["median_us"]))


def _or_empty(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _section(cell: Mapping[str, Any], missing: Iterable[str]) -> Section:
    """The table of one cell; ``missing`` are contenders that are missing everywhere, as the head of the page says."""
    backends = list(_timed(cell, "backend"))
    head = ["", "us", "p25..p75", "TFLOP/s", "GB/s", "of the bound", *(f"{name} is x faster" for name in backends)]
    rows = []
    for name, entry in _timed(cell).items():
        role = " (yardstick)" if entry["kind"] == "yardstick" else ""
        row = [name + role, f"{entry['median_us']:.1f}", f"{entry['p25_us']:.1f}..{entry['p75_us']:.1f}"]
        row += [_or_empty(entry["tflops"], ".4g"), f"{entry['gbytes_per_second']:.4g}"]
        row.append(_or_empty(entry["fraction_of_bound"], ".0%"))
        ratios = entry["times_as_long_as"]
        row += [f"{ratios[backend]['median']:.2f}" if backend in ratios else "" for backend in backends]
        worst = [error["relative"] for error in entry["error"].values()]
        row.append(f"{max(worst):.1e}" if worst else "")
        rows.append(row)
    load = cell["tokens_per_expert"]
    clock = "events of the GPU, L2 flushed"
    if cell["clock"] == "wall":
        clock = f"wall time, {cell['disturbed_steps']} of {cell['steps']} steps disturbed by other processes"
    notes = [
        f"{cell['rounds']} rounds; {clock}; "
        f"rows per expert {load['min']} to {load['max']}, mean {load['mean']:.0f}; checked in {cell['reference']}"
    ]
    if cell["bound_us"] is not None:
        notes.append(f"bound {cell['bound_us']:.1f} us, by {cell['bounded_by']}")
    notes += [
        f"WRONG, not timed: {name}: {entry['wrong']}"
        for name, entry in cell["contenders"].items()
        if entry["wrong"] is not None
    ]
    notes += [
        f"not measured: {name}: {why}"
        for name, why in cell["missing"].items()
        if name not in missing or why.startswith(report.FAILED)
    ]
    return Section(_title(cell), [*head, "worst error"], rows, notes)


def _summary(cells: Sequence[Mapping[str, Any]]) -> Section:
    """One line per op and shape: the fastest backend beside the fastest rival and the dense product."""
    rows = []
    for cell in cells:
        ours, theirs = next(iter(_timed(cell, "backend").items()), None), next(iter(_timed(cell, "rival")), None)
        row = [f"{cell['op']}, {cell['name']}, {cell['dtype']}"]
        if ours is None:
            rows.append([*row, *[""] * 8])
            continue
        name, entry = ours
        row += [name, f"{entry['median_us']:.1f}", _or_empty(entry["tflops"], ".4g")]
        row += [f"{entry['gbytes_per_second']:.4g}", _or_empty(entry["fraction_of_bound"], ".0%"), theirs or ""]
        for other in (theirs, "dense"):
            ratios = cell["contenders"].get(other, {}).get("times_as_long_as", {})
            row.append(f"{ratios[name]['median']:.2f}" if name in ratios else "")
        rows.append(row)
    head = ["op, shape", "fastest backend", "us", "TFLOP/s", "GB/s", "of the bound", "fastest rival"]
    return Section("Summary", [*head, "backend is x faster than it", "than dense"], rows, [])


def _low(cells: Sequence[Mapping[str, Any]]) -> str:
    """The part of the page on ops whose fastest backend stays far from the bound."""
    lines = []
    for cell in cells:
        for name, entry in list(_timed(cell, "backend").items())[:1]:
            fraction = entry["fraction_of_bound"]
            if fraction is None or fraction >= LOW:
                continue
            compute = "" if entry["tflops"] is None else f"{entry['tflops']:.4g} TFLOP/s, "
            lines.append(
                f"- {_title(cell)}: {fraction:.0%} of the bound with {name}. Bounded by {cell['bounded_by']}, "
                f"{cell['bound_us']:.1f} us; measured {entry['median_us']:.1f} us ({entry['p25_us']:.1f} to "
                f"{entry['p75_us']:.1f}), {compute}{entry['gbytes_per_second']:.4g} GB/s."
            )
    if not lines:
        known = any(cell["bound_us"] is not None for cell in cells)
        lines = ["Nothing." if known else "sonic.roofline has no figures for this device, so no bound is known."]
    return f"## Below {LOW:.0%} of the bound\n\n" + "\n".join(lines)


def _write(found: Mapping[str, Any], out: Path) -> None:
    """Write the JSON and the page beside it."""
    report.replace_file(out, json.dumps(found, indent=1) + "\n")
    cells = found["cells"]
    preface = (
        "Medians and quartiles; ratios are medians of the ratio within each round. Gathered rows count once per row in "
        "the bytes and the bound, so a kernel that finds tokens in its L2 can pass both. Yardsticks compute less than "
        "the op and are not checked."
    )
    paragraphs = [_device_line(found["device"]), measure.machine_line(found["machine"]), preface, _low(cells)]
    sections = [_summary(cells), *(_section(cell, found["missing"]) for cell in cells)]
    report.replace_file(out.with_suffix(".md"), report.page(found, "Speed of every op", paragraphs, sections))


if __name__ == "__main__":
    raise SystemExit(main())
