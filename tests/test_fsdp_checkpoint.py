"""Checkpoints of ``sonic.fsdp``: on any number of ranks exact, whole or not at all, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import sonic
import sonic.fsdp
from sonic.parallel import parallelize_moe
from tests.distributed import run_ranks
from tests.helpers import relative_error
from tests.test_fsdp import make_model, tokens, whole, world_mesh

pytestmark = pytest.mark.long

OPTIONS: dict[str, Any] = {"experts": 5, "shared_intermediate_size": 8, "bias": True, "expert_bias": True}


def build(mesh: tuple[int, ...] | None, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose weights are not those of any checkpoint, and its optimizer; sharded unless ``mesh`` is None."""
    model: nn.Module = make_model(**{**OPTIONS, "losses": False, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(()))
    if mesh is not None:
        model = sonic.fsdp.shard(model, world_mesh(*mesh), expert_units=True)
    return model, torch.optim.AdamW(sonic.fsdp.parameter_groups(model, weight_decay=0.05), lr=0.01, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, num_ranks: int, number: int) -> None:
    """One step on the same tokens for any number of ranks."""
    parts = tokens(4, [3] * 4, number)[rank :: max(num_ranks, 1)]
    x, dy = (torch.cat([part[i] for part in parts]) for i in range(2))
    model(x).backward(dy)
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights and all of the optimizer's state, whole."""
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    for name, entries in get_optimizer_state_dict(model, optimizer)["state"].items():
        found |= {f"{name}: {key}": whole(value) for key, value in entries.items()}
    return found


def write_first(rank: int, folder: str, mesh: tuple[int, ...]) -> dict[str, Tensor]:
    model, optimizer = build(mesh)
    for number in range(2):
        step(model, optimizer, rank, 2, number)
    for block in model.blocks:
        block.moe.router.update_expert_bias()
    kept = everything(model, optimizer)
    assert sonic.fsdp.save(f"{folder}/0", model, optimizer, extra={"step": 2}) == Path(folder, "0")
    return kept


def hand_on(rank: int, folder: str, number: int, mesh: tuple[int, ...] | None, sharded_meta: bool) -> dict[str, Tensor]:
    """Read what others wrote, on another mesh, and write it again."""
    model, optimizer = build(mesh)
    if sharded_meta:
        model, optimizer = build(mesh, device="meta")
        sonic.fsdp.initialize(model, seed=1)
    before = everything(model, optimizer)
    assert sonic.fsdp.load(f"{folder}/{number}", model, optimizer) == {"step": 2}
    assert all(group["lr"] == 0.01 and group["fused"] for group in optimizer.param_groups)
    kept = everything(model, optimizer)
    assert all(not torch.equal(kept[name], before[name]) for name in ("enter.weight", "blocks.0.moe.w1"))
    sonic.fsdp.save(f"{folder}/{number + 1}", model, optimizer, extra={"step": 2})
    return kept


def same(found: list[dict[str, Tensor]], wanted: dict[str, Tensor]) -> int:
    for one in found:
        assert one.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(one[name], tensor), name
    return len(wanted)


@pytest.mark.parametrize(
    ("first", "second", "meta"),
    [((2,), (2, 2), False), pytest.param((1, 2), (4,), True, marks=pytest.mark.slow)],
)
def test_two_four_and_one_rank_exact(
    first: tuple[int, ...], second: tuple[int, ...], meta: bool, tmp_path: Path
) -> None:
    wanted = run_ranks(write_first, 2, str(tmp_path), first)
    count = same(wanted[1:], wanted[0])
    assert (
        count > 60
        and any("exp_avg_sq" in name for name in wanted[0])
        and "blocks.0.moe.router.expert_bias" in wanted[0]
    )
    same(run_ranks(hand_on, 4, str(tmp_path), 0, second, meta), wanted[0])
    same([hand_on(0, str(tmp_path), 1, None, False)], wanted[0])  # no process group, nothing sharded
    same(run_ranks(hand_on, 1, str(tmp_path), 2, (1,), meta), wanted[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    print(f"{count} tensors on 2, 4 and 1 ranks, to the last bit")


def go_on(rank: int, folder: str, mesh: tuple[int, ...], saves: bool) -> dict[str, Tensor]:
    """Six steps; or three, a checkpoint, and three with a new model."""
    model, optimizer = build(mesh)
    for number in range(6):
        if saves and number == 3:
            sonic.fsdp.save(f"{folder}/three", model, optimizer)
            model, optimizer = build(mesh)
            sonic.fsdp.load(f"{folder}/three", model, optimizer)
        step(model, optimizer, rank, 2, number)
    return everything(model, optimizer)


def check_going_on(rank: int, folder: str) -> None:
    for mesh in ((2,), (1, 2)):
        unbroken = go_on(rank, f"{folder}/{len(mesh)}", mesh, False)
        same([go_on(rank, f"{folder}/{len(mesh)}", mesh, True)], unbroken)


def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run_ranks(check_going_on, 2, str(tmp_path))


# ---------------------------------------------------------------- whole or not at all


class Small(nn.Module):
    """A layer with one more weight."""

    def __init__(self, width: int = 3, **names: int) -> None:
        super().__init__()
        self.moe = sonic.MoE(4, width, 2, 1)
        for name in names:
            setattr(self, name, nn.Linear(4, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    path = sonic.fsdp.save(tmp_path / "runs" / "a", model, sgd(model), extra={"step": 3, "note": "x"})
    assert sonic.fsdp.is_whole(path) and not sonic.fsdp.is_whole(tmp_path / "b")
    with pytest.raises(ValueError, match="path is .*a, which exists, expected a path where nothing is yet"):
        sonic.fsdp.save(path, model)

    real = dcp.save

    def dies(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise OSError("no space left")

    monkeypatch.setattr(dcp, "save", dies)
    with pytest.raises(OSError, match="no space left"):
        sonic.fsdp.save(path.with_name("b"), model)
    monkeypatch.undo()
    assert sorted(one.name for one in path.parent.iterdir()) == ["a", "b.tmp"]
    assert not sonic.fsdp.is_whole(path.with_name("b")) and not sonic.fsdp.is_whole(path.with_name("b.tmp"))
    (path.with_name("b.tmp") / "left over").touch()
    sonic.fsdp.save(path.with_name("b"), model)  # what the other call has left is removed
    assert sorted(one.name for one in path.parent.iterdir()) == ["a", "b"]
    assert not (path.with_name("b") / "left over").exists()

    assert sonic.fsdp.load(path, Small()) == {"step": 3, "note": "x"}
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert not sonic.fsdp.is_whole(path)
    with pytest.raises(ValueError, match="path is .*a, of which files are missing or cut short"):
        sonic.fsdp.load(path, Small())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = Small(more=1)
    path = sonic.fsdp.save(tmp_path / "a", model, sgd(model))
    bare = sonic.fsdp.save(tmp_path / "bare", model)
    other = Small(more=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with torch.device("meta"):
        hollow = Small(more=1)
    for message, arguments in (
        ("path is .*none, which does not exist", (tmp_path / "none", other)),
        (r"path is .*, of which files are missing", (tmp_path, other)),
        (r"model to load into is without more.bias, more.weight, expected all", (path, Small())),
        (
            r"a \(model\) is without extra.bias, extra.weight, expected every entry of the model that",
            (path, Small(more=1, extra=1)),
        ),
        (r"model moe.w1 is \(2, 10, 4\), expected \(2, 6, 4\) as in", (path, Small(5, more=1))),
        (r"optimizer is given, expected None, since .*bare was saved without", (bare, other, sgd(other))),
        (r"\(optimizer\) is without state.moe.router.weight.exp_avg, .* and \d+ more", (path, other, adam(other))),
        (r"more.weight|moe.w1 is on the meta device, expected memory: call sonic.fsdp.initialize", (path, hollow)),
    ):
        with pytest.raises(ValueError, match=r"^sonic.fsdp.load: .*" + message):
            sonic.fsdp.load(*arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items()), "nothing was loaded"
    with pytest.raises(ValueError, match="sonic.fsdp.save: extra is not plain .*Tensor"):
        sonic.fsdp.save(tmp_path / "c", model, extra={"step": torch.zeros(())})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def test_how_an_optimizer_computes_is_its_own(tmp_path: Path) -> None:
    """Learning rates come from the checkpoint; fused and foreach do not, and groups need not be the same."""
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75), fused=True)
    model.moe(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    path = sonic.fsdp.save(tmp_path / "a", model, optimizer)
    entries = json.loads((path / "sonic.json").read_text())["entries"]["optimizer"]
    assert not any(key.endswith((".fused", ".foreach")) for key in entries)
    other = Small()
    theirs = torch.optim.AdamW([{"params": [one]} for one in other.parameters()], lr=0.5, foreach=True)
    sonic.fsdp.load(path, other, theirs)
    for group in theirs.param_groups:
        assert group["lr"] == 0.25 and tuple(group["betas"]) == (0.5, 0.75) and group["foreach"] and not group["fused"]
    same([everything(other, theirs)], everything(model, optimizer))
    assert not dist.is_initialized()


def check_tensor_parallel(rank: int, folder: str) -> None:
    """Gate and up rows split block by block over two ranks, FSDP-2 over two more."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    options = {"experts": 5, "shared_intermediate_size": 8, "losses": False}
    reference = sonic.fsdp.initialize(make_model(**options), seed=5)
    models = []
    for device in (None, "meta"):
        model = make_model(device=device, **options)
        for block in model.blocks:
            parallelize_moe(block.moe, tp_mesh=world["tp"])
        sonic.fsdp.shard(model, world["dp"])
        models.append(sonic.fsdp.initialize(model, seed=5 if device else 6))
    mine = tokens(2)[world["dp"].get_local_rank()][0]
    assert relative_error(models[1](mine), reference(mine)) < 1e-12, "meta start under tensor parallelism"
    path = sonic.fsdp.save(f"{folder}/tp", models[1])
    for other in (models[0], make_model(**options)):
        sonic.fsdp.load(path, other)
        assert relative_error(other(mine), reference(mine)) < 1e-12
    assert torch.equal(other.blocks[0].moe.w1, reference.blocks[0].moe.w1)  # the last one is whole
    assert torch.equal(other.blocks[1].moe.shared.w1, reference.blocks[1].moe.shared.w1)


@pytest.mark.slow
def test_beside_tensor_parallelism(tmp_path: Path) -> None:
    run_ranks(check_tensor_parallel, 4, str(tmp_path))
