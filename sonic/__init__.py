"""Train Mixture-of-Experts models with activation memory that does not grow with expert granularity, on any machine.

Start with :class:`sonic.MoE`; :func:`sonic.moe_mlp` and :func:`sonic.expert_mlp` are the same experts as functions.
"""

from sonic import kernels, layers, routing
from sonic.functional import expert_mlp, moe_mlp
from sonic.kernels.ops import ACTIVATIONS
from sonic.layers.moe import MoE
from sonic.routing.plan import RoutingPlan

__all__ = ["ACTIVATIONS", "MoE", "RoutingPlan", "expert_mlp", "kernels", "layers", "moe_mlp", "routing"]

__version__ = "0.1.0"
