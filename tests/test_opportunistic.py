"""Rerouting at decode time: fewer distinct experts, no token worse than promised, and top-K itself at the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import sonic
from benchmarks.rerouting import draw_logits
from sonic.routing import HashRouter, Routing, TopKRouter
from sonic.routing.opportunistic import (
    DEFAULT_QUALITY,
    OpportunisticRouting,
    activation_report,
    reroute,
)

T, D, E, K = 16, 24, 32, 4


def distinct(expert_TK: Tensor) -> set[int]:
    return set(expert_TK[expert_TK >= 0].tolist())


def kept(mass_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """Mass of the chosen experts per token, in float64."""
    mass_TK = mass_TE.double().gather(1, expert_TK.clamp(min=0).long())
    return (mass_TK * (expert_TK >= 0)).sum(1)


def reroute_by_loops(
    logits_TE: Tensor,
    top_k: int,
    quality: float | None = None,
    min_experts: int | None = None,
    top_p: float | None = None,
    max_rank: int | None = None,
    max_batch_experts: int | None = None,
) -> list[list[int]]:
    """The same in plain Python and float64, word for word as the docstring says."""
    mass = torch.softmax(logits_TE.double(), dim=-1).tolist()
    order = [sorted(range(len(row)), key=lambda e: -row[e]) for row in logits_TE.tolist()]
    whole = [sum(mass[t][e] for e in ranks[:top_k]) for t, ranks in enumerate(order)]
    if min_experts is None:
        min_experts = top_k if top_p is None and quality is None else 1
    base = []
    for t, ranks in enumerate(order):
        count = min_experts
        while top_p is not None and count < top_k and sum(mass[t][e] for e in ranks[:count]) < top_p * whole[t]:
            count += 1
        base.append(ranks[:count])
    asked = [ranks[:top_k] for ranks in order] if quality is not None else base
    wanted: dict[int, float] = {}
    for t, experts in enumerate(asked):
        for e in experts:
            wanted[e] = wanted.get(e, 0.0) + mass[t][e]
    is_base = {e for experts in base for e in experts}
    queue = sorted(wanted, key=lambda e: (e not in is_base, -wanted[e]))

    def choose(loaded: set[int]) -> list[list[int]]:
        chosen = []
        for ranks in order:
            mine = [(rank, e) for rank, e in enumerate(ranks) if e in loaded][:top_k]
            chosen.append([e for i, (rank, e) in enumerate(mine) if i == 0 or max_rank is None or rank < max_rank])
        return chosen

    count = len(queue)
    if quality is not None:
        for count in range(len(is_base), len(queue) + 1):  # noqa: B007
            chosen = choose(set(queue[:count]))
            if sum(mass[t][e] for t, experts in enumerate(chosen) for e in experts) >= quality * sum(whole):
                break
    return choose(set(queue[: min(count, max_batch_experts or count)]))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Logits (T, E) without ties, more or less in common, and K."""
    num_experts = draw(st.integers(1, 24))
    num_tokens = draw(st.integers(0, 12))
    share = draw(st.sampled_from([0.0, 0.5, 0.9]))
    scale = draw(st.sampled_from([0.1, 1.4, 4.0]))
    logits_TE = draw_logits(num_tokens, num_experts, share, scale, draw(st.integers(0, 2**16)))
    return logits_TE, draw(st.integers(1, min(num_experts, 8)))


@st.composite
def knobs(draw: st.DrawFn, top_k: int, num_experts: int) -> dict[str, Any]:
    share = st.floats(0.01, 1.0)
    return {
        "quality": draw(st.none() | share),
        "min_experts": draw(st.none() | st.integers(1, top_k)),
        "top_p": draw(st.none() | share),
        "max_rank": draw(st.none() | st.integers(top_k, num_experts)),
        "max_batch_experts": draw(st.none() | st.integers(1, num_experts + 2)),
    }


