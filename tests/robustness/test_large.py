"""More than 2**31 elements: addresses have 64 bits, counts of rows have 32 and are refused beyond.

Large tensors are views that repeat one row, or files with holes: nothing that large is in memory. What Triton's kernels
compute as an address is held by ``test_triton_compile.py`` (``narrow_addresses``), what is refused at 2**31 rows by
``test_bad_input.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sonic
from sonic.kernels import ops
from tests.helpers import assert_close, formula

KIND = ("swiglu", "concatenated")
BILLIONS = 2**31
needs_holes = pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes and a system that maps them")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def sparse(path: Path, rows: int, width: int, held: dict[int, Tensor]) -> Tensor:
    """A float32 matrix in a file, zero where nothing was written: its holes take no space."""
    with open(path, "wb") as file:
        file.truncate(rows * width * 4)
        for row, values in held.items():
            file.seek(row * width * 4)
            file.write(values.numpy().tobytes())
    matrix = torch.from_file(str(path), shared=False, size=rows * width, dtype=torch.float32).view(rows, width)
    assert matrix.numel() > BILLIONS and os.stat(path).st_blocks * 512 < 2**24, "the file has no holes"
    return matrix


@needs_holes
class TestFilesWithHoles:
    """Rows on both sides of element 2**31 and 2**32: a 32-bit address would find another one, or zeros."""

    WIDTH = 4096
    FAR = (3, BILLIONS // WIDTH - 1, BILLIONS // WIDTH, BILLIONS // WIDTH + 7, 2 * BILLIONS // WIDTH + 5)

    @pytest.fixture
    def tall(self, tmp_path: Path) -> tuple[Tensor, Tensor]:
        rows = torch.randn(len(self.FAR), self.WIDTH)
        held = dict(zip(self.FAR, rows, strict=True))
        return sparse(tmp_path / "tall", 2 * BILLIONS // self.WIDTH + 8, self.WIDTH, held), rows

    def test_gather(self, tall: tuple[Tensor, Tensor]) -> None:
        matrix, rows = tall
        w1 = torch.randn(2, 6, self.WIDTH) / 64
        h, a = ops.up_proj(matrix, w1, None, int32(*self.FAR), int32(0, 2, 5), *KIND)
        want = torch.cat((rows[:2] @ w1[0].t(), rows[2:] @ w1[1].t()))
        assert_close("h", h, want, 1e-5)
        assert_close("a", a, formula(*KIND, want), 1e-5)
        small = torch.randn(5, 6)
        dw, db = ops.up_proj_bwd_weight(small, matrix, int32(*self.FAR), int32(0, 2, 5), True, True)
        assert_close("dw", dw, torch.stack((small[:2].t() @ rows[:2], small[2:].t() @ rows[2:])), 1e-5)
        assert_close("db", db, torch.stack((small[:2].sum(0), small[2:].sum(0))), 1e-5)

    def test_combine(self, tall: tuple[Tensor, Tensor]) -> None:
        matrix, rows = tall
        # as many entries as rows are wanted; those of token 0 and 1 are the far ones, the others belong to nobody
        by_token = torch.zeros(matrix.shape[0], dtype=torch.int32)
        by_token[: len(self.FAR)] = int32(*self.FAR)
        out = ops.combine(matrix, None, by_token, int32(0, 2, 5))
        assert_close("out", out, torch.stack((rows[:2].sum(0), rows[2:].sum(0))), 1e-5)

    def test_weights_of_many_experts(self, tmp_path: Path) -> None:
        experts, up, width = 3 * 2**10, 2**10, 2**10
        far = experts - 2
        held = {far * up + row: torch.randn(width) for row in range(up)}
        w1 = sparse(tmp_path / "w1", experts * up, width, held).view(experts, up, width)
        offset = torch.zeros(experts + 1, dtype=torch.int32)
        offset[far + 1 :] = 3
        x = torch.randn(3, width)
        h, _ = ops.up_proj(x, w1, None, None, offset, *KIND)
        assert_close("h", h, x @ torch.stack(list(held.values())).t(), 1e-5)
        assert h.any()


class TestViews:
    def test_tokens_that_repeat_one(self) -> None:
        one, width = torch.randn(1, 2**12), 2**12
        x = one.expand(2**20, width)
        assert x.numel() > BILLIONS
        w1 = torch.randn(1, 4, width) / 64
        last = 2**20 - 1
        h, _ = ops.up_proj(x, w1, None, int32(0, 2**19, last), int32(0, 3), *KIND)
        assert_close("h", h, (one @ w1[0].t()).expand(3, 4), 1e-5)

    def test_experts_that_are_all_the_same(self) -> None:
        w1, w2 = torch.randn(1, 512, 256), torch.randn(1, 256, 256)
        E, D = 2**15, 256
        wide1, wide2 = w1.expand(E, 512, D), w2.expand(E, D, 256)
        assert wide1.numel() > BILLIONS and wide2.numel() >= BILLIONS
        offset = torch.zeros(E + 1, dtype=torch.int32)
        offset[E // 2 :] = 2
        offset[E:] = 4
        x = torch.randn(4, D)
        args: tuple[Any, ...] = (None, None, None, offset, None, None, None, *KIND)
        out, h = ops.experts(x, wide1, wide2, *args)
        want_h = x @ w1[0].t()
        assert_close("h", h, want_h, 1e-5)
        assert_close("out", out, formula(*KIND, want_h) @ w2[0].t(), 1e-5)
        dx, *_ = ops.experts_bwd(
            torch.ones_like(x), x, h, wide1, wide2, None, None, None, offset, None, *KIND, True, False, False,
            False, False, False,
        )  # fmt: skip
        assert dx.shape == x.shape and bool(torch.isfinite(dx).all()) and dx.any()


class TestShapes:
    """On the meta device, where a size that had wrapped around would show."""

    ROWS, WIDTH = 2**24 + 1, 2**10

    def meta(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def test_every_op_on_rows(self) -> None:
        R, D, N, E = self.ROWS, self.WIDTH, 2**9, 2**12
        x, w1, w2 = self.meta(R, D), self.meta(E, 2 * N, D), self.meta(E, D, N)
        assert min(x.numel(), w1.numel(), R * 2 * N, w2.numel() * 2) > BILLIONS
        index, offset = self.meta(R, dtype=torch.int32), self.meta(E + 1, dtype=torch.int32)
        h, a = ops.up_proj(x, w1, None, index, offset, *KIND)
        assert h.shape == (R, 2 * N) and a.shape == (R, N)
        y = ops.down_proj(a, w2, None, None, offset)
        assert y.shape == (R, D) and y.numel() > BILLIONS
        assert ops.combine(y, None, index, self.meta(R + 1, dtype=torch.int32)).shape == (R, D)
        dh, scaled_a, _ = ops.down_proj_bwd_input(x, h, w2, None, None, index, offset, *KIND)
        assert dh.shape == (R, 2 * N)
        assert ops.up_proj_bwd_input(dh, w1, offset).shape == (R, D)
        assert ops.up_proj_bwd_weight(dh, x, index, offset)[0].shape == (E, 2 * N, D)
        assert ops.down_proj_bwd_weight(x, scaled_a, None, index, offset)[0].shape == (E, D, N)

    def test_a_layer_on_a_whole_cluster_of_tokens(self) -> None:
        layer = sonic.MoE(self.WIDTH, 256, 256, 8, device="meta", dtype=torch.bfloat16)
        x = self.meta(64, 2**17, self.WIDTH).requires_grad_()
        assert x.numel() > BILLIONS and x.shape[0] * x.shape[1] * 8 * 512 > BILLIONS
        y, routing = layer(x, return_routing=True)
        assert y.shape == x.shape and routing.plan.num_rows == 64 * 2**17 * 8 < BILLIONS
        y.backward(torch.empty_like(y))
        assert x.grad is not None and x.grad.shape == x.shape and layer.w1.grad is not None

    def test_one_token_more_than_rows_are_counted(self) -> None:
        layer = sonic.MoE(8, 4, 256, 8, device="meta")
        with pytest.raises(ValueError, match="expected a first dimension below 2"):
            layer(self.meta(2**28, 8, dtype=torch.float32))
        assert layer(self.meta(2**28 - 1, 8, dtype=torch.float32)).shape == (2**28 - 1, 8)


def available_gib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or available_gib() < 12, reason="needs 12 GiB of free memory")
def test_preactivations_of_more_than_two_billion_elements() -> None:
    """All of H is written and read: rows at its very end, forward and backward, are those of a small problem."""
    R, U, D = 2**20 + 3, 2**11, 4
    x = torch.randn(R, D).bfloat16()
    w1, w2 = torch.randn(2, U, D).bfloat16(), (torch.randn(2, D, U // 2) / 32).bfloat16()
    counts = torch.tensor([R - 1000, 1000])
    offset = int32(0, R - 1000, R)
    assert R * U > BILLIONS
    out, h = ops.experts(x, w1, w2, None, None, None, offset, None, None, None, *KIND)
    ends, few = slice(R - 40, R), int32(0, 0, 40)
    want_out, want_h = ops.experts(x[ends], w1, w2, None, None, None, few, None, None, None, *KIND)
    assert torch.equal(h[ends], want_h) and torch.equal(
        h[:9], ops.up_proj(x[:9], w1, None, None, int32(0, 9, 9), *KIND)[0]
    )
    assert_close("out", out[ends], want_out, 2e-2)
    dx, *_ = ops.experts_bwd(
        x, x, h, w1, w2, None, None, None, offset, None, *KIND, True, False, False, False, False, False
    )
    want_dx, *_ = ops.experts_bwd(
        x[ends], x[ends], want_h, w1, w2, None, None, None, few, None, *KIND, True, False, False, False, False, False
    )
    assert_close("dx", dx[ends], want_dx, 2e-2)
    assert int(counts.sum()) == R
