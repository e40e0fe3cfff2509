"""Files of checkpoints: read with distrust, written whole or not at all, never more than an expert in memory."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sonic.convert import Conversion, Entry, convert_checkpoint, plan_conversion
from sonic.convert.checkpoint import open_checkpoint
from sonic.convert.stored import read_header, write_file
from tests.convert_cases import (
    CASES,
    D,
    config_of,
    load_folder,
    read_safetensors,
    safetensors_bytes,
    same_bits,
    save_folder,
    tensors_of,
)

ROOT = Path(__file__).parent.parent
QWEN = next(case for case in CASES if case.id == "qwen3_moe-checkpoint")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "from", tensors_of(QWEN), config_of(QWEN))


# ---------------------------------------------------------------- safetensors


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    from sonic.convert.stored import DTYPES, HeldTensor

    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5))
        tensors[f"x.{name}"] = values.to(dtype)
    tensors["none"], tensors["number"] = torch.zeros(0, 4), torch.tensor(3.0)
    tensors["turned"] = torch.arange(6.0).view(2, 3).t()
    write_file(
        tmp_path / "x.safetensors", [HeldTensor.checked(key, value) for key, value in tensors.items()], {"a": "b"}
    )
    found, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"} and found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        read = found[key].read()
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float())
        assert found[key].offset % tensor.element_size() == 0
        assert b"".join(found[key].chunks()) == read.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert torch.equal(found["turned"].read(1), tensors["turned"][1])


def test_a_dtype_that_torch_does_not_know_is_passed_through(tmp_path: Path, source: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["odd"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [end, end + 3]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + b"abc")
    convert_checkpoint(source, tmp_path / "to")
    found, _ = read_header(tmp_path / "to/model.safetensors")
    assert found["odd"].dtype_name == "F6_E2M3" and b"".join(found["odd"].chunks()) == b"abc"


def header_of(entries: dict[str, Any] | str, body: bytes = b"") -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
TWICE = f"{{{ONE}, {ONE}}}"
BROKEN = {
    "empty": b"",
    "a page of the web": b"<!DOCTYPE html><html>not found</html>",
    "length of the header": struct.pack("<Q", 1 << 60) + b"{}",
    "no JSON": header_of("{"),
    "no text": struct.pack("<Q", 2) + b"\xff\xff",
    "a list": header_of("[]"),
    "no entry": header_of({"a": 3}),
    "negative": header_of({"a": entry(0, 4, [-1])}, b"1234"),
    "a half": header_of({"a": entry(0, 4, [1.5])}, b"1234"),
    "truth for a size": header_of({"a": entry(0, 4, [True])}, b"1234"),
    "three offsets": header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, b"1234"),
    "wrong size": header_of({"a": entry(0, 4, [2])}, b"1234"),
    "too short": header_of({"a": entry(0, 8, [2])}, b"1234"),
    "too long": header_of({"a": entry(0, 4, [1])}, b"12345"),
    "overlap": header_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"123456789012"),
    "hole": header_of({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"123456789012"),
    "overlap as large as the hole": header_of({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"123456789012"),
    "reversed": header_of({"a": entry(4, 0, [1], "odd")}, b"1234"),
    "metadata that is no text": header_of({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[what])
    with pytest.raises(ValueError, match=r"sonic.convert: .*x.safetensors is .*, expected a whole safetensors file"):
        open_checkpoint(path)


def test_a_key_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_of(TWICE, b"1234"))
    with pytest.raises(
        ValueError, match=r"sonic.convert: a in .*x.safetensors is there twice, expected every key once"
    ):
        open_checkpoint(path)


def test_the_package_reads_and_writes_the_same_files(tmp_path: Path, source: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
    convert_checkpoint(source, tmp_path / "to", max_shard_bytes=1500)
    found: dict[str, Tensor] = {}
    for path in (tmp_path / "to").glob("*.safetensors"):
        found.update(safetensors.load_file(path))
    assert same_bits(found, load_folder(tmp_path / "to")[0])
    tensors = {**tensors_of(QWEN, dtype=torch.bfloat16), "one": torch.ones(1), "byte": torch.ones(3, dtype=torch.uint8)}
    safetensors.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[key].read(), tensor) for key, tensor in tensors.items())


# ---------------------------------------------------------------- folders


def test_shards_are_no_larger_than_told(tmp_path: Path, source: Path) -> None:
    convert_checkpoint(source, tmp_path / "to", max_shard_bytes=900)
    files = sorted((tmp_path / "to").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    for path in files:
        tensors, _ = read_safetensors(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 900 or len(tensors) == 1
    index = json.loads((tmp_path / "to/model.safetensors.index.json").read_text())
    order = list(dict.fromkeys(index["weight_map"].values()))
    assert order == [path.name for path in files], "layers come in natural order"
    layers = [key.split(".")[2] for key in index["weight_map"] if key.endswith(".w1")]
    assert layers == ["1", "2", "10"]


INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, edit: Any) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_faults_of_an_index_are_refused(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return save_folder(tmp_path / name, tensors_of(QWEN), config_of(QWEN), num_shards=3)

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_checkpoint(folder)

    shard = "model-00002-of-00003.safetensors"
    (fresh("a") / shard).unlink()
    refused(tmp_path / "a", rf"{shard}, which {INDEX} names is missing")
    edit_index(fresh("b"), lambda files: files.__setitem__("ghost", shard))
    refused(tmp_path / "b", rf"ghost in {shard} is missing")
    edit_index(fresh("c"), lambda files: files.pop("lm_head.weight"))
    refused(tmp_path / "c", rf"lm_head.weight in .* is not listed by {INDEX}, expected it to name {shard}")
    edit_index(fresh("j"), lambda files: files.update({"lm_head.weight": shard.replace("2-", "1-")}))
    refused(
        tmp_path / "j", rf"lm_head.weight in .* is placed in .*1-of-00003.safetensors by {INDEX}, expected it to name"
    )
    edit_index(fresh("d"), lambda files: files.__setitem__("lm_head.weight", "../from/model.safetensors"))
    refused(tmp_path / "d", "is '../from/model.safetensors', expected a name in the same folder")
    folder = fresh("e")
    twice = {**read_safetensors(folder / shard)[0], "model.embed_tokens.weight": torch.zeros(7, D)}
    (folder / shard).write_bytes(safetensors_bytes(twice, {"format": "pt"}))
    refused(folder, rf"model.embed_tokens.weight in {shard} is in another shard too")
    folder = fresh("f")
    (folder / shard).write_bytes(safetensors_bytes(read_safetensors(folder / shard)[0], {"format": "np"}))
    refused(folder, r"metadata 'format' is 'np' in .* and 'pt' in another shard")
    (fresh("g") / INDEX).write_text("{}")
    refused(tmp_path / "g", "without a weight_map")
    (fresh("h") / "model.safetensors").write_bytes(safetensors_bytes({}))
    refused(tmp_path / "h", rf"with both model.safetensors and {INDEX}")
    (tmp_path / "i").mkdir()
    refused(tmp_path / "i", "without weights")
    (tmp_path / "i/config.json").write_text("[]")
    (tmp_path / "i/model.safetensors").write_bytes(safetensors_bytes({}))
    refused(tmp_path / "i", "config.json is a JSON list, expected a JSON object")


# ---------------------------------------------------------------- torch files


@pytest.mark.parametrize("num_shards", [1, 2])
def test_torch_files_are_read(num_shards: int, tmp_path: Path) -> None:
    tensors = tensors_of(QWEN)
    tensors["model.turned"] = torch.randn(4, 3).t()
    folder = tmp_path / "from"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(QWEN)))
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-{number}.bin" for number in range(num_shards)]
        files = {key: names[number % num_shards] for number, key in enumerate(tensors)}
        for name in names:
            torch.save({key: tensors[key] for key, file in files.items() if file == name}, folder / name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    convert_checkpoint(folder, tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["config.json", "model.safetensors"]
    convert_checkpoint(tmp_path / "to", tmp_path / "back", "qwen3_moe")
    assert same_bits(load_folder(tmp_path / "back")[0], tensors)


class Runs:
    """Pickled, it is a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_torch_file_runs(tmp_path: Path) -> None:
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        save({"a": Runs(tmp_path / "proof")}, tmp_path / "x.bin")
        with pytest.raises(ValueError, match=r"x.bin is not loaded .* expected a state dict that torch.save wrote"):
            open_checkpoint(tmp_path / "x.bin")
        assert not (tmp_path / "proof").exists()
    with pytest.raises(FileNotFoundError):  # so that the proof proves something: elsewhere it would have been called
        pickle.loads(pickle.dumps(Runs(tmp_path / "nowhere/proof")))


