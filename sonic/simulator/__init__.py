"""Run compiled CuTe-DSL kernels for Hopper (sm_90a) on a CPU, on CPU tensors::

    with sonic.simulator.hopper() as sim:
        add = cute.compile(host_function, from_dlpack(a), from_dlpack(b))
        add(from_dlpack(a), from_dlpack(b))
    sim.traces[0]

Everything that a kernel needs must be compiled inside the block. Nothing is loaded until `hopper` is entered.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sonic.simulator.errors import (
    BarrierFault,
    Deadlock,
    MemoryFault,
    ParseError,
    RaceFault,
    SimulatorError,
    Unsupported,
)

if TYPE_CHECKING:
    from sonic.simulator.host import Simulation, enable_from_environment, hopper
    from sonic.simulator.tensors import tensor
    from sonic.simulator.timeline import draw_timeline
    from sonic.simulator.trace import Trace
    from sonic.simulator.waits import Wait

__all__ = [
    "BarrierFault",
    "Deadlock",
    "MemoryFault",
    "ParseError",
    "RaceFault",
    "Simulation",
    "SimulatorError",
    "Trace",
    "Unsupported",
    "Wait",
    "draw_timeline",
    "enable_from_environment",
    "hopper",
    "tensor",
]

_ROOM_OF_NAME = {
    "Simulation": "host",
    "Trace": "trace",
    "Wait": "waits",
    "draw_timeline": "timeline",
    "enable_from_environment": "host",
    "hopper": "host",
    "tensor": "tensors",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
