"""Measuring configurations of the CuTe kernels: what is kept, and how; without a GPU, by made-up measurements."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from sonic.kernels.cute import config, keys, tuning

SIZES = (4096, 256, 128, 8, 2)


def test_the_fastest_of_each_is_kept() -> None:
    lines: list[str] = []
    ticks = itertools.count(1000, -1)  # the last that is tried is the fastest
    best = tuning.tune(SIZES, device="cpu", measure=lambda call: float(next(ticks)), report=lines.append)
    kinds = {"up_gated", "rows", "down_bwd_gated", "contraction"}
    assert {key.split("/")[0] for key in best} == kinds
    bucket = config.rows_bucket(SIZES[0] * SIZES[4], SIZES[3])
    for key, (chosen, _) in best.items():
        kind = key.split("/")[0]
        assert chosen == config.fitting(kind, bucket)[-1], key
    calls = (("up_gated", 1), ("rows", 2), ("down_bwd_gated", 1), ("contraction", 2))
    assert len(lines) == sum(times * len(config.fitting(kind, bucket)) for kind, times in calls)


def test_what_is_measured_is_what_is_forced() -> None:
    seen = []

    def measure(call: object) -> float:
        seen.append(dict(keys._FORCED.get() or {}))
        return 1.0

    tuning.tune(SIZES, device="cpu", measure=measure)
    assert all(len(forced) == 1 for forced in seen)
    assert {kind for forced in seen for kind in forced} == {"up_gated", "rows", "down_bwd_gated", "contraction"}


def test_what_was_saved_goes_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = tuning.tune(SIZES, device="cpu", measure=lambda call: 1.0)
    path = tuning.save(best, tmp_path, "NVIDIA H200", "as told")
    again = tuning.save({"rows/few/4/8/8": (config.CANDIDATES["rows"][0], 2.0)}, tmp_path, "NVIDIA H200", "again")
    content = json.loads(path.read_text())
    assert path == again and path.name == "NVIDIA_H200.json"
    assert set(content["choices"]) == {*best, "rows/few/4/8/8"} and len(content["measured"]) == 2
    assert content["measured"][0]["command"] == "as told" and content["measured"][0]["date"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing half written is left"
    config.choose.cache_clear()
    monkeypatch.setattr(config, "tuned", lambda chip: content["choices"] if chip == "NVIDIA_H200" else {})
    bucket = config.rows_bucket(SIZES[0] * SIZES[4], SIZES[3])
    choice = config.choose("up_gated", bucket, 8, 256, 256, "NVIDIA_H200")
    assert choice.source == "measured on NVIDIA_H200"
    assert choice.config == best[config.regime_key("up_gated", bucket, 8, 256, 256)][0]
    assert config.choose("up_gated", bucket, 8, 256, 256, "H100").source == "model"
    config.choose.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((1, 2, 3), "five: T, D, N, E and K"), ((8, 8, 8, 2, 3), "K of at most E = 2"), ((8, 8, 0, 2, 1), "N")],
)
def test_bad_sizes(sizes: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tuning.tune(sizes, device="cpu", measure=lambda call: 1.0)


def test_the_command_wants_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tuning.main(["--shape", "1,2,3,4,5", "--out", "tuned"])
    assert "no Hopper GPU" in capsys.readouterr().err
