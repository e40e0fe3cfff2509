"""Which tile a thread block takes next, found on the device from the experts' offsets: no host synchronisation.

Both schedules are static and persistent: cluster c of C takes tiles c, c + C, c + 2 C, … . A tile is a
:class:`Tile`; :meth:`start` gives the first and :meth:`next` the one after it, until ``tile.exists`` is false.

:class:`VariableRows` orders the tiles expert by expert, so the number of row tiles has to be known of all experts
before one's own: a warp takes 32 experts at a time, one per lane, and sums their tiles by shuffles. A block never goes
back, so each batch of 32 is passed once however many tiles there are. Within an expert, ``group_m`` row tiles are
walked together over all columns, rows fastest: what is in L2 then is ``group_m`` tiles of rows and a few of the weight.
After the experts come the rows of none, as an expert of their own with number E: their product has no steps, so they
come out as zeros.

:class:`VariableContraction` has the same number of tiles for each expert; what varies is how many steps one takes.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, cute

__all__ = ["Tile", "VariableContraction", "VariableRows", "Work"]

_WARP = 32


class Work(NamedTuple):
    """What there is to do: known on the host but for the offsets.

    Attributes:
        offsets: ``expert_offset_E1``, int32.
        num_rows: R.
        tiles_m: row tiles of an expert's product, for a contraction; else unused.
        tiles_n: column tiles.
        steps_k: of the main loop, unless they vary.
    """

    offsets: cute.Tensor
    num_rows: Int32
    tiles_m: Int32
    tiles_n: Int32
    steps_k: Int32


class Tile(NamedTuple):
    """One tile of the product, in the coordinates of its cluster.

    Attributes:
        exists: false: there is no such tile, the block is done.
        index: number of the tile in the schedule's order.
        expert: e.
        row_begin, row_end: rows of the expert, ``expert_offset_E1[e : e + 2]``.
        tile_m: of the expert's row tiles; of the rows of the weight gradient for a contraction.
        tile_n: of the column tiles.
        first_expert: of the batch in which the expert was found.
        tiles_before: tiles of the experts before that batch.
    """

    exists: Boolean
    index: Int32
    expert: Int32
    row_begin: Int32
    row_end: Int32
    tile_m: Int32
    tile_n: Int32
    first_expert: Int32
    tiles_before: Int32


class VariableRows:
    """Row tiles of each expert, times the columns' tiles.

    Args:
        rows: of a cluster's tile.
        group_m: row tiles that are walked together.
    """

    def __init__(self, rows: int, group_m: int) -> None:
        self.rows = rows
        self.group_m = group_m

    @cute.jit
    def start(self, work: Work, cluster: Int32) -> Tile:
        """The first tile of a cluster."""
        return self._find(work, cluster, Int32(0), Int32(0))

    @cute.jit
    def next(self, work: Work, tile: Tile, num_clusters: Int32) -> Tile:
        """The tile after ``tile``."""
        return self._find(work, tile.index + num_clusters, tile.first_expert, tile.tiles_before)

    @cute.jit
    def _find(self, work: Work, index: Int32, first_expert: Int32, tiles_before: Int32) -> Tile:
        num_groups = cute.size(work.offsets)  # the experts, and the rows of none
        begin, end, tiles, upto = self._batch(work, first_expert)
        total = cute.arch.shuffle_sync(upto, _WARP - 1)
        while (index >= tiles_before + total) & (first_expert + _WARP < num_groups):
            tiles_before += total
            first_expert += _WARP
            begin, end, tiles, upto = self._batch(work, first_expert)
            total = cute.arch.shuffle_sync(upto, _WARP - 1)
        # As many lanes as end at or before this tile lie before its expert's.
        lane = cute.arch.popc(cute.arch.vote_ballot_sync(tiles_before + upto <= index))
        exists = lane < _WARP
        lane = cutlass.min(lane, _WARP - 1)
        row_begin = cute.arch.shuffle_sync(begin, lane)
        row_end = cute.arch.shuffle_sync(end, lane)
        own = index - tiles_before - cute.arch.shuffle_sync(upto - tiles, lane)
        tiles_m = cute.ceil_div(row_end - row_begin, self.rows)
        group = own // (self.group_m * work.tiles_n)
        within = own - group * self.group_m * work.tiles_n
        height = cutlass.max(cutlass.min(tiles_m - group * self.group_m, self.group_m), 1)
        tile_n = within // height
        tile_m = group * self.group_m + within - tile_n * height
        return Tile(exists, index, first_expert + lane, row_begin, row_end, tile_m, tile_n, first_expert, tiles_before)

    @cute.jit
    def _batch(self, work: Work, first_expert: Int32) -> tuple[Int32, Int32, Int32, Int32]:
        """Of the expert of this lane: its rows, its tiles, and the sum of the tiles up to and with it."""
        lane = cute.arch.lane_idx()
        num_experts = cute.size(work.offsets) - 1
        expert = first_expert + lane
        begin = work.offsets[cutlass.min(expert, num_experts)]
        end = begin
        if expert < num_experts:
            end = work.offsets[expert + 1]
        if expert == num_experts:
            end = work.num_rows
        tiles = cute.ceil_div(end - begin, self.rows) * work.tiles_n
        upto = tiles
        for i in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_up(upto, 1 << i, mask_and_clamp=0)
            if lane >= (1 << i):
                upto += other
        return begin, end, tiles, upto


class VariableContraction:
    """Tiles of each expert's product of two widths; its row tiles fastest, so that blocks at work share columns."""

    @cute.jit
    def start(self, work: Work, cluster: Int32) -> Tile:
        """The first tile of a cluster."""
        return self._find(work, cluster)

    @cute.jit
    def next(self, work: Work, tile: Tile, num_clusters: Int32) -> Tile:
        """The tile after ``tile``."""
        return self._find(work, tile.index + num_clusters)

    @cute.jit
    def _find(self, work: Work, index: Int32) -> Tile:
        num_experts = cute.size(work.offsets) - 1
        each = work.tiles_m * work.tiles_n
        expert = index // each
        exists = expert < num_experts
        expert = cutlass.min(expert, num_experts - 1)
        own = index - expert * each
        tile_n = own // work.tiles_m
        return Tile(
            exists,
            index,
            expert,
            work.offsets[expert],
            work.offsets[expert + 1],
            own - tile_n * work.tiles_m,
            tile_n,
            Int32(0),
            Int32(0),
        )
