"""A fuzzer of plans, ops and layers: draws any number of cases and holds each against a formula in float64.

    python -m tests.robustness.fuzz --cases 20000 --seed 1
    python -m tests.robustness.fuzz --minutes 5 --seed 2 --triton 0.05
    python -m tests.robustness.fuzz --case '{...}'                          one case again, as a failure prints it

Of every case it is asked that the result is right, that the same call gives the same bits again, that no argument is
changed and none comes back as a result, that fakes foretell shapes and dtypes, that rows of nobody neither give nor
take anything, and that NaN and infinities stay with the tokens (or the experts) that they came to.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import pytest
import torch
from torch import Tensor

import sonic
from sonic.kernels import ops
from sonic.routing import CapacityDropping, ExpertChoiceRouter, TokenRounding, TopKRouter
from tests.helpers import GATED, make_blocks_small, take_16bit_path
from tests.robustness import oracles
from tests.robustness.cases import GEMMS, KINDS, POISONS, Case, Routed, Values, arranged, random_case

Named = dict[str, Tensor]

OUTPUTS = {
    "up_proj": ("h", "a"),
    "down_proj": ("y",),
    "combine": ("out",),
    "down_proj_bwd_input": ("dh", "scaled_a", "dscores"),
    "down_proj_bwd_weight": ("dw2", "db2"),
    "up_proj_bwd_input": ("dx",),
    "up_proj_bwd_weight": ("dw1", "db1"),
}
UNDEFINED_FOR_NOBODY = ("h", "a", "scaled_a")
BY_EXPERT = ("dw1", "db1", "dw2", "db2")
REPEATS = 2  # calls whose bits are compared


# ---------------------------------------------------------------- what is asked of every call


def same(got: Tensor, want: Tensor) -> bool:
    """Equal to the last bit, or NaN in both."""
    return got.shape == want.shape and bool(((got == want) | ((got != got) & (want != want))).all())


def near(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within some roundings of ``dtype``, measured on the scale of the result, which is at least that of the inputs."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.numel() == 0:
        return
    got, want = got.detach().double(), want.detach().double()
    assert bool(torch.isfinite(got).all()), f"{name}: not finite"
    roundings = 32 if dtype in (torch.bfloat16, torch.float16) else 512
    allowed = roundings * torch.finfo(dtype).eps * (1 + float(want.square().mean().sqrt()))
    error = float((got - want).abs().max())
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def called(op: str, args: tuple[Any, ...], names: tuple[str, ...]) -> Named:
    """The op's outputs by name; twice the same, nothing changed, nothing shared, as the fake foretold."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    function = getattr(ops, op)
    first, *others = (tuple(r) if not isinstance(r := function(*args), Tensor) else (r,) for _ in range(REPEATS))
    told = function(*[arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args])
    told = (told,) if isinstance(told, Tensor) else tuple(told)
    places = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor) and arg.numel()}
    for again in others:
        for name, one, two in zip(names, first, again, strict=True):
            assert same(one, two), f"{op}: {name} differs when computed again"
    for name, one, fake in zip(names, first, told, strict=True):
        assert one.shape == fake.shape and one.dtype == fake.dtype, f"{op}: {name} is not what the fake foretold"
        assert not one.numel() or one.untyped_storage().data_ptr() not in places, f"{op}: {name} shares memory"
    for arg, was in zip(args, before, strict=True):
        assert not isinstance(arg, Tensor) or same(arg, was), f"{op}: an argument was changed"
    return dict(zip(names, first, strict=True))


def owned(routed: Routed, name: str, value: Tensor) -> Tensor:
    """Without the rows that belong to nobody, where those are undefined."""
    has_rows = name not in BY_EXPERT and name != "out"
    return value[routed.expert_R >= 0] if has_rows and name in UNDEFINED_FOR_NOBODY else value


