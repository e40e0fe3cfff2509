"""Speed of the experts of a whole layer, forward and forward + backward: ``python -m benchmarks.moe``.

The same as ``python -m benchmarks.kernels --ops experts experts_fwd_bwd`` on three layers of published models, against
the same rivals, in one run; see there for what is measured and how. The bound of a layer is the sum over its ops.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import kernels

__all__ = ["main"]

# T, D, N, E, K: SonicMoE's 7B and 30B, and Qwen3-Next
SHAPES = {
    "7b": "24576,1536,256,128,8",
    "30b": "32768,4096,512,128,8",
    "qwen3-next": "32768,2048,512,512,10",
}
OPS = ("experts", "experts_fwd_bwd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the options are those of :mod:`benchmarks.kernels`, with other defaults for shapes and ops.

    Returns:
        0, or 1 if a contender computes something wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if "--shapes" not in given and "--quick" not in given:
        given += ["--shapes", *SHAPES.values()]
    if "--ops" not in given:
        given += ["--ops", *OPS]
    return kernels.main(given, name="moe")


if __name__ == "__main__":
    sys.exit(main())
