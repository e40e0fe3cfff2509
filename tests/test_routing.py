"""The top-K router: scores and gradients are those of the formulas, in float32 or more, and no (T, E) table is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sonic import RoutingPlan
from sonic.routing import RoutingMetrics, TopKRouter, load_balancing_loss, router_logits, router_z_loss, topk_scores

T, D, E, K = 37, 16, 11, 3

# Every way to turn logits into scores, with and without a factor.
OPTIONS = [
    {"score_function": function, "pre_softmax": pre, "norm_topk_prob": norm, "topk_scaling_factor": factor}
    for function, pre in (("softmax", False), ("softmax", True), ("sigmoid", False))
    for norm, factor in itertools.product((False, True), (1.0, 2.5))
]


def option_id(options: dict[str, Any]) -> str:
    parts = [
        options["score_function"],
        "pre" if options["pre_softmax"] else "",
        "norm" if options["norm_topk_prob"] else "",
    ]
    return "-".join(part for part in (*parts, f"x{options['topk_scaling_factor']}") if part)


every_option = pytest.mark.parametrize("options", OPTIONS, ids=option_id)


def score_formula(
    logits_TE: Tensor,
    expert_TK: Tensor,
    score_function: str,
    pre_softmax: bool,
    norm_topk_prob: bool,
    topk_scaling_factor: float,
) -> Tensor:
    """The scores of the chosen experts, as the papers write them."""
    if score_function == "sigmoid":
        score_TK = (1 / (1 + torch.exp(-logits_TE))).gather(1, expert_TK)
    elif pre_softmax:
        exp_TE = torch.exp(logits_TE)
        score_TK = (exp_TE / exp_TE.sum(1, keepdim=True)).gather(1, expert_TK)
    else:
        exp_TK = torch.exp(logits_TE.gather(1, expert_TK))
        score_TK = exp_TK / exp_TK.sum(1, keepdim=True)
    if norm_topk_prob:
        score_TK = score_TK / score_TK.sum(1, keepdim=True)
    return score_TK * topk_scaling_factor


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error; infinite where something is not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    difference = float((got - wanted).norm() / wanted.norm())
    return difference if math.isfinite(difference) else math.inf


def router_of(dtype: torch.dtype = torch.float32, top_k: int = K, **options: Any) -> TopKRouter:
    router = TopKRouter(D, E, top_k, dtype=dtype, **options)
    torch.nn.init.normal_(router.weight, std=0.5)  # scores that differ clearly
    return router


# ---------------------------------------------------------------- values and gradients


@every_option
@pytest.mark.parametrize("top_k", [1, K, E])
def test_scores_and_gradients_are_those_of_the_formula(options: dict[str, Any], top_k: int) -> None:
    router = router_of(torch.float64, top_k, **options)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    dscores_TK = torch.randn(T, top_k, dtype=torch.float64)
    routing = router(x_TD)

    x64_TD = x_TD.detach().clone().requires_grad_()
    weight64_ED = router.weight.detach().clone().requires_grad_()
    logits_TE = x64_TD @ weight64_ED.t()
    expert_TK = logits_TE.argsort(dim=1, descending=True)[:, :top_k]
    wanted_TK = score_formula(logits_TE, expert_TK, **options)

    assert torch.equal(routing.expert_index.long(), expert_TK)
    assert error(routing.logits, logits_TE) <= 1e-14
    assert routing.scores.dtype == torch.float64
    assert error(routing.scores, wanted_TK) <= 1e-12
    got = torch.autograd.grad(routing.scores, (x_TD, router.weight), dscores_TK)
    wanted = torch.autograd.grad(wanted_TK, (x64_TD, weight64_ED), dscores_TK)
    sizes = [gradient.norm() for gradient in wanted]
    constant = top_k == 1 and (
        options["norm_topk_prob"] or options["score_function"] == "softmax" and not options["pre_softmax"]
    )
    for gradient, want, size in zip(got, wanted, sizes, strict=True):
        if constant:  # one expert has the whole score whatever its logit: no gradient, but for rounding
            assert gradient.norm() <= 1e-12
        else:
            assert size > 0.1 and error(gradient, want) <= 1e-12


@every_option
def test_logits_carry_a_loss_of_the_users_own(options: dict[str, Any]) -> None:
    """A loss on the logits and one on the scores add up, in x and in the weight."""
    router = router_of(torch.float64, **options)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    routing = router(x_TD)
    got = torch.autograd.grad(routing.logits.pow(3).sum() + routing.scores.square().sum(), (x_TD, router.weight))
    logits_TE = x_TD @ router.weight.t()
    scores_TK = score_formula(logits_TE, routing.expert_index.long(), **options)
    wanted = torch.autograd.grad(logits_TE.pow(3).sum() + scores_TK.square().sum(), (x_TD, router.weight))
    assert max(map(error, got, wanted)) <= 1e-12


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_and_gradients_of_their_tensors_dtype(options: dict[str, Any], dtype: torch.dtype) -> None:
    router = router_of(dtype, **options)
    x_TD = torch.randn(T, D).to(dtype).requires_grad_()
    routing = router(x_TD)
    assert routing.scores.dtype == routing.logits.dtype == routing.aux_loss.dtype == torch.float32
    assert routing.expert_index.dtype == torch.int32
    # float32 arithmetic on the 16-bit values: no worse than float32 is
    logits64_TE = x_TD.detach().double() @ router.weight.detach().double().t()
    assert error(routing.logits, logits64_TE) <= 1e-6
    wanted_TK = score_formula(logits64_TE, routing.expert_index.long(), **options)
    assert error(routing.scores, wanted_TK) <= 1e-6

    dscores_TK = torch.randn(T, K)
    got = torch.autograd.grad(routing.scores, (x_TD, router.weight), dscores_TK)
    assert [gradient.dtype for gradient in got] == [dtype, dtype]
    x64_TD, weight64_ED = (leaf.detach().double().requires_grad_() for leaf in (x_TD, router.weight))
    scores64_TK = score_formula(x64_TD @ weight64_ED.t(), routing.expert_index.long(), **options)
    wanted = torch.autograd.grad(scores64_TK, (x64_TD, weight64_ED), dscores_TK.double())
    assert max(map(error, got, wanted)) <= max(2e-6, torch.finfo(dtype).eps)  # rounded once, at the end


@every_option
@given(seed=st.integers(0, 2**31), size=st.sampled_from((0.1, 1.0, 30.0)), top_k=st.integers(1, E))
def test_what_any_scores_have_in_common(options: dict[str, Any], seed: int, size: float, top_k: int) -> None:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * size
    scores_TK, expert_TK = topk_scores(logits_TE, top_k, **options)
    factor = options["topk_scaling_factor"]
    chosen_TK = logits_TE.gather(1, expert_TK.long())
    assert torch.equal(chosen_TK, logits_TE.sort(dim=1, descending=True).values[:, :top_k])
    assert (expert_TK.sort(dim=1).values.diff(dim=1) > 0).all()  # none twice
    assert (scores_TK >= 0).all() and (scores_TK <= factor * (1 + 1e-6)).all() and (scores_TK.diff(dim=1) <= 0).all()
    if options["norm_topk_prob"] or (options["score_function"] == "softmax" and not options["pre_softmax"]):
        torch.testing.assert_close(scores_TK.sum(1), torch.full((T,), factor))


def test_presets_of_well_known_models() -> None:
    """Softmax over all experts, normalised over the chosen (Qwen3), is softmax over the chosen (Mixtral)."""
    logits_TE = torch.randn(T, E, dtype=torch.float64)
    qwen3_TK, expert_TK = topk_scores(logits_TE, K, pre_softmax=True, norm_topk_prob=True)
    mixtral_TK, same_TK = topk_scores(logits_TE, K)
    assert torch.equal(expert_TK, same_TK) and error(qwen3_TK, mixtral_TK) <= 1e-15
    deepseek_TK, _ = topk_scores(logits_TE, K, score_function="sigmoid", norm_topk_prob=True, topk_scaling_factor=2.5)
    torch.testing.assert_close(deepseek_TK.sum(1), torch.full((T,), 2.5, dtype=torch.float64))


# ---------------------------------------------------------------- edges


@every_option
def test_no_token(options: dict[str, Any]) -> None:
    router = router_of(aux_loss_coeff=0.1, z_loss_coeff=0.1, **options)
    x_TD = torch.randn(0, D, requires_grad=True)
    routing = router(x_TD)
    assert routing.scores.shape == routing.expert_index.shape == (0, K) and routing.logits.shape == (0, E)
    assert routing.plan.num_rows == 0 and routing.plan.num_tokens == 0
    assert routing.aux_loss.detach() == 0
    (routing.scores.sum() + routing.aux_loss).backward()
    assert torch.equal(router.weight.grad, torch.zeros(E, D)) and x_TD.grad.shape == (0, D)


@every_option
def test_ties(options: dict[str, Any]) -> None:
    """Equal logits: K different experts with equal scores, the same ones each time."""
    router = router_of(**options)
    torch.nn.init.zeros_(router.weight)
    x_TD = torch.randn(T, D)
    first, second = router(x_TD), router(x_TD)
    assert torch.equal(first.expert_index, second.expert_index)
    assert (first.expert_index.sort(dim=1).values.diff(dim=1) > 0).all()
    share = (
        1 / K
        if options["norm_topk_prob"] or option_id(options).startswith("softmax-x")
        else {"softmax": 1 / E, "sigmoid": 0.5}[options["score_function"]]
    )
    torch.testing.assert_close(first.scores, torch.full((T, K), share * options["topk_scaling_factor"]))


@every_option
def test_huge_logits_do_not_overflow(options: dict[str, Any]) -> None:
    logits_TE = (torch.randn(T, E) * 1e4).requires_grad_()
    scores_TK, _ = topk_scores(logits_TE, K, **options)
    (dlogits_TE,) = torch.autograd.grad(scores_TK.sum(), logits_TE)
    assert scores_TK.isfinite().all() and dlogits_TE.isfinite().all()


@every_option
def test_experts_that_are_masked_out(options: dict[str, Any]) -> None:
    """A logit of -inf is never chosen while K others are left, and makes nothing NaN."""
    logits_TE = torch.randn(T, E)
    logits_TE[:, ::2] = float("-inf")
    logits_TE.requires_grad_()
    scores_TK, expert_TK = topk_scores(logits_TE, K, **options)
    assert (expert_TK % 2 == 1).all()
    (dlogits_TE,) = torch.autograd.grad(scores_TK[:, 0].sum(), logits_TE)
    assert scores_TK.isfinite().all() and dlogits_TE.isfinite().all() and (dlogits_TE[:, ::2] == 0).all()


@every_option
def test_a_token_that_is_nan_harms_no_other(options: dict[str, Any]) -> None:
    router = router_of(**options)
    x_TD = torch.randn(T, D)
    wanted = router(x_TD)
    x_TD[5] = float("nan")
    routing = router(x_TD)
    others = torch.arange(T) != 5
    assert routing.scores[5].isnan().all()
    assert torch.equal(routing.scores[others], wanted.scores[others])
    assert torch.equal(routing.expert_index[others], wanted.expert_index[others])
    assert routing.plan.num_rows == T * K  # it still goes to K different experts


@every_option
def test_one_nan_logit_shows_in_its_token(options: dict[str, Any]) -> None:
    """The expert with the NaN is chosen, so the NaN reaches the output rather than being passed over."""
    logits_TE = torch.randn(T, E)
    logits_TE[5, 7] = float("nan")
    scores_TK, expert_TK = topk_scores(logits_TE, K, **options)
    assert expert_TK[5, 0] == 7 and scores_TK[5, 0].isnan()
    assert scores_TK[torch.arange(T) != 5].isfinite().all()


def test_gradients_only_for_those_that_want_one() -> None:
    router = router_of(aux_loss_coeff=0.1)
    x_TD = torch.randn(T, D)
    router(x_TD).scores.square().sum().backward()
    assert x_TD.grad is None and router.weight.grad is not None
    router.requires_grad_(False)
    routing = router(x_TD)
    assert not routing.scores.requires_grad and not routing.aux_loss.requires_grad
    x_TD.requires_grad_()
    router(x_TD).scores.square().sum().backward()
    assert x_TD.grad.norm() > 0


@pytest.mark.parametrize("part", ["scores", "logits", "aux_loss"])
def test_the_gradient_of_a_gradient_is_refused(part: str) -> None:
    router = router_of(pre_softmax=True, aux_loss_coeff=0.1)
    x_TD = torch.randn(T, D, requires_grad=True)
    (dx_TD,) = torch.autograd.grad(getattr(router(x_TD), part).square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^sonic\.routing\.\w+: asked for the gradient of its gradient"):
        dx_TD.sum().backward()


@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_softmax": True},
        {"score_function": "sigmoid"},
        {"topk_scaling_factor": 2.5},
        {"score_function": "sigmoid", "norm_topk_prob": True},
    ],
    ids=str,
)
def test_the_gradient_of_a_gradient_of_scores_alone_is_refused(options: dict[str, Any], sourced: bool) -> None:
    """Without a router in front: not a constant, which a gradient penalty would silently be made of."""
    x_TD, weight_ED = torch.randn(T, D), torch.randn(E, D)
    logits_TE = (x_TD @ weight_ED.t()).requires_grad_()
    scores_TK, _ = topk_scores(logits_TE, K, **options, source=(x_TD, weight_ED) if sourced else None)
    (dlogits_TE,) = torch.autograd.grad(scores_TK[:, 0].sum(), logits_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="asked for the gradient of its gradient"):
        (logits_TE.square().sum() + dlogits_TE.square().sum()).backward()


@pytest.mark.parametrize("sourced", [False, True])
def test_the_gradient_of_a_gradient_of_a_loss_alone_is_refused(sourced: bool) -> None:
    x_TD, weight_ED = torch.randn(T, D), torch.randn(E, D)
    logits_TE = (x_TD @ weight_ED.t()).requires_grad_()
    loss = load_balancing_loss(logits_TE, torch.arange(E), source=(x_TD, weight_ED) if sourced else None)
    (dlogits_TE,) = torch.autograd.grad(loss, logits_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="asked for the gradient of its gradient"):
        (logits_TE.square().sum() + dlogits_TE.square().sum()).backward()


# ---------------------------------------------------------------- autocast


@every_option
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    router = router_of(aux_loss_coeff=0.1, z_loss_coeff=0.1, **options)
    x_TD = torch.randn(T, D, requires_grad=True)
    parts = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            routing = router(x_TD)
            gradients = torch.autograd.grad(routing.scores.square().sum() + routing.aux_loss, (x_TD, router.weight))
        parts.append((routing.scores, routing.logits, routing.aux_loss, *gradients))
    for without, under in zip(*parts, strict=True):
        assert under.dtype == torch.float32 and torch.equal(without, under)


def test_autocast_takes_tokens_of_its_own_dtype() -> None:
    """What a layer before hands over under autocast, beside a float32 weight: multiplied in float32."""
    router = router_of()
    x_TD = torch.randn(T, D).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert routing.logits.dtype == torch.float32
    assert error(routing.logits, x_TD.double() @ router.weight.double().t()) <= 1e-6
    routing.scores.square().sum().backward()
    assert x_TD.grad.dtype == torch.bfloat16 and router.weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- the figures


def test_routing_holds_together() -> None:
    routing = router_of()(torch.randn(T, D))
    wanted = RoutingPlan.from_topk(routing.expert_index, E)
    assert torch.equal(routing.plan.slot_of_row_R, wanted.slot_of_row_R)
    assert routing.plan.scores_shape == routing.scores.shape == (T, K)
    assert routing.aux_loss.shape == () and float(routing.aux_loss) == 0
    assert torch.equal(routing.metrics.tokens_per_expert, routing.plan.tokens_per_expert())


def test_metrics_read_as_attributes_and_as_a_mapping() -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]]), 5)
    metrics = RoutingMetrics(plan, num_requested=10)
    assert set(metrics) == {
        "tokens_per_expert",
        "max_over_mean_load",
        "load_violation",
        "dead_experts",
        "load_entropy",
        "dropped",
        "padded",
        "moved",
    }
    assert len(metrics) == 8 and metrics == metrics and metrics != RoutingMetrics(plan)
    for name, value in metrics.items():
        assert isinstance(value, Tensor) and torch.equal(value, getattr(metrics, name))
    assert metrics["tokens_per_expert"].tolist() == [4, 2, 1, 1, 0]
    assert metrics["max_over_mean_load"] == 4 / (8 / 5) and metrics["max_over_mean_load"].dtype == torch.float32
    assert metrics["dropped"] == 2 and RoutingMetrics(plan).dropped == 0
    assert metrics["padded"] == 0 and float(metrics["moved"]) == pytest.approx(0.2) and metrics["dead_experts"] == 1
    assert float(metrics["load_violation"]) == pytest.approx(1.5)
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert float(metrics["load_entropy"]) == pytest.approx(float(-(shares * shares.log()).sum() / math.log(5)))
    with pytest.raises(AttributeError, match="entropy needs the logits"):
        metrics.entropy  # noqa: B018
    logits = torch.randn(7, 5)
    share = logits.softmax(-1)
    entropy = RoutingMetrics(plan, logits=logits).entropy
    assert float(entropy) == pytest.approx(float(-(share * share.log()).sum(-1).mean()), rel=1e-5)
    assert float(metrics.padding_waste(4)) == 1 - 8 / 16 and float(metrics.padding_waste(1)) == 0
    assert "padding_waste" not in metrics
    with pytest.raises(KeyError):
        metrics["plan"]


@pytest.mark.parametrize("balanced", [True, False])
def test_load_at_its_extremes(balanced: bool) -> None:
    expert_TK = torch.arange(E)[:, None] if balanced else torch.full((E, 1), 4)
    metrics = RoutingMetrics(RoutingPlan.from_topk(expert_TK, E))
    torch.testing.assert_close(metrics.max_over_mean_load, torch.tensor(1.0 if balanced else float(E)))


def test_figures_without_rows() -> None:
    metrics = RoutingMetrics(RoutingPlan.from_topk(torch.zeros(0, 2, dtype=torch.int64), 3))
    assert metrics.max_over_mean_load == 1 and metrics.padding_waste(128) == 0 and metrics.dropped == 0


def test_repr_tells_sizes_and_what_is_not_default() -> None:
    router = TopKRouter(8, 4, 2, score_function="sigmoid", norm_topk_prob=True, aux_loss_coeff=0.01)
    assert repr(router) == (
        "TopKRouter(hidden_size=8, num_experts=4, top_k=2, score_function='sigmoid', norm_topk_prob=True, "
        "aux_loss_coeff=0.01)"
    )


def test_weight_is_drawn_as_linear_draws() -> None:
    weight_ED = TopKRouter(64, 500, 2).weight.detach()
    assert weight_ED.abs().max() <= 1 / 8 and weight_ED.abs().max() > 0.99 / 8
    assert abs(float(weight_ED.std()) - (1 / 8) / 3**0.5) < 2e-3


# ---------------------------------------------------------------- what is kept


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps inside the block, one per memory."""
    by_memory: dict[int, Tensor] = {}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in by_memory:
            by_memory[tensor.untyped_storage().data_ptr()] = tensor
            tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


