"""The routing ablation: its runs start alike, resume bit for bit, are recorded whole, and add up to the tables."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import signal
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import matplotlib.image

import sonic
from examples import routing_ablation as job
from examples.lm import display
from examples.lm.ablation import VARIANTS, RunResult, result_of, summarise, tiles_of
from examples.lm.errors import JobError
from examples.lm.model import LanguageModel, ModelConfig
from examples.lm.routers import ROUTINGS, RULES, pair_changes, routed_as_in_training
from examples.lm.world import Interrupt

STEPS = 6
SIZES = (
    "--hidden-size 32 --layers 2 --heads 2 --experts 4 --top-k 2 --expert-size 16 --seq-len 32 --batch-size 8 "
    "--lr 0.01 --device cpu --eval-every 3 --eval-windows 8 --save-every 4"
).split()
TOKENS, MEAN_ROWS = 8 * 32, 8 * 32 * 2 // 4
FEW = ("topk", "stochastic", "bias")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 files of made-up sentences: about 30 kB."""
    folder = tmp_path_factory.mktemp("text")
    words = "the a router sends every token to an expert and back with some weight of its own".split()
    for index in range(20):
        stream = random.Random(index)
        (folder / f"{index}.txt").write_text(" ".join(stream.choice(words) for _ in range(300)) + f"\nfile {index}\n")
    return folder


def compare(
    text: Path, out: Path, *more: str, routings: tuple[str, ...] = FEW, steps: int = STEPS, draws: bool = False
) -> int:
    """Run the job in this process, without its report unless asked for it; returns its exit code."""
    options = ["--text", str(text), "--out", str(out), "--steps", str(steps), "--routings", *routings]
    with contextlib.nullcontext() if draws else mock.patch.object(job, "write_report", return_value=[]):
        return job.main([*options, *SIZES, *more])


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The metrics log of a run, without the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def without_clock(run: Path) -> dict[str, Any]:
    """The result of a run, without the clock."""
    figures = json.loads((run / "result.json").read_text())
    return {name: value for name, value in figures.items() if name not in ("seconds", "tokens_per_second")}


def config(routing: str, tile_rows: int = 8) -> ModelConfig:
    """A model of one block with 4 experts."""
    return ModelConfig(
        "moe", 32, 1, 2, 4, 2, 16, aux_loss_coeff=0.01, z_loss_coeff=0.001, routing=routing, tile_rows=tile_rows
    )


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two seeds of three routings that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    assert compare(text, out, "--seeds", "2", draws=True) == 0
    return out


# --- routings -----------------------------------------------------------------------------------------------------


def test_every_routing_starts_from_the_weights_of_top_k() -> None:
    weights = {}
    for routing in ROUTINGS:
        torch.manual_seed(3)
        weights[routing] = list(LanguageModel(config(routing)).parameters())
    for routing, own in weights.items():
        assert len(own) == len(weights["topk"])
        assert all(torch.equal(a, b) for a, b in zip(own, weights["topk"], strict=True)), routing


@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_routing_trains_and_is_plain_top_k_in_eval_mode(routing: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config(routing))
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(1, 256, (2, 20))
    output = model(tokens)
    (output.logits.logsumexp(-1).mean() + output.aux_loss).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert output.changes.shape == ((0, 3) if routing == "topk" else (1, 3))
    assert routing not in RULES or output.load.remainder(8).eq(0).all(), "whole tiles"
    model.eval()
    changed = tokens.clone()
    changed[:, 12:] = 0
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.load.sum() == tokens.numel() * 2 and before.changes.shape == (0, 3)
    torch.testing.assert_close(before.logits[:, :12], after.logits[:, :12])  # no byte sees the future


def test_expert_choice_looks_ahead_only_where_it_is_asked_to() -> None:
    torch.manual_seed(0)
    model = LanguageModel(config("expert_choice")).eval()
    tokens = torch.randint(1, 256, (2, 20))
    with torch.no_grad():
        plain = model(tokens).load
        with routed_as_in_training(model):
            assert model(tokens).load.tolist() == [[20, 20, 20, 20]]
        assert torch.equal(model(tokens).load, plain) and len(set(plain[0].tolist())) > 1


