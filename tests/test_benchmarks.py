"""The benchmarks are worth something only if the rivals are right and the measuring is exact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cpu_moe, measure, memory, report, rivals, rounding

pytestmark = pytest.mark.long

# N, D and 2N are multiples of 4: grouped_mm wants rows of 16 bytes. T, E and K are odd, and some expert gets nothing.
SHAPES = [cpu_moe.Shape(37, 20, 12, 5, 3), cpu_moe.Shape(7, 12, 8, 11, 1), cpu_moe.Shape(9, 8, 4, 3, 3)]


def dense_loop(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, scores_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """Every expert on every token, weighted by its score or zero: no sorting, no indexing."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(w1_EUD.shape[0]):
        gate_TN, up_TN = (x_TD @ w1_EUD[e].t()).chunk(2, dim=-1)
        weight_T1 = (scores_TK * (expert_TK == e)).sum(dim=1, keepdim=True)
        out_TD = out_TD + weight_T1 * ((F.silu(gate_TN) * up_TN) @ w2_EDN[e].t())
    return out_TD


def gradients(fn: rivals.Rival, problem: cpu_moe.Problem) -> dict[str, Tensor]:
    leaves = problem.leaves()
    out_TD = fn(problem.x_TD, problem.w1_EUD, problem.w2_EDN, problem.scores_TK, problem.expert_TK)
    grads = torch.autograd.grad(out_TD, list(leaves.values()), problem.dout_TD)
    return {"out": out_TD.detach()} | dict(zip(leaves, grads, strict=True))


CONTENDERS = {**rivals.RIVALS, "sonic": cpu_moe.sonic_moe}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_contender_agrees_with_a_dense_float64_loop(name: str, shape: cpu_moe.Shape) -> None:
    why = rivals.hf_grouped_mm_missing()
    if name == "hf_grouped_mm" and why is not None:
        pytest.skip(why)
    problem = cpu_moe.make_problem(shape, torch.float32)
    wanted = gradients(dense_loop, problem.to(torch.float64))
    for tensor, value in gradients(CONTENDERS[name], problem).items():
        assert value.shape == wanted[tensor].shape
        assert measure.relative_error(value, wanted[tensor]) < 2e-6, tensor
        assert measure.worst_row_error(value, wanted[tensor]) < 1e-5, tensor


@pytest.mark.parametrize(
    ("width_d", "width_n", "dtype", "why"),
    [(12, 8, torch.bfloat16, "multiples of 8"), (12, 10, torch.float32, "multiples of 4")],
)
def test_grouped_mm_refuses_what_its_limits_say(width_d: int, width_n: int, dtype: torch.dtype, why: str) -> None:
    assert why in (rivals.refusal("grouped_mm", width_d, width_n, dtype) or "")
    problem = cpu_moe.make_problem(cpu_moe.Shape(9, width_d, width_n, 4, 2), dtype)
    with pytest.raises(RuntimeError, match="16 bytes"):
        gradients(rivals.grouped_mm, problem)
    assert rivals.refusal("grouped_mm", 16, 8, dtype) is None
    assert rivals.refusal("sorted_mm", width_d, width_n, dtype) is None


def test_dense_mlp_is_one_expert_of_that_width() -> None:
    problem = cpu_moe.make_problem(cpu_moe.Shape(19, 12, 8, 1, 1), torch.float64)
    wanted = dense_loop(
        problem.x_TD, problem.w1_EUD, problem.w2_EDN, torch.ones(19, 1, dtype=torch.float64), problem.expert_TK
    )
    torch.testing.assert_close(rivals.dense_mlp(problem.x_TD, problem.w1_EUD[0], problem.w2_EDN[0]), wanted)


