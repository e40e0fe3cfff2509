"""What others have measured and published: what constants are fitted to, and what the planner is checked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "KERNEL_RATES",
    "KERNEL_SHAPES",
    "LADDER_405B",
    "LADDER_70B",
    "LADDER_SIZES",
    "PEAK_MEMORY",
    "TOKENS_PER_DAY",
    "KernelShape",
    "ServingRow",
    "SpeedupRow",
    "TokensPerDay",
]


@dataclass(frozen=True)
class ServingRow:
    """Tokens per second of one batch and degree of tensor parallelism; ``none`` is the model without communication."""

    batch: int
    tp: int
    standard: float
    ladder: float
    parallel: float
    none: float
    standard_off: float
    ladder_off: float
    parallel_off: float


# Plot data of the repository ladder-residual-inference (arXiv:2501.06589): Llama-3 70B, 8 x H100, prompt of 1,024
# tokens, 512 new ones, fp16, tokens per second with NVLink and with NCCL_P2P_DISABLE=1.
LADDER_70B = (
    ServingRow(1, 2, 35.4, 36.7, 36.7, 38.2, 33.8, 36.9, 36.1),
    ServingRow(1, 4, 59.4, 67.5, 65.4, 69.0, 53.4, 66.6, 61.9),
    ServingRow(1, 8, 77.4, 101.2, 94.2, 110.6, 51.7, 82.6, 72.4),
    ServingRow(4, 2, 120.6, 126.1, 123.7, 130.8, 106.6, 125.5, 116.8),
    ServingRow(4, 4, 185.0, 204.3, 201.6, 213.7, 158.8, 204.2, 183.5),
    ServingRow(4, 8, 258.6, 331.4, 307.3, 355.8, 173.6, 271.8, 241.1),
    ServingRow(16, 4, 585.2, 636.0, 628.2, 665.1, 518.4, 598.7, 583.5),
    ServingRow(16, 8, 843.1, 1003.5, 973.7, 1109.7, 546.7, 738.6, 744.3),
    ServingRow(64, 4, 1249.7, 1358.7, 1311.5, 1433.5, 1199.6, 1313.4, 1276.7),
    ServingRow(64, 8, 1941.0, 2242.1, 2259.4, 2474.5, 1454.4, 1864.0, 1873.7),
)


@dataclass(frozen=True)
class SpeedupRow:
    """Throughput over that of the standard wiring; ``off``: with NCCL_P2P_DISABLE=1; None: not published."""

    model: str
    batch: int
    tp: int
    ladder: float
    ladder_off: float
    none: float | None = None
    none_off: float | None = None


# The same repository: Llama-3 405B on two nodes.
LADDER_405B = (
    SpeedupRow("llama-405b", 1, 16, 1.364, 1.490, 1.521, 2.107),
    SpeedupRow("llama-405b", 4, 16, 1.308, 1.566, 1.512, 2.275),
    SpeedupRow("llama-405b", 8, 16, 1.393, 1.434, 1.659, 2.271),
    SpeedupRow("llama-405b", 16, 16, 1.349, 1.461, 1.632, 2.160),
)
# Headline table of the paper, one node; its row of 34B is doubtful: the blog's absolute figures repeat those of 70B.
LADDER_SIZES = (
    SpeedupRow("llama-1b", 4, 8, 1.56, 1.39),
    SpeedupRow("llama-3b", 4, 8, 1.57, 1.50),
    SpeedupRow("llama-8b", 4, 8, 1.46, 1.40),
    SpeedupRow("llama-34b", 4, 8, 1.44, 1.47),
    SpeedupRow("llama-70b", 4, 8, 1.29, 1.59),
    SpeedupRow("bloom-176b", 4, 8, 1.35, 1.54),
)


@dataclass(frozen=True)
class KernelShape:
    """T, D, N, E and K of a benchmark of MoE kernels."""

    model: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


# SonicMoE (arXiv:2512.14080), the shapes of its figures on H100.
KERNEL_SHAPES = (
    KernelShape("1.4B", 40960, 768, 256, 128, 8),
    KernelShape("1.4B", 40960, 768, 512, 64, 4),
    KernelShape("1.4B", 40960, 768, 1024, 32, 2),
    KernelShape("7B", 24576, 1536, 256, 128, 8),
    KernelShape("7B", 24576, 1536, 512, 64, 4),
    KernelShape("7B", 24576, 1536, 1024, 32, 2),
    KernelShape("30B", 32768, 4096, 256, 256, 16),
    KernelShape("30B", 32768, 4096, 512, 128, 8),
    KernelShape("30B", 32768, 4096, 1024, 64, 4),
    KernelShape("120B", 32768, 4096, 512, 256, 16),
    KernelShape("120B", 32768, 4096, 1024, 128, 8),
    KernelShape("120B", 32768, 4096, 2048, 64, 4),
)
# Implementation -> TFLOP/s (forward, backward) for each shape, read off the bars (about 2 TFLOP/s); None: does not run.
KERNEL_RATES: Mapping[str, tuple[tuple[float | None, ...], tuple[float | None, ...]]] = MappingProxyType(
    {
        "sonic": (
            (337, 399, 404, 363, 433, 465, 427, 502, 551, 517, 557, 594),
            (365, 401, 433, 404, 438, 465, 459, 510, 553, 525, 566, 585),
        ),
        "scattermoe": (
            (181, 203, 235, 205, 233, 265, 260, 324, 367, 335, 380, 384),
            (205, 243, 269, 211, 248, 280, 236, 303, 339, 316, 352, 369),
        ),
        "megablocks": (
            (130, 160, 184, 147, 190, 216, None, 249, 313, None, 322, 365),
            (164, 222, 254, 177, 237, 290, None, 271, 328, None, 330, 384),
        ),
        "momoe": (
            (149, 207, 235, 192, 260, 305, 241, 345, 410, 337, 422, 463),
            (167, 226, 254, 184, 243, 280, 198, 275, 318, 266, 335, 367),
        ),
        "megatron": (
            (107, 143, 175, 120, 167, 207, 149, 226, 290, 224, 286, 339),
            (139, 160, 190, 132, 179, 214, 132, 215, 266, 202, 275, 313),
        ),
        "deepgemm": (
            (135, 199, 220, 152, 237, 263, 174, 324, 470, 292, 433, 547),
            (218, 284, 297, 228, 297, 318, 253, 345, 393, 333, 397, 418),
        ),
    }
)
# Implementation -> peak memory of one layer in GiB, its weights included, for each shape, read off the bars (about
# 0.01 up to 7B, 0.04 above).
PEAK_MEMORY: Mapping[str, tuple[float | None, ...]] = MappingProxyType(
    {
        "sonic": (0.574, 0.566, 0.566, 0.607, 0.607, 0.607, 2.497, 2.497, 2.455, 4.494, 4.494, 4.494),
        "scattermoe": (1.14, 0.9, 0.78, 1.198, 0.907, 0.766, 6.49, 4.49, 3.45, 8.74, 6.74, 5.74),
        "megablocks": (1.415, 0.93, 0.69, 1.639, 1.057, 0.757, None, 6.12, 4.04, None, 9.15, 6.08),
        "momoe": (0.99, 0.75, 0.62, 1.107, 0.816, 0.674, 6.24, 4.2, 3.2, 8.24, 6.24, 5.2),
        "megatron": (1.61, 1.13, 0.9, 1.756, 1.19, 0.907, 12.48, 6.49, 4.49, 12.73, 8.74, 6.74),
        "deepgemm": (1.0, 0.76, 0.63, 1.132, 0.832, 0.691, 6.37, 4.29, 3.29, 8.41, 6.33, 5.28),
    }
)


@dataclass(frozen=True)
class TokensPerDay:
    """A training run: billions of tokens per day on so many H100, of the 7B model with these kernels."""

    kernels: str
    gpus: int
    billions: float


# SonicMoE (arXiv:2512.14080), abstract: a 7B MoE under FSDP-2 in lm-engine.
TOKENS_PER_DAY = (TokensPerDay("sonic", 64, 213.0), TokensPerDay("scattermoe", 96, 225.0))
