"""``sonic.fsdp.shard``: what several ranks compute, sharded, is what one process computes on all their tokens.

Everything is float64 unless it is about dtypes, and all random numbers have unit scale. The whole model runs on every
rank beside the sharded one, on the tokens of all ranks at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map

import sonic
import sonic.fsdp
from sonic.parallel import LadderBlock, LadderStack, Wiring, clip_grad_norm_, parallelize_moe
from sonic.routing import TokenRounding, TopKRouter, update_expert_bias
from tests.distributed import run_ranks
from tests.helpers import relative_error

pytestmark = pytest.mark.long

D, N, K, LAYERS = 12, 8, 2, 2
TOLERANCE = 1e-9
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Block(nn.Module):
    """A linear layer and an MoE, with their norms."""

    def __init__(self, moe: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D, dtype=dtype) for _ in range(2))
        self.linear = nn.Linear(D, D, dtype=dtype)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.norms[0](x))
        return x + self.moe(self.norms[1](x))


class Model(nn.Module):
    """Blocks between two linear layers."""

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D, dtype=dtype)
        self.blocks = nn.ModuleList(Block(layer, dtype) for layer in layers)
        self.leave = nn.Linear(D, D, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def make_model(
    experts: int = 4,
    *,
    rounding: bool = False,
    expert_bias: bool = False,
    losses: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str | None = None,
    **options: Any,
) -> Model:
    """The same unit-scale numbers in every process; the balance is that of all ranks' tokens."""
    torch.manual_seed(7)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        router: nn.Module = TopKRouter(
            D,
            experts,
            K,
            aux_loss_coeff=0.3 if losses else 0.0,
            z_loss_coeff=0.2 if losses else 0.0,
            aux_loss_group="world" if losses else None,
            enable_expert_bias=expert_bias,
            score_function="sigmoid" if expert_bias else "softmax",
            expert_bias_rate=0.1,
            dtype=dtype,
            device=device,
        )
        if rounding:
            router = TokenRounding(router, tile_rows=4)  # each rank rounds its own
        layers.append(sonic.MoE(D, N, experts, K, router=router, dtype=dtype, device=device, **options))
    model = Model(layers, dtype)
    if device == "meta":
        return model.to("meta")
    torch.manual_seed(8)  # what was drawn before depends on the dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def tokens(num_ranks: int, counts: list[int] | None = None, step: int = 0) -> list[tuple[Tensor, Tensor]]:
    """For each rank tokens, and the gradient of what becomes of them; means over all ranks' tokens."""
    counts = [6] * num_ranks if counts is None else counts
    draw = torch.Generator().manual_seed(100 + step)
    total = sum(counts) / num_ranks
    return [
        (x, dy / total) for count in counts for x, dy in [torch.randn(2, count, D, dtype=torch.float64, generator=draw)]
    ]


