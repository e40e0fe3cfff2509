"""The two layers of the package ``scattermoe``: experts of two matrices, without and with a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sonic.compat.scattermoe.kernels.ops import row_of_slot, with_zero
from sonic.compat.scattermoe.parallel_experts import ParallelExperts, flatten_sort_count
from sonic.functional import moe_mlp
from sonic.routing.plan import RoutingPlan
from sonic.shapes import argument_error, check_positive, check_shape

__all__ = ["GLUMLP", "MLP"]


class MLP(nn.Module):
    """Experts ``W2 act(W1 x + b1) + b2``; parameters ``experts.weight`` (E, H, D), ``output_experts.weight`` (E, D, H),
    and with ``bias`` ``experts.bias`` (E, H), ``output_experts.bias`` (E, D).

    With ``nn.GELU()``, ``nn.ReLU()`` or ``nn.SiLU()`` it is :func:`sonic.moe_mlp`, which keeps the tokens and H (R H
    values). Any other activation, or a hook on or another class of ``experts`` or ``output_experts``, takes two grouped
    products (:mod:`sonic.compat.scattermoe.parallel_experts`), which keep the tokens, the second's input, and what
    autograd keeps for the activation.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            input_size: D.
            hidden_size: H, width of one expert.
            num_experts: E.
            top_k: K; more than E count as E.
            bias: have biases, zero at first.
            activation: applied to (R, H) rows. None is none.
        """
        super().__init__()
        check_positive("scattermoe.MLP", hidden_size=hidden_size, top_k=top_k)
        self.num_experts, self.input_size, self.hidden_size = num_experts, input_size, hidden_size
        self.top_k = min(top_k, num_experts)
        self.experts = ParallelExperts(num_experts, input_size, hidden_size, bias=bias)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        """Apply the chosen experts and sum.

        Args:
            x: (..., D).
            expert_p: (..., K) weights of the choice, any floating dtype; no normalisation is done.
            expert_idxs: (..., K) integer.

        Returns:
            the shape and dtype of x.

        Raises:
            ValueError: shapes, dtypes or indices do not fit.
        """
        x_TD, score_TK, index_TK = _flat("scattermoe.MLP", x, expert_p, expert_idxs, self.input_size, self.top_k)
        maps = flatten_sort_count(index_TK, num_experts=self.num_experts)
        name = _name_of(self.activation)
        if name is not None and all(_is_plain(part) for part in (self.experts, self.output_experts)):
            out_TD = moe_mlp(
                x_TD,
                self.experts.weight,
                self.output_experts.weight,
                score_TK,
                _plan(index_TK, *maps[1:]),
                b1=self.experts.bias,
                b2=self.output_experts.bias,
                activation=name,
            )
        else:
            h_RH = self.experts(x_TD, self.top_k, *maps, grouped_out=True)
            a_RH = h_RH if self.activation is None else self.activation(h_RH)
            out_TD = self.output_experts(a_RH, 1, *maps, gates=score_TK, grouped_in=True)
        return out_TD.reshape(x.shape)

    def extra_repr(self) -> str:
        """K."""
        return f"k={self.top_k}"


class GLUMLP(nn.Module):
    """Experts ``W2 (act(G x + bg) * (U x + bu)) + b2``, up rows **before** gate rows in ``experts.weight`` (E, 2H, D).

    ``output_experts.weight`` is (E, D, H); with ``bias`` there are ``experts.bias`` (E, 2H) and ``output_experts.bias``
    (E, D). Always two grouped products and an activation of plain torch between them: the layouts of
    :func:`sonic.moe_mlp` have the gate first, and no weight is copied to get there.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            input_size, hidden_size, num_experts, top_k, bias: as in :class:`MLP`.
            activation: of the gate; None: ``nn.SiLU()``.
        """
        super().__init__()
        check_positive("scattermoe.GLUMLP", hidden_size=hidden_size, top_k=top_k)
        self.num_experts, self.input_size, self.hidden_size = num_experts, input_size, hidden_size
        self.top_k = min(top_k, num_experts)
        self.experts = ParallelExperts(num_experts, input_size, 2 * hidden_size, bias=bias)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias=bias)
        self.activation = nn.SiLU() if activation is None else activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        """As :meth:`MLP.forward`.

        Raises:
            ValueError: shapes, dtypes or indices do not fit.
        """
        x_TD, score_TK, index_TK = _flat("scattermoe.GLUMLP", x, expert_p, expert_idxs, self.input_size, self.top_k)
        maps = flatten_sort_count(index_TK, num_experts=self.num_experts)
        up_RH, gate_RH = self.experts(x_TD, self.top_k, *maps, grouped_out=True).chunk(2, dim=-1)
        a_RH = self.activation(gate_RH) * up_RH
        return self.output_experts(a_RH, 1, *maps, gates=score_TK, grouped_in=True).reshape(x.shape)

    def extra_repr(self) -> str:
        """K."""
        return f"k={self.top_k}"


def _flat(
    where: str, x: Tensor, expert_p: Tensor, expert_idxs: Tensor, input_size: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T, D), scores and indices (T, K)."""
    if x.ndim == 0 or x.shape[-1] != input_size:
        raise argument_error(where, "x", tuple(x.shape), f"(..., D) = (..., {input_size})")
    x_TD = x.reshape(-1, input_size)
    for name, tensor in (("expert_p", expert_p), ("expert_idxs", expert_idxs)):
        if tensor.ndim == 0 or tensor.shape[-1] != top_k:
            raise argument_error(where, name, tuple(tensor.shape), f"(..., K) = (..., {top_k})")
        check_shape(where, name, tensor.reshape(-1, top_k), T=x_TD.shape[0], K=top_k)
    return x_TD, expert_p.reshape(-1, top_k), expert_idxs.reshape(-1, top_k)


def _plan(index_TK: Tensor, slot_R: Tensor, expert_offsets: Tensor) -> RoutingPlan:
    """The plan of a sorted choice, in which a token may have the same expert twice."""
    num_tokens, top_k = index_TK.shape
    edges_T1 = torch.arange(num_tokens + 1, dtype=torch.int32, device=slot_R.device) * top_k
    slot_of_row_R = slot_R.to(torch.int32)
    return RoutingPlan(
        num_tokens,
        expert_offsets.shape[0],
        (num_tokens, top_k),
        with_zero(expert_offsets),
        slot_of_row_R // top_k,
        slot_of_row_R,
        row_of_slot(slot_R),
        edges_T1,
    )


def _name_of(activation: object) -> str | None:
    """The name in ``sonic.ACTIVATIONS`` of a module that is exactly that function."""
    if type(activation) is nn.GELU and activation.approximate == "none":
        return "gelu"
    if type(activation) is nn.ReLU:
        return "relu"
    return "silu" if type(activation) is nn.SiLU else None


def _is_plain(experts: nn.Module) -> bool:
    """Whether calling the module would do nothing but the product: of this class, and no hook looks on."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(experts) is ParallelExperts and not any(getattr(experts, name) for name in hooks)
