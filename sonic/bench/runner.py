"""Runs the parts of a suite, each as a process of its own within its time, and keeps what they found.

A folder of results holds ``suite.json``, the same as a page, a picture, and a folder with the record, the figures and
all output of each part. A record is written when its part has ended, whole or not at all: a run that was stopped, in
whatever way, goes on with the part in which it was stopped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sonic.bench.parts import Part
from sonic.bench.records import FAILURES, NEEDS_GPU, read_json, status_of, write_whole
from sonic.bench.stamp import clocks, make_stamp, stamp_differences
from sonic.shapes import argument_error

__all__ = ["checkout", "run_suite"]

_WHERE = "sonic bench"
_MARKED = re.compile(r"\bmark\.(gpu|hopper)\b")
_RESTARTS = 6
_PR_SET_PDEATHSIG = 1
_CRASHED = 3  # exit code of a benchmark that has to be started anew
_GRACE_SECONDS = 5.0
_PICTURE_SECONDS = 60.0
# Other commits, drivers or packages are other measurements; a changed clock limit as well.
_MUST_AGREE = ("chip", "driver", "max_sm_mhz", "commit", "torch", "triton", "nvidia-cutlass-dsl")


def checkout() -> Path:
    """The folder of the checkout that the benchmarks lie in.

    Raises:
        ValueError: they cannot be imported, as where sonic is installed from a wheel.
    """
    spec = importlib.util.find_spec("benchmarks")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(location) / "gpu_checks.py").exists():
            return Path(location).resolve().parent
    wanted = "a checkout of sonic as the working directory: benchmarks and tests are no part of the installed library"
    raise argument_error(_WHERE, "benchmarks", "not importable", wanted)


def run_suite(
    suite: str,
    parts: Sequence[Part],
    folder: Path,
    root: Path,
    *,
    dry_run: bool = False,
    resume: bool = False,
    again: Sequence[str] = (),
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run a suite.

    Args:
        suite: its name.
        parts: from :func:`sonic.bench.parts.limited_parts`.
        folder: for the results.
        root: from :func:`checkout`.
        dry_run: let each part say what it would do, with the very arguments of the real run.
        resume: ``folder`` may hold results of the same suite: parts that have ended well are not run again.
        again: names of parts that are run again all the same.
        say: is given a line on each step.

    Returns:
        What ``suite.json`` holds: ``suite``, ``dry_run``, ``stamp``, ``clocks_after``, ``seconds`` (of this run),
        ``picture`` (why there is none, or None) and ``parts``: per part ``part``, ``what``, ``status``, ``why``,
        ``command``, ``limit_seconds``, ``seconds``, ``code``, ``restarts``, ``log`` (its file) and ``data`` (its JSON).

    Raises:
        ValueError: the folder holds something else; the GPU suite without a GPU; no such part.
    """
    for name in again:
        if name not in (names := [part.name for part in parts]):
            raise argument_error(_WHERE, "again", repr(name), f"one of {', '.join(names)}")
    has_gpu = torch.cuda.is_available()
    if suite == "gpu" and not has_gpu and not dry_run:
        wanted = "a GPU that torch sees; --dry-run shows what would run, and --suite cpu runs the same on a CPU"
        raise argument_error(_WHERE, "suite", "'gpu' on a machine without one", wanted)
    began = time.monotonic()
    folder = folder.absolute()  # parts run elsewhere
    stamp = make_stamp(suite, root)
    _open(folder, stamp, dry_run, resume)
    records = []
    for part in parts:
        path = folder / "parts" / f"{part.name}.json"
        record = read_json(path) if resume and part.name not in again else None
        if record is not None and record["status"] not in FAILURES and record["arguments"] == list(part.arguments):
            say(f"{part.name}: {record['status']} before, not run again")
        else:
            say(f"{part.name}: {part.what}, at most {part.limit:g} s")
            fresh = part.name in again or not resume
            path.unlink(missing_ok=True)  # if this run is stopped now, the earlier one is not to count
            record = _run_part(part, folder, root, dry_run, has_gpu, fresh)
            write_whole(path, json.dumps(record, indent=1) + "\n")
            say(f"{part.name}: {record['status']} in {record['seconds']:.1f} s" + _because(record["why"]))
        records.append(record)
    found = {
        "suite": suite,
        "dry_run": dry_run,
        "stamp": stamp,
        "clocks_after": clocks(),
        "seconds": round(time.monotonic() - began, 1),
        "picture": None,
        "parts": records,
    }
    write_whole(folder / "suite.json", json.dumps(found, indent=1) + "\n")
    found["picture"] = None if dry_run else _draw(folder, root)
    found["seconds"] = round(time.monotonic() - began, 1)
    write_whole(folder / "suite.json", json.dumps(found, indent=1) + "\n")
    return found


