"""The state that travels through a stack of residual blocks, and the schedule by which its sub-blocks run.

:mod:`sonic.parallel.wiring` says what a sub-block reads. Here that is done, with every collective issued as soon as its
input is there and awaited by the first reader that must not miss it. One sub-block, with R the sum over the ranks::

    forward                                   backward (the same lines, read upwards)
    x = x + pending.wait()                    the stream's gradient is added to by the norm below
    n = norm(x)                               norm
    n = reduce_gradient(n)                    issues R of n's gradient; awaits it one sub-block later
    y = core(n)                               core
    pending += issue(y, R)                    every rank holds the gradient of the sum: nothing to send
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.parallel.early import EarlyJoin, Lane, call_norm
from sonic.parallel.in_flight import (
    Collective,
    InFlight,
    Started,
    all_gather,
    all_reduce,
    can_set_order,
    issue,
    reduce_gradient,
    reduce_scatter,
    sequence_number,
    waiting_at,
)
from sonic.shapes import argument_error, check_choice

__all__ = ["LadderState", "Parts", "Pending", "Schedule"]

_READS = {  # wiring -> what attention, and what the MLP, leaves out of the stream; see the table in wiring.py
    "standard": ("nothing", "nothing"),
    "parallel": ("nothing", "nothing"),
    "ladder": ("last", "last"),
    "farskip": ("routed", "last"),
    "shortcut": ("nothing", "last"),
}


class Waitable(Protocol):
    """What is pending: :class:`InFlight`, or an MoE's handle that also sums what it waited for."""

    def wait(self) -> Tensor:
        """The complete tensor; the same one at every call."""


@dataclass
class Pending:
    """An output that is not in the stream yet.

    Attributes:
        result: what to wait for.
        tag: ``"attention"``, ``"mlp"``, ``"shared"`` or ``"routed"``.
        sub_block: index of the sub-block that it comes from.
        start: the :func:`sequence_number` at which that sub-block began.
    """

    result: Waitable
    tag: str
    sub_block: int
    start: int


@dataclass(eq=False)
class LadderState:
    """What travels from layer to layer; not a pytree, so that no wrapper casts or copies what is in it.

    Attributes:
        x: the stream, without what is pending.
        pending: outputs that are issued and not yet added, oldest first.
        num_sub_blocks: how many have run.
        early: the next reader's node, if it was made early.
        start: the :func:`sequence_number` at which the stack began.
    """

    x: Tensor
    pending: list[Pending] = field(default_factory=list)
    num_sub_blocks: int = 0
    early: EarlyJoin | None = None
    start: int = field(default_factory=sequence_number)

    def stale(self, leave: str) -> Tensor:
        """The stream as a reader sees it that leaves out ``"nothing"``, the ``"last"`` sub-block's output, or only what
        came from its ``"routed"`` experts. Waits for exactly the rest.
        """
        last = self.num_sub_blocks - 1
        kept = []
        for entry in self.pending:
            is_left = leave != "nothing" and entry.sub_block == last and (leave == "last" or entry.tag == leave)
            if is_left:
                kept.append(entry)
            else:
                self.x = self.x + entry.result.wait()
        self.pending = kept
        return self.x

    def flush(self) -> Tensor:
        """The complete stream; waits for everything."""
        return self.stale("nothing")

    def peek(self) -> Tensor:
        """The complete stream, for onlookers: what is pending stays so, but all of it is waited for."""
        x = self.x if self.early is None else self.early.fill()
        for entry in self.pending:
            x = x + entry.result.wait()
        return x

    def window(self) -> int | None:
        """Where the sub-block began whose output was left out: gradients of the reader hide under its backward."""
        return min((entry.start for entry in self.pending), default=None)


@dataclass(frozen=True)
class Parts:
    """The four modules of a layer, wherever its class keeps them, and how they are wired.

    Attributes:
        attention_norm, attention, mlp_norm, mlp: functions of tensors; the two cores communicate nothing, and return
            this rank's part of a sum over the tensor-parallel ranks. An MLP with a method ``begin`` is an MoE.
        wiring: a name of :data:`sonic.parallel.wiring.WIRINGS`.
    """

    attention_norm: nn.Module
    attention: Callable[..., Any]
    mlp_norm: nn.Module
    mlp: Callable[..., Any]
    wiring: str

    @property
    def is_moe(self) -> bool:
        """Whether the MLP can be run in parts."""
        return hasattr(self.mlp, "begin")


