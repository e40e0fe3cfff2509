"""How each library names and stores the parts of a Mixture-of-Experts layer.

A part is named as :class:`sonic.MoE` names it. In its canonical form it has that layer's shape, with the gate rows
above the up rows; a :class:`Layout` says how the same numbers lie in a checkpoint, so any layout turns into any other
by way of the canonical form. Nothing is computed: rows are stacked, reordered and transposed.

==========================  =================  ==========================================================
part                        canonical shape    in words
==========================  =================  ==========================================================
``w1``, ``b1``              (E, U, D), (E, U)  up projections and their biases
``w2``, ``b2``              (E, D, N), (E, D)  down projections and their biases
``router.weight``           (E, D)             of the router's linear layer
``router.bias``             (E,)               its bias
``router.expert_bias``      (E,)               added where experts are chosen, not where they are weighted
``shared.w1``, ``shared.w2``  (U', D), (D, N')  the expert that every token passes
``shared.b1``, ``shared.b2``  (U',), (D,)       its biases
==========================  =================  ==========================================================
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "LAYOUTS", "PARTS", "STACKED", "Layout", "Part", "Place", "from_canonical", "to_canonical"]

STACKED = ("w1", "w2", "b1", "b2")
PARTS = (
    *STACKED,
    *("router.weight", "router.bias", "router.expert_bias"),
    *("shared.w1", "shared.w2", "shared.b1", "shared.b2"),
)

CONCATENATED, INTERLEAVED, UP_FIRST = "concatenated", "interleaved", "up_first"


@dataclass(frozen=True)
class Part:
    """Where one part of a layer lies.

    Attributes:
        keys: one key below the layer, or two: the gate's and the up projection's. ``{e}``: one per expert; ``../``: a
            sibling of the layer.
        order: of gate and up rows under one key: ``"concatenated"`` (gate rows first), ``"interleaved"`` (g0 u0 g1 u1
            ...) or ``"up_first"``; None where there are no two halves.
        transposed: the last two dimensions are swapped.
    """

    keys: tuple[str, ...]
    order: str | None = None
    transposed: bool = False

    @property
    def is_per_expert(self) -> bool:
        """Whether every expert has keys of its own."""
        return "{e}" in self.keys[0]


@dataclass(frozen=True)
class Place:
    """What a key holds: half (0 gate, 1 up) of a part, of one expert where experts have keys of their own."""

    prefix: str
    part: str
    half: int
    expert: int | None


@dataclass(frozen=True)
class Layout:
    """How one library stores a layer.

    Attributes:
        name: the format, such as ``"qwen3_moe"``.
        storage: ``"checkpoint"``, as published and as ``save_pretrained`` writes; ``"fused"``, as ``state_dict()`` of
            transformers 5 names it.
        parts: where each part lies; a layer of this format can have no others.
        required: parts that every layer of this format has.
        block: what transformers calls the layer; None: any name.
        model_types: of ``config.json``.
        width: the field of ``config.json`` that holds the width of an expert.
        choices: orders of gate and up rows that are found under this format, the default first; more than one where
            nothing in the names tells.
        needs_three_dims: its names are also used by dense layers, whose tensors have two dimensions.
        wraps_router: a router may stand in others (``router.router.weight``), as token rounding wraps one. What is
            written has one ``router.``.
    """

    name: str
    storage: str
    parts: Mapping[str, Part]
    required: tuple[str, ...] = ("w1", "w2", "router.weight")
    block: str | None = None
    model_types: tuple[str, ...] = ()
    width: str = "intermediate_size"
    choices: tuple[str, ...] = ()
    needs_three_dims: bool = False
    wraps_router: bool = False

    def with_order(self, order: str) -> Layout:
        """The same with the gate and up rows in that order, where there is a choice."""
        if not self.choices:
            return self
        parts = {
            name: dataclasses.replace(part, order=order) if part.order else part for name, part in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def key(self, place: Place) -> str:
        """The key at a place."""
        template = self.parts[place.part].keys[place.half]
        prefix = place.prefix
        if template.startswith("../"):
            prefix, template = _parent(prefix), template[3:]
        return prefix + template.format(e=place.expert)

    def places_of(self, key: str) -> Iterator[Place]:
        """What a key could hold: every template that it ends with, each with the layer it would belong to."""
        for tail, pattern, part, half, is_sibling in _patterns(self.name, self.storage):
            found = pattern.fullmatch(key) if key.endswith(tail) else None  # the end first: there may be 10^5 keys
            if found is not None:
                prefix = found["prefix"] + (f"{self.block}." if is_sibling else "")
                expert = found.groupdict().get("e")
                yield Place(prefix, part, half, None if expert is None else int(expert))

    def suffixes(self) -> list[str]:
        """All keys below a layer, with ``{e}`` for the expert."""
        return [key for part in self.parts.values() for key in part.keys]

    def renamed(self, prefix: str, block_name: str | None) -> str:
        """The prefix of a layer with the last name in it replaced by this format's, or by ``block_name``."""
        block = block_name or self.block
        return f"{_parent(prefix)}{block}." if prefix and block else prefix


