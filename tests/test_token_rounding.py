"""Token rounding: counts are whole tiles, moves are bounded as each rule promises, and the right pairs move."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sonic
from sonic.routing import (
    ROUNDING_RULES,
    RoutingPlan,
    TokenRounding,
    TopKRouter,
    round_counts,
    round_to_tiles,
)
from sonic.routing.result import Routing
from tests.helpers import assert_close
from tests.test_losses import be_a_rank, run_ranks

RULES = tuple(ROUNDING_RULES)
pytestmark = pytest.mark.filterwarnings("ignore:.*quality falls there")


def pairs_of(plan: RoutingPlan) -> set[tuple[int, int]]:
    """All (token, expert) pairs of a plan."""
    expert_R = torch.arange(plan.num_experts).repeat_interleave(plan.tokens_per_expert().long())
    return set(zip(plan.token_of_row_R.tolist(), expert_R.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------- counts alone


@settings(max_examples=400)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=24),
    tile=st.integers(1, 97),
    rule=st.sampled_from(RULES),
    draw=st.randoms(use_true_random=False),
)
def test_each_rule_keeps_its_promise(counts: list[int], tile: int, rule: str, draw: object) -> None:
    numbers = [[draw.random() for _ in counts] for _ in range(3)]  # type: ignore[attr-defined]
    got = round_counts(counts, tile, rule=rule, draws=numbers[0], dropped_scores=numbers[1], padded_scores=numbers[2])
    moves = [after - before for after, before in zip(got, counts, strict=True)]
    assert all(count % tile == 0 for count in got)
    assert all(abs(move) < tile for move in moves)
    for before, move in zip(counts, moves, strict=True):
        assert move == 0 if before % tile == 0 else move != 0
    if rule == "nearest":
        assert all(2 * abs(move) <= tile for move in moves)
    if rule == "balanced":
        totals = [sum(moves[: end + 1]) for end in range(len(moves))]
        assert all(2 * abs(total) <= tile for total in totals)
    if rule in ("up", "down"):
        assert all((move >= 0) if rule == "up" else (move <= 0) for move in moves)


def test_no_rule_can_keep_both_bounds() -> None:
    """Why "balanced" does not promise half a tile per expert: two experts at 0.3 tiles leave it no such choice."""
    for first in (0, 10):
        for second in (0, 10):
            moves = (first - 3, second - 3)
            assert abs(sum(moves)) > 5 or max(map(abs, moves)) > 5
    assert sorted(round_counts([3, 3], 10, rule="balanced")) == [0, 10]


def test_limits_make_an_expert_round_down() -> None:
    for rule in RULES:
        mass = {"draws": [0.0], "dropped_scores": [1.0], "padded_scores": [0.0]}
        assert round_counts([19], 10, rule=rule, **mass) == [10 if rule == "down" else 20]
        assert round_counts([19], 10, rule=rule, limits=[19], **mass) == [10]


def test_what_a_tie_does() -> None:
    assert round_counts([5], 10, rule="nearest") == [0], "a tie goes down, so that nothing is padded for nothing"
    assert round_counts([5], 10, rule="balanced") == [0]
    nothing = {"dropped_scores": [0.0], "padded_scores": [0.0]}
    assert round_counts([9], 10, rule="nearest_score", **nothing) == [0], "all-zero scores"


def test_stochastic_is_unbiased() -> None:
    counts, tile, num_draws = [0, 3, 50, 64, 100, 127, 129], 64, 5000
    rng = torch.Generator().manual_seed(3)
    draws = torch.rand(num_draws, len(counts), generator=rng, dtype=torch.float64)
    rounded = torch.tensor(
        [round_counts(counts, tile, rule="stochastic", draws=row) for row in draws.tolist()], dtype=torch.float64
    )
    share = torch.tensor([count % tile / tile for count in counts], dtype=torch.float64)
    sigma = tile * (share * (1 - share) / num_draws).sqrt()
    assert ((rounded.mean(0) - torch.tensor(counts)).abs() <= 4 * sigma).all()
    assert (rounded.std(0)[[1, 2, 4, 5, 6]] > 0).all()


# ------------------------------------------------------------------------------------------------------- who moves


def brute_force(plan: RoutingPlan, score_TE: Tensor, targets: list[int]) -> set[tuple[int, int]]:
    """What the definition asks for: chosen pairs keep their score, others lose 1, experts take the best of a column."""
    preference_TE = score_TE - 1
    for token, expert in pairs_of(plan):
        preference_TE[token, expert] += 1
    order_TE = preference_TE.argsort(dim=0, descending=True)
    return {(int(t), e) for e, target in enumerate(targets) for t in order_TE[:target, e]}


@settings(max_examples=500)
@given(
    num_tokens=st.integers(1, 60),
    num_experts=st.integers(2, 9),  # one expert alone scores 1 everywhere: nothing but ties
    top_k=st.integers(1, 9),
    tile=st.integers(1, 24),
    rule=st.sampled_from(RULES),
    score_function=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    skew=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_pairs_are_those_of_the_definition(
    num_tokens: int, num_experts: int, top_k: int, tile: int, rule: str, score_function: str, skew: float, seed: int
) -> None:
    top_k, tile = min(top_k, num_experts), min(tile, num_tokens)
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=rng, dtype=torch.float64)
    logits += skew * torch.randn(num_experts, generator=rng, dtype=torch.float64)
    plan = RoutingPlan.from_topk(logits.topk(top_k, dim=-1).indices, num_experts)
    rounded = round_to_tiles(
        plan, logits, tile, rule=rule, score_function=score_function, generator=torch.Generator().manual_seed(seed)
    )
    expert_R = torch.arange(num_experts).repeat_interleave(plan.tokens_per_expert().long())
    kept = set(zip(plan.token_of_row_R[rounded.kept_row].tolist(), expert_R[rounded.kept_row].tolist(), strict=True))
    padded = list(zip(rounded.padded_token.tolist(), rounded.padded_expert.tolist(), strict=True))
    assert len(set(padded)) == len(padded), "no pair is padded twice"
    assert not set(padded) & pairs_of(plan), "padding is new"
    assert len(kept) + rounded.num_dropped == plan.num_rows
    got = kept | set(padded)
    counts = [sum(expert == e for _, expert in got) for e in range(num_experts)]
    before = plan.tokens_per_expert().tolist()
    limit = num_tokens // tile * tile
    for count, was in zip(counts, before, strict=True):
        assert count % tile == 0 and abs(count - was) < tile
        if rule == "nearest" and was <= limit:
            assert 2 * abs(count - was) <= tile
    for expert in range(num_experts):  # padding and dropping never meet in one expert
        has_padding = any(e == expert for _, e in padded)
        assert not has_padding or before[expert] == sum(e == expert for _, e in kept)
    if score_function == "softmax":
        score_TE = logits.softmax(-1)
    elif score_function == "sigmoid":
        score_TE = logits.sigmoid()
    else:
        score_TE = nn.functional.softplus(logits).sqrt() / 8  # below 1, as the definition has it
    assert got == brute_force(plan, score_TE.clone(), counts)
    if rule == "nearest_score":
        for expert in range(num_experts):
            check_nearest_score(plan, score_TE, expert, counts[expert], tile)


def check_nearest_score(plan: RoutingPlan, score_TE: Tensor, expert: int, count: int, tile: int) -> None:
    """Up if and only if dropping would lose more score than padding adds."""
    chosen = sorted(float(score_TE[t, e]) for t, e in pairs_of(plan) if e == expert)
    others = sorted(float(score_TE[t, expert]) for t in set(range(plan.num_tokens)) - tokens_of(plan, expert))
    rest = len(chosen) % tile
    if rest == 0 or len(chosen) - rest + tile > plan.num_tokens // tile * tile:
        assert count == len(chosen) - rest
        return
    lost, added = sum(chosen[:rest]), sum(others[len(others) - (tile - rest) :])
    if abs(lost - added) > 1e-9:
        assert (count > len(chosen)) == (lost > added)


def tokens_of(plan: RoutingPlan, expert: int) -> set[int]:
    """Tokens that the plan sends to an expert."""
    return {t for t, e in pairs_of(plan) if e == expert}


@settings(max_examples=100)
@given(seed=st.integers(0, 2**31), rule=st.sampled_from(RULES), tile=st.integers(2, 20))
def test_padding_stays_within_the_groups_of_a_token(seed: int, rule: str, tile: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    router = TopKRouter(6, 12, 4, score_function="sigmoid", num_groups=4, group_topk=2, enable_expert_bias=True)
    x = torch.randn(50, 6, generator=rng)
    before = router(x)
    after = TokenRounding(router, rule=rule, tile_rows=tile)(x)
    assert (after.metrics.tokens_per_expert % tile == 0).all()
    groups_before = {(t, e // 3) for t, e in pairs_of(before.plan)}
    assert {(t, e // 3) for t, e in pairs_of(after.plan)} <= groups_before


def test_columns_in_many_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch that holds a few columns at a time changes nothing."""
    logits = torch.randn(100, 16)
    plan = RoutingPlan.from_topk(logits.topk(3).indices, 16)
    whole = round_to_tiles(plan, logits, 8, rule="nearest_score")
    monkeypatch.setattr("sonic.routing.selection._SCRATCH_VALUES", {"cpu": 150})
    monkeypatch.setattr("sonic.kernels.reference.selection._SCRATCH_VALUES", {"cpu": 150})
    pieces = round_to_tiles(plan, logits, 8, rule="nearest_score")
    for name in ("kept_row", "padded_token", "padded_expert"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name)), name


