"""The fastest meshes that fit, and throughput over the number of GPUs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sonic.planner.step import RECOMPUTE, Plan, Setup, plan_memory, plan_setup
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["SweepPoint", "gpu_counts", "meshes", "search", "sweep"]


def meshes(setup: Setup, *, fixed: Sequence[str] = ()) -> Iterator[Setup]:
    """Setups with the GPUs and micro-batch of ``setup`` that fit in memory.

    Tried are powers of two of tp (up to two domains of NVLink) and ep that divide the model; weights shared out over
    all ranks, or over those of 1, 2, 4 or 8 domains; and the least recomputation that fits.

    Args:
        setup: what all of them share.
        fixed: among ``"tp"``, ``"ep"``, ``"shard"`` and ``"recompute"``: what stays as it is in ``setup``.
    """
    for name in fixed:
        check_choice("sonic.planner.search", "fixed", name, ("tp", "ep", "shard", "recompute"))
    most = 2 * setup.machine.domain
    tps = [setup.tp] if "tp" in fixed else _powers(1, min(most, setup.gpus))
    eps = [setup.ep] if "ep" in fixed else _powers(1, min(setup.gpus, max(1, setup.model.num_experts)))
    for tp, ep in itertools.product(tps, eps):
        if setup.gpus % (tp * ep):
            continue
        ranks = setup.gpus // tp
        shards: list[int | None] = [None]
        if "shard" in fixed:
            shards = [setup.shard]
        else:
            least = max(1, 2 ** int(math.log2(max(1, setup.machine.domain // tp))))
            shards += [shard for shard in _powers(max(least, ep), 8 * least) if shard < ranks and shard % ep == 0]
        for shard in shards:
            try:
                found = dataclasses.replace(setup, tp=tp, ep=ep, shard=shard)
            except ValueError:  # degrees that do not divide the model
                continue
            for recompute in (setup.recompute,) if "recompute" in fixed else RECOMPUTE:
                found = dataclasses.replace(found, recompute=recompute)
                parts, capacity = plan_memory(found)
                if sum(parts.values()) <= capacity:
                    yield found
                    break


def search(setup: Setup, *, fixed: Sequence[str] = ()) -> list[Plan]:
    """Plans of all :func:`meshes`, the fastest first.

    Raises:
        ValueError: nothing fits.
    """
    plans = [plan_setup(found) for found in meshes(setup, fixed=fixed)]
    if not plans:
        was = f"{setup.gpus}, on which no mesh of {setup.model.name} fits in memory"
        raise argument_error("sonic.planner.search", "gpus", was, "more GPUs or a smaller micro_batch")
    return sorted(plans, key=lambda plan: -plan.tokens_per_second)


@dataclass(frozen=True)
class SweepPoint:
    """Throughput of one wiring on so many GPUs.

    Attributes:
        gpus, wiring: which.
        plan: the fastest sharding that fits; None: nothing fits.
    """

    gpus: int
    wiring: str
    plan: Plan | None


def gpu_counts(first: int, last: int) -> list[int]:
    """``first``, doubled until ``last``.

    Raises:
        ValueError: no positive integers, or ``last`` below ``first``.
    """
    check_positive("sonic.planner.gpu_counts", first=first, last=last)
    if last < first:
        raise argument_error("sonic.planner.gpu_counts", "last", last, f"at least first = {first}")
    return _powers(first, last)


def sweep(setup: Setup, counts: Sequence[int], wirings: Sequence[str]) -> list[SweepPoint]:
    """Each wiring on each number of GPUs, with the degrees and micro-batch of ``setup``: more GPUs see more tokens.

    Weights are shared out over as many ranks as is fastest. Counts that tp * ep does not divide are passed over.

    Args:
        setup: model, machine and options; its ``gpus``, ``wiring`` and ``shard`` do not matter.
        counts: numbers of GPUs.
        wirings: names.
    """
    points = []
    for gpus in counts:
        if gpus % (setup.tp * setup.ep):
            continue
        for wiring in wirings:
            start = dataclasses.replace(setup, gpus=gpus, wiring=wiring, shard=None)
            plans = [plan_setup(found) for found in meshes(start, fixed=("tp", "ep", "recompute"))]
            best = max(plans, key=lambda plan: plan.tokens_per_second, default=None)
            points.append(SweepPoint(gpus, wiring, best))
    if not points:
        wanted = f"at least one multiple of tp * ep = {setup.tp * setup.ep}"
        raise argument_error("sonic.planner.sweep", "counts", list(counts), wanted)
    return points


def _powers(first: int, last: int) -> list[int]:
    found = []
    while first <= last:
        found.append(first)
        first *= 2
    return found
