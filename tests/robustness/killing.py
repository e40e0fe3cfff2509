"""Kills writers of checkpoints at random moments, and looks at what is left.

    python -m tests.robustness.killing --tries 100 --seed 0               every writer, so many kills of each
    python -m tests.robustness.killing training --tries 100               one of them

Each try forks a process that writes one checkpoint after the other, sends it SIGKILL at a random moment, and asks:
is every checkpoint that the process told of (or a later one) there, whole, and right to the last bit? Is there no half
file under a name that counts? Does the next process go on from it? Whatever is forked has done no work in torch before,
so it has no threads to lose.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from examples import train_moe_lm
from examples.lm import checkpoint, parallel_checkpoint
from sonic.convert import convert_checkpoint
from sonic.convert.checkpoint import open_checkpoint

NUM_TENSORS, SIZE = 6, 60_000
CONFIG = {"seed": 1}


def values(step: int, number: int) -> Tensor:
    """The tensor that a checkpoint of that step holds: nothing of another step looks like it."""
    return torch.arange(SIZE, dtype=torch.float32) + 1000.0 * step + number


def started(job: Callable[[], None], output: Path) -> int:
    """A process of its own that runs ``job``; its number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException), open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                job()
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(status)
    return pid


def forked(job: Callable[[], None], seconds: float, output: Path) -> bool:
    """Run ``job`` in a process of its own and kill it after a time; whether it was alive until then.

    Raises:
        AssertionError: it failed by itself.
    """
    pid = started(job, output)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}: {output.read_text()}"
        return True
    assert os.WEXITSTATUS(status) == 0, f"failed by itself: {output.read_text()[-2000:]}"
    return False


def looked(job: Callable[[], None], output: Path) -> bool:
    """Run ``job`` to its end in a process of its own, so that this one stays without threads.

    Raises:
        AssertionError: it failed.
    """
    _, status = os.waitpid(started(job, output), 0)
    assert status == 0, output.read_text()[-2000:]
    return True


def moments(job: Callable[[], None], log: Path, output: Path) -> tuple[float, float]:
    """Between which seconds to kill ``job``, as busy as this machine is: while it writes its first few things."""
    pid, start = started(job, output), time.monotonic()
    times: list[float] = []
    while len(times) < 3:
        assert time.monotonic() < start + 300, f"nothing was written: {output.read_text()[-2000:]}"
        if told(log) > len(times):
            times.append(time.monotonic() - start)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 0.5 * times[0], times[0] + 2 * (times[2] - times[0])


def told(path: Path) -> int:
    """The last whole number that a job wrote down; 0 if none."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[-1]) if lines else 0


class Telling:
    """A file to which a job writes what it has finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, number: int) -> None:
        with open(self.path, "a") as file:
            file.write(f"{number}\n")


# ---------------------------------------------------------------- writers


def kill_checkpoints(folder: Path, tries: int, draw: random.Random) -> str:
    """``examples.lm.checkpoint``: one file per checkpoint."""
    run, log, output = folder / "run", folder / "told", folder / "output"
    run.mkdir()
    tell = Telling(log)

    def job() -> None:
        newest = checkpoint.newest_checkpoint(run, warn=refuse)
        step = 0 if newest is None else checkpoint.load_checkpoint(newest, CONFIG, torch.device("cpu"))["step"]
        while True:
            step += 1
            checkpoint.save_checkpoint(run, step, CONFIG, {f"t{n}": values(step, n) for n in range(NUM_TENSORS)})
            tell(step)

    done, half, when = 0, 0, moments(job, log, output)
    for _ in range(tries):
        assert forked(job, draw.uniform(*when), output), "the job ended"
        half += any(path.suffix == ".tmp" for path in run.iterdir())
        newest = checkpoint.newest_checkpoint(run, warn=refuse)
        step = 0 if newest is None else int(newest.stem.removeprefix("step_"))
        assert step >= told(log), f"checkpoint {told(log)} was told of, and is lost"
        for path in run.glob("step_*.pt"):
            assert checkpoint.is_whole(path), f"{path} is half a file"
        if newest is not None:
            found = checkpoint.load_checkpoint(newest, CONFIG, torch.device("cpu"))
            assert found["step"] == step, "a checkpoint under the name of another"
            assert all(torch.equal(found[f"t{n}"], values(step, n)) for n in range(NUM_TENSORS)), "other values"
        assert step >= done, "went back"
        done = step
    return f"{done} checkpoints written, {half} kills in the middle of one"


