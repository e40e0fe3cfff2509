"""The face of Hugging Face transformers: what can be shown without it, then models of it against their own experts.

The first part runs everywhere: a stand-in has the attributes that transformers gives to an experts module, and a
registry like its own. The second needs transformers and is skipped, with the reason, where it is not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonic
from benchmarks import huggingface as benchmark
from benchmarks.huggingface_models import MODELS, batch, build_model, experts_classes, experts_of, gates
from sonic.layers.gate_router import GATES, GateRouter, gate_options
from sonic.routing import PRESETS, TokenRounding, preset_router

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

# ---------------------------------------------------------------- without transformers


class Gate(nn.Module):
    """A router as Qwen3's."""

    def __init__(self, num_experts: int, hidden_size: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size))
        self.top_k, self.norm_topk_prob = top_k, True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.reshape(-1, x.shape[-1])
        logits = F.linear(x, self.weight)
        scores, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), index


class Qwen3MoeTopKRouter(Gate):
    """The name is what says how it decides."""


def _default_apply_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


class Experts(nn.Module):
    """An experts module with the attributes that transformers gives to one, computed one token at a time."""

    _apply_gate = _default_apply_gate

    def __init__(
        self, num_experts: int = 5, *, transposed: bool = False, bias: bool = False, gated: bool = True
    ) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = num_experts, transposed, bias, gated
        self.is_concatenated, self.has_post_expert_norm, self._is_expert_parallel = True, False, False
        self.act_fn: Any = nn.SiLU()
        self.config = SimpleNamespace(_experts_implementation="eager")
        up, down = torch.randn(num_experts, 12 if gated else 6, 8), torch.randn(num_experts, 8, 6)
        name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(name, nn.Parameter(up.transpose(1, 2).contiguous() if transposed else up))
        self.down_proj = nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down)
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(up.shape[:2])))
            self.down_proj_bias = nn.Parameter(torch.randn(down.shape[:2]))

    def forward(self, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        if self.config._experts_implementation != "eager":
            return REGISTRY[self.config._experts_implementation](self, x, index, scores)
        up = self.gate_up_proj if self.has_gate else self.up_proj
        rows = []
        for t in range(x.shape[0]):
            out = torch.zeros_like(x[t])
            for expert, score in zip(index[t].tolist(), scores[t], strict=True):
                if expert == self.num_experts:
                    continue
                h = x[t] @ (up[expert] if self.is_transposed else up[expert].t())
                if self.has_bias:
                    h = h + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert]
                a = self._apply_gate(h) if self.has_gate else self.act_fn(h)
                y = a @ (self.down_proj[expert] if self.is_transposed else self.down_proj[expert].t())
                out = out + score * (y + self.down_proj_bias[expert] if self.has_bias else y)
            rows.append(out)
        return torch.stack(rows)


class Block(nn.Module):
    """Router, experts, and something beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.shared = Qwen3MoeTopKRouter(5, 8, 2), Experts(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        _, scores, index = self.gate(x)
        out = self.experts(x.reshape(-1, 8), index, scores)
        return out.view(x.shape) + self.shared(x)


class Model(nn.Module):
    """Two blocks whose experts can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def set_experts_implementation(self, name: str) -> None:
        assert name == "eager" or name in REGISTRY
        for layer in self.layers:
            layer.experts.config._experts_implementation = name

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.layer_norm(x + layer(x), (8,))
        return x


REGISTRY: dict[str, Any] = {}


