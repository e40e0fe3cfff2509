"""The command line: ``python -m sonic doctor`` tells what sonic finds here, what is missing, and whether it is right;
the other commands lie in the ``cli.py`` of their rooms.

Optional packages are looked up, not imported, so that a broken one cannot stop the doctor.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sonic
from sonic import kernels
from sonic.bench.cli import add_bench_command
from sonic.convert.cli import add_convert_command
from sonic.kernels import dispatch
from sonic.kernels.cli import add_warmup_command
from sonic.planner.cli import add_plan_command
from sonic.setup_mistakes import facts_of_this_machine, find_mistakes

__all__ = ["ENVIRONMENT", "PACKAGES", "Package", "main"]


@dataclasses.dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        distribution: its name for pip.
        module: top-level module that it brings.
        extra: the extra of sonic that installs it.
        purpose: what sonic does with it.
    """

    distribution: str
    module: str
    extra: str
    purpose: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'sonic-moe[{self.extra}]'"


PACKAGES = (
    Package("triton", "triton", "triton", "kernels for any recent GPU"),
    Package("nvidia-cutlass-dsl", "cutlass", "cute", "kernels for Hopper GPUs"),
    Package("transformers", "transformers", "huggingface", "Hugging Face models"),
    Package("megatron-core", "megatron", "megatron", "Megatron layers"),
    Package("torchtitan", "torchtitan", "torchtitan", "torchtitan models"),
    Package("rich", "rich", "examples", "live display of the examples"),
    Package("matplotlib", "matplotlib", "examples", "charts of the examples and benchmarks"),
)

_NAMES = ", ".join(kernels.backends())
ENVIRONMENT = {
    "SONIC_BACKEND": f"insist on one backend ({_NAMES}) where code names none; not set: the fastest that fits",
    "SONIC_CACHE_DIR": "folder for compiled Hopper kernels; not set: sonic in the user's cache folder",
    "SONIC_SIMULATE_HOPPER": "1: a program that asks runs its CuTe-DSL kernels in the simulator; not set: it does not",
    "SONIC_TRITON_TUNED": "file of tile configurations that Triton kernels take; not set: a model chooses them",
}

# Largest relative error of a right answer. The doctor looks for kernels that are wrong on this machine; how exact they
# are is for tests.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 5e-2}

# Processor features that decide how fast 16-bit matrices are, as Linux names them (x86, then Arm).
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")


@dataclasses.dataclass(frozen=True)
class _Device:
    name: str  # as torch takes it: "cpu", "cuda:0"
    type: str
    chip: str
    arch: int | None
    memory_gib: float | None
    details: str


class _Sizes:
    """Of the layer that is checked: no two of them alike, all of them fit for any kernel."""

    num_tokens = 48
    hidden_size = 64
    intermediate_size = 32
    num_experts = 4
    top_k = 2


@dataclasses.dataclass
class _Check:
    dtype: str
    tolerance: float
    error: float | None = None  # largest relative error; None: it did not come to an end
    right: bool = False
    failure: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after ``python -m sonic``; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sonic", description="Tools of sonic, a library for training Mixture-of-Experts models."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="what sonic finds on this machine, what is missing, and whether its numbers are right",
        description="Tell what sonic finds on this machine, and run a tiny layer on every backend that can be used. "
        "Exit code: 0 if the reference backend can be used and every backend that can is right, else 1.",
    )
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(run=_doctor)
    add_plan_command(commands)
    add_warmup_command(commands)
    add_convert_command(commands)
    add_bench_command(commands)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def _doctor(options: argparse.Namespace) -> int:
    findings = _examine()
    print(json.dumps(findings, indent=2) if options.json else _text(findings))
    return 0 if findings["works"] else 1


# ---------------------------------------------------------------- what there is


