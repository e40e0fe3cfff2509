"""The face of Megatron-core: what can be shown without it, then one process against Megatron's own experts.

The first part runs everywhere. The second needs megatron-core and is skipped, with the reason, where it is not
installed; it runs on a CPU through ``examples/lm/megatron_on_cpu.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import sonic
import sonic.megatron
from sonic.layers.megatron.options import ExpertsOptions
from sonic.layers.megatron.weight_gradients import WeightGradients
from sonic.routing import RoutingPlan, TokenRounding
from tests.helpers import relative_error

HAS_MEGATRON = (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None
)
needs_megatron = pytest.mark.skipif(not HAS_MEGATRON, reason="megatron-core is not installed")

# ---------------------------------------------------------------- without Megatron


def test_importing_the_face_does_not_import_megatron() -> None:
    probe = "import sys, sonic.megatron; assert 'megatron' not in sys.modules; print(sonic.megatron.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "sonic.layers.megatron", done.stderr


@pytest.mark.skipif(HAS_MEGATRON, reason="megatron-core is installed")
def test_without_megatron_it_says_what_is_missing() -> None:
    for call in (sonic.megatron.enable, sonic.megatron.disable, partial(sonic.megatron.explain, nn.Linear(2, 2))):
        with pytest.raises(ImportError, match=r"sonic.megatron: needs megatron-core >= 0.16"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": "all"}, "sonic.megatron.enable: save is 'all', expected one of"),
        ({"backend": "fast"}, "sonic.megatron.enable: backend is 'fast'"),
        ({"router": 3}, "sonic.megatron.enable: router is a int, expected a function"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sonic.megatron.enable(**options)


class Weights(nn.Module):
    """Parameters as the experts module has them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight1, self.weight2 = nn.Parameter(torch.randn(5, 12, 8)), nn.Parameter(torch.randn(5, 8, 6))
        self.bias1 = nn.Parameter(torch.randn(5, 12)) if bias else None
        self.bias2 = nn.Parameter(torch.randn(5, 8)) if bias else None

    def run(self, gradients: WeightGradients, kind: str, save: str) -> dict[str, Tensor]:
        """Output and gradients of two passes, of tokens with a plan or of rows; experts 0 and 3 get none."""
        torch.manual_seed(7)
        self.zero_grad()
        found: dict[str, Tensor] = {}
        for index in range(2):
            chosen = torch.tensor([1, 2, 4])[torch.rand(11, 3).argsort(1)[:, :2]]
            plan = RoutingPlan.from_topk(chosen, 5)
            if kind == "pairs":
                plan = RoutingPlan.from_pairs(torch.arange(11).repeat_interleave(2), chosen.flatten(), 11, 5)
            if kind == "rows":
                x, scores, where = torch.randn(22, 8), torch.rand(22), (None, plan.tokens_per_expert())
            else:
                x, scores, where = torch.randn(11, 8), torch.rand(plan.scores_shape), (plan, None)
            x.requires_grad_()
            scores.requires_grad_()
            out = gradients.apply(x, scores, *where, activation="swiglu", save=save, backend=None)
            out.backward(torch.randn_like(out))
            gradients.compute()
            found |= {f"out{index}": out.detach(), f"dx{index}": x.grad, f"ds{index}": scores.grad}
        for name, parameter in self.named_parameters():
            total = getattr(parameter, "main_grad", parameter.grad)
            found[name] = total.clone()
        return found


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("kind", ["rows", "topk", "pairs"])
@pytest.mark.parametrize("into_main_grad", [False, True])
@pytest.mark.parametrize("delayed", [False, True])
def test_weight_gradients_arrive_where_and_when_they_are_wanted(
    delayed: bool, into_main_grad: bool, kind: str, save: str
) -> None:
    module = Weights(bias=True)
    wanted = module.run(WeightGradients(module, into_main_grad=False, delayed=False), kind, save)
    gradients = WeightGradients(module, into_main_grad=into_main_grad, delayed=delayed)
    called = []
    gradients.hooks.append(lambda: called.append(1))
    if into_main_grad:
        for parameter in (module.weight1, module.weight2):
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
    found = module.run(gradients, kind, save)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative_error(found[name], tensor) < 2e-6, name
    if into_main_grad:
        assert module.weight1.grad_added_to_main_grad and module.weight2.grad_added_to_main_grad
    assert len(called) == (2 if delayed else 0)
    gradients.compute()
    assert len(called) == (2 if delayed else 0), "nothing is left to compute"


