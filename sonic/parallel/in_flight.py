"""Collectives in flight: issued now, awaited later, forward and backward.

A collective that overlaps with computation is two nodes of the autograd graph, *issue* and *wait*, with other nodes
between them in the order of execution. Three things go wrong in practice, and are ruled out here:

- *The buffer is read before it is complete.* What travels along the graph between issue and wait, in both directions,
  is a stand-in of the right shape that takes no memory and holds NaN; the real tensor waits in a mailbox. Whatever
  touches the stand-in (a cast that a wrapper slipped in, a hook, a second consumer) yields NaN, not a plausible number.
- *Autograd waits at once.* The engine runs the newest forward node first; the wait node of a gradient would run right
  after its issue node. :func:`reduce_gradient` gives the wait node an older sequence number, so that all that was
  computed since then runs backward first.
- *Nobody knows what was hidden.* Every issue and wait is told to the log that :func:`logging_to` names.

======================  ====================================  =========================================
function                forward                               backward
======================  ====================================  =========================================
:func:`issue`           issues, ``InFlight.wait()`` awaits    wait node issues, issue node awaits
:func:`reduce_gradient` identity                              issues; awaits at the node ``wait_at``
======================  ====================================  =========================================
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sonic.shapes import argument_error, check_choice

__all__ = [
    "Collective",
    "InFlight",
    "Log",
    "Started",
    "all_gather",
    "all_reduce",
    "can_set_order",
    "issue",
    "logging_to",
    "reduce_gradient",
    "reduce_scatter",
    "sequence_number",
    "waiting_at",
]


class Work(Protocol):
    """What a collective returns: ``torch.distributed.Work``, or anything that can be waited for."""

    def wait(self) -> object:
        """Return when it is done; on a GPU, make the current stream wait."""


@dataclass
class Started:
    """A collective that was issued.

    Attributes:
        tensor: what it writes.
        work: what to wait for before ``tensor`` may be read; None: it is complete.
        finish: applied to ``tensor`` after the wait, such as a change of layout; it must not communicate.
        op: name of the collective, for reports: ``"all_reduce"``, ``"all_gather"``, ``"reduce_scatter"``, …
        num_ranks: how many take part.
        num_bytes: of the larger of its input and output on this rank; None: of ``tensor``.
        shape: of what :meth:`wait` returns; None: that of ``tensor``.
    """

    tensor: Tensor
    work: Work | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    op: str = "collective"
    num_ranks: int = 1
    num_bytes: int | None = None
    shape: torch.Size | None = None

    def wait(self) -> Tensor:
        """Wait (on a GPU: make the current stream wait) and return the result."""
        if self.work is not None:
            self.work.wait()
        return self.tensor if self.finish is None else self.finish(self.tensor)


# Starts a collective on a tensor, which it must not change: the caller may still hold it.
Collective = Callable[[Tensor], Started]


class Log(Protocol):
    """Hears of every collective: see :class:`sonic.parallel.overlap_report.OverlapReport`."""

    def issued(self, kind: str, phase: str, started: Started) -> Any:
        """A collective was issued in ``"forward"`` or ``"backward"``; what is returned comes back below."""

    def waiting(self, entry: Any) -> None:
        """The program is about to wait for it."""

    def waited(self, entry: Any, aside: bool = False) -> None:
        """The wait is over; ``aside``: it held up a side lane, not the computation."""


_LOG: contextvars.ContextVar[Log | None] = contextvars.ContextVar("sonic_parallel_log", default=None)
_WAIT_AT: contextvars.ContextVar[int | None] = contextvars.ContextVar("sonic_parallel_wait_at", default=None)


@contextlib.contextmanager
def logging_to(log: Log | None) -> Iterator[None]:
    """Tell ``log`` of every collective whose *forward* runs in this context, and of its backward, whenever that
    runs.
    """
    token = _LOG.set(log)
    try:
        yield
    finally:
        _LOG.reset(token)


@contextlib.contextmanager
def waiting_at(number: int | None) -> Iterator[None]:
    """What :func:`issue` and :func:`reduce_gradient` take as ``wait_at`` where they are given none."""
    token = _WAIT_AT.set(number)
    try:
        yield
    finally:
        _WAIT_AT.reset(token)


# ---------------------------------------------------------------- collectives

# torch 2.13 gave both a new name
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(group: dist.ProcessGroup | None) -> Collective:
    """Sum over the ranks of ``group``; None or one rank: nothing to do."""

    def start(x: Tensor) -> Started:
        if group is None or group.size() == 1:
            return Started(x)
        out = x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(out, group=group, async_op=True)
        return Started(out, work, op="all_reduce", num_ranks=group.size())

    return start


def all_gather(group: dist.ProcessGroup | None, dim: int = 0) -> Collective:
    """The parts of all ranks, one after the other along ``dim``; all parts have the same shape."""

    def start(x: Tensor) -> Started:
        if group is None or group.size() == 1:
            return Started(x)
        shape = _scaled(x.shape, dim, group.size(), 1)
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        work = _ALL_GATHER(out, x, group=group, async_op=True)
        finish = None if dim == 0 else lambda gathered: gathered.movedim(0, dim).contiguous()
        return Started(out, work, finish, "all_gather", group.size(), shape=shape)

    return start


def reduce_scatter(group: dist.ProcessGroup | None, dim: int = 0) -> Collective:
    """This rank's part, along ``dim``, of the sum over all ranks.

    Raises:
        ValueError: when the collective starts: that dimension does not divide evenly.
    """

    def start(x: Tensor) -> Started:
        if group is None or group.size() == 1:
            return Started(x)
        if x.shape[dim] % group.size():
            wanted = f"a multiple of {group.size()} along dim {dim}: every rank gets an equal part of the sequence"
            raise argument_error("sonic.parallel.reduce_scatter", "x", tuple(x.shape), wanted)
        shape = _scaled(x.shape, dim, 1, group.size())
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
        work = _REDUCE_SCATTER(out, x, group=group, async_op=True)
        finish = None if dim == 0 else lambda part: part.movedim(0, dim).contiguous()
        return Started(out, work, finish, "reduce_scatter", group.size(), x.nbytes, shape)

    return start


def _scaled(shape: torch.Size, dim: int, times: int, divided_by: int) -> torch.Size:
    sizes = list(shape)
    sizes[dim] = sizes[dim] * times // divided_by
    return torch.Size(sizes)


# ---------------------------------------------------------------- in flight


class InFlight:
    """The result of a collective that may still be running.

    Attributes:
        tensor: a stand-in of the result's shape and dtype, tied to the graph; not to be read.
        kind: what it is, for reports: ``"attention"``, ``"mlp"``, ``"dispatch"``, …
    """

    def __init__(self, tensor: Tensor, kind: str, mailbox: Mailbox) -> None:
        self.tensor = tensor
        self.kind = kind
        self._mailbox = mailbox
        self._result: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, kind: str) -> InFlight:
        """A tensor that is complete already, in the clothes of one that is not."""
        done = cls(tensor, kind, Mailbox(kind, None))
        done._result = tensor
        return done

    @property
    def is_waited(self) -> bool:
        """Whether :meth:`wait` was called."""
        return self._result is not None

    def wait(self) -> Tensor:
        """The complete tensor. Waits at the first call; later ones return the same tensor."""
        if self._result is None:
            self._result = _Wait.apply(self.tensor, self._mailbox)
            if not self._mailbox.eager_wait:
                _run_at_once(self._result)
            self.tensor = self._result  # lets the graph be freed with it
        return self._result

    def __repr__(self) -> str:
        return f"InFlight({self.kind}, {tuple(self.tensor.shape)}, {'complete' if self.is_waited else 'in flight'})"


def issue(
    x: Tensor,
    forward: Collective,
    backward: Collective,
    *,
    kind: str,
    overlap: str = "full",
    wait_at: int | None = None,
) -> InFlight:
    """Start ``forward`` on x; its gradient goes through ``backward``.

    In backward the wait node issues and the issue node awaits, so what ran between them in forward hides that
    collective too: autograd runs it, by its age, in between.

    Args:
        x: any tensor; it is not changed.
        forward: the collective, such as ``all_reduce(group)``.
        backward: its transpose, applied to the gradient of the result: for the all-reduce of partial sums this is the
            identity, ``all_reduce(None)``, since every rank holds the same gradient; ``all_gather`` for
            ``reduce_scatter`` and the other way round.
        kind: for reports.
        overlap: ``"off"``: wait at once; ``"forward"``: only backward waits at once; ``"full"``.
        wait_at: let the gradient's wait come after the backward of all that ran since this :func:`sequence_number`,
            where that is earlier than this call. None: what :func:`waiting_at` says, or nothing.

    Returns:
        the result in flight.
    """
    check_choice("sonic.parallel.issue", "overlap", overlap, ("off", "forward", "full"))
    mailbox = Mailbox(kind, backward, eager_wait=overlap != "full")
    tensor = _Issue.apply(x, forward, mailbox)
    if wait_at is None:
        wait_at = _WAIT_AT.get()
    if wait_at is not None:
        _set_order(tensor, wait_at)
    in_flight = InFlight(tensor, kind, mailbox)
    if overlap == "off":
        in_flight.wait()
    return in_flight


def reduce_gradient(
    x: Tensor,
    collective: Collective,
    *,
    kind: str,
    overlap: str = "full",
    wait_at: int | None = None,
) -> Tensor:
    """x itself; its gradient goes through ``collective``.

    The collective is issued as soon as the gradient of x is there, before anything else that autograd could run, and
    awaited when autograd gets to what ran before ``wait_at``.

    Args:
        x: the input of a tensor-parallel computation, equal on all ranks.
        collective: sums the ranks' gradients, such as ``all_reduce(group)``.
        kind: for reports.
        overlap: ``"full"``; with ``"off"`` and ``"forward"`` the issue node waits at once.
        wait_at: the :func:`sequence_number` at which that computation started under which the collective is to hide;
            None: what :func:`waiting_at` says, or autograd decides, which is soon.

    Raises:
        RuntimeError: ``wait_at`` is given, and this torch cannot order nodes: ask :func:`can_set_order`.
    """
    check_choice("sonic.parallel.reduce_gradient", "overlap", overlap, ("off", "forward", "full"))
    mailbox = Mailbox(kind, collective, eager_wait=overlap != "full")
    waited = _GradientWait.apply(x, mailbox)
    if wait_at is None:
        wait_at = _WAIT_AT.get()
    if wait_at is not None:
        _set_order(waited, wait_at)
    out: Tensor = _GradientIssue.apply(waited, mailbox)
    if overlap == "full":
        _run_at_once(out)
    return out


# ---------------------------------------------------------------- the order in which autograd runs


AT_ONCE = 2**62  # younger than any node that comes about by running


def sequence_number() -> int:
    """The age of the next autograd node of this thread; in backward, larger numbers run first."""
    return torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]


def can_set_order() -> bool:
    """Whether this torch lets a node's sequence number be set (a private method; all from 2.2 to 2.13 have it)."""
    return hasattr(torch._C._autograd, "_get_sequence_nr") and hasattr(torch.autograd.Function, "_set_sequence_nr")


