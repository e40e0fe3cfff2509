"""Layers: the MoE module, and how to scale its auxiliary losses."""

from sonic.layers.moe import MoE, SharedExpert, set_aux_loss_scale

__all__ = ["MoE", "SharedExpert", "set_aux_loss_scale"]
