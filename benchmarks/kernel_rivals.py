"""Who competes in :mod:`benchmarks.kernels`, op by op: sonic's backends, other libraries, and yardsticks.

A contender is built from the inputs of one op and holds the call that is timed. All get the same routing, prepared
outside the timed call in the form that each wants (a plan, sorted indices, offsets); ``build_plan`` is an op of its
own. Gathers, activations and sums that a library leaves to its user are inside the call.

===================  =================================================================================================
contender            what it does
===================  =================================================================================================
``sonic/<backend>``  the op itself, or ``sonic.moe_mlp``, with ``backend="<backend>"``
``torch``            gathers rows, calls ``torch.nn.functional.grouped_mm``, then runs the activation in plain torch;
                     sums with ``embedding_bag`` or ``index_add``; ``torch.topk`` and softmax; a plan by ``torch.sort``
``scattermoe``       ScatterMoE 0.3: ``scatter2scatter``, ``group`` and ``group_bwd_W``; ``parallel_linear`` twice for
                     the whole experts. Activations in plain torch, as in its own ``GLUMLP``
``quack``            QuACK: ``gemm``, ``gemm_gated``, ``gemm_dgated`` with ``cu_seqlens_m`` or ``_k`` and ``A_idx``,
                     ``topk``. Gate and up are interleaved for it beforehand
``dense``            yardstick: one matrix product of as many FLOP on contiguous rows, as if all went to one expert, and
                     nothing else; for the experts a dense gated MLP of width K N; for ``combine`` a contiguous sum
``dense batched``    yardstick: ``torch.bmm``, every expert with equally many contiguous rows, and nothing else
===================  =================================================================================================

Yardsticks compute something else than the op, so they are not checked.

Sources: signatures as in ScatterMoE (github.com/shawntan/scattermoe, 0.3.0) and QuACK (github.com/Dao-AILab/quack,
0.6.4); both Apache-2.0.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sonic
from benchmarks import rivals
from benchmarks.cpu_moe import Shape
from sonic.kernels import ops

__all__ = [
    "OPERANDS",
    "RESULTS",
    "RIVALS",
    "YARDSTICKS",
    "Contender",
    "Inputs",
    "Routing",
    "Unavailable",
    "dense",
    "dense_batched",
    "grouped_mm_function",
    "imported",
    "layer_contender",
    "why_not_importable",
    "make_inputs",
    "make_routing",
    "quack",
    "scattermoe",
    "size_in_bytes",
    "size_of",
    "sonic_backend",
    "torch_ops",
]

ACTIVATION, GLU_LAYOUT = "swiglu", "concatenated"

# Dimensions of every operand and result by their letters; "e" is E + 1 and "t" T + 1.
_DIMS = {
    **{"x": "TD", "dout": "TD", "out": "TD", "w1": "EUD", "dw1": "EUD", "w2": "EDN", "dw2": "EDN", "y": "RD"},
    **{"dx_rows": "RD", "h": "RU", "dh": "RU", "a": "RN", "scaled_a": "RN", "row_dscores": "R", "logits": "TE"},
    **{
        "scores": "TK",
        "dscores": "TK",
        "experts": "TK",
        "token_of_row": "R",
        "slot_of_row": "R",
        "row_by_token": "R",
        "dx": "TD",
    },
    **{"expert_offset": "e", "token_offset": "t"},
}
OPERANDS: dict[str, tuple[str, ...]] = {
    "up_proj": ("x", "w1"),
    "down_proj": ("a", "w2"),
    "combine": ("y",),
    "down_proj_bwd_input": ("dout", "h", "w2"),
    "down_proj_bwd_weight": ("dout", "scaled_a"),
    "up_proj_bwd_input": ("dh", "w1"),
    "up_proj_bwd_weight": ("dh", "x"),
    "topk_softmax": ("logits",),
    "build_plan": (),
    "experts": ("x", "w1", "w2"),
    "experts_fwd_bwd": ("x", "w1", "w2", "dout"),
}
"""Random operands of every op that is measured, beside the routing."""
RESULTS: dict[str, tuple[str, ...]] = {
    "up_proj": ("h", "a"),
    "down_proj": ("y",),
    "combine": ("out",),
    "down_proj_bwd_input": ("dh", "scaled_a", "row_dscores"),
    "down_proj_bwd_weight": ("dw2",),
    "up_proj_bwd_input": ("dx_rows",),
    "up_proj_bwd_weight": ("dw1",),
    "topk_softmax": ("scores", "experts"),
    "build_plan": ("expert_offset", "token_of_row", "slot_of_row", "row_by_token", "token_offset"),
    "experts": ("out",),
    "experts_fwd_bwd": ("out", "dx", "dw1", "dw2", "dscores"),
}
"""What every op returns, and every contender that is checked."""
# The matrix product of an op: rows, contraction and columns of the result.
_PRODUCTS = {
    "up_proj": "RDU",
    "down_proj": "RND",
    "down_proj_bwd_input": "RDN",
    "down_proj_bwd_weight": "DRN",
    "up_proj_bwd_input": "RUD",
    "up_proj_bwd_weight": "URD",
}
_INT32_MAX = 2**31 - 1


class Unavailable(Exception):
    """A contender cannot serve an op, a shape or a dtype; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    Attributes:
        kind: ``"backend"``, ``"rival"`` or ``"yardstick"``.
        call: what is timed; takes nothing, returns whatever it computes.
        named: turns what ``call`` returns into tensors by the names in :data:`RESULTS`; None: it is not checked.
    """

    kind: str
    call: Callable[[], Any]
    named: Callable[[Any], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Routing:
    """Who goes where, in every form that a contender wants; all on the device but ``counts``.

    Attributes:
        expert_TK: int32, chosen experts.
        scores_TK: float32, each token's sum to 1.
        plan: sonic's, made by the reference.
        counts: rows of each expert, on the host.
        token_R, slot_R, expert_R: int64, of each row; a slot is token * K + k.
        row_TK: int64, row of each slot.
        end_E: int32, where each expert's rows end.
        row_scores_R: float32, scores in the order of the rows.
    """

    expert_TK: Tensor
    scores_TK: Tensor
    plan: sonic.RoutingPlan
    counts: tuple[int, ...]
    token_R: Tensor
    slot_R: Tensor
    expert_R: Tensor
    row_TK: Tensor
    end_E: Tensor
    row_scores_R: Tensor


@dataclass(frozen=True)
class Inputs:
    """Operands of one op, of unit scale: ``tensors`` by the names in :data:`OPERANDS`; ``scores_TK`` is float32.

    For the two ``experts`` ops, X, both weights and the scores ask for gradients.
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    routing: Routing
    tensors: Mapping[str, Tensor]
    scores_TK: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """X, W1, W2 and the scores, which receive gradients in the ``experts`` ops."""
        return (*(self.tensors[name] for name in ("x", "w1", "w2")), self.scores_TK)


