"""Hugging Face transformers: models keep their classes, configs and checkpoints, and get the experts of this library.

Two ways in, after ``import sonic``:

:func:`enable` registers the experts under a name, and transformers then takes them wherever it takes a name::

    sonic.huggingface.enable()
    model.set_experts_implementation("sonic")      # or from_pretrained(..., experts_implementation="sonic")

:func:`replace_moe` also routes with :mod:`sonic.routing`, on the parameters that the model has, which is what token
rounding needs. No parameter is copied, renamed or reshaped by either; :func:`align_weights` changes the strides of
those that are stored the other way round (gpt-oss), so that no call copies them.

What transformers offers is read from an experts module: ``gate_up_proj`` (E, 2N, D) or ``up_proj`` (E, N, D),
``down_proj`` (E, D, N), their ``_bias``, and the flags ``has_gate``, ``has_bias``, ``is_transposed``,
``is_concatenated``, ``has_post_expert_norm``. Experts that compute something else than an activation of
``sonic.ACTIVATIONS`` are refused by name; nothing falls back.

transformers is imported when a function here is called, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sonic.functional import check_options, moe_mlp
from sonic.layers.gate_router import GateRouter, gate_options
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing
from sonic.shapes import argument_error

__all__ = ["ExpertsReport", "align_weights", "enable", "explain", "replace_moe"]

_MODULE = "sonic.huggingface"
_BUILT_IN = ("eager", "grouped_mm", "batched_mm", "sonicmoe", "deepgemm", "deepgemm_megamoe")

# What a class of transformers calls its activation -> (with a gate, without); gelu is the exact one here.
_ACTIVATIONS: dict[str, tuple[str | None, str | None]] = {
    "SiLUActivation": ("swiglu", "silu"),
    "SiLU": ("swiglu", "silu"),
    "silu": ("swiglu", "silu"),  # torch.nn.functional.silu itself
    "GELUActivation": ("geglu", "gelu"),
    "ReLU": ("reglu", "relu"),
    "ReLUSquaredActivation": (None, "relu2"),
}

# Gates of their own that are known: the act_fn of the module between float32 casts, or the clamped gate of gpt-oss.
_GATES_OF_ACT_FN = ("BeamExperts",)
_CLAMPED_GATES = ("GptOssExperts", "OpenAIPrivacyFilterExperts", "MiniMaxM3VLExperts")
_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0  # what "swiglu_oai" computes with

_PEFT_INSIDE = "base_layer"  # where PEFT puts the module that it wraps


def enable(name: str = "sonic", *, save: str = "preactivation", backend: str | None = None) -> None:
    """Offer the experts of this library to transformers under a name. Call it before the name is used; again is fine.

    Args:
        name: what ``model.set_experts_implementation(...)`` and ``from_pretrained(..., experts_implementation=...)``
            are then given. With several names, several choices of the options below are there at once.
        save: what backward keeps: ``"preactivation"`` or ``"input"``, see :mod:`sonic.functional`.
        backend: insist on a kernel backend.

    Raises:
        ImportError: transformers is missing, or too old to let experts be chosen.
        ValueError: options that are no such names, or a name that transformers itself uses.
    """
    where = f"{_MODULE}.enable"
    check_options(where, "swiglu", "concatenated", save, backend)
    if not isinstance(name, str) or not name or name in _BUILT_IN:
        raise argument_error(where, "name", repr(name), "a name that transformers does not use itself")
    _experts_interface().register(name, partial(_experts_forward, save=save, backend=backend))


def explain(model: nn.Module) -> dict[str, ExpertsReport]:
    """What each experts module of ``model`` would be served with, or why it is refused, by its name in the model.

    Args:
        model: any module, such as a model of transformers.
    """
    return {name: _report(experts) for name, experts in _experts_of(model)}


@torch.no_grad()
def align_weights(model: nn.Module) -> int:
    """Store transposed expert weights in the order that kernels read, and return how many parameters that were.

    gpt-oss, Aria and others hold ``gate_up_proj`` as (E, D, 2N). Kernels read (E, 2N, D), so that each call, forward
    and backward, would make such a copy and free it after use. Here the storage is rearranged once: shape, values, name
    and the ``Parameter`` object stay, the strides change. Checkpoints load and save as before. Call it after loading
    and before the optimizer is made; not for models that ``fully_shard`` will split, which wants contiguous parameters.

    Args:
        model: any module. Takes the memory of one parameter more while it works.

    Raises:
        ValueError: a weight is sharded (a DTensor), or on the meta device.
    """
    where, aligned = f"{_MODULE}.align_weights", 0
    for name, experts in _experts_of(model):
        if not experts.is_transposed:
            continue
        for weight_name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
            weight = getattr(experts, weight_name)
            if hasattr(weight, "placements") or weight.is_meta:
                was = "sharded" if hasattr(weight, "placements") else "on the meta device"
                raise argument_error(where, f"{name}.{weight_name}", was, "a parameter that lies whole on a device")
            if not weight.transpose(1, 2).is_contiguous():
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
                aligned += 1
    return aligned


def replace_moe(
    model: nn.Module,
    router: Callable[[nn.Module], nn.Module] | None = None,
    *,
    name: str = "sonic",
    save: str = "preactivation",
    backend: str | None = None,
) -> int:
    """Route and compute every MoE block of a transformers model with this library, and return how many there are.

    The blocks stay, with shared experts and all they do around routing and experts; so do parameters, state-dict keys
    and what the model records (``output_router_logits``). Of each block, the router decides as the model's own does,
    with scores in float32 and no (T, E) table kept, and what ``router`` makes of that decision goes to the experts::

        sonic.huggingface.replace_moe(model, router=sonic.routing.TokenRounding)
        sonic.huggingface.replace_moe(model, router=lambda gate: TokenRounding(gate, rule="balanced", tile_rows=128))

    Token rounding acts in training; ``model.eval()`` gives plain top-K. Auxiliary losses stay the model's own.

    Args:
        model: a model of transformers whose experts can be chosen; all of its MoE blocks are replaced or none.
        router: given a :class:`sonic.layers.gate_router.GateRouter` (an ``nn.Module`` (T, D) -> Routing) per block, it
            returns the router to use: one without parameters or persistent buffers. None: the model's own decision.
        name, save, backend: as for :func:`enable`, which this calls.

    Raises:
        ImportError: as :func:`enable`.
        ValueError: the model has no such block, was replaced before, or has a router, activation or expert parallelism
            that is not served; the message names the module.
    """
    where = f"{_MODULE}.replace_moe"
    enable(name, save=save, backend=backend)
    blocks = list(_blocks_of(where, model, backend))
    if not blocks:
        wanted = "a transformers model with experts that can be chosen (by set_experts_implementation)"
        raise argument_error(where, "model", f"a {type(model).__name__} without such experts", wanted)
    routers = []
    for block_name, gate, _, options in blocks:
        made = GateRouter(gate, **options)
        chosen = made if router is None else router(made)
        _check_router(where, f"router of {block_name}", chosen)
        routers.append(chosen.train(gate.training))
    choose = getattr(model, "set_experts_implementation", None)
    if not callable(choose):
        wanted = "a transformers.PreTrainedModel; pass the one inside it"
        raise argument_error(where, "model", f"a {type(model).__name__}", wanted)
    choose(name)
    for (_, gate, experts, _), chosen in zip(blocks, routers, strict=True):
        handover = _Handover(experts.config, name)
        gate.sonic_router = chosen
        gate.sonic_handover = experts.sonic_handover = handover
        # isinstance is how transformers finds the routers whose logits it records
        gate.__class__ = type(type(gate).__name__, (_RoutedGate, type(gate)), {"__module__": type(gate).__module__})
    return len(blocks)


@dataclass(frozen=True)
class ExpertsReport:
    """What :func:`explain` says of one experts module.

    Attributes:
        kind: the class of the module.
        activation: a name in ``sonic.ACTIVATIONS``; None where refused.
        glu_layout: ``"concatenated"`` or ``"interleaved"``.
        copies: whether each call copies the weights, which :func:`align_weights` would spare.
        refused: why it is not served; None where it is.
    """

    kind: str
    activation: str | None
    glu_layout: str
    copies: bool
    refused: str | None


# ---------------------------------------------------------------- experts


def _experts_forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    save: str,
    backend: str | None,
) -> Tensor:
    """The function that transformers calls in place of an experts module's own: (T, D), (T, K), (T, K) -> (T, D)."""
    handover: _Handover | None = getattr(self, "sonic_handover", None)
    if handover is not None:
        routing = handover.take(top_k_weights)
        plan, scores = routing.plan, routing.scores
    elif getattr(self, "_is_expert_parallel", False):
        # the id num_experts stands for experts of other ranks
        token_P, slot_P = (top_k_index < self.num_experts).nonzero(as_tuple=True)
        expert_P, scores = top_k_index[token_P, slot_P], top_k_weights[token_P, slot_P]
        plan = RoutingPlan.from_pairs(token_P, expert_P, hidden_states.shape[0], self.num_experts, backend=backend)
    else:
        plan = RoutingPlan.from_topk(top_k_index, self.num_experts, backend=backend)
        scores = top_k_weights
    weights = {"w1": self.gate_up_proj if self.has_gate else self.up_proj, "w2": self.down_proj}
    if self.is_transposed:
        weights = {key: weight.transpose(1, 2) for key, weight in weights.items()}
    if self.has_bias:
        weights["b1"] = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        weights["b2"] = self.down_proj_bias
    out = moe_mlp(
        hidden_states,
        weights.pop("w1"),
        weights.pop("w2"),
        scores,
        plan,
        **weights,
        activation=_activation(self),
        glu_layout=_glu_layout(self),
        save=save,
        backend=backend,
    )
    return out.to(hidden_states.dtype)  # not so under autocast


