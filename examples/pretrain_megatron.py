"""Pre-train a small GPT of Megatron-core on real text, with the experts of this library.

    torchrun --nproc-per-node 2 -m examples.pretrain_megatron --ep 2             experts spread over two ranks
    torchrun --nproc-per-node 2 -m examples.pretrain_megatron --tp 2             matrices and the sequence split
    torchrun --nproc-per-node 2 -m examples.pretrain_megatron --pp 2             layers split
    torchrun --nproc-per-node 4 -m examples.pretrain_megatron --tp 2 --ep 2      both, of four ranks
    python -m examples.pretrain_megatron                                         the same job, alone
    python -m examples.pretrain_megatron --experts megatron                      with Megatron's own experts

What makes the difference is the line marked with ``<--``; the rest is Megatron as ever: its spec, its ``GPTModel``,
its data parallelism, schedules, distributed optimizer and checkpoints. The text is the source code of Python's standard
library, one token per byte; whole files are held out to test on. What was trained is saved to ``--out`` as a
distributed checkpoint and loaded into a model with Megatron's own experts, which give the same loss.

gloo joins CPUs (through ``lm/megatron_on_cpu.py``), NCCL joins GPUs. Needs ``megatron-core`` 0.16.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import sonic.megatron
from examples.lm.data import Corpus, heldout_windows, load_corpus, training_batch
from examples.lm.megatron_on_cpu import RMSNorm, make_parallel, names_of_transformer_engine, on_cpu_devices, run_on_cpu
from examples.lm.options import HelpFormatter, number, whole
from sonic.routing import TokenRounding

VOCABULARY = 256  # bytes


def make_config(args: argparse.Namespace) -> Any:
    """What Megatron is asked for."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        ffn_hidden_size=2 * args.hidden_size,
        moe_ffn_hidden_size=args.expert_size,
        num_moe_experts=args.num_experts,
        moe_router_topk=2,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tp,
        sequence_parallel=args.tp > 1,
        expert_model_parallel_size=args.ep,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )


def make_model(args: argparse.Namespace, config: Any, *, experts: str) -> Any:
    """This rank's stage of a GPT."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    if experts == "sonic":
        router = partial(TokenRounding, tile_rows=args.tile_rows) if args.round else None
        sonic.megatron.enable(fused_layer=True, router=router)  # <-- specs that are built from here on have them
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    sonic.megatron.disable()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    block = TransformerBlockSubmodules(layer_specs=[layer] * (args.layers // args.pp), layer_norm=RMSNorm)
    if args.ladder:
        sonic.megatron.use_ladder(block)
    model = GPTModel(
        config,
        block,
        vocab_size=VOCABULARY,
        max_sequence_length=args.seq_len,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model.to(torch.device("cuda") if torch.cuda.is_available() else "cpu")


def run_batches(args: argparse.Namespace, model: nn.Module, batches: list[Tensor], *, train: bool) -> float:
    """Forward, and with ``train`` backward, of one window batch (B, S + 1) after the other, by Megatron's schedule.

    Returns:
        The mean loss over batches and data-parallel ranks, on all ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    mask = torch.ones(1, 1, args.seq_len, args.seq_len, dtype=torch.bool, device=device).triu(1)
    positions = torch.arange(args.seq_len, device=device)

    def forward_step(windows: Iterator[Tensor], model: nn.Module) -> Any:
        window = next(windows).to(device)
        inputs = {
            "input_ids": window[:, :-1],
            "labels": window[:, 1:],
            "position_ids": positions.expand(len(window), -1),
        }

        def mean_loss(out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = out.float().mean()
            return loss, {"loss": loss.detach().clone()}

        return model(**inputs, attention_mask=mask), mean_loss

    told = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=args.seq_len,
        micro_batch_size=len(batches[0]),
        forward_only=not train,
    )
    loss = torch.stack([entry["loss"] for entry in told]).mean() if told else torch.zeros((), device=device)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(loss, group=group)
    if args.pp > 1:  # the last stage knows it
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(loss, last, group=parallel_state.get_pipeline_model_parallel_group())
    return loss.item() / group.size()


