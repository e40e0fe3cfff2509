"""What only a GPU can show, checked and counted: ``python -m benchmarks.gpu_checks``.

=========  ===========================================================================================================
check      passes if
=========  ===========================================================================================================
graph      forward and backward are captured in one CUDA graph, and its replay on other tokens and another routing gives
           what running them does: to the last bit for ``sonic.moe_mlp``, within 2% for a whole ``sonic.MoE``, whose
           router may choose another of two equal experts
sync       a step runs under ``torch.cuda.set_sync_debug_mode("error")``: the host waits for nothing
rounding   a layer with ``TokenRounding`` in training gives every expert whole tiles of the kernel that runs, computes
           what the reference computes with the same plan, forward and backward, and is the plain layer in eval mode;
           told beside it: step time against plain top-K in the same rounds, rows, and how often the host waits
=========  ===========================================================================================================

The first two are done for every backend that can run here, without a GPU they are marked ``needs a GPU``. Rounding runs
on a CPU too, on a small layer and with a tile of 16 rows (plain torch has no tiles).

``--json`` writes::

    {"benchmark": "gpu_checks", "command": str, "machine": {...}, "missing": {}, "device": str,
     "cells": [{"check": str, "what": str, "status": "passed" | "failed" | "needs a GPU", "why": str | None,
                "figures": {name: number}}]}
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sonic
from benchmarks import kernel_rivals, measure
from benchmarks.cpu_moe import Shape
from benchmarks.report import Section, failure, new_report, write_files

__all__ = ["CHECKS", "SHAPE", "main"]

CHECKS = ("graph", "sync", "rounding")
SHAPE = Shape(24576, 1536, 256, 128, 8)
SMALL = Shape(2048, 512, 256, 32, 4)
CPU_SHAPE = Shape(512, 64, 32, 8, 2)
CPU_TILE = 16
TOLERANCE = 2e-2
NEEDS_GPU = "needs a GPU"
Figures = dict[str, float]


class _Wrong(Exception):
    """A check found something else than it must."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks from the command line; returns 1 if one of them fails."""
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checks = arguments.only or CHECKS
    if arguments.dry_run:
        print(f"would check {', '.join(checks)} on {device}")
        return 0
    report = new_report("gpu_checks", sys.argv[1:] if argv is None else argv, {})
    report["device"] = measure.gpu_line(device) if device.type == "cuda" else measure.cpu_name()
    for check in checks:
        for what, run in _runs(check, device).items():
            cell = _cell(check, what, run)
            report["cells"].append(cell)
            figures = ", ".join(f"{name} {value:g}" for name, value in cell["figures"].items())
            print(
                f"{check}, {what}: {cell['status']}" + "".join(f"; {text}" for text in (cell["why"], figures) if text)
            )
    sections = [_section(report["cells"])]
    preface = "What only a GPU can show: captured graphs, a host that never waits, token rounding end to end."
    write_files(report, "Checks on a GPU", preface, sections, json_path=arguments.json, save=arguments.save)
    return 1 if any(cell["status"] == "failed" for cell in report["cells"]) else 0


def _runs(check: str, device: torch.device) -> dict[str, Callable[[], Figures] | None]:
    """What a check tries, by name; None where it needs a GPU."""
    if check == "rounding":
        return {"TokenRounding against top-K": lambda: _rounding(device)}
    if device.type == "cpu":
        return {"every backend": None}
    runs: dict[str, Callable[[], Figures] | None] = {}
    functions = {"moe_mlp": _mlp_step, "MoE": _layer_step}
    for backend in _backends(device):
        for name, make in functions.items():
            if check == "graph":
                runs[f"{name}, {backend}"] = lambda make=make, backend=backend: _graph(make, backend, device)
            else:
                runs[f"{name}, {backend}"] = lambda make=make, backend=backend: _sync(make, backend, device)
    return runs


def _backends(device: torch.device) -> list[str]:
    arch = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = major * 10 + minor
    usable = [name for name in sonic.kernels.backends() if not sonic.kernels.unusable_reasons(name, device.type, arch)]
    return [name for name in usable if name != "reference"]


