"""Balancing losses: values and gradients, how they reach backward by themselves, and what several ranks agree on."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sonic
from sonic.layers import set_aux_loss_scale
from sonic.routing import TopKRouter, attach_loss, load_balancing_loss, reset_load, router_z_loss, sequence_load
from sonic.routing import topk as topk_module

T, D, E, K = 29, 8, 7, 2
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")

every_function = pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)


def balance_formula(logits_TE: Tensor, count_E: Tensor, score_function: str) -> Tensor:
    """Switch loss: E times the sum over experts of (share of the rows) x (mean probability)."""
    if score_function == "softmax":
        prob_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(1, keepdim=True)
    else:
        exp_TE = torch.exp(logits_TE)
        value_TE = exp_TE / (1 + exp_TE) if score_function == "sigmoid" else torch.log(1 + exp_TE).sqrt()
        prob_TE = value_TE / value_TE.sum(1, keepdim=True)
    share_E = count_E.double() / count_E.sum()
    return logits_TE.shape[1] * (share_E * prob_TE.mean(0)).sum()


def z_formula(logits_TE: Tensor) -> Tensor:
    return torch.log(torch.exp(logits_TE).sum(1)).square().mean()


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    difference = float((got - wanted).norm() / wanted.norm())
    return difference if math.isfinite(difference) else math.inf


def gradient(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


# ---------------------------------------------------------------- values and gradients


@every_function
def test_load_balancing_loss(score_function: str) -> None:
    logits_TE = (2 * torch.randn(T, E, dtype=torch.float64)).requires_grad_()
    count_E = torch.tensor([5, 0, 20, 1, 9, 0, 3])
    got = load_balancing_loss(logits_TE, count_E, score_function=score_function)
    wanted = balance_formula(logits_TE, count_E, score_function)
    assert got.shape == () and error(got, wanted) <= 1e-14
    assert error(*gradient(got, logits_TE), *gradient(wanted, logits_TE)) <= 1e-12


def test_z_loss() -> None:
    logits_TE = (2 * torch.randn(T, E, dtype=torch.float64)).requires_grad_()
    got, wanted = router_z_loss(logits_TE), z_formula(logits_TE)
    assert got.shape == () and error(got, wanted) <= 1e-14
    assert error(*gradient(got, logits_TE), *gradient(wanted, logits_TE)) <= 1e-12


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_computed_in_float32(score_function: str, dtype: torch.dtype) -> None:
    logits_TE = torch.randn(T, E).to(dtype).requires_grad_()
    count_E = torch.arange(E, dtype=torch.int32)
    losses = load_balancing_loss(logits_TE, count_E, score_function=score_function), router_z_loss(logits_TE)
    logits64_TE = logits_TE.detach().double().requires_grad_()
    wanted = balance_formula(logits64_TE, count_E, score_function), z_formula(logits64_TE)
    for got, want in zip(losses, wanted, strict=True):
        assert got.dtype == torch.float32 and error(got, want) <= 1e-6
        (dlogits_TE,) = gradient(got, logits_TE)
        assert dlogits_TE.dtype == dtype
        assert error(dlogits_TE, *gradient(want, logits64_TE)) <= max(1e-6, torch.finfo(dtype).eps)


@every_function
def test_one_at_perfect_balance_and_more_away_from_it(score_function: str) -> None:
    even_E, logits_TE = torch.full((E,), 4), torch.randn(T, E, dtype=torch.float64)
    flat_TE = torch.zeros(T, E, dtype=torch.float64)
    for logits, count in ((logits_TE, even_E), (flat_TE, torch.arange(E))):
        torch.testing.assert_close(
            load_balancing_loss(logits, count, score_function=score_function), torch.ones((), dtype=torch.float64)
        )
    # all rows, and almost all probability, at one expert
    collapsed_TE, all_E = torch.full((T, E), -40.0), torch.zeros(E)
    collapsed_TE[:, 3], all_E[3] = 40.0, T
    torch.testing.assert_close(
        load_balancing_loss(collapsed_TE, all_E, score_function=score_function), torch.tensor(float(E))
    )


@every_function
def test_going_down_the_loss_balances(score_function: str) -> None:
    """A router that is trained on nothing but the loss ends close to balance."""
    router = TopKRouter(D, E, K, score_function=score_function, aux_loss_coeff=1.0)
    x_TD = torch.randn(512, D) + 1  # tokens that are alike: without the loss they all go the same way
    before = float(router(x_TD).metrics.max_over_mean_load)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        router(x_TD).aux_loss.backward()
        optimizer.step()
    assert float(router(x_TD).metrics.max_over_mean_load) < 1.3 < 1.6 < before


def test_without_tokens() -> None:
    logits_TE = torch.zeros(0, E, requires_grad=True)
    loss = load_balancing_loss(logits_TE, torch.zeros(E)) + router_z_loss(logits_TE)
    loss.backward()
    assert loss.detach() == 0 and logits_TE.grad.shape == (0, E)


def test_extreme_logits_stay_finite() -> None:
    logits_TE = (torch.randn(T, E) * 1e4).requires_grad_()
    for score_function in SCORE_FUNCTIONS:
        loss = load_balancing_loss(logits_TE, torch.ones(E), score_function=score_function)
        assert loss.isfinite() and gradient(loss, logits_TE)[0].isfinite().all()
    assert gradient(router_z_loss(logits_TE), logits_TE)[0].isfinite().all()


def test_counts_have_no_gradient() -> None:
    logits_TE, count_E = torch.randn(T, E, requires_grad=True), torch.rand(E, requires_grad=True)
    load_balancing_loss(logits_TE, count_E).backward()
    assert logits_TE.grad.norm() > 0 and count_E.grad is None


@every_function
@pytest.mark.parametrize(("aux", "z"), [(0.01, 0.0), (0.0, 0.001), (0.3, 0.2)])
def test_router_adds_its_losses_with_their_coefficients(score_function: str, aux: float, z: float) -> None:
    router = TopKRouter(D, E, K, score_function=score_function, aux_loss_coeff=aux, z_loss_coeff=z, dtype=torch.float64)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    routing = router(x_TD)
    logits_TE = x_TD @ router.weight.t()
    count_E = torch.bincount(routing.expert_index.reshape(-1).long(), minlength=E)
    wanted = aux * balance_formula(logits_TE, count_E, score_function) + z * z_formula(logits_TE)
    assert error(routing.aux_loss, wanted) <= 1e-13
    leaves = (x_TD, router.weight)
    for got, want in zip(gradient(routing.aux_loss, *leaves), gradient(wanted, *leaves), strict=True):
        assert error(got, want) <= 1e-12


# ---------------------------------------------------------------- sequence-wise and global


def sequence_formula(logits_TE: Tensor, expert_TK: Tensor, length: int, score_function: str) -> Tensor:
    """The mean over sequences of the switch loss of each."""
    losses = []
    for logits_SE, expert_SK in zip(logits_TE.split(length), expert_TK.split(length), strict=True):
        count_E = torch.bincount(expert_SK.reshape(-1).long(), minlength=logits_TE.shape[1])
        losses.append(balance_formula(logits_SE, count_E, score_function))
    return torch.stack(losses).mean()


@every_function
@pytest.mark.parametrize("length", [1, 4, 28])
def test_sequence_wise_is_the_mean_over_sequences(score_function: str, length: int) -> None:
    logits_TE = (2 * torch.randn(28, E, dtype=torch.float64)).requires_grad_()
    expert_TK = torch.rand(28, E).argsort(1)[:, :K]
    load_BE = sequence_load(expert_TK, 28 // length, E)
    assert load_BE.shape == (28 // length, E) and (load_BE.sum(1) == length * K).all()
    got = load_balancing_loss(logits_TE, load_BE, score_function=score_function)
    wanted = sequence_formula(logits_TE, expert_TK, length, score_function)
    assert got.shape == () and error(got, wanted) <= 1e-14
    assert error(*gradient(got, logits_TE), *gradient(wanted, logits_TE)) <= 1e-12
    if length == 28:
        count_E = torch.bincount(expert_TK.flatten(), minlength=E)
        assert error(load_balancing_loss(logits_TE, count_E, score_function=score_function), got) <= 1e-15


@every_function
def test_router_balances_each_sequence(score_function: str) -> None:
    options = {"score_function": score_function, "aux_loss_type": "sequence", "aux_loss_coeff": 0.3, "bias": True}
    router = TopKRouter(D, E, K, dtype=torch.float64, z_loss_coeff=0.2, **options)
    torch.nn.init.normal_(router.bias)
    x_TD = torch.randn(28, D, dtype=torch.float64, requires_grad=True)
    routing = router(x_TD, sequence_length=7)
    logits_TE = x_TD @ router.weight.t() + router.bias
    wanted = 0.3 * sequence_formula(logits_TE, routing.expert_index, 7, score_function) + 0.2 * z_formula(logits_TE)
    assert error(routing.aux_loss, wanted) <= 1e-13
    leaves = (x_TD, *router.parameters())
    for got, want in zip(gradient(routing.aux_loss, *leaves), gradient(wanted, *leaves), strict=True):
        assert error(got, want) <= 1e-12
    assert router(torch.randn(0, D, dtype=torch.float64)).aux_loss == 0  # no token, no sequence


@pytest.mark.parametrize(("length", "is_whole_runs"), [(128, True), (256, True), (96, False)])
def test_sequences_of_whole_runs_are_not_counted_again(
    length: int, is_whole_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice counted them; K = 2, so in runs of 128 tokens."""
    counted: list[int] = []

    def watched(expert_TK: Tensor, num_sequences: int, num_experts: int) -> Tensor:
        counted.append(num_sequences)
        return sequence_load(expert_TK, num_sequences, num_experts)

    monkeypatch.setattr(topk_module, "sequence_load", watched)
    router = TopKRouter(D, E, 2, dtype=torch.float64, aux_loss_type="sequence", aux_loss_coeff=0.3)
    x_TD = torch.randn(768, D, dtype=torch.float64)
    routing = router(x_TD, sequence_length=length)
    wanted = 0.3 * sequence_formula(x_TD @ router.weight.t(), routing.expert_index, length, "softmax")
    assert error(routing.aux_loss, wanted) <= 1e-13 and bool(counted) is not is_whole_runs
    assert error(*gradient(routing.aux_loss, router.weight), *gradient(wanted, router.weight)) <= 1e-12
    assert router(x_TD[:0], sequence_length=length).aux_loss == 0


