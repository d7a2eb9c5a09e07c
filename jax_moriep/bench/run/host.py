"""``bench host``: one table for a whole host, of exchange, layer and training step at 1, 2, ... devices.

Starting jax and compiling costs more than measuring, so there is one set of processes for each number of
ranks, and it works through a list of cases. What fails is recorded and the rest goes on, in new processes if
one has died or hangs; each case and each set has a deadline; the file is written after each case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_moriep.bench.kinds.table import title_of
from jax_moriep.bench.measure.seconds import joined
from jax_moriep.bench.problem import formats
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import is_baseline
from jax_moriep.bench.run import runner
from jax_moriep.bench.run.devices import Devices
from jax_moriep.bench.run.environment import environment
from jax_moriep.bench.run.host_plan import Options, cases_of, devices_of, ranks_of
from jax_moriep.bench.run.worker import EVERYTHING, Job
from jax_moriep.results import machine

_GRACE_SECONDS = 45
"""What a set may take beyond the moment from which it begins no case."""
_LEAST_SECONDS = 30
"""With less than this left, a set is not begun."""
_FIRST_SHARE = 0.6
"""Of the time, for the set with the most ranks."""


def path_of(folder: Path, devices: Devices, count: int, ending: str) -> Path:
    """``host-KIND-xN.ENDING``."""
    kind = re.sub(r"[^a-z0-9]+", "-", devices.kind.lower()).strip("-")
    return folder / f"host-{kind}-x{count}.{ending}"


def run(options: Options, command: str, out: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Measures, and writes the result after each case.

    Args:
      options: what.
      command: the command line, kept in the result.
      out: folder for the file.
      say: takes lines that tell how it goes.

    Returns:
      The result and its file.

    Raises:
      MoriepError: see ``devices_of``.
      ConfigError: the sizes break a rule.
    """
    deadline = time.monotonic() + 60 * options.minutes
    devices = devices_of(options)
    order = ranks_of(options, devices)
    plans = [cases_of(ranks, options, devices) for ranks in order]
    path = path_of(out, devices, max(order), "json")
    result: dict[str, Any] = {
        "format": formats.HOST,
        "command": command,
        "versions": machine.versions(),
        "machine": {**machine.machine(), "device": devices.kind, "devices": devices.count},
        "options": dataclasses.asdict(options),
        "sets": [],
    }

    def save(of_set: dict[str, Any]) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**result, "sets": [*result["sets"], of_set]}, indent=1) + "\n")
        part.replace(path)

    for i, (ranks, cases) in enumerate(zip(order, plans, strict=True)):
        left = deadline - time.monotonic()
        # A set may take longer than its equal share, and leaves the rest to those behind it.
        share = left if i == len(order) - 1 else left * (_FIRST_SHARE if i == 0 else 0.75)
        if left < _LEAST_SECONDS or not cases:
            of_set = {"ranks": ranks, "seconds": 0.0, "errors": [], "not_run": True, "cases": []}
            say(f"{ranks} ranks: not run, for there is no time left or nothing to do")
        else:
            say(f"{ranks} ranks: {len(cases)} cases, at most {share + _GRACE_SECONDS:.0f} s")
            of_set = run_cases(ranks, cases, share, options, devices, say, save)
        save(of_set)
        result["sets"].append(of_set)
    return result, path


def run_cases(
    ranks: int,
    cases: list[Case],
    seconds: float,
    options: Options,
    devices: Devices,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs cases on one set of processes; when these end too early, new ones go on behind the case at fault.

    Args:
      ranks: of all cases.
      cases: what to run.
      seconds: after which no case begins.
      options: their ``case_seconds`` and ``platform`` count.
      devices: of the host.
      say: takes lines that tell how it goes.
      save: takes the set as far as it is.

    Returns:
      The set as a result has it.
    """
    began = time.monotonic()
    until = began + seconds
    threads = max(1, len(os.sched_getaffinity(0)) // cases[0].processes)
    env = {"JAX_MORIEP_TIMEOUT": "60", "OPENBLAS_NUM_THREADS": str(threads)}
    env = {name: value for name, value in env.items() if name not in os.environ}
    if devices.gpus:
        env.update(environment(cases))
    found: list[list[Any] | None] = []
    errors: list[str] = []

    def of_set(seen: list[list[Any] | None]) -> dict[str, Any]:
        entries = [_entry(case, of_case) for case, of_case in zip(cases, seen, strict=False)]
        return {
            "ranks": ranks,
            "processes": cases[0].processes,
            "seconds": time.monotonic() - began,
            "errors": errors,
            "not_run": False,
            "cases": entries,
        }

    def progress(line: str, seen: list[list[Any] | None]) -> None:
        say(line)
        through = next((i for i, of_case in enumerate(seen) if of_case is None), len(seen))
        save(of_set([*found, *seen[:through]]))

    while len(found) < len(cases):
        job = Job(cases[len(found) :], lenient=True, until=until, case_seconds=options.case_seconds)
        left = until + _GRACE_SECONDS - time.monotonic()
        seen, begun, error = runner.run_set(job, left, options.platform, env, progress)
        if error is not None:
            errors.append(error)
            say(f"{ranks} ranks: processes failed: {error}")
        # Without time for more, or where not even a case could begin, what was not reached is lost.
        again = error is not None and begun > 0 and until - time.monotonic() > _LEAST_SECONDS
        found += seen[:begun] if again else seen
    return of_set(found)


def _entry(case: Case, seen: Sequence[Any] | None) -> dict[str, Any]:
    """One case of the result."""
    fields = {"case": dataclasses.asdict(case), "title": title_of(case)}
    if seen is None:
        lost = {"name": EVERYTHING, "operation": "", "error": "its processes ended before it was through"}
        return {**fields, "calls": [], "checks": 0, "wrong": [], "failed": [lost]}
    # A case that fell over in one process only has no numbers in it.
    same = len({len(of_process["calls"]) for of_process in seen}) == 1
    calls = joined(list(seen)) if same else []
    failed = [failure for of_process in seen for failure in of_process["failed"]]
    checks = [check for of_process in seen for check in of_process["checks"]]
    return {
        **fields,
        "device": seen[0]["device"],
        "seconds": max(of_process["seconds"] for of_process in seen),
        "bytes": runner.moved_bytes(case),
        "calls": [{key: value for key, value in call.items() if key != "spans"} for call in calls],
        "checks": len(checks),
        "wrong": [check for check in checks if not check["ok"]],
        "failed": list({(f["name"], f["operation"]): f for f in reversed(failed)}.values()),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the run a failed one: wrong values, failed sets and failed entries that are no baselines."""
    lines = []
    for of_set in result["sets"]:
        for error in of_set["errors"]:
            lines.append(f"processes of {of_set['ranks']} ranks failed: {error}")
        for entry in of_set["cases"]:
            for check in entry["wrong"]:
                if not is_baseline(check["name"]):
                    lines.append(f"WRONG: {entry['title']}: {describe(check)}")
            for failure in entry["failed"]:
                if not (failure.get("not_run") or is_baseline(failure["name"])):
                    lines.append(
                        f"FAILED: {entry['title']}: {failure['name']} {failure['operation']}: "
                        f"{failure['error']}"
                    )
    return lines


def describe(check: dict[str, Any]) -> str:
    """A wrong value in a line."""
    return (
        f"{check['name']} {check['operation']}, {check['what']}: error {check['error']:.3g}, at most "
        f"{check['limit']:.3g} is right"
    )
