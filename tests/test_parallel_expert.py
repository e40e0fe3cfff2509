"""``sonic.MoE`` with its experts spread over ranks: the same numbers as on one, and no more memory than promised.

Every rank also runs the whole layer on its own tokens: outputs and input gradients are those, parameters have the sum
of all ranks' gradients. Everything is float64, all random numbers have unit scale.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import sonic
from sonic.layers import moe as moe_layer
from sonic.parallel import parallelize_moe
from sonic.parallel.exchange import all_to_all
from sonic.parallel.in_flight import logging_to
from sonic.parallel.mesh import part_offsets
from sonic.routing import TokenRounding, TopKRouter
from tests.distributed import run_ranks
from tests.helpers import assert_close, assert_same_bits
from tests.test_memory import Saved

D, N, E, K = 12, 8, 6, 2
TOLERANCE = 1e-10


def make_layer(router: str = "topk", group: Any = None, **options: Any) -> sonic.MoE:
    """A layer of the same unit-scale numbers in every process; rows of W x have unit scale for unit-scale x."""
    torch.manual_seed(7)
    sizes = {"num_experts": E, "top_k": K, "hidden_size": D, "intermediate_size": N, **options}
    num_experts, top_k = sizes["num_experts"], sizes["top_k"]
    chooser: nn.Module = TopKRouter(
        D,
        num_experts,
        top_k,
        aux_loss_coeff=0.3 if router != "plain" else 0.0,
        z_loss_coeff=0.2 if router != "plain" else 0.0,
        aux_loss_group=group,
        aux_loss_type="sequence" if router == "sequence-wise" else "switch",
        dtype=torch.float64,
        scores_on="input" if router == "input" else "output",
    )
    if router.startswith("rounding"):
        chooser = TokenRounding(chooser, tile_rows=4, group=group if router == "rounding over all" else None)
    layer = sonic.MoE(**sizes, router=chooser, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 1.0 if name.endswith(("b1", "b2")) else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * scale)
    return layer


def tokens_of(rank: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of what becomes of them."""
    generator = torch.Generator().manual_seed(100 + rank)
    x, dy = torch.randn(2, *shape, D, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), dy


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(
    layer: sonic.MoE,
    reference: sonic.MoE,
    x: Tensor,
    dy: Tensor,
    data_group: Any,
    steps: str = "forward",
    tp_group: Any = None,
) -> None:
    """Outputs and all gradients of a spread layer against those of the whole one.

    Args:
        layer, reference: of equal parameters.
        x, dy: (..., D), equal in ``tp_group``.
        data_group: ranks with different tokens; None: all have the same.
        steps: see :func:`run`.
        tp_group: ranks among which the layer's input and output are split or partial, as its ``tp_reduce`` says.
    """
    reduce = "sum" if tp_group is None else layer.parallel.tp_reduce
    x_reference = x.detach().clone().requires_grad_()
    want = reference(x_reference)
    want.backward(dy)
    part = slice(None)
    if reduce == "reduce_scatter":
        step = x.shape[-2] // tp_group.size()
        part = slice(tp_group.rank() * step, (tp_group.rank() + 1) * step)
    x = x.detach()[..., part, :].clone().requires_grad_()
    got = run(layer, x, steps)
    got.backward(dy[..., part, :])
    assert x.grad is not None
    results = {"out": got.detach(), "dx": x.grad}
    for name, wanted in (("out", want), ("dx", x_reference.grad)):
        assert wanted is not None
        if reduce == "none":
            dist.all_reduce(results[name], group=tp_group)
        assert_close(name, results[name], wanted[..., part, :], TOLERANCE)
    parameters = dict(layer.named_parameters())
    assert list(parameters) == [name for name, _ in reference.named_parameters()]
    for name, parameter in reference.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        ours = parameters[name].grad
        assert ours is not None and parameters[name].shape == parameter.shape, name
        ours = whole(ours).clone()
        if data_group is not None:
            dist.all_reduce(grad, group=data_group)
            if layer.parallel.ep.size == 1 or name.startswith(("router.", "shared.")):  # of this rank's tokens alone
                dist.all_reduce(ours, group=data_group)
        assert_close(f"d{name}", ours, grad, TOLERANCE)


def run(layer: sonic.MoE, x: Tensor, steps: str) -> Tensor:
    if steps == "forward":
        return layer(x)
    handle = layer.begin(x, add_shared=steps != "shared apart")
    if steps == "late finish":
        handle.experts()
        handle.shared()
        torch.ones(3).sum()
        return handle.finish()
    shared = handle.shared()
    out = handle.experts().finish()
    return out if shared is None or steps != "shared apart" else out + shared


