"""Balancing losses, and how a loss reaches backward by itself.

Both losses need the softmax over all experts in backward. A (T, E) table is not kept for that: given ``source=(x,
weight)`` the logits are computed again from the tokens, which are kept anyway, for 2 T D E FLOP (0.7% of the experts'
work at E = 128, K = 8, N
= 256).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.autograd import graph_anchor, no_autocast, refuse_double_backward
from sonic.kernels.ops import SCORE_FUNCTIONS
from sonic.shapes import argument_error, check_choice, check_shape

__all__ = ["attach_loss", "load_balancing_loss", "logits_of", "router_losses", "router_z_loss"]

Group = Any  # a torch.distributed ProcessGroup, "world", or None


def load_balancing_loss(
    logits: Tensor,
    tokens_per_expert: Tensor,
    *,
    score_function: str = "softmax",
    group: Group = None,
    source: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Switch load-balancing loss ``E * sum over e of f_e * P_e``; 1 at perfect balance.

    f_e is the share of the routed rows that expert e got (no gradient), P_e the mean over tokens of its probability:
    softmax of the logits, or sigmoid over its sum.

    Args:
        logits: (T, E).
        tokens_per_expert: (E,) rows of each expert.
        score_function: ``"softmax"`` or ``"sigmoid"``.
        group: ranks whose tokens are balanced together: a process group, ``"world"`` (a single process if none is
            initialised), or None for this rank alone. f_e is summed over the group and P_e scaled so that the *mean
            over the group's ranks* of this
            loss, and so of its gradients as data-parallel training averages them, is the loss of all their tokens
            together, also where
            ranks hold different numbers of tokens.
        source: (x (T, D), weight (E, D)) from which backward computes the logits again; without, the logits are kept (4
            T E bytes).

    Raises:
        ValueError: shapes or names do not fit.

    Source: Fedus et al., Switch Transformers (arXiv:2101.03961), equations 4 to 6; over K choices as in Megatron-core.
    """
    return router_losses(logits, tokens_per_expert, score_function=score_function, group=group, source=source)[0]


def router_z_loss(logits: Tensor, *, group: Group = None, source: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)²``, which keeps the logits small.

    Args:
        logits: (T, E).
        group: as in :func:`load_balancing_loss`.
        source: as in :func:`load_balancing_loss`.

    Raises:
        ValueError: shapes do not fit.

    Source: Zoph et al., ST-MoE (arXiv:2202.08906), equation 5.
    """
    count_E = torch.zeros(logits.shape[-1], device=logits.device)
    return router_losses(logits, count_E, group=group, source=source)[1]


def router_losses(
    logits: Tensor,
    tokens_per_expert: Tensor,
    *,
    score_function: str = "softmax",
    group: Group = None,
    source: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(:func:`load_balancing_loss`, :func:`router_z_loss`) in one pass over the logits, and one in backward.

    Arguments as there.
    """
    where = "sonic.routing.load_balancing_loss"
    check_choice(where, "score_function", score_function, SCORE_FUNCTIONS)
    check_shape(where, "logits", logits, T=None, E=None)
    check_shape(where, "tokens_per_expert", tokens_per_expert, E=logits.shape[1])
    share_E, token_weight = _shares(tokens_per_expert, logits, group)
    x_TD, weight_ED = (None, None) if source is None else (source[0].detach(), source[1].detach())
    balance, z = _RouterLosses.apply(
        logits, graph_anchor(logits), x_TD, weight_ED, share_E, token_weight, score_function
    )
    return balance, z


