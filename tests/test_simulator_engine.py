"""The simulator's machine: memory, barriers, bulk copies, warpgroup products, schedules, reports, counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sonic.simulator import engine, tma
from sonic.simulator.errors import (
    BarrierFault,
    Deadlock,
    MemoryFault,
    RaceFault,
    SimulatorError,
    Unsupported,
)
from sonic.simulator.kernel_launch import LaunchConfig, Region
from sonic.simulator.options import Options

SCHEDULES = [Options("eager"), Options("lazy"), Options("random", seed=1), Options("random", seed=2)]
each_schedule = pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: f"{options.schedule}{options.seed}")


def launch(
    body: str,
    arrays: list[np.ndarray],
    *,
    maps: tuple[tma.TensorMap, ...] = (),
    block: int = 32,
    grid: int = 1,
    cluster: int = 1,
    shared: int = 4096,
    options: Options | None = None,
    line_info: str = "",
) -> engine.Trace:
    """Run a kernel whose array pointers are in %rd0, %rd1... and whose tensor maps are at map0, map1...

    %r0 is the thread's number, %r1 the address of dynamic shared memory.
    """
    params = [f"    .param .u64 p{n}" for n in range(len(arrays))]
    params += [f"    .param .align 64 .b8 map{n}[128]" for n in range(len(maps))]
    loads = "\n".join(f"    ld.param.b64 %rd{n}, [p{n}];" for n in range(len(arrays)))
    text = f"""{line_info}
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(
{", ".join(params)}
)
{{
    .reg .pred %p<64>;
    .reg .b16 %h<64>;
    .reg .b32 %r<1024>;
    .reg .b64 %rd<128>;
{loads}
    mov.u32 %r0, %tid.x;
    mov.b32 %r1, smem;
{body}
    ret;
}}
"""
    buffers = [np.array([array.ctypes.data], np.uint64) for array in arrays]
    buffers += [np.frombuffer(tma.encode(tensor), np.uint8).copy() for tensor in maps]
    regions = [Region(array.ctypes.data, array.nbytes, f"array{n}") for n, array in enumerate(arrays)]
    config = LaunchConfig((grid, 1, 1), (block, 1, 1), (cluster, 1, 1), shared)
    return engine.run(text, "k", config, [buffer.ctypes.data for buffer in buffers], regions, options or Options())


STORE_R9 = """
    mul.wide.u32 %rd100, %r0, 4;
    add.s64 %rd101, %rd0, %rd100;
    st.global.b32 [%rd101], %r9;
"""
# Copies shared memory (%r2 bytes from %r1 + %r3 on) to the array in %rd0, by all threads of a block of 32.
DUMP = """
    mul.wide.u32 %rd110, %r0, 16;
    add.s64 %rd110, %rd0, %rd110;
    shl.b32 %r900, %r0, 4;
    add.s32 %r901, %r900, %r1;
    add.s32 %r901, %r901, %r3;
DUMP_MORE:
    setp.ge.u32 %p50, %r900, %r2;
    @%p50 bra DUMP_DONE;
    ld.shared.v4.b32 {%r902, %r903, %r904, %r905}, [%r901];
    st.global.v4.b32 [%rd110], {%r902, %r903, %r904, %r905};
    add.s32 %r900, %r900, 512;
    add.s32 %r901, %r901, 512;
    add.s64 %rd110, %rd110, 512;
    bra DUMP_MORE;
DUMP_DONE:
"""
# Copies the array in %rd0 to shared memory at %r1, %r2 bytes, by all threads of a block of %r4.
FILL = """
    mul.wide.u32 %rd112, %r0, 16;
    add.s64 %rd112, %rd0, %rd112;
    shl.b32 %r910, %r0, 4;
    add.s32 %r911, %r910, %r1;
    shl.b32 %r917, %r4, 4;
    cvt.u64.u32 %rd113, %r917;
FILL_MORE:
    setp.ge.u32 %p51, %r910, %r2;
    @%p51 bra FILL_DONE;
    ld.global.v4.b32 {%r912, %r913, %r914, %r915}, [%rd112];
    st.shared.v4.b32 [%r911], {%r912, %r913, %r914, %r915};
    add.s32 %r910, %r910, %r917;
    add.s32 %r911, %r911, %r917;
    add.s64 %rd112, %rd112, %rd113;
    bra FILL_MORE;
FILL_DONE:
"""


def wait(barrier: str, parity: str) -> str:
    """The loop that CUTLASS emits."""
    return f"""
    {{
    .reg .pred P1;
    LAB_WAIT:
    mbarrier.try_wait.parity.shared.b64 P1, [{barrier}], {parity}, 10000000;
    @P1 bra.uni DONE;
    bra.uni LAB_WAIT;
    DONE:
    }}
"""


INIT = """
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 1;
    fence.mbarrier_init.release.cluster;
INIT_DONE:
    bar.sync 0;
"""


# ---------------------------------------------------------------- memory and barriers of a block


@each_schedule
def test_shared_memory_and_a_barrier_of_the_block(options: Options) -> None:
    out = np.zeros(96, np.uint32)
    body = f"""
    shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], %r0;
    bar.sync 0;
    sub.s32 %r4, 95, %r0;
    shl.b32 %r4, %r4, 2;
    add.s32 %r5, %r1, %r4;
    ld.shared.b32 %r9, [%r5];
    {STORE_R9}
    """
    launch(body, [out], block=96, options=options)
    assert out.tolist() == list(range(95, -1, -1))


@each_schedule
def test_named_barriers_with_arrivals(options: Options) -> None:
    """Warp 0 writes and arrives, warp 1 waits and reads."""
    out = np.zeros(64, np.uint32)
    body = f"""
    setp.ge.u32 %p1, %r0, 32;
    and.b32 %r2, %r0, 31;
    shl.b32 %r3, %r2, 2;
    add.s32 %r3, %r3, %r1;
    mov.b32 %r9, 0;
    @%p1 bra READER;
    add.s32 %r4, %r0, 500;
    st.shared.b32 [%r3], %r4;
    bar.arrive 3, 64;
    bra BEHIND;
READER:
    bar.sync 3, 64;
    ld.shared.b32 %r9, [%r3];
