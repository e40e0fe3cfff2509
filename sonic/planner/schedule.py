"""An event model of one device: a compute stream beside streams of collectives, forward and backward.

A model is a graph of :class:`Node`: pieces of compute, collectives, and joints that take no time (the residual stream).
:func:`forward_tasks` and :func:`backward_tasks` turn it into a program, and :func:`run` plays the program:

* a stream runs its tasks in the order of the program, each once all tasks that it comes after have ended;
* collectives that share a link share its bandwidth;
* compute beside any collective is 1 + s times slower: collectives take multiprocessors and memory bandwidth. This
  interference s is a constant of the machine;
* backward is the transpose of forward, node by node in reverse order: the gradient of a node's input first, then that
  of its weights. A collective right before a product (an all-reduce of its input's gradient) starts between the two;
  others are issued once both are.

For blocks k with compute C and all-reduce R this is the recurrence start C_k = max(end C_(k-1), end R_(k-2)), start R_k
= max(end C_k, end R_(k-1)) of a ladder, and end R_(k-1) instead of end R_(k-2) for the standard wiring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sonic.shapes import argument_error

__all__ = ["COMPUTE", "Node", "Task", "Timeline", "backward_tasks", "forward_tasks", "run"]

COMPUTE = "compute"


@dataclass(frozen=True)
class Node:
    """A piece of the model.

    Attributes:
        name: for people, such as ``"3.experts"``.
        inputs: numbers of the nodes that it reads, all before its own.
        stream: :data:`COMPUTE`, the name of a stream of collectives, or ``""`` for a joint, which takes no time.
        forward: seconds.
        input_gradient: seconds; of a collective, those of its counterpart in backward.
        weight_gradient: seconds of compute that only the optimizer waits for.
        link: what a collective shares with others; ``""`` shares nothing.
        layer: of the model, for sharded weights.
    """

    name: str
    inputs: tuple[int, ...]
    stream: str = ""
    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    link: str = ""
    layer: int = 0


@dataclass(frozen=True)
class Task:
    """One entry of a program.

    Attributes:
        name: for people.
        stream: that it runs on; ``""``: none, it takes no time.
        seconds: alone on the machine.
        after: numbers of the tasks that must have ended, all before its own.
        link: see :class:`Node`.
    """

    name: str
    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    link: str = ""


@dataclass(frozen=True)
class Timeline:
    """How a program went.

    Attributes:
        seconds: from begin to end.
        busy: stream -> seconds of its tasks, each alone on the machine.
        exposed: stream -> seconds in which compute stood still for it.
        interference: seconds by which compute was slower beside collectives.
        ends: seconds at which each task ended.

    ``busy[COMPUTE] + sum(exposed.values()) + interference == seconds``.
    """

    seconds: float
    busy: Mapping[str, float]
    exposed: Mapping[str, float]
    interference: float
    ends: Sequence[float] = field(repr=False)


def forward_tasks(nodes: Sequence[Node]) -> list[Task]:
    """The forward program: one task per node, in the nodes' order."""
    return [_task(node.name, node, node.forward, node.inputs) for node in nodes]


def backward_tasks(nodes: Sequence[Node]) -> tuple[list[Task], list[tuple[int, ...]]]:
    """The backward program, which begins with the gradient of the last node.

    Returns:
        The tasks, and for each node the numbers of its tasks: gradient of the input, then of the weights if that takes
        time.
    """
    readers: list[list[int]] = [[] for _ in nodes]
    for number, node in enumerate(nodes):
        for read in node.inputs:
            readers[read].append(number)
    tasks: list[Task] = []
    numbers: list[tuple[int, ...]] = [()] * len(nodes)
    # of each task, the gradients of weights that the program has issued before what comes after it
    issued: list[frozenset[int]] = []
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        after = tuple(numbers[reader][0] for reader in readers[number])
        behind = frozenset().union(*(issued[before] for before in after))
        is_collective = bool(node.stream) and node.stream != COMPUTE and node.input_gradient > 0
        waits = after
        if is_collective:
            direct = {own[1] for own in (numbers[reader] for reader in readers[number]) if len(own) > 1}
            waits += tuple(sorted(behind - direct))
        own = [len(tasks)]
        tasks.append(_task(f"{node.name} backward", node, node.input_gradient, waits))
        issued.append(behind)
        if node.stream == COMPUTE:
            issued[-1] = frozenset()
        if node.weight_gradient:
            own.append(len(tasks))
            tasks.append(_task(f"{node.name} weight gradient", node, node.weight_gradient, after))
            issued.append(frozenset())
            issued[own[0]] = frozenset(own[1:])
        numbers[number] = tuple(own)
    return tasks, numbers


