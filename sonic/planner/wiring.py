"""The graph of a model under each wiring: who reads the residual stream when, and in which order it all is issued.

With x the residual stream, A attention, M the MLP or experts (S its shared expert, E its routed ones):

=========  ==========================================================================================================
standard   a = x + A(x); x' = a + M(a)
parallel   x' = x + A(x) + M(x), one all-reduce
ladder     A reads the stream without the M before it, M the stream without the A before it; the stream is the full sum
farskip    A reads the stream without the routed experts before it, M the stream without the A before it; as standard
           in layers without experts
shortcut   a = x + A(x); x' = a + S(a) + E(x); as standard in layers without experts
=========  ==========================================================================================================

Within a layer the routed experts' tokens are sent as early as the wiring allows, shared experts are computed while they
travel, and ``send_after`` says after which piece of attention ladder and farskip route: the chain of summing what came
back, routing and sending stands between two pieces of attention. In backward, linears let an all-reduce of their
input's gradient start before the gradient of their weights; the experts' backward is one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sonic.planner.costs import Piece, PieceCosts
from sonic.planner.models import Model
from sonic.planner.schedule import COMPUTE, Node

__all__ = ["EP", "SEND_AFTER", "TP", "WIRINGS", "Exchange", "build"]

WIRINGS = ("standard", "parallel", "ladder", "farskip", "shortcut")
SEND_AFTER = ("qkv", "core", "output")
TP, EP = "tp all-reduce", "ep all-to-all"


@dataclass(frozen=True)
class Exchange:
    """Collectives of one sub-block: seconds of an all-reduce and of an all-to-all (0: none), and their links."""

    reduce: float = 0.0
    reduce_link: str = ""
    send: float = 0.0
    send_link: str = ""


def build(
    model: Model,
    costs: PieceCosts,
    exchange: Exchange,
    wirings: Sequence[str],
    send_after: str = "core",
) -> list[Node]:
    """The graph, from the embedding to the loss.

    Args:
        model, costs: shapes, and seconds of compute.
        exchange: seconds of collectives.
        wirings: of each layer.
        send_after: one of :data:`SEND_AFTER`.
    """
    builder = _Builder(model, costs, exchange, send_after)
    for layer, wiring in enumerate(wirings):
        builder.layer = layer
        getattr(builder, f"add_{wiring}")()
    return builder.finish()


class _Builder:
    """Adds one layer after another.

    Attributes:
        full: the residual stream, complete.
        before_mlp: the same without the last MLP or experts: what attention of a ladder reads.
        before_routed: the same without the last routed experts: what attention of farskip reads.
    """

    def __init__(self, model: Model, costs: PieceCosts, exchange: Exchange, send_after: str) -> None:
        self.model, self.costs, self.exchange, self.send_after = model, costs, exchange, send_after
        self.nodes: list[Node] = []
        self.pieces: dict[tuple[object, ...], Piece] = {}  # layers are alike
        self.layer = 0
        self.full = self.compute("embedding", (), costs.embedding())
        self.before_mlp = self.before_routed = self.full

    def finish(self) -> list[Node]:
        self.layer = self.model.num_layers
        self.compute("head", (self.enter(self.full, "head"),), self.costs.head())
        return self.nodes

    # ---------------------------------------------------------------- pieces

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def piece(self, name: str, *arguments: int | bool) -> Piece:
        """Seconds of the method ``name`` of the costs."""
        key = (name, *arguments)
        if key not in self.pieces:
            self.pieces[key] = getattr(self.costs, name)(*arguments)
        return self.pieces[key]

    def compute(self, name: str, inputs: Sequence[int], piece: Piece) -> int:
        seconds = (piece.forward, piece.input_gradient, piece.weight_gradient)
        return self.add(Node(f"{self.layer}.{name}", tuple(inputs), COMPUTE, *seconds, layer=self.layer))

    def joint(self, *inputs: int) -> int:
        return self.add(Node(f"{self.layer}.sum", inputs, layer=self.layer))

    def enter(self, read: int, what: str) -> int:
        """The input of column-parallel products: nothing forward, an all-reduce backward."""
        if not self.exchange.reduce:
            return read
        name, link = f"{self.layer}.{what} enter", self.exchange.reduce_link
        return self.add(Node(name, (read,), TP, 0.0, self.exchange.reduce, link=link, layer=self.layer))

    def reduce(self, read: int, what: str) -> int:
        """The output of row-parallel products: an all-reduce forward, nothing backward."""
        if not self.exchange.reduce:
            return read
        name, link = f"{self.layer}.{what} reduce", self.exchange.reduce_link
        return self.add(Node(name, (read,), TP, self.exchange.reduce, link=link, layer=self.layer))

    def send(self, name: str, read: int) -> int:
        """An all-to-all, in both directions."""
        if not self.exchange.send:
            return read
        seconds, link = self.exchange.send, self.exchange.send_link
        return self.add(Node(f"{self.layer}.{name}", (read,), EP, seconds, seconds, link=link, layer=self.layer))

    def attention(self, read: int, between: dict[str, object] | None = None) -> int:
        """Attention on ``read``, which is entered already; ``between`` is called after the piece that it names."""
        between = between or {}
        pieces = (
            ("qkv", self.piece("qkv")),
            ("core", self.piece("core", self.model.has_full_attention(self.layer))),
            ("output", self.piece("output")),
        )
        for name, piece in pieces:
            read = self.compute(name, (read,), piece)
            if name in between:
                between[name]()  # type: ignore[operator]
        return read

    def mlp(self, read: int) -> int:
        inner = self.compute("mlp_in", (read,), self.piece("mlp_in", self.model.intermediate_size, True))
        return self.compute("mlp_out", (inner,), self.piece("mlp_out", self.model.intermediate_size))

    def route(self, read: int) -> int:
        """Router and dispatch."""
        return self.send("dispatch", self.compute("router", (read,), self.piece("router")))

    def shared(self, read: int, with_norm: bool = False) -> int | None:
        width = self.model.shared_intermediate_size
        if not width:
            return None
        inner = self.compute("shared_in", (read,), self.piece("mlp_in", width, with_norm))
        return self.compute("shared_out", (inner,), self.piece("mlp_out", width))

    def experts(self, sent: int) -> int:
        return self.send("combine", self.compute("experts", (sent,), self.piece("experts")))

    # ---------------------------------------------------------------- layers

    @property
    def is_moe(self) -> bool:
        return self.model.is_moe(self.layer)

    def close(self, *inputs: int) -> None:
        """The stream is complete, and no later reader may miss a part of it."""
        self.full = self.before_mlp = self.before_routed = self.joint(*inputs)

    def ffn(self, read: int) -> int:
        """MLP or experts on ``read``, reduced."""
        entered = self.enter(read, "mlp")
        if not self.is_moe:
            return self.reduce(self.mlp(entered), "mlp")
        sent = self.route(entered)
        shared = self.shared(entered)
        routed = self.experts(sent)
        return self.reduce(routed if shared is None else self.joint(routed, shared), "mlp")

    def add_standard(self) -> None:
        entered = self.enter(self.full, "attention")
        middle = self.joint(self.full, self.reduce(self.attention(entered), "attention"))
        self.close(middle, self.ffn(middle))
        self.before_mlp = middle
        self.before_routed = middle if self.is_moe else self.full

    def add_parallel(self) -> None:
        entered = self.enter(self.full, "layer")
        sent = self.route(entered) if self.is_moe else entered
        parts = [self.attention(entered)]
        if self.is_moe:
            shared = self.shared(entered)
            parts += [part for part in (shared, self.experts(sent)) if part is not None]
        else:
            parts.append(self.mlp(entered))
        self.close(self.full, self.reduce(self.joint(*parts), "layer"))

    def add_ladder(self) -> None:
        full, sent = self.full, {}

        def route() -> None:
            sent["entered"] = self.enter(full, "mlp")
            sent["rows"] = self.route(sent["entered"])

        if not self.is_moe:
            attention = self.reduce(self.attention(self.enter(self.before_mlp, "attention")), "attention")
            output = self.reduce(self.mlp(self.enter(full, "mlp")), "mlp")
        else:
            entered = self.enter(self.before_mlp, "attention")
            attention = self.reduce(self.attention(entered, {self.send_after: route}), "attention")
            shared = self.shared(sent["entered"])
            routed = self.experts(sent["rows"])
            output = self.reduce(routed if shared is None else self.joint(routed, shared), "mlp")
        self.before_mlp = self.joint(full, attention)
        self.full = self.joint(self.before_mlp, output)
        self.before_routed = self.before_mlp if self.is_moe else self.full

    def add_farskip(self) -> None:
        if not self.is_moe:
            self.add_standard()
            return
        full, sent = self.full, {}

        def route() -> None:
            sent["entered"] = self.enter(full, "mlp")
            sent["rows"] = self.route(sent["entered"])

        entered = self.enter(self.before_routed, "attention")
        attention = self.reduce(self.attention(entered, {self.send_after: route}), "attention")
        known = [full, attention]
        shared = self.shared(sent["entered"])
        if shared is not None:  # a sum of its own, since the next attention reads it before the routed experts' sum
            known.append(self.reduce(shared, "shared"))
        routed = self.reduce(self.experts(sent["rows"]), "experts")
        self.before_routed = self.joint(*known)
        self.before_mlp = self.joint(full, attention)
        self.full = self.joint(self.before_routed, routed)

    def add_shortcut(self) -> None:
        if not self.is_moe:
            self.add_standard()
            return
        entered, routed = self.enter(self.full, "layer"), {}
        sent = self.route(entered)

        def experts() -> None:
            routed["rows"] = self.experts(sent)

        middle = self.joint(self.full, self.reduce(self.attention(entered, {"core": experts}), "attention"))
        parts = [routed["rows"]]
        if self.model.shared_intermediate_size:
            shared = self.shared(self.enter(middle, "shared"), with_norm=True)
            parts += [shared] if shared is not None else []
        self.close(middle, self.reduce(self.joint(*parts), "mlp"))
