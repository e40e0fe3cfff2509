"""The experts as autograd functions that keep as little as the mathematics allows.

What is kept between forward and backward, for T tokens of width D, R routed rows, U = 2N (gated) or N:

====================  =================  ===================================================  =======================
tensor                shape              bytes in bf16                                        kept
====================  =================  ===================================================  =======================
X                     (T, D)             2 T D                                                always (the caller's)
H, before activation  (R, U)             2 R U: 4 T K N with top-K and a gated activation     ``save="preactivation"``
scores                of the caller      4 R (float32)                                        always (the caller's)
slots of the rows     (R,) int32         4 R                                                  always (the plan's)
expert offsets        (E + 1,) int32     4 (E + 1)                                            always (the plan's)
tokens of the rows    (R,) int32         4 R                                                  plans from pairs only
weights, biases       parameters         none of their own                                    always
====================  =================  ===================================================  =======================

Nothing else: no gathered copy of X or dO, no A, no Y, no table over (T, E); the plan's other maps follow from these. At
fixed K * N the large terms do not depend on how fine the experts are. ``save="input"`` drops H and computes it again:
4 R D N FLOP more (+22% of the 18 R D N of a gated layer).

Backward (SonicMoE, arXiv:2512.14080, algorithms 3 and 5), as the ops of :mod:`sonic.kernels.ops`::

    dA' = dO[t] W2[e];  A again from H;  dS = <dA', A>;  dH = act'(H) s dA'      down_proj_bwd_input
    dW2[e] = sum dO[t] (x) s A;  db2[e] = sum s dO[t]                             down_proj_bwd_weight
    dX rows = dH W1[e]                                                            up_proj_bwd_input
    dW1[e] = sum dH (x) X[t];  db1[e] = sum dH                                    up_proj_bwd_weight
    dX_t = sum of its rows                                                        combine
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonic.autograd import autocast_dtype, refuse_double_backward
from sonic.kernels import ops
from sonic.routing.plan import RoutingPlan
from sonic.shapes import argument_error, check_choice, check_dtype, check_integer, check_same, check_shape

__all__ = ["SAVE_MODES", "check_options", "check_scores", "expert_mlp", "moe_mlp", "up_rows"]

SAVE_MODES = ("preactivation", "input")


def check_options(
    where: str, activation: str, glu_layout: str, save: str, backend: str | None, dtype: torch.dtype | None = None
) -> None:
    """Refuse options of :func:`moe_mlp` that are no such names, and a ``dtype`` that it does not serve.

    Raises:
        ValueError: ``where``, the option, what it was, and the names there are.
    """
    check_choice(where, "activation", activation, ops.ACTIVATIONS)
    check_choice(where, "glu_layout", glu_layout, ops.GLU_LAYOUTS)
    check_choice(where, "save", save, SAVE_MODES)
    ops.check_backend(where, backend)
    if dtype is not None:
        ops.check_float_dtype(where, "dtype", dtype)


def check_scores(where: str, argument: str, scores: Tensor, plan: RoutingPlan) -> None:
    """Refuse scores that are not of the shape that ``plan`` was built from, or of no floating dtype.

    Raises:
        ValueError: naming ``argument``.
    """
    dims = zip("TK" if len(plan.scores_shape) == 2 else "P", plan.scores_shape, strict=True)
    check_shape(where, argument, scores, **dict(dims))
    check_dtype(where, argument, scores, ops.FLOAT_DTYPES)


def up_rows(intermediate_size: int, activation: str) -> int:
    """U, the rows of one expert's up projection: 2N for a gated activation (gate and up), else N."""
    return 2 * intermediate_size if ops.is_gated(activation) else intermediate_size


