"""Balancing losses, and how a loss reaches backward by itself.

The losses need the probabilities of all experts in backward. A (T, E) table is not kept for that: given ``source`` the
logits are computed again from the tokens, which are kept anyway, for 2 T D E FLOP (0.7% of the experts' work at
E = 128, K = 8, N = 256).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.autograd import graph_anchor, refuse_double_backward
from sonic.kernels.ops import SCORE_FUNCTIONS
from sonic.routing.scores import Source, check_within, detached_source, logits_of, pointwise_slope, probabilities
from sonic.shapes import argument_error, check_choice, check_integer, check_positive, check_shape

__all__ = [
    "Group",
    "attach_loss",
    "check_group",
    "load_balancing_loss",
    "process_group_of",
    "router_losses",
    "router_z_loss",
    "sequence_load",
]

Group = Any  # a torch.distributed ProcessGroup, "world", or None


def load_balancing_loss(
    logits: Tensor,
    tokens_per_expert: Tensor,
    *,
    score_function: str = "softmax",
    group: Group = None,
    source: Source | None = None,
) -> Tensor:
    """Switch load-balancing loss ``E * sum over e of f_e * P_e``; 1 at perfect balance.

    f_e is the share of the routed rows that expert e got (no gradient), P_e the mean over tokens of its probability:
    softmax of the logits, or the score function over its sum.

    Which rows are counted makes three losses of it:

    - *switch*: those of these tokens, ``tokens_per_expert`` (E,);
    - *sequence-wise*: each sequence is balanced by itself, and the mean is taken over the sequences:
      ``tokens_per_expert`` (B, E), from :func:`sequence_load`, for B sequences of T / B tokens, one after the other;
    - *global-batch*: ``tokens_per_expert`` (E,) of more tokens than these: of earlier micro-batches of the same batch
      (``TopKRouter(aux_loss_type="global")`` counts them), or of all ranks, with ``group``.

    Args:
        logits: (T, E).
        tokens_per_expert: (E,) or (B, E) rows of each expert; B divides T.
        score_function: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        group: ranks whose tokens are balanced together: a process group, ``"world"`` (a single process if none is
            initialised), or None for this rank alone. f_e is summed over the group (not if sequence-wise), and P_e is
            scaled so that the *mean over the group's ranks* of this loss, and so of its gradients as data-parallel
            training averages them, is the loss of all their tokens together, also where ranks hold different numbers.
        source: from which backward computes the logits again; without, the logits are kept (4 T E bytes).

    Raises:
        ValueError: shapes or names do not fit.

    Source: Fedus et al., Switch Transformers (arXiv:2101.03961), equations 4 to 6; over K choices as in Megatron-core.
    Sequence-wise: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2. Global batch: Qiu et al. (arXiv:2501.11873).
    """
    where = "sonic.routing.load_balancing_loss"
    return _losses(where, logits, tokens_per_expert, score_function, group, source)[0]


def router_z_loss(logits: Tensor, *, group: Group = None, source: Source | None = None) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)²``, which keeps the logits small.

    Args:
        logits: (T, E).
        group: as in :func:`load_balancing_loss`.
        source: as in :func:`load_balancing_loss`.

    Raises:
        ValueError: shapes do not fit.

    Source: Zoph et al., ST-MoE (arXiv:2202.08906), equation 5.
    """
    return _losses("sonic.routing.router_z_loss", logits, None, "softmax", group, source)[1]


def router_losses(
    logits: Tensor,
    tokens_per_expert: Tensor,
    *,
    score_function: str = "softmax",
    group: Group = None,
    source: Source | None = None,
) -> tuple[Tensor, Tensor]:
    """(:func:`load_balancing_loss`, :func:`router_z_loss`) in one pass over the logits, and one in backward.

    Arguments as there.
    """
    return _losses("sonic.routing.router_losses", logits, tokens_per_expert, score_function, group, source)