def whole(tensor: Any) -> Tensor:
    """A copy of a tensor, or of all of a sharded one."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def compare_training(
    rank: int,
    num_ranks: int,
    sharded: nn.Module,
    reference: nn.Module,
    *,
    counts: list[int] | None = None,
    apart: bool = False,
    micro_batches: int = 1,
    clip: float | None = 0.5,
    optimizer_options: dict[str, Any] | None = None,
    after: Callable[[nn.Module], object] | None = None,
) -> float:
    """Outputs, gradients (after clipping) and weights of three steps; the largest relative error of all.

    ``apart``: the one process takes the ranks' tokens in turn.
    """
    worst = [0.0]

    def check(name: str, got: Tensor, want: Tensor) -> None:
        error = relative_error(got, want) if want.numel() else 0.0
        assert error < TOLERANCE, f"{name} is off by {error:.1e}"
        worst[0] = max(worst[0], error)

    optimizer_options = {"lr": 0.01, **(optimizer_options or {})}
    ours = torch.optim.AdamW(sonic.fsdp.parameter_groups(sharded), **optimizer_options)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for step in range(3):
        for micro in range(micro_batches):
            batch = tokens(num_ranks, counts, 10 * step + micro)
            x, dy = (torch.cat([pair[i] for pair in batch]) for i in range(2))
            x.requires_grad_()
            parts = x.split([len(pair[0]) for pair in batch]) if apart else [x]
            want = torch.cat([reference(part) for part in parts])
            # the sum over all tokens; each rank's is multiplied by the ranks, over which FSDP takes the mean
            want.backward(dy / num_ranks)
            mine, my_dy = batch[rank]
            mine.requires_grad_()
            if isinstance(sharded, FSDPModule):
                sharded.set_requires_gradient_sync(micro == micro_batches - 1)
            got = sharded(mine)
            got.backward(my_dy)
            places = [len(pair[0]) for pair in batch]
            check("output", got, want.detach().split(places)[rank])
            check("dx", mine.grad / num_ranks, x.grad.split(places)[rank])
        grads = {plain(name): parameter.grad for name, parameter in sharded.named_parameters()}
        if clip is not None:
            norm = clip_grad_norm_(sharded.parameters(), clip)
            check("norm", norm, nn.utils.clip_grad_norm_(reference.parameters(), clip))
        for name, parameter in reference.named_parameters():
            check(f"step {step}: d{name}", whole(grads[name]), parameter.grad)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for model in (sharded, reference):
            if after is not None:
                after(model)
        weights = {plain(name): tensor for name, tensor in sharded.state_dict().items()}
        for name, tensor in reference.state_dict().items():
            check(f"step {step}: {name}", whole(weights[name]), tensor)
    return worst[0]


def plain(name: str) -> str:
    """Without what wrappers put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def world_mesh(*sizes: int) -> DeviceMesh:
    """One dimension ``dp``; or two, ``dp`` and ``ep``."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "ep")[: len(sizes)])


# ---------------------------------------------------------------- the numbers of one process


def check_equal(rank: int, num_ranks: int, cases: list[dict[str, Any]]) -> list[tuple[str, float]]:
    found = []
    for case in cases:
        case = dict(case)
        name = str(case)
        mesh = world_mesh(*case.pop("mesh", (num_ranks,)))
        options = {key: case.pop(key) for key in list(case) if key in SHARD_OPTIONS}
        training = {key: case.pop(key) for key in list(case) if key in TRAINING_OPTIONS}
        wrap = case.pop("wrap", None)
        model = make_model(**case)
        reference = make_model(**case)
        if wrap == "checkpoint":
            model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in model.blocks)
        elif wrap == "compile":
            for block in model.blocks:
                block.compile(backend="eager")
        assert sonic.fsdp.shard(model, mesh, **options) is model
        if case.get("expert_bias"):
            training["after"] = update_expert_bias
        try:
            found.append((name, compare_training(rank, num_ranks, model, reference, **training)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        dist.barrier()
    return found


SHARD_OPTIONS = {"offload_policy", "reshard_after_forward", "reshard_last_block", "expert_units", "blocks"}
TRAINING_OPTIONS = {"apart", "counts", "micro_batches", "clip", "optimizer_options"}
ROUNDED = {"rounding": True, "losses": False, "apart": True}
TWO: list[dict[str, Any]] = [
    {"shared_intermediate_size": 8, "bias": True},
    {"experts": 3, "expert_units": True},
    {"experts": 5, "mesh": (1, 2), "shared_intermediate_size": 8, "bias": True},
    {"counts": [9, 0], "wrap": "checkpoint"},
    {"expert_bias": True, "losses": False, "micro_batches": 2, "reshard_last_block": True},
]
FOUR: list[dict[str, Any]] = [
    {"experts": 5, "expert_units": True, "optimizer_options": {"fused": True}},
    {"experts": 3, "mesh": (2, 2), "counts": [6, 0, 9, 1], "optimizer_options": {"foreach": True}},
]
WIDE = {
    2: [
        {"experts": 2, "reshard_after_forward": False},
        {"experts": 5, **ROUNDED},
        {"experts": 3, "mesh": (1, 2), **ROUNDED, "counts": [0, 7]},
        {"experts": 4, "mesh": (2, 1), "wrap": "checkpoint"},
        {"experts": 5, "mesh": (1, 2), "wrap": "checkpoint", "micro_batches": 3},
        {"wrap": "compile", "shared_intermediate_size": 8},
        {"wrap": "compile", "mesh": (1, 2)},
        {"blocks": sonic.MoE},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False), "clip": None},
        {"blocks": (nn.Linear, Block), "optimizer_options": {"foreach": True}},
        {"expert_bias": True, "mesh": (1, 2), "losses": False, "clip": None},
        {"optimizer_options": {"fused": True}, "expert_units": True, "reshard_last_block": True},
    ],
    4: [
        {"experts": 4, "shared_intermediate_size": 8, "bias": True, "optimizer_options": {"foreach": True}},
        {"experts": 3, "expert_units": True, "bias": True},
        {"experts": 5, "mesh": (2, 2), "shared_intermediate_size": 8, "bias": True},
        {"experts": 7, "mesh": (1, 4), **ROUNDED},
        {"experts": 3, "mesh": (4, 1), "micro_batches": 2},
        {"experts": 8, "mesh": (2, 2), "wrap": "checkpoint", "optimizer_options": {"fused": True}},
        {"counts": [5, 0, 0, 3], "expert_bias": True, "losses": False, "micro_batches": 2},
    ],
}


@pytest.mark.parametrize(("num_ranks", "cases"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_training_equals_one_process(num_ranks: int, cases: list[dict[str, Any]]) -> None:
    for found in run_ranks(check_equal, num_ranks, num_ranks, cases):
        print(*found, sep="\n")
        assert len(found) == len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_training_equals_one_process_in_all_ways(num_ranks: int) -> None:
    for found in run_ranks(check_equal, num_ranks, num_ranks, WIDE[num_ranks], timeout=400):
        print(*found, sep="\n")


def check_hybrid_and_existing_spread(rank: int) -> None:
    """Weights sharded over two ranks and replicated over two; experts that were spread before."""
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sonic.fsdp.shard(make_model(5), hybrid, expert_units=True)
    assert [str(one) for one in model.blocks[0].moe.w1.placements] == ["R", "S(0)"]
    compare_training(rank, 4, model, make_model(5), counts=[3, 6, 0, 9])

    world = world_mesh(2, 2)
    model = make_model(5)
    for block in model.blocks:
        parallelize_moe(block.moe, ep_mesh=world["ep"], overlap="off")
    sonic.fsdp.shard(model, world)
    assert all(block.moe.parallel.overlap == "off" for block in model.blocks)
    compare_training(rank, 4, model, make_model(5))


def test_hybrid_sharding_and_experts_that_were_spread_before() -> None:
    run_ranks(check_hybrid_and_existing_spread, 4)


# ---------------------------------------------------------------- units, dtypes, memory


def units(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


class Recorder:
    """What the experts of a layer are given, and what its weights are then."""

    def __init__(self, layer: sonic.MoE) -> None:
        self.seen: dict[str, Any] = {}
        layer.router.register_forward_hook(self._at_router)
        self._layer = layer

    def _at_router(self, router: nn.Module, inputs: tuple[Tensor, ...], routing: Any) -> None:
        self.seen = {
            "tokens": inputs[0].dtype,
            "router": router.weight.dtype,
            "scores": routing.scores.dtype,
            "w1": self._layer.w1.dtype,
            "load": routing.metrics.tokens_per_expert.clone(),
        }


def check_units(rank: int) -> None:
    mesh, spread = world_mesh(2), world_mesh(1, 2)
    shared = {"shared_intermediate_size": 8}
    blocks = ["", "blocks.0", "blocks.1"]
    model = sonic.fsdp.shard(make_model(**shared), mesh)
    assert units(model) == blocks
    assert units(sonic.fsdp.shard(make_model(), mesh, expert_units=True)) == [
        *blocks[:2],
        "blocks.0.moe",
        blocks[2],
        "blocks.1.moe",
    ]
    inside = ["", ".router", ".shared"]
    assert units(sonic.fsdp.shard(make_model(**shared), spread)) == [
        "",
        *(name for i in range(2) for name in (f"blocks.{i}", *(f"blocks.{i}.moe{part}" for part in inside))),
    ]
    half = sonic.fsdp.shard(make_model(dtype=torch.float32, **shared), mesh, mp_policy=HALF)
    assert units(half) == ["", "blocks.0", "blocks.0.moe.router", "blocks.1", "blocks.1.moe.router"]
    assert units(sonic.fsdp.shard(make_model(), mesh, mp_policy=HALF, router_dtype=None)) == blocks
    assert units(sonic.fsdp.shard(make_model(), mesh, blocks=lambda one: isinstance(one, nn.Linear))) == [
        "",
        "enter",
        "blocks.0.linear",
        "blocks.1.linear",
        "leave",
    ]
    alone = sonic.fsdp.shard(nn.Sequential(nn.Linear(D, D), make_model().blocks[0].moe), mesh)
    assert units(alone) == ["", "0", "1"]
    assert units(sonic.fsdp.shard(make_model().blocks[0], mesh)) == ["", "moe"]
    # stacks of fewer experts than ranks are cut along the next dimension, so that every rank has its share
    few = sonic.fsdp.shard(make_one_expert(), mesh)
    assert [str(p) for p in few.blocks[0].moe.w1.placements] == ["S(1)"]

    # the last block stays gathered, the others do not
    model(tokens(2)[rank][0])
    lies = [isinstance(block.moe.w1, torch.distributed.tensor.DTensor) for block in model.blocks]
    assert lies == [True, False]
    freed = sonic.fsdp.shard(make_model(**shared), mesh, reshard_last_block=True)
    freed(tokens(2)[rank][0])
    assert all(isinstance(block.moe.w1, torch.distributed.tensor.DTensor) for block in freed.blocks)


def make_one_expert() -> Model:
    layers: list[nn.Module] = [sonic.MoE(D, N, 1, 1, dtype=torch.float64) for _ in range(LAYERS)]
    return Model(layers, torch.float64)


def check_memory(rank: int) -> None:
    """After forward, what autograd keeps of weights has no memory: the layer keeps parameters and views, no copies."""
    for mesh, policy in ((world_mesh(2), None), (world_mesh(2), HALF), (world_mesh(1, 2), HALF)):
        torch.manual_seed(0)
        options = {"bias": True, "shared_intermediate_size": 64, "dtype": torch.float32}
        layers = [sonic.MoE(64, 64, 8, 2, router=TopKRouter(64, 8, 2, aux_loss_coeff=0.1), **options) for _ in range(2)]
        shapes = {tuple(p.shape) for layer in layers for p in (layer.w1, layer.w2)}
        smallest = min(p.numel() for layer in layers for p in (layer.w1, layer.w2, layer.shared.w1, layer.shared.w2))
        model = sonic.fsdp.shard(
            nn.Sequential(*layers), mesh, mp_policy=policy, reshard_last_block=True, expert_units=True
        )
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = model(torch.randn(5, 64))
        weights = [t for t in kept if tuple(t.shape) in shapes or (mesh.ndim == 2 and t.ndim == 3)]
        assert len(weights) >= 4, "the experts' weights are among what is kept"
        assert all(t.untyped_storage().nbytes() == 0 for t in weights), "a gathered weight is kept alive"
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        assert max(sizes.values()) < 2 * smallest, "something as large as a weight is kept"
        out.float().square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())


def check_dtypes(rank: int) -> list[str]:
    """bf16 weights, float32 sums: dtypes, the loss falls, and every expert that was used has changed on every rank."""
    experts, unused = 6, 5
    told = []
    for mesh in (world_mesh(2), world_mesh(1, 2)):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
        options = {"expert_bias": True, "losses": False, "shared_intermediate_size": 8, "bias": True}
        model = make_model(experts, dtype=torch.float32, **options)
        exact = make_model(experts, **options)
        for one in (model, exact):
            for block in one.blocks:
                block.moe.router.expert_bias[unused] = -1e3  # this expert is never chosen
        sonic.fsdp.shard(model, mesh, mp_policy=policy)
        recorders = [Recorder(block.moe) for block in model.blocks]
        inputs: list[torch.dtype] = []
        model.blocks[1].register_forward_pre_hook(lambda module, args, seen=inputs: seen.append(args[0].dtype))
        before = {name: whole(p) for name, p in model.named_parameters()}
        parts = {name: p.to_local().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(sonic.fsdp.parameter_groups(model, weight_decay=0.0), lr=0.01, fused=True)
        x = torch.randn(64, D, generator=torch.Generator().manual_seed(rank))
        target = torch.tanh(x.roll(1, -1) * x)
        losses = []
        used = torch.zeros(LAYERS, experts)
        for step in range(30):
            y = model(x)
            loss = (y - target).square().mean()
            loss.backward()
            assert y.dtype == torch.float32 and inputs[-1] == torch.bfloat16, "only the root casts its output"
            for layer, recorder in enumerate(recorders):
                used[layer] += recorder.seen.pop("load")
                assert recorder.seen == {
                    "tokens": torch.bfloat16,
                    "router": torch.float32,
                    "scores": torch.float32,
                    "w1": torch.bfloat16,
                }
            for name, parameter in model.named_parameters():
                assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            if step == 0:
                worst = compare_gradients(model, exact, rank)
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss)
            losses.append(loss.item() / 2)
        assert losses[-1] < 0.5 * losses[0], losses
        dist.all_reduce(used)
        assert (used[:, unused] == 0).all() and (used[:, :unused] > 0).all()
        for name, parameter in model.named_parameters():
            after = whole(parameter)
            if name.endswith(("moe.w1", "moe.w2", "moe.b1", "moe.b2")):
                changed = (after != before[name]).flatten(1).any(1).tolist()
                assert changed == [expert != unused for expert in range(experts)], name
                mine = parameter.to_local()
                moved = (mine != parts[name]).flatten(1).any(1).sum().item()
                assert moved == len(mine) - (rank == 1), (name, "on this rank")  # the unused one lies on the last rank
            else:
                assert (parameter.to_local() != parts[name]).any(), name
        told.append(f"{mesh}: loss {losses[0]:.3f} to {losses[-1]:.3f}, bf16 gradients off by {worst:.1e} at most")
    return told


def compare_gradients(model: nn.Module, exact: nn.Module, rank: int) -> float:
    """bf16 products, float32 sums: near the gradients in float64 of all ranks' tokens."""
    xs = [torch.randn(64, D, generator=torch.Generator().manual_seed(other)) for other in range(2)]
    x = torch.cat(xs).double()
    (exact(x) - torch.tanh(x.roll(1, -1) * x)).square().mean().backward()
    errors = []
    for name, parameter in exact.named_parameters():
        error = relative_error(whole(dict(model.named_parameters())[name].grad).double(), parameter.grad)
        assert error < 0.1, f"d{name} is off by {error:.1e}"
        errors.append(error)
    return max(errors)


