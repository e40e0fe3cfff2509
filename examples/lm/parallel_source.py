"""A trained standard model, out of a checkpoint of either job: its recipe, and its whole weights on every rank."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from examples.lm import checkpoint
from examples.lm.errors import JobError
from examples.lm.parallel_checkpoint import ABOUT, about, is_whole, newest_sharded, quiet_alone
from examples.lm.parallel_model import STACK, ParallelModelConfig, whole_model
from examples.lm.parallel_trainer import DTYPES
from examples.lm.trainer import Recipe


@dataclass(frozen=True)
class Source:
    """What a checkpoint says.

    Attributes:
        path: of the checkpoint.
        step: steps done.
        recipe: of its training.
        weights: named as in ``model.py``.
    """

    path: Path
    step: int
    recipe: Recipe
    weights: dict[str, Tensor]

    @property
    def config(self) -> ParallelModelConfig:
        """The shape of the model."""
        assert isinstance(self.recipe.model, ParallelModelConfig)
        return self.recipe.model


def read_source(path: Path) -> Source:
    """Read the checkpoint at ``path``, or the newest whole one of the run in that folder.

    Raises:
        JobError: there is none, or it is not of a standard Mixture-of-Experts model.
    """
    wanted = "a checkpoint of train_moe_lm or train_parallel, or the folder of such a run"
    if not path.exists():
        raise JobError("--from", f"{path}, which does not exist", wanted)
    if path.is_dir() and not (path / ABOUT).exists():
        damaged: list[str] = []
        newest = newest_sharded(path, warn=damaged.append) or checkpoint.newest_checkpoint(path, warn=damaged.append)
        if newest is None:
            raise JobError("--from", f"{path}, without a whole checkpoint", wanted)
        path = newest
    if path.is_dir():
        return _read_sharded(path)
    if not checkpoint.is_whole(path):
        raise JobError("--from", f"{path}, no checkpoint or a damaged one", wanted)
    found = torch.load(path, map_location="cpu", weights_only=True)
    return Source(path, found["step"], _recipe_of(path, found["config"]), found["model"])


def _read_sharded(path: Path) -> Source:
    if not is_whole(path):
        raise JobError("--from", f"{path}, of which files are missing or cut short", "a whole checkpoint")
    found = about(path)
    recipe = _recipe_of(path, found["config"])
    assert isinstance(recipe.model, ParallelModelConfig)
    weights = whole_model(recipe.model, DTYPES[recipe.dtype]).state_dict()
    on_disk = {STACK + name if name.startswith("blocks.") else name: weight for name, weight in weights.items()}
    with quiet_alone():
        dcp.load({"model": on_disk}, checkpoint_id=path, no_dist=True)  # every rank reads all of it
    return Source(path, found["step"], recipe, weights)


def _recipe_of(path: Path, config: dict[str, Any]) -> Recipe:
    names = config.get("wiring", ["standard"])
    if set(names) != {"standard"}:
        raise JobError("--from", f"{path}, wired as {', '.join(dict.fromkeys(names))}", "a model wired as standard")
    if config["mlp"] != "moe":
        raise JobError("--from", f"{path}, a {config['mlp']} model", "a Mixture-of-Experts model")
    if config.get("routing", "topk") != "topk":
        raise JobError("--from", f"{path}, routed by {config['routing']}", "a model with top-K routing")
    model = {field.name: config[field.name] for field in fields(ParallelModelConfig) if field.name in config}
    of_run = {field.name: config[field.name] for field in fields(Recipe) if field.name != "model"}
    return Recipe(model=ParallelModelConfig(**model), **of_run)
