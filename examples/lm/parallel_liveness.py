"""Who is still there: when a rank dies, the others end soon, and say which it was.

A collective waits for all ranks. When one is gone, gloo tells its neighbours ("connection closed by peer", without a
name) and NCCL tells nobody; the others wait until the collective times out. So each rank counts up a heartbeat in the
job's store from a thread, and looks at those of the others. The first to miss somebody writes a verdict into the store,
which all print before they end.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import threading
import time

import torch.distributed as dist


class Liveness:
    """Watches the other ranks from a thread, and ends this process when one of them is gone.

    Collective: every rank makes one, after ``init_process_group`` and with its environment variables.

    Args:
        rank, size: this rank, of so many.
        timeout: seconds after a rank's last sign of life by which all others have ended. A heartbeat is missed after
            half of that, or sooner if a collective has failed already.
        program: name that the messages begin with.
    """

    def __init__(self, rank: int, size: int, *, timeout: float, program: str) -> None:
        self.rank, self.size, self._program = rank, size, program
        self._interval = min(1.0, timeout / 20)
        self._patience = timeout / 2
        self._is_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, _, port = self._address.rpartition(":")
        # A connection of its own: one that the main thread waits on would hold up the heartbeat.
        client = dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart of the ranks
        self._store = dist.PrefixStore(f"liveness/{attempt}", client)
        self._store.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})")
        self._names = [self._store.get(f"name/{other}").decode() for other in range(size)]
        self._seen = {other: (-1, time.monotonic()) for other in range(size) if other != rank}
        self._answered = time.monotonic()
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=target, name="liveness", daemon=True) for target in (self._watch, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no more, and be missed by nobody; after a barrier, so that nobody is left in a collective."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends because of an exception, unless that comes from another's end.

        In that case the watching thread finds out whose, and ends this process.
        """
        if isinstance(error, RuntimeError):  # as a collective raises it whose ranks are gone
            patience, self._patience = self._patience, 6 * self._interval
            self._is_over.wait(min(patience, self._patience) + 4 * self._interval)
        self.stop()
        try:
            self._store.compare_set("verdict", "", f"{self._names[self.rank]} failed: {type(error).__name__}: {error}")
            self._linger()
        except RuntimeError:
            return  # without the store there is nobody to tell

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval):
            try:
                verdict = self._look()
            except RuntimeError as error:
                verdict = (
                    f"{self._store_holder()}, which holds the store at {self._address}, is gone: {_first_line(error)}"
                )
            if verdict and not self._is_over.is_set():
                self._end(verdict)
            self._answered = time.monotonic()

    def _guard(self) -> None:
        """Watch the watching thread: a store that stands still would hold it for good."""
        while not self._is_over.wait(self._interval):
            silent = time.monotonic() - self._answered
            if silent >= self._patience and not self._is_over.is_set():
                holder = f"{self._store_holder()}, which holds the store at {self._address}"
                self._end(f"{holder}, is gone: no answer for {silent:.1f} s")

    def _look(self) -> str | None:
        """Show a sign of life, and look for those of the others; what to say if one is missing."""
        self._store.add(f"beat/{self.rank}", 1)
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        for other, (count, _) in self._seen.items():
            now = self._store.add(f"beat/{other}", 0)
            if now != count:
                self._seen[other] = (now, time.monotonic())
        rank, (_, since) = min(self._seen.items(), key=lambda item: item[1][1])
        silent = time.monotonic() - since
        if silent < self._patience:
            return None
        verdict = f"{self._names[rank]} is gone: no sign of life for {silent:.1f} s"
        return self._store.compare_set("verdict", "", verdict).decode()  # the first one counts

    def _end(self, verdict: str) -> None:
        """Print, and leave without a word to the main thread, which may hang in a collective for good."""
        show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # a live display may have hidden it
        print(f"{show_cursor}{self._program}: rank {self.rank} ends: {verdict}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(1)

    def _linger(self) -> None:
        """Let the others read the verdict, if this process holds the store."""
        if self.rank == 0 and not self._is_agent_store:
            time.sleep(3 * self._interval)

    def _store_holder(self) -> str:
        return "the launcher" if self._is_agent_store else self._names[0]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