# -------------------------------------------------------------------------------------------------------- the router


@pytest.mark.parametrize("rule", RULES)
def test_eval_is_the_wrapped_router_bit_for_bit(rule: str) -> None:
    router = TopKRouter(8, 6, 2, aux_loss_coeff=0.1)
    layer = sonic.MoE(8, 4, 6, 2, router=TokenRounding(router, rule=rule, tile_rows=16))
    plain = sonic.MoE(8, 4, 6, 2, router=router)
    plain.load_state_dict(
        {name.replace("router.router.", "router."): value for name, value in layer.state_dict().items()}
    )
    x = torch.randn(64, 8)
    assert not torch.equal(layer(x), plain(x)), "in training they differ, or this test could not fail"
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [{}, {"pre_softmax": True}, {"score_function": "sigmoid", "norm_topk_prob": True, "topk_scaling_factor": 2.5}],
    ids=["softmax of the chosen", "softmax of all", "sigmoid, scaled"],
)
def test_gradients_match_the_dense_formula(rule: str, options: dict) -> None:
    T, D, N, E, K, M = 40, 6, 5, 7, 2, 8
    torch.manual_seed(1)
    rounding = TokenRounding(TopKRouter(D, E, K, dtype=torch.float64, **options), rule=rule, tile_rows=M)
    layer = sonic.MoE(D, N, E, K, router=rounding, dtype=torch.float64)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    y, routing = layer(x, return_routing=True)
    assert routing.metrics.padded > 0 or rule == "down"
    dout = torch.randn_like(y)
    leaves = {"x": x, "router.weight": rounding.router.weight, "w1": layer.w1, "w2": layer.w2}
    got = torch.autograd.grad(y, list(leaves.values()), dout)

    logits = x @ rounding.router.weight.t()
    chosen_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, logits.topk(K).indices, True)
    if options.get("score_function") == "sigmoid":
        raw = logits.sigmoid()
        kept = raw / (raw * chosen_TE).sum(-1, keepdim=True) * 2.5
        raw = raw * 2.5
    else:
        raw = logits.softmax(-1)
        kept = raw if "pre_softmax" in options else logits.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
    score_TE = torch.zeros(T, E, dtype=torch.float64)
    for token, expert in pairs_of(routing.plan):
        source = kept if chosen_TE[token, expert] else raw
        score_TE = score_TE.index_put((torch.tensor(token), torch.tensor(expert)), source[token, expert])
    gate, up = torch.einsum("td,eud->teu", x, layer.w1).chunk(2, dim=-1)
    dense = torch.einsum("te,ten,edn->td", score_TE, nn.functional.silu(gate) * up, layer.w2)
    want = torch.autograd.grad(dense, list(leaves.values()), dout)
    assert_close("y", y, dense)
    for name, ours, theirs in zip(leaves, got, want, strict=True):
        assert_close(name, ours, theirs)


