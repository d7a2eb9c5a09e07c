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
import numpy as np

from jax_moriep import weights
from jax_moriep.bench.measure import memory
from jax_moriep.bench.measure.turns import Call, Check, measured
from jax_moriep.bench.problem.checkpoint import MATRICES, Model
from jax_moriep.bench.problem.world import World
from jax_moriep.config import MoEConfig
from jax_moriep.weights.files import INDEX

OURS, THEIRS = "jm.weights.load", "safetensors"
BARRIER = "barrier"


def main(folder: str) -> None:
    """Does the job in a folder."""
    place = Path(folder)
    job = json.loads((place / "job.json").read_text())
    model, checkpoint = Model(**job["model"]), Path(job["checkpoint"])
    world = World(job["processes"], place / BARRIER)
    calls = [
        Call(OURS, "load", lambda: _ours(checkpoint, world), lambda got: _check_ours(got, model, world)),
        Call(
            THEIRS, "load", lambda: _theirs(checkpoint, model, world), lambda got: _check_theirs(got, model)
        ),
    ]
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


def experts_of(model: Model, world: World) -> range:
    """The experts of this process, which has one rank."""
    each = -(-model.num_experts // world.mesh.size)
    first = world.ranks[0] * each
    return range(min(first, model.num_experts), min(first + each, model.num_experts))


def _ours(checkpoint: Path, world: World) -> Any:
    cfg = MoEConfig.from_hf(checkpoint)
    return jax.block_until_ready(weights.load(checkpoint, cfg, mesh=world.mesh))


def _theirs(checkpoint: Path, model: Model, world: World) -> dict[str, np.ndarray]:
    """The same bytes, each tensor an array of its own, file by file."""
    # Imported here, because the package does not depend on it.
    import safetensors

    mine = experts_of(model, world)
    file_of = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    read = {}
    for file in sorted(set(file_of.values())):
        with safetensors.safe_open(checkpoint / file, framework="np") as opened:
            for name in opened.keys():
                words = name.split(".")
                if words[-3].isdigit() and int(words[-3]) not in mine:
                    continue
                read[name] = opened.get_slice(name)[:]
    return read


def _check_ours(params: Any, model: Model, world: World) -> list[Check]:
    """All bits of this process's experts and of the routers."""
    (w1,), (w2,) = (world.shards(w).values() for w in (params.w1, params.w2))
    mine, wrong = experts_of(model, world), 0
    for layer in range(model.num_layers):
        for i, expert in enumerate(mine):
            gate, up, down = (model.bits(layer, expert, matrix) for matrix in MATRICES)
            of_w1, of_w2 = w1[layer, i].view(np.uint16), w2[layer, i].view(np.uint16)
            wrong += int(
                (of_w1[: model.intermediate] != gate).sum() + (of_w1[model.intermediate :] != up).sum()
            )
            wrong += int((of_w2 != down).sum())
        (router,) = {shard.data.tobytes() for shard in params.router[layer].addressable_shards}
        wrong += router != model.router_bits(layer).T.tobytes()
    shape = (model.num_layers, -(-model.num_experts // world.mesh.size), 2 * model.intermediate, model.hidden)
    wrong += w1.shape != shape
    return [Check(OURS, "load", "bits that differ", float(wrong), 0.0)]


def _check_theirs(read: dict[str, np.ndarray], model: Model) -> list[Check]:
    wrong = 0
    for name, value in read.items():
        words = name.split(".")
        if words[-3].isdigit():
            wrong += int(
                (value.view(np.uint16) != model.bits(int(words[2]), int(words[-3]), words[-2])).sum()
            )
    return [Check(THEIRS, "load", "bits that differ", float(wrong), 0.0)]


if __name__ == "__main__":
    main(*sys.argv[1:])
