"""What the compiler makes of every kernel, for chips that are not here: registers, spills, shared memory, instructions.

Every op of this backend is called on meta tensors inside :func:`~sonic.kernels.triton.launch.compiling_for`, so what is
measured is what a launch on that chip would load. The figures come out of the compiled code: for NVIDIA from PTX and,
by the ``cuobjdump`` that Triton brings, from the binary; for AMD from the assembly and its metadata.

``python -m sonic.kernels.triton.cross`` prints them as Markdown, or puts them between two markers of a page.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import sonic.kernels.triton as backend
from sonic.kernels.triton.grouped_gemm import up_rows
from sonic.kernels.triton.launch import Compiled, compiling_for
from sonic.kernels.triton.target import TARGETS, Target, interprets, target_named
from sonic.shapes import argument_error, check_choice, check_positive, load_columns, tokens_per_run

__all__ = [
    "DEFAULT_SIZES",
    "DEFAULT_TARGETS",
    "MARKERS",
    "OPS",
    "LayerSizes",
    "Resources",
    "compilations",
    "main",
    "replace_table",
    "report",
    "resources_of",
    "table",
    "variants",
]

OPS = (
    "up_proj",
    "up_proj without H",
    "down_proj",
    "combine",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
    "combine without scores",
    "topk_softmax",
    "topk_softmax_bwd",
    "build_plan",
    "build_plan from pairs",
    "best_of_columns",
)
"""What is compiled: the ops of a training step in the forms in which it calls them, and ``up_proj`` of inference."""

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MARKERS = ("<!-- kernel tables: begin -->", "<!-- kernel tables: end -->")
"""Lines of a page between which :func:`replace_table` writes."""

_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_oai", "gelu", "relu", "relu2", "silu")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# As PTX and AMD's assembly name them; the first that occurs is the one that multiplies.
_MATRIX_INSTRUCTIONS = {
    "tcgen05": re.compile(r"\btcgen05\.mma\."),
    "wgmma": re.compile(r"\bwgmma\.mma_async\."),
    "mma": re.compile(r"\bmma\.sync\."),
    "mfma": re.compile(r"\bv_mfma_"),
}
_BULK_COPY = re.compile(r"\bcp\.async\.bulk\.tensor\.")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.|\b(?:global|buffer)_load_lds_|\bbuffer_load_\w+ .*\blds$", re.M)
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer and call.

    Attributes:
        num_tokens: T.
        hidden_size: D.
        intermediate_size: N.
        num_experts: E.
        top_k: K.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        check_positive("sonic.kernels.triton.cross.LayerSizes", **vars(self))
        if self.top_k > self.num_experts:
            where = "sonic.kernels.triton.cross.LayerSizes"
            raise argument_error(where, "top_k", self.top_k, f"at most num_experts = {self.num_experts}")

    def __str__(self) -> str:
        return f"(T, D, N, E, K) = ({', '.join(map(str, vars(self).values()))})"


DEFAULT_SIZES = LayerSizes(24576, 1536, 256, 128, 8)
"""A layer of a model with 7 billion parameters and fine-grained experts."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target.

    Attributes:
        op: one of :data:`OPS`.
        kernel: name of the kernel function.
        target: name in :data:`sonic.kernels.triton.target.TARGETS`.
        dtype: of the matrices, without ``torch.``.
        config: tile and schedule: ``"128 x 256 x 64, 3 stages, 4 slices"``.
        num_warps: of a program.
        registers: of a thread.
        spill_bytes: of a thread: what did not fit into registers and lives in memory (its stack).
        shared_bytes: of a program.
        shared_limit: what a program may use on this target.
        matrix_instruction: the instruction that multiplies, and how often it stands in the code: ``"wgmma x 4"``; empty
            where none does.
        bulk_copies: copies of whole tiles by descriptor that stand in the code.
        async_copies: asynchronous copies into shared memory, thread by thread, that stand in the code.
        seconds: that compiling took; next to nothing where Triton had it in its cache.
    """

    op: str
    kernel: str
    target: str
    dtype: str
    config: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instruction: str
    bulk_copies: int
    async_copies: int
    seconds: float


# ---------------------------------------------------------------- calling every op on meta tensors


def compilations(
    target_name: str,
    sizes: LayerSizes = DEFAULT_SIZES,
    *,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = OPS,
    keys_only: bool = False,
) -> list[tuple[str, Compiled]]:
    """Every launch of the chosen ops, compiled for a target that need not be here, each with the name of its op.

    Args:
        target_name: in :data:`sonic.kernels.triton.target.TARGETS`.
        sizes: of the layer and call.
        activation, glu_layout: as in ``sonic.kernels.ops.up_proj``.
        bias: both projections have one.
        dtype: of the matrices; logits, scores and their derivatives are float32.
        ops: from :data:`OPS`.
        keys_only: as in :func:`~sonic.kernels.triton.launch.compiling_for`.

    Raises:
        ValueError: an argument is not one of its choices.
        RuntimeError: Triton interprets.
    """
    where = "sonic.kernels.triton.cross"
    target = target_named(where, target_name)
    check_choice(where, "activation", activation, _ACTIVATIONS)
    check_choice(where, "glu_layout", glu_layout, ("concatenated", "interleaved"))
    if dtype not in _DTYPES.values():
        raise argument_error(where, "dtype", dtype, " or ".join(map(str, _DTYPES.values())))
    for op in ops:
        check_choice(where, "ops", op, OPS)
    calls = _calls(sizes, activation, glu_layout, bias, dtype)
    named = []
    with compiling_for(target, keys_only) as compilation:
        for op in ops:
            before = len(compilation.compiled)
            calls[op]()
            named += [(op, found) for found in compilation.compiled[before:]]
    return named


def _calls(
    sizes: LayerSizes, activation: str, glu_layout: str, bias: bool, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Each of :data:`OPS` as the layer calls it, on meta tensors."""
    tokens, width_d, width_n, experts, top_k = vars(sizes).values()
    rows, width_u = tokens * top_k, up_rows(width_n, activation)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def index(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.int32)

    def single(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.float32)

    x, dx, h, a = meta(tokens, width_d), meta(rows, width_d), meta(rows, width_u), meta(rows, width_n)
    w1, w2 = meta(experts, width_u, width_d), meta(experts, width_d, width_n)
    b1, b2 = (meta(experts, width_u), meta(experts, width_d)) if bias else (None, None)
    scores, token, offset, edges = single(rows), index(rows), index(experts + 1), index(tokens + 1)
    choice, prob = index(tokens, top_k), single(tokens, top_k)
    load = index(experts, load_columns(tokens, top_k))
    act = (activation, glu_layout)
    return {
        "up_proj": lambda: backend.up_proj(x, w1, b1, token, offset, *act, True),
        "up_proj without H": lambda: backend.up_proj(x, w1, b1, token, offset, *act, False),
        "down_proj": lambda: backend.down_proj(a, w2, b2, None, offset),
        "combine": lambda: backend.combine(dx, scores, token, edges),
        "down_proj_bwd_input": lambda: backend.down_proj_bwd_input(
            x, h, w2, b2, scores, token, offset, *act, True, True
        ),
        "down_proj_bwd_weight": lambda: backend.down_proj_bwd_weight(x, a, scores, token, offset, True, bias),
        "up_proj_bwd_input": lambda: backend.up_proj_bwd_input(h, w1, offset),
        "up_proj_bwd_weight": lambda: backend.up_proj_bwd_weight(h, x, token, offset, True, bias),
        "combine without scores": lambda: backend.combine(dx, None, token, edges),
        "topk_softmax": lambda: backend.topk_softmax(
            single(tokens, experts), top_k, "softmax", False, False, 1.0, None, 1, 1, tokens_per_run(top_k)
        ),
        "topk_softmax_bwd": lambda: backend.topk_softmax_bwd(prob, choice, prob, None, experts, "softmax", False, 1.0),
        "build_plan": lambda: backend.build_plan(choice.view(-1), None, tokens, experts, load, tokens_per_run(top_k)),
        "build_plan from pairs": lambda: backend.build_plan(choice.view(-1), token, tokens, experts),
        "best_of_columns": lambda: backend.best_of_columns(
            single(tokens, experts), single(tokens), [1] * experts, None, None, None, None, None
        ),
    }