def test_delayed_gradients_come_in_the_order_of_backward() -> None:
    module = Weights(bias=True)
    gradients = WeightGradients(module, into_main_grad=False, delayed=True)
    wanted = []
    for scale in (1.0, 10.0):
        x = scale * torch.randn(6, 8)
        counts = torch.tensor([2, 0, 4, 0, 0])
        weights = [parameter.detach().requires_grad_() for parameter in (module.weight1, module.weight2)]
        biases = {"b1": module.bias1.detach(), "b2": module.bias2.detach()}
        sonic.expert_mlp(x, *weights, counts, **biases).sum().backward()
        wanted.append(weights[0].grad)
        x.requires_grad_()
        gradients.apply(x, None, None, counts, activation="swiglu", save="input", backend=None).sum().backward()
    assert module.weight1.grad is None
    gradients.compute()
    assert relative_error(module.weight1.grad, wanted[0]) < 2e-6
    gradients.compute()
    assert relative_error(module.weight1.grad, wanted[0] + wanted[1]) < 2e-6


def test_a_main_gradient_takes_what_bf16_would_round_away() -> None:
    module = Weights(bias=False).to(torch.bfloat16)
    x = torch.randn(9, 8, dtype=torch.bfloat16)
    counts = torch.tensor([4, 0, 5, 0, 0])
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad = False
    gradients = WeightGradients(module, into_main_grad=True, delayed=False)
    out = gradients.apply(x, None, None, counts, activation="swiglu", save="input", backend=None)
    dout = torch.randn_like(out)
    out.backward(dout)
    for parameter in module.parameters():
        assert not torch.equal(parameter.main_grad, parameter.main_grad.bfloat16().float()), "float32 all the way"
    double = [parameter.detach().double().requires_grad_() for parameter in module.parameters()]
    sonic.expert_mlp(x.double(), *double, counts).backward(dout.double())
    for parameter, exact in zip(module.parameters(), double, strict=True):
        assert relative_error(parameter.main_grad, exact.grad) < 0.02


def test_a_main_gradient_of_another_dtype_is_left_to_whoever_made_it() -> None:
    module = Weights(bias=False)
    module.weight1.main_grad = torch.zeros(module.weight1.shape, dtype=torch.bfloat16)
    gradients = WeightGradients(module, into_main_grad=True, delayed=False)
    out = gradients.apply(
        torch.randn(4, 8), None, None, torch.tensor([4, 0, 0, 0, 0]), activation="swiglu", save="input", backend=None
    )
    out.sum().backward()
    assert module.weight1.grad.abs().sum() > 0 and module.weight2.grad is not None
    assert module.weight1.main_grad.abs().sum() == 0


# ---------------------------------------------------------------- with Megatron, one process


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """One rank, with gloo as its process group and the CPU where Megatron wants a GPU."""
    from tests.megatron_world import World, cpu_world

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with cpu_world():
        made = World()
        made.start()
        yield made
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seeded(make: Callable[..., Any], *args: Any) -> Any:
    """What ``make`` builds, always from the same seed: process groups cannot be copied, so models are built twice."""
    torch.manual_seed(0)
    return make(*args)


@contextlib.contextmanager
def enabled(**options: Any) -> Iterator[None]:
    sonic.megatron.enable(**options)
    try:
        yield
    finally:
        sonic.megatron.disable()


