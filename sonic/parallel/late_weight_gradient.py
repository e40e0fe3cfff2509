"""A linear map whose weight gradient is a node of its own, so that something can be issued before it runs.

``F.linear`` has one backward node for both gradients: a collective on the input's gradient waits for the weight's to be
computed. Here the input's gradient comes first; whoever is downstream of it and urgent (the issue node of
:func:`sonic.parallel.in_flight.reduce_gradient` is) runs next, and then the weight's gradient, under the collective.
That is the order which hand-written tensor-parallel layers have, without a collective inside the layer.

Source: the order is that of Megatron-LM's column-parallel linear (arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sonic.autograd import autocast_dtype
from sonic.parallel.in_flight import stand_in

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, of the same numbers; only the order of its backward differs.

    Args:
        x: (..., I).
        weight: (O, I), of the dtype of x unless autocast is on.
        bias: (O,), or None.

    Returns:
        (..., O).
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not weight.requires_grad or torch.compiler.is_compiling():  # a compiler orders its graph by itself
        return F.linear(x, weight, bias)
    box = _Box()
    y: Tensor = _InputGradient.apply(x, _WeightGradient.apply(weight, box), bias, box)
    return y


class _Box:
    """What the weight's node needs, from the input's node."""

    x: Tensor | None = None
    dy: Tensor | None = None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, box: _Box) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.box, ctx.has_bias = box, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.box.x, ctx.box.dy = x, dy
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, stand_in(weight, weight.shape), db, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, box: _Box) -> Tensor:
        ctx.box = box
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        box: _Box = ctx.box
        assert box.x is not None and box.dy is not None, "the input's node ran"
        x, dy = box.x, box.dy
        box.x = box.dy = None
        return dy.flatten(0, -2).t() @ x.flatten(0, -2), None
