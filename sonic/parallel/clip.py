"""The norm of gradients of which some are split over ranks, and each over ranks of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.parallel.sharding import local_part
from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters that lie on different meshes, or on none.

    Torch's refuses DTensors beside plain tensors, and DTensors of different meshes: experts under expert parallelism
    beside a router. Every rank gets the Euclidean norm of all gradients of the model, each counted once, and scales its
    parts by the same factor. One collective per mesh dimension that splits anything.

    Args:
        parameters: with their gradients final: the same on all ranks that hold the same part.
        max_norm: what the norm is at most afterwards; ``inf`` changes nothing.

    Returns:
        The norm before: 0-dim, at least float32.

    Raises:
        ValueError: ``max_norm`` is no number of at least 0.
    """
    if not isinstance(max_norm, (int, float)) or math.isnan(max_norm) or max_norm < 0:
        raise argument_error("sonic.parallel.clip_grad_norm_", "max_norm", max_norm, "a number >= 0")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    # by the process groups over which the squares are to be summed, which are the same on all ranks in this order
    local: list[Tensor] = []
    sums: dict[tuple[tuple[DeviceMesh, int], ...], list[Tensor]] = {}
    for parameter in given:
        grad = parameter.grad
        if grad is None:
            continue
        axes: tuple[tuple[DeviceMesh, int], ...] = ()
        if hasattr(grad, "placements"):
            split = [axis for axis, placement in enumerate(grad.placements) if hasattr(placement, "dim")]
            axes = tuple((cast("DTensor", grad).device_mesh, axis) for axis in split)
        part = local_part(grad)
        local.append(part)
        wide = torch.promote_types(part.dtype, torch.float32)
        sums.setdefault(axes, []).append(torch.linalg.vector_norm(part, dtype=wide).square())
    if not local:
        return torch.zeros(())
    total = torch.zeros((), dtype=torch.float64, device=local[0].device)
    for axes, squares in sums.items():
        square = torch.stack([one.to(torch.float64) for one in squares]).sum()
        for mesh, axis in axes:
            if mesh.size(axis) > 1:
                dist.all_reduce(square, group=mesh.get_group(axis))
        total += square
    norm = total.sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for part in local:
        part.mul_(factor.to(part.dtype))
    return norm if any(part.dtype == torch.float64 for part in local) else norm.to(torch.float32)