def experts_of_both(world: Any, **fields: Any) -> tuple[Any, Any]:
    """Megatron's SequentialMLP and ours, each built after the same seed."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from sonic.layers.megatron.experts import SonicExperts

    config, groups = world.make_config(**fields), get_default_pg_collection()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    torch.manual_seed(3)
    theirs = SequentialMLP(4, config, linears, groups)
    for expert in theirs.local_experts:  # its sum over one rank returns a view, to which it cannot add a bias
        expert.linear_fc2.explicit_expert_comm = True
    torch.manual_seed(3)
    return theirs, SonicExperts(4, config, None, groups)


def weights_of(experts: Any) -> dict[str, Tensor]:
    """Weights, or their gradients, in our shapes."""
    if not hasattr(experts, "local_experts"):
        return dict(experts.named_parameters())
    stacked = {}
    for number, linear in (("1", "linear_fc1"), ("2", "linear_fc2")):
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(expert, linear), kind) for expert in experts.local_experts]
            if parts[0] is not None:
                stacked[kind + number] = parts
    return stacked


def run_experts(experts: Any, counts: list[int], *, dtype: torch.dtype, probs_dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(5)
    width = experts.config.moe_latent_size or experts.config.hidden_size
    rows = torch.randn(sum(counts), width).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts)).to(probs_dtype).requires_grad_()
    out, bias = experts(rows, torch.tensor(counts), probs)
    assert bias is None and out.dtype == dtype
    out.backward(torch.randn(out.shape).to(dtype))
    found = {"out": out.detach(), "drows": rows.grad, "dprobs": probs.grad}
    for name, value in weights_of(experts).items():
        parts = value if isinstance(value, list) else [value]
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
        found[name] = torch.stack(grads) if isinstance(value, list) else grads[0]
    return found


CASES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu": {"activation_func": F.gelu},
    "reglu": {"activation_func": F.relu},
    "silu": {"gated_linear_unit": False},
    "squared relu": {"gated_linear_unit": False, "activation_func": "squared_relu"},
    "gate of gpt-oss, with bias": {
        **{"activation_func": "quick_gelu", "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
        **{"add_bias_linear": True},
    },
    "bias": {"add_bias_linear": True},
    "latent": {"moe_latent_size": 20},
    "probabilities on the input": {
        **{"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    },
    "fused activation": {"bias_activation_fusion": True},
}


def named_functions(fields: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    names = {"squared_relu": squared_relu, "quick_gelu": quick_gelu}
    return {key: names.get(value, value) if isinstance(value, str) else value for key, value in fields.items()}


@needs_megatron
@pytest.mark.parametrize("case", CASES)
def test_weights_outputs_and_gradients_are_those_of_sequential_mlp(world: Any, case: str) -> None:
    theirs, ours = experts_of_both(world, **named_functions(CASES[case]))
    for name, parts in weights_of(theirs).items():
        assert torch.equal(torch.stack(parts), getattr(ours, name)), f"{name} is drawn as Megatron draws it"
    for experts in (theirs, ours):  # biases are drawn as zeros
        for name, value in weights_of(experts).items():
            if name.startswith("bias"):
                values = torch.randn(4, *getattr(ours, name).shape[1:], generator=torch.Generator().manual_seed(1))
                with torch.no_grad():
                    for expert, part in enumerate(value):
                        part.copy_(values[expert])
    for counts in ([3, 0, 7, 2], [0, 0, 0, 0]):
        for experts in (theirs, ours):
            experts.zero_grad()
        wanted = run_experts(theirs, counts, dtype=torch.float32, probs_dtype=torch.float32)
        found = run_experts(ours, counts, dtype=torch.float32, probs_dtype=torch.float32)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].shape == tensor.shape, name
            if tensor.numel() and tensor.any():
                assert relative_error(found[name], tensor) < 2e-6, name
            else:
                assert not found[name].any(), name
    assert all(parameter.grad is not None for parameter in ours.parameters()), "also where no row came"


@needs_megatron
@pytest.mark.parametrize("probs_dtype", [torch.bfloat16, torch.float32])
def test_bf16_is_as_near_to_exact_as_megatrons(world: Any, probs_dtype: torch.dtype) -> None:
    theirs, ours = experts_of_both(world, params_dtype=torch.bfloat16, bf16=True)
    exact = experts_of_both(world, params_dtype=torch.bfloat16, bf16=True)[0].double()
    counts = [5, 0, 30, 13]
    wanted = run_experts(exact, counts, dtype=torch.float64, probs_dtype=torch.float64)
    reference = run_experts(theirs, counts, dtype=torch.bfloat16, probs_dtype=probs_dtype)
    found = run_experts(ours, counts, dtype=torch.bfloat16, probs_dtype=probs_dtype)
    assert found["dprobs"].dtype == probs_dtype
    for name, tensor in wanted.items():
        limit = 2 * relative_error(reference[name], tensor) + 2e-3
        assert relative_error(found[name], tensor) < limit, name


@needs_megatron
def test_what_megatron_reads_from_parameters(world: Any) -> None:
    _, ours = experts_of_both(world, add_bias_linear=True)
    found = {
        name: tuple(getattr(p, key, None) for key in ("tensor_model_parallel", "partition_dim", "partition_stride"))
        for name, p in ours.named_parameters()
    }
    assert found == {
        "weight1": (True, 1, 2),
        "weight2": (True, 2, 1),
        "bias1": (True, 1, 2),
        "bias2": (None, None, None),
    }
    assert all(parameter.allreduce for parameter in ours.parameters())
    assert ours.bias2.sequence_parallel is False
    _, plain = experts_of_both(world, gated_linear_unit=False)
    assert plain.weight1.partition_stride == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fp8": "hybrid"}, "config.fp8 is 'hybrid'"),
    ({"fp4": "e2m1"}, "config.fp4 is 'e2m1'"),
    ({"use_kitchen": True}, "config.use_kitchen is True"),
    ({"quant_recipe": object()}, "config.quant_recipe is"),
    ({"use_te_activation_func": True}, "config.use_te_activation_func is True"),
    ({"activation_func_fp8_input_store": True}, "config.activation_func_fp8_input_store is True"),
    ({"moe_mlp_glu_interleave_size": 32}, "config.moe_mlp_glu_interleave_size is 32"),
    ({"batch_invariant_mode": True}, "config.batch_invariant_mode is True"),
    ({"cpu_offloading": True}, "config.cpu_offloading is True"),
    ({"init_model_with_meta_device": True}, "config.init_model_with_meta_device is True"),
    ({"activation_func": "quick_gelu"}, "config.activation_func is quick_gelu (gated)"),
    ({"activation_func": torch.tanh}, "config.activation_func is tanh (gated)"),
    ({"activation_func_clamp_value": 7.0}, "config.activation_func_clamp_value is 7.0"),
    ({"glu_linear_offset": 1.0}, "config.glu_linear_offset is 1.0"),
    ({"activation_func": F.gelu, "bias_activation_fusion": True}, "config.bias_activation_fusion is True"),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
        "config.recompute_modules is ['moe_act']",
    ),
    (
        {"fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1"]},
        "config.offload_modules is ['expert_fc1']",
    ),
    ({"moe_apply_probs_on_input": True}, "config.moe_router_topk is 2"),
    ({"moe_ffn_hidden_size": 0}, "sonic"),
]


@needs_megatron
@pytest.mark.parametrize(("fields", "message"), REFUSED[:-1], ids=[message for _, message in REFUSED[:-1]])
def test_fields_that_are_not_honoured_are_refused(world: Any, fields: dict[str, Any], message: str) -> None:
    from sonic.layers.megatron.experts import SonicExperts

    config = world.make_config()
    for name, value in named_functions(fields).items():  # past the config's own checks, which may refuse it too
        setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(f"sonic.megatron.SonicExperts: {message}")):
        SonicExperts(4, config)


@needs_megatron
def test_enable_swap_replace_and_disable(world: Any) -> None:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import moe_module_specs
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from tests.megatron_world import loss_of, make_block, make_model

    original = LocalSpecProvider.grouped_mlp_modules
    config = world.make_config()

    def built(spec: Any = None) -> Any:
        torch.manual_seed(0)
        return make_model(config, spec)

    stock = built()
    wanted = loss_of(stock)
    kinds = []
    with enabled(save="input", fused_layer=True):
        assert moe_module_specs.MoELayer is not MoELayer
        model = built()
        kinds.append(model)
        with enabled():
            kinds.append(built())
            assert moe_module_specs.MoELayer is MoELayer, "enabled again, without a layer of its own"
    assert LocalSpecProvider.grouped_mlp_modules is original and moe_module_specs.MoELayer is MoELayer
    sonic.megatron.disable()
    assert type(built().decoder.layers[0].mlp.experts).__name__ == "SequentialMLP"
    spec = make_block(config)
    assert sonic.megatron.swap(spec) == 1, "one spec, shared by two layers"
    kinds.append(built(spec))
    spec = make_block(config)
    sonic.megatron.swap(spec, fused_layer=True)
    kinds.append(built(spec))
    for options in ({}, {"fused_layer": True}):
        replaced = built()
        assert sonic.megatron.replace_experts(replaced, **options) == 2
        kinds.append(replaced)
    routes = []
    for model in kinds:
        assert (loss_of(model) - wanted).abs() < 2e-6
        reports = sonic.megatron.explain(model)
        assert list(reports) == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
        report = reports["decoder.layers.0.mlp"]
        assert (report.kind, report.activation, report.refused) == ("SonicExperts", "swiglu", None)
        routes.append(report.route == "tokens stay where they are")
    assert routes == [True, False, False, True, False, True]
    assert kinds[0].decoder.layers[0].mlp.experts.options.save == "input"
    report = sonic.megatron.explain(stock)["decoder.layers.0.mlp"]
    assert report.kind == "SequentialMLP" and "its experts are a SequentialMLP" in report.route


@needs_megatron
def test_what_cannot_be_swapped_or_replaced(world: Any) -> None:
    from tests.megatron_world import make_model

    with pytest.raises(ValueError, match="swap: spec is a int without an MoE layer"):
        sonic.megatron.swap(3)
    with pytest.raises(ValueError, match="replace_experts: model is a Linear without an MoE layer"):
        sonic.megatron.replace_experts(nn.Linear(2, 2))
    model = make_model(world.make_config())
    sonic.megatron.replace_experts(model)
    with pytest.raises(ValueError, match="mlp.experts is a SonicExperts, expected one of SequentialMLP"):
        sonic.megatron.replace_experts(model)
    model = make_model(world.make_config())
    next(model.decoder.layers[1].mlp.parameters()).main_grad = torch.zeros(1)
    with pytest.raises(ValueError, match=r"decoder.layers.1.mlp is held by data parallelism"):
        sonic.megatron.replace_experts(model)


@needs_megatron
def test_replacing_keeps_what_is_frozen_and_the_dtype(world: Any) -> None:
    from tests.megatron_world import make_model

    model = make_model(world.make_config()).bfloat16()
    for parameter in model.decoder.layers[0].mlp.experts.parameters():
        parameter.requires_grad_(False)
    sonic.megatron.replace_experts(model)
    first, second = (layer.mlp.experts for layer in model.decoder.layers)
    assert not any(p.requires_grad for p in first.parameters()) and all(p.requires_grad for p in second.parameters())
    assert first.weight1.dtype == torch.bfloat16


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Loss, gradients by name, experts' gradients in our shapes, and what the auxiliary-loss tracker was told."""
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

    from tests.megatron_world import loss_of

    model.train().zero_grad()
    clear_aux_losses_tracker()
    torch.manual_seed(9)
    loss = loss_of(model)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, entry in get_moe_layer_wise_logging_tracker().items():
        found[f"told of {name}"] = entry["values"].clone()
    clear_aux_losses_tracker()
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            found[name] = parameter.grad
    for index, layer in enumerate(model.decoder.layers):
        for name, value in weights_of(layer.mlp.experts).items():
            parts = value if isinstance(value, list) else list(value.grad)
            grads = [part.grad if isinstance(value, list) else part for part in parts]
            grads = [torch.zeros_like(weights_of(layer.mlp.experts)[name][0]) if g is None else g for g in grads]
            found[f"{index}.{name}"] = torch.stack(grads).detach()
    return found


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared expert": {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
    "z-loss, losses of three kinds": {
        "moe_z_loss_coeff": 0.01,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.01, 0.02, 0.03],
    },
    "sigmoid, groups, expert bias": {
        **{"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        **{"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5},
    },
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "capacity": {"moe_expert_capacity_factor": 0.7, "moe_token_drop_policy": "probs"},
    "capacity, padded": {"moe_expert_capacity_factor": 1.2, "moe_pad_expert_input_to_capacity": True},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "probabilities of fp32": {"moe_router_dtype": "fp32"},
}