def moe_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scores: Tensor,
    plan: RoutingPlan,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    save: str = "preactivation",
    backend: str | None = None,
) -> Tensor:
    """Send each token through its experts and sum what they return.

    ``out[t] = sum of score * (W2[e] act(W1[e] x[t] + b1[e]) + b2[e])`` over the experts e of token t.

    Differentiable once in ``x``, ``w1``, ``w2``, ``scores``, ``b1`` and ``b2``; only the gradients that are asked for
    are computed. Under autocast, tokens, weights and biases are cast to its dtype as for ``nn.Linear``.

    Args:
        x: (T, D), bf16, fp16, fp32 or fp64. T may be 0.
        w1: (E, U, D) of the dtype of ``x``, U = 2N (gated) or N; E, D and N are at least 1.
        w2: (E, D, N).
        scores: of the shape that ``plan`` was built from, (T, K) or (P,); any floating dtype, float32 is usual.
        plan: who goes where.
        b1: (E, U) or None.
        b2: (E, D) or None.
        activation: a name in ``sonic.ACTIVATIONS``.
        glu_layout: ``"concatenated"``: gate rows of ``w1`` first, then up rows; ``"interleaved"``: g0 u0 g1 u1 …
        save: what backward keeps: ``"preactivation"`` (X and H) or ``"input"`` (X).
        backend: a backend's name to insist on; None chooses.

    Returns:
        (T, D), dtype and device of ``x``.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit; no backend can serve.
        RuntimeError: from backward, when the gradient is differentiated again.
    """
    where = "sonic.moe_mlp"
    check_options(where, activation, glu_layout, save, backend)
    if not isinstance(plan, RoutingPlan):
        raise argument_error(where, "plan", f"a {type(plan).__name__}", "a sonic.RoutingPlan")
    check_shape(where, "x", x, T=plan.num_tokens, D=None)
    ops.check_row_count(where, "x", x)
    ops.check_row_count(where, "plan.token_of_row_R", plan.token_of_row_R)
    check_scores(where, "scores", scores, plan)
    check_same(where, ("x", x), (("scores", scores), ("plan", plan.token_of_row_R)), dtype=False)
    x, w1, w2, b1, b2 = _autocast(x, w1, w2, b1, b2)
    _check_experts(where, "x", x, w1, w2, b1, b2, plan.num_experts, activation)
    out: Tensor = _Experts.apply(
        x,
        w1,
        w2,
        b1,
        b2,
        scores,
        plan.expert_offset_E1,
        plan.token_of_row_R,
        plan.slot_of_row_R,
        plan.row_by_token_R,
        plan.token_offset_T1,
        plan.top_k,
        activation,
        glu_layout,
        save == "preactivation" and torch.is_grad_enabled(),
        backend,
    )
    return out


def expert_mlp(
    rows: Tensor,
    w1: Tensor,
    w2: Tensor,
    tokens_per_expert: Tensor,
    row_scores: Tensor | None = None,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    save: str = "preactivation",
    backend: str | None = None,
) -> Tensor:
    """Apply experts to rows that are already grouped by expert.

    ``out[r] = score[r] * (W2[e] act(W1[e] rows[r] + b1[e]) + b2[e])`` with the expert e of row r.

    The entry for a caller that dispatches tokens itself, such as expert parallelism. Differentiable once in ``rows``,
    ``w1``, ``w2``, ``row_scores``, ``b1`` and ``b2``. Kept for backward: ``rows`` and H.

    Args:
        rows: (R, D), R may be 0. Rows beyond the sum of ``tokens_per_expert`` (a capacity layout) belong to nobody:
            they give zeros and get zero gradients.
        w1: (E, U, D).
        w2: (E, D, N).
        tokens_per_expert: (E,) integer, on the device of ``rows``, or on the CPU (moved without waiting).
        row_scores: (R,) or None for 1; any floating dtype.
        b1, b2, activation, glu_layout, save, backend: as in :func:`moe_mlp`.

    Returns:
        (R, D), dtype and device of ``rows``.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit; counts that are negative or sum to more than R; no
            backend can serve.
        RuntimeError: from backward, when the gradient is differentiated again.
    """
    where = "sonic.expert_mlp"
    check_options(where, activation, glu_layout, save, backend)
    check_shape(where, "rows", rows, R=None, D=None)
    ops.check_row_count(where, "rows", rows)
    check_integer(where, "tokens_per_expert", tokens_per_expert)
    check_shape(where, "tokens_per_expert", tokens_per_expert, E=None)
    num_experts = tokens_per_expert.shape[0]
    if row_scores is not None:
        check_shape(where, "row_scores", row_scores, R=rows.shape[0])
        check_dtype(where, "row_scores", row_scores, ops.FLOAT_DTYPES)
        check_same(where, ("rows", rows), (("row_scores", row_scores),), dtype=False)
    rows, w1, w2, b1, b2 = _autocast(rows, w1, w2, b1, b2)
    _check_experts(where, "rows", rows, w1, w2, b1, b2, num_experts, activation)
    expert_offset_E1 = _offsets(where, tokens_per_expert, rows)
    out: Tensor = _Experts.apply(
        rows,
        w1,
        w2,
        b1,
        b2,
        row_scores,
        expert_offset_E1,
        None,
        None,
        None,
        None,
        None,
        activation,
        glu_layout,
        save == "preactivation" and torch.is_grad_enabled(),
        backend,
    )
    return out


