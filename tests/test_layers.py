"""``sonic.MoE`` as users meet it: right against a dense layer, and at home in all of PyTorch that training needs."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sonic
from sonic.kernels import dispatch
from sonic.kernels.reference import blocks
from sonic.layers import SharedExpert
from sonic.routing import HashRouter, RoutingMetrics, TopKRouter
from sonic.routing.result import Routing
from tests.test_losses import be_a_rank, run_ranks

T, D, N, E, K = 19, 12, 10, 5, 2
GATED = ("swiglu", "geglu", "reglu", "swiglu_oai")


def router_with_losses(**options: Any) -> TopKRouter:
    return TopKRouter(D, E, K, aux_loss_coeff=0.3, z_loss_coeff=0.2, **options)


def layer_with_losses(dtype: torch.dtype = torch.float32, **options: Any) -> sonic.MoE:
    return sonic.MoE(D, N, E, K, router=router_with_losses(dtype=dtype), dtype=dtype, **options)


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    difference = float((got - wanted).norm() / wanted.norm().clamp(min=1e-300))
    return difference if math.isfinite(difference) else math.inf


def gradients_of(layer: nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Gradients by name, that of the tokens as ``x``."""
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(("x", *parameters), found, strict=True))


# ---------------------------------------------------------------- against a dense layer


def dense_activation(activation: str, layout: str, h: Tensor) -> Tensor:
    """The activations by their formulas, on (..., U)."""
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1) if layout == "concatenated" else (h[..., 0::2], h[..., 1::2])
        if activation == "swiglu_oai":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}[activation](gate) * up
    if activation == "relu2":
        return F.relu(h) ** 2
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](h)


def dense_forward(layer: sonic.MoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighed with scores that are zero for experts that were not chosen."""
    parameters = dict(layer.named_parameters())
    x_TD = x.reshape(-1, layer.hidden_size)

    def experts(name: str) -> Tensor | None:
        return parameters.get(name)

    logits_TE = x_TD @ parameters["router.weight"].t()
    chosen_TK, expert_TK = logits_TE.topk(layer.top_k, dim=1)
    weight_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, torch.softmax(chosen_TK, dim=1))
    h_TEU = torch.einsum("td,eud->teu", x_TD, parameters["w1"])
    if experts("b1") is not None:
        h_TEU = h_TEU + experts("b1")
    a_TEN = dense_activation(layer.activation, layer.glu_layout, h_TEU)
    y_TED = torch.einsum("ten,edn->ted", a_TEN, parameters["w2"])
    if experts("b2") is not None:
        y_TED = y_TED + experts("b2")
    out_TD = torch.einsum("te,ted->td", weight_TE, y_TED)
    if layer.shared is not None:
        h_TU = F.linear(x_TD, parameters["shared.w1"], experts("shared.b1"))
        a_TN = dense_activation(layer.activation, layer.glu_layout, h_TU)
        out_TD = out_TD + F.linear(a_TN, parameters["shared.w2"], experts("shared.b2"))
    return out_TD.reshape(x.shape)


@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "layout"),
    [
        *itertools.product(GATED, ("concatenated", "interleaved")),
        *((name, "concatenated") for name in ("gelu", "relu", "relu2", "silu")),
    ],
)
def test_layer_is_the_dense_layer(activation: str, layout: str, bias: bool, shared: int) -> None:
    options: dict[str, Any] = {"activation": activation, "glu_layout": layout, "bias": bias}
    layer = sonic.MoE(D, N, E, K, shared_intermediate_size=shared, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.router.weight *= 3
        layer.w1 *= 6 if activation == "swiglu_oai" else 2  # so that swiglu_oai meets its clamps
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(T, D, dtype=torch.float64)
    y, wanted = layer(x), dense_forward(layer, x)
    assert error(y, wanted) <= 1e-13
    got, want = gradients_of(layer, x, y, dy), gradients_of(layer, x, wanted, dy)
    assert len(got) == 1 + 3 + 2 * bias + bool(shared) * (2 + 2 * bias)
    for name, gradient in want.items():
        assert gradient.norm() > 1e-3 and error(got[name], gradient) <= 1e-12, name


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_what_is_kept_changes_no_result(save: str) -> None:
    torch.manual_seed(0)
    layer = layer_with_losses(torch.float64, save=save, bias=True, shared_intermediate_size=6)
    plain = copy.deepcopy(layer)
    plain.save = plain.shared.save = "preactivation"
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    got, want = (gradients_of(module, x, module(x), dy) for module in (layer, plain))
    assert max(error(got[name], gradient) for name, gradient in want.items()) <= 1e-13


@pytest.mark.parametrize("shape", [(D,), (T, D), (2, 3, D), (2, 3, 4, D), (0, D), (2, 0, D), (1, 1, D)], ids=str)
@pytest.mark.parametrize("shared", [0, 7])
def test_leading_dimensions(shape: tuple[int, ...], shared: int) -> None:
    layer = sonic.MoE(D, N, E, K, shared_intermediate_size=shared, bias=True, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y_again, routing = layer(x, return_routing=True)
    assert torch.equal(y, y_again) and routing.plan.num_tokens == x.numel() // D
    if x.numel():
        assert error(y, dense_forward(layer, x)) <= 1e-13
    found = gradients_of(layer, x, y, torch.ones_like(y))
    assert found["x"].shape == x.shape
    assert all(gradient.isfinite().all() and (x.numel() or not gradient.any()) for gradient in found.values())


def test_strided_tokens() -> None:
    layer = sonic.MoE(D, N, E, K)
    x = torch.randn(D, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous() and torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("widened", [False, True], ids=["native", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient have the dtype of their tensor, and err by no more than some roundings."""
    fast = frozenset() if widened else frozenset((torch.bfloat16, torch.float16))
    monkeypatch.setattr(blocks, "_fast_16bit_dtypes", lambda: fast)
    layer = sonic.MoE(D, N, E, K, shared_intermediate_size=6, bias=True, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(64, D).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, y64, dy = layer(x), dense_forward(exact, x64), torch.randn(64, D).to(dtype)
    assert y.dtype == dtype
    got, want = gradients_of(layer, x, y, dy), gradients_of(exact, x64, y64, dy.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 6 * torch.finfo(dtype).eps)
    assert error(y, y64) <= tolerance
    for name, gradient in got.items():
        assert gradient.dtype == dtype and error(gradient, want[name]) <= tolerance, name


@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_autocast(tokens: torch.dtype) -> None:
    """As for ``nn.Linear``: products and output in autocast's dtype, gradients in that of the parameters."""
    layer = layer_with_losses(bias=True, shared_intermediate_size=6)
    x = torch.randn(T, D).to(tokens).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x, return_routing=True)
    assert y.dtype == torch.bfloat16 and routing.scores.dtype == torch.float32
    half = copy.deepcopy(layer)
    for name, parameter in half.named_parameters():
        if not name.startswith("router"):
            parameter.data = parameter.data.bfloat16()
    wanted = sonic.moe_mlp(
        x.bfloat16(), half.w1, half.w2, routing.scores, routing.plan, b1=half.b1, b2=half.b2
    ) + half.shared(x.bfloat16())
    assert torch.equal(y, wanted)
    y.float().square().sum().backward()
    assert x.grad.dtype == tokens
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in layer.parameters())


