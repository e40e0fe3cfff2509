"""Tile configurations as data, and the model that chooses among them; imports no CuTe-DSL, asks no device.

A :class:`TileConfig` is chosen from what the kernel is (its kind), the mean rows per expert, the widths and the chip:
first the row tile, from rows per expert alone, so that all kernels of a layer and token rounding agree on it; then the
rest. For every candidate that fits the chip, the model counts

* products: padded rows x widths x 2 FLOP, in whole waves of as many tiles as there are multiprocessors, each of which
  costs :data:`TILE_SECONDS` besides, of which a pingpong schedule hides :data:`HIDDEN`,
* operands from L2: (tile_m + tile_n / cluster_m) x K values per tile, at :data:`L2_OVER_MEMORY` times the memory's
  bandwidth,
* memory: weights of the experts, rows in and out, once.

The longest of the three is the time; the shortest time wins, ties going to the larger tile. Peaks and bandwidths are
those of :data:`sonic.roofline.CHIPS`. Rows per expert enter only as one of three regimes (:data:`REGIMES`), so that a
varying number of tokens meets few configurations, and so few compilations: ten to twelve for all kernels of a layer.
What was measured on a chip goes before the model: see :func:`tuned`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sonic.roofline import CHIPS
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = [
    "CANDIDATES",
    "CONSUMERS",
    "KINDS",
    "REGIMES",
    "Choice",
    "TileConfig",
    "choose",
    "describe",
    "estimate_seconds",
    "fitting",
    "invalid_reason",
    "regime_key",
    "regime_of",
    "row_tile",
    "rows_bucket",
    "shared_bytes",
    "tile_rows",
    "tuned",
]

KINDS = ("up_gated", "up_plain", "rows", "down_bwd_gated", "down_bwd_plain", "contraction")
"""Kinds of grouped GEMM: ``up_proj`` gated and plain; ``down_proj`` and ``up_proj_bwd_input``; ``down_proj_bwd_input``
gated and plain; the two ``_bwd_weight`` ops."""

REGIMES = {"few": 24.0, "some": 192.0, "many": 1536.0}
"""Mean rows per expert that stand for each regime. Few: row tiles of 64. Many: enough that pairs of row tiles waste
little, so that clusters of two may share the weights where products are what bounds the kernel."""

CONSUMERS = 2
"""Warpgroups that multiply; one more loads."""

TILE_SECONDS = 1.5e-6  # of a tile beside its steps: finding it, filling the ring, the epilogue
HIDDEN = 0.7  # of that, under the other warpgroup's products
L2_OVER_MEMORY = 3.0  # bandwidth of L2 over that of memory, about what an H100 shows

SHARED_BYTES = 232_448  # what a thread block of sm_90 may use
_STEP = 64
_BOX_BYTES = 64 * 128
_BARRIER_BYTES = 1024  # the barriers, in front of what is aligned to 1,024
_CHIP = "H100"
_MAX_SLOTS = 8
_MANY = 10  # the bucket of 513 to 1,024 rows per expert: pairs of row tiles add 64 rows on average
_SHARING = ("up_gated", "up_plain")  # bound by products, for which clusters pay; the others by memory or epilogue
_MIN_SLOTS = 3  # fewer hide too little of a load's latency


@dataclass(frozen=True)
class TileConfig:
    """Tile and schedule of one grouped GEMM.

    Attributes:
        tile_m: rows of the tile: 64, 128 or 256. The row tile, except for a contraction.
        tile_n: columns: a multiple of 64 up to 256; gate and up columns together for a gated up projection.
        slots: steps of 64 along the contraction that are in shared memory at once.
        pingpong: the two consuming warpgroups take a tile each in turn; else they share each, by rows.
        cluster_m: thread blocks with neighbouring row tiles that share the right operand by multicast: 1 or 2.
        group_m: row tiles that are walked together, for L2.
        producer_registers, consumer_registers: of a thread of either kind.
    """

    tile_m: int
    tile_n: int
    slots: int
    pingpong: bool = False
    cluster_m: int = 1
    group_m: int = 8
    producer_registers: int = 40
    consumer_registers: int = 232

    @property
    def blocks_per_warpgroup(self) -> int:
        """Blocks of 64 rows that one warpgroup has of a tile."""
        return self.tile_m // 64 // (1 if self.pingpong else CONSUMERS)


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from: ``"model"`` or the file of measurements."""

    config: TileConfig
    source: str


