"""Checkpoints that transformers writes: to sonic and back bit by bit, and layers that compute what its own do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonic
from sonic.convert import convert_checkpoint, convert_state_dict
from sonic.routing import TopKRouter, preset_router
from tests.convert_cases import same_bits

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")

D, N, E, K = 24, 20, 6, 2
COMMON = {
    **{"vocab_size": 32, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"max_position_embeddings": 32, "num_experts_per_tok": K, "pad_token_id": 0, "eos_token_id": 1},
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model: what its classes are called.
        options: of its configuration, beside the common ones.
        block: attribute of a decoder layer that is the MoE layer.
        has_fused: transformers holds other keys in memory than it writes.
        preset: name in ``sonic.routing.PRESETS``, with what this configuration changes.
    """

    model: str
    options: dict[str, Any]
    block: str = "mlp"
    has_fused: bool = True
    preset: tuple[str, dict[str, Any]] | None = None
    add: Callable[[nn.Module, Tensor], Tensor] | None = None


FAMILIES = {
    "mixtral": Family("Mixtral", {"intermediate_size": N, "num_local_experts": E}, preset=("mixtral", {})),
    "qwen3_moe": Family(
        "Qwen3Moe",
        {
            **{"intermediate_size": 44, "moe_intermediate_size": N, "num_experts": E, "head_dim": 12},
            "norm_topk_prob": True,
        }
        | {"mlp_only_layers": [0]},
        preset=("qwen3", {}),
    ),
    "olmoe": Family("Olmoe", {"intermediate_size": N, "num_experts": E}),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            **{"intermediate_size": 44, "moe_intermediate_size": N, "n_routed_experts": E, "n_shared_experts": 2},
            **{"n_group": 3, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        },
        preset=("deepseek_v3", {"num_groups": 3, "group_topk": 1}),
    ),
    "gpt_oss": Family(
        "GptOss",
        {"intermediate_size": N, "num_local_experts": E, "head_dim": 12},
        has_fused=False,
        preset=("gpt_oss", {}),
    ),
    "granitemoe": Family("GraniteMoe", {"intermediate_size": N, "num_local_experts": E}, block="block_sparse_moe"),
    "granitemoeshared": Family(
        "GraniteMoeShared",
        {"intermediate_size": N, "num_local_experts": E, "shared_intermediate_size": 28},
        block="block_sparse_moe",
        add=lambda decoder, x: decoder.shared_mlp(x),
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def format_of(name: str) -> str:
    return name.removesuffix("shared")


def new_model(name: str) -> Any:
    """A small model with large random weights: with those of transformers a gate looks like an up projection."""
    family = FAMILIES[name]
    config = getattr(transformers, f"{family.model}Config")(**COMMON, **family.options)
    model = getattr(transformers, f"{family.model}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(value for key, value in model.named_buffers() if "bias" in key)):
            tensor.normal_(std=0.5)
    return model.eval()


def load(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(safetensors.load_file(path))
    return found


@each_family
@pytest.mark.parametrize("is_fused", [False, True], ids=["checkpoint", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_there_and_back_is_the_same_bit_by_bit(name: str, is_fused: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    if is_fused and not FAMILIES[name].has_fused:
        pytest.skip("one storage only")
    options = {"save_original_format": False} if is_fused else {}
    new_model(name).to(dtype).save_pretrained(tmp_path / "from", max_shard_size="20KB", **options)
    assert (tmp_path / "from/model.safetensors.index.json").exists()
    there = convert_checkpoint(tmp_path / "from", tmp_path / "sonic", max_shard_bytes=15_000)
    assert (there.source_format, there.source_storage) == (format_of(name), "fused" if is_fused else "checkpoint")
    assert len(there.layers) == (2 if name in ("qwen3_moe", "deepseek_v3") else 3)
    back = convert_checkpoint(tmp_path / "sonic", tmp_path / "back", format_of(name), max_shard_bytes=15_000)
    assert back.target_storage == there.source_storage
    assert same_bits(load(tmp_path / "back"), load(tmp_path / "from"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "from" / file).read_bytes()


@each_family
def test_transformers_reads_what_comes_back(name: str, tmp_path: Path) -> None:
    model = new_model(name)
    model.save_pretrained(tmp_path / "from")
    convert_checkpoint(tmp_path / "from", tmp_path / "sonic", glu_layout="interleaved")
    convert_checkpoint(tmp_path / "sonic", tmp_path / "back", format_of(name))
    again = type(model).from_pretrained(tmp_path / "back").eval()
    tokens = torch.randint(0, 32, (2, 9))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("glu_layout", ["concatenated", "interleaved"])
def test_layers_compute_the_same(name: str, dtype: torch.dtype, glu_layout: str, tmp_path: Path) -> None:
    """Forward, and the gradient of the tokens; options of the layer from config.json, and from the preset by name."""
    family, model = FAMILIES[name], new_model(name)
    model.save_pretrained(tmp_path / "from")
    conversion = convert_checkpoint(tmp_path / "from", tmp_path / "sonic", glu_layout=glu_layout)
    field = json.loads((tmp_path / "sonic/config.json").read_text())["sonic"]
    tensors = load(tmp_path / "sonic")
    model = model.to(dtype)
    for path in conversion.layers:
        routers = [TopKRouter(**field["router"], dtype=dtype)]
        if family.preset is not None:
            preset, changes = family.preset
            sizes = {"hidden_size": D, "num_experts": E, "top_k": K}
            routers.append(preset_router(preset, **sizes, **changes, dtype=dtype))
        for router in routers:
            layer = sonic.MoE(**field["layer"], router=router, dtype=dtype)
            own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
            layer.load_state_dict(own)
            # in memory every family but Granite calls the layer `mlp`, whatever the checkpoint calls it
            parent = model.get_submodule(path.rpartition(".")[0])
            block = getattr(parent, family.block)
            block.experts.config = copy.copy(block.experts.config)
            block.experts.config._experts_implementation = "eager"
            x = torch.randn(2, 33, D, dtype=dtype, requires_grad=True)
            dy = torch.randn_like(x)
            want = block(x)
            want = want[0] if isinstance(want, tuple) else want
            if family.add is not None:
                want = want + family.add(parent, x)
            got = layer.eval()(x)
            (dx_want,), (dx,) = torch.autograd.grad(want, x, dy), torch.autograd.grad(got, x, dy)
            for what, have, true in (("y", got, want), ("dx", dx, dx_want)):
                error = ((have - true).norm() / true.norm()).item()
                # scores are float32 in transformers, whatever the dtype of the layer
                assert error < 2e-6, f"{path}, {what}: {error:.1e}"


@each_family
def test_a_state_dict_in_memory(name: str) -> None:
    model = new_model(name)
    foreign = {key: value for key, value in model.state_dict().items()}
    ours = convert_state_dict(foreign, config=model.config.to_dict())
    storage = "fused" if FAMILIES[name].has_fused else "checkpoint"
    back = convert_state_dict(
        ours, format_of(name), config=model.config.to_dict(), storage=storage, source_glu_layout="concatenated"
    )
    assert same_bits(back, foreign)