BEHIND:
    {STORE_R9}
    """
    launch(body, [out], block=64, options=options)
    assert out.tolist() == [0] * 32 + list(range(500, 532))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_between_registers_and_shared_memory(count: int, transposed: bool) -> None:
    """ldmatrix and stmatrix against the layout of a fragment, written for each element."""
    numbers = np.random.default_rng(0).integers(0, 1 << 15, count * 64).astype(np.uint16)
    out = np.zeros(count * 64, np.uint16)
    registers = ", ".join(f"%r{20 + n}" for n in range(count))
    trans = ".trans" if transposed else ""
    body = f"""
    mov.b32 %r2, {count * 128};
    mov.b32 %r4, 32;
    {FILL}
    bar.sync 0;
    and.b32 %r5, %r0, {8 * count - 1};
    shl.b32 %r5, %r5, 4;
    add.s32 %r6, %r1, %r5;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r6];
    stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r6+2048], {{{registers}}};
    bar.sync 0;
    mov.b32 %r3, 2048;
    add.s64 %rd0, %rd1, 0;
    {DUMP}
    """
    launch(body, [np.pad(numbers, (0, 64)), np.concatenate([out, out])], shared=8192)
    arrays = [np.concatenate([numbers, np.zeros(256, np.uint16)]), np.zeros(count * 64 + 256, np.uint16)]
    launch(body, arrays, shared=8192)
    for matrix in range(count):
        source = numbers[64 * matrix : 64 * matrix + 64].reshape(8, 8)
        got = arrays[1][64 * matrix : 64 * matrix + 64].reshape(8, 8)
        np.testing.assert_array_equal(got, source.T if transposed else source)


def test_atomics() -> None:
    start = [5, 0xFFFFFFFF, 7, 3, 0xF0, 0x0F, 0xFF, 42, 2, 2]
    cells = np.array(start, np.uint32)
    floats = np.array([1.5], np.float32)
    old = np.zeros(32, np.uint32)
    body = """
    atom.global.add.u32 %r9, [%rd0], 2;
    red.global.add.u32 [%rd0+4], %r0;
    atom.global.max.s32 %r10, [%rd0+8], %r0;
    atom.global.min.u32 %r10, [%rd0+12], %r0;
    red.global.and.b32 [%rd0+16], 0x30;
    red.relaxed.gpu.global.or.b32 [%rd0+20], %r0;
    atom.global.xor.b32 %r10, [%rd0+24], %r0;
    setp.eq.s32 %p1, %r0, 3;
    @%p1 atom.global.exch.b32 %r10, [%rd0+28], 77;
    atom.global.cas.b32 %r10, [%rd0+32], 2, %r0;
    atom.global.inc.u32 %r10, [%rd0+36], 5;
    red.global.add.f32 [%rd1], 0f3F000000;
    mul.wide.u32 %rd10, %r0, 4;
    add.s64 %rd11, %rd2, %rd10;
    st.global.b32 [%rd11], %r9;
    """
    launch(body, [cells, floats, old])
    xor = 0xFF
    inc, cas = 2, 2
    for lane in range(32):
        xor ^= lane
        inc = 0 if inc >= 5 else inc + 1
        cas = lane if cas == 2 else cas
    want = [5 + 64, (0xFFFFFFFF + 496) % 2**32, 31, 0, 0x30, 0x1F, xor, 77, cas, inc]
    assert cells.tolist() == want
    assert floats[0] == 17.5
    assert sorted(old.tolist()) == list(range(5, 69, 2))


# ---------------------------------------------------------------- mbarriers


@each_schedule
def test_phases_of_an_mbarrier(options: Options) -> None:
    """Two warps hand numbers over through one slot, five times: full and empty barriers, both parities."""
    out = np.zeros(5, np.uint32)
    body = f"""
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 32;
    mbarrier.init.shared.b64 [%r1+8], 1;
INIT_DONE:
    bar.sync 0;
    mov.b32 %r2, 0;
    mov.b32 %r3, 1;
    mov.b32 %r4, 0;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra READER;
WRITE:
    {wait("%r1+8", "%r3")}
    mul.lo.s32 %r5, %r2, 3;
    st.shared.b32 [%r1+16], %r5;
    mbarrier.arrive.shared.b64 %rd50, [%r1];
    xor.b32 %r3, %r3, 1;
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p2, %r2, 5;
    @%p2 bra WRITE;
    bra BEHIND;
READER:
READ:
    {wait("%r1", "%r4")}
    ld.shared.b32 %r6, [%r1+16];
    bar.warp.sync -1;
    setp.ne.s32 %p3, %r0, 32;
    @%p3 bra KEEP;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd0, %rd2;
    st.global.b32 [%rd3], %r6;
    mbarrier.arrive.shared.b64 _, [%r1+8];
KEEP:
    xor.b32 %r4, %r4, 1;
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p4, %r2, 5;
    @%p4 bra READ;
BEHIND:
    """
    launch(body, [out], block=64, options=options)
    assert out.tolist() == [0, 3, 6, 9, 12]


def test_too_many_arrivals() -> None:
    with pytest.raises(BarrierFault, match=r"1 arrivals where 0|32 arrivals where 1 are pending.*mbarrier.arrive"):
        launch(INIT + "    mbarrier.arrive.shared.b64 _, [%r1];", [np.zeros(1, np.uint32)])


def test_a_barrier_that_was_never_made() -> None:
    with pytest.raises(BarrierFault, match="no mbarrier was initialised"):
        launch("    mbarrier.arrive.shared.b64 _, [%r1+8];", [np.zeros(1, np.uint32)])


def test_the_deadlock_report_tells_who_waits_for_what() -> None:
    body = INIT + "    .loc 1 77 5\n" + wait("%r1", "0")
    with pytest.raises(Deadlock) as caught:
        launch(body, [np.zeros(1, np.uint32)], block=64, line_info='.file 1 "kernel.py"')
    text = str(caught.value)
    assert "block 0 (rank 0) warps 0-1: mbarrier wait, parity 0" in text
    assert "mbarrier wait, parity 0" in text and "phase 0, 1 of 1 arrivals and 0 bytes pending" in text
    assert "mbarrier.try_wait" in text and "kernel.py:77" in text


def test_a_spin_ends_with_the_step_budget() -> None:
    body = """
SPIN:
    ld.global.b32 %r2, [%rd0];
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra SPIN;
    """
    with pytest.raises(Deadlock, match="no end: .*raise step_budget if the launch is that long"):
        launch(body, [np.zeros(1, np.uint32)], options=Options(step_budget=20000))


def test_a_spin_on_memory_is_ended_by_another_block() -> None:
    flag = np.zeros(1, np.uint32)
    body = """
    mov.u32 %r2, %ctaid.x;
    setp.eq.s32 %p1, %r2, 1;
    @%p1 bra WRITER;
SPIN:
    ld.acquire.gpu.global.b32 %r3, [%rd0];
    setp.eq.s32 %p2, %r3, 0;
    @%p2 bra SPIN;
    bra BEHIND;
WRITER:
    st.release.gpu.global.b32 [%rd0], 1;
BEHIND:
    """
    launch(body, [flag], grid=2)
    assert flag[0] == 1


@pytest.mark.parametrize("seed", range(8))
def test_those_who_spin_do_not_starve_the_others(seed: int) -> None:
    """Under the random schedule: 23 warps spin until the last one of the second block has run."""
    flag = np.zeros(1, np.uint32)
    body = """
    mov.u32 %r2, %ctaid.x;
    setp.eq.s32 %p1, %r2, 1;
    setp.ge.u32 %p2, %r0, 352;
    and.pred %p3, %p1, %p2;
    @%p3 bra WRITER;
SPIN:
    ld.acquire.gpu.global.b32 %r3, [%rd0];
    setp.eq.s32 %p4, %r3, 0;
    @%p4 bra SPIN;
    bra BEHIND;
WRITER:
    st.release.gpu.global.b32 [%rd0], 1;
BEHIND:
    """
    launch(body, [flag], grid=2, block=384, options=Options("random", seed, step_budget=80_000))
    assert flag[0] == 1


def test_an_arrival_that_is_left_over_is_told() -> None:
    body = (
        INIT.replace("[%r1], 1", "[%r1], 2")
        + """
    setp.ne.s32 %p1, %r0, 0;
    @%p1 bra BEHIND;
    mbarrier.arrive.shared.b64 _, [%r1];
