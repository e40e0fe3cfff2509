"""``sonic.compat.sonicmoe``, and how both packages come under their names: gradients, views, bytes, refusals."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sonic.compat
from sonic.compat import sonicmoe
from sonic.compat.sonicmoe import ActivationType, KernelBackendMoE, MoE, enable_quack_gemm
from sonic.compat.sonicmoe.enums import is_glu
from sonic.compat.sonicmoe.functional import (
    TC_topk_router_metadata,
    count_cumsum,
    general_routing_router_metadata,
    moe_general_routing_inputs,
    moe_TC_softmax_topk_layer,
)
from sonic.compat.sonicmoe.gemm_choice import is_using_quack_gemm
from tests.helpers import assert_close, formula, relative_error
from tests.test_memory import Saved

T, D, N, E, K = 37, 24, 10, 7, 3
OURS = {"relu_sq": "relu2"}


def activation_of(kind: ActivationType, layout: str, h: Tensor) -> Tensor:
    return formula(OURS.get(kind.value, kind.value), layout, h)


class Leaves:
    """Weights as parameters (E, U, D) and (E, D, N), on unit scale, and the views that the functions take."""

    def __init__(self, kind: ActivationType, bias: bool, dtype: torch.dtype = torch.float64) -> None:
        U = 2 * N if is_glu(kind) else N

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

        self.x, self.router = normal(T, D), normal(E, D, scale=1 / math.sqrt(D))
        self.up, self.down = normal(E, U, D, scale=1 / math.sqrt(D)), normal(E, D, N, scale=1 / math.sqrt(N))
        self.b1, self.b2 = (normal(E, U), normal(E, D)) if bias else (None, None)

    @property
    def views(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.up.permute(1, 2, 0), self.b1, self.down.permute(1, 2, 0), self.b2

    def all(self, *more: Tensor) -> list[Tensor]:
        return [t for t in (self.x, self.up, self.down, self.b1, self.b2, *more) if t is not None]

    def pairs(self, scores_P: Tensor, token_P: Tensor, expert_P: Tensor, kind: ActivationType, layout: str) -> Tensor:
        """The formula, pair by pair."""
        h = torch.einsum("pd,pud->pu", self.x[token_P], self.up[expert_P])
        h = h if self.b1 is None else h + self.b1[expert_P]
        y = torch.einsum("pn,pdn->pd", activation_of(kind, layout, h), self.down[expert_P])
        y = y if self.b2 is None else y + self.b2[expert_P]
        return torch.zeros_like(self.x).index_add(0, token_P, y * scores_P[:, None])


def check(got: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    assert_close("out", got, wanted.detach())
    weight = torch.randn_like(wanted)
    for place, pair in enumerate(
        zip(*(torch.autograd.grad(out, leaves, weight) for out in (got, wanted)), strict=True)
    ):
        assert_close(f"gradient {place}", *pair)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", list(ActivationType))
@pytest.mark.parametrize("concat", [False, True])
def test_top_k_layer(kind: ActivationType, bias: bool, concat: bool) -> None:
    leaves = Leaves(kind, bias)
    layout = "concatenated" if concat else "interleaved"
    for over_topk, norm in ((True, False), (True, True), (False, False), (False, True)):
        out, logits, frequency = moe_TC_softmax_topk_layer(
            leaves.x, leaves.router, *leaves.views, K, 0, kind, False, over_topk, norm, concat
        )
        exact_logits = F.linear(leaves.x, leaves.router)
        assert_close("logits", logits, exact_logits.detach())
        probability = exact_logits.softmax(-1)
        best, expert = (exact_logits if over_topk else probability).topk(K, dim=-1)
        scores = best.softmax(-1) if over_topk else best / best.sum(-1, keepdim=True) if norm else best
        assert torch.equal(frequency, torch.bincount(expert.flatten(), minlength=E).int())
        token = torch.arange(T).repeat_interleave(K)
        wanted = leaves.pairs(scores.flatten(), token, expert.flatten(), kind, layout)
        # what reaches the logits from outside, as a loss on them does, is added
        outside = torch.randn_like(logits)
        check(out + (logits * outside).sum(), wanted + (exact_logits * outside).sum(), leaves.all(leaves.router))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("is_inference", [False, True])
def test_general_routing(bias: bool, concat: bool, is_inference: bool) -> None:
    leaves = Leaves(ActivationType.GEGLU, bias)
    chosen = torch.rand(T, E) < 0.4
    chosen[5], chosen[:, 2] = False, False  # a token and an expert without a pair
    token, expert = torch.nonzero(chosen, as_tuple=True)
    for order in (torch.arange(len(token)), torch.randperm(len(token))):
        token, expert = token[order], expert[order]
        scores = torch.randn(len(token), dtype=torch.float64, requires_grad=True)
        out, frequency = moe_general_routing_inputs(
            leaves.x,
            scores,
            token.int(),
            expert.int(),
            *leaves.views,
            E,
            stream_id=None,
            activation_type="geglu",
            is_inference_mode_enabled=is_inference,
            concat_layout=concat,
        )
        assert torch.equal(frequency, chosen.sum(0).int())
        layout = "concatenated" if concat else "interleaved"
        check(out, leaves.pairs(scores, token, expert, ActivationType.GEGLU, layout), leaves.all(scores))


def switch_loss(logits: Tensor, expert_TK: Tensor) -> Tensor:
    share = torch.bincount(expert_TK.flatten(), minlength=E).double() / expert_TK.numel()
    return E * (share * logits.softmax(-1).mean(0)).sum()


@pytest.mark.parametrize("backend", [KernelBackendMoE.sonicmoe, KernelBackendMoE.scattermoe, KernelBackendMoE.torch])
@pytest.mark.parametrize("kind", list(ActivationType))
def test_layer(kind: ActivationType, backend: KernelBackendMoE) -> None:
    layer = MoE(E, K, D, N, kind, True, 0.3).double()
    for bias in (layer.c_fc.bias, layer.c_proj.bias):
        torch.nn.init.normal_(bias)
    leaves = Leaves(kind, True)
    leaves.up, leaves.down, leaves.router = layer.c_fc.weight, layer.c_proj.weight, layer.router.weight
    leaves.b1, leaves.b2 = layer.c_fc.bias, layer.c_proj.bias
    out, aux_loss = layer(leaves.x.view(1, T, D), kernel_backend_moe=backend)
    assert out.shape == (1, T, D)
    logits = F.linear(leaves.x, leaves.router)
    best, expert = logits.topk(K, dim=-1)
    token = torch.arange(T).repeat_interleave(K)
    wanted = leaves.pairs(best.softmax(-1).flatten(), token, expert.flatten(), kind, "interleaved")
    exact_loss = switch_loss(logits, expert)
    assert_close("aux_loss", aux_loss, exact_loss.detach())
    check(out[0] + 3 * aux_loss, wanted + 3 * exact_loss, leaves.all(leaves.router))


def test_layer_has_the_parameters_and_the_signature_of_the_package() -> None:
    layer = MoE(
        num_experts=8,
        num_experts_per_tok=2,
        hidden_size=16,
        intermediate_size=4,
        activation_function=ActivationType.SWIGLU,
        add_bias=True,
        std=0.5,
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "router.weight": (8, 16),
        "c_fc.weight": (8, 8, 16),
        "c_fc.bias": (8, 8),
        "c_proj.weight": (8, 16, 4),
        "c_proj.bias": (8, 16),
    }
    assert list(layer.state_dict()) == list(shapes)
    assert 0.4 < layer.c_fc.weight.std() < 0.6 and not layer.c_fc.bias.any()
    assert isinstance(layer.stream_id, int)
    first_ten = ["x", "router_w", "w1", "b1", "w2", "b2", "K", "stream_id", "activation_type"]
    assert list(inspect.signature(moe_TC_softmax_topk_layer).parameters)[:9] == first_ten


def test_inference_keeps_no_h_and_is_right_nevertheless() -> None:
    layer = MoE(E, K, D, N, "swiglu", False, 0.3).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    kept, grads = [], []
    for run in (lambda: layer(x), lambda: layer(x, is_inference_mode=True), lambda: layer.eval()(x)):
        with Saved(list(layer.parameters())) as saved:
            out, aux_loss = run()
        kept.append(sum(t.numel() for t in saved.tensors.values() if t.is_floating_point()))
        grads.append(torch.autograd.grad(out.square().sum() + aux_loss, [x, *layer.parameters()]))
    assert kept[0] - kept[1] == kept[0] - kept[2] == T * K * 2 * N
    assert all(relative_error(*pair) < 1e-13 for other in grads[1:] for pair in zip(other, grads[0], strict=True))
    with torch.no_grad(), Saved([]) as saved:
        layer(x)
    assert not saved.tensors


def test_bytes_that_are_kept_and_no_copy_of_a_weight() -> None:
    layer = MoE(8, 2, 64, 32, ActivationType.SWIGLU, False, 0.1).bfloat16()
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    R = 128 * 2
    with Saved(list(layer.parameters())) as saved:
        out, _ = layer(x)
    kept = [t for t in saved.tensors.values() if t.is_floating_point()]
    # tokens and H in bf16, scores and the chosen probabilities in float32: nothing over (T, E), no view of a weight
    small = sum(t.untyped_storage().nbytes() for t in kept) - 2 * (128 * 64 + R * 64)
    assert 4 * R <= small <= 2 * 4 * R + 64, small
    integers = sum(t.untyped_storage().nbytes() for t in saved.tensors.values() if not t.is_floating_point())
    assert integers <= 4 * (2 * R + 2 * 9 + 8)
    out.sum().backward()
    assert layer.c_fc.weight.grad.shape == (8, 64, 64) and layer.c_fc.weight.grad.is_contiguous()


def test_weights_of_another_memory_order_are_served() -> None:
    leaves = Leaves(ActivationType.SWIGLU, False)
    views = leaves.views
    outputs = [
        moe_TC_softmax_topk_layer(leaves.x, leaves.router, w1, None, w2, None, K)[0]
        for w1, w2 in ((views[0], views[2]), (views[0].contiguous(), views[2].contiguous()))
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = MoE(E, K, D, N, "swiglu", True, 0.3).to(dtype)
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    runs = {}
    for backend in ("sonicmoe", "scattermoe", "torch"):
        out, aux_loss = layer(x, KernelBackendMoE(backend))
        loss = out.double().sin().sum() + aux_loss.double()
        runs[backend] = [out, aux_loss, *torch.autograd.grad(loss, [x, *layer.parameters()])]
        assert out.dtype == (torch.promote_types(dtype, torch.float32) if backend == "torch" else dtype)
        assert aux_loss.dtype == torch.float32
    limit = 10 * torch.finfo(dtype).eps  # two roundings more than the loop in float32, none of which grows
    for backend in ("sonicmoe", "scattermoe"):
        worst = max(relative_error(*pair) for pair in zip(runs[backend], runs["torch"], strict=True))
        assert worst < limit, (backend, worst)


def test_edges() -> None:
    for num_experts, top_k, tokens in ((1, 1, 5), (3, 3, 4), (5, 2, 0), (384, 3, 2)):
        layer = MoE(num_experts, top_k, 8, 6, "swiglu", True, 0.3)
        for backend in ("sonicmoe", "scattermoe", "torch"):
            x = torch.randn(tokens, 8, requires_grad=True)
            out, aux_loss = layer(x, KernelBackendMoE(backend))
            (out.sum() + aux_loss).backward()
            assert out.shape == (tokens, 8) and x.grad.shape == (tokens, 8)


def test_counts() -> None:
    x = torch.tensor([3, 0, 3, 6])
    count, running = count_cumsum(x, 7, do_cumsum=True)
    assert count.tolist() == [1, 0, 0, 2, 0, 0, 1] and running.tolist() == [1, 1, 1, 3, 3, 3, 4]
    assert count_cumsum(x[:0], 3, do_cumsum=False).tolist() == [0, 0, 0]
    compiled = torch.compile(count_cumsum, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(*pair) for pair in zip(compiled(x=x, E=7), (count, running), strict=True))
    for bad in (torch.tensor([0, 7]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"count_cumsum: x is out of range \((7|-1)\), expected 0 <= x < E = 7"):
            count_cumsum(bad, 7)
        with pytest.raises(RuntimeError, match="x is out of range"):
            compiled(x=bad, E=7)
    for bad in (torch.rand(3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="count_cumsum: x is"):
            count_cumsum(bad, 7)


def test_metadata_of_december_2025() -> None:
    expert_TK = torch.rand(T, E).topk(K, dim=-1).indices
    frequency, ends = count_cumsum(expert_TK.flatten(), E)
    offset, gather, scatter, reverse, per_token = TC_topk_router_metadata(expert_TK, ends, K)
    order = torch.argsort(expert_TK.flatten(), stable=True)
    assert torch.equal(offset, F.pad(ends, (1, 0))) and torch.equal(scatter, order.int())
    assert torch.equal(gather, (order // K).int()) and torch.equal(scatter[reverse.long()], torch.arange(T * K).int())
    assert torch.equal(per_token, torch.arange(0, T * K + 1, K).int())
    token = torch.arange(T).repeat_interleave(K)
    general = general_routing_router_metadata(torch.rand(T * K), token, expert_TK.flatten(), T, E)
    assert all(
        torch.equal(*pair)
        for pair in zip(general, (frequency, offset, gather, scatter, reverse, per_token), strict=True)
    )


def test_what_is_refused() -> None:
    leaves = Leaves(ActivationType.SWIGLU, True)
    w1, b1, w2, b2 = leaves.views
    x, router = leaves.x, leaves.router
    layer = MoE(E, K, D, N, "swiglu", False, 0.1)
    pairs = (torch.rand(2), torch.tensor([0, 1]), torch.tensor([0, 0]))
    for match, call in (
        ("kernel_backend_moe is .*fp8 is not served", lambda: layer(torch.rand(2, D), KernelBackendMoE.sonicmoe_fp8)),
        (
            "b2 is None beside a b1, expected both or neither",
            lambda: moe_TC_softmax_topk_layer(x, router, w1, b1, w2, None, K),
        ),
        (
            "b1 is None beside a b2, expected both or neither",
            lambda: moe_TC_softmax_topk_layer(x, router, w1, None, w2, b2, K),
        ),
        ("w1 is", lambda: moe_TC_softmax_topk_layer(x, router, leaves.up, b1, w2, b2, K)),
        ("w2 is", lambda: moe_TC_softmax_topk_layer(x, router, w1, b1, leaves.down, b2, K)),
        ("x is", lambda: moe_TC_softmax_topk_layer(x[:, 1:], router, w1, b1, w2, b2, K)),
        ("top_k is 8", lambda: moe_TC_softmax_topk_layer(x, router, w1, b1, w2, b2, E + 1)),
        ("activation_type is 'tanh'", lambda: moe_TC_softmax_topk_layer(x, router, w1, b1, w2, b2, K, 0, "tanh")),
        ("w1 is", lambda: moe_general_routing_inputs(x, *pairs, w1, b1, w2, b2, E + 1, 0, "swiglu")),
        ("token_indices is", lambda: moe_general_routing_inputs(x, pairs[0][:1], *pairs[1:], w1, b1, w2, b2, E)),
        (
            "more than once",
            lambda: moe_general_routing_inputs(x, pairs[0], pairs[2], pairs[2], w1, b1, w2, b2, E, 0, "swiglu"),
        ),
        ("activation_function is 'tanh'", lambda: MoE(E, K, D, N, "tanh", False, 0.1)),
        ("num_experts_per_tok is 9", lambda: MoE(8, 9, D, N, "swiglu", False, 0.1)),
        ("hidden_states is", lambda: layer(torch.rand(2, D + 1))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for name in ("fp8", "accumulate_wgrad_into_main_grad", "activation_func_clamp_value"):
        with pytest.raises(TypeError, match=name):
            moe_general_routing_inputs(x, *pairs, w1, b1, w2, b2, E, 0, "swiglu", **{name: True})


def test_the_switch_of_gemms_is_told_again_and_ends_with_an_error_too() -> None:
    assert not is_using_quack_gemm()
    with pytest.raises(ZeroDivisionError), enable_quack_gemm():
        assert is_using_quack_gemm()
        with enable_quack_gemm(False):
            assert not is_using_quack_gemm()
        raise ZeroDivisionError
    assert not is_using_quack_gemm()


@pytest.mark.slow
def test_layer_compiles_whole() -> None:
    layer = MoE(E, K, D, N, "swiglu", True, 0.3)
    x = torch.randn(T, D, requires_grad=True)
    runs = []
    for run in (layer, torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")):
        out, aux_loss = run(x)
        runs.append(torch.autograd.grad(out.square().sum() + aux_loss, [x, *run.parameters()]))
    assert all(relative_error(*pair) < 1e-6 for pair in zip(*runs, strict=True))


# ---------------------------------------------------------------- under the packages' own names


@pytest.mark.parametrize("name", sorted(sonic.compat.PACKAGES))
def test_every_module_comes_under_its_name(name: str) -> None:
    with sonic.compat.install(name):
        for part, place in sonic.compat.PACKAGES[name].items():
            module = importlib.import_module(f"{name}.{part}".rstrip("."))
            assert module is importlib.import_module(f"sonic.compat.{place}")
        assert sonic.compat.is_installed(name)
        with pytest.raises(RuntimeError, match="installed already"):
            sonic.compat.install(name)
    assert not any(module.partition(".")[0] == name for module in sys.modules)
    with pytest.raises(RuntimeError, match="not installed"):
        sonic.compat.uninstall(name)


CALLER = """
import sonic.compat
assert not any(name.split(".")[0] in ("sonicmoe", "scattermoe") for name in __import__("sys").modules)
sonic.compat.install("sonicmoe")
sonic.compat.install("scattermoe")
import scattermoe, sonicmoe
import scattermoe.kernels.ops as kernels
import scattermoe.mlp
import sonicmoe.functional.triton_kernels as triton_kernels
from scattermoe.mlp import GLUMLP, MLP
from scattermoe.parallel_experts import ParallelExperts, flatten_sort_count, parallel_linear
from sonicmoe import KernelBackendMoE, MoE, count_cumsum, enable_quack_gemm, moe_TC_softmax_topk_layer
from sonicmoe.count_cumsum import count_cumsum as the_same
from sonicmoe.enums import ActivationType, is_glu
from sonicmoe.functional import count_cumsum, moe_general_routing_inputs
from sonicmoe.functional.utils import is_using_quack_gemm
assert the_same is count_cumsum is sonicmoe.count_cumsum
scattermoe.kernels.ops.ALLOW_TF32 = False
import torch
layer = MoE(4, 2, 8, 6, ActivationType.SWIGLU, False, 0.02)
output, aux_loss = layer(torch.randn(5, 8), kernel_backend_moe=KernelBackendMoE.sonicmoe)
"""


def test_a_caller_runs_unchanged() -> None:
    root = Path(sonic.__file__).parent.parent
    subprocess.run([sys.executable, "-c", textwrap.dedent(CALLER)], check=True, cwd=root)


def test_a_package_that_is_there_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("sonicmoe")
    real.__file__ = "/elsewhere/sonicmoe/__init__.py"
    monkeypatch.setitem(sys.modules, "sonicmoe", real)
    with pytest.raises(RuntimeError, match="sonicmoe was imported already, from /elsewhere"):
        sonic.compat.install("sonicmoe")
    assert sys.modules["sonicmoe"] is real and not sonic.compat.is_installed("sonicmoe")
    with pytest.raises(RuntimeError, match="not installed"):
        sonic.compat.uninstall("sonicmoe")
    monkeypatch.delitem(sys.modules, "sonicmoe")
    monkeypatch.setitem(sys.modules, "scattermoe.mlp", real)
    with pytest.raises(RuntimeError, match="scattermoe.mlp was imported already"):
        sonic.compat.install("scattermoe")
    with pytest.raises(ValueError, match="name is 'megablocks'"):
        sonic.compat.install("megablocks")
    assert sonic.compat.sonicmoe is sonicmoe and not hasattr(sonic.compat, "megablocks")
