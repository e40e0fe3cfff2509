"""Breaks a kernel on purpose: neutralises one synchronisation instruction of its PTX at a time and runs what is left.

A simulator is worth what it notices. Each mutant runs under several schedules until one of them notices: the result is
wrong, or the simulator raises or warns of what it did not warn of before. A mutant that no schedule notices was missed;
`redundant` and `not_modelled` tell which of those cannot change a result, on any machine or in the simulated one.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic.simulator import engine, host, tensors, translate
from sonic.simulator.errors import SimulatorError
from sonic.simulator.kernel_launch import LaunchConfig, Region
from sonic.simulator.options import Options
from sonic.simulator.ptx import parse

NUM_SEEDS = 5
SCHEDULES = (Options("eager"), Options("lazy"), *(Options("random", seed) for seed in range(NUM_SEEDS)))


# ---------------------------------------------------------------- a launch that can be repeated


@dataclass
class Launch:
    """A launch of a compiled function, kept so that its PTX can be run again, also changed.

    Attributes:
        ptx: text of the module.
        entry: name of the kernel.
        config: shape of the launch.
        params: bytes of each parameter; tensor maps and pointers among them point into ``kept``.
        regions: memory that the kernel may touch.
        before: (tensor, its content before the launch) for what kernels write.
        results: (tensor, what it must hold afterwards).
        kept: keeps memory alive.
    """

    ptx: str
    entry: str
    config: LaunchConfig
    params: list[bytes]
    regions: list[Region]
    before: list[tuple[Tensor, Tensor]]
    results: list[tuple[Tensor, Tensor]]
    kept: Any = None

    def run(self, options: Options, ptx: str | None = None) -> engine.Trace:
        """Run it once more, on tensors as they were before the first time."""
        for tensor, content in self.before:
            tensor.copy_(content)
        buffers = [ctypes.create_string_buffer(param, len(param)) for param in self.params]
        addresses = [ctypes.addressof(buffer) for buffer in buffers]
        return engine.run(ptx or self.ptx, self.entry, self.config, addresses, self.regions, options)

    def is_right(self) -> bool:
        """Whether the results are exactly what they must be."""
        return all(torch.equal(tensor, expected) for tensor, expected in self.results)


def record(
    call: Callable[[], object],
    results: Sequence[tuple[Tensor, Tensor]],
    *,
    written: Sequence[Tensor] = (),
    num_sms: int = 4,
    kept: Any = None,
) -> Launch:
    """Call a function that launches one kernel, and keep the launch instead of running it.

    Args:
        call: compiles and launches.
        results: (tensor that the kernel writes, what it must hold then).
        written: other tensors that it writes.
        num_sms: see `sonic.simulator.hopper`.
        kept: what has to stay alive: every tensor that the kernel touches.
    """
    found: list[Launch] = []

    def keep(
        ptx: str, entry: str, config: LaunchConfig, params: list[int], regions: Sequence[Region], _: Any
    ) -> engine.Trace:
        declared = parse(ptx, entry).params
        content = [ctypes.string_at(at, param.num_bytes) for at, param in zip(params, declared, strict=True)]
        found.append(Launch(ptx, entry, config, content, list(regions), [], list(results), (kept, call)))
        return engine.Trace(entry)

    before = [(tensor, tensor.clone()) for tensor in (*(tensor for tensor, _ in results), *written)]
    with host.simulate(keep, Options(), num_sms=num_sms, line_info=False):
        call()
    if len(found) != 1:
        raise ValueError(f"{len(found)} launches, expected one")
    (launch,) = found
    alive = {(region.address, region.num_bytes) for region in tensors.regions()}
    launch.regions = [region for region in launch.regions if (region.address, region.num_bytes) in alive]
    launch.before = before
    return launch


# ---------------------------------------------------------------- mutations


@dataclass(frozen=True)
class Mutation:
    """One instruction neutralised.

    Attributes:
        line: in the PTX, from 1.
        text: the instruction.
        kind: ``peek`` (a test that does not block), ``wait``, ``arrive``, ``bytes`` (an arrival that no longer expects
            bytes), ``init``, ``fence``, ``group`` (commits and waits of groups), ``barrier`` or ``elect``.
        instead: what stands in its place.
        before: some instructions in front of it.
        after: the instructions that follow.
        ptx: the whole text with it.
    """

    line: int
    text: str
    kind: str
    instead: str
    before: str
    after: str
    ptx: str


_INSTRUCTION = re.compile(r"^\s*(?:@!?[%\w]+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>[^;]*);")
_BLOCKING = re.compile(r"bra(\.uni)?\s+LAB_WAIT")

_NOTHING = ""
_KINDS: tuple[tuple[str, str], ...] = (
    (r"mbarrier\.init\b", "init"),
    (r"mbarrier\.arrive", "arrive"),
    (r"mbarrier\.expect_tx", "arrive"),
    (r"mbarrier\.(try|test)_wait", "wait"),
    (r"(bar|barrier)(\.cta)?\.(sync|arrive)", "barrier"),
    (r"bar\.warp\.sync", "barrier"),
    (r"barrier\.cluster\.", "barrier"),
    (r"(fence|membar)\b", "fence"),
    (r"cp\.async\.mbarrier\.arrive", "arrive"),
    (r"cp\.async\.(bulk\.)?(commit_group|wait_group|wait_all)", "group"),
    (r"wgmma\.fence", "fence"),
    (r"wgmma\.(commit|wait)_group", "group"),
    (r"elect\.sync", "elect"),
)


def mutations(ptx: str) -> list[Mutation]:
    """Every way to neutralise one synchronisation instruction of a module."""
    lines = ptx.splitlines()
    found = []
    for index, line in enumerate(lines):
        made = _INSTRUCTION.match(line.split("//")[0])
        kind = made and next((kind for pattern, kind in _KINDS if re.match(pattern, made["opcode"])), None)
        if not made or not kind:
            continue
        if kind == "wait" and not _blocks(lines[index + 1 : index + 8]):
            kind = "peek"
        for name, instead in _changes(kind, made["opcode"], made["operands"]):
            text = "\n".join([*lines[:index], instead, *lines[index + 1 :]]) + "\n"
            around = ("\n".join(lines[max(0, index - 4) : index]), "\n".join(lines[index + 1 :]))
            found.append(Mutation(index + 1, " ".join(line.split()), name, instead, *around, text))
    return found


def _blocks(following: Sequence[str]) -> bool:
    """Whether a wait is tried again until it succeeds: its second instruction behind it jumps back."""
    instructions = [line for line in following if not line.strip().startswith((".loc", "//"))]
    return any(_BLOCKING.search(line) for line in instructions[:2])


def _changes(kind: str, opcode: str, operands: str) -> list[tuple[str, str]]:
    """(kind, what stands instead) for one instruction; a guard in front of it is dropped."""
    first = operands.split(",")[0].strip()
    if kind in ("wait", "peek"):
        return [(kind, f"setp.eq.b32 {first}, 0, 0;")]
    if kind == "elect":  # all lanes believe to be the one
        leader, _, predicate = first.partition("|")
        number = f"mov.b32 {leader}, 0; " if leader != "_" else ""
        return [(kind, f"{number}setp.eq.b32 {predicate}, 0, 0;")]
    if kind == "arrive" and ".expect_tx" in opcode and "arrive" in opcode:
        place = re.sub(r",[^,]*$", "", operands)  # without the number of bytes
        return [(kind, _NOTHING), ("bytes", f"{opcode.replace('.expect_tx', '')} {place};")]
    return [(kind, _NOTHING)]


def sample(found: Sequence[Mutation], count: int) -> list[Mutation]:
    """Some of many: the kinds in turn, spread over the kernel."""
    by_kind: dict[str, list[Mutation]] = {}
    for mutation in found:
        by_kind.setdefault(mutation.kind, []).append(mutation)
    taken: list[Mutation] = []
    while len(taken) < min(count, len(found)):
        for kind in by_kind.values():
            if kind:
                taken.append(kind.pop(len(kind) // 2))
    return sorted(taken[:count], key=lambda mutation: mutation.line)


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        mutation: what was changed.
        caught: by what: ``wrong result``, ``warning``, the name of an error, or None.
        schedule: under which it was caught.
        told: the first line of the error, or the warning.
    """

    mutation: Mutation
    caught: str | None
    schedule: str = ""
    told: str = ""