def test_problem_routes_each_token_to_distinct_experts_and_repeats_with_its_seed() -> None:
    shape = cpu_moe.Shape(50, 8, 4, 6, 3)
    one, two = (cpu_moe.make_problem(shape, torch.bfloat16, seed=3) for _ in range(2))
    assert all(len(set(row)) == 3 for row in one.expert_TK.tolist())
    assert torch.equal(one.expert_TK, two.expert_TK) and torch.equal(one.x_TD, two.x_TD)
    assert not torch.equal(one.x_TD, cpu_moe.make_problem(shape, torch.bfloat16, seed=4).x_TD)


# ------------------------------------------------------------------------------------------------------------ measure


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(10, 6, requires_grad=True)
    w = torch.randn(6, 4, requires_grad=True)

    def forward() -> Tensor:
        h = x @ w  # saves x (240 bytes) and w
        return (
            h.sigmoid() * x[:, :4]
        )  # saves the sigmoid once (160 bytes, as its own result and as a factor), and x again as a view

    saved = measure.saved_bytes(forward, exclude=(w,))
    assert saved.total == 240 + 160
    assert [tensor.bytes for tensor in saved.tensors] == [240, 160]
    assert saved.tensors[0].dtype == "float32" and saved.tensors[1].shape == (10, 4)
    assert measure.saved_bytes(forward).total == 240 + 160 + 96


def test_saved_bytes_counts_the_whole_storage_of_a_view() -> None:
    base = torch.randn(100, 4)
    w = torch.randn(4, 4, requires_grad=True)
    assert measure.saved_bytes(lambda: base[:2] @ w, exclude=(w,)).total == base.numel() * 4


def test_saved_bytes_of_a_function_that_saves_nothing() -> None:
    x = torch.randn(5, requires_grad=True)
    assert measure.saved_bytes(lambda: x + 1) == measure.SavedBytes(0, ())


def test_allocations_sees_peak_and_what_is_held() -> None:
    kilobyte = 256  # float32 values

    def work() -> Tensor:
        scratch = torch.ones(8 * kilobyte)
        kept = torch.ones(2 * kilobyte)
        del scratch
        torch.ones(kilobyte)
        return kept

    work()
    seen = measure.allocations(work)
    assert seen.peak == 10 * 1024
    assert seen.held == 2 * 1024


def test_interleaved_runs_everyone_in_every_round_and_slow_ones_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> Callable[[], dict[str, float]]:
        def step() -> dict[str, float]:
            calls.append(name)
            return {"lap": seconds}

        return step

    def attempt(step: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float, float]:
        took = step()
        return took, 0.0, took["lap"]

    monkeypatch.setattr(measure, "_attempt", attempt)  # a clock that no other process disturbs
    timed = measure.interleaved(
        {"a": contender("a", 0.002), "b": contender("b", 0.002), "slow": contender("slow", 0.1)}, rounds=5, retries=0
    )
    assert timed.rounds == 5
    assert timed.laps["a"]["lap"] == [0.002] * 5
    assert timed.laps["slow"]["lap"] == [0.1, None, None, None, 0.1]
    assert timed.steps == 12
    assert calls[:3] == ["a", "b", "slow"]  # warm-up
    assert calls[3:8] == ["a", "b", "slow", "b", "a"]  # there and back
    assert measure.ratio(timed.laps["slow"]["lap"], timed.laps["a"]["lap"]) == measure.Spread(50.0, 50.0, 50.0, 2)


def test_interleaved_repeats_a_disturbed_step() -> None:
    calls: list[None] = []

    def step() -> dict[str, float]:
        calls.append(None)
        # Asleep it uses no processor: to the clock that is a step whose processor was taken away.
        time.sleep(0.02)
        return {"lap": float(len(calls))}

    timed = measure.interleaved({"asleep": step}, rounds=1, retries=2)
    assert timed.steps == timed.disturbed == 1
    assert len(calls) > 2


