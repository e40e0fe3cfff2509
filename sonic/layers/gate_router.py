"""A router on the parameters of somebody else's: transformers' gates, read at each call and decided by this library.

:data:`GATES` says, for each class of router in transformers whose decision :func:`sonic.routing.topk_scores` can make,
with which options; they are read from the attributes that the class keeps them in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sonic.routing.plan import RoutingPlan
from sonic.routing.presets import PRESETS
from sonic.routing.result import Routing, RoutingMetrics
from sonic.routing.scores import pair_scores, router_logits, topk_scores
from sonic.shapes import argument_error, check_shape

__all__ = ["GATES", "GateRouter", "gate_options"]


class GateRouter(nn.Module):
    """Top-K on the parameters of a ``gate``, which stays where it is: this module has none of its own.

    What it keeps for backward is what :class:`sonic.routing.TopKRouter` keeps. It has no auxiliary loss: the model that
    owns the gate computes its own from the logits.
    """

    def __init__(
        self,
        gate: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        score_function: str = "softmax",
        pre_softmax: bool = False,
        norm_topk_prob: bool = False,
        topk_scaling_factor: float = 1.0,
        num_groups: int = 1,
        group_topk: int = 1,
        weight: str = "weight",
        bias: str | None = None,
        expert_bias: str | None = None,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            gate: the module that has the parameters.
            num_experts: E.
            top_k: K.
            score_function, pre_softmax, norm_topk_prob, topk_scaling_factor, num_groups, group_topk: see
                :class:`sonic.routing.TopKRouter`.
            weight: the name under which it has the weight (E, D), dots included.
            bias: the name under which the gate has a bias of the logits (E,).
            expert_bias: the name under which it has a bias for the choice alone (E,).
            backend: insist on a backend.
        """
        super().__init__()
        self._gate = (gate,)  # in a tuple: its parameters are not to be found here again
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.pre_softmax = pre_softmax
        self.norm_topk_prob = norm_topk_prob
        self.topk_scaling_factor = float(topk_scaling_factor)
        self.num_groups = num_groups
        self.group_topk = group_topk
        self.backend = backend
        self._weight, self._bias, self._expert_bias = weight, bias, expert_bias

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._parameters_of_gate()[0].shape[-1])

    def forward(self, x_TD: Tensor, *, expert_bias: Tensor | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: (T, D) of the weight's dtype, or of 16 bits with a float32 weight.
            expert_bias: (E,) for the choice alone, where the gate has none itself.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        gate = self._gate[0]
        check_shape("sonic.layers.GateRouter", "x_TD", x_TD, T=None, D=self.hidden_size)
        if self._expert_bias is not None:
            expert_bias = getattr(gate, self._expert_bias)
        logits_TE = router_logits(x_TD, *self._parameters_of_gate())
        scores_TK, expert_TK, load_EC = topk_scores(
            logits_TE,
            self.top_k,
            score_function=self.score_function,
            pre_softmax=self.pre_softmax,
            norm_topk_prob=self.norm_topk_prob,
            topk_scaling_factor=self.topk_scaling_factor,
            expert_bias=expert_bias,
            num_groups=self.num_groups,
            group_topk=self.group_topk,
            source=(x_TD, *self._parameters_of_gate()),
            with_load=True,
            backend=self.backend,
        )
        plan = RoutingPlan.from_topk(expert_TK, self.num_experts, load=load_EC, backend=self.backend)
        metrics = RoutingMetrics(plan, logits=logits_TE)
        return Routing(plan, scores_TK, logits_TE, expert_TK, logits_TE.new_zeros(()), metrics)

    def pair_scores(self, x_TD: Tensor, logits_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """As :meth:`sonic.routing.TopKRouter.pair_scores`: (P,)."""
        source = (x_TD, *self._parameters_of_gate())
        raw_P = pair_scores(logits_TE, token_P, expert_P, score_function=self.score_function, source=source)
        return raw_P * self.topk_scaling_factor if self.topk_scaling_factor != 1.0 else raw_P

    def extra_repr(self) -> str:
        """Sizes and score function."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, score_function={self.score_function!r}"

    def _parameters_of_gate(self) -> tuple[Tensor, Tensor | None]:
        gate: Any = self._gate[0]
        weight: Tensor = attrgetter(self._weight)(gate)
        return weight, getattr(gate, self._bias) if self._bias is not None else None


Options = Callable[[Any], dict[str, Any]]
_DECISION = ("score_function", "pre_softmax", "norm_topk_prob")


def _like(preset: str, **more: Any) -> dict[str, Any]:
    """How the named preset decides, without its sizes."""
    return {**{key: value for key, value in PRESETS[preset].items() if key in _DECISION}, **more}


def _deepseek_v3(gate: Any) -> dict[str, Any]:
    """Sigmoid; the choice by a bias and in groups, each as good as its two best."""
    options = _like("deepseek_v3", norm_topk_prob=bool(gate.norm_topk_prob), expert_bias="e_score_correction_bias")
    options["topk_scaling_factor"] = gate.routed_scaling_factor
    if gate.topk_group < gate.num_group:
        if max(1, gate.top_k // gate.topk_group) != 2:
            was = f"the 2 best of each group at top_k = {gate.top_k}, topk_group = {gate.topk_group}"
            raise ValueError(f"{was}, expected top_k // topk_group = 2: sonic.routing ranks groups by so many")
        options |= {"num_groups": gate.num_group, "group_topk": gate.topk_group}
    return options


def _deepseek_v2(gate: Any) -> dict[str, Any]:
    """Softmax over all, not normalised."""
    if gate.topk_method != "greedy" and gate.topk_group < gate.num_group:
        raise ValueError(
            f"topk_method {gate.topk_method!r}, expected 'greedy': groups by their best one are not served"
        )
    return _like("qwen3", norm_topk_prob=False, topk_scaling_factor=gate.routed_scaling_factor)


def _qwen(gate: Any) -> dict[str, Any]:
    return _like("qwen3", norm_topk_prob=bool(gate.norm_topk_prob))


def _mixtral(gate: Any) -> dict[str, Any]:
    return _like("mixtral")


def _gpt_oss(gate: Any) -> dict[str, Any]:
    return _like("gpt_oss", bias="bias")


def _jamba(gate: Any) -> dict[str, Any]:
    return _like("qwen3", norm_topk_prob=False)


def _minimax_m2(gate: Any) -> dict[str, Any]:
    """Sigmoid, normalised; its block hands it the bias for the choice."""
    return {"score_function": "sigmoid", "norm_topk_prob": True}


def _cohere2(gate: Any) -> dict[str, Any]:
    """As Mixtral, or the sigmoid of the largest logits."""
    if gate.expert_selection_fn == "softmax":
        return _like("mixtral")
    return {"score_function": "sigmoid", "norm_topk_prob": bool(gate.norm_topk_prob)}


def _hunyuan(gate: Any) -> dict[str, Any]:
    return _like("qwen3", weight="wg.weight")


def _sigmoid_with_bias(gate: Any) -> dict[str, Any]:
    return {"score_function": "sigmoid", "norm_topk_prob": True, "expert_bias": "e_score_correction_bias"}


def _named(options: Options, suffix: str, families: str) -> dict[str, Options]:
    return {f"{family}{suffix}": options for family in families.split()}


GATES: Mapping[str, Options] = MappingProxyType(
    {
        **_named(
            _qwen,
            "TopKRouter",
            "FlexOlmo Mellum Olmoe Qwen2Moe Qwen3Moe Qwen3Next Qwen3OmniMoeTalkerText Qwen3OmniMoeThinkerText "
            "Qwen4ExpText",
        ),
        **_named(
            _mixtral,
            "TopKRouter",
            "AriaText GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared MiniMax Mixtral Qwen3OmniMoeText "
            "Qwen3VLMoeText Qwen3_5Moe",
        ),
        **_named(_gpt_oss, "TopKRouter", "GptOss"),
        **_named(_jamba, "TopKRouter", "Jamba"),
        **_named(_minimax_m2, "TopKRouter", "MiniMaxM2"),
        **_named(_sigmoid_with_bias, "TopKRouter", "MiniMaxM3VL"),
        **_named(_cohere2, "TopKRouter", "Cohere2Moe"),
        **_named(_hunyuan, "Gate", "HunYuanMoEV1"),
        **_named(_deepseek_v2, "TopkRouter", "DeepseekOcr2Text DeepseekV2 UnlimitedOcrText"),
        **_named(
            _deepseek_v3,
            "TopkRouter",
            "AXK1 BailingHybrid DeepseekV3 DeepseekV32 Dots1 Dots3NoteText ExaoneMoe Glm4Moe Glm4MoeLite Glm4vMoeText "
            "Glm5NextText GlmMoeDsa HYV4 KimiLinear MiMoV2Flash NemotronH SolarOpen",
        ),
    }
)
"""Class of a router in transformers -> its options for :class:`GateRouter`, but for ``num_experts`` and ``backend``."""


def gate_options(where: str, argument: str, gate: nn.Module) -> dict[str, Any]:
    """The options with which :class:`GateRouter` decides as ``gate`` does.

    Raises:
        ValueError: there are none, for its class or its settings.
    """
    classes = [base.__name__ for base in type(gate).__mro__]  # fully_shard adds one
    options = next((GATES[name] for name in classes if name in GATES), None)
    if options is None:
        wanted = "a router that sonic.layers.gate_router.GATES lists; enable() serves its experts"
        raise argument_error(where, argument, "a router of another kind", wanted)
    try:
        return {"top_k": gate.top_k, **options(gate)}
    except ValueError as error:
        raise ValueError(f"{where}: {argument} is {error}") from error
