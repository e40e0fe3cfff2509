"""Time, memory and exposed communication of one training step.

A mesh has ``dp * ep * tp`` GPUs, tensor-parallel ones next to each other, then expert-parallel ones. Attention and
other dense parts see different tokens on each of dp * ep ranks, and FSDP-2 shares their weights out over these; weights
of experts are shared out over dp.

For every micro-batch FSDP-2 gathers a layer's weights in bf16 while the layer before it is computed, again in backward
(with ``reshard``), and sums gradients in float32 right after a layer's backward. With ``shard`` smaller than dp * ep,
shards are replicated and gradients are all-reduced over the replicas (HSDP).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sonic.planner.collectives import (
    Group,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    distinct_ranks,
)
from sonic.planner.constants import CONSTANTS, KERNELS, MACHINES, Machine
from sonic.planner.costs import PieceCosts, Shard
from sonic.planner.memory import OPTIMIZERS, activation_bytes, local_parameters, memory_parts
from sonic.planner.models import Model, model_named
from sonic.planner.schedule import COMPUTE, Node, Task, Timeline, backward_tasks, forward_tasks, run
from sonic.planner.wiring import EP, SEND_AFTER, TP, WIRINGS, Exchange, build
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["RECOMPUTE", "Collective", "Plan", "Setup", "make_setup", "plan", "plan_memory", "plan_setup"]

GATHER, SCATTER, REPLICATE = "fsdp all-gather", "fsdp reduce-scatter", "fsdp all-reduce"
RECOMPUTE = ("none", "experts", "cores")
_DAY = 86400


@dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
        model: shapes.
        machine: chip and links.
        gpus: dp * ep * tp.
        tp, ep, pp: degrees of tensor, expert and pipeline parallelism; pp must be 1.
        wiring: one of ``WIRINGS``.
        wired_layers: that many last layers have ``wiring``, those before the standard one; None: all.
        micro_batch: sequences at once on each of dp * ep ranks.
        sequence: tokens of one sequence.
        accumulation: micro-batches of one step.
        shard: ranks that FSDP-2 shares weights out over, a divisor of dp * ep and a multiple of ep; None: dp * ep.
        reshard: weights are gathered again in backward.
        sequence_parallel: norms and the stream are shared out over tensor-parallel ranks.
        kernels: of the experts, in ``KERNELS``.
        recompute: ``"none"``; ``"experts"``: keep X alone; ``"cores"``: that, and attention from its input.
        optimizer: in ``OPTIMIZERS``.
        loss_chunks: the head works on so many pieces of the micro-batch, one after another.
        interference: s of the event model; None: the fitted one.

    Raises:
        ValueError: names the argument that does not fit, and what would.
    """

    model: Model
    machine: Machine
    gpus: int
    tp: int = 1
    ep: int = 1
    pp: int = 1
    wiring: str = "standard"
    wired_layers: int | None = None
    micro_batch: int = 1
    sequence: int = 4096
    accumulation: int = 1
    shard: int | None = None
    reshard: bool = True
    sequence_parallel: bool = False
    kernels: str = "sonic"
    recompute: str = "none"
    optimizer: str = "adamw"
    loss_chunks: int = 1
    interference: float | None = None

    def __post_init__(self) -> None:
        where = "sonic.planner.plan"
        names = ("gpus", "tp", "ep", "pp", "micro_batch", "sequence", "accumulation", "loss_chunks")
        check_positive(where, **{name: getattr(self, name) for name in names})
        check_choice(where, "wiring", self.wiring, WIRINGS)
        check_choice(where, "kernels", self.kernels, tuple(KERNELS))
        check_choice(where, "recompute", self.recompute, RECOMPUTE)
        check_choice(where, "optimizer", self.optimizer, tuple(OPTIMIZERS))
        model = self.model
        if self.pp != 1:
            raise argument_error(where, "pp", self.pp, "1, since pipelines are not planned")
        if self.gpus % (self.tp * self.ep):
            raise argument_error(where, "gpus", self.gpus, f"a multiple of tp * ep = {self.tp * self.ep}")
        if self.ep > 1 and not model.num_experts:
            raise argument_error(where, "ep", self.ep, f"1, since {model.name} has no experts")
        if self.ep > 1 and model.num_experts % self.ep:
            raise argument_error(where, "ep", self.ep, f"a divisor of num_experts = {model.num_experts}")
        widths = {
            "num_heads": model.num_heads,
            "expert_intermediate_size": model.expert_intermediate_size,
            "shared_intermediate_size": model.shared_intermediate_size,
            "intermediate_size": model.intermediate_size,
        }
        for name, width in widths.items():
            if width % self.tp:
                raise argument_error(where, "tp", self.tp, f"a divisor of {name} = {width}")
        if self.wired_layers is not None:
            if isinstance(self.wired_layers, bool) or not isinstance(self.wired_layers, int):
                raise argument_error(where, "wired_layers", repr(self.wired_layers), "an integer or None")
            if not 0 <= self.wired_layers <= model.num_layers:
                raise argument_error(where, "wired_layers", self.wired_layers, f"0 to num_layers = {model.num_layers}")
        if self.shard is not None:
            check_positive(where, shard=self.shard)
            if self.ranks % self.shard or self.shard % self.ep:
                wanted = f"a divisor of dp * ep = {self.ranks} and a multiple of ep = {self.ep}"
                raise argument_error(where, "shard", self.shard, wanted)
        if self.interference is not None and not self.interference >= 0:
            raise argument_error(where, "interference", repr(self.interference), "a number of at least 0")

    @property
    def dp(self) -> int:
        """Replicas of the experts."""
        return self.gpus // (self.tp * self.ep)

    @property
    def ranks(self) -> int:
        """Ranks with tokens of their own: dp * ep."""
        return self.gpus // self.tp

    @property
    def shards(self) -> tuple[int, int]:
        """GPUs that weights outside of experts, and those of experts, are shared out over."""
        dense = self.shard or self.ranks
        return dense, dense // self.ep

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all GPUs."""
        return self.ranks * self.micro_batch * self.sequence * self.accumulation


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one step, on one GPU.

    Attributes:
        count: how many.
        bytes: what one GPU puts in, in all.
        seconds: alone on the machine.
        exposed: seconds in which compute stands still for them.
    """

    count: int
    bytes: float
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        """Share of the seconds that compute does not wait for; at least 0: sharing a link takes longer than alone."""
        return max(0.0, 1 - self.exposed / self.seconds) if self.seconds else 1.0


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        setup: the question.
        step_seconds: one step of the optimizer.
        forward_seconds: of one micro-batch, until its loss is known.
        breakdown: part -> seconds of it; they add up to the step.
        collectives: kind -> what it costs.
        memory: part -> bytes on one GPU.
        capacity: bytes that one GPU has for them.
        send_after: piece of attention after which routing is best placed (ladder and farskip with expert parallelism).
    """

    setup: Setup
    step_seconds: float
    forward_seconds: float
    breakdown: Mapping[str, float]
    collectives: Mapping[str, Collective]
    memory: Mapping[str, float]
    capacity: float
    send_after: str

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.setup.tokens_per_step / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        """Of all GPUs."""
        return self.tokens_per_second * _DAY

    @property
    def mfu(self) -> float:
        """Model FLOP/s over peak bf16 FLOP/s: without what is computed again, causal attention by half."""
        peak = self.setup.gpus * self.setup.machine.chip.flops_per_second["bfloat16"]
        return self.tokens_per_second * self.setup.model.training_flops(self.setup.sequence) / peak

    @property
    def memory_bytes(self) -> float:
        """All parts."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether one GPU can hold it."""
        return self.memory_bytes <= self.capacity

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        setup = dataclasses.asdict(self.setup)
        setup["model"], setup["machine"] = self.setup.model.name, self.setup.machine.name
        return {
            "setup": setup | {"dp": self.setup.dp},
            "step_seconds": self.step_seconds,
            "forward_seconds": self.forward_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_day": self.tokens_per_day,
            "mfu": self.mfu,
            "breakdown_seconds": dict(self.breakdown),
            "collectives": {
                name: dataclasses.asdict(collective) | {"hidden": collective.hidden}
                for name, collective in self.collectives.items()
            },
            "memory_bytes": dict(self.memory),
            "memory_total_bytes": self.memory_bytes,
            "memory_capacity_bytes": self.capacity,
            "fits": self.fits,
            "send_after": self.send_after,
        }


