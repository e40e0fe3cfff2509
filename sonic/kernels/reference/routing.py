"""Top-K selection and the routing plan's index arrays, in plain torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.shapes import argument_error

__all__ = ["build_plan", "topk_softmax", "topk_softmax_bwd"]

_WANTED_LOAD = "what topk_softmax counted when it chose them"


def topk_softmax(
    logits_TE: Tensor,
    top_k: int,
    score_function: str,
    pre_softmax: bool,
    norm_topk_prob: bool,
    scaling_factor: float,
    expert_bias_E: Tensor | None,
    num_groups: int,
    group_topk: int,
    tokens_per_run: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, chosen experts, the chosen probabilities before they are normalised, and the load of each run of tokens.

    See ``sonic.kernels.ops.topk_softmax``.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if expert_bias_E is None and num_groups == 1:
        chosen_TK, expert_TK = torch.topk(
            logits_TE, top_k, dim=-1
        )  # every score function keeps the order of the logits
        top_T1 = chosen_TK[:, :1]
    else:
        preference_TE = _preferences(logits_TE, score_function, pre_softmax, expert_bias_E)
        if num_groups > 1:
            preference_TE = _only_best_groups(preference_TE, num_groups, group_topk, max(1, top_k // group_topk))
        expert_TK = torch.topk(preference_TE, top_k, dim=-1).indices
        chosen_TK, top_T1 = logits_TE.gather(1, expert_TK), logits_TE.amax(-1, keepdim=True)
    chosen_TK = chosen_TK.masked_fill(~(top_T1 < torch.inf), torch.nan)  # a token with NaN or +inf has no scores
    if score_function != "softmax":
        prob_TK = torch.sigmoid(chosen_TK) if score_function == "sigmoid" else _sqrtsoftplus(chosen_TK)
        scores_TK = prob_TK / (prob_TK.sum(-1, keepdim=True) + 1e-20) if norm_topk_prob else prob_TK
    elif pre_softmax and not norm_topk_prob:
        scores_TK = prob_TK = torch.exp(chosen_TK - torch.logsumexp(logits_TE, dim=-1, keepdim=True))
    else:  # normalising a softmax over all experts to its K chosen ones is the softmax over those K
        scores_TK = prob_TK = torch.softmax(chosen_TK, dim=-1)
    load_EC = _load_by_run(expert_TK, logits_TE.shape[1], tokens_per_run)
    return scores_TK * scaling_factor, expert_TK.to(torch.int32), prob_TK.clone(), load_EC


def _load_by_run(expert_TK: Tensor, num_experts: int, tokens_per_run: int) -> Tensor:
    """How often each expert comes in each run of tokens, and a column of zeros: (E, C) int32."""
    num_tokens = expert_TK.shape[0]
    num_columns = -(-num_tokens // tokens_per_run) + 1
    run_T1 = torch.arange(num_tokens, device=expert_TK.device)[:, None] // tokens_per_run
    place_P = (expert_TK * num_columns + run_T1).flatten()
    load_F = torch.zeros(num_experts * num_columns, dtype=torch.int32, device=expert_TK.device)
    return load_F.scatter_add_(0, place_P, load_F.new_ones(place_P.shape)).view(num_experts, num_columns)


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    return F.softplus(logits, threshold=40.0).sqrt()  # torch's own threshold, 20, is too low for float64


def _preferences(logits_TE: Tensor, score_function: str, pre_softmax: bool, expert_bias_E: Tensor | None) -> Tensor:
    """What experts are chosen by where the logits alone do not do: probabilities, with the bias added."""
    if score_function == "sigmoid":
        preference_TE = torch.sigmoid(logits_TE)
    elif score_function == "sqrtsoftplus":
        preference_TE = _sqrtsoftplus(logits_TE)
    elif pre_softmax or expert_bias_E is not None:
        preference_TE = torch.softmax(logits_TE, dim=-1)
    else:
        return logits_TE
    if expert_bias_E is not None:
        preference_TE = preference_TE + expert_bias_E
    return preference_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)


def _only_best_groups(preference_TE: Tensor, num_groups: int, group_topk: int, num_counted: int) -> Tensor:
    """The preferences, with -inf outside each token's best groups.

    An expert that cannot be chosen (-inf) counts as so bad that a group with fewer of them always wins, and as better
    than the experts outside.
    """
    is_barred_TE = preference_TE == -torch.inf
    best_T1 = preference_TE.amax(-1, keepdim=True)
    worst_T1 = preference_TE.masked_fill(is_barred_TE, torch.inf).amin(-1, keepdim=True)
    floor_T1 = (worst_T1 - (best_T1 - worst_T1 + 1) * preference_TE.shape[1]).nan_to_num(
        nan=0.0, posinf=0.0, neginf=0.0
    )
    preference_TGe = torch.where(is_barred_TE, floor_T1, preference_TE).unflatten(1, (num_groups, -1))
    best_TGc = preference_TGe.topk(min(num_counted, preference_TGe.shape[2]), dim=-1).values
    chosen_Tg = best_TGc.sum(-1).topk(group_topk, dim=-1).indices
    is_out_TG1 = torch.ones(preference_TGe.shape[:2], dtype=torch.bool, device=preference_TE.device)
    is_out_TG1 = is_out_TG1.scatter_(1, chosen_Tg, False)[..., None]
    return preference_TGe.masked_fill(is_out_TG1, -torch.inf).flatten(1)


def topk_softmax_bwd(
    dscores_TK: Tensor,
    expert_TK: Tensor,
    prob_TK: Tensor,
    logits_TE: Tensor | None,
    num_experts: int,
    score_function: str,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> Tensor:
    """Derivatives of all logits, from those of the scores; see ``sonic.kernels.ops.topk_softmax_bwd``."""
    dprob_TK = dscores_TK * scaling_factor
    if score_function != "softmax":
        if norm_topk_prob:
            total_T1 = prob_TK.sum(-1, keepdim=True) + 1e-20
            share_TK = prob_TK / total_T1
            dprob_TK = (dprob_TK - (share_TK * dprob_TK).sum(-1, keepdim=True)) / total_T1
        dchosen_TK = dprob_TK * _pointwise_slope(prob_TK, score_function)
    else:
        dchosen_TK = dprob_TK * prob_TK
        mean_T1 = dchosen_TK.sum(-1, keepdim=True)
        if logits_TE is not None:  # over all experts: those that were not chosen have their part in the sum, too
            dlogits_TE = torch.softmax(logits_TE.to(prob_TK.dtype), dim=-1).mul_(-mean_T1)
            return dlogits_TE.scatter_add_(1, expert_TK.long(), dchosen_TK)
        dchosen_TK = dchosen_TK - prob_TK * mean_T1
    dlogits_TE = prob_TK.new_zeros(prob_TK.shape[0], num_experts)
    return dlogits_TE.scatter_add_(1, expert_TK.long(), dchosen_TK)


def _pointwise_slope(prob: Tensor, score_function: str) -> Tensor:
    """Derivative of sigmoid or sqrtsoftplus with respect to the logit, from its value."""
    if score_function == "sigmoid":
        return prob * (1 - prob)
    # d sqrt(softplus) = sigmoid / (2 sqrt(softplus)), and sigmoid = 1 - exp(-softplus)
    return -torch.expm1(-prob.square()) / (2 * prob).clamp(min=torch.finfo(prob.dtype).tiny)


def build_plan(
    expert_of_slot_P: Tensor,
    token_of_slot_P: Tensor | None,
    num_tokens: int,
    num_experts: int,
    load_EC: Tensor | None = None,
    tokens_per_run: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Offsets and index maps of the rows sorted by expert, tokens ascending within each.

    See ``sonic.kernels.ops.build_plan``. On a CPU in NumPy, whose calls cost a tenth of torch's on so few integers. Of
    the load only the sum over the runs is used, and held against the sorted experts, which costs E searches.
    """
    if expert_of_slot_P.device.type != "cpu":
        return _build_plan_on_device(expert_of_slot_P, token_of_slot_P, num_tokens, num_experts, load_EC)
    num_slots = expert_of_slot_P.shape[0]
    expert_P = expert_of_slot_P.numpy()
    _refuse_out_of_range("expert_index", expert_P, num_experts)
    if token_of_slot_P is None:
        top_k = num_slots // num_tokens if num_tokens else 0
        load_E = None if load_EC is None else load_EC.numpy().sum(1)
        slot_of_row_R, expert_offset_E1 = _counting_sort(expert_P, num_experts, load_E)
        row_of_visit_R = slot_of_row_R  # slots already come token by token
        token_of_row_R = slot_of_row_R // max(top_k, 1)
        token_offset_T1 = np.arange(num_tokens + 1) * top_k
    else:
        token_P = token_of_slot_P.numpy()
        _refuse_out_of_range("token_index", token_P, num_tokens)
        slot_by_token_P, token_offset_T1 = _counting_sort(token_P, num_tokens)
        row_of_visit_R, expert_offset_E1 = _counting_sort(expert_P[slot_by_token_P], num_experts)
        slot_of_row_R = slot_by_token_P[row_of_visit_R]
        token_of_row_R = token_P[slot_of_row_R]
    expert_of_row_R = expert_P[slot_of_row_R]
    if load_EC is not None and (np.searchsorted(expert_of_row_R, np.arange(num_experts + 1)) != expert_offset_E1).any():
        raise argument_error("sonic.RoutingPlan", "load", "not that of expert_index", _WANTED_LOAD)
    again = (token_of_row_R[1:] == token_of_row_R[:-1]) & (expert_of_row_R[1:] == expert_of_row_R[:-1])
    if again.any():
        row = int(again.argmax())
        was = f"a duplicate (token {token_of_row_R[row]} goes to expert {expert_of_row_R[row]} more than once)"
        raise argument_error("sonic.RoutingPlan", "expert_index", was, "each token at most once per expert")
    row_by_token_R = np.empty(num_slots, dtype=np.int32)
    row_by_token_R[row_of_visit_R] = np.arange(num_slots, dtype=np.int32)
    arrays = (expert_offset_E1, token_of_row_R, slot_of_row_R, row_by_token_R, token_offset_T1)
    offset, token, slot, by_token, token_offset = (torch.from_numpy(array.astype(np.int32)) for array in arrays)
    return offset, token, slot, by_token, token_offset


