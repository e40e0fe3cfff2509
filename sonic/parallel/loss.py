"""Cross entropy of logits whose vocabulary is split over ranks: no rank ever holds a row of all logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sonic.parallel.mesh import Ranks, ranks_of
from sonic.shapes import argument_error, check_choice, check_integer, check_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["vocab_parallel_cross_entropy"]


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    tp_mesh: DeviceMesh | None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of logits as :class:`ColumnParallelLinear` returns them.

    Computed in at least float32. Two collectives of T numbers (the maximum, then sum and target together) in forward,
    none in backward. Kept for backward: the logits, which become their gradient, and T numbers.

    Args:
        logits: (T, V / tp), any floating dtype; rank w has the w-th part of the vocabulary.
        target: (T,) integer, 0 <= target < V, or ``ignore_index``; equal on all ranks.
        tp_mesh: one-dimensional; None: the logits are whole.
        ignore_index: a target that does not count.
        reduction: ``"mean"`` over the targets that count (NaN if none does, as in torch), ``"sum"`` or ``"none"``.

    Returns:
        0-dim, or (T,) with ``"none"``; float32, or float64 for float64 logits; equal on all ranks.

    Raises:
        ValueError: shapes, dtypes or names do not fit, or a target is out of range.

    Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053), section 3.
    """
    where = "sonic.parallel.vocab_parallel_cross_entropy"
    check_shape(where, "logits", logits, T=None, V=None)
    check_integer(where, "target", target)
    check_shape(where, "target", target, T=logits.shape[0])
    check_choice(where, "reduction", reduction, ("mean", "sum", "none"))
    ranks = ranks_of(where, "tp_mesh", tp_mesh)
    counts_T = target != ignore_index
    vocab = logits.shape[1] * ranks.size
    if target.device.type == "cpu" and ((target < 0) | (target >= vocab))[counts_T].any():  # on a GPU this would wait
        raise argument_error(where, "target", "out of range", f"0 <= target < {vocab}, or {ignore_index}")
    loss_T = _CrossEntropy.apply(logits, target, counts_T, ranks)
    if reduction == "none":
        return loss_T
    return loss_T.sum() / counts_T.sum() if reduction == "mean" else loss_T.sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, counts_T: Tensor, ranks: Ranks) -> Tensor:
        wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        width = wide_TV.shape[1]
        max_T = wide_TV.amax(1)
        if ranks.size > 1:
            dist.all_reduce(max_T, dist.ReduceOp.MAX, group=ranks.group)
        local_T = target_T.long() - ranks.rank * width
        is_here_T = (local_T >= 0) & (local_T < width) & counts_T
        place_T = torch.where(is_here_T, local_T, 0)
        shifted_TV = wide_TV - max_T[:, None]
        of_target_T = shifted_TV.gather(1, place_T[:, None])[:, 0] * is_here_T
        both_2T = torch.stack((shifted_TV.exp_().sum(1), of_target_T))
        if ranks.size > 1:
            dist.all_reduce(both_2T, group=ranks.group)
        log_sum_T = both_2T[0].log()
        ctx.save_for_backward(logits_TV, max_T + log_sum_T, place_T, is_here_T, counts_T)
        return torch.where(counts_T, log_sum_T - both_2T[1], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_T: Tensor) -> Any:
        logits_TV, log_total_T, place_T, is_here_T, counts_T = ctx.saved_tensors
        dlogits_TV = torch.exp(logits_TV.to(log_total_T.dtype) - log_total_T[:, None])
        dlogits_TV.scatter_add_(1, place_T[:, None], -is_here_T.to(dlogits_TV.dtype)[:, None])
        dlogits_TV *= torch.where(counts_T, dloss_T, 0)[:, None]
        return dlogits_TV.to(logits_TV.dtype), None, None, None
