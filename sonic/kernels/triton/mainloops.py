"""The two grouped products: over tiles of each expert's rows, and contracting each expert's rows.

``grouped_rows_kernel`` (variable M): out[r] = epilogue(left[source(r)] @ weight[e(r)]). Tiles of BLOCK_M rows never
cross an expert, so every expert is padded to whole tiles in compute, not in memory. How many tiles there are only the
device knows: a program walks the tiles ``id, id + programs, …``, so that the same kernel is persistent (as many
programs as the chip holds at once) or not (as many as there can be tiles), by its grid alone. Within an expert tiles go
in groups of GROUP_M row tiles by all columns, so that programs that run together share rows and weights in L2.

Per tile: 2 BLOCK_M BLOCK_N K FLOP on (BLOCK_M + BLOCK_N) K operands from L2; 85 FLOP per byte for 16-bit 128 x 256,
which is what decides between tiles (:mod:`sonic.kernels.triton.config`). Bound by tensor cores from a few hundred rows
per expert on, by the weights' bytes below.

``grouped_contraction_kernel`` (variable K): out[e] = sum over the rows of e of left[r]^T (x) right[r], either operand
gathered along the contraction. One program per expert and tile of the result; nothing is split, so that the order of
summation is fixed.

Rows are counted in int32; every offset into memory is int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grouped_contraction_kernel", "grouped_rows_kernel"]


@triton.jit
def _locate(tile, first_tile_E, tiles_E, expert_E, NUM_COLUMN_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Expert, row tile within it and column tile of a tile's number."""
    begin_E = first_tile_E * NUM_COLUMN_TILES
    is_mine_E = (begin_E <= tile) & (tile < begin_E + tiles_E * NUM_COLUMN_TILES)
    expert = tl.sum(tl.where(is_mine_E, expert_E, 0), axis=0)
    row_tiles = tl.sum(tl.where(is_mine_E, tiles_E, 0), axis=0)
    within = tile - tl.sum(tl.where(is_mine_E, begin_E, 0), axis=0)
    group = within // (GROUP_M * NUM_COLUMN_TILES)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within_group = within - group * (GROUP_M * NUM_COLUMN_TILES)
    return expert, group * GROUP_M + within_group % height, within_group // height


