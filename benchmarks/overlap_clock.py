"""Step times on a virtual clock: ``python -m benchmarks.overlap_clock``.

The real program, forward and backward, on meta tensors: every operation is charged its FLOPs or bytes, every collective
its time on a link, every wait what is missing (:mod:`sonic.parallel.clock`). Nothing depends on the machine, nothing is
measured, and nothing is said of what a GPU loses to collectives that run beside its computation.

Four layers of two MLPs, 4096 tokens, 600 TFLOP/s, 2.6 TB/s. ``--json`` writes a list of
``{"case", "sequence_parallel", "variant", "forward", "backward": seconds, "hidden_share"}``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.report import Section
from sonic.parallel import late_weight_gradient
from sonic.parallel.clock import Link, VirtualClock, VirtualLane
from sonic.parallel.overlap_report import OverlapReport
from sonic.parallel.stack import LadderBlock, LadderStack

__all__ = ["CASES", "FLOPS", "LAYERS", "MEMORY", "TOKENS", "Step", "main", "ranks_that_are_not_there", "step"]

LAYERS, TOKENS = 4, 4096
FLOPS, MEMORY = 600e12, 2.6e12


@contextlib.contextmanager
def ranks_that_are_not_there(count: int) -> Iterator[DeviceMesh]:
    """A mesh whose collectives are done at once: the clock says what they would have taken."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("tp",))["tp"]
    finally:
        dist.destroy_process_group()


class MLP(nn.Module):
    """A rank's part of an MLP four times as wide as the model."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        factory: Any = {"bias": False, "device": "meta", "dtype": torch.bfloat16}
        self.up = nn.Linear(width, 4 * width // parts, **factory)
        self.down = nn.Linear(4 * width // parts, width, **factory)

    def forward(self, n: Tensor) -> Tensor:
        return late_weight_gradient.linear(F.gelu(late_weight_gradient.linear(n, self.up.weight)), self.down.weight)


@dataclass
class Step:
    """Seconds of a step, and what was hidden in it."""

    forward: float
    backward: float
    report: OverlapReport

    @property
    def total(self) -> float:
        return self.forward + self.backward


def step(mesh: DeviceMesh, width: int, link: Link, wiring: str, **schedule: Any) -> Step:
    factory: Any = {"device": "meta", "dtype": torch.bfloat16}
    blocks = [
        LadderBlock(
            nn.RMSNorm(width, **factory),
            MLP(width, mesh.size()),
            nn.RMSNorm(width, **factory),
            MLP(width, mesh.size()),
        )
        for _ in range(LAYERS)
    ]
    clock = VirtualClock(FLOPS, MEMORY, link)
    if schedule.pop("lane", False):
        schedule["lane"] = VirtualLane(clock)
    stack = LadderStack(blocks, wiring, tp_mesh=mesh, **schedule)
    x = torch.empty(TOKENS, width, requires_grad=True, **factory)
    with clock, OverlapReport(clock, overlap=False) as report:
        y = stack(x)
        forward = clock.time
        y.backward(torch.empty_like(y))
    return Step(forward, clock.time - forward, report)


CASES = {  # ranks, width, link
    "nvlink 8192": (8, 8192, Link(15e-6, 370e9)),
    "nvlink 4096": (8, 4096, Link(15e-6, 370e9)),
    "pcie": (8, 8192, Link(15e-6, 25e9)),
    "two nodes": (16, 8192, Link(15e-6, 45e9)),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "standard, blocking": {"wiring": "standard", "overlap": "off"},
    "standard": {"wiring": "standard"},
    "ladder, forward only": {"wiring": "ladder", "backward_order": "blocking"},
    "ladder": {"wiring": "ladder"},
    "ladder, early node": {"wiring": "ladder", "backward_order": "early"},
}
SEQUENCE_PARALLEL: dict[str, dict[str, Any]] = {
    "standard": {"wiring": "standard"},
    "ladder, in one line": {"wiring": "ladder"},
    "ladder, with a lane": {"wiring": "ladder", "lane": True},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap_clock", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    cells: list[dict[str, Any]] = []
    for case, (ranks, width, link) in CASES.items():
        for is_sequence_parallel, variants in ((False, VARIANTS), (True, SEQUENCE_PARALLEL)):
            rows, standard = [], 0.0
            for variant, options in variants.items():
                with ranks_that_are_not_there(ranks) as mesh:
                    taken = step(mesh, width, link, sequence_parallel=is_sequence_parallel, **options)
                standard = taken.total if variant == "standard" else standard
                cells.append(
                    {
                        **{"case": case, "sequence_parallel": is_sequence_parallel, "variant": variant},
                        **{"forward": taken.forward, "backward": taken.backward},
                        "hidden_share": taken.report.hidden_share,
                    }
                )
                figures = (taken.forward, taken.backward, taken.total)
                speedup = f"{standard / taken.total:.2f}x" if standard else "-"
                rows.append(
                    [variant, *(f"{1e3 * value:.2f}" for value in figures), speedup, f"{taken.report.hidden_share:.0%}"]
                )
            title = f"{case}{', sequence parallel' if is_sequence_parallel else ''}: ms"
            head = ["variant", "forward", "backward", "step", "over standard", "hidden"]
            print(Section(title, head, rows, []).text() + "\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(cells, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