class _Experts(torch.autograd.Function):
    """Both entries: the maps of a plan, or rows that stand in order (all four None, ``scores`` per row or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w1_EUD: Tensor,
        w2_EDN: Tensor,
        b1_EU: Tensor | None,
        b2_ED: Tensor | None,
        scores: Tensor | None,
        expert_offset_E1: Tensor,
        token_of_row_R: Tensor | None,
        slot_of_row_R: Tensor | None,
        row_by_token_R: Tensor | None,
        token_offset_T1: Tensor | None,
        top_k: int | None,
        activation: str,
        glu_layout: str,
        may_keep_h: bool,
        backend: str | None,
    ) -> Tensor:
        keep_h = may_keep_h and any(ctx.needs_input_grad[:6])
        out, h_RU = ops.experts(
            x_TD.contiguous(),
            w1_EUD.contiguous(),
            w2_EDN.contiguous(),
            b1_EU,
            b2_ED,
            _row_scores(scores, slot_of_row_R),
            expert_offset_E1,
            token_of_row_R,
            row_by_token_R,
            token_offset_T1,
            activation,
            glu_layout,
            keep_h,
            backend,
        )
        ctx.options = (activation, glu_layout, backend)
        ctx.top_k = top_k
        ctx.where = "sonic.expert_mlp" if token_of_row_R is None else "sonic.moe_mlp"
        ctx.save_for_backward(  # of strided views the views, not their copies
            x_TD,
            h_RU if keep_h else None,
            w1_EUD,
            w2_EDN,
            b1_EU,
            b2_ED,
            scores,
            expert_offset_E1,
            slot_of_row_R,
            token_of_row_R if top_k is None else None,
        )
        return out

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> Any:
        (
            x_TD,
            h_RU,
            w1_EUD,
            w2_EDN,
            b1_EU,
            b2_ED,
            scores,
            expert_offset_E1,
            slot_of_row_R,
            token_of_row_R,
        ) = ctx.saved_tensors
        activation, glu_layout, backend = ctx.options
        need_dx, need_dw1, need_dw2, need_db1, need_db2, need_dscores = ctx.needs_input_grad[:6]
        with torch.no_grad():
            if ctx.top_k is not None:
                token_of_row_R = slot_of_row_R // ctx.top_k
            dx_TD, dw1_EUD, dw2_EDN, db1_EU, db2_ED, dscores_R = ops.experts_bwd(
                dout_TD.contiguous(),
                x_TD.contiguous(),
                h_RU,
                w1_EUD.contiguous(),
                w2_EDN.contiguous(),
                b1_EU,
                b2_ED,
                _row_scores(scores, slot_of_row_R),
                expert_offset_E1,
                token_of_row_R,
                activation,
                glu_layout,
                need_dx,
                need_dw1,
                need_dw2,
                need_db1,
                need_db2,
                need_dscores,
                slot_of_row_R if ctx.top_k is not None else None,
                backend=backend,
            )
            grads: tuple[Tensor | None, ...] = (
                dx_TD if need_dx else None,
                dw1_EUD if need_dw1 else None,
                dw2_EDN if need_dw2 else None,
                db1_EU if need_db1 else None,
                db2_ED if need_db2 else None,
                _slot_gradient(dscores_R, scores, slot_of_row_R) if need_dscores else None,
            )
        grads = refuse_double_backward(ctx.where, grads, (dout_TD, x_TD, w1_EUD, w2_EDN, b1_EU, b2_ED, scores))
        # the five maps, then top_k, activation, glu_layout, may_keep_h, backend
        return (*grads, None, None, None, None, None, None, None, None, None, None)


def _row_scores(scores: Tensor | None, slot_of_row_R: Tensor | None) -> Tensor | None:
    """Scores in the order of the rows."""
    if scores is None or slot_of_row_R is None:
        return scores
    return scores.reshape(-1).index_select(0, slot_of_row_R)


def _slot_gradient(dscores_R: Tensor, scores: Tensor, slot_of_row_R: Tensor | None) -> Tensor:
    """The rows' score gradients back in the order, shape and dtype of the caller's scores."""
    if slot_of_row_R is None:
        return dscores_R.to(scores.dtype)
    dscores_P = dscores_R.new_zeros(scores.numel()).index_copy(0, slot_of_row_R.long(), dscores_R)
    return dscores_P.to(scores.dtype).reshape(scores.shape)


def _autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """Tokens, weights and biases in autocast's dtype where it is on; float64 stays, as with torch's own layers."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, *weights
    casts = (torch.bfloat16, torch.float16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in casts else t for t in (x, *weights))


