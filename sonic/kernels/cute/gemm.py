"""The grouped GEMM for Hopper: one main loop, with loaders, an epilogue and a schedule that are chosen.

    C[tile] = sum over steps of left[tile, step] right[tile, step]          16-bit operands, float32 sums

Who does what: the last warpgroup fills a ring of slots, each of which holds one step of both operands; the other two
empty it by wgmma and finish tiles. Every slot has two barriers: ``full`` completes when both operands have arrived,
``empty`` when all that read it have. With ``pingpong`` the consuming warpgroups take turns, a tile each, so that one
finishes its tile while the other multiplies; without, they share each tile, by rows. Thread blocks of a cluster have
neighbouring row tiles and share the right operand, of which each loads a part into the slots of all; so a slot is empty
when all of them have read theirs.

What bounds it: a step of a 128 x 256 tile reads 48 KiB from L2 and takes 4.2 MFLOP, about 512 cycles of the tensor
cores of one SM; a ring of four such slots covers about 2,000 cycles of latency.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.memory
from cutlass import Boolean, Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup

from sonic.kernels.cute.config import CONSUMERS, TileConfig
from sonic.kernels.cute.epilogues import Epilogue, Place
from sonic.kernels.cute.loaders import PRODUCERS, STEP, Operand
from sonic.kernels.cute.schedule import Tile, VariableContraction, VariableRows, Work

__all__ = ["GroupedGemm"]

_GROUP = 128  # threads of a warpgroup
_BARRIER = 1  # named barriers: one for each consumer's epilogue, then one for each consumer's turn
_TURN = _BARRIER + CONSUMERS


class Ring(NamedTuple):
    """The slots in shared memory and their barriers."""

    full: cute.Pointer
    empty: cute.Pointer
    left: cute.Tensor
    right: cute.Tensor


class GroupedGemm:
    """A kernel, as a function for ``cute.compile``.

    Args:
        config: tile, ring and schedule.
        dtype: of the operands, 16-bit.
        left, right: loaders of :mod:`sonic.kernels.cute.loaders`.
        epilogue: one of :mod:`sonic.kernels.cute.epilogues`.
        schedule: one of :mod:`sonic.kernels.cute.schedule`; it says too whether rows or steps vary.
    """

    def __init__(
        self,
        config: TileConfig,
        dtype: Any,
        left: Operand,
        right: Operand,
        epilogue: Epilogue,
        schedule: VariableRows | VariableContraction,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.left, self.right, self.epilogue, self.schedule = left, right, epilogue, schedule
        self.steps_vary = isinstance(schedule, VariableContraction)
        self.sharers = 1 if config.pingpong else CONSUMERS  # consumers of one tile
        self.by_all_threads = left.by_all_threads or right.by_all_threads

    @cute.jit
    def __call__(
        self,
        left: tuple,
        right: tuple,
        tensors: tuple,
        offsets: cute.Tensor,
        sizes: tuple,
        num_blocks: Int32,
        stream: Any,
    ) -> None:
        """Launch.

        Args:
            left, right: (matrix or weight, row index or None) for their loader's ``host``.
            tensors: for the epilogue's ``host``.
            offsets: ``expert_offset_E1``.
            sizes: R, rows of an expert's product (0 if they vary), columns and steps' width (0 if it varies).
            num_blocks: thread blocks, a multiple of the cluster.
            stream: CUDA stream.
        """
        num_rows, width_m, width_n, width_k = sizes
        config = self.config
        instruction = warpgroup.MmaF16BF16Op(
            self.dtype,
            Float32,
            (64, config.tile_n, 16),
            warpgroup.OperandSource.SMEM,
            self.left.major,
            self.right.major,
        )
        work = Work(
            offsets,
            num_rows,
            cute.ceil_div(width_m, config.tile_m * config.cluster_m),
            cute.ceil_div(width_n, config.tile_n),
            cute.ceil_div(width_k, STEP),
        )
        self.kernel(
            cute.make_tiled_mma(instruction, cute.make_layout((self.sharers, 1, 1))),
            self.left.host(*left),
            self.right.host(*right),
            self.epilogue.host(tensors),
            work,
        ).launch(
            grid=(num_blocks, 1, 1),
            block=(_GROUP * CONSUMERS + PRODUCERS, 1, 1),
            cluster=(config.cluster_m, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, left_args: tuple, right_args: tuple, epilogue_args: tuple, work: Work) -> None:
        """Set the barriers up, then part."""
        config, slots = self.config, self.config.slots
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = warp // 4

        memory = cutlass.memory.SmemAllocator()
        full = memory.allocate_array(cutlass.Int64, slots)
        empty = memory.allocate_array(cutlass.Int64, slots)
        loaded = memory.allocate_array(cutlass.Int64, CONSUMERS)
        left_layout, right_layout = self.left.layout(slots), self.right.layout(slots)
        left = memory.allocate_tensor(self.dtype, left_layout.outer, 1024, swizzle=left_layout.inner)
        right = memory.allocate_tensor(self.dtype, right_layout.outer, 1024, swizzle=right_layout.inner)
        shared = memory.allocate(CONSUMERS * self.epilogue.shared_bytes, 1024)
        if warp == 0:
            with cute.arch.elect_one():
                for slot in cutlass.range_constexpr(slots):
                    cute.arch.mbarrier_init(full + slot, 1 + (PRODUCERS if self.by_all_threads else 0))
                    cute.arch.mbarrier_init(empty + slot, 4 * self.sharers * config.cluster_m)
                for consumer in cutlass.range_constexpr(CONSUMERS):
                    cute.arch.mbarrier_init(loaded + consumer, 1)
            cute.arch.mbarrier_init_fence()
        self._meet()

        ring = Ring(full, empty, left, right)
        if group == CONSUMERS:
            cute.arch.setmaxregister_decrease(config.producer_registers)
            if cutlass.const_expr(self.by_all_threads):
                self._produce(left_args, right_args, work, ring)
            else:
                if warp == 4 * CONSUMERS:
                    self._produce(left_args, right_args, work, ring)
        else:
            cute.arch.setmaxregister_increase(config.consumer_registers)
            self._consume(mma, epilogue_args, work, ring, shared, loaded)
        if cutlass.const_expr(config.cluster_m > 1):
            self._meet()  # others may still write to the slots of this block, or arrive at its barriers

    @cute.jit
    def _meet(self) -> None:
        """All threads of the cluster wait for each other."""
        if cutlass.const_expr(self.config.cluster_m > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _first(self, work: Work) -> Tile:
        block, _, _ = cute.arch.block_idx()
        return self.schedule.start(work, block // self.config.cluster_m)

    @cute.jit
    def _next(self, work: Work, tile: Tile) -> Tile:
        blocks, _, _ = cute.arch.grid_dim()
        return self.schedule.next(work, tile, blocks // self.config.cluster_m)

    @cute.jit
    def _steps(self, work: Work, tile: Tile) -> Int32:
        steps = work.steps_k
        if cutlass.const_expr(self.steps_vary):
            steps = cute.ceil_div(tile.row_end - tile.row_begin, STEP)
        else:
            if tile.expert == cute.size(work.offsets) - 1:  # rows of no expert
                steps = Int32(0)
        return steps

    @cute.jit
    def _row(self, tile: Tile) -> Int32:
        """First row of this thread block's tile."""
        rank = Int32(0)
        if cutlass.const_expr(self.config.cluster_m > 1):
            rank = cute.arch.block_idx_in_cluster()
        row = (tile.tile_m * self.config.cluster_m + rank) * self.config.tile_m
        if cutlass.const_expr(not self.steps_vary):
            row += tile.row_begin
        return row

    @cute.jit
    def _produce(self, left_args: tuple, right_args: tuple, work: Work, ring: Ring) -> None:
        """Fill slots, tile after tile: all threads of the warpgroup, or its first warp."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        thread -= _GROUP * CONSUMERS
        by_tma = [operand for operand in (self.left, self.right) if not operand.by_all_threads]
        num_bytes = sum(operand.slot_bytes for operand in by_tma)
        slot, parity = Int32(0), Int32(1)  # a fresh barrier lets pass who waits for parity 1
        tile = self._first(work)
        while tile.exists:
            left = self.left.prepare(left_args, tile, self._row(tile), tile.row_end, thread)
            column = tile.tile_n * config.tile_n
            right = self.right.prepare(right_args, tile, column, tile.row_end, thread)
            for step in cutlass.range(self._steps(work, tile), unroll=1):
                full = ring.full + slot
                cute.arch.mbarrier_wait(ring.empty + slot, parity)
                if thread // 32 == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
                    if cutlass.const_expr(not self.left.by_all_threads):
                        self.left.load(left_args, left, step, ring.left, slot, full)
                    if cutlass.const_expr(not self.right.by_all_threads):
                        self.right.load(right_args, right, step, ring.right, slot, full)
                if cutlass.const_expr(self.left.by_all_threads):
                    self.left.load(left_args, left, step, ring.left, slot, full)
                if cutlass.const_expr(self.right.by_all_threads):
                    self.right.load(right_args, right, step, ring.right, slot, full)
                if cutlass.const_expr(self.by_all_threads):
                    cute.arch.cp_async_mbarrier_arrive_noinc(full)
                slot += 1
                if slot == config.slots:
                    slot = Int32(0)
                    parity ^= 1
            tile = self._next(work, tile)

    @cute.jit
    def _consume(
        self, mma: cute.TiledMma, epilogue_args: tuple, work: Work, ring: Ring, shared: Any, loaded: Any
    ) -> None:
        """Multiply and finish, tile after tile: one warpgroup."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        group = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        share = Int32(0) if cutlass.const_expr(config.pingpong) else group  # of a tile's rows
        part = mma.get_slice(share * _GROUP)
        left = mma.make_fragment_A(part.partition_A(ring.left))
        right = mma.make_fragment_B(part.partition_B(ring.right))
        sums = cute.make_rmem_tensor(part.partition_shape_C((config.tile_m, config.tile_n)), Float32)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        slot, parity, turns = Int32(0), Int32(0), Int32(0)
        tile = self._first(work)
        owner = Int32(0)
        if cutlass.const_expr(config.pingpong):
            if (group == 1) & tile.exists:
                self._give_turn(Int32(0))
        while tile.exists:
            steps = self._steps(work, tile)
            following = self._next(work, tile)
            is_mine = Boolean(True)
            if cutlass.const_expr(config.pingpong):
                is_mine = owner == group
                owner ^= 1
            if is_mine:
                place = Place(
                    tile,
                    self._row(tile),
                    tile.expert == cute.size(work.offsets) - 1,
                    _BARRIER + group,
                    thread % _GROUP,
                    shared.toint() + group * self.epilogue.shared_bytes,
                    loaded + group,
                    turns & 1,
                )
                turns += 1
                self.epilogue.begin(epilogue_args, place, self.sharers * 64, share * 64)
                if cutlass.const_expr(config.pingpong):
                    cute.arch.barrier(barrier_id=_TURN + group, number_of_threads=_GROUP * CONSUMERS)
                sums.fill(0.0)
                before = slot
                for step in cutlass.range(steps, unroll=1):
                    cute.arch.mbarrier_wait(ring.full + slot, parity)
                    if cutlass.const_expr(self.by_all_threads):
                        cute.arch.fence_proxy("async.shared", space="cta")  # what cp.async wrote, for wgmma to read
                    warpgroup.fence()
                    for k in cutlass.range_constexpr(STEP // 16):
                        cute.gemm(mma, sums, left[None, None, k, slot], right[None, None, k, slot], sums)
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if step > 0:
                        self._release(ring.empty + before)
                    before = slot
                    slot += 1
                    if slot == config.slots:
                        slot = Int32(0)
                        parity ^= 1
                if cutlass.const_expr(config.pingpong):
                    if following.exists:
                        self._give_turn(1 - group)
                warpgroup.wait_group(0)
                if steps > 0:
                    self._release(ring.empty + before)
                for number in cutlass.range_constexpr(config.tile_m // 64 // self.sharers):
                    row = (number * self.sharers + share) * 64
                    self.epilogue.finish(epilogue_args, sums[None, number, 0], row, place, number)
            else:
                moved = slot + steps
                parity ^= (moved // config.slots) & 1
                slot = moved % config.slots
            tile = following
        self.epilogue.drain(thread % _GROUP)

    @cute.jit
    def _give_turn(self, group: Int32) -> None:
        """Let a warpgroup begin its main loop. Its slots come after those of the other, whose parity it might else
        take for its own.
        """
        cute.arch.barrier_arrive(barrier_id=_TURN + group, number_of_threads=_GROUP * CONSUMERS)

    @cute.jit
    def _release(self, empty: Any) -> None:
        """A warp has read a slot: tell every thread block of the cluster."""
        if cutlass.const_expr(self.config.cluster_m == 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty)
        else:
            lane = cute.arch.lane_idx()
            if lane < self.config.cluster_m:
                cute.arch.mbarrier_arrive(empty, lane)
