"""Tile configurations as data, and the model that chooses among them; imports no Triton, asks no device.

A :class:`GemmConfig` is chosen from what the kernel is (its kind), the mean rows per expert, the widths, the dtype and
the target: first the row tile, from rows per expert, dtype and target alone, so that all kernels of a layer and token
rounding agree on it; then the rest. The model counts, for every candidate that fits the chip:

* products: padded rows x widths x 2 FLOP, in whole waves of as many tiles as there are compute units, each of which
  costs :data:`_TILE_SECONDS` besides,
* operands from L2: (BLOCK_M + BLOCK_N) x K values per tile, at :data:`_L2_OVER_MEMORY` times the memory's bandwidth,
* memory: weights of the experts that have rows, rows in and out, once.

The longest of the three is the time; the shortest time wins, ties going to the larger tile. Peaks and bandwidths are
those of :data:`sonic.roofline.CHIPS`. Rows per expert enter by their power of two (:func:`rows_bucket`), never exactly,
so that a varying number of tokens meets few configurations, and so few compilations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sonic.kernels.triton.target import INTERPRETER, TARGETS, Target, target_of_arch
from sonic.roofline import CHIPS
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = [
    "CONFIGS",
    "FAMILY_OF",
    "KINDS",
    "GemmConfig",
    "choose",
    "estimate_seconds",
    "fits",
    "programs_at_once",
    "row_tile",
    "rows_bucket",
    "tile_rows",
]

KINDS = ("up_gated", "up_plain", "rows", "down_bwd", "contraction")
"""Kinds of grouped GEMM: ``up_proj`` gated and plain; ``down_proj`` and ``up_proj_bwd_input``; ``down_proj_bwd_input``;
the two ``_bwd_weight`` ops."""

_TILE_SECONDS = 1e-6  # of each tile beside its steps: finding it, filling the stages, the epilogue
_L2_OVER_MEMORY = 3.0  # bandwidth of L2 over that of memory, about what H100 and A100 show
_REGISTERS = {"cuda": 65536, "hip": 131072, "": 65536}  # 32-bit, of one compute unit
_OPERAND_BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}


@dataclass(frozen=True)
class GemmConfig:
    """Tile and schedule of one grouped GEMM.

    Attributes:
        block_m, block_n, block_k: tile of the product and step of the contraction; ``block_m`` is the row tile, that
            of the weight's first width for a contraction over rows.
        num_warps: of a program.
        num_stages: steps whose operands are on the way or in use at once.
        slices: parts of its columns in which an epilogue takes a tile, for want of registers; a power of two.
        descriptors: the weights come by tensor descriptors where their strides allow it.
        persistent: programs stay and walk tiles, as many as run at once; else a program per tile.
        group_m: row tiles that are walked together, for L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    slices: int = 1
    descriptors: bool = False
    persistent: bool = False
    group_m: int = 8

    def shared_bytes(self, value_bytes: int) -> int:
        """Shared memory that the stages of both operands take."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * value_bytes


def _configs(rows: Iterable[tuple[int, ...]], **options: bool) -> tuple[GemmConfig, ...]:
    return tuple(GemmConfig(m, n, k, warps, stages, slices, **options) for m, n, k, warps, stages, slices in rows)


# (block_m, block_n, block_k, num_warps, num_stages, slices); one row tile has one or more widths.
_HALF_LARGE = (
    (128, 256, 64, 8, 3, 4),
    (128, 128, 64, 8, 4, 4),
    (128, 64, 64, 4, 4, 4),
    (64, 256, 64, 8, 3, 4),
    (64, 128, 64, 4, 4, 4),
    (64, 64, 64, 4, 4, 2),
    (32, 128, 64, 4, 4, 2),
    (16, 128, 64, 4, 4, 1),
)
_HALF_NARROW = tuple(
    (*row[:5], 2 * row[5]) for row in _HALF_LARGE if row[1] <= 128
)  # the derivative's operands take registers
_HALF_AMPERE = (
    (128, 128, 32, 8, 4, 4),
    (128, 64, 64, 4, 3, 4),
    (64, 128, 64, 4, 3, 4),
    (64, 64, 64, 4, 4, 2),
    (32, 128, 64, 4, 3, 2),
    (16, 128, 64, 4, 4, 1),
)
_HALF_SMALL = (
    (128, 128, 32, 8, 3, 4),
    (64, 128, 32, 4, 4, 4),
    (64, 64, 64, 4, 3, 2),
    (32, 128, 32, 4, 4, 2),
    (16, 128, 32, 4, 4, 1),
)
_HALF_CDNA = (
    (128, 128, 64, 8, 2, 4),
    (128, 64, 64, 4, 2, 4),
    (64, 128, 64, 4, 2, 4),
    (64, 64, 64, 4, 2, 2),
    (32, 128, 64, 4, 2, 2),
    (16, 128, 64, 4, 2, 1),
)
_FLOAT32 = (
    (128, 64, 32, 8, 3, 2),
    (64, 64, 32, 4, 3, 2),
    (32, 64, 32, 4, 3, 1),
    (16, 64, 32, 4, 3, 1),
)
_FLOAT32_CDNA = tuple((*row[:4], 2, row[5]) for row in _FLOAT32)
_INTERPRETED = ((32, 32, 32, 4, 1, 2), (16, 32, 32, 4, 1, 2))  # small, so that small shapes have many tiles


def _family(
    half: Sequence[tuple[int, ...]],
    narrow: Sequence[tuple[int, ...]],
    single: Sequence[tuple[int, ...]],
    **options: bool,
) -> dict[tuple[str, int], tuple[GemmConfig, ...]]:
    table = {}
    for kind in KINDS:
        table[kind, 2] = _configs(narrow if kind == "down_bwd" else half, **options)
        table[kind, 4] = _configs(row for row in single if kind != "contraction" or row[0] <= 64)  # larger ones spill
    return table


CONFIGS: dict[str, dict[tuple[str, int], tuple[GemmConfig, ...]]] = {
    "hopper": _family(_HALF_LARGE, _HALF_NARROW, _FLOAT32, descriptors=True, persistent=True),
    "ampere": _family(_HALF_AMPERE, _HALF_AMPERE, _FLOAT32),
    "small": _family(_HALF_SMALL, _HALF_SMALL, _FLOAT32),
    "cdna": _family(_HALF_CDNA, _HALF_CDNA, _FLOAT32_CDNA),
    "interpreter": _family(_INTERPRETED, _INTERPRETED, _INTERPRETED, descriptors=True, persistent=True),
}
"""Candidates by family of targets, then by (kind, bytes of a value)."""

FAMILY_OF = {
    "sm_80": "ampere",
    "sm_86": "small",
    "sm_89": "small",
    "sm_90": "hopper",
    "sm_100": "hopper",
    "sm_103": "hopper",
    "sm_120": "small",
    "gfx942": "cdna",
    "gfx950": "cdna",
    INTERPRETER.name: "interpreter",
}
"""Family in :data:`CONFIGS` of each target."""


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """The power of two at or above the mean rows per expert, by its exponent: 0 for up to 1 row, 7 for 65 to 128."""
    return max(0, math.ceil(math.log2(max(num_rows, 1) / max(num_experts, 1))))


def _mean_rows(bucket: int) -> float:
    """What a bucket stands for: the middle of its rows."""
    return 0.75 * 2.0**bucket if bucket else 1.0


def _candidates(kind: str, dtype: torch.dtype, target: Target) -> tuple[GemmConfig, ...]:
    size = _OPERAND_BYTES[dtype]
    table = CONFIGS[FAMILY_OF[target.name]][kind, size]
    return tuple(config for config in table if fits(config, dtype, target))


def fits(config: GemmConfig, dtype: torch.dtype, target: Target) -> bool:
    """Whether the shared memory of ``config`` is within what a block of ``target`` may use."""
    return config.shared_bytes(_OPERAND_BYTES[dtype]) <= target.shared_bytes


def programs_at_once(config: GemmConfig, dtype: torch.dtype, target: Target) -> int:
    """How many programs of ``config`` all compute units of ``target`` hold together, by shared memory and registers.

    Registers are taken to be those of the product and 80 more per thread.
    """
    threads = config.num_warps * target.warp_size
    registers = config.block_m * config.block_n // threads + 80
    by_registers = _REGISTERS[target.backend] // (threads * registers)
    by_shared = target.shared_bytes // config.shared_bytes(_OPERAND_BYTES[dtype])
    return target.num_compute_units * max(1, min(by_registers, by_shared))


@functools.cache
def row_tile(bucket: int, dtype: torch.dtype, target: Target) -> int:
    """M for experts of this bucket of rows: the tile whose padded rows cost least.

    A tile of M by 128 by 1,024 takes the longer of its products and of its operands from L2, and the time of any tile,
    so many small ones waste bandwidth and time where a large one wastes rows.
    """
    mean = _mean_rows(bucket)
    tiles = sorted({config.block_m for config in _candidates("up_gated", dtype, target)}, reverse=True)

    def cost(tile: int) -> float:
        padded = max(float(tile), mean + (tile - 1) / 2)
        return padded / tile * _tile_seconds(tile, 128, 1024, dtype, target)

    return min(tiles, key=cost)


def _rates(dtype: torch.dtype, target: Target) -> tuple[float, float]:
    """FLOP/s and bytes/s of the chip that stands for ``target``."""
    chip = CHIPS[target.chip]
    peak = chip.flops_per_second[str(dtype).removeprefix("torch.")]
    return peak, chip.memory_bytes_per_second


def _tile_seconds(block_m: int, block_n: int, width_k: int, dtype: torch.dtype, target: Target) -> float:
    """Time of one tile on one compute unit, all units being busy."""
    peak, bandwidth = _rates(dtype, target)
    units = CHIPS[target.chip].num_compute_units
    products = 2 * block_m * block_n * width_k / (peak / units)
    operands = (block_m + block_n) * width_k * _OPERAND_BYTES[dtype] / (_L2_OVER_MEMORY * bandwidth / units)
    return max(products, operands) + _TILE_SECONDS


def estimate_seconds(
    config: GemmConfig,
    kind: str,
    bucket: int,
    num_experts: int,
    width_k: int,
    width_n: int,
    dtype: torch.dtype,
    target: Target,
) -> float:
    """What the model says one grouped GEMM takes.

    Args:
        config: the candidate.
        kind: one of :data:`KINDS`.
        bucket: of rows per expert, see :func:`rows_bucket`.
        num_experts: E.
        width_k, width_n: contraction and columns of the product; for a contraction over rows its two widths.
        dtype: of the operands.
        target: chip.
    """
    mean = _mean_rows(bucket)
    size = _OPERAND_BYTES[dtype]
    if kind == "contraction":
        tiles = num_experts * math.ceil(width_k / config.block_m) * math.ceil(width_n / config.block_n)
        steps = math.ceil(mean / config.block_k) * config.block_k
        moved = size * num_experts * (mean * (width_k + width_n) + width_k * width_n)
    else:
        row_tiles = max(1.0, (mean + (config.block_m - 1) / 2) / config.block_m)
        tiles = math.ceil(num_experts * row_tiles) * math.ceil(width_n / config.block_n)
        steps = math.ceil(width_k / config.block_k) * config.block_k
        moved = size * num_experts * (mean * (width_k + width_n) + width_k * width_n)
    at_once = target.num_compute_units
    waves = tiles / at_once if tiles > 8 * at_once else math.ceil(tiles / at_once)
    compute = waves * _tile_seconds(config.block_m, config.block_n, steps, dtype, target)
    return max(compute, moved / _rates(dtype, target)[1])


@functools.cache
def choose(
    kind: str,
    bucket: int,
    num_experts: int,
    width_k: int,
    width_n: int,
    dtype: torch.dtype,
    target: Target,
) -> GemmConfig:
    """The configuration that a kernel of this kind and size runs with.

    Args:
        kind, bucket, num_experts, width_k, width_n, dtype, target: as in :func:`estimate_seconds`.

    Raises:
        ValueError: unknown kind, sizes that are not positive, a dtype without kernels.
    """
    where = "sonic.kernels.triton.config.choose"
    check_choice(where, "kind", kind, KINDS)
    check_positive(where, num_experts=num_experts, width_k=width_k, width_n=width_n)
    if dtype not in _OPERAND_BYTES:
        raise argument_error(where, "dtype", dtype, " or ".join(map(str, _OPERAND_BYTES)))
    candidates = _candidates(kind, dtype, target)
    if kind != "contraction":
        tile = row_tile(bucket, dtype, target)
        candidates = tuple(config for config in candidates if config.block_m == tile)

    def cost(config: GemmConfig) -> tuple[float, int]:
        seconds = estimate_seconds(config, kind, bucket, num_experts, width_k, width_n, dtype, target)
        return seconds, -config.block_m * config.block_n

    return min(candidates, key=cost)


def tile_rows(request: Any) -> int:
    """Row tile for a :class:`sonic.kernels.dispatch.Request`; 1 for ops without one."""
    if request.dtype not in _OPERAND_BYTES or not request.num_experts:
        return 1
    target = INTERPRETER if request.device_type == "cpu" else target_of_arch(request.arch)
    return row_tile(rows_bucket(request.num_rows, request.num_experts), request.dtype, target)


assert set(FAMILY_OF) == {*TARGETS, INTERPRETER.name}, "every target has a family of configurations"
