"""Measured configurations: what is tried, what is kept, where it is used. A made-up clock stands for the GPU's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_all_as_good_as_torch, dense_loop, make_problem, results, sonic_results, torch_experts

pytest.importorskip("triton")

from sonic.kernels.triton import grouped_gemm, tuning  # noqa: E402
from sonic.kernels.triton.config import FAMILY_OF, GemmConfig, choose, row_tile, rows_bucket  # noqa: E402
from sonic.kernels.triton.target import INTERPRETER, TARGETS  # noqa: E402
from sonic.kernels.triton.tuning import GemmKey, TunedConfigs  # noqa: E402

SIZES = (40, 24, 16, 4, 2)  # T, D, N, E, K
OPS = (
    "up_proj",
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
)
KEY = GemmKey("up_proj", "up_gated", 7, 128, 1536, 512, torch.bfloat16)


@pytest.fixture(autouse=True)
def _model_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts undecided, and leaves the model in charge."""
    monkeypatch.delenv(tuning.TUNED_FILE, raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    tuning.use(None)
    tuning._IN_USE.is_decided = False


class Clock:
    """Says that the last of the candidates is the fastest, and remembers what was launched."""

    def __init__(self) -> None:
        self.milliseconds = 100.0

    def __call__(self, call: Any) -> float:
        call()
        self.milliseconds -= 1
        return self.milliseconds


def test_a_layer_is_tuned_op_by_op() -> None:
    lines: list[str] = []
    tuned = tuning.tune(*SIZES, dtype=torch.float32, device="cpu", measure=Clock(), report=lines.append)
    assert [key.op for key in tuned.configs] == list(OPS)
    assert tuned.target == "interpreter"
    bucket = rows_bucket(80, 4)
    for key, config in tuned.configs.items():
        tried = tuning.candidates(key.kind, bucket, torch.float32, INTERPRETER)
        assert config == tried[-1] and key.bucket == bucket and key.num_experts == 4
    assert len(lines) == sum(len(tuning.candidates(k.kind, bucket, torch.float32, INTERPRETER)) for k in tuned.configs)
    assert all(time > 0 for time in tuned.microseconds.values())


def test_keys_are_those_that_the_ops_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that no launch asks for would be tuned for nothing."""
    asked: list[GemmKey] = []

    def watch(key: GemmKey, target: Any) -> GemmConfig:
        asked.append(key)
        return choose(key.kind, key.bucket, key.num_experts, key.width_k, key.width_n, key.dtype, target)

    tuned = tuning.tune(*SIZES, dtype=torch.float32, device="cpu", measure=Clock())
    monkeypatch.setattr(grouped_gemm, "config_of", watch)
    sonic_results(make_problem(*SIZES, torch.float32), backend="triton")
    assert set(tuned.configs) == set(asked)


def test_what_was_measured_is_used_and_is_right() -> None:
    """A tile that the model would not choose, seen in the launches by its own block sizes, with the same results."""
    problem = make_problem(*SIZES, torch.float32)
    tuned = tuning.tune(*SIZES, dtype=torch.float32, device="cpu", measure=Clock())
    other = GemmConfig(16, 16, 16, 4, 1, slices=1)
    tuned.configs = dict.fromkeys(tuned.configs, other)
    tuning.use(tuned)
    key = next(iter(tuned.configs))
    assert tuning.config_of(key, INTERPRETER) == other
    assert tuning.config_of(key, TARGETS["sm_90"]) != other, "measured on another chip"
    assert tuning.config_of(dataclasses.replace(key, bucket=key.bucket + 1), INTERPRETER) != other
    want, torchs = results(dense_loop, problem, torch.float64), results(torch_experts, problem)
    assert_all_as_good_as_torch(sonic_results(problem, backend="triton"), want, torchs, torch.float32)
    tuning.use(None)
    assert tuning.config_of(key, INTERPRETER) != other


def test_forced_holds_inside_only() -> None:
    other = GemmConfig(16, 16, 16, 4, 1)
    with tuning.forced(other):
        assert tuning.config_of(KEY, TARGETS["sm_90"]) == other
    assert tuning.config_of(KEY, TARGETS["sm_90"]) == choose(
        "up_gated", 7, 128, 1536, 512, torch.bfloat16, TARGETS["sm_90"]
    )


def test_a_file_is_used_from_the_first_kernel_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "tuned.json", GemmConfig(64, 64, 64, 4, 4)
    tuning.save(TunedConfigs("sm_90", configs={KEY: other}, microseconds={KEY: 12.5}), path)
    monkeypatch.setenv(tuning.TUNED_FILE, str(path))
    assert tuning.config_of(KEY, TARGETS["sm_90"]) == other
    assert tuning.config_of(KEY, TARGETS["sm_100"]) != other


def test_saving_keeps_other_keys_and_replaces_equal_ones(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuned.json"
    first, second = GemmConfig(64, 64, 64, 4, 4), GemmConfig(128, 64, 64, 4, 4, persistent=True)
    other = dataclasses.replace(KEY, bucket=3)
    tuning.save(TunedConfigs("sm_90", configs={KEY: first, other: first}, microseconds={KEY: 3.0, other: 4.0}), path)
    tuning.save(TunedConfigs("sm_90", configs={KEY: second}, microseconds={KEY: 2.0}), path)
    read = tuning.load(path)
    assert read.configs == {KEY: second, other: first} and read.microseconds == {KEY: 2.0, other: 4.0}
    assert read.target == "sm_90" and [child.name for child in path.parent.iterdir()] == ["tuned.json"]


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    tuning.save(TunedConfigs("sm_90", configs={KEY: GemmConfig(64, 64, 64, 4, 4)}), path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save(TunedConfigs("sm_90", configs={KEY: GemmConfig(32, 64, 64, 4, 4)}), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_another_kind_of_chip_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    tuning.save(TunedConfigs("sm_90", configs={KEY: GemmConfig(64, 64, 64, 4, 4)}), path)
    with pytest.raises(ValueError, match=r"save: path is .*, measured on sm_90, expected one measured on sm_100"):
        tuning.save(TunedConfigs("sm_100", configs={KEY: GemmConfig(64, 64, 64, 4, 4)}), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "expected a file that tuning has written"),
        ("[]", "expected a file that tuning has written"),
        ('{"format": 99}', r"expected a file that tuning has written \(format 1\)"),
        ('{"format": 1, "target": "sm_90", "triton": "0.0", "configs": {}}', "measured with Triton 0.0, expected one"),
        ('{"format": 1, "target": "sm_90", "triton": "HERE", "configs": {"a/b": {}}}', "expected a file that tuning"),
        ('{"format": 1, "target": "sm_90", "triton": "HERE", "configs": {"KEY": {"microseconds": 1, "x": 2}}}', "'x'"),
        ('{"format": 1, "triton": "HERE", "configs": {}}', "'target'"),
    ],
)
def test_files_that_cannot_be_used(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    if content is not None:
        path.write_text(content.replace("HERE", tuning.triton.__version__).replace("KEY", str(KEY)))
    with pytest.raises(ValueError, match=r"sonic.kernels.triton.tuning.load: path is .*tuned.json") as refused:
        tuning.load(path)
    assert re.search(message, str(refused.value)), str(refused.value)


def test_keys_survive_being_written() -> None:
    assert GemmKey.parse(str(KEY)) == KEY
    for text in ("", "a/b/c", str(KEY).replace("bfloat16", "int8"), str(KEY).replace("/7/", "/seven/")):
        with pytest.raises(ValueError):
            GemmKey.parse(text)


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("kind", ["up_gated", "down_bwd", "rows", "contraction"])
def test_candidates_keep_the_row_tile_and_fit(kind: str, target: str) -> None:
    for bucket in (0, 5, 8, 12):
        tried = tuning.candidates(kind, bucket, torch.bfloat16, TARGETS[target])
        assert tried and len(set(tried)) == len(tried), f"{kind} on {target}: {tried}"
        assert all(config.shared_bytes(2) <= TARGETS[target].shared_bytes for config in tried)
        if kind != "contraction":
            assert {config.block_m for config in tried} == {row_tile(bucket, torch.bfloat16, TARGETS[target])}
        if not TARGETS[target].has_descriptors:
            assert not any(config.descriptors for config in tried) or kind == "contraction"
    assert FAMILY_OF[target]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((0, 24, 16, 4, 2), {}, "num_tokens is 0"),
        ((40, 24, 16, 4, 5), {}, "top_k is 5, expected at most num_experts = 4"),
        (SIZES, {"dtype": torch.float64}, "dtype is torch.float64, expected bfloat16 or float16 or float32"),
    ],
)
def test_tune_refuses(sizes: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning.tune(*sizes, device="cpu", **options)


@pytest.mark.parametrize("shape", ["1,2,3", "a,b,c,d,e", ""])
def test_the_command_names_what_is_wrong(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tuning.main(["--shape", shape, "--out", str(tmp_path / "x.json")])
    assert f"--shape is {shape!r}, expected five integers" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_tunes_a_small_layer(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    assert tuning.main(["--shape", "512,128,64,8,2", "--out", str(path)]) == 0
    assert {key.op for key in tuning.load(path).configs} == set(OPS)
