"""Compare routings: train one small language model under each of them, from the same seeds on the same text.

    python -m examples.routing_ablation                                 all routings, three seeds each: half an hour
    python -m examples.routing_ablation --quick                         a first look, five minutes on two CPU cores
    python -m examples.routing_ablation --routings topk nearest up      some of them
    python -m examples.routing_ablation --seeds 5                       more seeds: what is finished stays
    python -m examples.routing_ablation --workers 2                     two runs at a time

Token rounding fills whole tiles of a grouped GEMM as it trains, so that none of the rows that the hardware computes is
padding; expert choice and capacity limits move or drop tokens to balance the experts; a bias per expert balances them
without a loss. What does each of them cost in the quality of the model? All models are measured with plain, causal
top-K, which is how they would be served.

The folder ``--out`` gets a page of tables, table.md, with ``summary.json``, ``heldout.png``, ``loss_curves.png`` and
``padding_quality.png``; and for each run a folder ``runs/<routing>/seed_<n>/`` with ``metrics.jsonl``, ``model.pt`` and
``result.json``, which is written last: a run with a ``result.json`` is finished.

Ctrl-C writes a checkpoint and leaves. The same command then skips what is finished and goes on within the run that was
stopped, to the very losses that an unbroken run would have seen: bit for bit on a CPU, with as many threads.

Where to look: ``lm/routers.py`` builds the routers; ``lm/ablation.py`` says which are compared, and boils their logs
down; ``lm/ablation_report.py`` draws. This file holds the options and the loop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from examples.lm.ablation import BASELINE, VARIANTS, RunResult, as_dict, result_of, tiles_of
from examples.lm.ablation_report import print_table, write_report
from examples.lm.checkpoint import (
    append_metrics,
    cut_metrics,
    newest_checkpoint,
    read_metrics,
    write_whole,
    written_whole,
)
from examples.lm.data import Corpus, heldout_windows, load_corpus
from examples.lm.display import Progress, RunsDisplay
from examples.lm.errors import JobError
from examples.lm.evaluate import bits_per_byte
from examples.lm.job import Stopped, exit_code_of
from examples.lm.model import ModelConfig
from examples.lm.options import HelpFormatter, number, whole
from examples.lm.routers import routed_as_in_training
from examples.lm.trainer import Recipe, Trainer
from examples.lm.workers import in_parallel
from examples.lm.world import Interrupt, World

# Both give an expert 256 rows on average, two tiles of 128; the rate is the demo's of train_moe_lm.
FULL: dict[str, Any] = {
    **{"hidden_size": 128, "layers": 2, "heads": 4, "experts": 16, "top_k": 2, "expert_size": 128},
    **{"seq_len": 128, "batch_size": 16, "steps": 500, "lr": 3e-3, "eval_every": 100, "eval_windows": 512},
    **{"out": Path("report/routing_ablation")},
}
QUICK: dict[str, Any] = {
    **FULL,
    **{"hidden_size": 64, "heads": 2, "expert_size": 64, "steps": 150, "eval_every": 50, "eval_windows": 256},
    **{"out": Path("report/routing_ablation_quick")},
}
SEEDS = 3
QUICK_SEEDS = {BASELINE: 3, "nearest": 3}  # of the others, 1


@dataclass(frozen=True)
class Run:
    """One run: a routing with a seed. ``folder`` holds all that it writes."""

    variant: str
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """As people read it."""
        return f"{VARIANTS[self.variant].label}, seed {self.recipe.seed}"

    def finished(self) -> RunResult | None:
        """The result, if the run came to its end."""
        path = self.folder / "result.json"
        return RunResult(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def seeds_of(args: argparse.Namespace) -> dict[str, int]:
    """Number of seeds by routing."""
    few = QUICK_SEEDS if args.quick else dict.fromkeys(VARIANTS, SEEDS)
    return {name: args.seeds or few.get(name, 1) for name in VARIANTS if name in args.routings}


def plan_runs(args: argparse.Namespace, text: str) -> list[Run]:
    """The runs that the options ask for, seed by seed: whoever stops early has all routings of the first seeds.

    Args:
        args: the options.
        text: fingerprint of the corpus.

    Raises:
        JobError: the tiles of a routing are no whole number of rows.
    """
    sizes = {"tokens": args.batch_size * args.seq_len, "top_k": args.top_k, "experts": args.experts}
    tiles = tiles_of(args.routings, **sizes)
    seeds = seeds_of(args)
    runs = []
    for seed in range(max(seeds.values())):
        for name in (name for name in seeds if seed < seeds[name]):
            model = ModelConfig(
                mlp="moe",
                hidden_size=args.hidden_size,
                layers=args.layers,
                heads=args.heads,
                experts=args.experts,
                top_k=args.top_k,
                expert_size=args.expert_size,
                aux_loss_coeff=args.aux_loss,
                z_loss_coeff=args.z_loss,
                routing=VARIANTS[name].routing,
                tile_rows=tiles[name],
            )
            recipe = Recipe(
                model=model,
                text=text,
                seq_len=args.seq_len,
                batch_size=args.batch_size,
                steps=args.steps,
                warmup_steps=max(1, args.steps // 20),
                lr=args.lr,
                weight_decay=0.1,
                clip=1.0,
                dtype="fp32",
                seed=seed,
            )
            folder = args.out / "runs" / name / f"seed_{seed}"
            runs.append(Run(name, recipe, folder))
    return runs


def shared_recipe(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What all runs of a folder have in common: the recipe without routing and seed, and how it is measured."""
    own = ("routing", "tile_rows", "seed", "mlp")
    fields = {name: value for name, value in run.recipe.flat().items() if name not in own}
    return {**fields, "eval_every": args.eval_every, "eval_windows": args.eval_windows}


