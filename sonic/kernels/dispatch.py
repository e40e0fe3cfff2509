"""Which backend serves a request, and why not the others.

A :class:`Request` holds metadata only, no tensor, so "what would an H100 do with this shape" is a question that a CPU
can answer. Each backend is a package ``sonic.kernels.<name>`` that is imported when it is first asked, and answers with
reasons: an empty list means that it can serve. Automatic choice takes the first of :func:`backends` that can; a name
that was insisted on (the ``backend`` argument, or the environment variable ``SONIC_BACKEND``) and cannot serve raises
with the reasons. A backend may serve some requests only where its name was insisted on, such as Triton's interpreter on
a CPU; and it may leave some ops to the others (:func:`left_to_others`), also where its name was insisted on. Nothing
falls back in silence: automatic choice that ends at the reference on an accelerator warns.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sonic.shapes import argument_error, check_choice, check_positive

__all__ = [
    "ACTIVATIONS",
    "FLOAT_DTYPES",
    "GATED_ACTIVATIONS",
    "OPS",
    "Explanation",
    "Request",
    "UnsupportedError",
    "backends",
    "check_float_dtype",
    "counts",
    "explain",
    "has_kernel",
    "left_to_others",
    "request_of",
    "reset_counts",
    "run",
    "select",
    "tile_rows",
    "unusable_reasons",
]

GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_oai")
ACTIVATIONS = (*GATED_ACTIVATIONS, "gelu", "relu", "relu2", "silu")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPS = (
    "up_proj",
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
    "combine",
    "experts",
    "experts_bwd",
    "topk_softmax",
    "topk_softmax_bwd",
    "best_of_columns",
    "build_plan",
)
_TOLD_THE_ACTIVATION = ("up_proj", "down_proj_bwd_input", "experts", "experts_bwd")

_BACKENDS = ("cute", "triton", "reference")
_COUNTS: Counter[tuple[str, str]] = Counter()


class UnsupportedError(ValueError):
    """No backend, or not the one that was insisted on, can serve a request; the message lists every reason."""


@dataclass(frozen=True)
class Request:
    """What a kernel is asked to do: metadata only.

    Attributes:
        op: one of the op names, such as ``"up_proj"``.
        device_type: ``"cpu"``, ``"cuda"``, …
        arch: compute capability as an integer (90 for sm_90), ``None`` where there is none.
        dtype: dtype of the matrices (of the logits for ``topk_softmax`` and ``best_of_columns``, of the scores
            for the backward of the first, of the indices for ``build_plan``).
        num_rows: R, routed rows (T * K for the routing ops; P, the pairs that come out, for ``best_of_columns``).
        num_experts: E; 0 where the op has none.
        hidden_size: D; 0 where the op has none.
        intermediate_size: N; U for ``up_proj_bwd_*``, which are not told the activation; 0 where the op has none.
        activation: a name in ``sonic.ACTIVATIONS``, ``None`` for ops without one.
    """

    op: str
    device_type: str
    arch: int | None
    dtype: torch.dtype
    num_rows: int = 0
    num_experts: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    activation: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Answer of :func:`explain`: the backend that serves a request, its row tile, and the reasons against the others.

    Attributes:
        request: what was asked.
        backend: name of the backend that serves it, ``None`` if none can.
        tile_rows: M, rows that the chosen kernel pads each expert to; 1 = no padding; ``None`` without a backend.
        why: one sentence on how the choice came about.
        tile: the configuration of its kernel and where that comes from, in words; ``None`` where there is none.
        reasons: per backend, why it cannot serve; an empty list means that it can.
    """

    request: Request
    backend: str | None
    tile_rows: int | None
    why: str
    reasons: dict[str, list[str]] = field(default_factory=dict)
    tile: str | None = None

    def __str__(self) -> str:
        request = self.request
        where = request.device_type + (f" sm_{request.arch}" if request.arch else "")
        head = f"{request.op} on {where}, {str(request.dtype).removeprefix('torch.')}, R={request.num_rows}"
        lines = [f"{head}: {self.backend or 'no backend'} ({self.why})"]
        if self.tile_rows is not None:
            lines.append(f"  row tile: {self.tile_rows}" + (" (no padding)" if self.tile_rows == 1 else ""))
        if self.tile is not None:
            lines.append(f"  tile: {self.tile}")
        for name, reasons in self.reasons.items():
            lines.append(f"  {name}: " + ("can serve" if not reasons else "; ".join(reasons)))
        return "\n".join(lines)


def backends() -> tuple[str, ...]:
    """Names of all backends, in the order in which automatic choice asks them."""
    return _BACKENDS