def global_router(**options: Any) -> TopKRouter:
    torch.manual_seed(1)
    return TopKRouter(D, E, K, dtype=torch.float64, aux_loss_type="global", aux_loss_coeff=0.3, **options)


def test_global_batch_counts_all_micro_batches_of_a_step() -> None:
    """Each micro-batch is held against the rows of all so far; the last one against those of the whole step."""
    router = global_router()
    for _ in range(2):  # steps
        load_E = torch.zeros(E, dtype=torch.int64)
        for x_TD in torch.randn(3, T, D, dtype=torch.float64):
            with torch.no_grad():
                seen = router(x_TD).aux_loss  # looking counts for nothing, and tells the same
            routing = router(x_TD)
            load_E += routing.metrics.tokens_per_expert
            assert torch.equal(router.load, load_E) and error(seen, routing.aux_loss) <= 1e-14
            wanted = 0.3 * balance_formula(x_TD @ router.weight.t(), load_E, "softmax")
            assert error(routing.aux_loss, wanted) <= 1e-13
            assert error(*gradient(routing.aux_loss, router.weight), *gradient(wanted, router.weight)) <= 1e-12
        reset_load(torch.nn.Sequential(router))
        assert not router.load.any()
    assert "load" not in router.state_dict()


def test_global_batch_keeps_what_a_loss_was_computed_with() -> None:
    """Backward after further micro-batches: as if there had been none."""
    router, first_TD = global_router(), torch.randn(T, D, dtype=torch.float64)
    (wanted,) = gradient(router(first_TD).aux_loss, router.weight)
    router.reset_load()
    loss = router(first_TD).aux_loss
    router(torch.randn(T, D, dtype=torch.float64))
    router.reset_load()
    assert torch.equal(*gradient(loss, router.weight), wanted)


