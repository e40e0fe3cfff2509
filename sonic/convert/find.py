"""Which keys of a checkpoint belong to MoE layers, in which format, and whether they are all there and fit."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sonic.convert.checkpoint import Checkpoint
from sonic.convert.config import Sizes
from sonic.convert.formats import LAYOUTS, STACKED, Layout, Place
from sonic.convert.stored import Stored
from sonic.shapes import argument_error

__all__ = ["MoELayer", "choose_layout", "find_layers", "natural", "refuse_unknown"]

_WHERE = "sonic.convert"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Names that only parts of MoE layers have. A key with one of them that no layout explains would be lost in silence.
_SUSPICIOUS = re.compile(
    r"(?:^|\.)(?:experts?|local_experts|output_experts|block_sparse_moe|moe|router|e_score_correction_bias"
    r"|shared_experts?|shared_experts?_gate|shared_mlp|c_fc_shared|c_proj_shared)(?:\.|$)"
)
_LETTERS = {
    "w1": "UD",
    "w2": "DN",
    "b1": "U",
    "b2": "D",
    "router.weight": "ED",
    "router.bias": "E",
    "router.expert_bias": "E",
    "shared.w1": "VD",
    "shared.w2": "DS",
    "shared.b1": "V",
    "shared.b2": "D",
}
"""Dimensions of one expert's share of each part; V and S are U and N of the shared expert."""


def natural(key: str) -> tuple[tuple[int, str], ...]:
    """Sorts layer 2 before layer 10."""
    words = re.split(r"([0-9]+)", key)
    return tuple((int(word), "") if index % 2 else (-1, word) for index, word in enumerate(words))


