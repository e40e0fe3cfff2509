"""One way to start a kernel, or to compile it for a chip that is not here.

Every host function of this backend ends in :func:`launch`. Inside :func:`compiling_for` nothing runs: each launch is
compiled for the named target instead, along the same path with the same specialisations, and what came of it is kept.
Tensors may then be on the meta device: only their dtypes, shapes and alignment matter.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import compute_cache_key

from sonic.kernels.triton.target import Target, interprets, target_of

__all__ = ["Compilation", "Compiled", "compiling_for", "current_target", "launch"]


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled.

    Attributes:
        kernel: name of the kernel function.
        label: the op, as the host function names it.
        binary: Triton's compiled kernel: ``asm``, ``metadata``; None where launches are only keyed.
        key: of Triton's own cache; launches of one kernel with equal keys share one binary.
        constants: keyword arguments of the launch.
        num_warps, num_stages: as the launch asked for.
        seconds: that Triton took; next to nothing for what it had compiled before.
    """

    kernel: str
    label: str
    binary: Any
    key: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    seconds: float


@dataclass
class Compilation:
    """What :func:`compiling_for` gathers.

    Attributes:
        target: compiled for.
        keys_only: launches are keyed, not compiled.
        compiled: one entry per launch, in order.
    """

    target: Target
    keys_only: bool = False
    compiled: list[Compiled] = field(default_factory=list)


_COMPILATION: ContextVar[Compilation | None] = ContextVar("sonic_triton_compilation", default=None)


class _AbsentDevice:
    """Stands in for Triton's driver: tells the target, and has no device to run on."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"sonic-{self._target.arch}"  # the key of Triton's cache of kernels

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: Target, keys_only: bool = False) -> Iterator[Compilation]:
    """Compile for ``target``, which need not be here, what would be launched inside; nothing runs.

    Args:
        target: any.
        keys_only: stop at the key under which Triton would look for a compiled kernel: how many binaries a series of
            launches needs is then known in no time.

    Raises:
        RuntimeError: Triton interprets (``TRITON_INTERPRET``), and so compiles nothing.
    """
    if interprets():
        raise RuntimeError("sonic: TRITON_INTERPRET is set, so Triton compiles nothing; unset it and start again")
    driver = triton.runtime.driver
    held = driver._active  # asking for `driver.active` would look for a device
    compilation = Compilation(target, keys_only)
    token = _COMPILATION.set(compilation)
    driver.set_active(_AbsentDevice(target))
    try:
        yield compilation
    finally:
        _COMPILATION.reset(token)
        driver.set_active(held)


def current_target(tensor: torch.Tensor) -> Target:
    """The target that kernels on this tensor are for: inside :func:`compiling_for` the named one, else its device's."""
    compilation = _COMPILATION.get()
    return target_of(tensor.device) if compilation is None else compilation.target


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    label: str,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Start ``kernel`` on the device of its tensors; a grid with a zero starts nothing.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along each axis.
        args: its arguments.
        label: what the launch is for, as a report names it.
        num_warps, num_stages: of the compiled program; the interpreter has neither.
        constants: its keyword arguments.
    """
    if 0 in grid:
        return
    compilation = _COMPILATION.get()
    if compilation is not None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        begin, binary = time.perf_counter(), None
        if not compilation.keys_only:
            binary = kernel.run(*args, grid=tuple(grid), warmup=True, **constants, **options)
            binary = binary.result() if hasattr(binary, "result") else binary
        seconds = time.perf_counter() - begin
        key = _cache_key(kernel, *args, **constants, **options)
        found = Compiled(kernel.__name__, label, binary, key, constants, num_warps, num_stages, seconds)
        compilation.compiled.append(found)
        return
    with _on_device(args):
        kernel[tuple(grid)](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def _cache_key(kernel: Any, *args: Any, **constants: Any) -> str:
    """Triton's key of a launch, computed as ``JITFunction.run`` does: types, specialisations, constants, options."""
    _, keys, _, _, bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
    _, specialization, options = bind(*args, **constants)
    key: str = compute_cache_key(keys, specialization, options)
    return key


def _on_device(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.device.type == "cuda":
            return torch.cuda.device(arg.device)
    return contextlib.nullcontext()
