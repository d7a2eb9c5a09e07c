"""``bench host``'s measure of the links: every rank sends its tokens to the next, and receives as many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_moriep.bench.against import floors
from jax_moriep.bench.measure.turns import Call, Check
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.world import AXIS, World

OPERATIONS = ("ppermute",)


def make_data(case: Case, world: World) -> jax.Array:
    """[R*T, H], each rank's rows hold its number."""
    count = case.tokens

    def make() -> jax.Array:
        rank = lax.broadcasted_iota(jnp.int32, (case.ranks * count, case.hidden), 0) // count
        return rank.astype(case.numpy_dtype)

    return world.make(make, P(AXIS))


def calls(case: Case, world: World, data: jax.Array) -> list[Call]:
    """The one collective."""
    to_next = [(rank, (rank + 1) % case.ranks) for rank in range(case.ranks)]

    def send(x: jax.Array) -> jax.Array:
        return lax.ppermute(x, AXIS, to_next)

    def check(result: jax.Array) -> list[Check]:
        return [
            Check(
                "ppermute",
                "ppermute",
                f"tokens of rank {rank}",
                float(
                    np.max(
                        np.abs(got[:: max(1, case.tokens // 8)].astype(np.float32) - (rank - 1) % case.ranks)
                    )
                ),
                0.0,
            )
            for rank, got in world.shards(result).items()
        ]

    return [floors.local_call("ppermute", "ppermute", case, world, send, (data,), lambda: (data,), check)]