CASES: dict[str, dict[str, Any]] = {
    "plain": {"router": "plain"},
    "aux losses": {},
    "shared": {"shared_intermediate_size": 4, "bias": True},
    "interleaved": {"glu_layout": "interleaved", "bias": True},
    "save input": {"save": "input"},
    "not gated": {"activation": "relu2", "bias": True},
    "uneven experts": {"num_experts": 5, "top_k": 3},
    "an expert on one rank": {"num_experts": 1, "top_k": 1},
    "all experts": {"top_k": E},
    "scores on input": {"router": "input", "top_k": 1},
    "rounding": {"router": "rounding", "bias": True},
    "rounding over all": {"router": "rounding over all"},
}


# ---------------------------------------------------------------- two ranks

COUNTS = {"even": (9, 9), "uneven": (5, 14), "one without": (0, 11)}


def check_two_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    group = mesh.get_group()
    for name, options in CASES.items():
        for counts, of_ranks in COUNTS.items():
            if options.get("router") == "rounding" and counts != "even":
                continue  # a tile needs as many tokens
            for steps in ("forward", "late finish", "shared apart"):
                if steps != "forward" and (counts != "uneven" or name not in ("shared", "scores on input")):
                    continue
                reference = make_layer(group=group, **options)
                layer = make_layer(group=group, **options)
                parallelize_moe(layer, ep_mesh=mesh, expert_gradient_scale=1.0)
                try:
                    compare(layer, reference, *tokens_of(rank, of_ranks[rank]), group, steps)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {counts}, {steps}: {error}") from error


def test_two_ranks_are_one() -> None:
    run_ranks(check_two_ranks, 2)


def check_all_tokens_in_one_process(rank: int) -> None:
    """No second run of the layer per rank here: one call on the tokens of all, with its one auxiliary loss."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    counts = (5, 14)
    for name in ("shared", "uneven experts", "all experts"):
        whole_layer = make_layer(**CASES[name])
        layer = parallelize_moe(make_layer(group=mesh.get_group(), **CASES[name]), ep_mesh=mesh)
        both = [tokens_of(other, counts[other]) for other in range(2)]
        x, dy = (torch.cat([pair[i].detach() for pair in both]) for i in range(2))
        mine = slice(0, 5) if rank == 0 else slice(5, 19)
        want = whole_layer(x.requires_grad_())
        (want * dy).sum().div(2).backward()  # each rank's loss counts for a half, and so do their auxiliary losses
        sonic.layers.set_aux_loss_scale(layer, 1.0)
        for parameter in whole_layer.parameters():
            parameter.grad = None
        x.grad = None
        (whole_layer(x) * dy).sum().div(2).backward()
        mine_x = both[rank][0]
        got = layer(mine_x)
        (got * dy[mine]).sum().backward()
        assert_close(f"{name} out", got, want[mine], TOLERANCE)
        for key, parameter in layer.named_parameters():
            grad = whole(parameter.grad)
            if key.startswith(("router.", "shared.")):
                dist.all_reduce(grad.div_(2))
            assert_close(f"{name} d{key}", grad, dict(whole_layer.named_parameters())[key].grad, TOLERANCE)
        assert mine_x.grad is not None and x.grad is not None
        assert_close(f"{name} dx", mine_x.grad / 2, x.grad[mine], TOLERANCE)


def test_all_tokens_in_one_process() -> None:
    run_ranks(check_all_tokens_in_one_process, 2)


# ---------------------------------------------------------------- steps, order, what crosses the wire, what is kept


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("steps", ["late finish", "shared apart"])
def test_steps_are_the_forward_to_the_last_bit(case: str, steps: str) -> None:
    results = []
    for way in ("forward", steps):
        layer = make_layer(**CASES[case])
        x, dy = tokens_of(0, 2, 7)
        out = run(layer, x, way)
        out.backward(dy)
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"out": out.detach(), "dx": x.grad, **grads})
    assert_same_bits(*results)


def test_steps_in_a_wrong_order() -> None:
    layer = make_layer()
    handle = layer.begin(tokens_of(0, 3)[0])
    with pytest.raises(RuntimeError, match="finish\\(\\) was called before experts"):
        handle.finish()
    handle.experts()
    with pytest.raises(RuntimeError, match="twice"):
        handle.experts()


class Diary:
    """What :func:`sonic.parallel.in_flight.logging_to` hears, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def issued(self, kind: str, phase: str, *_: Any) -> str:
        self.lines.append(f"{phase} issue {kind}")
        return f"{phase} wait {kind}"

    def waiting(self, entry: str, *_: Any) -> None:
        self.lines.append(entry)

    def waited(self, *_: Any) -> None:
        pass


