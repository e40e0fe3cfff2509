"""What a knowledgeable engineer would write without `sonic`: the rivals that every benchmark is measured against.

Each rival computes the routed experts of one Mixture-of-Experts layer with the SwiGLU activation::

    out_t = sum over k of scores[t, k] * W2[e] @ (silu(gate) * up),   [gate; up] = W1[e] @ x_t,   e = expert[t, k]

and has one signature, ``rival(x_TD, w1_EUD, w2_EDN, scores_TK, expert_TK) -> out_TD``, with

* ``x_TD``       tokens, (T, D), float;
* ``w1_EUD``     up projections, (E, 2N, D), gate rows first, then up rows; the dtype of ``x_TD``;
* ``w2_EDN``     down projections, (E, D, N); the dtype of ``x_TD``;
* ``scores_TK``  router scores, (T, K), fp32 or the dtype of ``x_TD``;
* ``expert_TK``  chosen experts, (T, K), int64, each in [0, E), no expert twice in a row.

All are ordinary autograd code, differentiable to x, w1, w2 and scores. All sort inside the call: routing changes at
every step. Of equivalent forms the one that was fastest on a CPU is kept, and among equally fast ones the one that
saves less for backward (``F.embedding_bag`` to gather and sum beats ``index_add``, above all in backward): beating a
straw man proves nothing. On a GPU they sum with ``index_add``, whose backward only gathers there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "RIVALS",
    "Rival",
    "bmm_pad",
    "dense_mlp",
    "eager_unbind",
    "grouped_mm",
    "hf_eager",
    "hf_grouped_mm",
    "hf_grouped_mm_missing",
    "refusal",
    "sorted_mm",
]

Rival = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def hf_eager(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """Loop over the experts that got a token, indexing the 3-D weights: the eager form of Hugging Face models.

    Its weakness is the backward of ``w[e]``: a zero gradient of the size of all experts for each expert.
    """
    return _expert_loop(x_TD, w1_EUD, w2_EDN, scores_TK, expert_TK)


def eager_unbind(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """The same loop over ``w.unbind(0)``, whose backward stacks the experts' gradients once."""
    return _expert_loop(x_TD, w1_EUD.unbind(0), w2_EDN.unbind(0), scores_TK, expert_TK)


