"""Pre-train a small Mixture-of-Experts language model with FSDP-2: nothing is ever whole on a rank, not even at start.

    torchrun --nproc-per-node 2 -m examples.pretrain_fsdp                      weights sharded over two ranks
    torchrun --nproc-per-node 4 -m examples.pretrain_fsdp --ep 2               experts spread over two, sharded over two
    torchrun --nproc-per-node 4 -m examples.pretrain_fsdp --replicas 2         sharded over two, replicated over two
    torchrun --nproc-per-node 4 -m examples.pretrain_fsdp --ep 2 --resume      go on, on another mesh
    python -m examples.pretrain_fsdp                                           the same job, alone

gloo joins CPUs, NCCL joins GPUs. The model is ``lm/model.py``, which knows nothing of this; the text is that of
``train_moe_lm``, and so are the options. First weights and batches do not depend on the ranks, so any mesh gives
the same loss curve up to rounding.

A checkpoint exists whole or not at all. Ctrl-C writes one and leaves; a run that was killed loses the steps since its
last one; ``--resume`` goes on from there on any mesh. When a process dies, the others end within ``--timeout``.

Where to look: ``build`` is where ``sonic.fsdp`` is used, ``step`` is the training step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import sonic
import sonic.fsdp
from examples.lm.checkpoint import KEEP, append_metrics, cut_metrics, write_whole
from examples.lm.data import Corpus, heldout_windows, load_corpus, training_batch
from examples.lm.display import Display
from examples.lm.errors import JobError
from examples.lm.evaluate import bits_per_byte
from examples.lm.job import Stopped
from examples.lm.model import LanguageModel, ModelConfig, Output
from examples.lm.options import HelpFormatter
from examples.lm.parallel_run import AMOUNT, COUNT, add_output_options, prepare_folder, refuse, run_on_mesh
from examples.lm.parallel_world import MeshSizes, ParallelWorld
from examples.lm.trainer import Recipe, learning_rate
from examples.lm.world import Interrupt
from examples.train_moe_lm import PRESETS
from sonic.parallel import clip_grad_norm_
from sonic.routing import TopKRouter

PROGRAM = "pretrain_fsdp"


def build(recipe: Recipe, mesh: DeviceMesh) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """The model, which never lies whole anywhere, and its optimizer."""
    with torch.device("meta"):
        model = LanguageModel(recipe.model)  # no memory yet
    for module in model.modules():
        if isinstance(module, sonic.MoE):
            module.init = normal  # of an expert's matrix
        elif isinstance(module, TopKRouter):
            module.aux_loss_group = "world"  # the tokens of all ranks are balanced together
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sonic.fsdp.shard(model, mesh, mp_policy=policy if recipe.dtype == "bf16" else None)

    def draw(module: nn.Module) -> None:
        if module is model.head:
            nn.init.zeros_(model.head.weight)
        elif isinstance(module, (nn.Linear, TopKRouter)):
            normal(module.weight)

    sonic.fsdp.initialize(model, seed=recipe.seed, init=draw)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        *sonic.fsdp.parameter_groups(matrices, weight_decay=recipe.weight_decay),
        *sonic.fsdp.parameter_groups(scales, weight_decay=0.0),
    ]
    return model, torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def normal(matrix: Tensor) -> None:
    """Fill with a variance of 1 / fan-in."""
    nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)


class Job:
    """One model in training, on all ranks.

    Args:
        recipe: what to train.
        corpus: the text.
        world: the ranks.
        mesh: how the model lies on them.
        micro_batches: parts that each rank takes its windows of a step in; gradients are reduced with the last one.
    """

    def __init__(
        self, recipe: Recipe, corpus: Corpus, world: ParallelWorld, mesh: DeviceMesh, micro_batches: int
    ) -> None:
        self.recipe, self.corpus, self.world, self.micro_batches = recipe, corpus, world, micro_batches
        self.model, self.optimizer = build(recipe, mesh)
        self.done, self.seconds = 0, 0.0

    def step(self, stop: bool) -> tuple[dict[str, Any], bool]:
        """Take one step; returns its figures over all ranks, and whether any of them was asked to stop."""
        started, recipe, world, model = time.perf_counter(), self.recipe, self.world, self.model
        batch = training_batch(
            self.corpus.train,
            seed=recipe.seed,
            step=self.done,
            batch_size=recipe.batch_size,
            seq_len=recipe.seq_len,
            rank=world.rank,
            world_size=world.size,
        ).to(world.device)
        loss_sum = aux_sum = torch.zeros((), device=world.device)
        load = torch.zeros(recipe.model.layers, recipe.model.experts, device=world.device)
        for index, part in enumerate(batch.chunk(self.micro_batches)):
            model.set_requires_gradient_sync(index == self.micro_batches - 1)  # type: ignore[operator]
            output: Output = model(part[:, :-1])
            loss = F.cross_entropy(output.logits.flatten(0, 1), part[:, 1:].flatten())
            ((loss + output.aux_loss) / self.micro_batches).backward()
            loss_sum = loss_sum + loss.detach() / self.micro_batches
            aux_sum = aux_sum + output.aux_loss.detach() / self.micro_batches
            load += output.load
        norm = clip_grad_norm_(model.parameters(), recipe.clip)
        rate = learning_rate(recipe, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        # All that the ranks tell each other about the step travels in one small all-reduce.
        head = torch.stack((loss_sum, aux_sum, loss_sum.new_tensor(float(stop))))
        loss_all, aux_all, stops, *rows = world.sum(torch.cat((head, load.flatten()))).tolist()
        self.done += 1
        self.seconds += time.perf_counter() - started
        experts = recipe.model.experts
        return {
            "step": self.done,
            "loss": loss_all / world.size,
            "bits_per_byte": loss_all / world.size / math.log(2),
            "aux_loss": aux_all / world.size,
            "gradient_norm": norm.item(),
            "lr": rate,
            "seconds": self.seconds,
            "load": [[round(count) for count in rows[i : i + experts]] for i in range(0, len(rows), experts)],
        }, stops > 0

    def heldout_bits(self, windows: Tensor) -> float:
        """Held-out bits per byte."""
        off = torch.autocast(self.world.device.type, enabled=False)
        return bits_per_byte(self.model, windows, batch_size=self.recipe.batch_size, precision=off)

    def save(self, folder: Path) -> None:
        """Write a checkpoint, and remove all but the newest."""
        extra = {"step": self.done, "seconds": self.seconds, "config": self.recipe.flat()}
        sonic.fsdp.save(folder / f"step_{self.done:08d}", self.model, self.optimizer, extra=extra)
        if self.world.is_main:
            for old in [one for one in sorted(folder.glob("step_*")) if one.suffix == ""][:-KEEP]:
                shutil.rmtree(old)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            JobError: it is of another recipe.
        """
        try:
            extra = sonic.fsdp.load(path, self.model, self.optimizer)
        except ValueError as error:  # another model
            raise JobError("--resume", error, "a checkpoint of this model") from error
        wanted = json.loads(json.dumps(self.recipe.flat()))
        for field, value in wanted.items():
            if extra["config"].get(field) != value:
                raise JobError(f"{field} in {path}", extra["config"].get(field), f"{value} as in this run")
        self.done, self.seconds = extra["step"], extra["seconds"]


