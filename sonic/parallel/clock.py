"""A clock that runs on FLOPs and bytes: what a step would take, by the order in which the program really runs.

Every operation that torch dispatches is charged the larger of its FLOPs and its memory traffic, collectives run one
after the other on a link, and a wait moves the clock on. The program may run on meta tensors, on one process with
torch's ``fake`` backend: nothing is computed, nothing is sent, and nothing depends on the machine.

    clock = VirtualClock(flops=600e12, memory_bandwidth=2.6e12, link=Link(latency=15e-6, bandwidth=370e9))
    with clock, OverlapReport(clock) as report:
        stack(x).sum().backward()
    clock.time, report.hidden_share
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sonic.parallel.in_flight import Started

_FACTORIES = ("new_", "empty", "full", "zeros", "ones")

__all__ = ["Link", "VirtualClock", "VirtualLane"]


@dataclass(frozen=True)
class Link:
    """What carries the collectives.

    Attributes:
        latency: seconds per collective.
        bandwidth: bytes per second that pass through one rank, in each direction.
    """

    latency: float
    bandwidth: float

    def seconds(self, op: str, num_bytes: int, num_ranks: int) -> float:
        """How long a collective takes: a ring's share of its bytes, twice for an all-reduce.

        Args:
            op: ``"all_reduce"``; any other moves its bytes once.
            num_bytes: of its larger side on one rank.
            num_ranks: how many take part.
        """
        share = (num_ranks - 1) / num_ranks
        return self.latency + (2 if op == "all_reduce" else 1) * share * num_bytes / self.bandwidth


class VirtualClock(TorchDispatchMode):
    """Counts seconds while it is entered; a timer for :class:`sonic.parallel.overlap_report.OverlapReport`.

    Attributes:
        time: seconds on the main lane.
        busy: seconds of computation, all lanes together.
    """

    def __init__(self, flops: float, memory_bandwidth: float, link: Link) -> None:
        """
        Args:
            flops: FLOP per second of matrix products.
            memory_bandwidth: bytes per second.
            link: shared by all collectives.
        """
        super().__init__()
        self.flops, self.memory_bandwidth, self.link = flops, memory_bandwidth, link
        self.busy = 0.0
        self._lanes = {"main": 0.0}
        self._lane = "main"
        self._link_free = 0.0

    @property
    def time(self) -> float:
        """Seconds on the main lane."""
        return self._lanes["main"]

    def compute(self, seconds: float) -> None:
        """Let the present lane be busy for so long."""
        self._lanes[self._lane] += seconds
        self.busy += seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.compute(self._cost(func, args, kwargs, out))
        return out

    def _cost(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        if func.namespace != "aten":
            return 0.0  # a collective: the report hears of it
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = all(tensor.untyped_storage()._cdata in storages for tensor in outputs) and not any(
            argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if is_view:
            return 0.0
        if func._schema.name.removeprefix("aten::").startswith(_FACTORIES):
            inputs = []  # only their shapes are read
        count = flop_registry.get(func.overloadpacket)
        num_flops = count(*args, **kwargs, out_val=out) if count is not None else 0
        num_bytes = sum(_bytes_touched(tensor) for tensor in (*inputs, *outputs))
        return max(num_flops / self.flops, num_bytes / self.memory_bandwidth)

    # the timer of a report

    def now(self) -> float:
        """Seconds on the present lane."""
        return self._lanes[self._lane]

    def completion(self, started: Started) -> float:
        """When the link will be done with it; it begins when the link is free."""
        num_bytes = started.tensor.nbytes if started.num_bytes is None else started.num_bytes
        begin = max(self.now(), self._link_free)
        self._link_free = begin + self.link.seconds(started.op, num_bytes, started.num_ranks)
        return self._link_free

    def waiting(self, completion: float) -> None:
        """Move the present lane on to that moment."""
        self._lanes[self._lane] = max(self._lanes[self._lane], completion)

    def seconds(self, moment: float) -> float:
        """The moment itself."""
        return moment


class VirtualLane:
    """A lane beside the main one, for :class:`sonic.parallel.ladder.Schedule`: a stream of a virtual clock."""

    def __init__(self, clock: VirtualClock, name: str = "side") -> None:
        self._clock, self._name = clock, name
        self._outside: list[str] = []

    def __enter__(self) -> VirtualLane:
        clock = self._clock
        clock._lanes[self._name] = max(clock._lanes.get(self._name, 0.0), clock._lanes[clock._lane])
        self._outside.append(clock._lane)
        clock._lane = self._name
        return self

    def __exit__(self, *exception: object) -> None:
        self._clock._lane = self._outside.pop()

    def uses(self, *tensors: Tensor) -> None:
        """Nothing: there is no memory to keep."""
        pass

    def gives(self, *tensors: Tensor) -> None:
        """Nothing: there is no memory to keep."""
        pass

    def join(self) -> None:
        """Move the main lane on to where this one is."""
        lanes = self._clock._lanes
        lanes["main"] = max(lanes["main"], lanes.get(self._name, 0.0))


def _bytes_touched(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