@needs_megatron
@pytest.mark.parametrize("fused_layer", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_a_model_has_the_loss_and_the_gradients_of_megatrons(world: Any, case: str, fused_layer: bool) -> None:
    from tests.megatron_world import make_model

    config = world.make_config(**LAYERS[case])
    stock, ours = (seeded(make_model, config) for _ in range(2))
    sonic.megatron.replace_experts(ours, fused_layer=fused_layer)
    wanted, found = loss_and_gradients(stock), loss_and_gradients(ours)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative_error(found[name], tensor) < 1e-5 if tensor.any() else not found[name].any(), name
    for mine, theirs in zip(ours.buffers(), stock.buffers(), strict=True):
        assert torch.equal(mine, theirs), "counts of the expert bias"
    routes = {report.route for report in sonic.megatron.explain(ours).values()}
    assert routes == (
        {"tokens stay where they are"} if fused_layer else {"Megatron's dispatcher: fused_layer was not asked for"}
    )


@needs_megatron
def test_the_fused_layer_keeps_less(world: Any) -> None:
    """Bytes that one layer keeps for backward: 512 tokens of width 256, 4 of 16 experts of width 128 each, bf16."""
    from tests.megatron_world import make_model

    sizes = {"num_layers": 1, "hidden_size": 256, "moe_ffn_hidden_size": 128, "num_moe_experts": 16}
    config = world.make_config(**sizes, moe_router_topk=4, bf16=True, params_dtype=torch.bfloat16)
    kept = {}
    for options in (None, {}, {"save": "input"}, {"fused_layer": True}, {"fused_layer": True, "save": "input"}):
        model = seeded(make_model, config)
        if options is not None:
            sonic.megatron.replace_experts(model, **options)
        layer = model.decoder.layers[0].mlp
        seen: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

        def pack(tensor: Tensor, seen: dict[int, int] = seen, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(256, 2, 256, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = layer(x)
        kept[str(options)] = sum(seen.values())
        del held
    print({name: f"{size / 2**20:.2f} MiB" for name, size in kept.items()})
    stock, rows, lean_rows, fused, lean = kept.values()
    tokens, width_h, tables = 2 * 512 * 256, 2 * 512 * 4 * 256, 6 * 512 * 16 * 4
    assert stock > rows > lean_rows and rows > fused > lean, kept
    assert fused < tokens + width_h + tables, f"X, H, and tables of the router: {kept}"
    assert lean < tokens + tables, kept


@needs_megatron
@pytest.mark.parametrize("fused_layer", [False, True])
def test_recomputing_a_layer_keeps_its_input_alone(world: Any, fused_layer: bool) -> None:
    from tests.megatron_world import make_model

    config = world.make_config(num_layers=1, recompute_granularity="selective", recompute_modules=["moe"])
    model = seeded(make_model, config)
    sonic.megatron.replace_experts(model, fused_layer=fused_layer)
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.decoder.layers[0].mlp(torch.randn(16, 2, 32, requires_grad=True))
    assert set(shapes) == {(16, 2, 32)}


# ---------------------------------------------------------------- token rounding


@needs_megatron
def test_padded_pairs_score_their_probability_times_the_factor(world: Any) -> None:
    from tests.megatron_world import make_model

    config = world.make_config(moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5)
    stock, ours = (seeded(make_model, config) for _ in range(2))
    sonic.megatron.replace_experts(ours, router=partial(TokenRounding, tile_rows=8, rule="up"))
    router, theirs = ours.decoder.layers[0].mlp.router, stock.decoder.layers[0].mlp.router
    x = torch.randn(16, 2, 32)
    (probs, chosen), (_, theirs_chosen) = router(x), theirs(x)
    padded = chosen & ~theirs_chosen
    assert padded.any() and (theirs_chosen <= chosen).all()
    wanted = 2.5 * torch.sigmoid(x.reshape(32, 32) @ router.weight.t())
    assert relative_error(probs[padded], wanted[padded]) < 1e-5


@needs_megatron
@pytest.mark.parametrize("fused_layer", [False, True])
def test_token_rounding_gives_whole_tiles_in_training_and_top_k_in_eval(world: Any, fused_layer: bool) -> None:
    from tests.megatron_world import loss_of, make_model

    config = world.make_config(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    stock, ours = (seeded(make_model, config) for _ in range(2))
    sonic.megatron.replace_experts(ours, router=partial(TokenRounding, tile_rows=4), fused_layer=fused_layer)
    assert ours.state_dict().keys() >= {"decoder.layers.0.mlp.router.weight", "decoder.layers.0.mlp.router.expert_bias"}
    assert {name for name, _ in stock.named_parameters() if "experts." not in name} == {
        name for name, _ in ours.named_parameters() if "experts." not in name
    }
    router = ours.decoder.layers[0].mlp.router
    x = torch.randn(16, 2, 32, requires_grad=True)
    probs, chosen = router.train()(x)
    counts = chosen.sum(0)
    assert not (counts % 4).any() and counts.sum() != 64 and chosen.dtype == torch.bool
    assert (probs[~chosen] == 0).all() and (probs[chosen] > 0).all()
    theirs = stock.decoder.layers[0].mlp.router
    theirs_probs, theirs_chosen = theirs(x)
    both = chosen & theirs_chosen
    assert torch.equal(probs[both], theirs_probs[both]), "kept pairs keep their scores"
    assert torch.equal(router.local_tokens_per_expert, theirs.local_tokens_per_expert), "of what the tokens chose"
    weight = torch.randn_like(probs)
    (probs * weight).sum().backward()
    assert x.grad.abs().sum() > 0 and router.weight.grad.abs().sum() > 0
    assert loss_and_gradients(ours)["loss"].isfinite()
    assert "SonicRouter with TokenRounding" in {r.router for r in sonic.megatron.explain(ours).values()}
    ours.eval()
    stock.eval()
    with torch.no_grad():
        assert (loss_of(ours) - loss_of(stock)).abs() < 1e-6
    assert not ours.decoder.layers[0].mlp.router.decision.training


@needs_megatron
def test_both_routes_round_alike(world: Any) -> None:
    from tests.megatron_world import make_block, make_model

    found = []
    config = world.make_config()
    for fused_layer in (False, True):
        with enabled(router=partial(TokenRounding, tile_rows=8, rule="balanced"), fused_layer=fused_layer):
            torch.manual_seed(0)
            found.append(loss_and_gradients(make_model(config, make_block(config))))
    for name, tensor in found[0].items():
        assert relative_error(found[1][name], tensor) < 1e-5, name


@needs_megatron
@pytest.mark.parametrize(
    ("fields", "router", "message"),
    [
        ({"moe_expert_capacity_factor": 1.0}, TokenRounding, "config.moe_expert_capacity_factor is 1.0"),
        ({}, lambda decision: 3, "router is a int, expected a torch.nn.Module"),
        ({}, lambda decision: nn.Linear(2, 2), "router is with weight, bias, expected nothing"),
    ],
)
def test_routers_that_are_refused(world: Any, fields: dict[str, Any], router: Any, message: str) -> None:
    from tests.megatron_world import make_model

    model = make_model(world.make_config(**fields))
    with pytest.raises(ValueError, match=re.escape(message)):
        sonic.megatron.replace_experts(model, router=router)


# ---------------------------------------------------------------- later Megatron-core


def test_a_provider_that_returns_builders_gets_one() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from sonic.layers import megatron as face

    def grouped_mlp_modules(self: Any, moe_use_grouped_gemm: bool) -> Any:
        raise AssertionError("replaced")

    options = ExpertsOptions(save="input")
    patched: Any = face.__dict__["_patched"](grouped_mlp_modules, options)
    builder = patched(SimpleNamespace(), True)
    assert isinstance(builder, partial) and builder.keywords["submodules"] == options


# ---------------------------------------------------------------- Ladder Residual


def by_hand(model: Any) -> Tensor:
    """The loss of a model whose layers are run in the order of Ladder Residual, from their parts."""
    from tests.megatron_world import batch_of, causal_mask

    batch = batch_of(0, 0)
    x = model.embedding(batch["input_ids"], batch["position_ids"])
    rotary = model.rotary_pos_emb(x.shape[0])
    late: tuple[Tensor, Tensor] | None = None
    for layer in model.decoder.layers:
        if late is not None:
            x = x + late[0]
        attention, _ = layer.self_attention(
            layer.input_layernorm(x), attention_mask=causal_mask(), rotary_pos_emb=rotary
        )
        if late is not None:
            x = x + late[1]
        late = attention, layer.mlp(layer.pre_mlp_layernorm(x))[0]
    assert late is not None
    logits, _ = model.output_layer(model.decoder.final_layernorm(x + late[0] + late[1]))
    return F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), batch["labels"].flatten())


@needs_megatron
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_layers": 3, "moe_layer_freq": [1, 0, 1], "moe_router_load_balancing_type": "none"}],
    ids=["moe", "and dense"],
)
def test_the_ladder_is_wired_as_it_says(world: Any, fields: dict[str, Any]) -> None:
    from tests.megatron_world import loss_of, make_block, make_model

    config = world.make_config(**fields)
    spec = make_block(config)
    assert sonic.megatron.use_ladder(spec) == (1 if not fields else 2)
    sonic.megatron.swap(spec, fused_layer=True)
    ladder, standard = seeded(make_model, config, spec), seeded(make_model, config, make_block(config))
    assert ladder.state_dict().keys() != {} and type(ladder.decoder.layers[0]).__name__ == "LadderTransformerLayer"
    sonic.megatron.replace_experts(standard)
    wanted, found = by_hand(standard), loss_of(ladder)
    assert (found - wanted).abs() < 2e-6
    assert (loss_of(standard) - wanted).abs() > 1e-3, "another function of the same weights"
    wanted.backward()
    found.backward()
    for (name, mine), theirs in zip(ladder.named_parameters(), standard.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-4 or theirs.grad.abs().max() < 1e-7, name


@needs_megatron
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, "config.pipeline_model_parallel_size is 2, expected 1"),
        ({"recompute_granularity": "full"}, "config.recompute_granularity is full"),
        ({"mtp_num_layers": 1}, "config.mtp_num_layers is 1"),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "config.recompute_modules is"),
    ],
)
def test_what_the_ladder_refuses(world: Any, fields: dict[str, Any], message: str) -> None:
    from sonic.layers.megatron.ladder import LadderTransformerLayer
    from tests.megatron_world import make_block

    config = world.make_config()
    spec = make_block(config)
    submodules = spec.layer_specs[0].submodules
    sizes = {key: value for key, value in fields.items() if key != "pipeline_model_parallel_size"}
    for name, value in sizes.items():
        setattr(config, name, value)
    if sizes != fields:
        from sonic.layers.megatron import ladder

        config.pipeline_model_parallel_size = 2
        with pytest.raises(ValueError, match=re.escape(message)):
            ladder.__dict__["_check"](config)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        LadderTransformerLayer(config, submodules)
    with pytest.raises(ValueError, match="use_ladder: spec is a int without a TransformerLayer"):
        sonic.megatron.use_ladder(3)


# ---------------------------------------------------------------- the example

EXAMPLE = "examples.pretrain_megatron"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "2"], "argument --tp: 1 processes, expected a multiple of 2"),
        (["--batch-size", "3"], "argument --batch-size: is 3, expected a multiple of 2"),
        (["--hidden-size", "6"], "argument --hidden-size: is 6, expected a multiple of 4"),
    ],
)
def test_the_example_refuses_sizes_that_do_not_fit(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples.pretrain_megatron import main

    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize("options", [["--ep", "2"], ["--tp", "2", "--ladder"], ["--pp", "2", "--round"]])
def test_the_example_trains_and_its_checkpoint_is_megatrons(options: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    sizes = ["--quick", "--steps", "20", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "-m", EXAMPLE, *sizes, *options],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [float(found) for found in re.findall(r"(\d+\.\d+) bits per byte", done.stdout)]
    assert told[-1] < told[0] - 0.5, done.stdout
