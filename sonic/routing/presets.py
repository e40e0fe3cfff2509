"""Routers as published models use them, by name.

Each preset is what the model's own code computes, not what its paper's prose says of it. Sizes are the model's too
unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sonic.routing.topk import TopKRouter
from sonic.shapes import check_choice

__all__ = ["PRESETS", "preset_router"]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Sigmoid; chosen with a bias, in at most 4 of 8 groups, a group being as good as its two best; scores without
        # the bias, normalised, times 2.5.
        "deepseek_v3": MappingProxyType(
            {
                **{"hidden_size": 7168, "num_experts": 256, "top_k": 8},
                **{"score_function": "sigmoid", "norm_topk_prob": True, "topk_scaling_factor": 2.5},
                **{"num_groups": 8, "group_topk": 4, "enable_expert_bias": True},
            }
        ),
        # Softmax over all experts, then the K largest, normalised.
        "qwen3": MappingProxyType(
            {
                **{"hidden_size": 4096, "num_experts": 128, "top_k": 8},
                **{"score_function": "softmax", "pre_softmax": True, "norm_topk_prob": True},
            }
        ),
        # The same function as Qwen3's, since a normalised choice of a softmax is the softmax of the choice.
        "mixtral": MappingProxyType(
            {
                **{"hidden_size": 4096, "num_experts": 8, "top_k": 2},
                **{"score_function": "softmax", "pre_softmax": False},
            }
        ),
        # A linear layer with bias; the K largest logits; softmax over these.
        "gpt_oss": MappingProxyType(
            {
                **{"hidden_size": 2880, "num_experts": 128, "top_k": 4},
                **{"score_function": "softmax", "pre_softmax": False, "bias": True},
            }
        ),
        # One expert per token; the sigmoid of its logit multiplies what the expert gets.
        "llama4": MappingProxyType(
            {
                **{"hidden_size": 5120, "num_experts": 16, "top_k": 1},
                **{"score_function": "sigmoid", "scores_on": "input"},
            }
        ),
    }
)
"""Options of :class:`sonic.routing.TopKRouter` per model: DeepSeek-V3, Qwen3-235B-A22B, Mixtral-8x7B, gpt-oss-120b and
Llama-4-Scout."""


def preset_router(name: str, **options: Any) -> TopKRouter:
    """A :class:`sonic.routing.TopKRouter` that decides as a published model's does.

    Args:
        name: a key of :data:`PRESETS`.
        options: of :class:`sonic.routing.TopKRouter`; they win over the preset's.

    Raises:
        ValueError: unknown name, or options that do not fit together.
    """
    check_choice("sonic.routing.preset_router", "name", name, tuple(PRESETS))
    return TopKRouter(**{**PRESETS[name], **options})
