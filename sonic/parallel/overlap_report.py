"""What of the communication was hidden: when each collective was issued and done, and how long it was waited for.

    with OverlapReport() as report:
        loss = model(x).square().mean()
        loss.backward()
    print(report)
    report.save_timeline("overlap.png")

A collective's *duration* runs from its issue, or from the end of the one before it on the same link, to its completion;
its *exposed* time is what the program spent waiting for it; the rest was *hidden* under computation. On a GPU times are
taken with events on the streams, and read when the report is asked for, not before.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sonic.parallel.in_flight import Started, logging_to

__all__ = ["Collective", "HostTimer", "CudaTimer", "OverlapReport", "Timer"]


class Timer(Protocol):
    """Where the times of a report come from."""

    def now(self) -> Any:
        """This moment, on the lane where the program computes."""

    def completion(self, started: Started) -> Any:
        """The moment at which a collective that was issued just now is done; may be known only later."""

    def waiting(self, completion: Any) -> None:
        """The program waits for that moment."""

    def seconds(self, moment: Any) -> float | None:
        """A moment as seconds since some beginning; None: it never came to be known."""


class HostTimer:
    """The clock of the host: for CPUs. Completion is reported by the collective's future, from another thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            clock: seconds.
        """
        self._clock = clock

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def completion(self, started: Started) -> list[float]:
        """A list that will hold the moment, if its work has a future."""
        moment: list[float] = []
        get_future = getattr(started.work, "get_future", None)
        if get_future is not None:
            get_future().add_done_callback(lambda _: moment.append(self._clock()))
        return moment

    def waiting(self, completion: Any) -> None:
        """Nothing: time passes by itself."""
        pass

    def seconds(self, moment: Any) -> float | None:
        """The moment, if it is known."""
        if isinstance(moment, list):
            return moment[0] if moment else None
        return float(moment)


class CudaTimer:
    """Events on the streams of a GPU; a collective's completion is seen by a stream that does nothing else."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._watcher = torch.cuda.Stream(device)
        self._device = device
        self._first = self._event()

    def now(self) -> torch.cuda.Event:
        """An event on the current stream."""
        return self._event()

    def completion(self, started: Started) -> torch.cuda.Event:
        """An event on the stream that watches."""
        with torch.cuda.stream(self._watcher):
            if started.work is not None:
                started.work.wait()
            return self._event(self._watcher)

    def waiting(self, completion: Any) -> None:
        """Nothing: the streams wait."""
        pass

    def seconds(self, moment: Any) -> float | None:
        """Seconds since the timer was made; waits until the event has happened."""
        moment.synchronize()
        return self._first.elapsed_time(moment) / 1e3

    def _event(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self._device))
        return event


@dataclass(frozen=True)
class Collective:
    """One collective, in seconds since the report began.

    Attributes:
        kind: what was sent: ``"attention"``, ``"mlp"``, ``"dispatch"``, …
        op: how: ``"all_reduce"``, …
        phase: ``"forward"`` or ``"backward"``.
        num_bytes: of its larger side on this rank.
        issued, started, done: when it was issued, when the link was free for it, and when it was done.
        wait_began, wait_ended: when the program began to wait for it, and went on.
    """

    kind: str
    op: str
    phase: str
    num_bytes: int
    issued: float
    started: float
    done: float
    wait_began: float
    wait_ended: float

    @property
    def duration(self) -> float:
        """Seconds on the link."""
        return max(self.done - self.started, 0.0)

    @property
    def exposed(self) -> float:
        """Seconds for which the program stood still."""
        return max(self.wait_ended - self.wait_began, 0.0)

    @property
    def hidden(self) -> float:
        """Seconds on the link under computation."""
        return max(self.duration - self.exposed, 0.0)


@dataclass(eq=False)
class _Entry:
    kind: str
    op: str
    phase: str
    num_bytes: int
    issued: Any
    completion: Any
    wait_began: Any = None
    wait_ended: Any = None


