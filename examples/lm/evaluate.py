"""What a model is worth: held-out bits per byte, and a sample of what it writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.lm.data import FILE_START
from examples.lm.model import LanguageModel


def bits_per_byte(model: LanguageModel, windows: Tensor, *, batch_size: int, precision: torch.autocast) -> float:
    """Mean of -log2 p(next byte | the bytes before it in its window). 8 is guessing blindly.

    Every process computes all of it: a router that balances over the world has to be called by all of the world.

    Args:
        model: to measure.
        windows: (count, S + 1) int64.
        batch_size: windows per forward pass.
        precision: the autocast context of the training.
    """
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model), precision:
        for batch in windows.split(batch_size):
            batch = batch.to(device)
            logits = model(batch[:, :-1]).logits
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel() / math.log(2)


def generate(
    model: LanguageModel,
    prompt: str,
    *,
    length: int,
    context: int,
    temperature: float,
    seed: int,
    precision: torch.autocast,
) -> str:
    """Begin a file with the prompt and continue it byte by byte. There is no cache: each byte costs a whole pass.

    Args:
        model: to sample from.
        prompt: what the text begins with; may be empty.
        length: bytes to write.
        context: bytes to look back at, at most.
        temperature: above 0; 1 samples what the model believes, less is more cautious.
        seed: of the sampling.
        precision: the autocast context of the training.

    Returns:
        The prompt and what follows, made printable: "·" for a control character, "\N{REPLACEMENT CHARACTER}" for bytes
        that are no UTF-8.
    """
    device = next(model.parameters()).device
    stream = torch.Generator().manual_seed(seed)
    text = list(FILE_START + prompt.encode())
    with evaluating(model), precision:
        for _ in range(length):
            logits = model(torch.tensor([text[-context:]], device=device)).logits[0, -1].cpu()
            probability = torch.softmax(logits / temperature, dim=-1)
            text.append(int(torch.multinomial(probability, 1, generator=stream)))
    characters = bytes(text[1:]).decode("utf-8", errors="replace")
    return "".join(one if one.isprintable() or one in "\n\t" else "·" for one in characters)


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Inside: eval mode, no gradients. Afterwards: training mode."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
