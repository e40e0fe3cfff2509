"""torchtitan: its MoE models keep their configs, parameters and checkpoints, and compute experts with this library.

torchtitan swaps parts of a model by overrides, which it imports by name; nobody else imports this module::

    torchtitan_train --module qwen3 --config qwen3_moe_debug --override.imports sonic.torchtitan.routed_experts

=======================  ==============================================================================================
:func:`routed_experts`   takes the place of dispatch, experts and combine: tokens are gathered by the kernels, so that
                         no permuted copy is made; under expert parallelism torchtitan's dispatcher moves the tokens
:func:`grouped_experts`  takes the place of the experts alone: rows arrive in the order of the experts
=======================  ==============================================================================================

What is kept for backward is what :mod:`sonic.functional` keeps, and no form of the weights beside the parameters, for D
the width of the model, N that of one of E local experts, and a ``compute_dtype`` of 2 bytes:

=========================  ===========================  ==========================  ==================================
parameters                 shapes                       written per pass            kept
=========================  ===========================  ==========================  ==================================
``w1_EFD``, ``w3_EFD``     2 (E, N, D), and (E, D, N)   4 E N D bytes in forward,   nothing beside the parameters
                                                        again in backward, and as
                                                        much for their gradients
``fused_weights`` = True   (E, N, 2, D), and (E, D, N)  none                        nothing beside the parameters
gpt-oss                    (E, 2N, D), and (E, D, N)    none                        nothing beside the parameters
=========================  ===========================  ==========================  ==================================

Kernels want gate and up in one tensor, which torchtitan holds in two: these are joined when they are needed, and what
is joined is freed. Parameters of another dtype than ``compute_dtype`` are cast at the same time, as torchtitan does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sonic.autograd import no_autocast
from sonic.functional import _Experts, _offsets, check_options, expert_mlp, moe_mlp
from sonic.routing.plan import RoutingPlan
from sonic.shapes import argument_error, check_choice

try:
    from torchtitan.config import derive, override
    from torchtitan.distributed import spmd_types
    from torchtitan.distributed.utils import get_spmd_backend
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, ScaleBiasForward
    from torchtitan.overrides.fused_swiglu import FusedGroupedExperts, fused_grouped_experts
except ImportError as error:
    wanted = "sonic.torchtitan: needs torchtitan >= 0.3 (pip install 'sonic-moe[torchtitan]')"
    raise ImportError(wanted, name=error.name) from error

__all__ = [
    "COMPUTE_DTYPES",
    "SonicFusedGroupedExperts",
    "SonicGptOssGroupedExperts",
    "SonicGroupedExperts",
    "SonicRoutedExperts",
    "grouped_experts",
    "routed_experts",
]

_MODULE = "sonic.torchtitan"

#: What experts may compute in; ``"input"`` is the dtype of the tokens. torchtitan itself takes bfloat16.
COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64", "input")

_OAI_LIMIT = 7.0  # what "swiglu_oai" clamps at
_OPTIONS = ("save", "backend", "compute_dtype")


# ---------------------------------------------------------------- the experts' function, on torchtitan's parameters


class _Weights(NamedTuple):
    """Local tensors as torchtitan holds them."""

    w1: Tensor  # (E, U, D), or with w3 its gate rows (E, N, D)
    w3: Tensor | None  # up rows (E, N, D)
    w2: Tensor  # (E, D, N)
    b1: Tensor | None = None  # (E, U)
    b2: Tensor | None = None  # (E, D)

    def joined(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``w1`` (E, U, D), ``w2``, ``b1``, ``b2`` in ``dtype``; what has it already is not copied."""
        if self.w3 is None:
            w1 = self.w1.to(dtype)
        elif torch.is_grad_enabled():
            w1 = torch.cat([self.w1.to(dtype), self.w3.to(dtype)], dim=1)
        else:
            num_experts, width, hidden_size = self.w1.shape  # cast while joined: one pass
            w1 = self.w1.new_empty(num_experts, 2 * width, hidden_size, dtype=dtype)
            w1[:, :width] = self.w1
            w1[:, width:] = self.w3
        b1, b2 = (None if bias is None else bias.to(dtype) for bias in (self.b1, self.b2))
        return w1, self.w2.to(dtype), b1, b2