def grouped_mm(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """Sort, gather, ``torch.nn.functional.grouped_mm`` twice, then gather back and sum over K.

    The scores multiply the activations, which are narrower than the outputs: as fast, and the outputs need not be kept.

    Limits of ``grouped_mm``: rows of all matrices must be multiples of 16 bytes (D, N and 2N: 4 elements in fp32, 8 in
    bf16), no float64 on a CPU, and the gradient that reaches it must be dense, which ``embedding_bag`` ensures.
    """
    order = _sort_by_expert(expert_TK, w1_EUD.shape[0])
    offset_E = order.count_E.cumsum(0).to(torch.int32)
    rows_RD = x_TD.index_select(0, order.token_R)
    gate_RN, up_RN = F.grouped_mm(rows_RD, w1_EUD.transpose(-2, -1), offs=offset_E).chunk(2, dim=-1)
    score_R1 = scores_TK.reshape(-1, 1).index_select(0, order.slot_R).to(x_TD.dtype)
    a_RN = F.silu(gate_RN) * up_RN * score_R1
    y_RD = F.grouped_mm(a_RN, w2_EDN.transpose(-2, -1), offs=offset_E)
    return _sum_per_token(y_RD, order)


def sorted_mm(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """Sort and gather once, one small MLP per expert on its contiguous rows, then gather back and sum over K."""
    order = _sort_by_expert(expert_TK, w1_EUD.shape[0])
    counts = order.count_E.tolist()
    rows = x_TD.index_select(0, order.token_R).split(counts)
    scores = scores_TK.reshape(-1, 1).index_select(0, order.slot_R).to(x_TD.dtype).split(counts)
    y_parts = []
    for rows_MD, score_M1, w1_UD, w2_DN in zip(rows, scores, w1_EUD.unbind(0), w2_EDN.unbind(0), strict=True):
        gate_MN, up_MN = (rows_MD @ w1_UD.t()).chunk(2, dim=-1)
        y_parts.append((F.silu(gate_MN) * up_MN * score_M1) @ w2_DN.t())
    return _sum_per_token(torch.cat(y_parts), order)


def bmm_pad(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """Pad every expert to the rows of the busiest one and use ``torch.bmm``; drops no token, computes the padding."""
    (T, D), E, device = x_TD.shape, w1_EUD.shape[0], x_TD.device
    order = _sort_by_expert(expert_TK, E)
    capacity = int(order.count_E.max()) if T else 0
    start_E = order.count_E.cumsum(0) - order.count_E
    # Place of each sorted row in the padded (E, capacity) grid; the padding reads token 0 and no one reads its result.
    shift_E = torch.arange(E, device=device).mul_(capacity).sub_(start_E)
    place_R = torch.arange(order.token_R.numel(), device=device) + shift_E.repeat_interleave(order.count_E)
    token_of_place = torch.zeros(E * capacity, dtype=torch.int64, device=device)
    token_of_place.index_copy_(0, place_R, order.token_R)
    x_ECD = x_TD.index_select(0, token_of_place).view(E, capacity, D)
    gate_ECN, up_ECN = torch.bmm(x_ECD, w1_EUD.transpose(1, 2)).chunk(2, dim=-1)
    y_ECD = torch.bmm(F.silu(gate_ECN) * up_ECN, w2_EDN.transpose(1, 2))
    y_PD, place_TK = y_ECD.view(E * capacity, D), place_R[order.row_TK]
    if device.type != "cpu":  # see _sum_per_token
        score_R1 = scores_TK.reshape(-1, 1).index_select(0, order.slot_R).to(y_PD.dtype)
        return torch.zeros_like(x_TD).index_add(0, order.token_R, y_PD.index_select(0, place_R) * score_R1)
    return F.embedding_bag(place_TK, y_PD, mode="sum", per_sample_weights=scores_TK.to(y_PD.dtype))


def hf_grouped_mm(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """The experts function that `transformers` 5 runs by default, "grouped_mm", called as its own modules call it.

    Raises:
        ImportError: if `transformers` >= 5 is not installed; ask :func:`hf_grouped_mm_missing` first.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    # The function reads attributes only, so this stands for an experts module whose parameters are these very tensors.
    experts = SimpleNamespace(
        num_experts=w1_EUD.shape[0],
        gate_up_proj=w1_EUD,
        down_proj=w2_EDN,
        act_fn=F.silu,
        _apply_gate=apply_gate,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
    )
    # Its routers hand the scores over in the dtype of the hidden states.
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x_TD, expert_TK, scores_TK.to(x_TD.dtype))


def hf_grouped_mm_missing() -> str | None:
    """Say why :func:`hf_grouped_mm` cannot run here, or return None if it can."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        return f"transformers >= 5 is not importable ({error})"
    return None if "grouped_mm" in ALL_EXPERTS_FUNCTIONS else "this transformers has no grouped_mm experts"


def dense_mlp(x_TD: Tensor, w1_UD: Tensor, w2_DN: Tensor) -> Tensor:
    """A dense gated MLP. With ``w1`` (2*K*N, D) and ``w2`` (D, K*N) it does the FLOPs of the routed experts.

    This is the speed that a perfect routed layer would reach on this machine, or nearly; it is a yardstick, not a
    rival.
    """
    gate_TN, up_TN = (x_TD @ w1_UD.t()).chunk(2, dim=-1)
    return (F.silu(gate_TN) * up_TN) @ w2_DN.t()


def refusal(name: str, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> str | None:
    """Say why the rival of that name cannot run a layer of these widths and dtype on a CPU; None if it can."""
    if name not in ("grouped_mm", "hf_grouped_mm"):
        return None
    if dtype == torch.float64:
        return "grouped_mm has no float64"
    step = 16 // dtype.itemsize
    if hidden_size % step or intermediate_size % step:
        return f"grouped_mm wants rows of whole 16 bytes: D and N multiples of {step}"
    return None


RIVALS: dict[str, Rival] = {
    "hf_eager": hf_eager,
    "eager_unbind": eager_unbind,
    "grouped_mm": grouped_mm,
    "sorted_mm": sorted_mm,
    "bmm_pad": bmm_pad,
    "hf_grouped_mm": hf_grouped_mm,
}
"""All rivals by name; :func:`hf_grouped_mm` needs `transformers` (see :func:`hf_grouped_mm_missing`)."""


def _expert_loop(
    x_TD: Tensor, w1: Tensor | tuple[Tensor, ...], w2: Tensor | tuple[Tensor, ...], scores_TK: Tensor, expert_TK: Tensor
) -> Tensor:
    out_TD = torch.zeros_like(x_TD)
    with torch.no_grad():
        mask_EKT = F.one_hot(expert_TK, num_classes=len(w1)).permute(2, 1, 0)
        hit = mask_EKT.sum(dim=(1, 2)).nonzero().flatten().tolist()
    for e in hit:
        k_M, token_M = torch.where(mask_EKT[e])
        gate_MN, up_MN = F.linear(x_TD[token_M], w1[e]).chunk(2, dim=-1)
        y_MD = F.linear(F.silu(gate_MN) * up_MN, w2[e])
        y_MD = y_MD * scores_TK[token_M, k_M, None]
        out_TD.index_add_(0, token_M, y_MD.to(out_TD.dtype))
    return out_TD


def _sum_per_token(y_RD: Tensor, order: SimpleNamespace) -> Tensor:
    """Sum of each token's K rows, in the way that is faster on the device."""
    if y_RD.device.type == "cpu":
        return F.embedding_bag(order.row_TK, y_RD, mode="sum")
    # On a GPU the backward of embedding_bag sorts its indices; that of index_add only gathers.
    out_TD = y_RD.new_zeros(order.row_TK.shape[0], y_RD.shape[1])
    return out_TD.index_add(0, order.token_R, y_RD)


def _sort_by_expert(expert_TK: Tensor, num_experts: int) -> SimpleNamespace:
    """Rows in the order of the experts, all int64: ``slot_R`` and ``token_R`` of each row, ``row_TK`` of each slot, and
    ``count_E`` rows per expert.
    """
    expert_P = expert_TK.reshape(-1)
    slot_R = expert_P.sort(stable=True).indices
    row_P = torch.empty_like(slot_R)
    row_P[slot_R] = torch.arange(slot_R.numel(), device=slot_R.device)
    count_E = torch.bincount(expert_P, minlength=num_experts)
    return SimpleNamespace(
        slot_R=slot_R, token_R=slot_R // expert_TK.shape[1], row_TK=row_P.view_as(expert_TK), count_E=count_E
    )
