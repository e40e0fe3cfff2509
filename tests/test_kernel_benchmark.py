"""The benchmark of single ops: who competes is right, what is wrong is not timed, what is written holds together."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernel_rivals, kernels, measure
from benchmarks.cpu_moe import Shape
from sonic import roofline

CPU = torch.device("cpu")
SHAPE = Shape(48, 32, 16, 4, 2)
# An expert without rows, K = 3, widths that differ.
UNEVEN = Shape(21, 24, 40, 7, 3)
QUICK = ["--quick", "--repeats", "1"]


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Garbage is collected before each round of timing: not among what pytest and torch hold, a third of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = kernels.main([*QUICK, "--out", str(out), *arguments])
    return code, json.loads(out.read_text())


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not they are installed here, neither ScatterMoE nor QuACK can be imported."""
    for name in ("scattermoe", "quack"):
        monkeypatch.setitem(sys.modules, name, None)


# -------------------------------------------------------------------------------------------------------- from A to Z


@pytest.mark.usefixtures("no_libraries")
def test_quick_writes_what_the_docstring_says_and_the_figures_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, written = run(tmp_path / "new" / "k.json")
    assert code == 0
    assert written.keys() == {"benchmark", "command", "machine", "missing", "seed", "device", "cells"}
    assert written["missing"].keys() == {"scattermoe", "quack"}
    assert "not importable" in written["missing"]["quack"]
    assert written["device"]["grouped_mm"] == "torch.nn.functional.grouped_mm"
    assert [cell["op"] for cell in written["cells"]] == list(kernels.OPS)
    everyone = {"sonic/cute", "sonic/triton", "sonic/reference", "torch", "scattermoe", "quack", "dense"}
    for cell in written["cells"]:
        assert cell["command"] == written["command"] and cell["bound_us"] is None and cell["rounds"] == 1
        assert cell["contenders"].keys() | cell["missing"].keys() == everyone | {"dense batched"}
        assert not cell["contenders"].keys() & cell["missing"].keys() and all(cell["missing"].values())
        assert {"sonic/reference", "torch"} <= cell["contenders"].keys()
        assert {"sonic/triton", "scattermoe", "quack"} <= cell["missing"].keys()
        ours = cell["contenders"]["sonic/reference"]["median_us"]
        for name, entry in cell["contenders"].items():
            seconds = entry["median_us"] / 1e6
            assert 0 < entry["p25_us"] <= entry["median_us"] <= entry["p75_us"]
            assert entry["gbytes_per_second"] == pytest.approx(cell["bytes"] / seconds / 1e9)
            assert (entry["tflops"] or 0) == pytest.approx(cell["flops"] / seconds / 1e12)
            assert entry["wrong"] is None and entry["fraction_of_bound"] is None
            # Errors of bf16: zero for the integers only.
            checked = entry["error"]
            assert (checked.keys() == set(kernel_rivals.RESULTS[cell["op"]])) == (entry["kind"] != "yardstick")
            assert all((error["relative"] == 0) == (cell["op"] == "build_plan") for error in checked.values()) or (
                cell["op"] == "topk_softmax"
            )
            assert entry["times_as_long_as"].keys() == ({"sonic/reference"} - {name})
            for ratio in entry["times_as_long_as"].values():  # of one round
                assert ratio["median"] == pytest.approx(entry["median_us"] / ours)
    page = (tmp_path / "new" / "k.md").read_text()
    assert "## Below 60% of the bound" in page and "no bound is known" in page and "## Summary" in page
    assert "Not measured: scattermoe: scattermoe is not importable" in page
    assert all(f"## {op}, tiny (T=64 D=32 N=16 E=4 K=2), bf16" in page for op in kernels.OPS)
    assert "sonic/reference is x faster" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir() if path.suffix not in (".json", ".md")] == []


def test_what_is_far_from_the_bound_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_of = kernels._device_report
    monkeypatch.setattr(kernels, "_device_report", lambda device, chip: report_of(device, chip) | {"chip": "H100"})
    _, written = run(tmp_path / "k.json", "--ops", "up_proj", "experts", "--rivals")
    for cell in written["cells"]:
        entry = cell["contenders"]["sonic/reference"]
        assert entry["fraction_of_bound"] == pytest.approx(cell["bound_us"] / entry["median_us"]) != 0
    page = (tmp_path / "k.md").read_text()
    low = page.split("## Below 60% of the bound")[1].split("##")[0]
    assert "experts, tiny" in low and "of the bound with sonic/reference. Bounded by memory" in low
    assert f"measured {entry['median_us']:.1f} us" in low and "TFLOP/s" in low and "GB/s" in low

    monkeypatch.setattr(kernels, "LOW", 0.0)
    kernels.main([*QUICK, "--out", str(tmp_path / "all.json"), "--ops", "up_proj", "--rivals"])
    assert "## Below 0% of the bound\n\nNothing." in (tmp_path / "all.md").read_text()