class _Maps(NamedTuple):
    """The integers of a call; of rows that stand in order all but the first are None."""

    expert_offset_E1: Tensor
    token_of_row_R: Tensor | None = None
    slot_of_row_R: Tensor | None = None
    row_by_token_R: Tensor | None = None
    token_offset_T1: Tensor | None = None
    top_k: int | None = None


class _Settings(NamedTuple):
    dtype: torch.dtype
    activation: str
    glu_layout: str
    keep_h: bool
    backend: str | None


class _Context:
    """Stands for the context of the function in ``sonic.functional`` inside that of the function below."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.options: Any = None
        self.top_k: int | None = None
        self.where = ""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def with_tensors(self, *tensors: Tensor | None) -> _Context:
        """The same with other tensors, or without any."""
        other = _Context(self.needs_input_grad)
        other.options, other.top_k, other.where = self.options, self.top_k, self.where
        other.saved_tensors = tensors
        return other


class _ExpertsOfParameters(torch.autograd.Function):
    """The function behind ``moe_mlp`` and ``expert_mlp``, which keeps parameters instead of what was made of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        scores: Tensor | None,
        w1: Tensor,
        w3: Tensor | None,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        maps: _Maps,
        settings: _Settings,
    ) -> Tensor:
        need_x, need_scores, need_w1, need_w3, need_w2, need_b1, need_b2 = ctx.needs_input_grad[:7]
        inner = _Context((need_x, need_w1 or need_w3, need_w2, need_b1, need_b2, need_scores))
        cast_TD = x_TD.to(settings.dtype)
        made = _Weights(w1, w3, w2, b1, b2).joined(settings.dtype)
        out_TD: Tensor = _Experts.forward(
            inner,
            cast_TD,
            *made,
            scores,
            maps.expert_offset_E1,
            maps.token_of_row_R,
            maps.slot_of_row_R,
            maps.row_by_token_R,
            maps.token_offset_T1,
            maps.top_k,
            settings.activation,
            settings.glu_layout,
            settings.keep_h,
            settings.backend,
        )
        _, h_RU, *_, expert_offset_E1, slot_of_row_R, token_of_row_R = inner.saved_tensors
        # the caller keeps its tokens anyway; rows were made for this call
        kept = cast_TD if maps.token_of_row_R is None else x_TD
        ctx.save_for_backward(kept, scores, w1, w3, w2, b1, b2, h_RU, expert_offset_E1, slot_of_row_R, token_of_row_R)
        ctx.inner, ctx.dtype = inner.with_tensors(), settings.dtype
        return out_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> Any:
        x_TD, scores, w1, w3, w2, b1, b2, h_RU, *maps = ctx.saved_tensors
        made = _Weights(w1, w3, w2, b1, b2).joined(ctx.dtype)
        inner = ctx.inner.with_tensors(x_TD.to(ctx.dtype), h_RU, *made, scores, *maps)
        dx_TD, dw1, dw2, db1, db2, dscores, *_ = _Experts.backward(inner, dout_TD.to(ctx.dtype))
        dw3 = None
        if w3 is not None and dw1 is not None:  # each on its own, so that neither holds the memory of both
            dw1, dw3 = (half.contiguous() for half in dw1.chunk(2, dim=1))
        return dx_TD, dscores, dw1, dw3, dw2, db1, db2, None, None


