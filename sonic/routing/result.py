"""What a router returns, and the figures that tell how well it balances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sonic.routing.plan import RoutingPlan

__all__ = ["Routing", "RoutingMetrics"]


class RoutingMetrics(Mapping[str, Tensor]):
    """Load figures of one routing decision, each computed from the plan's offsets (E + 1 integers) when it is asked
    for.

    Reads as attributes or as a mapping; values are tensors on the plan's device, so that looking at them later is what
    synchronises.
    """

    _NAMES = ("tokens_per_expert", "max_over_mean_load", "dropped")

    def __init__(self, plan: RoutingPlan, num_requested: int | None = None) -> None:
        """Figures of ``plan``.

        ``num_requested`` is the number of (token, expert) pairs that the router wanted, R if none was dropped.
        """
        self.plan = plan
        self.num_requested = plan.num_rows if num_requested is None else num_requested

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
    def dropped(self) -> Tensor:
        """Pairs that the router wanted and the plan does not hold: 0-dim int64."""
        return torch.tensor(self.num_requested - self.plan.num_rows, device=self.plan.device)

    def padding_waste(self, tile_rows: int) -> Tensor:
        """Share of a grouped GEMM's rows that are padding when each expert is rounded up to whole tiles: 0-dim float32
        in [0, 1).

        Args:
            tile_rows: M.

        Raises:
            ValueError: ``tile_rows`` is no positive integer.
        """
        padded = self.plan.rows_with_padding(tile_rows)
        return (
            1 - self.plan.num_rows / padded.clamp(min=1)
            if self.plan.num_rows
            else torch.zeros((), device=padded.device)
        )

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
        scores: weights of the chosen experts, of the shape that the plan was built from: (T, K) float32 (float64 for
            float64 tokens).
        logits: (T, E), dtype of the scores.
        expert_index: (T, K) int32, largest score first.
        aux_loss: 0-dim; the sum of the router's losses, each times its coefficient; zero without losses.
        metrics: load figures.
    """

    plan: RoutingPlan
    scores: Tensor
    logits: Tensor
    expert_index: Tensor
    aux_loss: Tensor
    metrics: RoutingMetrics
