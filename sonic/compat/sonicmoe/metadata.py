"""Counting and sorting in the package ``sonicmoe``: who goes where, in its names.

==========================================  ================================================================
there                                       here, see :mod:`sonic.shapes`
==========================================  ================================================================
``expert_frequency`` (E,)                   rows of each expert
``expert_frequency_offset`` (E + 1,)        ``expert_offset_E1``
``x_gather_idx`` (R,)                       ``token_of_row_R``
``s_scatter_idx`` (R,)                      ``slot_of_row_R``
``s_reverse_scatter_idx`` (R,)              its inverse: slot -> row
``num_activated_expert_per_token_offset``   ``token_offset_T1``
==========================================  ================================================================

All int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.routing.plan import RoutingPlan
from sonic.routing.scores import check_within
from sonic.shapes import argument_error, check_dtype, check_positive, check_shape

__all__ = [
    "TC_topk_router_metadata",
    "TC_topk_router_metadata_triton",
    "count_cumsum",
    "counts",
    "general_routing_router_metadata",
    "general_routing_router_metadata_triton",
]


@torch.no_grad()
def count_cumsum(x: Tensor, E: int, do_cumsum: bool = True) -> Tensor | tuple[Tensor, Tensor]:
    """How often each of 0 … E - 1 occurs, and the running sum of that; waits for no device.

    Args:
        x: (P,) int32 or int64, 0 <= x < E; any P, also 0.
        E: any positive number.
        do_cumsum: return the running sum too.

    Returns:
        count (E,) int32, or (count, cumsum) with ``cumsum[e] = count[0] + … + count[e]``.

    Raises:
        ValueError: shape or dtype; a value out of range (on a GPU and in a compiled graph an assertion of the device).
    """
    count_E = counts(x, E)
    return (count_E, count_E.cumsum(0, dtype=torch.int32)) if do_cumsum else count_E


def counts(x: Tensor, E: int) -> Tensor:
    """The first result of :func:`count_cumsum`.

    Raises:
        ValueError: as there.
    """
    where = "sonicmoe.count_cumsum"
    check_positive(where, E=E)
    check_shape(where, "x", x, P=None)
    check_dtype(where, "x", x, (torch.int32, torch.int64))
    check_within(where, "x", x, "E", E)
    index_P = x.long()
    count_E = torch.zeros(E, dtype=torch.int32, device=x.device)
    return count_E.scatter_add_(0, index_P, torch.ones_like(index_P, dtype=torch.int32))


def TC_topk_router_metadata(
    topk_router_indices: Tensor, expert_frequency_offset: Tensor, K: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Who goes where for K experts per token, as the functional module of December 2025 returns it.

    Args:
        topk_router_indices: (T, K) integer, no expert twice for a token.
        expert_frequency_offset: (E,) the running sum that :func:`count_cumsum` returns; only E is read.
        K: that of the indices.

    Returns:
        ``expert_frequency_offset`` (E + 1,), ``x_gather_idx``, ``s_scatter_idx``, ``s_reverse_scatter_idx``,
        ``num_activated_expert_per_token_offset``.

    Raises:
        ValueError: shapes or dtypes do not fit, or as :meth:`sonic.RoutingPlan.from_topk`.
    """
    where = "sonicmoe.functional.TC_topk_router_metadata"
    check_shape(where, "expert_frequency_offset", expert_frequency_offset, E=None)
    check_shape(where, "topk_router_indices", topk_router_indices, T=None, K=K)
    plan = RoutingPlan.from_topk(topk_router_indices, expert_frequency_offset.shape[0])
    return (
        plan.expert_offset_E1,
        plan.token_of_row_R,
        plan.slot_of_row_R,
        _inverse(plan.slot_of_row_R),
        plan.token_offset_T1,
    )


