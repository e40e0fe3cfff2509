"""How wrong every backend is, beside torch: ``python -m benchmarks.numerics``.

One layer of experts with biases, forward and backward, on kinds of inputs from tame to hostile (:data:`KINDS`), by
every backend that runs on this machine in every dtype it has, and by what torch offers. All get the same inputs,
already rounded to the dtype; what is exact is computed from those in a wider type, by the formula, without autograd.

Two measures for the output and for each gradient, relative to the exact one: the Euclidean norm of the error over the
norm of what is exact, and the largest error over the root mean square. For inputs of wide range each row counts alike:
root mean square, and largest, of the rows' own relative errors.

``--write docs/numerics.md`` puts the tables between the markers of the page; ``--check`` computes them anew and names
every error that has grown beyond :func:`allowed` times the page's figure.

Triton is interpreted here and CuTe simulated: their sums, roundings and formulas are those of the kernels, the last
bits of ``exp`` and the order of summation within one product are not those of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sonic
from benchmarks.report import replace_file
from benchmarks.rivals import RIVALS, hf_grouped_mm_missing, refusal
from sonic.kernels import ops
from sonic.kernels.reference import blocks
from sonic.simulator import hopper

__all__ = [
    "CONTENDERS",
    "KINDS",
    "DTYPES",
    "MARKERS",
    "NO_BIASES",
    "PAGE",
    "PROPERTIES",
    "PROPERTY_MARKERS",
    "PROPERTY_ROWS",
    "RESULTS",
    "SCALES",
    "SCORES",
    "SCORE_MARKERS",
    "SIZES",
    "Contender",
    "Problem",
    "Sizes",
    "allowed",
    "between",
    "errors",
    "exact",
    "filled",
    "grown",
    "main",
    "make_problem",
    "measured",
    "missing",
    "page_figures",
    "page_property_cells",
    "property_cells",
    "property_table",
    "report",
    "results",
    "rows",
    "score_errors",
    "score_table",
]

PAGE = Path(__file__).parent.parent / "docs/numerics.md"
MARKERS = ("<!-- numerics: begin -->", "<!-- numerics: end -->")
PROPERTY_MARKERS = ("<!-- same bits: begin -->", "<!-- same bits: end -->")
SCORE_MARKERS = ("<!-- scores: begin -->", "<!-- scores: end -->")
RESULTS = ("out", "x", "w1", "w2", "scores", "b1", "b2")
"""What is compared: the output, then the gradients of these."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# ---------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Sizes:
    """Tokens, widths, experts, experts per token."""

    T: int = 64
    D: int = 64
    N: int = 32
    E: int = 4
    K: int = 2

    def __str__(self) -> str:
        return f"(T, D, N, E, K) = ({self.T}, {self.D}, {self.N}, {self.E}, {self.K})"


SIZES = Sizes()


@dataclass(frozen=True)
class Problem:
    """Inputs of one layer with the SwiGLU activation: matrices in one dtype, scores in at least float32.

    Attributes:
        values: ``x`` (T, D), ``w1`` (E, 2N, D), ``w2`` (E, D, N), ``scores`` (T, K), ``b1`` (E, 2N), ``b2`` (E, D).
        expert_TK: int64.
        dout_TD: the gradient to send back.
        by_rows: each row counts alike in the error.
    """

    values: Mapping[str, Tensor]
    expert_TK: Tensor
    dout_TD: Tensor
    by_rows: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.dout_TD.dtype


class _Draw:
    """Random numbers in float64, the same for a seed on every machine."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.Generator(np.random.PCG64(seed))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(self._random.standard_normal(shape)) * scale

    def heavy(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Student's t with 3 degrees of freedom, scaled to variance 1: a few values are 10 to 50 times as large."""
        return torch.from_numpy(self._random.standard_t(3, shape)) * (scale / math.sqrt(3))

    def uniform(self, *shape: int) -> Tensor:
        return torch.from_numpy(self._random.random(shape)) + 0.1

    def powers(self, size: int, most: int) -> Tensor:
        """(size, 1) powers of two from 2^-most to 2^most."""
        return torch.from_numpy(2.0 ** self._random.integers(-most, most + 1, (size, 1)).astype(float))

    def experts(self, sizes: Sizes) -> Tensor:
        """(T, K), none twice in a row."""
        return torch.from_numpy(self._random.random((sizes.T, sizes.E))).argsort(1)[:, : sizes.K].contiguous()