@dataclass
class MoELayer:
    """The tensors of one layer, by part.

    Attributes:
        layout: how they lie.
        prefix: what their keys begin with; empty, or with a dot at the end.
        tensors: by part, half and expert.
    """

    layout: Layout
    prefix: str
    tensors: dict[tuple[str, int, int | None], Stored] = field(default_factory=dict)

    def parts(self) -> set[str]:
        """The parts that are there."""
        return {part for part, _, _ in self.tensors}

    def keys(self) -> Iterator[str]:
        """Keys of all its tensors."""
        return (stored.key for stored in self.tensors.values())

    def stored(self, part: str) -> list[Stored]:
        """All tensors of a part."""
        return [stored for (name, _, _), stored in self.tensors.items() if name == part]

    def at(self, part: str, half: int, expert: int | None) -> Stored:
        """The tensor at a place."""
        return self.tensors[part, half, expert]

    def read(self, part: str, half: int, expert: int | None) -> Tensor:
        """One expert's share of a part, as stored; the whole of a part that experts do not share."""
        if expert is None or self.layout.parts[part].is_per_expert:
            return self.at(part, half, expert).read()
        return self.at(part, half, None).read(expert)

    def slice_shape(self, part: str, sizes: Sizes) -> tuple[int, ...]:
        """Canonical shape of one expert's share of a part."""
        dims = _dims(sizes)
        return tuple(dims[letter] for letter in _LETTERS[part])

    def check(self, expected: Mapping[str, int]) -> Sizes:
        """See that all parts are there, and that shapes and dtypes fit each other.

        Args:
            expected: E, D and N where they are known already.

        Raises:
            ValueError: naming the key.
        """
        parts = self.parts()
        for part in self.layout.required:
            if part not in parts:
                raise self._missing(part, 0)
        for one, other in (("b1", "b2"), ("shared.w1", "shared.w2"), ("shared.b1", "shared.b2")):
            for here, there in ((one, other), (other, one)):
                if here in parts and there not in parts:
                    raise self._missing(there, 0)
        if "shared.b1" in parts and "shared.w1" not in parts:
            raise self._missing("shared.w1", 0)
        if ("shared.w1" in parts and "b1" in parts) != ("shared.b1" in parts):
            self._refuse_half_biased(parts)
        sizes = self._sizes(expected)
        for part in sorted(parts):
            self._check_part(part, sizes)
        return sizes

    def _refuse_half_biased(self, parts: set[str]) -> None:
        key = self.stored("shared.b1" if "shared.b1" in parts else "b1")[0].key
        wanted = "biases of the routed experts and of the shared one, or of neither, as sonic.MoE has them"
        raise argument_error(_WHERE, key, "a bias", wanted)

    def _missing(self, part: str, half: int, expert: int | None = None, shape: str = "") -> ValueError:
        is_per_expert = self.layout.parts[part].is_per_expert
        place = Place(self.prefix, part, half, (expert or 0) if is_per_expert else None)
        wanted = f"the {part} of this layer" + (f", {shape}" if shape else "")
        return argument_error(_WHERE, self.layout.key(place), "missing", wanted)

    def _sizes(self, expected: Mapping[str, int]) -> Sizes:
        parts = self.parts()
        w2, w1 = self.layout.parts["w2"], self.layout.parts["w1"]
        down = self._shape_of("w2", 2 if w2.is_per_expert else 3)
        down = down[::-1] if w2.transposed else down[-2:]
        up = self._shape_of("w1", 2 if w1.is_per_expert else 3)
        width_u = up[-1 if w1.transposed else -2]
        count: int
        if "router.weight" in parts:
            count = self._shape_of("router.weight", 2)[0]
        elif w2.is_per_expert:
            count = 1 + max(expert or 0 for _, _, expert in self.tensors)
        else:
            count = self.stored("w2")[0].shape[0]
        hidden, width = down[0], down[1]
        shared = self._shape_of("shared.w2", 2)[1] if "shared.w2" in parts else 0
        hidden, width = expected.get("D", hidden), expected.get("N", width)
        return Sizes(
            num_experts=expected.get("E", count),
            hidden_size=hidden,
            intermediate_size=width,
            is_gated=len(w1.keys) == 2 or width_u != width,
            shared_intermediate_size=shared,
            bias="b1" in parts,
            router_bias="router.bias" in parts,
            expert_bias="router.expert_bias" in parts,
        )

    def _shape_of(self, part: str, ndim: int) -> tuple[int, ...]:
        """Of the first tensor of a part, by expert."""
        tensors = [(half, expert or 0, tensor) for (name, half, expert), tensor in self.tensors.items() if name == part]
        stored = min(tensors, key=lambda found: found[:2])[2]
        if len(stored.shape) != ndim or 0 in stored.shape:
            raise argument_error(_WHERE, stored.key, stored.shape, f"{ndim} dimensions, none of them 0")
        return stored.shape

    def _check_part(self, part: str, sizes: Sizes) -> None:
        place, dims = self.layout.parts[part], _dims(sizes)
        letters = _LETTERS[part]
        if len(place.keys) == 2:
            letters = letters.replace("U", "N").replace("V", "S")
        if place.transposed:
            letters = letters[::-1]
        if part in STACKED and not place.is_per_expert:
            letters = "E" + letters
        shape = tuple(dims[letter] for letter in letters)
        names = {"V": "U'", "S": "N'"}
        wanted = f"({', '.join(names.get(letter, letter) for letter in letters)}) = {shape}"
        dtype = ""
        for half in range(len(place.keys)):
            for expert in range(sizes.num_experts) if place.is_per_expert else (None,):
                stored = self.tensors.get((part, half, expert))
                if stored is None:
                    raise self._missing(part, half, expert, wanted)
                if stored.shape != shape:
                    raise argument_error(_WHERE, stored.key, stored.shape, wanted)
                if stored.dtype_name not in _FLOATS:
                    were = f"one of {', '.join(_FLOATS)}: quantised experts have to be dequantised first"
                    raise argument_error(_WHERE, stored.key, stored.dtype_name, were)
                dtype = dtype or stored.dtype_name
                if stored.dtype_name != dtype:
                    raise argument_error(_WHERE, stored.key, stored.dtype_name, f"{dtype}, as the rest of this {part}")
        for name, _, expert in self.tensors:
            if name == part and expert is not None and expert >= sizes.num_experts:
                key = next(stored.key for at, stored in self.tensors.items() if at[0] == part and at[2] == expert)
                raise argument_error(_WHERE, key, f"expert {expert}", f"experts 0 to {sizes.num_experts - 1}")


def _dims(sizes: Sizes) -> dict[str, int]:
    twice = 2 if sizes.is_gated else 1
    width, shared = sizes.intermediate_size, sizes.shared_intermediate_size
    return {
        "E": sizes.num_experts,
        "D": sizes.hidden_size,
        "N": width,
        "U": twice * width,
        "S": shared,
        "V": twice * shared,
    }


