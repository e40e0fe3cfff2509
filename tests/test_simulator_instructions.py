"""Instructions of warp-specialised kernels and their epilogues that other tests leave out, one small kernel each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sonic.simulator.errors import MemoryFault, RaceFault
from sonic.simulator.options import Options
from tests.test_simulator_engine import SCHEDULES, aligned, wait
from tests.test_simulator_engine import launch as launch_block
from tests.test_simulator_ptx import f32, float_samples, launch, run_floats

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def unpacked(column: np.ndarray, name: str) -> torch.Tensor:
    """(32,) registers to (32, 2) numbers of fp16 or bf16, low half first."""
    return torch.from_numpy(np.ascontiguousarray(column).view(np.uint16).reshape(32, 2)).view(HALVES[name])


def truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 to a narrow type, towards zero: the nearest number, or its neighbour if that is larger."""
    near = x.to(dtype)
    smaller = (near.view(torch.int16) - 1).view(dtype)
    return torch.where(near.double().abs() > x.double().abs(), smaller, near)


@pytest.mark.parametrize("name", HALVES)
def test_conversions_with_relu_and_towards_zero(name: str) -> None:
    a, b = float_samples(11), float_samples(12)
    a[:8] = [1e6, -1e6, np.nan, np.inf, -np.inf, -0.0, 65519.0, 3e38]
    lines = [
        f"cvt.rn.relu.{name}x2.f32 %r10, %r1, %r2;",
        f"cvt.rz.{name}x2.f32 %r11, %r1, %r2;",
        f"cvt.rz.relu.{name}x2.f32 %r12, %r1, %r2;",
        f"cvt.rn.relu.{name}.f32 %h1, %r1;",
        "cvt.u32.u16 %r13, %h1;",
    ]
    out = run_floats(lines, [a, b], 4)
    pair = torch.stack([torch.from_numpy(b), torch.from_numpy(a)], 1)
    want = [
        pair.to(HALVES[name]).relu(),
        truncated(pair, HALVES[name]),
        truncated(pair, HALVES[name]).relu(),
        torch.stack([pair[:, 1].to(HALVES[name]).relu(), torch.zeros(32, dtype=HALVES[name])], 1),
    ]
    for column, expected in enumerate(want):
        got = unpacked(out[:, column], name)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert not (torch.signbit(got) & (got == 0) & torch.tensor(column != 1)).any(), "relu leaves no -0"


@pytest.mark.parametrize("name", HALVES)
def test_functions_of_small_numbers(name: str) -> None:
    pair = torch.from_numpy(float_samples(13).clip(-9, 9)).repeat(2).reshape(2, 32).T.contiguous()
    pair[:, 1] = pair[:, 1].flip(0)
    narrow = pair.to(HALVES[name])
    inputs = narrow.view(torch.int16).numpy().copy().view(np.float32)[:, 0]
    ftz = ".ftz" if name == "bf16" else ""
    lines = [
        f"ex2.approx{ftz}.{name}x2 %r10, %r1;",
        f"tanh.approx.{name}x2 %r11, %r1;",
        "mov.b32 {%h1, %h2}, %r1;",
        f"ex2.approx{ftz}.{name} %h3, %h1;",
        f"tanh.approx.{name} %h4, %h2;",
        "mov.b32 %r12, {%h3, %h4};",
    ]
    out = run_floats(lines, [inputs], 3)
    powers, tangents = narrow.double().exp2(), narrow.double().tanh()
    close = {"rtol": torch.finfo(HALVES[name]).eps, "atol": 0.0}
    torch.testing.assert_close(unpacked(out[:, 0], name).double(), powers, **close)
    torch.testing.assert_close(unpacked(out[:, 1], name).double(), tangents, **close)
    mixed = torch.stack([powers[:, 0], tangents[:, 1]], 1)
    torch.testing.assert_close(unpacked(out[:, 2], name).double(), mixed, **close)


