"""Best of each expert's column: exact, without sorting a column, and without a table of T E entries.

An entry's key is the float32 value of ``logits - shift`` as a 32-bit integer of the same order; what is no candidate
has the key of -inf. Wanted are the n_e largest keys of each column, the lowest tokens first among equals:

1. ``count_digits``, eight times: the table is read in tiles of 512 entries, rows coalesced, and counted is how often
   each 4-bit digit follows the digits of the n-th largest key that are known already. The next launch reads the counts
   and so knows one digit more; after eight the whole key is known, and how many entries equal to it are wanted.
2. ``count_chosen``: per column, and per run of tokens that one program walks, entries above that key and equal to it;
   one ``cumsum`` along the runs tells where each of them writes.
3. ``write_chosen``: the chosen tokens, compacted in the order of the tokens; of the equal ones the first.
4. One stable sort of P integers, expert and key, leaves the tokens of each expert best first.

Everything is on the device: programs leave out columns that nobody wants anything of, and the host, which knows the
n_e, waits for nothing. Pairs of the plan are found by comparing each entry's expert with those of its token.

State in bytes: 580 E for the digits, 8 E for each run (of 128 tokens or more: at most 1/16 per entry of the table),
4 R for the experts of the plan's pairs, and up to 64 P while the pairs are sorted.

The table is read ten times, from L2 after the first where it fits. An entry takes about 25 integer operations each
time, and two more for each expert that its token has in the plan, which is about what a GPU does while 4 bytes arrive
from memory: both bound it where the table is large; where it is small, the twenty launches do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic.kernels.triton.launch import current_target, launch

__all__ = ["best_of_columns"]

_VALUES_PER_TILE = 512
_MAX_COLUMNS = 32  # of a tile: 128 bytes of a float32 row
_MIN_TOKENS_PER_PROGRAM = 128
_PROGRAMS_PER_UNIT = 8
_MAX_TILES_PER_PROGRAM = 255  # counts are added up in bytes
_NUM_DIGITS = 8  # of a key, 4 bits each

_KEY_OF_MINUS_INF = tl.constexpr(0x7FFFFF)


@triton.jit
def keys_of_tile(
    logits,
    shift,
    expert_by_token,
    token_offset,
    allowed,
    token,
    column,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
):
    """Keys of the entries of these tokens (int64, a column) and experts (a row), as unsigned integers in their order.

    Tokens after the last count as -inf: being the last of the lowest, none of them is ever chosen.
    """
    is_token = token < num_tokens
    is_inside = is_token & (column < NUM_EXPERTS)
    raw = tl.load(logits + token * NUM_EXPERTS + column, mask=is_inside, other=float("-inf"))
    value = raw.to(tl.float32)
    if shift is not None:
        value -= tl.load(shift + token, mask=is_token, other=0.0).to(tl.float32)
        value = value.to(raw.dtype).to(tl.float32)
    # as `routing.key_of`, but unsigned, so that digits are cut off by plain shifts
    bits = tl.where(value == 0, 0.0, tl.where(value != value, float("nan"), value)).to(tl.int32, bitcast=True)
    key = (bits ^ (bits >> 31 | -0x80000000)).to(tl.uint32, bitcast=True)
    if allowed is not None:
        group = column // (NUM_EXPERTS // NUM_GROUPS)
        is_allowed = tl.load(allowed + token * NUM_GROUPS + group, mask=is_inside, other=0) != 0
        key = tl.where(is_allowed, key, _KEY_OF_MINUS_INF)
    if expert_by_token is not None:
        at = tl.load(token_offset + token, mask=is_token, other=0)
        end = tl.load(token_offset + token + 1, mask=is_token, other=0)
        for _ in range(tl.max(end - at)):
            taken = tl.load(expert_by_token + at, mask=at < end, other=-1)
            key = tl.where(column == taken, _KEY_OF_MINUS_INF, key)
            at += 1
    return key


@triton.jit
def known_so_far(count, prefix, left, column, step, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The first ``step`` digits of each column's n-th largest key, and how many of the entries that begin with them are
    wanted, from those of the step before and its counts.
    """
    is_column = column < NUM_EXPERTS
    known = tl.load(prefix + column, mask=is_column, other=0)
    wanted = tl.load(left + column, mask=is_column, other=0)
    if step > 0:
        at = (step - 1) * NUM_EXPERTS + column
        known = tl.load(prefix + at, mask=is_column, other=0)
        wanted = tl.load(left + at, mask=is_column, other=0)
        digit = tl.arange(0, 16)[None, :]
        found = tl.load(count + at[:, None] * 16 + digit, mask=is_column[:, None], other=0)
        at_least = tl.sum(found, axis=1)[:, None] - tl.cumsum(found, axis=1) + found
        # from the highest digit down: the first at which there are enough
        chosen = tl.sum((at_least >= wanted[:, None]).to(tl.int32), axis=1) - 1
        wanted -= tl.sum(tl.where(digit > chosen[:, None], found, 0), axis=1)
        known = known * 16 + chosen
    return known, wanted


