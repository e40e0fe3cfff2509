"""What the compiler makes of every kernel that can be chosen, no GPU needed: registers, spills, memory, products.

Every kernel is compiled for sm_90a as a launch on a GPU would compile it (:mod:`sonic.kernels.cute.compiled`). Stack,
spills and warnings are what ``ptxas`` says while it makes that very binary; registers by role, products and accesses of
local memory are read from its machine code by ``nvdisasm``, which Triton and the CUDA toolkit bring.

``python -m sonic.kernels.cute.cross`` prints a Markdown table, or puts it between two markers of a page.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlass import cute

from sonic.kernels.cute.config import TileConfig, fitting
from sonic.kernels.cute.kernels import build
from sonic.kernels.cute.keys import KernelKey
from sonic.shapes import argument_error, check_choice

__all__ = [
    "FORMS",
    "MARKERS",
    "Form",
    "Resources",
    "configurations",
    "keys",
    "main",
    "replace_between",
    "report",
    "resources_of",
    "run_command",
    "registers_by_role",
    "table",
    "times_of_files",
]

MARKERS = ("<!-- cute kernels: begin -->", "<!-- cute kernels: end -->")
"""Lines of a page between which the table is written."""

_TARGET = "sm_90a"
_MOST_BUCKETS = 24  # of rows per expert: 2**24, more than any call has

# Of `ptxas -v`, in one line
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_WARNING = re.compile(r"\((C\d{4})\)")
_SERIALISED = "instructions are serialized"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

_THREADS = re.compile(r"^\.reqntid (\d+)", re.M)

# Of the machine code
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):", re.M)
_JUMP = re.compile(r"`\((\.L\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")

# Of the host code: the field of the launch configuration that holds the bytes of dynamic shared memory
_SHARED_FIELD = re.compile(
    r"(%\d+) = llvm\.getelementptr %\d+\[0, 2\] .*!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64,"
)


@dataclass(frozen=True)
class Form:
    """A form of an op: everything that its kernel depends on but the configuration.

    Attributes:
        kind: of its configurations, in :data:`sonic.kernels.cute.config.KINDS`.
        op, activation, glu_layout, out_dtype, flags: as in :class:`sonic.kernels.cute.keys.KernelKey`.
        gathers: likewise.
    """

    kind: str
    op: str
    gathers: bool = False
    activation: str | None = None
    glu_layout: str | None = None
    out_dtype: str | None = None
    flags: tuple[str, ...] = ()

    def key(self, config: TileConfig, dtype: str = "bfloat16") -> KernelKey:
        """With a configuration."""
        out = self.out_dtype or (dtype if self.kind == "contraction" else None)
        return KernelKey(self.op, config, dtype, self.gathers, self.activation, self.glu_layout, out, self.flags)


_UP, _DOWN_BWD = ("h", "bias"), ("scores",)
FORMS = {
    "up_proj, concatenated": Form("up_gated", "up_proj", True, "geglu", "concatenated", flags=_UP),
    "up_proj, interleaved": Form("up_gated", "up_proj", True, "geglu", "interleaved", flags=_UP),
    "up_proj, plain": Form("up_plain", "up_proj", True, "gelu", flags=_UP),
    "down_proj": Form("rows", "down_proj", flags=("bias", "scores")),
    "down_proj_bwd_input, concatenated": Form(
        "down_bwd_gated", "down_proj_bwd_input", True, "geglu", "concatenated", flags=_DOWN_BWD
    ),
    "down_proj_bwd_input, interleaved": Form(
        "down_bwd_gated", "down_proj_bwd_input", True, "geglu", "interleaved", flags=_DOWN_BWD
    ),
    "down_proj_bwd_input, plain": Form("down_bwd_plain", "down_proj_bwd_input", True, "gelu", flags=_DOWN_BWD),
    "up_proj_bwd_input": Form("rows", "up_proj_bwd_input"),
    "down_proj_bwd_weight": Form("contraction", "down_proj_bwd_weight", True),
    "down_proj_bwd_weight, added": Form(
        "contraction", "down_proj_bwd_weight", True, out_dtype="float32", flags=("adds",)
    ),
    "up_proj_bwd_weight": Form("contraction", "up_proj_bwd_weight", True),
    "up_proj_bwd_weight, added": Form("contraction", "up_proj_bwd_weight", True, out_dtype="float32", flags=("adds",)),
    "bias gradients": Form("contraction", "down_proj_bwd_weight", True, out_dtype="float32"),
}
"""What is compiled: every epilogue and layout, with all that is optional and the activation that takes the most
registers, GELU."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        form: in :data:`FORMS`, or what else the caller named it.
        config: its configuration.
        threads: of a block.
        registers: of a thread at launch, before warpgroups hand registers to each other.
        producer_registers, consumer_registers: one more than the highest register that the code of either kind of
            warpgroup names; 0 where all keep the registers that they have at launch.
        spill_bytes: of a thread: its stack and what it spills there; anything but 0 is a fault.
        local_accesses: instructions that touch local memory.
        shared_bytes: of a block, as the launch asks for it.
        product: columns of the instruction that multiplies 64 rows by them, 0 if there is none.
        num_products: how often it stands in the code.
        is_serialised: the compiler warns that products wait for each other.
        warnings: codes of all that it warns of.
        seconds: of processor time that compiling took.
    """

    form: str
    config: TileConfig
    threads: int
    registers: int
    producer_registers: int
    consumer_registers: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    product: int
    num_products: int
    is_serialised: bool
    warnings: tuple[str, ...]
    seconds: float


def configurations(kind: str) -> tuple[TileConfig, ...]:
    """Every configuration that the model can choose for a kind, for whatever sizes."""
    return tuple(dict.fromkeys(config for bucket in range(_MOST_BUCKETS) for config in fitting(kind, bucket)))


def keys(forms: Iterable[str] = FORMS) -> list[tuple[str, KernelKey]]:
    """The kernels of some forms in all their configurations, each with the form's name.

    Raises:
        ValueError: a form is not one of :data:`FORMS`.
    """
    found = []
    for name in forms:
        check_choice("sonic.kernels.cute.cross", "forms", name, tuple(FORMS))
        found += [(name, FORMS[name].key(config)) for config in configurations(FORMS[name].kind)]
    return found


def resources_of(form: str, key: KernelKey) -> Resources:
    """Compile a kernel and look at what came out.

    Args:
        form: what to call it.
        key: of the kernel.

    Raises:
        RuntimeError: there is no ``nvdisasm``, or a tool tells things in another way than it used to.
    """
    gemm, arguments = build(key)
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        kept = f"--keep-ptx --keep-cubin --dump-dir={folder} --remarks{{ptx}} --warnings"
        before = time.process_time()
        with contextlib.redirect_stderr(told):
            function: Any = cute.compile(gemm, *arguments, options=f"--enable-tvm-ffi --gpu-arch {_TARGET} {kept}")
        seconds = time.process_time() - before
        sass = _disassembled(function.__cubin__, Path(folder) / "kernel.cubin")
    says = " ".join(_COLOUR.sub("", told.getvalue()).split())
    stack = re.search(_STACK, says)
    used = re.search(_USED, says)
    threads = re.search(_THREADS, function.__ptx__)
    if stack is None or used is None or threads is None:
        raise RuntimeError(f"sonic: CuTe-DSL did not tell what the kernel takes; it said: {says or 'nothing'}")
    products = [int(columns) for columns in _PRODUCT.findall(sass)]
    producer, consumer = registers_by_role(sass)
    return Resources(
        form=form,
        config=key.config,
        threads=int(threads[1]),
        registers=int(used[1]),
        producer_registers=producer,
        consumer_registers=consumer,
        spill_bytes=max(map(int, stack.groups())),
        local_accesses=len(_LOCAL.findall(sass)),
        shared_bytes=_shared_bytes(str(function.ir_module)),
        product=max(products, default=0),
        num_products=len(products),
        is_serialised=_SERIALISED in says,
        warnings=tuple(sorted(set(_WARNING.findall(says)))),
        seconds=seconds,
    )


# ---------------------------------------------------------------- reading machine code


def _tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit: of the search path, or of Triton's."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends/nvidia/bin"))
    if found is None:
        raise RuntimeError(f"sonic: there is no {name}; the extra 'triton' and the CUDA toolkit bring it")
    return found


def _disassembled(cubin: bytes, path: Path) -> str:
    path.write_bytes(cubin)
    done = subprocess.run([_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True)
    if done.returncode or not _INSTRUCTION.search(done.stdout):
        raise RuntimeError(f"sonic: nvdisasm did not report instructions; it said: {done.stderr}")
    return done.stdout


def registers_by_role(sass: str) -> tuple[int, int]:
    """Registers that the code of the producing and of the consuming warpgroups needs: highest number that it names + 1.

    A role's code is what can be reached from where it hands registers over, or is given them; (0, 0) where the compiler
    left that out, because all threads have what they need from the start.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = _LABEL.match(line)
        instruction = _INSTRUCTION.search(line)
        if label is not None:
            labels[label[1]] = len(code)
        elif instruction is not None:
            code.append(instruction[1])
    found = []
    for name in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):
        begins = [number for number, instruction in enumerate(code) if name in instruction]
        if not begins:
            return 0, 0
        reached, ahead = set(), begins
        while ahead:
            number = ahead.pop()
            if number in reached or number >= len(code):
                continue
            reached.add(number)
            ahead += [labels[label] for label in _JUMP.findall(code[number])]
            if not _ends(code[number]):
                ahead.append(number + 1)
        found.append(1 + max(_highest_register(code[number]) for number in reached))
    return found[0], found[1]


