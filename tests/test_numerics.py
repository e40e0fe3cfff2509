"""The figures of docs/numerics.md, measured anew: none has grown, and what has the same bits there has them here."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sonic
from benchmarks import numerics
from benchmarks.numerics import (
    AS_THEY_ARE,
    CONTENDERS,
    DTYPES,
    KINDS,
    MARKERS,
    NO_BIASES,
    PAGE,
    PROPERTIES,
    PROPERTY_MARKERS,
    PROPERTY_ROWS,
    SCALES,
    SCORES,
    WIDENED,
    Figures,
    allowed,
    between,
    errors,
    exact,
    filled,
    grown,
    main,
    make_problem,
    measured,
    missing,
    page_figures,
    page_property_cells,
    property_cells,
    property_table,
    report,
    results,
    rows,
    score_errors,
)
from sonic.kernels import ops
from tests.helpers import torch_experts

OURS = [name for name, contender in CONTENDERS.items() if contender.is_ours]
REFERENCE = [name for name in OURS if name.startswith("reference")]
QUICK = [*rows(KINDS, REFERENCE), ("unit scale", "triton", "float16")]


def is_extended() -> bool:
    """Whether NumPy's long double is wider than float64: only then float64 can be measured."""
    return bool(np.finfo(np.longdouble).nmant > 52)


@functools.cache
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@functools.cache
def held() -> Figures:
    return page_figures(page())


def skip_unless_it_runs(name: str, dtype: str = "") -> None:
    if why := missing(name):
        pytest.skip(why)
    if dtype == "float64" and not is_extended():
        pytest.skip("NumPy's long double is float64 here, so nothing is more exact than float64")


def parameters(wanted: list[tuple[str, str, str]]) -> list[object]:
    return [
        pytest.param(*row, id=", ".join(row), marks=() if row in QUICK else pytest.mark.slow)
        for row in wanted
        if row[1] in OURS
    ]


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize(("kind", "name", "dtype"), parameters(rows()))
def test_no_error_has_grown(kind: str, name: str, dtype: str) -> None:
    skip_unless_it_runs(name, dtype)
    faults = grown(measured(kind, name, dtype), held())
    assert not faults, "\n".join(faults)


def test_the_page_has_every_row_and_follows_from_its_figures() -> None:
    assert {key[:3] for key in held()} == set(rows())
    assert between(page(), MARKERS) == report(held()), "made by: python -m benchmarks.numerics --write docs/numerics.md"
    cells = page_property_cells(page())
    assert between(page(), PROPERTY_MARKERS) == property_table(cells)
    assert list(cells) == list(PROPERTY_ROWS)


def test_the_page_says_by_how_much_an_error_may_grow() -> None:
    for of_the_whole, largest, dtype in (("1.5", "2.5", "float16"), ("2.5", "4", "float32")):
        assert (allowed(dtype, True), allowed(dtype, False)) == (float(of_the_whole), float(largest))
        assert f"{of_the_whole} times (the largest error: {largest} times)" in " ".join(page().split())


def test_ours_are_no_worse_than_torch() -> None:
    """By the page: at most twice the error of the torch loop as a whole, but for what the page explains."""
    explained = {("wide range", "triton", "float32", "w1"), ("wide range", AS_THEY_ARE, "float16", "scores")}
    for (kind, name, dtype, result), ours in held().items():
        if name in OURS and (kind, name, dtype, result) not in explained:
            theirs = held()[kind, "torch loop", dtype, result]
            assert ours[0] <= 2 * theirs[0], (kind, name, dtype, result)


def test_a_grown_error_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("unit scale", WIDENED, "bfloat16", "x")
    figures = {key: (1.6 * held()[key][0], held()[key][1])}
    (fault,) = grown(figures, held())
    assert "unit scale, reference, widened, bfloat16, x: error of the whole" in fault
    figures = {key: (held()[key][0], math.inf), ("unit scale", "nobody", "bfloat16", "x"): (0.0, 0.0)}
    assert [fault.partition(": ")[2][:13] for fault in grown(figures, held())] == ["largest error", "not on the pa"]
    figures = {key: (math.nan, math.nan)}
    assert len(grown(figures, held())) == 2