def test_changes_are_counted_against_top_k() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])  # top-2: 01, 01, 12
    plan = sonic.RoutingPlan.from_pairs(torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2]), 3, 3)
    metrics = sonic.routing.RoutingMetrics(plan)
    routing = sonic.routing.Routing(plan, torch.ones(3), logits, torch.zeros(3, 2), logits.sum(), metrics)
    assert pair_changes(routing, 2).tolist() == [1, 4, 1]


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_a_log_is_boiled_down() -> None:
    load = [[[10, 6], [8, 8]], [[16, 0], [8, 8]]]  # two steps of two layers; 8 tokens to 2 experts each
    log = [
        {"load": load[0], "added": [1, 0], "dropped": [2, 1], "idle": [0, 1], "bits_per_byte": 5.0, "seconds": 1.0},
        {"load": load[1], "added": [3, 0], "dropped": [0, 0], "idle": [0, 0], "bits_per_byte": 4.0, "seconds": 3.0},
    ]
    log[1]["heldout_bits_per_byte"] = 4.5
    sizes: dict[str, Any] = {"tokens": 8, "top_k": 2, "heldout_leaky": None}
    result = result_of(log, variant="up", seed=1, tile_rows=4, **sizes)
    assert result.heldout == 4.5 and result.train_bits == 4.0 and result.steps == 2 and result.seconds == 3.0
    assert result.load_violation == pytest.approx((10 / 8 + 1 + 2 + 1) / 4 - 1)
    # Tiles of half, one and two times the mean of 8 rows per expert.
    assert result.padding_waste == pytest.approx({"4": 1 - 64 / 68, "8": 1 - 64 / 72, "16": 1 - 64 / 112})
    assert result.rows == 1.0 and result.computed == 68 / 64
    assert (result.added, result.dropped, result.moved) == (4 / 64, 3 / 64, 7 / 64)
    assert result.idle == 1 / 32
    assert result.tokens_per_second == 8 / 1.5, "of the median step"
    nothing = {"load": [[0, 0]], "bits_per_byte": 8.0, "seconds": 1.0, "heldout_bits_per_byte": 8.0}
    empty = result_of([nothing], variant="down", seed=0, tile_rows=64, **sizes)
    assert empty.rows == empty.load_violation == empty.padding_waste["64"] == 0.0


def result(variant: str, seed: int, heldout: float) -> RunResult:
    """A run with this held-out figure."""
    return RunResult(variant, seed, 1, 64, heldout, None, heldout, 0.5, {"64": 0.1}, 1, 1, 0.1, 0.2, 0, 100, 1)


