"""On a GPU: streams and threads at once, fifty repeats, and memory that comes back; for each backend that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic.routing import TokenRounding, TopKRouter
from tests.helpers import assert_same_bits, in_threads

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BACKENDS = ["triton", pytest.param("cute", marks=pytest.mark.hopper)]
T, D, N, E, K = 1000, 256, 128, 16, 4
Step = Callable[[], dict[str, Tensor]]


def make_step(backend: str, seed: int, rounds: bool = False) -> Step:
    """One training step of a layer of its own; output and every gradient come back, no ``.grad`` is touched."""
    if backend == "cute":
        pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)

    router: Any = TopKRouter(D, E, K, aux_loss_coeff=0.01, device=DEVICE)
    if rounds:
        router = TokenRounding(router, tile_rows=64)
    layer = sonic.MoE(D, N, E, K, router=router, backend=backend, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(*parameter.shape) / parameter.shape[-1] ** 0.5)
    x, dy = draw(T, D), draw(T, D)

    def step() -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        leaves = {"x": leaf, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    return step


@pytest.mark.parametrize("rounds", [False, True], ids=["top-k", "rounding"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_at_once(backend: str, rounds: bool) -> None:
    """What several streams have under way together is what each computes alone."""
    steps = [make_step(backend, seed, rounds) for seed in range(4)]
    want = [step() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(8):
        got = []
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                got.append(step())
        torch.cuda.synchronize()
        for one, wanted in zip(got, want, strict=True):
            assert_same_bits(one, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_with_a_stream_each(backend: str) -> None:
    steps = [make_step(backend, seed) for seed in range(4)]
    want = [step() for step in steps]
    torch.cuda.synchronize()

    def run(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(8):
                got = steps[number]()
                stream.synchronize()
                assert_same_bits(got, want[number])

    in_threads([lambda number=number: run(number) for number in range(4)])


@pytest.mark.parametrize("rounds", [False, True], ids=["top-k", "rounding"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_times_the_same_bits(backend: str, rounds: bool) -> None:
    step = make_step(backend, 0, rounds)
    want = step()
    for _ in range(49):
        assert_same_bits(step(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_leave_nothing(backend: str) -> None:
    step = make_step(backend, 0)
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() - reserved <= 2**20