def _check_experts(
    where: str,
    x_name: str,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    num_experts: int,
    activation: str,
) -> None:
    check_dtype(where, x_name, x, ops.FLOAT_DTYPES)
    check_shape(where, "w1", w1, E=num_experts, U=None, D=x.shape[1])
    if 0 in w1.shape:
        raise argument_error(where, "w1", tuple(w1.shape), "(E, U, D) with sizes of at least 1")
    gated = ops.is_gated(activation)
    width_u = w1.shape[1]
    if gated and width_u % 2:
        wanted = f"(E, U, D) with an even U: gate and up rows of {activation}"
        raise argument_error(where, "w1", tuple(w1.shape), wanted)
    check_shape(where, "w2", w2, E=num_experts, D=x.shape[1], N=width_u // 2 if gated else width_u)
    if b1 is not None:
        check_shape(where, "b1", b1, E=num_experts, U=width_u)
    if b2 is not None:
        check_shape(where, "b2", b2, E=num_experts, D=x.shape[1])
    check_same(where, (x_name, x), (("w1", w1), ("w2", w2), ("b1", b1), ("b2", b2)))


def _offsets(where: str, tokens_per_expert: Tensor, rows: Tensor) -> Tensor:
    """(E + 1,) int32 offsets on the device of ``rows``; counts that lie on the CPU are checked there."""
    num_rows = rows.shape[0]
    has_values = type(tokens_per_expert) is Tensor and not torch.compiler.is_compiling()  # no fake of a tracer
    if tokens_per_expert.device.type == "cpu":
        counts = tokens_per_expert.tolist() if has_values else []
        if any(count < 0 for count in counts) or sum(counts) > num_rows:
            wanted = f"counts >= 0 that sum to at most R = {num_rows}"
            raise argument_error(where, "tokens_per_expert", counts, wanted)
    elif tokens_per_expert.device != rows.device:
        raise argument_error(
            where, "tokens_per_expert", f"on {tokens_per_expert.device}", f"on {rows.device} like rows, or on the CPU"
        )
    count_E = tokens_per_expert.to(device=rows.device, dtype=torch.int64, non_blocking=True)
    return torch.nn.functional.pad(count_E.cumsum(0), (1, 0)).to(torch.int32)
