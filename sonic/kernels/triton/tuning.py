"""Configurations measured on the device that is here, kept in a file, and used instead of the model's where they fit.

Optional: nothing is measured unless :func:`tune` is called, or ``python -m sonic.kernels.triton.tuning`` is run on a
GPU. What was measured is keyed by op, bucket of rows per expert (a power of two, never the number of tokens), experts,
widths and dtype. It holds for one kind of chip, on others the model goes on choosing, and for one version of Triton;
that of another is refused. The row tile is not tuned, because the kernels of a layer and token rounding share it.

    python -m sonic.kernels.triton.tuning --shape 24576,1536,256,128,8 --out tuned.json
    SONIC_TRITON_TUNED=tuned.json python train.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from sonic.kernels.triton.config import CONFIGS, FAMILY_OF, GemmConfig, choose, fits, row_tile, rows_bucket
from sonic.kernels.triton.target import Target, target_of
from sonic.shapes import argument_error, check_positive

__all__ = [
    "TUNED_FILE",
    "GemmKey",
    "TunedConfigs",
    "candidates",
    "config_of",
    "forced",
    "load",
    "main",
    "save",
    "tune",
    "use",
]

TUNED_FILE = "SONIC_TRITON_TUNED"
"""Environment variable that names a file to use from the first kernel on; not set: the model chooses."""

_FORMAT = 1
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class GemmKey:
    """What one configuration is for.

    Attributes:
        op: name of the op.
        kind: one of :data:`sonic.kernels.triton.config.KINDS`.
        bucket: of rows per expert, see :func:`sonic.kernels.triton.config.rows_bucket`.
        num_experts, width_k, width_n: E and the widths, as in :func:`sonic.kernels.triton.config.choose`.
        dtype: of the operands.
    """

    op: str
    kind: str
    bucket: int
    num_experts: int
    width_k: int
    width_n: int
    dtype: torch.dtype

    def __str__(self) -> str:
        """The key as the file has it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}/{self.kind}/{self.bucket}/{self.num_experts}/{self.width_k}/{self.width_n}/{dtype}"

    @staticmethod
    def parse(text: str) -> GemmKey:
        """The inverse of ``str``.

        Raises:
            ValueError: not such a text.
        """
        op, kind, bucket, num_experts, width_k, width_n, dtype = text.split("/")
        if dtype not in _DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}")
        return GemmKey(op, kind, int(bucket), int(num_experts), int(width_k), int(width_n), _DTYPES[dtype])


@dataclass
class TunedConfigs:
    """Measured configurations.

    Attributes:
        target: name of the chip's kind, such as ``"sm_90"``.
        triton_version: that compiled them.
        configs: the fastest by key.
        microseconds: its median time by key.
    """

    target: str
    triton_version: str = triton.__version__
    configs: dict[GemmKey, GemmConfig] = field(default_factory=dict)
    microseconds: dict[GemmKey, float] = field(default_factory=dict)


class _InUse:
    """The table that kernels look into; the file of :data:`TUNED_FILE` is read when the first of them asks."""

    def __init__(self) -> None:
        self.table: TunedConfigs | None = None
        self.is_decided = False


_IN_USE = _InUse()
_FORCED: ContextVar[GemmConfig | None] = ContextVar("sonic_triton_forced_config", default=None)


def use(tuned: TunedConfigs | None) -> None:
    """Use these configurations from now on in this process; None: the model's, whatever :data:`TUNED_FILE` says."""
    _IN_USE.table, _IN_USE.is_decided = tuned, True
    _lookup.cache_clear()


@contextlib.contextmanager
def forced(config: GemmConfig) -> Iterator[None]:
    """Every grouped GEMM launched in this thread inside takes ``config``: for measurements and tests."""
    token = _FORCED.set(config)
    try:
        yield
    finally:
        _FORCED.reset(token)


def config_of(key: GemmKey, target: Target) -> GemmConfig:
    """The configuration that a launch takes: forced, measured for this key and target, or the model's.

    Raises:
        ValueError: the file that :data:`TUNED_FILE` names cannot be used.
    """
    config = _FORCED.get()
    return _lookup(key, target) if config is None else config


