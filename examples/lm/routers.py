"""The routings that the language model can be trained with, by name.

All of them score the tokens with one (E, D) matrix, drawn alike, and differ in who goes where as they train. In eval
mode each is plain top-K of its own scores: every byte's experts depend on that byte's own state alone, so no byte sees
the future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sonic

if TYPE_CHECKING:
    from examples.lm.model import ModelConfig

RULES = ("nearest", "stochastic", "nearest_score", "balanced", "up", "down")
CAPACITY_FACTOR = 1.25
BIAS_RATE = 1e-2  # runs are short: at the customary 1e-3 a few hundred steps end before the experts are in balance


def topk(c: ModelConfig, **options: Any) -> nn.Module:
    """Top-K, held in balance by the auxiliary loss."""
    losses = {"aux_loss_coeff": c.aux_loss_coeff, "z_loss_coeff": c.z_loss_coeff}
    # "world": balance the tokens of all processes together; alone, that is this one.
    return sonic.routing.TopKRouter(c.hidden_size, c.experts, c.top_k, aux_loss_group="world", **{**losses, **options})


def rounded(c: ModelConfig) -> nn.Module:
    """Top-K with every expert's share rounded to whole tiles of ``tile_rows``, by the rule that the config names.

    The stochastic rule draws from torch's own generator, which the trainer seeds anew for each step: a run that was
    stopped and goes on draws what the unbroken one would have drawn.
    """
    return sonic.routing.TokenRounding(topk(c), rule=c.routing, tile_rows=c.tile_rows)


def expert_choice(c: ModelConfig) -> nn.Module:
    """Each expert takes its T * K / E best tokens, so that none is fuller than another, without a loss."""
    return sonic.routing.ExpertChoiceRouter(c.hidden_size, c.experts, c.top_k, z_loss_coeff=c.z_loss_coeff)


def capacity(c: ModelConfig) -> nn.Module:
    """Top-K with the auxiliary loss, without the pairs of lowest score above 1.25 times an expert's equal share."""
    return sonic.routing.CapacityDropping(topk(c), capacity_factor=CAPACITY_FACTOR, policy="score")


def bias(c: ModelConfig) -> nn.Module:
    """Top-K of sigmoid scores plus a bias per expert, which moves after each step to where too few went: no loss."""
    balance = {"enable_expert_bias": True, "expert_bias_rate": BIAS_RATE, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}
    return topk(c, score_function="sigmoid", norm_topk_prob=True, **balance)


ROUTINGS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "topk": topk,
    **dict.fromkeys(RULES, rounded),
    "expert_choice": expert_choice,
    "capacity": capacity,
    "bias": bias,
}


def build_router(config: ModelConfig) -> nn.Module:
    """The router of one layer."""
    return ROUTINGS[config.routing](config)


@torch.no_grad()
def pair_changes(routing: sonic.routing.Routing, top_k: int) -> Tensor:
    """How a routing departs from plain top-K of its logits.

    Returns:
        (3,) int64: (token, expert) pairs that it has and top-K has not; pairs that top-K has and it has not; tokens
        that no expert takes.
    """
    plan, logits_TE = routing.plan, routing.logits
    count_E = plan.tokens_per_expert().long()
    expert_E = torch.arange(plan.num_experts, device=plan.device)
    expert_R = expert_E.repeat_interleave(count_E, output_size=plan.num_rows)
    taken_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    taken_TE[plan.token_of_row_R.long(), expert_R] = True
    wanted_TE = torch.zeros_like(taken_TE).scatter_(1, logits_TE.topk(top_k).indices, True)
    added, dropped = taken_TE & ~wanted_TE, wanted_TE & ~taken_TE
    return torch.stack((added.sum(), dropped.sum(), (~taken_TE.any(1)).sum()))


@contextmanager
def routed_as_in_training(model: nn.Module) -> Iterator[None]:
    """Inside: expert choice in eval mode too, where it looks ahead. Other routers stay as they are."""
    routers: list[Any] = [module for module in model.modules() if hasattr(module, "eval_mode")]
    before = [router.eval_mode for router in routers]
    try:
        for router in routers:
            router.eval_mode = "expert_choice"
        yield
    finally:
        for router, mode in zip(routers, before, strict=True):
            router.eval_mode = mode
