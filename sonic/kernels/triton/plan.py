"""The plan's index arrays by a stable counting sort on the device, without a synchronisation.

Slots are cut into blocks of B (256, or 512 for more than 256 experts), in the order of their tokens:

1. ``count``: slots per expert in each block, an (E, P / B) table written expert by expert, so that
2. one ``cumsum`` over the flat table says where the rows of each expert in each block begin;
3. ``place``: a slot's row is that beginning plus the number of equal slots before it in its block, found by comparing
   them all; three maps are written through it;
4. ``find_again``: rows side by side with the same token and expert are a pair that came twice.

The table of step 1 may come from ``topk_softmax``, which counts blocks of whole tokens while it chooses their experts.
Such a table is not believed: where no slot has a higher rank than its block's count allows, no count is negative, and
all sum up to the slots, each count is right. A row outside the maps is never written, whatever the table says.

Bytes per slot: reads 4 + 4 + 8, writes 12 (8 of them scattered to E runs per block), and 20 E / B for the table.
Comparing takes about 2 B integer operations per slot. Scattered writes move whole sectors of 32 bytes, which with the
comparisons is what bounds it; next to the experts' products it is nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic.kernels.triton.launch import current_target, launch
from sonic.kernels.triton.target import target_of
from sonic.shapes import argument_error

__all__ = ["build_plan"]

_BLOCK_AGAIN = 1024
_SUB_BLOCK = 16
_OTHER_LOAD = "load is not that of expert_index"
_WANTED_LOAD = "what topk_softmax counted when it chose them"
_MAX_COUNTED_EXPERTS = 2048  # beyond, the table outweighs the slots: they are sorted instead


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def count_kernel(
    expert, count, num_slots, num_blocks, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """Fill ``count``: a zero, the (E, blocks) table, and for each block the slots without a right expert."""
    block = tl.program_id(0).to(tl.int64)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    is_slot = slot < num_slots
    index = tl.load(expert + slot, mask=is_slot, other=0).to(tl.int64)
    is_within = is_slot & (index >= 0) & (index < NUM_EXPERTS)
    found = tl.histogram(tl.where(is_within, index, 0).to(tl.int32), BINS, mask=is_within)
    bin = tl.arange(0, BINS)
    tl.store(count + 1 + bin.to(tl.int64) * num_blocks + block, found, mask=bin < NUM_EXPERTS)
    num_wrong = tl.sum((is_slot & ~is_within).to(tl.int32), axis=0)
    tl.store(count + 1 + num_blocks.to(tl.int64) * NUM_EXPERTS + block, num_wrong)
    if block == 0:
        tl.store(count, 0)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def place_kernel(
    expert,
    token,
    slot,
    start,
    token_of_row,
    slot_of_row,
    row_by_token,
    num_wrong,
    num_slots,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Give each of a block's SLOTS its row. Slots are visited token by token; without ``slot`` they stand in that
    order, TOP_K for each token. With ``num_wrong`` add to it the slots without a right expert, and what is wrong with
    the table that ``start`` sums up.
    """
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    visit = block * SLOTS + place
    is_slot = (place < SLOTS) & (visit < num_slots)
    mine = tl.load(expert + visit, mask=is_slot, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, BLOCK, SUB_BLOCK):
        before = first + tl.arange(0, SUB_BLOCK)
        other_visit = block * SLOTS + before
        theirs = tl.load(expert + other_visit, mask=other_visit < num_slots, other=0)
        is_equal = (theirs[:, None] == mine[None, :]) & (before[:, None] < place[None, :])
        rank += tl.sum(is_equal.to(tl.int32), axis=0)
    index = mine.to(tl.int64)
    is_within = is_slot & (index >= 0) & (index < NUM_EXPERTS)
    at = start + index * num_blocks + block
    row = tl.load(at, mask=is_within, other=0) + rank
    if num_wrong is not None:
        num_outside = tl.sum((is_slot & ~is_within).to(tl.int32), axis=0)
        is_beyond = is_within & (row >= tl.load(at + 1, mask=is_within, other=0))
        bin = tl.arange(0, BINS)
        count = start + bin.to(tl.int64) * num_blocks + block
        is_bin = bin < NUM_EXPERTS
        is_negative = tl.load(count + 1, mask=is_bin, other=0) < tl.load(count, mask=is_bin, other=0)
        num_false = tl.sum(is_beyond.to(tl.int32), axis=0) + tl.sum(is_negative.to(tl.int32), axis=0)
        total = tl.load(start + num_blocks.to(tl.int64) * NUM_EXPERTS)
        num_false += tl.where((block == 0) & (total != num_slots), 1, 0)
        if num_outside > 0:
            tl.atomic_add(num_wrong, num_outside)
        if num_false > 0:
            tl.atomic_add(num_wrong + 1, num_false)
        is_within = is_within & (row >= 0) & (row < num_slots)
    if slot is None:
        own_slot, own_token = visit, visit // TOP_K
    else:
        own_slot = tl.load(slot + visit, mask=is_within, other=0)
        own_token = tl.load(token + visit, mask=is_within, other=0)
    tl.store(slot_of_row + row, own_slot.to(tl.int32), mask=is_within)
    tl.store(token_of_row + row, own_token.to(tl.int32), mask=is_within)
    tl.store(row_by_token + visit, row, mask=is_within)