@pytest.mark.parametrize("argument", ["rounds", "warmup"])
def test_interleaved_refuses_no_rounds(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is 0, expected at least 1"):
        measure.interleaved({"a": lambda: {"lap": 1.0}}, **{argument: 0})


def test_spread_and_ratio() -> None:
    assert measure.spread([5.0, None, 1.0, 3.0, 2.0, 4.0, 6.0]) == measure.Spread(3.5, 2.0, 5.0, 6)
    # The machine got three times slower in the second round; the ratio does not care.
    assert measure.ratio([4.0, 12.0, None], [2.0, 6.0, 1.0]).median == 2.0
    with pytest.raises(ValueError, match="samples is empty"):
        measure.spread([None])


def test_errors() -> None:
    reference = torch.ones(100, 4)
    value = reference.clone()
    value[7] = -1
    assert measure.relative_error(reference, reference) == 0.0
    assert measure.relative_error(value, reference) == pytest.approx(0.2)
    assert measure.worst_row_error(value, reference) == pytest.approx(2.0)
    assert not measure.relative_error(value / 0, reference) < 1e9
    assert measure.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_cpu_moe_quick_writes_the_documented_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    arguments = [
        "--quick",
        "--json",
        str(out),
        "--repeats",
        "1",
        "--shapes",
        "20,16,8,4,2",
        "--rivals",
        "grouped_mm",
        "sorted_mm",
        "hf_grouped_mm",
    ]
    assert cpu_moe.main(arguments) == 0
    written = json.loads(out.read_text())
    assert written.keys() == {"benchmark", "command", "machine", "missing", "seed", "cells"}
    assert written["machine"].keys() == {"cpu", "features", "cores", "threads", "load", "torch", "python", "date"}
    assert written["command"].startswith("python -m benchmarks.cpu_moe --quick")
    assert [cell["dtype"] for cell in written["cells"]] == ["fp32", "bf16"]
    for cell in written["cells"]:
        assert cell.keys() == {
            *("shape", "dtype", "missing", "clock", "rounds", "steps", "disturbed_steps", "roof_gflops"),
            *("tokens_per_expert", "contenders", "best_rival", "targets"),
        }
        assert cell["shape"] == {"T": 20, "D": 16, "N": 8, "E": 4, "K": 2}
        assert {"sonic", "grouped_mm", "sorted_mm", "dense_mlp", "products_alone"} <= cell["contenders"].keys()
        assert ("hf_grouped_mm" in cell["contenders"]) != ("hf_grouped_mm" in written["missing"])
        for name, entry in cell["contenders"].items():
            for lap in ("forward", "forward_backward"):
                assert entry[lap].keys() == {"median_ms", "p20_ms", "p80_ms", "count", "gflops"}
                assert entry[lap]["p20_ms"] <= entry[lap]["median_ms"] <= entry[lap]["p80_ms"]
            assert ("sonic_speedup" in entry) == (name != "sonic")
            if name not in ("dense_mlp", "products_alone"):
                assert entry["checked"] is True
                assert entry["error"].keys() == {"out", "dx", "dw1", "dw2", "dscores"}
        assert cell["best_rival"]["forward_backward"] in cell["contenders"].keys() - {
            "sonic",
            "dense_mlp",
            "products_alone",
        }
        assert cell["targets"] == {}  # not judged on tiny shapes
    printed = capsys.readouterr().out
    assert "fp32 T=20 D=16 N=8 E=4 K=2" in printed and "(best rival)" in printed


def test_run_cell_judges_the_targets() -> None:
    cell = cpu_moe.run_cell(
        cpu_moe.Shape(16, 8, 4, 4, 2), "fp32", {"sonic": cpu_moe.sonic_moe, "sorted_mm": rivals.sorted_mm}, rounds=1
    )
    assert cell["targets"].keys() == {"speedup_over_best_rival", "fraction_of_dense"}
    for target in cell["targets"].values():
        assert target["passed"] == (target["value"] >= target["target"])


def test_a_wrong_contender_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*inputs: Tensor) -> Tensor:
        out_TD = rivals.sorted_mm(*inputs)
        mask_T1 = torch.ones(out_TD.shape[0], 1)
        mask_T1[3] = 1.01
        return out_TD * mask_T1

    monkeypatch.setitem(rivals.RIVALS, "sorted_mm", wrong)
    arguments = ["--quick", "--repeats", "1", "--shapes", "200,16,8,4,2", "--dtypes", "fp32", "--rivals", "sorted_mm"]
    assert cpu_moe.main(arguments) == 1
    assert "WRONG RESULT: sorted_mm at fp32" in capsys.readouterr().out


