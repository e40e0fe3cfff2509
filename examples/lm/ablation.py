"""The routing ablation: which routings are compared, what is kept of each run, and what the runs say together.

Runs of the same seed start from the same weights and read the same text in the same order. So a routing is compared to
top-K seed by seed: the difference of two such runs varies far less from seed to seed than either of them.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from examples.lm.errors import JobError

BASELINE = "topk"


@dataclass(frozen=True)
class Variant:
    """One routing of the comparison.

    Attributes:
        name: on the command line, and of the folder of its runs.
        label: in the table and the pictures.
        routing: as the model's config names it.
        ratio: mean rows per expert, T * K / E, over the rows of a tile.
    """

    name: str
    label: str
    routing: str
    ratio: float = 2.0


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "top-K", "topk"),
        Variant("nearest", "rounding: nearest", "nearest"),
        Variant("stochastic", "rounding: stochastic", "stochastic"),
        Variant("nearest_score", "rounding: nearest score", "nearest_score"),
        Variant("balanced", "rounding: balanced", "balanced"),
        Variant("up", "rounding: up", "up"),
        Variant("down", "rounding: down", "down"),
        Variant("nearest_ratio_1", "rounding: nearest, ratio 1", "nearest", ratio=1.0),
        Variant("nearest_ratio_half", "rounding: nearest, ratio 1/2", "nearest", ratio=0.5),
        Variant("expert_choice", "expert choice", "expert_choice"),
        Variant("capacity", "capacity 1.25", "capacity"),
        Variant("bias", "bias balancing", "bias"),
    )
}


def tiles_of(names: list[str], *, tokens: int, top_k: int, experts: int) -> dict[str, int]:
    """Rows of the tile of each variant named: an expert gets its ``ratio`` of tiles on average.

    Raises:
        JobError: that is no whole number of rows, or more of them than there are tokens in a step.
    """
    tiles = {}
    for name in names:
        mean, ratio = tokens * top_k / experts, VARIANTS[name].ratio
        rows = mean / ratio
        if rows < 1 or rows != int(rows) or rows > tokens:
            was = f"{mean:g}, which makes a tile of {rows:g} rows for {name}, {ratio:g} tiles per expert"
            wanted = f"a whole number of rows per tile, at most the {tokens} tokens of a step"
            raise JobError("batch-size * seq-len * top-k / experts", was, wanted)
        tiles[name] = int(rows)
    return tiles


@dataclass(frozen=True)
class RunResult:
    """What is kept of a finished run; shares are of T * K, the pairs that top-K routes, over all steps and layers.

    Attributes:
        variant, seed: which run.
        steps: optimizer steps.
        tile_rows: rows of the routing's tile.
        heldout: held-out bits per byte of the finished model, routed by plain top-K.
        heldout_leaky: the same routed as in training, for expert choice alone: it looks at the bytes to come.
        train_bits: bits per byte on the training text, mean over the last tenth of the steps.
        load_violation: rows of the fullest expert over the mean, less 1; mean over steps and layers.
        padding_waste: share of a grouped GEMM's rows that are padding, in training, by rows of the tile: of this
            routing's tile, and of tiles of half, one and two times the mean rows per expert.
        rows: routed rows, as a share.
        computed: routed rows and padding at ``tile_rows``, as a share.
        added, dropped: pairs that the routing has and top-K has not, and the other way round, as shares.
        idle: share of the tokens that no expert takes.
        tokens_per_second: of the median training step.
        seconds: spent in training steps.
    """

    variant: str
    seed: int
    steps: int
    tile_rows: int
    heldout: float
    heldout_leaky: float | None
    train_bits: float
    load_violation: float
    padding_waste: dict[str, float]
    rows: float
    computed: float
    added: float
    dropped: float
    idle: float
    tokens_per_second: float
    seconds: float

    @property
    def moved(self) -> float:
        """Pairs that differ from top-K's, as a share."""
        return self.added + self.dropped


