"""Parameters split over meshes: DTensors that keep the name and the shape of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sonic.parallel.mesh import joint_mesh, part_offsets
from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Split", "cut", "fill_", "fsdp_placement", "is_strided", "local_part", "shard_parameter"]


@dataclass(frozen=True)
class Split:
    """How one dimension is cut.

    Attributes:
        dim: which.
        num_blocks: equal blocks that stand one after the other in it, each cut by itself; rank w holds part w of each,
            such as the gate rows and the up rows of its share of an expert's width.
    """

    dim: int
    num_blocks: int = 1


def shard_parameter(
    module: nn.Module,
    name: str,
    *,
    ep_mesh: DeviceMesh | None = None,
    ep: Split | None = None,
    tp_mesh: DeviceMesh | None = None,
    tp: Split | None = None,
) -> None:
    """Replace a parameter by a DTensor of the same shape, of which this rank holds its part of what it has now.

    No communication. A parameter that is None stays None; without a mesh nothing changes.

    Args:
        module: its owner.
        name: of the parameter.
        ep_mesh, tp_mesh: one-dimensional meshes, or None.
        ep, tp: how each of them cuts; None: not at all, every rank holds all.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    whole = getattr(module, name)
    if whole is None or (ep_mesh is None and tp_mesh is None):
        return
    mesh = joint_mesh("sonic.parallel", {"ep_mesh": ep_mesh, "tp_mesh": tp_mesh})
    local = whole.detach()
    placements: dict[str, Any] = {}
    for axis, split in ((ep_mesh, ep), (tp_mesh, tp)):
        if axis is None:
            continue
        axis_name = (axis.mesh_dim_names or ("",))[0]
        if split is None:
            placements[axis_name] = Replicate()
            continue
        local = cut(local, split, axis.size(), axis.get_local_rank())
        # Of a block-wise split no range of the whole dimension is local, which is what torch calls strided.
        is_plain = split.num_blocks == 1 or axis.size() == 1
        placements[axis_name] = (
            Shard(split.dim) if is_plain else _StridedShard(split.dim, split_factor=split.num_blocks)
        )
    order = [placements[axis_name] for axis_name in mesh.mesh_dim_names or ("",)]
    sharded = DTensor.from_local(
        local.contiguous().clone(), mesh, order, run_check=False, shape=whole.shape, stride=_strides(whole.shape)
    )
    setattr(module, name, nn.Parameter(sharded, requires_grad=whole.requires_grad))
    if any(is_strided(placement) for placement in order):
        if _refuse_cut_twice not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(_refuse_cut_twice)


def fsdp_placement(parameter: nn.Parameter) -> Any:
    """Along which dimension ``fully_shard(..., shard_placement_fn=fsdp_placement)`` is to cut a parameter.

    The first, as it does by itself; but the second of matrices whose first dimension is split block by block already
    (gate and up rows of a shared expert under tensor parallelism): torch cannot describe both cuts in one dimension.
    """
    from torch.distributed.tensor import Shard

    placements = getattr(parameter, "placements", ())
    return Shard(1) if parameter.ndim > 1 and any(is_strided(p) and p.dim == 0 for p in placements) else None


def is_strided(placement: Any) -> bool:
    """Whether a rank holds several ranges of a dimension."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def _refuse_cut_twice(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Torch would put such a parameter together in a wrong order, without a word."""
    for name, parameter in module.named_parameters(prefix.removesuffix("."), recurse=False):
        placements = getattr(parameter, "placements", ())
        cuts = [placement.dim for placement in placements if hasattr(placement, "dim")]
        strided = [placement.dim for placement in placements[1:] if is_strided(placement)]
        if any(cuts.count(dim) > 1 for dim in strided):
            was = (
                f"split block by block and by FSDP in one dimension {placements}, which torch would put together in a "
                "wrong order"
            )
            wanted = "glu_layout='interleaved': a bias has no second dimension to cut"
            if parameter.ndim > 1:
                wanted = (
                    "fully_shard(..., shard_placement_fn=sonic.parallel.fsdp_placement), or glu_layout='interleaved'"
                )
            raise argument_error("state_dict", name, was, wanted)


@torch.no_grad()
def fill_(parameter: Tensor, fill: Callable[[Tensor], object], *, is_stack: bool = True) -> None:
    """Draw a parameter anew on every rank that holds a part of it, without communication.

    Ranks that hold the same numbers draw the same, those with different ones different ones, provided that torch's
    default generators agree on all ranks beforehand; they do so afterwards, too.

    Args:
        parameter: a DTensor, or any other tensor.
        fill: fills one matrix (or bias) in place; it gets whole ones, of which this rank keeps its part.
        is_stack: ``parameter`` is a stack of those, along its first dimension.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        for matrix in parameter if is_stack else (parameter,):
            fill(matrix)
        return
    sharded = cast("DTensor", parameter)
    local, mesh = sharded.to_local(), sharded.device_mesh
    where = mesh.get_coordinate()
    assert where is not None, "this rank holds a part"
    stream, cuts = 0, []
    for axis, placement in enumerate(placements):
        dim = getattr(placement, "dim", None)
        if is_stack and dim == 0:  # other matrices: other numbers
            stream = stream * mesh.size(axis) + where[axis]
        elif dim is not None:
            num_blocks = placement.split_factor if is_strided(placement) else 1
            cuts.append((Split(dim - is_stack, num_blocks), mesh.size(axis), where[axis]))
    seed = int(torch.randint(2**48, ()))
    with torch.random.fork_rng([local.device] if local.device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed + stream)
        if local.device.type == "cuda":
            torch.cuda.manual_seed(seed + stream)
        for matrix in local if is_stack else (local,):
            whole = torch.empty(parameter.shape[is_stack:], dtype=local.dtype, device=local.device)
            fill(whole)
            for split, num_parts, part in reversed(cuts):  # data parallelism cuts what the others leave
                whole = cut(whole, split, num_parts, part)
            matrix.copy_(whole)


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiable; any other tensor itself."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else cast("DTensor", parameter).to_local()


def cut(tensor: Tensor, split: Split, num_parts: int, part: int) -> Tensor:
    """Part ``part`` of ``num_parts``."""
    blocks = tensor.unflatten(split.dim, (split.num_blocks, -1))
    offsets = part_offsets(blocks.shape[split.dim + 1], num_parts)
    return blocks.narrow(split.dim + 1, offsets[part], offsets[part + 1] - offsets[part]).flatten(
        split.dim, split.dim + 1
    )


def _strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
