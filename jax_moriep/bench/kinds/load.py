"""``bench load``: ``jm.weights.load`` beside ``safetensors`` reading the same bytes, all bits compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moriep import weights
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.checkpoint import MATRICES, Model
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.world import World
from jax_moriep.config import MoEConfig
from jax_moriep.weights.files import INDEX

OURS, THEIRS = "jm.weights.load", "safetensors"


def calls(model: Model, checkpoint: Path, world: World) -> list[Call]:
    """Both ways of loading a checkpoint."""
    return [
        Call(OURS, "load", lambda: _ours(checkpoint, world), lambda got: _check_ours(got, model, world)),
        Call(
            THEIRS, "load", lambda: _theirs(checkpoint, model, world), lambda got: _check_theirs(got, model)
        ),
    ]


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
