"""A process group whose collectives take as long as a link would: gloo, with one serial wire in front of it.

Until a collective is complete its output holds NaN, so that a read that comes too early is seen in the numbers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DelayedGroup", "delayed_mesh"]

NAME = "delayed"
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class DelayedGroup(dist.ProcessGroup):
    """Forwards to a gloo group; every collective is done ``latency + bytes / bandwidth`` after it had the wire."""

    def __init__(self, inner: dist.ProcessGroup, rank: int, size: int, latency: float, bandwidth: float) -> None:
        super().__init__(rank, size)
        self._inner, self._rank, self._size = inner, rank, size
        self.latency, self.bandwidth = latency, bandwidth
        self._wire_free = 0.0
        self._jobs: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            due, start, outputs, results, future = self._jobs.get()
            try:
                work = start()
                work.wait()
                time.sleep(max(0.0, due - time.perf_counter()))
                for output, result in zip(outputs, results, strict=True):
                    output.copy_(result)
                future.set_result(outputs)
            except Exception as error:
                future.set_exception(error)

    def _send(self, outputs: list[Tensor], results: list[Tensor], start: Callable[[], Any]) -> Any:
        num_bytes = sum(output.nbytes for output in outputs)
        self._wire_free = max(time.perf_counter(), self._wire_free) + self.latency + num_bytes / self.bandwidth
        for output in outputs:
            if output.is_floating_point():
                output.fill_(float("nan"))
        future: Any = torch.futures.Future()
        self._jobs.put((self._wire_free, start, outputs, results, future))
        return _create_work_from_future(future)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        copies = [tensor.clone() for tensor in tensors]
        return self._send(tensors, copies, lambda: self._inner.allreduce(copies, options or dist.AllreduceOptions()))

    def _allgather_base(self, output: Tensor, part: Tensor, options: Any = None) -> Any:
        result, part = torch.empty_like(output), part.clone()
        return self._send([output], [result], lambda: ALL_GATHER(result, part, group=self._inner, async_op=True))

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, options: Any = None) -> Any:
        result, whole = torch.empty_like(output), whole.clone()
        op = dist.ReduceOp.SUM if options is None else options.reduceOp
        return self._send(
            [output], [result], lambda: REDUCE_SCATTER(result, whole, op=op, group=self._inner, async_op=True)
        )

    def alltoall_base(
        self, output: Tensor, whole: Tensor, receive_sizes: list[int], send_sizes: list[int], options: Any = None
    ) -> Any:
        result, whole = torch.empty_like(output), whole.clone()
        sizes = (receive_sizes or None, send_sizes or None)
        return self._send(
            [output],
            [result],
            lambda: dist.all_to_all_single(result, whole, *sizes, group=self._inner, async_op=True),
        )

    # the names of torch 2.13
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        return self._inner.broadcast(tensors, options)

    def barrier(self, options: Any = None) -> Any:
        return self._inner.barrier(options or dist.BarrierOptions())

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name


def delayed_mesh(
    groups: list[list[int]], *, latency: float, bandwidth: float = float("inf"), name: str = "tp"
) -> DeviceMesh:
    """This rank's one-dimensional mesh among these, over such a group each; gloo has been initialised.

    Args:
        groups: the ranks of each; every rank of the job calls this.
        latency, bandwidth: of each link, in seconds and bytes per second.
        name: of the dimension.
    """
    meshes = []
    for ranks in groups:
        inner = dist.new_group(ranks, backend="gloo")

        def create(store: Any, rank: int, size: int, timeout: Any, inner: Any = inner) -> DelayedGroup:
            return DelayedGroup(inner, rank, size, latency, bandwidth)

        if NAME not in dist.Backend.backend_list:
            dist.Backend.register_backend(NAME, create, devices=["cpu"])
        dist.Backend._plugins[NAME.upper()] = dist.Backend._BackendPlugin(create, False)
        group = dist.new_group(ranks, backend=NAME)
        if dist.get_rank() in ranks:
            meshes.append(DeviceMesh.from_group(group, "cpu", mesh=ranks, mesh_dim_names=(name,)))
    return meshes[0]
