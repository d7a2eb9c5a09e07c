"""Runs a case on its processes and joins what they saw into one JSON-able result."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_moriep import quant
from jax_moriep.bench import exchange, worker
from jax_moriep.bench.cases import GPU_PLATFORMS, ITERATIONS, Case, is_baseline
from jax_moriep.bench.exchanges import FP8, puts
from jax_moriep.bench.timing import percentile, slowest
from jax_moriep.errors import MoriepError
from jax_moriep.mori import limits
from jax_moriep.processes.launch import LaunchResult, launch
from jax_moriep.version import __version__

FORMAT = "jax-moriep bench 1"
"""Of the result; ``plot`` reads this one."""
_SHOWN_LINES = 30
_KEPT_LINES = 400


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
        "format": FORMAT,
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "case": dataclasses.asdict(case),
        "bytes": moved_bytes(case) if case.kind == "exchange" else None,
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


def failed_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a result that found something wrong, but not with a baseline."""
    return [check for check in result["checks"] if not (check["ok"] or is_baseline(check["name"]))]


def link_of(case: Case, mebibytes: int = 256) -> Case:
    """The measure of the links that fits a case's processes."""
    tokens = max(1, (mebibytes << 20) // case.row_bytes)
    iters, warmup = ITERATIONS["link"]
    return dataclasses.replace(
        case,
        kind="link",
        tokens=tokens,
        compare=(),
        floors=(),
        operations=(),
        iters=iters,
        warmup=warmup,
        memory=False,
        capacity_factor=None,
    )


def environment(cases: list[Case]) -> dict[str, str]:
    """What processes on GPUs need: arenas and a heap that hold the steps, and room beside XLA's pool."""
    slots = [case.tokens * _rows_per_token(case) * case.row_bytes for case in cases if case.kind != "link"]
    megabytes = max(1024, int(2.1 * max(slots, default=0)) // (1 << 20) + 32)
    wanted = {"JAX_MORIEP_ARENA_MB": str(megabytes), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.7"}
    if any("mori" in case.transports for case in cases):
        wanted["JAX_MORIEP_MORI_HEAP_MB"] = str(_mori_heap(cases))
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _rows_per_token(case: Case) -> int:
    """Rows of an arena's half for each token of a rank: what combine pushes, or dispatch puts.

    two_level has those of other nodes there too.
    """
    parts = case.ranks - 1 if any(map(puts, case.compare)) else 0
    nodes = case.ranks if "two_level" in case.transports else 0
    return max(min(case.top_k, case.ranks), parts, nodes)


def _mori_heap(cases: list[Case]) -> int:
    """MiB that hold a handle for each of the cases: the heap is as large as it was made for the first."""
    sizes = {
        limits.HandleSize(
            kernel="IntraNode",
            ranks=case.ranks,
            gpus_per_node=limits.gpus_per_node("IntraNode", case.ranks, 1),
            max_tokens=case.tokens,
            hidden=case.hidden,
            element_bytes=case.numpy_dtype.itemsize,
            experts_per_rank=case.shape.num_local_experts,
            top_k=case.top_k,
            scales=-(-case.hidden // quant.GROUP) if name.endswith(FP8) else 0,
        )
        for case in cases
        if "mori" in case.transports
        for name in case.compare
        if name.startswith("mori")
    }
    return (limits.HEAP_OWN_BYTES + sum(map(limits.heap_bytes, sizes)) >> 20) + 1


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
    lines: list[list[str]] = [[] for _ in range(first.processes)]

    def found_in(folder: str) -> list[list[Any] | None]:
        of_cases = []
        for i in range(len(job.cases)):
            of_case = [worker.found(Path(folder), i, process) for process in range(first.processes)]
            of_cases.append(None if any(seen is None for seen in of_case) else of_case)
        return of_cases

    def on_line(process: int, line: str) -> None:
        if line.startswith(worker.PROGRESS) and on_progress is not None:
            on_progress(line.rstrip(), found_in(folder))
        lines[process].append(line.rstrip("\n"))
        del lines[process][:-_KEPT_LINES]

    with tempfile.TemporaryDirectory(prefix="jax-moriep-bench-") as folder:
        job.write(Path(folder))
        ended = launch(
            worker.__name__,
            first.processes,
            first.ranks // first.processes,
            args=[folder],
            env=env,
            timeout=timeout,
            platform=platform_name,
            module=True,
            on_line=on_line,
        )
        return found_in(folder), worker.begun(Path(folder)), failure(ended, lines)


def failure(ended: LaunchResult, lines: Sequence[Sequence[str]]) -> str | None:
    """How a set of processes failed, with the last lines of the one that failed first; None if it did not."""
    if not ended.returncode:
        return None
    process = next((i for i, code in enumerate(ended.codes) if code == ended.returncode), 0)
    shown = "\n".join(lines[process][-_SHOWN_LINES:])
    return f"process {process} of the bench ended with code {ended.returncode}; it said:\n{shown}"


def _run(cases: list[Case], timeout: float | None, platform_name: str | None) -> list[list[dict[str, Any]]]:
    """One set of processes, in which nothing may fail; gives what each of them found about each case."""
    env = environment(cases) if platform_name in GPU_PLATFORMS else None
    found, _, said = run_set(worker.Job(cases), timeout, platform_name, env)
    if said is not None:
        raise MoriepError(said)
    return [of_case for of_case in found if of_case is not None]


def joined(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls of a case, as all processes saw them."""
    return [_joined([of_process["calls"][i] for of_process in found]) for i in range(len(found[0]["calls"]))]


def _joined(of_process: list[dict[str, Any]]) -> dict[str, Any]:
    """One call, as all processes saw it; a time is that of one of its repeats."""
    spans = [call["spans"] for call in of_process]
    seconds = slowest(spans) / of_process[0]["repeats"]
    return {
        "name": of_process[0]["name"],
        "operation": of_process[0]["operation"],
        "p50": percentile(seconds, 50),
        "p90": percentile(seconds, 90),
        "seconds": seconds.tolist(),
        "spans": np.swapaxes(np.asarray(spans), 0, 1).tolist(),
    }


def moved_bytes(case: Case) -> dict[str, list[int]]:
    """Bytes of one dispatch, by rank: received (MORI's convention), and remote."""
    moved = exchange.traffic_of(case)
    return {"received": moved.received.tolist(), "remote": moved.remote.tolist()}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"jax_moriep": __version__, "python": platform.python_version(), **installed}


def machine() -> dict[str, Any]:
    """What this is run on; GPUs are the processes' matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = named[0] if named else model
    system = f"{platform.system()} {platform.machine()}"
    return {"cores": len(os.sched_getaffinity(0)), "processor": model, "system": system}
