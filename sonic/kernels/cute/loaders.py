"""Operands on their way from memory into the ring of slots in shared memory: by TMA, or row by row by cp.async.

An operand's tile is ``width`` values by :data:`STEP` along the contraction, 16-bit, in the 128-byte swizzle that wgmma
reads: k-major (the contraction is contiguous: rows of X, A and dH, and the weights of a forward pass) or mn-major (the
other way is: weights of a backward pass, and both operands of a contraction over rows).

Every loader has the same three parts: ``host`` makes what travels into the kernel, ``prepare`` what stays the same over
the steps of a tile, ``load`` issues the copies of one step into one slot. Where ``by_all_threads`` is true, all threads
of the producing warpgroup do that, and each arrives at the slot's barrier when its copies are done; else one does, and
the barrier counts bytes.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Int16, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from sonic.kernels.cute.ragged import ragged, ragged_at
from sonic.kernels.cute.schedule import Tile

__all__ = [
    "PRODUCERS",
    "STEP",
    "GatheredAlongK",
    "GatheredRows",
    "RowsAlongK",
    "TileRows",
    "Weight",
    "slot_layout",
]

STEP = 64
"""Values of the contraction in a slot: 128 bytes, the swizzle's width."""

PRODUCERS = 128
"""Threads of the warpgroup that loads."""

CHUNK = 8  # values of one cp.async, 16 bytes


def slot_layout(dtype: Any, width: int, slots: int, major: OperandMajorMode) -> cute.ComposedLayout:
    """(width, STEP, slots) in shared memory."""
    kinds = warpgroup.SmemLayoutAtomKind
    is_k = major == OperandMajorMode.K
    atom = warpgroup.make_smem_layout_atom(kinds.K_SW128 if is_k else kinds.MN_SW128, dtype)
    return cute.tile_to_shape(atom, (width, STEP, slots), order=(0, 1, 2) if is_k else (1, 0, 2))


class Operand:
    """What all loaders share.

    Args:
        width: of the tile, across the contraction.
        dtype: 16-bit.
    """

    major = OperandMajorMode.K
    by_all_threads = False

    def __init__(self, width: int, dtype: Any) -> None:
        self.width = width
        self.dtype = dtype

    def layout(self, slots: int) -> cute.ComposedLayout:
        """Of the ring in shared memory."""
        return slot_layout(self.dtype, self.width, slots, self.major)

    @property
    def slot_bytes(self) -> int:
        """Of one slot."""
        return self.width * STEP * self.dtype.width // 8

    def host(self, matrix: cute.Tensor, index: Any) -> tuple[Any, ...]:
        """What travels into the kernel."""
        raise NotImplementedError

    def prepare(self, args: tuple[Any, ...], tile: Tile, first: Int32, end: Int32, thread: Int32) -> Any:
        """What stays the same over the steps of a tile."""
        raise NotImplementedError

    def load(
        self, args: tuple[Any, ...], prepared: Any, step: Int32, shared: cute.Tensor, slot: Int32, full: Any
    ) -> None:
        """Issue the copies of one step."""
        raise NotImplementedError


class TileRows(Operand):
    """Rows that stand in order, by TMA.

    A tile reads on beyond its expert's last row: what comes of those rows is not stored.
    """

    @cute.jit
    def host(self, matrix: cute.Tensor, index: Any) -> tuple:
        """``matrix``: (rows, k)."""
        one = cute.select(self.layout(1), mode=[0, 1])
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), matrix, one, (self.width, STEP))
        return atom, tensor

    @cute.jit
    def prepare(self, args: tuple, tile: Tile, first: Int32, end: Int32, thread: Int32) -> cute.Tensor:
        """``first``: the tile's first row; ``end``: that after the expert's last."""
        return cute.local_tile(cute.domain_offset((first, 0), args[1]), (self.width, STEP), (0, None))

    @cute.jit
    def load(self, args: tuple, prepared: Any, step: Int32, shared: cute.Tensor, slot: Int32, full: Any) -> None:
        """Issue the copies of one step."""
        into, source = cpasync.tma_partition(
            args[0], 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(prepared, 0, 2)
        )
        cute.copy(args[0], source[None, step], into[None, slot], tma_bar_ptr=full)