def check_order_and_wire(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    layer = parallelize_moe(make_layer("plain", top_k=3, shared_intermediate_size=4), ep_mesh=mesh)
    diary = Diary()
    layer.shared.register_forward_hook(lambda *_: diary.lines.append("forward shared"))
    layer.shared.register_full_backward_hook(lambda *_: diary.lines.append("backward shared"))
    x, dy = tokens_of(rank, 30)
    real, messages = dist.all_to_all_single, []
    try:
        dist.all_to_all_single = lambda out, message, *args, **kwargs: (
            messages.append(message),
            real(out, message, *args, **kwargs),
        )[1]
        with logging_to(diary):
            out, routing = layer(x, return_routing=True)
        out.backward(dy)
    finally:
        dist.all_to_all_single = real
    forward = ["scores", "dispatch", "shared", "scores", "dispatch", "combine", "combine"]
    assert [line.split()[-1] for line in diary.lines[:7]] == forward, diary.lines
    assert diary.lines.index("forward shared") < diary.lines.index("forward wait dispatch")
    # in backward too the shared expert runs while tokens travel
    travels = slice(diary.lines.index("backward issue dispatch"), diary.lines.index("backward wait dispatch"))
    assert "backward shared" in diary.lines[travels], diary.lines

    # a token with several experts on a rank crosses once, in each direction
    plan = routing.plan
    expert_R = torch.repeat_interleave(torch.arange(E), plan.tokens_per_expert().long())
    pairs = {(int(token), int(expert) // 3) for token, expert in zip(plan.token_of_row_R, expert_R, strict=True)}
    received = layer_rows(messages, D)
    assert plan.num_rows == 90 and 30 < len(pairs) < 60
    assert received[0] == len(pairs) == received[3], (received, len(pairs))  # dispatch, and combine's gradient
    counts, places, scores = messages[:3]
    assert counts.shape == (2, 2) and places.shape == (90, 2) and places.dtype == torch.int32
    assert scores.shape == (90,)


def layer_rows(messages: list[Tensor], width: int) -> list[int]:
    """Rows of the messages that are tokens: dispatch, combine, then the gradients of combine and of dispatch."""
    rows = [message.shape[0] for message in messages if message.ndim == 2 and message.shape[1] == width]
    assert len(rows) == 4
    return [rows[0], rows[1], rows[3], rows[2]]


def check_what_is_kept(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    for K_, save in ((1, "preactivation"), (3, "preactivation"), (3, "input")):
        T_, D_, N_, E_ = 40 + rank, 16, 12, 6
        layer = sonic.MoE(D_, N_, E_, K_, dtype=torch.bfloat16, save=save)
        parallelize_moe(layer, ep_mesh=mesh)
        x = torch.randn(T_, D_).bfloat16().requires_grad_()
        parameters = [p.to_local() if hasattr(p, "to_local") else p for p in layer.parameters()]
        with Saved(parameters) as saved:
            handle = layer.begin(x)
            exchange = handle._exchange
            handle.experts().finish()
        R, S = T_ * K_, exchange._sent.num_rows
        R_here, S_here = exchange.num_received_rows, exchange.num_received_tokens
        tokens = 2 * T_ * D_ + 2 * S_here * D_  # the router's, and the experts'
        h = 2 * R_here * 2 * N_ if save == "preactivation" else 0
        scores = 4 * (R + R_here)
        integers = 4 * (R + R + S + (T_ + 1) + S) + 4 * (2 * R_here + E_ // 2 + 1)
        assert saved.num_bytes == tokens + h + scores + integers, saved


def check_rounded_rows_are_whole_tiles(rank: int) -> None:
    """Whether each rank rounds its own counts or all round the sums: what an expert computes is whole tiles."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    counts: list[Tensor] = []
    real = moe_layer.moe_mlp
    for router in ("rounding", "rounding over all", "plain"):
        layer = parallelize_moe(make_layer(router, group=mesh.get_group()), ep_mesh=mesh)
        try:
            moe_layer.moe_mlp = lambda *args, **kwargs: (
                counts.append(args[4].tokens_per_expert()),
                real(*args, **kwargs),
            )[1]
            layer(tokens_of(rank, 17)[0])
        finally:
            moe_layer.moe_mlp = real
    assert not (counts[0] % 4).any() and not (counts[1] % 4).any() and (counts[2] % 4).any(), counts
    assert counts[0].sum() and counts[1].sum()


def check_uses(rank: int) -> None:
    """Autocast, 16 bits, no gradient, checkpointing, compiling, change in place, what the router returns."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    options = {"shared_intermediate_size": 4, "bias": True}
    layer, reference = (make_layer("plain", **options) for _ in range(2))
    parallelize_moe(layer, ep_mesh=mesh)
    x, dy = tokens_of(rank, 2, 7)
    want = reference(x)
    with torch.no_grad():
        assert_close("no_grad", layer(x), want, TOLERANCE)
    layer.eval()
    assert_close("eval", layer(x), want, TOLERANCE)
    layer.train()
    out, routing = layer(x, return_routing=True)
    assert routing.plan.num_experts == E and torch.equal(
        routing.expert_index, reference(x, return_routing=True)[1].expert_index
    )
    (dx_want,) = torch.autograd.grad(want, x, dy, retain_graph=True)
    out = layer(x)
    out += 1.0  # as residuals are added
    (dx,) = torch.autograd.grad(out, x, dy)
    assert_close("in place", dx, dx_want, TOLERANCE)
    out = checkpoint(layer, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(out, x, dy)
    assert_close("checkpointed", dx, dx_want, TOLERANCE)
    out = torch.compile(layer, backend="eager")(x)
    (dx,) = torch.autograd.grad(out, x, dy)
    assert_close("compiled", dx, dx_want, TOLERANCE)

    layer32, reference32 = (make_layer("plain", **options).float() for _ in range(2))
    parallelize_moe(layer32, ep_mesh=mesh)
    messages: list[torch.dtype] = []
    real = dist.all_to_all_single
    with torch.autocast("cpu", torch.bfloat16):
        try:
            dist.all_to_all_single = lambda out, message, *args, **kwargs: (
                messages.append(message.dtype),
                real(out, message, *args, **kwargs),
            )[1]
            half = layer32(x.detach().float())
        finally:
            dist.all_to_all_single = real
        wanted = reference32(x.detach().float())
    assert messages == [torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert half.dtype == wanted.dtype == torch.bfloat16
    error = (half.double() - want).norm() / want.norm()
    assert error <= 2 * (wanted.double() - want).norm() / want.norm() + 2e-3


def check_equal_and_unequal_splits(rank: int) -> None:
    """Where all parts are equal the collective is called without sizes, which is what NCCL is fast at."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    real, calls = dist.all_to_all_single, []
    for sizes in (((2, 2), (2, 2)), ((1, 3), (4, 0)), ((0, 0), (0, 0))):
        send = list(sizes[rank])
        receive = [sizes[other][rank] for other in range(2)]
        x = torch.arange(sum(send)) + 100 * rank
        try:
            dist.all_to_all_single = lambda *args, **kwargs: (calls.append(len(args)), real(*args, **kwargs))[1]
            got = all_to_all(mesh.get_group(), send, receive)(x).wait()
        finally:
            dist.all_to_all_single = real
        first = [0, 100] if rank == 0 else [sizes[0][0], 100 + sizes[1][0]]
        want = [number for start, count in zip(first, receive, strict=True) for number in range(start, start + count)]
        assert got.tolist() == want
    assert calls == [2, 4, 2]


def check_small_things(rank: int) -> None:
    check_equal_and_unequal_splits(rank)
    check_order_and_wire(rank)
    check_what_is_kept(rank)
    check_rounded_rows_are_whole_tiles(rank)
    check_uses(rank)


def test_order_wire_memory_rounding_and_uses() -> None:
    run_ranks(check_small_things, 2)


# ---------------------------------------------------------------- FSDP-2, checkpoints


def check_fsdp(rank: int) -> None:
    """Experts over two ranks, their shards over two more; the gradients are the mean over all four, by default."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    everyone = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    for name in ("shared", "uneven experts", "rounding", "aux losses"):
        reference = make_layer(group="world", **CASES[name])
        layer = parallelize_moe(make_layer(group="world", **CASES[name]), ep_mesh=world["ep"])
        fully_shard(layer.router, mesh=everyone)
        if layer.shared is not None:
            fully_shard(layer.shared, mesh=everyone)
        fully_shard(layer, mesh=world["dp"])
        for step in range(2):  # the second accumulates
            x, dy = tokens_of(10 * step + rank, 9)
            want = reference(x)
            want.backward(dy)
            wanted_dx, x.grad = x.grad, None
            got = layer(x)
            got.backward(dy)
            assert_close(f"{name} out", got, want, TOLERANCE)
            assert_close(f"{name} dx", x.grad, wanted_dx, TOLERANCE)
        for key, parameter in reference.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            ours = dict(layer.named_parameters())[key].grad
            assert_close(f"{name} d{key}", whole(ours), parameter.grad / 4, TOLERANCE)

    half = parallelize_moe(make_layer("plain").float(), ep_mesh=world["ep"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(half, mesh=world["dp"], mp_policy=policy, ignored_params=set(half.router.parameters()))
    half.router.bfloat16()
    out = half(tokens_of(rank, 9)[0].detach().float())
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and half.w1.grad.dtype == torch.float32


def test_gradients_under_fsdp() -> None:
    run_ranks(check_fsdp, 4)


def check_checkpoints(rank: int, folder: str) -> None:
    """Saved by two ranks with uneven experts, with the state of the optimizer; read by a whole layer, and by two."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    options = CASES["uneven experts"]
    layer, reference = make_layer(**options), make_layer(**options)
    parallelize_moe(layer, ep_mesh=mesh)
    assert list(layer.state_dict()) == list(reference.state_dict())
    assert all(torch.equal(whole(tensor), reference.state_dict()[name]) for name, tensor in layer.state_dict().items())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x, dy = tokens_of(0, 7)
    layer(x).backward(dy)
    optimizer.step()
    wanted = get_state_dict(layer, optimizer)
    dcp.save({"model": wanted[0], "optimizer": wanted[1]}, checkpoint_id=folder)
    for spread in (False, True):
        fresh = make_layer(**options)
        if spread:
            parallelize_moe(fresh, ep_mesh=mesh)
        optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1)
        state = dict(zip(("model", "optimizer"), get_state_dict(fresh, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(fresh, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        got = get_state_dict(fresh, optimizer)
        for name, parameter in wanted[0].items():
            assert not torch.equal(whole(parameter), reference.state_dict()[name])
            assert torch.equal(whole(got[0][name]), whole(parameter)), name
        for name, moments in wanted[1]["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(whole(got[1]["state"][name][key]), whole(moments[key])), (name, key)


def test_checkpoints(tmp_path: Any) -> None:
    run_ranks(check_checkpoints, 2, str(tmp_path))


# ---------------------------------------------------------------- bad input


def check_bad_input(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "tp"))
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for message, arguments in (
        ("moe is a Linear, expected a sonic.MoE", (nn.Linear(2, 2), {"ep_mesh": mesh["ep"]})),
        ("moe is a OptimizedModule, expected a sonic.MoE", (torch.compile(make_layer()), {"ep_mesh": mesh["ep"]})),
        ("ep_mesh is a int, expected a one-dimensional DeviceMesh", (make_layer(), {"ep_mesh": 2})),
        ("ep_mesh is a mesh of 2 dimensions", (make_layer(), {"ep_mesh": mesh})),
        ("tp_reduce is 'mean', expected one of", (make_layer(), {"tp_mesh": other, "tp_reduce": "mean"})),
        ("overlap is True", (make_layer(), {"overlap": True})),
        (
            "intermediate_size is 7, expected a multiple of tp = 2",
            (make_layer(intermediate_size=7), {"tp_mesh": other}),
        ),
        ("of different meshes, expected slices of one", (make_layer(), {"ep_mesh": mesh["ep"], "tp_mesh": other})),
        (
            "spread over ranks already, expected a layer that was not given to",
            (parallelize_moe(make_layer(), ep_mesh=mesh["ep"]), {"ep_mesh": mesh["ep"]}),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize_moe(arguments[0], **arguments[1])
    layer = parallelize_moe(make_layer(), ep_mesh=mesh["ep"])
    with pytest.raises(ValueError, match=r"sonic.MoE: x is \(3, 5\)"):
        layer(torch.zeros(3, 5, dtype=torch.float64))


def test_bad_input() -> None:
    run_ranks(check_bad_input, 2)


def test_parts_are_those_of_chunk() -> None:
    for size in range(0, 12):
        for num_parts in range(1, 6):
            offsets = part_offsets(size, num_parts)
            chunks = [len(chunk) for chunk in torch.arange(size).chunk(num_parts)] if size else []
            assert [b - a for a, b in zip(offsets, offsets[1:], strict=False)] == chunks + [0] * (
                num_parts - len(chunks)
            )
