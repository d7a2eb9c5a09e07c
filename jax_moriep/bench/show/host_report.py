"""The result of ``bench host`` as rows and as a table for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from jax_moriep.bench.problem import published
from jax_moriep.bench.problem.names import DENSE_COPY, is_baseline
from jax_moriep.bench.run import host
from jax_moriep.bench.show import report


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
    verdict = f"{count - wrong} of {count} comparisons with the oracles are right"
    return [verdict, *missing(entries), *host.failures(result)]


def missing(entries: list[dict[str, Any]]) -> list[str]:
    """Of the cases of a result: baselines that were wrong or did not run, and what no time was left for."""
    lines = []
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
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _entries(result: dict[str, Any], kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for of_set in result["sets"]:
        for entry in of_set["cases"]:
            if entry["case"]["kind"] == kind:
                yield of_set, entry
