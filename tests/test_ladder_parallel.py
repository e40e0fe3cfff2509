"""Ladder stacks over tensor-parallel ranks: the numbers of one process, in an order that overlaps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import sonic
from sonic.parallel.expert_parallel import parallelize_moe
from sonic.parallel.stack import LadderBlock, LadderStack
from sonic.parallel.wiring import WIRINGS, Wiring
from tests.distributed import run_ranks
from tests.ladder_models import HIDDEN, WIDTH, blocks, differences, recorded, results, share

pytestmark = pytest.mark.long

LAYERS = 3
SCHEDULES = [
    {"overlap": "off"},
    {"overlap": "forward"},
    {"backward_order": "seqnr"},
    {"backward_order": "early"},
    {"backward_order": "blocking"},
]
DENSE: list[Any] = [
    "standard",
    "parallel",
    "ladder",
    ("standard", "ladder", "parallel"),
    ("ladder", "standard", "ladder"),
]


def compare(rank: int, num_ranks: int) -> list[tuple[str, float, dict[str, str]]]:
    """Every wiring under every schedule against one process."""
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("tp",))["tp"]
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    seed = torch.randn_like(x)
    found = []
    for wiring in DENSE if num_ranks == 2 else DENSE[2:4]:
        wiring = Wiring((wiring,) * LAYERS if isinstance(wiring, str) else wiring)
        wanted = results(LadderStack(blocks(LAYERS), wiring), x, seed)
        wanted = {
            name: share(name, value, rank, num_ranks) if name.startswith("blocks") else value
            for name, value in wanted.items()
        }
        for schedule in SCHEDULES if num_ranks == 2 else SCHEDULES[2:4]:
            for sequence_parallel in (False, True):
                stack = LadderStack(
                    blocks(LAYERS, rank, num_ranks),
                    wiring,
                    tp_mesh=mesh,
                    sequence_parallel=sequence_parallel,
                    **schedule,
                )
                with recorded() as log:
                    got = results(stack, x, seed)
                worst = max(differences(got, wanted).values())
                events = {phase: " ".join(order) for phase, order in log.events.items()}
                found.append((f"{wiring.layers} {schedule} sp={sequence_parallel}", worst, events))
    return found


@functools.cache
def compared(num_ranks: int) -> list[Any]:
    return run_ranks(compare, num_ranks, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_stack_equals_one_process(num_ranks: int) -> None:
    for found in compared(num_ranks):
        assert len(found) == (2 * len(DENSE) * len(SCHEDULES) if num_ranks == 2 else 8)
        faults = [(case, worst) for case, worst, _ in found if not worst < 1e-10]
        assert not faults


# ---------------------------------------------------------------- Mixture-of-Experts layers

MOE: list[Any] = [*WIRINGS, ("standard", "farskip", "shortcut"), ("parallel", "ladder", "farskip")]


def moe_blocks(part: int = 0, parts: int = 1) -> list[LadderBlock]:
    """Layers with 4 experts, attention split, MLPs whole."""
    layers = blocks(LAYERS, part, parts)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for layer in layers:
            router = sonic.routing.TopKRouter(WIDTH, 4, 2, backend="reference", dtype=torch.float64)
            router = sonic.routing.TokenRounding(router, tile_rows=4)
            layer.mlp = sonic.MoE(
                WIDTH,
                HIDDEN,
                4,
                2,
                bias=True,
                router=router,
                shared_intermediate_size=HIDDEN,
                dtype=torch.float64,
                backend="reference",
            )
    return layers


def compare_moe(rank: int, axis: str, ep: int, tp: int) -> list[tuple[str, float]]:
    """Every wiring with experts over ``ep`` ranks, each over ``tp``; ranks along ep have a part of the batch each.

    With ``axis="dp"`` for "ep" they have that alone: every rank along it has all experts.
    """
    mesh = init_device_mesh("cpu", (ep, tp), mesh_dim_names=(axis, "tp"))
    ep_mesh, tp_mesh = (mesh[axis] if ep > 1 else None), (mesh["tp"] if tp > 1 else None)
    ep_rank, tp_rank = divmod(rank, tp)
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    seed = torch.randn_like(x)
    found = []
    for wiring in MOE:
        wiring = Wiring((wiring,) * LAYERS if isinstance(wiring, str) else wiring)
        whole = LadderStack(moe_blocks(), wiring)
        rounded = joined([results(whole, *part) for part in zip(x.chunk(ep), seed.chunk(ep), strict=True)])
        whole.eval()
        wanted = results(whole, x, seed)
        assert not torch.equal(rounded["output"], wanted["output"]), "rounding has moved nothing"
        for tp_reduce in ("none", "sum", "reduce_scatter") if tp > 1 else ("sum",):
            for overlap in ("off", "full") if ep * tp == 2 else ("full",):
                layers = moe_blocks(tp_rank, tp)
                for layer in layers:
                    parallelize_moe(
                        layer.mlp,
                        ep_mesh=ep_mesh if axis == "ep" else None,
                        tp_mesh=tp_mesh,
                        tp_reduce=tp_reduce,
                        expert_gradient_scale=1.0,
                        overlap=overlap,
                    )
                stack = LadderStack(
                    layers, wiring, tp_mesh=tp_mesh, overlap=overlap, sequence_parallel=tp_reduce == "reduce_scatter"
                )
                for expected, training in ((rounded, True), (wanted, False)):
                    stack.train(training)  # tokens are rounded in training, by each rank among its own
                    got = results(stack, x.chunk(ep)[ep_rank], seed.chunk(ep)[ep_rank])
                    parts = {n: expected_part(n, value, ep, ep_rank, tp, tp_rank) for n, value in expected.items()}
                    errors = differences(
                        {n: whole_gradient(n, value, axis, ep_mesh) for n, value in got.items()}, parts
                    )
                    worst = max(errors, key=errors.__getitem__)
                    found.append((f"{wiring.layers} {tp_reduce} {overlap} {training}: {worst}", errors[worst]))
    return found


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of one process on the ranks' tokens in turn: outputs side by side, gradients of parameters summed."""
    return {
        name: torch.cat([part[name] for part in parts])
        if name in ("output", "x")
        else sum(part[name] for part in parts)
        for name in parts[0]
    }


