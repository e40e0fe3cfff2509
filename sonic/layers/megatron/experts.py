"""The experts module of Megatron-core: its contract outside, :mod:`sonic.functional` inside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn

from sonic.layers.megatron.options import ExpertsOptions, check_config
from sonic.layers.megatron.weight_gradients import WeightGradients
from sonic.routing.plan import RoutingPlan
from sonic.shapes import argument_error, check_shape

__all__ = ["SonicExperts"]

# Parameter -> its linear layer and kind in Megatron's checkpoints, and the axis of one expert's part that is split.
_STORED: dict[str, tuple[str, str, int | None]] = {
    "weight1": ("linear_fc1", "weight", 0),
    "weight2": ("linear_fc2", "weight", 1),
    "bias1": ("linear_fc1", "bias", 0),
    "bias2": ("linear_fc2", "bias", None),
}
_EXTRA_STATE = re.compile(r"(^|\.)expert\d+\.linear_fc[12]\._extra_state$")


class SonicExperts(MegatronModule):
    """The experts that lie on this rank, in place of ``SequentialMLP``, ``GroupedMLP`` or ``TEGroupedMLP``.

    Parameters, with El local experts and the width n of each split over the expert-tensor-parallel ranks:

    ===========================  =============================================================================
    ``weight1`` (El, U, D)       gate rows first, then up rows (U = 2 n / etp), or U = n / etp without a gate
    ``weight2`` (El, D, n/etp)
    ``bias1``, ``bias2``         (El, U) and (El, D) with ``add_bias_linear``
    ===========================  =============================================================================

    Distributed checkpoints hold them as Megatron's own modules do. ``state_dict`` has the names above.
    """

    weight1: nn.Parameter
    weight2: nn.Parameter
    bias1: nn.Parameter | None
    bias2: nn.Parameter | None

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
        *,
        weights: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """
        Args:
            num_local_experts: El.
            config: a TransformerConfig.
            submodules: an :class:`ExpertsOptions`; anything else, such as the linear layers of Megatron's own
                experts, is not used.
            pg_collection: the process groups; None: those of Megatron's ``parallel_state``.
            name: taken for later versions of Megatron-core, not used.
            weights: parameters to take, by the names above; None: new ones, drawn as the config says.

        Raises:
            ValueError: a field of the config that is not served, or a width that the ranks cannot share.
        """
        super().__init__(config=config)
        where = "sonic.megatron.SonicExperts"
        self.activation = check_config(where, config)
        self.options = submodules.check(where) if isinstance(submodules, ExpertsOptions) else ExpertsOptions()
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.attention_tp = config.tensor_model_parallel_size
        ranks = self.tp_group.size()
        if config.moe_ffn_hidden_size % ranks:
            wanted = f"a multiple of the {ranks} expert-tensor-parallel ranks"
            raise argument_error(where, "config.moe_ffn_hidden_size", config.moe_ffn_hidden_size, wanted)
        width_n = config.moe_ffn_hidden_size // ranks
        width_u = 2 * width_n if config.gated_linear_unit else width_n
        width_d = config.moe_latent_size or config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight1": (width_u, width_d), "weight2": (width_d, width_n)}
        if config.add_bias_linear:
            shapes |= {"bias1": (width_u,), "bias2": (width_d,)}
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        for parameter_name in _STORED:
            made = None
            if parameter_name in shapes:
                shape = (num_local_experts, *shapes[parameter_name])
                if weights is None:
                    made = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
                else:
                    made = weights[parameter_name]
                    check_shape(where, parameter_name, made, **dict(zip("EUD", shape, strict=False)))
                self._mark(parameter_name, made)
            self.register_parameter(parameter_name, made)
        if config.perform_initialization and weights is None:
            self._initialize()
        self.gradients = WeightGradients(
            self,
            into_main_grad=config.gradient_accumulation_fusion,
            delayed=getattr(config, "delay_wgrad_compute", False),
        )
        self.register_load_state_dict_post_hook(_forget_extra_state)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply the local experts to rows that a dispatcher brought here.

        Args:
            permuted_local_hidden_states: (R, D), rows in the order of the local experts; R may be 0.
            tokens_per_expert: (El,) integer, on the CPU or on the device of the rows.
            permuted_probs: (R,), the dtype of the rows or float32.

        Returns:
            (R, D), each row times its probability, in the dtype of the rows; and None, for there is no bias to add.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        rows = permuted_local_hidden_states
        probs: Tensor | None = permuted_probs
        if self.config.moe_apply_probs_on_input:
            rows, probs = (permuted_probs.unsqueeze(-1) * rows).to(rows.dtype), None
        return self._compute(rows, probs, None, tokens_per_expert), None

    def mix(self, x: Tensor, scores: Tensor, plan: RoutingPlan) -> Tensor:
        """Apply all experts to tokens where they stand, and sum what each token's experts give: (T, D) -> (T, D).

        Args:
            x: (T, D).
            scores: of the plan's shape.
            plan: who goes where, over the El experts here.

        Raises:
            ValueError: as :func:`sonic.moe_mlp`.
        """
        return self._compute(x, scores, plan, None)

    def backward_dw(self) -> None:
        """Compute the weight gradients that backward left out, with ``delay_wgrad_compute``; else nothing."""
        self.gradients.compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], object]) -> None:
        """Have ``hook()`` called after each :meth:`backward_dw`; Megatron's data parallelism does so.

        Args:
            hook: adds a parameter's gradient to its main gradient.
        """
        self.gradients.hooks.append(hook)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a distributed checkpoint holds of this rank: keys, shapes and pieces are those of ``SequentialMLP``.

        Args:
            prefix: of this module in the model, with the dot.
            sharded_offsets: axes that come before, such as the layer's.
            metadata: ``singleton_local_shards`` asks for a key per expert instead of one axis over all.

        Returns:
            Name -> ShardedTensor, ShardedTensorFactory or ShardedObject.
        """
        singleton = bool((metadata or {}).get("singleton_local_shards", False))
        etp, etp_rank = self.tp_group.size(), self.tp_group.rank()
        dp_rank = self.dp_group.rank()
        sharded: dict[str, Any] = {}
        for name, (linear, kind, tp_axis) in _STORED.items():
            parameter = getattr(self, name)
            if parameter is None:
                continue
            is_glu = self.config.gated_linear_unit and linear == "linear_fc1"
            pieces = _Pieces(
                f"{linear}.{kind}",
                tuple(sharded_offsets),
                experts=(self.ep_group.rank(), self.ep_group.size(), self.num_local_experts),
                split=None if tp_axis is None else (tp_axis, etp_rank, etp),
                is_glu=is_glu,
                singleton=singleton,
            )
            replica = (0, etp_rank if tp_axis is None else 0, dp_rank)
            sharded[f"{prefix}{name}"] = ShardedTensorFactory(
                f"{prefix}experts.{linear}.{kind}", parameter, pieces.build, pieces.merge, replica
            )
        # Megatron's linear layers store an (empty) object each; a checkpoint without would not load there.
        first = self.ep_group.rank() * self.num_local_experts
        all_experts = self.ep_group.size() * self.num_local_experts
        for expert in range(first, first + self.num_local_experts):
            for linear in ("linear_fc1", "linear_fc2"):
                key = f"{prefix}experts.{f'{expert}.' if singleton else ''}{linear}._extra_state"
                offsets = tuple(sharded_offsets)
                if not singleton:
                    offsets = (*offsets, (len(offsets), expert, all_experts))
                sharded[f"{prefix}expert{expert}.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                    None, key, offsets, (0, etp_rank, dp_rank)
                )
        return sharded

    def extra_repr(self) -> str:
        """Sizes and what was chosen."""
        sizes = f"{self.num_local_experts} experts, weight1={tuple(self.weight1.shape)}"
        return f"{sizes}, activation={self.activation!r}, save={self.options.save!r}"

    def _compute(
        self, x: Tensor, scores: Tensor | None, plan: RoutingPlan | None, tokens_per_expert: Tensor | None
    ) -> Tensor:
        save, backend = self.options.save, self.options.backend
        return self.gradients.apply(
            x, scores, plan, tokens_per_expert, activation=self.activation, save=save, backend=backend
        )

    def _mark(self, name: str, parameter: Any) -> None:
        """The attributes by which Megatron knows who shares a parameter."""
        linear, _, tp_axis = _STORED[name]
        stride = 2 if linear == "linear_fc1" and self.config.gated_linear_unit else 1
        if tp_axis is None:
            parameter.sequence_parallel = self.config.sequence_parallel
        else:
            set_tensor_model_parallel_attributes(parameter, True, 1 + tp_axis, stride)
        # Whether gradients are summed over the ranks that share dense weights. Megatron's own experts say so by the
        # number of expert-parallel ranks alone; with whole experts beside split matrices their copies then drift apart.
        parameter.allreduce = self.ep_group.size() == 1 and self.tp_group.size() == self.attention_tp
        if getattr(self.config, "delay_wgrad_compute", False):
            parameter.skip_backward_post_hook = True

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw as a ``SequentialMLP`` of Megatron's own linear layers does, expert by expert: the same weights."""
        on_cpu, config = self.config.use_cpu_initialization, self.config
        for expert in range(self.num_local_experts):
            for name, init in (("weight1", config.init_method), ("weight2", config.output_layer_init_method)):
                part = getattr(self, name)[expert]
                if on_cpu:
                    self._fill_part(name, part, init)
                else:
                    with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                        init(part)
        for bias in (self.bias1, self.bias2):
            if bias is not None:
                bias.zero_()

    def _fill_part(self, name: str, part: Tensor, init: Callable[[Tensor], object]) -> None:
        """All ranks draw the whole matrix of an expert, in float32, and keep their part of it."""
        parameter, ranks = getattr(self, name), self.tp_group.size()
        dim, stride = parameter.partition_dim - 1, parameter.partition_stride
        shape = list(part.shape)
        shape[dim] *= ranks
        whole = torch.empty(shape, dtype=torch.float32)
        init(whole)
        pieces = whole.to(part.dtype).split(part.shape[dim] // stride, dim)[self.tp_group.rank() :: ranks]
        part.copy_(torch.cat(pieces, dim))


class _Pieces:
    """How one parameter of all local experts is cut for a checkpoint, and put together again."""

    def __init__(
        self,
        name: str,
        offsets: tuple[Any, ...],
        *,
        experts: tuple[int, int, int],
        split: tuple[int, int, int] | None,
        is_glu: bool,
        singleton: bool,
    ) -> None:
        """
        Args:
            name: with which keys end.
            offsets: of axes that come before.
            experts: expert-parallel rank, how many ranks, and experts on each.
            split: the axis of one expert that is split, this rank and how many; None: it is not.
            is_glu: the two halves are placed apart.
            singleton: a key per expert.
        """
        self._name, self._offsets = name, offsets
        self._experts, self._split, self._is_glu, self._singleton = experts, split, is_glu, singleton

    @torch.no_grad()
    def build(self, key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[Any]:
        """The pieces of ``tensor``, as Megatron's checkpoints hold them.

        Args:
            key: of the model's parameter, or of an optimizer's state of it.
            tensor: (El, …).
            replica_id: of the pieces.
            flattened_range: not served.

        Raises:
            ValueError: a flattened range is asked for.
        """
        if flattened_range is not None:
            wanted = "None: set metadata['distrib_optim_sharding_type'] to 'fully_reshardable' or 'dp_reshardable'"
            raise argument_error("sonic.megatron.SonicExperts", "flattened_range", flattened_range, wanted)
        before = len(self._offsets)
        halves = tensor.chunk(2, 1) if self._is_glu else (tensor,)
        pieces = []
        for half, values in enumerate(halves):
            for place, piece, own_key in self._placed(key, values, half):
                pieces.append(
                    ShardedTensor.from_rank_offsets(
                        own_key,
                        piece.contiguous(),
                        *self._offsets,
                        *place,
                        replica_id=replica_id,
                        prepend_axis_num=before,
                    )
                )
        return pieces

    def _placed(self, key: str, values: Tensor, half: int) -> Iterator[tuple[list[Any], Tensor, str]]:
        """Offsets, values and key of each piece of one half."""
        ep_rank, ep, local = self._experts
        axis = len(self._offsets)
        if not self._singleton:
            place = [(axis, ep_rank, ep)]
            if self._split is not None:
                tp_axis, rank, ranks = self._split
                shards = 2 * ranks if self._is_glu else ranks
                place.append((axis + 1 + tp_axis, half * ranks + rank, shards))
            yield place, values, key
            return
        for index in range(local):
            expert_key = f"{key.removesuffix(self._name)}{ep_rank * local + index}.{self._name}"
            if self._is_glu:
                expert_key += ("_w", "_v")[half]
            place = [] if self._split is None else [(axis + self._split[0], *self._split[1:])]
            yield place, values[index], expert_key

    @torch.no_grad()
    def merge(self, pieces: list[Tensor]) -> Tensor:
        """The inverse of :meth:`build`, of what was loaded.

        Args:
            pieces: in the order of :meth:`build`.
        """
        if self._singleton:
            local = self._experts[2]
            pieces = [torch.stack(pieces[start : start + local]) for start in range(0, len(pieces), local)]
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _forget_extra_state(module: nn.Module, incompatible_keys: Any) -> None:
    """The objects of Megatron's linear layers are no keys of ours."""
    unexpected = incompatible_keys.unexpected_keys
    unexpected[:] = [key for key in unexpected if not _EXTRA_STATE.search(key)]