def test_autocast_leaves_float64_alone() -> None:
    layer = sonic.MoE(D, N, E, K, dtype=torch.float64)
    x = torch.randn(T, D, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64 and torch.equal(y, layer(x))


# ---------------------------------------------------------------- auxiliary losses


def test_losses_reach_backward_by_themselves() -> None:
    """The plain call is the call with routing, plus the gradient of the auxiliary loss in router and tokens."""
    layer = layer_with_losses(torch.float64)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, return_routing=True)
    assert torch.equal(layer(x), y)
    dy = torch.randn_like(y)
    attached = gradients_of(layer, x, layer(x), dy)
    of_loss = torch.autograd.grad(routing.aux_loss, (x, layer.router.weight), retain_graph=True)
    loss = dict(zip(("x", "router.weight"), of_loss, strict=True))
    without = gradients_of(layer, x, y, dy)
    for name, gradient in attached.items():
        if name in loss:
            assert loss[name].norm() > 1e-3 and error(gradient - without[name], loss[name]) <= 1e-12, name
        else:
            assert torch.equal(gradient, without[name]), name


@pytest.mark.parametrize("mode", ["eval", "no loss"])
def test_nothing_is_attached(mode: str) -> None:
    layer = layer_with_losses(torch.float64) if mode == "eval" else sonic.MoE(D, N, E, K, dtype=torch.float64)
    if mode == "eval":
        layer.eval()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(T, D, dtype=torch.float64)
    got = gradients_of(layer, x, layer(x), dy)
    want = gradients_of(layer, x, layer(x, return_routing=True)[0], dy)
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


