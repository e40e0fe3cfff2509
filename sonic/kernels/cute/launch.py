"""The six grouped GEMMs on the host: from torch tensors to a launch. Nothing here waits for the device.

Outputs come from torch's allocator, the stream is the current one at the time of the call, and sizes of experts stay on
the device, so a call can be captured in a CUDA graph and replayed with other offsets.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from sonic.kernels.cute import is_simulated
from sonic.kernels.cute.compiled import compiled
from sonic.kernels.cute.keys import (
    BIAS_COLUMNS,
    GATED_ACTIVATIONS,
    KernelKey,
    Sizes,
    contraction_key,
    rows_key,
)

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
    """H and A; see ``sonic.kernels.ops.up_proj``."""
    width_u, width_d = w1_EUD.shape[1:]
    num_rows = x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]
    gated = activation in GATED_ACTIVATIONS
    h_RU = x_TD.new_empty(num_rows if need_h else 0, width_u)
    a_RN = x_TD.new_empty(num_rows, width_u // 2 if gated else width_u)
    _launch_rows(
        rows_key(
            "up_proj",
            _sizes(x_TD, num_rows, w1_EUD.shape[0], width_u, width_d),
            gathers=token_of_row_R is not None,
            activation=activation,
            glu_layout=glu_layout,
            flags=_flags(h=need_h, bias=b1_EU),
        ),
        x_TD,
        token_of_row_R,
        w1_EUD,
        expert_offset_E1,
        num_rows,
        (width_u, width_d),
        (h_RU if need_h else None, a_RN, b1_EU),
    )
    return h_RU, a_RN


def down_proj(
    a_RN: Tensor, w2_EDN: Tensor, b2_ED: Tensor | None, row_scores_R: Tensor | None, expert_offset_E1: Tensor
) -> Tensor:
    """Y; see ``sonic.kernels.ops.down_proj``."""
    num_experts, width_d, width_n = w2_EDN.shape
    num_rows = a_RN.shape[0]
    y_RD = a_RN.new_empty(num_rows, width_d)
    sizes = _sizes(a_RN, num_rows, num_experts, width_d, width_n)
    _launch_rows(
        rows_key("down_proj", sizes, flags=_flags(bias=b2_ED, scores=row_scores_R)),
        a_RN,
        None,
        w2_EDN,
        expert_offset_E1,
        num_rows,
        (width_d, width_n),
        (y_RD, b2_ED, _float32(row_scores_R)),
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

    The kernel always makes all three: what is not wanted is dropped here. A tile of columns leaves its part of dS in a
    row of its own, (column tiles, R) float32; the parts are added up in a fixed order.
    """
    num_experts, width_d, width_n = w2_EDN.shape
    num_rows, width_u = h_RU.shape
    key = rows_key(
        "down_proj_bwd_input",
        _sizes(dout_TD, num_rows, num_experts, width_n, width_d),
        gathers=token_of_row_R is not None,
        activation=activation,
        glu_layout=glu_layout,
        flags=_flags(scores=row_scores_R),
    )
    dh_RU = h_RU.new_empty(num_rows, width_u)
    scaled_a_RN = h_RU.new_empty(num_rows, width_n)
    part_PR = h_RU.new_empty(-(-width_n // key.config.tile_n), num_rows, dtype=torch.float32)
    _launch_rows(
        key,
        dout_TD,
        token_of_row_R,
        w2_EDN,
        expert_offset_E1,
        num_rows,
        (width_n, width_d),
        (_aligned(h_RU), dh_RU, scaled_a_RN, _float32(row_scores_R), part_PR),
    )
    dscores_R = part_PR.new_empty(0)
    if need_dscores:
        dscores_R = part_PR[0] if part_PR.shape[0] == 1 else part_PR.sum(0)
        if b2_ED is not None:
            dscores_R = dscores_R + _bias_dots(dout_TD, b2_ED, token_of_row_R, expert_offset_E1, num_rows)
    return dh_RU if need_dh else dh_RU.new_empty(0, width_u), scaled_a_RN, dscores_R


def up_proj_bwd_input(dh_RU: Tensor, w1_EUD: Tensor, expert_offset_E1: Tensor) -> Tensor:
    """Rows of dX; see ``sonic.kernels.ops.up_proj_bwd_input``."""
    num_experts, width_u, width_d = w1_EUD.shape
    num_rows = dh_RU.shape[0]
    dx_RD = dh_RU.new_empty(num_rows, width_d)
    _launch_rows(
        rows_key("up_proj_bwd_input", _sizes(dh_RU, num_rows, num_experts, width_d, width_u)),
        dh_RU,
        None,
        w1_EUD,
        expert_offset_E1,
        num_rows,
        (width_d, width_u),
        (dx_RD, None, None),
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
    return _contract(
        "down_proj_bwd_weight",
        dout_TD,
        scaled_a_RN,
        token_of_row_R,
        expert_offset_E1,
        row_scores_R,
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
    return _contract(
        "up_proj_bwd_weight",
        dh_RU,
        x_TD,
        token_of_row_R,
        expert_offset_E1,
        None,
        need_weight,
        need_bias,
        main_grad_EUD,
    )


def _contract(
    op: str,
    left: Tensor,
    right: Tensor,
    index_R: Tensor | None,
    expert_offset_E1: Tensor,
    row_scores_R: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The product over each expert's rows, (E, width of left, width of right), and the column sums of left.

    The sums are a product too, of left with the rows' scores: as two values of 16 bits whose sum is a score to 2**-16
    (2**-22 in float16), in columns of a matrix of their own, so they cost one more pass over left. They always go by an
    index, so that both biases' gradients share one kernel.
    """
    num_experts = expert_offset_E1.shape[0] - 1
    width_m, width_n = left.shape[1], right.shape[1]
    gathers_left = op == "down_proj_bwd_weight" and index_R is not None
    num_rows = right.shape[0] if gathers_left else left.shape[0]
    stores = need_weight and main_grad is None
    weight = left.new_empty(num_experts if stores else 0, width_m, width_n)
    if need_weight:
        out = weight if main_grad is None else _aligned(main_grad)
        _launch_contraction(op, left, right, index_R, expert_offset_E1, num_rows, out, adds=main_grad is not None)
        if main_grad is not None and out.data_ptr() != main_grad.data_ptr():
            main_grad.copy_(out)  # a view of a larger buffer that begins between 16 bytes
    if not need_bias:
        return weight, left.new_empty(0, width_m)
    sums = left.new_empty(num_experts, width_m, BIAS_COLUMNS, dtype=torch.float32)
    scores = _split_scores(row_scores_R, num_rows, left)
    row_R = index_R if gathers_left else torch.arange(num_rows, device=left.device, dtype=torch.int32)
    _launch_contraction("down_proj_bwd_weight", left, scores, row_R, expert_offset_E1, num_rows, sums)
    return weight, (sums[..., 0] + sums[..., 1]).to(left.dtype)


def _split_scores(row_scores_R: Tensor | None, num_rows: int, like: Tensor) -> Tensor:
    """(R, 8) of the dtype of ``like``: each score as the sum of its first two columns; ones without scores."""
    columns = like.new_zeros(num_rows, BIAS_COLUMNS)
    if row_scores_R is None:
        columns[:, 0] = 1
        return columns
    scores = row_scores_R.to(torch.float32)
    columns[:, 0] = scores
    columns[:, 1] = scores - columns[:, 0].to(torch.float32)
    return columns


def _bias_dots(
    dout_TD: Tensor, b2_ED: Tensor, token_of_row_R: Tensor | None, expert_offset_E1: Tensor, num_rows: int
) -> Tensor:
    """``<dO[t], b2[e]>`` of every row, by way of a (T, E) table; zeros for rows of no expert."""
    table_TE = dout_TD.to(torch.float32) @ b2_ED.to(torch.float32).t()
    row_R = torch.arange(num_rows, device=dout_TD.device, dtype=expert_offset_E1.dtype)
    expert_of_row_R = torch.searchsorted(expert_offset_E1[1:].contiguous(), row_R, right=True)
    num_experts = b2_ED.shape[0]
    token_R = row_R if token_of_row_R is None else token_of_row_R
    dots_R = table_TE[token_R.long(), expert_of_row_R.clamp(max=num_experts - 1)]
    return torch.where(expert_of_row_R < num_experts, dots_R, 0.0)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _flags(**tensors: Any) -> tuple[str, ...]:
    return tuple(name for name, given in tensors.items() if given is not None and given is not False)


def _float32(scores: Tensor | None) -> Tensor | None:
    return None if scores is None else scores.to(torch.float32).contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at whole 16 bytes, as TMA wants it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _sizes(like: Tensor, num_rows: int, num_experts: int, width_n: int, width_k: int) -> Sizes:
    return Sizes(num_rows, num_experts, width_n, width_k, _name(like), _chip(like))


def _chip(like: Tensor) -> str:
    """Name of the file of measurements for the device of a tensor."""
    if like.device.type != "cuda":
        return "simulator"
    return torch.cuda.get_device_name(like.device).replace(" ", "_")


def _num_blocks(most_tiles: int, cluster_m: int, like: Tensor) -> int:
    """Thread blocks that stay: one per multiprocessor, in whole clusters, and no more than there are tiles."""
    if like.device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(like.device).multi_processor_count
    else:
        num_sms = importlib.import_module("cutlass.utils").HardwareInfo().get_device_multiprocessor_count()
    return max(1, min(num_sms // cluster_m, most_tiles)) * cluster_m


def _launch_rows(
    key: KernelKey,
    left: Tensor,
    index_R: Tensor | None,
    weight: Tensor,
    expert_offset_E1: Tensor,
    num_rows: int,
    widths: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
) -> None:
    """Start a kernel whose row tiles vary; ``widths``: columns of the product and of its steps."""
    if num_rows == 0:
        return
    config = key.config
    tiles = (-(-num_rows // (config.tile_m * config.cluster_m)) + weight.shape[0] + 1) * -(-widths[0] // config.tile_n)
    _launch(
        key,
        (_aligned(left), index_R),
        (_aligned(weight), None),
        tensors,
        expert_offset_E1,
        (num_rows, 0, *widths),
        _num_blocks(tiles, config.cluster_m, left),
    )


def _launch_contraction(
    op: str,
    left: Tensor,
    right: Tensor,
    index_R: Tensor | None,
    expert_offset_E1: Tensor,
    num_rows: int,
    out: Tensor,
    adds: bool = False,
) -> None:
    """Start a kernel whose steps vary: ``out`` (E, width of left, width of right) is written, or added to."""
    if num_rows == 0:
        if not adds:
            out.zero_()
        return
    num_experts, width_m, width_n = out.shape
    sizes = _sizes(left, num_rows, num_experts, width_n, width_m)
    key = contraction_key(op, sizes, gathers=index_R is not None, out_dtype=_name(out), adds=adds)
    config = key.config
    tiles = num_experts * -(-width_m // config.tile_m) * -(-width_n // config.tile_n)
    gathers_left = op == "down_proj_bwd_weight"
    _launch(
        key,
        (_aligned(left), index_R if gathers_left else None),
        (_aligned(right), None if gathers_left else index_R),
        (out,),
        expert_offset_E1,
        (num_rows, width_m, width_n, 0),
        _num_blocks(tiles, config.cluster_m, left),
    )


def _launch(
    key: KernelKey,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    tensors: tuple[Tensor | None, ...],
    expert_offset_E1: Tensor,
    sizes: tuple[int, int, int, int],
    num_blocks: int,
) -> None:
    simulated = left[0].device.type == "cpu"
    assert not simulated or is_simulated(), "a CPU is only served by the simulator"
    function = compiled(key, simulated)
    arguments: tuple[Any, ...] = (
        tuple(_contiguous(t) for t in left),
        tuple(_contiguous(t) for t in right),
        tuple(_contiguous(t) for t in tensors),
        expert_offset_E1.contiguous(),
    )
    if simulated:
        arguments = _for_simulator(key.op, arguments)
    function(*arguments, sizes, num_blocks)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _for_simulator(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """CPU tensors as ones that a kernel may touch, with names for reports and counts."""
    simulator = importlib.import_module("sonic.simulator")
    names = (("left", "index"), ("right", "index"), tuple(f"tensor {i}" for i in range(8)))

    def wrap(value: Any, name: Any) -> Any:
        if isinstance(value, Tensor):
            return simulator.tensor(value, name)
        if isinstance(value, tuple):
            return tuple(wrap(v, n) for v, n in zip(value, name, strict=False))
        return value

    return tuple(wrap(value, name) for value, name in zip(arguments, (*names, "offsets"), strict=True))
