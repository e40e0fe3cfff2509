"""What the ops of :mod:`sonic.kernels.ops` refuse, when they run and in their fakes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sonic.kernels.dispatch import ACTIVATIONS, FLOAT_DTYPES, GATED_ACTIVATIONS, backends
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
    "GLU_LAYOUTS",
    "SCORE_FUNCTIONS",
    "check_backend",
    "check_best_of_columns",
    "check_combine",
    "check_down",
    "check_down_bwd",
    "check_experts",
    "check_experts_bwd",
    "check_groups",
    "check_main_grad",
    "check_maps",
    "check_plan",
    "check_row_count",
    "check_row_scores",
    "check_rows",
    "check_topk",
    "check_topk_bwd",
    "check_up",
    "check_up_bwd",
    "check_weight_bwd",
    "is_gated",
    "row_count",
]

GLU_LAYOUTS = ("concatenated", "interleaved")
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
_INT32 = (torch.int32,)


def is_gated(activation: str) -> bool:
    """Whether the up projection of ``activation`` holds gate and up rows (U = 2N) or one row per unit (U = N)."""
    return activation in GATED_ACTIVATIONS


def row_count(x_TD: Tensor, token_of_row_R: Tensor | None) -> int:
    """R: the rows of a map, or without one those of the matrix itself."""
    return x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]


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
            wanted = "None: logits are used only by softmax over all experts without norm_topk_prob"
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
    for name, count in (("num_tokens", num_tokens), ("num_experts", num_experts)):
        if isinstance(count, int) and count < 0:
            raise argument_error(where, name, count, "an integer >= 0")
        if _is_too_many(count):
            raise argument_error(where, name, count, "below 2**31")
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
    _check_offsets(where, "token_offset_T1", token_offset_T1)
    others = (("row_by_token_R", row_by_token_R), ("token_offset_T1", token_offset_T1))
    check_same(where, ("y_RD", y_RD), others, dtype=False)
    check_row_scores("combine", row_scores_R, y_RD, y_RD.shape[0])
    if residual_TD is not None:
        check_shape(where, "residual_TD", residual_TD, T=token_offset_T1.shape[0] - 1, D=y_RD.shape[1])
        check_same(where, ("y_RD", y_RD), (("residual_TD", residual_TD),))


def check_best_of_columns(
    logits_TE: Tensor,
    shift_T: Tensor | None,
    num_wanted: Sequence[int],
    plan: Sequence[Tensor | None],
    allowed_TG: Tensor | None,
) -> None:
    """Refuse a table, counts, a plan or groups that ``best_of_columns`` can not choose by.

    Args:
        logits_TE, shift_T, num_wanted, allowed_TG: as the op takes them.
        plan: its four tensors of a plan, in order.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.best_of_columns"
    check_shape(where, "logits_TE", logits_TE, T=None, E=None)
    check_dtype(where, "logits_TE", logits_TE, FLOAT_DTYPES)
    check_row_count(where, "logits_TE", logits_TE)
    num_tokens, num_experts = logits_TE.shape
    if shift_T is not None:
        check_shape(where, "shift_T", shift_T, T=num_tokens)
        check_same(where, ("logits_TE", logits_TE), (("shift_T", shift_T),))
    if len(num_wanted) != num_experts:
        raise argument_error(where, "num_wanted", f"of {len(num_wanted)} entries", f"one per expert, E = {num_experts}")
    for count in num_wanted:
        if not 0 <= count <= num_tokens:
            raise argument_error(where, "num_wanted", f"a list with {count}", f"integers from 0 to T = {num_tokens}")
    names = ("token_of_row_R", "expert_offset_E1", "row_by_token_R", "token_offset_T1")
    given = [name for name, tensor in zip(names, plan, strict=True) if tensor is not None]
    if given and len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise argument_error(where, missing, None, f"a tensor, as {given[0]}: all four of a plan, or none")
    token_of_row_R = plan[0]
    if token_of_row_R is not None:
        check_shape(where, names[0], token_of_row_R, R=None)
        rows = {"R": token_of_row_R.shape[0]}
        sizes = (rows, {"E1": num_experts + 1}, rows, {"T1": num_tokens + 1})
        for name, tensor, size in zip(names, plan, sizes, strict=True):
            assert tensor is not None, "all four or none, checked above"
            check_shape(where, name, tensor, **size)
            check_dtype(where, name, tensor, (torch.int32,))
            check_same(where, ("logits_TE", logits_TE), ((name, tensor),), dtype=False)
    if allowed_TG is not None:
        check_shape(where, "allowed_TG", allowed_TG, T=num_tokens, G=None)
        check_dtype(where, "allowed_TG", allowed_TG, (torch.bool,))
        check_same(where, ("logits_TE", logits_TE), (("allowed_TG", allowed_TG),), dtype=False)
        num_groups = allowed_TG.shape[1]
        if num_groups == 0 or num_experts % num_groups:
            wanted = f"G a divisor of num_experts = {num_experts}"
            raise argument_error(where, "allowed_TG", tuple(allowed_TG.shape), wanted)


