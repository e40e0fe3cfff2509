"""The experts with weight gradients that go where Megatron wants them: straight into its main gradient, or later.

:func:`sonic.moe_mlp` and :func:`sonic.expert_mlp` return weight gradients as any function does. Megatron has two wishes
beyond that. ``gradient_accumulation_fusion``: they are added, unrounded, to the float32 ``weight.main_grad``, and no
gradient of the weights' size is made. ``delay_wgrad_compute``: backward leaves them out, and ``backward_dw()`` computes
them while something else is communicated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sonic.functional import expert_mlp, moe_mlp
from sonic.routing.plan import RoutingPlan

__all__ = ["WeightGradients"]

_OPS = torch.ops.sonic  # the library's ops, registered by sonic.kernels.ops; importing sonic does that


class WeightGradients:
    """What becomes of the weight gradients of one module with ``weight1``, ``weight2``, ``bias1`` and ``bias2``.

    Attributes:
        into_main_grad: add them to ``weight.main_grad`` where there is one of float32.
        delayed: backward leaves them out until :meth:`compute`.
        hooks: called after :meth:`compute`, as Megatron's data parallelism wants it.
    """

    def __init__(self, module: nn.Module, *, into_main_grad: bool, delayed: bool) -> None:
        """
        Args:
            module: its parameters are read at each call: biases may be None.
            into_main_grad, delayed: see above.
        """
        self._module = module
        self.into_main_grad, self.delayed = into_main_grad, delayed
        self.hooks: list[Callable[[], object]] = []
        self._pending: deque[tuple[Any, ...]] = deque()

    def apply(
        self,
        x: Tensor,
        scores: Tensor | None,
        plan: RoutingPlan | None,
        tokens_per_expert: Tensor | None,
        *,
        activation: str,
        save: str,
        backend: str | None,
    ) -> Tensor:
        """The experts on tokens with a plan, or on rows that stand in order.

        Args:
            x: (T, D) with a plan, else (R, D).
            scores: of the plan's shape, or (R,); None for 1.
            plan: who goes where; None: ``tokens_per_expert`` says it.
            tokens_per_expert: (E,) integer on any device, without a plan.
            activation, save, backend: see :func:`sonic.moe_mlp`.

        Returns:
            The shape of x.

        Raises:
            ValueError: as :func:`sonic.moe_mlp` and :func:`sonic.expert_mlp`.
        """
        weights = [getattr(self._module, name) for name in ("weight1", "weight2", "bias1", "bias2")]
        w1, w2, b1, b2 = weights
        has_gradients = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in weights)
        if not has_gradients or not (self.into_main_grad or self.delayed):
            options: dict[str, Any] = {"b1": b1, "b2": b2, "activation": activation, "save": save, "backend": backend}
            if plan is None:
                assert tokens_per_expert is not None, "one of both is given"
                return expert_mlp(x, w1, w2, tokens_per_expert, scores, **options)
            assert scores is not None, "a plan comes with scores"
            return moe_mlp(x, w1, w2, scores, plan, **options)
        maps: tuple[Tensor | None, ...] = (None, None, None, None)
        if plan is None:
            assert tokens_per_expert is not None, "one of both is given"
            count_E = tokens_per_expert.to(device=x.device, dtype=torch.int64, non_blocking=True)
            offset_E1 = torch.nn.functional.pad(count_E.cumsum(0), (1, 0)).to(torch.int32)
        else:
            offset_E1 = plan.expert_offset_E1
            maps = (plan.token_of_row_R, plan.slot_of_row_R, plan.row_by_token_R, plan.token_offset_T1)
        by_token = plan is not None and plan.top_k is not None
        names = (activation, save == "preactivation", backend, by_token)
        out: Tensor = _Experts.apply(x, w1, w2, b1, b2, scores, offset_E1, *maps, *names, self)
        return out

    def compute(self) -> None:
        """Compute the oldest weight gradients that backward left out, if there are any, and call the hooks."""
        if not self._pending:
            return
        needs, down, up, backend = self._pending.popleft()
        main1, main2 = self._main_grad("weight1", needs[0]), self._main_grad("weight2", needs[1])
        dw2, db2 = _OPS.down_proj_bwd_weight(*down, needs[1], needs[3], main2, backend)
        dw1, db1 = _OPS.up_proj_bwd_weight(*up, needs[0], needs[2], main1, backend)
        gradients = {"weight1": dw1, "weight2": dw2, "bias1": db1, "bias2": db2}
        for need, main_grad, (name, gradient) in zip(needs, (main1, main2, None, None), gradients.items(), strict=True):
            parameter = getattr(self._module, name)
            if not need:
                continue
            if main_grad is not None:
                gradient = self._told(name)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for hook in self.hooks:
            hook()

    def _main_grad(self, name: str, is_needed: bool) -> Tensor | None:
        parameter = getattr(self._module, name)
        main_grad: Tensor | None = getattr(parameter, "main_grad", None)
        is_wanted = self.into_main_grad and is_needed and not hasattr(parameter, "__fsdp_param__")
        if not is_wanted or main_grad is None or main_grad.dtype != torch.float32:
            return None  # the gradient is returned, and added by whoever made the main gradient
        return main_grad

    def _told(self, name: str) -> Tensor | None:
        """What to return as the gradient of a parameter whose main gradient has it already."""
        parameter = getattr(self._module, name)
        if not hasattr(parameter, "grad_added_to_main_grad"):
            return None
        parameter.grad_added_to_main_grad = True
        if getattr(parameter, "zero_out_wgrad", False):
            return torch.zeros_like(parameter)
        return torch.empty_like(parameter)  # Megatron's hooks want to see one; nobody reads it


class _Experts(torch.autograd.Function):
    """As the one of :mod:`sonic.functional`, but for what becomes of the weight gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        scores: Tensor | None,
        offset_E1: Tensor,
        token_of_row_R: Tensor | None,
        slot_of_row_R: Tensor | None,
        row_by_token_R: Tensor | None,
        token_offset_T1: Tensor | None,
        activation: str,
        keep_h: bool,
        backend: str | None,
        by_token: bool,
        gradients: WeightGradients,
    ) -> Tensor:
        x = x.contiguous()
        score_R = scores if slot_of_row_R is None or scores is None else _of_rows(scores, slot_of_row_R)
        maps = (token_of_row_R, row_by_token_R, token_offset_T1)
        out, h_RU = _OPS.experts(
            x, w1, w2, b1, b2, score_R, offset_E1, *maps, activation, "concatenated", keep_h, backend
        )
        late = (row_by_token_R, token_offset_T1) if gradients.delayed else (None, None)
        ctx.save_for_backward(
            x, h_RU if keep_h else None, w1, w2, b1, b2, scores, offset_E1, token_of_row_R, slot_of_row_R, *late
        )
        ctx.options, ctx.by_token, ctx.gradients = (activation, "concatenated", backend), by_token, gradients
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, h_RU, w1, w2, b1, b2, scores, offset_E1, token_R, slot_R, row_by_token_R, token_offset_T1 = ctx.saved_tensors
        activation, glu_layout, backend = ctx.options
        sink: WeightGradients = ctx.gradients
        need_dx, *need_weights, need_dscores = ctx.needs_input_grad[:6]
        need_dw1, need_dw2, need_db1, need_db2 = need_weights
        score_R = scores if slot_R is None or scores is None else _of_rows(scores, slot_R)
        dout = dout.contiguous()
        names = (activation, glu_layout)
        if sink.delayed:
            if h_RU is None:
                h_RU, _ = _OPS.up_proj(x, w1, b1, token_R, offset_E1, *names, True, backend)
            dh_RU, a_RN, dscores_R = _OPS.down_proj_bwd_input(
                dout, h_RU, w2, b2, score_R, token_R, offset_E1, *names, True, need_dscores, backend
            )
            down, up = (dout, a_RN, score_R, token_R, offset_E1), (dh_RU, x, token_R, offset_E1)
            sink._pending.append((tuple(need_weights), down, up, backend))
            dx = _OPS.up_proj_bwd_input(dh_RU, w1, offset_E1, backend) if need_dx else None
            if need_dx and token_R is not None:
                dx = _OPS.combine(dx, None, row_by_token_R, token_offset_T1, None, backend)
            of_weights: list[Tensor | None] = [None, None, None, None]
        else:
            main1, main2 = sink._main_grad("weight1", need_dw1), sink._main_grad("weight2", need_dw2)
            needs = (need_dx, need_dw1, need_dw2, need_db1, need_db2, need_dscores)
            slots = slot_R if ctx.by_token else None
            rows = (score_R, offset_E1, token_R)
            dx, dw1, dw2, db1, db2, dscores_R = _OPS.experts_bwd(
                dout, x, h_RU, w1, w2, b1, b2, *rows, *names, *needs, slots, main1, main2, backend
            )
            if main1 is not None:
                dw1 = sink._told("weight1")
            if main2 is not None:
                dw2 = sink._told("weight2")
            of_weights = [
                gradient if need else None for gradient, need in zip((dw1, dw2, db1, db2), need_weights, strict=True)
            ]
        dscores = None
        if need_dscores:
            dscores = dscores_R if slot_R is None else _of_slots(dscores_R, scores, slot_R)
            dscores = dscores.to(scores.dtype)
        return (dx if need_dx else None, *of_weights, dscores, *[None] * 10)


def _of_rows(scores: Tensor, slot_of_row_R: Tensor) -> Tensor:
    return scores.reshape(-1).index_select(0, slot_of_row_R)


def _of_slots(dscores_R: Tensor, scores: Tensor, slot_of_row_R: Tensor) -> Tensor:
    dscores = dscores_R.new_zeros(scores.numel())
    return dscores.index_copy_(0, slot_of_row_R.long(), dscores_R).reshape(scores.shape)
