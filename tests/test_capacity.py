"""Expert choice and capacity with dropping: a brute force takes the same pairs; what that does to causality."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic.kernels import ops
from sonic.routing import (
    CapacityDropping,
    ExpertChoiceRouter,
    HashRouter,
    Routing,
    RoutingMetrics,
    TokenRounding,
    TopKRouter,
    preset_router,
)
from sonic.routing.selection import expert_of_row

T, D, N, E, K = 40, 16, 8, 6, 2
F64 = torch.float64


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error, absolute where all zeros are wanted."""
    size = float(wanted.detach().norm())
    return float((got - wanted).detach().norm()) / (size or 1.0)


def probability(logits: Tensor, score_function: str) -> Tensor:
    if score_function == "softmax":
        return torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return 1 / (1 + torch.exp(-logits)) if score_function == "sigmoid" else torch.log(1 + torch.exp(logits)).sqrt()


def spread(router: Any) -> Any:
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def topk(**options: Any) -> TopKRouter:
    return spread(TopKRouter(D, E, K, **options))


def expert_choice(**options: Any) -> ExpertChoiceRouter:
    return spread(ExpertChoiceRouter(D, E, K, dtype=F64, **options))


def pairs(routing: Routing) -> list[tuple[int, int]]:
    """(token, expert) by slot."""
    plan = routing.plan
    expert_R = torch.arange(plan.num_experts).repeat_interleave(plan.tokens_per_expert())
    found = [(-1, -1)] * plan.num_rows
    for token, expert, slot in zip(plan.token_of_row_R, expert_R, plan.slot_of_row_R, strict=True):
        found[int(slot)] = (int(token), int(expert))
    return found


def as_table(routing: Routing) -> Tensor:
    """Scores as (T, E), zero where a token does not go."""
    token_P, expert_P = torch.tensor(pairs(routing)).reshape(-1, 2).unbind(1)
    table_TE = torch.zeros(routing.plan.num_tokens, routing.plan.num_experts, dtype=routing.scores.dtype)
    return table_TE.index_put((token_P, expert_P), routing.scores.reshape(-1))


# ---------------------------------------------------------------- expert choice


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_every_expert_takes_its_best_tokens(score_function: str, factor: float) -> None:
    router = expert_choice(score_function=score_function, capacity_factor=factor, topk_scaling_factor=2.5)
    x_TD = torch.randn(T, D, dtype=F64, requires_grad=True)
    routing = router(x_TD)
    capacity = min(T, math.ceil(factor * T * K / E))
    prob_TE = probability(x_TD @ router.weight.t(), score_function)
    best_CE = prob_TE.argsort(0, descending=True)[:capacity]
    wanted_TE = torch.zeros_like(prob_TE).scatter(0, best_CE, 2.5 * prob_TE.gather(0, best_CE))
    assert routing.plan.tokens_per_expert().tolist() == [capacity] * E
    assert routing.metrics.load_violation == 0 and routing.plan.scores_shape == routing.scores.shape == (capacity * E,)
    got_TE = as_table(routing)
    assert torch.equal(got_TE != 0, wanted_TE != 0) and error(got_TE, wanted_TE) <= 1e-12
    dtable_TE = torch.randn(T, E, dtype=F64)
    got, wanted = (torch.autograd.grad(t, (x_TD, router.weight), dtable_TE) for t in (got_TE, wanted_TE))
    assert all(want.norm() > 0 for want in wanted) and max(map(error, got, wanted)) <= 1e-12
    wished = {(t, e) for t, experts in enumerate(routing.expert_index.tolist()) for e in experts}
    taken = set(pairs(routing))
    assert routing.metrics.dropped == len(wished - taken) and routing.metrics.padded == len(taken - wished)


@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_eval_mode_is_top_k(score_function: str) -> None:
    router = expert_choice(score_function=score_function).eval()
    options = {"score_function": score_function, "pre_softmax": score_function == "softmax"}
    plain = TopKRouter(D, E, K, dtype=F64, **options)
    plain.load_state_dict(router.state_dict())
    x_TD = torch.randn(T, D, dtype=F64)
    got, wanted = router(x_TD), plain(x_TD)
    assert torch.equal(got.scores, wanted.scores) and torch.equal(got.expert_index, wanted.expert_index)
    assert got.plan.scores_shape == (T, K) and torch.equal(got.plan.token_of_row_R, wanted.plan.token_of_row_R)
    router.eval_mode = "expert_choice"
    assert router(x_TD).plan.tokens_per_expert().tolist() == [math.ceil(T * K / E)] * E


