"""The public calls of two other packages, ``sonicmoe`` and ``scattermoe``, on the kernels of this library.

``import sonic.compat.sonicmoe as sonicmoe`` is enough for code of one's own. Code that says ``import sonicmoe`` and
cannot be changed runs after :func:`install`, which puts the module under that name. Importing this package does
neither.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, TracebackType

from sonic.shapes import check_choice

__all__ = ["PACKAGES", "Installed", "install", "is_installed", "uninstall"]

PACKAGES: dict[str, dict[str, str]] = {
    "sonicmoe": {
        "": "sonicmoe",
        "count_cumsum": "sonicmoe.metadata",
        "enums": "sonicmoe.enums",
        "functional": "sonicmoe.functional",
        "functional.triton_kernels": "sonicmoe.metadata",
        "functional.utils": "sonicmoe.gemm_choice",
        "moe": "sonicmoe.moe",
    },
    "scattermoe": {
        "": "scattermoe",
        "kernels": "scattermoe.kernels",
        "kernels.ops": "scattermoe.kernels.ops",
        "mlp": "scattermoe.mlp",
        "parallel_experts": "scattermoe.parallel_experts",
    },
}
"""Package -> its modules by their names there, and where they lie here, below ``sonic.compat``."""


class Installed:
    """What :func:`install` returns: ends the installation with :meth:`uninstall`, or at the end of a ``with`` block."""

    def __init__(self, name: str) -> None:
        """For :func:`install`; ``name`` is the package's."""
        self.name = name

    def uninstall(self) -> None:
        """The same as :func:`sonic.compat.uninstall` of this name."""
        uninstall(self.name)

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install(name: str) -> Installed:
    """Let ``import sonicmoe`` (or ``scattermoe``) give the modules of this library, in this process.

    An installed package of that name is not touched, but not found either while this lasts. Whoever imported names
    meanwhile keeps them.

    Args:
        name: a key of ``sonic.compat.PACKAGES``.

    Returns:
        a context manager whose end undoes it; :func:`uninstall` does so too.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: a package of that name was imported already, or this was called before.
    """
    where = "sonic.compat.install"
    check_choice(where, "name", name, tuple(PACKAGES))
    present = sorted(module for module in sys.modules if module == name or module.startswith(f"{name}."))
    if present:
        if is_installed(name):
            raise RuntimeError(f"{where}: {name} is installed already, expected uninstall({name!r}) first")
        origin = getattr(sys.modules[present[0]], "__file__", None) or "a place without a file"
        raise RuntimeError(
            f"{where}: {present[0]} was imported already, from {origin}, expected a process that has not yet done so "
            "(call install before the first import)"
        )
    modules = {
        f"{name}.{part}".rstrip("."): importlib.import_module(f"sonic.compat.{place}")
        for part, place in PACKAGES[name].items()
    }
    sys.modules.update(modules)
    return Installed(name)


def uninstall(name: str) -> None:
    """Undo :func:`install`: the names are free again.

    Raises:
        ValueError: ``name`` is none of ``sonic.compat.PACKAGES``.
        RuntimeError: it is not installed.
    """
    where = "sonic.compat.uninstall"
    check_choice(where, "name", name, tuple(PACKAGES))
    if not is_installed(name):
        raise RuntimeError(f"{where}: {name} is not installed, expected install({name!r}) before")
    for part in PACKAGES[name]:
        sys.modules.pop(f"{name}.{part}".rstrip("."), None)


def is_installed(name: str) -> bool:
    """Whether ``import`` of that name gives a module of this library."""
    module = sys.modules.get(name)
    return module is not None and module is sys.modules.get(f"sonic.compat.{name}")


def __getattr__(name: str) -> ModuleType:
    if name in PACKAGES:
        return importlib.import_module(f"sonic.compat.{name}")
    raise AttributeError(f"module 'sonic.compat' has no attribute {name!r}")
