"""Which versions of nvidia-cutlass-dsl the simulator knows.

It depends on things that the package does not promise: the symbols of its runtime library, how host code calls them,
and the bits of the tensor maps that host code writes. So a version outside the range is refused, never tried.
"""

from __future__ import annotations

import importlib.metadata
import re

from sonic.simulator.errors import SimulatorError

PACKAGE = "nvidia-cutlass-dsl"
OLDEST = (4, 8)
NEWEST = (4, 9)  # not included
WANTED = f"{PACKAGE}>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1]}"


def installed_version() -> str | None:
    """The version of nvidia-cutlass-dsl that Python would import, ``None`` without one."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_version() -> str:
    """Refuse a version that the simulator does not know.

    Returns:
        the installed version.

    Raises:
        SimulatorError: none is installed, or one out of the range; the message names both.
    """
    version = installed_version()
    if version is None:
        raise SimulatorError(f"sonic.simulator: needs {WANTED}, none is installed; try `pip install '{WANTED}'`")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) < NEWEST:
        raise SimulatorError(
            f"sonic.simulator: {PACKAGE} {version} is installed, expected {WANTED}: the simulator relies on details of "
            f"its runtime library that other versions may change; try `pip install '{WANTED}'`"
        )
    return version