def train(job: Job, args: argparse.Namespace, console: Console, interrupt: Interrupt) -> None:
    """Train to the last step.

    Raises:
        Stopped: after a signal, when the checkpoint is written.
    """
    recipe, world, folder = job.recipe, job.world, args.out
    if args.resume:
        newest = next((one for one in sorted(folder.glob("step_*"), reverse=True) if sonic.fsdp.is_whole(one)), None)
        if newest is not None:
            job.load(newest)
        console.print(f"going on after step {job.done} ({newest or 'no checkpoint'})")
    world.barrier()  # all have read what there is before one writes
    if world.is_main:
        cut_metrics(folder / "metrics.jsonl", job.done)
    first, first_seconds = job.done, job.seconds
    windows = heldout_windows(job.corpus.heldout, count=args.eval_windows, seq_len=recipe.seq_len)
    count = sum(parameter.numel() for parameter in job.model.parameters())
    here = sum(parameter.to_local().numel() for parameter in job.model.parameters())  # type: ignore[operator]
    console.print(f"{count:,} parameters, {here:,} of them on this rank of {world.size}", style="bold")
    with Display(console, recipe.steps, recipe.tokens_per_step, world.device) as display:
        while job.done < recipe.steps:
            figures, stop = job.step(stop=interrupt.signum != 0)
            last = job.done == recipe.steps
            if last or job.done % args.eval_every == 0:
                figures["heldout_bits_per_byte"] = job.heldout_bits(windows)
            display.update(figures)
            save = last or stop or job.done % args.save_every == 0
            if world.is_main:
                append_metrics(folder / "metrics.jsonl", figures, durable=save)  # never behind its checkpoint
            if save:
                job.save(folder)
            if stop:
                console.print(f"stopped after step {job.done}; the same command with --resume goes on from there")
                raise Stopped(interrupt.signum or signal.SIGTERM)
    heldout = job.heldout_bits(windows)
    console.print(f"held-out bits per byte: {heldout:.4f}", style="bold")
    if job.done > first:
        speed = (job.done - first) * recipe.tokens_per_step / (job.seconds - first_seconds)
        console.print(f"training: {speed:,.0f} tokens/s")
    if world.is_main:
        summary = {"heldout_bits_per_byte": heldout, "steps": job.done, "seconds": job.seconds, **recipe.flat()}
        write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; the preset gives the defaults of the sizes. Exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Pre-train a small Mixture-of-Experts language model with FSDP-2.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("what to train").add_argument
    add("--preset", choices=sorted(PRESETS), default="demo", help="sizes: demo for CPU cores, small for GPUs")
    add(
        "--text", nargs="+", type=Path, metavar="PATH", default=[], help="files and folders; none: Python's own sources"
    )
    add = parser.add_argument_group("mesh").add_argument
    add("--ep", **COUNT, default=1, help="ranks that share the experts among them")
    add("--replicas", **COUNT, default=1, help="copies of the sharded model (hybrid sharding)")
    add("--timeout", **AMOUNT, default=60.0, help="seconds in which all ranks end when one is gone or stands still")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")
    add = parser.add_argument_group("model").add_argument
    add("--hidden-size", **COUNT, help="width of the model")
    add("--layers", **COUNT, help="number of blocks")
    add("--heads", **COUNT, help="attention heads")
    add("--experts", **COUNT, help="experts per layer")
    add("--top-k", **COUNT, help="experts per token")
    add("--expert-size", **COUNT, help="width of one expert")
    add("--aux-loss", **AMOUNT, default=0.01, help="weight of the load-balancing loss")
    add("--z-loss", **AMOUNT, default=0.001, help="weight of the router's z-loss")
    add = parser.add_argument_group("training").add_argument
    add("--seq-len", **COUNT, help="bytes per window")
    add("--batch-size", **COUNT, help="windows per step, of all processes together")
    add("--micro-batches", **COUNT, default=1, help="parts in which a rank takes its windows of a step")
    add("--steps", **COUNT, help="optimizer steps")
    add("--warmup-steps", **COUNT, help="steps of rising learning rate; if not given, a twentieth of all")
    add("--lr", **AMOUNT, help="highest learning rate")
    add("--weight-decay", **AMOUNT, default=0.1, help="on matrices")
    add("--clip", **AMOUNT, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=["bf16", "fp32"], help="weights are fp32; bf16: gathered and multiplied in bf16")
    add("--seed", type=int, metavar="N", default=0, help="of the first weights and of the order of the text")
    add_output_options(parser, "report/fsdp")

    first = argparse.ArgumentParser(prog=parser.prog, add_help=False)  # the preset has to be known before the rest
    first.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not allowed with --resume")
    if args.hidden_size % (2 * args.heads):
        wanted = f"a multiple of 2 * heads = {2 * args.heads}"
        parser.error(f"argument --hidden-size: is {args.hidden_size}, expected {wanted}")
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: is {args.top_k}, expected {args.experts} (--experts) at most")
    for name in ("lr", "clip", "timeout"):
        if getattr(args, name) == 0:
            parser.error(f"argument --{name}: is 0, expected a number above 0")
    return args


