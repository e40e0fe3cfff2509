"""A small GPT of Megatron-core, trained for a few steps on a CPU: what the tests of its face compare.

Nothing here is a test. Megatron is imported inside functions, so that this file can be read without it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.lm.megatron_on_cpu import RMSNorm, make_parallel, on_cpu_devices, run_on_cpu

VOCAB, SEQUENCE = 64, 16


@dataclass(frozen=True)
class World:
    """How many ranks share what.

    Attributes:
        tp, ep, etp, pp: tensor-, expert-, expert-tensor- and pipeline-parallel ranks; etp 0 means tp.
        config: fields of TransformerConfig that differ from :func:`make_config`'s.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    def start(self, seed: int = 0) -> None:
        """Megatron's process groups and random states."""
        make_parallel(
            seed,
            tensor_model_parallel_size=self.tp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            pipeline_model_parallel_size=self.pp,
        )

    def make_config(self, **more: Any) -> Any:
        """A TransformerConfig for this world."""
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "pipeline_model_parallel_size": self.pp,
            "sequence_parallel": self.tp > 1,
            "pipeline_dtype": torch.float32 if self.pp > 1 else None,
        }
        return make_config(**{**sizes, **self.config, **more})


@contextlib.contextmanager
def cpu_world() -> Iterator[None]:
    """:func:`run_on_cpu`, without what Megatron and torch warn of, and without compiling Megatron's small functions."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            with torch.compiler.set_stance("force_eager"), run_on_cpu():
                yield
        finally:
            logging.disable(disabled)
            _end_checkpoint_writer()


def _end_checkpoint_writer() -> None:
    """Megatron's writer of checkpoints starts a process that would outlive a rank."""
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    writer: Any = sys.modules.get(name)
    if writer is not None and writer._results_queue is not None:
        writer._results_queue._manager.shutdown()
        writer._results_queue = None


def make_config(**more: Any) -> Any:
    """A TransformerConfig that runs on a CPU: 2 layers of 4 experts, 2 per token."""
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
        **{"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2},
        **{"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False},
        **{"normalization": "RMSNorm", "hidden_dropout": 0.0, "attention_dropout": 0.0},
        **{"moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "aux_loss"},
        **{"moe_aux_loss_coeff": 0.01, "use_cpu_initialization": True, "init_method_std": 0.3},
    }
    fields |= more
    if fields["moe_router_load_balancing_type"] == "none":
        fields["moe_aux_loss_coeff"] = 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        return TransformerConfig(**fields)


def make_block(config: Any) -> Any:
    """The spec of a block of local modules, with norms that know sequence parallelism; of each stage its layers.

    ``moe_layer_freq``, if it is a list, says which layers are MoE layers.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    def layer_of(num_experts: int | None) -> Any:
        layer = get_gpt_layer_local_spec(
            num_experts=num_experts, moe_grouped_gemm=False, normalization=config.normalization
        )
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        return layer

    kinds = {1: layer_of(config.num_moe_experts), 0: layer_of(None)}
    which = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [1] * config.num_layers
    here = which[: config.num_layers // config.pipeline_model_parallel_size]
    return TransformerBlockSubmodules(layer_specs=[kinds[is_moe] for is_moe in here], layer_norm=RMSNorm)


def make_model(config: Any, spec: Any = None) -> nn.Module:
    """A GPTModel, or this rank's stage of it."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    get_moe_layer_wise_logging_tracker().clear()  # has a place for each layer of whoever trained first
    return GPTModel(
        config,
        make_block(config) if spec is None else spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def batch_of(step: int, micro_batch: int, rows: int = 2) -> dict[str, Tensor]:
    """Tokens of this data-parallel rank: (rows, SEQUENCE), and those that follow them."""
    from megatron.core import parallel_state

    place = 1000 * step + 10 * micro_batch + parallel_state.get_data_parallel_rank()
    tokens = torch.randint(VOCAB, (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(place))
    position = torch.arange(SEQUENCE).expand(rows, -1)
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": position}


def causal_mask() -> Tensor:
    """(1, 1, S, S), true where nothing is seen."""
    return torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    """The mean loss of one batch; without pipeline parallelism."""
    return model(**batch_of(step, 0), attention_mask=causal_mask()).float().mean()


class Trainer:
    """Megatron's data parallelism, schedule and optimizer around a model, two micro-batches a step.

    Attributes:
        ddp: the model, wrapped.
        optimizer: Megatron's Adam.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        *,
        distributed: bool = False,
        overlap: bool = False,
        lr: float = 3e-3,
    ) -> None:
        """
        Args:
            config: of the model.
            model: of :func:`make_model`.
            distributed: Megatron's distributed optimizer.
            overlap: reduce gradients while backward runs.
            lr: learning rate.
        """
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.config = config
        with on_cpu_devices():
            self.ddp = DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=overlap
                ),
                model,
            )
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=lr,
                    weight_decay=0.01,
                    clip_grad=1.0,
                    use_distributed_optimizer=distributed,
                ),
                [self.ddp],
            )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def step(self, step: int) -> float:
        """One step; returns the loss, averaged over the data-parallel ranks, equal on all ranks."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

        def forward_step(batches: Iterator[dict[str, Tensor]], model: nn.Module) -> Any:
            out = model(**next(batches), attention_mask=causal_mask())

            def mean_loss(out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss = out.float().mean()
                return loss, {"loss": loss.detach().clone()}

            return out, mean_loss

        with on_cpu_devices():
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            told = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([batch_of(step, micro_batch) for micro_batch in range(2)]),
                model=[self.ddp],
                num_microbatches=2,
                seq_length=SEQUENCE,
                micro_batch_size=2,
                forward_only=False,
            )
            self.optimizer.step()
            clear_aux_losses_tracker()
            loss = torch.stack([entry["loss"] for entry in told]).mean() if told else torch.zeros(())
            dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
            loss /= parallel_state.get_data_parallel_world_size()
            if self.config.pipeline_model_parallel_size > 1:
                dist.broadcast(
                    loss,
                    parallel_state.get_pipeline_model_parallel_last_rank(),
                    group=parallel_state.get_pipeline_model_parallel_group(),
                )
        return loss.item()


def train(config: Any, model: nn.Module, steps: int, **options: Any) -> list[float]:
    """The loss of each step of a :class:`Trainer` with these options."""
    trainer = Trainer(config, model, **options)
    return [trainer.step(step) for step in range(steps)]


def largest_difference(found: list[float], wanted: list[float]) -> float:
    """Of two runs' losses."""
    assert len(found) == len(wanted), "runs of as many steps"
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


def compare_runs(
    world: World, steps: int, enable: Callable[[], None], **options: Any
) -> tuple[float, list[float], list[float]]:
    """Train Megatron's own experts and those that ``enable`` puts into specs, from the same seed.

    Returns:
        The largest difference, and the losses of both runs, Megatron's first.
    """
    import sonic.megatron

    losses = []
    for ours in (False, True):
        sonic.megatron.disable()
        if ours:
            enable()
        world.start()
        config = world.make_config()
        losses.append(train(config, make_model(config), steps, **options))
    sonic.megatron.disable()
    return largest_difference(losses[1], losses[0]), losses[0], losses[1]
