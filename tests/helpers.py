"""Problems, grids of shapes, oracles and the one measure of error that the kernel tests share.

Three ways to compute the same layer, none of which uses a line of ``sonic``:

* :func:`dense_loop` is the formula, one token and one expert at a time;
* :func:`torch_experts` is what a user of plain torch would write, one expert at a time: in the dtype of the problem it
  is the measure of how wrong one may be, in float64 it replaces :func:`dense_loop` where a token loop is too slow;
* autograd differentiates both.

Letters as in ``sonic/shapes.py``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sonic
from sonic.kernels import dispatch
from sonic.kernels.reference import activation as reference_activation
from sonic.kernels.reference import blocks as reference_blocks

GATED = ("swiglu", "geglu", "reglu", "swiglu_oai")
PLAIN = ("gelu", "relu", "relu2", "silu")
LAYOUTS = ("concatenated", "interleaved")
SAVE_MODES = ("preactivation", "input")
BIASES = (False, True)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)
LEAVES = ("x", "w1", "w2", "scores", "b1", "b2")

# Plain activations have one layout; the other name is tried once, to see that it changes nothing.
ACTIVATION_LAYOUTS = [(name, layout) for name in GATED for layout in LAYOUTS] + [
    *((name, "concatenated") for name in PLAIN),
    ("silu", "interleaved"),
]

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def short(dtype: torch.dtype) -> str:
    """``fp32`` for ``torch.float32``: how a dtype reads in a test's id."""
    return _SHORT[dtype]


# Shapes


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem.

    Attributes:
        T, D, N, E, K: as in ``sonic/shapes.py``.
        why: the edge that, of its grid, this entry alone covers.
        routing: see :func:`choose_experts`.
    """

    T: int
    D: int
    N: int
    E: int
    K: int
    why: str
    routing: str = "random"

    def __str__(self) -> str:
        suffix = "" if self.routing == "random" else f"-{self.routing}"
        return f"T{self.T}-D{self.D}-N{self.N}-E{self.E}-K{self.K}{suffix}"


QUICK = (
    Shape(257, 64, 48, 5, 3, "T one more than a power of two; E and K odd; several experts with many rows each"),
    Shape(0, 16, 8, 4, 2, "no token at all"),
    Shape(1, 32, 16, 8, 2, "one token, so that most experts have no row and the others one"),
    Shape(7, 100, 133, 7, 1, "K = 1; D and N no multiple of 8; fewer rows than a vector register holds"),
    Shape(33, 170, 341, 3, 3, "K = E: every expert has every token, in order"),
    Shape(64, 48, 32, 6, 2, "the same K experts take every row, the others none", "same"),
    Shape(40, 24, 40, 11, 2, "first and last expert empty, and every other one between", "gaps"),
)

FULL = (
    *QUICK,
    Shape(50, 600, 20, 13, 4, "D much larger than N; E prime; D wider than one vector block"),
    Shape(50, 20, 600, 2, 2, "N much larger than D"),
    Shape(1, 1, 1, 1, 1, "every size 1"),
    Shape(129, 133, 170, 17, 5, "more experts than a token's fair share; nothing a multiple of anything"),
    Shape(600, 16, 8, 2, 1, "K = 1 with two large experts", "same"),
)


def shape_ids(shapes: tuple[Shape, ...], *dtypes: torch.dtype) -> list[Any]:
    """``pytest.param`` of (shape, dtype), or of the shape alone without dtypes: ``T257-D64-N48-E5-K3-fp32``."""
    if not dtypes:
        return [pytest.param(shape, id=str(shape)) for shape in shapes]
    return [pytest.param(shape, dtype, id=f"{shape}-{short(dtype)}") for shape in shapes for dtype in dtypes]


# Problems


@dataclass
class Problem:
    """Inputs of one layer, on unit scale, and what came of routing them.

    Attributes:
        x: (T, D).
        w1, w2: (E, U, D) and (E, D, N), scaled so that H and Y are of order 1.
        b1, b2: (E, U) and (E, D), or None.
        scores: (T, K), float32 (float64 in a float64 problem).
        expert_index: (T, K) int64.
        dout: (T, D), the gradient to send back.
    """

    x: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    scores: Tensor
    expert_index: Tensor
    dout: Tensor
    activation: str
    glu_layout: str

    @property
    def plan(self) -> sonic.RoutingPlan:
        """The plan of these experts."""
        return sonic.RoutingPlan.from_topk(self.expert_index, self.w1.shape[0])

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``sonic.moe_mlp`` and of the oracles; not the biases, which are leaves."""
        return {"activation": self.activation, "glu_layout": self.glu_layout}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaves that require gradients, by name, in ``dtype`` if it is given; without biases that are None."""
        values = {name: getattr(self, name) for name in LEAVES}
        return {
            name: value.detach().to(value.dtype if dtype is None else dtype, copy=True).requires_grad_()
            for name, value in values.items()
            if value is not None
        }

    def grouped(self) -> Grouped:
        """The same rows, grouped by expert as a dispatcher would send them."""
        expert_R, slot_R = torch.sort(self.expert_index.reshape(-1), stable=True)
        token_R = slot_R // max(self.expert_index.shape[1], 1)
        return Grouped(
            self.x[token_R],
            self.scores.reshape(-1)[slot_R],
            torch.bincount(expert_R, minlength=self.w1.shape[0]),
            token_R,
            expert_R,
            slot_R,
        )


@dataclass
class Grouped:
    """Rows of a problem grouped by expert, and the maps to tokens, experts and slots."""

    rows: Tensor
    row_scores: Tensor
    tokens_per_expert: Tensor
    token_of_row: Tensor
    expert_of_row: Tensor
    slot_of_row: Tensor


def make_problem(
    T: int,
    D: int,
    N: int,
    E: int,
    K: int,
    dtype: torch.dtype = torch.float64,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    bias: bool = False,
    seed: int = 0,
    routing: str = "random",
) -> Problem:
    """Random inputs on unit scale: a gradient that is wrong is wrong by something that no tolerance covers.

    ``swiglu_oai`` gets larger up projections, so that its clamps at 7 are met.

    Args:
        T, D, N, E, K: sizes.
        dtype: of everything but the scores, which are at least float32.
        activation, glu_layout: as in ``sonic.moe_mlp``.
        bias: with b1 and b2.
        seed: of the random numbers.
        routing: see :func:`choose_experts`.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(dtype)

    U = 2 * N if activation in GATED else N
    spread = 4.0 if activation == "swiglu_oai" else 1.0
    scores = torch.rand(T, K, generator=draw, dtype=torch.float64) + 0.1
    return Problem(
        x=normal(T, D),
        w1=normal(E, U, D, scale=spread / math.sqrt(D)),
        w2=normal(E, D, N, scale=1 / math.sqrt(N)),
        b1=normal(E, U, scale=0.5) if bias else None,
        b2=normal(E, D, scale=0.5) if bias else None,
        scores=scores.to(torch.promote_types(dtype, torch.float32)),
        expert_index=choose_experts(T, E, K, routing, draw),
        dout=normal(T, D),
        activation=activation,
        glu_layout=glu_layout,
    )