def test_scores_of_padded_pairs_reach_the_router() -> None:
    """With "up" and a loss on the padded pairs alone, the router still learns."""
    rounding = TokenRounding(TopKRouter(6, 5, 1, dtype=torch.float64), rule="up", tile_rows=16)
    routing = rounding(torch.randn(40, 6, dtype=torch.float64))
    num_kept = 40
    routing.scores[num_kept:].sum().backward()
    assert routing.scores.shape[0] > num_kept and rounding.router.weight.grad.abs().sum() > 0


def test_nothing_over_tokens_and_experts_is_kept_for_backward() -> None:
    T, D, E, K = 512, 8, 64, 2
    router = TokenRounding(TopKRouter(D, E, K), rule="up", tile_rows=16)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = torch.randn(T, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing = router(x)
    assert sizes and max(sizes) <= max(T * D, 2 * routing.plan.num_rows) < T * E


def test_the_same_generator_state_gives_the_same_choice() -> None:
    x = torch.randn(256, 8)
    router = TopKRouter(8, 16, 2)

    def route(seed: int) -> Routing:
        generator = torch.Generator().manual_seed(seed)
        return TokenRounding(router, rule="stochastic", tile_rows=16, generator=generator)(x)

    first, again, other = route(1), route(1), route(2)
    assert torch.equal(first.plan.token_of_row_R, again.plan.token_of_row_R)
    assert torch.equal(first.scores, again.scores)
    assert pairs_of(first.plan) != pairs_of(other.plan)


def test_checkpointing_draws_the_same_again() -> None:
    """Without a generator the draws come from torch's own, which activation checkpointing rewinds."""
    torch.manual_seed(0)
    layer = sonic.MoE(8, 4, 16, 2, router=TokenRounding(TopKRouter(8, 16, 2), rule="stochastic", tile_rows=16))
    x = torch.randn(256, 8, requires_grad=True)
    grads = []
    for reentrant in (False, True, None):
        torch.manual_seed(5)
        y = layer(x) if reentrant is None else torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        x.grad = None
        y.sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[2])