def pretrain(args: argparse.Namespace, corpus: Corpus) -> tuple[float, float]:
    """Train, save, load with Megatron's experts. Returns held-out bits per byte of both models."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

    config = make_config(args)
    model = make_model(args, config, experts=args.experts)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    say(f"{dist.get_world_size()} ranks: tp {args.tp}, pp {args.pp}, dp {ranks}, ep {args.ep}")
    for name, report in sonic.megatron.explain(model).items():
        say(f"{name}: {report.kind}, {report.activation}; {report.route}; {report.router}")
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), model
    )
    settings = {"optimizer": "adam", "lr": args.lr, "weight_decay": 0.1, "clip_grad": 1.0}
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings, use_distributed_optimizer=True), [ddp])
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss

    def windows(step: int) -> list[Tensor]:
        share = {"batch_size": args.batch_size, "seq_len": args.seq_len, "rank": rank, "world_size": ranks}
        return list(training_batch(corpus.train, seed=args.seed, step=step, **share).chunk(args.micro_batches))

    def heldout(model: nn.Module) -> float:
        model.eval()
        text = heldout_windows(corpus.heldout, count=args.batch_size, seq_len=args.seq_len)
        with torch.no_grad():
            loss = run_batches(args, model, list(text.chunk(args.micro_batches)), train=False)
        model.train()
        return loss / math.log(2)

    start = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.steps // 10))
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = run_batches(args, ddp, windows(step), train=True)
        optimizer.step()
        clear_aux_losses_tracker()
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            say(f"step {step:4d}  {loss / math.log(2):.4f} bits per byte  {time.perf_counter() - start:6.1f} s")
    trained = heldout(ddp)
    say(f"held out: {trained:.4f} bits per byte")

    folder = args.out / "checkpoint"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    with contextlib.redirect_stdout(None):
        dist_checkpointing.save(model.sharded_state_dict(), str(folder))
    plain = argparse.Namespace(**{**vars(args), "round": False})
    loaded = make_model(plain, make_config(args), experts="megatron")
    loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), str(folder)))
    again = heldout(loaded)
    say(f"loaded from {folder} into Megatron's own experts: {again:.4f} bits per byte")
    return trained, again


def say(line: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(line, flush=True)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Of what torchrun started, or of one process alone; on a CPU with what Megatron needs there."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if on_gpu else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        if on_gpu:
            with names_of_transformer_engine():
                yield
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
            with torch.compiler.set_stance("force_eager"), run_on_cpu(), on_cpu_devices():
                yield
    finally:
        dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="pretrain_megatron",
        description="Pre-train a small GPT of Megatron-core with the experts of this library.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model and fewer steps")
    add("--text", nargs="+", type=Path, metavar="PATH", default=[], help="files, folders; none: Python's own sources")
    add("--experts", choices=("sonic", "megatron"), default="sonic", help="whose")
    add("--round", action="store_true", help="token rounding in training")
    add("--tile-rows", type=whole, metavar="M", default=16, help="rows per tile, with --round")
    add("--ladder", action="store_true", help="wire the layers as Ladder Residual")
    for name, what in (("tp", "tensor- and sequence"), ("ep", "expert"), ("pp", "pipeline")):
        add(f"--{name}", type=whole, metavar="N", default=1, help=f"{what}-parallel ranks")
    add("--layers", type=whole, metavar="N", default=4, help="number of layers")
    add("--hidden-size", type=whole, metavar="N", default=128, help="width of the model")
    add("--expert-size", type=whole, metavar="N", default=128, help="width of one expert")
    add("--num-experts", type=whole, metavar="N", default=8, help="experts per layer")
    add("--seq-len", type=whole, metavar="N", default=128, help="bytes per window")
    add("--batch-size", type=whole, metavar="N", default=16, help="windows per step, of all ranks together")
    add("--micro-batches", type=whole, metavar="N", default=2, help="per step and data-parallel rank")
    add("--steps", type=whole, metavar="N", default=200, help="optimizer steps")
    add("--lr", type=number, metavar="X", default=2e-3, help="highest learning rate")
    add("--seed", type=int, metavar="N", default=0, help="of the first weights and of the order of the text")
    add("--out", type=Path, metavar="PATH", default=Path("report/megatron"), help="where the checkpoint goes")
    args = parser.parse_args(argv)
    if args.quick:
        args.layers, args.hidden_size, args.expert_size, args.seq_len = 2, 32, 32, 32
        args.batch_size, args.steps = 8, 30
    if args.hidden_size % 4:
        parser.error(f"argument --hidden-size: is {args.hidden_size}, expected a multiple of 4, the heads")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    shared = math.lcm(args.tp * args.pp, args.ep * args.pp)
    if ranks % shared:
        parser.error(f"argument --tp: {ranks} processes, expected a multiple of {shared} for these --tp, --ep and --pp")
    if args.layers % args.pp:
        parser.error(f"argument --pp: is {args.pp}, expected a divisor of the {args.layers} layers")
    share = ranks // (args.tp * args.pp) * args.micro_batches
    if args.batch_size % share:
        wanted = f"a multiple of {share}: data-parallel ranks times micro-batches"
        parser.error(f"argument --batch-size: is {args.batch_size}, expected {wanted}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the job. Returns the exit code: 0, or 1 if the loaded model is another one."""
    args = parse(argv)
    warnings.simplefilter("ignore")  # Megatron says a lot about what is not installed
    logging.disable(logging.WARNING)
    corpus = load_corpus(args.text, seq_len=args.seq_len)
    with process_group():
        make_parallel(
            args.seed,
            tensor_model_parallel_size=args.tp,
            expert_model_parallel_size=args.ep,
            expert_tensor_parallel_size=1,
            pipeline_model_parallel_size=args.pp,
        )
        trained, again = pretrain(args, corpus)
    return 0 if abs(trained - again) < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
