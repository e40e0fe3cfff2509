"""How the fitted constants come about: each step sees only the rows that it is named after.

1. shares of compute: the 10 rows without communication;
2. latency and bandwidth of an all-reduce: the 10 ratios of the standard wiring to those rows, per link;
3. ladder and parallel are then predictions, but for one constant, the interference, that nothing without overlap can
   show: it is fitted to the 10 ladder ratios on NVLink alone. P2P off, 405B and the other sizes keep it.

The shares of the MoE kernels are fitted apart, to published rates of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sonic.planner.constants import Kernels
from sonic.planner.models import MODELS
from sonic.planner.published import KERNEL_RATES, KERNEL_SHAPES, LADDER_70B
from sonic.planner.serving import ReduceLink, Serving, serving_throughput
from sonic.roofline import CHIPS, Layer, layer_bound

__all__ = [
    "fit_interference",
    "fit_kernels",
    "fit_link",
    "fit_serving",
    "fit_two_node_link",
    "kernel_rate",
    "leave_one_out",
]

_MODEL = MODELS["llama-70b"]
_Numbers = np.ndarray


def fit_serving() -> Serving:
    """Step 1: five shares from ten rows."""

    def errors(values: _Numbers) -> _Numbers:
        serving = Serving(*values.tolist())
        rates = [serving_throughput(_MODEL, row.batch, row.tp, "none", serving=serving) for row in LADDER_70B]
        return np.log(rates) - np.log([row.none for row in LADDER_70B])

    start, low, high = (0.8, 0.8, 15e-6, 0.4, 4), (0.3, 0.3, 1e-6, 0.2, 1), (0.95, 0.95, 60e-6, 0.8, 20)
    return Serving(*_least_squares(errors, start, low, high).tolist())


def fit_link(serving: Serving, standard: Sequence[float]) -> ReduceLink:
    """Step 2: three latencies and a bandwidth from ten rates of the standard wiring over those of step 1's rows."""
    ceiling = [serving_throughput(_MODEL, row.batch, row.tp, "none", serving=serving) for row in LADDER_70B]
    wanted = [rate / row.none for rate, row in zip(standard, LADDER_70B, strict=True)]

    def errors(values: _Numbers) -> _Numbers:
        link = ReduceLink(dict(zip((2, 4, 8), values.tolist(), strict=False)), float(values[3]))
        rates = [serving_throughput(_MODEL, row.batch, row.tp, "standard", link, 0, serving) for row in LADDER_70B]
        return np.log(rates) - np.log(ceiling) - np.log(wanted)

    found = _least_squares(errors, (15e-6, 18e-6, 24e-6, 2e11), (1e-6, 1e-6, 1e-6, 1e10), (2e-4, 2e-4, 2e-4, 6e11))
    return ReduceLink(dict(zip((2, 4, 8), found.tolist(), strict=False)), float(found[3]))


def fit_two_node_link(ceilings: Sequence[tuple[int, float]]) -> ReduceLink:
    """The link of 16 GPUs on two nodes from (batch, ratio none / standard) of Llama-3 405B; ladder rows stay unseen."""
    model = MODELS["llama-405b"]

    def errors(values: _Numbers) -> _Numbers:
        link = ReduceLink({16: float(values[0])}, float(values[1]))
        ratios = [
            serving_throughput(model, batch, 16, "none", link) / serving_throughput(model, batch, 16, "standard", link)
            for batch, _ in ceilings
        ]
        return np.log(ratios) - np.log([ratio for _, ratio in ceilings])

    found = _least_squares(errors, (5e-5, 6e10), (1e-6, 5e9), (5e-4, 4e11))
    return ReduceLink({16: float(found[0])}, float(found[1]))


def fit_interference(link: ReduceLink) -> float:
    """Step 3: the interference that makes the mean squared error of ladder over standard least, to three digits."""
    return _best_interference(_interference_errors(link))[0]


