"""Tensor parallelism: experts, linears, sequences and losses split over ranks, with the numbers of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sonic
from sonic.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    clip_grad_norm_,
    contiguous_state_dict,
    fsdp_placement,
    gather_sequence,
    load_contiguous,
    parallelize_moe,
    split_sequence,
    sum_gradients,
    vocab_parallel_cross_entropy,
)
from tests.distributed import run_ranks
from tests.helpers import assert_close
from tests.test_memory import Saved
from tests.test_parallel_expert import CASES, TOLERANCE, D, compare, make_layer, tokens_of, whole

pytestmark = pytest.mark.long

REDUCE = ("sum", "reduce_scatter", "none")
STEPS = ("forward", "late finish", "shared apart")


def check_experts_of_two_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    group = mesh.get_group()
    for name, options in {**CASES, "sequence-wise": {"router": "sequence-wise"}}.items():
        for reduce in REDUCE:
            for steps in STEPS:
                if steps != "forward" and name != "shared":
                    continue
                layer, reference = make_layer(**options), make_layer(**options)
                parallelize_moe(layer, tp_mesh=mesh, tp_reduce=reduce)
                try:
                    compare(layer, reference, *tokens_of(0, 3, 6), None, steps, group)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {reduce}, {steps}: {error}") from error


def test_experts_of_two_ranks_are_those_of_one() -> None:
    run_ranks(check_experts_of_two_ranks, 2)


def check_experts_of_four_ranks(rank: int) -> None:
    """Expert parallel x tensor parallel, then data parallel x tensor parallel."""
    for axes in (("ep", "tp"), ("tp", "ep"), ("dp", "tp")):
        world = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
        data, tp = world["dp" if "dp" in axes else "ep"], world["tp"]
        for name, options in CASES.items():
            for reduce in REDUCE if name in ("shared", "uneven experts", "rounding") else ("sum",):
                group = data.get_group()
                layer, reference = make_layer(group=group, **options), make_layer(group=group, **options)
                ep_mesh = None if "dp" in axes else data
                parallelize_moe(layer, ep_mesh=ep_mesh, tp_mesh=tp, tp_reduce=reduce, expert_gradient_scale=1.0)
                try:
                    compare(layer, reference, *tokens_of(data.get_local_rank(), 2, 6), group, "forward", tp.get_group())
                except AssertionError as error:
                    raise AssertionError(f"{name}, {reduce}, {axes}: {error}") from error


def test_experts_of_four_ranks_are_those_of_one() -> None:
    run_ranks(check_experts_of_four_ranks, 4)


def check_what_is_kept(rank: int) -> None:
    """The tokens once, and of H this rank's share."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    T_, D_, N_, E_, K_ = 40, 16, 12, 6, 3
    for reduce in ("sum", "none", "reduce_scatter"):
        layer = sonic.MoE(D_, N_, E_, K_, dtype=torch.bfloat16)
        parallelize_moe(layer, tp_mesh=mesh, tp_reduce=reduce)
        x = torch.randn(T_, D_).bfloat16()
        x = x.chunk(2)[rank] if reduce == "reduce_scatter" else x
        with Saved(
            [parameter.to_local() for parameter in list(layer.parameters())[:2]] + [layer.router.weight]
        ) as saved:
            out = layer(x.requires_grad_())
        assert out.requires_grad
        R = T_ * K_
        integers = 4 * (R + R + E_ + 1)  # chosen experts, slots, offsets
        assert saved.num_bytes == 2 * T_ * D_ + 2 * R * 2 * N_ // 2 + 4 * R + integers, (reduce, str(saved))


