"""Best of each expert's column, without sorting the column, in plain torch.

A few experts at a time, their columns are laid out as rows in a scratch of at most :data:`_SCRATCH_VALUES`, and only as
many entries are selected from each as are wanted. Time is about one pass over the columns that are looked at; memory
is the scratch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["best_of_columns"]

_SCRATCH_VALUES = {"cpu": 1 << 18}  # in cache
_SCRATCH_VALUES_ELSEWHERE = 1 << 24


def best_of_columns(
    logits_TE: Tensor,
    shift_T: Tensor | None,
    num_wanted: Sequence[int],
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor | None,
    row_by_token_R: Tensor | None,
    token_offset_T1: Tensor | None,
    allowed_TG: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(token, expert) of the highest entries, expert by expert; see ``sonic.kernels.ops.best_of_columns``."""
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    experts = [expert for expert in range(num_experts) if num_wanted[expert]]
    size = max(1, _SCRATCH_VALUES.get(device.type, _SCRATCH_VALUES_ELSEWHERE) // max(num_tokens, 1))
    tokens, owners = [], []
    for start in range(0, len(experts), size):
        chunk = experts[start : start + size]
        index_C = torch.tensor(chunk, device=device)
        value_CT = logits_TE.t().index_select(0, index_C)
        if shift_T is not None:
            value_CT -= shift_T
        if token_of_row_R is not None and expert_offset_E1 is not None:
            row_C, row_R = _rows_of(expert_offset_E1, index_C)
            value_CT.view(-1)[row_C * num_tokens + token_of_row_R[row_R].long()] = -torch.inf
        if allowed_TG is not None:
            group_C = index_C // (num_experts // allowed_TG.shape[1])
            value_CT.masked_fill_(~allowed_TG.t()[group_C], -torch.inf)
        row_P, place_P = _largest(value_CT, [num_wanted[expert] for expert in chunk])
        tokens.append(place_P)
        owners.append(index_C[row_P])
    if not tokens:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return nothing, nothing.clone()
    return torch.cat(tokens), torch.cat(owners)


def _rows_of(expert_offset_E1: Tensor, index_C: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of these experts: (position of the expert in the list, row), int64 each."""
    start_C = expert_offset_E1[index_C].long()
    count_C = expert_offset_E1[index_C + 1].long() - start_C
    row_C = torch.arange(index_C.shape[0], device=index_C.device).repeat_interleave(count_C)
    skipped_C = start_C - (count_C.cumsum(0) - count_C)
    return row_C, torch.arange(row_C.shape[0], device=index_C.device) + skipped_C[row_C]


def _largest(value_CF: Tensor, num_wanted: list[int]) -> tuple[Tensor, Tensor]:
    """(row, column) of the ``num_wanted`` largest entries of each row, row by row, largest first, lowest column first
    among equals.
    """
    most = max(num_wanted)
    # one more than wanted: it tells whether the last one was chosen among equals
    best_Cm, place_Cm = value_CF.topk(min(most + 1, value_CF.shape[1]), dim=1)
    wanted_C1 = torch.tensor(num_wanted, device=value_CF.device)[:, None]
    is_wanted_Cm = torch.arange(best_Cm.shape[1], device=value_CF.device) < wanted_C1
    is_tied_C = ((best_Cm[:, 1:] == best_Cm[:, :-1]) & is_wanted_Cm[:, :-1]).any(1)
    for row in is_tied_C.nonzero()[:, 0].tolist():  # topk leaves open which of equals comes first
        value_F, count = value_CF[row], num_wanted[row]
        at_least_f = (~(value_F < best_Cm[row, count - 1])).nonzero()[:, 0]
        place_Cm[row, :count] = at_least_f[value_F[at_least_f].sort(descending=True, stable=True).indices[:count]]
    return is_wanted_Cm.nonzero()[:, 0], place_Cm[is_wanted_Cm]
