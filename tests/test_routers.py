"""Routers: presets against published formulas, scores of any logits, groups, expert bias, hash routing, compilers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sonic.kernels import ops
from sonic.routing import (
    PRESETS,
    HashRouter,
    TopKRouter,
    pair_scores,
    preset_router,
    reset_load,
    topk_scores,
    update_expert_bias,
)

T, D, E, K = 37, 16, 12, 3
F64 = torch.float64


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error, absolute where all zeros are wanted; infinite where something is not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    size = float(wanted.norm())
    difference = float((got - wanted).norm()) / (size or 1.0)
    return difference if math.isfinite(difference) else math.inf


def tokens(num_tokens: int = T, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(num_tokens, D, dtype=dtype, requires_grad=True)


def spread(router: Any) -> Any:
    """The router with scores that differ clearly."""
    torch.nn.init.normal_(router.weight, std=0.5)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    return router


def probability(logits: Tensor, score_function: str) -> Tensor:
    """The score functions as they are written, of any size of logit."""
    if score_function == "sigmoid":
        small = torch.exp(-logits.abs())
        return torch.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    if score_function == "sqrtsoftplus":
        return (torch.log1p(torch.exp(-logits.abs())) + logits.clamp(min=0)).sqrt()
    power = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return power / power.sum(-1, keepdim=True)


def scores_formula(
    logits_TE: Tensor,
    expert_TK: Tensor,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    norm_topk_prob: bool = False,
    topk_scaling_factor: float = 1.0,
) -> Tensor:
    """The scores of given experts."""
    if score_function == "softmax" and not pre_softmax:
        return probability(logits_TE.gather(1, expert_TK), "softmax") * topk_scaling_factor
    score_TK = probability(logits_TE, score_function).gather(1, expert_TK)
    if norm_topk_prob:
        score_TK = score_TK / (score_TK.sum(1, keepdim=True) + 1e-20)
    return score_TK * topk_scaling_factor


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """All tensors that autograd keeps inside the block."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


# ---------------------------------------------------------------- presets


def deepseek_v3(logits_TE: Tensor, expert_bias_E: Tensor) -> tuple[Tensor, Tensor]:
    score_TE = 1 / (1 + torch.exp(-logits_TE))
    choice_TE = score_TE + expert_bias_E
    group_TG = choice_TE.view(len(choice_TE), 4, 4).sort(-1, descending=True).values[..., :2].sum(-1)
    best_TG = group_TG.argsort(-1, descending=True)[:, :2]
    is_in_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best_TG, True)
    masked_TE = choice_TE.masked_fill(~is_in_TG.repeat_interleave(4, 1), -math.inf)
    expert_TK = masked_TE.argsort(1, descending=True)[:, :4]
    weight_TK = score_TE.gather(1, expert_TK)
    return weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20) * 2.5, expert_TK


def qwen3(logits_TE: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    prob_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(1, keepdim=True)
    expert_TK = prob_TE.argsort(1, descending=True)[:, :4]
    weight_TK = prob_TE.gather(1, expert_TK)
    return weight_TK / weight_TK.sum(1, keepdim=True), expert_TK


def gpt_oss(logits_TE: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    expert_TK = logits_TE.argsort(1, descending=True)[:, :4]
    power_TK = torch.exp(logits_TE.gather(1, expert_TK))
    return power_TK / power_TK.sum(1, keepdim=True), expert_TK


def llama4(logits_TE: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    expert_T1 = logits_TE.argmax(1, keepdim=True)
    return 1 / (1 + torch.exp(-logits_TE.gather(1, expert_T1))), expert_T1


PUBLISHED: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, Any]]] = {
    "deepseek_v3": (deepseek_v3, {"top_k": 4, "num_groups": 4, "group_topk": 2}),
    "qwen3": (qwen3, {"top_k": 4}),
    "mixtral": (qwen3, {"top_k": 4}),  # softmax over all, choose, normalise: what its code says
    "gpt_oss": (gpt_oss, {"top_k": 4}),
    "llama4": (llama4, {}),
}


