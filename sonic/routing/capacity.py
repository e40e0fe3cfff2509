"""Capacity with dropping: no expert takes more than its share of the tokens, and the rest go without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.selection import capacity_of, expert_of_row, lowest_rows
from sonic.routing.topk import check_number
from sonic.routing.wrapper import RouterWrapper
from sonic.shapes import check_choice

__all__ = ["CapacityDropping"]

_POLICIES = ("score", "position")


class CapacityDropping(RouterWrapper):
    """A router that drops, in training, what an expert gets beyond ``ceil(capacity_factor * T * K / E)`` tokens.

    A pair that is dropped contributes nothing; the token's other pairs keep their scores. In eval mode nothing is
    dropped unless ``drop_in_eval`` says so.

    Mind causality: with ``policy="score"`` whether an early token keeps its expert depends on later tokens of the same
    call, so a language model trained so sees a little of the future; with ``"position"`` it depends on earlier ones
    only (where the tokens of a call come in the order of the text).

    Source: GShard (arXiv:2006.16668), section 2.2, drops by position; Megatron-core offers both policies.
    """

    def __init__(
        self,
        router: nn.Module,
        *,
        capacity_factor: float = 1.25,
        policy: str = "score",
        drop_in_eval: bool = False,
    ) -> None:
        """
        Args:
            router: any module that maps (T, D) tokens to a :class:`sonic.routing.Routing`.
            capacity_factor: capacity over the mean load, above 0.
            policy: ``"score"`` drops an expert's lowest scores, ``"position"`` its last tokens.
            drop_in_eval: drop in eval mode too.

        Raises:
            ValueError: no module, a factor that is no number above 0, an unknown policy.
        """
        super().__init__(router)
        where = "sonic.routing.CapacityDropping"
        check_number(where, "capacity_factor", capacity_factor, above_zero=True)
        check_choice(where, "policy", policy, _POLICIES)
        self.capacity_factor = float(capacity_factor)
        self.policy = policy
        self.drop_in_eval = drop_in_eval

    def forward(self, x_TD: Tensor, **router_inputs: object) -> Routing:
        """Route T tokens, then drop what is above capacity.

        Args:
            x_TD: (T, D).
            router_inputs: handed to the wrapped router.

        Returns:
            Its decision; where something was dropped, with a plan and scores (P,) from pairs, and ``metrics.dropped``.

        Raises:
            ValueError: as the wrapped router.
        """
        routing: Routing = self.router(x_TD, **router_inputs)
        plan = routing.plan
        if plan.num_rows == 0 or not (self.training or self.drop_in_eval):
            return routing
        capacity = capacity_of(self.capacity_factor, plan.num_rows, plan.num_experts)
        counts = plan.tokens_per_expert().tolist()
        surplus = [max(count - capacity, 0) for count in counts]
        if not any(surplus):
            return routing
        if self.policy == "score":
            score_R = routing.scores.detach().reshape(-1)[plan.slot_of_row_R.long()]
            is_kept_R = torch.ones(plan.num_rows, dtype=torch.bool, device=plan.device)
            is_kept_R[lowest_rows(plan, counts, score_R, surplus, backend=self.backend)] = False
        else:  # rows of an expert ascend by token
            first_R = plan.expert_offset_E1.long()[expert_of_row(plan)]
            is_kept_R = torch.arange(plan.num_rows, device=plan.device) - first_R < capacity
        kept_row = is_kept_R.nonzero()[:, 0]
        token_P, expert_P = plan.token_of_row_R[kept_row].long(), expert_of_row(plan)[kept_row]
        kept_plan = RoutingPlan.from_pairs(token_P, expert_P, plan.num_tokens, plan.num_experts, backend=self.backend)
        scores_P = routing.scores.reshape(-1)[plan.slot_of_row_R[kept_row].long()]
        before, num_padded = routing.metrics, 0
        if before.num_padded:  # some of those may have been dropped again: count the pairs that top-K wanted
            wanted = int((routing.expert_index[token_P] == expert_P[:, None]).sum())
            num_padded = kept_plan.num_rows - wanted
        metrics = RoutingMetrics(kept_plan, before.num_requested, num_padded=num_padded, logits=routing.logits)
        return Routing(kept_plan, scores_P, routing.logits, routing.expert_index, routing.aux_loss, metrics)

    def extra_repr(self) -> str:
        """Factor and policy."""
        return f"capacity_factor={self.capacity_factor}, policy={self.policy!r}"
