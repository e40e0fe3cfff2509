"""Megatron's transformer layer in the order of Ladder Residual: what a sub-layer gives joins the stream one later.

::

    x = x + attention of the layer before       its sum over the tensor-parallel ranks ran under the MLP before
    attention = Attention(norm(x))              reads all but the last MLP
    x = x + MLP of the layer before             its sum ran under this attention
    MLP = MLP(norm(x))                          reads all but this attention

Megatron passes a layer the stream and a ``context``, which decoders without cross-attention leave alone; what is
pending travels there. The last layer adds it. See :mod:`sonic.parallel.wiring` for the same wiring without Megatron.

How much is hidden depends on Megatron's linear layers. Where the row-parallel linear is Megatron's own, it returns
this rank's summand, and its sum is issued here and awaited one sub-layer later. TransformerEngine's waits for its sum
inside, and so do MoE layers, whose dispatchers combine: for these the wiring is that of Ladder Residual, the time is
not. In backward, the reductions that Megatron's column-parallel linears make of their inputs' gradients stay theirs:
each runs under that linear's own weight gradient.

Source: Zhang et al., Ladder-Residual (arXiv:2501.06589).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from sonic.parallel.in_flight import InFlight, all_gather, all_reduce, issue, reduce_scatter
from sonic.shapes import argument_error

__all__ = ["LadderTransformerLayer"]

_WHERE = "sonic.megatron.LadderTransformerLayer"


@dataclass
class _Late:
    """An output that is not in the stream yet.

    Attributes:
        result: what to wait for.
        bias: of its last linear, added after the sum; or None.
        join: adds (output, bias) to the stream, with dropout.
    """

    result: InFlight
    bias: Tensor | None
    join: Callable[[tuple[Tensor, Tensor | None], Tensor], Tensor]

    def onto(self, x: Tensor) -> Tensor:
        """The stream with it. Waits."""
        return self.join((self.result.wait(), self.bias), x)


@dataclass
class _Pending:
    """What travels from layer to layer beside the stream."""

    attention: _Late
    mlp: _Late


class LadderTransformerLayer(TransformerLayer):
    """``TransformerLayer`` wired as Ladder Residual; parameters and keys of checkpoints are Megatron's.

    A model wired so is another function of its weights: it is trained so from the start, or adapted. Put it into a
    spec by :func:`sonic.megatron.use_ladder`, in all layers of a block.

    Attributes:
        hides_attention, hides_mlp: whether the sum of that sub-layer over the tensor-parallel ranks runs under the next
            one. False on one rank too, where nothing is summed.
    """

    def __init__(self, config: Any, submodules: Any, layer_number: int = 1, *args: Any, **kwargs: Any) -> None:
        """As Megatron's.

        Raises:
            ValueError: pipeline parallelism, whose stages pass nothing but the stream on; cross-attention; or something
                else that wants a layer's output to be whole. The message names the field.
        """
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        _check(config)
        if not isinstance(self.cross_attention, IdentityOp):
            raise argument_error(_WHERE, "submodules.cross_attention", type(self.cross_attention).__name__, "none")
        self.hides_attention = self._take_sum(getattr(self.self_attention, "linear_proj", None))
        self.hides_mlp = not self.is_moe_layer and self._take_sum(getattr(self.mlp, "linear_fc2", None))

    def forward(  # noqa: D417
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Any = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **attention_inputs: Any,
    ) -> tuple[Tensor, Any]:
        """Run both sub-layers.

        Args:
            hidden_states: (S, B, D), the stream without what is pending.
            context: what the layer before left pending; None in the first layer.
            attention_mask, padding_mask, attention_inputs: as Megatron's.

        Returns:
            The stream, and what is pending; after the last layer the complete stream and None.

        Raises:
            ValueError: a context of somebody else's.
        """
        attention_inputs.pop("dynamic_inference_decode_only", None)
        if context_mask is not None or not (context is None or isinstance(context, _Pending)):
            raise argument_error(
                _WHERE, "context", f"a {type(context).__name__}", "what the layer before left, or None"
            )
        x = hidden_states if context is None else context.attention.onto(hidden_states)
        out = self.self_attention(self.input_layernorm(x), attention_mask=attention_mask, **attention_inputs)
        attention = self._late(out, self.hides_attention, self.self_attn_bda, "attention")
        if context is not None:
            x = context.mlp.onto(x)
        n = self.pre_mlp_layernorm(x)
        if self.recompute_mlp:
            out = tensor_parallel.checkpoint(functools.partial(self.mlp, padding_mask=padding_mask), False, n)
        else:
            out = self.mlp(n, padding_mask=padding_mask)
        mlp = self._late(out, self.hides_mlp, self.mlp_bda, "mlp")
        if self.layer_number < self.config.num_layers:
            return x, _Pending(attention, mlp)
        x = mlp.onto(attention.onto(x))
        return make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True), None

    def _take_sum(self, linear: Any) -> bool:
        """Have a linear layer return this rank's summand; whether it does."""
        if not isinstance(linear, RowParallelLinear) or self.tp_group.size() == 1:
            return False
        linear.explicit_expert_comm = True  # Megatron's own way to say that the sum is somebody else's business
        return True

    def _late(self, out: tuple[Tensor, Tensor | None], is_summand: bool, bda: Any, kind: str) -> _Late:
        y, bias = out
        if not is_summand:
            result = InFlight.of(y, kind)
        elif self.config.sequence_parallel:
            result = issue(y, reduce_scatter(self.tp_group), all_gather(self.tp_group), kind=kind)
        else:
            result = issue(y, all_reduce(self.tp_group), all_reduce(None), kind=kind)

        def join(out: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
            with self.bias_dropout_add_exec_handler():
                joined: Tensor = bda(self.training, self.config.bias_dropout_fusion)(out, x, self.hidden_dropout)
            return joined

        return _Late(result, bias, join)


def _check(config: Any) -> None:
    recomputed = set(config.recompute_modules or ()) if config.recompute_granularity == "selective" else set()
    for field, is_asked, wanted in (
        ("pipeline_model_parallel_size", config.pipeline_model_parallel_size > 1, "1: stages pass on the stream alone"),
        ("mtp_num_layers", bool(config.mtp_num_layers), "None: the last layer adds what is pending"),
        ("recompute_granularity", config.recompute_granularity == "full", "None or 'selective'"),
        ("recompute_modules", "layernorm" in recomputed, "without 'layernorm'"),
        ("cuda_graph_impl", getattr(config, "cuda_graph_impl", "none") != "none", "'none' with use_ladder"),
        ("cpu_offloading", config.cpu_offloading, "False with use_ladder"),
        ("fine_grained_activation_offloading", config.fine_grained_activation_offloading, "False with use_ladder"),
        ("inference_fuse_tp_communication", config.inference_fuse_tp_communication, "False with use_ladder"),
        ("mlp_chunks_for_prefill", config.mlp_chunks_for_prefill > 1, "1 with use_ladder"),
        ("overlap_moe_expert_parallel_comm", config.overlap_moe_expert_parallel_comm, "False: it runs parts of layers"),
    ):
        if is_asked:
            raise argument_error(_WHERE, f"config.{field}", getattr(config, field), wanted)
