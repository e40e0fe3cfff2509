"""Costs and bounds of `sonic/roofline.py` against numbers written out, tensors of real calls, and torch's own count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sonic import roofline
from sonic.kernels import dispatch, ops
from sonic.roofline import CHIPS, Cost, Layer
from tests.helpers import make_problem

GEMMS = tuple(op for op in roofline.OPS if "proj" in op)

# What SonicMoE's equations give for the shapes of its figures and for open models, 32k tokens unless said otherwise, in
# bf16, gated: sizes (T, D, N, E, K); FLOP per byte by equation 4, of forward and of backward; TFLOP/s at the bound,
# forward and backward, on H100 and H200; GB moved. These tables leave out the row indices of three backward ops and the
# expert offsets, and count dS in partial sums of 128 columns of N, so the last digit may differ by one.
PUBLISHED = {
    "1.4B-n256": ((40960, 768, 256, 128, 8), 259, (161, 169), (540, 567), (730, 715), (2.40, 4.56)),
    "1.4B-n512": ((40960, 768, 512, 64, 4), 391, (235, 234), (781, 705), (846, 809), (1.64, 3.30)),
    "1.4B-n1024": ((40960, 768, 1024, 32, 2), 524, (306, 289), (864, 764), (898, 856), (1.26, 2.68)),
    "7B-n256": ((24576, 1536, 256, 128, 8), 271, (179, 197), (599, 649), (745, 782), (2.59, 4.71)),
    "7B-n512": ((24576, 1536, 512, 64, 4), 419, (275, 290), (797, 796), (847, 884), (1.69, 3.20)),
    "7B-n1024": ((24576, 1536, 1024, 32, 2), 576, (376, 380), (864, 863), (898, 940), (1.23, 2.44)),
    "30B-n256": ((32768, 4096, 256, 256, 16), 307, (208, 239), (646, 719), (769, 846), (15.84, 27.66)),
    "30B-n512": ((32768, 4096, 512, 128, 8), 512, (351, 390), (813, 882), (859, 920), (9.40, 16.92)),
    "30B-n1024": ((32768, 4096, 1024, 64, 4), 768, (534, 571), (883, 933), (912, 949), (6.18, 11.55)),
    "120B-n512": ((32768, 4096, 512, 256, 16), 512, (356, 393), (821, 886), (866, 923), (18.53, 33.57)),
    "120B-n1024": ((32768, 4096, 1024, 128, 8), 768, (546, 578), (892, 938), (920, 953), (12.08, 22.83)),
    "120B-n2048": ((32768, 4096, 2048, 64, 4), 1024, (745, 756), (933, 960), (949, 969), (8.86, 17.46)),
    "OLMoE": ((32768, 2048, 1024, 64, 8), 819, (523, 528), (892, 926), (919, 953), (6.31, 12.49)),
    "gpt-oss-20b": ((32768, 2880, 2880, 32, 4), 1414, (923, 887), (948, 968), (960, 974), (7.07, 14.71)),
    "Kimi-Linear": ((32768, 2304, 1024, 256, 8), 522, (389, 394), (892, 907), (920, 953), (9.55, 18.82)),
    "Qwen3-Next": ((32768, 2048, 512, 512, 10), 313, (236, 248), (777, 783), (862, 889), (8.73, 16.65)),
    "Qwen3-235B": ((32768, 4096, 1536, 128, 8), 922, (670, 689), (922, 955), (942, 965), (14.77, 28.74)),
    "DeepSeek-V3.2": ((32768, 7168, 2048, 256, 8), 717, (598, 615), (938, 963), (953, 971), (38.59, 75.11)),
}

layers = st.builds(
    Layer,
    num_tokens=st.integers(1, 3000),
    hidden_size=st.integers(1, 300),
    intermediate_size=st.integers(1, 300),
    num_experts=st.integers(4, 64),
    top_k=st.integers(1, 4),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, "tfloat32"]),
    need_h=st.booleans(),
    gather=st.sampled_from(["rows", "tokens"]),
    tile_rows=st.sampled_from([1, 64, 128, 192]),
)


def layer_of(name: str, **options: Any) -> Layer:
    return Layer(*PUBLISHED[name][0], **options)


class TestPublished:
    """The tables that the field quotes, to the last digit but one."""

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_intensity_of_equation_4(self, name: str) -> None:
        """H is not counted there; nor are routing data, 4 bytes in some thousand."""
        layer = layer_of(name, need_h=False)
        T, D, N, E, K = PUBLISHED[name][0]
        cost = roofline.op_cost("up_proj", layer) + roofline.op_cost("down_proj", layer)
        assert cost.intensity == pytest.approx(PUBLISHED[name][1], abs=1)
        assert cost.intensity == pytest.approx(3 / ((2 + 2 * D / N) / D + 3 * E / (T * K)), rel=2e-3)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_bytes_and_intensity_of_each_pass(self, name: str) -> None:
        _, _, intensity, _, _, gigabytes = PUBLISHED[name]
        for op, flops_per_byte, moved in zip(("experts", "experts_bwd"), intensity, gigabytes, strict=True):
            cost = roofline.op_cost(op, layer_of(name))
            assert cost.intensity == pytest.approx(flops_per_byte, abs=1)
            assert cost.bytes / 1e9 == pytest.approx(moved, abs=0.0151)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_to_the_last_digit_with_what_they_count_otherwise(self, name: str) -> None:
        T, _, N, E, K = PUBLISHED[name][0]
        offsets, index = 4 * (E + 1), 4 * T * K
        less = {"experts": 2 * offsets + 4 * (T + 1), "experts_bwd": 4 * offsets + 4 * (T + 1) + 3 * index}
        more = {"experts": 0, "experts_bwd": (math.ceil(N / 128) - 1) * index}
        for op, flops_per_byte, moved in zip(less, PUBLISHED[name][2], PUBLISHED[name][5], strict=True):
            cost = roofline.op_cost(op, layer_of(name))
            num_bytes = cost.bytes - less[op] + more[op]
            assert (round(cost.flops / num_bytes), round(num_bytes / 1e9, 2)) == (flops_per_byte, moved)

    @pytest.mark.parametrize(("chip", "column"), [("H100", 3), ("H200", 4)])
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_bound(self, name: str, chip: str, column: int) -> None:
        for passes, tera in zip(("forward", "backward"), PUBLISHED[name][column], strict=True):
            bound = roofline.layer_bound(layer_of(name), chip, passes)
            assert bound.flops_per_second / 1e12 == pytest.approx(tera, abs=1)

    def test_ridges(self) -> None:
        assert round(roofline.ridge_intensity("H100")) == 295
        assert round(roofline.ridge_intensity(CHIPS["H200"], torch.float16)) == 206
        assert roofline.ridge_intensity("H100", "float8") == pytest.approx(1979e12 / 3.35e12)

    def test_measured_traffic_of_one_kernel(self) -> None:
        """down_proj_bwd_input of Qwen3-235B moved 7.86 GB on a B300, 1% more than this."""
        assert roofline.op_cost("down_proj_bwd_input", layer_of("Qwen3-235B")).bytes / 1e9 == pytest.approx(
            7.79, abs=0.01
        )


class TestNumbersWrittenOut:
    """T = 10, D = 8, N = 4, E = 5, K = 2 in bf16: R = 20, U = 8; offsets 24 bytes, tokens' offsets 44, an index 80."""

    LAYER = Layer(10, 8, 4, 5, 2)

    @pytest.mark.parametrize(
        ("op", "flops", "read", "written"),
        [
            ("up_proj", 2 * 20 * 8 * 8, 2 * (160 + 320) + 80 + 24, 2 * (160 + 80)),
            ("down_proj", 2 * 20 * 4 * 8, 2 * (80 + 160) + 24, 2 * 160),
            ("combine", 0, 2 * 160 + 80 + 80 + 44, 2 * 80),
            ("down_proj_bwd_input", 1280, 2 * (160 + 160 + 160) + 80 + 80 + 24, 2 * (160 + 80) + 80),
            ("down_proj_bwd_weight", 1280, 2 * (160 + 80) + 80 + 24, 2 * 160),
            ("up_proj_bwd_input", 2560, 2 * (160 + 320) + 24, 2 * 160),
            ("up_proj_bwd_weight", 2560, 2 * (160 + 160) + 80 + 24, 2 * 320),
            ("topk_softmax", 0, 4 * 50, 3 * 4 * 20 + 2 * 4 * 5),
            ("topk_softmax_bwd", 0, 3 * 4 * 20, 4 * 50),
            ("build_plan", 0, 4 * 20, 24 + 3 * 80 + 44),
            ("experts", 3840, 1064 + 504 + 524, 480 + 320 + 160),
            ("experts_bwd", 7680, 1144 + 584 + 984 + 744 + 444, 560 + 320 + 320 + 640 + 160),
        ],
    )
    def test_of_each_op(self, op: str, flops: int, read: int, written: int) -> None:
        cost = roofline.op_cost(op, self.LAYER)
        assert cost == Cost(flops, read, written)
        assert (cost.bytes, cost.intensity) == (read + written, flops / (read + written))

    @pytest.mark.parametrize(
        ("options", "op", "more"),
        [
            ({"bias": True}, "up_proj", Cost(0, 2 * 40, 0)),
            ({"bias": True}, "down_proj", Cost(0, 2 * 40, 0)),
            ({"bias": True}, "down_proj_bwd_input", Cost(0, 2 * 40, 0)),
            ({"bias": True}, "down_proj_bwd_weight", Cost(0, 80, 2 * 40)),
            ({"bias": True}, "up_proj_bwd_weight", Cost(0, 0, 2 * 40)),
            ({"gather": "tokens"}, "up_proj", Cost(0, -2 * 80, 0)),
            ({"gather": "tokens"}, "down_proj_bwd_input", Cost(0, -2 * 80, 0)),
            ({"gather": "tokens"}, "down_proj_bwd_weight", Cost(0, -2 * 80, 0)),
            ({"gather": "tokens"}, "up_proj_bwd_weight", Cost(0, -2 * 80, 0)),
            ({"gather": "tokens"}, "down_proj", Cost()),
            ({"need_h": False}, "up_proj", Cost(0, 0, -2 * 160)),
            ({"need_h": False}, "experts_bwd", Cost(2560, 1064, 480)),
            ({"active_experts": 2}, "up_proj", Cost(0, -2 * 3 * 64, 0)),
            ({"active_experts": 2}, "down_proj", Cost(0, -2 * 3 * 32, 0)),
            ({"active_experts": 2}, "down_proj_bwd_input", Cost(0, -2 * 3 * 32, 0)),
            ({"active_experts": 2}, "up_proj_bwd_input", Cost(0, -2 * 3 * 64, 0)),
            ({"active_experts": 2}, "up_proj_bwd_weight", Cost()),
            ({"tokens_per_expert": (0, 0, 0, 10, 10)}, "down_proj", Cost(0, -2 * 3 * 32, 0)),
            ({"dtype": torch.float32}, "combine", Cost(0, 2 * 160, 2 * 80)),
            ({"dtype": torch.float64}, "combine", Cost(0, 6 * 160 + 80, 6 * 80)),
            ({"dtype": torch.float64}, "down_proj_bwd_input", Cost(0, 6 * 480 + 80, 6 * 240 + 80)),
            ({"gated": False}, "up_proj", Cost(-1280, -2 * 160, -2 * 80)),
            ({"tokens_per_expert": (4, 4, 4, 4, 4), "tile_rows": 8}, "up_proj_bwd_input", Cost(20 * 128, 0, 0)),
            ({"tokens_per_expert": (4, 4, 4, 4, 4), "tile_rows": 8}, "up_proj_bwd_weight", Cost()),
            ({"tokens_per_expert": (4, 4, 4, 4, 3)}, "build_plan", Cost(0, 8 * 19 - 80, -12)),
            ({"num_tokens": 129}, "topk_softmax", Cost(0, 4 * 5 * 119, 12 * 2 * 119 + 4 * 5)),  # a second run
            ({"top_k": 3, "num_tokens": 129}, "topk_softmax", Cost(0, 4 * 5 * 119, 12 * (387 - 20) + 2 * 4 * 5)),
        ],
    )
    def test_of_each_option(self, options: dict[str, Any], op: str, more: Cost) -> None:
        assert (
            roofline.op_cost(op, dataclasses.replace(self.LAYER, **options)) == roofline.op_cost(op, self.LAYER) + more
        )

    def test_time(self) -> None:
        chip = roofline.Chip("toy", "none", {"bfloat16": 100.0, "float8": 200.0}, 10.0, 1, 1, 1, "made up")
        assert roofline.bound_time(Cost(1000, 40, 50), chip) == 10.0
        assert roofline.bound_time(Cost(1000, 40, 50), chip, torch.float8_e4m3fn) == 9.0
        assert roofline.bound_time(Cost(1000, 80, 40), chip) == 12.0
        assert roofline.bounded_by(Cost(1000, 40, 50), chip) == "compute"
        assert roofline.bounded_by(Cost(1000, 40, 60), chip) == "compute"
        assert roofline.bounded_by(Cost(1000, 40, 61), chip) == "memory"
        assert (Cost().intensity, Cost(1).intensity) == (0.0, math.inf)

    def test_fraction(self) -> None:
        """A forward of 1.237 ms for the 7B layer, as published, attains 63% of its bound."""
        layer = layer_of("7B-n256")
        forward = roofline.layer_bound(layer, "H100", "forward")
        assert forward.seconds == pytest.approx(464e9 / 599e12, rel=2e-3)  # 6 T K N D at 599 TFLOP/s
        assert roofline.fraction_of_bound(1.237e-3, forward) == pytest.approx(0.626, abs=2e-3)
        assert roofline.fraction_of_bound(2.0, 1.0) == 0.5

    def test_padding_of_counts(self) -> None:
        counts = (0, 1, 128, 129, 300)
        layer = Layer(300, 8, 4, 5, 2, tokens_per_expert=counts, tile_rows=128)
        assert (layer.num_rows, layer.padded_rows, layer.num_active_experts) == (558, 128 + 128 + 256 + 384, 4)

    def test_padding_without_counts(self) -> None:
        """What random routing wastes: 12.1, 24.1 and 48% of tiles of 64, 128 and 256 rows at 256 tokens per expert."""
        for tile, waste in ((64, 0.121), (128, 0.241), (256, 0.48)):
            layer = Layer(16384, 1536, 1024, 128, 2, tile_rows=tile)
            assert layer.padded_rows / layer.num_rows - 1 == pytest.approx(waste, abs=0.02)
        assert Layer(1, 8, 4, 64, 2, tile_rows=128).padded_rows == 256  # two experts with a row each
        assert Layer(256, 8, 4, 2, 2, tile_rows=128).padded_rows == 512  # every expert has every token
        assert Layer(129, 8, 4, 2, 2, tile_rows=128).padded_rows == 512


