"""What every kernel moves, counted in the simulator, against the least that its tiling allows.

The least: the left operand once for each column of tiles, the right one once for each row of clusters (a weight; by
multicast its blocks have it together), row indices with the operand that they gather, what is stored once. No caches
are modelled: what neighbouring tiles read again is L2's to serve.

``python -m sonic.kernels.cute.traffic`` prints a Markdown table, or puts it between two markers of a page. It takes a
minute, no GPU, and what :mod:`sonic.simulator` wants.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sonic.kernels.cute import launch
from sonic.kernels.cute.config import CANDIDATES, TileConfig
from sonic.kernels.cute.cross import run_command
from sonic.kernels.cute.keys import BIAS_COLUMNS, forced
from sonic.shapes import argument_error

__all__ = ["CASES", "DEFAULT_SIZES", "MARKERS", "Case", "Moved", "Sizes", "main", "moved", "report", "table"]

MARKERS = ("<!-- cute bytes: begin -->", "<!-- cute bytes: end -->")
"""Lines of a page between which the table is written."""

_STORED = ("TMA store", "TMA reduce add", "st.global")


@dataclass(frozen=True)
class Sizes:
    """Of a SwiGLU layer's call in bfloat16 whose experts have the same number of rows each.

    Attributes:
        num_experts: E.
        rows: of each expert.
        hidden_size: D.
        intermediate_size: N.
    """

    num_experts: int
    rows: int
    hidden_size: int
    intermediate_size: int

    def __str__(self) -> str:
        return (
            f"{self.num_experts} experts of {self.rows} rows, D = {self.hidden_size}, N = {self.intermediate_size}, "
            "bfloat16, swiglu"
        )


DEFAULT_SIZES = Sizes(2, 256, 256, 128)


@dataclass(frozen=True)
class Case:
    """An op in one configuration.

    Attributes:
        op: in :data:`OPS`.
        kind: of the configuration.
        tile_m, tile_n, pingpong, cluster_m: which of :data:`sonic.kernels.cute.config.CANDIDATES`.
    """

    op: str
    kind: str
    tile_m: int
    tile_n: int
    pingpong: bool = False
    cluster_m: int = 1

    @property
    def config(self) -> TileConfig:
        """The configuration."""
        wanted = (self.tile_m, self.tile_n, self.pingpong, self.cluster_m)
        for config in CANDIDATES[self.kind]:
            if (config.tile_m, config.tile_n, config.pingpong, config.cluster_m) == wanted:
                return config
        raise argument_error("sonic.kernels.cute.traffic", "case", self, f"one of the candidates for {self.kind}")


CASES = (
    Case("up_proj", "up_gated", 128, 256),
    Case("up_proj", "up_gated", 128, 256, cluster_m=2),
    Case("up_proj", "up_gated", 128, 128, pingpong=True),
    Case("up_proj without H", "up_gated", 128, 256),
    Case("down_proj", "rows", 128, 256),
    Case("down_proj_bwd_input", "down_bwd_gated", 128, 128),
    Case("up_proj_bwd_input", "rows", 128, 256),
    Case("down_proj_bwd_weight", "contraction", 128, 128),
    Case("down_proj_bwd_weight, added", "contraction", 128, 128),
    Case("up_proj_bwd_weight", "contraction", 128, 256),
    Case("up_proj_bwd_weight, added", "contraction", 128, 256),
    Case("bias gradient", "contraction", 128, 64),
)
"""What the table tells of."""


@dataclass(frozen=True)
class Moved:
    """What one launch asked memory for, in bytes.

    Attributes:
        case: what was launched.
        counted: by tensor: ``"left"``, ``"right"``, ``"index"``, ``"offsets"`` and ``"tensor 0"`` and so on, the
            epilogue's.
        least: likewise, what the tiling allows.
        stored: of ``counted``, what went out.
        multicast: what the other blocks of a cluster got without asking.
    """

    case: Case
    counted: dict[str, int]
    least: dict[str, int]
    stored: int
    multicast: int

    @property
    def ratio(self) -> float:
        """All that was counted over the least."""
        return sum(self.counted.values()) / sum(self.least.values())


# ---------------------------------------------------------------- the least


def _of_rows(sizes: Sizes, config: TileConfig, width_n: int, width_k: int, gathers: bool) -> dict[str, int]:
    """Operands of a GEMM whose row tiles vary."""
    num_rows, columns = sizes.num_experts * sizes.rows, -(-width_n // config.tile_n)
    clusters = sizes.num_experts * -(-sizes.rows // (config.tile_m * config.cluster_m))
    least = {"left": 2 * num_rows * width_k * columns, "right": 2 * width_k * width_n * clusters}
    return least | ({"index": 4 * num_rows * columns} if gathers else {})


def _of_contraction(sizes: Sizes, config: TileConfig, width_m: int, width_n: int, out_bytes: int) -> dict[str, int]:
    num_rows = sizes.num_experts * sizes.rows
    tiles_m, tiles_n = -(-width_m // config.tile_m), -(-width_n // config.tile_n)
    return {
        "left": 2 * num_rows * width_m * tiles_n,
        "right": 2 * num_rows * width_n * tiles_m,
        "index": 4 * num_rows * tiles_m * tiles_n,
        "tensor 0": out_bytes * sizes.num_experts * width_m * width_n,
    }


def least_bytes(case: Case, sizes: Sizes) -> dict[str, int]:
    """The least that a case can move, by tensor; see :class:`Moved`."""
    config, num_rows = case.config, sizes.num_experts * sizes.rows
    width_d, width_n = sizes.hidden_size, sizes.intermediate_size
    columns = -(-width_n // config.tile_n)
    h, a = 2 * num_rows * 2 * width_n, 2 * num_rows * width_n
    added = 4 if case.op.endswith("added") else 2
    if case.op.startswith("up_proj_bwd_weight"):
        return _of_contraction(sizes, config, 2 * width_n, width_d, added)
    if case.op.startswith("down_proj_bwd_weight"):
        return _of_contraction(sizes, config, width_d, width_n, added)
    if case.op == "bias gradient":
        return _of_contraction(sizes, config, width_d, BIAS_COLUMNS, 4)
    if case.op == "down_proj":
        return _of_rows(sizes, config, width_d, width_n, False) | {"tensor 0": 2 * num_rows * width_d}
    if case.op == "up_proj_bwd_input":
        return _of_rows(sizes, config, width_d, 2 * width_n, False) | {"tensor 0": 2 * num_rows * width_d}
    if case.op == "down_proj_bwd_input":
        score = 4 * num_rows * columns  # read, and dS written in parts
        rest = {"tensor 0": h, "tensor 1": h, "tensor 2": a, "tensor 3": score, "tensor 4": score}
        return _of_rows(sizes, config, width_n, width_d, True) | rest
    stored = {"tensor 0": h, "tensor 1": a} if case.op == "up_proj" else {"tensor 1": a}
    return _of_rows(sizes, config, 2 * width_n, width_d, True) | stored


# ---------------------------------------------------------------- what is counted


def _call(case: Case, sizes: Sizes) -> Callable[[], Any]:
    experts, rows, width_d, width_n = vars(sizes).values()
    num_rows, num_tokens = experts * rows, experts * rows // 2

    def values(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    offset_E1 = torch.arange(experts + 1, dtype=torch.int32) * rows
    token_R = torch.arange(num_rows, dtype=torch.int32) * 7 % num_tokens
    x_TD, a_RN, h_RU = values(num_tokens, width_d), values(num_rows, width_n), values(num_rows, 2 * width_n)
    w1_EUD, w2_EDN = values(experts, 2 * width_n, width_d), values(experts, width_d, width_n)
    score_R, act = torch.ones(num_rows), ("swiglu", "concatenated")
    name, _, added = case.op.partition(", ")
    main1, main2 = (torch.zeros(w.shape) if added else None for w in (w1_EUD, w2_EDN))
    return {
        "up_proj": lambda: launch.up_proj(x_TD, w1_EUD, None, token_R, offset_E1, *act, True),
        "up_proj without H": lambda: launch.up_proj(x_TD, w1_EUD, None, token_R, offset_E1, *act, False),
        "down_proj": lambda: launch.down_proj(a_RN, w2_EDN, None, None, offset_E1),
        "down_proj_bwd_input": lambda: launch.down_proj_bwd_input(
            x_TD, h_RU, w2_EDN, None, score_R, token_R, offset_E1, *act, True, True
        ),
        "up_proj_bwd_input": lambda: launch.up_proj_bwd_input(h_RU, w1_EUD, offset_E1),
        "down_proj_bwd_weight": lambda: launch.down_proj_bwd_weight(
            x_TD, a_RN, score_R, token_R, offset_E1, True, False, main2
        ),
        "up_proj_bwd_weight": lambda: launch.up_proj_bwd_weight(h_RU, x_TD, token_R, offset_E1, True, False, main1),
        "bias gradient": lambda: launch.down_proj_bwd_weight(
            x_TD, a_RN, score_R, token_R, offset_E1, False, True, None
        ),
    }[name]


def moved(case: Case, sizes: Sizes = DEFAULT_SIZES) -> Moved:
    """Run a case in the simulator and count.

    Args:
        case: what to launch.
        sizes: of the call.

    Raises:
        RuntimeError: the op did not launch one kernel.
    """
    simulator = importlib.import_module("sonic.simulator")
    with simulator.hopper(checks=False, line_info=False) as simulation, forced({case.kind: case.config}):
        _call(case, sizes)()
    if len(simulation.traces) != 1:
        raise RuntimeError(f"sonic: {case.op} launched {len(simulation.traces)} kernels, expected one")
    trace = simulation.traces[0]
    return Moved(
        case,
        {name: num_bytes for name, num_bytes in trace.bytes_by_tensor().items() if num_bytes},
        least_bytes(case, sizes),
        trace.bytes_of(paths=_STORED),
        trace.bytes_of(paths=("multicast",)),
    )


# ---------------------------------------------------------------- as Markdown


def table(launches: Sequence[Moved]) -> str:
    """A Markdown table, a row per launch."""
    head = (
        "| op | tile | cluster | left | right | by multicast | read beside | stored | all | least | ratio |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(_row, launches))


def _row(launch: Moved) -> str:
    case, counted = launch.case, launch.counted
    everything = sum(counted.values())
    cells = (
        case.op,
        f"{case.tile_m} x {case.tile_n}{', pingpong' if case.pingpong else ''}",
        case.cluster_m,
        f"{counted['left']:,}",
        f"{counted['right']:,}",
        f"{launch.multicast:,}",
        f"{everything - counted['left'] - counted['right'] - launch.stored:,}",
        f"{launch.stored:,}",
        f"{everything:,}",
        f"{sum(launch.least.values()):,}",
        f"{launch.ratio:.3f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def report(sizes: Sizes = DEFAULT_SIZES, cases: Sequence[Case] = CASES) -> str:
    """The table under a line that tells the sizes."""
    return f"{sizes}; bytes.\n\n{table([moved(case, sizes) for case in cases])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after ``python -m sonic.kernels.cute.traffic``; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sonic.kernels.cute.traffic",
        description="Count what every CuTe-DSL kernel moves, in the simulator.",
    )
    return run_command(parser, arguments, MARKERS, lambda _: report())


if __name__ == "__main__":
    sys.exit(main())
