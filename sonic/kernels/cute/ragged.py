"""Tensors for TMA whose rows may begin and end anywhere: one descriptor serves all experts.

The row coordinate starts as many rows before the end of a dimension of 2**30 rows as there are, so that the hardware's
own bounds end where the expert's rows do, whatever follows them in memory; two more dimensions bring the address back:
2**30 (row stride + second stride) values are a multiple of 2**64 bytes, by which addresses wrap. (The method of
Triton's ragged descriptors.)
"""

from __future__ import annotations

from cutlass import Int32, cute

__all__ = ["ragged", "ragged_at"]

_FAR = 2**30
_FURTHER = 2**31 - 1
_WRAP = 2**64 // _FAR


@cute.jit
def ragged(matrix: cute.Tensor, parts: int = 1) -> cute.Tensor:
    """A (rows, columns) matrix, columns contiguous, as (rows, columns / parts, parts, …); see :func:`ragged_at`."""
    row = matrix.stride[0]
    columns = matrix.shape[1] // parts
    return cute.make_tensor(
        matrix.iterator,
        cute.make_layout((_FAR, columns, parts, _FURTHER, _FURTHER), stride=(row, 1, columns, _WRAP - row, row)),
    )


@cute.jit
def ragged_at(tensor: cute.Tensor, begin: Int32, end: Int32) -> cute.Tensor:
    """(rows, columns / parts, parts) of a tensor by :func:`ragged`: its row 0 is ``begin``, it ends before ``end``."""
    left = end - begin
    return cute.domain_offset((_FAR - left, 0, 0), tensor[None, None, None, _FAR, end])