class OverlapReport:
    """Listens to the collectives of whatever runs under it: use it as a context.

    A collective is heard if its forward ran under the report; backward may run there or later, but before the report is
    read.
    """

    def __init__(self, timer: Timer | None = None, *, overlap: bool = True) -> None:
        """
        Args:
            timer: None: :class:`CudaTimer` where there is a GPU that is in use, else :class:`HostTimer`.
            overlap: whether overlap is expected: then the end of the context warns if nothing overlapped.
        """
        if timer is None:
            timer = CudaTimer() if torch.cuda.is_available() and torch.cuda.is_initialized() else HostTimer()
        self.timer = timer
        self._expects_overlap = overlap
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()
        self._began: Any = None
        self._ended: Any = None
        self._context: Any = None
        self._read: list[Collective] | None = None

    def __enter__(self) -> OverlapReport:
        self._began = self.timer.now()
        self._context = logging_to(self)
        self._context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)
        self._ended = self.timer.now()
        if exception[0] is None and self._expects_overlap:
            self.warn_if_nothing_overlapped()

    # what in_flight tells

    def issued(self, kind: str, phase: str, started: Started) -> _Entry:
        """Hear of a collective: see :class:`sonic.parallel.in_flight.Log`."""
        num_bytes = started.tensor.nbytes if started.num_bytes is None else started.num_bytes
        issued = self.timer.now()
        entry = _Entry(kind, started.op, phase, num_bytes, issued, self.timer.completion(started))
        with self._lock:  # backward may run in threads of the devices
            self._entries.append(entry)
        return entry

    def waiting(self, entry: _Entry) -> None:
        """Hear that it is about to be waited for."""
        entry.wait_began = self.timer.now()
        self.timer.waiting(entry.completion)

    def waited(self, entry: _Entry, aside: bool = False) -> None:
        """Hear that the wait is over; ``aside``: it held up a side lane alone."""
        entry.wait_ended = self.timer.now()
        if aside:
            entry.wait_began = entry.wait_ended

    # what is read

    @property
    def collectives(self) -> list[Collective]:
        """All that were issued *and* awaited, in the order of issue."""
        if self._read is not None and len(self._read) == len(self._entries):
            return self._read
        if self._began is None:
            return []
        zero = self.timer.seconds(self._began) or 0.0
        read, link_free = [], 0.0
        for entry in self._entries:
            if entry.wait_ended is None:
                continue
            issued, began, ended = (
                (self.timer.seconds(moment) or 0.0) - zero
                for moment in (entry.issued, entry.wait_began, entry.wait_ended)
            )
            known = self.timer.seconds(entry.completion)
            done = ended if known is None else min(known - zero, ended)
            started = min(max(issued, link_free), done)
            link_free = max(link_free, done)
            read.append(
                Collective(entry.kind, entry.op, entry.phase, entry.num_bytes, issued, started, done, began, ended)
            )
        self._read = read
        return read

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning of the context to its end, or to now."""
        end = self.timer.now() if self._ended is None else self._ended
        return (self.timer.seconds(end) or 0.0) - (self.timer.seconds(self._began) or 0.0)

    def total(self, what: str, phase: str | None = None) -> float:
        """Sum over the collectives, in seconds.

        Args:
            what: ``"duration"``, ``"hidden"`` or ``"exposed"``.
            phase: ``"forward"``, ``"backward"``, or None for both.
        """
        return sum(getattr(one, what) for one in self.collectives if phase in (None, one.phase))

    @property
    def hidden_share(self) -> float:
        """Share of the time on the link that was hidden, from 0 to 1; 0 if nothing was sent."""
        duration = self.total("duration")
        return self.total("hidden") / duration if duration > 0 else 0.0

    def warn_if_nothing_overlapped(self, threshold: float = 0.02) -> bool:
        """Warn where there were collectives and less than ``threshold`` of their time was hidden; at most once.

        Returns:
            whether there was reason to.
        """
        is_in_vain = bool(self.collectives) and self.hidden_share < threshold
        if is_in_vain and self._expects_overlap:
            self._expects_overlap = False
            warnings.warn(
                f"sonic.parallel: overlap is on, but {self.total('exposed') * 1e3:.3g} ms of "
                f"{self.total('duration') * 1e3:.3g} ms of communication were waited for: the wiring leaves nothing to "
                "compute meanwhile (standard layers), or something waits early (a compiler, a hook, one communicator "
                "for everything)",
                stacklevel=3,
            )
        return is_in_vain

    def rows(self) -> list[dict[str, Any]]:
        """One dict per phase, kind and op, in the order of first issue: calls, bytes, seconds on the link, hidden,
        exposed.
        """
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for one in self.collectives:
            row = rows.setdefault(
                (one.phase, one.kind, one.op),
                {"phase": one.phase, "kind": one.kind, "op": one.op, "calls": 0, "bytes": 0}
                | dict.fromkeys(("duration", "hidden", "exposed"), 0.0),
            )
            row["calls"] += 1
            row["bytes"] += one.num_bytes
            for what in ("duration", "hidden", "exposed"):
                row[what] += getattr(one, what)
        return list(rows.values())

    def __str__(self) -> str:
        """The table as plain text."""
        header = ("phase", "what", "op", "calls", "MiB", "on the link ms", "hidden ms", "exposed ms", "hidden")
        lines = [header, *self._cells()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _cells(self) -> list[tuple[str, ...]]:
        rows = self.rows()
        totals = {what: sum(row[what] for row in rows) for what in ("calls", "bytes", "duration", "hidden", "exposed")}
        return [
            (
                row["phase"],
                row["kind"],
                row["op"],
                str(row["calls"]),
                f"{row['bytes'] / 2**20:.2f}",
                *(f"{row[what] * 1e3:.3f}" for what in ("duration", "hidden", "exposed")),
                f"{row['hidden'] / row['duration']:.0%}" if row["duration"] else "-",
            )
            for row in [*rows, {"phase": "all", "kind": "", "op": ""} | totals]
        ]

    def print(self) -> None:
        """Print the table, in colour if ``rich`` is installed."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            sys.stdout.write(f"{self}\n")
            return
        table = Table(title="communication")
        for name in ("phase", "what", "op"):
            table.add_column(name, no_wrap=True)
        for name in ("calls", "MiB", "on the link ms", "hidden ms", "exposed ms", "hidden"):
            table.add_column(name, justify="right")
        for cells in self._cells():
            table.add_row(*cells, style="bold" if cells[0] == "all" else None)
        console = Console()
        if not console.is_terminal:  # a file or a pipe has no width to fit into
            console.width = max(console.width, 120)
        console.print(table)

    def save_timeline(self, path: str) -> None:
        """Draw the collectives over time: what was hidden, what was exposed, and the phase. Needs ``matplotlib``.

        Args:
            path: of the picture; its ending says the format.

        Raises:
            RuntimeError: there is nothing to draw.
        """
        from sonic.parallel.timeline import draw_timeline

        if not self.collectives:
            raise RuntimeError(
                "sonic.parallel.OverlapReport.save_timeline: no collective was heard of, nothing to draw"
            )
        draw_timeline(self.collectives, self.elapsed, path)
