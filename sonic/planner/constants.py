"""Every number that the planner takes for granted, as data: its value, its unit, and where it is from.

``kind`` says how much a constant can be trusted:

* ``published``: its owner prints it;
* ``fitted``: to published rows, named in ``source``; :mod:`sonic.planner.fit` repeats the fit;
* ``assumed``: chosen here, with the reason in ``source``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sonic.roofline import CHIPS, Chip

__all__ = ["CONSTANTS", "KERNELS", "MACHINES", "PROTOCOLS", "Constant", "Kernels", "Machine", "Protocol"]

_GB = 10**9


@dataclass(frozen=True)
class Constant:
    """One number.

    Attributes:
        value, unit: the number; ``"1"`` is a share or factor.
        kind: ``"published"``, ``"fitted"`` or ``"assumed"``.
        source: where it is from.
    """

    value: float
    unit: str
    kind: str
    source: str


_LADDER = "plot data of ladder-residual-inference, 70B on 8 H100"
_FLASH = "after the figures of FlashAttention-3 (arXiv:2407.08608), causal, about 4k tokens, rounded"

CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        # serving: what the published comparison of wirings is checked with
        "serving.memory_batch_1": Constant(
            0.95, "1", "fitted", f"{_LADDER}: 10 rows without communication; at its bound; share of HBM bytes/s"
        ),
        "serving.memory": Constant(0.810, "1", "fitted", f"{_LADDER}: the same rows; batches above 1"),
        "serving.fixed": Constant(18.92e-6, "s", "fitted", f"{_LADDER}: the same rows; each sub-block"),
        "serving.prefill": Constant(0.306, "1", "fitted", f"{_LADDER}: the same rows; share of peak FLOP/s in prefill"),
        "serving.cache_traffic": Constant(
            5.479, "1", "fitted", f"{_LADDER}: the same rows; reads of the KV cache over its bytes (copies for groups)"
        ),
        "nvlink.latency_2": Constant(14.17e-6, "s", "fitted", f"{_LADDER}: 10 ratios standard / no communication"),
        "nvlink.latency_4": Constant(15.92e-6, "s", "fitted", f"{_LADDER}: the same ratios"),
        "nvlink.latency_8": Constant(23.96e-6, "s", "fitted", f"{_LADDER}: the same ratios"),
        "nvlink.bandwidth": Constant(256.2e9, "B/s", "fitted", f"{_LADDER}: the same ratios; bus bandwidth"),
        "p2p_off.latency_2": Constant(30.10e-6, "s", "fitted", f"{_LADDER}, P2P off: 10 ratios standard / UB"),
        "p2p_off.latency_4": Constant(30.52e-6, "s", "fitted", f"{_LADDER}, P2P off: the same ratios"),
        "p2p_off.latency_8": Constant(70.02e-6, "s", "fitted", f"{_LADDER}, P2P off: the same ratios"),
        "p2p_off.bandwidth": Constant(126.6e9, "B/s", "fitted", f"{_LADDER}, P2P off: the same ratios"),
        "interference": Constant(
            0.358,
            "1",
            "fitted",
            f"{_LADDER}: 10 ratios ladder / standard, NVLink; compute beside a collective is slower",
        ),
        # training
        "gemm": Constant(
            0.65, "1", "assumed", "share of peak: large bf16 products reach 620 to 650 TFLOP/s on H100; others alike"
        ),
        "memory": Constant(
            0.85, "1", "published", "share of HBM bytes/s: SonicMoE (arXiv:2512.14080), its sums of rows reach 85%"
        ),
        "attention_64": Constant(0.40, "1", "assumed", f"share of peak, heads up to 64 wide: {_FLASH}"),
        "attention_128": Constant(0.56, "1", "assumed", f"share of peak, wider heads: {_FLASH}"),
        "attention_backward": Constant(0.85, "1", "assumed", f"rate of its backward over that of forward: {_FLASH}"),
        "ring": Constant(0.82, "1", "published", "share of NVLink in rings: nccl-tests thread 212, 370 of 450 GB/s"),
        "all_to_all": Constant(0.65, "1", "assumed", "share of NVLink: 293 of 450 GB/s, between copies and rings"),
        "network": Constant(0.90, "1", "assumed", "share of a NIC: 45 of 50 GB/s, after the headers"),
        "counts": Constant(
            30e-6,
            "s",
            "assumed",
            "a dispatch's exchange of counts, which the host waits for: a small collective, a launch",
        ),
        "optimizer_bytes": Constant(
            28.0, "B", "assumed", "per parameter of a step of AdamW: two states, master weight and gradient in float32"
        ),
        "reserve": Constant(3.0e9, "B", "assumed", "CUDA context, NCCL buffers and cuBLAS workspaces on each GPU"),
        "fragmentation": Constant(0.04, "1", "assumed", "share of device memory that the allocator cannot use"),
    }
)


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's protocols for rings, as its own tuning model has them.

    Attributes:
        base: seconds of any collective.
        near, far: seconds of each step within an NVLink domain and across the network.
        bandwidth: share of the link's.
    """

    base: float
    near: float
    far: float
    bandwidth: float


