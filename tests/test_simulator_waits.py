"""Who ended each wait, and which stage of a pipeline it was for: recorded from small kernels in PTX."""

from __future__ import annotations

import numpy as np
import pytest

from sonic.simulator.options import Options
from sonic.simulator.timeline import Link, timeline_links
from sonic.simulator.trace import Trace
from sonic.simulator.waits import rings
from tests.test_simulator_engine import SCHEDULES, aligned, launch, make_map, wait

STEPS, STAGES = 5, 2
FULL, EMPTY = 1024, 1024 + 8 * STAGES  # offsets in shared memory, which begins at 1024

# Warp 1 loads boxes of 1 KiB into a ring of two slots, warp 0 reads them. %r2: step, %r3: slot, %r4: parity.
PIPELINE = f"""
    .loc 1 1 0
    setp.ne.s32 %p40, %r0, 0;
    @%p40 bra INIT_DONE;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1+8], 1;
    mbarrier.init.shared.b64 [%r1+16], 1;
    mbarrier.init.shared.b64 [%r1+24], 1;
    fence.mbarrier_init.release.cluster;
INIT_DONE:
    .loc 1 2 0
    bar.sync 0;
    mov.b64 %rd20, map0;
    cvta.param.u64 %rd21, %rd20;
    mov.b32 %r2, 0;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra PRODUCER;
CONSUMER:
    and.b32 %r3, %r2, 1;
    shr.u32 %r4, %r2, 1;
    shl.b32 %r5, %r3, 3;
    add.s32 %r5, %r5, %r1;
    .loc 1 3 0
{wait("%r5", "%r4")}
    shl.b32 %r6, %r3, 10;
    add.s32 %r6, %r6, %r1;
    shl.b32 %r7, %r0, 2;
    add.s32 %r7, %r7, %r6;
    ld.shared.b32 %r8, [%r7+1024];
    bar.warp.sync -1;
    elect.sync %r9|%p2, -1;
    .loc 1 4 0
    @%p2 mbarrier.arrive.shared.b64 _, [%r5+16];
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p3, %r2, {STEPS};
    @%p3 bra CONSUMER;
    bra BEHIND;
PRODUCER:
    and.b32 %r3, %r2, 1;
    shr.u32 %r4, %r2, 1;
    xor.b32 %r4, %r4, 1;
    shl.b32 %r5, %r3, 3;
    add.s32 %r5, %r5, %r1;
    .loc 1 5 0
{wait("%r5+16", "%r4")}
    shl.b32 %r6, %r3, 10;
    add.s32 %r6, %r6, %r1;
    shl.b32 %r7, %r2, 3;
    elect.sync %r9|%p2, -1;
    not.pred %p4, %p2;
    @%p4 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 1024;
    .loc 1 6 0
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r6+1024],
        [%rd21, {{0, %r7}}], [%r5];
ISSUED:
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p3, %r2, {STEPS};
    @%p3 bra PRODUCER;
BEHIND:
"""


def line_of(what: str) -> int:
    """The line of source at the end of a place."""
    return int(what.rstrip(")").rpartition(":")[2])


def pipeline(options: Options) -> Trace:
    source = aligned((8 * STEPS, 64), np.uint16)
    tensor = make_map(source, (64, 8), 128, "bf16")
    return launch(PIPELINE, [source], maps=(tensor,), block=64, options=options, line_info='.file 1 "pipe.py"')


def test_a_consumer_waits_for_a_copy_and_the_producer_for_a_consumer() -> None:
    trace = pipeline(Options("lazy", timeline=True))
    ends = [wait.end for wait in trace.timeline]
    assert ends == sorted(ends) and all(0 <= wait.start <= wait.end <= trace.instructions for wait in trace.timeline)
    by_line = {line: [w for w in trace.timeline if line_of(w.what) == line] for line in (2, 3, 5)}
    assert sum(map(len, by_line.values())) == len(trace.timeline)

    (sync,) = by_line[2]
    assert (sync.block, sync.warp, sync.barrier, sync.barrier_block, sync.phase, sync.ring) == (0, 0, 0, 0, 0, None)
    assert sync.ended_by is not None
    assert (sync.ended_by.block, sync.ended_by.warp, sync.ended_by.work) == (0, 1, None)
    assert sync.ended_by.what.startswith("`bar.sync 0`") and sync.ended_by.issued is None

    for step, full in enumerate(by_line[3]):
        stage, phase = step % STAGES, step // STAGES
        assert (full.warp, full.barrier, full.barrier_block, full.phase) == (0, FULL + 8 * stage, 0, phase)
        assert (full.ring, full.stage, full.num_stages) == (FULL, stage, STAGES)
        ender = full.ended_by
        assert ender is not None and (ender.block, ender.warp, ender.work) == (0, 1, "TMA load")
        assert ender.what.startswith("`cp.async.bulk.tensor.2d") and line_of(ender.what) == 6
        assert ender.issued is not None and ender.issued <= full.end
    assert len(by_line[3]) == STEPS, "nothing arrives before it is waited for"

    # the ring is empty at first: the producer waits from the third step on
    for step, empty in enumerate(by_line[5], start=STAGES):
        stage = step % STAGES
        assert (empty.warp, empty.barrier, empty.phase) == (1, EMPTY + 8 * stage, step // STAGES - 1)
        assert (empty.ring, empty.stage, empty.num_stages) == (EMPTY, stage, STAGES)
        ender = empty.ended_by
        assert ender is not None and (ender.block, ender.warp, ender.work) == (0, 0, None)
        assert ender.what.startswith("`@%p2 mbarrier.arrive") and line_of(ender.what) == 4
    assert len(by_line[5]) == STEPS - STAGES


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: f"{options.schedule}{options.seed}")
def test_the_same_run_with_and_without_a_timeline(options: Options) -> None:
    plain = pipeline(options)
    told = pipeline(Options(options.schedule, options.seed, timeline=True))
    assert plain.timeline == [] and told.timeline
    assert (plain.instructions, plain.events, plain.traffic) == (told.instructions, told.events, told.traffic)
    assert all(wait.ended_by is not None and wait.start <= wait.end for wait in told.timeline)


