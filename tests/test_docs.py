"""Pages: messages that troubleshooting explains are raised, every public name is in the reference, the site builds."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sonic
from sonic.routing import ExpertChoiceRouter, TokenRounding, TopKRouter
from tests.messages import messages_of, page_messages, source_messages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def differentiate_twice() -> None:
    layer = sonic.MoE(8, 4, num_experts=2, top_k=1)
    x = torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    dx.sum().backward()


def route_nan() -> None:
    ExpertChoiceRouter(8, num_experts=2, top_k=1)(torch.full((4, 8), float("nan")))


def insist() -> None:
    sonic.MoE(8, 4, num_experts=2, top_k=1, backend="cute")(torch.randn(4, 8))


LAYER = dict(hidden_size=8, intermediate_size=4, num_experts=2, top_k=1)
PROVOKED: tuple[Callable[[], object], ...] = (
    lambda: sonic.moe_mlp(
        torch.randn(3, 8),
        torch.randn(2, 7, 8),
        torch.randn(2, 8, 4),
        torch.rand(3, 1),
        sonic.RoutingPlan.from_topk(torch.zeros(3, 1, dtype=torch.long), 2),
    ),
    lambda: sonic.MoE(**LAYER)(torch.randn(3, 9)),
    lambda: sonic.MoE(**LAYER, dtype=torch.bfloat16)(torch.randn(3, 8)),
    lambda: sonic.RoutingPlan.from_topk(torch.zeros(3, 4, dtype=torch.long), 2),
    route_nan,
    lambda: TokenRounding(TopKRouter(8, num_experts=2, top_k=1), tile_rows=64)(torch.randn(16, 8)),
    lambda: TopKRouter(8, num_experts=2, top_k=1, aux_loss_type="sequence", aux_loss_coeff=1.0)(
        torch.randn(16, 8), sequence_length=5
    ),
    lambda: TopKRouter(8, num_experts=2, top_k=1).update_expert_bias(),
    insist,
    differentiate_twice,
)


def messages() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [block.strip() for block in re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)]


def provoked() -> list[str]:
    found = []
    for provoke in PROVOKED:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            provoke()
        found.append(str(caught.value))
    return found


def test_messages_that_are_explained_are_raised() -> None:
    raised = provoked()
    # literal pieces of messages that take several processes, a GPU or another package: as the source has them
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sonic").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)
    foreign = {"Cannot use ReduceOp.PREMUL_SUM with Gloo"}  # torch's
    unknown = []
    for message in messages():
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        pieces = [part.strip(" ,") for part in re.split(r"…|, expected ", message)]
        if not any(re.search(pattern, text) for text in raised) and not all(piece in source for piece in pieces):
            unknown.append(message)
    assert set(unknown) == foreign
    told = [
        text for text in raised if any(re.search(".*".join(map(re.escape, m.split("…"))), text) for m in messages())
    ]
    assert told == raised, "every provoked message is explained"


def test_every_message_is_explained() -> None:
    source, pages = source_messages(), page_messages()
    assert pages.keys() == source.keys()
    for page, found in source.items():
        assert len(found) > 3, "the sources have messages"
        missing, unused = found - pages[page].keys(), pages[page].keys() - found
        assert not missing, f"docs/errors/{page}.md lacks {missing}; see tests/messages.py"
        assert not unused, f"docs/errors/{page}.md explains what is raised no more: {unused}"
        for message, cure in pages[page].items():
            assert 8 <= len(cure.split()) <= 80, f"{message}: {cure}"


def test_messages_are_read_from_code(tmp_path: Path) -> None:
    code = """
def f(x):
    where, wanted = "sonic.f", "a number"
    if x < 0:
        wanted = f"at least {x}"
    for name, value in (("a", 1), ("b", 2)):
        raise argument_error(where, name, value, "positive")
    raise argument_error(where, "x", x, wanted)
    raise ImportError(f"{where}: needs {x} (pip install it)")
    raise error
"""
    assert sorted(set(messages_of(ast.parse(code)))) == [
        "a is …, expected positive",
        "b is …, expected positive",
        "needs … (pip install it)",
        "x is …, expected a number",
        "x is …, expected at least …",
    ]


PUBLIC = (
    "sonic.layers",
    "sonic.functional",
    "sonic.routing",
    "sonic.kernels",
    "sonic.kernels.ops",
    "sonic.roofline",
    "sonic.shapes",
    "sonic.parallel",
    "sonic.planner",
    "sonic.convert",
    "sonic.simulator",
    "sonic.layers.fsdp",
    "sonic.layers.huggingface",
    "sonic.layers.megatron",
)


def test_every_public_module_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"automodule:: ([\w.]+)", pages))
    assert listed >= set(PUBLIC)
    for name in listed:
        assert importlib.util.find_spec(name) is not None, name
    # every package of the library, so that a new one is not forgotten
    packages = {f"sonic.{path.parent.name}" for path in (ROOT / "sonic").glob("*/__init__.py")}
    assert packages <= listed | {"sonic.bench"}  # a command, and nothing to call
    # what stands at the top is one of theirs
    for name in set(sonic.__all__) - {"kernels", "layers", "routing"}:
        value = getattr(sonic, name)
        assert any(getattr(importlib.import_module(module), name, None) is value for module in PUBLIC[:5]), name


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.M), page.name


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_names_everything(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed (the extra 'docs')")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    text = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "api").glob("*.html"))
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            assert f'id="{module}.{name}"' in text or f'.{name}"' in text, f"{module}.{name}"