def test_runs_are_compared_to_top_k_seed_by_seed() -> None:
    bits = {"topk": [3.0, 3.2, 3.4], "up": [3.1, 3.2, 3.6], "bias": [2.9]}
    results = [result(name, seed, value) for name, values in bits.items() for seed, value in enumerate(values)]
    summary = summarise([*results, result("down", 7, 4.0)])
    assert list(summary) == ["topk", "up", "down", "bias"], "in the order of the variants"
    assert summary["topk"]["difference"] is None and summary["topk"]["heldout"]["mean"] == pytest.approx(3.2)
    up = summary["up"]
    assert (up["heldout"]["min"], up["heldout"]["max"]) == (3.1, 3.6)
    assert up["heldout"]["deviation"] == pytest.approx(statistics.stdev(bits["up"]))
    assert up["difference"]["mean"] == pytest.approx(0.1)
    assert up["difference"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert up["moved"] == pytest.approx(0.3)
    assert summary["bias"]["difference"] == {"mean": pytest.approx(-0.1), "standard_error": None, "seeds": 1}
    assert summary["down"]["difference"] is None, "no top-K run has its seed"


def test_tiles_and_the_runs_of_the_presets() -> None:
    full, quick = job.parse([]), job.parse(["--quick"])
    for args in (full, quick):
        tiles = tiles_of(args.routings, tokens=args.batch_size * args.seq_len, top_k=args.top_k, experts=args.experts)
        assert set(tiles) == set(VARIANTS) and tiles["nearest"] == tiles["topk"] == 128
        assert (tiles["nearest_ratio_1"], tiles["nearest_ratio_half"]) == (256, 512)
    assert len(job.plan_runs(full, "text")) == 3 * len(VARIANTS) == 36 and not job.remark(full)
    runs = job.plan_runs(quick, "text")
    assert len(runs) == 16 and {run.variant for run in runs} == set(VARIANTS)
    assert job.seeds_of(quick)["topk"] == job.seeds_of(quick)["nearest"] == 3
    assert "3 seeds of top-K, 3 seeds of rounding: nearest, one of the others (full: 3 of each)" in job.remark(quick)
    work = {
        name: len(job.plan_runs(args, "")) * args.steps * args.hidden_size for name, args in (("q", quick), ("f", full))
    }
    assert work["q"] * 6 < work["f"] and full.out != quick.out
    assert set(job.seeds_of(job.parse(["--quick", "--seeds", "2"])).values()) == {2}
    chosen = job.plan_runs(job.parse(["--routings", "up", "topk", "--seeds", "2"]), "text")
    assert [(run.variant, run.recipe.seed) for run in chosen] == [("topk", 0), ("up", 0), ("topk", 1), ("up", 1)]
    one, other = chosen[:2]
    assert {**one.recipe.flat(), "routing": "up"} == other.recipe.flat(), "equal in everything else"


# --- the job ------------------------------------------------------------------------------------------------------


def test_the_report_is_complete(unbroken: Path) -> None:
    summary = json.loads((unbroken / "summary.json").read_text())
    assert list(summary["routings"]) == list(FEW) and summary["config"]["steps"] == STEPS
    page = (unbroken / "table.md").read_text()
    for name in FEW:
        figures = summary["routings"][name]
        assert figures["tile_rows"] == MEAN_ROWS // 2 and figures["tokens_per_second"] > 0
        assert page.count(f"| {figures['label']} ") == 3, "in the main table, that of padding, that of seeds"
        for seed in range(2):
            run = unbroken / "runs" / name / f"seed_{seed}"
            assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "model.pt", "result.json"]
            rows = steps_of(run)
            assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[-1]["loss"] < rows[0]["loss"]
            assert rows[-1]["heldout_bits_per_byte"] == figures["heldout"]["by_seed"][str(seed)]
    topk, stochastic, bias = (summary["routings"][name] for name in FEW)
    waste = str(MEAN_ROWS // 2)
    assert topk["moved"] == 0 and topk["padding_waste"][waste] > 0 and topk["rows"] == 1
    assert stochastic["moved"] > 0 and stochastic["padding_waste"][waste] == 0
    assert bias["rows"] == 1 and stochastic["difference"]["seeds"] == 2
    state = torch.load(unbroken / "runs" / "bias" / "seed_0" / "model.pt", weights_only=True)
    assert state["config"]["routing"] == "bias"
    assert state["model"]["blocks.0.mlp.router.expert_bias"].abs().max() > 0, "the bias moves"
    for name in ("heldout.png", "loss_curves.png", "padding_quality.png"):
        height, width, _ = matplotlib.image.imread(unbroken / name).shape
        assert width > 800 and height > 250
    assert not list(unbroken.rglob("*.tmp"))


@pytest.mark.parametrize("stopped", ["stochastic", "bias"])
def test_a_stopped_comparison_goes_on_bit_for_bit(
    stopped: str,
    text: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    update, seen = display.RunsDisplay.update, []

    def stop(self: display.RunsDisplay, name: str, figures: dict[str, Any]) -> None:
        update(self, name, figures)
        seen.append(figures["step"])
        if len(seen) == FEW.index(stopped) * STEPS + 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(display.RunsDisplay, "update", stop)
        assert compare(text, tmp_path, "--seeds", "2") == 128 + signal.SIGINT
    label = VARIANTS[stopped].label
    told = capsys.readouterr().out
    assert f"stopped in {label}, seed 0, after step 3 of {STEPS}" in told
    assert f"finished: {FEW.index(stopped)} of 6 runs; the same command goes on" in told
    run = tmp_path / "runs" / stopped / "seed_0"
    assert [path.name for path in run.glob("step_*")] == ["step_00000003.pt"] and not (run / "result.json").exists()
    finished = (tmp_path / "runs" / "topk" / "seed_0" / "result.json").stat().st_mtime_ns
    assert compare(text, tmp_path, "--seeds", "2") == 0
    told = capsys.readouterr().out
    assert f"runs: 6 of {STEPS} steps of {TOKENS} tokens, {FEW.index(stopped)} of them finished" in told
    assert f"{label}, seed 0, going on after step 3" in told and "top-K, seed 0" not in told
    assert (tmp_path / "runs" / "topk" / "seed_0" / "result.json").stat().st_mtime_ns == finished
    for result in unbroken.rglob("result.json"):
        own = tmp_path / result.parent.relative_to(unbroken)
        assert steps_of(own) == steps_of(result.parent) and without_clock(own) == without_clock(result.parent)
        weights, wanted = (torch.load(run / "model.pt", weights_only=True)["model"] for run in (own, result.parent))
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.slow
def test_two_workers_do_the_same_and_stop_together(
    text: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update, seen = display.RunsDisplay.update, []

    def stop(self: display.RunsDisplay, name: str, figures: dict[str, Any]) -> None:
        update(self, name, figures)
        seen.append(figures["step"])
        if len(seen) == 14:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(display.RunsDisplay, "update", stop)
        assert compare(text, tmp_path, "--seeds", "1", "--workers", "2") in (
            0,
            128 + signal.SIGTERM,
        )  # or it was too late
    finished = len(list(tmp_path.rglob("result.json")))
    assert finished >= 1 and len(seen) >= 14
    assert f"run {min(3, finished + 2)} of 3: " in capsys.readouterr().out
    assert compare(text, tmp_path, "--seeds", "1") == 0
    assert f"runs: 3 of {STEPS} steps of {TOKENS} tokens, {finished} of them finished" in capsys.readouterr().out
    for name in FEW:
        own, wanted = (steps_of(out / "runs" / name / "seed_0") for out in (tmp_path, unbroken))
        assert [row["step"] for row in own] == [row["step"] for row in wanted]
        for a, b in zip(own, wanted, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)  # with fewer threads each, it may round otherwise


def test_finished_runs_are_skipped_and_a_folder_grows(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def comparison(*names: str, seeds: int, draws: bool = False) -> str:
        assert compare(text, tmp_path, "--seeds", str(seeds), routings=names, steps=2, draws=draws) == 0
        return capsys.readouterr().out

    assert "runs: 2 of 2 steps of 256 tokens, 0 of them finished" in comparison("topk", "up", seeds=1)
    assert "runs: 4 of 2 steps of 256 tokens, 1 of them finished" in comparison("topk", "bias", seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr(job, "train", pytest.fail)
        assert "runs: 4 of 2 steps of 256 tokens, 4 of them finished" in comparison("topk", "bias", seeds=2)
        told = comparison("up", seeds=1, draws=True)  # without top-K to compare with
    assert "runs: 1 of 2 steps of 256 tokens, 1 of them finished" in told
    assert "| rounding: up |   64 |     1 |" in (tmp_path / "table.md").read_text()


def test_a_folder_of_another_recipe_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one: dict[str, Any] = {"routings": ("up",), "steps": 2}
    assert compare(text, tmp_path, "--seeds", "1", **one) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for options, message in [
        (
            ("--lr", "0.02"),
            r"routing_ablation: lr of the runs in \S+ is 0.01, expected 0.02 as in this command; or name",
        ),
        (("--expert-size", "8"), "expert_size of the runs in .* is 16, expected 8"),
        (("--eval-windows", "4"), "eval_windows of the runs in .* is 8, expected 4"),
        (("--text", str(Path(__file__).parent)), "text of the runs in .* is [0-9a-f]{16}, expected [0-9a-f]{16}"),
    ]:
        assert compare(text, tmp_path, *options, **one) == 2
        assert re.search(message, capsys.readouterr().err), options
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert compare(text, tmp_path, "--lr", "0.02", "--seeds", "1", "--overwrite", **one) == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["lr"] == 0.02
    (tmp_path / "recipe.json").unlink()
    assert compare(text, tmp_path, "--seeds", "1", "--overwrite", **one) == 2, "not ours to remove"
    assert "which has a folder runs of something else, expected another folder" in capsys.readouterr().err
    taken = next(tmp_path.rglob("metrics.jsonl"))
    assert compare(text, taken, **one) == 2
    assert f"--out is {taken} (" in capsys.readouterr().err


def test_options_that_make_no_sense_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (["--seeds", "0"], "argument --seeds: is '0', expected a whole number above 0"),
        (["--steps", "x"], "argument --steps: is 'x', expected a whole number above 0"),
        (["--lr", "0"], "argument --lr: is 0, expected a number above 0"),
        (["--top-k", "17"], "argument --top-k: is 17, expected 16"),
        (["--hidden-size", "100", "--heads", "8"], "argument --hidden-size: is 100, expected a multiple of"),
        (["--routings", "nearby"], "argument --routings: invalid choice: 'nearby'"),
        (["--routings", "up", "up"], "argument --routings: is up up, expected each of them once"),
    ]:
        with pytest.raises(SystemExit) as exit:
            job.parse(options)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    assert compare(text, tmp_path / "out", "--experts", "3", routings=("topk",)) == 2
    assert "is 170.667, which makes a tile of 85.3333 rows for topk" in capsys.readouterr().err
    assert compare(text, tmp_path / "out", "--experts", "2", routings=("nearest_ratio_half",)) == 2
    assert "at most the 256 tokens of a step" in capsys.readouterr().err
    assert compare(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "routing_ablation: --text is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "a refused job leaves nothing behind"


def test_it_is_no_job_for_torchrun() -> None:
    class World:
        size, rank, device = 2, 0, torch.device("cpu")

    world: Any = World()
    with pytest.raises(JobError, match="the number of processes is 2, expected 1"):
        job.run(job.parse([]), world, Interrupt())


def test_the_live_panel_shows_all_runs_and_this_one() -> None:
    console = display.Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    with display.RunsDisplay(console, runs=4, finished=1, steps=10) as shown:
        shown.begin("rounding: up, seed 0", step=5)
        shown.update("rounding: up, seed 0", {"step": 6, "bits_per_byte": 3.25, "heldout_bits_per_byte": 3.125})
        console.print(shown._panel())
    told = console.export_text()
    for part in ("run 2 of 4", "rounding: up, seed 0", "step 6 of 10", "train 3.250  held-out 3.1250", "left"):
        assert part in told
