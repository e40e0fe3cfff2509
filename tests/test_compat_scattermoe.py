"""``sonic.compat.scattermoe``: products against a loop, gradients, both versions' arguments, bytes, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sonic.compat import scattermoe
from sonic.compat.scattermoe import ParallelExperts, flatten_sort_count, parallel_linear
from sonic.compat.scattermoe.kernels import ops
from sonic.compat.scattermoe.mlp import GLUMLP, MLP
from tests.helpers import assert_close, relative_error
from tests.test_memory import Saved

T, E, K, WIDTH_IN, WIDTH_OUT = 29, 5, 3, 11, 7


def choice(num_tokens: int = T, num_experts: int = E, top_k: int = K) -> Tensor:
    """Experts 0 and the last stay empty; some tokens have an expert twice."""
    return torch.randint(1, num_experts - 1, (num_tokens, top_k))


def slots_loop(rows_P: Tensor, weight_EIO: Tensor, bias: Tensor | None, expert_P: Tensor) -> Tensor:
    """Slot by slot: ``rows[p] @ W[e] + b[e]``."""
    out = torch.einsum("pi,pio->po", rows_P, weight_EIO[expert_P])
    return out if bias is None else out + bias[expert_P]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("grouped_in", "grouped_out", "gated"),
    [case for case in product((False, True), repeat=3) if not (case[1] and case[2])],
)
def test_products_and_all_gradients(grouped_in: bool, grouped_out: bool, gated: bool, bias: bool) -> None:
    index = choice()
    maps = flatten_sort_count(index, E)
    expert_R, slot_R, _ = maps
    k = 1 if grouped_in else K
    x = torch.randn(T * K if grouped_in else T, WIDTH_IN, dtype=torch.float64, requires_grad=True)
    parameter = torch.randn(E, WIDTH_OUT, WIDTH_IN, dtype=torch.float64, requires_grad=True)
    b = torch.randn(E, WIDTH_OUT, dtype=torch.float64, requires_grad=True) if bias else None
    gates = torch.randn(T, K, dtype=torch.float64, requires_grad=True) if gated else None
    weight = parameter.transpose(1, 2)
    out = parallel_linear(x, weight, k, *maps, b, gates, grouped_in, grouped_out)

    rows_P = x.index_select(0, torch.argsort(slot_R)) if grouped_in else x.repeat_interleave(K, 0)
    wanted = slots_loop(rows_P, weight, b, index.flatten())
    if gates is not None:
        wanted = (wanted.view(T, K, -1) * gates[..., None]).sum(1)
    elif grouped_out:
        wanted = wanted[slot_R]
    assert_close("out", out, wanted.detach())
    leaves = [leaf for leaf in (x, parameter, b, gates) if leaf is not None]
    dout = torch.randn_like(wanted)
    got, exact = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(wanted, leaves, dout)
    for name, *pair in zip("x W b gates".split(), got, exact, strict=False):
        assert_close(name, *pair)
    inputs = (x, weight, b, gates)
    wanted_grads = dict(zip([place for place in range(4) if inputs[place] is not None], exact, strict=True))
    for place, full in wanted_grads.items():  # each is right also where it alone is asked for
        alone = [None if tensor is None else tensor.detach() for tensor in inputs]
        alone[place].requires_grad_()
        again = parallel_linear(alone[0], alone[1], k, *maps, *alone[2:], grouped_in, grouped_out)
        (grad,) = torch.autograd.grad(again, [alone[place]], dout)
        assert_close("alone", grad.transpose(1, 2) if place == 1 else grad, full)


def test_gradcheck() -> None:
    maps = flatten_sort_count(choice(6), E)

    def product(x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
        return parallel_linear(x, weight, K, *maps, bias, gates)

    sizes = ((6, 3), (E, 3, 2), (E, 2), (6, K))
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(product, leaves)
    (dx,) = torch.autograd.grad(product(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of its gradient"):
        dx.sum().backward()


def test_both_versions_of_the_arguments_give_the_same() -> None:
    index = choice()
    expert_R, slot_R = ops.flatten_and_sort(index)
    blocks, ends = ops.padded_block_indices(expert_R, E)
    maps = flatten_sort_count(index, E)
    assert torch.equal(ends, maps[2])
    experts = ParallelExperts(E, WIDTH_IN, WIDTH_OUT)
    x, gates = torch.randn(T, WIDTH_IN), torch.rand(T, K)
    weight = experts.weight.permute(0, 2, 1)
    new, old = maps, (expert_R, slot_R, blocks, ends)
    outputs = [
        parallel_linear(x, weight, K, *new, None, gates),
        parallel_linear(x, weight, K, *new, gates=gates),
        parallel_linear(x, weight, K, *old, gates),
        parallel_linear(x, weight, K, *old, gates=gates, grouped_in=False),
        parallel_linear(x, weight, K, *old[:2], padded_block_idxs=blocks, expert_offsets=ends, gates=gates),
        experts(x, K, *new, gates),
        experts(x, K, *old, gates),
        experts(x, K, *old, gates=gates, grouped_out=False),
    ]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_blocks_hold_rows_of_one_expert(block: int) -> None:
    expert_R, _ = ops.flatten_and_sort(choice(200))
    starts, ends = ops.padded_block_indices(expert_R, E, block)
    wanted, first = [], 0
    for end in ends.tolist():
        wanted += list(range(first, end, block))
        first = end
    assert starts.tolist() == wanted and starts.dtype == expert_R.dtype


def test_kernels_by_their_names() -> None:
    index = choice()
    expert_R, slot_R, ends = flatten_sort_count(index, E)
    x = torch.randn(T, WIDTH_IN, dtype=torch.float64)
    parameter, bias = torch.randn(E, WIDTH_OUT, WIDTH_IN).double(), torch.randn(E, WIDTH_OUT).double()
    weight = parameter.transpose(1, 2)
    by_slot = slots_loop(x.repeat_interleave(K, 0), weight, bias, index.flatten())
    rows = ops.group(x, slot_R, fan_out=K)
    assert torch.equal(rows, x[slot_R // K])
    coeff = torch.rand(T * K).double()
    assert torch.equal(ops.group(x, slot_R, coeff, K), x[slot_R // K] * coeff[slot_R, None])
    assert_close("slots", ops.scatter2scatter(x, weight, expert_R, slot_R, K, bias), by_slot)
    for x_in, k, is_grouped in ((x, K, False), (rows, 1, True)):
        out = torch.full_like(by_slot, torch.nan)
        ops.scatter2scatter(x_in, weight, expert_R, slot_R, k, bias, x_grouped=is_grouped, y_grouped=True, out=out)
        assert_close("rows", out, by_slot[slot_R])
        out = torch.full_like(by_slot, torch.nan)
        ops.scatter2scatter(x_in, weight, expert_R, slot_R, k, bias, x_grouped=is_grouped, out=out)
        assert_close("slots", out, by_slot)
    dy = torch.randn(T * K, WIDTH_OUT).double()
    dw, db = ops.group_bwd_W(dy, rows, ends, E, has_bias=True)
    for e in range(E):
        mask = expert_R == e
        assert_close("dW", dw[e], rows[mask].T @ dy[mask])
        assert_close("db", db[e], dy[mask].sum(0))
    assert ops.group_bwd_W(dy, rows, ends, E)[1] is None


def mlp_loop(mlp: MLP | GLUMLP, x: Tensor, p: Tensor, index: Tensor) -> Tensor:
    out = 0
    for k in range(index.shape[1]):
        expert = index[:, k]
        h = torch.einsum("td,thd->th", x, mlp.experts.weight[expert])
        h = h if mlp.experts.bias is None else h + mlp.experts.bias[expert]
        if isinstance(mlp, GLUMLP):
            up, gate = h.chunk(2, dim=-1)
            h = up * mlp.activation(gate)
        else:
            h = mlp.activation(h)
        y = torch.einsum("th,tdh->td", h, mlp.output_experts.weight[expert])
        y = y if mlp.output_experts.bias is None else y + mlp.output_experts.bias[expert]
        out = out + p[:, k, None] * y
    return out


ACTIVATIONS = [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.GELU(approximate="tanh"), nn.functional.silu]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda one: getattr(one, "__name__", str(one)))
@pytest.mark.parametrize("kind", [MLP, GLUMLP])
def test_layers_and_all_gradients(kind: Any, activation: Callable[[Tensor], Tensor], bias: bool) -> None:
    mlp = kind(10, 13, E, K, bias=bias, activation=activation).double()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8, 10, dtype=torch.float64, requires_grad=True)
    index, p = choice(24), torch.rand(24, K, dtype=torch.float64, requires_grad=True)
    leaves = [x, p, *mlp.parameters()]
    out, wanted = mlp(x, p, index), mlp_loop(mlp, x.reshape(24, 10), p, index).view(3, 8, 10)
    dout = torch.randn_like(out)
    assert_close("out", out, wanted.detach())
    grads = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(wanted, leaves, dout)
    for place, pair in enumerate(zip(*grads, strict=True)):
        assert_close(str(place), *pair)
    assert torch.equal(out, mlp(x, p.view(3, 8, K), index.view(3, 8, K).int()))


def test_a_hook_on_a_product_is_called() -> None:
    mlp, seen = MLP(8, 6, E, K, activation=nn.GELU()), []
    x, p, index = torch.randn(T, 8), torch.rand(T, K), choice()
    fused = mlp(x, p, index)
    mlp.experts.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert relative_error(mlp(x, p, index), fused) < 1e-6
    assert seen == [(T * K, 6)]


@pytest.mark.parametrize(
    ("kind", "activation", "kept"),
    [
        (MLP, nn.GELU(), lambda R, D, H: T * D + R * H),  # tokens and H: sonic.moe_mlp
        (MLP, nn.Tanh(), lambda R, D, H: T * D + R * H),  # tokens, and A, which is all that tanh keeps too
        (GLUMLP, nn.SiLU(), lambda R, D, H: T * D + R * 2 * H + 2 * R * H),  # tokens, H, act(gate), A
    ],
)
def test_bytes_that_are_kept(kind: Any, activation: nn.Module, kept: Callable[[int, int, int], int]) -> None:
    D, H, R = 64, 48, T * K
    mlp = kind(D, H, E, K, activation=activation).bfloat16()
    x, p, index = torch.randn(T, D).bfloat16().requires_grad_(), torch.rand(T, K, requires_grad=True), choice()
    with Saved(list(mlp.parameters())) as saved:
        mlp(x, p, index)
    values = sum(tensor.untyped_storage().nbytes() for tensor in saved.tensors.values() if tensor.is_floating_point())
    assert values == 2 * kept(R, D, H) + 4 * R  # bf16, and the float32 scores
    integers = sum(
        tensor.untyped_storage().nbytes() for tensor in saved.tensors.values() if not tensor.is_floating_point()
    )
    assert integers <= 8 * (R + E + 1)


def test_no_weight_is_copied() -> None:
    experts = ParallelExperts(E, 16, 16)
    weight = experts.weight.permute(0, 2, 1)
    maps = flatten_sort_count(choice(), E)
    with Saved([]) as saved:
        out = parallel_linear(torch.randn(T, 16, requires_grad=True), weight, K, *maps)
    own = experts.weight.untyped_storage()._cdata
    assert own in saved.tensors
    sizes = [t.untyped_storage().nbytes() for key, t in saved.tensors.items() if key != own]
    assert max(sizes) < experts.weight.untyped_storage().nbytes()
    out.sum().backward()
    assert experts.weight.grad.is_contiguous()


def test_no_token_and_one_token() -> None:
    for kind, tokens in product((MLP, GLUMLP), (0, 1)):
        mlp = kind(8, 6, E, K, bias=True, activation=nn.GELU())
        x = torch.randn(tokens, 8, requires_grad=True)
        out = mlp(x, torch.rand(tokens, K), choice(tokens))
        assert out.shape == (tokens, 8)
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in mlp.parameters())


def test_autocast_and_bf16() -> None:
    mlp = GLUMLP(32, 24, E, K)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, p, index = torch.randn(T, 32), torch.rand(T, K), choice()
    wanted = copy.deepcopy(mlp).double()(x.double(), p.double(), index)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mlp(x, p, index)
    assert cast.dtype == torch.bfloat16 and relative_error(cast, wanted) < 1e-2
    half = copy.deepcopy(mlp).bfloat16()(x.bfloat16(), p.bfloat16(), index)
    assert half.dtype == torch.bfloat16 and relative_error(half, wanted) < 1e-2


def test_an_expert_out_of_range_is_refused_in_a_graph_too() -> None:
    """There, as on a GPU, by an assertion of the device: nothing reads past the weights, or gives other numbers."""
    mlp = MLP(8, 4, E, K, activation=nn.GELU())
    x, p = torch.randn(T, 8), torch.rand(T, K)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(x, p, good := choice()), mlp(x, p, good)) < 1e-6
        for bad in (E, -1):
            index = choice()
            index[3, 1] = bad
            with pytest.raises(RuntimeError, match=f"expert_idxs is out of range, expected .* < num_experts = {E}"):
                compiled(x, p, index)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_more_experts_than_a_narrow_index_counts(dtype: torch.dtype) -> None:
    index = torch.tensor([[3, 100], [100, 7]])
    _, slots, ends = flatten_sort_count(index.to(dtype), 300)
    want = flatten_sort_count(index, 300)
    assert (
        torch.equal(slots, want[1])
        and torch.equal(ends, want[2])
        and ends[[2, 3, 7, 100, 299]].tolist() == [0, 1, 2, 4, 4]
    )


def test_what_is_refused() -> None:
    index = choice()

    def call_with(bad: int) -> None:
        flatten_sort_count(torch.tensor([[1, bad]]), E)

    maps = flatten_sort_count(index, E)
    x, weight = torch.randn(T, WIDTH_IN), torch.randn(E, WIDTH_OUT, WIDTH_IN).transpose(1, 2)
    for match, call in (
        (r"expert_idxs is out of range \(9\), expected 0 <= expert_idxs < num_experts = 5", lambda: call_with(9)),
        (r"expert_idxs is out of range \(-1\)", lambda: call_with(-1)),
        ("expert_idxs is float32", lambda: flatten_sort_count(torch.rand(3, 2), E)),
        ("inputs is", lambda: parallel_linear(x[:, :-1], weight, K, *maps)),
        ("sorted_scattered_idxs is", lambda: parallel_linear(x, weight, K + 1, *maps)),
        ("k is 3, expected 1", lambda: parallel_linear(x, weight, K, *maps, grouped_in=True)),
        ("grouped_out is True", lambda: parallel_linear(x, weight, K, *maps, None, torch.rand(T, K), False, True)),
        ("gates is", lambda: parallel_linear(x, weight, K, *maps, gates=torch.rand(T, 2))),
        ("expert_offsets is", lambda: parallel_linear(x, weight, K, *maps[:2], maps[2][:-1])),
        ("expert_weights is", lambda: parallel_linear(x, weight.double(), K, *maps)),
        ("expert_biases is", lambda: parallel_linear(x, weight, K, *maps, torch.rand(E, WIDTH_IN))),
        ("expert_p is", lambda: MLP(8, 4, E, K, activation=nn.GELU())(torch.rand(T, 8), torch.rand(T, 2), index)),
        ("x is", lambda: MLP(8, 4, E, K, activation=nn.GELU())(torch.rand(T, 9), torch.rand(T, K), index)),
        ("num_experts is 0", lambda: ParallelExperts(0, 4, 4)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for match, call in (
        ("expert_offsets is missing", lambda: parallel_linear(x, weight, K, *maps[:2])),
        ("fp8 is no argument", lambda: parallel_linear(x, weight, K, *maps, fp8=True)),
        ("gates is given twice", lambda: parallel_linear(x, weight, K, *maps, None, None, gates=None)),
        ("arguments after", lambda: parallel_linear(x, weight, K, *maps, None, None, False, False, 1)),
    ):
        with pytest.raises(TypeError, match=match):
            call()


@pytest.mark.slow
def test_compiles_whole() -> None:
    for kind in (MLP, GLUMLP):
        mlp = kind(16, 8, E, K, activation=nn.SiLU())
        x, p, index = torch.randn(T, 16, requires_grad=True), torch.rand(T, K), choice()
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        grads = [
            torch.autograd.grad(run(x, p, index).square().sum(), [x, *mlp.parameters()]) for run in (mlp, compiled)
        ]
        assert all(relative_error(*pair) < 1e-6 for pair in zip(*grads, strict=True))


def test_public_names_are_those_of_the_package() -> None:
    assert scattermoe.kernels.ops.ALLOW_TF32 is False
    assert scattermoe.parallel_experts.ParallelLinear and scattermoe.mlp.MLP and scattermoe.flatten_sort_count
