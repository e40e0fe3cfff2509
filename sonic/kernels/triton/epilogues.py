"""What follows a product while it is in registers: one vocabulary, and the programs of the ops written in it.

Words are device functions of one step each: load a row or column vector, scale rows, add columns, split a product into
gate and up, activate, differentiate, reduce rows or columns, store a tile or add to it. Programs at the end of the file
join words into what one op needs; a mainloop (:mod:`sonic.kernels.triton.mainloops`) is given a program and calls it
with

* ``product``: (BLOCK_M, BLOCK_N) float32, the tile of the product,
* ``row_dots``: (BLOCK_M,) float32, what the mainloop summed beside it (zeros if nothing was asked),
* ``expert``, ``is_owned``: whose rows; False for rows after the last offset (with any expert), which come out as zeros,
* ``row``, ``is_row``: (BLOCK_M,) int64 rows of the output and whether each exists,
* ``first``: the first column of the tile,
* ``args``: pointers, ``None`` for what is not wanted, and ``OPTIONS``: constants and device functions.

Arithmetic is float32. A gated product has its columns in pairs, g0 u0 g1 u1 …, whatever the layout of the weights:
neighbours lie in one thread, so splitting them moves nothing between threads.

In the spirit of epilogue programs on one mainloop: CODA (arXiv:2605.19269), QuACK's epilogue ops.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_to_tile",
    "column_halves",
    "columns_of",
    "down_bwd_gated",
    "down_bwd_plain",
    "gelu",
    "identity",
    "load_column_vector",
    "load_pair",
    "load_row_vector",
    "load_tile",
    "oai_gate",
    "oai_up",
    "reduce_columns",
    "reduce_rows",
    "relu",
    "relu2",
    "scale_rows",
    "silu",
    "sliced",
    "sliced_with_dots",
    "split_pair",
    "store_finished",
    "store_pair",
    "store_tile",
    "store_weight",
    "up_gated",
    "up_plain",
]

# ---------------------------------------------------------------- words: activations, each as (value, slope)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    s = tl.sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit
def gelu(x):
    """x times the normal distribution function, by erf."""
    cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def relu2(x):
    """max(x, 0) squared."""
    positive = tl.where(x <= 0.0, 0.0, x)
    return positive * positive, 2.0 * positive


@triton.jit
def oai_gate(x):
    """The gate of ``swiglu_oai``: g sigmoid(1.702 g) with g = min(x, 7)."""
    g = tl.where(x > 7.0, 7.0, x)
    s = tl.sigmoid(1.702 * g)
    return g * s, tl.where(x > 7.0, 0.0, s * (1.0 + 1.702 * g * (1.0 - s)))


@triton.jit
def oai_up(x):
    """The up half of ``swiglu_oai``: x clamped to 7, plus 1."""
    clamped = tl.where(x > 7.0, 7.0, tl.where(x < -7.0, -7.0, x))
    return clamped + 1.0, tl.where(tl.abs(x) > 7.0, 0.0, 1.0)


@triton.jit
def identity(x):
    """The up half of the other gated activations."""
    return x, 1.0


# ---------------------------------------------------------------- words: vectors and tiles


@triton.jit
def columns_of(first, BLOCK: tl.constexpr):
    """(BLOCK,) column indices from ``first`` on."""
    return first + tl.arange(0, BLOCK)


@triton.jit
def load_row_vector(pointer, row, is_row):
    """(BLOCK_M,) float32: one value per row; 1 without a pointer."""
    if pointer is None:
        return tl.full(row.shape, 1.0, tl.float32)
    else:
        return tl.load(pointer + row, mask=is_row, other=0.0).to(tl.float32)


@triton.jit
def load_column_vector(pointer, expert, column, WIDTH: tl.constexpr):
    """(BLOCK_N,) float32 of the expert's vector in (E, WIDTH)."""
    start = expert.to(tl.int64) * WIDTH
    return tl.load(pointer + start + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def scale_rows(tile, vector):
    """Multiply row i by ``vector[i]``."""
    return tile * vector[:, None]


@triton.jit
def reduce_rows(tile):
    """Sum of each row."""
    return tl.sum(tile, axis=1)


@triton.jit
def reduce_columns(tile):
    """Sum of each column."""
    return tl.sum(tile, axis=0)


@triton.jit
def _is_inside(is_row, column, WIDTH: tl.constexpr):
    return is_row[:, None] & (column < WIDTH)[None, :]


@triton.jit
def load_tile(pointer, row, is_row, column, WIDTH: tl.constexpr):
    """(BLOCK_M, BLOCK_N) float32 from a matrix of WIDTH columns; zeros outside."""
    at = row[:, None] * WIDTH + column[None, :]
    return tl.load(pointer + at, mask=_is_inside(is_row, column, WIDTH), other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, row, is_row, column, tile, WIDTH: tl.constexpr):
    """Round to the matrix's dtype and store."""
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(pointer + at, tile.to(pointer.dtype.element_ty), mask=_is_inside(is_row, column, WIDTH))


@triton.jit
def add_to_tile(pointer, row, is_row, column, tile, WIDTH: tl.constexpr):
    """Add to what is stored there; each element belongs to one program."""
    store_tile(pointer, row, is_row, column, load_tile(pointer, row, is_row, column, WIDTH) + tile, WIDTH)


@triton.jit
def split_pair(tile):
    """Columns g0 u0 g1 u1 … into gate and up, of half the columns each."""
    pairs = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2))
    return tl.split(pairs)


