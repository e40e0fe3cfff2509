"""The job on a mesh: one loss curve whatever the mesh, resuming on another one, and what happens when a rank dies."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from examples import train_parallel as job
from examples.lm.parallel_checkpoint import newest_sharded
from tests import distributed

pytestmark = pytest.mark.long


ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
SIZES = (
    "--hidden-size 16 --layers 2 --heads 2 --experts 5 --top-k 2 --expert-size 8 --shared-size 8 --seq-len 16 "
    f"--batch-size 8 --lr 0.02 --steps {STEPS} --eval-every 3 --eval-windows 7 --save-every 3 --device cpu "
    "--dtype fp64 --timeout 60"
).split()
CLOCKS = ("seconds",)
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 files of made-up sentences."""
    folder = tmp_path_factory.mktemp("text")
    words = "the a router sends every token to an expert and back with some weight of its own".split()
    for index in range(30):
        stream = random.Random(index)
        (folder / f"{index}.txt").write_text(" ".join(stream.choice(words) for _ in range(300)) + f"\nfile {index}\n")
    return folder


# ---------------------------------------------------------------- processes without a launcher


class Ranks:
    """Processes that run jobs one after the other, as ranks of one world, watched by nobody."""

    def __init__(self, folder: Path, num_ranks: int, jobs: list[list[str]], main: str = "examples.train_parallel:main"):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*distributed.PRELOAD, "examples.train_parallel"])
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(num_ranks)]
        ports = [free_port() for _ in jobs]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            arguments = (main, jobs, ports, rank, num_ranks, str(output))
            process = context.Process(target=_be_a_rank, args=arguments, daemon=True)
            with distributed.main_not_imported(), distributed.library_on_path():
                process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Exit codes; those that are late are killed, and theirs is None."""
        deadline = time.monotonic() + timeout
        codes: list[int | None] = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text()


def free_port() -> int:
    """A port that no connection gets by chance before the job listens on it: below those that systems hand out."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _be_a_rank(main: str, jobs: list[list[str]], ports: list[int], rank: int, num_ranks: int, output: str) -> None:
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    module, _, function = main.partition(":")
    code = 0
    for argv, port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            code = code or getattr(importlib.import_module(module), function)(argv)
        except BaseException:
            traceback.print_exc()
            code = 70
            break
    sys.stdout.flush()
    os._exit(code)


def run(folder: Path, num_ranks: int, *jobs: list[str]) -> None:
    """Run jobs on so many ranks, to a good end."""
    ranks = Ranks(folder / f"said{random.getrandbits(32)}", num_ranks, list(jobs))
    codes = ranks.wait()
    said = "\n".join(f"--- rank {rank}\n{ranks.said(rank)}" for rank in range(num_ranks))
    assert codes == [0] * num_ranks, f"{codes}\n{said}"


def arguments(text: Path, out: Path, options: str) -> list[str]:
    return ["--text", str(text), "--out", str(out), *SIZES, *options.split()]


def curve(out: Path) -> list[dict[str, Any]]:
    """The metrics log without the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def differences(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """What differs by more than rounding: numbers of steps, loads, losses, norms, held-out bits."""
    if [row["step"] for row in got] != [row["step"] for row in wanted]:
        return [f"steps {[row['step'] for row in got]}"]
    faults = []
    for mine, theirs in zip(got, wanted, strict=True):
        for name in theirs:
            if name == "load":
                is_same = mine["load"] == theirs["load"]
            else:
                is_same = name in mine and abs(mine[name] - theirs[name]) <= TOLERANCE * abs(theirs[name])
            if not is_same:
                faults.append(f"step {mine['step']}: {name} {mine.get(name)}, wanted {theirs[name]}")
    return faults


WIRINGS = ("standard", "ladder", "farskip", "shortcut", "parallel")
MESHES = {"tp 2": "--tp 2", "ep 2": "--ep 2", "dp 2": "", "dp 2, FSDP": "--fsdp"}
TWO = [(mesh, wiring) for mesh in MESHES for wiring in ("standard", "ladder")]


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs in one process, by wiring."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1, *(arguments(text, folder / wiring, f"--wiring {wiring}") for wiring in WIRINGS))
    return {wiring: folder / wiring for wiring in WIRINGS}


@pytest.fixture(scope="module")
def on_two(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders of runs on two ranks, by mesh and wiring."""
    folder = tmp_path_factory.mktemp("two")
    outs = {(mesh, wiring): folder / f"{index}" for index, (mesh, wiring) in enumerate(TWO)}
    run(folder, 2, *(arguments(text, outs[case], f"{MESHES[case[0]]} --wiring {case[1]}") for case in TWO))
    return outs


