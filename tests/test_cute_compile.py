"""What the compiler makes of the Hopper kernels, without a GPU; that ``docs/kernels.md`` tells it truly; and the files
in which compiled kernels are kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")

from sonic.kernels.cute import compiled, config, cross  # noqa: E402  (import CuTe-DSL)
from sonic.kernels.cute.config import CONSUMERS, KINDS, SHARED_BYTES, TileConfig, choose  # noqa: E402
from sonic.kernels.cute.cross import FORMS, MARKERS, Form, Resources  # noqa: E402
from sonic.kernels.cute.keys import GATED_ACTIVATIONS, KernelKey  # noqa: E402
from sonic.kernels.cute.loaders import PRODUCERS, STEP  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/kernels.md"
REGISTERS = 65536  # of a multiprocessor
GROUP = 128

try:
    cross._tool("nvdisasm")
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

ALL = cross.keys()


def sums(tile: TileConfig) -> int:
    """A thread's, times two."""
    return tile.blocks_per_warpgroup * tile.tile_n


# Compiling takes some seconds each. By default: of every epilogue, loader and layout, the configuration with most sums
# for each thread, and one without a hand-over of registers; all others when slow tests run.
BY_DEFAULT = (
    "up_proj, concatenated",
    "up_proj, plain",
    "down_proj",
    "down_proj_bwd_input, interleaved",
    "up_proj_bwd_input",
    "down_proj_bwd_weight, added",
    "up_proj_bwd_weight",
)
HEAVIEST = {
    form: max((key for name, key in ALL if name == form), key=lambda key: sums(key.config)) for form in BY_DEFAULT
}
NARROW = next(key for form, key in ALL if form == "bias gradients" and key.config.tile_n == 64)


@functools.cache
def found(form: str, key: KernelKey) -> Resources:
    return cross.resources_of(form, key)


def name_of(pair: Any) -> str:
    form, key = pair
    tile = key.config
    turns = " pingpong" if tile.pingpong else ""
    return f"{form} {tile.tile_m}x{tile.tile_n}{turns} cluster {tile.cluster_m}"


