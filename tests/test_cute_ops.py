"""The grouped GEMMs in CuTe-DSL, in the simulator: every op against the reference, under every schedule.

Each kernel is compiled once in a process, for seconds of processor time; so a test is about one kernel, or neighbours
share theirs. Every test of this file runs with poisoned ``torch.empty``: an element that no kernel writes is NaN here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from sonic.kernels.cute import compiled  # noqa: E402
from sonic.kernels.cute.config import CANDIDATES, KINDS, TileConfig  # noqa: E402
from tests.cute_cases import (  # noqa: E402
    OUTPUTS,
    ROWS,
    SCHEDULES,
    Case,
    Values,
    assert_right,
    call,
    config,
    reference,
    simulate,
    values,
)
from tests.helpers import GATED, LAYOUTS, PLAIN, assert_as_good_as_torch, assert_same_bits  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16
COOPERATIVE, PINGPONG = False, True
NOT_A_CANDIDATE = TileConfig(64, 128, 8, PINGPONG, cluster_m=2)  # the only multicast of a weight that is mn-major


# ---------------------------------------------------------------- all kernels


def up(tile: tuple[Any, ...], activation: str, **options: Any) -> Case:
    kind = "up_gated" if activation in GATED else "up_plain"
    return Case("up_proj", config(kind, *tile), activation=activation, **options)


def down_bwd(tile: tuple[Any, ...], activation: str, **options: Any) -> Case:
    kind = "down_bwd_gated" if activation in GATED else "down_bwd_plain"
    return Case("down_proj_bwd_input", config(kind, *tile), activation=activation, **options)


def rows(op: str, *tile: Any, **options: Any) -> Case:
    return Case(op, config("rows", *tile), **options)


def contraction(op: str, *tile: Any, **options: Any) -> Case:
    return Case(op, config("contraction", *tile), **options)


INTERLEAVED = {"glu_layout": "interleaved"}
ORDERED = {"gathered": False}
INFERENCE = {"need": False}

CASES = (
    up((128, 256, COOPERATIVE, 2), "swiglu"),
    up((64, 256, PINGPONG, 2), "geglu", bias=True, **INTERLEAVED, **INFERENCE),
    up((128, 128, PINGPONG), "reglu", dtype=FP16, **ORDERED),
    up((128, 128, COOPERATIVE), "swiglu_oai", bias=True, **INTERLEAVED),
    up((128, 256, COOPERATIVE, 2), "gelu", dtype=FP16, bias=True),
    up((64, 128, PINGPONG), "relu", **ORDERED),
    up((128, 128, COOPERATIVE), "relu2", bias=True, **INFERENCE),
    up((128, 128, PINGPONG, 2), "silu", dtype=FP16),
    rows("down_proj", 128, 256, COOPERATIVE, bias=True),
    rows("down_proj", 128, 192, PINGPONG, dtype=FP16, scores=False),
    rows("up_proj_bwd_input", 128, 128, COOPERATIVE, dtype=FP16, activation="silu"),
    rows("up_proj_bwd_input", 64, 256, PINGPONG),
    down_bwd((128, 128, COOPERATIVE), "swiglu"),
    down_bwd((64, 128, PINGPONG), "geglu", bias=True, **INTERLEAVED, **ORDERED),
    down_bwd((128, 128, COOPERATIVE), "reglu", dtype=FP16, **INTERLEAVED),
    down_bwd((64, 128, PINGPONG), "swiglu_oai", bias=True),
    down_bwd((64, 128, PINGPONG), "gelu"),
    down_bwd((128, 128, COOPERATIVE), "relu", dtype=FP16, bias=True, **ORDERED),
    down_bwd((64, 256, PINGPONG), "relu2", scores=False),
    down_bwd((128, 128, PINGPONG), "silu", bias=True, **INFERENCE),
    contraction("down_proj_bwd_weight", 128, 256, COOPERATIVE, adds=True),
    contraction("down_proj_bwd_weight", 128, 128, PINGPONG, dtype=FP16, bias=True, **ORDERED),
    contraction("up_proj_bwd_weight", 128, 128, PINGPONG),
    contraction("up_proj_bwd_weight", 128, 64, COOPERATIVE, dtype=FP16, bias=True, activation="silu"),
    contraction("up_proj_bwd_weight", 128, 256, COOPERATIVE, dtype=FP16, adds=True, **ORDERED),
)
MORE = (
    up((128, 128, PINGPONG), "swiglu", dtype=FP16, bias=True, **INTERLEAVED),
    up((128, 256, COOPERATIVE), "geglu", dtype=FP16, bias=True, **ORDERED),
    up((64, 128, PINGPONG), "reglu", bias=True, **INTERLEAVED, **INFERENCE),
    up((128, 128, COOPERATIVE, 2), "reglu", bias=True, **ORDERED),
    up((128, 128, PINGPONG, 2), "swiglu_oai", bias=True, **ORDERED),
    rows("down_proj", 64, 128, PINGPONG),
    rows("down_proj", 128, 128, PINGPONG, scores=False, bias=True),
    rows("up_proj_bwd_input", 128, 256, COOPERATIVE),
    Case("up_proj_bwd_input", NOT_A_CANDIDATE),
    down_bwd((64, 128, PINGPONG), "swiglu", dtype=FP16, bias=True, scores=False, **INTERLEAVED),
    down_bwd((128, 128, COOPERATIVE), "geglu", **ORDERED),
    down_bwd((128, 128, COOPERATIVE), "swiglu_oai", dtype=FP16, bias=True, **INTERLEAVED),
    contraction("down_proj_bwd_weight", 128, 64, COOPERATIVE, bias=True, adds=True),
)
ALL_CASES = [
    *(pytest.param(case, marks=pytest.mark.long) for case in CASES),
    *(pytest.param(case, marks=pytest.mark.slow) for case in MORE),
]


def test_the_cases_hold_everything_once() -> None:
    """What a key can say: each activation in each layout, each tile and schedule of each kind, each option."""
    met: dict[str, set[Any]] = {}
    for case in CASES:
        for name, value in dataclasses.asdict(case).items():
            met.setdefault(f"{case.op}: {name}", set()).add(value if name != "config" else None)
    for op in OUTPUTS:
        assert met[f"{op}: dtype"] == {BF16, FP16}
    for op in ("up_proj", "down_proj_bwd_input", "down_proj_bwd_weight", "up_proj_bwd_weight"):
        assert met[f"{op}: gathered"] == {True, False}
        assert met[f"{op}: bias"] == {True, False}
    for op in ("down_proj", "down_proj_bwd_input"):
        assert met[f"{op}: scores"] == {True, False}
    for op in ("up_proj", "down_proj_bwd_input"):
        assert met[f"{op}: activation"] == {*GATED, *PLAIN} and met[f"{op}: need"] == {True, False}
        assert {case.glu_layout for case in CASES if case.op == op and case.activation in GATED} == set(LAYOUTS)
    tried = {(c.kind, c.config.pingpong, c.config.cluster_m) for c in CASES}
    assert tried >= {(kind, c.pingpong, c.cluster_m) for kind in KINDS for c in CANDIDATES[kind]}


NAN, INF = float("nan"), float("inf")
WITH_ERF = ("gelu", "geglu")  # simulating it takes long, so those get fewer rows


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_kernel(case: Case) -> None:
    """Right, the same to the last bit under other schedules, and what is not finite stays where it belongs."""
    given = values(case, (0, 1, 129, 7) if case.activation in WITH_ERF else ROWS)
    got = simulate(case, given, *SCHEDULES[0])
    assert_right(case, given, got)
    assert_same_bits(simulate(case, given, *SCHEDULES[1]), got)
    bad, rows_of_it, experts_of_it = poisoned(case, given)
    assert_same_but(simulate(case, bad, *SCHEDULES[2]), got, rows_of_it, experts_of_it, call(case, bad, "reference"))


def poisoned(case: Case, given: Values) -> tuple[Values, list[int], list[int]]:
    """NaN in the last row of the last expert but one, infinity in the first of the last; in the weights of the first
    two, of which one has no rows, NaN.

    Returns:
        The values, and which rows and experts have to do with it.
    """
    bad = given.copy()
    border, last = int(given.offset[-2]), len(given.offset) - 2
    for row, value, unused in ((border - 1, NAN, -1), (border, INF, -2)):
        for tensor in (bad.h, bad.a, bad.dh, bad.scores):
            tensor[row] = value
        if bad.token is not None:
            bad.token[row] = len(bad.x) + unused
            row = unused
        bad.x[row] = bad.dout[row] = value
    for weight in (bad.w1, bad.w2, bad.b1, bad.b2):
        weight[:2] = NAN
    if case.op.endswith("_bwd_weight"):
        return bad, [], [last - 1, last]
    return bad, [*range(int(given.offset[2])), border - 1, border], []


def assert_same_but(
    got: dict[str, Tensor], want: dict[str, Tensor], rows: list[int], experts: list[int], plain: dict[str, Tensor]
) -> None:
    """To the last bit but for some rows and experts; and what is not finite with the reference is not finite here.

    The other way round torch's derivatives of relu turn NaN into 0; and at infinity it is a matter of order whether
    there is 0 times infinity in a derivative.
    """
    for name, value in got.items():
        changed = rows if name.rpartition("_")[2].startswith("R") else experts
        same = torch.ones(len(value), dtype=torch.bool)
        if len(value):
            same[changed] = False
        assert_same_bits({name: value[same]}, {name: want[name][same]})
        hidden = value.isfinite() & ~plain[name].isfinite()
        if name in OUTPUTS["down_proj_bwd_input"] and len(value):
            hidden[rows[-1]] = False
        assert not hidden.any(), f"{name}: finite, and should not be"
        assert not value.numel() or not value.isfinite().all(), f"{name}: nothing was poisoned"


# ---------------------------------------------------------------- edges, one kernel for each op

REGLU = {"activation": "reglu", "bias": True}
ONE_OF_EACH = {
    "up_proj": up((128, 128, PINGPONG), **REGLU),
    "down_proj": rows("down_proj", 128, 128, PINGPONG, bias=True),
    "down_proj_bwd_input": down_bwd((64, 128, PINGPONG), **REGLU),
    "up_proj_bwd_input": rows("up_proj_bwd_input", 128, 128, PINGPONG),
    "down_proj_bwd_weight": contraction("down_proj_bwd_weight", 128, 64, COOPERATIVE, bias=True),
    "up_proj_bwd_weight": contraction("up_proj_bwd_weight", 128, 64, COOPERATIVE, bias=True),
}
SMALL = (72, 40)  # widths where there are many experts
EDGES: dict[str, dict[str, Any]] = {
    "one row of one token": {"rows": (1,), "tokens": 1},
    "one expert": {"rows": (200,)},
    "all experts empty but one": {"rows": (0, 0, 150, 0)},
    "as many experts as a warp has lanes less one": {"rows": [n * 7 % 5 for n in range(31)], "widths": SMALL},
    "as many experts as a warp has lanes": {"rows": [n * 7 % 5 for n in range(32)], "widths": SMALL},
    "more experts than a warp has lanes": {"rows": [130, *(n * 7 % 5 for n in range(39))], "widths": SMALL},
    "more than two warps have": {"rows": [*([0] * 64), 5, 0, 1], "widths": SMALL},
    "the narrowest widths": {"rows": (5, 0, 66), "widths": (8, 8)},
    "many tiles of columns": {"rows": (5, 70), "widths": (264, 392)},
}


def of_sizes(edge: str, op: str) -> None:
    schedule = SCHEDULES[list(EDGES).index(edge) % len(SCHEDULES)]
    case = ONE_OF_EACH[op]
    given = values(case, **EDGES[edge])
    assert_right(case, given, simulate(case, given, *schedule))


def small_integers_are_exact(op: str) -> None:
    """Where every order of adding gives the same, so does this one; main grads included."""
    cases = [ONE_OF_EACH[op]]
    if op.endswith("_bwd_weight"):
        cases.append(dataclasses.replace(cases[0], adds=True))
    for case in cases:
        given = values(case, (3, 0, 130, 66), integers=True)
        exact = reference(case, given)[0]
        for name, value in simulate(case, given, *SCHEDULES[2]).items():
            assert torch.equal(value, exact[name].to(value.dtype)), name


def no_rows(op: str) -> None:
    """Gradients of weights are zeros, and main grads stay as they are; nothing is launched."""
    before = compiled.num_compiled()
    for num_tokens, adds in ((0, False), (5, False), (5, True)):
        case = dataclasses.replace(ONE_OF_EACH[op], adds=adds and op.endswith("_bwd_weight"))
        given = values(case, (0, 0, 0), tokens=num_tokens)
        got, plain = simulate(case, given), call(case, given, "reference")
        assert {name: value.shape for name, value in got.items()} == {name: v.shape for name, v in plain.items()}
        assert_same_bits(got, plain)
    assert compiled.num_compiled() == before


def rows_of_no_expert(op: str) -> None:
    """Room after the last expert's rows, as a dispatcher leaves it: zeros, whatever stands there.

    In order; and by index, where the same kernel serves that.
    """
    base = ONE_OF_EACH[op]
    ordered = dataclasses.replace(base, gathered=False)
    for case, num_experts in ((ordered, 3), (ordered, 31), (base, 3)):
        given = values(case, [70, *[n % 3 for n in range(1, num_experts)]], tail=140, widths=SMALL)
        assert_right(case, given, simulate(case, given, *SCHEDULES[num_experts % 3]))


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second of a wider tensor whose others are large."""
    return torch.stack((tensor, torch.full_like(tensor, 1000)), dim=-1)[..., 0]