def _counting_sort(key_P: np.ndarray, num_keys: int, count: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the keys in stable ascending order, and where each key's run starts (num_keys + 1 entries), from how
    often each comes, if that is known.

    One counting pass per 16 bits of the largest key, which is how NumPy sorts 16-bit keys.
    """
    order = np.argsort(key_P.astype(np.uint16), kind="stable")  # the cast keeps the low 16 bits
    for shift in range(16, max(num_keys - 1, 1).bit_length(), 16):
        order = order[np.argsort((key_P[order] >> shift).astype(np.uint16), kind="stable")]
    offset = np.zeros(num_keys + 1, dtype=np.int64)
    np.cumsum(np.bincount(key_P, minlength=num_keys) if count is None else count, out=offset[1:])
    return order, offset


def _refuse_out_of_range(name: str, index_P: np.ndarray, size: int) -> None:
    if index_P.size and not (0 <= index_P.min() and index_P.max() < size):
        wrong = index_P.min() if index_P.min() < 0 else index_P.max()
        raise argument_error("sonic.RoutingPlan", name, f"out of range ({wrong})", f"0 <= {name} < {size}")


def _build_plan_on_device(
    expert_of_slot_P: Tensor,
    token_of_slot_P: Tensor | None,
    num_tokens: int,
    num_experts: int,
    load_EC: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same in torch, step by step, without a synchronisation: what is wrong becomes a device-side assertion."""
    device, num_slots = expert_of_slot_P.device, expert_of_slot_P.shape[0]

    def sort(key_P: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        sorted_P, order_P = torch.sort(key_P, stable=True)
        return order_P, torch.searchsorted(sorted_P, torch.arange(num_keys + 1, device=device))

    def demand(condition: Tensor, message: str) -> None:
        if device.type == "cuda":
            torch._assert_async(condition, f"sonic.RoutingPlan: {message}")
        elif not bool(condition):  # other accelerators have no such assertion, and pay the synchronisation
            raise ValueError(f"sonic.RoutingPlan: {message}")

    expert_P = expert_of_slot_P.long()
    outside = "expert_index is out of range, expected 0 <= expert_index < "
    demand(((expert_P >= 0) & (expert_P < num_experts)).all(), f"{outside}{num_experts}")
    if token_of_slot_P is None:
        top_k = num_slots // num_tokens if num_tokens else 0
        slot_of_row_R, expert_offset_E1 = sort(expert_P, num_experts)
        row_of_visit_R = slot_of_row_R
        token_of_row_R = slot_of_row_R // max(top_k, 1)
        token_offset_T1 = torch.arange(num_tokens + 1, device=device) * top_k
    else:
        token_P = token_of_slot_P.long()
        outside = "token_index is out of range, expected 0 <= token_index < "
        demand(((token_P >= 0) & (token_P < num_tokens)).all(), f"{outside}{num_tokens}")
        slot_by_token_P, token_offset_T1 = sort(token_P, num_tokens)
        row_of_visit_R, expert_offset_E1 = sort(expert_P[slot_by_token_P], num_experts)
        slot_of_row_R = slot_by_token_P[row_of_visit_R]
        token_of_row_R = token_P[slot_of_row_R]
    if load_EC is not None:
        is_theirs = (expert_offset_E1.diff() == load_EC.sum(1)).all()
        demand(is_theirs, f"load is not that of expert_index, expected {_WANTED_LOAD}")
    expert_of_row_R = expert_P[slot_of_row_R]
    again_R = (token_of_row_R[1:] == token_of_row_R[:-1]) & (expert_of_row_R[1:] == expert_of_row_R[:-1])
    demand(~again_R.any(), "expert_index has a duplicate, expected each token at most once per expert")
    row_by_token_R = torch.empty_like(row_of_visit_R)
    row_by_token_R[row_of_visit_R] = torch.arange(num_slots, device=device)
    return (
        expert_offset_E1.int(),
        token_of_row_R.int(),
        slot_of_row_R.int(),
        row_by_token_R.int(),
        token_offset_T1.int(),
    )