def sequence_load(expert_index: Tensor, num_sequences: int, num_experts: int) -> Tensor:
    """Rows of each expert in each sequence: (B, E) int64.

    Args:
        expert_index: (T, K) integer, the tokens of B sequences of equal length, one sequence after the other.
        num_sequences: B, a divisor of T.
        num_experts: E.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    where = "sonic.routing.sequence_load"
    check_integer(where, "expert_index", expert_index)
    check_shape(where, "expert_index", expert_index, T=None, K=None)
    check_positive(where, num_sequences=num_sequences, num_experts=num_experts)
    check_within(where, "expert_index", expert_index, "num_experts", num_experts)
    num_tokens = expert_index.shape[0]
    if num_tokens % num_sequences:
        raise argument_error(where, "num_sequences", num_sequences, f"a divisor of T = {num_tokens}")
    sequence_B1 = torch.arange(num_sequences, device=expert_index.device)[:, None]
    place_BP = expert_index.reshape(num_sequences, -1).long() + sequence_B1 * num_experts
    load_F = place_BP.new_zeros(num_sequences * num_experts)
    return load_F.index_add_(0, place_BP.flatten(), place_BP.new_ones(place_BP.numel())).view(num_sequences, -1)


def attach_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return ``carrier`` unchanged; what is later differentiated through it also adds the gradient of ``loss``.

    Args:
        carrier: any tensor on the way to the training loss, such as the router's scores.
        loss: 0-dim.

    Raises:
        ValueError: ``loss`` is not 0-dim.
    """
    check_shape("sonic.routing.attach_loss", "loss", loss)
    attached: Tensor = _AttachLoss.apply(carrier, loss)
    return attached


def check_group(where: str, argument: str, group: Group) -> None:
    """Refuse what is no process group, ``"world"`` or None.

    Raises:
        ValueError: naming the argument.
    """
    is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
    if not (group is None or is_group or (isinstance(group, str) and group == "world")):
        raise argument_error(where, argument, repr(group), "a process group, 'world' or None")


def process_group_of(where: str, argument: str, group: Group) -> tuple[Any, int]:
    """The process group to hand to a collective, and its number of ranks: 1 where there is nobody to talk to.

    Raises:
        ValueError: as :func:`check_group`.
    """
    check_group(where, argument, group)
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None, 1
    process_group = dist.group.WORLD if isinstance(group, str) else group
    return process_group, dist.get_world_size(process_group)


def _losses(
    where: str,
    logits: Tensor,
    tokens_per_expert: Tensor | None,
    score_function: str,
    group: Group,
    source: Source | None,
) -> tuple[Tensor, Tensor]:
    check_choice(where, "score_function", score_function, SCORE_FUNCTIONS)
    check_shape(where, "logits", logits, T=None, E=None)
    num_tokens, num_experts = logits.shape
    if tokens_per_expert is None:
        tokens_per_expert = torch.zeros(num_experts, device=logits.device)
    elif isinstance(tokens_per_expert, Tensor) and tokens_per_expert.ndim == 2:
        check_shape(where, "tokens_per_expert", tokens_per_expert, B=None, E=num_experts)
        num_sequences = tokens_per_expert.shape[0]
        if num_sequences == 0 or num_tokens % num_sequences:
            wanted = f"(B, E) with B a divisor of T = {num_tokens}"
            raise argument_error(where, "tokens_per_expert", tuple(tokens_per_expert.shape), wanted)
    else:
        check_shape(where, "tokens_per_expert", tokens_per_expert, E=num_experts)
    share_BE, token_weight = _shares(where, tokens_per_expert, logits, group)
    x_TD, weight_ED, bias_E = detached_source(where, source)
    balance, z = _RouterLosses.apply(
        logits, graph_anchor(logits), x_TD, weight_ED, bias_E, share_BE, token_weight, score_function
    )
    return balance, z