class TestSums:
    @given(layers)
    def test_passes_are_sums_of_their_ops(self, layer: Layer) -> None:
        forward = sum((roofline.op_cost(op, layer) for op in ("up_proj", "down_proj", "combine")), Cost())
        assert roofline.op_cost("experts", layer) == forward
        T, D, N, R = layer.num_tokens, layer.hidden_size, layer.intermediate_size, layer.num_rows
        factor = 3 if layer.gated else 2
        ideal = dataclasses.replace(layer, tile_rows=1, need_h=True)
        both = roofline.layer_bound(ideal, "A100")
        assert (
            roofline.op_cost("experts", ideal).flops == 2 * factor * R * D * N == 2 * factor * T * layer.top_k * N * D
        )
        assert both.cost.flops == both.useful_flops == 6 * factor * R * D * N  # gated: 18 T K N D
        again = roofline.op_cost("experts_bwd", dataclasses.replace(ideal, need_h=False)).flops - 4 * factor * R * D * N
        assert again == 2 * R * D * layer.up_rows

    @given(layers, st.sampled_from(sorted(CHIPS)), st.booleans())
    def test_bounds_are_sums_of_times(self, layer: Layer, chip: str, with_routing: bool) -> None:
        forward, backward = (roofline.layer_bound(layer, chip, name) for name in ("forward", "backward"))
        both = roofline.layer_bound(layer, chip, with_routing=with_routing)
        routed = [
            roofline.layer_bound(layer, chip, name, with_routing=with_routing) for name in ("forward", "backward")
        ]
        assert both.seconds == pytest.approx(sum(bound.seconds for bound in routed))
        assert both.ops == routed[0].ops + routed[1].ops
        experts = [op for op in both.ops if op.op not in ("topk_softmax", "build_plan", "topk_softmax_bwd")]
        assert experts == [*forward.ops, *backward.ops]
        assert forward.cost == roofline.op_cost("experts", layer)
        assert backward.cost == roofline.op_cost("experts_bwd", layer)
        assert both.useful_flops == forward.useful_flops + backward.useful_flops
        for op in both.ops:
            memory = op.cost.bytes / CHIPS[chip].memory_bytes_per_second
            assert op.seconds >= memory and (op.seconds == memory) >= (op.bounded_by == "memory")
            assert op.seconds == roofline.bound_time(op.cost, chip, layer.dtype)
        names = [op.op for op in both.ops]
        assert (names[:2] == ["topk_softmax", "build_plan"]) is with_routing
        assert (names[-1] == "topk_softmax_bwd") is with_routing and len(names) == len(experts) + 3 * with_routing
        assert names.count("up_proj") == (1 if layer.need_h else 2) and names.count("combine") == 2

    @given(*[st.builds(Cost, *[st.integers(0, 10**15)] * 3)] * 3)
    def test_costs_add_up(self, a: Cost, b: Cost, c: Cost) -> None:
        assert (a + b) + c == a + (b + c) == c + b + a
        assert a + Cost() == a and (a + b).bytes == a.bytes + b.bytes
        joint, apart = (
            roofline.bound_time(a + b, "H100"),
            roofline.bound_time(a, "H100") + roofline.bound_time(b, "H100"),
        )
        assert joint <= apart * (1 + 1e-12)
        with pytest.raises(TypeError):
            a + 1