def _parent(prefix: str) -> str:
    return prefix[: prefix.rstrip(".").rfind(".") + 1]


_ROUTER = {"router.weight": Part(("gate.weight",))}
_SHARED_PROJECTIONS = {
    "shared.w1": Part(("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")),
    "shared.w2": Part(("shared_experts.down_proj.weight",)),
}
_DEEPSEEK_ROUTER = {**_ROUTER, "router.expert_bias": Part(("gate.e_score_correction_bias",))}
_GRANITE_SHARED = {
    "shared.w1": Part(("../shared_mlp.input_linear.weight",), CONCATENATED),
    "shared.w2": Part(("../shared_mlp.output_linear.weight",)),
}
_FUSED = {"w1": Part(("experts.gate_up_proj",), CONCATENATED), "w2": Part(("experts.down_proj",))}


def _per_expert(gate: str, up: str, down: str) -> dict[str, Part]:
    gate_key, up_key, down_key = (f"experts.{{e}}.{name}.weight" for name in (gate, up, down))
    return {"w1": Part((gate_key, up_key)), "w2": Part((down_key,))}


_PROJECTIONS = _per_expert("gate_proj", "up_proj", "down_proj")
_DEEPSEEK_NEEDS = ("w1", "w2", "router.weight", "router.expert_bias", "shared.w1", "shared.w2")
_GRANITE_TYPES = ("granitemoe", "granitemoeshared")

LAYOUTS = (
    Layout(
        "sonic",
        "checkpoint",
        {
            "w1": Part(("w1",), CONCATENATED),
            "w2": Part(("w2",)),
            "b1": Part(("b1",), CONCATENATED),
            "b2": Part(("b2",)),
            "router.weight": Part(("router.weight",)),
            "router.bias": Part(("router.bias",)),
            "router.expert_bias": Part(("router.expert_bias",)),
            "shared.w1": Part(("shared.w1",), CONCATENATED),
            "shared.w2": Part(("shared.w2",)),
            "shared.b1": Part(("shared.b1",), CONCATENATED),
            "shared.b2": Part(("shared.b2",)),
        },
        required=("w1", "w2"),
        choices=(CONCATENATED, INTERLEAVED),
        needs_three_dims=True,
        wraps_router=True,
    ),
    Layout(
        "mixtral",
        "checkpoint",
        {**_per_expert("w1", "w3", "w2"), **_ROUTER},
        block="block_sparse_moe",
        model_types=("mixtral",),
    ),
    Layout("mixtral", "fused", {**_FUSED, **_ROUTER}, block="mlp", model_types=("mixtral",)),
    Layout(
        "qwen3_moe",
        "checkpoint",
        {**_PROJECTIONS, **_ROUTER},
        block="mlp",
        model_types=("qwen3_moe",),
        width="moe_intermediate_size",
    ),
    Layout(
        "qwen3_moe",
        "fused",
        {**_FUSED, **_ROUTER},
        block="mlp",
        model_types=("qwen3_moe",),
        width="moe_intermediate_size",
    ),
    Layout("olmoe", "checkpoint", {**_PROJECTIONS, **_ROUTER}, block="mlp", model_types=("olmoe",)),
    Layout("olmoe", "fused", {**_FUSED, **_ROUTER}, block="mlp", model_types=("olmoe",)),
    Layout(
        "deepseek_v3",
        "checkpoint",
        {**_PROJECTIONS, **_DEEPSEEK_ROUTER, **_SHARED_PROJECTIONS},
        required=_DEEPSEEK_NEEDS,
        block="mlp",
        model_types=("deepseek_v3",),
        width="moe_intermediate_size",
    ),
    Layout(
        "deepseek_v3",
        "fused",
        {**_FUSED, **_DEEPSEEK_ROUTER, **_SHARED_PROJECTIONS},
        required=_DEEPSEEK_NEEDS,
        block="mlp",
        model_types=("deepseek_v3",),
        width="moe_intermediate_size",
    ),
    Layout(
        "gpt_oss",
        "checkpoint",
        {
            "w1": Part(("experts.gate_up_proj",), INTERLEAVED, transposed=True),
            "b1": Part(("experts.gate_up_proj_bias",), INTERLEAVED),
            "w2": Part(("experts.down_proj",), transposed=True),
            "b2": Part(("experts.down_proj_bias",)),
            "router.weight": Part(("router.weight",)),
            "router.bias": Part(("router.bias",)),
        },
        required=("w1", "w2", "b1", "b2", "router.weight", "router.bias"),
        block="mlp",
        model_types=("gpt_oss",),
    ),
    Layout(
        "granitemoe",
        "checkpoint",
        {
            "w1": Part(("input_linear.weight",), CONCATENATED),
            "w2": Part(("output_linear.weight",)),
            "router.weight": Part(("router.layer.weight",)),
            **_GRANITE_SHARED,
        },
        block="block_sparse_moe",
        model_types=_GRANITE_TYPES,
        needs_three_dims=True,
    ),
    Layout(
        "granitemoe",
        "fused",
        {**_FUSED, "router.weight": Part(("router.weight",)), **_GRANITE_SHARED},
        block="block_sparse_moe",
        model_types=_GRANITE_TYPES,
    ),
    Layout(
        "lm_engine",
        "checkpoint",
        {
            "w1": Part(("c_fc.weight",), INTERLEAVED),
            "b1": Part(("c_fc.bias",), INTERLEAVED),
            "w2": Part(("c_proj.weight",)),
            "b2": Part(("c_proj.bias",)),
            "router.weight": Part(("gate.weight",)),
            "shared.w1": Part(("c_fc_shared.weight",), INTERLEAVED),
            "shared.b1": Part(("c_fc_shared.bias",), INTERLEAVED),
            "shared.w2": Part(("c_proj_shared.weight",)),
            "shared.b2": Part(("c_proj_shared.bias",)),
        },
        needs_three_dims=True,
    ),
    Layout(
        "sonicmoe",
        "checkpoint",
        {
            "w1": Part(("c_fc.weight",), INTERLEAVED),
            "b1": Part(("c_fc.bias",), INTERLEAVED),
            "w2": Part(("c_proj.weight",)),
            "b2": Part(("c_proj.bias",)),
            "router.weight": Part(("router.weight",)),
        },
        choices=(INTERLEAVED, CONCATENATED),
        needs_three_dims=True,
    ),
    Layout(
        "scattermoe",
        "checkpoint",
        {
            "w1": Part(("experts.weight",), UP_FIRST),
            "w2": Part(("output_experts.weight",)),
            "router.weight": Part(("router.weight",)),
            "router.bias": Part(("router.bias",)),
        },
        required=("w1", "w2"),
    ),
)
"""All that can be read and written. The first layout of a format is what is written where no storage is named."""