def _open(folder: Path, stamp: dict[str, Any], dry_run: bool, resume: bool) -> None:
    """See that the folder is new, or holds the results of this very suite; leave a stamp in it."""
    path = folder / "parts" / "stamp.json"
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            wanted = "a folder that is new or empty; --resume goes on with what it holds"
            raise argument_error(_WHERE, "out", f"{folder}, which holds files", wanted)
        earlier = read_json(path)
        kind = {"suite": stamp["suite"], "dry_run": dry_run}
        if earlier is None or {name: earlier.get(name) for name in kind} != kind:
            wanted = f"results of this suite ({'dry ' if dry_run else ''}{stamp['suite']})"
            raise argument_error(_WHERE, "out", f"{folder}, which holds something else", wanted)
        others = stamp_differences(earlier["stamp"], stamp)
        told = [f"{name} was {others[name][0]} and is {others[name][1]}" for name in _MUST_AGREE if name in others]
        if told:
            wanted = f"results of the same chip and versions ({'; '.join(told)})"
            raise argument_error(_WHERE, "out", f"{folder}, which holds other results", wanted)
    write_whole(path, json.dumps({"suite": stamp["suite"], "dry_run": dry_run, "stamp": stamp}, indent=1) + "\n")


def _run_part(part: Part, folder: Path, root: Path, dry_run: bool, has_gpu: bool, fresh: bool) -> dict[str, Any]:
    """Run one part to its end, or to the end of its time; return its record."""
    files = folder / "parts"
    figures, log = files / f"{part.name}.figures.json", files / f"{part.name}.log"
    # what another part begins in is its own
    if fresh or not part.goes_on:
        for path in (figures, figures.with_suffix(".md"), figures.with_name(f".{figures.name}.running"), log):
            path.unlink(missing_ok=True)
    is_dry = dry_run and part.dry_arguments is not None
    # what an option of the command line expects has to be there in a dry run, too
    named = {"{json}": [str(figures)], "{seconds}": [f"{0.75 * part.limit:g}"], "{tests}": _test_files(root)}
    words = [*part.arguments, *((part.dry_arguments or ()) if is_dry else ())]
    arguments = [argument for word in words for argument in named.get(word, [word])]
    command = [sys.executable, "-m", part.module, *arguments]
    began = time.monotonic()
    restarts = 0
    while True:
        left = part.limit - (time.monotonic() - began)
        code, in_time = _run_process(command, log, root, left)
        is_dead = part.goes_on and (code < 0 or code == _CRASHED)
        if not in_time or not is_dead or restarts == _RESTARTS or time.monotonic() - began >= part.limit:
            break
        restarts += 1
    text = log.read_text(encoding="utf-8", errors="replace")
    data = read_json(figures) if part.writes_json else None
    status, why = status_of(code, data, text, part.module == "pytest")
    if part.module == "sonic":
        data = _json_in(text)
    if not in_time:
        status, why = "timed out", f"it ran past {part.limit:g} s" + (f"; {why}" if part.module == "pytest" else "")
    elif is_dry and code == 0:
        status, why = ("dry run" if has_gpu else NEEDS_GPU), "its command is understood"
    elif code == 0 and part.writes_json and data is None:
        status, why = "failed", "it ended well, but wrote no results"
    return {
        "part": part.name,
        "what": part.what,
        "status": status,
        "why": why,
        "command": shlex.join(["python", "-m", part.module, *arguments]),
        "arguments": list(part.arguments),
        "limit_seconds": part.limit,
        "seconds": round(time.monotonic() - began, 1),
        "code": code,
        "restarts": restarts,
        "log": f"parts/{log.name}",
        "data": data,
    }


def _test_files(root: Path) -> list[str]:
    """Files with tests that need a GPU: collecting all others takes longer than running these."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [path.relative_to(root).as_posix() for path in files if _MARKED.search(path.read_text(encoding="utf-8"))]


def _run_process(command: Sequence[str], log: Path, root: Path, seconds: float) -> tuple[int, bool]:
    """Run a command in the checkout, all its output added to a file; its exit code, and whether it ended in time.

    Whatever happens, nothing that it started is left behind: it has a process group of its own, which is ended.
    """
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_us() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a suite that is killed cannot end it

    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_us,
        )
        try:
            return process.wait(timeout=max(seconds, 0.0)), True
        except subprocess.TimeoutExpired:
            # as if interrupted by hand: what it writes at its end tells whether it was still sound
            _signal(process, signal.SIGINT)
            try:
                return process.wait(timeout=_GRACE_SECONDS), False
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                return process.wait(), False
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # all of the group has ended
        return


def _draw(folder: Path, root: Path) -> str | None:
    """Draw the picture of a suite; why there is none, or None."""
    picture, log = folder / "suite.png", folder / "parts" / "picture.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.figures", "--suite", str(folder / "suite.json"), "--out", str(picture)]
    code, in_time = _run_process(command, log, root, _PICTURE_SECONDS)
    if code == 0:
        return None
    return (log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2] or "no output")[:300] + (
        "" if in_time else f" (it ran past {_PICTURE_SECONDS:g} s)"
    )


def _json_in(text: str) -> Any | None:
    """The JSON object in what a program printed; None if there is none."""
    try:
        return json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return None


def _because(why: str | None) -> str:
    return f": {why}" if why else ""