class TestOrder:
    @settings(max_examples=50)
    @given(layers, st.sampled_from(["num_tokens", "hidden_size", "intermediate_size", "num_experts", "top_k"]))
    def test_more_costs_more(self, layer: Layer, size: str) -> None:
        larger = dataclasses.replace(layer, **{size: 2 * getattr(layer, size)}) if size != "top_k" else layer
        if size == "top_k" and layer.top_k < layer.num_experts:
            larger = dataclasses.replace(layer, top_k=layer.top_k + 1)
        for op in roofline.OPS:
            less, more = roofline.op_cost(op, layer), roofline.op_cost(op, larger)
            assert less.flops <= more.flops and less.bytes_read <= more.bytes_read
            assert less.bytes_written <= more.bytes_written
            assert roofline.bound_time(less, "H200", layer.dtype) <= roofline.bound_time(more, "H200", layer.dtype)

    @settings(max_examples=50)
    @given(layers)
    def test_ideal_plain_and_lean_cost_no_more(self, layer: Layer) -> None:
        for lean in (
            {"tile_rows": 1},
            {"gated": False},
            {"bias": False},
            {"gather": "tokens"},
            {"active_experts": layer.top_k},
        ):
            for op in roofline.OPS:
                less, more = roofline.op_cost(op, dataclasses.replace(layer, **lean)), roofline.op_cost(op, layer)
                if "active_experts" in lean:  # tiles of fewer experts
                    less = dataclasses.replace(less, flops=more.flops)
                assert less.flops <= more.flops and less.bytes_read <= more.bytes_read
                assert less.bytes_written <= more.bytes_written

    @settings(max_examples=50)
    @given(layers)
    def test_padding_adds_flops_only(self, layer: Layer) -> None:
        ideal = dataclasses.replace(layer, tile_rows=1)
        assert ideal.padded_rows == layer.num_rows <= layer.padded_rows
        assert layer.padded_rows >= layer.tile_rows * layer.num_active_experts
        for op in GEMMS:
            padded, exact = roofline.op_cost(op, layer), roofline.op_cost(op, ideal)
            assert (padded.bytes_read, padded.bytes_written) == (exact.bytes_read, exact.bytes_written)
            rows = layer.num_rows if op.endswith("weight") else layer.padded_rows
            assert padded.flops * layer.num_rows == exact.flops * rows
        assert roofline.layer_bound(layer, "B200").useful_flops == roofline.layer_bound(ideal, "B200").useful_flops

    @pytest.mark.parametrize("chip", CHIPS)
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_threshold_is_where_the_bound_changes(self, name: str, chip: str) -> None:
        layer = layer_of(name)
        for op in GEMMS:
            rows = roofline.compute_bound_tokens(op, layer, chip)
            sides = []
            for factor in (0.98, 1.02) if rows < math.inf else (1e6,):
                mean = factor * (rows if rows < math.inf else 1)
                there = dataclasses.replace(layer, num_tokens=round(mean * layer.num_experts / layer.top_k))
                sides.append(roofline.bounded_by(roofline.op_cost(op, there), chip))
            assert sides == (["memory", "compute"] if rows < math.inf else ["memory"]), (op, rows)

    def test_threshold_by_hand(self) -> None:
        """Up projection on H100: 4 N D FLOP and 4 + 2 D + 6 N bytes a row, 4 N D + 4 bytes an expert."""
        D, N, ridge = 7168, 2048, 989e12 / 3.35e12
        by_hand = (4 * N * D + 4 + 4 / 256) / (4 * N * D / ridge - 4 - 2 * D - 6 * N)
        layer = layer_of("DeepSeek-V3.2", tile_rows=128)
        threshold = roofline.compute_bound_tokens("up_proj", layer, "H100")
        assert threshold == pytest.approx(by_hand) == pytest.approx(340, abs=10)
        counts = (32768,) * 8 + (0,) * 248
        uneven = dataclasses.replace(layer, tokens_per_expert=counts)
        assert roofline.compute_bound_tokens("up_proj", uneven, "H100") == threshold
        assert roofline.compute_bound_tokens("combine", layer, "H100") == math.inf
        assert roofline.compute_bound_tokens("down_proj", layer_of("7B-n256"), "H100") == math.inf