@triton.jit(do_not_specialize=["num_slots"])
def find_again_kernel(expert, slot_of_row, token_of_row, num_rows, num_again, num_slots, BLOCK: tl.constexpr):
    """Count rows whose token and expert are those of the row before."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) + 1
    is_row = row < tl.minimum(tl.load(num_rows), num_slots)
    token = tl.load(token_of_row + row, mask=is_row, other=0)
    is_again = is_row & (token == tl.load(token_of_row + row - 1, mask=is_row, other=-1))
    slot = tl.load(slot_of_row + row, mask=is_again, other=0)
    slot_before = tl.load(slot_of_row + row - 1, mask=is_again, other=0)
    # rows that a wrong load left unwritten hold anything
    is_again = is_again & (slot >= 0) & (slot < num_slots) & (slot_before >= 0) & (slot_before < num_slots)
    index = tl.load(expert + slot, mask=is_again, other=0)
    is_again = is_again & (index == tl.load(expert + slot_before, mask=is_again, other=0))
    again = tl.sum(is_again.to(tl.int32), axis=0)
    if again > 0:
        tl.atomic_add(num_again, again)


def build_plan(
    expert_of_slot_P: Tensor,
    token_of_slot_P: Tensor | None,
    num_tokens: int,
    num_experts: int,
    load_EC: Tensor | None = None,
    tokens_per_run: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Offsets and index maps of the rows sorted by expert, tokens ascending within each.

    See ``sonic.kernels.ops.build_plan``.
    """
    device, num_slots = expert_of_slot_P.device, expert_of_slot_P.shape[0]
    expert_of_slot_P = expert_of_slot_P.contiguous()
    edges_T1 = torch.arange(num_tokens + 1, device=device)
    token_P = slot_P = None
    top_k = num_slots // max(num_tokens, 1)
    if token_of_slot_P is None:
        expert_P, token_offset_T1 = expert_of_slot_P, (edges_T1 * top_k).int()
    else:
        token_P, slot_P = torch.sort(token_of_slot_P.long(), stable=True)
        expert_P = expert_of_slot_P[slot_P]
        token_offset_T1 = torch.searchsorted(token_P, edges_T1, out_int32=True)
    num_wrong = torch.zeros(3, dtype=torch.int32, device=device)  # out of range, falsely counted, twice
    is_by_load = load_EC is not None and num_slots > 0 and num_experts <= _MAX_COUNTED_EXPERTS
    if load_EC is not None and is_by_load:
        offset_E1, maps = _place_by_load(expert_P, load_EC, num_wrong, top_k, tokens_per_run)
    else:
        place = _place_by_counting if num_experts <= _MAX_COUNTED_EXPERTS else _place_by_sorting
        offset_E1, num_within, maps = place(expert_P, token_P, slot_P, num_experts, top_k)
        _demand_within("expert_index", num_within == num_slots, expert_of_slot_P, num_experts)
        if load_EC is not None:
            _demand_load((offset_E1.diff() == load_EC.sum(1)).all())
    token_of_row_R, slot_of_row_R, row_by_token_R = maps
    if token_of_slot_P is not None:
        is_within = ((token_of_slot_P >= 0) & (token_of_slot_P < num_tokens)).all()
        _demand_within("token_index", is_within, token_of_slot_P, num_tokens)
    launch(
        find_again_kernel,
        (triton.cdiv(num_slots, _BLOCK_AGAIN),),
        expert_of_slot_P,
        slot_of_row_R,
        token_of_row_R,
        offset_E1[num_experts:],
        num_wrong[2:],
        num_slots,
        label="build_plan",
        BLOCK=_BLOCK_AGAIN,
    )
    if not is_by_load:
        _demand_once(num_wrong[2] == 0, expert_of_slot_P, slot_of_row_R, token_of_row_R)
    elif _can_look((num_wrong == 0).all(), f"expert_index is out of range, or {_OTHER_LOAD}, or there is a duplicate"):
        _demand_within("expert_index", num_wrong[0] == 0, expert_of_slot_P, num_experts)
        _demand_load(num_wrong[1] == 0)
        _demand_once(num_wrong[2] == 0, expert_of_slot_P, slot_of_row_R, token_of_row_R)
    return offset_E1, token_of_row_R, slot_of_row_R, row_by_token_R, token_offset_T1


