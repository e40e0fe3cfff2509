"""Megatron-core's parallelism with the experts of this library, on gloo: losses and checkpoints are Megatron's own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonic.megatron
from examples.lm.megatron_on_cpu import on_cpu_devices
from sonic.parallel.in_flight import logging_to
from tests.distributed import run_ranks
from tests.helpers import relative_error
from tests.megatron_world import (
    Trainer,
    World,
    compare_runs,
    cpu_world,
    largest_difference,
    loss_of,
    make_block,
    make_model,
    train,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed",
)

BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

# What is shared how, the options of the training, and those of sonic.megatron.enable.
RUNS: dict[str, tuple[World, dict[str, Any], dict[str, Any]]] = {
    "tensor and sequence": (World(tp=2, etp=2), {}, {}),
    "expert": (World(ep=2), {}, {}),
    "pipeline": (World(pp=2), {}, {}),
    "data, tokens stay": (World(), {"overlap": True}, {"fused_layer": True}),
    "expert, distributed optimizer, expert bias": (
        World(ep=2, config=BIASED),
        {"distributed": True, "overlap": True},
        {"save": "input"},
    ),
    "data, distributed optimizer, shared expert": (
        World(config={"moe_shared_expert_intermediate_size": 16, "moe_token_dispatcher_type": "allgather"}),
        {"distributed": True},
        {},
    ),
    "tensor, split experts, gathered": (World(tp=2, etp=2, config={"moe_token_dispatcher_type": "allgather"}), {}, {}),
    "tensor and expert": (World(tp=2, ep=2), {}, {}),
    "tensor, expert and expert tensor": (  # gloo gathers no parts of different sizes, as all-to-all would have it
        World(tp=2, etp=2, ep=2, config={"moe_token_dispatcher_type": "allgather"}),
        {"distributed": True},
        {},
    ),
    "pipeline and expert": (World(pp=2, ep=2, config=BIASED), {"distributed": True}, {}),
}
FAST = ("expert", "tensor and sequence")
TWO = tuple(name for name in RUNS if RUNS[name][0].tp * RUNS[name][0].pp * max(1, RUNS[name][0].ep) <= 2)
FOUR = tuple(name for name in RUNS if name not in TWO)


def train_both(rank: int, names: tuple[str, ...], steps: int) -> dict[str, tuple[float, float, float]]:
    """Largest difference of the losses of each run, and Megatron's first and last one."""
    found = {}
    with cpu_world():
        for name in names:
            world, options, enable = RUNS[name]
            difference, theirs, _ = compare_runs(world, steps, partial(sonic.megatron.enable, **enable), **options)
            found[name] = (difference, theirs[0], theirs[-1])
    return found


