"""From the sizes of a call to the key of the kernel that serves it: what launching and compiling ahead share.

Imports no CuTe-DSL. Sizes enter a key by the configuration that they lead to, so a layer meets few keys however many
tokens it is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sonic.kernels.cute.config import KINDS, TileConfig, choose, invalid_reason, rows_bucket
from sonic.shapes import argument_error, check_choice

__all__ = [
    "BIAS_COLUMNS",
    "GATED_ACTIVATIONS",
    "KernelKey",
    "Sizes",
    "contraction_key",
    "forced",
    "layer_keys",
    "rows_key",
]

GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_oai")

DEFAULT_CHIP = "H100"

BIAS_COLUMNS = 8
"""Columns of the narrowest matrix whose rows TMA takes, 16 bytes: a bias gradient is a product with such a one."""


_FORCED: ContextVar[dict[str, TileConfig] | None] = ContextVar("sonic_cute_forced_configs", default=None)


@contextlib.contextmanager
def forced(configs: dict[str, TileConfig]) -> Iterator[None]:
    """Grouped GEMMs of these kinds that are launched in this thread inside take these configurations: for measurements
    and tests. The row tile that :func:`sonic.kernels.ops.tile_rows` tells stays the model's.

    Args:
        configs: by kind, of :data:`sonic.kernels.cute.config.KINDS`; other kinds keep what they have.

    Raises:
        ValueError: unknown kind, or a configuration of which no such kernel can be made.
    """
    where = "sonic.kernels.cute.keys.forced"
    for kind, config in configs.items():
        check_choice(where, "kind", kind, KINDS)
        reason = invalid_reason(config, kind)
        if reason is not None:
            raise argument_error(where, kind, f"{config} ({reason})", "a configuration that this kind can have")
    token = _FORCED.set({**(_FORCED.get() or {}), **configs})
    try:
        yield
    finally:
        _FORCED.reset(token)


@dataclass(frozen=True)
class KernelKey:
    """What a compiled kernel depends on: scalars only. Sizes are no part of it.

    Attributes:
        op: name of the op.
        config: tile and schedule.
        dtype: of the operands, ``"bfloat16"`` or ``"float16"``.
        gathers: rows are named by an index.
        activation: a name in ``sonic.ACTIVATIONS``; None for ops without one.
        glu_layout: of a gated activation's H and W1, else None.
        out_dtype: of what a contraction stores; None: the operands'.
        flags: which optional tensors there are: ``"h"``, ``"bias"``, ``"scores"``; ``"adds"``: a contraction adds.
    """

    op: str
    config: TileConfig
    dtype: str
    gathers: bool = False
    activation: str | None = None
    glu_layout: str | None = None
    out_dtype: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Of one grouped GEMM.

    Attributes:
        num_rows: R.
        num_experts: E.
        width_n: columns of the product.
        width_k: of the contraction; for a contraction over rows, the rows of the product.
        dtype: of the operands.
        chip: whose measurements go before the model.
    """

    num_rows: int
    num_experts: int
    width_n: int
    width_k: int
    dtype: str
    chip: str = DEFAULT_CHIP

    def config(self, kind: str) -> TileConfig:
        """The configuration for a kind of GEMM of these sizes: forced, measured or the model's."""
        configs = _FORCED.get()
        if configs and kind in configs:
            return configs[kind]
        bucket = rows_bucket(self.num_rows, self.num_experts)
        return choose(kind, bucket, self.num_experts, self.width_k, self.width_n, self.chip).config


def rows_key(
    op: str,
    sizes: Sizes,
    *,
    gathers: bool = False,
    activation: str | None = None,
    glu_layout: str | None = None,
    flags: tuple[str, ...] = (),
) -> KernelKey:
    """Key of a GEMM whose row tiles vary; the arguments as in :class:`KernelKey`."""
    gated = activation in GATED_ACTIVATIONS
    kind = {"up_proj": "up", "down_proj_bwd_input": "down_bwd"}.get(op, "rows")
    if kind != "rows":
        kind += "_gated" if gated else "_plain"
    layout = glu_layout if gated else None
    return KernelKey(op, sizes.config(kind), sizes.dtype, gathers, activation, layout, flags=flags)


def contraction_key(op: str, sizes: Sizes, *, gathers: bool, out_dtype: str, adds: bool = False) -> KernelKey:
    """Key of a GEMM over each expert's rows; the arguments as in :class:`KernelKey`."""
    flags = ("adds",) if adds else ()
    return KernelKey(op, sizes.config("contraction"), sizes.dtype, gathers, out_dtype=out_dtype, flags=flags)


def layer_keys(
    num_rows: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    bias: bool = False,
    dtype: str = "bfloat16",
    training: bool = True,
    chip: str = DEFAULT_CHIP,
) -> list[KernelKey]:
    """Keys of all kernels that ``sonic.moe_mlp`` launches for such a layer.

    Args:
        num_rows, num_experts, hidden_size, intermediate_size: R, E, D and N.
        activation, glu_layout, bias, dtype: of the layer.
        training: with a backward pass; else those of inference.
        chip: whose measurements go before the model.
    """
    width_d, width_n = hidden_size, intermediate_size
    width_u = 2 * width_n if activation in GATED_ACTIVATIONS else width_n
    biased = ("bias",) if bias else ()

    def sizes(columns: int, k: int) -> Sizes:
        return Sizes(num_rows, num_experts, columns, k, dtype, chip)

    stores = ("h", *biased) if training else biased
    options: dict[str, Any] = {"gathers": True, "activation": activation, "glu_layout": glu_layout}
    keys = [
        rows_key("up_proj", sizes(width_u, width_d), flags=stores, **options),
        rows_key("down_proj", sizes(width_d, width_n), flags=biased),
    ]
    if training:
        keys += [
            rows_key("down_proj_bwd_input", sizes(width_n, width_d), flags=("scores",), **options),
            rows_key("up_proj_bwd_input", sizes(width_d, width_u)),
            contraction_key("down_proj_bwd_weight", sizes(width_n, width_d), gathers=True, out_dtype=dtype),
            contraction_key("up_proj_bwd_weight", sizes(width_d, width_u), gathers=True, out_dtype=dtype),
        ]
        if bias:
            op = "down_proj_bwd_weight"
            for width in (width_d, width_u):
                keys.append(contraction_key(op, sizes(BIAS_COLUMNS, width), gathers=True, out_dtype="float32"))
    return list(dict.fromkeys(keys))
