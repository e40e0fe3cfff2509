"""Under the parallel plans of transformers: tensor, expert and fully sharded, two processes on gloo."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonic
from benchmarks.huggingface_models import batch, build_model
from sonic.routing import TokenRounding
from tests.distributed import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

PLANS = {
    "tensor": {"tp_size": 2},
    "tensor and expert": {"tp_size": 2, "ep_size": 2},
    "fully sharded": {"fsdp_size": 2},
    "fully sharded and expert": {"fsdp_size": 2, "ep_size": 2},
}


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Loss and whole gradients in training; logits without gradients, which expert parallelism computes otherwise."""
    model.train().zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return {"loss": loss.detach(), "logits": whole(model.eval()(ids, use_cache=False).logits), **grads}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], case: str) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert off < 4e-6, f"{case}: {name} is off by {off:.1e}"


def check_plans(rank: int, folder: str, model_type: str) -> None:
    import transformers
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, DistributedConfig

    transformers.logging.set_verbosity_error()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    sonic.huggingface.enable()
    ids = batch()  # the same on both ranks, so that a mean over them changes nothing

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)

    wanted = step(load(experts_implementation="eager"), ids)
    for name, plan in PLANS.items():
        model = load(experts_implementation="sonic", distributed_config=DistributedConfig(**plan), device_map=None)
        assert_same(step(model, ids), wanted, f"{model_type}, {name}")
        is_expert_parallel = "ep_size" in plan
        experts = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
        assert len(experts) == 2 and all(module._is_expert_parallel == is_expert_parallel for module in experts)
        if is_expert_parallel:
            with pytest.raises(ValueError, match="replace_moe: .*experts is expert-parallel"):
                sonic.huggingface.replace_moe(model)
        elif name == "tensor" and model_type == "qwen3_moe":  # gpt-oss has no plan that splits its experts so
            sonic.huggingface.replace_moe(model)
            with pytest.raises(RuntimeError, match="use set_experts_implementation alone"):
                model(ids)
    model = load()
    sonic.huggingface.replace_moe(model, TokenRounding)  # tiles of one row on a CPU: nothing is rounded
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert_same(step(model, ids), wanted, f"{model_type}, fully_shard of replaced blocks")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_their_plans(model_type: str, tmp_path: Path) -> None:
    build_model(model_type).save_pretrained(tmp_path)
    run_ranks(check_plans, 2, str(tmp_path), model_type, timeout=300)
