"""Two of the CuTe-DSL kernels with one synchronisation instruction neutralised at a time: the simulator notices.

One with gathered rows, clusters and both consumers on a tile; one with gathered rows whose consumers take turns and
fetch a tile of their own. Each at two sizes: a short contraction, so that the loader runs a tile ahead, and one that is
longer than the ring. ``MUTATION_TABLES`` names a file to which the tables of all mutants are added.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from sonic.kernels.cute import launch  # noqa: E402
from sonic.kernels.cute.keys import Sizes, forced, rows_key  # noqa: E402
from sonic.simulator import hopper  # noqa: E402
from tests import simulator_mutations as mutants  # noqa: E402
from tests.cute_cases import Case, config, reference, values  # noqa: E402
from tests.test_simulator_mutations import assert_caught  # noqa: E402

ROWS = (130, 0, 190, 70)
WIDTHS = ((136, 136), (328, 136))  # three steps and six; two tiles of columns
UP_PROJ = Case("up_proj", config("up_gated", 128, 256, False, 2), activation="reglu")
DOWN_PROJ_BWD_INPUT = Case("down_proj_bwd_input", config("down_bwd_gated", 64, 128, True), activation="reglu")


def recorded(case: Case, widths: tuple[int, int]) -> mutants.Launch:
    """A launch of one cluster, or of two blocks, on small integers, so that results are exact."""
    given = values(case, ROWS, widths=widths, integers=True)
    num_rows, num_experts, width_u = sum(ROWS), len(ROWS), given.w1.shape[1]
    width_d, width_n = widths
    wanted = list(reference(case, given)[0].values())
    assert given.token is not None
    if case.op == "up_proj":
        left, weight, columns, k = given.x, given.w1, width_u, width_d
        found = [torch.empty(num_rows, width_u), torch.empty(num_rows, width_n)]
        outputs = [tensor.to(case.dtype) for tensor in found]
        tensors: tuple[Tensor | None, ...] = (*outputs, None)
        flags: tuple[str, ...] = ("h",)
    else:
        left, weight, columns, k = given.dout, given.w2, width_n, width_d
        outputs = [torch.empty(num_rows, width).to(case.dtype) for width in (width_u, width_n)]
        parts = torch.empty(-(-width_n // case.config.tile_n), num_rows)
        tensors = (given.h, *outputs, given.scores, parts)
        flags = ("scores",)
        outputs.append(parts)
    with forced({case.kind: case.config}):
        sizes = Sizes(num_rows, num_experts, columns, k, "bfloat16", "simulator")
        names = {"activation": case.activation, "glu_layout": case.glu_layout}
        key = rows_key(case.op, sizes, gathers=True, flags=flags, **names)

    def call() -> None:
        launch._launch_rows(key, left, given.token, weight, given.offset, num_rows, (columns, k), tensors)

    poison(outputs)
    with hopper(num_sms=2, line_info=False):
        call()
    found = [*outputs[:2], *(part.sum(0) for part in outputs[2:])]  # dS comes in parts, one for each tile of columns
    for got, exact in zip(found, wanted, strict=True):
        assert torch.equal(got, exact.to(got.dtype))
    results = [(tensor, tensor.clone()) for tensor in outputs]
    poison(outputs)
    return mutants.record(call, results, num_sms=2, kept=(given, tensors))


def poison(outputs: list[Tensor]) -> None:
    for tensor in outputs:
        tensor.fill_(float("nan"))


CASES = {case.op: case for case in (UP_PROJ, DOWN_PROJ_BWD_INPUT)}
NEEDS_NOT: dict[str, dict[tuple[str, int], str]] = {
    "up_proj": {
        ("mbarrier.init.shared.b64", number): "the barrier of what an epilogue fetches, and this one fetches nothing"
        for number in (8, 9)
    },
    "down_proj_bwd_input": {
        **{
            (
                "cp.async.bulk.wait_group.read",
                number,
            ): "all stores of the last tile were waited for before H was fetched"
            for number in (1, 2)
        },
        **{
            ("bar.sync", number): "two boxes of a tile, each of its own buffer: the barrier of the turn has parted them"
            for number in (2, 4)
        },
        ("cp.async.bulk.commit_group;", 0): "the second commit of the tile takes these stores in too",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_some_mutants(op: str) -> None:
    """One of each kind."""
    assert_caught(f"{op}, some", [recorded(CASES[op], WIDTHS[1])], count=8, needs_not=NEEDS_NOT[op])


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_all_mutants(op: str) -> None:
    assert_caught(op, [recorded(CASES[op], widths) for widths in WIDTHS], needs_not=NEEDS_NOT[op])
