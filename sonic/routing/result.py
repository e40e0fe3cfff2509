"""What a router returns, and the figures that tell how well it balances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sonic.routing.plan import RoutingPlan

__all__ = ["Routing", "RoutingMetrics"]


class RoutingMetrics(Mapping[str, Tensor]):
    """Load figures of one routing decision, each computed when it is asked for.

    All but :attr:`entropy` come from the plan's offsets (E + 1 integers), so they are cheap enough to look at in every
    step. Reads as attributes or as a mapping; values are tensors on the plan's device, so that looking at them later is
    what synchronises.
    """

    _NAMES = (
        "tokens_per_expert",
        "max_over_mean_load",
        "load_violation",
        "dead_experts",
        "load_entropy",
        "dropped",
        "padded",
        "moved",
    )

    def __init__(
        self,
        plan: RoutingPlan,
        num_requested: int | None = None,
        *,
        num_padded: int = 0,
        logits: Tensor | None = None,
    ) -> None:
        """Figures of ``plan``.

        Args:
            plan: who goes where.
            num_requested: (token, expert) pairs that top-K wanted; those of the plan if it is left out.
            num_padded: pairs of the plan that nobody wanted, added to fill tiles.
            logits: (T, E), for :attr:`entropy` alone.
        """
        self.plan = plan
        self.num_requested = plan.num_rows - num_padded if num_requested is None else num_requested
        self.num_padded = num_padded
        self._logits = None if logits is None else logits.detach()

    # Figures are compared one by one; a mapping's own == would ask a tensor for its truth.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def tokens_per_expert(self) -> Tensor:
        """Rows of each expert: (E,) int32."""
        return self.plan.tokens_per_expert()

    @property
    def max_over_mean_load(self) -> Tensor:
        """Rows of the fullest expert over the mean: 0-dim float32; 1 is perfect balance, E is one expert taking all.

        1 without rows.
        """
        count_E = self.tokens_per_expert
        mean = max(self.plan.num_rows, 1) / self.plan.num_experts
        return count_E.max() / mean if self.plan.num_rows else torch.ones((), device=count_E.device)

    @property
    def load_violation(self) -> Tensor:
        """:attr:`max_over_mean_load` minus 1, which the literature calls MaxVio: 0-dim float32, 0 is perfect balance.

        Source: Wang et al. (arXiv:2408.15664).
        """
        return self.max_over_mean_load - 1

    @property
    def dead_experts(self) -> Tensor:
        """Experts without a row: 0-dim int64."""
        return (self.tokens_per_expert == 0).sum()

    @property
    def load_entropy(self) -> Tensor:
        """Entropy of the experts' shares of the rows, over log E: 0-dim float32; 1 is perfect balance (and E = 1)."""
        share_E = self.tokens_per_expert / max(self.plan.num_rows, 1)
        if self.plan.num_experts == 1 or self.plan.num_rows == 0:
            return torch.ones((), device=share_E.device)
        return torch.special.entr(share_E).sum() / math.log(self.plan.num_experts)

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy of ``softmax(logits)`` in nats: 0-dim, dtype of the logits; 0 without any.

        The one figure that costs a pass over (T, E), at the time it is asked for; so it is not in the mapping.

        Raises:
            AttributeError: the router gave no logits.
        """
        if self._logits is None:
            raise AttributeError("sonic.routing.RoutingMetrics: entropy needs the logits, and the router gave none")
        if self._logits.shape[0] == 0:
            return self._logits.new_zeros(())
        return torch.special.entr(torch.softmax(self._logits, dim=-1)).sum(-1).mean()

    @property
    def dropped(self) -> Tensor:
        """Pairs that top-K wanted and the plan does not hold: 0-dim int64."""
        return torch.tensor(self._num_dropped, device=self.plan.device)

    @property
    def padded(self) -> Tensor:
        """Pairs of the plan that top-K did not want: 0-dim int64."""
        return torch.tensor(self.num_padded, device=self.plan.device)

    @property
    def moved(self) -> Tensor:
        """Drift from top-K: pairs dropped and padded over the pairs that top-K wanted: 0-dim float32."""
        moved = (self._num_dropped + self.num_padded) / max(self.num_requested, 1)
        return torch.tensor(moved, dtype=torch.float32, device=self.plan.device)

    def padding_waste(self, tile_rows: int) -> Tensor:
        """Share of a grouped GEMM's rows that are padding when each expert is rounded up to whole tiles.

        Args:
            tile_rows: M.

        Returns:
            0-dim float32 in [0, 1).

        Raises:
            ValueError: ``tile_rows`` is no positive integer.
        """
        padded = self.plan.rows_with_padding(tile_rows)
        if self.plan.num_rows == 0:
            return torch.zeros((), device=padded.device)
        return 1 - self.plan.num_rows / padded.clamp(min=1)

    @property
    def _num_dropped(self) -> int:
        return self.num_requested - (self.plan.num_rows - self.num_padded)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._NAMES:
            raise KeyError(name)
        value: Tensor = getattr(self, name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._NAMES)

    def __len__(self) -> int:
        return len(self._NAMES)


@dataclass
class Routing:
    """The decision of a router for T tokens.

    Attributes:
        plan: who goes where.
        scores: weights of the chosen experts, of the shape that the plan was built from, (T, K) or (P,): float32, or
            float64 for float64 tokens.
        logits: (T, E), dtype of the scores.
        expert_index: (T, K) int32, what top-K chose, best first. Where pairs were added or dropped after that, the
            plan tells who goes where, not this.
        aux_loss: 0-dim; the sum of the router's losses, each times its coefficient; zero without losses.
        metrics: load figures.
        scores_on: ``"output"``: scores multiply what the experts give; ``"input"``: what they get (K = 1, Llama 4).
    """

    plan: RoutingPlan
    scores: Tensor
    logits: Tensor
    expert_index: Tensor
    aux_loss: Tensor
    metrics: RoutingMetrics
    scores_on: str = "output"