@pytest.mark.parametrize(
    "content", [[torch.zeros(3)], {"step": 3}, {"model": {"a": torch.zeros(3)}}, {1: torch.zeros(3)}]
)
def test_torch_files_of_anything_else_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"sonic.convert: .* is a (list|int|dict), expected a"):
        open_checkpoint(tmp_path / "x.pt")


# ---------------------------------------------------------------- whole or not at all


def broken_plan(source: Path, error: type[BaseException]) -> Conversion:
    """A plan whose last tensor fails when everything before it is written."""
    plan = plan_conversion(source)

    def fail() -> Iterator[Tensor]:
        raise error("on purpose")
        yield

    last = plan.entries[-1]
    bad = Entry(last.key, last.dtype_name, last.shape, last.sources, last.how, fail)
    object.__setattr__(plan, "entries", (*plan.entries[:-1], bad))
    return plan


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path, source: Path) -> None:
    with pytest.raises(error, match="on purpose"):
        broken_plan(source, error).write(tmp_path / "to", max_shard_bytes=700)
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_too_few_bytes_are_noticed(tmp_path: Path, source: Path) -> None:
    plan = plan_conversion(source)
    last = plan.entries[-1]
    short = Entry(last.key, last.dtype_name, last.shape, last.sources, last.how, lambda: [torch.zeros(1)])
    object.__setattr__(plan, "entries", (*plan.entries[:-1], short))
    with pytest.raises(RuntimeError, match=r"model.steps gave 4 bytes while it was written, expected 8"):
        plan.write(tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_a_source_that_became_shorter_is_noticed(tmp_path: Path, source: Path) -> None:
    plan = plan_conversion(source)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="model.safetensors is shorter than its header says"):
        plan.write(tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_targets_that_are_there(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")
    before = (tmp_path / "empty/model.safetensors").read_bytes()
    for target in (tmp_path / "empty", source, source / "config.json"):
        with pytest.raises(ValueError, match="which is there already, expected a new folder, or an empty one"):
            convert_checkpoint(source, target)
    assert (tmp_path / "empty/model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="expected a new folder in one that exists; .*nowhere does not"):
        convert_checkpoint(source, tmp_path / "nowhere/to")


SLOW = """
import sys, time
from sonic.convert import plan_conversion
import sonic.convert.cli as cli

plan = plan_conversion(sys.argv[1])
def report(line):
    print(line, flush=True)
    time.sleep(600)
cli.plan_conversion = lambda *arguments, **options: plan
write = type(plan).write
type(plan).write = lambda self, target, **options: write(self, target, max_shard_bytes=700, report=report)
from sonic.cli import main
sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
"""


def start_slow(source: Path, target: Path) -> subprocess.Popen[str]:
    """A conversion that waits after its first file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW, str(source), str(target)]
    process = subprocess.Popen(command, env=environment, cwd=source, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "model-00001" not in process.stdout.readline():
        assert process.poll() is None
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file locks of Unix")
def test_a_killed_run_leaves_no_target_and_is_cleared_away(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "to"
    process = start_slow(source, target)
    try:
        (partial,) = (path for path in tmp_path.iterdir() if path.name != "from")
        assert partial.name.startswith(".to.partial-") and any(partial.iterdir())
        convert_checkpoint(source, target)  # beside a run that lives: its folder stays
        assert partial.exists() and load_folder(target)
    finally:
        process.kill()
        process.wait()
    assert partial.exists(), "a killed process cleans nothing"
    with pytest.raises(ValueError, match="there already"):
        convert_checkpoint(source, target)
    for path in target.iterdir():
        path.unlink()
    convert_checkpoint(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of Unix")
def test_a_run_that_is_told_to_end_leaves_nothing(tmp_path: Path, source: Path) -> None:
    process = start_slow(source, tmp_path / "to")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


# ---------------------------------------------------------------- memory

PEAK = """
import sys
from sonic.convert import convert_checkpoint

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

def there_and_back(source):
    convert_checkpoint(source, source + "-sonic", max_shard_bytes=20_000_000)
    convert_checkpoint(source + "-sonic", source + "-back", "qwen3_moe", max_shard_bytes=20_000_000)

there_and_back(sys.argv[1])  # loads what is loaded at the first call
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak
before = peak()
there_and_back(sys.argv[2])
print(peak() - before)
"""


def save_experts(folder: Path, num_layers: int, experts: int, hidden: int, width: int) -> dict[str, Tensor]:
    tensors = {}
    for layer in range(num_layers):
        stem = f"model.layers.{layer}.mlp."
        for e in range(experts):
            for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                tensors[f"{stem}experts.{e}.{name}_proj.weight"] = torch.randn(*shape)
        tensors[f"{stem}gate.weight"] = torch.randn(experts, hidden)
    save_folder(folder, tensors, {"model_type": "qwen3_moe", "num_experts_per_tok": 2})
    return tensors


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_memory_holds_a_few_experts_however_large_the_model_is(tmp_path: Path) -> None:
    num_layers, experts = 6, 16
    save_experts(tmp_path / "small", 1, 2, 256, 192)
    tensors = save_experts(tmp_path / "large", num_layers, experts, 256, 192)
    total = sum(tensor.nbytes for tensor in tensors.values())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    layer, expert = total / num_layers, total / num_layers / experts
    print(f"peak grew by {grown} bytes; an expert has {expert:.0f}, a layer {layer:.0f}, the model {total}")
    assert grown < 6 * expert < layer
    assert same_bits(load_folder(tmp_path / "large-back")[0], tensors)