@dataclass(frozen=True)
class Normal:
    """What a kernel does as it is, under all schedules: most warp instructions, and warnings."""

    instructions: int
    warnings: frozenset[str]


def normal(launch: Launch, schedules: Iterable[Options] = SCHEDULES) -> Normal:
    """Run the kernel as it is, and check it."""
    traces = []
    for options in schedules:
        traces.append(launch.run(options))
        if not launch.is_right():
            raise AssertionError(f"the kernel itself is wrong under {options}")
    warnings = frozenset(text for trace in traces for text in trace.warnings)
    return Normal(max(trace.instructions for trace in traces), warnings)


def judge(
    launches: Sequence[tuple[Launch, Normal]], mutation: Mutation, schedules: Iterable[Options] = SCHEDULES
) -> Verdict:
    """Run a mutant until a schedule notices.

    Args:
        launches: of the same kernel, of different sizes: what is needed for one may go without saying for another.
        mutation: the change.
        schedules: in this order.
    """
    try:
        for options in schedules:
            name = options.schedule + (f" {options.seed}" if options.schedule == "random" else "")
            for launch, usual in launches:
                budgeted = replace(options, step_budget=4 * usual.instructions + 20_000)
                try:
                    trace = launch.run(budgeted, mutation.ptx)
                except SimulatorError as error:
                    return Verdict(mutation, type(error).__name__, name, str(error).splitlines()[0])
                if not launch.is_right():
                    return Verdict(mutation, "wrong result", name)
                new = [text for text in trace.warnings if text not in usual.warnings]
                if new:
                    return Verdict(mutation, "warning", name, new[0])
    finally:
        translate._PROGRAMS.clear()  # every mutant is another program
    return Verdict(mutation, None)


