"""A suite's results as a page, and two sets of results side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sonic.bench.records import Figure, faults_of, figures_of, read_json
from sonic.bench.stamp import stamp_differences, stamp_line
from sonic.shapes import argument_error

__all__ = ["Results", "compare_page", "load_results", "suite_page"]


class Results:
    """A set of results, from a suite or from one benchmark.

    Attributes:
        name: what the reader gave.
        stamp: as :func:`sonic.bench.stamp.make_stamp` makes it; what an old file does not tell is missing.
        figures: by part.
        statuses: by part; empty for one benchmark.
        faults: by part: what failed in it.
    """

    def __init__(
        self,
        name: str,
        stamp: Mapping[str, Any],
        figures: Mapping[str, Sequence[Figure]],
        statuses: Mapping[str, str],
        faults: Mapping[str, Sequence[str]],
    ) -> None:
        self.name, self.stamp, self.figures, self.statuses, self.faults = name, stamp, figures, statuses, faults


def load_results(path: Path) -> Results:
    """Read a folder of results, its ``suite.json``, or the JSON of one benchmark.

    Raises:
        ValueError: there is no such file, or it is none of these.
    """
    file = path / "suite.json" if path.is_dir() else path
    found = read_json(file)
    wanted = "a folder of results, its suite.json, or the JSON of a benchmark"
    if not isinstance(found, dict) or not ("parts" in found or "cells" in found):
        why = "holds no results" if path.exists() else "does not exist"
        raise argument_error("sonic bench", "compare", f"{path}, which {why}", wanted)
    if "parts" in found and "stamp" in found:
        records = {record["part"]: record for record in found["parts"]}
        return Results(
            str(path),
            found["stamp"],
            {name: figures_of(record["data"]) for name, record in records.items()},
            {name: record["status"] for name, record in records.items()},
            {name: faults_of(record["data"]) for name, record in records.items() if name != "environment"},
        )
    if "benchmark" not in found:
        raise argument_error("sonic bench", "compare", f"{path}, which holds no results", wanted)
    machine, device = found.get("machine", {}), found.get("device", {})
    device = device if isinstance(device, dict) else {"name": device}
    stamp = {
        "chip": device.get("name") or machine.get("cpu", "unknown chip"),
        "cpu": machine.get("cpu"),
        "cores": machine.get("cores"),
        "versions": {"python": machine.get("python"), "torch": machine.get("torch"), **device.get("versions", {})},
        "date": machine.get("date", "no date"),
    }
    part = found["benchmark"]
    return Results(str(path), stamp, {part: figures_of(found)}, {}, {part: faults_of(found)})


def suite_page(found: Mapping[str, Any]) -> str:
    """What :func:`sonic.bench.runner.run_suite` returned, as Markdown."""
    dry = " (dry run)" if found["dry_run"] else ""
    lines = [f"# Benchmark suite: {found['suite']}{dry}", "", stamp_line(found["stamp"]), ""]
    after = found["clocks_after"]
    if after is not None:
        lines += [f"At the end: SM at {after['sm_mhz']} MHz, {after['temperature_c']} degrees.", ""]
    spent = sum(record["seconds"] for record in found["parts"])
    lines += [f"The parts took {spent:.0f} s, this run {found['seconds']:.0f} s.", ""]
    head = ("part", "status", "seconds", "limit", "why")
    rows = [
        (
            f"{record['part']}: {record['what']}",
            record["status"],
            f"{record['seconds']:.1f}",
            f"{record['limit_seconds']:g}",
            record["why"] or "",
        )
        for record in found["parts"]
    ]
    lines += [*_table(head, rows), ""]
    lines += ["![Time and memory of each contender](suite.png)", ""] if _has_picture(found) else []
    for record in found["parts"]:
        lines += [f"## {record['part']}", "", f"`{record['command']}`", ""]
        lines += [f"- {fault}" for fault in (faults_of(record["data"]) if record["part"] != "environment" else [])]
        lines += [f"- not measured: {name}: {why}" for name, why in _missing(record["data"]).items()]
        lines += [""] if lines[-1] else []
        figures = figures_of(record["data"])
        lines += [*_pivot(figures), ""] if figures else [f"{record['status']}; its output is in {record['log']}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def compare_page(first: Results, second: Results) -> str:
    """Two sets of results side by side, as Markdown: what differs between the machines, then every figure of both."""
    lines = ["# Two sets of results", "", f"- A: {first.name}: {stamp_line(first.stamp)}"]
    lines += [f"- B: {second.name}: {stamp_line(second.stamp)}", ""]
    differences = stamp_differences(first.stamp, second.stamp)
    if "chip" in differences:
        lines += [f"**OTHER CHIP**: A on {differences['chip'][0]}, B on {differences['chip'][1]}.", ""]
    if differences:
        lines += [
            "**Not the same**, so a ratio below says how both differ in all of this together:",
            "",
            *_table(("", "A", "B"), [(name, *values) for name, values in differences.items()]),
            "",
        ]
    else:
        lines += ["Chip, clocks, driver, versions and commit are the same.", ""]
    if first.statuses or second.statuses:
        names = list(dict.fromkeys([*first.statuses, *second.statuses]))
        rows = [(name, first.statuses.get(name, ""), second.statuses.get(name, "")) for name in names]
        lines += [*_table(("part", "A", "B"), rows), ""]
    for part in dict.fromkeys([*first.figures, *second.figures]):
        lines += _compared(part, first.figures.get(part, ()), second.figures.get(part, ()))
    for letter, results in (("A", first), ("B", second)):
        lines += [f"- {letter}: {fault}" for faults in results.faults.values() for fault in faults]
    lines += ["B / A below 1: B takes less. Empty: one of the two has no such figure.", ""]
    return "\n".join(lines)


def _compared(part: str, first: Sequence[Figure], second: Sequence[Figure]) -> list[str]:
    values = [
        {(figure.what, figure.who, figure.unit): figure.value for figure in figures} for figures in (first, second)
    ]
    keys = list(dict.fromkeys([*values[0], *values[1]]))
    if not keys:
        return []
    rows = []
    for key in keys:
        left, right = (found.get(key) for found in values)
        ratio = f"{right / left:.3f}" if left and right is not None else ""
        what, who, unit = key
        rows.append((what, who, unit, _number(left), _number(right), ratio))
    return [f"## {part}", "", *_table(("what", "who", "unit", "A", "B", "B / A"), rows), ""]


def _pivot(figures: Sequence[Figure]) -> list[str]:
    """A row for everything that was measured, a column for each contender."""
    whats = list(dict.fromkeys((figure.what, figure.unit) for figure in figures))
    names = list(dict.fromkeys(figure.who for figure in figures))
    values = {(figure.what, figure.unit, figure.who): figure.value for figure in figures}
    rows = [
        (f"{what}, {unit}" if unit else what, *(_number(values.get((what, unit, name))) for name in names))
        for what, unit in whats
    ]
    return _table(("", *names), rows)


def _missing(data: Mapping[str, Any] | None) -> dict[str, str]:
    """Who was measured nowhere, and the first reason that was given; not those that failed, which are faults."""
    cells = (data or {}).get("cells", [])
    found = dict((data or {}).get("missing", {}))
    for cell in cells:
        for name, why in cell.get("missing", {}).items():
            found.setdefault(name, why)
    faults = " ".join(faults_of(data))
    present = {name for cell in cells for name in cell.get("contenders", {})}
    return {name: why for name, why in found.items() if name not in present and f"{name} {why}" not in faults}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also stand in line on a terminal."""
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _has_picture(found: Mapping[str, Any]) -> bool:
    return not found["dry_run"] and found["picture"] is None
