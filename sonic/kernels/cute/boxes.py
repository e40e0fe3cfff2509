"""Boxes: 64 rows x 128 bytes on their way between registers and memory, through shared memory, by TMA.

In shared memory a box lies in the 128-byte swizzle (16-byte chunk c of row r stands where chunk ``c ^ (r % 8)`` would),
so that neither its rows nor its columns meet in one bank. Registers hold values in the order of
:mod:`sonic.kernels.cute.epilogues`.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync, warp, warpgroup

from sonic.kernels.cute.ragged import ragged, ragged_at

__all__ = ["BOX_BYTES", "BOX_ROWS", "Boxes", "RowBoxes", "WeightBoxes"]

BOX_ROWS = 64
BOX_BYTES = BOX_ROWS * 128

THREADS = 128  # of a warpgroup


class Boxes:
    """What all boxes share: their place in shared memory, and how registers get there and back.

    Args:
        dtype: of the values.
    """

    BUFFERS = 2
    """Boxes of a warpgroup that may be on their way to memory at once."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.columns = 128 * 8 // dtype.width

    def layout(self) -> cute.ComposedLayout:
        """Of one box in shared memory."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        return cute.tile_to_shape(atom, (BOX_ROWS, self.columns), order=(0, 1))

    @cute.jit
    def tensor(self, box: Int32) -> cute.Tensor:
        """The box at a byte address, as TMA wants it."""
        layout = self.layout()
        pointer = cute.make_ptr(self.dtype, box, cute.AddressSpace.smem, assumed_align=1024)
        return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=self.dtype), layout.outer)

    @cute.jit
    def at(self, box: Int32, row: Int32, chunk: Int32, offset: Int32, count: int) -> cute.Tensor:
        """``count`` values from byte ``offset`` of a 16-byte chunk of a row."""
        place = box + row * 128 + (chunk ^ (row % 8)) * 16 + offset
        pointer = cute.make_ptr(self.dtype, place, cute.AddressSpace.smem, assumed_align=count * self.dtype.width // 8)
        return cute.make_tensor(pointer, cute.make_layout(count))

    @cute.jit
    def acquire(self, place: Any, number: int, total: int) -> Int32:
        """The address of the buffer for a warpgroup's next box, once what it held has been read by TMA.

        Args:
            place: of the warpgroup.
            number: of the box in this block of rows.
            total: boxes of a block; where that is odd, its first box meets the buffer that was used last.
        """
        sent = 0 if number == 0 and total % self.BUFFERS else self.BUFFERS - 1
        if place.thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(sent, read=True)
        cute.arch.barrier(barrier_id=place.barrier, number_of_threads=THREADS)
        return place.shared + (number % self.BUFFERS) * BOX_BYTES

    @cute.jit
    def put(self, values: cute.Tensor, box: Int32, thread: Int32) -> None:
        """Write a box of 16-bit values by stmatrix."""
        lane = thread % 32
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        for pair in cutlass.range_constexpr(self.columns // 16):
            packed = cute.make_rmem_tensor(8, self.dtype)
            for i in cutlass.range_constexpr(8):
                packed[i] = values[8 * pair + i].to(self.dtype)
            row = thread // 32 * 16 + lane % 16
            cute.copy(store, packed, self.at(box, row, 2 * pair + lane // 16, Int32(0), 8))

    @cute.jit
    def put_pairs(self, first: cute.Tensor, second: cute.Tensor, part: int, box: Int32, thread: Int32) -> None:
        """Write a box of first, second, first, … values; ``part``: of which half of their columns."""
        for q in cutlass.range_constexpr(self.columns // 16):
            for j in cutlass.range_constexpr(2):
                i = (part * (self.columns // 16) + q) * 4 + 2 * j
                packed = cute.make_rmem_tensor(4, self.dtype)
                packed[0], packed[1] = first[i].to(self.dtype), second[i].to(self.dtype)
                packed[2], packed[3] = first[i + 1].to(self.dtype), second[i + 1].to(self.dtype)
                cute.autovec_copy(packed, self._quad(box, q, j, thread))

    @cute.jit
    def get(self, box: Int32, thread: Int32) -> cute.Tensor:
        """Read a box of 16-bit values into registers."""
        values = cute.make_rmem_tensor(self.columns // 2, Float32)
        lane = thread % 32
        for q in cutlass.range_constexpr(self.columns // 8):
            for j in cutlass.range_constexpr(2):
                row = thread // 32 * 16 + lane // 4 + 8 * j
                packed = cute.make_rmem_tensor(2, self.dtype)
                cute.autovec_copy(self.at(box, row, Int32(q), lane % 4 * 4, 2), packed)
                values[4 * q + 2 * j] = packed[0].to(Float32)
                values[4 * q + 2 * j + 1] = packed[1].to(Float32)
        return values

    @cute.jit
    def get_pairs(self, box: Int32, first: cute.Tensor, second: cute.Tensor, part: int, thread: Int32) -> None:
        """Read a box of first, second, first, … values into one half, ``part``, of each."""
        for q in cutlass.range_constexpr(self.columns // 16):
            for j in cutlass.range_constexpr(2):
                i = (part * (self.columns // 16) + q) * 4 + 2 * j
                packed = cute.make_rmem_tensor(4, self.dtype)
                cute.autovec_copy(self._quad(box, q, j, thread), packed)
                first[i], second[i] = packed[0].to(Float32), packed[1].to(Float32)
                first[i + 1], second[i + 1] = packed[2].to(Float32), packed[3].to(Float32)

    @cute.jit
    def _quad(self, box: Int32, q: int, j: int, thread: Int32) -> cute.Tensor:
        """Four 16-bit values that a thread has of 16 columns, or two of 32 bits of 8, in its row of half ``j``."""
        lane = thread % 32
        row = thread // 32 * 16 + lane // 4 + 8 * j
        return self.at(box, row, 2 * q + lane % 4 // 2, lane % 2 * 8, 64 // self.dtype.width)

    @cute.jit
    def publish(self, place: Any) -> None:
        """All threads of the warpgroup have written their boxes, and TMA may read them."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=place.barrier, number_of_threads=THREADS)

    @cute.jit
    def commit(self, thread: Int32) -> None:
        """What was stored since the last time is one group, for which :meth:`acquire` waits as a whole."""
        if thread // 32 == 0:
            cute.arch.cp_async_bulk_commit_group()