@pytest.mark.parametrize("name", HALVES)
def test_small_products_with_relu_and_extrema_of_no_numbers(name: str) -> None:
    rng = np.random.default_rng(14)
    narrow = [torch.from_numpy(rng.standard_normal((32, 2))).to(HALVES[name]) for _ in range(3)]
    narrow[0][3, 0] = narrow[1][5, 1] = float("nan")
    inputs = [pair.view(torch.int16).numpy().copy().view(np.float32)[:, 0] for pair in narrow]
    lines = [
        f"fma.rn.relu.{name}x2 %r10, %r1, %r2, %r3;",
        f"max.NaN.{name}x2 %r11, %r1, %r2;",
        f"min.NaN.{name}x2 %r12, %r1, %r2;",
        f"min.{name}x2 %r13, %r1, %r2;",
    ]
    out = run_floats(lines, inputs, 4)
    x, y, z = (pair.double() for pair in narrow)
    want = [(x * y + z).relu(), torch.maximum(x, y), torch.minimum(x, y), torch.fmin(x, y)]
    for column, expected in enumerate(want):
        got = unpacked(out[:, column], name)
        torch.testing.assert_close(got, expected.to(HALVES[name]), rtol=0, atol=0, equal_nan=True)


def test_approximations_of_float32() -> None:
    a = np.abs(float_samples(15)).clip(1e-3, 20)
    lines = [
        "ex2.approx.ftz.f32 %r10, %r1;",
        "lg2.approx.ftz.f32 %r11, %r1;",
        "rcp.approx.ftz.f32 %r12, %r1;",
        "rsqrt.approx.f32 %r13, %r1;",
        "tanh.approx.f32 %r14, %r1;",
    ]
    out = f32(run_floats(lines, [a], 5))
    x = a.astype(np.float64)
    for column, exact in enumerate([np.exp2(x), np.log2(x), 1 / x, 1 / np.sqrt(x), np.tanh(x)]):
        np.testing.assert_allclose(out[:, column], exact, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- global memory


@pytest.mark.parametrize(
    ("line", "kind", "count"),
    [
        ("red.global.add.v2.f32 [%rd10], {%r1, %r2};", "f32", 2),
        ("red.relaxed.gpu.global.add.v4.f32 [%rd10], {%r1, %r2, %r3, %r4};", "f32", 4),
        ("red.global.v2.f32.add [%rd10], {%r1, %r2};", "f32", 2),
        ("red.global.add.noftz.f16x2 [%rd10], %r1;", "f16x2", 1),
        ("red.global.add.noftz.bf16x2 [%rd10], %r1;", "bf16x2", 1),
        ("red.global.add.noftz.v4.bf16x2 [%rd10], {%r1, %r2, %r3, %r4};", "bf16x2", 4),
        ("red.global.add.noftz.L2::cache_hint.v2.f16x2 [%rd10], {%r1, %r2}, %rd20;", "f16x2", 2),
        ("atom.global.add.v2.f32 {%r5, %r6}, [%rd10], {%r1, %r2};", "f32", 2),
        ("atom.global.add.noftz.bf16x2 %r5, [%rd10], %r1;", "bf16x2", 1),
    ],
)
def test_sums_of_vectors_and_small_numbers(line: str, kind: str, count: int) -> None:
    """All lanes of a pair add to the same cell: small integers, so that every order gives the same."""
    torch_kind = {"f32": torch.float32, "f16x2": torch.float16, "bf16x2": torch.bfloat16}[kind]
    numbers = count * (2 if kind.endswith("x2") else 1)
    rng = np.random.default_rng(16)
    data = torch.from_numpy(rng.integers(-8, 9, (32, numbers))).to(torch_kind)
    cells = torch.from_numpy(rng.integers(-8, 9, (16, numbers))).to(torch_kind)
    expected = cells + data.reshape(16, 2, numbers).float().sum(1).to(torch_kind)
    starts = cells.clone()

    def words(x: torch.Tensor) -> np.ndarray:
        return x.contiguous().view(torch.uint8).numpy().reshape(-1)

    store = np.zeros(words(cells).size + 16, np.uint8)
    found = store[-store.ctypes.data % 16 :][: words(cells).size]
    found[:] = words(cells)
    old = np.zeros((32, 2), np.uint32)
    loads = "\n".join(f"    ld.global.b32 %r{n + 1}, [%rd11+{4 * n}];" for n in range(count))
    body = f"""
    createpolicy.fractional.L2::evict_last.b64 %rd20, 1.0;
    shr.u32 %r8, %r0, 1;
    mul.wide.u32 %rd10, %r8, {4 * count};
    add.s64 %rd10, %rd0, %rd10;
    mul.wide.u32 %rd11, %r0, {4 * count};
    add.s64 %rd11, %rd1, %rd11;
    mov.b32 %r5, 0;
    mov.b32 %r6, 0;
{loads}
    {line}
    mul.wide.u32 %rd12, %r0, 8;
    add.s64 %rd12, %rd2, %rd12;
    st.global.v2.b32 [%rd12], {{%r5, %r6}};
    """
    trace = launch(body, [found, words(data).copy(), old])
    assert (found == words(expected)).all()
    assert trace.traffic["atom.global", "array0"].num_bytes == 32 * 4 * count
    if line.startswith("atom"):
        before = old[:, :count].copy().view(np.uint8).reshape(32, -1)
        after_one = starts + data[::2]
        assert (before[::2] == words(starts).reshape(16, -1)).all()
        assert (before[1::2] == words(after_one).reshape(16, -1)).all()


def test_a_vector_that_is_not_aligned_is_refused() -> None:
    cells = aligned((16,), np.float32)
    with pytest.raises(MemoryFault, match="not a multiple of the access's 8 bytes"):
        launch("    red.global.add.v2.f32 [%rd0+4], {%r0, %r0};", [cells])


def test_cache_policies_and_other_hints_change_nothing() -> None:
    cells = aligned((64,), np.uint32)
    want = cells[:32] * 2
    body = """
    createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %rd20, 0.5;
    createpolicy.range.L2::evict_last.L2::evict_unchanged.b64 %rd21, [%rd0], 128, 256;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd3, %rd0, %rd2;
    prefetch.global.L2::evict_last [%rd3];
    applypriority.global.L2::evict_normal [%rd0], 128;
    griddepcontrol.wait;
    setmaxnreg.dec.sync.aligned.u32 40;
    ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.b32 %r1, [%rd3], %rd20;
    nanosleep.u32 20;
    add.s32 %r1, %r1, %r1;
    st.global.L2::cache_hint.b32 [%rd3], %r1, %rd21;
    griddepcontrol.launch_dependents;
    """
    launch(body, [cells])
    assert (cells[:32] == want).all()


# ---------------------------------------------------------------- lanes, copies


def test_lanes_that_all_agree() -> None:
    a = np.arange(32, dtype=np.uint32).view(np.float32)
    lines = [
        "mov.b32 %r3, 7;",
        "match.all.sync.b32 %r10|%p1, %r3, -1;",
        "match.all.sync.b32 %r11|%p2, %r1, -1;",
        "selp.b32 %r12, 1, 0, %p1;",
        "selp.b32 %r13, 1, 0, %p2;",
        "and.b32 %r4, %r1, 3;",
        "match.any.sync.b32 %r14, %r4, -1;",
    ]
    out = run_floats(lines, [a], 5)
    for lane in range(32):
        same = sum(1 << other for other in range(32) if other % 4 == lane % 4)
        assert out[lane].tolist() == [0xFFFFFFFF, 0, 1, 0, same]


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: f"{options.schedule}{options.seed}")
@pytest.mark.parametrize("guard", ["setp.ge.u32 %p1, %r0, 20;", "setp.eq.u32 %p1, %r1, 0;"])
def test_copies_that_ignore_their_source(options: Options, guard: str) -> None:
    """Lanes whose predicate holds get zeros; an mbarrier tells of the copies."""
    source, out = aligned((128,), np.uint32), np.full(128, 77, np.uint32)
    body = f"""
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1+1024], 32;
INIT_DONE:
    bar.sync 0;
    {guard}
    shl.b32 %r2, %r0, 4;
    add.s32 %r3, %r1, %r2;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd0, %rd2;
    add.s64 %rd4, %rd1, %rd2;
    cp.async.cg.shared.global [%r3], [%rd3], 16, %p1;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r1+1024];
{wait("%r1+1024", "0")}
    ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r3];
    st.global.v4.b32 [%rd4], {{%r5, %r6, %r7, %r8}};
    """
    launch_block(body, [source, out], options=options)
    want = source.copy()
    if "20" in guard:
        want[80:] = 0
    assert (out == want).all()