def _ends(instruction: str) -> bool:
    """Whether nothing goes on behind an instruction: lanes that meet again do so where they parted says."""
    return instruction == "EXIT" or re.match(r"(?:BRA `|BSYNC)", instruction) is not None


def _highest_register(instruction: str) -> int:
    """-1 where there is none. Several registers are named by their first: what is loaded, stored or summed."""
    named = [(int(number), bool(wide)) for number, wide in _REGISTER.findall(instruction)]
    if not named:
        return -1
    code = next(word for word in instruction.split() if not word.startswith("@"))
    product = _PRODUCT.match(code)
    parts = code.split(".")
    more = 0
    if product is not None:
        more = int(product[1]) // 2 - 1
    elif "128" in parts:
        more = 3
    elif "64" in parts or "WIDE" in parts:
        more = 1
    elif parts[0] in ("LDSM", "STSM") and parts[-1].isdecimal():
        more = int(parts[-1]) - 1
    is_stored = parts[0] in ("ST", "STG", "STS", "STL", "STSM")
    return max(named[-1 if is_stored else 0][0] + more, *(number + wide for number, wide in named))


def _shared_bytes(host: str) -> int:
    """What the host code asks for when it launches."""
    for function in host.split("llvm.func "):
        field = _SHARED_FIELD.search(function)
        if field is None:
            continue
        stored = re.search(rf"llvm\.store (%\d+), {field[1]} : i64", function)
        constant = stored and re.search(rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", function)
        if constant:
            return int(constant[1])
    raise RuntimeError("sonic: the host code of this CuTe-DSL does not show how much shared memory it asks for")


# ---------------------------------------------------------------- as Markdown


def table(resources: Sequence[Resources]) -> str:
    """A Markdown table, a row per kernel, in the order given."""
    head = (
        "| op | tile | mode | cluster | slots | registers at launch | of the producer | of the consumers "
        "| spilled bytes | local memory | shared memory, KiB | products | serialised | warnings | seconds |"
    )
    return "\n".join((head, "|" + "---|" * (head.count("|") - 1), *(_row(found) for found in resources)))


def _row(found: Resources) -> str:
    config = found.config
    cells = (
        found.form,
        f"{config.tile_m} x {config.tile_n}",
        "pingpong" if config.pingpong else "cooperative",
        config.cluster_m,
        config.slots,
        found.registers,
        _registers(found.producer_registers, config.producer_registers),
        _registers(found.consumer_registers, config.consumer_registers),
        found.spill_bytes,
        found.local_accesses,
        f"{found.shared_bytes / 1024:.0f}",
        f"64x{found.product}x16 x {found.num_products}",
        "yes" if found.is_serialised else "no",
        ", ".join(found.warnings) or "none",
        f"{found.seconds:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _registers(used: int, limit: int) -> str:
    return f"{used} of {limit}" if used else "as at launch"


def report(forms: Iterable[str] = FORMS) -> str:
    """The table under a line that tells what compiled it.

    Raises:
        ValueError: a form is not one of :data:`FORMS`.
        RuntimeError: as :func:`resources_of`.
    """
    version = importlib.metadata.version("nvidia-cutlass-dsl")
    return f"CuTe-DSL {version}, {_TARGET}, bfloat16.\n\n{table([resources_of(*pair) for pair in keys(forms)])}"


def replace_between(path: Path, markers: tuple[str, str], text: str) -> None:
    """Put ``text`` between two lines of a page; the file is replaced as a whole or not at all.

    Raises:
        ValueError: the page has not each marker once, in order.
    """
    page = path.read_text(encoding="utf-8")
    begin, end = markers
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    if page.count(begin) != 1 or page.count(end) != 1 or end not in rest:
        where = "sonic.kernels.cute.cross.replace_between"
        raise argument_error(where, "path", f"{path}, without its markers", f"a page with the lines {begin} and {end}")
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{head}{begin}\n{text}\n{end}{tail}")
        os.chmod(part, path.stat().st_mode)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    markers: tuple[str, str],
    make: Callable[[argparse.Namespace], str],
) -> int:
    """A command that prints what ``make`` makes of its options, or with ``--write`` puts it between two markers.

    Args:
        parser: with all options but ``--write``.
        arguments: words; None: those of this process.
        markers: lines of the page.
        make: may raise ValueError, which becomes an error of the command.
    """
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put it between the markers of this page")
    options = parser.parse_args(arguments)
    try:
        if options.write is not None and not options.write.is_file():
            raise argument_error(parser.prog, "--write", options.write, "a page that exists")
        text = make(options)
        if options.write is not None:
            replace_between(options.write, markers, text)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"wrote {options.write}\n" if options.write is not None else f"{text}\n")
    return 0


