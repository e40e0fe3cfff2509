"""The gather-and-sum over the rows of each token, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sonic.shapes import argument_error

__all__ = ["combine"]


def combine(
    y_RD: Tensor,
    row_scores_R: Tensor | None,
    row_by_token_R: Tensor,
    token_offset_T1: Tensor,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """O_t = sum over the rows of t of score * Y (+ residual); see ``sonic.kernels.ops.combine``.

    ``embedding_bag`` reads each row once, sums in float32 for 16-bit rows, and writes each token once: 2 R D + 2 T D
    bytes in bf16.
    """
    num_tokens = token_offset_T1.shape[0] - 1
    if residual_TD is not None:  # in float32, so that the sum is rounded once
        wide = torch.promote_types(y_RD.dtype, torch.float32)
        total_TD = combine(y_RD.to(wide), row_scores_R, row_by_token_R, token_offset_T1)
        return total_TD.add_(residual_TD).to(y_RD.dtype)
    if num_tokens == 0 or row_by_token_R.shape[0] == 0 or y_RD.shape[1] == 0:
        return y_RD.new_zeros(num_tokens, y_RD.shape[1])
    if y_RD.device.type == "cpu":  # elsewhere looking would cost a synchronisation
        _refuse_wrong_offsets(token_offset_T1, row_by_token_R.shape[0])
    weights_R = None if row_scores_R is None else row_scores_R.to(y_RD.dtype).index_select(0, row_by_token_R)
    with torch.no_grad():
        return F.embedding_bag(
            row_by_token_R, y_RD, token_offset_T1, mode="sum", per_sample_weights=weights_R, include_last_offset=True
        )


def _refuse_wrong_offsets(token_offset_T1: Tensor, num_rows: int) -> None:
    """``embedding_bag`` itself does not notice offsets that fall, and adds the rows of other tokens."""
    falls = bool((token_offset_T1[1:] < token_offset_T1[:-1]).any())
    if falls or int(token_offset_T1[0]) != 0 or int(token_offset_T1[-1]) > num_rows:
        was = f"from {int(token_offset_T1[0])} to {int(token_offset_T1[-1])}" + (
            ", falling on the way" if falls else ""
        )
        wanted = f"0 first, then never falling, at most R = {num_rows}"
        raise argument_error("sonic.kernels.reference", "token_offset_T1", was, wanted)
