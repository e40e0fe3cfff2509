"""Which sub-block reads what: the architecture, said once, apart from when anything is sent.

A decoder layer is two sub-blocks, attention and MLP, each with its own norm. All wirings *write* alike: the stream is
the embedding plus the outputs of all sub-blocks. They differ in what a sub-block *reads*: all of the stream, or all but
what is still on its way between the ranks. With x_i the stream after layer i, and a_i, m_i the outputs of its
sub-blocks (norms inside), m_i = s_i + r_i in an MoE layer with shared experts s and routed experts r:

==============  =====================  ====================================  ======================================
wiring          attention of i reads   MLP of i reads                        what hides what
==============  =====================  ====================================  ======================================
``standard``    x_{i-1}                x_{i-1} + a_i                         nothing
``parallel``    x_{i-1}                x_{i-1}                               nothing; one all-reduce instead of two
``ladder``      x_{i-1} - m_{i-1}      x_{i-1}                               each collective, the next sub-block
``farskip``     x_{i-1} - r_{i-1}      x_{i-1}                               both all-to-alls, attention and shared
``shortcut``    x_{i-1}                r: x_{i-1};  s: x_{i-1} + a_i         both all-to-alls, attention and shared
==============  =====================  ====================================  ======================================

(x - m is never computed by subtraction; it is the sum without m.) The first sub-block has nothing to leave out, so in a
ladder model the first attention *and* the first MLP read the embedding. At a border between wirings the reader's rule
holds for whatever came before: a ladder attention after a standard layer leaves out that layer's MLP (after a parallel
one, both its cores); a farskip attention leaves something out only after a farskip or shortcut layer.

No wiring adds a parameter: ``parallel`` keeps both norms, ``shortcut`` sends what routed and shared experts read
through the same norm. A checkpoint of a standard model loads into any wiring; what it computes then is another
function, which wants some training: about 3 billion tokens for the upper half of an 8B model (arXiv 2501.06589).

Sources: ladder, arXiv 2501.06589; farskip, arXiv 2511.11505; shortcut, arXiv 2404.05019.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["WIRINGS", "Wiring"]

WIRINGS = ("standard", "parallel", "ladder", "farskip", "shortcut")


@dataclass(frozen=True)
class Wiring:
    """The wiring of each layer of a stack.

    Attributes:
        layers: a name of :data:`WIRINGS` per layer, from the embedding to the head.
    """

    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        for index, name in enumerate(self.layers):
            check_choice("sonic.parallel.Wiring", f"layers[{index}]", name, WIRINGS)

    @classmethod
    def build(
        cls, num_layers: int, wiring: str = "ladder", ladder_layers: int | str | Sequence[int] = "upper_half"
    ) -> Wiring:
        """``wiring`` for some layers, ``standard`` for the others.

        Args:
            num_layers: layers of the stack.
            wiring: a name of :data:`WIRINGS`.
            ladder_layers: which layers have it: the last n, a list of indices (negative ones count from the end),
                ``"upper_half"`` (the last num_layers // 2), ``"all"`` or ``"none"``.

        Raises:
            ValueError: an unknown name, or a layer that is not there.
        """
        where = "sonic.parallel.Wiring.build"
        check_positive(where, num_layers=num_layers)
        check_choice(where, "wiring", wiring, WIRINGS)
        chosen = chosen_layers(where, num_layers, ladder_layers)
        return cls(tuple(wiring if index in chosen else "standard" for index in range(num_layers)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Wiring:
        """The wiring that :meth:`to_config` wrote, or that somebody wrote by hand.

        Args:
            config: ``num_layers`` and ``wiring``, a name or one name per layer; with a name, ``ladder_layers`` as for
                :meth:`build` (all layers if it is missing). Other keys are left alone.

        Raises:
            ValueError: a key is missing, or what it holds does not fit.
        """
        where = "sonic.parallel.Wiring.from_config"
        for key in ("num_layers", "wiring"):
            if key not in config:
                raise argument_error(where, "config", sorted(config), f"a mapping with {key!r}")
        num_layers, wiring = config["num_layers"], config["wiring"]
        if isinstance(wiring, str):
            return cls.build(num_layers, wiring, config.get("ladder_layers", "all"))
        if len(wiring) != num_layers:
            raise argument_error(where, "wiring", f"{len(wiring)} names", f"one for each of {num_layers} layers")
        return cls(tuple(wiring))

    def to_config(self) -> dict[str, Any]:
        """A dict of plain values, for the model's config: JSON keeps it, :meth:`from_config` reads it."""
        others = sorted(set(self.layers) - {"standard"})
        if len(others) > 1:
            return {"num_layers": len(self.layers), "wiring": list(self.layers)}
        name = others[0] if others else "standard"
        chosen = [index for index, layer in enumerate(self.layers) if layer == name] if others else []
        return {"num_layers": len(self.layers), "wiring": name, "ladder_layers": chosen}

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> str:
        return self.layers[index]


def chosen_layers(where: str, num_layers: int, layers: int | str | Sequence[int]) -> frozenset[int]:
    """The indices that ``layers`` names; see :meth:`Wiring.build`.

    Raises:
        ValueError: a layer that is not there, one that is named twice, or an unknown word.
    """
    if isinstance(layers, str):
        check_choice(where, "ladder_layers", layers, ("upper_half", "all", "none"))
        first = {"upper_half": num_layers - num_layers // 2, "all": 0, "none": num_layers}[layers]
        return frozenset(range(first, num_layers))
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 0 <= layers <= num_layers:
            raise argument_error(where, "ladder_layers", layers, f"a number of layers from 0 to {num_layers}")
        return frozenset(range(num_layers - layers, num_layers))
    if not isinstance(layers, Sequence):
        wanted = "a number, a list of indices, 'upper_half', 'all' or 'none'"
        raise argument_error(where, "ladder_layers", repr(layers), wanted)
    indices = []
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int) or not -num_layers <= index < num_layers:
            wanted = f"indices of {num_layers} layers"
            raise argument_error(where, "ladder_layers", list(layers), wanted)
        indices.append(index % num_layers)
    if len(set(indices)) != len(indices):
        raise argument_error(where, "ladder_layers", list(layers), "each layer once")
    return frozenset(indices)