# ---------------------------------------------------------------- the function


@given(st.data(), problems())
def test_it_chooses_as_the_plain_loops_do(data: st.DataObject, problem: tuple[Tensor, int]) -> None:
    logits_TE, top_k = problem
    options = data.draw(knobs(top_k, logits_TE.shape[1]))
    # A share that falls on a sum of masses can be decided either way by rounding.
    share = [value for name in ("quality", "top_p") if (value := options[name]) is not None]
    assume(all(value < 0.999 or value == 1 for value in share))
    expert_TK, is_chosen_TK = reroute(logits_TE, top_k, **options)
    got = [row[row >= 0].tolist() for row in expert_TK]
    assert got == reroute_by_loops(logits_TE, top_k, **options)
    assert torch.equal(is_chosen_TK, expert_TK >= 0)


@given(st.data(), problems())
def test_what_always_holds(data: st.DataObject, problem: tuple[Tensor, int]) -> None:
    logits_TE, top_k = problem
    options = data.draw(knobs(top_k, logits_TE.shape[1]))
    expert_TK, is_chosen_TK = reroute(logits_TE, top_k, **options)
    assert expert_TK.shape == is_chosen_TK.shape == (logits_TE.shape[0], top_k)
    assert expert_TK.dtype == torch.int32
    best_TK = logits_TE.topk(top_k, dim=1).indices
    assert distinct(expert_TK) <= distinct(best_TK)
    for row, logits_E in zip(expert_TK, logits_TE, strict=True):
        chosen = row[row >= 0].long()
        assert 1 <= len(chosen) == len(set(chosen.tolist()))
        assert torch.equal(row[: len(chosen)].long(), chosen), "filled places come first"
        assert (logits_E[chosen].diff() <= 0).all(), "in the order of preference"
    if options["max_batch_experts"] is not None:
        assert len(distinct(expert_TK)) <= options["max_batch_experts"]
        return
    mass_TE = torch.softmax(logits_TE.double(), dim=-1)
    kept_T, whole_T = kept(mass_TE, expert_TK), kept(mass_TE, best_TK)
    assert (kept_T <= whole_T * (1 + 1e-12)).all()
    assert (kept_T >= whole_T * ((options["top_p"] or 0) - 1e-5)).all()
    assert kept_T.sum() >= whole_T.sum() * ((options["quality"] or 0) - 1e-5)
    least = options["min_experts"] or 1
    assert torch.equal(expert_TK[:, :least].long(), best_TK[:, :least]), "the best few are always there"


@given(problems(), st.sampled_from(["quality", "top_p", "min_experts", "max_batch_experts"]))
def test_more_of_a_knob_loads_more_and_keeps_more(problem: tuple[Tensor, int], knob: str) -> None:
    logits_TE, top_k = problem
    mass_TE = torch.softmax(logits_TE, dim=-1)
    values: dict[str, list[float]] = {
        "quality": [0.3, 0.6, 0.8, 0.9, 0.97, 1.0],
        "top_p": [0.1, 0.3, 0.6, 0.8, 0.9, 1.0],
        "min_experts": list(range(1, top_k + 1)),
        "max_batch_experts": list(range(1, logits_TE.shape[1] + 1)),
    }
    results = [reroute(logits_TE, top_k, **{knob: value}).expert_TK for value in values[knob]]  # type: ignore[arg-type]
    for less_TK, more_TK in zip(results, results[1:], strict=False):
        assert distinct(less_TK) <= distinct(more_TK)
        assert (kept(mass_TE, less_TK) <= kept(mass_TE, more_TK) + 1e-9).all()
    assert torch.equal(results[-1].long(), logits_TE.topk(top_k, dim=1).indices)