T, D, N, E, K = 57, 20, 12, 7, 3


def plain_loop(x: Tensor, w1: Tensor, w2: Tensor, expert_index: Tensor, scores: Tensor, gated: bool) -> Tensor:
    """The layer in plain torch, one expert at a time."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, slot = torch.where(expert_index == e)
        h = x[token] @ w1[e].T
        a = F.silu(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :] if gated else F.gelu(h)
        out = out.index_add(0, token, (a @ w2[e].T) * scores[token, slot, None])
    return out


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_flops_are_those_that_torch_counts(gated: bool) -> None:
    problem = make_problem(T, D, N, E, K, torch.float32, activation="swiglu" if gated else "gelu")
    leaves = problem.leaves()
    args = leaves["x"], leaves["w1"], leaves["w2"], problem.expert_index, leaves["scores"], gated
    layer = Layer(T, D, N, E, K, gated=gated, dtype=torch.float32)
    with FlopCounterMode(display=False) as counted:
        out = plain_loop(*args)
    assert roofline.op_cost("experts", layer).flops == counted.get_total_flops() == (6 if gated else 4) * T * K * N * D
    with FlopCounterMode(display=False) as counted:
        out.backward(problem.dout)
    assert (
        roofline.op_cost("experts_bwd", layer).flops
        == counted.get_total_flops()
        == (12 if gated else 8) * T * K * N * D
    )


def num_bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("need_h", [True, False], ids=["h", "no-h"])
def test_bytes_are_those_of_the_tensors_of_real_calls(
    activation: str, bias: bool, dtype: torch.dtype, need_h: bool
) -> None:
    """Every tensor that goes in, and every one that comes out, once; all experts have rows."""
    problem = make_problem(T, D, N, E, K, dtype, activation=activation, bias=bias)
    layer = Layer(T, D, N, E, K, activation == "swiglu", bias, dtype, need_h, gather="tokens")
    plan, scores = problem.plan, problem.grouped().row_scores
    offset, token = plan.expert_offset_E1, plan.token_of_row_R
    assert offset.diff().min() > 0
    names = activation, "concatenated"
    calls: dict[str, tuple[Any, ...]] = {}

    def call(op: str, *args: Any) -> Any:
        result = getattr(ops, op)(*args)
        calls[op] = args, result if isinstance(result, tuple) else (result,)
        return result

    h, a = call("up_proj", problem.x, problem.w1, problem.b1, token, offset, *names, need_h)
    y = call("down_proj", a, problem.w2, problem.b2, None, offset)
    maps = plan.row_by_token_R, plan.token_offset_T1
    call("combine", y, scores, *maps)
    if not need_h:
        h, _ = ops.up_proj(problem.x, problem.w1, problem.b1, token, offset, *names, True)
    dh, scaled_a, _ = call(
        "down_proj_bwd_input", problem.dout, h, problem.w2, problem.b2, scores, token, offset, *names
    )
    scores_for_bias = scores if bias else None
    call("down_proj_bwd_weight", problem.dout, scaled_a, scores_for_bias, token, offset, True, bias)
    call("up_proj_bwd_input", dh, problem.w1, offset)
    call("up_proj_bwd_weight", dh, problem.x, token, offset, True, bias)
    logits = torch.randn(T, E, dtype=torch.promote_types(dtype, torch.float32))
    scores, expert, prob, _ = call("topk_softmax", logits, K)
    call("topk_softmax_bwd", scores, expert, prob, None, E)
    call("best_of_columns", logits, None, plan.tokens_per_expert().tolist())
    call("build_plan", expert.reshape(-1), None, T, E)
    assert set(calls) == {op for op in roofline.OPS if not op.startswith("experts")}
    for op, (args, results) in calls.items():
        cost = roofline.op_cost(op, layer)
        assert (cost.bytes_read, cost.bytes_written) == (num_bytes(args), num_bytes(results)), op


def test_bytes_of_a_plan_from_pairs() -> None:
    counts = (2, 0, 3, 1)
    expert, token = (
        torch.tensor([0, 0, 2, 2, 2, 3], dtype=torch.int32),
        torch.tensor([1, 4, 0, 1, 2, 3], dtype=torch.int32),
    )
    cost = roofline.op_cost("build_plan", Layer(5, 8, 4, 4, 2, tokens_per_expert=counts))
    written = num_bytes(ops.build_plan(expert, token, 5, 4))
    assert (cost.bytes_read, cost.bytes_written) == (num_bytes((expert, token)), written)


class TestBadInput:
    GOOD = {"num_tokens": 10, "hidden_size": 8, "intermediate_size": 4, "num_experts": 5, "top_k": 2}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_tokens": 0}, "num_tokens is 0, expected a positive integer"),
            ({"hidden_size": -8}, "hidden_size is -8"),
            ({"intermediate_size": 4.0}, "intermediate_size is 4.0"),
            ({"num_experts": True}, "num_experts is True"),
            ({"top_k": "2"}, "top_k is '2'"),
            ({"tile_rows": 0}, "tile_rows is 0"),
            ({"top_k": 6}, "top_k is 6, expected at most num_experts = 5"),
            ({"dtype": torch.int8}, "dtype is 'int8', expected one of 'bfloat16'"),
            ({"dtype": torch.float8_e4m3fn}, "dtype is 'float8'"),
            ({"dtype": None}, "dtype is 'None'"),
            ({"gather": "row"}, "gather is 'row', expected one of 'rows', 'tokens'"),
            ({"gated": "swiglu"}, "gated is 'swiglu', expected True or False"),
            ({"active_experts": 0}, "active_experts is 0"),
            ({"active_experts": 1}, r"active_experts is 1, expected top_k to .*: 2 to 5"),
            ({"active_experts": 6}, "active_experts is 6"),
            ({"num_tokens": 1, "active_experts": 3}, ": 2 to 2"),
            (
                {"tokens_per_expert": (1, 2)},
                "tokens_per_expert is of 2 entries, expected a sequence of num_experts = 5",
            ),
            ({"tokens_per_expert": 4}, "tokens_per_expert is a int"),
            (
                {"tokens_per_expert": (1, 2, 3, 4, 11)},
                "a sequence with 11, expected integers from 0 to num_tokens = 10",
            ),
            ({"tokens_per_expert": (1, 2, 3, 4, -1)}, "a sequence with -1"),
            ({"tokens_per_expert": (1, 2, 3, 4, 1.5)}, "a sequence with 1.5"),
            ({"tokens_per_expert": (0,) * 5}, "all zeros, expected at least one row"),
            ({"tokens_per_expert": (4,) * 5, "active_experts": 5}, "active_experts is 5, expected None beside"),
        ],
    )
    def test_layers(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"sonic.roofline.Layer: .*{message}"):
            Layer(**{**self.GOOD, **options})

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda layer: roofline.op_cost("up", layer), "op_cost: op is 'up', expected one of 'up_proj'"),
            (lambda layer: roofline.bound_time(Cost(1), "V100"), "bound_time: chip is 'V100', expected one of 'H100'"),
            (lambda layer: roofline.bound_time(3, "H100"), "bound_time: cost is a int"),
            (lambda layer: roofline.bounded_by(Cost(1), None), "bounded_by: chip is None"),
            (
                lambda layer: roofline.bound_time(Cost(1), "A100", "float8"),
                "dtype is 'float8', expected one that A100 has",
            ),
            (lambda layer: roofline.ridge_intensity("H100", torch.int8), "ridge_intensity: dtype is 'int8'"),
            (lambda layer: roofline.layer_bound(layer, "H300"), "layer_bound: chip is 'H300'"),
            (lambda layer: roofline.layer_bound(layer, "H100", "fwd"), "layer_bound: passes is 'fwd'"),
            (lambda layer: roofline.compute_bound_tokens("experts", layer, "H100"), "tokens: op is 'experts'"),
            (lambda layer: roofline.compute_bound_tokens("up_proj", layer, "H300"), "tokens: chip is 'H300'"),
            (lambda layer: roofline.fraction_of_bound(0, 1.0), "measured_seconds is 0, expected a positive, finite"),
            (lambda layer: roofline.fraction_of_bound(1.0, math.nan), "bound is nan"),
            (lambda layer: roofline.fraction_of_bound("1", 1.0), "measured_seconds is '1'"),
        ],
    )
    def test_calls(self, call: Callable[[Layer], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(Layer(**self.GOOD))


class TestChips:
    @pytest.mark.parametrize("name", CHIPS)
    def test_figures_are_dense_and_in_units(self, name: str) -> None:
        """A sparse figure, a factor of 1000 or a mistyped one would leave these ranges, which no such chip does."""
        chip = CHIPS[name]
        peak = chip.flops_per_second
        assert chip.name == name and chip.source
        assert peak["bfloat16"] == peak["float16"] == pytest.approx(2 * peak["tfloat32"])
        assert peak["float64"] <= peak["float32"] < peak["tfloat32"]
        assert peak.get("float8", 2 * peak["bfloat16"]) == pytest.approx(2 * peak["bfloat16"], rel=1e-3)
        assert 100 < roofline.ridge_intensity(chip) < 300
        assert (
            80e9 <= chip.memory_bytes <= 192e9 and 30e6 < chip.l2_bytes < 140e6 and 100 < chip.num_compute_units < 310
        )

    def test_those_asked_for(self) -> None:
        arches = {"H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "A100": "sm_80", "MI300X": "gfx942"}
        assert {name: chip.arch for name, chip in CHIPS.items()} == arches
        assert CHIPS["H100"].flops_per_second["bfloat16"] == 989e12
        assert len(set(CHIPS.values())) == 5
        with pytest.raises(dataclasses.FrozenInstanceError):
            CHIPS["H100"].name = "H800"  # type: ignore[misc]

    def test_costs_follow_from_a_chip_of_ones_own(self) -> None:
        wide = dataclasses.replace(CHIPS["H100"], name="wide", memory_bytes_per_second=6.7e12)
        combine = roofline.op_cost("combine", layer_of("7B-n256"))
        assert roofline.bound_time(combine, wide) == roofline.bound_time(combine, "H100") / 2


def test_ops_are_those_of_the_library() -> None:
    assert sorted(roofline.OPS) == sorted(dispatch.OPS)
