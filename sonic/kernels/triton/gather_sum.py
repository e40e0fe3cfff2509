"""Gather-and-sum: each token's rows, weighted, in one fixed order, without atomics.

Reads R D values through the index and R scores, writes T D (and reads T D of a residual): bound by memory throughout,
with 2 R D FLOP to R D + T D values. One program per token and BLOCK_D columns; it takes BLOCK_ROWS of the token's rows
at a time, so that their loads are under way together, and sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sonic.kernels.triton.launch import launch

__all__ = ["combine"]

_MAX_BLOCK_D = 1024
_BLOCK_ROWS = 4


@triton.jit
def combine_kernel(
    y,
    scores,
    row_by_token,
    token_offset,
    residual,
    out,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = residual[t] + sum of scores[r] y[r] over the rows r of t."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < WIDTH
    start, stop = tl.load(token_offset + token), tl.load(token_offset + token + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if residual is not None:
        total += tl.load(residual + token * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)
    for visit0 in tl.range(start, stop, BLOCK_ROWS):
        visit = visit0 + tl.arange(0, BLOCK_ROWS)
        is_visit = visit < stop
        row = tl.load(row_by_token + visit, mask=is_visit, other=0).to(tl.int64)
        at = y + row[:, None] * WIDTH + column[None, :]
        rows = tl.load(at, mask=is_visit[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        if scores is not None:
            rows *= tl.load(scores + row, mask=is_visit, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(rows, axis=0)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=is_column)


def combine(
    y_RD: Tensor,
    row_scores_R: Tensor | None,
    row_by_token_R: Tensor,
    token_offset_T1: Tensor,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """Sum the rows of each token; see ``sonic.kernels.ops.combine``."""
    num_tokens, width = token_offset_T1.shape[0] - 1, y_RD.shape[1]
    out_TD = y_RD.new_empty(num_tokens, width)
    block = min(_MAX_BLOCK_D, triton.next_power_of_2(width))
    launch(
        combine_kernel,
        (num_tokens, triton.cdiv(width, block)),
        y_RD.contiguous(),
        None if row_scores_R is None else row_scores_R.contiguous(),
        row_by_token_R.contiguous(),
        token_offset_T1.contiguous(),
        None if residual_TD is None else residual_TD.contiguous(),
        out_TD,
        label="combine",
        num_warps=max(1, min(8, block * y_RD.element_size() // 512)),
        WIDTH=width,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_D=block,
    )
    return out_TD