@triton.jit
def walk_of(
    count,
    prefix,
    left,
    column,
    step,
    num_tokens,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What :func:`known_so_far` knows, and the tokens that this program walks: from, and up to; none where nothing is
    wanted of any of its columns.
    """
    known, wanted = known_so_far(count, prefix, left, column, step, NUM_EXPERTS, BLOCK_E)
    start = tl.program_id(0).to(tl.int64) * (num_tiles * BLOCK_T)
    end = tl.minimum(start + num_tiles * BLOCK_T, num_tokens)
    return known, wanted, start, tl.where(tl.max(wanted, axis=0) > 0, end, start)


@triton.jit
def add_packed(count, packed, at, is_column, FIRST: tl.constexpr):
    """Add the four bytes of each entry, summed per column, to the counts of four digits."""
    for i in tl.static_range(4):
        found = tl.sum((packed >> (8 * i)) & 255, axis=0)
        tl.atomic_add(count + at * 16 + FIRST + i, found, mask=is_column & (found > 0))


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "step"])
def count_digits_kernel(
    logits,
    shift,
    expert_by_token,
    token_offset,
    allowed,
    count,
    prefix,
    left,
    num_tokens,
    num_tiles,
    step,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Digit ``step`` of the keys that begin with the digits that are known; those are written for the next step."""
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_column = column < NUM_EXPERTS
    known, wanted, start, end = walk_of(
        count, prefix, left, column, step, num_tokens, num_tiles, NUM_EXPERTS, BLOCK_T, BLOCK_E
    )
    at = step * NUM_EXPERTS + column
    if tl.program_id(0) == 0:
        if step > 0:
            tl.store(prefix + at, known, mask=is_column)
            tl.store(left + at, wanted, mask=is_column)
    shift_of_digit = 28 - 4 * step
    known = known.to(tl.uint32, bitcast=True)[None, :]
    is_looked_at = (wanted > 0)[None, :]
    packed_0 = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    packed_4 = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    packed_8 = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    packed_12 = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for first in range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        key = keys_of_tile(
            logits,
            shift,
            expert_by_token,
            token_offset,
            allowed,
            token,
            column[None, :],
            num_tokens,
            NUM_EXPERTS,
            NUM_GROUPS,
        )
        begin = key >> shift_of_digit
        is_counted = ((begin >> 4) == known) & is_looked_at
        digit = (begin & 15).to(tl.int32)
        one = tl.where(is_counted, 1 << ((digit & 3) * 8), 0)
        packed_0 += tl.where(digit < 4, one, 0)
        packed_4 += tl.where((digit & 12) == 4, one, 0)
        packed_8 += tl.where((digit & 12) == 8, one, 0)
        packed_12 += tl.where(digit >= 12, one, 0)
    if end > start:
        add_packed(count, packed_0, at, is_column, 0)
        add_packed(count, packed_4, at, is_column, 4)
        add_packed(count, packed_8, at, is_column, 8)
        add_packed(count, packed_12, at, is_column, 12)


@triton.jit
def compare_tile(
    logits,
    shift,
    expert_by_token,
    token_offset,
    allowed,
    token,
    column,
    known,
    wanted,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
):
    """Keys of these tokens in these columns, and how they compare with the n-th largest key, ``known``: 1 above it,
    2**16 at it, 0 below, and in columns of which nothing is wanted.
    """
    key = keys_of_tile(
        logits,
        shift,
        expert_by_token,
        token_offset,
        allowed,
        token,
        column[None, :],
        num_tokens,
        NUM_EXPERTS,
        NUM_GROUPS,
    )
    threshold = known.to(tl.uint32, bitcast=True)[None, :]
    code = tl.where(key > threshold, 1, 0) + tl.where(key == threshold, 1 << 16, 0)
    return key, tl.where((wanted > 0)[None, :], code, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_runs"])
def count_chosen_kernel(
    logits,
    shift,
    expert_by_token,
    token_offset,
    allowed,
    count,
    prefix,
    left,
    tally,
    num_tokens,
    num_tiles,
    num_runs,
    NUM_DIGITS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Per column and run of tokens: entries above the n-th largest key, and 2**32 times those equal to it."""
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    known, wanted, start, end = walk_of(
        count, prefix, left, column, NUM_DIGITS, num_tokens, num_tiles, NUM_EXPERTS, BLOCK_T, BLOCK_E
    )
    found = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for first in range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        _, code = compare_tile(
            logits,
            shift,
            expert_by_token,
            token_offset,
            allowed,
            token,
            column,
            known,
            wanted,
            num_tokens,
            NUM_EXPERTS,
            NUM_GROUPS,
        )
        found += code
    at = column.to(tl.int64) * num_runs + tl.program_id(0)
    num_above, num_equal = tl.sum(found & 0xFFFF, axis=0), tl.sum(found >> 16, axis=0)
    tl.store(tally + at, num_above.to(tl.int64) + (num_equal.to(tl.int64) << 32), mask=column < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_runs"])
def write_chosen_kernel(
    logits,
    shift,
    expert_by_token,
    token_offset,
    allowed,
    count,
    prefix,
    left,
    tally,
    pair_offset,
    tokens,
    ranks,
    num_tokens,
    num_tiles,
    num_runs,
    NUM_DIGITS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The chosen tokens of each column in their order, and what sorts them: the expert, then the largest key first."""
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_column = column < NUM_EXPERTS
    known, wanted, start, end = walk_of(
        count, prefix, left, column, NUM_DIGITS, num_tokens, num_tiles, NUM_EXPERTS, BLOCK_T, BLOCK_E
    )
    run = tl.program_id(0) + tl.zeros_like(column)
    before = tl.load(tally + column.to(tl.int64) * num_runs + run - 1, mask=is_column & (run > 0), other=0)[None, :]
    above, equal = (before & 0xFFFFFFFF).to(tl.int32), (before >> 32).to(tl.int32)
    place = tl.load(pair_offset + column, mask=is_column, other=0)[None, :]
    for first in range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
        key, code = compare_tile(
            logits,
            shift,
            expert_by_token,
            token_offset,
            allowed,
            token,
            column,
            known,
            wanted,
            num_tokens,
            NUM_EXPERTS,
            NUM_GROUPS,
        )
        earlier = tl.cumsum(code, axis=0) - code
        num_equal = equal + (earlier >> 16)
        is_chosen = (code == 1) | ((code > 1) & (num_equal < wanted[None, :]))
        at = place + (above + (earlier & 0xFFFF) + tl.minimum(num_equal, wanted[None, :]))
        rank = (column[None, :].to(tl.int64) << 32) + (key ^ 0xFFFFFFFF).to(tl.int64)
        tl.store(tokens + at, token + tl.zeros_like(at), mask=is_chosen)
        tl.store(ranks + at, rank, mask=is_chosen)
        found = tl.sum(code, axis=0, keep_dims=True)
        above += found & 0xFFFF
        equal += found >> 16


def best_of_columns(
    logits_TE: Tensor,
    shift_T: Tensor | None,
    num_wanted: Sequence[int],
    token_of_row_R: Tensor | None,
    expert_offset_E1: Tensor | None,
    row_by_token_R: Tensor | None,
    token_offset_T1: Tensor | None,
    allowed_TG: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(token, expert) of the highest entries, expert by expert; see ``sonic.kernels.ops.best_of_columns``."""
    device, (num_tokens, num_experts) = logits_TE.device, logits_TE.shape
    num_pairs = sum(num_wanted)
    token_P = torch.empty(num_pairs, dtype=torch.int64, device=device)
    if num_pairs == 0:
        return token_P, torch.empty_like(token_P)
    expert_by_token_R = None
    if expert_offset_E1 is not None and row_by_token_R is not None and row_by_token_R.shape[0]:
        end_E = expert_offset_E1[1:].contiguous()
        expert_by_token_R = torch.searchsorted(end_E, row_by_token_R.contiguous(), right=True, out_int32=True)
    block_e = min(_MAX_COLUMNS, triton.next_power_of_2(num_experts))
    block_t = _VALUES_PER_TILE // block_e
    num_tiles = _tiles_per_program(logits_TE, block_t, block_e)
    num_runs = triton.cdiv(num_tokens, num_tiles * block_t)
    grid = (num_runs, triton.cdiv(num_experts, block_e))

    wanted_2E = _to_device([list(num_wanted), [0, *itertools.accumulate(num_wanted[:-1])]], device)
    count_SE16 = torch.zeros((_NUM_DIGITS, num_experts, 16), dtype=torch.int32, device=device)
    prefix_SE = torch.zeros((_NUM_DIGITS, num_experts), dtype=torch.int32, device=device)
    left_SE = torch.empty_like(prefix_SE)
    left_SE[0] = wanted_2E[0]
    table = (
        logits_TE.contiguous(),
        None if shift_T is None else shift_T.contiguous(),
        expert_by_token_R,
        None if expert_by_token_R is None or token_offset_T1 is None else token_offset_T1.contiguous(),
        None if allowed_TG is None else allowed_TG.contiguous(),
        count_SE16,
        prefix_SE,
        left_SE,
    )
    constants = {
        "NUM_EXPERTS": num_experts,
        "NUM_GROUPS": 1 if allowed_TG is None else allowed_TG.shape[1],
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
    }
    label = "best_of_columns"
    for step in range(_NUM_DIGITS):
        launch(count_digits_kernel, grid, *table, num_tokens, num_tiles, step, label=label, **constants)
    tally_ER = torch.empty((num_experts, num_runs), dtype=torch.int64, device=device)
    sizes = (num_tokens, num_tiles, num_runs)
    constants["NUM_DIGITS"] = _NUM_DIGITS
    launch(count_chosen_kernel, grid, *table, tally_ER, *sizes, label=label, **constants)
    tally_ER = torch.cumsum(tally_ER, 1)
    rank_P = torch.empty_like(token_P)
    launch(write_chosen_kernel, grid, *table, tally_ER, wanted_2E[1], token_P, rank_P, *sizes, label=label, **constants)
    rank_P, order_P = torch.sort(rank_P, stable=True)
    return token_P[order_P], rank_P >> 32


def _tiles_per_program(logits_TE: Tensor, block_t: int, block_e: int) -> int:
    """So many that each compute unit has about :data:`_PROGRAMS_PER_UNIT`, within what a program can count."""
    num_tokens, num_experts = logits_TE.shape
    num_runs = max(
        1, _PROGRAMS_PER_UNIT * current_target(logits_TE).num_compute_units // triton.cdiv(num_experts, block_e)
    )
    num_tiles = triton.cdiv(max(triton.cdiv(num_tokens, num_runs), _MIN_TOKENS_PER_PROGRAM), block_t)
    return min(num_tiles, _MAX_TILES_PER_PROGRAM)


def _to_device(rows: list[list[int]], device: torch.device) -> Tensor:
    """An int64 tensor of these, copied without waiting."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    return torch.tensor(rows, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
