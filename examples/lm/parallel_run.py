"""What the jobs on a mesh share: their options, the loop of steps, and the report at its end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import sonic
from examples.lm.checkpoint import append_metrics, cut_metrics, read_metrics, write_whole
from examples.lm.data import heldout_windows
from examples.lm.display import Display, duration
from examples.lm.errors import JobError
from examples.lm.job import Stopped
from examples.lm.model import VOCABULARY, flops_per_token
from examples.lm.options import number, whole
from examples.lm.parallel_checkpoint import newest_sharded
from examples.lm.parallel_model import ParallelModelConfig
from examples.lm.parallel_trainer import ParallelTrainer
from examples.lm.parallel_world import MeshSizes, ParallelWorld
from examples.lm.report import Result, plot_loss
from examples.lm.world import Interrupt
from sonic.parallel import WIRINGS, OverlapReport, Wiring

REPORT_STEPS = 10  # at the end of a run, over which communication is measured
COUNT: dict[str, Any] = {"type": whole, "metavar": "N"}
AMOUNT: dict[str, Any] = {"type": number, "metavar": "X"}


def add_mesh_options(parser: argparse.ArgumentParser, ladder_layers: str) -> None:
    """The options of mesh, wiring and schedule."""
    add = parser.add_argument_group("mesh: --nproc-per-node of torchrun = dp * ep * tp").add_argument
    add("--tp", **COUNT, default=1, help="ranks that share attention heads and every expert")
    add("--ep", **COUNT, default=1, help="ranks that share the experts among them; what is left is data parallel")
    add("--fsdp", action="store_true", help="shard over the data-parallel ranks by FSDP-2, instead of plain averaging")
    add("--timeout", **AMOUNT, default=60.0, help="seconds in which all ranks end when one is gone or stands still")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")
    add = parser.add_argument_group("wiring and schedule").add_argument
    add("--wiring", choices=WIRINGS, default="ladder", help="what a layer reads, see docs/parallel.md")
    add(
        "--ladder-layers",
        type=layers_option,
        default=ladder_layers,
        metavar="WHICH",
        help="layers with that wiring: all, upper_half, none, a number (the last so many), or indices as in 1,3",
    )
    add("--overlap", choices=["off", "forward", "full"], default="full", help="communication hidden under compute")


def add_output_options(parser: argparse.ArgumentParser, out: str) -> None:
    """The options of the run's folder and of its measurements."""
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path(out), help="folder for checkpoints, log and report")
    add("--resume", action="store_true", help="go on from the last whole checkpoint in --out, on any mesh")
    add("--overwrite", action="store_true", help="remove the run that --out holds, and start anew")
    add("--save-every", **COUNT, help="steps between checkpoints")
    add("--eval-every", **COUNT, help="steps between held-out measurements")
    add("--eval-windows", **COUNT, default=256, help="held-out windows to measure on")


def layers_option(text: str) -> int | str | list[int]:
    """``--ladder-layers``: a word, a number, or indices with commas between them."""
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part]
        return int(text)
    except ValueError:
        if text in ("all", "upper_half", "none"):
            return text
        wanted = "all, upper_half, none, a number, or indices such as 1,3"
        raise argparse.ArgumentTypeError(f"is {text!r}, expected {wanted}") from None


def wiring_of(args: argparse.Namespace, layers: int) -> Wiring:
    """The wiring that the options ask for.

    Raises:
        JobError: layers that are not there.
    """
    try:
        return Wiring.build(layers, args.wiring, args.ladder_layers)
    except ValueError as error:
        raise JobError("--ladder-layers", args.ladder_layers, str(error).partition("expected ")[2]) from error


