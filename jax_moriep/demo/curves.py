"""What runs of the demo measured, in files, and their loss curves beside each other (``jax-moriep plot``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_moriep.demo.report import Results, smoothed
from jax_moriep.results import figures, machine

FORMAT = "jax-moriep demo 1"


def write(results: Results, seconds: float, command: str, path: Path) -> None:
    """Writes what ``read`` reads: the settings of a run, its losses, and where it ran."""
    settings = results.settings
    result = {
        "format": FORMAT,
        "command": command,
        "versions": machine.versions(),
        "machine": machine.machine(),
        "settings": {name: getattr(settings, name) for name in ("ranks", "steps", *settings.identity())},
        "numerics": settings.numerics(),
        "transport": results.start["transport"],
        "experts": results.start["experts"],
        "byte_frequency_loss": results.start["byte_frequency_loss"],
        "heldout": {"before": results.before, "after": results.after},
        "loss": results.loss,
        "seconds": seconds,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def read(path: Path) -> dict[str, Any] | None:
    """A result that ``demo --json`` wrote; None if the file is none, whatever it is."""
    return figures.read(path, FORMAT)


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Draws the training losses of all runs over each other, and below by how much each is above the first's.

    Args:
      results: at least one, as ``read`` gives them.
      out: the picture's file; its ending tells the format.

    Raises:
      MoriepError: matplotlib is not installed.
      ConfigError: the file cannot be written.
    """
    figure = figures.new(9.0, 6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    first = smoothed(results[0]["loss"])
    for i, result in enumerate(results):
        curve, color = smoothed(result["loss"]), figures.COLORS[i % len(figures.COLORS)]
        steps = range(1, len(curve) + 1)
        above.plot(
            steps,
            curve,
            color=color,
            label=f"{result['numerics']}: {result['heldout']['after']:.3f} held out",
        )
        shared = min(len(curve), len(first))
        below.plot(steps[:shared], curve[:shared] - first[:shared], color=color)
    settings = results[0]["settings"]
    above.set_title(
        f"the demo's model, {settings['ranks']} ranks, {settings['experts']} experts in each layer, seed "
        f"{settings['seed']}: training loss by how the experts compute",
        loc="left",
        fontsize=10,
    )
    above.set_ylabel("loss, nats per byte")
    above.legend(frameon=False)
    below.set_ylabel("above the first")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, out)
