"""Where the operands of a product come from: one device function per way, chosen when a kernel is launched.

Left operands are rows: gathered by token, or contiguous. The right operand is an expert's weight, in one of two
orientations: ``*_of_rows`` where a row of the weight becomes a column of the product (x W^T; each row is contiguous
along the contraction), ``*_of_columns`` where a column of the weight does (x W).

Each comes by pointers (any width and alignment; on NVIDIA the copies into shared memory are asynchronous, and overlap
the products) or by a tensor descriptor (``described_*``), which Hopper and later turn into bulk copies: one thread
starts a whole tile, and what lies outside the tensor arrives as zeros. Descriptors need strides of whole 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "described_rows",
    "described_weight_columns",
    "described_weight_rows",
    "rows",
    "weight_of_columns",
    "weight_of_rows",
]


@triton.jit
def rows(left, source, row0, k0, WIDTH_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_K) of the rows ``source`` (int64) of a matrix of WIDTH_K columns, gathered or not."""
    k = k0 + tl.arange(0, BLOCK_K)
    at = left + source[:, None] * WIDTH_K + k[None, :]
    if WIDTH_K % BLOCK_K == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < WIDTH_K)[None, :], other=0.0)


@triton.jit
def described_rows(left, source, row0, k0, WIDTH_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same rows, contiguous from ``row0`` on, by a descriptor of blocks (BLOCK_M, BLOCK_K)."""
    return left.load([row0, k0])


@triton.jit
def weight_of_rows(
    weight,
    expert,
    first,
    k0,
    WIDTH_N: tl.constexpr,
    WIDTH_K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_K, BLOCK_N) of an (E, WIDTH_N, WIDTH_K) weight: its rows are columns of the product.

    With HALVES the rows are gate rows, then up rows, and come in pairs g0 u0 g1 u1 …; each row is one contiguous run
    either way.
    """
    column = first + tl.arange(0, BLOCK_N)
    if WIDTH_N % BLOCK_N:
        column = tl.minimum(column, WIDTH_N - 1)  # computed twice, stored once
    row = (column % 2) * (WIDTH_N // 2) + column // 2 if HALVES else column
    k = k0 + tl.arange(0, BLOCK_K)
    at = weight + expert.to(tl.int64) * (WIDTH_N * WIDTH_K) + row[None, :] * WIDTH_K + k[:, None]
    if WIDTH_K % BLOCK_K == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < WIDTH_K)[:, None], other=0.0)


@triton.jit
def described_weight_rows(
    weight,
    expert,
    first,
    k0,
    WIDTH_N: tl.constexpr,
    WIDTH_K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same by a descriptor: of (E, N, 2, WIDTH_K) with HALVES, strides making pairs of them; else of the weight."""
    if HALVES:
        tile = weight.load([expert, first // 2, 0, k0])
    else:
        tile = weight.load([expert, first, k0])
    return tl.reshape(tile, (BLOCK_N, BLOCK_K)).T


@triton.jit
def weight_of_columns(
    weight,
    expert,
    first,
    k0,
    WIDTH_N: tl.constexpr,
    WIDTH_K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_K, BLOCK_N) of an (E, WIDTH_K, WIDTH_N) weight as it lies."""
    column = first + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    at = weight + expert.to(tl.int64) * (WIDTH_N * WIDTH_K) + k[:, None] * WIDTH_N + column[None, :]
    if WIDTH_K % BLOCK_K == 0 and WIDTH_N % BLOCK_N == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < WIDTH_K)[:, None] & (column < WIDTH_N)[None, :], other=0.0)


@triton.jit
def described_weight_columns(
    weight,
    expert,
    first,
    k0,
    WIDTH_N: tl.constexpr,
    WIDTH_K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same by a descriptor of blocks (1, BLOCK_K, BLOCK_N)."""
    return tl.reshape(weight.load([expert, k0, first]), (BLOCK_K, BLOCK_N))