def test_expert_choice_without_tokens() -> None:
    routing = expert_choice(aux_loss_coeff=0.1)(torch.randn(0, D, dtype=F64))
    assert routing.plan.num_rows == 0 and routing.aux_loss == 0


def leak(layer: sonic.MoE, later: Tensor) -> bool:
    """Whether the output of early tokens moves when later ones are replaced."""
    x_TD = torch.randn(T, D, dtype=F64)
    moved_TD = torch.cat((x_TD[: T // 2], later))
    return not torch.equal(layer(x_TD)[: T // 2], layer(moved_TD)[: T // 2])


def layer_of(router: Any) -> sonic.MoE:
    return sonic.MoE(D, N, E, K, router=router, dtype=F64)


def test_expert_choice_leaks_the_future_in_training_only() -> None:
    layer, later = layer_of(expert_choice()), 5 * torch.randn(T // 2, D, dtype=F64)
    assert leak(layer, later) and not leak(layer.eval(), later)
    layer.router.eval_mode = "expert_choice"
    assert leak(layer, later)


# ---------------------------------------------------------------- capacity


def brute_force(routing: Routing, capacity: int, policy: str) -> set[tuple[int, int]]:
    """The pairs that are kept: per expert the best by score, or the first by position."""
    kept = set()
    scored = list(zip(pairs(routing), routing.scores.detach().reshape(-1).tolist(), strict=True))
    for expert in range(routing.plan.num_experts):
        own = [(token, score) for (token, e), score in scored if e == expert]
        own.sort(key=(lambda entry: -entry[1]) if policy == "score" else (lambda entry: entry[0]))
        kept |= {(token, expert) for token, _ in own[:capacity]}
    return kept


@pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 1.25, 9.0])
@pytest.mark.parametrize("policy", ["score", "position"])
def test_what_is_beyond_capacity_is_dropped(policy: str, factor: float) -> None:
    inner = topk(dtype=F64, aux_loss_coeff=0.1)
    router = CapacityDropping(inner, capacity_factor=factor, policy=policy)
    x_TD = torch.randn(T, D, dtype=F64, requires_grad=True)
    routing, before = router(x_TD), inner(x_TD)
    capacity = math.ceil(factor * T * K / E)
    wanted = brute_force(before, capacity, policy)
    assert set(pairs(routing)) == wanted and routing.plan.tokens_per_expert().max() <= capacity
    assert routing.metrics.dropped == T * K - len(wanted) and routing.metrics.padded == 0
    assert (routing.metrics.dropped > 0) == (factor < 9)
    assert torch.equal(routing.expert_index, before.expert_index) and torch.equal(routing.aux_loss, before.aux_loss)

    keep_TE = torch.zeros(T, E, dtype=F64)
    for pair in wanted:
        keep_TE[pair] = 1
    wanted_TE = as_table(before) * keep_TE
    got_TE = as_table(routing)
    assert torch.equal(got_TE, wanted_TE)
    dtable_TE = torch.randn(T, E, dtype=F64)
    got, want = (torch.autograd.grad(t, (x_TD, inner.weight), dtable_TE) for t in (got_TE, wanted_TE))
    assert max(map(error, got, want)) <= 1e-12


def test_gradients_flow_through_kept_pairs_alone() -> None:
    """One expert has room for one token: all others get no gradient from their scores."""
    inner = spread(TopKRouter(D, E, 1, pre_softmax=True))
    router = CapacityDropping(inner, capacity_factor=1 / T, policy="score")
    x_TD = torch.randn(T, D, requires_grad=True)
    routing = router(x_TD)
    routing.scores.sum().backward()
    kept = torch.zeros(T, dtype=torch.bool)
    kept[[token for token, _ in pairs(routing)]] = True
    assert 0 < kept.sum() <= E and torch.equal(x_TD.grad.abs().sum(1) > 0, kept)


@pytest.mark.parametrize("policy", ["score", "position"])
def test_eval_mode_drops_nothing_unless_told(policy: str) -> None:
    inner = topk()
    x_TD = torch.randn(T, D)
    router = CapacityDropping(inner, capacity_factor=0.5, policy=policy).eval()
    routing = router(x_TD)
    assert torch.equal(routing.scores, inner(x_TD).scores) and routing.metrics.dropped == 0
    router.drop_in_eval = True
    assert router(x_TD).metrics.dropped > 0
    assert CapacityDropping(inner)(torch.randn(0, D)).plan.num_rows == 0


@pytest.mark.parametrize("policy", ["score", "position"])
def test_dropping_by_position_is_causal_and_by_score_is_not(policy: str) -> None:
    layer = layer_of(CapacityDropping(topk(dtype=F64, pre_softmax=True), capacity_factor=0.7, policy=policy))
    later = 5 * torch.randn(T // 2, D, dtype=F64)
    assert leak(layer, later) == (policy == "score")
    assert not leak(layer.eval(), later)


@pytest.mark.parametrize("policy", ["score", "position"])
def test_a_layer_with_capacity_is_the_sum_over_kept_pairs(policy: str) -> None:
    layer = layer_of(CapacityDropping(topk(dtype=F64), capacity_factor=0.5, policy=policy))
    x_TD = torch.randn(T, D, dtype=F64, requires_grad=True)
    y_TD, routing = layer(x_TD, return_routing=True)
    score_TE = as_table(routing)
    h_TEU = torch.einsum("td,eud->teu", x_TD, layer.w1)
    a_TEN = torch.nn.functional.silu(h_TEU[..., :N]) * h_TEU[..., N:]
    wanted_TD = torch.einsum("ten,edn,te->td", a_TEN, layer.w2, score_TE)
    assert error(y_TD, wanted_TD) <= 1e-12
    leaves, dy_TD = (x_TD, *layer.parameters()), torch.randn(T, D, dtype=F64)
    got = torch.autograd.grad(y_TD, leaves, dy_TD, retain_graph=True)
    assert max(map(error, got, torch.autograd.grad(wanted_TD, leaves, dy_TD))) <= 1e-12
    assert routing.metrics.dropped > 0 and (score_TE == 0).all(1).any()  # some tokens lose all their experts
    assert (y_TD[(score_TE == 0).all(1)] == 0).all()


@pytest.mark.parametrize("policy", ["score", "position"])
def test_pairs_that_were_added_and_dropped_again_are_neither(policy: str) -> None:
    """Figures of capacity around token rounding count pairs as top-K wanted them."""
    rounding = TokenRounding(topk(), rule="up", tile_rows=5)
    routing = CapacityDropping(rounding, capacity_factor=0.6, policy=policy)(torch.randn(T, D))
    wished = {(t, e) for t, experts in enumerate(routing.expert_index.tolist()) for e in experts}
    held = set(pairs(routing))
    assert routing.metrics.dropped == len(wished - held) > 0 and routing.metrics.padded == len(held - wished)


def test_capacity_looks_like_the_router_that_it_wraps() -> None:
    inner = topk(score_function="sigmoid", aux_loss_type="sequence", aux_loss_coeff=0.1)
    router = CapacityDropping(inner)
    assert (router.hidden_size, router.num_experts, router.top_k) == (D, E, K)
    assert router.score_function == "sigmoid" and router.wants_sequence_length
    assert router(torch.randn(T, D), sequence_length=10).aux_loss > 0
    hashed = CapacityDropping(HashRouter(D, E, K, vocab_size=9), capacity_factor=0.5)
    assert hashed(torch.randn(T, D), token_ids=torch.zeros(T, dtype=torch.int64)).metrics.dropped == T * K - 7 * K


# ---------------------------------------------------------------- in the layer


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_layer_hands_ids_to_its_router(wrapped: bool) -> None:
    router = HashRouter(D, E, K, vocab_size=9, dtype=F64)
    layer = layer_of(CapacityDropping(router, capacity_factor=9.0) if wrapped else router)
    x_BSD, ids_BS = torch.randn(4, 10, D, dtype=F64), torch.randint(9, (4, 10))
    y_BSD, routing = layer(x_BSD, return_routing=True, token_ids=ids_BS)
    assert torch.equal(routing.expert_index, router.expert_of_id[ids_BS.flatten()])
    assert torch.equal(y_BSD, layer(x_BSD, token_ids=ids_BS))
    with pytest.raises(ValueError, match=r"^sonic\.routing\.HashRouter: token_ids is None, expected the ids"):
        layer(x_BSD)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_layer_tells_its_router_where_sequences_begin(wrapped: bool) -> None:
    router = topk(dtype=F64, aux_loss_type="sequence", aux_loss_coeff=0.1)
    layer = layer_of(CapacityDropping(router) if wrapped else router)
    x_BSD = torch.randn(4, 10, D, dtype=F64)
    _, routing = layer(x_BSD, return_routing=True)
    wanted = router(x_BSD.flatten(0, 1), sequence_length=10).aux_loss
    assert torch.equal(routing.aux_loss, wanted)
    layer(x_BSD).square().sum().backward()
    assert router.weight.grad.norm() > 0


def test_scores_on_the_input_of_an_expert() -> None:
    """Llama 4: the expert gets its token times the score; the router's losses still reach backward by themselves."""
    router = preset_router("llama4", hidden_size=D, num_experts=E, aux_loss_coeff=0.3, dtype=F64)
    layer = sonic.MoE(D, N, E, 1, router=router, dtype=F64)
    x_TD = torch.randn(T, D, dtype=F64, requires_grad=True)
    y_TD, routing = layer(x_TD, return_routing=True)
    logits_TE = x_TD @ router.weight.t()
    expert_T = logits_TE.argmax(1)
    in_TD = x_TD * torch.sigmoid(logits_TE.gather(1, expert_T[:, None]))
    h_TU = torch.einsum("td,tud->tu", in_TD, layer.w1[expert_T])
    a_TN = torch.nn.functional.silu(h_TU[:, :N]) * h_TU[:, N:]
    wanted_TD = torch.einsum("tn,tdn->td", a_TN, layer.w2[expert_T])
    assert error(y_TD, wanted_TD) <= 1e-12
    leaves, dy_TD = (x_TD, *layer.parameters()), torch.randn(T, D, dtype=F64)
    wanted = torch.autograd.grad((wanted_TD * dy_TD).sum() + routing.aux_loss, leaves, retain_graph=True)
    assert max(map(error, torch.autograd.grad(layer(x_TD), leaves, dy_TD), wanted)) <= 1e-12
    plain = torch.autograd.grad(wanted_TD, leaves, dy_TD)
    assert max(map(error, torch.autograd.grad(y_TD, leaves, dy_TD), plain)) <= 1e-12


# ---------------------------------------------------------------- figures


def test_figures_of_dropped_and_added_pairs() -> None:
    plan = sonic.RoutingPlan.from_pairs(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 1]), 4, 3)
    metrics = RoutingMetrics(plan, num_requested=8, num_padded=1)
    assert (metrics.dropped, metrics.padded, metrics.dead_experts) == (5, 1, 1)
    assert float(metrics.moved) == 6 / 8 and float(metrics.load_violation) == pytest.approx(1.25)
    nothing = torch.empty(0, dtype=torch.int64)
    empty = RoutingMetrics(sonic.RoutingPlan.from_pairs(nothing, nothing, 0, 3), logits=torch.zeros(0, 3))
    assert (empty.moved, empty.load_violation, empty.load_entropy, empty.entropy, empty.dead_experts) == (0, 0, 1, 0, 3)
    even = RoutingMetrics(sonic.RoutingPlan.from_topk(torch.arange(4)[:, None], 4), logits=torch.zeros(4, 4))
    assert float(even.load_entropy) == pytest.approx(1) and float(even.entropy) == pytest.approx(math.log(4))


def test_capacity_is_rounded_as_people_count() -> None:
    """1.1 times 10 is 11 rows: in binary it is a little more, which must not cost a twelfth."""
    routing = ExpertChoiceRouter(D, 4, 1, capacity_factor=1.1)(torch.randn(40, D))
    assert routing.metrics.tokens_per_expert.tolist() == [11] * 4


def test_figures_of_rounding_around_dropping() -> None:
    """A pair that capacity dropped and rounding brings back was not moved."""
    inner = TopKRouter(D, 6, 2)
    router = TokenRounding(CapacityDropping(inner, capacity_factor=0.7), rule="up", tile_rows=16)
    x = torch.randn(128, D)
    routing = router(x)
    after = set(zip(routing.plan.token_of_row_R.tolist(), expert_of_row(routing.plan).tolist(), strict=True))
    before = {(t, e) for t, row in enumerate(inner(x).expert_index.tolist()) for e in row}
    assert routing.metrics.padded == len(after - before) and routing.metrics.dropped == len(before - after)
