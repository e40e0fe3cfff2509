"""Tables: of a plan, of meshes, of a sweep; and what the planner says of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sonic.planner.constants import CONSTANTS, KERNELS, MACHINES, PROTOCOLS
from sonic.planner.models import MODELS
from sonic.planner.search import SweepPoint
from sonic.planner.step import Plan

__all__ = [
    "Table",
    "best_table",
    "constant_tables",
    "model_table",
    "plan_tables",
    "sweep_table",
]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: above it.
        head: of each column; those of numbers are flush right.
        rows: texts.
        notes: lines below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def has_numbers(self, column: int) -> bool:
        """Whether every text of a column, but the first column's, begins like a number."""
        return column > 0 and all(re.match(r"[+-]?\d|$|does not fit", row[column]) for row in self.rows)

    def text(self) -> str:
        """As aligned columns."""
        table = [list(self.head), *map(list, self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.head))]
        lines = [self.title]
        flush = [str.rjust if self.has_numbers(column) else str.ljust for column in range(len(widths))]
        for row in table:
            cells = [move(cell, width) for move, cell, width in zip(flush, row, widths, strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """As Markdown: the title in bold, the table, the notes as a list."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.head) + " |"]
        lines.append(
            "|" + "|".join("---:" if self.has_numbers(column) else "---" for column in range(len(self.head))) + "|"
        )
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *([""] if self.notes else []), *(f"- {note}" for note in self.notes)])


def plan_tables(plan: Plan) -> list[Table]:
    """Time, collectives and memory of one plan."""
    setup = plan.setup
    wired = "" if setup.wired_layers is None else f" in the last {setup.wired_layers} layers"
    shard = f"{setup.shard} of {setup.ranks}" if setup.shard else f"all {setup.ranks}"
    title = (
        f"{setup.model.name} on {setup.gpus} {setup.machine.name}: dp {setup.dp} x ep {setup.ep} x tp {setup.tp}, "
        f"{setup.wiring}{wired}"
    )
    tokens = setup.micro_batch * setup.sequence
    notes = [
        f"{tokens:,} tokens x {setup.accumulation} on each of {setup.ranks} ranks: {setup.tokens_per_step:,} per step; "
        f"weights shared out over {shard} ranks",
        f"{1e3 * plan.forward_seconds:.2f} ms until the loss of a micro-batch is known",
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / setup.gpus:,.0f} per GPU, "
        f"{plan.tokens_per_day / 1e9:.1f} B per day; MFU {plan.mfu:.1%}",
    ]
    if plan.send_after:
        notes.append(f"tokens are routed and sent after attention's {plan.send_after}")
    step = Table(
        title,
        ("step", "ms", "share"),
        [
            (name, f"{1e3 * seconds:.2f}", f"{seconds / plan.step_seconds:.1%}")
            for name, seconds in plan.breakdown.items()
            if seconds
        ]
        + [("together", f"{1e3 * plan.step_seconds:.2f}", "100.0%")],
        notes,
    )
    traffic = Table(
        "Communication of one GPU, per step",
        ("collective", "calls", "GB", "ms alone", "ms exposed", "hidden"),
        [
            (
                name,
                str(found.count),
                f"{found.bytes / 1e9:.2f}",
                f"{1e3 * found.seconds:.2f}",
                f"{1e3 * found.exposed:.2f}",
                f"{found.hidden:.0%}",
            )
            for name, found in plan.collectives.items()
        ],
    )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    memory = Table(
        "Memory of one GPU",
        ("part", "GB", "share"),
        [(name, f"{size / 1e9:.2f}", f"{size / plan.capacity:.1%}") for name, size in plan.memory.items()]
        + [("together", f"{plan.memory_bytes / 1e9:.2f}", f"{plan.memory_bytes / plan.capacity:.1%}")],
        [f"of {plan.capacity / 1e9:.1f} GB: {verdict}"],
    )
    return [step, *([traffic] if plan.collectives else []), memory]


def best_table(plans: Sequence[Plan], most: int) -> Table:
    """The first ``most`` plans of a search."""
    setup = plans[0].setup
    rows = [
        (
            str(rank),
            str(plan.setup.dp),
            str(plan.setup.ep),
            str(plan.setup.tp),
            str(plan.setup.shards[0]),
            plan.setup.recompute,
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            f"{1e3 * plan.step_seconds:.0f}",
            f"{1e3 * sum(found.exposed for found in plan.collectives.values()):.0f}",
            f"{plan.memory_bytes / 1e9:.0f}",
        )
        for rank, plan in enumerate(plans[:most], 1)
    ]
    head = ("rank", "dp", "ep", "tp", "shard", "recompute", "tokens/s", "MFU", "step ms", "exposed ms", "GB")
    return Table(
        f"{setup.model.name} on {setup.gpus} {setup.machine.name}, {setup.wiring}: the fastest of {len(plans)} meshes",
        head,
        rows,
        [f"{setup.micro_batch} x {setup.sequence} tokens x {setup.accumulation} on each rank that has its own"],
    )


def sweep_table(points: Sequence[SweepPoint]) -> Table:
    """Throughput per GPU of each wiring, and its gain over the first one."""
    wirings = list(dict.fromkeys(point.wiring for point in points))
    by_place = {(point.gpus, point.wiring): point.plan for point in points}
    rows = []
    for gpus in dict.fromkeys(point.gpus for point in points):
        plans = [by_place[gpus, wiring] for wiring in wirings]
        cells = [f"{gpus:,}"]
        for found in plans:
            cells.append(f"{found.tokens_per_second / gpus:,.0f}" if found else "does not fit")
        first = plans[0]
        for found in plans[1:]:
            cells.append(f"{found.tokens_per_second / first.tokens_per_second:.3f}" if found and first else "")
        cells += [str(first.setup.shards[0]), f"{first.mfu:.1%}"] if first else ["", ""]
        rows.append(cells)
    setup = next((point.plan.setup for point in points if point.plan), None)
    title = "Nothing fits"
    if setup is not None:
        title = (
            f"{setup.model.name} on {setup.machine.name}, ep {setup.ep}, tp {setup.tp}, {setup.micro_batch} x "
            f"{setup.sequence} tokens: tokens/s of one GPU"
        )
    head = ("GPUs", *wirings, *(f"{wiring} / {wirings[0]}" for wiring in wirings[1:]))
    return Table(title, (*head, f"shard, {wirings[0]}", f"MFU, {wirings[0]}"), rows)


def constant_tables() -> list[Table]:
    """Every constant with its source; machines; kernels."""
    constants = Table(
        "Constants",
        ("name", "value", "unit", "kind", "source"),
        [
            (name, f"{constant.value:.4g}", constant.unit, constant.kind, constant.source)
            for name, constant in CONSTANTS.items()
        ],
    )
    machines = Table(
        "Machines",
        ("name", "bf16 TFLOP/s", "HBM TB/s", "GB", "NVLink GB/s", "domain", "NIC GB/s", "source of the links"),
        [
            (
                name,
                f"{machine.chip.flops_per_second['bfloat16'] / 1e12:,.0f}",
                f"{machine.chip.memory_bytes_per_second / 1e12:.2f}",
                f"{machine.chip.memory_bytes / 1e9:.0f}",
                f"{machine.nvlink_bytes_per_second / 1e9:.0f}",
                str(machine.domain),
                f"{machine.network_bytes_per_second / 1e9:.0f}",
                machine.source,
            )
            for name, machine in MACHINES.items()
        ],
        ["chips as in sonic.roofline; Infinity Fabric stands under NVLink for mi300x"],
    )
    kernels = Table(
        "Kernels of the experts, fitted to published rates on H100",
        ("name", "share of peak", "share of HBM", "keeps", "mean error"),
        [
            (name, f"{entry.flops:.3f}", f"{entry.memory:.3f}", entry.keeps, f"{entry.mean_error:.1%}")
            for name, entry in KERNELS.items()
        ],
        ["x: tokens, g: gathered rows, h: pre-activations, a: activations, y: outputs of the experts"],
    )
    protocols = Table(
        "NCCL's protocols for rings, as its own tuning model has them (src/graph/tuning.cc, 2.18 and later)",
        ("name", "base us", "us per step of NVLink", "us per step of the network", "share of bandwidth"),
        [
            (
                name,
                f"{1e6 * protocol.base:.1f}",
                f"{1e6 * protocol.near:.1f}",
                f"{1e6 * protocol.far:.1f}",
                f"{protocol.bandwidth:.2f}",
            )
            for name, protocol in PROTOCOLS.items()
        ],
        ["the share of LL is its cap on Hopper (87.7 GB/s) over 370"],
    )
    return [constants, machines, protocols, kernels]


def model_table() -> Table:
    """Known models."""
    return Table(
        "Models",
        ("name", "parameters", "active", "layers", "hidden", "experts", "source"),
        [
            (
                name,
                f"{model.num_parameters / 1e9:.2f} B",
                f"{model.num_active_parameters / 1e9:.2f} B",
                str(model.num_layers),
                str(model.hidden_size),
                f"{model.top_k} of {model.num_experts}" if model.num_experts else "",
                model.source,
            )
            for name, model in MODELS.items()
        ],
    )
