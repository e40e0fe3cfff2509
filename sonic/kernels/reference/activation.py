"""The activations and their derivatives, on one block of rows at a time, written into buffers that are given.

Gated: ``a = value(gate) * factor(up)`` with N gate and N up columns in H; plain: ``a = value(h)``. A block is small enough to stay in
cache, so the several passes over it cost little. Arithmetic is torch's own in the dtype of H, rounding as same-dtype torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "activate", "activate_bwd", "gate_and_up", "is_gated"]

_OAI_ALPHA = 1.702  # swiglu_oai: gate * sigmoid(1.702 gate) * (up + 1), gate and up clamped; the activation of gpt-oss
_OAI_LIMIT = 7.0


@dataclass(frozen=True)
class _Activation:
    """One activation: ``value(x, out)`` and ``value_bwd(grad, x, out)``; ``factor`` of the up half if that is not the identity."""

    gated: bool
    value: Callable[[Tensor, Tensor], Tensor]
    value_bwd: Callable[[Tensor, Tensor, Tensor], Tensor]
    factor: Callable[[Tensor], Tensor] | None = None
    factor_bwd: Callable[[Tensor, Tensor], None] | None = None


def _silu(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(x, out=out)


def _silu_bwd(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(x, out=out)


def _gelu_bwd(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(x, min=0, out=out)


def _relu_bwd(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _relu2(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(x, min=0, out=out).square_()


def _relu2_bwd(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    torch.clamp(x, min=0, out=out).mul_(2)
    return out.mul_(grad)


def _oai_value(x: Tensor, out: Tensor) -> Tensor:
    gate = torch.clamp(x, max=_OAI_LIMIT)
    torch.mul(gate, _OAI_ALPHA, out=out).sigmoid_()
    return out.mul_(gate)


def _oai_value_bwd(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    scaled = torch.clamp(x, max=_OAI_LIMIT).mul_(_OAI_ALPHA)  # value(g) = silu(1.702 g) / 1.702, so its slope is silu'(1.702 g)
    _silu_bwd(grad, scaled, out)
    return out.mul_(x <= _OAI_LIMIT)


def _oai_factor(up: Tensor) -> Tensor:
    return torch.clamp(up, -_OAI_LIMIT, _OAI_LIMIT).add_(1)


def _oai_factor_bwd(grad: Tensor, up: Tensor) -> None:
    grad.mul_(up.abs() <= _OAI_LIMIT)


ACTIVATIONS: dict[str, _Activation] = {
    "swiglu": _Activation(True, _silu, _silu_bwd),
    "geglu": _Activation(True, _gelu, _gelu_bwd),
    "reglu": _Activation(True, _relu, _relu_bwd),
    "swiglu_oai": _Activation(True, _oai_value, _oai_value_bwd, _oai_factor, _oai_factor_bwd),
    "gelu": _Activation(False, _gelu, _gelu_bwd),
    "relu": _Activation(False, _relu, _relu_bwd),
    "relu2": _Activation(False, _relu2, _relu2_bwd),
    "silu": _Activation(False, _silu, _silu_bwd),
}


def is_gated(activation: str) -> bool:
    """Whether H holds a gate and an up half (U = 2N) for this activation, or one value per column (U = N)."""
    return ACTIVATIONS[activation].gated


def gate_and_up(h_RU: Tensor, glu_layout: str) -> tuple[Tensor, Tensor]:
    """Views of the gate and the up half of H (R, N) each: the halves if ``"concatenated"``, every other column if ``"interleaved"``."""
    if glu_layout == "interleaved":
        return h_RU[:, 0::2], h_RU[:, 1::2]
    width = h_RU.shape[1] // 2
    return h_RU[:, :width], h_RU[:, width:]


def activate(activation: str, glu_layout: str, h_RU: Tensor, out_RN: Tensor) -> None:
    """``out = act(h)`` for one block of rows.

    Args:
        activation: a key of ``ACTIVATIONS``.
        glu_layout: how gate and up share the columns of H; plain activations ignore it.
        h_RU: pre-activations; out_RN: written; same dtype.
    """
    act = ACTIVATIONS[activation]
    if not act.gated:
        act.value(h_RU, out_RN)
        return
    gate_RN, up_RN = gate_and_up(h_RU, glu_layout)
    act.value(gate_RN, out_RN)
    out_RN.mul_(up_RN if act.factor is None else act.factor(up_RN))


def activate_bwd(
    activation: str,
    glu_layout: str,
    h_RU: Tensor,
    da_RN: Tensor,
    row_scores_R1: Tensor | None,
    a_RN: Tensor,
    dh_RU: Tensor | None,
    dscores_R: Tensor | None,
) -> None:
    """Everything that follows from H and dA' for one block of rows, A being computed again.

    Args:
        activation: a key of ``ACTIVATIONS``.
        glu_layout: how gate and up share the columns of H.
        h_RU: pre-activations.
        da_RN: dA' = dY W2, without the score; overwritten.
        row_scores_R1: the scores of the rows, (R, 1) in the dtype of H; ``None`` stands for 1.
        a_RN: written: score * act(h), the operand of dW2.
        dh_RU: written: act'(h) * score * dA'; ``None`` where it is not needed.
        dscores_R: added to: the row sums <dA', act(h)>; ``None`` where they are not needed.
    """
    act = ACTIVATIONS[activation]
    if act.gated:
        gate_RN, up_RN = gate_and_up(h_RU, glu_layout)
        value_RN = act.value(gate_RN, torch.empty_like(da_RN))
        factor_RN = up_RN if act.factor is None else act.factor(up_RN)
        torch.mul(value_RN, factor_RN, out=a_RN)
    else:
        act.value(h_RU, a_RN)
    if dscores_R is not None:
        dscores_R += torch.linalg.vecdot(da_RN, a_RN)
    if row_scores_R1 is not None:
        a_RN.mul_(row_scores_R1)
    if dh_RU is None:
        return
    if row_scores_R1 is not None:
        da_RN.mul_(row_scores_R1)
    if not act.gated:
        act.value_bwd(da_RN, h_RU, dh_RU)
        return
    dgate_RN, dup_RN = gate_and_up(dh_RU, glu_layout)
    torch.mul(value_RN, da_RN, out=dup_RN)
    if act.factor_bwd is not None:
        act.factor_bwd(dup_RN, up_RN)
    da_RN.mul_(factor_RN)
    act.value_bwd(da_RN, gate_RN, dgate_RN)