def test_checkpointing_counts_everything_twice_and_changes_no_gradient() -> None:
    router, load_E = global_router(), torch.zeros(E, dtype=torch.int64)
    for x_TD in torch.randn(3, T, D, dtype=torch.float64):
        load_E += global_router()(x_TD).metrics.tokens_per_expert
        loss = checkpoint(lambda x_TD: router(x_TD).aux_loss, x_TD.requires_grad_(), use_reentrant=False)
        wanted = 0.3 * balance_formula(x_TD @ router.weight.t(), load_E, "softmax")
        assert error(*gradient(loss, router.weight), *gradient(wanted, router.weight)) <= 1e-12
    assert torch.equal(router.load, 2 * load_E)


def test_eval_mode_looks_at_its_own_tokens() -> None:
    router, x_TD = global_router(), torch.randn(T, D, dtype=torch.float64)
    router(torch.randn(T, D, dtype=torch.float64) + 1)
    load_E = router.load.clone()
    routing = router.eval()(x_TD)
    wanted = 0.3 * balance_formula(x_TD @ router.weight.t(), routing.metrics.tokens_per_expert, "softmax")
    assert error(routing.aux_loss, wanted) <= 1e-13 and torch.equal(router.load, load_E)


# ---------------------------------------------------------------- attached


