"""The tutorial kernel of ``examples/simulate_kernel.py``: exact under every schedule, every planted bug caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from examples import simulate_kernel as example  # noqa: E402
from sonic.simulator import SimulatorError, hopper  # noqa: E402
from sonic.simulator.timeline import OUTSIDE, RUNS, timeline_bars  # noqa: E402

SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1), ("random", 2)]


@pytest.fixture(scope="module")
def compiled() -> Callable[..., None]:
    """The kernel as it should be."""
    return example.compile_gemm()


# One tile; several tiles and more steps than slots; no multiples of the tile; the least that TMA takes.
SIZES = [(64, 128, 64), (128, 256, 448), (100, 200, 328), (129, 136, 72), (1, 3, 8)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_the_product_is_exact(compiled: Callable[..., None], m: int, n: int, k: int, schedule: str, seed: int) -> None:
    a, b, c, product = example.integers(m, n, k)
    trace = example.simulate(compiled, a, b, c, schedule, seed)
    torch.testing.assert_close(c, product, rtol=0, atol=0)
    assert trace.warnings == []


@pytest.mark.parametrize(
    ("m", "n", "k", "bytes_a", "bytes_b", "bytes_c"),
    [
        # 1 tile of 64 x 128: A once, B once; the whole of C in 4 bytes
        (64, 128, 64, 64 * 64 * 2, 128 * 64 * 2, 64 * 128 * 4),
        # 2 x 2 tiles: A and B twice
        (128, 256, 448, 2 * 128 * 448 * 2, 2 * 256 * 448 * 2, 128 * 256 * 4),
        # 2 x 2 tiles that stick out: only what lies inside counts
        (100, 200, 328, 2 * 100 * 328 * 2, 2 * 200 * 328 * 2, 100 * 200 * 4),
        (1, 3, 8, 16, 48, 12),
    ],
)
def test_bytes_are_those_counted_by_hand(
    compiled: Callable[..., None], m: int, n: int, k: int, bytes_a: int, bytes_b: int, bytes_c: int
) -> None:
    a, b, c, _ = example.integers(m, n, k)
    trace = example.simulate(compiled, a, b, c, "eager")
    assert example.ideal_bytes(m, n, k) == {"A": bytes_a, "B": bytes_b, "C": bytes_c}
    assert trace.bytes_by_tensor() == {"A": bytes_a, "B": bytes_b, "C": bytes_c}
    assert {path for path, _ in trace.traffic} == {"TMA load", "st.global"}
    tiles = -(-m // 64) * -(-n // 128)
    steps = -(-k // 64)
    assert trace.traffic["TMA load", "A"].requests == trace.traffic["TMA load", "B"].requests == tiles * steps
    # zeros from outside are multiplied like all else
    assert trace.flops == tiles * steps * 2 * 64 * 128 * 64


# What a report must say: the kind of error, and words of the instruction or barrier that it pins down.
REPORTS = {
    "missing-wait": [("RaceFault", "wgmma.mma_async"), ("MemoryFault", "wgmma.mma_async")],
    "missing-empty-wait": [("BarrierFault", "mbarrier.arrive.expect_tx"), ("RaceFault", "cp.async.bulk.tensor")],
    "early-release": [("RaceFault", "cp.async.bulk.tensor")],
    "wrong-bytes": [("Deadlock", "mbarrier wait")],
}


@pytest.mark.parametrize("bug", sorted(example.BUGS))
def test_a_planted_bug_is_caught_and_pinned_down(bug: str) -> None:
    compiled = example.compile_gemm(bug)
    reports = []
    for schedule, seed in SCHEDULES:
        a, b, c, _ = example.integers(64, 128, 512)
        try:
            example.simulate(compiled, a, b, c, schedule, seed)
        except SimulatorError as error:
            reports.append((type(error).__name__, str(error)))
    assert len(reports) == len(SCHEDULES), "a schedule does not show it"
    for kind, text in reports:
        assert any(kind == wanted and words in text for wanted, words in REPORTS[bug]), f"{kind}: {text}"
        assert re.search(r"PTX line \d+, .*simulate_kernel\.py:\d+", text), "names the line of the source"


def test_the_deadlock_report_tells_what_is_missing() -> None:
    a, b, c, _ = example.integers(64, 128, 64)
    compiled = example.compile_gemm("wrong-bytes")
    with pytest.raises(SimulatorError) as caught:
        example.simulate(compiled, a, b, c, "eager")
    # the second tile of B that never comes
    assert f"{128 * 64 * 2} bytes pending" in str(caught.value)


def test_a_right_result_is_no_proof() -> None:
    """Why there are checks: without them, and with copies that are always there in time, the bug does not show."""
    compiled = example.compile_gemm("missing-wait")
    a, b, c, product = example.integers(64, 128, 512)
    with hopper("eager", checks=False):
        compiled(*example.device_tensors(a, b, c))
    assert torch.equal(c, product)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    a, b, c, _ = example.integers(8, 8, 12)
    with pytest.raises(ValueError, match="K a multiple of 8"):
        example.device_tensors(a, b, c)
    a, b, c, _ = example.integers(8, 8, 16)
    with pytest.raises(ValueError, match=r"expected \(M, K\), \(N, K\), \(M, N\)"):
        example.device_tensors(a, b, c[:4])
    with pytest.raises(ValueError, match="expected bfloat16 and float32"):
        example.device_tensors(a.half(), b, c)
    with pytest.raises(ValueError, match="expected contiguous"):
        example.device_tensors(a, b, torch.zeros(8, 8).T)
    with pytest.raises(ValueError, match="expected one of"):
        example.compile_gemm("tea")


def test_the_command_shows_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--size", "64", "128", "64"]) == 0
    told = capsys.readouterr().out
    assert told.count("exactly what torch computes") == 5
    assert "TMA load" in told
    assert re.search(r"^B +16,384 +16,384 +16,384$", told, re.M)


def test_the_command_shows_the_report_of_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--bug", "missing-wait"]) == 0
    told = capsys.readouterr().out
    assert "eager 0: RaceFault" in told and "lazy 0: RaceFault" in told
    assert example.main(["--size", "8", "8", "9"]) == (
        "simulate_kernel: A is (8, 9), B is (8, 9), C is (8, 8), expected (M, K), (N, K), (M, N), none empty, "
        "and K a multiple of 8"
    )


def test_the_command_draws_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "waits.png"
    assert example.main(["--size", "64", "128", "512", "--timeline", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["waits.png"]
    # a name that cannot be is a message, and a timeline of a kernel that ends with an error is none
    assert "expected a file name that ends with .png" in str(example.main(["--timeline", str(tmp_path / "waits.pdf")]))
    with pytest.raises(SystemExit):
        example.main(["--bug", "missing-wait", "--timeline", str(path)])
    assert "not with --bug" in capsys.readouterr().err


def test_the_timeline_shows_each_wait_of_the_source(compiled: Callable[..., None]) -> None:
    a, b, c, _ = example.integers(64, 128, 512)
    bars = timeline_bars(example.simulate(compiled, a, b, c, "lazy", timeline=True))
    assert {bar.warp for bar in bars} == set(range(5))
    source = Path(example.__file__).read_text(encoding="utf-8").splitlines()
    waits = {
        (bar.warp == example.PRODUCER_WARP, bar.label.partition(",")[0], source[int(bar.label.split(":")[1]) - 1])
        for bar in bars
        if bar.label not in (RUNS, OUTSIDE)
    }
    full, empty = 1024, 1024 + 8 * example.SLOTS
    assert {(is_producer, kind, line.strip()) for is_producer, kind, line in waits if "wgmma" not in kind} == {
        (False, "named barrier 0", "cute.arch.sync_threads()"),
        *(
            (
                is_producer,
                f"mbarrier {first + 8 * slot} stage {slot} of {example.SLOTS}",
                f"cute.arch.mbarrier_wait({line})",
            )
            for is_producer, first, line in (
                (True, empty, "empty + slot, parity ^ 1"),
                (False, full, "full + slot, parity"),
            )
            for slot in range(example.SLOTS)
        ),
    }
    enders = {
        (bar.wait.ring, bar.wait.ended_by.work, bar.wait.ended_by.warp == example.PRODUCER_WARP)
        for bar in bars
        if bar.wait is not None and bar.wait.ended_by is not None and bar.wait.ring is not None
    }
    assert enders == {(full, "TMA load", True), (empty, None, False)}
    wgmma = {(is_producer, "wait_group" in line) for is_producer, kind, line in waits if kind == "wgmma group"}
    assert wgmma == {(False, True)}


def shape_of(text: str) -> str:
    """A text without what changes with a compiler: numbers, and the folder that the example lies in."""
    return re.sub(r"\d", "#", re.sub(r"\S*(?=examples/simulate_kernel\.py)", "", text))


def test_the_page_quotes_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/simulator.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^```text\n(.*?)\n```$", page, re.M | re.S)
    assert len(quotes) == 4
    for arguments in ([], ["--bug", "missing-wait"], ["--bug", "early-release"], ["--bug", "wrong-bytes"]):
        assert example.main(arguments) == 0
    told = shape_of(capsys.readouterr().out)
    for quote in quotes:
        assert shape_of(quote) in told
