"""Megatron-core: models keep their specs, configs and checkpoints, and get the experts of this library.

Three ways in, after ``import sonic``; one line each::

    sonic.megatron.enable()                # before specs are built: each that Megatron builds has these experts
    sonic.megatron.swap(spec)              # a spec that was built already
    sonic.megatron.replace_experts(model)  # a model that was built already, before data parallelism and optimizer

Parallelism of every kind stays Megatron's: tensor, sequence, expert, pipeline and data parallel ranks, its dispatchers,
its distributed optimizer. What a config asks for and these experts do not do is refused by name; nothing falls back.

Megatron-core is imported when a function here is called, never before.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sonic.layers.megatron.options import ExpertsOptions, check_config
from sonic.shapes import argument_error

__all__ = ["ExpertsOptions", "ExpertsReport", "disable", "enable", "explain", "replace_experts", "swap", "use_ladder"]

_MODULE = "sonic.megatron"
_PROVIDERS = (
    ("megatron.core.models.backends", "LocalSpecProvider"),
    ("megatron.core.extensions.transformer_engine_spec_provider", "TESpecProvider"),
)
_SPECS = "megatron.core.models.gpt.moe_module_specs"  # where specs of MoE layers are made
_METHOD = "grouped_mlp_modules"
_ORIGINAL = "sonic_original"  # attribute of what was put in, with what was there before

Wrap = Callable[[nn.Module], nn.Module]


def enable(
    *,
    save: str = "preactivation",
    backend: str | None = None,
    fused_layer: bool = False,
    router: Wrap | None = None,
) -> None:
    """From now on, specs that Megatron-core builds have the experts of this library; again with other options is fine.

    It replaces the method ``grouped_mlp_modules`` of Megatron's spec providers (of local modules and of
    TransformerEngine's), and with ``fused_layer`` or ``router`` also the name ``MoELayer`` where specs of MoE layers
    are made. :func:`disable` puts both back. Specs and models that exist already do not change.

    Args:
        save: what backward keeps: ``"preactivation"`` or ``"input"``, see :mod:`sonic.functional`.
        backend: insist on a kernel backend.
        fused_layer: where all experts of a layer lie on this rank, compute them on the tokens where they stand, without
            Megatron's permuted copy. Elsewhere the layer is Megatron's; :func:`explain` tells which, and why.
        router: given Megatron's own decision as a module (T, D) -> :class:`sonic.routing.Routing`, per layer, it
            returns the module to use, one without parameters or buffers; such as ``sonic.routing.TokenRounding``, or a
            ``functools.partial`` of it. None: the decision itself.

    Raises:
        ImportError: Megatron-core is missing, or too old to let experts be chosen.
        ValueError: options that are no such names.
    """
    options = ExpertsOptions(save, backend, fused_layer, router).check(f"{_MODULE}.enable")
    disable()
    for provider in _providers():
        original = getattr(provider, _METHOD)
        setattr(provider, _METHOD, _patched(original, options))
    if options.needs_layer:
        from sonic.layers.megatron.layer import SonicMoELayer

        importlib.import_module(_SPECS).MoELayer = SonicMoELayer  # type: ignore[attr-defined]


def disable() -> None:
    """Put back what :func:`enable` replaced; specs that were built meanwhile stay as they are.

    Raises:
        ImportError: as :func:`enable`.
    """
    for provider in _providers():
        original = getattr(getattr(provider, _METHOD), _ORIGINAL, None)
        if original is not None:
            setattr(provider, _METHOD, original)
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from sonic.layers.megatron.layer import SonicMoELayer

    specs: Any = importlib.import_module(_SPECS)
    if specs.MoELayer is SonicMoELayer:
        specs.MoELayer = MoELayer


def swap(
    spec: Any,
    *,
    save: str = "preactivation",
    backend: str | None = None,
    fused_layer: bool = False,
    router: Wrap | None = None,
) -> int:
    """Put the experts of this library into a spec that was built, in place; return how many MoE layers it describes.

    Args:
        spec: a ModuleSpec of a layer or of a whole block, or the submodules of one.
        save, backend, fused_layer, router: as for :func:`enable`.

    Raises:
        ImportError: as :func:`enable`.
        ValueError: the spec has no MoE layer, or options are no such names.
    """
    from sonic.layers.megatron.experts import SonicExperts
    from sonic.layers.megatron.layer import SonicMoELayer

    _providers()
    where = f"{_MODULE}.swap"
    options = ExpertsOptions(save, backend, fused_layer, router).check(where)
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    num_swapped = 0
    for owner, put in list(_specs_in(spec, set())):
        submodules = _submodules_of(owner)
        if not isinstance(submodules, MoESubmodules):
            continue
        submodules.experts = ModuleSpec(module=SonicExperts, submodules=copy.copy(options))
        if options.needs_layer and isinstance(owner, functools.partial):  # as later versions of Megatron-core have it
            if put is None:
                wanted = "the spec of the layer around it, in which it can be replaced"
                raise argument_error(where, "spec", "a partial of the MoE layer alone", wanted)
            put(functools.partial(SonicMoELayer, *owner.args, **owner.keywords))
        elif options.needs_layer:
            owner.module = SonicMoELayer
        num_swapped += 1
    if not num_swapped:
        raise argument_error(
            where, "spec", f"a {type(spec).__name__} without an MoE layer", "at least one MoE layer in it"
        )
    return num_swapped


def use_ladder(spec: Any) -> int:
    """Wire the layers of a spec as Ladder Residual, in place; return how many entries of the spec that were.

    Another model than before: what a sub-layer gives joins the stream one sub-layer later, so that its sum over the
    tensor-parallel ranks can run under the next one. Parameters stay what and where they are. See
    :mod:`sonic.layers.megatron.ladder` for what is hidden with which linear layers.

    Args:
        spec: a ModuleSpec of a layer or of a whole block, or the submodules of one, of Megatron's ``TransformerLayer``.

    Raises:
        ImportError: as :func:`enable`.
        ValueError: the spec has no such layer.
    """
    _providers()
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from sonic.layers.megatron.ladder import LadderTransformerLayer

    layers = [owner for owner, _ in _specs_in(spec, set()) if getattr(owner, "module", None) is TransformerLayer]
    for owner in layers:
        owner.module = LadderTransformerLayer
    if not layers:
        was = f"a {type(spec).__name__} without a TransformerLayer"
        raise argument_error(f"{_MODULE}.use_ladder", "spec", was, "at least one TransformerLayer in it")
    return len(layers)


@torch.no_grad()
def replace_experts(
    model: nn.Module,
    *,
    save: str = "preactivation",
    backend: str | None = None,
    fused_layer: bool = False,
    router: Wrap | None = None,
) -> int:
    """Replace the experts of every MoE layer of a model that was built, and return how many layers that were.

    Weights are moved: the model computes what it did. Call it after loading and before data parallelism and the
    optimizer are set up, which hold on to parameters.

    Args:
        model: any module with Megatron's MoE layers in it, of ``SequentialMLP``, ``GroupedMLP`` or ``TEGroupedMLP``.
        save, backend, fused_layer, router: as for :func:`enable`.

    Raises:
        ImportError: as :func:`enable`.
        ValueError: no such layer; other experts; a config that is not served; parameters that data parallelism holds.
    """
    where = f"{_MODULE}.replace_experts"
    _providers()
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from sonic.layers.megatron.experts import SonicExperts
    from sonic.layers.megatron.layer import SonicMoELayer
    from sonic.layers.megatron.router import SonicRouter

    options = ExpertsOptions(save, backend, fused_layer, router).check(where)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
    if not found:
        was = f"a {type(model).__name__} without an MoE layer"
        raise argument_error(where, "model", was, "at least one MoE layer in it")
    for name, layer in found:  # all are looked at before one is changed
        check_config(f"{where}: {name}", layer.config)
        if any(hasattr(parameter, "main_grad") for parameter in layer.parameters()):
            raise argument_error(where, name, "held by data parallelism", "a model before it is wrapped")
        if type(layer.experts).__name__ not in _READ:
            was, wanted = f"a {type(layer.experts).__name__}", f"one of {', '.join(_READ)}"
            raise argument_error(where, f"{name}.experts", was, wanted)
    for _, layer in found:
        experts = layer.experts
        groups = SimpleNamespace(ep=experts.ep_group, expt_tp=experts.tp_group, expt_dp=experts.dp_group)
        layer.experts = SonicExperts(
            experts.num_local_experts, layer.config, copy.copy(options), groups, weights=_weights_of(experts)
        ).train(experts.training)
        if options.needs_layer:
            layer.__class__ = SonicMoELayer
        if options.router is not None:
            layer.router.__class__ = SonicRouter
            layer.router.wrap_decision(options.router)
            layer.count_rows()
    return len(found)


@dataclass(frozen=True)
class ExpertsReport:
    """What :func:`explain` says of one MoE layer.

    Attributes:
        kind: the class of its experts.
        activation: a name in ``sonic.ACTIVATIONS``; None where refused.
        route: how tokens reach the experts, and why.
        router: the class of its router, and what changes its decision.
        refused: why the experts of this library would not serve its config; None where they do or would.
    """

    kind: str
    activation: str | None
    route: str
    router: str
    refused: str | None


def explain(model: nn.Module) -> dict[str, ExpertsReport]:
    """What each MoE layer of ``model`` is served with, or would be, by its name in the model.

    Args:
        model: any module with Megatron's MoE layers in it.

    Raises:
        ImportError: as :func:`enable`.
    """
    _providers()
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from sonic.layers.megatron.layer import why_dispatched

    reports = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        activation, refused = None, None
        try:
            activation = check_config(f"{_MODULE}: {name}", layer.config)
        except ValueError as error:
            refused = str(error)
        why = why_dispatched(layer)
        route = "tokens stay where they are" if why is None else f"Megatron's dispatcher: {why}"
        decision = getattr(layer.router, "decision", None)
        router = type(layer.router).__name__ + ("" if decision is None else f" with {type(decision).__name__}")
        reports[name] = ExpertsReport(type(layer.experts).__name__, activation, route, router, refused)
    return reports


# ---------------------------------------------------------------- specs


def _providers() -> list[Any]:
    """Megatron's spec providers that can be imported here.

    Raises:
        ImportError: Megatron-core is missing, or has none.
    """
    found = []
    for module, name in _PROVIDERS:
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ModuleNotFoundError, AttributeError) as error:
            if name != "LocalSpecProvider":
                continue  # those of packages that Megatron itself does without
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "megatron":
                raise
            raise ImportError(f"{_MODULE}: needs megatron-core >= 0.16 (pip install megatron-core)") from error
    return found


def _patched(original: Callable[..., Any], options: ExpertsOptions) -> Callable[..., Any]:
    """In place of a provider's ``grouped_mlp_modules``: a class and its submodules, or later on a builder."""
    from sonic.layers.megatron.experts import SonicExperts

    returns_builder = len(inspect.signature(original).parameters) == 2  # self and moe_use_grouped_gemm alone: 0.20

    @functools.wraps(original)
    def grouped_mlp_modules(self: Any, *args: Any, **kwargs: Any) -> Any:
        if returns_builder:
            return functools.partial(SonicExperts, submodules=copy.copy(options))
        return SonicExperts, copy.copy(options)

    setattr(grouped_mlp_modules, _ORIGINAL, original)
    return grouped_mlp_modules


