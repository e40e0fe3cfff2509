"""Triton kernels: any NVIDIA GPU from Ampere on and AMD's CDNA 3, and on a CPU, by name, Triton's interpreter.

Asking whether this backend can serve imports no Triton; the first call of an op does.

* ``launch``: one way to start a kernel, or to compile it for a target that is not here
* ``target``, ``config``: chips and tile configurations as data, and the model that chooses among them
* ``loaders``, ``mainloops``, ``epilogues``: device functions, each one step of a grouped GEMM
* ``grouped_gemm``, ``gather_sum``, ``routing``, ``selection``, ``plan``: the ops of :mod:`sonic.kernels.ops`, host side
* ``cross``: what the compiler makes of every kernel, for chips that are not here
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from sonic.kernels.triton.target import hip_arch, interprets
from sonic.versions import wrong_version

__all__ = ["reasons_unless_named", "tile_rows", "unsupported_reasons"]

_HOMES = {
    "best_of_columns": "selection",
    "build_plan": "plan",
    "combine": "gather_sum",
    "down_proj": "grouped_gemm",
    "down_proj_bwd_input": "grouped_gemm",
    "down_proj_bwd_weight": "grouped_gemm",
    "topk_softmax": "routing",
    "topk_softmax_bwd": "routing",
    "up_proj": "grouped_gemm",
    "up_proj_bwd_input": "grouped_gemm",
    "up_proj_bwd_weight": "grouped_gemm",
}
_ROUTING_OPS = ("best_of_columns", "build_plan", "topk_softmax", "topk_softmax_bwd")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_ARCH = 80


def __getattr__(name: str) -> Any:
    """The op ``name``; its module, and with it Triton, is imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def reasons_unless_named(request: Any) -> list[str]:
    """Why this backend does not serve ``request`` unless it is asked for by name, although it can."""
    return ["on a CPU Triton only interprets, for tests: ask for it by name"] if request.device_type == "cpu" else []


def unsupported_reasons(request: Any) -> list[str]:
    """Why this backend cannot serve ``request``, a :class:`sonic.kernels.dispatch.Request`; empty: it can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed (the extra 'triton')")
    elif (wrong := wrong_version("triton")) is not None:
        reasons.append(wrong)
    if request.device_type == "cpu":
        if not interprets():
            reasons.append("needs a GPU; on a CPU only with TRITON_INTERPRET=1 from the start, for tests")
        if request.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter multiplies bfloat16 wrongly; float16 and float32 it does right")
    elif request.device_type != "cuda":
        reasons.append(f"has no kernels for {request.device_type}")
    elif request.arch is not None and request.arch < _MIN_ARCH and hip_arch(request.arch) is None:
        reasons.append(f"needs compute capability {_MIN_ARCH // 10}.0 (Ampere) or newer, this is sm_{request.arch}")
    if request.op not in _ROUTING_OPS and request.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {str(request.dtype).removeprefix('torch.')}")
    if request.op in _ROUTING_OPS and request.op != "build_plan" and request.dtype == torch.float64:
        reasons.append("has no kernels for float64")
    return reasons


def tile_rows(request: Any) -> int:
    """Rows that the up projection's kernel pads each expert to, for this number of rows, experts and widths."""
    config = importlib.import_module(f"{__name__}.config")
    rows: int = config.tile_rows(request)
    return rows