def holds(one: Resources) -> None:
    """What is asked of every kernel."""
    tile = one.config
    assert (one.spill_bytes, one.local_accesses) == (0, 0)
    assert one.threads == GROUP * CONSUMERS + PRODUCERS
    at_launch = REGISTERS // one.threads // 8 * 8
    assert at_launch == 168 and 0 < one.registers <= at_launch
    if one.producer_registers:
        assert one.producer_registers <= tile.producer_registers
        assert one.consumer_registers <= tile.consumer_registers
    else:  # nothing is handed over, where nobody needs more than all have
        assert one.warnings == ("C7508",)
    assert not one.is_serialised and set(one.warnings) <= {"C7508"}
    # 64 rows by the whole tile's columns, one for each 16 values of a step and each 64 rows that a warpgroup has
    assert (one.product, one.num_products) == (tile.tile_n, STEP // 16 * tile.blocks_per_warpgroup)
    assert tile.blocks_per_warpgroup in (1, 2)
    kind = next(kind for kind in KINDS if tile in config.CANDIDATES[kind])
    assert one.shared_bytes <= SHARED_BYTES == 232_448, kind


# ---------------------------------------------------------------- every kernel compiles, and into what


@pytest.mark.long
@pytest.mark.parametrize("pair", [*HEAVIEST.items(), ("bias gradients", NARROW)], ids=name_of)
def test_the_heaviest_kernel_of_each_form_fits(pair: tuple[str, KernelKey]) -> None:
    holds(found(*pair))
    assert page_row(*pair) == without_seconds(cross.table([found(*pair)]).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("pair", ALL, ids=name_of)
def test_every_kernel_that_can_be_chosen_fits(pair: tuple[str, KernelKey]) -> None:
    holds(found(*pair))
    assert page_row(*pair) == without_seconds(cross.table([found(*pair)]).splitlines()[-1])


LIGHTER = {
    **{
        f"up_proj {act}": Form("up_gated", "up_proj", True, act, "concatenated", flags=("h",))
        for act in GATED_ACTIVATIONS
    },
    **{
        f"down_proj_bwd_input {act}": Form("down_bwd_gated", "down_proj_bwd_input", True, act, "concatenated")
        for act in GATED_ACTIVATIONS
    },
    **{f"up_proj {act}": Form("up_plain", "up_proj", True, act, flags=("h",)) for act in ("relu", "relu2", "silu")},
    "in order": Form("up_gated", "up_proj", False, "geglu", "interleaved", flags=("h", "bias")),
    "inference": Form("up_gated", "up_proj", True, "geglu", "concatenated", flags=("bias",)),
    "dW2 in order": Form("contraction", "down_proj_bwd_weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LIGHTER)
def test_other_forms_fit(name: str, dtype: str) -> None:
    form = LIGHTER[name]
    widest = max(cross.configurations(form.kind), key=sums)
    holds(cross.resources_of(name, form.key(widest, dtype)))


@pytest.mark.long
def test_faults_are_seen() -> None:
    """256 float32 sums for each thread do not fit: the compiler spills them, and products wait for each other."""
    one = cross.resources_of("down_proj", FORMS["down_proj"].key(TileConfig(256, 256, 2)))
    assert one.spill_bytes > 1000 and one.local_accesses > 100
    assert one.is_serialised and "C7511" in one.warnings
    with pytest.raises(AssertionError):
        holds(one)


def test_registers_suffice_for_all_warpgroups() -> None:
    for _, key in ALL:
        tile = key.config
        total = PRODUCERS * tile.producer_registers + GROUP * CONSUMERS * tile.consumer_registers
        assert total <= REGISTERS
        assert tile.producer_registers % 8 == tile.consumer_registers % 8 == 0
        assert 24 <= tile.producer_registers and tile.consumer_registers <= 240 and tile.consumer_registers > 168


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_chosen_is_compiled(kind: str) -> None:
    compiled_here = {key.config for form, key in ALL if FORMS[form].kind == kind}
    chosen = {
        choose(kind, bucket, experts, width_k, width_n).config
        for bucket in range(18)
        for experts in (1, 8, 128, 512)
        for width_k in (8, 128, 2048, 8192)
        for width_n in (8, 64, 192, 256, 1536, 7168)
    }
    assert chosen <= compiled_here <= set(config.CANDIDATES[kind])
    assert len(compiled_here) == len(cross.configurations(kind))


# ---------------------------------------------------------------- reading machine code

SASS = """
        /*0000*/                   MOV R200, R1 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
.L_x_0:
        /*0030*/                   LDG.E.128 R20, desc[UR4][R6.64] ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_1:
        /*0060*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   EXIT ;
        /*0090*/                   MOV R222, R1 ;
.L_x_3:
        /*00a0*/                   MOV R30, R2 ;
        /*00b0*/                   EXIT ;
"""


def test_registers_are_counted_by_role() -> None:
    assert cross.registers_by_role(SASS) == (31, 24 + 64)
    assert cross.registers_by_role(SASS.replace("R30, R2", "R2, R2")) == (24, 88)
    assert cross.registers_by_role(SASS.replace("USETMAXREG", "NOP")) == (0, 0)


# ---------------------------------------------------------------- the page


def page_rows() -> list[str]:
    inside = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    head, _, rows = inside.partition("\n\n")
    version = head.removeprefix("CuTe-DSL ").partition(",")[0]
    assert head == f"CuTe-DSL {version}, sm_90a, bfloat16."
    if version != importlib.metadata.version("nvidia-cutlass-dsl"):
        pytest.skip(f"the page is of CuTe-DSL {version}")
    return rows.splitlines()[2:]


def without_seconds(row: str) -> str:
    return row.rpartition("|")[0].rpartition("|")[0]


def page_row(form: str, key: KernelKey) -> str:
    rows = page_rows()
    assert len(rows) == len(ALL), "made anew by: python -m sonic.kernels.cute.cross --write docs/kernels.md"
    return without_seconds(rows[ALL.index((form, key))])


def test_the_page_has_every_kernel_and_no_spills() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page_rows()]
    assert [row[0] for row in rows] == [form for form, _ in ALL]
    assert {(row[8], row[9], row[12]) for row in rows} == {("0", "0", "no")}


def test_the_command_writes_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Resources("up_proj", NARROW.config, 384, 168, 30, 200, 0, 0, 2048, 64, 4, False, (), 0.1)
    monkeypatch.setattr(cross, "resources_of", lambda *_: one)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert cross.main(["--forms", "down_proj", "--write", str(page)]) == 0
        assert capsys.readouterr().out == f"wrote {page}\n"
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{MARKERS[0]}\nCuTe-DSL ") and text.endswith(f" |\n{MARKERS[1]}\nafter\n")
        assert "old" not in text and text.count("| up_proj |") == len(cross.configurations("rows"))
    assert list(tmp_path.iterdir()) == [page]
    assert cross.main(["--forms", "down_proj"]) == 0
    assert "| 30 of 56 | 200 of 224 |" in capsys.readouterr().out
    page.write_text("nothing\n", encoding="utf-8")
    for words, message in (
        (["--write", str(page)], "without its markers"),
        (["--write", "nowhere.md"], "--write is nowhere.md, expected a page that exists"),
        (["--forms", "sideways"], "forms is 'sideways'"),
    ):
        with pytest.raises(SystemExit) as ended:
            cross.main(["--forms", "down_proj", *words] if "--forms" not in words else words)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "nothing\n"


def test_the_page_lists_every_file_with_about_its_length() -> None:
    folder = Path(cross.__file__).parent
    told = dict(re.findall(r"^\|[^|]*\| `kernels/cute/(\w+\.py)` \| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.M))
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in folder.glob("*.py")}
    assert set(told) == set(lengths)
    assert {name: length for name, length in lengths.items() if abs(length - int(told[name])) > 10 + length // 5} == {}


# ---------------------------------------------------------------- object files

LOAD = """
import json, sys
from sonic.kernels.cute import compiled, cross
key = next(key for _, key in cross.keys(["bias gradients"]) if key.config.tile_n == 64)
function = compiled.compiled(key)
assert callable(function) and compiled.compiled(key) is function
json.dump([compiled.num_compiled(), [str(compiled.on_disk(key))], len(compiled.variants())], sys.stdout)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the object file of one kernel."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONIC_CACHE_DIR", str(folder))
        assert compiled.compile_ahead(NARROW) == "compiled"
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in use."""
    shutil.copytree(made, tmp_path / "cache")
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_named_by_its_key_and_its_contents(cache: Path) -> None:
    (file,) = (cache / "kernels").iterdir()  # and nothing is left over from making it
    stem, _, digest = file.name.partition("-")
    assert stem == compiled._stem(NARROW)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()[:16] + ".o"
    assert compiled.on_disk(NARROW) == file
    assert compiled.compile_ahead(NARROW) == "found"


def test_another_process_loads_and_compiles_nothing(cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts, files, variants = json.loads(done.stdout)
    assert counts == {"compiled": 0, "loaded": 1} and variants == 1
    assert files == [str(next((cache / "kernels").iterdir()))]


@pytest.mark.parametrize("damage", ["cut short", "emptied", "one bit"])
def test_a_damaged_file_is_noticed_and_thrown_away(cache: Path, damage: str) -> None:
    (file,) = (cache / "kernels").iterdir()
    whole = bytearray(file.read_bytes())
    if damage == "one bit":
        whole[len(whole) // 2] ^= 1
    file.write_bytes({"cut short": whole[: len(whole) // 2], "emptied": b"", "one bit": whole}[damage])
    assert compiled.on_disk(NARROW) is None
    assert not file.exists()


def test_a_damaged_file_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = (cache / "kernels").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    before = compiled.num_compiled()["compiled"]
    renamed: list[tuple[Path, Path]] = []

    def replace(source: Path, target: Path) -> None:
        assert target.name.partition("-")[2] == hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] + ".o"
        assert not target.exists()
        renamed.append((source, target))
        shutil.move(source, target)

    monkeypatch.setattr(compiled.os, "replace", replace)
    assert compiled.compile_ahead(NARROW) == "compiled"
    assert compiled.num_compiled()["compiled"] == before + 1
    assert len(renamed) == 1, "a file appears by being renamed, whole"
    assert list((cache / "kernels").iterdir()) == [renamed[0][1]] == [compiled.on_disk(NARROW)]


def test_what_cannot_be_written_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def export_to_c(self, object_file_path: str, function_name: str) -> None:
            Path(object_file_path).write_bytes(b"half a kernel")
            raise OSError("no space left on device")

    shutil.rmtree(cache / "kernels")
    monkeypatch.setattr(compiled, "_compile", lambda *_: Broken())
    with pytest.raises(OSError, match="no space left"):
        compiled.compile_ahead(NARROW)
    assert list((cache / "kernels").iterdir()) == []


def test_names_tell_keys_sources_and_versions_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stems = {compiled._stem(key) for _, key in ALL}
    assert len(stems) == len({key for _, key in ALL})
    folder = Path(compiled.__file__).parent
    for source in folder.glob("*.py"):
        shutil.copy(source, tmp_path)
    fingerprint = compiled._fingerprint.__wrapped__
    before = fingerprint()
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert fingerprint() == before, "the place does not matter"
    text = (tmp_path / "gemm.py").read_text()
    (tmp_path / "gemm.py").write_text(text.replace("wait_group(1)", "wait_group(0)"))
    assert fingerprint() != before, "a source was changed"
    (tmp_path / "gemm.py").write_text(text)
    assert fingerprint() == before
    version = importlib.metadata.version
    monkeypatch.setattr(
        compiled.importlib.metadata,
        "version",
        lambda name: "9.9" if name == "nvidia-cutlass-dsl" else version(name),
    )
    assert fingerprint() != before, "another CuTe-DSL"
    monkeypatch.setattr(compiled, "_fingerprint", lambda: b"of other sources")
    assert compiled._stem(NARROW) not in stems


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("SONIC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))
    assert compiled.cache_folder() == tmp_path / "of the user/sonic/kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled.cache_folder() == Path.home() / ".cache/sonic/kernels"
