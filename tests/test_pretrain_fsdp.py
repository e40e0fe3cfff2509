"""The pre-training job with FSDP-2: the same curve on any mesh, and a killed run goes on, on another one."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import sonic.fsdp
from examples import pretrain_fsdp as job
from tests.test_train_parallel import Ranks

pytestmark = pytest.mark.long


STEPS = 6
SIZES = (
    "--hidden-size 16 --layers 2 --heads 2 --experts 6 --top-k 2 --expert-size 8 --seq-len 16 --batch-size 8 "
    f"--lr 0.02 --steps {STEPS} --eval-every 3 --eval-windows 4 --device cpu --dtype fp32 --timeout 60"
).split()
MAIN = "examples.pretrain_fsdp:main"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 files of made-up sentences."""
    folder = tmp_path_factory.mktemp("text")
    words = "a shard of every weight lies on each rank and is whole only while it is read".split()
    for index in range(30):
        stream = random.Random(index)
        (folder / f"{index}.txt").write_text(" ".join(stream.choice(words) for _ in range(300)) + f"\nfile {index}\n")
    return folder


def run(folder: Path, num_ranks: int, *jobs: list[str]) -> None:
    """Run jobs on so many ranks, to a good end."""
    ranks = Ranks(folder / f"said{random.getrandbits(32)}", num_ranks, list(jobs), MAIN)
    codes = ranks.wait()
    assert codes == [0] * num_ranks, "\n".join(ranks.said(rank) for rank in range(num_ranks))


def arguments(text: Path, out: Path, options: str = "") -> list[str]:
    return ["--text", str(text), "--out", str(out), "--save-every", "3", *SIZES, *options.split()]


def curve(out: Path) -> list[dict[str, Any]]:
    """The metrics log without the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_curve(got: Path, wanted: Path) -> None:
    mine, theirs = curve(got), curve(wanted)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for name in ("loss", "aux_loss", "gradient_norm"):
        for a, b in zip(mine, theirs, strict=True):
            assert abs(a[name] - b[name]) <= 1e-4 * abs(b[name]), (name, a["step"], a[name], b[name])
    assert theirs[-1]["loss"] < theirs[0]["loss"]


def test_a_killed_run_goes_on_to_the_same_curve(text: Path, tmp_path: Path) -> None:
    """Killed without warning on two ranks, once a checkpoint is there; resumed alone."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    run(tmp_path, 2, arguments(text, unbroken))
    ranks = Ranks(tmp_path / "said", 2, [arguments(text, killed, "--steps 100000 --timeout 20")], MAIN)
    deadline = time.monotonic() + 120
    while not (killed / "step_00000003").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    codes = ranks.wait(60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), ranks.said(0)
    whole = [path for path in killed.glob("step_*") if path.suffix == ""]
    assert whole and all(sonic.fsdp.is_whole(path) for path in whole)
    # it was a run of more steps: the schedule is another one, and so the checkpoint is refused
    ranks = Ranks(tmp_path / "said", 1, [arguments(text, killed, "--resume")], MAIN)
    assert ranks.wait() == [2] and f"steps in {killed}" in ranks.said(0)

    # the log and checkpoint of the first half, as a kill would have left them
    for path in sorted(unbroken.glob("step_*"))[1:]:
        path.rename(tmp_path / "away")
    kept = (unbroken / "metrics.jsonl").read_text()
    run(tmp_path, 1, arguments(text, unbroken, "--resume"))
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "metrics.jsonl").write_text(kept)
    assert_same_curve(unbroken, tmp_path / "before")


@pytest.mark.slow
def test_any_mesh_gives_the_same_curve(text: Path, tmp_path: Path) -> None:
    run(tmp_path, 1, arguments(text, tmp_path / "alone"))
    meshes = {"sharded": "", "experts": "--ep 2", "hybrid": "--replicas 2", "micro": "--micro-batches 2"}
    run(tmp_path, 4, *(arguments(text, tmp_path / name, options) for name, options in list(meshes.items())[:3]))
    run(tmp_path, 2, arguments(text, tmp_path / "micro", meshes["micro"]))
    for name in ("sharded", "experts", "hybrid"):
        assert_same_curve(tmp_path / name, tmp_path / "alone")
    losses = [[row["loss"] for row in curve(tmp_path / name)] for name in ("micro", "alone")]
    assert all(abs(a - b) < 0.02 for a, b in zip(*losses, strict=True))  # its balance is that of a part of the batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ep 2", "--ep is 2, expected a divisor of 1, the number of processes"),
        ("--replicas 3 --ep 2", "--replicas is 3 with --ep 2, expected one of the two"),
        ("--micro-batches 3", "--batch-size is 8, expected a multiple of 1 processes times 3 micro-batches"),
    ],
)
def test_options_that_do_not_fit(
    options: str, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(arguments(text, tmp_path / "out", options)) == 2
    assert message in capsys.readouterr().err