def make_routing(shape: Shape, device: torch.device, skew: float = 0.0, seed: int = 0) -> Routing:
    """Send each token to K distinct experts at random; the same on every device.

    Args:
        shape: sizes.
        device: where the index arrays go.
        skew: sigma of the experts' log-normal popularity; 0: all equally likely.
        seed: of the choice.
    """
    rng = torch.Generator().manual_seed(seed)
    popularity_E = skew * torch.randn(shape.E, generator=rng)
    # Adding Gumbel noise and taking the K largest draws K without replacement, in proportion to the popularity.
    noise_TE = torch.empty(shape.T, shape.E).exponential_(generator=rng).log_().neg_()
    expert_TK = (noise_TE + popularity_E).topk(shape.K, dim=-1).indices.to(torch.int32)
    scores_TK = torch.randn(shape.T, shape.K, generator=rng).softmax(dim=-1).to(device)
    plan = sonic.RoutingPlan.from_topk(expert_TK, shape.E, backend="reference")
    count_E = plan.tokens_per_expert().long()
    slot_R = plan.slot_of_row_R.long()
    row_P = torch.empty_like(slot_R)
    row_P[slot_R] = torch.arange(slot_R.numel())
    names = ("expert_offset_E1", "token_of_row_R", "slot_of_row_R", "row_by_token_R", "token_offset_T1")
    arrays = (getattr(plan, name).to(device) for name in names)
    slot_R = slot_R.to(device)
    return Routing(
        expert_TK.to(device),
        scores_TK,
        sonic.RoutingPlan(shape.T, shape.E, (shape.T, shape.K), *arrays),
        tuple(count_E.tolist()),
        plan.token_of_row_R.long().to(device),
        slot_R,
        torch.arange(shape.E).repeat_interleave(count_E).to(device),
        row_P.view(shape.T, shape.K).to(device),
        plan.expert_offset_E1[1:].to(device),
        scores_TK.reshape(-1).index_select(0, slot_R),
    )


