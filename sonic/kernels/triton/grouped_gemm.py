"""The six grouped GEMMs of a layer on the host: which loaders, epilogue and configuration each op is made of.

=====================  ==========================  =============================  =====================================
op                     left operand                right operand                  epilogue
=====================  ==========================  =============================  =====================================
up_proj                X, gathered                 rows of W1 (in pairs if        bias, activation; H and A
                                                   gated)
down_proj              A                           rows of W2                     bias, score; Y
down_proj_bwd_input    dO, gathered                columns of W2                  H, derivative, score; dH, s A, dS
up_proj_bwd_input      dH                          columns of W1                  dX rows
down_proj_bwd_weight   dO, gathered along k        s A                            dW2, or added to a main gradient; db2
up_proj_bwd_weight     dH                          X, gathered along k            dW1, or added to a main gradient; db1
=====================  ==========================  =============================  =====================================

Float32 products are exact in float32 unless ``torch.set_float32_matmul_precision`` allows TF32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sonic.kernels.triton import epilogues as ep
from sonic.kernels.triton import loaders
from sonic.kernels.triton.config import GemmConfig, programs_at_once, rows_bucket
from sonic.kernels.triton.launch import current_target, launch
from sonic.kernels.triton.mainloops import grouped_contraction_kernel, grouped_rows_kernel
from sonic.kernels.triton.tuning import GemmKey, config_of

__all__ = [
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
    "up_rows",
]

_GATED = {
    "swiglu": (ep.silu, ep.identity),
    "geglu": (ep.gelu, ep.identity),
    "reglu": (ep.relu, ep.identity),
    "swiglu_oai": (ep.oai_gate, ep.oai_up),
}
_PLAIN = {"gelu": ep.gelu, "relu": ep.relu, "relu2": ep.relu2, "silu": ep.silu}
_MAX_PROGRAMS = 2**31 - 1
_PART_ALIGNMENT = 16  # Triton compiles anew for integers in a tuple that are 1 or no multiple of 16


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
    """H and A; see ``sonic.kernels.ops.up_proj``."""
    num_experts, width_u, width_d = w1_EUD.shape
    num_rows = x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]
    gated = activation in _GATED
    width_n = width_u // 2 if gated else width_u
    h_RU = x_TD.new_empty(num_rows if need_h else 0, width_u)
    a_RN = x_TD.new_empty(num_rows, width_n)
    kind = "up_gated" if gated else "up_plain"
    halves = gated and glu_layout == "concatenated"
    config = _config("up_proj", kind, num_rows, num_experts, width_d, width_u, x_TD)
    _launch_rows(
        "up_proj",
        config,
        x_TD,
        token_of_row_R,
        expert_offset_E1,
        num_rows,
        w1_EUD,
        None,
        (h_RU if need_h else None, a_RN, _contiguous(b1_EU)),
        ep.sliced,
        (ep.up_gated if gated else ep.up_plain, config.slices, *_activation(activation, glu_layout, width_n)),
        halves=halves,
        rows_of_weight=True,
    )
    return h_RU, a_RN


def down_proj(
    a_RN: Tensor, w2_EDN: Tensor, b2_ED: Tensor | None, row_scores_R: Tensor | None, expert_offset_E1: Tensor
) -> Tensor:
    """Y; see ``sonic.kernels.ops.down_proj``."""
    num_experts, width_d, width_n = w2_EDN.shape
    y_RD = a_RN.new_empty(a_RN.shape[0], width_d)
    args = (y_RD, _contiguous(b2_ED), _contiguous(row_scores_R))
    _launch_rows(
        "down_proj",
        _config("down_proj", "rows", a_RN.shape[0], num_experts, width_n, width_d, a_RN),
        a_RN,
        None,
        expert_offset_E1,
        a_RN.shape[0],
        w2_EDN,
        None,
        args,
        ep.store_finished,
        (width_d,),
        rows_of_weight=True,
    )
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
    """dH, score * A and dS; see ``sonic.kernels.ops.down_proj_bwd_input``.

    A tile of columns leaves its part of dS in a row of its own, (tiles, R) float32; the parts are added up in a fixed
    order.
    """
    num_experts, width_d, width_n = w2_EDN.shape
    num_rows, width_u = h_RU.shape
    config = _config("down_proj_bwd_input", "down_bwd", num_rows, num_experts, width_d, width_n, dout_TD)
    program = ep.down_bwd_gated if activation in _GATED else ep.down_bwd_plain
    dh_RU = h_RU.new_empty(num_rows if need_dh else 0, width_u)
    scaled_a_RN = h_RU.new_empty(num_rows, width_n)
    num_parts = triton.cdiv(width_n, config.block_n) if need_dscores else 0
    stride = _PART_ALIGNMENT * triton.cdiv(num_rows, _PART_ALIGNMENT)
    part_PR = h_RU.new_empty(num_parts, stride, dtype=torch.float32)[:, :num_rows]
    args = (
        h_RU.contiguous(),
        _contiguous(row_scores_R),
        dh_RU if need_dh else None,
        scaled_a_RN,
        part_PR if need_dscores else None,
        stride,
    )
    _launch_rows(
        "down_proj_bwd_input",
        config,
        dout_TD,
        token_of_row_R,
        expert_offset_E1,
        num_rows,
        w2_EDN,
        _contiguous(b2_ED) if need_dscores else None,
        args,
        ep.sliced_with_dots,
        (program, config.slices, *_activation(activation, glu_layout, width_n)),
        rows_of_weight=False,
    )
    if not need_dscores:
        return dh_RU, scaled_a_RN, part_PR.new_empty(0)
    return dh_RU, scaled_a_RN, part_PR[0] if num_parts == 1 else part_PR.sum(0)


def up_proj_bwd_input(dh_RU: Tensor, w1_EUD: Tensor, expert_offset_E1: Tensor) -> Tensor:
    """Rows of dX; see ``sonic.kernels.ops.up_proj_bwd_input``."""
    num_experts, width_u, width_d = w1_EUD.shape
    dx_RD = dh_RU.new_empty(dh_RU.shape[0], width_d)
    _launch_rows(
        "up_proj_bwd_input",
        _config("up_proj_bwd_input", "rows", dh_RU.shape[0], num_experts, width_u, width_d, dh_RU),
        dh_RU,
        None,
        expert_offset_E1,
        dh_RU.shape[0],
        w1_EUD,
        None,
        (dx_RD, None, None),
        ep.store_finished,
        (width_d,),
        rows_of_weight=False,
    )
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
    """dW2 and db2; see ``sonic.kernels.ops.down_proj_bwd_weight``."""
    return _launch_contraction(
        "down_proj_bwd_weight",
        dout_TD,
        scaled_a_RN,
        token_of_row_R,
        expert_offset_E1,
        _contiguous(row_scores_R),
        (token_of_row_R is not None, False),
        need_weight,
        need_bias,
        main_grad_EDN,
    )


def up_proj_bwd_weight(
    dh_RU: Tensor,
    x_TD: Tensor,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    need_weight: bool,
    need_bias: bool,
    main_grad_EUD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dW1 and db1; see ``sonic.kernels.ops.up_proj_bwd_weight``."""
    return _launch_contraction(
        "up_proj_bwd_weight",
        dh_RU,
        x_TD,
        token_of_row_R,
        expert_offset_E1,
        None,
        (False, token_of_row_R is not None),
        need_weight,
        need_bias,
        main_grad_EUD,
    )


