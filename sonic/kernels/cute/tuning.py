"""Measure the configurations of a layer's kernels on the GPU that is here, and keep the fastest as data.

    python -m sonic.kernels.cute.tuning --shape 24576,1536,256,128,8 --out sonic/kernels/cute/tuned

writes, or adds to, ``<out>/<name of the GPU>.json``. What lies in the ``tuned`` folder of this package goes before the
model on GPUs of that name (:func:`sonic.kernels.cute.config.tuned`). Choices are keyed by kind, regime of rows per
expert, experts and widths, never by the number of tokens. The row tile is not tuned, because the kernels of a layer and
token rounding share it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sonic.kernels.cute import launch
from sonic.kernels.cute.config import TileConfig, fitting, regime_key, rows_bucket
from sonic.kernels.cute.keys import GATED_ACTIVATIONS, forced
from sonic.shapes import argument_error, check_positive

__all__ = ["main", "save", "tune"]

_ROUNDS = 20
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Measure = Callable[[Callable[[], Any]], float]


def tune(
    sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    device: str | torch.device = "cuda",
    measure: Measure | None = None,
    report: Callable[[str], Any] = lambda line: None,
) -> dict[str, tuple[TileConfig, float]]:
    """Time every candidate of the six grouped GEMMs of one layer, on unit-scale values and uniform routing.

    Args:
        sizes: T, D, N, E and K.
        dtype: bf16 or fp16.
        activation, glu_layout: as in ``sonic.moe_mlp``.
        device: where.
        measure: median microseconds of a call; None: between CUDA events, with L2 flushed before each call.
        report: gets a line per candidate.

    Returns:
        By key of :func:`sonic.kernels.cute.config.tuned`: the fastest configuration and its microseconds. Nothing is
        used or written yet, see :func:`save`.

    Raises:
        ValueError: sizes that are not five positive integers, or a dtype without kernels.
    """
    where = "sonic.kernels.cute.tuning.tune"
    if len(sizes) != 5:
        raise argument_error(where, "sizes", tuple(sizes), "five: T, D, N, E and K")
    check_positive(where, **dict(zip(("T", "D", "N", "E", "K"), sizes, strict=True)))
    if dtype not in _DTYPES.values():
        raise argument_error(where, "dtype", dtype, " or ".join(_DTYPES))
    tokens, _, _, experts, top_k = sizes
    if top_k > experts:
        raise argument_error(where, "sizes", tuple(sizes), f"K of at most E = {experts}")
    measure = _between_events if measure is None else measure
    bucket = rows_bucket(tokens * top_k, experts)
    best: dict[str, tuple[TileConfig, float]] = {}
    for kind, width_k, width_n, call in _calls(sizes, dtype, activation, glu_layout, torch.device(device)):
        key = regime_key(kind, bucket, experts, width_k, width_n)
        for config in fitting(kind, bucket):
            with forced({kind: config}):
                microseconds = measure(call)
            report(f"{key}: {microseconds:.1f} us with {config}")
            if microseconds < best.get(key, (config, math.inf))[1]:
                best[key] = (config, microseconds)
    return best


def save(best: dict[str, tuple[TileConfig, float]], folder: Path, chip: str, command: str) -> Path:
    """Add choices to the file of a GPU, whole or not at all; returns its path.

    Args:
        best: by :func:`tune`.
        folder: where; made if it is not there.
        chip: name of the GPU, as torch gives it.
        command: that measured them.
    """
    path = folder / f"{chip.replace(' ', '_')}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"choices": {}, "measured": []}
    for key, (config, _) in best.items():
        content["choices"][key] = dataclasses.asdict(config)
    content["measured"].append(
        {
            "chip": chip,
            "date": datetime.date.today().isoformat(),
            "command": command,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "nvidia-cutlass-dsl")},
            "microseconds": {key: round(microseconds, 2) for key, (_, microseconds) in best.items()},
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as part:
        json.dump(content, part, indent=1)
        part.write("\n")
    os.replace(part.name, path)
    return path


def _between_events(call: Callable[[], Any]) -> float:
    call()  # compiles
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # more than L2
    times = []
    for _ in range(_ROUNDS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def _calls(
    sizes: Sequence[int], dtype: torch.dtype, activation: str, glu_layout: str, device: torch.device
) -> Iterator[tuple[str, int, int, Callable[[], Any]]]:
    """Each grouped GEMM of the layer: its kind, its widths, and a call of it."""
    tokens, width_d, width_n, experts, top_k = sizes
    gated = activation in GATED_ACTIVATIONS
    width_u = 2 * width_n if gated else width_n
    draw = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype)

    expert_of_slot = torch.rand(tokens, experts, generator=draw, device=device).argsort(1)[:, :top_k].reshape(-1)
    count_E = torch.bincount(expert_of_slot, minlength=experts)
    offset = torch.nn.functional.pad(count_E.cumsum(0), (1, 0)).int()
    token = (torch.sort(expert_of_slot, stable=True).indices // top_k).int()
    rows = tokens * top_k
    x, w1, w2 = normal(tokens, width_d), normal(experts, width_u, width_d), normal(experts, width_d, width_n)
    h, a, scores = normal(rows, width_u), normal(rows, width_n), torch.rand(rows, generator=draw, device=device)
    names = (activation, glu_layout)
    mixed = "gated" if gated else "plain"
    yield f"up_{mixed}", width_d, width_u, lambda: launch.up_proj(x, w1, None, token, offset, *names, True)
    yield "rows", width_n, width_d, lambda: launch.down_proj(a, w2, None, None, offset)
    yield (
        f"down_bwd_{mixed}",
        width_d,
        width_n,
        lambda: launch.down_proj_bwd_input(x, h, w2, None, scores, token, offset, *names, True, True),
    )
    yield (
        "contraction",
        width_d,
        width_n,
        lambda: launch.down_proj_bwd_weight(x, a, scores, token, offset, True, False),
    )
    yield "rows", width_u, width_d, lambda: launch.up_proj_bwd_input(h, w1, offset)
    yield "contraction", width_u, width_d, lambda: launch.up_proj_bwd_weight(h, x, token, offset, True, False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune for one layer, and add what is fastest to the file of the GPU that is here; returns an exit code.

    Args:
        arguments: of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m sonic.kernels.cute.tuning", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--shape", required=True, metavar="T,D,N,E,K", help="tokens, widths, experts, experts per token"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16")
    parser.add_argument("--activation", default="swiglu")
    parser.add_argument("--glu-layout", default="concatenated")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("there is no Hopper GPU here to measure on")
    try:
        sizes = [int(part) for part in options.shape.split(",")]
        best = tune(
            sizes,
            dtype=_DTYPES[options.dtype],
            activation=options.activation,
            glu_layout=options.glu_layout,
            report=lambda line: sys.stdout.write(line + "\n"),
        )
    except ValueError as error:
        parser.error(str(error))
    command = "python -m sonic.kernels.cute.tuning " + " ".join(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.write(f"wrote {save(best, options.out, torch.cuda.get_device_name(), command)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
