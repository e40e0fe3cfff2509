"""The layer of the package ``sonicmoe``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic.autograd import no_autocast
from sonic.compat.scattermoe.parallel_experts import flatten_sort_count, parallel_linear
from sonic.compat.sonicmoe.enums import ActivationType, KernelBackendMoE, is_glu, name_of_activation
from sonic.compat.sonicmoe.functional import moe_TC_softmax_topk_layer
from sonic.compat.sonicmoe.metadata import counts
from sonic.routing.losses import load_balancing_loss
from sonic.shapes import argument_error, check_positive

__all__ = ["Experts", "MoE"]


class Experts(nn.Module):
    """The matrices of one projection of all experts: ``weight`` (E, out, in) and, if wanted, ``bias`` (E, out)."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        add_bias: bool = True,
        std: float | None = None,
    ) -> None:
        """
        Args:
            num_experts: E.
            in_features: columns of a matrix.
            out_features: rows of a matrix.
            add_bias: have a bias, zero at first.
            std: standard deviation of the normal distribution that weights are drawn from; None: 0.02.
        """
        super().__init__()
        check_positive("sonicmoe.Experts", num_experts=num_experts, in_features=in_features, out_features=out_features)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if add_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew; biases become zero."""
        nn.init.normal_(self.weight, std=0.02 if self.std is None else self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class MoE(nn.Module):
    """Router, experts and the Switch loss: ``layer(x) -> (out, aux_loss)``.

    Parameters, and so keys of a checkpoint, are those of the package: ``router.weight`` (E, D), ``c_fc.weight``
    (E, 2N, D) with gate and up rows interleaved, ``c_proj.weight`` (E, D, N), and with ``add_bias`` ``c_fc.bias`` and
    ``c_proj.bias``.
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: ActivationType | str,
        add_bias: bool,
        std: float,
    ) -> None:
        """
        Args:
            num_experts: E.
            num_experts_per_tok: K, at most E.
            hidden_size: D.
            intermediate_size: N.
            activation_function: a member of ``ActivationType``, or its value.
            add_bias: give both projections of the experts a bias.
            std: of the normal distribution that the experts are drawn from; the router is drawn as ``nn.Linear`` is.

        Raises:
            ValueError: sizes or the activation do not fit.
        """
        super().__init__()
        where = "sonicmoe.MoE"
        check_positive(where, num_experts_per_tok=num_experts_per_tok, hidden_size=hidden_size)
        check_positive(where, num_experts=num_experts, intermediate_size=intermediate_size)
        if num_experts_per_tok > num_experts:
            raise argument_error(where, "num_experts_per_tok", num_experts_per_tok, f"at most E = {num_experts}")
        name_of_activation(where, activation_function, "activation_function")
        self.num_experts, self.top_k = num_experts, num_experts_per_tok
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation_function = activation_function
        up_rows = 2 * intermediate_size if is_glu(activation_function) else intermediate_size
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.c_fc = Experts(num_experts, hidden_size, up_rows, add_bias, std)
        self.c_proj = Experts(num_experts, intermediate_size, hidden_size, add_bias, std)

    @property
    def stream_id(self) -> int:
        """The stream that is current now, 0 without a GPU; for callers who hand it on, nothing here reads it."""
        return int(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_available() else 0

    def forward(
        self,
        hidden_states: Tensor,
        kernel_backend_moe: KernelBackendMoE = KernelBackendMoE.sonicmoe,
        is_inference_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Route, apply the experts, sum.

        Args:
            hidden_states: (..., D).
            kernel_backend_moe: ``sonicmoe``: :func:`sonic.moe_mlp`. ``scattermoe``: two grouped products of
                ``sonic.compat.scattermoe`` and the activation of plain torch between them. ``torch``: one expert after
                the other in plain torch, in at least float32: the formula to compare with.
            is_inference_mode: keep no H, as also in eval mode.

        Returns:
            out of the shape of the input, in its dtype (``torch``: in at least float32); the Switch loss, 0-dim: 1 at
            perfect balance. It reaches no backward by itself; also in inference mode it is a tensor.

        Raises:
            ValueError: another backend, such as ``sonicmoe_fp8``; shapes or dtypes do not fit.
        """
        backend = getattr(kernel_backend_moe, "value", kernel_backend_moe)
        if backend not in ("sonicmoe", "scattermoe", "torch"):
            wanted = "sonicmoe, scattermoe or torch (fp8 is not served)"
            raise argument_error("sonicmoe.MoE", "kernel_backend_moe", kernel_backend_moe, wanted)
        if hidden_states.ndim == 0 or hidden_states.shape[-1] != self.hidden_size:
            wanted = f"(..., D) = (..., {self.hidden_size})"
            raise argument_error("sonicmoe.MoE", "hidden_states", tuple(hidden_states.shape), wanted)
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        if backend == "sonicmoe":
            out_TD, logits_TE, frequency_E = moe_TC_softmax_topk_layer(
                x_TD,
                self.router.weight,
                self.c_fc.weight.permute(1, 2, 0),
                self.c_fc.bias,
                self.c_proj.weight.permute(1, 2, 0),
                self.c_proj.bias,
                self.top_k,
                None,
                self.activation_function,
                is_inference_mode or not self.training,
            )
        else:
            logits_TE = self.router(x_TD)
            best_TK, expert_TK = logits_TE.topk(self.top_k, dim=-1)
            scores_TK = best_TK.to(torch.promote_types(best_TK.dtype, torch.float32)).softmax(-1)
            frequency_E = counts(expert_TK.flatten(), self.num_experts)
            compute = self._scattered_experts if backend == "scattermoe" else self._loop_over_experts
            out_TD = compute(x_TD, scores_TK, expert_TK)
        aux_loss = load_balancing_loss(logits_TE, frequency_E, source=(x_TD, self.router.weight))
        return out_TD.reshape(hidden_states.shape), aux_loss

    def _scattered_experts(self, x_TD: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
        maps = flatten_sort_count(expert_TK, self.num_experts)
        h_RU = parallel_linear(
            x_TD,
            self.c_fc.weight.transpose(1, 2),
            self.top_k,
            *maps,
            expert_biases=self.c_fc.bias,
            grouped_out=True,
        )
        return parallel_linear(
            _activate(self.activation_function, h_RU),
            self.c_proj.weight.transpose(1, 2),
            1,
            *maps,
            expert_biases=self.c_proj.bias,
            gates=scores_TK,
            grouped_in=True,
        )

    def _loop_over_experts(self, x_TD: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with no_autocast(x_TD.device):
            wide_TD = x_TD.to(wide)
            tokens, rows = [], []
            # unbind, not indexing: the gradient of an index is a table of all experts, one per expert
            up, down = self.c_fc.weight.unbind(0), self.c_proj.weight.unbind(0)
            for expert in range(self.num_experts):
                token_r, slot_r = (expert_TK == expert).nonzero(as_tuple=True)
                b1 = None if self.c_fc.bias is None else self.c_fc.bias[expert].to(wide)
                b2 = None if self.c_proj.bias is None else self.c_proj.bias[expert].to(wide)
                h_rU = F.linear(wide_TD[token_r], up[expert].to(wide), b1)
                y_rD = F.linear(_activate(self.activation_function, h_rU), down[expert].to(wide), b2)
                tokens.append(token_r)
                rows.append(y_rD * scores_TK[token_r, slot_r, None].to(wide))
            out_TD = torch.zeros_like(wide_TD).index_add(0, torch.cat(tokens), torch.cat(rows))
        return out_TD


def _activate(activation_type: ActivationType | str, h: Tensor) -> Tensor:
    """An activation in plain torch, gate and up columns interleaved."""
    name = name_of_activation("sonicmoe.MoE", activation_type)
    if is_glu(activation_type):
        return _POINTWISE[name](h[..., 0::2]) * h[..., 1::2]
    return _POINTWISE[name](h)


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
