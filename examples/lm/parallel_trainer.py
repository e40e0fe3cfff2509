"""One model in training on a mesh: the step of ``trainer.py``, with gradients averaged where ranks differ in text."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.lm.data import Corpus, training_batch
from examples.lm.parallel_checkpoint import load_sharded, save_sharded
from examples.lm.parallel_model import ParallelLanguageModel, whole_model
from examples.lm.parallel_world import ParallelWorld, average_gradients
from examples.lm.trainer import Recipe, learning_rate
from sonic.parallel import Wiring, clip_grad_norm_
from sonic.parallel.in_flight import logging_to

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of weights and optimizer


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW. Weight decay pulls on matrices, never on the scales of the norms.

    Parameters that lie on different meshes, or are split in different ways, go into groups of their own: the fused
    step takes only such that lie alike.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2
        layout = (getattr(parameter, "device_mesh", None), str(getattr(parameter, "placements", None)))
        decay = recipe.weight_decay if is_matrix else 0.0
        groups.setdefault((is_matrix, *layout), {"params": [], "weight_decay": decay})["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=recipe.lr, betas=(0.9, 0.95), fused=True)


class ParallelTrainer:
    """A model, its optimizer, and how far they have come.

    Args:
        recipe: what to train; ``dtype`` may also be ``"fp64"``, to compare meshes.
        wiring: of the layers.
        corpus: the text to train on.
        world: the mesh; every rank builds the same trainer.
        overlap, fsdp: as :class:`ParallelLanguageModel` takes them.
        weights: of the whole model, named as in ``model.py``; None: fresh ones from the recipe's seed.

    Attributes:
        model, optimizer, precision: as in ``trainer.py``.
        step: steps done.
        seconds: time spent in them, over all sessions of a run that was resumed.
    """

    def __init__(
        self,
        recipe: Recipe,
        wiring: Wiring,
        corpus: Corpus,
        world: ParallelWorld,
        *,
        overlap: str = "full",
        fsdp: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.recipe, self.wiring, self.corpus, self.world = recipe, wiring, corpus, world
        self.is_sharded = fsdp
        torch.manual_seed(recipe.seed)  # every rank draws the same weights, of which it keeps its part
        whole = whole_model(recipe.model, DTYPES[recipe.dtype], weights).to(world.device)
        self.model = ParallelLanguageModel(whole, wiring, world, overlap=overlap, fsdp=fsdp)
        self.optimizer = build_optimizer(self.model, recipe)
        self.precision = torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.dtype == "bf16")
        self.step = 0
        self.seconds = 0.0

    def config(self) -> dict[str, Any]:
        """All that decides the numbers of the run: recipe and wiring. Mesh, overlap and FSDP do not."""
        return {**self.recipe.flat(), "wiring": list(self.wiring.layers)}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint, whole or not at all; returns its path. All ranks together."""
        plain = {"seconds": self.seconds, "mesh": str(self.world.sizes)}
        return save_sharded(folder, self.step, self.config(), plain, self.model, self.optimizer, self.world)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, of whatever mesh. All ranks together.

        Raises:
            JobError: it comes from another recipe or wiring.
        """
        found = load_sharded(path, self.config(), self.model, self.optimizer, self.world)
        self.step, self.seconds = found["step"], found["plain"]["seconds"]

    def train_step(self, stop: bool = False) -> tuple[dict[str, Any], bool]:
        """Take one step.

        Args:
            stop: whether this process was asked to stop.

        Returns:
            The figures of the step for the metrics log, over all ranks, and whether any was asked to stop.
        """
        started = time.perf_counter()
        recipe, world, model = self.recipe, self.world, self.model
        # What draws random numbers in training must draw alike along tp, whose ranks have the same text.
        torch.manual_seed(random.Random(f"{recipe.seed}/{self.step}/{world.data_rank}").getrandbits(63))
        batch = training_batch(
            self.corpus.train,
            seed=recipe.seed,
            step=self.step,
            batch_size=recipe.batch_size,
            seq_len=recipe.seq_len,
            rank=world.data_rank,
            world_size=world.data_size,
        ).to(world.device)
        with self.precision:
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()  # the routers' losses are in it: they reach backward by themselves
        self._average_gradients()
        norm = clip_grad_norm_(model.parameters(), recipe.clip)
        rate = learning_rate(recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        # All that the ranks tell each other about the step travels in one small all-reduce. Ranks along tp tell the
        # same; so everything is divided by their number.
        aux_loss = torch.stack([routing.aux_loss.detach() for routing in model.routings]).sum()
        head = torch.stack((loss.detach(), aux_loss.to(loss.dtype), loss.new_tensor(float(stop))))
        load = torch.stack([routing.metrics.tokens_per_expert for routing in model.routings])
        told = world.sum(torch.cat((head, load.flatten().to(head.dtype))).double())
        loss_sum, aux_sum, stops, *rows = (told / world.sizes.tp).tolist()  # also waits for a GPU to finish
        self.step += 1
        self.seconds += time.perf_counter() - started
        layers, experts = load.shape
        return {
            "step": self.step,
            "loss": loss_sum / world.data_size,
            "bits_per_byte": loss_sum / world.data_size / math.log(2),
            "aux_loss": aux_sum / world.data_size,
            "gradient_norm": norm.item(),
            "lr": rate,
            "seconds": self.seconds,
            "load": [[round(count) for count in rows[i * experts : (i + 1) * experts]] for i in range(layers)],
        }, stops > 0

    def _average_gradients(self) -> None:
        """Means over all ranks with different text, of what FSDP-2 has not averaged already.

        Every expert has seen the text of all ``ep`` ranks, and ``parallelize_moe`` divides its gradient by them.
        """
        world, model = self.world, self.model
        if self.is_sharded:
            average_gradients(model.other_parameters(), world.group("ep"))
        else:
            average_gradients(model.other_parameters(), world.data_group)
            average_gradients(model.expert_parameters(), world.group("dp"))

    def heldout_bits_per_byte(self, windows: Tensor) -> float:
        """Mean of -log2 p(next byte | the bytes before it in its window), over all ranks' shares of the windows.

        Args:
            windows: (count, S + 1) int64, the same on all ranks.
        """
        world = self.world
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        self.model.eval()
        with torch.no_grad(), self.precision, logging_to(None):
            for batch in windows.split(self.recipe.batch_size):
                mine = batch[world.data_rank :: world.data_size].to(world.device)  # none is a number, too
                total += self.model(mine[:, :-1], mine[:, 1:], "sum").double()
        self.model.train()
        if world.data_group is not None:
            dist.all_reduce(total, group=world.data_group)
        return total.item() / windows[:, 1:].numel() / math.log(2)