BEHIND:
    """
    )
    trace = launch(body, [np.zeros(1, np.uint32)])
    assert any("ends with a phase begun" in text for text in trace.warnings)


# ---------------------------------------------------------------- accesses that are wrong


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("ld.global.b32 %r2, [%rd0+16];", "lie in no registered tensor.*0 bytes behind the end of array0"),
        ("st.global.b32 [%rd0+-4], %r0;", "lie in no registered tensor.*array0 begins 4 bytes behind it"),
        ("ld.global.b64 %rd2, [%rd0+12];", "lie in no registered tensor"),
        ("ld.global.b32 %r2, [%rd0+2];", "not a multiple of the access's 4 bytes"),
        ("mul.wide.u32 %rd2, %r0, 4; add.s64 %rd3, %rd0, %rd2; ld.global.b32 %r2, [%rd3];", "no registered tensor"),
        ("ld.shared.b32 %r2, [%r1+4096];", "outside of the [0-9]+ bytes of the block"),
        ("ld.shared.b32 %r2, [%r1+-1024];", "shared offset 0 is below 1024, which belongs to the system"),
        ("ld.shared.b32 %r2, [%r1+8];", "never written"),
        ("shl.b32 %r3, %r0, 2; add.s32 %r3, %r3, %r1; ld.shared.b32 %r2, [%r3];", "never written"),
        ("st.shared.b32 [%r1+2], %r0;", "not a multiple of the access's 4 bytes"),
    ],
)
def test_wrong_accesses(line: str, match: str) -> None:
    with pytest.raises(MemoryFault, match=match):
        launch(line, [np.zeros(4, np.uint32)])


def test_uninitialised_reads_may_be_warnings() -> None:
    trace = launch("ld.shared.b32 %r2, [%r1+8];", [np.zeros(1, np.uint32)], options=Options(uninitialised="warn"))
    assert len(trace.warnings) == 1 and "never written" in trace.warnings[0]


def test_all_bits_set_may_be_written_and_read() -> None:
    out = np.zeros(32, np.uint32)
    body = f"""
    shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], -1;
    ld.shared.b32 %r9, [%r3];
    {STORE_R9}
    """
    launch(body, [out])
    assert (out == 0xFFFFFFFF).all()


# ---------------------------------------------------------------- tensor maps


def load_box(num_bytes: int, rank: int, coordinates: str, ending: str = "") -> str:
    """One lane expects bytes and loads a box of the first map to offset 1024 of dynamic shared memory."""
    return f"""{INIT}
    mov.b64 %rd20, map0;
    cvta.param.u64 %rd21, %rd20;
    elect.sync %r5|%p1, -1;
    not.pred %p2, %p1;
    @%p2 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {num_bytes};
    cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1+1024],
        [%rd21, {{{coordinates}}}], [%r1];
ISSUED:
{ending or wait("%r1", "0")}
"""


def swizzled(offset: int, width: int) -> int:
    """Where a byte of a box lies, relative to an aligned start."""
    return offset ^ (offset >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[width]) << 4


def make_map(array: np.ndarray, box: tuple[int, ...], swizzle: int, element: str) -> tma.TensorMap:
    """A map of a whole contiguous array; extents and box are fastest first."""
    dims = array.shape[::-1]
    strides = array.strides[::-1]
    return tma.TensorMap(array.ctypes.data, element, array.itemsize, dims, strides, box, swizzle)


def aligned(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    """Random numbers at an address that a tensor map takes."""
    count = int(np.prod(shape))
    store = np.zeros(count * np.dtype(dtype).itemsize + 128, np.uint8)
    start = -store.ctypes.data % 64
    array = store[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    array[...] = np.random.default_rng(seed).integers(1, 100, shape)
    return array


BOXES = [
    ((40, 64), np.uint16, "bf16", (64, 8), 128, (0, 8)),
    ((40, 64), np.uint16, "f16", (32, 16), 64, (32, 3)),
    ((40, 64), np.uint16, "f16", (16, 16), 32, (-8, 30)),
    ((40, 32), np.float32, "f32", (32, 16), 128, (8, 32)),
    ((40, 64), np.uint8, "u8", (128, 4), 128, (0, -2)),
    ((40, 64), np.uint16, "bf16", (24, 5), 0, (50, 1)),
    ((640,), np.float32, "f32", (64,), 0, (600,)),
    ((5, 12, 64), np.uint16, "bf16", (64, 4, 2), 128, (0, 10, 1)),
    ((3, 4, 6, 32), np.uint16, "f16", (32, 3, 2, 2), 64, (0, 4, 3, -1)),
    ((2, 3, 4, 5, 16), np.float32, "f32", (8, 2, 2, 2, 2), 32, (12, 1, 3, 2, 1)),
]


@pytest.mark.parametrize(("shape", "dtype", "element", "box", "swizzle", "start"), BOXES)
def test_boxes_are_loaded(shape, dtype, element, box, swizzle, start) -> None:
    """Every byte of shared memory against a formula for each element, zeros outside of the tensor."""
    source = aligned(shape, dtype)
    size = source.itemsize
    num_bytes = int(np.prod(box)) * size
    tensor = make_map(source, box, swizzle, element)
    assert tma.decode(tma.encode(tensor)[:60]) == tensor
    out = np.zeros(num_bytes // 512 * 512 + 512, np.uint8)
    body = load_box(num_bytes, len(box), ", ".join(str(value) for value in start))
    body += f"    mov.b32 %r2, {num_bytes};\n    mov.b32 %r3, 1024;\n{DUMP}"
    for options in SCHEDULES[:3]:
        out[:] = 0
        trace = launch(body, [out, source], maps=(tensor,), shared=8192, options=options)
        inside = 0
        for position in itertools.product(*(range(extent) for extent in box)):
            linear, pitch = 0, size
            for index, extent in zip(position, box, strict=True):
                linear, pitch = linear + index * pitch, pitch * extent
            where = tuple(index + first for index, first in zip(position, start, strict=True))[::-1]
            is_inside = all(0 <= index < extent for index, extent in zip(where, shape, strict=True))
            inside += is_inside
            want = source[where] if is_inside else 0
            place = swizzled(linear, swizzle)
            assert out[place : place + size].view(dtype)[0] == want, (position, options)
        assert trace.traffic["TMA load", "array1"].num_bytes == inside * size
        assert trace.traffic["TMA load", "array1"].requests == 1


@pytest.mark.parametrize("operation", ["", "add", "max"])
@pytest.mark.parametrize(("dtype", "element", "swizzle"), [(np.uint16, "bf16", 128), (np.float32, "f32", 64)])
@each_schedule
def test_boxes_are_stored_and_reduced(operation, dtype, element, swizzle, options) -> None:
    """Of a box that hangs over the end of the tensor only the part inside is stored, and counted."""
    width = swizzle // np.dtype(dtype).itemsize
    target = aligned((20, width), dtype)
    tile = aligned((8, width), dtype, seed=1)
    if element == "bf16":
        for array in (target, tile):
            array[...] = torch.from_numpy(array.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    before = target.copy()
    raw = tile.reshape(-1).view(np.uint8)
    image = np.zeros_like(raw)
    for offset in range(len(raw)):
        image[swizzled(offset, swizzle)] = raw[offset]
    image = np.concatenate([image, np.zeros(-len(image) % 512, np.uint8)])
    tensor = make_map(target, (width, 8), swizzle, element)
    name = (
        f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}"
        if operation
        else ("cp.async.bulk.tensor.2d.global.shared::cta")
    )
    body = f"""
    mov.b32 %r2, {len(raw)};
    mov.b32 %r4, 32;
    {FILL}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %rd20, map0;
    cvta.param.u64 %rd21, %rd20;
    {name}.tile.bulk_group [%rd21, {{0, 15}}], [%r1];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    trace = launch(body, [image, target], maps=(tensor,), options=options)

    def numbers(array: np.ndarray) -> torch.Tensor:
        if element == "bf16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    want = numbers(before.copy())
    part = numbers(tile)[:5]
    combined = {"": lambda a, b: b, "add": torch.add, "max": torch.maximum}[operation](want[15:], part)
    want[15:] = combined
    assert torch.equal(numbers(target), want)
    path = f"TMA reduce {operation}" if operation else "TMA store"
    assert trace.traffic[path, "array1"].num_bytes == 5 * swizzle
    assert trace.traffic[path, "array1"].requests == 1, "all lanes issue one and the same store"