FORMATS = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))
"""Names of the formats."""


@functools.cache
def _patterns(name: str, storage: str) -> tuple[tuple[str, re.Pattern[str], str, int, bool], ...]:
    """End of the key, expression, part, half and whether it is a sibling's, for every template of a layout."""
    (layout,) = (layout for layout in LAYOUTS if (layout.name, layout.storage) == (name, storage))
    found = []
    for part_name, part in layout.parts.items():
        for half, template in enumerate(part.keys):
            text = template.removeprefix("../")
            body = re.escape(text).replace(r"\{e\}", r"(?P<e>0|[1-9][0-9]*)")
            if layout.wraps_router and body.startswith(r"router\."):
                body = r"(?:router\.)+" + body.removeprefix(r"router\.")
            pattern = re.compile(rf"(?P<prefix>(?:.+?\.)??){body}")
            found.append((text.rpartition("{e}")[2], pattern, part_name, half, text != template))
    return tuple(found)


def to_canonical(part: Part, stored: Tensor, is_gated: bool) -> Tensor:
    """One expert's share of a part under one key, as stored -> with its gate rows above its up rows; maybe a view.

    Args:
        part: where it lies.
        stored: (U, D), (D, U), (D, N), (N, D), (U,) or (D,).
        is_gated: U = 2N, so that ``part.order`` means something.
    """
    rows = stored.mT if part.transposed else stored
    if not is_gated or part.order in (None, CONCATENATED):
        return rows
    if part.order == INTERLEAVED:
        return torch.cat([rows[0::2], rows[1::2]])
    up, gate = rows.chunk(2)
    return torch.cat([gate, up])


def from_canonical(part: Part, rows: Tensor, is_gated: bool) -> Tensor:
    """The inverse of :func:`to_canonical`; contiguous."""
    if is_gated and part.order in (INTERLEAVED, UP_FIRST):
        gate, up = rows.chunk(2)
        rows = torch.stack([gate, up], 1).flatten(0, 1) if part.order == INTERLEAVED else torch.cat([up, gate])
    return (rows.mT if part.transposed else rows).contiguous()
