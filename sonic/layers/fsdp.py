"""FSDP-2 (``fully_shard``) for models with Mixture-of-Experts layers; ``import sonic.fsdp`` gives this module.

:func:`shard` says what is gathered and freed together, in which dtype, and over which ranks; :func:`initialize` draws
the weights of a model that was built without memory; :func:`save` and :func:`load` keep it in distributed checkpoints.
Everything else is torch's: the sharded model is an ``FSDPModule``, and its parameters are DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sonic.layers.moe import MoE
from sonic.layers.sharded_checkpoint import is_whole, load, save
from sonic.layers.sharded_start import initialize
from sonic.parallel.expert_parallel import parallelize_moe
from sonic.parallel.fsdp import shard_ladder
from sonic.parallel.mesh import part_offsets
from sonic.parallel.sharding import fsdp_placement
from sonic.parallel.stack import LadderStack
from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["initialize", "is_whole", "load", "parameter_groups", "save", "shard"]

Blocks = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]

_MODULE = "sonic.fsdp"
# From here on a gather of a block is a gather of its experts, which need not lie there while attention runs.
_LARGE_EXPERTS = 1 << 30


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: Blocks | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    router_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool | int = True,
    reshard_last_block: bool = False,
    expert_units: bool | None = None,
    ep_dim: str = "ep",
    **options: Any,
) -> nn.Module:
    """Apply ``fully_shard`` to a model, in place, before an optimizer is made.

    What is gathered and freed together (a *unit*):

    - each block is one, and the rest of the model (embedding, last norm, head) is the root;
    - the experts of a layer are one of their own where they are expert parallel, and where they are large;
    - a router is one of its own where its dtype or its ranks differ from the block's. It stays gathered from forward
      to backward: E x D numbers, as much as E tokens.

    A :class:`sonic.parallel.LadderStack` in the model is given to :func:`sonic.parallel.shard_ladder`, which knows what
    is in flight there.

    Args:
        model: its weights are equal on all ranks, or on the meta device. Compile and checkpoint blocks before.
        mesh: one dimension: weights are sharded over all its ranks. Two: sharded along the last one, replicated along
            the first. With the last of them named ``ep_dim``, such as ``("dp", "ep")``: experts are spread along it by
            :func:`sonic.parallel.parallelize_moe` (unless that was done before) and sharded along the other; everything
            else is sharded over all ranks. Ranks have different tokens, any number each.
        blocks: classes of modules, or a function that knows them. None: those that a model of transformers names in
            ``_no_split_modules``, else the entries of the ``nn.ModuleList`` (or ``nn.Sequential``) around each MoE
            layer; a layer that is in none is a block itself.
        mp_policy: as ``fully_shard`` takes it. Its ``output_dtype`` is that of the model's output; the units inside
            have none, as each would cast what the next one reads.
        router_dtype: what a router's parameters are gathered in where ``mp_policy.param_dtype`` has 16 bits. None: in
            that, too, as in a ladder stack; logits and scores are computed in float32 in any case.
        reshard_after_forward: of the units inside, as ``fully_shard`` takes it.
        reshard_last_block: free the last block after forward, although backward starts with it.
        expert_units: the experts of a layer are a unit of their own. None: where they are expert parallel, or of at
            least 1 GiB as they are gathered. Expert-parallel ones are in any case.
        ep_dim: the name of the mesh dimension along which ranks share the experts.
        options: handed to ``fully_shard`` for every unit, such as ``offload_policy`` or ``ignored_params``; a
            ``shard_placement_fn`` replaces the default, which cuts the first dimension, but the second one of stacks
            of fewer experts than ranks.

    Returns:
        ``model``.

    Raises:
        ValueError: no model, one that is sharded already or has no MoE layer (and ``blocks`` is not given); a mesh
            that fits none of the above; experts that are spread over other ranks, or fewer than these; blocks that are
            none.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    where = f"{_MODULE}.shard"
    if not isinstance(model, nn.Module):
        raise argument_error(where, "model", f"a {type(model).__name__}", "a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise argument_error(
                where, "model", f"sharded already ({name or 'the model itself'})", "a model that is not sharded yet"
            )
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if not isinstance(policy, MixedPrecisionPolicy):
        wanted = "a torch.distributed.fsdp.MixedPrecisionPolicy or None"
        raise argument_error(where, "mp_policy", f"a {type(policy).__name__}", wanted)
    stacks = [module for module in model.modules() if isinstance(module, LadderStack)]
    in_stacks = {id(module) for stack in stacks for module in stack.modules()}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoE) and id(module) not in in_stacks
    }
    meshes = _meshes(where, mesh, ep_dim)
    if stacks and meshes.ep is not None:
        wanted = (
            "a mesh without that dimension; for a ladder stack call parallelize_moe yourself, and average the "
            "gradients of everything else along it"
        )
        raise argument_error(where, "mesh", f"one with a dimension {ep_dim!r} for a model with a LadderStack", wanted)
    if isinstance(model, LadderStack) and policy.output_dtype is not None:
        wanted = "None for a LadderStack alone: its output is the stream, in the stream's dtype"
        raise argument_error(where, "mp_policy.output_dtype", policy.output_dtype, wanted)
    _check_experts(where, layers, meshes, ep_dim)
    units = _find_blocks(where, model, layers, blocks, in_stacks)
    if not (layers or stacks or blocks is not None or units):
        was = f"a {type(model).__name__} without a sonic.MoE in it"
        raise argument_error(
            where, "model", was, "a model with at least one sonic.MoE, or blocks= to say what is a unit"
        )

    inside = replace(policy, output_dtype=None)
    outermost = [block for block in units if not any(block in set(other.modules()) - {other} for other in units)]
    last = set(outermost[-1].modules()) if outermost and not reshard_last_block else set()
    own_placement = options.pop("shard_placement_fn", None)

    def unit(module: nn.Module, on: DeviceMesh, mp: MixedPrecisionPolicy, reshard: bool | int) -> None:
        if isinstance(module, FSDPModule):
            return  # a layer that is a block: its parts are units already
        num_parts = on.size(on.ndim - 1)
        num_ranks = meshes.everyone.size() if meshes.ep is not None and on is meshes.experts else num_parts
        place = own_placement or _placement_over(num_ranks, num_parts)
        fully_shard(module, mesh=on, mp_policy=mp, reshard_after_forward=reshard, shard_placement_fn=place, **options)

    for stack in stacks:
        ladder_options = {"shard_placement_fn": own_placement, **options} if own_placement else options
        shard_ladder(stack, mesh, mp_policy=inside, reshard_after_forward=bool(reshard_after_forward), **ladder_options)
    for layer in layers.values():
        if meshes.ep is not None and layer.parallel is None:
            parallelize_moe(layer, ep_mesh=meshes.ep)
        reshard = False if layer in last else reshard_after_forward
        is_unit = meshes.ep is not None or (
            _is_large(layer, policy.param_dtype) if expert_units is None else expert_units
        )
        router_policy = _router_policy(inside, router_dtype)
        if (meshes.ep is not None or router_policy != inside) and any(True for _ in layer.router.parameters()):
            unit(layer.router, meshes.everyone, router_policy, False)
        if is_unit:
            if layer.shared is not None and meshes.ep is not None:
                unit(layer.shared, meshes.everyone, inside, reshard)
            unit(layer, meshes.experts, inside, reshard)
    for block in reversed(units):  # what is inside others first
        unit(block, meshes.everyone, inside, False if block in last else reshard_after_forward)
    unit(model, meshes.everyone, policy, False)
    return model


