"""Megatron's MoE layer, without a permuted copy of the tokens where no token has to travel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from sonic.layers.megatron.experts import SonicExperts
from sonic.layers.megatron.options import ExpertsOptions
from sonic.layers.megatron.router import SonicRouter, topk_of_map
from sonic.routing.plan import RoutingPlan

__all__ = ["SonicMoELayer", "why_dispatched"]

_WHOLE = ["route", "expert_compute", "postprocess"]


class SonicMoELayer(MoELayer):
    """``MoELayer`` that computes its experts on the tokens where they stand, if all of them lie on this rank.

    Megatron's route is route, permute into a copy per expert, experts, unpermute, sum; here it is route and
    :func:`sonic.moe_mlp`, which reads tokens through an index and sums in float32. With expert parallelism, or
    experts that are split, tokens travel, and this is Megatron's own ``forward``: :func:`why_dispatched` tells.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        **more: Any,
    ) -> None:
        """As Megatron's; options are those of the experts' spec, an :class:`ExpertsOptions`."""
        experts: Any = getattr(submodules, "experts", None)
        if isinstance(experts, partial):  # as later versions of Megatron-core have it
            options = experts.keywords.get("submodules")
        else:
            options = getattr(experts, "submodules", None)
        if isinstance(options, ExpertsOptions) and options.router is not None:
            submodules = replace(submodules, router=partial(SonicRouter, wrap=options.router))
        super().__init__(config, submodules, layer_number, pg_collection, **more)
        if isinstance(self.router, SonicRouter):
            self.count_rows()

    def count_rows(self) -> None:
        """Have the all-to-all dispatcher count rows, where Megatron's knows them to be K for each token."""
        dispatcher = self.token_dispatcher
        if not isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
            return
        preprocess = dispatcher.preprocess

        def counted(routing_map: Tensor) -> Any:
            tokens_per_expert = preprocess(routing_map)
            dispatcher.num_out_tokens = int(routing_map.sum())
            return tokens_per_expert

        dispatcher.preprocess = counted

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Route the tokens, apply the experts, sum, and add the shared expert.

        Args:
            hidden_states: (S, B, D), this rank's part of the sequence with sequence parallelism.
            intermediate_tensors: of a graph that was captured in part; Megatron's own forward then.
            padding_mask: (B, S), true for padding.

        Returns:
            (S, B, D), and None for there is no bias to add.
        """
        if intermediate_tensors is not None or why_dispatched(self) is not None:
            out: tuple[Tensor, None] = super().forward(hidden_states, intermediate_tensors, padding_mask)
            return out
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._on_the_spot, False, hidden_states, padding_mask), None
        return self._on_the_spot(hidden_states, padding_mask), None

    def _on_the_spot(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        shared = self.shared_experts_compute(hidden_states)
        if isinstance(self.router, SonicRouter):
            routing = self.router.decide(hidden_states, padding_mask)
            plan, scores = routing.plan, routing.scores
        else:
            plan, scores = self._plan(*self.route(hidden_states, padding_mask))
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out: Tensor = self.experts.mix(x_TD, scores, plan).reshape(hidden_states.shape)
        return out if shared is None else out + shared

    def _plan(self, probs_TE: Tensor, map_TE: Tensor) -> tuple[RoutingPlan, Tensor]:
        num_tokens, num_experts = map_TE.shape
        if self.config.moe_expert_capacity_factor is None:
            index_TK, scores_TK = topk_of_map(probs_TE, map_TE, self.config.moe_router_topk)
            return RoutingPlan.from_topk(index_TK, num_experts), scores_TK
        token_P, expert_P = map_TE.nonzero(as_tuple=True)  # as many as capacity left: waits for the device
        plan = RoutingPlan.from_pairs(token_P, expert_P, num_tokens, num_experts)
        return plan, probs_TE[token_P, expert_P]


def why_dispatched(layer: MoELayer) -> str | None:
    """Why a layer takes Megatron's route of permuted copies; None where tokens are computed where they stand.

    Args:
        layer: any ``MoELayer``, built.
    """
    experts, config = layer.experts, layer.config
    if not isinstance(experts, SonicExperts):
        return f"its experts are a {type(experts).__name__}"
    if not isinstance(layer, SonicMoELayer) or not experts.options.fused_layer:
        return "fused_layer was not asked for"
    if layer.ep_group.size() > 1:
        return f"tokens travel to experts on {layer.ep_group.size()} expert-parallel ranks"
    if experts.tp_group.size() > 1:
        return f"tokens travel: every expert is split over {experts.tp_group.size()} ranks"
    if layer.training and layer.attn_tp_group.size() > 1 and not config.sequence_parallel:
        return "Megatron refuses to train it with tensor but without sequence parallelism"
    if config.moe_latent_size:
        return "tokens are projected before they are dispatched (moe_latent_size)"
    if config.moe_apply_probs_on_input:
        return "probabilities are applied to a copy of the tokens (moe_apply_probs_on_input)"
    if layer.shared_expert_overlap:
        return "the dispatcher runs the shared expert (moe_shared_expert_overlap)"
    if list(layer.fwd_execution_map) != _WHOLE or getattr(config, "cuda_graph_impl", "none") != "none":
        return "parts of it are captured in CUDA graphs"
    return None
