"""``python -m sonic warmup``: compile a layer's kernels ahead."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from sonic.kernels.checks import GLU_LAYOUTS
from sonic.kernels.dispatch import ACTIVATIONS
from sonic.kernels.warming import DTYPES, LayerShape, warmup

__all__ = ["add_warmup_command"]


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
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES], default="bfloat16")
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