class Schedule:
    """When collectives are issued and awaited. It has no influence on what is computed."""

    def __init__(
        self,
        tp_group: dist.ProcessGroup | None = None,
        *,
        overlap: str = "full",
        backward_order: str = "seqnr",
        sequence_parallel: bool = False,
        sequence_dim: int = -2,
        compute_dtype: torch.dtype | None = None,
        lane: Lane | None = None,
    ) -> None:
        """
        Args:
            tp_group: the ranks over which the cores' outputs are summed; None: one rank.
            overlap: ``"off"``: every collective is awaited where it is issued; ``"forward"``: those of backward are;
                ``"full"``.
            backward_order: how autograd is made to wait late. ``"seqnr"``: the age of the wait node is set;
                ``"early"``: the node is made early and filled late, by public means alone; ``"blocking"``: not at all.
                Where this torch cannot set ages, ``"seqnr"`` warns and becomes ``"early"``.
            sequence_parallel: the stream holds this rank's part of the sequence: gather before a core, scatter the sum
                after it.
            sequence_dim: of the stream; the rank's part is along it.
            compute_dtype: cast the normed input to it before it is sent; None: as the norm returns it.
            lane: where joins, norms and gathers run beside the cores under ``sequence_parallel``; see
                :class:`sonic.parallel.early.Lane`. None: in line.
        """
        where = "sonic.parallel.Schedule"
        check_choice(where, "overlap", overlap, ("off", "forward", "full"))
        check_choice(where, "backward_order", backward_order, ("seqnr", "early", "blocking"))
        if tp_group is not None and tp_group.size() == 1:
            tp_group = None
        if sequence_parallel and tp_group is None:
            raise argument_error(where, "sequence_parallel", True, "tensor-parallel ranks to share the sequence")
        if backward_order == "seqnr" and not can_set_order():
            warnings.warn(
                "sonic.parallel: this torch cannot set the sequence number of an autograd node; backward_order is "
                "'early' instead of 'seqnr'",
                stacklevel=3,
            )
            backward_order = "early"
        self.tp_group = tp_group
        self.overlap = overlap
        self.backward_order = backward_order
        self.sequence_parallel = sequence_parallel
        self.sequence_dim = sequence_dim
        self.compute_dtype = compute_dtype
        self.lane = lane

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        """Process groups and streams are shared, never copied."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        return copied

    def run_layer(
        self,
        parts: Parts,
        state: LadderState,
        following: Parts | None,
        attention_inputs: Mapping[str, Any],
        mlp_inputs: Mapping[str, Any],
    ) -> Any:
        """Run both sub-blocks of a layer; ``state`` is changed in place.

        Args:
            parts: the layer.
            state: what the layer before left.
            following: the layer after, which may be prepared early; None at the end.
            attention_inputs, mlp_inputs: keyword arguments of the cores.

        Returns:
            What attention returned beside its output: None, or a tuple.
        """
        if parts.wiring in ("farskip", "shortcut") and not parts.is_moe:
            wanted = f"an MoE, with begin(), in a layer wired as {parts.wiring!r}"
            raise argument_error("sonic.parallel", "mlp", f"a {type(parts.mlp).__name__}", wanted)
        if parts.wiring == "parallel":
            return self._run_parallel(parts, state, attention_inputs, mlp_inputs)
        if parts.wiring == "shortcut":
            return self._run_shortcut(parts, state, attention_inputs, mlp_inputs)
        attention_leaves, mlp_leaves = _READS[parts.wiring]
        start = sequence_number()
        following_read = None if parts.is_moe else (parts.mlp_norm, mlp_leaves, "mlp")
        n = self._enter(state, parts.attention_norm, attention_leaves, "attention", following_read)
        y, rest = _split(parts.attention(n, **attention_inputs))
        self._push(state, self._leave(y, "attention"), "attention", start)
        state.num_sub_blocks += 1
        start = sequence_number()
        if parts.is_moe:
            self._run_moe(parts, state, mlp_leaves, start, mlp_inputs)
        else:
            following_read = None
            if following is not None:
                following_read = (following.attention_norm, _READS[following.wiring][0], "attention")
            n = self._enter(state, parts.mlp_norm, mlp_leaves, "mlp", following_read)
            y, _ = _split(parts.mlp(n, **mlp_inputs))
            self._push(state, self._leave(y, "mlp"), "mlp", start)
        state.num_sub_blocks += 1
        return rest

    def begin(self, x: Tensor) -> LadderState:
        """The state before the first layer.

        Args:
            x: the stream, equal on all tensor-parallel ranks, of which sequence parallelism keeps this rank's part.
        """
        if self.sequence_parallel:
            group, dim = self.tp_group, self.sequence_dim % x.ndim
            x = issue(x, _take_part(group, dim), all_gather(group, dim), kind="stream", overlap=self.overlap).wait()
        if self.lane is not None:
            x = _JoinLane.apply(x, self.lane)
        return LadderState(x)

    def end(self, state: LadderState) -> Tensor:
        """The complete stream after the last layer, equal on all tensor-parallel ranks."""
        if self.lane is not None:
            self.lane.join()
            self.lane.gives(state.x)
        assert state.early is None, "made for a sub-block that did not run"
        x = state.flush()
        if self.sequence_parallel:
            group, dim = self.tp_group, self.sequence_dim % x.ndim
            x = issue(x, all_gather(group, dim), _take_part(group, dim), kind="stream", overlap=self.overlap).wait()
        return x

    # ------------------------------------------------------------ wirings with an order of their own

    def _run_parallel(
        self,
        parts: Parts,
        state: LadderState,
        attention_inputs: Mapping[str, Any],
        mlp_inputs: Mapping[str, Any],
    ) -> Any:
        """Both cores, then one reduction of their sum. Norms are inside what is reduced: one for both gradients."""
        start = sequence_number()
        moe_is_summed = parts.is_moe and _reduces_itself(parts.mlp)
        if parts.is_moe:
            _check_moe(parts.mlp, self.sequence_parallel)
        x = self._send(state.flush(), None, "parallel")
        y, rest = _split(parts.attention(self._norm_of_whole(parts.attention_norm, x, state), **attention_inputs))
        if moe_is_summed:
            # its gradient is whole on each rank, and must not be summed over them
            n = self._norm(parts.mlp_norm, state.x, state)
            handle: Any = parts.mlp.begin(n, **mlp_inputs)  # type: ignore[attr-defined]
            handle.experts()
            self._push(state, self._leave(y, "attention"), "attention", start)
            self._push(state, _MoEResult(handle, None), "mlp", start)
        else:
            z, _ = _split(parts.mlp(self._norm_of_whole(parts.mlp_norm, x, state), **mlp_inputs))
            self._push(state, self._leave(_local(y) + _local(z), "parallel"), "mlp", start)
        state.num_sub_blocks += 1
        return rest

    def _run_moe(self, parts: Parts, state: LadderState, leave: str, start: int, mlp_inputs: Mapping[str, Any]) -> None:
        moe: Any = parts.mlp
        _check_moe(moe, self.sequence_parallel)
        x = state.stale(leave)
        wait_at = self._wait_at(state, leave)
        n = self._norm(parts.mlp_norm, x, state)
        itself = _reduces_itself(moe)
        if not itself:
            n = self._send(n, wait_at, "mlp")
        with waiting_at(wait_at):
            handle = moe.begin(n, add_shared=parts.wiring != "farskip", **mlp_inputs)
        shared = handle.shared()  # under the dispatch
        handle.experts()
        if parts.wiring == "farskip" and shared is not None:
            result = InFlight.of(shared, "shared") if itself else self._leave(shared, "shared")
            self._push(state, result, "shared", start)
        self._push(state, self._moe_result(moe, handle), "routed" if parts.wiring == "farskip" else "mlp", start)

    def _run_shortcut(
        self,
        parts: Parts,
        state: LadderState,
        attention_inputs: Mapping[str, Any],
        mlp_inputs: Mapping[str, Any],
    ) -> Any:
        """Dispatch under attention, attention's reduction under the experts, combine under the shared expert."""
        moe: Any = parts.mlp
        _check_moe(moe, self.sequence_parallel)
        x = state.flush()
        itself = _reduces_itself(moe)
        n = self._norm(parts.mlp_norm, x, state)
        if not itself:
            n = self._send(n, None, "mlp")
        handle = moe.begin(n, add_shared=False, **mlp_inputs)
        start = sequence_number()
        n = self._enter(state, parts.attention_norm, "nothing", "attention", None)
        y, rest = _split(parts.attention(n, **attention_inputs))
        self._push(state, self._leave(y, "attention"), "attention", start)
        state.num_sub_blocks += 1
        start = sequence_number()
        handle.experts()
        if moe.shared is not None:
            n = self._norm(parts.mlp_norm, state.flush(), state)
            is_split = getattr(moe.shared, "tp", None) is not None and moe.shared.tp.size > 1
            if is_split or not itself:
                n = self._send(n, None, "shared")
            y = moe.shared(n.reshape(-1, n.shape[-1])).view(n.shape)
            self._push(state, self._leave(y, "shared") if is_split else InFlight.of(y, "shared"), "shared", start)
        self._push(state, self._moe_result(moe, handle), "routed", start)
        state.num_sub_blocks += 1
        return rest

    # ------------------------------------------------------------ pieces

    def _moe_result(self, moe: Any, handle: Any) -> Waitable:
        if _reduces_itself(moe):
            return _MoEResult(handle, None)
        if moe.parallel.ep.size == 1:
            return self._leave(handle.finish(), "mlp")
        return _MoEResult(handle, lambda y: self._leave(y, "mlp").wait())

    def _push(self, state: LadderState, result: Waitable, tag: str, start: int) -> None:
        if self.overlap == "off":
            result.wait()
        state.pending.append(Pending(result, tag, state.num_sub_blocks, start))

    def _enter(
        self, state: LadderState, norm: nn.Module, leave: str, kind: str, following: tuple[nn.Module, str, str] | None
    ) -> Tensor:
        """What a core reads: the stream as the wiring says, normed and sent.

        Args:
            state, norm, leave, kind: of this sub-block.
            following: norm, leave and kind of the next one, whose early node has to be older than all nodes of this.
        """
        if state.num_sub_blocks == 0:
            self._prepare(state, (norm, leave, kind))  # so that its gradient is awaited after that of the second
        early, state.early = state.early, None
        if early is not None:
            state.x = early.fill()
            self._prepare(state, following)
            return early.n.wait()
        x = state.stale(leave)
        wait_at = self._wait_at(state, leave)
        self._prepare(state, following)
        return self._send(self._norm(norm, x, state), wait_at, kind)

    def _wait_at(self, state: LadderState, leave: str) -> int | None:
        """When to wait for the gradient of a reader's input."""
        if self.overlap != "full" or self.backward_order != "seqnr":
            return None
        if state.num_sub_blocks == 0 and leave != "nothing":
            return max(state.start - 1, 0)  # nobody but the embedding needs it: last of all
        return state.window()

    def _norm(self, norm: nn.Module, x: Tensor, state: LadderState) -> Tensor:
        return call_norm(norm, x, self.compute_dtype, self._norm_reduce(state) if self.sequence_parallel else None)

    def _norm_of_whole(self, norm: nn.Module, x: Tensor, state: LadderState) -> Tensor:
        """The norm of what was sent already: gradients of its parameters are partial sums."""
        return call_norm(norm, x, self.compute_dtype, None if self.tp_group is None else self._norm_reduce(state))

    def _norm_reduce(self, state: LadderState) -> Callable[[Tensor], Tensor]:
        """Sums the gradients of a norm's parameters over the ranks: awaited last of all, nobody is waiting for it."""
        wait_at = state.start if self.overlap == "full" and can_set_order() else None
        return lambda parameter: reduce_gradient(
            parameter, all_reduce(self.tp_group), kind="norm weight", overlap=self._backward_overlap, wait_at=wait_at
        )

    @property
    def _backward_overlap(self) -> str:
        return "forward" if self.overlap == "full" and self.backward_order == "blocking" else self.overlap

    def _send(self, n: Tensor, wait_at: int | None, kind: str) -> Tensor:
        """What the ranks' cores read; the gradients that they return are summed."""
        if self.tp_group is None:
            return n
        if self.sequence_parallel:
            forward, backward = self._gather_and_scatter(n.ndim)
            overlap = self._backward_overlap
            return issue(n, forward, backward, kind=kind, overlap=overlap, wait_at=wait_at).wait()
        return reduce_gradient(n, all_reduce(self.tp_group), kind=kind, overlap=self._backward_overlap, wait_at=wait_at)

    def _leave(self, y: Tensor, kind: str) -> InFlight:
        """The sum of the ranks' outputs, in flight."""
        y = _local(y)
        if self.tp_group is None:
            return InFlight.of(y, kind)
        if self.sequence_parallel:
            gather, scatter = self._gather_and_scatter(y.ndim)
            return issue(y, scatter, gather, kind=kind, overlap=self._backward_overlap)
        return issue(y, all_reduce(self.tp_group), all_reduce(None), kind=kind, overlap=self.overlap)

    def _gather_and_scatter(self, ndim: int) -> tuple[Collective, Collective]:
        dim = self.sequence_dim % ndim
        return all_gather(self.tp_group, dim), reduce_scatter(self.tp_group, dim)

    def _prepare(self, state: LadderState, following: tuple[nn.Module, str, str] | None) -> None:
        """Make the next reader's node now, before this sub-block runs, where that is asked for."""
        if following is None:
            return
        norm, leave, kind = following
        is_early = self.backward_order == "early" or self.lane is not None
        if leave != "last" or not is_early or self.overlap != "full" or self.tp_group is None:
            return
        entries = [entry.result for entry in state.pending]
        flights = [entry for entry in entries if isinstance(entry, InFlight)]
        if len(flights) < len(entries):
            if self.lane is not None:
                return
            raise argument_error(
                "sonic.parallel", "backward_order", "'early'", "'seqnr' or 'blocking' beside an MoE layer"
            )
        dim = self.sequence_dim % state.x.ndim
        if self.sequence_parallel:
            forward, backward = self._gather_and_scatter(state.x.ndim)
        else:
            forward, backward = all_reduce(None), all_reduce(self.tp_group)
        state.early = EarlyJoin(
            state.x,
            flights,
            norm,
            forward,
            backward,
            gathered=(dim, self.tp_group.size()) if self.sequence_parallel else None,
            kind=kind,
            dtype=self.compute_dtype,
            reduce=self._norm_reduce(state) if self.sequence_parallel else None,
            lane=self.lane,
        )
        state.x, state.pending = state.early.x, []


