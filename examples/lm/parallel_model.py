"""The language model of ``model.py`` over a mesh, in any wiring: same parameters, same names of layers, same shapes.

Nothing is invented here: attention's linears become column- and row-parallel, experts are spread by
``parallelize_moe``, layers become ``LadderBlock`` and are wired by a ``LadderStack``, and the head is split along the
vocabulary. Alone, on one process and wired ``standard``, it computes what ``model.py`` computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import sonic
from examples.lm.model import Attention, Block, LanguageModel, ModelConfig
from examples.lm.parallel_world import ParallelWorld
from sonic.parallel import (
    ColumnParallelLinear,
    LadderBlock,
    LadderStack,
    RowParallelLinear,
    Wiring,
    parallelize_moe,
    shard_ladder,
    vocab_parallel_cross_entropy,
)


@dataclass(frozen=True)
class ParallelModelConfig(ModelConfig):
    """The shape of the model.

    Attributes:
        shared_size: width of an expert that every token passes, which other ranks' tokens can hide under; 0: none.
    """

    shared_size: int = 0


STACK = "stack."  # what the names of the layers' parameters have in front, compared with model.py


class ParallelAttention(nn.Module):
    """This rank's heads of a causal self-attention: (B, S, D) -> (B, S, D), a partial sum over the ``tp`` ranks."""

    def __init__(self, whole: Attention, tp_mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.heads = whole.heads // (1 if tp_mesh is None else tp_mesh.size())
        # num_blocks=3: the rows of Q, of K and of V are three matrices, each of which is split
        self.qkv = ColumnParallelLinear.from_linear(whole.qkv, tp_mesh, num_blocks=3, reduce="none")
        self.out = RowParallelLinear.from_linear(whole.out, tp_mesh, reduce="none")

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        heads_of_qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = heads_of_qkv.chunk(3, dim=1)  # each (B, heads, S, D / all heads)
        y = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class ParallelLanguageModel(nn.Module):
    """Bytes in, mean loss of the next byte out.

    Args:
        whole: the model, equal on all ranks; its parameters are taken over.
        wiring: of its layers.
        world: the mesh.
        overlap: what is hidden: ``"off"``, ``"forward"`` or ``"full"``.
        fsdp: shard what is left over the ``dp`` ranks.

    Attributes:
        routings: of each layer in the last forward pass in training, for those who want to know the load.
    """

    def __init__(
        self, whole: LanguageModel, wiring: Wiring, world: ParallelWorld, *, overlap: str = "full", fsdp: bool = False
    ) -> None:
        super().__init__()
        self.config = whole.config
        self.routings: list[sonic.routing.Routing] = []
        tp_mesh = world.axis("tp")
        self._tp_mesh = tp_mesh
        blocks = []
        for block in whole.blocks:
            assert isinstance(block, Block) and isinstance(block.attention, Attention)
            moe = block.mlp
            assert isinstance(moe, sonic.MoE)
            moe.router.aux_loss_group = world.data_group  # the ranks with different text are balanced together
            moe.router.register_forward_hook(self._keep_routing)
            parallelize_moe(moe, ep_mesh=world.axis("ep"), tp_mesh=tp_mesh, tp_reduce="none", overlap=overlap)
            attention = ParallelAttention(block.attention, tp_mesh)
            blocks.append(LadderBlock(block.attention_norm, attention, block.mlp_norm, moe))
        self.embedding = whole.embedding
        self.stack = LadderStack(blocks, wiring, tp_mesh=tp_mesh, overlap=overlap)
        self.norm = whole.norm
        self.head = ColumnParallelLinear.from_linear(whole.head, tp_mesh)
        dp_mesh = world.axis("dp")
        if fsdp and dp_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            shard_ladder(self.stack, dp_mesh)
            fully_shard(self, mesh=dp_mesh)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats, 0-dim and equal on all ``tp`` ranks.

        Args:
            tokens, targets: (B, S) int64, equal on all ``tp`` ranks.
            reduction: ``"mean"`` or ``"sum"`` over the bytes.
        """
        self.routings.clear()
        x = self.embedding(tokens)
        rotation = rotary_angles(tokens.shape[1], self.config.hidden_size // self.config.heads, x)
        logits = self.head(self.norm(self.stack(x, rotation=rotation)))
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), targets.flatten(), self._tp_mesh, reduction=reduction)

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Those of which each ``ep`` rank has other ones."""
        for block in self.stack.blocks:
            yield from (parameter for name, parameter in block.mlp.named_parameters() if name in ("w1", "w2"))

    def other_parameters(self) -> Iterator[nn.Parameter]:
        """Those that are the same on all ``ep`` ranks."""
        experts = {id(parameter) for parameter in self.expert_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in experts)

    def _keep_routing(self, router: nn.Module, inputs: object, routing: sonic.routing.Routing) -> None:
        if router.training:
            self.routings.append(routing)


def whole_model(
    config: ParallelModelConfig, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None
) -> LanguageModel:
    """The model before it is spread: fresh weights from torch's generator, or these ones, named as in ``model.py``."""
    model = LanguageModel(config)
    if config.shared_size:
        for block in model.blocks:
            moe: sonic.MoE = block.mlp
            sizes = (moe.hidden_size, moe.intermediate_size, moe.num_experts, moe.top_k)
            block.mlp = sonic.MoE(*sizes, router=moe.router, shared_intermediate_size=config.shared_size)
        model.initialise()
    if weights is not None:
        model.load_state_dict(dict(weights))
    return model.to(dtype)


def rotary_angles(length: int, head_size: int, like: Tensor) -> Tensor:
    """The rotation of every position, as complex numbers of modulus 1: (length, head_size / 2)."""
    options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, **options) / head_size)  # type: ignore[call-overload]
    angle = torch.outer(torch.arange(length, **options), frequency)  # type: ignore[call-overload]
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbours in a head by its position's angle: (B, heads, S, head_size) -> the same."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
