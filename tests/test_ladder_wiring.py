"""What each sub-block reads, against the equations written out; and how a wiring is named and kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sonic
from sonic.parallel.stack import LadderBlock, LadderStack
from sonic.parallel.wiring import WIRINGS, Wiring

D = 6


class Core(nn.Module):
    """A core that is no linear map: (..., D) -> (..., D)."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(D, hidden, bias=False, dtype=torch.float64)
        self.down = nn.Linear(hidden, D, bias=False, dtype=torch.float64)

    def forward(self, n: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(n)))


def dense_block() -> LadderBlock:
    return LadderBlock(_norm(), Core(), _norm(), Core())


def moe_block(shared: int = 8) -> LadderBlock:
    moe = sonic.MoE(D, 8, 4, 2, shared_intermediate_size=shared, dtype=torch.float64, backend="reference")
    return LadderBlock(_norm(), Core(), _norm(), moe)


def _norm() -> nn.Module:
    norm = nn.RMSNorm(D, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    return norm


def sub_blocks(block: LadderBlock) -> tuple[Callable[[Tensor], Tensor], ...]:
    """a, s and r of a layer, norms inside; s(x) + r(x) is the MLP, all of it r where it is dense."""

    def attention(x: Tensor) -> Tensor:
        return block.attention(block.attention_norm(x))

    def shared(x: Tensor) -> Tensor:
        n = block.mlp_norm(x)
        has_shared = isinstance(block.mlp, sonic.MoE) and block.mlp.shared is not None
        return block.mlp.shared(n.reshape(-1, D)).view(x.shape) if has_shared else torch.zeros_like(x)

    def routed(x: Tensor) -> Tensor:
        n = block.mlp_norm(x)
        return block.mlp(n) - shared(x)

    return attention, shared, routed


def equations(blocks: list[LadderBlock], wiring: Wiring, x: Tensor) -> Tensor:
    """The table of :mod:`sonic.parallel.wiring`, line by line."""
    before_m, before_r = x, x  # x_{i-1} - m_{i-1} and x_{i-1} - r_{i-1}
    for block, name in zip(blocks, wiring, strict=True):
        a_of, s_of, r_of = sub_blocks(block)
        if name == "standard":
            a = a_of(x)
            s, r = s_of(x + a), r_of(x + a)
        elif name == "parallel":
            a, s, r = a_of(x), s_of(x), r_of(x)
        elif name == "ladder":
            a, s, r = a_of(before_m), s_of(x), r_of(x)
        elif name == "farskip":
            a, s, r = a_of(before_r), s_of(x), r_of(x)
        else:
            a = a_of(x)
            s, r = s_of(x + a), r_of(x)
        is_moe = isinstance(block.mlp, sonic.MoE)
        before_m = x if name == "parallel" else x + a  # the layer is one sub-block, or its MLP is the last one
        before_r = x + a + s if is_moe and name in ("farskip", "shortcut") else x + a + s + r
        x = x + a + s + r
    return x


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stack_is_the_equations(wiring: str) -> None:
    blocks = [moe_block() for _ in range(3)]
    check(blocks, Wiring((wiring,) * 3))


@pytest.mark.parametrize("pair", list(itertools.product(WIRINGS[:3], repeat=3)), ids="-".join)
def test_borders_between_dense_layers(pair: tuple[str, ...]) -> None:
    check([dense_block() for _ in pair], Wiring(pair))


@pytest.mark.parametrize("pair", list(itertools.product(WIRINGS, repeat=2)), ids="-".join)
def test_borders_between_moe_layers(pair: tuple[str, ...]) -> None:
    check([moe_block(), moe_block(0), moe_block()], Wiring((*pair, pair[0])))


def check(blocks: list[LadderBlock], wiring: Wiring) -> None:
    stack = LadderStack(blocks, wiring)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(x)
    y, wanted = stack(x), equations(blocks, wiring, x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    sources = [x, *stack.parameters()]
    grads = torch.autograd.grad(y, sources, seed)
    for grad, want in zip(grads, torch.autograd.grad(wanted, sources, seed), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


def test_first_attention_and_first_mlp_read_the_embedding() -> None:
    block = dense_block()
    x = torch.randn(3, D, dtype=torch.float64)
    a_of, _, m_of = sub_blocks(block)
    torch.testing.assert_close(LadderStack([block])(x), x + a_of(x) + m_of(x))


def test_wirings_differ() -> None:
    blocks = [moe_block() for _ in range(3)]
    x = torch.randn(4, D, dtype=torch.float64)
    outputs = [LadderStack(blocks, wiring)(x) for wiring in WIRINGS]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(outputs, 2))


def test_farskip_without_shared_experts_is_ladder() -> None:
    blocks = [moe_block(0) for _ in range(3)]
    x = torch.randn(4, D, dtype=torch.float64)
    assert LadderStack(blocks, "farskip")(x).equal(LadderStack(blocks, "ladder")(x))


def test_empty_ladder_is_the_plain_model_bitwise() -> None:
    blocks = [dense_block(), moe_block()]
    x = torch.randn(4, D, dtype=torch.float64)
    y = x
    for block in blocks:
        y = y + block.attention(block.attention_norm(y))
        y = y + block.mlp(block.mlp_norm(y))
    assert LadderStack(blocks, Wiring.build(2, "ladder", []))(x).equal(y)
    assert nn.Sequential(*blocks)(x).equal(y)  # each alone


def test_wiring_adds_no_parameter() -> None:
    blocks = [moe_block() for _ in range(2)]
    keys = [list(LadderStack(blocks, wiring).state_dict()) for wiring in WIRINGS]
    assert all(names == keys[0] for names in keys)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("upper_half", [3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("none", []),
        (2, [3, 4]),
        (0, []),
        ([0, -1], [0, 4]),
        ((), []),
    ],
)
def test_layers_are_chosen(layers: object, chosen: list[int]) -> None:
    wiring = Wiring.build(5, "ladder", layers)  # type: ignore[arg-type]
    assert [index for index, name in enumerate(wiring) if name == "ladder"] == chosen
    assert {wiring[index] for index in set(range(5)) - set(chosen)} <= {"standard"}


@pytest.mark.parametrize(
    "wiring",
    [
        *(Wiring.build(4, name) for name in WIRINGS),
        Wiring(("standard", "ladder", "farskip", "parallel")),
        Wiring.build(3, "ladder", "none"),
        Wiring.build(3, "parallel", "all"),
    ],
    ids=str,
)
def test_config_keeps_the_wiring(wiring: Wiring) -> None:
    config = {"hidden_size": 8, **json.loads(json.dumps(wiring.to_config()))}
    assert Wiring.from_config(config) == wiring


def test_config_by_hand() -> None:
    assert Wiring.from_config({"num_layers": 4, "wiring": "ladder", "ladder_layers": 1}).layers[2:] == (
        "standard",
        "ladder",
    )
    assert set(Wiring.from_config({"num_layers": 4, "wiring": "ladder"})) == {"ladder"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Wiring.build(4, "chute"), "wiring is 'chute', expected one of 'standard'"),
        (lambda: Wiring.build(4, "ladder", "lower_half"), "ladder_layers is 'lower_half', expected one of"),
        (lambda: Wiring.build(4, "ladder", 5), "ladder_layers is 5, expected a number of layers from 0 to 4"),
        (lambda: Wiring.build(4, "ladder", True), "ladder_layers is True, expected"),
        (lambda: Wiring.build(4, "ladder", [4]), r"ladder_layers is \[4\], expected indices of 4 layers"),
        (lambda: Wiring.build(4, "ladder", [1, -3]), "each layer once"),
        (lambda: Wiring.build(0), "num_layers is 0, expected a positive integer"),
        (lambda: Wiring(("ladder", "x")), r"layers\[1\] is 'x'"),
        (lambda: Wiring.from_config({"wiring": "ladder"}), "with 'num_layers'"),
        (lambda: Wiring.from_config({"num_layers": 3, "wiring": ["ladder"]}), "one for each of 3 layers"),
        (lambda: LadderStack([dense_block()], "farskip"), r"wiring\[0\] is 'farskip', expected 'standard', 'parallel'"),
        (lambda: LadderStack([dense_block()], Wiring.build(2)), "wiring is for 2 layers, expected one for the 1 block"),
        (lambda: LadderStack([nn.Linear(2, 2)]), r"blocks\[0\] is a Linear, expected a LadderBlock"),  # type: ignore
        (lambda: LadderStack([dense_block()], overlap="on"), "overlap is 'on', expected one of 'off'"),
        (lambda: LadderStack([dense_block()], backward_order="x"), "backward_order is 'x', expected one of 'seqnr'"),
        (lambda: LadderStack([dense_block()], sequence_parallel=True), "sequence_parallel is True, expected tensor-"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