def test_attach_changes_no_value_and_adds_the_gradient() -> None:
    x, weight = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def forward(attached: bool) -> list[Tensor]:
        carrier, loss = x.tanh(), (weight * x).square().sum()
        if attached:
            with_loss = attach_loss(carrier, loss)
            assert torch.equal(with_loss, carrier) and with_loss.dtype == carrier.dtype
            return gradient(7 * with_loss.cos().sum() * with_loss.sum(), x, weight)
        return gradient(7 * carrier.cos().sum() * carrier.sum() + loss, x, weight)

    for got, want in zip(forward(True), forward(False), strict=True):
        assert error(got, want) <= 1e-14


def test_attaching_is_for_backward_through_the_carrier_only() -> None:
    x = torch.randn(4, requires_grad=True)
    weight = torch.randn(4, requires_grad=True)
    carrier = attach_loss(x * 2, weight.sum())
    (x.sum() + weight.detach().sum()).backward()
    assert weight.grad is None
    carrier.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attached_loss_may_have_another_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(4, dtype=dtype, requires_grad=True)
    attach_loss(torch.randn(3, requires_grad=True), (3 * weight).sum()).sum().backward()
    assert torch.equal(weight.grad, torch.full((4,), 3, dtype=dtype))


def layer_with_losses(**options: Any) -> sonic.MoE:
    router = TopKRouter(D, E, K, aux_loss_coeff=0.3, z_loss_coeff=0.2, dtype=torch.float64)
    return sonic.MoE(D, 6, E, K, router=router, dtype=torch.float64, **options)


def gradients_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert error(got[name], want) <= tolerance, name


@pytest.mark.parametrize("scale", [1.0, 0.25, 0, torch.tensor(3.0, dtype=torch.float64)])
def test_scale_of_attached_losses(scale: float | Tensor) -> None:
    """The training loss times a number, and the scale set to that number, is the sum of both times that number."""
    layer = layer_with_losses()
    model = torch.nn.Sequential(torch.nn.Linear(D, D, dtype=torch.float64), layer)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    set_aux_loss_scale(model, scale)
    (model(x_TD).square().mean() * scale).backward()
    got = gradients_of(model)
    y_TD, routing = layer(model[0](x_TD), return_routing=True)
    ((y_TD.square().mean() + routing.aux_loss) * scale).backward()
    wanted = gradients_of(model)
    if scale == 0:
        assert all(torch.equal(got[name], want) for name, want in wanted.items())
    else:
        assert_same(got, wanted)


def test_scale_reaches_every_layer_of_a_model() -> None:
    layers = [layer_with_losses() for _ in range(3)]
    model = torch.nn.Sequential(layers[0], torch.nn.Sequential(layers[1], torch.nn.ReLU()), layers[2])
    set_aux_loss_scale(model, 0.5)
    assert [layer.aux_loss_scale for layer in layers] == [0.5] * 3
    set_aux_loss_scale(layers[1], 2)
    assert [layer.aux_loss_scale for layer in layers] == [0.5, 2, 0.5]


