"""The planner beside published measurements: how wrong it is, row by row."""

from __future__ import annotations

from collections.abc import Sequence

from sonic.planner.constants import CONSTANTS, KERNELS
from sonic.planner.fit import fit_two_node_link, kernel_rate, leave_one_out
from sonic.planner.memory import expert_activation_bytes
from sonic.planner.models import MODELS
from sonic.planner.published import (
    KERNEL_RATES,
    KERNEL_SHAPES,
    LADDER_70B,
    LADDER_405B,
    LADDER_SIZES,
    PEAK_MEMORY,
    TOKENS_PER_DAY,
)
from sonic.planner.serving import NVLINK, P2P_OFF, ReduceLink, serving_speedup
from sonic.planner.step import plan
from sonic.planner.tables import Table

__all__ = ["check_tables", "ladder_errors", "layer_memory_gib", "memory_errors", "other_errors", "planned_billions"]


def ladder_errors(*, off: bool = False, wiring: str = "ladder", interference: float | None = None) -> list[float]:
    """Relative error of the planned speed-up of each of the ten 70B rows.

    Args:
        off: the rows with NCCL_P2P_DISABLE=1.
        wiring: ``"ladder"`` or ``"parallel"``.
        interference: s; None: the fitted one.
    """
    link = P2P_OFF if off else NVLINK
    value = CONSTANTS["interference"].value if interference is None else interference
    suffix = "_off" if off else ""
    errors = []
    for row in LADDER_70B:
        published = getattr(row, wiring + suffix) / getattr(row, "standard" + suffix)
        planned = serving_speedup(MODELS["llama-70b"], row.batch, row.tp, wiring, link, value)
        errors.append(planned / published - 1)
    return errors


def other_errors() -> list[tuple[str, int, int, str, float, float]]:
    """Model, batch, tp, link, published and planned ladder speed-up of 405B and of other sizes.

    The link of 405B, on two nodes, is fitted to its rows without communication; all else is as for 70B.
    """
    found = []
    for off in (False, True):
        ceilings = [(row.batch, (row.none_off if off else row.none) or 0.0) for row in LADDER_405B]
        link = fit_two_node_link(ceilings)
        for row in LADDER_405B:
            found.append(_other(row.model, row.batch, row.tp, off, row.ladder_off if off else row.ladder, link))
    for off in (False, True):
        for row in LADDER_SIZES:
            link = P2P_OFF if off else NVLINK
            found.append(_other(row.model, row.batch, row.tp, off, row.ladder_off if off else row.ladder, link))
    return found


def _other(
    model: str, batch: int, tp: int, off: bool, published: float, link: ReduceLink
) -> tuple[str, int, int, str, float, float]:
    planned = serving_speedup(MODELS[model], batch, tp, "ladder", link)
    return model, batch, tp, "P2P off" if off else "NVLink", published, planned


def layer_memory_gib(name: str, index: int) -> float:
    """Peak memory of one layer as SonicMoE's figure counts it, planned: weights, what is kept, and the output."""
    shape = KERNEL_SHAPES[index]
    tokens, hidden, width = shape.num_tokens, shape.hidden_size, shape.intermediate_size
    kept = expert_activation_bytes(KERNELS[name], tokens, tokens * shape.top_k, hidden, width, True)
    weights = 6.0 * shape.num_experts * hidden * width
    padding = 64.0 * shape.num_experts * 2 * hidden if name == "deepgemm" else 0.0
    output = 2.0 * tokens * hidden if name == "sonic" else 0.0  # others reuse a buffer for it
    return (weights + kept + padding + output) / 2**30


def memory_errors(name: str) -> list[float]:
    """Relative error of :func:`layer_memory_gib` of each shape that runs."""
    return [
        layer_memory_gib(name, index) / published - 1
        for index, published in enumerate(PEAK_MEMORY[name])
        if published is not None
    ]


def planned_billions(kernels: str, gpus: int, **options: object) -> float:
    """Billions of tokens per day of the 7B model on H100, as lm-engine's public configuration trains it.

    4 sequences of 4,096 tokens at once, 4 times a step, ZeRO-3 over 8 GPUs and replicas of those; ``options`` replace.
    """
    options = {"micro_batch": 4, "accumulation": 4, "shard": 8, "kernels": kernels} | options
    return plan("7b", "h100", gpus, **options).tokens_per_day / 1e9


def check_tables() -> list[Table]:
    """All comparisons."""
    return [
        _ladder_table(off=False),
        _ladder_table(off=True),
        _other_table(),
        _tokens_table(),
        _kernel_table(),
    ]