@pytest.mark.parametrize(
    ("names", "steps", "num_ranks"),
    [
        pytest.param(FAST, 3, 2, id="fast"),
        pytest.param(TWO, 20, 2, id="two", marks=pytest.mark.slow),
        pytest.param(FOUR, 20, 4, id="four", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_megatrons_experts(names: tuple[str, ...], steps: int, num_ranks: int) -> None:
    for found in run_ranks(train_both, num_ranks, names, steps, timeout=500):
        for name, (difference, first, last) in found.items():
            print(f"{name}: {steps} steps, {first:.4f} to {last:.4f}, largest difference {difference:.1e}")
            assert difference <= 1e-5, f"{name}: off by {difference:.1e}"
            assert last < first or steps < 10, f"{name}: it learns"


def train_whole_and_split(rank: int, steps: int) -> tuple[float, float]:
    """Experts that each rank has whole, beside split matrices, against experts that are split too."""
    losses, drift = [], 0.0
    with cpu_world():
        for world, options in (
            (World(tp=2, etp=2), {}),
            (World(tp=2), {}),
            (World(tp=2), {"fused_layer": True}),
        ):
            sonic.megatron.enable(**options)
            world.start()
            config = world.make_config()
            model = make_model(config)
            losses.append(train(config, model, steps, distributed=bool(options)))
            if world.etp == 1:
                weight = model.decoder.layers[1].mlp.experts.weight1.detach()
                other = weight.clone()
                torch.distributed.broadcast(other, 0)
                drift = max(drift, (weight - other).abs().max().item())
    return max(largest_difference(found, losses[0]) for found in losses[1:]), drift


@pytest.mark.parametrize("steps", [pytest.param(20, marks=pytest.mark.slow), 3])
def test_whole_experts_beside_split_matrices_stay_copies_of_each_other(steps: int) -> None:
    for difference, drift in run_ranks(train_whole_and_split, 2, steps, timeout=300):
        print(f"{steps} steps, largest difference {difference:.1e}, drift {drift:.1e}")
        assert difference <= 1e-5 and drift == 0


# ---------------------------------------------------------------- checkpoints


def build(world: World, seed: int, ours: bool) -> nn.Module:
    sonic.megatron.disable()
    if ours:
        sonic.megatron.enable()
    world.start(seed)
    model = make_model(world.make_config())
    sonic.megatron.disable()
    return model


def scramble(model: nn.Module) -> nn.Module:
    """Give the ranks different experts: on a CPU Megatron draws the same ones on all of them."""
    generator = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_same_experts(found: Any, wanted: Any) -> None:
    """Of two models, ours or Megatron's, to the last bit."""
    for mine, theirs in zip(found.decoder.layers, wanted.decoder.layers, strict=True):
        weights = []
        for experts in (mine.mlp.experts, theirs.mlp.experts):
            if hasattr(experts, "local_experts"):
                parts = [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in experts.local_experts]
                weights.append([torch.stack(part) for part in zip(*parts, strict=True)])
            else:
                weights.append([experts.weight1, experts.weight2])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def save(model: nn.Module, folder: str, **metadata: Any) -> None:
    from megatron.core import dist_checkpointing

    # its writer has a process of its own, which a process that ends with its parent may not have
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    with contextlib.redirect_stdout(io.StringIO()):
        dist_checkpointing.save(model.sharded_state_dict(metadata=dict(metadata)), folder)


def load(model: nn.Module, folder: str, **metadata: Any) -> nn.Module:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(model.sharded_state_dict(metadata=dict(metadata)), folder)
    model.load_state_dict(loaded, strict=True)
    return model


def exchange(rank: int, folder: str, fields: dict[str, Any], singleton: bool) -> dict[str, float]:
    """Megatron's experts save on two expert-parallel ranks; ours read it, and back, on one and on two."""
    metadata = {"singleton_local_shards": True} if singleton else {}
    found = {}
    with cpu_world(), torch.no_grad():
        split, whole = World(ep=2, config=fields), World(config=fields)
        stock = scramble(build(split, 1, ours=False))
        wanted = loss_of(stock)
        save(stock, f"{folder}/stock", **metadata)
        mine = load(build(split, 2, ours=True), f"{folder}/stock", **metadata)
        found["ours on two"] = (loss_of(mine) - wanted).abs().item()
        if "moe_layer_freq" not in fields:
            assert_same_experts(mine, stock)
        save(mine, f"{folder}/ours", **metadata)
        back = load(build(split, 3, ours=False), f"{folder}/ours", **metadata)
        found["back on two"] = (loss_of(back) - wanted).abs().item()
        for mine_too, theirs in zip(back.parameters(), stock.parameters(), strict=True):
            assert torch.equal(mine_too, theirs)
        mine = load(build(whole, 4, ours=True), f"{folder}/stock", **metadata)
        found["ours on one"] = (loss_of(mine) - wanted).abs().item()
        save(mine, f"{folder}/whole", **metadata)
        found["back on one"] = (
            (loss_of(load(build(whole, 5, ours=False), f"{folder}/ours", **metadata)) - wanted).abs().item()
        )
        back = load(build(split, 6, ours=False), f"{folder}/whole", **metadata)
        found["one to two"] = (loss_of(back) - wanted).abs().item()
    return found


EXCHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "a key per expert": ({}, True),
    "without a gate": ({"gated_linear_unit": False}, False),
    "with every second layer dense": ({"moe_layer_freq": [1, 0]}, False),
}


@pytest.mark.parametrize(
    "case", ["plain", *(pytest.param(case, marks=pytest.mark.slow) for case in list(EXCHANGES)[1:])]
)
def test_checkpoints_go_both_ways(case: str, tmp_path: Path) -> None:
    for found in run_ranks(exchange, 2, str(tmp_path), *EXCHANGES[case], timeout=300):
        print(f"{case}: {found}")
        assert not any(found.values()), f"{case}: {found}"


def exchange_split(rank: int, folder: str) -> dict[str, float]:
    """From experts split over two ranks to experts on two ranks, ours and Megatron's, weights and biases."""
    found = {}
    with cpu_world(), torch.no_grad():
        split, spread = World(tp=2, etp=2), World(ep=2)
        mine = scramble(build(split, 1, ours=True))
        wanted = loss_of(mine.eval())
        save(mine, f"{folder}/split")
        for ours in (False, True):
            loaded = load(build(split, 2, ours=ours), f"{folder}/split")
            found[f"to {'ours' if ours else 'stock'}"] = (loss_of(loaded.eval()) - wanted).abs().item()
            assert_same_experts(loaded, mine)
        spread_model = load(build(spread, 3, ours=True), f"{folder}/split")
        save(spread_model, f"{folder}/spread")
        found["there and back"] = (
            (loss_of(load(build(split, 4, ours=True), f"{folder}/spread").eval()) - wanted).abs().item()
        )
    return found


@pytest.mark.slow
def test_checkpoints_are_split_anew(tmp_path: Path) -> None:
    for found in run_ranks(exchange_split, 2, str(tmp_path), timeout=300):
        print(found)
        assert not any(found.values()), found


def go_on(rank: int, folder: str) -> list[float]:
    """Train, save weights and Adam's moments, load them with the other experts, and take one more step each."""
    from megatron.core import dist_checkpointing

    found = []
    with cpu_world():
        for ours in (False, True):
            trainers = []
            for seed, kind in ((1, ours), (2, not ours)):
                with torch.no_grad():
                    model = scramble(build(World(ep=2), seed, kind))
                trainers.append(Trainer(World(ep=2).make_config(), model))
            before, after = trainers
            for step in range(2):
                before.step(step)
            path = Path(folder, str(ours))
            if rank == 0:
                path.mkdir()
            torch.distributed.barrier()
            multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
            with on_cpu_devices(), contextlib.redirect_stdout(io.StringIO()):
                states = []
                for trainer, is_loading in ((before, False), (after, True)):
                    model_state = trainer.ddp.module.sharded_state_dict()
                    moments = trainer.optimizer.sharded_state_dict(model_state, is_loading=is_loading)
                    states.append({"model": model_state, "optimizer": moments})
                dist_checkpointing.save(states[0], str(path))
                loaded = dist_checkpointing.load(states[1], str(path))
                after.ddp.module.load_state_dict(loaded["model"])
                after.optimizer.load_state_dict(loaded["optimizer"])
            for step in (2, 3):  # the second of them sees what the first one did with the moments
                found.append(abs(after.step(step) - before.step(step)))
    return found


@pytest.mark.slow
def test_optimizer_states_go_both_ways(tmp_path: Path) -> None:
    for found in run_ranks(go_on, 2, str(tmp_path), timeout=300):
        print(found)
        assert max(found) < 2e-6, found


# ---------------------------------------------------------------- weight gradients under data parallelism


def reduced_gradients(world: World, **experts: bool) -> dict[str, Tensor]:
    """Main gradients after two micro-batches and their reduction; none is left in ``.grad``."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

    model = build(world, 0, ours=True)
    config = world.make_config()
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        # Set here, since the config's fields would also ask Megatron's linear layers for kernels of a GPU.
        layer.experts.gradients.into_main_grad = experts.get("into_main_grad", False)
        layer.experts.gradients.delayed = experts.get("delayed", False)
        for parameter in layer.experts.parameters():
            parameter.skip_backward_post_hook = experts.get("delayed", False)
    with on_cpu_devices():
        ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=True, delay_wgrad_compute=experts.get("delayed", False)
            ),
            model,
        )
        ddp.zero_grad_buffer()
        for step in range(2):
            with contextlib.nullcontext() if step else ddp.no_sync():
                loss_of(ddp, step).backward()
                for layer in layers:
                    if experts.get("delayed"):
                        assert layer.experts.weight1.main_grad.abs().sum() == 0 or step, "nothing is added yet"
                    layer.backward_dw()
        ddp.finish_grad_sync()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        found[name] = parameter.main_grad.clone()
    return found


def compare_gradients(rank: int) -> float:
    """Largest relative difference of main gradients: added by Megatron, by the experts, and by the experts later."""
    largest = 0.0
    with cpu_world():
        for world in (World(), World(ep=2)):
            wanted = reduced_gradients(world)
            assert any("experts.weight1" in name for name in wanted)
            for experts in ({"into_main_grad": True}, {"delayed": True}, {"into_main_grad": True, "delayed": True}):
                for name, gradient in reduced_gradients(world, **experts).items():
                    assert wanted[name].any(), name
                    largest = max(largest, relative_error(gradient, wanted[name]))
    return largest


def test_main_gradients_are_filled_by_the_experts_and_later() -> None:
    for largest in run_ranks(compare_gradients, 2, timeout=300):
        print(f"largest relative difference {largest:.1e}")
        assert largest < 2e-6


# ---------------------------------------------------------------- Ladder Residual


class Events:
    """What happened in a forward pass, in order: collectives, as their log hears of them, and cores that began."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watch(self, model: Any) -> None:
        """Note when a core of a layer begins."""
        for number, layer in enumerate(model.decoder.layers):
            for name, core in (("attention", layer.self_attention), ("mlp", layer.mlp)):
                core.register_forward_pre_hook(lambda *_, what=f"{name} {number}": self.seen.append(what))

    def issued(self, kind: str, phase: str, started: Any) -> str:
        """As :class:`sonic.parallel.in_flight.Log` wants it."""
        self.seen.append(f"{phase}: issued {kind}")
        return f"{phase}: waited {kind}"

    def waiting(self, entry: str) -> None:
        """The wait is noted when it is over."""

    def waited(self, entry: str, aside: bool = False) -> None:
        """The wait is over."""
        self.seen.append(entry)


def ladder_loss(world: World, fields: dict[str, Any], events: Events) -> tuple[Tensor, dict[str, Tensor], Any]:
    world.start(0)
    config = world.make_config(**fields)
    block = make_block(config)
    sonic.megatron.use_ladder(block)
    if 1 in fields["moe_layer_freq"]:
        sonic.megatron.swap(block)
    model = make_model(config, block)
    events.watch(model)
    with logging_to(events):
        loss = loss_of(model)
    loss.backward()
    parts = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if "linear_proj.weight" in name or "linear_qkv.weight" in name or "mlp.linear_fc2.weight" in name
    }
    return loss.detach(), parts, model


def compare_ladders(rank: int) -> dict[str, float]:
    """A ladder on two tensor-parallel ranks, with and without sequence parallelism, against one rank alone."""
    found = {}
    cases = {
        "sequence": {"num_layers": 3, "moe_layer_freq": [0, 1, 0], "moe_aux_loss_coeff": 0.0},
        # Megatron trains MoE layers on several tensor-parallel ranks with sequence parallelism alone
        "whole": {"num_layers": 3, "moe_layer_freq": [0, 0, 0], "sequence_parallel": False},
    }
    with cpu_world():
        for name, fields in cases.items():
            wanted, parts, alone = ladder_loss(World(), fields, Events())
            torch.distributed.broadcast(wanted, 0)  # each rank alone has data of its own: the first one's counts
            for part in parts.values():
                torch.distributed.broadcast(part, 0)
            assert not any(layer.hides_attention or layer.hides_mlp for layer in alone.decoder.layers)
            events = Events()
            loss, mine, model = ladder_loss(World(tp=2), fields, events)
            found[f"{name}: loss"] = (loss - wanted).abs().item()
            for key, gradient in mine.items():
                whole = parts[key].chunk(2, 0 if "qkv" in key else 1)[rank]
                found[f"{name}: {key}"] = relative_error(gradient, whole)
            layers = model.decoder.layers
            assert [layer.hides_attention for layer in layers] == [True] * 3
            assert [layer.hides_mlp for layer in layers] == [not is_moe for is_moe in fields["moe_layer_freq"]]
            forward = [event for event in events.seen if not event.startswith("backward")]
            start = forward.index("attention 1")
            order = [forward.index(event, start) for event in ("forward: issued attention", "mlp 1", "attention 2")]
            late = forward.index("forward: waited attention", order[0])
            assert order[0] < order[1] < late < order[2], f"awaited after the MLP, before attention 2: {forward}"
    return found


def test_a_ladder_on_two_ranks_is_that_of_one() -> None:
    for found in run_ranks(compare_ladders, 2, timeout=300):
        print(found)
        assert max(found.values()) < 5e-6, found