@every_option
@pytest.mark.parametrize("losses", [False, True], ids=["no-loss", "losses"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_table_over_tokens_and_experts_is_kept(options: dict[str, Any], losses: bool, dtype: torch.dtype) -> None:
    """Kept: tokens, weight, scores, chosen experts, their probabilities if the scores do not tell them, E numbers."""
    num_tokens, num_experts = 64, 32
    coefficients = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1} if losses else {}
    router = TopKRouter(D, num_experts, 2, dtype=dtype, **coefficients, **options)
    x_TD = torch.randn(num_tokens, D, dtype=dtype, requires_grad=True)
    with kept() as tensors:
        routing = router(x_TD)
    assert max(tensor.untyped_storage().nbytes() for tensor in tensors) < 4 * num_tokens * num_experts
    inputs = [tensor for tensor in tensors if tensor.data_ptr() in (x_TD.data_ptr(), router.weight.data_ptr())]
    assert len(inputs) == 2
    own_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors) - sum(
        tensor.untyped_storage().nbytes() for tensor in inputs
    )
    table = 4 * num_tokens * 2  # (T, K) in 4 bytes: the experts, the scores, and the probabilities if they differ
    differ = options["topk_scaling_factor"] != 1 or (
        options["score_function"] == "sigmoid" and options["norm_topk_prob"]
    )
    scalars = 4 * num_experts + 4 + 8 if losses else 0  # shares, weight of a token, two coefficients
    assert 2 * table <= own_bytes <= 2 * table + scalars
    kept_memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert (routing.scores.untyped_storage().data_ptr() in kept_memory) != differ


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_computed_again_are_the_logits(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Gradients with ``source`` equal those with the logits kept, bit for bit."""
    x_TD, weight_ED = torch.randn(T, D, dtype=dtype), torch.randn(E, D, dtype=dtype)
    logits_TE = router_logits(x_TD, weight_ED).detach().requires_grad_()
    count_E = torch.randint(20, (E,))
    gradients = []
    for source in (None, (x_TD, weight_ED)):
        with kept() as tensors:
            scores_TK, _ = topk_scores(logits_TE, K, **options, source=source)
            losses = [
                scores_TK.square().sum(),
                load_balancing_loss(logits_TE, count_E, score_function=options["score_function"], source=source),
                router_z_loss(logits_TE, source=source),
            ]
        assert any(tensor.shape == (T, E) for tensor in tensors) == (source is None)
        gradients.append([torch.autograd.grad(loss, logits_TE)[0] for loss in losses])
    for keeping, again in zip(*gradients, strict=True):
        assert keeping.norm() > 0 and torch.equal(keeping, again)
