"""Who goes where: the integer bookkeeping that every kernel of a layer shares."""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.kernels import ops
from sonic.shapes import argument_error, check_integer, check_positive, check_same, check_shape

__all__ = ["RoutingPlan"]


class RoutingPlan:
    """Rows grouped by expert, and the maps between tokens, slots and rows. Build it with :meth:`from_topk` or
    :meth:`from_pairs`.

    A slot is a (token, expert) pair in the order of the caller's scores; a row is the same pair in the order of the
    experts. Tokens ascend within each expert. Everything stays on the device of the indices; building synchronises with
    the host on a
    CPU only.

    Attributes:
        num_tokens: T.
        num_experts: E.
        num_rows: R.
        scores_shape: shape of the scores that go with this plan: (T, K) from top-K, (P,) from pairs.
        expert_offset_E1: int32; rows of expert e are ``[expert_offset_E1[e] : expert_offset_E1[e + 1]]``.
        token_of_row_R: int32; row -> token.
        slot_of_row_R: int32; row -> flat index into the scores.
        row_by_token_R: int32; the rows listed token by token.
        token_offset_T1: int32; those of token t are ``[token_offset_T1[t] : token_offset_T1[t + 1]]``.

    Its integers take ``12 R + 4 (E + 1) + 4 (T + 1)`` bytes; :mod:`sonic.functional` says which of them backward keeps.
    """

    def __init__(
        self,
        num_tokens: int,
        num_experts: int,
        scores_shape: tuple[int, ...],
        expert_offset_E1: Tensor,
        token_of_row_R: Tensor,
        slot_of_row_R: Tensor,
        row_by_token_R: Tensor,
        token_offset_T1: Tensor,
    ) -> None:
        """Hold index arrays that belong together; they are taken as they are, so prefer the two builders."""
        self.num_tokens = num_tokens
        self.num_experts = num_experts
        self.scores_shape = scores_shape
        self.expert_offset_E1 = expert_offset_E1
        self.token_of_row_R = token_of_row_R
        self.slot_of_row_R = slot_of_row_R
        self.row_by_token_R = row_by_token_R
        self.token_offset_T1 = token_offset_T1

    @classmethod
    def from_topk(
        cls, expert_index: Tensor, num_experts: int, *, load: Tensor | None = None, backend: str | None = None
    ) -> RoutingPlan:
        """Plan for K experts per token.

        Args:
            expert_index: (T, K) integer, 0 <= index < num_experts, no expert twice in a row. T may be 0.
            num_experts: E.
            load: what :func:`sonic.routing.topk_scores` counted when it chose these experts, (E, C) int32, which saves
                a pass; None: they are counted.
            backend: insist on a backend for building it.

        Raises:
            ValueError: wrong shape or dtype, an index out of range, an expert chosen twice by a token, a load of other
                experts (these three by a device-side assertion on a GPU).
        """
        where = "sonic.RoutingPlan.from_topk"
        check_positive(where, num_experts=num_experts)
        check_integer(where, "expert_index", expert_index)
        check_shape(where, "expert_index", expert_index, T=None, K=None)
        num_tokens, top_k = expert_index.shape
        if not 1 <= top_k <= num_experts:
            wanted = f"(T, K) with K from 1 to num_experts = {num_experts}"
            raise argument_error(where, "expert_index", tuple(expert_index.shape), wanted)
        if load is not None:
            check_shape(where, "load", load, E=num_experts, C=None)
        arrays = ops.build_plan(expert_index.reshape(-1), None, num_tokens, num_experts, load, backend)
        return cls(num_tokens, num_experts, (num_tokens, top_k), *arrays)

    @classmethod
    def from_pairs(
        cls, token_index: Tensor, expert_index: Tensor, num_tokens: int, num_experts: int, *, backend: str | None = None
    ) -> RoutingPlan:
        """Plan for any set of (token, expert) pairs: any order, any number per token, none included.

        Args:
            token_index: (P,) integer, 0 <= index < num_tokens.
            expert_index: (P,) integer, 0 <= index < num_experts.
            num_tokens: T, may be 0.
            num_experts: E.
            backend: insist on a backend for building it.

        Raises:
            ValueError: wrong shape, dtype or device, an index out of range, a pair that comes twice.
        """
        where = "sonic.RoutingPlan.from_pairs"
        check_positive(where, num_experts=num_experts)
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, (int, torch.SymInt)) or num_tokens < 0:
            raise argument_error(where, "num_tokens", repr(num_tokens), "an integer >= 0")
        check_integer(where, "token_index", token_index)
        check_integer(where, "expert_index", expert_index)
        check_shape(where, "token_index", token_index, P=None)
        check_shape(where, "expert_index", expert_index, P=token_index.shape[0])
        check_same(where, ("token_index", token_index), (("expert_index", expert_index),), dtype=False)
        arrays = ops.build_plan(expert_index, token_index, num_tokens, num_experts, None, backend)
        return cls(num_tokens, num_experts, (token_index.shape[0],), *arrays)

    @property
    def top_k(self) -> int | None:
        """K, if every token has K slots in a row, as from top-K; None for a plan from pairs."""
        return self.scores_shape[1] if len(self.scores_shape) == 2 else None

    @property
    def num_rows(self) -> int:
        """R, the number of routed rows."""
        return self.token_of_row_R.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the index arrays live."""
        return self.token_of_row_R.device

    def tokens_per_expert(self) -> Tensor:
        """Rows of each expert: (E,) int32."""
        return self.expert_offset_E1.diff()

    def rows_with_padding(self, tile_rows: int) -> Tensor:
        """Rows that a grouped GEMM computes when each expert is padded to whole tiles: 0-dim int64.

        Args:
            tile_rows: M.

        Raises:
            ValueError: ``tile_rows`` is no positive integer.
        """
        check_positive("sonic.RoutingPlan.rows_with_padding", tile_rows=tile_rows)
        count_E = self.tokens_per_expert()
        return ((count_E + tile_rows - 1) // tile_rows * tile_rows).sum()

    def __repr__(self) -> str:
        sizes = f"num_tokens={self.num_tokens}, num_experts={self.num_experts}, num_rows={self.num_rows}"
        return f"RoutingPlan({sizes}, device='{self.device}')"
