"""The result of ``bench plan`` as tables for people."""

from __future__ import annotations

import math
from typing import Any


def as_text(planned: dict[str, Any]) -> str:
    """What ``kinds.plan.run`` gave, for people."""
    model, machine = planned["model"], planned["machine"]
    lines = [
        f"{model['layers']} MoE layers, {model['config']}",
        f"T={model['tokens']} of each rank, {model['dtype']}, routing {planned['routing']}",
        f"each rank, one way: {machine['inside'] / 1e9:g} GB/s inside a node, {machine['between'] / 1e9:g} "
        f"GB/s between nodes; {machine['flops'] / 1e12:g} TFLOP/s",
        "MB are of one exchange of one layer, out of or into the rank that has most; times are the least "
        "that these speeds allow",
    ]
    for of_ranks in planned["plans"]:
        lines += ["", *_plan_lines(of_ranks)]
    return "\n".join(lines)


def _most(of: dict[str, Any]) -> tuple[float, float]:
    """Bytes inside and between nodes of the rank with the most; of the mean one where they are spread."""
    kind = "mean" if of["spread"] else "max"
    inside, between = of["inside"], of["between"]
    return max(way["max"] for way in inside.values()), max(way[kind] for way in between.values())


def _plan_lines(of_ranks: dict[str, Any]) -> list[str]:
    rows = of_ranks["rows"]
    weights, held = (_digits(of_ranks[key] / 1e9) for key in ("weight_bytes", "row_bytes"))
    lines = [
        f"{of_ranks['ranks']} ranks, {of_ranks['nodes']} nodes; of a rank: weights {weights} GB, rows {held} "
        f"GB (capacity {of_ranks['capacity']}, used {rows['mean']:.0f}, at most {rows['max']:.0f}), experts "
        f"{_digits(of_ranks['expert_seconds'] * 1e6)} us",
        f"  {'':11}{'dispatch MB':>20}{'combine MB':>20}{'us':>20}{'buffers':>10}{'share of a layer':>22}",
        f"  {'':11}{'inside':>10}{'between':>10}{'inside':>10}{'between':>10}{'dispatch':>10}{'combine':>10}"
        f"{'GB':>10}{'forward':>12}{'training':>10}",
    ]
    for name, found in of_ranks["transports"].items():
        if "reason" in found:
            lines.append(f"  {name:11}{found['reason']}")
            continue
        operations = [found["dispatch"], found["combine"]]
        megabytes = [value / 1e6 for of in operations for value in _most(of)]
        micros = [of["seconds"] * 1e6 for of in operations]
        share = found["share"]
        lines.append(
            f"  {name:11}{''.join(f' {_digits(value):>9}' for value in (*megabytes, *micros))}"
            f" {_digits(found['buffer_bytes'] / 1e9):>9}"
            f"{share['forward']:12.0%}{share['training']:10.0%}"
        )
    return lines


def _digits(value: float) -> str:
    """The number with three significant digits, or more where it is 1000 or more; never in powers of ten."""
    if value >= 999.5 or value == 0:
        return f"{value:.0f}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{2 - math.floor(math.log10(rounded))}f}"