def test_save_writes_json_and_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert (
        cpu_moe.main(
            [
                "--quick",
                "--save",
                "--repeats",
                "1",
                "--shapes",
                "12,8,4,4,2",
                "--dtypes",
                "fp32",
                "--rivals",
                "sorted_mm",
            ]
        )
        == 0
    )
    assert memory.main(["--quick", "--save", "--no-peak", "--shapes", "12,8,4,4,1"]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("_")[0] + Path(name).suffix for name in names] == [
        "cpu.json",
        "cpu.md",
        "memory.json",
        "memory.md",
    ]
    text = next(tmp_path.glob("cpu_moe_*.md")).read_text()
    assert "`python -m benchmarks.cpu_moe --quick --save" in text and torch.__version__ in text


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d,e", "4,4,4,2,3", "0,1,1,1,1"])
def test_shape_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="expected T,D,N,E,K"):
        cpu_moe.Shape.parse(text)


def test_memory_quick_writes_the_documented_json_and_sonic_keeps_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert memory.main(["--quick", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written.keys() == {"benchmark", "command", "machine", "missing", "cells"}
    assert [(cell["shape"]["N"], cell["shape"]["K"]) for cell in written["cells"]] == [(32, 2), (16, 4), (8, 8)]
    for cell in written["cells"]:
        assert cell.keys() == {
            *("shape", "dtype", "missing", "formula_bytes", "x_and_h_bytes", "contenders", "best_rival"),
            *("ratio_to_best_rival", "change_from_first", "targets"),
        }
        assert cell["targets"]["equals_formula"]["passed"]
        assert cell["change_from_first"] == 0
        assert cell["x_and_h_bytes"] == memory.x_and_h_bytes(cpu_moe.Shape(**cell["shape"]), torch.bfloat16)
        for entry in cell["contenders"].values():
            assert entry.keys() == {"saved_bytes", "tensors", "held_bytes", "peak_bytes"}
            assert entry["saved_bytes"] == sum(tensor["bytes"] for tensor in entry["tensors"])
    ours = written["cells"][0]["contenders"]["sonic"]
    # What the allocator holds is what autograd saved, but for X and the scores, which were there before, and for the
    # plan's slots and offsets, which NumPy made: nothing is hidden from the count.
    x_and_scores, slots_and_offsets = 64 * 32 * 2 + 64 * 2 * 4, 64 * 2 * 4 + (8 + 1) * 4
    assert ours["held_bytes"] == ours["saved_bytes"] - x_and_scores - slots_and_offsets
    assert ours["peak_bytes"] > 0


@pytest.mark.slow
def test_rounding_reports_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rounding.json"
    assert rounding.main(["--quick", "--json", str(out)]) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["shape"] == {"T": 256, "E": 8, "K": 2, "M": 16} and set(cell["targets"]) == {"time", "memory"}
    assert {"sonic", "argsort_columns", "argsort_rows"} <= set(cell["contenders"])
    assert all(entry["median_ms"] > 0 and entry["peak_bytes"] > 0 for entry in cell["contenders"].values())
    assert "over the better plain way" in capsys.readouterr().out


def test_rounding_refuses_to_time_a_wrong_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits_TE: torch.Tensor, expert_TK: torch.Tensor, tile_rows: int) -> rounding.Pairs:
        token_P, expert_P, score_P = rounding.argsort_rows(logits_TE, expert_TK, tile_rows)
        return token_P[:-1], expert_P[:-1], score_P[:-1]

    monkeypatch.setattr(rounding, "argsort_columns", wrong)
    with pytest.raises(RuntimeError, match="argsort_columns chose other pairs"):
        rounding.main(["--quick"])
