"""Distributed checkpoints that exist whole or not at all, and that any number of ranks can read.

Users find this in :mod:`sonic.layers.fsdp`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.parallel.checkpoint import contiguous_state_dict, load_contiguous
from sonic.shapes import argument_error

__all__ = ["is_whole", "load", "save"]

_ABOUT = "sonic.json"
_FORMAT = 1
# How the optimizer computes, not where it stands: the one that loads has its own.
_OWN_OPTIONS = ("fused", "foreach", "capturable", "differentiable")


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint that exists whole or not at all. All ranks call it together.

    ``torch.distributed.checkpoint`` writes into ``path`` with ``.tmp`` at its end, each rank its parts; when all have
    finished, the folder gets its name. What an earlier, killed call has left there is removed.

    Args:
        path: of a folder that does not exist, on a disk that all ranks see.
        model: sharded or not; any parallelism that lies in DTensors.
        optimizer: one, or several; its state is kept by names of parameters, whatever groups they are in.
        extra: plain values (that JSON can hold) to keep, such as the number of steps done; those of rank 0 are kept.

    Returns:
        ``path``.

    Raises:
        ValueError: there is something at ``path`` already, or ``extra`` is not plain.
    """
    import torch.distributed.checkpoint as dcp

    where, path = "sonic.fsdp.save", Path(path)
    if path.exists():
        wanted = "a path where nothing is yet: a checkpoint is never written over"
        raise argument_error(where, "path", f"{path}, which exists", wanted)
    try:
        plain = json.loads(json.dumps(dict(extra or {})))
    except TypeError as error:
        raise argument_error(where, "extra", f"not plain ({error})", "values that JSON can hold") from error
    state = contiguous_state_dict(_state(model, optimizer))
    temporary = path.with_name(path.name + ".tmp")
    _barrier()
    if _is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    with _quiet_alone():
        dcp.save(state, checkpoint_id=temporary)
    if _is_main():
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        about = {"format": _FORMAT, "extra": plain, "files": files, "entries": _entries(state)}
        with open(temporary / _ABOUT, "w", encoding="utf-8") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    _barrier()
    return path


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a checkpoint of :func:`save` with all its files, as long as they were."""
    about = Path(path) / _ABOUT
    if not about.is_file():
        return False
    files = json.loads(about.read_text(encoding="utf-8"))["files"]
    found = {name: Path(path) / name for name in files}
    return all(file.is_file() and file.stat().st_size == files[name] for name, file in found.items())


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into a model, and an optimizer, on any number of ranks. All ranks call it together.

    Args:
        path: what :func:`save` was given.
        model: with the parameters and buffers of the one that was saved, on whatever ranks; not on the meta device.
        optimizer: of the same kind; None leaves the checkpoint's alone. Its options come from the checkpoint, but for
            those that say how it computes (``fused``, ``foreach``, …).

    Returns:
        ``extra``.

    Raises:
        ValueError: no whole checkpoint there; names that it lacks or that the model lacks; shapes that differ.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    where, path = "sonic.fsdp.load", Path(path)
    if not is_whole(path):
        was = f"{path}, of which files are missing or cut short" if path.exists() else f"{path}, which does not exist"
        raise argument_error(where, "path", was, "a whole checkpoint of sonic.fsdp.save")
    on_meta = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if on_meta is not None:
        raise argument_error(where, on_meta, "on the meta device", "memory: call sonic.fsdp.initialize before")
    about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    state = _state(model, optimizer)
    on_disk = contiguous_state_dict(state)
    _check_entries(where, path, about["entries"], on_disk)
    with _quiet_alone():
        dcp.load(on_disk, checkpoint_id=path)
    load_contiguous(state, on_disk)
    for part in state:
        state[part] |= {key: value for key, value in on_disk[part].items() if not isinstance(value, Tensor)}
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        everything = {**_flat_optimizer_state(model, optimizer), **state["optimizer"]}
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(model, _listed(optimizer), everything, options=options)
    extra: dict[str, Any] = about["extra"]
    return extra


def _listed(optimizer: Any) -> Any:
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)


def _flat_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """``state.<parameter>.<entry>`` and ``param_groups.<parameter>.<option>``: without groups, which differ by mesh."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(model, _listed(optimizer), options=options))


def _state(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = {"model": dict(get_model_state_dict(model))}
    if optimizer is not None:
        flat = _flat_optimizer_state(model, optimizer)
        state["optimizer"] = {
            key: value
            for key, value in flat.items()
            if not (key.startswith("param_groups.") and key.rpartition(".")[2] in _OWN_OPTIONS)
        }
    return state


def _entries(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[int] | None]]:
    """The names in each part, with shapes of tensors."""
    return {
        part: {key: list(value.shape) if isinstance(value, Tensor) else None for key, value in values.items()}
        for part, values in state.items()
    }


def _check_entries(where: str, path: Path, written: Mapping[str, Any], state: Mapping[str, dict[str, Any]]) -> None:
    """Refuse names that are on one side only; of the optimizer's options take those that are on both."""
    for part, values in state.items():
        if part not in written:
            raise argument_error(where, part, "given", f"None, since {path} was saved without an optimizer")
        have = written[part]
        for key in [key for key in values if key.startswith("param_groups.") and part == "optimizer"]:
            if key not in have:
                del values[key]
        wanted = {key for key in have if not (part == "optimizer" and key.startswith("param_groups."))}
        given = {key for key in values if not (part == "optimizer" and key.startswith("param_groups."))}
        if given - wanted:
            was = f"without {_some(given - wanted)}"
            raise argument_error(where, f"{path} ({part})", was, f"every entry of the {part} that it is loaded into")
        if wanted - given:
            was = f"without {_some(wanted - given)}"
            raise argument_error(where, f"{part} to load into", was, f"all that {path} holds")
        for key in sorted(given):
            shape = list(values[key].shape) if isinstance(values[key], Tensor) else None
            if shape != have[key]:
                raise argument_error(where, f"{part} {key}", _shape(shape), f"{_shape(have[key])} as in {path}")


def _some(names: set[str], most: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _shape(shape: list[int] | None) -> str:
    return "no tensor" if shape is None else str(tuple(shape))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_main() -> bool:
    return not _is_distributed() or dist.get_rank() == 0


def _barrier() -> None:
    if _is_distributed():
        dist.barrier()


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Inside: torch does not warn that one process saves or loads alone, where there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield


def _sync_folder(folder: Path) -> None:
    """Force names to disk; only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
