"""Hash routing: the token's identity, not its state, decides which experts it goes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonic.routing.result import Routing
from sonic.routing.scores import check_within
from sonic.routing.topk import TopKRouter
from sonic.shapes import argument_error, check_integer, check_positive

__all__ = ["HashRouter"]


class HashRouter(TopKRouter):
    """Send every token to the K experts that a fixed table names for its id; the learned logits only weigh them.

    Balanced by construction up to how often ids occur, never drops, cannot collapse. Call the layer with the ids:
    ``layer(x, token_ids=ids)``.

    The table ``expert_of_id`` (V, K), int32, is a buffer and part of the checkpoint. It is drawn at random, each row K
    different experts, and the numbers of ids that name an expert differ by one at most.

    Source: Roller et al., Hash Layers (arXiv:2106.04426); with learned weights as the first layers of DeepSeek-V4.
    """

    expert_of_id: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        seed: int = 0,
        **router_options: Any,
    ) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K, at most E.
            vocab_size: V; ids are 0 to V - 1.
            seed: of the table. Layers with the same seed send an id to the same experts.
            router_options: further options of :class:`sonic.routing.TopKRouter`, but those that say how a token chooses
                (groups, ``enable_expert_bias``).

        Raises:
            ValueError: as :class:`sonic.routing.TopKRouter`, or an option that has no meaning here.
        """
        where = "sonic.routing.HashRouter"
        check_positive(where, vocab_size=vocab_size)
        for name in ("num_groups", "group_topk", "enable_expert_bias"):
            if name in router_options:
                raise argument_error(where, name, repr(router_options[name]), "left out: the table chooses")
        super().__init__(hidden_size, num_experts, top_k, **router_options)
        self.vocab_size, self.seed = vocab_size, seed
        empty = torch.empty(vocab_size, top_k, dtype=torch.int32, device=self.weight.device)
        self.register_buffer("expert_of_id", empty)
        self._fill_table()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and the table as it was."""
        super().reset_parameters()
        if "expert_of_id" in self._buffers:
            self._fill_table()

    def forward(self, x_TD: Tensor, *, token_ids: Tensor | None = None, sequence_length: int | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: (T, D).
            token_ids: T integers of any shape, in the order of the tokens, 0 to V - 1.
            sequence_length: as :meth:`sonic.routing.TopKRouter.forward`.

        Returns:
            The decision; ``expert_index`` in the order of the table.

        Raises:
            ValueError: ``token_ids`` is missing or does not fit; as :meth:`sonic.routing.TopKRouter.forward`.
        """
        where = "sonic.routing.HashRouter"
        if token_ids is None:
            raise argument_error(where, "token_ids", None, "the ids of the tokens: layer(x, token_ids=ids)")
        check_integer(where, "token_ids", token_ids)
        logits_TE = self.logits(x_TD)
        if token_ids.numel() != x_TD.shape[0]:
            raise argument_error(where, "token_ids", tuple(token_ids.shape), f"T = {x_TD.shape[0]} integers")
        check_within(where, "token_ids", token_ids, "vocab_size", self.vocab_size)
        expert_TK = self.expert_of_id[token_ids.reshape(-1).long()]
        return self._routing(x_TD, logits_TE, self._scores(x_TD, logits_TE, expert_TK), expert_TK, sequence_length)

    def extra_repr(self) -> str:
        """As :class:`sonic.routing.TopKRouter`, and what makes the table."""
        return f"{super().extra_repr()}, vocab_size={self.vocab_size}, seed={self.seed}"

    def _scores(self, x_TD: Tensor, logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """The scores that top-K would give these experts, had it chosen them."""
        if self.score_function == "softmax" and (self.norm_topk_prob or not self.pre_softmax):
            return torch.softmax(logits_TE.gather(1, expert_TK.long()), dim=-1) * self.topk_scaling_factor
        token_P = torch.arange(x_TD.shape[0], device=x_TD.device).repeat_interleave(self.top_k)
        scores_TK = self.pair_scores(x_TD, logits_TE, token_P, expert_TK.reshape(-1)).view(expert_TK.shape)
        if self.norm_topk_prob:
            scores_TK = scores_TK / (scores_TK.sum(-1, keepdim=True) + 1e-20) * self.topk_scaling_factor
        return scores_TK

    @torch.no_grad()
    def _fill_table(self) -> None:
        """In each round E ids, in random order, take K places each of a circle of experts, shuffled anew.

        The places of the i-th id are i plus K different shifts, drawn anew for each round, so that a round names every
        expert K times, and which experts meet differs from round to round. Ids that fill no round take neighbours.
        """
        if self.expert_of_id.is_meta:
            return
        rng = torch.Generator().manual_seed(self.seed)
        num_rounds, num_left = divmod(self.vocab_size, self.num_experts)
        circle_BE = torch.rand(num_rounds + 1, self.num_experts, generator=rng).argsort(1)
        shift_BK = torch.rand(num_rounds, self.num_experts, generator=rng).argsort(1)[:, : self.top_k]
        place_BEK = (torch.arange(self.num_experts)[:, None] + shift_BK[:, None]) % self.num_experts
        rounds_BEK = circle_BE[:-1].gather(1, place_BEK.flatten(1)).view(place_BEK.shape)
        neighbour_LK = torch.arange(num_left * self.top_k).view(num_left, self.top_k) % self.num_experts
        order_V = torch.randperm(self.vocab_size, generator=rng)
        table_VK = torch.empty(self.vocab_size, self.top_k, dtype=torch.int32)
        table_VK[order_V] = torch.cat((rounds_BEK.flatten(0, 1), circle_BE[-1][neighbour_LK])).int()
        self.expert_of_id.copy_(table_VK)