@each_schedule
def test_bulk_copies_without_a_map(options: Options) -> None:
    source = aligned((256,), np.float32)
    out = aligned((256,), np.float32, seed=2)
    total = aligned((256,), np.float32, seed=3)
    want = total + source
    body = (
        INIT
        + """
    elect.sync %r5|%p1, -1;
    not.pred %p2, %p1;
    @%p2 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+1024], [%rd1], 1024, [%r1];
ISSUED:
"""
        + wait("%r1", "0")
        + """
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r1+1024], 1024;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2], [%r1+1024], 1024;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    """
    )
    trace = launch(body, [out, source, total], options=options)
    np.testing.assert_array_equal(out, source)
    np.testing.assert_array_equal(total, want)
    assert trace.bytes_by_tensor() == {"array0": 1024, "array1": 1024, "array2": 1024}


@pytest.mark.parametrize("operation", ["inc", "dec"])
@pytest.mark.parametrize("kind", ["", "tensor.2d."])
@each_schedule
def test_bulk_reductions_that_are_not_simulated_are_refused(operation: str, kind: str, options: Options) -> None:
    """Whatever the schedule: under "lazy" the copy itself runs when nobody catches what is wrong with an access."""
    target = aligned((8, 32), np.uint32)
    name = f"cp.reduce.async.bulk.{kind}global.shared::cta"
    line = f"{name}.bulk_group.{operation}.u32 [%rd0], [%r1], 256;"
    if kind:
        line = f"{name}.{operation}.tile.bulk_group [%rd21, {{0, 0}}], [%r1];"
    body = f"""
    mov.b64 %rd20, map0;
    cvta.param.u64 %rd21, %rd20;
    shl.b32 %r3, %r0, 5;
    add.s32 %r3, %r3, %r1;
    st.shared.v4.b32 [%r3], {{%r0, %r0, %r0, %r0}};
    st.shared.v4.b32 [%r3+16], {{%r0, %r0, %r0, %r0}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {line}
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    tensor = make_map(target, (32, 8), 128, "s32")
    with pytest.raises(Unsupported, match=f"a bulk reduction by {operation} is not simulated: `cp.reduce"):
        launch(body, [target], maps=(tensor,), options=options)


@each_schedule
def test_multicast_and_remote_barriers(options: Options) -> None:
    """Block 0 loads for both blocks of the cluster; block 1 tells block 0 when it has read."""
    source = aligned((16, 64), np.uint16)
    out = np.zeros((2, 1024 * 2), np.uint8)
    tensor = make_map(source, (64, 16), 128, "bf16")
    body = (
        """
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1+8], 32;
    fence.mbarrier_init.release.cluster;
INIT_DONE:
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mov.u32 %r6, %cluster_ctarank;
    elect.sync %r5|%p1, -1;
    not.pred %p2, %p1;
    @%p2 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 2048;
    setp.ne.s32 %p3, %r6, 0;
    @%p3 bra ISSUED;
    mov.b64 %rd20, map0;
    cvta.param.u64 %rd21, %rd20;
    mov.b16 %h1, 3;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r1+1024],
        [%rd21, {0, 0}], [%r1], %h1;
ISSUED:
"""
        + wait("%r1", "0")
        + f"""
    mov.b32 %r2, 2048;
    mov.b32 %r3, 1024;
    mul.wide.u32 %rd30, %r6, 2048;
    add.s64 %rd0, %rd0, %rd30;
    {DUMP}
    mapa.shared::cluster.u32 %r7, %r1, 0;
    setp.eq.s32 %p4, %r6, 0;
    @%p4 bra FIRST;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7+8];
    bra BEHIND;
FIRST:
    {wait("%r1+8", "0")}
BEHIND:
    """
    )
    trace = launch(body, [out, source], maps=(tensor,), grid=2, cluster=2, options=options)
    raw = source.reshape(-1).view(np.uint8)
    for rank in range(2):
        for offset in range(0, 2048, 7):
            assert out[rank, swizzled(offset, 128)] == raw[offset]
    assert trace.traffic["TMA load", "array1"].num_bytes == 2048
    assert trace.traffic["multicast", "array1"].num_bytes == 2048


@each_schedule
def test_st_async_and_memory_of_another_block(options: Options) -> None:
    """Block 0 sends four numbers to block 1, whose barrier counts the bytes; block 0 reads them back from there."""
    out = np.zeros(64, np.uint32)
    body = (
        """
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;
INIT_DONE:
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mov.u32 %r6, %cluster_ctarank;
    setp.eq.s32 %p1, %r6, 1;
    mapa.shared::cluster.u32 %r7, %r1, 1;
    @%p1 bra READ;
    elect.sync %r5|%p2, -1;
    not.pred %p3, %p2;
    @%p3 bra FAR;
    mov.b32 %r20, 11;
    mov.b32 %r21, 12;
    mov.b32 %r22, 13;
    mov.b32 %r23, 14;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%r7+64], {%r20, %r21, %r22, %r23}, [%r7];
FAR:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ld.shared::cluster.b32 %r9, [%r7+72];
    bra STORE;
