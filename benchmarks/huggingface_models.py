"""Small random models of every family of transformers with experts that can be chosen, for benchmarks and tests."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "batch", "build_model", "experts_classes", "experts_of", "gates"]

_SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager"},
    **{"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    **{"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8},  # one of these names is the model's
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1}
_LATENT_ATTENTION = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4},
}
_SHARED = {"shared_expert_intermediate_size": 24}

MODELS = MappingProxyType(
    {
        "mixtral": {},
        "qwen2_moe": _SHARED,
        "qwen3_moe": {},
        "qwen3_next": {
            **_SHARED,
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            **{"layer_types": ["linear_attention", "full_attention"]},
        },
        "olmoe": {},
        "flex_olmo": {},
        "deepseek_v2": {**_GROUPS, **_LATENT_ATTENTION},
        "deepseek_v3": {**_GROUPS, **_LATENT_ATTENTION},
        "glm4_moe": _GROUPS,
        "dots1": _GROUPS,
        "granitemoe": {},
        "granitemoeshared": {"shared_intermediate_size": 24},
        "jamba": {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        },
        "gpt_oss": {},
        "minimax": {},
        "minimax_m2": {},
        "nemotron_h": {
            **{"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "chunk_size": 16},
            **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2},
            **{"n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 24},
        },
        "phimoe": {},
        "ernie4_5_moe": {
            **{"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
        },
        "lfm2_moe": {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
        "hunyuan_v1_moe": {},
        "cohere2_moe": {},
        "afmoe": {},
        "zaya": {"num_experts_per_tok": 1},
    }
)
"""Type of a model -> what its config needs beside the sizes that all share."""


def build_model(model_type: str, *, seed: int = 0, **config: Any) -> Any:
    """A causal language model in float32, on the CPU, in eval mode, with weights of the scale at which models train.

    Matrices are normal with a variance of one over their last size, so that every layer matters to what comes out;
    biases that choose experts are not zero.

    Args:
        model_type: a key of :data:`MODELS`.
        seed: of the weights.
        config: more of the config; it wins.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(model_type, **{**_SIZES, **MODELS[model_type], **config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.normal_(std=0.1)
    return model.eval()


def batch(num_sequences: int = 2, length: int = 24) -> Tensor:
    """The same random tokens each time: (B, S) int64."""
    return torch.randint(3, 128, (num_sequences, length), generator=torch.Generator().manual_seed(1))


def experts_of(model: nn.Module) -> list[Any]:
    """The experts modules of a model, first layer first."""
    return [
        module for name, module in model.named_modules() if name.endswith("experts") and hasattr(module, "num_experts")
    ]


def experts_classes() -> Iterator[nn.Module]:
    """Every experts class of the installed transformers, in small: 4 experts of width 6, tokens of width 8, float32.

    Activation and layout are those of the default config; weights are normal, the clamps of a gate are reached.
    """
    for kind, configs in _classes():
        if hasattr(kind, "_apply_gate"):
            yield _small_experts(kind, configs)


def gates(names: Collection[str]) -> Iterator[nn.Module]:
    """The routers of the installed transformers with these class names, for tokens of width 8, in float32.

    Experts, choices and factors are those of the default config; weights and biases are normal.
    """
    for kind, configs in _classes():
        if kind.__name__ in names:
            gate = _on_meta(kind, configs)
            generator = torch.Generator().manual_seed(5)
            gate.hidden_dim = 8
            if gate.top_k is None:
                gate.top_k = 2
            for module in gate.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    shape = (*parameter.shape[:-1], 8) if parameter.ndim > 1 else parameter.shape
                    setattr(module, name, nn.Parameter(torch.randn(shape, generator=generator)))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, 0.3 * torch.randn(buffer.shape, generator=generator))
            yield gate


def _classes() -> Iterator[tuple[Any, list[Any]]]:
    """Classes of the modules that hold experts, and the configs that may be theirs, those of texts first."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "@use_experts_implementation" not in path.read_text(encoding="utf-8"):
            continue
        package = f"transformers.models.{path.parent.name}"
        module = importlib.import_module(f"{package}.{path.stem}")
        configs = importlib.import_module(f"{package}.configuration_{path.stem.removeprefix('modeling_')}")
        found = [
            kind for _, kind in inspect.getmembers(configs, inspect.isclass) if kind.__module__ == configs.__name__
        ]
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                yield kind, sorted(found, key=lambda config: "Text" not in config.__name__)


def _on_meta(kind: Any, configs: list[Any]) -> Any:
    """A module of a class, made from the first config that it takes, without memory."""
    problems = []
    for config_class in configs:
        try:
            config = config_class()
            for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
                if getattr(config, name, 0) is None:
                    setattr(config, name, 4)
            options = {}
            if "intermediate_size" in inspect.signature(kind).parameters:
                options["intermediate_size"] = 6  # one for text and one for images
            elif getattr(config, "moe_intermediate_size", 0) is None:
                config.moe_intermediate_size = 6
            with torch.device("meta"):
                return kind(config, **options)
        except (AttributeError, TypeError, ValueError) as error:  # the config of another part of the model
            problems.append(f"{config_class.__name__}: {error}")
    raise RuntimeError(f"{kind.__name__}: no config builds it: {problems}")


def _small_experts(kind: Any, configs: list[Any]) -> nn.Module:
    experts = _on_meta(kind, configs)
    generator = torch.Generator().manual_seed(3)
    width_u = 12 if experts.has_gate else 6
    shapes = {"gate_up_proj": (4, width_u, 8), "up_proj": (4, width_u, 8), "down_proj": (4, 8, 6)}
    for name in [name for name, _ in experts.named_parameters(recurse=False)]:
        shape = shapes[name.removesuffix("_bias")]
        if name.endswith("_bias"):
            shape = shape[:2]
        elif experts.is_transposed:
            shape = (shape[0], shape[2], shape[1])
        setattr(experts, name, nn.Parameter(2 * torch.randn(shape, generator=generator)))
    experts.num_experts = 4
    experts.config._experts_implementation = "eager"
    return experts
