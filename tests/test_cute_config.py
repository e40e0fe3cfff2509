"""Configurations, keys and requests of the CuTe-DSL backend as data: nothing here runs a kernel, or needs CuTe-DSL."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sonic
from sonic import kernels
from sonic.kernels import UnsupportedError
from sonic.kernels.cute import LEFT_TO_OTHERS, config
from sonic.kernels.cute.config import (
    CANDIDATES,
    KINDS,
    REGIMES,
    SHARED_BYTES,
    TileConfig,
    choose,
    estimate_seconds,
    invalid_reason,
    regime_of,
    row_tile,
    rows_bucket,
    shared_bytes,
)
from sonic.kernels.cute.keys import KernelKey, Sizes, contraction_key, forced, layer_keys, rows_key

BUCKETS = range(20)
MOST_KEYS = 12  # that a layer meets, however many tokens it is given
ROW_KINDS = tuple(kind for kind in KINDS if kind != "contraction")

# (D, N, E, K)
LAYERS = ((1536, 256, 128, 8), (4096, 1024, 64, 4), (2048, 768, 128, 8), (7168, 2048, 256, 8), (512, 256, 8, 2))
TOKENS = sorted({round(2 ** (17 * step / 99)) for step in range(100)} | set(range(1, 24)))
ACTIVATIONS = (("swiglu", "concatenated"), ("swiglu_oai", "interleaved"), ("relu2", "concatenated"))


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_can_be_made(kind: str) -> None:
    found = CANDIDATES[kind]
    assert len(set(found)) == len(found) >= 2
    for candidate in found:
        assert invalid_reason(candidate, kind) is None
        assert shared_bytes(candidate, kind) <= SHARED_BYTES == 227 * 1024
        threads = candidate.producer_registers + 2 * candidate.consumer_registers
        assert 128 * threads <= 65_536, "registers of a multiprocessor"
        assert candidate.producer_registers % 8 == candidate.consumer_registers % 8 == 0
    if kind != "contraction":
        assert {c.tile_m for c in found if c.cluster_m == 1} == {64, 128}, "for either row tile"


@pytest.mark.parametrize("kind", KINDS)
def test_a_ring_has_as_many_slots_as_fit(kind: str) -> None:
    for candidate in CANDIDATES[kind]:
        more = dataclasses.replace(candidate, slots=candidate.slots + 1)
        assert candidate.slots == 8 or "shared memory" in str(invalid_reason(more, kind))


def test_shared_memory_by_hand() -> None:
    """Steps of 64 values of both operands, a pair of boxes for each consumer, H where it is fetched, barriers."""
    ring, box = 4 * (128 + 256) * 64 * 2, 64 * 128
    assert shared_bytes(TileConfig(128, 256, 4), "rows") == ring + 2 * 2 * box + 1024
    ring = 4 * (128 + 128) * 64 * 2
    h = 2 * (128 // 64) * 2 * box  # consumers x slices x gate and up; of a block of 64 rows each
    assert shared_bytes(TileConfig(128, 128, 4), "down_bwd_gated") == ring + 2 * 2 * box + h + 1024


@pytest.mark.parametrize(
    ("kind", "reason", "fields"),
    [
        ("rows", "tile_m is 96", (96, 128, 3)),
        ("rows", "tile_m is 64, expected 64 .pingpong.", (64, 128, 3)),
        ("rows", "tile_n is 160", (128, 160, 3)),
        ("rows", "cluster_m is 4", (128, 128, 3, False, 4)),
        ("rows", "slots is 1", (128, 128, 1)),
        ("rows", "256 registers of sums", (128, 256, 3, True)),
        ("up_gated", "tile_n is 192, expected a multiple of 128", (128, 192, 3)),
        ("up_plain", "192 registers of sums", (128, 192, 3, True)),
        ("down_bwd_gated", "bytes of shared memory", (128, 256, 3)),
        ("contraction", "shares nothing", (128, 128, 3, False, 2)),
        ("contraction", "a contraction gathers tiles", (128, 192, 3)),
    ],
)
def test_what_cannot_be_made(kind: str, reason: str, fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=f"{kind} is TileConfig.*{reason}.*expected a configuration that this kind"):
        with forced({kind: TileConfig(*fields)}):
            pass


# ---------------------------------------------------------------- regimes


def test_buckets_of_rows() -> None:
    assert [rows_bucket(rows, 1) for rows in (0, 1, 2, 3, 64, 65, 128, 129)] == [0, 0, 1, 2, 6, 7, 7, 8]
    assert rows_bucket(1000, 10) == rows_bucket(1280, 10) == 7
    assert rows_bucket(1, 64) == 0


def test_regimes_follow_the_rows() -> None:
    """From few to many, each met; row tiles of 64 exactly where there are few."""
    met = [regime_of(bucket) for bucket in BUCKETS]
    assert met == sorted(met, key=list(REGIMES).index) and set(met) == set(REGIMES)
    for bucket in BUCKETS:
        assert (row_tile(bucket) == 64) == (regime_of(bucket) == "few")
    for regime, mean in REGIMES.items():
        assert regime_of(rows_bucket(round(mean * 64), 64)) == regime, "the mean that stands for it lies in it"


@pytest.mark.parametrize(("activation", "glu_layout"), ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_meets_few_keys(layer: tuple[int, ...], bias: bool, activation: str, glu_layout: str) -> None:
    """Whatever the number of tokens, and more than one: each regime has its own."""
    width_d, width_n, num_experts, top_k = layer
    options = {"activation": activation, "glu_layout": glu_layout, "bias": bias}
    met: set[KernelKey] = set()
    for tokens in TOKENS:
        for training in (True, False):
            found = layer_keys(tokens * top_k, num_experts, width_d, width_n, **options, training=training)
            assert len(set(found)) == len(found)
            if training:
                met |= set(found)
                assert {key.op for key in found} >= set(OPS)
            else:
                assert [key.op for key in found] == ["up_proj", "down_proj"] and "h" not in found[0].flags
    assert len(OPS) < len(met) <= MOST_KEYS, sorted((k.op, k.config.tile_m, k.config.tile_n) for k in met)


OPS = (
    "up_proj",
    "down_proj",
    "down_proj_bwd_input",
    "up_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_weight",
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_all_kernels_of_a_layer_have_one_row_tile(layer: tuple[int, ...]) -> None:
    """That which token rounding is told."""
    width_d, width_n, num_experts, top_k = layer
    for tokens in TOKENS:
        told = kernels.explain(
            "up_proj",
            num_tokens=tokens,
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=width_d,
            intermediate_size=width_n,
        )
        rows = config.tile_rows(told.request)
        for key in layer_keys(tokens * top_k, num_experts, width_d, width_n, bias=True):
            assert key.op.endswith("_bwd_weight") or key.config.tile_m == rows


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_takes_the_cheapest(kind: str) -> None:
    """Of the candidates with the row tile of the bucket; with clusters only where they are worth a pair of tiles."""
    for bucket, (width_d, width_n, num_experts, _) in itertools.product(BUCKETS, LAYERS):
        chosen = choose(kind, bucket, num_experts, width_d, width_n)
        assert chosen.source == "model" and chosen.config in CANDIDATES[kind]
        regime = regime_of(bucket)
        if kind == "contraction":
            regime = "many"
        else:
            assert chosen.config.tile_m == row_tile(bucket)
        shares = kind.startswith("up_") and regime == "many"
        assert shares or chosen.config.cluster_m == 1
        if not kind.startswith("up_") and regime == "some":
            regime = "many"

        sizes = (REGIMES[regime], num_experts, width_d, width_n)
        for other in CANDIDATES[kind]:
            if (kind == "contraction" or other.tile_m == row_tile(bucket)) and (shares or other.cluster_m == 1):
                assert estimate_seconds(chosen.config, kind, *sizes) <= estimate_seconds(other, kind, *sizes)


def test_more_work_takes_longer() -> None:
    for kind in KINDS:
        for candidate in CANDIDATES[kind]:
            base = (1024.0, 64, 2048, 1024)
            seconds = estimate_seconds(candidate, kind, *base)
            assert 1e-6 < seconds < 1.0
            for position in range(4):
                more = list(base)
                more[position] *= 4
                assert estimate_seconds(candidate, kind, *more) > seconds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", 3, 8, 64, 64), "kind is 'up', expected one of 'up_gated', 'up_plain'"),
        (("rows", 3, 0, 64, 64), "num_experts is 0"),
        (("rows", 3, 8, -1, 64), "width_k is -1"),
        (("rows", 3, 8, 64, 0), "width_n is 0"),
        (("rows", -1, 8, 64, 64), "bucket is -1, expected at least 0"),
    ],
)
def test_choices_that_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"sonic.kernels.cute.config.choose: {message}"):
        choose(*arguments)


def forget() -> None:
    """What was read and chosen."""
    config.tuned.cache_clear()
    config.choose.cache_clear()


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a file of measurements for a chip, where the package's would lie."""
    monkeypatch.setattr(config.importlib.resources, "files", lambda package: tmp_path)
    forget()

    def write(chip: str, choices: dict[str, Any]) -> None:
        folder = tmp_path / "tuned"
        folder.mkdir(exist_ok=True)
        (folder / f"{chip}.json").write_text(json.dumps({"measured": {"chip": chip}, "choices": choices}))
        forget()

    yield write
    monkeypatch.undo()
    forget()


