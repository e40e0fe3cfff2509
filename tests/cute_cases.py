"""Problems and calls for the tests of the CuTe-DSL kernels: a case names a kernel, values are what it is given.

Nothing here imports CuTe-DSL before a kernel is launched.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sonic.kernels import ops
from sonic.kernels.cute.config import CANDIDATES, TileConfig
from sonic.kernels.cute.keys import GATED_ACTIVATIONS, forced
from sonic.simulator import Trace, hopper
from tests.helpers import assert_as_good_as_torch, short

OUTPUTS = {
    "up_proj": ("h_RU", "a_RN"),
    "down_proj": ("y_RD",),
    "down_proj_bwd_input": ("dh_RU", "scaled_a_RN", "dscores_R"),
    "down_proj_bwd_weight": ("dw2_EDN", "db2_ED"),
    "up_proj_bwd_input": ("dx_RD",),
    "up_proj_bwd_weight": ("dw1_EUD", "db1_EU"),
}
SCHEDULES = (("eager", 0), ("lazy", 0), ("random", 1))

ROWS = (0, 1, 7, 64, 127, 129, 300)
"""Of each expert: none, one, less than a tile, a tile of 64, around one of 128, several."""

UNUSED = 2
"""Tokens at the end that no row names."""


def config(kind: str, tile_m: int, tile_n: int, pingpong: bool, cluster_m: int = 1) -> TileConfig:
    """The candidate of this tile and schedule, with the slots and registers that it has on a GPU."""
    wanted = (tile_m, tile_n, pingpong, cluster_m)
    found = [c for c in CANDIDATES[kind] if (c.tile_m, c.tile_n, c.pingpong, c.cluster_m) == wanted]
    assert len(found) == 1, f"{kind} has {len(found)} candidates {wanted}"
    return found[0]


@dataclass(frozen=True)
class Case:
    """A kernel: what its key depends on.

    Attributes:
        op: its name.
        config: tile and schedule.
        dtype: of the matrices.
        gathered: rows come through an index; else X and dO stand in the order of the rows.
        activation, glu_layout: as in the ops.
        bias, scores: given; ``bias`` asks the weight gradients for those of the biases.
        need: the first of what can be left out: H, dH, or the weight's gradient.
        adds: to a main grad.
    """

    op: str
    config: TileConfig
    dtype: torch.dtype = torch.bfloat16
    gathered: bool = True
    activation: str = "swiglu"
    glu_layout: str = "concatenated"
    bias: bool = False
    scores: bool = True
    need: bool = True
    adds: bool = False

    @property
    def kind(self) -> str:
        """Of :data:`sonic.kernels.cute.config.KINDS`."""
        gated = "gated" if self.activation in GATED_ACTIVATIONS else "plain"
        kinds = {"up_proj": f"up_{gated}", "down_proj_bwd_input": f"down_bwd_{gated}"}
        return kinds.get(self.op, "contraction" if self.op.endswith("_bwd_weight") else "rows")

    def __str__(self) -> str:
        tile = self.config
        words = [self.op, short(self.dtype)]
        if self.op in ("up_proj", "down_proj_bwd_input"):
            words += [self.activation, *([self.glu_layout] if self.activation in GATED_ACTIVATIONS else [])]
        words += ["gathered" if self.gathered else "ordered"]
        words += [word for word in ("bias", "scores", "need", "adds") if getattr(self, word)]
        words += [f"{tile.tile_m}x{tile.tile_n}", "pingpong" if tile.pingpong else "cooperative"]
        return "-".join([*words, *(["cluster2"] if tile.cluster_m == 2 else [])])


@dataclass
class Values:
    """Inputs of all ops for one routing, by the names that these give them; rows in the order of experts.

    Attributes:
        x, dout: (T, D), or (R, D) where rows are not gathered.
        h, a, dh: (R, U), (R, N), (R, U).
        scores: (R,) float32.
        w1, w2, b1, b2: weights and biases.
        grad_w1, grad_w2: float32 main grads.
        token: (R,) int32 or None.
        offset: (E + 1,) int32.
    """

    x: Tensor
    dout: Tensor
    h: Tensor
    a: Tensor
    dh: Tensor
    scores: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor
    b2: Tensor
    grad_w1: Tensor
    grad_w2: Tensor
    token: Tensor | None
    offset: Tensor

    def copy(self) -> Values:
        """The same values in memory of their own."""
        return Values(*(value.clone() if isinstance(value, Tensor) else value for value in vars(self).values()))

    def widened(self) -> Values:
        """In float64."""
        return Values(
            *(
                value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in vars(self).values()
            )
        )


def values(
    case: Case,
    rows: Sequence[int] = ROWS,
    *,
    tokens: int = 150,
    widths: tuple[int, int] = (136, 72),
    tail: int = 0,
    integers: bool = False,
    seed: int = 0,
) -> Values:
    """Random inputs on unit scale, or small integers.

    Args:
        case: whose dtype and activation they are for, and whether its rows are gathered.
        rows: of each expert.
        tokens: T, if rows are gathered.
        widths: D and N; neither is a multiple of a tile or of a step.
        tail: rows after the last offset, NaN where they may be (a row that is gathered has to be one: token 0).
        integers: -2 to 2, scores 0.5, 1 or 2: every sum is exact in float32.
        seed: of the random numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    width_d, width_n = widths
    width_u = 2 * width_n if case.activation in GATED_ACTIVATIONS else width_n
    num_rows, num_experts = sum(rows), len(rows)
    num_tokens = tokens if case.gathered else num_rows
    spread = 4.0 if case.activation == "swiglu_oai" else 1.0  # so that its clamps are met

    def fill(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=draw).to(case.dtype)
        return (torch.randn(shape, generator=draw) * scale).to(case.dtype)

    def longer(tensor: Tensor, value: float = float("nan")) -> Tensor:
        return torch.cat((tensor, tensor.new_full((tail, *tensor.shape[1:]), value)))

    x, dout = fill(num_tokens, width_d), fill(num_tokens, width_d)
    scores = torch.rand(num_rows, generator=draw) + 0.1
    if integers:
        scores = 0.5 * 2.0 ** torch.randint(0, 3, (num_rows,), generator=draw)
    token = None
    if case.gathered:
        token = longer(torch.randint(0, max(tokens - UNUSED, 1), (num_rows,), generator=draw, dtype=torch.int32), 0)
    else:
        x, dout = longer(x), longer(dout)
    return Values(
        x,
        dout,
        longer(fill(num_rows, width_u, scale=spread)),
        longer(fill(num_rows, width_n)),
        longer(fill(num_rows, width_u)),
        longer(scores),
        fill(num_experts, width_u, width_d, scale=spread / width_d**0.5),
        fill(num_experts, width_d, width_n, scale=width_n**-0.5),
        fill(num_experts, width_u, scale=0.5),
        fill(num_experts, width_d, scale=0.5),
        fill(num_experts, width_u, width_d).float(),
        fill(num_experts, width_d, width_n).float(),
        token,
        torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32),
    )


