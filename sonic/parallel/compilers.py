"""Functions that a compiler leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["outside_compilers"]

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_compilers(function: Function) -> Function:
    """``torch.compiler.disable``, whose import of the compiler (two seconds) waits until a compiler is there.

    The compiler may move a wait past a reader: with its overlap passes on, torch 2.13 returns wrong numbers for ladders
    of four blocks and more. What is around such a function is compiled, with a break in between; ``fullgraph=True``
    refuses.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]