def check_units_memory_and_dtypes(rank: int) -> list[str]:
    check_units(rank)
    check_memory(rank)
    return check_dtypes(rank)


def test_units_memory_and_dtypes() -> None:
    print(*run_ranks(check_units_memory_and_dtypes, 2)[0], sep="\n")


# ---------------------------------------------------------------- a start without memory


def check_start(rank: int, num_ranks: int) -> None:
    """Sharded over any ranks, a model starts from the numbers of one process."""

    def fill(matrix: Tensor) -> None:
        nn.init.trunc_normal_(matrix, std=0.3)

    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((num_ranks,), {"experts": 3, "shared_intermediate_size": 8, "bias": True}),
        ((1, num_ranks), {"experts": 7, "init": "normal", "init_std": 0.1}),
        ((num_ranks, 1), {"experts": 5, "init": fill, "rounding": True, "expert_bias": True, "losses": False}),
        *([((2, 2), {"experts": 5, "bias": True})] if num_ranks == 4 else []),
    ]
    for sizes, options in cases:
        reference = sonic.fsdp.initialize(make_model(**options), seed=3)
        before = torch.random.get_rng_state()
        model = make_model(device="meta", **options)
        torch.random.set_rng_state(before)
        for block in model.blocks:
            block.moe.init = reference.blocks[0].moe.init
        sonic.fsdp.shard(model, world_mesh(*sizes), expert_units=True)
        assert sonic.fsdp.initialize(model, seed=3) is model
        assert torch.equal(torch.random.get_rng_state(), before), "torch's generators stay as they are"
        wanted = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
        assert model.state_dict().keys() == wanted.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(whole(tensor), wanted[name]), (sizes, name)
        first, second = (block.moe for block in reference.blocks)
        assert not torch.equal(first.w1, second.w1) and not torch.equal(first.w1[0], first.w1[1])
        scale = {"linear": D**-0.5 / 3**0.5, "normal": 0.1}.get(str(options.get("init", "linear")), 0.3)
        assert 0.8 * scale < first.w1.std() < 1.2 * scale
        compare_training(rank, num_ranks, model, reference, apart="rounding" in options)
        sonic.fsdp.initialize(model, seed=3)  # again, after a forward that leaves the root gathered
        assert all(torch.equal(whole(tensor), wanted[name]) for name, tensor in model.state_dict().items())
        other = sonic.fsdp.initialize(make_model(**options), seed=4)
        assert not torch.equal(other.blocks[0].moe.w1, make_model(**options).blocks[0].moe.w1)
        assert not torch.equal(other.enter.weight, sonic.fsdp.initialize(make_model(**options), seed=3).enter.weight)


