"""Triton's grouped GEMMs and gather-and-sum: every op against the reference, the whole layer against the token loop.

Without a GPU the kernels are interpreted, on CPU tensors, with tiles of 16 or 32 rows by 32 columns in steps of 32; so
the shapes are small, and still have several of each. With one they run there, bf16 included.

Every test of this file runs with poisoned ``torch.empty``: an element that no kernel writes is NaN here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic import kernels
from sonic.kernels import UnsupportedError, ops
from tests.helpers import (
    ACTIVATION_LAYOUTS,
    GATED,
    SAVE_MODES,
    Problem,
    Shape,
    assert_all_as_good_as_torch,
    assert_as_good_as_torch,
    assert_same_bits,
    dense_loop,
    gradients,
    make_problem,
    problem_of,
    results,
    shape_ids,
    short,
    sonic_results,
    torch_experts,
)

pytest.importorskip("triton")

from sonic.kernels.triton import grouped_gemm, loaders  # noqa: E402  (import Triton)
from sonic.kernels.triton.target import interprets  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities

HAS_GPU = torch.cuda.is_available() and not interprets()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else []))
needs_interpreter = pytest.mark.skipif(not interprets(), reason="about the interpreter: needs TRITON_INTERPRET=1")

# (T, D, N, E, K): widths of 16-byte strides in every dtype, several column tiles; widths of none; for the whole layer
SMALL = (11, 24, 40, 3, 2)
ODD = (11, 21, 35, 3, 2)
TINY = (5, 12, 20, 3, 2)

OUTPUTS = {
    "up_proj": ("h_RU", "a_RN"),
    "down_proj": ("y_RD",),
    "combine": ("out_TD",),
    "down_proj_bwd_input": ("dh_RU", "scaled_a_RN", "dscores_R"),
    "down_proj_bwd_weight": ("dw2_EDN", "db2_ED"),
    "up_proj_bwd_input": ("dx_RD",),
    "up_proj_bwd_weight": ("dw1_EUD", "db1_EU"),
}
ZERO_WHERE_UNOWNED = ("y_RD", "dh_RU", "dscores_R", "dx_RD")
UNDEFINED_WHERE_UNOWNED = ("h_RU", "a_RN", "scaled_a_RN")


# ---------------------------------------------------------------- how the kernels are called


def placed(value: Any) -> Any:
    """A tensor on the device that Triton has; anything else as it is."""
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def triton_results(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """``out`` and the gradient of every leaf by ``sonic.moe_mlp``, on the CPU."""
    there = dataclasses.replace(problem, **{name: placed(value) for name, value in vars(problem).items()})
    return {name: value.cpu() for name, value in sonic_results(there, backend="triton", **options).items()}


def assert_layer(problem: Problem, **options: Any) -> None:
    """As right as plain torch in the same dtype, forward and every gradient, against the token loop in float64."""
    exact, plain = results(dense_loop, problem, torch.float64), results(torch_experts, problem)
    assert_all_as_good_as_torch(triton_results(problem, **options), exact, plain, problem.x.dtype)


def run(op: str, args: tuple[Any, ...], backend: str = "triton", **options: Any) -> dict[str, Tensor]:
    """One op's outputs by name, on the CPU."""
    values = [placed(value) if backend == "triton" else value for value in args]
    got = getattr(ops, op)(*values, **options, backend=backend)
    got = (got,) if isinstance(got, Tensor) else got
    return {name: value.cpu() for name, value in zip(OUTPUTS[op], got, strict=True)}


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def assert_op(
    op: str, args: tuple[Any, ...], dtype: torch.dtype, num_owned: int | None = None, **options: Any
) -> dict[str, Tensor]:
    """As right as the reference in the same dtype, against the reference in float64; what came out, by name.

    Args:
        op: its name.
        args: its positional arguments.
        dtype: of the matrices.
        num_owned: rows before the last offset, if there are others after it: those are zeros, or undefined.
        options: its keyword arguments.
    """
    got = run(op, args, **options)
    exact = run(op, widened(args), "reference", **options)
    plain = run(op, args, "reference", **options)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        if name in ZERO_WHERE_UNOWNED:
            assert torch.equal(value[num_owned:], torch.zeros_like(value[num_owned:])) or num_owned is None, name
        owned = slice(num_owned) if name in ZERO_WHERE_UNOWNED + UNDEFINED_WHERE_UNOWNED else slice(None)
        assert_as_good_as_torch(f"{op}: {name}", value[owned], exact[name][owned], plain[name][owned], dtype)
    return got


def with_tail(tensor: Tensor, tail: int, value: float = float("nan")) -> Tensor:
    """``tensor`` with ``tail`` more rows of ``value``."""
    return torch.cat((tensor, tensor.new_full((tail, *tensor.shape[1:]), value)))


