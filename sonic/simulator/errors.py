"""What the engine raises. Every message names the instruction and, with line info, the source line."""

from __future__ import annotations


class SimulatorError(RuntimeError):
    """A fault of the simulated kernel, or something that the simulator refuses to guess."""


class Unsupported(SimulatorError):
    """An opcode, modifier, flag or descriptor bit that is not understood; it is named, never guessed."""


class ParseError(SimulatorError):
    """PTX text that the parser does not understand."""


class MemoryFault(SimulatorError):
    """An access outside every registered region, misaligned, or a read of shared memory never written."""


class BarrierFault(SimulatorError):
    """More arrivals than a barrier expects, or a barrier used before it is initialised."""


class RaceFault(SimulatorError):
    """Two accesses that nothing orders: one of them by the asynchronous proxy."""


class Deadlock(SimulatorError):
    """No warp can run and nothing is in flight; or the step budget is spent."""
