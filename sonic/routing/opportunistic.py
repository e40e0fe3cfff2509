"""Batch-aware rerouting at decode time: a batch loads fewer distinct experts, and loses little of its score.

In decode a layer has few tokens, so its time is that of reading the weights of every expert that some token chose: what
counts is the number of distinct experts. So the batch agrees on the experts that it loads: each token asks only for its
best few, its *base choices*, or the batch drops the experts that its tokens miss least. Then each token takes up to K
of the loaded experts, in the order of its own preference: what another token loaded anyway costs next to nothing more.

What a token gets so depends on the tokens that are routed in the same call.

Source: Oncescu et al., Opportunistic Expert Activation (arXiv:2511.02237), for base choices, filling up, and the limits
on both; the budget of a batch and the promise about its score are added here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sonic.kernels.ops import SCORE_FUNCTIONS
from sonic.routing.hash import HashRouter
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import pair_scores, probabilities
from sonic.routing.selection import expert_of_row
from sonic.routing.topk import TopKRouter
from sonic.routing.wrapper import RouterWrapper
from sonic.shapes import (
    argument_error,
    check_choice,
    check_dtype,
    check_integer,
    check_positive,
    check_same,
    check_shape,
)

__all__ = ["DEFAULT_QUALITY", "ActivationReport", "OpportunisticRouting", "Rerouted", "activation_report", "reroute"]

DEFAULT_QUALITY = 0.97
"""The knob of :class:`OpportunisticRouting` where nothing is asked for: at most 3% of the score is lost."""

_WHERE = "sonic.routing.OpportunisticRouting"
_TABLE = 2**22  # values of the largest table that the search for `quality` makes, unless (T, E) alone is larger
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Rerouted(NamedTuple):
    """Up to K experts per token.

    Attributes:
        expert_TK: int32, the token's preferred expert first; -1 after the last one.
        is_chosen_TK: bool; False where ``expert_TK`` is -1.
    """

    expert_TK: Tensor
    is_chosen_TK: Tensor


@dataclasses.dataclass(frozen=True)
class ActivationReport:
    """What rerouting saves and what it costs; 0-dim tensors, so that looking at them is what synchronises.

    Attributes:
        experts_before: distinct experts of the router's own choice, int64.
        experts_after: distinct experts after rerouting, int64.
        score_kept: probabilities of the chosen experts, summed over all tokens, over the same sum before; 1 for a batch
            without tokens. The probabilities are the score function of the logits, softmax over all experts.
    """

    experts_before: Tensor
    experts_after: Tensor
    score_kept: Tensor

    def __str__(self) -> str:
        """One line; synchronises."""
        return (
            f"{int(self.experts_before)} -> {int(self.experts_after)} distinct experts, "
            f"{float(self.score_kept):.1%} of the score kept"
        )


@torch.no_grad()
def reroute(
    logits: Tensor,
    top_k: int,
    *,
    quality: float | None = None,
    min_experts: int | None = None,
    top_p: float | None = None,
    max_rank: int | None = None,
    max_batch_experts: int | None = None,
    mass: Tensor | None = None,
    expert_index: Tensor | None = None,
) -> Rerouted:
    """Choose up to K experts per token from the experts that the batch loads.

    1. *Base choices*: the best ``min_experts`` of each token, or as many more as it takes (up to K) until they hold the
       share ``top_p`` of the mass of the token's K best.
    2. The batch loads the experts that are someone's base choice. With ``quality`` it also loads others of plain top-K,
       those with most mass first, until that share of the mass of top-K is kept: the fewest that do. With
       ``max_batch_experts`` it loads only that many: those with the most mass, base choices first.
    3. Each token takes loaded experts in the order of its preference, up to K, and none beyond its ``max_rank``-th
       preference, except that it always takes its best loaded one.

    The loaded experts are always among those of plain top-K. Without a budget all base choices stay, so each token
    keeps at least the share ``top_p`` of its mass, and the batch the share ``quality``. Where preference follows mass,
    more of a knob that is used alone loads the same experts or more, and keeps no less mass. Deterministic, without
    loops over tokens and without synchronisation; ``quality`` searches for its number of experts, a few passes over
    (T, E) per try and some ``2 sqrt(E)`` tries.

    Args:
        logits: (T, E), by whose order each token prefers experts: logits, or any other floating preferences. An expert
            at -inf is never chosen, so a token all of whose loaded experts are at -inf gets none. One with NaN or +inf
            is served like the others, and its mass counts for nothing.
        top_k: K.
        quality: within (0, 1]; 1 loads all that top-K does.
        min_experts: base choices per token, 1 to K; None: 1 with ``quality`` or ``top_p``, else K.
        top_p: within (0, 1]; 1 is all K.
        max_rank: at least K; None: no limit.
        max_batch_experts: distinct experts of the whole batch, at least 1; None: no limit.
        mass: (T, E) floating: what shares and "most mass" are measured in, where negative and non-finite values count
            as 0; None: softmax of the logits over the experts.
        expert_index: (T, K) integers, the K best experts of each token, best first, so that ties are broken as a router
            broke them; None: ``torch.topk`` of the logits.

    Returns:
        The experts of each token and which of the K places are filled.

    Raises:
        ValueError: sizes, shapes, dtypes or devices do not fit.
    """
    where = "sonic.routing.reroute"
    check_shape(where, "logits", logits, T=None, E=None)
    check_dtype(where, "logits", logits, _FLOATS)
    num_tokens, num_experts = logits.shape
    check_positive(where, top_k=top_k)
    if top_k > num_experts:
        raise argument_error(where, "top_k", top_k, f"at most E = {num_experts}")
    _check_knobs(where, top_k, quality, min_experts, top_p, max_rank, max_batch_experts)
    if mass is None:
        mass_TE = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    else:
        check_shape(where, "mass", mass, T=num_tokens, E=num_experts)
        check_dtype(where, "mass", mass, _FLOATS)
        check_same(where, ("logits", logits), (("mass", mass),), dtype=False)
        mass_TE = mass.to(torch.promote_types(mass.dtype, torch.float32))
    mass_TE = torch.where((mass_TE > 0) & (mass_TE < math.inf), mass_TE, 0.0)
    if expert_index is not None:
        check_integer(where, "expert_index", expert_index)
        check_shape(where, "expert_index", expert_index, T=num_tokens, K=top_k)
        check_same(where, ("logits", logits), (("expert_index", expert_index),), dtype=False)

    # From here on the experts of each token stand in the order of its preference: column = rank. Ranks are per token,
    # so tables by rank and tables by expert are two views of the same pairs; `_by_expert` leads from one to the other.
    expert_by_rank_TE = _preference_order(logits, top_k, expert_index)
    can_be_chosen_TE = logits.gather(1, expert_by_rank_TE) != -math.inf
    rank_E = torch.arange(num_experts, device=logits.device)
    mass_by_rank_TE = mass_TE.gather(1, expert_by_rank_TE)
    if min_experts is None:
        min_experts = 1 if top_p is not None or (quality is not None and quality < 1) else top_k
    base_count_T1 = _base_counts(mass_by_rank_TE[:, :top_k], min_experts, top_p)
    is_base_E = _by_expert(can_be_chosen_TE & (rank_E < base_count_T1), expert_by_rank_TE).any(0)

    def choose(is_loaded_E: Tensor) -> Tensor:
        """Step 3, (..., E) by expert -> (..., T, E) by rank."""
        is_loaded_TE = is_loaded_E[..., expert_by_rank_TE] & can_be_chosen_TE
        place_TE = is_loaded_TE.cumsum(-1, dtype=torch.int32)  # 1 for the token's best loaded expert, 2 for the next
        is_chosen_TE = is_loaded_TE & (place_TE <= top_k)
        return is_chosen_TE if max_rank is None else is_chosen_TE & ((rank_E < max_rank) | (place_TE == 1))

    is_loaded_E = is_base_E
    if quality is not None or max_batch_experts is not None:
        may_load_TE = can_be_chosen_TE & (rank_E < (base_count_T1 if quality is None else top_k))
        wanted_TE = _by_expert(mass_by_rank_TE.where(may_load_TE, 0.0), expert_by_rank_TE)
        is_wanted_E = _by_expert(may_load_TE, expert_by_rank_TE).any(0)
        place_E = _places(wanted_TE.sum(0).masked_fill(~is_wanted_E, -1.0), is_base_E)
        if quality is not None:
            least = quality * mass_by_rank_TE[:, :top_k].sum()

            def keeps_enough(count_G: Tensor) -> Tensor:
                is_chosen_GTE = choose(is_base_E | (is_wanted_E & (place_E < count_G[:, None])))
                return mass_by_rank_TE.where(is_chosen_GTE, 0.0).sum((1, 2)) >= least

            count = num_experts if quality == 1 else _smallest(keeps_enough, num_tokens, num_experts, logits.device)
            is_loaded_E = is_base_E | (is_wanted_E & (place_E < count))
        if max_batch_experts is not None:
            is_loaded_E = is_loaded_E & (place_E < max_batch_experts)

    # The chosen ranks, ascending, in the first columns: keys of chosen experts are positive and differ from each other.
    key_TK, rank_TK = torch.where(choose(is_loaded_E), num_experts - rank_E, 0).topk(top_k, dim=1)
    is_chosen_TK = key_TK > 0
    expert_TK = expert_by_rank_TE.gather(1, rank_TK).masked_fill(~is_chosen_TK, -1)
    return Rerouted(expert_TK.to(torch.int32), is_chosen_TK)


class OpportunisticRouting(RouterWrapper):
    """Wrap a router so that a batch loads fewer distinct experts in decode; inference only.

    In eval mode the router's choice is rerouted by :func:`reroute` among the tokens of one call, and the scores are
    computed for the experts that were chosen, by the router's own rule: normalised over them where the router
    normalises, raw probabilities where it does not, its scaling factor kept. In training mode it is the wrapped router,
    untouched.

    The knob is ``quality``: the batch loads the fewest experts, those with most score first, with which it keeps this
    share of the score that its tokens' top-K holds; each token's best expert is always among them. 1 is the router
    itself, bit for bit; less is fewer experts.

    Parameters are those of the wrapped router, under ``router.``.

    Source: Oncescu et al., Opportunistic Expert Activation (arXiv:2511.02237).
    """

    router: TopKRouter
    _may_score_input = True

    def __init__(
        self,
        router: nn.Module,
        *,
        quality: float | None = None,
        min_experts: int | None = None,
        top_p: float | None = None,
        max_rank: int | None = None,
        max_batch_experts: int | None = None,
    ) -> None:
        """
        Args:
            router: a :class:`sonic.routing.TopKRouter`, but no :class:`sonic.routing.HashRouter`, whose table chooses.
            quality: within (0, 1], see :func:`reroute`; :data:`DEFAULT_QUALITY` where none of ``quality``, ``top_p``,
                ``min_experts`` and ``max_batch_experts`` is given.
            min_experts: best experts that each token loads in any case, 1 to K; alone, the simple variant of the paper.
            top_p: share of the mass of its top-K that each token loads in any case, within (0, 1].
            max_rank: a token fills up only with its first ``max_rank`` preferences; at least K.
            max_batch_experts: most distinct experts per call, whatever the other knobs promise. Alone, it cuts plain
                top-K. Not with a router that chooses within groups, whose tokens might be left without an expert.

        Raises:
            ValueError: the router is no such one, or a value makes no sense.
        """
        where = _WHERE
        if not isinstance(router, TopKRouter) or isinstance(router, HashRouter):
            wanted = "a sonic.routing.TopKRouter whose tokens choose by their logits"
            raise argument_error(where, "router", f"a {type(router).__name__}", wanted)
        _check_knobs(where, router.top_k, quality, min_experts, top_p, max_rank, max_batch_experts)
        if max_batch_experts is not None and router.num_groups > 1:
            wanted = f"None with a router of num_groups={router.num_groups}"
            raise argument_error(where, "max_batch_experts", max_batch_experts, wanted)
        if quality is None and top_p is None and min_experts is None and max_batch_experts is None:
            quality = DEFAULT_QUALITY
        super().__init__(router)
        self.quality = quality
        self.min_experts = min_experts
        self.top_p = top_p
        self.max_rank = max_rank
        self.max_batch_experts = max_batch_experts

    def reset_parameters(self) -> None:
        """Draw the wrapped router's parameters anew."""
        self.router.reset_parameters()

    def forward(self, x_TD: Tensor, *, sequence_length: int | None = None) -> Routing:
        """Route T tokens that are decoded together.

        Args:
            x_TD: (T, D), as for the wrapped router; T may be 0.
            sequence_length: for the wrapped router's loss.

        Returns:
            In training mode, and where the knobs let every token load its whole top-K, the wrapped router's decision.
            Else one with other experts: ``expert_index`` (T, K) holds them, best first, and -1 where a token has fewer
            than K. If some has, ``plan`` is one from pairs, token by token, and ``scores`` is (P,); if none has,
            ``plan`` is one from top-K and ``scores`` is (T, K). Telling the two apart is the one synchronisation on a
            GPU. ``metrics.dropped`` counts the places left empty, T K - P.

        Raises:
            ValueError: as the wrapped router.
        """
        before: Routing = self.router(x_TD, sequence_length=sequence_length)
        return before if self.training or self._takes_all else self._reroute(before)

    def report(self, x_TD: Tensor) -> ActivationReport:
        """What rerouting would do to these tokens in eval mode, whatever the mode.

        Args:
            x_TD: (T, D), as for :meth:`forward`.

        Raises:
            ValueError: as the wrapped router.
        """
        one_sequence = x_TD.shape[0] if self.wants_sequence_length else None
        was_training = self.router.training
        self.router.eval()
        try:
            with torch.no_grad():
                before: Routing = self.router(x_TD, sequence_length=one_sequence)
        finally:
            self.router.train(was_training)
        after = before if self._takes_all else self._reroute(before)
        return activation_report(before, after, score_function=self.router.score_function)

    @property
    def _takes_all(self) -> bool:
        """Whether every token loads its whole top-K, whatever the logits."""
        knobs = (self.quality, self.min_experts, self.top_p)
        loads_all = self.quality == 1 or self.min_experts == self.top_k or self.top_p == 1 or knobs == (None,) * 3
        return loads_all and (self.max_batch_experts is None or self.max_batch_experts >= self.num_experts)

    def _reroute(self, before: Routing) -> Routing:
        if before.plan.top_k != self.top_k:
            was = f"a {type(self.router).__name__} whose plan is from pairs in eval mode"
            raise argument_error(_WHERE, "router", was, f"one that chooses top_k = {self.top_k} experts per token")
        expert_TK, is_chosen_TK = reroute(
            self._preferences(before),
            self.top_k,
            quality=self.quality,
            min_experts=self.min_experts,
            top_p=self.top_p,
            max_rank=self.max_rank,
            max_batch_experts=self.max_batch_experts,
            mass=probabilities(before.logits.detach(), self.router.score_function),
            expert_index=before.expert_index,
        )
        scores_TK = self._scores(before, expert_TK, is_chosen_TK)
        token_P, place_P = is_chosen_TK.nonzero(as_tuple=True)
        num_requested = expert_TK.numel()
        if token_P.shape[0] == num_requested:
            plan = RoutingPlan.from_topk(expert_TK, self.num_experts, backend=self.router.backend)
            scores = scores_TK
        else:
            expert_P = expert_TK[token_P, place_P]
            num_tokens = expert_TK.shape[0]
            plan = RoutingPlan.from_pairs(token_P, expert_P, num_tokens, self.num_experts, backend=self.router.backend)
            scores = scores_TK[token_P, place_P]
        metrics = RoutingMetrics(plan, num_requested, logits=before.logits)
        return dataclasses.replace(before, plan=plan, scores=scores, expert_index=expert_TK, metrics=metrics)

    def _preferences(self, before: Routing) -> Tensor:
        """What the router chooses by, (T, E): the logits, or its probabilities and bias; -inf outside the groups that
        the token's top-K lies in, which filling up does not leave.
        """
        preference_TE = before.logits.detach()
        expert_bias = self.router.expert_bias
        if expert_bias is not None:
            probability_TE = probabilities(preference_TE, self.router.score_function)
            preference_TE = (probability_TE + expert_bias).masked_fill(preference_TE == -math.inf, -math.inf)
        num_groups = self.router.num_groups
        if num_groups > 1:
            group_size = self.num_experts // num_groups
            is_reached_TG = torch.zeros(
                (preference_TE.shape[0], num_groups), dtype=torch.bool, device=preference_TE.device
            ).scatter_(1, before.expert_index.long() // group_size, True)
            is_reached_TE = is_reached_TG.repeat_interleave(group_size, dim=1, output_size=self.num_experts)
            preference_TE = preference_TE.masked_fill(~is_reached_TE, -math.inf)
        return preference_TE

    def _scores(self, before: Routing, expert_TK: Tensor, is_chosen_TK: Tensor) -> Tensor:
        """The router's own rule, over the chosen experts; of no meaning where none is."""
        router, logits_TE, some_expert_TK = self.router, before.logits, expert_TK.clamp(min=0)
        if router.score_function == "softmax" and (router.norm_topk_prob or not router.pre_softmax):
            chosen_TK = logits_TE.gather(1, some_expert_TK.long()).masked_fill(~is_chosen_TK, -math.inf)
            scores_TK = torch.softmax(chosen_TK, dim=-1)
        else:
            num_tokens, top_k = expert_TK.shape
            token_P = torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(top_k)
            prob_P = pair_scores(logits_TE, token_P, some_expert_TK.reshape(-1), score_function=router.score_function)
            scores_TK = prob_P.reshape(num_tokens, top_k).masked_fill(~is_chosen_TK, 0.0)
            if router.norm_topk_prob:
                scores_TK = scores_TK / (scores_TK.sum(-1, keepdim=True) + 1e-20)
        # A token whose scores were NaN is not made well by taking other experts.
        is_broken_T1 = before.scores.detach().isnan().any(1, keepdim=True)
        return (scores_TK * router.topk_scaling_factor).masked_fill(is_broken_T1, math.nan)

    def extra_repr(self) -> str:
        """The knobs that are set."""
        names = ("quality", "min_experts", "top_p", "max_rank", "max_batch_experts")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)