def resources_of(
    target_name: str,
    sizes: LayerSizes = DEFAULT_SIZES,
    *,
    activation: str = "swiglu",
    glu_layout: str = "concatenated",
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = OPS,
) -> list[Resources]:
    """What every kernel of the chosen ops takes on a target that need not be here, each binary of an op once.

    Args:
        target_name, sizes, activation, glu_layout, bias, dtype, ops: as in :func:`compilations`.

    Raises:
        ValueError: an argument is not one of its choices.
        RuntimeError: Triton interprets, or came without the tool that reads binaries.
    """
    found = compilations(
        target_name, sizes, activation=activation, glu_layout=glu_layout, bias=bias, dtype=dtype, ops=ops
    )
    once = {(op, compiled.key): compiled for op, compiled in reversed(found)}  # a kernel may be launched many times
    target = TARGETS[target_name]
    return [_resources(op, compiled, target, dtype) for (op, _), compiled in reversed(once.items())]


def variants(
    target_name: str,
    token_counts: Iterable[int],
    sizes: LayerSizes = DEFAULT_SIZES,
    *,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = OPS,
) -> dict[tuple[str, str], int]:
    """How many binaries each kernel needs while the number of tokens varies; nothing is compiled.

    Args:
        target_name, activation, dtype, ops: as in :func:`compilations`.
        token_counts: values of T.
        sizes: the other sizes.

    Returns:
        (op, name of the kernel function) -> number of different keys under which Triton looks for its binary.

    Raises:
        ValueError: an argument is not one of its choices.
        RuntimeError: Triton interprets.
    """
    _, *others = vars(sizes).values()
    keys: dict[tuple[str, str], set[str]] = {}
    for num_tokens in token_counts:
        each = LayerSizes(num_tokens, *others)
        for op, found in compilations(target_name, each, activation=activation, dtype=dtype, ops=ops, keys_only=True):
            keys.setdefault((op, found.kernel), set()).add(found.key)
    return {kernel: len(different) for kernel, different in keys.items()}


