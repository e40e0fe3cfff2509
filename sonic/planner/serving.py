"""Tokens per second of serving a dense model on one node or two: what published comparisons of wirings measured.

Per sub-block: max(weight bytes / HBM, FLOP / peak) at fitted shares, the KV cache, elementwise traffic, a fixed cost.
An all-reduce takes latency + 2 (tp - 1) / tp bytes / bandwidth. The standard wiring is their sum, a parallel layer has
one all-reduce, and the ladder is played by :func:`sonic.planner.schedule.run`. Throughput is batch * 512 / (prefill +
511 decode steps) with prompts of 1,024 tokens, as in the published runs (gpt-fast: fp16, a static cache that is read to
its full length, the head on every GPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sonic.planner.constants import CONSTANTS
from sonic.planner.models import Model
from sonic.planner.schedule import COMPUTE, Node, forward_tasks, run
from sonic.roofline import CHIPS
from sonic.shapes import check_choice, check_positive

__all__ = ["NVLINK", "P2P_OFF", "SERVING_WIRINGS", "ReduceLink", "Serving", "serving_speedup", "serving_throughput"]

SERVING_WIRINGS = ("standard", "parallel", "ladder", "none")
_PROMPT, _NEW = 1024, 512
_H100 = CHIPS["H100"]
_PEAK, _HBM = _H100.flops_per_second["float16"], _H100.memory_bytes_per_second


@dataclass(frozen=True)
class ReduceLink:
    """An all-reduce's cost.

    Attributes:
        latency: degree of tensor parallelism -> seconds.
        bandwidth: bytes/s of the bus.
    """

    latency: Mapping[int, float]
    bandwidth: float

    def seconds(self, num_bytes: float, tp: int) -> float:
        """Seconds of one all-reduce of ``num_bytes`` over ``tp`` GPUs."""
        return self.latency[tp] + 2 * (tp - 1) / tp * num_bytes / self.bandwidth if tp > 1 else 0.0


@dataclass(frozen=True)
class Serving:
    """Shares of the chip that compute reaches; see ``CONSTANTS`` for the meaning of each."""

    memory_batch_1: float
    memory: float
    fixed: float
    prefill: float
    cache_traffic: float


def _link(name: str) -> ReduceLink:
    latency = {degree: CONSTANTS[f"{name}.latency_{degree}"].value for degree in (2, 4, 8)}
    return ReduceLink(latency, CONSTANTS[f"{name}.bandwidth"].value)


NVLINK, P2P_OFF = _link("nvlink"), _link("p2p_off")
FITTED = Serving(
    *(CONSTANTS[f"serving.{name}"].value for name in ("memory_batch_1", "memory", "fixed", "prefill", "cache_traffic"))
)


def serving_throughput(
    model: Model,
    batch: int,
    tp: int,
    wiring: str = "standard",
    link: ReduceLink = NVLINK,
    interference: float = CONSTANTS["interference"].value,
    serving: Serving = FITTED,
) -> float:
    """Tokens per second on H100.

    Args:
        model: dense.
        batch: prompts at once.
        tp: degree of tensor parallelism.
        wiring: one of :data:`SERVING_WIRINGS`; ``"none"`` is the standard wiring with all-reduces left out.
        link: cost of an all-reduce.
        interference: s of the event model.
        serving: shares of the chip.

    Raises:
        ValueError: unknown wiring; sizes that are not positive.
    """
    where = "sonic.planner.serving_throughput"
    check_choice(where, "wiring", wiring, SERVING_WIRINGS)
    check_positive(where, batch=batch, tp=tp)
    seconds = {}
    for phase, tokens in (("prefill", batch * _PROMPT), ("decode", batch)):
        attention, mlp, head = _pieces(model, batch, tp, phase, serving)
        reduce = link.seconds(tokens * model.hidden_size * 2, tp)
        seconds[phase] = _pass_seconds(model.num_layers, wiring, attention, mlp, head, reduce, interference)
    return batch * _NEW / (seconds["prefill"] + (_NEW - 1) * seconds["decode"])


def serving_speedup(
    model: Model,
    batch: int,
    tp: int,
    wiring: str,
    link: ReduceLink = NVLINK,
    interference: float = CONSTANTS["interference"].value,
) -> float:
    """Throughput of ``wiring`` over that of the standard wiring; see :func:`serving_throughput`."""
    other = serving_throughput(model, batch, tp, "standard", link, interference)
    return serving_throughput(model, batch, tp, wiring, link, interference) / other


def _pieces(model: Model, batch: int, tp: int, phase: str, serving: Serving) -> tuple[float, float, float]:
    """Seconds of compute of one attention, one MLP and the head."""
    is_prefill = phase == "prefill"
    tokens = batch * _PROMPT if is_prefill else batch
    share = serving.memory_batch_1 if batch == 1 else serving.memory

    def product(size: float) -> float:
        return max(2 * size / (share * _HBM), 2 * size * tokens / (serving.prefill * _PEAK))

    elementwise = 10 * tokens * model.hidden_size * 2 / _HBM
    common = elementwise + serving.fixed
    attention = product(model.attention_size / tp) + common
    if is_prefill:
        scores = 4 * tokens * _PROMPT * model.num_heads * model.head_dim / tp
        attention += scores / (serving.prefill * _PEAK)
    else:
        cache = batch * (_PROMPT + _NEW) * 2 * model.num_kv_heads * model.head_dim * 2 / tp
        attention += serving.cache_traffic * cache / _HBM
    head_size = model.vocab_size * model.hidden_size
    head = 2 * head_size / (share * _HBM) if is_prefill else product(head_size)  # prefill needs the last token's only
    return attention, product(model.mlp_size / tp) + common, head


def _pass_seconds(
    num_layers: int, wiring: str, attention: float, mlp: float, head: float, reduce: float, interference: float
) -> float:
    if wiring != "ladder":
        reduces = {"none": 0, "parallel": 1, "standard": 2}[wiring]
        return num_layers * (attention + mlp + reduces * reduce) + head
    nodes = [Node("embedding", ())]
    stream = [0]
    for number in range(2 * num_layers):
        read = stream[max(number - 1, 0)]
        nodes.append(Node("block", (read,), COMPUTE, attention if number % 2 == 0 else mlp))
        nodes.append(Node("reduce", (len(nodes) - 1,), "all-reduce", reduce))
        nodes.append(Node("stream", (stream[-1], len(nodes) - 1)))
        stream.append(len(nodes) - 1)
    nodes.append(Node("head", (stream[-1],), COMPUTE, head))
    return run(forward_tasks(nodes), interference).seconds
