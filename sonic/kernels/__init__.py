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
from sonic.kernels.warming import LayerShape, warmup

__all__ = [
    "Explanation",
    "LayerShape",
    "Request",
    "UnsupportedError",
    "backends",
    "counts",
    "explain",
    "reset_counts",
    "unusable_reasons",
    "warmup",
]