class _MoEResult:
    """An MoE's handle whose experts have run, and what is to be done to its output."""

    def __init__(self, handle: Any, then: Callable[[Tensor], Tensor] | None) -> None:
        self._handle, self._then = handle, then
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            y = self._handle.finish()
            self._result = y if self._then is None else self._then(y)
            self._handle = None
        return self._result


def _reduces_itself(moe: Any) -> bool:
    """Whether an MoE's output, and the gradient of its input, are whole: not partial sums over tensor-parallel
    ranks.
    """
    layout = getattr(moe, "parallel", None)
    return layout is None or layout.tp.size == 1 or layout.tp_reduce != "none"


def _check_moe(moe: Any, sequence_parallel: bool) -> None:
    """Refuse an MoE that would see part of the sequence, or all of it, where its layout expects the other.

    Raises:
        ValueError: that.
    """
    layout = getattr(moe, "parallel", None)
    reduce = "absent" if layout is None or layout.tp.size == 1 else layout.tp_reduce
    if sequence_parallel and reduce not in ("none", "reduce_scatter"):
        wanted = "'none' or 'reduce_scatter': under sequence parallelism an MoE has to be tensor-parallel too"
        raise argument_error("sonic.parallel", "tp_reduce of the MoE", reduce, wanted)
    if not sequence_parallel and reduce == "reduce_scatter":
        wanted = "'none' or 'sum': the stack is not sequence-parallel"
        raise argument_error("sonic.parallel", "tp_reduce of the MoE", repr(reduce), wanted)


