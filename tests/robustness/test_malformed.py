"""Damaged, malformed and malicious files: passed over or refused in plain words, and no code in them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from examples.lm import checkpoint, parallel_checkpoint, parallel_source
from examples.lm.errors import JobError
from sonic.convert.checkpoint import open_checkpoint
from sonic.convert.stored import DTYPES, HeldTensor, write_file

STATE = {"model": {"w": torch.arange(50.0)}, "optimizer": {"state": {0: {"m": torch.arange(9.0)}}}}
WORLD: Any = SimpleNamespace(is_main=True, size=1, rank=0, barrier=lambda: None)


class Evil:
    """Runs a command where a pickle of it is loaded without care."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def damaged(data: bytes, number: int, seed: int = 0) -> Iterator[bytes]:
    """The bytes cut short, with some of them changed, with a piece missing, or with a piece of noise in it."""
    draw = random.Random(seed)
    for _ in range(number):
        kind, at = draw.randrange(4), draw.randrange(len(data))
        length = draw.randint(1, 200)
        if kind == 0:
            yield data[:at]
        elif kind == 1:
            changed = bytearray(data)
            changed[at] ^= 1 << draw.randrange(8)
            yield bytes(changed)
        elif kind == 2:
            yield data[:at] + data[at + length :]
        else:
            yield data[:at] + draw.randbytes(length) + data[at + length :]


# ---------------------------------------------------------------- checkpoints of the examples


class TestCheckpoints:
    def test_every_damage_is_seen(self, tmp_path: Path) -> None:
        good = checkpoint.save_checkpoint(tmp_path, 3, {"a": 1}, STATE)
        data = good.read_bytes()
        path = tmp_path / "step_00000009.pt"
        flips = (data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i in range(len(data)) for bit in (1, 0x80))
        for number, content in enumerate([*flips, *damaged(data, 1000), b"", b"\0" * len(data), data + b"\0"]):
            if content == data:
                continue
            path.write_bytes(content)
            assert not checkpoint.is_whole(path), f"number {number} passes for whole"
        warnings: list[str] = []
        assert checkpoint.newest_checkpoint(tmp_path, warn=warnings.append) == good and len(warnings) == 1

    def test_without_a_digest_at_the_end(self, tmp_path: Path) -> None:
        """A file of before there was one is trusted if the archive is whole; whatever is in it, nothing is raised."""
        path, buffer = tmp_path / "step_00000009.pt", io.BytesIO()
        torch.save({"step": 9, "config": {}, **STATE}, buffer)
        path.write_bytes(buffer.getvalue())
        assert checkpoint.is_whole(path)
        assert checkpoint.load_checkpoint(path, {}, torch.device("cpu"))["step"] == 9
        whole = 0
        for content in damaged(buffer.getvalue(), 1500):
            path.write_bytes(content)
            whole += checkpoint.is_whole(path)
        assert whole < 300  # the fields of an archive that nobody reads have no checksum

    def test_what_was_just_written_stays_after_falling_back(self, tmp_path: Path) -> None:
        """Damaged checkpoints of later steps do not count among those that are kept."""
        for step in (5, 10, 15):
            checkpoint.save_checkpoint(tmp_path, step, {}, STATE)
        for step in (10, 15):
            (tmp_path / f"step_{step:08d}.pt").write_bytes(b"damaged")
        checkpoint.save_checkpoint(tmp_path, 5, {}, STATE)
        written = checkpoint.save_checkpoint(tmp_path, 6, {}, STATE)
        assert checkpoint.newest_checkpoint(tmp_path, warn=pytest.fail) == written
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005.pt", "step_00000006.pt"]

    def test_no_code_runs(self, tmp_path: Path) -> None:
        path = tmp_path / "step_00000009.pt"
        with checkpoint.written_whole(path) as file:
            torch.save({"step": 9, "config": {}, "model": Evil(tmp_path / "witness")}, file)
        with pytest.raises(pickle.UnpicklingError, match="(?i)weights"):
            checkpoint.load_checkpoint(path, {}, torch.device("cpu"))
        path.write_bytes(pickle.dumps(Evil(tmp_path / "witness")))
        assert not checkpoint.is_whole(path)
        assert not (tmp_path / "witness").exists()

    def test_the_log_may_end_in_the_middle(self, tmp_path: Path) -> None:
        log = tmp_path / "metrics.jsonl"
        for step in range(1, 4):
            checkpoint.append_metrics(log, {"step": step})
        text = log.read_bytes()
        for length in range(len(text) + 1):
            log.write_bytes(text[:length])
            assert [row["step"] for row in checkpoint.read_metrics(log)] == [1, 2, 3][: text[:length].count(b"\n")]


class TestShardedCheckpoints:
    def save(self, folder: Path, step: int) -> Path:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return parallel_checkpoint.save_sharded(folder, step, {"a": 1}, {}, model, optimizer, WORLD)

    @pytest.mark.parametrize(
        "about",
        [b"", b"{", b"[]", b"3", b"{}", b'{"files": 3}', b'{"files": {"x": null}}', b"\xff\xfe", b'{"files": []}'],
    )
    def test_a_damaged_description_is_passed_over(self, about: bytes, tmp_path: Path) -> None:
        good, bad = self.save(tmp_path, 3), self.save(tmp_path, 4)
        (bad / parallel_checkpoint.ABOUT).write_bytes(about)
        warnings: list[str] = []
        assert parallel_checkpoint.newest_sharded(tmp_path, warn=warnings.append) == good
        assert len(warnings) == 1 and bad.name in warnings[0]
        with pytest.raises(JobError, match="--from is .*of which files are missing or cut short"):
            parallel_source.read_source(bad)

    def test_what_was_just_written_stays_after_falling_back(self, tmp_path: Path) -> None:
        for step in (5, 10, 15):
            self.save(tmp_path, step)
        for step in (10, 15):
            (tmp_path / f"step_{step:08d}" / parallel_checkpoint.ABOUT).unlink()
        written = self.save(tmp_path, 6)
        assert parallel_checkpoint.newest_sharded(tmp_path, warn=pytest.fail) == written

    def test_a_step_that_is_written_again(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, 3)
        (path / "stray").write_bytes(b"of the old one")
        assert self.save(tmp_path, 3) == path and parallel_checkpoint.is_whole(path)
        assert not (path / "stray").exists()
        self.save(tmp_path, 4)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


