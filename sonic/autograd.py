"""What the library's autograd functions share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "graph_anchor", "no_autocast", "refuse_double_backward"]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this kind of device; ``None`` where it is off or there is none (meta)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off for this kind of device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def graph_anchor(tensor: Tensor) -> Tensor:
    """An empty tensor that depends on ``tensor``: kept for backward, it ties a gradient to the graph at no memory."""
    return tensor.narrow(0, 0, 0).clone()


class _RefuseDoubleBackward(torch.autograd.Function):
    """Identity on gradients whose own backward raises; ``anchors`` tie it to the graph of whatever they depend on."""

    @staticmethod
    def forward(ctx: Any, where: str, num_grads: int, *grads_and_anchors: Tensor) -> Any:
        ctx.where = where
        return tuple(grad.view_as(grad) for grad in grads_and_anchors[:num_grads])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.where}: asked for the gradient of its gradient, expected a first-order backward only "
            "(what a second one needs is not kept; take plain torch for that: docs/concepts.md has the formula)"
        )


def refuse_double_backward(
    where: str, grads: Iterable[Tensor | None], anchors: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return ``grads`` so that differentiating them again raises ``RuntimeError`` instead of being silently wrong.

    Call it at the end of a ``backward`` whose gradients were computed without a graph. Outside ``create_graph=True`` it
    does nothing.

    Args:
        where: the public name to blame.
        grads: gradients to return, ``None`` where there is none.
        anchors: the tensors that the gradients depend on: the incoming gradient and the saved inputs.
    """
    grads = tuple(grads)
    # Compiled graphs refuse double backward by themselves.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    given = [grad for grad in grads if grad is not None]
    tensors = [anchor for anchor in anchors if anchor is not None]
    tied = iter(_RefuseDoubleBackward.apply(where, len(given), *given, *tensors))
    return tuple(None if grad is None else next(tied) for grad in grads)
