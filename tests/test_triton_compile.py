"""What the compiler makes of the Triton kernels for absent chips, and that ``docs/kernels.md`` tells it truly.

Under ``TRITON_INTERPRET``, which this process has without a GPU, nothing compiles: processes without it do, two side by
side, once for all tests of this file.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from sonic.kernels.triton import cross  # noqa: E402  (imports Triton)
from sonic.kernels.triton.config import choose, rows_bucket  # noqa: E402
from sonic.kernels.triton.cross import DEFAULT_SIZES, DEFAULT_TARGETS, MARKERS, OPS, LayerSizes, Resources  # noqa: E402
from sonic.kernels.triton.launch import compiling_for, current_target  # noqa: E402
from sonic.kernels.triton.target import TARGETS  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/kernels.md"

GEMMS = (
    "up_proj",
    "up_proj without H",
    "down_proj",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
)
WEIGHT_OPS = ("down_proj_bwd_weight", "up_proj_bwd_weight")
TRAINING = tuple(op for op in OPS if op != "up_proj without H")
INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}

# DeepSeek-V3.2: w1 has 7.5e9 elements
LARGE = LayerSizes(32768, 7168, 2048, 256, 8)
VARIED = sorted({round(100000 ** (step / 113)) for step in range(114)})
ONE_BUCKET = list(range(8193, 16385, 81))[:100]  # odd and even, 513 to 1,024 rows per expert

# Compiling takes seconds per kernel, so beside the whole default layer only what differs is compiled: ops whose code
# depends on the layout; on a bias; one op of each kind of GEMM for other dtypes; ops that touch large tensors.
LAYOUT_OPS = ("up_proj", "down_proj_bwd_input")
BIAS_OPS = ("up_proj", "down_proj", "down_proj_bwd_input", "down_proj_bwd_weight", "up_proj_bwd_weight")
ONE_OF_EACH_KIND = ("up_proj", "down_proj", "down_proj_bwd_input", "up_proj_bwd_weight")
LARGE_OPS = (
    "up_proj",
    "down_proj",
    "combine",
    "down_proj_bwd_input",
    "down_proj_bwd_weight",
    "up_proj_bwd_input",
    "up_proj_bwd_weight",
)

# One process each, about equally long.
JOBS: tuple[dict[str, dict[str, Any]], ...] = (
    {
        "sm_90": {"target_name": "sm_90"},
        "concatenated with bias": {"target_name": "sm_90", "bias": True, "ops": BIAS_OPS},
        "interleaved": {"target_name": "sm_90", "glu_layout": "interleaved", "ops": LAYOUT_OPS},
        "interleaved with bias": {
            "target_name": "sm_90",
            "glu_layout": "interleaved",
            "bias": True,
            "ops": LAYOUT_OPS,
        },
        "float32": {"target_name": "sm_90", "dtype": "float32", "ops": ONE_OF_EACH_KIND},
        "float16": {"target_name": "sm_90", "dtype": "float16", "ops": ONE_OF_EACH_KIND},
    },
    {
        "sm_80": {"target_name": "sm_80"},
        "sm_100": {"target_name": "sm_100"},
        "gfx942": {"target_name": "gfx942"},
        "large": {"target_name": "sm_90", "sizes": dataclasses.astuple(LARGE), "ops": LARGE_OPS, "needs_ttir": True},
        "varied": {"target_name": "sm_90", "token_counts": VARIED},
        "one bucket": {"target_name": "sm_90", "token_counts": ONE_BUCKET},
    },
)
ON_SM_90 = ("sm_90", "concatenated with bias", "interleaved", "interleaved with bias", "float32", "float16", "large")

PROBE = """
import dataclasses, json, sys
import torch
from sonic.kernels.triton import cross

