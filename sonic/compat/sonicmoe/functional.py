"""The functions of the package ``sonicmoe`` that compute a layer, on :func:`sonic.moe_mlp`.

What is kept for backward is what :mod:`sonic.functional` says: tokens, H, scores and integers. No weight is copied:
parameters (E, 2N, D) and (E, D, N) come as views (2N, D, E) and (D, N, E), and are read as what they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sonic.compat.sonicmoe import metadata as triton_kernels
from sonic.compat.sonicmoe.enums import ActivationType, name_of_activation
from sonic.compat.sonicmoe.gemm_choice import enable_quack_gemm, is_using_quack_gemm
from sonic.compat.sonicmoe.metadata import TC_topk_router_metadata, count_cumsum, general_routing_router_metadata
from sonic.functional import moe_mlp
from sonic.routing.plan import RoutingPlan
from sonic.routing.scores import topk_scores
from sonic.shapes import argument_error, check_positive, check_shape

__all__ = [
    "TC_topk_router_metadata",
    "count_cumsum",
    "enable_quack_gemm",
    "general_routing_router_metadata",
    "is_using_quack_gemm",
    "moe_TC_softmax_topk_layer",
    "moe_general_routing_inputs",
    "triton_kernels",
]


def moe_TC_softmax_topk_layer(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    K: int,
    stream_id: int | None = None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    is_softmax_over_topk: bool = True,
    norm_topk_probs: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by top-K of a linear router, apply the experts, sum.

    Differentiable once in ``x``, ``router_w``, ``w1``, ``b1``, ``w2`` and ``b2``. The first ten arguments are those of
    December 2025, the last three those of the 0.1 releases.

    Args:
        x: (T, D), bf16, fp16, fp32 or fp64; T may be 0.
        router_w: (E, D).
        w1: (2N, D, E), or (N, D, E) for a plain activation: a view of a parameter (E, 2N, D), as
            ``c_fc.weight.permute(1, 2, 0)`` gives it. Memory in another order is served too, by a copy in each pass.
        b1: (E, 2N) or (E, N), or None.
        w2: (D, N, E), a view of (E, D, N).
        b2: (E, D) or None; both biases or none.
        K: experts per token, at most E.
        stream_id: not read: kernels run in the stream that is current when they are called.
        activation_type: a member of ``ActivationType``, or its value.
        is_inference_mode_enabled: keep no H. Backward is right nevertheless, for 2 R D U FLOP more.
        is_softmax_over_topk: choose K logits, then softmax over these; else softmax over all E, then choose.
        norm_topk_probs: in the second case divide the K scores by their sum.
        concat_layout: gate rows of an expert first, then its up rows; else g0 u0 g1 u1 …

    Returns:
        out (T, D) in the dtype of ``x``; router_logits (T, E); expert_frequency (E,) int32, rows of each expert.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit.
    """
    where = "sonicmoe.moe_TC_softmax_topk_layer"
    check_positive(where, K=K)
    check_shape(where, "router_w", router_w, E=None, H=None)
    num_experts, hidden_size = router_w.shape
    check_shape(where, "x", x, T=None, H=hidden_size)
    w1_EUD, w2_EDN = _experts_first(where, w1, b1, w2, b2, num_experts, hidden_size)
    activation = name_of_activation(where, activation_type)
    router_logits = F.linear(x, router_w)
    scores_TK, expert_TK = topk_scores(
        router_logits,
        K,
        pre_softmax=not is_softmax_over_topk,
        norm_topk_prob=norm_topk_probs and not is_softmax_over_topk,
        source=(x, router_w),
    )
    plan = RoutingPlan.from_topk(expert_TK, num_experts)
    out = moe_mlp(
        x,
        w1_EUD,
        w2_EDN,
        scores_TK,
        plan,
        b1=b1,
        b2=b2,
        activation=activation,
        glu_layout="concatenated" if concat_layout else "interleaved",
        save="input" if is_inference_mode_enabled else "preactivation",
    )
    return out, router_logits, plan.tokens_per_expert()


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int | None = None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply the experts to (token, expert, score) triples that the caller chose, and sum them per token.

    Differentiable once in ``x``, ``router_scores``, ``w1``, ``b1``, ``w2`` and ``b2``.

    Args:
        x: (T, D).
        router_scores: (P,), any floating dtype.
        token_indices: (P,) integer, 0 <= index < T. There they have to ascend; here any order is right.
        expert_indices: (P,) integer, 0 <= index < E; no expert twice for a token.
        E: number of experts, that of the weights.
        w1, b1, w2, b2, stream_id, activation_type, is_inference_mode_enabled, concat_layout: as in
            :func:`moe_TC_softmax_topk_layer`.

    Returns:
        out (T, D) in the dtype of ``x``; a token without a triple gives zeros. expert_frequency (E,) int32.

    Raises:
        ValueError: shapes, dtypes, devices, indices or names do not fit.
    """
    where = "sonicmoe.moe_general_routing_inputs"
    check_positive(where, E=E)
    check_shape(where, "x", x, T=None, H=None)
    check_shape(where, "router_scores", router_scores, P=None)
    check_shape(where, "token_indices", token_indices, P=router_scores.shape[0])
    w1_EUD, w2_EDN = _experts_first(where, w1, b1, w2, b2, E, x.shape[1])
    plan = RoutingPlan.from_pairs(token_indices, expert_indices, x.shape[0], E)
    out = moe_mlp(
        x,
        w1_EUD,
        w2_EDN,
        router_scores,
        plan,
        b1=b1,
        b2=b2,
        activation=name_of_activation(where, activation_type),
        glu_layout="concatenated" if concat_layout else "interleaved",
        save="input" if is_inference_mode_enabled else "preactivation",
    )
    return out, plan.tokens_per_expert()


def _experts_first(
    where: str, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, num_experts: int, hidden_size: int
) -> tuple[Tensor, Tensor]:
    """Views (E, U, D) and (E, D, N) of weights that come with the experts last."""
    check_shape(where, "w1", w1, U=None, H=hidden_size, E=num_experts)
    check_shape(where, "w2", w2, H=hidden_size, I=None, E=num_experts)
    if (b1 is None) != (b2 is None):
        given, missing = ("b2", "b1") if b1 is None else ("b1", "b2")
        raise argument_error(where, missing, f"None beside a {given}", "both or neither")
    return w1.permute(2, 0, 1), w2.permute(2, 0, 1)
