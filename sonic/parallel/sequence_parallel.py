"""Sequence parallelism: between the tensor-parallel pairs each rank has a part of the sequence.

Norms, residuals and dropout then run on S / tp tokens per sequence, and what is kept for backward there shrinks
likewise. The pairs themselves do it with ``reduce="reduce_scatter"``; here are the borders of such a region, and the
sum of gradients that parameters inside it need, for each rank shows them a part of the tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sonic.parallel.in_flight import all_gather, issue, reduce_scatter
from sonic.parallel.mesh import Ranks, ranks_of
from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["gather_sequence", "split_sequence", "sum_gradients"]


def split_sequence(x: Tensor, tp_mesh: DeviceMesh | None, *, dim: int = -2) -> Tensor:
    """This rank's part of a sequence that every rank holds whole, such as the embedded tokens.

    Backward gathers the parts, so that what is before sees the whole gradient on every rank.

    Args:
        x: (..., S, D), equal on all ranks.
        tp_mesh: one-dimensional; None: x itself.
        dim: the dimension of the sequence; S is a multiple of tp there.

    Raises:
        ValueError: S does not divide, or no such mesh.
    """
    where = "sonic.parallel.split_sequence"
    ranks = ranks_of(where, "tp_mesh", tp_mesh)
    if x.shape[dim] % ranks.size:
        raise argument_error(where, "x", tuple(x.shape), f"a multiple of tp = {ranks.size} along dim {dim}")
    return x if ranks.size == 1 else _Split.apply(x, ranks, dim % x.ndim)


def gather_sequence(x: Tensor, tp_mesh: DeviceMesh | None, *, dim: int = -2, gradient: str = "whole") -> Tensor:
    """The whole sequence, on every rank.

    Args:
        x: (..., S / tp, D), this rank's part.
        tp_mesh: one-dimensional; None: x itself.
        dim: the dimension of the sequence.
        gradient: what comes back in backward: ``"whole"``, where every rank does the same with the result, such as a
            loss of all tokens: this rank's part is taken. ``"partial"``, where the ranks share the work: it is summed.

    Raises:
        ValueError: no such mesh or ``gradient``.
    """
    where = "sonic.parallel.gather_sequence"
    ranks = ranks_of(where, "tp_mesh", tp_mesh)
    if gradient not in ("whole", "partial"):
        raise argument_error(where, "gradient", repr(gradient), "'whole' or 'partial'")
    if ranks.size == 1:
        return x
    dim = dim % x.ndim
    if gradient == "partial":
        gather, scatter = all_gather(ranks.group, dim), reduce_scatter(ranks.group, dim)
        return issue(x, gather, scatter, kind="gather sequence").wait()
    return _Gather.apply(x, ranks, dim)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], tp_mesh: DeviceMesh | None) -> None:
    """Sum the gradients of whole parameters that saw this rank's part of the sequence only, such as those of norms.

    Call it once per step, after the last backward and before the gradients are clipped. One collective per dtype.

    Args:
        parameters: equal on all ranks of ``tp_mesh`` and used between the pairs; those without a gradient are passed
            over, which has to be the same on all ranks.
        tp_mesh: one-dimensional; None: nothing to do.

    Raises:
        ValueError: no such mesh.
    """
    ranks = ranks_of("sonic.parallel.sum_gradients", "tp_mesh", tp_mesh)
    if ranks.size == 1:
        return
    grads: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = getattr(parameter.grad, "_local_tensor", parameter.grad)  # of FSDP-2: this rank's shard, in place
            grads.setdefault(grad.dtype, []).append(grad)
    for same_dtype in grads.values():
        flat = torch.cat([grad.reshape(-1) for grad in same_dtype])
        dist.all_reduce(flat, group=ranks.group)
        for grad, summed in zip(same_dtype, flat.split([grad.numel() for grad in same_dtype]), strict=True):
            grad.copy_(summed.view_as(grad))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return _part(x, ranks, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(ctx.ranks.group, ctx.dim)(grad).wait(), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return all_gather(ranks.group, dim)(x).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _part(grad, ctx.ranks, ctx.dim), None, None


def _part(x: Tensor, ranks: Ranks, dim: int) -> Tensor:
    step = x.shape[dim] // ranks.size
    return x.narrow(dim, ranks.rank * step, step).clone(memory_format=torch.contiguous_format)