def problem_of(shape: Shape, dtype: torch.dtype = torch.float64, **options: Any) -> Problem:
    """:func:`make_problem` for an entry of a grid."""
    return make_problem(
        shape.T, shape.D, shape.N, shape.E, shape.K, dtype, **{"routing": shape.routing, "seed": 1, **options}
    )


def choose_experts(T: int, E: int, K: int, routing: str, draw: torch.Generator) -> Tensor:
    """(T, K) int64 experts, none twice in a row of it.

    ``"random"``: any; ``"same"``: every token goes to the same K, which with K = 1 is one expert with all rows;
    ``"gaps"``: only experts 1, 3, 5, … short of the last, so that the first, the last and those between are empty.
    """
    if routing == "same":
        return torch.randperm(E, generator=draw)[:K].expand(T, K).contiguous()
    allowed = torch.arange(1, E - 1, 2) if routing == "gaps" else torch.arange(E)
    if len(allowed) < K:
        raise ValueError(f"routing {routing!r} leaves {len(allowed)} of {E} experts for K = {K}")
    return allowed[torch.rand(T, len(allowed), generator=draw).argsort(dim=1)[:, :K]]


# Oracles


def dense_loop(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scores: Tensor,
    expert_index: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str,
    glu_layout: str,
) -> Tensor:
    """``O_t = sum over k of s_tk (W2[e] act(W1[e] x_t + b1[e]) + b2[e])`` with e the k-th expert of t, nothing else."""
    outputs = []
    up, down = w1.unbind(), w2.unbind()  # once: each w1[e] would cost a gradient of the size of all experts
    for x_D, scores_K, experts in zip(x.unbind(), scores.unbind(), expert_index.tolist(), strict=True):
        total = torch.zeros_like(x_D)
        for s, e in zip(scores_K.unbind(), experts, strict=True):
            h = up[e] @ x_D
            if b1 is not None:
                h = h + b1[e]
            y = down[e] @ formula(activation, glu_layout, h)
            if b2 is not None:
                y = y + b2[e]
            total = total + s * y
        outputs.append(total)
    return torch.stack(outputs) if outputs else x * 0


