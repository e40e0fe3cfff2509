"""The simulator's own test: kernels with one synchronisation instruction neutralised must be noticed.

The kernels are the project's tutorial kernel and two of quack's GEMMs. Quack's are run at sizes of which each makes
some wait necessary that goes without saying at the other: a short K, so that the loader runs a whole tile ahead, and a
long one, so that it waits for slots within a tile. ``MUTATION_TABLES`` names a file to which all tables are added.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from sonic.simulator import hopper, tensors  # noqa: E402
from sonic.simulator.options import Options  # noqa: E402
from tests import simulator_mutations as mutants  # noqa: E402

needs_quack = pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="needs quack-kernels")

LEAST_SCORE = 0.95  # of the mutants that can change a result in the simulated machine
LEAST_SCORE_ANYWHERE = 0.9  # of those that can on a GPU
NUM_SEEDS = 50


# ---------------------------------------------------------------- the kernels


def tutorial(m: int = 128, n: int = 128, k: int = 512) -> mutants.Launch:
    from examples import simulate_kernel

    a, b, c, product = simulate_kernel.integers(m, n, k)
    compiled = simulate_kernel.compile_gemm()
    arguments = simulate_kernel.device_tensors(a, b, c)
    return mutants.record(lambda: compiled(*arguments), [(c, product)], kept=(a, b))


@pytest.fixture(scope="module")
def quack() -> Iterator[Callable[..., mutants.Launch]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUACK_ARCH", "90")
        patch.setenv("QUACK_CACHE_ENABLED", "0")
        yield quack_launch


def quack_launch(rows: tuple[int, ...] | None, k: int) -> mutants.Launch:
    """A GEMM of quack with a cluster of two blocks, persistent, with four output tiles or more for each block.

    Args:
        rows: of each expert, gathered; None for a dense GEMM.
        k: length of the sums.
    """
    import quack.gemm as gemm

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape).bfloat16()

    if rows is None:
        a, b = integers(1, 512, k), integers(1, 512, k)
        expected = a.float() @ b.float().mT
        options = {}
    else:
        starts_E = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
        a, b = integers(200, k), integers(len(rows), 512, k)
        index = torch.randint(0, len(a), (sum(rows),), dtype=torch.int32)
        pieces = zip(a[index.long()].float().split(rows), b.float(), strict=True)
        expected = torch.cat([piece @ weight.T for piece, weight in pieces])
        options = {"cu_seqlens_m": starts_E, "A_idx": index}
    found = torch.full(expected.shape, float("nan"), dtype=torch.bfloat16)
    for name, memory in {"A": a, "B": b, "D": found, **options}.items():
        tensors.register(memory, name)

    def call() -> None:
        gemm.gemm(a, b, found, None, None, 128, 256, 2, 1, pingpong=False, persistent=True, **options)

    # two multiprocessors: one cluster does all the work
    return mutants.record(call, [(found, expected.bfloat16())], num_sms=2, kept=(a, b, options))


TUTORIAL_NEEDS_NOT = {
    ("wgmma.wait_group.sync.aligned", 1): "the wait at the end of each turn of the loop has left nothing in flight"
}

QUACK_NEEDS_NOT = {
    ("wgmma.fence.sync.aligned;", 0): "it stands in the loop, where nothing but products of one shape use the registers"
}


def assert_caught(
    title: str,
    launches: Iterable[mutants.Launch],
    least: float = LEAST_SCORE,
    *,
    count: int | None = None,
    needs_not: mutants.Known | None = None,
) -> None:
    """Judge all mutants of a kernel, or some; prints the table.

    Args:
        title: of the table.
        launches: of one kernel, at several sizes.
        least: share of the mutants that can change a result that have to be caught.
        count: how many; None for all.
        needs_not: instructions that the kernel does not need.
    """
    known = [(launch, mutants.normal(launch)) for launch in launches]
    first = known[0][0]
    assert all(launch.ptx == first.ptx for launch, _ in known)
    found = mutants.mutations(first.ptx)
    verdicts = [mutants.judge(known, mutation) for mutation in (mutants.sample(found, count) if count else found)]
    text = f"{title}\n{mutants.table(verdicts, needs_not)}\n\n"
    print(f"\n{text}")
    path = os.environ.get("MUTATION_TABLES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    caught, here, anywhere = mutants.score(verdicts, needs_not)
    assert caught >= least * here, f"{caught} of {here} are caught"
    assert caught >= LEAST_SCORE_ANYWHERE * anywhere, f"{caught} of {anywhere} are caught"


# ---------------------------------------------------------------- mutations themselves

PTX = """
	elect.sync 	%r44|%p4, -1;
	mbarrier.init.shared.b64 	[%r1], %r45;
	mbarrier.arrive.expect_tx.shared.b64 %rd47, [%r20], %r506;
	@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r16], %r552;
	mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p88, [%r501+32], %r620;
	{
	LAB_WAIT:
	mbarrier.try_wait.parity.shared.b64 P1, [%r504], %r620, 10000000;
	@P1 bra.uni DONE;
	bra.uni     LAB_WAIT;
	DONE:
	}
	bar.sync 	1, 256;
	setmaxnreg.dec.sync.aligned.u32 40;
	cp.async.bulk.wait_group.read 	3;
	cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd31, {%r29, %r28}], [%r1+1024];
	fence.proxy.async.shared::cta;
	// fence.proxy.async in a comment;
	wgmma.commit_group.sync.aligned;
