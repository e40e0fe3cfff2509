"""Checkpoints that exist whole or not at all, and the metrics log that goes with them.

A checkpoint is written under a temporary name in the same folder, forced to disk, and renamed. A rename within a folder
is atomic: a process that is killed at any moment leaves the earlier checkpoints as they were. The file is a zip archive
with a checksum for each tensor, and is verified before it is trusted: one that a full disk or a bad copy has damaged is
passed over for the one before it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from examples.lm.errors import JobError

KEEP = 2  # checkpoints per run: the newest, and the one to fall back on


def save_checkpoint(folder: Path, step: int, config: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, then remove all but the newest ``KEEP``.

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
    for old in sorted(folder.glob("step_*.pt"))[:-KEEP]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path, *, warn: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        if is_whole(path):
            return path
        warn(f"{path} is damaged: falling back on the checkpoint before it")
    return None


def is_whole(path: Path) -> bool:
    """Whether the archive's index is there (it comes last: a truncated file lacks it) and every checksum is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


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
    with open(temporary, "wb") as file:
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
