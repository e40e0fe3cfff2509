"""The Mixture-of-Experts layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from sonic.autograd import autocast_dtype
from sonic.functional import check_options, check_scores, expert_mlp, moe_mlp, up_rows
from sonic.parallel.compilers import outside_compilers
from sonic.parallel.expert_parallel import MoELayout
from sonic.parallel.in_flight import InFlight
from sonic.parallel.mesh import Ranks
from sonic.parallel.sharding import fill_, local_part
from sonic.parallel.tensor_parallel import once
from sonic.routing.losses import attach_loss
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing
from sonic.routing.topk import TopKRouter
from sonic.shapes import argument_error, check_choice, check_positive, check_same, check_shape

__all__ = ["MoE", "MoEHandle", "SharedExpert", "set_aux_loss_scale"]

Init = str | Callable[[Tensor], object]  # "linear", "normal", or a function that fills a matrix in place

_INITS = ("linear", "normal")
_SCORES_ON = ("output", "input")


class MoE(nn.Module):
    """A router, routed experts and, if wanted, a shared expert: the drop-in for the MLP of a transformer block.

    Parameters (these are the checkpoint's keys):

    =============================  ===========================================================================
    ``w1`` (E, U, D)               up projections; gate and up rows as ``glu_layout`` says (U = 2N), or U = N
    ``w2`` (E, D, N)               down projections
    ``b1`` (E, U), ``b2`` (E, D)   with ``bias=True``
    ``router.weight`` (E, D)       with the default router
    ``shared.w1``, ``shared.w2``   (U', D) and (D, N') with ``shared_intermediate_size`` = N'
    ``shared.b1``, ``shared.b2``   (U',) and (D,) with that and ``bias=True``
    =============================  ===========================================================================
    """

    w1: nn.Parameter
    w2: nn.Parameter
    b1: nn.Parameter | None
    b2: nn.Parameter | None
    parallel: MoELayout | None = None  # set by sonic.parallel.parallelize_moe

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        router: nn.Module | None = None,
        shared_intermediate_size: int = 0,
        glu_layout: str = "concatenated",
        save: str = "preactivation",
        backend: str | None = None,
        init: Init = "linear",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            hidden_size: D.
            intermediate_size: N, width of one expert.
            num_experts: E.
            top_k: K, at most E; experts per token.
            activation: a name in ``sonic.ACTIVATIONS``.
            bias: give every projection of the experts a bias.
            router: a module that maps (T, D) tokens to a :class:`sonic.routing.Routing`; its ``hidden_size``,
                ``num_experts`` and ``top_k``, if it has them, are those of the layer. Its parameters may be float32
                where the layer's have 16 bits. None: ``TopKRouter(hidden_size, num_experts, top_k)``, which has no
                auxiliary loss; pass ``TopKRouter(..., aux_loss_coeff=0.01)`` to balance the load.
            shared_intermediate_size: width of an expert that every token passes; 0: none.
            glu_layout: ``"concatenated"`` or ``"interleaved"`` rows of ``w1``.
            save: what backward keeps: ``"preactivation"`` or ``"input"``, see :mod:`sonic.functional`.
            backend: insist on a kernel backend.
            init: ``"linear"``: uniform within ±1/sqrt(fan-in), as ``nn.Linear`` draws; ``"normal"``: normal with
                ``init_std``, biases zero; or a function that fills a tensor in place, called with one expert's matrix
                at a time (biases zero).
            init_std: standard deviation for ``"normal"``.
            device: of the parameters; ``"meta"`` builds the layer without memory.
            dtype: of the parameters: bf16, fp16, fp32 or fp64.

        Raises:
            ValueError: sizes, names, a dtype or a router that do not fit.
        """
        super().__init__()
        where = "sonic.MoE"
        check_positive(
            where, hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts, top_k=top_k
        )
        if top_k > num_experts:
            raise argument_error(where, "top_k", top_k, f"at most num_experts = {num_experts}")
        check_options(where, activation, glu_layout, save, backend, dtype)
        _check_init(where, init, init_std)
        if shared_intermediate_size:
            check_positive(where, shared_intermediate_size=shared_intermediate_size)
        if router is not None:
            _check_router(where, router, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation = activation
        self.glu_layout = glu_layout
        self.save = save
        self.backend = backend
        self.init, self.init_std = init, init_std
        self.aux_loss_scale: float | Tensor = 1.0
        width_u = up_rows(intermediate_size, activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(num_experts, width_u, hidden_size, **factory))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **factory))
        self.register_parameter("b1", nn.Parameter(torch.empty(num_experts, width_u, **factory)) if bias else None)
        self.register_parameter("b2", nn.Parameter(torch.empty(num_experts, hidden_size, **factory)) if bias else None)
        self.router = (
            TopKRouter(hidden_size, num_experts, top_k, backend=backend, **factory) if router is None else router
        )
        self.shared: SharedExpert | None = None
        if shared_intermediate_size:
            self.shared = SharedExpert(
                hidden_size,
                shared_intermediate_size,
                activation=activation,
                bias=bias,
                glu_layout=glu_layout,
                save=save,
                backend=backend,
                init=init,
                init_std=init_std,
                **factory,
            )
        _reset_experts(self.w1, self.w2, self.b1, self.b2, init, init_std)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, also the router's (if it has a ``reset_parameters``) and the shared expert's.

        After ``to_empty``, say.
        """
        _reset_experts(self.w1, self.w2, self.b1, self.b2, self.init, self.init_std)
        for child in (self.router, self.shared):
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = False, **router_inputs: Any) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_routing: Literal[True], **router_inputs: Any) -> tuple[Tensor, Routing]: ...

    def forward(self, x: Tensor, return_routing: bool = False, **router_inputs: Any) -> Tensor | tuple[Tensor, Routing]:
        """Route the tokens, apply their experts, sum.

        In training mode the router's auxiliary loss reaches backward by itself: the gradient of ``aux_loss_scale *
        aux_loss`` (an attribute, 1.0; :func:`set_aux_loss_scale` sets it for a model) is added to whatever is
        differentiated through the output.

        Args:
            x: (..., D), of the parameters' dtype unless autocast is on; zero tokens are fine. (batch, sequence, D) for
                a router that wants to know where sequences begin (its ``wants_sequence_length`` is true), unless
                ``sequence_length`` is given.
            return_routing: return the routing too, and attach nothing: add ``routing.aux_loss`` to your loss yourself.
            router_inputs: handed to the router as they are, such as ``token_ids`` of the leading shape of x for
                :class:`sonic.routing.HashRouter`.

        Returns:
            y of the shape and dtype of x (autocast's dtype where that is on), or (y, Routing).

        Raises:
            ValueError: shape, dtype or device do not fit the parameters, or what the router returned does not fit x.
        """
        if self.parallel is None:
            handle = self.begin(x, attach_aux_loss=not return_routing, **router_inputs)
            out = handle.experts().finish()
        else:
            handle, out = self._forward_spread(x, not return_routing, **router_inputs)
        return (out, handle.routing) if return_routing else out

    @outside_compilers  # what is in flight is no value that a compiled graph could hold
    def _forward_spread(self, x: Tensor, attach_aux_loss: bool, **router_inputs: Any) -> tuple[MoEHandle, Tensor]:
        handle = self.begin(x, attach_aux_loss=attach_aux_loss, **router_inputs)
        handle.shared()  # what was dispatched travels meanwhile
        return handle, handle.experts().finish()

    def begin(
        self, x: Tensor, *, attach_aux_loss: bool = True, add_shared: bool = True, **router_inputs: Any
    ) -> MoEHandle:
        """The first of three steps, ``begin(x).experts().finish()``, which together are :meth:`forward`.

        Routes the tokens, and under expert parallelism sends them on their way. Other work may be done between the
        steps: it hides the communication of the step before, and in backward that of its transpose.

        Args:
            x, router_inputs: as in :meth:`forward`.
            attach_aux_loss: let the auxiliary loss reach backward by itself, in training mode.
            add_shared: have the shared expert's output in that of :meth:`MoEHandle.finish`. False: only
                :meth:`MoEHandle.shared` returns it.

        Raises:
            ValueError: as :meth:`forward`.
        """
        where, layout = "sonic.MoE", self.parallel
        if not isinstance(x, Tensor):
            raise argument_error(where, "x", f"a {type(x).__name__}", "a tensor of shape (..., D)")
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise argument_error(where, "x", tuple(x.shape), f"(..., D) = (..., {self.hidden_size})")
        check_same(where, ("w1", self.w1), (("x", x),), dtype=autocast_dtype(x.device) is None)
        router_x, expert_x = (x, x) if layout is None else layout.enter(x)
        if getattr(self.router, "wants_sequence_length", False) and router_inputs.get("sequence_length") is None:
            if x.ndim < 3:
                wanted = "(batch, sequence, D), or sequence_length=...: the router has to know where sequences begin"
                raise argument_error(where, "x", tuple(x.shape), wanted)
            router_inputs["sequence_length"] = router_x.shape[-2]
        x_TD = router_x.reshape(-1, self.hidden_size)
        routing: Routing = self.router(x_TD, **router_inputs)
        _check_routing(where, self.router, routing, x_TD.shape[0], self.num_experts)
        scores = routing.scores
        if attach_aux_loss and self.training and torch.is_grad_enabled():
            check_shape(where, "routing.aux_loss", routing.aux_loss)
            if routing.aux_loss.requires_grad:
                scores = attach_loss(scores, routing.aux_loss * self.aux_loss_scale)
        expert_x_TD = x_TD if expert_x is router_x else expert_x.reshape(-1, self.hidden_size)
        return MoEHandle(self, expert_x_TD, expert_x.shape, routing, scores, add_shared)

    def extra_repr(self) -> str:
        """Sizes and the options that matter to a reader of a printed model."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation!r}, "
            f"bias={self.b1 is not None}, glu_layout={self.glu_layout!r}, save={self.save!r}"
            + (f", backend={self.backend!r}" if self.backend else "")
        )


class MoEHandle:
    """A forward pass of :class:`MoE` under way, from :meth:`MoE.begin`.

    Attributes:
        routing: the router's decision.
    """

    def __init__(
        self, moe: MoE, x_TD: Tensor, shape: torch.Size, routing: Routing, scores: Tensor, add_shared: bool
    ) -> None:
        """For :meth:`MoE.begin`: ``x_TD`` (T, D) are the tokens that the experts get, of a tensor of that shape."""
        self.routing = routing
        self._moe, self._layout, self._shape = moe, moe.parallel, shape
        self._shared_x_TD = x_TD
        self._add_shared = add_shared
        self._shared_TD: Tensor | None = None
        if self._layout is not None:
            scores = self._layout.enter_scores(scores)
        if routing.scores_on == "input":
            x_TD, scores = x_TD * scores.to(x_TD.dtype), torch.ones_like(scores)
        self._x_TD, self._scores = x_TD, scores
        self._exchange = (
            None if self._layout is None else self._layout.dispatch(x_TD, scores, routing.plan, moe.backend)
        )
        self._out_TD: Tensor | None = None
        self._leaving: InFlight | None = None
        self._has_experts = False

    def shared(self) -> Tensor | None:
        """What the shared expert makes of the tokens, of the shape of x; None without one. Computed once.

        Under tensor parallelism a partial sum if :meth:`finish` is to add it, else reduced as the layer's output is.
        """
        if self._moe.shared is None:
            return None
        if self._shared_TD is None:
            shared = self._moe.shared(self._shared_x_TD)
            if self._layout is not None and not self._add_shared:
                shared = self._layout.leave(self._shaped(shared)).wait()
            self._shared_TD = shared
        return self._shared_TD if self._shared_TD.ndim == len(self._shape) else self._shaped(self._shared_TD)

    def experts(self) -> MoEHandle:
        """Wait for the tokens, apply the routed experts, and send on what they give: to the ranks of the tokens, or
        into the reduction of partial sums.

        Returns:
            this handle.

        Raises:
            RuntimeError: they were applied before.
        """
        if self._has_experts:
            raise RuntimeError("sonic.MoE: experts() was called twice on one handle, expected once per begin()")
        self._has_experts = True
        layout = self._layout
        if self._exchange is not None:
            x_SD, scores_R, plan = self._exchange.receive()
            self._exchange.send_back(self._apply(x_SD, scores_R, plan))
            return self
        self._out_TD = self._apply(self._x_TD, self._scores, self.routing.plan)
        if layout is not None and layout.tp.size > 1:
            self._leaving = layout.leave(self._joined(self._out_TD))
        return self

    def finish(self) -> Tensor:
        """Wait for what is under way, and sum: the layer's output, of the shape and dtype of x.

        Raises:
            RuntimeError: before :meth:`experts`.
        """
        if not self._has_experts:
            raise RuntimeError("sonic.MoE: finish() was called before experts(), expected begin(x).experts().finish()")
        if self._leaving is not None:
            return self._leaving.wait()
        out_TD = self._out_TD if self._exchange is None else self._exchange.collect()
        assert out_TD is not None, "experts() ran"
        out = self._joined(out_TD)
        if self._layout is None:
            return out
        self._leaving, self._exchange = self._layout.leave(out), None
        return self._leaving.wait()

    def _apply(self, x_TD: Tensor, scores: Tensor, plan: RoutingPlan | None) -> Tensor:
        moe = self._moe
        weights = {name: getattr(moe, name) for name in ("w1", "w2", "b1", "b2")}
        if self._layout is not None:
            weights = self._layout.local_weights(**weights)
        if plan is None:  # a rank without an expert: nothing came, but its gradients are waited for
            return x_TD + scores.sum() + sum(0 * weight.sum() for weight in weights.values() if weight is not None)
        return moe_mlp(
            x_TD,
            weights["w1"],
            weights["w2"],
            scores,
            plan,
            b1=weights["b1"],
            b2=weights["b2"],
            activation=moe.activation,
            glu_layout=moe.glu_layout,
            save=moe.save,
            backend=moe.backend,
        )

    def _joined(self, out_TD: Tensor) -> Tensor:
        """With the shared expert's output, if it is wanted, in the shape of x."""
        if self._add_shared and self._moe.shared is not None:
            if self._shared_TD is None:
                self._shared_TD = self._moe.shared(self._shared_x_TD)
            out_TD = out_TD + self._shared_TD
        return self._shaped(out_TD)

    def _shaped(self, out_TD: Tensor) -> Tensor:
        """Not a view, as reshape would make: a hook on a view is lost when that is changed in place."""
        return out_TD if len(self._shape) == 2 else torch.ops.aten._unsafe_view(out_TD, self._shape)


class SharedExpert(nn.Module):
    """The MLP that every token passes: one expert with all rows, as lean in memory as the routed ones.

    Parameters: ``w1`` (U, D), ``w2`` (D, N), with ``bias=True`` also ``b1`` (U,) and ``b2`` (D,).
    """

    w1: nn.Parameter
    w2: nn.Parameter
    b1: nn.Parameter | None
    b2: nn.Parameter | None
    tp: Ranks | None = None  # set by sonic.parallel.parallelize_moe: the output is then a partial sum

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        glu_layout: str = "concatenated",
        save: str = "preactivation",
        backend: str | None = None,
        init: Init = "linear",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Arguments as those of :class:`MoE`, with ``intermediate_size`` the width of this expert.

        Raises:
            ValueError: sizes, names or a dtype that make no sense.
        """
        super().__init__()
        where = "sonic.layers.SharedExpert"
        check_positive(where, hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_options(where, activation, glu_layout, save, backend, dtype)
        _check_init(where, init, init_std)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.glu_layout, self.save, self.backend = activation, glu_layout, save, backend
        self.init, self.init_std = init, init_std
        width_u = up_rows(intermediate_size, activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(width_u, hidden_size, **factory))
        self.w2 = nn.Parameter(torch.empty(hidden_size, intermediate_size, **factory))
        self.register_parameter("b1", nn.Parameter(torch.empty(width_u, **factory)) if bias else None)
        self.register_parameter("b2", nn.Parameter(torch.empty(hidden_size, **factory)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        _reset_experts(self.w1, self.w2, self.b1, self.b2, self.init, self.init_std, is_stack=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply the expert to all tokens: (T, D) -> (T, D).

        Raises:
            ValueError: shape, dtype or device do not fit the parameters.
        """
        parts = {name: getattr(self, name) for name in ("w1", "w2", "b1", "b2")}
        if self.tp is not None:
            parts = {name: None if part is None else local_part(part) for name, part in parts.items()}
            parts["b2"] = once(parts["b2"], self.tp)
        parts = {name: None if part is None else part[None] for name, part in parts.items()}
        return expert_mlp(
            x_TD,
            parts["w1"],
            parts["w2"],
            torch.full((1,), x_TD.shape[0], dtype=torch.int64, device=x_TD.device),
            b1=parts["b1"],
            b2=parts["b2"],
            activation=self.activation,
            glu_layout=self.glu_layout,
            save=self.save,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Sizes and activation."""
        sizes = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"
        return f"{sizes}, activation={self.activation!r}"


def set_aux_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Scale the auxiliary losses that the :class:`MoE` layers of ``model`` attach from now on.

    Set it to what your training loss is multiplied by before backward: 1/n when n micro-batches are accumulated as
    ``(loss / n).backward()``, the loss scale of a ``GradScaler`` in fp16.

    Args:
        model: any module; all MoE layers in it are set.
        scale: a number or a 0-dim tensor.

    Raises:
        ValueError: ``model`` holds no MoE layer, or ``scale`` is negative or not finite.
    """
    where = "sonic.layers.set_aux_loss_scale"
    if isinstance(scale, Tensor):
        check_shape(where, "scale", scale)
    elif not (math.isfinite(scale) and scale >= 0):
        raise argument_error(where, "scale", scale, "a finite number >= 0")
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        was = f"a {type(model).__name__} without a sonic.MoE in it"
        raise argument_error(where, "model", was, "a model with at least one sonic.MoE")
    for layer in layers:
        layer.aux_loss_scale = scale


def _check_init(where: str, init: Init, init_std: float) -> None:
    if not callable(init):
        check_choice(where, "init", init, _INITS)
    if not (math.isfinite(init_std) and init_std >= 0):
        raise argument_error(where, "init_std", init_std, "a finite number >= 0")


def _check_router(where: str, router: object, **sizes: int) -> None:
    if not isinstance(router, nn.Module):
        wanted = "a torch.nn.Module: (T, D) -> sonic.routing.Routing"
        raise argument_error(where, "router", f"a {type(router).__name__}", wanted)
    for name, wanted_size in sizes.items():
        have = getattr(router, name, wanted_size)
        if have != wanted_size:
            raise argument_error(where, f"router.{name}", have, str(wanted_size))


def _check_routing(where: str, router: nn.Module, routing: object, num_tokens: int, num_experts: int) -> None:
    """Refuse what a router of one's own returned, where the experts could not make sense of it."""
    if not isinstance(routing, Routing):
        was = f"a {type(router).__name__} that returned a {type(routing).__name__}"
        raise argument_error(where, "router", was, "one that returns a sonic.routing.Routing")
    plan = routing.plan
    if not isinstance(plan, RoutingPlan):
        raise argument_error(where, "routing.plan", f"a {type(plan).__name__}", "a sonic.RoutingPlan")
    if plan.num_tokens != num_tokens:
        wanted = f"T = {num_tokens}, the tokens that the router was given"
        raise argument_error(where, "routing.plan.num_tokens", plan.num_tokens, wanted)
    if plan.num_experts != num_experts:
        raise argument_error(where, "routing.plan.num_experts", plan.num_experts, f"num_experts = {num_experts}")
    check_scores(where, "routing.scores", routing.scores, plan)
    check_choice(where, "routing.scores_on", routing.scores_on, _SCORES_ON)
    if routing.scores_on == "input" and plan.top_k != 1:
        raise argument_error(where, "routing.scores_on", "'input'", "'output', unless every token has one expert")


@torch.no_grad()
def _reset_experts(
    w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, init: Init, init_std: float, is_stack: bool = True
) -> None:
    """Draw the parameters of experts (E, U, D) and so on, or of a single one (U, D)."""
    for weight, bias in ((w1, b1), (w2, b2)):
        bound = 1 / math.sqrt(weight.shape[-1])
        uniform = partial(nn.init.uniform_, a=-bound, b=bound)
        if callable(init):
            fill_(weight, init, is_stack=is_stack)
        elif init == "normal":
            _fill(weight, partial(nn.init.normal_, std=init_std), is_stack)
        else:
            _fill(weight, uniform, is_stack)
        if bias is not None and init == "linear":
            _fill(bias, uniform, is_stack)
        elif bias is not None:
            bias.zero_()


def _fill(parameter: Tensor, fill: Callable[[Tensor], object], is_stack: bool) -> None:
    """All at once where all is here."""
    if hasattr(parameter, "placements"):
        fill_(parameter, fill, is_stack=is_stack)
    else:
        fill(parameter)
