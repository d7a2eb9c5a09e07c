"""What each process of ``bench load`` does: ``python -m jax_moriep.bench.run.load_worker FOLDER``.

FOLDER has ``job.json`` and the barrier; each process writes what it saw to ``PROCESS.json``.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jax_moriep.bench.kinds import load
from jax_moriep.bench.measure import memory
from jax_moriep.bench.measure.turns import measured
from jax_moriep.bench.problem.checkpoint import Model
from jax_moriep.bench.problem.world import World

BARRIER = "barrier"


def main(folder: str) -> None:
    """Does the job in a folder."""
    place = Path(folder)
    job = json.loads((place / "job.json").read_text())
    model, checkpoint = Model(**job["model"]), Path(job["checkpoint"])
    world = World(job["processes"], place / BARRIER)
    calls = load.calls(model, checkpoint, world)
    # The turn that warms up, in a process that has loaded nothing yet, tells of memory.
    peaks = {call.name: _memory(call.run, world) for call in calls}
    seen = {**measured(calls, job["rounds"], 0, lambda: _barrier(world)), "memory": peaks}
    (place / f"{jax.process_index()}.json").write_text(json.dumps(seen))
    world.barrier()


def _barrier(world: World) -> None:
    # A CPU's device that has taken a NumPy array lets go of it at the next call of jax, or here.
    gc.collect()
    world.barrier()


def _memory(run: Callable[[], Any], world: World) -> dict[str, int]:
    kept = []
    _barrier(world)
    return memory.peak_during(lambda: kept.append(run()))


if __name__ == "__main__":
    main(*sys.argv[1:])
