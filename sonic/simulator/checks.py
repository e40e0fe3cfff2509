"""Races in shared memory, found from two records.

Marks: a 16-byte granule is marked from the issue of an asynchronous access until the program can know that it is over:
a bulk load until its barrier's phase completes, a bulk store and an operand of wgmma until a wait for its group. An
ordinary write is marked until a proxy fence, since the asynchronous proxy need not see it before. So
is an ordinary read, until any warp's proxy fence; an asynchronous copy over it before that gives a warning.

Clocks: each warp knows how far others have come. A clock has one component for each warp (its releases), barrier (its
phases), warpgroup (its products), and for a warp's bulk stores and cp.async (their groups); arrivals hand the clock of
the warp to a barrier, waits take it from there. Each word remembers who wrote it last and who has read it since; an
access that does not know of them all is a race, whatever order things happened to run in. Neither record depends on
values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import RaceFault

Granules = Any  # an index array or a slice
Clock = np.ndarray


class Clocks:
    """Components of the clocks of a cluster, by what they count."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.numbers: dict[Any, int] = {}
        self.names: list[str] = []
        self.all: list[Clock] = []
        self.capacity = 256

    def component(self, key: Any, name: str) -> int:
        """Number of a component."""
        found = self.numbers.get(key)
        if found is None:
            found = self.numbers[key] = len(self.names)
            self.names.append(name)
            if found == self.capacity:
                self.capacity *= 2
                for clock in self.all:
                    clock.resize(self.capacity, refcheck=False)
        return found

    def new(self) -> Clock:
        """A clock that knows of nothing."""
        clock = np.zeros(self.capacity, np.int32)
        self.all.append(clock)
        return clock


def learn(clock: Clock, other: Clock) -> None:
    """Know also what another clock knows."""
    if len(other) < len(clock):  # a copy made before there were as many components
        clock = clock[: len(other)]
    np.maximum(clock, other, out=clock)


class Mark:
    """An asynchronous access that may still be going on."""

    __slots__ = ("checker", "granules", "counter", "what", "is_open")

    def __init__(self, checker: Checker, granules: Granules, counter: np.ndarray, what: str) -> None:
        self.checker = checker
        self.granules = granules
        self.counter = counter
        self.what = what
        self.is_open = True
        counter[granules] += 1
        checker.in_flight += 1

    def close(self) -> None:
        """The program knows that the access is over."""
        if self.is_open:
            self.is_open = False
            self.counter[self.granules] -= 1
            self.checker.in_flight -= 1


