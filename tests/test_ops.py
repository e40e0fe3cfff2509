"""The ops as torch sees them: schemas, fakes, compilers. What they compute is `test_reference.py`'s."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import sonic
from sonic.kernels import dispatch, ops
from tests.helpers import (
    ACTIVATION_LAYOUTS,
    DTYPES,
    SAVE_MODES,
    assert_all_close,
    assert_same_bits,
    gradients,
    make_problem,
    short,
    sonic_results,
)

ACT = ("swiglu", "concatenated")


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op, by a name that starts with the op's; with and without what is optional."""
    problem = make_problem(6, 4, 3, 3, 2, dtype, bias=True)
    x, w1, w2, b1, b2, dout = problem.x, problem.w1, problem.w2, problem.b1, problem.b2, problem.dout
    plan = problem.plan
    offset, token, slot = plan.expert_offset_E1, plan.token_of_row_R, plan.slot_of_row_R
    maps = plan.row_by_token_R, plan.token_offset_T1
    scores = problem.scores.reshape(-1)[slot.long()]
    R, U, N, D = plan.num_rows, w1.shape[1], w2.shape[2], x.shape[1]
    rows, h, a, y = (torch.randn(R, width).to(dtype) for width in (D, U, N, D))
    logits = torch.randn(6, 3).to(dtype)
    _, chosen, prob, load = ops.topk_softmax(logits, 2)
    expert = problem.expert_index.reshape(-1)
    pairs = torch.arange(6).repeat_interleave(2)
    return {
        "up_proj": (x, w1, b1, token, offset, *ACT),
        "up_proj-optional-none": (rows, w1, None, None, offset, *ACT),
        "up_proj-inference": (x, w1, b1, token, offset, "swiglu_oai", "interleaved", False, "reference"),
        "down_proj": (a, w2, b2, scores, offset),
        "down_proj-optional-none": (a, w2, None, None, offset),
        "combine": (y, scores, *maps),
        "combine-optional-none": (y, None, *maps),
        "down_proj_bwd_input": (dout, h, w2, b2, scores, token, offset, *ACT),
        "down_proj_bwd_input-optional-none": (rows, h, w2, None, None, None, offset, *ACT),
        "down_proj_bwd_input-only-a": (dout, h, w2, b2, scores, token, offset, *ACT, False, False),
        "down_proj_bwd_weight": (dout, a, scores, token, offset, True, True),
        "down_proj_bwd_weight-optional-none": (rows, a, None, None, offset),
        "down_proj_bwd_weight-only-bias": (dout, a, scores, token, offset, False, True),
        "up_proj_bwd_input": (h, w1, offset),
        "up_proj_bwd_weight": (h, x, token, offset, True, True),
        "up_proj_bwd_weight-optional-none": (h, rows, None, offset),
        "up_proj_bwd_weight-only-bias": (h, x, token, offset, False, True),
        "experts": (x, w1, w2, b1, b2, scores, offset, token, *maps, *ACT),
        "experts-optional-none": (rows, w1, w2, None, None, None, offset, None, None, None, *ACT),
        "experts-inference": (x, w1, w2, b1, b2, scores, offset, token, *maps, *ACT, False),
        "experts_bwd": (dout, x, h, w1, w2, b1, b2, scores, offset, token, *ACT, True, True, True, True, True),
        "experts_bwd-optional-none": (rows, y, None, w1, w2, None, None, None, offset, None, *ACT),
        "experts_bwd-only-x": (dout, x, h, w1, w2, b1, b2, scores, offset, token, *ACT, True, *[False] * 5),
        "experts_bwd-only-scores": (dout, x, h, w1, w2, b1, b2, scores, offset, token, *ACT, *[False] * 5, True),
        "topk_softmax": (logits, 2),
        "topk_softmax-sigmoid": (logits, 2, "sigmoid", False, True, 2.5),
        "topk_softmax-before": (logits, 1, "softmax", True, False, 1.0, None, 1, 1, "reference"),
        "topk_softmax-bias-groups": (logits, 2, "sqrtsoftplus", False, True, 2.5, torch.randn(3), 3, 2),
        "topk_softmax_bwd": (torch.randn_like(prob), chosen, prob, logits, 3),
        "topk_softmax_bwd-optional-none": (torch.randn_like(prob), chosen, prob, None, 3, "sigmoid", True, 2.5),
        "best_of_columns": (logits, logits[:, 0].clone(), [2, 0, 3], token, offset, *maps),
        "best_of_columns-optional-none": (logits, None, [6, 1, 0]),
        "best_of_columns-groups": (logits, None, [1, 1, 1], token, offset, *maps, torch.rand(6, 3) < 0.9, "reference"),
        "best_of_columns-nothing": (logits, None, [0, 0, 0]),
        "build_plan": (expert, pairs, 6, 3),
        "build_plan-optional-none": (expert.int(), None, 6, 3),
        "build_plan-load": (chosen.flatten(), None, logits.shape[0], 3, load),
    }


