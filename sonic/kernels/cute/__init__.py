"""Hopper kernels in CuTe-DSL: grouped GEMMs that gather, activate and store while the tensor cores work.

One main loop, with a loader for each operand, an epilogue and a schedule that are chosen; proved on a CPU by
:mod:`sonic.simulator`. Asking whether this backend can serve imports no CuTe-DSL; the first call of an op does.

* ``gemm``: the main loop; ``loaders``, ``epilogues``, ``activations``, ``schedule``: what it is put together from
* ``boxes``, ``ragged``: tiles between registers and memory by TMA, and rows that end anywhere
* ``config``: tile configurations as data, and the model that chooses among them; ``keys``: from sizes to a kernel
* ``kernels``, ``compiled``, ``ahead``: a kernel put together, compiled, kept in memory and on disk, compiled ahead
* ``launch``: the ops of :mod:`sonic.kernels.ops`, host side
* ``cross``, ``traffic``, ``tuning``: tools that look at the machine code, count bytes, and measure on a GPU
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

from sonic.versions import wrong_version

__all__ = ["LEFT_TO_OTHERS", "describe_tile", "reasons_unless_named", "tile_rows", "unsupported_reasons"]

LEFT_TO_OTHERS = ("best_of_columns", "build_plan", "combine", "topk_softmax", "topk_softmax_bwd")
"""Ops that are bound by memory or by latency, where CuTe-DSL has nothing to add: also whoever names this backend gets
the first of the other backends that can serve them."""

_HOMES = {
    "down_proj": "launch",
    "down_proj_bwd_input": "launch",
    "down_proj_bwd_weight": "launch",
    "up_proj": "launch",
    "up_proj_bwd_input": "launch",
    "up_proj_bwd_weight": "launch",
}
_DTYPES = (torch.bfloat16, torch.float16)
_ARCH = 90
_ALIGNMENT = 8  # values: 16 bytes, what TMA wants of strides


def __getattr__(name: str) -> Any:
    """The op ``name``; its module, and with it CuTe-DSL, is imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def is_simulated() -> bool:
    """Whether kernels that are launched now run in the simulator: inside of :func:`sonic.simulator.hopper`, or for good
    where ``SONIC_SIMULATE_HOPPER`` says so.
    """
    if os.environ.get("SONIC_SIMULATE_HOPPER"):
        importlib.import_module("sonic.simulator").enable_from_environment()
    host = sys.modules.get("sonic.simulator.host")
    return host is not None and bool(host.is_open())


def reasons_unless_named(request: Any) -> list[str]:
    """Why this backend does not serve ``request`` unless it is asked for by name, although it can."""
    return ["on a CPU kernels are simulated, for tests: ask for it by name"] if request.device_type == "cpu" else []


def unsupported_reasons(request: Any) -> list[str]:
    """Why this backend cannot serve ``request``, a :class:`sonic.kernels.dispatch.Request`; empty: it can."""
    reasons = []
    if importlib.util.find_spec("cutlass") is None:
        reasons.append("CuTe-DSL is not installed (the extra 'cute')")
    elif (wrong := wrong_version("nvidia-cutlass-dsl")) is not None:
        reasons.append(wrong)
    if request.device_type == "cpu":
        if not is_simulated():
            reasons.append("needs a Hopper GPU; on a CPU only inside of sonic.simulator.hopper()")
    elif request.device_type != "cuda":
        reasons.append(f"has no kernels for {request.device_type}")
    elif request.arch is not None and request.arch != _ARCH:
        reasons.append(f"needs compute capability 9.0 (Hopper), this is sm_{request.arch}")
    if request.op in LEFT_TO_OTHERS:
        reasons.append(f"leaves {request.op} to the other backends")
    elif request.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {str(request.dtype).removeprefix('torch.')}")
    widths = (request.hidden_size, request.intermediate_size)
    if any(width % _ALIGNMENT for width in widths):
        reasons.append(f"needs widths that are multiples of {_ALIGNMENT}, these are {widths[0]} and {widths[1]}")
    return reasons


def tile_rows(request: Any) -> int:
    """Rows that the up projection's kernel pads each expert to, for this number of rows, experts and widths."""
    config = importlib.import_module(f"{__name__}.config")
    rows: int = config.tile_rows(request)
    return rows


def describe_tile(request: Any) -> str | None:
    """The configuration of the kernel that serves ``request``, in words, and why it; None for ops without one."""
    config = importlib.import_module(f"{__name__}.config")
    words: str | None = config.describe(request)
    return words
