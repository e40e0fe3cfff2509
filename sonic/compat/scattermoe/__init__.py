"""The calls of the package ``scattermoe``, of its versions 0.2 and 0.3.

``docs/compat.md`` says what differs; :mod:`sonic.compat.scattermoe.parallel_experts` what is kept for backward.

Source of the signatures: shawntan/scattermoe (Apache-2.0), commit 47b5e15; no code of it. Tan et al., arXiv:2403.08245.
"""

from sonic.compat.scattermoe import kernels, mlp, parallel_experts
from sonic.compat.scattermoe.parallel_experts import ParallelExperts, flatten_sort_count, parallel_linear

__all__ = ["ParallelExperts", "flatten_sort_count", "kernels", "mlp", "parallel_experts", "parallel_linear"]