@triton.jit(do_not_specialize=["num_rows"])
def grouped_rows_kernel(
    left,
    index,
    offset,
    num_rows,
    weight,
    row_vector,
    args,
    LOAD_ROWS: tl.constexpr,
    LOAD_WEIGHT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    OPTIONS: tl.constexpr,
    HALVES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the head of this file.

    ``index``: row -> source row, or None; ``row_vector``: (E, WIDTH_K) whose products with the rows are summed beside
    the tile, or None; ``args``: what the epilogue is handed.
    """
    # Group NUM_EXPERTS stands for the rows after the last offset: nobody's, with no contraction.
    expert_E = tl.arange(0, BLOCK_E)
    start_E = tl.load(offset + expert_E, mask=expert_E <= NUM_EXPERTS, other=0)
    stop_E = tl.load(offset + expert_E + 1, mask=expert_E < NUM_EXPERTS, other=num_rows)
    count_E = tl.where(expert_E <= NUM_EXPERTS, stop_E - start_E, 0)
    tiles_E = (count_E + BLOCK_M - 1) // BLOCK_M
    first_tile_E = tl.cumsum(tiles_E, axis=0) - tiles_E
    NUM_COLUMN_TILES: tl.constexpr = (WIDTH_N + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.sum(tiles_E, axis=0) * NUM_COLUMN_TILES

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row_tile, column_tile = _locate(tile, first_tile_E, tiles_E, expert_E, NUM_COLUMN_TILES, GROUP_M)
        is_owned = expert < NUM_EXPERTS
        stop = tl.load(offset + expert + 1, mask=is_owned, other=num_rows)
        row0 = tl.load(offset + expert) + row_tile * BLOCK_M
        first = column_tile * BLOCK_N
        row = row0 + tl.arange(0, BLOCK_M)
        is_row = row < stop
        if index is None:
            source = tl.minimum(row, stop - 1).to(tl.int64)
        else:
            source = tl.load(index + row, mask=is_row, other=0).to(tl.int64)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        row_dots = tl.zeros((BLOCK_M,), tl.float32)
        for k0 in tl.range(0, tl.where(is_owned, WIDTH_K, 0), BLOCK_K):
            a = LOAD_ROWS(left, source, row0, k0, WIDTH_K, BLOCK_M, BLOCK_K)
            b = LOAD_WEIGHT(weight, expert, first, k0, WIDTH_N, WIDTH_K, HALVES, BLOCK_N, BLOCK_K)
            product = tl.dot(a, b, product, input_precision=PRECISION)
            if row_vector is not None:
                k = k0 + tl.arange(0, BLOCK_K)
                vector = tl.load(row_vector + expert.to(tl.int64) * WIDTH_K + k, mask=k < WIDTH_K, other=0.0)
                row_dots += tl.sum(a.to(tl.float32) * vector.to(tl.float32)[None, :], axis=1)
        owner = tl.minimum(expert, NUM_EXPERTS - 1)
        EPILOGUE(product, row_dots, owner, is_owned, row.to(tl.int64), is_row, first, args, OPTIONS)


@triton.jit
def _gathered_block(
    pointer, index, row, is_row, column, GATHERED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """(BLOCK_K, BLOCK) of the rows, straight or through the index; zeros where there is no row or column."""
    if GATHERED:
        source = tl.load(index + row, mask=is_row, other=0).to(tl.int64)
    else:
        source = row.to(tl.int64)
    at = pointer + source[:, None] * WIDTH + column[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(at, mask=is_row[:, None], other=0.0)
    else:
        return tl.load(at, mask=is_row[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def grouped_contraction_kernel(
    left,
    right,
    index,
    offset,
    scores,
    column_sum,
    args,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    OPTIONS: tl.constexpr,
    NEED_PRODUCT: tl.constexpr,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the head of this file.

    ``column_sum``: (E, WIDTH_M), gets the sum of the left rows, times ``scores`` if given; None: not wanted.
    """
    NUM_ROW_TILES: tl.constexpr = (WIDTH_M + BLOCK_M - 1) // BLOCK_M
    NUM_COLUMN_TILES: tl.constexpr = (WIDTH_N + BLOCK_N - 1) // BLOCK_N if NEED_PRODUCT else 1
    NUM_TILES: tl.constexpr = NUM_ROW_TILES * NUM_COLUMN_TILES
    expert = tl.program_id(0) // NUM_TILES
    within = tl.program_id(0) % NUM_TILES
    group = within // (GROUP_M * NUM_COLUMN_TILES)
    height = tl.minimum(NUM_ROW_TILES - group * GROUP_M, GROUP_M)
    within_group = within - group * (GROUP_M * NUM_COLUMN_TILES)
    row_tile, column_tile = group * GROUP_M + within_group % height, within_group // height
    start, stop = tl.load(offset + expert), tl.load(offset + expert + 1)

    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for row0 in tl.range(start, stop, BLOCK_K):
        row = row0 + tl.arange(0, BLOCK_K)
        is_row = row < stop
        a = _gathered_block(left, index, row, is_row, m, GATHER_LEFT, WIDTH_M, BLOCK_M)
        if NEED_PRODUCT:
            b = _gathered_block(right, index, row, is_row, n, GATHER_RIGHT, WIDTH_N, BLOCK_N)
            product = tl.dot(a.T, b, product, input_precision=PRECISION)
        if column_sum is not None:
            summand = a.to(tl.float32)
            if scores is not None:
                summand *= tl.load(scores + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
            total += tl.sum(summand, axis=0)
    out_row = expert.to(tl.int64) * WIDTH_M + m
    if NEED_PRODUCT:
        EPILOGUE(product, out_row, m < WIDTH_M, column_tile * BLOCK_N, args, OPTIONS)
    if column_sum is not None:
        end = tl.where(column_tile == 0, WIDTH_M, 0)
        tl.store(column_sum + out_row, total.to(column_sum.dtype.element_ty), mask=m < end)
