"""What all tests share: skips where hardware is missing, seeds, hypothesis profiles, memory never clean by luck."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# Read when Triton is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton.language")  # here, before a test takes the variable away for a while

# Kernel tests: in these files every test runs with `poison_empty`.
POISONED_FILES = re.compile(
    r"test_(accumulation|cute|functional|kernels|ops|plan|reference|simulator|token_rounding|triton)\w*\.py"
)

# `pytest --hypothesis-profile=thorough` overrides the choice below.
settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: the tests that `make test` adds to the default ones."""
    parser.addoption("--long", action="store_true", help="run the tests marked long as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here; leave slow and long tests out unless they are asked for.

    ``-m`` with their mark asks for the slow ones; ``--long``, any ``-m``, or the name of a file for the long ones; a
    node id for either.
    """
    missing = _missing_hardware()
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if any("::" in argument for argument in config.args):
        return
    names_a_file = any(argument.endswith(".py") for argument in config.args)
    asked = {
        "slow": "slow" in config.option.markexpr,
        "long": config.option.long or bool(config.option.markexpr) or names_a_file,
    }
    left_out = [
        item for item in items if any(item.get_closest_marker(name) and not wanted for name, wanted in asked.items())
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(items) - set(left_out)
        items[:] = [item for item in items if item in kept]


def pytest_report_header(config: pytest.Config) -> str:
    """One line on what the numbers below were computed with."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads"


@functools.cache
def _missing_hardware() -> dict[str, str]:
    """Marker -> why its tests cannot run here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    archs = [torch.cuda.get_device_capability(index) for index in range(num_gpus)]
    missing = {}
    if num_gpus == 0:
        missing["gpu"] = "needs an NVIDIA GPU"
    if not any(major == 9 for major, _ in archs):
        missing["hopper"] = "needs a Hopper GPU (sm_90)"
    if num_gpus < 2:
        missing["multigpu"] = f"needs two NVIDIA GPUs, {num_gpus} here"
    return missing


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test whether it runs alone, in another order or beside others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_kernel_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    if POISONED_FILES.fullmatch(request.path.name):
        with _poisoned():
            yield
    else:
        yield


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """Hand out NaN (large integers, True) where ``torch.empty`` and its kin promise nothing: gaps are seen.

    Files that :data:`POISONED_FILES` names have it always; others use ``@pytest.mark.usefixtures("poison_empty")``.
    """
    with _poisoned():
        yield


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            if not hasattr(
                getattr(owner, name), "is_poisoned"
            ):  # a file poisoned as a whole may also ask for the fixture
                patch.setattr(owner, name, _fill_after(getattr(owner, name)))
        compile_for_real = torch.compile

        def compile_clean(*args: Any, **kwargs: Any) -> Any:
            patch.undo()  # the compiler knows torch's functions by identity, so a test that compiles goes on unpoisoned
            return compile_for_real(*args, **kwargs)

        patch.setattr(torch, "compile", compile_clean)
        yield


def _fill_after(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            poison(tensor)
        return tensor

    poisoned.is_poisoned = True  # type: ignore[attr-defined]
    return poisoned


def poison(tensor: Tensor) -> None:
    """Fill with what no right result holds: NaN, True, or half the greatest integer (so that sums stay in range)."""
    if tensor.device.type == "meta":
        return
    if tensor.dtype == torch.bool:
        tensor.fill_(True)
    elif tensor.is_floating_point() or tensor.is_complex():
        if (
            tensor.element_size() == 1
        ):  # float8: not every device fills these; 0x7f is NaN, or the greatest value, in each of them
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan"))
    elif not tensor.is_quantized:
        tensor.fill_(torch.iinfo(tensor.dtype).max // 2)