def test_rounding_once_more_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole check, with a layer that rounds its activations to bfloat16: the command fails and says where."""
    key = ("unit scale", "reference", "float32")
    careless = numerics.Contender("reference", ("float32",), lambda v, expert_TK: rounded_loop(v, expert_TK))
    monkeypatch.setitem(CONTENDERS, "reference", careless)
    faults = grown(measured(*key), held())
    assert len(faults) >= 2 * 5


def rounded_loop(v: dict[str, Tensor], expert_TK: Tensor) -> Tensor:
    x = v["x"] + (v["x"].bfloat16().float() - v["x"]).detach()
    named = {name: v[name] for name in ("w1", "w2", "scores", "b1", "b2")}
    return torch_experts(x, expert_index=expert_TK, activation="swiglu", glu_layout="concatenated", **named)


# ---------------------------------------------------------------- the command and its measures


def test_exact_is_the_formula() -> None:
    """Against autograd through the tests' own layer in float64; inputs of every kind have the sizes they say."""
    for kind in KINDS:
        problem = make_problem(kind, torch.float32)
        leaves = {name: value.double().requires_grad_() for name, value in problem.values.items()}
        named = {name: leaf for name, leaf in leaves.items() if name != "x"}
        out = torch_experts(
            leaves["x"], expert_index=problem.expert_TK, activation="swiglu", glu_layout="concatenated", **named
        )
        grads = torch.autograd.grad(out, list(leaves.values()), problem.dout_TD.double())
        found = {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
        for name, (whole, largest) in errors(found, exact(problem), problem.by_rows).items():
            assert whole < 1e-12 and largest < 1e-10, (kind, name)


def test_errors_measures() -> None:
    want = {"out": np.array([[3.0, 4.0], [0.0, 1e-3], [0.0, 0.0]])}
    got = torch.tensor([[3.0, 4.5], [0.0, 1.5e-3], [0.0, 0.0]], dtype=torch.float64)
    whole, largest = errors({"out": got}, want)["out"]
    assert whole == pytest.approx(0.1, rel=1e-5) and largest == pytest.approx(0.5 / math.sqrt(25 / 6), rel=1e-5)
    whole, largest = errors({"out": got}, want, by_rows=True)["out"]
    assert largest == pytest.approx(0.5) and whole == pytest.approx(math.sqrt((0.1**2 + 0.5**2) / 2))
    assert errors({"out": got * math.nan}, want)["out"] == (math.inf, math.inf)
    tiny = errors({"out": torch.zeros(3, 2)}, {"out": want["out"] * 1e-300})["out"]
    assert tiny[0] == pytest.approx(1.0)  # squares would vanish


def test_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(filled(page(), MARKERS, ""), encoding="utf-8")
    words = ["--only", "reference", "--kinds", "unit scale"]
    assert main([*words, "--write", str(copy)]) == 0
    written = page_figures(copy.read_text(encoding="utf-8"))
    assert {key[:3] for key in written} == set(rows(["unit scale"], ["reference"]))
    assert not grown(written, held())
    assert main([*words, "--check"]) == 0
    assert "14 figures are as numerics.md has them, or smaller" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--write", str(tmp_path / "none.md")])
    assert "expected a page that exists" in capsys.readouterr().err
    copy.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="without its lines <!-- numerics: begin -->"):
        filled(copy.read_text(encoding="utf-8"), MARKERS, "")


def test_rivals_without_biases_are_met_by_that_kind_only() -> None:
    assert {kind for kind, name, _ in rows() if not CONTENDERS[name].has_biases} == {NO_BIASES}


