"""Top-K selection with its scores, and its backward: one pass over the (T, E) table each.

Forward holds a block of rows of the logits in registers and takes the best expert of each row K times: the largest key,
then the lowest column among equals, each an integer reduction inside one warp. A key is the float32 value as an integer
of the same order, so no bit of the value is given up, NaN is above all, and one integer is left over for what can not
be chosen (again). The table is read once (the K chosen logits of a row come once more, from cache), and 12 T K bytes
are written. About 4 E K integer operations per token stand against 4 E bytes, so up to K = 4 memory bounds it, beyond
that the integer units do. T K atomic additions count the load in a table of E entries per run of tokens: so many
addresses that programs seldom meet at one, and just the counts that the plan's sort begins with.

Backward reads 12 T K bytes (and the logits, where softmax ran over all experts) and writes each of the T E derivatives
once, zeros included: bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic.kernels.triton.launch import launch

__all__ = ["topk_softmax", "topk_softmax_bwd"]

_VALUES_PER_PROGRAM = 512  # of the table, unless one row has more
_VALUES_PER_WARP = 1024  # 32 registers of a thread; up to there a row stays inside one warp, whose reductions are cheap
_MAX_WARPS = 16

_NONE = tl.constexpr(-(2**31))  # the key of what can not be chosen; that of -inf is larger
_NAN = tl.constexpr(2**31 - 1)
_INF = tl.constexpr(float("inf"))


@triton.jit
def key_of(value):
    """Integers in the order of float32 values: equal for both zeros, the largest one for NaN, never ``_NONE``."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, _NAN, key)


@triton.jit
def value_of(key):
    """The float32 value of a key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def take_largest(key, place, AXIS: tl.constexpr):
    """Largest key along an axis, the lowest of the places that hold it, and the keys without that place."""
    best = tl.max(key, axis=AXIS, keep_dims=True)
    winner = tl.min(tl.where(key == best, place, _NAN), axis=AXIS, keep_dims=True)
    return best, winner, tl.where(place == winner, _NONE, key)


@triton.jit
def row_softmax_parts(value):
    """The largest value of each row, and the sum of ``exp(value - largest)``: NaN with NaN or +inf, or all -inf."""
    top = tl.max(tl.where(value != value, -_INF, value), axis=1, keep_dims=True)
    return top, tl.sum(tl.exp(value - top), axis=1, keep_dims=True)


@triton.jit
def log1p_over(u):
    """``log(1 + u) / u`` for 0 <= u <= 1, to float32's last bits: 2 atanh(s) / u with s = u / (2 + u) <= 1 / 3."""
    s2 = u / (2 + u) * (u / (2 + u))
    series = 1.0 / 13 + s2 * (1.0 / 15)
    series = 1.0 / 9 + s2 * (1.0 / 11 + s2 * series)
    series = 1.0 / 5 + s2 * (1.0 / 7 + s2 * series)
    series = 1 + s2 * (1.0 / 3 + s2 * series)
    return 2 / (2 + u) * series


@triton.jit
def pointwise(value, SCORE: tl.constexpr):
    """``sigmoid`` or ``sqrtsoftplus``, sqrt(log(1 + exp(value))), without overflow or cancellation."""
    if SCORE == "sigmoid":
        return 1 / (1 + tl.exp(-value))
    u = tl.exp(-tl.abs(value))
    ratio = log1p_over(u)
    above = tl.sqrt(tl.where(value < 0, 0.0, value) + u * ratio)
    return tl.where(value < 0, tl.exp(0.5 * value) * tl.sqrt(ratio), above)


@triton.jit
def pointwise_slope(prob, SCORE: tl.constexpr):
    """Derivative of :func:`pointwise` from its value: p (1 - p), or (1 - exp(-p^2)) / 2p, by a series for small p."""
    if SCORE == "sigmoid":
        return prob * (1 - prob)
    y = prob * prob
    series = 1 - y / 7 * (1 - y / 8)
    series = 1 - y / 5 * (1 - y / 6 * series)
    series = 1 - y / 3 * (1 - y / 4 * series)
    small = prob * 0.5 * (1 - y / 2 * series)
    return tl.where(y < 0.5, small, (1 - tl.exp(-y)) / (2 * tl.where(prob == 0, 1.0, prob)))


