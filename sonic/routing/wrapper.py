"""What routers that wrap another router share: they look like it, and score pairs as it does."""

from __future__ import annotations

from torch import Tensor, nn

from sonic.routing.scores import pair_scores
from sonic.shapes import argument_error

__all__ = ["RouterWrapper"]


class RouterWrapper(nn.Module):
    """Base of routers that change what another router decided.

    The attributes that describe the wrapped router (sizes, score function, what a layer asks a router for) describe
    this one; an attribute that the wrapped router lacks is lacking here too.
    """

    _may_score_input = False  # whether no token gets more than the wrapped router's K experts

    def __init__(self, router: nn.Module) -> None:
        """
        Args:
            router: any module that maps (T, D) tokens to a :class:`sonic.routing.Routing`.

        Raises:
            ValueError: no module, or a router that multiplies its scores to the experts' input.
        """
        super().__init__()
        where = f"sonic.routing.{type(self).__name__}"
        if not isinstance(router, nn.Module):
            raise argument_error(where, "router", f"a {type(router).__name__}", "a torch.nn.Module: (T, D) -> Routing")
        if getattr(router, "scores_on", "output") == "input" and not self._may_score_input:
            raise argument_error(
                where, "router.scores_on", "'input'", "'output': the number of experts per token varies"
            )
        self.router = router

    @property
    def hidden_size(self) -> int:
        """D."""
        size: int = self.router.hidden_size  # type: ignore[assignment]
        return size

    @property
    def num_experts(self) -> int:
        """E."""
        size: int = self.router.num_experts  # type: ignore[assignment]
        return size

    @property
    def top_k(self) -> int:
        """K of the wrapped router's choice."""
        size: int = self.router.top_k  # type: ignore[assignment]
        return size

    @property
    def score_function(self) -> str:
        """By which tokens are ranked and padded pairs are scored; softmax if the wrapped router has none."""
        name: str = getattr(self.router, "score_function", "softmax")
        return name

    @property
    def num_groups(self) -> int:
        """Groups of experts; 1 if the wrapped router has none."""
        size: int = getattr(self.router, "num_groups", 1)
        return size

    @property
    def backend(self) -> str | None:
        """The backend that the wrapped router insists on."""
        name: str | None = getattr(self.router, "backend", None)
        return name

    @property
    def wants_sequence_length(self) -> bool:
        """Whether the wrapped router has to be told where sequences begin."""
        wants: bool = getattr(self.router, "wants_sequence_length", False)
        return wants

    def pair_scores(self, x_TD: Tensor, logits_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """The wrapped router's scores of any pairs, see :meth:`sonic.routing.TopKRouter.pair_scores`: (P,).

        Softmax over all experts if it has no such method.
        """
        scores_of = getattr(self.router, "pair_scores", None)
        if scores_of is None:
            return pair_scores(logits_TE, token_P, expert_P)
        scores_P: Tensor = scores_of(x_TD, logits_TE, token_P, expert_P)
        return scores_P
