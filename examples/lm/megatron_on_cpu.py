"""Megatron-core without a GPU: the few places where it takes one for granted, and a start of its process groups.

Megatron-core's parallelism runs on gloo as it is, but tensors are made on ``torch.cuda.current_device()`` here and
there. :func:`run_on_cpu` answers these with the CPU, for the whole process as long as its context lasts; nothing of it
is needed on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["RMSNorm", "make_parallel", "names_of_transformer_engine", "on_cpu_devices", "run_on_cpu"]


class _Nothing:
    """A stream, or an event: everything is done at once."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Nothing:
        return self

    def record(self, stream: Any = None) -> None: ...


@contextlib.contextmanager
def names_of_transformer_engine() -> Iterator[None]:
    """Give Megatron-core 0.16 a name that it only has beside TransformerEngine, and asks for without it, GPU or not."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    is_missing = not hasattr(moe_utils, "te_general_gemm")
    if is_missing:
        moe_utils.te_general_gemm = None
    try:
        yield
    finally:
        if is_missing:
            del moe_utils.te_general_gemm


@contextlib.contextmanager
def run_on_cpu() -> Iterator[None]:
    """Make Megatron-core 0.16 build and train models on the CPU, within the context."""
    if torch.cuda.is_available():
        raise RuntimeError("run_on_cpu: there is a GPU; nothing has to be changed for it")
    import megatron.core.activations  # noqa: F401  compiles functions, for which torch looks at all of itself: unchanged
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, **options: Any) -> Any:
        if as_numpy and isinstance(tensor, Tensor):
            return tensor.numpy()
        return to_cpu(tensor, as_numpy=as_numpy, **options)

    def nothing() -> Any:
        """A function of its own for each name: torch's compiler wants no two names for one of its functions."""
        return lambda *args, **options: _Nothing()

    def get_state(*args: Any, **options: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *args: Any, **options: Any) -> None:
        torch.set_rng_state(state)

    changes = [
        *((torch.cuda, name, nothing()) for name in ("Stream", "Event", "current_stream", "default_stream")),
        *((torch.cuda, name, nothing()) for name in ("synchronize", "set_device")),
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_state),
        (random, "_get_cuda_rng_state", get_state),
        (random, "_set_cuda_rng_state", set_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu),
    ]
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        with names_of_transformer_engine():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _CpuDevices(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU, and answer as if they lay there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs["device"] = "cpu"
        if function is Tensor.type and len(args) == 1:
            return function(*args, **kwargs).replace("torch.", "torch.cuda.", 1)
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_cpu_devices() -> Iterator[None]:
    """Where Megatron's optimizer and schedules name ``device="cuda"`` themselves, make it the CPU."""
    with _CpuDevices():
        yield


def make_parallel(seed: int = 0, **sizes: int) -> None:
    """Megatron's process groups over the ranks of the default group, and its random states.

    Args:
        seed: of the weights; ranks that share weights draw the same.
        sizes: of ``parallel_state.initialize_model_parallel``.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


class RMSNorm(nn.Module):
    """A norm in plain torch; Megatron's own one for local specs refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **more: Any) -> None:
        """As Megatron builds norms."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
