"""Rows that change ranks: who sends which tokens where, the all-to-all that does it, and the way back.

A token with several experts on one rank crosses the wire once. With W ranks, T tokens here, R routed rows here and S
sent tokens (at most T times min(K, W)), per call and direction:

====================  ================================================  ===========================================
message               size                                              when
====================  ================================================  ===========================================
counts                2 W integers                                      forward; the only wait of the host
rows' places          2 R int32: token in its message, expert           forward
scores                R, their dtype                                    forward; gradients in backward
tokens                S D, dtype of x                                   forward; gradients in backward
sums                  S D, dtype of x: one row per (token, rank)        forward; gradients in backward
====================  ================================================  ===========================================
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sonic.kernels import ops
from sonic.parallel.in_flight import Collective, InFlight, Started, issue
from sonic.parallel.mesh import Ranks, part_offsets
from sonic.routing.plan import RoutingPlan

__all__ = ["Exchange", "all_to_all", "gather_tokens", "sum_rows"]


def all_to_all(group: dist.ProcessGroup | None, send_sizes: list[int], receive_sizes: list[int]) -> Collective:
    """Send ``send_sizes[w]`` rows to rank w of ``group``, which stand in this order; receive likewise.

    Args:
        group: None or one rank: nothing to do.
        send_sizes: rows for each rank.
        receive_sizes: rows from each rank.
    """

    def start(x: Tensor) -> Started:
        if group is None or group.size() == 1:
            return Started(x)
        x = x.contiguous()
        out = x.new_empty(sum(receive_sizes), *x.shape[1:])
        if len({*send_sizes, *receive_sizes}) == 1:
            work = dist.all_to_all_single(out, x, group=group, async_op=True)
        else:
            work = dist.all_to_all_single(out, x, receive_sizes, send_sizes, group=group, async_op=True)
        num_bytes = max(out.nbytes, x.nbytes)
        return Started(out, work, op="all_to_all", num_ranks=group.size(), num_bytes=num_bytes)

    return start


class Exchange:
    """One layer's tokens on their way to the ranks that hold their experts, and back.

    Construction sends; :meth:`receive` waits for what came; :meth:`send_back` returns the sums; :meth:`collect` waits
    for them. Between these, other work may run.

    Attributes:
        num_received_tokens, num_received_rows: what other ranks, and this one, send here.
    """

    def __init__(
        self, x_TD: Tensor, scores: Tensor, plan: RoutingPlan, ranks: Ranks, *, backend: str | None, overlap: str
    ) -> None:
        """
        Args:
            x_TD: (T, D) tokens of this rank.
            scores: of the shape that ``plan`` was built from.
            plan: over all experts; rank w has those of ``part_offsets(plan.num_experts, W)``.
            ranks: those that share the experts.
            backend: of the kernels that gather and sum.
            overlap: as in :func:`sonic.parallel.in_flight.issue`.
        """
        self._ranks, self._backend, self._overlap = ranks, backend, overlap
        num_tokens, num_ranks, device = plan.num_tokens, ranks.size, plan.device
        offsets = part_offsets(plan.num_experts, num_ranks)
        self._num_local_experts = offsets[ranks.rank + 1] - offsets[ranks.rank]
        rank_of_expert_E = torch.arange(plan.num_experts, device=device) // max(offsets[1], 1)
        expert_R = torch.repeat_interleave(
            torch.arange(plan.num_experts, device=device),
            plan.tokens_per_expert().long(),
            output_size=plan.num_rows,
        )
        rank_R = rank_of_expert_E[expert_R]

        # a table (W, T) of who gets what; its entries in order are the tokens sent
        key_R = rank_R * num_tokens + plan.token_of_row_R
        is_sent_F = torch.zeros(num_ranks * num_tokens, dtype=torch.bool, device=device)
        is_sent_F[key_R] = True
        place_F = is_sent_F.cumsum(0) - 1
        sent_W = is_sent_F.view(num_ranks, num_tokens).sum(1)
        rows_W = plan.expert_offset_E1[torch.tensor(offsets, device=device)].diff().long()

        counts_W2 = torch.stack((sent_W, rows_W), 1)
        received_W2 = torch.empty_like(counts_W2)
        dist.all_to_all_single(received_W2, counts_W2, group=ranks.group)
        sent, rows, received, received_rows = torch.cat((counts_W2, received_W2), 1).t().tolist()
        self._tokens, self._rows = (sent, received), (rows, received_rows)
        self.num_received_tokens, self.num_received_rows = sum(received), sum(received_rows)

        sent_S = key_R.new_empty(sum(sent))
        sent_S[place_F[key_R]] = key_R  # a token's rows for one rank all write the same
        self._sent = RoutingPlan.from_pairs(
            sent_S % max(num_tokens, 1), sent_S // max(num_tokens, 1), num_tokens, num_ranks, backend=backend
        )
        first_of_rank_W = sent_W.cumsum(0) - sent_W
        first_expert_W = torch.tensor(offsets[:-1], device=device)
        place_R2 = torch.stack((place_F[key_R] - first_of_rank_W[rank_R], expert_R - first_expert_W[rank_R]), 1)
        self._places = all_to_all(ranks.group, *self._rows)(place_R2.to(torch.int32))
        scores_R = scores.reshape(-1).index_select(0, plan.slot_of_row_R)
        self._scores = self._issue(scores_R, self._rows, "scores")
        self._dispatch = self._issue(gather_tokens(x_TD, self._sent, backend), self._tokens, "dispatch")
        self._combine: InFlight | None = None

    def receive(self) -> tuple[Tensor, Tensor, RoutingPlan | None]:
        """Wait for the tokens.

        Returns:
            x_SD: the tokens received, rank by rank.
            scores_R: of the rows received.
            plan: over this rank's experts; scores are (R,). None on a rank without an expert, which receives nothing.
        """
        place_R2 = self._places.wait().long()
        scores_R, x_SD = self._scores.wait(), self._dispatch.wait()
        if self._num_local_experts == 0:
            return x_SD, scores_R, None
        received = torch.tensor(self._tokens[1], device=place_R2.device)
        rows = torch.tensor(self._rows[1], device=place_R2.device)
        first_R = torch.repeat_interleave(received.cumsum(0) - received, rows, output_size=self.num_received_rows)
        plan = RoutingPlan.from_pairs(
            place_R2[:, 0] + first_R,
            place_R2[:, 1],
            self.num_received_tokens,
            self._num_local_experts,
            backend=self._backend,
        )
        return x_SD, scores_R, plan

    def send_back(self, out_SD: Tensor) -> None:
        """Return what the experts here made of each received token: (S, D), in the order received."""
        self._combine = self._issue(out_SD, self._tokens[::-1], "combine")

    def collect(self) -> Tensor:
        """Wait for the sums, and add those of each token: (T, D), summed in at least float32, rounded once."""
        assert self._combine is not None, "nothing was sent back"
        return sum_rows(self._combine.wait(), self._sent, self._backend)

    def _issue(self, x: Tensor, sizes: tuple[list[int], list[int]], kind: str) -> InFlight:
        group, (send, receive) = self._ranks.group, sizes
        return issue(
            x, all_to_all(group, send, receive), all_to_all(group, receive, send), kind=kind, overlap=self._overlap
        )


def gather_tokens(x_TD: Tensor, plan: RoutingPlan, backend: str | None = None) -> Tensor:
    """Token of each row, (R, D). The gradients of a token's rows are summed in at least float32, and rounded once."""
    rows_RD: Tensor = _Gather.apply(x_TD, plan.token_of_row_R, plan.row_by_token_R, plan.token_offset_T1, backend)
    return rows_RD


