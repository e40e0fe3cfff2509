"""What the package ``scattermoe`` calls its kernels: one grouped product, its weight gradient, and sorting.

No gradient is taken through these; :func:`sonic.compat.scattermoe.parallel_linear` joins them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.kernels import ops
from sonic.shapes import argument_error, check_integer, check_positive, check_shape

__all__ = [
    "ALLOW_TF32",
    "BLOCK_M",
    "compileable_bincount",
    "flatten_and_sort",
    "group",
    "group_bwd_W",
    "padded_block_indices",
    "scatter2scatter",
]

BLOCK_M = 128
"""Default block of :func:`padded_block_indices`; kernels here choose their own."""

ALLOW_TF32 = False
"""Callers set it; nothing reads it. Float32 is exact unless ``torch.set_float32_matmul_precision`` allows TF32."""


def compileable_bincount(x: Tensor, minlength: int) -> Tensor:
    """How often each of 0 … ``minlength`` - 1 occurs in ``x`` (P,) integer: (minlength,) int64.

    Raises:
        ValueError: ``x`` is no integer vector, or ``minlength`` not positive. A value out of range is an index error of
            torch.
    """
    where = "scattermoe.kernels.ops.compileable_bincount"
    check_positive(where, minlength=minlength)
    check_integer(where, "x", x)
    check_shape(where, "x", x, P=None)
    index_P = x.long()
    return torch.zeros(minlength, dtype=torch.int64, device=x.device).scatter_add_(0, index_P, torch.ones_like(index_P))


def flatten_and_sort(expert_idxs: Tensor) -> tuple[Tensor, Tensor]:
    """Version 0.2: slots sorted by expert.

    Args:
        expert_idxs: integer, any shape.

    Returns:
        the experts in ascending order, and the slot (flat index) of each; equal experts keep the order of slots.

    Raises:
        ValueError: no integer tensor.
    """
    check_integer("scattermoe.kernels.ops.flatten_and_sort", "expert_idxs", expert_idxs)
    with torch.no_grad():
        sorted_expert_idxs, sorted_scattered_idxs = torch.sort(expert_idxs.flatten(), stable=True)
    return sorted_expert_idxs, sorted_scattered_idxs


def padded_block_indices(sorted_experts_idxs: Tensor, k: int, N_BLOCK_SIZE: int = BLOCK_M) -> tuple[Tensor, Tensor]:
    """Version 0.2: where the blocks of a grouped product begin, no block holding rows of two experts.

    Args:
        sorted_experts_idxs: (R,) integer, ascending.
        k: number of experts.
        N_BLOCK_SIZE: rows of a block.

    Returns:
        first row of each block, expert by expert, dtype of the indices; last row + 1 of each expert (E,) int64.
        The first has a length that depends on the values, so it waits for the device. Nothing here reads it: hand it to
        :func:`sonic.compat.scattermoe.parallel_linear`, which passes it over.

    Raises:
        ValueError: no integer vector, or sizes that are not positive.
    """
    where = "scattermoe.kernels.ops.padded_block_indices"
    check_positive(where, k=k, N_BLOCK_SIZE=N_BLOCK_SIZE)
    check_integer(where, "sorted_experts_idxs", sorted_experts_idxs)
    count_E = compileable_bincount(sorted_experts_idxs, k)
    end_E = count_E.cumsum(0)
    blocks_E = (count_E + (N_BLOCK_SIZE - 1)) // N_BLOCK_SIZE
    expert_B = torch.repeat_interleave(blocks_E)
    nth_B = torch.arange(expert_B.shape[0], device=expert_B.device) - (blocks_E.cumsum(0) - blocks_E)[expert_B]
    start_B = (end_E - count_E)[expert_B] + nth_B * N_BLOCK_SIZE
    return start_B.to(sorted_experts_idxs.dtype), end_E


def scatter2scatter(
    X: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    b: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The grouped product: row r in the order of the experts is ``x @ W[e] + b[e]``.

    Made of a gather (unless ``x_grouped``), :func:`sonic.kernels.ops.down_proj`, and a gather (unless ``y_grouped``).

    Args:
        X: (T, I); with ``x_grouped`` (R, I), rows in the order of the experts.
        W: (E, I, O), a view of a contiguous (E, O, I); memory in another order is copied.
        sorted_expert_idxs: (R,) integer, ascending.
        sorted_scattered_idxs: (R,) integer, row -> slot; slot p reads row ``p // k`` of X.
        k: slots per row of X.
        b: (E, O) or None.
        x_grouped: X stands in the order of the experts; ``k`` is 1.
        y_grouped: return rows in the order of the experts, else in that of the slots.
        out: (R, O), written and returned; None: a new tensor.

    Returns:
        (R, O), dtype of X.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    where = "scattermoe.kernels.ops.scatter2scatter"
    check_shape(where, "W", W, E=None, I=None, O=None)
    check_shape(where, "sorted_expert_idxs", sorted_expert_idxs, R=None)
    check_rows(where, "X", X, W, k, sorted_scattered_idxs, x_grouped)
    edges_E1 = torch.arange(W.shape[0] + 1, dtype=sorted_expert_idxs.dtype, device=X.device)
    expert_offset_E1 = torch.searchsorted(sorted_expert_idxs, edges_E1, out_int32=True)
    slot_R = sorted_scattered_idxs
    rows_RI = X if x_grouped else X.index_select(0, slot_R // k)
    y_RO = ops.down_proj(rows_RI.contiguous(), W.transpose(1, 2).contiguous(), b, None, expert_offset_E1)
    if out is None:
        return y_RO if y_grouped else y_RO.index_select(0, row_of_slot(slot_R))
    check_shape(where, "out", out, R=y_RO.shape[0], O=y_RO.shape[1])
    return out.copy_(y_RO) if y_grouped else out.index_copy_(0, slot_R.long(), y_RO)


def group(
    A: Tensor,
    sorted_expert_idxs: Tensor,
    coeff: Tensor | None = None,
    fan_out: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Rows in the order of the experts: ``A[p // fan_out] * coeff[p]`` for the slot p of each row.

    Args:
        A: (T, I).
        sorted_expert_idxs: (R,) integer, row -> slot (the name is theirs).
        coeff: (R,), by slot; None: 1.
        fan_out: slots per row of A.
        out: (R, I), written and returned; None: a new tensor.

    Raises:
        ValueError: shapes do not fit.
    """
    where = "scattermoe.kernels.ops.group"
    check_positive(where, fan_out=fan_out)
    check_shape(where, "A", A, T=None, I=None)
    check_shape(where, "sorted_expert_idxs", sorted_expert_idxs, R=A.shape[0] * fan_out)
    rows_RI = A.index_select(0, sorted_expert_idxs // fan_out)
    if coeff is not None:
        check_shape(where, "coeff", coeff, R=rows_RI.shape[0])
        rows_RI = (rows_RI * coeff.index_select(0, sorted_expert_idxs)[:, None]).to(A.dtype)
    return rows_RI if out is None else out.copy_(rows_RI)


def group_bwd_W(
    DY: Tensor, X: Tensor, expert_offsets: Tensor, E: int, has_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the weights: :func:`sonic.kernels.ops.up_proj_bwd_weight` on rows that stand in order.

    Args:
        DY: (R, O), rows in the order of the experts.
        X: (R, I), the same.
        expert_offsets: (E,) integer, last row + 1 of each expert.
        E: number of experts.
        has_bias: sum DY over each expert's rows too.

    Returns:
        (E, I, O), a view of (E, O, I); (E, O) or None.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    where = "scattermoe.kernels.ops.group_bwd_W"
    check_shape(where, "expert_offsets", expert_offsets, E=E)
    options = (None, with_zero(expert_offsets), True, has_bias)
    dw_EOI, db_EO = ops.up_proj_bwd_weight(DY.contiguous(), X.contiguous(), *options)
    return dw_EOI.transpose(1, 2), db_EO if has_bias else None


def check_rows(where: str, name: str, X: Tensor, W: Tensor, k: int, slot_R: Tensor, is_grouped: bool) -> None:
    """Refuse inputs of a grouped product that do not go together.

    Raises:
        ValueError: naming the argument.
    """
    check_positive(where, k=k)
    if is_grouped and k != 1:
        raise argument_error(where, "k", k, "1 for rows that stand in the order of the experts")
    check_shape(where, name, X, T=None, I=W.shape[1])
    check_integer(where, "sorted_scattered_idxs", slot_R)
    check_shape(where, "sorted_scattered_idxs", slot_R, R=X.shape[0] * k)


def with_zero(expert_offsets: Tensor) -> Tensor:
    """(E,) ends of the experts' rows -> (E + 1,) int32, beginning with 0."""
    return torch.nn.functional.pad(expert_offsets.to(torch.int32), (1, 0))


def row_of_slot(slot_R: Tensor) -> Tensor:
    """The inverse of row -> slot: (R,) int32."""
    rows_R = torch.arange(slot_R.shape[0], dtype=torch.int32, device=slot_R.device)
    return torch.empty_like(rows_R).scatter_(0, slot_R.long(), rows_R)
