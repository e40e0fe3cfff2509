"""The error messages and warnings that the library can give, read from its source.

    python tests/messages.py            those that docs/errors/ lacks, as the lines to write there
    python tests/messages.py --unused   those that stand there and are raised no more

A message is written with … for each part that is filled in when it is raised. An error about an argument reads
``argument is …, expected …``; where it happened, which stands before it, is left out here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "errors"

# Which page explains the messages of which folder or file of sonic/; the first that fits.
PAGE_OF = {
    "routing": "routing",
    "parallel": "parallel",
    "planner": "planner",
    "simulator": "simulator",
    "convert": "convert",
    "compat": "compat",
    "kernels": "kernels",
    "bench": "commands",
    "roofline.py": "planner",
    "layers/fsdp.py": "fsdp",
    "layers/sharded": "fsdp",
    "layers/megatron": "megatron",
    "layers/torchtitan": "torchtitan",
    "layers/huggingface": "huggingface",
    "layers/gate_router": "huggingface",
    "cli.py": "commands",
    "setup_mistakes.py": "commands",
    "": "layers",
}
INTERNAL = {"StopIteration", "NotImplementedError", "AssertionError", "AttributeError", "KeyError", "HeldError"}
HOLE = "…"
GENERAL = {"…", "one of …", "(…) = …", "one of …: …"}


def page_of(path: Path) -> str:
    """The page of docs/errors/ for the messages of a source file."""
    name = path.relative_to(ROOT / "sonic").as_posix()
    return next(page for prefix, page in PAGE_OF.items() if name.startswith(prefix))


def source_messages() -> dict[str, set[str]]:
    """The messages of all sources, by page."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "sonic").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found.setdefault(page_of(path), set()).update(messages_of(tree))
    return found


def page_messages() -> dict[str, dict[str, str]]:
    """The messages that docs/errors/ explains, with their cures, by page."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        entries = re.findall(r"^`(?:`` )?([^\n]+?)(?: ``)?`\n: (.+?)(?=\n\n|\Z)", text, re.M | re.S)
        if path.stem != "index":
            found[path.stem] = {message: " ".join(cure.split()) for message, cure in entries}
    return found


def messages_of(tree: ast.Module) -> Iterator[str]:
    """The messages that a file can give."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for scope in [tree, *functions]:
        names = _Names(scope)
        for node in _own_nodes(scope):
            if isinstance(node, ast.Call) and _name(node.func) == "argument_error" and len(node.args) == 4:
                argument, wanted = names.texts(node.args[1]), names.texts(node.args[3])
                together = len(argument) == len(wanted) and isinstance(node.args[1], ast.Name)
                pairs = zip(argument, wanted, strict=True) if together else product(argument, wanted)
                yield from (f"{a} is {HOLE}, expected {w}" for a, w in pairs if _says_something(a, w))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = _name(node.exc.func)
                if name != "argument_error" and name not in INTERNAL and name[:1].isupper():
                    yield from _told(names.texts(node.exc.args[0]))
            elif isinstance(node, ast.Call) and _name(node.func) in ("warn", "error") and node.args:
                yield from _told(names.texts(node.args[0]))
            elif isinstance(node, ast.Call) and _name(node.func) == "fault" and len(node.args) == 3:
                yield from _told(names.texts(node.args[2]))  # of the simulator: kind, where, what
            elif isinstance(node, ast.Call) and _name(node.func) == "refuse" and len(node.args) == 2:
                yield from _told(names.texts(node.args[1]))


def _says_something(argument: str, wanted: str) -> bool:
    """Whether someone could look it up: the general forms stand on the index page."""
    return argument != HOLE or wanted not in GENERAL


def _told(templates: list[str]) -> Iterator[str]:
    """Without the place that a message begins with, and without those that are nothing but holes."""
    for template in templates:
        text = re.sub(r"^(sonic[\w.]*|…): ", "", template).split("\n")[0].strip()
        if re.search(r"[a-z]{3}", text):
            yield text


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, or of a file, without those of functions within it."""
    todo = list(ast.iter_child_nodes(scope))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        todo += ast.iter_child_nodes(node)


class _Names:
    """The names that a function sets, and the texts that its expressions can be."""

    def __init__(self, scope: ast.AST) -> None:
        self._set: dict[str, list[tuple[int, int, ast.expr]]] = {}  # line, last line where it counts, value
        self._ifs = [node for node in _own_nodes(scope) if isinstance(node, ast.If)]
        for node in _own_nodes(scope):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value, node.lineno, sys.maxsize)
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
                for item in node.iter.elts:
                    self._bind(node.target, item, node.lineno, node.end_lineno or node.lineno)

    def texts(self, node: ast.expr, line: int = 0) -> list[str]:
        """The texts that an expression can be, with holes."""
        line = line or node.lineno
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            return [_joined(*(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values))]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.texts(node.left, line), self.texts(node.right, line)
            return [_joined(a, b) for a, b in product(left, right)]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, line) + self.texts(node.orelse, line)
        if isinstance(node, ast.Name):
            values = self._values(node.id, line)
            return [text for at, value in values for text in self.texts(value, at - 1)] or [HOLE]
        return [HOLE]

    def _bind(self, target: ast.expr, value: ast.expr, line: int, last: int) -> None:
        if isinstance(target, ast.Name):
            self._set.setdefault(target.id, []).append((line, last, value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, its_value in zip(target.elts, value.elts, strict=False):
                self._bind(part, its_value, line, last)

    def _values(self, name: str, line: int) -> list[tuple[int, ast.expr]]:
        """What a name can be at a line: as it was set last, and in the other branches where that depended."""
        before = [entry for entry in self._set.get(name, ()) if entry[0] <= line <= entry[1]]
        before.sort(key=lambda entry: entry[0])
        if not before:
            return []
        newest = before[-1][0]
        spans = [(node.lineno, node.end_lineno or 0) for node in self._ifs]
        around = [(first, last) for first, last in spans if first <= newest <= last < line]
        first = min((span[0] for span in around), default=newest)
        chosen = [(at, value) for at, _, value in before if at >= first]
        return chosen + (self._values(name, first - 1) if around else [])


def _joined(*parts: str) -> str:
    """Parts of a text, with holes that touch made one."""
    return re.sub(r"…(\s*…)+", HOLE, "".join(parts))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def main() -> None:
    """Print what is missing, or what is too much."""
    source, pages = source_messages(), page_messages()
    for page in sorted(source):
        here, there = source[page], set(pages.get(page, {}))
        listed = sorted(there - here if "--unused" in sys.argv else here - there)
        if listed:
            print(f"# {page}\n")
        for message in listed:
            fence = "``" if "`" in message else ""
            print(f"`{fence}{' ' if fence else ''}{message}{' ' if fence else ''}{fence}`\n: \n")


if __name__ == "__main__":
    main()
