"""`moe_mlp` and `expert_mlp` as users meet them: gradients in every dtype, and all that autograd can ask of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sonic
from sonic.kernels import ops
from tests.helpers import (
    ACTIVATION_LAYOUTS,
    BIASES,
    FULL,
    HALVES,
    LEAVES,
    QUICK,
    SAVE_MODES,
    Problem,
    Shape,
    assert_all_as_good_as_torch,
    assert_all_close,
    assert_as_good_as_torch,
    assert_same_bits,
    chain_single_ops,
    dense_loop,
    gradients,
    make_blocks_small,
    make_problem,
    problem_of,
    results,
    shape_ids,
    short,
    sonic_results,
    take_16bit_path,
    torch_experts,
)

# 16-bit dtypes have two ways through the reference.
WAYS = [
    pytest.param(torch.float32, "widened", id="fp32"),
    *(pytest.param(dtype, path, id=f"{short(dtype)}-{path}") for dtype in HALVES for path in ("native", "widened")),
]

# Of one token's few values torch's error is luck; float64 has that shape.
SEVERAL_TOKENS = tuple(shape for shape in FULL if shape.T != 1)


@functools.cache
def oracle(activation: str, glu_layout: str, bias: bool) -> tuple[Problem, dict[str, Tensor]]:
    problem = make_problem(19, 12, 10, 5, 2, activation=activation, glu_layout=glu_layout, bias=bias)
    return problem, results(dense_loop, problem)


def small(dtype: torch.dtype = torch.float64, **options: Any) -> Problem:
    return make_problem(19, 12, 10, 5, 2, dtype, **{"bias": True, **options})


def row_results(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """By `expert_mlp` what `sonic_results` has by `moe_mlp`, on the rows of the same problem grouped beforehand."""
    grouped = problem.grouped()
    leaves = problem.leaves() | {
        "x": grouped.rows.clone().requires_grad_(),
        "scores": grouped.row_scores.clone().requires_grad_(),
    }
    out = call_rows(leaves, grouped.tokens_per_expert, **{**problem.options, **options})
    got = {"out": out.detach()} | gradients(out, leaves, problem.dout[grouped.token_of_row])
    total = functools.partial(torch.zeros_like(problem.x).index_add, 0, grouped.token_of_row)
    got["out"], got["x"] = total(got["out"]), total(got["x"])
    got["scores"] = torch.empty_like(problem.scores).reshape(-1).index_copy(0, grouped.slot_of_row, got["scores"])
    got["scores"] = got["scores"].reshape(problem.scores.shape)
    return got


def call_rows(leaves: dict[str, Tensor], tokens_per_expert: Tensor, **options: Any) -> Tensor:
    named = dict(leaves)
    return sonic.expert_mlp(
        named.pop("x"),
        named.pop("w1"),
        named.pop("w2"),
        tokens_per_expert,
        named.pop("scores", None),
        **named,
        **options,
    )


def call(leaves: dict[str, Tensor], problem: Problem, **options: Any) -> Tensor:
    return sonic.moe_mlp(**leaves, plan=problem.plan, **{**problem.options, **options})


class Spy:
    """Stands in for an op and remembers the arguments of its calls, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        op = getattr(ops, name)
        names = [argument.name for argument in getattr(torch.ops.sonic, name).default._schema.arguments]
        self.calls: list[dict[str, Any]] = []

        def spy(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(dict(zip(names, args, strict=False)) | kwargs)
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)


