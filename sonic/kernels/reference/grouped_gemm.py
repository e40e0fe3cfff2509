"""The six grouped GEMMs over rows sorted by expert, in plain torch.

Every op walks the experts that have rows, in blocks of rows small enough for a core's cache: gather (or view) the rows of a block,
multiply into the block's place in the output, finish the tail (activation, derivative, score, bias) while the block is in cache.
Nothing of the size of a gathered X or dO ever exists, and no table over tokens and experts.

Which resource bounds it: the matrix multiplies of one expert (2 * rows * D * U FLOP on rows * D + D * U operands) are bound by compute from
some tens of rows on; all else is memory traffic, so passes over memory are what this file saves.

16-bit dtypes: where the processor multiplies them fast, operands stay 16-bit (``torch.mm`` accumulates in float32); elsewhere a block and
its weights are widened to float32 on the way, which is faster there and rounds less. :func:`compute_dtype` decides, by chip.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sonic.kernels.reference.activation import activate, activate_bwd, is_gated
from sonic.shapes import argument_error

__all__ = [
    "compute_dtype",
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
]

_BLOCK_BYTES = 2 << 20  # working set of a block of rows: about one core's L2
_MIN_BLOCK_ROWS = 256  # fewer rows than this make a matrix multiply wait for its weights
_MAX_CONTRACTION_ROWS = 8192  # rows gathered at once for a weight gradient


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a block of ``tensor`` is multiplied: its own, or float32 for 16-bit values on a CPU that is slow at them."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor.dtype
    return tensor.dtype if tensor.dtype in _fast_16bit_dtypes() else torch.float32


@functools.cache  # the processor does not change under a process
def _fast_16bit_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that this CPU multiplies faster than float32, from what Linux says of it; unknown chips are taken to be fast.

    AMX is; AMD's AVX512-BF16 is (4x float32); Intel's AVX512-BF16 without AMX issues half as many multiply-adds as its float32 units.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
    if not flags:
        return frozenset((torch.bfloat16, torch.float16))
    fast = set()
    if flags & {"amx_bf16", "bf16"} or ("avx512_bf16" in flags and "AuthenticAMD" in text):
        fast.add(torch.bfloat16)
    if flags & {"amx_fp16", "asimdhp"}:
        fast.add(torch.float16)
    return frozenset(fast)


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
    block = _Block(x_TD, width_d + width_u + width_n)
    weights = block.weights(w1_EUD)
    in_place = need_h and block.dtype == x_TD.dtype
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        x_rD = block.rows(x_TD, token_of_row_R, start, stop)
        h_rU = h_RU[start:stop] if in_place else block.buffer("h", stop - start, width_u)
        torch.mm(x_rD, weights[expert].t(), out=h_rU)
        if b1_EU is not None:
            h_rU += b1_EU[expert]
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
    block = _Block(a_RN, width_d + width_n)
    weights = block.weights(w2_EDN)
    for expert, start, stop in block.spans(expert_offset_E1, a_RN.shape[0], num_experts, y_RD):
        a_rN = block.rows(a_RN, None, start, stop)
        y_rD = block.output("y", y_RD, start, stop)
        torch.mm(a_rN, weights[expert].t(), out=y_rD)
        if b2_ED is not None:
            y_rD += b2_ED[expert]
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
    block = _Block(dout_TD, width_d + 2 * width_u + 3 * width_n)
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
    block = _Block(dh_RU, width_u + width_d)
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
) -> tuple[Tensor, Tensor]:
    """dW2[e] = sum over rows of dO (x) (score A), db2[e] = sum of score dO; see ``sonic.kernels.ops.down_proj_bwd_weight``."""
    num_rows, width_n = scaled_a_RN.shape
    num_experts, width_d = expert_offset_E1.shape[0] - 1, dout_TD.shape[1]
    dw2_EDN = dout_TD.new_empty(num_experts if need_weight else 0, width_d, width_n)
    db2_ED = dout_TD.new_empty(num_experts if need_bias else 0, width_d)
    sums = _ExpertSums(dout_TD, dw2_EDN, db2_ED, need_weight, need_bias)
    block = _Block(dout_TD, width_d + width_n, contraction=True)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        dout_rD = block.rows(dout_TD, token_of_row_R, start, stop)
        if need_weight:
            sums.add_weight(expert, dout_rD.t(), block.widened("a", scaled_a_RN[start:stop]))
        if need_bias:
            scores_r1 = None if row_scores_R is None else block.column(row_scores_R, start, stop)
            sums.add_bias(expert, dout_rD if scores_r1 is None else scores_r1.t().mm(dout_rD))
    sums.finish()
    return dw2_EDN, db2_ED


def up_proj_bwd_weight(
    dh_RU: Tensor,
    x_TD: Tensor,
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dW1[e] = sum over rows of dH (x) X, db1[e] = sum of dH; see ``sonic.kernels.ops.up_proj_bwd_weight``."""
    num_rows, width_u = dh_RU.shape
    num_experts, width_d = expert_offset_E1.shape[0] - 1, x_TD.shape[1]
    dw1_EUD = x_TD.new_empty(num_experts if need_weight else 0, width_u, width_d)
    db1_EU = x_TD.new_empty(num_experts if need_bias else 0, width_u)
    sums = _ExpertSums(x_TD, dw1_EUD, db1_EU, need_weight, need_bias)
    block = _Block(x_TD, width_d + width_u, contraction=True)
    for expert, start, stop in block.spans(expert_offset_E1, num_rows, num_experts):
        dh_rU = block.widened("dh", dh_RU[start:stop])
        if need_weight:
            sums.add_weight(expert, dh_rU.t(), block.rows(x_TD, token_of_row_R, start, stop))
        if need_bias:
            sums.add_bias(expert, dh_rU)
    sums.finish()
    return dw1_EUD, db1_EU