@dataclass(frozen=True)
class _Meshes:
    """Over which ranks what is sharded: ``everyone`` all but the experts, ``experts`` those, beside ``ep``."""

    everyone: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh | None


def _meshes(where: str, mesh: object, ep_dim: str) -> _Meshes:
    from torch.distributed.device_mesh import DeviceMesh

    kinds = f"one of 1 dimension, of 2 (replicate, shard), or of 2 of which the last is named {ep_dim!r}"
    if not isinstance(mesh, DeviceMesh):
        raise argument_error(where, "mesh", f"a {type(mesh).__name__}", f"a DeviceMesh: {kinds}")
    names = mesh.mesh_dim_names or ()
    was = f"of {mesh.ndim} dimensions {tuple(names)}" if names else f"of {mesh.ndim} dimensions without names"
    if ep_dim in names and mesh.ndim == 1:
        wanted = f"a dimension to shard experts along as well, of size 1 if there is none: (1, {mesh.size()})"
        raise argument_error(where, "mesh", was, wanted)
    if mesh.ndim > 2 or ep_dim in names[:-1]:
        raise argument_error(where, "mesh", was, kinds)
    if ep_dim not in names:
        return _Meshes(mesh, mesh, None)
    return _Meshes(mesh._flatten("_".join(names)), mesh[names[0]], mesh[ep_dim])


def _check_experts(where: str, layers: Mapping[str, MoE], meshes: _Meshes, ep_dim: str) -> None:
    """Refuse experts that are spread over other ranks than the mesh says."""
    if meshes.ep is not None and not layers:
        was = f"one with a dimension {ep_dim!r} for a model without a sonic.MoE"
        raise argument_error(
            where, "mesh", was, "a mesh without that dimension: only sonic.MoE layers can be expert parallel"
        )
    for name, layer in layers.items():
        if meshes.ep is not None and part_offsets(layer.num_experts, meshes.ep.size())[-2] == layer.num_experts:
            wanted = (
                f"a number that leaves none of the {meshes.ep.size()} {ep_dim!r} ranks without an expert: "
                "torch cannot shard what is empty"
            )
            raise argument_error(where, f"{name or 'model'}.num_experts", layer.num_experts, wanted)
        if layer.parallel is None:
            continue
        spread = layer.parallel.ep
        if meshes.ep is None and spread.size > 1:
            was = f"with its experts spread over {spread.size} ranks"
            wanted = f"a mesh that has these ranks as its last dimension, named {ep_dim!r}"
            raise argument_error(where, name or "model", was, wanted)
        if meshes.ep is not None and (spread.mesh is None or spread.mesh != meshes.ep):
            was = f"spread over {spread.size} ranks that are not mesh[{ep_dim!r}]"
            raise argument_error(where, name or "model", was, f"parallelize_moe(..., ep_mesh=mesh[{ep_dim!r}])")


