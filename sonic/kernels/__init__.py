"""The kernels: contracts in ``ops``, choice of backend in ``dispatch``, one folder per backend."""

from sonic.kernels.dispatch import (
    Explanation,
    Request,
    UnsupportedError,
    backends,
    counts,
    explain,
    reset_counts,
    unusable_reasons,
)

__all__ = [
    "Explanation",
    "Request",
    "UnsupportedError",
    "backends",
    "counts",
    "explain",
    "reset_counts",
    "unusable_reasons",
]
