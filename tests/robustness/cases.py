"""Cases of the fuzzer: what is drawn, as plain values, and the tensors that follow from it.

A :class:`Case` is drawn through two functions, ``choose`` and ``integer``, so that hypothesis (which shrinks) and a
plain random generator (which is fast, and whose n-th case is found again by its number) draw from the same space.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

import sonic
from tests.helpers import GATED, LAYOUTS, SAVE_MODES

V = TypeVar("V")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
GEMMS = (
    "up_proj",
    "down_proj",
    "combine",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
)
KINDS = (
    "plan_topk",
    "plan_pairs",
    *GEMMS,
    "experts",
    "experts_bwd",
    "topk_softmax",
    "topk_softmax_bwd",
    "best_of_columns",
    "moe_mlp",
    "expert_mlp",
    "layer",
)
WHOLE_LAYERS = ("moe_mlp", "expert_mlp", "layer")
STRIDES = ("plain", "transposed", "strided", "offset", "expanded")
ROUTINGS = ("topk", "pairs", "in order")
POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# On a CPU Triton's kernels are interpreted: right, but some 200 times slower, and not in these dtypes.
NOT_INTERPRETED = ("bf16", "fp64")


@dataclass(frozen=True)
class Case:
    """One call to try. Everything else follows from these values.

    Attributes:
        kind: one of :data:`KINDS`.
        backend: that is insisted on.
        seed: of the values.
        dtype: of matrices (of the logits, for routing ops).
        T, D, N, E, K: as in ``sonic/shapes.py``.
        activation, glu_layout, save: as in ``sonic.moe_mlp``.
        bias: with biases.
        scored: with scores, where they may be left out.
        routing: one of :data:`ROUTINGS`.
        skew: every token takes the first experts, so that the others have no row.
        tail: rows at the end that belong to nobody, where there may be some.
        strides: of which kind the tensor arguments are, one of :data:`STRIDES` each, in their order, then from the
            beginning again.
        poison: ``""``, or what one token is filled with.
        small_blocks: the reference's blocks have 2 rows.
        native: the reference multiplies 16 bits as they are.
        option: chooses among what a kind can do besides: flags of needed gradients, options of a router.
    """

    kind: str
    backend: str
    seed: int
    dtype: str
    T: int
    D: int
    N: int
    E: int
    K: int
    activation: str
    glu_layout: str
    save: str
    bias: bool
    scored: bool
    routing: str
    skew: bool
    tail: int
    strides: tuple[str, ...]
    poison: str
    small_blocks: bool
    native: bool
    option: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def U(self) -> int:
        return 2 * self.N if self.activation in GATED else self.N

    def flag(self, bit: int) -> bool:
        return bool(self.option >> bit & 1)

    def line(self) -> str:
        """The case as a command that tries it again."""
        return f"python -m tests.robustness.fuzz --case '{json.dumps(dataclasses.asdict(self))}'"

    @staticmethod
    def of_json(text: str) -> Case:
        values = json.loads(text)
        return Case(**{**values, "strides": tuple(values["strides"])})


def draw_case(
    choose: Callable[[Sequence[V]], V],
    integer: Callable[[int, int], int],
    kinds: Sequence[str],
    backends: Sequence[str],
) -> Case:
    """Any case of these kinds and backends."""
    pick: Any = choose
    kind, backend = pick(kinds), pick(backends)
    interpreted = backend == "triton"
    dtypes = [name for name in DTYPES if not (interpreted and name in NOT_INTERPRETED)]
    widths = (1, 2, 3, 5, 8, 13, 16, 24)
    E = integer(1, 6)
    return Case(
        kind=kind,
        backend=backend,
        seed=integer(0, 2**31 - 1),
        dtype=pick(dtypes),
        T=pick((0, 1, 2, 3, 5, 8, 11, 17)) if not interpreted else pick((0, 1, 3, 5)),
        D=pick(widths),
        N=pick(widths),
        E=E,
        K=integer(1, E),
        activation=pick(sonic.ACTIVATIONS),
        glu_layout=pick(LAYOUTS),
        save=pick(SAVE_MODES),
        bias=pick((False, True)),
        scored=pick((True, False)),
        routing=pick(ROUTINGS),
        skew=pick((False, True)),
        tail=pick((0, 0, 1, 3)),
        strides=tuple(pick(STRIDES) for _ in range(3)),
        poison=pick(("", "", *POISONS)),
        small_blocks=pick((False, True)),
        native=pick((False, True)),
        option=integer(0, 1023),
    )


def random_case(seed: int, number: int, kinds: Sequence[str] = KINDS, triton_share: float = 0.0) -> Case:
    """The ``number``-th case of a run."""
    generator = random.Random(f"{seed}/{number}")
    backends = ("triton",) if generator.random() < triton_share else ("reference",)
    return draw_case(generator.choice, generator.randint, kinds, backends)


@st.composite
def any_case(draw: Any, kinds: Sequence[str] = KINDS, backends: Sequence[str] = ("reference",)) -> Case:
    """The same for hypothesis."""
    return draw_case(
        lambda options: draw(st.sampled_from(options)),
        lambda low, high: draw(st.integers(low, high)),
        kinds,
        backends,
    )


# ---------------------------------------------------------------- tensors


def arranged(value: Tensor, how: str) -> Tensor:
    """The same values with other strides or another storage offset; what lies between them is NaN (or large)."""
    filling = (
        math.nan if value.is_floating_point() else torch.iinfo(value.dtype).max if value.dtype != torch.bool else 1
    )
    if how == "transposed" and value.ndim >= 2:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "strided":
        return torch.stack((value, torch.full_like(value, filling)), -1)[..., 0]
    if how == "offset":
        store = torch.full((value.numel() + 5,), filling, dtype=value.dtype)
        store[3 : 3 + value.numel()] = value.reshape(-1)
        return store[3 : 3 + value.numel()].view(value.shape)
    if how == "expanded" and value.ndim and value.shape[0] and bool((value == value[:1]).all()):
        return value[:1].expand(value.shape)
    return value.clone()


@dataclass
class Routed:
    """Rows of a case: who goes where, and the plan if there is one.

    Attributes:
        expert_R, token_R: of every row, -1 as the expert of rows that belong to nobody.
        offset_E1: int32.
        plan: None where rows stand in order, each its own token.
        num_tokens: R then.
    """

    expert_R: Tensor
    token_R: Tensor
    offset_E1: Tensor
    plan: sonic.RoutingPlan | None
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return self.token_R.shape[0]

    @property
    def token_map(self) -> Tensor | None:
        """As the ops take it."""
        return None if self.plan is None else self.token_R.int()


class Values:
    """The tensors of a case, drawn one after the other from its seed, on unit scale."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._draw = torch.Generator().manual_seed(case.seed)
        self._number = 0

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor with the case's next kind of strides."""
        value = (torch.randn(shape, generator=self._draw, dtype=torch.float64) * scale).to(
            dtype or self.case.torch_dtype
        )
        how = self.case.strides[self._number % len(self.case.strides)]
        self._number += 1
        if how == "expanded" and value.ndim and value.shape[0]:
            value = value[:1].expand(value.shape)
        return arranged(value, how)

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._draw))

    def order(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._draw)

    def expert_index(self) -> Tensor:
        """(T, K) int64, none twice in a row."""
        case = self.case
        liking = torch.rand(case.T, case.E, generator=self._draw)
        if case.skew:
            liking[:, : case.K] += 1
        return liking.argsort(1, descending=True)[:, : case.K]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(P,) tokens and experts in any order, any number per token."""
        case = self.case
        chosen = self.order(case.T * case.E)[: self.integer(0, case.T * case.E)]
        token_P, expert_P = chosen // case.E, chosen % case.E
        return (token_P, expert_P % case.K) if case.skew and case.K == case.E else (token_P, expert_P)

    def routed(self) -> Routed:
        """The rows of the case."""
        case = self.case
        if case.routing == "in order":
            count = torch.bincount(self.expert_index().reshape(-1), minlength=case.E)
            rows = int(count.sum())
            expert_R = torch.cat((torch.arange(case.E).repeat_interleave(count), torch.full((case.tail,), -1)))
            offset = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
            return Routed(expert_R, torch.arange(rows + case.tail), offset, None, rows + case.tail)
        if case.routing == "topk":
            plan = sonic.RoutingPlan.from_topk(self.expert_index(), case.E, backend=case.backend)
        else:
            plan = sonic.RoutingPlan.from_pairs(*self.pairs(), case.T, case.E, backend=case.backend)
        expert_R = torch.arange(case.E).repeat_interleave(plan.tokens_per_expert().long())
        return Routed(expert_R, plan.token_of_row_R.long(), plan.expert_offset_E1, plan, case.T)
