"""What kernels are compiled for, as data: instruction set, shared memory, compute units. Imports no Triton.

Shared memory is what one block may ask for: compute capabilities 8.0, 8.6/8.9, 9.0, 10.0 and 12.0 in the CUDA
programming guide's table of technical specifications, less the KiB that the system keeps; LDS of AMD's CDNA 3 and 4.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, replace

import torch

from sonic.roofline import CHIPS
from sonic.shapes import check_choice

__all__ = ["INTERPRETER", "TARGETS", "Target", "hip_arch", "interprets", "target_named", "target_of", "target_of_arch"]

_KIB = 1024


@dataclass(frozen=True)
class Target:
    """One kind of chip.

    Attributes:
        name: ``"sm_90"``, ``"gfx942"``, …; ``"interpreter"`` for Triton's own on a CPU.
        backend: Triton's name of the code generator, ``"cuda"`` or ``"hip"``; empty for the interpreter.
        arch: what Triton calls the chip: 90, ``"gfx942"``.
        warp_size: threads of a warp.
        shared_bytes: shared memory that a block may use.
        num_compute_units: SMs or CUs.
        chip: the name in :data:`sonic.roofline.CHIPS` whose peaks stand for chips of this kind.
        has_descriptors: tensor descriptors become bulk copies by the tensor memory accelerator.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    num_compute_units: int
    chip: str
    has_descriptors: bool = False


def _cuda(arch: int, shared_kib: int, chip: str, num_sms: int | None = None) -> Target:
    sms = CHIPS[chip].num_compute_units if num_sms is None else num_sms
    return Target(f"sm_{arch}", "cuda", arch, 32, shared_kib * _KIB, sms, chip, arch >= 90)


def _hip(arch: str, shared_kib: int) -> Target:
    return Target(arch, "hip", arch, 64, shared_kib * _KIB, CHIPS["MI300X"].num_compute_units, "MI300X")


_KNOWN = (
    _cuda(80, 163, "A100"),
    _cuda(86, 99, "A100", 84),
    _cuda(89, 99, "A100", 128),
    _cuda(90, 227, "H100"),
    _cuda(100, 227, "B200"),
    _cuda(103, 227, "B200"),
    _cuda(120, 99, "B200", 170),
    _hip("gfx942", 64),
    _hip("gfx950", 160),
)
TARGETS = {target.name: target for target in _KNOWN}
INTERPRETER = Target("interpreter", "", "cpu", 32, 227 * _KIB, 2, "H100", has_descriptors=True)


def interprets() -> bool:
    """Whether Triton interprets kernels instead of compiling them: its variable ``TRITON_INTERPRET``, which has to be
    set before Triton is imported, since that is when its own functions are made the one way or the other.
    """
    if os.environ.get("TRITON_INTERPRET", "") not in ("1", "true", "True", "on"):
        return False
    standard = sys.modules.get("triton.language.standard")
    return standard is None or type(standard.sum).__name__ == "InterpretedFunction"


def hip_arch(arch: int) -> str | None:
    """AMD's name of a chip that torch calls a compute capability of 9.4 or 9.5, which no NVIDIA chip has; else None."""
    return {94: "gfx942", 95: "gfx950"}.get(arch)


def target_named(where: str, name: str) -> Target:
    """The target ``name``.

    Raises:
        ValueError: not in :data:`TARGETS`.
    """
    check_choice(where, "target", name, tuple(TARGETS))
    return TARGETS[name]


def target_of_arch(arch: int | None) -> Target:
    """The target of a compute capability such as 90; between two known ones the older; None: the interpreter."""
    if arch is None:
        return INTERPRETER
    name = hip_arch(arch)
    if name is not None:
        return TARGETS[name]
    known = [target for target in _KNOWN if isinstance(target.arch, int) and target.arch <= arch]
    return max(known, key=lambda target: int(target.arch), default=_KNOWN[0])


@functools.cache  # a device's properties do not change while a process runs
def _target_of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    target = target_of_arch(properties.major * 10 + properties.minor)
    return replace(target, num_compute_units=properties.multi_processor_count)


def target_of(device: torch.device) -> Target:
    """The target of a device that is here: with its own number of compute units."""
    if device.type != "cuda":
        return INTERPRETER
    return _target_of_gpu(torch.cuda.current_device() if device.index is None else device.index)
