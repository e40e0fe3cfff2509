"""The contracts of all kernels: one function per op, registered with torch so that compilers see it whole.

Each function below is a ``torch.library`` custom op (``torch.ops.sonic.<name>``): its docstring is the contract that
every backend keeps, its body checks the arguments, describes the call as a :class:`~sonic.kernels.dispatch.Request` and
lets :mod:`sonic.kernels.dispatch` run it, and its fake tells compilers the shapes. Ops take tensors of a
:class:`~sonic.routing.plan.RoutingPlan`, not the plan: an op's arguments have to be tensors and numbers. Gradients are
not taken through single ops; :mod:`sonic.functional` joins them.

All matrices are row-major, on one device and of one floating dtype (float64, float32, float16 or bfloat16); products
are accumulated in at least float32. Rows and tokens are counted in int32, so there are fewer than 2**31 of each.
``token_of_row_R=None`` means that the rows already stand in order: row r reads row r. Rows from ``expert_offset_E1[E]``
on belong to no expert: they come out as zeros where rows are written for a caller, and count nowhere.

Cost is given as floating point operations and as bytes moved for 16-bit values, ideal caches.

Source of the algorithm: SonicMoE (arXiv:2512.14080), section 3 and algorithms 2, 3 and 5.
"""

# Annotations stay evaluated here (no `from __future__ import annotations`): torch reads them to build each op's schema.

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from sonic.kernels import dispatch
from sonic.kernels.checks import (
    GLU_LAYOUTS,
    SCORE_FUNCTIONS,
    check_backend,
    check_best_of_columns,
    check_combine,
    check_down,
    check_down_bwd,
    check_experts,
    check_experts_bwd,
    check_groups,
    check_main_grad,
    check_maps,
    check_plan,
    check_row_count,
    check_row_scores,
    check_rows,
    check_topk,
    check_topk_bwd,
    check_up,
    check_up_bwd,
    check_weight_bwd,
    is_gated,
    row_count,
)
from sonic.kernels.dispatch import ACTIVATIONS, FLOAT_DTYPES, GATED_ACTIVATIONS, check_float_dtype
from sonic.shapes import argument_error, check_dtype, check_same, check_shape, load_columns, tokens_per_run

__all__ = [
    "ACTIVATIONS",
    "FLOAT_DTYPES",
    "GATED_ACTIVATIONS",
    "GLU_LAYOUTS",
    "SCORE_FUNCTIONS",
    "best_of_columns",
    "build_plan",
    "check_backend",
    "check_float_dtype",
    "check_groups",
    "check_row_count",
    "combine",
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "experts",
    "experts_bwd",
    "is_gated",
    "tile_rows",
    "topk_softmax",
    "topk_softmax_bwd",
    "up_proj",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
]


