"""What a user chooses for the experts of Megatron-core, and what its config asks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from sonic.functional import check_options
from sonic.shapes import argument_error

__all__ = ["ExpertsOptions", "activation_of", "check_config"]

# Fields of TransformerConfig that these experts do not honour -> what is served, and how to tell. A field that this
# Megatron-core lacks asks for nothing.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("fp8", bool, "None: the experts compute in bf16, fp16 or fp32"),
    ("fp4", bool, "None: the experts compute in bf16, fp16 or fp32"),
    ("use_kitchen", bool, "False: the experts are not quantized"),
    ("quant_recipe", lambda value: value is not None, "None: the experts are not quantized"),
    ("activation_func_fp8_input_store", bool, "False; save='input' of sonic.megatron keeps no pre-activation at all"),
    ("use_te_activation_func", bool, "False: activations are part of the experts' kernels"),
    ("moe_mlp_glu_interleave_size", lambda value: value is not None, "None: gate rows come first, then up rows"),
    ("moe_single_grouped_weight", bool, "False: the experts have one weight of their own layout"),
    ("batch_invariant_mode", bool, "False: tiles of the experts' kernels depend on how many rows there are"),
    ("cpu_offloading", bool, "False: what the experts keep is not offloaded; take save='input'"),
    ("init_model_with_meta_device", bool, "False: the experts are built on a device"),
)


@dataclass
class ExpertsOptions:
    """Options of :func:`sonic.megatron.enable`; a spec carries them as the ``submodules`` of the experts.

    Attributes:
        save: what backward keeps: ``"preactivation"`` or ``"input"``, see :mod:`sonic.functional`.
        backend: insist on a kernel backend.
        fused_layer: whether a layer whose experts all lie on this rank computes them on tokens where they stand.
        router: what is made of each router's decision, see :func:`sonic.megatron.enable`.
        activation_func: Megatron writes here what it writes to the submodules of any experts; it is not read.
    """

    save: str = "preactivation"
    backend: str | None = None
    fused_layer: bool = False
    router: Callable[[nn.Module], nn.Module] | None = None
    activation_func: Any = None

    def check(self, where: str) -> ExpertsOptions:
        """Itself.

        Raises:
            ValueError: an option that is no such name, or a router that cannot be called.
        """
        check_options(where, "swiglu", "concatenated", self.save, self.backend)
        if self.router is not None and not callable(self.router):
            wanted = "a function: a module (T, D) -> Routing to the module to use, such as sonic.routing.TokenRounding"
            raise argument_error(where, "router", f"a {type(self.router).__name__}", wanted)
        return self

    @property
    def needs_layer(self) -> bool:
        """Whether the class of the layer changes too, not of its experts alone."""
        return self.fused_layer or self.router is not None


def activation_of(where: str, config: Any) -> str:
    """The name in ``sonic.ACTIVATIONS`` of what a TransformerConfig asks for between the projections.

    Args:
        where: who asks.
        config: ``activation_func``, ``gated_linear_unit``, ``activation_func_clamp_value`` and ``glu_linear_offset``
            are read.

    Raises:
        ValueError: there is none; the message names the field.
    """
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    gated, function = config.gated_linear_unit, config.activation_func
    clamp = getattr(config, "activation_func_clamp_value", None)
    offset = getattr(config, "glu_linear_offset", 0.0)
    if gated and function is quick_gelu and (clamp, offset) == (7.0, 1.0):
        return "swiglu_oai"
    only_oai = "which only the gate of gpt-oss has: quick_gelu, gated, clamped at 7.0 with an offset of 1.0"
    if clamp is not None:
        raise argument_error(where, "config.activation_func_clamp_value", clamp, f"None, or a clamp {only_oai}")
    if offset != 0.0:
        raise argument_error(where, "config.glu_linear_offset", offset, f"0, or an offset {only_oai}")
    names = (
        ((F.silu, "swiglu"), (F.gelu, "geglu"), (F.relu, "reglu"))
        if gated
        else ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"), (squared_relu, "relu2"))
    )
    found = next((name for served, name in names if function is served), None)
    if found is None:
        was = f"{getattr(function, '__name__', function)} ({'gated' if gated else 'not gated'})"
        wanted = f"one of {', '.join(served.__name__ for served, _ in names)} of torch.nn.functional or Megatron"
        raise argument_error(where, "config.activation_func", was, wanted)
    if getattr(config, "bias_activation_fusion", False) and found in ("geglu", "gelu", "reglu", "relu", "silu"):
        # Megatron's experts refuse it too; its fused gelu of a dense MLP is the tanh approximation, another function
        raise argument_error(
            where, "config.bias_activation_fusion", True, f"False with {found}: Megatron has no such fusion"
        )
    return found


def check_config(where: str, config: Any) -> str:
    """Refuse what a config asks for and the experts do not do; return the name of their activation.

    Args:
        where: who asks.
        config: a TransformerConfig.

    Raises:
        ValueError: the first field that is not served, by name.
    """
    for field, is_asked, wanted in _REFUSED:
        value = getattr(config, field, None)
        if is_asked(value):
            raise argument_error(where, f"config.{field}", repr(value), wanted)
    if config.recompute_granularity == "selective" and "moe_act" in (config.recompute_modules or ()):
        wanted = (
            "without 'moe_act': activations are always computed again; take 'moe', or save='input' of sonic.megatron"
        )
        raise argument_error(where, "config.recompute_modules", config.recompute_modules, wanted)
    offloaded = {"expert_fc1", "moe_act"} & set(getattr(config, "offload_modules", None) or ())
    if getattr(config, "fine_grained_activation_offloading", False) and offloaded:
        wanted = f"without {', '.join(sorted(offloaded))}: what the experts keep is not offloaded"
        raise argument_error(where, "config.offload_modules", config.offload_modules, wanted)
    if config.moe_apply_probs_on_input and config.moe_router_topk != 1:
        raise argument_error(where, "config.moe_router_topk", config.moe_router_topk, "1 with moe_apply_probs_on_input")
    return activation_of(where, config)