def _ladder_table(off: bool) -> Table:
    suffix = "_off" if off else ""
    rows = []
    columns = {wiring: ladder_errors(off=off, wiring=wiring) for wiring in ("ladder", "parallel")}
    for index, row in enumerate(LADDER_70B):
        cells = [f"{row.batch}", f"{row.tp}"]
        for wiring, errors in columns.items():
            published = getattr(row, wiring + suffix) / getattr(row, "standard" + suffix)
            cells += [f"{published:.3f}", f"{published * (1 + errors[index]):.3f}", f"{errors[index]:+.1%}"]
        rows.append(cells)
    notes = [f"{wiring}: {_summary(errors)}" for wiring, errors in columns.items()]
    notes.append(f"ladder without interference: {_summary(ladder_errors(off=off, interference=0.0))}")
    if not off:
        notes.append(f"ladder, each row with the interference of the other nine: {_summary(leave_one_out(NVLINK))}")
    title = "P2P off, the interference of the NVLink rows" if off else "NVLink; the interference is fitted to these"
    head = ("batch", "tp", "ladder", "planned", "error", "parallel", "planned", "error")
    return Table(f"Speed-up over standard, Llama-3 70B serving on H100: {title}", head, rows, notes)


def _other_table() -> Table:
    found = other_errors()
    rows = [
        (model, str(batch), str(tp), link, f"{published:.3f}", f"{planned:.3f}", f"{planned / published - 1:+.1%}")
        for model, batch, tp, link, published, planned in found
    ]
    groups = {
        "405B, two nodes": [row for row in found if row[0] == "llama-405b"],
        "8B and 70B": [row for row in found if row[0] in ("llama-8b", "llama-70b")],
        "1B and 3B": [row for row in found if row[0] in ("llama-1b", "llama-3b")],
        "34B (a doubtful row) and 176B": [row for row in found if row[0] in ("llama-34b", "bloom-176b")],
    }
    notes = [f"{name}: {_summary([row[5] / row[4] - 1 for row in group])}" for name, group in groups.items()]
    head = ("model", "batch", "tp", "link", "ladder", "planned", "error")
    title = "The same for other models; fitted: 405B's link, to its rows without communication, and nothing else"
    return Table(title, head, rows, notes)


def _tokens_table() -> Table:
    rows = []
    for row in TOKENS_PER_DAY:
        cases: dict[str, dict[str, object]] = {"as configured": {}, "experts computed again": {"recompute": "experts"}}
        cases |= {"no interference": {"interference": 0.0}}
        for case, options in cases.items():
            planned = planned_billions(row.kernels, row.gpus, **options)
            cells = (row.kernels, str(row.gpus), case, f"{row.billions:.0f}", f"{planned:.0f}")
            rows.append((*cells, f"{planned / row.billions - 1:+.1%}"))
    notes = [
        "nothing is fitted to these two figures; the published run's own settings are not known: the model and its "
        "settings are those of lm-engine's public configuration of its 7B MoE",
    ]
    head = ("kernels", "H100", "case", "published", "planned", "error")
    return Table("Billions of tokens per day, 7B MoE, FSDP-2", head, rows, notes)


def _kernel_table() -> Table:
    rows = []
    for name, rates in KERNEL_RATES.items():
        errors = [
            kernel_rate(KERNELS[name], shape, passes) / rate - 1
            for passes, column in zip(("forward", "backward"), rates, strict=True)
            for shape, rate in zip(KERNEL_SHAPES, column, strict=True)
            if rate is not None
        ]
        memory = memory_errors(name)
        close = sum(abs(error) <= 0.02 for error in memory)
        rows.append((name, str(len(errors)), _mean(errors), _most(errors), f"{close} of {len(memory)}", _most(memory)))
    head = ("kernels", "rates", "mean error", "largest", "memory within 2%", "largest")
    notes = ["rates are fitted, two shares for each name; memory is counted, nothing is fitted"]
    return Table("MoE kernels on H100: rates of 12 shapes, and peak memory of one layer", head, rows, notes)


def _mean(errors: Sequence[float]) -> str:
    return f"{sum(map(abs, errors)) / len(errors):.1%}"


def _most(errors: Sequence[float]) -> str:
    return f"{max(errors, key=abs):+.1%}"


def _summary(errors: Sequence[float]) -> str:
    return f"mean error {_mean(errors)}, largest {_most(errors)}"