@torch.no_grad()
def activation_report(before: Routing, after: Routing, *, score_function: str = "softmax") -> ActivationReport:
    """Compare two decisions of one router about the same tokens.

    Args:
        before: the router's own choice; its logits are what both are measured with.
        after: the rerouted choice.
        score_function: of the router.

    Raises:
        ValueError: the two are not about as many tokens and experts, or the score function does not exist.
    """
    where = "sonic.routing.activation_report"
    sizes = [(routing.plan.num_tokens, routing.plan.num_experts) for routing in (before, after)]
    if sizes[0] != sizes[1]:
        raise argument_error(where, "after", f"about (T, E) = {sizes[1]}", f"{sizes[0]} like before")
    check_choice(where, "score_function", score_function, SCORE_FUNCTIONS)
    mass_TE = probabilities(before.logits, score_function)
    whole, kept = (_mass_of(mass_TE, routing.plan) for routing in (before, after))
    num_before, num_after = ((routing.plan.tokens_per_expert() > 0).sum() for routing in (before, after))
    return ActivationReport(num_before, num_after, torch.where(whole == 0, 1.0, kept / whole))


def _mass_of(mass_TE: Tensor, plan: RoutingPlan) -> Tensor:
    return mass_TE[plan.token_of_row_R.long(), expert_of_row(plan)].sum()