def _set_order(tensor: Tensor, number: int) -> None:
    node = tensor.grad_fn
    if node is None:
        return
    if not hasattr(node, "_set_sequence_nr"):
        raise RuntimeError(
            "sonic.parallel: this torch has no Node._set_sequence_nr, expected one that lets nodes be ordered; "
            "take backward_order='early' or 'blocking'"
        )
    node._set_sequence_nr(min(number, node._sequence_nr()))


def _run_at_once(tensor: Tensor | None) -> None:
    """Let the node that issues in backward run before others that are ready too, such as weight gradients."""
    if tensor is not None and tensor.grad_fn is not None and can_set_order():
        tensor.grad_fn._set_sequence_nr(AT_ONCE)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- nodes


class Mailbox:
    """Carries what is in flight between the two nodes of a pair; a plain object, so that no wrapper copies it."""

    def __init__(self, kind: str, backward: Collective | None, eager_wait: bool = False) -> None:
        self.kind = kind
        self.backward = backward
        self.eager_wait = eager_wait  # backward waits as soon as it has issued
        self.log = _LOG.get()
        self._started: Started | None = None
        self._phase = ""
        self._entry: Any = None
        self._result: Tensor | None = None

    def issue(self, collective: Collective, x: Tensor, phase: str, wait: bool) -> None:
        """Start ``collective`` on ``x``, or with ``wait`` run it to its end; ``phase`` goes into the log.

        Raises:
            RuntimeError: the box is full.
        """
        if self._started is not None or self._result is not None:
            raise RuntimeError(
                f"sonic.parallel: a second {phase} {self.kind} collective was issued before the first was awaited, "
                "expected one producer and one consumer of what is in flight"
            )
        self._started, self._phase = collective(x), phase
        if self.log is not None and self._started.work is not None:
            self._entry = self.log.issued(self.kind, phase, self._started)
        if wait:
            self._result = self._wait()

    def take(self, phase: str, aside: bool = False) -> Tensor:
        """Wait, and empty the box; ``aside``: on a side lane.

        Raises:
            RuntimeError: the box is empty, or what is in it was issued in the other phase.
        """
        if self._phase != phase:
            raise RuntimeError(f"sonic.parallel: {self.kind} was awaited but never issued, or awaited twice")
        self._phase = ""
        result, self._result = self._result, None
        return self._wait(aside) if result is None else result

    def _wait(self, aside: bool = False) -> Tensor:
        started, self._started = self._started, None
        assert started is not None, "what was issued is there"
        entry, self._entry = self._entry, None
        if entry is not None:
            assert self.log is not None, "an entry comes from a log"
            self.log.waiting(entry)
        result = started.wait()
        if entry is not None:
            assert self.log is not None, "an entry comes from a log"
            self.log.waited(entry, aside)
        return result


