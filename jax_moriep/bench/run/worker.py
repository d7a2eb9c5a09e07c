"""What each process of a run does: ``python -m jax_moriep.bench.run.worker FOLDER``, under the launcher.

The folder holds the job. For each case a process writes what it saw to ``FOLDER/CASE-PROCESS.json`` as soon
as the case is through.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jax_moriep import transports
from jax_moriep.bench.kinds.table import KINDS, title_of, transports_of
from jax_moriep.bench.measure import memory, pool
from jax_moriep.bench.measure.turns import Call, measured
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import puts
from jax_moriep.bench.problem.world import AXIS, Barrier, World
from jax_moriep.errors import TransportError
from jax_moriep.runtime import group
from jax_moriep.runtime.place import Place

_MEMORY_ITERATIONS = 3
_JOB = "job.json"
EVERYTHING = "everything"
"""The name under which a failure of a whole case is noted."""
PROGRESS = "bench: "
"""Begins a line for people, from process 0."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a set of processes does.

    Args:
      cases: of equally many ranks in equally many processes.
      lenient: an entry that fails is recorded and the others go on; else it ends the process.
      until: no case begins after this moment of the clock that all processes share; None for no limit.
      case_seconds: a process that is longer at a case prints its stacks and ends; None for no limit.
    """

    cases: list[Case]
    lenient: bool = False
    until: float | None = None
    case_seconds: float | None = None

    def write(self, folder: Path) -> None:
        """Puts the job and its barriers into a folder."""
        text = {**vars(self), "cases": [case.to_json() for case in self.cases]}
        Path(folder, _JOB).write_text(json.dumps(text))
        for i in range(len(self.cases) + 1):
            Barrier.create(_barrier(folder, i), self.cases[0].processes)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job that ``write`` put there."""
        fields = json.loads(Path(folder, _JOB).read_text())
        return cls(**{**fields, "cases": [Case.from_json(text) for text in fields["cases"]]})


def written(folder: Path, case: int, process: int) -> Any | None:
    """What a process wrote about a case; None if it did not come so far."""
    path = Path(folder, f"{case}-{process}.json")
    return json.loads(path.read_text()) if path.exists() else None


def begun(folder: Path) -> int:
    """How many cases have begun."""
    return len(list(folder.glob("*.begun")))


def _barrier(folder: Path, case: int) -> Path:
    return Path(folder, f"barrier-{case}")


def main(folder: str) -> None:
    """Does the job in a folder."""
    place = Path(folder)
    job = Job.read(place)
    world = World(job.cases[0].ranks, _barrier(place, 0))
    if not job.lenient:
        _refuse(job.cases, world)
    for i, case in enumerate(job.cases):
        world.use_barrier(_barrier(place, i))
        (place / f"{i}.begun").touch()
        if job.case_seconds is not None:
            faulthandler.dump_traceback_later(job.case_seconds, exit=True)
        began = time.monotonic()
        seen: dict[str, Any]
        if job.lenient:
            seen = _leniently(case, world, job.until)
        else:
            seen = (_memory if case.memory else _times)(case, world)
        if job.lenient:
            seen["seconds"] = time.monotonic() - began
            seen["device"] = world.mesh.devices.flat[0].device_kind
        part = place / f"{i}-{jax.process_index()}.part"
        part.write_text(json.dumps(seen))
        part.rename(part.with_suffix(".json"))
        if job.lenient:
            _say(f"{title_of(case)}: {seen['seconds']:.1f} s, {len(seen['failed'])} failed")
            # After a failed exchange all that follow in this process fail too; others may take over.
            group.check_failures()
    faulthandler.cancel_dump_traceback_later()
    world.use_barrier(_barrier(place, len(job.cases)))
    world.barrier()


def _refuse(cases: list[Case], world: World) -> None:
    """Ends the process with the reason, and nothing else, where what is named cannot run."""
    here = Place.of(world.mesh, AXIS)
    try:
        for name in dict.fromkeys(name for case in cases for name in transports_of(case)):
            transports.choose(name, here)
    except TransportError as e:
        sys.exit(str(e))
    for name in dict.fromkeys(name for case in cases for name in case.compare):
        if puts(name) and here.platform != "gpu":
            sys.exit(f"{name} cannot run here: native puts between GPUs only; leave it out of --compare")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        sys.stdout.write(f"{PROGRESS}{text}\n")
        sys.stdout.flush()


def _times(case: Case, world: World) -> dict[str, Any]:
    kind = KINDS[case.kind]
    return _measured(kind.calls(case, world, kind.make_data(case, world)), case, world)


def _measured(calls: list[Call], case: Case, world: World) -> dict[str, Any]:
    return measured(calls, case.iters, case.warmup, world.barrier)


def _leniently(case: Case, world: World, until: float | None) -> dict[str, Any]:
    """As ``_times``, but what fails is recorded, in all processes alike."""
    nothing: dict[str, Any] = {"calls": [], "checks": [], "failed": []}
    if not all(world.agree([until is None or time.monotonic() < until])):
        return {**nothing, "failed": [{**_failure(EVERYTHING, "", "no time was left"), "not_run": True}]}
    failed: list[dict[str, Any]] = []
    try:
        kind = KINDS[case.kind]
        calls = kind.calls(case, world, kind.make_data(case, world))
        began = time.monotonic()
        errors = pool.prepare([call.programs for call in calls])
        _say(f"{title_of(case)}: {len(calls)} entries compiled in {time.monotonic() - began:.1f} s")
        calls = _agreed(calls, errors, world, failed)
        seen = _measured(_tried(calls, world, failed), case, world)
        group.check_failures()
        return {**seen, "failed": failed}
    except Exception as e:  # noqa: BLE001 - recorded, and the next case goes on
        world.barrier.leave()
        return {**nothing, "failed": [*failed, _failure(EVERYTHING, "", pool.describe(e))]}
    finally:
        gc.collect()


def _tried(calls: list[Call], world: World, failed: list[dict[str, Any]]) -> list[Call]:
    """Those that run once without an error."""
    good = []
    for call in calls:
        error = None
        try:
            for run in (call.once, call.run):
                if run is not None:
                    run()
        except Exception as e:  # noqa: BLE001 - recorded, and the others go on
            error = pool.describe(e)
        good += _agreed([call], [error], world, failed)
    return good


def _agreed(
    calls: list[Call], errors: list[str | None], world: World, failed: list[dict[str, Any]]
) -> list[Call]:
    """The calls that met no error in any process; the others are noted."""
    good = world.agree([error is None for error in errors])
    for call, error, ok in zip(calls, errors, good, strict=True):
        if not ok:
            failed.append(_failure(call.name, call.operation, error or "it failed in another process"))
    return [call for call, ok in zip(calls, good, strict=True) if ok]


def _failure(name: str, operation: str, error: str) -> dict[str, Any]:
    return {"name": name, "operation": operation, "error": error}


def _memory(case: Case, world: World) -> dict[str, int]:
    kind = KINDS[case.kind]
    calls = kind.calls(case, world, kind.make_data(case, world))
    before = memory.read()["VmRSS"]  # the data is there, and nothing is compiled yet
    name, operation = case.compare[0], case.operations[-1] if case.operations else kind.memory_operation
    call = next(call for call in calls if (call.name, call.operation) == (name, operation))

    def run() -> None:
        for _ in range(_MEMORY_ITERATIONS):
            world.barrier()
            call.run()

    run()
    return {"before": before, **memory.peak_during(run)}


if __name__ == "__main__":
    main(*sys.argv[1:])
