"""Residual add, norm and gather of the *next* sub-block as one autograd node that is older than the present sub-block.

Autograd runs young nodes first, so a node made before sub-block k - 1 runs, in backward, after that sub-block's: what
it waits for is hidden by it. The node is made early and filled late, when the sum it adds has arrived. The same node,
filled at once and run in backward at once, is what a :class:`Lane` runs beside the cores under sequence parallelism:
the gather of the next input must not queue behind the scatter of this output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sonic.parallel.in_flight import AT_ONCE, Collective, InFlight, Mailbox, stand_in

__all__ = ["CudaLane", "EarlyJoin", "Lane", "call_norm"]


class Lane(Protocol):
    """Where joins, norms and gathers run beside the cores; entering it waits for what the main lane has started."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...

    def uses(self, *tensors: Tensor) -> None:
        """Tensors made outside that are used inside; called inside."""

    def gives(self, *tensors: Tensor) -> None:
        """Tensors made inside that will be used outside; called outside."""

    def join(self) -> None:
        """Make the main lane wait for this one."""


class CudaLane:
    """A stream of its own, of high priority; autograd runs a node's backward on the stream of its forward."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._contexts: list[Any] = []

    def __enter__(self) -> CudaLane:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        context = torch.cuda.stream(self._stream)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, *exception: object) -> None:
        self._contexts.pop().__exit__(*exception)

    def uses(self, *tensors: Tensor) -> None:
        """Keep the memory of tensors made outside until this stream is done with it."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def gives(self, *tensors: Tensor) -> None:
        """Keep the memory of tensors made here until the present stream is done with it."""
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def join(self) -> None:
        """Make the present stream wait for this one."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def call_norm(
    norm: nn.Module, x: Tensor, dtype: torch.dtype | None, reduce: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """``norm(x)``, cast to ``dtype`` if there is one.

    Args:
        norm: a norm over the last dimension.
        x: the stream.
        dtype: of the result; None: as the norm returns it.
        reduce: identity on the norm's parameters that sums their gradients, where each rank sees a part of them; None:
            it sees all.
    """
    if reduce is None:
        n = norm(x)
    else:
        n = torch.func.functional_call(norm, _reduced(norm, reduce), (x,))
    return n if dtype is None else n.to(dtype)


def _reduced(norm: nn.Module, reduce: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    return {name: parameter if reduce is None else reduce(parameter) for name, parameter in norm.named_parameters()}


class EarlyJoin:
    """``x' = x + sum of the entries``, ``n = forward(norm(x'))``, made before the entries are complete.

    Attributes:
        x: x', to be read after :meth:`fill`.
        n: the normed stream, through ``forward``, in flight after :meth:`fill`.
    """

    def __init__(
        self,
        x: Tensor,
        entries: Sequence[InFlight],
        norm: nn.Module,
        forward: Collective,
        backward: Collective,
        *,
        gathered: tuple[int, int] | None,
        kind: str,
        dtype: torch.dtype | None,
        reduce: Callable[[Tensor], Tensor] | None,
        lane: Lane | None,
    ) -> None:
        """
        Args:
            x: the stream.
            entries: what is to be added to it; nobody else waits for them.
            norm: shape-preserving.
            forward, backward: what the normed stream goes through, and its gradient.
            gathered: (dim, times): ``forward`` makes that dimension so many times as large; None: it does not.
            kind: for reports.
            dtype: of n; None: that of x'.
            reduce: as in :func:`call_norm`.
            lane: run there, and at once; None: wait for :meth:`fill`, and in backward for what is younger.
        """
        parameters = _reduced(norm, reduce)
        mailbox = Mailbox(kind, backward)
        self._job = job = _Job(norm, tuple(parameters), entries, mailbox, forward, dtype, lane)
        job.x_dtype = x.dtype
        for entry in entries:
            job.x_dtype = torch.promote_types(job.x_dtype, entry.tensor.dtype)
        shape = list(x.shape)
        if gathered is not None:
            dim, times = gathered
            shape[dim] *= times
        job.gathered_shape = torch.Size(shape)
        job.is_recording = torch.is_grad_enabled()
        self.x, n = _EarlyJoin.apply(job, x, *(entry.tensor for entry in entries), *parameters.values())
        self.n = InFlight(n, kind, mailbox)
        self._is_filled = False
        self._inputs = (x, tuple(parameters.values()))
        if lane is not None:
            if n.grad_fn is not None:
                n.grad_fn._set_sequence_nr(AT_ONCE)
            self.fill()

    def fill(self) -> Tensor:
        """Wait for the entries, add, norm, issue; once.

        Returns:
            x'.
        """
        if self._is_filled:
            return self.x
        self._is_filled = True
        job, (x, parameters) = self._job, self._inputs
        del self._inputs
        with job.lane or contextlib.nullcontext():
            with torch.no_grad():
                for entry in job.entries:
                    added = (
                        entry.tensor if entry.is_waited else entry._mailbox.take("forward", aside=job.lane is not None)
                    )
                    if job.lane is not None:
                        job.lane.uses(x, added)
                    x = x + added
                    del added
                x = x.detach()
            job.entries = [_Sent(entry) for entry in job.entries]
            with torch.set_grad_enabled(job.is_recording):
                job.x = x.detach().requires_grad_(job.is_recording)
                job.parameters = [p.detach().requires_grad_(job.is_recording and p.requires_grad) for p in parameters]
                n = torch.func.functional_call(job.norm, dict(zip(job.names, job.parameters, strict=True)), (job.x,))
                job.n = n.to(job.x_dtype if job.dtype is None else job.dtype)
            self.x.data = x
            job.mailbox.issue(job.forward, job.n.detach(), "forward", wait=False)
            if not job.is_recording:
                job.release()
        return self.x


class _Sent:
    """What backward needs to know of an entry."""

    def __init__(self, entry: InFlight) -> None:
        self.mailbox = None if entry.is_waited else entry._mailbox
        self.dtype, self.shape = entry.tensor.dtype, entry.tensor.shape


class _Job:
    """What the early node and its filling share."""

    x_dtype: torch.dtype
    gathered_shape: torch.Size
    is_recording: bool

    def __init__(
        self,
        norm: nn.Module,
        names: tuple[str, ...],
        entries: Sequence[Any],
        mailbox: Mailbox,
        forward: Collective,
        dtype: torch.dtype | None,
        lane: Lane | None,
    ) -> None:
        self.norm, self.names, self.entries, self.mailbox = norm, names, list(entries), mailbox
        self.forward, self.dtype, self.lane = forward, dtype, lane
        self.x: Tensor | None = None
        self.n: Tensor | None = None
        self.parameters: list[Tensor] = []

    def release(self) -> None:
        self.x, self.n, self.parameters = None, None, []


class _EarlyJoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, *entries_and_parameters: Tensor) -> Any:
        ctx.job = job
        ctx.set_materialize_grads(False)
        like = x.new_empty(0, dtype=job.x_dtype)
        n_like = like if job.dtype is None else like.to(job.dtype)
        return stand_in(like, x.shape), stand_in(n_like, job.gathered_shape)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, _: Tensor | None) -> Any:
        job: _Job = ctx.job
        if job.n is None or job.x is None:
            raise RuntimeError(
                "sonic.parallel: backward ran a second time through a block under backward_order='early' or a lane, "
                "expected one backward per forward"
            )
        with job.lane or contextlib.nullcontext():
            dn = job.mailbox.take("backward", aside=job.lane is not None)
            wanted = [job.x, *(p for p in job.parameters if p.requires_grad)]
            with torch.enable_grad():
                grads = iter(torch.autograd.grad(job.n, wanted, dn.to(job.n.dtype)))
            through_norm = next(grads)
            dx = through_norm if dx is None else dx + through_norm
            dparameters = [next(grads) if p.requires_grad else None for p in job.parameters]
            dentries = []
            for sent in job.entries:
                dentry = dx.to(sent.dtype)
                if sent.mailbox is None:
                    dentries.append(dentry)
                else:
                    sent.mailbox.issue(sent.mailbox.backward, dentry, "backward", wait=sent.mailbox.eager_wait)
                    dentries.append(stand_in(dentry, sent.shape))
        job.release()
        return None, dx, *dentries, *dparameters
