"""What a wiring costs in quality, on a toy: ``python -m benchmarks.wiring_quality``.

A byte language model of some 0.4 million parameters is trained on the source code of Python's standard library with
each wiring, and its loss measured on files that it never saw. The model that was trained with standard layers is then
converted: the same weights, rewired, measured at once and after some more training. Differences between wirings at this
size say whether the wiring is *right*; how much it costs at a billion parameters they do not say (arXiv:2501.06589 has
those).

``--json`` writes::

    {"benchmark": "wiring_quality", "command": str, "machine": {...}, "missing": {}, "steps": int, "seeds": [int],
     "cells": [{"model": str, "loss": [nats per byte, one per seed]}],
     "targets": {"ladder": {"value", "target", "passed"}, "upper_half_zero_shot": {...}}}

Targets: a ladder within 0.05 nats of standard layers, a conversion of the upper half within 0.02 before any training.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import Section, new_report, target, write_files
from sonic.parallel import LadderBlock, LadderStack, Wiring

__all__ = ["ByteModel", "main"]

LAYERS, WIDTH, HEADS, WINDOW, BATCH = 8, 64, 4, 96, 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, n: Tensor) -> Tensor:
        q, k, v = self.qkv(n).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, n: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(n)))


class ByteModel(nn.Module):
    """Bytes in, logits of the next byte out: (B, S) -> (B, S, 256)."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.stack = LadderStack(
            [LadderBlock(nn.RMSNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH), MLP()) for _ in range(LAYERS)], wiring
        )
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        return self.head(self.norm(self.stack(self.embedding(tokens) + self.positions(positions))))


def load_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and of other files to test on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train, held_out = bytearray(), bytearray()
    for number, file in enumerate(files):
        (held_out if number % 10 == 0 else train).extend(file.read_bytes()[:60_000])
    train_text, held_out_text = (torch.frombuffer(text, dtype=torch.uint8).long() for text in (train, held_out))
    return train_text, held_out_text


def windows(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - WINDOW - 1, (count, 1), generator=generator)
    chosen = text[starts + torch.arange(WINDOW + 1)]
    return chosen[:, :-1], chosen[:, 1:]


def train(model: ByteModel, text: Tensor, steps: int, seed: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        inputs, wanted = windows(text, BATCH, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def loss_of(model: ByteModel, text: Tensor) -> float:
    generator = torch.Generator().manual_seed(12345)
    losses = []
    for _ in range(16):
        inputs, wanted = windows(text, 32, generator)
        losses.append(float(F.cross_entropy(model(inputs).flatten(0, 1), wanted.flatten())))
    return statistics.fmean(losses)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a target is missed."""
    arguments = _parser().parse_args(argv)
    report = new_report("wiring_quality", sys.argv[1:] if argv is None else argv, {})
    steps = 4 if arguments.quick else arguments.steps
    seeds = [0] if arguments.quick else list(range(arguments.seeds))
    train_text, held_out = load_text()
    wirings = {
        "standard": Wiring.build(LAYERS, "standard", "all"),
        "ladder": Wiring.build(LAYERS, "ladder", "all"),
        "ladder, upper half": Wiring.build(LAYERS, "ladder", "upper_half"),
        "parallel": Wiring.build(LAYERS, "parallel", "all"),
    }
    losses: dict[str, list[float]] = {}
    for seed in seeds:
        for name, wiring in wirings.items():
            torch.manual_seed(seed)
            model = ByteModel(wiring)
            train(model, train_text, steps, seed, 3e-3)
            losses.setdefault(name, []).append(loss_of(model, held_out))
            print(f"seed {seed}: {name}: {losses[name][-1]:.3f}", flush=True)
            if name != "standard":
                continue
            for part, layers in (("upper half", "upper_half"), ("all", "all")):
                converted = copy.deepcopy(model)
                converted.stack.wiring = Wiring.build(LAYERS, "ladder", layers)
                losses.setdefault(f"standard, {part} rewired", []).append(loss_of(converted, held_out))
                more = max(steps // 5, 1)
                train(converted, train_text, more, seed + 1000, 1e-3)
                losses.setdefault(f"standard, {part} rewired, {more} more steps", []).append(
                    loss_of(converted, held_out)
                )
    report |= {"steps": steps, "seeds": seeds}
    report["cells"] = [{"model": name, "loss": values} for name, values in losses.items()]
    standard = statistics.fmean(losses["standard"])
    goals = {
        "ladder": (statistics.fmean(losses["ladder"]) - standard, 0.05),
        "upper_half_zero_shot": (statistics.fmean(losses["standard, upper half rewired"]) - standard, 0.02),
    }
    report["targets"] = {name: target(value, limit, value <= limit) for name, (value, limit) in goals.items()}
    rows = [
        [name, " ".join(f"{value:.3f}" for value in values), f"{statistics.fmean(values) - standard:+.3f}"]
        for name, values in losses.items()
    ]
    notes = [
        f"{name}: {goal['value']:+.3f} (target at most {goal['target']:+.2f}): {'pass' if goal['passed'] else 'MISSED'}"
        for name, goal in report["targets"].items()
    ]
    section = Section(f"Held-out nats per byte after {steps} steps", ["model", "seeds", "over standard"], rows, notes)
    print("\n" + section.text())
    preface = (
        f"A byte language model, {LAYERS} layers of width {WIDTH}, on the source of Python's standard library; the "
        "same data and initial weights for every wiring of a seed."
    )
    write_files(report, "Quality of wirings", preface, [section], json_path=arguments.json, save=arguments.save)
    return 0 if all(goal["passed"] for goal in report["targets"].values()) or arguments.quick else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wiring_quality", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps; default: 500")
    parser.add_argument("--seeds", type=int, default=2, help="models per wiring; default: 2")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