# NCCL 2.18 and later, src/graph/tuning.cc: baseLat and hwLat of rings; a ring takes the protocol that is fastest. The
# share of LL is its cap on Hopper (87.7 GB/s) over 370.
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "LL": Protocol(6.6e-6, 0.6e-6, 2.7e-6, 0.24),
        "LL128": Protocol(14.0e-6, 1.9e-6, 4.0e-6, 0.92),
        "Simple": Protocol(8.4e-6, 3.4e-6, 14.0e-6, 1.0),
    }
)


@dataclass(frozen=True)
class Machine:
    """A chip and how many of them are wired.

    Attributes:
        name: key in :data:`MACHINES`.
        chip: figures of one GPU.
        nvlink_bytes_per_second: of one GPU to the others of its domain, one direction.
        domain: GPUs that reach each other without the network.
        network_bytes_per_second: of one GPU's NIC, one direction; NICs of the same number are on one rail.
        source: of the links.
    """

    name: str
    chip: Chip
    nvlink_bytes_per_second: float
    domain: int
    network_bytes_per_second: float
    source: str


_GB200 = Chip(
    *("GB200", "sm_100", {**CHIPS["B200"].flops_per_second, "bfloat16": 2.5e15, "float16": 2.5e15}, 8e12, 186 * _GB),
    *(CHIPS["B200"].l2_bytes, CHIPS["B200"].num_compute_units),
    "NVIDIA GB200 NVL72 specifications, 1/72 of a rack, dense",
)
_KNOWN = (
    Machine("h100", CHIPS["H100"], 450e9, 8, 50e9, "NVIDIA DGX H100 data sheet: NVLink 4, one 400 Gb/s NIC per GPU"),
    Machine("h200", CHIPS["H200"], 450e9, 8, 50e9, "NVIDIA DGX H200 data sheet: NVLink 4, one 400 Gb/s NIC per GPU"),
    Machine("b200", CHIPS["B200"], 900e9, 8, 50e9, "NVIDIA DGX B200 data sheet: NVLink 5, one 400 Gb/s NIC per GPU"),
    Machine("gb200", _GB200, 900e9, 72, 50e9, "NVIDIA GB200 NVL72: NVLink 5 over 72 GPUs, one 400 Gb/s NIC per GPU"),
    Machine("a100", CHIPS["A100"], 300e9, 8, 25e9, "NVIDIA DGX A100 data sheet: NVLink 3, one 200 Gb/s NIC per GPU"),
    Machine("mi300x", CHIPS["MI300X"], 448e9, 8, 50e9, "AMD: 7 links of 64 GB/s; one 400 Gb/s NIC per GPU is usual"),
)
MACHINES: Mapping[str, Machine] = MappingProxyType({machine.name: machine for machine in _KNOWN})


@dataclass(frozen=True)
class Kernels:
    """One implementation of the experts: how fast, and what it keeps for backward.

    Its seconds are FLOP / (``flops`` x peak) + bytes / (``memory`` x HBM bytes/s), with FLOP and bytes as
    :mod:`sonic.roofline` counts them, each gathered row once per row: a share above 1 says that caches serve part.

    Attributes:
        flops, memory: fitted shares.
        keeps: letters of what stays in memory between forward and backward: ``x`` the tokens (T D), ``g`` gathered rows
            (R D), ``h`` pre-activations (R U), ``a`` activations (R N), ``y`` outputs of the experts (R D).
        mean_error: of the fitted rates, over its rows.
    """

    flops: float
    memory: float
    keeps: str
    mean_error: float


# Fitted to the published rates on H100, forward and backward, of the 12 shapes of SonicMoE's figure (10 where one does
# not run); `keeps` is what reproduces its figure of peak memory.
KERNELS: Mapping[str, Kernels] = MappingProxyType(
    {
        "sonic": Kernels(0.729, 1.260, "xh", 0.040),
        "scattermoe": Kernels(0.543, 0.544, "xhay", 0.065),
        "momoe": Kernels(0.754, 0.401, "xhy", 0.099),
        "megablocks": Kernels(0.658, 0.346, "ghy", 0.080),
        "megatron": Kernels(0.659, 0.257, "xghay", 0.060),
        "deepgemm": Kernels(0.990, 0.389, "xgh", 0.127),
    }
)