def whole_gradient(name: str, value: Tensor, axis: str, ep_mesh: Any) -> Tensor:
    """A gradient summed over the ranks that have other tokens; an expert that is on one rank has seen them all."""
    if isinstance(value, torch.distributed.tensor.DTensor):
        value = value.full_tensor()
        if is_expert(name) and axis == "ep":
            return value
    if ep_mesh is not None and name not in ("output", "x"):
        dist.all_reduce(value, group=ep_mesh.get_group())
    return value


def is_expert(name: str) -> bool:
    return any(name.endswith(f"mlp.{weight}") for weight in ("w1", "w2", "b1", "b2"))


def expected_part(name: str, value: Tensor, ep: int, ep_rank: int, tp: int, tp_rank: int) -> Tensor:
    if name in ("output", "x"):
        return value.chunk(ep)[ep_rank]
    return share(name, value, tp_rank, tp) if ".attention." in name else value


@pytest.mark.parametrize(
    ("axis", "ep", "tp"),
    [
        ("ep", 2, 1),
        ("ep", 1, 2),
        pytest.param("ep", 2, 2, marks=pytest.mark.long),
        pytest.param("dp", 2, 2, marks=pytest.mark.long),
    ],
)
def test_moe_stack_equals_one_process(axis: str, ep: int, tp: int) -> None:
    for found in run_ranks(compare_moe, ep * tp, axis, ep, tp):
        assert not [(case, worst) for case, worst in found if not worst < 1e-10]
