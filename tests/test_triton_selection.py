"""Triton's selection of each expert's best tokens: that of a plain sort and of the reference, entry for entry.

Without a GPU the kernels are interpreted, on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonic import RoutingPlan, kernels
from sonic.kernels import ops
from sonic.routing import CapacityDropping, ExpertChoiceRouter, TokenRounding, TopKRouter

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of sums that wrap on purpose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best(
    logits_TE: Tensor,
    shift_T: Tensor | None,
    num_wanted: Sequence[int],
    plan: RoutingPlan | None = None,
    allowed_TG: Tensor | None = None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """The op on the device that Triton has; results on the CPU."""
    maps: tuple[Tensor | None, ...] = (None,) * 4
    if plan is not None:
        maps = (plan.token_of_row_R, plan.expert_offset_E1, plan.row_by_token_R, plan.token_offset_T1)
    args = [None if arg is None else arg.to(DEVICE) for arg in (logits_TE, shift_T, *maps, allowed_TG)]
    token_P, expert_P = ops.best_of_columns(*args[:2], list(num_wanted), *args[2:], backend=backend)
    return token_P.cpu(), expert_P.cpu()


def by_sorting(
    logits_TE: Tensor,
    shift_T: Tensor | None,
    num_wanted: Sequence[int],
    plan: RoutingPlan | None = None,
    allowed_TG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: every column sorted whole, one after the other."""
    value_TE = logits_TE.clone() if shift_T is None else logits_TE - shift_T[:, None]
    if plan is not None:
        expert_R = torch.arange(plan.num_experts).repeat_interleave(plan.tokens_per_expert())
        value_TE[plan.token_of_row_R.long(), expert_R] = -torch.inf
    tokens, experts = [], []
    for expert, count in enumerate(num_wanted):
        column_T = value_TE[:, expert]
        if allowed_TG is not None:
            group = expert // (logits_TE.shape[1] // allowed_TG.shape[1])
            column_T = column_T.masked_fill(~allowed_TG[:, group], -torch.inf)
        tokens.append(column_T.sort(descending=True, stable=True).indices[:count])
        experts.append(torch.full((count,), expert))
    return torch.cat(tokens), torch.cat(experts)


def assert_is_that_of_sorting(*args: Any) -> tuple[Tensor, Tensor]:
    wanted_token_P, wanted_expert_P = by_sorting(*args)
    for backend in ("triton", "reference"):
        token_P, expert_P = best(*args, backend=backend)
        assert token_P.dtype == expert_P.dtype == torch.int64, backend
        assert torch.equal(expert_P, wanted_expert_P), backend
        assert torch.equal(token_P, wanted_token_P), backend
    return wanted_token_P, wanted_expert_P


def plan_of(num_tokens: int, num_experts: int, share: float) -> RoutingPlan:
    """Random pairs: tokens with any number of experts."""
    token_P, expert_P = (torch.rand(num_tokens, num_experts) < share).nonzero(as_tuple=True)
    return RoutingPlan.from_pairs(token_P, expert_P, num_tokens, num_experts)


