"""The house itself: who imports whom, what an import costs, documentation that is true, and the files around the code.

Each rule is a function that returns its faults as text. It is tried on code that breaks it before it is trusted with
the real files.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sonic
from sonic import cli

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest needs it there
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "sonic").rglob("*.py"))
OUTSIDE = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


@functools.cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@functools.cache
def tracked_files() -> list[Path]:
    """Every file of the project that git does not ignore; without git, those outside dot folders and known output."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        output = {"report", "build", "dist", "__pycache__"}
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in output or (part.startswith(".") and part != ".ci") or part.endswith(".egg-info")
                for part in path.relative_to(ROOT).parts[:-1]
            )
        ]
    return sorted(path for path in paths if path.is_file())


# ---------------------------------------------------------------- who imports whom


@dataclass(frozen=True)
class Room:
    """What the files under one path may import.

    Attributes:
        path: a folder (with a trailing slash) or file under ``sonic/``; the longest match holds.
        sonic: modules of the library; a folder's modules may always import each other.
        others: packages beside torch and the standard library.
        lazily: the same, but only inside functions.
        may_use_nn: all of ``torch.nn``; its functions (``torch.nn.functional``) are for everyone.
    """

    path: str
    sonic: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()
    may_use_nn: bool = True


# `shapes` (the words) is for all rooms but the simulator; `autograd` (what autograd functions share) for those that
# hold such functions.
_LAYERS = ("sonic.shapes", "sonic.autograd", "sonic.functional", "sonic.routing", "sonic.parallel")
_FACES = (*_LAYERS, "sonic.layers")
_KERNELS = ("sonic.shapes", "sonic.versions")
_CONTRACTS = ("sonic.shapes", "sonic.kernels.dispatch")
_PARALLEL = ("sonic.shapes", "sonic.autograd", "sonic.functional")
ROOMS = (
    Room("__init__.py", ("sonic",)),
    Room("__main__.py", ("sonic.cli",)),
    Room("cli.py", ("sonic",)),
    Room("shapes.py"),
    Room("setup_mistakes.py", ("sonic.versions",)),
    Room("versions.py"),
    Room("autograd.py", ("sonic.shapes",)),
    Room("roofline.py", ("sonic.shapes",)),
    Room("kernels/__init__.py", ("sonic.kernels.dispatch", "sonic.kernels.ops", "sonic.kernels.warming")),
    Room("kernels/dispatch.py", ("sonic.shapes",), may_use_nn=False),
    Room("kernels/checks.py", ("sonic.shapes", "sonic.kernels.dispatch"), may_use_nn=False),
    Room("kernels/ops.py", ("sonic.shapes", "sonic.kernels.dispatch", "sonic.kernels.checks"), may_use_nn=False),
    # compiling ahead is asked of the one backend that does
    Room("kernels/warming.py", (*_CONTRACTS, "sonic.kernels.checks", "sonic.kernels.cute.ahead"), may_use_nn=False),
    Room("kernels/cli.py", (*_CONTRACTS, "sonic.kernels.checks", "sonic.kernels.warming"), may_use_nn=False),
    Room("kernels/reference/", ("sonic.shapes",), ("numpy",), may_use_nn=False),
    Room("kernels/triton/", (*_KERNELS, "sonic.roofline"), ("triton",), may_use_nn=False),
    # `simulator`: on a CPU its kernels are launched there, once somebody has opened it
    Room("kernels/cute/", (*_KERNELS, "sonic.roofline", "sonic.simulator"), ("cutlass",), may_use_nn=False),
    Room("simulator/", (), ("numpy", "cutlass"), ("matplotlib",)),
    Room("routing/", ("sonic.shapes", "sonic.autograd", "sonic.kernels.ops")),
    Room("functional.py", ("sonic.shapes", "sonic.autograd", "sonic.kernels.ops", "sonic.routing.plan")),
    Room("convert/", ("sonic.shapes",), ("numpy",)),
    Room("bench/", ("sonic.shapes",)),
    Room("planner/", ("sonic.shapes", "sonic.roofline"), ("numpy",), ("matplotlib", "rich", "tomllib")),
    # `ops` and `plan`: rows that were received are planned, and those of a token are summed in float32 without atomics
    Room("parallel/", (*_PARALLEL, "sonic.kernels.ops", "sonic.routing.plan"), (), ("matplotlib", "rich")),
    Room("layers/", _LAYERS),
    Room("layers/huggingface.py", _FACES, (), ("transformers",)),
    # subclasses of Megatron's classes lie in files of their own, which the face reads when it is called
    Room("layers/megatron/", _FACES, (), ("megatron",)),
    *(Room(f"layers/megatron/{name}.py", _FACES, ("megatron",)) for name in ("experts", "layer", "router", "ladder")),
    # read by torchtitan itself, by its name on a command line
    Room("layers/torchtitan.py", _FACES, ("torchtitan",)),
    Room("compat/", (*_FACES, "sonic.kernels")),
    *(Room(f"{name}.py", (f"sonic.layers.{name}",)) for name in ("fsdp", "huggingface", "megatron", "torchtitan")),
)


