"""The processes of one job as a mesh of data-, expert- and tensor-parallel ranks, and what becomes of it if one dies.

    rank = (dp_rank * ep + ep_rank) * tp + tp_rank

Ranks along ``tp`` have the same text and share every matrix; ranks along ``dp`` and ``ep`` have different text.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from examples.lm.errors import JobError
from examples.lm.job import Stopped
from examples.lm.parallel_liveness import Liveness
from examples.lm.world import World, choose_device
from sonic.parallel.sharding import local_part


@dataclass(frozen=True)
class MeshSizes:
    """How many ranks each axis has.

    Attributes:
        dp: data parallel.
        ep: the experts are split among so many, each with text of its own.
        tp: attention heads, and each expert, are split among so many.
    """

    dp: int
    ep: int
    tp: int

    @classmethod
    def of(cls, num_ranks: int, *, tp: int, ep: int) -> MeshSizes:
        """What is left over is data parallel.

        Raises:
            JobError: it does not come out even.
        """
        if num_ranks % (tp * ep):
            raise JobError("--tp times --ep", tp * ep, f"a divisor of {num_ranks}, the number of processes")
        return cls(num_ranks // (tp * ep), ep, tp)

    def __str__(self) -> str:
        return f"dp {self.dp} x ep {self.ep} x tp {self.tp}"


class ParallelWorld(World):
    """This process's place in the mesh. Use it as a context manager; alone it needs no launcher and no process group.

    Inside, a process that dies ends the others within ``timeout``, with a message that names it.

    Args:
        device: as :class:`World` takes it.
        sizes: of the mesh; its ranks are all the processes.
        timeout: seconds that a collective may take, and within which the others end when one process is gone.
        program: name that messages begin with.

    Attributes:
        data_rank, data_size: this process's place among those with different text: ``dp * ep`` of them.
        data_group: their process group; None: this process alone.
    """

    def __init__(self, device: str, sizes: MeshSizes, *, timeout: float, program: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device)
        self.sizes = sizes
        self.data_size = sizes.dp * sizes.ep
        self.data_rank = self.rank // sizes.tp
        self.data_group: dist.ProcessGroup | None = None
        self._mesh: DeviceMesh | None = None
        self._liveness: Liveness | None = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size == 1:
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        self._liveness = Liveness(self.rank, self.size, timeout=timeout, program=program)
        shape = (sizes.dp, sizes.ep, sizes.tp)
        self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("dp", "ep", "tp"))
        if self.data_size > 1:
            ranks = torch.arange(self.size).view(self.data_size, sizes.tp).t().tolist()
            self.data_group, _ = dist.new_subgroups_by_enumeration(ranks)

    def axis(self, name: str) -> DeviceMesh | None:
        """The ranks of one axis, ``"dp"``, ``"ep"`` or ``"tp"``; None where that is this one alone."""
        return None if self._mesh is None or getattr(self.sizes, name) == 1 else self._mesh[name]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of one axis."""
        mesh = self.axis(name)
        return None if mesh is None else mesh.get_group()

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        _: TracebackType | None = None,
    ) -> None:
        if self._liveness is None:
            return
        if error is not None and not isinstance(error, Stopped):
            self._liveness.fail(error)  # the others learn of it
        else:
            dist.barrier()
            self._liveness.stop()
            dist.barrier()  # whoever holds the store stays until nobody looks any more
        if error is None or isinstance(error, Stopped):
            dist.destroy_process_group()


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Replace each rank's part of every gradient by its mean over ``group``: one flat buffer, one all-reduce."""
    if group is None:
        return
    parts: list[Tensor] = [local_part(one.grad) for one in parameters if one.grad is not None]
    if not parts:
        return
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    flat /= group.size()
    for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(mean.view_as(part))
