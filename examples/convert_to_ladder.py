"""Wire a model that was trained as a standard transformer as a ladder, and train it on until it has adapted.

    python -m examples.train_moe_lm --model moe --out report/demo                             a standard model
    python -m examples.convert_to_ladder --from report/demo/moe                               its upper half as a ladder
    torchrun --nproc-per-node 2 -m examples.convert_to_ladder --from report/demo/moe --tp 2   the same on two ranks

``--from`` is the folder of a run of ``train_moe_lm`` or ``train_parallel --wiring standard``, or a checkpoint in it.
A ladder has the same parameters, of the same names and shapes, but each reads another stream: what the converted model
computes is another function, and it has to be trained on. Held-out bits per byte are measured before, right after the
conversion, and after the training; they go into ``conversion.json``, beside what ``train_parallel`` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from examples.lm.checkpoint import write_whole
from examples.lm.data import heldout_windows, load_corpus
from examples.lm.errors import JobError
from examples.lm.options import HelpFormatter
from examples.lm.parallel_run import (
    AMOUNT,
    COUNT,
    add_mesh_options,
    add_output_options,
    check_mesh,
    prepare_folder,
    refuse,
    run_on_mesh,
    train,
    wiring_of,
)
from examples.lm.parallel_source import Source, read_source
from examples.lm.parallel_trainer import DTYPES, ParallelTrainer
from examples.lm.parallel_world import ParallelWorld
from examples.lm.trainer import Recipe
from examples.lm.world import Interrupt
from sonic.parallel import Wiring

PROGRAM = "convert_to_ladder"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options. Exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Wire a trained standard model as a ladder, and train it on.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("what to convert").add_argument
    add("--from", dest="source", type=Path, metavar="PATH", required=True, help="a run's folder, or a checkpoint in it")
    add(
        "--text", nargs="+", type=Path, metavar="PATH", default=[], help="files and folders; none: Python's own sources"
    )
    add_mesh_options(parser, ladder_layers="upper_half")
    add = parser.add_argument_group("training on; what is not given is as it was before").add_argument
    add("--steps", **COUNT, default=200, help="optimizer steps")
    add("--warmup-steps", **COUNT, help="steps of rising learning rate; if not given, a twentieth of all")
    add("--lr", **AMOUNT, default=1e-3, help="highest learning rate")
    add("--batch-size", **COUNT, help="windows per step, of all processes together")
    add("--dtype", choices=sorted(DTYPES), help="of the products; weights are fp32, or fp64 with that")
    add("--seed", type=int, metavar="N", default=1, help="of the order of the text")
    add_output_options(parser, "report/ladder")
    parser.set_defaults(eval_every=100, save_every=100)
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not allowed with --resume")
    if args.wiring == "standard":
        parser.error("argument --wiring: is standard, expected what to convert to")
    if args.lr == 0:
        parser.error("argument --lr: is 0, expected a number above 0")
    return args


def recipe_of(args: argparse.Namespace, source: Source, text: str) -> Recipe:
    """How to train on."""
    return replace(
        source.recipe,
        text=text,
        steps=args.steps,
        warmup_steps=args.warmup_steps or max(1, args.steps // 20),
        lr=args.lr,
        batch_size=args.batch_size or source.recipe.batch_size,
        dtype=args.dtype or source.recipe.dtype,
        seed=args.seed,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the job.

    Returns:
        The exit code, as that of ``train_parallel``.
    """
    args = parse(argv)
    try:  # what every rank finds out by itself, before they wait for each other
        source = read_source(args.source)
        layers = source.recipe.model.layers
        corpus = load_corpus(args.text, seq_len=source.recipe.seq_len)
        recipe = recipe_of(args, source, corpus.fingerprint)
        sizes = check_mesh(args, source.config, recipe.batch_size)
        wiring = wiring_of(args, layers)
    except JobError as error:
        return refuse(PROGRAM, error)

    def job(world: ParallelWorld, interrupt: Interrupt, console: Console) -> None:
        if world.is_main:
            prepare_folder(args.out, resume=args.resume, overwrite=args.overwrite)
        world.barrier()
        console.print(f"from {source.path}, after {source.step} steps")
        if corpus.fingerprint != source.recipe.text:
            console.print("note: not the text that it was trained on; some of what is held out may have been in that")
        windows = heldout_windows(corpus.heldout, count=args.eval_windows, seq_len=recipe.seq_len)
        options: dict[str, Any] = {"overlap": args.overlap, "fsdp": args.fsdp}
        bits = {}
        for name, wired in (("before", Wiring(("standard",) * layers)), ("converted", wiring)):
            trainer = ParallelTrainer(recipe, wired, corpus, world, weights=source.weights, **options)
            bits[name] = trainer.heldout_bits_per_byte(windows)
        chosen = [index for index, name in enumerate(wiring) if name != "standard"]
        console.print(f"held-out bits per byte: {bits['before']:.4f} as it was, {bits['converted']:.4f} right after")
        console.print(
            f"warning: layers {chosen} of {layers} are wired as {args.wiring} now, and compute something else than "
            f"what they were trained for; the model needs the following {recipe.steps} steps of training, or more",
            style="yellow",
        )
        bits["adapted"] = train(trainer, args, console, interrupt)["heldout_bits_per_byte"]
        console.print(
            f"held-out bits per byte: {bits['before']:.4f} as it was, {bits['converted']:.4f} right after the "
            f"conversion, {bits['adapted']:.4f} after {recipe.steps} steps",
            style="bold",
        )
        if world.is_main:
            found = {"from": str(source.path), "layers": chosen, "wiring": args.wiring, "steps": recipe.steps}
            write_whole(
                args.out / "conversion.json", json.dumps({**found, "heldout_bits_per_byte": bits}, indent=2) + "\n"
            )

    return run_on_mesh(PROGRAM, args, sizes, job)


if __name__ == "__main__":
    sys.exit(main())