class TestGradients:
    @pytest.mark.parametrize("entry", [sonic_results, row_results], ids=["moe_mlp", "expert_mlp"])
    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("bias", BIASES, ids=["plain", "bias"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_float64(
        self, activation: str, glu_layout: str, bias: bool, save: str, entry: Callable[..., dict[str, Tensor]]
    ) -> None:
        problem, want = oracle(activation, glu_layout, bias)
        assert_all_close(entry(problem, save=save), want)

    @pytest.mark.parametrize(("dtype", "path"), WAYS)
    @pytest.mark.parametrize("bias", BIASES, ids=["plain", "bias"])
    @pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATION_LAYOUTS)
    def test_activations(
        self,
        activation: str,
        glu_layout: str,
        bias: bool,
        dtype: torch.dtype,
        path: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As right as torch in the same dtype, with H kept (and rounded) and with H computed again."""
        take_16bit_path(monkeypatch, path)
        problem = make_problem(60, 40, 36, 5, 2, dtype, activation=activation, glu_layout=glu_layout, bias=bias)
        exact, torchs = results(torch_experts, problem, torch.float64), results(torch_experts, problem)
        for save in SAVE_MODES:
            assert_all_as_good_as_torch(sonic_results(problem, save=save), exact, torchs, dtype)

    @pytest.mark.parametrize(("dtype", "path"), WAYS)
    @pytest.mark.parametrize("way", ["whole", "whole-blocks", "chain-blocks"])
    @pytest.mark.parametrize("shape", shape_ids(tuple(shape for shape in QUICK if shape in SEVERAL_TOKENS)))
    def test_shapes(
        self, shape: Shape, way: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.check_shape(shape, way, dtype, path, monkeypatch, "swiglu")

    @pytest.mark.slow
    @pytest.mark.parametrize(("dtype", "path"), WAYS)
    @pytest.mark.parametrize("activation", ["swiglu", "reglu", "gelu"])
    @pytest.mark.parametrize("way", ["whole", "whole-blocks", "chain", "chain-blocks"])
    @pytest.mark.parametrize("shape", shape_ids(SEVERAL_TOKENS))
    def test_all_shapes(
        self, shape: Shape, way: str, activation: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.check_shape(shape, way, dtype, path, monkeypatch, activation)

    def check_shape(
        self,
        shape: Shape,
        way: str,
        dtype: torch.dtype,
        path: str,
        monkeypatch: pytest.MonkeyPatch,
        activation: str,
    ) -> None:
        take_16bit_path(monkeypatch, path)
        if way.startswith("chain"):
            chain_single_ops(monkeypatch)
        if way.endswith("blocks"):
            make_blocks_small(monkeypatch, 16)
        problem = problem_of(shape, dtype, bias=True, activation=activation)
        exact, torchs = results(torch_experts, problem, torch.float64), results(torch_experts, problem)
        assert_all_as_good_as_torch(sonic_results(problem), exact, torchs, dtype)

    @pytest.mark.parametrize(("dtype", "path"), WAYS)
    def test_sums_over_thousands_of_rows(self, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every weight and bias gradient is one long sum: in a naive order its error grows with its length."""
        take_16bit_path(monkeypatch, path)
        problem = make_problem(4001, 16, 8, 1, 1, dtype, bias=True)
        exact, torchs = results(torch_experts, problem, torch.float64), results(torch_experts, problem)
        assert_all_as_good_as_torch(sonic_results(problem), exact, torchs, dtype)

    @pytest.mark.parametrize("path", ["native", "widened"])
    def test_tokens_are_summed_in_float32(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sixteen experts per token: their sum in bf16 would be wrong by several roundings."""
        take_16bit_path(monkeypatch, path)
        problem = make_problem(50, 32, 16, 16, 16, torch.bfloat16)
        exact, torchs = results(torch_experts, problem, torch.float64), results(torch_experts, problem)
        got = sonic_results(problem)
        for name in ("out", "x"):
            assert_as_good_as_torch(name, got[name], exact[name], torchs[name])

    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=short)
    def test_gradients_have_the_dtype_of_what_they_belong_to(self, dtype: torch.dtype) -> None:
        for scores_dtype in (*HALVES, torch.float32, torch.float64):
            problem = small(dtype)
            problem.scores = problem.scores.to(scores_dtype)
            leaves = problem.leaves()
            out = call(leaves, problem)
            assert out.dtype == dtype
            for name, grad in gradients(out, leaves, problem.dout).items():
                assert (grad.dtype, grad.shape) == (leaves[name].dtype, leaves[name].shape), name

    def test_layouts_are_a_permutation_of_each_other(self) -> None:
        problem = small()
        N = problem.w2.shape[2]
        order = torch.arange(2 * N).reshape(2, N).t().reshape(-1)  # gate 0, up 0, gate 1, up 1, …
        mixed = small(glu_layout="interleaved")
        mixed.w1, mixed.b1 = problem.w1[:, order].contiguous(), problem.b1[:, order].contiguous()
        want = sonic_results(problem)
        want["w1"], want["b1"] = want["w1"][:, order], want["b1"][:, order]
        assert_all_close(sonic_results(mixed), want)


class TestOnlyWhatIsNeeded:
    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize(
        "needed", list(itertools.product([False, True], repeat=6)), ids=lambda n: "".join("01"[i] for i in n)
    )
    def test_flags(self, needed: tuple[bool, ...], save: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each gradient that is asked for is right, the kernel hears of no other, and what is frozen gets None."""
        problem, want = oracle("swiglu", "concatenated", True)
        leaves = problem.leaves()
        for name, need in zip(LEAVES, needed, strict=True):
            leaves[name].requires_grad_(need)
        forward, backward = Spy(monkeypatch, "experts"), Spy(monkeypatch, "experts_bwd")
        out = call(leaves, problem, save=save)
        assert out.requires_grad == any(needed)
        assert forward.calls[0]["need_h"] == (save == "preactivation" and any(needed))
        if any(needed):
            out.backward(problem.dout)
            flags = backward.calls[0]
            asked = [flags[f"need_{name}"] for name in ("dx", "dw1", "dw2", "dscores", "db1", "db2")]
            assert asked == list(needed)
        for name, need in zip(LEAVES, needed, strict=True):
            assert (leaves[name].grad is not None) == need, name
            if need:
                assert_all_close({name: leaves[name].grad}, {name: want[name]})

    def test_asking_for_one_gradient_computes_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`torch.autograd.grad` for the input alone: adapters and input optimisation do so with trainable weights."""
        problem, want = oracle("swiglu", "concatenated", True)
        leaves = problem.leaves()
        spy = Spy(monkeypatch, "experts_bwd")
        (dx,) = torch.autograd.grad(call(leaves, problem), leaves["x"], problem.dout)
        assert_all_close({"x": dx}, {"x": want["x"]})
        assert spy.calls[0]["need_dx"]

    def test_one_call_each_way(self) -> None:
        problem = small()
        plan, leaves = problem.plan, problem.leaves()
        sonic.kernels.reset_counts()
        out = sonic.moe_mlp(**leaves, plan=plan)
        assert sonic.kernels.counts() == {("experts", "reference"): 1}
        out.sum().backward()
        assert sonic.kernels.counts() == {("experts", "reference"): 1, ("experts_bwd", "reference"): 1}

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    @pytest.mark.parametrize("save", SAVE_MODES)
    def test_inference_makes_no_preactivations(
        self, save: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parameters require gradients in inference too; nobody will ask for them there."""
        problem, want = oracle("swiglu", "concatenated", True)
        spy = Spy(monkeypatch, "experts")
        with mode():
            out = call(problem.leaves(), problem, save=save)
            rows = call_rows(
                problem.leaves() | {"x": problem.grouped().rows, "scores": problem.grouped().row_scores},
                problem.grouped().tokens_per_expert,
                save=save,
            )
        assert not out.requires_grad and not rows.requires_grad
        assert_all_close({"out": out}, {"out": want["out"]})
        assert [made["need_h"] for made in spy.calls] == [False, False]


class TestRows:
    """`expert_mlp`, beyond being `moe_mlp` on rows grouped beforehand (`TestGradients.test_float64`)."""

    @pytest.mark.parametrize("shape", shape_ids(QUICK))
    def test_shapes(self, shape: Shape) -> None:
        problem = problem_of(shape, bias=True)
        assert_all_close(row_results(problem), sonic_results(problem))

    def test_without_scores_they_are_one(self) -> None:
        problem = small()
        problem.scores = torch.ones_like(problem.scores)
        grouped, leaves = problem.grouped(), problem.leaves()
        leaves["x"] = grouped.rows.clone().requires_grad_()
        del leaves["scores"]
        out = call_rows(leaves, grouped.tokens_per_expert)
        got = {"out": out.detach()} | gradients(out, leaves, problem.dout[grouped.token_of_row])
        scored = problem.leaves() | {"x": leaves["x"], "scores": torch.ones_like(grouped.row_scores)}
        want_out = call_rows(scored, grouped.tokens_per_expert)
        del scored["scores"]
        want = {"out": want_out.detach()} | gradients(want_out, scored, problem.dout[grouped.token_of_row])
        assert_all_close(got, want)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
    def test_counts_of_any_integer_dtype(self, dtype: torch.dtype) -> None:
        problem = make_problem(300, 4, 3, 2, 1, seed=2)
        grouped = problem.grouped()
        leaves = problem.leaves() | {"x": grouped.rows, "scores": grouped.row_scores}
        want = call_rows(leaves, grouped.tokens_per_expert)
        assert_same_bits({"out": call_rows(leaves, grouped.tokens_per_expert.to(dtype))}, {"out": want})

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("way", ["whole", "chain"])
    @pytest.mark.parametrize("tail", [1, 300])
    def test_rows_of_nobody(self, tail: int, way: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A capacity layout: what stands in unused rows, NaN included, reaches neither output nor gradient."""
        if way == "chain":
            chain_single_ops(monkeypatch)
        problem = small()
        grouped = problem.grouped()
        R, dout = len(grouped.rows), problem.dout[grouped.token_of_row]
        both = []
        for unused in (0, tail):
            leaves = problem.leaves() | {
                "x": torch.cat((grouped.rows, grouped.rows.new_full((unused, 12), torch.nan))).requires_grad_(),
                "scores": torch.cat((grouped.row_scores, grouped.row_scores.new_full((unused,), torch.nan))),
            }
            leaves["scores"].requires_grad_()
            out = call_rows(leaves, grouped.tokens_per_expert, save=save)
            got = {"out": out.detach()}
            got |= gradients(out, leaves, torch.cat((dout, dout.new_full((unused, 12), torch.nan))))
            for name in ("out", "x", "scores"):
                assert torch.equal(got[name][R:], torch.zeros_like(got[name][R:])), name
                got[name] = got[name][:R]
            both.append(got)
        assert_all_close(both[1], both[0])

    def test_all_rows_may_be_of_nobody(self) -> None:
        problem = small()
        leaves = problem.leaves()
        del leaves["scores"]
        out = call_rows(leaves, torch.zeros(5, dtype=torch.int64))
        grads = gradients(out, leaves, problem.dout)
        for name, tensor in {"out": out, **grads}.items():
            assert torch.equal(tensor, torch.zeros_like(tensor)), name

    def test_expanded_and_strided_row_scores(self) -> None:
        problem = small()
        grouped = problem.grouped()
        R = len(grouped.rows)
        for scores in (
            torch.full((1,), 0.5, dtype=torch.float64).expand(R),
            torch.rand(R, 3, dtype=torch.float64)[:, 1],
        ):
            leaves = problem.leaves() | {"x": grouped.rows}
            out = call_rows(leaves | {"scores": scores}, grouped.tokens_per_expert)
            want = call_rows(leaves | {"scores": scores.contiguous()}, grouped.tokens_per_expert)
            assert_same_bits({"out": out}, {"out": want})


class TestPlans:
    @pytest.mark.parametrize("shape", shape_ids(QUICK))
    def test_pairs_in_any_order(self, shape: Shape) -> None:
        problem = problem_of(shape, bias=True)
        want = sonic_results(problem)
        order = torch.randperm(shape.T * shape.K)
        token = torch.arange(shape.T).repeat_interleave(shape.K)[order]
        plan = sonic.RoutingPlan.from_pairs(token, problem.expert_index.reshape(-1)[order], shape.T, shape.E)
        leaves = problem.leaves()
        leaves["scores"] = problem.scores.reshape(-1)[order].requires_grad_()
        out = sonic.moe_mlp(**leaves, plan=plan)
        got = {"out": out.detach()} | gradients(out, leaves, problem.dout)
        want["scores"] = want["scores"].reshape(-1)[order]
        assert_same_bits(got, want)

    @pytest.mark.parametrize("way", ["whole", "chain"])
    def test_tokens_without_expert(self, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Dropped pairs: rows and gradients of zero, not of whatever was there; other tokens as if nothing was."""
        if way == "chain":
            chain_single_ops(monkeypatch)
        problem = small()
        token, expert = torch.arange(19).repeat_interleave(2), problem.expert_index.reshape(-1)
        dropped = torch.tensor([0, 7, 8, 18])
        kept = ~torch.isin(token, dropped) & (torch.arange(38) % 5 != 0)
        plan = sonic.RoutingPlan.from_pairs(token[kept], expert[kept], 19, 5)
        leaves = problem.leaves()
        leaves["scores"] = problem.scores.reshape(-1)[kept].requires_grad_()
        out = sonic.moe_mlp(**leaves, plan=plan)
        got = {"out": out.detach()} | gradients(out, leaves, problem.dout)
        for name in ("out", "x"):
            assert torch.equal(got[name][dropped], torch.zeros(4, 12, dtype=torch.float64)), name
        problem.scores = torch.where(kept.reshape(19, 2), problem.scores, 0.0)
        want = sonic_results(problem)
        want["scores"] = want["scores"].reshape(-1)[kept]
        assert_all_close(got, want)

    def test_no_pair_at_all(self) -> None:
        problem = small()
        none = torch.zeros(0, dtype=torch.int64)
        leaves = problem.leaves() | {"scores": torch.zeros(0, requires_grad=True)}
        out = sonic.moe_mlp(**leaves, plan=sonic.RoutingPlan.from_pairs(none, none, 19, 5))
        for name, tensor in {"out": out, **gradients(out, leaves, problem.dout)}.items():
            assert torch.equal(tensor, torch.zeros_like(tensor)), name

    @pytest.mark.parametrize("where", ["x", "scores"])
    def test_nan_stays_with_its_token(self, where: str) -> None:
        problem = small()
        clean = sonic_results(problem)
        broken = problem.expert_index[3].tolist()
        getattr(problem, where)[3] = torch.nan
        got = sonic_results(problem)
        others = [t for t in range(19) if t != 3]
        assert got["out"][3].isnan().all() and got["x"][3].isnan().all()
        for name in ("out", "x", "scores"):
            assert_same_bits({name: got[name][others]}, {name: clean[name][others]})
        untouched = [e for e in range(5) if e not in broken]
        for name in ("w1", "w2", "b1"):
            assert_same_bits({name: got[name][untouched]}, {name: clean[name][untouched]})
            assert got[name][broken].isnan().any()


class TestSecondOrder:
    """Differentiating a gradient again: refused by name. Silence would be a wrong gradient penalty."""

    @pytest.mark.parametrize("entry", ["moe_mlp", "expert_mlp"])
    @pytest.mark.parametrize("loss", ["linear", "square"])
    @pytest.mark.parametrize("by", LEAVES)
    def test_refused(self, by: str, loss: str, entry: str) -> None:
        leaves, out = self.layer(entry, small().leaves())
        value = out.sum() if loss == "linear" else out.square().sum()
        (grad,) = torch.autograd.grad(value, leaves[by], create_graph=True)
        assert grad.requires_grad
        with pytest.raises(RuntimeError, match=rf"sonic\.{entry}: asked for the gradient of its gradient"):
            torch.autograd.grad(grad.square().sum(), leaves["w1"])

    @pytest.mark.parametrize("entry", ["moe_mlp", "expert_mlp"])
    @pytest.mark.parametrize("layout", ["contiguous", "strided"])
    @pytest.mark.parametrize("only", LEAVES)
    def test_refused_with_everything_else_frozen(self, only: str, layout: str, entry: str) -> None:
        """A gradient penalty on one input of a frozen layer, in a loss that has other parts to differentiate."""
        leaves = {name: leaf.detach() for name, leaf in small().leaves().items()}
        if layout == "strided":
            leaves = {name: torch.stack((leaf, leaf), -1)[..., 0] for name, leaf in leaves.items()}
        leaves[only].requires_grad_()
        leaves, out = self.layer(entry, leaves)
        (grad,) = torch.autograd.grad(out.sum(), leaves[only], create_graph=True)
        with pytest.raises(RuntimeError, match=rf"sonic\.{entry}: asked for the gradient of its gradient"):
            (grad.square().sum() + leaves[only].sum()).backward()

    def test_create_graph_alone_is_fine(self) -> None:
        problem = small()
        want = sonic_results(problem)
        leaves = problem.leaves()
        out = call(leaves, problem)
        grads = torch.autograd.grad(out, list(leaves.values()), problem.dout, create_graph=True)
        got = {"out": out.detach()} | dict(zip(leaves, (grad.detach() for grad in grads), strict=True))
        assert_same_bits(got, want)

    @staticmethod
    def layer(entry: str, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        problem = small()
        if entry == "moe_mlp":
            return leaves, call(leaves, problem)
        scores = leaves["scores"][:, 0].detach().requires_grad_(leaves["scores"].requires_grad)
        leaves = leaves | {"scores": scores}
        return leaves, call_rows(leaves, torch.tensor([4, 0, 9, 5, 1]))


class TestAutocast:
    @pytest.mark.parametrize("backward_inside", [True, False], ids=["backward-inside", "backward-outside"])
    @pytest.mark.parametrize("dtype", HALVES, ids=short)
    @pytest.mark.parametrize("entry", ["moe_mlp", "expert_mlp"])
    def test_equals_casting_by_hand(self, entry: str, dtype: torch.dtype, backward_inside: bool) -> None:
        problem = small(torch.float32)
        grouped = problem.grouped()

        def layer(leaves: dict[str, Tensor]) -> Tensor:
            if entry == "moe_mlp":
                return call(leaves, problem)
            return call_rows(leaves | {"scores": leaves["scores"][:, 0]}, torch.tensor([4, 0, 9, 5, 1]))

        leaves = problem.leaves()
        with torch.autocast("cpu", dtype):
            out = layer(leaves)
            if backward_inside:
                got = gradients(out, leaves, problem.dout)
        if not backward_inside:
            got = gradients(out, leaves, problem.dout)
        assert out.dtype == dtype
        assert all(grad.dtype == torch.float32 for grad in got.values())

        leaves = problem.leaves()
        cast = {name: leaf if name == "scores" else leaf.to(dtype) for name, leaf in leaves.items()}
        want_out = layer(cast)
        want = {"out": want_out.detach()} | gradients(want_out, leaves, problem.dout)
        assert_same_bits({"out": out.detach()} | got, want)
        assert grouped.rows.dtype == torch.float32

    def test_mixed_inputs_are_served(self) -> None:
        """Tokens in bf16 from the layer before, parameters in float32: what autocast is for."""
        problem = small(torch.float32)
        leaves = problem.leaves()
        leaves["x"] = problem.x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = call(leaves, problem)
        grads = gradients(out, leaves, problem.dout)
        assert (out.dtype, grads["x"].dtype, grads["w1"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)

    def test_float64_stays(self) -> None:
        problem, want = oracle("swiglu", "concatenated", True)
        with torch.autocast("cpu", torch.bfloat16):
            got = sonic_results(problem)
        assert_all_close(got, want)

    def test_disabled_region_inside(self) -> None:
        problem = small(torch.float32)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            got = sonic_results(problem)
        assert_same_bits(got, sonic_results(problem))


class TestAutograd:
    """Whatever else training code does with a function."""

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
    def test_checkpoint(self, use_reentrant: bool, save: str) -> None:
        problem = small()
        leaves, plan = problem.leaves(), problem.plan

        def layer(*values: Tensor) -> Tensor:
            return sonic.moe_mlp(**dict(zip(leaves, values, strict=True)), plan=plan, save=save)

        out = checkpoint(layer, *leaves.values(), use_reentrant=use_reentrant)
        out.backward(problem.dout)
        got = {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
        assert_same_bits(got, sonic_results(problem, save=save))

    def test_functional_call(self) -> None:
        layer = sonic.MoE(12, 10, 5, 2, bias=True, dtype=torch.float64)
        x = torch.randn(3, 4, 12, dtype=torch.float64)
        doubled = {name: (2 * value).detach().requires_grad_() for name, value in layer.named_parameters()}
        out = torch.func.functional_call(layer, doubled, (x,))
        got = {"out": out.detach()} | gradients(out, doubled, torch.ones_like(out))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(2)
        want_out = layer(x)
        want = {"out": want_out.detach()}
        assert_same_bits(got, want | gradients(want_out, dict(layer.named_parameters()), torch.ones_like(out)))

    @pytest.mark.parametrize("save", SAVE_MODES)
    def test_backward_twice_gives_the_same_twice(self, save: str) -> None:
        problem = small()
        leaves = problem.leaves()
        out = call(leaves, problem, save=save)
        first, second = (
            dict(
                zip(
                    leaves,
                    torch.autograd.grad(out, list(leaves.values()), problem.dout, retain_graph=True),
                    strict=True,
                )
            )
            for _ in range(2)
        )
        assert_same_bits(second, first)

    def test_gradients_add_up(self) -> None:
        problem = small()
        leaves = problem.leaves()
        for _ in range(3):
            call(leaves, problem).backward(problem.dout)
        want = sonic_results(problem)
        assert_all_close({n: leaf.grad for n, leaf in leaves.items()}, {n: 3 * want[n] for n in leaves})

    @pytest.mark.parametrize("change", ["x", "w1", "w2", "scores"])
    def test_changing_what_was_kept_is_noticed(self, change: str) -> None:
        problem = small()
        leaves = problem.leaves()
        out = call(leaves, problem)
        with torch.no_grad():
            leaves[change].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @pytest.mark.parametrize("name", LEAVES)
    @pytest.mark.parametrize("how", ["transposed", "strided", "expanded"])
    def test_any_strides(self, how: str, name: str) -> None:
        problem = small()
        value = getattr(problem, name)
        if how == "transposed":
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif how == "strided":
            value = torch.stack((value, value), -1)[..., 0]
        else:
            value = value[:1].expand(value.shape)
        assert not value.is_contiguous()
        setattr(problem, name, value.contiguous())
        want = sonic_results(problem)
        leaves = problem.leaves() | {name: value.detach().requires_grad_()}
        assert leaves[name].stride() == value.stride()
        out = call(leaves, problem)
        assert_same_bits({"out": out.detach()} | gradients(out, leaves, problem.dout), want)

    @pytest.mark.parametrize("how", ["transposed", "expanded"])
    def test_any_strides_of_the_incoming_gradient(self, how: str) -> None:
        problem = small()
        if how == "transposed":
            strided = problem.dout.t().contiguous().t()
        else:
            strided = torch.tensor(0.7, dtype=torch.float64).expand(problem.dout.shape)
        problem.dout = strided.contiguous()
        want = sonic_results(problem)
        problem.dout = strided
        assert_same_bits(sonic_results(problem), want)

    def test_plan_with_unusual_indices(self) -> None:
        """Indices of any integer dtype and any strides make the same plan."""
        problem = small()
        want = problem.plan
        for index in (
            problem.expert_index.int(),
            problem.expert_index.to(torch.uint8),
            problem.expert_index.t().contiguous().t(),
        ):
            plan = sonic.RoutingPlan.from_topk(index, 5)
            for name in ("expert_offset_E1", "token_of_row_R", "slot_of_row_R", "row_by_token_R", "token_offset_T1"):
                assert torch.equal(getattr(plan, name), getattr(want, name)), name

    def test_the_same_tensor_twice(self) -> None:
        """One weight tensor in both roles gets both gradients."""
        problem = make_problem(19, 12, 12, 5, 2, activation="gelu")
        want = results(dense_loop, problem)
        leaves = problem.leaves()
        shared = leaves["w1"]
        del leaves["w1"], leaves["w2"]
        out = sonic.moe_mlp(**leaves, w1=shared, w2=shared.transpose(1, 2), plan=problem.plan, activation="gelu")
        problem.w2 = problem.w1.transpose(1, 2)
        want = results(dense_loop, problem)
        (grad,) = torch.autograd.grad(out, shared, problem.dout)
        assert_all_close({"w": grad}, {"w": want["w1"] + want["w2"].transpose(1, 2)})


class TestWithoutData:
    """Shapes without numbers: memory estimators and deferred initialisation run layers so."""

    def test_fake_tensors(self) -> None:
        with FakeTensorMode():
            layer = sonic.MoE(12, 10, 5, 2, bias=True)
            x = torch.randn(3, 4, 12, requires_grad=True)
            out = layer(x)
            out.sum().backward()
            assert out.shape == x.shape == x.grad.shape
            assert layer.w1.grad.shape == layer.w1.shape

    def test_fake_tensors_in_expert_mlp(self) -> None:
        with FakeTensorMode():
            layer = sonic.MoE(12, 10, 5, 2, shared_intermediate_size=7)
            assert layer(torch.randn(6, 12)).shape == (6, 12)

    def test_meta_device(self) -> None:
        layer = sonic.MoE(12, 10, 5, 2, bias=True, shared_intermediate_size=7, device="meta")
        x = torch.randn(3, 4, 12, device="meta", requires_grad=True)
        out = layer(x)
        out.sum().backward()
        assert out.device.type == "meta" and x.grad.shape == x.shape


class TestRefusals:
    """A ValueError that names the function, the argument, what it was and what would be right."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(18, 12)}, r"x is \(18, 12\), expected \(T, D\) = \(19, D\)"),
            ({"x": torch.zeros(19, 1, 12)}, r"x is \(19, 1, 12\), expected \(T, D\)"),
            ({"x": torch.zeros(19, 12, dtype=torch.int64)}, "x is int64, expected bfloat16 or float16"),
            ({"x": [[0.0] * 12] * 19}, "x is a list, expected a tensor"),
            ({"x": torch.zeros(19, 12, dtype=torch.bfloat16)}, "w1 is float32, expected bfloat16 like x"),
            ({"w1": torch.zeros(5, 20, 11)}, r"w1 is \(5, 20, 11\), expected \(E, U, D\) = \(5, U, 12\)"),
            ({"w1": torch.zeros(4, 20, 12)}, r"w1 is \(4, 20, 12\), expected \(E, U, D\) = \(5, U, 12\)"),
            ({"w1": torch.zeros(5, 21, 12)}, r"w1 is \(5, 21, 12\), expected \(E, U, D\) with an even U"),
            ({"w2": torch.zeros(5, 12, 20)}, r"w2 is \(5, 12, 20\), expected \(E, D, N\) = \(5, 12, 10\)"),
            ({"w2": torch.zeros(5, 12, 10, dtype=torch.float64)}, "w2 is float64, expected float32 like x"),
            ({"w2": torch.zeros(5, 12, 10, device="meta")}, "w2 is on meta, expected on cpu like x"),
            ({"b1": torch.zeros(5, 10)}, r"b1 is \(5, 10\), expected \(E, U\) = \(5, 20\)"),
            ({"b2": torch.zeros(12)}, r"b2 is \(12,\), expected \(E, D\) = \(5, 12\)"),
            ({"b2": torch.zeros(5, 12, dtype=torch.float16)}, "b2 is float16, expected float32 like x"),
            ({"scores": torch.zeros(19, 3)}, r"scores is \(19, 3\), expected \(T, K\) = \(19, 2\)"),
            ({"scores": torch.zeros(38)}, r"scores is \(38,\), expected \(T, K\) = \(19, 2\)"),
            ({"scores": torch.zeros(19, 2, dtype=torch.int32)}, "scores is int32, expected bfloat16"),
            ({"scores": torch.zeros(19, 2, device="meta")}, "scores is on meta, expected on cpu"),
            ({"plan": "everyone to expert 0"}, "plan is a str, expected a sonic.RoutingPlan"),
            ({"activation": "swish"}, "activation is 'swish', expected one of 'swiglu', 'geglu'"),
            ({"glu_layout": "split"}, "glu_layout is 'split', expected one of 'concatenated', 'interleaved'"),
            ({"save": "everything"}, "save is 'everything', expected one of 'preactivation', 'input'"),
            ({"backend": "magic"}, "backend is 'magic', expected one of 'cute', 'triton', 'reference'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_moe_mlp(self, change: dict[str, Any], message: str) -> None:
        problem = small(torch.float32)
        given = {name: getattr(problem, name) for name in LEAVES} | {"plan": problem.plan} | change
        with pytest.raises(ValueError, match=r"sonic\.moe_mlp: " + message):
            sonic.moe_mlp(**given)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rows": torch.zeros(12)}, r"rows is \(12,\), expected \(R, D\)"),
            ({"row_scores": torch.zeros(37)}, r"row_scores is \(37,\), expected \(R,\) = \(38,\)"),
            ({"row_scores": torch.zeros(38, dtype=torch.int32)}, "row_scores is int32, expected bfloat16"),
            (
                {"tokens_per_expert": torch.tensor([10, 10, 10, 9, -1])},
                "tokens_per_expert is .*-1.*, expected counts >= 0",
            ),
            ({"tokens_per_expert": torch.tensor([10, 10, 10, 9, 0])}, "tokens_per_expert is .* sum to at most R = 38"),
            ({"tokens_per_expert": torch.tensor([8.0, 8, 8, 8, 6])}, "tokens_per_expert is float32, expected int64"),
            ({"tokens_per_expert": torch.tensor([True] * 5)}, "tokens_per_expert is bool, expected int64"),
            ({"tokens_per_expert": [8, 8, 8, 8, 6]}, "tokens_per_expert is a list, expected an integer tensor"),
            ({"tokens_per_expert": torch.tensor([[8, 8, 8, 8, 6]])}, r"tokens_per_expert is \(1, 5\), expected \(E,\)"),
            ({"tokens_per_expert": torch.tensor([30, 8])}, r"w1 is \(5, 20, 12\), expected \(E, U, D\) = \(2, U, 12\)"),
            ({"b1": torch.zeros(5, 10)}, r"b1 is \(5, 10\), expected \(E, U\) = \(5, 20\)"),
            ({"activation": "swish"}, "activation is 'swish', expected one of 'swiglu', 'geglu'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_expert_mlp(self, change: dict[str, Any], message: str) -> None:
        problem = small(torch.float32)
        grouped = problem.grouped()
        given: dict[str, Any] = {"rows": grouped.rows, "w1": problem.w1, "w2": problem.w2}
        given |= {"tokens_per_expert": grouped.tokens_per_expert, "row_scores": grouped.row_scores}
        with pytest.raises(ValueError, match=r"sonic\.expert_mlp: " + message):
            sonic.expert_mlp(**{**given, **change})