def test_frozen_parts() -> None:
    layer = layer_with_losses()
    layer.router.requires_grad_(False)
    layer(torch.randn(T, D)).sum().backward()
    assert layer.router.weight.grad is None and layer.w1.grad.any()
    layer = layer_with_losses()
    layer.w1.requires_grad_(False)
    layer.w2.requires_grad_(False)
    layer(torch.randn(T, D)).sum().backward()
    assert layer.w1.grad is None and layer.router.weight.grad.any()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference(guard: Any) -> None:
    layer = layer_with_losses(shared_intermediate_size=6)
    x = torch.randn(T, D)
    wanted = layer(x)
    with guard():
        y = layer(x)
    assert not y.requires_grad and torch.equal(y, wanted)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_inference_computes_no_activations_for_backward(
    guard: Any, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H, the largest tensor of a layer, is not stored where nothing can be differentiated."""
    rows = []
    run = dispatch.run

    def watched(request: dispatch.Request, *arguments: Any, **options: Any) -> Any:
        result = run(request, *arguments, **options)
        if request.op == "experts":
            rows.append(result[1].shape[0])
        return result

    monkeypatch.setattr(dispatch, "run", watched)
    layer = layer_with_losses(shared_intermediate_size=6).train(training)
    with guard():
        layer(torch.randn(T, D))
    assert rows == [0, 0]


@pytest.mark.parametrize("shape", [(D,), (T, D), (2, 5, D), (0, D), (2, 0, D)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shared", [0, 6])
def test_output_is_no_view(shared: int, device: str, shape: tuple[int, ...]) -> None:
    """As with ``nn.Linear``: where a sharding library hooks the output, a change in place of a view drops its hook."""
    x = torch.randn(shape, device=device, requires_grad=True)
    assert not nn.Linear(D, D, bias=False, device=device)(x)._is_view()
    layer = sonic.MoE(D, N, E, K, shared_intermediate_size=shared, device=device)
    y = layer(x)
    assert not y._is_view() and y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert not layer(x)._is_view()


def test_output_may_be_changed_in_place() -> None:
    layer = layer_with_losses()
    for shape in ((T, D), (2, 5, D)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y += x
        y.relu_().sum().backward()
        (want,) = torch.autograd.grad((layer(x) + x).relu().sum(), x)
        assert error(x.grad, want) <= 1e-6


# ---------------------------------------------------------------- parameters and checkpoints


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [0, 7])
def test_checkpoint_keys(activation: str, bias: bool, shared: int) -> None:
    options: dict[str, Any] = {"activation": activation, "bias": bias, "shared_intermediate_size": shared}
    layer = sonic.MoE(D, N, E, K, **options)
    factor = 2 if activation == "swiglu" else 1
    wanted = {"w1": (E, factor * N, D), "w2": (E, D, N), "router.weight": (E, D)}
    if bias:
        wanted |= {"b1": (E, factor * N), "b2": (E, D)}
    if shared:
        wanted |= {"shared.w1": (factor * shared, D), "shared.w2": (D, shared)}
    if shared and bias:
        wanted |= {"shared.b1": (factor * shared,), "shared.b2": (D,)}
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == wanted
    assert {name for name, _ in layer.named_parameters()} == wanted.keys() and not dict(layer.named_buffers())

    other, x = sonic.MoE(D, N, E, K, **options), torch.randn(T, D)
    assert not torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not any(other.load_state_dict(torch.load(file, weights_only=True), strict=True))
    assert torch.equal(other(x), layer(x))
    if not bias:
        assert layer.b1 is None and layer.b2 is None


def test_a_checkpoint_that_does_not_fit_is_refused_by_name() -> None:
    state = sonic.MoE(D, N, E, K, bias=True).state_dict()
    with pytest.raises(RuntimeError, match='Unexpected key.*"b1", "b2"'):
        sonic.MoE(D, N, E, K).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for w1"):
        sonic.MoE(D, N + 1, E, K, bias=True).load_state_dict(state)


@pytest.mark.parametrize("how", ["argument", "context"])
def test_built_without_memory(how: str) -> None:
    options: dict[str, Any] = {"bias": True, "shared_intermediate_size": 7, "dtype": torch.bfloat16}
    if how == "argument":
        layer = sonic.MoE(D, N, E, K, device="meta", **options)
    else:
        with torch.device("meta"):
            layer = sonic.MoE(D, N, E, K, **options)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters()
    assert all(parameter.isfinite().all() and parameter.any() for parameter in layer.parameters())
    assert layer(torch.randn(T, D, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("init", ["linear", "normal", "callable"])
def test_initial_values(init: str) -> None:
    calls = []

    def fill(matrix: Tensor) -> None:
        calls.append(tuple(matrix.shape))
        nn.init.constant_(matrix, len(calls))

    width_d, width_n, experts, shared = 64, 100, 8, 144
    layer = sonic.MoE(
        width_d, width_n, experts, 2, bias=True, shared_intermediate_size=shared, init_std=0.5,
        init=fill if init == "callable" else init,
    )  # fmt: skip
    weights = {"w1": width_d, "w2": width_n, "shared.w1": width_d, "shared.w2": shared}
    biases = {"b1": width_d, "b2": width_n, "shared.b1": width_d, "shared.b2": shared}
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    for name, fan_in in (weights | biases).items():
        value = values[name]
        if init == "linear":  # as nn.Linear draws weights and biases
            bound = 1 / math.sqrt(fan_in)
            assert value.abs().max() <= bound and abs(float(value.mean())) < 0.2 * bound, name
            assert 0.9 < float(value.std()) / (bound / math.sqrt(3)) < 1.1 or value.numel() < 200, name
            assert value.unique().numel() > 0.9 * value.numel() * 0.5, name
        elif name in biases:
            assert not value.any(), name
        elif init == "normal":
            assert abs(float(value.std()) - 0.5) < 0.02 and abs(float(value.mean())) < 0.02, name
            assert value.abs().max() > 1.5, name
    if init == "callable":
        both = [(2 * width_n, width_d)] * experts + [(width_d, width_n)] * experts
        assert sorted(calls) == sorted([*both, (2 * shared, width_d), (width_d, shared)])
        # one call per expert's matrix, each filled with its own value
        assert all(values[name][expert].unique().numel() == 1 for name in ("w1", "w2") for expert in range(experts))
        assert values["w1"].unique().numel() == experts
    else:
        assert not torch.equal(values["w1"][0], values["w1"][1])  # experts differ from the start
    before = copy.deepcopy(values)
    layer.reset_parameters()
    if init != "callable":
        assert not torch.equal(layer.w1, before["w1"]) and not torch.equal(layer.router.weight, before["router.weight"])
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())


def test_copies() -> None:
    layer = layer_with_losses(
        bias=True, shared_intermediate_size=7, activation="reglu", glu_layout="interleaved", save="input"
    )
    x = torch.randn(T, D)
    layer(x).sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.w1.zero_()
    assert layer.w1.any()


def test_repr() -> None:
    layer = layer_with_losses(bias=True, shared_intermediate_size=7, save="input")
    told = repr(layer)
    assert f"hidden_size={D}, intermediate_size={N}, num_experts={E}, top_k={K}, activation='swiglu'" in told
    assert "bias=True" in told and "save='input'" in told and "backend" not in told
    assert "TopKRouter(" in told and "SharedExpert(hidden_size=12, intermediate_size=7, activation='swiglu'" in told
    assert "backend='reference'" in repr(sonic.MoE(D, N, E, K, backend="reference"))


def test_moving_and_casting() -> None:
    layer = layer_with_losses().to(torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(T, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(T, D, dtype=torch.float64)).dtype == torch.float64


def test_shared_expert_alone() -> None:
    shared = SharedExpert(D, N, bias=True, dtype=torch.float64)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    wanted = F.linear(
        dense_activation("swiglu", "concatenated", F.linear(x_TD, shared.w1, shared.b1)), shared.w2, shared.b2
    )
    assert error(shared(x_TD), wanted) <= 1e-13


# ---------------------------------------------------------------- routers of one's own


class TurnTaking(nn.Module):
    """No scores that learn: token t goes to experts t and t + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x_TD: Tensor) -> Routing:
        num_tokens = x_TD.shape[0]
        expert_TK = (torch.arange(num_tokens)[:, None] + torch.arange(2)) % E
        plan = sonic.RoutingPlan.from_topk(expert_TK, E)
        scores_TK = self.gain * torch.ones(num_tokens, 2, dtype=x_TD.dtype)
        aux_loss = self.gain.square() * 3
        return Routing(plan, scores_TK, x_TD.new_zeros(num_tokens, E), expert_TK, aux_loss, RoutingMetrics(plan))


