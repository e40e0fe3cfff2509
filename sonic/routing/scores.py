"""From tokens to logits, and from logits to scores: differentiable, and keeping no (T, E) table for backward.

Where backward needs the probabilities of all experts (softmax over all of them), the logits are computed again from
their *source*: the tokens, which the experts keep anyway, and the router's weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.autograd import autocast_dtype, graph_anchor, no_autocast, refuse_double_backward
from sonic.kernels import ops
from sonic.shapes import argument_error, check_choice, check_integer, check_positive, check_same, check_shape

__all__ = [
    "Source",
    "check_within",
    "detached_source",
    "logits_of",
    "pair_scores",
    "pointwise_slope",
    "probabilities",
    "router_logits",
    "topk_scores",
]

Source = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
"""What logits are computed from: tokens (T, D), weight (E, D) and, if there is one, bias (E,)."""


def logits_of(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in at least float32, as no autograd sees it: (T, E)."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with no_autocast(x_TD.device):
        logits_TE = torch.mm(x_TD.to(wide), weight_ED.to(wide).t())
    return logits_TE if bias_E is None else logits_TE.add_(bias_E)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in at least float32, keeping only ``x`` and ``weight`` for backward, in their own dtypes.

    Args:
        x: (T, D).
        weight: (E, D), same device; same dtype, or float32 with 16-bit tokens; any floating dtype under autocast.
        bias: (E,), like ``weight``.

    Returns:
        (T, E) float32, or float64 for float64 tokens.

    Raises:
        ValueError: shapes, devices or dtypes do not fit.
    """
    where = "sonic.routing.router_logits"
    check_shape(where, "weight", weight, E=None, D=None)
    check_shape(where, "x", x, T=None, D=weight.shape[1])
    is_wider = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    check_same(where, ("weight", weight), (("x", x),), dtype=not is_wider and autocast_dtype(x.device) is None)
    if bias is not None:
        check_shape(where, "bias", bias, E=weight.shape[0])
        check_same(where, ("weight", weight), (("bias", bias),))
    logits: Tensor = _RouterLogits.apply(x, weight, bias)
    return logits


