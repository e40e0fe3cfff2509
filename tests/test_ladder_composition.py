"""Ladder stacks with what else a training run brings: slow links, compiled and checkpointed cores, FSDP-2, bf16."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from benchmarks.delayed_link import delayed_mesh
from sonic.parallel.fsdp import shard_ladder
from sonic.parallel.stack import LadderStack
from sonic.parallel.wiring import Wiring
from tests.distributed import run_ranks
from tests.ladder_models import WIDTH, blocks, differences, recorded, results, share

pytestmark = pytest.mark.long

LAYERS = 3
NAIVE = "I0 W0 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5"
LATE = "I0 I1 W0 I2 W1 I3 W2 I4 W3 I5 W4 W5"
ORDERS = {"seqnr": LATE, "early": LATE, "blocking": NAIVE}


class Checkpointed(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, n: Tensor) -> Tensor:
        return checkpoint(self.core, n, use_reentrant=False)


def treated(stack: LadderStack, treatment: str) -> LadderStack:
    """The cores compiled, or checkpointed."""
    for block in stack.blocks:
        for name in ("attention", "mlp"):
            core = getattr(block, name)
            if treatment == "checkpointed":
                setattr(block, name, Checkpointed(core))
            elif treatment != "eager":
                core.compile(backend=treatment)
    return stack


def renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".core.", "."): value for name, value in found.items()}


def split(wanted: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: share(name, v, rank, 2) if name.startswith("blocks") else v for name, v in wanted.items()}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, seed = torch.randn(2, 2, 8, WIDTH, dtype=torch.float64, generator=generator)
    return x, seed


def on_two_ranks(rank: int, treatments: tuple[str, ...]) -> dict[str, Any]:
    """Case -> (error against one process, order in forward, order in backward), over a link that takes its time."""
    mesh = delayed_mesh([[0, 1]], latency=0.002)
    x, seed = data()
    found: dict[str, Any] = {}
    for wiring in ("ladder", "standard"):
        wanted = split(results(LadderStack(blocks(LAYERS), wiring), x, seed), rank)
        for treatment in treatments if wiring == "ladder" else treatments[:1]:
            for order in ORDERS if treatment != "aot_eager" else ("seqnr",):
                stack = LadderStack(blocks(LAYERS, rank, 2), wiring, tp_mesh=mesh, backward_order=order)
                treated(stack, treatment)
                with recorded() as log:
                    got = renamed(results(stack, x, seed))
                events = [" ".join(log.events[phase]) for phase in ("forward", "backward")]
                found[f"{wiring} {treatment} {order}"] = (max(differences(got, wanted).values()), *events)
    found["whole"] = compiled_whole(rank, mesh)
    return found


class Model(nn.Module):
    """A stack with something around it."""

    def __init__(self, stack: LadderStack) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.before = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.stack = stack
        self.after = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.stack(self.before(x)))


def compiled_whole(rank: int, mesh: DeviceMesh) -> tuple[float, str, bool]:
    """A whole model through the compiler: its error, its order, and whether it is refused as one graph."""
    x, seed = data()
    wanted = results(Model(LadderStack(blocks(LAYERS, rank, 2), tp_mesh=mesh)), x, seed)
    model = Model(LadderStack(blocks(LAYERS, rank, 2), tp_mesh=mesh))
    compiled = torch.compile(model, backend="aot_eager")
    with recorded() as log:
        y = compiled(x.requires_grad_())
        (y * seed).sum().backward()
    got = {"output": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    torch._dynamo.reset()
    try:
        torch.compile(Model(LadderStack(blocks(1, rank, 2), tp_mesh=mesh)), backend="aot_eager", fullgraph=True)(x)
        is_refused = False
    except Exception as error:
        is_refused = "disable" in str(error)
    return max(differences(got, wanted).values()), " ".join(log.events["backward"]), is_refused


@functools.cache
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, ("eager", "checkpointed", "aot_eager"))


@pytest.mark.parametrize(
    ("treatment", "order"),
    [*((treatment, order) for treatment in ("eager", "checkpointed") for order in ORDERS), ("aot_eager", "seqnr")],
)
def test_order_and_numbers(treatment: str, order: str) -> None:
    """What is in flight holds NaN until the link has carried it: an early read would show in the numbers."""
    for found in two_ranks():
        error, forward, backward = found[f"ladder {treatment} {order}"]
        assert error < 1e-10
        assert (forward, backward) == (LATE, ORDERS[order])


def test_standard_layers_wait_at_once() -> None:
    for found in two_ranks():
        for order in ORDERS:
            error, forward, backward = found[f"standard eager {order}"]
            assert error < 1e-10
            assert (forward, backward) == (NAIVE, NAIVE)


def test_whole_model_through_the_compiler() -> None:
    for found in two_ranks():
        error, backward, is_refused = found["whole"]
        assert error < 1e-10
        assert backward == LATE
        assert is_refused


@pytest.mark.slow
def test_cores_through_inductor() -> None:
    for found in run_ranks(on_two_ranks, 2, ("eager", "inductor"), timeout=600):
        for order in ORDERS:
            error, forward, backward = found[f"ladder inductor {order}"]
            assert error < 1e-10
            assert (forward, backward) == (LATE, ORDERS[order])


# ---------------------------------------------------------------- data-parallel too


def on_four_ranks(rank: int) -> dict[str, Any]:
    """FSDP-2 over two ranks, tensor parallelism over a slow link between two."""
    dp_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["dp"]
    dp_rank, tp_rank = divmod(rank, 2)
    tp_mesh = delayed_mesh([[0, 1], [2, 3]], latency=0.002)
    x, seed = data()
    wiring = Wiring(("standard", "ladder", "ladder"))
    whole = results(LadderStack(blocks(LAYERS), wiring), x, seed)
    wanted = {
        name: value.chunk(2)[dp_rank] if name in ("output", "x") else value
        for name, value in split(whole, tp_rank).items()
    }
    x, seed = x.chunk(2)[dp_rank], seed.chunk(2)[dp_rank]
    found: dict[str, Any] = {}

    def run(
        policy: MixedPrecisionPolicy | None, treatment: str, dtype: torch.dtype, **schedule: Any
    ) -> dict[str, Tensor]:
        stack = LadderStack(blocks(LAYERS, tp_rank, 2, dtype), wiring, tp_mesh=tp_mesh, **schedule)
        shard_ladder(treated(stack, treatment), dp_mesh, mp_policy=policy)
        with recorded() as log:
            got = renamed(results(stack, x.to(dtype), seed.to(dtype)))
        assert log.dtypes == {dtype if policy is None else policy.param_dtype}, "sent in another dtype"
        # averaged by FSDP, over ranks whose losses are summed here
        return {name: value if name in ("output", "x") else 2 * value.full_tensor() for name, value in got.items()}

    for treatment in ("eager", "checkpointed"):
        for order in ORDERS:
            got = run(None, treatment, torch.float64, backward_order=order)
            found[f"float64 {treatment} {order}"] = max(differences(got, wanted).values())
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            off = run(policy, treatment, torch.float32, overlap="off")
            got = run(policy, treatment, torch.float32, backward_order=order)
            found[f"bf16 {treatment} {order}"] = max(differences(got, wanted).values())
            found[f"bf16 {treatment} {order} against off"] = max(differences(got, off).values())
    sp = run(None, "eager", torch.float64, sequence_parallel=True)
    found["float64 sequence parallel"] = max(differences(sp, wanted).values())
    found["inside a wrapped model"] = wrapped_model(dp_mesh, tp_mesh, tp_rank, x, seed)
    return found


def wrapped_model(dp_mesh: DeviceMesh, tp_mesh: DeviceMesh, tp_rank: int, x: Tensor, seed: Tensor) -> float:
    """The stack inside a model that FSDP-2 wraps too, two steps."""
    models = [Model(LadderStack(blocks(LAYERS, tp_rank, 2), tp_mesh=tp_mesh)) for _ in range(2)]
    shard_ladder(models[1].stack, dp_mesh)
    fully_shard(models[1], mesh=dp_mesh)
    for _ in range(2):
        plain, sharded = (results(model, x, seed) for model in models)
        for model in models:
            torch.optim.SGD(model.parameters(), 0.0).zero_grad()
    worst = 0.0
    for name, value in plain.items():
        if name not in ("output", "x"):
            torch.distributed.all_reduce(value, group=dp_mesh.get_group())
            sharded[name] = 2 * sharded[name].full_tensor()
        worst = max(worst, differences({name: sharded[name]}, {name: value})[name])
    return worst


def test_with_fsdp_checkpointing_and_bf16() -> None:
    for found in run_ranks(on_four_ranks, 4):
        for case, error in found.items():
            limit = 0.05 if case.startswith("bf16") and "against" not in case else 1e-6 if "bf16" in case else 1e-10
            assert error < limit, case
