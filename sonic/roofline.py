"""FLOPs, bytes and least time of every op on a named chip.

Letters as in :mod:`sonic.shapes`; i bytes per value of a matrix, s bytes per score (4; 8 in float64), E' experts that
at least one row reaches, G rows of a gathered operand that come from memory (below), R' rows with tile padding, C - 1
runs of tokens that are counted apart; in brackets what only a bias adds, in braces the bytes of routing data;
topk_softmax_bwd swaps reads and writes, without C; best_of_columns chooses R pairs, as expert choice does:

====================  ========  ==================================================  ===========================
op                    FLOP      bytes read                                          bytes written
====================  ========  ==================================================  ===========================
up_proj               2 R' U D  i (G D + E' U D [+ E' U]) + {4 R + 4 (E + 1)}       i (R U + R N)
down_proj             2 R' D N  i (R N + E' D N [+ E' D]) + {4 (E + 1)}             i R D
combine               0         i R D + s R + {4 R + 4 (T + 1)}                     i T D
down_proj_bwd_input   2 R' D N  i (G D + R U + E' D N [+ E' D]) + s R               i (R U + R N) + s R
                                + {4 R + 4 (E + 1)}
down_proj_bwd_weight  2 R D N   i (G D + R N) [+ s R] + {4 R + 4 (E + 1)}           i (E D N [+ E D])
up_proj_bwd_input     2 R' U D  i (R U + E' U D) + {4 (E + 1)}                      i R D
up_proj_bwd_weight    2 R U D   i (G D + R U) + {4 R + 4 (E + 1)}                   i (E U D [+ E U])
topk_softmax          0         s T E                                               2 s T K + {4 T K + 4 E C}
best_of_columns       0         s T E                                               {16 R}
build_plan            0         {4 R} (8 R from pairs)                              {12 R + 4 (E + T + 2)}
====================  ========  ==================================================  ===========================

``experts`` is the sum of up_proj, down_proj and combine: 6 R D N FLOP gated, 4 R D N plain. ``experts_bwd`` is that of
the four ``_bwd`` ops and combine without scores: 12 R D N gated, 8 R D N plain. Without ``need_h`` up_proj does not
write H, its R U, but comes once more, writing it, before the others of ``experts_bwd``.

* FLOP are those of matrix products, a multiplication and an addition each. Activations, biases, scores and sums of rows
  run on other units beside the loads; they count as bytes only.
* Bytes are the least: each operand once, each result once, no partial sums. Weights of experts without a row are not
  read, but their gradients are written, as zeros.
* ``gather="rows"`` (the default, as in published figures): a gathered operand (X, dO) comes from memory once per row,
  so G = R. ``gather="tokens"``: once per token, with ideal caches, so G = min(T, R). Kernels that find tokens in their
  L2 lie between: only the second is a bound that none can beat.
* Tile padding (``tile_rows``) costs FLOP in the ops that walk tiles of rows; padding rows are neither read nor written.
  The two ``_bwd_weight`` ops contract over rows and are counted without it.

Source: SonicMoE (arXiv:2512.14080), section 3 and algorithms 2, 3 and 5; its arithmetic intensity (equation 4) is that
of up_proj without H and down_proj together. The contracts in :mod:`sonic.kernels.ops` name each operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from sonic.shapes import argument_error, check_choice, check_positive, load_columns

__all__ = [
    "CHIPS",
    "OPS",
    "Bound",
    "Chip",
    "Cost",
    "Layer",
    "OpBound",
    "bound_time",
    "bounded_by",
    "compute_bound_tokens",
    "fraction_of_bound",
    "layer_bound",
    "op_cost",
    "ridge_intensity",
]

_BYTES_PER_VALUE = {"bfloat16": 2, "float16": 2, "tfloat32": 4, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Chip:
    """Peak figures of one accelerator, all dense: vendors also print twice as much, for 2:4 sparse matrices.

    Attributes:
        name: key in :data:`CHIPS`.
        arch: the compiler's name of the architecture, such as ``"sm_90"`` or ``"gfx942"``.
        flops_per_second: FLOP/s of matrix products by the dtype of their operands. ``"tfloat32"`` is float32 in memory,
            rounded for the tensor cores; ``"float32"`` is computed in full precision, on NVIDIA outside of them.
        memory_bytes_per_second: bytes/s of the device memory.
        memory_bytes: bytes of the device memory.
        l2_bytes: bytes of L2 cache, of all dies together.
        num_compute_units: SMs or CUs in use.
        source: where the figures are published.
    """

    name: str
    arch: str
    flops_per_second: Mapping[str, float] = field(hash=False)
    memory_bytes_per_second: float
    memory_bytes: int
    l2_bytes: int
    num_compute_units: int
    source: str


def _peaks(half: float, tf32: float, fp32: float, fp64: float, fp8: float | None = None) -> dict[str, float]:
    """FLOP/s by dtype, from TFLOP/s."""
    peaks = {"bfloat16": half, "float16": half, "tfloat32": tf32, "float32": fp32, "float64": fp64}
    peaks |= {} if fp8 is None else {"float8": fp8}
    return {dtype: tera * 1e12 for dtype, tera in peaks.items()}


_HOPPER = _peaks(989, 494.5, 67, 67, 1979)
_GB, _MIB = 10**9, 2**20
_HALF = "(8, 16 and TF32: half of the figures with sparsity)"
_KNOWN = (
    Chip(
        *("H100", "sm_90", _HOPPER, 3.35e12, 80 * _GB, 50 * _MIB, 132),
        f"NVIDIA H100 data sheet, SXM5 {_HALF}; L2, SMs: NVIDIA H100 Tensor Core GPU Architecture white paper",
    ),
    Chip(
        *("H200", "sm_90", _HOPPER, 4.8e12, 141 * _GB, 50 * _MIB, 132),
        f"NVIDIA H200 data sheet, SXM {_HALF}; L2, SMs: as H100, of the same die",
    ),
    Chip(
        *("B200", "sm_100", _peaks(2250, 1125, 75, 37, 4500), 7.7e12, 180 * _GB, 126 * _MIB, 148),
        f"NVIDIA HGX B200 specifications, an eighth of 8 GPUs {_HALF}; bytes/s: 7,680 bits at 3,996 MHz (the DGX B200 "
        "data sheet says 8 TB/s); L2, SMs: as the CUDA driver reports them",
    ),
    Chip(
        *("A100", "sm_80", _peaks(312, 156, 19.5, 19.5), 2.039e12, 80 * _GB, 40 * _MIB, 108),
        "NVIDIA A100 data sheet, 80GB SXM, dense; L2, SMs: NVIDIA A100 Tensor Core GPU Architecture white paper",
    ),
    Chip(
        *("MI300X", "gfx942", _peaks(1307.4, 653.7, 163.4, 163.4, 2614.9), 5.3e12, 192 * _GB, 32 * _MIB, 304),
        "AMD Instinct MI300X data sheet, matrix figures without sparsity; L2: AMD CDNA 3 white paper, 4 MiB on each of "
        "8 dies (256 MB of Infinity Cache behind it)",
    ),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _KNOWN})


@dataclass(frozen=True)
class Cost:
    """What an op computes and moves; costs add up.

    Attributes:
        flops: FLOP of its matrix products.
        bytes_read, bytes_written: bytes from and to device memory.
    """

    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        read, written = self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        return Cost(self.flops + other.flops, read, written)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOP per byte; 0 without FLOP."""
        if not self.flops:
            return 0.0
        return self.flops / self.bytes if self.bytes else math.inf


