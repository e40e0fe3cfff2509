"""Wrong calls of routers: each is refused where it is made, with a message that says what was wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sonic.routing import (
    CapacityDropping,
    ExpertChoiceRouter,
    HashRouter,
    TopKRouter,
    pair_scores,
    preset_router,
    sequence_load,
    topk_scores,
    update_expert_bias,
)

D, E, K = 16, 12, 3
nan = float("nan")


def top(**options: Any) -> Callable[[], object]:
    return lambda: TopKRouter(**{"hidden_size": D, "num_experts": E, "top_k": K, **options})


def hashed(ids: Any, **options: Any) -> Callable[[], object]:
    return lambda: HashRouter(D, E, K, **{"vocab_size": 10, **options})(torch.randn(4, D), token_ids=ids)


def chosen(**options: Any) -> Callable[[], object]:
    return lambda: ExpertChoiceRouter(D, E, K, **options)


def capped(**options: Any) -> Callable[[], object]:
    return lambda: CapacityDropping(TopKRouter(D, E, K), **options)


def routed(x_TD: Tensor, sequence_length: Any = None, dtype: torch.dtype | None = None) -> Callable[[], object]:
    router = TopKRouter(D, E, K, aux_loss_type="sequence", aux_loss_coeff=0.1, dtype=dtype)
    return lambda: router(x_TD, sequence_length=sequence_length)


def paired(token: Any, expert: Any, **options: Any) -> Callable[[], object]:
    return lambda: pair_scores(torch.randn(4, E), torch.tensor(token), torch.tensor(expert), **options)


def scored(**options: Any) -> Callable[[], object]:
    return lambda: topk_scores(torch.randn(4, E), K, **options)


FUNCTIONS = "one of 'softmax', 'sigmoid', 'sqrtsoftplus'"
MEANINGLESS = "left out: experts choose, not tokens"
ROUTER, HASH, CHOICE = "TopKRouter", "HashRouter", "ExpertChoiceRouter"

WRONG: list[tuple[Callable[[], object], str]] = [
    (top(num_groups=5), f"{ROUTER}: num_groups is 5, expected a divisor of num_experts = 12"),
    (top(num_groups=0), f"{ROUTER}: num_groups is 0, expected a positive integer"),
    (top(num_groups=True), f"{ROUTER}: num_groups is True, expected a positive integer"),
    (top(group_topk=2), f"{ROUTER}: group_topk is 2, expected at most num_groups = 1"),
    (top(num_groups=4, group_topk=0), f"{ROUTER}: group_topk is 0, expected a positive integer"),
    (top(num_groups=4, top_k=4), f"{ROUTER}: top_k is 4, expected at most the 3 experts of group_topk = 1 groups"),
    (top(enable_expert_bias="yes"), f"{ROUTER}: enable_expert_bias is 'yes', expected True or False"),
    (top(enable_expert_bias=1), f"{ROUTER}: enable_expert_bias is 1, expected True or False"),
    (top(bias=None), f"{ROUTER}: bias is None, expected True or False"),
    (top(norm_topk_prob=0), f"{ROUTER}: norm_topk_prob is 0, expected True or False"),
    (top(pre_softmax="no"), f"{ROUTER}: pre_softmax is 'no', expected True or False"),
    (top(expert_bias_rate=-1), f"{ROUTER}: expert_bias_rate is -1, expected a finite number >= 0"),
    (top(expert_bias_rate=nan), f"{ROUTER}: expert_bias_rate is nan, expected a finite number >= 0"),
    (top(score_function="tanh"), f"{ROUTER}: score_function is 'tanh', expected {FUNCTIONS}"),
    (
        top(score_function="sqrtsoftplus", pre_softmax=True),
        f"{ROUTER}: pre_softmax is True, expected False with score_function='sqrtsoftplus'",
    ),
    (top(scores_on="x"), f"{ROUTER}: scores_on is 'x', expected one of 'output', 'input'"),
    (
        top(scores_on="input", top_k=2),
        f"{ROUTER}: scores_on is 'input', expected 'output' with top_k = 2, 'input' needs 1",
    ),
    (top(aux_loss_type="seq"), f"{ROUTER}: aux_loss_type is 'seq', expected one of 'switch', 'sequence', 'global'"),
    (top(aux_loss_coeff="0.1"), f"{ROUTER}: aux_loss_coeff is '0.1', expected a finite number >= 0"),
    (top(z_loss_coeff=None), f"{ROUTER}: z_loss_coeff is None, expected a finite number >= 0"),
    (top(z_loss_coeff=True), f"{ROUTER}: z_loss_coeff is True, expected a finite number >= 0"),
    (top(topk_scaling_factor="2"), f"{ROUTER}: topk_scaling_factor is '2', expected a finite number > 0"),
    (top(aux_loss_group="foo"), f"{ROUTER}: aux_loss_group is 'foo', expected a process group, 'world' or None"),
    (top(backend="foo"), f"{ROUTER}: backend is 'foo', expected one of"),
    (routed(torch.randn(4, D)), f"{ROUTER}: sequence_length is None, expected a positive integer, with aux_loss_type="),
    (routed(torch.randn(4, D), 3), f"{ROUTER}: sequence_length is 3, expected a divisor of T = 4"),
    (routed(torch.randn(4, D), 0), f"{ROUTER}: sequence_length is 0, expected a positive integer"),
    (routed(torch.randn(4, D), 2.0), f"{ROUTER}: sequence_length is 2.0, expected a positive integer"),
    (
        routed(torch.randn(4, D), 2, torch.bfloat16),
        "router_logits: x is float32, expected bfloat16 like weight",
    ),
    (top(enable_expert_bias=True, num_experts=2), f"{ROUTER}: top_k is 3, expected at most num_experts = 2"),
    (
        lambda: TopKRouter(D, E, K).update_expert_bias(),
        "update_expert_bias: router is without expert_bias, expected one made with enable_expert_bias=True",
    ),
    (
        lambda: update_expert_bias(torch.nn.Sequential(TopKRouter(D, E, K))),
        "update_expert_bias: model is a Sequential without a router that has an expert bias, expected at least one",
    ),
    (
        lambda: TopKRouter(D, E, K, enable_expert_bias=True).update_expert_bias("all"),
        "update_expert_bias: group is 'all', expected a process group, 'world' or None",
    ),
    (lambda: preset_router("deepseek"), "preset_router: name is 'deepseek', expected one of 'deepseek_v3', 'qwen3'"),
    (hashed(None), f"{HASH}: token_ids is None, expected the ids of the tokens: layer(x, token_ids=ids)"),
    (hashed([1, 2, 3, 4]), f"{HASH}: token_ids is a list, expected an integer tensor"),
    (hashed(torch.ones(4)), f"{HASH}: token_ids is float32, expected int64 or int32"),
    (hashed(torch.arange(3)), f"{HASH}: token_ids is (3,), expected T = 4 integers"),
    (hashed(torch.arange(4) - 1), f"{HASH}: token_ids is out of range (-1), expected 0 <= token_ids < vocab_size = 10"),
    (hashed(torch.arange(4) + 7), f"{HASH}: token_ids is out of range (10), expected 0 <= token_ids < vocab_size = 10"),
    (hashed(None, vocab_size=0), f"{HASH}: vocab_size is 0, expected a positive integer"),
    (hashed(None, num_groups=2), f"{HASH}: num_groups is 2, expected left out: the table chooses"),
    (hashed(None, enable_expert_bias=True), f"{HASH}: enable_expert_bias is True, expected left out: the table"),
    (chosen(capacity_factor=0), f"{CHOICE}: capacity_factor is 0, expected a finite number > 0"),
    (chosen(capacity_factor=nan), f"{CHOICE}: capacity_factor is nan, expected a finite number > 0"),
    (chosen(eval_mode="off"), f"{CHOICE}: eval_mode is 'off', expected one of 'topk', 'expert_choice'"),
    (chosen(pre_softmax=True), f"{CHOICE}: pre_softmax is True, expected {MEANINGLESS}"),
    (chosen(scores_on="input"), f"{CHOICE}: scores_on is 'input', expected {MEANINGLESS}"),
    (
        lambda: ExpertChoiceRouter(D, E, K)(torch.full((2, D), nan)),
        f"{CHOICE}: logits is NaN or infinite somewhere, expected finite, for tokens are ranked by them",
    ),
    (capped(capacity_factor=0), "CapacityDropping: capacity_factor is 0, expected a finite number > 0"),
    (capped(capacity_factor=nan), "CapacityDropping: capacity_factor is nan, expected a finite number > 0"),
    (capped(policy="random"), "CapacityDropping: policy is 'random', expected one of 'score', 'position'"),
    (lambda: CapacityDropping(torch.topk), "CapacityDropping: router is a "),
    (
        lambda: CapacityDropping(preset_router("llama4", device="meta")),
        "CapacityDropping: router.scores_on is 'input', expected 'output': the number of experts per token varies",
    ),
    (scored(score_function="tanh"), f"topk_scores: score_function is 'tanh', expected {FUNCTIONS}"),
    (
        scored(score_function="sigmoid", pre_softmax=True),
        "topk_scores: pre_softmax is True, expected False with score_function='sigmoid'",
    ),
    (scored(expert_bias=torch.zeros(E + 1)), "topk_scores: expert_bias is (13,), expected (E,) = (12,)"),
    (scored(expert_bias=0.1), "topk_scores: expert_bias is a float, expected a tensor of shape (E)"),
    (scored(num_groups=7), "topk_scores: num_groups is 7, expected a divisor of num_experts = 12"),
    (scored(source=torch.randn(4, D)), "topk_scores: source is a Tensor, expected a tuple (x, weight) or"),
    (scored(source=(torch.randn(4, D),)), "topk_scores: source is a tuple of 1, expected a tuple (x, weight) or"),
    (paired([0, 4], [0, 0]), "pair_scores: token_index is out of range (4), expected 0 <= token_index < T = 4"),
    (paired([0, -1], [0, 0]), "pair_scores: token_index is out of range (-1), expected 0 <= token_index < T = 4"),
    (paired([0, 1], [0, 12]), "pair_scores: expert_index is out of range (12), expected 0 <= expert_index < E = 12"),
    (paired([0, 1], [0]), "pair_scores: expert_index is (1,), expected (P,) = (2,)"),
    (paired([0.0], [0]), "pair_scores: token_index is float32, expected int64 or int32"),
    (paired([0], [0], score_function="relu"), f"pair_scores: score_function is 'relu', expected {FUNCTIONS}"),
    (
        lambda: sequence_load(torch.zeros(6, 1, dtype=torch.int64), 4, E),
        "sequence_load: num_sequences is 4, expected a divisor of T = 6",
    ),
    (
        lambda: sequence_load(torch.full((6, 1), E), 2, E),
        "sequence_load: expert_index is out of range (12), expected 0 <= expert_index < num_experts = 12",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_calls_are_refused_in_one_form(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"sonic.routing.{message}")):
        call()