def check_rows(op: str, name: str, x_TD: Tensor, token_of_row_R: Tensor | None, expert_offset_E1: Tensor) -> None:
    """Refuse a matrix of tokens, a map of rows or offsets that do not fit each other.

    Raises:
        ValueError: naming the argument.
    """
    where = f"sonic.{op}"
    check_shape(where, name, x_TD, T=None, D=None)
    check_dtype(where, name, x_TD, FLOAT_DTYPES)
    check_row_count(where, name, x_TD)
    _check_offsets(where, "expert_offset_E1", expert_offset_E1)
    if token_of_row_R is not None:
        check_shape(where, "token_of_row_R", token_of_row_R, R=None)
        check_dtype(where, "token_of_row_R", token_of_row_R, _INT32)
        check_row_count(where, "token_of_row_R", token_of_row_R)
    others = (("expert_offset_E1", expert_offset_E1), ("token_of_row_R", token_of_row_R))
    check_same(where, (name, x_TD), others, dtype=False)


def check_maps(
    op: str, token_of_row_R: Tensor | None, row_by_token_R: Tensor | None, token_offset_T1: Tensor | None
) -> None:
    """Refuse a part of a plan where a whole pass needs all of it: the three maps go together.

    Raises:
        ValueError: naming the one that is missing.
    """
    maps = {
        "token_of_row_R": token_of_row_R,
        "row_by_token_R": row_by_token_R,
        "token_offset_T1": token_offset_T1,
    }
    missing = [name for name, tensor in maps.items() if tensor is None]
    if missing and len(missing) < len(maps):
        given = next(name for name in maps if name not in missing)
        raise argument_error(
            f"sonic.{op}", missing[0], None, f"a tensor, as {given}: all three maps of a plan, or none"
        )


def check_up(
    op: str,
    x_TD: Tensor,
    w1_EUD: Tensor,
    b1_EU: Tensor | None,
    expert_offset_E1: Tensor,
    activation: str,
    glu_layout: str,
) -> None:
    """Refuse an up projection that does not fit the tokens, the experts or the activation.

    Raises:
        ValueError: naming the argument.
    """
    where = f"sonic.{op}"
    experts = expert_offset_E1.shape[0] - 1
    check_choice(where, "activation", activation, ACTIVATIONS)
    check_choice(where, "glu_layout", glu_layout, GLU_LAYOUTS)
    check_shape(where, "w1_EUD", w1_EUD, E=experts, U=None, D=x_TD.shape[1])
    if is_gated(activation) and w1_EUD.shape[1] % 2:
        raise argument_error(where, "w1_EUD", tuple(w1_EUD.shape), f"an even U, since {activation} is gated")
    if b1_EU is not None:
        check_shape(where, "b1_EU", b1_EU, E=experts, U=w1_EUD.shape[1])
    check_same(where, ("x_TD", x_TD), (("w1_EUD", w1_EUD), ("b1_EU", b1_EU)))