_TIMES = """
import json, sys, time
from sonic.kernels.cute import compiled
from sonic.kernels.cute.keys import layer_keys

times = []
for key in layer_keys(24576 * 8, 128, 1536, 256):
    wall, cpu = time.perf_counter(), time.process_time()
    compiled.compiled(key)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    times.append((key.op, wall, cpu, compiled.on_disk(key).stat().st_size))
json.dump(times, sys.stdout)
"""


def times_of_files() -> str:
    """A Markdown table of the kernels of a layer's training step: to compile them, and to load them in a new process.

    Raises:
        RuntimeError: a process failed.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second finds the files of the first
            done = subprocess.run(
                [sys.executable, "-c", _TIMES],
                env={**os.environ, "SONIC_CACHE_DIR": folder},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"sonic: the process that was timed failed: {done.stderr}")
            found.append(json.loads(done.stdout))
    rows = [
        f"| {op} | {size / 1024:.0f} | {wall:.1f} | {cpu:.1f} | {1000 * load:.1f} |"
        for (op, wall, cpu, size), (_, load, _, _) in zip(*found, strict=True)
    ]
    head = "| op | object file, KiB | compile, s | of them processor, s | load, ms |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after ``python -m sonic.kernels.cute.cross``; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sonic.kernels.cute.cross",
        description="Compile every CuTe-DSL kernel that can be chosen for Hopper, and tell what each takes.",
    )
    parser.add_argument("--forms", nargs="+", default=tuple(FORMS), metavar="FORM", help="; ".join(FORMS))
    parser.add_argument(
        "--files", action="store_true", help="time object files instead: to make them, and to load them"
    )

    def make(options: argparse.Namespace) -> str:
        if options.files and options.write is not None:
            raise argument_error(parser.prog, "--write", options.write, "nothing beside --files")
        return times_of_files() if options.files else report(options.forms)

    return run_command(parser, arguments, MARKERS, make)


if __name__ == "__main__":
    sys.exit(main())
