"""``python -m sonic bench``: a suite survives what fails, goes on where it was stopped, and compares what it measured.

Runners are tried on parts that are tiny scripts; the real parts are run whole by the slow test.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import figures, gpu_checks, kernel_rivals, kernels, layers, measure, memory, rivals
from benchmarks.cpu_moe import Shape
from sonic import cli
from sonic.bench import runner
from sonic.bench.page import compare_page, load_results, suite_page
from sonic.bench.parts import BUDGET_SECONDS, SUITES, Part, limited_parts
from sonic.bench.records import faults_of, figures_of, status_of
from sonic.bench.stamp import make_stamp, stamp_differences
from tests.test_kernel_benchmark import fake_scattermoe

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
CELL = {"op": "experts", "dtype": "bf16", "shape": {"T": 4, "D": 2}, "missing": {}, "contenders": {}}


# ---------------------------------------------------------------------------------------------------------- the runner


def script(root: Path, name: str, code: str) -> None:
    (root / f"{name}.py").write_text(
        f"import json, os, sys, time\nfrom pathlib import Path\nout = sys.argv[1]\n{code}\n"
    )


def report_of(**contenders: float) -> dict[str, Any]:
    entries = {name: {"median_us": value, "wrong": None} for name, value in contenders.items()}
    return {"benchmark": "layers", "missing": {}, "cells": [CELL | {"contenders": entries}]}


def writes(report: dict[str, Any], code: int = 0) -> str:
    return f"Path(out).write_text({json.dumps(report)!r})\nsys.exit({code})"


def part(name: str, limit: float = 20, **options: Any) -> Part:
    return Part(name, f"the part {name}", name, ("{json}",), limit, **options)


def run(root: Path, *parts: Part, **options: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    options = {"say": said.append, **options}
    return runner.run_suite("cpu", parts, root / "results", root, **options), said


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {record["part"]: record["status"] for record in found["parts"]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "_draw", lambda folder, root: "not drawn here")
    monkeypatch.setattr(runner, "_GRACE_SECONDS", 0.5)
    return tmp_path


def test_whatever_a_part_does_the_others_run_and_it_is_told(root: Path) -> None:
    raised = report_of(good=1.0)
    raised["cells"][0]["missing"] = {"bad": "failed: RuntimeError: no such kernel", "absent": "is not importable"}
    script(root, "well", writes(report_of(good=2.0)))
    script(root, "rival", writes(raised, code=1))
    script(root, "raises", "raise KeyError('nothing')")
    script(root, "dies", "os.kill(os.getpid(), 11)")
    # a child that does not mind being interrupted, and a part that does not either
    child = f"sh -c 'trap \"\" INT; echo $$ > {root}/child; exec sleep 60'"
    script(root, "hangs", f"import subprocess\nsubprocess.Popen({child!r}, shell=True)\ntime.sleep(60)")
    script(root, "deaf", "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)")
    script(root, "short", writes({**report_of(good=2.0), "left_out": ["experts, 30b"]}))
    script(root, "half", "Path(out).write_text('{\"benchm')")
    script(root, "last", writes(report_of(good=3.0)))
    names = ("well", "rival", "raises", "dies", "short", "half", "last")
    found, said = run(root, part("hangs", 4), part("deaf", 1), *map(part, names))
    assert statuses(found) == {
        **{
            "hangs": "timed out",
            "deaf": "timed out",
            "well": "passed",
            "rival": "failed",
            "raises": "failed",
            "dies": "failed",
        },
        **{"short": "cut short", "half": "failed", "last": "passed"},
    }
    why = {record["part"]: record["why"] for record in found["parts"]}
    assert why["rival"] == "bad failed: RuntimeError: no such kernel (experts)"
    assert why["raises"] == "exit code 1: KeyError: 'nothing'" and why["dies"].startswith("killed by signal 11")
    assert why["hangs"] == "it ran past 4 s" and "experts, 30b" in why["short"]
    assert "rival: failed in" in "\n".join(said) and json.loads((root / "results/suite.json").read_text()) == found
    child = int((root / "child").read_text())
    demand_end(child)
    page = suite_page(found)
    assert "| failed" in page and "- bad failed: RuntimeError" in page and "- not measured: absent: is not imp" in page
    assert "experts, bf16, T=4 D=2, us" in page
    assert not [path.name for path in (root / "results").rglob("*") if path.name.endswith(".part")]


def demand_end(process: int) -> None:
    """Wait until a process has ended, as whoever started it must see to."""
    path = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    pytest.fail("a process that a suite has started outlives it")


def test_a_benchmark_that_died_goes_on_without_who_it_died_of(root: Path) -> None:
    code = (
        f"mark = Path({str(root)!r}, 'mark')\nif not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), 11)\n"
    )
    script(root, "dies", code + writes(report_of(good=1.0)))
    script(root, "always", "sys.exit(3)")
    found, _ = run(root, part("dies", goes_on=True), part("always", goes_on=True))
    assert statuses(found) == {"dies": "passed", "always": "failed"}
    assert [record["restarts"] for record in found["parts"]] == [1, 6]


def test_a_suite_that_was_stopped_goes_on_where_it_was(root: Path) -> None:
    count = f"with open({str(root / 'count')!r}, 'a') as log:\n    log.write(__file__[-4])\n"
    for name in ("a", "b", "c"):
        script(root, name, count + writes(report_of(good=1.0)))
    script(root, "f", count + writes(report_of(good=1.0), code=1))
    parts = [part(name) for name in "afbc"]

    def stop(line: str) -> None:
        if line.startswith("b: the part"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, *parts, say=stop)
    assert (root / "count").read_text() == "af" and not (root / "results/suite.json").exists()
    with pytest.raises(
        ValueError, match=r"sonic bench: out is .*results, which holds files, expected a folder .*--resume"
    ):
        run(root, *parts)
    found, said = run(root, *parts, resume=True)
    assert (
        root / "count"
    ).read_text() == "affbc" and "a: passed before, not run again" in said  # what failed runs again
    assert statuses(found) == {"a": "passed", "f": "failed", "b": "passed", "c": "passed"}
    run(root, *parts, resume=True, again=["c"])
    assert (root / "count").read_text() == "affbcfc"
    with pytest.raises(ValueError, match="sonic bench: again is 'd', expected one of a, f, b, c"):
        run(root, *parts, resume=True, again=["d"])


def test_a_killed_suite_leaves_whole_records_and_goes_on(root: Path) -> None:
    script(root, "a", writes(report_of(good=1.0)))
    script(root, "b", f"Path({str(root)!r}, 'began').write_text(f'{{os.getpid()}}')\ntime.sleep(60)")
    code = (
        "from pathlib import Path\nfrom sonic.bench import runner\nfrom sonic.bench.parts import Part\n"
        f"root = Path({str(root)!r})\nparts = [Part(n, n, n, ('{{json}}',), 90) for n in 'ab']\n"
        "runner.run_suite('cpu', parts, root / 'results', root, say=print)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    suite = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((root / "began").exists() and (root / "began").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    suite.kill()
    suite.wait()
    demand_end(int((root / "began").read_text()))
    assert sorted(path.name for path in (root / "results/parts").glob("*.json")) == [
        "a.figures.json",
        "a.json",
        "stamp.json",
    ]
    assert json.loads((root / "results/parts/a.json").read_text())["status"] == "passed"
    script(root, "b", writes(report_of(good=1.0)))
    found, said = run(root, part("a"), part("b"), resume=True)
    assert statuses(found) == {"a": "passed", "b": "passed"} and said[0] == "a: passed before, not run again"


def test_results_of_another_machine_or_commit_are_not_mixed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(root, "a", writes(report_of(good=1.0)))
    run(root, part("a"))
    stamp = make_stamp("cpu", ROOT)
    for change, told in (
        ({"chip": "another"}, "chip was"),
        ({"commit": "abc"}, "commit was"),
        ({"driver": "1"}, "driver"),
    ):
        monkeypatch.setattr(runner, "make_stamp", lambda suite, root, change=change: {**stamp, **change})
        with pytest.raises(ValueError, match=f"which holds other results, expected .*{told}"):
            run(root, part("a"), resume=True)
    monkeypatch.setattr(runner, "make_stamp", lambda suite, root: {**stamp, "suite": "gpu"})
    with pytest.raises(ValueError, match="which holds something else, expected results of this suite"):
        run(root, part("a"), resume=True)


def test_a_dry_run_shows_the_commands_and_measures_nothing(root: Path) -> None:
    script(root, "a", "print('would measure', sys.argv[2:])\nassert '--dry-run' in sys.argv")
    script(root, "b", "sys.exit('no such option')")
    found, _ = run(root, part("a", dry_arguments=("--dry-run",)), part("b", dry_arguments=("-n",)), dry_run=True)
    assert found["parts"][0]["status"] == ("dry run" if torch.cuda.is_available() else "needs a GPU")
    assert found["parts"][1]["status"] == "failed" and "no such option" in found["parts"][1]["why"]


@pytest.mark.parametrize(
    ("code", "log", "status", "told"),
    [
        (0, "...\n12 passed, 3 skipped in 4.5s", "passed", "12 passed, 3 skipped"),
        (0, "ss\n91 skipped, 6789 deselected in 52.1s", "needs a GPU", "91 skipped, 6789 deselected"),
        (1, "F.\n1 failed, 1 passed in 1.0s", "failed", "1 failed, 1 passed"),
        (2, "collecting\nE   SyntaxError\n2 errors in 0.1s", "failed", "2 errors"),
        (-11, "....\nFatal Python error: Segmentation fault", "failed", "Fatal Python error: Segmentation fault"),
    ],
)
def test_the_last_line_of_pytest_decides(code: int, log: str, status: str, told: str) -> None:
    assert status_of(code, None, log, True) == (status, told)


def test_checks_that_all_need_a_gpu_are_told_so() -> None:
    needs, passed = ({"check": "graph", "what": "x", "status": status} for status in ("needs a GPU", "passed"))
    assert status_of(0, {"cells": [needs, needs]}, "", False) == ("needs a GPU", None)
    assert status_of(0, {"cells": [needs, passed]}, "", False) == ("passed", None)
    failed = {"check": "graph", "what": "x", "status": "failed", "why": "differs"}
    assert status_of(1, {"cells": [failed]}, "", False) == ("failed", "graph x: differs")


# ------------------------------------------------------------------------------------------------------ the real parts


@pytest.mark.parametrize("suite", SUITES)
def test_every_benchmark_understands_its_arguments(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    for each in SUITES[suite]:
        if not each.module.startswith("benchmarks."):
            continue
        words = {"{json}": "x.json", "{seconds}": "1"}
        given = [words.get(word, word) for word in (*each.arguments, *(each.dry_arguments or ()))]
        assert importlib.import_module(each.module).main(given) == 0
        assert "would" in capsys.readouterr().out, f"{each.name} has measured in a dry run"


def test_the_gpu_suite_fits_in_its_budget_and_names_what_there_is() -> None:
    assert sum(each.limit for each in SUITES["gpu"]) <= BUDGET_SECONDS - 20 < 8 * 60
    assert [each.name for each in SUITES["gpu"]] == [each.name for each in SUITES["cpu"]]
    assert all(set(each.limit for each in limited_parts("gpu", {"tests": 7}, ("tests",))) == {7} for _ in range(1))
    found = runner._test_files(ROOT)
    assert {"tests/test_cute_gpu.py", "tests/test_triton_gpu.py"} <= set(found) and len(found) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "cpu", "--only", "tea"], "sonic bench: only is 'tea', expected one of"),
        (["--suite", "cpu", "--limit", "tea=3"], "sonic bench: limit is 'tea'"),
        (["--suite", "cpu", "--limit", "tests=-1"], "sonic bench: limit is tests=-1, expected a positive"),
        (
            ["--compare", "nowhere", "nowhere"],
            "sonic bench: compare is nowhere, which does not exist, expected a folder",
        ),
        (["--compare", str(ROOT / "README.md"), "nowhere"], "README.md, which holds no results, expected a folder"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_limit_without_seconds_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--suite", "cpu", "--limit", "tests"])
    message = "argument --limit: 'tests' is no limit, expected PART=SECONDS, such as kernels=120"
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_or_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--suite", "gpu", "--out", str(tmp_path / "new")]) == 2
    assert "suite is 'gpu' on a machine without one, expected a GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--suite", "cpu"]) == 2
    assert "benchmarks is not importable, expected a checkout of sonic" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_suite_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sonic", "bench", "--suite", "cpu", "--out", str(tmp_path / "cpu")]
    command += ["--limit", *(f"{each.name}=400" for each in SUITES["cpu"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "cpu/suite.json").read_text())
    for record in found["parts"]:
        needs_gpu = record["part"] in ("tests", "graphs") and not torch.cuda.is_available()
        assert record["status"] == ("needs a GPU" if needs_gpu else "passed"), record["why"]
    (_, cell) = found["parts"][3]["data"]["cells"]
    assert {"sonic/reference", *layers.RIVALS, "dense"} <= cell["contenders"].keys() | cell["missing"].keys()
    assert (tmp_path / "cpu/suite.md").exists()
    if importlib.util.find_spec("matplotlib") is not None:
        assert found["picture"] is None and (tmp_path / "cpu/suite.png").stat().st_size > 10_000


# --------------------------------------------------------------------------------------------------------- side by side


def test_figures_are_found_in_the_committed_results() -> None:
    known = {"cpu_moe": ("ms",), "memory": ("MiB",), "rounding": ("ms", "MiB")}
    seen = set()
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        units = {figure.unit for figure in figures_of(found)}
        wanted = known.get(found.get("benchmark"), ())
        assert units == set(wanted), path.name
        seen |= {found["benchmark"]} if wanted else set()
    assert seen == set(known)


def test_two_results_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (root_of(tmp_path / name, value) for name, value in (("a", 4.0), ("b", 3.0)))
    stamp = json.loads((second / "suite.json").read_text())
    stamp["stamp"] |= {"chip": "NVIDIA H200", "driver": "580.1"}
    stamp["parts"][0]["data"]["cells"][0]["missing"] = {"bad": "failed: RuntimeError: x"}
    (second / "suite.json").write_text(json.dumps(stamp))
    out = tmp_path / "deep" / "compared.md"
    assert cli.main(["bench", "--compare", str(first), str(second), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "OTHER CHIP" in printed and "on NVIDIA H200" in printed and "not told" in printed
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert ["experts, bf16, T=4 D=2", "good", "us", "4", "3", "0.750"] in cells
    assert ["experts, bf16, T=4 D=2", "mine", "us", "1", "", ""] in cells  # in one of them alone
    assert "- B: bad failed: RuntimeError: x (experts)" in printed
    assert out.read_text().strip() in printed


def root_of(folder: Path, value: float) -> Path:
    data = report_of(good=value, **({"mine": 1.0} if folder.name == "a" else {}))
    record = {"part": "layers", "status": "passed", "data": data}
    folder.mkdir(parents=True)
    suite = {"suite": "gpu", "stamp": make_stamp("gpu", ROOT), "parts": [record]}
    (folder / "suite.json").write_text(json.dumps(suite))
    return folder


def test_two_files_of_one_benchmark_stand_side_by_side() -> None:
    (path,) = (path for path in RESULTS.glob("cpu_moe_*.json") if not path.stem.endswith("_first"))
    same = compare_page(load_results(path), load_results(path))
    assert "Not the same" not in same and "| 1.000 |" in same and "forward + backward" in same
    other = compare_page(load_results(path), load_results(next(RESULTS.glob("memory_*.json"))))
    assert "## cpu_moe" in other and "## memory" in other


def test_differences_of_machines_are_named() -> None:
    stamp = make_stamp("cpu", ROOT)
    assert stamp_differences(stamp, stamp) == {}
    clocks = {"sm_mhz": 345.0, "max_sm_mhz": 1980.0, "max_memory_mhz": 3201.0, "power_limit_w": 700.0}
    hot, cold = ({**stamp, "clocks": {**clocks, "sm_mhz": mhz}} for mhz in (1980.0, 345.0))
    assert stamp_differences(hot, cold) == {}  # a clock that idles is no other machine
    capped = {**stamp, "clocks": {**clocks, "max_sm_mhz": 1200.0}, "versions": {**stamp["versions"], "triton": "0"}}
    found = stamp_differences(hot, capped)
    assert found.keys() == {"max_sm_mhz", "triton"} and found["max_sm_mhz"] == ("1980.0", "1200.0")


def test_clocks_are_read_as_the_driver_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sonic.bench import stamp

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.04, 345, 3201, 1980, 3201, 143771, 700.00, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = stamp.clocks()
    assert found is not None and found["driver"] == "580.159.04" and found["sm_mhz"] == 345.0
    assert found["max_sm_mhz"] == 1980.0 and found["temperature_c"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = stamp.make_stamp("gpu", ROOT)
    assert (made["chip"], made["memory_gib"], made["driver"]) == ("NVIDIA H200", 140.4, "580.159.04")
    assert "NVIDIA H200, 140.4 GiB, SM 345 of 1980 MHz, driver 580.159.04" in stamp.stamp_line(made)
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert stamp.clocks() is None


# ------------------------------------------------------------------------------------------------- rivals that go wrong


def broken(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("the driver\nsays no")


def test_a_rival_that_raises_is_told_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(layers.RIVALS, "sorted_mm", broken)
    out = tmp_path / "l.json"
    chosen = ["--quick", "--repeats", "1", "--out", str(out), "--rivals", "sorted_mm", "bmm_pad", "--ops", "experts"]
    assert layers.main(chosen) == 1
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["missing"]["sorted_mm"] == "failed: RuntimeError: the driver says no"
    assert {"sonic/reference", "bmm_pad", "dense"} <= {
        name for name, e in cell["contenders"].items() if "median_us" in e
    }
    assert faults_of({"cells": [cell]}) == ["sorted_mm failed: RuntimeError: the driver says no (experts tiny)"]
    assert "sorted_mm in experts, tiny" in capsys.readouterr().out

    monkeypatch.setitem(rivals.RIVALS, "sorted_mm", broken)
    out = tmp_path / "m.json"
    assert memory.main(["--quick", "--no-peak", "--json", str(out)]) == 1
    cells = json.loads(out.read_text())["cells"]
    assert all(cell["missing"]["sorted_mm"].startswith("failed: RuntimeError") for cell in cells)
    assert all({"sonic", "bmm_pad"} <= cell["contenders"].keys() for cell in cells)


def test_whoever_leaves_the_gpu_unusable_is_left_out_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(device: torch.device, name: str) -> None:
        raise kernels.Unusable(f"{name} left the GPU unusable")

    monkeypatch.setattr(kernels, "_demand_sound", unusable)
    monkeypatch.setitem(layers.RIVALS, "sorted_mm", broken)
    out = tmp_path / "l.json"
    chosen = ["--quick", "--repeats", "1", "--out", str(out), "--rivals", "sorted_mm", "bmm_pad"]
    assert layers.main(chosen) == 3
    assert not out.exists() and (tmp_path / ".l.json.running").exists()
    monkeypatch.setattr(kernels, "_demand_sound", lambda device, name: None)
    monkeypatch.setitem(layers.RIVALS, "sorted_mm", layers.RIVALS["hf_eager"])
    assert layers.main(chosen) == 1
    first, second = json.loads(out.read_text())["cells"]
    assert "an earlier process died" in first["missing"]["sorted_mm"] and "median_us" in first["contenders"]["bmm_pad"]
    assert "an earlier process died" in second["missing"]["sorted_mm"] and "bmm_pad" in second["contenders"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.json", "l.md"]


@pytest.mark.slow
def test_whoever_takes_the_process_with_it_is_left_out_next_time(tmp_path: Path) -> None:
    out = tmp_path / "l.json"
    code = (
        "import os, sys\nfrom benchmarks import layers\n"
        "layers.RIVALS['sorted_mm'] = lambda op, inputs: os.kill(os.getpid(), 9)\nsys.exit(layers.main(sys.argv[1:]))"
    )
    chosen = ["--quick", "--repeats", "1", "--out", str(out), "--rivals", "sorted_mm", "bmm_pad", "--ops", "experts"]
    command = [sys.executable, "-c", code, *chosen]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    codes = [subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 1]
    (cell,) = json.loads(out.read_text())["cells"]
    assert "an earlier process died" in cell["missing"]["sorted_mm"] and "median_us" in cell["contenders"]["bmm_pad"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.json", "l.md"]


def test_no_op_is_begun_after_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k.json"
    chosen = ["--quick", "--out", str(out), "--rivals", "--ops", "combine", "build_plan", "--repeats", "1"]
    assert kernels.main([*chosen, "--seconds", "0"]) == 0
    found = json.loads(out.read_text())
    assert found["cells"] == [] and found["left_out"] == ["combine, tiny", "build_plan, tiny"]
    assert status_of(0, found, "", False)[0] == "cut short"
    assert kernels.main(chosen) == 0
    found = json.loads(out.read_text())
    assert len(found["cells"]) == 2 and "left_out" not in found


def test_a_gpu_that_a_rival_has_broken_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", broken)
    kernels._demand_sound(CPU, "x")
    with pytest.raises(kernels.Unusable, match="x left the GPU unusable: the driver"):
        kernels._demand_sound(torch.device("cuda"), "x")


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", [name for name in layers.RIVALS if name != "scattermoe"])
@pytest.mark.parametrize("op", layers.OPS)
def test_every_layer_is_right(name: str, op: str) -> None:
    if (why := layers.why_not_importable(name)) is not None:
        pytest.skip(why)
    cell = layer_cell(op, Shape(40, 32, 24, 6, 3), name)
    assert cell["contenders"][name]["wrong"] is None and "median_us" in cell["contenders"][name], cell


@pytest.mark.parametrize("op", layers.OPS)
def test_scattermoe_sorts_inside_and_is_right(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(num_experts)
        sorted_expert, order = expert_idxs.flatten().sort(stable=True)
        return sorted_expert, order, torch.bincount(sorted_expert, minlength=num_experts).cumsum(0)

    fakes: dict[str, ModuleType] = fake_scattermoe()
    fakes["scattermoe"].flatten_sort_count = flatten_sort_count  # type: ignore[attr-defined]
    for module, fake in fakes.items():
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(kernel_rivals, "_demand_gpu", lambda inputs: None)
    cell = layer_cell(op, Shape(24, 16, 8, 4, 2), "scattermoe")
    assert cell["contenders"]["scattermoe"]["wrong"] is None and len(calls) > 1, cell


def layer_cell(op: str, shape: Shape, name: str) -> dict[str, Any]:
    routing = kernel_rivals.make_routing(shape, CPU, skew=0.5)
    return kernels.measure_cell("test", shape, op, "bf16", routing, {name: layers.RIVALS[name]}, device=CPU, rounds=1)


def test_sonic_plans_inside_its_layer() -> None:
    routing = kernel_rivals.make_routing(Shape(24, 16, 8, 4, 2), CPU)
    inputs = kernel_rivals.make_inputs("experts", Shape(24, 16, 8, 4, 2), torch.bfloat16, CPU, routing)
    contender = layers.sonic_layer("experts", inputs, "reference", True)
    from sonic import kernels as backends

    backends.reset_counts()
    contender.call()
    assert ("build_plan", "reference") in backends.counts()
    with pytest.raises(kernel_rivals.Unavailable, match="not this op"):
        layers.sonic_layer("combine", inputs, "reference", True)


# --------------------------------------------------------------------------------------------------------------- checks


def test_rounding_is_checked_end_to_end_and_graphs_need_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    assert gpu_checks.main(["--device", "cpu", "--json", str(out)]) == 0
    cells = {cell["check"]: cell for cell in json.loads(out.read_text())["cells"]}
    assert [cells[check]["status"] for check in gpu_checks.CHECKS] == ["needs a GPU", "needs a GPU", "passed"]
    found = cells["rounding"]["figures"]
    assert (
        found["rows, rounded"] % found["tile rows"] == 0 and found["computed rows, rounded"] == found["rows, rounded"]
    )
    assert found["computed rows, top-K"] > found["rows, top-K"] and 0 < found["error"] < 1e-5


def test_a_check_that_fails_or_raises_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_checks, "CPU_TILE", 24)  # the check still expects whole tiles, of 24 now
    import sonic

    rounding = sonic.routing.TokenRounding
    monkeypatch.setattr(sonic.routing, "TokenRounding", lambda router, tile_rows: rounding(router, tile_rows=16))
    out = tmp_path / "c.json"
    assert gpu_checks.main(["--device", "cpu", "--only", "rounding", "--json", str(out)]) == 1
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["status"] == "failed" and "have no whole tiles of 24 rows" in cell["why"]
    monkeypatch.setattr(sonic.routing, "TokenRounding", broken)
    assert gpu_checks.main(["--device", "cpu", "--only", "rounding", "--json", str(out)]) == 1
    assert json.loads(out.read_text())["cells"][0]["why"] == "failed: RuntimeError: the driver says no"


def test_allocations_on_a_gpu_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1000, 1400))
    for name, answer in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 1900)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(now))
    assert measure.allocations_on_gpu(lambda: None, torch.device("cuda")) == measure.Allocations(900, 400)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_show_the_committed_results() -> None:
    assert figures.check(RESULTS, figures.IMAGES) == []
    manifest = json.loads((figures.IMAGES / figures.MANIFEST).read_text())
    for name in manifest:
        assert (figures.IMAGES / name).stat().st_size < figures.MAX_BYTES, name


def test_a_picture_of_other_results_is_found_out(tmp_path: Path) -> None:
    results, images = tmp_path / "results", tmp_path / "images"
    shutil.copytree(RESULTS, results)
    images.mkdir()
    for path in figures.IMAGES.glob("*"):
        if path.suffix in (".json", ".png"):
            shutil.copy(path, images)
    (path,) = results.glob("overlap_*.json")
    content = json.loads(path.read_text())
    content["cells"][0]["total"]["median"] *= 2
    path.write_text(json.dumps(content))
    (images / "memory.png").unlink()
    (removed,) = results.glob("padding_*.json")
    removed.unlink()
    faults = sorted(fault.partition(":")[0] for fault in figures.check(results, images))
    assert faults == ["memory.png", "overlap.png", "padding_waste.png"]
    assert figures.main(["--check", "--results", str(results), "--images", str(images)]) == 1
    assert figures.main(["--check"]) == 0


def test_every_picture_tells_chip_date_and_command() -> None:
    for picture in figures.PICTURES:
        found = picture.data(RESULTS)
        assert found is not None, picture.name
        foot = " ".join(found[1]["foot"])
        if picture.name == "roofline":
            assert "No measured points" in foot and found[1]["measured"] == []
        else:
            assert "Xeon" in foot and "2026-" in foot and "python -m " in foot, picture.name


def test_measured_points_of_a_gpu_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    entry = {"kind": "backend", "tflops": 400.0, "median_us": 1.0}
    rival = {"kind": "rival", "tflops": 800.0, "median_us": 1.0}
    cell = {"op": "up_proj", "clock": "events", "flops": 300, "bytes": 2, "dtype": "bf16", "shape": {"T": 4}}
    found = {
        "benchmark": "kernels",
        "command": "python -m benchmarks.kernels",
        "machine": {"cpu": "c", "cores": 1, "threads": 1, "torch": "2", "date": "2026-12-01"},
        "device": {"name": "NVIDIA H200"},
        "cells": [cell | {"contenders": {"sonic/cute": entry, "torch": rival}}],
    }
    (tmp_path / "kernels_h200.json").write_text(json.dumps(found))
    files, data = figures._roofline_data(tmp_path)
    assert files[1:] == ["kernels_h200.json"] and "NVIDIA H200" in data["foot"][-1]
    assert data["measured"] == [{"op": "up_proj", "intensity": 150.0, "tflops": 400.0}]
    pytest.importorskip("matplotlib")
    figures._save(figures._draw_roofline(data), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_a_suite_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entry = {"kind": "backend", "tflops": 400.0}
    cell = CELL | {"op": "experts_fwd_bwd", "contenders": {"sonic/cute": entry, "dense": entry}}
    stamp = make_stamp("gpu", ROOT)
    parts = [{"part": "layers", "data": {"cells": [cell]}}, {"part": "tests", "data": None}]
    for each in (parts, parts[1:]):
        (tmp_path / "suite.json").write_text(json.dumps({"suite": "gpu", "stamp": stamp, "parts": each}))
        assert figures.main(["--suite", str(tmp_path / "suite.json"), "--out", str(tmp_path / "suite.png")]) == 0
        assert (tmp_path / "suite.png").read_bytes()[:4] == b"\x89PNG"
