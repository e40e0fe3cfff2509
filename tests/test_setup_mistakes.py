"""Each likely mistake of an installation is told on a machine that has it, and only there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sonic import cli, kernels
from sonic.setup_mistakes import Facts, facts_of_this_machine, find_mistakes
from sonic.versions import RANGES

ROOT = Path(__file__).parent.parent

HEALTHY = Facts(
    environment={"HOME": "/home/me", "SONIC_BACKEND": ""},
    known_variables=tuple(cli.ENVIRONMENT),
    unusable_backends={},
    versions={"torch": "2.11.0+cu130", "triton": "3.6.0", "nvidia-cutlass-dsl": "4.8.1", "transformers": "5.23.0"},
    owners=("sonic-moe",),
    torch_cuda="13.0",
    nvidia_gpus=8,
    archs=(90,) * 8,
    has_compiler=True,
    cache="/home/me/.cache/sonic",
    cache_is_writable=True,
    num_cores=64,
    num_threads=64,
    is_launched=False,
    python=(3, 12),
)
LAPTOP = dataclasses.replace(
    HEALTHY, torch_cuda=None, nvidia_gpus=0, archs=(), versions={"torch": "2.8.0"}, has_compiler=False, owners=()
)


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in HEALTHY.versions.items() if name not in names}


@pytest.mark.parametrize(
    "facts",
    [
        HEALTHY,
        LAPTOP,
        dataclasses.replace(HEALTHY, archs=(80,), versions=without("nvidia-cutlass-dsl")),
        dataclasses.replace(LAPTOP, num_threads=1, is_launched=True),
        dataclasses.replace(LAPTOP, environment={"TRITON_INTERPRET": "1"}),  # as tests have it
        dataclasses.replace(HEALTHY, owners=("sonic-moe", "sonic-moe")),  # an editable installation
        dataclasses.replace(HEALTHY, environment={"CUDA_VISIBLE_DEVICES": "3"}, archs=(90,)),
    ],
    ids=["hopper", "laptop", "ampere", "launched", "interpreter", "editable", "one of eight"],
)
def test_a_good_machine_is_left_alone(facts: Facts) -> None:
    assert find_mistakes(facts) == []


@pytest.mark.parametrize(
    ("name", "changes", "what", "cure"),
    [
        ("old-python", {"python": (3, 9)}, "Python is 3.9", "3.10"),
        (
            "wrong-version",
            {"versions": {"torch": "2.7.1+cu126"}, "archs": (), "nvidia_gpus": 0},
            "torch is 2.7.1",
            "torch>=2.8'",
        ),
        ("wrong-version", {"versions": {**without(), "triton": "3.3.1"}}, "triton is 3.3.1", "triton>=3.4'"),
        (
            "wrong-version",
            {"versions": {**without(), "nvidia-cutlass-dsl": "4.9.0"}},
            "nvidia-cutlass-dsl is 4.9.0",
            "nvidia-cutlass-dsl>=4.8,<4.9'",
        ),
        ("wrong-version", {"versions": {**without(), "transformers": "4.57.1"}}, "transformers is 4.57.1", ">=5.0'"),
        ("other-sonic", {"owners": ("sonic", "sonic-moe")}, "another distribution .*: sonic$", "pip uninstall sonic,"),
        ("cpu-torch", {"torch_cuda": None, "archs": ()}, r"8 NVIDIA GPU\(s\).*for CPUs only", "built for CUDA"),
        ("hidden-gpus", {"environment": {"CUDA_VISIBLE_DEVICES": ""}, "archs": ()}, "hides 8", "unset"),
        ("hidden-gpus", {"environment": {"CUDA_VISIBLE_DEVICES": "-1"}, "archs": ()}, "'-1' hides", "unset"),
        ("no-driver", {"archs": ()}, "CUDA 13.0. sees none", "nvidia-smi"),
        ("old-gpu", {"archs": (75, 90)}, "compute capability 7.5:", "Ampere"),
        ("no-triton", {"versions": without("triton")}, "no Triton", r"sonic-moe\[triton\]"),
        ("no-cute", {"versions": without("nvidia-cutlass-dsl")}, "no CuTe-DSL", r"sonic-moe\[cute\]"),
        ("interpreted", {"environment": {"TRITON_INTERPRET": "1"}}, "run in Python", "unset"),
        ("no-compiler", {"has_compiler": False}, "no C compiler.*triton and nvidia-cutlass-dsl", "gcc"),
        ("unknown-variable", {"environment": {"SONIC_BACKENDS": "cute"}}, "SONIC_BACKENDS is", "mean SONIC_BACKEND"),
        ("unknown-variable", {"environment": {"SONIC_TEA": "1"}}, "SONIC_TEA is set", "it reads SONIC_"),
        (
            "unusable-backend",
            {"environment": {"SONIC_BACKEND": "cute"}, "unusable_backends": {"cute": "needs a Hopper GPU"}},
            "insists .*: needs a Hopper GPU",
            "unset SONIC_BACKEND",
        ),
        ("closed-cache", {"cache_is_writable": False}, "/home/me/.cache/sonic, cannot", "SONIC_CACHE_DIR"),
        ("one-thread", {"num_threads": 1, "archs": (), "nvidia_gpus": 0}, "64 cores", "OMP_NUM_THREADS"),
    ],
)
def test_a_mistake_is_told_with_its_cure(name: str, changes: dict, what: str, cure: str) -> None:
    (found,) = find_mistakes(dataclasses.replace(HEALTHY, **changes))
    assert found.name == name
    assert re.search(what, found.what) and re.search(cure, found.cure), found
    assert found.stops == (
        name in ("old-python", "other-sonic", "unusable-backend") or found.what.startswith("torch is")
    )


def test_the_gravest_comes_first() -> None:
    found = find_mistakes(dataclasses.replace(HEALTHY, archs=(75,), owners=("sonic",)))
    assert [mistake.name for mistake in found] == ["other-sonic", "old-gpu"]


def test_doctor_tells_them_and_fails_where_one_stops(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"cute": ["left out"], "triton": ["left out"], "reference": []}  # the doctor would try them
    monkeypatch.setattr(kernels, "unusable_reasons", lambda backend, *device: reasons[backend])
    monkeypatch.setattr(cli, "facts_of_this_machine", lambda *_: dataclasses.replace(HEALTHY, archs=(75,)))
    assert cli.main(["doctor"]) == 0
    assert "To mend\n  a GPU of compute capability 7.5" in capsys.readouterr().out
    monkeypatch.setattr(cli, "facts_of_this_machine", lambda *_: dataclasses.replace(HEALTHY, owners=("sonic",)))
    assert cli.main(["doctor"]) == 1
    assert "-> pip uninstall sonic" in capsys.readouterr().out


def test_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "not" / "there"))
    facts = facts_of_this_machine(("SONIC_CACHE_DIR",), {})
    assert facts.cache == str(tmp_path / "not" / "there") and facts.cache_is_writable
    (tmp_path / "file").touch()
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "file"))
    assert not facts_of_this_machine((), {}).cache_is_writable
    assert facts.num_cores >= 1 and facts.num_threads >= 1 and "torch" in facts.versions


def test_ranges_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, (least, below) in RANGES.items():
        wanted = f"{name}>={'.'.join(map(str, least))}" + (f",<{'.'.join(map(str, below))}" if below else "")
        assert re.search(rf'"{re.escape(wanted)}[";]', text), wanted