results = {}
for name, job in json.load(sys.stdin).items():
    if "token_counts" in job:
        counts = cross.variants(**job)
        results[name] = [[op, kernel, count] for (op, kernel), count in counts.items()]
        continue
    needs_ttir = job.pop("needs_ttir", False)
    if "dtype" in job:
        job["dtype"] = getattr(torch, job["dtype"])
    if "sizes" in job:
        job["sizes"] = cross.LayerSizes(*job["sizes"])
    results[name] = [dataclasses.asdict(found) for found in cross.resources_of(**job)]
    if needs_ttir:
        found = cross.compilations(**job)  # Triton has them in memory by now
        results[name + " ttir"] = [[op, one.kernel, one.binary.asm["ttir"]] for op, one in found]
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Any]:
    """What the processes found, by name of the job; compiled once, however many workers share the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    kept = shared / "triton_compile.json"
    with open(shared / "triton_compile.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(_compile_all()))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


@pytest.fixture(scope="session")
def worker_id(request: pytest.FixtureRequest) -> str:
    """Of pytest-xdist; ``"master"`` without it."""
    return str(getattr(request.config, "workerinput", {}).get("workerid", "master"))


def _compile_all() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}  # 3.9 warns where the latter is not set
    for name in ("TRITON_INTERPRET", "SONIC_TRITON_TUNED", "SONIC_BACKEND"):
        environment.pop(name, None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROBE],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in JOBS
    ]
    try:
        for process, jobs in zip(processes, JOBS, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
            process.stdin = None
        found = {}
        for process in processes:
            told, errors = process.communicate(timeout=500)
            assert process.returncode == 0, errors[-5000:]
            found |= json.loads(told)
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def of(results: dict[str, Any], job: str) -> list[Resources]:
    return [Resources(**found) for found in results[job]]


# ---------------------------------------------------------------- every kernel compiles, and into what


@pytest.mark.long
@pytest.mark.parametrize("job", [*DEFAULT_TARGETS, *ON_SM_90[1:]])
def test_nothing_spills_and_shared_memory_suffices(results: dict[str, Any], job: str) -> None:
    found = of(results, job)
    asked = next(jobs[job] for jobs in JOBS if job in jobs).get("ops", OPS)
    assert list(dict.fromkeys(one.op for one in found)) == list(asked)
    assert {(one.op, one.kernel): one.spill_bytes for one in found if one.spill_bytes} == {}
    for one in found:
        assert 0 < one.registers <= (512 if one.target == "gfx942" else 255)
        assert one.shared_bytes <= one.shared_limit == TARGETS[one.target].shared_bytes, one.op
        assert one.num_warps >= 1 and one.config


@pytest.mark.long
def test_plans_take_three_kernels_and_two_where_the_load_is_known(results: dict[str, Any]) -> None:
    for op, first in (("build_plan", []), ("build_plan from pairs", ["count_kernel"])):
        kernels = [one.kernel for one in of(results, "sm_90") if one.op == op]
        assert kernels == [*first, "place_kernel", "find_again_kernel"]


@pytest.mark.long
@pytest.mark.parametrize("job", [*DEFAULT_TARGETS, *ON_SM_90[1:]])
def test_products_are_made_by_the_matrix_instruction_of_the_chip(results: dict[str, Any], job: str) -> None:
    for one in of(results, job):
        kind = one.matrix_instruction.partition(" x ")[0]
        # float32 products are exact in float32, which no matrix instruction of these chips is
        assert kind == (INSTRUCTION[one.target] if one.op in GEMMS and one.dtype != "float32" else ""), one.op


@pytest.mark.long
@pytest.mark.parametrize("job", [*DEFAULT_TARGETS, *ON_SM_90[1:]])
def test_operands_are_copied_asynchronously(results: dict[str, Any], job: str) -> None:
    """By whole tiles where the configuration says descriptors; other operands on NVIDIA thread by thread."""
    for one in of(results, job):
        expected = one.op in GEMMS and one.op not in WEIGHT_OPS and TARGETS[one.target].has_descriptors
        expected = expected and one.dtype != "float32"
        assert (one.bulk_copies > 0) == expected, one.op
        assert (one.async_copies > 0) == (one.op in GEMMS and one.target != "gfx942"), one.op


# ---------------------------------------------------------------- the page


def tables_of_page(text: str) -> dict[str, list[list[str]]]:
    """Cells of each table between the markers, by the heading above it."""
    inside = text.partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    tables: dict[str, list[list[str]]] = {}
    for part in inside.split("### ")[1:]:
        name, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        tables[name] = rows[2:]  # without the head
    return tables


@pytest.mark.long
def test_the_page_has_every_kernel_of_every_target(results: dict[str, Any]) -> None:
    tables = tables_of_page(PAGE.read_text(encoding="utf-8"))
    assert list(tables) == list(DEFAULT_TARGETS)
    for target, rows in tables.items():
        found = of(results, target)
        assert [row[:2] for row in rows] == [[one.op, one.kernel.removesuffix("_kernel")] for one in found]
        for row, one in zip(rows, found, strict=True):
            assert row[5] == "0", f"{one.op} on {target} spills"
            assert row[7].partition(" x ")[0] == (one.matrix_instruction.partition(" x ")[0] or "none")


@pytest.mark.long
def test_the_page_tells_what_this_compiler_makes(results: dict[str, Any]) -> None:
    inside = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    head, _, told = inside.partition("\n\n")
    named = re.match(r"Triton (\S+), ", head)
    assert named and head == f"Triton {named[1]}, {DEFAULT_SIZES}, bfloat16, swiglu."
    if named[1] != triton.__version__:
        pytest.skip(f"the page is of Triton {named[1]}, this is {triton.__version__}")
    want = cross.table([one for target in DEFAULT_TARGETS for one in of(results, target)])
    assert told.splitlines() == want.splitlines(), (
        "made anew by: python -m sonic.kernels.triton.cross --write docs/kernels.md"
    )


# ---------------------------------------------------------------- a varying number of tokens


def num_configs(token_counts: list[int]) -> dict[str, int]:
    """How many configurations the model chooses for each op of a bfloat16 SwiGLU layer on sm_90; 1 without a choice."""
    sizes, width_u = DEFAULT_SIZES, 2 * DEFAULT_SIZES.intermediate_size
    width_d, width_n, experts = sizes.hidden_size, sizes.intermediate_size, sizes.num_experts
    kinds = {
        "up_proj": ("up_gated", width_d, width_u),
        "down_proj": ("rows", width_n, width_d),
        "down_proj_bwd_input": ("down_bwd", width_d, width_n),
        "down_proj_bwd_weight": ("contraction", width_d, width_n),
        "up_proj_bwd_input": ("rows", width_u, width_d),
        "up_proj_bwd_weight": ("contraction", width_u, width_d),
    }
    buckets = {rows_bucket(num_tokens * sizes.top_k, experts) for num_tokens in token_counts}
    counts = dict.fromkeys(TRAINING, 1)
    for op, (kind, width_k, width_out) in kinds.items():
        chosen = {
            choose(kind, bucket, experts, width_k, width_out, torch.bfloat16, TARGETS["sm_90"]) for bucket in buckets
        }
        counts[op] = len(chosen)
    return counts


@pytest.mark.long
@pytest.mark.parametrize("op", TRAINING)
def test_a_varying_number_of_tokens_meets_few_binaries(results: dict[str, Any], op: str, record_property: Any) -> None:
    """At most one per configuration: pointers are aligned and options fixed, and R is never specialised."""
    assert len(VARIED) == 100 and VARIED[0] == 1 and VARIED[-1] == 100000
    assert any(num_tokens % 16 for num_tokens in VARIED)
    counts = {kernel: count for name, kernel, count in results["varied"] if name == op}
    record_property("binaries", counts)
    print(f"{op}: {counts} binaries for {num_configs(VARIED)[op]} configurations")
    assert counts and max(counts.values()) <= num_configs(VARIED)[op]


@pytest.mark.long
@pytest.mark.parametrize("op", TRAINING)
def test_one_bucket_of_rows_takes_one_binary(results: dict[str, Any], op: str) -> None:
    sizes = DEFAULT_SIZES
    assert len(ONE_BUCKET) == 100 and {num_tokens % 2 for num_tokens in ONE_BUCKET} == {0, 1}
    assert len({rows_bucket(num_tokens * sizes.top_k, sizes.num_experts) for num_tokens in ONE_BUCKET}) == 1
    counts = {kernel: count for name, kernel, count in results["one bucket"] if name == op}
    assert counts and set(counts.values()) == {1}, counts


# ---------------------------------------------------------------- tensors of more than 2**31 elements

POINTER_STEP = re.compile(
    r"%([\w.#]+) = tt\.addptr %([\w.#]+), %[\w.#]+ : \S*!tt\.ptr<(\w+)>+, (?:tensor<[\dx]*)?(i\d+)>?"
)
SAME_POINTER = re.compile(r"%([\w.#]+) = tt\.(?:broadcast|expand_dims|splat) %([\w.#]+)")


def narrow_addresses(ttir: str) -> list[str]:
    """Addresses of matrices that Triton's IR reaches from the base by 32-bit steps alone, one line each.

    A 64-bit step leads to a row, after which a 32-bit one may lead to a column. Index arrays (int32 elements) have
    fewer than 2**31 entries.
    """
    steps = {found[1]: found for found in POINTER_STEP.finditer(ttir)}
    same = {found[1]: found[2] for found in SAME_POINTER.finditer(ttir)}
    faults = []
    for step in steps.values():
        name, is_wide = step[1], False
        while name in steps or name in same:
            if name in steps:
                is_wide |= steps[name][4] == "i64"
                name = steps[name][2]
            else:
                name = same[name]
        if step[3] != "i32" and not is_wide:
            faults.append(step[0])
    return faults


def test_the_rule_of_wide_addresses_finds_faults() -> None:
    wide = (
        "%1 = tt.splat %x : !tt.ptr<bf16> -> tensor<4x!tt.ptr<bf16>> loc(#loc1)\n"
        "%2 = tt.addptr %1, %row : tensor<4x!tt.ptr<bf16>>, tensor<4xi64> loc(#loc2)\n"
        "%3 = tt.expand_dims %2 {axis = 1 : i32} : tensor<4x!tt.ptr<bf16>> -> tensor<4x1x!tt.ptr<bf16>> loc(#loc3)\n"
        "%4 = tt.broadcast %3 : tensor<4x1x!tt.ptr<bf16>> -> tensor<4x8x!tt.ptr<bf16>> loc(#loc3)\n"
        "%5 = tt.addptr %4, %column : tensor<4x8x!tt.ptr<bf16>>, tensor<4x8xi32> loc(#loc4)\n"
        "%6 = tt.addptr %index, %row32 : !tt.ptr<i32>, i32 loc(#loc5)\n"
    )
    assert narrow_addresses(wide) == []
    assert len(narrow_addresses(wide.replace("tensor<4xi64>", "tensor<4xi32>"))) == 2
    assert len(narrow_addresses("%7 = tt.addptr %args.4, %at : !tt.ptr<f32>, i32 loc(#loc6)")) == 1


@pytest.mark.long
def test_addresses_in_large_tensors_are_64_bit(results: dict[str, Any]) -> None:
    assert LARGE.num_experts * 2 * LARGE.intermediate_size * LARGE.hidden_size > 2**31
    for op, kernel, ttir in results["large ttir"]:
        assert ttir.count("tt.addptr") == len(POINTER_STEP.findall(ttir)) > 0, (op, kernel)
        assert narrow_addresses(ttir) == [], (op, kernel)


# ---------------------------------------------------------------- compiling for a chip that is not here


def test_nothing_is_compiled_while_triton_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    held = triton.runtime.driver._active
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), compiling_for(TARGETS["sm_90"]):
        pass
    assert triton.runtime.driver._active is held


def test_the_driver_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    here = torch.empty(1, device="cpu")
    held, target = triton.runtime.driver._active, current_target(here)
    with pytest.raises(ZeroDivisionError), compiling_for(TARGETS["sm_80"]) as compilation:
        assert triton.runtime.driver.active.get_current_target().arch == 80
        assert current_target(here) is TARGETS["sm_80"] is compilation.target
        raise ZeroDivisionError
    assert triton.runtime.driver._active is held
    assert current_target(here) is target


# ---------------------------------------------------------------- the command


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n", encoding="utf-8")
    path.chmod(0o640)
    return path


@pytest.fixture
def _compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the interpreter, and with one kernel that needs no compiling."""
    one = Resources("op", "a_kernel", "sm_90", "bfloat16", "16 x 16 x 16", 4, 32, 0, 1024, 2048, "mma x 2", 0, 3, 0.1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cross, "resources_of", lambda name, *_, **__: [dataclasses.replace(one, target=name)])
    yield