def prepare_folder(args: argparse.Namespace, shared: dict[str, Any]) -> None:
    """Make the folder, and note in it what its runs have in common; refuse one whose runs have something else.

    Raises:
        JobError: it holds runs of another recipe and is not to be overwritten; or no folder can be made.
    """
    note = args.out / "recipe.json"
    if args.overwrite and note.exists():  # without it the runs are not ours to remove
        if (args.out / "runs").is_dir():
            shutil.rmtree(args.out / "runs")
        note.unlink()
    if note.exists():
        written = json.loads(note.read_text(encoding="utf-8"))
        for field in sorted(written.keys() | shared.keys()):
            if written.get(field) != shared.get(field):
                wanted = f"{shared.get(field)} as in this command; or name another --out, or --overwrite these runs"
                raise JobError(f"{field} of the runs in {args.out}", written.get(field), wanted)
    elif (args.out / "runs").exists():
        raise JobError("--out", f"{args.out}, which has a folder runs of something else", "another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(shared, indent=2) + "\n")
    except OSError as error:
        raise JobError("--out", f"{args.out} ({error.strerror})", "a folder to write to") from error


def train(
    run: Run,
    corpus: Corpus,
    args: argparse.Namespace,
    world: World,
    progress: Progress,
    is_asked_to_stop: Callable[[], bool],
) -> RunResult | None:
    """Train to the last step, from the newest checkpoint on, measure, and record the result whole.

    Returns:
        The result; None if it was asked to stop on the way, when the checkpoint is written.

    Raises:
        JobError: a checkpoint of another recipe lies in the folder.
    """
    recipe, metrics = run.recipe, run.folder / "metrics.jsonl"
    run.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, corpus, world)
    latest = newest_checkpoint(run.folder, warn=progress.print)
    if latest is not None:
        trainer.load(latest)
    cut_metrics(metrics, trainer.step)
    if len(read_metrics(metrics)) < trainer.step:
        progress.print(f"{metrics} lacks steps that its checkpoint has behind it: the run starts anew")
        trainer = Trainer(recipe, corpus, world)
        cut_metrics(metrics, 0)
    progress.begin(run.name, trainer.step)
    windows = heldout_windows(corpus.heldout, count=args.eval_windows, seq_len=recipe.seq_len)

    def heldout_bits() -> float:
        return bits_per_byte(trainer.model, windows, batch_size=recipe.batch_size, precision=trainer.precision)

    while trainer.step < recipe.steps:
        figures, stop = trainer.train_step(stop=is_asked_to_stop())
        last = trainer.step == recipe.steps
        if last or trainer.step % args.eval_every == 0:
            figures["heldout_bits_per_byte"] = heldout_bits()
        save = last or stop or trainer.step % args.save_every == 0
        append_metrics(metrics, figures, durable=save)  # a checkpoint must not be ahead of its log
        if save:
            trainer.save(run.folder)
        progress.update(run.name, figures)
        if stop and not last:
            progress.print(f"stopped in {run.name}, after step {trainer.step} of {recipe.steps}")
            return None
    leaky = None
    if VARIANTS[run.variant].routing == "expert_choice":
        with routed_as_in_training(trainer.model):
            leaky = heldout_bits()
    result = result_of(
        read_metrics(metrics),
        variant=run.variant,
        seed=recipe.seed,
        tile_rows=recipe.model.tile_rows,
        tokens=recipe.tokens_per_step,
        top_k=recipe.model.top_k,
        heldout_leaky=leaky,
    )
    with written_whole(run.folder / "model.pt") as file:
        torch.save({"config": recipe.flat(), "model": trainer.model.state_dict()}, file)
    write_whole(run.folder / "result.json", json.dumps(as_dict(result), indent=2) + "\n")
    for checkpoint in run.folder.glob(
        "step_*.pt"
    ):  # with the optimizer's state thrice as large, and of no use any more
        checkpoint.unlink()
    return result


