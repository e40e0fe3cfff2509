"""Small decoder layers, whole and split over tensor-parallel ranks, that the tests of ladder blocks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic.parallel import in_flight
from sonic.parallel.in_flight import Started
from sonic.parallel.stack import LadderBlock

WIDTH, HEADS, HIDDEN = 16, 4, 24


class Attention(nn.Module):
    """Causal attention over the last but one dimension, this rank's heads of it: a partial sum."""

    def __init__(self, part: int = 0, parts: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.heads = HEADS // parts
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH // parts, bias=False, dtype=dtype) for _ in range(3))
        self.out = nn.Linear(WIDTH // parts, WIDTH, bias=False, dtype=dtype)

    def forward(self, n: Tensor) -> Tensor:
        q, k, v = (linear(n).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for linear in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2))


class MLP(nn.Module):
    """A gated MLP, this rank's share of its width: a partial sum."""

    def __init__(self, part: int = 0, parts: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN // parts, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(HIDDEN // parts, WIDTH, bias=False, dtype=dtype)

    def forward(self, n: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(n)) * self.up(n))


def block(part: int = 0, parts: int = 1, dtype: torch.dtype = torch.float64) -> LadderBlock:
    norms = [nn.RMSNorm(WIDTH, dtype=dtype) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    return LadderBlock(norms[0], Attention(part, parts, dtype), norms[1], MLP(part, parts, dtype))


def blocks(num_layers: int, part: int = 0, parts: int = 1, dtype: torch.dtype = torch.float64) -> list[LadderBlock]:
    """Layers whose weights, and whose split, are the same on every rank and in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = [block() for _ in range(num_layers)]  # other dtypes would draw other numbers
    if parts == 1:
        return [layer.to(dtype) for layer in whole]  # type: ignore[misc]
    split = [block(part, parts, dtype) for _ in range(num_layers)]
    for source, target in zip(whole, split, strict=True):
        weights = dict(source.named_parameters())
        with torch.no_grad():
            for name, weight in target.named_parameters():
                weight.copy_(share(name, weights[name], part, parts))
    return split


def share(name: str, weight: Tensor, part: int, parts: int) -> Tensor:
    """A rank's part of a whole weight, or of its gradient."""
    if "norm" in name:
        return weight
    return weight.chunk(parts, 1 if name.endswith(("out.weight", "down.weight")) else 0)[part]


def differences(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to the largest value wanted."""
    assert got.keys() == wanted.keys()
    return {
        name: float((got[name].double() - wanted[name].double()).abs().max() / wanted[name].double().abs().max())
        for name in wanted
    }


def results(module: nn.Module, x: Tensor, seed: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    module.zero_grad(set_to_none=True)  # what was returned before stays as it was
    y = module(x, **inputs)
    (y * seed).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


class Recorder:
    """A log of collectives: ``I0 W0`` in the order of issue and wait, numbered as issued within a phase."""

    def __init__(self) -> None:
        self.events: dict[str, list[str]] = {"forward": [], "backward": []}
        self.kinds: dict[str, list[str]] = {"forward": [], "backward": []}
        self.dtypes: set[torch.dtype] = set()

    def issued(self, kind: str, phase: str, started: Started) -> tuple[str, int]:
        number = len(self.kinds[phase])
        self.kinds[phase].append(kind)
        self.dtypes.add(started.tensor.dtype)
        self.events[phase].append(f"I{number}")
        return phase, number

    def waiting(self, entry: tuple[str, int]) -> None:
        self.events[entry[0]].append(f"W{entry[1]}")

    def waited(self, entry: tuple[str, int], aside: bool = False) -> None:
        pass


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    recorder = Recorder()
    with in_flight.logging_to(recorder):
        yield recorder
