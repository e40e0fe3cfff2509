"""The picture of waits: its bars as data, what is drawn of them, what it refuses. From traces made by hand."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sonic.simulator.errors import SimulatorError
from sonic.simulator.timeline import (
    ENDED,
    ENDED_OUTSIDE,
    OUTSIDE,
    RUNS,
    Bar,
    draw_timeline,
    label_of,
    timeline_bars,
    timeline_figure,
    timeline_links,
)
from sonic.simulator.trace import Ender, Trace, Wait

EMPTY = "`mbarrier.try_wait.parity.shared.b64 P1, [%r17], %r72, 10000000` (PTX line 114, /some/where/gemm.py:11)"
FULL = "`mbarrier.try_wait.parity.shared.b64 P1, [%r18], %r73, 10000000` (PTX line 282, /some/where/gemm.py:22)"
FULL_UNROLLED = FULL.replace("line 282", "line 290").replace("%r18", "%r19")
SYNC = "`bar.sync 0` (PTX line 76, /some/where/gemm.py:5)"
WGMMA = "`wgmma.wait_group.sync.aligned 0` (PTX line 300)"

LABELS = {
    EMPTY: "mbarrier, gemm.py:11",
    FULL: "mbarrier, gemm.py:22",
    FULL_UNROLLED: "mbarrier, gemm.py:22",
    SYNC: "named barrier 0, gemm.py:5",
    WGMMA: "wgmma group, PTX line 300",
}


def made_by_hand() -> Trace:
    """Two blocks. In block 0, warps 0, 2 and 5 waited, the others never did."""
    return Trace(
        name="gemm",
        instructions=200,
        timeline=[
            Wait(0, 0, SYNC, 0, 10),
            Wait(0, 2, SYNC, 5, 10),
            Wait(1, 1, SYNC, 30, 31),
            Wait(0, 0, FULL, 20, 40),
            Wait(0, 0, WGMMA, 40, 60),
            Wait(0, 0, FULL_UNROLLED, 70, 70),
            Wait(0, 5, EMPTY, 50, 200),
        ],
    )


def drawn(figure: Any) -> dict[str, list[tuple[float, float, float]]]:
    """The bars that a figure shows: label -> middle, left and right of each."""
    (axes,) = figure.axes
    found = {}
    for collection in axes.collections:
        if collection.get_label().startswith("_"):  # links, and work in flight
            continue
        boxes = [path.get_extents() for path in collection.get_paths()]
        found[collection.get_label()] = [((box.y0 + box.y1) / 2, box.x0, box.x1) for box in boxes]
    return found


@pytest.mark.parametrize(
    ("what", "label"),
    [
        *LABELS.items(),
        ("`bar.sync 3, 256` (PTX line 4)", "named barrier 3, PTX line 4"),
        ("`bar.sync %r4, 256` (PTX line 4)", "named barrier, PTX line 4"),
        ("`barrier.cluster.wait.acquire.aligned` (PTX line 4)", "cluster barrier, PTX line 4"),
        ("`cp.async.bulk.wait_group.read 1` (PTX line 4, x.py:9)", "bulk group, x.py:9"),
        ("`cp.async.wait_group 1` (PTX line 4, x.py:9)", "cp.async group, x.py:9"),
        ("`cp.async.wait_all` (PTX line 4, x.py:9)", "cp.async group, x.py:9"),
        ("`@%p1 bar.sync 2` (PTX line 4, a folder, with: all/x.py:9)", "named barrier 2, x.py:9"),
        # what an instruction itself says of its barrier
        (
            "`mbarrier.try_wait.parity.shared::cta.b64 P1, [bars+8], 1` (PTX line 4)",
            "mbarrier at bars+8 parity 1, PTX line 4",
        ),
        ("`mbarrier.try_wait.parity.shared.b64 %p1, [%r1+8], 0` (PTX line 4)", "mbarrier parity 0, PTX line 4"),
        ("`mbarrier.try_wait.shared.b64 %p1, [%r1], 0` (PTX line 4)", "mbarrier, PTX line 4"),
        # what is not known is told as it is
        ("`tea.time now` (PTX line 4)", "tea.time, PTX line 4"),
        ("the postman", "the postman"),
        ("x" * 61, "x" * 57 + "..."),
    ],
)
def test_a_wait_has_a_short_name(what: str, label: str) -> None:
    assert label_of(what) == label


def test_the_bars_cover_each_warp_from_begin_to_end() -> None:
    bars = timeline_bars(made_by_hand())
    assert bars == [
        Bar(0, 0, LABELS[SYNC], 0, 10),
        Bar(0, 0, RUNS, 10, 20),
        Bar(0, 0, LABELS[FULL], 20, 40),
        Bar(0, 0, LABELS[WGMMA], 40, 60),
        Bar(0, 0, RUNS, 60, 70),
        Bar(0, 0, LABELS[FULL], 70, 70),
        Bar(0, 0, OUTSIDE, 70, 200),
        Bar(0, 1, OUTSIDE, 0, 200),
        Bar(0, 2, OUTSIDE, 0, 5),
        Bar(0, 2, LABELS[SYNC], 5, 10),
        Bar(0, 2, OUTSIDE, 10, 200),
        Bar(0, 3, OUTSIDE, 0, 200),
        Bar(0, 4, OUTSIDE, 0, 200),
        Bar(0, 5, OUTSIDE, 0, 50),
        Bar(0, 5, LABELS[EMPTY], 50, 200),
    ]
    other = timeline_bars(made_by_hand(), block=1)
    assert [(bar.warp, bar.label) for bar in other if bar.start < bar.end] == [
        (0, OUTSIDE),
        (1, OUTSIDE),
        (1, LABELS[SYNC]),
        (1, OUTSIDE),
    ]
    assert timeline_bars(made_by_hand(), block=[1, 0, 1]) == other + bars


@pytest.mark.parametrize("block", [0, 1, [0, 1]])
def test_what_is_drawn_is_what_the_bars_say(block: int | list[int]) -> None:
    pytest.importorskip("matplotlib")
    trace = made_by_hand()
    bars = timeline_bars(trace, block=block)
    figure = timeline_figure(trace, block=block)
    shown = drawn(figure)
    assert set(shown) == {bar.label for bar in bars}
    (axes,) = figure.axes
    lines = list(dict.fromkeys((bar.block, bar.warp) for bar in bars))
    heights = dict(zip(lines, axes.get_yticks(), strict=True))
    assert sorted(heights.values()) == list(heights.values()) and len(set(heights.values())) == len(lines)
    for label, places in shown.items():
        wanted = [(heights[bar.block, bar.warp], bar.start, bar.end) for bar in bars if bar.label == label]
        assert [pytest.approx(place) for place in wanted] == places
    assert axes.get_ylim()[0] > max(heights.values()) > min(heights.values()) > axes.get_ylim()[1]
    assert "no hardware time" in axes.get_xlabel() and "warp instructions" in axes.get_xlabel()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(shown)


def with_enders() -> Trace:
    """Two stages: warp 0 waits for two loads of warp 2 and frees the first slot; a peer ends the last wait."""
    load, arrive = "`cp.async.bulk.tensor.2d...` (PTX line 9)", "`mbarrier.arrive...` (PTX line 8)"
    ring = {"barrier_block": 0, "phase": 0, "num_stages": 2}
    return Trace(
        instructions=100,
        timeline=[
            Wait(0, 0, FULL, 5, 20, 1024, ring=1024, stage=0, ended_by=Ender(0, 2, load, "TMA load", 3), **ring),
            Wait(0, 2, EMPTY, 10, 30, 1040, ring=1040, stage=0, ended_by=Ender(0, 0, arrive), **ring),
            Wait(
                0, 0, FULL_UNROLLED, 32, 50, 1032, ring=1024, stage=1, ended_by=Ender(0, 2, load, "TMA load", 4), **ring
            ),
            Wait(0, 0, SYNC, 60, 70, 0, 0, 0, ended_by=Ender(0, 3, SYNC)),
            Wait(0, 1, FULL_UNROLLED, 70, 90, 1096, 0, 0, ended_by=Ender(1, 5, arrive)),
        ],
    )


def test_a_barrier_is_named_by_its_place_and_stage() -> None:
    trace = with_enders()
    assert [bar.label for bar in timeline_bars(trace) if bar.wait is not None] == [
        "mbarrier 1024 stage 0 of 2, gemm.py:22",
        "mbarrier 1032 stage 1 of 2, gemm.py:22",
        "named barrier 0, gemm.py:5",
        "mbarrier 1096, gemm.py:22",
        "mbarrier 1040 stage 0 of 2, gemm.py:11",
    ]
    # warp 3 never waited, but ended a wait
    assert {bar.warp for bar in timeline_bars(trace)} == {0, 1, 2, 3}
    # the same barrier, waited for at another line of source
    trace.timeline.append(Wait(1, 0, FULL.replace("py:22", "py:33"), 90, 95, 1024, 1, 0, ring=1024, stage=0))
    assert timeline_bars(trace)[1].label == "mbarrier 1024 stage 0 of 2, gemm.py:22 and others"


def test_links_lead_from_who_ended_a_wait_to_who_waited() -> None:
    pytest.importorskip("matplotlib")
    trace = with_enders()
    figure = timeline_figure(trace)
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["warp 0", "warp 1", "warp 2: loads", "warp 3", "TMA load"]
    heights = dict(zip(names, axes.get_yticks(), strict=True))
    segments = next(item for item in axes.collections if type(item).__name__ == "LineCollection").get_segments()
    found = [(segment[0][0], segment[0][1], segment[1][1]) for segment in segments]
    # (at, line of who ended it, line of who waited); links end at the edge of a bar
    wanted = [
        (20, "TMA load", "warp 0"),
        (30, "warp 0", "warp 2: loads"),
        (50, "TMA load", "warp 0"),
        (70, "warp 3", "warp 0"),
    ]
    assert len(timeline_links(trace)) == len(wanted) + 1
    for (at, source, target), link in zip(wanted, found, strict=True):
        assert link[:2] == (at, heights[source]) and abs(link[2] - heights[target]) < 0.4
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[-2:] == [ENDED, ENDED_OUTSIDE]
    # what is in flight: from issue to end
    (flight,) = [item for item in axes.collections if item.get_alpha() == 0.3]
    boxes = [path.get_extents() for path in flight.get_paths()]
    assert [(box.x0, box.x1) for box in boxes] == [(3, 20), (4, 50)]
    # the stages of a ring have one hatch and colours of their own; another ring has another hatch
    looks = {patch.get_label(): (patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()}
    first, second, empty = (
        looks[f"mbarrier {text}"]
        for text in ("1024 stage 0 of 2, gemm.py:22", "1032 stage 1 of 2, gemm.py:22", "1040 stage 0 of 2, gemm.py:11")
    )
    assert first[0] != second[0] and first[1] == second[1] != empty[1] and first[0] == empty[0]
    texts = {(text.get_text(), text.get_position()) for text in axes.texts}
    assert ("0", (12.5, heights["warp 0"])) in texts and ("1", (41, heights["warp 0"])) in texts


def test_lines_are_named_by_block_and_role() -> None:
    pytest.importorskip("matplotlib")

    def names(block: int | Sequence[int]) -> list[str]:
        return [text.get_text() for text in timeline_figure(trace, block=block).axes[0].get_yticklabels()]

    trace = made_by_hand()
    # a warpgroup multiplies as a whole, whichever of its warps had to wait for the products
    assert names(0) == [*(f"warp {warp}: multiplies" for warp in range(4)), "warp 4", "warp 5"]
    assert names([1, 0])[:3] == ["block 1, warp 0", "block 1, warp 1", "block 0, warp 0: multiplies"]
    trace.timeline.append(Wait(0, 5, "`cp.async.bulk.wait_group 0` (PTX line 4)", 200, 200))
    assert names(0)[5] == "warp 5: stores"


def test_more_labels_than_colours_can_still_be_told_apart() -> None:
    pytest.importorskip("matplotlib")
    waits = [Wait(0, 0, f"`bar.sync {n % 16}` (PTX line {n})", 10 * n, 10 * n + 5) for n in range(1, 26)]
    figure = timeline_figure(Trace(instructions=300, timeline=waits))
    (legend,) = figure.legends
    looks = {(patch.get_facecolor(), patch.get_hatch()) for patch in legend.get_patches()}
    assert len(looks) == len(legend.get_patches()) == 25 + 2
    # barrier 2 comes before barrier 10
    names = [text.get_text() for text in legend.get_texts()]
    assert names.index("named barrier 2, PTX line 2") < names.index("named barrier 10, PTX line 10")


def test_the_picture_is_a_png_of_sane_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "folder" / "waits.png"
    draw_timeline(made_by_hand(), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 < width < 3000 and 300 < height < 1500
    # many waits make it wider, many warps higher, and both have an end
    many = [Wait(block, 7, FULL, 10 * n, 10 * n + 5) for n in range(1000) for block in range(2)]
    draw_timeline(Trace(instructions=10000, timeline=many), str(path), block=(0, 1))
    wider, higher = struct.unpack(">II", path.read_bytes()[16:24])
    assert width < wider <= 6000 and height < higher < 3000
    assert [entry.name for entry in path.parent.iterdir()] == ["waits.png"], "leaves nothing else behind"


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "waits.png"
    draw_timeline(made_by_hand(), path)
    before = path.read_bytes()

    def fail(self: Any, target: Path, **options: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        draw_timeline(made_by_hand(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["waits.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "waits.png"
    with pytest.raises(ValueError, match=r"trace\.timeline is empty.*Options\(timeline=True\)"):
        timeline_bars(Trace(instructions=10))
    with pytest.raises(ValueError, match=r"block is 7, expected one or some that waited: 0, 1"):
        timeline_bars(made_by_hand(), block=7)
    with pytest.raises(ValueError, match=r"block is \[0, 2\]"):
        timeline_bars(made_by_hand(), block=[0, 2])
    with pytest.raises(ValueError, match=r"block is \[\]"):
        timeline_bars(made_by_hand(), block=[])
    with pytest.raises(ValueError, match=r"path is .*waits\.pdf.*ends with \.png"):
        draw_timeline(made_by_hand(), path.with_suffix(".pdf"))
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"trace\.timeline is empty"):
        draw_timeline(Trace(instructions=10), path)
    crowd = Trace(instructions=10, timeline=[Wait(block, 15, SYNC, 1, 2) for block in range(17)])
    with pytest.raises(ValueError, match=r"block is \[0, 1, .*\], blocks of 272 warps together, expected 256 at most"):
        draw_timeline(crowd, path, block=range(17))
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SimulatorError, match="matplotlib.*pip install"):
        draw_timeline(made_by_hand(), tmp_path / "waits.png")
