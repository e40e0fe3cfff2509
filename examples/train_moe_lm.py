"""Train a small Mixture-of-Experts language model on real text, and a dense one of equal active FLOPs to compare.

    python -m examples.train_moe_lm --compare dense --out report        a few minutes on two CPU cores
    python -m examples.train_moe_lm --text ~/notes book.txt --out mine  on text of your own
    python -m examples.train_moe_lm ... --resume                        go on where a stopped run was
    torchrun --nproc-per-node 2 -m examples.train_moe_lm ...            data parallel, on CPUs or GPUs

The text is the source code of Python's standard library unless ``--text`` says otherwise; whole files are held out to
test on. The folder ``--out`` gets ``summary.json``, ``loss_curve.png`` and ``expert_load.png``, and per model a folder,
``moe/`` and ``dense/``, with checkpoints and ``metrics.jsonl``.

Ctrl-C writes a checkpoint and leaves. ``--resume`` with the same arguments then goes on to the very losses that an
unbroken run would have seen: bit for bit on a CPU.

Where to look: ``lm/model.py`` is the model and ``lm/routers.py`` its routers, which is where ``sonic`` is used;
``lm/trainer.py`` is the training step; ``lm/data.py`` is the text. This file holds the options and the loop.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, python examples/train_moe_lm.py: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from examples.lm.checkpoint import append_metrics, cut_metrics, newest_checkpoint, read_metrics
from examples.lm.data import Corpus, heldout_windows, load_corpus
from examples.lm.display import Display
from examples.lm.errors import JobError
from examples.lm.evaluate import bits_per_byte, generate
from examples.lm.job import Stopped, exit_code_of
from examples.lm.model import LanguageModel, ModelConfig, flops_per_token, parameter_counts
from examples.lm.options import HelpFormatter, number, whole
from examples.lm.report import NAMES, Result, print_report, write_report
from examples.lm.trainer import Recipe, Trainer
from examples.lm.world import Interrupt, World

PRESETS: dict[str, dict[str, Any]] = {
    # About two minutes for both models on two CPU cores. 3e-3 is the best rate of 2, 3 and 4e-3 for either of them.
    "demo": {
        **{"hidden_size": 128, "layers": 3, "heads": 4, "experts": 16, "top_k": 2, "expert_size": 128},
        **{"seq_len": 128, "batch_size": 16, "steps": 560, "lr": 3e-3, "dtype": "fp32"},
        **{"eval_every": 140, "save_every": 280},
    },
    # 210 million parameters, 34 million of them active: for one GPU.
    "small": {
        **{"hidden_size": 512, "layers": 8, "heads": 8, "experts": 64, "top_k": 8, "expert_size": 256},
        **{"seq_len": 512, "batch_size": 64, "steps": 5000, "lr": 1e-3, "dtype": "bf16"},
        **{"eval_every": 250, "save_every": 500},
    },
}


def train(
    recipe: Recipe, corpus: Corpus, args: argparse.Namespace, world: World, console: Console, interrupt: Interrupt
) -> Result:
    """Train one model to its last step, from its newest checkpoint on if ``args.resume``, and measure it.

    Every process calls this; the main one alone shows progress (the others' ``console`` is quiet) and writes files.

    Raises:
        Stopped: after a signal, when the checkpoint is written.
        JobError: the checkpoint is of another recipe.
    """
    name, folder = recipe.model.mlp, args.out / recipe.model.mlp
    metrics = folder / "metrics.jsonl"
    trainer = Trainer(recipe, corpus, world)
    if args.resume:
        latest = newest_checkpoint(folder, warn=console.print)
        if latest is not None:
            trainer.load(latest)
        console.print(f"{NAMES[name]}: going on after step {trainer.step} ({latest or 'no checkpoint'})")
    world.barrier()  # all have read what there is before one writes
    if world.is_main:
        cut_metrics(metrics, trainer.step)
    windows = heldout_windows(corpus.heldout, count=args.eval_windows, seq_len=recipe.seq_len)

    def heldout_bits() -> float:
        return bits_per_byte(trainer.model, windows, batch_size=recipe.batch_size, precision=trainer.precision)

    console.print(describe(trainer.model), style="bold")
    with Display(console, recipe.steps, recipe.tokens_per_step, world.device) as display:
        while trainer.step < recipe.steps:
            figures, stop = trainer.train_step(stop=interrupt.signum != 0)
            last = trainer.step == recipe.steps
            if last or trainer.step % args.eval_every == 0:
                figures["heldout_bits_per_byte"] = heldout_bits()
            display.update(figures)
            save = last or stop or trainer.step % args.save_every == 0
            if world.is_main:
                append_metrics(metrics, figures, durable=save)  # a checkpoint must not be ahead of its log
                if save:
                    trainer.save(folder)
            if stop:
                console.print(f"stopped after step {trainer.step}; the same command with --resume goes on from there")
                raise Stopped(interrupt.signum or signal.SIGTERM)  # another process may have got the signal
    world.barrier()  # the log is complete before anyone reads it
    return Result(
        name=name,
        heldout_bits_per_byte=heldout_bits(),
        parameters=parameter_counts(trainer.model),
        flops_per_token=flops_per_token(recipe.model, recipe.seq_len),
        training_seconds=trainer.seconds,
        tokens_per_second=recipe.steps * recipe.tokens_per_step / trainer.seconds,
        sample=generate(
            trainer.model,
            args.prompt,
            length=args.sample_length,
            context=recipe.seq_len,
            temperature=args.temperature,
            seed=recipe.seed,
            precision=trainer.precision,
        ),
        rows=read_metrics(metrics),
    )


def describe(model: LanguageModel) -> str:
    """One line about a model."""
    c, count = model.config, parameter_counts(model)
    if c.mlp == "dense":
        return f"dense: {c.layers} layers, MLP of width {c.top_k * c.expert_size}; {count['total']:,} parameters"
    experts = f"{c.top_k} of {c.experts} experts of width {c.expert_size} for each token"
    return f"MoE: {c.layers} layers, {experts}; {count['total']:,} parameters, {count['active']:,} of them active"


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make a run's folder; leave an earlier run in it alone unless told otherwise.

    Raises:
        JobError: there is a run already, and it is neither to be resumed nor overwritten; or no folder can be made.
    """
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    if not resume and any(folder.glob("step_*.pt")):
        raise JobError("--out", f"{folder.parent}, which holds a run", "an empty folder, or --resume, or --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError("--out", f"{folder.parent} ({error.strerror})", "a folder to write to") from error


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; the preset gives the defaults of the sizes. Exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="train_moe_lm",
        description="Train a small Mixture-of-Experts language model on text, byte by byte.",
        formatter_class=HelpFormatter,
    )
    count: dict[str, Any] = {"type": whole, "metavar": "N"}
    amount: dict[str, Any] = {"type": number, "metavar": "X"}
    add = parser.add_argument_group("what to train").add_argument
    add("--preset", choices=sorted(PRESETS), default="demo", help="sizes: demo for two CPU cores, small for one GPU")
    add("--model", choices=["moe", "dense"], default="moe", help="the MLP of the model")
    add("--compare", choices=["dense"], help="also train a dense model of equal active FLOPs")
    add(
        "--text", nargs="+", type=Path, metavar="PATH", default=[], help="files and folders; none: Python's own sources"
    )
    add = parser.add_argument_group("model").add_argument
    add("--hidden-size", **count, help="width of the model")
    add("--layers", **count, help="number of blocks")
    add("--heads", **count, help="attention heads")
    add("--experts", **count, help="experts per layer")
    add("--top-k", **count, help="experts per token")
    add("--expert-size", **count, help="width of one expert; a dense MLP is top-k times as wide")
    add("--aux-loss", **amount, default=0.01, help="weight of the load-balancing loss")
    add("--z-loss", **amount, default=0.001, help="weight of the router's z-loss")
    add = parser.add_argument_group("training").add_argument
    add("--seq-len", **count, help="bytes per window")
    add("--batch-size", **count, help="windows per step, of all processes together")
    add("--steps", **count, help="optimizer steps")
    add("--warmup-steps", **count, help="steps of rising learning rate; if not given, a twentieth of all")
    add("--lr", **amount, help="highest learning rate")
    add("--weight-decay", **amount, default=0.1, help="on matrices")
    add("--clip", **amount, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=["bf16", "fp32"], help="of the products; weights and optimizer are fp32 in any case")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")
    add("--seed", type=int, metavar="N", default=0, help="of the first weights and of the order of the text")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("report"), help="folder for checkpoints, logs and the report")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--overwrite", action="store_true", help="remove the runs that --out holds, and start anew")
    add("--save-every", **count, help="steps between checkpoints")
    add("--eval-every", **count, help="steps between held-out measurements")
    add("--eval-windows", **count, default=256, help="held-out windows to measure on")
    add("--prompt", default="def ", help="what the sample begins with")
    add("--sample-length", **count, default=400, help="bytes of the sample")
    add("--temperature", **amount, default=0.7, help="of the sample")

    first = argparse.ArgumentParser(prog=parser.prog, add_help=False)  # the preset has to be known before the rest
    first.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.compare and args.model != "moe":
        parser.error("argument --compare: expected --model moe to compare with")
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not allowed with --resume")
    if args.hidden_size % (2 * args.heads):
        wanted = f"a multiple of 2 * heads = {2 * args.heads}"
        parser.error(f"argument --hidden-size: is {args.hidden_size}, expected {wanted}")
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: is {args.top_k}, expected {args.experts} (--experts) at most")
    for name in ("lr", "clip", "temperature"):
        if getattr(args, name) == 0:
            parser.error(f"argument --{name}: is 0, expected a number above 0")
    return args


