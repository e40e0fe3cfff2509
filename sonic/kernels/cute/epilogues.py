"""What becomes of a tile's sums: composed from a few steps, one class for each fused tail.

A warpgroup finishes 64 rows at a time (a "block" of rows) by all columns of its tile, which it has in registers: lane l
of warp w holds rows ``16 w + l // 4`` and 8 more, of every 8 columns those at ``2 (l % 4)`` and the next, four values
per 8 columns in the order (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1).

Steps: :func:`add_row_vector` (bias), :func:`scale_rows` (score), a pair map (activation, derivative; see
:mod:`sonic.kernels.cute.activations`), :func:`reduce_rows` (dS), and boxes that carry tiles between registers and
memory (:mod:`sonic.kernels.cute.boxes`).

Every epilogue has the same parts: ``host`` makes what travels into the kernel, ``begin`` starts what can be fetched
while the main loop runs, ``finish`` deals with one block of rows, ``drain`` waits for what is still on its way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

from sonic.kernels.cute.activations import GATED, PLAIN
from sonic.kernels.cute.boxes import BOX_BYTES, Boxes, RowBoxes, WeightBoxes
from sonic.kernels.cute.schedule import Tile

__all__ = ["ActivationPair", "DerivativePair", "Place", "Store", "StoreWeight"]

_QUAD = 4  # lanes that hold one row together


class Place(NamedTuple):
    """Where a warpgroup stands.

    Attributes:
        tile: of the cluster.
        row: first row of this thread block's tile; of the weight gradient for a contraction.
        is_nobodys: the rows belong to no expert.
        barrier: number of the named barrier of this warpgroup.
        thread: in the warpgroup.
        shared: byte address of the shared memory of this warpgroup's epilogue.
        loaded: its barrier for what ``begin`` fetches.
        parity: of that barrier in this turn.
    """

    tile: Tile
    row: Int32
    is_nobodys: cutlass.Boolean
    barrier: Int32
    thread: Int32
    shared: Int32
    loaded: cute.Pointer
    parity: Int32


@cute.jit
def add_row_vector(values: cute.Tensor, vector: cute.Tensor, first: Int32, step: int, end: Int32, place: Place) -> None:
    """Add the expert's ``vector[first + step * column]`` to every row, for columns whose entry lies before ``end``.

    Rows of no expert get nothing.
    """
    column = 2 * (place.thread % _QUAD)
    end = cutlass.select_(place.is_nobodys, Int32(0), end)
    for q in cutlass.range_constexpr(cute.size(values) // 4):
        for i in cutlass.range_constexpr(2):
            at = first + step * (8 * q + column + i)
            if at < end:
                value = vector[place.tile.expert, at].to(Float32)
                values[4 * q + i] += value
                values[4 * q + 2 + i] += value


@cute.jit
def row_values(vector: Any, row: Int32, end: Int32, thread: Int32) -> cute.Tensor:
    """The entries of this thread's two rows of the block at ``row``; zeros from ``end`` on; ones without a vector."""
    values = cute.make_rmem_tensor(2, Float32)
    values.fill(1.0)
    if cutlass.const_expr(vector is not None):
        for j in cutlass.range_constexpr(2):
            at = row + _row_of(thread) + 8 * j
            values[j] = Float32(0.0)
            if at < end:
                values[j] = vector[at]
    return values