def _activation(experts: Any) -> str:
    """The name in ``sonic.ACTIVATIONS`` of what an experts module computes between its projections.

    Raises:
        ValueError: there is none.
    """
    kind = type(experts).__name__
    where, wanted = f"{_MODULE}: {kind}", "one that sonic.ACTIVATIONS has; take experts_implementation='grouped_mm'"
    if getattr(experts, "has_post_expert_norm", False):
        no_norm = "False: there is no norm between experts and sum; take experts_implementation='grouped_mm'"
        raise argument_error(where, "has_post_expert_norm", True, no_norm)
    owner = next(base for base in type(experts).__mro__ if "_apply_gate" in base.__dict__)  # fully_shard adds a class
    own_gate = owner.__name__ if owner.__module__.startswith("transformers.models.") else None
    if experts.has_gate and own_gate in _CLAMPED_GATES:
        alpha = getattr(experts, "alpha", None) or getattr(experts, "swiglu_alpha", None)
        limit = getattr(experts, "swiglu_limit", None) or getattr(experts, "limit", None)
        if (alpha, limit) != (_OAI_ALPHA, _OAI_LIMIT):
            was = f"clamped at {limit} with alpha {alpha}"
            those = f"{_OAI_LIMIT} and {_OAI_ALPHA}: those of swiglu_oai; take experts_implementation='grouped_mm'"
            raise argument_error(where, "gate", was, those)
        return "swiglu_oai"
    is_default = type(experts)._apply_gate.__name__ == "_default_apply_gate"
    if experts.has_gate and not is_default and own_gate not in _GATES_OF_ACT_FN:
        raise argument_error(where, "gate", "an _apply_gate of its own", wanted)
    function = experts.act_fn
    name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "unnamed")
    found = _ACTIVATIONS.get(name, (None, None))[0 if experts.has_gate else 1]
    if found is None:
        raise argument_error(where, "act_fn", f"{name} ({'gated' if experts.has_gate else 'not gated'})", wanted)
    return found