_Maps = tuple[Tensor, Tensor, Tensor]
_Placed = tuple[Tensor, Tensor, _Maps]


def _place_by_counting(
    expert_P: Tensor, token_P: Tensor | None, slot_P: Tensor | None, num_experts: int, top_k: int
) -> _Placed:
    """Offsets, how many slots have a right expert, and the three maps of rows; slots are given token by token."""
    device, num_slots = expert_P.device, expert_P.shape[0]
    block = 256 if num_experts <= 256 else 512
    num_blocks = max(1, triton.cdiv(num_slots, block))
    count = torch.empty(1 + (num_experts + 1) * num_blocks, dtype=torch.int32, device=device)
    launch(
        count_kernel,
        (num_blocks,),
        expert_P,
        count,
        num_slots,
        num_blocks,
        label="build_plan",
        num_warps=block // 128,
        NUM_EXPERTS=num_experts,
        BLOCK=block,
        BINS=max(32, triton.next_power_of_2(num_experts)),
    )
    start = torch.cumsum(count, 0, dtype=torch.int32)
    offset_E1, maps = _place(expert_P, token_P, slot_P, start, None, (num_experts, num_blocks), top_k, block)
    num_within = num_slots - (start[-1] - offset_E1[num_experts])
    return offset_E1, num_within, maps


def _place_by_load(
    expert_P: Tensor, load_EC: Tensor, num_wrong: Tensor, top_k: int, tokens_per_run: int
) -> tuple[Tensor, _Maps]:
    """Offsets and maps of slots in top-K's order by a load that is known; what is wrong is added to ``num_wrong``."""
    start = torch.zeros(1 + load_EC.numel(), dtype=torch.int32, device=expert_P.device)
    torch.cumsum(load_EC.reshape(-1), 0, dtype=torch.int32, out=start[1:])
    sizes = (load_EC.shape[0], load_EC.shape[1])
    return _place(expert_P, None, None, start, num_wrong, sizes, top_k, tokens_per_run * top_k)


