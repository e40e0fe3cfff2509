"""What the terminal shows while models train: a live panel, or plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_LINES = 20  # per run
_PLAIN_LINES_OF_MANY = 3  # per run, where there are several


class Display:
    """Progress of one run; use it as a context manager.

    Args:
        console: to write to; a quiet one shows nothing.
        steps: of the whole run.
        tokens_per_step: of all processes together.
        device: whose memory to show.
    """

    def __init__(self, console: Console, steps: int, tokens_per_step: int, device: torch.device) -> None:
        self._console, self._steps, self._tokens_per_step, self._device = console, steps, tokens_per_step, device
        self._bits: list[float] = []
        self._heldout = ""
        # (steps done, seconds of training, clock) of late: speed counts training alone, the time left counts all.
        self._marks: deque[tuple[int, float, float]] = deque(maxlen=50)
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, figures: dict[str, Any]) -> None:
        """Show the figures of a step, the ones that go into the metrics log."""
        step = figures["step"]
        is_first = not self._marks
        self._marks.append((step, figures["seconds"], time.monotonic()))
        self._bits.append(figures["bits_per_byte"])
        if "heldout_bits_per_byte" in figures:
            self._heldout = f"{figures['heldout_bits_per_byte']:.3f} bits/byte"
        if self._live:
            self._live.update(self._panel(figures))
        elif is_first or step % max(1, self._steps // _PLAIN_LINES) == 0 or step == self._steps:
            line = "  ".join(f"{name} {text}" for name, text in self._texts(figures).items() if text)
            width = len(str(self._steps))
            self._console.print(f"{step:{width}}/{self._steps}  {line}")

    def _texts(self, figures: dict[str, Any]) -> dict[str, str]:
        """The figures as text, in reading order; empty where there is none yet."""
        (first, first_seconds, began), (step, seconds, now) = self._marks[0], self._marks[-1]
        steps = step - first
        load = [max(layer) * len(layer) / sum(layer) for layer in figures["load"]]
        memory = memory_mib(self._device)
        return {
            "loss": f"{figures['loss']:.3f} nats",
            "train": f"{figures['bits_per_byte']:.3f} bits/byte",
            "held-out": self._heldout,
            "speed": f"{steps * self._tokens_per_step / (seconds - first_seconds):,.0f} tokens/s" if steps else "",
            "load": f"{max(load):.2f} max/mean" if load else "",  # of the layer that balances worst
            "memory": f"{memory:,.0f} MiB" if memory is not None else "",
            "left": duration((self._steps - step) * (now - began) / steps) if steps else "",
        }

    def _panel(self, figures: dict[str, Any]) -> Panel:
        texts = {name: text for name, text in self._texts(figures).items() if text or name != "load"}
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_row(*(Text(name, style="dim") for name in texts))
        table.add_row(*(Text(text, style="bold", no_wrap=True) for text in texts.values()))
        bar = ProgressBar(total=self._steps, completed=figures["step"])
        blocks = sparkline(self._bits, max(10, self._console.width - 16))
        curve = Text.assemble(("bits/byte ", "dim"), (blocks, "cyan"))
        return Panel(Group(bar, table, curve), title=f"step {figures['step']} of {self._steps}", border_style="blue")


def sparkline(values: list[float], width: int) -> str:
    """A row of blocks as high as the values are, averaged to ``width`` of them at most."""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_mib(device: torch.device) -> float | None:
    """MiB that tensors hold on a GPU, or that this process holds on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # is not there on Windows

    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # second best: the most there ever was
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Progress(Protocol):
    """What a run tells about itself as it goes; several may do so at a time, so each gives its name."""

    def print(self, line: str) -> None:
        """Show a line that stays."""

    def begin(self, name: str, step: int) -> None:
        """A run begins, or goes on with so many steps behind it."""

    def update(self, name: str, figures: dict[str, Any]) -> None:
        """A run has taken a step, with these figures, the ones that go into the metrics log."""


@dataclass
class _Curve:
    """A run that is under way: the steps behind it, bits per byte of those seen here, and of the held-out text."""

    step: int
    bits: list[float]
    heldout: str = ""


class RunsDisplay:
    """Progress of several runs, some of them at a time; use it as a context manager.

    Args:
        console: to write to.
        runs: how many there are.
        finished: how many of them are finished already.
        steps: of each run.
    """

    def __init__(self, console: Console, *, runs: int, finished: int, steps: int) -> None:
        self._console, self._runs, self._steps = console, runs, steps
        self._begun = finished
        self._done = self._done_before = finished * steps  # steps of all runs; those of earlier starts
        self._began = time.monotonic()
        self._curves: dict[str, _Curve] = {}
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None

    def __enter__(self) -> RunsDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def print(self, line: str) -> None:
        """Show a line that stays."""
        self._console.print(line)

    def begin(self, name: str, step: int) -> None:
        """A run begins, or goes on with so many steps behind it."""
        self._begun += 1
        self._done, self._done_before = self._done + step, self._done_before + step
        self._curves[name] = _Curve(step, [])
        if step or not self._live:
            resumed = f", going on after step {step}" if step else ""
            self.print(f"run {self._begun} of {self._runs}: {name}{resumed}")

    def update(self, name: str, figures: dict[str, Any]) -> None:
        """Show the figures of a step, the ones that go into the metrics log."""
        self._done += 1
        curve = self._curves[name]
        curve.step = step = figures["step"]
        curve.bits.append(figures["bits_per_byte"])
        if "heldout_bits_per_byte" in figures:
            curve.heldout = f"held-out {figures['heldout_bits_per_byte']:.4f}"
        if self._live:
            self._live.update(self._panel())
        elif step * _PLAIN_LINES_OF_MANY // self._steps > (step - 1) * _PLAIN_LINES_OF_MANY // self._steps:
            texts = (f"train {curve.bits[-1]:.3f}", curve.heldout, f"all runs: {self._left()} left")
            self.print(f"{step:{len(str(self._steps))}}/{self._steps}  {name}:  " + "  ".join(filter(None, texts)))
        if step == self._steps:
            del self._curves[name]

    def _left(self) -> str:
        """Time left for all runs, from the mean time of a step since this start, measurements included."""
        per_step = (time.monotonic() - self._began) / (self._done - self._done_before)
        return duration((self._runs * self._steps - self._done) * per_step)

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2), expand=True)
        for column in ({"no_wrap": True}, {"ratio": 1}, {"no_wrap": True, "justify": "right"}):
            table.add_column(**column)
        bar = ProgressBar(total=self._runs * self._steps, completed=self._done)
        table.add_row(Text(f"run {self._begun} of {self._runs}", style="bold"), bar, Text(f"{self._left()} left"))
        for name, curve in self._curves.items():
            if not curve.bits:
                continue
            blocks = sparkline(curve.bits, max(10, self._console.width - 75))
            now = f"train {curve.bits[-1]:.3f}  {curve.heldout}"
            step = f"step {curve.step} of {self._steps}"
            table.add_row(Text(name, style="dim"), Text.assemble((blocks, "cyan"), "  ", (now, "bold")), Text(step))
        return Panel(table, title="routing ablation, bits per byte", border_style="blue")
