"""The result of ``bench host`` as rows, as a table for people, and as a picture."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_moriep.bench.problem import published
from jax_moriep.bench.problem.cases import DENSE_COPY, is_baseline
from jax_moriep.bench.run import host
from jax_moriep.bench.show import report

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


def exchange_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each exchange that was measured.

    Returns:
      Rows with ranks, tokens, routing, operation, name, seconds, gb_per_s (MORI's convention), wire_gb_per_s,
      of_link (None without a measured link), and of_nccl, its time over that of the collective.
    """
    rows = []
    for of_set, entry in _entries(result, "exchange"):
        link = link_of(of_set)
        floor = {call["operation"]: call["p50"] for call in entry["calls"] if call["name"] == "nccl"}
        for call in entry["calls"]:
            wire = report.rate(entry, call, "remote")
            rows.append(
                {
                    "ranks": of_set["ranks"],
                    "tokens": entry["case"]["tokens"],
                    "routing": entry["case"]["routing"],
                    "operation": call["operation"],
                    "name": call["name"],
                    "seconds": call["p50"],
                    "gb_per_s": report.rate(entry, call, "received") / 1e9,
                    "wire_gb_per_s": wire / 1e9,
                    "of_link": wire / link if link else None,
                    "of_nccl": floor[call["operation"]] / call["p50"] if call["operation"] in floor else None,
                }
            )
    return rows


def link_of(of_set: dict[str, Any]) -> float | None:
    """Bytes per second to the next rank in a set; None if that was not measured."""
    for entry in of_set["cases"]:
        if entry["case"]["kind"] == "link" and entry["calls"]:
            case = report.case_of(entry)
            return case.tokens * case.row_bytes / entry["calls"][0]["p50"]
    return None


def scaling_rows(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """One row for each number of ranks, name and operation of "layer" or "train".

    Returns:
      Rows with ranks, operation, name, seconds, efficiency (the time at one rank over this one; None without
      it) and, for a layer of one rank, of_floor: the floor's time over this one.
    """
    rows = []
    for of_set, entry in _entries(result, kind):
        floor = {call["operation"]: call["p50"] for call in entry["calls"] if call["name"] == DENSE_COPY}
        for call in entry["calls"]:
            rows.append(
                {
                    "ranks": of_set["ranks"],
                    "operation": call["operation"],
                    "name": call["name"],
                    "seconds": call["p50"],
                    "of_floor": floor[call["operation"]] / call["p50"]
                    if call["operation"] in floor
                    else None,
                }
            )
    alone = {(row["name"], row["operation"]): row["seconds"] for row in rows if row["ranks"] == 1}
    for row in rows:
        base = alone.get((row["name"], row["operation"]))
        row["efficiency"] = None if base is None else base / row["seconds"]
    return sorted(rows, key=lambda row: (row["operation"], row["name"], row["ranks"]))


def as_text(result: dict[str, Any]) -> str:
    """The result as tables."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{machine['devices']} x {machine['device']}, {machine['cores']} cores; jax {versions['jax']}, "
        f"jax_moriep {versions['jax_moriep']}; medians, the slowest rank counts",
    ]
    for of_set in result["sets"]:
        link = link_of(of_set)
        state = "not run" if of_set["not_run"] else f"{of_set['seconds']:.0f} s"
        lines.append(
            f"{of_set['ranks']} ranks: {state}"
            + (f"; link {link / 1e9:.3g} GB/s" if link is not None else "")
        )
    rows = sorted(
        exchange_rows(result),
        key=lambda r: (r["ranks"], r["tokens"], r["routing"], r["operation"] != "dispatch"),
    )
    if rows:
        lines += ["", f"{'exchange':<34}{'us':>10}{'GB/s':>8}{'wire GB/s':>11}{'of link':>9}{'of nccl':>9}"]
    for (ranks, tokens, routing, operation), group in itertools.groupby(
        rows, lambda r: (r["ranks"], r["tokens"], r["routing"], r["operation"])
    ):
        label = f"R={ranks} T={tokens} {routing} {operation}"
        for row in group:
            lines.append(
                f"  {label:<32}{row['seconds'] * 1e6:>10.1f}{row['gb_per_s']:>8.1f}"
                f"{row['wire_gb_per_s']:>11.1f}{_percent(row['of_link']):>9}{_percent(row['of_nccl']):>9}  "
                f"{row['name']}"
            )
        if routing == "uniform":
            lines += _published(result, label, ranks, tokens, operation)
    for kind, heading in (("layer", "layer, weak scaling"), ("train", "training step, weak scaling")):
        rows = scaling_rows(result, kind)
        if rows:
            lines += ["", f"{heading:<34}{'ms':>10}{'efficiency':>12}{'of floor':>10}"]
        for row in rows:
            label = f"R={row['ranks']} {row['operation']}"
            lines.append(
                f"  {label:<32}{row['seconds'] * 1e3:>10.3f}{_percent(row['efficiency']):>12}"
                f"{_percent(row['of_floor']):>10}  {row['name']}"
            )
    return "\n".join([*lines, "", *_verdict(result)])


def _published(result: dict[str, Any], label: str, ranks: int, tokens: int, operation: str) -> list[str]:
    """Lines with what others have published for the same exchange."""
    options = result["options"]
    found = published.rows(
        result["machine"]["device"], ranks, options["hidden"], options["top_k"], tokens, operation
    )
    return [
        f"  {label:<32}{'-' if row.seconds is None else f'{row.seconds * 1e6:.1f}':>10}{row.gb_per_s:>8.1f}"
        f"{'-':>11}{'-':>9}{'-':>9}  mori, {row.wire} ({published.MARK})"
        for row in found
    ]


def _verdict(result: dict[str, Any]) -> list[str]:
    entries = [entry for of_set in result["sets"] for entry in of_set["cases"]]
    count = sum(entry["checks"] for entry in entries)
    wrong = sum(len(entry["wrong"]) for entry in entries)
    lines = [f"{count - wrong} of {count} comparisons with the oracles are right"]
    for entry in entries:
        for check in entry["wrong"]:
            if is_baseline(check["name"]):
                lines.append(f"inaccurate baseline: {entry['title']}: {host.describe(check)}")
        for failure in entry["failed"]:
            if failure.get("not_run") or is_baseline(failure["name"]):
                error = failure["error"].splitlines()[0]
                lines.append(
                    f"not measured: {entry['title']}: {failure['name']} {failure['operation']}: {error}"
                )
    return [*lines, *host.failures(result)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _entries(result: dict[str, Any], kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for of_set in result["sets"]:
        for entry in of_set["cases"]:
            if entry["case"]["kind"] == kind:
                yield of_set, entry


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
