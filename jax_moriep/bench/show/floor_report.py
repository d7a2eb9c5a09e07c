"""The result of ``bench floor`` as a table for people."""

from __future__ import annotations

import itertools
from typing import Any

from jax_moriep.bench.run import floor
from jax_moriep.bench.show import host_report
from jax_moriep.bench.show.floor_rows import Row, rows_of


def as_text(result: dict[str, Any]) -> str:
    """The rows, what they were chosen to be measured with, and what was wrong or is not there."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{machine['device']}; jax {versions['jax']}, jax_moriep {versions['jax_moriep']}; medians by turns"
    ]
    for group, rows in itertools.groupby(rows_of(result), lambda row: row.group):
        lines += ["", group, *map(_line, rows)]
    entries = [entry for of_set in result["sets"] for entry in of_set["cases"]]
    lines += ["", *_how(entries), *_missing(result, entries)]
    checks, wrong = (sum(of) for of in ([e["checks"] for e in entries], [len(e["wrong"]) for e in entries]))
    lines.append(f"{checks - wrong} of {checks} comparisons with the oracles are right")
    return "\n".join([*lines, *floor.failures(result)])


def _line(row: Row) -> str:
    line = f"  {row.what:<72}{row.value:>9.3g} {row.unit:<4}"
    if row.aim is None or row.reached is None:
        return line.rstrip()
    bound = "at least" if row.at_least else "at most"
    return f"{line} {bound} {row.aim:g}: {'met' if row.reached >= 1 else 'not met'}"


def _how(entries: list[dict[str, Any]]) -> list[str]:
    """What was chosen in the run, each once."""
    lines = [
        f"{call['name']} {call['operation']}: {call['how']}"
        if entry["case"]["kind"] == "route"
        else f"{call['name']}: {call['how']}"
        for entry in entries
        for call in entry["calls"]
        if "how" in call
    ]
    return list(dict.fromkeys(lines))


def _missing(result: dict[str, Any], entries: list[dict[str, Any]]) -> list[str]:
    """Baselines that were wrong or did not run, and what no time was left for."""
    lines = host_report.missing(entries)
    for of_kernels in result["kernels"]:
        if of_kernels.get("not_run"):
            lines.append(f"not measured: kernels of {', '.join(of_kernels['shares'])}: {of_kernels['error']}")
    return list(dict.fromkeys(lines))
