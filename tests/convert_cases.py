"""Checkpoints as other libraries name and store them, and what their MoE layers compute, without these libraries.

Nothing here uses ``sonic.convert``: files are written byte by byte, and a layer's output is computed in float64 from
the foreign names.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

D, N, E, K, SHARED = 10, 6, 4, 2, 8
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


@dataclass(frozen=True)
class Case:
    """One way of storing one family.

    Attributes:
        name: the format.
        storage: the storage.
        block: what a layer is called.
        make: the tensors of one layer, given its prefix and a function that draws one of a shape.
        output: (x_TD, get) -> (T, D), where ``get`` looks a key of the layer up.
        config: what ``config.json`` says beside the sizes.
    """

    name: str
    storage: str
    block: str
    make: Callable[[Callable[..., Tensor]], dict[str, Tensor]]
    output: Callable[[Tensor, Callable[[str], Tensor]], Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.storage}"


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


# ---------------------------------------------------------------- what layers compute


def softmax_of_chosen(logits_TE: Tensor) -> Tensor:
    values_TK, expert_TK = logits_TE.topk(K)
    return torch.zeros_like(logits_TE).scatter(1, expert_TK, values_TK.softmax(1))


def chosen_of_softmax(is_normalised: bool) -> Callable[[Tensor], Tensor]:
    def scores(logits_TE: Tensor) -> Tensor:
        values_TK, expert_TK = logits_TE.softmax(1).topk(K)
        if is_normalised:
            values_TK = values_TK / values_TK.sum(1, keepdim=True)
        return torch.zeros_like(logits_TE).scatter(1, expert_TK, values_TK)

    return scores


def deepseek_scores(logits_TE: Tensor, bias_E: Tensor, num_groups: int, group_topk: int, factor: float) -> Tensor:
    probability_TE = logits_TE.sigmoid()
    wanted_TE = probability_TE + bias_E
    worth_TG = wanted_TE.view(len(wanted_TE), num_groups, -1).topk(2)[0].sum(-1)
    kept_TG = torch.zeros_like(worth_TG).scatter(1, worth_TG.topk(group_topk)[1], 1.0)
    kept_TE = kept_TG.repeat_interleave(E // num_groups, 1).bool()
    expert_TK = wanted_TE.masked_fill(~kept_TE, -torch.inf).topk(K)[1]
    values_TK = probability_TE.gather(1, expert_TK)
    values_TK = values_TK / values_TK.sum(1, keepdim=True) * factor
    return torch.zeros_like(logits_TE).scatter(1, expert_TK, values_TK)


def mlp(x_TD: Tensor, gate_ND: Tensor, up_ND: Tensor, down_DN: Tensor) -> Tensor:
    return (F.silu(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)) @ down_DN.T


def weighted(scores_TE: Tensor, expert: Callable[[int], Tensor]) -> Tensor:
    return sum(scores_TE[:, index, None] * expert(index) for index in range(E))


def per_expert_output(names: tuple[str, str, str], scores: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
        weights = scores(x @ get("gate.weight").T)
        return weighted(weights, lambda e: mlp(x, *(get(f"experts.{e}.{name}.weight") for name in names)))

    return output


def fused_output(scores: Callable[[Tensor], Tensor], router: str = "gate.weight") -> Callable[..., Tensor]:
    def output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
        weights, both, down = scores(x @ get(router).T), get("experts.gate_up_proj"), get("experts.down_proj")
        return weighted(weights, lambda e: mlp(x, both[e, :N], both[e, N:], down[e]))

    return output


def deepseek_output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
    bias = get("gate.e_score_correction_bias")
    routed = per_expert_output(
        ("gate_proj", "up_proj", "down_proj"), lambda logits: deepseek_scores(logits, bias, 2, 1, 2.5)
    )(x, get)
    return routed + mlp(x, *(get(f"shared_experts.{name}_proj.weight") for name in ("gate", "up", "down")))


def gpt_oss_output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
    def expert(e: int) -> Tensor:
        both = x @ get("experts.gate_up_proj")[e] + get("experts.gate_up_proj_bias")[e]
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ get("experts.down_proj")[e] + get("experts.down_proj_bias")[e]

    return weighted(softmax_of_chosen(x @ get("router.weight").T + get("router.bias")), expert)


def granite_output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
    def two(both: Tensor, down: Tensor) -> Tensor:
        half = len(both) // 2
        return mlp(x, both[:half], both[half:], down)

    up, down = get("input_linear.weight"), get("output_linear.weight")
    routed = weighted(softmax_of_chosen(x @ get("router.layer.weight").T), lambda e: two(up[e], down[e]))
    return routed + two(get("../shared_mlp.input_linear.weight"), get("../shared_mlp.output_linear.weight"))


def interleaved_output(router: str, has_shared: bool) -> Callable[..., Tensor]:
    def output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
        up, down = get("c_fc.weight"), get("c_proj.weight")
        weights = softmax_of_chosen(x @ get(router).T)
        out = weighted(weights, lambda e: mlp(x, up[e, 0::2], up[e, 1::2], down[e]))
        if has_shared:
            shared = get("c_fc_shared.weight")
            out = out + mlp(x, shared[0::2], shared[1::2], get("c_proj_shared.weight"))
        return out

    return output


def scattermoe_output(x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
    both, down = get("experts.weight"), get("output_experts.weight")
    weights = softmax_of_chosen(x @ get("router.weight").T)
    return weighted(weights, lambda e: mlp(x, both[e, N:], both[e, :N], down[e]))  # up first, then gate


# ---------------------------------------------------------------- how layers are stored

Draw = Callable[..., Tensor]


def per_expert(gate: str, up: str, down: str) -> Callable[[Draw], dict[str, Tensor]]:
    def make(new: Draw) -> dict[str, Tensor]:
        found = {}
        for e in range(E):
            found[f"experts.{e}.{gate}.weight"] = new(N, D)
            found[f"experts.{e}.{up}.weight"] = new(N, D)
            found[f"experts.{e}.{down}.weight"] = new(D, N)
        return {**found, "gate.weight": new(E, D)}

    return make


def fused(router: str) -> Callable[[Draw], dict[str, Tensor]]:
    return lambda new: {
        "experts.gate_up_proj": new(E, 2 * N, D),
        "experts.down_proj": new(E, D, N),
        router: new(E, D),
    }


def deepseek(new: Draw) -> dict[str, Tensor]:
    shared = {f"shared_experts.{name}_proj.weight": new(SHARED, D) for name in ("gate", "up")}
    return {
        **per_expert("gate_proj", "up_proj", "down_proj")(new),
        **shared,
        "shared_experts.down_proj.weight": new(D, SHARED),
        "gate.e_score_correction_bias": new(E, dtype=torch.float32) / 5,
    }


def gpt_oss(new: Draw) -> dict[str, Tensor]:
    return {
        "experts.gate_up_proj": new(E, D, 2 * N),
        "experts.gate_up_proj_bias": new(E, 2 * N),
        "experts.down_proj": new(E, N, D),
        "experts.down_proj_bias": new(E, D),
        "router.weight": new(E, D),
        "router.bias": new(E),
    }


def granite(new: Draw) -> dict[str, Tensor]:
    return {
        "input_linear.weight": new(E, 2 * N, D),
        "output_linear.weight": new(E, D, N),
        "router.layer.weight": new(E, D),
        "../shared_mlp.input_linear.weight": new(2 * SHARED, D),
        "../shared_mlp.output_linear.weight": new(D, SHARED),
    }


def lm_engine(new: Draw) -> dict[str, Tensor]:
    return {
        "c_fc.weight": new(E, 2 * N, D),
        "c_proj.weight": new(E, D, N),
        "gate.weight": new(E, D),
        "c_fc_shared.weight": new(2 * SHARED, D),
        "c_proj_shared.weight": new(D, SHARED),
    }


def sonicmoe(new: Draw) -> dict[str, Tensor]:
    return {"c_fc.weight": new(E, 2 * N, D), "c_proj.weight": new(E, D, N), "router.weight": new(E, D)}


def scattermoe(new: Draw) -> dict[str, Tensor]:
    return {"experts.weight": new(E, 2 * N, D), "output_experts.weight": new(E, D, N), "router.weight": new(E, D)}


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QWEN = {"model_type": "qwen3_moe", "moe_intermediate_size": N, "intermediate_size": 3 * N, "norm_topk_prob": True}
_OLMOE = {"model_type": "olmoe", "intermediate_size": N, "norm_topk_prob": False}
_MIXTRAL = {"model_type": "mixtral", "intermediate_size": N}
_DEEPSEEK = {
    **{"model_type": "deepseek_v3", "moe_intermediate_size": N, "n_group": 2, "topk_group": 1},
    **{"routed_scaling_factor": 2.5, "norm_topk_prob": True},
}
_GRANITE = {"model_type": "granitemoeshared", "intermediate_size": N}
CASES = (
    Case(
        "mixtral",
        "checkpoint",
        "block_sparse_moe",
        per_expert("w1", "w3", "w2"),
        per_expert_output(("w1", "w3", "w2"), softmax_of_chosen),
        _MIXTRAL,
    ),
    Case("mixtral", "fused", "mlp", fused("gate.weight"), fused_output(softmax_of_chosen), _MIXTRAL),
    Case(
        "qwen3_moe",
        "checkpoint",
        "mlp",
        per_expert(*_PROJECTIONS),
        per_expert_output(_PROJECTIONS, chosen_of_softmax(True)),
        _QWEN,
    ),
    Case("qwen3_moe", "fused", "mlp", fused("gate.weight"), fused_output(chosen_of_softmax(True)), _QWEN),
    Case(
        "olmoe",
        "checkpoint",
        "mlp",
        per_expert(*_PROJECTIONS),
        per_expert_output(_PROJECTIONS, chosen_of_softmax(False)),
        _OLMOE,
    ),
    Case("olmoe", "fused", "mlp", fused("gate.weight"), fused_output(chosen_of_softmax(False)), _OLMOE),
    Case("deepseek_v3", "checkpoint", "mlp", deepseek, deepseek_output, _DEEPSEEK),
    Case("gpt_oss", "checkpoint", "mlp", gpt_oss, gpt_oss_output, {"model_type": "gpt_oss", "intermediate_size": N}),
    Case("granitemoe", "checkpoint", "block_sparse_moe", granite, granite_output, _GRANITE),
    Case(
        "granitemoe",
        "fused",
        "block_sparse_moe",
        fused("router.weight"),
        fused_output(softmax_of_chosen, "router.weight"),
        {"model_type": "granitemoe", "intermediate_size": N},
    ),
    Case("lm_engine", "checkpoint", "mlp_block", lm_engine, interleaved_output("gate.weight", True)),
    Case("sonicmoe", "checkpoint", "moe", sonicmoe, interleaved_output("router.weight", False)),
    Case("scattermoe", "checkpoint", "ffn", scattermoe, scattermoe_output),
)


def config_of(case: Case) -> dict[str, Any]:
    """``config.json`` of a case, as transformers would write it."""
    sizes = {"hidden_size": D, "num_experts_per_tok": K, "num_hidden_layers": 3}
    family = {"num_local_experts": E, "hidden_act": "silu"} if case.config else {}
    return {**sizes, **family, **case.config}


def tensors_of(
    case: Case, layers: tuple[int, ...] = (1, 2, 10), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A whole model: dense layer 0, MoE layers, attention, norms, embeddings."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw(*shape, dtype=dtype)

    found = {"model.embed_tokens.weight": new(7, D), "lm_head.weight": new(7, D), "model.norm.weight": new(D)}
    for name, shape in (("gate_proj", (5, D)), ("up_proj", (5, D)), ("down_proj", (D, 5))):
        found[f"model.layers.0.mlp.{name}.weight"] = new(*shape)
    found["model.layers.0.attn.c_proj.weight"] = new(D, D)
    found["model.steps"] = torch.tensor(7)
    for layer in layers:
        found[f"model.layers.{layer}.self_attn.q_proj.weight"] = new(D, D)
        for key, tensor in case.make(new).items():
            found[full_key(f"model.layers.{layer}.{case.block}.", key)] = tensor
    return found


def full_key(prefix: str, key: str) -> str:
    """The key below a layer, or beside it (``../``)."""
    return prefix[: prefix.rstrip(".").rfind(".") + 1] + key[3:] if key.startswith("../") else prefix + key


def output_of(case: Case, tensors: Mapping[str, Tensor], layer: int, x_TD: Tensor) -> Tensor:
    """What a MoE layer of the checkpoint computes, in float64."""
    prefix = f"model.layers.{layer}.{case.block}."
    return case.output(x_TD.double(), lambda key: tensors[full_key(prefix, key)].double())


# ---------------------------------------------------------------- files


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file in the safetensors format: wide dtypes first, as its own writer has it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, size = [], 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets = [size, size + len(parts[-1])]
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        size += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of such a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    found = {}
    for key, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        assert (8 + length + entry["data_offsets"][0]) % dtypes[entry["dtype"]].itemsize == 0, "tensors are aligned"
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8)  # no tensor here is empty
        found[key] = flat.view(dtypes[entry["dtype"]]).view(entry["shape"])
    return found, metadata


def save_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    num_shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint as Hugging Face writes it; keys are dealt out to the shards in turn, which tears layers apart."""
    folder.mkdir(parents=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    if num_shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, metadata))
    else:
        names = [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]
        weight_map = {key: names[number % num_shards] for number, key in enumerate(tensors)}
        for name in names:
            part = {key: tensors[key] for key, file in weight_map.items() if file == name}
            (folder / name).write_bytes(safetensors_bytes(part, metadata))
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total, "total_parameters": 5}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def load_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a folder, by its index if there is one; and the metadata of its last file."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        found, metadata = read_safetensors(folder / name)
        assert all(weight_map[key] == name for key in found) and not tensors.keys() & found.keys()
        tensors.update(found)
    assert tensors.keys() == weight_map.keys()
    return tensors, metadata


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two checkpoints have the same keys, shapes, dtypes and bytes."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype
        and tensor.shape == other[key].shape
        and safetensors_bytes({"x": tensor}) == safetensors_bytes({"x": other[key]})
        for key, tensor in one.items()
    )
