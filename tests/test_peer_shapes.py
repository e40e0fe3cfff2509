"""The shapes of other packages' test suites, through ``sonic.compat``, on unit-scale inputs and by relative error.

Lists of shapes alone are taken from there. What is computed is measured against float64, where plain torch in the same
dtype is measured too (``assert_as_good_as_torch``); integers are compared exactly. Sizes that a processor cannot do in
reasonable time are divided, and say so; a few are run in full (``-m slow``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sonic.compat.scattermoe.mlp import MLP
from sonic.compat.scattermoe.parallel_experts import flatten_sort_count, parallel_linear
from sonic.compat.sonicmoe import (
    ActivationType,
    count_cumsum,
    moe_general_routing_inputs,
    moe_TC_softmax_topk_layer,
)
from sonic.compat.sonicmoe.metadata import TC_topk_router_metadata_triton, general_routing_router_metadata_triton
from tests.helpers import assert_as_good_as_torch, make_problem, relative_error, results, short, torch_activation

pytestmark = pytest.mark.long

Record = Callable[[str, object], None]


def compare(
    record: Record, got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Every tensor as right as plain torch; the worst relative error goes into the report of the run (--junit-xml)."""
    assert set(got) == set(exact) == set(plain)
    record("relative_error", max(relative_error(got[name], exact[name]) for name in got))
    for name in got:
        if got[name].numel() < 16:  # the score gradients of one token: sums that cancel, and torch's may do so by luck
            assert relative_error(got[name], exact[name]) <= 16 * torch.finfo(dtype).eps, name
        else:
            assert_as_good_as_torch(name, got[name], exact[name], plain[name], dtype)


def loop(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scores: Tensor,
    expert_index: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str | nn.Module,
    glu_layout: str = "concatenated",
) -> Tensor:
    """One expert after the other in plain torch; scores and sums in at least float32.

    Weights come apart by ``unbind``: indexing would cost a gradient of the size of all experts for each of up to 256.
    """
    out = torch.zeros(x.shape, dtype=scores.dtype)
    for expert, (up, down) in enumerate(zip(w1.unbind(), w2.unbind(), strict=True)):
        token, k = torch.where(expert_index == expert)
        h = nn.functional.linear(x[token], up, None if b1 is None else b1[expert])
        a = torch_activation(activation, glu_layout, h) if isinstance(activation, str) else activation(h)
        y = nn.functional.linear(a, down, None if b2 is None else b2[expert])
        out = out.index_add(0, token, y * scores[token, k, None])
    return out.to(x.dtype)


def slow(cases: list[tuple[Any, ...]], quick: Callable[[tuple[Any, ...]], bool]) -> list[Any]:
    """The cases as parameters, ``slow`` unless ``quick`` says otherwise."""
    return [
        pytest.param(
            *case,
            id="-".join(short(value) if isinstance(value, torch.dtype) else str(value) for value in case),
            marks=() if quick(case) else pytest.mark.slow,
        )
        for case in cases
    ]


# ---------------------------------------------------------------- scattermoe: tests/test_mlp.py, its 90 cases

SCATTERMOE = [
    (length, width, (4 * width) // k, 8, k, bias)
    for bias in (False, True)
    for length in (1, 256, 512)
    for width in (128, 256, 512, 600, 100)
    for k in (2, 3, 4)
]


@pytest.mark.parametrize(
    ("T", "D", "N", "E", "K", "bias"),
    slow(SCATTERMOE, lambda case: case[0] == 1 and case[1] in (128, 100) or case[:2] == (256, 100)),
)
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "composed"])
def test_shapes_of_scattermoe(
    T: int, D: int, N: int, E: int, K: int, bias: bool, is_fused: bool, record_property: Record
) -> None:
    assert len(SCATTERMOE) == 90
    problem = make_problem(T, D, N, E, K, torch.float32, "gelu", bias=bias)

    def layer(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor, **biases: Any) -> Tensor:
        # a lambda is an activation that the fused path does not know
        activation: Any = nn.GELU() if is_fused else lambda h: nn.functional.gelu(h)
        mlp = MLP(D, N, E, K, bias=bias, activation=activation)
        values = {"experts.weight": w1, "output_experts.weight": w2}
        if bias:
            values |= {"experts.bias": biases["b1"], "output_experts.bias": biases["b2"]}
        return torch.func.functional_call(mlp, values, (x, scores, expert_index))

    exact, plain = results(loop, problem, torch.float64), results(loop, problem)
    compare(record_property, results(layer, problem), exact, plain, torch.float32)


