"""Folders of model weights: one file or several with an index, read as one; written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sonic.convert.stored import FileTensor, HeldTensor, Writable, read_header, read_torch_file, write_file
from sonic.shapes import argument_error

__all__ = ["Checkpoint", "open_checkpoint", "shards_of", "write_folder"]

_WHERE = "sonic.convert"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order where a folder has both
_CONFIG = "config.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# What is not carried over beside the weights that were converted: weights in another form, and their indices.
_WEIGHT_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model, and what stands beside them.

    Attributes:
        tensors: by key.
        metadata: of the safetensors headers.
        index_metadata: of the index file.
        config: ``config.json``, if there is one.
        others: files to carry over as they are.
    """

    tensors: Mapping[str, FileTensor | HeldTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    others: tuple[Path, ...] = ()


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Look at a checkpoint without reading its tensors.

    Args:
        source: a file of weights, or a folder as Hugging Face's: ``model.safetensors`` or ``pytorch_model.bin``, or
            the same with ``.index.json`` and its shards, beside ``config.json`` and others.

    Raises:
        ValueError: nothing there, more than one set of weights, keys twice, missing or not in the index, files that
            are not whole or hold more than tensors.
    """
    path = Path(source)
    if path.is_file():
        tensors, metadata = _file(path)
        return Checkpoint(tensors, metadata)
    if not path.is_dir():
        raise argument_error(_WHERE, "source", path, "a file or a folder of weights")
    tensors, metadata, index_metadata = _weights(path)
    config = _json_file(path / _CONFIG) if (path / _CONFIG).exists() else None
    others = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.name != _CONFIG and not file.name.endswith(_WEIGHT_SUFFIXES)
    )
    return Checkpoint(tensors, metadata, index_metadata, config, tuple(others))


def _weights(folder: Path) -> tuple[dict[str, FileTensor | HeldTensor], dict[str, str], dict[str, Any]]:
    for name in _WEIGHTS:
        single, index = folder / name, folder / f"{name}.index.json"
        if single.exists() and index.exists():
            raise argument_error(
                _WHERE, str(folder), f"a folder with both {single.name} and {index.name}", "one of the two"
            )
        if index.exists():
            return _shards(folder, index)
        if single.exists():
            return (*_file(single), {})
    alone = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", *_TORCH_SUFFIXES)]
    if len(alone) != 1:
        was = "without weights" if not alone else f"with {', '.join(path.name for path in alone)} and no index"
        wanted = f"{' or '.join(_WEIGHTS)}, or their .index.json, or a single file of weights"
        raise argument_error(_WHERE, str(folder), was, wanted)
    return (*_file(alone[0]), {})


def _file(path: Path) -> tuple[dict[str, FileTensor | HeldTensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        tensors, metadata = read_header(path)
        return dict(tensors), metadata
    if path.suffix in _TORCH_SUFFIXES:
        return dict(read_torch_file(path)), {}
    raise argument_error(_WHERE, "source", path, f"a file named .safetensors, {', '.join(_TORCH_SUFFIXES)}")


def _shards(folder: Path, index: Path) -> tuple[dict[str, FileTensor | HeldTensor], dict[str, str], dict[str, Any]]:
    content = _json_file(index)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise argument_error(
            _WHERE, str(index), "a JSON object without a weight_map", "an index with one from keys to files"
        )
    tensors: dict[str, FileTensor | HeldTensor] = {}
    metadata: dict[str, str] = {}
    for name in dict.fromkeys(files.values()):
        if Path(name).name != name:
            raise argument_error(_WHERE, f"a file in {index}", repr(name), "a name in the same folder")
        if not (folder / name).is_file():
            raise argument_error(_WHERE, f"{name}, which {index.name} names", "missing", f"a file in {folder}")
        found, more = _file(folder / name)
        for key in found:
            if key in tensors:
                raise argument_error(_WHERE, f"{key} in {name}", "in another shard too", "every key once")
            if files.get(key) != name:
                was = f"placed in {files[key]}" if key in files else "not listed"
                raise argument_error(_WHERE, f"{key} in {name}", f"{was} by {index.name}", f"it to name {name}")
        for key, value in more.items():
            if metadata.setdefault(key, value) != value:
                was = f"{value!r} in {name} and {metadata[key]!r} in another shard"
                raise argument_error(_WHERE, f"metadata {key!r}", was, "one value in all shards")
        tensors.update(found)
    missing = [key for key in files if key not in tensors]
    if missing:
        raise argument_error(_WHERE, f"{missing[0]} in {files[missing[0]]}", "missing", f"there, as {index.name} says")
    index_metadata = content.get("metadata")
    return tensors, metadata, dict(index_metadata) if isinstance(index_metadata, dict) else {}


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise argument_error(_WHERE, str(path), f"no JSON ({error})", "a JSON object") from error
    if not isinstance(content, dict):
        raise argument_error(_WHERE, str(path), f"a JSON {type(content).__name__}", "a JSON object")
    return content


def shards_of(tensors: Sequence[Writable], max_shard_bytes: int) -> dict[str, list[Writable]]:
    """File name -> its tensors, in order; a tensor larger than ``max_shard_bytes`` gets a file of its own."""
    groups: list[list[Writable]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}


def write_folder(
    target: Path,
    tensors: Sequence[Writable],
    *,
    metadata: Mapping[str, str],
    index_metadata: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    others: Sequence[Path],
    max_shard_bytes: int,
    report: Callable[[str], None] | None = None,
) -> None:
    """Write a checkpoint as a new folder: it appears when all of it is on the disk, or never.

    Args:
        target: the folder; it must not exist, or be empty.
        tensors: in the order in which they fill the shards.
        metadata: of every safetensors header.
        index_metadata: of the index, if there is more than one shard; ``total_size`` is counted.
        config: what ``config.json`` becomes.
        others: files that are copied.
        max_shard_bytes: of tensors, per file.
        report: is told a line after every file of tensors.

    Raises:
        ValueError: the target is there, or its parent is not.
    """
    shards = shards_of(tensors, max_shard_bytes)
    with _new_folder(target) as folder:
        for number, (name, group) in enumerate(shards.items(), 1):
            write_file(folder / name, group, metadata)
            if report is not None:
                size = sum(tensor.nbytes for tensor in group)
                report(f"{name} ({number} of {len(shards)}): {len(group)} tensors, {size / 1e9:.3f} GB")
        if len(shards) > 1:
            index = {
                "metadata": {**index_metadata, "total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {tensor.key: name for name, group in shards.items() for tensor in group},
            }
            _write_json(folder / "model.safetensors.index.json", index)
        if config is not None:
            _write_json(folder / _CONFIG, config)
        for file in others:
            shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:  # indented as transformers does
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` that takes its name at the end, and is gone if there was no good end.

    It is locked as long as this process lives. What a killed process left behind is therefore not locked, and the next
    conversion to the same target takes it away.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise argument_error(_WHERE, "target", f"{target}, which is there already", "a new folder, or an empty one")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise argument_error(_WHERE, "target", target, f"a new folder in one that exists; {parent} does not")
    stem = f".{target.name}.partial-"
    for left in [path for path in parent.iterdir() if path.name.startswith(stem) and path.is_dir()]:
        with contextlib.suppress(FileNotFoundError), _locked(left) as is_ours:  # its own run may end just now
            if is_ours:
                shutil.rmtree(left)
    folder = parent / f"{stem}{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        with _locked(folder):
            yield folder
            os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, if nobody else does; always False where the system has no such locks."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # not on Windows; leftovers stay there
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.fsync(handle)
        yield True
        os.fsync(handle)
    finally:
        os.close(handle)
