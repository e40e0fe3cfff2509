"""Triton's routing kernels: choices and scores of the formula, gradients of autograd, plans bit for bit.

Without a GPU the kernels are interpreted, on CPU tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonic import RoutingPlan, kernels
from sonic.kernels import ops
from sonic.routing import TopKRouter, topk_scores
from sonic.shapes import tokens_per_run
from tests.helpers import short

pytest.importorskip("triton")
from sonic.kernels.triton import plan as plan_kernels  # noqa: E402  (imports Triton)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities that are then masked

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULPS = 1 if DEVICE.type == "cpu" else 10  # a GPU's exponential is off by some last bits more

# score_function, pre_softmax, norm_topk_prob
SCORES = [
    ("softmax", False, False),
    ("softmax", True, False),
    ("softmax", True, True),
    *itertools.product(("sigmoid", "sqrtsoftplus"), (False,), (False, True)),
]
every_score = pytest.mark.parametrize(
    "score", SCORES, ids=lambda score: "-".join((score[0], *(["pre"] * score[1]), *(["norm"] * score[2])))
)
SIZES = [(9, 1, 1), (1, 3, 3), (70, 7, 2), (5, 60, 8), (3, 130, 20)]
HALVES = [(70, 7, 2, torch.float16), (2, 60, 8, torch.float16)]
every_size = pytest.mark.parametrize(("T", "E", "K"), SIZES)


def topk(logits_TE: Tensor, *args: Any, backend: str = "triton", **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op on the device that Triton has; results on the CPU. Its load is held against the experts each time."""
    args = tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)
    *results, load_EC = ops.topk_softmax(logits_TE.to(DEVICE), *args, **options, backend=backend)
    scores_TK, expert_TK, prob_TK = (result.cpu() for result in results)
    assert load_EC.dtype == torch.int32 and load_EC.is_contiguous()
    assert torch.equal(load_EC.cpu(), counted(expert_TK, logits_TE.shape[1]))
    return scores_TK, expert_TK, prob_TK


def counted(expert_TK: Tensor, num_experts: int) -> Tensor:
    """The load, run by run, and a column of zeros."""
    runs = expert_TK.split(tokens_per_run(expert_TK.shape[1])) if expert_TK.shape[0] else ()
    loads = [torch.bincount(run.reshape(-1), minlength=num_experts).int() for run in runs]
    return torch.stack([*loads, torch.zeros(num_experts, dtype=torch.int32)], dim=1)


def topk_bwd(*args: Any, backend: str = "triton") -> Tensor:
    args = tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)
    return ops.topk_softmax_bwd(*args, backend=backend).cpu()


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error of the whole; that of nothing is 0, and NaN is seen."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def probabilities(logits_TE: Tensor, score_function: str) -> Tensor:
    if score_function == "softmax":
        return torch.exp(logits_TE) / torch.exp(logits_TE).sum(1, keepdim=True)
    if score_function == "sigmoid":
        return 1 / (1 + torch.exp(-logits_TE))
    return torch.log1p(torch.exp(logits_TE)).sqrt()


def score_formula(logits_TE: Tensor, expert_TK: Tensor, score: tuple[str, bool, bool], factor: float) -> Tensor:
    """Scores of these experts as the papers write them."""
    score_function, pre_softmax, norm_topk_prob = score
    if score_function == "softmax" and not pre_softmax:
        score_TK = probabilities(logits_TE.gather(1, expert_TK.long()), "softmax")
    else:
        score_TK = probabilities(logits_TE, score_function).gather(1, expert_TK.long())
    if norm_topk_prob:
        score_TK = score_TK / score_TK.sum(1, keepdim=True)
    return score_TK * factor


