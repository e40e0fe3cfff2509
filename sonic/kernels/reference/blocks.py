"""Blocks of rows, and what the ops of this folder do with them: gather, widen, round back, sum over an expert.

16-bit dtypes: where the processor multiplies them fast, operands stay 16-bit (``torch.mm`` accumulates in float32);
elsewhere a block and its weights are widened to float32 on the way, which is faster there and rounds less.
:func:`compute_dtype` decides, by chip.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sonic.shapes import argument_error

__all__ = ["Block", "ExpertSums", "compute_dtype"]

# Working set of a block of rows. Larger blocks make better matrix multiplies; beyond this nothing was gained.
_BLOCK_BYTES = 16 << 20
# Fewer rows than this make a matrix multiply wait for its weights.
_MIN_BLOCK_ROWS = 256
# 16-bit products are rounded once per block, so blocks that are summed over an expert are few and large.
_MAX_16BIT_CONTRACTION_ROWS = 8192


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor`` is multiplied: its own, or float32 for 16 bits on a CPU that is slow at them."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor.dtype
    return tensor.dtype if tensor.dtype in _fast_16bit_dtypes() else torch.float32


@functools.cache  # the processor does not change under a process
def _fast_16bit_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that this CPU multiplies faster than float32, from what Linux says of it.

    AMX is fast, and so is AMD's AVX512-BF16 (4 times float32); Intel's AVX512-BF16 without AMX does half of what its
    float32 units do. Where Linux says nothing, 16 bits are taken to be fast.
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


class Block:
    """The rows of one expert that are worked on at a time.

    Their extent, their gathering, and scratch buffers used again for every block.
    """

    def __init__(self, like: Tensor, width: int, contraction: bool = False) -> None:
        self.dtype = compute_dtype(like)
        self._like = like
        self._buffers: dict[str, Tensor] = {}
        self._max_rows = max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (max(width, 1) * self.dtype.itemsize))
        if contraction and self.dtype.itemsize == 2:
            self._max_rows = max(_MAX_16BIT_CONTRACTION_ROWS, self._max_rows)

    def spans(
        self, expert_offset_E1: Tensor, num_rows: int, num_experts: int, zero_tail: Tensor | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield (expert, start, stop) for every block of rows.

        Rows after the last offset belong to no expert: they are set to zero in ``zero_tail``, if that is given.
        """
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
        """A scratch block (rows, width), in the compute dtype unless told otherwise.

        Contents are left over from the block before.
        """
        dtype = dtype or self.dtype
        held = self._buffers.get(name)
        if held is None or held.shape[0] < rows:
            held = self._buffers[name] = torch.empty(rows, width, dtype=dtype, device=self._like.device)
        return held[:rows]

    def rows(self, tensor: Tensor, index_R: Tensor | None, start: int, stop: int, name: str = "rows") -> Tensor:
        """Rows [start, stop) of ``tensor``, gathered by ``index_R`` if there is one, in the compute dtype."""
        if index_R is None:
            return self.widened(name, tensor[start:stop])
        gathered = self.buffer(name + " gathered", stop - start, tensor.shape[1], tensor.dtype)
        torch.index_select(tensor, 0, index_R[start:stop], out=gathered)
        return self.widened(name, gathered)

    def widened(self, name: str, block: Tensor) -> Tensor:
        """``block`` itself, or a copy of it in the compute dtype."""
        if block.dtype == self.dtype:
            return block
        return self.buffer(name, *block.shape).copy_(block)

    def output(self, name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Where to compute rows [start, stop) of ``tensor``.

        In place, or in a scratch block that :meth:`store` then rounds.
        """
        if tensor.dtype == self.dtype:
            return tensor[start:stop]
        return self.buffer(name, stop - start, tensor.shape[1])

    def store(self, block: Tensor, tensor: Tensor, start: int, stop: int) -> None:
        """Round what :meth:`output` gave into its place; nothing to do if it was computed in place."""
        if tensor.dtype != self.dtype:
            tensor[start:stop] = block

    def project(self, rows_ra: Tensor, w_ba: Tensor, bias_Eb: Tensor | None, expert: int, out_rb: Tensor) -> None:
        """``out = rows @ w.T + bias[expert]``, rounded once."""
        if bias_Eb is None:
            torch.mm(rows_ra, w_ba.t(), out=out_rb)
        else:
            torch.addmm(bias_Eb[expert].to(self.dtype), rows_ra, w_ba.t(), out=out_rb)

    def column(self, row_scores_R: Tensor, start: int, stop: int) -> Tensor:
        """Row scores as a column (rows, 1) in the compute dtype."""
        return row_scores_R[start:stop, None].to(self.dtype)

    def weights(self, w_Eab: Tensor) -> _Weights:
        """The experts' matrices in the compute dtype, one at a time."""
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


class ExpertSums:
    """Weight and bias gradients of the experts, each summed over its blocks of rows in at least float32 and rounded
    once.

    Blocks come expert by expert, in ascending order. Where the sum has the gradient's dtype it is built in its place.
    """

    def __init__(
        self,
        like: Tensor,
        shape: torch.Size,
        need_weight: bool,
        need_bias: bool,
        main_grad_Eab: Tensor | None = None,
    ) -> None:
        """For weights of ``shape`` (E, a, b) with gradients in the dtype of ``like``, or added to ``main_grad_Eab``.

        Of what is not needed, an empty tensor comes out.
        """
        num_experts, width_a, width_b = shape
        self._main_grad_Eab = main_grad_Eab
        need_weight = need_weight and main_grad_Eab is None
        self._dw_Eab = like.new_empty(num_experts if need_weight else 0, width_a, width_b)
        sum_dtype = torch.promote_types(like.dtype, torch.float32)
        self._db_Ea = like.new_zeros(num_experts if need_bias else 0, width_a, dtype=sum_dtype)
        in_place = not need_weight or like.dtype == sum_dtype
        self._sum_ab = None if in_place else like.new_empty(width_a, width_b, dtype=sum_dtype)
        self._expert = -1  # whose sum is being built
        self._is_pending = False  # and whether it stands in the scratch sum, still to be rounded into place

    def add_weight(self, expert: int, left_aR: Tensor, right_Rb: Tensor) -> None:
        """Add ``left @ right`` to the weight gradient of ``expert``."""
        if self._main_grad_Eab is not None:
            total_ab = self._main_grad_Eab[expert]
            torch.addmm(total_ab, left_aR.to(total_ab.dtype), right_Rb.to(total_ab.dtype), out=total_ab)
            return
        is_first = expert != self._expert
        if is_first:
            self._move_to(expert)
        place_ab, sum_ab = self._dw_Eab[expert], self._sum_ab
        if sum_ab is None:
            sum_ab = place_ab
        elif left_aR.dtype != sum_ab.dtype:  # 16-bit products: one block is final, further ones are summed beside it
            if is_first:
                torch.mm(left_aR, right_Rb, out=place_ab)
                return
            if not self._is_pending:
                sum_ab.copy_(place_ab)
            sum_ab += torch.mm(left_aR, right_Rb)
            self._is_pending = True
            return
        else:
            self._is_pending = True
        if is_first:
            torch.mm(left_aR, right_Rb, out=sum_ab)
        else:
            torch.addmm(sum_ab, left_aR, right_Rb, out=sum_ab)

    def add_bias(self, expert: int, rows_Ra: Tensor, scores_R1: Tensor | None = None) -> None:
        """Add the column sums of ``scores * rows`` to the bias gradient of ``expert``.

        As products and a sum, which torch adds up in pairs: a matrix product's error would grow with the rows. Scores
        may have any dtype; they are not rounded to that of the rows.
        """
        wide_Ra = rows_Ra.to(self._db_Ea.dtype)
        self._db_Ea[expert] += (wide_Ra if scores_R1 is None else wide_Ra * scores_R1.to(wide_Ra.dtype)).sum(0)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The weight gradients (E, a, b) and bias gradients (E, a); experts without rows have zeros."""
        self._move_to(self._dw_Eab.shape[0])
        return self._dw_Eab, self._db_Ea.to(self._dw_Eab.dtype)

    def _move_to(self, expert: int) -> None:
        if self._is_pending and self._sum_ab is not None:
            self._dw_Eab[self._expert].copy_(self._sum_ab)
            self._is_pending = False
        if expert > self._expert + 1:
            self._dw_Eab[self._expert + 1 : expert] = 0
        self._expert = expert