Put = Callable[[Any], None]


def _specs_in(spec: Any, seen: set[int], put: Put | None = None) -> Iterator[tuple[Any, Put | None]]:
    """Everything in a tree of specs that has submodules, each once (specs are shared between layers), and how to put
    something else in its place.
    """
    if id(spec) in seen or isinstance(spec, type):
        return
    seen.add(id(spec))
    if isinstance(spec, (list, tuple)):
        for entry in spec:
            yield from _specs_in(entry, seen)
    elif isinstance(spec, functools.partial):
        yield spec, put
        yield from _specs_in(spec.keywords.get("submodules"), seen)
    elif is_dataclass(spec):
        if _submodules_of(spec) is not None:
            yield spec, put
        for field in fields(spec):
            yield from _specs_in(getattr(spec, field.name), seen, functools.partial(setattr, spec, field.name))


def _submodules_of(spec: Any) -> Any:
    return spec.keywords.get("submodules") if isinstance(spec, functools.partial) else getattr(spec, "submodules", None)


# ---------------------------------------------------------------- weights


def _of_sequential(experts: Any) -> dict[str, list[Tensor]]:
    layers = [(expert.linear_fc1, expert.linear_fc2) for expert in experts.local_experts]
    found = {"weight1": [fc1.weight for fc1, _ in layers], "weight2": [fc2.weight for _, fc2 in layers]}
    if layers[0][0].bias is not None:
        found |= {"bias1": [fc1.bias for fc1, _ in layers], "bias2": [fc2.bias for _, fc2 in layers]}
    return found