def up_rows(intermediate_size: int, activation: str) -> int:
    """U of N: gate and up rows, or one row per unit."""
    return 2 * intermediate_size if activation in _GATED else intermediate_size


def _activation(activation: str, glu_layout: str, width_n: int) -> tuple[Any, ...]:
    value, factor = _GATED[activation] if activation in _GATED else (_PLAIN[activation], ep.identity)
    return value, factor, width_n, glu_layout == "interleaved"


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _precision(tensor: Tensor) -> str:
    if tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def _config(
    op: str, kind: str, num_rows: int, num_experts: int, width_k: int, width_n: int, like: Tensor
) -> GemmConfig:
    bucket = rows_bucket(num_rows, num_experts)
    return config_of(GemmKey(op, kind, bucket, num_experts, width_k, width_n, like.dtype), current_target(like))


def _launch_rows(
    label: str,
    config: GemmConfig,
    left: Tensor,
    index_R: Tensor | None,
    expert_offset_E1: Tensor,
    num_rows: int,
    weight: Tensor,
    row_vector: Tensor | None,
    args: tuple[Any, ...],
    epilogue: Any,
    options: tuple[Any, ...],
    *,
    rows_of_weight: bool,
    halves: bool = False,
) -> None:
    """Start ``grouped_rows_kernel`` for all rows; ``rows_of_weight``: the product's columns are rows of the weight."""
    if num_rows == 0:
        return
    left, weight, expert_offset_E1 = left.contiguous(), weight.contiguous(), expert_offset_E1.contiguous()
    num_experts = weight.shape[0]
    width_n, width_k = weight.shape[1:] if rows_of_weight else (weight.shape[2], weight.shape[1])
    target = current_target(left)
    column_tiles = triton.cdiv(width_n, config.block_n)
    most_tiles = (triton.cdiv(num_rows, config.block_m) + num_experts) * column_tiles
    at_once = programs_at_once(config, left.dtype, target) if config.persistent else _MAX_PROGRAMS
    programs = min(most_tiles, at_once)
    load_weight = loaders.weight_of_rows if rows_of_weight else loaders.weight_of_columns
    operand: Any = weight
    if config.descriptors and target.has_descriptors and _describable(weight):
        operand = _describe(weight, config, rows_of_weight, halves)
        load_weight = loaders.described_weight_rows if rows_of_weight else loaders.described_weight_columns
    launch(
        grouped_rows_kernel,
        (programs,),
        left,
        _contiguous(index_R),
        expert_offset_E1,
        num_rows,
        operand,
        row_vector,
        args,
        label=label,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        LOAD_ROWS=loaders.rows,
        LOAD_WEIGHT=load_weight,
        EPILOGUE=epilogue,
        OPTIONS=options,
        HALVES=halves,
        NUM_EXPERTS=num_experts,
        WIDTH_K=width_k,
        WIDTH_N=width_n,
        BLOCK_E=triton.next_power_of_2(num_experts + 1),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PRECISION=_precision(left),
    )