def leave_one_out(link: ReduceLink) -> list[float]:
    """Relative error of each ladder row when the interference is fitted to the other nine."""
    errors = _interference_errors(link)
    found = []
    for row in range(len(errors)):
        _, column = _best_interference(np.delete(errors, row, axis=0))
        found.append(float(np.expm1(errors[row, column])))
    return found


def _interference_errors(link: ReduceLink) -> _Numbers:
    """(rows, 1001): log of the planned over the published speed-up of each row for interference 0, 0.001 ... 1."""
    coarse, fine = np.linspace(0, 1, 21), np.linspace(0, 1, 1001)
    found = []
    for row in LADDER_70B:
        standard = serving_throughput(_MODEL, row.batch, row.tp, "standard", link)
        rates = [serving_throughput(_MODEL, row.batch, row.tp, "ladder", link, value) for value in coarse]
        found.append(np.interp(fine, coarse, np.log(rates) - np.log(standard * row.ladder / row.standard)))
    return np.array(found)


def _best_interference(errors: _Numbers) -> tuple[float, int]:
    column = int(np.argmin((errors**2).mean(axis=0)))
    return round(column / 1000, 3), column


def fit_kernels(name: str) -> Kernels:
    """Shares of peak and of HBM of one implementation, and the mean error that they leave; ``keeps`` is left empty.

    Seconds are linear in the inverse of both shares, so that relative errors of seconds have one least-squares answer.
    """
    rows, wanted = [], []
    for forward, backward, shape in zip(*KERNEL_RATES[name], KERNEL_SHAPES, strict=True):
        for passes, rate in (("forward", forward), ("backward", backward)):
            if rate is not None:
                flops, moved, useful = _kernel_work(shape, passes)
                measured = useful / (rate * 1e12)
                rows.append((flops / measured, moved / measured))
                wanted.append(rate)
    matrix = np.array(rows)
    inverse, *_ = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)
    errors = 1 / (matrix @ inverse) - 1
    return Kernels(float(1 / inverse[0]), float(1 / inverse[1]), "", float(np.abs(errors).mean()))


def kernel_rate(kernels: Kernels, shape: object, passes: str) -> float:
    """TFLOP/s of one shape of :data:`sonic.planner.published.KERNEL_SHAPES` on H100 by fitted shares."""
    flops, moved, useful = _kernel_work(shape, passes)
    return useful / (flops / kernels.flops + moved / kernels.memory) / 1e12


def _kernel_work(shape: object, passes: str) -> tuple[float, float, float]:
    """Seconds of a pass's FLOP at peak, of its bytes at full bandwidth, and its useful FLOP."""
    names = ("num_tokens", "hidden_size", "intermediate_size", "num_experts", "top_k")
    bound = layer_bound(Layer(*(getattr(shape, name) for name in names)), "H100", passes)
    chip = CHIPS["H100"]
    flops = bound.cost.flops / chip.flops_per_second["bfloat16"]
    return flops, bound.cost.bytes / chip.memory_bytes_per_second, float(bound.useful_flops)


def _least_squares(
    errors: Callable[[_Numbers], _Numbers], start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> _Numbers:
    """Levenberg and Marquardt's method on the logarithms of positive unknowns, kept between bounds."""
    floor, ceiling = np.log(low), np.log(high)
    point, damping = np.clip(np.log(start), floor, ceiling), 1e-2
    left = errors(np.exp(point))
    for _ in range(60):
        step = 1e-4
        slopes = np.stack([(errors(np.exp(point + step * axis)) - left) / step for axis in np.eye(len(point))], axis=1)
        squares = slopes.T @ slopes
        while damping < 1e8:
            shift = np.linalg.solve(squares + damping * np.diag(np.diag(squares) + 1e-9), -slopes.T @ left)
            there = np.clip(point + shift, floor, ceiling)
            new = errors(np.exp(there))
            if new @ new < left @ left:
                break
            damping *= 4
        else:
            break
        gain = left @ left - new @ new
        point, left, damping = there, new, damping / 3
        if gain < 1e-14:
            break
    return np.exp(point)