class RowBoxes(Boxes):
    """Boxes of a matrix (rows, columns) whose rows are grouped by expert; stores leave out the rows of others."""

    @cute.jit
    def host_store(self, matrix: cute.Tensor, parts: int = 1) -> tuple:
        """``matrix``: columns contiguous; ``parts``: halves of the columns, that boxes do not cross."""
        atom, tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), ragged(matrix, parts), self.layout(), (BOX_ROWS, self.columns)
        )
        return atom, tensor

    @cute.jit
    def host_load(self, matrix: cute.Tensor, parts: int = 1) -> tuple:
        """As for a store."""
        width = matrix.shape[1] // parts
        view = cute.make_tensor(
            matrix.iterator, cute.make_layout((matrix.shape[0], width, parts), stride=(matrix.stride[0], 1, width))
        )
        atom, tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), view, self.layout(), (BOX_ROWS, self.columns)
        )
        return atom, tensor

    @cute.jit
    def store(self, args: tuple, box: Int32, row: Int32, end: Int32, column: Int32, part: int, thread: Int32) -> None:
        """Send a published box to (row, column) of a part; rows from ``end`` on stay as they are."""
        if thread // 32 == 0:
            if row < end:
                rows = cute.domain_offset((0, column), ragged_at(args[1], row, end)[None, None, part])
                target = cute.local_tile(rows, (BOX_ROWS, self.columns), (0, 0))
                source, into = cpasync.tma_partition(
                    args[0],
                    0,
                    cute.make_layout(1),
                    cute.group_modes(self.tensor(box), 0, 2),
                    cute.group_modes(target, 0, 2),
                )
                cute.copy(args[0], source, into)

    @cute.jit
    def load(self, args: tuple, box: Int32, row: Int32, column: Int32, part: int, loaded: Any) -> None:
        """Fetch a box from (row, column) of a part, of whichever experts; the barrier counts its bytes."""
        rows = cute.domain_offset((row, column), args[1][None, None, part])
        target = cute.local_tile(rows, (BOX_ROWS, self.columns), (0, 0))
        into, source = cpasync.tma_partition(
            args[0], 0, cute.make_layout(1), cute.group_modes(self.tensor(box), 0, 2), cute.group_modes(target, 0, 2)
        )
        cute.copy(args[0], source, into, tma_bar_ptr=loaded)


class WeightBoxes(Boxes):
    """Boxes of the gradient of a weight (E, rows, columns): stored, or added to what is there.

    Args:
        dtype: of the gradient.
        adds: add, which needs float32.
    """

    def __init__(self, dtype: Any, adds: bool) -> None:
        super().__init__(dtype)
        self.adds = adds

    @cute.jit
    def host_store(self, weight: cute.Tensor) -> tuple:
        """``weight``: (E, rows, columns)."""
        view = cute.make_tensor(weight.iterator, cute.select(weight.layout, mode=[1, 2, 0]))
        copy = cpasync.CopyReduceBulkTensorTileS2GOp if self.adds else cpasync.CopyBulkTensorTileS2GOp
        atom, tensor = cpasync.make_tiled_tma_atom(copy(), view, self.layout(), (BOX_ROWS, self.columns))
        return atom, tensor

    @cute.jit
    def put(self, values: cute.Tensor, box: Int32, thread: Int32) -> None:
        """Write a box."""
        if cutlass.const_expr(self.dtype.width == 16):
            super().put(values, box, thread)
        else:
            for q in cutlass.range_constexpr(self.columns // 8):
                for j in cutlass.range_constexpr(2):
                    pair = cute.make_rmem_tensor(2, self.dtype)
                    pair[0], pair[1] = values[4 * q + 2 * j], values[4 * q + 2 * j + 1]
                    cute.autovec_copy(pair, self._quad(box, q, j, thread))

    @cute.jit
    def store(self, args: tuple, box: Int32, expert: Int32, row: Int32, column: Int32, thread: Int32) -> None:
        """Send a published box to (expert, row, column)."""
        if thread // 32 == 0:
            rows = cute.domain_offset((row, column), args[1][None, None, expert])
            target = cute.local_tile(rows, (BOX_ROWS, self.columns), (0, 0))
            source, into = cpasync.tma_partition(
                args[0],
                0,
                cute.make_layout(1),
                cute.group_modes(self.tensor(box), 0, 2),
                cute.group_modes(target, 0, 2),
            )
            cute.copy(args[0], source, into)