@given(problems())
def test_max_rank_takes_away_and_gives_back(problem: tuple[Tensor, int]) -> None:
    logits_TE, top_k = problem
    counts = [
        reroute(logits_TE, top_k, min_experts=1, max_rank=max_rank).is_chosen_TK.sum(1)
        for max_rank in range(top_k, logits_TE.shape[1] + 1)
    ]
    assert all((less_T <= more_T).all() for less_T, more_T in zip(counts, counts[1:], strict=False))
    assert torch.equal(counts[-1], reroute(logits_TE, top_k, min_experts=1).is_chosen_TK.sum(1))


def test_a_worked_example() -> None:
    # Token 0 prefers 0 1 2 3, token 1 prefers 1 0 3 2, token 2 prefers 3 2 1 0.
    mass_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.2, 0.6, 0.08, 0.12], [0.01, 0.09, 0.4, 0.5]])

    def chosen(**options: Any) -> list[list[int]]:
        return reroute(mass_TE.log(), 2, **options).expert_TK.tolist()

    assert chosen() == [[0, 1], [1, 0], [3, 2]]
    assert chosen(min_experts=1) == [[0, 1], [1, 0], [3, 1]]  # 0, 1 and 3 are loaded; token 2 gets 1 in place of 2
    assert chosen(min_experts=1, max_rank=2) == [[0, 1], [1, 0], [3, -1]]
    assert chosen(top_p=0.56) == [[0, 1], [1, 0], [3, 2]]  # half of 0.9 is not enough for token 2
    assert chosen(top_p=0.55) == [[0, 1], [1, 0], [3, 1]]
    assert chosen(max_batch_experts=1) == [[1, -1]] * 3
    # Of 2.5 in all, dropping expert 2 costs 0.4 - 0.09: 0.876 is kept.
    assert chosen(quality=0.87) == [[0, 1], [1, 0], [3, 1]]
    assert chosen(quality=0.88) == [[0, 1], [1, 0], [3, 2]]


def test_experts_at_minus_infinity_are_never_chosen() -> None:
    logits_TE = draw_logits(T, E, 0.0, 1.4, seed=0)
    logits_TE[:, ::2] = -math.inf
    logits_TE[3, 3:] = -math.inf  # leaves expert 1
    for options in ({}, {"min_experts": 2}, {"quality": 0.8}, {"max_batch_experts": 5}):
        expert_TK, is_chosen_TK = reroute(logits_TE, K, **options)  # type: ignore[arg-type]
        assert all(e % 2 for e in distinct(expert_TK))
        assert is_chosen_TK[3].sum() <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"quality": 0.9}, {"min_experts": 2}, {"max_batch_experts": 9}], ids=str)
def test_a_broken_token_harms_no_other(value: float, options: dict[str, Any]) -> None:
    logits_TE = draw_logits(T, E, 0.5, 1.4, seed=0)
    logits_TE[5] = value
    others = [t for t in range(T) if t != 5]
    expert_TK, is_chosen_TK = reroute(logits_TE, K, **options)
    alone_TK = reroute(logits_TE[others], K, **options).expert_TK
    loaded_more = distinct(expert_TK) - distinct(alone_TK)
    assert len(loaded_more) <= K
    assert is_chosen_TK[5].any()
    if not loaded_more:
        assert torch.equal(expert_TK[others], alone_TK)


def test_ties_go_as_the_caller_says() -> None:
    expert_TK = torch.tensor([[2, 0], [3, 1]])
    logits_TE = torch.zeros(2, 4)
    assert torch.equal(reroute(logits_TE, 2, expert_index=expert_TK).expert_TK.long(), expert_TK)
    assert torch.equal(reroute(logits_TE, 2, expert_index=expert_TK, min_experts=2).expert_TK.long(), expert_TK)
    assert reroute(logits_TE, 2, expert_index=expert_TK, min_experts=1).expert_TK.tolist() == [[2, 3], [3, 2]]


