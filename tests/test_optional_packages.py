"""What an environment need not hold: without a package, and with an old one, all else works and the cure is told.

Each case is a process of its own that cannot import the packages, or finds husks of them instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# import name -> distribution
PACKAGES = {
    "triton": "triton",
    "cutlass": "nvidia-cutlass-dsl",
    "quack": "quack-kernels",
    "transformers": "transformers",
    "megatron": "megatron-core",
    "torchtitan": "torchtitan",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "scattermoe": "scattermoe",
    "sonicmoe": "sonicmoe",
}
# what asks for a package
FACES = {
    "transformers": "sonic.huggingface.enable()",
    "megatron": "sonic.megatron.enable()",
    "torchtitan": "import sonic.torchtitan",
}
# what says so in a message: a face's own words for a missing package, for an old one the same or more exact ones
CURES = {
    "transformers": ("sonic-moe[huggingface]", "5.0"),
    "megatron": ("megatron-core >= 0.16", "megatron-core >= 0.16"),
    "torchtitan": ("sonic-moe[torchtitan]", "sonic-moe[torchtitan]"),
}

PROGRAM = """
import importlib.metadata, importlib.util, json, sys, types

is_old, packages, distributions = sys.argv[1] == "old", sys.argv[2].split(","), sys.argv[3].split(",")

class Husks:
    # an old package: it is there, says its version, and has nothing of what is looked for
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in packages or (is_old and name.split(".")[0] == "triton"):
            return None  # torch itself looks into Triton: an old one just says its version here
        if not is_old:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.util.spec_from_loader(name, self, is_package=True) if path is None else None
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = "0.1.0"
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Husks())
real_version = importlib.metadata.version
def version(name):
    if name in distributions:
        if is_old:
            return "0.1.0"
        raise importlib.metadata.PackageNotFoundError(name)
    return real_version(name)
importlib.metadata.version = version
real_spec = importlib.util.find_spec
def find_spec(name, package=None):
    if name.split(".")[0] in packages and not is_old:
        return None
    if name == "triton" and name in packages:
        return importlib.util.spec_from_loader(name, None)  # as if it were there, where it is not
    return real_spec(name, package)
importlib.util.find_spec = find_spec

import torch
import sonic
import sonic.functional, sonic.routing, sonic.kernels, sonic.roofline, sonic.parallel, sonic.planner, sonic.convert
import sonic.layers.fsdp, sonic.fsdp, sonic.compat, sonic.bench, sonic.cli, sonic.setup_mistakes
assert not [name for name in sys.modules if name.split(".")[0] in packages], "imported, though not asked for"

layer = sonic.MoE(16, 8, num_experts=4, top_k=2)
x = torch.randn(10, 16, requires_grad=True)
layer(x).square().mean().backward()
assert torch.isfinite(x.grad).all()
print("layer: works")
for backend in ("triton", "cute"):
    try:
        sonic.MoE(16, 8, num_experts=4, top_k=2, backend=backend)(torch.randn(4, 16))
    except ValueError as error:
        print(f"{backend}: {error}")
for package in packages:
    try:
        exec(json.loads(sys.argv[4]).get(package, ""))
    except ImportError as error:
        print(f"{package}: {error}")
code = sonic.cli.main(["doctor"])
print(f"doctor: {code}")
"""


def run(state: str, packages: list[str]) -> str:
    distributions = [PACKAGES[name] for name in packages]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, state, ",".join(packages), ",".join(distributions), json.dumps(FACES)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"{start}: "))
    return found


@pytest.mark.parametrize("state", ["missing", "old"])
def test_all_at_once(state: str) -> None:
    told = run(state, list(PACKAGES))
    assert "layer: works" in told and "doctor: 0" in told
    for package, cures in CURES.items():
        assert cures[state == "old"] in line(told, package)
    if state == "old":
        assert "triton is 0.1.0: pip install 'triton>=3.4'" in line(told, "triton")
        assert "nvidia-cutlass-dsl is 0.1.0: pip install 'nvidia-cutlass-dsl>=4.8,<4.9'" in line(told, "cute")
        for name in ("triton", "nvidia-cutlass-dsl", "transformers", "megatron-core", "torchtitan"):
            assert f"{name} is 0.1.0" in told.split("cute: ", 1)[1], "the doctor tells it"
    else:
        assert "Triton is not installed" in line(told, "triton")
        assert "CuTe-DSL is not installed" in line(told, "cute")


@pytest.mark.long
@pytest.mark.parametrize("package", list(PACKAGES))
@pytest.mark.parametrize("state", ["missing", "old"])
def test_one_alone(package: str, state: str) -> None:
    told = run(state, [package])
    assert "layer: works" in told and "doctor: 0" in told
    if package in CURES:
        assert CURES[package][state == "old"] in line(told, package)
