"""Speed of a whole layer of routed experts, routing data included: ``python -m benchmarks.layers``.

The same as :mod:`benchmarks.moe`, but everybody starts from the router's choice and its scores, and sorts, plans and
counts inside the timed call, as at every step of a training run. It is measured against every way to compute such a
layer that can be imported here:

=================  ===================================================================================================
contender          what it does
=================  ===================================================================================================
``sonic/…``        ``RoutingPlan.from_topk``, then ``sonic.moe_mlp``
``grouped_mm``     and all others of :mod:`benchmarks.rivals`: plain torch as written by hand, and what transformers has
``scattermoe``     ``flatten_sort_count``, then ``parallel_linear`` twice
``torchtitan``     its ``RoutedExperts``: dispatcher, grouped experts, combine; three weights, as it has them
``dense``          yardstick: a dense gated MLP of width K N, which routes nothing
=================  ===================================================================================================

Checks, clock, files and options are those of :mod:`benchmarks.kernels`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sonic
from benchmarks import kernel_rivals, kernels, rivals
from benchmarks.kernel_rivals import Contender, Inputs, Unavailable

__all__ = ["OPS", "RIVALS", "SHAPES", "main", "scattermoe", "sonic_layer", "torchtitan", "why_not_importable"]

# T, D, N, E, K: SonicMoE's 7B and 30B, and Qwen3-Next
SHAPES = {
    "7b": "24576,1536,256,128,8",
    "30b": "32768,4096,512,128,8",
    "qwen3-next": "32768,2048,512,512,10",
}
OPS = ("experts", "experts_fwd_bwd")
_MOST_ZEROS = 5e11


def sonic_layer(op: str, inputs: Inputs, backend: str, insist: bool) -> Contender:
    """The layer on one of sonic's backends, its plan included.

    Raises:
        Unavailable: the op is no whole layer, or the backend says that it cannot serve.
    """
    _demand_layer(op)
    kernel_rivals.sonic_backend(op, inputs, backend, insist)  # says why not
    x_TD, w1_EUD, w2_EDN, scores_TK = inputs.leaves
    expert_TK = inputs.routing.expert_TK.long()  # as torch.topk has them

    def forward() -> Tensor:
        plan = sonic.RoutingPlan.from_topk(expert_TK, inputs.shape.E, backend=backend)
        return sonic.moe_mlp(x_TD, w1_EUD, w2_EDN, scores_TK, plan, backend=backend)

    return kernel_rivals.layer_contender(op, inputs, forward, "backend")


def scattermoe(op: str, inputs: Inputs) -> Contender:
    """ScatterMoE, sorting included.

    Raises:
        Unavailable: as :func:`benchmarks.kernel_rivals.scattermoe`.
    """
    _demand_layer(op)
    kernel_rivals.scattermoe(op, inputs)  # says why not
    package = kernel_rivals.imported("scattermoe")
    x_TD, w1_EUD, w2_EDN, scores_TK = inputs.leaves
    expert_TK = inputs.routing.expert_TK.long()

    def forward() -> Tensor:
        order = package.flatten_sort_count(expert_TK, inputs.shape.E)
        linear = package.parallel_linear
        h_RU = linear(x_TD, w1_EUD.permute(0, 2, 1), inputs.shape.K, *order, grouped_out=True)
        gate_RN, up_RN = h_RU.chunk(2, dim=-1)
        a_RN = torch.nn.functional.silu(gate_RN) * up_RN
        gates_TK = scores_TK.to(inputs.dtype)
        return linear(a_RN, w2_EDN.permute(0, 2, 1), 1, *order, grouped_in=True, gates=gates_TK)

    return kernel_rivals.layer_contender(op, inputs, forward)


def torchtitan(op: str, inputs: Inputs) -> Contender:
    """``RoutedExperts`` of torchtitan, counting included; its gate and up weights are two parameters.

    Raises:
        Unavailable: not installed, another dtype than bfloat16, or widths that grouped_mm excludes.
    """
    _demand_layer(op)
    moe = kernel_rivals.imported("torchtitan.models.common.moe")
    dispatcher = kernel_rivals.imported("torchtitan.models.common.token_dispatcher")
    if inputs.dtype != torch.bfloat16:
        raise Unavailable("computes in bfloat16")
    if (why := rivals.refusal("grouped_mm", inputs.shape.D, inputs.shape.N, inputs.dtype)) is not None:
        raise Unavailable(why)
    shape = inputs.shape
    config = moe.RoutedExperts.Config(
        inner_experts=moe.GroupedExperts.Config(dim=shape.D, hidden_dim=shape.N, num_experts=shape.E),
        token_dispatcher=dispatcher.LocalTokenDispatcher.Config(num_experts=shape.E, top_k=shape.K),
    )
    x_TD, w1_EUD, w2_EDN, scores_TK = inputs.leaves
    with torch.device("meta"):
        layer = config.build()
    experts = layer.inner_experts
    parts = dict(zip(("w1_EFD", "w3_EFD"), w1_EUD.detach().chunk(2, dim=1), strict=True)) | {"w2_EDF": w2_EDN.detach()}
    for name, weight in parts.items():
        setattr(experts, name, torch.nn.Parameter(weight.contiguous()))
    expert_TK = inputs.routing.expert_TK.long()

    def forward() -> Tensor:
        count_E = torch.bincount(expert_TK.view(-1), minlength=shape.E)
        args = (x_TD[None], scores_TK[None], expert_TK[None], count_E)
        return layer(*args)[0]

    leaves = (x_TD, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF, scores_TK)
    contender = kernel_rivals.layer_contender(op, inputs, forward, "rival", leaves)
    if op == "experts":
        return contender

    def named(result: Sequence[Tensor]) -> dict[str, Tensor]:
        out, dx, dgate, dup, dw2, dscores = result
        return {"out": out, "dx": dx, "dw1": torch.cat((dgate, dup), dim=1), "dw2": dw2, "dscores": dscores}

    return Contender(contender.kind, contender.call, named)


def why_not_importable(name: str) -> str | None:
    """Say why a rival cannot be imported, or return None if it can."""
    if name == "hf_grouped_mm":
        return rivals.hf_grouped_mm_missing()
    modules = {"scattermoe": "scattermoe.kernels.ops", "torchtitan": "torchtitan.models.common.moe"}
    try:
        kernel_rivals.imported(modules.get(name, "torch"))
    except Unavailable as error:
        return str(error)
    return None


def _by_hand(name: str, rival: rivals.Rival) -> Callable[[str, Inputs], Contender]:
    """Builder of a rival of :mod:`benchmarks.rivals`."""

    def build(op: str, inputs: Inputs) -> Contender:
        _demand_layer(op)
        why = why_not_importable(name) or rivals.refusal(name, inputs.shape.D, inputs.shape.N, inputs.dtype)
        if why is not None:
            raise Unavailable(why)
        zeros = inputs.shape.E * sum(inputs.tensors[weight].nbytes for weight in ("w1", "w2"))
        if name == "hf_eager" and op == "experts_fwd_bwd" and zeros > _MOST_ZEROS:
            raise Unavailable(f"its backward writes {zeros / 1e12:.1f} TB of zeros, which takes seconds")
        if "grouped_mm" in name and inputs.device.type == "cuda" and inputs.dtype != torch.bfloat16:
            raise Unavailable("grouped_mm is documented for bfloat16 only on a GPU")
        expert_TK = inputs.routing.expert_TK.long()
        return kernel_rivals.layer_contender(op, inputs, lambda: rival(*inputs.leaves, expert_TK))

    return build


RIVALS: dict[str, Callable[..., Contender]] = {
    **{name: _by_hand(name, rival) for name, rival in rivals.RIVALS.items()},
    "scattermoe": scattermoe,
    "torchtitan": torchtitan,
}
"""Everybody but sonic, by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the options are those of :mod:`benchmarks.kernels`, with other defaults for shapes and ops.

    Returns:
        0; 1 if a contender computes something wrong or fails; 3 if one left the GPU unusable.
    """
    given: list[str] = list(sys.argv[1:] if argv is None else argv)
    if "--shapes" not in given and "--quick" not in given:
        given += ["--shapes", *SHAPES.values()]
    if "--ops" not in given:
        given += ["--ops", *OPS]
    options: dict[str, Any] = {"rivals": RIVALS, "backend": sonic_layer, "why_not": why_not_importable}
    return kernels.main(given, name="layers", **options)


def _demand_layer(op: str) -> None:
    if op not in OPS:
        raise Unavailable("is a whole layer of experts, not this op")


if __name__ == "__main__":
    sys.exit(main())
