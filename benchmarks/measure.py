"""How the benchmarks measure: interleaved timing, bytes kept for backward, bytes allocated, errors, the machine.

Everything here works on any torch code and knows nothing of Mixture-of-Experts.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Allocations",
    "Interleaved",
    "Laps",
    "SavedBytes",
    "SavedTensor",
    "Spread",
    "allocations",
    "allocations_on_gpu",
    "cpu_name",
    "gpu_line",
    "interleaved",
    "interleaved_on_gpu",
    "machine_line",
    "machine_report",
    "ratio",
    "relative_error",
    "saved_bytes",
    "slug",
    "spread",
    "worst_row_error",
]

Laps = dict[str, list["float | None"]]
"""Seconds by lap name, one entry per round; None where a contender sat that round out."""


@dataclass(frozen=True)
class Interleaved:
    """Laps by contender, number of timed rounds and steps, and how many of the steps other processes disturbed."""

    laps: dict[str, Laps]
    rounds: int
    steps: int
    disturbed: int


# --------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Spread:
    """Median of some samples, with the 20th and 80th percentile and their number; of the unit of the samples."""

    median: float
    p20: float
    p80: float
    count: int


def spread(samples: Iterable[float | None]) -> Spread:
    """Summarise samples; None entries are left out.

    Raises:
        ValueError: there is no sample.
    """
    values = sorted(sample for sample in samples if sample is not None)
    if not values:
        raise ValueError("benchmarks.measure.spread: samples is empty, expected at least one number")
    return Spread(statistics.median(values), _quantile(values, 0.2), _quantile(values, 0.8), len(values))


def ratio(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> Spread:
    """Spread of the ratio round by round: what slows a whole round (a busy machine, a changed clock) cancels out.

    Raises:
        ValueError: the two have no round in common.
    """
    pairs = zip(numerator, denominator, strict=True)
    return spread(above / below for above, below in pairs if above is not None and below is not None)


def interleaved(
    contenders: Mapping[str, Callable[[], Mapping[str, float]]],
    *,
    rounds: int | None = None,
    seconds: float = 30.0,
    warmup: int = 1,
    slow_factor: float = 2.0,
    max_rounds: int = 25,
    retries: int = 3,
) -> Interleaved:
    """Time contenders side by side, one step of each per round (A B C, then C B A, …): all see the same machine.

    A step during which another process took the cores (more than 3% of its time was lost) is done again, up to
    ``retries`` times and as long as that takes no longer than the undisturbed steps; the least disturbed attempt
    counts.

    Args:
        contenders: by name, a function that does one step and returns its seconds by lap name.
        rounds: timed rounds; None chooses as many as fit in ``seconds``, at least 5 and at most ``max_rounds``.
        seconds: time to fill when ``rounds`` is None.
        warmup: rounds before that are not counted, at least 1 (the last one tells how slow each contender is).
        slow_factor: a contender this many times slower than the fastest is timed only every second round, one twice as
            slow as that every fourth.
        max_rounds: upper bound of the automatic choice.
        retries: how often a disturbed step is repeated; 0 takes every step as it comes.

    Returns:
        The laps of all contenders and how many of their steps stayed disturbed. Garbage is collected between rounds,
        never within a step.

    Raises:
        ValueError: ``rounds`` or ``warmup`` is below 1.
    """
    for name, value in (("rounds", 1 if rounds is None else rounds), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"benchmarks.measure.interleaved: {name} is {value}, expected at least 1")
    pace: dict[str, float] = {}
    laps: dict[str, Laps] = {name: {} for name in contenders}
    steps = disturbed = 0
    patience = 0.0  # seconds that may still go into repeating steps
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(warmup):
            for name, step in contenders.items():
                took, _, pace[name] = _attempt(step)
                laps[name] = {lap: [] for lap in took}
        fastest = min(pace.values())
        every = {
            name: 1 if p < slow_factor * fastest else 2 if p < 2 * slow_factor * fastest else 4
            for name, p in pace.items()
        }
        if rounds is None:
            round_seconds = sum(p / every[name] for name, p in pace.items())
            rounds = max(5, min(max_rounds, round(seconds / max(round_seconds, 1e-9))))
        for index in range(rounds):
            gc.collect()
            order = list(contenders) if index % 2 == 0 else list(contenders)[::-1]
            for name in order:
                best: Mapping[str, float] = {}
                if index % every[name] == 0:
                    best, lost, elapsed = _attempt(contenders[name])
                    patience += elapsed
                    for _ in range(retries):
                        if lost <= _DISTURBED or patience <= 0:
                            break
                        again, lost_again, elapsed = _attempt(contenders[name])
                        patience -= elapsed
                        if lost_again < lost:
                            best, lost = again, lost_again
                    steps += 1
                    disturbed += lost > _DISTURBED
                for lap, values in laps[name].items():
                    values.append(best.get(lap))
    finally:
        if gc_was_on:
            gc.enable()
    return Interleaved(laps, rounds, steps, disturbed)


def interleaved_on_gpu(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device, flush_bytes: int, warmup: int = 3
) -> Interleaved:
    """Time calls on a GPU by its events, one of each contender per round (A B C, then C B A, …), from a cold L2.

    Before each call a scratch buffer is written ``_FLUSHES`` times. That empties L2, and keeps the GPU busy while the
    host queues what the call launches: where a call does not wait for the GPU, its time is that of the GPU alone.

    Args:
        contenders: by name, a function that queues its work on the current stream; its result is dropped.
        rounds: timed rounds.
        device: the GPU.
        flush_bytes: size of the scratch buffer, at least that of L2.
        warmup: rounds before that are not counted.

    Returns:
        Laps of one name, ``"seconds"``.

    Raises:
        ValueError: ``rounds`` or ``warmup`` is below 1.
    """
    for name, value in (("rounds", rounds), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"benchmarks.measure.interleaved_on_gpu: {name} is {value}, expected at least 1")
    scratch = torch.empty(flush_bytes, dtype=torch.int8, device=device)
    laps: dict[str, Laps] = {name: {"seconds": []} for name in contenders}
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            order = list(contenders) if index % 2 == 0 else list(contenders)[::-1]
            events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
            for name in order:
                for _ in range(_FLUSHES):
                    scratch.zero_()
                start, end = events[name]
                start.record()
                contenders[name]()
                end.record()
            torch.cuda.synchronize(device)
            if index >= warmup:
                for name, (start, end) in events.items():
                    laps[name]["seconds"].append(start.elapsed_time(end) / 1e3)
    finally:
        if gc_was_on:
            gc.enable()
    return Interleaved(laps, rounds, rounds * len(contenders), 0)


_FLUSHES = 4
_DISTURBED = 0.03


def _attempt(step: Callable[[], Mapping[str, float]]) -> tuple[Mapping[str, float], float, float]:
    """Do one step: its laps, the share of its time that was lost to other processes, and its seconds."""
    waited, cpu, start = _waiting_seconds(), time.thread_time(), time.perf_counter()
    laps = step()
    elapsed = max(time.perf_counter() - start, 1e-9)
    lost = max(_waiting_seconds() - waited, elapsed - (time.thread_time() - cpu))
    return laps, lost / elapsed, elapsed


def _waiting_seconds() -> float:
    """Time that the threads of this process have waited for a core so far, summed; 0 where the system does not tell.

    The calling thread works or spins during a step, so wall time beyond its CPU time is lost as well: it was preempted,
    or waited for a thread that was.
    """
    total = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(thread.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread just ended, or the kernel keeps no such numbers
            continue
    return total / 1e9


# -------------------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class SavedTensor:
    """A storage that autograd keeps: shape and dtype of the saved tensor, bytes of the whole storage it keeps alive."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class SavedBytes:
    """What a forward pass keeps for its backward: total bytes, and each storage once, largest first."""

    total: int
    tensors: tuple[SavedTensor, ...]