def test_presets_are_those_tried() -> None:
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_compute_what_the_published_code_does(name: str) -> None:
    formula, sizes = PUBLISHED[name]
    router = spread(preset_router(name, hidden_size=D, num_experts=16, dtype=F64, **sizes))
    if name == "deepseek_v3":
        router.expert_bias.copy_(torch.randn(16) * 0.3)
    assert (router.bias is not None) == (name == "gpt_oss")
    x_TD = tokens()
    routing = router(x_TD)
    logits_TE = x_TD @ router.weight.t() + (0 if router.bias is None else router.bias)
    wanted_TK, expert_TK = formula(logits_TE, router.expert_bias)
    assert torch.equal(routing.expert_index.long(), expert_TK)
    assert routing.scores_on == ("input" if name == "llama4" else "output")
    assert error(routing.scores, wanted_TK) <= 1e-12
    dscores_TK = torch.randn_like(wanted_TK)
    leaves = [x_TD, *router.parameters()]
    got = torch.autograd.grad(routing.scores, leaves, dscores_TK)
    wanted = torch.autograd.grad(wanted_TK, leaves, dscores_TK)
    for gradient, want in zip(got, wanted, strict=True):
        assert want.norm() > 0.1 and error(gradient, want) <= 1e-12


def test_presets_have_their_models_sizes_and_yield_to_options() -> None:
    sizes = {}  # D, E, K, groups, of which a token reaches
    for name in PRESETS:
        router = preset_router(name, device="meta")
        assert router.expert_bias is None or name == "deepseek_v3"
        sizes[name] = (
            router.hidden_size,
            router.num_experts,
            router.top_k,
            router.num_groups,
            router.group_topk,
            router.topk_scaling_factor,
        )
    assert sizes == {
        "deepseek_v3": (7168, 256, 8, 8, 4, 2.5),
        "qwen3": (4096, 128, 8, 1, 1, 1.0),
        "mixtral": (4096, 8, 2, 1, 1, 1.0),
        "gpt_oss": (2880, 128, 4, 1, 1, 1.0),
        "llama4": (5120, 16, 1, 1, 1, 1.0),
    }
    assert preset_router("mixtral", top_k=1, device="meta").top_k == 1


# ---------------------------------------------------------------- scores and gradients

SCORINGS = [
    {"score_function": function, "pre_softmax": pre, "norm_topk_prob": norm, "topk_scaling_factor": factor}
    for function, pre in (("softmax", False), ("softmax", True), ("sigmoid", False), ("sqrtsoftplus", False))
    for norm, factor in itertools.product((False, True), (1.0, 2.5))
]
LOGITS = {  # (centre, half width) of uniform logits
    "unit": (0.0, 2.0),
    "50": (0.0, 50.0),
    "200": (0.0, 200.0),
    "-50 to -40": (-45.0, 5.0),
    "-200 to -190": (-195.0, 5.0),
    "190 to 200": (195.0, 5.0),
}