class GatheredRows(Operand):
    """Rows named by an index, k contiguous: each thread has the same rows in every step, so it keeps their addresses.

    Eight threads copy the 128 bytes that a step needs of a row. Rows beyond the expert's last, and values beyond k,
    become zeros without being read.
    """

    by_all_threads = True

    @cute.jit
    def host(self, matrix: cute.Tensor, index: cute.Tensor) -> tuple:
        """``matrix``: (T, k); ``index``: (R,) int32, row -> token."""
        return matrix, index

    @cute.jit
    def prepare(self, args: tuple, tile: Tile, first: Int32, end: Int32, thread: Int32) -> tuple:
        """As in :class:`TileRows`."""
        matrix, index = args
        num_rows = self.width * STEP // CHUNK // PRODUCERS
        token = cute.make_rmem_tensor(num_rows, Int32)
        for i in cutlass.range_constexpr(num_rows):
            row = first + thread // 8 + i * (PRODUCERS // 8)
            token[i] = Int32(-1)
            if row < end:
                token[i] = index[row]
        return token, thread

    @cute.jit
    def load(self, args: tuple, prepared: tuple, step: Int32, shared: cute.Tensor, slot: Int32, full: Any) -> None:
        """As in :class:`TileRows`."""
        matrix, _ = args
        token, thread = prepared
        row, chunk = thread // 8, thread % 8
        column = step * STEP + chunk * CHUNK
        target = slot * self.slot_bytes + row * 128 + ((chunk ^ (row % 8)) * 16)
        for i in cutlass.range_constexpr(cute.size(token)):
            place = target + i * (PRODUCERS // 8) * 128
            _copy_chunk(matrix, token[i], column, shared, place)


class RowsAlongK(Operand):
    """Rows that stand in order, by TMA, as the k of a contraction: those after the expert's last become zeros."""

    major = OperandMajorMode.MN

    @cute.jit
    def host(self, matrix: cute.Tensor, index: Any) -> tuple:
        """``matrix``: (R, width)."""
        rows = ragged(matrix)
        turned = cute.make_tensor(rows.iterator, cute.select(rows.layout, mode=[1, 0, 2, 3, 4]))
        one = cute.select(self.layout(1), mode=[0, 1])
        atom, tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), turned, one, (self.width, STEP))
        return atom, tensor

    @cute.jit
    def prepare(self, args: tuple, tile: Tile, first: Int32, end: Int32, thread: Int32) -> cute.Tensor:
        """``first``: the tile's first column."""
        turned = cute.make_tensor(args[1].iterator, cute.select(args[1].layout, mode=[1, 0, 2, 3, 4]))
        rows = ragged_at(turned, tile.row_begin, tile.row_end)[None, None, 0]
        columns = cute.make_tensor(rows.iterator, cute.select(rows.layout, mode=[1, 0]))
        return cute.local_tile(cute.domain_offset((first, 0), columns), (self.width, STEP), (0, None))

    @cute.jit
    def load(self, args: tuple, prepared: Any, step: Int32, shared: cute.Tensor, slot: Int32, full: Any) -> None:
        """As in :class:`TileRows`."""
        into, source = cpasync.tma_partition(
            args[0], 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(prepared, 0, 2)
        )
        cute.copy(args[0], source[None, step], into[None, slot], tma_bar_ptr=full)