def test_measurements_go_before_the_model(measured: Any) -> None:
    other = next(c for c in CANDIDATES["rows"] if c != choose("rows", 11, 8, 64, 128, "chip").config)
    measured("chip", {"rows/many/8/64/128": dataclasses.asdict(other)})
    found = choose("rows", 11, 8, 64, 128, "chip")
    assert (found.config, found.source) == (other, "measured on chip")
    assert Sizes(8 * 2048, 8, 128, 64, "bfloat16", "chip").config("rows") == other
    for elsewhere in (("rows", 11, 8, 64, 136, "chip"), ("rows", 11, 8, 64, 128, "another"), ("rows", 0, 8, 64, 128)):
        assert choose(*elsewhere).source == "model"


def test_a_measurement_that_cannot_be_made_is_no_choice(measured: Any) -> None:
    broken = TileConfig(128, 256, 8)
    measured("chip", {"rows/many/8/64/128": dataclasses.asdict(broken)})
    with pytest.raises(AssertionError, match="a measured configuration is not valid: needs .* bytes of shared memory"):
        choose("rows", 11, 8, 64, 128, "chip")


# ---------------------------------------------------------------- keys


def is_scalar(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        return all(is_scalar(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return all(map(is_scalar, value))
    return value is None or isinstance(value, (bool, int, str))


def test_keys_hold_scalars_only() -> None:
    """So that a key keeps nothing alive, and reads the same in every process."""
    for key in layer_keys(4096, 8, 512, 256, bias=True):
        assert is_scalar(key), key
        assert eval(repr(key), {"KernelKey": KernelKey, "TileConfig": TileConfig}) == key
        assert hash(key) == hash(dataclasses.replace(key))


def test_sizes_are_no_part_of_a_key() -> None:
    """Another width leads to another key by its configuration alone."""
    key = rows_key("down_proj", Sizes(4096, 8, 512, 256, "bfloat16"))
    for sizes in (Sizes(4095, 8, 512, 256, "bfloat16"), Sizes(4096, 8, 504, 264, "bfloat16")):
        other = rows_key("down_proj", sizes)
        assert dataclasses.replace(other, config=key.config) == key


def test_what_a_key_holds() -> None:
    sizes = Sizes(4096, 8, 512, 256, "float16")
    gated = rows_key("up_proj", sizes, gathers=True, activation="geglu", glu_layout="interleaved", flags=("h",))
    assert (gated.activation, gated.glu_layout, gated.dtype, gated.gathers) == ("geglu", "interleaved", "float16", True)
    plain = [rows_key("up_proj", sizes, activation="relu", glu_layout=layout) for layout in kernels.ops.GLU_LAYOUTS]
    assert plain[0] == plain[1] and plain[0].glu_layout is None
    adding = contraction_key("up_proj_bwd_weight", sizes, gathers=True, out_dtype="float32", adds=True)
    assert (adding.flags, adding.out_dtype, adding.config.cluster_m) == (("adds",), "float32", 1)


def test_a_configuration_can_be_forced() -> None:
    """For its kind alone, inside alone; the inner one goes first."""
    sizes = Sizes(4096, 8, 512, 256, "bfloat16")
    usual = {kind: sizes.config(kind) for kind in KINDS}
    first, second = (next(c for c in CANDIDATES[kind] if c != usual[kind]) for kind in ("rows", "contraction"))
    with forced({"rows": first}):
        assert sizes.config("rows") == first
        with forced({"contraction": second, "rows": usual["rows"]}):
            assert (sizes.config("contraction"), sizes.config("rows")) == (second, usual["rows"])
        assert {kind: sizes.config(kind) for kind in KINDS} == usual | {"rows": first}
    with contextlib.suppress(KeyError), forced({"rows": first}):
        raise KeyError
    assert {kind: sizes.config(kind) for kind in KINDS} == usual
    with pytest.raises(ValueError, match="sonic.kernels.cute.keys.forced: kind is 'row', expected one of"):
        with forced({"row": first}):
            pass


# ---------------------------------------------------------------- requests

SIZES: dict[str, Any] = {"num_tokens": 64, "num_experts": 8, "top_k": 2, "hidden_size": 32, "intermediate_size": 16}
MISSING = "CuTe-DSL is not installed (the extra 'cute')"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CuTe-DSL were, whether it is or not."""
    real = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return True if name == "cutlass" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_hopper_is_served(op: str, dtype: torch.dtype) -> None:
    """By automatic choice, with the row tile of these rows per expert."""
    for tokens in (16, 4096):
        told = kernels.explain(op, **{**SIZES, "num_tokens": tokens}, device="cuda", arch=90, dtype=dtype)
        assert (told.backend, told.reasons["cute"]) == ("cute", [])
        tile = row_tile(rows_bucket(tokens * 2, 8))
        assert told.tile_rows == tile and f"row tile: {tile}" in str(told)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("op", LEFT_TO_OTHERS)
def test_what_is_left_to_others(op: str) -> None:
    """Also where this backend is insisted on."""
    for backend in (None, "cute"):
        told = kernels.explain(op, **SIZES, device="cuda", arch=90, backend=backend)
        assert told.backend not in ("cute", None) and f"leaves {op} to the other backends" in told.reasons["cute"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"arch": 80}, ["needs compute capability 9.0 (Hopper), this is sm_80"]),
        ({"arch": 100}, ["needs compute capability 9.0 (Hopper), this is sm_100"]),
        ({"arch": 120}, ["needs compute capability 9.0 (Hopper), this is sm_120"]),
        ({"dtype": torch.float32}, ["has no kernels for float32"]),
        ({"dtype": torch.float64}, ["has no kernels for float64"]),
        ({"hidden_size": 36}, ["needs widths that are multiples of 8, these are 36 and 16"]),
        ({"intermediate_size": 12}, ["needs widths that are multiples of 8, these are 32 and 12"]),
        ({"device": "xpu", "arch": None}, ["has no kernels for xpu"]),
        ({"device": "cpu", "arch": None}, ["needs a Hopper GPU; on a CPU only inside of sonic.simulator.hopper()"]),
        (
            {"arch": 80, "dtype": torch.float32},
            ["needs compute capability 9.0 (Hopper), this is sm_80", "has no kernels for float32"],
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_is_refused(options: dict[str, Any], reasons: list[str]) -> None:
    asked = {"device": "cuda", "arch": 90, **SIZES, **options}
    told = kernels.explain("up_proj", **asked)
    assert told.reasons["cute"] == reasons and told.backend not in ("cute", None)
    insisted = kernels.explain("up_proj", **asked, backend="cute")
    assert insisted.backend is None and f"cute: {'; '.join(reasons)}" in str(insisted)


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "cutlass" else real(name))
    told = kernels.explain("up_proj", **SIZES, device="cuda", arch=90)
    assert told.reasons["cute"] == [MISSING] and told.backend != "cute"


@pytest.mark.usefixtures("installed")
def test_a_cpu_outside_of_the_simulator_is_refused() -> None:
    x, w1, w2 = (torch.randn(shape).bfloat16() for shape in ((6, 16), (2, 16, 16), (2, 16, 8)))
    plan = sonic.RoutingPlan.from_topk(torch.zeros(6, 1, dtype=torch.int64), 2)
    reason = r"needs a Hopper GPU; on a CPU only inside of sonic\.simulator\.hopper\(\)"
    with pytest.raises(UnsupportedError, match=f"backend is 'cute', which cannot serve this call: {reason}"):
        sonic.moe_mlp(x, w1, w2, torch.ones(6, 1), plan, backend="cute")
    with pytest.raises(UnsupportedError, match=reason):
        sonic.expert_mlp(x, w1, w2, torch.tensor([4, 2]), backend="cute")
    with pytest.raises(UnsupportedError, match=reason):
        sonic.MoE(16, 8, 2, 1, backend="cute", dtype=torch.bfloat16)(x)


def test_asking_imports_no_compiler() -> None:
    """Nor does choosing, nor making keys."""
    code = """
        import sys
        from sonic import kernels
        from sonic.kernels.cute import keys
        sizes = dict(num_tokens=64, num_experts=8, top_k=2, hidden_size=32, intermediate_size=16)
        for device, arch in (("cpu", None), ("cuda", 90)):
            str(kernels.explain("up_proj", **sizes, device=device, arch=arch))
        assert len(keys.layer_keys(128, 8, 32, 16)) == 6
        assert "cutlass" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
