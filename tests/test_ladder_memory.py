"""What overlap costs in memory, counted on meta tensors; and that the report tells what happened."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sonic.parallel import in_flight
from sonic.parallel.in_flight import Started
from sonic.parallel.overlap_report import HostTimer, OverlapReport
from sonic.parallel.stack import LadderBlock, LadderStack

TOKENS, WIDTH, RANKS, LAYERS = 64, 32, 4, 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=fake.FakeStore())
    try:
        yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))["tp"]
    finally:
        dist.destroy_process_group()


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of what was made while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter(args) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage not in self._seen and storage._cdata not in given:
                self._seen[storage] = storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
        return out

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH // RANKS, bias=False, device="meta")
        self.down = nn.Linear(WIDTH // RANKS, WIDTH, bias=False, device="meta")

    def forward(self, n: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(n)))


def stack(wiring: str, mesh: DeviceMesh, **schedule: Any) -> LadderStack:
    blocks = [
        LadderBlock(nn.LayerNorm(WIDTH, device="meta"), Core(), nn.LayerNorm(WIDTH, device="meta"), Core())
        for _ in range(LAYERS)
    ]
    return LadderStack(blocks, wiring, tp_mesh=mesh, **schedule)


def peaks(model: LadderStack) -> tuple[int, int, int]:
    """Bytes at most in inference, in forward, and in forward and backward."""
    x = torch.empty(TOKENS, WIDTH, device="meta", requires_grad=True)
    with torch.no_grad(), Peak() as inference:
        model(x)
    with Peak() as forward:
        y = model(x)
    del y
    with Peak() as both:
        model(x).sum().backward()
    return inference.most, forward.most, both.most


@pytest.mark.parametrize("order", ["seqnr", "early", "blocking"])
def test_overlap_holds_one_more_stream(mesh: DeviceMesh, order: str) -> None:
    stream = TOKENS * WIDTH * 4
    standard = peaks(stack("standard", mesh, overlap="off"))
    assert standard[0] > 3 * stream  # what is counted is there
    ladder = peaks(stack("ladder", mesh, backward_order=order))
    extra = [(more - less) / stream for more, less in zip(ladder, standard, strict=True)]
    assert max(extra) <= 1.05  # what is in flight; two would be the most that the wiring needs


def test_what_is_in_flight_has_no_memory_and_no_values(mesh: DeviceMesh) -> None:
    x = torch.randn(8, 4, requires_grad=True)
    group = mesh.get_group()
    flying = in_flight.issue(x, in_flight.all_reduce(group), in_flight.all_reduce(None), kind="mlp")
    assert flying.tensor.untyped_storage().nbytes() == 4 and flying.tensor.isnan().all()
    assert "in flight" in repr(flying)
    y = flying.wait()
    assert flying.wait() is y and flying.is_waited and "complete" in repr(flying)
    seen = []
    n = in_flight.reduce_gradient(x, in_flight.all_reduce(group), kind="mlp")
    n.grad_fn.next_functions[0][0].register_prehook(lambda grads: seen.append(grads[0]))  # type: ignore[union-attr]
    (n * 2).sum().backward()
    assert seen[0].isnan().all() and x.grad.eq(2).all()  # type: ignore[union-attr]


def test_backward_of_what_was_never_awaited_is_refused(mesh: DeviceMesh) -> None:
    """Or the result of the forward collective would come out as a gradient."""
    for overlap in ("full", "forward"):
        x = torch.randn(4, requires_grad=True)
        group = mesh.get_group()
        flying = in_flight.issue(
            x, in_flight.all_reduce(group), in_flight.all_reduce(None), kind="mlp", overlap=overlap
        )
        with pytest.raises(RuntimeError, match="mlp was awaited but never issued, or awaited twice"):
            (flying.tensor * 2).sum().backward()
        assert x.grad is None
        flying.wait().sum().backward()  # nothing is lost
        assert x.grad is not None and x.grad.eq(1).all()


def test_two_consumers_of_what_is_in_flight_are_refused(mesh: DeviceMesh) -> None:
    x = torch.randn(4, requires_grad=True)
    box = in_flight.Mailbox("mlp", in_flight.all_reduce(mesh.get_group()))
    n = in_flight._GradientWait.apply(x, box)
    twice = in_flight._GradientIssue.apply(n, box) + in_flight._GradientIssue.apply(n, box)
    with pytest.raises(RuntimeError, match="a second backward mlp collective was issued before the first was awaited"):
        twice.sum().backward()


def test_a_second_backward_is_refused_where_the_first_freed_what_it_needs(mesh: DeviceMesh) -> None:
    blocks = [LadderBlock(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)]
    x = torch.randn(3, 4, requires_grad=True)
    y = LadderStack(blocks, tp_mesh=mesh)(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.autograd.grad(y.sum(), x)[0].equal(first)
    y = LadderStack(blocks, tp_mesh=mesh, backward_order="early")(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward per forward"):
        torch.autograd.grad(y.sum(), x)


def test_fallback_where_nodes_cannot_be_ordered(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonic.parallel.ladder.can_set_order", lambda: False)
    with pytest.warns(UserWarning, match="backward_order is 'early' instead of 'seqnr'"):
        model = stack("ladder", mesh)
    assert model.schedule.backward_order == "early"


class Replicated(nn.Linear):
    """A core that returns a DTensor."""

    def forward(self, n: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        return DTensor.from_local(super().forward(n), self.mesh, [Partial()])


def test_distributed_tensors_are_refused(mesh: DeviceMesh) -> None:
    core = Replicated(4, 4)
    core.mesh = mesh
    with pytest.raises(ValueError, match="a core's output is a DTensor .*Partial.*, expected a plain tensor"):
        LadderStack([LadderBlock(nn.LayerNorm(4), core, nn.LayerNorm(4), core)], tp_mesh=mesh)(torch.randn(3, 4))


# ---------------------------------------------------------------- the report


class Clock:
    """Seconds, as somebody turns them on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait_for(self, seconds: float) -> None:
        self.now += seconds