def _examine() -> dict[str, Any]:
    """Everything that the doctor tells, as plain data."""
    devices = _devices()
    backends: list[dict[str, Any]] = [
        {"name": name, "devices": [_on_device(name, device) for device in devices]} for name in kernels.backends()
    ]
    reference = backends[kernels.backends().index("reference")]
    checks = [entry["check"] for backend in backends for entry in backend["devices"] if entry["usable"]]
    environment = [
        {"name": name, "value": os.environ.get(name), "meaning": meaning, "fault": _environment_fault(name)}
        for name, meaning in ENVIRONMENT.items()
    ]
    unusable = {
        backend["name"]: "; ".join(dict.fromkeys(reason for entry in backend["devices"] for reason in entry["reasons"]))
        for backend in backends
        if not any(entry["usable"] for entry in backend["devices"])
    }
    mistakes = find_mistakes(facts_of_this_machine(tuple(ENVIRONMENT), unusable))
    return {
        "sonic": {"version": sonic.__version__, "path": str(Path(sonic.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "devices": [dataclasses.asdict(device) for device in devices],
        "backends": backends,
        "packages": [
            {**dataclasses.asdict(package), "version": _version(package), "install": package.install}
            for package in PACKAGES
        ],
        "environment": environment,
        "mistakes": [dataclasses.asdict(mistake) for mistake in mistakes],
        "works": any(entry["usable"] for entry in reference["devices"])
        and all(check["right"] for check in checks)
        and not any(variable["fault"] for variable in environment)
        and not any(mistake.stops for mistake in mistakes),
    }


def _devices() -> list[_Device]:
    devices = [_cpu()]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        major, minor = torch.cuda.get_device_capability(index)
        details = f"sm_{major}{minor}" if torch.version.hip is None else str(getattr(properties, "gcnArchName", "AMD"))
        memory = properties.total_memory / 2**30
        devices.append(_Device(f"cuda:{index}", "cuda", properties.name, major * 10 + minor, memory, details))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != "cuda":
        devices.append(_Device(accelerator.type, accelerator.type, accelerator.type, None, None, "not a CUDA device"))
    return devices


def _cpu() -> _Device:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; elsewhere the platform module knows the name and little more
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    chip = fields.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = None
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    details = [
        f"{cores} cores",
        f"{torch.get_num_threads()} threads",
        f"torch's kernels for {torch.backends.cpu.get_cpu_capability()}",
    ]
    if flags:
        details.append("has " + (" ".join(name for name in _FEATURES if name in flags) or "no vector features"))
    return _Device("cpu", "cpu", chip, None, memory, ", ".join(details))


def _version(package: Package) -> str | None:
    """Version of an installed package, ``"unknown"`` if it does not say, None if it is missing; imports nothing."""
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package.module) else None


def _environment_fault(name: str) -> str | None:
    value = os.environ.get(name)
    if name == "SONIC_BACKEND" and value and value not in kernels.backends():
        return f"{value!r} is no backend, expected one of {', '.join(kernels.backends())}"
    if name == "SONIC_TRITON_TUNED" and value and not os.path.isfile(value):
        return f"{value!r} is no file, expected one that tuning has written"
    return None


# ---------------------------------------------------------------- whether it is right


def _on_device(backend: str, device: _Device) -> dict[str, Any]:
    reasons = kernels.unusable_reasons(backend, device.type, device.arch)
    check = None if reasons else dataclasses.asdict(_check(backend, device))
    return {"device": device.name, "usable": not reasons, "reasons": reasons, "check": check}


def _check(backend: str, device: _Device) -> _Check:
    """Run a tiny layer forward and backward on one backend and compare with a loop over its experts in float64.

    Only failures that belong to the machine (a package, a driver, a request that is not served) are told; a fault of
    the code shows its traceback.
    """
    # the reference is the definition of right, so it is asked for all digits where the device has them
    wanted = torch.float64 if backend == "reference" and device.type in ("cpu", "cuda") else torch.float32
    answer = kernels.explain(
        "up_proj",
        num_tokens=_Sizes.num_tokens,
        hidden_size=_Sizes.hidden_size,
        intermediate_size=_Sizes.intermediate_size,
        num_experts=_Sizes.num_experts,
        top_k=_Sizes.top_k,
        dtype=wanted,
        device=device.type,
        arch=device.arch,
        backend=backend,
    )
    dtype = wanted if answer.backend else torch.bfloat16
    check = _Check(str(dtype).removeprefix("torch."), _TOLERANCE[dtype])
    before = kernels.counts()
    try:
        check.error = _largest_error(backend, torch.device(device.name), dtype)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        check.failure = f"{type(error).__name__}: {error}"
        return check
    left = dispatch.left_to_others(backend)
    ran = [key for key, calls in kernels.counts().items() if calls > before.get(key, 0)]
    ran_on = {name for op, name in ran if op not in left}
    if ran_on != {backend}:
        check.failure = f"ran on {', '.join(sorted(ran_on)) or 'nothing'} instead of {backend}"
    check.right = check.failure is None and check.error <= check.tolerance  # NaN is not
    return check


def _largest_error(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error, |got - want| / |want| per tensor, over the output and the gradients of a SwiGLU layer."""
    width = _Sizes.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = sonic.MoE(
            width, _Sizes.intermediate_size, _Sizes.num_experts, _Sizes.top_k, backend=backend, dtype=dtype
        ).to(device)
        x, dy = torch.randn(2, _Sizes.num_tokens, width, dtype=torch.float64).to(device, dtype)
    x.requires_grad_()
    y, routing = layer(x, return_routing=True)
    named = {"x": x, "w1": layer.w1, "w2": layer.w2, "router": layer.router.weight}
    got = (y, *torch.autograd.grad(y, tuple(named.values()), dy))

    # a device may lack float64, so the loop runs on the CPU
    exact = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in named.items()}
    out = _dense_loop(exact["x"], exact["w1"], exact["w2"], exact["router"], routing.expert_index.cpu().long())
    want = (out, *torch.autograd.grad(out, tuple(exact.values()), dy.cpu().double()))
    errors = [(have.detach().cpu().double() - true).norm() / true.norm() for have, true in zip(got, want, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any is


def _dense_loop(x_TD: Tensor, w1_EUD: Tensor, w2_EDN: Tensor, router_ED: Tensor, expert_TK: Tensor) -> Tensor:
    """The definition of the layer: every expert on every token, weighted by a softmax over the chosen ones' logits."""
    scores_TK = (x_TD @ router_ED.T).gather(1, expert_TK).softmax(1)
    scores_TE = x_TD.new_zeros(x_TD.shape[0], len(w1_EUD)).scatter(1, expert_TK, scores_TK)
    out_TD = torch.zeros_like(x_TD)
    for expert, (w1_UD, w2_DN) in enumerate(zip(w1_EUD, w2_EDN, strict=True)):
        gate_TN, up_TN = (x_TD @ w1_UD.T).chunk(2, 1)
        out_TD = out_TD + scores_TE[:, expert, None] * ((torch.nn.functional.silu(gate_TN) * up_TN) @ w2_DN.T)
    return out_TD


# ---------------------------------------------------------------- as text


def _text(findings: dict[str, Any]) -> str:
    torch_facts = findings["torch"]
    build = "CPU only"
    for maker, release in (("CUDA", torch_facts["cuda"]), ("ROCm", torch_facts["hip"])):
        build = f"{maker} {release}" if release else build
    lines = [
        f"sonic {findings['sonic']['version']} in {findings['sonic']['path']}",
        "python {version} ({executable}) on {platform}".format(**findings["python"]),
        f"torch {torch_facts['version']} ({build})",
        "",
        "Devices",
    ]
    for device in findings["devices"]:
        memory = f", {device['memory_gib']:.1f} GiB" if device["memory_gib"] else ""
        lines.append(f"  {device['name']:<10} {device['chip']}{memory}, {device['details']}")
    lines += ["", "Backends, in the order in which they are tried"]
    for backend in findings["backends"]:
        for index, entry in enumerate(backend["devices"]):
            lines.append(f"  {backend['name'] if index == 0 else '':<10} on {entry['device']}: {_verdict(entry)}")
    lines += ["", "Optional packages"]
    for package in findings["packages"]:
        found = package["version"] or f"missing; {package['install']}"
        lines.append(f"  {package['distribution']:<18} {found:<48} {package['purpose']}")
    lines += ["", "Environment"]
    for variable in findings["environment"]:
        value = "not set" if variable["value"] is None else f"= {variable['value']!r}"
        fault = f"; {variable['fault']}" if variable["fault"] else ""
        lines.append(f"  {variable['name']} {value}{fault}  ({variable['meaning']})")
    if findings["mistakes"]:
        lines += ["", "To mend"]
    for mistake in findings["mistakes"]:
        lines.append(f"  {mistake['what']}")
        lines.append(f"    -> {mistake['cure']}")
    lines += ["", "sonic works here." if findings["works"] else "sonic does NOT work here: see above."]
    return "\n".join(lines)


def _verdict(entry: dict[str, Any]) -> str:
    if not entry["usable"]:
        return "cannot be used: " + "; ".join(entry["reasons"])
    check = entry["check"]
    if check["failure"] is not None:
        return f"can be used, but its check in {check['dtype']} FAILED: {check['failure']}"
    verdict = "right" if check["right"] else "WRONG"
    error = f"largest relative error {check['error']:.1e}, forward and backward"
    return f"can be used; {verdict} in {check['dtype']} ({error})"
