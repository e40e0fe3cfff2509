"""Compiled kernels: by key in memory, as object files on disk, which load in milliseconds.

A key holds scalars only (:class:`sonic.kernels.cute.keys.KernelKey`), so sizes never compile anything anew. On disk
the name of a file is a hash of the key, of the kernels' sources, of the machine and of the versions of CuTe-DSL and
TVM-FFI, and a hash of its own contents: a file that was cut short is noticed, thrown away and made again. Files are
written beside their place and renamed. Nothing here needs a GPU: the target is always sm_90a.

Inside of :func:`sonic.simulator.hopper` kernels are compiled for the simulator, and live in memory only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cutlass import cute

from sonic.kernels.cute.kernels import build
from sonic.kernels.cute.keys import KernelKey

__all__ = ["cache_folder", "compile_ahead", "compiled", "num_compiled", "on_disk", "variants"]

_NAME = "sonic_kernel"  # of the function in an object file
_TARGET = "sm_90a"
_DIGEST = 16  # hex digits

_functions: dict[tuple[KernelKey, bool], Callable[..., Any]] = {}
_counts = {"compiled": 0, "loaded": 0}


def compiled(key: KernelKey, simulated: bool = False) -> Callable[..., Any]:
    """The function of a key: from memory, from disk, or compiled now.

    Args:
        key: what it depends on.
        simulated: for the simulator, whose block has to be open.
    """
    function = _functions.get((key, simulated))
    if function is None:
        function = _compile(key, "") if simulated else _from_disk(key) or _onto_disk(key)
        _functions[key, simulated] = function
    return function


def compile_ahead(key: KernelKey) -> str:
    """Make sure that the object file of a key is on disk; returns ``"found"`` or ``"compiled"``."""
    if on_disk(key) is not None:
        return "found"
    _onto_disk(key)
    return "compiled"


def variants() -> tuple[KernelKey, ...]:
    """Keys of the functions that this process has in memory."""
    return tuple(dict.fromkeys(key for key, _ in _functions))


def num_compiled() -> dict[str, int]:
    """How many functions this process compiled, and how many it loaded from disk."""
    return dict(_counts)


def cache_folder() -> Path:
    """Where object files are kept: ``SONIC_CACHE_DIR``, else ``sonic/kernels`` in the user's cache directory."""
    named = os.environ.get("SONIC_CACHE_DIR")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sonic"
    return base / "kernels"


def _compile(key: KernelKey, options: str) -> Any:
    gemm, arguments = build(key)
    _counts["compiled"] += 1
    return cute.compile(gemm, *arguments, options=f"--enable-tvm-ffi {options}".strip())


_SOURCES = ("activations", "boxes", "config", "epilogues", "gemm", "kernels", "keys", "loaders", "ragged", "schedule")


@functools.cache  # the sources of a running program
def _fingerprint() -> bytes:
    """Of all that a key's object file is made by: what the kernels are written in, and who compiles them for whom."""
    digest = hashlib.sha256(platform.machine().encode())  # the host's half of the file
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + Path(__file__).with_name(f"{name}.py").read_bytes())
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.digest()


def _stem(key: KernelKey) -> str:
    return hashlib.sha256(_fingerprint() + repr(key).encode()).hexdigest()[: 2 * _DIGEST]


def _files(key: KernelKey) -> Iterator[Path]:
    return cache_folder().glob(f"{_stem(key)}-*.o")


def on_disk(key: KernelKey) -> Path | None:
    """The object file of a key whose contents are what its name says; others of that key are removed."""
    for file in _files(key):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            if file.stem.partition("-")[2] == hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGEST]:
                return file
            file.unlink(missing_ok=True)
    return None


def _from_disk(key: KernelKey) -> Callable[..., Any] | None:
    file = on_disk(key)
    if file is None:
        return None
    _counts["loaded"] += 1
    function: Callable[..., Any] = cute.runtime.load_module(str(file), enable_tvm_ffi=True)[_NAME]
    return function


def _onto_disk(key: KernelKey) -> Callable[..., Any]:
    function: Any = _compile(key, f"--gpu-arch {_TARGET}")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        made = Path(beside) / "kernel.o"
        function.export_to_c(object_file_path=str(made), function_name=_NAME)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()[:_DIGEST]
        os.replace(made, folder / f"{_stem(key)}-{digest}.o")
    result: Callable[..., Any] = function
    return result
