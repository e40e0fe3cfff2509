"""Best and worst of an expert's column, without sorting the column: what rounding, capacity and expert choice share.

The selection itself is an op, :func:`sonic.kernels.ops.best_of_columns`. For the lowest rows, those of a few experts at
a time are laid out as the columns of a scratch of at most :data:`_SCRATCH_VALUES`, negated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sonic.kernels import ops
from sonic.routing.plan import RoutingPlan

__all__ = ["best_tokens", "capacity_of", "expert_of_row", "lowest_rows"]

_SCRATCH_VALUES = {"cpu": 1 << 18}  # in cache
_SCRATCH_VALUES_ELSEWHERE = 1 << 24


def best_tokens(
    logits_TE: Tensor,
    shift_T: Tensor | None,
    num_wanted: Sequence[int],
    *,
    plan: RoutingPlan | None = None,
    allowed_TG: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """For each expert the tokens with the highest ``logits - shift`` in its column, lowest token first among equals.

    Args:
        logits_TE: finite.
        shift_T: subtracted per token, such as the logsumexp that makes log-probabilities of logits.
        num_wanted: how many tokens, per expert; no more than its column has candidates.
        plan: pairs in this plan are no candidates.
        allowed_TG: bool; a token is a candidate of the experts of these groups only.
        backend: insist on a backend.

    Returns:
        (token, expert) of the pairs, (P,) int64 each, expert by expert, best first.
    """
    maps: tuple[Tensor | None, ...] = (None,) * 4
    if plan is not None:
        maps = (plan.token_of_row_R, plan.expert_offset_E1, plan.row_by_token_R, plan.token_offset_T1)
    pairs: tuple[Tensor, Tensor] = ops.best_of_columns(logits_TE, shift_T, num_wanted, *maps, allowed_TG, backend)
    return pairs


def lowest_rows(
    plan: RoutingPlan,
    counts: Sequence[int],
    value_R: Tensor,
    num_wanted: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """For each expert its rows with the lowest values, lowest row first among equals.

    Args:
        plan: who goes where.
        counts: rows per expert.
        value_R: (R,) finite.
        num_wanted: how many rows, per expert; at most its count.
        backend: insist on a backend.

    Returns:
        Indices of the rows: (P,) int64, expert by expert, lowest first.
    """
    experts = [expert for expert in range(plan.num_experts) if num_wanted[expert]]
    width = max((counts[expert] for expert in experts), default=0)
    found = []
    for chunk in _chunks(experts, width, value_R.device):
        width = max(counts[expert] for expert in chunk)
        row_C, place_R, row_R = _rows_of(plan, chunk)
        # Negated, so that the largest are the lowest rows; what is no row is never among them.
        value_CF = value_R.new_full((len(chunk), width), -torch.inf)
        value_CF[row_C, place_R] = -value_R[row_R]
        wanted = [num_wanted[expert] for expert in chunk]
        place_P, row_P = ops.best_of_columns(value_CF.t(), None, wanted, backend=backend)
        start_C = plan.expert_offset_E1[torch.tensor(chunk, device=value_R.device)].long()
        found.append(start_C[row_P] + place_P)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=value_R.device)


def capacity_of(capacity_factor: float, num_rows: int, num_experts: int) -> int:
    """Rows per expert: ``capacity_factor`` times the mean, rounded up; 1.1 times 10 is 11, also in binary.

    In integers, which may be symbols of a compiled graph.
    """
    factor = Fraction(capacity_factor).limit_denominator(10**6)
    return -(-factor.numerator * num_rows // (factor.denominator * num_experts))


def expert_of_row(plan: RoutingPlan) -> Tensor:
    """Row -> expert: (R,) int64."""
    experts_E = torch.arange(plan.num_experts, device=plan.device)
    return experts_E.repeat_interleave(plan.tokens_per_expert(), output_size=plan.num_rows)


def _chunks(experts: list[int], width: int, device: torch.device) -> Iterator[list[int]]:
    """The experts, as many at a time as fit the scratch with ``width`` values each."""
    size = max(1, _SCRATCH_VALUES.get(device.type, _SCRATCH_VALUES_ELSEWHERE) // max(width, 1))
    for start in range(0, len(experts), size):
        yield experts[start : start + size]


def _rows_of(plan: RoutingPlan, experts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of these experts: (position of the expert in the list, place within the expert, row), int64 each."""
    index_C = torch.tensor(experts, device=plan.device)
    start_C, count_C = plan.expert_offset_E1[index_C].long(), plan.tokens_per_expert()[index_C].long()
    row_C = torch.arange(len(experts), device=plan.device).repeat_interleave(count_C)
    place_R = torch.arange(row_C.shape[0], device=plan.device) - (count_C.cumsum(0) - count_C)[row_C]
    return row_C, place_R, start_C[row_C] + place_R