def plan(model: Model | str, machine: Machine | str, gpus: int, **options: Any) -> Plan:
    """Plan one training step.

    Args:
        model: shapes, a name in ``MODELS``, or the path of a JSON or TOML file.
        machine: a name in ``MACHINES``, or one of your own.
        gpus: how many.
        options: the other attributes of :class:`Setup`.

    Raises:
        ValueError: names the argument that does not fit, and what would.
    """
    return plan_setup(make_setup(model, machine, gpus, **options))


def make_setup(model: Model | str, machine: Machine | str, gpus: int, **options: Any) -> Setup:
    """The :class:`Setup` of :func:`plan`'s arguments.

    Raises:
        ValueError: names the argument that does not fit, and what would.
    """
    where = "sonic.planner.plan"
    if isinstance(model, str):
        model = model_named(model)
    if isinstance(machine, str):
        check_choice(where, "machine", machine, tuple(MACHINES))
        machine = MACHINES[machine]
    known = [field.name for field in dataclasses.fields(Setup)]
    for name in options:
        check_choice(where, "option", name, known)
    return Setup(model, machine, gpus, **options)


def plan_setup(setup: Setup) -> Plan:
    """Plan a :class:`Setup`; see :func:`plan`."""
    model, shard = setup.model, _shard(setup)
    costs = PieceCosts(model, setup.machine, shard, setup.kernels, setup.recompute)
    traffic = _Traffic(setup, shard)
    wired = model.num_layers if setup.wired_layers is None else setup.wired_layers
    wirings = ["standard"] * (model.num_layers - wired) + [setup.wiring] * wired
    interference = CONSTANTS["interference"].value if setup.interference is None else setup.interference
    may_move = setup.ep > 1 and setup.wiring in ("ladder", "farskip")
    found = {}
    for send_after in SEND_AFTER if may_move else SEND_AFTER[-1:]:
        nodes = build(model, costs, traffic.exchange, wirings, send_after)
        program, recomputed, loss = _program(nodes, costs, traffic, setup)
        found[send_after] = (run(program, interference), recomputed, program, loss)
    send_after = min(found, key=lambda place: found[place][0].seconds)
    timeline, recomputed, program, loss = found[send_after]

    dense, experts = local_parameters(model, shard)
    optimizer = costs.optimizer_seconds(dense / setup.shards[0] + experts / setup.shards[1])
    memory, capacity = plan_memory(setup)
    return Plan(
        setup,
        timeline.seconds * setup.accumulation + optimizer,
        timeline.ends[loss],
        _breakdown(timeline, recomputed, setup.accumulation) | {"optimizer": optimizer},
        _collectives(timeline, program, traffic, setup.accumulation),
        memory,
        capacity,
        send_after if may_move else "",
    )


