"""Top-K selection and the routing plan's index arrays, in plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sonic.shapes import argument_error

__all__ = ["build_plan", "topk_softmax"]


def topk_softmax(
    logits_TE: Tensor, top_k: int, score_function: str, pre_softmax: bool, norm_topk_prob: bool, scaling_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, chosen experts and the chosen probabilities before they are normalised.

    See ``sonic.kernels.ops.topk_softmax``.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    chosen_TK, expert_TK = torch.topk(logits_TE, top_k, dim=-1)  # softmax and sigmoid keep the order of the logits
    if score_function == "sigmoid":
        prob_TK = torch.sigmoid(chosen_TK)
        scores_TK = prob_TK / (prob_TK.sum(-1, keepdim=True) + 1e-20) if norm_topk_prob else prob_TK
    elif pre_softmax and not norm_topk_prob:
        scores_TK = prob_TK = torch.exp(chosen_TK - torch.logsumexp(logits_TE, dim=-1, keepdim=True))
    else:  # normalising a softmax over all experts to its K chosen ones is the softmax over those K
        scores_TK = prob_TK = torch.softmax(chosen_TK, dim=-1)
    return scores_TK * scaling_factor, expert_TK.to(torch.int32), prob_TK.clone()


def build_plan(
    expert_of_slot_P: Tensor, token_of_slot_P: Tensor | None, num_tokens: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Offsets and index maps of the rows sorted by expert, tokens ascending within each.

    See ``sonic.kernels.ops.build_plan``.
    """
    device = expert_of_slot_P.device
    num_slots = expert_of_slot_P.shape[0]
    expert_P = expert_of_slot_P.long()
    _refuse_out_of_range("expert_index", expert_P, num_experts)
    if token_of_slot_P is None:
        token_P = torch.arange(num_slots, device=device) // (num_slots // num_tokens if num_tokens else 1)
        row_of_visit, expert_offset_E1 = _counting_sort(expert_P, num_experts)
        slot_of_row_R = row_of_visit
        token_offset_T1 = torch.arange(num_tokens + 1, device=device) * (num_slots // num_tokens if num_tokens else 0)
    else:
        token_P = token_of_slot_P.long()
        _refuse_out_of_range("token_index", token_P, num_tokens)
        slot_by_token_P, token_offset_T1 = _counting_sort(token_P, num_tokens)
        row_of_visit, expert_offset_E1 = _counting_sort(expert_P[slot_by_token_P], num_experts)
        slot_of_row_R = slot_by_token_P[row_of_visit]
    token_of_row_R = token_P[slot_of_row_R]
    _refuse_duplicates(token_of_row_R, expert_P[slot_of_row_R])
    row_by_token_R = torch.empty_like(row_of_visit)
    row_by_token_R[row_of_visit] = torch.arange(num_slots, device=device)
    return (
        expert_offset_E1.to(torch.int32),
        token_of_row_R.to(torch.int32),
        slot_of_row_R.to(torch.int32),
        row_by_token_R.to(torch.int32),
        token_offset_T1.to(torch.int32),
    )


def _counting_sort(key_P: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Positions of the int64 keys in stable ascending order, and where each key's run starts (num_keys + 1 entries).


    On a CPU one counting pass per 16 bits of the largest key (NumPy sorts 16-bit keys so); elsewhere torch's stable
    sort, which does not synchronise.
    """
    if key_P.device.type != "cpu":
        sorted_P, order_P = torch.sort(key_P, stable=True)
        return order_P, torch.searchsorted(sorted_P, torch.arange(num_keys + 1, device=key_P.device))
    keys = key_P.numpy()
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # the cast keeps the low 16 bits
    for shift in range(16, max(num_keys - 1, 1).bit_length(), 16):
        order = order[np.argsort((keys[order] >> shift).astype(np.uint16), kind="stable")]
    offset = np.zeros(num_keys + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=num_keys), out=offset[1:])
    return torch.from_numpy(order), torch.from_numpy(offset)


def _refuse_out_of_range(name: str, index_P: Tensor, size: int) -> None:
    inside_P = (index_P >= 0) & (index_P < size)
    if index_P.device.type != "cuda":
        if not bool(inside_P.all()):
            wrong = index_P[~inside_P][0].item()
            raise argument_error("sonic.RoutingPlan", name, f"out of range ({wrong})", f"0 <= {name} < {size}")
    else:
        torch._assert_async(inside_P.all(), f"sonic.RoutingPlan: {name} is out of range, expected 0 <= {name} < {size}")


def _refuse_duplicates(token_of_row_R: Tensor, expert_of_row_R: Tensor) -> None:
    again_R = (token_of_row_R[1:] == token_of_row_R[:-1]) & (expert_of_row_R[1:] == expert_of_row_R[:-1])
    if again_R.device.type != "cuda":
        if bool(again_R.any()):
            row = int(again_R.nonzero()[0])
            token, expert = int(token_of_row_R[row]), int(expert_of_row_R[row])
            was = f"a duplicate (token {token} goes to expert {expert} more than once)"
            raise argument_error("sonic.RoutingPlan", "expert_index", was, "each token at most once per expert")
    else:
        torch._assert_async(
            ~again_R.any(), "sonic.RoutingPlan: expert_index has a duplicate, expected each token once per expert"
        )
