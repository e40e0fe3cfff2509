"""The six grouped GEMMs over rows sorted by expert, in plain torch.

Every op walks the experts that have rows, in blocks of rows small enough for a core's cache: gather (or view) the rows
of a block, multiply into the block's place in the output, finish the tail (activation, derivative, score, bias) while
the block is in cache. Nothing of the size of a gathered X or dO ever exists, and no table over tokens and experts.

Which resource bounds it: the matrix multiplies of one expert (2 * rows * D * U FLOP on rows * D + D * U operands) are
bound by compute from some tens of rows on; all else is memory traffic, so passes over memory are what this file saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.kernels.reference.activation import activate, activate_bwd, is_gated
from sonic.kernels.reference.blocks import Block, ExpertSums

__all__ = [
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
]


def up_proj(
    x_TD: Tensor,
    w1_EUD: Tensor,
    b1_EU: Tensor | None,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    activation: str,
    glu_layout: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """H = gather(X) W1[e]^T (+ b1[e]) and A = act(H); see ``sonic.kernels.ops.up_proj``."""
    num_experts, width_u, width_d = w1_EUD.shape
    num_rows = _num_rows(x_TD, token_of_row_R)
    width_n = width_u // 2 if is_gated(activation) else width_u
    a_RN = x_TD.new_empty(num_rows, width_n)
    h_RU = x_TD.new_empty(num_rows if need_h else 0, width_u)
    block = Block(x_TD, width_d + width_u + width_n)
    weights = block.weights(w1_EUD)
    in_place = need_h and block.dtype == x_TD.dtype
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        x_rD = block.rows(x_TD, token_of_row_R, start, stop)
        h_rU = h_RU[start:stop] if in_place else block.buffer("h", stop - start, width_u)
        block.project(x_rD, weights[expert], b1_EU, expert, h_rU)
        if need_h and not in_place:
            h_RU[start:stop] = h_rU
        a_rN = block.output("a", a_RN, start, stop)
        activate(activation, glu_layout, h_rU, a_rN)
        block.store(a_rN, a_RN, start, stop)
    return h_RU, a_RN


def down_proj(
    a_RN: Tensor, w2_EDN: Tensor, b2_ED: Tensor | None, row_scores_R: Tensor | None, expert_offset_E1: Tensor
) -> Tensor:
    """Y = A W2[e]^T (+ b2[e]), times the row's score if given; see ``sonic.kernels.ops.down_proj``."""
    num_experts, width_d, width_n = w2_EDN.shape
    y_RD = a_RN.new_empty(a_RN.shape[0], width_d)
    block = Block(a_RN, width_d + width_n)
    weights = block.weights(w2_EDN)
    for expert, start, stop in block.spans(expert_offset_E1, a_RN.shape[0], num_experts, y_RD):
        a_rN = block.rows(a_RN, None, start, stop)
        y_rD = block.output("y", y_RD, start, stop)
        block.project(a_rN, weights[expert], b2_ED, expert, y_rD)
        if row_scores_R is not None:
            y_rD *= block.column(row_scores_R, start, stop)
        block.store(y_rD, y_RD, start, stop)
    return y_RD


