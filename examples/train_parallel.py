"""Train a small Mixture-of-Experts language model on a mesh of processes, with communication hidden under compute.

    torchrun --nproc-per-node 2 -m examples.train_parallel --tp 2 --wiring ladder      split matrices, ladder layers
    torchrun --nproc-per-node 2 -m examples.train_parallel --ep 2 --wiring farskip     split experts
    torchrun --nproc-per-node 4 -m examples.train_parallel --tp 2 --fsdp               dp 2 x tp 2, sharded
    torchrun --nproc-per-node 4 -m examples.train_parallel --tp 2 --ep 2 --resume      go on, on another mesh
    python -m examples.train_parallel                                                  the same job, alone

The text is the source code of Python's standard library unless ``--text`` says otherwise; whole files are held out.
What a step learns from depends on the step and on ``--batch-size`` alone, so any mesh gives the same loss curve, up to
rounding; ``--dtype fp64`` shows it to nine digits. Checkpoints are written by all ranks together, whole or not at all,
and ``--resume`` reads them on any other mesh. When a process dies, the others say which and end within ``--timeout``.

The folder ``--out`` gets checkpoints, ``metrics.jsonl``, ``summary.json``, ``loss_curve.png`` and ``overlap.png``, the
timeline of what was sent in the last step.

Where to look: ``lm/parallel_model.py`` is where ``sonic.parallel`` is used; ``lm/parallel_trainer.py`` is the step;
``lm/parallel_checkpoint.py`` and ``lm/parallel_liveness.py`` are the checkpoints, and the watch over the ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from examples.lm.data import load_corpus
from examples.lm.errors import JobError
from examples.lm.options import HelpFormatter
from examples.lm.parallel_model import ParallelModelConfig
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
from examples.lm.parallel_trainer import DTYPES, ParallelTrainer
from examples.lm.parallel_world import MeshSizes, ParallelWorld
from examples.lm.trainer import Recipe
from examples.lm.world import Interrupt

PROGRAM = "train_parallel"
PRESETS: dict[str, dict[str, Any]] = {
    # About two minutes with two processes on two CPU cores.
    "demo": {
        **{
            "hidden_size": 128,
            "layers": 4,
            "heads": 4,
            "experts": 16,
            "top_k": 2,
            "expert_size": 128,
            "shared_size": 128,
        },
        **{"seq_len": 128, "batch_size": 16, "steps": 250, "lr": 3e-3, "dtype": "fp32"},
        **{"eval_every": 125, "save_every": 125},
    },
    # 210 million parameters, 34 million of them active: for GPUs.
    "small": {
        **{
            "hidden_size": 512,
            "layers": 8,
            "heads": 8,
            "experts": 64,
            "top_k": 8,
            "expert_size": 256,
            "shared_size": 256,
        },
        **{"seq_len": 512, "batch_size": 64, "steps": 5000, "lr": 1e-3, "dtype": "bf16"},
        **{"eval_every": 250, "save_every": 500},
    },
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; the preset gives the defaults of the sizes. Exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train a small Mixture-of-Experts language model on a mesh of processes.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("what to train").add_argument
    add("--preset", choices=sorted(PRESETS), default="demo", help="sizes: demo for two CPU cores, small for GPUs")
    add(
        "--text", nargs="+", type=Path, metavar="PATH", default=[], help="files and folders; none: Python's own sources"
    )
    add_mesh_options(parser, ladder_layers="all")
    add = parser.add_argument_group("model").add_argument
    add("--hidden-size", **COUNT, help="width of the model")
    add("--layers", **COUNT, help="number of blocks")
    add("--heads", **COUNT, help="attention heads")
    add("--experts", **COUNT, help="experts per layer")
    add("--top-k", **COUNT, help="experts per token")
    add("--expert-size", **COUNT, help="width of one expert")
    add("--shared-size", type=int, metavar="N", help="width of an expert that every token passes; 0: none")
    add("--aux-loss", **AMOUNT, default=0.01, help="weight of the load-balancing loss")
    add("--z-loss", **AMOUNT, default=0.001, help="weight of the router's z-loss")
    add = parser.add_argument_group("training").add_argument
    add("--seq-len", **COUNT, help="bytes per window")
    add("--batch-size", **COUNT, help="windows per step, of all processes together")
    add("--steps", **COUNT, help="optimizer steps")
    add("--warmup-steps", **COUNT, help="steps of rising learning rate; if not given, a twentieth of all")
    add("--lr", **AMOUNT, help="highest learning rate")
    add("--weight-decay", **AMOUNT, default=0.1, help="on matrices")
    add("--clip", **AMOUNT, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=sorted(DTYPES), help="of the products; weights are fp32, or fp64 with that")
    add("--seed", type=int, metavar="N", default=0, help="of the first weights and of the order of the text")
    add_output_options(parser, "report/parallel")

    first = argparse.ArgumentParser(prog=parser.prog, add_help=False)  # the preset has to be known before the rest
    first.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not allowed with --resume")
    if args.hidden_size % (2 * args.heads):
        wanted = f"a multiple of 2 * heads = {2 * args.heads}"
        parser.error(f"argument --hidden-size: is {args.hidden_size}, expected {wanted}")
    if args.shared_size < 0:
        parser.error(f"argument --shared-size: is {args.shared_size}, expected a width, or 0")
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: is {args.top_k}, expected {args.experts} (--experts) at most")
    for name in ("lr", "clip"):
        if getattr(args, name) == 0:
            parser.error(f"argument --{name}: is 0, expected a number above 0")
    return args


def model_of(args: argparse.Namespace) -> ParallelModelConfig:
    """The model that the options ask for."""
    return ParallelModelConfig(
        mlp="moe",
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=args.heads,
        experts=args.experts,
        top_k=args.top_k,
        expert_size=args.expert_size,
        aux_loss_coeff=args.aux_loss,
        z_loss_coeff=args.z_loss,
        shared_size=args.shared_size,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the job.

    Returns:
        The exit code: 0; 2 for options, a text or a checkpoint that do not fit; 128 + the signal's number if stopped; 1
        if another process is gone.
    """
    args = parse(argv)
    try:  # what every rank finds out by itself, before they wait for each other
        model = model_of(args)
        sizes: MeshSizes = check_mesh(args, model, args.batch_size)
        wiring = wiring_of(args, model.layers)
        corpus = load_corpus(args.text, seq_len=args.seq_len)
    except JobError as error:
        return refuse(PROGRAM, error)
    recipe = Recipe.from_arguments(args, model, corpus.fingerprint)

    def job(world: ParallelWorld, interrupt: Interrupt, console: Console) -> None:
        console.print(
            f"text: {len(corpus.train):,} bytes of {len(corpus.train_files)} files to train on, "
            f"{len(corpus.heldout):,} bytes of {len(corpus.heldout_files)} files held out"
        )
        if world.is_main:
            prepare_folder(args.out, resume=args.resume, overwrite=args.overwrite)
        world.barrier()
        trainer = ParallelTrainer(recipe, wiring, corpus, world, overlap=args.overlap, fsdp=args.fsdp)
        train(trainer, args, console, interrupt)

    return run_on_mesh(PROGRAM, args, sizes, job)


if __name__ == "__main__":
    sys.exit(main())