def shared_bytes(config: TileConfig, kind: str) -> int:
    """Shared memory of a thread block: the ring, the boxes of the epilogue, the barriers."""
    ring = config.slots * (config.tile_m + config.tile_n) * _STEP * 2
    boxes = 2
    if kind in ("down_bwd_gated", "down_bwd_plain"):  # the tile of H
        boxes += config.blocks_per_warpgroup * (config.tile_n // 64) * (2 if kind == "down_bwd_gated" else 1)
    return ring + CONSUMERS * boxes * _BOX_BYTES + _BARRIER_BYTES


def invalid_reason(config: TileConfig, kind: str) -> str | None:
    """Why a kernel of this kind cannot be made with ``config``; None: it can. The one predicate for all of them."""
    if config.tile_m not in (64, 128, 256) or config.blocks_per_warpgroup < 1:
        return f"tile_m is {config.tile_m}, expected 64 (pingpong), 128 or 256"
    if config.tile_n not in (64, 128, 192, 256):
        return f"tile_n is {config.tile_n}, expected 64, 128, 192 or 256"
    if kind == "up_gated" and config.tile_n % 128:
        return f"tile_n is {config.tile_n}, expected a multiple of 128: halves of whole boxes"
    if kind == "contraction" and (config.tile_n == 192 or config.cluster_m != 1):
        return "a contraction gathers tiles of 64, 128 or 256 columns, and shares nothing"
    if config.cluster_m not in (1, 2):
        return f"cluster_m is {config.cluster_m}, expected 1 or 2"
    if config.slots < 2:
        return f"slots is {config.slots}, expected at least 2"
    sums = config.blocks_per_warpgroup * config.tile_n // 2
    if sums > 192 or (sums > 128 and kind not in ("rows", "contraction")):
        return f"{sums} registers of sums leave too few for the epilogue"
    if shared_bytes(config, kind) > SHARED_BYTES:
        return f"needs {shared_bytes(config, kind)} bytes of shared memory of {SHARED_BYTES}"
    return None


def _filled(config: TileConfig, kind: str) -> TileConfig:
    """With as many slots as fit."""
    for slots in range(_MAX_SLOTS, 1, -1):
        full = replace(config, slots=slots)
        if invalid_reason(full, kind) is None:
            return full
    return config


def _candidates() -> Iterator[tuple[str, TileConfig]]:
    # (tile_m, tile_n, pingpong)
    coop = [(128, 256, False), (128, 128, False)]
    turns = [(128, 192, True), (128, 128, True), (64, 256, True), (64, 128, True)]
    narrow = [(128, 64, False)]  # for the gradients of biases
    for kind in KINDS:
        for tile_m, tile_n, pingpong in coop + turns + (narrow if kind == "contraction" else []):
            for cluster_m in (1, 2):
                registers = (40, 232) if kind == "rows" else (56, 224)  # gathering takes addresses
                config = TileConfig(tile_m, tile_n, 2, pingpong, cluster_m, 8, *registers)
                full = _filled(config, kind)
                chosen = tile_m == 128 if kind == "contraction" else cluster_m == 1 or kind in _SHARING
                if chosen and invalid_reason(full, kind) is None and full.slots >= _MIN_SLOTS:
                    yield kind, full


CANDIDATES: dict[str, tuple[TileConfig, ...]] = {kind: () for kind in KINDS}
"""What the model chooses from, by kind."""
for _kind, _config in _candidates():
    CANDIDATES[_kind] += (_config,)


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """The power of two at or above the mean rows per expert, by its exponent: 0 for up to 1 row, 7 for 65 to 128."""
    return max(0, math.ceil(math.log2(max(num_rows, 1) / max(num_experts, 1))))


@functools.cache
def row_tile(bucket: int) -> int:
    """M for experts of this bucket of rows, 64 or 128: the tile whose padded rows cost least.

    A tile of M by 128 by 1,024 takes the longer of its products and of its operands from L2, and the time of any tile.
    """
    mean = 0.75 * 2.0**bucket if bucket else 1.0  # the middle of the bucket's rows

    def cost(tile: int) -> float:
        padded = max(float(tile), mean + (tile - 1) / 2)
        return padded / tile * _tile_seconds(TileConfig(tile, 256, 2), 1024)

    return min((128, 64), key=cost)


def regime_of(bucket: int) -> str:
    """The key in :data:`REGIMES` for a bucket of rows per expert."""
    if row_tile(bucket) == 64:
        return "few"
    return "some" if bucket < _MANY else "many"


def _tile_seconds(config: TileConfig, width_k: float) -> float:
    """Time of one tile on one multiprocessor, all of them being busy."""
    chip = CHIPS[_CHIP]
    units = chip.num_compute_units
    products = 2 * config.tile_m * config.tile_n * width_k / (chip.flops_per_second["bfloat16"] / units)
    values = config.tile_m + config.tile_n / config.cluster_m
    operands = values * width_k * 2 / (L2_OVER_MEMORY * chip.memory_bytes_per_second / units)
    return max(products, operands) + TILE_SECONDS * (1 - HIDDEN if config.pingpong else 1)


def estimate_seconds(
    config: TileConfig, kind: str, mean_rows: float, num_experts: int, width_k: int, width_n: int
) -> float:
    """What the model says one grouped GEMM takes.

    Args:
        config: the candidate.
        kind: one of :data:`KINDS`.
        mean_rows: per expert.
        num_experts: E.
        width_k, width_n: contraction and columns of the product; for a contraction over rows its two widths.
    """
    chip = CHIPS[_CHIP]
    rows = config.tile_m * config.cluster_m
    columns = math.ceil(width_n / config.tile_n)
    if kind == "contraction":
        tiles = num_experts * math.ceil(width_k / config.tile_m) * columns
        steps = math.ceil(mean_rows / _STEP) * _STEP
    else:
        row_tiles = max(1.0, (mean_rows + (rows - 1) / 2) / rows) * config.cluster_m
        tiles = math.ceil(num_experts * row_tiles) * columns
        steps = math.ceil(width_k / _STEP) * _STEP
    units = chip.num_compute_units
    waves = tiles / units if tiles > 8 * units else math.ceil(tiles / units)
    moved = 2 * num_experts * (mean_rows * (width_k + width_n) + width_k * width_n)
    return max(waves * _tile_seconds(config, steps), moved / chip.memory_bytes_per_second)


def fitting(kind: str, bucket: int) -> tuple[TileConfig, ...]:
    """The candidates among which :func:`choose` chooses for a bucket of rows per expert, whatever the widths."""
    clusters = (1, 2) if kind in _SHARING and _regime(kind, bucket) == "many" else (1,)
    tile = row_tile(bucket)
    return tuple(c for c in CANDIDATES[kind] if c.cluster_m in clusters and (kind == "contraction" or c.tile_m == tile))


def _regime(kind: str, bucket: int) -> str:
    regime = regime_of(bucket)
    if kind not in _SHARING and (kind == "contraction" or regime == "some"):
        return "many"  # without clusters, and all the more without row tiles, no rows are wasted by pairs
    return regime


def regime_key(kind: str, bucket: int, num_experts: int, width_k: int, width_n: int) -> str:
    """By what :func:`tuned` names its choices; the arguments as in :func:`choose`."""
    return f"{kind}/{_regime(kind, bucket)}/{num_experts}/{width_k}/{width_n}"


@functools.cache
def tuned(chip: str) -> dict[str, dict[str, Any]]:
    """Measured choices for a chip: ``"kind/regime/E/K/N"`` -> fields of a :class:`TileConfig`; empty if there are none.

    They lie as ``tuned/<chip>.json`` beside this file, with chip, date and versions under ``"measured"``.
    """
    file = importlib.resources.files(__package__) / "tuned" / f"{chip}.json"
    if not file.is_file():
        return {}
    choices: dict[str, dict[str, Any]] = json.loads(file.read_text())["choices"]
    return choices


@functools.cache
def choose(kind: str, bucket: int, num_experts: int, width_k: int, width_n: int, chip: str = _CHIP) -> Choice:
    """The configuration that a kernel of this kind and size runs with, and where it comes from.

    Args:
        kind: one of :data:`KINDS`.
        bucket: of rows per expert, see :func:`rows_bucket`.
        num_experts, width_k, width_n: as in :func:`estimate_seconds`.
        chip: whose measurements go before the model.

    Raises:
        ValueError: unknown kind, sizes that are not positive.
    """
    where = "sonic.kernels.cute.config.choose"
    check_choice(where, "kind", kind, KINDS)
    check_positive(where, num_experts=num_experts, width_k=width_k, width_n=width_n)
    if bucket < 0:
        raise argument_error(where, "bucket", bucket, "at least 0")
    regime = _regime(kind, bucket)
    measured = tuned(chip).get(regime_key(kind, bucket, num_experts, width_k, width_n))
    if measured is not None:
        config = TileConfig(**measured)
        reason = invalid_reason(config, kind)
        assert reason is None, f"a measured configuration is not valid: {reason}"
        return Choice(config, f"measured on {chip}")

    def cost(config: TileConfig) -> tuple[float, int]:
        seconds = estimate_seconds(config, kind, REGIMES[regime], num_experts, width_k, width_n)
        return seconds, -config.tile_m * config.tile_n

    return Choice(min(fitting(kind, bucket), key=cost), "model")


def tile_rows(request: Any) -> int:
    """Row tile for a :class:`sonic.kernels.dispatch.Request`; 1 for ops without one."""
    return row_tile(rows_bucket(request.num_rows, request.num_experts)) if request.num_experts else 1


_GATED = ("swiglu", "geglu", "reglu", "swiglu_oai")


def describe(request: Any) -> str | None:
    """What is picked for a :class:`sonic.kernels.dispatch.Request` on the chip of the model, and why; in words."""
    width_d, width_n = request.hidden_size, request.intermediate_size
    gated = request.activation in _GATED
    shapes = {
        "up_proj": ("up_gated" if gated else "up_plain", width_d, width_n),
        "down_proj": ("rows", width_n, width_d),
        "down_proj_bwd_input": ("down_bwd_gated" if gated else "down_bwd_plain", width_d, width_n),
        "up_proj_bwd_input": ("rows", width_n, width_d),
        "down_proj_bwd_weight": ("contraction", width_d, width_n),
        "up_proj_bwd_weight": ("contraction", width_n, width_d),
    }
    if request.op not in shapes:
        return None
    kind, width_k, columns = shapes[request.op]
    if request.op == "up_proj" and gated:
        columns *= 2
    bucket = rows_bucket(request.num_rows, request.num_experts)
    choice = choose(kind, bucket, request.num_experts, width_k, columns)
    config, regime = choice.config, regime_of(bucket)
    mode = "pingpong" if config.pingpong else "cooperative"
    why = f"regime {regime!r}, {choice.source}"
    if choice.source == "model":
        seconds = estimate_seconds(config, kind, REGIMES[regime], request.num_experts, width_k, columns)
        why += f", which says {seconds * 1e6:.0f} us at {REGIMES[regime]:.0f} rows per expert"
    return (
        f"{config.tile_m} x {config.tile_n} x {_STEP}, {mode}, {config.slots} slots, "
        f"clusters of {config.cluster_m}; {why}"
    )
