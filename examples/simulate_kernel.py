"""A matrix product for Hopper in CuTe-DSL, run on a CPU by the simulator: to learn from, and to break.

    python -m examples.simulate_kernel                        run it, compare with torch, count its bytes
    python -m examples.simulate_kernel --size 200 136 328     of other sizes: M, N, K; K a multiple of 8
    python -m examples.simulate_kernel --bug missing-wait     plant a bug, and see what the simulator says about it
    python -m examples.simulate_kernel --timeline t.png       draw as well which warp waited for whom, and when

The kernel computes C = A B^T with what makes Hopper fast: TMA loads, a ring of slots in shared memory with two barriers
each, one warp that loads and four that multiply with wgmma. ``docs/simulator.md`` walks through a report.

It needs nvidia-cutlass-dsl and a C compiler, for ``--timeline`` also matplotlib, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file, python examples/simulate_kernel.py: let the imports below find sonic
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sonic.simulator import SimulatorError, Trace, draw_timeline, hopper, tensor
from sonic.simulator.version import check_version

try:
    check_version()
except SimulatorError as error:
    sys.exit(str(error))

import cutlass.memory
from cutlass import cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import from_dlpack

TILE_M, TILE_N, TILE_K = 64, 128, 64  # of C, one block each; K is walked in steps of TILE_K
SLOTS = 3  # of the ring: tiles of A and B that are in shared memory at a time
CONSUMERS = 128  # threads: one warpgroup, warps 0 to 3, multiplies; warp 4 loads
PRODUCER_WARP = CONSUMERS // 32

# What --bug can plant, and where to look for it.
BUGS = {
    "missing-wait": "the consumer does not wait for the full barrier: it may multiply what has not arrived",
    "missing-empty-wait": "the producer does not wait for the empty barrier: it may overwrite what is being read",
    "early-release": "the consumer frees a slot while its wgmma may still be reading it",
    "wrong-bytes": "the full barrier expects more bytes than the loads bring: it never completes",
}

SCHEDULES = [("eager", 0), ("lazy", 0), *(("random", seed) for seed in range(3))]


# ---------------------------------------------------------------- the kernel


@cute.kernel
def gemm_kernel(
    load_a: cute.CopyAtom,
    a: cute.Tensor,
    load_b: cute.CopyAtom,
    b: cute.Tensor,
    c: cute.Tensor,
    mma: cute.TiledMma,
    layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
    dtype: cutlass.Constexpr,
    bug: cutlass.Constexpr,
) -> None:
    """One tile of C = A B^T. ``a`` and ``b`` are coordinates for TMA, not memory; ``c`` is memory."""
    thread, _, _ = cute.arch.thread_idx()
    tile_m, tile_n, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())

    # Shared memory: a ring of slots, and two barriers for each slot.
    shared = cutlass.memory.SmemAllocator()
    full = shared.allocate_array(cutlass.Int64, SLOTS)  # completes when the tiles of a slot have arrived
    empty = shared.allocate_array(cutlass.Int64, SLOTS)  # completes when all consumer warps have read them
    shared_a = shared.allocate_tensor(dtype, layout_a.outer, 1024, swizzle=layout_a.inner)
    shared_b = shared.allocate_tensor(dtype, layout_b.outer, 1024, swizzle=layout_b.inner)
    if warp == 0:
        with cute.arch.elect_one():
            for slot in cutlass.range_constexpr(SLOTS):
                cute.arch.mbarrier_init(full + slot, 1)  # one arrival, of the producer, and the bytes it expects
                cute.arch.mbarrier_init(empty + slot, CONSUMERS // 32)  # one arrival of each consumer warp
        cute.arch.mbarrier_init_fence()  # makes the barriers known to TMA
    cute.arch.sync_threads()

    # The tiles of this block: (tile, steps along K), split as one TMA instruction takes them.
    tiles_a = cute.local_tile(a, (TILE_M, TILE_K), (tile_m, None))
    tiles_b = cute.local_tile(b, (TILE_N, TILE_K), (tile_n, None))
    alone = cute.make_layout(1)  # no cluster
    into_a, from_a = cpasync.tma_partition(
        load_a, 0, alone, cute.group_modes(shared_a, 0, 2), cute.group_modes(tiles_a, 0, 2)
    )
    into_b, from_b = cpasync.tma_partition(
        load_b, 0, alone, cute.group_modes(shared_b, 0, 2), cute.group_modes(tiles_b, 0, 2)
    )
    steps = cute.size(tiles_a, mode=[2])
    bytes_a = cute.size_in_bytes(dtype, cute.select(layout_a, mode=[0, 1]))
    bytes_b = cute.size_in_bytes(dtype, cute.select(layout_b, mode=[0, 1]))
    num_bytes = cutlass.const_expr(bytes_a + bytes_b * (2 if bug == "wrong-bytes" else 1))

    # A step uses slot `step % SLOTS`, for the `step // SLOTS`-th time: the parity of that is what a wait names. On a
    # fresh barrier a wait for parity 1 returns at once, which is how the producer finds the ring empty.
    if warp == PRODUCER_WARP:
        for step in cutlass.range(steps, unroll=1):
            slot, parity = step % SLOTS, (step // SLOTS) % 2
            if cutlass.const_expr(bug != "missing-empty-wait"):
                cute.arch.mbarrier_wait(empty + slot, parity ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, num_bytes)
            cute.copy(load_a, from_a[None, step], into_a[None, slot], tma_bar_ptr=full + slot)
            cute.copy(load_b, from_b[None, step], into_b[None, slot], tma_bar_ptr=full + slot)
    else:
        part = mma.get_slice(thread)
        operand_a = mma.make_fragment_A(part.partition_A(shared_a))  # descriptors: wgmma reads shared memory itself
        operand_b = mma.make_fragment_B(part.partition_B(shared_b))
        sums = cute.make_rmem_tensor(part.partition_shape_C((TILE_M, TILE_N)), cutlass.Float32)
        sums.fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        for step in cutlass.range(steps, unroll=1):
            slot, parity = step % SLOTS, (step // SLOTS) % 2
            if cutlass.const_expr(bug != "missing-wait"):
                cute.arch.mbarrier_wait(full + slot, parity)
            warpgroup.fence()
            for k in cutlass.range_constexpr(cute.size(operand_a, mode=[2])):
                cute.gemm(mma, sums, operand_a[None, None, k, slot], operand_b[None, None, k, slot], sums)
            warpgroup.commit_group()
            warpgroup.wait_group(1 if cutlass.const_expr(bug == "early-release") else 0)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + slot)
        warpgroup.wait_group(0)

        # Each thread stores its part of C, as far as it lies inside of C. TMA has loaded zeros from outside of A and B.
        coordinates = cute.local_tile(cute.make_identity_tensor(c.shape), (TILE_M, TILE_N), (tile_m, tile_n))
        place = part.partition_C(coordinates)
        target = part.partition_C(cute.local_tile(c, (TILE_M, TILE_N), (tile_m, tile_n)))
        for i in cutlass.range(cute.size(sums), unroll_full=True):
            if cute.elem_less(place[i], c.shape):
                target[i] = sums[i].to(c.element_type)


@cute.jit
def gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, bug: cutlass.Constexpr) -> None:
    """C = A B^T on the host side: layouts, tensor maps, launch."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, a.element_type)
    layout_a = cute.tile_to_shape(atom, (TILE_M, TILE_K, SLOTS), order=(0, 1, 2))
    layout_b = cute.tile_to_shape(atom, (TILE_N, TILE_K, SLOTS), order=(0, 1, 2))
    load = cpasync.CopyBulkTensorTileG2SOp()
    load_a, a_coordinates = cpasync.make_tiled_tma_atom(load, a, layout_a, (TILE_M, TILE_K))
    load_b, b_coordinates = cpasync.make_tiled_tma_atom(load, b, layout_b, (TILE_N, TILE_K))
    instruction = warpgroup.MmaF16BF16Op(
        a.element_type,
        cutlass.Float32,
        (TILE_M, TILE_N, 16),
        warpgroup.OperandSource.SMEM,
        OperandMajorMode.K,
        OperandMajorMode.K,
    )
    mma = cute.make_tiled_mma(instruction)
    m, n = c.shape
    gemm_kernel(load_a, a_coordinates, load_b, b_coordinates, c, mma, layout_a, layout_b, a.element_type, bug).launch(
        grid=(cute.ceil_div(m, TILE_M), cute.ceil_div(n, TILE_N), 1), block=(CONSUMERS + 32, 1, 1)
    )