def _split(output: Any) -> tuple[Tensor, Any]:
    """A core's output, and what it returned beside it."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def _local(y: Any) -> Tensor:
    """A core's output, which has to be a plain tensor.

    Raises:
        ValueError: a DTensor: whoever made it may have summed the input's gradient already.
    """
    if hasattr(y, "to_local"):
        wanted = "a plain tensor, this rank's summand: from linears of sonic.parallel with reduce='none'"
        raise argument_error("sonic.parallel", "a core's output", f"a DTensor {tuple(y.placements)}", wanted)
    local: Tensor = y
    return local


def _take_part(group: dist.ProcessGroup | None, dim: int) -> Collective:
    """This rank's part of what every rank holds: no communication."""

    def start(x: Tensor) -> Started:
        assert group is not None, "sequence parallelism has ranks"
        if x.shape[dim] % group.size():
            wanted = f"a multiple of {group.size()} along dim {dim}: every rank gets an equal part of the sequence"
            raise argument_error("sonic.parallel", "x", tuple(x.shape), wanted)
        return Started(x.chunk(group.size(), dim)[group.rank()].contiguous())

    return start


class _JoinLane(torch.autograd.Function):
    """The stream enters the lane; in backward the main lane waits for what comes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.lane.join()
        ctx.lane.gives(grad)
        return grad, None