class Threshold(nn.Module):
    """Every expert whose sigmoid is above a half: any number per token, none included."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, dtype=torch.float64))

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = x_TD @ self.weight.t()
        token_P, expert_P = (logits_TE > 0).nonzero(as_tuple=True)
        plan = sonic.RoutingPlan.from_pairs(token_P, expert_P, x_TD.shape[0], E)
        scores_P = torch.sigmoid(logits_TE[token_P, expert_P])
        return Routing(plan, scores_P, logits_TE, expert_P, logits_TE.new_zeros(()), RoutingMetrics(plan))


def test_router_of_ones_own() -> None:
    layer = sonic.MoE(D, N, E, 2, router=TurnTaking(), dtype=torch.float64)
    assert set(layer.state_dict()) == {"w1", "w2", "router.gain"}
    x = torch.randn(T, D, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    assert routing.plan.tokens_per_expert().sum() == 2 * T
    wanted = torch.stack([
        sum(
            F.linear(dense_activation("swiglu", "concatenated", F.linear(x[t], layer.w1[e % E])), layer.w2[e % E])
            for e in (t, t + 1)
        )
        for t in range(T)
    ])  # fmt: skip
    assert error(y, wanted) <= 1e-13
    # its own auxiliary loss, 3 gain^2, is attached like that of any router
    (with_loss,) = torch.autograd.grad(layer(x).sum(), layer.router.gain)
    (without,) = torch.autograd.grad(y.sum(), layer.router.gain)
    torch.testing.assert_close(with_loss - without, torch.tensor(6.0))


def test_router_with_any_number_of_experts_per_token() -> None:
    layer = sonic.MoE(D, N, E, 1, router=Threshold(), dtype=torch.float64)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[3] = 0  # this token goes nowhere
    y, routing = layer(x, return_routing=True)
    assert not y[3].any() and routing.plan.num_rows not in (T, 2 * T)
    logits_TE = x @ layer.router.weight.t()
    weight_TE = torch.sigmoid(logits_TE) * (logits_TE > 0)
    h_TEU = torch.einsum("td,eud->teu", x, layer.w1)
    y_TED = torch.einsum("ten,edn->ted", dense_activation("swiglu", "concatenated", h_TEU), layer.w2)
    wanted = torch.einsum("te,ted->td", weight_TE, y_TED)
    assert error(y, wanted) <= 1e-13
    dy = torch.randn_like(y)
    got, want = gradients_of(layer, x, y, dy), gradients_of(layer, x, wanted, dy)
    assert max(error(got[name], gradient) for name, gradient in want.items()) <= 1e-12


@pytest.mark.parametrize("tokens", [torch.bfloat16, torch.float16])
def test_float32_router_in_a_16_bit_layer(tokens: torch.dtype) -> None:
    """Routing as in float32, the experts in 16 bits; gradients and a step of the optimizer for both."""
    layer = layer_with_losses(tokens, bias=True, shared_intermediate_size=6)
    layer.router = router_with_losses(dtype=torch.float32)
    x = torch.randn(2, T, D).to(tokens).requires_grad_()
    y, routing = layer(x, return_routing=True)
    assert y.dtype == tokens and y.shape == x.shape and torch.equal(layer(x), y)
    alone = layer.router(x.detach().float().reshape(-1, D))
    assert torch.equal(routing.expert_index, alone.expert_index)
    torch.testing.assert_close(routing.scores, alone.scores)
    layer(x).float().square().sum().backward()
    assert x.grad.dtype == tokens and layer.w1.grad.dtype == tokens and x.grad.any() and layer.w1.grad.any()
    weight = layer.router.weight
    assert weight.grad.dtype == torch.float32 and weight.grad.any()
    before = weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=1e-6).step()
    assert not torch.equal(weight, before), "a step that bf16 would round away"


class Listening(TopKRouter):
    """Remembers what it is called with, beside the tokens."""

    def __init__(self, wants_sequence_length: bool) -> None:
        super().__init__(D, E, K)
        self.heard: list[dict[str, Any]] = []
        self.wants = wants_sequence_length

    @property
    def wants_sequence_length(self) -> bool:
        return self.wants

    def forward(self, x_TD: Tensor, **inputs: Any) -> Routing:
        self.heard.append(inputs)
        return super().forward(x_TD)


def test_the_router_gets_further_arguments_as_they_are() -> None:
    router = Listening(wants_sequence_length=False)
    layer, x, ids = sonic.MoE(D, N, E, K, router=router), torch.randn(2, 5, D), torch.arange(10).reshape(2, 5)
    y, _ = layer(x, return_routing=True, token_ids=ids, flag=None)
    assert router.heard[0]["token_ids"] is ids and router.heard[0] == {"token_ids": ids, "flag": None}
    assert torch.equal(layer(x, mask="any"), y) and torch.equal(layer(x), y)
    assert router.heard[1:] == [{"mask": "any"}, {}]
    with pytest.raises(TypeError, match="token_ids"):
        sonic.MoE(D, N, E, K)(x, token_ids=ids)


def test_hash_routing_in_a_layer() -> None:
    layer = sonic.MoE(D, N, E, K, router=HashRouter(D, E, K, vocab_size=30, dtype=torch.float64), dtype=torch.float64)
    x, ids = torch.randn(3, 4, D, dtype=torch.float64), torch.randint(30, (3, 4))
    y, routing = layer(x, return_routing=True, token_ids=ids)
    assert torch.equal(routing.expert_index, layer.router.expert_of_id[ids.reshape(-1)])
    for at in itertools.product(range(3), range(4)):
        assert error(layer(x[at], token_ids=ids[at]), y[at]) <= 1e-13
    with pytest.raises(ValueError, match="token_ids is None, expected the ids of the tokens"):
        layer(x)


@pytest.mark.parametrize("shape", [(2, 5, D), (3, 2, 5, D), (2, 0, D), (0, 5, D)], ids=str)
def test_the_router_is_told_where_sequences_begin(shape: tuple[int, ...]) -> None:
    router = Listening(wants_sequence_length=True)
    layer, x = sonic.MoE(D, N, E, K, router=router), torch.randn(shape)
    layer(x)
    layer(x, sequence_length=None)
    layer(x, sequence_length=7)
    layer(x.reshape(-1, D), sequence_length=7)  # flat tokens, if the caller says it
    assert router.heard == [{"sequence_length": length} for length in (shape[-2], shape[-2], 7, 7)]
    router.wants = False
    layer(x)
    assert router.heard[-1] == {}


def test_loss_per_sequence_in_a_layer() -> None:
    router = TopKRouter(D, E, K, aux_loss_type="sequence", aux_loss_coeff=0.3, dtype=torch.float64)
    layer = sonic.MoE(D, N, E, K, router=router, dtype=torch.float64)
    x = torch.randn(3, 7, D, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    alone = torch.stack([layer(sequence[None], return_routing=True)[1].aux_loss for sequence in x])
    torch.testing.assert_close(routing.aux_loss, alone.mean())
    (attached,) = torch.autograd.grad(layer(x).sum(), router.weight)
    (want,) = torch.autograd.grad(y.sum() + routing.aux_loss, router.weight)
    assert error(attached, want) <= 1e-12


class OnInput(nn.Module):
    """Top-1, whose score multiplies what the expert gets."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.inner = TopKRouter(D, E, 1, score_function="sigmoid", dtype=dtype, **options)

    def forward(self, x_TD: Tensor) -> Routing:
        routing = self.inner(x_TD)
        routing.scores_on = "input"
        return routing