def topk_scores(
    logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    norm_topk_prob: bool = False,
    topk_scaling_factor: float = 1.0,
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    group_topk: int = 1,
    source: Source | None = None,
    with_load: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The K preferred experts per token and their scores; differentiable in the logits.

    Args:
        logits: (T, E).
        top_k: K.
        score_function, pre_softmax, norm_topk_prob, topk_scaling_factor, num_groups, group_topk: see
            :class:`sonic.routing.TopKRouter`.
        expert_bias: (E,) added to the probabilities for the choice alone.
        source: from which backward computes the logits again where it needs all of them (softmax over all experts, not
            normalised); without, they are kept.
        with_load: return also how often each expert was chosen, which the same pass counts.
        backend: insist on a backend.

    Returns:
        scores (T, K) float32 or float64, best choice first, and the experts (T, K) int32. With ``with_load`` also the
        load (E, C) int32, for each run of :func:`sonic.shapes.tokens_per_run` tokens, and a column of zeros: its sum
        over the columns is that of all tokens, and :meth:`sonic.RoutingPlan.from_topk` takes it as it is.

    Raises:
        ValueError: shapes or names do not fit.
    """
    where = "sonic.routing.topk_scores"
    check_shape(where, "logits", logits, T=None, E=None)
    check_choice(where, "score_function", score_function, ops.SCORE_FUNCTIONS)
    num_experts = logits.shape[1]
    check_positive(where, top_k=top_k)
    if top_k > num_experts:
        raise argument_error(where, "top_k", top_k, f"at most num_experts = {num_experts}")
    if pre_softmax and score_function != "softmax":
        raise argument_error(where, "pre_softmax", pre_softmax, f"False with score_function={score_function!r}")
    ops.check_groups(where, num_experts, top_k, num_groups, group_topk)
    if expert_bias is not None:
        check_shape(where, "expert_bias", expert_bias, E=num_experts)
        check_same(where, ("logits", logits), (("expert_bias", expert_bias),), dtype=False)
    x_TD, weight_ED, bias_E = detached_source(where, source)
    scores_TK, expert_TK, load_EC = _TopKScores.apply(
        logits,
        graph_anchor(logits),
        x_TD,
        weight_ED,
        bias_E,
        expert_bias,
        top_k,
        score_function,
        pre_softmax,
        norm_topk_prob,
        topk_scaling_factor,
        num_groups,
        group_topk,
        backend,
    )
    return (scores_TK, expert_TK, load_EC) if with_load else (scores_TK, expert_TK)


def pair_scores(
    logits: Tensor,
    token_index: Tensor,
    expert_index: Tensor,
    *,
    score_function: str = "softmax",
    source: Source | None = None,
) -> Tensor:
    """The raw probability of any (token, expert) pairs; differentiable in the logits.

    Softmax is taken over all experts, as for a choice that no normalisation over the chosen follows.

    Args:
        logits: (T, E).
        token_index, expert_index: (P,) integers within T and E; a pair may come more than once.
        score_function: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        source: from which backward computes the logits again, where it needs all of them.

    Returns:
        (P,) float32 or float64.

    Raises:
        ValueError: shapes, dtypes or names do not fit.
    """
    where = "sonic.routing.pair_scores"
    check_shape(where, "logits", logits, T=None, E=None)
    check_choice(where, "score_function", score_function, ops.SCORE_FUNCTIONS)
    for name, index in (("token_index", token_index), ("expert_index", expert_index)):
        check_integer(where, name, index)
        check_shape(where, name, index, P=token_index.shape[0] if token_index.ndim else None)
    check_within(where, "token_index", token_index, "T", logits.shape[0])
    check_within(where, "expert_index", expert_index, "E", logits.shape[1])
    x_TD, weight_ED, bias_E = detached_source(where, source)
    scores_P: Tensor = _PairScores.apply(
        logits,
        graph_anchor(logits),
        x_TD,
        weight_ED,
        bias_E,
        token_index.long(),
        expert_index.long(),
        score_function,
    )
    return scores_P


def probabilities(logits_TE: Tensor, score_function: str) -> Tensor:
    """The score function of all logits: (T, E) in at least float32; softmax over the experts of a token."""
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if score_function == "softmax":
        return torch.softmax(wide_TE, dim=-1)
    return _pointwise(wide_TE, score_function)


def _pointwise(logits: Tensor, score_function: str) -> Tensor:
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    return F.softplus(logits, threshold=40.0).sqrt()  # torch's own threshold, 20, is too low for float64


def pointwise_slope(prob: Tensor, score_function: str) -> Tensor:
    """Derivative of sigmoid or sqrtsoftplus with respect to the logit, from its value."""
    if score_function == "sigmoid":
        return prob * (1 - prob)
    # d sqrt(softplus) = sigmoid / (2 sqrt(softplus)), and sigmoid = 1 - exp(-softplus)
    return -torch.expm1(-prob.square()) / (2 * prob).clamp(min=torch.finfo(prob.dtype).tiny)


def check_within(where: str, argument: str, index: Tensor, size_name: str, size: int) -> None:
    """Refuse indices below 0, which torch would count from the end, or from ``size`` on.

    On a GPU, and in a compiled graph, it is an assertion that the device makes, without a synchronisation.

    Raises:
        ValueError: naming the worst of them.
    """
    if index.numel() == 0 or index.is_meta:
        return
    wanted = f"0 <= {argument} < {size_name} = {size}"
    if index.device.type == "cuda" or torch.compiler.is_compiling():
        is_within = ((index >= 0) & (index < size)).all()
        torch._assert_async(is_within, f"{where}: {argument} is out of range, expected {wanted}")
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise argument_error(where, argument, f"out of range ({low if low < 0 else high})", wanted)


def detached_source(where: str, source: Source | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Tokens, weight and bias (each None where there is none), cut off from autograd.

    Raises:
        ValueError: not a tuple of two or three.
    """
    if source is None:
        return None, None, None
    if not isinstance(source, tuple) or len(source) not in (2, 3):
        was = f"a tuple of {len(source)}" if isinstance(source, tuple) else f"a {type(source).__name__}"
        raise argument_error(where, "source", was, "a tuple (x, weight) or (x, weight, bias)")
    bias_E = source[2] if len(source) == 3 else None
    return source[0].detach(), source[1].detach(), None if bias_E is None else bias_E.detach()


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.bias_dtype = None if bias_E is None else bias_E.dtype
        return logits_of(x_TD, weight_ED, bias_E)

    @staticmethod
    def backward(ctx: Any, dlogits_TE: Tensor) -> Any:
        x_TD, weight_ED = ctx.saved_tensors
        wide = dlogits_TE.dtype
        dx_TD = dweight_ED = dbias_E = None
        with torch.no_grad(), no_autocast(x_TD.device):
            if ctx.needs_input_grad[0]:
                dx_TD = torch.mm(dlogits_TE, weight_ED.to(wide)).to(x_TD.dtype)
            if ctx.needs_input_grad[1]:
                dweight_ED = torch.mm(dlogits_TE.t(), x_TD.to(wide)).to(weight_ED.dtype)
            if ctx.needs_input_grad[2]:
                dbias_E = dlogits_TE.sum(0).to(ctx.bias_dtype)
        grads = (dx_TD, dweight_ED, dbias_E)
        return refuse_double_backward("sonic.routing.router_logits", grads, (dlogits_TE, x_TD, weight_ED))


class _TopKScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        anchor: Tensor,
        x_TD: Tensor | None,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        expert_bias_E: Tensor | None,
        top_k: int,
        score_function: str,
        pre_softmax: bool,
        norm_topk_prob: bool,
        scaling_factor: float,
        num_groups: int,
        group_topk: int,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores_TK, expert_TK, prob_TK, load_EC = ops.topk_softmax(
            logits_TE,
            top_k,
            score_function,
            pre_softmax,
            norm_topk_prob,
            scaling_factor,
            expert_bias_E,
            num_groups,
            group_topk,
            backend,
        )
        is_normalised_pointwise = score_function != "softmax" and norm_topk_prob
        if scaling_factor == 1.0 and not is_normalised_pointwise:
            prob_TK = scores_TK  # the same values, and the experts keep the scores anyway
        ctx.over_all_experts = score_function == "softmax" and pre_softmax and not norm_topk_prob
        ctx.score_function, ctx.norm_topk_prob, ctx.scaling_factor = score_function, norm_topk_prob, scaling_factor
        ctx.has_source, ctx.backend = x_TD is not None, backend
        ctx.num_experts, ctx.logits_dtype = logits_TE.shape[1], logits_TE.dtype
        recompute = ((x_TD, weight_ED, bias_E) if ctx.has_source else (logits_TE,)) if ctx.over_all_experts else ()
        ctx.save_for_backward(anchor, expert_TK, prob_TK, *recompute)
        ctx.mark_non_differentiable(expert_TK, load_EC)
        return scores_TK, expert_TK, load_EC

    @staticmethod
    def backward(ctx: Any, dscores_TK: Tensor, *_: Tensor) -> Any:
        anchor, expert_TK, prob_TK, *kept = ctx.saved_tensors  # once: activation checkpointing recomputes on access
        with torch.no_grad():
            logits_TE = None
            if ctx.over_all_experts:
                logits_TE = logits_of(*kept) if ctx.has_source else kept[0]
            options = (ctx.num_experts, ctx.score_function, ctx.norm_topk_prob, ctx.scaling_factor)
            dlogits_TE = ops.topk_softmax_bwd(dscores_TK, expert_TK, prob_TK, logits_TE, *options, ctx.backend)
            dlogits_TE = dlogits_TE.to(ctx.logits_dtype)
        (dlogits,) = refuse_double_backward(
            "sonic.routing.topk_scores", (dlogits_TE,), (dscores_TK, anchor, prob_TK, *kept)
        )
        return dlogits, *(None,) * 13  # logits; the rest are the anchor, sources and options


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        anchor: Tensor,
        x_TD: Tensor | None,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        token_P: Tensor,
        expert_P: Tensor,
        score_function: str,
    ) -> Tensor:
        wide = torch.promote_types(logits_TE.dtype, torch.float32)
        chosen_P = logits_TE[token_P, expert_P].to(wide)
        if score_function == "softmax":
            prob_P = torch.exp(chosen_P - torch.logsumexp(logits_TE.to(wide), dim=-1)[token_P])
        else:
            prob_P = _pointwise(chosen_P, score_function)
        ctx.score_function, ctx.shape, ctx.logits_dtype = score_function, logits_TE.shape, logits_TE.dtype
        ctx.has_source = x_TD is not None
        recompute = (x_TD, weight_ED, bias_E) if ctx.has_source else (logits_TE,)
        ctx.save_for_backward(anchor, token_P, expert_P, prob_P, *(recompute if score_function == "softmax" else ()))
        return prob_P

    @staticmethod
    def backward(ctx: Any, dprob_P: Tensor) -> Any:
        anchor, token_P, expert_P, prob_P, *kept = ctx.saved_tensors
        num_tokens, num_experts = ctx.shape
        with torch.no_grad():
            if ctx.score_function == "softmax":
                dchosen_P = dprob_P * prob_P
                mean_T = prob_P.new_zeros(num_tokens).index_add_(0, token_P, dchosen_P)
                logits_TE = logits_of(*kept) if ctx.has_source else kept[0]
                dlogits_TE = torch.softmax(logits_TE.to(prob_P.dtype), dim=-1).mul_(-mean_T[:, None])
            else:
                dchosen_P = dprob_P * pointwise_slope(prob_P, ctx.score_function)
                dlogits_TE = prob_P.new_zeros(num_tokens, num_experts)
            dlogits_TE.view(-1).index_add_(0, token_P * num_experts + expert_P, dchosen_P)
            dlogits_TE = dlogits_TE.to(ctx.logits_dtype)
        (dlogits,) = refuse_double_backward(
            "sonic.routing.pair_scores", (dlogits_TE,), (dprob_P, anchor, prob_P, *kept)
        )
        return dlogits, *(None,) * 7  # logits; the rest are the anchor, sources, pairs and the score function