def stand_in(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape without memory of its own. NaN, unless anomaly mode would take that for a fault."""
    value = 0.0 if torch.is_anomaly_enabled() or not like.is_floating_point() else float("nan")
    return like.new_full((), value).expand(shape)


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Collective, mailbox: Mailbox) -> Tensor:
        ctx.mailbox, ctx.dtype = mailbox, x.dtype
        mailbox.issue(forward, x, "forward", wait=False)
        started = mailbox._started
        assert started is not None, "it was issued just now"
        return stand_in(started.tensor, started.tensor.shape if started.shape is None else started.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.mailbox.take("backward").to(ctx.dtype), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mailbox: Mailbox) -> Tensor:
        ctx.mailbox, ctx.shape = mailbox, tensor.shape
        result = mailbox.take("forward")
        # a tensor with a history of its own (nothing was sent) cannot be given another
        return result.view_as(result) if result.requires_grad else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.mailbox.issue(ctx.mailbox.backward, grad, "backward", wait=ctx.mailbox.eager_wait)
        return stand_in(grad, ctx.shape), None


class _GradientWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mailbox: Mailbox) -> Tensor:
        ctx.mailbox, ctx.dtype = mailbox, x.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.mailbox.take("backward").to(ctx.dtype), None


class _GradientIssue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mailbox: Mailbox) -> Tensor:
        ctx.mailbox = mailbox
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.mailbox.issue(ctx.mailbox.backward, grad, "backward", wait=ctx.mailbox.eager_wait)
        return stand_in(grad, grad.shape), None
