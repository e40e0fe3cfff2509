"""Train Mixture-of-Experts models with activation memory that does not grow with expert granularity, on any machine.

Start with :class:`sonic.MoE`; :func:`sonic.moe_mlp` and :func:`sonic.expert_mlp` are the same experts as functions.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from sonic import kernels, layers, routing
from sonic.functional import expert_mlp, moe_mlp
from sonic.kernels.ops import ACTIVATIONS
from sonic.layers.moe import MoE
from sonic.routing.plan import RoutingPlan

__all__ = ["ACTIVATIONS", "MoE", "RoutingPlan", "expert_mlp", "kernels", "layers", "moe_mlp", "routing"]

__version__ = "0.1.0"

# Faces of other libraries and rooms of their own, each a module that is read when its name is first used.
_LAZILY = ("compat", "fsdp", "huggingface", "megatron", "parallel", "simulator", "torchtitan")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZILY:
        return importlib.import_module(f"sonic.{name}")
    raise AttributeError(f"module 'sonic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZILY])
