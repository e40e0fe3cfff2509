"""torchtitan's trainer, also where there is no accelerator: there it runs on CPUs, joined by gloo.

    torchrun --nproc-per-node 2 -m examples.torchtitan.train --module examples.torchtitan --config small_moe \\
        --override.imports sonic.torchtitan.routed_experts

With an accelerator this is ``-m torchtitan.train`` and nothing else. Without, torchtitan has to be told that CPUs are
its devices, and gloo that it sums; nothing of the model, its parallelism or the training step is changed by that.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch


def on_cpu() -> None:
    """Let torchtitan find CPUs as its devices; call it before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"  # what torchtitan asks, once, when it is imported
    gigabytes = SimpleNamespace(total_memory=1 << 30)
    expected: dict[str, Any] = {
        "current_device": lambda: 0,  # torch says "cpu", which a barrier does not take
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": lambda device=None: gigabytes,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: {},
        "manual_seed_all": torch.manual_seed,
    }
    for name, function in expected.items():
        setattr(torch.cpu, name, function)
    if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3.0 is made for a torch newer than 2.13
        torch.distributed.set_timeout = lambda timeout, group=None: None
    from torch.distributed.fsdp import FSDPModule

    divide = FSDPModule.set_gradient_divide_factor

    def divide_by_sums(self: Any, factor: float) -> None:
        self.set_force_sum_reduction_for_comms(True)  # gloo knows no sum that multiplies
        divide(self, factor)

    FSDPModule.set_gradient_divide_factor = divide_by_sums


def main() -> None:
    """``python -m torchtitan.train`` with the arguments of the command line."""
    if not torch.accelerator.is_available():
        on_cpu()
    importlib.import_module("torchtitan.train").main()


if __name__ == "__main__":
    main()
