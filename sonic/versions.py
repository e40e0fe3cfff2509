"""The versions of other packages that work, and whether those that are installed are among them."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping

__all__ = ["RANGES", "installed_version", "is_in_range", "requirement", "wrong_version"]

# Versions that work: at least the first, below the second. As in pyproject.toml.
RANGES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "torch": ((2, 8), None),
    "triton": ((3, 4), None),
    "nvidia-cutlass-dsl": ((4, 8), (4, 9)),
    "transformers": ((5, 0), None),
    "megatron-core": ((0, 16), None),
    "torchtitan": ((0, 3), None),
}


def is_in_range(distribution: str, version: str) -> bool:
    """Whether a version of a distribution of :data:`RANGES` works; what stands behind a ``+`` does not count."""
    least, below = RANGES[distribution]
    numbers = tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
    return numbers >= least and (below is None or numbers < below)


def requirement(distribution: str) -> str:
    """What pip is to be asked for, such as ``triton>=3.4``."""
    least, below = RANGES[distribution]
    bound = f",<{'.'.join(map(str, below))}" if below else ""
    return f"{distribution}>={'.'.join(map(str, least))}{bound}"


@functools.cache  # what is installed does not change under a process
def installed_version(distribution: str) -> str | None:
    """The version that is installed; None without, or under another name (a vendor's build of Triton, say)."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def wrong_version(distribution: str) -> str | None:
    """What is wrong with the version that is installed and how to mend it; None where nothing is, or none is known."""
    version = installed_version(distribution)
    if version is None or is_in_range(distribution, version):
        return None
    return f"{distribution} is {version}: pip install '{requirement(distribution)}'"
