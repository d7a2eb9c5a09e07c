"""The result of a run as a table for people."""

from __future__ import annotations

from typing import Any

from jax_moriep.bench import exchange
from jax_moriep.bench.cases import Case
from jax_moriep.bench.runner import failed_checks

_MB = 1e6


def as_text(result: dict[str, Any]) -> str:
    """The result, one table for each operation.

    Args:
      result: what ``runner.measure`` gave.

    Returns:
      Lines of text.
    """
    case = case_of(result)
    machine, versions = result["machine"], result["versions"]
    lines = [
        case.title(),
        f"{machine['cores']} cores of {machine['processor']}; jax {versions['jax']}, "
        f"jax_moriep {versions['jax_moriep']}; {case.iters} iterations by turns, the slowest rank counts",
    ]
    if result["bytes"] is not None:
        received, remote = (_mean(result["bytes"][key]) / _MB for key in ("received", "remote"))
        lines.append(
            f"a rank receives {received:.3g} MB by MORI's convention (distinct (token, rank) pairs, its own "
            f"included), {remote:.3g} MB of it from other ranks; combine moves the same back"
        )
    for operation in operations(result):
        lines += ["", *_table(result, operation)]
    if "memory" in result:
        lines += ["", *_memory(result)]
    lines += ["", *_verdict(result)]
    return "\n".join(lines)


def case_of(result: dict[str, Any]) -> Case:
    """The case of a result."""
    return Case(**{**result["case"], "compare": tuple(result["case"]["compare"])})


def operations(result: dict[str, Any]) -> list[str]:
    """The operations of a result, in the order of measurement."""
    return list(dict.fromkeys(call["operation"] for call in result["calls"]))


def of_operation(
    result: dict[str, Any], operation: str
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The implementations' calls in the order of ``compare``, and the memcpy floor where there is one."""
    by_name = {call["name"]: call for call in result["calls"] if call["operation"] == operation}
    floor = by_name.pop(exchange.FLOOR, None)
    return [by_name[name] for name in result["case"]["compare"]], floor


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _table(result: dict[str, Any], operation: str) -> list[str]:
    implementations, floor = of_operation(result, operation)
    first = implementations[0]
    header = f"{operation:<26}{'p50 ms':>10}{'p90 ms':>10}   {'time over ' + first['name']:<26}"
    if floor is not None:
        header += f"{'GB/s a rank':>12}{'of memcpy speed':>17}"
    lines = [header.rstrip()]
    for call in [*implementations, *([floor] if floor is not None else [])]:
        line = f"  {call['name']:<24}{call['p50'] * 1e3:>10.2f}{call['p90'] * 1e3:>10.2f}   "
        line += f"{call['p50'] / first['p50']:<26.2f}"
        if floor is not None:
            moved = _mean(result["bytes"]["received"]) * (2 if operation == exchange.BOTH else 1)
            line += f"{moved / call['p50'] / 1e9:>12.3g}{floor['p50'] / call['p50']:>16.0%}"
        lines.append(line.rstrip())
    return lines


def _memory(result: dict[str, Any]) -> list[str]:
    lines = [
        f"peak memory of a process, MB{'':<8}{'data':>8}{'peak':>8}{'peak - data':>13}{'of it shared':>14}",
    ]
    for name, of_process in result["memory"].items():
        worst = max(of_process, key=lambda seen: seen["peak"] - seen["before"])
        peak, before, shared = (worst[key] / _MB for key in ("peak", "before", "shared"))
        lines.append(f"  {name:<33}{before:>8.0f}{peak:>8.0f}{peak - before:>13.0f}{shared:>14.0f}")
    capacity, routes = (result[key] / _MB for key in ("capacity_bytes", "all_routes_bytes"))
    lines.append(f"  for comparison: C*H is {capacity:.0f} MB, R*T*K*H is {routes:.0f} MB")
    return lines


def _verdict(result: dict[str, Any]) -> list[str]:
    wrong = failed_checks(result)
    if not wrong:
        return [f"all {len(result['checks'])} comparisons with the NumPy oracle are right"]
    lines = [f"WRONG: {len(wrong)} of {len(result['checks'])} comparisons with the NumPy oracle"]
    for check in wrong[:10]:
        lines.append(
            f"  {check['name']} {check['operation']}, {check['what']}: error {check['error']:.3g}, at most "
            f"{check['limit']:.3g} is right"
        )
    return lines