@triton.jit
def _join_pair(gate, up):
    return tl.reshape(tl.join(gate, up), (gate.shape[0], 2 * gate.shape[1]))


@triton.jit
def load_pair(pointer, row, is_row, unit, first_unit, N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Gate and up of the units ``unit`` (from ``first_unit`` on) from H, a matrix of 2 N columns in its own layout."""
    if INTERLEAVED:
        column = columns_of(2 * first_unit, 2 * unit.shape[0])
        gate, up = split_pair(load_tile(pointer, row, is_row, column, 2 * N))
    else:
        at, inside = row[:, None] * (2 * N) + unit[None, :], _is_inside(is_row, unit, N)
        gate = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pointer + at + N, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def store_pair(pointer, row, is_row, unit, first_unit, gate, up, N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store gate and up as :func:`load_pair` reads them."""
    if INTERLEAVED:
        column = columns_of(2 * first_unit, 2 * unit.shape[0])
        store_tile(pointer, row, is_row, column, _join_pair(gate, up), 2 * N)
    else:
        at, inside = row[:, None] * (2 * N) + unit[None, :], _is_inside(is_row, unit, N)
        tl.store(pointer + at, gate.to(pointer.dtype.element_ty), mask=inside)
        tl.store(pointer + at + N, up.to(pointer.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- programs: one per op
#
# What needs several tiles at once takes the product in SLICES of its columns, one after another: each value lives in
# registers only as long as its slice does. Cutting by halves moves nothing between threads.


@triton.jit
def column_halves(tile):
    """The left and the right half of a tile's columns."""
    cut = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(cut, (0, 2, 1)))


@triton.jit
def _in_slices(product, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr, SLICES: tl.constexpr):
    """Run the program's slice function ``OPTIONS[0]`` on each slice, left to right; the sum of what it returns."""
    FUNCTION: tl.constexpr = OPTIONS[0]
    if SLICES == 1:
        total = FUNCTION(product, expert, is_owned, row, is_row, first, args, OPTIONS)
    else:
        left, right = column_halves(product)
        middle = first + product.shape[1] // 2
        total = _in_slices(left, expert, is_owned, row, is_row, first, args, OPTIONS, SLICES // 2)
        total += _in_slices(right, expert, is_owned, row, is_row, middle, args, OPTIONS, SLICES // 2)
    return total


@triton.jit
def sliced(product, row_dots, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """A program of slices that leaves nothing else: ``up_proj``."""
    _in_slices(product, expert, is_owned, row, is_row, first, args, OPTIONS, OPTIONS[1])


@triton.jit
def sliced_with_dots(product, row_dots, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """A program of slices that return row sums: ``down_proj_bwd_input``.

    The sums are this tile's part of dS, kept in a row of its own of (tiles, R); the first tile adds what the mainloop
    summed. ``args`` end in that matrix, or None, and the stride of its rows.
    """
    part = _in_slices(product, expert, is_owned, row, is_row, first, args, OPTIONS, OPTIONS[1])
    dscores, stride = args[4], args[5]
    if dscores is not None:
        part += tl.where(first == 0, row_dots, 0.0)
        tile = (first // product.shape[1]).to(tl.int64)
        tl.store(dscores + tile * stride + row, tl.where(is_owned, part, 0.0), mask=is_row)


@triton.jit
def up_gated(product, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """``up_proj``, gated: + b1; store H; A = value(gate) factor(up). Rows that nobody owns hold anything."""
    h, a, bias = args
    VALUE: tl.constexpr = OPTIONS[2]
    FACTOR: tl.constexpr = OPTIONS[3]
    N: tl.constexpr = OPTIONS[4]
    INTERLEAVED: tl.constexpr = OPTIONS[5]
    gate, up = split_pair(product)
    first_unit = first // 2
    unit = columns_of(first_unit, product.shape[1] // 2)
    if bias is not None:
        start = expert.to(tl.int64) * (2 * N)
        STRIDE: tl.constexpr = 2 if INTERLEAVED else 1
        PART: tl.constexpr = 1 if INTERLEAVED else N
        at, is_unit = start + unit * STRIDE, unit < N
        gate += tl.load(bias + at, mask=is_unit, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + at + PART, mask=is_unit, other=0.0).to(tl.float32)[None, :]
    if h is not None:
        store_pair(h, row, is_row, unit, first_unit, gate, up, N, INTERLEAVED)
    value, value_slope = VALUE(gate)
    factor, factor_slope = FACTOR(up)
    store_tile(a, row, is_row, unit, value * factor, N)
    return 0.0


@triton.jit
def up_plain(product, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """``up_proj``, plain: + b1; store H; A = value(h). Rows that nobody owns hold anything."""
    h, a, bias = args
    VALUE: tl.constexpr = OPTIONS[2]
    N: tl.constexpr = OPTIONS[4]
    column = columns_of(first, product.shape[1])
    if bias is not None:
        product += load_column_vector(bias, expert, column, N)[None, :]
    if h is not None:
        store_tile(h, row, is_row, column, product, N)
    value, slope = VALUE(product)
    store_tile(a, row, is_row, column, value, N)
    return 0.0


@triton.jit
def store_finished(product, row_dots, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """``down_proj``, ``up_proj_bwd_input``: + bias, times the row's score, store; zeros where nobody owns the row."""
    out, bias, scores = args
    WIDTH: tl.constexpr = OPTIONS[0]
    column = columns_of(first, product.shape[1])
    if bias is not None:
        product += load_column_vector(bias, expert, column, WIDTH)[None, :]
    if scores is not None:
        product = scale_rows(product, load_row_vector(scores, row, is_row))
    store_tile(out, row, is_row, column, tl.where(is_owned, product, 0.0), WIDTH)


@triton.jit
def down_bwd_gated(product, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """``down_proj_bwd_input``, gated: from dA' and H, A again, s A and dH; <dA', A> comes back.

    Columns past the width add nothing to it: dA' is zero there, and A finite.
    """
    h, scores, dh, scaled_a, dscores, stride = args
    VALUE: tl.constexpr = OPTIONS[2]
    FACTOR: tl.constexpr = OPTIONS[3]
    N: tl.constexpr = OPTIONS[4]
    INTERLEAVED: tl.constexpr = OPTIONS[5]
    unit = columns_of(first, product.shape[1])
    gate, up = load_pair(h, row, is_row, unit, first, N, INTERLEAVED)
    value, value_slope = VALUE(gate)
    factor, factor_slope = FACTOR(up)
    score = load_row_vector(scores, row, is_row)
    a = value * factor
    store_tile(scaled_a, row, is_row, unit, tl.where(is_owned, scale_rows(a, score), 0.0), N)
    if dh is not None:
        da = scale_rows(product, score)
        dgate = tl.where(is_owned, da * factor * value_slope, 0.0)
        dup = tl.where(is_owned, da * value * factor_slope, 0.0)
        store_pair(dh, row, is_row, unit, first, dgate, dup, N, INTERLEAVED)
    return reduce_rows(product * a)


@triton.jit
def down_bwd_plain(product, expert, is_owned, row, is_row, first, args, OPTIONS: tl.constexpr):
    """``down_proj_bwd_input``, plain: from dA' and H, A again, s A and dH; <dA', A> comes back."""
    h, scores, dh, scaled_a, dscores, stride = args
    VALUE: tl.constexpr = OPTIONS[2]
    N: tl.constexpr = OPTIONS[4]
    column = columns_of(first, product.shape[1])
    a, slope = VALUE(load_tile(h, row, is_row, column, N))
    score = load_row_vector(scores, row, is_row)
    store_tile(scaled_a, row, is_row, column, tl.where(is_owned, scale_rows(a, score), 0.0), N)
    if dh is not None:
        dh_tile = tl.where(is_owned, scale_rows(product, score) * slope, 0.0)
        store_tile(dh, row, is_row, column, dh_tile, N)
    return reduce_rows(product * a)


@triton.jit
def store_weight(product, row, is_row, first, args, OPTIONS: tl.constexpr):
    """``down_proj_bwd_weight``, ``up_proj_bwd_weight``: store, or add to an fp32 main gradient."""
    out, main_grad = args
    WIDTH: tl.constexpr = OPTIONS[0]
    column = columns_of(first, product.shape[1])
    if main_grad is not None:
        add_to_tile(main_grad, row, is_row, column, product, WIDTH)
    else:
        store_tile(out, row, is_row, column, product, WIDTH)
