"""What the ops of :mod:`sonic.kernels.ops` around the grouped products refuse, when they run and in their fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.kernels.dispatch import FLOAT_DTYPES, backends
from sonic.shapes import (
    argument_error,
    check_choice,
    check_dtype,
    check_integer,
    check_positive,
    check_same,
    check_shape,
)

__all__ = [
    "SCORE_FUNCTIONS",
    "check_backend",
    "check_combine",
    "check_groups",
    "check_plan",
    "check_row_count",
    "check_row_scores",
    "check_topk",
    "check_topk_bwd",
]

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def check_topk(
    logits_TE: Tensor,
    top_k: int,
    score_function: str,
    expert_bias_E: Tensor | None,
    num_groups: int,
    group_topk: int,
) -> None:
    """Refuse what ``topk_softmax`` can not choose by.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.topk_softmax"
    check_shape(where, "logits_TE", logits_TE, T=None, E=None)
    check_dtype(where, "logits_TE", logits_TE, FLOAT_DTYPES)
    check_choice(where, "score_function", score_function, SCORE_FUNCTIONS)
    num_experts = logits_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        raise argument_error(where, "top_k", top_k, f"1 to num_experts = {num_experts}")
    check_groups(where, num_experts, top_k, num_groups, group_topk)
    if expert_bias_E is not None:
        check_shape(where, "expert_bias_E", expert_bias_E, E=num_experts)
        check_same(where, ("logits_TE", logits_TE), (("expert_bias_E", expert_bias_E),), dtype=False)


def check_topk_bwd(
    dscores_TK: Tensor,
    expert_TK: Tensor,
    prob_TK: Tensor,
    logits_TE: Tensor | None,
    num_experts: int,
    score_function: str,
    norm_topk_prob: bool,
) -> None:
    """Refuse what ``topk_softmax`` did not return, or logits that its backward has no use for.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.topk_softmax_bwd"
    check_choice(where, "score_function", score_function, SCORE_FUNCTIONS)
    check_shape(where, "prob_TK", prob_TK, T=None, K=None)
    check_dtype(where, "prob_TK", prob_TK, (torch.float32, torch.float64))
    num_tokens, top_k = prob_TK.shape
    check_shape(where, "dscores_TK", dscores_TK, T=num_tokens, K=top_k)
    check_shape(where, "expert_TK", expert_TK, T=num_tokens, K=top_k)
    check_dtype(where, "expert_TK", expert_TK, (torch.int32,))
    if num_experts < top_k:
        raise argument_error(where, "num_experts", num_experts, f"at least K = {top_k}")
    check_same(where, ("prob_TK", prob_TK), (("dscores_TK", dscores_TK),))
    others = (("expert_TK", expert_TK), ("logits_TE", logits_TE))
    check_same(where, ("prob_TK", prob_TK), others, dtype=False)
    if logits_TE is not None:
        if score_function != "softmax" or norm_topk_prob:
            wanted = "None, but for softmax over all experts without norm_topk_prob"
            raise argument_error(where, "logits_TE", "a tensor", wanted)
        check_shape(where, "logits_TE", logits_TE, T=num_tokens, E=num_experts)
        check_dtype(where, "logits_TE", logits_TE, FLOAT_DTYPES)


def check_groups(where: str, num_experts: int, top_k: int, num_groups: int, group_topk: int) -> None:
    """Refuse groups that do not divide the experts, or that hold too few of them.

    Raises:
        ValueError: naming the argument.
    """
    check_positive(where, num_groups=num_groups, group_topk=group_topk)
    if num_experts % num_groups:
        raise argument_error(where, "num_groups", num_groups, f"a divisor of num_experts = {num_experts}")
    if group_topk > num_groups:
        raise argument_error(where, "group_topk", group_topk, f"at most num_groups = {num_groups}")
    reach = num_experts // num_groups * group_topk
    if top_k > reach:
        raise argument_error(where, "top_k", top_k, f"at most the {reach} experts of group_topk = {group_topk} groups")


def check_plan(expert_of_slot_P: Tensor, token_of_slot_P: Tensor | None, num_tokens: int, num_experts: int) -> None:
    """Refuse index tensors that no plan can be built from; their values are not looked at.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.build_plan"
    check_shape(where, "expert_of_slot_P", expert_of_slot_P, P=None)
    check_integer(where, "expert_of_slot_P", expert_of_slot_P)
    check_row_count(where, "expert_of_slot_P", expert_of_slot_P)
    if _is_too_many(num_tokens):
        raise argument_error(where, "num_tokens", num_tokens, "below 2**31")
    slots = expert_of_slot_P.shape[0]
    if token_of_slot_P is not None:
        check_shape(where, "token_of_slot_P", token_of_slot_P, P=slots)
        check_integer(where, "token_of_slot_P", token_of_slot_P)
        others = (("token_of_slot_P", token_of_slot_P),)
        check_same(where, ("expert_of_slot_P", expert_of_slot_P), others, dtype=False)
    elif num_tokens == 0 and slots != 0 or num_tokens and slots % num_tokens:
        raise argument_error(where, "expert_of_slot_P", f"({slots},)", f"(T * K,) with T = {num_tokens}")