def arguments(
    problem: Problem, *, gathered: bool = True, optional: bool = True, tail: int = 0
) -> dict[str, tuple[Any, ...]]:
    """Positional arguments of every op on unit-scale rows, by its name, up to and without ``need_*``.

    Args:
        problem: its sizes, weights, biases and routing.
        gathered: rows come through ``token_of_row_R``; else X and dO stand in the order of the rows.
        optional: with scores and biases; else with None.
        tail: rows after the last offset, NaN wherever they may be (a row that is gathered has to be one: token 0).
    """
    dtype, plan, act = problem.x.dtype, problem.plan, (problem.activation, problem.glu_layout)
    draw = torch.Generator().manual_seed(7)
    width_u, width_d, width_n = problem.w1.shape[1], problem.w1.shape[2], problem.w2.shape[2]
    h, a, dh, y = (
        with_tail(torch.randn(plan.num_rows, width, generator=draw).to(dtype), tail)
        for width in (width_u, width_n, width_u, width_d)
    )
    token, x, dout = plan.token_of_row_R, problem.x, problem.dout
    if not gathered:
        x, dout = (with_tail(tensor[token.long()], tail) for tensor in (x, dout))
    token = with_tail(token, tail, 0) if gathered else None
    scores = with_tail(problem.scores.reshape(-1)[plan.slot_of_row_R.long()], tail) if optional else None
    b1, b2 = (problem.b1, problem.b2) if optional else (None, None)
    offset, maps = plan.expert_offset_E1, (plan.row_by_token_R, plan.token_offset_T1)
    every = {
        "up_proj": (x, problem.w1, b1, token, offset, *act),
        "down_proj": (a, problem.w2, b2, scores, offset),
        "combine": (y, scores, *maps),
        "down_proj_bwd_input": (dout, h, problem.w2, b2, scores, token, offset, *act),
        "down_proj_bwd_weight": (dout, a, scores, token, offset),
        "up_proj_bwd_input": (dh, problem.w1, offset),
        "up_proj_bwd_weight": (dh, x, token, offset),
    }
    if tail:
        del every["combine"]  # has no experts
    return every


def wants_bias(op: str, wanted: bool = True) -> dict[str, bool]:
    """Keyword arguments that ask the two weight gradients for a bias gradient as well."""
    return {"need_bias": wanted} if op.endswith("bwd_weight") else {}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SONIC_BACKEND", raising=False)
    kernels.reset_counts()
    yield
    kernels.reset_counts()


@dataclasses.dataclass
class Launch:
    """One call of ``launch``: its label, the kernel's arguments and its constants."""

    label: str
    args: tuple[Any, ...]
    constants: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of a grouped GEMM, as it is made."""
    seen: list[Launch] = []
    real = grouped_gemm.launch

    def watch(kernel: Any, grid: Any, *args: Any, label: str, **constants: Any) -> None:
        seen.append(Launch(label, args, {"grid": tuple(grid), **constants}))
        real(kernel, grid, *args, label=label, **constants)

    monkeypatch.setattr(grouped_gemm, "launch", watch)
    return seen


def configure(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change every configuration that is chosen from here on."""
    real = grouped_gemm.config_of
    monkeypatch.setattr(grouped_gemm, "config_of", lambda *args: dataclasses.replace(real(*args), **changes))


# ---------------------------------------------------------------- the whole layer


EDGES = (
    Shape(0, 16, 8, 4, 2, "no token at all"),
    Shape(1, 32, 16, 8, 2, "one token, so that most experts have no row and the others one"),
    Shape(1, 1, 1, 1, 1, "every size 1"),
    Shape(7, 11, 19, 7, 1, "K = 1, E prime; no width has 16-byte strides in any dtype; columns in several tiles"),
    Shape(6, 12, 10, 3, 3, "K = E: every expert has every token, in order"),
    Shape(19, 8, 16, 3, 1, "one expert has all rows, the others none", "same"),
    Shape(10, 24, 9, 11, 2, "first and last expert empty, and every other one between", "gaps"),
)
LARGE = Shape(70, 40, 36, 2, 1, "several row tiles per expert, column tiles and steps of every contraction")