def call(case: Case, given: Values, backend: str, main_grad: Tensor | None = None) -> dict[str, Tensor]:
    """What the op returns, by name; where the case adds, also ``main_grad`` afterwards: by default a copy of the one
    that is given with the other values.
    """
    names = (case.activation, case.glu_layout)
    b1, b2 = (given.b1, given.b2) if case.bias else (None, None)
    scores = given.scores if case.scores else None
    token, offset = given.token, given.offset
    grads = {"up_proj_bwd_weight": given.grad_w1, "down_proj_bwd_weight": given.grad_w2}
    if case.adds and main_grad is None:
        main_grad = grads[case.op].float().clone()
    wanted = (case.need, case.bias, main_grad, backend)
    if case.op == "up_proj":
        got = ops.up_proj(given.x, given.w1, b1, token, offset, *names, case.need, backend)
    elif case.op == "down_proj":
        got = ops.down_proj(given.a, given.w2, b2, scores, offset, backend)
    elif case.op == "down_proj_bwd_input":
        rows = (scores, token, offset)
        got = ops.down_proj_bwd_input(given.dout, given.h, given.w2, b2, *rows, *names, case.need, case.need, backend)
    elif case.op == "up_proj_bwd_input":
        got = ops.up_proj_bwd_input(given.dh, given.w1, offset, backend)
    elif case.op == "down_proj_bwd_weight":
        got = ops.down_proj_bwd_weight(given.dout, given.a, scores, token, offset, *wanted)
    else:
        got = ops.up_proj_bwd_weight(given.dh, given.x, token, offset, *wanted)
    named = dict(zip(OUTPUTS[case.op], (got,) if isinstance(got, Tensor) else got, strict=True))
    return named if main_grad is None else named | {"main_grad": main_grad}


def reference(case: Case, given: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the reference makes of it, in float64 and in the dtype of the case."""
    if not case.adds:
        return call(case, given.widened(), "reference"), call(case, given, "reference")
    plain = call(case, given, "reference")
    exact = call(dataclasses.replace(case, adds=False), given.widened(), "reference")
    weight = OUTPUTS[case.op][0]
    grad = given.grad_w1 if case.op == "up_proj_bwd_weight" else given.grad_w2
    exact["main_grad"] = grad.double() + exact[weight]
    exact[weight] = exact[weight][:0]
    return exact, plain


def simulate(
    case: Case, given: Values, schedule: str = "eager", seed: int = 0, main_grad: Tensor | None = None
) -> dict[str, Tensor]:
    """What the kernel makes of it in the simulator, without a complaint; inputs stay as they are."""
    before = given.copy()
    with forced({case.kind: case.config}), hopper(schedule, seed, line_info=False) as simulation:
        got = call(case, given, "cute", main_grad)
    assert_no_warnings(simulation.traces)
    for name, value in vars(given).items():
        was = getattr(before, name)
        same = value is None if was is None else torch.equal(value.nan_to_num(7.0), was.nan_to_num(7.0))
        assert same, f"{name} was changed"
    return got


def assert_no_warnings(traces: Sequence[Trace]) -> None:
    """The simulator has told of no missing fence, and of no store that was not waited for."""
    told = [text for trace in traces for text in trace.warnings]
    assert not told, told


def assert_right(case: Case, given: Values, got: dict[str, Tensor]) -> None:
    """As right as the reference in the same dtype; zeros in the rows after the last offset."""
    exact, plain = reference(case, given)
    assert list(got) == list(exact)
    last = int(given.offset[-1])
    for name, value in got.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        by_row = name.rpartition("_")[2].startswith("R") and len(value) > last
        if by_row and name != "scaled_a_RN":
            assert not value[last:].any(), f"{name}: rows of no expert"
        owned = slice(last) if by_row else slice(None)
        dtype = torch.float32 if name == "main_grad" else case.dtype
        assert_as_good_as_torch(f"{case.op}: {name}", value[owned], exact[name][owned], plain[name][owned], dtype)