Known = Mapping[tuple[str, int], str]
"""(start of an instruction, how many of these are in front of it) -> why a kernel does not need it."""


def redundant(mutation: Mutation, known: Known | None = None) -> str | None:
    """Why a mutant changes no result on any machine, or None."""
    for (start, number), reason in (known or {}).items():
        ahead = [line for line in mutation.ptx.splitlines()[: mutation.line - 1] if line.split()[:1] == [start]]
        if mutation.text.startswith(start) and len(ahead) == number:
            return reason
    if mutation.kind == "wait" and _is_implied(mutation.after):
        return "the last wait in the row implies it: slots of a ring are freed in order"
    return None


def not_modelled(mutation: Mutation) -> str | None:
    """Why a mutant changes no result in the machine that is simulated, though it may on a GPU, or None."""
    text, kind = mutation.text, mutation.kind
    if "bar.warp.sync" in text:
        return "lanes run in lockstep, and here none of them arrives at a barrier for what the others did"
    if kind == "fence" and "proxy" in text and re.search(r"\bld\.shared", mutation.before):
        return "orders reads before writes of the other proxy, and a read is over at once"
    return None


_ACTS = re.compile(r"\b(ld|st|atom|red|cp|wgmma|mbarrier\.arrive|bar|barrier|fence|ret|exit)\b[.\s;]")


def _is_implied(after: str) -> bool:
    """Whether a blocking wait for another barrier follows, and nothing that acts on memory in between."""
    following = re.search(r"mbarrier\.try_wait", after)
    if following is None or not _blocks(after[following.start() :].splitlines()[1:8]):
        return False
    between = after[: following.start()].split("DONE:", 2)[-1]
    return not _ACTS.search(between) and "bra" not in between


def table(verdicts: Sequence[Verdict], known: Known | None = None) -> str:
    """One line for each mutant."""
    rows = [("line", "kind", "verdict", "schedule", "instruction")]
    for verdict in verdicts:
        mutation = verdict.mutation
        rows.append((str(mutation.line), mutation.kind, verdict.caught or "MISSED", verdict.schedule, mutation.text))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(row[n].ljust(width) for n, width in enumerate(widths)), row[4]]) for row in rows]
    for mutation in (verdict.mutation for verdict in verdicts if not verdict.caught):
        reason = redundant(mutation, known)
        if reason is None:
            limit = not_modelled(mutation)
            reason = f"not modelled: {limit}" if limit else "NO REASON KNOWN"
        lines.append(f"missed: line {mutation.line}, {mutation.text}: {reason}")
    caught, here, anywhere = score(verdicts, known)
    lines.append(
        f"{len(verdicts)} mutants, {caught} caught: of {here} that can change a result in the simulated machine, "
        f"of {anywhere} that can on a GPU"
    )
    return "\n".join(lines)


def score(verdicts: Sequence[Verdict], known: Known | None = None) -> tuple[int, int, int]:
    """How many were caught, how many can change a result in the simulated machine, how many can on a GPU."""
    caught = sum(verdict.caught is not None for verdict in verdicts)
    missed = [verdict.mutation for verdict in verdicts if verdict.caught is None]
    anywhere = [mutation for mutation in missed if redundant(mutation, known) is None]
    here = [mutation for mutation in anywhere if not_modelled(mutation) is None]
    return caught, caught + len(here), caught + len(anywhere)