@functools.cache
def _lookup(key: GemmKey, target: Target) -> GemmConfig:
    if not _IN_USE.is_decided:
        path = os.environ.get(TUNED_FILE)
        _IN_USE.table, _IN_USE.is_decided = (load(path) if path else None), True
    table = _IN_USE.table
    if table is not None and table.target == target.name and key in table.configs:
        return table.configs[key]
    return choose(key.kind, key.bucket, key.num_experts, key.width_k, key.width_n, key.dtype, target)


def save(tuned: TunedConfigs, path: str | Path) -> None:
    """Write to ``path``, whole or not at all; entries that the file has for other keys stay.

    Raises:
        ValueError: the file is there and cannot be used, see :func:`load`, or is of another target.
    """
    path = Path(path)
    earlier = load(path) if path.exists() else TunedConfigs(tuned.target)
    if earlier.target != tuned.target:
        was = f"{str(path)!r}, measured on {earlier.target}"
        raise argument_error("sonic.kernels.triton.tuning.save", "path", was, f"one measured on {tuned.target}")
    configs = {**earlier.configs, **tuned.configs}
    microseconds = {**earlier.microseconds, **tuned.microseconds}
    entries = {
        str(key): {**dataclasses.asdict(config), "microseconds": microseconds.get(key)}
        for key, config in sorted(configs.items(), key=lambda item: str(item[0]))
    }
    content = {"format": _FORMAT, "target": tuned.target, "triton": tuned.triton_version, "configs": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def load(path: str | Path) -> TunedConfigs:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: no such file, not of this format, or made by another version of Triton.
    """
    where = "sonic.kernels.triton.tuning.load"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argument_error(where, "path", f"{str(path)!r} ({error})", "a file that tuning has written") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise argument_error(where, "path", repr(str(path)), f"a file that tuning has written (format {_FORMAT})")
    try:
        target, version, entries = content["target"], content["triton"], content["configs"]
    except KeyError as error:
        raise argument_error(
            where, "path", f"{str(path)!r} without {error}", "a file that tuning has written"
        ) from error
    if version != triton.__version__:
        was = f"{str(path)!r}, measured with Triton {version}"
        raise argument_error(where, "path", was, f"one measured with Triton {triton.__version__}: tune again")
    tuned = TunedConfigs(target, version)
    try:
        for text, entry in entries.items():
            key = GemmKey.parse(text)
            microseconds = entry.pop("microseconds")
            tuned.configs[key] = GemmConfig(**entry)
            if microseconds is not None:
                tuned.microseconds[key] = float(microseconds)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise argument_error(where, "path", f"{str(path)!r} ({error})", "a file that tuning has written") from error
    return tuned


def candidates(kind: str, bucket: int, dtype: torch.dtype, target: Target) -> list[GemmConfig]:
    """What :func:`tune` tries: each tile of the row tile that fits, persistent or not, with and without descriptors."""
    size = torch.empty(0, dtype=dtype).element_size()
    tiles = [config for config in CONFIGS[FAMILY_OF[target.name]][kind, size] if fits(config, dtype, target)]
    if kind == "contraction":
        return tiles
    tiles = [config for config in tiles if config.block_m == row_tile(bucket, dtype, target)]
    return [
        dataclasses.replace(config, persistent=persistent, descriptors=descriptors)
        for config in tiles
        for persistent in (False, True)
        for descriptors in ((False, True) if target.has_descriptors and size == 2 else (False,))
    ]


def tune(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    device: str | torch.device = "cuda",
    measure: Callable[[Callable[[], Any]], float] | None = None,
    report: Callable[[str], Any] | None = None,
) -> TunedConfigs:
    """Time every candidate of the six grouped GEMMs of one layer on unit-scale random values and uniform routing.

    Args:
        num_tokens, hidden_size, intermediate_size, num_experts, top_k: T, D, N, E and K.
        dtype: of the matrices.
        activation, glu_layout: as in ``sonic.moe_mlp``.
        device: where.
        measure: median milliseconds of a call; None: ``triton.testing.do_bench``.
        report: gets a line per candidate.

    Returns:
        The fastest of each; nothing is used or written yet, see :func:`use` and :func:`save`.

    Raises:
        ValueError: sizes that are not positive, a dtype without kernels.
    """
    where = "sonic.kernels.triton.tuning.tune"
    sizes = (num_tokens, hidden_size, intermediate_size, num_experts, top_k)
    names = ("num_tokens", "hidden_size", "intermediate_size", "num_experts", "top_k")
    check_positive(where, **dict(zip(names, sizes, strict=True)))
    if dtype not in _DTYPES.values():
        raise argument_error(where, "dtype", dtype, " or ".join(_DTYPES))
    if top_k > num_experts:
        raise argument_error(where, "top_k", top_k, f"at most num_experts = {num_experts}")
    if measure is None:
        measure = functools.partial(triton.testing.do_bench, return_mode="median")
    device = torch.device(device)
    target, tuned = target_of(device), TunedConfigs(target_of(device).name)
    bucket = rows_bucket(num_tokens * top_k, num_experts)
    for key, call in _calls(sizes, bucket, dtype, activation, glu_layout, device):
        best = math.inf
        for config in candidates(key.kind, bucket, dtype, target):
            with forced(config):
                microseconds = 1000 * measure(call)
            if report is not None:
                report(f"{key.op}: {microseconds:.1f} us with {config}")
            if microseconds < best:
                best = microseconds
                tuned.configs[key], tuned.microseconds[key] = config, microseconds
    return tuned


def _calls(
    sizes: Sequence[int],
    bucket: int,
    dtype: torch.dtype,
    activation: str,
    glu_layout: str,
    device: torch.device,
) -> Iterator[tuple[GemmKey, Callable[[], Any]]]:
    """Each grouped GEMM of the layer, with its key."""
    from sonic.kernels.triton import grouped_gemm as gemm  # it asks this module for configurations

    tokens, width_d, width_n, experts, top_k = sizes
    width_u = gemm.up_rows(width_n, activation)
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

    def key(op: str, kind: str, width_k: int, width: int) -> GemmKey:
        return GemmKey(op, kind, bucket, experts, width_k, width, dtype)

    up = "up_gated" if width_u != width_n else "up_plain"
    yield key("up_proj", up, width_d, width_u), lambda: gemm.up_proj(x, w1, None, token, offset, *names, True)
    yield key("down_proj", "rows", width_n, width_d), lambda: gemm.down_proj(a, w2, None, None, offset)
    yield (
        key("down_proj_bwd_input", "down_bwd", width_d, width_n),
        lambda: gemm.down_proj_bwd_input(x, h, w2, None, scores, token, offset, *names, True, True),
    )
    yield (
        key("down_proj_bwd_weight", "contraction", width_d, width_n),
        lambda: gemm.down_proj_bwd_weight(x, a, scores, token, offset, True, False),
    )
    yield key("up_proj_bwd_input", "rows", width_u, width_d), lambda: gemm.up_proj_bwd_input(h, w1, offset)
    yield (
        key("up_proj_bwd_weight", "contraction", width_u, width_d),
        lambda: gemm.up_proj_bwd_weight(h, x, token, offset, True, False),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sonic.kernels.triton.tuning``: tune for one layer, and add it to a file.

    Args:
        arguments: of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m sonic.kernels.triton.tuning", description=main.__doc__)
    parser.add_argument(
        "--shape", required=True, metavar="T,D,N,E,K", help="tokens, widths, experts and experts per token"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16")
    parser.add_argument("--activation", default="swiglu")
    parser.add_argument("--glu-layout", default="concatenated")
    parser.add_argument("--out", required=True, type=Path, help="file to write, or to add to")
    options = parser.parse_args(arguments)
    try:
        tokens, width_d, width_n, experts, top_k = (int(part) for part in options.shape.split(","))
    except ValueError:
        parser.error(f"--shape is {options.shape!r}, expected five integers T,D,N,E,K")
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and finds none")
    names = {"activation": options.activation, "glu_layout": options.glu_layout, "dtype": _DTYPES[options.dtype]}
    sizes = (tokens, width_d, width_n, experts, top_k)
    tuned = tune(*sizes, **names, report=lambda line: sys.stdout.write(line + "\n"))
    save(tuned, options.out)
    sys.stdout.write(f"written: {options.out} ({len(tuned.configs)} kernels, {tuned.target})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
