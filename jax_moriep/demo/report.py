"""What the demo shows: a progress bar while it trains, the numbers at the end."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_moriep.demo import data
from jax_moriep.demo.settings import Settings

_BAR = 24
_LOG_LINES = 20
"""Lines of progress in a log, where nothing can be overwritten."""


@dataclasses.dataclass
class Results:
    """What a run measured; ``load`` is [step][layer][expert]."""

    settings: Settings
    start: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss: list[float] = dataclasses.field(default_factory=list)
    load: list[list[list[int]]] = dataclasses.field(default_factory=list)
    before: float = float("nan")
    after: float = float("nan")


class Progress:
    """Shows the events of a run. A terminal gets a bar that moves, anything else a line now and then.

    Args:
      settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.results = Results(settings)
        self._terminal = sys.stdout.isatty()
        self._bar_shown = False
        self._rate: float | None = None
        self._sample = {"prompt": "", "text": ""}
        self._note(
            f"{settings.ranks} processes, {settings.experts} experts in each layer; starting, then compiling"
        )

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes one event of process 0 (``train.emit``)."""
        getattr(self, f"_on_{event.pop('event')}")(**event)

    def _on_start(self, history: dict[str, Any], **start: Any) -> None:
        results, settings = self.results, self.results.settings
        results.start = start
        results.loss, results.load = history["loss"], history["load"]
        self._note(
            f"text: the source of Python's standard library, {start['train_bytes'] / 1e6:.1f} MB in "
            f"{start['train_files']} files to train on, {start['heldout_bytes'] / 1e6:.1f} MB in "
            f"{start['heldout_files']} held out"
        )
        self._note(
            f"model: {start['parameters'] / 1e6:.1f} million parameters; transport {start['transport']}, "
            f"experts {start['experts']}, {settings.numerics()}; {start['tokens_per_step']} tokens in a step"
        )
        if results.loss:
            results.before = history["heldout_before"]
            self._note(f"going on from the checkpoint after step {len(results.loss)}")

    def _on_heldout(self, when: str, nats: float) -> None:
        setattr(self.results, when, nats)
        if when == "before":
            self._note(f"held-out loss before training: {nats:.3f} nats per byte")

    def _on_step(self, step: int, loss: float, load: list[list[int]], seconds: float) -> None:
        self.results.loss.append(loss)
        self.results.load.append(load)
        first = step == self.results.start["first_step"] + 1
        # The first step waits for the compiler; from then on a mean that follows slowly.
        if not first:
            rate = self.results.start["tokens_per_step"] / seconds
            self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        steps = self.results.settings.steps
        shown = max(1, steps // _LOG_LINES)
        if self._terminal:
            self._show_bar(step)
        elif step % shown == 0 or step == steps or first:
            print(self._line(step), flush=True)

    def _on_checkpoint(self, step: int) -> None:
        self._note(f"checkpoint after step {step} in {self.results.settings.checkpoint_dir}")

    def _on_sample(self, prompt: str, text: str) -> None:
        self._sample = {"prompt": prompt, "text": text}

    def _line(self, step: int) -> str:
        steps = self.results.settings.steps
        recent = self.results.loss[-10:]
        text = f"step {step:{len(str(steps))}}/{steps}  loss {sum(recent) / len(recent):.3f}"
        if self._rate is None:
            return text
        left = (steps - step) * self.results.start["tokens_per_step"] / self._rate
        return f"{text}  {self._rate:,.0f} tokens/s  {int(left) // 60}:{int(left) % 60:02d} left"

    def _show_bar(self, step: int) -> None:
        filled = _BAR * step // self.results.settings.steps
        line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {self._line(step)}"
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        self._bar_shown = True

    def _note(self, text: str) -> None:
        """A line of its own; on a terminal it replaces the bar, which comes back with the next step."""
        print("\r\x1b[K" + text if self._bar_shown else text, flush=True)
        self._bar_shown = False

    def interrupted(self) -> None:
        """Says how to go on after Ctrl-C."""
        self._note("interrupted; --resume goes on from the last checkpoint")

    def failed(self, talk: str) -> None:
        """Shows what the processes said before one of them failed."""
        self._note("the demo failed; the last that its processes said:")
        print(textwrap.indent(talk, "  "), file=sys.stderr, flush=True)

    def finish(self, seconds: float, picture: Path | None) -> None:
        """Shows the results.

        Args:
          seconds: that the run took.
          picture: where the picture was drawn, if it was.
        """
        results = self.results
        frequency = results.start["byte_frequency_loss"]
        self._note("")
        print("held-out loss          before training   after training   byte frequencies alone")
        for unit, convert in (("nats per byte", float), ("bits per byte", data.bits)):
            before, after, alone = (convert(x) for x in (results.before, results.after, frequency))
            print(f"  {unit:20} {before:15.3f} {after:16.3f} {alone:24.3f}")
        print("\nload of the experts over the last tenth of the run, in % of a layer's tokens' routes")
        for layer, share in enumerate(mean_load(results.load[-max(1, len(results.load) // 10) :])):
            print(f"  layer {layer}: {' '.join(f'{100 * s:5.1f}' for s in share)}")
        print("\na continuation, drawn from the model after " + repr(self._sample["prompt"]))
        print(textwrap.indent(self._sample["prompt"] + self._sample["text"], "  | ", lambda line: True))
        where = (
            f"; picture in {picture}"
            if picture
            else "; no picture without matplotlib: pip install matplotlib"
        )
        print(f"\n{seconds:.0f} s in all{where}", flush=True)


def mean_load(load: list[list[list[int]]]) -> list[list[float]]:
    """The share of each expert in its layer's routes: [step][layer][expert] counts -> [layer][expert]."""
    shares = []
    for layer in zip(*load, strict=True):
        counts = [sum(expert) for expert in zip(*layer, strict=True)]
        shares.append([count / sum(counts) for count in counts])
    return shares


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The mean over the steps around each: one in forty of all, and fewer at the ends."""
    values = np.asarray(losses)
    reach = min(len(values) // 80, (len(values) - 1) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(middle, len(values) - 1 - middle))
    return (sums[middle + reaches + 1] - sums[middle - reaches]) / (2 * reaches + 1)