def _task(name: str, node: Node, seconds: float, after: tuple[int, ...]) -> Task:
    """What takes no time in this direction is a joint: it must not stand in a stream behind what does."""
    return Task(name, node.stream if seconds else "", seconds, after, node.link)


def run(tasks: Iterable[Task], interference: float = 0.0) -> Timeline:
    """Play a program.

    Args:
        tasks: in program order.
        interference: s; compute beside a collective takes 1 + s times as long.

    Raises:
        ValueError: a task that comes after itself or a later one; negative interference.
    """
    tasks = list(tasks)
    if not interference >= 0:
        raise argument_error("sonic.planner.schedule.run", "interference", repr(interference), "a number of at least 0")
    return _Player(tasks, interference).play()


class _Player:
    def __init__(self, tasks: list[Task], interference: float) -> None:
        self.tasks, self.interference = tasks, interference
        self.readers: list[list[int]] = [[] for _ in tasks]
        self.missing = [len(task.after) for task in tasks]
        self.left = [task.seconds for task in tasks]
        self.ends = [-1.0] * len(tasks)
        self.queues: dict[str, list[int]] = {}
        self.now = 0.0
        for number, task in enumerate(tasks):
            for before in task.after:
                if not 0 <= before < number:
                    wanted = f"numbers of tasks before its own, {number}"
                    raise argument_error("sonic.planner.schedule.run", "tasks", f"{task.name} after {before}", wanted)
                self.readers[before].append(number)
            if task.stream:
                self.queues.setdefault(task.stream, []).append(number)
        for queue in self.queues.values():
            queue.reverse()  # heads are taken from the end
        self.busy = {stream: sum(tasks[number].seconds for number in queue) for stream, queue in self.queues.items()}
        self.exposed = dict.fromkeys((stream for stream in self.queues if stream != COMPUTE), 0.0)
        self.lost = 0.0

    def play(self) -> Timeline:
        for number, task in enumerate(self.tasks):  # joints that wait for nothing
            if not task.stream and not self.missing[number] and self.ends[number] < 0:
                self.end(number)
        while True:
            active = self.heads()
            if not active:
                assert not any(self.queues.values()), (
                    "sonic.planner.schedule.run: a program whose tasks wait for each other"
                )
                break
            self.advance(active)
        busy = {COMPUTE: 0.0, **self.busy}
        return Timeline(self.now, busy, self.exposed, self.lost, self.ends)

    def heads(self) -> list[int]:
        """What runs now: the first task of each stream, if it waits for nothing; those without work end at once."""
        changed = True
        while changed:
            changed = False
            active = []
            for queue in self.queues.values():
                while queue and not self.missing[queue[-1]] and not self.left[queue[-1]]:
                    self.end(queue.pop())
                    changed = True
                if queue and not self.missing[queue[-1]]:
                    active.append(queue[-1])
        return active

    def end(self, number: int) -> None:
        stack = [number]
        while stack:
            number = stack.pop()
            self.ends[number] = self.now
            for reader in self.readers[number]:
                self.missing[reader] -= 1
                if not self.missing[reader] and not self.tasks[reader].stream:
                    stack.append(reader)

    def advance(self, active: list[int]) -> None:
        """Let time pass until the first of the active tasks ends."""
        links: dict[str, int] = {}
        collectives = [number for number in active if self.tasks[number].stream != COMPUTE]
        for number in collectives:
            links[self.tasks[number].link] = links.get(self.tasks[number].link, 0) + 1
        slow = 1 + self.interference if collectives else 1.0
        stretch = []
        for number in active:
            task = self.tasks[number]
            stretch.append(slow if task.stream == COMPUTE else links[task.link] if task.link else 1)
        step, first = min(
            (self.left[number] * factor, order)
            for order, (number, factor) in enumerate(zip(active, stretch, strict=True))
        )
        computes = len(collectives) < len(active)
        if computes:
            self.lost += step * (1 - 1 / slow)
        else:
            self.exposed[self.tasks[self.blamed(collectives)].stream] += step
        self.now += step
        for order, (number, factor) in enumerate(zip(active, stretch, strict=True)):
            self.left[number] = 0.0 if order == first else max(0.0, self.left[number] - step / factor)

    def blamed(self, collectives: list[int]) -> int:
        """The collective that compute waits for; after its last task, the first that still runs."""
        queue = self.queues.get(COMPUTE)
        stack = [queue[-1]] if queue else []
        seen = set()
        while stack:
            number = stack.pop()
            for before in self.tasks[number].after:
                if self.ends[before] >= 0 or before in seen:
                    continue
                seen.add(before)
                stream = self.tasks[before].stream
                head = self.queues[stream][-1] if stream else before  # it may stand behind others in its stream
                if head in collectives:
                    return head
                stack += [before, head]
        return collectives[0]