def test_another_mass_decides_what_is_dropped() -> None:
    logits_TE = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    mass_TE = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 5.0]])
    assert reroute(logits_TE, 2, max_batch_experts=2).expert_TK.tolist() == [[0, 1], [0, 1]]
    assert reroute(logits_TE, 2, max_batch_experts=2, mass=mass_TE).expert_TK.tolist() == [[0, 2], [0, 2]]
    mass_TE[1, 2] = math.nan  # counts as 0
    assert reroute(logits_TE, 2, max_batch_experts=2, mass=mass_TE).expert_TK.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    "options",
    [{}, {"quality": 0.9}, {"top_p": 0.5}, {"min_experts": 2, "max_rank": 9}, {"max_batch_experts": 7}],
    ids=str,
)
def test_no_value_is_looked_at(options: dict[str, Any]) -> None:
    """Shapes alone are enough to run it, so it cannot synchronise with a GPU."""
    with FakeTensorMode() as mode:
        logits_TE = mode.from_tensor(draw_logits(T, E, 0.0, 1.4, seed=0))
        with pytest.raises(DataDependentOutputException):
            float(logits_TE.sum())
        assert reroute(logits_TE, K, **options).expert_TK.shape == (T, K)


def test_a_large_batch_is_searched_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = draw_logits(40, 24, 0.3, 1.4, seed=1)
    wide = [reroute(logits_TE, 5, quality=q / 100).expert_TK for q in range(50, 100, 7)]
    monkeypatch.setattr("sonic.routing.opportunistic._TABLE", 1)  # one count at a time
    narrow = [reroute(logits_TE, 5, quality=q / 100).expert_TK for q in range(50, 100, 7)]
    assert all(torch.equal(one, two) for one, two in zip(wide, narrow, strict=True))


GOOD = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("logits", "top_k", "options", "message"),
    [
        (GOOD[0], 2, {}, r"logits is \(8,\), expected \(T, E\)"),
        (GOOD.long(), 2, {}, "logits is int64, expected bfloat16"),
        (GOOD, 0, {}, "top_k is 0, expected a positive integer"),
        (GOOD, 9, {}, "top_k is 9, expected at most E = 8"),
        (GOOD, 2, {"quality": 0}, r"quality is 0, expected a number within \(0, 1\]"),
        (GOOD, 2, {"quality": 1.01}, "quality is 1.01"),
        (GOOD, 2, {"quality": math.nan}, "quality is nan"),
        (GOOD, 2, {"quality": True}, "quality is True"),
        (GOOD, 2, {"top_p": -0.1}, r"top_p is -0.1, expected a number within \(0, 1\]"),
        (GOOD, 2, {"min_experts": 0}, "min_experts is 0, expected a positive integer"),
        (GOOD, 2, {"min_experts": 3}, "min_experts is 3, expected at most top_k = 2"),
        (GOOD, 2, {"max_rank": 1}, "max_rank is 1, expected at least top_k = 2"),
        (GOOD, 2, {"max_batch_experts": 0}, "max_batch_experts is 0, expected a positive integer"),
        (GOOD, 2, {"max_batch_experts": 2.0}, "max_batch_experts is 2.0, expected a positive integer"),
        (GOOD, 2, {"mass": torch.zeros(3, 7)}, r"mass is \(3, 7\)"),
        (GOOD, 2, {"mass": GOOD.long()}, "mass is int64"),
        (GOOD, 2, {"expert_index": GOOD[:, :2]}, "expert_index is float32"),
        (GOOD, 2, {"expert_index": torch.zeros(3, 3, dtype=torch.int32)}, r"expert_index is \(3, 3\)"),
    ],
)
def test_reroute_refuses(logits: Tensor, top_k: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sonic.routing.reroute: {message}"):
        reroute(logits, top_k, **options)


# ---------------------------------------------------------------- the router

RULES = {
    "softmax over the chosen": {},
    "softmax, raw": {"pre_softmax": True, "topk_scaling_factor": 2.5},
    "softmax, normalised": {"pre_softmax": True, "norm_topk_prob": True},
    "sigmoid, raw": {"score_function": "sigmoid"},
    "sigmoid, normalised": {"score_function": "sigmoid", "norm_topk_prob": True, "topk_scaling_factor": 2.5},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "norm_topk_prob": True},
    "expert bias": {"score_function": "sigmoid", "norm_topk_prob": True, "enable_expert_bias": True},
    "groups": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
    "bias": {"bias": True},
}
every_rule = pytest.mark.parametrize("rule", RULES)