def preferences(
    logits_TE: Tensor, score: tuple[str, bool, bool], bias_E: Tensor | None, num_groups: int, group_topk: int, K: int
) -> Tensor:
    """What experts are chosen by, one token and one group at a time; -inf outside the best groups."""
    score_function, pre_softmax, _ = score
    preference_TE = logits_TE
    if bias_E is not None or num_groups > 1 and (score_function != "softmax" or pre_softmax):
        preference_TE = probabilities(logits_TE, score_function)
    preference_TE = preference_TE.clone() if bias_E is None else preference_TE + bias_E
    for preference_E in preference_TE:
        runs = preference_E.view(num_groups, -1)
        counted = max(1, K // group_topk)
        worth = [float(run.sort(descending=True).values[:counted].sum()) for run in runs]
        for group in sorted(range(num_groups), key=lambda group: -worth[group])[group_topk:]:
            runs[group] = -torch.inf
    return preference_TE


def best_first(preference_TE: Tensor, K: int) -> Tensor:
    """The K largest, the lowest index first among equals."""
    return preference_TE.sort(dim=1, descending=True, stable=True).indices[:, :K]


def distinct(expert_TK: Tensor, num_experts: int) -> bool:
    sorted_TK = expert_TK.sort(dim=1).values
    return bool((sorted_TK.diff(dim=1) > 0).all() and (expert_TK >= 0).all() and (expert_TK < num_experts).all())


# ---------------------------------------------------------------- choices and scores


@every_score
@pytest.mark.parametrize(("T", "E", "K", "dtype"), [(*size, torch.float32) for size in SIZES] + HALVES)
def test_scores_are_those_of_the_formula(
    T: int, E: int, K: int, score: tuple[str, bool, bool], dtype: torch.dtype
) -> None:
    logits_TE = (2 * torch.randn(T, E)).to(dtype)  # in float16 with ties
    scores_TK, expert_TK, prob_TK = topk(logits_TE, K, *score, 2.5)
    assert scores_TK.dtype == prob_TK.dtype == torch.float32 and expert_TK.dtype == torch.int32
    logits64_TE = logits_TE.double()
    assert torch.equal(expert_TK.long(), best_first(logits64_TE, K))
    assert error(scores_TK, score_formula(logits64_TE, expert_TK, score, 2.5)) <= 5e-7 * ULPS
    unscaled = score if score[0] == "softmax" else (score[0], False, False)
    assert error(prob_TK, score_formula(logits64_TE, expert_TK, unscaled, 1.0)) <= 5e-7 * ULPS


@every_score
@pytest.mark.parametrize(
    ("E", "K", "num_groups", "group_topk", "has_bias"),
    [(13, 4, 1, 1, True), (60, 6, 3, 2, False), (60, 6, 3, 2, True), (12, 4, 12, 5, True), (30, 3, 5, 1, False)],
)
def test_bias_and_groups_choose(
    E: int, K: int, num_groups: int, group_topk: int, has_bias: bool, score: tuple[str, bool, bool]
) -> None:
    logits_TE, bias_E = torch.randn(11, E), torch.randn(E) / 10 if has_bias else None
    scores_TK, expert_TK, _ = topk(logits_TE, K, *score, 1.5, bias_E, num_groups, group_topk)
    bias64_E = None if bias_E is None else bias_E.double()
    wanted = best_first(preferences(logits_TE.double(), score, bias64_E, num_groups, group_topk, K), K)
    assert torch.equal(expert_TK.long(), wanted)
    assert error(scores_TK, score_formula(logits_TE.double(), wanted, score, 1.5)) <= 5e-7 * ULPS
    reference = topk(logits_TE, K, *score, 1.5, bias_E, num_groups, group_topk, backend="reference")
    assert torch.equal(expert_TK, reference[1]) and error(scores_TK, reference[0]) <= 1e-6


@every_score
def test_every_expert_can_be_chosen(score: tuple[str, bool, bool]) -> None:
    logits_TE = torch.randn(4, 37)
    scores_TK, expert_TK, _ = topk(logits_TE, 37, *score)
    assert torch.equal(expert_TK.long(), best_first(logits_TE, 37))
    assert error(scores_TK, score_formula(logits_TE.double(), expert_TK, score, 1.0)) <= 5e-7 * ULPS


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("T", "E", "K", "num_groups"),
    [
        pytest.param(0, 5, 2, 1, id="no token"),
        pytest.param(301, 7, 2, 1, id="three runs of 128, the last one shorter"),
        pytest.param(129, 11, 3, 1, id="runs of 64, E prime"),
        pytest.param(64, 6, 6, 3, id="two whole runs of 32, K = E"),
        pytest.param(3, 300, 260, 1, id="a run for each token"),
        pytest.param(257, 1, 1, 1, id="one expert, a token more than a run"),
    ],
)
def test_the_load_of_each_run_is_counted(T: int, E: int, K: int, num_groups: int, backend: str) -> None:
    logits_TE, bias_E = torch.randn(T, E).to(DEVICE), torch.randn(E).to(DEVICE)
    options = (K, "sigmoid", False, True, 2.5, bias_E, num_groups, num_groups)
    _, expert_TK, _, load_EC = ops.topk_softmax(logits_TE, *options, backend=backend)
    assert torch.equal(load_EC.cpu(), counted(expert_TK.cpu(), E))
    assert torch.equal(load_EC.sum(1).cpu(), torch.bincount(expert_TK.cpu().reshape(-1), minlength=E))
    assert load_EC.shape[1] == -(-T // tokens_per_run(K)) + 1 and load_EC.sum() == T * K
    others = logits_TE.new_tensor(0.0).expand(T, E)  # all choose alike: every program adds to the same experts
    *_, load_EC = ops.topk_softmax(others, *options, backend=backend)
    assert sorted(load_EC.sum(1).tolist()) == [0] * (E - K) + [T] * K


@every_score
@pytest.mark.parametrize("num_groups", [1, 3])
def test_ties_go_to_the_lowest_index(num_groups: int, score: tuple[str, bool, bool]) -> None:
    logits_TE = torch.zeros(5, 12)
    logits_TE[1:, ::2] = -0.0  # as good as the other zero
    logits_TE[2, 5] = logits_TE[2, 7] = 1
    logits_TE[3] = -1e30
    _, expert_TK, _ = topk(logits_TE, 3, *score, 1.0, None, num_groups, 1)
    first = 4 if num_groups == 3 else 0  # experts 4 to 7 are the best group of the third token
    wanted = [[0, 1, 2], [0, 1, 2], [5, 7, first], [0, 1, 2], [0, 1, 2]]
    assert expert_TK.tolist() == wanted


@pytest.mark.parametrize("E", [1, 2, 33, 1000])
def test_neighbours_in_float32_are_told_apart(E: int) -> None:
    """No bit of a value is given up for its index, at any size and sign."""
    first = torch.tensor([1.0, -1.0, 3e38, -3e38, 1e-30, -1e-30, 1e-45, -1e-45])
    logits_TE = torch.arange(E, dtype=torch.int32).mul(first.sign().int()[:, None])
    logits_TE = (first.view(torch.int32)[:, None] - logits_TE).view(torch.float32)
    logits_TE = torch.where(logits_TE.isfinite() & (logits_TE.sign() == first.sign()[:, None]), logits_TE, -torch.inf)
    logits_TE = torch.cat((logits_TE, logits_TE.flip(1)))  # largest first, and last
    _, expert_TK, _ = topk(logits_TE, min(E, 3))
    assert torch.equal(expert_TK.long(), best_first(logits_TE, min(E, 3)))


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
def test_pointwise_scores_and_slopes_at_any_size(score_function: str) -> None:
    """Each value by itself, where the formula under- or overflows, or cancels."""
    logits_T1 = torch.cat((torch.linspace(-80, 80, 641), torch.tensor([-1e4, 1e4, 1e-6, -1e-6])))[:, None]
    scores_T1, expert_T1, prob_T1 = topk(logits_T1, 1, score_function)
    leaf_T1 = logits_T1.double().requires_grad_()
    wanted_T1 = torch.sigmoid(leaf_T1)
    if score_function == "sqrtsoftplus":
        wanted_T1 = torch.where(leaf_T1 > 40, leaf_T1, torch.log1p(torch.exp(leaf_T1.clamp(max=40)))).sqrt()
    torch.testing.assert_close(scores_T1.double(), wanted_T1.detach(), rtol=1e-6 * ULPS, atol=1e-37)
    (wanted,) = torch.autograd.grad(wanted_T1.sum(), leaf_T1)
    # a sigmoid near 1 tells its slope no better than its own last bit
    atol = 1e-37 if score_function == "sqrtsoftplus" else 1e-7
    got = topk_bwd(torch.ones_like(prob_T1), expert_T1, prob_T1, None, 1, score_function)
    torch.testing.assert_close(got.double(), wanted.nan_to_num(0.0), rtol=2e-6 * ULPS, atol=atol)


@every_score
def test_no_token(score: tuple[str, bool, bool]) -> None:
    scores_TK, expert_TK, prob_TK = topk(torch.empty(0, 5), 2, *score, 2.0, torch.zeros(5), 5, 2)
    assert scores_TK.shape == expert_TK.shape == prob_TK.shape == (0, 2)
    assert topk_bwd(scores_TK, expert_TK, prob_TK, None, 5, score[0], score[2]).shape == (0, 5)


def test_a_table_that_is_not_contiguous() -> None:
    logits_TE, bias_E = torch.randn(9, 2 * 6), torch.randn(12)
    wanted = topk(logits_TE[:, ::2].contiguous(), 3, "sigmoid", False, True, 1.0, bias_E[::2].contiguous())
    for got in (
        topk(logits_TE[:, ::2], 3, "sigmoid", False, True, 1.0, bias_E[::2]),
        topk(logits_TE[:, ::2].t().contiguous().t(), 3, "sigmoid", False, True, 1.0, bias_E[::2]),
    ):
        assert all(map(torch.equal, got, wanted))


# ---------------------------------------------------------------- tokens that are not numbers, experts that are barred


@every_score
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_not_a_number_harms_no_other_token(num_groups: int, has_bias: bool, score: tuple[str, bool, bool]) -> None:
    E, K = 12, 5
    bias_E = torch.randn(E) / 10 if has_bias else None
    options = (K, *score, 2.5, bias_E, num_groups, min(2, num_groups))
    logits_TE = torch.randn(9, E)
    before = topk(logits_TE, *options)
    wrong = {1: torch.nan, 2: torch.inf, 4: torch.nan, 6: -torch.nan}
    for token, value in wrong.items():
        logits_TE[token, 7] = value
    logits_TE[4] = torch.nan
    after = topk(logits_TE, *options)
    others = torch.tensor([token not in wrong for token in range(9)])
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was[others], now[others])
    scores_TK, expert_TK, prob_TK = after
    assert distinct(expert_TK, E)
    assert scores_TK[~others].isnan().all() and prob_TK[~others].isnan().all()
    if num_groups == 1 and not has_bias:
        assert (expert_TK[[1, 2, 6], 0] == 7).all(), "what is wrong is chosen, so that it shows"
    reference = topk(logits_TE, *options, backend="reference")
    assert torch.equal(reference[1][others], expert_TK[others])
    torch.testing.assert_close(scores_TK, reference[0], equal_nan=True, rtol=2e-6 * ULPS, atol=0)
    needs_logits = score == ("softmax", True, False)
    dlogits_TE = topk_bwd(
        torch.randn_like(scores_TK), expert_TK, prob_TK, logits_TE if needs_logits else None, E, score[0], score[2]
    )
    assert dlogits_TE[others].isfinite().all() and dlogits_TE[~others].isnan().any(1).all()