@dataclass(frozen=True)
class Import:
    module: str  # the module, or the module and one name of it
    line: int
    is_lazy: bool


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every import of a file, nested ones and ``import_module("...")`` included; relative ones made absolute."""

    def walk(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            lazy = is_lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                lazy = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, base] if base else above)
                for alias in child.names:
                    yield Import(base if alias.name == "*" else f"{base}.{alias.name}", child.lineno, lazy)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in (
                "import_module",
                "__import__",
            ):
                if child.args and isinstance(child.args[0], ast.Constant):
                    yield Import(str(child.args[0].value), child.lineno, lazy)
            yield from walk(child, lazy)

    return walk(tree, False)


def is_within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


def room_of(path: str) -> Room | None:
    fitting = [room for room in ROOMS if path == room.path or (room.path.endswith("/") and path.startswith(room.path))]
    return max(fitting, key=lambda room: len(room.path), default=None)


def import_faults(tree: ast.Module, path: str) -> list[str]:
    """What a file of the library (its path under ``sonic/``) imports against the table."""
    room = room_of(path)
    if room is None:
        return [f"sonic/{path}: has no row in the table of rooms; add one to ROOMS"]
    own = "sonic." + room.path.rstrip("/").replace("/", ".") if room.path.endswith("/") else None
    package = ".".join(["sonic", *path.split("/")[:-1]])
    faults = []
    for found in imports_of(tree, package):
        top = found.module.split(".")[0]
        if top == "sonic":
            allowed = [*room.sonic, own] if own else room.sonic
            fits = any(is_within(found.module, module) for module in allowed)
        elif top == "torch":
            is_module = is_within(found.module, "torch.nn") and not is_within(found.module, "torch.nn.functional")
            fits = room.may_use_nn or not is_module
        else:
            fits = top in sys.stdlib_module_names or top in room.others or (top in room.lazily and found.is_lazy)
        if not fits:
            faults.append(f"sonic/{path}:{found.line}: imports {found.module}, which its room may not")
    return faults


@pytest.mark.parametrize(
    ("path", "code", "is_fault"),
    [
        ("kernels/reference/x.py", "from sonic.kernels import dispatch", True),
        ("kernels/reference/x.py", "from ..triton import gemm", True),
        ("kernels/reference/x.py", "from .blocks import walk\nfrom torch.nn import functional as F", False),
        ("kernels/reference/x.py", "from torch import nn", True),
        ("kernels/reference/x.py", "def f():\n    import triton", True),
        ("kernels/triton/x.py", "import triton.language as tl\nfrom sonic.shapes import check_shape", False),
        ("kernels/triton/x.py", "import sonic.kernels.cute.gemm", True),
        ("kernels/dispatch.py", "import sonic.kernels.reference", True),
        ("kernels/dispatch.py", "import importlib\nimportlib.import_module('sonic.kernels.triton')", True),
        (
            "kernels/dispatch.py",
            "import importlib\ndef load(name): importlib.import_module(f'sonic.kernels.{name}')",
            False,
        ),
        ("simulator/x.py", "import cutlass, numpy, torch\nfrom . import memory", False),
        ("simulator/x.py", "from sonic.shapes import check_shape", True),
        ("functional.py", "from sonic.routing import plan", False),
        ("functional.py", "from sonic.routing import topk", True),
        ("parallel/x.py", "from sonic.layers import MoE", True),
        ("layers/megatron/__init__.py", "def f():\n    from megatron.core import parallel_state", False),
        ("layers/megatron/__init__.py", "import megatron", True),
        ("layers/megatron/experts.py", "import megatron", False),
        ("layers/moe.py", "def f():\n    import megatron", True),
        ("layers/moe.py", "if True:\n    import pandas", True),
        ("utils.py", "", True),
    ],
)
def test_the_import_rule_finds_faults(path: str, code: str, is_fault: bool) -> None:
    assert bool(import_faults(ast.parse(code), path)) == is_fault


def test_each_room_imports_only_what_its_row_allows() -> None:
    assert_none(
        fault for path in LIBRARY for fault in import_faults(tree_of(path), path.relative_to(ROOT / "sonic").as_posix())
    )


def private_faults(tree: ast.Module, path: str) -> list[str]:
    """Names of ``sonic`` that users may not take: with an underscore in front, or not in a module's ``__all__``."""
    faults = []
    for found in imports_of(tree, path.removesuffix(".py").replace("/", ".").rpartition(".")[0]):
        if not is_within(found.module, "sonic"):
            continue
        module, _, name = found.module.rpartition(".")
        if any(part.startswith("_") for part in found.module.split(".")):
            faults.append(f"{path}:{found.line}: takes the private name {found.module}")
        elif module and importlib.util.find_spec(found.module.split(".")[0]) and not is_module(found.module):
            if name not in getattr(importlib.import_module(module), "__all__", [name]):
                faults.append(f"{path}:{found.line}: {found.module} is not in __all__ of {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"sonic(\.\w+)*\._(?!_)\w+(\.\w+)*", ast.unparse(node)):
            faults.append(f"{path}:{node.lineno}: takes the private name {ast.unparse(node)}")
    return faults


def is_module(name: str) -> bool:
    """Whether ``name`` is a module of this project; parents are not imported."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize(
    ("code", "is_fault"),
    [
        ("import sonic\nfrom sonic.routing import TopKRouter\nsonic.MoE\nsonic.__version__", False),
        ("from sonic.layers.moe import _check_router", True),
        ("import sonic\nsonic.kernels.dispatch._COUNTS", True),
        ("from sonic.shapes import Tensor", True),
    ],
)
def test_the_rule_of_public_names_finds_faults(code: str, is_fault: bool) -> None:
    assert bool(private_faults(ast.parse(code), "examples/x.py")) == is_fault


def test_examples_benchmarks_and_the_command_line_use_public_names_only() -> None:
    assert_none(
        fault for path in [*OUTSIDE, ROOT / "sonic/cli.py"] for fault in private_faults(tree_of(path), name_of(path))
    )


# ---------------------------------------------------------------- what an import costs

HEAVY = ("triton", "cutlass", "cuda", "quack", "transformers", "megatron", "torchtitan", "rich", "matplotlib")
IMPORT_PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import sonic
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds,
    "new": sorted(set(sys.modules) - before),
    "has_cuda_context": torch.cuda.is_initialized(),
}))
"""


def test_importing_sonic_is_cheap_and_touches_nothing() -> None:
    # Processor time, so that what else runs here counts little; the first try may have to compile the library's files.
    seconds = []
    for _ in range(5):
        probe = json.loads(run_python("-c", IMPORT_PROBE))
        packages = {module.split(".")[0] for module in probe["new"]}
        assert not packages & set(HEAVY), "`import sonic` loads optional packages"
        foreign = {package for package in packages - {"sonic", "torch"} if package not in sys.stdlib_module_names}
        assert not foreign, "`import sonic` loads packages that `import torch` does not"
        assert not probe["has_cuda_context"], "`import sonic` starts CUDA"
        seconds.append(probe["seconds"])
        if seconds[-1] <= 0.1:
            return
    pytest.fail(
        f"`import sonic` takes {min(seconds):.2f} s beside `import torch`, expected 0.1 s at most; loads {probe['new']}"
    )


# ---------------------------------------------------------------- code that says what it does

# Methods whose meaning is torch's, or Python's.
SELF_EXPLAINING = {"extra_repr", "backward", "setup_context"}
KERNEL_DECORATORS = ("triton.jit", "cute.jit", "cute.kernel", "dsl_user_op")


def documentation_faults(tree: ast.Module, path: str) -> list[str]:
    """Public functions and classes without a docstring, or with arguments or results that are not annotated."""
    faults = []
    if not ast.get_docstring(tree) and tree.body:
        faults.append(f"{path}: the module has no docstring")

    def visit(body: Iterable[ast.stmt], owner: str) -> None:
        for node in body:
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                visit([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)], owner)
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            is_method = bool(owner)
            is_init = is_method and node.name == "__init__"
            if node.name.startswith("_") and not is_init:
                continue
            where = f"{path}:{node.lineno}: {owner}{node.name}"
            if isinstance(node, ast.ClassDef):
                if not ast.get_docstring(node):
                    faults.append(f"{where} has no docstring")
                visit(node.body, f"{owner}{node.name}.")
                continue
            decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
            is_overload = any(decorator.split(".")[-1] == "overload" for decorator in decorators)
            if not ast.get_docstring(node) and not (is_overload or is_init or node.name in SELF_EXPLAINING):
                faults.append(f"{where} has no docstring")
            if any(decorator.endswith(KERNEL_DECORATORS) for decorator in decorators):
                continue  # a kernel's arguments are pointers and constants of its own language
            arguments = node.args
            listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            if is_method and "staticmethod" not in decorators:
                listed = listed[1:]
            bare = [argument.arg for argument in listed if argument is not None and argument.annotation is None]
            if bare:
                faults.append(f"{where} does not annotate {', '.join(bare)}")
            if node.returns is None and not is_init:
                faults.append(f"{where} does not annotate its result")

    visit(tree.body, "")
    return faults


