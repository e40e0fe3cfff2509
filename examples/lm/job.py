"""How a job begins and ends: its processes, signals, and exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from examples.lm.errors import JobError
from examples.lm.world import Interrupt, World


class Stopped(Exception):
    """The user asked to stop, and the checkpoints are written. ``signum`` is the signal that asked."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def exit_code_of(name: str, device: str, run: Callable[[World, Interrupt], None]) -> int:
    """Run a job and say how it ended.

    Args:
        name: of the program, before its error messages.
        device: as :class:`World` takes it.
        run: the job.

    Returns:
        0; 2 for a :class:`JobError`, which is printed; 128 + the signal's number if stopped.
    """
    try:
        with World(device) as world, Interrupt() as interrupt:
            run(world, interrupt)
    except JobError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.signum
    except KeyboardInterrupt:  # the second Ctrl-C, which does not wait for the step to end
        return 128 + signal.SIGINT
    return 0
