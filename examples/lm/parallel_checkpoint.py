"""Checkpoints that all ranks write together, that exist whole or not at all, and that any other mesh can read.

``torch.distributed.checkpoint`` writes one file per rank and an index, and puts tensors together anew for whoever
reads. All of it goes into a folder with a temporary name, which gets its own name when the last rank has finished; so
whoever is killed at any moment leaves the earlier checkpoints as they were. ``run.json`` says what run it is of, and
how long each file is: a folder that a bad copy has cut short is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from examples.lm.checkpoint import superseded, write_whole
from examples.lm.errors import JobError
from examples.lm.world import World
from sonic.parallel import contiguous_state_dict, load_contiguous

ABOUT = "run.json"


def save_sharded(
    folder: Path,
    step: int,
    config: Mapping[str, Any],
    plain: Mapping[str, Any],
    model: nn.Module,
    optimizer: Any,
    world: World,
) -> Path:
    """Write a checkpoint atomically, then remove what it supersedes, see :func:`examples.lm.checkpoint.superseded`.

    All ranks call it together.

    Args:
        folder: of this run; exists, and all ranks see it.
        step: steps done.
        config: plain values; :func:`load_sharded` will want the same.
        plain: other plain values to keep.
        model, optimizer: to be saved.
        world: the ranks.

    Returns:
        The checkpoint's path, a folder.
    """
    path = folder / f"step_{step:08d}"
    temporary = path.with_suffix(".tmp")
    if world.is_main:
        for left_over in folder.glob("step_*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
    world.barrier()
    with quiet_alone():
        dcp.save(contiguous_state_dict(_state(model, optimizer)), checkpoint_id=temporary, no_dist=world.size == 1)
    if world.is_main:
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        about = {"step": step, "config": dict(config), "plain": dict(plain), "files": files}
        write_whole(temporary / ABOUT, json.dumps(about, indent=2) + "\n")
        if path.exists():  # of the same step, and not removed before there is another one
            os.replace(path, path.with_suffix(".old.tmp"))
        os.replace(temporary, path)
        _sync_folder(folder)
        for old in superseded(path, (one for one in folder.glob("step_*") if one.is_dir() and one.suffix == "")):
            shutil.rmtree(old)
    world.barrier()
    return path


def newest_sharded(folder: Path, *, warn: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        if not path.is_dir() or path.suffix:
            continue
        if is_whole(path):
            return path
        warn(f"{path} is damaged: falling back on the checkpoint before it")
    return None


def is_whole(path: Path) -> bool:
    """Whether all files are there, and as long as they were."""
    if not (path / ABOUT).is_file():
        return False
    try:
        files = about(path)["files"]
        return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in files.items())
    except (ValueError, KeyError, TypeError, AttributeError):  # no text, no JSON, or not of this form
        return False


def about(path: Path) -> dict[str, Any]:
    """``step``, ``config``, ``plain`` and ``files`` of a checkpoint."""
    found: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    return found


def load_sharded(
    path: Path, config: Mapping[str, Any], model: nn.Module, optimizer: Any, world: World
) -> dict[str, Any]:
    """Read a checkpoint that a run with this very config has written, on whatever mesh. All ranks call it together.

    Returns:
        What :func:`about` does.

    Raises:
        JobError: a field of the config that differs: its value in the checkpoint, and the value wanted.
    """
    found = about(path)
    written, wanted = found["config"], json.loads(json.dumps(dict(config)))
    for field in sorted(wanted.keys() | written.keys()):
        if written.get(field) != wanted.get(field):
            raise JobError(f"{field} in {path}", written.get(field), f"{wanted.get(field)} as in this run")
    state = _state(model, optimizer)
    on_disk = contiguous_state_dict(state)
    with quiet_alone():
        dcp.load(on_disk, checkpoint_id=path, no_dist=world.size == 1)
    load_contiguous(state, on_disk)
    _, optimizer_state = get_state_dict(model, optimizer)
    optimizer_state["state"] = state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=optimizer_state)
    return found


@contextmanager
def quiet_alone() -> Iterator[None]:
    """Inside: torch does not warn that a checkpoint is written or read by one process, where that is what we want."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What is saved. Not the optimizer's groups, which depend on the mesh and follow from the recipe."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state["state"]}


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk; only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
