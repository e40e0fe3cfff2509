"""What becomes what: a plan made from headers alone, checked in full, then carried out one expert at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sonic.convert.checkpoint import Checkpoint, open_checkpoint, shards_of, write_folder
from sonic.convert.config import FIELD, Sizes, expected_sizes, sonic_field
from sonic.convert.find import MoELayer, choose_layout, find_layers, natural, refuse_unknown
from sonic.convert.formats import FORMATS, LAYOUTS, PARTS, STACKED, Layout, Place, from_canonical, to_canonical
from sonic.convert.stored import DTYPES, HeldTensor, Stored, bytes_of
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["Conversion", "Entry", "convert_checkpoint", "convert_state_dict", "plan_conversion"]

_WHERE = "sonic.convert"
_GLU_KEY = "sonic.glu_layout"  # in the metadata of a checkpoint of ours: nothing else tells the order of its rows
_GLU_LAYOUTS = ("concatenated", "interleaved")
_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """A tensor of the converted checkpoint.

    Attributes:
        key: its name.
        dtype_name: its dtype, as safetensors names it; that of its sources.
        shape: its shape.
        sources: the tensors that it is made of, in order.
        how: in words; ``"unchanged"`` for what is no part of a MoE layer.
        pieces: gives its values in order, no more than one expert's at a time; None: the bytes of its only source.
    """

    key: str
    dtype_name: str
    shape: tuple[int, ...]
    sources: tuple[Stored, ...]
    how: str
    pieces: Callable[[], Iterable[Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        if self.pieces is None:
            return self.sources[0].nbytes
        return torch.Size(self.shape).numel() * DTYPES[self.dtype_name].itemsize

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, piece by piece."""
        if self.pieces is None:
            yield from self.sources[0].chunks()
            return
        for piece in self.pieces():
            yield bytes_of(piece)

    def lines(self) -> Iterator[str]:
        """What it becomes of, one source a line."""
        title = f"{self.key} {self.shape} {self.dtype_name}"
        if self.how == "unchanged":
            yield f"{title}: unchanged"
            return
        yield f"{title}: {self.how}"
        for source in self.sources:
            yield f"    from {source.key} {source.shape} {source.dtype_name}"


