"""The reference kernels against the formulas of the layer, in float64; every other backend is measured by them.

Every test of this file runs with poisoned ``torch.empty``: an element that no kernel writes is NaN here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic.kernels import ops
from sonic.kernels.reference import blocks as reference_blocks
from tests.helpers import (
    ACTIVATION_LAYOUTS,
    BIASES,
    DTYPES,
    FULL,
    HALVES,
    QUICK,
    SAVE_MODES,
    Problem,
    Shape,
    assert_all_as_good_as_torch,
    assert_all_close,
    assert_same_bits,
    chain_single_ops,
    dense_loop,
    formula,
    make_blocks_small,
    make_problem,
    problem_of,
    results,
    shape_ids,
    short,
    sonic_results,
    take_16bit_path,
    torch_experts,
)

# A token loop over more than this takes seconds.
MAX_LOOP = 3_000_000

# Small enough that the formulas below may hold one matrix per row.
SMALL = make_problem(19, 12, 10, 5, 2, bias=True, seed=3)


@pytest.fixture(params=["one-block", "many-blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's rows in one block, and in several."""
    if request.param == "many-blocks":
        make_blocks_small(monkeypatch)


@pytest.fixture(params=["whole", "chain"])
def whole_or_chain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``experts`` and ``experts_bwd`` in one pass of their own, and made of the single ops."""
    if request.param == "chain":
        chain_single_ops(monkeypatch)


@dataclass
class Rows:
    """Everything between the input and the gradients of a problem, per row, from the formulas; and the maps, int32."""

    offset_E1: Tensor
    token_R: Tensor
    row_by_token_R: Tensor
    token_offset_T1: Tensor
    scores_R: Tensor | None
    h_RU: Tensor
    a_RN: Tensor
    y_RD: Tensor
    out_TD: Tensor
    dh_RU: Tensor
    scaled_a_RN: Tensor
    dscores_R: Tensor
    dx_RD: Tensor
    dx_TD: Tensor
    dw1_EUD: Tensor
    dw2_EDN: Tensor
    db1_EU: Tensor
    db2_ED: Tensor


def rows_of(problem: Problem, scored: bool = True) -> Rows:
    """The formulas, written out for all rows at once; float64 whatever the dtype of ``problem``."""
    T, E = problem.x.shape[0], problem.w1.shape[0]
    grouped = problem.grouped()
    token, expert = grouped.token_of_row, grouped.expert_of_row
    x, dout, w1, w2 = (tensor.double() for tensor in (problem.x, problem.dout, problem.w1, problem.w2))
    scores = grouped.row_scores.double()[:, None] if scored else torch.ones(len(token), 1, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(expert, E).double()
    tokens = torch.nn.functional.one_hot(token, T).double().t() if T else x.new_zeros(0, 0)
    # H = W1[e] X[t] + b1[e], A = act(H), Y = W2[e] A + b2[e], O = sum of s Y
    h = torch.einsum("rud,rd->ru", w1[expert], x[token])
    if problem.b1 is not None:
        h = h + problem.b1.double()[expert]
    h.requires_grad_()
    a = formula(problem.activation, problem.glu_layout, h)
    y = torch.einsum("rdn,rn->rd", w2[expert], a.detach())
    if problem.b2 is not None:
        y = y + problem.b2.double()[expert]
    # dA' = W2[e]^T dO[t], dS = <dO[t], Y>, dH = act'(H) s dA'
    da = torch.einsum("rdn,rd->rn", w2[expert], dout[token])
    (dh,) = torch.autograd.grad(a, h, scores * da) if len(token) else (torch.zeros_like(h),)
    dx = torch.einsum("rud,ru->rd", w1[expert], dh)
    count = torch.bincount(token, minlength=T)
    return Rows(
        offset_E1=torch.nn.functional.pad(grouped.tokens_per_expert.cumsum(0), (1, 0)).int(),
        token_R=token.int(),
        row_by_token_R=torch.argsort(token, stable=True).int(),
        token_offset_T1=torch.nn.functional.pad(count.cumsum(0), (1, 0)).int(),
        scores_R=grouped.row_scores if scored else None,
        h_RU=h.detach(),
        a_RN=a.detach(),
        y_RD=y,
        out_TD=tokens @ (scores * y),
        dh_RU=dh,
        scaled_a_RN=scores * a.detach(),
        dscores_R=(dout[token] * y).sum(1),
        dx_RD=dx,
        dx_TD=tokens @ dx,
        dw1_EUD=torch.einsum("re,ru,rd->eud", one_hot, dh, x[token]),
        dw2_EDN=torch.einsum("re,rd,rn->edn", one_hot, dout[token], scores * a.detach()),
        db1_EU=one_hot.t() @ dh,
        db2_ED=one_hot.t() @ (scores * dout[token]),
    )


def single_ops(problem: Problem, rows: Rows, gathered: bool = True) -> dict[str, Tensor]:
    """Every output of every single op, by the name it has in :class:`Rows`; each op gets exact inputs, not the last's.

    Without ``gathered``, the rows stand in order: X and dO are gathered here, and the ops get no map.
    """
    dtype = problem.x.dtype
    act = (problem.activation, problem.glu_layout)
    token_R = rows.token_R if gathered else None
    x, dout = (tensor if gathered else tensor[rows.token_R.long()].contiguous() for tensor in (problem.x, problem.dout))
    h, a, y = rows.h_RU.to(dtype), rows.a_RN.to(dtype), rows.y_RD.to(dtype)
    dh, scaled_a, dx = rows.dh_RU.to(dtype), rows.scaled_a_RN.to(dtype), rows.dx_RD.to(dtype)
    offset, scores = rows.offset_E1, rows.scores_R
    maps = rows.row_by_token_R, rows.token_offset_T1
    got: dict[str, Tensor] = {}
    got["h_RU"], got["a_RN"] = ops.up_proj(x, problem.w1, problem.b1, token_R, offset, *act)
    got["y_RD"] = ops.down_proj(a, problem.w2, problem.b2, None, offset)
    got["out_TD"] = ops.combine(y, scores, *maps)
    got["dh_RU"], got["scaled_a_RN"], got["dscores_R"] = ops.down_proj_bwd_input(
        dout, h, problem.w2, problem.b2, scores, token_R, offset, *act
    )
    got["dx_RD"] = ops.up_proj_bwd_input(dh, problem.w1, offset)
    got["dx_TD"] = ops.combine(dx, None, *maps)
    got["dw1_EUD"], got["db1_EU"] = ops.up_proj_bwd_weight(dh, x, token_R, offset, need_bias=True)
    got["dw2_EDN"], got["db2_ED"] = ops.down_proj_bwd_weight(
        dout, scaled_a, scores, token_R, offset, need_weight=True, need_bias=True
    )
    return got


def whole_pass(
    problem: Problem, rows: Rows, keep_h: bool = True, bias_grads: bool = True, gathered: bool = True
) -> dict[str, Tensor]:
    """``experts`` and ``experts_bwd``, by the names of :class:`Rows`; without ``gathered`` a caller's grouped rows."""
    act = (problem.activation, problem.glu_layout)
    x, dout = problem.x, problem.dout
    maps: tuple[Tensor | None, ...] = rows.token_R, rows.row_by_token_R, rows.token_offset_T1
    if not gathered:
        x, dout = (tensor[rows.token_R.long()].contiguous() for tensor in (x, dout))
        maps = None, None, None
    weights = problem.w1, problem.w2, problem.b1, problem.b2, rows.scores_R, rows.offset_E1
    out, h = ops.experts(x, *weights, *maps, *act, keep_h)
    kept = h if keep_h else None
    grads = ops.experts_bwd(dout, x, kept, *weights, maps[0], *act, need_db1=bias_grads, need_db2=bias_grads)
    names = ("dx_TD", "dw1_EUD", "dw2_EDN", "db1_EU", "db2_ED", "dscores_R")
    return {"out_TD": out, "h_RU": h} | dict(zip(names, grads, strict=True))


