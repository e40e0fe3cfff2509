"""A Mixture-of-Experts layer over ranks: experts split among them, each expert split among them, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sonic.autograd import autocast_dtype
from sonic.parallel.exchange import Exchange
from sonic.parallel.in_flight import InFlight, all_reduce, reduce_gradient, waiting_at
from sonic.parallel.mesh import Ranks, ranks_of
from sonic.parallel.sharding import Split, local_part, shard_parameter
from sonic.parallel.tensor_parallel import REDUCE, enter, leave, once, scale_gradient
from sonic.routing.plan import RoutingPlan
from sonic.shapes import argument_error, check_choice

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["MoELayout", "parallelize_moe"]


def parallelize_moe(
    moe: nn.Module,
    *,
    ep_mesh: DeviceMesh | None = None,
    tp_mesh: DeviceMesh | None = None,
    tp_reduce: str = "sum",
    expert_gradient_scale: float | None = None,
    overlap: str = "full",
) -> nn.Module:
    """Spread a :class:`sonic.MoE` over ranks, in place; before ``fully_shard``, and before an optimizer is made.

    Its expert weights become DTensors with the names and shapes that they had, of which each rank keeps its part of
    what it holds; so all ranks have to hold the same weights, or none yet (``device="meta"``). Router, and under expert
    parallelism alone the shared expert, stay whole on every rank.

    =========  ==================================================  ==================================================
    parameter  ``ep_mesh``                                         ``tp_mesh``
    =========  ==================================================  ==================================================
    ``w1``     ``Shard(0)``, uneven where ep does not divide E     rows of gate and up, ``N / tp`` each
    ``w2``     ``Shard(0)``                                        ``Shard(2)``
    ``b1``     ``Shard(0)``                                        as ``w1``
    ``b2``     ``Shard(0)``                                        whole, and added once
    shared     whole                                               as ``w1``, ``w2``, ``b1``, ``b2``
    =========  ==================================================  ==================================================

    Along ``ep_mesh`` ranks have different tokens, any number each; along ``tp_mesh`` the same ones, so routers that
    draw at random draw alike there (give their generators the same seed).

    Args:
        moe: a :class:`sonic.MoE`.
        ep_mesh: one-dimensional; its ranks share the experts: rank w has the w-th part, as ``torch.chunk`` cuts.
        tp_mesh: one-dimensional; its ranks share each expert's width. With both, slices of one mesh by name.
        tp_reduce: ``"sum"``; ``"reduce_scatter"``: input and output are this rank's part of the sequence (dimension
            -2), but what else the router is given is of the whole; ``"none"``: input gradient and output stay partial
            sums, for a caller who reduces them.
        expert_gradient_scale: what the gradients of the expert weights are multiplied by. None: 1 / ep, right where
            gradients are averaged over all ranks, as DDP and FSDP-2 do, and each rank's loss is a mean over its tokens:
            an expert has gradients from ep ranks already when FSDP-2 averages it over the others. 1.0: sums.
        overlap: ``"full"``, ``"forward"`` or ``"off"``, see :func:`sonic.parallel.in_flight.issue`.

    Returns:
        ``moe``.

    Raises:
        ValueError: no MoE layer, one that is spread already, meshes or widths that do not fit.
    """
    where = "sonic.parallel.parallelize_moe"
    # of the class: a wrapper, such as that of torch.compile, shows the attributes of what is inside
    if not (hasattr(type(moe), "begin") and hasattr(moe, "parallel") and hasattr(moe, "glu_layout")):
        raise argument_error(where, "moe", f"a {type(moe).__name__}", "a sonic.MoE, before it is compiled or wrapped")
    if moe.parallel is not None:
        wanted = "a layer that was not given to parallelize_moe before"
        raise argument_error(where, "moe", "spread over ranks already", wanted)
    check_choice(where, "tp_reduce", tp_reduce, REDUCE)
    check_choice(where, "overlap", overlap, ("off", "forward", "full"))
    layout = MoELayout(
        ranks_of(where, "ep_mesh", ep_mesh),
        ranks_of(where, "tp_mesh", tp_mesh),
        tp_reduce=tp_reduce,
        expert_gradient_scale=expert_gradient_scale,
        overlap=overlap,
    )
    widths = {"intermediate_size": moe.intermediate_size}
    if moe.shared is not None:
        widths["shared_intermediate_size"] = moe.shared.intermediate_size
    for name, width in widths.items():
        if width % layout.tp.size:  # type: ignore[operator]
            raise argument_error(where, f"moe.{name}", width, f"a multiple of tp = {layout.tp.size}")
    is_gated = moe.w1.shape[1] != moe.w2.shape[2]  # type: ignore[index,union-attr]
    num_blocks = 2 if is_gated and moe.glu_layout == "concatenated" else 1
    up, down = Split(1, num_blocks), Split(2)
    for name, tp in (("w1", up), ("b1", up), ("w2", down), ("b2", None)):
        shard_parameter(moe, name, ep_mesh=ep_mesh, ep=Split(0), tp_mesh=tp_mesh, tp=tp)
    if moe.shared is not None:
        up, down = Split(0, num_blocks), Split(1)
        for name, tp in (("w1", up), ("b1", up), ("w2", down), ("b2", None)):
            shard_parameter(moe.shared, name, tp_mesh=tp_mesh, tp=tp)  # type: ignore[arg-type]
        moe.shared.tp = layout.tp
    moe.parallel = layout  # type: ignore[assignment]
    return moe


class MoELayout:
    """How a layer lies on the ranks, and the communication that follows from it."""

    def __init__(
        self,
        ep: Ranks,
        tp: Ranks,
        *,
        tp_reduce: str = "sum",
        expert_gradient_scale: float | None = None,
        overlap: str = "full",
    ) -> None:
        """Arguments as those of :func:`parallelize_moe`, with ranks for meshes."""
        self.ep, self.tp = ep, tp
        self.tp_reduce = tp_reduce if tp.size > 1 else "sum"
        self.expert_gradient_scale = 1 / ep.size if expert_gradient_scale is None else float(expert_gradient_scale)
        self.overlap = overlap

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for the router and tokens for the experts, both (..., D) and of one value.

        The experts' gradients are partial sums over ``tp``, the router's are whole on each of its ranks. Where one
        reduction at the border serves both, the router's are divided before.
        """
        x_experts = enter(x, self.tp, self.tp_reduce, kind="moe input", overlap=self.overlap)
        if self.tp.size == 1 or self.tp_reduce == "sum":
            return x, x_experts
        return scale_gradient(x_experts, 1 / self.tp.size), x_experts

    def enter_scores(self, scores: Tensor) -> Tensor:
        """Scores, whose gradients are partial sums over ``tp``: the router gets them whole."""
        if self.tp.size == 1:
            return scores
        # awaited at once, whatever the layer waits for later: the router's gradient, and with it the tokens', needs it
        with waiting_at(None):
            return reduce_gradient(scores, all_reduce(self.tp.group), kind="scores", overlap=self.overlap)

    def dispatch(self, x_TD: Tensor, scores: Tensor, plan: RoutingPlan, backend: str | None) -> Exchange | None:
        """Send tokens to their experts; None where all experts are here."""
        if self.ep.size == 1:
            return None
        dtype = autocast_dtype(x_TD.device)
        if dtype is not None and x_TD.dtype != torch.float64:
            x_TD = x_TD.to(dtype)  # as the experts would, but before it travels
        return Exchange(x_TD, scores, plan, self.ep, backend=backend, overlap=self.overlap)

    def local_weights(self, **weights: Tensor | None) -> dict[str, Any]:
        """This rank's part of ``w1``, ``w2``, ``b1`` and ``b2``."""
        scale = self.expert_gradient_scale
        local = {
            name: None if weight is None else scale_gradient(local_part(weight), scale)
            for name, weight in weights.items()
        }
        local["b2"] = once(local["b2"], self.tp)
        return local

    def leave(self, partial: Tensor) -> InFlight:
        """The reduction of a partial sum (..., D)."""
        return leave(partial, self.tp, self.tp_reduce, kind="moe", overlap=self.overlap)

    def __repr__(self) -> str:
        return f"ep={self.ep.size}, tp={self.tp.size}, tp_reduce={self.tp_reduce!r}, overlap={self.overlap!r}"