def down_proj_bwd_input(
    dout_TD: Tensor,
    h_RU: Tensor,
    w2_EDN: Tensor,
    b2_ED: Tensor | None,
    row_scores_R: Tensor | None,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    activation: str,
    glu_layout: str,
    need_dh: bool,
    need_dscores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, score * A and dS from dO and H; see ``sonic.kernels.ops.down_proj_bwd_input``."""
    num_experts, width_d, width_n = w2_EDN.shape
    num_rows, width_u = h_RU.shape
    dh_RU = h_RU.new_empty(num_rows if need_dh else 0, width_u)
    scaled_a_RN = h_RU.new_empty(num_rows, width_n)
    scores_dtype = torch.promote_types(h_RU.dtype, torch.float32)
    dscores_R = h_RU.new_zeros(num_rows if need_dscores else 0, dtype=scores_dtype)
    block = Block(dout_TD, width_d + 2 * width_u + 3 * width_n)
    weights = block.weights(w2_EDN)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts, dh_RU if need_dh else None):
        dout_rD = block.rows(dout_TD, token_of_row_R, start, stop)
        da_rN = block.buffer("da", stop - start, width_n)
        torch.mm(dout_rD, weights[expert], out=da_rN)
        dscores_r = dscores_R[start:stop] if need_dscores else None
        if dscores_r is not None and b2_ED is not None:
            dscores_r += torch.mv(dout_rD, b2_ED[expert].to(block.dtype))
        a_rN = block.output("a", scaled_a_RN, start, stop)
        dh_rU = block.output("dh", dh_RU, start, stop) if need_dh else None
        activate_bwd(
            activation,
            glu_layout,
            block.widened("h", h_RU[start:stop]),
            da_rN,
            None if row_scores_R is None else block.column(row_scores_R, start, stop),
            a_rN,
            dh_rU,
            dscores_r,
        )
        block.store(a_rN, scaled_a_RN, start, stop)
        if dh_rU is not None:
            block.store(dh_rU, dh_RU, start, stop)
    return dh_RU, scaled_a_RN, dscores_R


def up_proj_bwd_input(dh_RU: Tensor, w1_EUD: Tensor, expert_offset_E1: Tensor) -> Tensor:
    """dX rows = dH W1[e]; see ``sonic.kernels.ops.up_proj_bwd_input``."""
    num_experts, width_u, width_d = w1_EUD.shape
    dx_RD = dh_RU.new_empty(dh_RU.shape[0], width_d)
    block = Block(dh_RU, width_u + width_d)
    weights = block.weights(w1_EUD)
    for expert, start, stop in block.spans(expert_offset_E1, dh_RU.shape[0], num_experts, dx_RD):
        dx_rD = block.output("dx", dx_RD, start, stop)
        torch.mm(block.rows(dh_RU, None, start, stop), weights[expert], out=dx_rD)
        block.store(dx_rD, dx_RD, start, stop)
    return dx_RD


def down_proj_bwd_weight(
    dout_TD: Tensor,
    scaled_a_RN: Tensor,
    row_scores_R: Tensor | None,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    need_weight: bool,
    need_bias: bool,
    main_grad_EDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dW2[e] = sum over rows of dO (x) (score A), db2[e] = sum of score dO.

    See ``sonic.kernels.ops.down_proj_bwd_weight``.
    """
    num_rows, width_n = scaled_a_RN.shape
    num_experts, width_d = expert_offset_E1.shape[0] - 1, dout_TD.shape[1]
    sums = ExpertSums(dout_TD, torch.Size((num_experts, width_d, width_n)), need_weight, need_bias, main_grad_EDN)
    block = Block(dout_TD, width_d + width_n, contraction=True)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        dout_rD = block.rows(dout_TD, token_of_row_R, start, stop)
        if need_weight:
            sums.add_weight(expert, dout_rD.t(), block.widened("a", scaled_a_RN[start:stop]))
        if need_bias:
            sums.add_bias(expert, dout_rD, None if row_scores_R is None else row_scores_R[start:stop, None])
    return sums.finish()


def up_proj_bwd_weight(
    dh_RU: Tensor,
    x_TD: Tensor,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    need_weight: bool,
    need_bias: bool,
    main_grad_EUD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dW1[e] = sum over rows of dH (x) X, db1[e] = sum of dH; see ``sonic.kernels.ops.up_proj_bwd_weight``."""
    num_rows, width_u = dh_RU.shape
    num_experts, width_d = expert_offset_E1.shape[0] - 1, x_TD.shape[1]
    sums = ExpertSums(x_TD, torch.Size((num_experts, width_u, width_d)), need_weight, need_bias, main_grad_EUD)
    block = Block(x_TD, width_d + width_u, contraction=True)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        dh_rU = block.widened("dh", dh_RU[start:stop])
        if need_weight:
            sums.add_weight(expert, dh_rU.t(), block.rows(x_TD, token_of_row_R, start, stop))
        if need_bias:
            sums.add_bias(expert, dh_rU)
    return sums.finish()


def _num_rows(x_TD: Tensor, token_of_row_R: Tensor | None) -> int:
    return x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]
