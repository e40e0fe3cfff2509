"""The CuTe kernels on a real Hopper GPU: what the simulator cannot show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sonic
from sonic import kernels
from tests.helpers import ACTIVATION_LAYOUTS, Problem, assert_as_good_as_torch, gradients, make_problem, short

pytestmark = pytest.mark.hopper

DTYPES = (torch.bfloat16, torch.float16)
# Widths are multiples of 8 values; the last has few rows per expert (tiles of 64), the second but last many (clusters).
SIZES = ((1000, 512, 192, 16, 4), (777, 328, 104, 7, 3), (4096, 256, 64, 4, 1), (64, 256, 128, 64, 8))


def on_gpu(problem: Problem) -> tuple[dict[str, Tensor], sonic.RoutingPlan, Tensor]:
    """Leaves, plan and output gradient on the device."""
    leaves = {name: leaf.detach().cuda().requires_grad_() for name, leaf in problem.leaves().items()}
    plan = sonic.RoutingPlan.from_topk(problem.expert_index.cuda(), problem.w1.shape[0])
    return leaves, plan, problem.dout.cuda()


def run(problem: Problem, dtype: torch.dtype | None = None, backend: str = "cute") -> dict[str, Tensor]:
    """Output and every gradient on the device, in ``dtype`` (of the problem)."""
    leaves, plan, dout = on_gpu(problem)
    if dtype is not None:
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    out = sonic.moe_mlp(**leaves, plan=plan, **problem.options, backend=backend)
    return {"out": out.detach()} | gradients(out, leaves, dout.to(out.dtype))


def assert_right(problem: Problem, dtype: torch.dtype) -> None:
    got, exact, same = run(problem), run(problem, torch.float64, "reference"), run(problem, backend="reference")
    for name, value in got.items():
        assert_as_good_as_torch(name, value, exact[name], same[name].to(value.dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_right_as_torch(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(make_problem(*sizes, dtype, bias=True), dtype)


@pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
def test_activations_and_layouts(activation: str, glu_layout: str) -> None:
    sizes = (500, 256, 128, 8, 2)
    assert_right(make_problem(*sizes, torch.bfloat16, activation=activation, glu_layout=glu_layout), torch.bfloat16)


@pytest.mark.parametrize("routing", ["gaps", "same"])
def test_empty_experts_and_one_with_all_rows(routing: str) -> None:
    assert_right(make_problem(600, 128, 64, 9, 2, torch.bfloat16, routing=routing, bias=True), torch.bfloat16)


def test_two_runs_agree_to_the_last_bit() -> None:
    problem = make_problem(3000, 512, 256, 32, 8, torch.bfloat16, bias=True)
    first, second = run(problem), run(problem)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_chosen_by_itself() -> None:
    layer = sonic.MoE(128, 64, 8, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 40, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kernels.reset_counts()
    layer(x).float().square().mean().backward()
    served = {op for op, backend in kernels.counts() if backend == "cute"}
    assert {"up_proj", "down_proj_bwd_input", "up_proj_bwd_weight"} <= served


def test_on_the_current_stream() -> None:
    """The work waits for what was queued on the stream of the call, and not on another."""
    problem = make_problem(512, 128, 64, 8, 2, torch.bfloat16)
    want = run(problem)
    leaves, plan, _ = on_gpu(problem)
    x = leaves["x"].detach().clone()
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # cycles: what is not ordered after this reads zeros
        late.copy_(x)
        out = sonic.moe_mlp(late, *(leaves[n] for n in ("w1", "w2", "scores")), plan, **problem.options, backend="cute")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, want["out"])


def test_nothing_waits_for_the_device() -> None:
    problem = make_problem(512, 128, 64, 8, 2, torch.bfloat16, bias=True)
    leaves, _, dout = on_gpu(problem)
    expert_index = problem.expert_index.cuda()

    def step() -> None:
        plan = sonic.RoutingPlan.from_topk(expert_index, 8)
        out = sonic.moe_mlp(**leaves, plan=plan, **problem.options)
        torch.autograd.grad(out, list(leaves.values()), dout)

    step()  # compiles, which may wait
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_captured_graph_follows_new_routing() -> None:
    """Everything that depends on the counts is decided on the device, so a replay serves other counts."""
    first, second = (make_problem(256, 128, 64, 8, 2, torch.bfloat16, seed=seed) for seed in (1, 2))
    leaves, _, dout = on_gpu(first)
    index = first.expert_index.cuda()

    def step() -> list[Tensor]:
        plan = sonic.RoutingPlan.from_topk(index, 8)
        out = sonic.moe_mlp(**leaves, plan=plan, **first.options, backend="cute")
        return [out, *torch.autograd.grad(out, list(leaves.values()), dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, leaf in second.leaves().items():
            leaves[name].copy_(leaf)
        index.copy_(second.expert_index)
        dout.copy_(second.dout)
    graph.replay()
    torch.cuda.synchronize()
    for (name, want), got in zip(run(second).items(), captured, strict=True):
        assert torch.equal(got, want), name


def test_compiled_whole() -> None:
    layer = sonic.MoE(128, 64, 8, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    want = layer(x)
    kernels.reset_counts()
    got = torch.compile(layer, fullgraph=True)(x)
    assert (got - want).float().norm() < 1e-2 * want.float().norm()
    assert ("up_proj", "cute") in kernels.counts()


def test_more_values_than_int32_counts() -> None:
    """R D = 2.3e9: an offset in 32 bits would read and write elsewhere."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    tokens, width_d, width_n, experts, top_k = 40960, 7168, 64, 16, 8
    x = torch.randn(tokens, width_d, device="cuda", dtype=torch.bfloat16)
    w1 = torch.randn(experts, 2 * width_n, width_d, device="cuda", dtype=torch.bfloat16) / width_d**0.5
    w2 = torch.randn(experts, width_d, width_n, device="cuda", dtype=torch.bfloat16) / width_n**0.5
    index = torch.rand(tokens, experts, device="cuda").argsort(1)[:, :top_k]
    plan = sonic.RoutingPlan.from_topk(index, experts)
    scores = torch.rand(tokens, top_k, device="cuda")
    out = sonic.moe_mlp(x, w1, w2, scores, plan, backend="cute")
    last = slice(tokens - 64, tokens)
    small = sonic.RoutingPlan.from_topk(index[last], experts)
    want = sonic.moe_mlp(x[last], w1, w2, scores[last], small, backend="reference")
    assert (out[last] - want).float().norm() < 1e-2 * want.float().norm()