def check_mesh(args: argparse.Namespace, config: ParallelModelConfig, batch_size: int) -> MeshSizes:
    """The mesh that the options ask for.

    Raises:
        JobError: it does not divide the processes, or does not divide what it is to split.
    """
    sizes = MeshSizes.of(int(os.environ.get("WORLD_SIZE", "1")), tp=args.tp, ep=args.ep)
    widths = {
        "--heads": config.heads,
        "--expert-size": config.expert_size,
        "--shared-size": config.shared_size,
        "the vocabulary": VOCABULARY,
    }
    for name, width in widths.items():
        if width % sizes.tp:
            raise JobError(name, width, f"a multiple of --tp = {sizes.tp}, whose ranks share it")
    if batch_size % (sizes.dp * sizes.ep):
        wanted = f"a multiple of dp * ep = {sizes.dp * sizes.ep}, the ranks with different text ({sizes})"
        raise JobError("--batch-size", batch_size, wanted)
    if args.fsdp and sizes.dp == 1:
        raise JobError("--fsdp", f"given with {sizes}", "data-parallel ranks to shard over: dp above 1")
    if args.timeout <= 0:
        raise JobError("--timeout", args.timeout, "a number of seconds above 0")
    return sizes


def run_on_mesh(
    program: str,
    args: argparse.Namespace,
    sizes: MeshSizes,
    job: Callable[[ParallelWorld, Interrupt, Console], None],
) -> int:
    """Run a job in the mesh's context and say how it ended.

    Returns:
        The exit code: 0; 2 for a :class:`JobError`, which is printed; 128 + the signal's number if stopped. A rank that
        is ended because another is gone has exit code 1.
    """
    try:
        with (
            ParallelWorld(args.device, sizes, timeout=args.timeout, program=program) as world,
            Interrupt() as interrupt,
        ):
            job(world, interrupt, Console(quiet=not world.is_main, markup=False, highlight=False, soft_wrap=True))
    except JobError as error:
        return refuse(program, error)
    except Stopped as stopped:
        return 128 + stopped.signum
    except KeyboardInterrupt:  # the second Ctrl-C, which does not wait for the step to end
        return 128 + signal.SIGINT
    return 0