@dataclass(frozen=True)
class Layer:
    """One MoE layer and the tokens of one call: everything that costs depend on.

    Attributes:
        num_tokens, hidden_size, intermediate_size, num_experts, top_k: T, D, N, E and K.
        gated: U = 2N, as ``"swiglu"``; else U = N.
        bias: the experts have b1 and b2.
        dtype: of the matrices: a torch dtype or its name, or ``"tfloat32"``. Scores are float32 (float64 in float64).
        need_h: H is stored in the forward pass; without, backward computes it again.
        gather: a gathered operand is read once per ``"rows"`` or, with ideal caches, once per ``"tokens"``.
        tile_rows: M, rows that the kernels pad each expert's to; 1: no padding.
        tokens_per_expert: rows of each of the E experts, 0 to T each; None: T K rows, spread as evenly as may be. With
            another sum than T K (as under token rounding) the plan is built from pairs.
        active_experts: E', experts that at least one row reaches, K to min(E, T K); None: what ``tokens_per_expert``
            says, or min(E, T K).

    Raises:
        ValueError: sizes that are no positive integers, or that do not fit each other; unknown dtype or ``gather``.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    gated: bool = True
    bias: bool = False
    dtype: torch.dtype | str = torch.bfloat16
    need_h: bool = True
    gather: str = "rows"
    tile_rows: int = 1
    tokens_per_expert: Sequence[int] | None = None
    active_experts: int | None = None

    def __post_init__(self) -> None:
        where = "sonic.roofline.Layer"
        names = ("num_tokens", "hidden_size", "intermediate_size", "num_experts", "top_k", "tile_rows")
        check_positive(where, **{name: getattr(self, name) for name in names})
        if self.top_k > self.num_experts:
            raise argument_error(where, "top_k", self.top_k, f"at most num_experts = {self.num_experts}")
        check_choice(where, "dtype", _dtype_name(self.dtype), tuple(_BYTES_PER_VALUE))
        check_choice(where, "gather", self.gather, ("rows", "tokens"))
        for name in ("gated", "bias", "need_h"):
            if not isinstance(getattr(self, name), bool):
                raise argument_error(where, name, repr(getattr(self, name)), "True or False")
        if self.tokens_per_expert is not None:
            self._check_counts(where)
        elif self.active_experts is not None:
            check_positive(where, active_experts=self.active_experts)
            if not (most := min(self.num_experts, self.num_rows)) >= self.active_experts >= self.top_k:
                wanted = f"top_k to min(num_experts, num_tokens * top_k): {self.top_k} to {most}"
                raise argument_error(where, "active_experts", self.active_experts, wanted)

    def _check_counts(self, where: str) -> None:
        counts = self.tokens_per_expert
        if not isinstance(counts, Sequence) or len(counts) != self.num_experts:
            was = f"of {len(counts)} entries" if isinstance(counts, Sequence) else f"a {type(counts).__name__}"
            raise argument_error(where, "tokens_per_expert", was, f"a sequence of num_experts = {self.num_experts}")
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self.num_tokens:
                wanted = f"integers from 0 to num_tokens = {self.num_tokens}"
                raise argument_error(where, "tokens_per_expert", f"a sequence with {count!r}", wanted)
        if not any(counts):
            raise argument_error(where, "tokens_per_expert", "all zeros", "at least one row")
        if self.active_experts is not None:
            raise argument_error(where, "active_experts", repr(self.active_experts), "None beside tokens_per_expert")
        object.__setattr__(self, "tokens_per_expert", tuple(counts))

    @property
    def up_rows(self) -> int:
        """U, the rows of one expert's up projection."""
        return 2 * self.intermediate_size if self.gated else self.intermediate_size

    @property
    def num_rows(self) -> int:
        """R, routed rows."""
        return self.num_tokens * self.top_k if self.tokens_per_expert is None else sum(self.tokens_per_expert)

    @property
    def num_active_experts(self) -> int:
        """E', experts that at least one row reaches."""
        if self.tokens_per_expert is not None:
            return sum(count > 0 for count in self.tokens_per_expert)
        return self.active_experts or min(self.num_experts, self.num_rows)

    @property
    def padded_rows(self) -> int:
        """R', rows with tile padding; exact with ``tokens_per_expert``, or where each active expert has every token.

        Else what is expected of counts whose remainders by M are uniform: (M - 1) / 2 rows more for each active expert,
        which has at least one tile.
        """
        tile, active = self.tile_rows, self.num_active_experts
        counts = self.tokens_per_expert
        if counts is None and self.num_rows == active * self.num_tokens:
            counts = (self.num_tokens,) * active
        if counts is not None:
            return sum(-(-count // tile) * tile for count in counts)
        return max(active * tile, self.num_rows + (active * (tile - 1) + 1) // 2)

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of a matrix."""
        return _BYTES_PER_VALUE[_dtype_name(self.dtype)]

    @property
    def score_bytes(self) -> int:
        """Bytes of one score, logit or entry of dS."""
        return max(4, self.value_bytes)

    @property
    def gathered_rows(self) -> int:
        """G, rows of a gathered operand that come from memory."""
        return self.num_rows if self.gather == "rows" else min(self.num_tokens, self.num_rows)


# One function per op, as in the table above.


def _up_proj(layer: Layer, need_h: bool | None = None) -> Cost:
    size, rows, width_u, active = layer.value_bytes, layer.num_rows, layer.up_rows, layer.num_active_experts
    weights = active * width_u * (layer.hidden_size + layer.bias)
    kept = rows * width_u if (layer.need_h if need_h is None else need_h) else 0
    return Cost(
        2 * layer.padded_rows * width_u * layer.hidden_size,
        size * (layer.gathered_rows * layer.hidden_size + weights) + 4 * rows + _offset_bytes(layer),
        size * (kept + rows * layer.intermediate_size),
    )


def _down_proj(layer: Layer) -> Cost:
    size, rows, width_n = layer.value_bytes, layer.num_rows, layer.intermediate_size
    weights = layer.num_active_experts * layer.hidden_size * (width_n + layer.bias)
    return Cost(
        2 * layer.padded_rows * layer.hidden_size * width_n,
        size * (rows * width_n + weights) + _offset_bytes(layer),
        size * rows * layer.hidden_size,
    )


def _combine(layer: Layer, scored: bool = True) -> Cost:
    row_bytes = layer.value_bytes * layer.hidden_size + 4 + (layer.score_bytes if scored else 0)
    read = layer.num_rows * row_bytes + 4 * (layer.num_tokens + 1)
    return Cost(0, read, layer.value_bytes * layer.num_tokens * layer.hidden_size)


def _down_proj_bwd_input(layer: Layer) -> Cost:
    size, rows, width_n = layer.value_bytes, layer.num_rows, layer.intermediate_size
    weights = layer.num_active_experts * layer.hidden_size * (width_n + layer.bias)
    values = layer.gathered_rows * layer.hidden_size + rows * layer.up_rows + weights
    return Cost(
        2 * layer.padded_rows * layer.hidden_size * width_n,
        size * values + (layer.score_bytes + 4) * rows + _offset_bytes(layer),
        size * rows * (layer.up_rows + width_n) + layer.score_bytes * rows,
    )


def _down_proj_bwd_weight(layer: Layer) -> Cost:
    scores = Cost(bytes_read=layer.score_bytes * layer.num_rows if layer.bias else 0)
    return scores + _bwd_weight(layer, layer.intermediate_size, bias_width=layer.hidden_size)


def _up_proj_bwd_input(layer: Layer) -> Cost:
    size, rows, width_u = layer.value_bytes, layer.num_rows, layer.up_rows
    return Cost(
        2 * layer.padded_rows * width_u * layer.hidden_size,
        size * width_u * (rows + layer.num_active_experts * layer.hidden_size) + _offset_bytes(layer),
        size * rows * layer.hidden_size,
    )


def _bwd_weight(layer: Layer, width: int, bias_width: int) -> Cost:
    """Contract gathered (R, D) with (R, ``width``) per expert."""
    size, rows = layer.value_bytes, layer.num_rows
    return Cost(
        2 * rows * layer.hidden_size * width,
        size * (layer.gathered_rows * layer.hidden_size + rows * width) + 4 * rows + _offset_bytes(layer),
        size * layer.num_experts * (layer.hidden_size * width + (bias_width if layer.bias else 0)),
    )


def _topk_softmax(layer: Layer, is_bwd: bool = False) -> Cost:
    table, chosen = layer.score_bytes * layer.num_experts, (2 * layer.score_bytes + 4) * layer.top_k
    read, written = layer.num_tokens * table, layer.num_tokens * chosen
    load = 4 * layer.num_experts * load_columns(layer.num_tokens, layer.top_k)
    return Cost(0, written, read) if is_bwd else Cost(0, read, written + load)


def _build_plan(layer: Layer) -> Cost:
    is_topk = layer.num_rows == layer.num_tokens * layer.top_k
    written = _offset_bytes(layer) + 12 * layer.num_rows + 4 * (layer.num_tokens + 1)
    return Cost(0, (4 if is_topk else 8) * layer.num_rows, written)


def _offset_bytes(layer: Layer) -> int:
    return 4 * (layer.num_experts + 1)


_COSTS: dict[str, Callable[[Layer], Cost]] = {
    "up_proj": _up_proj,
    "down_proj": _down_proj,
    "down_proj_bwd_input": _down_proj_bwd_input,
    "down_proj_bwd_weight": _down_proj_bwd_weight,
    "up_proj_bwd_input": _up_proj_bwd_input,
    "up_proj_bwd_weight": lambda layer: _bwd_weight(layer, layer.up_rows, bias_width=layer.up_rows),
    "combine": _combine,
    "experts": lambda layer: _total(_pass_costs(layer, "forward")),
    "experts_bwd": lambda layer: _total(_pass_costs(layer, "backward")),
    "topk_softmax": _topk_softmax,
    "topk_softmax_bwd": lambda layer: _topk_softmax(layer, is_bwd=True),
    "best_of_columns": lambda layer: Cost(0, _topk_softmax(layer).bytes_read, 16 * layer.num_rows),
    "build_plan": _build_plan,
}
OPS = tuple(_COSTS)
_SINGLE_OPS = tuple(op for op in OPS if not op.startswith("experts"))


def _pass_costs(layer: Layer, passes: str, with_routing: bool = False) -> list[tuple[str, Cost]]:
    """Each op that the experts run, in order, with its cost; with those of routing before and after."""
    ops = (*(("topk_softmax", "build_plan") if with_routing else ()), "up_proj", "down_proj", "combine")
    costs = [(op, _COSTS[op](layer)) for op in ops if passes != "backward"]
    if passes != "forward":
        if not layer.need_h:
            costs.append(("up_proj", _up_proj(layer, need_h=True)))
        costs += [(op, _COSTS[op](layer)) for op in OPS if "_bwd_" in op]
        costs.append(("combine", _combine(layer, scored=False)))
        costs += [("topk_softmax_bwd", _topk_softmax(layer, is_bwd=True))] if with_routing else []
    return costs


def _total(costs: Iterable[tuple[str, Cost]]) -> Cost:
    return sum((cost for _, cost in costs), Cost())


def op_cost(op: str, layer: Layer) -> Cost:
    """FLOP and least bytes of one op in ``layer``, by the table of :mod:`sonic.roofline`.

    Args:
        op: a name in :data:`OPS`, as in :mod:`sonic.kernels.ops`; ``"combine"`` is that of forward, with scores.
        layer: sizes and options.

    Raises:
        ValueError: unknown op.
    """
    check_choice("sonic.roofline.op_cost", "op", op, OPS)
    return _COSTS[op](layer)


def ridge_intensity(chip: Chip | str, dtype: torch.dtype | str = torch.bfloat16) -> float:
    """FLOP per byte above which ``chip`` is bound by compute rather than by its memory.

    Raises:
        ValueError: unknown chip; a dtype that it has no figure for.
    """
    where = "sonic.roofline.ridge_intensity"
    chip = _chip_named(where, chip)
    return _peak(where, chip, dtype) / chip.memory_bytes_per_second


def bound_time(cost: Cost, chip: Chip | str, dtype: torch.dtype | str = torch.bfloat16) -> float:
    """Least seconds that ``cost`` takes on ``chip``: the larger of FLOP over FLOP/s and bytes over bytes/s.

    Args:
        cost: of one op; a sum of ops is bound by the sum of their times, see :func:`layer_bound`.
        chip: a name in :data:`CHIPS`, or a chip of your own.
        dtype: of the products' operands: a torch dtype or its name, ``"tfloat32"`` or ``"float8"``.

    Raises:
        ValueError: unknown chip; a dtype that it has no figure for.
    """
    return max(_times("sonic.roofline.bound_time", cost, chip, dtype))


def bounded_by(cost: Cost, chip: Chip | str, dtype: torch.dtype | str = torch.bfloat16) -> str:
    """The resource that :func:`bound_time` waits for: ``"compute"`` or ``"memory"``; at the ridge, ``"compute"``.

    Raises:
        ValueError: unknown chip; a dtype that it has no figure for.
    """
    compute, memory = _times("sonic.roofline.bounded_by", cost, chip, dtype)
    return "compute" if compute >= memory else "memory"


@dataclass(frozen=True)
class OpBound:
    """Bound of one op within a pass.

    Attributes:
        op: its name.
        cost: FLOP and bytes.
        seconds: least time, see :func:`bound_time`.
        bounded_by: ``"compute"`` or ``"memory"``.
    """

    op: str
    cost: Cost
    seconds: float
    bounded_by: str


@dataclass(frozen=True)
class Bound:
    """Bound of a pass: ops that run one after another, each at its own limit.

    Attributes:
        ops: in the order in which they run.
        useful_flops: FLOP that the result needs: without tile padding, without H computed again.
    """

    ops: tuple[OpBound, ...]
    useful_flops: int

    @property
    def seconds(self) -> float:
        """Least seconds of the pass."""
        return math.fsum(op.seconds for op in self.ops)

    @property
    def cost(self) -> Cost:
        """FLOP and bytes of all ops."""
        return sum((op.cost for op in self.ops), Cost())

    @property
    def flops_per_second(self) -> float:
        """Useful FLOP/s at the bound: what a measured rate is compared with."""
        return self.useful_flops / self.seconds


def layer_bound(layer: Layer, chip: Chip | str, passes: str = "both", *, with_routing: bool = False) -> Bound:
    """Least time of the experts of ``layer`` on ``chip``, op by op.

    Ops run one after another and share nothing through caches; a kernel that fuses two of them can do better.

    Args:
        layer: sizes and options; its dtype is the one computed in.
        chip: a name in :data:`CHIPS`, or a chip of your own.
        passes: ``"forward"``, ``"backward"`` or ``"both"``.
        with_routing: ``topk_softmax`` and ``build_plan`` come before the forward pass, ``topk_softmax_bwd`` after the
            backward pass; not the router's own products.

    Raises:
        ValueError: unknown chip or pass; a dtype that the chip has no figure for.
    """
    where = "sonic.roofline.layer_bound"
    check_choice(where, "passes", passes, ("forward", "backward", "both"))
    _peak(where, _chip_named(where, chip), layer.dtype)
    bounds = [
        OpBound(op, cost, bound_time(cost, chip, layer.dtype), bounded_by(cost, chip, layer.dtype))
        for op, cost in _pass_costs(layer, passes, with_routing)
    ]
    useful = _total(_pass_costs(replace(layer, tile_rows=1, need_h=True), passes))
    return Bound(tuple(bounds), useful.flops)


def fraction_of_bound(measured_seconds: float, bound: Bound | float) -> float:
    """Part of the bound that a measurement attains: least seconds over measured seconds, 1 at the bound.

    More than 1 means that the bound was none: tokens found in L2 with ``gather="rows"``, or ops fused in one kernel.

    Args:
        measured_seconds: of the same ops on the same chip.
        bound: from :func:`layer_bound`, or seconds from :func:`bound_time`.

    Raises:
        ValueError: seconds that are no positive, finite numbers.
    """
    where = "sonic.roofline.fraction_of_bound"
    least = bound.seconds if isinstance(bound, Bound) else bound
    for name, seconds in (("measured_seconds", measured_seconds), ("bound", least)):
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise argument_error(where, name, repr(seconds), "a positive, finite number of seconds")
    return least / measured_seconds


def compute_bound_tokens(op: str, layer: Layer, chip: Chip | str) -> float:
    """Mean rows per expert from which on ``op`` is bound by compute: enough of them share each read of the weights.

    All experts are active and tiles are ideal, whatever ``layer`` says about them and about its tokens.

    Args:
        op: a single op's name; not ``"experts"`` or ``"experts_bwd"``, whose ops have a threshold each.
        layer: widths, experts and options.
        chip: a name in :data:`CHIPS`, or a chip of your own.

    Returns:
        Rows per expert, T K / E; ``math.inf`` if a row brings more bytes than its FLOP hide, as with narrow experts.

    Raises:
        ValueError: unknown op or chip; a dtype that the chip has no figure for.
    """
    where = "sonic.roofline.compute_bound_tokens"
    check_choice(where, "op", op, _SINGLE_OPS)
    # With all experts active both times are affine in T: two points give the lines, and with them where they cross.
    tokens = layer.num_experts
    ideal = replace(layer, num_tokens=tokens, tile_rows=1, tokens_per_expert=None, active_experts=None)
    compute, memory = _times(where, _COSTS[op](ideal), chip, layer.dtype)
    compute_2, memory_2 = _times(where, _COSTS[op](replace(ideal, num_tokens=2 * tokens)), chip, layer.dtype)
    gain_per_token = ((compute_2 - compute) - (memory_2 - memory)) / tokens
    if gain_per_token <= 0:
        return math.inf
    crossing = (2 * memory - memory_2) / gain_per_token  # compute takes no time at T = 0
    return crossing * layer.top_k / layer.num_experts


def _times(where: str, cost: Cost, chip: Chip | str, dtype: torch.dtype | str) -> tuple[float, float]:
    """Seconds of compute and of memory."""
    chip = _chip_named(where, chip)
    if not isinstance(cost, Cost):
        raise argument_error(where, "cost", f"a {type(cost).__name__}", "a sonic.roofline.Cost")
    return cost.flops / _peak(where, chip, dtype), cost.bytes / chip.memory_bytes_per_second


def _chip_named(where: str, chip: Chip | str) -> Chip:
    if isinstance(chip, Chip):
        return chip
    check_choice(where, "chip", chip, tuple(CHIPS))
    return CHIPS[chip]


def _peak(where: str, chip: Chip, dtype: torch.dtype | str) -> float:
    name = _dtype_name(dtype)
    if name not in chip.flops_per_second:
        wanted = f"one that {chip.name} has a figure for: " + ", ".join(map(repr, chip.flops_per_second))
        raise argument_error(where, "dtype", repr(name), wanted)
    return chip.flops_per_second[name]


def _dtype_name(dtype: torch.dtype | str) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``; ``"float8"`` for each of torch's 8-bit floats."""
    name = str(dtype).removeprefix("torch.")
    return "float8" if isinstance(dtype, torch.dtype) and name.startswith("float8_") else name