class Future:
    def __init__(self) -> None:
        self.callbacks: list[Any] = []

    def add_done_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)


class Work:
    def __init__(self) -> None:
        self.future = Future()

    def get_future(self) -> Future:
        return self.future

    def done(self) -> None:
        for callback in self.future.callbacks:
            callback(None)

    def wait(self) -> None:
        pass


def reported() -> OverlapReport:
    """Two collectives of 4 s on one link: all of the first hidden, of the second 3 of 4 s exposed; and one not
    awaited.
    """
    clock = Clock()
    report = OverlapReport(HostTimer(clock))
    works = [Work(), Work(), Work()]
    with report:
        clock.wait_for(1)
        first = report.issued("attention", "forward", Started(torch.empty(2**18), works[0], op="all_reduce"))
        clock.wait_for(1)
        second = report.issued("mlp", "backward", Started(torch.empty(2**18), works[1], op="all_gather"))
        clock.wait_for(3)
        works[0].done()  # at 5 s
        clock.wait_for(1)
        report.waiting(first)
        report.waited(first)
        report.waiting(second)
        clock.wait_for(3)
        works[1].done()  # at 9 s
        report.waited(second)
        report.issued("mlp", "backward", Started(torch.empty(2), works[2]))
        clock.wait_for(1)
    return report


def test_report_adds_up() -> None:
    report = reported()
    first, second = report.collectives
    assert (first.issued, first.started, first.done, first.duration, first.exposed, first.hidden) == (1, 1, 5, 4, 0, 4)
    assert (second.issued, second.started, second.done) == (2, 5, 9)
    assert (second.duration, second.exposed, second.hidden) == (4, 3, 1)
    assert report.elapsed == 10
    assert report.total("hidden") == 5 and report.total("exposed", "forward") == 0
    assert report.hidden_share == 5 / 8
    lines = str(report).splitlines()
    assert lines[1].split() == [
        "forward",
        "attention",
        "all_reduce",
        "1",
        "1.00",
        "4000.000",
        "4000.000",
        "0.000",
        "100%",
    ]
    assert lines[-1].split() == ["all", "2", "2.00", "8000.000", "5000.000", "3000.000", "62%"]


def test_report_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = reported()
    report.print()
    assert "attention" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    report.save_timeline(str(tmp_path / "timeline.png"))
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RuntimeError, match="nothing to draw"):
        OverlapReport(HostTimer()).save_timeline("never.png")


def test_warning_once_where_nothing_overlapped() -> None:
    clock = Clock()
    report = OverlapReport(HostTimer(clock))
    work = Work()
    with pytest.warns(UserWarning, match="overlap is on, but 2e.03 ms of 2e.03 ms"):
        with report:
            entry = report.issued("mlp", "forward", Started(torch.empty(2), work))
            report.waiting(entry)
            clock.wait_for(2)
            work.done()
            report.waited(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.warn_if_nothing_overlapped()
        with OverlapReport(HostTimer(clock)):
            pass  # nothing was sent
