"""Step times over a slow link: ``python -m benchmarks.overlap``.

Two processes on this machine share eight tensor-parallel sub-blocks. Computation is slept, so that it takes as long as
it
is said to on any machine: 20 ms forward, 20 ms for the gradient of the input, 20 ms for that of the weight. The link is
gloo behind one serial wire that makes every all-reduce take so many milliseconds. What is measured is therefore the
schedule alone, in the order in which autograd really runs it; tensors are small and real, and every variant's gradients
are compared with those of the blocking one.

Variants:

- ``standard, blocking``: every all-reduce is awaited where it is issued;
- ``standard``: the all-reduce of an input's gradient runs under the weight's, as in Megatron-LM;
- ``parallel``: attention and MLP side by side, one all-reduce for both;
- ``ladder, forward only``: backward awaits at once, as autograd by itself would;
- ``ladder``: the wait node's age is set (``backward_order="seqnr"``);
- ``ladder, early node``: ``backward_order="early"``.

``--json`` writes::

    {"benchmark": "overlap", "command": str, "machine": {...}, "missing": {}, "runs": int, "compute": seconds,
     "cells": [{"link": seconds, "variant": str, "forward", "backward", "total": {"best", "median", "worst"} in seconds,
                "model": {"forward", "backward"} or null, "hidden_share": float, "gradient_error": float}],
     "targets": {"ladder_over_standard_20ms": {"value", "target", "passed"}, ...}}

``model`` is what the dependencies alone would allow; the rest is the work of the small tensors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from benchmarks.delayed_link import delayed_mesh
from benchmarks.report import Section, new_report, target, write_files
from sonic.parallel import late_weight_gradient
from sonic.parallel.overlap_report import OverlapReport
from sonic.parallel.stack import LadderBlock, LadderStack

__all__ = ["VARIANTS", "main", "model_seconds"]

VARIANTS: dict[str, dict[str, Any]] = {
    "standard, blocking": {"wiring": "standard", "overlap": "off"},
    "standard": {"wiring": "standard"},
    "parallel": {"wiring": "parallel"},
    "ladder, forward only": {"wiring": "ladder", "backward_order": "blocking"},
    "ladder": {"wiring": "ladder"},
    "ladder, early node": {"wiring": "ladder", "backward_order": "early"},
}
LINKS = (0.0, 0.005, 0.010, 0.020, 0.035, 0.050)
COMPUTE = 0.020
LAYERS, WIDTH = 4, 8
TARGETS = {0.020: 1.2, 0.050: 1.3}


class Core(nn.Module):
    """A column-parallel, then a row-parallel product, of which the small one takes the time of large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(2))

    def forward(self, n: Tensor) -> Tensor:
        a = late_weight_gradient.linear(n, _Sleep.apply(self.up, 0.0, COMPUTE))
        return torch.nn.functional.linear(torch.tanh(_Sleep.apply(a, COMPUTE, COMPUTE)), self.down)