def check_ranks(args: argparse.Namespace) -> MeshSizes:
    """The ranks that the options ask for.

    Raises:
        JobError: they do not divide the processes, or the batch.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.ep > 1 and args.replicas > 1:
        raise JobError("--replicas", f"{args.replicas} with --ep {args.ep}", "one of the two")
    if num_ranks % (args.ep * args.replicas):
        name = "--ep" if args.ep > 1 else "--replicas"
        raise JobError(name, args.ep * args.replicas, f"a divisor of {num_ranks}, the number of processes")
    if args.batch_size % (num_ranks * args.micro_batches):
        wanted = f"a multiple of {num_ranks} processes times {args.micro_batches} micro-batches"
        raise JobError("--batch-size", args.batch_size, wanted)
    return MeshSizes.of(num_ranks, tp=1, ep=args.ep)


def main(argv: list[str] | None = None) -> int:
    """Run the job.

    Returns:
        The exit code: 0; 2 for options, a text or a checkpoint that do not fit; 128 + the signal's number if stopped; 1
        if another process is gone.
    """
    args = parse(argv)
    try:  # what every rank finds out by itself, before they wait for each other
        sizes = check_ranks(args)
        corpus = load_corpus(args.text, seq_len=args.seq_len)
    except JobError as error:
        return refuse(PROGRAM, error)
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
    )
    recipe = Recipe.from_arguments(args, model, corpus.fingerprint)

    def job(world: ParallelWorld, interrupt: Interrupt, console: Console) -> None:
        if world.is_main:
            prepare_folder(args.out, resume=args.resume, overwrite=args.overwrite)
        world.barrier()
        if world.size == 1:  # FSDP wants a group, also of one
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        kind = world.device.type
        if args.ep > 1:
            mesh = init_device_mesh(kind, (sizes.dp, sizes.ep), mesh_dim_names=("dp", "ep"))
        elif args.replicas > 1:
            shape = (args.replicas, world.size // args.replicas)
            mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (world.size,))
        try:
            train(Job(recipe, corpus, world, mesh, args.micro_batches), args, console, interrupt)
        finally:
            if world.size == 1:
                dist.destroy_process_group()

    return run_on_mesh(PROGRAM, args, sizes, job)


if __name__ == "__main__":
    sys.exit(main())