def test_metrics_tell_what_moved() -> None:
    routing = TokenRounding(TopKRouter(8, 6, 2), rule="nearest", tile_rows=16)(torch.randn(200, 8))
    metrics = routing.metrics
    before = pairs_of(RoutingPlan.from_topk(routing.expert_index, 6))
    after = pairs_of(routing.plan)
    assert metrics.padded == len(after - before) and metrics.dropped == len(before - after)
    assert float(metrics.moved) == pytest.approx(len(after ^ before) / 400)
    assert metrics.padding_waste(16) == 0 and metrics.padding_waste(8) == 0


def test_auxiliary_losses_are_those_of_the_wrapped_router() -> None:
    router = TopKRouter(8, 6, 2, aux_loss_coeff=0.3, z_loss_coeff=0.1)
    x = torch.randn(64, 8)
    assert torch.equal(TokenRounding(router, tile_rows=16)(x).aux_loss, router(x).aux_loss)


def test_auto_takes_the_kernels_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    router = TokenRounding(TopKRouter(8, 6, 2))
    assert router.tile_rows == "auto" and router.rule == "nearest"
    x = torch.randn(200, 8)
    assert router(x).scores.shape == (200, 2), "plain torch pads nothing, so there is nothing to round"
    asked = []

    def tile_rows(request: object) -> int:
        asked.append(request)
        return 32

    monkeypatch.setattr("sonic.kernels.reference.tile_rows", tile_rows)
    assert (router(x).metrics.tokens_per_expert % 32 == 0).all()
    assert asked[0].num_rows == 400 and asked[0].num_experts == 6 and asked[0].op == "up_proj"
    assert router(x[:20]).scores.shape == (20, 2), "fewer tokens than a tile: there is nothing to round to"


