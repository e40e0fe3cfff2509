"""What a set of results was measured on: chip, clocks, driver, versions, commit."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["clocks", "make_stamp", "slug", "stamp_differences", "stamp_line"]

# What a speed may depend on.
_PACKAGES = (
    *("triton", "nvidia-cutlass-dsl", "numpy"),
    *("transformers", "scattermoe", "quack-kernels", "torchtitan", "megatron-core"),
)
_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "memory_mib": "memory.total",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def make_stamp(suite: str, root: Path) -> dict[str, Any]:
    """Describe this machine and this tree.

    Args:
        suite: name of the suite that runs.
        root: the checkout.

    Returns:
        ``suite``, ``date`` (UTC, ISO 8601), ``chip``, ``memory_gib``, ``driver``, ``clocks`` (see :func:`clocks`; None
        without ``nvidia-smi``), ``cpu``, ``cores``, ``platform``, ``versions`` by package, ``commit`` (None without
        git) and ``changed_files``, how many files differ from it.
    """
    chip, memory, now = _cpu_name(), None, clocks()
    if torch.cuda.is_available() and now is not None:
        # not asked of torch, which would keep a context and its memory on the GPU beside what is measured
        chip, memory = now["name"], None if now["memory_mib"] is None else round(now["memory_mib"] / 1024, 1)
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        chip, memory = properties.name, round(properties.total_memory / 2**30, 1)
    changed = _git(root, "status", "--porcelain")
    return {
        "suite": suite,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "chip": chip,
        "memory_gib": memory,
        "driver": None if now is None else now["driver"],
        "clocks": now,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
            **{name: _version(name) for name in _PACKAGES},
        },
        "commit": _git(root, "rev-parse", "HEAD"),
        "changed_files": None if changed is None else len(changed.splitlines()),
    }


def clocks() -> dict[str, Any] | None:
    """Name, driver, clocks in MHz, memory in MiB, power limit in watts and temperature of the first visible GPU now.

    Numbers that the driver does not tell are None; all is None without ``nvidia-smi``.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    if shutil.which("nvidia-smi") is None:
        return None
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_QUERY.values())}",
        "--format=csv,noheader,nounits",
        f"--id={first}",
    ]
    done = _output(command)
    rows = list(csv.reader((done or "").splitlines(), skipinitialspace=True))
    if not rows or len(rows[0]) != len(_QUERY):
        return None
    told: dict[str, Any] = dict(zip(_QUERY, (value.strip() for value in rows[0]), strict=True))
    for name, value in told.items():
        if name not in ("name", "driver"):
            told[name] = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None
    return told


def stamp_line(stamp: Mapping[str, Any]) -> str:
    """A stamp in one line."""
    told = stamp.get("clocks") or {}
    parts = [stamp["chip"]]
    if stamp.get("memory_gib"):
        parts.append(f"{stamp['memory_gib']:g} GiB")
    if told:
        parts.append(f"SM {_number(told['sm_mhz'])} of {_number(told['max_sm_mhz'])} MHz, driver {stamp['driver']}")
    parts += [f"{name} {version}" for name, version in stamp["versions"].items() if version is not None]
    if stamp.get("commit"):
        changed = f" and {stamp['changed_files']} changed files" if stamp.get("changed_files") else ""
        parts.append(f"commit {stamp['commit'][:10]}{changed}")
    return ", ".join([*parts, stamp["date"]])


def stamp_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """In what two stamps differ that a figure may depend on: name -> both values.

    Dates are not compared, nor what changes from minute to minute (a clock that is not at its limit, temperature).
    """
    left, right = _flat(first), _flat(second)
    return {name: (_told(left[name]), _told(right[name])) for name in left if left[name] != right[name]}


def slug(text: str) -> str:
    """``text`` as part of a file name: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _flat(stamp: Mapping[str, Any]) -> dict[str, Any]:
    told = stamp.get("clocks") or {}
    versions = stamp.get("versions", {})
    return {
        **{name: stamp.get(name) for name in ("chip", "memory_gib", "cpu", "cores", "driver")},
        **{name: told.get(name) for name in ("max_sm_mhz", "max_memory_mhz", "power_limit_w")},
        **{name: versions.get(name) for name in ("python", "torch", "cuda", *_PACKAGES)},
        **{name: stamp.get(name) for name in ("commit", "changed_files")},
    }


def _told(value: Any) -> str:
    return "not told" if value is None else str(value)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *words: str) -> str | None:
    # without locks: reading is not to write into the index
    return _output(["git", "--no-optional-locks", "-C", str(root), *words]) if shutil.which("git") else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name") or platform.processor() or platform.machine()
