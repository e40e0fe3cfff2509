"""Routing: plans, routers, balancing losses and load figures. Usable on its own, without the layers."""

from sonic.routing.capacity import CapacityDropping
from sonic.routing.expert_choice import ExpertChoiceRouter
from sonic.routing.hash import HashRouter
from sonic.routing.losses import attach_loss, load_balancing_loss, router_z_loss, sequence_load
from sonic.routing.opportunistic import (
    ActivationReport,
    OpportunisticRouting,
    Rerouted,
    activation_report,
    reroute,
)
from sonic.routing.plan import RoutingPlan
from sonic.routing.presets import PRESETS, preset_router
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import pair_scores, router_logits, topk_scores
from sonic.routing.token_rounding import ROUNDING_RULES, RoundedPairs, TokenRounding, round_counts, round_to_tiles
from sonic.routing.topk import TopKRouter, reset_load, update_expert_bias

__all__ = [
    "PRESETS",
    "ROUNDING_RULES",
    "ActivationReport",
    "CapacityDropping",
    "ExpertChoiceRouter",
    "HashRouter",
    "OpportunisticRouting",
    "Rerouted",
    "RoundedPairs",
    "Routing",
    "RoutingMetrics",
    "RoutingPlan",
    "TokenRounding",
    "TopKRouter",
    "activation_report",
    "attach_loss",
    "load_balancing_loss",
    "pair_scores",
    "preset_router",
    "reroute",
    "reset_load",
    "round_counts",
    "round_to_tiles",
    "router_logits",
    "router_z_loss",
    "sequence_load",
    "topk_scores",
    "update_expert_bias",
]