class Interface:
    """A registry as ``transformers.integrations.moe.ExpertsInterface``."""

    @classmethod
    def register(cls, name: str, function: Any) -> None:
        REGISTRY[name] = function


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """transformers is a package with nothing but a registry of experts."""
    REGISTRY.clear()
    for name in ("transformers", "transformers.integrations", "transformers.integrations.moe"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformers.integrations.moe"].ExpertsInterface = Interface  # type: ignore[attr-defined]
    return REGISTRY


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, and the gradients of the inputs that have one and of all parameters."""
    leaves = [x for x in inputs if x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_().grad = None
    module.zero_grad()
    out = module(*inputs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters())]


def assert_close(found: list[Tensor], wanted: list[Tensor], limit: float = 1e-12) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


def test_transformers_is_not_needed_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "huggingface" in dir(sonic) and sonic.huggingface is sonic.layers.huggingface
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"sonic.huggingface: needs transformers >= 5.0 .*sonic-moe\[huggingface\]"):
        sonic.huggingface.enable()
    with pytest.raises(ImportError, match="sonic.huggingface"):
        sonic.huggingface.replace_moe(Model())


def test_an_old_transformers_is_named(stand_in: dict[str, Any]) -> None:
    del sys.modules["transformers.integrations.moe"].ExpertsInterface
    with pytest.raises(ImportError, match="does not let experts be chosen"):
        sonic.huggingface.enable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "grouped_mm"}, "name is 'grouped_mm', expected a name that transformers does not use"),
        ({"name": ""}, "name is ''"),
        ({"save": "nothing"}, "save is 'nothing', expected one of 'preactivation', 'input'"),
        ({"backend": "abacus"}, "backend is 'abacus'"),
    ],
)
def test_enable_refuses(stand_in: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sonic.huggingface.enable: {message}"):
        sonic.huggingface.enable(**arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_of_every_layout(stand_in: dict[str, Any], transposed: bool, bias: bool, gated: bool) -> None:
    sonic.huggingface.enable("short", save="input")
    sonic.huggingface.enable()
    experts = Experts(transposed=transposed, bias=bias, gated=gated).double()
    inputs = (double(7, 8), torch.rand(7, 5).topk(3).indices, double(7, 3))
    wanted = gradients(experts, *inputs)
    for experts.config._experts_implementation in ("sonic", "short"):
        assert_close(gradients(experts, *inputs), wanted)


@pytest.mark.parametrize(
    ("function", "gated", "name"),
    [
        (nn.SiLU(), True, "swiglu"),
        (F.silu, True, "swiglu"),
        (nn.ReLU(), True, "reglu"),
        (nn.ReLU(), False, "relu"),
        (nn.SiLU(), False, "silu"),
    ],
)
def test_activations_are_found(stand_in: dict[str, Any], function: Any, gated: bool, name: str) -> None:
    sonic.huggingface.enable()
    experts = Experts(gated=gated).double()
    del experts.act_fn
    experts.act_fn = function
    (report,) = sonic.huggingface.explain(nn.ModuleDict({"mlp": experts})).values()
    assert (report.activation, report.refused, report.glu_layout, report.copies) == (name, None, "concatenated", False)
    inputs = (double(6, 8), torch.rand(6, 5).topk(2).indices, double(6, 2))
    wanted = gradients(experts, *inputs)
    experts.config._experts_implementation = "sonic"
    assert_close(gradients(experts, *inputs), wanted)


def test_what_is_not_served_is_refused_by_name(stand_in: dict[str, Any]) -> None:
    class OwnGate(Experts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate_up[..., :6]

    class GptOssExperts(Experts):  # the name alone is not enough
        alpha, limit = 1.702, 7.0

        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate_up[..., 6:]

    tanh, norm, own, name = Experts(), Experts(), OwnGate(), GptOssExperts()
    tanh.act_fn, norm.has_post_expert_norm = nn.Tanh(), True
    sonic.huggingface.enable()
    for experts, message in (
        (tanh, "Experts: act_fn is Tanh .gated., expected one that sonic.ACTIVATIONS has"),
        (norm, "Experts: has_post_expert_norm is True"),
        (own, "OwnGate: gate is an _apply_gate of its own"),
        (name, "GptOssExperts: gate is an _apply_gate of its own"),
    ):
        (report,) = sonic.huggingface.explain(nn.ModuleDict({"mlp": experts})).values()
        assert report.activation is None and report.refused is not None
        experts.config._experts_implementation = "sonic"
        with pytest.raises(ValueError, match=f"sonic.huggingface: {message}"):
            experts(torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_tokens_stays_under_autocast(stand_in: dict[str, Any], dtype: torch.dtype) -> None:
    sonic.huggingface.enable()
    experts = Experts()
    experts.config._experts_implementation = "sonic"
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(torch.randn(3, 8, dtype=dtype), torch.zeros(3, 1).long(), torch.ones(3, 1)).dtype == dtype


def test_experts_of_other_ranks_are_skipped(stand_in: dict[str, Any]) -> None:
    """The id ``num_experts`` may stand several times in a row; its scores get no gradient."""
    sonic.huggingface.enable()
    experts = Experts().double()
    experts._is_expert_parallel = True
    index = torch.tensor([[5, 0, 5], [1, 5, 4], [5, 5, 5], [2, 3, 0]])
    scores = double(4, 3).masked_fill(index == 5, 0.0)
    x_TD = double(4, 8)
    wanted = gradients(experts, x_TD, index, scores)
    experts.config._experts_implementation = "sonic"
    found = gradients(experts, x_TD, index, scores)
    assert_close(found, wanted)
    assert (found[2][index == 5] == 0).all()
    nobody = gradients(experts, double(2, 8), torch.full((2, 3), 5), 0 * double(2, 3))
    assert all((tensor == 0).all() for tensor in nobody)


@pytest.mark.parametrize("aligned", [False, True])
def test_transposed_weights_are_copied_unless_they_are_aligned(stand_in: dict[str, Any], aligned: bool) -> None:
    sonic.huggingface.enable()
    experts = Experts(transposed=True)
    experts.config._experts_implementation = "sonic"
    inputs = (torch.randn(7, 8), torch.rand(7, 5).topk(3).indices, torch.rand(7, 3))
    before, wanted = {name: p.clone() for name, p in experts.named_parameters()}, gradients(experts, *inputs)
    parameters = list(experts.parameters())
    assert sonic.huggingface.explain(nn.ModuleDict({"mlp": experts}))["mlp"].copies
    if aligned:
        assert sonic.huggingface.align_weights(nn.ModuleDict({"mlp": experts})) == 2
        assert sonic.huggingface.align_weights(nn.ModuleDict({"mlp": experts})) == 0
        assert not sonic.huggingface.explain(nn.ModuleDict({"mlp": experts}))["mlp"].copies
    assert all(a is b for a, b in zip(experts.parameters(), parameters, strict=True))
    assert all(torch.equal(p, before[name]) and p.shape == before[name].shape for name, p in experts.named_parameters())
    with CountClones({(5, 12, 8), (5, 8, 6)}) as count:
        found = gradients(experts, *inputs)
    assert_close(found, wanted, 0.0)
    assert count.copied == (0 if aligned else 2 * sum(p.nbytes for p in parameters))
    assert all(p.grad.stride() == p.stride() for p in parameters) or not aligned
    experts.load_state_dict(copy.deepcopy(experts.state_dict()))
    assert (parameters[0].is_contiguous(), parameters[1].is_contiguous()) == (not aligned, not aligned)


def test_align_weights_refuses_meta(stand_in: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="align_weights: mlp.gate_up_proj is on the meta device"):
        sonic.huggingface.align_weights(nn.ModuleDict({"mlp": Experts(transposed=True).to("meta")}))


class CountClones(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of tensors of given shapes that are copied."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.copied = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default and tuple(args[0].shape) in self.shapes:
            self.copied += args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_replaced_blocks_compute_and_load_the_same(stand_in: dict[str, Any]) -> None:
    model, x = Model().double(), double(2, 9, 8)
    keys, wanted = list(model.state_dict()), gradients(model, x)
    parameters, gate_class = list(model.parameters()), type(model.layers[0].gate)
    assert sonic.huggingface.replace_moe(model) == 2
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.layers[0].gate, gate_class)
    assert_close(gradients(model, x), wanted)
    other = Model().double()
    other.load_state_dict(model.state_dict())
    assert_close(gradients(other, x), wanted)
    twin = copy.deepcopy(model)
    twin.layers[0].gate.weight.data.neg_()
    assert_close(gradients(model, x), wanted)
    assert not torch.equal(twin(x), model(x))


def test_token_rounding_acts_in_training_only(stand_in: dict[str, Any]) -> None:
    model, x = Model().double(), double(2, 20, 8)
    wanted = gradients(model, x)
    sonic.huggingface.replace_moe(model, partial(TokenRounding, rule="up", tile_rows=8))
    routings = []
    for layer in model.layers:
        layer.gate.sonic_router.register_forward_hook(lambda module, args, out: routings.append(out))
    rounded = gradients(model, x)
    assert len(routings) == 2
    for routing in routings:
        counts = routing.plan.tokens_per_expert()
        assert (counts % 8 == 0).all() and counts.sum() > 80 and routing.scores.shape == (counts.sum(),)
    assert (rounded[0] - wanted[0]).abs().max() > 1e-3
    assert all(layer.gate.weight.grad.abs().max() > 0 for layer in model.layers)
    model.eval()
    assert_close(gradients(model, x), wanted)


def test_replace_moe_refuses_before_it_changes_anything(stand_in: dict[str, Any]) -> None:
    where = "sonic.huggingface.replace_moe: "

    def refused(model: nn.Module, message: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=where + message):
            sonic.huggingface.replace_moe(model, **arguments)
        layers = getattr(model, "layers", [])
        assert not any(hasattr(layer.experts, "sonic_handover") for layer in layers)

    refused(nn.Linear(2, 2), "model is a Linear without such experts")
    model = Model()
    model.layers[1].gate = Gate(5, 8, 2)
    refused(model, "layers.1: Gate is a router of another kind")
    model = Model()
    model.layers[1].experts._is_expert_parallel = True
    refused(model, "layers.1.experts is expert-parallel")
    model = Model()
    model.layers[1].experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="has_post_expert_norm is True"):
        sonic.huggingface.replace_moe(model)
    refused(Model(), "router of layers.0 is a int, expected", router=lambda gate: 3)
    refused(Model(), "router of layers.0 is with weight, expected nothing", router=lambda gate: nn.Linear(2, 2, False))
    refused(Model().layers, "model is a ModuleList, expected a transformers.PreTrainedModel")
    model = Model()
    sonic.huggingface.replace_moe(model)
    with pytest.raises(ValueError, match=where + "layers.0 is a block that an earlier call replaced"):
        sonic.huggingface.replace_moe(model)


def test_other_experts_and_changed_scores_are_told_apart(stand_in: dict[str, Any]) -> None:
    model, x = Model(), torch.randn(1, 9, 8)
    sonic.huggingface.replace_moe(model)
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="experts_implementation is 'eager', expected 'sonic'"):
        model(x)
    model.set_experts_implementation("sonic")
    experts = model.layers[0].experts
    _, scores, index = model.layers[0].gate(x)
    with pytest.raises(RuntimeError, match="were not given what their router returned"):
        experts(x.view(-1, 8), index, 2 * scores)
    with pytest.raises(RuntimeError, match="were not given what their router returned"):
        experts(x.view(-1, 8), index, scores)  # of a forward pass that is over


@pytest.mark.parametrize("preset", ["qwen3", "mixtral", "deepseek_v3", "gpt_oss"])
def test_gate_routers_decide_as_the_presets(preset: str) -> None:
    sizes = {"hidden_size": 8, "num_experts": 16, "top_k": 4}
    router = preset_router(preset, **sizes, **({"num_groups": 4, "group_topk": 2} if preset == "deepseek_v3" else {}))
    gate = nn.Module()
    gate.weight, gate.top_k, gate.norm_topk_prob = router.weight, 4, True
    gate.num_group, gate.topk_group, gate.routed_scaling_factor = 4, 2, 2.5
    name = {"qwen3": "Qwen3MoeTopKRouter", "mixtral": "MixtralTopKRouter", "gpt_oss": "GptOssTopKRouter"}
    gate.__class__ = type(name.get(preset, "DeepseekV3TopkRouter"), (nn.Module,), {})
    if router.bias is not None:
        nn.init.normal_(router.bias)
        gate.bias = router.bias
    if router.expert_bias is not None:
        gate.e_score_correction_bias = router.expert_bias.normal_(std=0.1)
    made = GateRouter(gate, num_experts=16, **gate_options("here", "gate", gate))
    x_TD = torch.randn(40, 8)
    ours, theirs = made(x_TD), router(x_TD)
    assert torch.equal(ours.expert_index, theirs.expert_index) and torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.logits, theirs.logits) and list(made.parameters()) == []
    pairs = torch.arange(10), torch.arange(10)
    assert torch.equal(made.pair_scores(x_TD, ours.logits, *pairs), router.pair_scores(x_TD, theirs.logits, *pairs))
    assert made.hidden_size == 8 and preset in PRESETS


def test_gates_that_cannot_be_followed_say_why() -> None:
    gate = nn.Module()
    gate.top_k, gate.norm_topk_prob, gate.routed_scaling_factor = 8, True, 1.0
    gate.num_group, gate.topk_group, gate.topk_method = 4, 1, "group_limited_greedy"
    for name, message in (
        (
            "DeepseekV3TopkRouter",
            "the 2 best of each group at top_k = 8, topk_group = 1, expected top_k // topk_group = 2",
        ),
        ("DeepseekV2TopkRouter", "topk_method 'group_limited_greedy', expected 'greedy'"),
    ):
        assert name in GATES
        gate.__class__ = type(name, (nn.Module,), {})
        with pytest.raises(ValueError) as caught:
            gate_options("here", "gate", gate)
        assert str(caught.value).startswith(f"here: gate is {message}")


# ---------------------------------------------------------------- with transformers


@pytest.fixture
def enabled() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    sonic.huggingface.enable()


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("model_type", MODELS)
def test_models_are_what_they_were_with_their_own_experts(model_type: str) -> None:
    """Logits, gradients and generated tokens, by both ways in, and half of the saved bytes."""
    cell = benchmark.measure_model(model_type)
    assert all(goal["passed"] for goal in cell["targets"].values()), cell
    assert cell["copied_bytes"] is None or cell["copied_bytes"]["after"] == 0
    routers = {"phimoe", "ernie4_5_moe", "lfm2_moe", "afmoe", "zaya"}
    assert (cell["not_replaced"] is not None) == (model_type in routers)


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("constants", [{"swiglu_limit": 5.0}, {"swiglu_alpha": 1.0}])
def test_other_constants_of_the_clamped_gate_are_refused(constants: dict[str, float]) -> None:
    model = build_model("gpt_oss", **constants)
    assert all("clamped at" in str(report.refused) for report in sonic.huggingface.explain(model).values())
    model.set_experts_implementation("sonic")
    with pytest.raises(ValueError, match="GptOssExperts: gate is clamped at .*, expected 7.0 and 1.702"):
        model(batch())


@needs_transformers
@pytest.mark.usefixtures("enabled")
def test_checkpoints_load_both_ways(tmp_path: Path) -> None:
    """Replaced, rounded and aligned, saved; loaded with their own experts; and back."""
    from transformers import AutoModelForCausalLM

    model, ids = build_model("gpt_oss"), batch()
    model.set_experts_implementation("eager")
    wanted = benchmark.step(model, ids)
    assert sonic.huggingface.align_weights(model) == 4
    sonic.huggingface.replace_moe(model, TokenRounding)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "sonic" not in json.dumps(config)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", experts_implementation="eager", attn_implementation="eager"
    )
    assert benchmark.errors(benchmark.step(theirs, ids), wanted)["gradients"] == 0
    theirs.save_pretrained(tmp_path / "b")
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", experts_implementation="sonic", attn_implementation="eager"
    )
    assert benchmark.errors(benchmark.step(ours, ids), wanted)["gradients"] < 2e-6


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("replace", [False, True])
def test_their_balancing_loss_and_checkpointing_stay(replace: bool) -> None:
    """``output_router_logits`` records the routers of replaced blocks too."""
    options: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    theirs, model = (build_model("mixtral", **options).train() for _ in range(2))
    ids = batch()

    def step(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        return {"logits": torch.stack((out.loss, out.aux_loss)).detach()} | {
            n: p.grad for n, p in model.named_parameters()
        }

    theirs.set_experts_implementation("eager")
    wanted = step(theirs)
    if replace:  # before the first call, in which transformers looks for routers to record
        sonic.huggingface.replace_moe(model)
    else:
        model.set_experts_implementation("sonic")
    found = step(model)
    assert benchmark.errors(found, wanted)["gradients"] < 2e-6
    assert len(model(ids).router_logits) == 2
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    assert benchmark.errors(step(model), found)["gradients"] < 1e-6


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("replace", [False, True])
def test_compiles_without_a_graph_break(model_type: str, replace: bool) -> None:
    model, ids = build_model(model_type, num_hidden_layers=1), batch()
    if replace:
        sonic.huggingface.replace_moe(model)
    else:
        model.set_experts_implementation("sonic")
    wanted = benchmark.step(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = benchmark.step(compiled, ids)
    assert (
        benchmark.errors({name.removeprefix("_orig_mod."): g for name, g in found.items()}, wanted)["gradients"] < 2e-6
    )


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_sixteen_bits_differ_no_more_than_grouped_mm(dtype: Any) -> None:
    model, ids = build_model("qwen3_moe", num_hidden_layers=1), batch()
    exact = benchmark.step(model, ids)
    if dtype is torch.bfloat16:
        model.to(dtype)
    off = {}
    for name in ("grouped_mm", "sonic", "replace_moe"):
        if name == "replace_moe":
            sonic.huggingface.replace_moe(model)
        else:
            model.set_experts_implementation(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            found = benchmark.step(model, ids)
        off[name] = sum(((g.float() - exact[n]).norm() / exact[n].norm()).item() for n, g in found.items()) / len(found)
    assert 0 < off["sonic"] <= 1.3 * off["grouped_mm"], off
    assert 0 < off["replace_moe"] <= 1.3 * off["grouped_mm"], off


@needs_transformers
@pytest.mark.usefixtures("enabled")
def test_trains_under_their_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in batch(4)]
    losses = {}
    for name in ("eager", "sonic"):
        model = build_model("qwen3_moe").train()
        model.set_experts_implementation(name)
        settings = TrainingArguments(
            str(tmp_path), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=rows)
        trainer.train()
        losses[name] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses["eager"][-1] < losses["eager"][0] - 0.1
    assert (losses["sonic"] - losses["eager"]).abs().max() < 2e-3


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(("model_type", "gate"), [("qwen3_moe", "mlp.gate.weight"), ("gpt_oss", "mlp.router.weight")])
def test_lora_on_the_parameters_of_experts_and_routers(model_type: str, gate: str) -> None:
    peft = pytest.importorskip("peft")
    model, ids = build_model(model_type), batch()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", gate]
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings)
    model.set_experts_implementation("eager")
    wanted = benchmark.step(wrapped, ids)
    assert sum("lora" in name and "mlp" in name for name in wanted) == 12
    assert not any("lora" not in name for name in wanted if name != "logits")
    model.set_experts_implementation("sonic")
    assert benchmark.errors(benchmark.step(wrapped, ids), wanted)["gradients"] < 2e-6
    assert sonic.huggingface.replace_moe(wrapped) == 2
    assert benchmark.errors(benchmark.step(wrapped, ids), wanted)["gradients"] < 2e-6
    assert len(experts_of(model)) == 2


@needs_transformers
@pytest.mark.usefixtures("enabled")
def test_every_experts_class_is_served_or_refused() -> None:
    entries = [benchmark.measure_class(experts) for experts in experts_classes()]
    assert all((entry["refused"] is None) == (entry["error"] is not None) for entry in entries)
    assert all(entry["error"] < 2e-6 for entry in entries if entry["error"] is not None)
    assert sum(entry["error"] is not None for entry in entries) >= 50


@needs_transformers
@pytest.mark.usefixtures("enabled")
def test_every_gate_that_is_listed_decides_as_its_class() -> None:
    """Of the default configs; those whose groups are ranked otherwise are refused."""
    refused, seen = [], set()
    for gate in gates(GATES):
        name = type(gate).__name__
        seen.add(name)
        x_TD, arguments = torch.randn(32, 8), {}
        if "e_score_correction_bias" in inspect.signature(gate.forward).parameters:
            arguments["expert_bias"] = torch.randn(gate.weight.shape[0])
        try:
            options = gate_options("here", name, gate)
        except ValueError:
            refused.append(name)
            continue
        logits, scores, index = gate(x_TD, *arguments.values())
        routing = GateRouter(gate, num_experts=logits.shape[-1], **options)(x_TD, **arguments)
        order, ours = index.argsort(dim=-1), routing.expert_index.argsort(dim=-1)
        assert torch.equal(index.gather(1, order), routing.expert_index.long().gather(1, ours)), name
        torch.testing.assert_close(
            routing.scores.gather(1, ours), scores.gather(1, order).float(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(routing.logits, logits.float(), rtol=1e-5, atol=1e-5)
    assert set(GATES) - seen == set()
    assert len(refused) <= 3, refused


@needs_transformers
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("arguments", [[], ["--round", "--tile-rows", "4"]])
def test_the_example_learns_and_its_checkpoint_loads(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    from examples import finetune_huggingface as example

    assert example.main(["--quick", "--steps", "6", "--out", str(tmp_path / "out"), *arguments]) == 0
    told = re.search(
        r"before ([\d.]+)   after ([\d.]+)   saved and loaded with 'eager' experts ([\d.]+)", capsys.readouterr().out
    )
    assert told is not None
    before, after, loaded = map(float, told.groups())
    assert after < before - 0.3 and abs(after - loaded) < 2e-4
    assert (tmp_path / "out" / "config.json").exists()


@needs_transformers
@pytest.mark.usefixtures("enabled")
def test_the_benchmark_writes_the_documented_json(tmp_path: Path) -> None:
    assert benchmark.main(["--models", "gpt_oss", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (cell,) = report["cells"]
    assert cell["model"] == "gpt_oss" and cell["activation"] == "swiglu_oai" and cell["num_layers"] == 2
    assert set(cell["errors"]) == {"sonic", "grouped_mm", "replace_moe"} and cell["not_replaced"] is None
    assert cell["copied_bytes"]["before"] == 2 * cell["copied_bytes"]["weights"] and report["classes"] == []
    saved = report["block"]["saved_bytes"]
    T, D, N, E, K = report["block"]["shape"].values()
    x_and_h = 2 * T * D + 4 * T * K * N
    assert saved["replace_moe"] == x_and_h + T * K * (4 + 4 + 4) + 4 * (E + 1)  # scores, chosen experts, rows; offsets
    assert x_and_h < saved["sonic"] < 0.3 * saved["grouped_mm"]
