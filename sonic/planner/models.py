"""Shapes of models: a table of known ones, and files with others.

Counts are of parameters; ``active`` ones are those that a token meets. Norms are left out: they are less than a
thousandth of any of these models.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sonic.shapes import argument_error, check_choice, check_positive

__all__ = ["MODELS", "Model", "model_from_file", "model_named"]


@dataclass(frozen=True)
class Model:
    """A decoder: attention and an MLP or a mixture of experts in each layer.

    Attributes:
        name: key in :data:`MODELS`.
        num_layers, hidden_size, vocab_size: of the decoder.
        num_heads, num_kv_heads, head_dim: of attention.
        intermediate_size: of the MLP of dense layers; 0 if there are none.
        num_experts, top_k, expert_intermediate_size: of the mixture of experts; 0 if there is none.
        shared_intermediate_size: of the shared expert, all of them together; 0 without.
        num_dense_layers: layers at the start that have an MLP; all, if there are no experts.
        gated: two matrices before the activation, as SwiGLU has.
        tied_embeddings: the head's matrix is that of the embedding.
        attention_parameters: per layer, where heads do not tell them (low-rank projections); 0: what heads tell.
        full_attention_interval: one layer in so many looks at all tokens; the others cost their projections only.
        source: where the figures are from.

    Raises:
        ValueError: sizes that are no positive integers, or do not fit each other.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int = 0
    num_experts: int = 0
    top_k: int = 0
    expert_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0
    gated: bool = True
    tied_embeddings: bool = False
    attention_parameters: int = 0
    full_attention_interval: int = 1
    source: str = "given by the caller"

    def __post_init__(self) -> None:
        where = "sonic.planner.Model"
        names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        check_positive(where, **{name: getattr(self, name) for name in (*names, "full_attention_interval")})
        for name in ("intermediate_size", "num_experts", "top_k", "expert_intermediate_size"):
            _check_count(where, name, getattr(self, name))
        for name in ("shared_intermediate_size", "num_dense_layers", "attention_parameters"):
            _check_count(where, name, getattr(self, name))
        for name in ("gated", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise argument_error(where, name, repr(getattr(self, name)), "True or False")
        if self.num_heads % self.num_kv_heads:
            raise argument_error(where, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads = {self.num_heads}")
        if self.num_experts:
            check_positive(where, top_k=self.top_k, expert_intermediate_size=self.expert_intermediate_size)
            if self.top_k > self.num_experts:
                raise argument_error(where, "top_k", self.top_k, f"at most num_experts = {self.num_experts}")
            if self.num_dense_layers > self.num_layers:
                wanted = f"at most num_layers = {self.num_layers}"
                raise argument_error(where, "num_dense_layers", self.num_dense_layers, wanted)
        dense = self.num_dense_layers if self.num_experts else self.num_layers
        if dense and not self.intermediate_size:
            wanted = f"a positive width: {dense} of {self.num_layers} layers have an MLP without experts"
            raise argument_error(where, "intermediate_size", 0, wanted)

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) has experts."""
        return bool(self.num_experts) and layer >= self.num_dense_layers

    def has_full_attention(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) looks at all tokens before its own."""
        return (layer + 1) % self.full_attention_interval == 0

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def qkv_width(self) -> int:
        """Outputs of the projections before attention."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Parameters of one layer's attention."""
        plain = self.hidden_size * (self.qkv_width + self.num_heads * self.head_dim)
        return self.attention_parameters or plain

    @property
    def mlp_size(self) -> int:
        """Parameters of the MLP of a dense layer."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def expert_size(self) -> int:
        """Parameters of one expert."""
        return (3 if self.gated else 2) * self.hidden_size * self.expert_intermediate_size

    @property
    def shared_size(self) -> int:
        """Parameters of the shared expert of one layer."""
        return (3 if self.gated else 2) * self.hidden_size * self.shared_intermediate_size

    @property
    def router_size(self) -> int:
        """Parameters of one router."""
        return self.hidden_size * self.num_experts

    @property
    def embedding_size(self) -> int:
        """Parameters of the embedding and the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        moe = self.num_experts * self.expert_size + self.shared_size + self.router_size
        dense = self.num_layers - self.num_moe_layers
        layers = self.num_layers * self.attention_size + self.num_moe_layers * moe + dense * self.mlp_size
        return layers + self.embedding_size

    @property
    def num_active_parameters(self) -> int:
        """Parameters of the matrices that a token is multiplied with: the head counts, embeddings do not."""
        moe = self.top_k * self.expert_size + self.shared_size + self.router_size
        dense = self.num_layers - self.num_moe_layers
        layers = self.num_layers * self.attention_size + self.num_moe_layers * moe + dense * self.mlp_size
        return layers + self.vocab_size * self.hidden_size

    def training_flops(self, sequence: int) -> float:
        """FLOP that training needs per token, forward and backward: 6 for each active parameter, and attention's.

        Attention is causal: a token meets half of ``sequence`` others on average. What is done again does not count.
        """
        full = sum(self.has_full_attention(layer) for layer in range(self.num_layers))
        return 6.0 * self.num_active_parameters + 6.0 * full * self.num_heads * self.head_dim * sequence


def _check_count(where: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise argument_error(where, name, repr(value), "an integer of at least 0")


_CARD = "the published config.json of "
_SONIC = (
    "benchmark shapes of SonicMoE (arXiv:2512.14080); it does not publish the number of layers, which is chosen here "
    "so that the parameters fit the name"
)
_KNOWN = (
    Model(
        *("7b", 40, 1536, 24, 24, 64, 100352),
        num_experts=128,
        top_k=8,
        expert_intermediate_size=256,
        shared_intermediate_size=1024,
        source="lm-engine, configs for its 7B MoE with SonicMoE kernels; the experts are those of arXiv:2512.14080",
    ),
    Model(
        *("1.4b", 17, 768, 12, 12, 64, 50304),
        num_experts=128,
        top_k=8,
        expert_intermediate_size=256,
        source=_SONIC,
    ),
    Model(
        *("30b", 34, 4096, 32, 32, 128, 100352),
        num_experts=256,
        top_k=16,
        expert_intermediate_size=256,
        source=_SONIC,
    ),
    Model(
        *("120b", 71, 4096, 32, 32, 128, 100352),
        num_experts=256,
        top_k=16,
        expert_intermediate_size=512,
        source=_SONIC,
    ),
    Model(
        *("olmoe", 16, 2048, 16, 16, 128, 50304),
        num_experts=64,
        top_k=8,
        expert_intermediate_size=1024,
        source=_CARD + "allenai/OLMoE-1B-7B",
    ),
    Model(
        *("mixtral-8x7b", 32, 4096, 32, 8, 128, 32000),
        num_experts=8,
        top_k=2,
        expert_intermediate_size=14336,
        source=_CARD + "mistralai/Mixtral-8x7B",
    ),
    Model(
        *("gpt-oss-20b", 24, 2880, 64, 8, 64, 201088),
        num_experts=32,
        top_k=4,
        expert_intermediate_size=2880,
        source=_CARD + "openai/gpt-oss-20b; its sliding windows are not counted",
    ),
    Model(
        *("gpt-oss-120b", 36, 2880, 64, 8, 64, 201088),
        num_experts=128,
        top_k=4,
        expert_intermediate_size=2880,
        source=_CARD + "openai/gpt-oss-120b; its sliding windows are not counted",
    ),
    Model(
        *("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 151936),
        num_experts=128,
        top_k=8,
        expert_intermediate_size=768,
        source=_CARD + "Qwen/Qwen3-30B-A3B",
    ),
    Model(
        *("qwen3-next", 48, 2048, 16, 2, 256, 151936),
        num_experts=512,
        top_k=10,
        expert_intermediate_size=512,
        shared_intermediate_size=512,
        attention_parameters=33_554_432,
        full_attention_interval=4,
        source=_CARD + "Qwen/Qwen3-Next-80B-A3B; attention_parameters: mean of its two kinds of layers, rounded",
    ),
    Model(
        *("qwen3-235b", 94, 4096, 64, 4, 128, 151936),
        num_experts=128,
        top_k=8,
        expert_intermediate_size=1536,
        source=_CARD + "Qwen/Qwen3-235B-A22B",
    ),
    Model(
        *("deepseek-v2-lite", 27, 2048, 16, 16, 160, 102400),
        intermediate_size=10944,
        num_experts=64,
        top_k=6,
        expert_intermediate_size=1408,
        shared_intermediate_size=2816,
        num_dense_layers=1,
        attention_parameters=2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048,
        source=_CARD + "deepseek-ai/DeepSeek-V2-Lite; head_dim: mean of 192 (q, k) and 128 (v)",
    ),
    Model(
        *("deepseek-v3", 61, 7168, 128, 128, 160, 129280),
        intermediate_size=18432,
        num_experts=256,
        top_k=8,
        expert_intermediate_size=2048,
        shared_intermediate_size=2048,
        num_dense_layers=3,
        attention_parameters=7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168,
        source=_CARD + "deepseek-ai/DeepSeek-V3; head_dim: mean of 192 (q, k) and 128 (v)",
    ),
    Model(
        *("llama-1b", 16, 2048, 32, 8, 64, 128256),
        intermediate_size=8192,
        tied_embeddings=True,
        source=_CARD + "meta-llama/Llama-3.2-1B",
    ),
    Model(
        *("llama-3b", 28, 3072, 24, 8, 128, 128256),
        intermediate_size=8192,
        tied_embeddings=True,
        source=_CARD + "meta-llama/Llama-3.2-3B",
    ),
    Model(
        *("llama-8b", 32, 4096, 32, 8, 128, 128256),
        intermediate_size=14336,
        source=_CARD + "meta-llama/Llama-3.1-8B",
    ),
    Model(
        *("llama-34b", 48, 8192, 64, 8, 128, 32000),
        intermediate_size=22016,
        source=_CARD + "codellama/CodeLlama-34b",
    ),
    Model(
        *("llama-70b", 80, 8192, 64, 8, 128, 128256),
        intermediate_size=28672,
        source=_CARD + "meta-llama/Llama-3.1-70B",
    ),
    Model(
        *("llama-405b", 126, 16384, 128, 8, 128, 128256),
        intermediate_size=53248,
        source=_CARD + "meta-llama/Llama-3.1-405B",
    ),
    Model(
        *("bloom-176b", 70, 14336, 112, 112, 128, 250880),
        intermediate_size=57344,
        gated=False,
        tied_embeddings=True,
        source=_CARD + "bigscience/bloom",
    ),
)
MODELS: Mapping[str, Model] = MappingProxyType({model.name: model for model in _KNOWN})


def model_named(name: str) -> Model:
    """A model of :data:`MODELS`, or of a file, if ``name`` ends in ``.json`` or ``.toml``.

    Raises:
        ValueError: unknown name; a file that cannot be read or that does not describe a model.
    """
    if name.endswith((".json", ".toml")):
        return model_from_file(Path(name))
    check_choice("sonic.planner.plan", "model", name, tuple(MODELS))
    return MODELS[name]


def model_from_file(path: Path) -> Model:
    """Read a model from a JSON or TOML file: the attributes of :class:`Model` by name.

    Left out, ``name`` is that of the file, ``num_kv_heads`` is ``num_heads``, and ``head_dim`` is hidden_size /
    num_heads. ``{"base": "7b", ...}`` takes the rest from a known model.

    Raises:
        ValueError: no such file, no such key, or values that are no model.
    """
    where = "sonic.planner.model_from_file"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise argument_error(where, "path", f"{str(path)!r} ({error.strerror})", "a file that can be read") from error
    try:
        fields = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise argument_error(
            where, "path", f"{str(path)!r}, whose text is not right ({error})", "JSON or TOML"
        ) from error
    if not isinstance(fields, dict):
        raise argument_error(where, "path", f"{str(path)!r}, a {type(fields).__name__}", "a table of names and values")
    known = [entry.name for entry in dataclasses.fields(Model)]
    for name in fields:
        check_choice(where, "key", name, (*known, "base"))
    start: dict[str, Any] = {"name": path.stem, "source": f"file {path.name}"}
    if "base" in fields:
        base = fields.pop("base")
        check_choice(where, "base", base, tuple(MODELS))
        start = dataclasses.asdict(MODELS[base]) | start
    values = start | fields
    required = [entry.name for entry in dataclasses.fields(Model) if entry.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values and name not in ("num_kv_heads", "head_dim")]
    if missing:
        wanted = 'a value for each, or base="7b" (or another known model)'
        raise argument_error(where, "path", f"{str(path)!r}, without {', '.join(missing)}", wanted)
    hidden_size, num_heads = values["hidden_size"], values["num_heads"]
    values.setdefault("num_kv_heads", num_heads)
    are_sizes = isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads > 0
    values.setdefault("head_dim", hidden_size // num_heads if are_sizes else 1)  # Model refuses sizes that are none
    return Model(**values)


def _toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise ValueError("Python 3.10 cannot read TOML: write JSON")
    return importlib.import_module("tomllib").loads(text)