@every_score
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_barred_experts_come_last(num_groups: int, has_bias: bool, score: tuple[str, bool, bool]) -> None:
    """-inf is chosen only where nothing else is left; a group with fewer of them wins."""
    E, K = 12, 4
    bias_E = torch.randn(E) / 10 if has_bias else None
    options = (K, *score, 1.0, bias_E, num_groups, min(2, num_groups))
    logits_TE = torch.randn(40, E)
    is_barred_TE = torch.rand(40, E) < torch.rand(40, 1)
    is_barred_TE[0] = True
    logits_TE[is_barred_TE] = -torch.inf
    scores_TK, expert_TK, _ = topk(logits_TE, *options)
    assert distinct(expert_TK, E)
    wanted_TK, reference_TK, _ = topk(logits_TE, *options, backend="reference")
    is_free_TK = ~is_barred_TE.gather(1, expert_TK.long())
    assert is_free_TK.sum() > 60 and (~is_free_TK).sum() > 10
    assert torch.equal(is_free_TK, ~is_barred_TE.gather(1, reference_TK.long()))
    assert torch.equal(expert_TK[is_free_TK], reference_TK[is_free_TK])
    torch.testing.assert_close(scores_TK, wanted_TK, equal_nan=True, rtol=2e-6 * ULPS, atol=1e-12)
    if num_groups == 1:  # those that have to be taken all the same, lowest index first
        assert expert_TK[0].tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- gradients