# ---------------------------------------------------------------- checkpoints to convert

REFUSAL = re.compile(r"sonic\.convert: .+ is .+, expected .+", re.S)


def look_at(path: Path) -> bool:
    """Read all of it; whether it was served. Anything but an answer or a refusal in the one form is raised."""
    try:
        for tensor in open_checkpoint(path).tensors.values():
            for _ in tensor.chunks():
                pass
            if tensor.dtype_name in DTYPES:  # others can be handed on, and not read
                tensor.read()
    except ValueError as error:
        assert REFUSAL.fullmatch(str(error)), f"{type(error).__name__}: {error}"
        return False
    return True


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 4), "b.c": torch.randn(5).bfloat16(), "e": torch.empty(0, 3)}
    write_file(path, [HeldTensor(key, value) for key, value in tensors.items()], {"x": "y"})
    return path


def header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def entry(shape: str, end: int, dtype: str = "F32") -> str:
    return f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, {end}]}}}}'


HEADERS = {
    "length beyond the file": struct.pack("<Q", 2**63 - 1) + b"{}",
    "length of all bits": b"\xff" * 8 + b"{}",
    "size of nothing": header(entry("[1]", 4), b""),
    "negative size": header(entry("[-1]", 4), b"1234"),
    "a size that is no number": header(entry("[NaN]", 4), b"1234"),
    "huge sizes": header(entry(f"[{2**62}, {2**62}]", 4), b"1234"),
    "a dtype of another size": header(entry("[1]", 4, "F64"), b"1234"),
    "a thousand dimensions": header(entry(str([2] * 1000), 4), b"1234"),
    "deep lists": header("[" * 200_000),
    "deep objects": header('{"a":' * 50_000 + "1" + "}" * 50_000),
    "a number of 5000 digits": header(entry("[" + "1" * 5000 + "]", 4), b"1234"),
    "no size, and one beyond 64 bits": header(entry(f"[0, {2**63}]", 0)),
    "no size, and sizes beyond 64 bits together": header(entry(f"[0, {2**62}, {2**62}]", 0)),
}


class TestConvert:
    def test_a_file_cut_anywhere_is_refused(self, weights: Path) -> None:
        data = weights.read_bytes()
        assert look_at(weights)
        for length in range(len(data)):
            weights.write_bytes(data[:length])
            assert not look_at(weights), length

    def test_changed_headers_are_served_or_refused(self, weights: Path) -> None:
        data, draw = weights.read_bytes(), random.Random(0)
        size = 8 + int.from_bytes(data[:8], "little")
        served = 0
        for _ in range(2000):
            changed = bytearray(data)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(size)] = draw.randrange(256)
            weights.write_bytes(bytes(changed))
            served += look_at(weights)
        assert served < 1000

    @pytest.mark.parametrize("what", HEADERS)
    def test_headers(self, what: str, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(HEADERS[what])
        assert not look_at(path)

    def test_no_code_runs(self, tmp_path: Path) -> None:
        path, witness = tmp_path / "x.pt", tmp_path / "witness"
        torch.save({"a": torch.ones(2), "b": Evil(witness)}, path)
        assert not look_at(path)
        for protocol in range(6):
            path.write_bytes(pickle.dumps({"a": Evil(witness)}, protocol))
            assert not look_at(path)
        assert not witness.exists()

    def test_changed_pickles_are_served_or_refused(self, tmp_path: Path) -> None:
        """Opcodes at random in a whole archive: what torch raises of them is refused in the one form."""
        path = tmp_path / "x.pt"
        torch.save({"a": torch.randn(3, 4), "b": torch.randn(5)}, path)
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in content if name.endswith("data.pkl"))
        original, draw = content[name], random.Random(0)
        for _ in range(500):
            changed = bytearray(original)
            for _ in range(draw.randint(1, 3)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            with zipfile.ZipFile(path, "w") as archive:
                for other, data in content.items():
                    archive.writestr(other, bytes(changed) if other == name else data)
            look_at(path)

    @pytest.mark.parametrize(
        "content",
        [
            {"weight_map": {"a": "../x.safetensors"}},
            {"weight_map": {"a": "/etc/passwd"}},
            {"weight_map": {"a": 3}},
            {"weight_map": []},
            {"weight_map": {"a": "missing.safetensors"}},
            {},
            [],
        ],
        ids=str,
    )
    def test_indices(self, content: Any, weights: Path) -> None:
        folder = weights.parent / "folder"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        assert not look_at(folder)

    @pytest.mark.parametrize("config", [b"", b"{", b"[]", b"\xff", b"null"], ids=repr)
    def test_configs(self, config: bytes, weights: Path) -> None:
        folder = weights.parent / "folder"
        folder.mkdir()
        weights.rename(folder / "model.safetensors")
        assert look_at(folder)
        (folder / "config.json").write_bytes(config)
        assert not look_at(folder)
