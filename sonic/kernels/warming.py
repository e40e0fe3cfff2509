"""Compile a layer's kernels ahead of its first step: :func:`warmup`, and ``python -m sonic warmup``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sonic.kernels.checks import GLU_LAYOUTS
from sonic.kernels.dispatch import ACTIVATIONS, unusable_reasons
from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["LayerShape", "add_warmup_command", "warmup"]

_ARCH = 90  # the backend that compiles ahead serves these chips
_DTYPES = (torch.bfloat16, torch.float16)


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
    if shape.dtype not in _DTYPES:
        raise argument_error(where, "dtype", shape.dtype, " or ".join(map(str, _DTYPES)))
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


def add_warmup_command(commands: Any) -> None:
    """Add ``warmup`` to the subparsers of ``python -m sonic``."""
    parser = commands.add_parser(
        "warmup",
        help="compile a layer's CuTe kernels ahead, in parallel, with no GPU",
        description="Compile all CuTe kernels that a layer may launch and keep them on disk. Needs no GPU. "
        "Exit code: 0 if all of them are there.",
    )
    for name, letter in (("hidden-size", "D"), ("intermediate-size", "N"), ("num-experts", "E"), ("top-k", "K")):
        parser.add_argument(f"--{name}", type=int, required=True, metavar=letter)
    parser.add_argument(
        "--num-tokens", type=int, nargs="+", default=[1, 65536], metavar="T", help="range, default 1 65536"
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, default="swiglu")
    parser.add_argument("--glu-layout", choices=GLU_LAYOUTS, default="concatenated")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in _DTYPES], default="bfloat16")
    parser.add_argument("--inference", action="store_true", help="the kernels of inference alone")
    parser.add_argument("--chip", help="name of the GPU, where measured configurations are known of it")
    parser.add_argument("--workers", type=int, help="processes; default: one per core, at most 8")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    shape = LayerShape(
        options.hidden_size,
        options.intermediate_size,
        options.num_experts,
        options.top_k,
        options.activation,
        options.glu_layout,
        options.bias,
        getattr(torch, options.dtype),
        not options.inference,
    )
    try:
        results = warmup(shape, num_tokens=options.num_tokens, chip=options.chip, workers=options.workers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    began = time.perf_counter()
    found = made = 0
    for result in results:
        found, made = found + result.found, made + (not result.found)
        config = result.key.config
        mode = "pingpong" if config.pingpong else "cooperative"
        tile = f"{config.tile_m} x {config.tile_n}, {config.slots} slots, {mode}, cluster of {config.cluster_m}"
        what = "found" if result.found else f"compiled in {result.seconds:.1f} s"
        print(f"{result.key.op:22} {tile:52} {what}", flush=True)
    print(f"{found + made} kernels: {made} compiled, {found} found, in {time.perf_counter() - began:.1f} s")
    return 0