def train_alone(
    args: argparse.Namespace, run: Run, progress: Progress, is_asked_to_stop: Callable[[], bool]
) -> RunResult | None:
    """:func:`train` in a process of its own, which reads the text itself.

    Raises:
        JobError: as :func:`train`, or the text has changed since the runs were planned.
    """
    corpus = load_corpus(args.text, seq_len=args.seq_len)
    if corpus.fingerprint != run.recipe.text:
        raise JobError("--text", f"{corpus.fingerprint} by now", f"{run.recipe.text}, as it was when the runs began")
    with World(args.device) as world, quiet_rounding():
        return train(run, corpus, args, world, progress, is_asked_to_stop)


@contextmanager
def quiet_rounding() -> Iterator[None]:
    """Inside: no warnings of tiles that are large for so few tokens. They are among what is compared."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sonic.routing.TokenRounding: experts have")
        yield


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options. Exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="routing_ablation",
        description="Train a small language model under several routings, and compare what they come to.",
        formatter_class=HelpFormatter,
    )
    count: dict[str, Any] = {"type": whole, "metavar": "N"}
    amount: dict[str, Any] = {"type": number, "metavar": "X"}
    add = parser.add_argument_group("what to compare").add_argument
    add("--quick", action="store_true", help="a smaller model, fewer steps, and one seed for most routings")
    names = ", ".join(VARIANTS)
    add(
        "--routings", nargs="+", choices=list(VARIANTS), metavar="NAME", default=[], help=f"of {names}; none named: all"
    )
    add("--seeds", **count, help=f"seeds per routing, 0 to N - 1; if not given, {SEEDS}, or what --quick says")
    add(
        "--text", nargs="+", type=Path, metavar="PATH", default=[], help="files and folders; none: Python's own sources"
    )
    add = parser.add_argument_group("model").add_argument
    add("--hidden-size", **count, help="width of the model")
    add("--layers", **count, help="number of blocks")
    add("--heads", **count, help="attention heads")
    add("--experts", **count, help="experts per layer")
    add("--top-k", **count, help="experts per token")
    add("--expert-size", **count, help="width of one expert")
    add("--aux-loss", **amount, default=0.01, help="weight of the load-balancing loss, where a routing has it")
    add("--z-loss", **amount, default=0.001, help="weight of the router's z-loss, where a routing has it")
    add = parser.add_argument_group("training").add_argument
    add("--seq-len", **count, help="bytes per window")
    add("--batch-size", **count, help="windows per step")
    add("--steps", **count, help="optimizer steps of each run")
    add("--lr", **amount, help="highest learning rate")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")
    add("--workers", **count, default=1, help="runs at a time; they share the cores, and end sooner than one by one")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, help="folder for the runs and the report")
    add("--overwrite", action="store_true", help="remove the runs that --out holds, and start anew")
    add("--save-every", **count, default=100, help="steps between checkpoints")
    add("--eval-every", **count, help="steps between held-out measurements")
    add("--eval-windows", **count, help="held-out windows to measure on")

    first = argparse.ArgumentParser(prog=parser.prog, add_help=False)  # it has to be known before the rest
    first.add_argument("--quick", action="store_true")
    parser.set_defaults(**(QUICK if first.parse_known_args(argv)[0].quick else FULL))
    args = parser.parse_args(argv)
    if args.hidden_size % (2 * args.heads):
        wanted = f"a multiple of 2 * heads = {2 * args.heads}"
        parser.error(f"argument --hidden-size: is {args.hidden_size}, expected {wanted}")
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: is {args.top_k}, expected {args.experts} (--experts) at most")
    if args.lr == 0:
        parser.error("argument --lr: is 0, expected a number above 0")
    if len(set(args.routings)) < len(args.routings):
        parser.error(f"argument --routings: is {' '.join(args.routings)}, expected each of them once")
    args.routings = args.routings or list(VARIANTS)
    return args


def remark(args: argparse.Namespace) -> str:
    """What a reader has to know of runs that were cut short; empty for a full study."""
    if not args.quick:
        return ""
    several = [f"{count} seeds of {VARIANTS[name].label}" for name, count in seeds_of(args).items() if count > 1]
    return (
        f"A quick look, no result: {args.layers} layers of width {args.hidden_size} (full: {FULL['layers']} of width "
        f"{FULL['hidden_size']}); {args.steps} steps (full: {FULL['steps']}); {args.eval_windows} held-out windows "
        f"(full: {FULL['eval_windows']}); {', '.join([*several, 'one of the others'])} "
        f"(full: {SEEDS} of each). A difference of one pair of runs may be chance."
    )


def do(
    runs: list[Run],
    corpus: Corpus,
    args: argparse.Namespace,
    world: World,
    display: RunsDisplay,
    is_asked_to_stop: Callable[[], bool],
) -> dict[Run, RunResult]:
    """Do runs, ``args.workers`` at a time, until all are finished or it is asked to stop; returns what is finished."""
    workers = min(args.workers, len(runs))
    if workers > 1:
        work = partial(train_alone, args)
        found = in_parallel(work, runs, workers=workers, progress=display, is_asked_to_stop=is_asked_to_stop)
        return {run: result for run, result in zip(runs, found, strict=True) if result is not None}
    results = {}
    for run in runs:
        if is_asked_to_stop():
            break
        with quiet_rounding():
            result = train(run, corpus, args, world, display, is_asked_to_stop)
        if result is None:
            break
        results[run] = result
    return results


def run(args: argparse.Namespace, world: World, interrupt: Interrupt) -> None:
    """Do the runs that are not finished, and report on all that were asked for.

    Raises:
        Stopped: after a signal, when the checkpoints are written.
        JobError: see :func:`train`; a text or a folder that does not fit.
    """
    if world.size > 1:
        raise JobError("the number of processes", world.size, "1: it is no job for torchrun")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    corpus = load_corpus(args.text, seq_len=args.seq_len)
    runs = plan_runs(args, corpus.fingerprint)
    shared = shared_recipe(args, runs[0])
    prepare_folder(args, shared)
    results = {one: result for one in runs if (result := one.finished())}
    open_runs = [one for one in runs if one not in results]
    console.print(
        f"runs: {len(runs)} of {args.steps} steps of {args.batch_size * args.seq_len:,} tokens, {len(results)} of them "
        f"finished; routings: {', '.join(seeds_of(args))}; in {args.out}"
    )
    if remark(args):
        console.print(remark(args))
    with RunsDisplay(console, runs=len(runs), finished=len(results), steps=args.steps) as display:
        results.update(do(open_runs, corpus, args, world, display, lambda: interrupt.signum != 0))
    if len(results) < len(runs):
        console.print(f"finished: {len(results)} of {len(runs)} runs; the same command goes on, without --overwrite")
        raise Stopped(interrupt.signum)
    finished = [results[one] for one in runs]
    print_table(console, finished)
    logs = {(one.variant, one.recipe.seed): read_metrics(one.folder / "metrics.jsonl") for one in runs}
    facts = {**shared, "text_paths": [str(path) for path in args.text], "device": str(world.device)}
    written = write_report(args.out, finished, logs, facts, remark(args))
    console.print("written: " + ", ".join(map(str, written)))


def main(argv: list[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        The exit code: 0; 2 for options, a text or a folder that do not fit; 128 + the signal's number if stopped.
    """
    args = parse(argv)
    return exit_code_of("routing_ablation", args.device, partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