def _glu_layout(experts: Any) -> str:
    return "concatenated" if experts.is_concatenated or not experts.has_gate else "interleaved"


def _experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules with the contract of transformers' ``use_experts_implementation``."""
    flags = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "num_experts", "_apply_gate")
    for name, module in model.named_modules():
        if all(hasattr(module, flag) for flag in flags) and hasattr(module, "down_proj"):
            yield name, module


def _report(experts: Any) -> ExpertsReport:
    kind, layout = type(experts).__name__, _glu_layout(experts)
    try:
        activation = _activation(experts)
    except ValueError as error:
        return ExpertsReport(kind, None, layout, False, str(error))
    w2 = experts.down_proj
    copies = not (w2.transpose(1, 2) if experts.is_transposed else w2).is_contiguous()
    return ExpertsReport(kind, activation, layout, copies, None)


def _experts_interface() -> Any:
    """The registry of transformers.

    Raises:
        ImportError: transformers is missing, or has none.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError(f"{_MODULE}: needs transformers >= 5.0 (pip install 'sonic-moe[huggingface]')") from error
    except ImportError as error:
        raise ImportError(f"{_MODULE}: this transformers does not let experts be chosen; 5.0 or later does") from error
    return ExpertsInterface


# ---------------------------------------------------------------- whole blocks


class _Handover:
    """What a block's router decided, on its way to the experts of the same block, past the code in between."""

    def __init__(self, config: Any, name: str) -> None:
        self._config, self._name = config, name
        self._routing: Routing | None = None
        self._scores: Tensor | None = None

    def put(self, routing: Routing) -> Tensor:
        """Keep a decision for the experts, and return the scores that the block is to give them: (T, K)."""
        if self._config._experts_implementation != self._name:
            was = self._config._experts_implementation
            raise RuntimeError(
                f"{_MODULE}: experts_implementation is {was!r}, expected {self._name!r} as replace_moe set it: "
                "other experts do not know the routers that it put in"
            )
        is_topk = routing.scores.ndim == 2
        self._routing = routing
        self._scores = routing.scores if is_topk else torch.zeros_like(routing.expert_index, dtype=routing.scores.dtype)
        return self._scores

    def take(self, scores: Tensor) -> Routing:
        """The decision that was put; ``scores`` prove that the block passed them on as they were."""
        routing, expected = self._routing, self._scores
        self._routing = self._scores = None
        if routing is None or scores is not expected:
            raise RuntimeError(
                f"{_MODULE}: these experts were not given what their router returned, expected so after replace_moe "
                "(under tensor or expert parallelism of transformers use set_experts_implementation alone)"
            )
        return routing