def assert_rows(got: dict[str, Tensor], rows: Rows, tolerance: float = 1e-12) -> None:
    assert_all_close(got, {name: getattr(rows, name) for name in got}, tolerance)


def with_tail(tensor: Tensor | None, tail: int, value: float = float("nan")) -> Tensor | None:
    """``tensor`` with ``tail`` more rows of ``value``."""
    return None if tensor is None else torch.cat((tensor, tensor.new_full((tail, *tensor.shape[1:]), value)))


class TestOracles:
    """What everything else is measured by has to be right itself."""

    @pytest.mark.parametrize("bias", BIASES, ids=["plain", "bias"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_torch_experts_is_the_token_loop(self, activation: str, glu_layout: str, bias: bool) -> None:
        problem = make_problem(9, 6, 5, 4, 2, activation=activation, glu_layout=glu_layout, bias=bias)
        assert_all_close(results(torch_experts, problem), results(dense_loop, problem))

    @pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
    def test_rows_add_up_to_the_token_loop(self, scored: bool) -> None:
        problem = SMALL if scored else make_problem(19, 12, 10, 5, 2, bias=True, seed=3)
        if not scored:
            problem.scores = torch.ones_like(problem.scores)
        loop, rows = results(dense_loop, problem), rows_of(problem, scored)
        names = {"out": "out_TD", "x": "dx_TD", "w1": "dw1_EUD", "w2": "dw2_EDN", "b1": "db1_EU", "b2": "db2_ED"}
        assert_all_close({name: getattr(rows, field) for name, field in names.items()}, {n: loop[n] for n in names})
        slot = problem.grouped().slot_of_row
        assert_all_close({"scores": rows.dscores_R}, {"scores": loop["scores"].reshape(-1)[slot]})

    def test_clamps_and_kinks_are_met(self) -> None:
        """Else a wrong derivative beyond them would go unseen."""
        h = rows_of(make_problem(19, 12, 10, 5, 2, activation="swiglu_oai")).h_RU
        gate, up = h.chunk(2, dim=1)
        for beyond in (gate > 7, gate < -7, up > 7, up < -7):
            assert 0.005 < beyond.double().mean() < 0.3

    def test_measures_see_one_wrong_element(self) -> None:
        want = torch.randn(300, 200)
        got = want.clone()
        got[17, 3] += 1
        with pytest.raises(AssertionError, match=r"y: .*fp32; worst at \(17, 3\).*where torch has"):
            assert_all_as_good_as_torch({"y": got}, {"y": want.double()}, {"y": want}, torch.float32)
        many = torch.ones(1_000_000)
        hidden = many.clone()
        hidden[5] = 1.1  # 1e-4 of the whole
        with pytest.raises(AssertionError, match="largest_error"):
            assert_all_as_good_as_torch({"y": hidden}, {"y": many.double()}, {"y": many}, torch.float16)
        for bad in (float("nan"), float("inf")):
            got[17, 3] = bad
            with pytest.raises(AssertionError, match=r"worst at \(17, 3\)"):
                assert_all_close({"y": got}, {"y": want})
        assert_all_close({"y": want.bfloat16()}, {"y": want}, tolerance=0.05)


class TestSingleOps:
    """Each op with exact inputs, so that none hides behind another."""

    @pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "in-order"])
    @pytest.mark.parametrize("shape", shape_ids(tuple(shape for shape in FULL if shape.D * shape.N <= 14_000)))
    def test_shapes(self, shape: Shape, gathered: bool, blocks: None) -> None:
        problem = problem_of(shape, bias=True)
        rows = rows_of(problem)
        assert_rows(single_ops(problem, rows, gathered), rows)

    @pytest.mark.parametrize("bias", BIASES, ids=["plain", "bias"])
    @pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_activations(self, activation: str, glu_layout: str, scored: bool, bias: bool, blocks: None) -> None:
        problem = make_problem(19, 12, 10, 5, 2, activation=activation, glu_layout=glu_layout, bias=bias)
        rows = rows_of(problem, scored)
        assert_rows(single_ops(problem, rows), rows)

    def test_down_proj_multiplies_finished_rows_by_their_score(self, blocks: None) -> None:
        rows = rows_of(SMALL)
        got = ops.down_proj(rows.a_RN, SMALL.w2, SMALL.b2, rows.scores_R, rows.offset_E1)
        assert_all_close({"y": got}, {"y": rows.y_RD * rows.scores_R[:, None]})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=short)
    def test_scores_of_another_dtype(self, dtype: torch.dtype) -> None:
        problem = make_problem(19, 12, 10, 5, 2, bias=True, seed=3)
        problem.scores = problem.scores.to(dtype).double()
        rows = rows_of(problem)
        rows.scores_R = rows.scores_R.to(dtype)
        assert_rows(single_ops(problem, rows), rows)

    @pytest.mark.parametrize("need", [True, False])
    def test_what_is_not_needed_comes_back_empty(self, need: bool) -> None:
        rows, act = rows_of(SMALL), (SMALL.activation, SMALL.glu_layout)
        width_n, width_u, width_d = SMALL.w2.shape[2], SMALL.w1.shape[1], SMALL.w1.shape[2]
        h, a = ops.up_proj(SMALL.x, SMALL.w1, SMALL.b1, rows.token_R, rows.offset_E1, *act, need)
        assert_all_close({"a_RN": a}, {"a_RN": rows.a_RN})
        for need_other in (True, False):
            dh, scaled_a, dscores = ops.down_proj_bwd_input(
                SMALL.dout, rows.h_RU, SMALL.w2, SMALL.b2, rows.scores_R, rows.token_R, rows.offset_E1, *act,
                need, need_other,
            )  # fmt: skip
            got = {"scaled_a_RN": scaled_a} | ({"dh_RU": dh} if need else {})
            assert_rows(got | ({"dscores_R": dscores} if need_other else {}), rows)
            assert need or dh.shape == (0, width_u)
            assert need_other or dscores.shape == (0,)
            dw1, db1 = ops.up_proj_bwd_weight(rows.dh_RU, SMALL.x, rows.token_R, rows.offset_E1, need, need_other)
            dw2, db2 = ops.down_proj_bwd_weight(
                SMALL.dout, rows.scaled_a_RN, rows.scores_R, rows.token_R, rows.offset_E1, need, need_other
            )
            assert_rows({"dw1_EUD": dw1, "dw2_EDN": dw2} if need else {}, rows)
            assert_rows({"db1_EU": db1, "db2_ED": db2} if need_other else {}, rows)
            assert need or (dw1.shape, dw2.shape) == ((0, width_u, width_d), (0, width_d, width_n))
            assert need_other or (db1.shape, db2.shape) == ((0, width_u), (0, width_d))
        assert need or h.shape == (0, width_u)

    @pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "in-order"])
    def test_rows_after_the_last_offset_belong_to_nobody(self, gathered: bool, blocks: None) -> None:
        """Whatever stands there, NaN included, counts nowhere; what a caller gets of it is zero."""
        rows, tail = rows_of(SMALL), 7
        R, act = len(rows.token_R), (SMALL.activation, SMALL.glu_layout)
        token_R = with_tail(rows.token_R, tail, 0) if gathered else None
        x, dout = SMALL.x, SMALL.dout
        if not gathered:
            x, dout = (with_tail(tensor[rows.token_R.long()], tail) for tensor in (x, dout))
        offset, scores = rows.offset_E1, with_tail(rows.scores_R, tail)
        h, a, dh, scaled_a = (with_tail(t, tail) for t in (rows.h_RU, rows.a_RN, rows.dh_RU, rows.scaled_a_RN))

        got_h, got_a = ops.up_proj(x, SMALL.w1, SMALL.b1, token_R, offset, *act)
        assert_rows({"h_RU": got_h[:R], "a_RN": got_a[:R]}, rows)
        dw1, db1 = ops.up_proj_bwd_weight(dh, x, token_R, offset, True, True)
        dw2, db2 = ops.down_proj_bwd_weight(dout, scaled_a, scores, token_R, offset, True, True)
        assert_rows({"dw1_EUD": dw1, "db1_EU": db1, "dw2_EDN": dw2, "db2_ED": db2}, rows)
        got_dh, got_scaled_a, dscores = ops.down_proj_bwd_input(
            dout, h, SMALL.w2, SMALL.b2, scores, token_R, offset, *act
        )
        assert_rows({"scaled_a_RN": got_scaled_a[:R]}, rows)
        y = ops.down_proj(a, SMALL.w2, SMALL.b2, None, offset)
        scored_y = ops.down_proj(a, SMALL.w2, SMALL.b2, scores, offset)
        dx = ops.up_proj_bwd_input(dh, SMALL.w1, offset)
        for name, tensor in {"y_RD": y, "dh_RU": got_dh, "dscores_R": dscores, "dx_RD": dx}.items():
            assert_rows({name: tensor[:R]}, rows)
            assert torch.equal(tensor[R:], torch.zeros_like(tensor[R:])), name
        assert torch.equal(scored_y[R:], torch.zeros_like(scored_y[R:]))

    def test_combine_takes_any_number_of_rows_per_token(self) -> None:
        y = torch.randn(6, 4, dtype=torch.float64)
        offset = torch.tensor([0, 0, 3, 3, 6, 6], dtype=torch.int32)
        order = torch.tensor([5, 0, 2, 1, 3, 4], dtype=torch.int32)
        scores = torch.rand(6, dtype=torch.float32)
        want = torch.zeros(5, 4, dtype=torch.float64)
        want[1] = (scores.double()[:, None] * y)[[5, 0, 2]].sum(0)
        want[3] = (scores.double()[:, None] * y)[[1, 3, 4]].sum(0)
        assert_all_close({"out": ops.combine(y, scores, order, offset)}, {"out": want})

    @pytest.mark.parametrize("dtype", HALVES, ids=short)
    def test_combine_sums_16_bits_in_float32(self, dtype: torch.dtype) -> None:
        """64 rows of a token: summed in 16 bits, the small ones would be lost beside the large."""
        y = torch.cat((torch.full((1, 8), 256.0), torch.full((63, 8), 0.25))).to(dtype)
        out = ops.combine(y, None, torch.arange(64, dtype=torch.int32), torch.tensor([0, 64], dtype=torch.int32))
        assert torch.equal(out, torch.full((1, 8), 256.0 + 63 / 4).to(dtype))

    @pytest.mark.parametrize(
        ("offset", "rows"),
        [([1, 3, 6], 6), ([0, 4, 2], 6), ([0, 3, 7], 6), ([0, -1, 6], 6)],
        ids=["first-not-zero", "falling", "beyond-the-rows", "negative"],
    )
    def test_offsets_that_are_none_are_refused(self, offset: list[int], rows: int) -> None:
        offset_E1 = torch.tensor(offset, dtype=torch.int32)
        x, w1, w2 = torch.randn(rows, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
        h, a = torch.randn(rows, 6), torch.randn(rows, 3)
        act = ("swiglu", "concatenated")
        for call in (
            lambda: ops.up_proj(x, w1, None, None, offset_E1, *act),
            lambda: ops.down_proj(a, w2, None, None, offset_E1),
            lambda: ops.down_proj_bwd_input(x, h, w2, None, None, None, offset_E1, *act),
            lambda: ops.down_proj_bwd_weight(x, a, None, None, offset_E1),
            lambda: ops.up_proj_bwd_input(h, w1, offset_E1),
            lambda: ops.up_proj_bwd_weight(h, x, None, offset_E1),
            lambda: ops.experts(x, w1, w2, None, None, None, offset_E1, None, None, None, *act),
            lambda: ops.experts_bwd(x, x, h, w1, w2, None, None, None, offset_E1, None, *act),
        ):
            with pytest.raises(ValueError, match="expert_offset_E1 is"):
                call()


class TestWholePass:
    """``experts`` and ``experts_bwd``: the formula, in one pass and as a chain, in any number of blocks."""

    @pytest.mark.parametrize("shape", shape_ids(FULL))
    def test_shapes(self, shape: Shape, blocks: None, whole_or_chain: None) -> None:
        problem = problem_of(shape, bias=True)
        costs_little = shape.T * shape.K * shape.D * shape.N <= MAX_LOOP
        want = results(dense_loop if costs_little else torch_experts, problem)
        for save in SAVE_MODES:
            assert_all_close(sonic_results(problem, save=save), want)

    @pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "in-order"])
    @pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_activations(
        self, activation: str, glu_layout: str, scored: bool, gathered: bool, blocks: None, whole_or_chain: None
    ) -> None:
        for bias in BIASES:
            problem = make_problem(19, 12, 10, 5, 2, activation=activation, glu_layout=glu_layout, bias=bias)
            rows = rows_of(problem, scored)
            if not gathered:  # nothing is summed per token
                rows.dx_TD = rows.dx_RD
                rows.out_TD = rows.y_RD if rows.scores_R is None else rows.y_RD * rows.scores_R[:, None]
            for keep_h in (True, False):
                got = whole_pass(problem, rows, keep_h, gathered=gathered)
                if not keep_h:
                    assert got.pop("h_RU").shape == (0, problem.w1.shape[1])
                assert_rows(got, rows)

    @pytest.mark.parametrize("need", range(1, 64))
    def test_every_set_of_needed_gradients(self, need: int, whole_or_chain: None) -> None:
        names = ("dx_TD", "dw1_EUD", "dw2_EDN", "db1_EU", "db2_ED", "dscores_R")
        needs = [bool(need >> bit & 1) for bit in range(6)]
        rows = rows_of(SMALL)
        grads = ops.experts_bwd(
            SMALL.dout, SMALL.x, None if need % 2 else rows.h_RU, SMALL.w1, SMALL.w2, SMALL.b1, SMALL.b2,
            rows.scores_R, rows.offset_E1, rows.token_R,
            SMALL.activation, SMALL.glu_layout, *needs,
        )  # fmt: skip
        for name, grad, needed in zip(names, grads, needs, strict=True):
            if needed:
                assert_rows({name: grad}, rows)
            else:
                assert grad.shape == (0, *getattr(rows, name).shape[1:]), name

    def test_rows_after_the_last_offset_belong_to_nobody(self, blocks: None, whole_or_chain: None) -> None:
        rows, tail = rows_of(SMALL), 7
        R, offset, act = len(rows.token_R), rows.offset_E1, (SMALL.activation, SMALL.glu_layout)
        x, dout = (with_tail(tensor[rows.token_R.long()], tail) for tensor in (SMALL.x, SMALL.dout))
        scores = with_tail(rows.scores_R, tail)
        weights = SMALL.w1, SMALL.w2, SMALL.b1, SMALL.b2, scores, offset, None
        out, h = ops.experts(x, *weights, None, None, *act)
        assert_all_close({"out": out[:R]}, {"out": rows.y_RD * rows.scores_R[:, None]})
        for kept in (h, None):
            dx, dw1, dw2, db1, db2, dscores = ops.experts_bwd(
                dout, x, kept, *weights, *act, need_db1=True, need_db2=True
            )
            assert_rows({"dw1_EUD": dw1, "dw2_EDN": dw2, "db1_EU": db1, "db2_ED": db2}, rows)
            assert_rows({"dx_RD": dx[:R], "dscores_R": dscores[:R]}, rows)
            for name, tensor in {"out": out, "dx": dx, "dscores": dscores}.items():
                assert torch.equal(tensor[R:], torch.zeros_like(tensor[R:])), name

    @pytest.mark.parametrize("rows_per_block", [1, 2, 7, 100])
    def test_any_block_size_gives_the_same(self, rows_per_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = problem_of(QUICK[0], bias=True)
        want = sonic_results(problem)
        make_blocks_small(monkeypatch, rows_per_block)
        assert_all_close(sonic_results(problem), want)

    @pytest.mark.parametrize("rows_per_block", [1, 3, 5, 64])
    def test_blocks_cover_each_row_once(self, rows_per_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        make_blocks_small(monkeypatch, rows_per_block)
        offset = torch.tensor([0, 0, 1, 14, 14, 30, 33, 33], dtype=torch.int32)
        seen = torch.zeros(40, dtype=torch.int64)
        block = reference_blocks.Block(torch.zeros(1), 3)
        for expert, start, stop in block.spans(offset, 40, 7):
            assert offset[expert] <= start < stop <= offset[expert + 1]
            assert stop - start <= rows_per_block
            seen[start:stop] += 1
        assert seen.tolist() == [1] * 33 + [0] * 7

    @pytest.mark.parametrize("path", ["native", "widened"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    def test_runs_repeat_to_the_last_bit(
        self, dtype: torch.dtype, path: str, blocks: None, whole_or_chain: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        take_16bit_path(monkeypatch, path)
        problem = problem_of(QUICK[0], dtype, bias=True)
        first = sonic_results(problem)
        assert_same_bits(sonic_results(problem), first)

    def test_inputs_stay_as_they_are(self, blocks: None, whole_or_chain: None) -> None:
        """Kernels work in place where they can; never in place of an argument."""
        for activation in sonic.ACTIVATIONS:
            problem = make_problem(19, 12, 10, 5, 2, activation=activation, bias=True)
            rows = rows_of(problem)
            tensors = {name: t for name, t in (vars(problem) | vars(rows)).items() if isinstance(t, Tensor)}
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            single_ops(problem, rows)
            single_ops(problem, rows, gathered=False)
            whole_pass(problem, rows)
            whole_pass(problem, rows, gathered=False)
            assert_same_bits(tensors, before)


class TestSixteenBits:
    """Both ways through 16-bit dtypes: widened to float32, and multiplied as they are."""

    @pytest.mark.parametrize("path", ["native", "widened"])
    @pytest.mark.parametrize("dtype", HALVES, ids=short)
    @pytest.mark.parametrize("activation", ["swiglu", "relu2", "swiglu_oai"])
    def test_single_ops(
        self, activation: str, dtype: torch.dtype, path: str, blocks: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each op gets inputs that are exact but for one rounding, so its error is a few roundings at most."""
        take_16bit_path(monkeypatch, path)
        problem = make_problem(60, 40, 36, 5, 2, dtype, activation=activation, bias=True)
        rows = rows_of(problem)
        for name, got in single_ops(problem, rows).items():
            assert got.dtype == (torch.float32 if name == "dscores_R" else dtype)
            tolerance = 2 * torch.finfo(dtype).eps
            if activation == "swiglu_oai" and name in ("dh_RU",):
                tolerance = 0.2  # a few values round across the clamp at 7, where the derivative jumps
            wrong = (got.double() - getattr(rows, name)).norm() / getattr(rows, name).norm()
            assert wrong < tolerance, f"{name}: {wrong:.3g}"

    @pytest.mark.parametrize("dtype", HALVES, ids=short)
    def test_path_follows_the_processor(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        one = torch.zeros(1, dtype=dtype)
        take_16bit_path(monkeypatch, "native")
        assert reference_blocks.compute_dtype(one) == dtype
        take_16bit_path(monkeypatch, "widened")
        assert reference_blocks.compute_dtype(one) == torch.float32
        assert reference_blocks.compute_dtype(one.double()) == torch.float64
        assert reference_blocks.compute_dtype(torch.zeros(1, dtype=dtype, device="meta")) == dtype

    @pytest.mark.parametrize(
        ("cpuinfo", "fast"),
        [
            ("flags : avx512f avx512_bf16", set()),
            ("flags : avx512f avx512_bf16 amx_bf16 amx_tile", {torch.bfloat16}),
            ("flags : amx_bf16 amx_fp16", set(HALVES)),
            ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", {torch.bfloat16}),
            ("vendor_id : AuthenticAMD\nflags : avx2", set()),
            ("Features : fp asimd asimdhp bf16", set(HALVES)),
            ("Features : fp asimd", set()),
            ("", set(HALVES)),
        ],
        ids=["intel", "amx", "amx-fp16", "amd", "amd-old", "arm", "arm-old", "unknown"],
    )
    def test_what_linux_says_of_the_processor(
        self, cpuinfo: str, fast: set[torch.dtype], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text(cpuinfo)
        monkeypatch.setattr(reference_blocks, "Path", lambda _: file)
        assert reference_blocks._fast_16bit_dtypes.__wrapped__() == fast


class TestGradcheck:
    """Analytic gradients against finite differences in float64: no formula of ours in between."""

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("bias", BIASES, ids=["plain", "bias"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_moe_mlp(self, activation: str, glu_layout: str, bias: bool, save: str) -> None:
        problem = make_problem(3, 3, 2, 3, 2, activation=activation, glu_layout=glu_layout, bias=bias)
        leaves, plan = problem.leaves(), problem.plan

        def layer(*values: Tensor) -> Tensor:
            named = dict(zip(leaves, values, strict=True))
            return sonic.moe_mlp(**named, plan=plan, **problem.options, save=save)

        assert torch.autograd.gradcheck(layer, list(leaves.values()))

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("bias", BIASES, ids=["plain", "bias"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_expert_mlp(self, activation: str, glu_layout: str, bias: bool, save: str) -> None:
        """With an empty expert, and a row that belongs to nobody."""
        problem = make_problem(5, 3, 2, 3, 1, activation=activation, glu_layout=glu_layout, bias=bias)
        leaves = problem.leaves()
        rows, row_scores = leaves.pop("x"), leaves.pop("scores").detach()[:, 0].requires_grad_()
        counts = torch.tensor([1, 0, 3])

        def layer(rows: Tensor, row_scores: Tensor, *values: Tensor) -> Tensor:
            named = dict(zip(leaves, values, strict=True))
            return sonic.expert_mlp(
                rows, tokens_per_expert=counts, row_scores=row_scores, **named, **problem.options, save=save
            )

        assert torch.autograd.gradcheck(layer, [rows, row_scores, *leaves.values()])