def _experts(
    x_TD: Tensor,
    scores: Tensor | None,
    weights: _Weights,
    rows: Tensor | RoutingPlan,
    *,
    activation: str,
    glu_layout: str,
    save: str,
    backend: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """(T, D) tokens with the plan of where they go, or (R, D) rows with counts (E,); to the same shape and dtype."""
    where = f"{_MODULE}.grouped_experts"
    if torch.compiler.is_compiling():  # there the compiler decides what of the weights is kept
        w1, w2, b1, b2 = weights.joined(dtype)
        options: dict[str, Any] = {"b1": b1, "b2": b2, "activation": activation, "glu_layout": glu_layout}
        options |= {"save": save, "backend": backend}
        with no_autocast(x_TD.device):
            if isinstance(rows, RoutingPlan):
                assert scores is not None, "a plan comes with scores"
                out_TD = moe_mlp(x_TD.to(dtype), w1, w2, scores, rows, **options)
            else:
                out_TD = expert_mlp(x_TD.to(dtype), w1, w2, rows, scores, **options)
        return out_TD.to(x_TD.dtype)
    if isinstance(rows, RoutingPlan):
        maps = _Maps(
            rows.expert_offset_E1,
            rows.token_of_row_R,
            rows.slot_of_row_R,
            rows.row_by_token_R,
            rows.token_offset_T1,
            rows.top_k,
        )
    else:
        maps = _Maps(_offsets(where, rows, x_TD))
    keep_h = save == "preactivation" and torch.is_grad_enabled()
    settings = _Settings(dtype, activation, glu_layout, keep_h, backend)
    out: Tensor = _ExpertsOfParameters.apply(x_TD, scores, *weights, maps, settings)
    return out


# ---------------------------------------------------------------- torchtitan's modules


class _SonicExperts:
    """Mixed into classes of torchtitan's experts: the same parameters, and a forward of this library."""

    _activation, _glu_layout = "swiglu", "concatenated"

    def __init__(self, config: Any) -> None:
        """
        Args:
            config: made by :func:`grouped_experts`.
        """
        super().__init__(config)  # type: ignore[call-arg]
        _check_options(f"{_MODULE}.{type(self).__name__}", config.save, config.backend, config.compute_dtype)
        self.save: str = config.save
        self.backend: str | None = config.backend
        self.compute_dtype: str = config.compute_dtype

    def _weights(self, dtype: torch.dtype) -> _Weights:
        raise NotImplementedError

    def forward(
        self,
        x_RD: Tensor,
        num_tokens_per_expert_E: Tensor | None,
        *,
        topk_scores_TK: Tensor | None = None,
        plan: RoutingPlan | None = None,
    ) -> Tensor:
        """Experts on rows that stand in their order, or on tokens with a plan of where they go.

        Args:
            x_RD: (R, D) rows of any floating dtype, or with a ``plan`` tokens (T, D). Rows beyond the sum of the counts
                give zeros and get zero gradients.
            num_tokens_per_expert_E: (E,) integer, on the device of the rows, which is not waited for; None with a plan.
            topk_scores_TK: of the shape that ``plan`` was built from.
            plan: as :class:`sonic.RoutingPlan` makes it.

        Returns:
            The shape and dtype of ``x_RD``.

        Raises:
            ValueError: torchtitan checks SPMD types, which it knows no rule for here; counts on a CPU that sum to more
                than R; no backend can serve.
        """
        _refuse_type_checking(type(self).__name__)
        dtype = x_RD.dtype if self.compute_dtype == "input" else getattr(torch, self.compute_dtype)
        rows = num_tokens_per_expert_E if plan is None else plan
        assert rows is not None, "rows come with counts, tokens with a plan"
        return _experts(
            x_RD,
            topk_scores_TK,
            self._weights(dtype),
            rows,
            activation=self._activation,
            glu_layout=self._glu_layout,
            save=self.save,
            backend=self.backend,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"save={self.save!r}, backend={self.backend!r}, compute_dtype={self.compute_dtype!r}"


class SonicGroupedExperts(_SonicExperts, GroupedExperts):
    """torchtitan's experts with its parameters: ``w1_EFD`` and ``w3_EFD`` (E, N, D), ``w2_EDF`` (E, D, N)."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """torchtitan's, and the options of :func:`grouped_experts`."""

        save: str = "preactivation"
        backend: str | None = None
        compute_dtype: str = "bfloat16"

    def _weights(self, dtype: torch.dtype) -> _Weights:
        return _Weights(_local(self.w1_EFD), _local(self.w3_EFD), _local(self.w2_EDF))


class SonicFusedGroupedExperts(_SonicExperts, FusedGroupedExperts):
    """The same with gate and up in one parameter ``w13`` (E, N, 2, D), which kernels read as it lies.

    The class is torchtitan's own for such weights: checkpoints of the model have ``w1_EFD`` and ``w3_EFD``.
    """

    _glu_layout = "interleaved"

    @dataclass(kw_only=True, slots=True)
    class Config(FusedGroupedExperts.Config):
        """torchtitan's, and the options of :func:`grouped_experts`."""

        save: str = "preactivation"
        backend: str | None = None
        compute_dtype: str = "bfloat16"

    def _weights(self, dtype: torch.dtype) -> _Weights:
        return _Weights(_local(self.w13).flatten(1, 2), None, _local(self.w2_EDF))


class SonicGptOssGroupedExperts(_SonicExperts, GptOssGroupedExperts):
    """gpt-oss: ``mlp1_weight_EGD`` (E, 2N, D) interleaved, ``mlp2_weight_EDF`` (E, D, N), and biases (E, 2N), (E, D).

    It clamps at 7, with alpha 1.702: the activation ``swiglu_oai``.
    """

    _activation, _glu_layout = "swiglu_oai", "interleaved"

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        """torchtitan's, and the options of :func:`grouped_experts`."""

        save: str = "preactivation"
        backend: str | None = None
        compute_dtype: str = "bfloat16"

    def _weights(self, dtype: torch.dtype) -> _Weights:
        tensor_parallel, weight = 1, self.mlp1_weight_EGD
        if isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ()):
            tensor_parallel = weight.device_mesh["tp"].size()
        # every rank of a tensor-parallel group adds the bias to what is summed over them
        b2_ED = ScaleBiasForward.apply(_local(self.mlp2_bias_ED), tensor_parallel, dtype)
        return _Weights(_local(weight), None, _local(self.mlp2_weight_EDF), _local(self.mlp1_bias_EG), b2_ED)


class SonicRoutedExperts(RoutedExperts):
    """Dispatch, experts and combine: one call of the library where tokens stay on their rank.

    Where a dispatcher sends them to others, it does so as in torchtitan, and the experts compute what arrives.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """torchtitan's; ``inner_experts`` is one of the classes above."""

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """As torchtitan's.

        Args:
            x_BLD: (B, L, D) tokens.
            topk_scores_BLK: (B, L, K), any floating dtype; they weigh what experts return, in float32.
            topk_expert_ids_BLK: (B, L, K) integer, no expert twice in a row.
            num_local_tokens_per_expert_E: (E,) what the dispatcher is told; not read where tokens stay.

        Returns:
            (B, L, D), dtype of ``x_BLD``.

        Raises:
            ValueError: as the experts' own forward; ids out of range or twice in a row.
        """
        if not _keeps_tokens(self.token_dispatcher):
            out: Tensor = super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)
            return out
        experts, (width, top_k) = self.inner_experts, (x_BLD.shape[-1], topk_expert_ids_BLK.shape[-1])
        _refuse_type_checking(type(self).__name__)
        plan = RoutingPlan.from_topk(
            topk_expert_ids_BLK.reshape(-1, top_k), experts.num_experts, backend=experts.backend
        )
        # by a call, for FSDP may shard the experts as a unit of their own
        out_TD = experts(x_BLD.reshape(-1, width), None, topk_scores_TK=topk_scores_BLK.reshape(-1, top_k), plan=plan)
        return out_TD.reshape(x_BLD.shape)


