"""Compile a layer's kernels ahead of its first step: :func:`warmup`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sonic.kernels.checks import GLU_LAYOUTS
from sonic.kernels.dispatch import ACTIVATIONS, unusable_reasons
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["DTYPES", "LayerShape", "warmup"]

_ARCH = 90  # the backend that compiles ahead serves these chips
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerShape:
    """What the kernels of a layer depend on.

    Attributes:
        hidden_size, intermediate_size, num_experts, top_k: D, N, E and K.
        activation, glu_layout, bias, dtype: as in :class:`sonic.MoE`; bf16 or fp16.
        training: with the kernels of backward; else those of inference alone.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    glu_layout: str = "concatenated"
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    training: bool = True

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """That of a :class:`sonic.MoE`, in the dtype of its parameters."""
        fields = ("hidden_size", "intermediate_size", "num_experts", "top_k", "activation", "glu_layout")
        missing = [name for name in (*fields, "w1") if not hasattr(layer, name)]
        if missing:
            raise argument_error(
                "sonic.kernels.warmup", "config", f"a {type(layer).__name__}", "a LayerShape or a sonic.MoE"
            )
        values = {name: getattr(layer, name) for name in fields}
        return cls(**values, bias=getattr(layer, "b1", None) is not None, dtype=layer.w1.dtype)


def warmup(
    config: LayerShape | Any,
    *,
    num_tokens: int | Sequence[int] = (1, 65536),
    chip: str | None = None,
    workers: int | None = None,
) -> Iterator[Any]:
    """Compile all CuTe kernels that a layer may launch, in parallel, onto the disk; needs no GPU.

    A job whose machines share the cache folder (``SONIC_CACHE_DIR``) then starts in milliseconds per kernel. How many
    tokens a step has does not compile anything anew, so a range covers all that lies in it.

    Args:
        config: a :class:`LayerShape`, or a :class:`sonic.MoE`, whose shape is taken.
        num_tokens: T, one number or several; all between the least and the most are covered.
        chip: name of the GPU as torch gives it, where measured configurations are known of it; None: that of the
            GPU that is here, else what the model chooses.
        workers: processes; None: one per CPU core, at most eight.

    Yields:
        One :class:`sonic.kernels.cute.ahead.Compiled` for each kernel, as it is done.

    Raises:
        ValueError: sizes, names or a dtype that do not fit; CuTe-DSL is not installed.
    """
    where = "sonic.kernels.warmup"
    shape = config if isinstance(config, LayerShape) else LayerShape.of(config)
    counts = (num_tokens,) if isinstance(num_tokens, int) else tuple(num_tokens)
    sizes = {name: getattr(shape, name) for name in ("hidden_size", "intermediate_size", "num_experts", "top_k")}
    check_positive(where, **sizes)
    check_choice(where, "activation", shape.activation, ACTIVATIONS)
    check_choice(where, "glu_layout", shape.glu_layout, GLU_LAYOUTS)
    if shape.dtype not in DTYPES:
        raise argument_error(where, "dtype", shape.dtype, " or ".join(map(str, DTYPES)))
    if not counts:
        raise argument_error(where, "num_tokens", num_tokens, "at least one number of tokens")
    for count in counts:
        check_positive(where, num_tokens=count)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    check_positive(where, workers=workers)
    reasons = unusable_reasons("cute", "cuda", _ARCH)
    if reasons:
        raise ValueError(f"{where}: there is nothing to compile with: {'; '.join(reasons)}")
    if chip is None:
        chip = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    ahead = importlib.import_module("sonic.kernels.cute.ahead")
    results: Iterator[Any] = ahead.warmup(shape, counts, chip.replace(" ", "_"), workers)
    return results