class TestLayer:
    """``sonic.moe_mlp`` and ``sonic.expert_mlp``: forward and every gradient."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_activations(
        self, activation: str, glu_layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In one dtype with a bias, in the next without; in one persistent with descriptors, in the next neither."""
        turn = ACTIVATION_LAYOUTS.index((activation, glu_layout))
        bias = (turn + turn // 2 + DTYPES.index(dtype)) % 2 == 0
        described = (turn + DTYPES.index(dtype)) % 2 == 0
        configure(monkeypatch, persistent=described, descriptors=described)
        sizes = (6, 16, 24, 2, 1) if described else (6, 13, 19, 2, 1)
        assert_layer(make_problem(*sizes, dtype, activation, glu_layout, bias=bias, seed=turn))

    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize("shape", shape_ids(EDGES))
    def test_edges(self, shape: Shape, bias: bool) -> None:
        """Gated with a bias in float16, plain without in float32."""
        dtype = torch.float16 if bias else torch.float32
        assert_layer(problem_of(shape, dtype, activation="geglu" if bias else "relu2", bias=bias))

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_many_tiles(self, dtype: torch.dtype) -> None:
        assert_layer(problem_of(LARGE, dtype, bias=True, glu_layout="interleaved"))

    def test_h_computed_again(self) -> None:
        """``save="input"``: the same gradients to the last bit, from the same kernels."""
        wanted = small_results()
        kernels.reset_counts()
        assert_same_bits(triton_results(small(torch.float32, TINY), save="input"), wanted)
        assert kernels.counts()["up_proj", "triton"] == 2

    def test_inference_stores_no_h(self, launches: list[Launch]) -> None:
        problem = small(torch.float32, TINY)
        inputs = {name: placed(leaf) for name, leaf in problem.leaves().items()}
        plan = sonic.RoutingPlan.from_topk(placed(problem.expert_index), 3)
        for requires_grad in (True, False):
            with torch.set_grad_enabled(requires_grad):
                out = sonic.moe_mlp(**inputs, plan=plan, backend="triton")
            assert torch.equal(out.cpu(), small_results()["out"])
        epilogue_args = [launch.args[-1] for launch in launches if launch.label == "up_proj"]
        assert [args[0] is None for args in epilogue_args[-2:]] == [False, True]

    @pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
    def test_rows_grouped_by_the_caller(self, scored: bool) -> None:
        """``expert_mlp``, with rows after the last expert's: they give zeros, and get zero gradients."""
        dtype, tail = torch.float32, 18
        problem = make_problem(*TINY, dtype, bias=True)
        grouped = problem.grouped()
        values = {"rows": with_tail(grouped.rows, tail), "row_scores": with_tail(grouped.row_scores, tail)}
        values |= {"w1": problem.w1, "w2": problem.w2, "b1": problem.b1, "b2": problem.b2}
        if not scored:
            del values["row_scores"]
        dout = torch.randn(len(values["rows"]), TINY[1])

        def call(backend: str, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            leaves = {name: place(value.to(dtype, copy=True)).requires_grad_() for name, value in values.items()}
            counts = place(grouped.tokens_per_expert)
            out = sonic.expert_mlp(**leaves, tokens_per_expert=counts, backend=backend)
            got = {"out": out.detach()} | gradients(out, leaves, place(dout))
            return {name: value.cpu() for name, value in got.items()}

        ours = call("triton", dtype, placed)
        for name in ("out", "rows", *(["row_scores"] if scored else [])):
            assert torch.equal(ours[name][-tail:], torch.zeros_like(ours[name][-tail:])), name
        plain, exact = call("reference", dtype, torch.clone), call("reference", torch.float64, torch.clone)
        assert_all_as_good_as_torch(ours, exact, plain, dtype)

    def test_inputs_of_any_stride(self) -> None:
        problem = small(torch.float32, TINY)
        leaves = {name: strided(placed(leaf)).requires_grad_() for name, leaf in problem.leaves().items()}
        assert not any(leaf.is_contiguous() for leaf in leaves.values())
        plan = sonic.RoutingPlan.from_topk(strided(placed(problem.expert_index)), 3)
        out = sonic.moe_mlp(**leaves, plan=plan, backend="triton")
        got = {"out": out.detach()} | gradients(out, leaves, strided(placed(problem.dout)))
        assert_same_bits({name: value.cpu() for name, value in got.items()}, small_results())

    def test_twice_the_same_bits(self) -> None:
        assert_same_bits(triton_results(small(torch.float32, TINY)), small_results())


@functools.cache
def small(dtype: torch.dtype, sizes: tuple[int, ...] = SMALL, activation: str = "swiglu") -> Problem:
    return make_problem(*sizes, dtype, activation, bias=True)


@functools.cache
def small_results() -> dict[str, Tensor]:
    """Of the problem that several tests look at from several sides."""
    return triton_results(small(torch.float32, TINY))


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor whose others are large."""
    other = torch.full_like(tensor, 1000)
    return torch.stack((tensor, other), dim=-1)[..., 0].detach()


# ---------------------------------------------------------------- what stays where it belongs


class TestContainment:
    """NaN and infinity in one place reach what depends on it, and nothing else, not even by a bit.

    Tokens 0 to 3 go to expert 0, 4 and 5 to expert 1, 6 and 7 to expert 2; no width is that of whole blocks. What a
    tile reads in vain is token 0 for rows that it has too many, and the start of the next row or expert past a width.
    """

    PROBLEM = make_problem(8, 24, 20, 3, 1, torch.float32, bias=True)
    PROBLEM.expert_index = torch.tensor([0] * 4 + [1] * 2 + [2] * 2)[:, None]

    @staticmethod
    @functools.cache
    def clean() -> dict[str, Tensor]:
        return triton_results(TestContainment.PROBLEM)

    @pytest.mark.parametrize(
        ("where", "value"),
        [("w1", "nan"), ("w2", "inf"), ("b1", "inf"), ("b2", "nan"), ("x", "nan"), ("dout", "inf"), ("scores", "nan")],
    )
    def test_elsewhere_not_a_bit_changes(self, where: str, value: str) -> None:
        """Tokens 0 and 3, or expert 1, are not finite."""
        of_expert = where in ("w1", "w2", "b1", "b2")
        bad = getattr(self.PROBLEM, where).clone()
        bad[[1] if of_expert else [0, 3]] = float(value)
        got, clean = triton_results(dataclasses.replace(self.PROBLEM, **{where: bad})), self.clean()
        tokens, experts = ([0, 1, 2, 3, 6, 7], [0, 2]) if of_expert else ([1, 2, 4, 5, 6, 7], [1, 2])
        others = {name: experts if name in ("w1", "w2", "b1", "b2") else tokens for name in got}
        assert_same_bits(
            {name: got[name][part] for name, part in others.items()},
            {name: clean[name][part] for name, part in others.items()},
        )
        assert any(not torch.isfinite(value).all() for value in got.values()), "nothing was met"


# ---------------------------------------------------------------- single ops


class TestSingleOps:
    """Each op with inputs of its own, so that none hides behind another."""

    @pytest.mark.parametrize("optional", [True, False], ids=["all", "none"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("op", OUTPUTS)
    def test_against_the_reference(self, op: str, dtype: torch.dtype, optional: bool) -> None:
        """With token map, scores and biases; and without any of them."""
        problem = small(dtype, SMALL if optional else ODD)
        args = arguments(problem, gathered=optional, optional=optional)[op]
        assert_op(op, args, dtype, **wants_bias(op, optional))

    @pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "in-order"])
    @pytest.mark.parametrize("op", [op for op in OUTPUTS if op != "combine"])
    def test_rows_after_the_last_offset(self, op: str, gathered: bool) -> None:
        """Two tiles of rows that are nobody's: NaN there counts nowhere, and what is handed to a caller is zero."""
        problem = small(torch.float32)
        args = arguments(problem, gathered=gathered, tail=18)[op]
        assert_op(op, args, torch.float32, problem.plan.num_rows, **wants_bias(op))

    @pytest.mark.parametrize("op", ["up_proj", "down_proj", "down_proj_bwd_input", "up_proj_bwd_input"])
    def test_only_rows_of_nobody(self, op: str) -> None:
        """Offsets that stay 0: zeros, whatever rows and weights are."""
        problem = make_problem(0, 8, 8, 2, 2, torch.float32, bias=True)
        args = arguments(dataclasses.replace(problem, w1=problem.w1 * torch.nan, w2=problem.w2 * torch.nan), tail=0)
        rows = {"up_proj": (0, 8), "down_proj": (0, 8), "down_proj_bwd_input": (1, 16), "up_proj_bwd_input": (0, 16)}
        at, width = rows[op]
        given = list(args[op])
        given[at] = torch.full((3, width), torch.nan)
        if op == "up_proj":
            given[3] = None
        if op == "down_proj_bwd_input":
            given[0], given[4], given[5] = torch.full((3, 8), torch.nan), torch.full((3,), torch.nan), None
        if op == "down_proj":
            given[3] = torch.full((3,), torch.nan)
        for name, value in run(op, tuple(given)).items():
            assert value.shape[0] == 3, name
            if name in ZERO_WHERE_UNOWNED:
                assert torch.equal(value, torch.zeros_like(value)), name

    @pytest.mark.parametrize("activation", ["swiglu", "gelu"])
    def test_down_bwd_computes_what_is_needed(self, activation: str) -> None:
        problem = make_problem(5, 8, 40, 2, 1, torch.float32, activation, bias=True)
        args = arguments(problem)["down_proj_bwd_input"]
        whole = run("down_proj_bwd_input", args)
        for need_dh, need_dscores in ((True, False), (False, True), (False, False)):
            got = run("down_proj_bwd_input", args, need_dh=need_dh, need_dscores=need_dscores)
            assert got["dh_RU"].shape == (5 if need_dh else 0, problem.w1.shape[1])
            assert got["dscores_R"].shape == (5 if need_dscores else 0,)
            for name, value in got.items():
                assert torch.equal(value, whole[name][: len(value)]), name

    @pytest.mark.parametrize("op", ["down_proj_bwd_weight", "up_proj_bwd_weight"])
    def test_weight_bwd_computes_what_is_needed(self, op: str) -> None:
        args = arguments(make_problem(5, 8, 4, 3, 1, torch.float32, bias=True))[op]
        weight, bias = OUTPUTS[op]
        whole = run(op, args, need_weight=True, need_bias=True)
        for need_weight, need_bias in ((True, False), (False, True), (False, False)):
            got = run(op, args, need_weight=need_weight, need_bias=need_bias)
            for name, needed in ((weight, need_weight), (bias, need_bias)):
                assert got[name].shape == ((3 if needed else 0), *whole[name].shape[1:]), name
                assert torch.equal(got[name], whole[name][: len(got[name])]), name

    def test_up_proj_without_h(self) -> None:
        args = arguments(make_problem(5, 8, 20, 2, 1, torch.float32, bias=True))["up_proj"]
        whole, only_a = run("up_proj", args), run("up_proj", args, need_h=False)
        assert only_a["h_RU"].shape == (0, 40)
        assert torch.equal(only_a["a_RN"], whole["a_RN"])

    @pytest.mark.parametrize("scores_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=short)
    def test_scores_of_another_dtype(self, scores_dtype: torch.dtype) -> None:
        """They are read in their own dtype and meet the row in float32."""
        problem = make_problem(5, 8, 4, 2, 1, torch.float32, bias=True)
        problem.scores = problem.scores.to(scores_dtype)
        for op in ("down_proj", "combine", "down_proj_bwd_input", "down_proj_bwd_weight"):
            assert_op(op, arguments(problem)[op], torch.float32, **wants_bias(op))

    @pytest.mark.parametrize("op", OUTPUTS)
    def test_arguments_of_any_stride(self, op: str) -> None:
        args = arguments(make_problem(5, 8, 4, 2, 1, torch.float32, bias=True))[op]
        apart = tuple(strided(arg) if isinstance(arg, Tensor) else arg for arg in args)
        assert_same_bits(run(op, apart, **wants_bias(op)), run(op, args, **wants_bias(op)))

    def test_an_expert_without_rows_has_zero_gradients(self) -> None:
        problem = make_problem(5, 24, 20, 4, 1, torch.float32, bias=True)
        problem.expert_index = torch.tensor([1, 1, 3, 1, 3])[:, None]
        args = arguments(problem)
        for op in ("down_proj_bwd_weight", "up_proj_bwd_weight"):
            for name, value in assert_op(op, args[op], torch.float32, need_bias=True).items():
                assert [bool(v.any()) for v in value] == [False, True, False, True], name

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_dscores_of_several_column_tiles(self, dtype: torch.dtype, launches: list[Launch]) -> None:
        """Each tile leaves its part; the bias counts once."""
        problem = make_problem(9, 40, 100, 2, 2, dtype, bias=True)
        given = arguments(problem)["down_proj_bwd_input"]
        got = assert_op("down_proj_bwd_input", given, dtype, need_dh=False)
        parts = launches[0].args[-1][4]
        assert len(parts) == -(-100 // launches[0].constants["BLOCK_N"]) > (0 if HAS_GPU else 3)
        without_bias = run("down_proj_bwd_input", (*given[:3], None, *given[4:]), need_dh=False)
        by_bias = (problem.dout.double()[given[5].long()] * problem.b2.double()[expert_of_row(problem)]).sum(1)
        difference = got["dscores_R"].double() - without_bias["dscores_R"].double()
        torch.testing.assert_close(difference, by_bias, rtol=1e-5, atol=1e-4)


def expert_of_row(problem: Problem) -> Tensor:
    return problem.grouped().expert_of_row


class TestCombine:
    """What is particular to the gather-and-sum."""

    def test_any_number_of_rows_per_token(self) -> None:
        """None, more than one visit's worth, and rows that nobody lists."""
        counts = [0, 9, 1, 0, 4, 5, 0]
        order = torch.randperm(19, generator=torch.Generator().manual_seed(0)).int()
        offset = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0)).int()
        args = (torch.randn(19, 5), torch.rand(19), order, offset)
        got = assert_op("combine", args, torch.float32)["out_TD"]
        assert [bool(row.any()) for row in got] == [count > 0 for count in counts]

    def test_several_blocks_of_columns(self) -> None:
        y, order, offset = torch.randn(3, 1030), torch.tensor([2, 0, 1]).int(), torch.tensor([0, 2, 3]).int()
        assert_op("combine", (y, None, order, offset), torch.float32)

    def test_16_bits_are_summed_in_float32(self) -> None:
        """64 rows of a token: summed in 16 bits, the small ones would be lost beside the large."""
        y = torch.cat((torch.full((1, 8), 2048.0), torch.full((63, 8), 0.25))).half()
        args = (y, None, torch.arange(64, dtype=torch.int32), torch.tensor([0, 64], dtype=torch.int32))
        assert torch.equal(run("combine", args)["out_TD"], torch.full((1, 8), 2048 + 63 / 4).half())


# ---------------------------------------------------------------- loaders and configurations


class TestLoaders:
    """By which way each weight came."""

    @pytest.mark.parametrize(
        ("widths", "dtype", "described"),
        [
            ((12, 20), torch.float32, {"w1": True, "w2": True}),
            ((21, 19), torch.float32, {"w1": False, "w2": False}),
            ((24, 20), torch.float16, {"w1": True, "w2": False}),  # 40 bytes
            ((12, 24), torch.float16, {"w1": False, "w2": True}),
        ],
        ids=["fp32-both", "fp32-none", "fp16-w1", "fp16-w2"],
    )
    @needs_interpreter
    def test_strides_of_16_bytes_take_descriptors(
        self,
        widths: tuple[int, int],
        dtype: torch.dtype,
        described: dict[str, bool],
        launches: list[Launch],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        configure(monkeypatch, descriptors=True)
        problem = make_problem(3, *widths, 2, 1, dtype)
        assert_layer(problem)
        took = {launch.label: launch.constants.get("LOAD_WEIGHT") for launch in launches}
        rows = {True: loaders.described_weight_rows, False: loaders.weight_of_rows}
        columns = {True: loaders.described_weight_columns, False: loaders.weight_of_columns}
        assert took == {
            "up_proj": rows[described["w1"]],
            "down_proj": rows[described["w2"]],
            "down_proj_bwd_input": columns[described["w2"]],
            "up_proj_bwd_input": columns[described["w1"]],
            "down_proj_bwd_weight": None,
            "up_proj_bwd_weight": None,
        }

    @needs_interpreter
    def test_a_weight_that_starts_off_16_bytes_takes_pointers(
        self, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configure(monkeypatch, descriptors=True)
        args = list(arguments(small(torch.float32))["up_proj"])
        wanted = run("up_proj", tuple(args))
        w1 = args[1]
        args[1] = torch.cat((w1.new_zeros(1), w1.flatten()))[1:].view_as(w1)
        assert args[1].data_ptr() % 16 and args[1].is_contiguous()
        torch.testing.assert_close(run("up_proj", tuple(args)), wanted, rtol=1e-5, atol=1e-5)
        took = [launch.constants["LOAD_WEIGHT"] for launch in launches]
        assert took == [loaders.described_weight_rows, loaders.weight_of_rows]

    @pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
    @pytest.mark.parametrize("glu_layout", ["concatenated", "interleaved"])
    def test_widths_beyond_whole_blocks(
        self, glu_layout: str, descriptors: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Halves that end inside a tile of columns, next to the other half's rows and the next expert's."""
        configure(monkeypatch, descriptors=descriptors)
        problem = make_problem(9, 40, 20, 2, 1, torch.float32, glu_layout=glu_layout, bias=True)
        args = arguments(problem)
        for op in ("up_proj", "down_proj_bwd_input", "up_proj_bwd_input"):
            assert_op(op, args[op], torch.float32)


SAME_BITS = {
    "own-grid": {"persistent": False},
    "group-1": {"group_m": 1},
    "group-2": {"group_m": 2},
    "slices-1": {"slices": 1},
    "slices-4": {"slices": 4},
}
SCHEDULE = {"persistent": True, "descriptors": True, "group_m": 8, "slices": 2}
BLOCKS = ((16, 64, 32), (16, 16, 16), (32, 16, 64), (64, 32, 16), (64, 64, 64))


class TestConfigurations:
    """Any configuration computes the same: schedules to the last bit, tiles and ways of loading within rounding."""

    # Expert 0 has rows for three tiles of 16, expert 1 none, expert 2 one.
    PROBLEM = make_problem(46, 40, 36, 3, 1, torch.float32, bias=True)
    PROBLEM.expert_index = torch.tensor([0] * 41 + [2] * 5)[:, None]
    OPS = ("up_proj", "down_proj_bwd_input", "down_proj_bwd_weight")

    @staticmethod
    @functools.cache
    def every_op(block_m: int, block_n: int, block_k: int) -> dict[str, dict[str, Tensor]]:
        with pytest.MonkeyPatch.context() as patch:
            configure(patch, block_m=block_m, block_n=block_n, block_k=block_k, **SCHEDULE)
            args = arguments(TestConfigurations.PROBLEM)
            return {op: run(op, args[op], **wants_bias(op)) for op in TestConfigurations.OPS}

    @pytest.mark.parametrize("changes", SAME_BITS.values(), ids=SAME_BITS)
    def test_schedules_have_the_same_bits(
        self, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, launches: list[Launch]
    ) -> None:
        """But for dS: the sum over a row is one of its slices' sums."""
        wanted = self.every_op(*BLOCKS[0])
        blocks = dict(zip(("block_m", "block_n", "block_k"), BLOCKS[0], strict=True))
        configure(monkeypatch, **blocks, **{**SCHEDULE, **changes})
        args = arguments(self.PROBLEM)
        launches.clear()
        for op in self.OPS:
            got = run(op, args[op], **wants_bias(op))
            if "slices" in changes and "dscores_R" in got:
                torch.testing.assert_close(got.pop("dscores_R"), wanted[op]["dscores_R"], rtol=1e-5, atol=1e-5)
            assert_same_bits(got, {name: wanted[op][name] for name in got})
        met = {launch.label: launch.constants for launch in launches}
        assert all(constants["GROUP_M"] == changes.get("group_m", 8) for constants in met.values())
        if interprets():
            most_tiles = (-(-46 // 16) + 3) * -(-72 // 64)
            at_once = most_tiles if "persistent" in changes else min(most_tiles, 10)
            assert met["up_proj"]["grid"] == (at_once,)

    @pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
    def test_tiles_of_any_size(self, blocks: tuple[int, int, int]) -> None:
        args = arguments(self.PROBLEM)
        for op, got in self.every_op(*blocks).items():
            exact = run(op, widened(args[op]), "reference", **wants_bias(op))
            plain = run(op, args[op], "reference", **wants_bias(op))
            assert_all_as_good_as_torch(got, exact, plain, torch.float32)


# ---------------------------------------------------------------- torch: modules, compilers, what autograd keeps


def model(backend: str | None, **options: Any) -> sonic.MoE:
    """The same parameters whatever the backend."""
    torch.manual_seed(0)
    return sonic.MoE(16, 20, 4, 2, backend=backend, **options)


class TestModule:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_gradients_reach_every_parameter(self) -> None:
        """Router included, as with the reference; and every op of the step was Triton's."""
        x, dout = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
        got: dict[str, dict[str, Tensor]] = {}
        for name, backend, dtype in (
            ("ours", "triton", torch.float32),
            ("plain", "reference", torch.float32),
            ("exact", "reference", torch.float64),
        ):
            layer = model(backend, bias=True).to(dtype)
            place = placed if backend == "triton" else torch.clone
            layer.to(DEVICE if backend == "triton" else "cpu")
            leaves = {"x": place(x.to(dtype)).requires_grad_()} | dict(layer.named_parameters())
            kernels.reset_counts()
            out = layer(leaves["x"])
            found = {"out": out.detach()} | gradients(out, leaves, place(dout))
            got[name] = {key: value.cpu() for key, value in found.items()}
            assert {by for op, by in kernels.counts() if not op.startswith("experts")} <= {backend}
        assert got["ours"]["router.weight"].abs().max() > 0
        assert_all_as_good_as_torch(got["ours"], got["exact"], got["plain"], torch.float32)

    def test_compiled_in_one_graph(self) -> None:
        layer = model("triton", bias=True).to(DEVICE)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, dout = placed(torch.randn(5, 16)), placed(torch.randn(5, 16))
        both, counts = [], []
        for call in (layer, compiled):
            leaves = {"x": x.clone().requires_grad_()} | dict(layer.named_parameters())
            kernels.reset_counts()
            out = call(leaves["x"])
            both.append({"out": out.detach()} | gradients(out, leaves, dout))
            counts.append(kernels.counts())
        assert_same_bits(both[1], both[0])
        assert counts[1] == counts[0]
        single = {"up_proj": 1, "down_proj": 1, "combine": 2, "down_proj_bwd_input": 1, "down_proj_bwd_weight": 1}
        single |= {"up_proj_bwd_input": 1, "up_proj_bwd_weight": 1}
        routing = {"topk_softmax": 1, "topk_softmax_bwd": 1, "build_plan": 1}
        assert counts[1] == {(op, "triton"): number for op, number in (single | routing).items()}

    @pytest.mark.parametrize("optional", [True, False], ids=["all", "none"])
    @pytest.mark.parametrize("op", OUTPUTS)
    def test_opcheck(self, op: str, optional: bool) -> None:
        """Schema (nothing mutated, no alias), fake; and of the smallest what compilers make of dynamic shapes."""
        problem = make_problem(3, 8, 4, 2, 1, torch.float32, bias=True)
        args = arguments(problem, gathered=optional, optional=optional)[op]
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if op == "combine":
            tests.append("test_aot_dispatch_dynamic")
        options = wants_bias(op, optional) | {"backend": "triton"}
        torch.library.opcheck(getattr(ops, op), tuple(map(placed, args)), options, test_utils=tests)

    @pytest.mark.parametrize("activation", ["swiglu", "relu2"])
    @pytest.mark.parametrize("save", SAVE_MODES)
    def test_keeps_what_the_reference_keeps(self, save: str, activation: str) -> None:
        problem = make_problem(5, 16, 8, 3, 2, torch.float32, activation, bias=True)
        kept, bytes_of_h = {}, 4 * 10 * (16 if activation in GATED else 8)
        for backend in ("triton", "reference"):
            place = placed if backend == "triton" else torch.clone
            leaves = {name: place(leaf.detach()).requires_grad_() for name, leaf in problem.leaves().items()}
            plan = sonic.RoutingPlan.from_topk(place(problem.expert_index), 3)
            storages: dict[int, tuple[tuple[int, ...], int]] = {}
            own = {leaf.untyped_storage()._cdata for name, leaf in leaves.items() if name not in ("x", "scores")}

            def pack(tensor: Tensor, storages: Any = storages, own: Any = own) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    storages[storage._cdata] = (tuple(tensor.shape), storage.nbytes())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                sonic.moe_mlp(**leaves, plan=plan, activation=activation, save=save, backend=backend)
            kept[backend] = sorted(storages.values())
        assert kept["triton"] == kept["reference"]
        total = sum(size for _, size in kept["triton"])
        x, scores, slots, offsets = 4 * 5 * 16, 4 * 10, 4 * 10, 4 * 4
        assert total == x + scores + slots + offsets + (bytes_of_h if save == "preactivation" else 0)


# ---------------------------------------------------------------- when it serves


SIZES: dict[str, Any] = {"num_tokens": 64, "num_experts": 8, "top_k": 2, "hidden_size": 32, "intermediate_size": 16}


def call(problem: Problem, backend: str | None) -> Tensor:
    return sonic.moe_mlp(problem.x, problem.w1, problem.w2, problem.scores, problem.plan, backend=backend)


class TestDispatch:
    """On a CPU only by name, and only what the interpreter does right."""

    @needs_interpreter
    def test_automatic_choice_stays_the_reference(self) -> None:
        call(make_problem(*SMALL, torch.float32), None)
        assert {backend for _, backend in kernels.counts()} == {"reference"}
        told = kernels.explain("up_proj", **SIZES, dtype=torch.float32)
        assert told.backend == "reference"
        assert told.reasons["triton"] == ["on a CPU Triton only interprets, for tests: ask for it by name"]

    @needs_interpreter
    def test_a_name_insists(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = kernels.explain("up_proj", **SIZES, dtype=torch.float32, backend="triton")
        assert (told.backend, told.reasons["triton"]) == ("triton", []) and told.tile_rows == 16
        problem = make_problem(1, 8, 4, 2, 1, torch.float32)
        plan = problem.plan
        kernels.reset_counts()
        monkeypatch.setenv("SONIC_BACKEND", "triton")
        sonic.moe_mlp(problem.x, problem.w1, problem.w2, problem.scores, plan)
        assert kernels.counts() == {("up_proj", "triton"): 1, ("down_proj", "triton"): 1, ("combine", "triton"): 1}

    @pytest.mark.parametrize(
        ("dtype", "reason"),
        [
            (torch.bfloat16, "Triton's interpreter multiplies bfloat16 wrongly; float16 and float32 it does right"),
            (torch.float64, "has no kernels for float64"),
        ],
        ids=["bf16", "fp64"],
    )
    @needs_interpreter
    def test_dtypes_that_would_come_out_wrong_are_refused(self, dtype: torch.dtype, reason: str) -> None:
        problem = make_problem(*SMALL, dtype)
        with pytest.raises(UnsupportedError, match=f"backend is 'triton', which cannot serve this call: {reason}"):
            call(problem, "triton")
        told = kernels.explain("up_proj", **SIZES, dtype=dtype, backend="triton")
        assert (told.backend, told.reasons["triton"]) == (None, [reason])

    @pytest.mark.parametrize("value", [None, "", "0"])
    def test_without_the_interpreter_a_cpu_is_refused(self, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if value is not None:
            monkeypatch.setenv("TRITON_INTERPRET", value)
        reason = "needs a GPU; on a CPU only with TRITON_INTERPRET=1 from the start, for tests"
        with pytest.raises(UnsupportedError, match=reason):
            call(make_problem(*SMALL, torch.float32), "triton")
        assert reason in kernels.explain("combine", **SIZES, dtype=torch.float32).reasons["triton"]

    @pytest.mark.parametrize("op", [*OUTPUTS, "experts", "experts_bwd"])
    @pytest.mark.parametrize("arch", [80, 86, 89, 90, 94, 95, 100, 103, 120])
    def test_serves_every_gpu_from_ampere_on(self, op: str, arch: int) -> None:
        """sm_94 and sm_95 are what torch calls CDNA 3 and 4."""
        told = kernels.explain(op, **SIZES, device="cuda", arch=arch)
        assert told.reasons["triton"] == []
        assert told.backend == next(name for name, reasons in told.reasons.items() if not reasons) != "reference"
        insisted = kernels.explain(op, **SIZES, device="cuda", arch=arch, backend="triton")
        assert insisted.backend == "triton" and "triton: can serve" in str(insisted)

    @pytest.mark.parametrize(
        ("device", "arch", "dtype", "reason"),
        [
            ("cuda", 75, torch.float16, "needs compute capability 8.0 (Ampere) or newer, this is sm_75"),
            ("cuda", 70, torch.float32, "needs compute capability 8.0 (Ampere) or newer, this is sm_70"),
            ("cuda", 90, torch.float64, "has no kernels for float64"),
            ("xpu", None, torch.float32, "has no kernels for xpu"),
        ],
        ids=["sm_75", "sm_70", "fp64", "xpu"],
    )
    def test_what_it_refuses(self, device: str, arch: int | None, dtype: torch.dtype, reason: str) -> None:
        told = kernels.explain("up_proj", **SIZES, device=device, arch=arch, dtype=dtype)
        assert told.reasons["triton"] == [reason] and told.backend == "reference"
        assert f"triton: {reason}" in str(told)
