"""The face of torchtitan: its own configs, overridden by their names, against its own experts and a float64 loop.

Everything here needs torchtitan and is skipped, with the reason, where it is not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed import RanksFailed, run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")

E, K, D, N = 6, 2, 40, 32
BATCH, LENGTH = 2, 19
TARGETS = {
    "grouped": "sonic.torchtitan.grouped_experts",
    "routed": "sonic.torchtitan.routed_experts",
    "grouped, fused": 'sonic.torchtitan.grouped_experts={"fused_weights": true}',
    "routed, fused": 'sonic.torchtitan.routed_experts={"fused_weights": true}',
}


def on_cpu() -> None:
    """torchtitan decides for a kind of device when it is imported."""
    if torch.accelerator.is_available():
        return
    given = torch._utils._get_available_device_type
    torch._utils._get_available_device_type = lambda: "cpu"
    try:
        import torchtitan.distributed.utils as utils
    finally:
        torch._utils._get_available_device_type = given
    utils.set_spmd_backend("partial_dtensor")


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    on_cpu()


def moe_config(
    kind: str = "qwen3", *, num_experts: int = E, parallel: str = "none", expert_parallel: bool = True
) -> Any:
    """A config as torchtitan's models hold it, for MoE blocks of ``qwen3`` or ``gpt_oss``; unit-scale weights."""
    from torchtitan.models.common import config_utils
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    names = {"qwen3": ("w1_EFD", "w3_EFD", "w2_EDF"), "gpt_oss": GPT_OSS}[kind]
    routed = config_utils.make_routed_experts_config(
        dim=D, hidden_dim=N, num_experts=num_experts, top_k=K, comm_backend="standard",
        param_init={name: unit_scale for name in names},
    )  # fmt: skip
    if kind == "gpt_oss":
        sizes = {"dim": D, "hidden_dim": N, "num_experts": num_experts, "param_init": routed.inner_experts.param_init}
        routed.inner_experts = GptOssGroupedExperts.Config(**sizes)
    gate = {"weight": unit_scale}
    router = config_utils.make_router_config(
        dim=D, num_experts=num_experts, gate_param_init=gate, top_k=K, score_func="softmax", route_norm=True
    )
    config = config_utils.make_moe_config(num_experts=num_experts, router=router, routed_experts=routed)
    if parallel != "none":
        from torchtitan.models.gpt_oss import sharding as gpt_oss
        from torchtitan.models.qwen3 import sharding as qwen3

        layout = qwen3._GROUPED_EXPERTS_PARAM_LAYOUT if kind == "qwen3" else gpt_oss._GPT_OSS_EXPERTS_PARAM_LAYOUT
        set_moe_sharding_config(config, enable_ep=expert_parallel, enable_sp=False, expert_param_layout=layout)
    return config


GPT_OSS = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")


def unit_scale(parameter: Tensor) -> None:
    """So that what comes out of a product has the scale of what goes in."""
    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)


def overridden(target: str, config: Any) -> Any:
    """``config`` after ``--override.imports target``, read and applied by torchtitan itself."""
    from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports

    assert apply_overrides(OverrideConfig(imports=parse_cli_imports([target])), config), "nothing was replaced"
    return config


def built(config: Any) -> Any:
    module = config.build()
    module.init_states()
    return module