def attach_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return ``carrier`` unchanged; whatever is later differentiated through it also adds the gradient of ``1.0 *
    loss``.

    Args:
        carrier: any tensor on the way to the training loss, such as the router's scores.
        loss: 0-dim.

    Raises:
        ValueError: ``loss`` is not 0-dim.
    """
    check_shape("sonic.routing.attach_loss", "loss", loss)
    attached: Tensor = _AttachLoss.apply(carrier, loss)
    return attached


def logits_of(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x @ weight.T`` in at least float32, as no autograd sees it: (T, E)."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with no_autocast(x_TD.device):
        return torch.mm(x_TD.to(wide), weight_ED.to(wide).t())


class _RouterLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        anchor: Tensor,
        x_TD: Tensor | None,
        weight_ED: Tensor | None,
        share_E: Tensor,
        token_weight: Tensor,
        score_function: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.score_function = score_function
        ctx.has_source = x_TD is not None
        recompute = (x_TD, weight_ED) if ctx.has_source else (logits_TE,)
        ctx.save_for_backward(anchor, *recompute, share_E, token_weight)
        wide_TE = logits_TE.to(share_E.dtype)
        log_total_T = torch.logsumexp(wide_TE, dim=-1)
        prob_TE = _probabilities(wide_TE, score_function)[0]
        balance = prob_TE.shape[1] * token_weight * torch.dot(prob_TE.sum(0), share_E)
        return balance, token_weight * log_total_T.square().sum()

    @staticmethod
    def backward(ctx: Any, dbalance: Tensor, dz: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes on access
        _, *kept, share_E, token_weight = saved
        with torch.no_grad():
            logits_TE = logits_of(*kept) if ctx.has_source else kept[0]
            wide_TE = logits_TE.to(share_E.dtype)
            slope_E = dbalance * wide_TE.shape[1] * token_weight * share_E
            prob_TE, total_T1 = _probabilities(wide_TE, ctx.score_function)
            dprob_TE = slope_E - torch.mv(prob_TE, slope_E)[:, None]  # through the division by the sum
            if ctx.score_function == "sigmoid":
                sigmoid_TE = prob_TE * total_T1
                dlogits_TE = dprob_TE / total_T1 * sigmoid_TE * (1 - sigmoid_TE)
            else:
                dlogits_TE = dprob_TE * prob_TE
            log_total_T1 = torch.logsumexp(wide_TE, dim=-1, keepdim=True)
            dlogits_TE += torch.exp(wide_TE - log_total_T1) * (2 * dz * token_weight * log_total_T1)
            dlogits_TE = dlogits_TE.to(logits_TE.dtype)
        (dlogits,) = refuse_double_backward("sonic.routing.load_balancing_loss", (dlogits_TE,), (dbalance, dz, *saved))
        return dlogits, *(None,) * 6  # logits; anchor, x, weight, share, token_weight, score_function


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, dcarrier: Tensor) -> Any:
        return dcarrier, torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device)


def _probabilities(logits_TE: Tensor, score_function: str) -> tuple[Tensor, Tensor]:
    """Probabilities that sum to 1 per token, and the sum that sigmoids were divided by (T, 1)."""
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1), logits_TE.new_ones(())
    sigmoid_TE = torch.sigmoid(logits_TE)
    total_T1 = sigmoid_TE.sum(-1, keepdim=True) + 1e-20
    return sigmoid_TE / total_T1, total_T1


def _shares(tokens_per_expert: Tensor, logits: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Share of the routed rows per expert, and the weight of each of this rank's tokens in the means, over
    ``group``.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    count_E = tokens_per_expert.to(wide)
    total = torch.full((1,), logits.shape[0], dtype=wide, device=logits.device)
    num_ranks = 1
    if group is not None:
        if isinstance(group, str) and group != "world":
            raise argument_error(
                "sonic.routing.load_balancing_loss", "group", repr(group), "a process group, 'world' or None"
            )
        if dist.is_available() and dist.is_initialized():
            process_group = None if isinstance(group, str) else group
            counted = torch.cat((count_E, total))
            dist.all_reduce(counted, group=process_group)
            count_E, total = counted[:-1], counted[-1:]
            num_ranks = dist.get_world_size(process_group)
    share_E = count_E / count_E.sum().clamp(min=1)
    return share_E, (num_ranks / total.clamp(min=1)).reshape(())