def drawn_logits(size: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Logits that require a gradient, and their source: an identity for the tokens, so that they are exact."""
    centre, width = LOGITS[size]
    logits_TE = centre + width * (2 * torch.rand(T, E, dtype=F64) - 1)
    source = (torch.eye(T, dtype=F64), logits_TE.t().contiguous(), torch.zeros(E, dtype=F64))
    return logits_TE.requires_grad_(), source


@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize("size", LOGITS)
def test_scores_of_any_size_of_logit(size: str, sourced: bool) -> None:
    for options, biased in itertools.product(SCORINGS, (False, True)):
        logits_TE, source = drawn_logits(size)
        chosen_by_TE = logits_TE.detach()
        bias_E = torch.randn(E).mul(0.3).double() if biased else None
        if biased:
            chosen_by_TE = probability(chosen_by_TE, options["score_function"]) + bias_E
        scores_TK, expert_TK = topk_scores(
            logits_TE, K, **options, expert_bias=bias_E, source=source if sourced else None
        )
        assert torch.equal(
            chosen_by_TE.gather(1, expert_TK.long()), chosen_by_TE.sort(1, descending=True).values[:, :K]
        )
        wanted_TK = scores_formula(logits_TE, expert_TK.long(), **options)
        assert error(scores_TK, wanted_TK) <= 1e-12, options
        dscores_TK = torch.randn(T, K, dtype=F64)
        (got,), (wanted,) = (torch.autograd.grad(s, logits_TE, dscores_TK) for s in (scores_TK, wanted_TK))
        # Of a sigmoid of 1 - 1e-17 no formula in float64 can tell the slope: absolute then.
        assert error(got, wanted) <= 1e-12 or (got - wanted).norm() <= 1e-14, options


@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_scores_of_pairs(score_function: str, size: str, sourced: bool) -> None:
    """Any pairs, some more than once, some tokens not at all."""
    logits_TE, source = drawn_logits(size)
    token_P, expert_P = torch.randint(T - 5, (90,)), torch.randint(E, (90,), dtype=torch.int32)
    options = {"score_function": score_function, "source": source if sourced else None}
    scores_P = pair_scores(logits_TE, token_P, expert_P, **options)
    wanted_P = probability(logits_TE, score_function)[token_P, expert_P.long()]
    assert error(scores_P, wanted_P) <= 1e-12
    dscores_P = torch.randn(90, dtype=F64)
    (got,), (wanted,) = (torch.autograd.grad(s, logits_TE, dscores_P) for s in (scores_P, wanted_P))
    assert error(got, wanted) <= 1e-12 or (got - wanted).norm() <= 1e-14


def through_router(router: TopKRouter) -> Callable[[Tensor], Tensor]:
    return lambda x_TD: router(x_TD).scores


def through_pairs(score_function: str, router: TopKRouter) -> Callable[[Tensor], Tensor]:
    def scores(x_TD: Tensor) -> Tensor:
        logits_TE = router.logits(x_TD)
        token_P, expert_P = torch.arange(T), torch.arange(T) % E
        source = (x_TD, router.weight)
        return pair_scores(logits_TE, token_P, expert_P, score_function=score_function, source=source)

    return scores


FROM_TOKENS = {f"topk-{index}": through_router(TopKRouter(D, E, K, **s)) for index, s in enumerate(SCORINGS)} | {
    f"pairs-{name}": through_pairs(name, TopKRouter(D, E, K)) for name in ops.SCORE_FUNCTIONS
}


@pytest.mark.parametrize("name", FROM_TOKENS)
def test_no_table_is_kept_and_no_second_derivative_is_told(name: str) -> None:
    x_TD = tokens(dtype=torch.float32)
    with kept() as tensors:
        scores = FROM_TOKENS[name](x_TD)
    assert tensors and not any(tensor.shape == (T, E) for tensor in tensors)
    assert max(tensor.untyped_storage().nbytes() for tensor in tensors) <= 4 * T * D
    (dx_TD,) = torch.autograd.grad(scores.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="asked for the gradient of its gradient"):
        dx_TD.sum().backward()


@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_no_second_derivative_of_pairs_alone(score_function: str) -> None:
    """Without a router in front, which would refuse too."""
    logits_TE = torch.randn(T, E, requires_grad=True)
    scores_P = pair_scores(logits_TE, torch.arange(T), torch.arange(T) % E, score_function=score_function)
    (dlogits_TE,) = torch.autograd.grad(scores_P.square().sum(), logits_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="asked for the gradient of its gradient"):
        dlogits_TE.sum().backward()


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("low", [-60.0, -95.0, -200.0, -1e4, -math.inf])
def test_scores_that_are_all_zero_stay_finite(score_function: str, low: float) -> None:
    logits_TE = torch.full((T, E), low, requires_grad=True)
    options = {"score_function": score_function, "norm_topk_prob": True, "topk_scaling_factor": 2.5}
    scores_TK, _ = topk_scores(logits_TE, K, **options)
    assert scores_TK.isfinite().all() and (scores_TK >= 0).all() and (scores_TK.sum(1) <= 2.5001).all()
    (dlogits_TE,) = torch.autograd.grad(scores_TK, logits_TE, torch.randn(T, K))
    assert dlogits_TE.isfinite().all()


# ---------------------------------------------------------------- groups and expert bias


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("num_groups", "group_topk", "top_k"), [(4, 2, 4), (4, 1, 3), (3, 2, 5), (6, 5, 2), (12, 4, 4), (2, 2, 3)]
)
@pytest.mark.parametrize("scoring", SCORINGS[::2], ids=lambda s: "-".join(map(str, list(s.values())[:3])))
def test_groups_limit_where_a_token_goes(
    scoring: dict[str, Any], num_groups: int, group_topk: int, top_k: int, biased: bool
) -> None:
    router = spread(
        TopKRouter(
            D, E, top_k, num_groups=num_groups, group_topk=group_topk, enable_expert_bias=biased, dtype=F64, **scoring
        )
    )
    if biased:
        router.expert_bias.copy_(torch.randn(E) * 0.3)
    routing = router(tokens())
    logits_TE, size = routing.logits.detach(), E // num_groups
    is_prob = biased or scoring["score_function"] != "softmax" or scoring["pre_softmax"]
    wish_TE = probability(logits_TE, scoring["score_function"]) if is_prob else logits_TE
    wish_TE = wish_TE + router.expert_bias if biased else wish_TE
    for wish, experts in zip(wish_TE.tolist(), routing.expert_index.tolist(), strict=True):
        groups = [sorted(wish[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
        worth = [sum(group[: max(1, top_k // group_topk)]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: -worth[g])[:group_topk]
        allowed = [e for e in range(E) if e // size in best]
        assert experts == sorted(allowed, key=lambda e: -wish[e])[:top_k]
        assert len({e // size for e in experts}) <= group_topk
    wanted_TK = scores_formula(routing.logits, routing.expert_index.long(), **scoring)
    assert error(routing.scores, wanted_TK) <= 1e-12


def test_the_bias_chooses_and_does_nothing_else() -> None:
    router = spread(TopKRouter(D, E, K, score_function="sigmoid", norm_topk_prob=True, enable_expert_bias=True))
    x_TD = tokens(dtype=torch.float32)
    plain = router(x_TD)
    router.expert_bias[5] = 9.0
    routing = router(x_TD)
    assert (routing.expert_index == 5).any(1).all() and not torch.equal(plain.expert_index, routing.expert_index)
    assert torch.equal(routing.logits, plain.logits)
    wanted_TK = scores_formula(routing.logits, routing.expert_index.long(), "sigmoid", norm_topk_prob=True)
    assert error(routing.scores, wanted_TK) <= 1e-6
    routing.scores.square().sum().backward()
    assert router.expert_bias.grad is None and not router.expert_bias.requires_grad
    assert "expert_bias" not in dict(router.named_parameters())


def biased_router(**options: Any) -> TopKRouter:
    return TopKRouter(D, E, K, score_function="sigmoid", enable_expert_bias=True, **options)


def test_the_bias_is_in_the_checkpoint_and_the_load_is_not() -> None:
    router = biased_router()
    router.expert_bias.normal_()
    router(tokens(dtype=torch.float32))
    assert set(router.state_dict()) == {"weight", "expert_bias"} and router.load.sum() == T * K
    other = biased_router()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.expert_bias, router.expert_bias) and other.load.sum() == 0
    again = copy.deepcopy(router)
    again.expert_bias.zero_()
    assert router.expert_bias.norm() > 0 and torch.equal(again.load, router.load)
    assert TopKRouter(D, E, K).expert_bias is TopKRouter(D, E, K).load is None


@pytest.mark.parametrize(
    "cast", [lambda r: r.to(torch.bfloat16), lambda r: r.half(), lambda r: torch.nn.Sequential(r).bfloat16()[0]]
)
def test_the_bias_stays_float32(cast: Callable[[TopKRouter], TopKRouter]) -> None:
    router = biased_router()
    value_E = router.expert_bias.fill_(1.0009765625).clone()  # one bit more than bfloat16 has
    router = cast(router)
    assert router.weight.dtype != torch.float32 and router.load.dtype == torch.int64
    assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, value_E)
    assert "expert_bias" in router.state_dict()
    router(torch.randn(T, D).to(router.weight.dtype))
    router.update_expert_bias()
    assert set(((router.expert_bias - value_E).abs() * 1e3).round().tolist()) <= {0.0, 1.0}


def test_the_bias_on_meta() -> None:
    router = biased_router(device="meta", bias=True)
    assert router.to(torch.bfloat16).expert_bias.dtype == torch.float32
    router = router.to_empty(device="cpu")
    for tensor in (*router.parameters(), router.expert_bias, router.load):
        tensor.data.fill_(77)
    router.reset_parameters()
    assert router.weight.abs().max() <= D**-0.5
    assert not any(tensor.any() for tensor in (router.bias, router.expert_bias, router.load))


def test_the_bias_moves_against_the_load_of_all_micro_batches() -> None:
    router = biased_router(expert_bias_rate=0.25)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    load_E = torch.zeros(E, dtype=torch.int64)
    for _ in range(3):
        router.expert_bias.copy_(torch.randn(E))
        load_E += router(torch.randn(7, D)).metrics.tokens_per_expert
    with torch.no_grad():
        router(torch.randn(7, D))
    router.eval()(torch.randn(7, D))
    assert torch.equal(router.load, load_E) and load_E.sum() == 3 * 7 * K
    before = router.expert_bias.clone()
    update_expert_bias(torch.nn.Sequential(router))
    moved = router.expert_bias - before
    torch.testing.assert_close(moved, 0.25 * torch.sign(load_E.float().mean() - load_E))
    assert not router.load.any()
    router.update_expert_bias()  # nothing counted, nothing moved
    assert torch.equal(router.expert_bias, before + moved)
    router.train()(torch.randn(7, D))
    reset_load(router)
    assert not router.load.any()


def test_bias_updates_balance_a_router_that_learns_from_skewed_tokens() -> None:
    violation = {}
    for rate in (0.0, 0.02):
        torch.manual_seed(3)
        router = spread(biased_router(expert_bias_rate=rate))
        optimizer = torch.optim.SGD(router.parameters(), lr=0.01)
        figures = []
        for _ in range(150):
            routing = router(torch.randn(256, D) * 0.3 + 1)
            optimizer.zero_grad()
            (routing.scores - 0.5).square().mean().backward()
            optimizer.step()
            update_expert_bias(router)
            figures.append(float(routing.metrics.load_violation))
        violation[rate] = sum(figures[-20:]) / 20
    assert violation[0.02] < 0.5 < 1.0 < violation[0.0]


# ---------------------------------------------------------------- hash


@pytest.mark.parametrize(("vocab", "top_k"), [(1, 1), (5, 12), (12, 4), (100, 3), (101, 5), (1000, 12), (997, 2)])
def test_the_table_is_balanced(vocab: int, top_k: int) -> None:
    table_VK = HashRouter(D, E, top_k, vocab_size=vocab).expert_of_id
    assert table_VK.shape == (vocab, top_k) and table_VK.dtype == torch.int32
    assert table_VK.min() >= 0 and table_VK.max() < E
    assert (table_VK.sort(1).values.diff(dim=1) > 0).all()
    count_E = torch.bincount(table_VK.flatten(), minlength=E)
    assert count_E.max() - count_E.min() <= 1


def test_experts_meet_in_all_combinations() -> None:
    """No expert is tied to another: of the 66 pairs all are met, at a K that divides E too."""
    table_VK = HashRouter(D, E, 2, vocab_size=2000).expert_of_id
    assert len({tuple(sorted(row)) for row in table_VK.tolist()}) == math.comb(E, 2)


def test_the_seed_tells_the_table() -> None:
    first, same = (HashRouter(D, E, K, vocab_size=50, seed=4) for _ in range(2))
    other = HashRouter(D, E, K, vocab_size=50, seed=5)
    assert torch.equal(first.expert_of_id, same.expert_of_id) and not torch.equal(
        first.expert_of_id, other.expert_of_id
    )
    assert "expert_of_id" in first.state_dict()
    late = HashRouter(D, E, K, vocab_size=50, seed=4, device="meta").to_empty(device="cpu")
    late.reset_parameters()
    assert torch.equal(late.expert_of_id, first.expert_of_id)
    assert first.bfloat16().expert_of_id.dtype == torch.int32


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_hash_router_scores_what_the_table_names(scoring: dict[str, Any]) -> None:
    router = spread(HashRouter(D, E, K, vocab_size=50, dtype=F64, aux_loss_coeff=0.1, **scoring))
    x_TD, ids = tokens(36), torch.randint(50, (4, 9))
    routing = router(x_TD, token_ids=ids)
    assert torch.equal(routing.expert_index, router.expert_of_id[ids.flatten()]) and routing.aux_loss > 0
    wanted_TK = scores_formula(x_TD @ router.weight.t(), routing.expert_index.long(), **scoring)
    assert routing.scores.dtype == F64 and error(routing.scores, wanted_TK) <= 1e-12
    dscores_TK = torch.randn(36, K, dtype=F64)
    got, wanted = (torch.autograd.grad(s, (x_TD, router.weight), dscores_TK) for s in (routing.scores, wanted_TK))
    assert max(map(error, got, wanted)) <= 1e-12


def test_hash_router_without_tokens() -> None:
    router = HashRouter(D, E, K, vocab_size=50)
    assert router(torch.randn(0, D), token_ids=torch.empty(0, dtype=torch.int64)).scores.shape == (0, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_router_serves_16_bit_tokens(dtype: torch.dtype) -> None:
    router = spread(TopKRouter(D, E, K, bias=True, aux_loss_coeff=0.1))
    x_TD = torch.randn(T, D).to(dtype).requires_grad_()
    routing = router(x_TD)
    logits_TE = x_TD.detach().double() @ router.weight.detach().double().t() + router.bias.detach().double()
    assert routing.scores.dtype == torch.float32 and error(routing.logits, logits_TE) <= 1e-6
    (routing.scores.square().sum() + routing.aux_loss).backward()
    assert (x_TD.grad.dtype, router.weight.grad.dtype) == (dtype, torch.float32)


# ---------------------------------------------------------------- compilers

COMPILED: dict[str, dict[str, Any]] = {
    "default": {},
    "before": {"pre_softmax": True, "z_loss_coeff": 0.1},
    "deepseek": {"score_function": "sigmoid", "norm_topk_prob": True, "topk_scaling_factor": 2.5, "num_groups": 4}
    | {"group_topk": 2, "enable_expert_bias": True, "bias": True},
    "softplus": {"score_function": "sqrtsoftplus", "aux_loss_coeff": 0.1, "aux_loss_type": "sequence"},
    "global": {"aux_loss_coeff": 0.1, "aux_loss_type": "global"},
    "input": {"top_k": 1, "score_function": "sigmoid", "scores_on": "input"},
}


@pytest.mark.parametrize("name", [*COMPILED, "hash"])
def test_routers_compile_into_one_graph(name: str) -> None:
    """Scores, losses and gradients as without the compiler, and the load is counted."""
    torch._dynamo.reset()
    if name == "hash":
        router: TopKRouter = HashRouter(D, E, K, vocab_size=9, aux_loss_coeff=0.1)
        extra: dict[str, Any] = {"token_ids": torch.randint(9, (T + 3,))}
    else:
        router = TopKRouter(**{"hidden_size": D, "num_experts": E, "top_k": K, **COMPILED[name]})
        extra = {"sequence_length": 10} if router.wants_sequence_length else {}
    spread(router)
    twin, x_TD = copy.deepcopy(router), tokens(T + 3, torch.float32)
    routing = torch.compile(router, fullgraph=True, backend="aot_eager")(x_TD, **extra)
    wanted = twin(x_TD, **extra)
    assert torch.equal(routing.expert_index, wanted.expert_index) and error(routing.scores, wanted.scores) <= 1e-6
    assert error(routing.aux_loss, wanted.aux_loss) <= 1e-6
    got, want = (
        torch.autograd.grad(r.scores.square().sum() + r.aux_loss, (x_TD, module.weight))
        for r, module in ((routing, router), (wanted, twin))
    )
    assert max(map(error, got, want)) <= 1e-5
    assert router.load is None or torch.equal(router.load, twin.load) and router.load.any()


def test_compiled_hash_router_refuses_ids_out_of_range() -> None:
    torch._dynamo.reset()
    router = torch.compile(HashRouter(D, E, K, vocab_size=9), fullgraph=True, backend="aot_eager")
    for wrong in (-1, 9):
        with pytest.raises(RuntimeError, match="token_ids is out of range, expected 0 <= token_ids < vocab_size = 9"):
            router(torch.randn(2, D), token_ids=torch.tensor([3, wrong]))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_opcheck_with_groups(score_function: str, biased: bool) -> None:
    bias_E = torch.randn(E) if biased else None
    torch.library.opcheck(ops.topk_softmax, (torch.randn(5, E), 4, score_function, False, True, 2.5, bias_E, 4, 2))


def test_a_group_with_masked_experts_is_kept_to() -> None:
    """Of four groups of two only experts 5 and 7 can be chosen, 7 the better: its group wins, barred one and all."""
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 5], logits[0, 7] = 0.5, 1.0
    scores, experts = topk_scores(logits, 2, num_groups=4, group_topk=1)
    assert sorted(experts[0].tolist()) == [6, 7] and float(scores.max()) == 1.0
