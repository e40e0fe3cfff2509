"""What is likely to be wrong with an installation, each mistake with its cure; ``python -m sonic doctor`` tells them.

:func:`facts_of_this_machine` looks, :func:`find_mistakes` judges; so a test can ask about machines that are not there.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from sonic.versions import RANGES, is_in_range, requirement

__all__ = ["Facts", "Mistake", "facts_of_this_machine", "find_mistakes"]

_OLDEST_ARCH = 80  # of the Triton kernels; older chips get plain torch
_HOPPER = 90


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One thing to mend.

    Attributes:
        name: a short name that stays the same.
        what: what was found.
        cure: what to do.
        stops: whether nothing can be right before it is mended; else something is slow or missing.
    """

    name: str
    what: str
    cure: str
    stops: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a machine.

    Attributes:
        environment: the variables of the process.
        known_variables: those of sonic.
        unusable_backends: backend -> why it cannot be used on any device here.
        versions: distribution -> version, for what is installed of :data:`sonic.versions.RANGES`.
        owners: distributions that claim to hold a package called ``sonic``.
        torch_cuda: the CUDA that torch was built for, None: without CUDA; ROCm counts as CUDA.
        nvidia_gpus: GPUs that the system has, whether torch sees them or not.
        archs: compute capabilities of those that torch sees, 90 for an H100; AMD's chips are left out.
        has_compiler: a C compiler is found.
        cache: the folder for compiled kernels.
        cache_is_writable: of it, or of the nearest folder above that is there.
        num_cores: that this process may use.
        num_threads: that torch uses.
        is_launched: by torchrun, which sets the number of threads itself.
    """

    environment: Mapping[str, str]
    known_variables: tuple[str, ...]
    unusable_backends: Mapping[str, str]
    versions: Mapping[str, str]
    owners: tuple[str, ...]
    torch_cuda: str | None
    nvidia_gpus: int
    archs: tuple[int, ...]
    has_compiler: bool
    cache: str
    cache_is_writable: bool
    num_cores: int
    num_threads: int
    is_launched: bool
    python: tuple[int, int] = (sys.version_info.major, sys.version_info.minor)


def facts_of_this_machine(known_variables: tuple[str, ...], unusable_backends: Mapping[str, str]) -> Facts:
    """Look, without importing anything and without starting CUDA where torch cannot see a GPU.

    Args:
        known_variables: the environment variables that sonic reads.
        unusable_backends: backend -> why it cannot be used on any device here.
    """
    versions = {}
    for name in RANGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    num_visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_nvidia = torch.version.hip is None
    cache = os.environ.get("SONIC_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sonic"
    )
    there = next((folder for folder in (Path(cache), *Path(cache).absolute().parents) if folder.exists()), Path("/"))
    return Facts(
        environment=dict(os.environ),
        known_variables=known_variables,
        unusable_backends=unusable_backends,
        versions=versions,
        owners=tuple(importlib.metadata.packages_distributions().get("sonic", ())),
        torch_cuda=torch.version.cuda or torch.version.hip,
        nvidia_gpus=sum(1 for _ in Path("/dev").glob("nvidia[0-9]*")),
        archs=tuple(10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(num_visible)))
        if is_nvidia
        else (),
        has_compiler=any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name),
        cache=cache,
        cache_is_writable=there.is_dir() and os.access(there, os.W_OK),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        is_launched="TORCHELASTIC_RUN_ID" in os.environ,
    )


def find_mistakes(facts: Facts) -> list[Mistake]:
    """The mistakes that these facts show, the gravest first."""
    found = [mistake for check in _CHECKS for mistake in check(facts)]
    return sorted(found, key=lambda mistake: not mistake.stops)


# ---------------------------------------------------------------- the checks


def _old_python(facts: Facts) -> Iterator[Mistake]:
    if facts.python < (3, 10):
        version = ".".join(map(str, facts.python))
        yield Mistake("old-python", f"Python is {version}", "take Python 3.10 or newer", stops=True)


def _versions(facts: Facts) -> Iterator[Mistake]:
    for name in RANGES:
        version = facts.versions.get(name)
        if version is not None and not is_in_range(name, version):
            cure = f"pip install '{requirement(name)}'"
            yield Mistake("wrong-version", f"{name} is {version}", cure, stops=name == "torch")


def _two_owners(facts: Facts) -> Iterator[Mistake]:
    others = sorted(set(facts.owners) - {"sonic-moe"})
    if others:
        what = f"another distribution also brings a package called sonic: {', '.join(others)}"
        yield Mistake(
            "other-sonic", what, f"pip uninstall {' '.join(others)}, then install sonic-moe again", stops=True
        )


def _torch_without_cuda(facts: Facts) -> Iterator[Mistake]:
    if facts.nvidia_gpus and facts.torch_cuda is None:
        what = f"the machine has {facts.nvidia_gpus} NVIDIA GPU(s), but this torch is built for CPUs only"
        yield Mistake("cpu-torch", what, "install a torch that is built for CUDA")


def _hidden_gpus(facts: Facts) -> Iterator[Mistake]:
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if facts.nvidia_gpus and facts.torch_cuda and visible is not None and visible.strip() in ("", "-1"):
        what = f"CUDA_VISIBLE_DEVICES={visible!r} hides {facts.nvidia_gpus} GPU(s)"
        yield Mistake("hidden-gpus", what, "unset CUDA_VISIBLE_DEVICES, or name the GPUs in it")
    elif facts.nvidia_gpus and facts.torch_cuda and not facts.archs:
        what = f"the machine has {facts.nvidia_gpus} NVIDIA GPU(s), but torch (CUDA {facts.torch_cuda}) sees none"
        cure = "see `nvidia-smi`: the driver may be too old for this CUDA, or the device files closed to this user"
        yield Mistake("no-driver", what, cure)


def _old_gpu(facts: Facts) -> Iterator[Mistake]:
    old = sorted({arch for arch in facts.archs if arch < _OLDEST_ARCH})
    if old:
        numbers = ", ".join(f"{arch / 10:.1f}" for arch in old)
        what = f"a GPU of compute capability {numbers}: its layers run in plain torch"
        yield Mistake("old-gpu", what, "take a GPU of compute capability 8.0 (Ampere) or later for the Triton kernels")


def _missing_kernels(facts: Facts) -> Iterator[Mistake]:
    if any(arch >= _OLDEST_ARCH for arch in facts.archs) and "triton" not in facts.versions:
        what = "there is a GPU, but no Triton: routing and experts run in plain torch"
        yield Mistake("no-triton", what, "pip install 'sonic-moe[triton]'")
    if _HOPPER in facts.archs and "nvidia-cutlass-dsl" not in facts.versions:
        what = "there is a Hopper GPU, but no CuTe-DSL: its grouped GEMMs run in Triton"
        yield Mistake("no-cute", what, "pip install 'sonic-moe[cute]'")


def _interpreted(facts: Facts) -> Iterator[Mistake]:
    if facts.archs and facts.environment.get("TRITON_INTERPRET", "0") not in ("", "0"):
        what = "TRITON_INTERPRET is set on a machine with a GPU: Triton kernels run in Python"
        yield Mistake("interpreted", what, "unset TRITON_INTERPRET")


def _no_compiler(facts: Facts) -> Iterator[Mistake]:
    needs = [name for name in ("triton", "nvidia-cutlass-dsl") if name in facts.versions]
    if needs and not facts.has_compiler and (facts.archs or "nvidia-cutlass-dsl" in needs):
        what = f"no C compiler is found, which {' and '.join(needs)} call"
        yield Mistake("no-compiler", what, "install gcc or clang, or name one in CC")


def _unknown_variable(facts: Facts) -> Iterator[Mistake]:
    for name in sorted(facts.environment):
        if name.startswith("SONIC_") and name not in facts.known_variables:
            close = difflib.get_close_matches(name, facts.known_variables, n=1, cutoff=0.8)
            cure = f"did you mean {close[0]}?" if close else f"it reads {', '.join(facts.known_variables)}"
            yield Mistake("unknown-variable", f"{name} is set, but sonic reads no such variable", cure)


def _insisted_backend(facts: Facts) -> Iterator[Mistake]:
    name = facts.environment.get("SONIC_BACKEND", "")
    if name in facts.unusable_backends:
        what = f"SONIC_BACKEND={name} insists on a backend that cannot be used: {facts.unusable_backends[name]}"
        yield Mistake("unusable-backend", what, "unset SONIC_BACKEND, or mend what is said", stops=True)


def _cache(facts: Facts) -> Iterator[Mistake]:
    if not facts.cache_is_writable and "nvidia-cutlass-dsl" in facts.versions:
        what = f"the folder for compiled kernels, {facts.cache}, cannot be written"
        yield Mistake("closed-cache", what, "name one that can be written in SONIC_CACHE_DIR")


def _one_thread(facts: Facts) -> Iterator[Mistake]:
    if facts.num_threads == 1 and facts.num_cores > 1 and not facts.archs and not facts.is_launched:
        what = f"torch uses one thread, and this process may use {facts.num_cores} cores"
        yield Mistake("one-thread", what, "unset OMP_NUM_THREADS, or set it to the number of cores")


_CHECKS: tuple[Callable[[Facts], Iterator[Mistake]], ...] = (
    _old_python,
    _versions,
    _two_owners,
    _torch_without_cuda,
    _hidden_gpus,
    _old_gpu,
    _missing_kernels,
    _interpreted,
    _no_compiler,
    _unknown_variable,
    _insisted_backend,
    _cache,
    _one_thread,
)