# ---------------------------------------------------------------- sonic-moe: tests/moe_test.py

SONICMOE = [
    (8192, 768, 256, 128, 8),
    (8192, 768, 512, 64, 4),
    (8192, 768, 1024, 32, 2),
    (8192, 1536, 256, 128, 8),
    (8192, 1536, 512, 64, 4),
    (8192, 1536, 1024, 32, 2),
    (8192, 4096, 256, 256, 16),
    (8192, 4096, 512, 128, 8),
    (8192, 4096, 1024, 64, 4),
    (8192, 4096, 512, 256, 16),
    (8192, 4096, 1024, 128, 8),
    (8192, 4096, 2048, 64, 4),
]


def router_layer(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    K: int,
    expert_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, and the experts that it chose; a choice that was made elsewhere is taken."""
    logits = nn.functional.linear(x, router_w)
    if expert_TK is None:
        expert_TK = logits.topk(K, dim=-1).indices
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = logits.to(wide).gather(1, expert_TK).softmax(-1)
    options = {"activation": "swiglu", "glu_layout": "interleaved"}
    return loop(x, w1, w2, scores, expert_TK, b1=b1, b2=b2, **options), expert_TK


def check_sonicmoe(T: int, D: int, N: int, E: int, K: int, bias: bool, dtype: torch.dtype, record: Record) -> None:
    problem = make_problem(T, D, N, E, K, dtype, glu_layout="interleaved", bias=bias)
    # logits on unit scale, the same in every dtype as far as the choice goes: what is compared is one choice
    router_w = torch.randn(E, D, generator=torch.Generator().manual_seed(2)).div(D**0.5).to(dtype)

    def leaves(dtype: torch.dtype) -> dict[str, Tensor | None]:
        values = {"x": problem.x, "router_w": router_w, "w1": problem.w1, "w2": problem.w2}
        values |= {"b1": problem.b1, "b2": problem.b2} if bias else {}
        given = {name: value.detach().to(dtype).requires_grad_() for name, value in values.items()}
        return given if bias else {**given, "b1": None, "b2": None}

    def finish(out: Tensor, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
        asked = {name: value for name, value in given.items() if value is not None}
        grads = torch.autograd.grad(out, list(asked.values()), problem.dout.to(out.dtype))
        return {"out": out.detach(), **dict(zip(asked, grads, strict=True))}

    given = leaves(dtype)
    out, logits, frequency = moe_TC_softmax_topk_layer(
        given["x"],
        given["router_w"],
        given["w1"].permute(1, 2, 0),
        given["b1"],
        given["w2"].permute(1, 2, 0),
        given["b2"],
        K,
        0,
        ActivationType.SWIGLU,
        False,
    )
    got = finish(out, given)
    expert_TK = logits.topk(K, dim=-1).indices
    assert torch.equal(frequency, torch.bincount(expert_TK.flatten(), minlength=E).int())
    wide, same = leaves(torch.float64), leaves(dtype)
    exact = finish(router_layer(**wide, K=K, expert_TK=expert_TK)[0], wide)
    plain = finish(router_layer(**same, K=K, expert_TK=expert_TK)[0], same)
    compare(record, got, exact, plain, dtype)


@pytest.mark.parametrize(
    ("size", "bias", "dtype"),
    slow(
        list(product(range(len(SONICMOE)), (False, True), (torch.float32, torch.bfloat16))),
        lambda case: case in [(0, True, torch.float32), (5, False, torch.bfloat16), (6, True, torch.bfloat16)],
    ),
)
def test_shapes_of_sonicmoe_divided(size: int, bias: bool, dtype: torch.dtype, record_property: Record) -> None:
    """T / 32, D / 8 and N / 8; E and K as they are."""
    T, D, N, E, K = SONICMOE[size]
    check_sonicmoe(T // 32, D // 8, N // 8, E, K, bias, dtype, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "D", "N", "E", "K"), [SONICMOE[0], SONICMOE[2]])
def test_shapes_of_sonicmoe_in_full(T: int, D: int, N: int, E: int, K: int, record_property: Record) -> None:
    check_sonicmoe(T, D, N, E, K, False, torch.float32, record_property)


# ---------------------------------------------------------------- sonic-moe: tests/count_cumsum_test.py

COUNT_EXPERTS = (4, 8, 72, 256, 1920, 2048, 16384, 50000)


def count_sizes() -> list[int]:
    draw = random.Random(0)
    sizes = {2**power + more for power in range(15) for more in range(10)}
    return [*sorted(sizes | {draw.randint(2000, 4000) for _ in range(50)}), 2097152]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("E", COUNT_EXPERTS)
def test_counts_of_sonicmoe(E: int, dtype: torch.dtype) -> None:
    for size in count_sizes():
        x = torch.randint(0, E, (size,), dtype=dtype)
        wanted = x.bincount(minlength=E)
        count, running = count_cumsum(x, E, do_cumsum=True)
        alone = count_cumsum(x=x, E=E, do_cumsum=False)
        assert count.dtype == running.dtype == alone.dtype == torch.int32
        assert count.equal(wanted.int()) and alone.equal(wanted.int()) and running.equal(wanted.cumsum(0).int()), size


# ---------------------------------------------------------------- sonic-moe: metadata; Liger: routing metadata

METADATA = [
    (10, 8, 2),
    (236, 16, 4),
    (1024, 128, 8),
    (8192, 128, 8),
    (8192, 64, 4),
    (8192, 32, 2),
    (8192, 256, 16),
    (32768, 128, 8),
    (1000, 96, 7),
    (50, 384, 3),
    (2048, 512, 10),
    (64, 8, 2),  # Liger, as the three below
    (128, 16, 4),
    (100, 8, 2),
    (256, 32, 8),
    (1, 8, 2),
]


def stress() -> Iterator[tuple[int, int, int]]:
    draw = random.Random(0)
    for _ in range(10):
        E = draw.randint(2, 127)
        yield draw.randint(1, 32767), E, draw.randint(1, min(E, 8))


def check_metadata(token: Tensor, expert: Tensor, T: int, E: int, K: int | None) -> None:
    num_rows = expert.numel()

    def fill() -> list[Tensor]:
        sizes = (E, E + 1, num_rows, num_rows, num_rows) + (() if K else (T + 1,))
        written = [torch.full((size,), -1, dtype=torch.int32) for size in sizes]
        if K:
            TC_topk_router_metadata_triton(expert.view(T, K), E, *written)
        else:
            general_routing_router_metadata_triton(token, expert, T, E, *written)
        return written

    written = fill()
    assert all(torch.equal(*pair) for pair in zip(written, fill(), strict=True)), "two runs differ"
    frequency, offset, gather, scatter, reverse, *per_token = written
    slots = torch.arange(num_rows, dtype=torch.int32)
    wanted = torch.bincount(expert, minlength=E)
    assert frequency.equal(wanted.int())
    assert offset.equal(nn.functional.pad(wanted.cumsum(0), (1, 0)).int())
    assert reverse[scatter.long()].equal(slots) and scatter[reverse.long()].equal(slots)
    assert expert[scatter.long()].equal(torch.repeat_interleave(torch.arange(E), wanted).to(expert.dtype))
    assert gather.equal(token[scatter.long()].int())
    if per_token:
        assert per_token[0].equal(nn.functional.pad(torch.bincount(token, minlength=T).cumsum(0), (1, 0)).int())


@pytest.mark.parametrize(("T", "E", "K"), [*METADATA, *stress()])
def test_metadata_of_sonicmoe(T: int, E: int, K: int) -> None:
    expert_TK = torch.rand(T, E).topk(K, dim=-1).indices.int()
    token = torch.arange(T, dtype=torch.int32).repeat_interleave(K)
    check_metadata(token, expert_TK.flatten(), T, E, K)
    check_metadata(token, expert_TK.flatten(), T, E, None)
    kept = torch.rand(T * K) < 0.6  # any number per token, none included
    check_metadata(token[kept], expert_TK.flatten()[kept], T, E, None)


@pytest.mark.parametrize(("T", "E", "experts"), [(64, 8, [0, 1]), (1, 8, [3, 5]), (512, 64, [63])])
def test_metadata_where_all_tokens_go_to_the_same_experts(T: int, E: int, experts: list[int]) -> None:
    expert_TK = torch.tensor(experts, dtype=torch.int32).expand(T, -1).contiguous()
    token = torch.arange(T, dtype=torch.int32).repeat_interleave(len(experts))
    check_metadata(token, expert_TK.flatten(), T, E, len(experts))


# ---------------------------------------------------------------- Liger: test_fused_moe.py

LIGER = [
    (7, 4, 64, 32, 2),
    (512, 8, 256, 128, 2),
    (512, 8, 97, 47, 2),
    (512, 7, 128, 64, 3),
    (512, 8, 256, 64, 1),
    (128, 8, 256, 64, 8),
    (1, 4, 32, 16, 2),
    (16, 4, 32, 16, 4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(("T", "E", "D", "N", "K"), LIGER)
def test_shapes_of_liger(T: int, E: int, D: int, N: int, K: int, dtype: torch.dtype, record_property: Record) -> None:
    """Gate rows before up rows, any routing of the caller's: its function's arguments."""
    problem = make_problem(T, D, N, E, K, dtype)

    def layer(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor, **_: Any) -> Tensor:
        token = torch.arange(T).repeat_interleave(K)
        views = (w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None)
        return moe_general_routing_inputs(
            x, scores.flatten(), token, expert_index.flatten(), *views, E, 0, "swiglu", concat_layout=True
        )[0]

    exact, plain = results(loop, problem, torch.float64), results(loop, problem)
    compare(record_property, results(layer, problem), exact, plain, dtype)


def test_all_tokens_of_liger_to_one_expert_twice(record_property: Record) -> None:
    """Its (32, 8, 64, 32, 2) with every choice expert 0: the sorted maps of scattermoe serve it, a plan refuses it."""
    T, E, D, N, K = 32, 8, 64, 32, 2
    problem = make_problem(T, D, N, E, K, torch.float32, "gelu")
    problem.expert_index.zero_()

    def layer(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor, **_: Any) -> Tensor:
        mlp = MLP(D, N, E, K, activation=nn.GELU())
        values = {"experts.weight": w1, "output_experts.weight": w2}
        return torch.func.functional_call(mlp, values, (x, scores, expert_index))

    exact, plain = results(loop, problem, torch.float64), results(loop, problem)
    compare(record_property, results(layer, problem), exact, plain, torch.float32)
    token = torch.arange(T).repeat_interleave(K)
    views = (problem.w1.permute(1, 2, 0), None, problem.w2.permute(1, 2, 0), None)
    with pytest.raises(ValueError, match="more than once"):
        moe_general_routing_inputs(
            problem.x, problem.scores.flatten(), token, problem.expert_index.flatten(), *views, E, 0, "gelu"
        )


# ---------------------------------------------------------------- xma: tests/layers/moe_test.py

_XMA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
XMA = [
    (E, K, 2048 // 8, 8192 // 8, is_glu, dtype)
    for dtype, E, K, is_glu in product(_XMA_DTYPES, (2, 4, 6, 8), (2, 4), (True, False))
    if K <= E
] + [(128, 8, 576, 256, is_glu, dtype) for dtype, is_glu in product(_XMA_DTYPES, (True, False))]


@pytest.mark.parametrize(
    ("E", "K", "D", "N", "is_glu", "dtype"),
    slow(XMA, lambda case: case[:2] == (6, 4)),
)
def test_shapes_of_xma(
    E: int, K: int, D: int, N: int, is_glu: bool, dtype: torch.dtype, record_property: Record
) -> None:
    """Seven tokens; ``nn.GLU`` and tanh-approximated GELU, which our experts lack, between two grouped products.

    D = 2,048 and N = 8,192 are divided by 8; (E, K, D, N) = (128, 8, 576, 256) is as there.
    """
    T = 7
    activation = nn.GLU() if is_glu else nn.GELU(approximate="tanh")
    problem = make_problem(T, D, N, E, K, dtype, "swiglu" if is_glu else "gelu")

    def layer(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor, **_: Any) -> Tensor:
        maps = flatten_sort_count(expert_index, E)
        h = parallel_linear(x, w1.transpose(1, 2), K, *maps, grouped_out=True)
        return parallel_linear(activation(h), w2.transpose(1, 2), 1, *maps, gates=scores, grouped_in=True)

    oracle = partial(loop, activation=activation)

    def plainly(x: Tensor, w1: Tensor, w2: Tensor, scores: Tensor, expert_index: Tensor, **_: Any) -> Tensor:
        return oracle(x, w1, w2, scores, expert_index)

    exact, plain = results(plainly, problem, torch.float64), results(plainly, problem)
    compare(record_property, results(layer, problem), exact, plain, dtype)
