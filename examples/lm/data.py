"""The text to learn from: finding it, splitting it by file, and cutting windows out of it.

Nothing here has a state. The side of a file is a function of its path, and the windows of a step are a function of
(seed, step): a resumed run reads what the unbroken one would have read, and so do processes that share a batch.
"""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.lm.errors import JobError

HELDOUT_SHARE = 0.1
FILE_START = b"\0"  # text never holds byte 0, so it can say "a file starts here"

# Of the standard library we leave out tests, an application, and what was installed beside it.
_STDLIB_SKIPS = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """Text in memory, each file preceded by byte 0.

    Attributes:
        train, heldout: (bytes,) uint8.
        train_files, heldout_files: relative paths, sorted.
        fingerprint: digest of all names and contents; two corpora with the same one are the same.
    """

    train: Tensor
    heldout: Tensor
    train_files: tuple[str, ...]
    heldout_files: tuple[str, ...]
    fingerprint: str


def load_corpus(paths: list[Path], *, seq_len: int) -> Corpus:
    """Read text and split it by file. Of files with the same content one is kept: no copy may sit on the other side.

    Args:
        paths: files, and folders, of which every text file counts that is not hidden; none: the sources of Python's
            own standard library.
        seq_len: bytes per window; each side must hold one window and the byte after it.

    Raises:
        JobError: a path that is missing, unreadable or binary; too few files or too little text.
    """
    origin = ", ".join(map(str, paths)) if paths else "the standard library"
    name_of: dict[bytes, str] = {}
    for name, content in sorted((_read_paths(paths) if paths else _read_stdlib()).items()):
        if content:
            name_of.setdefault(content, name)
    if len(name_of) < 2:
        was = f"{origin}, with {len(name_of)} non-empty text files that differ"
        raise JobError("--text", was, "2 such files at least: whole files are held out to test on")
    content_of = {name: content for content, name in name_of.items()}

    heldout_files = tuple(sorted(heldout_of(content_of)))
    train_files = tuple(sorted(content_of.keys() - set(heldout_files)))
    sides = []
    for side, names in (("training", train_files), ("held-out", heldout_files)):
        text = b"".join(FILE_START + content_of[name] for name in names)
        if len(text) <= seq_len:
            was = f"{origin}, with {len(text)} bytes in the {side} part (files: {len(names)})"
            raise JobError("--text", was, f"{seq_len + 1} bytes at least, for windows of --seq-len {seq_len}")
        sides.append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    digest = hashlib.sha256()
    for name in sorted(content_of):
        digest.update(f"{name}\0{len(content_of[name])}\0".encode(errors="surrogateescape") + content_of[name])
    return Corpus(sides[0], sides[1], train_files, heldout_files, digest.hexdigest()[:16])


def heldout_of(names: Iterable[str]) -> set[str]:
    """The files to hold out: those whose path hashes below ``HELDOUT_SHARE``.

    So a file keeps its side when others come and go. Only where that leaves a side empty, among a handful of files,
    does the one with the lowest (or the highest) hash change sides.
    """
    rank = {}
    for name in names:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        rank[name] = int.from_bytes(digest[:8], "big") / 2**64
    heldout = {name for name in rank if rank[name] < HELDOUT_SHARE}
    if not heldout:
        heldout = {min(rank, key=rank.__getitem__)}
    if len(heldout) == len(rank):
        heldout.remove(max(rank, key=rank.__getitem__))
    return heldout


def training_batch(
    text: Tensor, *, seed: int, step: int, batch_size: int, seq_len: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """This process's windows of a training step; those of all processes together are the same for any world size.

    Returns:
        (batch_size / world_size, seq_len + 1) int64: the inputs, and shifted by one the targets.
    """
    stream = random.Random(f"{seed}/{step}")
    starts = [stream.randrange(len(text) - seq_len) for _ in range(batch_size)]
    share = batch_size // world_size
    return _windows(text, starts[rank * share : (rank + 1) * share], seq_len)


def heldout_windows(text: Tensor, *, count: int, seq_len: int) -> Tensor:
    """``count`` windows at even distances over the text, the same ones every time: (count, seq_len + 1) int64."""
    last = len(text) - seq_len - 1
    return _windows(text, [index * last // max(count - 1, 1) for index in range(count)], seq_len)


def _windows(text: Tensor, starts: list[int], seq_len: int) -> Tensor:
    return torch.stack([text[start : start + seq_len + 1] for start in starts]).long()


def _read_stdlib() -> dict[str, bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return {name.as_posix(): _read(root / name) for name in names if not _STDLIB_SKIPS & set(name.parts)}


def _read_paths(paths: list[Path]) -> dict[str, bytes]:
    """Name -> content: of the files named, and of the text files below the folders named; each file counts once."""
    name_of: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            for file in _walk(path):
                name_of.setdefault(file.resolve(), file.relative_to(path).as_posix())
        elif path.is_file():
            if b"\0" in _read(path):
                raise JobError("--text", f"{path}, which holds byte 0", "a text file")
            name_of.setdefault(path.resolve(), path.name)
        else:
            raise JobError("--text", f"{path}, which does not exist", "a file or a folder")
    content_of: dict[str, bytes] = {}
    for file, name in name_of.items():
        content = _read(file)
        if b"\0" not in content:
            # Files of one name in two folders: the full path tells the second from the first.
            content_of[name if name not in content_of else file.as_posix()] = content
    return content_of


def _walk(folder: Path) -> list[Path]:
    """The files below a folder in a fixed order, but for hidden ones; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise JobError("--text", f"{error.filename} ({error.strerror})", "a readable folder") from error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        files += [path for path in paths if path.is_file()]
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JobError("--text", f"{path} ({error.strerror})", "a readable file") from error
