"""Which backend serves what, why not the others, and the proof of what ran."""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import sonic
from sonic import kernels
from sonic.kernels import Explanation, Request, UnsupportedError, dispatch, ops, reference
from sonic.routing import TopKRouter
from tests.helpers import chain_single_ops

SIZES: dict[str, Any] = {"num_tokens": 64, "num_experts": 8, "top_k": 2, "hidden_size": 32, "intermediate_size": 16}
UP_PROJ = Request("up_proj", "cpu", None, torch.float32, 128, 8, 32, 16, "swiglu")

AddBackend = Callable[..., types.ModuleType]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SONIC_BACKEND", raising=False)
    kernels.reset_counts()
    yield
    kernels.reset_counts()


@pytest.fixture
def add_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[AddBackend]:
    """``add_backend(reasons, **kernels)``: put a backend called ``fast`` before the reference, for this test."""

    def add(reasons: Callable[[Request], list[str]], tile_rows: int = 128, **functions: Any) -> types.ModuleType:
        module = types.ModuleType("sonic.kernels.fast")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        members = {"unsupported_reasons": reasons, "tile_rows": lambda request: tile_rows, **functions}
        for name, member in members.items():
            setattr(module, name, member)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(dispatch, "_BACKENDS", ("fast", "reference"))
        dispatch._is_shipped.cache_clear()
        return module

    yield add
    dispatch._is_shipped.cache_clear()


def serves(request: Request) -> list[str]:
    return []


def refuses(request: Request) -> list[str]:
    return ["needs a full moon", f"knows no {request.op}"]


def reference_kernels(*names: str) -> dict[str, Any]:
    return {name: getattr(reference, name) for name in names}


# ---------------------------------------------------------------- what would run


