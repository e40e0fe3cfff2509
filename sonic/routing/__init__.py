"""Routing: plans, routers, balancing losses and load figures. Usable on its own, without the layers."""

from sonic.routing.capacity import CapacityDropping
from sonic.routing.expert_choice import ExpertChoiceRouter
from sonic.routing.hash import HashRouter
from sonic.routing.losses import attach_loss, load_balancing_loss, router_z_loss, sequence_load
from sonic.routing.plan import RoutingPlan
from sonic.routing.presets import PRESETS, preset_router
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import pair_scores, router_logits, topk_scores
from sonic.routing.token_rounding import ROUNDING_RULES, RoundedPairs, TokenRounding, round_counts, round_to_tiles
from sonic.routing.topk import TopKRouter, reset_load, update_expert_bias

__all__ = [
    "ROUNDING_RULES",
    "RoundedPairs",
    "TokenRounding",
    "round_counts",
    "round_to_tiles",
    "PRESETS",
    "CapacityDropping",
    "ExpertChoiceRouter",
    "HashRouter",
    "Routing",
    "RoutingMetrics",
    "RoutingPlan",
    "TopKRouter",
    "attach_loss",
    "load_balancing_loss",
    "pair_scores",
    "preset_router",
    "reset_load",
    "router_logits",
    "router_z_loss",
    "sequence_load",
    "topk_scores",
    "update_expert_bias",
]