class GatheredAlongK(Operand):
    """Rows named by an index as the k of a contraction, so they change from step to step.

    Each warp copies 16 of a step's 64 rows; half of its lanes hold the index of one each, read a step ahead, and hand
    them round by shuffles. Rows after the expert's last become zeros.
    """

    major = OperandMajorMode.MN
    by_all_threads = True

    @cute.jit
    def host(self, matrix: cute.Tensor, index: cute.Tensor) -> tuple:
        """``matrix``: (T, width); ``index``: (R,) int32, row -> token."""
        return matrix, index

    @property
    def _rows_at_once(self) -> int:
        """Rows that one instruction of a warp copies."""
        return 32 * CHUNK // self.width

    @cute.jit
    def prepare(self, args: tuple, tile: Tile, first: Int32, end: Int32, thread: Int32) -> tuple:
        """``first``: the tile's first column."""
        ahead = cute.make_rmem_tensor(1, Int32)
        ahead[0] = self._token(args[1], tile.row_begin, tile.row_end, thread)
        return ahead, thread, first, tile.row_begin, tile.row_end

    @cute.jit
    def load(self, args: tuple, prepared: tuple, step: Int32, shared: cute.Tensor, slot: Int32, full: Any) -> None:
        """As in :class:`TileRows`."""
        matrix, index = args
        ahead, thread, first, begin, end = prepared
        at_once = self._rows_at_once
        lane, warp = thread % 32, thread // 32
        chunk = lane % (self.width // CHUNK)
        column = first + chunk * CHUNK
        for i in cutlass.range_constexpr(16 // at_once):
            mine = lane // (self.width // CHUNK)
            token = cute.arch.shuffle_sync(ahead[0], i * at_once + mine)
            row = warp * at_once + mine + i * 4 * at_once
            place = slot * self.slot_bytes + (chunk // 8) * (STEP * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16
            _copy_chunk(matrix, token, column, shared, place)
        ahead[0] = self._token(index, begin + (step + 1) * STEP, end, thread)

    @cute.jit
    def _token(self, index: cute.Tensor, begin: Int32, end: Int32, thread: Int32) -> Int32:
        """The token of the row that this lane looks after in the step that begins at row ``begin``; -1: no row."""
        at_once = self._rows_at_once
        lane, warp = thread % 32, thread // 32
        row = begin + warp * at_once + lane % at_once + lane // at_once * (4 * at_once)
        token = Int32(-1)
        if (lane < 16) & (row < end):
            token = index[row]
        return token


class Weight(Operand):
    """One expert's weight, by TMA, shared among the blocks of a cluster by multicast: each loads a share of the tile.

    Args:
        width, dtype: as in :class:`Operand`.
        major: k-major or mn-major, as the weight lies.
        cluster: blocks that share it.
        halves: ``"concatenated"`` or ``"interleaved"`` for gate and up rows: the tile is half gate columns, then half
            up columns, whichever way the weight mixes them, so that a thread's sums hold both of a pair. None: one
            kind of rows.
    """

    def __init__(
        self, width: int, dtype: Any, major: OperandMajorMode, cluster: int, halves: str | None = None
    ) -> None:
        super().__init__(width, dtype)
        self.major, self.cluster, self.halves = major, cluster, halves
        self.parts = 1 if halves is None else 2

    @cute.jit
    def _view(self, weight: cute.Tensor) -> cute.Tensor:
        """(n, k, E, parts) of (E, rows, columns): n are the rows if the weight is k-major, else the columns."""
        num_experts, rows, columns = weight.shape
        expert, row, _ = weight.stride
        if cutlass.const_expr(self.major == OperandMajorMode.MN):
            shape, stride = (columns, rows, num_experts, 1), (1, row, expert, 0)
        elif cutlass.const_expr(self.halves == "concatenated"):
            shape, stride = (rows // 2, columns, num_experts, 2), (row, 1, expert, rows // 2 * row)
        elif cutlass.const_expr(self.halves == "interleaved"):
            shape, stride = (rows // 2, columns, num_experts, 2), (2 * row, 1, expert, row)
        else:
            shape, stride = (rows, columns, num_experts, 1), (row, 1, expert, 0)
        return cute.make_tensor(weight.iterator, cute.make_layout(shape, stride=stride))

    @cute.jit
    def host(self, weight: cute.Tensor, index: Any) -> tuple:
        """``weight``: (E, rows, columns)."""
        plain, shared = cpasync.CopyBulkTensorTileG2SOp, cpasync.CopyBulkTensorTileG2SMulticastOp
        part = slot_layout(self.dtype, self.width // self.parts, 1, self.major)
        atom, tensor = cpasync.make_tiled_tma_atom(
            plain() if cutlass.const_expr(self.cluster == 1) else shared(),
            self._view(weight),
            cute.select(part, mode=[0, 1]),
            (self.width // self.parts, STEP),
            num_multicast=self.cluster,
        )
        return atom, tensor

    @cute.jit
    def prepare(self, args: tuple, tile: Tile, first: Int32, end: Int32, thread: Int32) -> cute.Tensor:
        """The expert's tile of columns: (width / parts, STEP, steps, parts)."""
        columns = args[1][None, None, tile.expert, None]
        return cute.local_tile(columns, (self.width // self.parts, STEP), (tile.tile_n, None, None))

    @cute.jit
    def load(self, args: tuple, prepared: Any, step: Int32, shared: cute.Tensor, slot: Int32, full: Any) -> None:
        """As in :class:`TileRows`."""
        rank, mask = Int32(0), None
        if cutlass.const_expr(self.cluster > 1):
            rank, mask = cute.arch.block_idx_in_cluster(), Int16((1 << self.cluster) - 1)
        for part in cutlass.range_constexpr(self.parts):
            place = cute.local_tile(shared, (self.width // self.parts, STEP), (part, 0, None))
            into, source = cpasync.tma_partition(
                args[0],
                rank,
                cute.make_layout(self.cluster),
                cute.group_modes(place, 0, 2),
                cute.group_modes(prepared[None, None, None, part], 0, 2),
            )
            cute.copy(args[0], source[None, step], into[None, slot], tma_bar_ptr=full, mcast_mask=mask)


@cute.jit
def _copy_chunk(matrix: cute.Tensor, row: Int32, column: Int32, shared: cute.Tensor, place: Int32) -> None:
    """16 bytes of a row by cp.async to byte ``place`` of the ring; zeros where ``row`` is -1 or the columns end."""
    exists = (row >= 0) & (column < matrix.shape[1])
    offset, num_bytes = Int64(0), Int32(0)
    if exists:
        offset = (Int64(row) * matrix.stride[0] + column) * (matrix.element_type.width // 8)
        num_bytes = Int32(16)
    cute.arch.inline_ptx(  # cute.copy with a predicate leaves the target as it is instead of filling in zeros
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
        read_only_args=[shared.iterator.toint() + place, matrix.iterator.toint() + offset, num_bytes],
    )