def test_gradient_accumulation() -> None:
    """n micro-batches as ``(loss / n).backward()`` with scale 1/n: the mean over micro-batches of loss and losses."""
    layer, num_batches = layer_with_losses(), 4
    batches = torch.randn(num_batches, T, D, dtype=torch.float64)
    set_aux_loss_scale(layer, 1 / num_batches)
    for x_TD in batches:
        (layer(x_TD).square().mean() / num_batches).backward()
    got = gradients_of(layer)
    total = torch.zeros((), dtype=torch.float64)
    for x_TD in batches:
        y_TD, routing = layer(x_TD, return_routing=True)
        total = total + y_TD.square().mean() + routing.aux_loss
    (total / num_batches).backward()
    assert_same(got, gradients_of(layer))


# ---------------------------------------------------------------- several ranks


def test_world_without_ranks_is_this_process() -> None:
    logits_TE = torch.randn(T, E, requires_grad=True)
    count_E = torch.arange(E)
    assert not dist.is_initialized()
    for loss in (
        lambda group: load_balancing_loss(logits_TE, count_E, group=group),
        lambda group: router_z_loss(logits_TE, group=group),
    ):
        assert torch.equal(loss(None), loss("world"))
        assert torch.equal(*gradient(loss(None), logits_TE), *gradient(loss("world"), logits_TE))


RANK_TOKENS = ((3, 11), (8, 8), (0, 5))


def shared_router(score_function: str, group: object, aux: float = 0.3, z: float = 0.2) -> TopKRouter:
    """The same router in every process."""
    torch.manual_seed(1)
    options = {"score_function": score_function, "aux_loss_coeff": aux, "z_loss_coeff": z, "aux_loss_group": group}
    return TopKRouter(D, E, K, dtype=torch.float64, **options)