def general_routing_router_metadata(
    router_scores_selected: Tensor, sorted_selected_T: Tensor, selected_E: Tensor, T: int, E: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Who goes where for any (token, expert) pairs, as the functional module of December 2025 returns it.

    Args:
        router_scores_selected: (P,); only its shape is looked at.
        sorted_selected_T: (P,) integer, the tokens; here they need not ascend.
        selected_E: (P,) integer, the experts.
        T: number of tokens.
        E: number of experts.

    Returns:
        ``expert_frequency`` and what :func:`TC_topk_router_metadata` returns.

    Raises:
        ValueError: as :meth:`sonic.RoutingPlan.from_pairs`.
    """
    where = "sonicmoe.functional.general_routing_router_metadata"
    plan = RoutingPlan.from_pairs(sorted_selected_T, selected_E, T, E)
    check_shape(where, "router_scores_selected", router_scores_selected, P=plan.num_rows)
    return (
        plan.tokens_per_expert(),
        plan.expert_offset_E1,
        plan.token_of_row_R,
        plan.slot_of_row_R,
        _inverse(plan.slot_of_row_R),
        plan.token_offset_T1,
    )


def TC_topk_router_metadata_triton(
    topk_router_indices: Tensor,
    E: int,
    expert_frequency: Tensor,
    expert_frequency_offset: Tensor,
    x_gather_idx: Tensor,
    s_scatter_idx: Tensor,
    s_reverse_scatter_idx: Tensor,
) -> None:
    """The form of the 0.1 releases, which fills tensors of the caller.

    Args:
        topk_router_indices: (T, K) integer, no expert twice for a token.
        E: number of experts.
        expert_frequency, expert_frequency_offset, x_gather_idx, s_scatter_idx, s_reverse_scatter_idx: written.

    Raises:
        ValueError: as :meth:`sonic.RoutingPlan.from_topk`; a tensor to write that is of another shape.
    """
    plan = RoutingPlan.from_topk(topk_router_indices, E)
    _fill(
        "sonicmoe.functional.triton_kernels.TC_topk_router_metadata_triton",
        expert_frequency=(expert_frequency, plan.tokens_per_expert()),
        expert_frequency_offset=(expert_frequency_offset, plan.expert_offset_E1),
        x_gather_idx=(x_gather_idx, plan.token_of_row_R),
        s_scatter_idx=(s_scatter_idx, plan.slot_of_row_R),
        s_reverse_scatter_idx=(s_reverse_scatter_idx, _inverse(plan.slot_of_row_R)),
    )


def general_routing_router_metadata_triton(
    sorted_selected_T: Tensor,
    selected_E: Tensor,
    T: int,
    E: int,
    expert_frequency: Tensor,
    expert_frequency_offset: Tensor,
    x_gather_idx: Tensor,
    s_scatter_idx: Tensor,
    s_reverse_scatter_idx: Tensor,
    num_activated_expert_per_token_offset: Tensor,
) -> None:
    """The form of the 0.1 releases, which fills tensors of the caller.

    Args:
        sorted_selected_T, selected_E, T, E: as in :func:`general_routing_router_metadata`.
        expert_frequency, expert_frequency_offset, x_gather_idx, s_scatter_idx, s_reverse_scatter_idx,
            num_activated_expert_per_token_offset: written.

    Raises:
        ValueError: as :meth:`sonic.RoutingPlan.from_pairs`; a tensor to write that is of another shape.
    """
    plan = RoutingPlan.from_pairs(sorted_selected_T, selected_E, T, E)
    _fill(
        "sonicmoe.functional.triton_kernels.general_routing_router_metadata_triton",
        expert_frequency=(expert_frequency, plan.tokens_per_expert()),
        expert_frequency_offset=(expert_frequency_offset, plan.expert_offset_E1),
        x_gather_idx=(x_gather_idx, plan.token_of_row_R),
        s_scatter_idx=(s_scatter_idx, plan.slot_of_row_R),
        s_reverse_scatter_idx=(s_reverse_scatter_idx, _inverse(plan.slot_of_row_R)),
        num_activated_expert_per_token_offset=(num_activated_expert_per_token_offset, plan.token_offset_T1),
    )


def _fill(where: str, **written: tuple[Tensor, Tensor]) -> None:
    for name, (target, values) in written.items():
        if target.shape != values.shape:
            raise argument_error(where, name, tuple(target.shape), str(tuple(values.shape)))
        target.copy_(values)


def _inverse(slot_of_row_R: Tensor) -> Tensor:
    """Slot -> row."""
    rows_R = torch.arange(slot_of_row_R.shape[0], dtype=torch.int32, device=slot_of_row_R.device)
    return torch.empty_like(slot_of_row_R).scatter_(0, slot_of_row_R.long(), rows_R)