def _place(
    expert_P: Tensor,
    token_P: Tensor | None,
    slot_P: Tensor | None,
    start: Tensor,
    num_wrong: Tensor | None,
    sizes: tuple[int, int],
    top_k: int,
    slots_per_block: int,
) -> tuple[Tensor, _Maps]:
    """Offsets and maps from where the rows of each expert in each block start; ``sizes`` are experts and blocks."""
    (num_experts, num_blocks), num_slots = sizes, expert_P.shape[0]
    maps = tuple(torch.empty(num_slots, dtype=torch.int32, device=expert_P.device) for _ in range(3))
    block = max(_SUB_BLOCK, triton.next_power_of_2(slots_per_block))
    launch(
        place_kernel,
        (num_blocks,),
        expert_P,
        token_P,
        slot_P,
        start,
        *maps,
        num_wrong,
        num_slots,
        num_blocks,
        label="build_plan",
        num_warps=max(1, block // 128),  # a thread holds four slots and compares them alone
        NUM_EXPERTS=num_experts,
        TOP_K=max(top_k, 1),
        SLOTS=slots_per_block,
        BLOCK=block,
        SUB_BLOCK=_SUB_BLOCK,
        BINS=triton.next_power_of_2(num_experts),
    )
    offset_E1 = start[: num_experts * num_blocks + 1 : num_blocks].clone()
    return offset_E1, (maps[0], maps[1], maps[2])


def _place_by_sorting(
    expert_P: Tensor, token_P: Tensor | None, slot_P: Tensor | None, num_experts: int, top_k: int
) -> _Placed:
    """The same for any number of experts."""
    device, num_slots = expert_P.device, expert_P.shape[0]
    sorted_R, visit_of_row_R = torch.sort(expert_P.long(), stable=True)
    offset_E1 = torch.searchsorted(sorted_R, torch.arange(num_experts + 1, device=device), out_int32=True)
    num_within = ((sorted_R >= 0) & (sorted_R < num_experts)).sum()
    if token_P is None or slot_P is None:
        slot_of_row_R, token_of_row_R = visit_of_row_R, visit_of_row_R // max(top_k, 1)
    else:
        slot_of_row_R, token_of_row_R = slot_P[visit_of_row_R], token_P[visit_of_row_R]
    row_by_token_R = torch.empty(num_slots, dtype=torch.int32, device=device)
    row_by_token_R[visit_of_row_R] = torch.arange(num_slots, dtype=torch.int32, device=device)
    return offset_E1, num_within, (token_of_row_R.int(), slot_of_row_R.int(), row_by_token_R)


def _can_look(condition: Tensor, message: str) -> bool:
    """Whether a condition may be waited for, which only the interpreter's may; a GPU is told to assert it itself.

    While a kernel is compiled for a chip that is not here, nothing has run and there is nothing to look at.
    """
    if current_target(condition) is not target_of(condition.device):
        return False
    if condition.device.type == "cuda":
        torch._assert_async(condition, f"sonic.RoutingPlan: {message}")
        return False
    return True


def _demand_within(name: str, is_within: Tensor, index_P: Tensor, size: int) -> None:
    wanted = f"0 <= {name} < {size}"
    if _can_look(is_within, f"{name} is out of range, expected {wanted}") and not bool(is_within):
        low, high = (int(bound) for bound in torch.aminmax(index_P))
        raise argument_error("sonic.RoutingPlan", name, f"out of range ({low if low < 0 else high})", wanted)


def _demand_load(is_right: Tensor) -> None:
    if _can_look(is_right, f"{_OTHER_LOAD}, expected {_WANTED_LOAD}") and not bool(is_right):
        raise argument_error("sonic.RoutingPlan", "load", _OTHER_LOAD.removeprefix("load is "), _WANTED_LOAD)


def _demand_once(is_once: Tensor, expert_P: Tensor, slot_of_row_R: Tensor, token_of_row_R: Tensor) -> None:
    wanted = "each token at most once per expert"
    if _can_look(is_once, f"expert_index has a duplicate, expected {wanted}") and not bool(is_once):
        expert_R = expert_P[slot_of_row_R.long()]
        again_R = (token_of_row_R[1:] == token_of_row_R[:-1]) & (expert_R[1:] == expert_R[:-1])
        row = int(again_R.int().argmax())
        was = f"a duplicate (token {token_of_row_R[row]} goes to expert {expert_R[row]} more than once)"
        raise argument_error("sonic.RoutingPlan", "expert_index", was, wanted)