NAMES = tuple(arguments())


def op_of(name: str) -> Any:
    return getattr(ops, name.partition("-")[0])


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts, and nothing compiled here stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_op_is_tried() -> None:
    tried = {name.partition("-")[0] for name in NAMES}
    assert tried == set(dispatch.OPS)


class TestRegistration:
    @pytest.mark.parametrize("name", NAMES)
    def test_opcheck(self, name: str) -> None:
        """Schema (nothing mutated, no alias), fake, and what compilers make of it with dynamic shapes."""
        given = arguments()[name]
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if name.endswith("-optional-none") or "-" not in name:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op_of(name), given, test_utils=tests)

    @pytest.mark.parametrize("dtype", DTYPES, ids=short)
    @pytest.mark.parametrize("name", NAMES)
    def test_fakes_foretell_shape_dtype_and_layout(self, name: str, dtype: torch.dtype) -> None:
        given = arguments(dtype)[name]
        real = outputs(op_of(name)(*given))
        with FakeTensorMode() as mode:
            fake = outputs(
                op_of(name)(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given))
            )
        described = [[(tuple(t.shape), t.dtype, t.stride(), t.device) for t in side] for side in (real, fake)]
        assert described[0] == described[1]

    @pytest.mark.parametrize("name", NAMES)
    def test_outputs_share_no_memory(self, name: str) -> None:
        given = arguments()[name]
        storages = [t.untyped_storage().data_ptr() for t in outputs(op_of(name)(*given)) if t.numel()]
        storages += [value.untyped_storage().data_ptr() for value in given if isinstance(value, Tensor)]
        results = outputs(op_of(name)(*given))
        mine = [t.untyped_storage().data_ptr() for t in results if t.numel()]
        inputs = {value.untyped_storage().data_ptr() for value in given if isinstance(value, Tensor)}
        assert len(set(mine)) == len(mine)
        assert not inputs & set(mine)

    def test_single_ops_refuse_to_be_differentiated(self) -> None:
        """Their gradients are not theirs to give; silence would mean a layer without gradients."""
        a, w2, *rest = arguments()["down_proj"]
        y = ops.down_proj(a.requires_grad_(), w2, *rest)
        with pytest.raises(RuntimeError, match=r"(?i)autograd|grad"):
            y.sum().backward()

    @pytest.mark.parametrize("name", NAMES)
    def test_meta_tensors_are_enough_for_shapes(self, name: str) -> None:
        given = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments()[name]]
        assert all(t.device.type == "meta" for t in outputs(op_of(name)(*given)))


