"""The calls of the package ``sonicmoe``, of December 2025 and of its 0.1 releases.

Layout of weights as there: experts' matrices are handed over as views (2N, D, E) and (D, N, E) of parameters (E, 2N, D)
and (E, D, N), gate and up rows interleaved unless ``concat_layout``. ``docs/compat.md`` says what differs.

Source of the signatures: Dao-AILab/sonic-moe (Apache-2.0), commit 8565e84 and release 0.1.2.post1; no code of it.
"""

from sonic.compat.sonicmoe import enums, functional
from sonic.compat.sonicmoe.enums import ActivationType, KernelBackendMoE
from sonic.compat.sonicmoe.functional import moe_general_routing_inputs, moe_TC_softmax_topk_layer
from sonic.compat.sonicmoe.gemm_choice import enable_quack_gemm
from sonic.compat.sonicmoe.metadata import count_cumsum
from sonic.compat.sonicmoe.moe import MoE

__all__ = [
    "ActivationType",
    "KernelBackendMoE",
    "MoE",
    "count_cumsum",
    "enable_quack_gemm",
    "enums",
    "functional",
    "moe_TC_softmax_topk_layer",
    "moe_general_routing_inputs",
]

__version__ = "0.1.2.post1"  # the release whose signatures these are