def test_the_wirings_are_different_models(alone: dict[str, Path]) -> None:
    losses = {wiring: curve(out)[-1]["loss"] for wiring, out in alone.items()}
    assert len(set(losses.values())) == len(WIRINGS), losses
    for out in alone.values():
        rows = curve(out)
        assert rows[0]["bits_per_byte"] == pytest.approx(8) and rows[-1]["bits_per_byte"] < 7
        assert rows[-1]["aux_loss"] > 0 and rows[-1]["heldout_bits_per_byte"] < 7


@pytest.mark.parametrize("case", TWO, ids=lambda case: ", ".join(case) if isinstance(case, tuple) else case)
def test_two_ranks_have_the_loss_curve_of_one(
    alone: dict[str, Path], on_two: dict[tuple[str, str], Path], case: tuple[str, str]
) -> None:
    assert not differences(curve(on_two[case]), curve(alone[case[1]]))


def test_only_whole_checkpoints_with_a_file_per_rank_are_left(on_two: dict[tuple[str, str], Path]) -> None:
    for out in on_two.values():
        assert [path.name for path in sorted(out.glob("step_*"))] == ["step_00000003", "step_00000006"]
        names = {path.name for path in (out / "step_00000006").iterdir()}
        assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "run.json"}
        told = json.loads((out / "step_00000006/run.json").read_text())
        assert told["step"] == 6 and told["config"]["wiring"] in (["standard"] * 2, ["ladder"] * 2)


def test_the_report_says_what_was_hidden(on_two: dict[tuple[str, str], Path]) -> None:
    for (mesh, _), out in on_two.items():
        summary = json.loads((out / "summary.json").read_text())
        rows = summary["overlap"]["rows"]
        if mesh.startswith("dp"):
            assert not rows and not (out / "overlap.png").exists()
            continue
        assert (out / "overlap.png").read_bytes().startswith(b"\x89PNG")
        kinds = {(row["phase"], row["kind"]) for row in rows}
        assert {("forward", "attention" if mesh == "tp 2" else "dispatch")} <= kinds
        steps = summary["overlap"]["steps"]
        assert steps == STEPS - 1  # the last one is drawn
        for row in rows:
            assert row["calls"] % steps == 0 and row["duration"] > 0
            assert row["hidden"] + row["exposed"] >= 0.99 * row["duration"]
        assert summary["tokens_per_second"] > 0 and 0 < summary["heldout_bits_per_byte"] < 8


# ---------------------------------------------------------------- going on, on another mesh


def halfway(source: Path, out: Path) -> Path:
    """A copy of a run as it was when it was killed after step 5: its last whole checkpoint is that of step 3."""
    shutil.copytree(source, out)
    shutil.move(out / "step_00000006", out / "step_00000006.tmp")
    (out / "step_00000006.tmp/run.json").unlink()
    log = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(log[:5]) + log[5][:20])
    return out


RESUMED = {1: [""], 2: ["--tp 2", "--ep 2 --overlap off", "--fsdp"], 4: ["--tp 2 --ep 2", "--tp 2 --fsdp", "--ep 2"]}