def check_change_in_place(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for reduce in REDUCE:
        layer = parallelize_moe(make_layer("plain"), tp_mesh=mesh, tp_reduce=reduce)
        x, dy = tokens_of(0, 3, 6)
        out = layer(x)
        dy = dy.repeat(1, 2, 1) if out.shape[1] == 12 else dy[:, : out.shape[1]]
        (want,) = torch.autograd.grad(out, x, dy)
        out = layer(x)
        assert not out._is_view()  # of which FSDP-2 loses its hooks then
        out += 1.0
        (got,) = torch.autograd.grad(out, x, dy)
        assert torch.equal(got, want), reduce


def check_uses(rank: int) -> None:
    check_what_is_kept(rank)
    check_change_in_place(rank)


def test_memory_and_change_in_place() -> None:
    run_ranks(check_uses, 2)


# ---------------------------------------------------------------- drawing anew, clipping


def check_drawn_anew(rank: int) -> None:
    """Built without memory, spread, then drawn: what ranks share is equal, what they do not share is not, and every
    kind of initialisation looks like that of a whole layer.
    """
    options = {"shared_intermediate_size": 60, "bias": True, "dtype": torch.float64}
    concatenated = ((axes, "concatenated") for axes in (("ep", "tp"), ("dp", "ep"), ("dp", "tp")))
    for axes, layout in (*concatenated, (("ep", "tp"), "interleaved")):
        world = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
        for init in ("linear", "normal", lambda matrix: nn.init.constant_(matrix, matrix.shape[-1])):
            torch.manual_seed(11)
            layer = sonic.MoE(32, 20, 5, 2, init=init, glu_layout=layout, device="meta", **options)
            parallelize_moe(layer, **{f"{axis}_mesh": world[axis] for axis in axes if axis != "dp"})
            if "dp" in axes:
                fully_shard(layer, mesh=world["dp"], shard_placement_fn=fsdp_placement)
            layer.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.fill_(float("nan"))
            layer.reset_parameters()
            reference = sonic.MoE(32, 20, 5, 2, init=init, glu_layout=layout, **options)
            for name, parameter in reference.named_parameters():
                if name == "shared.b1" and axes == ("dp", "tp") and layout == "concatenated":
                    continue  # cut twice in its one dimension: torch cannot put it together
                drawn = whole(dict(layer.named_parameters())[name]).detach()
                assert torch.isfinite(drawn).all(), name
                everyone = [torch.empty_like(drawn) for _ in range(4)]
                dist.all_gather(everyone, drawn)
                assert all(torch.equal(other, drawn) for other in everyone), name
                assert drawn.std() == pytest.approx(parameter.detach().std().item(), rel=0.25), name
                if parameter.std() == 0:
                    assert torch.equal(drawn, parameter), name
                elif name != "router.weight":  # of FSDP on a CPU, where torch itself draws alike on all ranks
                    assert drawn.unique().numel() == drawn.numel(), f"{name}: some numbers come twice"


def check_clipping(rank: int) -> None:
    """Experts on one mesh, shared expert on another, router on none; and FSDP's shards of all."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    reference = make_layer("plain", **CASES["shared"])
    spread = make_layer("plain", **CASES["shared"])
    parallelize_moe(spread, ep_mesh=world["ep"], tp_mesh=world["tp"], expert_gradient_scale=1.0)
    sharded = make_layer("plain", **{**CASES["shared"], "glu_layout": "interleaved"})
    fully_shard(sharded.router, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(sharded, mesh=world["ep"])
    for layer in (spread, sharded):
        reference.glu_layout, reference.shared.glu_layout = layer.glu_layout, layer.glu_layout
        reference.zero_grad()
        x, dy = tokens_of(0, 9)
        for model in (reference, layer):
            model(x).backward(dy)
        if layer is spread:  # both expert-parallel ranks had the same tokens
            for name, parameter in layer.named_parameters():
                if name in ("w1", "w2", "b1", "b2"):
                    parameter.grad /= 2
        for max_norm in (float("inf"), 1e4, 0.5):
            want = nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
            got = clip_grad_norm_(layer.parameters(), max_norm)
            assert got.dtype == torch.float64
            assert_close("norm", got, want, TOLERANCE)
            for name, parameter in reference.named_parameters():
                ours = dict(layer.named_parameters())[name].grad
                assert_close(f"{max_norm} d{name}", whole(ours), parameter.grad, TOLERANCE)
    with pytest.raises(ValueError, match="max_norm is -1"):
        clip_grad_norm_(layer.parameters(), -1)
    assert clip_grad_norm_([], 1.0) == 0


def check_four_ranks(rank: int) -> None:
    check_drawn_anew(rank)
    check_clipping(rank)


def test_drawn_anew_and_clipped() -> None:
    run_ranks(check_four_ranks, 4)


# ---------------------------------------------------------------- checkpoints


def trained(layer: sonic.MoE, data_rank: int) -> Any:
    """The state of a layer after one step of an optimizer."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x, dy = tokens_of(data_rank, 6)
    layer(x).backward(dy)
    optimizer.step()
    return optimizer, dict(zip(("model", "optimizer"), get_state_dict(layer, optimizer), strict=True))


def check_checkpoints(rank: int, folder: str) -> None:
    """Saved by tensor-parallel ranks in either layout, alone or beside FSDP and experts; read by a whole layer and by
    ranks of the other kind.
    """
    for layout in ("interleaved", "concatenated"):
        options = {**CASES["shared"], "glu_layout": layout, "router": "plain"}
        for axes in (("tp",), ("ep", "tp"), ("dp", "tp")) if layout == "concatenated" else (("ep", "tp"),):
            key, with_fsdp = f"{layout} {axes}", "dp" in axes
            if with_fsdp:
                options = {**options, "bias": False}  # the bias of a shared expert has one dimension only
            world = init_device_mesh("cpu", (2,) * len(axes) if len(axes) == 2 else (4,), mesh_dim_names=axes)
            layer, reference = make_layer(**options), make_layer(**options)
            meshes = {f"{axis}_mesh": world[axis] for axis in axes if axis != "dp"}
            parallelize_moe(layer, **meshes)
            if with_fsdp:
                fully_shard(layer, mesh=world["dp"], shard_placement_fn=fsdp_placement)
            for name, tensor in layer.state_dict().items():
                assert torch.equal(whole(tensor), reference.state_dict()[name]), (key, name)
            _, state = trained(layer, 0)
            on_disk = contiguous_state_dict(state)
            assert (on_disk["model"]["w1"] is state["model"]["w1"]) == (layout == "interleaved")
            dcp.save(on_disk, checkpoint_id=f"{folder}/{key}")
            for spread in (False, True):
                fresh = make_layer(**options)
                if spread:
                    parallelize_moe(fresh, tp_mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"])
                optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1)
                got = dict(zip(("model", "optimizer"), get_state_dict(fresh, optimizer), strict=True))
                read = contiguous_state_dict(got)
                dcp.load(read, checkpoint_id=f"{folder}/{key}")
                load_contiguous(got, read)
                set_state_dict(fresh, optimizer, model_state_dict=got["model"], optim_state_dict=got["optimizer"])
                model, moments = get_state_dict(fresh, optimizer)
                for name, tensor in state["model"].items():
                    assert torch.equal(whole(model[name]), whole(tensor)), (key, name)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        wanted = whole(state["optimizer"]["state"][name][moment])
                        assert torch.equal(whole(moments["state"][name][moment]), wanted), (key, name, moment)

    layer = parallelize_moe(make_layer(**CASES["shared"]), tp_mesh=world["tp"])
    fully_shard(layer, mesh=world["dp"])
    with pytest.raises(ValueError, match="shared.w1 is split block by block and by FSDP .*, expected fully_shard"):
        layer.state_dict()
    layer = parallelize_moe(make_layer(**CASES["shared"]), tp_mesh=world["tp"])
    fully_shard(layer, mesh=world["dp"], shard_placement_fn=fsdp_placement)  # cuts the second dimension of matrices
    with pytest.raises(
        ValueError, match="shared.b1 is split .* in a wrong order, expected glu_layout='interleaved': a bias"
    ):
        layer.state_dict()


def test_checkpoints(tmp_path: Any) -> None:
    run_ranks(check_checkpoints, 4, str(tmp_path))


# ---------------------------------------------------------------- linears, sequences, losses


class Block(nn.Module):
    """A norm, and a gated pair of linears: what a transformer has in its MLP, and (with three blocks) its attention."""

    def __init__(self, tp_mesh: Any = None, reduce: str = "sum") -> None:
        super().__init__()
        torch.manual_seed(3)
        norm, up, down = nn.LayerNorm(D), nn.Linear(D, 3 * 8), nn.Linear(8, D)
        self.norm, self.up, self.down = norm.double(), up.double(), down.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=max(parameter.shape[-1] ** -0.5, 0.5))
        if tp_mesh is not None:
            self.up = ColumnParallelLinear.from_linear(self.up, tp_mesh, reduce=reduce, num_blocks=3)
            self.down = RowParallelLinear.from_linear(self.down, tp_mesh, reduce=reduce)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.up(self.norm(x)).chunk(3, dim=-1)
        return x + self.down(a * torch.sigmoid(b) + c)