def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs of tokens, several tiles in each, and several blocks of columns, in few entries."""
    monkeypatch.setattr("sonic.kernels.triton.selection._VALUES_PER_TILE", 64)
    monkeypatch.setattr("sonic.kernels.triton.selection._MAX_COLUMNS", 4)
    monkeypatch.setattr("sonic.kernels.triton.selection._MIN_TOKENS_PER_PROGRAM", 32)


# ---------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("T", "E", "dtype"),
    [(1, 1, torch.float32), (1, 5, torch.float16), (150, 7, torch.float32), (40, 37, torch.float16)],
    ids=str,
)
def test_best_of_every_column(T: int, E: int, dtype: torch.dtype) -> None:
    logits_TE = torch.randn(T, E).to(dtype)  # in float16 with ties
    num_wanted = torch.randint(0, T + 1, (E,)).tolist()
    assert_is_that_of_sorting(logits_TE, torch.logsumexp(logits_TE, 1), num_wanted, plan_of(T, E, 0.2))


def test_runs_tiles_and_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs(monkeypatch)
    logits_TE, plan = torch.randn(60, 6).mul(2).round(), plan_of(60, 6, 0.2)  # with ties across all of them
    assert_is_that_of_sorting(logits_TE, None, [40, 0, 3, 60, 0, 17], plan)


def test_columns_that_nobody_wants_anything_of(monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs(monkeypatch)
    logits_TE = torch.randn(40, 9)
    logits_TE[:, :8] = torch.nan  # would be chosen first, were they looked at
    token_P, expert_P = best(logits_TE, None, [0] * 8 + [3])
    assert torch.equal(token_P, logits_TE[:, 8].sort(descending=True).indices[:3]) and expert_P.tolist() == [8, 8, 8]
    for logits_TE in (torch.randn(5, 3), torch.randn(0, 3), torch.randn(5, 0)):
        assert [index_P.shape for index_P in best(logits_TE, None, [0] * logits_TE.shape[1])] == [(0,), (0,)]


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_ties_go_to_the_lowest_tokens(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs(monkeypatch)
    logits_TE = torch.full((60, 3), value)
    logits_TE[::2] *= -1 if value == 0 else 1  # both zeros are equal
    logits_TE[30, 0] = logits_TE[50, 0] = 2e30
    token_P, _ = assert_is_that_of_sorting(logits_TE, None, [5, 0, 40])
    assert token_P.tolist() == [30, 50, 0, 1, 2, *range(40)]


def test_neighbours_in_float32_are_told_apart() -> None:
    """Every bit of a value counts, at any size and sign, and so does every digit that is searched for."""
    first = torch.tensor([1.0, -1.0, 3e38, -3e38, 1e-30, -1e-30, 1e-45, -1e-45])
    step_T1 = torch.arange(60, dtype=torch.int32)[torch.randperm(60)][:, None]
    logits_TE = (first.view(torch.int32) - step_T1 * first.sign().int()).view(torch.float32)
    logits_TE = torch.where(logits_TE.isfinite() & (logits_TE.sign() == first.sign()), logits_TE, -torch.inf)
    assert_is_that_of_sorting(logits_TE, None, [7, 20, 1, 59, 33, 2, 2, 1])
    wide_TE = torch.randint(-(2**31), 2**31, (100, 6)).int().view(torch.float32)
    assert_is_that_of_sorting(torch.where(wide_TE.isnan(), torch.inf, wide_TE), None, [1, 10, 50, 90, 99, 100])


def test_what_is_no_candidate_comes_last() -> None:
    """Pairs of the plan, other groups and -inf: taken only where nothing else is left, lowest tokens first."""
    logits_TE, plan, allowed_TG = torch.randn(60, 6), plan_of(60, 6, 0.4), torch.rand(60, 3) < 0.6
    logits_TE[torch.rand(60, 6) < 0.1] = -torch.inf
    is_out_TE = ~allowed_TG.repeat_interleave(2, dim=1) | (logits_TE == -torch.inf)
    expert_R = torch.arange(6).repeat_interleave(plan.tokens_per_expert())
    is_out_TE[plan.token_of_row_R.long(), expert_R] = True
    candidates = (~is_out_TE).sum(0).tolist()
    assert min(candidates) > 5 and max(candidates) < 50
    token_P, expert_P = assert_is_that_of_sorting(logits_TE, None, candidates, plan, allowed_TG)
    assert not is_out_TE[token_P, expert_P].any()
    token_P, expert_P = assert_is_that_of_sorting(logits_TE, None, [n + 4 for n in candidates], plan, allowed_TG)
    for expert in range(6):
        last = token_P[expert_P == expert][-4:]
        assert torch.equal(last, is_out_TE[:, expert].nonzero()[:4, 0])


@settings(max_examples=6)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 4), st.integers(1, 3)),
    levels=st.sampled_from((1, 3, 1000)),
    share=st.sampled_from((0.0, 0.1, 0.7)),
    has_shift=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_table(shape: tuple[int, int, int], levels: int, share: float, has_shift: bool, seed: int) -> None:
    torch.manual_seed(seed)
    T, num_groups, group_size = shape
    E = num_groups * group_size
    logits_TE = torch.randint(-levels, levels + 1, (T, E)) / 7
    num_wanted = torch.randint(0, T + 1, (E,)).tolist()
    allowed_TG = torch.rand(T, num_groups) < 0.7 if num_groups > 1 else None
    shift_T = torch.randint(0, 3, (T,)) / 7 if has_shift else None
    assert_is_that_of_sorting(logits_TE, shift_T, num_wanted, plan_of(T, E, share) if share else None, allowed_TG)


def test_tables_and_maps_that_are_not_contiguous() -> None:
    logits_TE, shift_T, allowed_TG = torch.randn(40, 12), torch.randn(80), torch.rand(3, 40) < 0.7
    plan = plan_of(40, 6, 0.3)
    args = (logits_TE[:, ::2], shift_T[::2], [3, 0, 8, 1, 2, 9], plan, allowed_TG.t())
    assert_is_that_of_sorting(*args)
    wanted = best(args[0].contiguous(), args[1].contiguous(), *args[2:])
    assert all(map(torch.equal, best(logits_TE[:, ::2].t().contiguous().t(), *args[1:]), wanted))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="guards of CPU memory")
def test_nothing_is_written_outside_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs(monkeypatch)
    guarded: list[tuple[Tensor, int]] = []
    real = torch.empty

    def empty(size: Any, **options: Any) -> Tensor:
        if not isinstance(size, int):
            return real(size, **options)
        guarded.append((torch.full((size + 128,), 77, **options), size))
        return guarded[-1][0][64 : 64 + size]

    logits_TE, plan = torch.randn(50, 6).round(), plan_of(50, 6, 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        best(logits_TE, None, [1, 0, 50, 2, 0, 30], plan)
    assert guarded
    for array, size in guarded:
        assert (array[:64] == 77).all() and (array[64 + size :] == 77).all()


# ---------------------------------------------------------------- where it is used


def test_routers_on_this_backend() -> None:
    """Rounding pads and drops, capacity drops and expert choice takes as on the reference."""
    x = torch.randn(80, 8).to(DEVICE)
    for wrap in (
        lambda backend: TokenRounding(TopKRouter(8, 5, 2, backend=backend), tile_rows=8),
        lambda backend: CapacityDropping(TopKRouter(8, 5, 2, backend=backend), capacity_factor=1.0),
        lambda backend: ExpertChoiceRouter(8, 5, 2, backend=backend),
    ):
        routings = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            kernels.reset_counts()
            routings.append(wrap(backend).to(DEVICE)(x))
            assert kernels.counts()["best_of_columns", backend] >= 1
        mine, theirs = routings
        assert torch.equal(mine.plan.token_of_row_R, theirs.plan.token_of_row_R)
        assert torch.equal(mine.plan.expert_offset_E1, theirs.plan.expert_offset_E1)


def test_explain_asks_what_expert_choice_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("sonic.kernels.reference.unsupported_reasons", lambda request: seen.append(request) or [])
    ExpertChoiceRouter(8, 4, 2, capacity_factor=1.0)(torch.randn(30, 8))
    sizes = {"num_tokens": 30, "num_experts": 4, "top_k": 2, "hidden_size": 8, "intermediate_size": 4}
    told = kernels.explain("best_of_columns", **sizes, dtype=torch.bfloat16)
    assert told.request in seen[:-1]


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "E", "K"), [(1024, 128, 8), (16384, 97, 8), (2**17, 64, 4), (50000, 512, 10)])
def test_on_a_gpu_it_waits_for_nothing(T: int, E: int, K: int) -> None:
    logits_TE = torch.randn(T, E, device="cuda")
    plan = RoutingPlan.from_topk(logits_TE.topk(K).indices, E)
    maps = (plan.token_of_row_R, plan.expert_offset_E1, plan.row_by_token_R, plan.token_offset_T1)
    num_wanted = torch.randint(0, 128, (E,)).tolist()
    args = (logits_TE, torch.logsumexp(logits_TE, 1), num_wanted, *maps)
    ops.best_of_columns(*args, backend="triton")  # compiled
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ops.best_of_columns(*args, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    wanted = ops.best_of_columns(*args, backend="reference")
    assert all(map(torch.equal, got, wanted))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_wanted": [1, 2]}, "num_wanted is of 2 entries, expected one per expert, E = 3"),
        ({"num_wanted": [1, 2, 7]}, "num_wanted is a list with 7, expected integers from 0 to T = 6"),
        ({"num_wanted": [1, -1, 2]}, "num_wanted is a list with -1, expected integers from 0 to T = 6"),
        ({"shift_T": torch.zeros(5)}, "shift_T is (5,), expected (T,) = (6,)"),
        ({"shift_T": torch.zeros(6).half()}, "shift_T is"),
        ({"row_by_token_R": None}, "row_by_token_R is None, expected a tensor, as token_of_row_R: all four of a plan"),
        ({"token_of_row_R": None}, "token_of_row_R is None, expected a tensor, as expert_offset_E1: all four of a"),
        ({"token_of_row_R": torch.zeros(12)}, "token_of_row_R is float32"),
        ({"expert_offset_E1": torch.zeros(3).int()}, "expert_offset_E1 is (3,), expected (E1,) = (4,)"),
        ({"token_offset_T1": torch.zeros(6).int()}, "token_offset_T1 is (6,), expected (T1,) = (7,)"),
        ({"allowed_TG": torch.zeros(6, 2).bool()}, "allowed_TG is (6, 2), expected G a divisor of num_experts = 3"),
        ({"allowed_TG": torch.zeros(6, 3)}, "allowed_TG is float32, expected"),
        ({"logits_TE": torch.zeros(6, 3).int()}, "logits_TE is int32, expected"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[0, 1]] * 6), 3)
    names = ("token_of_row_R", "expert_offset_E1", "row_by_token_R", "token_offset_T1")
    good = {"logits_TE": torch.zeros(6, 3), "shift_T": None, "num_wanted": [1, 1, 1], "allowed_TG": None}
    with pytest.raises(ValueError) as refused:
        ops.best_of_columns(**{**good, **{name: getattr(plan, name) for name in names}, **change})
    assert message in str(refused.value) and str(refused.value).startswith("sonic.best_of_columns: ")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="asks the interpreter")
def test_float64_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SONIC_BACKEND", raising=False)
    logits_TE = torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(kernels.UnsupportedError, match="has no kernels for float64"):
        best(logits_TE, None, [1, 1, 1])
    assert best(logits_TE, None, [1, 1, 1], backend="reference")[0].shape == (3,)
