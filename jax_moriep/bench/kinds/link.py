"""``bench host``'s measure of the links: every rank sends its tokens to the next, and receives as many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure.calls import Entry, local_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.names import SEND_TO_NEXT
from jax_moriep.bench.problem.world import AXIS, World


class Link(Kind):
    """The one collective."""

    name = "link"
    operations = (SEND_TO_NEXT,)
    comparable = compared = (SEND_TO_NEXT,)
    iterations = (10, 2)
    repeats_on_gpus = 5
    fills_arenas = False

    def make_data(self, case: Case, world: World) -> jax.Array:
        """[R*T, H], each rank's rows hold its number."""
        count = case.tokens

        def make() -> jax.Array:
            rank = lax.broadcasted_iota(jnp.int32, (case.ranks * count, case.hidden), 0) // count
            return rank.astype(case.numpy_dtype)

        return world.make(make, P(AXIS))

    def calls(self, case: Case, world: World, data: jax.Array) -> list[Call]:
        """The one collective."""
        to_next = [(rank, (rank + 1) % case.ranks) for rank in range(case.ranks)]

        def send(x: jax.Array) -> jax.Array:
            return lax.ppermute(x, AXIS, to_next)

        def check(result: jax.Array) -> list[Check]:
            checks = []
            for rank, got in world.shards(result).items():
                some = got[:: max(1, case.tokens // 8)].astype(np.float32)
                error = float(np.max(np.abs(some - (rank - 1) % case.ranks)))
                checks.append(Check(SEND_TO_NEXT, SEND_TO_NEXT, f"tokens of rank {rank}", error, 0.0))
            return checks

        entry = Entry(SEND_TO_NEXT, SEND_TO_NEXT, case, world)
        return [local_call(entry, send, (data,), lambda: (data,), check)]