def on_input(dtype: torch.dtype, shared: int = 7) -> sonic.MoE:
    router = OnInput(dtype, aux_loss_coeff=0.3)
    return sonic.MoE(D, N, E, 1, router=router, bias=True, shared_intermediate_size=shared, dtype=dtype)


@pytest.mark.parametrize("shared", [0, 7])
def test_scores_on_the_input(shared: int) -> None:
    """The score multiplies the expert's tokens; the shared expert's stay as they are; losses reach backward still."""
    layer = on_input(torch.float64, shared)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, return_routing=True)
    x_TD = x.reshape(-1, D)
    logits_TE = x_TD @ layer.router.inner.weight.t()
    best_T = logits_TE.argmax(1)
    scaled_TD = x_TD * torch.sigmoid(logits_TE.gather(1, best_T[:, None]))
    h_TU = torch.einsum("td,tud->tu", scaled_TD, layer.w1[best_T]) + layer.b1[best_T]
    a_TN = dense_activation("swiglu", "concatenated", h_TU)
    wanted = torch.einsum("tn,tdn->td", a_TN, layer.w2[best_T]) + layer.b2[best_T]
    if layer.shared is not None:
        h_TU = F.linear(x_TD, layer.shared.w1, layer.shared.b1)
        wanted = wanted + F.linear(dense_activation("swiglu", "concatenated", h_TU), layer.shared.w2, layer.shared.b2)
    wanted = wanted.reshape(x.shape)
    assert error(y, wanted) <= 1e-13 and torch.equal(layer(x), y)
    dy = torch.randn_like(y)
    want = gradients_of(layer, x, wanted, dy)
    got = gradients_of(layer, x, y, dy)
    for name, gradient in want.items():
        assert gradient.norm() > 1e-3 and error(got[name], gradient) <= 1e-12, name
    attached = gradients_of(layer, x, layer(x), dy)
    parameters = (x, layer.router.inner.weight)
    of_loss = torch.autograd.grad(layer(x, return_routing=True)[1].aux_loss, parameters)
    for name, gradient in zip(("x", "router.inner.weight"), of_loss, strict=True):
        assert gradient.norm() > 1e-3 and error(attached[name] - want[name], gradient) <= 1e-12, name


