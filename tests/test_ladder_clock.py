"""How much is hidden, on a clock that runs on FLOPs and bytes: the real program order, and no dependence on the
machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.overlap_clock import CASES, FLOPS, LAYERS, MEMORY, TOKENS, ranks_that_are_not_there, step
from sonic.parallel.clock import Link, VirtualClock
from sonic.parallel.overlap_report import OverlapReport
from sonic.parallel.stack import LadderBlock, LadderStack


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    with ranks_that_are_not_there(request.param) as mesh:
        yield mesh


each_case = pytest.mark.parametrize(("mesh", "width", "link"), CASES.values(), ids=CASES, indirect=["mesh"])


def forward_model(compute: float, link: float, *, ladder: bool) -> float:
    """End of the forward of all sub-blocks: see what each may start after."""
    done, sent = [0.0, 0.0], [0.0, 0.0]  # of the two sub-blocks before
    for _ in range(2 * LAYERS):
        done = [done[1], max(done[1], sent[0] if ladder else sent[1]) + compute]
        sent = [sent[1], max(sent[1], done[1]) + link]
    return max(sent)


def backward_model(core: float, weight_gradient: float, norm: float, link: float) -> float:
    """The same for the ladder's backward.

    The collective of a sub-block's input gradient is issued before its last weight gradient; what comes of it passes
    the norm before the sub-block two further down can begin.
    """
    done, sent = [0.0, 0.0], [0.0, 0.0]
    for index in range(2 * LAYERS):
        begin = max(done[1], sent[0]) + (norm if index > 1 else 0)
        sent = [sent[1], max(sent[1], begin + core) + link]
        done = [done[1], begin + core + weight_gradient]
    return max(max(done[1], sent[0]) + norm, sent[1]) + norm


def norm_backward(width: int) -> float:
    """Seconds of a norm's backward, and of adding its result to the stream's gradient."""
    norm = nn.RMSNorm(width, device="meta", dtype=torch.bfloat16)
    x = torch.empty(TOKENS, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with VirtualClock(FLOPS, MEMORY, Link(0, 1)) as clock:
        y = norm(x) + x
        before = clock.time
        y.backward(torch.empty_like(y))
    return clock.time - before


@each_case
@pytest.mark.parametrize("order", ["seqnr", "early"])
def test_ladder_is_as_fast_as_its_dependencies_allow(mesh: DeviceMesh, width: int, link: Link, order: str) -> None:
    free = step(mesh, width, Link(0.0, float("inf")), "ladder", backward_order=order)
    real = step(mesh, width, link, "ladder", backward_order=order)
    seconds = link.seconds("all_reduce", 2 * TOKENS * width, mesh.size())
    sub_blocks = 2 * LAYERS
    forward = forward_model(free.forward / sub_blocks, seconds, ladder=True)
    weight_gradient = 2 * TOKENS * width * 4 * width / mesh.size() / FLOPS  # of the up projection, which comes last
    norm = norm_backward(width)
    core = free.backward / sub_blocks - weight_gradient - norm
    backward = backward_model(core, weight_gradient, norm, seconds)
    assert real.forward == pytest.approx(forward, rel=0.02)
    assert real.backward == pytest.approx(backward, rel=0.02)
    exposed = real.total - free.total
    assert real.report.total("exposed") == pytest.approx(exposed, rel=0.01)
    assert real.report.total("exposed") <= 1.01 * (forward + backward - free.total) + 0.01 * real.total


@each_case
def test_ladder_against_standard(mesh: DeviceMesh, width: int, link: Link, request: pytest.FixtureRequest) -> None:
    standard = step(mesh, width, link, "standard")
    blocking = step(mesh, width, link, "standard", overlap="off")
    ladder = step(mesh, width, link, "ladder")
    naive = step(mesh, width, link, "ladder", backward_order="blocking")
    assert standard.total < blocking.total  # weight gradients hide something of the all-reduce of the input's
    is_slow = link.bandwidth < 100e9
    assert standard.total / ladder.total > (1.3 if is_slow else 1.05)
    assert ladder.total < naive.total
    assert ladder.report.hidden_share > standard.report.hidden_share + (0.3 if is_slow else 0.25)


@pytest.mark.parametrize("mesh", [8], indirect=True)
def test_nothing_is_hidden_without_overlap(mesh: DeviceMesh) -> None:
    link = CASES["nvlink 8192"][2]
    report = step(mesh, 4096, link, "ladder", overlap="off").report
    assert report.hidden_share == pytest.approx(0, abs=1e-6)
    with pytest.warns(UserWarning, match="overlap is on, but"):
        report._expects_overlap = True
        assert report.warn_if_nothing_overlapped()
        report.warn_if_nothing_overlapped()  # once


@pytest.mark.parametrize("mesh", [8], indirect=True)
def test_sequence_parallel_needs_a_lane_of_its_own(mesh: DeviceMesh) -> None:
    """In one line the gather of the next input queues behind the scatter of this output."""
    link, width = CASES["nvlink 8192"][2], 8192
    fast = Link(link.latency, link.bandwidth)
    times = {
        name: step(mesh, width, fast, wiring, sequence_parallel=True, **schedule)
        for name, wiring, schedule in (
            ("standard", "standard", {}),
            ("in line", "ladder", {}),
            ("lane", "ladder", {"lane": True}),
        )
    }
    assert times["in line"].total > 0.92 * times["standard"].total
    assert times["lane"].total < 0.8 * times["standard"].total
    assert times["lane"].report.hidden_share > 0.8


# ---------------------------------------------------------------- every duration given


class Timed(nn.Module):
    """A core that takes 20 ms forward, 20 ms for its input's gradient, and 20 ms for its weight's."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.empty((), device="meta"))

    def forward(self, n: Tensor) -> Tensor:
        return _Input.apply(n, _Weight.apply(self.weight, self.clock), self.clock)


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: Tensor, weight: Tensor, clock: VirtualClock) -> Tensor:
        ctx.clock = clock
        clock.compute(0.02)
        return torch.empty_like(n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.clock.compute(0.02)
        return torch.empty_like(grad), grad.new_empty(()), None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, clock: VirtualClock) -> Tensor:
        ctx.clock = clock
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.clock.compute(0.02)
        return grad, None


