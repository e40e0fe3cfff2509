"""Every op as its formula in float64, one expert at a time; no line of ``sonic`` runs here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.helpers import formula
from tests.robustness.cases import Case, Routed


def spans(routed: Routed) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows) of every expert."""
    for expert in range(routed.offset_E1.shape[0] - 1):
        yield expert, torch.nonzero(routed.expert_R == expert)[:, 0]


def _zeros(rows: Tensor, *shape: int) -> Tensor:
    return rows.new_zeros(shape, dtype=torch.float64)


def up_proj(case: Case, routed: Routed, x: Tensor, w1: Tensor, b1: Tensor | None) -> dict[str, Tensor]:
    h = _zeros(x, routed.num_rows, case.U)
    for expert, rows in spans(routed):
        h[rows] = x[routed.token_R[rows]].double() @ w1[expert].double().t()
        if b1 is not None:
            h[rows] += b1[expert].double()
    return {"h": h, "a": formula(case.activation, case.glu_layout, h)}


def down_proj(routed: Routed, a: Tensor, w2: Tensor, b2: Tensor | None, scores: Tensor | None) -> dict[str, Tensor]:
    y = _zeros(a, routed.num_rows, w2.shape[1])
    for expert, rows in spans(routed):
        y[rows] = a[rows].double() @ w2[expert].double().t()
        if b2 is not None:
            y[rows] += b2[expert].double()
        if scores is not None:
            y[rows] *= scores[rows, None].double()
    return {"y": y}


def combine(routed: Routed, y: Tensor, scores: Tensor | None, residual: Tensor | None) -> dict[str, Tensor]:
    out = _zeros(y, routed.num_tokens, y.shape[1]) if residual is None else residual.double().clone()
    for row, token in enumerate(routed.token_R.tolist()):
        out[token] += y[row].double() * (1.0 if scores is None else scores[row].double())
    return {"out": out}


def down_proj_bwd_input(
    case: Case, routed: Routed, dout: Tensor, h: Tensor, w2: Tensor, b2: Tensor | None, scores: Tensor | None
) -> dict[str, Tensor]:
    with torch.enable_grad():
        h64 = h.detach().double().requires_grad_()
        a = formula(case.activation, case.glu_layout, h64)
        da, dscores = torch.zeros_like(a), _zeros(h, routed.num_rows)
        for expert, rows in spans(routed):
            dout_r = dout[routed.token_R[rows]].double()
            da[rows] = dout_r @ w2[expert].double()
            dscores[rows] = (da[rows] * a[rows].detach()).sum(1)
            if b2 is not None:
                dscores[rows] += dout_r @ b2[expert].double()
        s = torch.ones(routed.num_rows, 1).double() if scores is None else scores[:, None].double()
        (dh,) = torch.autograd.grad(a, h64, s * da)
    return {"dh": dh, "scaled_a": s * a.detach(), "dscores": dscores}


def down_proj_bwd_weight(routed: Routed, dout: Tensor, scaled_a: Tensor, scores: Tensor | None) -> dict[str, Tensor]:
    experts = routed.offset_E1.shape[0] - 1
    dw2, db2 = _zeros(dout, experts, dout.shape[1], scaled_a.shape[1]), _zeros(dout, experts, dout.shape[1])
    for expert, rows in spans(routed):
        dout_r = dout[routed.token_R[rows]].double()
        dw2[expert] = dout_r.t() @ scaled_a[rows].double()
        db2[expert] = (dout_r if scores is None else dout_r * scores[rows, None].double()).sum(0)
    return {"dw2": dw2, "db2": db2}


def up_proj_bwd_input(routed: Routed, dh: Tensor, w1: Tensor) -> dict[str, Tensor]:
    dx = _zeros(dh, routed.num_rows, w1.shape[2])
    for expert, rows in spans(routed):
        dx[rows] = dh[rows].double() @ w1[expert].double()
    return {"dx": dx}


def up_proj_bwd_weight(routed: Routed, dh: Tensor, x: Tensor) -> dict[str, Tensor]:
    experts = routed.offset_E1.shape[0] - 1
    dw1, db1 = _zeros(dh, experts, dh.shape[1], x.shape[1]), _zeros(dh, experts, dh.shape[1])
    for expert, rows in spans(routed):
        dw1[expert] = dh[rows].double().t() @ x[routed.token_R[rows]].double()
        db1[expert] = dh[rows].double().sum(0)
    return {"dw1": dw1, "db1": db1}


def mlp(
    case: Case,
    routed: Routed,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    scores_R: Tensor | None,
) -> Tensor:
    """The whole layer, differentiable, in float64: the sums of the tokens."""
    out = x.new_zeros(routed.num_tokens, x.shape[1])
    for expert, rows in spans(routed):
        token = routed.token_R[rows]
        h = x[token] @ w1[expert].t()
        h = h if b1 is None else h + b1[expert]
        y = formula(case.activation, case.glu_layout, h) @ w2[expert].t()
        y = y if b2 is None else y + b2[expert]
        out = out.index_add(0, token, y if scores_R is None else y * scores_R[rows, None])
    return out


def topk_scores(
    logits: Tensor,
    expert_TK: Tensor,
    score_function: str,
    pre_softmax: bool,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> Tensor:
    """Scores of experts that were chosen, differentiable, in the dtype of the logits."""
    if score_function == "softmax":
        if pre_softmax:
            scores = torch.softmax(logits, 1).gather(1, expert_TK)
        else:
            scores = torch.softmax(logits.gather(1, expert_TK), 1)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(logits.gather(1, expert_TK))
    else:
        scores = torch.log1p(torch.exp(logits.gather(1, expert_TK))).sqrt()
    if norm_topk_prob:
        scores = scores / (scores.sum(1, keepdim=True) + (0.0 if score_function == "softmax" else 1e-20))
    return scores * scaling_factor