def test_warns_once_where_experts_have_few_tokens() -> None:
    router = TokenRounding(TopKRouter(8, 4, 1), tile_rows=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router(torch.randn(128, 8))
        router.eval()(torch.randn(20, 8))
        router.train()
    with pytest.warns(UserWarning, match="experts have 16 tokens on average, under 2 tiles of 16; quality"):
        router(torch.randn(64, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router(torch.randn(64, 8))


def test_wraps_a_router_of_ones_own() -> None:
    """One that has neither sizes nor scores of pairs: softmax of its logits then ranks and scores."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TopKRouter(8, 6, 2, pre_softmax=True)

        def forward(self, x: Tensor) -> Routing:
            return self.inner(x)

    own = Own()
    x = torch.randn(100, 8)
    got, want = TokenRounding(own, tile_rows=16)(x), TokenRounding(own.inner, tile_rows=16)(x)
    assert pairs_of(got.plan) == pairs_of(want.plan)
    torch.testing.assert_close(got.scores, want.scores)
    with pytest.raises(AttributeError):
        TokenRounding(own, tile_rows=16).hidden_size  # noqa: B018
    sonic.MoE(8, 4, 6, 2, router=TokenRounding(own, tile_rows=16))(x).sum().backward()


def test_no_tokens() -> None:
    routing = TokenRounding(TopKRouter(8, 6, 2), tile_rows=16)(torch.randn(0, 8))
    assert routing.plan.num_rows == 0


# -------------------------------------------------------------------------------------------------------- bad input

ROUTER = "sonic.routing.TokenRounding"
X = torch.randn(64, 8)


def rounding(**options: object) -> TokenRounding:
    return TokenRounding(TopKRouter(8, 4, 2), **{"tile_rows": 16, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rounding(tile_rows=0), f"{ROUTER}: tile_rows is 0, expected a positive integer"),
        (lambda: rounding(tile_rows=-128), f"{ROUTER}: tile_rows is -128, expected a positive integer"),
        (lambda: rounding(tile_rows=12.5), f"{ROUTER}: tile_rows is 12.5, expected a positive integer"),
        (lambda: rounding(tile_rows="best"), f"{ROUTER}: tile_rows is 'best', expected a positive integer or 'auto'"),
        (lambda: rounding(tile_rows=65)(X), f"{ROUTER}: tile_rows is 65, expected at most T = 64"),
        (lambda: rounding(rule="round"), f"{ROUTER}: rule is 'round', expected one of 'nearest', 'stochastic', "),
        (lambda: TokenRounding(torch.relu), f"{ROUTER}: router is a builtin_function_or_method, expected a torch.nn"),
        (lambda: rounding(generator=3), f"{ROUTER}: generator is a int, expected a torch.Generator or None"),
        (lambda: rounding(group="all"), f"{ROUTER}: group is 'all', expected a process group, 'world' or None"),
        (
            lambda: TokenRounding(TopKRouter(8, 4, 1, scores_on="input")),
            f"{ROUTER}: router.scores_on is 'input', expected 'output'",
        ),
        (lambda: rounding()(X * torch.nan), f"{ROUTER}: logits is NaN or infinite somewhere, expected finite"),
        (lambda: rounding()(X * torch.inf), f"{ROUTER}: logits is NaN or infinite somewhere, expected finite"),
        (lambda: rounding()(-X.abs() * torch.inf), f"{ROUTER}: logits is NaN or infinite somewhere, expected finite"),
        (lambda: rounding()(X[:, :7]), "sonic.routing.TopKRouter: x_TD is (64, 7), expected (T, D) = (T, 8)"),
        (lambda: TopKRouter(8, 4, 5), "sonic.routing.TopKRouter: top_k is 5, expected at most num_experts = 4"),
        (
            lambda: round_counts([1], 4, rule="stochastic"),
            "sonic.routing.round_counts: draws is None, expected one number in [0, 1) per expert",
        ),
        (
            lambda: round_counts([1], 4, rule="nearest_score", dropped_scores=[1.0]),
            "sonic.routing.round_counts: padded_scores is None, expected one number per expert",
        ),
        (
            lambda: round_to_tiles(RoutingPlan.from_topk(torch.tensor([[0]]), 4), torch.randn(1, 5), 1),
            "sonic.routing.round_to_tiles: logits is (1, 5), expected (T, E) = (1, 4)",
        ),
        (
            lambda: round_to_tiles(RoutingPlan.from_topk(torch.tensor([[0]]), 4), torch.randn(1, 4), 1, num_groups=3),
            "sonic.routing.round_to_tiles: num_groups is 3, expected a divisor of num_experts = 4",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        call()  # type: ignore[operator]
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("rule", RULES)
def test_all_scores_zero(rule: str) -> None:
    """Sigmoids that all underflow: still whole tiles, and nothing is NaN."""
    router = TopKRouter(8, 4, 2, score_function="sigmoid", norm_topk_prob=True, bias=True)
    nn.init.constant_(router.bias, -1e4)
    routing = TokenRounding(router, rule=rule, tile_rows=16)(X)
    assert (routing.metrics.tokens_per_expert % 16 == 0).all() and (routing.scores == 0).all()
    routing.scores.sum().backward()
    assert torch.isfinite(router.weight.grad).all()


# ------------------------------------------------------------------------------------------------------- many ranks


def check_counts_of_all_ranks(rank: int) -> None:
    """Runs on every rank: with a group, the sums over ranks are whole tiles, and moves are spread evenly."""
    router = TopKRouter(8, 6, 2)  # the ranks share the seed, so this one too
    torch.manual_seed(100 + rank)
    x = torch.randn(30 + 20 * rank, 8, requires_grad=True)  # the ranks differ in tokens, and in draws of their own
    for rule in RULES:
        for tile in (16, 80):  # 80 is more than the tokens of any one rank
            routing = TokenRounding(router, rule=rule, tile_rows=tile, group="world")(x)
            wanted = router(x).plan
            together = torch.stack([routing.metrics.tokens_per_expert.long(), wanted.tokens_per_expert().long()])
            mine = together[0] - together[1]
            dist.all_reduce(together)
            moves = together[0] - together[1]
            assert (together[0] % tile == 0).all() and (moves.abs() < tile).all(), (rule, tile)
            if rule == "balanced":
                assert 2 * abs(int(moves.sum())) <= tile
            if tile == 16:
                assert ((mine.abs() - moves.abs() / 2).abs() < 1).all(), "each rank moves half, up to one token"
            routing.scores.sum().backward()
    alone = TokenRounding(router, tile_rows=8, group=None)(x)
    assert (alone.metrics.tokens_per_expert % 8 == 0).all()
    with pytest.raises(ValueError, match="tile_rows is 81, expected at most T = 80"):
        TokenRounding(router, tile_rows=81, group="world")(x)
    with pytest.raises(ValueError, match="logits is NaN"):  # on both ranks, though one alone has such logits
        TokenRounding(router, tile_rows=16, group="world")(x * (torch.nan if rank else 1.0))


@pytest.mark.long
def test_two_ranks_round_together(tmp_path: Path) -> None:
    run_ranks(__file__, "check_counts_of_all_ranks", tmp_path)


if __name__ == "__main__":
    be_a_rank(globals(), *sys.argv[1:])
