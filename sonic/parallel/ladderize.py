"""Ladder wiring for a decoder that exists: Hugging Face's Llama, Qwen, Mistral and whatever is built alike."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from sonic.parallel.compilers import outside_compilers
from sonic.parallel.ladder import LadderState, Parts, Schedule
from sonic.parallel.mesh import ranks_of
from sonic.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from sonic.parallel.wiring import Wiring
from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ladderize"]

Model = TypeVar("Model", bound=nn.Module)


def ladderize(
    model: Model,
    layers: int | str | Sequence[int] | None = "upper_half",
    attn: str = "self_attn",
    mlp: str = "mlp",
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    *,
    wiring: str = "ladder",
    tp_mesh: DeviceMesh | None = None,
    column: Sequence[str] = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    row: Sequence[str] = ("o_proj", "down_proj"),
    **schedule: Any,
) -> Model:
    """Wire the layers of a decoder anew, in place. Names and shapes of its parameters stay what they were.

    The class of each layer is exchanged for one whose ``forward`` hands the stream on with what is still in flight. A
    layer called alone, outside the forward of the model, is what it was. Gradient checkpointing as Hugging Face's
    models switch it on applies to attention and MLP, so that no collective runs twice.

    A layer has to be ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, and nothing else: four children.

    Args:
        model: holds one ``ModuleList`` of such layers. Its ``config``, if it has one, is told ``wiring`` and
            ``ladder_layers``.
        layers: as in :meth:`sonic.parallel.wiring.Wiring.build`; None: what ``model.config`` says.
        attn, mlp, norms: names of a layer's four children.
        wiring: of the chosen layers; the others stay ``"standard"``.
        tp_mesh: split attention and MLP of *all* layers over its ranks, which hold the same weights; one-dimensional.
            For attention that takes the number of its heads from the width of its projections.
        column, row: names of the linear layers inside the cores whose outputs, and whose inputs, are split.
        schedule: ``overlap``, ``backward_order``, … of :class:`sonic.parallel.ladder.Schedule`.

    Returns:
        ``model``.

    Raises:
        ValueError: no such list of layers or several, layers that hold something else beside the four, that are wired
            already, or that ``layers`` does not name rightly.
    """
    where = "sonic.parallel.ladderize"
    names = (norms[0], attn, norms[1], mlp)
    owner, modules = _find_layers(where, model, names)
    config = getattr(model, "config", None)
    was_told = getattr(config, "ladder_layers", None) is not None
    if layers is None:
        if not was_told:
            raise argument_error(where, "layers", None, "layers to choose: model.config has no ladder_layers")
        layers, wiring = config.ladder_layers, config.wiring  # type: ignore[union-attr]
    wired = Wiring.build(len(modules), wiring, layers)
    _check_number_of_layers(where, config, len(modules))
    for index, (layer, name) in enumerate(zip(modules, wired, strict=True)):
        if name in ("farskip", "shortcut") and not hasattr(getattr(layer, mlp), "begin"):
            wanted = f"'standard', 'parallel' or 'ladder': the MLP of layer {index} is no sonic.MoE"
            raise argument_error(where, "wiring", repr(name), wanted)
    if tp_mesh is not None:
        for layer in modules:
            _split_linears(where, layer, (attn, mlp), tp_mesh, column, row)
    if not was_told and set(wired) != {"standard"}:
        warnings.warn(
            f"sonic.parallel.ladderize: {len(wired) - wired.layers.count('standard')} of {len(wired)} layers are wired "
            f"as {wiring!r} now; weights that were trained without want some training with it (see docs/parallel.md)",
            stacklevel=2,
        )
    run = _Run(modules, wired, names, Schedule(ranks_of(where, "tp_mesh", tp_mesh).group, **schedule))
    for index, layer in enumerate(modules):
        original = type(layer)
        layer.__class__ = type(f"Ladder{original.__name__}", (_LadderLayer, original), {})
        layer.__dict__["_ladder"] = _Place(run, index, original)
    owner.register_forward_pre_hook(_Begin(run))
    owner.register_forward_hook(_End(run), always_call=True)
    if config is not None:
        told = wired.to_config()
        config.wiring, config.ladder_layers = told["wiring"], told["ladder_layers"]
    return model


class _Run:
    """What the layers of a model share."""

    def __init__(
        self, modules: Sequence[nn.Module], wiring: Wiring, names: tuple[str, str, str, str], schedule: Schedule
    ) -> None:
        self.modules, self.wiring, self.names, self.schedule = list(modules), wiring, names, schedule
        self.is_inside = False  # the forward of the model
        self.is_recording = False  # that forward, as it began

    def parts(self, index: int, wiring: str | None = None) -> Parts:
        layer = self.modules[index]
        attention_norm, attention, mlp_norm, mlp = (getattr(layer, name) for name in self.names)
        attention, mlp = _checkpointed(layer, attention), _checkpointed(layer, mlp)
        return Parts(attention_norm, attention, mlp_norm, mlp, self.wiring[index] if wiring is None else wiring)


class _Begin:
    def __init__(self, run: _Run) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.run.is_inside, self.run.is_recording = True, torch.is_grad_enabled()


class _End:
    def __init__(self, run: _Run) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.run.is_inside = False


class _Place:
    """Where a layer stands."""

    def __init__(self, run: _Run, index: int, original: type) -> None:
        self.run, self.index = run, index
        signature = inspect.signature(original.forward)  # type: ignore[attr-defined]
        self.argument_names = list(signature.parameters)[2:]
        self.returns_tuple = "tuple" in str(signature.return_annotation).lower()


class _LadderLayer(nn.Module):
    """In front of a layer's own class: its forward, wired."""

    def __init_subclass__(cls) -> None:
        """Nothing: that of a base class could put a checkpoint around ``forward`` here."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)  # around a base class that would checkpoint all of it

    @outside_compilers
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        place: _Place = self.__dict__["_ladder"]
        run, index = place.run, place.index
        _refuse_checkpointing(run, index, hidden_states)
        kwargs.update(zip(place.argument_names, args, strict=False))
        if self.training and getattr(self, "gradient_checkpointing", False):
            kwargs.update({name: None for name in ("past_key_values", "past_key_value") if name in kwargs})
            kwargs.update({"use_cache": False} if "use_cache" in kwargs else {})
        parts = run.parts(index, None if run.is_inside else "standard")
        inputs = _accepted(parts.attention, kwargs)
        state = (
            hidden_states if isinstance(hidden_states, LadderState) else getattr(hidden_states, "_ladder_state", None)
        )
        if state is None or not run.is_inside:
            state = run.schedule.begin(hidden_states)
        is_last = not run.is_inside or index + 1 == len(run.modules)
        following = None if is_last else run.parts(index + 1)
        rest = run.schedule.run_layer(parts, state, following, inputs, {})
        if is_last:
            out: Any = run.schedule.end(state)
        elif self._forward_hooks:
            # somebody looks on: show a complete stream, which costs the overlap, and hand the state on with it
            out = state.peek().view_as(state.x)  # a tensor object of its own
            out._ladder_state = state
        else:
            out = state
        if not place.returns_tuple:
            return out
        return (out, *(rest or ())) if kwargs.get("output_attentions") else (out,)


def _refuse_checkpointing(run: _Run, index: int, hidden_states: Any) -> None:
    """Refuse a checkpoint around a layer, which breaks the graph that layers share: its gradients would be wrong.

    Raises:
        ValueError: the layer runs in backward, without its model; or without gradients, and its model has them.
    """
    x = hidden_states.x if isinstance(hidden_states, LadderState) else hidden_states
    if not run.is_inside and torch._C._current_graph_task_id() != -1:
        was = "run again in backward, as by a checkpoint around it"
    elif run.is_inside and run.is_recording and x.requires_grad and not torch.is_grad_enabled():
        was = "run without gradients in a model with them, as by a reentrant checkpoint around it"
    else:
        return
    wanted = "its attention and MLP to be checkpointed instead, see docs/parallel.md"
    raise argument_error("sonic.parallel.ladderize", f"layer {index}", was, wanted)


def _checkpointed(layer: nn.Module, core: Any) -> Callable[..., Any]:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None or not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return core
    forward: Callable[..., Any] = core.forward
    return functools.wraps(forward)(lambda n, **inputs: checkpoint(functools.partial(core, **inputs), n))


def _accepted(core: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of a layer's arguments that its attention knows."""
    parameters = inspect.signature(getattr(core, "forward", core)).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _find_layers(where: str, model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, list[nn.Module]]:
    found = []
    for path, owner in model.named_modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and all(hasattr(child[0], part) for part in names):
                found.append((f"{path}.{name}".lstrip("."), owner, list(child)))
    if len(found) != 1:
        was = "without such a list" if not found else f"one with {len(found)}: {[path for path, _, _ in found]}"
        raise argument_error(where, "model", was, f"one with a ModuleList of layers that have {', '.join(names)}")
    path, owner, modules = found[0]
    for index, layer in enumerate(modules):
        if isinstance(layer, _LadderLayer):
            raise argument_error(where, f"{path}[{index}]", "wired already", "a layer as its class made it")
        children = {name for name, _ in layer.named_children()}
        if children != set(names):
            raise argument_error(where, f"children of {path}[{index}]", sorted(children), f"exactly {sorted(names)}")
        scale = getattr(layer, "residual_multiplier", 1)
        if scale != 1:
            raise argument_error(
                where, f"{path}[{index}].residual_multiplier", scale, "1: outputs are added as they are"
            )
    return owner, modules


def _check_number_of_layers(where: str, config: Any, num_layers: int) -> None:
    told = getattr(config, "num_hidden_layers", num_layers)
    if told != num_layers:
        raise argument_error(where, "model.config.num_hidden_layers", told, f"the {num_layers} layers that are there")


def _split_linears(
    where: str,
    layer: nn.Module,
    cores: Sequence[str],
    tp_mesh: DeviceMesh,
    column: Sequence[str],
    row: Sequence[str],
) -> None:
    for core in cores:
        found = set()
        for path, module in list(getattr(layer, core).named_modules(prefix=core)):
            name = path.rpartition(".")[2]
            if not isinstance(module, nn.Linear):
                continue
            if name not in column and name not in row:
                raise argument_error(where, path, "in neither column nor row", "each linear of a core in one of them")
            found.add("column" if name in column else "row")
            kind = ColumnParallelLinear if name in column else RowParallelLinear
            parent = layer.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, kind.from_linear(module, tp_mesh, reduce="none"))
        if found != {"column", "row"}:
            was = f"without linears of {' and '.join(sorted({'column', 'row'} - found))}"
            raise argument_error(where, core, was, "some of column, whose outputs are split, and then some of row")
