"""Checkpoints of matrices that are split block by block, which torch's distributed checkpoints cannot describe.

Rank w of a gated layer in the ``"concatenated"`` layout holds its share of the gate rows and its share of the up rows:
two ranges of one dimension. A distributed checkpoint knows one range per rank, and refuses. So such tensors, weights
and their optimizer states alike, are saved with one range per rank, and put back after loading. With
``glu_layout="interleaved"`` there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.parallel.mesh import part_offsets
from sonic.parallel.sharding import Split, cut, is_strided
from sonic.shapes import argument_error

__all__ = ["contiguous_state_dict", "load_contiguous"]


@torch.no_grad()
def contiguous_state_dict(state: Any) -> Any:
    """A state that ``torch.distributed.checkpoint`` can save, and load into, on any number of ranks.

    All ranks call it together. To save: ``dcp.save(contiguous_state_dict(state), ...)``. To load::

        state = {"model": ..., "optimizer": ...}    # get_state_dict(model, optimizer), say
        on_disk = contiguous_state_dict(state)
        dcp.load(on_disk, ...)
        load_contiguous(state, on_disk)             # then set_state_dict(model, optimizer, ...)

    Args:
        state: nested mappings, lists and tuples of tensors and anything else.

    Returns:
        The same nesting and the same objects, but new DTensors for those that are split block by block.
    """
    if isinstance(state, Mapping):
        return {key: contiguous_state_dict(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([contiguous_state_dict(value) for value in state])
    axis = _strided_axis(state)
    if axis is None:
        return state
    from torch.distributed.tensor import DTensor, Shard

    placement = state.placements[axis]
    whole = _gather(state._local_tensor, state, axis, placement.split_factor)
    local = cut(whole, Split(placement.dim), state.device_mesh.size(axis), state.device_mesh.get_local_rank(axis))
    placements = [Shard(placement.dim) if index == axis else other for index, other in enumerate(state.placements)]
    return DTensor.from_local(
        local.contiguous(), state.device_mesh, placements, run_check=False, shape=state.shape, stride=state.stride()
    )


@torch.no_grad()
def load_contiguous(state: Any, contiguous: Any) -> None:
    """Copy what :func:`contiguous_state_dict` made of ``state``, and a checkpoint was loaded into, back, in place.

    What it left as it was needs no copy: it is the same object, or, where it is no tensor, is taken over in mappings
    and lists.

    Args:
        state: what :func:`contiguous_state_dict` was given.
        contiguous: what it returned.

    Raises:
        ValueError: they do not have the same keys.
    """
    if isinstance(state, Mapping) or isinstance(state, (list, tuple)):
        keys = list(state) if isinstance(state, Mapping) else list(range(len(state)))
        have = list(contiguous) if isinstance(state, Mapping) else list(range(len(contiguous)))
        if set(keys) != set(have):
            wanted = "what contiguous_state_dict(state) returned"
            raise argument_error("sonic.parallel.load_contiguous", "contiguous", f"of keys {have}", wanted)
        for key in keys:
            if isinstance(state[key], (Mapping, list, tuple, Tensor)):
                load_contiguous(state[key], contiguous[key])
            elif not isinstance(state, tuple):
                state[key] = contiguous[key]  # type: ignore[index]
        return
    axis = _strided_axis(state)
    if axis is None:
        if isinstance(state, Tensor) and state is not contiguous:
            state.copy_(contiguous)
        return
    placement = state.placements[axis]
    whole = _gather(contiguous._local_tensor, state, axis, 1)
    split = Split(placement.dim, placement.split_factor)
    local = cut(whole, split, state.device_mesh.size(axis), state.device_mesh.get_local_rank(axis))
    state._local_tensor.copy_(local)


def _strided_axis(tensor: Any) -> int | None:
    """The mesh dimension that splits a DTensor block by block: strided, and alone in its dimension of the tensor."""
    placements = getattr(tensor, "placements", ())
    cuts = [getattr(placement, "dim", None) for placement in placements]
    for axis, placement in enumerate(placements):
        if is_strided(placement) and cuts.count(placement.dim) == 1:
            return axis
    return None


def _gather(local: Tensor, like: Any, axis: int, num_blocks: int) -> Tensor:
    """The parts of all ranks of one mesh dimension, put together block by block."""
    dim, size = like.placements[axis].dim, like.device_mesh.size(axis)
    offsets = part_offsets(like.shape[dim] // num_blocks, size)
    parts = []
    for part in range(size):
        shape = list(local.shape)
        shape[dim] = num_blocks * (offsets[part + 1] - offsets[part])
        parts.append(local.new_empty(shape))
    dist.all_gather(parts, local.contiguous(), group=like.device_mesh.get_group(axis))
    blocks = [part.unflatten(dim, (num_blocks, -1)) for part in parts]
    return torch.cat(blocks, dim + 1).flatten(dim, dim + 1)
