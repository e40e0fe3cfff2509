"""Megatron's router with its decision changed by :mod:`sonic.routing`, token rounding above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_random_logits
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import pair_scores
from sonic.shapes import argument_error

__all__ = ["SonicRouter", "topk_of_map"]


class SonicRouter(TopKRouter):
    """Megatron's ``TopKRouter``, whose choice is handed to a module of :mod:`sonic.routing` before it is returned.

    Everything up to the choice is Megatron's: logits, jitter, z-loss, groups, expert bias, the auxiliary losses and the
    counts of the expert bias, which tell what the tokens chose, before it is changed. Parameters, buffers and keys of
    checkpoints are Megatron's too.
    """

    def __init__(
        self, config: Any, pg_collection: Any = None, *, wrap: Callable[[nn.Module], nn.Module], **more: Any
    ) -> None:
        """
        Args:
            config, pg_collection, more: as Megatron's.
            wrap: see ``router=`` of :func:`sonic.megatron.enable`.

        Raises:
            ValueError: ``wrap`` returns no module, or one with parameters or buffers to save; sinkhorn, dropping by
                capacity or fused permutation, which count on top-K, are asked for.
        """
        super().__init__(config=config, pg_collection=pg_collection, **more)
        self.wrap_decision(wrap)

    def wrap_decision(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Set what changes the decision; for a router that Megatron built, after its class was changed to this one.

        Raises:
            ValueError: as the constructor.
        """
        where, config = "sonic.megatron: router", self.config
        balancing = "'aux_loss', 'seq_aux_loss', 'global_aux_loss' or 'none' with router="
        for field, is_asked, wanted in (
            ("moe_expert_capacity_factor", config.moe_expert_capacity_factor is not None, "None: the choice changes"),
            ("moe_token_dispatcher_type", config.moe_token_dispatcher_type == "flex", "'allgather' or 'alltoall'"),
            ("moe_permute_fusion", config.moe_permute_fusion, "False: it counts on K experts for each token"),
            ("moe_router_load_balancing_type", self.routing_type == "sinkhorn", balancing),
            ("moe_enable_routing_replay", getattr(config, "moe_enable_routing_replay", False), "False with router="),
        ):
            if is_asked:
                raise argument_error(where, f"config.{field}", getattr(config, field), wanted)
        chosen = wrap(_TopKDecision(self))
        if not isinstance(chosen, nn.Module):
            raise argument_error(where, "router", f"a {type(chosen).__name__}", "a torch.nn.Module: (T, D) -> Routing")
        keys = list(chosen.state_dict())
        if keys:
            raise argument_error(where, "router", f"with {', '.join(keys)}", "nothing that a checkpoint has to hold")
        self.decision = chosen.train(self.training)

    def decide(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route the tokens.

        Args:
            hidden_states: (S, B, D).
            padding_mask: (S, B), true for padding.

        Returns:
            The decision, with a plan over all experts.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.decision(x_TD, hidden_states=hidden_states, padding_mask=padding_mask)
        return routing

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What Megatron's dispatchers want: probabilities (T, E), zero where nothing goes, and where it does, bool."""
        routing = self.decide(input, padding_mask)
        plan = routing.plan
        shape = (plan.num_tokens, plan.num_experts)
        expert_R = torch.repeat_interleave(
            torch.arange(plan.num_experts, device=plan.device), plan.tokens_per_expert(), output_size=plan.num_rows
        )
        place_R = plan.token_of_row_R.long() * plan.num_experts + expert_R
        score_R = routing.scores.reshape(-1)[plan.slot_of_row_R.long()]
        probs = score_R.new_zeros(plan.num_tokens * plan.num_experts).index_put((place_R,), score_R)
        chosen = torch.zeros(probs.shape, dtype=torch.bool, device=probs.device).index_fill_(0, place_R, True)
        return probs.reshape(shape), chosen.reshape(shape)


class _TopKDecision(nn.Module):
    """Megatron's own decision in the form that :mod:`sonic.routing` knows: (T, D) -> Routing."""

    def __init__(self, router: TopKRouter) -> None:
        super().__init__()
        self._router = (router,)  # in a tuple: its parameters are not to be found here again
        config = router.config
        self.hidden_size, self.num_experts, self.top_k = config.hidden_size, config.num_moe_experts, router.topk
        self.score_function = router.score_function
        self.num_groups = config.moe_router_num_groups or 1

    def forward(self, x_TD: Tensor, *, hidden_states: Tensor, padding_mask: Tensor | None) -> Routing:
        router = self._router[0]
        router._maintain_float32_expert_bias()
        logits = router.gating(router.apply_input_jitter(hidden_states))
        if router.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        probs_TE, map_TE = router.routing(logits, padding_mask=padding_mask)
        index_TK, scores_TK = topk_of_map(probs_TE, map_TE, self.top_k)
        plan = RoutingPlan.from_topk(index_TK, self.num_experts)
        logits_TE = logits.reshape(-1, self.num_experts)
        metrics = RoutingMetrics(plan, logits=logits_TE)
        return Routing(plan, scores_TK, logits_TE.float(), index_TK, logits_TE.new_zeros(()), metrics)

    def pair_scores(self, x_TD: Tensor, logits_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """Raw probabilities of any pairs, times the router's factor: (P,)."""
        raw_P = pair_scores(logits_TE, token_P, expert_P, score_function=self.score_function)
        return raw_P * (self._router[0].config.moe_router_topk_scaling_factor or 1.0)


def topk_of_map(probs_TE: Tensor, map_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K experts of each token and their probabilities, from tables of which each row holds K.

    Args:
        probs_TE: (T, E).
        map_TE: (T, E) bool, K true in each row: a probability may be zero, so that they do not tell.
        top_k: K.

    Returns:
        Experts (T, K) int32, ascending, and their probabilities (T, K). Nothing waits for the device.
    """
    index_TK = torch.topk(map_TE.to(torch.uint8), top_k, dim=1).indices.sort(dim=1).values
    return index_TK.to(torch.int32), probs_TE.gather(1, index_TK)
