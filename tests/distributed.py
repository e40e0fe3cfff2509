"""Functions run in several processes that gloo joins: what comes back is their results, or the ranks that failed.

The processes are forked from a server that has imported torch and has no threads, so that a test pays for the import
once, not once per rank.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "hypothesis",
    "pytest",
    "sonic",
]


class RanksFailed(AssertionError):
    """Some rank raised, died or came too late.

    Attributes:
        failures: rank -> its traceback, or what became of it; in the order in which they were seen.
    """

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"--- rank {rank}: {text}" for rank, text in failures.items()))


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``function(rank, *args)`` in each of ``num_ranks`` processes, with gloo as their default process group.

    Every process has one thread, seed 0, and a collective's time-out of ``timeout``.

    Args:
        function: of a module's top level (it is found by its name); what it returns, and ``args``, can be pickled.
        num_ranks: processes.
        timeout: seconds that all of it may take.

    Returns:
        What each rank returned.

    Raises:
        RanksFailed: with the traceback of each rank that raised before the rest were ended, or the stacks of those
            that are late.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run(function, num_ranks, args, timeout, folder)


def _run(function: Callable[..., Any], num_ranks: int, args: tuple[Any, ...], timeout: float, folder: str) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    deadline = time.monotonic() + timeout
    processes, readers = [], {}
    try:
        for rank in range(num_ranks):
            reader, writer = context.Pipe(duplex=False)
            job = pickle.dumps((function.__module__, function.__qualname__, args))
            process = context.Process(
                target=_be_a_rank, args=(job, rank, num_ranks, folder, timeout, writer), daemon=True
            )
            with main_not_imported(), library_on_path():
                process.start()
            writer.close()
            processes.append(process)
            readers[reader] = rank
        return _collect(processes, readers, deadline, timeout, folder)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(
    processes: list[Any], readers: dict[Connection, int], deadline: float, timeout: float, folder: str
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while readers:
        ready = wait(list(readers), max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                late = sorted(readers.values())
                failures = {rank: f"not done after {timeout:g} s\n{_stacks(folder, rank)}" for rank in late}
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.pop(reader)
            try:
                is_right, payload = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                is_right, payload = False, f"ended with exit code {processes[rank].exitcode} and without a word"
            if is_right:
                results[rank] = payload
            else:
                failures[rank] = payload
                deadline = min(deadline, time.monotonic() + 2)  # others may have more to say, of the same cause
    if failures:
        raise RanksFailed(failures)
    return [results[rank] for rank in range(len(processes))]


def _stacks(folder: str, rank: int) -> str:
    path = Path(folder, f"stacks.{rank}")
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def main_not_imported() -> Any:
    """The children have no business with ``__main__``, which is pytest or a worker of it."""
    main = sys.modules["__main__"]
    saved = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        if "__file__" in saved:
            del main.__file__
        yield
    finally:
        for name, value in saved.items():
            setattr(main, name, value)


@contextlib.contextmanager
def library_on_path() -> Any:
    """For the server, which starts with the first process and is told no other path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _be_a_rank(job: bytes, rank: int, num_ranks: int, folder: str, timeout: float, writer: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    with open(Path(folder, f"stacks.{rank}"), "w") as stacks:
        faulthandler.dump_traceback_later(timeout - min(3, timeout / 4), file=stacks)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=num_ranks,
                timeout=datetime.timedelta(seconds=timeout),
            )
            module, name, args = pickle.loads(job)
            torch.manual_seed(0)
            function = getattr(importlib.import_module(module), name)
            answer: tuple[bool, Any] = (True, function(rank, *args))
            message = io.BytesIO()
            pickle.dump(answer, message)
            dist.barrier()
            dist.destroy_process_group()
            writer.send_bytes(message.getvalue())
        except BaseException:
            writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
            os._exit(1)  # without waiting for ranks that wait for this one
        faulthandler.cancel_dump_traceback_later()