def router_of(rule: str = "softmax over the chosen", dtype: torch.dtype = torch.float32, **options: Any) -> TopKRouter:
    router = TopKRouter(D, E, K, dtype=dtype, **{**RULES[rule], **options})
    torch.nn.init.normal_(router.weight, std=1.4 / math.sqrt(D))
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.1)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    return router


def tokens(num_tokens: int = T, dtype: torch.dtype = torch.float32) -> Tensor:
    """Half of their variance is shared."""
    return ((torch.randn(1, D) + torch.randn(num_tokens, D)) / math.sqrt(2)).to(dtype)


def pairs(routing: Routing) -> dict[tuple[int, int], float]:
    """Score of each (token, expert), from the plan."""
    plan = routing.plan
    flat = routing.scores.detach().flatten()
    offset = plan.expert_offset_E1.tolist()
    result = {}
    for expert in range(plan.num_experts):
        for row in range(offset[expert], offset[expert + 1]):
            result[int(plan.token_of_row_R[row]), expert] = float(flat[plan.slot_of_row_R[row]])
    assert len(result) == plan.num_rows == flat.numel()
    return result


def assert_same_routing(one: Routing, two: Routing) -> None:
    for name in ("scores", "logits", "expert_index", "aux_loss"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    for name in ("expert_offset_E1", "token_of_row_R", "slot_of_row_R", "row_by_token_R", "token_offset_T1"):
        assert torch.equal(getattr(one.plan, name), getattr(two.plan, name)), name


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quality_1_is_the_router_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    router = router_of(rule, dtype).eval()
    x_TD = tokens(dtype=dtype)
    for options in ({"quality": 1.0}, {"quality": 1}, {"min_experts": K}, {"top_p": 1.0}):
        wrapped = OpportunisticRouting(router, **options).eval()  # type: ignore[arg-type]
        assert_same_routing(wrapped(x_TD), router(x_TD))
        report = wrapped.report(x_TD)
        assert report.experts_before == report.experts_after and report.score_kept == 1


@every_rule
def test_in_training_mode_it_is_the_router(rule: str) -> None:
    router = router_of(rule, aux_loss_coeff=0.01)
    wrapped = OpportunisticRouting(router, quality=0.5)
    assert wrapped.training
    x_TD = tokens()
    assert_same_routing(wrapped(x_TD), router(x_TD))
    assert wrapped(x_TD).scores.requires_grad
    wrapped.eval()
    assert (wrapped(x_TD).plan.tokens_per_expert() > 0).sum() < (router(x_TD).plan.tokens_per_expert() > 0).sum()


@every_rule
@pytest.mark.parametrize(
    "options", [{"quality": 0.8}, {"min_experts": 1, "max_rank": K}, {"top_p": 0.5}, {"max_batch_experts": 3}], ids=str
)
def test_scores_are_the_routers_rule_over_the_chosen(rule: str, options: dict[str, Any]) -> None:
    router = router_of(rule, torch.float64).eval()
    if router.num_groups > 1 and "max_batch_experts" in options:
        options = {"quality": 0.6}  # a budget is refused there
    x_TD = tokens(dtype=torch.float64)
    routing = OpportunisticRouting(router, **options).eval()(x_TD)
    got = pairs(routing)
    assert len(got) < T * K or "max_rank" not in options
    logits_TE = x_TD @ router.weight.t() + (0 if router.bias is None else router.bias)
    before = router(x_TD)
    for t in range(T):
        chosen = [e for (token, e) in got if token == t]
        assert 1 <= len(chosen) <= K
        logits_C = logits_TE[t, chosen]
        if router.score_function == "sigmoid":
            wanted_C = torch.sigmoid(logits_C)
        elif router.score_function == "sqrtsoftplus":
            wanted_C = torch.log1p(torch.exp(logits_C)).sqrt()
        else:
            wanted_C = torch.exp(logits_C) / torch.exp(logits_TE[t]).sum()
        if router.norm_topk_prob or not (router.pre_softmax or router.score_function != "softmax"):
            wanted_C = wanted_C / wanted_C.sum()
        wanted_C = wanted_C * router.topk_scaling_factor
        assert [got[t, e] for e in chosen] == pytest.approx(wanted_C.tolist(), rel=1e-9)
    assert {e for _, e in got} <= distinct(before.expert_index)
    listed = {(t, e) for t, row in enumerate(routing.expert_index.tolist()) for e in row if e >= 0}
    assert listed == got.keys()
    assert routing.metrics.dropped == T * K - len(got)


def test_with_all_places_filled_it_is_a_plan_from_topk_and_else_one_from_pairs() -> None:
    x_TD = tokens()
    with torch.no_grad():
        full = OpportunisticRouting(router_of(), quality=0.8).eval()(x_TD)
    assert full.plan.top_k == K and full.scores.shape == (T, K)
    assert pairs(full) == {
        (t, int(full.expert_index[t, k])): float(full.scores[t, k]) for t in range(T) for k in range(K)
    }
    torch.testing.assert_close(full.scores.sum(1), torch.ones(T))
    part = OpportunisticRouting(router_of(), min_experts=1, max_rank=K).eval()(x_TD)
    assert part.plan.top_k is None and part.scores.shape == (part.plan.num_rows,)
    assert T <= part.plan.num_rows < T * K


@pytest.mark.parametrize("options", [{"quality": 0.9}, {"min_experts": 1}, {"max_batch_experts": 6}], ids=str)
@pytest.mark.parametrize("rule", ["sigmoid, raw", "sqrtsoftplus", "expert bias"])
def test_it_prefers_and_weighs_as_the_router_does(rule: str, options: dict[str, Any]) -> None:
    router = router_of(rule).eval()
    if router.expert_bias is not None:
        router.expert_bias.normal_()
    x_TD = tokens()
    with torch.no_grad():
        logits_TE = x_TD @ router.weight.t()
        routing = OpportunisticRouting(router, **options).eval()(x_TD)
    if router.score_function == "sigmoid":
        mass_TE = torch.sigmoid(logits_TE)
    else:
        mass_TE = torch.nn.functional.softplus(logits_TE).sqrt()
    preference_TE = mass_TE if router.expert_bias is None else mass_TE + router.expert_bias
    wanted_TK = reroute(preference_TE, K, mass=mass_TE, **options).expert_TK
    assert torch.equal(routing.expert_index, wanted_TK)


def test_filling_up_stays_within_the_groups_of_the_token() -> None:
    router = router_of("groups").eval()
    routing = OpportunisticRouting(router, min_experts=1).eval()(tokens(40))
    before = router(tokens(40))
    assert before.plan.num_rows == 40 * K
    for t in range(40):
        groups = {e // (E // 4) for token, e in pairs(routing) if token == t}
        assert len(groups) <= 2
    assert len(pairs(routing)) > 40, "some do fill up"


def test_a_broken_token_stays_broken() -> None:
    x_TD = tokens()
    x_TD[4] = math.nan
    router = router_of().eval()
    with torch.no_grad():
        before, routing = router(x_TD), OpportunisticRouting(router, quality=0.8).eval()(x_TD)
    assert before.scores[4].isnan().all()
    for (t, _), score in pairs(routing).items():
        assert math.isnan(score) == (t == 4)


def test_a_token_with_an_infinite_logit_is_not_healed_by_dropping_that_expert() -> None:
    router = TopKRouter(E, E, K).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E) * 1e30)
        x_TD = draw_logits(T, E, 0.5, 1.4, seed=0) / 1e30
        x_TD[:, 7] = -1.0  # an expert that no token takes, but one
        x_TD[4, 7] = 1e20
        routing = OpportunisticRouting(router, max_batch_experts=3).eval()(x_TD)
    assert routing.logits[4].isinf().sum() == 1
    assert all(expert != 7 and math.isnan(score) == (t == 4) for (t, expert), score in pairs(routing).items())