def test_bulk_sums_of_small_numbers() -> None:
    cells = torch.arange(64, dtype=torch.float32).bfloat16()
    store = np.zeros(128 + 16, np.uint8)
    found = store[-store.ctypes.data % 16 :][:128]
    found[:] = cells.view(torch.uint8).numpy()
    body = """
    mov.b32 %r2, 0x40404040;
    shl.b32 %r3, %r0, 2;
    add.s32 %r3, %r3, %r1;
    st.shared.b32 [%r3], %r2;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%rd0], [%r1], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    launch_block(body, [found])
    added = torch.tensor([0x4040], dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(torch.from_numpy(found.copy()).view(torch.bfloat16), cells + added)


# ---------------------------------------------------------------- lanes that speak for a warp, barriers that are made


def handed_over(sync: str, arrival: str) -> str:
    """Warp 0 reads a slot, says so, warp 1 waits for that and overwrites the slot."""
    return f"""
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], {32 if "all" in arrival else 1};
INIT_DONE:
    shl.b32 %r2, %r0, 2;
    and.b32 %r2, %r2, 127;
    add.s32 %r2, %r2, %r1;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra FILLED;
    st.shared.b32 [%r2+128], %r0;
FILLED:
    bar.sync 0;
    @%p1 bra WRITER;
    ld.shared.b32 %r3, [%r2+128];
    {sync}
    elect.sync %r4|%p2, -1;
    {"" if "all" in arrival else "@%p2"} mbarrier.arrive.shared.b64 _, [%r1];
    bra BEHIND;
