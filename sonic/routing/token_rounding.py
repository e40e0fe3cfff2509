"""Token rounding: every expert gets whole tiles of tokens, so that a grouped GEMM computes no padding.

A grouped GEMM works in tiles of M rows and pads each expert's rows to whole tiles: (M - 1) / 2 wasted rows per expert
on average. Rounding moves each expert's count to a multiple of M instead. Rounding up *pads* with the expert's best
tokens among those that did not choose it; rounding down *drops* its lowest-scored tokens. So a chosen pair always
outranks a padded one, and an expert's count moves by less than one tile.

Guarantees of the rules, for an expert that f tokens chose, r = f mod M of them beyond whole tiles:

==================  ============================================  ====================  ================================
rule                rounds up                                     one expert moves by   all experts together move by
==================  ============================================  ====================  ================================
``nearest``         if r > M / 2                                  at most M / 2         at most E M / 2; typically M √E
``stochastic``      with probability r / M                        less than M           0 in expectation, as each expert
``nearest_score``   if dropping would lose more score than        less than M           at most E M
                    padding adds
``balanced``        if that keeps the sum of all moves so far     less than M           at most M / 2
                    nearest to 0
``up``              always                                        less than M, up       at most E (M - 1)
``down``            always                                        less than M, down     at most E (M - 1)
==================  ============================================  ====================  ================================

No rule can keep both bounds of ``nearest`` and ``balanced``: of two experts with r = 0.3 M each, one has to move by
0.7 M if the sum is to stay below M / 2. An expert that wants more tokens than there are in whole tiles of T cannot
round up, whatever the rule says; it rounds down, and the bounds on what moves up are for the others.

Source: SonicMoE (Guo et al., arXiv:2512.14080), algorithms 4 to 6; there ``nearest_score`` is drawn at random with the
probability whose half is the threshold here, and limits are not treated.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.kernels import ops
from sonic.routing.losses import Group, check_group, process_group_of
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import probabilities
from sonic.routing.selection import best_tokens, expert_of_row, lowest_rows
from sonic.routing.wrapper import RouterWrapper
from sonic.shapes import argument_error, check_choice, check_positive, check_shape

__all__ = ["ROUNDING_RULES", "RoundedPairs", "TokenRounding", "round_counts", "round_to_tiles"]

ROUNDING_RULES = ("nearest", "stochastic", "nearest_score", "balanced", "up", "down")


@dataclass(frozen=True)
class RoundedPairs:
    """What :func:`round_to_tiles` leaves of a plan, and adds to it.

    Attributes:
        kept_row: (P',) int64, rows of the given plan that stay, ascending.
        padded_token, padded_expert: (P'',) int64, the pairs that were added.
        num_dropped: rows of the given plan that do not stay.
    """

    kept_row: Tensor
    padded_token: Tensor
    padded_expert: Tensor
    num_dropped: int


def round_counts(
    counts: Sequence[int],
    tile_rows: int,
    *,
    rule: str = "nearest",
    limits: Sequence[int] | None = None,
    draws: Sequence[float] | None = None,
    dropped_scores: Sequence[float] | None = None,
    padded_scores: Sequence[float] | None = None,
) -> list[int]:
    """Round each expert's count to a multiple of the tile. Plain integers: who fills the tiles is another question.

    Args:
        counts: tokens that chose each expert.
        tile_rows: M.
        rule: one of :data:`ROUNDING_RULES`; the module's table says what each guarantees.
        limits: the most that each expert can get; an expert whose next multiple is beyond it rounds down.
        draws: for ``"stochastic"``, a number in [0, 1) per expert; rounded up where it is below r / M.
        dropped_scores, padded_scores: for ``"nearest_score"``, the score mass that rounding down would drop and
            rounding up would add, per expert.

    Returns:
        The new counts.

    Raises:
        ValueError: unknown rule, a tile that is no positive integer, or what the rule needs is missing.
    """
    where = "sonic.routing.round_counts"
    check_choice(where, "rule", rule, ROUNDING_RULES)
    check_positive(where, tile_rows=tile_rows)
    if rule == "stochastic" and draws is None:
        raise argument_error(where, "draws", None, "one number in [0, 1) per expert, with rule='stochastic'")
    if rule == "nearest_score" and (dropped_scores is None or padded_scores is None):
        missing = "dropped_scores" if dropped_scores is None else "padded_scores"
        raise argument_error(where, missing, None, "one number per expert, with rule='nearest_score'")
    rounded: list[int] = []
    moved = 0  # the sum of all moves so far
    for expert, count in enumerate(counts):
        rest = count % tile_rows
        down, up = count - rest, count - rest + (tile_rows if rest else 0)
        if rest == 0 or (limits is not None and up > limits[expert]) or rule == "down":
            is_up = False
        elif rule == "up":
            is_up = True
        elif rule == "nearest":
            is_up = 2 * rest > tile_rows
        elif rule == "stochastic":
            assert draws is not None, "checked above"
            is_up = draws[expert] * tile_rows < rest
        elif rule == "nearest_score":
            assert dropped_scores is not None and padded_scores is not None, "checked above"
            is_up = dropped_scores[expert] > padded_scores[expert]
        else:
            is_up = abs(moved + up - count) < abs(moved + down - count)
        rounded.append(up if is_up else down)
        moved += rounded[-1] - count
    return rounded


def round_to_tiles(
    plan: RoutingPlan,
    logits: Tensor,
    tile_rows: int,
    *,
    rule: str = "nearest",
    score_function: str = "softmax",
    num_groups: int = 1,
    generator: torch.Generator | None = None,
    group: Group = None,
) -> RoundedPairs:
    """Decide which rows of a plan stay and which pairs are added so that each expert has whole tiles.

    Within an expert, tokens are ranked by probability: the score function of the logits (softmax over all experts).
    The (T, E) table is never sorted: only the columns that pad are read, a few at a time, and in each only as many
    tokens are selected as are wanted. It synchronises with the host: the counts decide the shapes of what comes out.

    Args:
        plan: who goes where before rounding, from top-K or any other choice.
        logits: (T, E) finite.
        tile_rows: M, at most T (of the whole group).
        rule: one of :data:`ROUNDING_RULES`.
        score_function: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        num_groups: the experts are this many equal runs, and a token pads only runs that the plan sends it to already,
            so that node-limited routing stays within its limit.
        generator: of the draws of ``"stochastic"``; None: torch's default one of the CPU, which activation
            checkpointing knows how to rewind.
        group: None rounds the counts of this rank, which suits data parallelism, and expert parallelism too: sums of
            multiples are multiples. A process group or ``"world"`` rounds the sums over its ranks instead, which moves
            fewer tokens where each rank has few per expert; the moves are then spread evenly over the ranks. All ranks
            of it must call.

    Returns:
        The pairs that stay and those that are added.

    Raises:
        ValueError: arguments that do not fit, or logits that are not finite.
    """
    where = "sonic.routing.round_to_tiles"
    check_choice(where, "rule", rule, ROUNDING_RULES)
    check_positive(where, tile_rows=tile_rows, num_groups=num_groups)
    check_shape(where, "logits", logits, T=plan.num_tokens, E=plan.num_experts)
    check_choice(where, "score_function", score_function, ops.SCORE_FUNCTIONS)
    check_group(where, "group", group)
    if plan.num_experts % num_groups:
        raise argument_error(where, "num_groups", num_groups, f"a divisor of num_experts = {plan.num_experts}")
    return _round(where, plan, logits, tile_rows, rule, score_function, num_groups, generator, group, None)


class TokenRounding(RouterWrapper):
    """A router whose experts get whole tiles of tokens in training; in eval mode it is the router that it wraps.

    Kept pairs keep the scores that the router gave them, so those of a token need no longer add up to what they did.
    Padded pairs score their raw probability (softmax over all experts, or the score function) times the router's
    scaling factor. Gradients flow through both.

    Quality suffers where experts have fewer than two tiles of tokens on average; the first call there warns.
    """

    def __init__(
        self,
        router: nn.Module,
        *,
        rule: str = "nearest",
        tile_rows: int | str = "auto",
        generator: torch.Generator | None = None,
        group: Group = None,
    ) -> None:
        """
        Args:
            router: any module that maps (T, D) tokens to a :class:`sonic.routing.Routing`. Its ``score_function``,
                ``num_groups`` and ``pair_scores``, where it has them, rank and score padded pairs; softmax is taken
                where it has none.
            rule: one of :data:`ROUNDING_RULES`, described at the head of this module.
            tile_rows: M; ``"auto"`` asks for the tile that the kernel will use for so many tokens per expert. A backend
                that pads nothing (plain torch) answers 1, and then nothing is rounded; nor is it where T is below the
                tile.
            generator: see :func:`round_to_tiles`. Given the same generator state, the same tokens are chosen.
            group: see :func:`round_to_tiles`.

        Raises:
            ValueError: no module, an unknown rule, a tile that is no positive integer, or a router that multiplies its
                scores to the experts' input.
        """
        super().__init__(router)
        where = "sonic.routing.TokenRounding"
        check_choice(where, "rule", rule, ROUNDING_RULES)
        if isinstance(tile_rows, str):
            if tile_rows != "auto":
                raise argument_error(where, "tile_rows", repr(tile_rows), "a positive integer or 'auto'")
        else:
            check_positive(where, tile_rows=tile_rows)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise argument_error(where, "generator", f"a {type(generator).__name__}", "a torch.Generator or None")
        check_group(where, "group", group)
        self.rule = rule
        self.tile_rows = tile_rows
        self.generator = generator
        self.group = group
        self._has_warned = False

    def forward(self, x_TD: Tensor, **router_inputs: object) -> Routing:
        """Route T tokens, then round.

        Args:
            x_TD: (T, D).
            router_inputs: handed to the wrapped router.

        Returns:
            Its decision; in training with a plan and scores (P,) from pairs, kept ones first, and ``metrics`` that know
            what was padded and dropped. The auxiliary losses are those of the wrapped router's own choice.

        Raises:
            ValueError: as the wrapped router; more rows in a tile than tokens; logits that are not finite.
        """
        routing: Routing = self.router(x_TD, **router_inputs)
        if not self.training:
            return routing
        plan, where = routing.plan, "sonic.routing.TokenRounding"
        tile_rows = self._tile_rows(x_TD, plan)
        if tile_rows == 1 or (plan.num_tokens == 0 and self.group is None):
            return routing
        logits_TE, options = routing.logits.detach(), (self.score_function, self.num_groups, self.generator, self.group)
        rounded = _round(where, plan, logits_TE, tile_rows, self.rule, *options, self.backend)
        self._warn_of_few_tokens(plan, tile_rows)
        kept_token, kept_expert = plan.token_of_row_R[rounded.kept_row], expert_of_row(plan)[rounded.kept_row]
        token_P = torch.cat((kept_token.long(), rounded.padded_token))
        expert_P = torch.cat((kept_expert, rounded.padded_expert))
        rounded_plan = RoutingPlan.from_pairs(
            token_P, expert_P, plan.num_tokens, plan.num_experts, backend=self.backend
        )
        kept_scores = routing.scores.reshape(-1)[plan.slot_of_row_R[rounded.kept_row].long()]
        padded_scores = self.pair_scores(x_TD, routing.logits, rounded.padded_token, rounded.padded_expert)
        num_padded = rounded.padded_token.shape[0]
        if plan.top_k is None:  # what the wrapped router had dropped may be back: count the pairs that top-K wanted
            num_padded = token_P.shape[0] - int((routing.expert_index[token_P] == expert_P[:, None]).sum())
        num_requested = routing.metrics.num_requested
        metrics = RoutingMetrics(rounded_plan, num_requested, num_padded=num_padded, logits=logits_TE)
        scores_P = torch.cat((kept_scores, padded_scores.to(kept_scores.dtype)))
        return Routing(rounded_plan, scores_P, routing.logits, routing.expert_index, routing.aux_loss, metrics)

    def extra_repr(self) -> str:
        """Rule and tile."""
        return f"rule={self.rule!r}, tile_rows={self.tile_rows!r}"

    def _tile_rows(self, x_TD: Tensor, plan: RoutingPlan) -> int:
        if isinstance(self.tile_rows, int):
            return self.tile_rows
        tile_rows = ops.tile_rows(x_TD, plan.num_rows, plan.num_experts, self.backend)
        return 1 if tile_rows > plan.num_tokens and self.group is None else tile_rows

    def _warn_of_few_tokens(self, plan: RoutingPlan, tile_rows: int) -> None:
        num_ranks = process_group_of("sonic.routing.TokenRounding", "group", self.group)[1]
        mean = plan.num_rows * num_ranks / plan.num_experts
        if self._has_warned or mean >= 2 * tile_rows:
            return
        self._has_warned = True
        warnings.warn(
            f"sonic.routing.TokenRounding: experts have {mean:.0f} tokens on average, under 2 tiles of {tile_rows}; "
            "quality falls there: take more tokens per step, a smaller tile, or fewer experts",
            stacklevel=3,
        )


@torch.no_grad()
def _round(
    where: str,
    plan: RoutingPlan,
    logits_TE: Tensor,
    tile_rows: int,
    rule: str,
    score_function: str,
    num_groups: int,
    generator: torch.Generator | None,
    group: Group,
    backend: str | None,
) -> RoundedPairs:
    """:func:`round_to_tiles`, with arguments that are known to fit."""
    shift_T = torch.logsumexp(logits_TE, dim=-1) if score_function == "softmax" else None
    allowed_TG = _groups_of_tokens(plan, num_groups) if num_groups > 1 else None
    is_finite = torch.isfinite(logits_TE).all()
    moves_of = _Moves(where, plan, is_finite, allowed_TG, tile_rows, rule, generator, group)
    value_R = logits_TE[plan.token_of_row_R.long(), expert_of_row(plan)]
    if shift_T is not None:
        value_R = value_R - shift_T[plan.token_of_row_R.long()]

    # "nearest_score" looks at both directions before it decides; the other rules know theirs from the counts.
    by_score = rule == "nearest_score"
    if_down, if_up = (moves_of("down"), moves_of("up")) if by_score else (moves_of(rule),) * 2
    num_dropped, num_padded = [max(-move, 0) for move in if_down], [max(move, 0) for move in if_up]
    dropped_row = lowest_rows(plan, moves_of.counts, value_R, num_dropped, backend=backend)
    padded_token, padded_expert = best_tokens(
        logits_TE, shift_T, num_padded, plan=plan, allowed_TG=allowed_TG, backend=backend
    )
    if by_score:
        dropped_expert = expert_of_row(plan)[dropped_row]
        value_P = logits_TE[padded_token, padded_expert]
        if shift_T is not None:
            value_P = value_P - shift_T[padded_token]
        lost_E = _mass(value_R[dropped_row], dropped_expert, plan.num_experts, score_function)
        added_E = _mass(value_P, padded_expert, plan.num_experts, score_function)
        moves = moves_of(rule, torch.stack((lost_E, added_E)))
        direction_E = torch.tensor(moves, device=plan.device).sign()
        dropped_row = dropped_row[direction_E[dropped_expert] < 0]
        is_padded_P = direction_E[padded_expert] > 0
        padded_token, padded_expert = padded_token[is_padded_P], padded_expert[is_padded_P]
    is_kept_R = torch.ones(plan.num_rows, dtype=torch.bool, device=plan.device)
    is_kept_R[dropped_row] = False
    return RoundedPairs(is_kept_R.nonzero()[:, 0], padded_token, padded_expert, dropped_row.shape[0])


class _Moves:
    """By how much each expert's count moves on this rank, under a rule. One collective gathers what decides it."""

    def __init__(
        self,
        where: str,
        plan: RoutingPlan,
        is_finite: Tensor,
        allowed_TG: Tensor | None,
        tile_rows: int,
        rule: str,
        generator: torch.Generator | None,
        group: Group,
    ) -> None:
        self._tile_rows = tile_rows
        num_experts = plan.num_experts
        self._group, self._num_ranks = process_group_of(where, "group", group)
        self._rank = dist.get_rank(self._group) if self._num_ranks > 1 else 0
        candidates_E = torch.full((num_experts,), plan.num_tokens, device=plan.device)
        if allowed_TG is not None:
            candidates_E = allowed_TG.sum(0).repeat_interleave(num_experts // allowed_TG.shape[1])
        flags = torch.stack((candidates_E.new_tensor(plan.num_tokens), is_finite.long()))
        mine = torch.cat((plan.tokens_per_expert().long(), candidates_E, flags))
        draws_E = torch.zeros(num_experts, dtype=torch.float64)
        if rule == "stochastic":
            device = "cpu" if generator is None else generator.device
            draws_E = torch.rand(num_experts, dtype=torch.float64, generator=generator, device=device)
        if self._num_ranks > 1:
            # Integers below 2**53 and draws share one message; the draws of the first rank hold for all.
            message = torch.cat((mine.double(), draws_E.to(plan.device)))
            gathered = [torch.empty_like(message) for _ in range(self._num_ranks)]
            dist.all_gather(gathered, message, group=self._group)
            mine_W = torch.stack([other[: mine.shape[0]] for other in gathered]).long()
            draws_E = gathered[0][mine.shape[0] :]
        else:
            mine_W = mine[None]
        of_ranks = mine_W.tolist()
        self._counts_W = [row[:num_experts] for row in of_ranks]
        self._candidates_W = [row[num_experts:-2] for row in of_ranks]
        self._draws = draws_E.tolist()
        if not all(row[-1] for row in of_ranks):  # all ranks learn of it, so that none waits for one that has raised
            raise argument_error(where, "logits", "NaN or infinite somewhere", "finite, for tokens are ranked by them")
        num_tokens = sum(row[-2] for row in of_ranks)
        if tile_rows > num_tokens > 0:
            raise argument_error(where, "tile_rows", tile_rows, f"at most T = {num_tokens}")
        self.counts: list[int] = self._counts_W[self._rank]
        self._totals = [sum(column) for column in zip(*self._counts_W, strict=True)]
        self._limits = [sum(column) // tile_rows * tile_rows for column in zip(*self._candidates_W, strict=True)]

    def __call__(self, rule: str, masses_2E: Tensor | None = None) -> list[int]:
        """Moves per expert, above 0 to pad, below 0 to drop; ``masses`` are the dropped and the padded scores."""
        lost, added = None, None
        if masses_2E is not None:
            if self._num_ranks > 1:
                dist.all_reduce(masses_2E, group=self._group)
            lost, added = masses_2E.tolist()
        targets = round_counts(
            self._totals,
            self._tile_rows,
            rule=rule,
            limits=self._limits,
            draws=self._draws,
            dropped_scores=lost,
            padded_scores=added,
        )
        moves = [target - total for target, total in zip(targets, self._totals, strict=True)]
        if self._num_ranks == 1:
            return moves
        return [self._share(expert, move) for expert, move in enumerate(moves)]

    def _share(self, expert: int, move: int) -> int:
        """This rank's part of a move: as even as each rank's room allows, every expert's odd ones on other ranks."""
        room = [
            (candidates[expert] - counts[expert]) if move > 0 else counts[expert]
            for counts, candidates in zip(self._counts_W, self._candidates_W, strict=True)
        ]
        parts = [0] * self._num_ranks
        left = abs(move)
        while left:
            order = [(expert + step) % self._num_ranks for step in range(self._num_ranks)]
            with_room = [rank for rank in order if parts[rank] < room[rank]]
            share, odd = divmod(left, len(with_room))
            for place, rank in enumerate(with_room):
                part = min(room[rank] - parts[rank], share + (place < odd))
                parts[rank] += part
                left -= part
        return parts[self._rank] if move > 0 else -parts[self._rank]


def _groups_of_tokens(plan: RoutingPlan, num_groups: int) -> Tensor:
    """Which groups of experts the plan sends each token to: (T, G) bool."""
    allowed_TG = torch.zeros(plan.num_tokens, num_groups, dtype=torch.bool, device=plan.device)
    allowed_TG[plan.token_of_row_R.long(), expert_of_row(plan) // (plan.num_experts // num_groups)] = True
    return allowed_TG


def _mass(value_P: Tensor, expert_P: Tensor, num_experts: int, score_function: str) -> Tensor:
    """Sum of the probabilities per expert, (E,); values are logarithms for softmax, logits otherwise."""
    prob_P = value_P.exp() if score_function == "softmax" else probabilities(value_P, score_function)
    return prob_P.new_zeros(num_experts).index_add_(0, expert_P, prob_P)
