"""FSDP-2 around a ladder stack: what may be gathered and freed when, and in which dtype what travels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sonic.parallel.sharding import fsdp_placement
from sonic.parallel.stack import LadderBlock, LadderStack
from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["shard_ladder"]


def shard_ladder(
    stack: LadderStack,
    dp_mesh: DeviceMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
    **options: Any,
) -> LadderStack:
    """Apply ``fully_shard`` to a stack, in place: each core is a unit, the norms belong to the stack's own.

    - A norm is read while the sub-block before it still runs, so it must not come and go with its own layer: all norms
      are gathered with the stack and stay. They keep their dtype.
    - The cast to ``mp_policy.param_dtype`` is done by the stack, before what it casts is sent; a wrapper's cast inside
      would have gradients summed over the tensor-parallel ranks in the wider dtype.
    - An MoE is run in parts, of which FSDP-2 knows the first: its weights stay gathered from there to backward.

    Wrap what is around the stack (embedding, head) afterwards, by ``fully_shard(model)``. Apply tensor and expert
    parallelism, compilation and checkpointing of the cores before.

    Args:
        stack: its cores are not sharded yet.
        dp_mesh: one-dimensional, or two-dimensional for hybrid sharding.
        mp_policy: of the cores. ``param_dtype`` becomes the stack's ``compute_dtype``.
        reshard_after_forward: free a core's weights after its forward.
        options: handed to ``fully_shard`` for each core, such as ``offload_policy``.

    Returns:
        ``stack``.

    Raises:
        ValueError: no stack, one that is sharded already, or a policy whose ``output_dtype`` would cast a partial sum.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    where = "sonic.parallel.shard_ladder"
    if not isinstance(stack, LadderStack):
        raise argument_error(where, "stack", f"a {type(stack).__name__}", "a LadderStack")
    if any(isinstance(module, FSDPModule) for module in stack.modules()):
        raise argument_error(where, "stack", "sharded already", "a stack that is not sharded yet")
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if policy.output_dtype is not None:
        wanted = "None: what leaves a core is summed over the ranks, and then added to the stream in the stream's dtype"
        raise argument_error(where, "mp_policy.output_dtype", policy.output_dtype, wanted)
    options = {"mp_policy": policy, "shard_placement_fn": fsdp_placement, **options}
    for block in stack.blocks:
        assert isinstance(block, LadderBlock), "the stack holds no others"
        for core in (block.attention, block.mlp):
            is_moe = hasattr(core, "begin")
            fully_shard(core, mesh=dp_mesh, reshard_after_forward=reshard_after_forward and not is_moe, **options)
            if is_moe:
                register_fsdp_forward_method(core, "begin")
    around = MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False)
    fully_shard(stack, mesh=dp_mesh, mp_policy=around, reshard_after_forward=False)
    if policy.param_dtype is not None:
        stack.schedule.compute_dtype = policy.param_dtype
    return stack
