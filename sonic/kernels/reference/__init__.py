"""Plain torch: the definition of right on any device and in any float dtype, and the fast path on a CPU.

On a CPU each grouped GEMM is one pass over the rows of one expert after another: rows are gathered into one small block
that stays in cache, multiplied into their place in the output, and the activation or its derivative is taken while the
block is still there. On another device the same code runs, but reads the expert offsets to the host: right, not fast.
"""

from __future__ import annotations

from sonic.kernels.reference.combine import combine
from sonic.kernels.reference.grouped_gemm import (
    down_proj,
    down_proj_bwd_input,
    down_proj_bwd_weight,
    up_proj,
    up_proj_bwd_input,
    up_proj_bwd_weight,
)
from sonic.kernels.reference.routing import build_plan, topk_softmax, topk_softmax_bwd
from sonic.kernels.reference.selection import best_of_columns
from sonic.kernels.reference.whole_pass import experts, experts_bwd

__all__ = [
    "best_of_columns",
    "build_plan",
    "combine",
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "experts",
    "experts_bwd",
    "tile_rows",
    "topk_softmax",
    "topk_softmax_bwd",
    "unsupported_reasons",
    "up_proj",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
]


def unsupported_reasons(request: object) -> list[str]:
    """Why this backend cannot serve ``request``: never, every op runs in plain torch."""
    return []


def tile_rows(request: object) -> int:
    """Rows that each expert is padded to: 1, since a CPU's matrix multiply takes any number of rows."""
    return 1