def test_scores_on_the_input_in_16_bits_and_without_tokens() -> None:
    layer = on_input(torch.bfloat16)
    x = torch.randn(0, 3, D, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.router.inner.weight.grad.any()


# ---------------------------------------------------------------- at home in PyTorch


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp32", "bf16", "autocast"],
)
def test_compile(dtype: torch.dtype, autocast: bool) -> None:
    """One graph, no break; forward and backward, auxiliary losses included, as without."""
    torch._dynamo.reset()
    layer = layer_with_losses(dtype, bias=True, shared_intermediate_size=6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(T, D)
    results = []
    for module in (layer, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = module(x)
        results.append({"y": y} | gradients_of(layer, x, y, dy.to(y.dtype)))
    for name, want in results[0].items():
        assert results[1][name].dtype == want.dtype and torch.equal(results[1][name], want), name


@pytest.mark.parametrize(
    ("dynamic", "shape"),
    [
        pytest.param(True, (2, 5, D), marks=pytest.mark.long),
        *(
            pytest.param(dynamic, shape, marks=pytest.mark.slow)
            for dynamic, shape in itertools.product((False, True), ((D,), (2, 5, D), (2, 0, D)))
            if (dynamic, shape) != (True, (2, 5, D))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "scores on input", "sequences", "token ids"])
def test_compile_further_calls(kind: str, dynamic: bool, shape: tuple[int, ...]) -> None:
    """One graph whatever the shape of the tokens, what the router is told beside them, and where scores multiply."""
    torch._dynamo.reset()
    inputs: dict[str, Any] = {}
    if kind == "plain":
        layer = layer_with_losses(bias=True, shared_intermediate_size=6)
    elif kind == "scores on input":
        layer = on_input(torch.float32)
    elif kind == "sequences":
        layer = sonic.MoE(D, N, E, K, router=router_with_losses(aux_loss_type="sequence"))
        inputs = {"sequence_length": 1} if len(shape) == 1 else {}
    else:
        layer = sonic.MoE(D, N, E, K, router=Listening(wants_sequence_length=False))
        inputs = {"token_ids": torch.arange(math.prod(shape[:-1])).reshape(shape[:-1])}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.randn(shape, requires_grad=True)
    y, want = compiled(x, **inputs), layer(x, **inputs)
    assert torch.equal(y, want) and not y._is_view()
    got, wanted = (gradients_of(layer, x, out, torch.ones_like(x)) for out in (y, want))
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())


def test_compile_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = layer_with_losses(torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (T, 2 * T + 1):
        x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
        y, want = compiled(x), layer(x)
        assert torch.equal(y, want)
        got, wanted = (gradients_of(layer, x, out, torch.ones_like(x)) for out in (y, want))
        assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_with_routing_and_metrics() -> None:
    torch._dynamo.reset()
    layer = layer_with_losses()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        y, routing = layer(x, return_routing=True)
        return y, routing.aux_loss, routing.metrics["max_over_mean_load"], routing.metrics.padding_waste(16)

    x = torch.randn(T, D)
    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    layer = layer_with_losses(shared_intermediate_size=6).eval()
    program = torch.export.export(
        layer, (torch.randn(T, D),), strict=strict, dynamic_shapes={"x": {0: torch.export.Dim("tokens")}}
    )
    x = torch.randn(2 * T, D)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "options", [{}, {"score_function": "sigmoid", "norm_topk_prob": True}, {"pre_softmax": True}], ids=str
)
def test_activation_checkpointing(reentrant: bool, options: dict[str, Any]) -> None:
    """Gradients, the auxiliary losses' once and not twice, are bit for bit those without it."""
    layer = sonic.MoE(D, N, E, K, router=router_with_losses(**options), bias=True, shared_intermediate_size=6)
    x, dy = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    want = gradients_of(layer, x, layer(x), dy)
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).backward(dy)
    for name, parameter in (("x", x), *layer.named_parameters()):
        assert torch.equal(parameter.grad, want[name]), name


def test_saved_tensors_may_move() -> None:
    layer = layer_with_losses()
    x, dy = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    want = gradients_of(layer, x, layer(x), dy)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    got = gradients_of(layer, x, y, dy)
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


def test_functional_call() -> None:
    layer = layer_with_losses(bias=True, shared_intermediate_size=6)
    x = torch.randn(T, D)
    other = layer_with_losses(bias=True, shared_intermediate_size=6)
    before = layer(x)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(y, other(x)) and not torch.equal(y, before) and torch.equal(layer(x), before)
    y.sum().backward()
    assert other.w1.grad.any() and layer.w1.grad is None


@pytest.mark.parametrize("shared", [0, 6])
def test_without_data(shared: int) -> None:
    """Forward and backward under FakeTensorMode: how memory is estimated and graphs are traced."""
    with FakeTensorMode():
        layer = layer_with_losses(bias=True, shared_intermediate_size=shared)
        x = torch.randn(T, D, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (T, D) and x.grad.shape == (T, D)
        assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


@pytest.mark.parametrize("shared", [0, 6])
def test_on_the_meta_device(shared: int) -> None:
    layer = layer_with_losses(bias=True, shared_intermediate_size=shared).to("meta")
    y = layer(torch.empty(T, D, device="meta"))
    assert y.is_meta and y.shape == (T, D)
    y.sum().backward()
    assert all(parameter.grad.is_meta for parameter in layer.parameters())


def test_two_layers_one_router() -> None:
    router = router_with_losses(dtype=torch.float64)
    model = nn.Sequential(*(sonic.MoE(D, N, E, K, router=router, dtype=torch.float64) for _ in range(2)))
    model(torch.randn(T, D, dtype=torch.float64)).sum().backward()
    assert len(list(model.parameters())) == 5 and all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns(dtype: torch.dtype) -> None:
    layer = layer_with_losses(dtype, bias=True, shared_intermediate_size=6)
    sonic.layers.set_aux_loss_scale(layer, 0.01)
    start = copy.deepcopy(layer.state_dict())
    x, wanted = torch.randn(128, D).to(dtype), torch.randn(128, D).to(dtype)
    wanted = (wanted + x.roll(1, dims=1).tanh() * 2) / 2
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - wanted).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, start[name]), name
        if name in ("w1", "w2", "b1", "b2"):
            assert (value != start[name]).flatten(1).any(1).all(), f"an expert of {name} never moved"