@torch.library.custom_op("sonic::up_proj", mutates_args=())
def up_proj(
    x_TD: Tensor,
    w1_EUD: Tensor,
    b1_EU: Optional[Tensor],
    token_of_row_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    activation: str,
    glu_layout: str,
    need_h: bool = True,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """Gather rows by expert, multiply, activate: ``h = x[token_of_row] @ w1[e].T + b1[e]``, ``a = act(h)``.

    Args:
        x_TD: tokens.
        w1_EUD: up projections, gate and up rows as ``glu_layout`` says.
        b1_EU: biases, or None.
        token_of_row_R: int32, row -> token; None: rows stand in order.
        expert_offset_E1: int32, rows of expert e are ``offset[e]:offset[e + 1]``.
        activation: a name in ``sonic.ACTIVATIONS``.
        glu_layout: ``"concatenated"`` (gate rows, then up rows) or ``"interleaved"`` (g0 u0 g1 u1 …); plain activations
            ignore it.
        need_h: store H; without (inference) an empty (0, U) comes back in its place.
        backend: insist on a backend.

    Returns:
        h_RU: before activation; kept for backward: 2 R U bytes in bf16.
        a_RN: after activation, from H before it was rounded.

    Cost: 2 R D U FLOP; reads R D gathered + E U D, writes R U + R N values.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit; no backend can serve.
    """
    check_rows("up_proj", "x_TD", x_TD, token_of_row_R, expert_offset_E1)
    check_up("up_proj", x_TD, w1_EUD, b1_EU, expert_offset_E1, activation, glu_layout)
    request = _request(
        "up_proj", x_TD, w1_EUD, row_count(x_TD, token_of_row_R), x_TD.shape[1], w1_EUD.shape[1], activation
    )
    return dispatch.run(
        request, backend, x_TD, w1_EUD, b1_EU, token_of_row_R, expert_offset_E1, activation, glu_layout, need_h
    )


@up_proj.register_fake
def _(x_TD, w1_EUD, b1_EU, token_of_row_R, expert_offset_E1, activation, glu_layout, need_h=True, backend=None):
    check_rows("up_proj", "x_TD", x_TD, token_of_row_R, expert_offset_E1)
    check_up("up_proj", x_TD, w1_EUD, b1_EU, expert_offset_E1, activation, glu_layout)
    rows, width_u = row_count(x_TD, token_of_row_R), w1_EUD.shape[1]
    width_n = width_u // 2 if is_gated(activation) else width_u
    return x_TD.new_empty(rows if need_h else 0, width_u), x_TD.new_empty(rows, width_n)


@torch.library.custom_op("sonic::down_proj", mutates_args=())
def down_proj(
    a_RN: Tensor,
    w2_EDN: Tensor,
    b2_ED: Optional[Tensor],
    row_scores_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    backend: Optional[str] = None,
) -> Tensor:
    """Multiply rows by their expert's down projection: ``y = (a @ w2[e].T + b2[e]) * score``.

    Args:
        a_RN: activations, rows grouped by expert.
        w2_EDN: down projections.
        b2_ED: biases, or None.
        row_scores_R: any floating dtype; multiplies the finished row. None: 1.
        expert_offset_E1: int32.
        backend: insist on a backend.

    Returns:
        y_RD: rows after the last offset are zero.

    Cost: 2 R N D FLOP; reads R N + E D N, writes R D values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; no backend can serve.
    """
    check_down("down_proj", a_RN, w2_EDN, b2_ED, row_scores_R, expert_offset_E1, a_RN.shape[0])
    request = _request("down_proj", a_RN, w2_EDN, a_RN.shape[0], w2_EDN.shape[1], w2_EDN.shape[2])
    return dispatch.run(request, backend, a_RN, w2_EDN, b2_ED, row_scores_R, expert_offset_E1)


@down_proj.register_fake
def _(a_RN, w2_EDN, b2_ED, row_scores_R, expert_offset_E1, backend=None):
    check_down("down_proj", a_RN, w2_EDN, b2_ED, row_scores_R, expert_offset_E1, a_RN.shape[0])
    return a_RN.new_empty(a_RN.shape[0], w2_EDN.shape[1])


@torch.library.custom_op("sonic::combine", mutates_args=())
def combine(
    y_RD: Tensor,
    row_scores_R: Optional[Tensor],
    row_by_token_R: Tensor,
    token_offset_T1: Tensor,
    residual_TD: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> Tensor:
    """Gather the rows of each token and sum them: ``out[t] = sum of score * y over the rows of t``, in one fixed order.

    Args:
        y_RD: rows, grouped by expert.
        row_scores_R: any floating dtype, in the order of the rows. None: 1 (that is dX).
        row_by_token_R: int32, the rows listed token by token.
        token_offset_T1: int32, those of token t are ``[offset[t] : offset[t + 1]]``; any number, none gives zeros.
        residual_TD: added to the sums before they are rounded; dtype of the rows. None: 0.
        backend: insist on a backend.

    Returns:
        out_TD: summed in at least float32, rounded once.

    Cost: 2 R D FLOP; reads R D (and T D of a residual), writes T D values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; no backend can serve.
    """
    check_combine(y_RD, row_scores_R, row_by_token_R, token_offset_T1, residual_TD)
    request = dispatch.request_of("combine", y_RD, num_rows=y_RD.shape[0], hidden_size=y_RD.shape[1])
    return dispatch.run(request, backend, y_RD, row_scores_R, row_by_token_R, token_offset_T1, residual_TD)


@combine.register_fake
def _(y_RD, row_scores_R, row_by_token_R, token_offset_T1, residual_TD=None, backend=None):
    check_combine(y_RD, row_scores_R, row_by_token_R, token_offset_T1, residual_TD)
    return y_RD.new_empty(token_offset_T1.shape[0] - 1, y_RD.shape[1])


@torch.library.custom_op("sonic::down_proj_bwd_input", mutates_args=())
def down_proj_bwd_input(
    dout_TD: Tensor,
    h_RU: Tensor,
    w2_EDN: Tensor,
    b2_ED: Optional[Tensor],
    row_scores_R: Optional[Tensor],
    token_of_row_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    activation: str,
    glu_layout: str,
    need_dh: bool = True,
    need_dscores: bool = True,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From dO and H: dA' = dO[t] W2[e], A again, and with them dH, score * A and dS, in one pass.

    ``dS = <dA', A>`` equals ``<dO, Y>`` without the bias (contraction in another order), so Y is neither kept nor read.

    Args:
        dout_TD: gradient of the output.
        h_RU: kept from :func:`up_proj`.
        w2_EDN: down projections.
        b2_ED: biases, or None; only dS depends on them.
        row_scores_R: any floating dtype. None: 1.
        token_of_row_R: int32, row -> token; None: rows stand in order.
        expert_offset_E1: int32.
        activation: as in :func:`up_proj`.
        glu_layout: as in :func:`up_proj`.
        need_dh: compute dH; without, an empty (0, U) comes back.
        need_dscores: compute dS; without, an empty (0,) comes back.
        backend: insist on a backend.

    Returns:
        dh_RU: ``act'(h) * score * dA'``; rows after the last offset are zero.
        scaled_a_RN: ``score * a``, the operand of dW2; rows after the last offset are undefined.
        dscores_R: ``<dA', a> + <dO[t], b2[e]>``, float32 (float64 for float64 matrices); zero after the last offset.

    Cost: 2 R N D FLOP; reads R D gathered + E D N + R U, writes R U + R N values.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit; no backend can serve.
    """
    check_down_bwd(dout_TD, h_RU, w2_EDN, b2_ED, row_scores_R, token_of_row_R, expert_offset_E1, activation, glu_layout)
    request = _request(
        "down_proj_bwd_input", dout_TD, w2_EDN, h_RU.shape[0], w2_EDN.shape[1], w2_EDN.shape[2], activation
    )
    tensors = (dout_TD, h_RU, w2_EDN, b2_ED, row_scores_R, token_of_row_R, expert_offset_E1)
    return dispatch.run(request, backend, *tensors, activation, glu_layout, need_dh, need_dscores)


@down_proj_bwd_input.register_fake
def _(
    dout_TD,
    h_RU,
    w2_EDN,
    b2_ED,
    row_scores_R,
    token_of_row_R,
    expert_offset_E1,
    activation,
    glu_layout,
    need_dh=True,
    need_dscores=True,
    backend=None,
):
    check_down_bwd(dout_TD, h_RU, w2_EDN, b2_ED, row_scores_R, token_of_row_R, expert_offset_E1, activation, glu_layout)
    rows = h_RU.shape[0]
    return (
        h_RU.new_empty(rows if need_dh else 0, h_RU.shape[1]),
        h_RU.new_empty(rows, w2_EDN.shape[2]),
        h_RU.new_empty(rows if need_dscores else 0, dtype=torch.promote_types(h_RU.dtype, torch.float32)),
    )


@torch.library.custom_op("sonic::down_proj_bwd_weight", mutates_args=("main_grad_EDN",))
def down_proj_bwd_weight(
    dout_TD: Tensor,
    scaled_a_RN: Tensor,
    row_scores_R: Optional[Tensor],
    token_of_row_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    need_weight: bool = True,
    need_bias: bool = False,
    main_grad_EDN: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """Contract over each expert's rows: ``dw2[e] = sum of dO[t] (x) (score * a)``, ``db2[e] = sum of score * dO[t]``.

    Args:
        dout_TD: gradient of the output, gathered along the contraction.
        scaled_a_RN: from :func:`down_proj_bwd_input`.
        row_scores_R: any floating dtype; only the bias needs them. None: 1.
        token_of_row_R: int32, row -> token; None: rows stand in order.
        expert_offset_E1: int32.
        need_weight: compute dW2; without, an empty (0, D, N) comes back.
        need_bias: compute db2; without, an empty (0, D) comes back.
        main_grad_EDN: float32; dW2 is added to it, unrounded, and an empty (0, D, N) comes back.
        backend: insist on a backend.

    Returns:
        dw2_EDN, db2_ED: in the dtype of the rows; zero for an expert without rows.

    Cost: 2 R N D FLOP; reads R D gathered + R N, writes E D N values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; no backend can serve.
    """
    check_weight_bwd(
        "down_proj_bwd_weight", "dout_TD", dout_TD, "scaled_a_RN", scaled_a_RN, token_of_row_R, expert_offset_E1
    )
    check_row_scores("down_proj_bwd_weight", row_scores_R, dout_TD, scaled_a_RN.shape[0])
    shape = (expert_offset_E1.shape[0] - 1, dout_TD.shape[1], scaled_a_RN.shape[1])
    check_main_grad("down_proj_bwd_weight", "main_grad_EDN", main_grad_EDN, shape, dout_TD)
    request = dispatch.request_of(
        "down_proj_bwd_weight",
        dout_TD,
        num_rows=scaled_a_RN.shape[0],
        num_experts=expert_offset_E1.shape[0] - 1,
        hidden_size=dout_TD.shape[1],
        intermediate_size=scaled_a_RN.shape[1],
    )
    return dispatch.run(
        request,
        backend,
        dout_TD,
        scaled_a_RN,
        row_scores_R,
        token_of_row_R,
        expert_offset_E1,
        need_weight,
        need_bias,
        main_grad_EDN,
    )


@down_proj_bwd_weight.register_fake
def _(
    dout_TD,
    scaled_a_RN,
    row_scores_R,
    token_of_row_R,
    expert_offset_E1,
    need_weight=True,
    need_bias=False,
    main_grad_EDN=None,
    backend=None,
):
    check_weight_bwd(
        "down_proj_bwd_weight", "dout_TD", dout_TD, "scaled_a_RN", scaled_a_RN, token_of_row_R, expert_offset_E1
    )
    check_row_scores("down_proj_bwd_weight", row_scores_R, dout_TD, scaled_a_RN.shape[0])
    shape = (expert_offset_E1.shape[0] - 1, dout_TD.shape[1], scaled_a_RN.shape[1])
    check_main_grad("down_proj_bwd_weight", "main_grad_EDN", main_grad_EDN, shape, dout_TD)
    experts, width_d = expert_offset_E1.shape[0] - 1, dout_TD.shape[1]
    return (
        dout_TD.new_empty(experts if need_weight and main_grad_EDN is None else 0, width_d, scaled_a_RN.shape[1]),
        dout_TD.new_empty(experts if need_bias else 0, width_d),
    )


@torch.library.custom_op("sonic::up_proj_bwd_input", mutates_args=())
def up_proj_bwd_input(dh_RU: Tensor, w1_EUD: Tensor, expert_offset_E1: Tensor, backend: Optional[str] = None) -> Tensor:
    """Rows of dX: ``dx = dh @ w1[e]``; :func:`combine` without scores sums them per token.

    Args:
        dh_RU: from :func:`down_proj_bwd_input`.
        w1_EUD: up projections.
        expert_offset_E1: int32.
        backend: insist on a backend.

    Returns:
        dx_RD: rows after the last offset are zero.

    Cost: 2 R U D FLOP; reads R U + E U D, writes R D values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; no backend can serve.
    """
    check_up_bwd(dh_RU, w1_EUD, expert_offset_E1)
    request = _request("up_proj_bwd_input", dh_RU, w1_EUD, dh_RU.shape[0], w1_EUD.shape[2], w1_EUD.shape[1])
    return dispatch.run(request, backend, dh_RU, w1_EUD, expert_offset_E1)


@up_proj_bwd_input.register_fake
def _(dh_RU, w1_EUD, expert_offset_E1, backend=None):
    check_up_bwd(dh_RU, w1_EUD, expert_offset_E1)
    return dh_RU.new_empty(dh_RU.shape[0], w1_EUD.shape[2])


@torch.library.custom_op("sonic::up_proj_bwd_weight", mutates_args=("main_grad_EUD",))
def up_proj_bwd_weight(
    dh_RU: Tensor,
    x_TD: Tensor,
    token_of_row_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    need_weight: bool = True,
    need_bias: bool = False,
    main_grad_EUD: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """Contract over each expert's rows: ``dw1[e] = sum of dh (x) x[t]``, ``db1[e] = sum of dh``.

    Args:
        dh_RU: from :func:`down_proj_bwd_input`.
        x_TD: tokens, gathered along the contraction.
        token_of_row_R: int32, row -> token; None: rows stand in order.
        expert_offset_E1: int32.
        need_weight: compute dW1; without, an empty (0, U, D) comes back.
        need_bias: compute db1; without, an empty (0, U) comes back.
        main_grad_EUD: float32; dW1 is added to it, unrounded, and an empty (0, U, D) comes back.
        backend: insist on a backend.

    Returns:
        dw1_EUD, db1_EU: in the dtype of the rows; zero for an expert without rows.

    Cost: 2 R U D FLOP; reads R D gathered + R U, writes E U D values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; no backend can serve.
    """
    check_weight_bwd("up_proj_bwd_weight", "x_TD", x_TD, "dh_RU", dh_RU, token_of_row_R, expert_offset_E1)
    shape = (expert_offset_E1.shape[0] - 1, dh_RU.shape[1], x_TD.shape[1])
    check_main_grad("up_proj_bwd_weight", "main_grad_EUD", main_grad_EUD, shape, x_TD)
    request = dispatch.request_of(
        "up_proj_bwd_weight",
        x_TD,
        num_rows=dh_RU.shape[0],
        num_experts=expert_offset_E1.shape[0] - 1,
        hidden_size=x_TD.shape[1],
        intermediate_size=dh_RU.shape[1],
    )
    options = (need_weight, need_bias, main_grad_EUD)
    return dispatch.run(request, backend, dh_RU, x_TD, token_of_row_R, expert_offset_E1, *options)


@up_proj_bwd_weight.register_fake
def _(
    dh_RU, x_TD, token_of_row_R, expert_offset_E1, need_weight=True, need_bias=False, main_grad_EUD=None, backend=None
):
    check_weight_bwd("up_proj_bwd_weight", "x_TD", x_TD, "dh_RU", dh_RU, token_of_row_R, expert_offset_E1)
    shape = (expert_offset_E1.shape[0] - 1, dh_RU.shape[1], x_TD.shape[1])
    check_main_grad("up_proj_bwd_weight", "main_grad_EUD", main_grad_EUD, shape, x_TD)
    experts, width_u = expert_offset_E1.shape[0] - 1, dh_RU.shape[1]
    return (
        x_TD.new_empty(experts if need_weight and main_grad_EUD is None else 0, width_u, x_TD.shape[1]),
        x_TD.new_empty(experts if need_bias else 0, width_u),
    )


@torch.library.custom_op("sonic::experts", mutates_args=())
def experts(
    x_TD: Tensor,
    w1_EUD: Tensor,
    w2_EDN: Tensor,
    b1_EU: Optional[Tensor],
    b2_ED: Optional[Tensor],
    row_scores_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    token_of_row_R: Optional[Tensor],
    row_by_token_R: Optional[Tensor],
    token_offset_T1: Optional[Tensor],
    activation: str,
    glu_layout: str,
    need_h: bool = True,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """The whole forward of the experts: :func:`up_proj`, :func:`down_proj`, :func:`combine`.

    A backend may serve it in one pass of its own (the reference does: on a CPU a block of rows stays in cache from
    gather to sum); otherwise it is made of the three ops.

    Args:
        x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, row_scores_R, expert_offset_E1, token_of_row_R, activation, glu_layout,
            need_h, backend: as in those ops.
        row_by_token_R, token_offset_T1: as in :func:`combine`; None, with ``token_of_row_R`` None: rows stand in order
            and are not summed.

    Returns:
        out_TD: the sums, or without maps the finished rows (R, D).
        h_RU: kept for backward, or empty (0, U).

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit; no backend can serve.
    """
    rows, names = (row_scores_R, expert_offset_E1, token_of_row_R), (activation, glu_layout)
    check_experts("experts", x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, *rows, *names)
    check_maps("experts", token_of_row_R, row_by_token_R, token_offset_T1)
    request = _request(
        "experts", x_TD, w2_EDN, row_count(x_TD, token_of_row_R), x_TD.shape[1], w2_EDN.shape[2], activation
    )
    if dispatch.has_kernel(request, backend):
        return dispatch.run(request, backend, x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, *rows, *names, need_h)
    h_RU, a_RN = up_proj(x_TD, w1_EUD, b1_EU, token_of_row_R, expert_offset_E1, activation, glu_layout, need_h, backend)
    if token_of_row_R is None:
        return down_proj(a_RN, w2_EDN, b2_ED, row_scores_R, expert_offset_E1, backend), h_RU
    y_RD = down_proj(a_RN, w2_EDN, b2_ED, None, expert_offset_E1, backend)
    del a_RN
    return combine(y_RD, row_scores_R, row_by_token_R, token_offset_T1, None, backend), h_RU


@experts.register_fake
def _(
    x_TD,
    w1_EUD,
    w2_EDN,
    b1_EU,
    b2_ED,
    row_scores_R,
    expert_offset_E1,
    token_of_row_R,
    row_by_token_R,
    token_offset_T1,
    activation,
    glu_layout,
    need_h=True,
    backend=None,
):
    rows, names = (row_scores_R, expert_offset_E1, token_of_row_R), (activation, glu_layout)
    check_experts("experts", x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, *rows, *names)
    check_maps("experts", token_of_row_R, row_by_token_R, token_offset_T1)
    num_rows = row_count(x_TD, token_of_row_R)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(num_rows if need_h else 0, w1_EUD.shape[1])


@torch.library.custom_op("sonic::experts_bwd", mutates_args=("main_grad_w1_EUD", "main_grad_w2_EDN"))
def experts_bwd(
    dout_TD: Tensor,
    x_TD: Tensor,
    h_RU: Optional[Tensor],
    w1_EUD: Tensor,
    w2_EDN: Tensor,
    b1_EU: Optional[Tensor],
    b2_ED: Optional[Tensor],
    row_scores_R: Optional[Tensor],
    expert_offset_E1: Tensor,
    token_of_row_R: Optional[Tensor],
    activation: str,
    glu_layout: str,
    need_dx: bool = True,
    need_dw1: bool = True,
    need_dw2: bool = True,
    need_db1: bool = False,
    need_db2: bool = False,
    need_dscores: bool = True,
    slot_of_row_R: Optional[Tensor] = None,
    main_grad_w1_EUD: Optional[Tensor] = None,
    main_grad_w2_EDN: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole backward of the experts: the four backward GEMM ops and :func:`combine`, or the backend's own pass.

    Args:
        dout_TD: gradient of :func:`experts`' output.
        h_RU: what :func:`experts` returned; None: computed again from X, 2 R D U FLOP.
        need_dx, need_dw1, need_dw2, need_db1, need_db2, need_dscores: which gradients to compute.
        slot_of_row_R: int32, of a plan whose slots come token by token, K each: spares a sort. None: any plan.
        main_grad_w1_EUD, main_grad_w2_EDN: as in :func:`up_proj_bwd_weight` and :func:`down_proj_bwd_weight`.
        x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, row_scores_R, expert_offset_E1, token_of_row_R, activation, glu_layout,
            backend: as in :func:`experts`.

    Returns:
        dx_TD, dw1_EUD, dw2_EDN, db1_EU, db2_ED, dscores_R: empty in the first dimension where it was not needed; dS per
        row, in at least float32.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit; no backend can serve.
    """
    op = "experts_bwd"
    rows, names = (row_scores_R, expert_offset_E1, token_of_row_R), (activation, glu_layout)
    check_experts(op, x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, *rows, *names)
    check_experts_bwd(dout_TD, x_TD, h_RU, w1_EUD, token_of_row_R, slot_of_row_R)
    main_grads = (main_grad_w1_EUD, main_grad_w2_EDN)
    check_main_grad(op, "main_grad_w1_EUD", main_grad_w1_EUD, w1_EUD.shape, x_TD)
    check_main_grad(op, "main_grad_w2_EDN", main_grad_w2_EDN, w2_EDN.shape, x_TD)
    request = _request(op, x_TD, w2_EDN, row_count(x_TD, token_of_row_R), x_TD.shape[1], w2_EDN.shape[2], activation)
    if dispatch.has_kernel(request, backend):
        tensors = (dout_TD, x_TD, h_RU, w1_EUD, w2_EDN, b1_EU, b2_ED)
        gradients = (need_dx, need_dw1, need_dw2, need_db1, need_db2, need_dscores)
        return dispatch.run(request, backend, *tensors, *rows, *names, *gradients, *main_grads)
    if h_RU is None:
        h_RU, _ = up_proj(x_TD, w1_EUD, b1_EU, token_of_row_R, expert_offset_E1, activation, glu_layout, True, backend)
    needed = (need_dx or need_dw1 or need_db1, need_dscores)
    dh_RU, scaled_a_RN, dscores_R = down_proj_bwd_input(
        dout_TD, h_RU, w2_EDN, b2_ED, row_scores_R, token_of_row_R, expert_offset_E1, *names, *needed, backend
    )
    del h_RU
    dw2_EDN, db2_ED = w2_EDN.new_empty(0, *w2_EDN.shape[1:]), w2_EDN.new_empty(0, w2_EDN.shape[1])
    if need_dw2 or need_db2:
        dw2_EDN, db2_ED = down_proj_bwd_weight(
            dout_TD,
            scaled_a_RN,
            row_scores_R,
            token_of_row_R,
            expert_offset_E1,
            need_dw2,
            need_db2,
            main_grad_w2_EDN,
            backend,
        )
    del scaled_a_RN
    dw1_EUD, db1_EU = w1_EUD.new_empty(0, *w1_EUD.shape[1:]), w1_EUD.new_empty(0, w1_EUD.shape[1])
    if need_dw1 or need_db1:
        options = (need_dw1, need_db1, main_grad_w1_EUD, backend)
        dw1_EUD, db1_EU = up_proj_bwd_weight(dh_RU, x_TD, token_of_row_R, expert_offset_E1, *options)
    dx_TD = x_TD.new_empty(0, x_TD.shape[1])
    if need_dx:
        dx_TD = up_proj_bwd_input(dh_RU, w1_EUD, expert_offset_E1, backend)
        del dh_RU
        if token_of_row_R is not None:
            dx_TD = combine(dx_TD, None, *_rows_by_token(token_of_row_R, slot_of_row_R, x_TD.shape[0]), None, backend)
    return dx_TD, dw1_EUD, dw2_EDN, db1_EU, db2_ED, dscores_R


@experts_bwd.register_fake
def _(
    dout_TD,
    x_TD,
    h_RU,
    w1_EUD,
    w2_EDN,
    b1_EU,
    b2_ED,
    row_scores_R,
    expert_offset_E1,
    token_of_row_R,
    activation,
    glu_layout,
    need_dx=True,
    need_dw1=True,
    need_dw2=True,
    need_db1=False,
    need_db2=False,
    need_dscores=True,
    slot_of_row_R=None,
    main_grad_w1_EUD=None,
    main_grad_w2_EDN=None,
    backend=None,
):
    rows, names = (row_scores_R, expert_offset_E1, token_of_row_R), (activation, glu_layout)
    check_experts("experts_bwd", x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, *rows, *names)
    check_experts_bwd(dout_TD, x_TD, h_RU, w1_EUD, token_of_row_R, slot_of_row_R)

    check_main_grad("experts_bwd", "main_grad_w1_EUD", main_grad_w1_EUD, w1_EUD.shape, x_TD)
    check_main_grad("experts_bwd", "main_grad_w2_EDN", main_grad_w2_EDN, w2_EDN.shape, x_TD)

    def gradient(needed, like):
        return like.new_empty(like.shape[0] if needed else 0, *like.shape[1:])

    num_rows, num_experts = row_count(x_TD, token_of_row_R), w1_EUD.shape[0]
    return (
        gradient(need_dx, x_TD),
        gradient(need_dw1 and main_grad_w1_EUD is None, w1_EUD),
        gradient(need_dw2 and main_grad_w2_EDN is None, w2_EDN),
        x_TD.new_empty(num_experts if need_db1 else 0, w1_EUD.shape[1]),
        x_TD.new_empty(num_experts if need_db2 else 0, w2_EDN.shape[1]),
        x_TD.new_empty(num_rows if need_dscores else 0, dtype=torch.promote_types(x_TD.dtype, torch.float32)),
    )


@torch.library.custom_op("sonic::topk_softmax", mutates_args=())
def topk_softmax(
    logits_TE: Tensor,
    top_k: int,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    norm_topk_prob: bool = False,
    scaling_factor: float = 1.0,
    expert_bias_E: Optional[Tensor] = None,
    num_groups: int = 1,
    group_topk: int = 1,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose K experts per token, turn their logits into scores, and count the load, all in one pass.

    Chosen are the K largest *preferences*: the logits, unless a bias or groups are given. With a bias they are the
    probabilities (score function of the logits, softmax over all E) plus the bias; with groups alone the probabilities
    where ``score_function`` or ``pre_softmax`` make some, else the logits. With ``num_groups`` > 1 the experts are cut
    into that many equal runs, and only those of the ``group_topk`` best runs can be chosen; a run is as good as the sum
    of its ``max(1, K // group_topk)`` largest preferences. The bias chooses; it never enters the scores.

    Args:
        logits_TE: any floating dtype. -inf is an expert that a token cannot choose while there are others; a token with
            NaN or +inf gets NaN scores, and harms no other.
        top_k: K, at most E, and at most the experts of ``group_topk`` groups.
        score_function: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``, sqrt(log(1 + exp(logit))).
        pre_softmax: softmax over all E experts, then choose; else choose, then softmax over the K chosen. Softmax only.
        norm_topk_prob: divide the K scores by their sum.
        scaling_factor: multiplies the finished scores.
        expert_bias_E: float32 or the dtype of the scores.
        num_groups: divides E.
        group_topk: groups that a token may reach, at most ``num_groups``.
        backend: insist on a backend.

    Returns:
        scores_TK: float32 (float64 for float64 logits), largest preference first.
        expert_TK: int32.
        prob_TK: the chosen probabilities before normalisation and scaling, dtype of the scores; backward needs them.
        load_EC: int32, how often each expert was chosen in each of C - 1 runs of :func:`sonic.shapes.tokens_per_run`
            tokens, the last one shorter; the last column is zero. ``load_EC.sum(1)`` is the load (E,), and
            :func:`build_plan` need not count again.

    Cost: reads T E, writes 3 T K + E C values.

    Raises:
        ValueError: shapes, dtypes or names do not fit; no backend can serve.
    """
    check_topk(logits_TE, top_k, score_function, expert_bias_E, num_groups, group_topk)
    request = dispatch.request_of(
        "topk_softmax", logits_TE, num_rows=logits_TE.shape[0] * top_k, num_experts=logits_TE.shape[1]
    )
    options = (score_function, pre_softmax, norm_topk_prob, scaling_factor, expert_bias_E, num_groups, group_topk)
    return dispatch.run(request, backend, logits_TE, top_k, *options, tokens_per_run(top_k))


@topk_softmax.register_fake
def _(
    logits_TE,
    top_k,
    score_function="softmax",
    pre_softmax=False,
    norm_topk_prob=False,
    scaling_factor=1.0,
    expert_bias_E=None,
    num_groups=1,
    group_topk=1,
    backend=None,
):
    check_topk(logits_TE, top_k, score_function, expert_bias_E, num_groups, group_topk)
    size = (logits_TE.shape[0], top_k)
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    scores_TK = logits_TE.new_empty(size, dtype=dtype)
    load_EC = logits_TE.new_empty(logits_TE.shape[1], load_columns(size[0], top_k), dtype=torch.int32)
    return scores_TK, logits_TE.new_empty(size, dtype=torch.int32), torch.empty_like(scores_TK), load_EC


@torch.library.custom_op("sonic::topk_softmax_bwd", mutates_args=())
def topk_softmax_bwd(
    dscores_TK: Tensor,
    expert_TK: Tensor,
    prob_TK: Tensor,
    logits_TE: Optional[Tensor],
    num_experts: int,
    score_function: str = "softmax",
    norm_topk_prob: bool = False,
    scaling_factor: float = 1.0,
    backend: Optional[str] = None,
) -> Tensor:
    """Derivatives of the logits from those of the scores; experts that were not chosen get zero, unless softmax ran
    over all of them.

    Args:
        dscores_TK: gradient of the scores.
        expert_TK, prob_TK: from :func:`topk_softmax`.
        logits_TE: exactly where softmax ran over all experts (``pre_softmax`` without ``norm_topk_prob``); else None.
        num_experts: E.
        score_function, norm_topk_prob, scaling_factor: as given to :func:`topk_softmax`.
        backend: insist on a backend.

    Returns:
        dlogits_TE: dtype of the scores.

    Cost: reads 3 T K values (and T E logits), writes T E.

    Raises:
        ValueError: shapes, dtypes or names do not fit; no backend can serve.
    """
    options = (num_experts, score_function, norm_topk_prob, scaling_factor)
    check_topk_bwd(dscores_TK, expert_TK, prob_TK, logits_TE, *options[:3])
    request = dispatch.request_of(
        "topk_softmax_bwd", prob_TK, num_rows=prob_TK.shape[0] * prob_TK.shape[1], num_experts=num_experts
    )
    return dispatch.run(request, backend, dscores_TK, expert_TK, prob_TK, logits_TE, *options)


@topk_softmax_bwd.register_fake
def _(
    dscores_TK,
    expert_TK,
    prob_TK,
    logits_TE,
    num_experts,
    score_function="softmax",
    norm_topk_prob=False,
    scaling_factor=1.0,
    backend=None,
):
    check_topk_bwd(dscores_TK, expert_TK, prob_TK, logits_TE, num_experts, score_function, norm_topk_prob)
    return prob_TK.new_empty(prob_TK.shape[0], num_experts)


@torch.library.custom_op("sonic::best_of_columns", mutates_args=())
def best_of_columns(
    logits_TE: Tensor,
    shift_T: Optional[Tensor],
    num_wanted: Sequence[int],
    token_of_row_R: Optional[Tensor] = None,
    expert_offset_E1: Optional[Tensor] = None,
    row_by_token_R: Optional[Tensor] = None,
    token_offset_T1: Optional[Tensor] = None,
    allowed_TG: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """For each expert the tokens with the highest ``logits - shift`` in its column, rounded to the logits' dtype.

    Pairs of a plan are no candidates, nor are tokens outside an expert's group: they count as -inf, so that they come
    last, and only where fewer candidates than wanted are left. Among equal values the lowest token comes first.

    Args:
        logits_TE: any floating dtype, no NaN.
        shift_T: subtracted from each token's row, dtype of the logits. None: 0.
        num_wanted: per expert how many tokens, 0 to T.
        token_of_row_R, expert_offset_E1, row_by_token_R, token_offset_T1: int32, of a plan whose pairs are no
            candidates; all four or none.
        allowed_TG: bool; experts are G equal runs, and a token is a candidate of those runs only. None: of all.
        backend: insist on a backend.

    Returns:
        token_P, expert_P: int64, P the sum of ``num_wanted``; expert by expert, best token first.

    Cost: reads T E values, writes 16 P bytes. No table of T E entries is made.

    Raises:
        ValueError: shapes, dtypes, devices or counts do not fit; no backend can serve.
    """
    plan = (token_of_row_R, expert_offset_E1, row_by_token_R, token_offset_T1)
    check_best_of_columns(logits_TE, shift_T, num_wanted, plan, allowed_TG)
    request = dispatch.request_of(
        "best_of_columns", logits_TE, num_rows=sum(num_wanted), num_experts=logits_TE.shape[1]
    )
    return dispatch.run(request, backend, logits_TE, shift_T, num_wanted, *plan, allowed_TG)


@best_of_columns.register_fake
def _(
    logits_TE,
    shift_T,
    num_wanted,
    token_of_row_R=None,
    expert_offset_E1=None,
    row_by_token_R=None,
    token_offset_T1=None,
    allowed_TG=None,
    backend=None,
):
    plan = (token_of_row_R, expert_offset_E1, row_by_token_R, token_offset_T1)
    check_best_of_columns(logits_TE, shift_T, num_wanted, plan, allowed_TG)
    token_P = logits_TE.new_empty(sum(num_wanted), dtype=torch.int64)
    return token_P, torch.empty_like(token_P)


@torch.library.custom_op("sonic::build_plan", mutates_args=())
def build_plan(
    expert_of_slot_P: Tensor,
    token_of_slot_P: Optional[Tensor],
    num_tokens: int,
    num_experts: int,
    load_EC: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort slots by expert with a stable counting sort, so that tokens ascend within each expert; no host
    synchronisation.

    Args:
        expert_of_slot_P: integer, 0 <= expert < num_experts.
        token_of_slot_P: integer, 0 <= token < num_tokens, any order; None: slot p belongs to token p // (P // T), as in
            top-K.
        num_tokens: T.
        num_experts: E.
        load_EC: from the :func:`topk_softmax` that chose these experts, which saves a pass that counts them; without
            ``token_of_slot_P`` only. None: they are counted. A load of other experts is never followed out of an array.
        backend: insist on a backend.

    Returns:
        expert_offset_E1, token_of_row_R, slot_of_row_R, row_by_token_R, token_offset_T1: int32, see ``sonic.shapes``.

    Raises:
        ValueError: wrong shapes or dtypes; on a CPU also an index out of range, a token twice at one expert, or a
            load that is not theirs (an accelerator reports those as a device-side assertion, since looking would cost a
            synchronisation).
    """
    check_plan(expert_of_slot_P, token_of_slot_P, num_tokens, num_experts)
    run = _check_load(load_EC, expert_of_slot_P, token_of_slot_P, num_tokens, num_experts)
    request = dispatch.request_of(
        "build_plan", expert_of_slot_P, num_rows=expert_of_slot_P.shape[0], num_experts=num_experts
    )
    return dispatch.run(request, backend, expert_of_slot_P, token_of_slot_P, num_tokens, num_experts, load_EC, run)


@build_plan.register_fake
def _(expert_of_slot_P, token_of_slot_P, num_tokens, num_experts, load_EC=None, backend=None):
    check_plan(expert_of_slot_P, token_of_slot_P, num_tokens, num_experts)
    _check_load(load_EC, expert_of_slot_P, token_of_slot_P, num_tokens, num_experts)

    def index(size):
        return expert_of_slot_P.new_empty(size, dtype=torch.int32)

    slots = expert_of_slot_P.shape[0]
    return index(num_experts + 1), index(slots), index(slots), index(slots), index(num_tokens + 1)


def _check_load(load_EC, expert_of_slot_P, token_of_slot_P, num_tokens, num_experts):
    """Refuse a load of another shape than :func:`topk_softmax` returns; tokens per run, or 0 without a load."""
    if load_EC is None:
        return 0
    where = "sonic.build_plan"
    if token_of_slot_P is not None:
        raise argument_error(where, "load_EC", "a tensor", "None with token_of_slot_P")
    top_k = max(expert_of_slot_P.shape[0] // max(num_tokens, 1), 1)
    check_shape(where, "load_EC", load_EC, E=num_experts, C=load_columns(num_tokens, top_k))
    check_dtype(where, "load_EC", load_EC, (torch.int32,))
    check_same(where, ("expert_of_slot_P", expert_of_slot_P), (("load_EC", load_EC),), dtype=False)
    return tokens_per_run(top_k)


def _rows_by_token(token_of_row_R, slot_of_row_R, num_tokens):
    """``row_by_token_R`` and ``token_offset_T1`` of any plan, or from the slots of top-K; no synchronisation."""
    edges = torch.arange(num_tokens + 1, dtype=torch.int32, device=token_of_row_R.device)
    if slot_of_row_R is None:
        token_R, row_by_token_R = torch.sort(token_of_row_R, stable=True)
        return row_by_token_R.to(torch.int32), torch.searchsorted(token_R, edges, out_int32=True)
    num_rows = slot_of_row_R.shape[0]
    rows_R = torch.arange(num_rows, dtype=torch.int32, device=slot_of_row_R.device)
    row_by_token_R = torch.empty_like(slot_of_row_R).scatter_(0, slot_of_row_R.long(), rows_R)
    return row_by_token_R, edges * (num_rows // max(num_tokens, 1))


def _request(op, tensor, weight, num_rows, hidden_size, intermediate_size, activation=None):
    if activation is not None and op == "up_proj" and is_gated(activation):
        intermediate_size = intermediate_size // 2
    return dispatch.request_of(
        op,
        tensor,
        num_rows=num_rows,
        num_experts=weight.shape[0],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=activation,
    )


def tile_rows(tensor: Tensor, num_rows: int, num_experts: int, backend: str | None = None) -> int:
    """Row tile M that the up projection pads each expert to, on the device and dtype of ``tensor`` (T, D); 1: none.

    Raises:
        ValueError: no backend can serve.
    """
    request = dispatch.request_of(
        "up_proj", tensor, num_rows=num_rows, num_experts=num_experts, hidden_size=tensor.shape[1]
    )
    return dispatch.tile_rows(request, backend)
