"""Whole layers on the CuTe-DSL backend, in the simulator: forward and every gradient, in autograd, against float64.

The routing ops and the gather-and-sum are those of the other backends, whoever is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

import sonic  # noqa: E402
from sonic import kernels  # noqa: E402
from sonic.simulator import hopper  # noqa: E402
from tests.cute_cases import SCHEDULES, assert_no_warnings  # noqa: E402
from tests.helpers import (  # noqa: E402
    Problem,
    assert_all_as_good_as_torch,
    assert_same_bits,
    gradients,
    make_problem,
    relative_error,
    results,
    sonic_results,
    torch_experts,
)

pytestmark = pytest.mark.long


SIZES = (40, 72, 40, 5, 2)  # T, D, N, E, K: widths no multiple of a tile, gate and up in one box
GEMMS = {
    "up_proj": 1,
    "down_proj": 1,
    "down_proj_bwd_input": 1,
    "down_proj_bwd_weight": 1,
    "up_proj_bwd_input": 1,
    "up_proj_bwd_weight": 1,
}


@pytest.fixture(autouse=True)
def _own_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SONIC_BACKEND", raising=False)
    kernels.reset_counts()
    yield
    kernels.reset_counts()


def in_simulator(problem: Problem, schedule: str = "eager", seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """``out`` and the gradient of every leaf, without a complaint of the simulator."""
    with hopper(schedule, seed, line_info=False) as simulation:
        got = sonic_results(problem, **{"backend": "cute", **options})
    assert_no_warnings(simulation.traces)
    return got


def counts(backend: str) -> dict[str, int]:
    """Calls by op that a backend served since the last time; the counters start again."""
    found = {op: number for (op, name), number in kernels.counts().items() if name == backend}
    if backend == "reference":
        kernels.reset_counts()
    return found


@pytest.mark.parametrize(
    ("dtype", "activation", "glu_layout", "bias"),
    [
        (torch.bfloat16, "swiglu", "concatenated", True),
        pytest.param(torch.float16, "swiglu", "interleaved", False, marks=pytest.mark.long),
    ],
    ids=["bf16-concatenated-bias", "fp16-interleaved"],
)
def test_layer(dtype: torch.dtype, activation: str, glu_layout: str, bias: bool) -> None:
    """As right as plain torch in the same dtype; with either way of saving to the last bit the same."""
    problem = make_problem(*SIZES, dtype, activation, glu_layout, bias)
    exact, plain = results(torch_experts, problem, torch.float64), results(torch_experts, problem)
    got = in_simulator(problem)
    assert counts("cute") == GEMMS
    assert counts("reference") == {"combine": 2, "build_plan": 1}
    assert_all_as_good_as_torch(got, exact, plain, dtype)
    assert_same_bits(in_simulator(problem, *SCHEDULES[1], save="input"), got)
    assert counts("cute") == GEMMS | {"up_proj": 2}
    counts("reference")
    if bias:
        inference(problem, got["out"])
        named_by_the_environment(problem, got)


def inference(problem: Problem, want: Tensor) -> None:
    """Without gradients H is not stored: another kernel, the same result."""
    leaves = {name: leaf.detach() for name, leaf in problem.leaves().items()}
    with hopper(*SCHEDULES[2], line_info=False) as simulation, torch.no_grad():
        out = sonic.moe_mlp(**leaves, plan=problem.plan, **problem.options, backend="cute")
    assert torch.equal(out, want)
    stored = [set(trace.bytes_by_tensor()) for trace in simulation.traces]
    assert len(stored) == 2 and "tensor 0" not in stored[0], "no H"
    counts("reference")


def named_by_the_environment(problem: Problem, want: dict[str, Tensor]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONIC_BACKEND", "cute")
        assert_same_bits(in_simulator(problem, *SCHEDULES[2], backend=None), want)
    assert counts("cute") == GEMMS


def with_tail(tensor: Tensor, tail: int) -> Tensor:
    """``tensor`` with ``tail`` more rows of NaN."""
    return torch.cat((tensor, tensor.new_full((tail, *tensor.shape[1:]), float("nan"))))


def test_rows_grouped_by_the_caller() -> None:
    """``expert_mlp`` with rows after the last expert's: they give zeros, and get zero gradients."""
    dtype, tail = torch.bfloat16, 70
    problem = make_problem(*SIZES, dtype, "relu2", bias=True)
    grouped = problem.grouped()
    values = {"rows": with_tail(grouped.rows, tail), "row_scores": with_tail(grouped.row_scores, tail)}
    values |= {"w1": problem.w1, "w2": problem.w2, "b1": problem.b1, "b2": problem.b2}
    dout = torch.randn(len(values["rows"]), SIZES[1])

    def call(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in values.items()}
        leaves["row_scores"] = values["row_scores"].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        counted = grouped.tokens_per_expert
        out = sonic.expert_mlp(**leaves, tokens_per_expert=counted, activation="relu2", backend=backend)
        return {"out": out.detach()} | gradients(out, leaves, dout)

    with hopper(*SCHEDULES[1], line_info=False) as simulation:
        ours = call("cute", dtype)
    assert_no_warnings(simulation.traces)
    assert counts("cute") == GEMMS
    for name in ("out", "rows", "row_scores"):
        assert torch.equal(ours[name][-tail:], torch.zeros_like(ours[name][-tail:])), name
    assert_all_as_good_as_torch(ours, call("reference", torch.float64), call("reference", dtype), dtype)


def test_module() -> None:
    """``sonic.MoE``: the router too gets the gradient that it gets with the reference."""
    x, dout = torch.randn(4, 10, 72).bfloat16(), torch.randn(4, 10, 72).bfloat16()
    got = {}
    for backend in ("cute", "reference"):
        torch.manual_seed(0)
        layer = sonic.MoE(72, 40, 5, 2, backend=backend, dtype=torch.bfloat16)
        leaves = {"x": x.clone().requires_grad_()} | dict(layer.named_parameters())
        with hopper(*SCHEDULES[2], line_info=False):
            out = layer(leaves["x"])
            got[backend] = {"out": out.detach()} | gradients(out, leaves, dout)
        assert {"router.weight", "w1", "w2", "x"} <= set(leaves)
        if backend == "cute":
            assert counts("cute") == GEMMS
            others = counts("reference")
            assert others["combine"] == 2 and {"topk_softmax", "topk_softmax_bwd", "build_plan"} <= set(others)
    for name, value in got["cute"].items():
        assert relative_error(value, got["reference"][name]) < 0.01, name
        assert value.abs().max() > 0, name
