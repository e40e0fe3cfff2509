"""Weights for a sharded model that was built without memory: the same numbers on any number of ranks.

Users find this in :mod:`sonic.layers.fsdp`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sonic.layers.moe import MoE, SharedExpert
from sonic.parallel.sharding import Split, cut, is_strided, local_part
from sonic.shapes import argument_error

__all__ = ["initialize"]


@torch.no_grad()
def initialize(
    model: nn.Module,
    *,
    seed: int,
    init: Callable[[nn.Module], object] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Draw all parameters of a model anew, on any number of ranks the same: one process or many, sharded or not.

    For a model that was built on the meta device and sharded; memory is allocated where there is none. The numbers of a
    parameter follow from the seed, from its name, and in the experts of a :class:`sonic.MoE` from the expert's index.
    Each rank draws the experts that it has a part of, one at a time, and of every other module all of its parameters,
    one module at a time, and keeps its part. No communication; torch's default generators stay as they are.

    The experts of a ``sonic.MoE`` are drawn as its ``init=`` says. For every other module that has parameters or
    buffers of its own ``reset_parameters`` is called, if it has that, and then ``init``; meanwhile its parameters are
    whole. (A plain ``reset_parameters`` on sharded weights repeats the same numbers in every shard on a CPU.)

    Args:
        model: any module; all of its parameters are drawn, also those that have memory already.
        seed: any integer, the same on all ranks.
        init: called with each module as said above, such as ``model._init_weights`` of transformers.
        device: where to allocate what is on the meta device. None: that of the mesh, or torch's default;
            ``"cpu"`` with FSDP-2's ``CPUOffloadPolicy``.

    Returns:
        ``model``.

    Raises:
        ValueError: a parameter, or a buffer that was on the meta device, that nobody has filled: its name.
    """
    from torch.distributed.fsdp import FSDPModule

    where = "sonic.fsdp.initialize"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # of the root, what is gathered stays after a forward
    without_memory = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    if without_memory or any(parameter.is_meta for parameter in model.parameters()):
        _allocate(model, _device_of(model) if device is None else torch.device(device))
    done: set[int] = set()
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in done}
        buffers = {key: b for key, b in module.named_buffers(recurse=False) if b is not None}
        stream = f"{seed}/{_plain_name(name)}"
        prefix = f"{name}." if name else ""
        if isinstance(module, MoE):
            experts = {key: own.pop(key) for key in ("w1", "w2", "b1", "b2") if key in own}
            _draw_experts(module, experts, stream)
            done |= {id(parameter) for parameter in experts.values()}
        if not own and not buffers:
            continue
        for key, buffer in buffers.items():
            if prefix + key in without_memory:
                buffer.fill_(float("nan") if buffer.is_floating_point() else 0)
        wholes = {
            key: torch.full(tuple(p.shape), float("nan"), dtype=p.dtype, device=local_part(p).device)
            for key, p in own.items()
        }
        with _whole_parameters(module, wholes), _seeded(stream, next(iter((*wholes.values(), *buffers.values())))):
            reset = None if isinstance(module, MoE) else getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if init is not None:
                init(module)
            filled = {
                **{key: getattr(module, key).detach() for key in wholes},
                **dict(module.named_buffers(recurse=False)),
            }
        for key, tensor in filled.items():
            is_ours = key in wholes or prefix + key in without_memory
            if is_ours and tensor is not None and tensor.is_floating_point() and bool(tensor.isnan().any()):
                wanted = f"{type(module).__name__}.reset_parameters or init= to fill it"
                raise argument_error(where, prefix + key, "not set", wanted)
        for key, parameter in own.items():
            local_part(parameter).copy_(_part_of(filled[key], _local_indices(parameter)))
            done.add(id(parameter))
    return model


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if hasattr(parameter, "device_mesh"):
            kind = str(parameter.device_mesh.device_type)
            return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return torch.get_default_device()


def _allocate(model: nn.Module, device: torch.device) -> None:
    """``to_empty``, after which parameters that were one object are one object again."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key))
    model.to_empty(device=device)
    for (first, first_key), *others in places.values():
        for module, key in others:
            module._parameters[key] = first._parameters[first_key]


def _plain_name(name: str) -> str:
    """Without what wrappers of compiled and checkpointed modules put into it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


@contextmanager
def _whole_parameters(module: nn.Module, wholes: Mapping[str, Tensor]) -> Iterator[None]:
    before = {key: module._parameters[key] for key in wholes}
    try:
        for key, whole in wholes.items():
            module._parameters[key] = nn.Parameter(whole)
        yield
    finally:
        module._parameters.update(before)


@contextmanager
def _seeded(stream: str, like: Tensor) -> Iterator[None]:
    """Inside: torch's default generators are where ``stream`` says."""
    device = local_part(like).device
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "big")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def _draw_experts(layer: MoE, parameters: Mapping[str, Tensor], stream: str) -> None:
    """Fill this rank's part of a layer's experts, drawing whole ones, one at a time."""
    indices = {key: _local_indices(parameter) for key, parameter in parameters.items()}
    here = {key: {int(e): row for row, e in enumerate(index[0].tolist())} for key, index in indices.items()}
    for expert in sorted(set().union(*here.values())):
        with _seeded(f"{stream}/{expert}", layer.w1):
            one = SharedExpert(
                layer.hidden_size,
                layer.intermediate_size,
                activation=layer.activation,
                bias=layer.b1 is not None,
                glu_layout=layer.glu_layout,
                init=layer.init,
                init_std=layer.init_std,
                device=local_part(layer.w1).device,
                dtype=layer.w1.dtype,
            )
        for key, parameter in parameters.items():
            if expert in here[key]:
                part = _part_of(getattr(one, key).detach(), indices[key][1:])
                local_part(parameter)[here[key][expert]].copy_(part)


def _local_indices(parameter: Tensor) -> list[Tensor]:
    """Per dimension, which entries of the whole this rank holds."""
    indices = [torch.arange(size) for size in parameter.shape]
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return indices
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    place = mesh.get_coordinate()
    assert place is not None, "this rank holds a part"
    for dim in range(parameter.ndim):
        axes = [axis for axis, placement in enumerate(placements) if getattr(placement, "dim", None) == dim]
        # Two cuts of one dimension: torch calls the one strided that was made last, though it stands first.
        if any(is_strided(placements[axis]) for axis in axes):
            axes.reverse()
        for axis in axes:
            is_blockwise = is_strided(placements[axis]) and len(axes) == 1
            split = Split(0, placements[axis].split_factor if is_blockwise else 1)
            indices[dim] = cut(indices[dim], split, mesh.size(axis), place[axis])
    shape = tuple(len(index) for index in indices)
    assert shape == tuple(local_part(parameter).shape), f"a part of {shape}, not {tuple(local_part(parameter).shape)}"
    return indices


def _part_of(whole: Tensor, indices: Iterable[Tensor]) -> Tensor:
    for dim, index in enumerate(indices):
        if len(index) != whole.shape[dim]:
            whole = whole.index_select(dim, index.to(whole.device))
    return whole