def check_float_dtype(where: str, argument: str, dtype: object) -> None:
    """Refuse what is no dtype that the experts' matrices can have.

    Raises:
        ValueError: naming the argument and those dtypes.
    """
    if dtype not in FLOAT_DTYPES:
        raise argument_error(where, argument, repr(dtype), " or ".join(map(str, FLOAT_DTYPES)))


def left_to_others(backend: str) -> tuple[str, ...]:
    """Ops for which ``backend`` has nothing to add: whoever insists on it gets the first other one that can serve."""
    ops: tuple[str, ...] = getattr(_load(backend), "LEFT_TO_OTHERS", ()) if _is_shipped(backend) else ()
    return ops


def unusable_reasons(backend: str, device_type: str, arch: int | None = None) -> list[str]:
    """Why ``backend`` cannot be used on such a device, whatever the shapes and the dtype; empty = it can.

    Args:
        backend: a name in :func:`backends`.
        device_type: ``"cpu"``, ``"cuda"``, …
        arch: compute capability as an integer, such as 90.

    Raises:
        ValueError: unknown backend.
    """
    check_choice("sonic.kernels.unusable_reasons", "backend", backend, _BACKENDS)
    reasons: list[str] = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # of those that serve none, the last one's reasons
        reasons = _reasons(backend, Request("up_proj", device_type, arch, dtype), is_insisted=True)
        if not reasons:
            break
    return reasons


def explain(
    op: str,
    *,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    arch: int | None = None,
    activation: str = "swiglu",
    backend: str | None = None,
) -> Explanation:
    """Tell which backend would serve ``op`` on these shapes, with which row tile, and why. Touches no device when
    ``arch`` is given.

    Args:
        op: op name, such as ``"up_proj"``.
        num_tokens, num_experts, top_k, hidden_size, intermediate_size: T, E, K, D and N.
        dtype: dtype of the experts' matrices; logits are at least float32, indices int32.
        device: a device or its type; need not be present if ``arch`` is given.
        arch: compute capability as an integer (90 for an H100); asked from the device when it is left out on CUDA.
        activation: a name in ``sonic.ACTIVATIONS``.
        backend: insist on one, as the layers' argument of that name does.

    Returns:
        The answer; its ``request`` is the one that a layer of these sizes makes.

    Raises:
        ValueError: unknown op, activation, dtype or backend; sizes or an ``arch`` that are no positive integers.
        RuntimeError: a device that torch does not know.
    """
    where = "sonic.kernels.explain"
    check_choice(where, "op", op, OPS)
    check_positive(
        where,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )
    if top_k > num_experts:
        raise argument_error(where, "top_k", top_k, f"at most num_experts = {num_experts}")
    check_float_dtype(where, "dtype", dtype)
    check_choice(where, "activation", activation, ACTIVATIONS)
    if arch is not None:
        check_positive(where, arch=arch)
    device = torch.device(device)
    arch = _arch(device) if arch is None else arch
    request = _imagine(
        op, device.type, arch, dtype, num_tokens * top_k, num_experts, hidden_size, intermediate_size, activation
    )
    insisted, source = _insisted(where, request.op, backend)
    reasons = {name: _reasons(name, request, is_insisted=name == insisted) for name in _BACKENDS}
    if insisted is not None:
        chosen = None if reasons[insisted] else insisted
        why = f"{source} insists on {insisted}" + ("" if chosen else ", which cannot serve")
    else:
        chosen = next((name for name in _BACKENDS if not reasons[name]), None)
        why = "first that can serve" if chosen else "none can serve"
    if chosen is None:
        return Explanation(request, None, None, why, reasons)
    module = _load(chosen)
    tile = module.describe_tile(request) if hasattr(module, "describe_tile") else None
    return Explanation(request, chosen, module.tile_rows(request), why, reasons, tile)


def counts() -> dict[tuple[str, str], int]:
    """Calls so far in this process per (op, backend): the proof of what ran. See :func:`reset_counts`."""
    return dict(_COUNTS)


def reset_counts() -> None:
    """Set every counter of :func:`counts` to zero."""
    _COUNTS.clear()


def request_of(op: str, tensor: Tensor, **metadata: Any) -> Request:
    """Describe a call on ``tensor`` (its device and dtype) as a :class:`Request`; ``metadata`` are the other fields."""
    return Request(op, tensor.device.type, _arch(tensor.device), tensor.dtype, **metadata)