# ---------------------------------------------------------------- reading what was compiled


def _resources(op: str, compiled: Compiled, target: Target, dtype: torch.dtype) -> Resources:
    code, metadata = compiled.binary.asm, compiled.binary.metadata
    if target.backend == "cuda":
        text = code["ptx"]
        registers, spill_bytes = _usage_of_cubin(code["cubin"])
    else:
        text = code["amdgcn"]
        registers, spill_bytes = _usage_of_amdgcn(text)
    counts = {name: len(pattern.findall(text)) for name, pattern in _MATRIX_INSTRUCTIONS.items()}
    return Resources(
        op=op,
        kernel=compiled.kernel,
        target=target.name,
        dtype=_name_of(dtype),
        config=_config(compiled),
        num_warps=metadata.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        shared_limit=target.shared_bytes,
        matrix_instruction=next((f"{name} x {count}" for name, count in counts.items() if count), ""),
        bulk_copies=len(_BULK_COPY.findall(text)),
        async_copies=len(_ASYNC_COPY.findall(text)),
        seconds=compiled.seconds,
    )


def _usage_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"sonic: this Triton came without {tool}, which tells what a binary takes")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    usage = [tuple(map(int, found)) for found in _USAGE.findall(done.stdout)]
    if done.returncode or not usage:
        raise RuntimeError(f"sonic: {tool} did not report registers and stack; it said: {done.stdout}{done.stderr}")
    return max(registers for registers, _, _ in usage), max(stack + local for _, stack, local in usage)