@dataclass(frozen=True)
class Conversion:
    """A plan: nothing is written yet, everything is checked.

    Attributes:
        entries: all tensors of the converted checkpoint.
        source_format, source_storage: what was found.
        target_format, target_storage: what it becomes.
        glu_layout: order of gate and up rows where the target is sonic's or sonicmoe's.
        layers: names of the MoE layers in the converted checkpoint.
        sizes: of these layers.
        config: what ``config.json`` becomes; None if there is none.
        checkpoint: the source.
        metadata: of the converted files.
    """

    entries: tuple[Entry, ...]
    source_format: str
    source_storage: str
    target_format: str
    target_storage: str
    glu_layout: str
    layers: tuple[str, ...]
    sizes: Sizes
    config: Mapping[str, Any] | None
    checkpoint: Checkpoint
    metadata: Mapping[str, str]

    def lines(self, max_shard_bytes: int = _SHARD_BYTES) -> Iterator[str]:
        """The plan in words: every tensor with its sources and shapes, then a summary."""
        for entry in self.entries:
            yield from entry.lines()
        sizes, total = self.sizes, sum(entry.nbytes for entry in self.entries)
        order = f", {self.glu_layout}" if self.glu_layout else ""
        files = len(shards_of(self.entries, max_shard_bytes))
        yield (
            f"{self.source_format} ({self.source_storage}) -> {self.target_format} ({self.target_storage}{order}): "
            f"{len(self.checkpoint.tensors)} tensors become {len(self.entries)}, {total / 1e9:.3f} GB in {files} "
            f"{'file' if files == 1 else 'files'}"
        )
        yield (
            f"{len(self.layers)} MoE {'layer' if len(self.layers) == 1 else 'layers'}: E = {sizes.num_experts}, "
            f"D = {sizes.hidden_size}, N = {sizes.intermediate_size}"
            + (f", shared expert of {sizes.shared_intermediate_size}" if sizes.shared_intermediate_size else "")
        )

    def write(
        self,
        target: str | os.PathLike[str],
        *,
        max_shard_bytes: int = _SHARD_BYTES,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Write the converted checkpoint as safetensors, with ``config.json`` and the other files of the source.

        In memory at once: one expert's matrices, or a few megabytes of another tensor. The folder appears when it is
        whole; whatever ends the process before leaves nothing under its name.

        Args:
            target: a new folder, or an empty one; its parent must exist.
            max_shard_bytes: of tensors per file; one tensor that is larger gets a file of its own.
            report: is told a line after every file.

        Raises:
            ValueError: the target is there already, or a file of the source changed meanwhile.
        """
        check_positive(_WHERE, max_shard_bytes=max_shard_bytes)
        write_folder(
            Path(target),
            self.entries,
            metadata=self.metadata,
            index_metadata=self.checkpoint.index_metadata,
            config=self.config,
            others=self.checkpoint.others,
            max_shard_bytes=max_shard_bytes,
            report=report,
        )


def plan_conversion(
    source: str | os.PathLike[str] | Checkpoint,
    to: str = "sonic",
    *,
    source_format: str | None = None,
    storage: str | None = None,
    glu_layout: str | None = None,
    source_glu_layout: str | None = None,
    block_name: str | None = None,
    pass_through: Sequence[str] = (),
) -> Conversion:
    """Plan the conversion of a checkpoint from its headers.

    Args:
        source: a file of weights, or a folder as Hugging Face's.
        to: a name in :data:`FORMATS`.
        source_format: the same, where keys and ``config.json`` do not tell, or tell wrongly.
        storage: ``"checkpoint"`` or ``"fused"``, for formats of transformers: keys as published, or as ``state_dict()``
            names them; None: as the checkpoint was before it became sonic's, else ``"checkpoint"``.
        glu_layout: ``"concatenated"`` or ``"interleaved"`` rows; for ``to`` ``"sonic"`` (None: concatenated) and
            ``"sonicmoe"`` (None: interleaved).
        source_glu_layout: of the source, where it is one of these and does not tell.
        block_name: what the layers are called in the target, the last word before the part's name; None: what the
            format calls them, or as they were.
        pass_through: keys, or patterns with ``*``, to be handed on as they are though they look like those of experts.

    Returns:
        the plan, with every tensor that will be written.

    Raises:
        ValueError: naming the key: unknown, missing, there twice, of a wrong shape or dtype; or a format that cannot be
            told, or that has no place for what is there.
    """
    check_choice(_WHERE, "to", to, FORMATS)
    if source_format is not None:
        check_choice(_WHERE, "source_format", source_format, FORMATS)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = choose_layout(checkpoint, source_format)
    layout = layout.with_order(_source_order(checkpoint, layout, source_glu_layout))
    layers, rest = find_layers(layout, checkpoint.tensors)
    refuse_unknown(layout, layers, rest, pass_through)
    is_known = (checkpoint.config or {}).get("model_type") in layout.model_types
    sizes = _check_layers(layers, expected_sizes(checkpoint.config if is_known else None, layout.width))
    target = _target_layout(checkpoint, layout, to, storage, glu_layout)
    order = target.parts["w1"].order or "" if target.choices and sizes.is_gated else ""
    entries = list(_entries(checkpoint, layers, rest, target, sizes, block_name))
    _refuse_collisions(entries)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != _GLU_KEY}
    metadata.setdefault("format", "pt")
    if to == "sonic":
        metadata[_GLU_KEY] = order or "concatenated"
    return Conversion(
        entries=tuple(entries),
        source_format=layout.name,
        source_storage=layout.storage,
        target_format=target.name,
        target_storage=target.storage,
        glu_layout=order,
        layers=tuple(target.renamed(layer.prefix, block_name).rstrip(".") for layer in layers),
        sizes=sizes,
        config=_config(checkpoint, layout, to, sizes, order or "concatenated"),
        checkpoint=checkpoint,
        metadata=metadata,
    )


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "sonic",
    *,
    max_shard_bytes: int = _SHARD_BYTES,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> Conversion:
    """Plan a conversion and carry it out: :func:`plan_conversion`, then :meth:`Conversion.write`.

    Args:
        source: a file of weights, or a folder as Hugging Face's.
        target: a new folder.
        to: a name in :data:`FORMATS`.
        max_shard_bytes, report: as in :meth:`Conversion.write`.
        options: as in :func:`plan_conversion`.

    Raises:
        ValueError: as both; then nothing is written.
    """
    conversion = plan_conversion(source, to, **options)
    conversion.write(target, max_shard_bytes=max_shard_bytes, report=report)
    return conversion


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    to: str = "sonic",
    *,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The same for tensors in memory: a model's ``state_dict()``, or one layer's.

    Args:
        state_dict: tensors on the CPU by key.
        to: a name in :data:`FORMATS`.
        config: ``model.config.to_dict()``, which tells the format.
        options: as in :func:`plan_conversion`.

    Returns:
        new tensors by key; those of no MoE layer are the same ones.

    Raises:
        ValueError: as :func:`plan_conversion`.
    """
    tensors = {key: HeldTensor.checked(key, value) for key, value in state_dict.items()}
    found = {}
    for entry in plan_conversion(Checkpoint(tensors, config=config), to, **options).entries:
        if entry.pieces is None:
            found[entry.key] = state_dict[entry.sources[0].key]
        else:
            flat = torch.cat([piece.reshape(-1) for piece in entry.pieces()])
            found[entry.key] = flat.view(entry.shape)
    return found


# ---------------------------------------------------------------- source and target


def _source_order(checkpoint: Checkpoint, layout: Layout, told: str | None) -> str:
    """The order of gate and up rows in a source where names do not tell it."""
    if not layout.choices:
        if told is not None:
            raise argument_error(_WHERE, "source_glu_layout", repr(told), f"None: {layout.name} has one order only")
        return ""
    if told is not None:
        check_choice(_WHERE, "source_glu_layout", told, layout.choices)
        return told
    if layout.name != "sonic":
        return layout.choices[0]
    ours = (checkpoint.config or {}).get(FIELD)
    layer = ours.get("layer") if isinstance(ours, Mapping) else None
    in_config = layer.get("glu_layout") if isinstance(layer, Mapping) else None
    in_metadata = checkpoint.metadata.get(_GLU_KEY)
    if in_config and in_metadata and in_config != in_metadata:
        was = f"{in_metadata!r} in the metadata and {in_config!r} in config.json"
        raise argument_error(_WHERE, "glu_layout", was, "the same in both, or source_glu_layout=... to decide")
    order = in_metadata or in_config
    if order is None:
        wanted = "source_glu_layout=...: neither metadata nor config.json tell the order of gate and up rows in w1"
        raise argument_error(_WHERE, "source_glu_layout", None, wanted)
    check_choice(_WHERE, "glu_layout of the source", order, layout.choices)
    return str(order)


def _target_layout(
    checkpoint: Checkpoint, source: Layout, to: str, storage: str | None, glu_layout: str | None
) -> Layout:
    layouts = {layout.storage: layout for layout in LAYOUTS if layout.name == to}
    any_layout = next(iter(layouts.values()))
    config = checkpoint.config or {}
    if any_layout.model_types and "model_type" in config and config["model_type"] not in any_layout.model_types:
        if to != source.name:  # who names the source's format says that it is of that family
            was = f"{to!r}, with model_type {config['model_type']!r} in config.json"
            raise argument_error(_WHERE, "to", was, "the format of that model type, or of a library")
    if storage is not None:
        check_choice(_WHERE, "storage", storage, tuple(layouts))
    else:
        origin = (config.get(FIELD) or {}).get("source", {}) if source.name == "sonic" else {}
        remembered = origin.get("storage") if origin.get("format") == to else None
        storage = remembered if remembered in layouts else "checkpoint"
    layout = layouts[storage]
    if glu_layout is None:
        return layout.with_order(layout.choices[0]) if layout.choices else layout
    check_choice(_WHERE, "glu_layout", glu_layout, _GLU_LAYOUTS)
    if not layout.choices:
        raise argument_error(_WHERE, "glu_layout", repr(glu_layout), f"None: {to} has one order only")
    return layout.with_order(glu_layout)


def _config(checkpoint: Checkpoint, layout: Layout, to: str, sizes: Sizes, glu_layout: str) -> Mapping[str, Any] | None:
    if checkpoint.config is None:
        return None
    config = {key: value for key, value in checkpoint.config.items() if key != FIELD}
    if to != "sonic":
        return config
    ours = checkpoint.config.get(FIELD)
    if layout.name == "sonic" and isinstance(ours, Mapping):  # the same layers in another order
        return {**config, FIELD: {**ours, "layer": {**ours.get("layer", {}), "glu_layout": glu_layout}}}
    family = layout.name
    if not layout.model_types:  # a library's format may hold a model of any family
        model_type = config.get("model_type")
        family = next((known.name for known in LAYOUTS if model_type in known.model_types), family)
    origin = {"format": layout.name, "storage": layout.storage}
    return {**config, FIELD: sonic_field(config, family, origin, sizes, glu_layout)}


def _refuse_collisions(entries: Iterable[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.key, entry)
        if other is not entry:
            was = f"the target's name of both {other.sources[0].key} and {entry.sources[0].key}"
            raise argument_error(_WHERE, entry.key, was, "two names: choose another block_name")


# ---------------------------------------------------------------- layers, checked


def _check_layers(layers: Sequence[MoELayer], expected: dict[str, int]) -> Sizes:
    first: Sizes | None = None
    for layer in layers:
        sizes = layer.check(expected)
        if first is not None and sizes != first:
            names = [name for name in vars(sizes) if getattr(sizes, name) != getattr(first, name)]
            was, same = (", ".join(f"{name} {getattr(of, name)}" for name in names) for of in (sizes, first))
            wanted = f"{same}, as {layers[0].prefix.rstrip('.')}"
            raise argument_error(_WHERE, layer.prefix.rstrip("."), f"a layer with {was}", wanted)
        first = sizes
        expected = {"E": sizes.num_experts, "D": sizes.hidden_size, "N": sizes.intermediate_size}
    assert first is not None, "a layout is only chosen where it finds a layer"
    return first


def _entries(
    checkpoint: Checkpoint,
    layers: Sequence[MoELayer],
    rest: Sequence[str],
    target: Layout,
    sizes: Sizes,
    block_name: str | None,
) -> Iterator[Entry]:
    """In the natural order of the source's keys, a layer where its first key was."""
    begins = {min(layer.keys(), key=natural): layer for layer in layers}
    for key in sorted([*begins, *rest], key=natural):
        if key in begins:
            yield from _layer_entries(begins[key], target, sizes, block_name)
        else:
            stored = checkpoint.tensors[key]
            yield Entry(key, stored.dtype_name, stored.shape, (stored,), "unchanged")


def _layer_entries(layer: MoELayer, target: Layout, sizes: Sizes, block_name: str | None) -> Iterator[Entry]:
    for part in layer.parts():
        if part not in target.parts:
            key = layer.stored(part)[0].key
            raise argument_error(_WHERE, key, f"a {part} of a MoE layer", f"none: {target.name} has no place for it")
    for part in target.required:
        if part not in layer.parts():
            wanted = f"one, which every layer of {target.name} has"
            raise argument_error(_WHERE, layer.prefix.rstrip("."), f"without a {part}", wanted)
    if target.model_types and not sizes.is_gated:  # no model of transformers has any other
        wanted = f"2N rows: {target.name} has gated experts only"
        raise argument_error(_WHERE, layer.stored("w1")[0].key, "without gate rows", wanted)
    prefix = target.renamed(layer.prefix, block_name)
    experts: Sequence[int | None] = range(sizes.num_experts)
    for part in (part for part in PARTS if part in layer.parts()):
        place = target.parts[part]
        for expert in experts if place.is_per_expert else (None,):
            for half in range(len(place.keys)):
                yield _part_entry(layer, target, Place(prefix, part, half, expert), sizes)


def _part_entry(layer: MoELayer, target: Layout, place: Place, sizes: Sizes) -> Entry:
    """One key of the target: a whole part, or one expert's, or half of it."""
    source, goal, part = layer.layout.parts[place.part], target.parts[place.part], place.part
    is_half = len(goal.keys) == 2
    is_gated = sizes.is_gated and part in ("w1", "b1", "shared.w1", "shared.b1")
    is_stack = part in STACKED
    experts: Sequence[int | None] = (None,)
    if is_stack:
        experts = range(sizes.num_experts) if place.expert is None else (place.expert,)
    halves = (place.half,) if is_half and len(source.keys) == 2 else range(len(source.keys))

    def piece(expert: int | None) -> Tensor:
        if len(source.keys) == 2:
            rows = torch.cat([layer.read(part, half, expert) for half in halves])
            return rows if is_half else from_canonical(goal, rows, is_gated)
        rows = to_canonical(source, layer.read(part, 0, expert), is_gated)
        if is_half:
            return rows.chunk(2)[place.half].contiguous()
        return from_canonical(goal, rows, is_gated)

    if source.is_per_expert:
        sources = [layer.at(part, half, expert) for expert in experts for half in halves]
    else:
        sources = [layer.at(part, half, None) for half in halves]
    shape = list(layer.slice_shape(part, sizes))
    if is_half:
        shape[0] //= 2
    if goal.transposed:
        shape.reverse()
    if is_stack and place.expert is None:
        shape.insert(0, sizes.num_experts)
    return Entry(
        target.key(place),
        sources[0].dtype_name,
        tuple(shape),
        tuple(sources),
        _in_words(source, goal, place, is_gated),
        lambda: (piece(expert) for expert in experts),
    )


def _in_words(source: Any, goal: Any, place: Place, is_gated: bool) -> str:
    words = []
    if source.is_per_expert and not goal.is_per_expert:
        words.append("experts stacked")
    if goal.is_per_expert and not source.is_per_expert:
        words.append(f"expert {place.expert}")
    if is_gated:
        if len(source.keys) == 2 and len(goal.keys) == 1:
            words.append(f"gate and up rows {goal.order}")
        elif len(goal.keys) == 2 and len(source.keys) == 1:
            words.append(f"{('gate', 'up')[place.half]} rows of {source.order}")
        elif source.order != goal.order:
            words.append(f"gate and up rows from {source.order} to {goal.order}")
    if source.transposed != goal.transposed:
        words.append("transposed")
    return ", ".join(words) or "renamed"