@every_score
@every_size
def test_gradients_are_those_of_autograd(T: int, E: int, K: int, score: tuple[str, bool, bool]) -> None:
    logits_TE = (2 * torch.randn(T, E)).requires_grad_()
    dscores_TK = torch.randn(T, K)
    kernels.reset_counts()
    scores_TK, expert_TK = topk_scores(
        logits_TE.to(DEVICE),
        K,
        **dict(zip(("score_function", "pre_softmax", "norm_topk_prob"), score, strict=True)),
        topk_scaling_factor=2.5,
        backend="triton",
    )
    (dlogits_TE,) = torch.autograd.grad(scores_TK, logits_TE, dscores_TK.to(DEVICE))
    assert kernels.counts() == {("topk_softmax", "triton"): 1, ("topk_softmax_bwd", "triton"): 1}
    assert dlogits_TE.dtype == torch.float32 and dlogits_TE.shape == (T, E)
    leaf_TE = logits_TE.detach().double().requires_grad_()
    wanted_TK = score_formula(leaf_TE, expert_TK.cpu(), score, 2.5)
    (wanted_TE,) = torch.autograd.grad(wanted_TK, leaf_TE, dscores_TK.double())
    if K == 1 and (score[2] or score[:2] == ("softmax", False)) or E == 1 and score[0] == "softmax":
        assert dlogits_TE.abs().max() <= 1e-6  # one expert has the whole score, whatever its logit
    else:
        assert wanted_TE.norm() > 0.01 and error(dlogits_TE, wanted_TE) <= 2e-6
    if score != ("softmax", True, False):
        is_chosen_TE = torch.zeros(T, E).scatter_(1, expert_TK.cpu().long(), 1.0).bool()
        assert (dlogits_TE[~is_chosen_TE] == 0).all()