def test_order_of_preference() -> None:
    assert kernels.backends() == ("cute", "triton", "reference")


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize(("device", "arch"), [("cpu", None), ("cuda", 80), ("cuda", 90), ("cuda", 100), ("xpu", None)])
def test_explain_an_imagined_chip(op: str, device: str, arch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any machine answers for any chip, without asking a device."""

    def ask(*_: Any) -> Any:
        raise AssertionError("a device was asked")

    if arch is not None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
        monkeypatch.setattr(torch.cuda, "is_available", ask)
    told = kernels.explain(op, **SIZES, device=device, arch=arch)
    assert told.request.op == op and told.request.device_type == device and told.request.arch == arch
    assert told.request.num_rows == 128 and told.request.num_experts == (0 if op == "combine" else 8)
    assert tuple(told.reasons) == kernels.backends()
    can = [name for name, reasons in told.reasons.items() if not reasons]
    assert told.backend == can[0] and can[-1] == "reference" and told.why == "first that can serve"
    assert all(reason and isinstance(reason, str) for reasons in told.reasons.values() for reason in reasons)
    assert told.tile_rows is not None and told.tile_rows >= 1
    text = str(told)
    assert text.startswith(f"{op} on {device}") and ("sm_90" in text) == (arch == 90)
    assert "reference: can serve" in text and f"row tile: {told.tile_rows}" in text


def test_the_reference_pads_nothing_and_serves_everything() -> None:
    for op, dtype in itertools.product(dispatch.OPS, (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        told = kernels.explain(op, **SIZES, dtype=dtype, backend="reference")
        assert (told.backend, told.tile_rows, told.reasons["reference"]) == ("reference", 1, [])
        assert told.why == "backend insists on reference"


def test_explain_in_words(add_backend: AddBackend) -> None:
    add_backend(refuses)
    told = kernels.explain("up_proj", **SIZES, device="cuda", arch=90)
    assert str(told) == (
        "up_proj on cuda sm_90, bfloat16, R=128: reference (first that can serve)\n"
        "  row tile: 1 (no padding)\n"
        "  fast: needs a full moon; knows no up_proj\n"
        "  reference: can serve"
    )


def test_explain_a_backend_that_can(add_backend: AddBackend) -> None:
    add_backend(serves, tile_rows=64)
    told = kernels.explain("up_proj", **SIZES)
    assert (told.backend, told.tile_rows, told.reasons) == ("fast", 64, {"fast": [], "reference": []})
    assert "row tile: 64" in str(told) and "no padding" not in str(told)


def test_explain_a_backend_that_is_insisted_on_and_cannot(add_backend: AddBackend) -> None:
    add_backend(refuses)
    told = kernels.explain("up_proj", **SIZES, backend="fast")
    assert told.backend is None and told.tile_rows is None
    assert told.why == "backend insists on fast, which cannot serve"
    assert str(told).startswith("up_proj on cpu, bfloat16, R=128: no backend (backend insists on fast")


def test_explain_reads_the_environment(add_backend: AddBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(serves)
    monkeypatch.setenv("SONIC_BACKEND", "reference")
    told = kernels.explain("up_proj", **SIZES)
    assert told.backend == "reference" and told.why == "SONIC_BACKEND insists on reference"
    assert kernels.explain("up_proj", **SIZES, backend="fast").backend == "fast"  # an argument comes first


def test_explanations_are_values() -> None:
    told = kernels.explain("combine", **SIZES)
    assert isinstance(told, Explanation) and told == kernels.explain("combine", **SIZES)
    with pytest.raises(AttributeError):
        told.backend = "cute"  # type: ignore[misc]


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_BACKENDS", ("imaginary", "reference"))
    reason = "this version of sonic has no imaginary kernels"
    assert kernels.unusable_reasons("imaginary", "cuda", 90) == [reason]
    assert kernels.explain("up_proj", **SIZES).reasons == {"imaginary": [reason], "reference": []}
    with pytest.raises(UnsupportedError, match=reason):
        dispatch.select(UP_PROJ, "imaginary")


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_the_reference_is_usable_anywhere(device: str) -> None:
    assert kernels.unusable_reasons("reference", device) == []


@pytest.mark.parametrize("backend", ["cute", "triton"])
def test_kernels_for_gpus_and_this_cpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If they cannot serve a CPU they say why, and insisting on one raises with just those reasons."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = kernels.unusable_reasons(backend, "cpu")
    if not reasons:
        pytest.skip(f"{backend} serves CPU tensors here")
    with pytest.raises(UnsupportedError, match=f"backend is '{backend}', which cannot serve this call: ") as refused:
        dispatch.select(Request("up_proj", "cpu", None, torch.bfloat16), backend)
    assert all(reason in str(refused.value) for reason in reasons)
    with pytest.raises(UnsupportedError, match=f"backend is '{backend}'"):
        sonic.MoE(16, 8, 4, 2, backend=backend)(torch.randn(3, 16))


# ---------------------------------------------------------------- what is chosen


def test_the_first_that_can_is_taken(add_backend: AddBackend) -> None:
    add_backend(serves)
    assert dispatch.select(UP_PROJ) == "fast"


def test_one_that_cannot_is_passed_over(add_backend: AddBackend) -> None:
    add_backend(refuses)
    assert dispatch.select(UP_PROJ) == "reference"


def test_insisting_on_one_that_cannot_raises_with_every_reason(
    add_backend: AddBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backend(refuses)
    words = "which cannot serve this call: needs a full moon; knows no up_proj"
    with pytest.raises(UnsupportedError) as refused:
        dispatch.select(UP_PROJ, "fast")
    assert str(refused.value) == f"sonic.up_proj: backend is 'fast', {words}"
    assert isinstance(refused.value, ValueError)
    monkeypatch.setenv("SONIC_BACKEND", "fast")
    with pytest.raises(UnsupportedError) as refused:
        dispatch.select(UP_PROJ)
    assert str(refused.value) == f"sonic.up_proj: SONIC_BACKEND is 'fast', {words}"
    with pytest.raises(UnsupportedError, match="SONIC_BACKEND is 'fast', which cannot serve"):
        sonic.MoE(16, 8, 4, 2)(torch.randn(3, 16))
    assert dispatch.select(UP_PROJ, "reference") == "reference"


def test_nobody_can(add_backend: AddBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(refuses)
    monkeypatch.setattr(dispatch, "_BACKENDS", ("fast",))
    with pytest.raises(UnsupportedError, match="sonic.up_proj: no backend can serve .*fast: needs a full moon"):
        dispatch.select(UP_PROJ)
    assert kernels.explain("up_proj", **SIZES).why == "none can serve"


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_environment_variable_insists_on_nothing(
    empty: str | None, add_backend: AddBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backend(refuses)
    if empty is not None:
        monkeypatch.setenv("SONIC_BACKEND", empty)
    assert dispatch.select(UP_PROJ) == "reference"


def test_the_environment_reaches_a_layer(add_backend: AddBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in dispatch.OPS if hasattr(reference, name)]
    add_backend(serves, **reference_kernels(*names))
    layer, x = sonic.MoE(16, 8, 4, 2), torch.randn(3, 16)
    for wanted in ("reference", "fast"):
        monkeypatch.setenv("SONIC_BACKEND", wanted)
        kernels.reset_counts()
        layer(x).sum().backward()
        assert {backend for _, backend in kernels.counts()} == {wanted}


@pytest.mark.parametrize("named", [False, True])
def test_a_backend_that_serves_only_by_name(named: bool, add_backend: AddBackend) -> None:
    add_backend(serves, reasons_unless_named=lambda request: ["only by name"])
    told = kernels.explain("up_proj", **SIZES, backend="fast" if named else None)
    assert told.backend == dispatch.select(UP_PROJ, "fast" if named else None) == ("fast" if named else "reference")
    assert told.reasons["fast"] == ([] if named else ["only by name"])
    assert kernels.unusable_reasons("fast", "cpu") == []


def test_usable_is_what_serves_some_dtype(add_backend: AddBackend) -> None:
    add_backend(lambda request: [] if request.dtype == torch.float16 else ["only float16"])
    assert kernels.unusable_reasons("fast", "cpu") == []
    add_backend(lambda request: [] if request.dtype == torch.float64 else [f"not {request.dtype}"])
    assert kernels.unusable_reasons("fast", "cpu") == ["not torch.bfloat16"]


def test_the_reasons_of_one_that_cannot_come_before_how_to_name_it(add_backend: AddBackend) -> None:
    add_backend(refuses, reasons_unless_named=lambda request: ["only by name"])
    assert kernels.explain("up_proj", **SIZES).reasons["fast"] == ["needs a full moon", "knows no up_proj"]


def test_insisting_asks_no_other_backend(add_backend: AddBackend) -> None:
    def explode(request: Request) -> list[str]:
        raise AssertionError("asked")

    add_backend(explode)
    assert dispatch.select(UP_PROJ, "reference") == "reference"
    sonic.MoE(16, 8, 4, 2, backend="reference")(torch.randn(3, 16)).sum().backward()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_the_reference_on_an_accelerator_warns(
    device: str, add_backend: AddBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backend(refuses)
    request = Request("up_proj", device, 90, torch.bfloat16)
    reasons = "fast: needs a full moon, knows no up_proj"
    words = rf"sonic\.up_proj runs in plain torch on {device}, which is slow \({reasons}\)"
    with pytest.warns(RuntimeWarning, match=words):
        assert dispatch.select(request) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select(request, "reference") == "reference"
        assert dispatch.select(UP_PROJ) == "reference"
        monkeypatch.setenv("SONIC_BACKEND", "reference")
        assert dispatch.select(request) == "reference"


def test_no_warning_where_a_kernel_serves(add_backend: AddBackend) -> None:
    add_backend(serves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select(Request("up_proj", "cuda", 90, torch.bfloat16)) == "fast"


# ---------------------------------------------------------------- what ran


def test_counts_prove_what_ran() -> None:
    layer, x = sonic.MoE(16, 8, 4, 2, shared_intermediate_size=8), torch.randn(3, 16)
    assert kernels.counts() == {}
    y = layer(x)
    forward = {("topk_softmax", "reference"): 1, ("build_plan", "reference"): 1, ("experts", "reference"): 2}
    assert kernels.counts() == forward
    y.sum().backward()
    assert kernels.counts() == forward | {("experts_bwd", "reference"): 2, ("topk_softmax_bwd", "reference"): 1}
    told = kernels.counts()
    told.clear()
    assert kernels.counts()[("experts", "reference")] == 2, "what was handed out is a copy"
    kernels.reset_counts()
    assert kernels.counts() == {}


def test_a_call_that_is_refused_is_not_counted(add_backend: AddBackend) -> None:
    add_backend(refuses, **reference_kernels("up_proj"))
    with pytest.raises(UnsupportedError):
        dispatch.run(UP_PROJ, "fast")
    assert kernels.counts() == {}


def test_has_kernel(add_backend: AddBackend) -> None:
    add_backend(serves, **reference_kernels("up_proj"))
    whole = Request("experts", "cpu", None, torch.float32)
    assert dispatch.has_kernel(UP_PROJ, None) and dispatch.has_kernel(UP_PROJ, "fast")
    assert not dispatch.has_kernel(whole, None) and dispatch.has_kernel(whole, "reference")
    add_backend(refuses)
    with pytest.raises(UnsupportedError):
        dispatch.has_kernel(UP_PROJ, "fast")


SINGLE = ("up_proj", "down_proj", "combine")
SINGLE_BWD = ("down_proj_bwd_input", "down_proj_bwd_weight", "up_proj_bwd_input", "up_proj_bwd_weight", "combine")


def test_a_backend_without_a_whole_pass_runs_the_single_ops(add_backend: AddBackend) -> None:
    """Same result, ops counted one by one; what it cannot do goes to the next backend."""
    layer = sonic.MoE(16, 8, 4, 2, bias=True, dtype=torch.float64)
    x, dy = torch.randn(9, 16, dtype=torch.float64, requires_grad=True), torch.randn(9, 16, dtype=torch.float64)
    leaves = (x, *layer.parameters())
    wanted = layer(x)
    wanted_gradients = torch.autograd.grad(wanted, leaves, dy)

    def only_gemms(request: Request) -> list[str]:
        return [] if request.op in (*SINGLE, *SINGLE_BWD, "experts", "experts_bwd") else ["GEMMs and sums only"]

    add_backend(only_gemms, **reference_kernels(*SINGLE, *SINGLE_BWD))
    kernels.reset_counts()
    y = layer(x)
    routing = {("topk_softmax", "reference"): 1, ("build_plan", "reference"): 1}
    assert kernels.counts() == routing | {(op, "fast"): 1 for op in SINGLE}
    gradients = torch.autograd.grad(y, leaves, dy)
    routing[("topk_softmax_bwd", "reference")] = 1
    assert kernels.counts() == routing | {(op, "fast"): 1 for op in SINGLE + SINGLE_BWD} | {("combine", "fast"): 2}
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)


# op -> (hidden_size, intermediate_size, whether the activation is told); D and N as in sonic.shapes
TOLD = {
    "up_proj": (16, 6, True),
    "down_proj": (16, 6, False),
    "down_proj_bwd_input": (16, 6, True),
    "down_proj_bwd_weight": (16, 6, False),
    "up_proj_bwd_input": (16, 6, False),
    "up_proj_bwd_weight": (16, 6, False),
    "experts": (16, 6, True),
    "experts_bwd": (16, 6, True),
    "combine": (16, 0, False),
    "topk_softmax": (0, 0, False),
    "topk_softmax_bwd": (0, 0, False),
    "build_plan": (0, 0, False),
}


def requests_of_a_layer(activation: str, add_backend: AddBackend) -> dict[str, Request]:
    """What each op of a forward and backward (T 9, D 16, N 6, E 4, K 2) is described as."""
    seen: dict[str, Request] = {}

    def watch(request: Request) -> list[str]:
        seen[request.op] = request
        return []

    names = ("topk_softmax", "topk_softmax_bwd", "build_plan", *SINGLE, *SINGLE_BWD)
    add_backend(watch, **reference_kernels(*names))
    layer = sonic.MoE(16, 6, 4, 2, activation=activation)
    layer(torch.randn(9, 16, requires_grad=True)).sum().backward()
    return seen


@pytest.mark.parametrize("op", TOLD)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_requests_tell_the_shapes(activation: str, op: str, add_backend: AddBackend) -> None:
    request = requests_of_a_layer(activation, add_backend)[op]
    hidden_size, intermediate_size, has_activation = TOLD[op]
    if op.startswith("up_proj_bwd") and activation == "swiglu":
        intermediate_size *= 2  # not told the activation, they give U
    assert (request.device_type, request.arch, request.num_rows) == ("cpu", None, 18)
    assert request.num_experts == (0 if op == "combine" else 4)
    assert (request.hidden_size, request.intermediate_size) == (hidden_size, intermediate_size)
    assert request.activation == (activation if has_activation else None)
    assert request.dtype == (torch.int32 if op == "build_plan" else torch.float32)


@pytest.mark.parametrize("whole", [False, True], ids=["single ops", "whole pass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_explain_asks_what_a_layer_asks(
    activation: str, dtype: torch.dtype, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request of ``explain`` is the one that each op of a layer of these sizes makes."""
    seen: dict[str, Request] = {}
    reasons = reference.unsupported_reasons

    def watch(request: Request) -> list[str]:
        assert seen.setdefault(request.op, request) == request
        return reasons(request)

    monkeypatch.setattr(reference, "unsupported_reasons", watch)
    if not whole:
        chain_single_ops(monkeypatch)
    layer = sonic.MoE(16, 6, 4, 2, activation=activation, dtype=dtype)
    layer(torch.randn(9, 16, dtype=dtype, requires_grad=True)).sum().backward()
    expected = {"experts", "experts_bwd"} if whole else {*SINGLE, *SINGLE_BWD}
    assert seen.keys() == {"topk_softmax", "topk_softmax_bwd", "build_plan", *expected}
    for op, request in seen.items():
        told = kernels.explain(
            op,
            num_tokens=9,
            num_experts=4,
            top_k=2,
            hidden_size=16,
            intermediate_size=6,
            dtype=dtype,
            activation=activation,
        )
        assert told.request == request


@pytest.mark.parametrize("op", ["experts", "experts_bwd", "up_proj"])
def test_one_warning_per_call(op: str, add_backend: AddBackend) -> None:
    """Asking for a kernel and running it is one call, and asking alone warns of nothing."""
    names = [name for name in dispatch.OPS if hasattr(reference, name)]
    add_backend(refuses)
    request = Request(op, "cuda", 90, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.has_kernel(request, None) == (op in names)
        assert dispatch.tile_rows(request) == 1
    x, w1, w2 = torch.randn(3, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 6)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    weights: dict[str, tuple[Any, ...]] = {
        "up_proj": (x, w1, None, None, offsets),
        "experts": (x, w1, w2, None, None, None, offsets, None),
        "experts_bwd": (x, x, None, w1, w2, None, None, None, offsets, None),
    }
    flags = (True,) * 3 + (False,) * 2 + (True,) if op == "experts_bwd" else (True,)
    with pytest.warns(RuntimeWarning) as told:
        assert dispatch.has_kernel(request, None)
        dispatch.run(request, None, *weights[op], "gelu", "concatenated", *flags)
    assert [str(warning.message).split(",")[0] for warning in told] == [f"sonic.{op} runs in plain torch on cuda"]


def test_autocast_is_off_inside_a_kernel(add_backend: AddBackend) -> None:
    inside = []

    def up_proj(*arguments: Any) -> Any:
        inside.append(torch.is_autocast_enabled("cpu"))
        return reference.up_proj(*arguments)

    add_backend(serves, up_proj=up_proj)
    x, w1, offsets = torch.randn(3, 4), torch.randn(2, 6, 4), torch.tensor([0, 1, 3], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h_RU, a_RN = ops.up_proj(x, w1, None, None, offsets, "gelu", "concatenated")
        assert torch.is_autocast_enabled("cpu")
    assert inside == [False] and h_RU.dtype == a_RN.dtype == torch.float32


def test_routing_takes_the_layers_backend(add_backend: AddBackend) -> None:
    """A layer that insists on a backend insists for its router too; a router may choose for itself."""
    names = [name for name in dispatch.OPS if hasattr(reference, name)]
    add_backend(serves, **reference_kernels(*names))
    x = torch.randn(3, 16)
    sonic.MoE(16, 8, 4, 2, backend="reference")(x)
    assert {backend for _, backend in kernels.counts()} == {"reference"}
    kernels.reset_counts()
    sonic.MoE(16, 8, 4, 2, router=TopKRouter(16, 4, 2, backend="reference"), backend="fast")(x)
    assert kernels.counts() == {
        ("topk_softmax", "reference"): 1,
        ("build_plan", "reference"): 1,
        ("experts", "fast"): 1,
    }
