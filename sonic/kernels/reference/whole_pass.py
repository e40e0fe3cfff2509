"""The whole forward, and the whole backward, in one walk over the experts: what a CPU does best.

A block of rows is gathered, goes through both projections, and is added to its tokens while it is in cache; backward
does the same with dO, and contracts the block into the weight gradients on the way. A, Y, dH, s A and the rows of dX
exist for one block
at a time, so the only arrays of R rows are H (if it is kept) and dS. That saves 2 R (3 D + 3 N + U) values of memory
traffic, and the
page faults of fresh memory, which on a CPU cost more than the traffic.

Adding to tokens is deterministic: experts come in order, and no token comes twice within one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.kernels.reference.activation import activate, activate_bwd, is_gated
from sonic.kernels.reference.blocks import Block, ExpertSums

__all__ = ["experts", "experts_bwd"]


def experts(
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
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """O and H from X; see ``sonic.kernels.ops.experts``."""
    num_experts, width_u, width_d = w1_EUD.shape
    num_rows = x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]
    width_n = width_u // 2 if is_gated(activation) else width_u
    token_of_row_R = _long(token_of_row_R)
    h_RU = x_TD.new_empty(num_rows if need_h else 0, width_u)
    block = Block(x_TD, 2 * width_d + width_u + width_n)
    total = _TokenSums(x_TD, x_TD.shape[0], width_d, token_of_row_R, block)
    w1, w2 = block.weights(w1_EUD), block.weights(w2_EDN)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        h_rU = block.output("h", h_RU, start, stop) if need_h else block.buffer("h", stop - start, width_u)
        block.project(block.rows(x_TD, token_of_row_R, start, stop), w1[expert], b1_EU, expert, h_rU)
        if need_h:
            block.store(h_rU, h_RU, start, stop)
        a_rN = block.buffer("a", stop - start, width_n)
        activate(activation, glu_layout, h_rU, a_rN)
        scores_r1 = None if row_scores_R is None else row_scores_R[start:stop, None].to(total.factor_dtype)
        if scores_r1 is not None and b2_ED is None and not total.scales:
            a_rN *= scores_r1  # N values a row instead of D; the products are linear in it
        y_rD = block.buffer("y", stop - start, width_d)
        block.project(a_rN, w2[expert], b2_ED, expert, y_rD)
        if scores_r1 is not None and b2_ED is not None and not total.scales:
            y_rD *= scores_r1
        total.add(y_rD, start, stop, scores_r1 if total.scales else None)
    return total.finish(), h_RU


def experts_bwd(
    dout_TD: Tensor,
    x_TD: Tensor,
    h_RU: Tensor | None,
    w1_EUD: Tensor,
    w2_EDN: Tensor,
    b1_EU: Tensor | None,
    b2_ED: Tensor | None,
    row_scores_R: Tensor | None,
    expert_offset_E1: Tensor,
    token_of_row_R: Tensor | None,
    activation: str,
    glu_layout: str,
    need_dx: bool,
    need_dw1: bool,
    need_dw2: bool,
    need_db1: bool,
    need_db2: bool,
    need_dscores: bool,
    main_grad_w1_EUD: Tensor | None = None,
    main_grad_w2_EDN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dX, dW1, dW2, db1, db2 and dS from dO; see ``sonic.kernels.ops.experts_bwd``."""
    num_experts, width_u, width_d = w1_EUD.shape
    num_rows = x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]
    width_n = w2_EDN.shape[2]
    token_of_row_R = _long(token_of_row_R)
    need_dh = need_dx or need_dw1 or need_db1
    dscores_R = x_TD.new_zeros(num_rows if need_dscores else 0, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    sums1 = ExpertSums(x_TD, w1_EUD.shape, need_dw1, need_db1, main_grad_w1_EUD)
    sums2 = ExpertSums(x_TD, w2_EDN.shape, need_dw2, need_db2, main_grad_w2_EDN)
    block = Block(x_TD, 3 * width_d + 2 * width_u + 3 * width_n, contraction=need_dw1 or need_dw2)
    total = _TokenSums(x_TD, x_TD.shape[0] if need_dx else 0, width_d, token_of_row_R, block)
    w1, w2 = block.weights(w1_EUD), block.weights(w2_EDN)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        size = stop - start
        scores_r1 = None if row_scores_R is None else block.column(row_scores_R, start, stop)
        dout_rD = block.rows(dout_TD, token_of_row_R, start, stop, "dout")
        if need_dw1 or h_RU is None:
            x_rD = block.rows(x_TD, token_of_row_R, start, stop, "x")
        if h_RU is None:
            h_rU = block.buffer("h", size, width_u)
            block.project(x_rD, w1[expert], b1_EU, expert, h_rU)
        else:
            h_rU = block.widened("h", h_RU[start:stop])
        da_rN = torch.mm(dout_rD, w2[expert], out=block.buffer("da", size, width_n))
        dscores_r = dscores_R[start:stop] if need_dscores else None
        if dscores_r is not None and b2_ED is not None:
            dscores_r += torch.mv(dout_rD, b2_ED[expert].to(block.dtype))
        a_rN, dh_rU = block.buffer("a", size, width_n), block.buffer("dh", size, width_u)
        activate_bwd(activation, glu_layout, h_rU, da_rN, scores_r1, a_rN, dh_rU if need_dh else None, dscores_r)
        if need_dw2:
            sums2.add_weight(expert, dout_rD.t(), a_rN)
        if need_db2:
            sums2.add_bias(expert, dout_rD, None if row_scores_R is None else row_scores_R[start:stop, None])
        if need_dw1:
            sums1.add_weight(expert, dh_rU.t(), x_rD)
        if need_db1:
            sums1.add_bias(expert, dh_rU)
        if need_dx:
            total.add(torch.mm(dh_rU, w1[expert], out=block.buffer("dx", size, width_d)), start, stop)
    dw1_EUD, db1_EU = sums1.finish()
    dw2_EDN, db2_ED = sums2.finish()
    return total.finish(), dw1_EUD, dw2_EDN, db1_EU, db2_ED, dscores_R


class _TokenSums:
    """Rows added to their tokens, in at least float32, rounded once; without a map, row r simply is output row r.

    ``scales``: 16-bit rows become float32 on the way to their tokens, and there their scores cost least and round
    nothing; the scores are wanted in ``factor_dtype``.
    """

    def __init__(self, like: Tensor, num_tokens: int, width: int, token_of_row_R: Tensor | None, block: Block) -> None:
        self._block = block
        self._out_dtype = like.dtype
        self._token_of_row_R = token_of_row_R
        sum_dtype = like.dtype if token_of_row_R is None else torch.promote_types(like.dtype, torch.float32)
        self._sum_TD = torch.zeros(num_tokens, width, dtype=sum_dtype, device=like.device)
        self.scales = token_of_row_R is not None and sum_dtype != block.dtype
        self.factor_dtype = sum_dtype if self.scales else block.dtype

    def add(self, rows_rD: Tensor, start: int, stop: int, scores_r1: Tensor | None = None) -> None:
        """Add a block, the rows [start, stop); times their scores, which only a sum that ``scales`` may be given."""
        if self._token_of_row_R is None:
            self._sum_TD[start:stop] = rows_rD
            return
        if rows_rD.dtype != self._sum_TD.dtype:
            rows_rD = self._block.buffer("sum", rows_rD.shape[0], rows_rD.shape[1], self._sum_TD.dtype).copy_(rows_rD)
            if scores_r1 is not None:
                rows_rD *= scores_r1
        self._sum_TD.index_add_(0, self._token_of_row_R[start:stop], rows_rD)

    def finish(self) -> Tensor:
        """The sums, in the dtype of the tokens."""
        return self._sum_TD.to(self._out_dtype)


def _long(token_of_row_R: Tensor | None) -> Tensor | None:
    """Gathers and sums are faster with int64 indices."""
    return None if token_of_row_R is None else token_of_row_R.long()
