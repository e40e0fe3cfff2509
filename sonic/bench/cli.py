"""``python -m sonic bench``: every benchmark in one command, and two sets of results side by side.

python -m sonic bench --suite gpu
python -m sonic bench --suite gpu --resume
python -m sonic bench --suite gpu --dry-run
python -m sonic bench --compare report/bench/before report/bench/after --out compared.md
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from sonic.bench.page import compare_page, load_results, suite_page
from sonic.bench.parts import BUDGET_SECONDS, SUITES, limited_parts
from sonic.bench.records import FAILURES, write_whole
from sonic.bench.runner import checkout, run_suite
from sonic.bench.stamp import make_stamp, slug, stamp_line

__all__ = ["add_bench_command"]


def add_bench_command(commands: Any) -> None:
    """Add ``bench`` to the commands of ``python -m sonic``.

    Args:
        commands: what ``add_subparsers`` of :mod:`argparse` gives.
    """
    names = {name: ", ".join(part.name for part in parts) for name, parts in SUITES.items()}
    parser = commands.add_parser(
        "bench",
        help="every benchmark and GPU test in one command; two sets of results side by side",
        description=f"Run all parts of a suite ({names['gpu']}) from a checkout, each as a process of its own within "
        f"its time limit, and write JSON, a page and a picture. The GPU suite takes at most {BUDGET_SECONDS // 60} "
        "minutes on one GPU. Exit code: 0; 1 if a part failed, ran out of time, or has a contender that failed; 2 for "
        "arguments that do not fit; 130 if it was interrupted.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=list(SUITES), help="cpu: the same parts at small shapes on the CPU")
    what.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="folders of results, or the JSON of two benchmarks"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="folder of the results (default: below report/bench/); with --compare a file",
    )
    parser.add_argument("--dry-run", action="store_true", help="each part only says what it would do; needs no GPU")
    parser.add_argument("--resume", action="store_true", help="go on in --out: what has ended well is not run again")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART", help="with --resume: run these all the same")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these parts alone")
    parser.add_argument(
        "--limit", nargs="+", default=[], type=_limit, metavar="PART=SECONDS", help="other time limits of parts"
    )
    parser.set_defaults(run=_run)


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    try:
        return name, float(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no limit, expected PART=SECONDS, such as kernels=120") from None


def _run(options: argparse.Namespace) -> int:
    try:
        return _compare(options) if options.compare else _suite(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from here", file=sys.stderr)
        return 130


def _compare(options: argparse.Namespace) -> int:
    page = compare_page(*map(load_results, options.compare))
    print(page)
    if options.out is not None:
        write_whole(options.out, page)
        print(f"wrote {options.out}")
    return 0


def _suite(options: argparse.Namespace) -> int:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # what was started ends with us
    root = checkout()
    parts = limited_parts(options.suite, dict(options.limit), tuple(options.only))
    stamp = make_stamp(options.suite, root)
    print(stamp_line(stamp), flush=True)
    folder = options.out
    if folder is None:
        name = [options.suite, slug(stamp["chip"]), stamp["date"][:10], *(["dry"] if options.dry_run else [])]
        folder = root / "report" / "bench" / "_".join(name)
    how = {"dry_run": options.dry_run, "resume": options.resume, "again": options.again}
    found = run_suite(options.suite, parts, folder, root, **how, say=lambda line: print(line, flush=True))
    write_whole(folder / "suite.md", suite_page(found))
    if found["picture"] is not None:
        print(f"no picture: {found['picture']}")
    failed = [record["part"] for record in found["parts"] if record["status"] in FAILURES]
    print(f"{found['seconds']:.0f} s spent; wrote {folder}" + (f"; not well: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
