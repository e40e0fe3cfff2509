"""Seconds of collectives over GPUs that NVLink and a network of rails join: latency + bytes / bandwidth.

GPUs are numbered so that a domain of NVLink holds consecutive ones. A group takes every ``stride``-th of them; of its
``size`` members ``near`` share a domain. Rings enter and leave a domain through the NICs of all members there, one rail
each, so a ring's bandwidth is the lesser of NVLink's and ``near`` NICs'. All-to-alls within a domain and across run
beside each other.

================  =====================================================================================
all-reduce        2 (g - 1) / g bytes over a ring's bandwidth, 2 (g - 1) steps
all-gather        (g - 1) / g gathered bytes over a ring's bandwidth, g - 1 steps; reduce-scatter alike
all-to-all        sent bytes to each place over that link's bandwidth, one step for every 8 partners
================  =====================================================================================

Rings take the best of NCCL's protocols (``PROTOCOLS`` in :mod:`sonic.planner.constants`). Steps across the network are
those of a tree, 2 log2 of the domains, at full bandwidth, where NCCL has one and it is faster: for all-reduce, and for
all-gather and reduce-scatter (PAT) of groups with one member in each domain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sonic.planner.constants import CONSTANTS, PROTOCOLS, Machine
from sonic.shapes import check_positive

__all__ = ["Group", "all_gather_seconds", "all_reduce_seconds", "all_to_all_seconds", "distinct_ranks"]


@dataclass(frozen=True)
class Group:
    """GPUs that communicate.

    Attributes:
        machine: what joins them.
        size: how many.
        stride: distance of neighbours in the numbering of all GPUs.
    """

    machine: Machine
    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        check_positive("sonic.planner.Group", size=self.size, stride=self.stride)

    @property
    def near(self) -> int:
        """Members in one domain of NVLink."""
        return max(1, min(self.size, self.machine.domain // self.stride))

    @property
    def domains(self) -> int:
        """Domains that members are in."""
        return -(-self.size // self.near)

    @property
    def link(self) -> str:
        """What the group's collectives are bound by, shared with other groups: ``"nvlink"`` or ``"network"``."""
        return "network" if self.domains > 1 else "nvlink"

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s of a ring."""
        nvlink = CONSTANTS["ring"].value * self.machine.nvlink_bytes_per_second
        network = CONSTANTS["network"].value * self.machine.network_bytes_per_second * self.near
        if self.domains == 1:
            return nvlink
        return network if self.near == 1 else min(nvlink, network)


def _ring_seconds(group: Group, num_bytes: float, rounds: int, has_tree: bool) -> float:
    """The best protocol's seconds of ``rounds`` (g - 1) steps that move ``num_bytes`` through each GPU in all."""
    far = group.domains - 1
    near = group.size - 1 - far
    if has_tree and far > 2 * math.ceil(math.log2(group.domains)):
        far, near = 2 * math.ceil(math.log2(group.domains)), group.near - 1
    return min(
        protocol.base
        + rounds * (near * protocol.near + far * protocol.far)
        + num_bytes / (protocol.bandwidth * group.ring_bandwidth)
        for protocol in PROTOCOLS.values()
    )


def all_reduce_seconds(group: Group, num_bytes: float) -> float:
    """Seconds until every member has the sum of all members' ``num_bytes``."""
    if group.size == 1 or not num_bytes:
        return 0.0
    return _ring_seconds(group, 2 * (group.size - 1) / group.size * num_bytes, 2, True)


def all_gather_seconds(group: Group, num_bytes: float) -> float:
    """Seconds until every member has all ``num_bytes``, of which it held a share; reduce-scatter takes as long."""
    if group.size == 1 or not num_bytes:
        return 0.0
    return _ring_seconds(group, (group.size - 1) / group.size * num_bytes, 1, group.near == 1)


def all_to_all_seconds(group: Group, num_bytes: float) -> float:
    """Seconds until every member has sent ``num_bytes``, spread evenly over all members, itself included."""
    if group.size == 1 or not num_bytes:
        return 0.0
    machine = group.machine
    near = num_bytes * (group.near - 1) / group.size
    far = num_bytes * (group.size - group.near) / group.size
    move = max(
        near / (CONSTANTS["all_to_all"].value * machine.nvlink_bytes_per_second),
        far / (CONSTANTS["network"].value * machine.network_bytes_per_second),
    )
    simple = PROTOCOLS["Simple"]
    latency = simple.base + (-(-(group.near - 1) // 8) * simple.near + -(-(group.size - group.near) // 8) * simple.far)
    return latency + move


def distinct_ranks(num_experts: int, top_k: int, ranks: int) -> float:
    """Ranks that hold at least one of ``top_k`` different experts, on average over even choices: copies of a token.

    Each rank holds num_experts / ranks of them: ranks (1 - C(E - E / ranks, K) / C(E, K)).
    """
    local = num_experts // ranks
    missed = 1.0
    for drawn in range(top_k):
        missed *= max(0, num_experts - local - drawn) / (num_experts - drawn)
    return ranks * (1 - missed)