def shared_tokens(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def check_losses_of_two_ranks(rank: int) -> None:
    """Run in each of two processes: the mean over ranks of loss and gradients is that of all tokens in one process."""
    own_groups = [dist.new_group([0]), dist.new_group([1])]
    both = dist.new_group([0, 1])
    for score_function in SCORE_FUNCTIONS:
        for first, second in RANK_TOKENS:
            all_TD = shared_tokens(first + second)
            for group in ("world", both):
                router = shared_router(score_function, group)
                x_TD = (all_TD[:first] if rank == 0 else all_TD[first:]).clone().requires_grad_()
                loss = router(x_TD).aux_loss
                loss.backward()
                mean = [loss.detach().clone(), router.weight.grad.clone()]
                for tensor in mean:
                    dist.all_reduce(tensor)
                    tensor /= 2

                alone, together_TD = shared_router(score_function, None), all_TD.clone().requires_grad_()
                together = alone(together_TD).aux_loss
                together.backward()
                where = (score_function, first, second, group)
                assert error(mean[0], together) <= 1e-12, where
                assert error(mean[1], alone.weight.grad) <= 1e-12, where
                own_TD = together_TD.grad[:first] if rank == 0 else together_TD.grad[first:]
                if own_TD.numel():  # what is averaged over two ranks counts half
                    assert error(x_TD.grad / 2, own_TD) <= 1e-12, where

        # a group of one rank, and none at all, are this rank's tokens
        x_TD = shared_tokens(4 + rank)
        losses = [shared_router(score_function, group)(x_TD).aux_loss for group in (own_groups[rank], None)]
        assert torch.equal(*losses)

    # with different tokens, balancing each rank alone is another loss than balancing them together
    alone = shared_router("softmax", None)(shared_tokens(20)[rank::2]).aux_loss
    together = shared_router("softmax", "world")(shared_tokens(20)[rank::2]).aux_loss
    assert not torch.allclose(alone, together)


def check_sequences_of_two_ranks(rank: int) -> None:
    """Run in each of two processes: every sequence of all ranks counts alike, also where a rank has none."""
    for score_function, (first, second) in itertools.product(SCORE_FUNCTIONS, ((1, 3), (2, 2), (0, 3))):
        options = {"score_function": score_function, "aux_loss_type": "sequence", "aux_loss_coeff": 0.3}
        all_TD = shared_tokens(5 * (first + second))
        torch.manual_seed(1)
        router = TopKRouter(D, E, K, dtype=torch.float64, z_loss_coeff=0.2, aux_loss_group="world", **options)
        loss = router(all_TD[: 5 * first] if rank == 0 else all_TD[5 * first :], sequence_length=5).aux_loss
        loss.backward()
        torch.manual_seed(1)
        alone = TopKRouter(D, E, K, dtype=torch.float64, z_loss_coeff=0.2, **options)
        together = alone(all_TD, sequence_length=5).aux_loss
        together.backward()
        for mean, wanted in ((loss.detach(), together), (router.weight.grad, alone.weight.grad)):
            dist.all_reduce(mean)
            assert error(mean / 2, wanted) <= 1e-12, (score_function, first, second)


def check_bias_of_two_ranks(rank: int) -> None:
    """Run in each of two processes: the bias moves against the summed load, and is the same everywhere."""
    for group in ("world", dist.new_group([0, 1]), None):
        torch.manual_seed(1)
        router = TopKRouter(D, E, K, dtype=torch.float64, enable_expert_bias=True, expert_bias_rate=0.125)
        halves, load_E = (shared_tokens(10) + 1, shared_tokens(10) - 1), torch.zeros(E, dtype=torch.int64)
        for batch in (slice(0, 4), slice(4, 10)):  # two micro-batches, unlike from rank to rank
            for owner, half_TD in enumerate(halves):
                count_E = router.eval()(half_TD[batch]).metrics.tokens_per_expert
                load_E += count_E if group is not None or owner == rank else 0
            router.train()(halves[rank][batch])
        router.update_expert_bias(group)
        wanted_E = 0.125 * torch.sign(load_E.double().mean() - load_E).float()
        assert torch.equal(router.expert_bias, wanted_E) and wanted_E.any(), group
        both = [torch.empty(E), torch.empty(E)]
        dist.all_gather(both, router.expert_bias)
        assert torch.equal(*both) == (group is not None) and not router.load.any()


def check_global_batch_of_two_ranks(rank: int) -> None:
    """Run in each of two processes: the last micro-batch is held against the rows of all ranks and micro-batches."""
    router, batches = global_router(aux_loss_group="world"), torch.randn(2, 2, T, D, dtype=torch.float64)
    load_E = sum(global_router()(x_TD).metrics.tokens_per_expert for x_TD in batches.flatten(0, 1))
    for x_TD in batches[rank]:
        loss = router(x_TD).aux_loss
    loss.backward()
    wanted = 0.3 * balance_formula(batches[rank, 1] @ router.weight.t(), load_E, "softmax")
    assert error(loss, wanted) <= 1e-13 and error(router.weight.grad, *gradient(wanted, router.weight)) <= 1e-12


def check_all_of_two_ranks(rank: int) -> None:
    """Run in each of two processes, which take longer to start than to run."""
    check_losses_of_two_ranks(rank)
    check_sequences_of_two_ranks(rank)
    check_bias_of_two_ranks(rank)
    check_global_batch_of_two_ranks(rank)


@pytest.mark.long
def test_two_ranks_with_different_numbers_of_tokens(tmp_path: Path) -> None:
    run_ranks(__file__, "check_all_of_two_ranks", tmp_path)


def run_ranks(file: str, function: str, folder: Path, num_ranks: int = 2, timeout: float = 300) -> None:
    """Run ``function(rank)`` of a test file in processes of their own, joined by gloo; fail with what they print."""
    root = Path(file).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, file, function, str(folder / f"{function}.store"), str(num_ranks)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    told, late = [], False
    for process in processes:
        try:
            told.append(process.communicate(timeout=0 if late else timeout)[0])
        except subprocess.TimeoutExpired:
            late = True
            for other in processes:
                other.kill()
            told.append(f"killed after {timeout:g} s\n" + process.communicate()[0])
    faults = [
        f"rank {rank} ended with {process.returncode}:\n{text}"
        for rank, (process, text) in enumerate(zip(processes, told, strict=True))
        if process.returncode
    ]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def be_a_rank(functions: dict[str, Any], function: str, store: str, num_ranks: str, rank: str) -> None:
    """What a process of :func:`run_ranks` does."""
    dist.init_process_group("gloo", init_method=f"file://{store}", world_size=int(num_ranks), rank=int(rank))
    torch.manual_seed(0)
    functions[function](int(rank))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    be_a_rank(globals(), *sys.argv[1:])