def saved_bytes(fn: Callable[[], Any], *, exclude: Iterable[Tensor] = ()) -> SavedBytes:
    """Run ``fn`` (a forward pass) and count what autograd saves for backward.

    Each storage counts once and whole, however many views of it are saved: that is the memory that cannot be freed.
    Inputs that are saved count too; pass the parameters in ``exclude``, they are there anyway. What a
    ``torch.autograd.Function`` hides in attributes of its ``ctx`` is not seen here, but :func:`allocations` sees it
    (``held``).

    Args:
        fn: the forward pass; its result is kept until everything is counted.
        exclude: tensors whose storages do not count.
    """
    skip = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: dict[int, tuple[torch.UntypedStorage, SavedTensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() and address not in skip and address not in kept:
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            kept[address] = (
                storage,
                SavedTensor(shape, dtype, storage.nbytes()),
            )  # holding the storage keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    tensors = tuple(sorted((saved for _, saved in kept.values()), key=lambda saved: -saved.bytes))
    del result
    return SavedBytes(sum(saved.bytes for saved in tensors), tensors)


@dataclass(frozen=True)
class Allocations:
    """Bytes from torch's CPU allocator since a call began: at the highest moment, and still held at its end."""

    peak: int
    held: int


def allocations(fn: Callable[[], Any]) -> Allocations:
    """Run ``fn`` and follow every allocation of torch on the CPU with the profiler, inside operators as well.

    Args:
        fn: what to run; its result is alive when ``held`` is taken. Memory that was there before does not count, nor
            does its release.
    """
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = fn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del result
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return Allocations(peak, now)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code prints to the error stream: the profiler announces each start and stop there."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


# ------------------------------------------------------------------------------------------------------------- errors


def allocations_on_gpu(fn: Callable[[], Any], device: torch.device) -> Allocations:
    """The same of torch's allocator on a GPU, which hands memory out in units of 512 bytes.

    Args:
        fn: what to run; its result is alive when ``held`` is taken. Run it once before, so that libraries have their
            workspaces: these would count.
        device: the GPU.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn()
    torch.cuda.synchronize(device)
    seen = Allocations(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    del result
    return seen


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference, in float64; 0 if both are zero, NaN if ``value`` has one."""
    value, reference = value.detach().double(), reference.detach().double()
    norm = reference.norm().item()
    difference = (value - reference).norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def worst_row_error(value: Tensor, reference: Tensor) -> float:
    """Largest norm of a row of the difference over the root mean square row norm: one wrong row of thousands shows."""
    width = reference.shape[-1]
    value, reference = value.detach().double().reshape(-1, width), reference.detach().double().reshape(-1, width)
    scale = reference.norm(dim=1).square().mean().sqrt().item()
    worst = (value - reference).norm(dim=1).max().item()
    return worst / scale if scale else (0.0 if worst == 0 else float("inf"))


# ------------------------------------------------------------------------------------------------------------ machine


def gpu_line(device: torch.device) -> str:
    """One line on a GPU: name, architecture, memory."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def cpu_name() -> str:
    """Name of the processor as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE))
        if "model name" in fields:
            name = re.sub(r"\((R|TM)\)", "", fields["model name"]).strip()
            return (
                f"{name} (family {fields['cpu family']} model {fields['model']})"
                if {"cpu family", "model"} <= fields.keys()
                else name
            )
    return platform.processor() or platform.machine()


def machine_report() -> dict[str, Any]:
    """What a figure depends on: processor, its 16-bit instructions, cores, threads, load before, versions and date."""
    features = {
        "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None),
        "amx": getattr(torch.cpu, "_is_amx_tile_supported", None),
    }
    return {
        "cpu": cpu_name(),
        "features": [
            torch.backends.cpu.get_cpu_capability(),
            *(name for name, has in features.items() if has is not None and has()),
        ],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def machine_line(report: Mapping[str, Any]) -> str:
    """One line of :func:`machine_report`."""
    return (
        f"{report['cpu']}, {'+'.join(report['features'])}, {report['cores']} cores, {report['threads']} threads, "
        f"load {report['load']}, torch {report['torch']}, Python {report['python']}, {report['date']}"
    )


def slug(text: str) -> str:
    """``text`` as part of a file name: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted ``values``."""
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