def habit_faults(tree: ast.Module, path: str, may_print: bool = False) -> list[str]:
    """Asserts without a message, handlers that catch everything and go on, and ``print``."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            faults.append(f"{path}:{node.lineno}: assert without a message")
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            is_broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
            if is_broad and not any(isinstance(child, ast.Raise) for child in ast.walk(node)):
                faults.append(f"{path}:{node.lineno}: catches everything and goes on")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not may_print:
            faults.append(f"{path}:{node.lineno}: prints")
    return faults


@pytest.mark.parametrize(
    ("code", "num_faults"),
    [
        ('"""M."""\ndef f(x: int) -> int:\n    """D."""\ndef _g(x): ...\nclass _H: ...', 0),
        ("def _f(): ...", 1),
        ('"""M."""\ndef f(x: int) -> int: ...', 1),
        ('"""M."""\ndef f(x, *, y: int, **z):\n    """D."""', 2),
        ('"""M."""\nclass C:\n    def m(self) -> None: ...', 2),
        ('"""M."""\nclass C:\n    """D."""\n    def __init__(self, x): ...\n    def __len__(self): ...', 1),
        ('"""M."""\nif True:\n    def f() -> None: ...', 1),
        ('"""M."""\n@triton.jit\ndef f_kernel(x, N: tl.constexpr):\n    """D."""', 0),
    ],
)
def test_the_rule_of_documentation_finds_faults(code: str, num_faults: int) -> None:
    assert len(documentation_faults(ast.parse(code), "x.py")) == num_faults


@pytest.mark.parametrize(
    ("code", "num_faults"),
    [
        ("assert x, 'why'\ntry: f()\nexcept ValueError: pass\nlog.print()", 0),
        ("assert x", 1),
        ("try: f()\nexcept: pass", 1),
        ("try: f()\nexcept (OSError, Exception) as error: log(error)", 1),
        ("try: f()\nexcept Exception as error: raise ValueError() from error", 0),
        ("print('hello')", 1),
    ],
)
def test_the_rule_of_habits_finds_faults(code: str, num_faults: int) -> None:
    assert len(habit_faults(ast.parse(code), "x.py")) == num_faults


def test_public_names_are_documented_and_annotated() -> None:
    assert_none(fault for path in LIBRARY for fault in documentation_faults(tree_of(path), name_of(path)))


def test_no_silent_asserts_no_swallowed_errors_no_prints() -> None:
    assert_none(
        fault
        for path in LIBRARY
        for fault in habit_faults(tree_of(path), name_of(path), may_print=path.name == "cli.py")
    )


def test_every_name_in_all_exists() -> None:
    for path in LIBRARY:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = [
            ast.literal_eval(node.value)
            for node in tree_of(path).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        if names and importable(module):
            missing = [name for name in names[0] if not hasattr(importlib.import_module(module), name)]
            assert not missing, f"__all__ of {module} names {missing}"


MAX_LINES = 600
# Longer files, each with the reason why it is clearer whole.
LONGER = {
    "sonic/kernels/ops.py": (1000, "the contracts of all ops side by side, each with its checks and its fake"),
}


def test_files_are_rooms_that_one_person_can_hold_in_mind() -> None:
    assert_none(
        f"{name_of(path)} has {lines} lines, expected at most {most}; split it, or give LONGER a reason"
        for path in LIBRARY
        for lines, most in [
            (len(path.read_text(encoding="utf-8").splitlines()), LONGER.get(name_of(path), (MAX_LINES, ""))[0])
        ]
        if lines > most
    )
    for name in LONGER:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert lines > MAX_LINES, f"{name} has {lines} lines: take it out of LONGER"


# ---------------------------------------------------------------- documentation that is true

MARKDOWN = [path for path in tracked_files() if path.suffix == ".md"]
# Things that a reader makes, not finds.
GENERATED = ("report/", ".venv/", "build/", "dist/")
FILE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
SUFFIXES = (".py", ".md", ".toml", ".json", ".yaml", ".yml", ".sh", ".cfg", ".cu", ".txt", ".typed", "/")


def texts_of(path: Path) -> Iterator[str]:
    """The prose of a file: a page as it is, the docstrings of code."""
    if path.suffix == ".md":
        yield re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def quoted(text: str) -> list[str]:
    return re.findall(r"(?<!`)`{1,2}([^`\n]+)`{1,2}(?!`)", text)


def path_faults(text: str, path: Path) -> list[str]:
    """Names of files in back quotes, and links, that lead nowhere."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if path.suffix == ".md" else []
    names = [name for name in quoted(text) if FILE_NAME.fullmatch(name) and name.endswith(SUFFIXES)]
    if path.suffix == ".py":  # a bare name there may be a file or folder that the code writes
        names = [name for name in names if "/" in name.rstrip("/") or name.endswith((".py", ".md"))]
    faults = []
    for name in [*names, *(link for link in links if "://" not in link and not link.startswith("mailto:"))]:
        if name.startswith(GENERATED) or name in SUFFIXES:
            continue
        if not any((base / name).exists() for base in (ROOT, path.parent, ROOT / "sonic")):
            faults.append(f"{name_of(path)}: names {name}, which does not exist")
    return faults


