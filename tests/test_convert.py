"""Checkpoints of every family to sonic and back: the same bits, the same function, and nothing taken on trust."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic import cli
from sonic.convert import FORMATS, convert_checkpoint, convert_state_dict, plan_conversion
from sonic.convert.formats import LAYOUTS
from sonic.routing import TopKRouter
from tests.convert_cases import (
    CASES,
    DTYPE_NAMES,
    Case,
    D,
    E,
    K,
    N,
    config_of,
    load_folder,
    output_of,
    same_bits,
    save_folder,
    tensors_of,
)

BY_ID = {case.id: case for case in CASES}
HUGGING_FACE = [case for case in CASES if case.config]
OTHERS = [case for case in CASES if not case.config]
any_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def write_case(case: Case, folder: Path, **options: Any) -> dict[str, Tensor]:
    tensors = tensors_of(case, dtype=options.pop("dtype", torch.float32))
    save_folder(folder, tensors, config_of(case), **options)
    return tensors


def layer_of(folder: Path, prefix: str, dtype: torch.dtype, **more: Any) -> sonic.MoE:
    """Build a layer from the ``sonic`` field of config.json and load its weights."""
    field = json.loads((folder / "config.json").read_text())["sonic"]
    router_options = {**field.get("router", {"hidden_size": D, "num_experts": E, "top_k": K})}
    router = TopKRouter(**router_options, dtype=dtype)
    layer = sonic.MoE(**{"activation": "swiglu", **field["layer"]}, **more, router=router, dtype=dtype)
    tensors, _ = load_folder(folder)
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    layer.load_state_dict(own)
    return layer.eval()


# ---------------------------------------------------------------- the same bits, the same function


@any_case
@pytest.mark.parametrize("glu_layout", ["concatenated", "interleaved"])
def test_converted_weights_compute_the_same(case: Case, glu_layout: str, tmp_path: Path) -> None:
    tensors = write_case(case, tmp_path / "from")
    convert_checkpoint(tmp_path / "from", tmp_path / "to", glu_layout=glu_layout)
    x = torch.randn(33, D, dtype=torch.float64)
    for number in (1, 10):
        layer = layer_of(tmp_path / "to", f"model.layers.{number}.{case.block}.", torch.float64)
        assert layer.glu_layout == glu_layout
        want = output_of(case, tensors, number, x)
        error = (layer(x) - want).norm() / want.norm()
        assert error < 1e-12, f"layer {number}: {error:.1e}"


@any_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("glu_layout", ["concatenated", "interleaved"])
def test_there_and_back_is_the_same_bit_by_bit(case: Case, dtype: torch.dtype, glu_layout: str, tmp_path: Path) -> None:
    tensors = write_case(case, tmp_path / "from", dtype=dtype, num_shards=3, metadata={"format": "pt", "note": "Größe"})
    convert_checkpoint(tmp_path / "from", tmp_path / "sonic", glu_layout=glu_layout, max_shard_bytes=2000)
    there, metadata = load_folder(tmp_path / "sonic")
    assert metadata == {"format": "pt", "note": "Größe", "sonic.glu_layout": glu_layout}
    assert there[f"model.layers.2.{case.block}.w1"].shape == (E, 2 * N, D)
    convert_checkpoint(tmp_path / "sonic", tmp_path / "back", case.name, max_shard_bytes=3000)
    back, metadata = load_folder(tmp_path / "back")
    assert same_bits(back, tensors)
    assert metadata == {"format": "pt", "note": "Größe"}
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "from/config.json").read_bytes()
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["metadata"]
    assert index == {"total_size": sum(tensor.nbytes for tensor in tensors.values()), "total_parameters": 5}


def test_every_format_is_tried() -> None:
    assert {case.name for case in CASES} == set(FORMATS) - {"sonic"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_two_storages_of_transformers_turn_into_each_other(family: str, tmp_path: Path) -> None:
    case = BY_ID[f"{family}-checkpoint"]
    tensors = write_case(case, tmp_path / "from")
    convert_checkpoint(tmp_path / "from", tmp_path / "fused", family, storage="fused")
    fused, _ = load_folder(tmp_path / "fused")
    gate, up, down = {"mixtral": ("w1", "w3", "w2")}.get(family, ("gate_proj", "up_proj", "down_proj"))
    for e in range(E):
        stem = f"model.layers.2.{case.block}.experts.{e}."
        both = torch.cat([tensors[f"{stem}{gate}.weight"], tensors[f"{stem}{up}.weight"]])
        assert torch.equal(fused["model.layers.2.mlp.experts.gate_up_proj"][e], both)
        assert torch.equal(fused["model.layers.2.mlp.experts.down_proj"][e], tensors[f"{stem}{down}.weight"])
    convert_checkpoint(tmp_path / "fused", tmp_path / "back", family, storage="checkpoint")
    assert same_bits(load_folder(tmp_path / "back")[0], tensors)


@pytest.mark.parametrize(
    ("one", "other"),
    [("qwen3_moe-checkpoint", name) for name in ("lm_engine", "sonicmoe", "scattermoe")]
    + [("sonicmoe-checkpoint", "lm_engine"), ("sonicmoe-checkpoint", "scattermoe")],
)
def test_formats_of_libraries_hold_models_of_any_family(one: str, other: str, tmp_path: Path) -> None:
    case = BY_ID[one]
    tensors = write_case(case, tmp_path / "from")
    convert_checkpoint(tmp_path / "from", tmp_path / "there", other)
    there, _ = load_folder(tmp_path / "there")
    target = BY_ID[f"{other}-checkpoint"]
    suffixes = {key.split(f"2.{case.block}.")[1] for key in there if f"layers.2.{case.block}." in key}
    assert suffixes <= set(target.make(torch.zeros))
    direct = plan_conversion(tmp_path / "from").config
    around = plan_conversion(tmp_path / "there").config
    assert direct is not None and around is not None
    assert {**direct["sonic"], "source": {"format": other, "storage": "checkpoint"}} == around["sonic"]
    convert_checkpoint(tmp_path / "there", tmp_path / "back", case.name)
    assert same_bits(load_folder(tmp_path / "back")[0], tensors)


def test_a_state_dict_of_a_sonic_layer_is_named_as_the_layer_names_it() -> None:
    case = BY_ID["deepseek_v3-checkpoint"]
    foreign = case.make(torch.randn)
    converted = convert_state_dict(foreign, config=config_of(case))
    router = sonic.routing.preset_router(
        "deepseek_v3", hidden_size=D, num_experts=E, top_k=K, num_groups=2, group_topk=1
    )
    layer = sonic.MoE(D, N, E, K, shared_intermediate_size=8, router=router)
    assert converted.keys() == layer.state_dict().keys()
    layer.load_state_dict(converted)
    back = convert_state_dict(layer.state_dict(), "deepseek_v3", source_glu_layout="concatenated")
    assert same_bits(back, foreign)


def test_plain_activations_have_no_halves() -> None:
    layer = sonic.MoE(D, N, E, K, activation="relu2", bias=True)
    theirs = convert_state_dict(layer.state_dict(), "sonicmoe", source_glu_layout="interleaved", pass_through=())
    assert torch.equal(theirs["c_fc.weight"], layer.w1) and torch.equal(theirs["c_fc.bias"], layer.b1)
    assert same_bits(convert_state_dict(theirs), layer.state_dict())


@pytest.mark.parametrize("storage", ["checkpoint", "fused"])
@pytest.mark.parametrize("target", sorted({layout.name for layout in LAYOUTS if layout.model_types}))
def test_models_of_transformers_have_gated_experts_only(target: str, storage: str) -> None:
    if not any((layout.name, layout.storage) == (target, storage) for layout in LAYOUTS):
        pytest.skip("there is no such storage")
    wants_biases = target == "gpt_oss"
    router = TopKRouter(D, E, K, bias=wants_biases, enable_expert_bias=target == "deepseek_v3")
    shared = 8 if target == "deepseek_v3" else 0
    layer = sonic.MoE(D, N, E, K, activation="relu2", bias=wants_biases, router=router, shared_intermediate_size=shared)
    message = rf"w1 is without gate rows, expected 2N rows: {target} has gated experts only"
    with pytest.raises(ValueError, match=message):
        convert_state_dict(layer.state_dict(), target, storage=storage, source_glu_layout="concatenated")


def test_a_router_in_another_is_found() -> None:
    router = sonic.routing.TokenRounding(TopKRouter(D, E, K))
    layer = sonic.MoE(D, N, E, K, router=router)
    state = {f"model.layers.0.mlp.{key}": value for key, value in layer.state_dict().items()}
    theirs = convert_state_dict(state, "qwen3_moe", source_glu_layout="concatenated")
    assert torch.equal(theirs["model.layers.0.mlp.gate.weight"], router.router.weight)
    state["model.layers.0.mlp.router.weight"] = torch.zeros(E, D)
    with pytest.raises(ValueError, match=r"is a second router.weight of its layer, expected .*router.weight alone"):
        convert_state_dict(state, "qwen3_moe", source_glu_layout="concatenated")


def test_biases_of_both_orders() -> None:
    layer = sonic.MoE(D, N, E, K, bias=True, shared_intermediate_size=8, glu_layout="interleaved")
    theirs = convert_state_dict(layer.state_dict(), "lm_engine", source_glu_layout="interleaved")
    assert torch.equal(theirs["c_fc.bias"], layer.b1) and torch.equal(theirs["c_fc_shared.bias"], layer.shared.b1)
    ours = convert_state_dict(theirs)
    assert torch.equal(ours["b1"], torch.cat([layer.b1[:, 0::2], layer.b1[:, 1::2]], 1))
    assert torch.equal(ours["shared.b1"], torch.cat([layer.shared.b1[0::2], layer.shared.b1[1::2]]))
    assert same_bits(convert_state_dict(ours, "lm_engine", source_glu_layout="concatenated"), theirs)


# ---------------------------------------------------------------- config.json and the other files


@pytest.mark.parametrize("case", HUGGING_FACE, ids=lambda case: case.id)
def test_config_tells_how_to_build_the_layers(case: Case, tmp_path: Path) -> None:
    write_case(case, tmp_path / "from")
    (tmp_path / "from/tokenizer.json").write_text("{}")
    (tmp_path / "from/training_args.bin").write_bytes(b"not a state dict")
    (tmp_path / "from/consolidated.gguf").write_bytes(b"weights")
    conversion = convert_checkpoint(tmp_path / "from", tmp_path / "to", glu_layout="interleaved")
    field = json.loads((tmp_path / "to/config.json").read_text())["sonic"]
    assert field["source"] == {"format": case.name, "storage": case.storage}
    assert field["layer"]["hidden_size"] == D and field["layer"]["intermediate_size"] == N
    assert field["layer"]["num_experts"] == E and field["layer"]["top_k"] == K
    assert field["layer"]["glu_layout"] == "interleaved"
    assert field["layer"]["activation"] == ("swiglu_oai" if case.name == "gpt_oss" else "swiglu")
    assert conversion.layers == tuple(f"model.layers.{number}.{case.block}" for number in (1, 2, 10))
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("identity", "changes", "message"),
    [
        (
            "qwen3_moe-checkpoint",
            {"hidden_act": "quick_gelu"},
            "hidden_act in config.json is 'quick_gelu', expected one",
        ),
        ("gpt_oss-checkpoint", {"swiglu_limit": 5.0}, "swiglu_limit in config.json is 5.0, expected 7.0"),
        ("gpt_oss-checkpoint", {"swiglu_alpha": 1.5}, "swiglu_alpha in config.json is 1.5, expected 1.702"),
        (
            "deepseek_v3-checkpoint",
            {"num_experts_per_tok": 4},
            "num_experts_per_tok in config.json is 4, with topk_group",
        ),
    ],
)
def test_what_sonic_computes_otherwise_is_refused(identity: str, changes: dict[str, Any], message: str) -> None:
    case = BY_ID[identity]
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_state_dict(tensors_of(case), config={**config_of(case), **changes})


def test_groups_without_a_limit_are_no_groups() -> None:
    case = BY_ID["deepseek_v3-checkpoint"]
    tensors = tensors_of(case)
    from sonic.convert.checkpoint import Checkpoint
    from sonic.convert.stored import HeldTensor

    held = {key: HeldTensor.checked(key, value) for key, value in tensors.items()}
    config = {**config_of(case), "topk_group": 2, "num_experts_per_tok": 3, "n_group": 2}
    router = plan_conversion(Checkpoint(held, config=config)).config["sonic"]["router"]
    assert "num_groups" not in router and router["enable_expert_bias"] and router["topk_scaling_factor"] == 2.5


def test_block_name() -> None:
    case = BY_ID["mixtral-checkpoint"]
    ours = convert_state_dict(tensors_of(case), config=config_of(case), block_name="mlp")
    assert "model.layers.1.mlp.w1" in ours and not any("block_sparse_moe" in key for key in ours)
    back = convert_state_dict(ours, "mixtral", source_glu_layout="concatenated")
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in back


# ---------------------------------------------------------------- refusals

Change = Callable[[dict[str, Tensor]], object]


def without(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.__setitem__(key, torch.zeros(*shape, dtype=dtype))


def put_narrow_layer(tensors: dict[str, Tensor]) -> None:
    tensors["x.c_fc.weight"] = torch.zeros(E, 4, D)
    tensors["x.c_proj.weight"] = torch.zeros(E, D, 2)
    tensors["x.router.weight"] = torch.zeros(E, D)


_QWEN, _DEEP = "qwen3_moe-checkpoint", "deepseek_v3-checkpoint"
_EXPERTS = "model.layers.2.mlp.experts"
FAULTS = [
    ("a lost expert", _QWEN, without(f"{_EXPERTS}.2.up_proj.weight"), f"{_EXPERTS}.2.up_proj.weight is missing"),
    (
        "the last expert lost",
        _QWEN,
        without(f"{_EXPERTS}.3.down_proj.weight"),
        f"{_EXPERTS}.3.down_proj.weight is missing",
    ),
    ("one too many", _QWEN, put(f"{_EXPERTS}.4.down_proj.weight", D, N), f"{_EXPERTS}.4.down_proj.weight is expert 4"),
    ("a lost router", _QWEN, without("model.layers.2.mlp.gate.weight"), "model.layers.2.mlp.gate.weight is missing"),
    (
        "a lost half",
        _DEEP,
        without("model.layers.2.mlp.shared_experts.down_proj.weight"),
        "shared_experts.down_proj.weight is missing",
    ),
    (
        "a lost bias",
        _DEEP,
        without("model.layers.2.mlp.gate.e_score_correction_bias"),
        "e_score_correction_bias is missing",
    ),
    (
        "wrong width",
        _QWEN,
        put(f"{_EXPERTS}.1.up_proj.weight", N + 1, D),
        f"{_EXPERTS}.1.up_proj.weight is (7, 10), expected (N, D) = (6, 10)",
    ),
    (
        "transposed",
        _QWEN,
        put(f"{_EXPERTS}.1.down_proj.weight", N, D),
        f"{_EXPERTS}.1.down_proj.weight is (6, 10), expected (D, N) = (10, 6)",
    ),
    (
        "fewer dimensions",
        _QWEN,
        put(f"{_EXPERTS}.0.down_proj.weight", D),
        f"{_EXPERTS}.0.down_proj.weight is (10,), expected 2 dim",
    ),
    (
        "another router",
        _QWEN,
        put("model.layers.2.mlp.gate.weight", E + 1, D),
        "model.layers.2.mlp.gate.weight is (5, 10), expected (E, D) = (4, 10)",
    ),
    (
        "fused and wrong",
        "qwen3_moe-fused",
        put(f"{_EXPERTS}.gate_up_proj", E, 2 * N + 1, D),
        f"{_EXPERTS}.gate_up_proj is (4, 13, 10), expected (E, U, D) = (4, 12, 10)",
    ),
    (
        "gpt-oss not transposed",
        "gpt_oss-checkpoint",
        put(f"{_EXPERTS}.gate_up_proj", E, 2 * N, D),
        f"{_EXPERTS}.gate_up_proj is (4, 12, 10), expected (E, D, U) = (4, 10, 12)",
    ),
    (
        "another dtype",
        _QWEN,
        put(f"{_EXPERTS}.1.up_proj.weight", N, D, dtype=torch.bfloat16),
        f"{_EXPERTS}.1.up_proj.weight is BF16, expected F32, as",
    ),
    (
        "no floats",
        _QWEN,
        put(f"{_EXPERTS}.1.up_proj.weight", N, D, dtype=torch.int64),
        f"{_EXPERTS}.1.up_proj.weight is I64, expected one of F64, F32, F16, BF16: quantised",
    ),
    ("stored twice", _QWEN, put(f"{_EXPERTS}.gate_up_proj", E, 2 * N, D), f"{_EXPERTS}.gate_up_proj is unknown"),
    (
        "scales of fp8",
        _QWEN,
        put(f"{_EXPERTS}.0.up_proj.weight_scale_inv", 1, 1),
        f"{_EXPERTS}.0.up_proj.weight_scale_inv is unknown",
    ),
    (
        "a gated shared expert",
        _QWEN,
        put("model.layers.2.mlp.shared_expert_gate.weight", 1, D),
        "model.layers.2.mlp.shared_expert_gate.weight is unknown",
    ),
    (
        "a zero before the number",
        _QWEN,
        put(f"{_EXPERTS}.01.up_proj.weight", N, D),
        f"{_EXPERTS}.01.up_proj.weight is unknown",
    ),
    (
        "experts elsewhere",
        _QWEN,
        put("model.layers.7.ffn.experts.weight", E, D),
        "model.layers.7.ffn.experts.weight is unknown",
    ),
    (
        "a router alone",
        _QWEN,
        put("model.layers.7.mlp.gate.weight", E, D),
        "model.layers.7.mlp.gate.weight is part of a MoE layer without",
    ),
    ("a key of that name", _QWEN, put("model.layers.2.mlp.w1", 3), "model.layers.2.mlp.w1 is unknown"),
    (
        "layers of two sizes",
        "sonicmoe-checkpoint",
        put_narrow_layer,
        "x.c_fc.weight is (4, 4, 10), expected (E, U, D) = (4, 12, 10)",
    ),
]


@pytest.mark.parametrize(("what", "identity", "change", "message"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_faults_are_refused_by_key_and_leave_nothing(
    what: str, identity: str, change: Change, message: str, tmp_path: Path
) -> None:
    case = BY_ID[identity]
    tensors = tensors_of(case)
    change(tensors)
    save_folder(tmp_path / "from", tensors, config_of(case))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        convert_checkpoint(tmp_path / "from", tmp_path / "to")
    assert str(caught.value).startswith("sonic.convert: ")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_config_and_tensors_must_agree() -> None:
    case = BY_ID[_QWEN]
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate.weight is \(4, 10\), expected \(E, D\) = \(5, 10\)"):
        convert_state_dict(tensors_of(case), config={**config_of(case), "num_local_experts": E + 1})
    with pytest.raises(
        ValueError, match=r"gate_proj.weight is \(6, 10\), expected \(N, D\) = \(7, 10\)|\(D, N\) = \(10, 7\)"
    ):
        convert_state_dict(tensors_of(case), config={**config_of(case), "moe_intermediate_size": N + 1})


def test_a_target_without_a_place_is_refused() -> None:
    deep, qwen = BY_ID[_DEEP], BY_ID[_QWEN]
    with pytest.raises(ValueError, match=r"e_score_correction_bias is a router.expert_bias .* lm_engine has no place"):
        convert_state_dict(tensors_of(deep), "lm_engine", config=config_of(deep))
    with pytest.raises(ValueError, match=r"to is 'mixtral', with model_type 'qwen3_moe' in config.json"):
        convert_state_dict(tensors_of(qwen), "mixtral", config=config_of(qwen))
    with pytest.raises(
        ValueError, match=r"layers.1.mlp is without a router.expert_bias, expected one, which every layer"
    ):
        convert_state_dict(tensors_of(BY_ID["olmoe-checkpoint"]), "deepseek_v3", source_format="olmoe")
    with pytest.raises(ValueError, match=r"storage is 'fused', expected one of 'checkpoint'"):
        convert_state_dict(tensors_of(qwen), config=config_of(qwen), storage="fused")
    with pytest.raises(ValueError, match=r"glu_layout is 'interleaved', expected None: qwen3_moe has one order only"):
        convert_state_dict(tensors_of(qwen), "qwen3_moe", config=config_of(qwen), glu_layout="interleaved")


def test_what_cannot_be_told_is_asked_for() -> None:
    tensors = tensors_of(BY_ID[_QWEN])
    with pytest.raises(ValueError, match=r"source_format is None, expected one of qwen3_moe, olmoe: the keys fit each"):
        convert_state_dict(tensors)
    ours = convert_state_dict(tensors, source_format="olmoe")
    with pytest.raises(ValueError, match=r"expected source_glu_layout=...: neither metadata nor config.json tell"):
        convert_state_dict(ours, "olmoe")
    assert same_bits(convert_state_dict(ours, "olmoe", source_glu_layout="concatenated"), tensors)
    with pytest.raises(
        ValueError, match=r"source_glu_layout is 'concatenated', expected None: olmoe has one order only"
    ):
        convert_state_dict(tensors, source_format="olmoe", source_glu_layout="concatenated")
    with pytest.raises(ValueError, match="source is without a MoE layer"):
        convert_state_dict({"model.norm.weight": torch.zeros(3)})
    quantised = {f"{_EXPERTS}.gate_up_proj_blocks": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(
        ValueError, match=r"gate_up_proj_blocks\), expected .* quantised experts have to be dequantised"
    ):
        convert_state_dict(quantised, config={"model_type": "gpt_oss"})


def test_orders_that_contradict_each_other(tmp_path: Path) -> None:
    write_case(BY_ID[_QWEN], tmp_path / "from")
    convert_checkpoint(tmp_path / "from", tmp_path / "to")
    path = tmp_path / "to/config.json"
    path.write_text(path.read_text().replace("concatenated", "interleaved"))
    with pytest.raises(
        ValueError, match=r"glu_layout is 'concatenated' in the metadata and 'interleaved' in config.json"
    ):
        plan_conversion(tmp_path / "to", "qwen3_moe")
    plan_conversion(tmp_path / "to", "qwen3_moe", source_glu_layout="concatenated")


def test_layers_of_two_kinds_are_refused_by_what_differs() -> None:
    def layer(index: int, bias: bool) -> dict[str, torch.Tensor]:
        made = sonic.MoE(8, 4, num_experts=4, top_k=1, bias=bias)
        return {f"layers.{index}.mlp.{key}": value.detach() for key, value in made.state_dict().items()}

    with pytest.raises(
        ValueError, match="layers.1.mlp is a layer with bias True, expected bias False, as layers.0.mlp$"
    ):
        convert_state_dict({**layer(0, False), **layer(1, True)}, source_glu_layout="concatenated")


def test_new_names_do_not_fall_on_others() -> None:
    case = BY_ID["mixtral-checkpoint"]
    tensors = tensors_of(case)
    tensors["model.layers.1.mlp.w1"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.w1 is the target's name of both .*, expected two names"):
        convert_state_dict(tensors, config=config_of(case), block_name="mlp")


def test_a_key_can_be_passed_through() -> None:
    case = BY_ID[_QWEN]
    tensors = {**tensors_of(case), "model.vision.moe.weight": torch.ones(3)}
    with pytest.raises(ValueError, match="model.vision.moe.weight is unknown"):
        convert_state_dict(tensors, config=config_of(case))
    ours = convert_state_dict(tensors, config=config_of(case), pass_through=["model.vision.*"])
    assert ours["model.vision.moe.weight"] is tensors["model.vision.moe.weight"]


@pytest.mark.parametrize("value", [3, torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3) + 1j])
def test_only_plain_tensors_in_memory(value: object) -> None:
    with pytest.raises(ValueError, match=r"sonic.convert: odd is .*, expected (a|one)"):
        convert_state_dict({**tensors_of(BY_ID[_QWEN]), "odd": value}, source_format="qwen3_moe")


# ---------------------------------------------------------------- the command line


@any_case
def test_dry_run_tells_every_key(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_case(case, tmp_path / "from")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert cli.main(["convert", str(tmp_path / "from"), str(tmp_path / "to"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    convert_checkpoint(tmp_path / "from", tmp_path / "to")
    for key, tensor in tensors.items():
        told = f"{key} {tuple(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}"
        assert any(line in (f"    from {told}", f"{told}: unchanged") for line in lines), key
    for key, tensor in load_folder(tmp_path / "to")[0].items():
        assert any(line.startswith(f"{key} {tuple(tensor.shape)} F32: ") or key == "model.steps" for line in lines), key
    assert "3 MoE layers: E = 4, D = 10, N = 6" in lines[-1]


def test_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(BY_ID[_QWEN], tmp_path / "from")
    assert cli.main(["convert", str(tmp_path / "from"), "--dry-run", "--json", "--glu-layout", "interleaved"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (w1,) = [tensor for tensor in plan["tensors"] if tensor["key"] == "model.layers.10.mlp.w1"]
    assert w1["shape"] == [E, 2 * N, D] and w1["how"] == "experts stacked, gate and up rows interleaved"
    assert len(w1["sources"]) == 2 * E and plan["config"]["sonic"]["layer"]["glu_layout"] == "interleaved"


def test_command_line_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_case(BY_ID[_QWEN], tmp_path / "from")
    there = ["convert", str(tmp_path / "from"), str(tmp_path / "to"), "--max-shard-size", "2KB", "--block-name", "moe"]
    assert cli.main(there) == 0
    assert "wrote" in capsys.readouterr().err and len(list((tmp_path / "to").glob("*.safetensors"))) > 3
    back = ["convert", str(tmp_path / "to"), str(tmp_path / "back"), "--to", "qwen3_moe", "--storage", "checkpoint"]
    assert cli.main(back) == 0
    assert same_bits(load_folder(tmp_path / "back")[0], tensors)
    assert cli.main(back) == 2  # it is there
    assert "back, which is there already, expected a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "to"], "source is nowhere, expected a file or a folder of weights"),
        (["nowhere"], "target is None, expected a new folder, or --dry-run"),
        (
            ["nowhere", "to", "--max-shard-size", "5 parsecs"],
            "--max-shard-size is '5 parsecs', expected a size such as",
        ),
        (["nowhere", "to", "--max-shard-size", "0GB"], "--max-shard-size is '0GB', expected"),
    ],
)
def test_command_line_tells_faults(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
