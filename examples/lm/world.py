"""The processes of one job, as torchrun starts them; and the wish to stop, which all of them must share.

    torchrun --nproc-per-node 2 -m examples.train_moe_lm --out report

Every process holds the whole model and computes its share of each batch. Gradients are averaged by hand: it takes six
lines, and hides nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from examples.lm.errors import JobError


class World:
    """This process's place among all: ``rank`` of ``size``, and its ``device``. Use it as a context manager.

    A process group is made only where torchrun started more than one process.

    Args:
        device: ``"auto"``, a GPU if there is one; or a name that torch knows. A GPU without a number is that of the
            process's local rank.

    Raises:
        JobError: there is no such device.
    """

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes to come here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes: one flat buffer, one all-reduce."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.size
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise JobError("--device", repr(name), "'auto', or a device such as 'cpu' or 'cuda:0'") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise JobError("--device", repr(name), "'cpu': torch finds no GPU here")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise JobError("--device", f"GPU {index}", f"a number below {torch.cuda.device_count()}, the GPUs here")
    return torch.device("cuda", index)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish that the training loop grants after the step; a second one ends it at once.

    Use it as a context manager; ``signum`` is the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
