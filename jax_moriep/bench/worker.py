"""What each process of a run does: ``python -m jax_moriep.bench.worker CASE FOLDER``, under the launcher."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax

from jax_moriep.bench import memory
from jax_moriep.bench.cases import Case
from jax_moriep.bench.timing import interleave
from jax_moriep.bench.world import World

BARRIER_FILE = "barrier"
_MEMORY_ITERATIONS = 3


def main(case_text: str, folder: str) -> None:
    """Measures a case and writes what this process saw to ``FOLDER/PROCESS.json``."""
    case = Case.from_json(case_text)
    world = World(case.ranks, Path(folder, BARRIER_FILE))
    found = (_memory if case.memory else _times)(case, world)
    Path(folder, f"{jax.process_index()}.json").write_text(json.dumps(found))
    world.barrier()


def _times(case: Case, world: World) -> dict[str, Any]:
    kind = importlib.import_module(f"jax_moriep.bench.{case.kind}")
    calls = kind.calls(case, world, kind.make_data(case, world))
    spans, checks = interleave(calls, case.iters, case.warmup, world.barrier)
    return {
        "calls": [
            {"name": call.name, "operation": call.operation, "spans": of_call}
            for call, of_call in zip(calls, spans, strict=True)
        ],
        "checks": [{**dataclasses.asdict(check), "ok": check.ok} for check in checks],
    }


def _memory(case: Case, world: World) -> dict[str, int]:
    kind = importlib.import_module(f"jax_moriep.bench.{case.kind}")
    calls = kind.calls(case, world, kind.make_data(case, world))
    before = memory.read()["VmRSS"]  # the data is there, and nothing is compiled yet
    name, operation = case.compare[0], kind.MEMORY_OPERATION
    call = next(call for call in calls if (call.name, call.operation) == (name, operation))

    def run() -> None:
        for _ in range(_MEMORY_ITERATIONS):
            world.barrier()
            call.run()

    run()
    return {"before": before, **memory.peak_during(run)}


if __name__ == "__main__":
    main(*sys.argv[1:])
