"""Checkpoints that exist whole or not at all, and the metrics log that goes with them.

A checkpoint is written under a temporary name in the same folder, forced to disk, and renamed. A rename within a folder
is atomic: a process that is killed at any moment leaves the earlier checkpoints as they were. The file is what
``torch.save`` writes, with a digest of it all at its end, which ``torch.load`` does not mind; it is verified before the
file is trusted: one that a full disk or a bad copy has damaged is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from examples.lm.errors import JobError

KEEP = 2  # checkpoints per run: the newest, and the one to fall back on

_MARK = b"sha256:"  # then the digest of all that is before this mark: the end of a checkpoint
_END_BYTES = len(_MARK) + hashlib.sha256().digest_size
_CHUNK_BYTES = 1 << 20
# What zipfile raises of an archive with a damaged index; it has no one name for that.
_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)


def save_checkpoint(folder: Path, step: int, config: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, then remove all but the newest ``KEEP`` up to this step.

    Those of later steps are removed as well: a run that has come to this step has passed over them, as damaged.

    Args:
        folder: of this run; exists.
        step: steps done.
        config: plain values; :func:`load_checkpoint` will want the same.
        state: tensors and plain values in dicts and lists, which is what ``torch.load(weights_only=True)`` reads.

    Returns:
        The checkpoint's path. Steps are zero-padded in it, so that names sort as steps do.
    """
    path = folder / f"step_{step:08d}.pt"
    with written_whole(path) as file:
        torch.save({"step": step, "config": dict(config), **state}, file)
        size = file.tell()
        file.seek(0)
        digest = _digest(file, size)
        file.seek(size)
        file.write(_MARK + digest)
    for other in superseded(path, folder.glob("step_*.pt")):
        other.unlink()
    return path


def superseded(newest: Path, paths: Iterable[Path]) -> list[Path]:
    """Of a run's checkpoints, those to remove now that ``newest`` is written."""
    paths = sorted(paths)
    up_to_now = [path for path in paths if path <= newest]
    return up_to_now[:-KEEP] + paths[len(up_to_now) :]


def newest_checkpoint(folder: Path, *, warn: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        if is_whole(path):
            return path
        warn(f"{path} is damaged: falling back on the checkpoint before it")
    return None


def is_whole(path: Path) -> bool:
    """Whether the digest at the end is that of the rest.

    Of a file without one, from before there was one: whether it ends with an archive's index (a truncated file does
    not), and every tensor's checksum is right.
    """
    with open(path, "rb") as file:
        size = max(file.seek(0, os.SEEK_END) - _END_BYTES, 0)
        file.seek(size)
        end = file.read()
        file.seek(0)
        if end.startswith(_MARK):
            return end == _MARK + _digest(file, size)
    if not end[-22:].startswith(b"PK\x05\x06"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except _NO_ARCHIVE:
        return False


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next ``size`` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def load_checkpoint(path: Path, config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint that a run with this very config has written.

    Returns:
        ``step``, ``config``, and what was given to :func:`save_checkpoint` as ``state``.

    Raises:
        JobError: a field of the config that differs: its value in the checkpoint, and the value wanted.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    written = checkpoint["config"]
    for field in sorted(config.keys() | written.keys()):
        if written.get(field) != config.get(field):
            raise JobError(f"{field} in {path}", written.get(field), f"{config.get(field)} as in this run")
    return checkpoint


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: whoever looks finds the old one or the new one, and never a part of it."""
    with written_whole(path) as file:
        file.write(text.encode())


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name, which is forced to disk and gets its own name at the end."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk; only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cut_metrics(path: Path, step: int) -> None:
    """Keep the lines of a metrics log up to a step; no file becomes an empty one.

    The run that was stopped wrote the others after its last checkpoint, and the resumed run will write them again.
    """
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def append_metrics(path: Path, row: Mapping[str, Any], *, durable: bool = False) -> None:
    """Add a line to a metrics log: one JSON object per step. ``durable`` forces the file to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; none if there is no file. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # after the last line end comes nothing, or half a line
    return [json.loads(line) for line in lines]
