"""Seconds of compute of each piece of a layer, on one GPU and for the tokens of one micro-batch.

* products of matrices: max(FLOP at a share of peak, bytes at a share of HBM);
* attention's core: causal FLOP at a share of peak; its gradient has 2.5 times as many;
* experts: the fitted shares of the kernels on the FLOP and bytes of :mod:`sonic.roofline`;
* elementwise work (norms, residual sums, activations, rotary embedding, the loss): its bytes at a share of HBM;
* the fixed cost of each sub-block is the one that serving was fitted with.
"""

from __future__ import annotations

from dataclasses import dataclass

from sonic.planner.constants import CONSTANTS, KERNELS, Machine
from sonic.planner.models import Model
from sonic.roofline import Layer, layer_bound

__all__ = ["Piece", "PieceCosts", "Shard"]


@dataclass(frozen=True)
class Piece:
    """Seconds of one piece: forward, gradient of its input, gradient of its weights."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )


@dataclass(frozen=True)
class Shard:
    """What one GPU computes of a micro-batch.

    Attributes:
        tokens: of its sequences.
        sequence: tokens of one sequence.
        tp, ep: degrees of tensor and expert parallelism.
        copies: ranks that a token is sent to, on average.
        sequence_parallel: norms and sums are shared out over tensor-parallel ranks.
    """

    tokens: int
    sequence: int
    tp: int
    ep: int
    copies: float
    sequence_parallel: bool


class PieceCosts:
    """Costs of the pieces of ``model`` on ``machine``, for one :class:`Shard`.

    Args:
        model: shapes.
        machine: chip.
        shard: tokens and degrees.
        kernels: name in ``KERNELS``: which kernels the experts run on.
        recompute: ``"none"``, ``"experts"`` or ``"cores"``: what backward computes again.
    """

    def __init__(self, model: Model, machine: Machine, shard: Shard, kernels: str, recompute: str) -> None:
        self.model, self.shard, self.recompute = model, shard, recompute
        self.kernels = KERNELS[kernels]
        self.peak = machine.chip.flops_per_second["bfloat16"]
        self.bandwidth = machine.chip.memory_bytes_per_second
        self.chip = machine.chip
        self.stream_tokens = shard.tokens / (shard.tp if shard.sequence_parallel else 1)

    def embedding(self) -> Piece:
        """Looking tokens up."""
        return self._elementwise(self.stream_tokens * self.model.hidden_size, 2, 2)

    def norm(self) -> Piece:
        """The residual sum and the norm at the begin of a sub-block, and its fixed cost."""
        return self._elementwise(self.stream_tokens * self.model.hidden_size, 5, 8) + self._fixed()

    def qkv(self) -> Piece:
        """Norm, projections and rotary embedding."""
        model, shard = self.model, self.shard
        projection = self._product(self._projection_size(first=True) / shard.tp, model.hidden_size)
        rotary = shard.tokens * (model.num_heads + model.num_kv_heads) * model.head_dim / shard.tp
        return self.norm() + projection + self._elementwise(rotary, 2, 2)

    def core(self, is_full: bool) -> Piece:
        """Attention itself; nothing where the layer does not look at all tokens."""
        model, shard = self.model, self.shard
        if not is_full:
            return Piece()
        flops = 2.0 * shard.tokens * shard.sequence * model.num_heads * model.head_dim / shard.tp
        share = CONSTANTS["attention_64" if model.head_dim <= 64 else "attention_128"].value
        forward = flops / (share * self.peak)
        backward = 2.5 * forward / CONSTANTS["attention_backward"].value
        again = forward if self.recompute == "cores" else 0.0
        return Piece(forward, backward + again)

    def output(self) -> Piece:
        """The projection after attention."""
        width = self._projection_size(first=False) / self.model.hidden_size
        return self._product(self._projection_size(first=False) / self.shard.tp, width / self.shard.tp)

    def mlp_in(self, width: int, with_norm: bool) -> Piece:
        """First products of an MLP (or shared expert) of ``width``, and its activation."""
        factor = 2 if self.model.gated else 1
        local = width / self.shard.tp
        product = self._product(factor * local * self.model.hidden_size, self.model.hidden_size)
        active = self._elementwise(self.shard.tokens * local, factor + 1, 2 * factor + 1)
        return (self.norm() if with_norm else Piece()) + product + active

    def mlp_out(self, width: int) -> Piece:
        """Last product of an MLP."""
        local = width / self.shard.tp
        return self._product(local * self.model.hidden_size, local)

    def router(self) -> Piece:
        """Norm, logits, choice and plan; with expert parallelism the host waits for how many rows come from whom."""
        model, shard = self.model, self.shard
        logits = self._product(model.router_size, model.hidden_size)
        table = 2 * shard.tokens * model.num_experts  # float32 counts twice
        counts = Piece(CONSTANTS["counts"].value if shard.ep > 1 else 0.0)
        return self.norm() + logits + self._elementwise(table, 2, 2) + counts

    def experts(self) -> Piece:
        """Experts on the rows that have come to this rank, from the rows' gathering to their sum; packing, if sent."""
        model, shard = self.model, self.shard
        rows = shard.tokens * model.top_k
        local = model.num_experts // shard.ep
        each = max(1, round(rows / local))
        # as many tokens as copies come in; rounding must not leave an expert with more rows than there are tokens
        tokens = max(each, round(shard.tokens * shard.copies))
        layer = Layer(
            *(tokens, model.hidden_size, max(1, model.expert_intermediate_size // shard.tp), local),
            min(model.top_k, local),
            gated=model.gated,
            need_h=self.recompute == "none",
            tokens_per_expert=(each,) * local,
        )
        seconds = []
        for passes in ("forward", "backward"):
            cost = layer_bound(layer, self.chip, passes).cost
            flops = cost.flops / (self.kernels.flops * self.peak)
            seconds.append(flops + cost.bytes / (self.kernels.memory * self.bandwidth))
        # packing what is sent and unpacking what has come, on the way there and on the way back
        copies = shard.tokens * shard.copies * model.hidden_size if shard.ep > 1 else 0
        return Piece(*seconds) + self._elementwise(copies, 4, 4)

    def head(self) -> Piece:
        """Last norm, logits and the loss, the vocabulary shared out over tensor-parallel ranks."""
        model, shard = self.model, self.shard
        width = model.vocab_size / shard.tp
        product = self._product(width * model.hidden_size, model.hidden_size)
        return self.norm() + product + self._elementwise(shard.tokens * width, 2, 2)

    def optimizer_seconds(self, num_parameters: float) -> float:
        """One step of the optimizer on a GPU's share of the parameters."""
        moved = CONSTANTS["optimizer_bytes"].value * num_parameters
        return moved / (CONSTANTS["memory"].value * self.bandwidth)

    def _projection_size(self, first: bool) -> float:
        model = self.model
        if model.attention_parameters:
            return model.attention_parameters / 2
        return model.hidden_size * (model.qkv_width if first else model.num_heads * model.head_dim)

    def _product(self, size: float, inputs: float) -> Piece:
        """(T, inputs) times a matrix of ``size`` parameters: three products of as many FLOP."""
        tokens = self.shard.tokens
        outputs = size / inputs
        flops = 2 * tokens * size / (CONSTANTS["gemm"].value * self.peak)
        moved = 2 * (tokens * (inputs + outputs) + size) / (CONSTANTS["memory"].value * self.bandwidth)
        seconds = max(flops, moved)
        return Piece(seconds, seconds, seconds)

    def _elementwise(self, values: float, forward: float, backward: float) -> Piece:
        """Reads and writes of 16-bit ``values``, so many times each way."""
        seconds = 2 * values / (CONSTANTS["memory"].value * self.bandwidth)
        return Piece(forward * seconds, backward * seconds)

    def _fixed(self) -> Piece:
        fixed = CONSTANTS["serving.fixed"].value
        return Piece(fixed, 2 * fixed)
