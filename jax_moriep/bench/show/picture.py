"""``jax-moriep plot``: results of the bench as one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_moriep.bench.kinds.table import title_of
from jax_moriep.bench.problem import formats
from jax_moriep.bench.show.report import case_of, of_operation, operations
from jax_moriep.errors import ConfigError, rule
from jax_moriep.results import figures


def read(path: Path) -> dict[str, Any]:
    """A result that ``bench --json`` wrote.

    Raises:
      ConfigError: there is no such file, or it is something else.
    """
    cure = "name a file that `jax-moriep bench ... --json FILE` wrote"
    try:
        result = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(rule("FILE", str(path), "be a readable file", f"{cure} ({e.strerror})")) from e
    except ValueError as e:
        raise ConfigError(rule("FILE", str(path), "hold JSON", cure)) from e
    if not isinstance(result, dict) or result.get("format") != formats.BENCH:
        raise ConfigError(rule("FILE", str(path), f"have the format {formats.BENCH!r}", cure))
    return result


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Draws a row of panels for each result, one panel for each operation, and saves the picture.

    A bar is the median, its whisker reaches to the 90th percentile, the label has the time over that of the
    first implementation, and the dashed line is the floor: a copy of the same bytes, or the same products.

    Args:
      results: at least one, as ``read`` gives them.
      out: the picture's file; its ending tells the format.

    Raises:
      MoriepError: matplotlib is not installed.
      ConfigError: the file cannot be written.
    """
    columns = max(len(operations(result)) + ("memory" in result) for result in results)
    figure = figures.new(4.2 * columns, 3.9 * len(results))
    rows = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for row, result in zip(rows, results, strict=True):
        machine = result["machine"]
        row.suptitle(
            f"{title_of(case_of(result))}\n{machine['cores']} cores of {machine['processor']}", fontsize=10
        )
        axes = row.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.set_visible(False)
        for axis, operation in zip(axes, operations(result), strict=False):
            _draw_times(axis, result, operation)
        if "memory" in result:
            _draw_memory(axes[len(operations(result))], result)
    figures.save(figure, out)


def _draw_times(axis: Any, result: dict[str, Any], operation: str) -> None:
    implementations, floor = of_operation(result, operation)
    p50 = [call["p50"] * 1e3 for call in implementations]
    above = [(call["p90"] - call["p50"]) * 1e3 for call in implementations]
    labels = [f"{time:.3g} ms\n{time / p50[0]:.2g}x" for time in p50]
    _bars(axis, [call["name"] for call in implementations], p50, labels, above)
    axis.set_ylabel("ms: median, whisker to p90", fontsize=8)
    title = operation
    if floor is not None:
        axis.axhline(floor["p50"] * 1e3, linestyle="--", color="black", linewidth=1)
        reached = floor["p50"] / implementations[0]["p50"]
        first = implementations[0]["name"]
        title += f"\n{first} has {reached:.0%} of {floor['name']}'s speed (dashed)"
    axis.set_title(title, fontsize=9)


def _draw_memory(axis: Any, result: dict[str, Any]) -> None:
    names = list(result["memory"])
    peaks = [max(seen["peak"] - seen["before"] for seen in result["memory"][name]) / 1e6 for name in names]
    _bars(axis, names, peaks, [f"{peak:.0f} MB" for peak in peaks])
    axis.set_title("peak memory above the data", fontsize=9)
    axis.set_ylabel("MB, fullest process", fontsize=8)
    for key, text, style in (("capacity_bytes", "C*H", ":"), ("all_routes_bytes", "R*T*K*H", "--")):
        axis.axhline(result[key] / 1e6, linestyle=style, color="black", linewidth=1, label=text)
    axis.legend(fontsize=7)


def _bars(
    axis: Any, names: list[str], heights: list[float], labels: list[str], above: list[float] | None = None
) -> None:
    whiskers = None if above is None else [[0.0] * len(above), above]
    colors = [figures.COLORS[i % len(figures.COLORS)] for i in range(len(names))]
    axis.bar(range(len(names)), heights, color=colors, yerr=whiskers, capsize=4, width=0.6)
    for i, (height, label) in enumerate(zip(heights, labels, strict=True)):
        axis.text(i, height + (above[i] if above else 0), label, ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(names)), [name.replace("+", "+\n") for name in names], fontsize=8)
    axis.margins(y=0.25)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_visible(True)
