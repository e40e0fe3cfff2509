"""What a kernel launch consists of: the words that the host side and the engine share."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What a Hopper GPU can do, by the table of compute capabilities in the CUDA programming guide.
MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED_BYTES = 232448
MAX_CLUSTER = 16  # more than 8 blocks are not portable; host code asks for them


@dataclass(frozen=True)
class LaunchConfig:
    """The shape of a launch, as host code asked for it.

    Attributes:
        grid: number of blocks along x, y, z.
        block: number of threads of a block along x, y, z.
        cluster: number of blocks of a cluster along x, y, z; ``(1, 1, 1)`` without clusters.
        dynamic_shared_bytes: shared memory of a block beside what the kernel itself declares.
        is_cooperative: all blocks are resident at once, so that they may wait for each other.
        has_programmatic_serialization: the kernel may start before the one ahead of it in the stream has ended.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_shared_bytes: int = 0
    is_cooperative: bool = False
    has_programmatic_serialization: bool = False

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_threads(self) -> int:
        """Threads of one block."""
        return self.block[0] * self.block[1] * self.block[2]

    def faults(self) -> list[str]:
        """Why no Hopper GPU would take this launch; empty if one would."""
        faults = []
        for name, sizes, limits in (("grid", self.grid, MAX_GRID), ("block", self.block, MAX_BLOCK)):
            if not all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
                faults.append(f"{name} is {sizes}, expected 1 to {limits}")
        if self.num_threads > MAX_THREADS:
            faults.append(f"block {self.block} has {self.num_threads} threads, expected {MAX_THREADS} at most")
        if self.dynamic_shared_bytes > MAX_SHARED_BYTES:
            faults.append(f"shared memory is {self.dynamic_shared_bytes} bytes, expected {MAX_SHARED_BYTES} at most")
        if not 1 <= math.prod(self.cluster) <= MAX_CLUSTER:
            faults.append(f"cluster is {self.cluster}, expected 1 to {MAX_CLUSTER} blocks")
        elif any(size % by for size, by in zip(self.grid, self.cluster, strict=True)):
            faults.append(f"grid is {self.grid}, expected a multiple of the cluster {self.cluster}")
        return faults


@dataclass(frozen=True)
class Region:
    """A stretch of host memory that stands for device memory.

    Attributes:
        address: of its first byte.
        num_bytes: its length.
        name: what reports call it: what the user called the tensor, or ``arg 0``.
    """

    address: int
    num_bytes: int
    name: str

    @property
    def end(self) -> int:
        """The address behind its last byte."""
        return self.address + self.num_bytes
