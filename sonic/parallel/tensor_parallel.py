"""Tensor parallelism: matrices split over the ranks of a mesh axis, between an *enter* and a *leave*.

Every rank enters with the same tokens, multiplies with its share of the columns, then with its share of the rows, and
leaves with a partial sum. What happens to that sum is the ``reduce`` of the pair:

====================  ==================================  ==================================  ========================
``reduce``            enter: forward / backward           leave: forward / backward           tokens outside
====================  ==================================  ==================================  ========================
``"sum"``             identity / all-reduce               all-reduce / identity               all, on every rank
``"reduce_scatter"``  all-gather / reduce-scatter         reduce-scatter / all-gather         a part of the sequence
``"none"``            identity / identity                 identity / identity                 the caller reduces both
====================  ==================================  ==================================  ========================

Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053); with a split sequence Korthikanti et al. (arXiv:2205.05198).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sonic.parallel import late_weight_gradient
from sonic.parallel.compilers import outside_compilers
from sonic.parallel.in_flight import InFlight, all_gather, all_reduce, issue, reduce_gradient, reduce_scatter
from sonic.parallel.mesh import Ranks, ranks_of
from sonic.parallel.sharding import Split, shard_parameter
from sonic.shapes import argument_error, check_choice, check_positive

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "REDUCE",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "enter",
    "leave",
    "once",
    "scale_gradient",
]

REDUCE = ("sum", "reduce_scatter", "none")


def enter(x: Tensor, ranks: Ranks, reduce: str, *, dim: int = -2, kind: str = "enter", overlap: str = "full") -> Tensor:
    """What a column-parallel product reads; see the table at the head of this module.

    Args:
        x: (..., S, D), or with ``"reduce_scatter"`` this rank's S / tp of them.
        ranks: the tensor-parallel ranks.
        reduce: one of :data:`REDUCE`.
        dim: the dimension of the sequence.
        kind, overlap: as in :func:`sonic.parallel.in_flight.issue`.

    Raises:
        ValueError: there is no sequence to gather.
    """
    if ranks.size == 1 or reduce == "none":
        return x
    if reduce == "reduce_scatter" and x.ndim < 2:
        raise argument_error("sonic.parallel", "x", tuple(x.shape), "(..., S / tp, D): this rank's part of a sequence")
    return _enter(x, ranks, reduce, dim % x.ndim, kind, overlap)


@outside_compilers  # what is in flight is no value that a compiled graph could hold
def _enter(x: Tensor, ranks: Ranks, reduce: str, dim: int, kind: str, overlap: str) -> Tensor:
    if reduce == "sum":
        return reduce_gradient(x, all_reduce(ranks.group), kind=kind, overlap=overlap)
    gather, scatter = all_gather(ranks.group, dim), reduce_scatter(ranks.group, dim)
    return issue(x, gather, scatter, kind=kind, overlap=overlap).wait()


def leave(
    partial: Tensor, ranks: Ranks, reduce: str, *, dim: int = -2, kind: str = "leave", overlap: str = "full"
) -> InFlight:
    """What a row-parallel product returns, in flight; see the table at the head of this module."""
    if ranks.size == 1 or reduce == "none":
        return InFlight.of(partial, kind)
    if reduce == "sum":
        return issue(partial, all_reduce(ranks.group), all_reduce(None), kind=kind, overlap=overlap)
    dim = dim % partial.ndim
    return issue(partial, reduce_scatter(ranks.group, dim), all_gather(ranks.group, dim), kind=kind, overlap=overlap)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient times ``factor``."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)


def once(bias: Tensor | None, ranks: Ranks) -> Tensor | None:
    """A bias for one partial sum among many: itself on the first rank, zeros on the others.

    Its gradient is that of the sum, on every rank.
    """
    return bias if bias is None or ranks.rank == 0 else _ZerosLike.apply(bias)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


class _ZerosLike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


class _ParallelLinear(nn.Module):
    """What both halves of a pair share."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        tp_mesh: DeviceMesh | None,
        reduce: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = f"sonic.parallel.{type(self).__name__}"
        check_positive(where, in_features=in_features, out_features=out_features)
        check_choice(where, "reduce", reduce, REDUCE)
        self.in_features, self.out_features = in_features, out_features
        self.reduce = reduce
        self.ranks = ranks_of(where, "tp_mesh", tp_mesh)
        whole: Any = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight = whole.weight
        self.register_parameter("bias", whole.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, tp_mesh: DeviceMesh | None, **options: Any) -> Any:
        """Take over the parameters of a whole layer; each rank keeps its part of what it holds.

        Args:
            linear: equal on all ranks.
            tp_mesh: as in the constructor, as are ``options``.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            tp_mesh=tp_mesh,
            device="meta",
            dtype=linear.weight.dtype,
            **options,
        )
        layer.register_parameter("weight", cast("nn.Parameter", linear.weight))
        layer.register_parameter("bias", linear.bias)
        layer._shard()
        return layer

    def _shard(self) -> None:
        raise NotImplementedError

    def _local(self, parameter: nn.Parameter | None) -> Any:
        """This rank's part; without a look at the type, which a compiler takes for that of any parameter."""
        return parameter if parameter is None or self.ranks.mesh is None else cast("DTensor", parameter).to_local()

    def extra_repr(self) -> str:
        """Sizes of the whole layer, and among how many ranks it is split."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, reduce={self.reduce!r}, tp={self.ranks.size}"


class ColumnParallelLinear(_ParallelLinear):
    """The first half of a pair: each rank has ``out_features / tp`` of the outputs, and returns those.

    Parameters: ``weight`` (out, in) and ``bias`` (out,), DTensors of the whole shape with a local part of ``out / tp``
    rows; keys and shapes are those of ``nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        tp_mesh: DeviceMesh | None,
        reduce: str = "sum",
        num_blocks: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            in_features: width of the tokens.
            out_features: outputs of all ranks together.
            bias: with a bias.
            tp_mesh: one-dimensional; None: not split.
            reduce: what the pair does with its partial sums, the same in both halves.
            num_blocks: matrices that stand one below the other in ``weight``, each of which is split: 2 for gate and
                up, 3 for Q, K and V of equal width.
            device, dtype: of the parameters.

        Raises:
            ValueError: sizes that do not divide, or names that are none.
        """
        super().__init__(
            in_features, out_features, bias=bias, tp_mesh=tp_mesh, reduce=reduce, device=device, dtype=dtype
        )
        check_positive("sonic.parallel.ColumnParallelLinear", num_blocks=num_blocks)
        self.num_blocks = num_blocks
        if out_features % (num_blocks * self.ranks.size):
            wanted = f"a multiple of num_blocks * tp = {num_blocks * self.ranks.size}"
            raise argument_error("sonic.parallel.ColumnParallelLinear", "out_features", out_features, wanted)
        if self.weight.device.type != "meta":
            self._shard()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out / tp); under ``"reduce_scatter"`` x is (..., S / tp, in), the result has all S."""
        x = enter(x, self.ranks, self.reduce, kind="column")
        # the input's gradient first, so that its sum over the ranks travels while the weight's is computed
        return late_weight_gradient.linear(x, self._local(self.weight), self._local(self.bias))

    def _shard(self) -> None:
        split = Split(0, self.num_blocks)
        for name in ("weight", "bias"):
            shard_parameter(self, name, tp_mesh=self.ranks.mesh, tp=split)


