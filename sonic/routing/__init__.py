"""Routing: plans, routers, balancing losses and load figures. Usable on its own, without the layers."""

from sonic.routing.losses import attach_loss, load_balancing_loss, router_z_loss
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.topk import TopKRouter, router_logits, topk_scores

__all__ = [
    "Routing",
    "RoutingMetrics",
    "RoutingPlan",
    "TopKRouter",
    "attach_loss",
    "load_balancing_loss",
    "router_logits",
    "router_z_loss",
    "topk_scores",
]
