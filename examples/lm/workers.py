"""Jobs in several processes: one small model alone leaves cores of a machine idle.

The workers take jobs from one queue and tell how they fare through another. They pay no heed to Ctrl-C, which a
terminal sends to all of them: the main process alone decides, and lets each finish its step and write its checkpoint.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from examples.lm.display import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Job, Progress, Callable[[], bool]], Result | None]


def in_parallel(
    work: Work[Job, Result], jobs: list[Job], *, workers: int, progress: Progress, is_asked_to_stop: Callable[[], bool]
) -> list[Result | None]:
    """Do jobs in processes of their own, which share torch's threads evenly.

    Args:
        work: called with a job, where to tell how it fares, and whether to stop; a function of a module, or a partial
            of one. Returns None where it was stopped.
        jobs: values that can be pickled.
        workers: processes.
        progress: is told what the jobs tell.
        is_asked_to_stop: asked again and again; once it is true, no more jobs begin.

    Returns:
        A result per job, None for those that were stopped or did not begin.

    Raises:
        RuntimeError: a worker failed; it has written why to the standard error.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    tasks, events, stop = context.Queue(), context.Queue(), context.Event()
    for task in [*enumerate(jobs), *[None] * workers]:
        tasks.put(task)
    threads = max(1, torch.get_num_threads() // workers)
    arguments = (work, tasks, events, stop, threads)
    processes = [context.Process(target=_serve, args=arguments, daemon=True) for _ in range(workers)]
    results: list[Result | None] = [None] * len(jobs)
    busy = workers
    try:
        for process in processes:
            process.start()
        while busy:
            if is_asked_to_stop():
                stop.set()
            try:
                kind, *what = events.get(timeout=0.2)
            except queue.Empty:
                failed = [process.exitcode for process in processes if process.exitcode]
                if failed:
                    raise RuntimeError(f"a worker ended with exit code {failed[0]}") from None
                continue
            if kind == "result":
                results[what[0]] = what[1]
            elif kind == "done":
                busy -= 1
            else:
                getattr(progress, kind)(*what)
    finally:
        for process in processes:
            if process.is_alive() and busy:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
    return results


class _Teller:
    """A :class:`Progress` that sends what it is told to the main process."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def print(self, line: str) -> None:
        self._events.put(("print", line))

    def begin(self, name: str, step: int) -> None:
        self._events.put(("begin", name, step))

    def update(self, name: str, figures: dict[str, Any]) -> None:
        self._events.put(("update", name, figures))


def _serve(work: Work[Any, Any], tasks: Any, events: Any, stop: Any, threads: int) -> None:
    """What a worker does until there are no more tasks, it is asked to stop, or the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    main = multiprocessing.parent_process()

    def is_asked_to_stop() -> bool:
        return stop.is_set() or (main is not None and not main.is_alive())

    while not is_asked_to_stop() and (task := tasks.get()) is not None:
        index, job = task
        events.put(("result", index, work(job, _Teller(events), is_asked_to_stop)))
    events.put(("done",))
