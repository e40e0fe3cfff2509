"""What ``config.json`` tells about a model's MoE layers, and the ``sonic`` field that a converted one carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sonic.shapes import argument_error

__all__ = ["FIELD", "Sizes", "expected_sizes", "sonic_field"]

FIELD = "sonic"
_WHERE = "sonic.convert"
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe")
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


@dataclass(frozen=True)
class Sizes:
    """Of a MoE layer.

    Attributes:
        num_experts: E.
        hidden_size: D.
        intermediate_size: N.
        is_gated: U = 2N, else U = N.
        shared_intermediate_size: N' of the shared expert; 0 without one.
        bias: the experts have biases.
        router_bias: the router has one.
        expert_bias: and one for choosing only.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool
    shared_intermediate_size: int
    bias: bool
    router_bias: bool
    expert_bias: bool


def expected_sizes(config: Mapping[str, Any] | None, width: str) -> dict[str, int]:
    """E, D and N as far as ``config.json`` tells them.

    Args:
        config: of a model of a known family; None: nothing is known.
        width: the field that holds N.
    """
    if config is None:
        return {}
    count = next((config[name] for name in _COUNTS if config.get(name) is not None), None)
    found = {"E": count, "D": config.get("hidden_size"), "N": config.get(width)}
    return {letter: size for letter, size in found.items() if type(size) is int}


def sonic_field(
    config: Mapping[str, Any], family: str, origin: Mapping[str, str], sizes: Sizes, glu_layout: str
) -> dict[str, Any]:
    """The ``sonic`` field: where the layers came from, and the arguments that build them.

    ``layer`` are arguments of :class:`sonic.MoE`, ``router`` those of :class:`sonic.routing.TopKRouter`. What
    ``config.json`` does not tell (of a family that is not known here) is left out.

    Args:
        config: of the source.
        family: whose code computes the layers; the name of a format.
        origin: ``format`` and ``storage`` of the source.
        sizes: of its layers.
        glu_layout: of the converted ``w1``.

    Raises:
        ValueError: sonic computes something else than this configuration says.
    """
    router, activation = _router(config, family, sizes), _activation(config, family, sizes)
    shape = {"hidden_size": sizes.hidden_size, "num_experts": sizes.num_experts}
    top_k = config.get("num_experts_per_tok")
    known: dict[str, Any] = {**shape, "top_k": top_k} if type(top_k) is int else shape
    layer = {
        **known,
        "intermediate_size": sizes.intermediate_size,
        **({"activation": activation} if activation else {}),
        "bias": sizes.bias,
        "shared_intermediate_size": sizes.shared_intermediate_size,
        "glu_layout": glu_layout,
    }
    return {
        "version": 1,
        "source": dict(origin),
        "layer": layer,
        **({"router": {**known, **router}} if router is not None else {}),
    }


def _activation(config: Mapping[str, Any], name: str, sizes: Sizes) -> str | None:
    if name == "gpt_oss":
        for field, wanted in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
            if config.get(field, wanted) != wanted:
                raise argument_error(
                    _WHERE, f"{field} in config.json", config[field], f"{wanted}, as swiglu_oai has it"
                )
        return "swiglu_oai"
    hidden_act = config.get("hidden_act", "silu" if name in _FAMILIES else None)  # their default
    if hidden_act is None or not sizes.is_gated:
        return None
    if hidden_act not in _GATED:
        raise argument_error(_WHERE, "hidden_act in config.json", repr(hidden_act), f"one of {', '.join(_GATED)}")
    return _GATED[hidden_act]


def _router(config: Mapping[str, Any], name: str, sizes: Sizes) -> dict[str, Any] | None:
    """Options of the router of each family, as its own code computes it; None: not known."""
    if name in ("mixtral", "granitemoe"):
        return {"score_function": "softmax", "pre_softmax": False}
    if name == "gpt_oss":
        return {"score_function": "softmax", "pre_softmax": False, "bias": True}
    if name in ("qwen3_moe", "olmoe"):
        is_normalised = bool(config.get("norm_topk_prob", False))
        return {"score_function": "softmax", "pre_softmax": True, "norm_topk_prob": is_normalised}
    if name == "deepseek_v3":
        return {
            "score_function": "sigmoid",
            "norm_topk_prob": bool(config.get("norm_topk_prob", True)),
            "topk_scaling_factor": float(config.get("routed_scaling_factor", 2.5)),
            "enable_expert_bias": sizes.expert_bias,
            **_groups(config),
        }
    return None


def _groups(config: Mapping[str, Any]) -> dict[str, int]:
    """DeepSeek-V3's own code takes the two best experts of a group for its worth, sonic the K // group_topk best."""
    num_groups, group_topk = config.get("n_group", 8) or 1, config.get("topk_group", 4) or 1
    top_k = config.get("num_experts_per_tok")
    if group_topk >= num_groups:  # no limit at all
        return {}
    if type(top_k) is int and max(1, top_k // group_topk) != 2:
        was = f"{top_k}, with topk_group = {group_topk}"
        wanted = "twice topk_group or one more: a group counts with its two best experts"
        raise argument_error(_WHERE, "num_experts_per_tok in config.json", was, wanted)
    return {"num_groups": num_groups, "group_topk": group_topk}