def plan_memory(setup: Setup) -> tuple[dict[str, float], float]:
    """Bytes on one GPU by part, and how many it has; without playing the step."""
    shard = _shard(setup)
    kept = activation_bytes(setup.model, shard, setup.kernels, setup.recompute, setup.wiring, setup.loss_chunks)
    parts = memory_parts(setup.model, shard, setup.shards, setup.optimizer, setup.reshard, kept)
    capacity = setup.machine.chip.memory_bytes * (1 - CONSTANTS["fragmentation"].value)
    return {name: size for name, size in parts.items() if size}, capacity


def _shard(setup: Setup) -> Shard:
    model = setup.model
    copies = distinct_ranks(model.num_experts, model.top_k, setup.ep) if setup.ep > 1 else 1.0
    tokens = setup.micro_batch * setup.sequence
    return Shard(tokens, setup.sequence, setup.tp, setup.ep, copies, setup.sequence_parallel)


class _Traffic:
    """Bytes and seconds of each collective of ``setup``."""

    def __init__(self, setup: Setup, shard: Shard) -> None:
        model, machine = setup.model, setup.machine
        tp, ep = Group(machine, setup.tp), Group(machine, setup.ep, setup.tp)
        self.reduce_bytes = 2.0 * shard.tokens * model.hidden_size
        # each copy takes its row; places and scores are 16 bytes per row of the experts, over four exchanges
        self.send_bytes = 2.0 * shard.tokens * shard.copies * model.hidden_size + 4.0 * shard.tokens * model.top_k
        self.exchange = Exchange(
            all_reduce_seconds(tp, self.reduce_bytes),
            tp.link,
            all_to_all_seconds(ep, self.send_bytes) if setup.ep > 1 else 0.0,
            ep.link,
        )
        dense_shards, expert_shards = setup.shards
        self.dense = Group(machine, dense_shards, setup.tp)
        self.experts = Group(machine, expert_shards, setup.tp * setup.ep)
        self.replicas = Group(machine, setup.ranks // dense_shards, setup.tp * dense_shards)
        self.reshard = setup.reshard
        self.sizes = []  # of each layer: parameters outside of the experts and in them
        for layer in range(model.num_layers + 1):
            if layer == model.num_layers:  # the head, gathered with the embedding
                self.sizes.append((model.embedding_size / setup.tp, 0.0))
                continue
            is_moe = model.is_moe(layer)
            dense = (model.attention_size + (model.shared_size if is_moe else model.mlp_size)) / setup.tp
            dense += model.router_size if is_moe else 0
            experts = model.num_experts * model.expert_size / (setup.tp * setup.ep) if is_moe else 0.0
            self.sizes.append((dense, experts))
        self.seconds = {size: self._weight_seconds(*size) for size in set(self.sizes)}

    def _weight_seconds(self, dense: float, experts: float) -> dict[str, float]:
        """Of gathering weights in bf16, summing gradients in float32 into shards, and summing these over replicas."""
        shard = 4 * dense / self.dense.size + 4 * experts / self.experts.size
        return {
            GATHER: all_gather_seconds(self.dense, 2 * dense) + all_gather_seconds(self.experts, 2 * experts),
            SCATTER: all_gather_seconds(self.dense, 4 * dense) + all_gather_seconds(self.experts, 4 * experts),
            REPLICATE: all_reduce_seconds(self.replicas, shard),
        }

    def weight_seconds(self, kind: str, layer: int) -> float:
        """Seconds of one layer's collective of weights or gradients."""
        return self.seconds[self.sizes[layer]][kind]

    def weight_bytes(self, kind: str, layer: int) -> float:
        """Bytes that one GPU puts in."""
        dense, experts = self.sizes[layer]
        shares = dense / self.dense.size + experts / self.experts.size
        return {GATHER: 2 * shares, SCATTER: 4 * (dense + experts), REPLICATE: 4 * shares}[kind]

    @property
    def weight_link(self) -> str:
        """The slower one of its two groups' links."""
        return "network" if "network" in (self.dense.link, self.experts.link) else "nvlink"


def _program(
    nodes: Sequence[Node], costs: PieceCosts, traffic: _Traffic, setup: Setup
) -> tuple[list[Task], float, int]:
    """Forward and backward as one program with FSDP-2's collectives; seconds of compute that is done again; the number
    of the task that ends forward.
    """
    writer = _Writer(traffic, setup.model.num_layers)
    forward = forward_tasks(nodes)
    writer.write(forward, [node.layer for node in nodes], gather=True)
    loss = writer.last[0]
    backward, numbers = backward_tasks(nodes)
    layers = [0] * len(backward)
    again = 0.0
    for node, own in zip(nodes, numbers, strict=True):
        for number in own:
            layers[number] = node.layer
        if setup.recompute == "cores" and node.name.endswith(".qkv"):
            task = backward[own[0]]
            backward[own[0]] = dataclasses.replace(task, seconds=task.seconds + node.forward)
            again += node.forward
        if setup.recompute == "cores" and node.name.endswith(".core"):
            again += node.forward
    writer.write(backward, layers, gather=traffic.reshard, scatter=True)
    if setup.recompute != "none" and setup.model.num_moe_layers:
        plain = PieceCosts(costs.model, setup.machine, costs.shard, setup.kernels, "none")
        extra = costs.experts().input_gradient - plain.experts().input_gradient
        again += extra * setup.model.num_moe_layers
    return writer.tasks, again, loss


class _Writer:
    """Writes passes one after the other, and between a layer's tasks what FSDP-2 does for it."""

    def __init__(self, traffic: _Traffic, num_layers: int) -> None:
        self.traffic, self.num_layers = traffic, num_layers
        self.tasks: list[Task] = []
        self.last: tuple[int, ...] = ()  # the last task of compute so far

    def add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1

    def write(self, tasks: Sequence[Task], layers: Sequence[int], *, gather: bool, scatter: bool = False) -> None:
        start = self.last
        moved: list[int] = []
        ends: list[tuple[int, ...]] = [start, start]  # of the layers that are written, in order
        layer: int | None = None
        needs: tuple[int, ...] = ()
        own: list[int] = []
        for number, task in enumerate(tasks):
            if layers[number] != layer:
                if layer is not None:
                    self.finish(layer, own, scatter)
                    ends.append(self.last)
                layer, own = layers[number], []
                needs = self.gather(layer, ends[-2]) if gather else ()
            after = tuple(moved[before] for before in task.after)
            if task.stream == COMPUTE:
                after += needs + (start if not task.after else ())
            moved.append(self.add(Task(task.name, task.stream, task.seconds, after, task.link)))
            if task.stream == COMPUTE:
                self.last = (moved[-1],)
                own.append(moved[-1])
        if layer is not None:
            self.finish(layer, own, scatter)

    def gather(self, layer: int, after: tuple[int, ...]) -> tuple[int, ...]:
        """Weights of one layer, once the layer before the last is done: two layers' are whole at once."""
        seconds = self.traffic.weight_seconds(GATHER, layer)
        if not seconds:
            return ()
        return (self.add(Task(f"{layer}.gather", GATHER, seconds, after, self.traffic.weight_link)),)

    def finish(self, layer: int, own: Sequence[int], scatter: bool) -> None:
        if not scatter:
            return
        after = tuple(own)
        seconds = self.traffic.weight_seconds(SCATTER, layer)
        if seconds:
            after = (self.add(Task(f"{layer}.scatter", SCATTER, seconds, after, self.traffic.weight_link)),)
        seconds = self.traffic.weight_seconds(REPLICATE, layer)
        if seconds:
            self.add(Task(f"{layer}.replicate", REPLICATE, seconds, after, self.traffic.replicas.link))


def _breakdown(timeline: Timeline, recomputed: float, accumulation: int) -> dict[str, float]:
    parts = {"compute": timeline.busy[COMPUTE] - recomputed, "recompute": recomputed}
    parts |= {f"exposed {name}": seconds for name, seconds in timeline.exposed.items()}
    parts["interference"] = timeline.interference
    return {name: seconds * accumulation for name, seconds in parts.items()}


def _collectives(
    timeline: Timeline, program: Sequence[Task], traffic: _Traffic, accumulation: int
) -> dict[str, Collective]:
    found = {}
    for kind in (TP, EP, GATHER, SCATTER, REPLICATE):
        if kind not in timeline.exposed:
            continue
        tasks = [task for task in program if task.stream == kind]
        if kind in (GATHER, SCATTER, REPLICATE):
            moved = sum(traffic.weight_bytes(kind, int(task.name.partition(".")[0])) for task in tasks)
        else:
            moved = len(tasks) * (traffic.reduce_bytes if kind == TP else traffic.send_bytes)
        found[kind] = Collective(
            len(tasks) * accumulation,
            moved * accumulation,
            timeline.busy[kind] * accumulation,
            timeline.exposed[kind] * accumulation,
        )
    return found