def _cell(check: str, what: str, run: Callable[[], Figures] | None) -> dict[str, Any]:
    cell: dict[str, Any] = {"check": check, "what": what, "status": "passed", "why": None, "figures": {}}
    if run is None:
        return cell | {"status": NEEDS_GPU}
    try:
        cell["figures"] = run()
    except _Wrong as error:
        cell |= {"status": "failed", "why": str(error)}
    except Exception as error:  # whatever stands in the way of one check is not to stop the others
        cell |= {"status": "failed", "why": failure(error)}
    return cell


# --------------------------------------------------------------------------------------------------------------- steps


class _Step:
    """Inputs on the device that can be overwritten, and a step that reads them and returns output and gradients."""

    def __init__(self, inputs: Mapping[str, Tensor], run: Callable[[], list[Tensor]]) -> None:
        self.inputs = dict(inputs)
        self.run = run

    def load(self, other: _Step) -> None:
        """Take over the values of another step's inputs."""
        with torch.no_grad():
            for name, tensor in self.inputs.items():
                tensor.copy_(other.inputs[name])


def _mlp_step(backend: str, device: torch.device, seed: int) -> _Step:
    shape = SMALL
    routing = kernel_rivals.make_routing(shape, device, 0.0, seed)
    op = kernel_rivals.make_inputs("experts_fwd_bwd", shape, torch.bfloat16, device, routing, seed)
    index_TK = routing.expert_TK.long()

    def run() -> list[Tensor]:
        x_TD, w1_EUD, w2_EDN, scores_TK = op.leaves
        plan = sonic.RoutingPlan.from_topk(index_TK, shape.E, backend=backend)
        out_TD = sonic.moe_mlp(x_TD, w1_EUD, w2_EDN, scores_TK, plan, backend=backend)
        return [out_TD.detach(), *torch.autograd.grad(out_TD, op.leaves, op.tensors["dout"])]

    names = ("x", "w1", "w2", "scores")
    return _Step({"index": index_TK, "dout": op.tensors["dout"], **dict(zip(names, op.leaves, strict=True))}, run)