def test_a_killed_run_keeps_what_it_measured_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, measured = tmp_path / "k.json", []
    measure_cell = kernels.measure_cell

    def killed(name: str, shape: Shape, op: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        if op == "build_plan" and len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(op)
        return measure_cell(name, shape, op, *arguments, **options)

    monkeypatch.setattr(kernels, "measure_cell", killed)
    ops = ("--ops", "topk_softmax", "build_plan")
    with pytest.raises(KeyboardInterrupt):
        run(out, *ops)
    assert [cell["op"] for cell in json.loads(out.read_text())["cells"]] == ["topk_softmax"]
    monkeypatch.setattr(kernels, "measure_cell", lambda *a, **o: measured.append(a[2]) or measure_cell(*a, **o))
    code, written = run(out, *ops)
    assert code == 0 and measured == ["topk_softmax", "build_plan"]
    assert "topk_softmax, tiny: already in" in capsys.readouterr().out
    assert [cell["op"] for cell in written["cells"]] == ["topk_softmax", "build_plan"]
    run(out, *ops, "--rivals", "torch")  # fewer contenders: all are there
    assert len(measured) == 2
    # Another dtype, routing or contender is another measurement; the last one takes the place of the old.
    run(out, *ops, "--dtype", "fp32")
    assert len(run(out, *ops, "--skew", "0.5")[1]["cells"]) == 6 and len(measured) == 6
    assert len(run(out, *ops, "--tune")[1]["cells"]) == 6 and len(measured) == 8
    assert len(run(out, *ops, "--overwrite")[1]["cells"]) == 2 and len(measured) == 10


@pytest.mark.parametrize("text", ['{"cells": []}', "no JSON"])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k.json"
    out.write_text(text)
    with pytest.raises(SystemExit):
        run(out, "--ops", "combine")
    assert "argument --out" in capsys.readouterr().err and out.read_text() == text


def test_figures_of_another_device_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "k.json"
    run(out, "--ops", "build_plan")
    monkeypatch.setattr(measure, "cpu_name", lambda: "another chip")
    with pytest.raises(SystemExit):
        run(out, "--ops", "combine")
    assert f"argument --out: {out} holds figures of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "up_projection"], "argument --ops: invalid choice: 'up_projection'"),
        (["--shapes", "gpt-5"], "argument --shapes: 'gpt-5' is no shape, expected one of 7b-n256"),
        (["--shapes", "4,4,4,2,3"], "argument --shapes: '4,4,4,2,3' is no shape"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--backends", "cuda"], "argument --backends: invalid choice: 'cuda'"),
        (["--rivals", "megablocks"], "argument --rivals: invalid choice: 'megablocks'"),
        (["--repeats", "0"], "argument --repeats: is '0', expected a positive integer"),
        (["--skew", "-1"], "argument --skew: is '-1', expected a finite number"),
        (["--out", "k.txt"], "argument --out: is 'k.txt', expected a name that ends in .json"),
        (["--chip", "H100", "--device", "cpu"], "argument --chip: this run is on a CPU"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernels.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- right or not


def cell_of(op: str, *, shape: Shape = SHAPE, dtype: str = "fp32", **contenders: Any) -> dict[str, Any]:
    routing = kernel_rivals.make_routing(shape, CPU)
    return kernels.measure_cell("test", shape, op, dtype, routing, contenders, device=CPU, rounds=1)


def spoiled(spoil: Callable[[tuple[Tensor, ...]], Any]) -> Callable[[str, kernel_rivals.Inputs], Any]:
    def build(op: str, inputs: kernel_rivals.Inputs) -> kernel_rivals.Contender:
        good = kernel_rivals.torch_ops(op, inputs)
        return kernel_rivals.Contender("rival", lambda: spoil(good.call()), good.named)

    return build


def one_row_off(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    result[-1][3] *= 1.01
    return result


def one_nan(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    result[-1].view(-1)[5] = float("nan")
    return result


@pytest.mark.parametrize("op", [op for op in kernels.OPS if op not in ("topk_softmax", "build_plan")])
@pytest.mark.parametrize("spoil", [one_row_off, one_nan])
def test_a_wrong_contender_is_reported_and_not_timed(op: str, spoil: Callable[..., Any]) -> None:
    cell = cell_of(op, good=kernel_rivals.torch_ops, bad=spoiled(spoil))
    assert "median_us" in cell["contenders"]["good"] and cell["contenders"]["good"]["wrong"] is None
    assert "median_us" not in cell["contenders"]["bad"]
    assert f"{kernel_rivals.RESULTS[op][-1]} has a relative error of" in cell["contenders"]["bad"]["wrong"]
    json.dumps(cell, allow_nan=False)


def test_wrong_indices_shapes_and_types_are_found_out() -> None:
    def swapped(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result[2][:2] = result[2][:2].flip(0)
        return result

    assert "slot_of_row" in cell_of("build_plan", bad=spoiled(swapped))["contenders"]["bad"]["wrong"]
    shifted = spoiled(lambda result: (result[0], (result[1] + 1) % SHAPE.E))
    assert "experts has a relative" in cell_of("topk_softmax", bad=shifted)["contenders"]["bad"]["wrong"]
    outside = spoiled(lambda result: (result[0], result[1] + 1))
    assert "outside 0 to 3" in cell_of("topk_softmax", bad=outside)["contenders"]["bad"]["wrong"]
    floats = spoiled(lambda result: (result[0], result[1].float()))
    assert "expected integers" in cell_of("topk_softmax", bad=floats)["contenders"]["bad"]["wrong"]
    short = spoiled(lambda result: (result[0][:-1],))
    assert cell_of("combine", bad=short)["contenders"]["bad"]["wrong"] == "out is (47, 32), expected (48, 32)"


def test_nobody_finds_the_right_result_of_another_in_memory() -> None:
    kept: list[tuple[Tensor, ...]] = []

    def keeps(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(result)
        return result

    cell = cell_of("combine", good=spoiled(keeps), idle=spoiled(lambda _: kept[0]))
    assert cell["contenders"]["good"]["wrong"] is None
    assert "relative error of nan" in cell["contenders"]["idle"]["wrong"]


def test_a_wrong_contender_sets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kernel_rivals.RIVALS, "torch", spoiled(one_nan))
    code, _ = run(tmp_path / "k.json", "--ops", "combine", "--rivals", "torch")
    assert code == 1 and "WRONG RESULT: torch in combine, tiny" in capsys.readouterr().out
    assert "WRONG, not timed: torch: out has a relative error" in (tmp_path / "k.md").read_text()


@pytest.mark.parametrize("op", kernels.OPS)
def test_all_are_right_where_an_expert_has_no_row(op: str) -> None:
    routing = kernel_rivals.make_routing(UNEVEN, CPU, skew=3.0)
    assert 0 in routing.counts
    reference: Any = lambda op, inputs: kernel_rivals.sonic_backend(op, inputs, "reference", True)  # noqa: E731
    contenders = {"torch": kernel_rivals.torch_ops, "sonic/reference": reference}
    for dtype in kernels.DTYPES:
        cell = kernels.measure_cell("test", UNEVEN, op, dtype, routing, contenders, device=CPU, rounds=1)
        assert cell["contenders"].keys() == {"torch", "sonic/reference"}
        assert [entry["wrong"] for entry in cell["contenders"].values()] == [None, None]


# --------------------------------------------------------------------------------------------------------- who competes


def fake_scattermoe() -> dict[str, ModuleType]:
    """What its kernels compute, by the interface of 0.3.0, in a loop."""

    def scatter2scatter(
        X: Tensor,
        W: Tensor,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        k: int,
        b: Tensor | None = None,
        x_grouped: bool = False,
        y_grouped: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        rows = X if x_grouped else X[sorted_scattered_idxs // k]
        y = torch.stack([row @ W[e] for row, e in zip(rows, sorted_expert_idxs, strict=True)])
        return y if y_grouped else torch.empty_like(y).index_copy(0, sorted_scattered_idxs, y)

    def group(A: Tensor, sorted_expert_idxs: Tensor, coeff: None = None, fan_out: int = 1, out: None = None) -> Tensor:
        return A[sorted_expert_idxs // fan_out]

    def group_bwd_W(DY: Tensor, X: Tensor, expert_offsets: Tensor, E: int, has_bias: bool = False) -> Any:
        parts = zip(X.tensor_split(expert_offsets[:-1]), DY.tensor_split(expert_offsets[:-1]), strict=True)
        return torch.stack([x.t() @ dy for x, dy in parts]), None

    def parallel_linear(
        inputs: Tensor,
        expert_weights: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        expert_biases: Tensor | None = None,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        indices = (sorted_expert_idxs, sorted_scattered_idxs)
        y = scatter2scatter(inputs, expert_weights, *indices, k, None, grouped_in, grouped_out)
        return y if gates is None else (gates[:, None] @ y.view(*gates.shape, -1))[:, 0]

    package, folder, kernels_ops = (ModuleType(f"scattermoe{rest}") for rest in ("", ".kernels", ".kernels.ops"))
    package.parallel_linear = parallel_linear  # type: ignore[attr-defined]
    for function in (scatter2scatter, group, group_bwd_W):
        setattr(kernels_ops, function.__name__, function)
    return {module.__name__: module for module in (package, folder, kernels_ops)}


def fake_quack() -> dict[str, ModuleType]:
    """What its kernels compute, by the interface of 0.6.4, in a loop; gate and up are interleaved."""

    def gemm(
        A: Tensor,
        B: Tensor,
        cu_seqlens_m: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        A_idx: Tensor | None = None,
        tuned: bool = True,
    ) -> Tensor:
        assert not tuned
        edges = (cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k)[1:-1].long()
        if cu_seqlens_k is not None:
            assert A_idx is not None
            parts = zip(A[:, A_idx.long()].tensor_split(edges, dim=1), B.tensor_split(edges), strict=True)
            return torch.stack([a @ b for a, b in parts])
        rows = A if A_idx is None else A[A_idx.long()]
        return torch.cat([a @ b for a, b in zip(rows.tensor_split(edges), B, strict=True)])

    def gemm_gated(
        A: Tensor,
        B: Tensor,
        activation: str | None = None,
        cu_seqlens_m: Tensor | None = None,
        A_idx: Tensor | None = None,
        store_preact: bool = True,
        tuned: bool = True,
    ) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu" and store_preact
        h = gemm(A, B, cu_seqlens_m, None, A_idx, tuned)
        return h, torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2]

    def gemm_dgated(
        A: Tensor,
        B: Tensor,
        PreAct: Tensor,
        activation: str | None = None,
        colvec_scale: Tensor | None = None,
        colvec_reduce: bool = False,
        cu_seqlens_m: Tensor | None = None,
        A_idx: Tensor | None = None,
        tuned: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert activation == "swiglu" and colvec_reduce and colvec_scale is not None
        da = gemm(A, B, cu_seqlens_m, None, A_idx, tuned).float()
        h = PreAct.float().requires_grad_()
        a = torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2]
        (dh,) = torch.autograd.grad(a, h, da * colvec_scale[:, None])
        return dh.to(A.dtype), (a * colvec_scale[:, None]).to(A.dtype).detach(), (a * da).sum(-1).detach()

    def topk(x: Tensor, k: int, softmax: bool = False) -> tuple[Tensor, Tensor]:
        values, indices = x.topk(k)
        return (values.softmax(-1) if softmax else values), indices.int()

    package, interface, top = (ModuleType(f"quack{rest}") for rest in ("", ".gemm_interface", ".topk"))
    for function in (gemm, gemm_gated, gemm_dgated):
        setattr(interface, function.__name__, function)
    top.topk = topk  # type: ignore[attr-defined]
    return {module.__name__: module for module in (package, interface, top)}


LIBRARIES = {"scattermoe": fake_scattermoe, "quack": fake_quack}
LACKS = {
    "scattermoe": {"combine", "topk_softmax", "build_plan"},
    "quack": {"combine", "build_plan", "experts", "experts_fwd_bwd"},
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_called_as_their_interfaces_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, fake in LIBRARIES[name]().items():
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(kernel_rivals, "_demand_gpu", lambda inputs: None)
    assert kernel_rivals.why_not_importable(name) is None
    for op in kernels.OPS:
        cell = cell_of(op, dtype="bf16", **{name: kernel_rivals.RIVALS[name]})
        if op in LACKS[name]:
            assert cell["contenders"] == {} and cell["missing"][name]
        else:
            assert cell["missing"] == {} and cell["contenders"][name]["wrong"] is None
    monkeypatch.undo()


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_that_cannot_serve_are_listed_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = LIBRARIES[name]()
    for module, fake in modules.items():
        monkeypatch.setitem(sys.modules, module, fake)
    build = {name: kernel_rivals.RIVALS[name]}
    assert cell_of("up_proj", dtype="bf16", **build)["missing"] == {name: "needs a GPU"}
    monkeypatch.setattr(kernel_rivals, "_demand_gpu", lambda inputs: None)
    assert cell_of("up_proj", **build)["missing"] == {name: "multiplies float32 as TF32"}
    for function in ("scatter2scatter", "gemm"):
        for module in modules.values():
            if hasattr(module, function):
                monkeypatch.setattr(module, function, lambda X, W, padded_block_idxs: None)
    assert "this version's" in cell_of("up_proj", dtype="bf16", **build)["missing"][name]
    monkeypatch.undo()


def test_scattermoe_is_kept_from_sizes_beyond_its_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, fake in fake_scattermoe().items():
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(kernel_rivals, "_demand_gpu", lambda inputs: None)
    small = kernel_rivals.make_inputs("up_proj", SHAPE, torch.bfloat16, CPU, kernel_rivals.make_routing(SHAPE, CPU))

    def refusal(op: str, shape: Shape) -> str:
        inputs = kernel_rivals.Inputs(op, shape, small.dtype, CPU, small.routing, small.tensors, small.scores_TK)
        try:
            kernel_rivals.scattermoe(op, inputs)
        except kernel_rivals.Unavailable as error:
            return str(error)
        return ""

    deepseek = kernels.SHAPES["deepseek-v3.2"]
    assert refusal("up_proj", deepseek) == "" and "E U D" in refusal("up_proj_bwd_weight", deepseek)
    assert refusal("up_proj", kernels.SHAPES["30b-n256"]) == ""  # its last offset is 2**31 - 1
    assert "R D" in refusal("up_proj", Shape(32769, 4096, 256, 256, 16))


@pytest.mark.parametrize("op", kernels.OPS)
def test_yardsticks_do_as_many_flop_as_the_op(op: str) -> None:
    inputs = kernel_rivals.make_inputs(op, SHAPE, torch.float32, CPU, kernel_rivals.make_routing(SHAPE, CPU))
    layer = roofline.Layer(SHAPE.T, SHAPE.D, SHAPE.N, SHAPE.E, SHAPE.K)
    for name, build in kernel_rivals.YARDSTICKS.items():
        try:
            yardstick = build(op, inputs)
        except kernel_rivals.Unavailable:
            assert op in ("topk_softmax", "build_plan") or (name == "dense batched" and "proj" not in op)
            continue
        with FlopCounterMode(display=False) as counter:
            yardstick.call()
        assert counter.get_total_flops() == kernels.cost_of(op, layer).flops


@pytest.mark.parametrize("op", kernels.OPS)
def test_sizes_are_those_of_the_tensors(op: str) -> None:
    inputs = kernel_rivals.make_inputs(op, UNEVEN, torch.bfloat16, CPU, kernel_rivals.make_routing(UNEVEN, CPU))
    contender = kernel_rivals.sonic_backend(op, inputs, "reference", True)
    assert contender.named is not None
    results = contender.named(contender.call())
    for name, tensor in (*inputs.tensors.items(), *results.items()):
        assert tensor.shape == kernel_rivals.size_of(name, UNEVEN), name
    tensors = (*inputs.tensors.values(), *results.values())
    assert kernel_rivals.size_in_bytes(op, UNEVEN, torch.bfloat16) == sum(tensor.nbytes for tensor in tensors)


def test_backends_that_cannot_serve_say_why() -> None:
    inputs = kernel_rivals.make_inputs("combine", SHAPE, torch.float64, CPU, kernel_rivals.make_routing(SHAPE, CPU))
    with pytest.raises(kernel_rivals.Unavailable, match="no kernels for float64"):
        kernel_rivals.sonic_backend("combine", inputs, "triton", False)


def test_routing_is_uniform_or_skewed_and_repeats() -> None:
    shape = Shape(4000, 8, 8, 16, 3)
    uniform, again, skewed = (kernel_rivals.make_routing(shape, CPU, skew) for skew in (0.0, 0.0, 1.0))
    assert all(len(set(row)) == 3 for row in skewed.expert_TK.tolist())
    assert torch.equal(uniform.expert_TK, again.expert_TK) and sum(skewed.counts) == 12000
    assert max(uniform.counts) < 1.2 * 750 < 2 * 750 < max(skewed.counts)
    rows = uniform.expert_TK.view(-1)[uniform.slot_R]
    assert torch.equal(rows, uniform.expert_R.int()) and torch.equal(uniform.slot_R // 3, uniform.token_R)
    assert torch.equal(uniform.row_TK.view(-1)[uniform.slot_R], torch.arange(12000))


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        # other bandwidths, clocks or sizes than the chip of that name
        *((name, None) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB")),
        *((name, None) for name in ("NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090", "Tesla T4")),
    ],
)
def test_chip_of(name: str, chip: str | None) -> None:
    assert kernels.chip_of(name) == chip


def test_bounds_are_those_of_the_roofline() -> None:
    layer = roofline.Layer(24576, 1536, 256, 128, 8)
    cost = roofline.op_cost("up_proj", layer)
    assert kernels.bound_of("up_proj", layer, "H100") == (cost.bytes / 3.35e12, "memory")
    seconds, resource = kernels.bound_of("experts_fwd_bwd", layer, "H100")
    assert seconds == roofline.layer_bound(layer, "H100").seconds and resource == "memory"
    wide = roofline.Layer(32768, 4096, 8192, 8, 2)
    assert kernels.bound_of("experts", wide, "H100")[1] == "compute"
    assert kernels.cost_of("experts_fwd_bwd", layer).flops == 18 * 24576 * 8 * 1536 * 256


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def greedy(op: str, inputs: kernel_rivals.Inputs) -> kernel_rivals.Contender:
        good = kernel_rivals.torch_ops(op, inputs)

        def call() -> Any:
            calls.append(None)
            if len(calls) > 1:
                raise torch.OutOfMemoryError
            return good.call()

        return kernel_rivals.Contender("rival", call, good.named)

    cell = cell_of("combine", good=kernel_rivals.torch_ops, greedy=greedy, too=greedy)
    assert cell["missing"] == {"too": "out of memory", "greedy": "out of memory beside the other contenders"}
    assert cell["contenders"].keys() == {"good"}
    monkeypatch.setattr(kernels, "_free_bytes", lambda device: 1000)
    cell = cell_of("combine", good=kernel_rivals.torch_ops)
    assert cell["contenders"] == {} and "GB are free" in cell["missing"]["good"]


def test_a_gpu_is_timed_by_events_from_a_cold_cache_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.at - self.at - 1)  # ms; one thing each takes a second

    zero = Tensor.zero_
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(Tensor, "zero_", lambda tensor: log.append(f"flush {tensor.nbytes}") or zero(tensor))
    calls = {"a": lambda: log.append("a"), "b": lambda: log.extend(["b", "b"])}
    timed = measure.interleaved_on_gpu(calls, rounds=2, device=CPU, flush_bytes=64, warmup=1)
    assert timed.laps == {"a": {"seconds": [1.0, 1.0]}, "b": {"seconds": [2.0, 2.0]}}
    assert (timed.rounds, timed.steps, timed.disturbed) == (2, 4, 0)
    flush = ["flush 64"] * 4
    a, b = [*flush, "event", "a", "event"], [*flush, "event", "b", "b", "event"]
    assert log == [*a, *b, "wait", *b, *a, "wait", *a, *b, "wait"]
    with pytest.raises(ValueError, match="rounds is 0"):
        measure.interleaved_on_gpu(calls, rounds=0, device=CPU, flush_bytes=64)


def test_figures_come_from_the_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    laps = {"mine": [1.0, 2.0, 3.0, 4.0, None], "other": [2.0, 2.0, 9.0, 4.0, 5.0]}
    timed = measure.Interleaved({name: {"seconds": list(samples)} for name, samples in laps.items()}, 5, 9, 1)
    monkeypatch.setattr(measure, "interleaved", lambda steps, **options: timed)
    mine: Any = lambda op, inputs: kernel_rivals.sonic_backend(op, inputs, "reference", True)  # noqa: E731
    cell = cell_of("up_proj", mine=mine, other=kernel_rivals.torch_ops)
    assert (cell["rounds"], cell["steps"], cell["disturbed_steps"], cell["clock"]) == (5, 9, 1, "wall")
    entry = cell["contenders"]["mine"]
    assert [entry[key] for key in ("p25_us", "median_us", "p75_us", "count")] == [1.75e6, 2.5e6, 3.25e6, 4]
    assert entry["tflops"] == cell["flops"] / 2.5 / 1e12 and entry["times_as_long_as"] == {}
    ratio = cell["contenders"]["other"]["times_as_long_as"]["mine"]  # of 2, 1, 3 and 1
    assert ratio == {"median": 1.5, "p25": 1.0, "p75": 2.25}
