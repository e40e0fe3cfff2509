"""Fine-tune a small Qwen3-MoE of Hugging Face transformers on real text, with the experts of this library.

    python -m examples.finetune_huggingface --quick                          well under a minute on two CPU cores
    python -m examples.finetune_huggingface --model ~/checkpoints/my-moe     any MoE checkpoint with a vocabulary >= 257
    python -m examples.finetune_huggingface --quick --experts grouped_mm     the same with transformers' own experts
    python -m examples.finetune_huggingface --quick --round                  token rounding in training
    torchrun --nproc-per-node 2 -m examples.finetune_huggingface --quick     data parallel, on CPUs (gloo) or GPUs

What makes the difference is the two lines marked with ``<--``; the rest is transformers as ever: ``from_pretrained``,
its ``Trainer``, ``save_pretrained``. The text is the source code of Python's standard library, one token per byte;
whole files are held out to test on. Without ``--model`` a random model is made and saved first, so that there is a
checkpoint to start from. What was trained is saved to ``--out`` and loaded again with transformers' "eager" experts,
which give the same loss.

Needs ``transformers`` and ``accelerate`` (for its ``Trainer``).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: let the imports below find the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import sonic
from examples.lm.data import Corpus, heldout_windows, load_corpus, training_batch
from examples.lm.errors import JobError
from examples.lm.options import HelpFormatter, number, whole
from sonic.routing import TokenRounding

VOCABULARY = 257  # bytes, and one token for padding


class Windows(torch.utils.data.Dataset):
    """Windows of the training text, the same ones for the same index."""

    def __init__(self, corpus: Corpus, *, count: int, seq_len: int) -> None:
        self.corpus, self.count, self.seq_len = corpus, count, seq_len

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (window,) = training_batch(self.corpus.train, seed=0, step=index, batch_size=1, seq_len=self.seq_len)
        return {"input_ids": window[:-1], "labels": window[:-1]}  # the model shifts the labels itself


def make_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """Save a random Qwen3-MoE, as a checkpoint to start from."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden_size // 4,
        intermediate_size=2 * args.hidden_size,
        moe_intermediate_size=args.hidden_size,
        num_experts=args.num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=args.seq_len,
        output_router_logits=True,  # adds transformers' own load-balancing loss
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(args.seed)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def load(folder: Path, experts: str) -> Any:
    """The checkpoint with these experts."""
    from transformers import AutoModelForCausalLM

    sonic.huggingface.enable()  # <-- offers "sonic" beside "eager" and "grouped_mm"
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts, dtype=torch.float32)  # <--


@torch.no_grad()
def bits_per_byte(model: Any, corpus: Corpus, args: argparse.Namespace) -> float:
    """The language-model loss on held-out text, without what the router adds."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    windows = heldout_windows(corpus.heldout, count=args.eval_windows, seq_len=args.seq_len).to(device)
    logits = model(input_ids=windows[:, :-1], output_router_logits=False, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    model.train(was_training)
    return loss.item() / math.log(2)


def finetune(args: argparse.Namespace, folder: Path) -> tuple[float, float, float | None]:
    """Train, save, load again. Returns held-out bits per byte before, after, and of what was loaded with "eager"
    experts (on the first process; None elsewhere)."""
    from transformers import Trainer, TrainingArguments

    corpus = load_corpus([], seq_len=args.seq_len)
    model = load(args.model or folder / "start", args.experts)
    if args.round:
        sonic.huggingface.replace_moe(model, router=partial(TokenRounding, tile_rows=args.tile_rows))
    before = bits_per_byte(model, corpus, args)
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(args.steps // 10, 1),
        logging_steps=max(args.steps // 8, 1),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
    )
    data = Windows(corpus, count=args.steps * args.batch_size * settings.world_size, seq_len=args.seq_len)
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    trainer.train()
    after = bits_per_byte(model, corpus, args)
    trainer.save_model(str(args.out))
    if not trainer.is_world_process_zero():
        return before, after, None
    return before, after, bits_per_byte(load(args.out, "eager"), corpus, args)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.steps, args.hidden_size, args.seq_len, args.batch_size = min(args.steps, 40), 64, 64, 8
    try:
        import accelerate  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        print(f"this example needs {error.name}: pip install transformers accelerate", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    rank = int(os.environ.get("RANK", "0"))
    with tempfile.TemporaryDirectory() as scratch:
        args.out = args.out or Path(scratch) / "trained"
        if args.model is None:
            make_checkpoint(Path(scratch) / "start", args)
        try:
            before, after, loaded = finetune(args, Path(scratch))
        except JobError as error:
            print(error, file=sys.stderr)
            return 2
    if rank == 0:
        print(f"experts {args.experts}{', token rounding' if args.round else ''}: held-out bits per byte")
        print(f"  before {before:.4f}   after {after:.4f}   saved and loaded with 'eager' experts {loaded:.4f}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune_huggingface",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and 40 steps")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; default: a random Qwen3-MoE")
    parser.add_argument("--out", type=Path, help="folder for the trained checkpoint; default: none is left")
    parser.add_argument("--experts", default="sonic", help="sonic, grouped_mm or eager")
    parser.add_argument("--round", action="store_true", help="token rounding in training, by replace_moe")
    parser.add_argument("--tile-rows", type=whole, default=16, help="tile of the rounding")
    parser.add_argument("--steps", type=whole, default=300, help="steps of the optimizer")
    parser.add_argument("--batch-size", type=whole, default=16, help="sequences per process and step")
    parser.add_argument("--seq-len", type=whole, default=128, help="bytes per sequence")
    parser.add_argument("--lr", type=number, default=3e-3, help="peak learning rate")
    parser.add_argument("--hidden-size", type=whole, default=128, help="of the random model")
    parser.add_argument("--layers", type=whole, default=2, help="of the random model")
    parser.add_argument("--num-experts", type=whole, default=16, help="of the random model")
    parser.add_argument("--eval-windows", type=whole, default=32, help="held-out sequences to test on")
    parser.add_argument("--seed", type=whole, default=1, help="of the random model and the Trainer")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