def stays_apart(
    op: str, case: Case, routed: Routed, clean: Named, broken: Named, rows: Tensor, where_rows: bool
) -> None:
    """What ``rows`` (bool) do not touch is the same bit by bit; what they touch by themselves is no longer finite."""
    touched_experts = torch.zeros(case.E, dtype=torch.bool)
    touched_experts[routed.expert_R[rows & (routed.expert_R >= 0)]] = True
    touched_tokens = torch.zeros(routed.num_tokens, dtype=torch.bool)
    touched_tokens[routed.token_R[rows]] = True
    for name in clean:
        if clean[name].shape[0] == 0:
            continue
        touched = touched_experts if name in BY_EXPERT else touched_tokens if name == "out" else rows
        if name in UNDEFINED_FOR_NOBODY:
            touched = touched | (routed.expert_R < 0)
        apart = ~touched
        assert same(broken[name][apart], clean[name][apart]), f"{op}: {case.poison} leaks into {name}"
    if where_rows and bool(rows.any()):
        name = next(iter(clean))
        hit = rows & (routed.expert_R >= 0)
        if clean[name].shape[0] == hit.shape[0] and clean[name].shape[1:].numel():
            finite = torch.isfinite(broken[name][hit].flatten(1)).all(1)
            assert not bool(finite.any()), f"{op}: {case.poison} is lost in {name}"


# ---------------------------------------------------------------- single ops


def check_gemm(case: Case) -> None:
    """One of the seven ops on rows."""
    values, op = Values(case), case.kind
    if op == "combine":
        case_routing = case.routing if case.routing != "in order" else "topk"
        values.case = case = Case(**{**vars(case), "routing": case_routing})
    routed = values.routed()
    R, T, D, N, U, E = routed.num_rows, routed.num_tokens, case.D, case.N, case.U, case.E
    normal, wide = values.normal, torch.promote_types(case.torch_dtype, torch.float32)
    gathered = normal(T, D)
    scores = normal(R, dtype=wide if case.flag(0) else case.torch_dtype) if case.scored else None
    kinds = {"activation": case.activation, "glu_layout": case.glu_layout}
    tail = routed.expert_R < 0
    nobody: list[Tensor] = []
    if op == "up_proj":
        w1, b1 = normal(E, U, D, scale=D**-0.5), normal(E, U) if case.bias else None
        want = oracles.up_proj(case, routed, gathered, w1, b1)
        nobody = [gathered] if routed.plan is None else []
        poisoned, by_token = gathered, True
        rest = (routed.token_map, routed.offset_E1, *kinds.values(), not case.flag(1), case.backend)
        args = lambda m: (m, w1, b1, *rest)  # noqa: E731
        if case.flag(1):
            want["h"] = want["h"][:0]
    elif op == "down_proj":
        a, w2, b2 = normal(R, N), normal(E, D, N, scale=N**-0.5), normal(E, D) if case.bias else None
        want = oracles.down_proj(routed, a, w2, b2, scores)
        nobody, poisoned, by_token = [a], a, False
        args = lambda m: (m, w2, b2, scores, routed.offset_E1, case.backend)  # noqa: E731
    elif op == "combine":
        y, residual = normal(R, D), normal(T, D) if case.bias else None
        assert routed.plan is not None, "combine has maps"
        maps = routed.plan.row_by_token_R, routed.plan.token_offset_T1
        want = oracles.combine(routed, y, scores, residual)
        poisoned, by_token = y, False
        args = lambda m: (m, scores, *maps, residual, case.backend)  # noqa: E731
    elif op == "down_proj_bwd_input":
        h, w2, b2 = normal(R, U), normal(E, D, N, scale=N**-0.5), normal(E, D) if case.bias else None
        want = oracles.down_proj_bwd_input(case, routed, gathered, h, w2, b2, scores)
        nobody = [h, gathered] if routed.plan is None else [h]
        needs = (not case.flag(1), not case.flag(2))
        poisoned, by_token = gathered, True
        args = lambda m: (  # noqa: E731
            *(m, h, w2, b2, scores, routed.token_map, routed.offset_E1),
            *(*kinds.values(), *needs, case.backend),
        )
        want["dh"], want["dscores"] = want["dh"][: R * needs[0]], want["dscores"][: R * needs[1]]
    elif op == "down_proj_bwd_weight":
        a, needs = normal(R, N), (not case.flag(1), case.bias)
        want = oracles.down_proj_bwd_weight(routed, gathered, a, scores)
        nobody = [a, gathered] if routed.plan is None else [a]
        poisoned, by_token = gathered, True
        args = lambda m: (m, a, scores, routed.token_map, routed.offset_E1, *needs, None, case.backend)  # noqa: E731
        want = {"dw2": want["dw2"][: E * needs[0]], "db2": want["db2"][: E * needs[1]]}
    elif op == "up_proj_bwd_input":
        dh, w1 = normal(R, U), normal(E, U, D, scale=D**-0.5)
        want = oracles.up_proj_bwd_input(routed, dh, w1)
        nobody, poisoned, by_token = [dh], dh, False
        args = lambda m: (m, w1, routed.offset_E1, case.backend)  # noqa: E731
    else:
        dh, needs = normal(R, U), (not case.flag(1), case.bias)
        want = oracles.up_proj_bwd_weight(routed, dh, gathered)
        nobody = [dh, gathered] if routed.plan is None else [dh]
        poisoned, by_token = gathered, True
        args = lambda m: (dh, m, routed.token_map, routed.offset_E1, *needs, None, case.backend)  # noqa: E731
        want = {"dw1": want["dw1"][: E * needs[0]], "db1": want["db1"][: E * needs[1]]}
    if case.flag(3) and bool(tail.any()):  # NaN in rows of nobody
        for matrix in nobody:
            if matrix.stride(0):
                matrix[tail] = torch.nan
    names = OUTPUTS[op]
    got = called(op, args(poisoned), names)
    for name in names:
        full = got[name].shape[0] == routed.num_rows
        near(
            f"{op}: {name}",
            *((owned(routed, name, v) if full else v) for v in (got[name], want[name])),
            case.torch_dtype,
        )
    if case.poison and poisoned.shape[0]:
        victim = values.integer(0, poisoned.shape[0] - 1)
        matrix = poisoned.clone(memory_format=torch.contiguous_format)
        clean = called(op, args(matrix), names)
        matrix = matrix.clone()
        matrix[victim] = POISONS[case.poison]
        rows = routed.token_R == victim if by_token else torch.arange(R) == victim
        stays_apart(op, case, routed, clean, called(op, args(matrix), names), rows, op in ("up_proj", "down_proj"))


