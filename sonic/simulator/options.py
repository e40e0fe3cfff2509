"""How a launch is run: order of events, checks, budget."""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("eager", "lazy", "random")


@dataclass(frozen=True)
class Options:
    """The dials of one launch.

    Attributes:
        schedule: when asynchronous work (TMA, cp.async, wgmma) happens. ``eager``: at issue, which shows missing waits
            for a free slot. ``lazy``: only when no warp can run, which shows missing waits for data. ``random``: any
            time between, warps in any order.
        seed: of the random schedule.
        checks: look for races, uninitialised shared memory and leaked arrivals.
        order_checks: look also for accesses that no barrier orders, whatever order they ran in; needs ``checks``.
        uninitialised: ``error`` or ``warn``: what a read of shared memory that was never written is. Some kernels load
            rows beyond the end of a tensor that way and then drop them.
        step_budget: most warp instructions of a launch; a spin on memory that never changes ends there.
        timeline: keep every wait that stopped a warp: its barrier, its stage, who ended it; see `Trace.timeline`.
        resident_ctas: how many thread blocks are alive at a time unless the launch is cooperative.
    """

    schedule: str = "eager"
    seed: int = 0
    checks: bool = True
    order_checks: bool = True
    uninitialised: str = "error"
    step_budget: int = 200_000_000
    timeline: bool = False
    resident_ctas: int = 132

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"sonic.simulator: schedule is {self.schedule!r}, expected one of {SCHEDULES}")
        if self.uninitialised not in ("error", "warn"):
            raise ValueError(f"sonic.simulator: uninitialised is {self.uninitialised!r}, expected 'error' or 'warn'")
