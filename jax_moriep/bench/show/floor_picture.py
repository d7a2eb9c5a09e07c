"""``jax-moriep plot``: what ``bench floor`` wrote as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_moriep.bench.problem import formats
from jax_moriep.bench.show.floor_rows import Row, rows_of
from jax_moriep.results import figures

_MET, _MISSED, _NO_AIM = "#6a994e", "#e07a3f", "#7a7a7a"


def read(path: Path) -> dict[str, Any] | None:
    """A result that ``bench floor --json`` wrote; None if the file is none, whatever it is."""
    return figures.read(path, formats.FLOOR)


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Draws a column for each result, in it a bar for each row that is a ratio or has an aim.

    A bar with an aim is as long as the part of it that was reached: met where it passes the dashed line. One
    without is the ratio itself, as large as its label says.

    Args:
      results: at least one, as ``read`` gives them.
      out: the picture's file; its ending tells the format.

    Raises:
      MoriepError: matplotlib is not installed.
      ConfigError: the file cannot be written.
    """
    shown = [[row for row in rows_of(result) if row.aim is not None or not row.unit] for result in results]
    height = 1.5 + 0.2 * max(map(len, shown))
    figure = figures.new(13.0 * len(results), height)
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result, rows in zip(axes, results, shown, strict=True):
        _draw(axis, rows)
        title = "how much of its aim each row reaches (gray: ratios without an aim)"
        axis.set_title(f"{result['machine']['device']}, jax {result['versions']['jax']}: {title}", fontsize=9)
    figures.save(figure, out)


def _draw(axis: Any, rows: list[Row]) -> None:
    lengths = [row.value if row.reached is None else row.reached for row in rows]
    axis.barh(range(len(rows)), lengths, color=[_color(row) for row in rows], height=0.7)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        label = f"{row.value:.3g} {row.unit}".strip()
        if row.aim is not None:
            label += f", {'at least' if row.at_least else 'at most'} {row.aim:g}"
        axis.text(length, place, f" {label}", va="center", fontsize=7)
    axis.axvline(1, linestyle="--", color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{row.group}: {row.what}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15, y=0.01)
    axis.spines[["top", "right"]].set_visible(False)


def _color(row: Row) -> str:
    if row.reached is None:
        return _NO_AIM
    return _MET if row.reached >= 1 else _MISSED