@pytest.mark.parametrize("options", [{}, {"max_batch_experts": 4}, {"min_experts": 1, "max_rank": K}], ids=str)
def test_in_a_layer(options: dict[str, Any]) -> None:
    router = router_of(dtype=torch.float64)
    layer = sonic.MoE(D, 20, E, K, router=OpportunisticRouting(router, **options), dtype=torch.float64).eval()
    x_TD = tokens(dtype=torch.float64)
    with torch.no_grad():
        y_TD, routing = layer(x_TD, return_routing=True)
        wanted_TD = torch.zeros_like(x_TD)
        for (t, e), score in pairs(routing).items():
            gate_N, up_N = (layer.w1[e] @ x_TD[t]).chunk(2)
            wanted_TD[t] += score * (layer.w2[e] @ (torch.nn.functional.silu(gate_N) * up_N))
    torch.testing.assert_close(y_TD, wanted_TD, rtol=1e-10, atol=1e-10)
    plain_TD = sonic.MoE(D, 20, E, K, router=router, dtype=torch.float64).eval()
    plain_TD.load_state_dict({name.replace("router.router.", "router."): v for name, v in layer.state_dict().items()})
    assert not torch.equal(plain_TD(x_TD), y_TD)
    layer.train()
    torch.testing.assert_close(layer(x_TD), plain_TD(x_TD))
    assert layer.eval()(x_TD[:0]).shape == (0, D)


