"""What an op adds to instead of storing: weight gradients to a float32 main gradient, combine to a residual."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sonic.kernels import ops
from tests.helpers import Problem, assert_as_good_as_torch, assert_close, make_problem, relative_error, short

BACKENDS = ("reference", "triton")
PAIRS = [  # the interpreter has no bfloat16
    pytest.param(dtype, backend, id=f"{short(dtype)}-{backend}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for backend in BACKENDS
    if (dtype, backend) != (torch.bfloat16, "triton")
]


@pytest.fixture(autouse=True)
def _has_triton(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.importorskip("triton")


def problem_and_rows(dtype: torch.dtype) -> tuple[Problem, Tensor, Tensor, Tensor]:
    """A problem with empty experts; random A and dH rows, and row scores."""
    problem = make_problem(37, 24, 20, 7, 2, dtype, routing="gaps")
    plan = problem.plan
    a, dh = torch.randn(plan.num_rows, 20).to(dtype), torch.randn(plan.num_rows, 40).to(dtype)
    return problem, a, dh, problem.scores.reshape(-1)[plan.slot_of_row_R.long()]


@pytest.mark.parametrize(("dtype", "backend"), PAIRS)
def test_down_weight_gradients_are_added(dtype: torch.dtype, backend: str) -> None:
    problem, a, _, scores = problem_and_rows(dtype)
    maps = problem.plan.token_of_row_R, problem.plan.expert_offset_E1
    before = torch.randn(7, 24, 20)
    main_grad = before.clone()
    dw2, db2 = ops.down_proj_bwd_weight(problem.dout, a, scores, *maps, True, True, main_grad, backend)
    double = problem.dout.double(), a.double(), scores.double()
    want, want_bias = ops.down_proj_bwd_weight(*double, *maps, True, True)
    assert dw2.shape == (0, 24, 20) and db2.shape == (7, 24)
    assert_close("main_grad", main_grad, before.double() + want, 5e-6)  # not rounded to 16 bits on the way
    assert relative_error(db2, want_bias) < 4 * torch.finfo(dtype).eps
    assert torch.equal(main_grad[0], before[0]), "an expert without rows"


@pytest.mark.parametrize(("dtype", "backend"), PAIRS)
def test_up_weight_gradients_are_added(dtype: torch.dtype, backend: str) -> None:
    problem, _, dh, _ = problem_and_rows(dtype)
    maps = problem.plan.token_of_row_R, problem.plan.expert_offset_E1
    before = torch.randn(7, 40, 24)
    main_grad = before.clone()
    for _ in range(2):
        dw1, db1 = ops.up_proj_bwd_weight(dh, problem.x, *maps, True, False, main_grad, backend)
        assert dw1.shape == (0, 40, 24) and db1.shape == (0, 40)
    want, _ = ops.up_proj_bwd_weight(dh.double(), problem.x.double(), *maps, True, False)
    assert_close("main_grad", main_grad, before.double() + 2 * want, 5e-6)


@pytest.mark.parametrize(("dtype", "backend"), PAIRS)
def test_a_whole_backward_adds_both_and_changes_nothing_else(dtype: torch.dtype, backend: str) -> None:
    problem, _, _, scores = problem_and_rows(dtype)
    offset, token = problem.plan.expert_offset_E1, problem.plan.token_of_row_R
    h, _ = ops.up_proj(problem.x, problem.w1, None, token, offset, "swiglu", "concatenated", True, backend)
    given = (problem.dout, problem.x, h, problem.w1, problem.w2, None, None, scores, offset, token)
    needs = ("swiglu", "concatenated", True, True, True, False, False, True)
    plain = ops.experts_bwd(*given, *needs, backend=backend)
    sums = torch.randn(7, 40, 24), torch.randn(7, 24, 20)
    added = tuple(total.clone() for total in sums)
    got = ops.experts_bwd(*given, *needs, None, *added, backend=backend)
    for index, total, before in zip((1, 2), added, sums, strict=True):
        assert got[index].shape[0] == 0
        error = relative_error(total - before, plain[index])
        assert error < 2 * torch.finfo(dtype).eps, f"gradient {index} differs by {error:.3g}"
    for index in (0, 3, 4, 5):
        assert torch.equal(got[index], plain[index]), f"gradient {index}"


@pytest.mark.parametrize(("dtype", "backend"), PAIRS)
@pytest.mark.parametrize("scored", [True, False])
def test_a_residual_is_added_before_rounding(scored: bool, dtype: torch.dtype, backend: str) -> None:
    problem, _, _, scores = problem_and_rows(dtype)
    y = torch.randn(problem.plan.num_rows, 24).to(dtype)
    residual = (8 * torch.randn(37, 24)).to(dtype)
    maps = problem.plan.row_by_token_R, problem.plan.token_offset_T1
    got = ops.combine(y, scores if scored else None, *maps, residual, backend)
    exact = ops.combine(y.double(), scores.double() if scored else None, *maps, residual.double())
    torchs = (exact.float().to(dtype) if dtype != torch.float32 else exact).to(dtype)
    assert got.dtype == dtype
    assert_as_good_as_torch("out", got, exact, torchs)


def test_a_residual_reaches_tokens_without_rows() -> None:
    empty, offset = torch.empty(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    residual = torch.randn(3, 5)
    assert torch.equal(ops.combine(torch.randn(0, 5), None, empty, offset, residual), residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    """The schema says what is mutated; fakes and compilers agree."""
    problem, a, dh, scores = problem_and_rows(torch.float32)
    maps = problem.plan.token_of_row_R, problem.plan.expert_offset_E1
    by_token = problem.plan.row_by_token_R, problem.plan.token_offset_T1
    down = (problem.dout, a, scores, *maps, True, True, torch.zeros(7, 24, 20), backend)
    up = (dh, problem.x, *maps, True, False, torch.zeros(7, 40, 24), backend)
    torch.library.opcheck(ops.down_proj_bwd_weight, down)
    torch.library.opcheck(ops.up_proj_bwd_weight, up)
    torch.library.opcheck(ops.combine, (torch.randn(74, 24), scores, *by_token, torch.randn(37, 24), backend))


@pytest.mark.parametrize(
    ("main_grad", "message"),
    [
        (torch.zeros(7, 24, 19), "main_grad_EDN is (7, 24, 19), expected (E, D, N) = (7, 24, 20)"),
        (torch.zeros(7, 24, 20).half(), "main_grad_EDN is float16"),
        (torch.zeros(7, 20, 24).transpose(1, 2), "main_grad_EDN is of strides (480, 1, 24), expected a contiguous"),
        (torch.zeros(7, 24, 20, device="meta"), "main_grad_EDN is on meta"),
    ],
)
def test_main_gradients_that_do_not_fit(main_grad: Tensor, message: str) -> None:
    problem, a, _, scores = problem_and_rows(torch.float32)
    maps = problem.plan.token_of_row_R, problem.plan.expert_offset_E1
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.down_proj_bwd_weight(problem.dout, a, scores, *maps, True, False, main_grad)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(36, 24), "residual_TD is (36, 24), expected (T, D) = (37, 24)"),
        (torch.zeros(37, 24).half(), "residual_TD is float16"),
    ],
)
def test_residuals_that_do_not_fit(residual: Tensor, message: str) -> None:
    problem, *_ = problem_and_rows(torch.float32)
    given: tuple[Any, ...] = (problem.plan.row_by_token_R, problem.plan.token_offset_T1)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.combine(torch.randn(74, 24), None, *given, residual)