WRITER:
{wait("%r1", "0")}
    st.shared.b32 [%r2+128], %r0;
BEHIND:
    """


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: f"{options.schedule}{options.seed}")
def test_a_lane_speaks_for_others_only_after_they_met(options: Options) -> None:
    cells = [np.zeros(1, np.uint32)]
    launch_block(handed_over("bar.warp.sync -1;", "one"), cells, block=64, options=options)
    launch_block(handed_over("", "all"), cells, block=64, options=options)
    with pytest.raises(RaceFault, match="a store writes shared offset .*read by warp 0 of block 0"):
        launch_block(handed_over("", "one"), cells, block=64, options=options)
    # what that lane itself did needs no such barrier
    alone = handed_over("", "one").replace("    ld.shared", "    setp.ne.s32 %p3, %r0, 0;\n    @!%p3 ld.shared")
    alone = alone.replace(
        "    st.shared.b32 [%r2+128], %r0;\nBEHIND", "    @!%p4 st.shared.b32 [%r2+128], %r0;\nBEHIND"
    )
    launch_block("    setp.ne.s32 %p4, %r0, 32;\n" + alone, cells, block=64, options=options)


@pytest.mark.parametrize(
    ("fence", "is_known"),
    [("fence.mbarrier_init.release.cluster;", True), ("fence.proxy.async.shared::cta;", True), ("", False)],
)
def test_a_bulk_copy_signals_a_barrier_that_a_fence_told_of(fence: str, is_known: bool) -> None:
    source = aligned((64,), np.uint32)
    body = f"""
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 1;
    {fence}
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 256;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+1024], [%rd0], 256, [%r1];
INIT_DONE:
    bar.sync 0;
{wait("%r1", "0")}
    """
    warnings = launch_block(body, [source]).warnings
    assert len(warnings) == (0 if is_known else 1)
    assert is_known or "no fence.mbarrier_init" in warnings[0]
