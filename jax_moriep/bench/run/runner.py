"""Runs a case on its processes and joins what they saw into one JSON-able result."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_moriep.bench.kinds.table import KINDS, new_case
from jax_moriep.bench.measure.seconds import joined
from jax_moriep.bench.problem import formats
from jax_moriep.bench.problem.cases import GPU_PLATFORMS, Case
from jax_moriep.bench.run import processes, worker
from jax_moriep.bench.run.environment import environment
from jax_moriep.errors import MoriepError
from jax_moriep.results import machine

_OF_LINK = ("hidden", "intermediate", "experts", "top_k", "dtype", "routing", "seed", "repeats")
"""What the measure of the links takes from the case beside it; most of it is of no account there."""


def measure(
    case: Case, command: str, timeout: float | None = None, platform_name: str | None = None
) -> dict[str, Any]:
    """Runs a case.

    Args:
      case: what to run.
      command: the command line, kept in the result.
      timeout: seconds for each set of processes; None for no limit.
      platform_name: value for JAX_PLATFORMS; None leaves it as it is.

    Returns:
      A dict with these keys:

      - format, command, versions, machine, case: what ran where.
      - bytes: for "exchange", by rank, received (MORI's convention) and remote; those of one dispatch.
      - link: for an exchange beside "nccl", the bytes and times of a copy to the next rank.
      - calls: for each implementation and operation p50 and p90 in seconds, the seconds of each iteration,
        and spans, [start, end] of each process in each iteration.
      - checks: what was compared, its error and limit, and whether it is ok.
      - memory: with ``case.memory``, for each implementation what each process saw, in bytes.
      - capacity_bytes, all_routes_bytes: C*H and R*T*K*H elements.

    Raises:
      MoriepError: a process failed; the text has its last lines.
    """
    cases = [dataclasses.replace(case, memory=False)]
    if "nccl" in case.floors:
        cases.append(link_of(case))
    found, *others = _run(cases, timeout, platform_name)
    result = {
        "format": formats.BENCH,
        "command": command,
        "versions": machine.versions(),
        "machine": machine.machine(),
        "case": dataclasses.asdict(case),
        "bytes": moved_bytes(case),
        "calls": joined(found),
        "checks": [check for of_process in found for check in of_process["checks"]],
        "capacity_bytes": case.shape.capacity * case.row_bytes,
        "all_routes_bytes": case.ranks * case.tokens * case.top_k * case.row_bytes,
    }
    for of_link in others:
        result["link"] = {**joined(of_link)[0], "bytes": cases[1].tokens * cases[1].row_bytes}
    if case.memory:
        result["memory"] = {
            name: _run([dataclasses.replace(case, compare=(name,), floors=())], timeout, platform_name)[0]
            for name in case.compare
        }
    return result


def link_of(case: Case, mebibytes: int = 256) -> Case:
    """The measure of the links that fits a case's processes."""
    iters, warmup = KINDS["link"].iterations
    return new_case(
        "link",
        ranks=case.ranks,
        processes=case.processes,
        tokens=max(1, (mebibytes << 20) // case.row_bytes),
        iters=iters,
        warmup=warmup,
        **{name: getattr(case, name) for name in _OF_LINK},
    )


def run_set(
    job: worker.Job,
    timeout: float | None,
    platform_name: str | None,
    env: dict[str, str] | None = None,
    on_progress: Callable[[str, list[list[Any] | None]], None] | None = None,
) -> tuple[list[list[Any] | None], int, str | None]:
    """Runs a job on one set of processes.

    Args:
      job: the cases.
      timeout: seconds after which the processes are ended; None for no limit.
      platform_name: value for JAX_PLATFORMS; None leaves it as it is.
      env: variables for the processes.
      on_progress: takes the lines that the worker writes for people, and for each case what is found so far.

    Returns:
      For each case what each process found, None where one of them did not come so far; how many cases have
      begun; and None, or how the set failed, with the last lines of the process that failed first.
    """
    first = job.cases[0]

    def found_in(folder: Path) -> list[list[Any] | None]:
        of_cases = []
        for i in range(len(job.cases)):
            of_case = [worker.written(folder, i, process) for process in range(first.processes)]
            of_cases.append(None if any(seen is None for seen in of_case) else of_case)
        return of_cases

    def on_line(line: str) -> None:
        if line.startswith(worker.PROGRESS) and on_progress is not None:
            on_progress(line.rstrip(), found_in(folder))

    with tempfile.TemporaryDirectory(prefix="jax-moriep-bench-") as name:
        folder = Path(name)
        job.write(folder)
        failure = processes.run(
            worker.__name__,
            folder,
            first.processes,
            first.ranks // first.processes,
            env=env,
            timeout=timeout,
            platform_name=platform_name,
            on_line=on_line,
        )
        return found_in(folder), worker.begun(folder), failure


def _run(cases: list[Case], timeout: float | None, platform_name: str | None) -> list[list[dict[str, Any]]]:
    """One set of processes, in which nothing may fail; gives what each of them found about each case."""
    env = environment(cases) if platform_name in GPU_PLATFORMS else None
    found, _, said = run_set(worker.Job(cases), timeout, platform_name, env)
    if said is not None:
        raise MoriepError(said)
    return [of_case for of_case in found if of_case is not None]


def moved_bytes(case: Case) -> dict[str, list[int]] | None:
    """Bytes of one dispatch, by rank: received (MORI's convention), and remote; None without an exchange."""
    moved = KINDS[case.kind].traffic(case)
    if moved is None:
        return None
    return {"received": moved.received.tolist(), "remote": moved.remote.tolist()}