def test_links_say_the_same() -> None:
    trace = pipeline(Options("lazy", timeline=True))
    links = timeline_links(trace)
    assert len(links) == len(trace.timeline)
    loads = [link for link in links if link.ender == "TMA load"]
    assert [link.label for link in loads] == [
        f"mbarrier {FULL + 8 * (step % STAGES)} stage {step % STAGES} of {STAGES}, pipe.py:3" for step in range(STEPS)
    ]
    assert {(link.warp, link.issuer, link.ender_block) for link in loads} == {(0, 1, 0)}
    first = trace.timeline[0]
    assert links[0] == Link(0, 0, first.end, 0, 1, 1, None, "named barrier 0, pipe.py:2")
    assert timeline_links(trace, block=1) == []


GROUPS = """
    shl.b32 %r2, %r0, 4;
    add.s32 %r3, %r1, %r2;
    mul.wide.u32 %rd2, %r2, 1;
    add.s64 %rd3, %rd0, %rd2;
    cp.async.cg.shared.global [%r3], [%rd3], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
"""


def test_groups_of_copies_end_waits() -> None:
    source, out = aligned((128,), np.uint32), np.zeros(128, np.uint32)
    trace = launch(GROUPS, [source, out], options=Options("lazy", timeline=True))
    assert (out == source).all()
    enders = [wait.ended_by for wait in trace.timeline]
    assert [ender and (ender.work, ender.warp) for ender in enders] == [("cp.async group", 0), ("bulk store", 0)]
    assert [wait.barrier for wait in trace.timeline] == [None, None]


@pytest.mark.parametrize("ending", ["barrier.cluster.arrive.release.aligned;", "bra BEHIND;"])
def test_a_warp_of_another_block_ends_a_wait(ending: str) -> None:
    """The other block of a cluster arrives, or ends, which does as well."""
    body = f"""
    mov.u32 %r2, %cluster_ctarank;
    setp.eq.s32 %p1, %r2, 1;
    @%p1 bra OTHER;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    bra BEHIND;
OTHER:
    add.s32 %r3, %r2, 1;
    {ending}
    {"barrier.cluster.wait.acquire.aligned;" if "arrive" in ending else ""}
BEHIND:
    """
    trace = launch(body, [np.zeros(1, np.uint32)], grid=2, cluster=2, options=Options("lazy", timeline=True))
    (wait,) = trace.timeline
    assert (wait.block, wait.barrier, wait.phase) == (0, None, 0)
    assert wait.ended_by is not None and (wait.ended_by.block, wait.ended_by.warp) == (1, 0)
    assert wait.ended_by.what.startswith("`barrier.cluster.arrive" if "arrive" in ending else "`ret`")


@pytest.mark.parametrize(
    ("waited", "users", "expected"),
    [
        # one instruction in a loop
        ({5: {1024, 1032, 1040}}, {}, {1024: (1024, 0, 3), 1032: (1024, 1, 3), 1040: (1024, 2, 3)}),
        # a barrier that stands alone; places that are no ring
        ({5: {1024}}, {}, {}),
        ({5: {1024, 1032, 1052}}, {}, {}),
        # barriers that were never waited for leave their places free; other distances than 8
        ({5: {1024, 1032, 1048}}, {}, {1024: (1024, 0, 4), 1032: (1024, 1, 4), 1048: (1024, 3, 4)}),
        ({5: {1024, 1040}}, {}, {1024: (1024, 0, 2), 1040: (1024, 1, 2)}),
        # a wait in front of the loop, and that of the loop, share a barrier
        ({5: {1024}, 9: {1024, 1032}}, {}, {1024: (1024, 0, 2), 1032: (1024, 1, 2)}),
        # an unrolled loop, whole and by pairs: neighbours of the same warps
        ({5: {1024}, 6: {1032}}, {1024: {0, 1}, 1032: {0, 1}}, {1024: (1024, 0, 2), 1032: (1024, 1, 2)}),
        (
            {5: {1024, 1040}, 6: {1032, 1048}},
            {offset: {0} for offset in (1024, 1032, 1040, 1048)},
            {1024: (1024, 0, 4), 1032: (1024, 1, 4), 1040: (1024, 2, 4), 1048: (1024, 3, 4)},
        ),
        # neighbours of other warps: full and empty barriers
        (
            {5: {1024, 1032}, 9: {1040, 1048}},
            {1024: {0}, 1032: {0}, 1040: {1}, 1048: {1}},
            {1024: (1024, 0, 2), 1032: (1024, 1, 2), 1040: (1040, 0, 2), 1048: (1040, 1, 2)},
        ),
    ],
)
def test_which_barriers_are_a_ring(
    waited: dict[int, set[int]], users: dict[int, set[int]], expected: dict[int, tuple[int, int, int]]
) -> None:
    known = {offset: users.get(offset, {0}) for offsets in waited.values() for offset in offsets}
    assert rings(waited, known) == expected