def formula(activation: str, glu_layout: str, h: Tensor) -> Tensor:
    """The activations as they are defined, of (..., U) -> (..., N)."""

    def sigmoid(v: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-v))

    def positive(v: Tensor) -> Tensor:
        return torch.where(v > 0, v, torch.zeros_like(v))

    def gaussian(v: Tensor) -> Tensor:
        return v * (1 + torch.erf(v / math.sqrt(2))) / 2

    if activation in PLAIN:
        return {
            "gelu": gaussian,
            "relu": positive,
            "relu2": lambda v: positive(v) ** 2,
            "silu": lambda v: v * sigmoid(v),
        }[activation](h)
    n = h.shape[-1] // 2
    if glu_layout == "concatenated":
        gate, up = h[..., :n], h[..., n:]
    else:
        pairs = h.reshape(*h.shape[:-1], n, 2)
        gate, up = pairs[..., 0], pairs[..., 1]
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * sigmoid(1.702 * gate) * (up + 1)
    return {"swiglu": lambda v: v * sigmoid(v), "geglu": gaussian, "reglu": positive}[activation](gate) * up


def torch_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scores: Tensor,
    expert_index: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str,
    glu_layout: str,
) -> Tensor:
    """The layer as plain torch does it well: per expert, in the dtype of ``x``, scores and sums in at least float32."""
    out = x.new_zeros(x.shape, dtype=scores.dtype)
    for e in range(w1.shape[0]):
        token, k = torch.where(expert_index == e)
        if len(token) == 0:
            continue
        h = F.linear(x[token], w1[e], None if b1 is None else b1[e])
        y = F.linear(torch_activation(activation, glu_layout, h), w2[e], None if b2 is None else b2[e])
        out = out.index_add(0, token, y * scores[token, k][:, None])
    return out.to(x.dtype)


def torch_activation(activation: str, glu_layout: str, h: Tensor) -> Tensor:
    """The activations as torch's own functions compute them, of (R, U) -> (R, N)."""
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "geglu": F.gelu,
        "relu": F.relu,
        "reglu": F.relu,
        "relu2": lambda v: F.relu(v).square(),
        "silu": F.silu,
        "swiglu": F.silu,
    }
    if activation in PLAIN:
        return plain[activation](h)
    gate, up = h.chunk(2, dim=-1) if glu_layout == "concatenated" else (h[:, 0::2], h[:, 1::2])
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return plain[activation](gate) * up