class _Block:
    """The rows of one expert that are worked on at a time: their extent, their gathering, and scratch buffers used again for every block."""

    def __init__(self, like: Tensor, width: int, contraction: bool = False) -> None:
        self.dtype = compute_dtype(like)
        self._like = like
        self._buffers: dict[str, Tensor] = {}
        if contraction:
            self._max_rows = _MAX_CONTRACTION_ROWS
        else:
            self._max_rows = max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (width * self.dtype.itemsize) // 64 * 64)

    def spans(
        self, expert_offset_E1: Tensor, num_rows: int, num_experts: int, zero_tail: Tensor | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield (expert, start, stop) for every block of rows; rows after the last offset belong to nobody: zero in ``zero_tail``."""
        offsets = expert_offset_E1.tolist()
        if offsets[0] != 0 or offsets[-1] > num_rows or any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
            wanted = f"0 first, then never falling, at most R = {num_rows}"
            raise argument_error("sonic.kernels.reference", "expert_offset_E1", offsets, wanted)
        if zero_tail is not None and offsets[-1] < num_rows:
            zero_tail[offsets[-1] :] = 0
        for expert in range(num_experts):
            first, end = offsets[expert], offsets[expert + 1]
            if first == end:
                continue
            blocks = -(-(end - first) // self._max_rows)
            step = -(-(end - first) // blocks)
            for start in range(first, end, step):
                yield expert, start, min(start + step, end)

    def buffer(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A scratch block (rows, width), in the compute dtype unless told otherwise; contents are left over from the block before."""
        dtype = dtype or self.dtype
        held = self._buffers.get(name)
        if held is None or held.shape[0] < rows:
            held = self._buffers[name] = torch.empty(rows, width, dtype=dtype, device=self._like.device)
        return held[:rows]

    def rows(self, tensor: Tensor, index_R: Tensor | None, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of ``tensor``, gathered by ``index_R`` if there is one, in the compute dtype."""
        if index_R is None:
            return self.widened("rows", tensor[start:stop])
        gathered = self.buffer("gathered", stop - start, tensor.shape[1], tensor.dtype)
        torch.index_select(tensor, 0, index_R[start:stop], out=gathered)
        return self.widened("rows", gathered)

    def widened(self, name: str, block: Tensor) -> Tensor:
        """``block`` itself, or a copy of it in the compute dtype."""
        if block.dtype == self.dtype:
            return block
        return self.buffer(name, *block.shape).copy_(block)

    def output(self, name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Where to compute rows [start, stop) of ``tensor``: in place, or in a scratch block that :meth:`store` then rounds."""
        if tensor.dtype == self.dtype:
            return tensor[start:stop]
        return self.buffer(name, stop - start, tensor.shape[1])

    def store(self, block: Tensor, tensor: Tensor, start: int, stop: int) -> None:
        """Round what :meth:`output` gave into its place; nothing to do if it was computed in place."""
        if tensor.dtype != self.dtype:
            tensor[start:stop] = block

    def column(self, row_scores_R: Tensor, start: int, stop: int) -> Tensor:
        """Row scores as a column (rows, 1) in the compute dtype."""
        return row_scores_R[start:stop, None].to(self.dtype)

    def weights(self, w_Eab: Tensor) -> _Weights:
        """The experts' matrices in the compute dtype, each converted when it is first asked for and dropped with the next."""
        return _Weights(w_Eab, self.dtype)


class _Weights:
    """Indexing by expert gives the (a, b) matrix; ``unbind`` once is cheaper than indexing the 3-D tensor per block."""

    def __init__(self, w_Eab: Tensor, dtype: torch.dtype) -> None:
        self._matrices = w_Eab.unbind(0)
        self._wide = None if w_Eab.dtype == dtype else w_Eab.new_empty(w_Eab.shape[1:], dtype=dtype)
        self._held = -1

    def __getitem__(self, expert: int) -> Tensor:
        if self._wide is None:
            return self._matrices[expert]
        if self._held != expert:
            self._wide.copy_(self._matrices[expert])
            self._held = expert
        return self._wide


class _ExpertSums:
    """Weight and bias gradients of the experts, each summed over its blocks of rows in at least float32 and rounded once.

    Blocks come in the order of the experts. One block, the usual case, is written straight into its place.
    """

    def __init__(self, like: Tensor, dw_Eab: Tensor, db_Ea: Tensor, need_weight: bool, need_bias: bool) -> None:
        self._dw, self._db = dw_Eab, db_Ea
        self._compute = compute_dtype(like)
        self._sum_dtype = torch.promote_types(like.dtype, torch.float32)
        self._seen: set[int] = set()
        self._bias_sums = torch.zeros(db_Ea.shape, dtype=self._sum_dtype, device=like.device)
        self._need_weight, self._need_bias = need_weight, need_bias
        self._sum_ab: Tensor | None = None
        self._summed = -1

    def add_weight(self, expert: int, left_aR: Tensor, right_Rb: Tensor) -> None:
        """Add ``left @ right`` to the weight gradient of ``expert``."""
        out = self._dw[expert]
        if expert not in self._seen:
            self._seen.add(expert)
            if self._compute == out.dtype:
                torch.mm(left_aR, right_Rb, out=out)
            else:
                out.copy_(torch.mm(left_aR, right_Rb, out=self._scratch(out)))
                self._summed = expert
            return
        if out.dtype == self._sum_dtype:
            out.addmm_(left_aR, right_Rb)
            return
        total = self._scratch(out)
        if self._summed != expert:
            total.copy_(out)
            self._summed = expert
        if left_aR.dtype == self._sum_dtype:
            total.addmm_(left_aR, right_Rb)
        else:
            total += torch.mm(left_aR, right_Rb)
        out.copy_(total)

    def add_bias(self, expert: int, rows_Ra: Tensor) -> None:
        """Add the column sums of ``rows`` to the bias gradient of ``expert``."""
        self._bias_sums[expert] += rows_Ra.sum(0, dtype=self._sum_dtype)

    def finish(self) -> None:
        """Round the bias sums into place, and give experts without rows a zero weight gradient."""
        if self._need_bias:
            self._db.copy_(self._bias_sums)
        if self._need_weight:
            for expert in range(self._dw.shape[0]):
                if expert not in self._seen:
                    self._dw[expert].zero_()

    def _scratch(self, like: Tensor) -> Tensor:
        if self._sum_ab is None:
            self._sum_ab = torch.empty(like.shape, dtype=self._sum_dtype, device=like.device)
        return self._sum_ab


def _num_rows(x_TD: Tensor, token_of_row_R: Tensor | None) -> int:
    return x_TD.shape[0] if token_of_row_R is None else token_of_row_R.shape[0]