def select(request: Request, backend: str | None = None, *, warn: bool = True) -> str:
    """Name of the backend that serves ``request``.

    Args:
        request: what is asked.
        backend: insist on this one; ``None`` asks ``SONIC_BACKEND``, then takes the first that can.
        warn: warn if that is the reference on an accelerator; a call that runs something does.

    Raises:
        ValueError: unknown name.
        UnsupportedError: the backend that was insisted on cannot serve, or none can; with every reason.
    """
    where = f"sonic.{request.op}"
    insisted, source = _insisted(where, request.op, backend)
    if insisted is not None:
        reasons = _reasons(insisted, request, is_insisted=True)
        if reasons:
            raise UnsupportedError(
                f"{where}: {source} is {insisted!r}, which cannot serve this call: " + "; ".join(reasons)
            )
        return insisted
    rejected: list[str] = []
    for name in _BACKENDS:
        reasons = _reasons(name, request, is_insisted=False)
        if not reasons:
            if warn and name == "reference" and request.device_type != "cpu":
                warnings.warn(
                    f"{where} runs in plain torch on {request.device_type}, which is slow ({'; '.join(rejected)}); "
                    "pass backend='reference' to ask for that and silence this",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return name
        rejected.append(f"{name}: {', '.join(reasons)}")
    raise UnsupportedError(f"{where}: no backend can serve {request}: {'; '.join(rejected)}")


def has_kernel(request: Request, backend: str | None) -> bool:
    """Whether the backend that :func:`select` names has a kernel of its own for ``request.op``.

    Raises:
        ValueError, UnsupportedError: as :func:`select`.
    """
    return hasattr(_load(select(request, backend, warn=False)), request.op)


def run(request: Request, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """Run ``request.op`` with these arguments on the backend that :func:`select` names, and count the call.

    Autocast is off inside: the op's dtypes are its contract, whatever context the call is made in.
    """
    name = select(request, backend)
    kernel = getattr(_load(name), request.op)
    _COUNTS[request.op, name] += 1
    if torch.is_autocast_enabled(request.device_type):
        with torch.autocast(request.device_type, enabled=False):
            return kernel(*args, **kwargs)
    return kernel(*args, **kwargs)


def tile_rows(request: Request, backend: str | None = None) -> int:
    """Row tile M that the backend which :func:`select` names uses for ``request``; 1 = no padding.

    Raises:
        ValueError, UnsupportedError: as :func:`select`.
    """
    rows: int = _load(select(request, backend, warn=False)).tile_rows(request)
    return rows


def _imagine(
    op: str,
    device_type: str,
    arch: int | None,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: str,
) -> Request:
    """The request that a layer of these sizes makes of ``op``: what the op has or is told, as ``ops`` fills it."""
    request = functools.partial(Request, op, device_type, arch)
    if op == "combine":
        return request(dtype, num_rows, hidden_size=hidden_size)
    if op in ("topk_softmax", "topk_softmax_bwd", "best_of_columns"):
        return request(torch.promote_types(dtype, torch.float32), num_rows, num_experts)
    if op == "build_plan":
        return request(torch.int32, num_rows, num_experts)
    if op.startswith("up_proj_bwd") and activation in GATED_ACTIVATIONS:
        intermediate_size *= 2
    told = activation if op in _TOLD_THE_ACTIVATION else None
    return request(dtype, num_rows, num_experts, hidden_size, intermediate_size, told)


def _insisted(where: str, op: str, backend: str | None) -> tuple[str | None, str]:
    """The backend that is insisted on for ``op``, and who says so; None where that backend leaves the op to others."""
    name, source = (backend, "backend") if backend is not None else (os.environ.get("SONIC_BACKEND"), "SONIC_BACKEND")
    if not name and backend is None:
        return None, source
    check_choice(where, source, name, _BACKENDS)
    assert name is not None, "one of the names"
    return None if op in left_to_others(name) else name, source


def _reasons(backend: str, request: Request, is_insisted: bool) -> list[str]:
    if not _is_shipped(backend):
        return [f"this version of sonic has no {backend} kernels"]
    module = _load(backend)
    reasons: list[str] = module.unsupported_reasons(request)
    if not is_insisted and not reasons and hasattr(module, "reasons_unless_named"):
        reasons = module.reasons_unless_named(request)
    return reasons


@functools.cache  # whether the package's folder has such a room cannot change while it runs
def _is_shipped(backend: str) -> bool:
    return importlib.util.find_spec(f"sonic.kernels.{backend}") is not None


def _load(backend: str) -> ModuleType:
    return importlib.import_module(f"sonic.kernels.{backend}")


def _arch(device: torch.device) -> int | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
