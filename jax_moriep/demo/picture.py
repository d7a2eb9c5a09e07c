"""demo.png: the loss curve, and below it, on the same time axis, the load of the experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_moriep.demo.report import Results, smoothed

_COLUMNS = 120
"""At most so many columns in a heat map; each is the mean over a few steps."""
_BLUE, _GREY, _RED = "#1f5fa8", "#8a8f98", "#c0392b"


def draw(results: Results, path: Path) -> None:
    """Draws a run.

    Args:
      results: of the run.
      path: of the picture; its folder is made.
    """
    load = np.asarray(results.load, np.float64)  # [step, layer, expert]
    steps, layers, experts = load.shape
    row = min(1.2, 0.35 + 0.085 * experts)
    figure = Figure(figsize=(10, 4.4 + row * layers), dpi=120, layout="constrained")
    grid = figure.add_gridspec(1 + layers, 1, height_ratios=[3.4, *[row] * layers])
    top = figure.add_subplot(grid[0])
    _draw_loss(top, results)
    maps = [figure.add_subplot(grid[1 + layer], sharex=top) for layer in range(layers)]
    even = load.sum(axis=2, keepdims=True) / experts
    shown = _thinned(load / even)
    for layer, axes in enumerate(maps):
        image = axes.imshow(
            shown[:, layer].T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0.0,
            vmax=2.0,
            extent=(0.5, steps + 0.5, experts - 0.5, -0.5),
        )
        axes.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
        axes.set_yticks([0, experts - 1] if experts > 1 else [0])
        axes.tick_params(labelbottom=layer == layers - 1, length=2)
    maps[0].set_title(
        "load of the experts (one row each), in units of an even share", loc="left", fontsize=10
    )
    maps[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=maps, fraction=0.03, pad=0.01, ticks=[0, 1, 2])
    bar.ax.set_yticklabels(["0", "even", "2+"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_loss(axes: Axes, results: Results) -> None:
    loss = results.loss
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color=_BLUE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(loss), color=_BLUE, linewidth=1.8, label="training")
    axes.plot(
        [0, len(loss)],
        [results.before, results.after],
        linestyle="none",
        marker="o",
        color=_RED,
        clip_on=False,
        zorder=3,
        label=f"held out: {results.before:.2f} before, {results.after:.2f} after",
    )
    frequency = results.start["byte_frequency_loss"]
    axes.axhline(
        frequency,
        color=_GREY,
        linestyle="--",
        linewidth=1.2,
        label=f"byte frequencies alone: {frequency:.2f}",
    )
    axes.set_xlim(0.5, len(loss) + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss, nats per byte")
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    settings, start = results.settings, results.start
    axes.set_title(
        f"{settings.ranks} ranks, {settings.experts} experts in each layer, "
        f"{start['parameters'] / 1e6:.1f} million parameters, transport {start['transport']}, "
        f"{settings.numerics()}",
        loc="left",
        fontsize=11,
    )


def _thinned(load: np.ndarray) -> np.ndarray:
    """Means over neighbouring steps, so that a column is not narrower than a pixel."""
    return np.stack([part.mean(axis=0) for part in np.array_split(load, min(_COLUMNS, len(load)))])