READ:
"""
        + wait("%r1", "0")
        + f"""
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ld.shared.b32 %r9, [%r1+64];
STORE:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mul.wide.u32 %rd30, %r6, 128;
    add.s64 %rd0, %rd0, %rd30;
    {STORE_R9}
    """
    )
    launch(body, [out], grid=2, cluster=2, options=options)
    assert out.tolist() == [13] * 32 + [11] * 32


@each_schedule
def test_copies_by_threads(options: Options) -> None:
    """cp.async with zero fill, signalled by a barrier and by groups."""
    source = aligned((32, 4), np.uint32)
    out = np.zeros((64, 4), np.uint32)
    body = f"""
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 32;
INIT_DONE:
    bar.sync 0;
    mul.wide.u32 %rd10, %r0, 16;
    add.s64 %rd11, %rd1, %rd10;
    shl.b32 %r2, %r0, 4;
    add.s32 %r4, %r1, %r2;
    setp.lt.u32 %p1, %r0, 20;
    selp.b32 %r5, 16, 0, %p1;
    setp.eq.s32 %p2, %r0, 25;
    selp.b32 %r5, 8, %r5, %p2;
    cp.async.cg.shared.global [%r4+1024], [%rd11], 16, %r5;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];
    cp.async.ca.shared.global [%r4+1536], [%rd11], 4;
    cp.async.ca.shared.global [%r4+1540], [%rd11+4], 4;
    cp.async.ca.shared.global [%r4+1544], [%rd11+8], 8;
    cp.async.commit_group;
    {wait("%r1", "0")}
    cp.async.wait_group 0;
    bar.sync 0;
    mov.b32 %r2, 1024;
    mov.b32 %r3, 1024;
    {DUMP}
    """
    trace = launch(body, [out, source], options=options)
    want = source.copy()
    want[20:] = 0
    want[25, :2] = source[25, :2]
    np.testing.assert_array_equal(out[:32], want)
    np.testing.assert_array_equal(out[32:], source)
    assert trace.traffic["cp.async", "array1"].num_bytes == 20 * 16 + 1 + 512


def test_unknown_flags_of_a_tensor_map_are_refused() -> None:
    source = aligned((40, 64), np.uint16)
    raw = bytearray(tma.encode(make_map(source, (64, 8), 128, "bf16")))
    for bit in (11, 12, 15, 19, 22, 25, 31):
        changed = bytearray(raw)
        changed[8 + bit // 8] |= 1 << bit % 8
        with pytest.raises(Exception, match="flags"):
            tma.decode(bytes(changed[:60]))
    for change, message in (
        ({8: 0x72}, "flags 0x00046572, of which 0x00046542 is understood"),  # 8 dimensions
        ({8: 0x92, 9: 0x65}, "elements of type 11, which are not simulated"),
        ({8: 0x92, 9: 0x61}, "elements of type u32, which are not simulated"),
        ({28: 1}, r"upper stride bits 0x00000001 \(a stride of 64 GiB or more, or no tensor map\)"),
        ({52: 1}, "element strides 0x000001, which are not simulated"),
        ({55: 0x7F}, "a box of 256 bytes and a swizzle of 128 bytes, expected a box as wide as the swizzle"),
        ({55: 0x1F}, "a box of 64 bytes and a swizzle of 128 bytes, expected a box as wide as the swizzle"),
    ):
        changed = bytearray(raw)
        for place, value in change.items():
            changed[place] = value
        with pytest.raises(Exception, match=message):
            tma.decode(bytes(changed[:60]))


def test_fields_of_a_tensor_map_are_replaced() -> None:
    first, second = aligned((40, 64), np.uint16), aligned((24, 64), np.uint16, seed=5)
    old = make_map(first, (64, 8), 128, "bf16")
    raw = tma.replace(tma.encode(old), "global_address", 0, second.ctypes.data)
    raw = tma.replace(raw, "global_dim", 1, 24)
    raw = tma.replace(raw, "box_dim", 1, 4)
    assert tma.decode(raw[:60]) == make_map(second, (64, 4), 128, "bf16")
    with pytest.raises(Exception, match="swizzle_mode"):
        tma.replace(raw, "swizzle_mode", 0, 1)


# ---------------------------------------------------------------- products

ELEMENTS = {
    "bf16": (2, 16, lambda x: x.to(torch.bfloat16)),
    "f16": (2, 16, lambda x: x.to(torch.float16)),
    "tf32": (4, 8, lambda x: x),
    "e4m3": (1, 32, lambda x: x.to(torch.float8_e4m3fn)),
    "e5m2": (1, 32, lambda x: x.to(torch.float8_e5m2)),
}


def byte_of(row: int, k_byte: int, size: int, width: int, k_major: bool, leading: int, stride: int) -> int:
    """Offset of a byte of an operand, as the PTX manual lays it out; ``k_byte`` counts bytes along k."""
    if k_major:
        if width:
            offset = row // 8 * stride + row % 8 * width + k_byte
        else:
            offset = row // 8 * stride + k_byte // 16 * leading + row % 8 * 16 + k_byte % 16
    else:
        k, along = k_byte // size, row * size + k_byte % size
        if width:
            offset = along // width * leading + along % width + k % 8 * width + k // 8 * stride
        else:
            offset = along // 16 * stride + along % 16 + k % 8 * 16 + k // 8 * leading
    return swizzled(offset, width)


def pack_operand(numbers: torch.Tensor, size: int, width: int, k_major: bool, leading: int, stride: int) -> np.ndarray:
    """Bytes of shared memory that hold (rows, k)."""
    raw = numbers.contiguous().view(torch.uint8).numpy().reshape(len(numbers), -1)
    image = np.zeros(16384, np.uint8)
    for row in range(raw.shape[0]):
        for k_byte in range(raw.shape[1]):
            image[byte_of(row, k_byte, size, width, k_major, leading, stride)] = raw[row, k_byte]
    return image


def layout_of(rows: int, width: int, k_major: bool) -> tuple[int, int]:
    """Leading and stride byte offsets that keep the parts of an operand apart."""
    if k_major:
        return (0, 8 * width) if width else (128 * -(-rows // 8), 128)
    if width:
        return 2 * 8 * width, 8 * width
    return 128 * -(-rows // 8), 128


def descriptor(start: int, leading: int, stride: int, width: int) -> int:
    code = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62


PRODUCTS = [
    ("bf16", 64, 128, 128, True, True, False),
    ("bf16", 8, 64, 32, True, True, False),
    ("f16", 16, 32, 0, True, True, False),
    ("bf16", 64, 0, 64, True, True, False),
    ("f16", 128, 128, 128, False, False, False),
    ("bf16", 32, 64, 64, False, True, False),
    ("bf16", 64, 32, 32, True, False, False),
    ("f16", 16, 0, 0, False, False, False),
    ("tf32", 32, 128, 128, True, True, False),
    ("e4m3", 64, 128, 128, True, True, False),
    ("e5m2", 16, 64, 0, True, True, False),
    ("bf16", 32, 128, 128, True, False, True),
    ("f16", 16, 128, 64, True, True, True),
    ("tf32", 16, 128, 32, True, True, True),
    ("e4m3", 24, 128, 128, True, True, True),
]


@pytest.mark.parametrize(("element", "n", "width_a", "width_b", "k_major_a", "k_major_b", "registers"), PRODUCTS)
def test_products(element, n, width_a, width_b, k_major_a, k_major_b, registers) -> None:
    """D = A B, then D -= A B once more with a sign and D += A B: exact on small integers."""
    size, k, convert = ELEMENTS[element]
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-3, 4, (64, k), generator=generator).float()
    b = torch.randint(-3, 4, (n, k), generator=generator).float()
    layout_a, layout_b = layout_of(64, width_a, k_major_a), layout_of(n, width_b, k_major_b)
    image = np.concatenate(
        [
            pack_operand(convert(a), size, width_a, k_major_a, *layout_a),
            pack_operand(convert(b), size, width_b, k_major_b, *layout_b),
        ]
    )
    # A in registers: a word of four bytes per register; rows t / 4 and 8 more, words t % 4 and 4 more
    words = convert(a).contiguous().view(torch.uint8).numpy().reshape(64, 32).view(np.uint32)
    fragments = np.zeros((128, 4), np.uint32)
    for thread, i in itertools.product(range(128), range(4)):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i & 1)
        fragments[thread, i] = words[row, thread % 4 + 4 * (i >> 1)]
    out = np.zeros((128, n // 2), np.float32)
    accumulators = "{" + ", ".join(f"%r{100 + i}" for i in range(n // 2)) + "}"
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{element}.{element}"
    source = "{%r30, %r31, %r32, %r33}" if registers else "%rd10"
    flags = [] if k != 16 else ([int(not k_major_b)] if registers else [int(not k_major_a), int(not k_major_b)])
    tail = "".join(f", {flag}" for flag in flags)
    # shared memory begins at 1024, as hardware has it
    body = f"""
    mov.b32 %r2, 32768;
    mov.b32 %r4, 128;
    {FILL}
    mul.wide.u32 %rd40, %r0, 16;
    add.s64 %rd41, %rd1, %rd40;
    ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd41];
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %rd10, {descriptor(1024, *layout_a, width_a)};
    mov.b64 %rd11, {descriptor(1024 + 16384, *layout_b, width_b)};
    wgmma.fence.sync.aligned;
    setp.ne.b32 %p1, 0, 0;
    {name} {accumulators}, {source}, %rd11, %p1, 1, 1{tail};
    setp.eq.b32 %p1, 0, 0;
    {name} {accumulators}, {source}, %rd11, %p1, 1, 1{tail};
    wgmma.commit_group.sync.aligned;
    {name} {accumulators}, {source}, %rd11, %p1, -1, 1{tail};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.f32 %r100, %r100, 0f3F800000;
    wgmma.fence.sync.aligned;
    {name} {accumulators}, {source}, %rd11, %p1, 1, 1{tail};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd50, %r0, {2 * n};
    add.s64 %rd51, %rd2, %rd50;
    """ + "".join(f"    st.global.b32 [%rd51+{4 * i}], %r{100 + i};\n" for i in range(n // 2))
    for options in SCHEDULES[:3]:
        out[:] = 0
        trace = launch(body, [image, fragments, out], block=128, shared=32768, options=options)
        want = 2 * (a @ b.T).numpy()
        for thread, i in itertools.product(range(128), range(n // 2)):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i >> 1 & 1)
            column = 8 * (i >> 2) + 2 * (thread % 4) + (i & 1)
            assert out[thread, i] == want[row, column] + (i == 0), (thread, i, options)
        assert trace.flops == 4 * 2 * 64 * n * k


def test_unknown_bits_of_a_matrix_descriptor_are_refused() -> None:
    body = """
    mov.b64 %rd10, 0x0002000000000040;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd10, %rd10, 0, 1, 1, 0, 0;
    """
    with pytest.raises(Unsupported, match="matrix descriptor"):
        launch(body, [np.zeros(1, np.uint32)], block=128)


# ---------------------------------------------------------------- races


def test_reading_before_the_copy_has_landed() -> None:
    source = aligned((16, 64), np.uint16)
    tensor = make_map(source, (64, 16), 128, "bf16")
    # More bytes are expected than come, so that the phase cannot complete in any schedule.
    body = load_box(4096, 2, "0, 0", ending="    ld.shared.b32 %r9, [%r1+1024];")
    for options in SCHEDULES[:2]:
        with pytest.raises(RaceFault, match="still writing"):
            launch(body, [np.zeros(1, np.uint32), source], maps=(tensor,), options=options)


STORE_AND_WRITE = """
    mov.b32 %r2, 1024;
    mov.b32 %r4, 32;
    {fill}
    {fence}
    bar.sync 0;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 1024;
    cp.async.bulk.commit_group;
    {wait}
    st.shared.b32 [%r1], %r0;
