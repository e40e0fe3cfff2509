"""One model in training: its weights, its optimizer, and the step that both take together."""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import sonic
from examples.lm.checkpoint import load_checkpoint, save_checkpoint
from examples.lm.data import Corpus, training_batch
from examples.lm.model import LanguageModel, ModelConfig, Output
from examples.lm.world import World


@dataclass(frozen=True)
class Recipe:
    """All that decides the numbers of a run. A checkpoint holds it, and is refused by a run with another one.

    Attributes:
        model: the model's shape.
        text: fingerprint of the corpus.
        seq_len: bytes per window.
        batch_size: windows per step, of all processes together.
        steps, warmup_steps: of the schedule.
        lr: highest learning rate.
        weight_decay: on matrices only.
        clip: largest norm of the gradient.
        dtype: ``"fp32"``, or ``"bf16"``: products in bf16, weights and optimizer in fp32.
        seed: of the first weights and of the order of the text.
    """

    model: ModelConfig
    text: str
    seq_len: int
    batch_size: int
    steps: int
    warmup_steps: int
    lr: float
    weight_decay: float
    clip: float
    dtype: str
    seed: int

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, model: ModelConfig, text: str) -> Recipe:
        """What the options of a program's command line say; without ``warmup_steps`` a twentieth of the steps."""
        return cls(
            model=model,
            text=text,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            steps=args.steps,
            warmup_steps=args.warmup_steps or max(1, args.steps // 20),
            lr=args.lr,
            weight_decay=args.weight_decay,
            clip=args.clip,
            dtype=args.dtype,
            seed=args.seed,
        )

    @property
    def tokens_per_step(self) -> int:
        """Bytes that a step learns from, in all processes together."""
        return self.batch_size * self.seq_len

    def flat(self) -> dict[str, int | float | str]:
        """The recipe as one flat dict of plain values."""
        fields = asdict(self)
        return {**fields.pop("model"), **fields}


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of a step, counted from 0: a straight warm-up, then a cosine down to a twentieth."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def build_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW. Weight decay pulls on matrices (stacks of experts are matrices too), never on the scales of the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))


class Trainer:
    """A model, its optimizer, and how far they have come.

    Args:
        recipe: what to train.
        corpus: the text to train on.
        world: the processes that share each batch; every one of them builds the same trainer.

    Attributes:
        model: starts from the recipe's seed.
        precision: the autocast context that every forward pass runs in.
        step: steps done.
        seconds: time spent in them, over all sessions of a run that was resumed.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus, world: World) -> None:
        self.recipe, self.corpus, self.world = recipe, corpus, world
        torch.manual_seed(recipe.seed)  # every process draws the same weights
        self.model = LanguageModel(recipe.model).to(world.device)
        self.optimizer = build_optimizer(self.model, recipe, world.device)
        self.precision = torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.dtype == "bf16")
        self.step = 0
        self.seconds = 0.0

    def save(self, folder: Path) -> Path:
        """Write a checkpoint, whole or not at all; returns its path."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
        }
        return save_checkpoint(folder, self.step, self.recipe.flat(), state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            JobError: it comes from another recipe.
        """
        checkpoint = load_checkpoint(path, self.recipe.flat(), self.world.device)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]

    def train_step(self, stop: bool = False) -> tuple[dict[str, Any], bool]:
        """Take one step.

        Args:
            stop: whether this process was asked to stop.

        Returns:
            The figures of the step for the metrics log, over all processes, and whether any process was asked to stop.
        """
        started = time.perf_counter()
        recipe, world = self.recipe, self.world
        # What draws random numbers in training (stochastic rounding; dropout, should you add it) resumes bit for bit:
        # the state of torch's generator, like the batch, is a function of the step.
        torch.manual_seed(random.Random(f"{recipe.seed}/{self.step}/{world.rank}").getrandbits(63))
        batch = training_batch(
            self.corpus.train,
            seed=recipe.seed,
            step=self.step,
            batch_size=recipe.batch_size,
            seq_len=recipe.seq_len,
            rank=world.rank,
            world_size=world.size,
        ).to(world.device)
        with self.precision:
            output: Output = self.model(batch[:, :-1])
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + output.aux_loss).backward()
        parameters = list(self.model.parameters())
        world.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        rate = learning_rate(recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if recipe.model.routing == "bias":
            sonic.routing.update_expert_bias(self.model)

        # All that the processes tell each other about the step travels in one small all-reduce.
        head = torch.stack((loss.detach(), output.aux_loss.detach(), loss.new_tensor(float(stop))))
        counts = torch.cat((output.load.flatten(), output.changes.flatten()))
        told = world.sum(torch.cat((head, counts.float()))).tolist()  # also waits for a GPU to finish
        loss_sum, aux_sum, stops, *load = told
        self.step += 1
        self.seconds += time.perf_counter() - started
        layers, experts = output.load.shape
        figures = {
            "step": self.step,
            "loss": loss_sum / world.size,
            "bits_per_byte": loss_sum / world.size / math.log(2),
            "aux_loss": aux_sum / world.size,
            "gradient_norm": norm.item(),
            "lr": rate,
            "seconds": self.seconds,
            "load": [[int(rows) for rows in load[layer * experts : (layer + 1) * experts]] for layer in range(layers)],
        }
        for index, name in enumerate(("added", "dropped", "idle") if len(output.changes) else ()):
            figures[name] = [int(count) for count in load[layers * experts + index :: 3]]
        return figures, stops > 0