def check_combine(
    y_RD: Tensor,
    row_scores_R: Tensor | None,
    row_by_token_R: Tensor,
    token_offset_T1: Tensor,
    residual_TD: Tensor | None,
) -> None:
    """Refuse rows, maps or a residual that ``combine`` can not bring together.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.combine"
    check_shape(where, "y_RD", y_RD, R=None, D=None)
    check_dtype(where, "y_RD", y_RD, FLOAT_DTYPES)
    check_row_count(where, "y_RD", y_RD)
    check_shape(where, "row_by_token_R", row_by_token_R, R=y_RD.shape[0])
    check_dtype(where, "row_by_token_R", row_by_token_R, (torch.int32,))
    check_shape(where, "token_offset_T1", token_offset_T1, T1=None)
    check_dtype(where, "token_offset_T1", token_offset_T1, (torch.int32,))
    others = (("row_by_token_R", row_by_token_R), ("token_offset_T1", token_offset_T1))
    check_same(where, ("y_RD", y_RD), others, dtype=False)
    check_row_scores("combine", row_scores_R, y_RD, y_RD.shape[0])
    if residual_TD is not None:
        check_shape(where, "residual_TD", residual_TD, T=token_offset_T1.shape[0] - 1, D=y_RD.shape[1])
        check_same(where, ("y_RD", y_RD), (("residual_TD", residual_TD),))


def check_row_scores(op: str, row_scores_R: Tensor | None, like: Tensor, num_rows: int) -> None:
    """Refuse scores that are not one floating number for each row; None passes.

    Raises:
        ValueError: naming what does not fit.
    """
    if row_scores_R is None:
        return
    where = f"sonic.{op}"
    check_shape(where, "row_scores_R", row_scores_R, R=num_rows)
    check_dtype(where, "row_scores_R", row_scores_R, FLOAT_DTYPES)
    check_same(where, ("rows", like), (("row_scores_R", row_scores_R),), dtype=False)


def check_backend(where: str, backend: str | None) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: listing the backends.
    """
    if backend is not None:
        check_choice(where, "backend", backend, backends())


def check_row_count(where: str, argument: str, tensor: Tensor) -> None:
    """Refuse more rows, tokens or slots than int32 counts; a compiler's symbolic size passes until the op runs.

    Raises:
        ValueError: naming the argument and its shape.
    """
    if _is_too_many(tensor.shape[0]):
        raise argument_error(where, argument, tuple(tensor.shape), "a first dimension below 2**31")


def _is_too_many(count: object) -> bool:
    return not torch.compiler.is_compiling() and isinstance(count, int) and count >= 2**31
