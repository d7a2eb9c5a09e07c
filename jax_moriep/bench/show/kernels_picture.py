"""``jax-moriep plot``: what ``bench kernels`` wrote as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_moriep.bench.problem import formats
from jax_moriep.results import figures


def read(path: Path) -> dict[str, Any] | None:
    """A result that ``bench kernels --json`` wrote; None if the file is none, whatever it is."""
    return figures.read(path, formats.KERNELS)


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Draws two panels for each result, one below the other, and saves the picture.

    Above, the rate of every kernel and pass over that of the dense matmuls, or of a copy; below, how many
    times faster the package is than each baseline. What failed has no bar.

    Args:
      results: at least one, as ``read`` gives them.
      out: the picture's file; its ending tells the format.

    Raises:
      MoriepError: matplotlib is not installed.
      ConfigError: the file cannot be written.
    """
    widest = max(len(result["runs"]) for result in results)
    figure = figures.new(max(9.0, 2.3 * widest), 7.2 * len(results))
    axes = figure.subplots(2 * len(results), 1, squeeze=False)[:, 0]
    for i, result in enumerate(results):
        shares, against = axes[2 * i : 2 * i + 2]
        _grouped(shares, of_reference(result), ".2f")
        shares.axhline(1, linestyle="--", color="black", linewidth=1)
        shares.set_ylabel("rate over the reference's", fontsize=8)
        shares.set_title(
            f"{result['device']}, jax {result['jax']}, {result['dtype']}: over dense matmuls of the same "
            "shapes (dashed); with few rows over a copy",
            fontsize=9,
        )
        _grouped(against, times_faster(result), ".3g")
        against.set_yscale("log")
        least = min((height for bars in times_faster(result).values() for height in bars.values()), default=1)
        against.set_ylim(bottom=0.5 * min(1.0, least))
        against.axhline(1, linestyle="--", color="black", linewidth=1)
        against.set_ylabel("times faster than", fontsize=8)
        against.set_title("the whole MLP against others' grouped products", fontsize=9)
    figures.save(figure, out)


def of_reference(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Share and sizes -> kernel or pass -> its rate over the reference's."""
    found: dict[str, dict[str, float]] = {}
    for run in result["runs"]:
        entries = {**run["kernels"], **{k.removeprefix("triton "): v for k, v in run["mlp"].items()}}
        bars = {k: v.get("of_dense", v.get("of_copy")) for k, v in entries.items() if "error" not in v}
        found[f"{run['share']}\n{run['sizes']}"] = bars
    return found


def times_faster(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Share and sizes -> baseline and pass -> how many times faster the package is.

    The name of a baseline tells when its own values were over the limit.
    """
    found: dict[str, dict[str, float]] = {}
    times = "own_times_faster"
    for run in result["runs"]:
        bars = {
            baseline + (" inaccurate" if entry.get("inaccurate") else "") + f" {label}": entry[times]
            for baseline, entries in run["baselines"].items()
            for label, entry in entries.items()
            if isinstance(entry, dict) and times in entry
        }
        if bars:
            found[f"{run['share']}\n{run['sizes']}"] = bars
    return found


def _grouped(axis: Any, groups: dict[str, dict[str, float]], number: str) -> None:
    """A group of bars for each key; every kind of bar has its colour and its place in a group."""
    kinds = list(dict.fromkeys(kind for bars in groups.values() for kind in bars))
    width = 0.85 / max(1, len(kinds))
    for i, kind in enumerate(kinds):
        there = [(g, bars[kind]) for g, bars in enumerate(groups.values()) if kind in bars]
        places = [g + (i - (len(kinds) - 1) / 2) * width for g, _ in there]
        heights = [height for _, height in there]
        axis.bar(places, heights, width, label=kind, color=figures.COLORS[i % len(figures.COLORS)])
        for place, height in zip(places, heights, strict=True):
            label = format(height, number)
            text = axis.text(place, height, label, ha="center", va="bottom", fontsize=6, rotation=90)
            text.set_in_layout(False)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.margins(y=0.35)
    axis.spines[["top", "right"]].set_visible(False)
    if kinds:
        axis.legend(fontsize=7, ncols=4, loc="best")
