"""The result of ``bench host`` as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from jax_moriep.bench.show.host_report import exchange_rows, scaling_rows

_COLORS = {
    "nccl": "#7a7a7a",
    "native": "#2a6f97",
    "native-fp8": "#6a994e",
    "native-put": "#61a5c2",
    "native-put-fp8": "#a7c957",
    "mori": "#8f2d56",
    "mori-fp8": "#c98bb9",
    "collective": "#e07a3f",
}
"""The same in every panel."""


def draw(result: dict[str, Any], path: Path) -> bool:
    """Draws the exchange for each number of ranks, and the weak scaling.

    Args:
      result: what ``host.run`` gave.
      path: of the picture.

    Returns:
      Whether it was drawn: matplotlib may be missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = exchange_rows(result)
    panels = sorted(
        {(row["ranks"], row["operation"]) for row in rows}, key=lambda p: (p[0], p[1] != "dispatch")
    )
    figure = Figure(figsize=(5.0 * max(2, len(panels)), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result['machine']['devices']} x {result['machine']['device']}", fontsize=11)
    grid = figure.add_gridspec(2, 2 * max(2, len(panels)))
    for i, (ranks, operation) in enumerate(panels):
        axis = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        _draw_exchange(
            axis,
            [row for row in rows if (row["ranks"], row["operation"]) == (ranks, operation)],
            ranks,
            operation,
        )
    half = max(2, len(panels))
    for i, kind in enumerate(("layer", "train")):
        _draw_scaling(
            figure.add_subplot(grid[1, i * half : (i + 1) * half]), scaling_rows(result, kind), kind
        )
    figure.savefig(path, dpi=130)
    return True


def _draw_exchange(axis: Any, rows: list[dict[str, Any]], ranks: int, operation: str) -> None:
    groups = sorted({(row["tokens"], row["routing"]) for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows))
    for i, name in enumerate(names):
        at = {(row["tokens"], row["routing"]): row["seconds"] * 1e6 for row in rows if row["name"] == name}
        width = 0.8 / len(names)
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        heights = [at.get(group, 0.0) for group in groups]
        axis.bar(places, heights, width, label=name, color=_COLORS.get(name))
    labels = [f"{tokens}\n{routing}" for tokens, routing in groups]
    axis.set_xticks(range(len(groups)), labels, fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("us, median", fontsize=8)
    axis.set_title(f"{operation}, {ranks} ranks", fontsize=9)
    axis.legend(fontsize=7)


def _draw_scaling(axis: Any, rows: list[dict[str, Any]], kind: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["efficiency"] is not None:
            lines.setdefault(f"{row['name']}, {row['operation']}", []).append(
                (row["ranks"], row["efficiency"])
            )
    for label, points in lines.items():
        if len(points) > 1:
            axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=label)
    axis.set_ylim(0, 1.15)
    axis.set_xlabel("ranks", fontsize=8)
    axis.set_title(f"{kind}: time at 1 rank over time at R, same share per rank", fontsize=9)
    if axis.get_lines():
        axis.legend(fontsize=7)
