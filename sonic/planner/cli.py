"""``python -m sonic plan``: time, memory and exposed communication of a training step, before anything runs.

python -m sonic plan --model 7b --gpus 64 --ep 8 --wiring ladder
python -m sonic plan --model llama-70b --gpus 128 --micro-batch 2 --best
python -m sonic plan --model 7b --ep 8 --sweep 8:16384 --png sweep.png
python -m sonic plan --check
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sonic.planner.check import check_tables
from sonic.planner.constants import KERNELS, MACHINES, Machine
from sonic.planner.drawing import draw_sweep
from sonic.planner.memory import OPTIMIZERS
from sonic.planner.models import MODELS, Model, model_named
from sonic.planner.search import SweepPoint, gpu_counts, search, sweep
from sonic.planner.step import RECOMPUTE, Plan, make_setup, plan_setup
from sonic.planner.tables import Table, best_table, constant_tables, model_table, plan_tables, sweep_table
from sonic.planner.wiring import WIRINGS
from sonic.shapes import argument_error, check_choice

__all__ = ["add_plan_command", "filled_page"]

_BLOCK = re.compile(
    r"(?P<begin><!-- python -m sonic plan (?P<words>[^\n]*?) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.S
)
_COMPARED = ("standard", "ladder", "farskip")


def add_plan_command(commands: Any) -> None:
    """Add ``plan`` to the commands of ``python -m sonic``.

    Args:
        commands: what ``add_subparsers`` of :mod:`argparse` gives.
    """
    parser = commands.add_parser(
        "plan",
        help="step time, memory and exposed communication of a training run, from one GPU to thousands",
        description="Plan a training step: time, memory of each GPU and communication that compute waits for. "
        "Constants and their sources: --constants; how wrong it is beside published figures: --check. Exit code: 0; "
        "1 if the plan does not fit in memory; 2 for arguments that do not fit each other.",
    )
    _add_options(parser)
    parser.set_defaults(run=_run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to plan")
    what.add_argument("--model", default="7b", help=f"{', '.join(MODELS)}, or a .json or .toml file (default: 7b)")
    what.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change an attribute of the model; repeatable"
    )
    what.add_argument("--chip", default="h100", help=f"{', '.join(MACHINES)} (default: h100)")
    what.add_argument("--nvlink", type=float, metavar="GB/S", help="of one GPU, one direction; default: the chip's")
    what.add_argument(
        "--network", type=float, metavar="GB/S", help="NIC of one GPU, one direction; default: the chip's"
    )
    what.add_argument("--domain", type=int, metavar="N", help="GPUs that NVLink joins; default: the chip's")
    what.add_argument("--gpus", type=int, metavar="N", help="dp * ep * tp (default: tp * ep)")
    for name, text in (("tp", "tensor"), ("ep", "expert"), ("pp", "pipeline (must be 1)")):
        what.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"degree of {text} parallelism")
    what.add_argument("--wiring", default=None, help=f"{', '.join(WIRINGS)} (default: standard); several with --sweep")
    what.add_argument("--wired-layers", type=int, metavar="N", help="only the last N layers have it; default: all")
    what.add_argument(
        "--micro-batch", type=int, default=1, metavar="N", help="sequences at once on a rank (default: 1)"
    )
    what.add_argument("--sequence", type=int, default=4096, metavar="N", help="tokens of a sequence (default: 4096)")
    what.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro-batches of a step (default: 1)")
    what.add_argument(
        "--shard", type=int, metavar="N", help="ranks that share weights out; default: all (HSDP if less)"
    )
    what.add_argument("--no-reshard", action="store_true", help="keep gathered weights until backward (ZeRO-2)")
    what.add_argument("--sequence-parallel", action="store_true", help="share norms and the stream out over tp ranks")
    what.add_argument("--kernels", default="sonic", help=f"of the experts: {', '.join(KERNELS)} (default: sonic)")
    what.add_argument("--recompute", default="none", help=f"in backward: {', '.join(RECOMPUTE)} (default: none)")
    what.add_argument("--optimizer", default="adamw", help=f"{', '.join(OPTIMIZERS)} (default: adamw)")
    what.add_argument("--loss-chunks", type=int, default=1, metavar="N", help="pieces of the logits (default: 1)")
    what.add_argument(
        "--interference", type=float, metavar="S", help="compute beside a collective is 1 + S times slower"
    )
    how = parser.add_argument_group("what to answer")
    how.add_argument(
        "--best", type=int, nargs="?", const=8, metavar="N", help="the N fastest meshes that fit (default: 8)"
    )
    how.add_argument("--sweep", metavar="FIRST:LAST", help="throughput on FIRST, twice as many ... LAST GPUs")
    how.add_argument("--check", action="store_true", help="planned beside published figures")
    how.add_argument("--constants", action="store_true", help="every number taken for granted, and where it is from")
    how.add_argument("--models", action="store_true", help="the known models")
    how.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to a file or the screen")
    how.add_argument("--png", type=Path, metavar="FILE", help="draw the sweep")
    how.add_argument("--markdown", action="store_true", help="tables as Markdown")
    how.add_argument("--write", type=Path, metavar="PAGE", help="put tables between the markers of a Markdown page")


def _run(options: argparse.Namespace) -> int:
    try:
        return _answer(options)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _answer(options: argparse.Namespace) -> int:
    if options.write is not None:
        if not options.write.is_file():
            raise argument_error("sonic plan", "--write", options.write, "a page that exists")
        options.write.write_text(filled_page(options.write.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {options.write}")
        return 0
    tables, data, code, points = _results(options)
    if options.png is not None:
        if points is None:
            raise argument_error("sonic plan", "--png", options.png, "only with --sweep")
        draw_sweep(points, options.png)
        print(f"wrote {options.png}", file=sys.stderr)
    if options.json == "-":
        print(json.dumps(data, indent=1))
        return code
    if options.json is not None:
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.json}", file=sys.stderr)
    if options.markdown:
        print("\n\n".join(table.markdown() for table in tables))
    else:
        _show(tables)
    return code


def _results(options: argparse.Namespace) -> tuple[list[Table], Any, int, list[SweepPoint] | None]:
    """Tables, the same as plain data, the exit code, and the points of a sweep."""
    modes = {"--best": options.best is not None, "--sweep": options.sweep is not None}
    modes |= {"--check": options.check, "--constants": options.constants, "--models": options.models}
    chosen = [name for name, is_chosen in modes.items() if is_chosen]
    if len(chosen) > 1:
        wanted = "only one of --best, --sweep, --check, --constants, --models"
        raise argument_error("sonic plan", chosen[1], f"given beside {chosen[0]}", wanted)
    for name, tables in (("check", check_tables), ("constants", constant_tables), ("models", lambda: [model_table()])):
        if getattr(options, name):
            found = tables()
            return found, [dataclasses.asdict(table) for table in found], 0, None
    setup_options = _setup_options(options)
    model, machine = _model(options), _machine(options)
    if options.sweep is not None:
        return _sweep(options, model, machine, setup_options)
    wiring = options.wiring or "standard"
    gpus = options.tp * options.ep if options.gpus is None else options.gpus
    setup = make_setup(model, machine, gpus, wiring=wiring, **setup_options)
    if options.best is not None:
        if options.best < 1:
            raise argument_error("sonic plan", "--best", options.best, "a positive integer")
        fixed = [name for name in ("tp", "ep") if getattr(options, name) != 1]
        fixed += [name for name, free in (("shard", None), ("recompute", "none")) if getattr(options, name) != free]
        plans = search(setup, fixed=fixed)
        return [best_table(plans, options.best)], [plan.as_dict() for plan in plans[: options.best]], 0, None
    plan = plan_setup(setup)
    return plan_tables(plan), plan.as_dict(), 0 if plan.fits else 1, None


def _sweep(
    options: argparse.Namespace, model: Model, machine: Machine, setup_options: dict[str, Any]
) -> tuple[list[Table], Any, int, list[SweepPoint]]:
    if not re.fullmatch(r"\d+:\d+", options.sweep):
        raise argument_error("sonic plan", "--sweep", repr(options.sweep), "FIRST:LAST, such as 8:16384")
    if options.gpus is not None:
        raise argument_error("sonic plan", "--gpus", options.gpus, "nothing beside --sweep, which says how many")
    if options.shard is not None:
        raise argument_error("sonic plan", "--shard", options.shard, "nothing beside --sweep, which takes the fastest")
    wirings = options.wiring.split(",") if options.wiring else list(_COMPARED)
    for wiring in wirings:
        check_choice("sonic plan", "--wiring", wiring, WIRINGS)
    setup = make_setup(model, machine, options.tp * options.ep, **setup_options)
    points = sweep(setup, gpu_counts(*map(int, options.sweep.split(":"))), wirings)
    return [sweep_table(points)], {"points": [_point(point) for point in points]}, 0, points


def _point(point: SweepPoint) -> dict[str, Any]:
    found: Plan | None = point.plan
    start: dict[str, Any] = {"gpus": point.gpus, "wiring": point.wiring, "fits": found is not None}
    if found is None:
        return start
    return start | {
        "shard": found.setup.shards[0],
        "tokens_per_second": round(found.tokens_per_second, 1),
        "tokens_per_second_per_gpu": round(found.tokens_per_second / point.gpus, 1),
        "mfu": round(found.mfu, 5),
        "step_seconds": round(found.step_seconds, 6),
        "exposed_seconds": {name: round(part.exposed, 6) for name, part in found.collectives.items()},
        "memory_total_bytes": round(found.memory_bytes),
    }


def _setup_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ["tp", "ep", "pp", "wired_layers", "micro_batch", "sequence", "accumulation", "shard", "sequence_parallel"]
    names += ["kernels", "recompute", "optimizer", "loss_chunks", "interference"]
    return {name: getattr(options, name) for name in names} | {"reshard": not options.no_reshard}


def _model(options: argparse.Namespace) -> Model:
    model = model_named(options.model)
    changes: dict[str, Any] = {}
    known = {field.name: field.type for field in dataclasses.fields(Model)}
    for word in options.set:
        name, equals, value = word.partition("=")
        if not equals:
            raise argument_error("sonic plan", "--set", repr(word), "NAME=VALUE")
        check_choice("sonic plan", "--set", name, tuple(known))
        if known[name] == "str":
            changes[name] = value
        elif known[name] == "bool" and value in ("true", "false"):
            changes[name] = value == "true"
        elif known[name] == "int" and re.fullmatch(r"-?\d+", value):
            changes[name] = int(value)
        else:
            wanted = "true or false" if known[name] == "bool" else "an integer"
            raise argument_error("sonic plan", f"--set {name}", repr(value), wanted)
    return dataclasses.replace(model, **changes) if changes else model


def _machine(options: argparse.Namespace) -> Machine:
    check_choice("sonic plan", "--chip", options.chip, tuple(MACHINES))
    changes: dict[str, Any] = {}
    fields = {"nvlink": "nvlink_bytes_per_second", "network": "network_bytes_per_second", "domain": "domain"}
    for name, field in fields.items():
        value = getattr(options, name)
        if value is not None:
            if not value > 0:
                raise argument_error("sonic plan", f"--{name}", value, "a positive number")
            changes[field] = value if name == "domain" else value * 1e9
    return dataclasses.replace(MACHINES[options.chip], **changes)


def _show(tables: Sequence[Table]) -> None:
    """Print with rich where it is installed; as plain columns elsewhere."""
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        print("\n\n".join(table.text() for table in tables))
        return
    box = importlib.import_module("rich.box")
    markup = importlib.import_module("rich.markup")
    screen = importlib.import_module("rich.console").Console(highlight=False)
    make = importlib.import_module("rich.table").Table
    for table in tables:
        drawn = make(title=markup.escape(table.title), title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
        for number, head in enumerate(table.head):
            drawn.add_column(markup.escape(head), justify="right" if table.has_numbers(number) else "left")
        for row in table.rows:
            drawn.add_row(*map(markup.escape, row))
        screen.print(drawn)
        for note in table.notes:
            screen.print(f"  {note}", markup=False)


def filled_page(text: str) -> str:
    """A Markdown page with the tables of the commands that it holds.

    A command stands in ``<!-- python -m sonic plan ARGUMENTS -->``; its tables come between that line and the next
    ``<!-- end -->``.

    Raises:
        ValueError: a command that does not fit.
    """

    def fill(found: re.Match[str]) -> str:
        parser = argparse.ArgumentParser(prog="python -m sonic plan", exit_on_error=False)
        _add_options(parser)
        tables, *_ = _results(parser.parse_args(shlex.split(found["words"])))
        return f"{found['begin']}\n" + "\n\n".join(table.markdown() for table in tables) + f"\n\n{found['end']}"

    return _BLOCK.sub(fill, text)