"""


@each_schedule
def test_writing_what_a_bulk_store_still_reads(options: Options) -> None:
    arrays = [aligned((256,), np.uint32), aligned((256,), np.uint32)]
    fence, done = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;"
    launch(STORE_AND_WRITE.format(fill=FILL, fence=fence, wait=done), arrays, options=options)
    with pytest.raises(RaceFault, match="still using"):
        launch(STORE_AND_WRITE.format(fill=FILL, fence=fence, wait=""), arrays, options=options)
    with pytest.raises(RaceFault, match="without fence.proxy.async"):
        launch(STORE_AND_WRITE.format(fill=FILL, fence="", wait=done), arrays, options=options)


def test_looking_at_an_accumulator_too_early() -> None:
    """And using registers in a product that no fence orders behind their last use."""

    def body(fence: str, wait: str) -> str:
        return f"""
    mov.b32 %r2, 4096;
    mov.b32 %r4, 128;
    {FILL}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %rd10, {descriptor(1024, 0, 256, 32)};
    mov.b32 %r10, 0;
    mov.b32 %r11, 0;
    mov.b32 %r12, 0;
    mov.b32 %r13, 0;
    {fence}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10, %r11, %r12, %r13}}, %rd10, %rd10, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    {wait}
    add.f32 %r14, %r10, %r11;
    """

    fence, wait = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
    arrays = [np.zeros(4096, np.uint8)]
    launch(body(fence, wait), arrays, block=128)
    with pytest.raises(RaceFault, match="accumulator"):
        launch(body(fence, ""), arrays, block=128)
    with pytest.raises(RaceFault, match="no wgmma.fence"):
        launch(body("", wait), arrays, block=128)


EXCHANGE = """
    shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], %r0;
    {first}
    xor.b32 %r4, %r2, 128;
    add.s32 %r5, %r1, %r4;
    ld.shared.b32 %r9, [%r5];
    {second}
    st.shared.b32 [%r3], %r9;
"""


@each_schedule
def test_accesses_that_no_barrier_orders(options: Options) -> None:
    """Two warps exchange words: found even where warps happened to run in the right order."""
    launch(EXCHANGE.format(first="bar.sync 0;", second="bar.sync 0;"), [np.zeros(1, np.uint32)], block=64)
    with pytest.raises((RaceFault, MemoryFault), match="orders it behind that write|never written"):
        body = EXCHANGE.format(first="", second="bar.sync 0;")
        launch(body, [np.zeros(1, np.uint32)], block=64, options=options)
    with pytest.raises(RaceFault, match="nothing that this warp waited for orders it"):
        body = EXCHANGE.format(first="bar.sync 0;", second="")
        launch(body, [np.zeros(1, np.uint32)], block=64, options=options)


@each_schedule
def test_a_wait_that_is_missing_though_the_data_had_come(options: Options) -> None:
    """Warp 0 waits for the load and tells warp 1, or does not tell it."""
    source = aligned((16, 64), np.uint16)
    tensor = make_map(source, (64, 16), 128, "bf16")

    def body(tells: str) -> str:
        return f"""
    setp.ge.u32 %p30, %r0, 32;
    @%p30 bra OTHER;
    {load_box(2048, 2, "0, 0").replace("bar.sync 0;", "bar.warp.sync -1;")}
    {tells}
    st.global.b32 [%rd0], 1;
    bra BEHIND;
OTHER:
    {tells}
SPIN:
    ld.global.b32 %r6, [%rd0];
    setp.eq.s32 %p31, %r6, 0;
    @%p31 bra SPIN;
    ld.shared.b32 %r9, [%r1+1024];
