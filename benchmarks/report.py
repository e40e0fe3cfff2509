"""How the benchmarks tell what they found: the start of each report, tables on the screen, JSON and Markdown files."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure

__all__ = ["FAILED", "RESULTS", "Section", "failure", "new_report", "page", "replace_file", "target", "write_files"]

RESULTS = Path(__file__).parent / "results"
FAILED = "failed: "
"""How the reason begins why a contender is missing that raised something else than a refusal."""


@dataclass(frozen=True)
class Section:
    """One table: its title, the head of each column, rows of texts, and lines to stand below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def text(self) -> str:
        """As aligned columns; the first is flush left, numbers flush right."""
        table = [list(self.head), *map(list, self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.head))]
        lines = []
        for row in table:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *lines, *self.notes])

    def markdown(self) -> str:
        """As a Markdown section."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.head) + " |", "|---" * len(self.head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])


def new_report(benchmark: str, arguments: Iterable[str], missing: Mapping[str, str]) -> dict[str, Any]:
    """Start a report and print its first lines: machine and versions, and what cannot be measured here.

    Args:
        benchmark: name of the module in ``benchmarks``.
        arguments: of the command line.
        missing: contender -> why it is left out everywhere.

    Returns:
        ``{"benchmark", "command", "machine", "missing", "cells": []}``, ready for JSON.
    """
    report: dict[str, Any] = {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
        "machine": measure.machine_report(),
        "missing": dict(missing),
        "cells": [],
    }
    print(measure.machine_line(report["machine"]))
    for name, why in missing.items():
        print(f"not measured: {name}: {why}")
    return report


def failure(error: BaseException) -> str:
    """The reason why a contender is missing that raised ``error``, in one line; begins with :data:`FAILED`."""
    return f"{FAILED}{type(error).__name__}: " + " ".join(str(error).split())[:300]


def target(value: float, limit: float, passed: bool) -> dict[str, Any]:
    """A measured value, what it was to reach, and whether it did, ready for JSON."""
    return {"value": value, "target": limit, "passed": passed}


def write_files(
    report: Mapping[str, Any],
    title: str,
    preface: str,
    sections: Sequence[Section],
    *,
    json_path: Path | None,
    save: bool,
) -> None:
    """Write the report where it was asked for.

    Args:
        report: from :func:`new_report`, completed.
        title: headline of the Markdown page.
        preface: a paragraph on how to read its tables.
        sections: the tables.
        json_path: write JSON to this file as well, or None.
        save: write ``<benchmark>_<cpu>_<date>.json`` and ``.md`` into :data:`RESULTS`.
    """
    text = json.dumps(report, indent=1) + "\n"
    if json_path is not None:
        json_path.write_text(text)
    if not save:
        return
    machine = report["machine"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"{report['benchmark']}_{measure.slug(machine['cpu'])}_{machine['date']}"
    markdown = page(report, title, [measure.machine_line(machine), preface], sections)
    for path, content in ((RESULTS / f"{stem}.json", text), (RESULTS / f"{stem}.md", markdown)):
        path.write_text(content)
        print(f"wrote {path}")


def page(report: Mapping[str, Any], title: str, paragraphs: Iterable[str], sections: Iterable[Section]) -> str:
    """A report as a Markdown page: title, command, ``paragraphs``, what was not measured and why, and the tables."""
    head = [f"# {title}", f"`{report['command']}`", *paragraphs]
    head += [f"Not measured: {name}: {why}." for name, why in report["missing"].items()]
    return "\n\n".join(head) + "\n\n" + "\n".join(section.markdown() for section in sections)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, or stops the program, finds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
