"""Compiling ahead, in parallel, on any machine: what :func:`sonic.kernels.warmup` asks of this backend."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sonic.kernels.cute.keys import KernelKey, layer_keys

__all__ = ["Compiled", "keys_of", "warmup"]


@dataclass(frozen=True)
class Compiled:
    """One kernel whose object file is on disk now.

    Attributes:
        key: what it depends on.
        found: it was there before.
        seconds: what compiling took, or looking.
    """

    key: KernelKey
    found: bool
    seconds: float


def keys_of(shape: Any, num_tokens: tuple[int, ...], chip: str) -> list[KernelKey]:
    """Keys of all kernels that a layer launches for these numbers of tokens.

    Args:
        shape: a :class:`sonic.kernels.LayerShape`.
        num_tokens: T; every power of two between the least and the most is met too.
        chip: whose measurements go before the model.
    """
    counts = set(num_tokens)
    power = 1
    while power < max(num_tokens):
        power *= 2
        if power > min(num_tokens):
            counts.add(min(power, max(num_tokens)))
    keys: dict[KernelKey, None] = {}
    for count in sorted(counts):
        for training in (True, False) if shape.training else (False,):
            found = layer_keys(
                count * shape.top_k,
                shape.num_experts,
                shape.hidden_size,
                shape.intermediate_size,
                activation=shape.activation,
                glu_layout=shape.glu_layout,
                bias=shape.bias,
                dtype=str(shape.dtype).removeprefix("torch."),
                training=training,
                chip=chip,
            )
            keys.update(dict.fromkeys(found))
    return list(keys)


def warmup(shape: Any, num_tokens: tuple[int, ...], chip: str, workers: int) -> Iterator[Compiled]:
    """Compile what is not on disk, in ``workers`` processes; yields each kernel as it is done.

    Raises:
        ModuleNotFoundError: CuTe-DSL is not installed.
    """
    from sonic.kernels.cute.compiled import on_disk

    missing = []
    for key in keys_of(shape, num_tokens, chip):
        began = time.perf_counter()
        if on_disk(key) is None:
            missing.append(key)
        else:
            yield Compiled(key, True, time.perf_counter() - began)
    if not missing:
        return
    context = multiprocessing.get_context("spawn")  # a compiler's state is not to be forked
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(missing)), context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_ahead, key) for key in missing]):
            yield done.result()


def _ahead(key: KernelKey) -> Compiled:
    """In a process of its own."""
    from sonic.kernels.cute.compiled import compile_ahead

    began = time.perf_counter()
    found = compile_ahead(key) == "found"
    return Compiled(key, found, time.perf_counter() - began)