def _unit(draw: _Draw, sizes: Sizes, normal: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    T, D, N, E, K = sizes.T, sizes.D, sizes.N, sizes.E, sizes.K
    values = {
        "x": normal(T, D),
        "w1": normal(E, 2 * N, D, scale=D**-0.5),
        "w2": normal(E, D, N, scale=N**-0.5),
        "scores": draw.uniform(T, K),
        "b1": normal(E, 2 * N, scale=0.5),
        "b2": normal(E, D, scale=0.5),
    }
    return values, draw.experts(sizes), normal(T, D)


def _unit_scale(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    return _unit(draw, sizes, draw.normal)


def _heavy_tailed(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    return _unit(draw, sizes, draw.heavy)


def _cancelling_products(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    values, expert_TK, dout_TD = _unit(draw, sizes, draw.normal)
    half = sizes.D // 2
    values["x"] += 32
    values["w1"][..., half:] = -values["w1"][..., :half]
    dout_TD = dout_TD + 32
    values["w2"][:, half:] = -values["w2"][:, :half]
    values["b2"][:, half:] = -values["b2"][:, :half]
    return values, expert_TK, dout_TD


def _cancelling_sums(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    values, expert_TK, dout_TD = _unit(draw, sizes, draw.normal)
    small = 2.0**-6
    for name, sign in (("w1", 1), ("b1", 1), ("w2", -1), ("b2", -1)):
        other = values[name][::2]
        values[name][1::2] = sign * other * (1 + small * draw.normal(*other.shape))
    first_T = expert_TK[:, 0] // 2 * 2
    first_T[1::2] = first_T[::2]
    expert_TK = torch.stack([first_T + k for k in range(2)], dim=1)
    values["x"][1::2] = values["x"][::2]
    values["scores"] = values["scores"][:, :1] * (1 + small * draw.normal(sizes.T, 2))
    values["scores"][1::2] = values["scores"][::2]
    dout_TD[1::2] = -dout_TD[::2] * (1 + small * draw.normal(sizes.T // 2, sizes.D))
    return values, expert_TK, dout_TD


def _wide_range(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    values, expert_TK, dout_TD = _unit(draw, sizes, draw.normal)
    most = 3 if dtype == torch.float16 else 12
    values["x"] *= draw.powers(sizes.T, most)
    values["b1"] *= 2.0**-most
    values["b2"] *= 2.0**-most
    return values, expert_TK, dout_TD * draw.powers(sizes.T, most)


def _no_biases(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    values, expert_TK, dout_TD = _unit(draw, sizes, draw.normal)
    for name in ("b1", "b2"):
        values[name].zero_()
    return values, expert_TK, dout_TD


def _subnormal(draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    values, expert_TK, dout_TD = _unit(draw, sizes, draw.normal)
    scale = torch.finfo(dtype).tiny / 4
    values["w2"] *= scale * math.sqrt(sizes.N)
    values["b2"] *= scale
    return values, expert_TK, dout_TD


NO_BIASES = "no biases"
KINDS: dict[str, tuple[str, Callable[[_Draw, Sizes, torch.dtype], tuple[dict[str, Tensor], Tensor, Tensor]]]] = {
    "unit scale": ("normal; H, Y and all gradients are of order 1 to 10", _unit_scale),
    "heavy-tailed": ("Student's t with 3 degrees of freedom in place of the normal distribution", _heavy_tailed),
    "cancelling products": (
        "X and dO are 32 plus unit scale, and the second half of a weight's row undoes the first: terms of H and dA' "
        "are 30 times as large as their sums",
        _cancelling_products,
    ),
    "cancelling sums": (
        "tokens come in pairs with opposite gradients, experts in pairs with opposite outputs, equal to 1.6%: of each "
        "sum over tokens or experts little is left",
        _cancelling_sums,
    ),
    "wide range": (
        "each row of X and of dO has a scale of its own, 2^-12 to 2^12 (float16: 2^-3 to 2^3), biases are small; each "
        "row counts alike in the error",
        _wide_range,
    ),
    "subnormal": (
        "W2 and b2 lie below the smallest normal number of the dtype, so outputs do, and the gradients of X, W1, b1 "
        "and scores: a result that is flushed to zero has error 1",
        _subnormal,
    ),
    NO_BIASES: ("unit scale with biases of zero, for what has none", _no_biases),
}
"""Name -> what is drawn, and how."""


@functools.cache
def make_problem(kind: str, dtype: torch.dtype, sizes: Sizes = SIZES) -> Problem:
    """The inputs of this kind, rounded to ``dtype``; the scores at least to float32.

    Raises:
        KeyError: no such kind.
    """
    values, expert_TK, dout_TD = KINDS[kind][1](_Draw(), sizes, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rounded = {name: value.to(wide if name == "scores" else dtype) for name, value in values.items()}
    return Problem(rounded, expert_TK, dout_TD.to(dtype), by_rows=kind == "wide range")


# ---------------------------------------------------------------- what is exact


def exact(problem: Problem) -> dict[str, np.ndarray]:
    """Output and gradients by the formula, in NumPy: float64, or long double (64 bits of mantissa on x86) for float64.

    Shapes as those of the inputs, under the names of :data:`RESULTS`.
    """
    wide = np.longdouble if problem.dtype == torch.float64 else np.float64
    x, w1, w2, scores, b1, b2 = (
        problem.values[name].double().numpy().astype(wide) for name in ("x", "w1", "w2", "scores", "b1", "b2")
    )
    dout, expert = problem.dout_TD.double().numpy().astype(wide), problem.expert_TK.numpy()
    found = {name: np.zeros_like(value) for name, value in zip(RESULTS, (x, x, w1, w2, scores, b1, b2), strict=True)}
    for e in range(len(w1)):
        token, slot = np.nonzero(expert == e)
        score, dy = scores[token, slot][:, None], dout[token]
        gate, up = np.split(x[token] @ w1[e].T + b1[e], 2, axis=1)
        # 1 / (1 + exp(-gate)) without overflow
        decay = np.exp(-np.abs(gate))
        sigmoid = np.where(gate >= 0, 1, decay) / (1 + decay)
        value = gate * sigmoid
        a = value * up
        np.add.at(found["out"], token, score * (a @ w2[e].T + b2[e]))
        da = dy @ w2[e]
        found["scores"][token, slot] = (da * a).sum(1) + dy @ b2[e]
        found["w2"][e] = (score * dy).T @ a
        found["b2"][e] = (score * dy).sum(0)
        slope = sigmoid * (1 + gate * np.where(gate >= 0, decay, 1) / (1 + decay))
        dh = np.concatenate([score * da * up * slope, score * da * value], axis=1)
        found["w1"][e] = dh.T @ x[token]
        found["b1"][e] = dh.sum(0)
        np.add.at(found["x"], token, dh @ w1[e])
    return found


def errors(got: Mapping[str, Tensor], want: Mapping[str, np.ndarray], by_rows: bool = False) -> dict[str, Any]:
    """Name -> (error of the whole, largest error), as the head of this file says; infinite where a value is not finite.

    Args:
        got: results in any dtype.
        want: the exact ones.
        by_rows: of each row (the last dimension) the relative error; their root mean square and the largest.
    """
    found = {}
    for name, tensor in got.items():
        value = tensor.detach().double().numpy().astype(want[name].dtype)
        if not np.isfinite(value).all():
            found[name] = (math.inf, math.inf)
            continue
        off, size = np.abs(value - want[name]), np.abs(want[name])
        if by_rows:
            norms = np.sqrt((size**2).sum(-1))
            rows = (np.sqrt((off**2).sum(-1)) / np.where(norms > 0, norms, 1))[norms > 0]
            found[name] = (float(np.sqrt((rows**2).mean())), float(rows.max()))
        else:
            unit = size.max() or 1  # squares of subnormal numbers would vanish
            rms = unit * np.sqrt(((size / unit) ** 2).mean())
            found[name] = (float(unit * np.sqrt(((off / unit) ** 2).mean()) / rms), float(off.max() / rms))
    return found


# ---------------------------------------------------------------- contenders


def _torch_loop(v: Mapping[str, Tensor], expert_TK: Tensor) -> Tensor:
    """What a careful user of plain torch writes: per expert in the dtype of ``x``, scores and sums in float32."""
    out_TD = torch.zeros(v["x"].shape, dtype=v["scores"].dtype)
    parts = (v[name].unbind(0) for name in ("w1", "b1", "w2", "b2"))
    for e, (w1_UD, b1_U, w2_DN, b2_D) in enumerate(zip(*parts, strict=True)):
        token_M, k_M = torch.where(expert_TK == e)
        gate_MN, up_MN = F.linear(v["x"][token_M], w1_UD, b1_U).chunk(2, dim=-1)
        y_MD = F.linear(F.silu(gate_MN) * up_MN, w2_DN, b2_D)
        out_TD = out_TD.index_add(0, token_M, y_MD * v["scores"][token_M, k_M, None])
    return out_TD.to(v["x"].dtype)


def _torch_grouped_mm(v: Mapping[str, Tensor], expert_TK: Tensor) -> Tensor:
    """Sort, gather, ``torch.nn.functional.grouped_mm`` twice with biases, gather back; scores and sums in float32."""
    expert_R, slot_R = expert_TK.flatten().sort(stable=True)
    offset_E = torch.bincount(expert_R, minlength=len(v["w1"])).cumsum(0).to(torch.int32)
    rows_RD = v["x"].index_select(0, slot_R // expert_TK.shape[1])
    h_RU = F.grouped_mm(rows_RD, v["w1"].transpose(-2, -1), offs=offset_E) + v["b1"][expert_R]
    gate_RN, up_RN = h_RU.chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate_RN) * up_RN, v["w2"].transpose(-2, -1), offs=offset_E) + v["b2"][expert_R]
    row_P = torch.empty_like(slot_R)
    row_P[slot_R] = torch.arange(len(slot_R))
    y_TKD = y_RD.index_select(0, row_P).unflatten(0, expert_TK.shape)
    return (y_TKD * v["scores"][..., None]).sum(1).to(v["x"].dtype)


def _rival(name: str) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    return lambda v, expert_TK: RIVALS[name](v["x"], v["w1"], v["w2"], v["scores"], expert_TK)


def _sonic(backend: str) -> Callable[..., Tensor]:
    def layer(v: Mapping[str, Tensor], expert_TK: Tensor, **options: Any) -> Tensor:
        plan = sonic.RoutingPlan.from_topk(expert_TK, len(v["w1"]))
        return sonic.moe_mlp(**v, plan=plan, backend=backend, **options)

    return layer


@dataclass(frozen=True)
class Contender:
    """Who computes the layer.

    Attributes:
        name: in the tables.
        dtypes: names of those it has.
        layer: from the values and the experts to the output, differentiable.
        around: the context in which forward and backward run.
        has_biases: knows biases.
    """

    name: str
    dtypes: tuple[str, ...]
    layer: Callable[..., Tensor]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    has_biases: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is a backend of this library."""
        return self.name.startswith(("reference", "triton", "cute"))


def _multiplied_in(wide: bool) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Make the reference multiply 16-bit operands widened to float32, or as they are, whatever this processor likes."""

    def compute_dtype(tensor: Tensor) -> torch.dtype:
        return torch.promote_types(tensor.dtype, torch.float32) if wide else tensor.dtype

    return lambda: mock.patch.object(blocks, "compute_dtype", compute_dtype)


BASELINE = "torch loop"
WIDENED, AS_THEY_ARE = "reference, widened", "reference, 16-bit products"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(BASELINE, tuple(DTYPES), _torch_loop),
        Contender("torch grouped_mm", ("float32", "bfloat16", "float16"), _torch_grouped_mm),
        Contender("reference", ("float64", "float32"), _sonic("reference")),
        Contender(WIDENED, ("bfloat16", "float16"), _sonic("reference"), _multiplied_in(wide=True)),
        Contender(AS_THEY_ARE, ("bfloat16", "float16"), _sonic("reference"), _multiplied_in(wide=False)),
        Contender("triton", ("float32", "float16"), _sonic("triton")),
        Contender("cute", ("bfloat16", "float16"), _sonic("cute"), lambda: hopper(line_info=False)),
        *(Contender(name, ("float32", "bfloat16", "float16"), _rival(name), has_biases=False) for name in RIVALS),
    )
}
"""By name; see :func:`missing`. Rivals are without biases, and only met by that kind of inputs."""


def missing(name: str) -> str | None:
    """Why this contender cannot run here; None if it can."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "needs TRITON_INTERPRET=1 from the start"
    if name == "cute" and (importlib.util.find_spec("cutlass") is None or importlib.util.find_spec("tvm_ffi") is None):
        return "nvidia-cutlass-dsl is not installed"
    if name == "hf_grouped_mm":
        return hf_grouped_mm_missing()
    return None


def results(contender: Contender, problem: Problem, **options: Any) -> dict[str, Tensor]:
    """Output and gradients, by the names of :data:`RESULTS`; of what has an influence on the output.

    ``options`` go to the layer.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in problem.values.items()}
    with contender.around():
        out = contender.layer(leaves, problem.expert_TK, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), problem.dout_TD, allow_unused=True)
    found = {"out": out.detach()} | {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {name: found[name] for name in RESULTS if name in found}


# ---------------------------------------------------------------- figures

Figure = tuple[float, float]
Figures = dict[tuple[str, str, str, str], Figure]
"""(kind, contender, dtype, result) -> (error of the whole, largest error)."""


def rows(kinds: Iterable[str] = KINDS, names: Iterable[str] = CONTENDERS) -> list[tuple[str, str, str]]:
    """(kind, contender, dtype) of every row of the tables, in their order."""
    return [
        (kind, name, dtype)
        for kind in KINDS
        for name, contender in CONTENDERS.items()
        for dtype in contender.dtypes
        if kind in kinds and name in names and (contender.has_biases or kind == NO_BIASES)
    ]


def measured(kind: str, name: str, dtype: str) -> Figures:
    """One row of the tables: the errors of this contender."""
    problem = make_problem(kind, DTYPES[dtype])
    found = errors(results(CONTENDERS[name], problem), _exact(kind, dtype), problem.by_rows)
    if kind == NO_BIASES:
        found = {result: figure for result, figure in found.items() if result not in ("b1", "b2")}
    return {(kind, name, dtype, result): figure for result, figure in found.items()}


@functools.cache
def _exact(kind: str, dtype: str) -> dict[str, np.ndarray]:
    return exact(make_problem(kind, DTYPES[dtype]))


def allowed(dtype: str, of_the_whole: bool) -> float:
    """By which factor an error may exceed the page's figure on another machine or version.

    For 16 bits most of the error is rounding to the dtype, which is the same everywhere; for others it is the order of
    summation, which is not. The largest of many errors scatters more.
    """
    if dtype in ("bfloat16", "float16"):
        return 1.5 if of_the_whole else 2.5
    return 2.5 if of_the_whole else 4.0


def grown(figures: Figures, page: Figures) -> list[str]:
    """Which errors exceed the page's by more than :func:`allowed`, or are not on the page at all; a line each."""
    faults = []
    for (kind, name, dtype, result), found in figures.items():
        row = f"{kind}, {name}, {dtype}, {result}"
        held = page.get((kind, name, dtype, result))
        if held is None:
            faults.append(f"{row}: not on the page")
            continue
        for of_the_whole, new, old in zip((True, False), found, held, strict=True):
            if not new <= allowed(dtype, of_the_whole) * old:
                what = "error of the whole" if of_the_whole else "largest error"
                faults.append(f"{row}: {what} {new:.1e}, on the page {old:.1e}")
    return faults


# ---------------------------------------------------------------- as Markdown


def report(figures: Figures) -> str:
    """All tables: a summary of ratios to the torch loop, then one table for each kind of inputs."""
    figures = {key: (float(f"{whole:.1e}"), float(f"{largest:.1e}")) for key, (whole, largest) in figures.items()}
    parts = [_summary(figures)]
    for kind, (what, _) in KINDS.items():
        lines = [f"### {kind.capitalize()}", "", f"{what[0].upper()}{what[1:]}.", ""]
        names = RESULTS[:5] if kind == NO_BIASES else RESULTS
        lines += [_line(("", "dtype", *names)), _line(("---",) * (2 + len(names)))]
        for _, name, dtype in rows([kind]):
            cells = [_cell(figures.get((kind, name, dtype, result))) for result in names]
            if any(cells):
                lines.append(_line((name, dtype, *cells)))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _summary(figures: Figures) -> str:
    kinds = [kind for kind in KINDS if kind != NO_BIASES]
    lines = [_line(("", "dtype", *kinds)), _line(("---",) * (2 + len(kinds)))]
    for _, name, dtype in rows(kinds[:1]):
        if name == BASELINE or not CONTENDERS[name].has_biases:
            continue
        cells = [_worst_ratio(figures, kind, name, dtype) for kind in kinds]
        if any(cells):
            lines.append(_line((name, dtype, *cells)))
    return "\n".join(lines)


def _worst_ratio(figures: Figures, kind: str, name: str, dtype: str) -> str:
    """The least and the largest ratio of errors of the whole, over all results, and which result has the largest."""
    ratios = {}
    for result in RESULTS:
        ours, theirs = (figures.get((kind, who, dtype, result)) for who in (name, BASELINE))
        if ours is not None and theirs is not None:
            ratios[result] = ours[0] / theirs[0]
    if not ratios:
        return ""
    worst = max(ratios, key=lambda result: ratios[result])
    return f"{min(ratios.values()):.2g} to {ratios[worst]:.2g} ({worst})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure[0]:.1e}, {figure[1]:.1e}"


def page_figures(text: str) -> Figures:
    """The figures that a page has between the markers.

    Raises:
        ValueError: it has not both markers.
    """
    figures: Figures = {}
    kind, names = "", ()
    for line in between(text, MARKERS).splitlines():
        heading = re.fullmatch(r"### (.+)", line)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heading:
            kind = heading[1].lower()
        elif kind and line.startswith("|  | dtype |"):
            names = tuple(cells[2:])
        elif kind and line.startswith("| ") and not line.startswith("| ---"):
            for result, cell in zip(names, cells[2:], strict=True):
                if cell:
                    whole, largest = map(float, cell.split(","))
                    figures[kind, cells[0], cells[1], result] = (whole, largest)
    return figures


def between(text: str, markers: tuple[str, str]) -> str:
    """What stands between two lines of a page.

    Raises:
        ValueError: the page has not each of them once, in this order.
    """
    head, begin, rest = text.partition(markers[0])
    inside, end, tail = rest.partition(markers[1])
    if not begin or not end or markers[0] in rest or markers[1] in head + tail:
        raise ValueError(f"benchmarks.numerics: the page is without its lines {markers[0]} and {markers[1]}")
    return inside.strip("\n")


def filled(text: str, markers: tuple[str, str], inside: str) -> str:
    """The page with ``inside`` between two of its lines.

    Raises:
        ValueError: as :func:`between`.
    """
    between(text, markers)
    head, _, rest = text.partition(markers[0])
    return f"{head}{markers[0]}\n{inside}\n{markers[1]}{rest.partition(markers[1])[2]}"


# ---------------------------------------------------------------- what stays the same to the last bit

PROPERTIES = {
    "the same call again": "everything",
    "1 thread, 2 threads": "everything",
    "half of the tokens": "of each token",
    "tokens in another order": "of each token",
    '`save="input"`': "everything",
}
"""What is changed -> what is compared: all results, or the output and the gradients of X and scores, token by token."""

PROPERTY_ROWS = (
    ("torch loop", "float32"),
    ("torch loop", "bfloat16"),
    ("reference", "float64"),
    ("reference", "float32"),
    (WIDENED, "bfloat16"),
    (AS_THEY_ARE, "bfloat16"),
    ("triton", "float32"),
    ("triton", "float16"),
    ("cute", "bfloat16"),
)

_SAME, _NOT_MEANT = "same bits", ""


def property_cells(name: str, dtype: str) -> list[str]:
    """For each of :data:`PROPERTIES` ``"same bits"``, or the largest change relative to the norm of what changed."""
    contender, problem = CONTENDERS[name], make_problem("unit scale", DTYPES[dtype])
    base = results(contender, problem)
    cells = []
    for change, scope in PROPERTIES.items():
        if change.startswith("`save") and not contender.is_ours:
            cells.append(_NOT_MEANT)
            continue
        want = base
        if change == "half of the tokens":
            half_T = torch.arange(SIZES.T // 2)
            got, want = results(contender, _of_tokens(problem, half_T)), _of_tokens_only(base, half_T)
        elif change == "tokens in another order":
            order_T = torch.arange(SIZES.T).flip(0)
            got, want = results(contender, _of_tokens(problem, order_T)), _of_tokens_only(base, order_T)
        elif change == "1 thread, 2 threads":
            with _threads(1):
                want = results(contender, problem)
            with _threads(2):
                got = results(contender, problem)
        elif change.startswith("`save"):
            got = results(contender, problem, save="input")
        else:
            got = results(contender, problem)
        compared = [result for result in RESULTS if scope == "everything" or result in ("out", "x", "scores")]
        changes = [_change(got[result], want[result]) for result in compared]
        cells.append(_SAME if not any(changes) else f"{max(changes):.0e}")
    return cells


def _of_tokens(problem: Problem, token_P: Tensor) -> Problem:
    values = {name: value[token_P] if name in ("x", "scores") else value for name, value in problem.values.items()}
    return Problem(values, problem.expert_TK[token_P], problem.dout_TD[token_P])


def _of_tokens_only(found: Mapping[str, Tensor], token_P: Tensor) -> dict[str, Tensor]:
    return {name: found[name][token_P] for name in ("out", "x", "scores")}


def _change(got: Tensor, want: Tensor) -> float:
    if torch.equal(got, want):
        return 0.0
    return float((got.double() - want.double()).norm() / want.double().norm())


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def property_table(cells: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """A row for each of :data:`PROPERTY_ROWS` that has cells."""
    lines = [_line(("", "dtype", *PROPERTIES)), _line(("---",) * (2 + len(PROPERTIES)))]
    lines += [_line((*row, *cells[row])) for row in PROPERTY_ROWS if row in cells]
    return "\n".join(lines)


def page_property_cells(text: str) -> dict[tuple[str, str], list[str]]:
    """The cells that a page has between its markers.

    Raises:
        ValueError: it has not both markers.
    """
    lines = between(text, PROPERTY_MARKERS).splitlines()[2:]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row[2:] for row in table}


# ---------------------------------------------------------------- scores

SCORES = {
    "softmax over the chosen": ("softmax", False, True),
    "softmax over all": ("softmax", True, False),
    "sigmoid": ("sigmoid", False, False),
    "sigmoid, normalised": ("sigmoid", False, True),
    "sqrtsoftplus": ("sqrtsoftplus", False, False),
}
"""Name -> score_function, pre_softmax, norm_topk_prob."""
SCALES = (1.0, 30.0)
"""Standard deviations of the logits."""


def score_errors(backend: str, name: str, scale: float) -> tuple[float, float, bool]:
    """Of float32 logits (512, 64), K = 8: the largest relative error of a score, the error of the logits' gradient as a
    whole, and whether just the largest logits were chosen.
    """
    draw = _Draw()
    logits_TE, dscores_TK = draw.normal(512, 64, scale=scale).float(), draw.normal(512, 8).float()
    function, before, normalised = SCORES[name]
    scores_TK, expert_TK, prob_TK, _ = ops.topk_softmax(logits_TE, 8, function, before, normalised, backend=backend)
    over_all = logits_TE if function == "softmax" and before and not normalised else None
    got = ops.topk_softmax_bwd(dscores_TK, expert_TK, prob_TK, over_all, 64, function, normalised, 1.0, backend=backend)
    leaf_TE = logits_TE.double().requires_grad_()
    best_TK, place_TK = leaf_TE.topk(8)
    if function == "softmax":
        want = leaf_TE.softmax(1).gather(1, place_TK) if over_all is not None else best_TK.softmax(1)
    else:
        want = best_TK.sigmoid() if function == "sigmoid" else F.softplus(best_TK, threshold=700.0).sqrt()
        want = want / want.sum(1, keepdim=True) if normalised else want
    (grad,) = torch.autograd.grad(want, leaf_TE, dscores_TK.double())
    visible = want.detach() > 1e-30  # what float32 can hold with all its bits
    off = ((scores_TK.double() - want.detach()).abs() / want.detach())[visible].max()
    return float(off), _change(got, grad), torch.equal(expert_TK.long(), place_TK)


def score_table(backends: Iterable[str]) -> str:
    """A row per score function and spread of the logits."""
    backends = list(backends)
    heads = [f"{backend}: {what}" for backend in backends for what in ("scores", "gradient")]
    lines = [_line(("", "logits", *heads)), _line(("---",) * (2 + len(heads)))]
    for name in SCORES:
        for scale in SCALES:
            cells = [score_errors(backend, name, scale)[:2] for backend in backends]
            lines.append(_line((name, f"{scale:g} x normal", *(f"{error:.0e}" for pair in cells for error in pair))))
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if ``--check`` finds an error that has grown.

    Args:
        arguments: words after ``python -m benchmarks.numerics``; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description="Errors of every backend.")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page; keep other rows")
    parser.add_argument("--check", action="store_true", help="compare with the page of this repository")
    options = parser.parse_args(arguments)
    if options.write is not None and not options.write.is_file():
        parser.error(f"--write is {options.write}, expected a page that exists")
    figures: Figures = {}
    names = options.only or CONTENDERS
    for name in names:
        if why := missing(name):
            print(f"not measured: {name}: {why}")
    for kind, name, dtype in rows(options.kinds or KINDS, [name for name in names if missing(name) is None]):
        if not CONTENDERS[name].is_ours and refusal(name, SIZES.D, SIZES.N, DTYPES[dtype]):
            continue
        found = measured(kind, name, dtype)
        figures |= found
        print(f"{kind}, {name}, {dtype}: " + "; ".join(f"{key[3]} {_cell(found[key])}" for key in found), flush=True)
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        cells = page_property_cells(text)
        for name, dtype in PROPERTY_ROWS:
            if name in names and missing(name) is None and not options.kinds:
                cells[name, dtype] = property_cells(name, dtype)
                print(f"{name}, {dtype}: {dict(zip(PROPERTIES, cells[name, dtype], strict=True))}", flush=True)
        text = filled(text, MARKERS, report(page_figures(text) | figures))
        text = filled(text, PROPERTY_MARKERS, property_table(cells))
        if "triton" in names and missing("triton") is None:
            text = filled(text, SCORE_MARKERS, score_table(("reference", "triton")))
        replace_file(options.write, text)
        print(f"wrote {options.write}")
    if not options.check:
        return 0
    faults = grown(figures, page_figures(PAGE.read_text(encoding="utf-8")))
    print("\n".join(faults) if faults else f"{len(figures)} figures are as {PAGE.name} has them, or smaller")
    return 1 if faults else 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    sys.exit(main())