@pytest.mark.parametrize(
    ("before", "ranks"),
    [("tp 2", 1), ("ep 2", 1), ("dp 2, FSDP", 1), ("alone", 2), pytest.param("tp 2", 4, marks=pytest.mark.slow)],
)
def test_resuming_on_another_mesh_goes_on_to_the_same_losses(
    text: Path,
    alone: dict[str, Path],
    on_two: dict[tuple[str, str], Path],
    tmp_path: Path,
    before: str,
    ranks: int,
) -> None:
    source = alone["ladder"] if before == "alone" else on_two[before, "ladder"]
    outs = [halfway(source, tmp_path / str(index)) for index in range(len(RESUMED[ranks]))]
    options = [f"--resume {mesh}" for mesh in RESUMED[ranks]]
    run(tmp_path, ranks, *(arguments(text, out, one) for out, one in zip(outs, options, strict=True)))
    for out in outs:
        assert not differences(curve(out), curve(alone["ladder"]))
        assert not list(out.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("wiring", WIRINGS)
def test_four_ranks_have_the_loss_curve_of_one(text: Path, alone: dict[str, Path], tmp_path: Path, wiring: str) -> None:
    meshes = ["--tp 2 --ep 2", "--tp 2", "--ep 2", "--tp 2 --fsdp", "--ep 2 --fsdp", "--fsdp", "--ep 4"]
    outs = [tmp_path / str(index) for index in range(len(meshes))]
    run(
        tmp_path,
        4,
        *(arguments(text, o, f"{mesh} --wiring {wiring}") for o, mesh in zip(outs, meshes, strict=True)),
    )
    faults = {mesh: differences(curve(out), curve(alone[wiring])) for mesh, out in zip(meshes, outs, strict=True)}
    assert not {mesh: fault for mesh, fault in faults.items() if fault}


def test_a_checkpoint_of_another_recipe_or_wiring_is_refused(
    text: Path, alone: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = alone["ladder"]
    assert job.main(arguments(text, out, "--resume --wiring standard")) == 2
    assert re.search(
        r"wiring in \S+step_00000006 is \['ladder', 'ladder'\], expected \['standard', 'standard'\]",
        capsys.readouterr().err,
    )
    assert job.main(arguments(text, out, "--resume --seed 4")) == 2
    assert re.search(r"seed in \S+ is 0, expected 4 as in this run", capsys.readouterr().err)
    assert job.main(arguments(text, out, "")) == 2
    assert "which holds a run, expected an empty folder, or --resume" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(alone: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone["ladder"], out)
    said: list[str] = []
    assert newest_sharded(out, warn=said.append) == out / "step_00000006" and not said
    data = out / "step_00000006/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-7])
    assert newest_sharded(out, warn=said.append) == out / "step_00000003"
    assert said == [f"{out}/step_00000006 is damaged: falling back on the checkpoint before it"]
    (out / "step_00000003/.metadata").unlink()
    assert newest_sharded(out, warn=said.append) is None


# ---------------------------------------------------------------- a rank dies


def wait_for_step(ranks: Ranks, out: Path, step: int) -> None:
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < step:
        assert all(process.is_alive() for process in ranks.processes), [ranks.said(rank) for rank in range(2)]
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_is_gone_the_other_says_which_and_ends(text: Path, tmp_path: Path, victim: int, how: int) -> None:
    timeout = 10
    out = tmp_path / "out"
    options = f"--tp 2 --steps 100000 --save-every 3 --eval-every 1000 --timeout {timeout}"
    ranks = Ranks(tmp_path, 2, [arguments(text, out, options)])
    other = ranks.processes[1 - victim]
    try:
        wait_for_step(ranks, out, 7)
        os.kill(ranks.processes[victim].pid or 0, how)
        killed = time.monotonic()
        other.join(3 * timeout)
        took = time.monotonic() - killed
        assert other.exitcode == 1, ranks.said(1 - victim)
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    assert took < timeout
    name = rf"rank {victim} \({re.escape(socket.gethostname())}, pid {ranks.processes[victim].pid}\)"
    expected = rf"train_parallel: rank {1 - victim} ends: {name}(, which holds the store at \S+,)? is gone: "
    assert re.search(expected, ranks.said(1 - victim)), ranks.said(1 - victim)
    said: list[str] = []
    last = newest_sharded(out, warn=said.append)
    assert last is not None and not said and int(last.name[5:]) >= 6


def main_that_dies_while_saving(argv: list[str]) -> int:
    """The job; of its second checkpoint rank 1 writes its file, and is killed before all ranks have told of theirs."""
    from torch.distributed.checkpoint import FileSystemWriter

    write, calls = FileSystemWriter.write_data, []

    def write_and_die(*args: Any) -> Any:
        calls.append(1)
        written = write(*args)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            written.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    FileSystemWriter.write_data = write_and_die  # type: ignore[method-assign]
    return job.main(argv)


def test_a_run_that_is_killed_while_it_saves_leaves_the_last_whole_checkpoint(
    text: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = arguments(text, out, "--tp 2 --timeout 10")
    ranks = Ranks(tmp_path, 2, [argv], main="tests.test_train_parallel:main_that_dies_while_saving")
    assert ranks.wait() == [1, -signal.SIGKILL], ranks.said(0)
    assert re.search(r"rank 0 ends: rank 1 \(\S+, pid \d+\) is gone", ranks.said(0)), ranks.said(0)
    assert {path.name for path in out.glob("step_*")} == {"step_00000003", "step_00000006.tmp"}
    assert newest_sharded(out, warn=pytest.fail) == out / "step_00000003"
    assert (out / "step_00000006.tmp/__1_0.distcp").exists()
    run(tmp_path, 1, arguments(text, out, "--resume"))
    assert not differences(curve(out), curve(alone["ladder"]))
    assert {path.name for path in out.glob("step_*")} == {"step_00000003", "step_00000006"}


def test_a_rank_that_fails_is_named_with_its_reason(text: Path, tmp_path: Path) -> None:
    """Rank 0 alone finds a run in its folder."""
    out = tmp_path / "out"
    (out / "step_00000001").mkdir(parents=True)
    ranks = Ranks(tmp_path, 2, [arguments(text, out, "--timeout 20")])
    assert ranks.wait() == [2, 1]
    assert "--out is" in ranks.said(0) and "which holds a run" in ranks.said(0)
    pattern = r"rank 1 ends: rank 0 \(\S+, pid \d+\) failed: JobError: --out is \S+ which holds a run"
    assert re.search(pattern, ranks.said(1)), ranks.said(1)


def test_ctrl_c_writes_a_checkpoint_and_leaves(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks = Ranks(tmp_path, 2, [arguments(text, out, "--ep 2 --steps 100000 --save-every 1000 --eval-every 1000")])
    wait_for_step(ranks, out, 2)
    os.kill(ranks.processes[1].pid or 0, signal.SIGINT)  # one is asked, all stop
    assert ranks.wait() == [128 + signal.SIGTERM, 128 + signal.SIGINT], [ranks.said(rank) for rank in range(2)]
    last = newest_sharded(out, warn=pytest.fail)
    assert last is not None and int(last.name[5:]) == curve(out)[-1]["step"]
    assert "the same command with --resume goes on" in ranks.said(0)


# ---------------------------------------------------------------- options that make no sense


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (3, "--tp 2", "--tp times --ep is 2, expected a divisor of 3, the number of processes"),
        (2, "--tp 2 --ep 2", "--tp times --ep is 4, expected a divisor of 2, the number of processes"),
        (4, "--tp 4", "--heads is 2, expected a multiple of --tp = 4, whose ranks share it"),
        (2, "--tp 2 --expert-size 7", "--expert-size is 7, expected a multiple of --tp = 2"),
        (2, "--tp 2 --shared-size 7", "--shared-size is 7, expected a multiple of --tp = 2"),
        (3, "", "--batch-size is 8, expected a multiple of dp * ep = 3"),
        (2, "--tp 2 --fsdp", "--fsdp is given with dp 1 x ep 1 x tp 2, expected data-parallel ranks to shard over"),
        (1, "--ladder-layers 3", "--ladder-layers is 3, expected a number of layers from 0 to 2"),
        (1, "--ladder-layers 0,5", "--ladder-layers is [0, 5], expected indices of 2 layers"),
        (1, "--timeout 0", "--timeout is 0.0, expected a number of seconds above 0"),
    ],
)
def test_bad_options_are_refused(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: int,
    options: str,
    message: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert job.main(arguments(text, tmp_path / "out", options)) == 2
    assert f"train_parallel: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ladder-layers lower", "is 'lower', expected all, upper_half, none, a number, or indices such as 1,3"),
        ("--wiring helix", "invalid choice: 'helix'"),
        ("--resume --overwrite", "not allowed with --resume"),
        ("--heads 3", "is 16, expected a multiple of 2 * heads = 6"),
        ("--top-k 6", "is 6, expected 5 (--experts) at most"),
        ("--shared-size -1", "is -1, expected a width, or 0"),
    ],
)
def test_options_that_the_parser_refuses(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        job.main(arguments(text, tmp_path / "out", options))
    assert exit_.value.code == 2 and message in capsys.readouterr().err
