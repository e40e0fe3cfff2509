"""Bytes on one GPU, part by part.

Weights, gradients and states of the optimizer are shared out by FSDP-2: 4 bytes of master weight, 4 of gradient and the
optimizer's states for each parameter of a GPU's share; two layers' weights in bf16 and one layer's gradients are whole.

Between forward and backward each layer keeps, for T tokens of a micro-batch, in 16 bits:

=================  =====================================================================================================
attention          the stream and its normed copy (2 T D), q, k and v, the output before its projection, 4 bytes per
                   head and token of statistics; with ``recompute="cores"`` the stream alone
experts            by the letters of ``KERNELS``: x tokens (copies T D), g gathered rows (R D), h pre-activations (R U),
                   a activations (R N), y outputs (R D); R = K T rows; scores and plan, 16 bytes per row (24, and 8
                   per copy, if sent). sonic keeps x and h, and with ``recompute="experts"`` x alone
shared, dense MLP  pre-activations (T U), and the normed copy (T D) of an MLP
head               logits in 16 bits and their gradient in 32, over ``loss_chunks``
wiring             ladder, farskip: two more tensors of the stream, in flight
=================  =====================================================================================================

Tensor parallelism divides what is between column- and row-parallel products; sequence parallelism the rest too.
"""

from __future__ import annotations

from collections.abc import Mapping

from sonic.planner.constants import CONSTANTS, KERNELS, Kernels
from sonic.planner.costs import Shard
from sonic.planner.models import Model

__all__ = ["OPTIMIZERS", "activation_bytes", "expert_activation_bytes", "memory_parts"]

# Bytes of states per parameter; the master weight counts apart.
OPTIMIZERS: Mapping[str, int] = {"adamw": 8, "adamw-8bit": 2, "muon": 4, "sgd": 0}


def expert_activation_bytes(
    kernels: Kernels, tokens: float, rows: float, hidden_size: int, intermediate_size: float, gated: bool
) -> float:
    """Bytes of 16-bit tensors that one layer's experts keep: the letters of ``kernels.keeps``, without scores and plan.

    Args:
        kernels: which letters.
        tokens: T, on the rank that computes.
        rows: R.
        hidden_size, intermediate_size: D and N.
        gated: U = 2 N, else N.
    """
    up = (2 if gated else 1) * intermediate_size
    of_letter = {
        "x": tokens * hidden_size,
        "g": rows * hidden_size,
        "h": rows * up,
        "a": rows * intermediate_size,
        "y": rows * hidden_size,
    }
    return 2.0 * sum(of_letter[letter] for letter in kernels.keeps)


def activation_bytes(
    model: Model, shard: Shard, kernels: str, recompute: str, wiring: str, loss_chunks: int
) -> dict[str, float]:
    """Bytes kept for backward at the peak, at the end of forward: attention, experts, MLPs, head, in flight."""
    tokens, tp = shard.tokens, shard.tp
    stream = 2.0 * tokens * model.hidden_size / (tp if shard.sequence_parallel else 1)
    heads = tokens * (model.qkv_width + model.num_heads * model.head_dim) / tp
    attention = 2 * stream + 2.0 * heads + 4.0 * tokens * model.num_heads / tp
    if recompute == "cores":
        attention = stream
    rows = tokens * model.top_k
    chosen = KERNELS[kernels]
    if recompute != "none" and "h" in chosen.keeps:
        chosen = Kernels(chosen.flops, chosen.memory, chosen.keeps.replace("h", ""), chosen.mean_error)
    up = 2 if model.gated else 1
    width = model.expert_intermediate_size / tp
    # without copies x is the normed stream, which lives once
    here = tokens * (shard.copies if shard.ep > 1 else 1) / (tp if shard.sequence_parallel and shard.ep == 1 else 1)
    experts = expert_activation_bytes(chosen, here, rows, model.hidden_size, width, model.gated)
    experts += stream + (24.0 * rows + 8.0 * here if shard.ep > 1 else 16.0 * rows)
    shared = 2.0 * tokens * up * model.shared_intermediate_size / tp
    dense = 2 * stream + 2.0 * tokens * up * model.intermediate_size / tp
    num_moe = model.num_moe_layers
    in_flight = 2 * stream if wiring in ("ladder", "farskip") else 0.0
    return {
        "attention": model.num_layers * attention,
        "experts": num_moe * (experts + shared),
        "MLPs": (model.num_layers - num_moe) * dense,
        "logits": 6.0 * tokens * model.vocab_size / tp / loss_chunks,
        "in flight": in_flight,
    }


def memory_parts(
    model: Model,
    shard: Shard,
    shards: tuple[int, int],
    optimizer: str,
    reshard: bool,
    activations: Mapping[str, float],
) -> dict[str, float]:
    """Bytes on one GPU by part; the sum is what must fit.

    Args:
        model: shapes.
        shard: tokens and degrees.
        shards: GPUs that weights outside of the experts, and those of the experts, are shared out over.
        optimizer: name in :data:`OPTIMIZERS`.
        reshard: gathered weights are given up after forward (ZeRO-3); else all stay whole until the end of backward.
        activations: from :func:`activation_bytes`.
    """
    dense, experts = local_parameters(model, shard)
    per_layer = (dense - model.embedding_size / shard.tp) / model.num_layers
    per_layer += experts / max(1, model.num_moe_layers)
    own = dense / shards[0] + experts / shards[1]
    whole = dense + experts if not reshard else min(2 * per_layer + model.embedding_size / shard.tp, dense + experts)
    parts = {
        "master weights": 4.0 * own,
        "gradients": 4.0 * own,
        "optimizer": float(OPTIMIZERS[optimizer]) * own,
        "gathered": 2.0 * whole + 4.0 * per_layer,
    }
    rows = shard.tokens * model.top_k
    transient = 0.0
    if model.num_moe_layers:  # outputs of all rows, and their activations or the gradients of those
        up = (3 if model.gated else 2) * model.expert_intermediate_size / shard.tp
        transient = 2.0 * rows * (model.hidden_size + up)
        if shard.ep > 1:
            transient += 4.0 * shard.tokens * shard.copies * model.hidden_size
    parts |= activations
    parts["workspace"] = transient + CONSTANTS["reserve"].value
    return parts


def local_parameters(model: Model, shard: Shard) -> tuple[float, float]:
    """Parameters that one GPU computes with: outside of the experts, and the experts."""
    dense_layers = model.num_layers - model.num_moe_layers
    dense = model.num_layers * model.attention_size + dense_layers * model.mlp_size + model.embedding_size
    dense += model.num_moe_layers * model.shared_size
    experts = model.num_moe_layers * model.num_experts * model.expert_size
    routers = model.num_moe_layers * model.router_size
    return dense / shard.tp + routers, experts / (shard.tp * shard.ep)