BEHIND:
    """

    launch(body("bar.sync 1, 64;"), [np.zeros(1, np.uint32), source], maps=(tensor,), block=64, options=options)
    with pytest.raises(RaceFault, match="copies that signal the mbarrier"):
        launch(body(""), [np.zeros(1, np.uint32), source], maps=(tensor,), block=64, options=options)
    quiet = Options(options.schedule, options.seed, order_checks=False)
    launch(body(""), [np.zeros(1, np.uint32), source], maps=(tensor,), block=64, options=quiet)


def test_barriers_of_other_blocks_need_a_fence_behind_their_initialisation() -> None:
    body = """
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 64;
    {fence}
INIT_DONE:
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mov.u32 %r6, %cluster_ctarank;
    xor.b32 %r7, %r6, 1;
    mapa.shared::cluster.u32 %r8, %r1, %r7;
    mbarrier.arrive.shared::cluster.b64 _, [%r8];
    barrier.cluster.arrive;
    barrier.cluster.wait;
    """
    arrays = [np.zeros(1, np.uint32)]
    launch(body.format(fence="fence.mbarrier_init.release.cluster;"), arrays, grid=2, cluster=2)
    with pytest.raises(BarrierFault, match="fence.mbarrier_init"):
        launch(body.format(fence=""), arrays, grid=2, cluster=2)


def test_a_block_waits_for_arrivals_of_others_before_it_ends() -> None:
    """Block 1 arrives at a barrier of block 0, which ends with or without having waited for that."""

    def body(tail: str) -> str:
        return f"""
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 32;
    fence.mbarrier_init.release.cluster;
INIT_DONE:
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mov.u32 %r6, %cluster_ctarank;
    setp.eq.s32 %p1, %r6, 0;
    @%p1 bra OWNER;
    mapa.shared::cluster.u32 %r8, %r1, 0;
    mbarrier.arrive.shared::cluster.b64 _, [%r8];
    st.global.b32 [%rd0], 1;
    bra BEHIND;
OWNER:
    ld.global.b32 %r9, [%rd0];
    setp.eq.s32 %p2, %r9, 0;
    @%p2 bra OWNER;
    {tail}
BEHIND:
    """

    launch(body(wait("%r1", "0")), [np.zeros(1, np.uint32)], grid=2, cluster=2)
    with pytest.raises(RaceFault, match="ends without having waited"):
        launch(body(""), [np.zeros(1, np.uint32)], grid=2, cluster=2)


# ---------------------------------------------------------------- who may issue what, and what a report says


def test_one_lane_makes_a_barrier_once() -> None:
    arrays = [np.zeros(1, np.uint32)]
    init = "    mbarrier.init.shared.b64 [%r1], 1;"
    with pytest.raises(BarrierFault, match="32 lanes initialise the same barrier"):
        launch(init, arrays)
    again = "    setp.ne.s32 %p1, %r0, 0;\n    @%p1 bra BEHIND;\n{}\nBEHIND:\n"
    with pytest.raises(BarrierFault, match="initialises a barrier that is in use"):
        launch(again.format(init + init), arrays)
    launch(again.format(init + "    mbarrier.inval.shared.b64 [%r1];" + init), arrays)
    launch(again.format(init + "    st.shared.b64 [%r1], 0;" + init), arrays)
    each = "    shl.b32 %r2, %r0, 3;\n    add.s32 %r2, %r2, %r1;\n    mbarrier.init.shared.b64 [%r2], 1;"
    launch(each, arrays)


def test_bulk_loads_are_issued_by_one_lane() -> None:
    source = aligned((16, 64), np.uint16)
    tensor = make_map(source, (64, 16), 128, "bf16")
    arrays = [np.zeros(1, np.uint32), source]
    one = load_box(2048, 2, "0, 0")
    launch(one, arrays, maps=(tensor,))
    all_lanes = one.replace("    cp.async.bulk", "ISSUED:\n    cp.async.bulk").replace("[%r1];\nISSUED:", "[%r1];")
    with pytest.raises(BarrierFault, match="32 lanes issue the same bulk copy"):
        launch(all_lanes, arrays, maps=(tensor,))
    rows = """
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 512;
INIT_DONE:
    bar.sync 0;
    shl.b32 %r2, %r0, 4;
    add.s32 %r3, %r2, %r1;
    cvt.u64.u32 %rd5, %r2;
    add.s64 %rd6, %rd0, %rd5;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3+1024], [%rd6], 16, [%r1];
    """
    launch(rows + wait("%r1", "0"), [aligned((32, 4), np.uint32)])


def test_a_block_that_does_not_wait_for_its_bulk_stores() -> None:
    arrays = [aligned((256,), np.uint32), aligned((256,), np.uint32)]
    body = STORE_AND_WRITE.format(fill=FILL, fence="fence.proxy.async.shared::cta;", wait="").rsplit("st.shared", 1)[0]
    done = "    cp.async.bulk.wait_group.read 0;\n"
    assert launch(body + done, arrays).warnings == []
    (warning,) = launch(body, arrays).warnings
    assert "block 0 ends and warp 0 has not waited for its bulk stores" in warning
    assert "cp.async.bulk.global.shared::cta" in warning


def test_equal_lines_of_the_deadlock_report_are_joined() -> None:
    """Of three warps in each of four blocks one ends and two wait."""
    body = INIT + "    setp.lt.u32 %p1, %r0, 32;\n    @%p1 bra BEHIND;\n" + wait("%r1", "0") + "\nBEHIND:\n"
    with pytest.raises(Deadlock) as caught:
        launch(body, [np.zeros(1, np.uint32)], block=96, grid=4)
    first, *lines = str(caught.value).splitlines()
    assert lines[0] == "  blocks 0-3 (rank 0) warp 0: has ended"
    assert lines[1].startswith("  blocks 0-3 (rank 0) warps 1-2: mbarrier wait, parity 0: mbarrier at")
    assert len(lines) == 2, first


@pytest.mark.parametrize(
    ("first", "match"),
    [
        ("ld.shared.b32 %r9, [%r1+1024];", "a bulk load writes shared offset 2048, read by warp 1"),
        ("st.shared.b32 [%r1+1024], %r0;", "a bulk load writes shared offset 2048, written by warp 1"),
    ],
)
def test_a_load_that_overwrites_is_said_to_write(first: str, match: str) -> None:
    source = aligned((16, 64), np.uint16)
    tensor = make_map(source, (64, 16), 128, "bf16")
    issue = load_box(2048, 2, "0, 0").replace("bar.sync 0;", "bar.warp.sync -1;")
    body = f"""
    setp.ge.u32 %p30, %r0, 32;
    @!%p30 st.shared.b32 [%r1+1024], 7;
    bar.sync 0;
    @%p30 bra OTHER;
SPIN:
    ld.global.b32 %r6, [%rd0];
    setp.eq.s32 %p31, %r6, 0;
    @%p31 bra SPIN;
    {issue}
    bra BEHIND;
OTHER:
    {first}
    st.global.b32 [%rd0], 1;
BEHIND:
    """
    with pytest.raises(RaceFault, match=match):
        launch(body, [np.zeros(1, np.uint32), source], maps=(tensor,), block=64)


@pytest.mark.parametrize("is_st_async", [False, True])
def test_asynchronous_writes_behind_ordinary_reads_want_a_proxy_fence(is_st_async: bool) -> None:
    source = aligned((256,), np.uint32)

    def warnings(fence: str) -> list[str]:
        load = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+16], [%rd0], 16, [%r1];"
        store = (
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r1+16], {%r0, %r0, %r0, %r0}, [%r1];"
        )
        body = f"""{INIT}
    st.shared.b32 [%r1+16], 7;
    ld.shared.b32 %r9, [%r1+16];
    {fence}
    setp.ne.s32 %p1, %r0, 0;
    @%p1 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;
    {store if is_st_async else load}