def _describable(weight: Tensor) -> bool:
    """Whether every stride of the weight, and its start, are whole 16 bytes: what a descriptor demands."""
    return weight.shape[2] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0


def _describe(weight: Tensor, config: GemmConfig, rows_of_weight: bool, halves: bool) -> TensorDescriptor:
    """Descriptor of the weight in blocks as the loader of that orientation reads them."""
    num_experts, width, contiguous = weight.shape
    if not rows_of_weight:
        block = [1, config.block_k, config.block_n]
        return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), block)
    if not halves:
        block = [1, config.block_n, config.block_k]
        return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), block)
    shape = [num_experts, width // 2, 2, contiguous]
    strides = [width * contiguous, contiguous, width // 2 * contiguous, 1]
    return TensorDescriptor(weight, shape, strides, [1, config.block_n // 2, 2, config.block_k])


def _launch_contraction(
    label: str,
    left: Tensor,
    right: Tensor,
    index_R: Tensor | None,
    expert_offset_E1: Tensor,
    row_scores_R: Tensor | None,
    gathered: tuple[bool, bool],
    need_weight: bool,
    need_bias: bool,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Start ``grouped_contraction_kernel``: the product (E, width of left, width of right), and column sums of left."""
    num_experts = expert_offset_E1.shape[0] - 1
    width_m, width_n = left.shape[1], right.shape[1]
    num_rows = right.shape[0] if gathered[0] else left.shape[0]
    stores = need_weight and main_grad is None
    weight = left.new_empty(num_experts if stores else 0, width_m, width_n)
    bias = left.new_empty(num_experts if need_bias else 0, width_m)
    if not need_weight and not need_bias:
        return weight, bias
    config = _config(label, "contraction", num_rows, num_experts, width_m, width_n, left)
    column_tiles = triton.cdiv(width_n, config.block_n) if need_weight else 1
    launch(
        grouped_contraction_kernel,
        (num_experts * triton.cdiv(width_m, config.block_m) * column_tiles,),
        left.contiguous(),
        right.contiguous(),
        _contiguous(index_R),
        expert_offset_E1.contiguous(),
        row_scores_R if need_bias else None,
        bias if need_bias else None,
        (weight if stores else None, main_grad if need_weight else None),
        label=label,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        GATHER_LEFT=gathered[0],
        GATHER_RIGHT=gathered[1],
        EPILOGUE=ep.store_weight,
        OPTIONS=(width_n,),
        NEED_PRODUCT=need_weight,
        WIDTH_M=width_m,
        WIDTH_N=width_n,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PRECISION=_precision(left),
    )
    return weight, bias
