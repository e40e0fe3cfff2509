"""Tile configurations and targets of the Triton backend as data: nothing here runs a kernel, or needs Triton."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sonic import kernels
from sonic.kernels import ops
from sonic.kernels.triton import target as targets
from sonic.kernels.triton.config import (
    CONFIGS,
    KINDS,
    GemmConfig,
    choose,
    estimate_seconds,
    fits,
    row_tile,
    rows_bucket,
    tile_rows,
)
from sonic.kernels.triton.target import INTERPRETER, TARGETS, Target, target_named, target_of_arch
from sonic.roofline import CHIPS
from tests.helpers import short

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERYWHERE = (*TARGETS.values(), INTERPRETER)
BUCKETS = range(17)
WIDTHS = ((1, 1), (64, 32), (100, 133), (768, 2048), (2048, 3072), (8192, 28672))
ROW_KINDS = tuple(kind for kind in KINDS if kind != "contraction")
H100 = TARGETS["sm_90"]

every_target = pytest.mark.parametrize("target", EVERYWHERE, ids=lambda target: target.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


# ---------------------------------------------------------------- candidates


def test_every_candidate_is_one_that_triton_can_compile() -> None:
    """Powers of two, products of at least 16 on each side, whole slices."""
    seen = [config for family in CONFIGS.values() for table in family.values() for config in table]
    assert len(seen) > 50
    for config in seen:
        sizes = (config.block_m, config.block_n, config.block_k, config.num_warps, config.slices, config.group_m)
        assert all(map(is_power_of_two, sizes)), config
        assert min(config.block_m, config.block_n, config.block_k) >= 16, config
        assert config.block_n // config.slices >= 8, f"{config}: slices of a few columns make short stores"
        assert config.num_stages >= 1 and config.num_warps in (1, 2, 4, 8, 16), config


@every_dtype
@every_target
def test_what_is_chosen_is_a_candidate_that_fits(target: Target, dtype: torch.dtype) -> None:
    known = {config for family in CONFIGS.values() for table in family.values() for config in table}
    for kind, bucket, (width_k, width_n) in itertools.product(KINDS, BUCKETS, WIDTHS):
        config = choose(kind, bucket, 8, width_k, width_n, dtype, target)
        assert config in known
        assert fits(config, dtype, target), f"{config} in {target.shared_bytes} bytes"
        staged = config.num_stages * (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        assert config.shared_bytes(dtype.itemsize) == staged <= target.shared_bytes


def test_shared_memory_is_counted() -> None:
    """(128 + 256) x 64 x 2 bytes x 3 stages = 144 KiB: an H100 has room for it, an Ada chip has not."""
    config = GemmConfig(128, 256, 64, 8, 3)
    assert config.shared_bytes(2) == 147_456 and config.shared_bytes(4) == 294_912
    assert fits(config, torch.bfloat16, H100) and not fits(config, torch.float32, H100)
    assert not fits(config, torch.bfloat16, TARGETS["sm_89"])
    exact = dataclasses.replace(H100, shared_bytes=147_456)
    assert fits(config, torch.bfloat16, exact)
    assert not fits(config, torch.bfloat16, dataclasses.replace(exact, shared_bytes=147_455))


def test_candidates_that_do_not_fit_are_left_out() -> None:
    """A chip like an H100 with half of its shared memory gets smaller tiles, not a launch that fails."""
    little = dataclasses.replace(H100, shared_bytes=113 * 1024)
    wide = choose("rows", 10, 8, 4096, 4096, torch.bfloat16, H100)
    narrow = choose("rows", 10, 8, 4096, 4096, torch.bfloat16, little)
    assert not fits(wide, torch.bfloat16, little) and fits(narrow, torch.bfloat16, little)


# ---------------------------------------------------------------- the row tile


@every_dtype
@every_target
def test_all_kernels_over_rows_share_the_row_tile(target: Target, dtype: torch.dtype) -> None:
    """Whatever the widths and the number of experts: it is rows per expert, dtype and target that decide."""
    for bucket in BUCKETS:
        tiles = {
            choose(kind, bucket, num_experts, *widths, dtype, target).block_m
            for kind, num_experts, widths in itertools.product(ROW_KINDS, (1, 8, 200), WIDTHS)
        }
        assert tiles == {row_tile(bucket, dtype, target)}


@every_dtype
@every_target
def test_more_rows_never_get_a_smaller_tile(target: Target, dtype: torch.dtype) -> None:
    tiles = [row_tile(bucket, dtype, target) for bucket in BUCKETS]
    assert tiles == sorted(tiles)


def test_row_tile_of_a_hopper_chip() -> None:
    """Few rows waste little of a small tile, many rows fill the largest."""
    tiles = [row_tile(bucket, torch.bfloat16, H100) for bucket in (0, 3, 4, 6, 7, 16)]
    assert tiles[0] == 16 and tiles[-1] == 128 and tiles == sorted(tiles) and len(set(tiles)) >= 3


@every_dtype
@pytest.mark.parametrize("num_tokens", [1, 60, 500, 4096, 100_000])
def test_explain_tells_the_row_tile(num_tokens: int, dtype: torch.dtype) -> None:
    """Of an H100 that is not here; the same by a request, and for token rounding on a CPU that interprets."""
    E, K, D, N = 16, 4, 512, 96
    told = kernels.explain(
        "up_proj", num_tokens=num_tokens, num_experts=E, top_k=K, hidden_size=D, intermediate_size=N,
        dtype=dtype, device="cuda", arch=90, backend="triton",
    )  # fmt: skip
    bucket = rows_bucket(num_tokens * K, E)
    assert told.tile_rows == row_tile(bucket, dtype, H100) == tile_rows(told.request)
    for kind in ROW_KINDS:
        assert choose(kind, bucket, E, D, 2 * N, dtype, H100).block_m == told.tile_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=short)
def test_ops_tell_the_row_tile_of_the_interpreter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for num_rows in (1, 40, 1000):
        told = ops.tile_rows(torch.zeros(3, 24, dtype=dtype), num_rows, 4, "triton")
        assert told == row_tile(rows_bucket(num_rows, 4), dtype, INTERPRETER)


def test_ops_without_a_row_tile_have_one_row() -> None:
    sizes: dict[str, Any] = {"num_tokens": 64, "num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32}
    for op in ("combine", "build_plan"):
        assert kernels.explain(op, **sizes, device="cuda", arch=90, backend="triton").tile_rows == 1


# ---------------------------------------------------------------- few configurations


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "bucket"),
    [
        *((0, 8, 0), (1, 8, 0), (8, 8, 0), (9, 8, 1), (16, 8, 1), (17, 8, 2), (64, 1, 6), (65, 1, 7), (128, 1, 7)),
        *((129, 1, 8), (1024, 8, 7), (1025, 8, 8), (2**30, 1, 30), (2**31 - 1, 1, 31), (5, 0, 3)),
    ],
)
def test_bucket(num_rows: int, num_experts: int, bucket: int) -> None:
    """The power of two at or above the mean rows per expert."""
    assert rows_bucket(num_rows, num_experts) == bucket


@given(st.integers(0, 2**31 - 1), st.integers(1, 4096))
def test_bucket_holds_its_mean(num_rows: int, num_experts: int) -> None:
    bucket = rows_bucket(num_rows, num_experts)
    assert num_rows <= num_experts * 2**bucket
    assert bucket == 0 or num_rows > num_experts * 2 ** (bucket - 1)


@pytest.mark.parametrize("target", [H100, TARGETS["sm_80"], TARGETS["gfx942"]], ids=lambda target: target.name)
def test_a_thousand_numbers_of_tokens_meet_few_configurations(target: Target) -> None:
    """T from 1 to 1,000, 8 of 64 experts: 8 buckets, so at most 8 configurations of a kernel to compile."""
    by_bucket: dict[tuple[str, int], set[GemmConfig]] = {}
    for num_tokens, kind in itertools.product(range(1, 1001), KINDS):
        bucket = rows_bucket(8 * num_tokens, 64)
        config = choose(kind, bucket, 64, 2048, 1536, torch.bfloat16, target)
        by_bucket.setdefault((kind, bucket), set()).add(config)
    assert all(len(configs) == 1 for configs in by_bucket.values()), "the same bucket, the same configuration"
    for kind in KINDS:
        configs = {config for (of, _), configs in by_bucket.items() for config in configs if of == kind}
        assert len([of for of, _ in by_bucket if of == kind]) == 8
        assert len(configs) <= 8, f"{kind}: {configs}"


# ---------------------------------------------------------------- the model


def seconds(kind: str, config: tuple[int, int, int], bucket: int, *sizes: int, dtype: torch.dtype) -> float:
    return estimate_seconds(GemmConfig(*config, 8, 3), kind, bucket, *sizes, dtype, H100)


class TestModelByHand:
    """A case for each of the limits, on an H100: 989 TFLOP/s, 132 SMs, 3.35 TB/s of memory, thrice that of L2; a tile
    takes 1 us besides.
    """

    def test_figures_are_those_of_the_chip(self) -> None:
        chip = CHIPS["H100"]
        assert (chip.flops_per_second["bfloat16"], chip.flops_per_second["float32"]) == (989e12, 67e12)
        assert (chip.memory_bytes_per_second, chip.num_compute_units, H100.num_compute_units) == (3.35e12, 132, 132)

    def test_bound_by_operands_from_l2(self) -> None:
        """65 to 128 rows per expert, 96 taken; 8 experts, K = 1,024, 512 columns in tiles of 128 x 128.

        (96 + 127 / 2) / 128 = 1.246 row tiles an expert, 9.97, so 10, by 4 columns: 40 tiles at once on 132 SMs.
        A tile takes 2 x 128 x 128 x 1,024 FLOP at 7.49 TFLOP/s, 4.48 us, and (128 + 128) x 1,024 x 2 bytes at
        76.1 GB/s, 6.89 us, and 1 us. In all 8 x (96 x 1,536 + 1,024 x 512) x 2 bytes of memory: 3.2 us.
        """
        got = seconds("rows", (128, 128, 64), 7, 8, 1024, 512, dtype=torch.bfloat16)
        want = 524_288 / (3 * 3.35e12 / 132) + 1e-6
        assert got == pytest.approx(want, rel=1e-12) == pytest.approx(7.886e-6, rel=1e-3)

    def test_bound_by_products(self) -> None:
        """Float32, 769 to 1,024 rows, 768 taken: (768 + 31.5) / 64 = 12.49 row tiles, by 8 experts 99.9, so 100, by 32
        columns: 3,200 tiles, 24.24 waves of 132, each 2 x 64 x 64 x 2,048 FLOP at 508 GFLOP/s and 1 us.
        """
        got = seconds("up_gated", (64, 64, 32), 10, 8, 2048, 2048, dtype=torch.float32)
        assert got == pytest.approx(3200 / 132 * (2 * 64 * 64 * 2048 / (67e12 / 132) + 1e-6), rel=1e-12)
        assert got == pytest.approx(8.26e-4, rel=1e-2)

    def test_bound_by_memory(self) -> None:
        """One row for each of 128 experts: their weights, 128 x 2,048 x 1,024 x 2 bytes, and the rows; 161 us."""
        got = seconds("down_bwd", (16, 128, 64), 0, 128, 2048, 1024, dtype=torch.bfloat16)
        moved = 2 * 128 * (2048 + 1024 + 2048 * 1024)
        assert got == pytest.approx(moved / 3.35e12, rel=1e-12) == pytest.approx(1.605e-4, rel=1e-3)

    def test_few_waves_are_whole(self) -> None:
        """As the first, with 2,048 columns: 160 tiles, so that 28 of them make a second wave."""
        got = seconds("rows", (128, 128, 64), 7, 8, 1024, 2048, dtype=torch.bfloat16)
        want = 2 * (524_288 / (3 * 3.35e12 / 132) + 1e-6)
        assert got == pytest.approx(want, rel=1e-12) == pytest.approx(1.577e-5, rel=1e-3)

    def test_contraction(self) -> None:
        """8 experts of 12 rows, one step of 64; a (1,024, 512) gradient each in 64 x 4 tiles: 2,048, in 15.5 waves of
        (16 + 128) x 64 x 2 bytes, 0.24 us each, and 1 us. With one wave of larger tiles the gradients' bytes decide.
        """
        got = seconds("contraction", (16, 128, 64), 4, 8, 1024, 512, dtype=torch.bfloat16)
        assert got == pytest.approx(2048 / 132 * (144 * 64 * 2 / (3 * 3.35e12 / 132) + 1e-6), rel=1e-12)
        large = seconds("contraction", (128, 256, 64), 4, 8, 1024, 512, dtype=torch.bfloat16)
        assert large == pytest.approx(2 * 8 * (12 * (1024 + 512) + 1024 * 512) / 3.35e12, rel=1e-12)


class TestChoice:
    def test_many_columns_take_wide_tiles(self) -> None:
        """With many tiles the operands' bytes decide, with few how many SMs are busy."""
        wide = choose("rows", 12, 64, 4096, 8192, torch.bfloat16, H100)
        assert (wide.block_m, wide.block_n) == (128, 256)
        few = choose("rows", 7, 2, 4096, 1024, torch.bfloat16, H100)
        assert few.block_m == 128 and few.block_n == 64, "8 tiles of 256 columns would leave most of 132 SMs idle"

    @pytest.mark.parametrize("kind", ROW_KINDS)
    def test_tiles_never_narrow_as_columns_grow(self, kind: str) -> None:
        widths = [choose(kind, 10, 8, 2048, 2**n, torch.bfloat16, H100).block_n for n in range(6, 16)]
        assert widths == sorted(widths) and widths[0] < widths[-1]

    @every_target
    def test_nothing_estimated_faster_is_passed_over(self, target: Target) -> None:
        for kind, bucket, (width_k, width_n) in itertools.product(KINDS, (0, 5, 9), WIDTHS):
            sizes = (bucket, 8, width_k, width_n, torch.float16, target)
            chosen = choose(kind, *sizes)
            others = [
                config
                for family in CONFIGS.values()
                if chosen in family[kind, 2]
                for config in family[kind, 2]
                if fits(config, torch.float16, target) and (kind == "contraction" or config.block_m == chosen.block_m)
            ]
            least = min(estimate_seconds(config, kind, *sizes) for config in others)
            assert estimate_seconds(chosen, kind, *sizes) == least

    def test_the_interpreter_has_small_tiles(self) -> None:
        """So that small shapes have several."""
        for kind, bucket in itertools.product(KINDS, BUCKETS):
            config = choose(kind, bucket, 4, 64, 64, torch.float16, INTERPRETER)
            assert max(config.block_m, config.block_n, config.block_k) == 32
            assert config.descriptors and config.persistent

    def test_hopper_and_later_walk_tiles_and_take_descriptors(self) -> None:
        for target in TARGETS.values():
            config = choose("rows", 8, 8, 1024, 1024, torch.bfloat16, target)
            is_datacenter = target.name in ("sm_90", "sm_100", "sm_103")
            assert (config.persistent, config.descriptors) == (is_datacenter, is_datacenter), target.name

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"kind": "rowz"}, "kind is 'rowz', expected one of 'up_gated', 'up_plain', 'rows', 'down_bwd'"),
            ({"dtype": torch.float64}, "dtype is torch.float64, expected torch.bfloat16 or torch.float16 or"),
            ({"num_experts": 0}, "num_experts is 0, expected a positive integer"),
            ({"width_k": -1}, "width_k is -1, expected a positive integer"),
            ({"width_n": 1.5}, "width_n is 1.5, expected a positive integer"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_it_refuses(self, changes: dict[str, Any], words: str) -> None:
        given = {"kind": "rows", "bucket": 3, "num_experts": 8, "width_k": 64, "width_n": 64, "dtype": torch.float16}
        with pytest.raises(ValueError, match=f"^sonic.kernels.triton.config.choose: {words}"):
            choose(**{**given, **changes}, target=H100)


# ---------------------------------------------------------------- targets


class TestTargets:
    @pytest.mark.parametrize(
        ("arch", "name"),
        [
            *((80, "sm_80"), (86, "sm_86"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90"), (94, "gfx942")),
            *((95, "gfx950"), (100, "sm_100"), (101, "sm_100"), (103, "sm_103"), (120, "sm_120"), (121, "sm_120")),
        ],
    )
    def test_of_a_compute_capability(self, arch: int, name: str) -> None:
        """Between two known ones the older; 9.4 and 9.5 are what torch calls AMD's CDNA 3 and 4."""
        assert target_of_arch(arch) is TARGETS[name]

    def test_without_one_the_interpreter(self) -> None:
        assert target_of_arch(None) is INTERPRETER
        assert targets.target_of(torch.device("cpu")) is INTERPRETER

    def test_by_name(self) -> None:
        assert all(target_named("here", name) is target for name, target in TARGETS.items())
        with pytest.raises(ValueError, match="^here: target is 'sm_70', expected one of 'sm_80', 'sm_86'"):
            target_named("here", "sm_70")

    @every_target
    def test_has_a_chip_with_peaks(self, target: Target) -> None:
        chip = CHIPS[target.chip]
        assert all(chip.flops_per_second[name] > 0 for name in ("bfloat16", "float16", "float32"))
        assert target.shared_bytes >= 64 * 1024 and target.num_compute_units > 0
        assert target.has_descriptors == (target is INTERPRETER or str(target.arch) in ("90", "100", "103", "120"))

    @pytest.mark.parametrize(
        ("value", "is_on"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True), ("on", True)]
    )
    def test_interprets(self, value: str | None, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if value is not None:
            monkeypatch.setenv("TRITON_INTERPRET", value)
        assert targets.interprets() is is_on


# ---------------------------------------------------------------- without Triton


WITHOUT_TRITON = """
    import importlib.util
    import sys


    class Hide:
        '''Finds everything that the finders before found, but Triton.'''

        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, *more):
            return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, *more)

        def __getattr__(self, name):
            return getattr(self.finder, name)


    sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
    assert importlib.util.find_spec("triton") is None and importlib.util.find_spec("torch") is not None

    import torch
    from sonic import kernels
    from sonic.kernels import UnsupportedError, dispatch, triton
    from sonic.kernels.triton import config, target

    assert config.row_tile(7, torch.bfloat16, target.TARGETS["sm_90"]) == 128
    assert config.choose("rows", 7, 8, 64, 64, torch.bfloat16, target.INTERPRETER).block_n == 32
    missing = "Triton is not installed (the extra 'triton')"
    request = dispatch.Request("up_proj", "cuda", 90, torch.bfloat16, 64, 8, 32, 16, "swiglu")
    assert triton.unsupported_reasons(request) == [missing], triton.unsupported_reasons(request)
    sizes = dict(num_tokens=64, num_experts=8, top_k=2, hidden_size=32, intermediate_size=16)
    for op in dispatch.OPS:
        told = kernels.explain(op, **sizes, device="cuda", arch=80)
        assert told.backend == "reference" and told.reasons["triton"] == [missing], told
    try:
        dispatch.select(request, "triton")
    except UnsupportedError as refused:
        assert str(refused).endswith(missing), refused
    else:
        raise AssertionError("served without Triton")
    assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
    print("well")
"""


def test_choosing_needs_no_triton() -> None:
    """Configurations, targets and the reasons of dispatch import none; and where there is none the reason says so."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_TRITON)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.split() == ["well"], done.stderr


def test_a_variable_set_too_late_is_told() -> None:
    """Triton's own functions were made to be compiled by then, and would fail inside of a kernel."""
    script = (
        "import os; os.environ.pop('TRITON_INTERPRET', None); import torch, triton.language, sonic\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "try: sonic.MoE(16, 8, 4, 2, backend='triton')(torch.randn(3, 16))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "needs a GPU; on a CPU only with TRITON_INTERPRET=1 from the start" in done.stdout
