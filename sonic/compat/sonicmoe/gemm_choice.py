"""The switch between two sets of GEMM kernels in the package ``sonicmoe`` of December 2025."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["enable_quack_gemm", "is_using_quack_gemm"]

_IS_USING_QUACK_GEMM: ContextVar[bool] = ContextVar("is_using_quack_gemm", default=False)


@contextmanager
def enable_quack_gemm(enable: bool = True) -> Iterator[None]:
    """Taken, and told again by :func:`is_using_quack_gemm`; it chooses nothing.

    Here the backend is chosen by device, or by the variable that ``python -m sonic doctor`` tells; results are the same
    with either.
    """
    token = _IS_USING_QUACK_GEMM.set(enable)
    try:
        yield
    finally:
        _IS_USING_QUACK_GEMM.reset(token)


def is_using_quack_gemm() -> bool:
    """What :func:`enable_quack_gemm` was given, False outside it."""
    return _IS_USING_QUACK_GEMM.get()