class _RouterLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        anchor: Tensor,
        x_TD: Tensor | None,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        share_BE: Tensor,
        token_weight: Tensor,
        score_function: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.score_function = score_function
        ctx.has_source = x_TD is not None
        recompute = (x_TD, weight_ED, bias_E) if ctx.has_source else (logits_TE,)
        ctx.save_for_backward(anchor, share_BE, token_weight, *recompute)
        wide_TE = logits_TE.to(share_BE.dtype)
        log_total_T = torch.logsumexp(wide_TE, dim=-1)
        prob_TE = _shares_of_token(wide_TE, score_function)[0]
        prob_sum_BE = prob_TE.view(_by_sequence(prob_TE, share_BE)).sum(1)
        balance = prob_TE.shape[1] * token_weight * torch.sum(prob_sum_BE * share_BE)
        return balance, token_weight * log_total_T.square().sum()

    @staticmethod
    def backward(ctx: Any, dbalance: Tensor, dz: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes on access
        _, share_BE, token_weight, *kept = saved
        with torch.no_grad():
            logits_TE = logits_of(*kept) if ctx.has_source else kept[0]
            wide_TE = logits_TE.to(share_BE.dtype)
            num_tokens, num_experts = wide_TE.shape
            slope_B1E = (dbalance * num_experts * token_weight * share_BE)[:, None]
            prob_TE, total_T1 = _shares_of_token(wide_TE, ctx.score_function)
            prob_BSE = prob_TE.view(_by_sequence(prob_TE, share_BE))
            mean_BS1 = (prob_BSE * slope_B1E).sum(-1, keepdim=True)  # through the division by the sum
            dprob_TE = (slope_B1E - mean_BS1).view(num_tokens, num_experts)
            if ctx.score_function == "softmax":
                dlogits_TE = dprob_TE * prob_TE
            else:
                dlogits_TE = dprob_TE / total_T1 * pointwise_slope(prob_TE * total_T1, ctx.score_function)
            log_total_T1 = torch.logsumexp(wide_TE, dim=-1, keepdim=True)
            dlogits_TE += torch.exp(wide_TE - log_total_T1) * (2 * dz * token_weight * log_total_T1)
            dlogits_TE = dlogits_TE.to(logits_TE.dtype)
        (dlogits,) = refuse_double_backward("sonic.routing.load_balancing_loss", (dlogits_TE,), (dbalance, dz, *saved))
        return dlogits, *(None,) * 7  # logits; anchor, x, weight, bias, share, token_weight, score_function


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, dcarrier: Tensor) -> Any:
        return dcarrier, torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device)


def _by_sequence(table_TE: Tensor, share_BE: Tensor) -> tuple[int, int, int]:
    """(B, S, E), the shape of a table over tokens cut into B sequences of S."""
    (num_tokens, num_experts), num_sequences = table_TE.shape, share_BE.shape[0]
    return num_sequences, num_tokens // num_sequences, num_experts


def _shares_of_token(logits_TE: Tensor, score_function: str) -> tuple[Tensor, Tensor]:
    """Probabilities that sum to 1 per token, and the sum (T, 1) that they were divided by."""
    prob_TE = probabilities(logits_TE, score_function)
    if score_function == "softmax":
        return prob_TE, logits_TE.new_ones(())
    total_T1 = prob_TE.sum(-1, keepdim=True) + 1e-20
    return prob_TE / total_T1, total_T1


def _shares(where: str, tokens_per_expert: Tensor, logits: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Share of the routed rows per expert, (1, E) or (B, E), and the weight of each of this rank's tokens in the means,
    over ``group``.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    is_by_sequence = tokens_per_expert.ndim == 2
    count_BE = tokens_per_expert.to(wide).view(-1, logits.shape[1])
    total = torch.full((1,), logits.shape[0], dtype=wide, device=logits.device)
    process_group, num_ranks = process_group_of(where, "group", group)
    if num_ranks > 1:
        counted = total if is_by_sequence else torch.cat((count_BE[0], total))
        dist.all_reduce(counted, group=process_group)
        total = counted[-1:]
        if not is_by_sequence:
            count_BE = counted[None, :-1]
    share_BE = count_BE / count_BE.sum(-1, keepdim=True).clamp(min=1)
    return share_BE, (num_ranks / total.clamp(min=1)).reshape(())