"""


def test_mutations_of_a_text() -> None:
    found = [(mutation.line, mutation.kind, mutation.instead) for mutation in mutants.mutations(PTX)]
    assert found == [
        (2, "elect", "mov.b32 %r44, 0; setp.eq.b32 %p4, 0, 0;"),
        (3, "init", ""),
        (4, "arrive", ""),
        (4, "bytes", "mbarrier.arrive.shared.b64 %rd47, [%r20];"),
        (5, "arrive", ""),
        (6, "peek", "setp.eq.b32 %p88, 0, 0;"),
        (9, "wait", "setp.eq.b32 P1, 0, 0;"),
        (14, "barrier", ""),
        (16, "group", ""),
        (18, "fence", ""),
        (20, "group", ""),
    ]


def test_a_mutation_changes_one_line() -> None:
    lines = PTX.splitlines()
    for mutation in mutants.mutations(PTX):
        changed = mutation.ptx.splitlines()
        assert len(changed) == len(lines)
        differing = [n for n, (old, new) in enumerate(zip(lines, changed, strict=True), 1) if old != new]
        assert differing == [mutation.line]


def test_sample_holds_every_kind() -> None:
    found = mutants.mutations(PTX)
    kinds = {mutation.kind for mutation in found}
    assert {mutation.kind for mutation in mutants.sample(found, len(kinds))} == kinds
    assert len(mutants.sample(found, 100)) == len(found)


# ---------------------------------------------------------------- what is noticed


def test_some_mutants_of_the_tutorial_kernel() -> None:
    assert_caught("tutorial kernel, some", [tutorial()], 1.0, count=12, needs_not=TUTORIAL_NEEDS_NOT)


@pytest.mark.slow
def test_all_mutants_of_the_tutorial_kernel() -> None:
    assert_caught("tutorial kernel", [tutorial(), tutorial(k=128)], needs_not=TUTORIAL_NEEDS_NOT)


@needs_quack
@pytest.mark.slow
def test_all_mutants_of_a_dense_gemm(quack: Callable[..., mutants.Launch]) -> None:
    assert_caught("dense GEMM", [quack(None, 320), quack(None, 192)], needs_not=QUACK_NEEDS_NOT)


@needs_quack
@pytest.mark.slow
def test_all_mutants_of_a_gather_gemm(quack: Callable[..., mutants.Launch]) -> None:
    rows = (130, 0, 190, 80)
    assert_caught("gather GEMM", [quack(rows, 320), quack(rows, 192)], needs_not=QUACK_NEEDS_NOT)


def test_the_tutorial_kernel_raises_no_alarm() -> None:
    launch = tutorial()
    for seed in range(NUM_SEEDS):
        trace = launch.run(Options("random", seed))
        assert launch.is_right() and not trace.warnings


def test_a_repeated_launch_is_the_launch() -> None:
    from examples import simulate_kernel

    a, b, c, product = simulate_kernel.integers(64, 128, 128)
    compiled = simulate_kernel.compile_gemm()
    arguments = simulate_kernel.device_tensors(a, b, c)
    launch = mutants.record(lambda: compiled(*arguments), [(c, product)], kept=(a, b))
    assert not launch.is_right(), "recording does not run the kernel"
    again = launch.run(Options())
    assert launch.is_right()
    with hopper() as sim:
        compiled(*arguments)
    assert sim.traces[0].bytes_by_tensor() == again.bytes_by_tensor()