@cute.jit
def scale_rows(values: cute.Tensor, factors: cute.Tensor) -> None:
    """Multiply each row by its factor."""
    for i in cutlass.range_constexpr(cute.size(values)):
        values[i] *= factors[i // 2 % 2]


@cute.jit
def reduce_rows(sums: cute.Tensor, out: cute.Tensor, part: Int32, row: Int32, end: Int32, thread: Int32) -> None:
    """Add up each row's sums over the lanes that hold it, and store them as ``out[part, row]``."""
    for j in cutlass.range_constexpr(2):
        total = sums[j]
        total += cute.arch.shuffle_sync_bfly(total, 1)
        total += cute.arch.shuffle_sync_bfly(total, 2)
        at = row + _row_of(thread) + 8 * j
        if (thread % _QUAD == 0) & (at < end):
            out[part, at] = total


@cute.jit
def _row_of(thread: Int32) -> Int32:
    return thread // 32 * 16 + thread % 32 // _QUAD


class Epilogue:
    """What epilogues share: they fetch nothing, and keep two boxes of shared memory for each warpgroup."""

    fetched_bytes = 0
    """Bytes that ``begin`` fetches for each turn of a warpgroup."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one warpgroup."""
        return Boxes.BUFFERS * BOX_BYTES + self.fetched_bytes

    def host(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """What travels into the kernel."""
        raise NotImplementedError

    def finish(self, args: tuple[Any, ...], sums: cute.Tensor, block: Int32, place: Place, number: int) -> None:
        """Deal with a block of rows."""
        raise NotImplementedError

    @cute.jit
    def begin(self, args: tuple, place: Place, step: int, first: Int32) -> None:
        """Start what can be fetched while the main loop runs; blocks begin at ``first``, ``first + step``, … ."""

    @cute.jit
    def drain(self, thread: Int32) -> None:
        """Before the thread block ends: everything that was sent has been read."""
        if thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)


class Store(Epilogue):
    """Rows as they are, with a bias and a score per row where there are any.

    Args:
        dtype: of the rows.
        tile_n: columns of the tile.
    """

    def __init__(self, dtype: Any, tile_n: int) -> None:
        self.boxes = RowBoxes(dtype)
        self.tile_n = tile_n

    @cute.jit
    def host(self, tensors: tuple) -> tuple:
        """Of (out (R, n), bias (E, n) or None, scores (R,) float32 or None)."""
        out, bias, scores = tensors
        return self.boxes.host_store(out), bias, scores

    @cute.jit
    def finish(self, args: tuple, sums: cute.Tensor, block: Int32, place: Place, number: int) -> None:
        """Deal with a block of rows.

        Args:
            args: by ``host``.
            sums: this thread's, as the module says.
            block: first row of the block in the tile.
            place: of the warpgroup.
            number: of the block among this warpgroup's.
        """
        out, bias, scores = args
        row, end, thread = place.row + block, place.tile.row_end, place.thread
        # Rows of no expert are zeros, whatever their scores are.
        factors = row_values(scores, row, cutlass.select_(place.is_nobodys, Int32(0), end), thread)
        columns = self.boxes.columns
        for s in cutlass.range_constexpr(self.tile_n // columns):
            column = place.tile.tile_n * self.tile_n + s * columns
            values = take(sums, s * columns, columns)
            if cutlass.const_expr(bias is not None):
                add_row_vector(values, bias, column, 1, bias.shape[1], place)
            if cutlass.const_expr(scores is not None):
                scale_rows(values, factors)
            box = self.boxes.acquire(place, s, self.tile_n // columns)
            self.boxes.put(values, box, thread)
            self.boxes.publish(place)
            self.boxes.store(out, box, row, end, column, 0, thread)
            self.boxes.commit(thread)


class StoreWeight(Epilogue):
    """A weight's gradient, stored or added.

    Args:
        dtype: of the gradient.
        tile_n: columns of the tile.
        adds: add it to what is there, in float32.
    """

    def __init__(self, dtype: Any, tile_n: int, adds: bool) -> None:
        self.boxes = WeightBoxes(dtype, adds)
        self.tile_n = tile_n

    @cute.jit
    def host(self, tensors: tuple) -> tuple:
        """Of (gradient (E, rows, columns),)."""
        return self.boxes.host_store(tensors[0])

    @cute.jit
    def finish(self, args: tuple, sums: cute.Tensor, block: Int32, place: Place, number: int) -> None:
        """As in :class:`Store`."""
        columns = self.boxes.columns
        for s in cutlass.range_constexpr(self.tile_n // columns):
            box = self.boxes.acquire(place, s, self.tile_n // columns)
            self.boxes.put(take(sums, s * columns, columns), box, place.thread)
            self.boxes.publish(place)
            column = place.tile.tile_n * self.tile_n + s * columns
            self.boxes.store(args, box, place.tile.expert, place.row + block, column, place.thread)
            self.boxes.commit(place.thread)


class Pairs(Epilogue):
    """What the epilogues with H share: how its columns stand to units.

    Args:
        dtype: of H and of A.
        units: of the tile, columns of A.
        activation: its name.
        glu_layout: how gate and up share the columns of H; None: not gated, H has a column per unit.
    """

    def __init__(self, dtype: Any, units: int, activation: str, glu_layout: str | None) -> None:
        self.boxes = RowBoxes(dtype)
        self.units, self.activation, self.glu_layout = units, activation, glu_layout
        self.parts = 2 if glu_layout == "concatenated" else 1
        self.boxes_of_h = 1 if glu_layout is None else 2

    def column_of_h(self, unit: Int32, half: int) -> Int32:
        """Column of H, in its part, where box ``half`` of the units from ``unit`` on begins."""
        return 2 * unit + half * self.boxes.columns if self.glu_layout == "interleaved" else unit

    @cute.jit
    def put_h(self, first: cute.Tensor, second: Any, half: int, box: Int32, thread: Int32) -> None:
        """Write one box of H: ``second`` are the up values where gated."""
        if cutlass.const_expr(self.glu_layout == "interleaved"):
            self.boxes.put_pairs(first, second, half, box, thread)
        elif cutlass.const_expr(half == 0):
            self.boxes.put(first, box, thread)
        else:
            self.boxes.put(second, box, thread)


class ActivationPair(Pairs):
    """H and A of the up projection; A alone where no backward pass follows.

    Args:
        dtype, units, activation, glu_layout: as in :class:`Pairs`.
        stores_h: store H.
    """

    def __init__(self, dtype: Any, units: int, activation: str, glu_layout: str | None, stores_h: bool) -> None:
        super().__init__(dtype, units, activation, glu_layout)
        self.stores_h = stores_h

    @cute.jit
    def host(self, tensors: tuple) -> tuple:
        """Of (H (R, U) or None, A (R, N), b1 (E, U) or None)."""
        h, a, bias = tensors
        stored = None
        if cutlass.const_expr(self.stores_h):
            stored = self.boxes.host_store(h, self.parts)
        return stored, self.boxes.host_store(a), bias, a.shape[1]

    @cute.jit
    def finish(self, args: tuple, sums: cute.Tensor, block: Int32, place: Place, number: int) -> None:
        """As in :class:`Store`."""
        stored, out, bias, width_n = args
        columns = self.boxes.columns
        row, end, thread = place.row + block, place.tile.row_end, place.thread
        boxes = 1 + (self.boxes_of_h if self.stores_h else 0)
        total = self.units // columns * boxes
        for s in cutlass.range_constexpr(self.units // columns):
            unit = place.tile.tile_n * self.units + s * columns
            first = take(sums, s * columns, columns)
            second: Any = None
            if cutlass.const_expr(self.glu_layout is not None):
                second = take(sums, self.units + s * columns, columns)
            if cutlass.const_expr(bias is not None):
                self._add_bias(first, second, bias, unit, width_n, place)
            number = s * boxes
            if cutlass.const_expr(self.stores_h):
                for half in cutlass.range_constexpr(self.boxes_of_h):
                    box = self.boxes.acquire(place, number + half, total)
                    self.put_h(first, second, half, box, thread)
                    self.boxes.publish(place)
                    part = half if self.parts == 2 else 0
                    self.boxes.store(stored, box, row, end, self.column_of_h(unit, half), part, thread)
                    self.boxes.commit(thread)
            a = cute.make_rmem_tensor(columns // 2, Float32)
            for i in cutlass.range_constexpr(columns // 2):
                if cutlass.const_expr(self.glu_layout is None):
                    a[i] = PLAIN[self.activation].value(first[i])
                else:
                    a[i] = GATED[self.activation].value(first[i], second[i])
            box = self.boxes.acquire(place, number + boxes - 1, total)
            self.boxes.put(a, box, thread)
            self.boxes.publish(place)
            self.boxes.store(out, box, row, end, unit, 0, thread)
            self.boxes.commit(thread)

    @cute.jit
    def _add_bias(
        self, first: cute.Tensor, second: Any, bias: cute.Tensor, unit: Int32, width_n: Int32, place: Place
    ) -> None:
        if cutlass.const_expr(self.glu_layout == "interleaved"):
            add_row_vector(first, bias, 2 * unit, 2, 2 * width_n, place)
            add_row_vector(second, bias, 2 * unit + 1, 2, 2 * width_n, place)
        else:
            add_row_vector(first, bias, unit, 1, width_n, place)
            if cutlass.const_expr(second is not None):
                add_row_vector(second, bias, width_n + unit, 1, 2 * width_n, place)


class DerivativePair(Pairs):
    """From dA' and H: dH in the place of H in shared memory, score * A, and the row sums dS = <dA', A>.

    H is fetched while the main loop runs, as soon as the warpgroup's last tile has left shared memory.

    Args:
        dtype, units, activation, glu_layout: as in :class:`Pairs`.
        blocks: of 64 rows that a warpgroup has of a tile.
    """

    def __init__(self, dtype: Any, units: int, activation: str, glu_layout: str | None, blocks: int) -> None:
        super().__init__(dtype, units, activation, glu_layout)
        self.blocks = blocks
        self.slices = units // self.boxes.columns
        self.fetched_bytes = blocks * self.slices * self.boxes_of_h * BOX_BYTES

    @cute.jit
    def host(self, tensors: tuple) -> tuple:
        """Of (H (R, U), dH (R, U), score * A (R, N), scores (R,) float32 or None, dS (column tiles, R) float32)."""
        h, dh, scaled_a, scores, parts = tensors
        return (
            self.boxes.host_load(h, self.parts),
            self.boxes.host_store(dh, self.parts),
            self.boxes.host_store(scaled_a),
            scores,
            parts,
        )

    def _box_of_h(self, place: Place, block: int, s: int, half: int) -> Int32:
        number = (block * self.slices + s) * self.boxes_of_h + half
        return place.shared + (Boxes.BUFFERS + number) * BOX_BYTES

    @cute.jit
    def begin(self, args: tuple, place: Place, step: int, first: Int32) -> None:
        """Fetch the tile of H; blocks begin at rows ``first``, ``first + step``, … of the tile."""
        if place.thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(place.loaded, self.fetched_bytes)
            for block in cutlass.range_constexpr(self.blocks):
                row = place.row + first + block * step
                for s in cutlass.range_constexpr(self.slices):
                    unit = place.tile.tile_n * self.units + s * self.boxes.columns
                    for half in cutlass.range_constexpr(self.boxes_of_h):
                        box = self._box_of_h(place, block, s, half)
                        part = half if self.parts == 2 else 0
                        self.boxes.load(args[0], box, row, self.column_of_h(unit, half), part, place.loaded)

    @cute.jit
    def finish(self, args: tuple, sums: cute.Tensor, block: Int32, place: Place, number: int) -> None:
        """As in :class:`Store`."""
        _, dh, scaled_a, scores, parts = args
        columns = self.boxes.columns
        row, end, thread = place.row + block, place.tile.row_end, place.thread
        factors = row_values(scores, row, end, thread)
        dots = cute.make_rmem_tensor(2, Float32)
        dots.fill(0.0)
        if cutlass.const_expr(number == 0):
            cute.arch.mbarrier_wait(place.loaded, place.parity)
        for s in cutlass.range_constexpr(self.slices):
            unit = place.tile.tile_n * self.units + s * columns
            grad = take(sums, s * columns, columns)
            first, second = self._get_h(place, number, s)
            a = cute.make_rmem_tensor(columns // 2, Float32)
            for i in cutlass.range_constexpr(columns // 2):
                score = factors[i // 2 % 2]
                if cutlass.const_expr(self.glu_layout is None):
                    value, slope = PLAIN[self.activation].with_slope(first[i])
                    first[i] = grad[i] * score * slope
                else:
                    value, slope, other = GATED[self.activation].with_slopes(first[i], second[i])
                    first[i], second[i] = grad[i] * score * slope, grad[i] * score * other
                dots[i // 2 % 2] += grad[i] * value
                a[i] = value * score
            if place.is_nobodys:
                first.fill(0.0)
                if cutlass.const_expr(second is not None):
                    second.fill(0.0)
                dots.fill(0.0)
            box = self.boxes.acquire(place, s, self.slices)
            self.boxes.put(a, box, thread)
            for half in cutlass.range_constexpr(self.boxes_of_h):
                self.put_h(first, second, half, self._box_of_h(place, number, s, half), thread)
            self.boxes.publish(place)
            self.boxes.store(scaled_a, box, row, end, unit, 0, thread)
            for half in cutlass.range_constexpr(self.boxes_of_h):
                part = half if self.parts == 2 else 0
                at = self._box_of_h(place, number, s, half)
                self.boxes.store(dh, at, row, end, self.column_of_h(unit, half), part, thread)
            self.boxes.commit(thread)
        reduce_rows(dots, parts, place.tile.tile_n, row, end, thread)

    @cute.jit
    def _get_h(self, place: Place, number: int, s: int) -> tuple:
        """Gate and up, or H and None, of one slice."""
        if cutlass.const_expr(self.glu_layout == "interleaved"):
            first = cute.make_rmem_tensor(self.boxes.columns // 2, Float32)
            second = cute.make_rmem_tensor(self.boxes.columns // 2, Float32)
            for half in cutlass.range_constexpr(2):
                self.boxes.get_pairs(self._box_of_h(place, number, s, half), first, second, half, place.thread)
        else:
            first, second = self.boxes.get(self._box_of_h(place, number, s, 0), place.thread), None
            if cutlass.const_expr(self.glu_layout is not None):
                second = self.boxes.get(self._box_of_h(place, number, s, 1), place.thread)
        return first, second


@cute.jit
def take(sums: cute.Tensor, first: int, columns: int) -> cute.Tensor:
    """A copy of this thread's values of ``columns`` columns from column ``first`` on."""
    values = cute.make_rmem_tensor(columns // 2, Float32)
    for i in cutlass.range_constexpr(columns // 2):
        values[i] = sums[first // 2 + i]
    return values