def make_inputs(
    op: str, shape: Shape, dtype: torch.dtype, device: torch.device, routing: Routing, seed: int = 0
) -> Inputs:
    """Draw the operands of ``op``: normal with variance 1, weights divided by the root of what they sum over.

    Logits are float32, as routers make them; everything else is in ``dtype``.
    """
    rng = torch.Generator(device=device).manual_seed(seed)
    tensors = {}
    for name in OPERANDS[op]:
        size = size_of(name, shape)
        value = torch.randn(size, generator=rng, dtype=torch.float32 if name == "logits" else dtype, device=device)
        tensors[name] = value.mul_(size[-1] ** -0.5) if name in ("w1", "w2") else value
    scores_TK = routing.scores_TK.detach().clone()
    if op.startswith("experts"):
        for leaf in (tensors["x"], tensors["w1"], tensors["w2"], scores_TK):
            leaf.requires_grad_()
    return Inputs(op, shape, dtype, device, routing, tensors, scores_TK)


def size_in_bytes(op: str, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of all operands and results of ``op``: the least that a device must have for it."""
    total = 0
    for name in (*OPERANDS[op], *RESULTS[op]):
        count = 1
        for size in size_of(name, shape):
            count *= size
        total += count * (dtype.itemsize if _DIMS[name][-1] in "DNU" else 4)
    return total


def sonic_backend(op: str, inputs: Inputs, backend: str, insist: bool) -> Contender:
    """The op on one of sonic's backends.

    Args:
        op: a key of :data:`OPERANDS`.
        inputs: from :func:`make_inputs`.
        backend: its name.
        insist: it was asked for by name: some backends serve some devices only then.

    Raises:
        Unavailable: the backend says that it cannot serve.
    """
    shape, plan, t = inputs.shape, inputs.routing.plan, inputs.tensors
    for asked in ("experts", "experts_bwd") if op == "experts_fwd_bwd" else (op,):
        answer = sonic.kernels.explain(
            asked,
            num_tokens=shape.T,
            num_experts=shape.E,
            top_k=shape.K,
            hidden_size=shape.D,
            intermediate_size=shape.N,
            dtype=inputs.dtype,
            device=inputs.device,
            activation=ACTIVATION,
            backend=backend if insist else None,
        )
        if answer.reasons[backend]:
            raise Unavailable("; ".join(answer.reasons[backend]))
    token_R, offset_E1, score_R = plan.token_of_row_R, plan.expert_offset_E1, inputs.routing.row_scores_R
    named: dict[str, Any] = {"activation": ACTIVATION, "glu_layout": GLU_LAYOUT, "backend": backend}
    by: dict[str, Any] = {"backend": backend}
    calls: dict[str, Callable[[], Any]] = {
        "up_proj": lambda: ops.up_proj(t["x"], t["w1"], None, token_R, offset_E1, **named),
        "down_proj": lambda: (ops.down_proj(t["a"], t["w2"], None, None, offset_E1, **by),),
        "combine": lambda: (ops.combine(t["y"], score_R, plan.row_by_token_R, plan.token_offset_T1, **by),),
        "down_proj_bwd_input": lambda: ops.down_proj_bwd_input(
            t["dout"], t["h"], t["w2"], None, score_R, token_R, offset_E1, **named
        ),
        "down_proj_bwd_weight": lambda: ops.down_proj_bwd_weight(
            t["dout"], t["scaled_a"], score_R, token_R, offset_E1, **by
        )[:1],
        "up_proj_bwd_input": lambda: (ops.up_proj_bwd_input(t["dh"], t["w1"], offset_E1, **by),),
        "up_proj_bwd_weight": lambda: ops.up_proj_bwd_weight(t["dh"], t["x"], token_R, offset_E1, **by)[:1],
        "topk_softmax": lambda: ops.topk_softmax(t["logits"], shape.K, **by)[:2],
        "build_plan": lambda: ops.build_plan(inputs.routing.expert_TK.view(-1), None, shape.T, shape.E, **by),
    }

    def forward() -> Tensor:
        x_TD, w1_EUD, w2_EDN, scores_TK = inputs.leaves
        return sonic.moe_mlp(x_TD, w1_EUD, w2_EDN, scores_TK, plan, backend=backend)

    call = _whole(op, inputs, forward) if op.startswith("experts") else calls[op]
    return Contender("backend", call, _names(op))


def torch_ops(op: str, inputs: Inputs) -> Contender:
    """The op in plain torch, its matrix products by ``grouped_mm``.

    Raises:
        Unavailable: this torch has no ``grouped_mm``, or its documentation excludes the widths or the dtype.
    """
    routing, t, shape = inputs.routing, inputs.tensors, inputs.shape
    end_E, token_R = routing.end_E, routing.token_R
    if op == "combine":
        score_TK = inputs.scores_TK.to(inputs.dtype)
        return Contender(
            "rival",
            lambda: (F.embedding_bag(routing.row_TK, t["y"], mode="sum", per_sample_weights=score_TK),),
            _names(op),
        )
    if op == "topk_softmax":

        def choose() -> tuple[Tensor, Tensor]:
            top_TK, expert_TK = t["logits"].topk(shape.K, dim=-1)
            return top_TK.softmax(dim=-1), expert_TK

        return Contender("rival", choose, _names(op))
    if op == "build_plan":
        return Contender("rival", lambda: _sorted_plan(routing.expert_TK, shape.E), _names(op))
    why = rivals.refusal("grouped_mm", shape.D, shape.N, inputs.dtype)
    if why is not None:
        raise Unavailable(why)
    if inputs.device.type == "cuda" and inputs.dtype != torch.bfloat16:
        raise Unavailable("grouped_mm is documented for bfloat16 only on a GPU")
    grouped_mm, _ = grouped_mm_function()

    def up() -> tuple[Tensor, Tensor]:
        h_RU = grouped_mm(t["x"].index_select(0, token_R), t["w1"].transpose(-2, -1), offs=end_E)
        return h_RU, _swiglu(h_RU)

    def down_backward() -> tuple[Tensor, Tensor, Tensor]:
        da_RN = grouped_mm(t["dout"].index_select(0, token_R), t["w2"], offs=end_E)
        return _swiglu_backward(da_RN, t["h"], routing.row_scores_R)

    def down_weight() -> tuple[Tensor]:
        return (grouped_mm(t["dout"].index_select(0, token_R).t(), t["scaled_a"], offs=end_E),)

    def up_weight() -> tuple[Tensor]:
        return (grouped_mm(t["dh"].t(), t["x"].index_select(0, token_R), offs=end_E),)

    def forward() -> Tensor:
        x_TD, w1_EUD, w2_EDN, scores_TK = inputs.leaves
        a_RN = _swiglu(grouped_mm(x_TD.index_select(0, token_R), w1_EUD.transpose(-2, -1), offs=end_E))
        # The scores multiply the activations, which are narrower than the outputs.
        score_R1 = scores_TK.reshape(-1, 1).index_select(0, routing.slot_R).to(inputs.dtype)
        y_RD = grouped_mm(a_RN * score_R1, w2_EDN.transpose(-2, -1), offs=end_E)
        if inputs.device.type == "cpu":
            return F.embedding_bag(routing.row_TK, y_RD, mode="sum")
        # On a GPU the backward of embedding_bag sorts its indices; that of index_add only gathers.
        return torch.zeros_like(x_TD).index_add(0, token_R, y_RD)

    calls: dict[str, Callable[[], Any]] = {
        "up_proj": up,
        "down_proj": lambda: (grouped_mm(t["a"], t["w2"].transpose(-2, -1), offs=end_E),),
        "down_proj_bwd_input": down_backward,
        "down_proj_bwd_weight": down_weight,
        "up_proj_bwd_input": lambda: (grouped_mm(t["dh"], t["w1"], offs=end_E),),
        "up_proj_bwd_weight": up_weight,
    }
    call = _whole(op, inputs, forward) if op.startswith("experts") else calls[op]
    return Contender("rival", call, _names(op))


def scattermoe(op: str, inputs: Inputs) -> Contender:
    """The op with the kernels of ScatterMoE.

    Raises:
        Unavailable: not installed, another interface, no such kernel, or sizes beyond its 32-bit offsets.
    """
    package = imported("scattermoe")
    kernels = imported("scattermoe.kernels.ops")
    if op in ("combine", "topk_softmax", "build_plan"):
        raise Unavailable("has no kernel of its own for this op; it calls torch, as the contender torch does")
    _demand(kernels.scatter2scatter, "X W sorted_expert_idxs sorted_scattered_idxs k x_grouped y_grouped".split())
    _demand(kernels.group_bwd_W, "DY X expert_offsets E".split())
    _demand(kernels.group, "A sorted_expert_idxs fan_out".split())
    shape, routing, t = inputs.shape, inputs.routing, inputs.tensors
    _demand_gpu(inputs)
    if inputs.dtype == torch.float32:
        raise Unavailable("multiplies float32 as TF32")
    if op.endswith(("weight", "fwd_bwd")) and shape.E * shape.D * 2 * shape.N > _INT32_MAX:
        raise Unavailable("its kernel for weight gradients has 32-bit offsets, too short for E U D")
    if shape.T * shape.K * max(shape.D, 2 * shape.N) > _INT32_MAX + 1:
        raise Unavailable("its kernels have 32-bit offsets, too short for R D or R U")
    end_E = routing.end_E.long()
    indices = {"sorted_expert_idxs": routing.expert_R, "sorted_scattered_idxs": routing.slot_R}

    def product(rows: Tensor, weight: Tensor, k: int = 1) -> Tensor:
        return kernels.scatter2scatter(X=rows, W=weight, k=k, **indices, x_grouped=k == 1, y_grouped=True)

    def gathered(tokens_TD: Tensor) -> Tensor:
        return kernels.group(tokens_TD, routing.slot_R, fan_out=shape.K)

    def up() -> tuple[Tensor, Tensor]:
        rows_TD, weight = t["x"], t["w1"].permute(0, 2, 1)
        h_RU = product(rows_TD, weight, shape.K) if shape.K > 1 else product(gathered(rows_TD), weight)
        return h_RU, _swiglu(h_RU)

    def down_backward() -> tuple[Tensor, Tensor, Tensor]:
        return _swiglu_backward(product(gathered(t["dout"]), t["w2"]), t["h"], routing.row_scores_R)

    def weight_gradient(dy: Tensor, rows: Tensor) -> tuple[Tensor]:
        # What it returns is a transposed view.
        return (kernels.group_bwd_W(DY=dy, X=rows, expert_offsets=end_E, E=shape.E)[0].permute(0, 2, 1),)

    def forward() -> Tensor:
        x_TD, w1_EUD, w2_EDN, scores_TK = inputs.leaves
        linear = package.parallel_linear
        order = (routing.expert_R, routing.slot_R, end_E)
        h_RU = linear(x_TD, w1_EUD.permute(0, 2, 1), shape.K, *order, grouped_out=True)
        gates_TK = scores_TK.to(inputs.dtype)
        return linear(_swiglu(h_RU), w2_EDN.permute(0, 2, 1), 1, *order, grouped_in=True, gates=gates_TK)

    calls: dict[str, Callable[[], Any]] = {
        "up_proj": up,
        "down_proj": lambda: (product(t["a"], t["w2"].permute(0, 2, 1)),),
        "down_proj_bwd_input": down_backward,
        "down_proj_bwd_weight": lambda: weight_gradient(gathered(t["dout"]), t["scaled_a"]),
        "up_proj_bwd_input": lambda: (product(t["dh"], t["w1"]),),
        "up_proj_bwd_weight": lambda: weight_gradient(t["dh"], gathered(t["x"])),
    }
    call = _whole(op, inputs, forward) if op.startswith("experts") else calls[op]
    return Contender("rival", call, _names(op))


def quack(op: str, inputs: Inputs, tuned: bool = False) -> Contender:
    """The op with the kernels of QuACK.

    Args:
        op: a key of :data:`OPERANDS`.
        inputs: from :func:`make_inputs`.
        tuned: let it search its configurations on the first call, which takes minutes; else its default.

    Raises:
        Unavailable: not installed, another interface, no such kernel, or sizes that its documentation excludes.
    """
    module = imported("quack.topk" if op == "topk_softmax" else "quack.gemm_interface")
    if op in ("combine", "build_plan"):
        raise Unavailable("has no such kernel")
    if op.startswith("experts"):
        raise Unavailable("has the matrix products of a layer, but no layer of routed experts")
    _demand_gpu(inputs)
    shape, routing, t = inputs.shape, inputs.routing, inputs.tensors
    if op == "topk_softmax":
        if _is_no_power_of_2(shape.E) or _is_no_power_of_2(shape.K) or shape.E > 4096 or shape.K > 128:
            raise Unavailable("its topk wants powers of 2, E up to 4096 and K up to 128")
        _demand(module.topk, ["x", "k", "softmax"])
        return Contender("rival", lambda: module.topk(t["logits"], shape.K, softmax=True), _names(op))
    if inputs.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable("multiplies float32 as TF32")
    if shape.D % 8 or shape.N % 8:
        raise Unavailable("wants rows of whole 16 bytes: D and N multiples of 8")
    _demand(module.gemm, "A B cu_seqlens_m cu_seqlens_k A_idx tuned".split())
    _demand(module.gemm_gated, "A B activation cu_seqlens_m A_idx store_preact tuned".split())
    _demand(module.gemm_dgated, "A B PreAct activation colvec_scale colvec_reduce cu_seqlens_m A_idx tuned".split())
    offset_E1, token_R = routing.plan.expert_offset_E1, routing.plan.token_of_row_R
    by_rows = {"cu_seqlens_m": offset_E1, "tuned": tuned}
    gathered_rows = by_rows | {"A_idx": token_R}
    along_k = {"cu_seqlens_k": offset_E1, "A_idx": token_R, "tuned": tuned}
    named = _names(op)
    call: Callable[[], Any]
    if op == "up_proj":
        w1_EDU = _interleaved(t["w1"], 1).mT
        swiglu: dict[str, Any] = {"activation": "swiglu", "store_preact": True}

        def call() -> Any:
            return module.gemm_gated(t["x"], w1_EDU, **swiglu, **gathered_rows)

        def named(result: Any) -> dict[str, Tensor]:
            return {"h": _concatenated(result[0]), "a": result[1]}

    elif op == "down_proj_bwd_input":
        h_RU = _interleaved(t["h"], 1)
        scaled: dict[str, Any] = {"activation": "swiglu", "colvec_reduce": True, "colvec_scale": routing.row_scores_R}

        def call() -> Any:
            return module.gemm_dgated(t["dout"], t["w2"], h_RU, **scaled, **gathered_rows)

        def named(result: Any) -> dict[str, Tensor]:
            return {"dh": _concatenated(result[0]), "scaled_a": result[1], "row_dscores": result[2]}

    elif op == "up_proj_bwd_weight":
        # It gathers the left operand only, so this is the transposed gradient, (E, D, U).
        def call() -> Any:
            return module.gemm(t["x"].t(), t["dh"], **along_k)

        def named(result: Any) -> dict[str, Tensor]:
            return {"dw1": result.mT}

    elif op == "down_proj_bwd_weight":

        def call() -> Any:
            return (module.gemm(t["dout"].t(), t["scaled_a"], **along_k),)

    elif op == "down_proj":

        def call() -> Any:
            return (module.gemm(t["a"], t["w2"].mT, **by_rows),)

    else:

        def call() -> Any:
            return (module.gemm(t["dh"], t["w1"], **by_rows),)

    return Contender("rival", call, named)


def dense(op: str, inputs: Inputs) -> Contender:
    """One matrix product of as many FLOP on contiguous rows; a dense MLP for the experts, a contiguous sum for combine.

    Raises:
        Unavailable: the op has no such yardstick.
    """
    shape = inputs.shape
    if op == "combine":
        return Contender("yardstick", lambda: inputs.tensors["y"].view(shape.T, shape.K, shape.D).sum(dim=1))
    if op in _PRODUCTS:
        left, right = _factors(op, inputs, 1, shape.T * shape.K)
        return Contender("yardstick", lambda: torch.mm(left[0], right[0]))
    if not op.startswith("experts"):
        raise Unavailable("the op has no matrix product")
    width = shape.K * shape.N
    w1_UD = _normal(inputs, 2 * width, shape.D).mul_(shape.D**-0.5).requires_grad_()
    w2_DN = _normal(inputs, shape.D, width).mul_(width**-0.5).requires_grad_()
    x_TD = inputs.tensors["x"]

    def forward() -> Tensor:
        return rivals.dense_mlp(x_TD, w1_UD, w2_DN)

    return Contender("yardstick", _whole(op, inputs, forward, (x_TD, w1_UD, w2_DN)))


def dense_batched(op: str, inputs: Inputs) -> Contender:
    """``torch.bmm`` with T K / E contiguous rows for every expert.

    Raises:
        Unavailable: the op has no matrix product, or E does not divide T K.
    """
    if op not in _PRODUCTS:
        raise Unavailable("the op is no single matrix product")
    rows, rest = divmod(inputs.shape.T * inputs.shape.K, inputs.shape.E)
    if rest or not rows:
        raise Unavailable("E does not divide T K")
    left, right = _factors(op, inputs, inputs.shape.E, rows)
    return Contender("yardstick", lambda: torch.bmm(left, right))


RIVALS: dict[str, Callable[..., Contender]] = {"torch": torch_ops, "scattermoe": scattermoe, "quack": quack}
"""Other libraries, by name."""
YARDSTICKS: dict[str, Callable[..., Contender]] = {"dense": dense, "dense batched": dense_batched}
"""What no routed op can be expected to beat by much, by name."""


def why_not_importable(name: str) -> str | None:
    """Say why the library of a rival cannot be imported, or return None if it can."""
    modules = {"scattermoe": "scattermoe.kernels.ops", "quack": "quack.gemm_interface"}
    try:
        imported(modules.get(name, "torch"))
    except Unavailable as error:
        return str(error)
    return None


def grouped_mm_function() -> tuple[Callable[..., Tensor], str]:
    """torch's grouped matrix product, the public one if this torch has it, and its name.

    Raises:
        Unavailable: this torch has none.
    """
    for owner, name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
        if hasattr(owner, name):
            return getattr(owner, name), f"{owner.__name__}.{name}"
    raise Unavailable("this torch has no grouped_mm")


def size_of(name: str, shape: Shape) -> tuple[int, ...]:
    """Size of an operand or result by its name in :data:`OPERANDS` or :data:`RESULTS`."""
    letters = {"T": shape.T, "D": shape.D, "N": shape.N, "U": 2 * shape.N, "E": shape.E, "K": shape.K}
    letters |= {"R": shape.T * shape.K, "e": shape.E + 1, "t": shape.T + 1}
    return tuple(letters[letter] for letter in _DIMS[name])


def layer_contender(
    op: str,
    inputs: Inputs,
    forward: Callable[[], Tensor],
    kind: str = "rival",
    leaves: tuple[Tensor, ...] | None = None,
) -> Contender:
    """A contender for ``experts`` or ``experts_fwd_bwd`` from its forward pass.

    Args:
        op: which of the two.
        inputs: from :func:`make_inputs`.
        forward: from the operands to the output (T, D).
        kind: as in :class:`Contender`.
        leaves: what receives gradients; None: X, W1, W2 and the scores of ``inputs``.
    """
    return Contender(kind, _whole(op, inputs, forward, leaves), _names(op))


def _names(op: str) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    return lambda result: dict(zip(RESULTS[op], result, strict=True))


def _whole(
    op: str, inputs: Inputs, forward: Callable[[], Tensor], leaves: tuple[Tensor, ...] | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and for ``experts_fwd_bwd`` the gradients to all leaves as well."""
    if op == "experts":
        return lambda: (forward().detach(),)

    def both() -> tuple[Tensor, ...]:
        out_TD = forward()
        return out_TD.detach(), *torch.autograd.grad(out_TD, leaves or inputs.leaves, inputs.tensors["dout"])

    return both


def _swiglu(h_RU: Tensor) -> Tensor:
    gate_RN, up_RN = h_RU.chunk(2, dim=-1)
    return F.silu(gate_RN) * up_RN


def _swiglu_backward(da_RN: Tensor, h_RU: Tensor, score_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From dA' without scores: dH, score * A and dS."""
    gate_RN, up_RN = h_RU.chunk(2, dim=-1)
    sigmoid_RN, silu_RN = gate_RN.sigmoid(), F.silu(gate_RN)
    a_RN, score_R1 = silu_RN * up_RN, score_R.to(h_RU.dtype)[:, None]
    dscores_R = (da_RN * a_RN).sum(dim=-1, dtype=torch.float32)
    ds_RN = da_RN * score_R1
    dgate_RN = ds_RN * up_RN * (sigmoid_RN + silu_RN * (1 - sigmoid_RN))
    return torch.cat((dgate_RN, ds_RN * silu_RN), dim=-1), a_RN * score_R1, dscores_R


def _sorted_plan(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    num_tokens, top_k = expert_TK.shape
    expert_P = expert_TK.view(-1)
    expert_R, slot_R = expert_P.sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=torch.int32, device=expert_P.device)
    offset_E1 = torch.searchsorted(expert_R, edges, out_int32=True)
    slot_R32 = slot_R.to(torch.int32)
    row_P = torch.empty_like(slot_R32)
    row_P[slot_R] = torch.arange(slot_R.numel(), dtype=torch.int32, device=slot_R.device)
    token_offset_T1 = torch.arange(num_tokens + 1, dtype=torch.int32, device=slot_R.device) * top_k
    return offset_E1, slot_R32 // top_k, slot_R32, row_P, token_offset_T1


def _factors(op: str, inputs: Inputs, batch: int, rows: int) -> tuple[Tensor, Tensor]:
    """Both factors of the op's product, in the layout in which the op finds them; ``rows`` rows for each of ``batch``.

    The products of forward read transposed weights, those of the weight gradients transposed rows.
    """
    sizes = {"R": rows, "D": inputs.shape.D, "N": inputs.shape.N, "U": 2 * inputs.shape.N}
    m, k, n = (sizes[letter] for letter in _PRODUCTS[op])
    left = _normal(inputs, batch, k, m).mT if op.endswith("weight") else _normal(inputs, batch, m, k)
    right = _normal(inputs, batch, n, k).mT if op in ("up_proj", "down_proj") else _normal(inputs, batch, k, n)
    return left, right


def _normal(inputs: Inputs, *size: int) -> Tensor:
    return torch.randn(size, dtype=inputs.dtype, device=inputs.device)


def _interleaved(value: Tensor, dim: int) -> Tensor:
    """Gate and up, one half after the other along ``dim``, as g0 u0 g1 u1 …"""
    return torch.stack(value.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1)


def _concatenated(value_RU: Tensor) -> Tensor:
    return torch.cat((value_RU[:, 0::2], value_RU[:, 1::2]), dim=1)


def imported(module: str) -> Any:
    """A module of a library.

    Raises:
        Unavailable: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.split('.')[0]} is not importable ({error})") from error


def _demand(function: Callable[..., Any], names: Sequence[str]) -> None:
    """Refuse a library whose ``function`` lacks one of these parameters, or demands others."""
    parameters = inspect.signature(function).parameters
    missing = [name for name in names if name not in parameters]
    extra = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and name not in names
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing or extra:
        what = f"no {', '.join(missing)}" if missing else f"a further {', '.join(extra)}"
        raise Unavailable(f"this version's {getattr(function, '__name__', 'function')} has {what}")


def _demand_gpu(inputs: Inputs) -> None:
    if inputs.device.type == "cpu":
        raise Unavailable("needs a GPU")


def _is_no_power_of_2(value: int) -> bool:
    return value & (value - 1) != 0
