"""Wrong calls: one table of what users get wrong, each with the exact words that it is refused with.

Every message has one form: ``where: argument is X, expected Y``. Nothing is computed before a call is refused, and
nothing that was passed in, module or tensor, is changed by it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonic
from sonic import kernels
from sonic.kernels import ops
from sonic.layers import SharedExpert, set_aux_loss_scale
from sonic.routing import Routing, RoutingMetrics, TokenRounding, TopKRouter, attach_loss, load_balancing_loss

T, D, N, E, K = 5, 8, 6, 4, 2
U = 2 * N
R = T * K

FORM = re.compile(r"sonic(\.\w+)*: [\w.]+ is .+, expected .+", re.S)


@dataclass
class Given:
    """What a call starts from: everything in it fits together."""

    layer: sonic.MoE = field(
        default_factory=lambda: sonic.MoE(D, N, E, K, router=TopKRouter(D, E, K, aux_loss_coeff=0.1))
    )
    router: TopKRouter = field(default_factory=lambda: TopKRouter(D, E, K))
    x: Tensor = field(default_factory=lambda: torch.randn(T, D))
    w1: Tensor = field(default_factory=lambda: torch.randn(E, U, D))
    w2: Tensor = field(default_factory=lambda: torch.randn(E, D, N))
    b1: Tensor = field(default_factory=lambda: torch.randn(E, U))
    b2: Tensor = field(default_factory=lambda: torch.randn(E, D))
    scores: Tensor = field(default_factory=lambda: torch.rand(T, K))
    expert_index: Tensor = field(default_factory=lambda: torch.rand(T, E).argsort(1)[:, :K])
    rows: Tensor = field(default_factory=lambda: torch.randn(R, D))
    row_scores: Tensor = field(default_factory=lambda: torch.rand(R))
    tokens_per_expert: Tensor = field(default_factory=lambda: torch.tensor([3, 0, 5, 2]))
    logits: Tensor = field(default_factory=lambda: torch.randn(T, E))

    @property
    def plan(self) -> sonic.RoutingPlan:
        return sonic.RoutingPlan.from_topk(self.expert_index, E)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def moe(**changes: Any) -> Callable[[Given], object]:
    arguments = {"hidden_size": D, "intermediate_size": N, "num_experts": E, "top_k": K}
    return lambda given: sonic.MoE(**arguments | changes)


def router(**changes: Any) -> Callable[[Given], object]:
    arguments = {"hidden_size": D, "num_experts": E, "top_k": K}
    return lambda given: TopKRouter(**arguments | changes)


class Returning(nn.Module):
    """A router that returns whatever it is given; ``None`` stands for what a router should."""

    def __init__(self, change: Callable[[Routing], object]) -> None:
        super().__init__()
        self.inner, self.change = TopKRouter(D, E, K), change

    def forward(self, x_TD: Tensor) -> object:
        return self.change(self.inner(x_TD))


def returning(change: Callable[[Routing], object]) -> Callable[[Given], object]:
    return lambda given: sonic.MoE(D, N, E, K, router=Returning(change))(given.x)


def changed(**changes: Any) -> Callable[[Given], object]:
    return returning(lambda routing: dataclasses.replace(routing, **changes))


def huge_plan(num_tokens: int, num_rows: int) -> sonic.RoutingPlan:
    """Of shapes alone."""

    def index(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device="meta")

    arrays = index(E + 1), index(num_rows), index(num_rows), index(num_rows), index(num_tokens + 1)
    return sonic.RoutingPlan(num_tokens, E, (num_rows,), *arrays)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_of(x: Callable[[Given], object]) -> Callable[[Given], object]:
    return lambda given: given.layer(x(given))


def moe_mlp(**changes: Callable[[Given], object]) -> Callable[[Given], object]:
    def call(given: Given) -> object:
        arguments = {name: getattr(given, name) for name in ("x", "w1", "w2", "scores", "plan")}
        return sonic.moe_mlp(**arguments | {name: change(given) for name, change in changes.items()})

    return call


def expert_mlp(**changes: Callable[[Given], object]) -> Callable[[Given], object]:
    def call(given: Given) -> object:
        arguments = {name: getattr(given, name) for name in ("rows", "w1", "w2", "tokens_per_expert", "row_scores")}
        return sonic.expert_mlp(**arguments | {name: change(given) for name, change in changes.items()})

    return call


def experts_op(offsets: list[int], dtype: torch.dtype = torch.int32) -> Callable[[Given], object]:
    def call(given: Given) -> object:
        offset_E1 = torch.tensor(offsets, dtype=dtype)
        return ops.up_proj(given.rows, given.w1, None, None, offset_E1, "swiglu", "concatenated")

    return call


def explain(**changes: Any) -> Callable[[Given], object]:
    arguments = {"num_tokens": T, "num_experts": E, "top_k": K, "hidden_size": D, "intermediate_size": N}
    return lambda given: kernels.explain(**{"op": "up_proj"} | arguments | changes)


def always(value: object) -> Callable[[Given], object]:
    return lambda given: value


BACKENDS = "one of " + ", ".join(map(repr, kernels.backends()))
ACTIVATIONS = "one of 'swiglu', 'geglu', 'reglu', 'swiglu_oai', 'gelu', 'relu', 'relu2', 'silu'"
LAYOUTS = "one of 'concatenated', 'interleaved'"
SAVES = "one of 'preactivation', 'input'"
FLOATS = "bfloat16 or float16 or float32 or float64"
DTYPES = "torch.bfloat16 or torch.float16 or torch.float32 or torch.float64"
INTEGERS = "int64 or int32 or int16 or int8 or uint8"
nan, infinity = float("nan"), float("inf")

WRONG: list[tuple[Callable[[Given], object], str]] = [
    # ---- sonic.MoE: sizes
    (moe(hidden_size=0), "sonic.MoE: hidden_size is 0, expected a positive integer"),
    (moe(hidden_size="8"), "sonic.MoE: hidden_size is '8', expected a positive integer"),
    (moe(intermediate_size=-6), "sonic.MoE: intermediate_size is -6, expected a positive integer"),
    (moe(num_experts=4.0), "sonic.MoE: num_experts is 4.0, expected a positive integer"),
    (moe(top_k=True), "sonic.MoE: top_k is True, expected a positive integer"),
    (moe(top_k=None), "sonic.MoE: top_k is None, expected a positive integer"),
    (moe(top_k=5), "sonic.MoE: top_k is 5, expected at most num_experts = 4"),
    (moe(shared_intermediate_size=-1), "sonic.MoE: shared_intermediate_size is -1, expected a positive integer"),
    (moe(shared_intermediate_size=1.5), "sonic.MoE: shared_intermediate_size is 1.5, expected a positive integer"),
    # ---- names
    (moe(activation="swish"), f"sonic.MoE: activation is 'swish', expected {ACTIVATIONS}"),
    (moe(activation=None), f"sonic.MoE: activation is None, expected {ACTIVATIONS}"),
    (moe(glu_layout="striped"), f"sonic.MoE: glu_layout is 'striped', expected {LAYOUTS}"),
    (moe(save="everything"), f"sonic.MoE: save is 'everything', expected {SAVES}"),
    (moe(backend="fast"), f"sonic.MoE: backend is 'fast', expected {BACKENDS}"),
    (moe(init="xavier"), "sonic.MoE: init is 'xavier', expected one of 'linear', 'normal'"),
    (moe(init="normal", init_std=-1.0), "sonic.MoE: init_std is -1.0, expected a finite number >= 0"),
    (moe(init="normal", init_std=nan), "sonic.MoE: init_std is nan, expected a finite number >= 0"),
    # ---- routers
    (
        moe(router=lambda x: x),
        "sonic.MoE: router is a function, expected a torch.nn.Module: (T, D) -> sonic.routing.Routing",
    ),
    (
        moe(router=TopKRouter),
        "sonic.MoE: router is a type, expected a torch.nn.Module: (T, D) -> sonic.routing.Routing",
    ),
    (moe(router=TopKRouter(D, E + 1, K)), "sonic.MoE: router.num_experts is 5, expected 4"),
    (moe(router=TopKRouter(D + 1, E, K)), "sonic.MoE: router.hidden_size is 9, expected 8"),
    (moe(router=TopKRouter(D, E, K + 1)), "sonic.MoE: router.top_k is 3, expected 2"),
    (moe(router=TokenRounding(TopKRouter(D, E, 1))), "sonic.MoE: router.top_k is 1, expected 2"),
    (
        returning(lambda routing: (routing.scores, routing.expert_index)),
        "sonic.MoE: router is a Returning that returned a tuple, expected one that returns a sonic.routing.Routing",
    ),
    (
        returning(lambda routing: None),
        "sonic.MoE: router is a Returning that returned a NoneType, expected one that returns a sonic.routing.Routing",
    ),
    (
        changed(plan=torch.zeros(T, K)),
        "sonic.MoE: routing.plan is a Tensor, expected a sonic.RoutingPlan",
    ),
    (
        changed(plan=sonic.RoutingPlan.from_topk(torch.tensor([[0, 1]] * (T - 1)), E)),
        "sonic.MoE: routing.plan.num_tokens is 4, expected T = 5, the tokens that the router was given",
    ),
    (
        changed(plan=sonic.RoutingPlan.from_topk(torch.tensor([[0, 1]] * T), E + 1)),
        "sonic.MoE: routing.plan.num_experts is 5, expected num_experts = 4",
    ),
    (changed(scores=torch.ones(T, K + 1)), "sonic.MoE: routing.scores is (5, 3), expected (T, K) = (5, 2)"),
    (changed(scores=None), "sonic.MoE: routing.scores is a NoneType, expected a tensor of shape (T, K)"),
    (changed(scores=torch.ones(T, K).long()), f"sonic.MoE: routing.scores is int64, expected {FLOATS}"),
    (changed(aux_loss=0.0), "sonic.MoE: routing.aux_loss is a float, expected a tensor of shape ()"),
    (changed(aux_loss=torch.zeros(2)), "sonic.MoE: routing.aux_loss is (2,), expected ()"),
    (changed(scores_on="both"), "sonic.MoE: routing.scores_on is 'both', expected one of 'output', 'input'"),
    (
        changed(scores_on="input"),
        "sonic.MoE: routing.scores_on is 'input', expected 'output', unless every token has one expert",
    ),
    (
        lambda g: sonic.MoE(D, N, E, K, router=TopKRouter(D, E, K, aux_loss_type="sequence", aux_loss_coeff=0.1))(g.x),
        "sonic.MoE: x is (5, 8), expected (batch, sequence, D), or sequence_length=...: "
        "the router has to know where sequences begin",
    ),
    # ---- dtypes
    (moe(dtype=torch.int64), f"sonic.MoE: dtype is torch.int64, expected {DTYPES}"),
    (moe(dtype=torch.complex64), f"sonic.MoE: dtype is torch.complex64, expected {DTYPES}"),
    (moe(dtype="float32"), f"sonic.MoE: dtype is 'float32', expected {DTYPES}"),
    (
        lambda g: SharedExpert(D, N, dtype=torch.bool),
        f"sonic.layers.SharedExpert: dtype is torch.bool, expected {DTYPES}",
    ),
    # ---- calls of the layer
    (layer_of(lambda g: g.x.tolist()), "sonic.MoE: x is a list, expected a tensor of shape (..., D)"),
    (layer_of(lambda g: g.x.numpy()), "sonic.MoE: x is a ndarray, expected a tensor of shape (..., D)"),
    (layer_of(always(None)), "sonic.MoE: x is a NoneType, expected a tensor of shape (..., D)"),
    (layer_of(lambda g: g.x[:, 1:]), "sonic.MoE: x is (5, 7), expected (..., D) = (..., 8)"),
    (layer_of(lambda g: g.x.t()), "sonic.MoE: x is (8, 5), expected (..., D) = (..., 8)"),
    (layer_of(always(torch.tensor(1.0))), "sonic.MoE: x is (), expected (..., D) = (..., 8)"),
    (layer_of(always(torch.zeros(0))), "sonic.MoE: x is (0,), expected (..., D) = (..., 8)"),
    (layer_of(lambda g: g.x.double()), "sonic.MoE: x is float64, expected float32 like w1"),
    (layer_of(lambda g: g.x.bfloat16()), "sonic.MoE: x is bfloat16, expected float32 like w1"),
    (layer_of(lambda g: g.x.long()), "sonic.MoE: x is int64, expected float32 like w1"),
    (layer_of(lambda g: g.x.to("meta")), "sonic.MoE: x is on meta, expected on cpu like w1"),
    # ---- the shared expert
    (
        lambda g: SharedExpert(D, 0),
        "sonic.layers.SharedExpert: intermediate_size is 0, expected a positive integer",
    ),
    (
        lambda g: SharedExpert(D, N, activation="tanh"),
        f"sonic.layers.SharedExpert: activation is 'tanh', expected {ACTIVATIONS}",
    ),
    # ---- sonic.routing.TopKRouter
    (router(hidden_size=8.0), "sonic.routing.TopKRouter: hidden_size is 8.0, expected a positive integer"),
    (router(num_experts=-4), "sonic.routing.TopKRouter: num_experts is -4, expected a positive integer"),
    (router(top_k=0), "sonic.routing.TopKRouter: top_k is 0, expected a positive integer"),
    (router(top_k=6), "sonic.routing.TopKRouter: top_k is 6, expected at most num_experts = 4"),
    (
        router(score_function="tanh"),
        "sonic.routing.TopKRouter: score_function is 'tanh', expected one of 'softmax', 'sigmoid', 'sqrtsoftplus'",
    ),
    (
        router(score_function="sigmoid", pre_softmax=True),
        "sonic.routing.TopKRouter: pre_softmax is True, expected False with score_function='sigmoid'",
    ),
    (router(aux_loss_coeff=nan), "sonic.routing.TopKRouter: aux_loss_coeff is nan, expected a finite number >= 0"),
    (router(aux_loss_coeff=-0.1), "sonic.routing.TopKRouter: aux_loss_coeff is -0.1, expected a finite number >= 0"),
    (router(z_loss_coeff=infinity), "sonic.routing.TopKRouter: z_loss_coeff is inf, expected a finite number >= 0"),
    (
        router(topk_scaling_factor=0.0),
        "sonic.routing.TopKRouter: topk_scaling_factor is 0.0, expected a finite number > 0",
    ),
    (
        router(topk_scaling_factor=nan),
        "sonic.routing.TopKRouter: topk_scaling_factor is nan, expected a finite number > 0",
    ),
    (lambda g: g.router(g.x[None]), "sonic.routing.TopKRouter: x_TD is (1, 5, 8), expected (T, D) = (T, 8)"),
    (lambda g: g.router(g.x.double()), "sonic.routing.router_logits: x is float64, expected float32 like weight"),
    (lambda g: g.router(None), "sonic.routing.TopKRouter: x_TD is a NoneType, expected a tensor of shape (T, D)"),
    (lambda g: g.router(g.x.to("meta")), "sonic.routing.router_logits: x is on meta, expected on cpu like weight"),
    # ---- sonic.moe_mlp: tokens
    (moe_mlp(x=lambda g: g.x[None]), "sonic.moe_mlp: x is (1, 5, 8), expected (T, D) = (5, D)"),
    (moe_mlp(x=lambda g: g.x[:4]), "sonic.moe_mlp: x is (4, 8), expected (T, D) = (5, D)"),
    (moe_mlp(x=lambda g: g.x.numpy()), "sonic.moe_mlp: x is a ndarray, expected a tensor of shape (T, D)"),
    (moe_mlp(x=lambda g: g.x.long()), f"sonic.moe_mlp: x is int64, expected {FLOATS}"),
    (moe_mlp(x=lambda g: g.x + 0j), f"sonic.moe_mlp: x is complex64, expected {FLOATS}"),
    (moe_mlp(x=lambda g: g.x[:, 1:]), "sonic.moe_mlp: w1 is (4, 12, 8), expected (E, U, D) = (4, U, 7)"),
    # ---- weights and biases
    (moe_mlp(w1=lambda g: g.w1[0]), "sonic.moe_mlp: w1 is (12, 8), expected (E, U, D) = (4, U, 8)"),
    (moe_mlp(w1=lambda g: g.w1[:3]), "sonic.moe_mlp: w1 is (3, 12, 8), expected (E, U, D) = (4, U, 8)"),
    (moe_mlp(w1=lambda g: g.w1.mT), "sonic.moe_mlp: w1 is (4, 8, 12), expected (E, U, D) = (4, U, 8)"),
    (moe_mlp(w1=lambda g: list(g.w1)), "sonic.moe_mlp: w1 is a list, expected a tensor of shape (E, U, D)"),
    (
        moe_mlp(w1=lambda g: g.w1[:, 1:]),
        "sonic.moe_mlp: w1 is (4, 11, 8), expected (E, U, D) with an even U: gate and up rows of swiglu",
    ),
    (moe_mlp(w2=lambda g: g.w2[..., 1:]), "sonic.moe_mlp: w2 is (4, 8, 5), expected (E, D, N) = (4, 8, 6)"),
    (moe_mlp(w2=lambda g: g.w2.mT), "sonic.moe_mlp: w2 is (4, 6, 8), expected (E, D, N) = (4, 8, 6)"),
    (moe_mlp(w2=always(None)), "sonic.moe_mlp: w2 is a NoneType, expected a tensor of shape (E, D, N)"),
    (moe_mlp(activation=always("gelu")), "sonic.moe_mlp: w2 is (4, 8, 6), expected (E, D, N) = (4, 8, 12)"),
    (moe_mlp(b1=lambda g: g.b1[:, 1:]), "sonic.moe_mlp: b1 is (4, 11), expected (E, U) = (4, 12)"),
    (moe_mlp(b1=lambda g: g.b2), "sonic.moe_mlp: b1 is (4, 8), expected (E, U) = (4, 12)"),
    (moe_mlp(b2=lambda g: g.b2[0]), "sonic.moe_mlp: b2 is (8,), expected (E, D) = (4, 8)"),
    (moe_mlp(b2=always(True)), "sonic.moe_mlp: b2 is a bool, expected a tensor of shape (E, D)"),
    (moe_mlp(w1=lambda g: g.w1.bfloat16()), "sonic.moe_mlp: w1 is bfloat16, expected float32 like x"),
    (moe_mlp(w2=lambda g: g.w2.double()), "sonic.moe_mlp: w2 is float64, expected float32 like x"),
    (moe_mlp(b1=lambda g: g.b1.half()), "sonic.moe_mlp: b1 is float16, expected float32 like x"),
    (moe_mlp(w2=lambda g: g.w2.to("meta")), "sonic.moe_mlp: w2 is on meta, expected on cpu like x"),
    (
        moe_mlp(x=lambda g: g.x[:, :0], w1=lambda g: g.w1[..., :0], w2=lambda g: g.w2[:, :0]),
        "sonic.moe_mlp: w1 is (4, 12, 0), expected (E, U, D) with sizes of at least 1",
    ),
    (
        moe_mlp(w1=lambda g: g.w1[:, :0], w2=lambda g: g.w2[..., :0]),
        "sonic.moe_mlp: w1 is (4, 0, 8), expected (E, U, D) with sizes of at least 1",
    ),
    # ---- scores and plan
    (moe_mlp(scores=lambda g: g.scores[:, :1]), "sonic.moe_mlp: scores is (5, 1), expected (T, K) = (5, 2)"),
    (moe_mlp(scores=lambda g: g.scores.reshape(-1)), "sonic.moe_mlp: scores is (10,), expected (T, K) = (5, 2)"),
    (moe_mlp(scores=lambda g: g.scores.long()), f"sonic.moe_mlp: scores is int64, expected {FLOATS}"),
    (moe_mlp(scores=always(None)), "sonic.moe_mlp: scores is a NoneType, expected a tensor of shape (T, K)"),
    (moe_mlp(scores=lambda g: g.scores.to("meta")), "sonic.moe_mlp: scores is on meta, expected on cpu like x"),
    (
        moe_mlp(plan=lambda g: sonic.RoutingPlan.from_pairs(torch.arange(T), torch.zeros(T, dtype=torch.int64), T, E)),
        "sonic.moe_mlp: scores is (5, 2), expected (P,) = (5,)",
    ),
    (moe_mlp(plan=always(None)), "sonic.moe_mlp: plan is a NoneType, expected a sonic.RoutingPlan"),
    (moe_mlp(plan=lambda g: g.expert_index), "sonic.moe_mlp: plan is a Tensor, expected a sonic.RoutingPlan"),
    (
        moe_mlp(plan=lambda g: sonic.RoutingPlan.from_topk(g.expert_index.to("meta"), E)),
        "sonic.moe_mlp: plan is on meta, expected on cpu like x",
    ),
    (
        moe_mlp(plan=lambda g: sonic.RoutingPlan.from_topk(g.expert_index, E + 1)),
        "sonic.moe_mlp: w1 is (4, 12, 8), expected (E, U, D) = (5, U, 8)",
    ),
    # ---- more than int32 counts
    (
        lambda g: sonic.moe_mlp(meta(2**31, 1), meta(E, 2, 1), meta(E, 1, 1), meta(2**31), huge_plan(2**31, 2**31)),
        "sonic.moe_mlp: x is (2147483648, 1), expected a first dimension below 2**31",
    ),
    (
        lambda g: sonic.moe_mlp(meta(2**30, 1), meta(E, 2, 1), meta(E, 1, 1), meta(2**31), huge_plan(2**30, 2**31)),
        "sonic.moe_mlp: plan.token_of_row_R is (2147483648,), expected a first dimension below 2**31",
    ),
    (
        lambda g: sonic.expert_mlp(meta(2**31, 1), meta(E, 2, 1), meta(E, 1, 1), g.tokens_per_expert),
        "sonic.expert_mlp: rows is (2147483648, 1), expected a first dimension below 2**31",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(meta(2**30, 2, dtype=torch.int32), E),
        "sonic.build_plan: expert_of_slot_P is (2147483648,), expected a first dimension below 2**31",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(*[torch.zeros(1, dtype=torch.int32)] * 2, 2**31, E),
        "sonic.build_plan: num_tokens is 2147483648, expected below 2**31",
    ),
    (
        lambda g: ops.up_proj(
            meta(2**31, 1),
            meta(E, 2, 1),
            None,
            None,
            meta(E + 1, dtype=torch.int32),
            "swiglu",
            "concatenated",
        ),
        "sonic.up_proj: x_TD is (2147483648, 1), expected a first dimension below 2**31",
    ),
    (
        lambda g: ops.up_proj(
            meta(4, 1),
            meta(E, 2, 1),
            None,
            meta(2**31, dtype=torch.int32),
            meta(E + 1, dtype=torch.int32),
            "swiglu",
            "concatenated",
        ),
        "sonic.up_proj: token_of_row_R is (2147483648,), expected a first dimension below 2**31",
    ),
    (
        lambda g: ops.down_proj(meta(2**31, 1), meta(E, 1, 1), None, None, meta(E + 1, dtype=torch.int32)),
        "sonic.down_proj: a_RN is (2147483648, 1), expected a first dimension below 2**31",
    ),
    (
        lambda g: ops.combine(meta(2**31, 1), None, meta(2**31, dtype=torch.int32), meta(T + 1, dtype=torch.int32)),
        "sonic.combine: y_RD is (2147483648, 1), expected a first dimension below 2**31",
    ),
    # ---- names
    (moe_mlp(activation=always("SwiGLU")), f"sonic.moe_mlp: activation is 'SwiGLU', expected {ACTIVATIONS}"),
    (moe_mlp(glu_layout=always(None)), f"sonic.moe_mlp: glu_layout is None, expected {LAYOUTS}"),
    (moe_mlp(save=always(True)), f"sonic.moe_mlp: save is True, expected {SAVES}"),
    (moe_mlp(backend=always("fast")), f"sonic.moe_mlp: backend is 'fast', expected {BACKENDS}"),
    # ---- sonic.expert_mlp
    (expert_mlp(rows=lambda g: g.rows[0]), "sonic.expert_mlp: rows is (8,), expected (R, D)"),
    (expert_mlp(rows=lambda g: g.rows.int()), f"sonic.expert_mlp: rows is int32, expected {FLOATS}"),
    (
        expert_mlp(tokens_per_expert=lambda g: g.tokens_per_expert.float()),
        f"sonic.expert_mlp: tokens_per_expert is float32, expected {INTEGERS}",
    ),
    (
        expert_mlp(tokens_per_expert=lambda g: g.tokens_per_expert.tolist()),
        "sonic.expert_mlp: tokens_per_expert is a list, expected an integer tensor",
    ),
    (
        expert_mlp(tokens_per_expert=lambda g: g.tokens_per_expert[None]),
        "sonic.expert_mlp: tokens_per_expert is (1, 4), expected (E,)",
    ),
    (
        expert_mlp(tokens_per_expert=always(torch.tensor([3, -1, 5, 3]))),
        "sonic.expert_mlp: tokens_per_expert is [3, -1, 5, 3], expected counts >= 0 that sum to at most R = 10",
    ),
    (
        expert_mlp(tokens_per_expert=always(torch.tensor([3, 0, 5, 3]))),
        "sonic.expert_mlp: tokens_per_expert is [3, 0, 5, 3], expected counts >= 0 that sum to at most R = 10",
    ),
    (
        expert_mlp(tokens_per_expert=always(torch.tensor([5, 5]))),
        "sonic.expert_mlp: w1 is (4, 12, 8), expected (E, U, D) = (2, U, 8)",
    ),
    (
        expert_mlp(tokens_per_expert=lambda g: g.tokens_per_expert.to("meta")),
        "sonic.expert_mlp: tokens_per_expert is on meta, expected on cpu like rows, or on the CPU",
    ),
    (
        expert_mlp(row_scores=lambda g: g.row_scores[:, None]),
        "sonic.expert_mlp: row_scores is (10, 1), expected (R,) = (10,)",
    ),
    (
        expert_mlp(row_scores=lambda g: g.row_scores > 0),
        f"sonic.expert_mlp: row_scores is bool, expected {FLOATS}",
    ),
    (
        expert_mlp(rows=lambda g: g.rows[:, :0], w1=lambda g: g.w1[..., :0], w2=lambda g: g.w2[:, :0]),
        "sonic.expert_mlp: w1 is (4, 12, 0), expected (E, U, D) with sizes of at least 1",
    ),
    (
        expert_mlp(
            rows=lambda g: g.rows[:0],
            w1=lambda g: g.w1[:0],
            w2=lambda g: g.w2[:0],
            tokens_per_expert=lambda g: g.tokens_per_expert[:0],
            row_scores=always(None),
        ),
        "sonic.expert_mlp: w1 is (0, 12, 8), expected (E, U, D) with sizes of at least 1",
    ),
    (expert_mlp(w2=lambda g: g.w2.bfloat16()), "sonic.expert_mlp: w2 is bfloat16, expected float32 like rows"),
    (expert_mlp(save=always("h")), f"sonic.expert_mlp: save is 'h', expected {SAVES}"),
    (expert_mlp(backend=always(1)), f"sonic.expert_mlp: backend is 1, expected {BACKENDS}"),
    # ---- plans
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index.tolist(), E),
        "sonic.RoutingPlan.from_topk: expert_index is a list, expected an integer tensor",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index.float(), E),
        f"sonic.RoutingPlan.from_topk: expert_index is float32, expected {INTEGERS}",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index > 1, E),
        f"sonic.RoutingPlan.from_topk: expert_index is bool, expected {INTEGERS}",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index[0], E),
        "sonic.RoutingPlan.from_topk: expert_index is (2,), expected (T, K)",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index[:, :0], E),
        "sonic.RoutingPlan.from_topk: expert_index is (5, 0), expected (T, K) with K from 1 to num_experts = 4",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(torch.arange(5)[None], E),
        "sonic.RoutingPlan.from_topk: expert_index is (1, 5), expected (T, K) with K from 1 to num_experts = 4",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index, 0),
        "sonic.RoutingPlan.from_topk: num_experts is 0, expected a positive integer",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(g.expert_index, True),
        "sonic.RoutingPlan.from_topk: num_experts is True, expected a positive integer",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(torch.arange(3), torch.arange(2), T, E),
        "sonic.RoutingPlan.from_pairs: expert_index is (2,), expected (P,) = (3,)",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(g.expert_index, g.expert_index, T, E),
        "sonic.RoutingPlan.from_pairs: token_index is (5, 2), expected (P,)",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(torch.arange(3), torch.arange(3), -1, E),
        "sonic.RoutingPlan.from_pairs: num_tokens is -1, expected an integer >= 0",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(torch.arange(3), torch.arange(3), 3.0, E),
        "sonic.RoutingPlan.from_pairs: num_tokens is 3.0, expected an integer >= 0",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(torch.arange(3), torch.arange(3, device="meta"), 3, E),
        "sonic.RoutingPlan.from_pairs: expert_index is on meta, expected on cpu like token_index",
    ),
    (
        lambda g: g.plan.rows_with_padding(0),
        "sonic.RoutingPlan.rows_with_padding: tile_rows is 0, expected a positive integer",
    ),
    (
        lambda g: RoutingMetrics(g.plan).padding_waste(2.5),
        "sonic.RoutingPlan.rows_with_padding: tile_rows is 2.5, expected a positive integer",
    ),
    # ---- losses
    (
        lambda g: load_balancing_loss(g.logits[0], torch.ones(E)),
        "sonic.routing.load_balancing_loss: logits is (4,), expected (T, E)",
    ),
    (
        lambda g: load_balancing_loss(g.logits, torch.ones(E + 1)),
        "sonic.routing.load_balancing_loss: tokens_per_expert is (5,), expected (E,) = (4,)",
    ),
    (
        lambda g: load_balancing_loss(g.logits, torch.ones(E), score_function="tanh"),
        "sonic.routing.load_balancing_loss: score_function is 'tanh', "
        "expected one of 'softmax', 'sigmoid', 'sqrtsoftplus'",
    ),
    (
        lambda g: load_balancing_loss(g.logits, torch.ones(E), group="all"),
        "sonic.routing.load_balancing_loss: group is 'all', expected a process group, 'world' or None",
    ),
    (lambda g: attach_loss(g.x, g.x), "sonic.routing.attach_loss: loss is (5, 8), expected ()"),
    (lambda g: attach_loss(g.x, 0.5), "sonic.routing.attach_loss: loss is a float, expected a tensor of shape ()"),
    (
        lambda g: set_aux_loss_scale(g.layer, nan),
        "sonic.layers.set_aux_loss_scale: scale is nan, expected a finite number >= 0",
    ),
    (
        lambda g: set_aux_loss_scale(g.layer, -1),
        "sonic.layers.set_aux_loss_scale: scale is -1, expected a finite number >= 0",
    ),
    (
        lambda g: set_aux_loss_scale(nn.Linear(2, 2), 1.0),
        "sonic.layers.set_aux_loss_scale: model is a Linear without a sonic.MoE in it, "
        "expected a model with at least one sonic.MoE",
    ),
    # ---- what would run
    (
        explain(op="up_projection"),
        "sonic.kernels.explain: op is 'up_projection', expected one of " + ", ".join(map(repr, kernels.dispatch.OPS)),
    ),
    (explain(num_tokens=0), "sonic.kernels.explain: num_tokens is 0, expected a positive integer"),
    (explain(hidden_size=8.0), "sonic.kernels.explain: hidden_size is 8.0, expected a positive integer"),
    (explain(top_k=5), "sonic.kernels.explain: top_k is 5, expected at most num_experts = 4"),
    (explain(activation="swish"), f"sonic.kernels.explain: activation is 'swish', expected {ACTIVATIONS}"),
    (explain(activation=None), f"sonic.kernels.explain: activation is None, expected {ACTIVATIONS}"),
    (explain(dtype=torch.int32), f"sonic.kernels.explain: dtype is torch.int32, expected {DTYPES}"),
    (explain(dtype="bfloat16"), f"sonic.kernels.explain: dtype is 'bfloat16', expected {DTYPES}"),
    (explain(arch="sm_90"), "sonic.kernels.explain: arch is 'sm_90', expected a positive integer"),
    (explain(arch=9.0), "sonic.kernels.explain: arch is 9.0, expected a positive integer"),
    (explain(backend="fast"), f"sonic.kernels.explain: backend is 'fast', expected {BACKENDS}"),
    (
        lambda g: kernels.unusable_reasons("fast", "cpu"),
        f"sonic.kernels.unusable_reasons: backend is 'fast', expected {BACKENDS}",
    ),
    # ---- ops, for those who call them directly
    (
        experts_op([0, 3, 3, 8, 10], torch.int64),
        "sonic.up_proj: expert_offset_E1 is int64, expected int32",
    ),
    (experts_op([0, 3, 10]), "sonic.up_proj: w1_EUD is (4, 12, 8), expected (E, U, D) = (2, U, 8)"),
]

# What can only be seen by looking at the values: found by the first thing that reads them, before anything is computed.
WRONG_VALUES: list[tuple[Callable[[Given], object], str]] = [
    (
        lambda g: sonic.RoutingPlan.from_topk(torch.tensor([[0, 4]]), E),
        "sonic.RoutingPlan: expert_index is out of range (4), expected 0 <= expert_index < 4",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(torch.tensor([[0, -1]], dtype=torch.int8), E),
        "sonic.RoutingPlan: expert_index is out of range (-1), expected 0 <= expert_index < 4",
    ),
    (
        lambda g: sonic.RoutingPlan.from_topk(torch.tensor([[0, 1], [2, 2]]), E),
        "sonic.RoutingPlan: expert_index is a duplicate (token 1 goes to expert 2 more than once), "
        "expected each token at most once per expert",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(torch.tensor([0, 5]), torch.tensor([0, 1]), T, E),
        "sonic.RoutingPlan: token_index is out of range (5), expected 0 <= token_index < 5",
    ),
    (
        lambda g: sonic.RoutingPlan.from_pairs(torch.tensor([3, 1, 3]), torch.tensor([2, 2, 2]), T, E),
        "sonic.RoutingPlan: expert_index is a duplicate (token 3 goes to expert 2 more than once), "
        "expected each token at most once per expert",
    ),
    (
        experts_op([0, 5, 3, 8, 10]),
        "sonic.kernels.reference: expert_offset_E1 is [0, 5, 3, 8, 10], "
        "expected 0 first, then never falling, at most R = 10",
    ),
    (
        experts_op([1, 3, 3, 8, 10]),
        "sonic.kernels.reference: expert_offset_E1 is [1, 3, 3, 8, 10], "
        "expected 0 first, then never falling, at most R = 10",
    ),
    (
        experts_op([0, 3, 3, 8, 11]),
        "sonic.kernels.reference: expert_offset_E1 is [0, 3, 3, 8, 11], "
        "expected 0 first, then never falling, at most R = 10",
    ),
]


def table(rows: list[tuple[Callable[[Given], object], str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("call", "message"), [pytest.param(call, message, id=message.split(", expected")[0]) for call, message in rows]
    )


def refuse(call: Callable[[Given], object], message: str) -> None:
    """Make the call; see that the words are right, and that nothing that it was given has changed."""
    given = Given()
    before = copy.deepcopy(given.tensors())
    state = copy.deepcopy(given.layer.state_dict())
    with pytest.raises(ValueError) as refused:
        call(given)
    assert str(refused.value) == message
    assert FORM.fullmatch(message)
    for name, tensor in given.tensors().items():
        assert torch.equal(tensor, before[name]) and tensor.grad is None, name
    layer = given.layer
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert layer.training and layer.aux_loss_scale == 1.0


@table(WRONG)
def test_refused(call: Callable[[Given], object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SONIC_BACKEND", raising=False)
    kernels.reset_counts()
    refuse(call, message)
    computed = {op for op, _ in kernels.counts()}
    if "routing." in message or "returned" in message:  # what a router returns is seen after routing
        computed.discard("topk_softmax")
    assert computed <= {"build_plan"}, "something was computed first"


@table(WRONG_VALUES)
def test_wrong_values_are_refused(call: Callable[[Given], object], message: str) -> None:
    refuse(call, message)


def test_the_table_is_long_and_names_each_call_once() -> None:
    messages = [message for _, message in WRONG + WRONG_VALUES]
    assert len(messages) >= 100
    assert len(set(messages)) >= len(messages) - 3  # a few mistakes end in the same words


def test_everything_given_fits() -> None:
    """The calls of the table are wrong for the one thing that they change."""
    given = Given()
    for call in (moe(), router(), layer_of(lambda g: g.x), moe_mlp(), expert_mlp(), explain()):
        assert call(given) is not None
    assert moe_mlp(b1=lambda g: g.b1, b2=lambda g: g.b2)(given).shape == (T, D)
    assert experts_op([0, 3, 3, 8, 10])(given)[1].shape == (R, N)


@pytest.mark.parametrize("name", ["fast", "Triton", "reference "])
def test_environment_names_a_backend_that_does_not_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SONIC_BACKEND", name)
    refuse(explain(), f"sonic.kernels.explain: SONIC_BACKEND is {name!r}, expected {BACKENDS}")
    with pytest.raises(ValueError, match=re.escape(f": SONIC_BACKEND is {name!r}, expected {BACKENDS}")):
        Given().layer(torch.randn(T, D))


def test_a_refused_scale_changes_no_layer() -> None:
    model = nn.Sequential(Given().layer, Given().layer)
    set_aux_loss_scale(model, 0.5)
    for scale in (nan, infinity, -0.25):
        with pytest.raises(ValueError):
            set_aux_loss_scale(model, scale)
    assert [layer.aux_loss_scale for layer in model] == [0.5, 0.5]


def test_a_refused_call_leaves_gradients_alone() -> None:
    given = Given()
    given.layer(given.x).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in given.layer.named_parameters()}
    with pytest.raises(ValueError):
        given.layer(given.x.double())
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in given.layer.named_parameters())


def test_refused_under_autocast_too() -> None:
    given = Given()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refuse(layer_of(lambda g: g.x[:, 1:]), "sonic.MoE: x is (5, 7), expected (..., D) = (..., 8)")
        refuse(moe_mlp(w1=lambda g: g.w1.mT), "sonic.moe_mlp: w1 is (4, 8, 12), expected (E, U, D) = (4, U, 8)")
    assert given.layer(given.x).dtype == torch.float32


def test_refused_while_compiling() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, layer: layer(x), backend="eager")
    with pytest.raises(ValueError, match=r"^sonic\.MoE: x is \(5, 7\), expected \(\.\.\., D\) = \(\.\.\., 8\)$"):
        compiled(torch.randn(T, 7), Given().layer)