def test_a_router_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan takes the load from the choice: nothing counts the experts again."""
    launched: list[str] = []
    launch = plan_kernels.launch

    def watched(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(plan_kernels, "launch", watched)
    router = TopKRouter(16, 10, 3, enable_expert_bias=True, aux_loss_coeff=0.1, device=DEVICE, backend="triton")
    routing = router(torch.randn(70, 16, device=DEVICE))
    assert launched == ["place_kernel", "find_again_kernel"]
    count_E = torch.bincount(routing.expert_index.reshape(-1), minlength=10)
    assert torch.equal(routing.plan.tokens_per_expert(), count_E) and torch.equal(router.load, count_E)
    wanted = RoutingPlan.from_topk(routing.expert_index, 10, backend="triton")
    assert launched[2:] == ["count_kernel", "place_kernel", "find_again_kernel"]
    assert torch.equal(routing.plan.row_by_token_R, wanted.row_by_token_R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_a_router_on_this_backend(dtype: torch.dtype) -> None:
    """Gradients of tokens and weight, with the logits computed again, beside those of the reference."""
    gradients = []
    x_TD = torch.randn(23, 16, dtype=dtype, device=DEVICE).requires_grad_()
    weight_ED = torch.randn(10, 16).to(dtype)
    for backend in ("triton", "reference"):
        router = TopKRouter(16, 10, 3, pre_softmax=True, dtype=dtype, device=DEVICE, backend=backend)
        with torch.no_grad():
            router.weight.copy_(weight_ED)
        routing = router(x_TD)
        leaves = (x_TD, router.weight)
        gradients.append((routing.scores.detach(), *torch.autograd.grad(routing.scores.square().sum(), leaves)))
    assert kernels.counts()["topk_softmax_bwd", "triton"] >= 1
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.norm() > 0 and error(got, wanted) <= max(2e-6, torch.finfo(wanted.dtype).eps)


def test_gradients_as_autograd_hands_them_over() -> None:
    """Expanded from one number, or from columns."""
    logits_TE = torch.randn(6, 9)
    _, expert_TK, prob_TK = topk(logits_TE, 4, "sigmoid", False, True)
    for dscores_TK in (torch.ones(()).expand(6, 4), torch.randn(4, 6).t()):
        got, wanted = (
            topk_bwd(d, expert_TK, prob_TK, None, 9, "sigmoid", True) for d in (dscores_TK, dscores_TK.contiguous())
        )
        assert torch.equal(got, wanted)


T2K3 = torch.full((2, 3), 0.5)
INDEX = torch.tensor([[0, 1, 2], [3, 2, 1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((T2K3, INDEX, T2K3[0], None, 4), r"prob_TK is \(3,\), expected \(T, K\)"),
        ((T2K3[:1], INDEX, T2K3, None, 4), r"dscores_TK is \(1, 3\), expected \(T, K\) = \(2, 3\)"),
        ((T2K3, INDEX[:, :2], T2K3, None, 4), r"expert_TK is \(2, 2\), expected \(T, K\) = \(2, 3\)"),
        ((T2K3, INDEX.long(), T2K3, None, 4), "expert_TK is int64, expected int32"),
        ((T2K3, INDEX, T2K3.half(), None, 4), "prob_TK is float16, expected float32 or float64"),
        ((T2K3.double(), INDEX, T2K3, None, 4), "dscores_TK is float64, expected float32 like prob_TK"),
        ((T2K3, INDEX, T2K3, None, 2), "num_experts is 2, expected at least K = 3"),
        ((T2K3, INDEX, T2K3, torch.zeros(2, 5), 4), r"logits_TE is \(2, 5\), expected \(T, E\) = \(2, 4\)"),
        ((T2K3, INDEX, T2K3, torch.zeros(2, 4), 4, "sigmoid"), "logits_TE is a tensor, expected None: logits are"),
        ((T2K3, INDEX, T2K3, None, 4, "tanh"), "score_function is 'tanh', expected one of 'softmax'"),
    ],
)
def test_backward_refuses(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^sonic\.topk_softmax_bwd: {message}"):
        ops.topk_softmax_bwd(*args)


def test_float64_is_left_to_the_reference() -> None:
    logits_TE = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="has no kernels for float64"):
        ops.topk_softmax(logits_TE, 2, backend="triton")
    _, expert_TK, prob_TK, _ = ops.topk_softmax(logits_TE, 2, backend="reference")
    with pytest.raises(ValueError, match="has no kernels for float64"):
        ops.topk_softmax_bwd(prob_TK, expert_TK, prob_TK, None, 4, backend="triton")


# ---------------------------------------------------------------- plans


def plan_of(
    expert: Tensor, token: Tensor | None, num_tokens: int, num_experts: int, load: Tensor | None = None
) -> tuple[Tensor, ...]:
    token, load = (None if one is None else one.to(DEVICE) for one in (token, load))
    arrays = ops.build_plan(expert.to(DEVICE), token, num_tokens, num_experts, load, backend="triton")
    return tuple(array.cpu() for array in arrays)


def assert_is_that_of_the_reference(
    expert: Tensor, token: Tensor | None, num_tokens: int, num_experts: int, load: Tensor | None = None
) -> None:
    got = plan_of(expert, token, num_tokens, num_experts, load)
    wanted = ops.build_plan(expert.cpu(), token, num_tokens, num_experts, backend="reference")
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == torch.int32 and mine.is_contiguous() and torch.equal(mine, theirs)


def random_topk(num_tokens: int, num_experts: int, top_k: int, skew: str = "even") -> Tensor:
    """(T * K,) distinct experts per token: all alike, the same few for all, or one that every token takes."""
    liking_TE = torch.rand(num_tokens, num_experts)
    if skew == "few":
        liking_TE[:, min(top_k, num_experts - 1) + 1 :] -= 1
    elif skew == "one":
        liking_TE[:, num_experts // 2] += 1
    return liking_TE.argsort(dim=1, descending=True)[:, :top_k].reshape(-1)


@pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 3, 2, id="no token"),
        pytest.param(1, 1, 1, id="one of each"),
        pytest.param(5, 3, 3, id="K = E"),
        pytest.param(64, 8, 4, id="exactly one block"),
        pytest.param(257, 1, 1, id="one expert takes all, over two blocks"),
        pytest.param(300, 7, 3, id="four blocks that cut tokens"),
        pytest.param(90, 300, 8, id="more than 256 experts, larger blocks"),
        pytest.param(40, 2050, 3, id="too many experts to count"),
    ],
)
@pytest.mark.parametrize("skew", ["even", "few", "one"])
def test_plans_of_topk(T: int, E: int, K: int, skew: str) -> None:
    assert_is_that_of_the_reference(random_topk(T, E, K, skew), None, T, E)


@pytest.mark.parametrize(("T", "E"), [(0, 3), (4, 3), (1, 1), (200, 9), (130, 270), (20, 2050)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_plans_of_pairs(T: int, E: int, share: float) -> None:
    """In random order; tokens with any number of experts, experts without a token."""
    token_P, expert_P = (torch.rand(T, E) < share * min(1, 600 / max(T * E, 1))).nonzero(as_tuple=True)
    order_P = torch.randperm(token_P.shape[0])
    assert_is_that_of_the_reference(expert_P[order_P], token_P[order_P], T, E)


@pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 3, 2, id="no token"),
        pytest.param(1, 1, 1, id="one of each"),
        pytest.param(128, 7, 2, id="exactly one run"),
        pytest.param(601, 3, 1, id="three runs, the last one shorter"),
        pytest.param(97, 13, 6, id="runs of 192 slots in blocks of 256"),
        pytest.param(40, 11, 11, id="K = E"),
        pytest.param(3, 300, 260, id="blocks of 512 slots, one for each token"),
        pytest.param(40, 2050, 3, id="too many experts to count"),
    ],
)
@pytest.mark.parametrize("skew", ["even", "few", "one"])
def test_plans_by_a_load_that_is_known(T: int, E: int, K: int, skew: str) -> None:
    expert_P = random_topk(T, E, K, skew)
    load_EC = counted(expert_P.view(T, K), E)
    assert_is_that_of_the_reference(expert_P, None, T, E, load_EC)
    strided_EC = load_EC.t().contiguous().t()
    got, wanted = (plan_of(expert_P, None, T, E, load) for load in (strided_EC, None))
    assert all(map(torch.equal, got, wanted))
    count_E = torch.bincount(expert_P, minlength=E)
    assert torch.equal(got[0].diff(), count_E.int())
    by_reference = ops.build_plan(expert_P, None, T, E, load_EC, backend="reference")
    assert all(map(torch.equal, by_reference, wanted))


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(0, 90), st.integers(1, 40), st.integers(1, 9)),
    skew=st.sampled_from(("even", "few", "one")),
    dtype=st.sampled_from((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)),
    seed=st.integers(0, 2**31),
)
def test_plans_of_any_shape(shape: tuple[int, int, int], skew: str, dtype: torch.dtype, seed: int) -> None:
    num_tokens, num_experts, top_k = shape
    top_k = min(top_k, num_experts)
    torch.manual_seed(seed)
    expert_P = random_topk(num_tokens, num_experts, top_k, skew).to(dtype)
    assert_is_that_of_the_reference(expert_P, None, num_tokens, num_experts)
    token_P, order_P = torch.arange(num_tokens).repeat_interleave(top_k), torch.randperm(expert_P.shape[0])
    assert_is_that_of_the_reference(expert_P[order_P], token_P[order_P].to(dtype), num_tokens, num_experts)


def test_plans_of_strided_indices() -> None:
    expert_TK = random_topk(30, 6, 3).view(30, 3)
    token_P = torch.arange(30).repeat_interleave(3)
    plan = RoutingPlan.from_topk(expert_TK.t().contiguous().t().to(DEVICE), 6, backend="triton")
    wanted = RoutingPlan.from_topk(expert_TK, 6)
    assert torch.equal(plan.row_by_token_R.cpu(), wanted.row_by_token_R)
    expert_2P, token_2P = (index.reshape(-1).repeat_interleave(2) for index in (expert_TK, token_P))
    assert_is_that_of_the_reference(expert_2P[::2], token_2P[1::2], 30, 6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "E", "K"), [(1024, 128, 8), (8192, 64, 4), (1000, 97, 7), (2048, 512, 10), (300, 3000, 8)]
)
def test_building_on_a_gpu_waits_for_nothing(T: int, E: int, K: int) -> None:
    expert_P, token_P = random_topk(T, E, K), torch.arange(T).repeat_interleave(K)
    order_P = torch.randperm(T * K)
    load_EC = counted(expert_P.view(T, K), E).cuda()
    for expert, token, load in (
        (expert_P, None, None),
        (expert_P, None, load_EC),
        (expert_P[order_P], token_P[order_P], None),
    ):
        arguments = [None if index is None else index.cuda() for index in (expert, token)]
        ops.build_plan(*arguments, T, E, load, backend="triton")  # compiled
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = ops.build_plan(*arguments, T, E, load, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode(before)
        wanted = ops.build_plan(expert, token, T, E, backend="reference")
        assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, wanted, strict=True))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion ends a CUDA process")
@pytest.mark.parametrize("E", [5, 2050])
@pytest.mark.parametrize("form", ["topk", "load", "pairs"])
@pytest.mark.parametrize("wrong", ["below", "above", "far", "both", "token", "token below", "twice", "twice afar"])
def test_wrong_indices_are_refused_in_the_references_words(
    wrong: str, form: str, E: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written past the end of an array."""
    T, K, with_pairs = 150, 4, form == "pairs"
    expert_P, token_P = random_topk(T, E, K), torch.arange(T).repeat_interleave(K)
    change: dict[str, Callable[[], Any]] = {
        "below": lambda: expert_P.__setitem__(301, -1),
        "above": lambda: expert_P.__setitem__(599, E),
        "far": lambda: expert_P.__setitem__(7, 2**40),
        "both": lambda: (expert_P.__setitem__(3, -(2**35)), expert_P.__setitem__(4, E + 1)),
        "token": lambda: token_P.__setitem__(9, T),
        "token below": lambda: token_P.__setitem__(9, -3),
        "twice": lambda: expert_P.__setitem__(402, int(expert_P[401])),
        "twice afar": lambda: (expert_P.__setitem__(8, int(expert_P[11])), expert_P.__setitem__(2, int(expert_P[0]))),
    }
    change[wrong]()
    if with_pairs:
        order_P = torch.randperm(T * K)
        expert_P, token_P = expert_P[order_P], token_P[order_P]
    elif wrong.startswith("token"):
        return
    load = counted(expert_P.clamp(0, E - 1).view(T, K), E) if form == "load" else None
    args = (expert_P, token_P if with_pairs else None, T, E, load)
    with pytest.raises(ValueError) as wanted:
        ops.build_plan(*args, backend="reference")
    refusal, num_arrays = refused_within_its_arrays(args, monkeypatch)
    assert refusal == str(wanted.value)
    assert num_arrays >= (1 if E > 2048 else 3 if form == "load" else 4)