def check_down(
    op: str,
    a_RN: Tensor,
    w2_EDN: Tensor,
    b2_ED: Tensor | None,
    row_scores_R: Tensor | None,
    expert_offset_E1: Tensor,
    num_rows: int,
) -> None:
    """Refuse a down projection, scores or offsets that do not fit the rows.

    Raises:
        ValueError: naming the argument.
    """
    where = f"sonic.{op}"
    check_shape(where, "a_RN", a_RN, R=None, N=None)
    check_dtype(where, "a_RN", a_RN, FLOAT_DTYPES)
    check_row_count(where, "a_RN", a_RN)
    _check_offsets(where, "expert_offset_E1", expert_offset_E1)
    experts = expert_offset_E1.shape[0] - 1
    check_shape(where, "w2_EDN", w2_EDN, E=experts, D=None, N=a_RN.shape[1])
    if b2_ED is not None:
        check_shape(where, "b2_ED", b2_ED, E=experts, D=w2_EDN.shape[1])
    check_same(where, ("a_RN", a_RN), (("w2_EDN", w2_EDN), ("b2_ED", b2_ED)))
    check_same(where, ("a_RN", a_RN), (("expert_offset_E1", expert_offset_E1),), dtype=False)
    check_row_scores(op, row_scores_R, a_RN, num_rows)


def check_down_bwd(
    dout_TD: Tensor,
    h_RU: Tensor,
    w2_EDN: Tensor,
    b2_ED: Tensor | None,
    row_scores_R: Tensor | None,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    activation: str,
    glu_layout: str,
) -> None:
    """Refuse what does not fit the gradient of the output in ``down_proj_bwd_input``.

    Raises:
        ValueError: naming the argument.
    """
    op = "down_proj_bwd_input"
    where = f"sonic.{op}"
    check_rows(op, "dout_TD", dout_TD, token_of_row_R, expert_offset_E1)
    check_choice(where, "activation", activation, ACTIVATIONS)
    check_choice(where, "glu_layout", glu_layout, GLU_LAYOUTS)
    rows, experts = row_count(dout_TD, token_of_row_R), expert_offset_E1.shape[0] - 1
    check_shape(where, "w2_EDN", w2_EDN, E=experts, D=dout_TD.shape[1], N=None)
    width_n = w2_EDN.shape[2]
    check_shape(where, "h_RU", h_RU, R=rows, U=2 * width_n if is_gated(activation) else width_n)
    if b2_ED is not None:
        check_shape(where, "b2_ED", b2_ED, E=experts, D=dout_TD.shape[1])
    check_same(where, ("dout_TD", dout_TD), (("h_RU", h_RU), ("w2_EDN", w2_EDN), ("b2_ED", b2_ED)))
    check_row_scores(op, row_scores_R, dout_TD, rows)


def check_experts(
    op: str,
    x_TD: Tensor,
    w1_EUD: Tensor,
    w2_EDN: Tensor,
    b1_EU: Tensor | None,
    b2_ED: Tensor | None,
    row_scores_R: Tensor | None,
    expert_offset_E1: Tensor,
    token_of_row_R: Tensor | None,
    activation: str,
    glu_layout: str,
) -> None:
    """Refuse experts, rows or scores of a whole pass that do not fit each other.

    Raises:
        ValueError: naming the argument.
    """
    where = f"sonic.{op}"
    check_rows(op, "x_TD", x_TD, token_of_row_R, expert_offset_E1)
    check_up(op, x_TD, w1_EUD, b1_EU, expert_offset_E1, activation, glu_layout)
    width_u = w1_EUD.shape[1]
    width_n = width_u // 2 if is_gated(activation) else width_u
    check_shape(where, "w2_EDN", w2_EDN, E=w1_EUD.shape[0], D=x_TD.shape[1], N=width_n)
    if b2_ED is not None:
        check_shape(where, "b2_ED", b2_ED, E=w1_EUD.shape[0], D=x_TD.shape[1])
    check_same(where, ("x_TD", x_TD), (("w2_EDN", w2_EDN), ("b2_ED", b2_ED)))
    check_row_scores(op, row_scores_R, x_TD, row_count(x_TD, token_of_row_R))