class RowParallelLinear(_ParallelLinear):
    """The second half of a pair: each rank has ``in_features / tp`` of the inputs, and a partial sum.

    Parameters: ``weight`` (out, in), whose local part has ``in / tp`` columns, and ``bias`` (out,), whole on every
    rank; it is added once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        tp_mesh: DeviceMesh | None,
        reduce: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            in_features: inputs of all ranks together.
            out_features: width of the result.
            bias: with a bias.
            tp_mesh: one-dimensional; None: not split.
            reduce: what becomes of the partial sum.
            device, dtype: of the parameters.

        Raises:
            ValueError: sizes that do not divide, or names that are none.
        """
        super().__init__(
            in_features, out_features, bias=bias, tp_mesh=tp_mesh, reduce=reduce, device=device, dtype=dtype
        )
        if in_features % self.ranks.size:
            wanted = f"a multiple of tp = {self.ranks.size}"
            raise argument_error("sonic.parallel.RowParallelLinear", "in_features", in_features, wanted)
        if self.weight.device.type != "meta":
            self._shard()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in / tp) -> (..., out): the sum, this rank's part of the sequence of it, or a partial sum."""
        partial = F.linear(x, self._local(self.weight), once(self._local(self.bias), self.ranks))
        return partial if self.reduce == "none" else self._reduced(partial)

    @outside_compilers
    def _reduced(self, partial: Tensor) -> Tensor:
        return leave(partial, self.ranks, self.reduce, kind="row").wait()

    def _shard(self) -> None:
        shard_parameter(self, "weight", tp_mesh=self.ranks.mesh, tp=Split(1))
        shard_parameter(self, "bias", tp_mesh=self.ranks.mesh, tp=None)