# ---------------------------------------------------------------- several processes


def replicated_layer() -> sonic.MoE:
    """The same layer in every process, with losses balanced over all."""
    torch.manual_seed(1)
    return layer_with_losses(torch.float64, shared_intermediate_size=6)


def tokens_of(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(5 + 4 * rank, D, dtype=torch.float64, generator=generator) + rank


def replica_gradients(layer: sonic.MoE, step: int) -> dict[str, Tensor]:
    """What data-parallel training should find: the mean over both ranks' gradients, computed in one process."""
    total = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for rank in range(2):
        layer.zero_grad()
        layer(tokens_of(rank, step)).square().mean().backward()
        for name, parameter in layer.named_parameters():
            total[name] += parameter.grad / 2
    layer.zero_grad()
    return total


def check_data_parallel(rank: int) -> None:
    """Run in each of two processes: DDP's gradients and steps are those of one process that has both ranks' tokens."""
    layer, alone = replicated_layer(), replicated_layer()
    parallel = nn.parallel.DistributedDataParallel(layer)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (layer, alone)]
    for step in range(3):
        optimizers[0].zero_grad()
        parallel(tokens_of(rank, step)).square().mean().backward()
        for name, gradient in replica_gradients(alone, step).items():
            assert error(dict(layer.named_parameters())[name].grad, gradient) <= 1e-12, (step, name)
            dict(alone.named_parameters())[name].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    values = torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])
    gathered = [torch.empty_like(values) for _ in range(2)]
    torch.distributed.all_gather(gathered, values)
    assert torch.equal(*gathered), "the replicas are no longer the same"


def check_sharded(rank: int) -> None:
    """Run in each of two processes: the same for ``fully_shard``, of the layer, and of router and layer apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for apart in (False, True):
        layer = replicated_layer()
        model = nn.Sequential(layer)
        if apart:
            fully_shard(layer.router, mesh=mesh)
        fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(tokens_of(rank, 0)).square().mean().backward()
        for name, gradient in replica_gradients(replicated_layer(), 0).items():
            found = dict(layer.named_parameters())[name].grad.full_tensor()
            assert error(found, gradient) <= 1e-12, (apart, name)

    # built without memory, sharded, then filled; computed in bf16
    layer = layer_with_losses(torch.float32, device="meta", bias=True)
    layer.router = router_with_losses(device="meta")
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    y = layer(torch.randn(T, D))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.full_tensor().isfinite().all(), name


def check_both(rank: int) -> None:
    """Starting processes is what takes the time, so they do everything."""
    check_data_parallel(rank)
    check_sharded(rank)


@pytest.mark.long
def test_data_parallel_and_sharded(tmp_path: Path) -> None:
    run_ranks(__file__, "check_both", tmp_path)


if __name__ == "__main__":
    be_a_rank(globals(), *sys.argv[1:])