def test_start_equals_one_process() -> None:
    run_ranks(check_start, 2, 2)


@pytest.mark.slow
def test_start_equals_one_process_on_four_ranks() -> None:
    run_ranks(check_start, 4, 4)


class Scaled(nn.Module):
    """With a parameter and a buffer that nobody draws, and a weight that is another module's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("frequency", torch.ones(2))


def test_start_asks_for_what_nobody_draws() -> None:
    with torch.device("meta"):
        model = Scaled()
    with pytest.raises(ValueError, match=r"sonic.fsdp.initialize: scale is not set, expected Scaled.reset_parameters"):
        sonic.fsdp.initialize(copy.deepcopy(model), seed=0, device="cpu")

    def init(module: nn.Module) -> None:
        if isinstance(module, Scaled):
            nn.init.constant_(module.scale, 2.0)
            module.frequency.fill_(3.0)

    sonic.fsdp.initialize(model, seed=0, init=init, device="cpu")
    assert (model.scale == 2).all() and (model.frequency == 3).all()
    assert model.head.weight is model.embedding.weight and model.head.weight.std() > 0.5
    again = sonic.fsdp.initialize(Scaled(), seed=0, init=init)
    assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"initialize: frequency is not set"):
        sonic.fsdp.initialize(
            Scaled().to("meta"), seed=0, init=lambda m: hasattr(m, "scale") and nn.init.ones_(m.scale), device="cpu"
        )


# ---------------------------------------------------------------- beside others


def make_stack() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [
        LadderBlock(
            nn.RMSNorm(D, dtype=torch.float64),
            nn.Linear(D, D, dtype=torch.float64),
            nn.RMSNorm(D, dtype=torch.float64),
            sonic.MoE(D, N, 5, K, dtype=torch.float64, backend="reference"),
        )
        for _ in range(2)
    ]
    return nn.Sequential(nn.Linear(D, D, dtype=torch.float64), LadderStack(layers, Wiring.build(2, "ladder")))


def check_ladder_and_bad_input(rank: int) -> None:
    mesh = world_mesh(2)
    model = sonic.fsdp.shard(make_stack(), mesh)
    assert isinstance(model[1].blocks[0].mlp, FSDPModule) and not isinstance(model[1].blocks[0], FSDPModule)
    compare_training(rank, 2, model, make_stack())

    shard, spread = sonic.fsdp.shard, world_mesh(1, 2)
    three = init_device_mesh("cpu", (1, 1, 2))
    outer = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "dp"))
    lonely = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    sharded, part = shard(make_model(), mesh), make_model()
    fully_shard(part.blocks[1], mesh=mesh)
    elsewhere = make_model()
    for block in elsewhere.blocks:
        parallelize_moe(block.moe, ep_mesh=spread["ep"])
    split = make_model()
    parallelize_moe(split.blocks[1].moe, tp_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    with pytest.raises(
        ValueError,
        match="blocks.0.moe.num_experts is 1, expected a number that leaves none of the 2 'ep' ranks without",
    ):
        shard(make_one_expert(), spread)
    for message, arguments, options in (
        (r"model is a str, expected a torch.nn.Module", ("x", mesh), {}),
        (r"mesh is a int, expected a DeviceMesh: one of 1 dimension", (make_model(), 2), {}),
        (r"mesh is of 3 dimensions without names, expected one of 1", (make_model(), three), {}),
        (r"mesh is of 2 dimensions \('ep', 'dp'\), expected .* the last is named 'ep'", (make_model(), outer), {}),
        (r"mesh is of 1 dimensions \('ep',\), expected a dimension to shard .* \(1, 2\)", (make_model(), lonely), {}),
        (r"model is sharded already \(the model itself\)", (sharded, mesh), {}),
        (r"model is sharded already \(blocks.1\)", (part, mesh), {}),
        (r"model is a Linear without a sonic.MoE in it, expected .* or blocks=", (nn.Linear(2, 2), mesh), {}),
        (r"mesh is one with a dimension 'ep' for a model without", (nn.Linear(2, 2), spread), {}),
        (r"mesh is one with a dimension 'ep' for a model with a LadderStack", (make_stack(), spread), {}),
        (r"blocks.0.moe is with its experts spread over 2 ranks, expected a mesh", (elsewhere, mesh), {}),
        (r"blocks.1.moe is spread over 1 ranks that are not mesh\['ep'\]", (split, spread), {}),
        (
            r"mp_policy is a dtype, expected a .*MixedPrecisionPolicy",
            (make_model(), mesh),
            {"mp_policy": torch.float16},
        ),
        (
            r"mp_policy.output_dtype is torch.float32, expected None for a LadderStack",
            (make_stack()[1], mesh),
            {"mp_policy": MixedPrecisionPolicy(output_dtype=torch.float32)},
        ),
        (r"blocks is .*Conv1d.*, which fits nothing inside a Model", (make_model(), mesh), {"blocks": nn.Conv1d}),
        (r"blocks is 'Block', expected a class of modules", (make_model(), mesh), {"blocks": "Block"}),
    ):
        with pytest.raises(ValueError, match=r"^sonic.fsdp.shard: " + message):
            shard(*arguments, **options)
    dense = shard(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), mesh, blocks=nn.Linear)  # told what is a unit: fine
    assert units(dense) == ["", "0"]


def test_ladder_stacks_and_bad_input() -> None:
    run_ranks(check_ladder_and_bad_input, 2)


def check_transformers(rank: int) -> None:
    import transformers

    from benchmarks.huggingface_models import batch, build_model

    transformers.logging.set_verbosity_error()
    model, reference = build_model("qwen3_moe"), build_model("qwen3_moe")
    reference.load_state_dict(model.state_dict())
    state = tree_map(torch.clone, dict(model.state_dict()))
    for tensor in state.values():
        dist.broadcast(tensor, 0)
    for one in (model, reference):
        one.load_state_dict(state)
        sonic.huggingface.replace_moe(one, TokenRounding)
    sonic.fsdp.shard(model, world_mesh(2))
    assert units(model) == ["", *(f"model.layers.{i}" for i in range(len(model.model.layers)))]
    ids = batch()
    for one in (model, reference):
        one.train()(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in reference.named_parameters():
        error = relative_error(whole(dict(model.named_parameters())[name].grad), parameter.grad)
        assert error < 1e-5, f"d{name} is off by {error:.1e}"


def test_model_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    run_ranks(check_transformers, 2, timeout=300)