def shifted(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element after the beginning of its memory: not at whole 16 bytes."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)


def inputs_of_any_stride_and_place(op: str) -> None:
    case = ONE_OF_EACH[op]
    given = values(case, (5, 0, 70), widths=SMALL)
    want = simulate(case, given)
    for place in (strided, shifted):
        there = Values(*(place(value) if isinstance(value, Tensor) else value for value in vars(given).values()))
        assert not there.w1.is_contiguous() or there.w1.data_ptr() % 16
        assert_same_bits(simulate(case, there), want)


def main_grad_at_any_place(op: str) -> None:
    """A view of a buffer of all gradients need not begin at whole 16 bytes."""
    case = dataclasses.replace(ONE_OF_EACH[op], adds=True, bias=False)
    given = values(case, (5, 0, 70), widths=SMALL)
    before = given.grad_w1 if op == "up_proj_bwd_weight" else given.grad_w2
    grad = shifted(before)
    assert grad.data_ptr() % 16
    got = simulate(case, given, main_grad=grad)
    assert got["main_grad"] is grad and not torch.equal(grad, before)
    assert_same_bits(got, simulate(case, given))


def bias_gradient_alone(op: str) -> None:
    """The main grad is left alone then."""
    weight, bias = OUTPUTS[op]
    for adds in (False, True):
        case = dataclasses.replace(ONE_OF_EACH[op], need=False, adds=adds)
        given = values(case, (5, 0, 70), widths=SMALL)
        got = simulate(case, given)
        assert got[weight].shape[0] == 0
        plain = dataclasses.replace(case, adds=False)
        exact, same = (call(plain, v, "reference")[bias] for v in (given.widened(), given))
        assert_as_good_as_torch(bias, got[bias], exact, same)
        if adds:
            assert torch.equal(got["main_grad"], given.grad_w2 if op == "down_proj_bwd_weight" else given.grad_w1)


CHECKS = {
    **{edge: functools.partial(of_sizes, edge) for edge in EDGES},
    "no rows": no_rows,
    "small integers are exact": small_integers_are_exact,
    "inputs of any stride and place": inputs_of_any_stride_and_place,
    "rows of no expert": rows_of_no_expert,
    "main grad at any place": main_grad_at_any_place,
    "bias gradient alone": bias_gradient_alone,
}
OF_WEIGHTS = ("main grad at any place", "bias gradient alone")


@pytest.mark.parametrize(
    ("op", "check"),
    [
        pytest.param(op, check, marks=() if op in ("up_proj", "up_proj_bwd_weight") else pytest.mark.long)
        for op in OUTPUTS
        for check in CHECKS
        if check not in OF_WEIGHTS or op.endswith("_bwd_weight")
    ],
)
def test_edges(op: str, check: str) -> None:
    """Tests of one op stand together, so that few processes compile its kernel."""
    CHECKS[check](op)


@pytest.mark.slow
@pytest.mark.parametrize("case", list({case.op: case for case in reversed(CASES)}.values()), ids=lambda case: case.op)
def test_fifty_times_the_same_bits(case: Case) -> None:
    """Of every op, whatever order its warps come in."""
    given = values(case, (0, 1, 9, 7))
    want = simulate(case, given, *SCHEDULES[0])
    for seed in range(1, 50):
        assert_same_bits(simulate(case, given, SCHEDULES[seed % len(SCHEDULES)][0], seed), want)


def test_sizes_compile_nothing() -> None:
    """One function serves any number of rows, experts, tokens and columns."""
    case = ONE_OF_EACH["up_proj_bwd_input"]
    simulate(case, values(case, (1,)))
    before = compiled.num_compiled()
    for edge in list(EDGES)[3:]:
        simulate(case, values(case, **EDGES[edge]))
    assert compiled.num_compiled() == before