class _RoutedGate:
    """Mixed into the class of a block's router: it decides by :mod:`sonic.routing`, and returns what it always did."""

    sonic_router: nn.Module
    sonic_handover: _Handover

    def forward(self, hidden_states: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(…, D) -> logits (T, E), scores (T, K), experts (T, K)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        inputs = {} if expert_bias is None else {"expert_bias": expert_bias}
        routing: Routing = self.sonic_router(x_TD, **inputs)
        return routing.logits, self.sonic_handover.put(routing), routing.expert_index.long()


def _blocks_of(where: str, model: nn.Module, backend: str | None) -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """Name, router and experts of each block, and the options of its :class:`GateRouter`."""
    for experts_name, experts in _experts_of(model):
        block_name = experts_name.rpartition(".")[0]
        while block_name.endswith("experts") or block_name.endswith(_PEFT_INSIDE):  # PEFT wraps modules, maybe twice
            block_name = block_name.rpartition(".")[0]
        block = model.get_submodule(block_name)
        if hasattr(experts, "sonic_handover"):
            raise argument_error(
                where, block_name, "a block that an earlier call replaced", "one as transformers builds it"
            )
        _activation(experts)
        if getattr(experts, "_is_expert_parallel", False):
            raise argument_error(where, experts_name, "expert-parallel", "all experts here, or enable() alone")
        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if gate is None:
            raise argument_error(
                where, block_name, f"a {type(block).__name__} without router", "a gate or router in it"
            )
        while hasattr(gate, _PEFT_INSIDE):
            gate = getattr(gate, _PEFT_INSIDE)
        options = gate_options(where, f"{block_name}: {type(gate).__name__}", gate)
        yield block_name, gate, experts, {**options, "num_experts": experts.num_experts, "backend": backend}


def _check_router(where: str, argument: str, router: object) -> None:
    if not isinstance(router, nn.Module):
        wanted = "a torch.nn.Module: (T, D) -> sonic.routing.Routing"
        raise argument_error(where, argument, f"a {type(router).__name__}", wanted)
    keys = list(router.state_dict())
    if keys:
        raise argument_error(
            where, argument, f"with {', '.join(keys)}", "nothing that the checkpoint would have to hold"
        )
    if getattr(router, "scores_on", "output") != "output":
        raise argument_error(where, argument, "one with scores_on='input'", "one with scores_on='output'")