class TestCompile:
    """Compiled with `fullgraph=True`: no break, the same numbers, one graph for every number of tokens."""

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS[::4])
    def test_moe_mlp(self, activation: str, glu_layout: str, save: str, fresh_compiler: None) -> None:
        problem = make_problem(9, 6, 5, 4, 2, activation=activation, glu_layout=glu_layout, bias=True)
        plan = problem.plan
        compiled = torch.compile(sonic.moe_mlp, fullgraph=True, backend="aot_eager")
        leaves = problem.leaves()
        out = compiled(**leaves, plan=plan, **problem.options, save=save)
        got = {"out": out.detach()} | gradients(out, leaves, problem.dout)
        assert_all_close(got, sonic_results(problem, save=save))

    def test_expert_mlp(self, fresh_compiler: None) -> None:
        """Any number of rows, in one graph; the last row belongs to nobody."""
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(sonic.expert_mlp, fullgraph=True, backend=counter)
        for T in (5, 12, 2, 9):
            problem = make_problem(T, 6, 5, 4, 2, bias=True)
            grouped, leaves = problem.grouped(), problem.leaves()
            del leaves["x"], leaves["scores"]
            leaves["rows"] = torch.cat((grouped.rows, grouped.rows[:1])).requires_grad_()
            leaves["row_scores"] = torch.cat((grouped.row_scores, grouped.row_scores[:1])).requires_grad_()
            for name in ("rows", "row_scores"):
                torch._dynamo.mark_dynamic(leaves[name], 0)
            dout = torch.randn_like(leaves["rows"])
            both = []
            for call in (sonic.expert_mlp, compiled):
                out = call(**leaves, tokens_per_expert=grouped.tokens_per_expert)
                both.append({"out": out.detach()} | gradients(out, leaves, dout))
            assert_all_close(both[1], both[0])
        assert counter.frame_count == 1

    def test_any_number_of_tokens_takes_one_graph(self, fresh_compiler: None) -> None:
        """The plan is built inside; T is told to be dynamic, as a serving or packing loop would."""
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(routed_mlp, fullgraph=True, backend=counter)
        for T in (5, 12, 2, 33, 7):
            problem = make_problem(T, 6, 5, 4, 2, seed=T)
            leaves = problem.leaves()
            for tensor in (leaves["x"], leaves["scores"], problem.expert_index):
                torch._dynamo.mark_dynamic(tensor, 0)
            out = compiled(**leaves, expert_index=problem.expert_index)
            got = {"out": out.detach()} | gradients(out, leaves, problem.dout)
            assert_all_close(got, sonic_results(problem))
        assert counter.frame_count == 1

    def test_the_layer(self, fresh_compiler: None) -> None:
        """Router, losses and a shared expert included, over batches of several sizes."""
        router = sonic.routing.TopKRouter(6, 4, 2, aux_loss_coeff=0.1, z_loss_coeff=0.1, dtype=torch.float64)
        layer = sonic.MoE(6, 5, 4, 2, router=router, shared_intermediate_size=7, bias=True, dtype=torch.float64)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for batch in (3, 4, 9):
            x = torch.randn(batch, 5, 6, dtype=torch.float64)
            torch._dynamo.mark_dynamic(x, 0)
            both = []
            for call in (layer, compiled):
                leaves = {"x": x.detach().requires_grad_()} | dict(layer.named_parameters())
                if call is compiled:
                    torch._dynamo.mark_dynamic(leaves["x"], 0)
                out = call(leaves["x"])
                both.append({"out": out.detach()} | gradients(out, leaves, torch.ones_like(out)))
            assert_all_close(both[1], both[0])
        assert counter.frame_count == 1

    def test_autocast(self, fresh_compiler: None) -> None:
        problem = make_problem(9, 6, 5, 4, 2, torch.float32)
        compiled = torch.compile(routed_mlp, fullgraph=True, backend="aot_eager")
        both = []
        for call in (routed_mlp, compiled):
            leaves = problem.leaves()
            with torch.autocast("cpu", torch.bfloat16):
                out = call(**leaves, expert_index=problem.expert_index)
            assert out.dtype == torch.bfloat16
            both.append({"out": out.detach()} | gradients(out, leaves, problem.dout))
        assert_same_bits(both[1], both[0])

    def test_second_order_is_refused(self, fresh_compiler: None) -> None:
        problem = make_problem(9, 6, 5, 4, 2)
        leaves = problem.leaves()
        compiled = torch.compile(routed_mlp, fullgraph=True, backend="aot_eager")
        out = compiled(**leaves, expert_index=problem.expert_index)
        with pytest.raises(RuntimeError):
            (dx,) = torch.autograd.grad(out.sum(), leaves["x"], create_graph=True)
            torch.autograd.grad(dx.square().sum(), leaves["w1"])

    def test_without_gradients(self, fresh_compiler: None) -> None:
        problem = make_problem(9, 6, 5, 4, 2)
        compiled = torch.compile(routed_mlp, fullgraph=True, backend="aot_eager")
        leaves = problem.leaves()
        with torch.no_grad():
            out = compiled(**leaves, expert_index=problem.expert_index)
        assert not out.requires_grad
        assert_all_close({"out": out}, {"out": sonic_results(problem)["out"]})

    @pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
        reason="inductor needs a C++ compiler",
    )
    def test_inductor(self, fresh_compiler: None) -> None:
        problem = make_problem(9, 6, 5, 4, 2, torch.float32)
        want = sonic_results(problem)
        leaves = problem.leaves()
        compiled = torch.compile(routed_mlp, fullgraph=True, backend="inductor")
        out = compiled(**leaves, expert_index=problem.expert_index)
        assert_all_close({"out": out.detach()} | gradients(out, leaves, problem.dout), want, tolerance=1e-5)

    def test_export(self) -> None:
        problem = make_problem(9, 6, 5, 4, 2)

        class Layer(torch.nn.Module):
            def forward(self, x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor) -> Tensor:
                return routed_mlp(x, w1, w2, scores, expert_index)

        values = (problem.x, problem.w1, problem.w2, problem.scores, problem.expert_index)
        program = torch.export.export(Layer(), values)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {"sonic.build_plan.default", "sonic.experts.default"} <= called
        assert_all_close({"out": program.module()(*values)}, {"out": routed_mlp(*values)})


def routed_mlp(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor) -> Tensor:
    """What a caller compiles: plan and experts in one function."""
    plan = sonic.RoutingPlan.from_topk(expert_index, w1.shape[0])
    return sonic.moe_mlp(x, w1, w2, scores, plan)
