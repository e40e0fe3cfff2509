"""What the Hopper kernels move, counted in the simulator: close to the least, and as ``docs/kernels.md`` tells it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")

from sonic.kernels.cute import traffic  # noqa: E402  (imports CuTe-DSL)
from sonic.kernels.cute.traffic import CASES, DEFAULT_SIZES, MARKERS, Case, Moved, Sizes, least_bytes  # noqa: E402

pytestmark = pytest.mark.long


PAGE = Path(__file__).parent.parent / "docs/kernels.md"
MOST_EXCESS = 1.05


@functools.cache
def moved(case: Case) -> Moved:
    return traffic.moved(case)


def name_of(case: Case) -> str:
    turns = " pingpong" if case.pingpong else ""
    return f"{case.op} {case.tile_m}x{case.tile_n}{turns} cluster {case.cluster_m}"


def page_row(case: Case) -> str:
    """The line of the page for a case."""
    inside = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    rows = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(CASES), "made anew by: python -m sonic.kernels.cute.traffic --write docs/kernels.md"
    return rows[CASES.index(case)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if number % 4 == 0 else pytest.mark.long) for number, case in enumerate(CASES)],
    ids=name_of,
)
def test_kernels_move_little_more_than_the_least(case: Case) -> None:
    launch = moved(case)
    assert 1.0 <= launch.ratio <= MOST_EXCESS, (launch.counted, launch.least)
    assert page_row(case) == traffic.table([launch]).splitlines()[-1]
    small = {"index", "offsets", "tensor 3"}  # read by several lanes of a warp at once; matrices are exact
    for tensor, num_bytes in launch.counted.items():
        assert tensor in small or num_bytes == launch.least[tensor], tensor
    assert not set(launch.least) - set(launch.counted), "something was not touched"


def test_clusters_read_their_weight_once() -> None:
    alone, together = (moved(Case("up_proj", "up_gated", 128, 256, cluster_m=cluster)) for cluster in (1, 2))
    assert together.counted["right"] * 2 == alone.counted["right"]
    assert together.multicast == together.counted["right"] and alone.multicast == 0
    assert together.counted["left"] == alone.counted["left"]
    assert together.stored == alone.stored


def test_main_gradients_are_added_by_memory() -> None:
    """4 bytes for each value instead of 2, nothing read back."""
    for op, kind, tile_n in (
        ("down_proj_bwd_weight", "contraction", 128),
        ("up_proj_bwd_weight", "contraction", 256),
    ):
        stored, added = (moved(Case(op + suffix, kind, 128, tile_n)) for suffix in ("", ", added"))
        assert added.stored == 2 * stored.stored
        assert sum(added.counted.values()) - added.stored == sum(stored.counted.values()) - stored.stored


def test_inference_stores_no_h() -> None:
    with_h, without = (moved(Case(op, "up_gated", 128, 256)) for op in ("up_proj", "up_proj without H"))
    num_rows = DEFAULT_SIZES.num_experts * DEFAULT_SIZES.rows
    assert with_h.stored - without.stored == 2 * num_rows * 2 * DEFAULT_SIZES.intermediate_size


def test_the_least_of_one_tile_each_is_the_traffic_of_the_op() -> None:
    """With one column of tiles and one row of tiles for each expert, every operand once: the layer's arithmetic."""
    sizes = Sizes(3, 128, 128, 64)
    experts, (d, n) = 3, (128, 64)
    rows = experts * sizes.rows
    want = {
        "up_proj": 2 * rows * d + 4 * experts * n * d + 4 * rows + 6 * rows * n,
        "up_proj without H": 2 * rows * d + 4 * experts * n * d + 4 * rows + 2 * rows * n,
        "down_proj": 2 * rows * n + 2 * experts * n * d + 2 * rows * d,
        "down_proj_bwd_input": 2 * rows * d + 2 * experts * n * d + 4 * rows * n + 8 * rows + 6 * rows * n + 4 * rows,
        "up_proj_bwd_input": 4 * rows * n + 4 * experts * n * d + 2 * rows * d,
        "down_proj_bwd_weight": 2 * rows * d + 2 * rows * n + 4 * rows + 2 * experts * n * d,
        "down_proj_bwd_weight, added": 2 * rows * d + 2 * rows * n + 4 * rows + 4 * experts * n * d,
        "up_proj_bwd_weight": 2 * rows * d + 4 * rows * n + 4 * rows + 4 * experts * n * d,
        "up_proj_bwd_weight, added": 2 * rows * d + 4 * rows * n + 4 * rows + 8 * experts * n * d,
        "bias gradient": 2 * rows * d + 16 * rows + 4 * rows + 4 * experts * d * 8,
    }
    for case in CASES:
        assert sum(least_bytes(case, sizes).values()) == want[case.op], case


def test_the_page_tells_the_sizes() -> None:
    inside = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    assert inside.startswith(f"{DEFAULT_SIZES}; bytes.\n")
    ratios = [float(ratio) for ratio in re.findall(r"\| (\d\.\d{3}) \|$", inside, re.M)]
    assert len(ratios) == len(CASES) and max(ratios) <= MOST_EXCESS


def test_a_case_without_such_a_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="case is .*one of the candidates for contraction"):
        _ = Case("down_proj_bwd_weight", "contraction", 256, 64).config