# ---------------------------------------------------------------- its use on CPU tensors


def device_tensors(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> list[Any]:
    """What a compiled `gemm` takes: sizes that may change from call to call, names for reports.

    Args:
        a: (M, K), bfloat16, K a multiple of 8: TMA wants rows at multiples of 16 bytes.
        b: (N, K), bfloat16.
        c: (M, N), float32, written.
    """
    expected = [(c.shape[0], a.shape[1]), (c.shape[1], a.shape[1])]
    if [tuple(a.shape), tuple(b.shape)] != expected or a.shape[1] % 8 or 0 in (*a.shape, *c.shape):
        raise ValueError(
            f"simulate_kernel: A is {tuple(a.shape)}, B is {tuple(b.shape)}, C is {tuple(c.shape)}, "
            "expected (M, K), (N, K), (M, N), none empty, and K a multiple of 8"
        )
    if [a.dtype, b.dtype, c.dtype] != [torch.bfloat16, torch.bfloat16, torch.float32]:
        raise ValueError(f"simulate_kernel: A, B, C are {a.dtype}, {b.dtype}, {c.dtype}, expected bfloat16 and float32")
    if not (a.is_contiguous() and b.is_contiguous() and c.is_contiguous()):
        raise ValueError("simulate_kernel: A, B, C have strides of their own, expected contiguous matrices")
    return [
        from_dlpack(tensor(matrix, name), assumed_align=16).mark_layout_dynamic(leading_dim=1)
        for matrix, name in ((a, "A"), (b, "B"), (c, "C"))
    ]


def compile_gemm(bug: str = "") -> Callable[..., None]:
    """Compile `gemm` for matrices of any size, for the simulator, perhaps with one of `BUGS`."""
    if bug and bug not in BUGS:
        raise ValueError(f"simulate_kernel: bug is {bug!r}, expected one of {sorted(BUGS)}")
    one = [torch.zeros(8, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)]
    with hopper():  # a function that is to be launched in the simulator is compiled there
        return cute.compile(gemm, *device_tensors(*one), bug)


def integers(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B of small integers, C full of NaN, and A B^T, which every order of summation must give exactly."""
    a, b = (torch.randint(-3, 4, (rows, k)).bfloat16() for rows in (m, n))
    return a, b, torch.full((m, n), float("nan")), a.float() @ b.float().T


def simulate(
    compiled: Callable[..., None],
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    schedule: str,
    seed: int = 0,
    **options: Any,
) -> Trace:
    """Run the kernel once; see `sonic.simulator.hopper` for what the schedule decides, and for further options."""
    with hopper(schedule, seed, **options) as simulation:
        compiled(*device_tensors(a, b, c))
    return simulation.traces[0]


def ideal_bytes(m: int, n: int, k: int) -> dict[str, int]:
    """Bytes that the kernel should move: every tile of C loads its rows of A and of B, and is stored once."""
    return {
        "A": 2 * m * k * -(-n // TILE_N),
        "B": 2 * n * k * -(-m // TILE_M),
        "C": 4 * m * n,
    }


# ---------------------------------------------------------------- the command


def show_counts(m: int, n: int, k: int, timeline: str | None = None) -> int:
    """Run the kernel as it should be, and draw the waits of one tile if asked to; return an exit status."""
    print(f"C ({m} x {n}) = A ({m} x {k}) B^T ({k} x {n}), small integers, in tiles of {TILE_M} x {TILE_N}\n")
    compiled = compile_gemm()
    for schedule, seed in SCHEDULES:
        a, b, c, product = integers(m, n, k)
        trace = simulate(compiled, a, b, c, schedule, seed)
        num_wrong = int((c != product).sum())
        told = f"{num_wrong} of {c.numel()} elements differ from torch" if num_wrong else "exactly what torch computes"
        print(f"{schedule + ' ' + str(seed):10}{told}, in {trace.seconds:.2f} s")
        if num_wrong:
            return 1
    print(f"\nThe last run:\n\n{trace.table()}\n")
    print("tensor  bytes counted  bytes by hand  each byte once")
    counted = trace.bytes_by_tensor()
    once = {"A": 2 * m * k, "B": 2 * n * k, "C": 4 * m * n}
    for name, num_bytes in ideal_bytes(m, n, k).items():
        print(f"{name:6}  {counted[name]:13,}  {num_bytes:13,}  {once[name]:14,}")
    if timeline is not None:
        # A block alone, where nothing arrives before all warps have to wait: so every wait for data shows.
        a, b, c, _ = integers(min(m, TILE_M), min(n, TILE_N), k)
        draw_timeline(simulate(compiled, a, b, c, "lazy", timeline=True), timeline)
        print(f"\nwrote {timeline}: the waits of one tile of C under the lazy schedule")
    return 0


def show_bug(bug: str, m: int, n: int, k: int) -> int:
    """Run the kernel with a planted bug under every schedule and show each new report; return an exit status."""
    print(f"{bug}: {BUGS[bug]}\n")
    compiled = compile_gemm(bug)
    reports = []
    for schedule, seed in SCHEDULES:
        a, b, c, product = integers(m, n, k)
        try:
            simulate(compiled, a, b, c, schedule, seed)
        except SimulatorError as error:
            told = f"{type(error).__name__}\n{error}"
            print(f"{schedule} {seed}: {'the same report' if told in reports else told}\n")
            reports.append(told)
        else:
            print(f"{schedule} {seed}: no report, and C is {'right' if torch.equal(c, product) else 'wrong'}\n")
    return 0 if reports else 1


def main(arguments: list[str] | None = None) -> int | str:
    """Command line; returns an exit status or a message for it."""
    parser = argparse.ArgumentParser(prog="examples.simulate_kernel", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", type=int, nargs=3, metavar=("M", "N", "K"), help="sizes; K is a multiple of 8")
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant a bug and show the reports")
    parser.add_argument("--timeline", metavar="PATH", help="draw the waits of one tile of C as a PNG")
    options = parser.parse_args(arguments)
    if options.bug and options.timeline:
        parser.error("--timeline draws the kernel as it should be: not with --bug")
    torch.manual_seed(0)
    try:
        if options.bug:
            return show_bug(options.bug, *options.size or (TILE_M, TILE_N, 512))
        return show_counts(*options.size or (192, 256, 512), timeline=options.timeline)
    except (SimulatorError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