def test_it_passes_on_what_a_layer_asks_of_a_router() -> None:
    router = router_of()
    wrapped = OpportunisticRouting(router)
    assert (wrapped.hidden_size, wrapped.num_experts, wrapped.top_k) == (D, E, K)
    assert wrapped.quality == DEFAULT_QUALITY
    assert [name for name, _ in wrapped.named_parameters()] == ["router.weight"]
    before = router.weight.clone()
    wrapped.reset_parameters()
    assert not torch.equal(router.weight, before)
    assert "quality=0.97" in repr(wrapped) and "max_rank=None" not in repr(wrapped)
    assert OpportunisticRouting(router, min_experts=2).quality is None


def test_it_passes_on_the_length_of_sequences() -> None:
    router = router_of(aux_loss_type="sequence", aux_loss_coeff=0.01)
    wrapped = OpportunisticRouting(router)
    assert wrapped.wants_sequence_length
    x_TD = tokens()
    assert torch.equal(wrapped(x_TD, sequence_length=4).aux_loss, router(x_TD, sequence_length=4).aux_loss)
    assert wrapped.eval().report(x_TD).experts_after > 0
    assert not OpportunisticRouting(router_of()).wants_sequence_length


class FromPairs(TopKRouter):
    """In eval mode too its plan is one from pairs."""

    def forward(self, x_TD: Tensor, *, sequence_length: int | None = None) -> Routing:
        routing = super().forward(x_TD, sequence_length=sequence_length)
        token_P = torch.arange(x_TD.shape[0]).repeat_interleave(self.top_k)
        plan = sonic.RoutingPlan.from_pairs(token_P, routing.expert_index.flatten(), x_TD.shape[0], self.num_experts)
        return Routing(
            plan, routing.scores.flatten(), routing.logits, routing.expert_index, routing.aux_loss, routing.metrics
        )


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        (torch.nn.Linear(D, E), {}, "router is a Linear, expected a sonic.routing.TopKRouter"),
        (HashRouter(D, E, K, vocab_size=9), {}, "router is a HashRouter, expected .* choose by their logits"),
        (None, {}, "router is a NoneType, expected a sonic.routing.TopKRouter"),
        ("topk", {"quality": 0}, r"quality is 0, expected a number within \(0, 1\]"),
        ("topk", {"quality": 2}, "quality is 2"),
        ("topk", {"quality": "high"}, "quality is 'high'"),
        ("topk", {"top_p": 0.0}, "top_p is 0.0"),
        ("topk", {"min_experts": K + 1}, f"min_experts is {K + 1}, expected at most top_k = {K}"),
        ("topk", {"max_rank": K - 1}, f"max_rank is {K - 1}, expected at least top_k = {K}"),
        ("topk", {"max_batch_experts": 0}, "max_batch_experts is 0, expected a positive integer"),
        ("groups", {"max_batch_experts": 9}, "max_batch_experts is 9, expected None with a router of num_groups=4"),
    ],
)
def test_the_router_refuses(router: Any, options: dict[str, Any], message: str) -> None:
    router = router_of("groups" if router == "groups" else "sigmoid, raw") if isinstance(router, str) else router
    with pytest.raises(ValueError, match=f"sonic.routing.OpportunisticRouting: {message}"):
        OpportunisticRouting(router, **options)