# ---------------------------------------------------------------- same bits


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*row, id=", ".join(row), marks=() if row[0] in REFERENCE else pytest.mark.slow)
        for row in PROPERTY_ROWS
        if row[0] in OURS
    ],
)
def test_what_stays_the_same(name: str, dtype: str) -> None:
    """The same call gives the same bits everywhere. What else does is a matter of the matrix library for the reference,
    whose changes stay of the order of float32's epsilon; of our own kernels for Triton and CuTe.
    """
    skip_unless_it_runs(name)
    on_page = dict(zip(PROPERTIES, page_property_cells(page())[name, dtype], strict=True))
    for change, cell in dict(zip(PROPERTIES, property_cells(name, dtype), strict=True)).items():
        if change == "the same call again":
            assert on_page[change] == cell == "same bits"
        elif cell != "same bits":
            assert on_page[change] != "same bits" or name in REFERENCE, f"{change}: {cell}"
            epsilon = torch.finfo(DTYPES[dtype]).eps
            assert float(cell) <= 2 * epsilon, change


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize(
    ("where", "value"), [("x", math.nan), ("x", math.inf), ("dout", math.nan), ("scores", math.inf)]
)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("reference", "float32"),
        pytest.param(WIDENED, "bfloat16"),
        pytest.param(AS_THEY_ARE, "bfloat16"),
        pytest.param("triton", "float16", marks=pytest.mark.slow),
        pytest.param("cute", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_stays_with_its_token(name: str, dtype: str, where: str, value: float) -> None:
    """No bit of another token changes, nor of the gradients of experts that this one does not see."""
    skip_unless_it_runs(name)
    problem = make_problem("unit scale", DTYPES[dtype])
    clean = results(CONTENDERS[name], problem)
    bad = {key: tensor.clone() for key, tensor in {**problem.values, "dout": problem.dout_TD}.items()}
    bad[where][5, 1] = value
    dout_TD = bad.pop("dout")
    got = results(CONTENDERS[name], numerics.Problem(bad, problem.expert_TK, dout_TD))
    others = torch.arange(len(dout_TD)) != 5
    for result in ("out", "x", "scores"):
        assert torch.equal(got[result][others], clean[result][others]), result
        reaches_it = result != {"dout": "out", "scores": "scores"}.get(where)
        assert got[result][5].isfinite().all() != reaches_it, result
    its_experts = problem.expert_TK[5] if where != "scores" else problem.expert_TK[5, 1:]
    rest = torch.ones(len(problem.values["w1"]), dtype=torch.bool)
    rest[its_experts] = False
    for result in ("w1", "w2", "b1", "b2"):
        assert torch.equal(got[result][rest], clean[result][rest]), result
    for result in ("w1", "w2"):
        assert not got[result][its_experts].flatten(1).isfinite().all(1).any(), result


def test_weights_of_an_expert_without_rows_are_not_read() -> None:
    problem = make_problem("unit scale", torch.float32)
    empty = len(problem.values["w1"])
    values = dict(problem.values)
    for name in ("w1", "w2", "b1", "b2"):
        values[name] = torch.cat((values[name], torch.full_like(values[name][:1], math.nan)))
    got = results(CONTENDERS["reference"], numerics.Problem(values, problem.expert_TK, problem.dout_TD))
    assert all(value.isfinite().all() for value in got.values())
    assert not got["w1"][empty].any() and not got["w2"][empty].any()


# ---------------------------------------------------------------- scores

EPSILON = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_scores(backend: str, name: str, scale: float) -> None:
    """A score's relative error is that of its exponent in float32: about the largest distance of logits, rounded."""
    skip_unless_it_runs(backend)
    error, gradient, is_exact = score_errors(backend, name, scale)
    assert is_exact, "not the largest logits were chosen"
    assert error <= 5 * EPSILON * max(1.0, 5 * scale)
    if not (name.startswith("sigmoid") and scale > 1):  # saturated: its slope is zero, as torch's own is
        assert gradient <= 5 * EPSILON * max(1.0, 5 * scale)


def test_a_token_with_nan_logits_has_no_scores() -> None:
    for value in (math.nan, math.inf):
        logits_TE = torch.randn(6, 8)
        clean, expert, _, _ = ops.topk_softmax(logits_TE, 2)
        logits_TE[2, 4] = value
        scores, _, _, _ = ops.topk_softmax(logits_TE, 2)
        assert scores[2].isnan().all()
        others = torch.arange(6) != 2
        assert torch.equal(scores[others], clean[others])


# ---------------------------------------------------------------- main gradients


def test_main_gradients_take_products_unrounded() -> None:
    """64 micro-batches of bfloat16: added in float32, the error is that of the inputs' rounding, not of 64 sums."""
    torch.manual_seed(0)
    parts = [(torch.randn(16, 8).bfloat16(), torch.randn(16, 24).bfloat16()) for _ in range(64)]
    offset = torch.tensor([0, 16], dtype=torch.int32)
    main_grad, rounded = torch.zeros(1, 8, 24), torch.zeros(1, 8, 24, dtype=torch.bfloat16)
    for dh_RU, x_RD in parts:
        ops.up_proj_bwd_weight(dh_RU, x_RD, None, offset, True, False, main_grad)
        rounded += ops.up_proj_bwd_weight(dh_RU, x_RD, None, offset)[0]
    want = sum(dh.double().t() @ x.double() for dh, x in parts)
    assert isinstance(want, Tensor)
    fine, coarse = ((got[0].double() - want).norm() / want.norm() for got in (main_grad, rounded))
    assert fine < 1e-6 and coarse > 1e-3


def test_expert_mlp_is_as_exact() -> None:
    """Rows that are already grouped, with their scores: within the page's factor of the layer's own error."""
    problem = make_problem("unit scale", torch.float32)
    v = problem.values
    expert_R, slot_R = problem.expert_TK.flatten().sort(stable=True)
    count_E = torch.bincount(expert_R, minlength=len(v["w1"]))
    rows_RD, score_R = v["x"][slot_R // 2], v["scores"].flatten()[slot_R]
    y_RD = sonic.expert_mlp(rows_RD, v["w1"], v["w2"], count_E, score_R, b1=v["b1"], b2=v["b2"], backend="reference")
    out_TD = torch.zeros_like(v["x"]).index_add_(0, slot_R // 2, y_RD)
    whole, _ = errors({"out": out_TD}, exact(problem))["out"]
    assert whole <= allowed("float32", True) * held()["unit scale", "reference", "float32", "out"][0]