def recipe_of(args: argparse.Namespace, corpus: Corpus) -> Recipe:
    """The recipe that the options ask for."""
    model = ModelConfig(
        mlp=args.model,
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=args.heads,
        experts=args.experts,
        top_k=args.top_k,
        expert_size=args.expert_size,
        aux_loss_coeff=args.aux_loss,
        z_loss_coeff=args.z_loss,
    )
    return Recipe.from_arguments(args, model, corpus.fingerprint)


def run(args: argparse.Namespace, world: World, interrupt: Interrupt) -> None:
    """Train what was asked for, one model after the other, and report.

    Raises:
        Stopped, JobError: see :func:`train`.
    """
    if args.batch_size % world.size:
        raise JobError("--batch-size", args.batch_size, f"a multiple of {world.size}, the number of processes")
    console = Console(quiet=not world.is_main, markup=False, highlight=False, soft_wrap=True)
    corpus = load_corpus(args.text, seq_len=args.seq_len)
    console.print(
        f"text: {len(corpus.train):,} bytes of {len(corpus.train_files)} files to train on, "
        f"{len(corpus.heldout):,} bytes of {len(corpus.heldout_files)} files held out"
    )
    recipes = [recipe_of(args, corpus)]
    if args.compare:
        # Equal in everything but the MLP: width, depth, text and its order, batch, schedule, learning rate, seed.
        recipes.append(replace(recipes[0], model=replace(recipes[0].model, mlp=args.compare)))
    if world.is_main:
        for recipe in recipes:
            prepare_folder(args.out / recipe.model.mlp, resume=args.resume, overwrite=args.overwrite)
    world.barrier()
    results = [train(recipe, corpus, args, world, console, interrupt) for recipe in recipes]
    if world.is_main:
        print_report(console, results)
        facts = {"text_paths": [str(path) for path in args.text], "device": str(world.device), "processes": world.size}
        written = write_report(args.out, results, {**recipes[0].flat(), **facts})
        console.print("written: " + ", ".join(map(str, written)))


def main(argv: list[str] | None = None) -> int:
    """Run the job.

    Returns:
        The exit code: 0; 2 for options, a text or a checkpoint that do not fit; 128 + the signal's number if stopped.
    """
    args = parse(argv)
    return exit_code_of("train_moe_lm", args.device, partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
