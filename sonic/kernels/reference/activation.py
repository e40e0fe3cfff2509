"""The activations and their derivatives, written into buffers that are given.

Gated: ``a = value(gate) * factor(up)`` with N gate and N up columns in H; plain: ``a = value(h)``. The passes go over a
slice of rows that stays in a core's cache, then the next: measured twice as fast in backward as passes over 2,048 rows
of 512. Arithmetic
is torch's own in the dtype of H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "activate", "activate_bwd", "gate_and_up", "is_gated"]

_SLICE_VALUES = 1 << 17  # of one operand

_OAI_ALPHA = 1.702  # swiglu_oai: gate * sigmoid(1.702 gate) * (up + 1), gate and up clamped; the activation of gpt-oss
_OAI_LIMIT = 7.0


@dataclass(frozen=True)
class _Activation:
    """``value`` of the gate (or only) half; ``factor`` of the up half where that is not the identity."""

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
    # value(g) = silu(1.702 g) / 1.702, so its slope is silu'(1.702 g)
    scaled = torch.clamp(x, max=_OAI_LIMIT).mul_(_OAI_ALPHA)
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
    """Views of the gate and the up columns of H, (R, N) each: its halves, or every other column if interleaved."""
    if glu_layout == "interleaved":
        return h_RU[:, 0::2], h_RU[:, 1::2]
    width = h_RU.shape[1] // 2
    return h_RU[:, :width], h_RU[:, width:]


def activate(activation: str, glu_layout: str, h_RU: Tensor, out_RN: Tensor) -> None:
    """``out = act(h)`` for a block of rows.

    Args:
        activation: a key of ``ACTIVATIONS``.
        glu_layout: how gate and up share the columns of H; plain activations ignore it.
        h_RU: pre-activations.
        out_RN: written; same dtype.
    """
    act = ACTIVATIONS[activation]
    for h_rU, out_rN in zip(*_slices(out_RN.shape[1], h_RU, out_RN), strict=True):
        if not act.gated:
            act.value(h_rU, out_rN)
            continue
        gate_rN, up_rN = gate_and_up(h_rU, glu_layout)
        act.value(gate_rN, out_rN)
        out_rN *= up_rN if act.factor is None else act.factor(up_rN)


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
    """Everything that follows from H and dA' for a block of rows, A being computed again.

    Args:
        activation: a key of ``ACTIVATIONS``.
        glu_layout: how gate and up share the columns of H.
        h_RU: pre-activations.
        da_RN: dA' = dO W2, without the score; overwritten.
        row_scores_R1: the scores of the rows, (R, 1) in the dtype of H; ``None`` stands for 1.
        a_RN: written: score * act(h), the operand of dW2.
        dh_RU: written: act'(h) * score * dA'; ``None`` where it is not needed.
        dscores_R: added to: the row sums <dA', act(h)>; ``None`` where they are not needed.
    """
    act = ACTIVATIONS[activation]
    width = da_RN.shape[1]
    value_RN = da_RN.new_empty(min(_slice_rows(width), da_RN.shape[0]), width) if act.gated else None
    parts = (h_RU, da_RN, a_RN, row_scores_R1, dh_RU, dscores_R)
    for h_rU, da_rN, a_rN, scores_r1, dh_rU, dscores_r in zip(*_slices(width, *parts), strict=True):
        if value_RN is not None:
            gate_rN, up_rN = gate_and_up(h_rU, glu_layout)
            value_rN = act.value(gate_rN, value_RN[: da_rN.shape[0]])
            factor_rN = up_rN if act.factor is None else act.factor(up_rN)
            torch.mul(value_rN, factor_rN, out=a_rN)
        else:
            act.value(h_rU, a_rN)
        if dscores_r is not None:
            if dscores_r.dtype == a_rN.dtype:
                dscores_r += torch.linalg.vecdot(da_rN, a_rN)
            else:
                dscores_r += (da_rN * a_rN).sum(1, dtype=dscores_r.dtype)
        if scores_r1 is not None:
            a_rN *= scores_r1
        if dh_rU is None:
            continue
        if scores_r1 is not None:
            da_rN *= scores_r1
        if value_RN is None:
            act.value_bwd(da_rN, h_rU, dh_rU)
            continue
        dgate_rN, dup_rN = gate_and_up(dh_rU, glu_layout)
        torch.mul(value_rN, da_rN, out=dup_rN)
        if act.factor_bwd is not None:
            act.factor_bwd(dup_rN, up_rN)
        da_rN *= factor_rN
        act.value_bwd(da_rN, gate_rN, dgate_rN)


def _slice_rows(width: int) -> int:
    """Rows few enough that the passes over their values stay in a core's cache, and enough to be worth a thread."""
    return max(1, _SLICE_VALUES // max(width, 1))


def _slices(width: int, *tensors: Tensor | None) -> list[Sequence[Tensor | None]]:
    """Each tensor (the first is none of the ``None``) cut into the same runs of rows.

    ``None`` gives a ``None`` per run.
    """
    rows = _slice_rows(width)
    num_rows = 0 if tensors[0] is None else tensors[0].shape[0]
    if num_rows <= rows:
        return [(tensor,) for tensor in tensors]
    num_runs = -(-num_rows // rows)
    return [(None,) * num_runs if tensor is None else tensor.split(rows) for tensor in tensors]