def sum_rows(rows_RD: Tensor, plan: RoutingPlan, backend: str | None = None) -> Tensor:
    """Sum of each token's rows, (T, D), in at least float32, rounded once: the transpose of :func:`gather_tokens`."""
    out_TD: Tensor = _Sum.apply(rows_RD, plan.token_of_row_R, plan.row_by_token_R, plan.token_offset_T1, backend)
    return out_TD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        token_of_row_R: Tensor,
        row_by_token_R: Tensor,
        token_offset_T1: Tensor,
        backend: str | None,
    ) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(row_by_token_R, token_offset_T1)
        return x_TD.index_select(0, token_of_row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: Tensor) -> Any:
        row_by_token_R, token_offset_T1 = ctx.saved_tensors
        dx_TD = ops.combine(drows_RD.contiguous(), None, row_by_token_R, token_offset_T1, None, ctx.backend)
        return dx_TD, None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        token_of_row_R: Tensor,
        row_by_token_R: Tensor,
        token_offset_T1: Tensor,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(token_of_row_R)
        return ops.combine(rows_RD.contiguous(), None, row_by_token_R, token_offset_T1, None, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> Any:
        (token_of_row_R,) = ctx.saved_tensors
        return dout_TD.index_select(0, token_of_row_R), None, None, None, None