def check_experts_bwd(
    dout_TD: Tensor,
    x_TD: Tensor,
    h_RU: Tensor | None,
    w1_EUD: Tensor,
    token_of_row_R: Tensor | None,
    slot_of_row_R: Tensor | None,
) -> None:
    """Refuse what a whole backward pass takes beside the operands of forward.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.experts_bwd"
    check_shape(where, "dout_TD", dout_TD, T=x_TD.shape[0], D=x_TD.shape[1])
    if h_RU is not None:
        check_shape(where, "h_RU", h_RU, R=row_count(x_TD, token_of_row_R), U=w1_EUD.shape[1])
    check_same(where, ("x_TD", x_TD), (("dout_TD", dout_TD), ("h_RU", h_RU)))
    if slot_of_row_R is not None:
        check_shape(where, "slot_of_row_R", slot_of_row_R, R=row_count(x_TD, token_of_row_R))
        check_dtype(where, "slot_of_row_R", slot_of_row_R, _INT32)
        check_same(where, ("x_TD", x_TD), (("slot_of_row_R", slot_of_row_R),), dtype=False)


def check_weight_bwd(
    op: str,
    gathered_name: str,
    gathered_TD: Tensor,
    rows_name: str,
    rows_RN: Tensor,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
) -> None:
    """Refuse the two operands of a weight gradient where their rows differ.

    Raises:
        ValueError: naming the argument.
    """
    where = f"sonic.{op}"
    check_rows(op, gathered_name, gathered_TD, token_of_row_R, expert_offset_E1)
    check_shape(where, rows_name, rows_RN, R=row_count(gathered_TD, token_of_row_R), N=None)
    check_same(where, (gathered_name, gathered_TD), ((rows_name, rows_RN),))


def check_main_grad(op: str, name: str, main_grad: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """Refuse a buffer that a weight gradient can not be added to; None passes.

    Raises:
        ValueError: naming the argument.
    """
    if main_grad is None:
        return
    where = f"sonic.{op}"
    check_shape(where, name, main_grad, **dict(zip(name[-3:], shape, strict=True)))
    check_dtype(where, name, main_grad, (torch.float32,))
    check_same(where, ("rows", like), ((name, main_grad),), dtype=False)
    if not main_grad.is_contiguous():
        raise argument_error(where, name, f"of strides {main_grad.stride()}", "a contiguous tensor: it is added to")


def check_up_bwd(dh_RU: Tensor, w1_EUD: Tensor, expert_offset_E1: Tensor) -> None:
    """Refuse an up projection that does not fit dH.

    Raises:
        ValueError: naming the argument.
    """
    where = "sonic.up_proj_bwd_input"
    check_rows("up_proj_bwd_input", "dh_RU", dh_RU, None, expert_offset_E1)
    check_shape(where, "w1_EUD", w1_EUD, E=expert_offset_E1.shape[0] - 1, U=dh_RU.shape[1], D=None)
    check_same(where, ("dh_RU", dh_RU), (("w1_EUD", w1_EUD),))


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


def _check_offsets(where: str, argument: str, offset: Tensor) -> None:
    """Offsets of any number of runs, at least none of them, which takes one entry."""
    check_shape(where, argument, offset, **{argument[-2:]: None})
    check_dtype(where, argument, offset, _INT32)
    if offset.shape[0] == 0:
        raise argument_error(where, argument, tuple(offset.shape), "at least one entry, the 0 that comes first")


def _is_too_many(count: object) -> bool:
    return not torch.compiler.is_compiling() and isinstance(count, int) and count >= 2**31