class Checker:
    """The shadow of one block's shared memory."""

    def __init__(self, num_bytes: int, clocks: Clocks) -> None:
        count = num_bytes // 16 + 65
        self.reading = np.zeros(count, np.int16)
        self.writing = np.zeros(count, np.int16)
        # 0 clean, 1 written by an ordinary store and not fenced, 2 by cp.async
        self.unfenced = np.zeros(count, np.int8)
        self.unfenced_list: list[Granules] = []
        # Number of proxy fences so far, and for each granule what that was at the last ordinary read.
        self.fences = 1
        self.last_read = np.zeros(count, np.int32)
        self.in_flight = 0
        self.clocks = clocks
        # For each word: component and value that the last write has in clocks; for each reader, of its last read.
        self.writer = np.zeros(count * 4, np.int32)
        self.written = np.zeros(count * 4, np.int32)
        self.read = np.zeros((0, count * 4), np.int32)
        self.rows: dict[int, int] = {}
        self.readers = np.zeros(0, np.int64)

    # -------------------------------------------------------------- marks

    def open_read(self, granules: Granules, what: str) -> Mark:
        """An asynchronous read begins."""
        return Mark(self, granules, self.reading, what)

    def open_write(self, granules: Granules, what: str) -> Mark:
        """An asynchronous write begins."""
        return Mark(self, granules, self.writing, what)

    @staticmethod
    def first_bad(flags: np.ndarray, granules: Granules) -> int:
        """Number of the first place for which a flag is set."""
        numbers = np.arange(granules.start, granules.stop) if isinstance(granules, slice) else np.asarray(granules)
        return int(numbers.reshape(-1)[np.flatnonzero(flags.reshape(-1))[0]])

    def fence(self, w: Any) -> None:
        """Ordinary accesses so far come before what the asynchronous proxy does afterwards."""
        self.fences += 1
        for granules in self.unfenced_list:
            self.unfenced[granules] = 0
        self.unfenced_list.clear()

    def generic_read(self, w: Any, pc: int, granules: Granules, words: Granules) -> None:
        """An ordinary read."""
        if self.in_flight:
            bad = self.writing[granules] > 0
            if bad.any():
                offset = 16 * self.first_bad(bad, granules)
                raise w.fault(
                    RaceFault, pc, f"reads shared offset {offset}, into which an asynchronous copy is still writing"
                )
        self.last_read[granules] = self.fences
        if self.clocks.is_on:
            self.order_read(w, pc, words, "a load")
            self.note_read(w.accessor, w.clock.item(w.accessor), words)

    def generic_write(self, w: Any, pc: int, granules: Granules, words: Granules | None) -> None:
        """An ordinary write; ``words`` is None for accesses that need no order, such as atomics."""
        if self.in_flight:
            bad = (self.writing[granules] > 0) | (self.reading[granules] > 0)
            if bad.any():
                offset = 16 * self.first_bad(bad, granules)
                raise w.fault(
                    RaceFault, pc, f"writes shared offset {offset}, which an asynchronous copy or wgmma is still using"
                )
        self.unfenced[granules] = 1
        self.unfenced_list.append(granules)
        if words is not None and self.clocks.is_on:
            self.order_write(w, pc, words, "a store")
            self.note_write(w.accessor, w.clock.item(w.accessor), words)

    def copied_by_threads(self, granules: Granules) -> None:
        """cp.async has been performed for these granules: they are written by the ordinary proxy."""
        self.unfenced[granules] = 2
        self.unfenced_list.append(granules)

    def async_read(self, w: Any, pc: int, granules: Granules, what: str, words: Granules | None = None) -> None:
        """An asynchronous read is about to be issued."""
        if self.in_flight:
            bad = self.writing[granules] > 0
            if bad.any():
                offset = 16 * self.first_bad(bad, granules)
                raise w.fault(RaceFault, pc, f"{what} reads shared offset {offset}, into which a copy is still writing")
        state = self.unfenced[granules]
        if state.any():
            if (state == 1).any():
                offset = 16 * self.first_bad(state == 1, granules)
                raise w.fault(
                    RaceFault,
                    pc,
                    f"{what} reads shared offset {offset}, stored to without fence.proxy.async since",
                )
            w.engine.trace.warn(
                f"{what} reads what cp.async wrote without fence.proxy.async in between "
                f"({w.engine.program.kernel.instructions[pc].where()})"
            )
        if self.clocks.is_on:
            self.order_read(w, pc, words_of(granules) if words is None else words, what)

    def async_write(self, w: Any, pc: int, granules: Granules, what: str, words: Granules | None = None) -> None:
        """An asynchronous write is about to be issued; ``words`` if it does not fill whole granules."""
        if self.in_flight:
            bad = self.reading[granules] > 0
            if words is None:
                bad |= self.writing[granules] > 0
            if bad.any():
                offset = 16 * self.first_bad(bad, granules)
                raise w.fault(
                    RaceFault, pc, f"{what} writes shared offset {offset}, which another access is still using"
                )
        if what != "cp.async" and (self.last_read[granules] == self.fences).any():
            w.engine.trace.warn(
                f"{what} overwrites what ordinary loads read, without fence.proxy.async in between "
                f"({w.engine.program.kernel.instructions[pc].where()})"
            )
        if self.clocks.is_on:
            self.order_write(w, pc, words_of(granules) if words is None else words, what)

    # -------------------------------------------------------------- clocks

    def order_read(self, w: Any, pc: int, words: Granules, what: str, verb: str = "reads") -> None:
        """The last write must be known to the reader."""
        writer = self.writer[words]
        bad = w.clock[writer] < self.written[words]
        if bad.any():
            word = self.first_bad(bad, words)
            who = self.clocks.names[int(self.writer[word])]
            raise w.fault(
                RaceFault,
                pc,
                f"{what} {verb} shared offset {4 * word}, written by {who}: nothing that this warp waited for orders "
                "it behind that write",
            )

    def order_write(self, w: Any, pc: int, words: Granules, what: str) -> None:
        """The last write and all reads since must be known to the writer."""
        self.order_read(w, pc, words, what, "writes")
        if len(self.readers):
            known = w.clock[self.readers].reshape(-1, *[1] * (1 if isinstance(words, slice) else words.ndim))
            bad = self.read[: len(self.readers), words] > known
            if bad.any():
                row = int(np.argmax(bad.reshape(len(self.readers), -1).any(axis=1)))
                word = self.first_bad(bad[row], words)
                who = self.clocks.names[int(self.readers[row])]
                raise w.fault(
                    RaceFault,
                    pc,
                    f"{what} writes shared offset {4 * word}, read by {who}: nothing that this warp waited for orders "
                    "it behind that read",
                )

    def note_write(self, component: int, value: int, words: Granules) -> None:
        """Remember a write."""
        self.writer[words] = component
        self.written[words] = value

    def note_read(self, component: int, value: int, words: Granules) -> None:
        """Remember a read."""
        row = self.rows.get(component)
        if row is None:
            row = self.rows[component] = len(self.rows)
            self.readers = np.append(self.readers, component)
            if row >= len(self.read):
                more = np.zeros((max(4, 2 * len(self.read)), self.read.shape[1]), np.int32)
                more[: len(self.read)] = self.read
                self.read = more
        self.read[row][words] = value


def words_of(granules: Granules) -> Granules:
    """Granules as words."""
    if isinstance(granules, slice):
        return slice(granules.start * 4, granules.stop * 4)
    return (np.asarray(granules).reshape(-1, 1) * 4 + np.arange(4)).reshape(-1)
