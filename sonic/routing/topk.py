"""The token-choice router: every token goes to its K preferred experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.kernels import ops
from sonic.routing.losses import Group, check_group, process_group_of, router_losses, sequence_load
from sonic.routing.plan import RoutingPlan
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import Source, pair_scores, router_logits, topk_scores
from sonic.shapes import argument_error, check_choice, check_positive, check_shape, tokens_per_run

__all__ = ["TopKRouter", "reset_load", "router_logits", "topk_scores", "update_expert_bias"]

AUX_LOSS_TYPES = ("switch", "sequence", "global")
SCORES_ON = ("output", "input")


class TopKRouter(nn.Module):
    """Send each token to its ``top_k`` preferred experts.

    Logits and scores are computed in float32 (float64 for float64 tokens), whatever the tokens' dtype and under
    autocast too. Kept for backward: the tokens, which the experts keep as well, the scores, and the chosen experts as
    int32; no (T, E) table. A token with NaN or +inf gets NaN scores, and harms no other.

    ==========================  ==========================================================================
    ``weight`` (E, D)           parameter
    ``bias`` (E,)               parameter, with ``bias=True``
    ``expert_bias`` (E,)        buffer in the checkpoint, float32 whatever ``.to(dtype)`` says, with
                                ``enable_expert_bias=True``
    ``load`` (E,)               buffer, not in the checkpoint: rows per expert since the last step of the optimizer,
                                where something needs them
    ==========================  ==========================================================================

    Named settings of published models: :func:`sonic.routing.preset_router`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    expert_bias: Tensor | None
    load: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        pre_softmax: bool = False,
        norm_topk_prob: bool = False,
        topk_scaling_factor: float = 1.0,
        num_groups: int = 1,
        group_topk: int = 1,
        bias: bool = False,
        enable_expert_bias: bool = False,
        expert_bias_rate: float = 1e-3,
        scores_on: str = "output",
        aux_loss_type: str = "switch",
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        aux_loss_group: Group = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K, at most E.
            score_function: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``, sqrt(log(1 + exp(logit))).
            pre_softmax: softmax over all experts before choosing (Switch, OLMoE, Qwen3 with ``norm_topk_prob``); else
                over the K chosen (Mixtral, gpt-oss). Softmax only.
            norm_topk_prob: divide the K scores by their sum.
            topk_scaling_factor: multiplies the finished scores (DeepSeek-V3: 2.5).
            num_groups: the experts are this many equal runs, such as the nodes that hold them; 1: no limit.
            group_topk: runs that one token may reach (node-limited routing). A run is as good as the sum of its
                ``max(1, K // group_topk)`` largest preferences.
            bias: add a learned bias to the logits (gpt-oss).
            enable_expert_bias: balance without a loss: experts are chosen by probability plus ``expert_bias``, which
                :meth:`update_expert_bias` moves against the load; scores do not see it, and it has no gradient.
            expert_bias_rate: how far one update moves the bias.
            scores_on: ``"output"``, or ``"input"``: scores multiply what an expert gets (Llama 4; K = 1 only).
            aux_loss_type: ``"switch"`` balances the tokens of a call; ``"sequence"`` each sequence by itself (the call
                is then told its ``sequence_length``, which :class:`sonic.MoE` does by itself for (batch, sequence, D)
                tokens); ``"global"`` all micro-batches since :meth:`reset_load`.
            aux_loss_coeff: times the load-balancing loss; 0 leaves it out.
            z_loss_coeff: times the router z-loss; 0 leaves it out.
            aux_loss_group: ranks whose tokens are balanced together, see :func:`sonic.routing.load_balancing_loss`.
            backend: insist on a backend.
            device: of the parameters.
            dtype: of the parameters; float32 is also fine with 16-bit tokens.

        Raises:
            ValueError: sizes, names or coefficients that make no sense, alone or together.
        """
        super().__init__()
        where = f"sonic.routing.{type(self).__name__}"
        check_positive(where, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise argument_error(where, "top_k", top_k, f"at most num_experts = {num_experts}")
        check_choice(where, "score_function", score_function, ops.SCORE_FUNCTIONS)
        if pre_softmax and score_function != "softmax":
            raise argument_error(where, "pre_softmax", pre_softmax, f"False with score_function={score_function!r}")
        ops.check_groups(where, num_experts, top_k, num_groups, group_topk)
        check_choice(where, "scores_on", scores_on, SCORES_ON)
        if scores_on == "input" and top_k != 1:
            raise argument_error(where, "scores_on", repr(scores_on), f"'output' with top_k = {top_k}, 'input' needs 1")
        check_choice(where, "aux_loss_type", aux_loss_type, AUX_LOSS_TYPES)
        check_flag(where, "pre_softmax", pre_softmax)
        check_flag(where, "norm_topk_prob", norm_topk_prob)
        check_flag(where, "bias", bias)
        check_flag(where, "enable_expert_bias", enable_expert_bias)
        check_number(where, "aux_loss_coeff", aux_loss_coeff)
        check_number(where, "z_loss_coeff", z_loss_coeff)
        check_number(where, "expert_bias_rate", expert_bias_rate)
        check_number(where, "topk_scaling_factor", topk_scaling_factor, above_zero=True)
        check_group(where, "aux_loss_group", aux_loss_group)
        ops.check_backend(where, backend)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.pre_softmax = pre_softmax
        self.norm_topk_prob = norm_topk_prob
        self.topk_scaling_factor = float(topk_scaling_factor)
        self.num_groups = num_groups
        self.group_topk = group_topk
        self.expert_bias_rate = float(expert_bias_rate)
        self.scores_on = scores_on
        self.aux_loss_type = aux_loss_type
        self.aux_loss_coeff = float(aux_loss_coeff)
        self.z_loss_coeff = float(z_loss_coeff)
        self.aux_loss_group = aux_loss_group
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        zeros = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        expert_bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if enable_expert_bias else None
        self.register_buffer("expert_bias", expert_bias)
        counts_load = enable_expert_bias or (aux_loss_type == "global" and self.aux_loss_coeff > 0)
        load = torch.zeros(num_experts, device=device, dtype=torch.int64) if counts_load else None
        self.register_buffer("load", load, persistent=False)
        self.reset_parameters()

    @property
    def enable_expert_bias(self) -> bool:
        """Whether experts are chosen with a bias against their load."""
        return self.expert_bias is not None

    @property
    def wants_sequence_length(self) -> bool:
        """Whether :meth:`forward` has to be told where sequences begin: in training, for a sequence-wise loss."""
        return self.training and self._is_sequence_wise

    @property
    def _is_sequence_wise(self) -> bool:
        return self.aux_loss_type == "sequence" and self.aux_loss_coeff > 0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight uniformly within ±1/sqrt(D), as ``nn.Linear`` does; biases and load become zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        for tensor in (self.bias, self.expert_bias, self.load):
            if tensor is not None:
                tensor.zero_()

    def forward(self, x_TD: Tensor, *, sequence_length: int | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: (T, D) tokens of the weight's dtype, or of 16 bits with a float32 weight (any floating dtype under
                autocast); T may be 0.
            sequence_length: S, tokens per sequence, for ``aux_loss_type="sequence"``: x holds T / S sequences, one
                after the other.

        Returns:
            The decision, with ``scores`` (T, K), ``logits`` (T, E) and ``aux_loss`` (0-dim) differentiable. With an
            ``aux_loss_group`` the losses are left out in eval mode, where the ranks may not all come by; so is a
            sequence-wise one that is not told the ``sequence_length``.

        Raises:
            ValueError: ``x_TD`` does not fit the weight, or ``sequence_length`` is missing or does not divide T.
        """
        logits_TE = self.logits(x_TD)
        scores_TK, expert_TK, load_EC = topk_scores(
            logits_TE,
            self.top_k,
            score_function=self.score_function,
            pre_softmax=self.pre_softmax,
            norm_topk_prob=self.norm_topk_prob,
            topk_scaling_factor=self.topk_scaling_factor,
            expert_bias=self.expert_bias,
            num_groups=self.num_groups,
            group_topk=self.group_topk,
            source=self._source(x_TD),
            with_load=True,
            backend=self.backend,
        )
        return self._routing(x_TD, logits_TE, scores_TK, expert_TK, sequence_length, load_EC)

    def logits(self, x_TD: Tensor) -> Tensor:
        """The logits (T, E) of tokens (T, D), differentiable; see :func:`sonic.routing.router_logits`.

        Raises:
            ValueError: ``x_TD`` does not fit the weight.
        """
        check_shape(f"sonic.routing.{type(self).__name__}", "x_TD", x_TD, T=None, D=self.hidden_size)
        return router_logits(x_TD, self.weight, self.bias)

    def pair_scores(self, x_TD: Tensor, logits_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """What any (token, expert) pairs would score without a normalisation over the K chosen: (P,), differentiable.

        The probability (softmax over all experts, or the score function) times ``topk_scaling_factor``.

        Args:
            x_TD: the tokens that ``logits_TE`` (T, E) were computed from.
            logits_TE: from :meth:`logits`.
            token_P, expert_P: (P,) integers.
        """
        raw_P = pair_scores(logits_TE, token_P, expert_P, score_function=self.score_function, source=self._source(x_TD))
        return raw_P * self.topk_scaling_factor if self.topk_scaling_factor != 1.0 else raw_P

    @torch.no_grad()
    def update_expert_bias(self, group: Group = "world") -> None:
        """Move ``expert_bias`` by ``expert_bias_rate``, up where the load is below the mean, down where it is above.

        Call it after each step of the optimizer; the load is counted anew after it. The load is that of all training
        calls since the last update, so of all micro-batches, summed over ``group``. Activation checkpointing calls the
        router twice, which counts all loads twice and changes nothing. ``DistributedDataParallel`` copies the buffers
        of rank 0, the load among them, to all ranks before a forward that follows a synchronised backward: accumulate
        micro-batches under its ``no_sync()``, as one should anyway, or build it with ``broadcast_buffers=False``.

        Args:
            group: ranks that train together: a process group, ``"world"``, or None for this rank alone.

        Raises:
            ValueError: the router has no expert bias.

        Source: Wang et al., Auxiliary-Loss-Free Load Balancing (arXiv:2408.15664), algorithm 1.
        """
        where = "sonic.routing.update_expert_bias"
        if self.expert_bias is None or self.load is None:
            raise argument_error(where, "router", "without expert_bias", "one made with enable_expert_bias=True")
        load_E = self.load.to(torch.float32)
        process_group, num_ranks = process_group_of(where, "group", group)
        if num_ranks > 1:
            dist.all_reduce(load_E, group=process_group)
        self.expert_bias += self.expert_bias_rate * torch.sign(load_E.mean() - load_E)
        self.reset_load()

    @torch.no_grad()
    def reset_load(self) -> None:
        """Count the load anew: after each step of the optimizer, with ``aux_loss_type="global"``."""
        if self.load is not None:
            self.load.zero_()

    def extra_repr(self) -> str:
        """The sizes, and the options that are not at their defaults."""
        parts = [f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"]
        parts.append(f"score_function={self.score_function!r}")
        defaults: dict[str, Any] = {
            "pre_softmax": False,
            "norm_topk_prob": False,
            "topk_scaling_factor": 1.0,
            "num_groups": 1,
            "group_topk": 1,
            "enable_expert_bias": False,
            "scores_on": "output",
            "aux_loss_type": "switch",
            "aux_loss_coeff": 0.0,
            "z_loss_coeff": 0.0,
        }
        values = {name: getattr(self, name) for name in defaults}
        parts += [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
        return ", ".join(parts + (["bias=True"] if self.bias is not None else []))

    def _source(self, x_TD: Tensor) -> Source:
        return x_TD, self.weight, self.bias

    def _routing(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        scores_TK: Tensor,
        expert_TK: Tensor,
        sequence_length: int | None = None,
        load_EC: Tensor | None = None,
    ) -> Routing:
        """Plan, load and losses of a choice of K experts per token; ``load_EC`` as :func:`topk_scores` counts it."""
        plan = RoutingPlan.from_topk(expert_TK, self.num_experts, load=load_EC, backend=self.backend)
        count_E = plan.tokens_per_expert()
        aux_loss = self._aux_loss(x_TD, logits_TE, expert_TK, count_E, sequence_length, load_EC)
        metrics = RoutingMetrics(plan, logits=logits_TE)
        return Routing(plan, scores_TK, logits_TE, expert_TK, aux_loss, metrics, self.scores_on)

    def _aux_loss(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        expert_TK: Tensor,
        count_E: Tensor,
        sequence_length: int | None,
        load_EC: Tensor | None,
    ) -> Tensor:
        batch_load_E = count_E
        if self.load is not None and self.training:
            batch_load_E = self.load + count_E
            if torch.is_grad_enabled():  # without, it is a look at the loss, which counts for no step
                self.load.copy_(batch_load_E)
        has_loss = bool(self.aux_loss_coeff or self.z_loss_coeff)
        is_told = self.training or not self._is_sequence_wise or sequence_length is not None
        if not has_loss or not is_told or not (self.training or self.aux_loss_group is None):
            return logits_TE.new_zeros(())
        if self._is_sequence_wise:  # a rank without a token meets the others in the same collective
            num_sequences = self._num_sequences(x_TD.shape[0], sequence_length) if x_TD.shape[0] else 1
            run = tokens_per_run(self.top_k)
            if load_EC is not None and sequence_length is not None and sequence_length % run == 0:  # whole runs
                runs_ER = load_EC[:, :-1]  # the last column is no run
                count_E = runs_ER.reshape(self.num_experts, num_sequences, -1 if x_TD.shape[0] else 0).sum(2).t()
            else:
                count_E = sequence_load(expert_TK, num_sequences, self.num_experts)
        elif self.aux_loss_type == "global":
            count_E = batch_load_E
        balance, z = router_losses(
            logits_TE,
            count_E,
            score_function=self.score_function,
            group=self.aux_loss_group,
            source=self._source(x_TD),
        )
        return self.aux_loss_coeff * balance + self.z_loss_coeff * z

    def _num_sequences(self, num_tokens: int, sequence_length: int | None) -> int:
        where = f"sonic.routing.{type(self).__name__}"
        if sequence_length is None:
            raise argument_error(where, "sequence_length", None, "a positive integer, with aux_loss_type='sequence'")
        check_positive(where, sequence_length=sequence_length)
        if num_tokens % sequence_length:
            raise argument_error(where, "sequence_length", sequence_length, f"a divisor of T = {num_tokens}")
        return num_tokens // sequence_length

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """Casts spare ``expert_bias``: 16 bits would lose its small updates."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None and self.expert_bias.dtype != before.dtype:
            self.expert_bias = before.to(self.expert_bias.device)
        return self


def update_expert_bias(model: nn.Module, group: Group = "world") -> None:
    """Update the expert bias of every router in ``model`` that has one; call it after each step of the optimizer.

    Args:
        model: any module.
        group: as in :meth:`TopKRouter.update_expert_bias`.

    Raises:
        ValueError: no router in it has an expert bias.
    """
    routers = [m for m in model.modules() if isinstance(m, TopKRouter) and m.enable_expert_bias]
    if not routers:
        was = f"a {type(model).__name__} without a router that has an expert bias"
        wanted = "at least one TopKRouter made with enable_expert_bias=True"
        raise argument_error("sonic.routing.update_expert_bias", "model", was, wanted)
    for router in routers:
        router.update_expert_bias(group)


def reset_load(model: nn.Module) -> None:
    """Let every router in ``model`` count its load anew: after each step of the optimizer, with
    ``aux_loss_type="global"``. Routers with an expert bias do so in :func:`update_expert_bias`.
    """
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.reset_load()


def check_flag(where: str, name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, bool):
        raise argument_error(where, name, repr(value), "True or False")


def check_number(where: str, name: str, value: object, above_zero: bool = False) -> None:
    """Refuse what is no finite number of at least 0, or above 0.

    Raises:
        ValueError: naming the argument.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (value > 0 if above_zero else value >= 0):  # type: ignore[operator]
        raise argument_error(where, name, repr(value), f"a finite number {'>' if above_zero else '>='} 0")