def _of_grouped(experts: Any) -> dict[str, list[Tensor]]:
    local, width = experts.num_local_experts, experts.config.hidden_size
    w1, w2 = experts.weight1.view(local, width, -1), experts.weight2.view(local, -1, width)
    return {"weight1": list(w1.transpose(1, 2)), "weight2": list(w2.transpose(1, 2))}


def _of_te_grouped(experts: Any) -> dict[str, list[Tensor]]:
    kinds = ("weight", "bias") if experts.config.add_bias_linear else ("weight",)
    linears = (("1", experts.linear_fc1), ("2", experts.linear_fc2))
    return {
        f"{kind}{number}": [getattr(linear, f"{kind}{expert}") for expert in range(experts.num_local_experts)]
        for number, linear in linears
        for kind in kinds
    }


_READ: dict[str, Callable[[Any], dict[str, list[Tensor]]]] = {
    "SequentialMLP": _of_sequential,
    "GroupedMLP": _of_grouped,
    "TEGroupedMLP": _of_te_grouped,
}


def _weights_of(experts: Any) -> dict[str, nn.Parameter]:
    """The parameters of Megatron's experts under the names and in the shapes of ours."""
    found = _READ[type(experts).__name__](experts)
    is_trained = any(parameter.requires_grad for parameter in experts.parameters())
    return {name: nn.Parameter(torch.stack(parts), is_trained) for name, parts in found.items()}
