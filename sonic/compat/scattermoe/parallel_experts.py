"""One grouped product as a function and as a module, rows scattered or grouped on either side.

R rows are the slots (token, expert) in the order of the experts. ``grouped_in``: the input stands in that order, else
token by token. ``grouped_out``: the output does, else slot by slot, or, with gates, summed per token.

Made of ops of :mod:`sonic.kernels.ops` and of gathers of torch:

========================  ==============================================================================================
forward                   gather of X (unless ``grouped_in``), ``down_proj``, then nothing (``grouped_out``), a gather,
                          or ``combine`` (gates)
gradient of X             gather of dO (unless ``grouped_out``), ``up_proj_bwd_input``, and ``combine`` (unless
                          ``grouped_in``)
gradient of W and b       ``up_proj_bwd_weight``, X gathered inside; with gates ``down_proj_bwd_weight``, dO inside
gradient of the gates     ``<dO[t] W[e]ᵀ, x> + <dO[t], b[e]>`` from what the gradient of X needs anyway
========================  ==============================================================================================

Kept for backward, for rows of I values in and O out: X as it came (T I, or R I if grouped), the gates, and the integers
that the caller holds. Not the R O rows before the gates, which the package keeps. Transient: one gathered copy (R I or
R O) and one result of the same kind at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sonic.autograd import autocast_dtype, refuse_double_backward
from sonic.compat.scattermoe import kernels
from sonic.compat.scattermoe.kernels.ops import (
    check_rows,
    compileable_bincount,
    flatten_and_sort,
    row_of_slot,
    with_zero,
)
from sonic.kernels import ops
from sonic.routing.scores import check_within
from sonic.shapes import argument_error, check_dtype, check_integer, check_positive, check_same, check_shape

__all__ = [
    "ParallelExperts",
    "ParallelLinear",
    "compileable_bincount",
    "flatten_sort_count",
    "kernels",
    "parallel_linear",
]


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots by expert, and say where the rows of each expert end; waits for no device.

    Args:
        expert_idxs: integer, any shape, 0 <= index < num_experts; the same expert twice for a token is fine.
        num_experts: E.

    Returns:
        sorted_expert_idxs (R,), ascending, dtype of the indices; sorted_scattered_idxs (R,) int64, row -> slot;
        expert_offsets (E,) int64, last row + 1 of each expert.

    Raises:
        ValueError: no integer tensor; an index out of range (on a GPU and in a compiled graph an assertion of the
            device).
    """
    where = "scattermoe.flatten_sort_count"
    check_positive(where, num_experts=num_experts)
    sorted_expert_idxs, sorted_scattered_idxs = flatten_and_sort(expert_idxs)
    wide_R = sorted_expert_idxs.long()  # E need not be a number of the indices' own dtype
    check_within(where, "expert_idxs", wide_R, "num_experts", num_experts)
    last_E = torch.arange(num_experts, device=expert_idxs.device)
    expert_offsets = torch.searchsorted(wide_R, last_E, right=True)
    return sorted_expert_idxs, sorted_scattered_idxs, expert_offsets


