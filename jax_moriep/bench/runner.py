"""Runs a case on its processes and joins what they saw into one JSON-able result."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jax_moriep.bench import exchange, worker
from jax_moriep.bench.cases import Case
from jax_moriep.bench.timing import percentile, slowest
from jax_moriep.bench.world import Barrier
from jax_moriep.cli.launch import launch
from jax_moriep.errors import MoriepError
from jax_moriep.version import __version__

FORMAT = "jax-moriep bench 1"
"""Of the result; ``plot`` reads this one."""
_SHOWN_LINES = 30


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
      - calls: for each implementation and operation p50 and p90 in seconds, the seconds of each iteration,
        and spans, [start, end] of each process in each iteration.
      - checks: what was compared, its error and limit, and whether it is ok.
      - memory: with ``case.memory``, for each implementation what each process saw, in bytes.
      - capacity_bytes, all_routes_bytes: C*H and R*T*K*H elements.

    Raises:
      MoriepError: a process failed; the text has its last lines.
    """
    found = _run(dataclasses.replace(case, memory=False), timeout, platform_name)
    result = {
        "format": FORMAT,
        "command": command,
        "versions": _versions(),
        "machine": _machine(),
        "case": dataclasses.asdict(case),
        "bytes": _bytes(case) if case.kind == "exchange" else None,
        "calls": [
            _joined([of_process["calls"][i] for of_process in found]) for i in range(len(found[0]["calls"]))
        ],
        "checks": [check for of_process in found for check in of_process["checks"]],
        "capacity_bytes": case.shape.capacity * case.row_bytes,
        "all_routes_bytes": case.ranks * case.tokens * case.top_k * case.row_bytes,
    }
    if case.memory:
        result["memory"] = {
            name: _run(dataclasses.replace(case, compare=(name,)), timeout, platform_name)
            for name in case.compare
        }
    return result


def failed_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a result that found something wrong."""
    return [check for check in result["checks"] if not check["ok"]]


def _run(case: Case, timeout: float | None, platform_name: str | None) -> list[dict[str, Any]]:
    """One set of processes; gives what each of them found."""
    with tempfile.TemporaryDirectory(prefix="jax-moriep-bench-") as folder:
        Barrier.create(Path(folder, worker.BARRIER_FILE), case.processes)
        ended = launch(
            worker.__name__,
            case.processes,
            case.ranks // case.processes,
            args=[case.to_json(), folder],
            timeout=timeout,
            capture=True,
            platform=platform_name,
            module=True,
        )
        if ended.returncode:
            process = next((i for i, code in enumerate(ended.codes) if code == ended.returncode), 0)
            said = "\n".join(ended.outputs[process].splitlines()[-_SHOWN_LINES:])
            raise MoriepError(
                f"process {process} of the bench ended with code {ended.returncode}; it said:\n{said}"
            )
        return [json.loads(Path(folder, f"{i}.json").read_text()) for i in range(case.processes)]


def _joined(of_process: list[dict[str, Any]]) -> dict[str, Any]:
    """One call, as all processes saw it."""
    spans = [call["spans"] for call in of_process]
    seconds = slowest(spans)
    return {
        "name": of_process[0]["name"],
        "operation": of_process[0]["operation"],
        "p50": percentile(seconds, 50),
        "p90": percentile(seconds, 90),
        "seconds": seconds.tolist(),
        "spans": np.swapaxes(np.asarray(spans), 0, 1).tolist(),
    }


def _bytes(case: Case) -> dict[str, list[int]]:
    moved = exchange.traffic_of(case)
    return {"received": moved.received.tolist(), "remote": moved.remote.tolist()}


def _versions() -> dict[str, str]:
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"jax_moriep": __version__, "python": platform.python_version(), **installed}


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = named[0] if named else model
    return {"cores": len(os.sched_getaffinity(0)), "processor": model, "system": platform.platform()}