def result_of(
    log: list[dict[str, Any]],
    *,
    variant: str,
    seed: int,
    tile_rows: int,
    tokens: int,
    top_k: int,
    heldout_leaky: float | None,
) -> RunResult:
    """Boil the metrics log of a finished run down.

    Args:
        log: a row per step; the last one holds the held-out measurement.
        variant, seed, tile_rows, heldout_leaky: as in :class:`RunResult`.
        tokens: of a step.
        top_k: experts per token.
    """
    loads = [layer for row in log for layer in row["load"]]  # rows per expert, of every step and layer
    routed, wanted = sum(map(sum, loads)), len(loads) * tokens * top_k
    mean = tokens * top_k // len(loads[0])
    tiles = {tile_rows, max(1, mean // 2), max(1, mean), max(1, 2 * mean)}
    padded = {tile: sum(-(-rows // tile) * tile for load in loads for rows in load) for tile in tiles}
    changes = {
        name: sum(sum(row.get(name, ())) for row in log) for name in ("added", "dropped", "idle")
    }  # top-K's log has none
    ends = [0.0, *(row["seconds"] for row in log)]
    step_seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    last = [row["bits_per_byte"] for row in log[-max(1, len(log) // 10) :]]
    return RunResult(
        variant=variant,
        seed=seed,
        steps=len(log),
        tile_rows=tile_rows,
        heldout=log[-1]["heldout_bits_per_byte"],
        heldout_leaky=heldout_leaky,
        train_bits=statistics.fmean(last),
        load_violation=statistics.fmean(max(load) * len(load) / sum(load) - 1 if any(load) else 0.0 for load in loads),
        padding_waste={str(tile): 1 - routed / padded[tile] if routed else 0.0 for tile in sorted(padded)},
        rows=routed / wanted,
        computed=padded[tile_rows] / wanted,
        added=changes["added"] / wanted,
        dropped=changes["dropped"] / wanted,
        idle=changes["idle"] / (len(loads) * tokens),
        tokens_per_second=tokens / statistics.median(step_seconds),
        seconds=log[-1]["seconds"],
    )


def summarise(results: list[RunResult]) -> dict[str, dict[str, Any]]:
    """What the runs say per routing, in the order of :data:`VARIANTS`.

    Returns:
        By name of the variant: ``label``, ``tile_rows``; ``heldout`` with ``mean``, ``min``, ``max``, ``deviation``
        (over the seeds; None for one seed) and ``by_seed``; ``difference`` to top-K of the same seed, with ``mean``,
        ``standard_error`` (None for one seed) and ``seeds`` (None where no seed has both); and the means over the seeds
        of the other figures of :class:`RunResult`.
    """
    baseline = {result.seed: result.heldout for result in results if result.variant == BASELINE}
    summary = {}
    for variant in VARIANTS.values():
        runs = sorted((result for result in results if result.variant == variant.name), key=lambda run: run.seed)
        if not runs:
            continue
        heldout = [run.heldout for run in runs]
        gaps = [run.heldout - baseline[run.seed] for run in runs if run.seed in baseline]
        leaky = [run.heldout_leaky for run in runs if run.heldout_leaky is not None]
        means = [
            *("train_bits", "load_violation", "rows", "computed", "added", "dropped", "moved", "idle"),
            *("tokens_per_second", "seconds"),
        ]
        summary[variant.name] = {
            "label": variant.label,
            "tile_rows": runs[0].tile_rows,
            "ratio": variant.ratio,
            "heldout": {
                "mean": statistics.fmean(heldout),
                "min": min(heldout),
                "max": max(heldout),
                "deviation": statistics.stdev(heldout) if len(heldout) > 1 else None,
                "by_seed": {str(run.seed): run.heldout for run in runs},
            },
            "heldout_leaky": statistics.fmean(leaky) if leaky else None,
            "difference": None
            if variant.name == BASELINE or not gaps
            else {
                "mean": statistics.fmean(gaps),
                "standard_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
                "seeds": len(gaps),
            },
            "padding_waste": {
                tile: statistics.fmean(run.padding_waste[tile] for run in runs) for tile in runs[0].padding_waste
            },
            **{name: statistics.fmean(getattr(run, name) for run in runs) for name in means},
        }
    return summary


def as_dict(result: RunResult) -> dict[str, Any]:
    """A result as plain values; ``RunResult(**as_dict(result))`` is the result again."""
    return asdict(result)