def name_faults(text: str, path: Path) -> list[str]:
    """Dotted names that begin with ``sonic.`` in back quotes and cannot be found."""
    faults = []
    for name in quoted(text):
        name = re.sub(r"^~", "", re.sub(r"\(.*\)$", "", name))
        if re.fullmatch(r"sonic(\.\w+)+", name) and not resolves(name):
            faults.append(f"{name_of(path)}: names {name}, which does not exist")
    return faults


@functools.cache
def importable(module: str) -> bool:
    """Whether a module of the library can be imported here; an optional package may be missing, nothing else."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in HEAVY:
            raise
        return False
    return True


def resolves(name: str) -> bool:
    parts = name.split(".")
    length = max((count for count in range(1, len(parts) + 1) if is_module(".".join(parts[:count]))), default=0)
    if length == 0:
        return False
    module = ".".join(parts[:length])
    if not importable(module):
        return True  # cannot be looked into here
    owner: object = importlib.import_module(module)
    for part in parts[length:]:
        if not hasattr(owner, part):
            return part in getattr(owner, "__annotations__", {})  # a field of a dataclass
        owner = getattr(owner, part)
    return True


def test_the_rule_of_true_names_finds_faults() -> None:
    page = ROOT / "README.md"
    assert (
        len(path_faults("see `sonic/shapes.py`, `shapes.py`, `a/b c.py`, `report/x.json`, [here](LICENSE)", page)) == 0
    )
    assert len(path_faults("see `sonic/nowhere.py`, ``nowhere/``, [here](nowhere.md#part)", page)) == 3
    assert (
        len(
            name_faults(
                "`sonic.MoE`, `sonic.MoE(8, 2)`, :class:`~sonic.routing.plan.RoutingPlan`, `sonic.kernels`", page
            )
        )
        == 0
    )
    assert len(name_faults("`sonic.NoE`, :func:`sonic.kernels.nothing`", page)) == 2


def test_every_file_that_is_named_exists() -> None:
    assert_none(
        fault
        for path in [*MARKDOWN, *LIBRARY, *OUTSIDE]
        for text in texts_of(path)
        for fault in path_faults(text, path)
    )


def test_every_name_of_the_library_that_is_named_exists() -> None:
    assert_none(
        fault
        for path in [*MARKDOWN, *LIBRARY, *OUTSIDE]
        for text in texts_of(path)
        for fault in name_faults(text, path)
    )


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; the line above the fence may be ``<!-- not run: reason -->``."""

    language: str
    code: str
    line: int
    not_run: bool


