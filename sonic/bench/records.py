"""Records of what a suite ran: the figures in them, what failed, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FAILURES", "NEEDS_GPU", "Figure", "faults_of", "figures_of", "read_json", "status_of", "write_whole"]

NEEDS_GPU = "needs a GPU"
FAILURES = ("failed", "timed out", "cut short")
"""Statuses of a part that set the suite's exit code; the others: ``"passed"``, ``"needs a GPU"``, ``"dry run"``."""

_MIB = 2**20
_FAILED = "failed: "  # how benchmarks begin the reason why a contender is missing that raised
_TESTS = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|tests collected)\b")


@dataclass(frozen=True)
class Figure:
    """One measured number; less is better.

    Attributes:
        what: op and shape, or whatever was measured.
        who: the contender.
        value: in ``unit``.
        unit: such as ``"us"`` or ``"MiB"``.
    """

    what: str
    who: str
    value: float
    unit: str


def figures_of(data: Mapping[str, Any] | None) -> list[Figure]:
    """The times and sizes in the JSON of a benchmark; none where its form is not known here.

    Known are kernels, moe, layers, cpu_moe, memory, rounding and gpu_checks of the folder benchmarks.
    """
    if data is None or "benchmark" not in data:
        return []
    found = []
    for cell in data.get("cells", ()):
        if data["benchmark"] == "gpu_checks":
            found += [
                Figure(f"{cell['check']}, {cell['what']}", name, value, "") for name, value in cell["figures"].items()
            ]
            continue
        if "contenders" not in cell:
            return []
        # two runs of the same shape may call it by different names
        sizes = " ".join(f"{letter}={size}" for letter, size in cell["shape"].items())
        what = ", ".join(str(cell[part]) for part in ("op", "dtype") if part in cell)
        what = f"{what}, {sizes}" if what else sizes
        what += f", skew {cell['skew']:g}" if cell.get("skew") else ""
        for name, entry in cell["contenders"].items():
            found += [Figure(f"{what}{more}", name, value, unit) for more, value, unit in _numbers(entry)]
    return found


def _numbers(entry: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """What the entry of a contender holds: what it is beyond the cell, value, unit."""
    found = []
    for key, more, unit, scale in (
        ("median_us", "", "us", 1.0),
        ("median_ms", "", "ms", 1.0),
        ("saved_bytes", ", saved", "MiB", 1 / _MIB),
        ("held_bytes", ", held", "MiB", 1 / _MIB),
        ("peak_bytes", ", peak", "MiB", 1 / _MIB),
    ):
        if entry.get(key) is not None:
            found.append((more, entry[key] * scale, unit))
    for lap in ("forward", "forward_backward"):
        if isinstance(entry.get(lap), dict) and "median_ms" in entry[lap]:
            found.append((f", {lap.replace('_', ' + ')}", entry[lap]["median_ms"], "ms"))
    return found


def faults_of(data: Mapping[str, Any] | None) -> list[str]:
    """What the JSON of a benchmark says went wrong: contenders that raised or are wrong, checks that failed."""
    found = []
    for cell in (data or {}).get("cells", []):
        what = " ".join(str(cell[part]) for part in ("op", "name", "check", "what") if part in cell)
        found += [
            f"{name} {why}" + (f" ({what})" if what else "")
            for name, why in cell.get("missing", {}).items()
            if why.startswith(_FAILED)
        ]
        for name, entry in cell.get("contenders", {}).items():
            if entry.get("wrong"):
                found.append(f"{name} is wrong: {entry['wrong']} ({what})")
        for name, goal in cell.get("targets", {}).items():
            if name == "equals_formula" and not goal["passed"]:  # the others are goals, this one is a promise
                found.append(f"sonic keeps {goal['value']} bytes, promised {goal['target']}")
        if cell.get("status") == "failed":
            found.append(f"{what}: {cell['why']}")
    return found


def status_of(code: int, data: Mapping[str, Any] | None, log: str, is_tests: bool) -> tuple[str, str | None]:
    """Status of a part that came to its end, and why it is none of ``"passed"``.

    Args:
        code: exit code of its process; below 0: minus the signal that killed it.
        data: its JSON.
        log: all that it printed.
        is_tests: it is pytest, whose last line counts.
    """
    if is_tests:
        counts = {word: int(number) for number, word in _TESTS.findall(log.strip().rpartition("\n")[2])}
        told = ", ".join(f"{number} {word}" for word, number in counts.items())
        if code != 0:
            return "failed", told or _last_line(log) or f"exit code {code}"
        # where no test ran, none has passed
        return ("passed", told) if "passed" in counts else (NEEDS_GPU, told)
    cells = (data or {}).get("cells", [])
    if code != 0:
        faults = faults_of(data)
        if faults:
            return "failed", "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return "failed", f"{ended}: {_last_line(log)}"
    if data is not None and data.get("left_out"):
        return "cut short", f"no time was left for {'; '.join(data['left_out'])}"
    if cells and all(cell.get("status") == NEEDS_GPU for cell in cells):
        return NEEDS_GPU, None
    return "passed", None


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")[:300]


def read_json(path: Path) -> Any | None:
    """What a JSON file holds; None if there is none, or no JSON in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, or stops the program, finds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
