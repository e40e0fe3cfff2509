"""A small decoder-only language model over bytes. Its MLP is a ``sonic.MoE``, or a dense MLP of the same FLOPs.

One block in two lines: ``x = x + attention(norm(x))``, ``x = x + mlp(norm(x))``. What may surprise:

- there is no tokenizer: the vocabulary is the 256 bytes, and byte 0, which text never holds, says "a file starts here";
- the head starts at zero: an untrained model gives every byte the same chance, so training starts at 8 bits per byte.

Shapes: B windows, S bytes in each, D the model's width, E experts, K experts per token, N the width of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonic
from examples.lm.routers import build_router, pair_changes

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; every size is a positive integer.

    Attributes:
        mlp: ``"moe"`` or ``"dense"``.
        hidden_size: width of the residual stream (D).
        layers: number of blocks.
        heads: attention heads; D / heads must be even, because the rotation turns pairs.
        experts: experts per layer (E).
        top_k: experts per token (K).
        expert_size: width of one expert (N). The dense MLP has width K * N: the FLOPs that a token meets in the MoE.
        aux_loss_coeff, z_loss_coeff: weights of the router's load-balancing loss and of its penalty on large logits.
        routing: who goes where, one of ``examples.lm.routers.ROUTINGS``.
        tile_rows: rows that token rounding rounds the experts' shares to; the other routings do not read it.
    """

    mlp: str
    hidden_size: int
    layers: int
    heads: int
    experts: int
    top_k: int
    expert_size: int
    aux_loss_coeff: float
    z_loss_coeff: float
    routing: str = "topk"
    tile_rows: int = 0


@dataclass(frozen=True)
class Output:
    """What one forward pass gives.

    Attributes:
        logits: (B, S, 256) fp32.
        aux_loss: 0-dim fp32, the routers' losses of all layers with their coefficients; 0 for a dense model.
        load: (layers, E) integer, rows that each expert got; (0, 0) for a dense model.
        changes: (layers, 3) integer, how a routing in training departs from top-K (see
            :func:`examples.lm.routers.pair_changes`); (0, 3) for a dense model, for top-K itself, and in eval mode.
    """

    logits: Tensor
    aux_loss: Tensor
    load: Tensor
    changes: Tensor


class Attention(nn.Module):
    """Causal self-attention with rotary positions: (B, S, D) -> (B, S, D)."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        heads_of_qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))
        queries_keys, v = heads_of_qkv.split((2 * self.heads, self.heads), dim=-2)
        q, k = rotate(queries_keys, rotation).transpose(1, 2).chunk(2, dim=1)  # each (B, heads, S, D / heads)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class DenseMLP(nn.Module):
    """The gated MLP that every token passes, the rival of the MoE: (B, S, D) -> (B, S, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)  # gate rows first, then up rows
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the MLP; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.attention_norm = nn.RMSNorm(c.hidden_size)
        self.attention = Attention(c.hidden_size, c.heads)
        self.mlp_norm = nn.RMSNorm(c.hidden_size)
        if c.mlp == "dense":
            self.mlp: nn.Module = DenseMLP(c.hidden_size, c.top_k * c.expert_size)
        else:
            self.mlp = sonic.MoE(c.hidden_size, c.expert_size, c.experts, c.top_k, router=build_router(c))

    def forward(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, sonic.routing.Routing | None]:
        x = x + self.attention(self.attention_norm(x), rotation)
        if isinstance(self.mlp, DenseMLP):
            return x + self.mlp(self.mlp_norm(x)), None
        # self.mlp(...) alone would train as well: the router's losses then reach backward by themselves. We ask for the
        # routing because we want to show it, and so add its losses ourselves.
        y, routing = self.mlp(self.mlp_norm(x), return_routing=True)
        return x + y, routing


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out.

    Args:
        config: the shape of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights: normal, with a variance of 1 / fan-in; the head is zero, the scales of the norms one."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            elif name.startswith("head"):
                nn.init.zeros_(parameter)
            elif name.startswith("embedding"):
                nn.init.normal_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor) -> Output:
        """tokens (B, S) int64 -> :class:`Output`."""
        x = self.embedding(tokens)
        rotation = rotary_angles(tokens.shape[1], self.config.hidden_size // self.config.heads, x.device)
        routings = []
        for block in self.blocks:
            x, routing = block(x, rotation)
            if routing is not None:
                routings.append(routing)
        logits = self.head(self.norm(x)).float()
        aux_loss = sum((routing.aux_loss for routing in routings), start=logits.new_zeros(()))
        load = [routing.metrics.tokens_per_expert for routing in routings]
        departs = self.training and self.config.routing != "topk"
        changes = [pair_changes(routing, self.config.top_k) for routing in routings] if departs else []
        return Output(
            logits,
            aux_loss,
            torch.stack(load) if load else tokens.new_zeros(0, 0),
            torch.stack(changes) if changes else tokens.new_zeros(0, 3),
        )


def rotary_angles(length: int, head_size: int, device: torch.device) -> Tensor:
    """The rotation of every position, as complex numbers of modulus 1: (length, head_size / 2) complex64."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbours in a head by its position's angle: (B, S, heads, head_size) -> the same.

    One complex product: on a CPU it takes a fraction of the time of the usual sines, cosines and concatenations.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


def parameter_counts(model: LanguageModel) -> dict[str, int]:
    """Number of parameters: ``total``, and ``active``, those that one token meets (K of E experts)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, sonic.MoE)]
    experts = sum(layer.w1.numel() + layer.w2.numel() for layer in layers)
    c = model.config
    return {"total": total, "active": total - experts + experts * c.top_k // c.experts}


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, int]:
    """FLOPs of one token's forward pass by part; a training step takes three times as many.

    A vector times an (m, n) matrix is 2mn FLOPs; attention looks back at half a window on average. An MoE and its dense
    rival differ in ``router`` alone: 2DE per layer, the price of choosing.

    Args:
        config: the model's shape.
        seq_len: bytes per window.

    Returns:
        ``projections``, ``attention``, ``mlp``, ``router`` and ``head``.
    """
    c = config
    return {
        "projections": c.layers * 2 * 4 * c.hidden_size**2,
        "attention": c.layers * 2 * seq_len * c.hidden_size,
        "mlp": c.layers * 2 * 3 * c.hidden_size * c.top_k * c.expert_size,
        "router": c.layers * 2 * c.hidden_size * c.experts if c.mlp == "moe" else 0,
        "head": 2 * c.hidden_size * VOCABULARY,
    }
