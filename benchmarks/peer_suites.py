"""The test suites of other packages, unchanged, on this library: ``python -m benchmarks.peer_suites scattermoe PATH``.

PATH is a test file, or a folder, of a checkout of that package, got by yourself; whatever follows goes to pytest::

    git clone https://github.com/shawntan/scattermoe /elsewhere/scattermoe
    python -m benchmarks.peer_suites scattermoe /elsewhere/scattermoe/tests/test_mlp.py -q

:func:`sonic.compat.install` answers their ``import``; nothing of the package itself is executed but its tests. Where
there is no GPU, tensors that they ask for on "cuda" are made on the CPU, and ``.cuda()`` changes nothing; compiled
functions are traced without that detour.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sonic.compat

__all__ = ["CudaOnCpu", "main"]


class CudaOnCpu(TorchFunctionMode):
    """While it is entered, "cuda" means the CPU in every call of a function of torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with every CUDA device among its arguments replaced."""
        if func is Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.to:
            args = tuple(_on_cpu(value) for value in args)
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _Plugin:
    """Enters the mode for every test, and leaves it inside compiled functions: a compiler would have to trace it."""

    def __init__(self) -> None:
        self.mode = CudaOnCpu()
        self.compile = torch.compile

    def pytest_configure(self) -> None:
        torch.compile = self._compile  # type: ignore[assignment]

    def pytest_unconfigure(self) -> None:
        torch.compile = self.compile

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        with self.mode:
            return (yield)

    def _compile(self, *args: Any, **kwargs: Any) -> Any:
        compiled: Any = self.compile(*args, **kwargs)

        @functools.wraps(compiled)
        def without_mode(*args: Any, **kwargs: Any) -> Any:
            self.mode.__exit__(None, None, None)
            try:
                return compiled(*args, **kwargs)
            finally:
                self.mode.__enter__()

        return without_mode


def main(argv: Sequence[str] | None = None) -> int:
    """Run pytest on one suite; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_suites", description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=sorted(sonic.compat.PACKAGES))
    parser.add_argument("path", type=Path, help="test file or folder of a checkout of that package")
    options, others = parser.parse_known_args(argv)
    path = options.path.resolve()
    if not path.exists():
        parser.error(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    with sonic.compat.install(options.package):
        plugins = [] if torch.cuda.is_available() else [_Plugin()]
        # none of this project's settings: neither its pyproject.toml nor its conftest.py
        own = [f"--rootdir={folder}", f"--confcutdir={folder}", "-c", "/dev/null", "-p", "no:cacheprovider"]
        return int(pytest.main([*own, str(path), *others], plugins=plugins))


if __name__ == "__main__":
    sys.exit(main())