def pair(target: str, kind: str = "qwen3", **options: Any) -> tuple[Any, Any]:
    """torchtitan's routed experts, and this library's with the same parameters."""
    stock = built(moe_config(kind, **options)).routed_experts
    ours = built(overridden(target, moe_config(kind, **options))).routed_experts
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def decisions(ids: Tensor | None = None, num_experts: int = E) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (in bf16, of which gpt-oss takes no other), scores, chosen experts and counts; expert 1 gets nothing."""
    x = torch.randn(BATCH, LENGTH, D).bfloat16()
    logits = torch.randn(BATCH, LENGTH, num_experts)
    logits[..., 1] = -torch.inf
    scores, chosen = logits.softmax(-1).topk(K, dim=-1)
    chosen = chosen if ids is None else ids
    return x, scores, chosen, torch.bincount(chosen.flatten(), minlength=num_experts)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def results(
    routed: nn.Module, x: Tensor, scores: Tensor, ids: Tensor, counts: Tensor, dout: Tensor
) -> dict[str, Tensor]:
    """Output and every gradient; those of a fused parameter under the names that checkpoints have."""
    routed.zero_grad()
    x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
    out = routed(x, scores, ids, counts)
    out = out.full_tensor() if hasattr(out, "full_tensor") else out  # of tensor-parallel ranks the sum
    out.backward(dout)
    found = {"out": out, "x": x.grad, "scores": scores.grad}
    for name, parameter in routed.named_parameters():
        gradient = whole(parameter.grad)
        name = name.rpartition(".")[2]
        halves = {"w1_EFD": gradient[:, :, 0], "w3_EFD": gradient[:, :, 1]} if name == "w13" else {name: gradient}
        found |= halves
    return {name: whole(tensor) for name, tensor in found.items()}


def in_float64(state: dict[str, Tensor], x: Tensor, scores: Tensor, ids: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """The same by a loop over experts."""
    weights = {name.rpartition(".")[2]: value.double().requires_grad_() for name, value in state.items()}
    x, scores = x.double().requires_grad_(), scores.double().requires_grad_()
    out = torch.zeros_like(x)
    for expert in range(ids.max() + 1):
        weight = (scores * (ids == expert)).sum(-1, keepdim=True)
        if "w1_EFD" in weights:
            w1, w3, w2 = (weights[name][expert] for name in ("w1_EFD", "w3_EFD", "w2_EDF"))
            y = (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        else:
            w1, b1, w2, b2 = (weights[name][expert] for name in GPT_OSS)
            h = x @ w1.T + b1
            gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
            y = (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ w2.T + b2
        out = out + weight * y
    out.backward(dout.double())
    grads = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in weights.items()}
    return {"out": out.detach(), "x": x.grad, "scores": scores.grad, **grads}


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def assert_as_right_as(ours: dict, stock: dict, exact: dict, case: str) -> None:
    """Each within 1.5 times the error that torchtitan's own has, and a floor."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name in exact:
        off, theirs = error(ours[name], exact[name]), error(stock[name], exact[name])
        print(f"{case:>24} {name:>16}: off by {off:.1e}, torchtitan's own {theirs:.1e}")
        assert off < 1.5 * theirs + 1e-6, f"{case}: {name} is off by {off:.1e}, torchtitan's own by {theirs:.1e}"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("target", TARGETS)
def test_as_right_as_stock(target: str, kind: str) -> None:
    if kind == "gpt_oss" and "fused" in target:
        pytest.skip("gpt-oss holds gate and up in one parameter anyway")
    stock, ours = pair(TARGETS[target], kind)
    data, dout = decisions(), torch.randn(BATCH, LENGTH, D).bfloat16()
    exact = in_float64(stock.state_dict(), *data[:3], dout)
    assert_as_right_as(results(ours, *data, dout), results(stock, *data, dout), exact, f"{kind}, {target}")


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("level", ["grouped", "routed"])
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_right_in_float32(level: str, kind: str, save: str) -> None:
    """A wrong formula cannot hide in what bf16 rounds."""
    option = f'={{"compute_dtype": "float32", "save": "{save}"}}'
    stock, ours = pair(TARGETS[level] + option, kind)
    data, dout = decisions(), torch.randn(BATCH, LENGTH, D).bfloat16()
    data, dout = (data[0].float(), *data[1:]), dout.float()
    found, exact = results(ours, *data, dout), in_float64(stock.state_dict(), *data[:3], dout)
    for name in exact:
        assert error(found[name], exact[name]) < 2e-6, name


