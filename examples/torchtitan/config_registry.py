"""What ``--module examples.torchtitan --config small_moe`` names: a Qwen3-MoE small enough for CPUs, trained on bytes.

Everything here is torchtitan's, with nothing of ``sonic`` in it: the experts are chosen on the command line. The text
is the source code of Python's standard library.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw, register_moe_load_balancing_hook
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.qwen3 import Qwen3Model, parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

VOCABULARY = 256
NORMAL: dict[str, Callable[..., Any]] = {"weight": partial(nn.init.normal_, std=0.02)}


class Bytes(BaseTokenizer):
    """A token per byte."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, tokenizer_path: str = "") -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        """UTF-8."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """UTF-8, what is none replaced."""
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """256."""
        return VOCABULARY


class Windows(IterableDataset):
    """Windows of a text at random places, others on each rank."""

    def __init__(self, text: bytes, length: int, rank: int) -> None:
        self.text, self.length, self.rank = torch.frombuffer(bytearray(text), dtype=torch.uint8), length, rank

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and positions (L,), and the labels (L,)."""
        generator = torch.Generator().manual_seed(self.rank)
        while True:
            start = int(torch.randint(len(self.text) - self.length - 1, (), generator=generator))
            window = self.text[start : start + self.length + 1].long()
            yield {"input": window[:-1], "positions": torch.arange(self.length)}, window[1:]


class StandardLibrary(ParallelAwareDataloader):
    """The source code of Python's standard library, some three megabytes of it."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """torchtitan's."""

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"\n".join(path.read_bytes() for path in files)[:3_000_000]
        super().__init__(
            Windows(text, seq_len, dp_rank), dp_rank=dp_rank, dp_world_size=dp_world_size, batch_size=local_batch_size
        )


def small_model(
    *, width: int = 128, num_layers: int = 2, num_experts: int = 16, top_k: int = 2, expert_width: int = 64
) -> Qwen3Model.Config:
    """Qwen3-MoE of these sizes, from the parts that torchtitan has for its own."""

    def norm(size: int) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=size, eps=1e-6, param_init={"weight": nn.init.ones_})

    head = 32
    layers = [
        Qwen3TransformerBlock.Config(
            attention_norm=norm(width),
            ffn_norm=norm(width),
            attention=make_gqa_config(
                dim=width,
                n_heads=width // head,
                n_kv_heads=width // head // 2,
                head_dim=head,
                wqkv_param_init=NORMAL,
                wo_param_init=NORMAL,
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=CosSinRoPE.Config(dim=head, max_seq_len=1024, theta=1e6),
                qk_norm=norm(head),
            ),
            moe=make_moe_config(
                num_experts=num_experts,
                router=make_router_config(
                    dim=width,
                    num_experts=num_experts,
                    gate_param_init=NORMAL,
                    top_k=top_k,
                    score_func="softmax",
                    route_norm=True,
                ),
                routed_experts=make_routed_experts_config(
                    dim=width,
                    hidden_dim=expert_width,
                    num_experts=num_experts,
                    top_k=top_k,
                    param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), NORMAL["weight"]),
                    comm_backend="standard",
                ),
            ),
        )
        for _ in range(num_layers)
    ]
    return Qwen3Model.Config(
        vocab_size=VOCABULARY,
        dim=width,
        norm=norm(width),
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=width, param_init=NORMAL),
        lm_head=Linear.Config(in_features=width, out_features=VOCABULARY, param_init=NORMAL),
        layers=layers,
    )


def small_moe() -> Trainer.Config:
    """Some 800,000 parameters, 30 steps; every option of torchtitan's command line goes on top."""
    spec = ModelSpec(
        name="qwen3",
        flavor="small_moe",
        model=small_model(),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=None,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=None,
    )
    return Trainer.Config(
        model_spec=spec,
        tokenizer=Bytes.Config(),
        dataloader=StandardLibrary.Config(),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        metrics=MetricsProcessor.Config(log_freq=5),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=5),
        training=TrainingConfig(local_batch_size=8, seq_len=128, steps=30, disable_cuda_graphs=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=None,
    )