def refuse(program: str, error: JobError) -> int:
    """Say what does not fit, once for all ranks; returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: {error}", file=sys.stderr)
    return 2


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make a run's folder; leave an earlier run in it alone unless told otherwise.

    Raises:
        JobError: there is a run already, and it is neither to be resumed nor overwritten; or no folder can be made.
    """
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    if not resume and any(folder.glob("step_*")):
        raise JobError("--out", f"{folder}, which holds a run", "an empty folder, or --resume, or --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError("--out", f"{folder} ({error.strerror})", "a folder to write to") from error


def train(trainer: ParallelTrainer, args: argparse.Namespace, console: Console, interrupt: Interrupt) -> dict[str, Any]:
    """Train to the last step, from the last whole checkpoint on if ``args.resume``, and report.

    All ranks call it; the main one alone shows progress, keeps the log and writes the report.

    Returns:
        The summary, as it is written to ``summary.json``.

    Raises:
        Stopped: after a signal, when the checkpoint is written.
        JobError: the checkpoint is of another recipe or wiring.
    """
    recipe, world, folder = trainer.recipe, trainer.world, args.out
    metrics = folder / "metrics.jsonl"
    if args.resume:
        latest = newest_sharded(folder, warn=console.print)
        if latest is not None:
            trainer.load(latest)
        console.print(f"going on after step {trainer.step} ({latest or 'no checkpoint'})")
    world.barrier()  # all have read what there is before one writes
    if world.is_main:
        cut_metrics(metrics, trainer.step)
    windows = heldout_windows(trainer.corpus.heldout, count=args.eval_windows, seq_len=recipe.seq_len)
    console.print(describe(trainer), style="bold")
    first, first_seconds = trainer.step, trainer.seconds
    table = OverlapReport(overlap=args.overlap != "off")
    last_step = OverlapReport(overlap=False)
    with ExitStack() as measured, Display(console, recipe.steps, recipe.tokens_per_step, world.device) as display:
        while trainer.step < recipe.steps:
            if trainer.step == max(first, recipe.steps - 1 - REPORT_STEPS):
                measured.enter_context(table)
            if trainer.step == recipe.steps - 1:  # in a report of its own, to be drawn
                measured.close()
                measured.enter_context(last_step)
            figures, stop = trainer.train_step(stop=interrupt.signum != 0)
            last = trainer.step == recipe.steps
            if last:
                measured.close()
            if last or trainer.step % args.eval_every == 0:
                figures["heldout_bits_per_byte"] = trainer.heldout_bits_per_byte(windows)
            display.update(figures)
            save = last or stop or trainer.step % args.save_every == 0
            if world.is_main:
                append_metrics(metrics, figures, durable=save)  # a checkpoint must not be ahead of its log
            if save:
                trainer.save(folder)
            if stop:
                console.print(f"stopped after step {trainer.step}; the same command with --resume goes on from there")
                raise Stopped(interrupt.signum or signal.SIGTERM)  # another process may have got the signal
    heldout = trainer.heldout_bits_per_byte(windows)
    steps = trainer.step - first
    seconds = trainer.seconds - first_seconds
    summary = {
        "heldout_bits_per_byte": heldout,
        "tokens_per_second": steps * recipe.tokens_per_step / seconds if steps else None,
        "training_seconds": trainer.seconds,
        "mesh": str(world.sizes),
        "config": trainer.config(),
        "overlap": {"asked": args.overlap, "steps": max(0, min(steps - 1, REPORT_STEPS)), "rows": table.rows()},
        "versions": {"sonic": sonic.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if world.is_main:
        print_and_write(trainer, summary, table, last_step, folder, console)
    world.barrier()
    return summary


def describe(trainer: ParallelTrainer) -> str:
    """One line about a model and where it lies."""
    config, names = trainer.recipe.model, list(trainer.wiring.layers)
    kinds = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    experts = f"{config.top_k} of {config.experts} experts of width {config.expert_size}"
    how = " with FSDP-2" if trainer.is_sharded else ""
    return f"{config.layers} layers ({kinds}), {experts}, {count:,} parameters; {trainer.world.sizes}{how}"


def print_and_write(
    trainer: ParallelTrainer,
    summary: dict[str, Any],
    table: OverlapReport,
    last_step: OverlapReport,
    folder: Path,
    console: Console,
) -> None:
    """The end of a run: figures, what was hidden of the communication, and the pictures."""
    recipe = trainer.recipe
    console.print(f"held-out bits per byte: {summary['heldout_bits_per_byte']:.4f}", style="bold")
    if summary["tokens_per_second"] is not None:
        seconds = duration(summary["training_seconds"])
        console.print(f"training: {summary['tokens_per_second']:,.0f} tokens/s, {seconds} in all")
    written = [folder / "summary.json"]
    write_whole(written[0], json.dumps(summary, indent=2) + "\n")
    if table.collectives:
        console.print(
            f"communication of rank 0 in {summary['overlap']['steps']} steps (overlap {summary['overlap']['asked']}):"
        )
        table.print()
    elif trainer.world.sizes.tp * trainer.world.sizes.ep == 1:
        console.print("no communication to overlap: neither --tp nor --ep")
    if last_step.collectives:
        written.append(folder / "overlap.png")
        last_step.save_timeline(str(written[-1]))
    rows = read_metrics(folder / "metrics.jsonl")
    if rows:
        count = sum(parameter.numel() for parameter in trainer.model.parameters())
        result = Result(
            name="moe",
            heldout_bits_per_byte=summary["heldout_bits_per_byte"],
            parameters={"total": count, "active": count},
            flops_per_token=flops_per_token(recipe.model, recipe.seq_len),
            training_seconds=summary["training_seconds"],
            tokens_per_second=summary["tokens_per_second"] or 0.0,
            sample="",
            rows=rows,
        )
        written.append(plot_loss(folder / "loss_curve.png", [result], tokens_per_step=recipe.tokens_per_step))
    console.print("written: " + ", ".join(map(str, written)))