class ParallelLinear(torch.autograd.Function):
    """The autograd function behind :func:`parallel_linear`; what it keeps stands at the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert_weights: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        expert_biases: Tensor | None = None,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        """The product; arguments as in :func:`parallel_linear`, which checks them."""
        ctx.k, ctx.grouped_in, ctx.grouped_out = k, grouped_in, grouped_out
        ctx.save_for_backward(
            x,
            expert_weights,
            expert_biases,
            gates,
            sorted_expert_idxs if gates is not None and expert_biases is not None else None,
            sorted_scattered_idxs,
            expert_offsets,
        )
        slot_R = sorted_scattered_idxs
        rows_RI = x if grouped_in else x.index_select(0, slot_R // k)
        y_RO = ops.down_proj(
            rows_RI.contiguous(), _rows_first(expert_weights), expert_biases, None, with_zero(expert_offsets)
        )
        del rows_RI
        if grouped_out:
            return y_RO
        if gates is None:
            return y_RO.index_select(0, row_of_slot(slot_R))
        return ops.combine(y_RO, gates.reshape(-1).index_select(0, slot_R), *_rows_by_token(slot_R, gates.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        x, expert_weights, expert_biases, gates, expert_R, slot_R, expert_offsets = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_db, need_dgates = ctx.needs_input_grad[6], ctx.needs_input_grad[7]
        with torch.no_grad():
            dout, x_in = grad_out.contiguous(), x.contiguous()
            w_EOI, offset_E1 = _rows_first(expert_weights), with_zero(expert_offsets)
            in_row_R = None if ctx.grouped_in else (slot_R // ctx.k).to(torch.int32)
            score_R = None if gates is None else gates.reshape(-1).index_select(0, slot_R)
            dx: Tensor | None = None
            dw_EOI: Tensor | None = None
            db_EO: Tensor | None = None
            dgates: Tensor | None = None
            out_row_R = slot_R if gates is None else slot_R // gates.shape[1]
            drow_RO = dout  # of each row, before the gates
            if not ctx.grouped_out and (need_dx or need_dgates or (gates is None and (need_dw or need_db))):
                drow_RO = dout.index_select(0, out_row_R)
            if gates is None and (need_dw or need_db):
                dw_EOI, db_EO = ops.up_proj_bwd_weight(drow_RO, x_in, in_row_R, offset_E1, need_dw, need_db)
            elif score_R is not None and (need_dw or need_db):
                scaled_RI = x_in if in_row_R is None else x_in.index_select(0, in_row_R)
                scaled_RI = (scaled_RI * score_R[:, None]).to(x.dtype)
                dw_EOI, db_EO = ops.down_proj_bwd_weight(
                    dout, scaled_RI, score_R, out_row_R.to(torch.int32), offset_E1, need_dw, need_db
                )
                del scaled_RI
            if need_dx or need_dgates:
                dx_RI = ops.up_proj_bwd_input(drow_RO, w_EOI, offset_E1)
                if need_dgates:
                    dscore_R = _row_products(dx_RI, x_in if in_row_R is None else x_in.index_select(0, in_row_R))
                    if expert_biases is not None:
                        dscore_R = dscore_R + _row_products(drow_RO, expert_biases.index_select(0, expert_R))
                    dgates = torch.zeros_like(dscore_R).index_copy(0, slot_R.long(), dscore_R)
                    dgates = dgates.to(gates.dtype).reshape(gates.shape)
                if need_dx and in_row_R is not None:
                    dx = ops.combine(dx_RI, score_R, *_rows_by_token(slot_R, ctx.k))
                elif need_dx:
                    dx = dx_RI if score_R is None else (dx_RI * score_R[:, None]).to(x.dtype)
            dw = dw_EOI.transpose(1, 2) if need_dw and dw_EOI is not None else None
            db = db_EO if need_db else None
        grads = (dx, dw, db, dgates)
        dx, dw, db, dgates = refuse_double_backward(
            "scattermoe.parallel_linear", grads, (grad_out, x, expert_weights, expert_biases, gates)
        )
        return dx, dw, None, None, None, None, db, dgates, None, None


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    *more: Any,
    **named: Any,
) -> Tensor:
    """Multiply each slot's row by its expert's matrix: ``x @ W[e] + b[e]``, times its gate and summed per token.

    Further arguments, by position or name: version 0.3 takes ``expert_offsets, expert_biases=None, gates=None,
    grouped_in=False, grouped_out=False``, version 0.2 ``padded_block_idxs, expert_offsets, gates=None,
    grouped_in=False, grouped_out=False``. They are told apart by name, or by the second of them being an integer
    tensor. ``padded_block_idxs`` is not read.

    Differentiable once in ``inputs``, ``expert_weights``, ``expert_biases`` and ``gates``. Under autocast inputs,
    weights and biases are cast to its dtype as for ``nn.Linear``.

    Args:
        inputs: (T, I), or (R, I) with ``grouped_in``; bf16, fp16, fp32 or fp64.
        expert_weights: (E, I, O), a view of a parameter (E, O, I), as ``weight.permute(0, 2, 1)`` gives it; memory in
            another order is copied in each pass.
        k: slots per row of ``inputs``; 1 with ``grouped_in``.
        sorted_expert_idxs, sorted_scattered_idxs: (R,) integer, of :func:`flatten_sort_count`.
        more: ``expert_offsets`` (E,) integer; ``expert_biases`` (E, O) or None; ``gates`` (T', K') of any floating
            dtype with T' K' = R, by which slots p of token p // K' are weighted and summed; ``grouped_in``,
            ``grouped_out``.
        named: the same by name.

    Returns:
        (R, O), or (T', O) with gates; dtype of ``inputs``.

    Raises:
        TypeError: arguments too many, too few or unknown.
        ValueError: shapes or dtypes do not fit; gates with ``grouped_out``.
        RuntimeError: from backward, when the gradient is differentiated again.
    """
    where = "scattermoe.parallel_linear"
    given = _given(where, ("expert_offsets", "expert_biases", "gates", "grouped_in", "grouped_out"), more, named)
    expert_offsets, expert_biases, gates = given["expert_offsets"], given.get("expert_biases"), given.get("gates")
    grouped_in, grouped_out = bool(given.get("grouped_in", False)), bool(given.get("grouped_out", False))
    check_shape(where, "expert_weights", expert_weights, E=None, I=None, O=None)
    num_experts, _, width_out = expert_weights.shape
    check_rows(where, "inputs", inputs, expert_weights, k, sorted_scattered_idxs, grouped_in)
    num_rows = sorted_scattered_idxs.shape[0]
    check_integer(where, "sorted_expert_idxs", sorted_expert_idxs)
    check_shape(where, "sorted_expert_idxs", sorted_expert_idxs, R=num_rows)
    check_integer(where, "expert_offsets", expert_offsets)
    check_shape(where, "expert_offsets", expert_offsets, E=num_experts)
    if expert_biases is not None:
        check_shape(where, "expert_biases", expert_biases, E=num_experts, O=width_out)
    if gates is not None:
        check_shape(where, "gates", gates, T=None, K=None)
        check_dtype(where, "gates", gates, ops.FLOAT_DTYPES)
        if gates.numel() != num_rows:
            raise argument_error(where, "gates", tuple(gates.shape), f"(T, K) with T K = R = {num_rows}")
        if grouped_out:
            raise argument_error(where, "grouped_out", True, "False with gates, which sum the rows of a token")
    dtype = autocast_dtype(inputs.device)
    if dtype is not None and inputs.dtype != torch.float64:
        inputs, expert_weights = inputs.to(dtype), expert_weights.to(dtype)
        expert_biases = None if expert_biases is None else expert_biases.to(dtype)
    check_same(where, ("inputs", inputs), (("expert_weights", expert_weights), ("expert_biases", expert_biases)))
    out: Tensor = ParallelLinear.apply(
        inputs,
        expert_weights,
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        expert_biases,
        gates,
        grouped_in,
        grouped_out,
    )
    return out


class ParallelExperts(nn.Module):
    """:func:`parallel_linear` with parameters ``weight`` (E, O, I) and, if wanted, ``bias`` (E, O)."""

    def __init__(self, num_experts: int, input_size: int, output_size: int, bias: bool = False) -> None:
        """
        Args:
            num_experts: E.
            input_size: I.
            output_size: O.
            bias: have a bias, zero at first.
        """
        super().__init__()
        check_positive(
            "scattermoe.ParallelExperts", num_experts=num_experts, input_size=input_size, output_size=output_size
        )
        self.num_experts, self.input_size, self.output_size = num_experts, input_size, output_size
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of standard deviation 0.02; biases become zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        inputs: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """:func:`parallel_linear` with these parameters.

        Args:
            inputs, k, sorted_expert_idxs, sorted_scattered_idxs: as there.
            more: ``expert_offsets, gates=None, grouped_in=False, grouped_out=False``, or as in version 0.2
                ``padded_block_idxs, expert_offsets, gates=None, grouped_in=False, grouped_out=False``.
            named: the same by name.

        Raises:
            TypeError, ValueError, RuntimeError: as there.
        """
        where = "scattermoe.ParallelExperts"
        given = _given(where, ("expert_offsets", "gates", "grouped_in", "grouped_out"), more, named)
        weight_EIO = self.weight.permute(0, 2, 1)
        maps = (sorted_expert_idxs, sorted_scattered_idxs)
        return parallel_linear(inputs, weight_EIO, k, *maps, expert_biases=self.bias, **given)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_experts={self.num_experts}, input_size={self.input_size}, output_size={self.output_size}"


def _given(where: str, names: tuple[str, ...], more: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of either version by name; ``padded_block_idxs`` is dropped."""
    is_older = "padded_block_idxs" in named or (len(more) > 1 and _is_index(more[1]))
    order = ("padded_block_idxs", *(name for name in names if name != "expert_biases")) if is_older else names
    if len(more) > len(order):
        raise TypeError(f"{where}: {len(more)} arguments after sorted_scattered_idxs, expected {', '.join(order)}")
    given = dict(zip(order, more, strict=False))
    for name, value in named.items():
        if name in given:
            raise TypeError(f"{where}: {name} is given twice, expected once")
        if name not in order:
            raise TypeError(f"{where}: {name} is no argument, expected {', '.join(order)}")
        given[name] = value
    given.pop("padded_block_idxs", None)
    if "expert_offsets" not in given:
        raise TypeError(f"{where}: expert_offsets is missing, expected {', '.join(order)}")
    return given


def _is_index(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _rows_first(expert_weights: Tensor) -> Tensor:
    """(E, I, O) -> (E, O, I): the parameter itself, where it came as a view of one."""
    return expert_weights.transpose(1, 2).contiguous()


def _rows_by_token(slot_R: Tensor, slots_per_token: int) -> tuple[Tensor, Tensor]:
    """``row_by_token_R`` and ``token_offset_T1`` of slots that come token by token."""
    num_tokens = slot_R.shape[0] // slots_per_token
    edges_T1 = torch.arange(num_tokens + 1, dtype=torch.int32, device=slot_R.device) * slots_per_token
    return row_of_slot(slot_R), edges_T1


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """``<left[r], right[r]>`` in at least float32: (R,)."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.linalg.vecdot(left.to(wide), right.to(wide))