def kill_sharded(folder: Path, tries: int, draw: random.Random) -> str:
    """``examples.lm.parallel_checkpoint``: a folder per checkpoint."""
    run, log, output = folder / "run", folder / "told", folder / "output"
    run.mkdir()
    tell = Telling(log)
    world: Any = SimpleNamespace(is_main=True, size=1, rank=0, barrier=lambda: None)

    def model_of(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(200, 300, bias=False)
        with torch.no_grad():
            model.weight.copy_(values(step, 0).reshape(300, 200))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def load(path: Path) -> int:
        model, optimizer = model_of(0)
        step: int = parallel_checkpoint.load_sharded(path, CONFIG, model, optimizer, world)["step"]
        assert torch.equal(model.weight, values(step, 0).reshape(300, 200)), "other values"
        return step

    def job() -> None:
        newest = parallel_checkpoint.newest_sharded(run, warn=refuse)
        step = 0 if newest is None else load(newest)
        while True:
            step += 1
            parallel_checkpoint.save_sharded(run, step, CONFIG, {}, *model_of(step), world)
            tell(step)

    def look() -> None:
        newest = parallel_checkpoint.newest_sharded(run, warn=refuse)
        step = 0 if newest is None else load(newest)
        assert step >= told(log), f"checkpoint {told(log)} was told of, and is lost"
        tell_step(step)

    tell_step = Telling(folder / "seen")
    half, when = 0, moments(job, log, output)
    for _ in range(tries):
        assert forked(job, draw.uniform(*when), output), "the job ended"
        half += any(path.suffix == ".tmp" for path in run.iterdir())
        assert looked(look, output)
    done = told(folder / "seen")
    return f"{done} checkpoints written, {half} kills in the middle of one"


def kill_conversions(folder: Path, tries: int, draw: random.Random) -> str:
    """``sonic convert``: a folder appears whole, or not at all."""
    source, output, log = folder / "source", folder / "output", folder / "told"
    source.mkdir()
    save_model(source)
    wanted = folder / "wanted"
    assert looked(lambda: write(source, wanted), output)
    expected = contents(wanted)
    tell = Telling(log)

    def job() -> None:
        number = told(log)
        while True:
            number += 1
            write(source, folder / f"target-{number}")
            tell(number)

    whole, half, when = 0, 0, moments(job, log, output)
    for path in (*folder.glob("target-*"), *folder.glob(".target-*")):
        shutil.rmtree(path)
    log.unlink()
    for _ in range(tries):
        assert forked(job, draw.uniform(*when), output), "the job ended"
        targets = sorted(folder.glob("target-*"))
        assert len(targets) in (told(log), told(log) + 1), "a folder was told of, and is lost"
        for target in targets[-2:]:
            assert contents(target) == expected, f"{target} is not whole"
        whole += len(targets)
        left = [path for path in folder.iterdir() if path.name.startswith(".target-")]
        half += bool(left)
        number = told(log) + 1
        if not (folder / f"target-{number}").exists():  # the one that was interrupted, again
            assert looked(lambda: write(source, folder / f"target-{number}"), output)  # noqa: B023
            assert contents(folder / f"target-{number}") == expected, "written again, and not whole"
        assert not [path for path in folder.iterdir() if path.name.startswith(".target-")], "leftovers stay"
        for path in folder.glob("target-*"):
            shutil.rmtree(path)
        log.unlink(missing_ok=True)
    return f"{whole} folders written, {half} kills in the middle of one"


def save_model(folder: Path) -> None:
    """A small checkpoint of a published family."""
    from sonic.convert.stored import HeldTensor, write_file

    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp."
        for e in range(8):
            for name, shape in (("gate", (24, 32)), ("up", (24, 32)), ("down", (32, 24))):
                tensors[f"{stem}experts.{e}.{name}_proj.weight"] = torch.randn(shape, generator=draw)
        tensors[f"{stem}gate.weight"] = torch.randn(8, 32, generator=draw)
    write_file(folder / "model.safetensors", [HeldTensor(key, value) for key, value in tensors.items()], {})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts_per_tok": 2}))


def write(source: Path, target: Path) -> None:
    """A conversion into many files."""
    convert_checkpoint(source, target, max_shard_bytes=20_000)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; looks at the weights as a reader does, too."""
    assert open_checkpoint(folder).tensors, "no tensors"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_training(folder: Path, tries: int, draw: random.Random) -> str:
    """``examples.train_moe_lm``: killed again and again, it ends with the very losses of a run that was not."""
    text, output, out = folder / "text", folder / "output", folder / "run"
    text.mkdir()
    for number in range(12):
        body = "".join(f"def f{number}_{n}(x):\n    return x * {n * number}\n\n" for n in range(40))
        (text / f"a{number}.py").write_text(body)
    steps = max(20, 5 * tries)
    sizes = {"hidden-size": 16, "layers": 1, "heads": 2, "experts": 4, "top-k": 2, "expert-size": 8}
    times = {"seq-len": 32, "batch-size": 4, "eval-every": 1000, "eval-windows": 4, "save-every": 1, "steps": steps}
    common = ["--text", str(text), "--sample-length", "8"]
    common += [part for name, value in {**sizes, **times}.items() for part in (f"--{name}", str(value))]

    def job(where: Path, *more: str) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(1)
            assert train_moe_lm.main([*common, "--out", str(where), *more]) == 0, "the job failed"

        return run

    start = time.monotonic()
    assert looked(job(folder / "unbroken"), output)
    long = 4 * (time.monotonic() - start) / max(tries, 4)  # so that the last kills still meet a run under way
    killed = 0
    for number in range(tries):
        killed += forked(job(out, *["--resume"] * (number > 0)), draw.uniform(0.0, long), output)
        newest = checkpoint.newest_checkpoint(out / "moe", warn=refuse) if (out / "moe").is_dir() else None
        for path in out.glob("moe/step_*.pt"):
            assert checkpoint.is_whole(path), f"{path} is half a file"
        assert newest is None or newest.is_file(), "no checkpoint"
    assert looked(job(out, "--resume"), output)
    one, other = (rows(where / "moe" / "metrics.jsonl") for where in (out, folder / "unbroken"))
    assert one == other and len(one) == steps, "other losses than those of a run that was not killed"
    return f"{steps} steps with the losses of an unbroken run, {killed} kills on the way"


def rows(path: Path) -> list[dict[str, Any]]:
    """A log without the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def refuse(message: str) -> None:
    """Where no checkpoint may be damaged."""
    raise AssertionError(message)


WRITERS: dict[str, Callable[[Path, int, random.Random], str]] = {
    "checkpoints": kill_checkpoints,
    "sharded": kill_sharded,
    "conversions": kill_conversions,
    "training": kill_training,
}


def main(argv: list[str] | None = None) -> int:
    """Kill, look, and say how many tries left all as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.killing", description=__doc__.split("\n")[0])
    parser.add_argument("writers", nargs="*", default=[], metavar="WRITER", help=f"of {', '.join(WRITERS)}; none: all")
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in options.writers or WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            what = WRITERS[name](Path(folder), options.tries, random.Random(f"{options.seed}/{name}"))
        print(f"{name}: {options.tries} of {options.tries} kills left all as it should be; {what}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