def _find_blocks(
    where: str, model: nn.Module, layers: Mapping[str, MoE], blocks: Blocks | None, skip: set[int]
) -> list[nn.Module]:
    """The modules that are units, in the order of the model."""
    inside = [module for module in model.modules() if module is not model and id(module) not in skip]
    if blocks is not None:
        is_classes = isinstance(blocks, type) or (
            isinstance(blocks, tuple) and bool(blocks) and all(isinstance(one, type) for one in blocks)
        )
        if not is_classes and not callable(blocks):
            wanted = "a class of modules, a tuple of such, or a function (module) -> bool"
            raise argument_error(where, "blocks", repr(blocks), wanted)
        found = [one for one in inside if (isinstance(one, blocks) if is_classes else blocks(one))]  # type: ignore
        if not found:
            was = f"{blocks!r}, which fits nothing inside a {type(model).__name__}"
            wanted = "classes (or a function) that at least one module inside the model fits"
            raise argument_error(where, "blocks", was, wanted)
        return found
    named = {
        name
        for module in model.modules()
        if hasattr(module, "_can_set_experts_implementation")  # a model of transformers
        for name in (getattr(module, "_no_split_modules", None) or ())
    }
    if named:
        found = [one for one in inside if any(base.__name__ in named for base in type(one).__mro__)]
        if found:
            return found
    parents = {child: module for module in model.modules() for child in module.children()}
    found_set: set[nn.Module] = set()
    for layer in layers.values():
        chain = [layer]
        while chain[-1] in parents:
            chain.append(parents[chain[-1]])  # type: ignore[arg-type]
        pairs = list(zip(chain, chain[1:], strict=False))
        for containers in ((nn.ModuleList, nn.ModuleDict), (nn.Sequential,)):
            around = next((parent for _, parent in pairs if isinstance(parent, containers)), None)
            if around is not None:
                found_set |= {child for child in around.children() if any(True for _ in child.parameters())}
                break
        else:
            found_set.add(layer)
    return [one for one in inside if one in found_set]


def _is_large(layer: MoE, dtype: torch.dtype | None) -> bool:
    """Whether a layer's expert weights take much memory as they are gathered."""
    return sum(w.numel() * (dtype or w.dtype).itemsize for w in (layer.w1, layer.w2)) >= _LARGE_EXPERTS


def _router_policy(policy: MixedPrecisionPolicy, router_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Weights in ``router_dtype``, tokens as they come."""
    if router_dtype is None or policy.param_dtype is None or policy.param_dtype.itemsize != 2:
        return policy
    if router_dtype == policy.param_dtype:
        return policy
    return replace(policy, param_dtype=router_dtype, cast_forward_inputs=False)


def _placement_over(num_ranks: int, num_parts: int) -> Callable[[nn.Parameter], Any]:
    """Along the first dimension; but a stack of fewer matrices than ranks would leave ranks without any."""

    def place(parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import Shard

        placements = getattr(parameter, "placements", ())
        is_free = all(getattr(placement, "dim", None) != 1 for placement in placements)
        if parameter.ndim == 3 and parameter.shape[0] < num_ranks and parameter.shape[1] % num_parts == 0 and is_free:
            return Shard(1)
        return fsdp_placement(parameter)

    return place


def parameter_groups(parameters: nn.Module | Iterable[Tensor], **options: Any) -> list[dict[str, Any]]:
    """Groups for an optimizer whose fused or foreach step takes only parameters that lie on the ranks alike.

    Expert-parallel experts lie on another mesh than the rest, and shards of stacks may be cut along another dimension::

        torch.optim.AdamW(sonic.fsdp.parameter_groups(model, weight_decay=0.1), lr=1e-3, fused=True)

    Args:
        parameters: a module, or some of its parameters.
        options: of these groups, such as ``weight_decay``.

    Returns:
        One dict per mesh and placement, with ``params`` and the options.
    """
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    groups: dict[Any, dict[str, Any]] = {}
    for one in given:
        layout = (getattr(one, "device_mesh", None), str(getattr(one, "placements", None)), one.dtype)
        groups.setdefault(layout, {"params": [], **options})["params"].append(one)
    return list(groups.values())