def refused_within_its_arrays(args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """In what words a plan is refused, and how many arrays were watched: none is written past its ends."""
    guarded: list[tuple[Tensor, int]] = []

    def empty(size: int, **options: Any) -> Tensor:
        guarded.append((torch.full((size + 128,), 2**30, **options), size))  # no index: who follows it falls
        return guarded[-1][0][64 : 64 + size]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        with pytest.raises(ValueError) as refused:
            plan_of(*args)
    for array, size in guarded:
        assert (array[:64] == 2**30).all() and (array[64 + size :] == 2**30).all()
    return str(refused.value), len(guarded)


OTHER_LOADS: dict[str, Callable[[Tensor], Any]] = {
    "another expert": lambda load_EC: load_EC[:2, 1].add_(torch.tensor([3, -3])),
    "another run": lambda load_EC: load_EC[3, :2].add_(torch.tensor([-1, 1])),
    "one too many": lambda load_EC: load_EC[2, 0].add_(1),
    "one too few": lambda load_EC: load_EC[4, 2].sub_(1),
    "below zero": lambda load_EC: (load_EC[5, 1].sub_(1), load_EC[0, 1].add_(1)),  # nobody chose expert 5
    "zeros": lambda load_EC: load_EC.zero_(),
    "large": lambda load_EC: load_EC.fill_(2**31 - 1),
    "far below": lambda load_EC: load_EC[0].fill_(-(2**30)),
    "around": lambda load_EC: load_EC[:, 0].copy_(torch.tensor([2**31 - 1, 2**31 - 1, 2, 0, 0, 0]) + load_EC[:, 0]),
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion ends a CUDA process")
@pytest.mark.parametrize("wrong", OTHER_LOADS)
def test_a_load_of_other_experts_is_refused_and_never_followed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    T, E, K = 150, 6, 4
    expert_P = random_topk(T, E - 1, K)
    load_EC = counted(expert_P.view(T, K), E)
    assert load_EC.shape == (E, 4)
    plan_of(expert_P, None, T, E, load_EC)
    OTHER_LOADS[wrong](load_EC)
    refusal, num_arrays = refused_within_its_arrays((expert_P, None, T, E, load_EC), monkeypatch)
    wanted = (
        "sonic.RoutingPlan: load is not that of expert_index, expected what topk_softmax counted when it chose them"
    )
    assert refusal == wanted and num_arrays >= 3
    if wrong != "another run":  # the reference looks at the sum over runs alone, and follows nothing else
        with pytest.raises(ValueError, match=f"^{wanted}$"):
            ops.build_plan(expert_P, None, T, E, load_EC, backend="reference")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion ends a CUDA process")
def test_a_load_of_too_many_experts_to_count_by_is_refused_too() -> None:
    expert_P = random_topk(40, 2050, 3)
    load_EC = counted(expert_P.view(40, 3), 2050)
    load_EC[:2, 0] += torch.tensor([1, -1])
    with pytest.raises(ValueError, match="load is not that of expert_index"):
        plan_of(expert_P, None, 40, 2050, load_EC)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion ends a CUDA process")
@pytest.mark.parametrize("token", [0, 1, 1022, 1023, 1024, 1098, 1099])
def test_a_duplicate_is_found_at_any_row(token: int) -> None:
    token_P = torch.cat((torch.arange(1100), torch.tensor([token])))
    with pytest.raises(ValueError, match=rf"duplicate \(token {token} goes to expert 0 more than once\)"):
        plan_of(torch.zeros_like(token_P), token_P, 1100, 1)


def test_neighbours_with_the_same_token_are_no_duplicate() -> None:
    """The last row of an expert and the first of the next may be one token's."""
    assert_is_that_of_the_reference(torch.tensor([0, 1]), torch.tensor([3, 3]), 4, 2)


# ---------------------------------------------------------------- the same each time


def test_deterministic() -> None:
    logits_TE = torch.randn(50, 20)
    results = [topk(logits_TE, 4, "sigmoid", False, True, 1.0, None, 5, 2) for _ in range(2)]
    assert all(map(torch.equal, *results))
    expert_P = results[0][1].reshape(-1)
    assert all(map(torch.equal, *(plan_of(expert_P, None, 50, 20) for _ in range(2))))
    load_EC = counted(results[0][1], 20)
    assert all(map(torch.equal, *(plan_of(expert_P, None, 50, 20, load) for load in (None, load_EC))))