def timed_step(mesh: DeviceMesh, link: float, wiring: str, **schedule: Any) -> tuple[float, float]:
    """Milliseconds of forward and backward of 8 sub-blocks, a collective taking ``link`` ms."""
    clock = VirtualClock(float("inf"), float("inf"), Link(link / 1e3, float("inf")))
    blocks = [LadderBlock(nn.Identity(), Timed(clock), nn.Identity(), Timed(clock)) for _ in range(LAYERS)]
    stack = LadderStack(blocks, wiring, tp_mesh=mesh, **schedule)
    x = torch.empty(4, 4, device="meta", requires_grad=True)
    with clock, OverlapReport(clock, overlap=False):
        y = stack(x)
        forward = clock.time
        y.backward(torch.empty_like(y))
    return round(1e3 * forward, 6), round(1e3 * (clock.time - forward), 6)


@pytest.mark.parametrize("mesh", [2], indirect=True)
@pytest.mark.parametrize(
    ("link", "blocking", "megatron", "ladder"),
    [  # milliseconds of forward and backward
        (0, (160, 320), (160, 320), (160, 320)),
        (10, (240, 400), (240, 320), (170, 320)),
        (20, (320, 480), (320, 320), (180, 320)),
        (35, (440, 600), (440, 440), (300, 335)),
        (50, (560, 720), (560, 560), (420, 420)),
    ],
)
def test_delayed_link(mesh: DeviceMesh, link: float, blocking: Any, megatron: Any, ladder: Any) -> None:
    assert timed_step(mesh, link, "standard", overlap="off") == blocking
    assert timed_step(mesh, link, "standard") == megatron
    for order in ("seqnr", "early"):
        assert timed_step(mesh, link, "ladder", backward_order=order) == ladder
    if link >= 20:
        assert sum(megatron) / sum(ladder) > (1.2 if link == 20 else 1.3 if link == 50 else 1)