def _usage_of_amdgcn(text: str) -> tuple[int, int]:
    """Vector registers of a thread, and bytes of its scratch memory or, if more, of its spilled registers."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"sonic: the assembly has no .{name}; Triton {triton.__version__} writes it differently")
        return int(found[1])

    return field("vgpr_count"), max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))


def _config(compiled: Compiled) -> str:
    constants = compiled.constants
    if "BLOCK_M" not in constants:
        return ", ".join(f"{name} {value}" for name, value in constants.items() if "BLOCK" in name)
    text = " x ".join(str(constants[f"BLOCK_{letter}"]) for letter in "MNK") + f", {compiled.num_stages} stages"
    if "sliced" in constants["EPILOGUE"].__name__:
        text += f", {constants['OPTIONS'][1]} slices"
    return text


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- as Markdown


def table(resources: Sequence[Resources]) -> str:
    """One Markdown table per target, under a heading of its own; a row per kernel, in the order given."""
    parts = []
    for target in dict.fromkeys(found.target for found in resources):
        rows = [found for found in resources if found.target == target]
        limit = f"{rows[0].shared_limit / 1024:g} KiB"
        parts.append(
            f"### {target}\n\n"
            f"| op | kernel | configuration | warps | registers | spilled bytes | shared memory, KiB of {limit} "
            "| matrix instruction | bulk copies | asynchronous copies |\n"
            "|---|---|---|---|---|---|---|---|---|---|\n" + "\n".join(_row(found) for found in rows)
        )
    return "\n\n".join(parts)


def _row(found: Resources) -> str:
    cells = (
        found.op,
        found.kernel.removesuffix("_kernel"),
        found.config,
        found.num_warps,
        found.registers,
        found.spill_bytes,
        f"{found.shared_bytes / 1024:.1f}",
        found.matrix_instruction or "none",
        found.bulk_copies,
        found.async_copies,
    )
    return f"| {' | '.join(map(str, cells))} |"


def report(
    target_names: Sequence[str] = DEFAULT_TARGETS,
    sizes: LayerSizes = DEFAULT_SIZES,
    *,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """The tables of all targets under a line that tells what was compiled, and by which Triton.

    Args:
        target_names: in :data:`sonic.kernels.triton.target.TARGETS`.
        sizes, activation, dtype: as in :func:`compilations`.

    Raises:
        ValueError: an argument is not one of its choices.
        RuntimeError: Triton interprets, or came without the tool that reads binaries.
    """
    resources = [
        found for name in target_names for found in resources_of(name, sizes, activation=activation, dtype=dtype)
    ]
    return f"Triton {triton.__version__}, {sizes}, {_name_of(dtype)}, {activation}.\n\n{table(resources)}"


def replace_table(path: Path, text: str) -> None:
    """Put ``text`` between the :data:`MARKERS` of a page; the file is replaced as a whole or not at all.

    Raises:
        ValueError: the page has not each marker once, in order.
    """
    page = path.read_text(encoding="utf-8")
    begin, end = MARKERS
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    if page.count(begin) != 1 or page.count(end) != 1 or end not in rest:
        where = "sonic.kernels.triton.cross.replace_table"
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after ``python -m sonic.kernels.triton.cross``; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sonic.kernels.triton.cross",
        description="Compile every Triton kernel for chips that need not be here, and tell what each takes.",
    )
    parser.add_argument("--targets", nargs="+", default=DEFAULT_TARGETS, metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--shape", default="24576,1536,256,128,8", metavar="T,D,N,E,K", help="default: %(default)s")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--activation", choices=_ACTIVATIONS, default="swiglu")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of this page")
    options = parser.parse_args(arguments)
    if interprets():
        parser.error("TRITON_INTERPRET is set, so Triton compiles nothing; unset it and start again")
    try:
        tokens, width_d, width_n, experts, top_k = (int(word) for word in options.shape.split(","))
    except ValueError:
        parser.error(f"--shape is {options.shape!r}, expected five integers T,D,N,E,K")
    try:
        for name in options.targets:
            target_named(parser.prog, name)
        if options.write is not None and not options.write.is_file():
            raise argument_error(parser.prog, "--write", options.write, "a page that exists")
        dtype, sizes = _DTYPES[options.dtype], LayerSizes(tokens, width_d, width_n, experts, top_k)
        text = report(options.targets, sizes, activation=options.activation, dtype=dtype)
        if options.write is not None:
            replace_table(options.write, text)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"wrote {options.write}\n" if options.write is not None else f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