def _preference_order(logits_TE: Tensor, top_k: int, expert_index: Tensor | None) -> Tensor:
    """The experts of each token, best first: its top-K as chosen, then the others; ties by the smaller index."""
    best_TK = (logits_TE.topk(top_k, dim=1).indices if expert_index is None else expert_index).long()
    order_TE = logits_TE.argsort(dim=1, descending=True, stable=True)
    is_best_TE = torch.zeros(logits_TE.shape, dtype=torch.bool, device=logits_TE.device).scatter_(1, best_TK, True)
    others_last = is_best_TE.gather(1, order_TE).logical_not_().to(torch.uint8).argsort(dim=1, stable=True)
    return torch.cat((best_TK, order_TE.gather(1, others_last)[:, top_k:]), dim=1)


def _base_counts(mass_TK: Tensor, min_experts: int, top_p: float | None) -> Tensor:
    """How many base choices each token has: (T, 1) int64, 1 to K."""
    num_tokens, top_k = mass_TK.shape
    if top_p is None or top_p == 1 or min_experts == top_k:
        return torch.full((num_tokens, 1), min_experts if top_p != 1 else top_k, device=mass_TK.device)
    reached_TK = mass_TK.cumsum(1)
    is_short_TK = reached_TK[:, :-1] < top_p * reached_TK[:, -1:]
    return (1 + is_short_TK.sum(1, keepdim=True)).clamp(min=min_experts)


