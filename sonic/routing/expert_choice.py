"""Expert choice: experts choose tokens, so that every expert has the same load by construction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.selection import best_tokens, capacity_of
from sonic.routing.topk import TopKRouter, check_number
from sonic.shapes import argument_error, check_choice

__all__ = ["ExpertChoiceRouter"]

_EVAL_MODES = ("topk", "expert_choice")


class ExpertChoiceRouter(TopKRouter):
    """Every expert takes its best ``ceil(capacity_factor * T * K / E)`` tokens, T at most; tokens get 0 to E experts.

    Scores are the raw probabilities (softmax over all experts, or the score function).

    **Not causal.** Whether an expert takes a token depends on all other tokens of the call, later ones of the same text
    included: a language model trained so can read a little of the future from its own routing, and at generation there
    is no future to rank against. So eval mode is plain top-K of the same probabilities; that gap between training and
    evaluation, and not a bug, is why held-out quality falls behind. ``eval_mode="expert_choice"`` keeps the training
    behaviour, for tasks without an order of time and to measure the leak. For ablations, not for language models.

    Source: Zhou et al., Expert Choice Routing (arXiv:2202.09368).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float = 1.0,
        eval_mode: str = "topk",
        score_function: str = "softmax",
        **router_options: Any,
    ) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K, mean experts per token at ``capacity_factor=1``.
            capacity_factor: tokens per expert over T K / E, above 0.
            eval_mode: ``"topk"`` or ``"expert_choice"``, what eval mode does.
            score_function: as :class:`sonic.routing.TopKRouter`.
            router_options: further options of :class:`sonic.routing.TopKRouter`, but those that say how a token chooses
                (``pre_softmax``, ``norm_topk_prob``, groups, ``enable_expert_bias``, ``scores_on``).

        Raises:
            ValueError: as :class:`sonic.routing.TopKRouter`, or an option that has no meaning here.
        """
        where = "sonic.routing.ExpertChoiceRouter"
        for name in ("pre_softmax", "norm_topk_prob", "num_groups", "group_topk", "enable_expert_bias", "scores_on"):
            if name in router_options:
                raise argument_error(where, name, repr(router_options[name]), "left out: experts choose, not tokens")
        check_number(where, "capacity_factor", capacity_factor, above_zero=True)
        check_choice(where, "eval_mode", eval_mode, _EVAL_MODES)
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            score_function=score_function,
            pre_softmax=score_function == "softmax",
            **router_options,
        )
        self.capacity_factor = float(capacity_factor)
        self.eval_mode = eval_mode

    def extra_repr(self) -> str:
        """As :class:`sonic.routing.TopKRouter`, with capacity and eval mode."""
        options = f"capacity_factor={self.capacity_factor}, eval_mode={self.eval_mode!r}"
        return f"{super().extra_repr()}, {options}"

    def forward(self, x_TD: Tensor, *, sequence_length: int | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: (T, D).
            sequence_length: as :meth:`sonic.routing.TopKRouter.forward`.

        Returns:
            The decision, with a plan and scores (P,) from pairs; in eval mode top-K's. ``expert_index`` is top-K's
            choice in both, and so is what the auxiliary losses count.

        Raises:
            ValueError: ``x_TD`` does not fit the weight; NaN or infinite logits.
        """
        routing = super().forward(x_TD, sequence_length=sequence_length)
        num_tokens, num_experts = routing.logits.shape
        if num_tokens == 0 or not (self.training or self.eval_mode == "expert_choice"):
            return routing
        logits_TE = routing.logits.detach()
        if not bool(torch.isfinite(logits_TE).all()):
            where = "sonic.routing.ExpertChoiceRouter"
            raise argument_error(where, "logits", "NaN or infinite somewhere", "finite, for tokens are ranked by them")
        capacity = min(num_tokens, capacity_of(self.capacity_factor, num_tokens * self.top_k, num_experts))
        shift_T = torch.logsumexp(logits_TE, dim=-1) if self.score_function == "softmax" else None
        token_P, expert_P = best_tokens(logits_TE, shift_T, [capacity] * num_experts, backend=self.backend)
        plan = RoutingPlan.from_pairs(token_P, expert_P, num_tokens, num_experts, backend=self.backend)
        scores_P = self.pair_scores(x_TD, routing.logits, token_P, expert_P)
        # Among the pairs that top-K wanted too: those whose expert is in the token's list.
        wanted = int((routing.expert_index[token_P] == expert_P[:, None]).sum())
        metrics = RoutingMetrics(plan, num_tokens * self.top_k, num_padded=plan.num_rows - wanted, logits=logits_TE)
        return Routing(plan, scores_P, routing.logits, routing.expert_index, routing.aux_loss, metrics)
