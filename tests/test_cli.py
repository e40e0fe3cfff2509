"""``python -m sonic doctor``: what it finds, what it tells to install, and that it notices a backend that is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic import cli, kernels

ROOT = Path(__file__).parent.parent


def examine(capsys: pytest.CaptureFixture[str], *, code: int) -> dict[str, Any]:
    assert cli.main(["doctor", "--json"]) == code
    findings: dict[str, Any] = json.loads(capsys.readouterr().out)
    return findings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _reference_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes seconds for each check, so one test asks for all backends."""
    if "every_backend" not in request.node.name:
        real = kernels.unusable_reasons
        monkeypatch.setattr(
            kernels,
            "unusable_reasons",
            lambda backend, *device: real(backend, *device) or ([] if backend == "reference" else ["left out"]),
        )


def test_doctor_ends_well_and_tells_the_versions() -> None:
    command = [sys.executable, "-m", "sonic", "doctor"]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=plain)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"sonic {sonic.__version__} in " in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert "reference  on cpu: can be used; right in float64" in done.stdout
    assert done.stdout.rstrip().endswith("sonic works here.")
    assert done.stderr == ""


def test_doctor_loads_no_optional_package() -> None:
    names = tuple({package.module for package in cli.PACKAGES})
    probe = (
        "import sys, torch; before = set(sys.modules); from sonic import cli; "
        "versions = [cli._version(package) for package in cli.PACKAGES]; "
        f"print(sorted({{name.split('.')[0] for name in set(sys.modules) - before}} & set({names!r})))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_json_holds_every_backend_with_a_verdict_or_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine(capsys, code=0)
    assert [backend["name"] for backend in findings["backends"]] == list(kernels.backends())
    for backend in findings["backends"]:
        assert [entry["device"] for entry in backend["devices"]] == [device["name"] for device in findings["devices"]]
        for entry in backend["devices"]:
            assert entry["usable"] == (not entry["reasons"])
            assert (entry["check"] is not None) == entry["usable"]
            if entry["usable"]:
                assert entry["check"]["right"] and 0 < entry["check"]["error"] <= entry["check"]["tolerance"]
    (reference,) = (backend for backend in findings["backends"] if backend["name"] == "reference")
    assert reference["devices"][0]["check"]["dtype"] == "float64"
    assert reference["devices"][0]["check"]["error"] < 1e-14
    assert findings["works"] is True


def test_text_tells_why_a_backend_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"cute": ["needs a Hopper GPU", "cutlass is missing"], "triton": ["needs a GPU"], "reference": []}
    monkeypatch.setattr(kernels, "unusable_reasons", lambda backend, *device: reasons[backend])
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "on cpu: cannot be used: needs a Hopper GPU; cutlass is missing" in told
    assert "on cpu: cannot be used: needs a GPU" in told


def test_chip_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, *others = examine(capsys, code=0)["devices"]
    assert cpu["name"] == "cpu" and cpu["chip"] and "cores" in cpu["details"]
    assert len(others) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.gpu
def test_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = examine(capsys, code=0)["devices"][1]
    major, minor = torch.cuda.get_device_capability(0)
    assert gpu["chip"] == torch.cuda.get_device_name(0) and gpu["arch"] == 10 * major + minor
    assert gpu["memory_gib"] > 1


def test_missing_package_comes_with_the_line_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(name: str) -> Any:
        if name in {package.distribution for package in cli.PACKAGES}:
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    real_version, real_spec = importlib.metadata.version, importlib.util.find_spec
    missing = {package.module for package in cli.PACKAGES}
    monkeypatch.setattr(importlib.metadata, "version", not_found)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in missing else real_spec(name, *more)
    )
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for package in cli.PACKAGES:
        (line,) = (line for line in lines if line.startswith(f"  {package.distribution} ") and package.purpose in line)
        assert f"missing; pip install 'sonic-moe[{package.extra}]'" in line


def test_present_package_comes_with_its_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "PACKAGES", (cli.Package("pytest", "pytest", "test", "testing"),))
    (package,) = examine(capsys, code=0)["packages"]
    assert package["version"] == pytest.__version__


def test_every_extra_that_is_told_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in cli.PACKAGES:
        (requirements,) = (line for line in text.splitlines() if line.startswith(f"{package.extra} = "))
        assert package.distribution in requirements


def test_wrong_numbers_are_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*tensors: Tensor) -> Tensor:
        return real(*tensors) * (1 + 1e-6)

    real = cli._dense_loop
    monkeypatch.setattr(cli, "_dense_loop", wrong)
    findings = examine(capsys, code=1)
    check = findings["backends"][-1]["devices"][0]["check"]
    assert not check["right"] and check["error"] == pytest.approx(1e-6, rel=0.01) and check["failure"] is None
    assert findings["works"] is False
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "WRONG in float64" in told and "does NOT work" in told


def test_nan_is_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_largest_error", lambda *arguments: float("nan"))
    monkeypatch.setattr(kernels, "counts", _counts_that_grow())
    assert cli.main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_check_that_another_backend_served_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_largest_error", lambda *arguments: 0.0)
    check = examine(capsys, code=1)["backends"][-1]["devices"][0]["check"]
    assert check["failure"] == "ran on nothing instead of reference"


def test_a_failing_kernel_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> float:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cli, "_largest_error", fail)
    assert cli.main(["doctor"]) == 1
    assert "FAILED: RuntimeError: no kernel image is available" in capsys.readouterr().out


def test_environment_is_told_and_a_fault_in_it_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONIC_BACKEND", "reference")
    assert cli.main(["doctor"]) == 0
    assert "SONIC_BACKEND = 'reference'" in capsys.readouterr().out
    monkeypatch.setenv("SONIC_BACKEND", "fastest")
    assert cli.main(["doctor"]) == 1
    assert "'fastest' is no backend, expected one of cute, triton, reference" in capsys.readouterr().out
    monkeypatch.setenv("SONIC_BACKEND", "reference")
    monkeypatch.setenv("SONIC_TRITON_TUNED", "nowhere.json")
    assert cli.main(["doctor"]) == 1
    assert "'nowhere.json' is no file, expected one that tuning has written" in capsys.readouterr().out


def test_doctor_leaves_the_random_numbers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    expected = torch.rand((), generator=torch.Generator().manual_seed(0))
    assert cli.main(["doctor"]) == 0
    assert torch.rand(()) == expected


@pytest.mark.parametrize("arguments", [[], ["tea"], ["doctor", "--tea"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "python -m sonic" in capsys.readouterr().err


def _counts_that_grow() -> Any:
    calls = iter(range(100))
    return lambda: {("up_proj", "reference"): next(calls)}