def _keeps_tokens(dispatcher: Any) -> bool:
    """Whether tokens stay on their rank, in the way that torchtitan's own dispatchers do it."""
    if type(dispatcher) is LocalTokenDispatcher:
        return True
    return type(dispatcher) is AllToAllTokenDispatcher and dispatcher.ep_mesh is None


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _refuse_type_checking(kind: str) -> None:
    if get_spmd_backend() == "spmd_types" and spmd_types.spmd.is_type_checking():
        raise argument_error(
            f"{_MODULE}: {kind}", "debug.spmd_typechecking", True, "False: these kernels have no rule of SPMD types"
        )


# ---------------------------------------------------------------- overrides

Factory = Callable[..., Any]


def _offered(target: type, description: str) -> Callable[[Factory], Factory]:
    """torchtitan's ``override``, under the short name of this module, which is what users write."""

    def register(factory: Factory) -> Factory:
        factory.__module__ = _MODULE
        registered: Factory = override(target=target, description=description)(factory)
        return registered

    return register


@_offered(GroupedExperts.Config, "Experts of sonic, on torchtitan's dispatch.")
def grouped_experts(
    cfg: GroupedExperts.Config,
    *,
    save: str = "preactivation",
    backend: str | None = None,
    compute_dtype: str = "bfloat16",
    fused_weights: bool = False,
    **unknown: object,
) -> GroupedExperts.Config:
    """Override of the experts alone: ``--override.imports sonic.torchtitan.grouped_experts``.

    Options come as ``--override.imports 'sonic.torchtitan.grouped_experts={"save": "input"}'``. To choose layers, call
    this from an override of your own, whose decorator has ``fqns``.

    Args:
        cfg: of torchtitan's ``GroupedExperts`` or ``GptOssGroupedExperts``, initialisers and sharding included.
        save: what backward keeps: ``"preactivation"`` or ``"input"``, see :mod:`sonic.functional`.
        backend: insist on a kernel backend.
        compute_dtype: a name in :data:`COMPUTE_DTYPES`. torchtitan computes in bfloat16 whatever the tokens are.
        fused_weights: one parameter for gate and up, which saves joining them. Checkpoints of the model are the same,
            those of the optimizer are not: its states are those of ``w13``.

    Returns:
        The config of the experts that take their place.

    Raises:
        ValueError: options that are none or no such names; experts of another class; a clamp other than 7.
    """
    where = f"{_MODULE}.grouped_experts"
    if unknown:
        raise argument_error(where, "options", ", ".join(sorted(unknown)), f"{', '.join(_OPTIONS)}, fused_weights")
    if not isinstance(fused_weights, bool):
        raise argument_error(where, "fused_weights", repr(fused_weights), "true or false")
    _check_options(where, save, backend, compute_dtype)
    options = {"save": save, "backend": backend, "compute_dtype": compute_dtype}
    if type(cfg) is GroupedExperts.Config and fused_weights:
        return derive(fused_grouped_experts(cfg), SonicFusedGroupedExperts.Config, **options)
    if type(cfg) is GroupedExperts.Config:
        return derive(cfg, SonicGroupedExperts.Config, **options)
    if type(cfg) is GptOssGroupedExperts.Config:
        if cfg.swiglu_limit != _OAI_LIMIT:
            raise argument_error(where, "swiglu_limit", cfg.swiglu_limit, f"{_OAI_LIMIT}: that of swiglu_oai")
        return derive(cfg, SonicGptOssGroupedExperts.Config, **options)
    wanted = "that of GroupedExperts or GptOssGroupedExperts: other experts compute something else"
    raise argument_error(where, "cfg", f"a {type(cfg).__qualname__}", wanted)