def results(layer: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """``out`` and the gradient of every leaf by an oracle, on the problem's values, computed in ``dtype``."""
    leaves = problem.leaves(dtype)
    out = layer(**leaves, expert_index=problem.expert_index, **problem.options)
    return {"out": out.detach()} | gradients(out, leaves, problem.dout)


def sonic_results(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """``out`` and the gradient of every leaf by ``sonic.moe_mlp``."""
    leaves = problem.leaves()
    out = sonic.moe_mlp(**leaves, plan=problem.plan, **{**problem.options, **options})
    return {"out": out.detach()} | gradients(out, leaves, problem.dout)


def gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    """Gradients by the name of the leaf; a leaf without influence (no token, say) has zeros."""
    if not out.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


# Errors


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|`` in the Euclidean norm and float64; infinite where one is not finite and the other is.

    Two empty tensors do not differ; against all zeros the error is absolute.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    if not torch.isfinite(got).all():
        return math.inf
    size = torch.linalg.vector_norm(want).item()
    error = torch.linalg.vector_norm(got - want).item()
    return error / size if size else error


def largest_error(got: Tensor, want: Tensor) -> float:
    """The largest ``|got - want|`` over the root mean square of ``want``: one wrong element cannot hide among many."""
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    if not torch.isfinite(got).all():
        return math.inf
    size = want.square().mean().sqrt().item()
    error = (got - want).abs().max().item()
    return error / size if size else error


def assert_close(name: str, got: Tensor, reference64: Tensor, tolerance: float = 1e-12) -> None:
    """Both errors within ``tolerance``; for float64 against the formula."""
    both = max(relative_error(got, reference64), largest_error(got, reference64))
    assert both <= tolerance, f"{name}: error {both:.3g} > {tolerance:.3g}; {_worst(got, reference64)}"


def assert_as_good_as_torch(
    name: str, got: Tensor, reference64: Tensor, same_dtype: Tensor, dtype: torch.dtype | None = None
) -> None:
    """As right as plain torch in the same dtype, both measured against float64, on the whole and at the worst element.

    On the whole at most twice torch's error; the largest of many errors scatters more, so there it is four times. The
    floor, a third of the dtype's epsilon, is about what rounding the exact result once costs. Torch's error on a
    handful of values can be small by luck, so the floor rises as their number falls (fourfold for 2, by 13% for 1,000).

    Args:
        name: what is compared, for the message.
        got: ours, in any dtype.
        reference64: the result in float64.
        same_dtype: torch's own.
        dtype: that was computed in, if it is not the dtype of ``same_dtype`` (scores are float32 beside bf16 matrices).
    """
    dtype = dtype or same_dtype.dtype
    epsilon = torch.finfo(dtype).eps * (1 + 4 / math.sqrt(max(got.numel(), 1)))
    for measure, factor, floor in ((relative_error, 2.0, epsilon / 3), (largest_error, 4.0, 2 * epsilon)):
        ours, theirs = measure(got, reference64), measure(same_dtype, reference64)
        assert ours <= factor * theirs + floor, (
            f"{name}: {measure.__name__} {ours:.3g} is more than {factor:g} x torch's {theirs:.3g} + {floor:.3g}; "
            f"shape {tuple(got.shape)}, {short(dtype)}; {_worst(got, reference64)}, "
            f"where torch has {_at_worst(got, reference64, same_dtype):.9g}"
        )


def assert_all_as_good_as_torch(
    ours: dict[str, Tensor], reference64: dict[str, Tensor], same_dtype: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """:func:`assert_as_good_as_torch` for a result and its gradients, each by name."""
    assert list(ours) == list(reference64) == list(same_dtype)
    for name, got in ours.items():
        assert got.dtype == same_dtype[name].dtype, f"{name}: {got.dtype}, expected {same_dtype[name].dtype}"
        assert_as_good_as_torch(name, got, reference64[name], same_dtype[name], dtype)


def assert_all_close(got: dict[str, Tensor], reference64: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """:func:`assert_close` for a result and its gradients, each by name."""
    assert list(got) == list(reference64)
    for name, tensor in got.items():
        assert_close(name, tensor, reference64[name], tolerance)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """Run them at once; the first error of any is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal to the last bit, by name."""
    assert list(got) == list(want)
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), f"{name}: {_worst(tensor, want[name])}"


def _worst_index(got: Tensor, want: Tensor) -> tuple[int, ...]:
    difference = (got.detach().double() - want.detach().double()).abs().nan_to_num(nan=math.inf)
    return tuple(int(i) for i in torch.unravel_index(difference.argmax(), got.shape))


def _worst(got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape or got.numel() == 0:
        return f"shapes {tuple(got.shape)} and {tuple(want.shape)}"
    index = _worst_index(got, want)
    return f"worst at {index}: got {got[index].item():.9g}, expected {want[index].item():.9g}"


def _at_worst(got: Tensor, want: Tensor, other: Tensor) -> float:
    return other[_worst_index(got, want)].item() if got.numel() else math.nan


# Both ways of the reference through 16-bit dtypes, blocks so small that an expert has many, both kinds of whole pass


def take_16bit_path(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Multiply 16-bit operands in float32 (``"widened"``) or as they are (``"native"``), whatever this CPU prefers."""
    fast = frozenset(HALVES if path == "native" else ())
    monkeypatch.setattr(reference_blocks, "_fast_16bit_dtypes", lambda: fast)


def make_blocks_small(monkeypatch: pytest.MonkeyPatch, rows: int = 5) -> None:
    """At most ``rows`` rows per block and two per slice of the activation, so that every expert has several of each."""
    monkeypatch.setattr(reference_blocks, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(reference_blocks, "_MIN_BLOCK_ROWS", rows)
    monkeypatch.setattr(reference_blocks, "_MAX_16BIT_CONTRACTION_ROWS", rows)
    monkeypatch.setattr(reference_activation, "_slice_rows", lambda width: 2)


def chain_single_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``experts`` and ``experts_bwd`` of their single ops, as for a backend without a whole pass of its own."""
    monkeypatch.setattr(dispatch, "has_kernel", lambda request, backend: False)