def _places(mass_E: Tensor, is_base_E: Tensor) -> Tensor:
    """In which place each expert is loaded, from 0: base choices before others, the most mass first."""
    best_E = mass_E.argsort(descending=True, stable=True)
    best_E = best_E[is_base_E[best_E].logical_not().to(torch.uint8).argsort(stable=True)]
    return torch.empty_like(best_E).scatter_(0, best_E, torch.arange(len(best_E), device=best_E.device))


def _smallest(is_enough: Callable[[Tensor], Tensor], num_tokens: int, most: int, device: torch.device) -> Tensor:
    """The smallest count, 1 to ``most``, that is enough (0-dim int64); ``most`` always is, and more never is less.

    Looks at several counts at a time, as many as fit in a table of some millions of values.
    """
    num_tried = max(1, min(math.isqrt(most), _TABLE // max(1, num_tokens * most)))
    below, width = torch.zeros((), dtype=torch.int64, device=device), most  # enough: below + width
    while width > 1:
        width = -(-width // (num_tried + 1))
        tried_G = below + width * torch.arange(1, num_tried + 1, device=device)
        below = below + width * (is_enough(tried_G).cumsum(0) == 0).sum()
    return below + 1


def _by_expert(by_rank_TE: Tensor, expert_by_rank_TE: Tensor) -> Tensor:
    return torch.zeros_like(by_rank_TE).scatter_(1, expert_by_rank_TE, by_rank_TE)


def _check_share(where: str, name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value <= 1):
        raise argument_error(where, name, repr(value), "a number within (0, 1]")


def _check_knobs(
    where: str,
    top_k: int,
    quality: float | None,
    min_experts: int | None,
    top_p: float | None,
    max_rank: int | None,
    max_batch_experts: int | None,
) -> None:
    _check_share(where, "quality", quality)
    _check_share(where, "top_p", top_p)
    given = {"min_experts": min_experts, "max_rank": max_rank, "max_batch_experts": max_batch_experts}
    check_positive(where, **{name: value for name, value in given.items() if value is not None})
    if min_experts is not None and min_experts > top_k:
        raise argument_error(where, "min_experts", min_experts, f"at most top_k = {top_k}")
    if max_rank is not None and max_rank < top_k:
        raise argument_error(where, "max_rank", max_rank, f"at least top_k = {top_k}")