ISSUED:
    {wait("%r1", "0")}
    """
        return launch(body, [source]).warnings

    assert warnings("fence.proxy.async.shared::cta;") == []
    (warning,) = warnings("")
    assert "overwrites what ordinary loads read, without fence.proxy.async in between" in warning


# ---------------------------------------------------------------- fences of products


def products(*lines: str) -> list[str]:
    """Warnings of 128 threads that run lines on zeros in shared memory.

    ``ADD SET0`` and ``ADD SET1`` add a product to the registers from %r10 and %r20 on, ``SET SET0`` overwrites them,
    ``ADD A`` takes A from the registers from %r30 on.
    """
    first, second, third = ("{" + ", ".join(f"%r{start + n}" for n in range(4)) + "}" for start in (10, 20, 30))
    names = {
        "ADD SET0;": f"{first}, %rd10, %rd10, 1, 1, 1, 0, 0;",
        "SET SET0;": f"{first}, %rd10, %rd10, 0, 1, 1, 0, 0;",
        "ADD SET1;": f"{second}, %rd10, %rd10, 1, 1, 1, 0, 0;",
        "ADD A;": f"{first}, {third}, %rd10, 1, 1, 1, 0;",
    }
    zeros = "\n".join(f"    mov.b32 %r{n}, 0;" for start in (10, 20, 30) for n in range(start, start + 4))
    text = "\n".join(f"    {line}" for line in lines)
    for name, operands in names.items():
        text = text.replace(name, f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {operands}")
    text = text.replace("WAIT;", "COMMIT;\n    wgmma.wait_group.sync.aligned 0;")
    text = text.replace("FENCE;", "wgmma.fence.sync.aligned;").replace("COMMIT;", "wgmma.commit_group.sync.aligned;")
    body = f"""
    mov.b32 %r2, 4096;
    mov.b32 %r4, 128;
    {FILL}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %rd10, {descriptor(1024, 0, 256, 32)};
{zeros}
{text}
    """
    return launch(body, [np.zeros(4096, np.uint8)], block=128).warnings


def test_products_in_flight_bar_only_their_own_registers() -> None:
    """A second accumulator may be made ready while the first is in use, and needs no other fence for that."""
    assert products("FENCE;", "ADD SET0;", "mov.b32 %r21, %r20;", "ADD SET1;", "ADD SET0;", "WAIT;") == []
    assert products("FENCE;", "ADD SET0;", "COMMIT;", "ADD SET1;", "WAIT;", "add.f32 %r40, %r10, %r11;") == []
    with pytest.raises(RaceFault, match="accumulator while wgmma may be writing"):
        products("FENCE;", "ADD SET0;", "mov.b32 %r11, %r20;", "WAIT;")
    with pytest.raises(RaceFault, match="accumulator while wgmma may be writing"):
        products("FENCE;", "ADD SET0;", "ADD SET1;", "add.f32 %r40, %r20, %r21;", "WAIT;")
    assert products("FENCE;", "ADD SET0;", "WAIT;", "add.f32 %r40, %r10, %r10;", "ADD SET1;", "WAIT;") == []


def test_what_products_read_is_fenced() -> None:
    change = "add.f32 %r12, %r12, 0f3F800000;"
    assert products("FENCE;", "ADD SET0;", "WAIT;", change, "FENCE;", "ADD SET0;", "WAIT;") == []
    with pytest.raises(RaceFault, match="no wgmma.fence orders the product, which reads its accumulator"):
        products("FENCE;", "ADD SET0;", "WAIT;", change, "ADD SET0;", "WAIT;")
    with pytest.raises(RaceFault, match="no wgmma.fence orders the product, which reads its accumulator"):
        products("FENCE;", change, "ADD SET0;", "WAIT;")
    with pytest.raises(RaceFault, match="no wgmma.fence orders the product, which reads its operand A"):
        products("FENCE;", "or.b32 %r31, %r31, 1;", "ADD A;", "WAIT;")
    assert products("or.b32 %r31, %r31, 1;", "FENCE;", "ADD A;", "WAIT;") == []


def test_what_products_overwrite_need_only_be_warned_of() -> None:
    use = "add.f32 %r40, %r10, %r11;"
    for line in (use, "add.f32 %r10, %r10, %r11;"):
        (warning,) = products("FENCE;", "ADD SET0;", "WAIT;", line, "SET SET0;", "ADD SET0;", "WAIT;")
        assert "overwrites registers used since the last wgmma.fence" in warning and "mma_async" in warning
        assert products("FENCE;", "ADD SET0;", "WAIT;", line, "FENCE;", "SET SET0;", "ADD SET0;", "WAIT;") == []


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(("pitch", "cycles"), [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(pitch: int, cycles: int) -> None:
    body = f"""
    mul.lo.s32 %r2, %r0, {4 * pitch};
    add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], %r0;
    """
    trace = launch(body, [np.zeros(1, np.uint32)], shared=8192)
    assert (trace.shared["st.shared"].cycles, trace.shared["st.shared"].ideal) == (cycles, 1)


@pytest.mark.parametrize(("stride", "size", "sectors"), [(4, 4, 4), (8, 4, 8), (32, 4, 32), (16, 16, 16), (0, 4, 1)])
def test_sectors(stride: int, size: int, sectors: int) -> None:
    source = aligned((1024,), np.uint8)
    count = size // 4
    registers = ", ".join(f"%r{10 + n}" for n in range(count))
    vector, target = (f".v{count}", f"{{{registers}}}") if count > 1 else ("", registers)
    body = f"""
    mul.lo.s32 %r2, %r0, {stride};
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd0, %rd2;
    ld.global{vector}.b32 {target}, [%rd3];
    """
    trace = launch(body, [source])
    traffic = trace.traffic["ld.global", "array0"]
    assert (traffic.requests, traffic.num_bytes, traffic.sectors) == (1, 32 * size, sectors)


def test_the_table_and_the_timeline() -> None:
    source = aligned((16, 64), np.uint16)
    out = np.zeros(2048, np.uint8)
    tensor = make_map(source, (64, 16), 128, "bf16")
    body = load_box(2048, 2, "0, 0")
    body += f"    mov.b32 %r2, 2048;\n    mov.b32 %r3, 1024;\n{DUMP}"
    trace = launch(body, [out, source], maps=(tensor,), options=Options("lazy", timeline=True))
    table = trace.table()
    assert "TMA load" in table and "2,048" in table and "mbarrier wait" in table and "array1" in table
    assert trace.bytes_of("array1") == 2048 and trace.bytes_of() == 4096
    assert any("try_wait" in wait.what and wait.end >= wait.start for wait in trace.timeline)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="schedule is 'slow'"):
        Options("slow")
    with pytest.raises(ValueError, match="uninitialised is 'no'"):
        Options(uninitialised="no")
    with pytest.raises(SimulatorError, match="parameters"):
        engine.run(".visible .entry k(.param .u64 p) { ret; }", "k", LaunchConfig((1, 1, 1), (32, 1, 1)), [], [])