def _layer_step(backend: str, device: torch.device, seed: int) -> _Step:
    shape = SMALL
    torch.manual_seed(0)
    sizes = (shape.D, shape.N, shape.E, shape.K)
    layer = sonic.MoE(*sizes, backend=backend, device=device, dtype=torch.bfloat16)
    rng = torch.Generator(device=device).manual_seed(seed)
    x_TD, dout_TD = (
        torch.randn(shape.T, shape.D, generator=rng, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    x_TD.requires_grad_()

    def run() -> list[Tensor]:
        out_TD = layer(x_TD)
        return [out_TD.detach(), *torch.autograd.grad(out_TD, [x_TD, *layer.parameters()], dout_TD)]

    return _Step({"x": x_TD, "dout": dout_TD}, run)


# -------------------------------------------------------------------------------------------------------------- checks


def _graph(make: Callable[[str, torch.device, int], _Step], backend: str, device: torch.device) -> Figures:
    first, second = make(backend, device, 1), make(backend, device, 2)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries make their workspaces
            first.run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = first.run()
    first.load(second)
    graph.replay()
    torch.cuda.synchronize(device)
    wanted = second.run()
    errors = [measure.relative_error(got, want) for got, want in zip(captured, wanted, strict=True)]
    worst = max(errors)
    limit = 0.0 if make is _mlp_step else TOLERANCE
    if not worst <= limit:  # NaN is not
        raise _Wrong(f"replay differs from running by {worst:.1e}, expected at most {limit:g}")
    times = measure.interleaved_on_gpu(
        {"run": second.run, "replay": graph.replay}, rounds=10, device=device, flush_bytes=2**28
    ).laps
    medians = {name: measure.spread(laps["seconds"]).median * 1e6 for name, laps in times.items()}
    return {"error": worst, "run_us": medians["run"], "replay_us": medians["replay"]}


def _sync(make: Callable[[str, torch.device, int], _Step], backend: str, device: torch.device) -> Figures:
    step = make(backend, device, 1)
    step.run()  # compiles, which may wait
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return {}


def _rounding(device: torch.device) -> Figures:
    is_cpu = device.type == "cpu"
    shape, dtype = (CPU_SHAPE, torch.float32) if is_cpu else (SHAPE, torch.bfloat16)
    tile: int | str = CPU_TILE if is_cpu else "auto"
    routers = {"top-K": sonic.routing.TopKRouter(shape.D, shape.E, shape.K).to(device)}
    routers["rounded"] = sonic.routing.TokenRounding(routers["top-K"], tile_rows=tile)
    torch.manual_seed(0)
    plain = sonic.MoE(shape.D, shape.N, shape.E, shape.K, router=routers["top-K"], device=device, dtype=dtype)
    rounded = sonic.MoE(shape.D, shape.N, shape.E, shape.K, router=routers["rounded"], device=device, dtype=dtype)
    with torch.no_grad():
        rounded.w1.copy_(plain.w1)
        rounded.w2.copy_(plain.w2)
    x_TD, dout_TD = (torch.randn(shape.T, shape.D, device=device, dtype=dtype) for _ in range(2))
    x_TD.requires_grad_()

    layers = {"top-K": plain, "rounded": rounded}
    out_TD, routing = rounded(x_TD, return_routing=True)
    got = [out_TD, *torch.autograd.grad(out_TD, (rounded.w1, rounded.w2), dout_TD, retain_graph=True)]
    exact = torch.float64 if is_cpu else torch.float32
    weights = [weight.detach().to(exact).requires_grad_() for weight in (rounded.w1, rounded.w2)]
    scores_P = routing.scores.detach().to(exact)
    reference = sonic.moe_mlp(x_TD.detach().to(exact), *weights, scores_P, routing.plan, backend="reference")
    want = [reference, *torch.autograd.grad(reference, weights, dout_TD.to(exact))]
    error = max(measure.relative_error(have, true) for have, true in zip(got, want, strict=True))
    if not error <= TOLERANCE:
        raise _Wrong(f"the rounded layer is off the reference by {error:.1e}, expected at most {TOLERANCE:g}")
    plan = plain(x_TD, return_routing=True)[1].plan
    tile_rows = tile if isinstance(tile, int) else _tile_of(rounded, shape, dtype, device)
    counts_E, before_E = routing.plan.tokens_per_expert(), plan.tokens_per_expert()
    if tile_rows > 1 and (off := int((counts_E % tile_rows).ne(0).sum())):
        raise _Wrong(f"{off} of {shape.E} experts have no whole tiles of {tile_rows} rows")
    with torch.no_grad():
        for layer in layers.values():
            layer.eval()
        if not torch.equal(plain(x_TD), rounded(x_TD)):
            raise _Wrong("in eval mode the rounded layer is not the plain one")
        for layer in layers.values():
            layer.train()

    def step(layer: sonic.MoE) -> None:
        torch.autograd.grad(layer(x_TD), [x_TD, *layer.parameters()], dout_TD)

    calls = {name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}
    if is_cpu:
        laps = measure.interleaved({name: _on_the_wall(call) for name, call in calls.items()}, rounds=5).laps
        waits = 0
    else:
        laps = measure.interleaved_on_gpu(calls, rounds=15, device=device, flush_bytes=2**28).laps
        waits = _host_waits(calls["rounded"])
    over = measure.ratio(laps["rounded"]["seconds"], laps["top-K"]["seconds"])
    figures = {f"{name} ms": measure.spread(lap["seconds"]).median * 1e3 for name, lap in laps.items()}
    computed = [int(((count_E + tile_rows - 1) // tile_rows).sum()) * tile_rows for count_E in (before_E, counts_E)]
    return figures | {
        "rounded over top-K": over.median,
        "tile rows": tile_rows,
        "rows, top-K": int(before_E.sum()),
        "rows, rounded": int(counts_E.sum()),
        "computed rows, top-K": computed[0],
        "computed rows, rounded": computed[1],
        "error": error,
        "host waits": waits,
    }


def _tile_of(layer: sonic.MoE, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of the tile of the kernel that runs the layer."""
    answer = sonic.kernels.explain(
        "up_proj",
        num_tokens=shape.T,
        hidden_size=shape.D,
        intermediate_size=shape.N,
        num_experts=shape.E,
        top_k=shape.K,
        dtype=dtype,
        device=device,
    )
    return answer.tile_rows or 1


def _host_waits(call: Callable[[], None]) -> int:
    """How often the host waits for the GPU in one call."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _on_the_wall(call: Callable[[], None]) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}

    return step


def _section(cells: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for cell in cells:
        figures = ", ".join(f"{name} {value:g}" for name, value in cell["figures"].items())
        rows.append([f"{cell['check']}, {cell['what']}", cell["status"], cell["why"] or "", figures])
    return Section("Checks", ["check", "status", "why", "figures"], rows, [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_checks", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be checked, and check nothing")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
