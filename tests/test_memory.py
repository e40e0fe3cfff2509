"""The promise on memory, in bytes: what is kept between forward and backward is the table of `sonic/functional.py`.

Bytes are counted where autograd packs tensors away, once per storage, parameters excepted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import sonic
from sonic.kernels import reference
from tests.helpers import GATED, SAVE_MODES, Problem, make_blocks_small, make_problem, short

# (T, D, N, E, K): even, K = E, one expert, nothing a multiple of anything, more experts than rows, no token
SIZES = [
    (64, 32, 16, 8, 2),
    (10, 12, 6, 3, 3),
    (33, 8, 20, 1, 1),
    (57, 19, 7, 11, 5),
    (3, 16, 8, 32, 2),
    (0, 8, 4, 2, 1),
]
HEADLINE = (4096, 1536, 256, 128, 8)


def ids(sizes: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("TDNEK", sizes, strict=True))


class Saved:
    """Within it, everything that autograd keeps; ``own`` storages (of parameters) are not counted."""

    def __init__(self, own: list[Tensor | None]) -> None:
        self._own = {self._key(tensor) for tensor in own if tensor is not None}
        self.tensors: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._key(tensor) not in self._own:
            self.tensors[self._key(tensor)] = tensor
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages, not of the views that were packed."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def __str__(self) -> str:
        return ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in self.tensors.values())


def formula(
    T: int, D: int, N: int, E: int, K: int, *, itemsize: int, gated: bool = True, save: str = "preactivation"
) -> dict[str, int]:
    """The table of `sonic/functional.py` for a plan from top-K and scores in float32 (float64 in a float64 layer)."""
    R, U = T * K, 2 * N if gated else N
    return {
        "x": itemsize * T * D,
        "h": itemsize * R * U if save == "preactivation" else 0,
        "scores": max(itemsize, 4) * R,
        "slots": 4 * R,
        "offsets": 4 * (E + 1),
    }


def saved_by_moe_mlp(problem: Problem, plan: sonic.RoutingPlan, **options: Any) -> Saved:
    leaves = problem.leaves()
    with Saved([leaves[name] for name in leaves if name not in ("x", "scores")]) as saved:
        out = sonic.moe_mlp(**leaves, plan=plan, **{**problem.options, **options})
    assert out.requires_grad
    return saved


def saved_by_layer(
    sizes: tuple[int, ...], dtype: torch.dtype, router: nn.Module | None = None, **options: Any
) -> Saved:
    T, D, N, E, K = sizes
    layer = sonic.MoE(D, N, E, K, dtype=dtype, router=router, **options)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    with Saved(list(layer.parameters())) as saved:
        out = layer(x)
    assert out.requires_grad
    return saved


class TestKeptByTheFunction:
    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=short)
    @pytest.mark.parametrize("sizes", SIZES, ids=ids)
    def test_equals_the_formula(self, sizes: tuple[int, ...], dtype: torch.dtype, save: str) -> None:
        problem = make_problem(*sizes, dtype)
        saved = saved_by_moe_mlp(problem, problem.plan, save=save)
        assert saved.num_bytes == sum(formula(*sizes, itemsize=dtype.itemsize, save=save).values()), saved

    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize("activation", sonic.ACTIVATIONS)
    def test_of_every_activation(self, activation: str, bias: bool) -> None:
        sizes = (57, 19, 7, 11, 5)
        problem = make_problem(*sizes, torch.bfloat16, activation=activation, bias=bias)
        saved = saved_by_moe_mlp(problem, problem.plan)
        assert saved.num_bytes == sum(formula(*sizes, itemsize=2, gated=activation in GATED).values()), saved

    def test_plan_from_pairs_keeps_its_tokens_too(self) -> None:
        sizes = T, _, _, E, K = (57, 19, 7, 11, 5)
        problem = make_problem(*sizes, torch.bfloat16)
        problem.scores = problem.scores.reshape(-1)
        token = torch.arange(T).repeat_interleave(K)
        plan = sonic.RoutingPlan.from_pairs(token, problem.expert_index.reshape(-1), T, E)
        assert saved_by_moe_mlp(problem, plan).num_bytes == sum(formula(*sizes, itemsize=2).values()) + 4 * T * K

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
    def test_grouped_rows(self, scored: bool, save: str) -> None:
        """`expert_mlp` keeps the caller's rows, H, the scores if there are any, and E + 1 offsets."""
        problem = make_problem(57, 19, 7, 11, 5, torch.bfloat16)
        grouped = problem.grouped()
        rows, scores = grouped.rows.requires_grad_(), grouped.row_scores.requires_grad_() if scored else None
        with Saved([problem.w1, problem.w2]) as saved:
            sonic.expert_mlp(rows, problem.w1, problem.w2, grouped.tokens_per_expert, scores, save=save)
        R = 57 * 5
        h = 2 * R * 14 if save == "preactivation" else 0
        assert saved.num_bytes == 2 * R * 19 + h + (4 * R if scored else 0) + 4 * 12, saved

    def test_tensors_of_the_caller_are_kept_as_they_are(self) -> None:
        """X and the scores are no copies: a residual stream that keeps X anyway pays for it once."""
        problem = make_problem(57, 19, 7, 11, 5, torch.bfloat16)
        leaves, plan = problem.leaves(), problem.plan
        with Saved([]) as saved:
            sonic.moe_mlp(**leaves, plan=plan)
        for tensor in (*leaves.values(), plan.slot_of_row_R, plan.expert_offset_E1):
            assert Saved._key(tensor) in saved.tensors
        assert len(saved.tensors) == len(leaves) + 3  # slots, offsets, H

    def test_headline_without_numbers(self) -> None:
        """4,096 tokens of width 1,536 in bf16, 8 of 128 experts of width 256: 44.5 MiB, of which H is 32 MiB."""
        T, D, N, E, K = HEADLINE
        with FakeTensorMode():
            x = torch.empty(T, D, dtype=torch.bfloat16, requires_grad=True)
            w1 = torch.empty(E, 2 * N, D, dtype=torch.bfloat16, requires_grad=True)
            w2 = torch.empty(E, D, N, dtype=torch.bfloat16, requires_grad=True)
            scores = torch.empty(T, K, requires_grad=True)
            plan = sonic.RoutingPlan.from_topk(torch.empty(T, K, dtype=torch.int32), E)
            with Saved([w1, w2]) as saved:
                sonic.moe_mlp(x, w1, w2, scores, plan)
        assert saved.num_bytes == 2 * T * D + 4 * T * K * N + 8 * T * K + 4 * (E + 1) == 46_400_004

    @pytest.mark.slow
    def test_headline(self) -> None:
        T, D, N, E, K = HEADLINE
        x = torch.randn(T, D).bfloat16().requires_grad_()
        w1 = torch.zeros(E, 2 * N, D, dtype=torch.bfloat16, requires_grad=True)
        w2 = torch.zeros(E, D, N, dtype=torch.bfloat16, requires_grad=True)
        scores = torch.rand(T, K, requires_grad=True)
        plan = sonic.RoutingPlan.from_topk(torch.rand(T, E).topk(K).indices, E)
        with Saved([w1, w2]) as saved:
            sonic.moe_mlp(x, w1, w2, scores, plan)
        assert saved.num_bytes == 2 * T * D + 4 * T * K * N + 8 * T * K + 4 * (E + 1)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_inference_keeps_nothing(self, mode: Callable[[], Any]) -> None:
        problem = make_problem(57, 19, 7, 11, 5)
        leaves, plan = problem.leaves(), problem.plan
        with Saved([]) as saved, mode():
            sonic.moe_mlp(**leaves, plan=plan)
        assert not saved.tensors, saved
        frozen = {name: leaf.detach() for name, leaf in leaves.items()}
        with Saved([]) as saved:
            sonic.moe_mlp(**frozen, plan=plan)
        assert not saved.tensors, saved

    def test_nothing_outlives_the_backward(self) -> None:
        """H is gone as soon as backward ran, though output and plan are still held."""
        problem = make_problem(57, 19, 7, 11, 5)
        leaves, plan = problem.leaves(), problem.plan
        kept = []

        def pack(tensor: Tensor) -> Tensor:
            kept.extend([weakref.ref(tensor)] * (tensor.shape == (57 * 5, 14)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = sonic.moe_mlp(**leaves, plan=plan)
        (h,) = kept
        before = h() is not None
        out.sum().backward()
        after = h() is not None
        assert (before, after) == (True, False)


class TestKeptByTheLayer:
    """With its router: X once, scores once, the chosen experts as int32, no (T, E) table."""

    @pytest.mark.parametrize("save", SAVE_MODES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=short)
    @pytest.mark.parametrize("sizes", SIZES, ids=ids)
    def test_equals_the_formula(self, sizes: tuple[int, ...], dtype: torch.dtype, save: str) -> None:
        T, _, _, _, K = sizes
        saved = saved_by_layer(sizes, dtype, save=save)
        assert saved.num_bytes == sum(formula(*sizes, itemsize=dtype.itemsize, save=save).values()) + 4 * T * K, saved

    @pytest.mark.parametrize(
        ("options", "more_per_pair", "more_per_expert"),
        [
            ({}, 0, 0),
            ({"norm_topk_prob": True}, 0, 0),
            ({"score_function": "sigmoid"}, 0, 0),
            ({"pre_softmax": True}, 0, 0),
            ({"pre_softmax": True, "norm_topk_prob": True}, 0, 0),
            # scores and the probabilities that they were made from differ: both are kept
            ({"topk_scaling_factor": 2.5}, 4, 0),
            ({"score_function": "sigmoid", "norm_topk_prob": True}, 4, 0),
            # each expert's share of the rows, and the weight of a token
            ({"aux_loss_coeff": 0.01}, 0, 4),
            ({"z_loss_coeff": 0.01}, 0, 4),
            ({"aux_loss_coeff": 0.01, "z_loss_coeff": 0.01, "pre_softmax": True}, 0, 4),
            ({"aux_loss_coeff": 0.01, "score_function": "sigmoid"}, 0, 4),
        ],
        ids=lambda value: (
            "-".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else ""
        ),
    )
    def test_no_table_over_tokens_and_experts(
        self, options: dict[str, Any], more_per_pair: int, more_per_expert: int
    ) -> None:
        """With more experts than anything else, so that a (T, E) table would be the largest tensor."""
        sizes = T, D, N, E, K = (48, 24, 4, 500, 2)
        router = sonic.routing.TopKRouter(D, E, K, dtype=torch.bfloat16, **options)
        saved = saved_by_layer(sizes, torch.bfloat16, router)
        more = (4 + more_per_pair) * T * K + (more_per_expert * (E + 1))
        assert saved.num_bytes == sum(formula(*sizes, itemsize=2).values()) + more, saved
        assert max(tensor.numel() for tensor in saved.tensors.values()) < T * E

    def test_shared_expert_adds_its_own_preactivations(self) -> None:
        sizes = T, D, N, E, K = (57, 19, 7, 11, 5)
        saved = saved_by_layer(sizes, torch.bfloat16, shared_intermediate_size=13)
        shared = 2 * T * 26 + 4 * 2  # H, two offsets; X is there
        assert saved.num_bytes == sum(formula(*sizes, itemsize=2).values()) + 4 * T * K + shared, saved

    @pytest.mark.parametrize("save", SAVE_MODES)
    def test_finer_experts_cost_bookkeeping_only(self, save: str) -> None:
        """N/2 and 2K: the same K N, so the same X and H; scores, slots and chosen experts are 12 bytes a pair."""
        T, D, N, E, K = 96, 32, 32, 64, 2
        coarse = saved_by_layer((T, D, N, E, K), torch.bfloat16, save=save).num_bytes
        for finer in (2, 4, 8):
            fine = saved_by_layer((T, D, N // finer, E, K * finer), torch.bfloat16, save=save).num_bytes
            assert fine - coarse == 12 * T * K * (finer - 1)

    def test_batch_and_sequence_are_not_copied(self) -> None:
        layer = sonic.MoE(24, 8, 6, 2)
        x = torch.randn(3, 5, 24, requires_grad=True)
        with Saved(list(layer.parameters())) as saved:
            layer(x)
        assert Saved._key(x) in saved.tensors
        assert saved.num_bytes == sum(formula(15, 24, 8, 6, 2, itemsize=4).values()) + 4 * 15 * 2, saved

    def test_autocast_keeps_the_cast_tokens_and_weights(self) -> None:
        """As torch's own layers do: beside X in float32 (the router's), X and the weights in bf16."""
        T, D, N, E, K = sizes = (57, 19, 7, 11, 5)
        layer = sonic.MoE(D, N, E, K)
        x = torch.randn(T, D, requires_grad=True)
        with Saved(list(layer.parameters())) as saved, torch.autocast("cpu", torch.bfloat16):
            layer(x)
        cast = 2 * (layer.w1.numel() + layer.w2.numel())
        assert saved.num_bytes == sum(formula(*sizes, itemsize=2).values()) + 4 * T * K + 4 * T * D + cast, saved

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_inference_keeps_nothing(self, mode: Callable[[], Any]) -> None:
        layer = sonic.MoE(24, 8, 6, 2)
        with Saved([]) as saved, mode():
            layer(torch.randn(3, 24))
        assert not saved.tensors, saved


class Allocations(TorchDispatchMode):
    """Within it, the largest tensor that any operation of torch made anew, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.largest_by = 0, ""
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {value.untyped_storage()._cdata for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self._known:
                    self._made(storage, str(func))
        return result

    def _made(self, storage: torch.UntypedStorage, by: str) -> None:
        if storage.nbytes() > self.largest:
            self.largest, self.largest_by = storage.nbytes(), by
        self._known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


class TestTransient:
    """A, Y, dH, s A and the rows of dX exist for one block at a time, in the reference's whole pass."""

    T, D, N, E, K = 512, 64, 8, 16, 8
    R, U = T * K, 2 * N

    def passes(self, dtype: torch.dtype, keep_h: bool) -> tuple[Allocations, Allocations, int]:
        """Allocations of the forward and backward pass, and the bytes of one (R, D) array."""
        problem = make_problem(self.T, self.D, self.N, self.E, self.K, dtype, bias=True)
        plan, scores = problem.plan, problem.grouped().row_scores
        weights = problem.w1, problem.w2, problem.b1, problem.b2, scores, plan.expert_offset_E1, plan.token_of_row_R
        act = (problem.activation, problem.glu_layout)
        with Allocations() as forward:
            _, h = reference.experts(problem.x, *weights, *act, keep_h)
        with Allocations() as backward:
            reference.experts_bwd(problem.dout, problem.x, h if keep_h else None, *weights, *act, *[True] * 6)
        return forward, backward, self.R * self.D * dtype.itemsize

    @pytest.mark.parametrize("keep_h", [True, False], ids=["h-kept", "h-again"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
    def test_no_array_of_rows_by_width(self, dtype: torch.dtype, keep_h: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        make_blocks_small(monkeypatch, 64)
        *passes, bytes_RD = self.passes(dtype, keep_h)
        for made in passes:
            assert 0 < made.largest <= bytes_RD // 2, made.largest_by

    def test_forward_peak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Output, H and int64 indices, and scratch of a block; with all of A and Y it would be three times as much."""
        make_blocks_small(monkeypatch, 64)
        forward, _, bytes_RD = self.passes(torch.float32, True)
        scratch = 4 * 64 * (2 * self.D + self.U + 2 * self.N)
        kept = 4 * (self.T * self.D + self.R * self.U)
        assert kept < forward.peak <= kept + 8 * self.R + 2 * scratch
        assert forward.peak < bytes_RD

    def test_backward_peak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gradients themselves, int64 indices, and scratch of a block."""
        make_blocks_small(monkeypatch, 64)
        _, backward, bytes_RD = self.passes(torch.float32, True)
        weights = self.E * (self.U * self.D + self.D * self.N + self.U + self.D)
        kept = 4 * (self.T * self.D + self.R + weights)
        scratch = 4 * 64 * (3 * self.D + 2 * self.U + 4 * self.N)
        assert kept < backward.peak <= kept + 8 * self.R + 2 * scratch
        assert backward.peak < bytes_RD

    def test_measure_sees_what_is_made(self) -> None:
        with Allocations() as made:
            a = torch.ones(1000)
            b = a + 1
            del a
            c = b.view(10, 100) * 2
            del b
        assert made.largest == 4000 and made.peak == 8000 and made.alive == 4000
        assert c.shape == (10, 100)

    def test_blocks_of_one_expert_stay_bounded(self) -> None:
        """An expert with all rows is walked in blocks too, at their real size: scratch does not grow with R."""
        largest = []
        for T in (4_096, 16_384):
            x, w1, w2 = torch.zeros(T, 512), torch.zeros(1, 64, 512), torch.zeros(1, 512, 32)
            offset = torch.tensor([0, T], dtype=torch.int32)
            with Allocations() as made:
                reference.experts(x, w1, w2, None, None, None, offset, None, "swiglu", "concatenated", False)
            largest.append(made.peak - 4 * x.numel())
        assert largest[0] <= largest[1] <= 20 << 20
