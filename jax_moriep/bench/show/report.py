"""The result of a run as a table for people."""

from __future__ import annotations

from typing import Any

from jax_moriep.bench.kinds.table import KINDS, title_of
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import failed_checks
from jax_moriep.bench.problem.names import FLOORS, is_baseline

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
        title_of(case),
        f"{machine['cores']} cores of {machine['processor']}; jax {versions['jax']}, "
        f"jax_moriep {versions['jax_moriep']}; {case.iters} iterations by turns, the slowest rank counts",
    ]
    if case.repeats > 1:
        lines.append(f"an iteration is one program that does the work {case.repeats} times; times are of one")
    if case.layers > 1:
        lines.append(f"a program has {case.layers} layers, each with weights of its own; times are of one")
    if result["bytes"] is not None:
        received, remote = (_mean(result["bytes"][key]) / _MB for key in ("received", "remote"))
        lines.append(
            f"a rank receives {received:.3g} MB by MORI's convention (distinct (token, rank) pairs, its own "
            f"included), {remote:.3g} MB of it from other ranks; combine moves the same back"
        )
    if "link" in result:
        link = result["link"]
        size, speed = link["bytes"] / _MB, link["bytes"] / link["p50"] / 1e9
        lines.append(f"a copy of {size:.0f} MB to the next rank runs at {speed:.3g} GB/s")
    for operation in operations(result):
        lines += ["", *_table(result, operation)]
    if "memory" in result:
        lines += ["", *_memory(result)]
    lines += ["", *_verdict(result)]
    return "\n".join(lines)


def case_of(result: dict[str, Any]) -> Case:
    """The case of a result."""
    return Case.of_fields(result["case"])


def operations(result: dict[str, Any]) -> list[str]:
    """The operations that implementations were measured at, in the order of measurement."""
    compared = result["case"]["compare"]
    return list(dict.fromkeys(call["operation"] for call in result["calls"] if call["name"] in compared))


def of_operation(
    result: dict[str, Any], operation: str
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The implementations' calls in the order of ``compare``, and the floor where there is one."""
    by_name = {call["name"]: call for call in result["calls"] if call["operation"] == operation}
    floor = next((by_name[name] for name in FLOORS if name in by_name), None)
    return [by_name[name] for name in result["case"]["compare"] if name in by_name], floor


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _table(result: dict[str, Any], operation: str) -> list[str]:
    implementations, floor = of_operation(result, operation)
    first = implementations[0]
    header = f"{operation:<26}{'p50 ms':>10}{'p90 ms':>10}   {'time over ' + first['name']:<26}"
    moves = floor is not None and result["bytes"] is not None
    if floor is not None:
        header += f"{'GB/s a rank':>12}" if moves else ""
        header += f"{'of ' + floor['name'] + ' speed':>17}"
    link = result.get("link")
    if link is not None:
        header += f"{'on the wire':>14}{'of the link':>14}"
    lines = [header.rstrip()]
    for call in [*implementations, *([floor] if floor is not None else [])]:
        line = f"  {call['name']:<24}{_ms(call['p50']):>10}{_ms(call['p90']):>10}   "
        line += f"{call['p50'] / first['p50']:<26.2f}"
        if floor is not None:
            line += f"{rate(result, call, 'received') / 1e9:>12.3g}" if moves else ""
            line += f"{floor['p50'] / call['p50']:>16.0%}"
        if link is not None:
            wire = rate(result, call, "remote")
            line += f"{wire / 1e9:>14.3g}{wire * link['p50'] / link['bytes']:>14.0%}"
        lines.append(line.rstrip())
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-3 else f"{seconds * 1e3:.4f}"


def rate(result: dict[str, Any], call: dict[str, Any], which: str) -> float:
    """Bytes per second and rank of a call of the exchange.

    Args:
      result: with the case and its bytes.
      call: one of its calls.
      which: "received" for MORI's convention, "remote" for what crosses the links.
    """
    case = case_of(result)
    times = KINDS[case.kind].times_moved(case, call["name"], call["operation"])
    return _mean(result["bytes"][which]) * times / call["p50"]


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
    count, wrong = len(result["checks"]), failed_checks(result)
    inaccurate = [check for check in result["checks"] if not check["ok"] and is_baseline(check["name"])]
    if not wrong and not inaccurate:
        return [f"all {count} comparisons with the NumPy oracle are right"]
    lines = []
    for checks, said in ((wrong, "WRONG"), (inaccurate, "inaccurate baselines")):
        if checks:
            lines.append(f"{said}: {len(checks)} of {count} comparisons with the NumPy oracle")
        for check in checks[:10]:
            lines.append(
                f"  {check['name']} {check['operation']}, {check['what']}: error {check['error']:.3g}, "
                f"at most {check['limit']:.3g} is right"
            )
    return lines