def find_layers(layout: Layout, tensors: Mapping[str, Stored]) -> tuple[list[MoELayer], list[str]]:
    """The MoE layers of a format, in natural order, and the keys that belong to none.

    A layer is where projections of routed experts are.

    Raises:
        ValueError: two keys for the same part.
    """
    places = {key: list(layout.places_of(key)) for key in tensors}
    prefixes = set()
    for key, found in places.items():
        for place in found:
            if place.part in ("w1", "w2") and (not layout.needs_three_dims or len(tensors[key].shape) == 3):
                prefixes.add(place.prefix)
    layers = {prefix: MoELayer(layout, prefix) for prefix in sorted(prefixes, key=natural)}
    rest = []
    for key, found in places.items():
        here = [place for place in found if place.prefix in layers]
        if here:
            layer, at = layers[here[0].prefix], (here[0].part, here[0].half, here[0].expert)
            other = layer.tensors.setdefault(at, tensors[key])
            if other is not tensors[key]:
                raise argument_error(_WHERE, key, f"a second {at[0]} of its layer", f"{other.key} alone")
        else:
            rest.append(key)
    return list(layers.values()), sorted(rest, key=natural)


def choose_layout(checkpoint: Checkpoint, name: str | None) -> Layout:
    """The layout of a checkpoint: the one that finds layers in it, that ``config.json`` agrees with, and that explains
    every key of these layers if any does.

    Args:
        checkpoint: what is there.
        name: the format, if the caller knows.

    Raises:
        ValueError: none does, or several do.
    """
    config = checkpoint.config or {}
    candidates = []
    for layout in LAYOUTS:
        if name is not None and layout.name != name:
            continue
        layers, rest = find_layers(layout, checkpoint.tensors)
        complete = [layer for layer in layers if {*layout.required} <= layer.parts()]
        if layers:
            strays = sum(any(key.startswith(layer.prefix) for layer in layers) for key in rest)
            candidates.append((layout, bool(complete), strays, {*layer_parts(layers)}))
    if not candidates:
        known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS)) if name is None else name
        stray = next((key for key in sorted(checkpoint.tensors, key=natural) if _SUSPICIOUS.search(key)), None)
        was = "without a MoE layer" + (f" (but with {stray})" if stray else "")
        raise argument_error(_WHERE, "source", was, f"one of {known}; quantised experts have to be dequantised first")
    of_family = [found for found in candidates if config.get("model_type") in found[0].model_types]
    candidates = of_family or candidates
    for is_better in (
        lambda found: found[1],
        lambda found: found[2] == 0,
    ):
        candidates = [found for found in candidates if is_better(found)] or candidates
    if len(candidates) > 1 and len({found[0].name for found in candidates}) > 1:
        names = ", ".join(dict.fromkeys(found[0].name for found in candidates))
        raise argument_error(_WHERE, "source_format", name, f"one of {names}: the keys fit each of them")
    if len(candidates) > 1:
        was = " and ".join(repr(found[0].storage) for found in candidates)
        raise argument_error(_WHERE, "source", f"a model with its experts twice, under {was} keys", "one of the two")
    return candidates[0][0]


def layer_parts(layers: Iterable[MoELayer]) -> Iterator[str]:
    """All parts that some layer has."""
    for layer in layers:
        yield from layer.parts()


def refuse_unknown(
    layout: Layout, layers: Sequence[MoELayer], rest: Sequence[str], pass_through: Sequence[str]
) -> None:
    """Refuse keys that would be handed on as they are although they belong to a MoE layer, or look as if.

    Raises:
        ValueError: naming the key.
    """
    blocks = {layer.prefix.split(".")[-2] if "." in layer.prefix else "" for layer in layers}
    for key in rest:
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in pass_through):
            continue
        inside = any(key.startswith(layer.prefix) for layer in layers)
        routers = [place for place in layout.places_of(key) if place.part.startswith("router.")]
        lonely = any(place.prefix.rstrip(".").split(".")[-1] in blocks for place in routers)
        if inside or lonely or _SUSPICIOUS.search(key):
            was = "part of a MoE layer without experts" if lonely and not inside else "unknown, and looks like a part"
            wanted = (
                f"one of {layout.name}'s ({', '.join(layout.suffixes())}), or its name in pass_through; "
                "quantised experts have to be dequantised first"
            )
            raise argument_error(_WHERE, key, was, wanted)
