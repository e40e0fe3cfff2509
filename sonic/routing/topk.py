"""Token-choice top-K routing: logits, the K best experts per token, their scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sonic.autograd import autocast_dtype, graph_anchor, no_autocast, refuse_double_backward
from sonic.kernels import ops
from sonic.routing.losses import Group, logits_of, router_losses
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.shapes import argument_error, check_choice, check_positive, check_same, check_shape

__all__ = ["TopKRouter", "router_logits", "topk_scores"]


class TopKRouter(nn.Module):
    """Send each token to its ``top_k`` best experts.

    Logits and scores are computed in float32 (float64 for float64 tokens), whatever the tokens' dtype and under
    autocast too. Kept for
    backward: the tokens, which the experts keep as well, the scores, and the chosen experts as int32; no (T, E) table.

    Parameters: ``weight`` (E, D).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        pre_softmax: bool = False,
        norm_topk_prob: bool = False,
        topk_scaling_factor: float = 1.0,
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        aux_loss_group: Group = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K, at most E.
            score_function: ``"softmax"`` or ``"sigmoid"``.
            pre_softmax: softmax over all experts before choosing (Switch, OLMoE, Qwen3 with ``norm_topk_prob``); else
                over the K chosen (Mixtral, gpt-oss). Softmax only.
            norm_topk_prob: divide the K scores by their sum.
            topk_scaling_factor: multiplies the finished scores (DeepSeek-V3: 2.5).
            aux_loss_coeff: times the switch load-balancing loss; 0 leaves it out.
            z_loss_coeff: times the router z-loss; 0 leaves it out.
            aux_loss_group: ranks whose tokens are balanced together, see :func:`sonic.routing.load_balancing_loss`.
            backend: insist on a backend.
            device: of the weight.
            dtype: of the weight.

        Raises:
            ValueError: sizes, names or coefficients that make no sense.
        """
        super().__init__()
        where = "sonic.routing.TopKRouter"
        check_positive(where, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise argument_error(where, "top_k", top_k, f"at most num_experts = {num_experts}")
        check_choice(where, "score_function", score_function, ops.SCORE_FUNCTIONS)
        if pre_softmax and score_function != "softmax":
            raise argument_error(where, "pre_softmax", pre_softmax, f"False with score_function={score_function!r}")
        for name, value in (("aux_loss_coeff", aux_loss_coeff), ("z_loss_coeff", z_loss_coeff)):
            if not (math.isfinite(value) and value >= 0):
                raise argument_error(where, name, value, "a finite number >= 0")
        if not (math.isfinite(topk_scaling_factor) and topk_scaling_factor > 0):
            raise argument_error(where, "topk_scaling_factor", topk_scaling_factor, "a finite number > 0")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.pre_softmax = pre_softmax
        self.norm_topk_prob = norm_topk_prob
        self.topk_scaling_factor = float(topk_scaling_factor)
        self.aux_loss_coeff = float(aux_loss_coeff)
        self.z_loss_coeff = float(z_loss_coeff)
        self.aux_loss_group = aux_loss_group
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight uniformly within ±1/sqrt(D), as ``nn.Linear`` does."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route T tokens.

        Args:
            x_TD: (T, D) tokens of the weight's dtype (any floating dtype under autocast); T may be 0.

        Returns:
            The decision, with ``scores`` (T, K), ``logits`` (T, E) and ``aux_loss`` (0-dim) differentiable. With an
            ``aux_loss_group`` the losses are left out in eval mode, where the ranks may not all come by.

        Raises:
            ValueError: ``x_TD`` does not fit the weight.
        """
        logits_TE = router_logits(x_TD, self.weight)
        source = (x_TD, self.weight)
        scores_TK, expert_TK = topk_scores(
            logits_TE,
            self.top_k,
            score_function=self.score_function,
            pre_softmax=self.pre_softmax,
            norm_topk_prob=self.norm_topk_prob,
            topk_scaling_factor=self.topk_scaling_factor,
            source=source,
            backend=self.backend,
        )
        plan = RoutingPlan.from_topk(expert_TK, self.num_experts, backend=self.backend)
        aux_loss = logits_TE.new_zeros(())
        is_collective = self.aux_loss_group is not None
        if (self.aux_loss_coeff or self.z_loss_coeff) and (self.training or not is_collective):
            balance, z = router_losses(
                logits_TE,
                plan.tokens_per_expert(),
                score_function=self.score_function,
                group=self.aux_loss_group,
                source=source,
            )
            aux_loss = self.aux_loss_coeff * balance + self.z_loss_coeff * z
        return Routing(plan, scores_TK, logits_TE, expert_TK, aux_loss, RoutingMetrics(plan))

    def extra_repr(self) -> str:
        """The options that are not at their defaults, and the sizes."""
        parts = [f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"]
        parts.append(f"score_function={self.score_function!r}")
        defaults: dict[str, Any] = {
            "pre_softmax": False,
            "norm_topk_prob": False,
            "topk_scaling_factor": 1.0,
            "aux_loss_coeff": 0.0,
            "z_loss_coeff": 0.0,
        }
        parts += [
            f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default
        ]
        return ", ".join(parts)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in at least float32, keeping only ``x`` and ``weight`` for backward, in their own dtypes.

    Args:
        x: (T, D).
        weight: (E, D), same device; same dtype unless autocast is on.

    Returns:
        (T, E) float32, or float64 for float64 tokens.

    Raises:
        ValueError: shapes, devices or dtypes do not fit.
    """
    where = "sonic.routing.router_logits"
    check_shape(where, "x", x, T=None, D=None)
    check_shape(where, "weight", weight, E=None, D=x.shape[1])
    check_same(where, ("weight", weight), (("x", x),), dtype=autocast_dtype(x.device) is None)
    logits: Tensor = _RouterLogits.apply(x, weight)
    return logits


def topk_scores(
    logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    norm_topk_prob: bool = False,
    topk_scaling_factor: float = 1.0,
    source: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The K largest logits per token and their scores; differentiable in the logits.

    Args:
        logits: (T, E).
        top_k: K.
        score_function, pre_softmax, norm_topk_prob, topk_scaling_factor: see :class:`TopKRouter`.
        source: (x (T, D), weight (E, D)) from which backward computes the logits again where it needs all of them
            (softmax over all experts, not normalised); without, they are kept.
        backend: insist on a backend.

    Returns:
        scores (T, K) float32 or float64, largest first, and the experts (T, K) int32.

    Raises:
        ValueError: shapes or names do not fit.
    """
    x_TD, weight_ED = (None, None) if source is None else (source[0].detach(), source[1].detach())
    scores_TK, expert_TK = _TopKScores.apply(
        logits,
        graph_anchor(logits),
        x_TD,
        weight_ED,
        top_k,
        score_function,
        pre_softmax,
        norm_topk_prob,
        topk_scaling_factor,
        backend,
    )
    return scores_TK, expert_TK


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return logits_of(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, dlogits_TE: Tensor) -> Any:
        x_TD, weight_ED = ctx.saved_tensors
        wide = dlogits_TE.dtype
        dx_TD = dweight_ED = None
        with torch.no_grad(), no_autocast(x_TD.device):
            if ctx.needs_input_grad[0]:
                dx_TD = torch.mm(dlogits_TE, weight_ED.to(wide)).to(x_TD.dtype)
            if ctx.needs_input_grad[1]:
                dweight_ED = torch.mm(dlogits_TE.t(), x_TD.to(wide)).to(weight_ED.dtype)
        return refuse_double_backward("sonic.routing.router_logits", (dx_TD, dweight_ED), (dlogits_TE, x_TD, weight_ED))


class _TopKScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        anchor: Tensor,
        x_TD: Tensor | None,
        weight_ED: Tensor | None,
        top_k: int,
        score_function: str,
        pre_softmax: bool,
        norm_topk_prob: bool,
        scaling_factor: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        scores_TK, expert_TK, prob_TK = ops.topk_softmax(
            logits_TE, top_k, score_function, pre_softmax, norm_topk_prob, scaling_factor, backend
        )
        normalised_sigmoid = score_function == "sigmoid" and norm_topk_prob
        if scaling_factor == 1.0 and not normalised_sigmoid:
            prob_TK = scores_TK  # the same values, and the experts keep the scores anyway
        ctx.over_all_experts = score_function == "softmax" and pre_softmax and not norm_topk_prob
        ctx.score_function, ctx.norm_topk_prob, ctx.scaling_factor = score_function, norm_topk_prob, scaling_factor
        ctx.has_source = x_TD is not None
        ctx.num_experts, ctx.logits_dtype = logits_TE.shape[1], logits_TE.dtype
        recompute = ((x_TD, weight_ED) if ctx.has_source else (logits_TE,)) if ctx.over_all_experts else ()
        ctx.save_for_backward(anchor, expert_TK, prob_TK, *recompute)
        ctx.mark_non_differentiable(expert_TK)
        return scores_TK, expert_TK

    @staticmethod
    def backward(ctx: Any, dscores_TK: Tensor, _: Tensor) -> Any:
        anchor, expert_TK, prob_TK, *kept = ctx.saved_tensors  # once: activation checkpointing recomputes on access
        with torch.no_grad():
            dprob_TK = dscores_TK * ctx.scaling_factor
            if ctx.score_function == "sigmoid":
                if ctx.norm_topk_prob:
                    total_T1 = prob_TK.sum(-1, keepdim=True) + 1e-20
                    share_TK = prob_TK / total_T1
                    dprob_TK = (dprob_TK - (share_TK * dprob_TK).sum(-1, keepdim=True)) / total_T1
                dchosen_TK = dprob_TK * prob_TK * (1 - prob_TK)
            else:
                dchosen_TK = dprob_TK * prob_TK
                mean_T1 = dchosen_TK.sum(-1, keepdim=True)
                if not ctx.over_all_experts:
                    dchosen_TK = dchosen_TK - prob_TK * mean_T1
            if ctx.over_all_experts:
                logits_TE = logits_of(*kept) if ctx.has_source else kept[0]
                dlogits_TE = torch.softmax(logits_TE.to(prob_TK.dtype), dim=-1).mul_(-mean_T1)
            else:
                dlogits_TE = prob_TK.new_zeros(prob_TK.shape[0], ctx.num_experts)
            dlogits_TE = dlogits_TE.scatter_add(1, expert_TK.long(), dchosen_TK).to(ctx.logits_dtype)
        (dlogits,) = refuse_double_backward(
            "sonic.routing.topk_scores", (dlogits_TE,), (dscores_TK, anchor, prob_TK, *kept)
        )
        return dlogits, *(None,) * 9  # logits; the rest are the anchor, sources and options