def check_experts(case: Case) -> None:
    """Forward and backward of the experts as ops: with H kept and without, with any set of gradients."""
    values = Values(case)
    routed = values.routed()
    R, T, D = routed.num_rows, routed.num_tokens, case.D
    leaves = expert_leaves(case, values, T)
    wide = torch.promote_types(case.torch_dtype, torch.float32)
    scores = values.normal(R, dtype=wide) if case.scored else None
    maps = (None, None) if routed.plan is None else (routed.plan.row_by_token_R, routed.plan.token_offset_T1)
    names = (case.activation, case.glu_layout)
    weights = (leaves["w1"], leaves["w2"], leaves.get("b1"), leaves.get("b2"))
    rows = (scores, routed.offset_E1, routed.token_map)
    dout = values.normal(T, D)
    need_h = case.kind == "experts_bwd" or case.flag(0)
    forward = called("experts", (leaves["x"], *weights, *rows, *maps, *names, need_h, case.backend), ("out", "h"))
    exact = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    exact_scores = None if scores is None else scores.double().requires_grad_()
    out = oracles.mlp(case, routed, *(exact.get(n) for n in ("x", "w1", "w2", "b1", "b2")), exact_scores)  # type: ignore[arg-type]
    near("experts: out", forward["out"], out, case.torch_dtype)
    if case.kind == "experts":
        return
    needs = [case.flag(bit) for bit in range(6)]
    needs[3], needs[4] = needs[3] and case.bias, needs[4] and case.bias
    h = forward["h"] if case.flag(6) else None
    slots = routed.plan.slot_of_row_R if routed.plan is not None and case.routing == "topk" and case.flag(7) else None
    args = (dout, leaves["x"], h, *weights, *rows, *names, *needs, slots, None, None, case.backend)
    got = called("experts_bwd", args, ("x", "w1", "w2", "b1", "b2", "scores"))
    wanted = [*(exact.get(name) for name in ("x", "w1", "w2", "b1", "b2")), exact_scores]
    present = [leaf for leaf in wanted if leaf is not None]
    grads = iter(torch.autograd.grad(out, present, dout.double(), allow_unused=True, materialize_grads=True))
    for (name, value), leaf, need in zip(got.items(), wanted, needs, strict=True):
        grad = None if leaf is None else next(grads)
        if not need:
            assert value.shape[0] == 0, f"experts_bwd: {name} was not asked for"
        elif grad is not None:
            near(f"experts_bwd: d{name}", value, grad, case.torch_dtype)