class _Sleep(torch.autograd.Function):
    """Identity that takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return grad, None, None


def model_seconds(variant: str, link: float) -> tuple[float, float] | None:
    """Forward and backward of the sub-blocks if nothing but their dependencies cost time; None: there is no model."""
    if variant == "parallel":
        return None
    is_ladder = variant.startswith("ladder")
    done, sent = [0.0, 0.0], [0.0, 0.0]  # of the two sub-blocks before
    for _ in range(2 * LAYERS):
        done = [done[1], max(done[1], sent[0] if is_ladder else sent[1]) + COMPUTE]
        sent = [sent[1], max(sent[1], done[1]) + link]
    forward = max(sent)
    if variant in ("standard, blocking", "ladder, forward only"):
        return forward, 2 * LAYERS * (2 * COMPUTE + link)
    done, sent = [0.0, 0.0], [0.0, 0.0]
    for _ in range(2 * LAYERS):
        begin = max(done[1], sent[0] if is_ladder else sent[1])
        sent = [sent[1], max(sent[1], begin + COMPUTE) + link]
        done = [done[1], begin + 2 * COMPUTE]
    return forward, max(*done, *sent)


def _step(stack: LadderStack, x: Tensor) -> tuple[float, float, OverlapReport, list[Tensor]]:
    stack.zero_grad()
    dist.barrier()
    with OverlapReport(overlap=False) as report:
        began = time.perf_counter()
        y = stack(x)
        half = time.perf_counter()
        y.square().sum().backward()
        ended = time.perf_counter()
    return half - began, ended - half, report, [p.grad for p in stack.parameters() if p.grad is not None]


def _rank(rank: int, folder: str, links: Sequence[float], runs: int, timelines: str | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cells = []
    for link in links:
        mesh = delayed_mesh([[0, 1]], latency=link)
        stacks, blocking = {}, {}
        for variant, options in VARIANTS.items():
            torch.manual_seed(rank)
            blocks = [LadderBlock(nn.Identity(), Core(), nn.Identity(), Core()) for _ in range(LAYERS)]
            stacks[variant] = LadderStack(blocks, tp_mesh=mesh, **options)
        x = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH).requires_grad_()
        for variant, stack in stacks.items():
            schedule, full = stack.schedule, stack.schedule.overlap
            schedule.overlap = "off"
            blocking[variant] = [grad.clone() for grad in _step(stack, x)[3]]
            schedule.overlap = full
        samples: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in VARIANTS}
        errors = {}
        for _ in range(runs):
            for variant, stack in stacks.items():
                forward, backward, report, grads = _step(stack, x)
                samples[variant].append((forward, backward, report.hidden_share))
                errors[variant] = max(
                    float((grad - want).abs().max() / want.abs().max())
                    for grad, want in zip(grads, blocking[variant], strict=True)
                )
                if timelines is not None and rank == 0 and link == 0.020 and variant in ("standard", "ladder"):
                    report.save_timeline(f"{timelines}_{variant}.png")
        for variant in VARIANTS:
            forwards, backwards, shares = zip(*samples[variant], strict=True)
            model = model_seconds(variant, link)
            cells.append(
                {
                    "link": link,
                    "variant": variant,
                    "forward": _best_median_worst(forwards),
                    "backward": _best_median_worst(backwards),
                    "total": _best_median_worst([f + b for f, b in zip(forwards, backwards, strict=True)]),
                    "model": None if model is None else {"forward": model[0], "backward": model[1]},
                    "hidden_share": statistics.median(shares),
                    "gradient_error": errors[variant],
                }
            )
    if rank == 0:
        torch.save(cells, f"{folder}/cells")
    dist.barrier()
    dist.destroy_process_group()


def _best_median_worst(values: Sequence[float]) -> dict[str, float]:
    return {"best": min(values), "median": statistics.median(values), "worst": max(values)}


def _section(link: float, cells: Sequence[dict[str, Any]]) -> Section:
    standard = next(cell for cell in cells if cell["variant"] == "standard")
    rows = []
    for cell in cells:
        model = cell["model"]
        rows.append(
            [
                cell["variant"],
                *(f"{1e3 * cell[phase]['median']:.0f}" for phase in ("forward", "backward")),
                "-" if model is None else f"{1e3 * model['forward']:.0f} + {1e3 * model['backward']:.0f}",
                f"{1e3 * cell['total']['median']:.0f}",
                f"{1e3 * cell['total']['best']:.0f} to {1e3 * cell['total']['worst']:.0f}",
                f"{standard['total']['median'] / cell['total']['median']:.2f}x",
                f"{cell['hidden_share']:.0%}",
                f"{cell['gradient_error']:.0e}",
            ]
        )
    head = ["variant", "forward", "backward", "dependencies", "step", "best to worst"]
    head += ["over standard", "hidden", "gradient error"]
    return Section(f"{1e3 * link:.0f} ms per all-reduce", head, rows, [])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a target is missed."""
    arguments = _parser().parse_args(argv)
    report = new_report("overlap", sys.argv[1:] if argv is None else argv, {})
    links = (0.020,) if arguments.quick else LINKS
    runs = 1 if arguments.quick else arguments.runs
    report |= {"runs": runs, "compute": COMPUTE}
    with tempfile.TemporaryDirectory() as folder:
        timelines = None if arguments.timelines is None else str(arguments.timelines)
        torch.multiprocessing.spawn(_rank, (folder, links, runs, timelines), nprocs=2)
        cells = report["cells"] = torch.load(f"{folder}/cells", weights_only=True)
    sections, targets = [], {}
    for link in links:
        here = {cell["variant"]: cell for cell in cells if cell["link"] == link}
        sections.append(_section(link, list(here.values())))
        print("\n" + sections[-1].text())
        if link in TARGETS:
            ratio = here["standard"]["total"]["median"] / here["ladder"]["total"]["median"]
            name = f"ladder_over_standard_{1e3 * link:.0f}ms"
            targets[name] = target(ratio, TARGETS[link], ratio >= TARGETS[link])
    report["targets"] = targets
    for name, goal in targets.items():
        print(f"{name}: {goal['value']:.2f} (target {goal['target']}): {'pass' if goal['passed'] else 'MISSED'}")
    preface = (
        f"Milliseconds of {2 * LAYERS} sub-blocks, median of {runs} runs; two gloo processes behind one serial wire, "
        f"computation slept: {1e3 * COMPUTE:.0f} ms forward, {1e3 * COMPUTE:.0f} ms for the input's gradient, "
        f"{1e3 * COMPUTE:.0f} ms for the weight's. Dependencies: forward + backward if nothing else cost time. Hidden: "
        "share of the time on the wire for which nobody waited. Gradient error: relative, against the same wiring with "
        "overlap off."
    )
    write_files(report, "Overlap over a slow link", preface, sections, json_path=arguments.json, save=arguments.save)
    return 0 if all(goal["passed"] for goal in targets.values()) or arguments.quick else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="steps per variant; default: 5")
    parser.add_argument(
        "--timelines", type=Path, metavar="STEM", help="draw STEM_standard.png and STEM_ladder.png of the 20 ms link"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="one link, one run: only to see that it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
