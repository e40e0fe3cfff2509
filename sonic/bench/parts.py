"""What the suites are made of: a command and a time limit for each part."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.shapes import argument_error, check_choice

__all__ = ["BUDGET_SECONDS", "SUITES", "Part", "limited_parts"]

BUDGET_SECONDS = 480
"""What the GPU suite may take on one H200, all limits and its own work together."""


@dataclass(frozen=True)
class Part:
    """One part of a suite.

    Attributes:
        name: also of its files.
        what: in a few words.
        module: run with ``python -m``.
        arguments: ``{json}`` stands for the file that it writes, ``{seconds}`` for the time in which it is to begin
            things, three quarters of its limit, ``{tests}`` for the files with tests that need a GPU.
        limit: seconds until it is stopped.
        dry_arguments: how it shows what it would do; None: no part of a dry run does without its work.
        writes_json: its figures are in that file, not in what it prints.
        goes_on: it goes on where an earlier run stopped, and without whom that run died of.
    """

    name: str
    what: str
    module: str
    arguments: tuple[str, ...]
    limit: float
    dry_arguments: tuple[str, ...] | None = None
    writes_json: bool = True
    goes_on: bool = False


# Whether or not the cache of pytest can be written says nothing about a GPU.
_PYTEST = ("{tests}", "-q", "-m", "gpu or hopper", "-p", "no:cacheprovider", "--durations=10")
_DRY = ("--dry-run",)
_OPS = "up_proj down_proj combine down_proj_bwd_input down_proj_bwd_weight up_proj_bwd_input up_proj_bwd_weight"
_ROUTING_OPS = "topk_softmax build_plan"


def _doctor(limit: float) -> Part:
    return Part("environment", "doctor", "sonic", ("doctor", "--json"), limit, writes_json=False)


def _tests(limit: float) -> Part:
    return Part("tests", "tests marked gpu or hopper", "pytest", _PYTEST, limit, ("--collect-only",), False)


def _timed(name: str, what: str, limit: float, *arguments: str) -> Part:
    both = (*arguments, "--out", "{json}", "--seconds", "{seconds}")
    return Part(name, what, f"benchmarks.{name}", both, limit, _DRY, goes_on=True)


def _checks(name: str, what: str, limit: float, device: str, *checks: str) -> Part:
    arguments = ("--device", device, "--only", *checks, "--json", "{json}")
    return Part(name, what, "benchmarks.gpu_checks", arguments, limit, _DRY)


def _memory(limit: float, *arguments: str) -> Part:
    return Part(
        "memory", "bytes kept, allocator's peak", "benchmarks.memory", (*arguments, "--json", "{json}"), limit, _DRY
    )


SUITES: dict[str, tuple[Part, ...]] = {
    "gpu": (
        _doctor(30),
        _tests(150),
        _timed(
            *("kernels", "every op", 80, "--device", "cuda", "--repeats", "15"),
            *("--shapes", "7b-n256", "qwen3-next", "--ops", *_OPS.split(), *_ROUTING_OPS.split()),
        ),
        _timed("layers", "whole layers, all rivals", 85, "--device", "cuda", "--repeats", "15"),
        _memory(35, "--device", "cuda", "--shapes", "24576,1536,256,128,8"),
        _checks("graphs", "captured graphs; a host that never waits", 40, "cuda", "graph", "sync"),
        _checks("rounding", "token rounding end to end", 30, "cuda", "rounding"),
    ),
    "cpu": (
        _doctor(90),
        _tests(120),
        _timed(
            *("kernels", "every op", 120, "--device", "cpu", "--quick", "--repeats", "3"),
            *("--ops", *_OPS.split(), *_ROUTING_OPS.split()),
        ),
        _timed(
            *("layers", "whole layers, all rivals", 120, "--device", "cpu", "--repeats", "5"),
            *("--shapes", "512,256,128,16,4"),
        ),
        _memory(60, "--device", "cpu", "--shapes", "512,256,128,16,4"),
        _checks("graphs", "captured graphs; a host that never waits", 60, "cpu", "graph", "sync"),
        _checks("rounding", "token rounding end to end", 60, "cpu", "rounding"),
    ),
}
"""The parts of each suite, in the order in which they run."""


def limited_parts(suite: str, limits: dict[str, float], only: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """The parts of a suite.

    Args:
        suite: a key of :data:`SUITES`.
        limits: part -> seconds, instead of its own.
        only: names of the parts that are wanted; none: all.

    Raises:
        ValueError: no such suite or part, or a limit that is no positive number.
    """
    where = "sonic bench"
    check_choice(where, "suite", suite, tuple(SUITES))
    names = tuple(part.name for part in SUITES[suite])
    for argument, given in (("limit", limits), ("only", only)):
        for name in given:
            check_choice(where, argument, name, names)
    for name, seconds in limits.items():
        if not 0 < seconds < float("inf"):
            raise argument_error(where, "limit", f"{name}={seconds:g}", "a positive, finite number of seconds")
    return tuple(
        Part(**{**vars(part), "limit": limits.get(part.name, part.limit)})
        for part in SUITES[suite]
        if not only or part.name in only
    )