def test_a_router_without_a_plan_from_topk_is_refused() -> None:
    router = OpportunisticRouting(FromPairs(D, E, K)).eval()
    with pytest.raises(ValueError, match="router is a FromPairs whose plan is from pairs in eval mode"):
        router(tokens())


# ---------------------------------------------------------------- what it is worth


def test_a_third_of_the_experts_for_three_percent_of_the_score() -> None:
    """The default on 16 tokens, 8 of 128 experts, logits that share half of their variance."""
    router = TopKRouter(128, 128, 8)
    with torch.no_grad():
        router.weight.copy_(torch.eye(128))  # the tokens are the logits
    wrapped = OpportunisticRouting(router).eval()
    reports = [wrapped.report(draw_logits(16, 128, 0.5, 1.4, seed)) for seed in range(10)]
    fewer = [1 - float(report.experts_after / report.experts_before) for report in reports]
    assert min(float(report.score_kept) for report in reports) >= 0.97
    assert sum(fewer) / len(fewer) >= 0.33
    assert min(fewer) >= 0.25


def test_the_report_counts_what_the_plans_hold() -> None:
    router = router_of().eval()
    x_TD = tokens()
    before = router(x_TD)
    wrapped = OpportunisticRouting(router, min_experts=1, max_rank=K).eval()
    after = wrapped(x_TD)
    report = activation_report(before, after)
    assert report.experts_before == len({e for _, e in pairs(before)})
    assert report.experts_after == len({e for _, e in pairs(after)})
    mass_TE = torch.softmax(before.logits.detach().double(), dim=-1)
    kept_mass = sum(mass_TE[t, e] for t, e in pairs(after)) / sum(mass_TE[t, e] for t, e in pairs(before))
    assert float(report.score_kept) == pytest.approx(float(kept_mass), rel=1e-5)
    assert str(wrapped.report(x_TD)) == str(report) and "distinct experts" in str(report)
    wrapped.train()
    assert str(wrapped.report(x_TD)) == str(report) and wrapped.router.training
    empty = wrapped.report(x_TD[:0])
    assert empty.experts_before == empty.experts_after == 0 and empty.score_kept == 1
    with pytest.raises(ValueError, match=r"after is about \(T, E\) = \(3, 32\), expected \(16, 32\) like before"):
        activation_report(before, router(x_TD[:3]))
    with pytest.raises(ValueError, match="score_function is 'tanh'"):
        activation_report(before, after, score_function="tanh")
