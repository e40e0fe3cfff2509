"""Tensors in files: looked at without reading them, read one expert at a time, written in one pass.

The safetensors format is 8 bytes with the length of a JSON header, the header (dtype, shape and byte range of every
tensor), and the bytes. Reading it here needs no package, and writing it here needs no more than one piece of a tensor
in memory, where the package's writer wants all tensors of a file at once.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sonic.shapes import argument_error

__all__ = ["DTYPES", "FileTensor", "HeldTensor", "Stored", "Writable", "read_header", "read_torch_file", "write_file"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of dtypes in a safetensors header."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 22  # bytes of a tensor that is handed on as it is, in memory at once
_MAX_HEADER = 100_000_000  # bytes; what the safetensors package allows
# What torch raises of a pickle with damaged opcodes; it has no one name for that.
_NOT_LOADED = (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError)
_WHERE = "sonic.convert"


class Stored(Protocol):
    """A tensor that can be looked at without having it in memory."""

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def dtype_name(self) -> str:
        """As a safetensors header has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def read(self, index: int | None = None) -> Tensor:
        """The tensor, or its slice at ``index`` of the first dimension."""

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, a few megabytes at a time."""


class Writable(Protocol):
    """A tensor to be written; as :class:`Stored`, without reading parts of it."""

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def dtype_name(self) -> str:
        """As a safetensors header has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, piece by piece."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file, at ``offset`` bytes from the beginning of the file."""

    key: str
    dtype_name: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def read(self, index: int | None = None) -> Tensor:
        """The tensor, or its slice at ``index`` of the first dimension.

        Raises:
            ValueError: the file became shorter meanwhile.
        """
        shape, offset, nbytes = self.shape, self.offset, self.nbytes
        if index is not None:
            nbytes //= shape[0]
            shape, offset = shape[1:], offset + index * nbytes
        if nbytes == 0:
            return torch.empty(shape, dtype=DTYPES[self.dtype_name])
        buffer = np.empty(nbytes, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            _fill(self.path, file, buffer.data)
        return torch.from_numpy(buffer).view(DTYPES[self.dtype_name]).view(shape)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, a few megabytes at a time.

        Raises:
            ValueError: the file became shorter meanwhile.
        """
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, _CHUNK):
                buffer = memoryview(bytearray(min(_CHUNK, self.nbytes - start)))
                _fill(self.path, file, buffer)
                yield buffer


def _fill(path: Path, file: Any, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise argument_error(_WHERE, str(path), "shorter than its header says", "a whole file")
        filled += count


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of this process; one from a torch file is mapped, so it fills no memory before it is looked at."""

    key: str
    tensor: Tensor

    @property
    def dtype_name(self) -> str:
        """As a safetensors header has it."""
        return _NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.tensor.numel() * self.tensor.element_size()

    def read(self, index: int | None = None) -> Tensor:
        """The tensor, or its slice at ``index`` of the first dimension; not a copy."""
        return self.tensor if index is None else self.tensor[index]

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes; slice by slice of the first dimension where they do not lie in order."""
        if self.tensor.is_contiguous() or self.tensor.ndim == 0:
            whole = bytes_of(self.tensor)
            for start in range(0, len(whole), _CHUNK):
                yield whole[start : start + _CHUNK]
        else:
            for part in self.tensor:
                yield bytes_of(part)

    @classmethod
    def checked(cls, key: str, value: object) -> HeldTensor:
        """Wrap a value of a state dict.

        Raises:
            ValueError: it is no dense tensor with bytes on the CPU, or of a dtype that safetensors has no name for.
        """
        if not isinstance(value, Tensor):
            raise argument_error(_WHERE, key, f"a {type(value).__name__}", "a tensor")
        is_plain = value.layout == torch.strided and not value.is_quantized and not hasattr(value, "placements")
        if not is_plain or value.device.type != "cpu":
            was = f"{value.layout} on {value.device}" if is_plain else f"a {type(value).__name__} that is not plain"
            raise argument_error(_WHERE, key, was, "a dense, unsharded tensor on the CPU")
        if value.dtype not in _NAMES:
            raise argument_error(_WHERE, key, value.dtype, f"one of {', '.join(DTYPES)}")
        return cls(key, value.detach())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; of a copy if it does not lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """Keys and metadata of a safetensors file; its tensors stay where they are.

    Raises:
        ValueError: the file is not whole, or not of that format: every byte of it belongs to one tensor of one name.
    """
    size = path.stat().st_size

    def fault(was: str) -> ValueError:
        return argument_error(_WHERE, str(path), was, "a whole safetensors file")

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise fault(f"{size} bytes with a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(
            text, object_pairs_hook=lambda pairs: _without_duplicates(path, pairs), parse_int=_short_int
        )
    except RecursionError as error:
        raise fault("a file whose header is lists in lists, too deep to be read") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise fault(f"a file whose header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise fault(f"a file whose header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault("a file whose __metadata__ holds more than text")
    tensors = {}
    for key, entry in header.items():
        fields = entry if isinstance(entry, dict) else {}
        name, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
        if not isinstance(name, str) or shape is None or offsets is None or len(offsets) != 2:
            raise fault(f"a file whose header says {entry!r} of {key}")
        begin, end = offsets
        if math.prod(size for size in shape if size) >= 2**63:  # as many as strides can count
            raise fault(f"a file whose header gives {key} the shape {tuple(shape)}")
        if name in DTYPES and math.prod(shape) * DTYPES[name].itemsize != end - begin:
            raise fault(f"a file whose header gives {key}, {tuple(shape)} {name}, {end - begin} bytes")
        tensors[key] = FileTensor(key, name, tuple(shape), path, 8 + length + begin, end - begin)
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            raise fault(f"a file with a hole or an overlap before {tensor.key}")
        position += tensor.nbytes
    if position != size:
        raise fault(f"{size} bytes, {position} by its header")
    return tensors, metadata


def _short_int(digits: str) -> int:
    """What Python refuses to read as a number, at some thousands of digits, is none here either: -1."""
    return int(digits) if len(digits) < 40 else -1


def _sizes(value: object) -> list[int] | None:
    """The same if it is a list of numbers of at least 0, else None."""
    return value if isinstance(value, list) and all(type(size) is int and size >= 0 for size in value) else None


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise argument_error(_WHERE, f"{name} in {path}", "there twice", "every key once")
        names.add(name)
    return dict(pairs)


def read_torch_file(path: Path) -> dict[str, HeldTensor]:
    """Tensors of a file that ``torch.save`` wrote from a state dict: mapped, and no code in it runs.

    Raises:
        ValueError: it holds anything but tensors by name, or is in the format of before torch 1.6.
    """
    wanted = "a state dict that torch.save wrote: tensors by name, nothing else, in the zip format"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _NOT_LOADED as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise argument_error(_WHERE, str(path), f"not loaded ({reason})", wanted) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise argument_error(_WHERE, str(path), f"a {type(content).__name__}", wanted)
    return {key: HeldTensor.checked(key, value) for key, value in content.items()}


def write_file(path: Path, tensors: Iterable[Writable], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, piece by piece, and see it onto the disk.

    Args:
        path: a new file.
        tensors: in any order; wider dtypes go first, so that every tensor is aligned.
        metadata: of the header.

    Raises:
        RuntimeError: a tensor gave more or fewer bytes than it has.
    """
    ordered = sorted(tensors, key=lambda tensor: -_alignment(tensor))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in ordered:
        offsets = [position, position + tensor.nbytes]
        header[tensor.key] = {"dtype": tensor.dtype_name, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            begin = file.tell()
            for chunk in tensor.chunks():
                file.write(chunk)
            if file.tell() - begin != tensor.nbytes:
                was = f"{file.tell() - begin} bytes"
                raise RuntimeError(f"{_WHERE}: {tensor.key} gave {was} while it was written, expected {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())


def _alignment(tensor: Writable) -> int:
    return DTYPES[tensor.dtype_name].itemsize if tensor.dtype_name in DTYPES else 1