@pytest.mark.usefixtures("_compiles")
def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cross.main(["--targets", "sm_80", "sm_90", "--shape", "8,16,16,4,2", "--dtype", "float16"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Triton {triton.__version__}, (T, D, N, E, K) = (8, 16, 16, 4, 2), float16, swiglu.\n")
    assert "### sm_80\n" in told and "### sm_90\n" in told
    assert "| op | a | 16 x 16 x 16 | 4 | 32 | 0 | 1.0 | mma x 2 | 0 | 3 |" in told


@pytest.mark.usefixtures("_compiles")
def test_the_command_writes_between_the_markers(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # again over what it wrote
        assert cross.main(["--targets", "sm_90", "--write", str(page)]) == 0
        assert capsys.readouterr().out == f"wrote {page}\n"
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"before\n\n{MARKERS[0]}\nTriton ") and text.endswith(f" |\n{MARKERS[1]}\n\nafter\n")
        assert "old" not in text and text.count("### sm_90") == 1
    assert page.stat().st_mode & 0o777 == 0o640 and list(page.parent.iterdir()) == [page]


@pytest.mark.usefixtures("_compiles")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "1,2,3"], "--shape is '1,2,3', expected five integers"),
        (["--shape", "1,2,3,4,x"], "--shape is '1,2,3,4,x', expected five integers"),
        (["--shape", "1,2,3,0,1"], "num_experts is 0, expected a positive integer"),
        (["--shape", "1,2,3,4,5"], "top_k is 5, expected at most num_experts = 4"),
        (["--targets", "sm_70"], "target is 'sm_70', expected one of"),
        (["--dtype", "float64"], "float64"),
        (["--activation", "tanh"], "tanh"),
        (["--write", "nowhere.md"], "--write is nowhere.md, expected a page that exists"),
        (["--write", str(ROOT / "README.md")], "without its markers"),
    ],
)
def test_the_command_names_what_is_wrong(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (ROOT / "README.md").read_bytes()
    with pytest.raises(SystemExit) as ended:
        cross.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert (ROOT / "README.md").read_bytes() == before


def test_the_command_refuses_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        cross.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_name": "sm_70"}, "target is 'sm_70'"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"glu_layout": "mixed"}, "glu_layout is 'mixed'"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"ops": ("up_proj", "down")}, "ops is 'down'"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cross.resources_of(**{"target_name": "sm_90", **options})