@pytest.mark.parametrize("target", TARGETS)
def test_one_expert_has_all_tokens(target: str) -> None:
    stock, ours = pair(TARGETS[target])
    ids = torch.tensor([4, 0]).expand(BATCH, LENGTH, K).contiguous()
    data, dout = decisions(ids), torch.randn(BATCH, LENGTH, D).bfloat16()
    found, wanted = results(ours, *data, dout), results(stock, *data, dout)
    for name in wanted:
        assert error(found[name], wanted[name].double()) < 1e-2, name
    assert (found["w2_EDF"][[1, 2, 3, 5]] == 0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_rows_beyond_the_counts_are_nobodys(fused: bool) -> None:
    option = "=" + json.dumps({"compute_dtype": "float32", "fused_weights": fused})
    experts = pair(TARGETS["grouped"] + option)[1].inner_experts
    counts = torch.tensor([5, 0, 3, 0, 7, 1])
    rows = torch.randn(16, D)
    wide = torch.cat([rows, torch.full((9, D), torch.nan)]).requires_grad_()
    out = experts(wide, counts)
    out.backward(torch.ones_like(out))
    weights = [p.grad.clone() for p in experts.parameters()]
    experts.zero_grad()
    narrow = rows.requires_grad_()
    alone = experts(narrow, counts)
    alone.backward(torch.ones_like(alone))
    assert (out[16:] == 0).all() and (wide.grad[16:] == 0).all()
    assert torch.equal(out[:16], alone) and torch.equal(wide.grad[:16], narrow.grad)
    assert all(torch.equal(a, p.grad) for a, p in zip(weights, experts.parameters(), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_no_token(target: str) -> None:
    ours = pair(TARGETS[target])[1]
    x = torch.randn(1, 0, D, requires_grad=True)
    ids = torch.empty(1, 0, K, dtype=torch.int64)
    ours(x, torch.empty(1, 0, K), ids, torch.zeros(E, dtype=torch.int64)).sum().backward()
    assert all((p.grad == 0).all() for p in ours.parameters())


def test_frozen_parameters_and_no_gradient_at_all() -> None:
    stock, ours = pair(TARGETS["routed"])
    data, dout = decisions(), torch.randn(BATCH, LENGTH, D).bfloat16()
    wanted = results(ours, *data, dout)
    with torch.no_grad():
        assert torch.equal(ours(*data), wanted["out"])
    ours.inner_experts.w1_EFD.requires_grad_(False)
    ours.inner_experts.zero_grad()
    ours(*data).backward(dout)
    assert ours.inner_experts.w1_EFD.grad is None
    assert torch.equal(ours.inner_experts.w3_EFD.grad, wanted["w3_EFD"])


def test_a_second_derivative_is_refused() -> None:
    x, *data = decisions()
    ours = pair(TARGETS["routed"])[1]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x, *data).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order backward only"):
        gradient.sum().backward()


@pytest.mark.parametrize("target", TARGETS)
def test_under_activation_checkpointing(target: str) -> None:
    ours = pair(TARGETS[target])[1]
    data, dout = decisions(), torch.randn(BATCH, LENGTH, D).bfloat16()
    wanted = results(ours, *data, dout)
    again = copy.deepcopy(ours)
    forward = again.forward
    again.forward = lambda *given: checkpoint(forward, *given, use_reentrant=False)
    found = results(again, *data, dout)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------- what is kept


def kept_bytes(routed: nn.Module, *data: Tensor) -> int:
    """Bytes of distinct memory that autograd holds, beside the parameters and what the caller gave."""
    known = {t.untyped_storage().data_ptr() for t in (*routed.parameters(), *data)}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no later one gets the same address
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = routed(*data)
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_backward_keeps(dtype: torch.dtype) -> None:
    """H, offsets and slots; with rows that torchtitan permuted also the rows, and what its combine keeps."""
    rows, x = BATCH * LENGTH * K, None
    kept = {}
    for name, target in {**TARGETS, "routed, input": 'sonic.torchtitan.routed_experts={"save": "input"}'}.items():
        stock, ours = pair(target)
        x, *rest = decisions()
        data = (x.to(dtype), *rest)
        for module in (stock, ours):
            module.to(dtype)
        data[0].requires_grad_()
        data[1].requires_grad_()
        kept["torchtitan"], kept[name] = kept_bytes(stock, *data), kept_bytes(ours, *data)
    print(f"kept for backward, {dtype}: " + ", ".join(f"{name} {count:,} B" for name, count in kept.items()))
    integers, preactivation = 4 * rows + 4 * (E + 1), rows * 2 * N * 2
    assert kept["routed"] == kept["routed, fused"] == preactivation + integers
    assert kept["routed, input"] == integers
    assert kept["grouped"] == kept["grouped, fused"] < kept["torchtitan"]


def test_nothing_joined_or_cast_outlives_a_pass() -> None:
    """Weights of float32 are cast to bf16 and joined: neither is held between forward and backward."""
    stock, ours = pair(TARGETS["routed"])
    x, *data = decisions()
    theirs, mine = (kept_bytes(module, x.requires_grad_(), *data) for module in (stock, ours))
    weights = 2 * 3 * E * N * D
    print(f"weights in bf16 {weights:,} B; kept by torchtitan {theirs:,} B, by this library {mine:,} B")
    assert mine < weights < theirs


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("target", TARGETS)
def test_checkpoints_both_ways(target: str, kind: str) -> None:
    if kind == "gpt_oss" and "fused" in target:
        pytest.skip("gpt-oss holds gate and up in one parameter anyway")
    stock, ours = built(moe_config(kind)), built(overridden(TARGETS[target], moe_config(kind)))
    theirs = {name: value.clone() for name, value in stock.state_dict().items()}
    ours.load_state_dict(theirs, strict=True)
    back = ours.state_dict()
    assert list(sorted(back)) == list(sorted(theirs))
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    other = built(moe_config(kind))
    other.load_state_dict(back, strict=True)
    assert all(torch.equal(value, theirs[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("target", ["grouped", "routed"])
def test_separate_weights_start_as_in_torchtitan(target: str) -> None:
    torch.manual_seed(3)
    stock = built(moe_config())
    torch.manual_seed(3)
    ours = built(overridden(TARGETS[target], moe_config()))
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in ours.state_dict().items())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]


# ---------------------------------------------------------------- torchtitan's command line


@pytest.mark.parametrize(
    ("module", "config", "target", "kind", "where"),
    [
        ("qwen3", "qwen3_moe_debug", 'sonic.torchtitan.routed_experts={"save": "input", "backend": "reference"}',
         "SonicGroupedExperts", "SonicRoutedExperts"),
        ("qwen3", "qwen3_moe_debug", "sonic.torchtitan.grouped_experts", "SonicGroupedExperts", "RoutedExperts"),
        ("qwen3", "qwen3_moe_debug", 'sonic.torchtitan.routed_experts={"fused_weights": true}',
         "SonicFusedGroupedExperts", "SonicRoutedExperts"),
        ("deepseek_v3", "deepseek_v3_debugmodel", "sonic.torchtitan.routed_experts", "SonicGroupedExperts",
         "SonicRoutedExperts"),
        ("gpt_oss", "gpt_oss_debugmodel", "sonic.torchtitan.routed_experts", "SonicGptOssGroupedExperts",
         "SonicRoutedExperts"),
    ],
)  # fmt: skip
def test_the_command_line(module: str, config: str, target: str, kind: str, where: str) -> None:
    """A whole model's config, as torchtitan's trainer reads it, fills it in, overrides it and builds it."""
    from torchtitan.config import ConfigManager
    from torchtitan.config.override import apply_overrides

    words = ["--module", module, "--config", config, "--override.imports", target]
    trainer = ConfigManager().parse_args([*words, "--training.disable_cuda_graphs"])
    model_config = trainer.model_spec.model
    model_config.update_from_config(config=trainer)
    trainer.override.imports = [entry for entry in trainer.override.imports if target.startswith("sonic") and entry]
    replaced = apply_overrides(trainer.override, trainer)
    with torch.device("meta"):
        model = model_config.build()
    model.verify_module_protocol()
    blocks = [layer.moe.routed_experts for layer in model.layers.values() if getattr(layer, "moe", None) is not None]
    assert len(blocks) == len(replaced) > 0
    assert {type(block).__name__ for block in blocks} == {where}
    assert {type(block.inner_experts).__name__ for block in blocks} == {kind}
    names = {name for name, _ in blocks[0].inner_experts.named_parameters()}
    assert names <= set(blocks[0].inner_experts._sharding_config.state_shardings)
    assert names == set(blocks[0].inner_experts._param_init)
    if "input" in target:
        assert {(block.inner_experts.save, block.inner_experts.backend) for block in blocks} == {("input", "reference")}


def test_a_choice_of_layers() -> None:
    """A user's own override, which calls ours."""
    from torchtitan.config import override
    from torchtitan.config.override import OverrideConfig, apply_overrides
    from torchtitan.models.common.moe import RoutedExperts
    from torchtitan.models.qwen3 import qwen3_configs

    import sonic.torchtitan

    @override(target=RoutedExperts.Config, fqns=["layers.[0-2].moe.*"])
    def some(cfg: Any) -> Any:
        return sonic.torchtitan.routed_experts(cfg, save="input")

    some_name = f"{some.__module__}.{some.__name__}"
    model_config = qwen3_configs["debugmodel_moe"](attn_backend="varlen")
    assert len(apply_overrides(OverrideConfig(imports=[some_name]), model_config)) == 3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("level", ["grouped", "routed"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"save": "everything"}', "save is 'everything', expected one of 'preactivation', 'input'"),
        ('{"backend": "cuda"}', "backend is 'cuda', expected"),
        ('{"compute_dtype": "int8"}', "compute_dtype is 'int8', expected one of 'bfloat16'"),
        ('{"fused_weights": 1}', "fused_weights is 1, expected true or false"),
        ('{"activation": "gelu"}', "options is activation, expected save, backend, compute_dtype, fused_weights"),
    ],
)
def test_bad_options_are_refused(level: str, options: str, message: str) -> None:
    with pytest.raises(ValueError, match="sonic.torchtitan.grouped_experts: .*") as caught:
        overridden(f"{TARGETS[level]}={options}", moe_config())
    assert message in str(caught.value)


@pytest.mark.parametrize("level", ["grouped", "routed"])
def test_experts_of_another_kind_are_refused(level: str) -> None:
    from torchtitan.overrides.fused_swiglu import fused_grouped_experts

    config = moe_config()
    config.routed_experts.inner_experts = fused_grouped_experts(config.routed_experts.inner_experts)
    with pytest.raises(ValueError, match="cfg is a FusedGroupedExperts.Config, expected that of GroupedExperts or"):
        overridden(TARGETS[level], config)
    config = moe_config("gpt_oss")
    config.routed_experts.inner_experts.swiglu_limit = 5.0
    with pytest.raises(ValueError, match="swiglu_limit is 5.0, expected 7.0"):
        overridden(TARGETS[level], config)
    overridden(TARGETS["routed"], config := moe_config())
    with pytest.raises(ValueError, match="cfg is a Sonic"):
        overridden(TARGETS[level], config)


def test_both_at_once_and_names_that_do_not_exist_are_refused_by_torchtitan() -> None:
    from torchtitan.config.override import OverrideConfig, apply_overrides

    with pytest.raises(ValueError, match="an ancestor of"):
        apply_overrides(OverrideConfig(imports=[TARGETS["grouped"], TARGETS["routed"]]), moe_config())
    with pytest.raises(ValueError, match="names no registered"):
        overridden("sonic.torchtitan.rooted_experts", moe_config())


def test_bad_inputs_are_refused() -> None:
    ours = pair(TARGETS["routed"])[1]
    x, scores, ids, counts = decisions()
    with pytest.raises(ValueError, match="expert_index"):
        ours(x, scores, torch.zeros_like(ids), counts)
    with pytest.raises(ValueError, match="tokens_per_expert is .*expected counts >= 0 that sum to at most R = 4"):
        ours.inner_experts(torch.randn(4, D), counts)


# ---------------------------------------------------------------- parallel


def parallel_dims(backend: str, **degrees: int) -> Any:
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend(backend)
    given: dict[str, Any] = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, **degrees}
    dims = ParallelDims(**given, world_size=2, spmd_backend=backend)
    dims.build_mesh()
    return dims


def parallel_pair(target: str, kind: str, dims: Any, state: dict[str, Tensor]) -> list[tuple[str, Any]]:
    """Name and split module with these parameters: torchtitan's, then this library's."""
    modules = []
    for name in ("torchtitan", target):
        config = moe_config(kind, parallel="yes", expert_parallel=dims.ep > 1)
        routed = (config if name == "torchtitan" else overridden(TARGETS[name], config)).routed_experts.build()
        routed.load_state_dict(state)
        routed.parallelize(dims)
        modules.append((name, routed))
    return modules


def check_split(rank: int, target: str, kind: str, backend: str, degrees: dict[str, int]) -> None:
    """Experts split over two ranks, against torchtitan's split in the same way and all of them in float64."""
    on_cpu()
    from torchtitan.distributed.utils import get_spmd_context

    dims = parallel_dims(backend, **degrees)
    given = []
    for seed in (0, 1 if dims.ep > 1 else 0):  # tensor-parallel ranks have the same tokens
        torch.manual_seed(seed)
        # to each rank one of a token's experts: gloo's list all-to-all, which spmd_types takes, wants equal shares
        ids = torch.randint(E // 2, (BATCH, LENGTH, K)) + torch.tensor([0, E // 2]) if backend == "spmd_types" else None
        given.append((decisions(ids), torch.randn(BATCH, LENGTH, D).bfloat16()))
    data, dout = given[rank]
    found = {}
    torch.manual_seed(7)
    state = built(moe_config(kind)).routed_experts.state_dict()
    with get_spmd_context(parallel_dims=dims)():
        for name, routed in parallel_pair(target, kind, dims, state):
            found[name] = results(routed, *data, dout)
    together = given if dims.ep > 1 else given[:1]
    exact = in_float64(
        state, *(torch.cat([one[0][i] for one in together]) for i in range(3)), torch.cat([one[1] for one in together])
    )
    mine = slice(rank * BATCH, (rank + 1) * BATCH) if dims.ep > 1 else slice(None)
    exact |= {name: exact[name][mine] for name in ("out", "x", "scores")}
    if backend == "spmd_types" and dims.ep > 1:  # there parameters are plain tensors: those of this rank
        local = slice(rank * E // 2, (rank + 1) * E // 2)
        exact |= {name: value[local] for name, value in exact.items() if name not in ("out", "x", "scores")}
    assert_as_right_as(found[target], found["torchtitan"], exact, f"{kind}, {target}, {degrees}, rank {rank}")


SPLITS = [
    ("routed", "qwen3", "partial_dtensor", {"dp_shard": 2, "ep": 2}),
    ("grouped, fused", "qwen3", "partial_dtensor", {"dp_shard": 2, "ep": 2}),
    ("routed", "gpt_oss", "partial_dtensor", {"dp_shard": 2, "ep": 2}),
    ("routed", "qwen3", "spmd_types", {"dp_shard": 2, "ep": 2}),
    ("routed", "qwen3", "partial_dtensor", {"tp": 2}),
    ("routed, fused", "qwen3", "partial_dtensor", {"tp": 2}),
    ("routed", "gpt_oss", "partial_dtensor", {"tp": 2}),
]


def check_splits(rank: int) -> None:
    for split in SPLITS:
        check_split(rank, *split)


def test_split_over_ranks() -> None:
    """Expert parallel by torchtitan's all-to-all dispatcher; tensor parallel."""
    run_ranks(check_splits, 2, timeout=300)


def check_fully_sharded(rank: int, target: str, experts_alone: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    on_cpu()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    torch.manual_seed(7)
    state = built(moe_config()).routed_experts.state_dict()
    given = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        given.append((decisions(), torch.randn(BATCH, LENGTH, D).bfloat16()))
    data, dout = given[rank]
    found = {}
    for name in ("torchtitan", target):
        config = moe_config()
        routed = (config if name == "torchtitan" else overridden(TARGETS[name], config)).routed_experts.build()
        routed.load_state_dict(state)
        for part in [routed.inner_experts] * experts_alone + [routed]:
            fully_shard(part, mp_policy=policy).set_force_sum_reduction_for_comms(True)
        found[name] = results(routed, *data, dout)
    exact = in_float64(
        state, *(torch.cat([one[0][i] for one in given]) for i in range(3)), torch.cat([one[1] for one in given])
    )
    for name, value in exact.items():
        own = name in ("out", "x", "scores")
        exact[name] = value[rank * BATCH : (rank + 1) * BATCH] if own else value / 2  # a mean over ranks
    assert_as_right_as(found[target], found["torchtitan"], exact, f"fully sharded, {target}, rank {rank}")


def check_all_fully_sharded(rank: int) -> None:
    for target in ("routed", "routed, fused", "grouped"):
        for experts_alone in (False, True):
            check_fully_sharded(rank, target, experts_alone)


def test_fully_sharded() -> None:
    """Parameters are freed after forward and gathered again for backward; the experts may be a unit of their own."""
    run_ranks(check_all_fully_sharded, 2, timeout=300)


def check_type_checking(rank: int) -> None:
    on_cpu()
    from torchtitan.distributed.utils import get_spmd_context

    dims = parallel_dims("spmd_types", dp_shard=2)
    ours = pair(TARGETS["grouped"])[1].inner_experts
    with get_spmd_context(parallel_dims=dims, spmd_typechecking=True)():
        ours(torch.randn(4, D), torch.tensor([4, 0, 0, 0, 0, 0]))


def test_checks_of_spmd_types_are_refused() -> None:
    with pytest.raises(RanksFailed, match="debug.spmd_typechecking is True, expected False"):
        run_ranks(check_type_checking, 2, timeout=120)