def expert_leaves(case: Case, values: Values, num_rows: int) -> Named:
    """x, w1, w2 and, if wanted, b1 and b2."""
    D, N, U, E = case.D, case.N, case.U, case.E
    leaves = {
        "x": values.normal(num_rows, D),
        "w1": values.normal(E, U, D, scale=D**-0.5),
        "w2": values.normal(E, D, N, scale=N**-0.5),
    }
    return leaves | ({"b1": values.normal(E, U), "b2": values.normal(E, D)} if case.bias else {})


# ---------------------------------------------------------------- plans and routing


def check_plan(case: Case) -> None:
    """Maps that fit together, from indices of any integer dtype and strides."""
    values = Values(case)
    dtype = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)[case.option % 5]
    if case.kind == "plan_topk":
        index = values.expert_index()
        plan = sonic.RoutingPlan.from_topk(arranged(index.to(dtype), case.strides[0]), case.E, backend=case.backend)
        token_P, expert_P = torch.arange(case.T).repeat_interleave(case.K), index.reshape(-1)
        assert plan.scores_shape == (case.T, case.K) and plan.top_k == case.K, "plan: shape of its scores"
    else:
        token_P, expert_P = values.pairs()
        given = (arranged(index.to(dtype), how) for index, how in zip((token_P, expert_P), case.strides, strict=False))
        plan = sonic.RoutingPlan.from_pairs(*given, case.T, case.E, backend=case.backend)
        assert plan.scores_shape == (token_P.shape[0],) and plan.top_k is None, "plan: shape of its scores"
    order = torch.argsort(expert_P * max(case.T, 1) + token_P, stable=True)
    want = {
        "slot_of_row_R": order,
        "token_of_row_R": token_P[order],
        "expert_offset_E1": torch.bincount(expert_P, minlength=case.E).cumsum(0),
        "token_offset_T1": torch.bincount(token_P, minlength=case.T).cumsum(0),
    }
    for name, value in want.items():
        got = getattr(plan, name)
        value = torch.nn.functional.pad(value, (1, 0)) if name.endswith("1") else value
        assert got.dtype == torch.int32 and torch.equal(got.long(), value), f"plan: {name}"
    visits = plan.row_by_token_R.long()
    assert torch.equal(visits.sort().values, torch.arange(len(order))), "plan: row_by_token_R is no permutation"
    assert bool((token_P[order][visits].diff() >= 0).all()), "plan: row_by_token_R does not go token by token"
    if token_P.shape[0]:  # a pair that comes twice, an index that there is none of
        again = torch.cat((token_P, token_P[:1])), torch.cat((expert_P, expert_P[:1]))
        beyond = token_P, torch.where(torch.arange(len(expert_P)) == len(expert_P) // 2, case.E, expert_P)
        for wrong in (again, beyond):
            with pytest.raises(ValueError, match=r"sonic\.RoutingPlan: expert_index is"):
                sonic.RoutingPlan.from_pairs(*wrong, case.T, case.E, backend="reference")


def routing_options(case: Case) -> dict[str, Any]:
    """Options of the top-K op that go with each other."""
    score_function = ("softmax", "sigmoid", "sqrtsoftplus")[case.option % 3]
    divisors = [n for n in range(1, case.E + 1) if case.E % n == 0]
    num_groups = divisors[case.option // 8 % len(divisors)]
    reach = [k for k in range(1, num_groups + 1) if case.E // num_groups * k >= case.K]
    return {
        "score_function": score_function,
        "pre_softmax": score_function == "softmax" and case.flag(6),
        "norm_topk_prob": case.flag(7),
        "scaling_factor": 2.5 if case.flag(8) else 1.0,
        "num_groups": num_groups,
        "group_topk": reach[case.option // 64 % len(reach)],
    }


def check_topk(case: Case) -> None:
    """Experts, scores, load, and the derivative of the scores."""
    values, options = Values(case), routing_options(case)
    wide = torch.promote_types(case.torch_dtype, torch.float32)
    logits = values.normal(case.T, case.E)
    bias = values.normal(case.E, dtype=torch.float32) if case.bias else None
    args = (*(options[k] for k in ("score_function", "pre_softmax", "norm_topk_prob", "scaling_factor")), bias)
    groups = (options["num_groups"], options["group_topk"], case.backend)
    names = ("scores", "expert", "prob", "load")
    got = called("topk_softmax", (logits, case.K, *args, *groups), names)
    expert = got["expert"].long()
    assert got["scores"].dtype == wide and expert.shape == (case.T, case.K), "topk_softmax: form"
    assert bool(((expert >= 0) & (expert < case.E)).all()), "topk_softmax: an expert that there is none of"
    assert bool((expert.sort(1).values.diff(dim=1) > 0).all()), "topk_softmax: an expert twice"
    count = torch.bincount(expert.reshape(-1), minlength=case.E)
    assert torch.equal(got["load"].sum(1), count) and not bool(got["load"][:, -1].any()), "topk_softmax: load"
    preference = logits.to(wide)
    if bias is None and options["num_groups"] == 1:
        assert same(preference.gather(1, expert), preference.topk(case.K, dim=1).values), "topk_softmax: not the best"
    exact = logits.double().requires_grad_()
    scores = oracles.topk_scores(
        exact, expert, *(options[k] for k in ("score_function", "pre_softmax", "norm_topk_prob", "scaling_factor"))
    )
    near("topk_softmax: scores", got["scores"], scores, wide)
    if case.kind == "topk_softmax_bwd":
        dscores = values.normal(case.T, case.K, dtype=wide)
        over_all = options["pre_softmax"] and not options["norm_topk_prob"]
        last = (case.E, options["score_function"], options["norm_topk_prob"], options["scaling_factor"], case.backend)
        back = (dscores, got["expert"], got["prob"], logits if over_all else None, *last)
        dlogits = called("topk_softmax_bwd", back, ("dlogits",))["dlogits"]
        (want,) = torch.autograd.grad(scores, exact, dscores.double())
        near("topk_softmax_bwd: dlogits", dlogits, want, wide)
    elif case.poison and case.T:
        plain = logits.clone(memory_format=torch.contiguous_format)  # other strides round in another order
        got = called("topk_softmax", (plain, case.K, *args, *groups), names)
        broken, victim = plain.clone(), values.integer(0, case.T - 1)
        broken[victim, values.integer(0, case.E - 1)] = POISONS[case.poison]
        after = called("topk_softmax", (broken, case.K, *args, *groups), names)
        others = torch.arange(case.T) != victim
        for name in ("scores", "expert", "prob"):
            assert same(after[name][others], got[name][others]), f"topk_softmax: {case.poison} leaks into {name}"
        assert case.poison == "-inf" or bool(after["scores"][victim].isnan().all()), "topk_softmax: scores of NaN"
        chosen = after["expert"].long()
        assert bool(((chosen >= 0) & (chosen < case.E)).all()), "topk_softmax: an expert that there is none of"
        assert bool((chosen.sort(1).values.diff(dim=1) > 0).all()), "topk_softmax: an expert twice, of NaN"
        sonic.RoutingPlan.from_topk(chosen, case.E, load=after["load"], backend=case.backend)


def check_best_of_columns(case: Case) -> None:
    """The same tokens as sorting every column takes, ties included."""
    values = Values(case)
    logits = values.normal(case.T, case.E)
    if case.flag(0):
        logits = (logits.double() * 2).round().to(logits.dtype)  # many equals
    shift = values.normal(case.T) if case.bias else None
    plan = sonic.RoutingPlan.from_topk(values.expert_index(), case.E) if case.scored else None
    wanted = [values.integer(0, case.T) for _ in range(case.E)]
    maps = (None,) * 4
    table = logits if shift is None else logits - shift[:, None]
    if plan is not None:
        maps = (plan.token_of_row_R, plan.expert_offset_E1, plan.row_by_token_R, plan.token_offset_T1)
        expert_R = torch.arange(case.E).repeat_interleave(plan.tokens_per_expert().long())
        table = table.clone()
        table[plan.token_of_row_R.long(), expert_R] = -torch.inf
    got = called("best_of_columns", (logits, shift, wanted, *maps, None, case.backend), ("token", "expert"))
    best = [table[:, e].sort(descending=True, stable=True).indices[: wanted[e]] for e in range(case.E)]
    assert torch.equal(got["token"], torch.cat(best)), "best_of_columns: token"
    assert torch.equal(got["expert"], torch.arange(case.E).repeat_interleave(torch.tensor(wanted))), "expert"


# ---------------------------------------------------------------- whole layers


def check_mlp(case: Case) -> None:
    """``moe_mlp`` and ``expert_mlp``, forward and every gradient, and where NaN goes."""
    if case.kind == "expert_mlp":
        case = Case(**{**vars(case), "routing": "in order"})
    elif case.routing == "in order":
        case = Case(**{**vars(case), "routing": "topk"})
    values = Values(case)
    routed = values.routed()
    wide = torch.promote_types(case.torch_dtype, torch.float32)
    leaves = expert_leaves(case, values, routed.num_tokens)
    options = {"activation": case.activation, "glu_layout": case.glu_layout, "save": case.save, "backend": case.backend}
    count_E = routed.offset_E1.diff()
    slot_R = torch.arange(routed.num_rows)
    if routed.plan is not None:
        slot_R = routed.plan.slot_of_row_R.long()
        leaves["scores"] = values.normal(*routed.plan.scores_shape, dtype=wide if case.flag(0) else None)
    elif case.scored:
        leaves["scores"] = values.normal(routed.num_rows, dtype=wide if case.flag(0) else None)
    dout = values.normal(routed.num_tokens, case.D)
    needed = [name for bit, name in enumerate(leaves) if not case.flag(bit + 2)] or ["x"]

    def run(given: Named) -> tuple[Named, Named]:
        given = {name: leaf.detach().requires_grad_(name in needed) for name, leaf in given.items()}
        before = {name: leaf.clone() for name, leaf in given.items()}
        if routed.plan is not None:
            out = sonic.moe_mlp(**given, plan=routed.plan, **options)
        else:
            rows, scores = given["x"], given.get("scores")
            more = {name: given[name] for name in ("b1", "b2") if name in given}
            out = sonic.expert_mlp(rows, given["w1"], given["w2"], count_E, scores, **more, **options)
        grads = torch.autograd.grad(out, [given[name] for name in needed], dout)
        assert all(same(given[name], before[name]) for name in given), "an argument was changed"
        return {"out": out.detach()}, dict(zip(needed, grads, strict=True))

    out, grads = run(leaves)
    for _ in range(REPEATS - 1):
        out2, grads2 = run(leaves)
        assert same(out["out"], out2["out"]) and all(same(grads[n], grads2[n]) for n in needed), (
            "differs when done again"
        )
    exact = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    scores64 = exact["scores"].reshape(-1)[slot_R] if "scores" in exact else None
    want = oracles.mlp(case, routed, *(exact.get(n) for n in ("x", "w1", "w2", "b1", "b2")), scores64)  # type: ignore[arg-type]
    near("out", out["out"], want, case.torch_dtype)
    inputs = [exact[name] for name in needed]
    for name, grad in zip(
        needed, torch.autograd.grad(want, inputs, dout.double(), allow_unused=True, materialize_grads=True), strict=True
    ):
        assert grads[name].dtype == leaves[name].dtype, f"d{name}: dtype"
        near(f"d{name}", grads[name], grad, case.torch_dtype)
    if not case.poison or not routed.num_tokens:
        return
    victim = values.integer(0, routed.num_tokens - 1)
    plain = {name: leaf.clone(memory_format=torch.contiguous_format) for name, leaf in leaves.items()}
    (clean, clean_grads), broken = run(plain), dict(plain)
    broken["x"] = plain["x"].clone()
    broken["x"][victim] = POISONS[case.poison]
    out, grads = run(broken)
    others = torch.arange(routed.num_tokens) != victim
    assert same(out["out"][others], clean["out"][others]), f"{case.poison} leaks into other tokens"
    if "x" in needed:
        assert same(grads["x"][others], clean_grads["x"][others]), f"{case.poison} leaks into dx"
    rows = (routed.token_R == victim) & (routed.expert_R >= 0)
    apart = torch.ones(case.E, dtype=torch.bool)
    apart[routed.expert_R[rows]] = False
    for name in set(needed) & {"w1", "w2", "b1", "b2"}:
        assert same(grads[name][apart], clean_grads[name][apart]), f"{case.poison} leaks into d{name}"


def router_of(case: Case) -> torch.nn.Module:
    """A router of any kind."""
    options = routing_options(case)
    options["topk_scaling_factor"] = options.pop("scaling_factor")
    choice = case.option // 2 % 6
    losses = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001} if case.flag(9) else {}
    # float32 scores beside 16-bit experts are what routers are for
    common: dict[str, Any] = {"dtype": case.torch_dtype, "backend": case.backend, "bias": case.flag(5), **losses}
    if choice == 0:
        return ExpertChoiceRouter(case.D, case.E, case.K, score_function=options["score_function"], **common)
    router = TopKRouter(case.D, case.E, case.K, enable_expert_bias=case.scored, **options, **common)
    if choice == 1:
        return CapacityDropping(router, policy="score" if case.skew else "position", capacity_factor=0.7)
    if choice in (2, 3):
        rule = ("nearest", "stochastic", "nearest_score", "balanced", "up", "down")[case.option // 16 % 6]
        return TokenRounding(router, rule=rule, tile_rows=min((1, 2, 3, 4)[case.option // 4 % 4], max(case.T, 1)))
    return router


def check_layer(case: Case) -> None:
    """A layer with any router, in training and in eval, against the formula on the routing that it tells of."""
    values = Values(case)
    torch.manual_seed(case.seed)
    layer = sonic.MoE(
        case.D,
        case.N,
        case.E,
        case.K,
        activation=case.activation,
        glu_layout=case.glu_layout,
        bias=case.bias,
        save=case.save,
        backend=case.backend,
        router=router_of(case),
        shared_intermediate_size=case.N if case.flag(3) else 0,
        dtype=case.torch_dtype,
    ).train(case.flag(4) or case.skew)
    shape = (case.T, case.D) if case.flag(1) else (1, case.T, case.D) if case.flag(2) else (case.T, 1, case.D)
    x = values.normal(*shape).requires_grad_()
    torch.manual_seed(case.seed)
    y, routing = layer(x, return_routing=True)
    plan = routing.plan
    assert y.shape == x.shape and y.dtype == x.dtype, "layer: form"
    expert_R = torch.arange(case.E).repeat_interleave(plan.tokens_per_expert().long())
    routed = Routed(expert_R, plan.token_of_row_R.long(), plan.expert_offset_E1, plan, case.T)
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x64 = x.detach().double().reshape(case.T, case.D)
    scores64 = routing.scores.detach().double().reshape(-1)[plan.slot_of_row_R.long()]
    out = oracles.mlp(case, routed, x64, *(exact.get(n) for n in ("w1", "w2", "b1", "b2")), scores64)  # type: ignore[arg-type]
    if layer.shared is not None:
        stack = [None if (p := exact.get(f"shared.{n}")) is None else p[None] for n in ("w1", "w2", "b1", "b2")]
        everyone = torch.zeros(case.T, dtype=torch.long)
        alone = Routed(everyone, torch.arange(case.T), torch.tensor([0, case.T]), None, case.T)
        out = out + oracles.mlp(case, alone, x64, *stack, None)  # type: ignore[arg-type]
    near("layer: y", y.reshape(case.T, case.D), out, case.torch_dtype)
    dy = values.normal(*shape)
    y.backward(dy)
    torch.autograd.backward(out, dy.double().reshape(case.T, case.D))
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), (
            f"layer: d{name} is not finite"
        )
        wanted = exact[name].grad
        if not name.startswith("router"):
            near(
                f"layer: d{name}",
                parameter.grad,
                torch.zeros_like(exact[name]) if wanted is None else wanted,
                case.torch_dtype,
            )
    assert x.grad is not None and bool(torch.isfinite(x.grad).all()), "layer: dx is not finite"
    for _ in range(REPEATS - 1):
        torch.manual_seed(case.seed)
        assert same(layer(x), y), "layer: differs when called again"
    if case.poison and case.T:
        broken = x.detach().clone(memory_format=torch.contiguous_format)
        victim = values.integer(0, case.T - 1)
        broken.view(case.T, case.D)[victim] = POISONS[case.poison]
        if isinstance(layer.router, (TokenRounding, ExpertChoiceRouter)) and layer.training:
            with contextlib.suppress(ValueError):  # these rank tokens by their logits, and may refuse NaN
                layer(broken)
            return
        torch.manual_seed(case.seed)
        poisoned = layer(broken).detach().reshape(case.T, case.D)
        others = torch.arange(case.T) != victim
        if isinstance(layer.router, CapacityDropping):  # other tokens may be dropped than before, none may be NaN
            assert bool(torch.isfinite(poisoned[others]).all()), f"layer: {case.poison} leaks"
        else:
            near("layer: others", poisoned[others], y.detach().reshape(case.T, case.D)[others], case.torch_dtype)


CHECKS: dict[str, Callable[[Case], None]] = {
    "plan_topk": check_plan,
    "plan_pairs": check_plan,
    **dict.fromkeys(GEMMS, check_gemm),
    "experts": check_experts,
    "experts_bwd": check_experts,
    "topk_softmax": check_topk,
    "topk_softmax_bwd": check_topk,
    "best_of_columns": check_best_of_columns,
    "moe_mlp": check_mlp,
    "expert_mlp": check_mlp,
    "layer": check_layer,
}


def check(case: Case) -> None:
    """Try a case.

    Raises:
        AssertionError, or whatever the library raised: it failed.
    """
    with pytest.MonkeyPatch.context() as patch:
        take_16bit_path(patch, "native" if case.native else "widened")
        if case.small_blocks:
            make_blocks_small(patch, rows=2)
        CHECKS[case.kind](case)


# ---------------------------------------------------------------- the command


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is never clean by luck, as in the tests."""
    from tests.conftest import _poisoned

    with _poisoned():
        yield


def main(argv: list[str] | None = None) -> int:
    """Draw cases, print how many of each kind and what failed; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="how many to draw")
    parser.add_argument("--minutes", type=float, help="draw until then, however many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--triton", type=float, default=0.01, metavar="SHARE", help="of cases for Triton's interpreter")
    parser.add_argument("--case", help="try this one, as a failure prints it")
    parser.add_argument("--keep-going", action="store_true", help="do not stop after 20 failures")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.case:
        with poisoned_memory():
            check(Case.of_json(options.case))
        print("ok")
        return 0
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    with poisoned_memory():
        number = 0
        while (number < options.cases) if end is None else (time.monotonic() < end):
            case = random_case(options.seed, number, options.kinds, options.triton)
            number += 1
            counts[f"{case.kind} ({case.backend})"] += 1
            try:
                check(case)
            except Exception as error:  # whatever it is, it is a finding
                failures[case.kind] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(f"FAILED {type(error).__name__} {str(error)[:300]} ({where.filename}:{where.lineno})")
                print(f"  {case.line()}", flush=True)
                if failures.total() >= 20 and not options.keep_going:
                    break
    for name in sorted(counts):
        print(f"{name:36} {counts[name]:7}")
    print(f"{counts.total()} cases, {failures.total()} failures" + (f": {dict(failures)}" if failures else ""))
    return 1 if failures else 0


assert set(CHECKS) == set(KINDS), "every kind has its check"
assert set(GATED) <= set(sonic.ACTIVATIONS), "activations of the helpers are those of the library"

if __name__ == "__main__":
    sys.exit(main())