@triton.jit
def only_best_groups(
    preference,
    is_expert,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    NUM_COUNTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The keys of the preferences in each row's best groups. -inf counts as so bad that a group with fewer of them
    always wins, and is still better than the experts outside.
    """
    is_barred = preference == -_INF
    best = value_of(tl.max(tl.where(is_expert, key_of(preference), _NONE), axis=1, keep_dims=True))
    is_counted = is_expert & (preference == preference) & (preference != -_INF)
    worst = tl.min(tl.where(is_counted, preference, _INF), axis=1, keep_dims=True)
    floor = worst - (best - worst + 1) * NUM_EXPERTS
    floor = tl.where(tl.abs(floor) < _INF, floor, 0.0)
    key = tl.where(is_expert, key_of(tl.where(is_barred, floor, preference)), _NONE)

    key_TGS = tl.reshape(key, (BLOCK_T, BLOCK_G, BLOCK_S))
    place = tl.arange(0, BLOCK_S)[None, None, :]
    total = tl.zeros((BLOCK_T, BLOCK_G, 1), tl.float32)
    left = key_TGS
    for _ in range(NUM_COUNTED):
        largest, _, left = take_largest(left, place, 2)
        total += value_of(largest)
    group = tl.arange(0, BLOCK_G)[None, :, None]
    group_key = tl.where(group < NUM_GROUPS, key_of(total), _NONE)
    for _ in range(GROUP_TOPK):
        _, _, group_key = take_largest(group_key, group, 1)
    is_in = (group_key == _NONE) & (group < NUM_GROUPS)
    return tl.reshape(tl.where(is_in, key_TGS, _NONE), (BLOCK_T, BLOCK_G * BLOCK_S))


@triton.jit(do_not_specialize=["num_tokens"])
def topk_softmax_kernel(
    logits,
    expert_bias,
    scores,
    experts,
    probs,
    load,
    num_tokens,
    scaling_factor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS_PER_RUN: tl.constexpr,
    SCORE: tl.constexpr,
    IS_OVER_ALL: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    IS_BY_PROB: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    NUM_COUNTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """K choices and their scores for BLOCK_T tokens, added to the load of their run; columns stand group by group,
    BLOCK_S places for each.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    is_token = token < num_tokens
    column = tl.arange(0, BLOCK_G * BLOCK_S)[None, :]
    is_expert = column < NUM_EXPERTS
    if NUM_GROUPS > 1:
        place = column % BLOCK_S
        column = column // BLOCK_S * (NUM_EXPERTS // NUM_GROUPS) + place
        is_expert = (place < NUM_EXPERTS // NUM_GROUPS) & (column < NUM_EXPERTS)
    value = tl.load(logits + token * NUM_EXPERTS + column, mask=is_token & is_expert, other=-_INF).to(tl.float32)

    preference = value
    if SCORE == "softmax" and (IS_OVER_ALL or IS_BY_PROB):
        top, total = row_softmax_parts(value)
    if IS_BY_PROB:
        if SCORE == "softmax":
            preference = tl.exp(value - top) / total
        else:
            preference = pointwise(value, SCORE)
        if expert_bias is not None:
            preference += tl.load(expert_bias + column, mask=is_expert, other=0.0).to(tl.float32)
        preference = tl.where(value == -_INF, -_INF, preference)
    if NUM_GROUPS > 1:
        key = only_best_groups(
            preference, is_expert, NUM_EXPERTS, NUM_GROUPS, GROUP_TOPK, NUM_COUNTED, BLOCK_T, BLOCK_G, BLOCK_S
        )
    else:
        key = tl.where(is_expert, key_of(preference), _NONE)

    slot = tl.arange(0, BLOCK_K)[None, :]
    expert = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in range(TOP_K):
        _, winner, key = take_largest(key, column, 1)
        expert = tl.where(slot == k, winner, expert)

    is_slot = is_token & (slot < TOP_K)
    chosen = tl.load(logits + token * NUM_EXPERTS + expert, mask=is_slot, other=-_INF).to(tl.float32)
    if IS_BY_PROB or NUM_GROUPS > 1:
        is_wrong = tl.max(tl.where(value < _INF, 0, 1), axis=1, keep_dims=True)
    else:  # what is wrong was chosen first
        is_wrong = tl.max(tl.where(chosen < _INF, 0, 1), axis=1, keep_dims=True)
    chosen = tl.where(is_wrong == 1, float("nan"), chosen)
    if SCORE == "softmax":
        if not IS_OVER_ALL:
            top = tl.max(tl.where(chosen != chosen, -_INF, chosen), axis=1, keep_dims=True)
            total = tl.sum(tl.where(slot < TOP_K, tl.exp(chosen - top), 0.0), axis=1, keep_dims=True)
        prob = tl.exp(chosen - top) / total
    else:
        prob = pointwise(chosen, SCORE)
    score = prob
    if IS_NORMALISED and SCORE != "softmax":
        score = prob / (tl.sum(tl.where(slot < TOP_K, prob, 0.0), axis=1, keep_dims=True) + 1e-20)
    at = token * TOP_K + slot
    tl.store(scores + at, score * scaling_factor, mask=is_slot)
    tl.store(experts + at, expert, mask=is_slot)
    tl.store(probs + at, prob, mask=is_slot)
    num_columns = (num_tokens + TOKENS_PER_RUN - 1) // TOKENS_PER_RUN + 1
    # integers: the same in any order; nothing is read back, and runs keep programs from meeting at one address
    place = expert.to(tl.int64) * num_columns + token // TOKENS_PER_RUN
    tl.atomic_add(load + place, tl.full((BLOCK_T, BLOCK_K), 1, tl.int32), mask=is_slot, sem="relaxed")


@triton.jit
def chosen_grad(dprob, prob, mean, total, SCORE: tl.constexpr, IS_OVER_ALL: tl.constexpr, IS_NORMALISED: tl.constexpr):
    """Derivative of a chosen logit, without what a softmax over all experts gives to each expert."""
    if SCORE != "softmax":
        if IS_NORMALISED:
            dprob = (dprob - mean) / total
        return dprob * pointwise_slope(prob, SCORE)
    if IS_OVER_ALL:
        return dprob * prob
    return dprob * prob - prob * mean


@triton.jit(do_not_specialize=["num_tokens"])
def topk_softmax_bwd_kernel(
    dscores,
    experts,
    probs,
    logits,
    dlogits,
    num_tokens,
    scaling_factor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Derivatives of all logits of BLOCK_T tokens."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    is_token = token < num_tokens
    column = tl.arange(0, BLOCK_E)[None, :]
    is_expert = column < NUM_EXPERTS
    slot = tl.arange(0, BLOCK_K)[None, :]
    is_slot = is_token & (slot < TOP_K)
    prob = tl.load(probs + token * TOP_K + slot, mask=is_slot, other=0.0)
    dprob = tl.load(dscores + token * TOP_K + slot, mask=is_slot, other=0.0) * scaling_factor
    mean = tl.sum(dprob * prob, axis=1, keep_dims=True)
    total = tl.sum(prob, axis=1, keep_dims=True) + 1e-20
    if SCORE != "softmax":
        mean = mean / total

    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if logits is not None:
        table = logits + token * NUM_EXPERTS + column
        value = tl.load(table, mask=is_token & is_expert, other=-_INF).to(tl.float32)
        top, exp_total = row_softmax_parts(value)
        grad = tl.exp(value - top) / exp_total * -mean
    for k in range(TOP_K):
        at = token * TOP_K + k
        expert = tl.load(experts + at, mask=is_token, other=-1)
        one_prob = tl.load(probs + at, mask=is_token, other=0.0)
        one_dprob = tl.load(dscores + at, mask=is_token, other=0.0) * scaling_factor
        one = chosen_grad(one_dprob, one_prob, mean, total, SCORE, logits is not None, IS_NORMALISED)
        grad += tl.where(column == expert, one, 0.0)
    tl.store(dlogits + token * NUM_EXPERTS + column, grad, mask=is_token & is_expert)


def topk_softmax(
    logits_TE: Tensor,
    top_k: int,
    score_function: str,
    pre_softmax: bool,
    norm_topk_prob: bool,
    scaling_factor: float,
    expert_bias_E: Tensor | None,
    num_groups: int,
    group_topk: int,
    tokens_per_run: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, chosen experts, the chosen probabilities before they are normalised, and the load of each run of tokens.

    See ``sonic.kernels.ops.topk_softmax``.
    """
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    scores_TK = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    expert_TK = torch.empty_like(scores_TK, dtype=torch.int32)
    prob_TK = torch.empty_like(scores_TK)
    num_columns = triton.cdiv(num_tokens, tokens_per_run) + 1
    load_EC = torch.zeros((num_experts, num_columns), dtype=torch.int32, device=logits_TE.device)
    is_softmax, has_bias = score_function == "softmax", expert_bias_E is not None
    group_size = num_experts // num_groups
    block_g, block_s = triton.next_power_of_2(num_groups), triton.next_power_of_2(group_size)
    block_t, num_warps = _block(block_g * block_s)
    launch(
        topk_softmax_kernel,
        (triton.cdiv(num_tokens, block_t),),
        logits_TE,
        None if expert_bias_E is None else expert_bias_E.contiguous(),
        scores_TK,
        expert_TK,
        prob_TK,
        load_EC,
        num_tokens,
        scaling_factor,
        label="topk_softmax",
        num_warps=num_warps,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        TOKENS_PER_RUN=tokens_per_run,
        SCORE=score_function,
        # normalising a softmax over all experts to its K chosen ones is the softmax over those K
        IS_OVER_ALL=is_softmax and pre_softmax and not norm_topk_prob,
        IS_NORMALISED=norm_topk_prob,
        # every score function keeps the order of the logits
        IS_BY_PROB=has_bias or num_groups > 1 and (pre_softmax or not is_softmax),
        NUM_GROUPS=num_groups,
        GROUP_TOPK=group_topk,
        NUM_COUNTED=min(max(1, top_k // group_topk), group_size),
        BLOCK_T=block_t,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=triton.next_power_of_2(top_k),
    )
    return scores_TK, expert_TK, prob_TK, load_EC


def topk_softmax_bwd(
    dscores_TK: Tensor,
    expert_TK: Tensor,
    prob_TK: Tensor,
    logits_TE: Tensor | None,
    num_experts: int,
    score_function: str,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> Tensor:
    """Derivatives of all logits, from those of the scores; see ``sonic.kernels.ops.topk_softmax_bwd``."""
    num_tokens, top_k = expert_TK.shape
    dlogits_TE = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=prob_TK.device)
    block_e = triton.next_power_of_2(num_experts)
    block_t, num_warps = _block(block_e)
    launch(
        topk_softmax_bwd_kernel,
        (triton.cdiv(num_tokens, block_t),),
        dscores_TK.contiguous(),
        expert_TK.contiguous(),
        prob_TK.contiguous(),
        None if logits_TE is None else logits_TE.contiguous(),
        dlogits_TE,
        num_tokens,
        scaling_factor,
        label="topk_softmax_bwd",
        num_warps=num_warps,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        SCORE=score_function,
        IS_NORMALISED=norm_topk_prob,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(top_k),
    )
    return dlogits_TE


def _block(row_values: int) -> tuple[int, int]:
    """Rows per program and its warps, for rows of so many values (a power of two)."""
    num_warps = min(max(1, row_values // _VALUES_PER_WARP), _MAX_WARPS)
    return max(1, min(64, _VALUES_PER_PROGRAM // row_values)), num_warps