@_offered(RoutedExperts.Config, "Experts of sonic, which gather and combine tokens themselves.")
def routed_experts(cfg: RoutedExperts.Config, **options: Any) -> RoutedExperts.Config:
    """Override of dispatch, experts and combine: ``--override.imports sonic.torchtitan.routed_experts``.

    Args:
        cfg: of torchtitan's ``RoutedExperts``; with any dispatcher.
        **options: those of :func:`grouped_experts`.

    Returns:
        The config of what takes their place; ``inner_experts`` as :func:`grouped_experts` makes it.

    Raises:
        ValueError: as :func:`grouped_experts`; a subclass of ``RoutedExperts``.
    """
    if type(cfg) is not RoutedExperts.Config:
        wanted = "that of RoutedExperts itself, or grouped_experts, which leaves the rest alone"
        raise argument_error(f"{_MODULE}.routed_experts", "cfg", f"a {type(cfg).__qualname__}", wanted)
    return derive(cfg, SonicRoutedExperts.Config, inner_experts=grouped_experts(cfg.inner_experts, **options))


def _check_options(where: str, save: str, backend: str | None, compute_dtype: str) -> None:
    check_options(where, "swiglu", "concatenated", save, backend)
    check_choice(where, "compute_dtype", compute_dtype, COMPUTE_DTYPES)
