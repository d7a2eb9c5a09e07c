"""``bench exchange``: dispatch and combine over several transports, beside a memcpy of the same bytes."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_moriep import exchange
from jax_moriep.bench import oracle, patterns, traffic
from jax_moriep.bench.cases import Case
from jax_moriep.bench.timing import Call, Check
from jax_moriep.bench.world import AXIS, World
from jax_moriep.plan import Dispatched

BOTH = "dispatch+combine"
OPERATIONS = (BOTH, "dispatch", "combine")
MEMORY_OPERATION = BOTH
FLOOR = "memcpy"


@dataclasses.dataclass(frozen=True)
class Data:
    """The tokens of all ranks, on the host and on the devices."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    placed: tuple[jax.Array, jax.Array, jax.Array]


def make_data(case: Case, world: World) -> Data:
    """The tokens of all ranks; the same in every process."""
    rng = np.random.default_rng(case.seed)
    num_tokens = case.ranks * case.tokens
    ids = patterns.PATTERNS[case.routing](rng, num_tokens, case.experts, case.top_k)
    x = rng.standard_normal((num_tokens, case.hidden), np.float32).astype(case.numpy_dtype)
    weights = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    x_placed, ids_placed, weights_placed = (world.place(a, P(AXIS)) for a in (x, ids, weights))
    return Data(x, ids, weights, (x_placed, ids_placed, weights_placed))


def traffic_of(case: Case) -> traffic.Traffic:
    """The bytes of one dispatch."""
    rng = np.random.default_rng(case.seed)
    ids = patterns.PATTERNS[case.routing](rng, case.ranks * case.tokens, case.experts, case.top_k)
    return traffic.of_routes(ids, case.ranks, case.shape.num_local_experts, case.row_bytes)


def calls(case: Case, world: World, data: Data) -> list[Call]:
    """Dispatch and combine of each transport, together and alone, and the floor under each."""
    expected = _Expected(case, data)
    made = _floor(case, world)
    for name in case.compare:
        made += _calls_of(name, case, world, data, expected)
    return made


def _calls_of(name: str, case: Case, world: World, data: Data, expected: _Expected) -> list[Call]:
    cfg = case.config(transport=name)

    def dispatch(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Dispatched:
        return exchange.dispatch(x, ids, weights, cfg, axis_name=AXIS)

    def combine(disp: Dispatched) -> jax.Array:
        return exchange.combine(disp.rows, disp.plan, axis_name=AXIS)

    def both(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return combine(dispatch(x, ids, weights))

    def weighted(disp: Dispatched) -> Dispatched:
        return dataclasses.replace(disp, rows=disp.rows * disp.row_weights[:, None].astype(disp.rows.dtype))

    def on_mesh(fn: Any) -> Any:
        return jax.jit(jax.shard_map(fn, mesh=world.mesh, in_specs=P(AXIS), out_specs=P(AXIS)))

    run_dispatch, run_combine, run_both = on_mesh(dispatch), on_mesh(combine), on_mesh(both)
    # Combine alone takes rows that differ from expert to expert, so that a row that went astray shows.
    combine_input = functools.cache(lambda: on_mesh(weighted)(run_dispatch(*data.placed)))
    return [
        Call(
            name,
            BOTH,
            lambda: jax.block_until_ready(run_both(*data.placed)),
            lambda y: expected.check_tokens(name, BOTH, world.shards(y), expected.sums),
        ),
        Call(
            name,
            "dispatch",
            lambda: jax.block_until_ready(run_dispatch(*data.placed)),
            lambda disp: expected.check_rows(name, world, disp),
        ),
        Call(
            name,
            "combine",
            lambda: jax.block_until_ready(run_combine(combine_input())),
            lambda y: expected.check_tokens(name, "combine", world.shards(y), expected.weighted_sums),
        ),
    ]


class _Expected:
    """What every rank must get."""

    def __init__(self, case: Case, data: Data) -> None:
        self.shape = case.shape
        self.data = data
        self.rows = oracle.place_routes(data.ids, self.shape)
        kept = self.rows.row_of_route != oracle.DROPPED
        x = data.x.astype(np.float64)
        self.sums = x * kept.sum(axis=1, keepdims=True)
        self.weighted_sums = x * (data.weights * kept).sum(axis=1, dtype=np.float64, keepdims=True)
        # Each term is rounded to the rows' dtype when it is weighted and when a rank has summed its part, and
        # the total once more; the sums themselves are in f32.
        self.tolerance = (case.top_k + 3) * float(jnp.finfo(case.numpy_dtype).eps)

    def check_rows(self, name: str, world: World, disp: Dispatched) -> list[Check]:
        """Compares what dispatch gave; it moves values and does not change them."""
        checks = []
        got = [world.shards(array) for array in (disp.rows, disp.row_weights, disp.group_sizes)]
        for rank in world.ranks:
            token, k, row = self.rows.on(rank, self.data.ids, self.shape)
            rows = np.zeros((self.shape.capacity, self.shape.hidden_size), self.data.x.dtype)
            rows[row] = self.data.x[token]
            weights = np.zeros(self.shape.capacity, np.float32)
            weights[row] = self.data.weights[token, k]
            sizes = self.rows.counts_on(rank, self.shape)
            names = ("rows", "row_weights", "group_sizes")
            for what, of_rank, want in zip(names, got, (rows, weights, sizes), strict=True):
                error = oracle.largest_error(of_rank[rank], want.astype(np.float64))
                checks.append(Check(name, "dispatch", f"{what} of rank {rank}", error, 0.0))
        return checks

    def check_tokens(
        self, name: str, operation: str, got: dict[int, np.ndarray], want: np.ndarray
    ) -> list[Check]:
        """Compares what combine gave."""
        checks = []
        for rank, y in got.items():
            mine = want[rank * self.shape.num_tokens :][: self.shape.num_tokens]
            limit = self.tolerance * float(np.max(np.abs(mine)))
            error = oracle.largest_error(y, mine)
            checks.append(Check(name, operation, f"tokens of rank {rank}", error, limit))
        return checks


def _floor(case: Case, world: World) -> list[Call]:
    """One copy, by each rank at the same time, of as many bytes as it receives, between two warm buffers."""
    received = traffic_of(case).received
    buffers = [(np.ones(received[r], np.uint8), np.ones(received[r], np.uint8)) for r in world.ranks]

    def copy(to: np.ndarray, source: np.ndarray) -> None:
        ctypes.memmove(to.ctypes.data, source.ctypes.data, source.size)

    def there(pair: tuple[np.ndarray, np.ndarray]) -> None:
        copy(pair[0], pair[1])

    def there_and_back(pair: tuple[np.ndarray, np.ndarray]) -> None:
        copy(pair[0], pair[1])
        copy(pair[1], pair[0])

    jobs = {BOTH: there_and_back, "dispatch": there, "combine": there}
    made = []
    for operation, job in jobs.items():
        of_rank = [functools.partial(job, pair) for pair in buffers]
        made.append(Call(FLOOR, operation, functools.partial(world.together, of_rank)))
    return made
