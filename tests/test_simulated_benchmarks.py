"""Padding and rerouting are simulated: the draws are those that are claimed, and the sums those of the library."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sonic
from benchmarks import drawing, padding, report, rerouting

# ---------------------------------------------------------------- padding

# Waste in % from an independent Monte-Carlo run of 200 multinomial draws, rounded as shown:
# (T, K, E) -> at M = 64, 128, 192, 256, and at M = 128 with log-normal probabilities, sigma 0.5.
KNOWN = {
    (32768, 8, 128): (1.5, 3.1, 3.8, 6.2, 3.1),
    (24576, 8, 128): (2.0, 4.1, 6.2, 8.2, 4.2),
    (32768, 8, 256): (3.1, 6.1, 12.1, 12.3, 6.2),
    (32768, 10, 512): (4.9, 9.8, 19.8, 20.0, 9.8),
    (16384, 8, 384): (10.3, 12.9, 13.1, 50.0, 18.3),
    (16384, 10, 512): (9.7, 20.0, 20.0, 60.0, 20.4),
    (16384, 2, 128): (12.1, 24.1, 50, 48, 24),
    (8192, 4, 128): (12.1, 24.1, 50, 48, 24),
}


@pytest.mark.parametrize("shape", KNOWN, ids=str)
def test_padding_repeats_the_known_table(shape: tuple[int, int, int]) -> None:
    num_tokens, top_k, num_experts = shape
    useful = num_tokens * top_k
    for place, known in enumerate(KNOWN[shape]):
        tile, skew = (128, 0.5) if place == 4 else (padding.TILES[place], 0.0)
        count = padding.draw_counts(num_tokens, num_experts, top_k, skew=skew, draws=200, seed=1)
        waste = 100 * padding.wasted_rows(count, tile) / useful
        rounding = 0.05 if isinstance(known, float) else 0.5
        # Both are means of 200 draws; whether those of the skewed column shared their probabilities is not known.
        noise = 3 * float(waste.std()) * (1 if skew else (2 / 200) ** 0.5)
        assert float(waste.mean()) == pytest.approx(known, abs=rounding + noise), tile


@pytest.mark.parametrize("law", padding.LAWS)
@pytest.mark.parametrize("skew", padding.SKEWS)
def test_every_token_takes_k_rows_and_draws_repeat(law: str, skew: float) -> None:
    options: dict[str, Any] = {"skew": skew, "draws": 7, "law": law}
    count = padding.draw_counts(300, 12, 5, seed=3, **options)
    assert count.shape == (7, 12) and (count.sum(1) == 300 * 5).all() and (count >= 0).all()
    assert np.array_equal(count, padding.draw_counts(300, 12, 5, seed=3, **options))
    assert not np.array_equal(count, padding.draw_counts(300, 12, 5, seed=4, **options))
    if law == "topk":
        assert count.max() <= 300, "an expert at most once per token"
        assert (padding.draw_counts(9000, 4, 4, seed=0, **options) == 9000).all()


def test_the_laws_have_the_means_and_spreads_of_their_formulas() -> None:
    T, E, K = 2000, 8, 2
    for law, variance in (("multinomial", T * K / E * (1 - 1 / E)), ("topk", T * K / E * (1 - K / E))):
        count = padding.draw_counts(T, E, K, skew=0.0, draws=150, seed=0, law=law)
        assert count.mean(0) == pytest.approx(T * K / E, rel=0.02)
        assert count.var() == pytest.approx(variance, rel=0.15), law
    one = padding.draw_counts(100_000, 6, 1, skew=1.0, draws=1, seed=5, law="topk") / 100_000
    weight = np.exp(np.random.default_rng(5).standard_normal((1, 6)))  # K = 1: shares are the probabilities
    assert one == pytest.approx(weight / weight.sum(), abs=0.01)
    with pytest.raises(ValueError, match="law is 'poisson', expected one of multinomial, topk"):
        padding.draw_counts(8, 4, 2, skew=0.0, draws=1, seed=0, law="poisson")


def test_waste_is_what_the_librarys_plan_says() -> None:
    T, E, K = 500, 13, 3
    expert_TK = (torch.rand(T, E) ** 3 * torch.rand(E)).topk(K, dim=1).indices
    plan = sonic.RoutingPlan.from_topk(expert_TK, E)
    count = plan.tokens_per_expert().numpy().astype(np.int64)
    for tile in (1, 7, 64, 128, 1000):
        assert padding.wasted_rows(count, tile) == int(plan.rows_with_padding(tile)) - plan.num_rows
    assert padding.wasted_rows(np.array([0, 1, 64, 65]), 64) == 0 + 63 + 0 + 63
    assert padding.nearest_rows(np.array([0, 31, 32, 95, 96, 128]), 64) == 0 + 0 + 64 + 64 + 128 + 128


def test_the_closed_form_holds_where_rows_spread_over_a_tile_and_fails_where_not() -> None:
    assert padding.closed_form(1024, 128) == pytest.approx(127 / 2048)
    options: dict[str, Any] = {"draws": 200, "seed": 0}
    for model, size, skew in (("Qwen3-235B", 65536, 0.0), ("OLMoE", 32768, 0.0), ("Kimi-K2", 32768, 0.5)):
        cell = padding.measure(model, size, skew, **options)
        for tile, entry in cell["tiles"].items():
            if cell["spread"] >= 0.36 * tile:
                assert abs(entry["relative_error"]) <= 0.05
    # 320 rows lie half-way between multiples of 128 (20% waste, as the form says) and just above one of 256 (60%).
    cell = padding.measure("Qwen3-Next", 16384, 0.0, **options)
    assert cell["rows_per_expert"] == 320
    assert cell["tiles"][256]["relative_error"] == pytest.approx(0.5, abs=0.02)
    assert cell["tiles"][256]["speedup_bound"] == pytest.approx(1.6, abs=0.01)
    # 20 rows per expert: each pays for a tile, and rounding to the nearest multiple of 64 leaves next to none.
    cell = padding.measure("Qwen3-Next", 1024, 0.0, **options)
    assert cell["tiles"][64]["waste"]["mean"] == pytest.approx(64 / 20 - 1, rel=0.01)
    assert cell["tiles"][64]["nearest_rows"] < 0.05


def test_padding_quick_writes_the_documented_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert padding.main(["--quick", "--json", str(tmp_path / "report.json")]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() == {
        *("benchmark", "command", "machine", "missing", "seed", "draws", "law", "cells", "agreement", "laws")
    }
    assert len(written["cells"]) == 2 * 2 * 2
    for cell in written["cells"]:
        assert cell.keys() == {"model", "T", "E", "K", "rows_per_expert", "skew", "spread", "tiles"}
        assert list(cell["tiles"]) == ["64", "128", "192", "256"]
        for entry in cell["tiles"].values():
            assert entry.keys() == {"waste", "closed_form", "relative_error", "speedup_bound", "nearest_rows"}
            assert entry["speedup_bound"] == 1 + entry["waste"]["mean"]
    assert written["agreement"][0].keys() == {"skew", "spread_over_tile", "cells", "median_error", "worst_error"}
    assert written["laws"][0].keys() == {"model", "T", "skew", "M", "multinomial", "topk"}
    printed = capsys.readouterr().out
    assert "OLMoE: K=8, E=64" in printed and "At most this much faster" in printed


# ---------------------------------------------------------------- rerouting


def test_drawn_logits_have_the_variance_in_common_that_is_claimed() -> None:
    logits_TE = rerouting.draw_logits(400, 300, 0.75, 2.0, seed=0)
    assert float(logits_TE.std()) == pytest.approx(2.0, rel=0.1)
    assert float(logits_TE.mean(0).var() / logits_TE.var()) == pytest.approx(0.75, abs=0.05)
    assert torch.equal(logits_TE, rerouting.draw_logits(400, 300, 0.75, 2.0, seed=0))
    assert not torch.equal(logits_TE, rerouting.draw_logits(400, 300, 0.75, 2.0, seed=1))
    with pytest.raises(ValueError, match="share is 1.5, expected 0 to 1"):
        rerouting.draw_logits(2, 2, 1.5, 1.0, seed=0)


def test_rerouting_measures_the_limits() -> None:
    options: dict[str, Any] = {"draws": 3, "seed": 0}
    cell = rerouting.measure("half", 16, 128, 8, "quality", 1.0, **options)
    assert cell["fewer"]["mean"] == 0 and abs(cell["score_lost"]["mean"]) < 1e-6
    cell = rerouting.measure("half", 1, 128, 8, "min_experts", 1, **options)
    assert cell["experts_before"] == {"mean": 8, "std": 0} and cell["experts_after"] == {"mean": 1, "std": 0}
    cell = rerouting.measure("iid", 16, 128, 8, "quality", 0.9, **options)
    assert 0.05 < cell["score_lost"]["mean"] <= 0.1 + 1e-6
    assert cell["worst_token_kept"] < 0.9


def test_rerouting_quick_writes_the_documented_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rerouting.main(["--quick", "--json", str(tmp_path / "report.json")]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() == {
        *("benchmark", "command", "machine", "missing", "seed", "draws", "cells", "targets"),
    }
    for cell in written["cells"]:
        assert cell.keys() == {
            *("skew", "share", "scale", "T", "E", "K", "knob", "value", "experts_before", "experts_after"),
            *("fewer", "score_lost", "worst_token_kept", "draws_within_target"),
        }
    assert {cell["knob"] for cell in written["cells"]} == set(rerouting.KNOBS)
    assert written["targets"].keys() == {"fewer", "score_lost"}
    for goal, sign in (("fewer", 1), ("score_lost", -1)):
        entry = written["targets"][goal]
        assert entry["passed"] == (sign * entry["value"] >= sign * entry["target"])
    assert "fewer distinct experts" in capsys.readouterr().out


def test_the_default_reaches_its_targets() -> None:
    cell = rerouting.measure("half", 16, 128, 8, "quality", rerouting.DEFAULT_QUALITY, draws=20, seed=100)
    assert cell["fewer"]["mean"] >= rerouting.TARGET_FEWER
    assert cell["score_lost"]["mean"] <= rerouting.TARGET_LOST


# ---------------------------------------------------------------- what both share


@pytest.mark.parametrize("script", [padding, rerouting], ids=["padding", "rerouting"])
def test_save_and_plot(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert script.main(["--quick", "--save", "--plot", str(tmp_path / "picture.png")]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png"]
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (page,) = tmp_path.glob("*.md")
    name = script.__name__.rpartition(".")[2]
    assert page.name.startswith(name + "_") and f"`python -m benchmarks.{name} --quick --save" in page.read_text()


def test_tables_with_and_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    section = report.Section("Title", ["name", "value"], [["[a]", "1"], ["b", "22"]], ["a note [1]"])
    for has_rich in (True, False):
        if has_rich:
            pytest.importorskip("rich")
        else:
            monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
            monkeypatch.setitem(sys.modules, "rich", None)
        drawing.show(section)
        printed = capsys.readouterr().out
        assert all(text in printed for text in ("Title", "value", "[a]", "22", "a note [1]"))


@pytest.mark.parametrize("text", ["16,128", "16,128,x", "16,8,9", "0,8,2"])
def test_rerouting_refuses_a_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rerouting.main(["--shape", text])
    assert "expected T,E,K" in capsys.readouterr().err
