"""SIGKILL at random moments while a checkpoint is written: what was told of is not lost, nothing half is trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes and signals of Unix"),
]


def kill(writer: str, tries: int) -> str:
    command = [sys.executable, "-m", "tests.robustness.killing", writer, "--tries", str(tries)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{writer}: {tries} of {tries} kills left all as it should be" in done.stdout
    return done.stdout


@pytest.mark.parametrize("writer", ["checkpoints", "sharded", "conversions"])
def test_some_kills(writer: str) -> None:
    kill(writer, 3 if writer == "sharded" else 5)


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["checkpoints", "sharded", "conversions", "training"])
def test_a_hundred_kills(writer: str) -> None:
    print(kill(writer, 100))