def check_linears(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x_whole, dy = tokens_of(0, 3, 6)
    reference = Block()
    want = reference(x_whole)
    want.backward(dy)
    for reduce in ("sum", "reduce_scatter"):
        for border in ("whole", "partial") if reduce == "reduce_scatter" else ("",):
            block = Block(mesh, reduce)
            x = x_whole.detach().clone().requires_grad_()
            if reduce == "sum":
                out = block(x)
                out.backward(dy)
            else:
                out = gather_sequence(block(split_sequence(x, mesh)), mesh, gradient=border)
                out.backward(dy if border == "whole" else dy * (0.25 if rank == 0 else 0.75))
                sum_gradients(block.norm.parameters(), mesh)
                if border == "partial":
                    assert x.grad is not None
            for name, got, wanted in (("out", out, want), ("dx", x.grad, x_whole.grad)):
                assert_close(f"{reduce} {border} {name}", got, wanted, TOLERANCE)
            assert list(block.state_dict()) == list(reference.state_dict())
            for name, parameter in reference.named_parameters():
                ours = dict(block.named_parameters())[name]
                assert ours.shape == parameter.shape
                assert torch.equal(whole(ours), parameter)
                assert_close(f"{reduce} {border} d{name}", whole(ours.grad), parameter.grad, TOLERANCE)
    for reduce, fullgraph in (("sum", False), ("none", True)):  # without collectives in it, it is one graph
        torch._dynamo.reset()
        block = Block(mesh, reduce)
        x = x_whole.detach().clone().requires_grad_()
        out = torch.compile(block, backend="eager", fullgraph=fullgraph)(x)
        (got,) = torch.autograd.grad(out, x, dy)
        (wanted,) = torch.autograd.grad(block(x), x, dy)
        assert_close(f"compiled {reduce}", got, wanted, TOLERANCE)
    block = Block(mesh, "none")  # the caller reduces: what enters and what leaves
    x = x_whole.detach().clone().requires_grad_()
    n = block.norm(x)
    a, b, c = block.up(n).chunk(3, dim=-1)
    partial = block.down(a * torch.sigmoid(b) + c)
    (dn,) = torch.autograd.grad(partial, n, dy)
    dist.all_reduce(partial.detach())
    dist.all_reduce(dn)
    assert_close("none out", x + partial, want, TOLERANCE)
    n = reference.norm(x)
    a, b, c = reference.up(n).chunk(3, dim=-1)
    (dn_want,) = torch.autograd.grad(reference.down(a * torch.sigmoid(b) + c), n, dy)
    assert_close("none dn", dn, dn_want, TOLERANCE)


def test_linears_and_sequences_of_two_ranks() -> None:
    run_ranks(check_linears, 2)


def check_losses(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    vocab, width = 10, 5
    logits = (8 * torch.randn(7, vocab, dtype=torch.float64)).requires_grad_()
    target = torch.tensor([0, 4, 5, 9, -100, 3, 7])
    part = logits.detach()[:, rank * width : (rank + 1) * width]
    weight_T = torch.randn(7, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        local = part.clone().requires_grad_()
        got = vocab_parallel_cross_entropy(local, target, mesh, reduction=reduction)
        want = nn.functional.cross_entropy(logits, target, reduction=reduction)
        assert_close(reduction, got, want, TOLERANCE)
        weight = weight_T if reduction == "none" else torch.tensor(1.7, dtype=torch.float64)
        (dlocal,) = torch.autograd.grad((got * weight).sum(), local)
        (dlogits,) = torch.autograd.grad((want * weight).sum(), logits)
        assert_close(f"{reduction} gradient", dlocal, dlogits[:, rank * width : (rank + 1) * width], TOLERANCE)
    half = part.bfloat16().requires_grad_()
    got = vocab_parallel_cross_entropy(half, target, mesh)
    got.backward()
    assert got.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="0 <= target < 10"):
        vocab_parallel_cross_entropy(part, target + 1, mesh)


def test_cross_entropy_of_a_split_vocabulary() -> None:
    run_ranks(check_losses, 2)


def check_bad_input(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = parallelize_moe(make_layer(), tp_mesh=mesh, tp_reduce="reduce_scatter")
    for message, make in (
        (r"x is \(12,\), expected \(..., S / tp, D\)", lambda: layer(torch.zeros(D, dtype=torch.float64))),
        (
            "out_features is 6, expected a multiple of num_blocks",
            lambda: ColumnParallelLinear(4, 6, tp_mesh=mesh, num_blocks=2),
        ),
        ("in_features is 5, expected a multiple of tp = 2", lambda: RowParallelLinear(5, 4, tp_mesh=mesh)),
        ("reduce is 'mean'", lambda: RowParallelLinear(4, 4, tp_mesh=mesh, reduce="mean")),
        ("tp_mesh is a str", lambda: RowParallelLinear(4, 4, tp_mesh="tp")),
        ("along dim -2", lambda: split_sequence(torch.zeros(2, 3, D), mesh)),
        ("gradient is 'half'", lambda: gather_sequence(torch.zeros(2, 3, D), mesh, gradient="half")),
        (
            "reduction is 'max'",
            lambda: vocab_parallel_cross_entropy(torch.zeros(1, 2), torch.zeros(1).long(), mesh, reduction="max"),
        ),
        ("target is float32", lambda: vocab_parallel_cross_entropy(torch.zeros(1, 2), torch.zeros(1), mesh)),
        ("contiguous is of keys", lambda: load_contiguous({"a": torch.zeros(1)}, {"b": torch.zeros(1)})),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_bad_input() -> None:
    run_ranks(check_bad_input, 2)