def blocks_of(text: str) -> list[Block]:
    pattern = re.compile(
        r"^(?P<note><!-- not run: .+? -->\n\n?)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.M | re.S
    )
    return [
        Block(found["language"], found["code"], text[: found.start("language")].count("\n") + 1, bool(found["note"]))
        for found in pattern.finditer(text)
    ]


def command_faults(block: Block, where: str) -> list[str]:
    """Commands of a shell block that call a make target, module, file or extra that does not exist."""
    faults = []
    targets = set(re.findall(r"^([\w-]+)(?:\s[\w-]+)*:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for index, word in enumerate(words[:-1]):
            after = words[index + 1]
            if word == "make":
                faults += [
                    f"make {name}"
                    for name in words[index + 1 :]
                    if re.fullmatch(r"[a-z][\w-]*", name) and name not in targets
                ]
            elif word == "-m" and re.fullmatch(r"(.*/)?(python[\d.]*|torchrun)", words[max(index - 1, 0)]):
                if not is_module(after) and importlib.util.find_spec(after.split(".")[0]) is None:
                    faults.append(f"-m {after}")
            elif word in ("python", "python3", "pytest") and after.endswith(".py") and not (ROOT / after).exists():
                faults.append(after)
        for extras in re.findall(r"(?:sonic-moe|\.)\[([\w,-]+)\]", line):
            known = project()["project"]["optional-dependencies"]
            faults += [f"extra {extra}" for extra in extras.split(",") if extra not in known]
    return [f"{where}:{block.line}: {fault} does not exist" for fault in faults]


def test_the_rule_of_true_commands_finds_faults() -> None:
    text = "```bash\n{}\n```\n"
    good = "make test ARGS='-k plan'\npython -m sonic doctor  # fine\npip install -e '.[dev]'\n$ python3 -m pytest"
    assert [fault for block in blocks_of(text.format(good)) for fault in command_faults(block, "x.md")] == []
    bad = "make tea\npython -m sonic_tea\npip install 'sonic-moe[tea,dev]'\npython tea.py"
    assert len([fault for block in blocks_of(text.format(bad)) for fault in command_faults(block, "x.md")]) == 4


def test_commands_in_pages_exist() -> None:
    assert_none(
        fault
        for page in MARKDOWN
        for block in blocks_of(page.read_text(encoding="utf-8"))
        if block.language in ("bash", "sh", "shell", "console")
        for fault in command_faults(block, name_of(page))
    )


def test_blocks_are_found() -> None:
    page = "a\n\n```python\nx = 1\n```\n\n<!-- not run: needs two GPUs -->\n```python\ny = 2\n```\n"
    assert blocks_of(page) == [Block("python", "x = 1\n", 3, False), Block("python", "y = 2\n", 8, True)]


@pytest.mark.long
@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_python_in_pages_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page run one after the other, in one process, as a reader would paste them.

    A block is only compiled where a comment above it says so, or where it imports an optional package that is not here.
    """
    script = []
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        code = textwrap.dedent(block.code)
        tree = ast.parse(code, f"{name_of(page)}:{block.line}")
        needs = {found.module.split(".")[0] for found in imports_of(tree, "")}
        if block.not_run or any(name in HEAVY and importlib.util.find_spec(name) is None for name in needs):
            continue
        script.append(f"exec(compile({code!r}, {f'{name_of(page)}, block at line {block.line}'!r}, 'exec'), names)")
    if script:
        run_python("-c", "\n".join(["names = {'__name__': '__main__'}", *script]), cwd=tmp_path)


def test_readme_shows_code_before_line_30() -> None:
    blocks = [block for block in blocks_of((ROOT / "README.md").read_text(encoding="utf-8")) if block.language]
    assert blocks and blocks[0].line < 30


def test_pages_are_finished() -> None:
    unfinished = re.compile(r"@@\w*@@|\b(TODO|TBD|FIXME|XXX)\b|lorem ipsum", re.I)
    assert unfinished.search("@@RESULTS@@") and unfinished.search("to do: TBD")
    assert_none(
        f"{name_of(page)}:{number}: {found.group()} is left to be written"
        for page in MARKDOWN
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        for found in [unfinished.search(line)]
        if found
    )


def test_environment_variables_are_told() -> None:
    read = {name for path in LIBRARY for name in re.findall(r"\bSONIC_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    assert read == set(cli.ENVIRONMENT), "cli.ENVIRONMENT is what `python -m sonic doctor` tells"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(name in readme for name in read), "README.md lists them"


# ---------------------------------------------------------------- the files around the code

# Names of package indexes do not belong into the project: whoever installs it has their own. Split, so that this file
# does not hold them.
INDEX_HOSTS = re.compile(
    "|".join((r"pypi\." "org", r"python" "hosted", r"pytorch" r"\.org/whl", r"anaconda\." "org", r"npmjs\." "org")),
    re.I,
)


def test_no_package_index_is_named() -> None:
    assert INDEX_HOSTS.search("see https://pypi." + "org/project/x")
    faults = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        faults += [f"{name_of(path)} names {found.group()}" for found in INDEX_HOSTS.finditer(text)]
    assert_none(faults)


def test_version_and_licence() -> None:
    assert project()["project"]["version"] == sonic.__version__
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert project()["project"]["license"] == "Apache-2.0"


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    # built from a copy: a build leaves folders behind
    source = tmp_path / "source"
    shutil.copytree(ROOT / "sonic", source / "sonic", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for folder in ("examples", "benchmarks", "tests"):
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    run_python(*command)
    (wheel,) = tmp_path.glob("sonic_moe-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "sonic").rglob("*")
        if path.suffix in (".c", ".json", ".py", ".typed")
    }


def test_ci_runs_the_tests_from_anywhere() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script and "make test" in script
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"]).returncode == 0


def test_make_helps() -> None:
    told = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in told for target in ("demo", "test", "lint", "bench-cpu", "clean"))


# ---------------------------------------------------------------- what conftest.py promises


@pytest.mark.usefixtures("poison_empty")
def test_memory_is_poisoned() -> None:
    base = torch.zeros(3)
    for tensor in (
        torch.empty(2, 3),
        torch.empty_like(base),
        base.new_empty(3),
        torch.empty_strided((2,), (1,)),
        torch.empty(2, dtype=torch.bfloat16),
    ):
        assert tensor.isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == 2**30 - 1).all()
    assert torch.empty(2, dtype=torch.float8_e4m3fn).float().isnan().all()
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(2, device="meta").is_meta


def test_memory_is_poisoned_only_on_demand() -> None:
    assert not hasattr(torch.empty, "is_poisoned")


def test_each_test_starts_from_the_same_seed() -> None:
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- helpers


def assert_none(faults: Iterable[str]) -> None:
    """Fail with one fault per line."""
    text = "\n".join(faults)
    if text:
        pytest.fail(text, pytrace=False)


def run_python(*arguments: str, cwd: Path = ROOT) -> str:
    """Run this interpreter in a fresh process that finds the project; return what it prints, fail with its errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("SONIC_BACKEND", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.fail(
            f"{shlex.join(arguments)[:200]} ended with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False
        )
    return done.stdout
